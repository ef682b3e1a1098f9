//! Settings as written (flags, environment, a TOML file), and the configuration resolved from them.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use serde::Deserialize;

use crate::auth::jwks_fetch::Endpoint;
use crate::auth::jwks_refresh::{JwksRefresher, PublishedKeys, Schedule};
use crate::auth::verifier::{TokenSettings, Verifier};
use crate::model::session::limits::{Limits, RowLimit};
use crate::transport::listen;

/// The maximum time setting, in seconds or milliseconds: PostgreSQL's maximum for a timeout.
const MAX_TIME: u64 = i32::MAX as u64;

/// The error without a database.
pub const NO_DATABASE: &str =
    "--database-url URL (or DATABASE_URL, or PGHOST and PGDATABASE) is missing: which database?";
/// The error without a secret.
pub const NO_SECRET: &str = "--jwt-secret SECRET (or RELAY_JWT_SECRET) is missing: what signs tokens?";

/// The settings of `relay serve`, as written. Flags override the environment, both override the file.
#[derive(Args, Deserialize, Default, Clone)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Settings {
    /// The database, e.g. postgres://relay@127.0.0.1:5432/app
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pub database_url: Option<String>,
    /// Where to listen [default: 127.0.0.1:4000]
    #[arg(long, env = "RELAY_LISTEN", value_name = "ADDRESS")]
    pub listen: Option<String>,
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
    /// How long keys stay valid while their URL cannot be read, in milliseconds [default: 86400000, a day]
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
    /// Maximum number of joins per second and client, on average over a minute [default: 100]
    #[arg(long, help_heading = "Limits", env = "RELAY_JOINS_PER_SECOND", value_name = "N")]
    pub joins_per_second: Option<u32>,
    /// Maximum number of messages per second and client, on average over a minute [default: 100]
    #[arg(long, help_heading = "Limits", env = "RELAY_MESSAGES_PER_SECOND", value_name = "N")]
    pub messages_per_second: Option<u32>,
    /// Maximum size of a message from a client, in bytes [default: 5000000]
    #[arg(long, help_heading = "Limits", env = "RELAY_MESSAGE_BYTES", value_name = "N")]
    pub message_bytes: Option<usize>,
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
    /// How long a client may send nothing, in milliseconds; clients send a heartbeat every 25 seconds [default: 60000]
    #[arg(long, help_heading = "Limits", env = "RELAY_SILENCE_MS", value_name = "MS")]
    pub silence_ms: Option<u64>,
    /// Interval of keep-alive comments on an idle event stream, in milliseconds [default: 15000]
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

