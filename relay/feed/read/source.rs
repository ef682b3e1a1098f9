//! The source of changes: holds the position in the changelog over any number of connections.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::Sender;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::feed::read::batch::Batch;
use crate::feed::read::poll_loop::PollLoop;
use crate::feed::read::stall::{StallCause, StallMonitor};
use crate::model::log::cursor::{Cursor, Epoch, Snapshot, Span};
use crate::model::row::change::RelationId;
use crate::observe::Observe;
use crate::postgres::catalog::RuleScope;
use crate::postgres::changelog::access::ChangelogAccess;
use crate::postgres::changelog::doorbell::{Backend, Doorbell};
use crate::postgres::changelog::reader::{self, Changelog, Flush, PagePosition};
use crate::postgres::connect::backoff::Backoff;
use crate::postgres::connect::pool::{Error, Server};
use crate::postgres::connect::within::within;

/// A batch ends at this many changes …
pub const BATCH_CHANGES: usize = 250;
/// … or this many bytes of row images, whichever comes first. Bounds the memory in flight; its frames must fit well
/// into an empty outbox.
pub const BATCH_BYTES: usize = 128 * 1024;

/// Longest pause between two connection attempts.
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// An item that the source sends to the router.
#[derive(Clone)]
pub enum FeedItem {
    /// Changes, ascending by number.
    Changes(Arc<Batch>),
    /// The page continues, but is too large to deliver it to all in order: its rest is replayed to the subscribers it
    /// concerns.
    Rest {
        /// The page.
        span: Arc<Span>,
        /// Number of the last change that was sent.
        after: i64,
        /// Number of remaining changes by relation; relation 0 is the schema.
        counts: HashMap<RelationId, i64>,
    },
    /// The position moved to here without changes.
    Moved(Cursor),
    /// The router had no channel for the changes up to this position.
    Skipped(Cursor),
    /// The queue overflowed: the changes up to this position have to be read from the changelog.
    Overflow(Cursor),
    /// Changes may be missing here and cannot be recovered; the text gives the reason.
    Gap(String),
}

impl FeedItem {
    /// Returns its size in bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Changes(batch) => batch.bytes(),
            Self::Rest { .. } | Self::Moved(_) | Self::Skipped(_) | Self::Overflow(_) | Self::Gap(_) => 0,
        }
    }

    /// Returns the relations whose changes it carries, possibly with duplicates.
    pub fn relations(&self) -> impl Iterator<Item = RelationId> {
        let (changes, counts) = match self {
            Self::Changes(batch) => (Some(&batch.changes), None),
            Self::Rest { counts, .. } => (None, Some(counts)),
            Self::Moved(_) | Self::Skipped(_) | Self::Overflow(_) | Self::Gap(_) => (None, None),
        };
        let changes = changes.into_iter().flatten().map(|change| change.relation);
        changes.chain(counts.into_iter().flat_map(|counts| counts.keys().copied()))
    }

    /// Returns its end, unless it carries a gap or schema changes.
    pub fn end_if_plain(&self) -> Option<Cursor> {
        match self {
            Self::Changes(batch) if !batch.has_schema_changes() => batch.end(),
            Self::Moved(end) | Self::Skipped(end) => Some(end.clone()),
            _ => None,
        }
    }
}

/// Connections and settings of the source.
pub struct ChangeSource {
    /// The changelog.
    pub access: ChangelogAccess,
    /// The server for the doorbell: a direct connection when that of the changelog is a pooler.
    pub doorbell: Server,
    /// Poll interval while asleep, in case a ring is lost.
    pub poll: Duration,
    /// Records what the feed waits for.
    pub stall_monitor: Arc<StallMonitor>,
    /// Metrics.
    pub observe: Arc<Observe>,
    /// Notified when materialized views or collections may need a look.
    pub jobs: watch::Sender<()>,
    /// What the version mark of a page is computed from.
    pub scope: watch::Receiver<Arc<RuleScope>>,
}

/// The position of the source. Outlives connections.
pub(super) struct SourcePosition {
    pub(super) epoch: Epoch,
    pub(super) page: PagePosition,
}

