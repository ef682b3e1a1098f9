//! All metrics of the relay in one closed list, and the text of `/metrics`. Nothing is decided by what is measured here.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use sha2::{Digest, Sha256};
use time::OffsetDateTime;

use crate::model::policy::visibility::Denied;
use crate::model::row::change::Change;

mod process;

/// A counter for each HTTP status.
type CounterByStatus = Family<[(&'static str, u16); 1], Counter>;
/// A counter for each value of one label.
type CounterBy = Family<[(&'static str, &'static str); 1], Counter>;
/// A gauge for each value of one label.
type GaugeBy = Family<[(&'static str, &'static str); 1], Gauge>;

/// Declares the metrics: field, type, name in `/metrics` without prefix and suffix, help.
macro_rules! metrics {
    (@zero $metric:ident) => { $metric::default() };
    // Buckets: each is twice as large as the one before.
    (@zero $metric:ident $smallest:literal $count:literal) => {
        $metric::new(exponential_buckets($smallest, 2.0, $count))
    };
    ($($field:ident: $metric:ident $(($smallest:literal, $count:literal))? = $name:literal, $help:literal;)*) => {
        struct Metrics {
            $($field: $metric,)*
        }

        impl Metrics {
            /// Registers all metrics, with value zero.
            fn register(registry: &mut Registry) -> Self {
                $(
                    let $field: $metric = metrics!(@zero $metric $($smallest $count)?);
                    registry.register($name, $help, $field.clone());
                )*
                Self { $($field,)* }
            }
        }
    };
}

metrics! {
    // Clients.
    sessions: Gauge = "sessions_open", "Clients connected now";
    sessions_total: Counter = "sessions", "Clients that connected";
    sessions_full: Counter = "sessions_closed_full", "Clients closed because they read too slowly";
    clients: GaugeBy = "clients_open", "Clients connected now, by transport";
    received_messages: CounterBy = "received_messages", "Frames that clients sent over sockets";
    received_bytes: CounterBy = "received_bytes", "Bytes of the frames that clients sent over sockets";
    sent_messages: CounterBy = "sent_messages", "Messages written to clients, by transport";
    sent_bytes: CounterBy = "sent_bytes", "Bytes written to clients, by transport";
    gaps: CounterBy = "gaps", "Gaps told to clients, by transport: they read the rows again";
    resumes: CounterBy = "resumes", "Channels and streams that continued, by way: from a cursor, or from the bookmark of a named session";
    refused: CounterBy = "connections_refused", "Connections and requests that were refused, by reason";
    responses: CounterByStatus = "http_responses", "Answers to HTTP requests, by status; 101 opens a WebSocket";
    upstream_requests: Counter = "upstream_requests", "Requests passed on to the server behind the relay";
    upstream_failures: Counter = "upstream_failures", "Requests that the server behind the relay did not answer";
    outbox_bytes: Gauge = "outbox_bytes", "Bytes queued for clients, a frame for many counted once";
    channels: Gauge = "channels_open", "Channels with changes subscribed now";
    groups: Gauge = "groups_open", "Groups of channels that receive the same frames";
    frames: Counter = "frames", "Frames of changes put into outboxes";
    conflated: Counter = "changes_conflated", "Changes that streams with conflate= were not sent, because a newer one of the same row came";
    broadcasts: Counter = "broadcasts", "Broadcasts to topics with members";
    broadcast_frames: Counter = "broadcast_frames", "Frames of broadcasts put into outboxes";

    // The changelog.
    changes_read: Counter = "changes_read", "Changes read from the changelog";
    changelog_bytes: Gauge = "changelog_bytes", "Size of the changelog in the database";
    source_up: Gauge = "source_up", "1 while the changelog is being read, 2 if notifications arrive, too";
    source_downs: Counter = "source_interruptions", "Times the connection to the changelog was lost";
    leader: Gauge = "leader",
        "1 while this relay leads: writers notify it, and it notifies the other relays of its database";
    rings: Counter = "doorbell_rings", "Notifications received";
    sleeps: Counter = "doorbell_sleeps", "Times the source went to sleep";
    wakes: Counter = "doorbell_wakes", "Times a burst of notifications woke the source to polling";
    polled: Counter = "changes_found_by_polling", "Polls that found changes without a notification";
    page: Histogram(0.000_05, 18) = "page_seconds", "Reads of a page of the changelog that had changes";
    flush: Histogram(0.000_05, 14) = "flush_seconds", "Waits for the WAL flush before a page was delivered";
    lag: Histogram(0.000_1, 18) = "lag_seconds",
        "From the write of a row (its trigger) to its frames in the outboxes";
    written_lag: Histogram(0.000_1, 18) = "written_lag_seconds",
        "From the write of a row (its trigger) to its frame in a client's socket, once for each write to the socket";
    pool_wait: Histogram(0.000_01, 18) = "pool_wait_seconds",
        "Waits for a connection of the pools for the catalog, subscriptions and filters";

    // Policies.
    judging: Histogram(0.000_1, 16) = "judge_seconds", "Evaluations of policies and filters by PostgreSQL, for a batch of changes";
    judgements: Counter = "judgements", "Queries to PostgreSQL about row visibility";
    raised: Counter = "judgements_raised", "Policies that raised an error; denied for those rows";
    unreadable: Counter = "judgements_unreadable",
        "Policies or filters that read a value which PostgreSQL cannot read back; delivered as gaps";
    timed_out: Counter = "judgements_timed_out",
        "Policies that timed out, or read a locked table; delivered as a gap";
    role_lost: Counter = "judgements_role", "Roles that could not be set or were changed by a policy; denied";
    missing_grants: Gauge = "roles_lacking_grants",
        "Pairs of a table and a role that sees nothing, because it lacks a grant for what the table's policies read";

    // Status.
    status_users: Gauge = "status_users", "Users connected to this relay whose status is written";
    status_cache: Gauge = "status_cache", "Users without a connection that the throttle remembers";
    status_cache_bound: Gauge = "status_cache_bound", "The maximum of relay_status_cache";
    status_on: Gauge = "status_on", "1 while this relay writes the status of users";
    status_requests: Counter = "status_requests", "Signs of life of users";
    status_throttled: Counter = "status_throttled", "Signs of life that were not written, because one was shortly before";
    status_statements: Counter = "status_statements", "Statements that wrote the status of users";
    status_written: Counter = "status_updates", "Users whose status was written";
    status_failed: Counter = "status_failed_updates", "Users whose status could not be written, and failed sweeps";
    status_sweeps: Counter = "status_sweeps", "Sweeps by this relay";
    status_swept: Counter = "status_set_offline", "Users that sweeps of this relay set offline";

    // Webhooks.
    webhooks: Gauge = "webhooks_running", "Webhooks that this relay delivers";
    webhook_waiting: Gauge = "webhook_waiting", "Deliveries that wait after a failure, of the webhooks that this relay delivers";
    webhook_dead: Gauge = "webhook_dead_letters", "Deliveries that were given up, of the webhooks that this relay delivers";
    webhook_delivered: Counter = "webhook_deliveries", "Deliveries that a receiver has taken";
    webhook_failures: Counter = "webhook_failures", "Attempts to deliver that failed";
    webhook_given_up: Counter = "webhook_given_up", "Deliveries that became dead letters";
    webhook_gaps: Counter = "webhook_gaps", "Gaps in the changes of webhooks";
    webhook_answers: Histogram(0.001, 15) = "webhook_request_seconds", "Requests to receivers, from connecting to the answer";
    // Other relays.
    nodes: Gauge = "nodes", "Relays of this database whose members are known, with this one";
    node_batches: Counter = "node_batches", "Batches of messages written for the other relays";
    node_messages: Counter = "node_messages", "Messages read from the other relays";
    node_dropped: Counter = "node_messages_dropped", "Broadcasts for which there was no room on the way between relays";
    node_holes: Counter = "node_holes", "Times batches of another relay were gone before they were read";

    // Keys.
    keys: Gauge = "jwks_keys", "Valid keys of the JWK set";
    keys_stale: Gauge = "jwks_stale", "1 while the JWK set cannot be reread";
    keys_not_read: Counter = "jwks_read_failures", "Failed reads of the JWK set";
}

/// Why a connection or request is refused, as metrics and log name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusalReason {
    /// A limit on clients or connections is reached.
    Limit,
    /// The page of a browser has an origin that is not allowed.
    Origin,
    /// The token or key is missing, invalid or expired.
    Token,
    /// The role of the token may not do this.
    Role,
    /// The request is malformed.
    Request,
    /// There is nothing at its path.
    Path,
}

impl RefusalReason {
    const ALL: [Self; 6] = [Self::Limit, Self::Origin, Self::Token, Self::Role, Self::Request, Self::Path];

    fn name(self) -> &'static str {
        match self {
            Self::Limit => "limit",
            Self::Origin => "origin",
            Self::Token => "token",
            Self::Role => "role",
            Self::Request => "request",
            Self::Path => "path",
        }
    }
}

