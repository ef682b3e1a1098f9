//! All metrics of the relay in one closed list, the text of `/metrics`, and the state behind `/readyz`.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::model::policy::visibility::Denied;
use crate::model::row::change::Change;

/// Metrics of one relay. None carries a topic, a claim or a row.
pub struct Observe {
    registry: Registry,
    sessions: Gauge,
    sessions_total: Counter,
    sessions_full: Counter,
    refused: Counter,
    waiting_bytes: Gauge,
    channels: Gauge,
    groups: Gauge,
    changes_read: Counter,
    frames: Counter,
    rings: Counter,
    polled: Counter,
    sleeps: Counter,
    wakes: Counter,
    source_up: Gauge,
    leader: Gauge,
    changelog_bytes: Gauge,
    source_downs: Counter,
    flush: Histogram,
    lag: Histogram,
    judgements: Counter,
    raised: Counter,
    missing_grants: Gauge,
    logged_missing_grants: Mutex<BTreeSet<String>>,
    unreadable: Counter,
    timed_out: Counter,
    role_lost: Counter,
    keys_not_read: Counter,
    keys: Gauge,
    keys_stale: Gauge,
    /// Unix time of the last log line about a failed evaluation.
    failure_logged: AtomicU64,
    /// Unix time of the last log line about a refusal.
    refusal_logged: AtomicU64,
    ready: AtomicBool,
    ending: AtomicBool,
}

