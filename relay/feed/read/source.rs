//! The source of changes: finds the place in the changelog and keeps it over any number of connections.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use deadpool_postgres::Pool;
use tokio::sync::mpsc::Sender;
use tokio::sync::{Notify, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::feed::read::batch::Batch;
use crate::feed::read::poll_loop::PollLoop;
use crate::feed::read::stall::{StallCause, StallMonitor};
use crate::model::log::cursor::{Cursor, Epoch, Snapshot, Span};
use crate::model::row::change::RelationId;
use crate::observe::Observe;
use crate::postgres::catalog::RuleScope;
use crate::postgres::changelog::doorbell::{Backend, Doorbell};
use crate::postgres::changelog::reader::{self, Changelog, Flush, PagePosition};
use crate::postgres::changelog::transactions::Transactions;
use crate::postgres::connect::backoff::Backoff;
use crate::postgres::connect::pool::{Error, Server};

/// A part of a page goes on at this many changes …
pub const PART_CHANGES: usize = 250;
/// … or this many bytes of row images, whichever comes first. It bounds the memory of what is on its way, and its
/// frames must fit well into an empty outbox.
pub const PART_BYTES: usize = 128 * 1024;

/// The longest pause between two tries to connect.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What goes from the source to the router.
#[derive(Clone)]
pub enum FeedItem {
    /// Changes in the order of their numbers.
    Changes(Arc<Batch>),
    /// The page goes on, but is too large for everybody to wait for it: who wants its rest reads that by itself.
    Rest {
        /// The page.
        span: Arc<Span>,
        /// The number of the last change that was handed on.
        after: i64,
        /// How many of the others are of which relation; 0 is the schema.
        counts: HashMap<RelationId, i64>,
    },
    /// There was nothing for anybody up to here.
    Quiet(Cursor),
    /// The router had no channel for the changes up to this position.
    Skipped(Cursor),
    /// What there was up to here is more than can wait for the router: the changelog has it.
    TooMuch(Cursor),
    /// Changes may be missing here and cannot be had any more; the text says why.
    Gap(String),
}

impl FeedItem {
    /// How much room it takes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Changes(batch) => batch.bytes(),
            Self::Rest { .. } | Self::Quiet(_) | Self::Skipped(_) | Self::TooMuch(_) | Self::Gap(_) => 0,
        }
    }

    /// Where it ends, if all that it has are changes of rows.
    pub fn end_if_plain(&self) -> Option<Cursor> {
        match self {
            Self::Changes(batch) if !batch.is_news() => batch.end(),
            Self::Quiet(end) | Self::Skipped(end) => Some(end.clone()),
            _ => None,
        }
    }
}

/// Settings of the source.
pub struct Source {
    /// Where the changelog is.
    pub server: Server,
    /// Where the bell is heard: a direct connection, when `server` goes through a pooler.
    pub bell: Server,
    /// For the flush, which needs a connection beside the one that streams a page.
    pub pool: Pool,
    /// Asleep, the changelog is looked at this often even if nobody rings.
    pub poll: Duration,
    /// What completes the parts of a page.
    pub transactions: Arc<Transactions>,
    /// How long PostgreSQL may take for a page, or a part of one.
    pub patience: Duration,
    /// Where it is told whether the feed goes on.
    pub stall_monitor: Arc<StallMonitor>,
    /// What is counted.
    pub observe: Arc<Observe>,
    /// Told when the refresh schedule changed.
    pub refresh_jobs: Arc<Notify>,
    /// What the mark of a page is made of.
    pub scope: watch::Receiver<Arc<RuleScope>>,
}

/// Where the source stands; it outlives connections.
pub(super) struct SourcePosition {
    pub(super) epoch: Epoch,
    pub(super) position: PagePosition,
}