/// A connection or request that is refused.
#[derive(Debug, Clone, Copy)]
pub struct Refusal<'a> {
    /// The reason.
    pub reason: RefusalReason,
    /// The client's address.
    pub address: IpAddr,
    /// The path of the request, if it was read.
    pub path: Option<&'a str>,
    /// The user, if the token is valid.
    pub sub: Option<&'a str>,
    /// What is wrong, in words.
    pub why: &'a str,
}

/// What was written to a client.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sent {
    /// Number of bytes.
    pub bytes: usize,
    /// Number of whole messages.
    pub messages: usize,
    /// How many of them are gaps.
    pub gaps: usize,
}

/// The transports of clients.
pub const TRANSPORTS: [&str; 3] = ["websocket", "event_stream", "poll"];
/// The ways to continue.
const WAYS: [&str; 2] = ["cursor", "session"];
/// Maximum number of characters of a client's text in a log line.
const LOGGED_CHARACTERS: usize = 200;
/// Number of bytes of a user's SHA-256 in a log line.
const DIGEST_BYTES: usize = 6;

/// What `/metrics` reads from its owner when it is asked: state that decides something is never kept here.
#[derive(Debug, Clone, Copy, Default)]
pub struct Readings {
    /// Connected clients, in the order of [`TRANSPORTS`].
    pub clients: [usize; 3],
    /// Connected clients.
    pub sessions: usize,
    /// Bytes queued for clients.
    pub outbox_bytes: usize,
    /// Users with a connection and without, as the status counts them.
    pub status_users: (usize, usize),
    /// The maximum number of users without a connection.
    pub status_cache_bound: usize,
    /// Whether the status is written.
    pub status_is_on: bool,
}

