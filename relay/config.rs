//! The configuration resolved from the settings, or all that is wrong with them.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use crate::auth::jwks_fetch::Endpoint;
use crate::auth::jwks_refresh::{JwksRefresher, PublishedKeys, Schedule};
use crate::auth::verifier::{TokenSettings, Verifier};
use crate::model::presence::status::StatusSettings;
use crate::model::session::limits::{Limits, RowLimit, TopicLimits};
use crate::settings::{Mistakes, Settings};
use crate::transport::listen;
use crate::transport::upstream::Upstream;

/// The maximum time setting, in seconds or milliseconds: PostgreSQL's maximum for a timeout.
const MAX_TIME: u64 = i32::MAX as u64;

/// The error without a database.
pub const NO_DATABASE: &str =
    "--database-url URL (or DATABASE_URL, or PGHOST and PGDATABASE) is missing: which database?";
/// The error without a secret.
pub const NO_SECRET: &str = "--jwt-secret SECRET (or RELAY_JWT_SECRET, or a file named by RELAY_JWT_SECRET_FILE) is missing: what signs tokens?";

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
    /// The address of the admin port.
    pub admin_listen: Option<SocketAddr>,
    /// The verifier of tokens.
    pub verifier: Verifier,
    /// The task that rereads the JWK set.
    pub jwks_refresher: Option<JwksRefresher>,
    /// Allowed origins of browsers; empty means any.
    pub allowed_origins: Vec<String>,
    /// The server that gets requests for other paths.
    pub upstream: Option<Upstream>,
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
    /// The status of users.
    pub status: StatusSettings,
    /// How long closing the sockets takes when the relay ends.
    pub drain: Duration,
    /// Whether to install first.
    pub install: bool,
    /// The settings, without secrets.
    pub shown: Value,
}

