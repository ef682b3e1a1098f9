//! `relay tail`: subscribes to one table at a running relay and prints the changes.

use std::borrow::Cow;
use std::collections::{HashSet, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::io::Write;
use std::time::{Duration, SystemTime};

use clap::Args;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;

use crate::auth::verifier::mint;
use crate::command::realtime_socket::{ConnectError, RealtimeSocket, ServerAddress};
use crate::command::token::bearer;
use crate::model::codec::protocol::{STALLED, SUBSCRIBED};
use crate::model::identity::claims::Claims;
use crate::model::session::machine::UNAVAILABLE;
use crate::model::subscription::error::SubscribeError;

type TailFailure = Box<dyn std::error::Error + Send + Sync>;

/// The table, the relay and the token.
#[derive(Args)]
pub struct TailOptions {
    /// The table, with its schema if that is not public
    table: String,
    /// Only rows that match, e.g. list_id=eq.7
    #[arg(long, value_name = "FILTER")]
    filter: Option<String>,
    /// The address of the relay
    #[arg(long, env = "RELAY_URL", default_value = "http://127.0.0.1:4000")]
    url: String,
    /// Show what the bearer of this token may see [default: what service_role may see, by a token made with the secret]
    #[arg(long, env = "RELAY_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    token: Option<String>,
    /// The secret with which `relay serve` verifies tokens, to make one for the role service_role
    #[arg(long, env = "RELAY_JWT_SECRET", hide_env_values = true, value_name = "SECRET")]
    jwt_secret: Option<String>,
}

impl TailOptions {
    /// Schema and name of the table.
    fn relation(&self) -> (&str, &str) {
        self.table.split_once('.').unwrap_or(("public", &self.table))
    }
}

/// Prints changes until interrupted; reconnects when the connection is lost.
///
/// # Errors
/// When the relay refuses the token or the table.
pub async fn run(options: TailOptions) -> Result<(), TailFailure> {
    let token = match (&options.token, &options.jwt_secret) {
        (Some(token), _) => token.clone(),
        (None, Some(secret)) => service_role_token(secret)?,
        (None, None) => {
            return Err(
                "give --token (or RELAY_TOKEN), or --jwt-secret (or RELAY_JWT_SECRET) to see everything"
                    .into(),
            );
        }
    };
    let address = ServerAddress::parse("--url", &options.url)?;
    let parameters = format!("apikey={token}&session={}", session_id());
    // One listener for all of it: one that is made anew misses a signal that arrives before.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut pause = FIRST_PAUSE;
    // Each reason is printed once, until the next subscription: a relay may be away for a night.
    let mut printed = HashSet::new();
    let mut shown = PrintedChanges::default();
    loop {
        tokio::select! {
            _ = interrupt.recv() => return Ok(()),
            ended = follow(&address, &parameters, &options, &mut shown) => match ended? {
                Ended::Lost(why) => {
                    if printed.insert(why.clone()) {
                        note(&format!("waiting for a relay at {}: {why}", address.base()));
                    }
                }
                Ended::AfterSubscribing => {
                    note(&format!("the relay at {} went away: reconnecting, missed changes follow then", address.base()));
                    pause = FIRST_PAUSE;
                    printed.clear();
                }
            },
        }
        tokio::select! {
            _ = interrupt.recv() => return Ok(()),
            () = sleep(pause) => pause = (pause * 2).min(MAX_PAUSE),
        }
    }
}

enum Ended {
    Lost(String),
    AfterSubscribing,
}

/// Pause before the first reconnection; each further pause doubles, up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// Returns a random UUID that names this session, so that the relay can resume it.
fn session_id() -> String {
    let [high, low] = [0; 2].map(|zero: u64| RandomState::new().hash_one(zero));
    let digits = format!("{high:016x}{low:016x}");
    format!("{}-{}-{}-{}-{}", &digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..])
}

/// Hashes of the last printed changes: after a reconnection some of them come again.
#[derive(Default)]
struct PrintedChanges {
    hasher: RandomState,
    known: HashSet<u64>,
    last: VecDeque<u64>,
}

impl PrintedChanges {
    const MAX_LINES: usize = 10_000;

    fn is_new(&mut self, line: &str) -> bool {
        let line = self.hasher.hash_one(line);
        if !self.known.insert(line) {
            return false;
        }
        self.last.push_back(line);
        if self.last.len() > Self::MAX_LINES
            && let Some(oldest) = self.last.pop_front()
        {
            self.known.remove(&oldest);
        }
        true
    }
}

/// Subscribes and prints changes until the connection ends.
async fn follow(
    address: &ServerAddress,
    parameters: &str,
    options: &TailOptions,
    shown: &mut PrintedChanges,
) -> Result<Ended, TailFailure> {
    let mut socket = match RealtimeSocket::connect(address, parameters).await {
        Ok(socket) => socket,
        Err(ConnectError::Away(why)) => return Ok(Ended::Lost(why)),
        Err(ConnectError::Refused { status, body }) => return Err(refused(status, &body, options)),
        Err(ConnectError::Invalid(why)) => {
            return Err(
                format!("--url or --token has characters that are not allowed in an address: {why}").into()
            );
        }
    };
    let (schema, table) = options.relation();
    let binding = json!({"event": "*", "schema": schema, "table": table, "filter": options.filter});
    let config =
        json!({"config": {"postgres_changes": [binding], "postgres_changes_options": {"wait": true}}});
    if let Err(why) = socket.join("realtime:tail", &config).await {
        return Ok(Ended::Lost(why));
    }
    let mut subscribed = false;
    while let Some((frame, text)) = socket.next().await {
        match frame[3].as_str() {
            Some("phx_reply") if frame[4]["status"] == "error" => {
                let reason = frame[4]["response"]["reason"].as_str().unwrap_or("the join was refused");
                return match reason {
                    UNAVAILABLE => Ok(Ended::Lost(String::from("it has no connection to its database"))),
                    reason => Err(join_refused(reason, options)?),
                };
            }
            Some("system") => subscribed |= noted(&frame[4], options)?,
            Some("phx_close") => return Err("the channel was closed: the token may have expired".into()),
            Some("postgres_changes") => {
                let line = line(&text)?;
                if shown.is_new(&line) {
                    writeln!(std::io::stdout(), "{line}")?;
                }
            }
            _ => {}
        }
    }
    Ok(if subscribed { Ended::AfterSubscribing } else { Ended::Lost(String::from("the connection broke")) })
}