/// Lets one log line a second through.
#[derive(Default)]
struct LogPace {
    /// Unix time of the last line.
    last: AtomicU64,
}

impl LogPace {
    fn is_due(&self) -> bool {
        let now = OffsetDateTime::now_utc().unix_timestamp().unsigned_abs();
        self.last.swap(now, Ordering::Relaxed) != now
    }
}

/// Metrics of one relay, and its repeated log lines. None carries a topic, a claim or a row.
pub struct Observe {
    registry: Registry,
    process: Registry,
    metrics: Metrics,
    logged_missing_grants: Mutex<BTreeSet<String>>,
    logged_hidden: Mutex<BTreeSet<String>>,
    /// Of failed evaluations.
    failures: LogPace,
    /// Of refused connections and requests.
    refusals: LogPace,
    /// Of refused subscriptions.
    subscription_refusals: LogPace,
    /// Of the server behind the relay.
    upstream: LogPace,
    /// Of users whose status was refused.
    status_refusals: LogPace,
    /// Of failed deliveries of webhooks.
    webhooks: LogPace,
    /// Of messages that did not reach other relays.
    node_losses: LogPace,
}

impl Observe {
    /// Registers all metrics, with value zero.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("relay");
        registry.register("build", "The version", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
        let metrics = Metrics::register(&mut registry);
        // A family without members would not be in the text, and a rate needs the zero before the first one.
        let _ = metrics.responses.get_or_create(&[("status", 200)]);
        for reason in RefusalReason::ALL {
            let _ = metrics.refused.get_or_create(&[("reason", reason.name())]);
        }
        for transport in TRANSPORTS {
            let _ = metrics.clients.get_or_create(&[("transport", transport)]);
            for family in [&metrics.sent_messages, &metrics.sent_bytes, &metrics.gaps] {
                let _ = family.get_or_create(&[("transport", transport)]);
            }
        }
        for family in [&metrics.received_messages, &metrics.received_bytes] {
            let _ = family.get_or_create(&[("transport", TRANSPORTS[0])]);
        }
        for way in WAYS {
            let _ = metrics.resumes.get_or_create(&[("way", way)]);
        }
        Self {
            registry,
            process: process::registry(),
            metrics,
            logged_missing_grants: Mutex::default(),
            logged_hidden: Mutex::default(),
            failures: LogPace::default(),
            refusals: LogPace::default(),
            subscription_refusals: LogPace::default(),
            upstream: LogPace::default(),
            status_refusals: LogPace::default(),
            webhooks: LogPace::default(),
            node_losses: LogPace::default(),
        }
    }