impl Settings {
    /// Resolves all settings; all mistakes are reported together.
    ///
    /// # Errors
    /// The missing and invalid settings.
    pub fn resolve(self) -> Result<Config, Mistakes> {
        let mut mistakes = Vec::new();
        let shown = self.shown();
        let database_url = self.database_url.clone().unwrap_or_else(|| {
            mistakes.push(String::from(NO_DATABASE));
            String::new()
        });
        let listen = listen::address(self.listen.as_deref()).unwrap_or_else(|mistake| {
            mistakes.push(mistake);
            SocketAddr::from(([127, 0, 0, 1], 0))
        });
        let admin_listen = self.admin_listen.as_deref().and_then(|text| {
            listen::named("--admin-listen", text).map_err(|mistake| mistakes.push(mistake)).ok()
        });
        let upstream = self.upstream.as_deref().and_then(|url| {
            Upstream::parse(url).map_err(|why| mistakes.push(format!("--upstream: {why}"))).ok()
        });
        let (keys, jwks_refresher) = self.jwks(&mut mistakes);
        let limits = self.limits(&mut mistakes);
        let status = self.status(&mut mistakes);
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
            admin_listen,
            verifier,
            jwks_refresher,
            allowed_origins: self.allowed_origin,
            upstream,
            limits,
            resume: Duration::from_secs(resume),
            poll,
            judge_timeout,
            stall,
            status,
            drain: Duration::from_millis(self.drain_ms.unwrap_or(5000)),
            install: self.install,
            shown,
        })
    }

    /// Reads the JWK set, or prepares reading it from its URL.
    fn jwks(&self, mistakes: &mut Vec<String>) -> (Option<Arc<PublishedKeys>>, Option<JwksRefresher>) {
        let is_url = self.jwks.as_ref().is_some_and(|place| place.contains("://"));
        let schedule = self.schedule(is_url, mistakes);
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

    /// Resolves when the JWK set is read again.
    fn schedule(&self, is_url: bool, mistakes: &mut Vec<String>) -> Schedule {
        let refresh = if is_url { 600_000 } else { 10_000 };
        let refresh = positive("jwks-refresh-ms", self.jwks_refresh_ms, refresh, mistakes);
        Schedule {
            refresh: Duration::from_millis(refresh),
            cooldown: Duration::from_millis(self.jwks_cooldown_ms.unwrap_or(30_000)),
            keep: Duration::from_millis(self.jwks_keep_ms.unwrap_or(86_400_000)),
        }
    }

    /// Resolves the settings of the status.
    fn status(&self, mistakes: &mut Vec<String>) -> StatusSettings {
        let mut millis =
            |name, value, default| Duration::from_millis(positive(name, value, default, mistakes));
        let (throttle, sweep, silence) = (
            millis("status-throttle-ms", self.status_throttle_ms, 60_000),
            millis("status-sweep-ms", self.status_sweep_ms, 5000),
            millis("status-silence-ms", self.status_silence_ms, 300_000),
        );
        if self.status_cache == Some(0) {
            mistakes.push(String::from("--status-cache must be more than 0"));
        }
        StatusSettings {
            throttle,
            sweep,
            silence,
            cache: self.status_cache.unwrap_or(10_000),
            anonymous_claim: self
                .status_anonymous_claim
                .clone()
                .unwrap_or_else(|| String::from("participantId")),
        }
    }

    /// Resolves the limits of clients.
    fn limits(&self, mistakes: &mut Vec<String>) -> Limits {
        let [head, write, silence, keep_alive] = self.client_times(mistakes);
        let [outbox_bytes, total_outbox_bytes, change_bytes, send_buffer_bytes] = self.queue_sizes(mistakes);
        let rate = |rate: Option<u32>| rate.map(|rate| rate as usize);
        let per_address = self.connections_per_address;
        let mut count = |name, value, default| more_than_zero(name, value, default, mistakes);
        Limits {
            connections: count("max-connections", self.max_connections, 10_000),
            connections_per_address: per_address.map(|max| count("connections-per-address", Some(max), max)),
            channels: count("max-channels", self.max_channels, 100),
            private_only: self.private_only,
            joins_per_second: count("joins-per-second", rate(self.joins_per_second), 100) as u32,
            messages_per_second: count("messages-per-second", rate(self.messages_per_second), 100) as u32,
            message_bytes: count("message-bytes", self.message_bytes, 5_000_000),
            broadcast_bytes: count("broadcast-bytes", self.broadcast_bytes, 3_000_000),
            http_broadcasts_per_second: count(
                "http-broadcasts-per-second",
                rate(self.http_broadcasts_per_second),
                1000,
            ) as u32,
            presence_per_second: count("presence-per-second", rate(self.presence_per_second), 10) as u32,
            topics: TopicLimits {
                presence_bytes: count("presence-bytes", self.presence_bytes, 64 << 10),
                topic_presence_bytes: count("topic-presence-bytes", self.topic_presence_bytes, 4 << 20),
            },
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

    /// Resolves the time limits of a request head and of a write, the time of silence and the keep-alive interval.
    fn client_times(&self, mistakes: &mut Vec<String>) -> [Duration; 4] {
        let mut millis =
            |name, value, default| Duration::from_millis(positive(name, value, default, mistakes));
        [
            millis("head-timeout-ms", self.head_timeout_ms, 10_000),
            millis("write-timeout-ms", self.write_timeout_ms, 30_000),
            millis("silence-ms", self.silence_ms, 90_000),
            millis("keep-alive-ms", self.keep_alive_ms, 15_000),
        ]
    }

    /// Resolves the bytes queued for one client and for all together, and of one change and the kernel's send buffer.
    fn queue_sizes(&self, mistakes: &mut Vec<String>) -> [usize; 4] {
        let mut bytes = |name, value, min, default| at_least(name, value, min, default, mistakes);
        [
            bytes("outbox-bytes", self.outbox_bytes, 4 << 10, 512 << 10),
            bytes("total-outbox-bytes", self.total_outbox_bytes, 1 << 20, 256 << 20),
            bytes("change-bytes", self.change_bytes, 32 << 10, 1 << 20),
            bytes("send-buffer-bytes", self.send_buffer_bytes, 4 << 10, 208 << 10),
        ]
    }
}

/// Checks a time, which must be more than 0 and at most [`MAX_TIME`].
fn positive(name: &str, value: Option<u64>, default: u64, mistakes: &mut Vec<String>) -> u64 {
    match value {
        Some(time) if time == 0 || time > MAX_TIME => {
            mistakes.push(format!("--{name} must be more than 0, and at most {MAX_TIME}"));
            default
        }
        value => value.unwrap_or(default),
    }
}

/// Checks a number: with 0 no client could connect, join or receive anything.
fn more_than_zero(name: &str, value: Option<usize>, default: usize, mistakes: &mut Vec<String>) -> usize {
    if value == Some(0) {
        mistakes.push(format!("--{name} must be more than 0"));
    }
    value.unwrap_or(default)
}

/// Checks a number of bytes: with fewer than `min` nothing could be delivered.
fn at_least(
    name: &str,
    value: Option<usize>,
    min: usize,
    default: usize,
    mistakes: &mut Vec<String>,
) -> usize {
    let value = value.unwrap_or(default);
    if value < min {
        mistakes.push(format!("--{name} must be at least {min} bytes"));
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Setting;

    #[test]
    fn all_mistakes_are_reported_together() {
        let settings = Settings {
            listen: Some(String::from("nowhere")),
            admin_listen: Some(String::from("nowhere")),
            jwt_secret: Some(String::from("short")),
            poll_ms: Some(0),
            ..Settings::default()
        };
        let Err(Mistakes(mistakes)) = settings.resolve() else { panic!("these settings cannot be resolved") };
        assert_eq!(mistakes.len(), 5, "{mistakes:?}");
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
            "--outbox-bytes must be at least 4096 bytes",
            "--total-outbox-bytes must be at least 1048576 bytes",
            "--change-bytes must be at least 32768 bytes",
            "--send-buffer-bytes must be at least 4096 bytes",
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
    fn a_sleeping_tab_that_sends_one_heartbeat_a_minute_stays_connected() {
        let limits = Settings::default().limits(&mut Vec::new());
        assert!(limits.silence >= Duration::from_secs(60 + 20), "{:?}", limits.silence);
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

    /// What the numbers of a file amount to.
    fn resolved(name: &str, value: impl std::fmt::Display) -> Result<String, Mistakes> {
        let mut settings: Settings = toml::from_str(&format!("{name} = {value}")).unwrap();
        settings.database_url = Some(String::from("postgres://x/"));
        settings.jwt_secret = Some("s".repeat(32));
        // The keys' times count only where there are keys.
        let keys = (settings.schedule(false, &mut Vec::new()), settings.schedule(true, &mut Vec::new()));
        let Config { limits, resume, poll, judge_timeout, stall, listen, status, drain, .. } =
            settings.resolve()?;
        let times = format!("{resume:?} {poll:?} {judge_timeout:?} {stall:?} {drain:?}");
        Ok(format!("{limits:?} {times} {listen} {keys:?} {status:?}"))
    }

    #[test]
    fn the_default_that_the_help_says_is_the_one_that_counts() {
        let unset = resolved("log-json", false).unwrap();
        for setting in Setting::all().into_iter().filter(Setting::is_number) {
            let Some(default) = setting.default.filter(|default| *default != "no limit") else { continue };
            let Ok(number) = default.parse::<u64>() else {
                assert_eq!(default, "600000 for a URL, 10000 for a file", "{}", setting.name);
                continue;
            };
            assert_eq!(resolved(&setting.name, number).unwrap(), unset, "{}", setting.name);
            assert_ne!(resolved(&setting.name, number + 1).unwrap(), unset, "{}", setting.name);
        }
    }

    #[test]
    fn the_bound_that_the_help_says_is_the_one_that_counts() {
        for Setting { name, bound, .. } in Setting::all().into_iter().filter(Setting::is_number) {
            let Some(bound) = bound else {
                assert!(resolved(&name, 1).is_ok(), "{name}: --help says no bound");
                continue;
            };
            assert!(resolved(&name, bound).is_ok(), "{name}");
            let mistake = resolved(&name, bound - 1).unwrap_err().to_string();
            assert_eq!(mistake, format!("--{name} must be at least {bound} bytes"));
        }
    }

    #[test]
    fn what_is_refused_is_named_like_its_flag() {
        for Setting { name, .. } in Setting::all().into_iter().filter(Setting::is_number) {
            if let Err(mistakes) = resolved(&name, 0) {
                assert!(mistakes.to_string().starts_with(&format!("--{name} must be ")), "{mistakes}");
            }
        }
    }
}