impl Observe {
    /// Registers all metrics, with value zero.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("relay");
        let mut counter = |name: &str, help: &str| {
            let counter: Counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let sessions_total = counter("sessions", "Clients that connected");
        let sessions_full = counter("sessions_closed_full", "Clients closed because they read too slowly");
        let refused = counter("connections_refused", "Connections refused before they became sessions");
        let changes_read = counter("changes_read", "Changes read from the changelog");
        let frames = counter("frames", "Frames of changes put into outboxes");
        let rings = counter("doorbell_rings", "Notifications heard");
        let polled = counter("changes_found_by_polling", "Polls that found changes without a notification");
        let sleeps = counter("doorbell_sleeps", "Times the source went to sleep");
        let wakes = counter("doorbell_wakes", "Times a burst of notifications woke the source to polling");
        let source_downs = counter("source_interruptions", "Times the connection to the changelog was lost");
        let judgements = counter("judgements", "Queries to PostgreSQL about row visibility");
        let raised = counter("judgements_raised", "Policies that raised an error; denied for those rows");
        let unreadable = counter(
            "judgements_unreadable",
            "Policies or filters that read a value which PostgreSQL cannot read back; delivered as gaps",
        );
        let timed_out = counter(
            "judgements_timed_out",
            "Policies that timed out, or read a locked table; delivered as a gap",
        );
        let role_lost =
            counter("judgements_role", "Roles that could not be set or were changed by a policy; denied");
        let keys_not_read = counter("jwks_read_failures", "Failed reads of the JWK set");
        let mut gauge = |name: &str, help: &str| {
            let gauge: Gauge<i64, AtomicI64> = Gauge::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
        let sessions = gauge("sessions_open", "Clients connected now");
        let waiting_bytes = gauge("outbox_bytes", "Bytes queued for clients, a frame for many counted once");
        let channels = gauge("channels_open", "Channels with changes subscribed now");
        let changelog_bytes = gauge("changelog_bytes", "Size of the changelog in the database");
        let groups = gauge("audiences_open", "Groups of channels that receive the same frames");
        let source_up =
            gauge("source_up", "1 while the changelog is being read, 2 if notifications arrive, too");
        let keys = gauge("jwks_keys", "Valid keys of the JWK set");
        let keys_stale = gauge("jwks_stale", "1 while the JWK set cannot be reread");
        let missing_grants = gauge(
            "roles_lacking_grants",
            "Pairs of a table and a role that sees nothing, because it lacks a grant for what the table's policies read",
        );
        let leader = gauge(
            "leader",
            "1 while this relay leads: writers notify it, and it notifies the other relays of its database",
        );
        let flush = Histogram::new(exponential_buckets(0.000_05, 2.0, 14));
        registry.register(
            "flush_seconds",
            "Waits for the WAL flush before a page was delivered",
            flush.clone(),
        );
        let lag = Histogram::new(exponential_buckets(0.000_1, 2.0, 18));
        registry.register(
            "lag_seconds",
            "From the write of a row (its trigger) to its frames in the outboxes",
            lag.clone(),
        );
        Self {
            registry,
            sessions,
            sessions_total,
            sessions_full,
            refused,
            waiting_bytes,
            channels,
            groups,
            changes_read,
            frames,
            rings,
            polled,
            sleeps,
            wakes,
            source_up,
            leader,
            changelog_bytes,
            source_downs,
            flush,
            lag,
            judgements,
            raised,
            missing_grants,
            logged_missing_grants: Mutex::default(),
            unreadable,
            timed_out,
            role_lost,
            keys_not_read,
            keys,
            keys_stale,
            failure_logged: AtomicU64::new(0),
            refusal_logged: AtomicU64::new(0),
            ready: AtomicBool::new(false),
            ending: AtomicBool::new(false),
        }
    }

    /// Counts a client that connected.
    pub fn session_opened(&self) {
        self.sessions.inc();
        self.sessions_total.inc();
    }

    /// Counts a client that disconnected.
    pub fn session_closed(&self) {
        self.sessions.dec();
    }

    /// Counts a client that was closed because it read too slowly.
    pub fn session_full(&self) {
        self.sessions_full.inc();
    }

    /// Adds to the bytes queued for clients.
    pub fn waits(&self, bytes: usize) {
        self.waiting_bytes.inc_by(bytes as i64);
    }

    /// Subtracts from the bytes queued for clients.
    pub fn waits_no_more(&self, bytes: usize) {
        self.waiting_bytes.dec_by(bytes as i64);
    }

    /// Bytes queued for clients.
    pub fn waiting_bytes(&self) -> usize {
        usize::try_from(self.waiting_bytes.get()).unwrap_or(0)
    }

    /// Counts a refused connection, and logs it, at most once a second: a browser cannot read the reason.
    pub fn connection_refused(&self, why: &str) {
        if self.count_refusal() {
            tracing::warn!(why, "connection refused");
        }
    }

    /// Counts an HTTP request refused because of its client, and logs it, at most once a second.
    pub fn request_refused(&self, address: IpAddr, path: &str, why: &str) {
        if self.count_refusal() {
            tracing::warn!(%address, path, why, "request refused");
        }
    }

    /// Counts a refusal, and returns whether to log it.
    fn count_refusal(&self) -> bool {
        self.refused.inc();
        let now = time::OffsetDateTime::now_utc().unix_timestamp().unsigned_abs();
        self.refusal_logged.swap(now, Ordering::Relaxed) != now
    }

    /// Number of connected clients.
    pub fn session_count(&self) -> usize {
        usize::try_from(self.sessions.get()).unwrap_or(0)
    }

    /// Updates the numbers of channels and groups of a router.
    pub fn subscriptions(&self, before: (usize, usize), now: (usize, usize)) {
        self.channels.inc_by(now.0 as i64 - before.0 as i64);
        self.groups.inc_by(now.1 as i64 - before.1 as i64);
    }

    /// Sets the size of the changelog.
    pub fn changelog_bytes(&self, bytes: i64) {
        self.changelog_bytes.set(bytes);
    }

    /// Counts changes read from the changelog.
    pub fn read(&self, changes: usize) {
        self.changes_read.inc_by(changes as u64);
    }

    /// Counts frames put into outboxes.
    pub fn frames_delivered(&self, frames: usize) {
        self.frames.inc_by(frames as u64);
    }

    /// Records the lag of a delivered part, from its last change.
    pub fn delivered_through(&self, changes: &[Change]) {
        if let Some(last) = changes.last() {
            let lag = time::OffsetDateTime::now_utc() - last.committed;
            self.lag.observe(lag.as_seconds_f64().max(0.0));
        }
    }

    /// Counts notifications.
    pub fn rung(&self, count: usize) {
        self.rings.inc_by(count as u64);
    }

    /// Number of notifications so far.
    pub fn ring_count(&self) -> u64 {
        self.rings.get()
    }

    /// Counts a poll that found changes without a notification.
    pub fn found_by_polling(&self) {
        self.polled.inc();
    }

    /// Counts that the source went to sleep.
    pub fn asleep(&self) {
        self.sleeps.inc();
    }

    /// Counts that a burst of notifications woke the source.
    pub fn awake(&self) {
        self.wakes.inc();
    }

    /// Records that the changelog is being read; `is_heard` is whether notifications arrive.
    pub fn source_up(&self, is_heard: bool) {
        self.source_up.set(if is_heard { 2 } else { 1 });
        self.ready.store(true, Ordering::Relaxed);
        tracing::info!(doorbell.heard = is_heard, "reading the changelog");
    }

    /// Records that the changelog cannot be read.
    pub fn source_down(&self) {
        self.source_up.set(0);
        self.leader.set(0);
        self.source_downs.inc();
        self.ready.store(false, Ordering::Relaxed);
    }

    /// Records a read of the JWK set, with the number of valid keys.
    pub fn keys_read(&self, count: usize) {
        self.keys.set(count as i64);
        self.keys_stale.set(0);
    }

    /// Records a failed read of the JWK set, with the number of keys that are still valid.
    pub fn keys_not_read(&self, count: usize) {
        self.keys.set(count as i64);
        self.keys_stale.set(1);
        self.keys_not_read.inc();
    }

    /// Records whether this relay leads.
    pub fn leads(&self, leads: bool) {
        self.leader.set(i64::from(leads));
    }

    /// Records that the relay is shutting down.
    pub fn ending(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }

    /// Whether a load balancer should send clients to this relay.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed) && !self.ending.load(Ordering::Relaxed)
    }

