//! `relay token`: makes a token for tests.

use std::io::Write;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use clap::Args;
use serde_json::{Map, Value};

use crate::auth::verifier::mint;
use crate::config::NO_SECRET;
use crate::model::identity::claims::Claims;

/// The contents of the token.
#[derive(Args)]
pub struct TokenOptions {
    /// The secret with which `relay serve` verifies tokens
    #[arg(long, env = "RELAY_JWT_SECRET", hide_env_values = true, value_name = "SECRET")]
    jwt_secret: Option<String>,
    /// The database role of the bearer
    #[arg(long, default_value = "authenticated")]
    role: String,
    /// The bearer's id, which auth.uid() returns; null without this option
    #[arg(long, value_name = "UUID")]
    sub: Option<String>,
    /// More claims, as a JSON object
    #[arg(long, value_name = "JSON")]
    claims: Option<String>,
    /// How long it is valid: 90s, 15m, 1h, 7d
    #[arg(long, default_value = "1h")]
    ttl: String,
}

/// Prints the token.
///
/// # Errors
/// When an option is invalid.
pub fn run(options: &TokenOptions) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let secret = options.jwt_secret.as_deref().ok_or(NO_SECRET)?;
    let mut claims: Map<String, Value> = match &options.claims {
        Some(text) => {
            serde_json::from_str(text).map_err(|error| format!("--claims is not a JSON object: {error}"))?
        }
        None => Map::new(),
    };
    let given_twice = ["role", "sub"].into_iter().filter(|name| *name == "role" || options.sub.is_some());
    if let Some(name) = given_twice.into_iter().find(|name| claims.contains_key(*name)) {
        return Err(format!("--claims has {name}, which --{name} sets: give it there").into());
    }
    if options.role.trim().is_empty() {
        return Err(
            "--role is empty, and a token without a role is refused: name one, such as authenticated or anon"
                .into(),
        );
    }
    claims.insert(String::from("role"), Value::from(options.role.clone()));
    if let Some(sub) = &options.sub {
        claims.insert(String::from("sub"), Value::from(sub.clone()));
        if !is_uuid(sub) {
            let note =
                "note: --sub is not a UUID, as auth.uid() requires: policies that call it will show nothing";
            writeln!(std::io::stderr(), "{note}")?;
        }
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    let token = mint(secret, &claims, now, span(&options.ttl)?)?;
    writeln!(std::io::stdout(), "{token}")?;
    Ok(())
}

/// Reads the claims of a token, without checking its signature or expiry.
///
/// # Errors
/// When it is not a token, or its claims are invalid.
pub fn bearer(token: &str) -> Result<Claims, String> {
    let payload = token.split('.').nth(1).and_then(|part| URL_SAFE_NO_PAD.decode(part).ok());
    let payload = payload.and_then(|bytes| String::from_utf8(bytes).ok());
    usable(&payload.ok_or("--token is not a JWT: relay token --sub UUID makes one")?)
}

/// Reads claims as a relay would.
///
/// # Errors
/// When they are invalid.
pub fn usable(payload: &str) -> Result<Claims, String> {
    Claims::from_verified_payload(payload).map_err(|error| format!("these claims cannot be used: {error}"))
}

/// Whether PostgreSQL accepts the text as a UUID: dashes and braces are optional.
fn is_uuid(text: &str) -> bool {
    let digits = text.chars().filter(char::is_ascii_hexdigit).count();
    digits == 32 && text.chars().all(|c| c.is_ascii_hexdigit() || "-{}".contains(c))
}

fn span(text: &str) -> Result<Duration, String> {
    let wrong = || format!("--ttl {text}: expected a number with s, m, h or d, such as 90s or 1h");
    let unit = text.chars().last().ok_or_else(wrong)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return Err(wrong()),
    };
    let number: u64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
    number.checked_mul(seconds).map(Duration::from_secs).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_that_is_not_a_uuid_is_recognized() {
        assert!(is_uuid("0a000000-0000-4000-8000-00000000000A"));
        for wrong in
            ["", "u-1", "0a000000-0000-4000-8000-00000000000", "0a000000-0000-4000-8000-00000000000g"]
        {
            assert!(!is_uuid(wrong), "{wrong}");
        }
    }

    #[test]
    fn spans_are_parsed_with_their_unit() {
        assert_eq!(span("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(span("7d"), Ok(Duration::from_secs(604_800)));
        for wrong in ["", "h", "1", "1.5h", "-1h", "1w", "99999999999999999999s", "é"] {
            assert!(span(wrong).is_err(), "{wrong}");
        }
    }
}
