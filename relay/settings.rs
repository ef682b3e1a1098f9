//! The settings of `relay serve`: one table of name, variable, help, default and bound. Flags, variables, the TOML file and
//! `--help` follow from it; tests compare it with what [`config`](crate::config) does and what `OPERATION.md` says.

use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::Value;

mod shown;

/// The settings of `relay serve`, as written. Flags override the environment, both override the file.
#[derive(Args, Serialize, Deserialize, Default, Clone)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Settings {
    /// The database, e.g. postgres://relay@127.0.0.1:5432/app
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pub database_url: Option<String>,
    /// Where to listen [default: 127.0.0.1:4000]
    #[arg(long, env = "RELAY_LISTEN", value_name = "ADDRESS")]
    pub listen: Option<String>,
    /// A second address, for /metrics and health checks without a token, and for /inspector
    #[arg(long, env = "RELAY_ADMIN_LISTEN", value_name = "ADDRESS")]
    pub admin_listen: Option<String>,
    /// The secret that signs tokens (HS256/384/512), at least 32 bytes
    #[arg(long, env = "RELAY_JWT_SECRET", hide_env_values = true, value_name = "SECRET")]
    pub jwt_secret: Option<String>,
    /// The public keys (JWK set) that verify tokens (RS, PS, ES, EdDSA): a file or an https:// URL, both reread regularly
    #[arg(
        long,
        help_heading = "Tokens",
        env = "RELAY_JWKS",
        hide_env_values = true,
        value_name = "FILE|URL"
    )]
    pub jwks: Option<String>,
    /// Allow a JWK set URL at a private address or on this machine, then also by http://
    #[arg(long, help_heading = "Tokens", env = "RELAY_JWKS_ALLOW_PRIVATE")]
    pub jwks_allow_private: bool,
    /// How often to reread the JWK set, in milliseconds [default: 600000 for a URL, 10000 for a file]
    #[arg(long, help_heading = "Tokens", env = "RELAY_JWKS_REFRESH_MS", value_name = "MS")]
    pub jwks_refresh_ms: Option<u64>,
    /// Minimum interval between rereads of the JWK set for tokens with an unknown key, in milliseconds [default: 30000]
    #[arg(long, help_heading = "Tokens", env = "RELAY_JWKS_COOLDOWN_MS", value_name = "MS")]
    pub jwks_cooldown_ms: Option<u64>,
    /// How long keys stay valid while their URL cannot be read, in milliseconds [default: 86400000]
    #[arg(long, help_heading = "Tokens", env = "RELAY_JWKS_KEEP_MS", value_name = "MS")]
    pub jwks_keep_ms: Option<u64>,
    /// Accept only tokens whose `aud` is this
    #[arg(long, help_heading = "Tokens", env = "RELAY_JWT_AUDIENCE", value_name = "AUD")]
    pub jwt_audience: Option<String>,
    /// Accept only tokens whose `iss` is this
    #[arg(long, help_heading = "Tokens", env = "RELAY_JWT_ISSUER", value_name = "ISS")]
    pub jwt_issuer: Option<String>,
    /// An opaque key that stands for the role anon (sb_publishable_…); repeatable
    #[arg(
        long,
        help_heading = "Tokens",
        env = "RELAY_PUBLISHABLE_KEY",
        hide_env_values = true,
        value_name = "KEY",
        value_delimiter = ','
    )]
    pub publishable_key: Vec<String>,
    /// An opaque key that stands for the role service_role (sb_secret_…); repeatable
    #[arg(
        long,
        help_heading = "Tokens",
        env = "RELAY_SECRET_KEY",
        hide_env_values = true,
        value_name = "KEY",
        value_delimiter = ','
    )]
    pub secret_key: Vec<String>,
    /// A direct connection for LISTEN, if the main one goes through a pooler
    #[arg(
        long,
        help_heading = "Database",
        env = "RELAY_DOORBELL_URL",
        hide_env_values = true,
        value_name = "URL"
    )]
    pub doorbell_url: Option<String>,
    /// A separate login that evaluates policies: a member of the subscribers' roles, without rights on the changelog
    #[arg(
        long,
        help_heading = "Database",
        env = "RELAY_JUDGE_URL",
        hide_env_values = true,
        value_name = "URL"
    )]
    pub judge_url: Option<String>,
    /// Certificate authorities for the database's TLS, as PEM [default: the system's]
    #[arg(long, help_heading = "Database", env = "RELAY_DATABASE_CA", value_name = "FILE")]
    pub database_ca: Option<String>,
    /// An origin that browsers may connect from; repeatable [default: any]
    #[arg(
        long,
        help_heading = "Limits",
        env = "RELAY_ALLOWED_ORIGIN",
        value_name = "ORIGIN",
        value_delimiter = ','
    )]
    pub allowed_origin: Vec<String>,
    /// Maximum number of connected clients [default: 10000]
    #[arg(long, help_heading = "Limits", env = "RELAY_MAX_CONNECTIONS", value_name = "N")]
    pub max_connections: Option<usize>,
    /// Maximum number of connections from one address; behind a proxy all have its address [default: no limit]
    #[arg(long, help_heading = "Limits", env = "RELAY_CONNECTIONS_PER_ADDRESS", value_name = "N")]
    pub connections_per_address: Option<usize>,
    /// Maximum number of channels per client [default: 100]
    #[arg(long, help_heading = "Limits", env = "RELAY_MAX_CHANNELS", value_name = "N")]
    pub max_channels: Option<usize>,
    /// Refuse channels that are not private
    #[arg(long, help_heading = "Limits", env = "RELAY_PRIVATE_ONLY")]
    pub private_only: bool,
    /// Maximum number of joins per second and client, on average over a minute [default: 100]
    #[arg(long, help_heading = "Limits", env = "RELAY_JOINS_PER_SECOND", value_name = "N")]
    pub joins_per_second: Option<u32>,
    /// Maximum number of messages per second and client, on average over a minute [default: 100]
    #[arg(long, help_heading = "Limits", env = "RELAY_MESSAGES_PER_SECOND", value_name = "N")]
    pub messages_per_second: Option<u32>,
    /// Maximum size of a message from a client, in bytes [default: 5000000]
    #[arg(long, help_heading = "Limits", env = "RELAY_MESSAGE_BYTES", value_name = "N")]
    pub message_bytes: Option<usize>,
    /// Maximum size of a broadcast, in bytes [default: 3000000]
    #[arg(long, help_heading = "Limits", env = "RELAY_BROADCAST_BYTES", value_name = "N")]
    pub broadcast_bytes: Option<usize>,
    /// Maximum number of broadcasts over HTTP per second and subject, or role and address, on average over a minute [default: 1000]
    #[arg(long, help_heading = "Limits", env = "RELAY_HTTP_BROADCASTS_PER_SECOND", value_name = "N")]
    pub http_broadcasts_per_second: Option<u32>,
    /// Maximum number of presence changes per second and client, on average over a minute [default: 10]
    #[arg(long, help_heading = "Limits", env = "RELAY_PRESENCE_PER_SECOND", value_name = "N")]
    pub presence_per_second: Option<u32>,
    /// Maximum size of what one member of a topic tracks, in bytes [default: 65536]
    #[arg(long, help_heading = "Limits", env = "RELAY_PRESENCE_BYTES", value_name = "N")]
    pub presence_bytes: Option<usize>,
    /// Maximum size of what all members of a topic track, in bytes [default: 4194304]
    #[arg(long, help_heading = "Limits", env = "RELAY_TOPIC_PRESENCE_BYTES", value_name = "N")]
    pub topic_presence_bytes: Option<usize>,
    /// Maximum number of bytes queued for one client, which is closed beyond it; at least 4096 [default: 524288]
    #[arg(long, help_heading = "Limits", env = "RELAY_OUTBOX_BYTES", value_name = "N")]
    pub outbox_bytes: Option<usize>,
    /// Maximum memory for all clients' queues, in bytes; beyond it slow clients are closed; at least 1048576 [default: 268435456]
    #[arg(long, help_heading = "Limits", env = "RELAY_TOTAL_OUTBOX_BYTES", value_name = "N")]
    pub total_outbox_bytes: Option<usize>,
    /// Maximum size of a change as sent, in bytes; a larger one has only its key and short columns; at least 32768 [default: 1048576]
    #[arg(long, help_heading = "Limits", env = "RELAY_CHANGE_BYTES", value_name = "N")]
    pub change_bytes: Option<usize>,
    /// Send buffer per client, in bytes; the kernel uses up to twice as much; at least 4096 [default: 212992]
    #[arg(long, help_heading = "Limits", env = "RELAY_SEND_BUFFER_BYTES", value_name = "N")]
    pub send_buffer_bytes: Option<usize>,
    /// Maximum number of rows in one answer [default: 10000]
    #[arg(long, help_heading = "Limits", env = "RELAY_MOST_ROWS", value_name = "N")]
    pub most_rows: Option<usize>,
    /// Maximum size of the rows in one answer, in bytes [default: 67108864]
    #[arg(long, help_heading = "Limits", env = "RELAY_MOST_ROW_BYTES", value_name = "N")]
    pub most_row_bytes: Option<usize>,
    /// How long a client with a named session may be away and still resume, in seconds [default: 3600]
    #[arg(long, help_heading = "Limits", env = "RELAY_RESUME_SECONDS", value_name = "SECONDS")]
    pub resume_seconds: Option<u64>,
    /// Timeout for the head of a request, in milliseconds [default: 10000]
    #[arg(long, help_heading = "Limits", env = "RELAY_HEAD_TIMEOUT_MS", value_name = "MS")]
    pub head_timeout_ms: Option<u64>,
    /// Write timeout: how long a client may read nothing of what is sent to it, in milliseconds [default: 30000]
    #[arg(long, help_heading = "Limits", env = "RELAY_WRITE_TIMEOUT_MS", value_name = "MS")]
    pub write_timeout_ms: Option<u64>,
    /// How long a client may send nothing, in milliseconds; clients send a heartbeat every 25 seconds, sleeping browser tabs one a
    /// minute [default: 90000]
    #[arg(long, help_heading = "Limits", env = "RELAY_SILENCE_MS", value_name = "MS")]
    pub silence_ms: Option<u64>,
    /// How often an idle event stream sends its position, or a comment if it has not moved, in milliseconds [default: 15000]
    #[arg(long, help_heading = "Limits", env = "RELAY_KEEP_ALIVE_MS", value_name = "MS")]
    pub keep_alive_ms: Option<u64>,
    /// Maximum interval between polls of the changelog, without notifications, in milliseconds [default: 5000]
    #[arg(long, help_heading = "Database", env = "RELAY_POLL_MS", value_name = "MS")]
    pub poll_ms: Option<u64>,
    /// Timeout of a policy for a page of changes, in milliseconds [default: 1000]
    #[arg(long, help_heading = "Database", env = "RELAY_JUDGE_TIMEOUT_MS", value_name = "MS")]
    pub judge_timeout_ms: Option<u64>,
    /// Warn clients when changes could not be read or evaluated for this long [default: 10]
    #[arg(long, help_heading = "Database", env = "RELAY_STALL_SECONDS", value_name = "SECONDS")]
    pub stall_seconds: Option<u64>,
    /// Minimum interval between two writes of a user's activity to the status table, in milliseconds [default: 60000]
    #[arg(long, help_heading = "Status", env = "RELAY_STATUS_THROTTLE_MS", value_name = "MS")]
    pub status_throttle_ms: Option<u64>,
    /// How often to look for users that are online and should not be, in milliseconds; after two such intervals without a word
    /// a relay is dead [default: 5000]
    #[arg(long, help_heading = "Status", env = "RELAY_STATUS_SWEEP_MS", value_name = "MS")]
    pub status_sweep_ms: Option<u64>,
    /// How long a user without connection stays online without a request, in milliseconds [default: 300000]
    #[arg(long, help_heading = "Status", env = "RELAY_STATUS_SILENCE_MS", value_name = "MS")]
    pub status_silence_ms: Option<u64>,
    /// Maximum number of users without connection whose last write is remembered [default: 10000]
    #[arg(long, help_heading = "Status", env = "RELAY_STATUS_CACHE", value_name = "N")]
    pub status_cache: Option<usize>,
    /// The claim with the id of an anonymous participant, in tokens without `sub` [default: participantId]
    #[arg(long, help_heading = "Status", env = "RELAY_STATUS_ANONYMOUS_CLAIM", value_name = "CLAIM")]
    pub status_anonymous_claim: Option<String>,
    /// How long closing the sockets takes at the end, one after the other, in milliseconds [default: 5000]
    #[arg(long, env = "RELAY_DRAIN_MS", value_name = "MS")]
    pub drain_ms: Option<u64>,
    /// The server that gets requests for all paths that are not the relay's: its https:// or http:// address
    #[arg(long, env = "RELAY_UPSTREAM", value_name = "URL")]
    pub upstream: Option<String>,
    /// Install or update the database side before serving
    #[arg(long, env = "RELAY_INSTALL")]
    pub install: bool,
    /// Logs as JSON. The flag is global: it may precede or follow any command.
    #[arg(skip)]
    pub log_json: bool,
    /// A TOML file with any of these settings, named like the flags
    #[arg(long, env = "RELAY_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
}