    /// Counts a client that connected.
    pub fn session_opened(&self) {
        self.metrics.sessions_total.inc();
    }

    /// Counts changes that were not sent, because a newer one of the same row came.
    pub fn conflated(&self, changes: usize) {
        self.metrics.conflated.inc_by(changes as u64);
    }

    /// Counts a client that was closed because it read too slowly.
    pub fn session_full(&self) {
        self.metrics.sessions_full.inc();
    }

    /// Counts a refused connection, and logs it, at most once a second: a browser cannot read the reason.
    pub fn connection_refused(&self, refusal: &Refusal<'_>) {
        self.count_refusal(refusal, "connection refused");
    }

    /// Counts a frame that a client sent over its socket.
    pub fn received(&self, bytes: usize) {
        self.metrics.received_messages.get_or_create(&[("transport", TRANSPORTS[0])]).inc();
        self.metrics.received_bytes.get_or_create(&[("transport", TRANSPORTS[0])]).inc_by(bytes as u64);
    }

    /// Counts what was written to a client.
    pub fn sent(&self, transport: &'static str, sent: Sent) {
        let label = [("transport", transport)];
        self.metrics.sent_bytes.get_or_create(&label).inc_by(sent.bytes as u64);
        self.metrics.sent_messages.get_or_create(&label).inc_by(sent.messages as u64);
        if sent.gaps > 0 {
            self.metrics.gaps.get_or_create(&label).inc_by(sent.gaps as u64);
        }
    }

    /// Records the lag of a write to a client's socket, from when the oldest change in it was written by its writer.
    pub fn written(&self, oldest: OffsetDateTime) {
        let lag = OffsetDateTime::now_utc() - oldest;
        self.metrics.written_lag.observe(lag.as_seconds_f64().max(0.0));
    }

    /// Counts a stream or channel that continued from a cursor.
    pub fn resumed_from_cursor(&self) {
        self.metrics.resumes.get_or_create(&[("way", WAYS[0])]).inc();
    }

    /// Counts a channel of a named session that continued from its bookmark.
    pub fn resumed_session(&self) {
        self.metrics.resumes.get_or_create(&[("way", WAYS[1])]).inc();
    }

    /// Records a wait for a connection of a pool.
    pub fn pool_waited(&self, took: Duration) {
        self.metrics.pool_wait.observe(took.as_secs_f64());
    }

    /// Counts an answer to an HTTP request.
    pub fn answered(&self, status: u16) {
        self.metrics.responses.get_or_create(&[("status", status)]).inc();
    }

    /// Records a read of a page that had changes.
    pub fn page_read(&self, took: Duration) {
        self.metrics.page.observe(took.as_secs_f64());
    }

    /// Counts an HTTP request refused because of its client, and logs it, at most once a second.
    pub fn request_refused(&self, refusal: &Refusal<'_>) {
        self.count_refusal(refusal, "request refused");
    }