    /// Records a wait for the WAL flush.
    pub fn flushed(&self, took: Duration) {
        self.flush.observe(took.as_secs_f64());
    }

    /// Counts queries to PostgreSQL about visibility.
    pub fn judged(&self, queries: usize) {
        self.judgements.inc_by(queries as u64);
    }

    /// Counts a failed evaluation on rows of this relation, which denies them, and logs it, at most once a second.
    pub fn judgement_failed(&self, denied: Denied, relation: &str) {
        match denied {
            Denied::Raised | Denied::Claims => self.raised.inc(),
            Denied::Unreadable => self.unreadable.inc(),
            Denied::TimedOut | Denied::Locked => self.timed_out.inc(),
            Denied::Role => self.role_lost.inc(),
        };
        let now = time::OffsetDateTime::now_utc().unix_timestamp().unsigned_abs();
        // A policy that raises for every row must not fill the disk.
        if self.failure_logged.swap(now, Ordering::Relaxed) != now {
            tracing::warn!(relation.name = relation, why = ?denied, "policy or filter not evaluated, denied");
        }
    }

    /// Sets the grants that roles lack for their policies, and logs the new ones.
    pub fn lacks(&self, lacks: impl Iterator<Item = String>) {
        let current: BTreeSet<String> = lacks.collect();
        self.missing_grants.set(current.len() as i64);
        let mut logged = self.logged_missing_grants.lock().unwrap_or_else(PoisonError::into_inner);
        current.difference(&logged).for_each(|lack| tracing::warn!("{lack}"));
        *logged = current;
    }

    /// Returns the text of `/metrics`.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let _ = encode(&mut text, &self.registry);
        text
    }
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