/// All invalid settings, a line each.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct Mistakes(pub Vec<String>);

impl Settings {
    /// Adds the settings of the file that neither flags nor environment set.
    ///
    /// # Errors
    /// When the file cannot be read or has an unknown setting.
    pub fn with_file(self) -> Result<Self, Mistakes> {
        let Some(path) = &self.config else { return Ok(self) };
        let mistake = |why: String| Mistakes(vec![format!("--config {}: {why}", path.display())]);
        let text = std::fs::read_to_string(path).map_err(|error| mistake(error.to_string()))?;
        let file: Self = toml::from_str(&text).map_err(|error| mistake(error.message().to_owned()))?;
        self.over(&file).map_err(|error| mistake(error.to_string()))
    }

    /// Returns these settings, and those of the file where these are not set.
    fn over(&self, file: &Self) -> Result<Self, serde_json::Error> {
        let (mut all, own) = (serde_json::to_value(file)?, serde_json::to_value(self)?);
        if let (Value::Object(all), Value::Object(own)) = (&mut all, own) {
            let is_set = |value: &Value| match value {
                Value::Null | Value::Bool(false) => false,
                Value::Array(list) => !list.is_empty(),
                _ => true,
            };
            all.extend(own.into_iter().filter(|(_, value)| is_set(value)));
        }
        Ok(Self { config: self.config.clone(), ..serde_json::from_value(all)? })
    }
}