    /// Logs a refused subscription of a user, at most once a second: its client may not show the reason.
    pub fn subscription_refused(&self, sub: Option<&str>, why: &str) {
        if self.subscription_refusals.is_due() {
            tracing::warn!(user.digest = sub.map(digest), why, "subscription refused");
        }
    }

    fn count_refusal(&self, refusal: &Refusal<'_>, what: &str) {
        let Refusal { reason, address, path, sub, why } = refusal;
        self.metrics.refused.get_or_create(&[("reason", reason.name())]).inc();
        if self.refusals.is_due() {
            let (path, reason) = (path.map(shortened), reason.name());
            tracing::warn!(reason, %address, path, user.digest = sub.map(digest), why, "{what}");
        }
    }

    /// Counts a request that was passed on to the server behind the relay.
    pub fn upstream_requested(&self) {
        self.metrics.upstream_requests.inc();
    }

    /// Counts a request that the server behind the relay did not answer, and logs it, at most once a second.
    pub fn upstream_failed(&self, why: &str) {
        self.metrics.upstream_failures.inc();
        if self.upstream.is_due() {
            tracing::warn!(why, "no answer from --upstream");
        }
    }

    /// Updates the numbers of channels and groups of a router.
    pub fn subscriptions(&self, before: (usize, usize), now: (usize, usize)) {
        self.metrics.channels.inc_by(now.0 as i64 - before.0 as i64);
        self.metrics.groups.inc_by(now.1 as i64 - before.1 as i64);
    }

    /// Sets the size of the changelog.
    pub fn changelog_bytes(&self, bytes: i64) {
        self.metrics.changelog_bytes.set(bytes);
    }

    /// Counts changes read from the changelog.
    pub fn read(&self, changes: usize) {
        self.metrics.changes_read.inc_by(changes as u64);
    }

    /// Counts frames put into outboxes.
    pub fn frames_delivered(&self, frames: usize) {
        self.metrics.frames.inc_by(frames as u64);
    }

    /// Counts a broadcast and its frames.
    pub fn broadcast(&self, frames: usize) {
        self.metrics.broadcasts.inc();
        self.metrics.broadcast_frames.inc_by(frames as u64);
    }

    /// Records the lag of a delivered part, from its last change.
    pub fn delivered_through(&self, changes: &[Change]) {
        if let Some(last) = changes.last() {
            let lag = OffsetDateTime::now_utc() - last.committed;
            self.metrics.lag.observe(lag.as_seconds_f64().max(0.0));
        }
    }

    /// Counts notifications.
    pub fn rung(&self, count: usize) {
        self.metrics.rings.inc_by(count as u64);
    }

    /// Counts a poll that found changes without a notification.
    pub fn found_by_polling(&self) {
        self.metrics.polled.inc();
    }

    /// Counts that the source went to sleep.
    pub fn asleep(&self) {
        self.metrics.sleeps.inc();
    }

    /// Counts that a burst of notifications woke the source.
    pub fn awake(&self) {
        self.metrics.wakes.inc();
    }

    /// Records that the changelog is being read; `is_heard` is whether notifications arrive.
    pub fn source_up(&self, is_heard: bool) {
        self.metrics.source_up.set(if is_heard { 2 } else { 1 });
        tracing::info!(doorbell.heard = is_heard, "reading the changelog");
    }

    /// Records that the changelog cannot be read.
    pub fn source_down(&self) {
        self.metrics.source_up.set(0);
        self.metrics.leader.set(0);
        self.metrics.source_downs.inc();
    }

    /// Records a read of the JWK set, with the number of valid keys.
    pub fn keys_read(&self, count: usize) {
        self.metrics.keys.set(count as i64);
        self.metrics.keys_stale.set(0);
    }

    /// Records a failed read of the JWK set, with the number of keys that are still valid.
    pub fn keys_not_read(&self, count: usize) {
        self.metrics.keys.set(count as i64);
        self.metrics.keys_stale.set(1);
        self.metrics.keys_not_read.inc();
    }

    /// Records whether this relay leads.
    pub fn leads(&self, leads: bool) {
        self.metrics.leader.set(i64::from(leads));
    }