impl ChangeSource {
    /// Reads until `end`, over any number of connections.
    pub async fn run(self, items: Sender<FeedItem>, end: CancellationToken) {
        let (mut position, mut last_backend) = (None, None);
        let mut backoff = Backoff::new(Duration::from_millis(50), MAX_PAUSE);
        loop {
            let started = Instant::now();
            let outcome = tokio::select! {
                () = end.cancelled() => return,
                outcome = self.run_connection(&mut position, &mut last_backend, &items) => outcome,
            };
            self.stall_monitor.end_reading();
            self.observe.source_down();
            let Err(error) = outcome else { return };
            self.stall_monitor.record_disconnect(error.kind());
            if started.elapsed() > MAX_PAUSE {
                backoff.reset();
            }
            // A permanent error is not retried at the fast rate.
            if !error.is_transient() {
                backoff.slow_down();
            }
            let pause = backoff.pause();
            tracing::warn!(error = %error, pause_ms = pause.as_millis() as u64, "feed interrupted, reconnecting");
            tokio::select! {
                () = end.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Runs over one pair of connections. Returns `Ok` only when the receiver is closed.
    async fn run_connection(
        &self,
        position: &mut Option<SourcePosition>,
        last_backend: &mut Option<Backend>,
        items: &Sender<FeedItem>,
    ) -> Result<(), Error> {
        // Connect here first: on a standby neither works, and this connection reports why.
        let changelog = Changelog::connect(&self.access.server, self.access.query_timeout).await?;
        let mut doorbell = Doorbell::connect(&self.doorbell).await?;
        if let Some(lost) = last_backend.take() {
            doorbell.end(&lost).await?;
        }
        if !self.begin_at(position, &changelog, items).await? {
            return Ok(());
        }
        let Some(position) = position else { return Ok(()) };
        let is_heard = doorbell.is_heard(changelog.client()).await?;
        // Behind a pooler, the backend may belong to another client later.
        *last_backend = is_heard.then(|| doorbell.backend().clone());
        let rings = is_heard && !doorbell.is_off().await?;
        if !is_heard {
            tracing::warn!(
                "notifications do not arrive, polling instead: a pooler may drop them, give a direct connection with --doorbell-url"
            );
        } else if !rings {
            tracing::info!("relay.doorbell is off in this database, polling instead");
        }
        self.stall_monitor.begin_reading();
        self.observe.source_up(rings);
        let mut poll_loop = PollLoop::new(self, changelog, doorbell, position, items);
        match (is_heard, rings) {
            (true, true) => poll_loop.run_with_notifications().await,
            (true, false) => poll_loop.poll_as_leader().await,
            (false, _) => poll_loop.poll_only().await.map(|_| ()),
        }
    }

    /// Checks the known position against the database, and sends where reading begins; false when the receiver is closed. Without a
    /// known position, reading begins now; with one that is not of this database, too, after a gap.
    async fn begin_at(
        &self,
        position: &mut Option<SourcePosition>,
        changelog: &Changelog,
        items: &Sender<FeedItem>,
    ) -> Result<bool, Error> {
        let epoch = self.in_time(changelog.epoch()).await?;
        match position {
            // A restored backup has the same epoch, but its position is behind the known one.
            Some(known)
                if known.epoch == epoch
                    && known.page.is_reached_by(&self.in_time(changelog.now()).await?)
                    && self.horizon().await?.is_before_or_equal(&known.page.seen) => {}
            Some(known) => {
                // Set both together: if the start fails, the next attempt must find the difference again.
                let page = self.start_position(changelog).await?;
                *known = SourcePosition { epoch, page };
                let why = String::from(
                    "the database is another one, or an older state of it, or was away for too long, read the rows again",
                );
                if items.send(FeedItem::Gap(why)).await.is_err() {
                    return Ok(false);
                }
            }
            None => {
                *position = Some(SourcePosition { epoch, page: self.start_position(changelog).await? });
            }
        }
        match position {
            Some(known) if known.page.until.is_none() => {
                let cursor = Cursor::after(known.epoch, known.page.seen.clone());
                Ok(items.send(FeedItem::Moved(cursor)).await.is_ok())
            }
            _ => Ok(true),
        }
    }

    /// Reads the current position and flushes the log, so that a crash cannot take it back.
    async fn start_position(&self, changelog: &Changelog) -> Result<PagePosition, Error> {
        let now = self.in_time(changelog.now()).await?;
        self.in_time(reader::flush(&self.access.pool)).await?;
        Ok(PagePosition::after(now))
    }

    /// Waits until the log is flushed up to `through`: changes that a crash could undo are never delivered.
    pub(super) async fn flush(&self, mode: Flush, through: &str) -> Result<(), Error> {
        let started = Instant::now();
        let by_others = async {
            Ok(mode == Flush::WithWriters && reader::is_flushed_by_others(&self.access.pool, through).await?)
        };
        if !self.in_time(by_others).await? {
            self.in_time(reader::flush(&self.access.pool)).await?;
        }
        self.observe.flushed(started.elapsed());
        Ok(())
    }

    /// Reads the snapshot before which changes are not kept any more.
    pub(super) async fn horizon(&self) -> Result<Snapshot, Error> {
        self.in_time(reader::horizon(&self.access.pool)).await
    }

    /// Awaits data of a page and records the wait in the stall monitor.
    pub(super) async fn await_changelog<T>(
        &self,
        query: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        self.stall_monitor.begin_wait(StallCause::Changelog);
        let answer = self.in_time(query).await?;
        self.stall_monitor.end_wait(StallCause::Changelog);
        Ok(answer)
    }

    /// Applies the time limit.
    pub(super) async fn in_time<T>(&self, query: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        within(self.access.query_timeout, "the connection to the changelog", query).await
    }
}