/// A setting of the table, as `--help` tells it.
#[cfg(test)]
pub struct Setting {
    /// Without dashes.
    pub name: String,
    /// The placeholder of its value; empty for a switch.
    pub value: String,
    /// The variable.
    pub variable: String,
    /// What the help says is the default.
    pub default: Option<String>,
    /// What the help says is the minimum.
    pub bound: Option<u64>,
}

#[cfg(test)]
impl Setting {
    /// All settings.
    pub fn all() -> Vec<Self> {
        let serve = Settings::augment_args(clap::Command::new("serve"));
        let settings: Vec<_> = serve.get_arguments().map(Self::of).collect();
        assert!(settings.len() > 30, "where is the table?");
        settings
    }

    fn of(flag: &clap::Arg) -> Self {
        let help = flag.get_help().unwrap().to_string();
        let after = |words: &str| help.split_once(words).map(|(_, rest)| rest);
        let bound = after("at least ").map(|rest| rest.split(' ').next().unwrap().parse().unwrap());
        let default = after("[default: ").map(|rest| rest.trim_end_matches(']').to_owned());
        let takes_value = flag.get_action().takes_values();
        let value = flag.get_value_names().filter(|_| takes_value).map(|names| names[0].to_string());
        Self {
            name: flag.get_long().unwrap().to_owned(),
            value: value.unwrap_or_default(),
            variable: flag.get_env().unwrap().to_str().unwrap().to_owned(),
            default,
            bound,
        }
    }