/// Prints a `system` message. Returns whether it confirms the subscription.
///
/// # Errors
/// The message, if it ends the subscription.
fn noted(payload: &Value, options: &TailOptions) -> Result<bool, TailFailure> {
    let message = payload["message"].as_str().unwrap_or_default();
    if message == SUBSCRIBED {
        let (schema, table) = options.relation();
        note(&format!("following {schema}.{table}, Ctrl-C ends"));
        return Ok(true);
    }
    if payload["status"] != "ok" && !message.starts_with("Gap:") && message != STALLED {
        return Err(message.into());
    }
    note(message);
    Ok(false)
}

/// Returns the error for a join that the relay refuses.
///
/// # Errors
/// When the token cannot be read.
fn join_refused(reason: &str, options: &TailOptions) -> Result<TailFailure, TailFailure> {
    let reason = reason.strip_prefix("RealtimeDisabledForConfiguration: ").unwrap_or(reason);
    let bearer = options.token.as_deref().map(bearer).transpose()?;
    let role = bearer.as_ref().map_or("service_role", Claims::role);
    let hint = match bearer {
        None => "\nWithout --token this is the role service_role; relay token makes one for a user",
        Some(_) => "",
    };
    let plain = SubscribeError::of_protocol(reason).plain(options.relation(), Some(role));
    Ok(format!("{plain}{hint}").into())
}

/// Returns the error for an HTTP answer that is no WebSocket, of a relay or of another server.
fn refused(status: u16, body: &[u8], options: &TailOptions) -> TailFailure {
    let body = String::from_utf8_lossy(body);
    let answer = serde_json::from_str::<Value>(&body).unwrap_or_default();
    let reason = answer["error"].as_str().map(|why| match answer["hint"].as_str() {
        Some(hint) => format!("{why}: {hint}"),
        None => why.to_owned(),
    });
    let url = &options.url;
    let why = match (status, reason) {
        (401, Some(why)) if options.token.is_some() => {
            let cure = if why.contains(": ") { "" } else { ": relay token --sub UUID makes one" };
            format!("the relay at {url} refuses the token: {why}{cure}")
        }
        (401, Some(why)) => {
            format!(
                "the relay at {url} refuses the secret: {why}. --jwt-secret has to be that of its `relay serve`"
            )
        }
        (_, Some(why)) => format!("the relay at {url} refuses: {why}"),
        (_, None) => {
            format!("there is no relay at {url}: the server there answers {status} (--url, or RELAY_URL)")
        }
    };
    why.into()
}

/// A change with its records as raw JSON, so that numbers keep all digits.
#[derive(Deserialize)]
struct TailChange<'a> {
    commit_timestamp: &'a str,
    #[serde(rename = "type")]
    operation: &'a str,
    schema: Cow<'a, str>,
    table: Cow<'a, str>,
    #[serde(borrow)]
    record: Option<&'a RawValue>,
    #[serde(borrow)]
    old_record: Option<&'a RawValue>,
    errors: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct TailPayload<'a> {
    #[serde(borrow)]
    data: TailChange<'a>,
}

fn line(frame: &str) -> Result<String, serde_json::Error> {
    let (_, _, _, _, payload): (&RawValue, &RawValue, &RawValue, &RawValue, &RawValue) =
        serde_json::from_str(frame)?;
    let change = serde_json::from_str::<TailPayload<'_>>(payload.get())?.data;
    let shown = match (change.record, change.old_record) {
        (Some(new), Some(old)) => format!("{old} → {new}"),
        (Some(one), None) | (None, Some(one)) => one.to_string(),
        (None, None) => String::new(),
    };
    let errors = change.errors.map(|errors| format!(" ({})", errors.join(", "))).unwrap_or_default();
    let TailChange { commit_timestamp, operation, schema, table, .. } = change;
    Ok(format!("{commit_timestamp} {operation} {schema}.{table} {shown}{errors}"))
}

fn service_role_token(secret: &str) -> Result<String, TailFailure> {
    let claims = Map::from_iter([(String::from("role"), Value::from("service_role"))]);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    Ok(mint(secret, &claims, now, Duration::from_secs(86_400))?)
}

fn note(text: &str) {
    // A closed pipe is not a failure.
    let _ = writeln!(std::io::stderr(), "relay: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_printed_as_it_came() {
        let frame = r#"[null,null,"realtime:tail","postgres_changes",{"ids":[1],"data":{"schema":"public","table":"t",
            "commit_timestamp":"2026-01-02T03:04:05.678Z","type":"UPDATE","columns":[],"record":{"n":12345678901234567890.1200},
            "old_record":{"n":50.00},"errors":["Error 413: Payload Too Large"]}}]"#;
        let expected = "2026-01-02T03:04:05.678Z UPDATE public.t {\"n\":50.00} → {\"n\":12345678901234567890.1200} \
                        (Error 413: Payload Too Large)";
        assert_eq!(line(frame).unwrap(), expected);
    }
}
