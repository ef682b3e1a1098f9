//! Everything the relay counts, in one closed list; the text of `/metrics` and the state behind `/readyz`.

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

/// Counters and gauges of one relay. Nothing here carries a topic, a claim or a row.
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
    lacking: Gauge,
    lacks_told: Mutex<BTreeSet<String>>,
    unreadable: Counter,
    timed_out: Counter,
    role_lost: Counter,
    keys_not_read: Counter,
    keys: Gauge,
    keys_stale: Gauge,
    warned: AtomicU64,
    refusal_told: AtomicU64,
    ready: AtomicBool,
    ending: AtomicBool,
}

impl Observe {
    /// All at zero.
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
        let polled = counter("changes_found_by_polling", "Looks that found a change for which nobody rang");
        let sleeps = counter("doorbell_sleeps", "Times the source fell asleep");
        let wakes = counter("doorbell_wakes", "Times a rush of rings woke the source to polling");
        let source_downs = counter("source_interruptions", "Times the connection to the changelog was lost");
        let judgements = counter("judgements", "Questions to PostgreSQL about who may see what");
        let raised = counter("judgements_raised", "Policies that raised an error; denied for those rows");
        let unreadable = counter(
            "judgements_unreadable",
            "Policies or filters that read a value which PostgreSQL cannot read back; told as gaps",
        );
        let timed_out = counter(
            "judgements_timed_out",
            "Policies that took too long, or read a locked table; told as a gap",
        );
        let role_lost =
            counter("judgements_role", "Roles that could not be taken or were changed by a policy; denied");
        let keys_not_read = counter("jwks_read_failures", "Readings of the JWK set that failed");
        let mut gauge = |name: &str, help: &str| {
            let gauge: Gauge<i64, AtomicI64> = Gauge::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
        let sessions = gauge("sessions_open", "Clients connected now");
        let waiting_bytes =
            gauge("outbox_bytes", "Bytes that wait for clients, a frame for many counted once");
        let channels = gauge("channels_open", "Channels with changes subscribed now");
        let changelog_bytes = gauge("changelog_bytes", "Size of the changelog in the database");
        let groups = gauge("audiences_open", "Groups of channels that get the same frames");
        let source_up =
            gauge("source_up", "1 while the changelog is being read, 2 when the doorbell is heard too");
        let keys = gauge("jwks_keys", "Keys of the JWK set that are in force");
        let keys_stale = gauge("jwks_stale", "1 while the JWK set cannot be read anew");
        let lacking = gauge(
            "roles_lacking_grants",
            "Tables, role by role, of which nothing is shown because the role lacks a grant for what their policies read",
        );
        let leader = gauge(
            "leader",
            "1 while this relay is the one of its database that writers ring and that rings the others",
        );
        let flush = Histogram::new(exponential_buckets(0.000_05, 2.0, 14));
        registry.register("flush_seconds", "Waits for the WAL flush before a page was shown", flush.clone());
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
            lacking,
            lacks_told: Mutex::default(),
            unreadable,
            timed_out,
            role_lost,
            keys_not_read,
            keys,
            keys_stale,
            warned: AtomicU64::new(0),
            refusal_told: AtomicU64::new(0),
            ready: AtomicBool::new(false),
            ending: AtomicBool::new(false),
        }
    }

    /// A client connected.
    pub fn session_opened(&self) {
        self.sessions.inc();
        self.sessions_total.inc();
    }

    /// A client is gone.
    pub fn session_closed(&self) {
        self.sessions.dec();
    }

    /// A client was closed because it read too slowly.
    pub fn session_full(&self) {
        self.sessions_full.inc();
    }

    /// So many bytes more wait for clients.
    pub fn waits(&self, bytes: usize) {
        self.waiting_bytes.inc_by(bytes as i64);
    }

    /// So many bytes less wait for clients.
    pub fn waits_no_more(&self, bytes: usize) {
        self.waiting_bytes.dec_by(bytes as i64);
    }

    /// How many bytes wait for clients.
    pub fn waiting_bytes(&self) -> usize {
        usize::try_from(self.waiting_bytes.get()).unwrap_or(0)
    }

    /// A connection was refused. A browser cannot read why, so it stands in the log, once a second at most.
    pub fn connection_refused(&self, why: &str) {
        if self.is_to_be_told() {
            tracing::warn!(why, "a connection was refused");
        }
    }

    /// A request without a socket was refused, because of whom it came from. Told as seldom.
    pub fn request_refused(&self, address: IpAddr, path: &str, why: &str) {
        if self.is_to_be_told() {
            tracing::warn!(%address, path, why, "a request was refused");
        }
    }

    fn is_to_be_told(&self) -> bool {
        self.refused.inc();
        let now = time::OffsetDateTime::now_utc().unix_timestamp().unsigned_abs();
        self.refusal_told.swap(now, Ordering::Relaxed) != now
    }

    /// How many clients are connected.
    pub fn session_count(&self) -> usize {
        usize::try_from(self.sessions.get()).unwrap_or(0)
    }

    /// How many channels and audiences a router had, and has now.
    pub fn subscriptions(&self, before: (usize, usize), now: (usize, usize)) {
        self.channels.inc_by(now.0 as i64 - before.0 as i64);
        self.groups.inc_by(now.1 as i64 - before.1 as i64);
    }

    /// How large the changelog is.
    pub fn changelog_bytes(&self, bytes: i64) {
        self.changelog_bytes.set(bytes);
    }

    /// Changes came from the changelog.
    pub fn read(&self, changes: usize) {
        self.changes_read.inc_by(changes as u64);
    }

    /// Frames went into outboxes.
    pub fn frames_delivered(&self, frames: usize) {
        self.frames.inc_by(frames as u64);
    }

    /// A part is done: how long ago its last row was written.
    pub fn delivered_through(&self, changes: &[Change]) {
        if let Some(last) = changes.last() {
            let lag = time::OffsetDateTime::now_utc() - last.committed;
            self.lag.observe(lag.as_seconds_f64().max(0.0));
        }
    }

    /// Notifications were heard.
    pub fn rung(&self, count: usize) {
        self.rings.inc_by(count as u64);
    }

    /// How many notifications were heard so far.
    pub fn ring_count(&self) -> u64 {
        self.rings.get()
    }

    /// A look found what nobody had rung for.
    pub fn found_by_polling(&self) {
        self.polled.inc();
    }

    /// The source fell asleep.
    pub fn asleep(&self) {
        self.sleeps.inc();
    }

    /// A rush of rings woke it.
    pub fn awake(&self) {
        self.wakes.inc();
    }

    /// The changelog is being read.
    pub fn source_up(&self, hears: bool) {
        self.source_up.set(if hears { 2 } else { 1 });
        self.ready.store(true, Ordering::Relaxed);
        tracing::info!(doorbell.heard = hears, "reading the changelog");
    }

    /// The changelog cannot be read.
    pub fn source_down(&self) {
        self.source_up.set(0);
        self.leader.set(0);
        self.source_downs.inc();
        self.ready.store(false, Ordering::Relaxed);
    }

    /// The JWK set was read; so many of its keys are in force.
    pub fn keys_read(&self, count: usize) {
        self.keys.set(count as i64);
        self.keys_stale.set(0);
    }

    /// The JWK set could not be read; so many keys are still in force.
    pub fn keys_not_read(&self, count: usize) {
        self.keys.set(count as i64);
        self.keys_stale.set(1);
        self.keys_not_read.inc();
    }

    /// This relay leads from now on.
    pub fn leads(&self, leads: bool) {
        self.leader.set(i64::from(leads));
    }

    /// The relay begins to end.
    pub fn ending(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }

    /// Whether clients should be sent here.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed) && !self.ending.load(Ordering::Relaxed)
    }

    /// A flush was waited for.
    pub fn flushed(&self, took: Duration) {
        self.flush.observe(took.as_secs_f64());
    }

    /// PostgreSQL answered this many questions.
    pub fn judged(&self, questions: usize) {
        self.judgements.inc_by(questions as u64);
    }

    /// A judgement on rows of this relation failed and counts as "no".
    pub fn judgement_failed(&self, denied: Denied, relation: &str) {
        match denied {
            Denied::Raised | Denied::Claims => self.raised.inc(),
            Denied::Unreadable => self.unreadable.inc(),
            Denied::TimedOut | Denied::Locked => self.timed_out.inc(),
            Denied::Role => self.role_lost.inc(),
        };
        let now = time::OffsetDateTime::now_utc().unix_timestamp().unsigned_abs();
        // Once a second is enough to notice; a policy that raises for every row must not fill the disk.
        if self.warned.swap(now, Ordering::Relaxed) != now {
            tracing::warn!(relation.name = relation, why = ?denied, "a policy or filter could not be judged: denied");
        }
    }

    /// What roles lack for the policies by which they read: it stands in the log when it is news.
    pub fn lacks(&self, lacks: impl Iterator<Item = String>) {
        let now: BTreeSet<String> = lacks.collect();
        self.lacking.set(now.len() as i64);
        let mut told = self.lacks_told.lock().unwrap_or_else(PoisonError::into_inner);
        now.difference(&told).for_each(|lack| tracing::warn!("{lack}"));
        *told = now;
    }

    /// The text of `/metrics`.
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