impl Source {
    /// Reads until the end, over any number of connections.
    pub async fn run(self, parts: Sender<FeedItem>, end: CancellationToken) {
        let (mut place, mut bell) = (None, None);
        let mut backoff = Backoff::new(Duration::from_millis(50), LONGEST_PAUSE);
        loop {
            let started = Instant::now();
            let worked = tokio::select! {
                () = end.cancelled() => return,
                worked = self.work(&mut place, &mut bell, &parts) => worked,
            };
            self.observe.source_down();
            let Err(error) = worked else { return };
            self.stall_monitor.is_cut_off(error.kind());
            if started.elapsed() > LONGEST_PAUSE {
                backoff.reset();
            }
            // What does not pass by itself is not asked for again and again.
            if !error.is_transient() {
                backoff.slow_down();
            }
            let pause = backoff.pause();
            tracing::warn!(error = %error, pause_ms = pause.as_millis() as u64, "the feed is interrupted");
            tokio::select! {
                () = end.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// One connection's life. Ends well only when nobody takes parts any more.
    async fn work(
        &self,
        place: &mut Option<SourcePosition>,
        bell: &mut Option<Backend>,
        parts: &Sender<FeedItem>,
    ) -> Result<(), Error> {
        // Before the doorbell: on a standby there is neither, and this one says so.
        let changelog = Changelog::connect(&self.server).await?;
        let mut doorbell = Doorbell::connect(&self.bell).await?;
        if let Some(lost) = bell.take() {
            doorbell.end(&lost).await?;
        }
        let epoch = self.in_time(changelog.epoch()).await?;
        match place {
            // The files of an earlier moment, put back, have the same epoch but have not come as far yet.
            Some(known)
                if known.epoch == epoch
                    && known.position.is_reached_by(&self.in_time(changelog.now()).await?)
                    && self.horizon().await?.is_before_or_equal(&known.position.seen) => {}
            Some(known) => {
                // Both or neither: if the start fails, the next try has to find the difference again.
                let position = self.start(&changelog).await?;
                *known = SourcePosition { epoch, position };
                let why = String::from(
                    "the database is another one, or an older state of it, or was away for too long, read the rows again",
                );
                if parts.send(FeedItem::Gap(why)).await.is_err() {
                    return Ok(());
                }
            }
            None => {
                *place = Some(SourcePosition { epoch, position: self.start(&changelog).await? });
            }
        }
        let Some(place) = place else { return Ok(()) };
        if place.position.until.is_none() {
            let here = Cursor::after(place.epoch, place.position.seen.clone());
            if parts.send(FeedItem::Quiet(here)).await.is_err() {
                return Ok(());
            }
        }
        let hears = doorbell.is_heard(changelog.client()).await?;
        // Behind a pooler it would be somebody else's by then.
        *bell = hears.then(|| doorbell.backend().clone());
        let rings = hears && !doorbell.is_off().await?;
        if !hears {
            tracing::warn!(
                "the doorbell is not heard (a pooler in between?): polling; give a direct --doorbell-url"
            );
        } else if !rings {
            tracing::info!("relay.doorbell is off in this database: polling");
        }
        self.observe.source_up(rings);
        let mut reading = PollLoop::new(self, changelog, doorbell, place, parts);
        match (hears, rings) {
            (true, true) => reading.run_with_notifications().await,
            (true, false) => reading.poll_as_leader().await,
            (false, _) => reading.poll_alone().await.map(|_| ()),
        }
    }

    /// The position of this moment, safe from a crash.
    async fn start(&self, changelog: &Changelog) -> Result<PagePosition, Error> {
        let now = self.in_time(changelog.now()).await?;
        self.in_time(reader::flush(&self.pool)).await?;
        Ok(PagePosition::after(now))
    }

    /// What a crash could take back is never shown: waits until the log is flushed up to a place in it.
    pub(super) async fn flush(&self, how: Flush, through: &str) -> Result<(), Error> {
        let started = Instant::now();
        let by_others = async {
            Ok(how == Flush::WithWriters && reader::is_flushed_by_others(&self.pool, through).await?)
        };
        if !self.in_time(by_others).await? {
            self.in_time(reader::flush(&self.pool)).await?;
        }
        self.observe.flushed(started.elapsed());
        Ok(())
    }

    /// Before this snapshot changes are not kept any more.
    pub(super) async fn horizon(&self) -> Result<Snapshot, Error> {
        self.in_time(reader::horizon(&self.pool)).await
    }

    /// Something of a page; while it is waited for the feed does not go on.
    pub(super) async fn page<T>(&self, asked: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        self.stall_monitor.waits(StallCause::Changelog);
        let answered = self.in_time(asked).await?;
        self.stall_monitor.goes_on(StallCause::Changelog);
        Ok(answered)
    }

    /// A connection on which nothing comes any more may look open for ever.
    pub(super) async fn in_time<T>(&self, asked: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        match timeout(self.patience, asked).await {
            Ok(answered) => answered,
            Err(_) => Err(Error::Lost("the connection to the changelog does not answer")),
        }
    }
}