    /// Records a wait for the WAL flush.
    pub fn flushed(&self, took: Duration) {
        self.metrics.flush.observe(took.as_secs_f64());
    }

    /// Counts queries to PostgreSQL about visibility.
    pub fn judged(&self, queries: usize) {
        self.metrics.judgements.inc_by(queries as u64);
    }

    /// Records how long a batch of changes took that PostgreSQL was asked about.
    pub fn judging_took(&self, took: Duration) {
        self.metrics.judging.observe(took.as_secs_f64());
    }

    /// Counts a failed evaluation on rows of this relation, and logs it with its outcome for the reader, at most once a second.
    pub fn judgement_failed(&self, denied: Denied, relation: &str) {
        match denied {
            Denied::Raised | Denied::Claims => self.metrics.raised.inc(),
            Denied::Unreadable => self.metrics.unreadable.inc(),
            Denied::TimedOut | Denied::Locked => self.metrics.timed_out.inc(),
            Denied::Role => self.metrics.role_lost.inc(),
        };
        // A policy that raises for every row must not fill the disk.
        if self.failures.is_due() {
            let outcome = match denied {
                Denied::Unreadable | Denied::TimedOut | Denied::Locked => "gap",
                Denied::Raised | Denied::Claims | Denied::Role => "denied",
            };
            tracing::warn!(relation.name = relation, why = ?denied, outcome, "policy or filter not evaluated");
        }
    }

    /// Sets the grants that roles lack for their policies, and logs the new ones.
    pub fn lacks(&self, lacks: impl Iterator<Item = String>) {
        let current: BTreeSet<String> = lacks.collect();
        self.metrics.missing_grants.set(current.len() as i64);
        let mut logged = self.logged_missing_grants.lock().unwrap_or_else(PoisonError::into_inner);
        current.difference(&logged).for_each(|lack| tracing::warn!("{lack}"));
        *logged = current;
    }

    /// Logs the tables that show a subscriber's role no row, each once for a role.
    pub fn hides(&self, hidden: impl IntoIterator<Item = String>) {
        let mut logged = self.logged_hidden.lock().unwrap_or_else(PoisonError::into_inner);
        for why in hidden {
            if !logged.contains(&why) {
                tracing::warn!("{why}");
                logged.insert(why);
            }
        }
    }

    /// Counts a sign of life.
    pub fn status_requested(&self) {
        self.metrics.status_requests.inc();
    }

    /// Counts a sign of life that is not written.
    pub fn status_throttled(&self) {
        self.metrics.status_throttled.inc();
    }

    /// Counts a statement that wrote the status of users.
    pub fn status_written(&self, users: usize) {
        self.metrics.status_statements.inc();
        self.metrics.status_written.inc_by(users as u64);
    }

    /// Counts users whose status could not be written, or a failed sweep.
    pub fn status_failed(&self, count: usize) {
        self.metrics.status_failed.inc_by(count as u64);
    }

    /// Logs users that the status table refused, at most once a second.
    pub fn status_refused(&self, count: usize, code: &str) {
        if self.status_refusals.is_due() {
            tracing::warn!(user.count = count, code, "the status table refused users");
        }
    }

    /// Counts a sweep.
    pub fn status_swept(&self, users: u64) {
        self.metrics.status_sweeps.inc();
        self.metrics.status_swept.inc_by(users);
    }

    /// Sets the number of webhooks that are delivered.
    pub fn webhooks_running(&self, count: usize) {
        self.metrics.webhooks.set(count as i64);
    }

    /// Updates the numbers of deliveries of a webhook that wait, and of its dead letters.
    pub fn webhook_counts(&self, before: (usize, usize), now: (usize, usize)) {
        self.metrics.webhook_waiting.inc_by(now.0 as i64 - before.0 as i64);
        self.metrics.webhook_dead.inc_by(now.1 as i64 - before.1 as i64);
    }

    /// Counts a request to a receiver.
    pub fn webhook_answered(&self, took: Duration, is_delivered: bool) {
        self.metrics.webhook_answers.observe(took.as_secs_f64());
        self.metrics.webhook_delivered.inc_by(u64::from(is_delivered));
    }