/// The resolved configuration of a relay.
pub struct Config {
    /// The main connection.
    pub database_url: String,
    /// The listening connection.
    pub doorbell_url: String,
    /// The judging connection.
    pub judge_url: String,
    /// Certificate authorities for all three connections.
    pub database_ca: Option<String>,
    /// The address of the only port.
    pub listen: SocketAddr,
    /// The verifier of tokens.
    pub verifier: Verifier,
    /// The task that rereads the JWK set.
    pub jwks_refresher: Option<JwksRefresher>,
    /// Allowed origins of browsers; empty means any.
    pub allowed_origins: Vec<String>,
    /// Limits of clients.
    pub limits: Limits,
    /// Maximum absence after which a session can resume.
    pub resume: Duration,
    /// Maximum interval between polls.
    pub poll: Duration,
    /// Statement timeout of policy evaluation.
    pub judge_timeout: Duration,
    /// How long the feed may stall before clients are warned.
    pub stall: Duration,
    /// Whether to install first.
    pub install: bool,
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
        let list = |ours: Vec<String>, theirs: Vec<String>| if ours.is_empty() { theirs } else { ours };
        Ok(Self {
            database_url: self.database_url.or(file.database_url),
            listen: self.listen.or(file.listen),
            jwt_secret: self.jwt_secret.or(file.jwt_secret),
            jwks: self.jwks.or(file.jwks),
            jwks_allow_private: self.jwks_allow_private || file.jwks_allow_private,
            jwks_refresh_ms: self.jwks_refresh_ms.or(file.jwks_refresh_ms),
            jwks_cooldown_ms: self.jwks_cooldown_ms.or(file.jwks_cooldown_ms),
            jwks_keep_ms: self.jwks_keep_ms.or(file.jwks_keep_ms),
            jwt_audience: self.jwt_audience.or(file.jwt_audience),
            jwt_issuer: self.jwt_issuer.or(file.jwt_issuer),
            publishable_key: list(self.publishable_key, file.publishable_key),
            secret_key: list(self.secret_key, file.secret_key),
            doorbell_url: self.doorbell_url.or(file.doorbell_url),
            judge_url: self.judge_url.or(file.judge_url),
            database_ca: self.database_ca.or(file.database_ca),
            allowed_origin: list(self.allowed_origin, file.allowed_origin),
            max_connections: self.max_connections.or(file.max_connections),
            connections_per_address: self.connections_per_address.or(file.connections_per_address),
            max_channels: self.max_channels.or(file.max_channels),
            joins_per_second: self.joins_per_second.or(file.joins_per_second),
            messages_per_second: self.messages_per_second.or(file.messages_per_second),
            message_bytes: self.message_bytes.or(file.message_bytes),
            outbox_bytes: self.outbox_bytes.or(file.outbox_bytes),
            total_outbox_bytes: self.total_outbox_bytes.or(file.total_outbox_bytes),
            change_bytes: self.change_bytes.or(file.change_bytes),
            send_buffer_bytes: self.send_buffer_bytes.or(file.send_buffer_bytes),
            most_rows: self.most_rows.or(file.most_rows),
            most_row_bytes: self.most_row_bytes.or(file.most_row_bytes),
            resume_seconds: self.resume_seconds.or(file.resume_seconds),
            head_timeout_ms: self.head_timeout_ms.or(file.head_timeout_ms),
            write_timeout_ms: self.write_timeout_ms.or(file.write_timeout_ms),
            silence_ms: self.silence_ms.or(file.silence_ms),
            keep_alive_ms: self.keep_alive_ms.or(file.keep_alive_ms),
            poll_ms: self.poll_ms.or(file.poll_ms),
            judge_timeout_ms: self.judge_timeout_ms.or(file.judge_timeout_ms),
            stall_seconds: self.stall_seconds.or(file.stall_seconds),
            install: self.install || file.install,
            log_json: self.log_json || file.log_json,
            config: self.config,
        })
    }

    /// Resolves all settings; all mistakes are reported together.
    ///
    /// # Errors
    /// The missing and invalid settings.
    pub fn resolve(self) -> Result<Config, Mistakes> {
        let mut mistakes = Vec::new();
        let database_url = self.database_url.clone().unwrap_or_else(|| {
            mistakes.push(String::from(NO_DATABASE));
            String::new()
        });
        let listen = listen::address(self.listen.as_deref()).unwrap_or_else(|mistake| {
            mistakes.push(mistake);
            SocketAddr::from(([127, 0, 0, 1], 0))
        });
        let (keys, jwks_refresher) = self.jwks(&mut mistakes);
        let limits = self.limits(&mut mistakes);
        let tokens = TokenSettings {
            secrets: self.jwt_secret.into_iter().collect(),
            keys,
            audience: self.jwt_audience,
            issuer: self.jwt_issuer,
            publishable_keys: self.publishable_key,
            secret_keys: self.secret_key,
        };
        let verifier = Verifier::new(&tokens).map_err(|error| {
            mistakes.push(format!(
                "tokens cannot be verified: {error} (--jwt-secret or RELAY_JWT_SECRET, --jwks or RELAY_JWKS)"
            ));
        });
        let mut millis =
            |name, value, default| Duration::from_millis(positive(name, value, default, &mut mistakes));
        let poll = millis("poll-ms", self.poll_ms, 5000);
        let judge_timeout = millis("judge-timeout-ms", self.judge_timeout_ms, 1000);
        let resume = positive("resume-seconds", self.resume_seconds, 3600, &mut mistakes);
        let stall = Duration::from_secs(positive("stall-seconds", self.stall_seconds, 10, &mut mistakes));
        let (Ok(verifier), true) = (verifier, mistakes.is_empty()) else {
            return Err(Mistakes(mistakes));
        };
        Ok(Config {
            doorbell_url: self.doorbell_url.unwrap_or_else(|| database_url.clone()),
            judge_url: self.judge_url.unwrap_or_else(|| database_url.clone()),
            database_url,
            database_ca: self.database_ca,
            listen,
            verifier,
            jwks_refresher,
            allowed_origins: self.allowed_origin,
            limits,
            resume: Duration::from_secs(resume),
            poll,
            judge_timeout,
            stall,
            install: self.install,
        })
    }

    /// Reads the JWK set, or prepares reading it from its URL.
    fn jwks(&self, mistakes: &mut Vec<String>) -> (Option<Arc<PublishedKeys>>, Option<JwksRefresher>) {
        let is_url = self.jwks.as_ref().is_some_and(|place| place.contains("://"));
        let refresh = if is_url { 600_000 } else { 10_000 };
        let refresh = positive("jwks-refresh-ms", self.jwks_refresh_ms, refresh, mistakes);
        let schedule = Schedule {
            refresh: Duration::from_millis(refresh),
            cooldown: Duration::from_millis(self.jwks_cooldown_ms.unwrap_or(30_000)),
            keep: Duration::from_millis(self.jwks_keep_ms.unwrap_or(86_400_000)),
        };
        let published = self.jwks.as_ref().map(|place| {
            let read = if is_url {
                Endpoint::parse(place, self.jwks_allow_private).map(|endpoint| {
                    let (keys, refresher) = JwksRefresher::of_endpoint(endpoint, schedule);
                    (Some(keys), Some(refresher))
                })
            } else {
                let read = JwksRefresher::of_file(Path::new(place), schedule);
                read.map(|(keys, refresher)| (Some(keys), refresher)).map_err(|error| error.to_string())
            };
            read.unwrap_or_else(|error| {
                // A URL may contain a secret.
                let place = if is_url { "URL" } else { place };
                mistakes.push(format!("--jwks {place}: {error}"));
                (None, None)
            })
        });
        published.unwrap_or_default()
    }

    /// Resolves the limits of clients.
    fn limits(&self, mistakes: &mut Vec<String>) -> Limits {
        let mut millis =
            |name, value, default| Duration::from_millis(positive(name, value, default, mistakes));
        let head = millis("head-timeout-ms", self.head_timeout_ms, 10_000);
        let write = millis("write-timeout-ms", self.write_timeout_ms, 30_000);
        let silence = millis("silence-ms", self.silence_ms, 60_000);
        let keep_alive = millis("keep-alive-ms", self.keep_alive_ms, 15_000);
        let bytes = [
            at_least("outbox-bytes", self.outbox_bytes, 4 << 10, 512 << 10),
            at_least("total-outbox-bytes", self.total_outbox_bytes, 1 << 20, 256 << 20),
            at_least("change-bytes", self.change_bytes, 32 << 10, 1 << 20),
            at_least("send-buffer-bytes", self.send_buffer_bytes, 4 << 10, 208 << 10),
        ];
        let [outbox_bytes, total_outbox_bytes, change_bytes, send_buffer_bytes] = bytes.map(|bytes| {
            bytes.unwrap_or_else(|mistake| {
                mistakes.push(mistake);
                0
            })
        });
        let mut count = |name, value: Option<usize>, default| {
            // With 0 no client could connect, join or receive anything.
            if value == Some(0) {
                mistakes.push(format!("--{name} must be more than 0"));
            }
            value.unwrap_or(default)
        };
        let rate = |rate: Option<u32>| rate.map(|rate| rate as usize);
        let per_address = self.connections_per_address;
        Limits {
            connections: count("max-connections", self.max_connections, 10_000),
            connections_per_address: per_address.map(|max| count("connections-per-address", Some(max), max)),
            channels: count("max-channels", self.max_channels, 100),
            joins_per_second: count("joins-per-second", rate(self.joins_per_second), 100) as u32,
            messages_per_second: count("messages-per-second", rate(self.messages_per_second), 100) as u32,
            message_bytes: count("message-bytes", self.message_bytes, 5_000_000),
            outbox_bytes,
            total_outbox_bytes,
            change_bytes,
            send_buffer_bytes,
            rows: RowLimit {
                number: self.most_rows.unwrap_or(10_000),
                bytes: self.most_row_bytes.unwrap_or(64 << 20),
            },
            head,
            write,
            silence,
            keep_alive,
        }
    }
}