    /// Whether its value is a number.
    pub fn is_number(&self) -> bool {
        matches!(&*self.value, "N" | "MS" | "SECONDS")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_variable_is_named_like_its_flag() {
        for setting in Setting::all() {
            let name = setting.name.replace('-', "_").to_uppercase();
            let expected = if name == "DATABASE_URL" { name } else { format!("RELAY_{name}") };
            assert_eq!(setting.variable, expected);
        }
    }

    #[test]
    fn each_flag_is_accepted_in_the_file() {
        for name in Setting::all().into_iter().map(|setting| setting.name).chain(["log-json".into()]) {
            let values = ["true", "7", "\"x\"", "[\"x\"]"];
            let is_taken = |value: &&str| toml::from_str::<Settings>(&format!("{name} = {value}")).is_ok();
            assert_eq!(values.iter().any(is_taken), name != "config", "{name}");
        }
    }

    /// The rows of the tables in `OPERATION.md`: flags with their values, default, and not what they mean.
    fn documented() -> Vec<(String, String)> {
        let text = include_str!("OPERATION.md");
        let (_, settings) = text.split_once("\n## Settings\n").unwrap();
        let (settings, _) = settings.split_once("\n## ").unwrap();
        let rows = settings.lines().filter(|line| line.starts_with("| `--"));
        rows.flat_map(|row| {
            let row = row.replace("\\|", "/");
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            let flags = cells[1].split('`').skip(1).step_by(2);
            flags.map(|flag| (flag.replace('/', "|"), cells[2].to_owned())).collect::<Vec<_>>()
        })
        .collect()
    }

    #[test]
    fn the_reference_lists_each_setting_with_its_value_default_and_bound() {
        let mut documented = documented();
        for setting in Setting::all() {
            let flag = format!("--{} {}", setting.name, setting.value).trim_end().to_owned();
            let place = documented.iter().position(|(known, _)| *known == flag);
            let (_, default) =
                documented.remove(place.unwrap_or_else(|| panic!("no {flag} in OPERATION.md")));
            let bound = setting.bound.map_or_else(String::new, |bound| format!(", at least {bound}"));
            match &setting.default {
                Some(expected) => assert_eq!(default, format!("{expected}{bound}"), "{flag}"),
                None => assert!(!default.contains(char::is_numeric), "{flag}: --help does not say {default}"),
            }
        }
        assert_eq!(documented, [(String::from("--log-json"), String::from("off"))], "a flag of all commands");
    }

    #[test]
    fn the_file_sets_what_flags_do_not() {
        let path = std::env::temp_dir().join(format!("relay-config-{}.toml", std::process::id()));
        std::fs::write(
            &path,
            "database-url = \"postgres://file/\"\npoll-ms = 7\ninstall = true\nlog-json = true\n",
        )
        .unwrap();
        let flags = Settings { poll_ms: Some(9), config: Some(path.clone()), ..Settings::default() };
        let settings = flags.with_file().unwrap();
        assert_eq!(settings.database_url.as_deref(), Some("postgres://file/"));
        assert_eq!((settings.poll_ms, settings.install, settings.log_json), (Some(9), true, true));
        std::fs::write(&path, "poll = 7").unwrap();
        let unknown = Settings { config: Some(path.clone()), ..Settings::default() };
        assert!(unknown.with_file().is_err());
        std::fs::remove_file(path).unwrap();
    }
}