    /// Counts a delivery that failed, and logs it, at most once a second.
    pub fn webhook_failed(&self, name: &str, why: &str, is_given_up: bool) {
        self.metrics.webhook_failures.inc();
        self.metrics.webhook_given_up.inc_by(u64::from(is_given_up));
        if self.webhooks.is_due() {
            let outcome = if is_given_up { "dead letter" } else { "tried again" };
            tracing::warn!(webhook.name = name, why, outcome, "webhook not delivered");
        }
    }

    /// Counts and logs a gap in the changes of a webhook.
    pub fn webhook_gap(&self, name: &str, why: &str) {
        self.metrics.webhook_gaps.inc();
        tracing::warn!(webhook.name = name, why, "webhook tells a gap");
    }

    /// Sets the number of relays whose members are known.
    pub fn nodes(&self, count: usize) {
        self.metrics.nodes.set(count as i64);
    }

    /// Counts batches written for the other relays.
    pub fn node_written(&self, batches: usize) {
        self.metrics.node_batches.inc_by(batches as u64);
    }

    /// Counts messages read from other relays.
    pub fn node_read(&self, messages: usize) {
        self.metrics.node_messages.inc_by(messages as u64);
    }

    /// Counts a broadcast for which there was no room between relays, and logs it, at most once a second.
    pub fn node_dropped(&self) {
        self.metrics.node_dropped.inc();
        if self.node_losses.is_due() {
            tracing::warn!(
                "broadcasts did not reach the clients of other relays: too many wait (relay_node_messages_dropped_total)"
            );
        }
    }

    /// Counts batches of another relay that were gone before they were read, and logs them, at most once a second.
    pub fn node_hole(&self, batches: u64) {
        self.metrics.node_holes.inc();
        if self.node_losses.is_due() {
            tracing::warn!(
                batches,
                "broadcasts of another relay were lost before this one read them; its presence is read anew"
            );
        }
    }

    /// Returns the text of `/metrics`.
    pub fn text(&self, now: &Readings) -> String {
        self.metrics.sessions.set(now.sessions as i64);
        for (transport, count) in TRANSPORTS.into_iter().zip(now.clients) {
            self.metrics.clients.get_or_create(&[("transport", transport)]).set(count as i64);
        }
        self.metrics.outbox_bytes.set(now.outbox_bytes as i64);
        self.metrics.status_users.set(now.status_users.0 as i64);
        self.metrics.status_cache.set(now.status_users.1 as i64);
        self.metrics.status_cache_bound.set(now.status_cache_bound as i64);
        self.metrics.status_on.set(i64::from(now.status_is_on));
        let mut text = String::new();
        // Writing to a text cannot fail.
        let _ = encode_registry(&mut text, &self.registry);
        let _ = encode_registry(&mut text, &self.process);
        let _ = encode_eof(&mut text);
        text
    }
}

/// Returns a client's text as it is logged.
fn shortened(text: &str) -> String {
    text.chars().take(LOGGED_CHARACTERS).collect()
}

/// Returns what stands for a user in the log: who knows the user finds the lines, and the log has no claim.
fn digest(sub: &str) -> String {
    Sha256::digest(sub).iter().take(DIGEST_BYTES).map(|byte| format!("{byte:02x}")).collect()
}

impl Default for Observe {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Observe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observe").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_lists_each_metric_and_no_others() {
        let documented: BTreeSet<&str> = include_str!("OPERATION.md")
            .lines()
            .filter_map(|line| line.strip_prefix("| `relay_"))
            .flat_map(|line| line.split(" | ").next().unwrap_or_default().split("`, `relay_"))
            .map(|name| name.trim_end_matches('`'))
            .collect();
        let text = Observe::new().text(&Readings::default());
        let measured: BTreeSet<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE relay_")?.rsplit_once(' '))
            .map(|(name, _)| name)
            .collect();
        let plain = |name: &&str| name.trim_end_matches("_total").trim_end_matches("_info").to_owned();
        let [documented, measured] =
            [documented, measured].map(|names| names.iter().map(plain).collect::<BTreeSet<_>>());
        assert_eq!(documented, measured);
    }
}