/// Checks a time, which must be more than 0 and at most [`MAX_TIME`].
fn positive(name: &str, value: Option<u64>, default: u64, mistakes: &mut Vec<String>) -> u64 {
    match value {
        Some(time) if time == 0 || time > MAX_TIME => {
            mistakes.push(format!("--{name} must be more than 0, and {MAX_TIME} at most"));
            default
        }
        value => value.unwrap_or(default),
    }
}

/// Checks a number of bytes: with fewer than `min` nothing could be delivered.
fn at_least(name: &str, value: Option<usize>, min: usize, default: usize) -> Result<usize, String> {
    match value {
        Some(bytes) if bytes < min => Err(format!("--{name} must be {min} bytes at least")),
        value => Ok(value.unwrap_or(default)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_mistakes_are_reported_together() {
        let settings = Settings {
            listen: Some(String::from("nowhere")),
            jwt_secret: Some(String::from("short")),
            poll_ms: Some(0),
            ..Settings::default()
        };
        let Err(Mistakes(mistakes)) = settings.resolve() else { panic!("these settings cannot be resolved") };
        assert_eq!(mistakes.len(), 4, "{mistakes:?}");
    }

    #[test]
    fn settings_that_would_serve_no_client_are_reported_together() {
        let (none, endless) = (Some(0), Some(u64::MAX));
        let settings = Settings {
            database_url: Some(String::from("postgres://x/")),
            jwt_secret: Some("s".repeat(32)),
            max_connections: none,
            connections_per_address: none,
            max_channels: none,
            joins_per_second: Some(0),
            messages_per_second: Some(0),
            message_bytes: none,
            resume_seconds: Some(0),
            stall_seconds: endless,
            judge_timeout_ms: endless,
            silence_ms: endless,
            ..Settings::default()
        };
        let Err(Mistakes(mistakes)) = settings.resolve() else { panic!("these settings cannot be resolved") };
        assert_eq!(mistakes.len(), 10, "{mistakes:#?}");
        assert!(mistakes.iter().all(|mistake| mistake.contains(" must be more than 0")), "{mistakes:#?}");
    }

    #[test]
    fn sizes_below_the_minimum_are_refused_with_the_minimum() {
        let with = |less: usize| {
            let settings = Settings {
                database_url: Some(String::from("postgres://x/")),
                jwt_secret: Some("s".repeat(32)),
                outbox_bytes: Some(4096 - less),
                total_outbox_bytes: Some(1_048_576 - less),
                change_bytes: Some(32_768 - less),
                send_buffer_bytes: Some(4096 - less),
                ..Settings::default()
            };
            settings.resolve().err().map_or(Vec::new(), |Mistakes(mistakes)| mistakes)
        };
        assert_eq!(with(0), [""; 0]);
        let expected = [
            "--outbox-bytes must be 4096 bytes at least",
            "--total-outbox-bytes must be 1048576 bytes at least",
            "--change-bytes must be 32768 bytes at least",
            "--send-buffer-bytes must be 4096 bytes at least",
        ];
        assert_eq!(with(1), expected);
    }

    #[test]
    fn a_key_set_without_a_usable_key_is_a_mistake_if_it_is_the_only_verifier() {
        let path = std::env::temp_dir().join(format!("relay-no-keys-{}.json", std::process::id()));
        std::fs::write(&path, r#"{"keys": []}"#).unwrap();
        let settings = || Settings {
            database_url: Some(String::from("postgres://x/")),
            jwks: Some(path.to_str().unwrap().to_owned()),
            ..Settings::default()
        };
        let mistake = settings().resolve().err().unwrap().to_string();
        assert!(mistake.contains("no usable JWK"), "{mistake}");
        let with_secret = Settings {
            jwt_secret: Some(String::from("a secret of more than 32 bytes for tests")),
            ..settings()
        };
        assert!(with_secret.resolve().is_ok());
        let url = Settings { jwks: Some(String::from("https://id.example/jwks.json")), ..settings() };
        assert!(url.resolve().is_ok(), "its keys may come");
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn the_default_address_is_loopback() {
        let settings = Settings {
            database_url: Some(String::from("postgres://here/")),
            jwt_secret: Some("s".repeat(32)),
            ..Settings::default()
        };
        let Ok(config) = settings.resolve() else { panic!("these settings can be resolved") };
        assert!(config.listen.ip().is_loopback());
    }

    #[test]
    fn every_flag_of_serve_is_accepted_in_the_file() {
        let serve = Settings::augment_args(clap::Command::new("serve"));
        let flags = serve.get_arguments().filter_map(clap::Arg::get_long).filter(|flag| *flag != "config");
        let flags: Vec<_> = flags.chain(["log-json"]).collect();
        assert!(flags.len() > 30, "{flags:?}");
        for flag in flags {
            let values = ["true", "7", "\"x\"", "[\"x\"]"];
            let is_taken = |value: &&str| toml::from_str::<Settings>(&format!("{flag} = {value}")).is_ok();
            assert!(values.iter().any(is_taken), "{flag} is refused");
        }
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
