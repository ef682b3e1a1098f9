//! Reads the changelog page by page while its connections hold. Decides when to poll and when to sleep until the
//! doorbell rings: writers ring for the leader, the leader rings for its followers.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::Sender;
use tokio::time::timeout;

use crate::feed::read::batch::Batch;
use crate::feed::read::source::{BATCH_BYTES, BATCH_CHANGES, ChangeSource, FeedItem, SourcePosition};
use crate::model::log::cursor::{Snapshot, Span};
use crate::model::row::change::Change;
use crate::model::session::stored_broadcast::{NotSent, StoredBroadcast};
use crate::postgres::changelog::doorbell::{Doorbell, Rings};
use crate::postgres::changelog::reader::{Changelog, Flush, Page, PagePosition};
use crate::postgres::connect::pool::Error;

/// Batches after which a page counts as large: its rest is replayed to the subscribers it concerns, instead of
/// delaying the others.
const LARGE_PAGE_BATCHES: usize = 16;

/// Pause after a page that was not full, while awake. Adds at most one or two milliseconds of latency and costs
/// PostgreSQL at most a few hundred small statements a second.
const POLL_PAUSE: Duration = Duration::from_millis(2);
/// Time awake without changes after which the source tries to sleep.
const IDLE: Duration = Duration::from_millis(30);
/// Pause between two attempts to sleep while a writer that did not ring is in flight.
const SLEEP_RETRY: Duration = Duration::from_millis(10);
/// Rings within [`BURST`] that end the sleep: at a few hundred commits a second, polling is cheaper for writers.
const BURST_RINGS: usize = 6;
/// See [`BURST_RINGS`].
const BURST: Duration = Duration::from_millis(20);
/// Longest pause between polls when the doorbell does not work: a pooler swallows it, the database turned it off, or
/// the leader does not ring.
const MAX_POLL_PAUSE: Duration = Duration::from_millis(100);
/// Interval at which jobs are looked at when the doorbell does not work.
const JOBS_INTERVAL: Duration = Duration::from_secs(10);
/// While asleep, the source rings the doorbell itself this often, to check that it is still heard.
const PROBE: Duration = Duration::from_secs(10);
/// A follower tries this often to become the leader, so that one takes over within half a second.
const LEAD_RETRY: Duration = Duration::from_millis(400);

/// Pages read within this time after the last poll cannot have been trimmed: trimming looks at the changelog several
/// times first.
const TRIM_CHECK_AFTER: Duration = Duration::from_millis(100);
/// The position is sent this often when there are no changes, so that cursors do not grow old.
const POSITION_INTERVAL: Duration = Duration::from_secs(1);

/// The state of the source while its connections hold.
pub(super) struct PollLoop<'a> {
    source: &'a ChangeSource,
    changelog: Changelog,
    doorbell: Doorbell,
    position: &'a mut SourcePosition,
    items: &'a Sender<FeedItem>,
    /// When the position was sent last.
    last_sent: Instant,
    /// The position has moved since, without changes.
    unsent: bool,
    /// When the last poll began. Sending its batches may have taken long.
    last_poll: Instant,
    /// This relay gave up the lead because its router took no items.
    stepped_down: bool,
}

/// The outcome of a poll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PollResult {
    /// No changes.
    Nothing,
    /// Fewer changes than a batch.
    Some,
    /// A full batch or more: poll again at once.
    Full,
    /// The receiver is closed.
    Closed,
}

impl<'a> PollLoop<'a> {
    pub(super) fn new(
        source: &'a ChangeSource,
        changelog: Changelog,
        doorbell: Doorbell,
        position: &'a mut SourcePosition,
        items: &'a Sender<FeedItem>,
    ) -> Self {
        let now = Instant::now();
        let (unsent, stepped_down) = (false, false);
        Self {
            source,
            changelog,
            doorbell,
            position,
            items,
            last_sent: now,
            unsent,
            last_poll: now,
            stepped_down,
        }
    }

    /// Waits to become the leader, then alternates between polling and sleeping. Returns `Ok` when the receiver is
    /// closed, as all loops here.
    pub(super) async fn run_with_notifications(&mut self) -> Result<(), Error> {
        if self.follow_until_leader().await?.is_closed() {
            return Ok(());
        }
        loop {
            if self.poll_awake().await?.is_closed() || self.wait_asleep().await?.is_closed() {
                return Ok(());
            }
        }
    }

    /// Waits to become the leader, then polls for itself and its followers. Writers do not ring.
    pub(super) async fn poll_as_leader(&mut self) -> Result<(), Error> {
        if self.follow_until_leader().await?.is_closed() {
            return Ok(());
        }
        self.poll_only().await
    }

    /// Polls without being rung. Jobs may not be heard, either, and are looked at from time to time.
    pub(super) async fn poll_only(&mut self) -> Result<(), Error> {
        let mut pause = POLL_PAUSE;
        let mut last_jobs = Instant::now();
        loop {
            if last_jobs.elapsed() >= JOBS_INTERVAL {
                last_jobs = Instant::now();
                self.source.jobs.send_replace(());
            }
            self.forward_jobs();
            match self.poll(Flush::WithWriters).await? {
                PollResult::Closed => return Ok(()),
                PollResult::Full => pause = POLL_PAUSE,
                PollResult::Some => {
                    pause = POLL_PAUSE;
                    tokio::time::sleep(pause).await;
                }
                PollResult::Nothing => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(MAX_POLL_PAUSE);
                }
            }
        }
    }

    /// Polls when the leader rings, until this relay becomes the leader.
    async fn follow_until_leader(&mut self) -> Result<PollResult, Error> {
        if self.try_lead().await? {
            return Ok(PollResult::Nothing);
        }
        self.doorbell.follow().await?;
        tracing::info!("standby, another relay leads");
        let (mut last_try, mut rung, mut max_wait) = (Instant::now(), true, self.source.poll);
        loop {
            let found = self.poll_to_end(Flush::WithWriters).await?;
            match found {
                PollResult::Closed => return Ok(PollResult::Closed),
                // Any database user may take the leader's lock, so a leader that does not ring is not relied on.
                PollResult::Some if !rung => {
                    self.source.observe.found_by_polling();
                    max_wait = max_wait.min(MAX_POLL_PAUSE);
                }
                _ if rung => max_wait = self.source.poll,
                _ => {}
            }
            // Checked between rings too: under many rings in a row the leader may have changed.
            loop {
                if last_try.elapsed() >= LEAD_RETRY {
                    last_try = Instant::now();
                    if self.try_lead().await? {
                        // Changes since the last leader's end are found by polling while awake.
                        self.source.jobs.send_replace(());
                        return Ok(PollResult::Nothing);
                    }
                }
                let wait = LEAD_RETRY.saturating_sub(last_try.elapsed());
                let wait = wait.min(max_wait.saturating_sub(self.last_poll.elapsed()));
                rung = self.wait_for_ring(wait).await?.is_some();
                if rung || self.last_poll.elapsed() >= max_wait {
                    break;
                }
            }
        }
    }

    async fn try_lead(&mut self) -> Result<bool, Error> {
        let leads = self.doorbell.try_lead().await?;
        if leads {
            tracing::info!("elected leader");
            self.source.observe.leads(true);
        }
        Ok(leads)
    }

    /// Polls until a page is not full.
    async fn poll_to_end(&mut self, mode: Flush) -> Result<PollResult, Error> {
        let mut found = PollResult::Nothing;
        loop {
            match self.poll(mode).await? {
                PollResult::Full => found = PollResult::Some,
                PollResult::Nothing => return Ok(found),
                last => return Ok(last),
            }
        }
    }

    /// Waits for rings; `None` on timeout.
    async fn wait_for_ring(&mut self, wait: Duration) -> Result<Option<Rings>, Error> {
        let Ok(rung) = timeout(wait, self.doorbell.rung()).await else { return Ok(None) };
        let rings = rung.ok_or(Error::Lost("the listening connection ended"))?;
        if rings.jobs {
            self.source.jobs.send_replace(());
        }
        self.source.observe.rung(rings.count);
        Ok(Some(rings))
    }

    /// Polls until there are no changes and every writer that did not ring is done.
    async fn poll_awake(&mut self) -> Result<PollResult, Error> {
        let mut found = Instant::now();
        loop {
            self.forward_jobs();
            match self.poll(Flush::WithWriters).await? {
                PollResult::Closed => return Ok(PollResult::Closed),
                PollResult::Full => found = Instant::now(),
                PollResult::Some => {
                    found = Instant::now();
                    tokio::time::sleep(POLL_PAUSE).await;
                }
                PollResult::Nothing if found.elapsed() < IDLE => tokio::time::sleep(POLL_PAUSE).await,
                PollResult::Nothing => {
                    if self.doorbell.try_sleep().await? {
                        return Ok(PollResult::Nothing);
                    }
                    tokio::time::sleep(SLEEP_RETRY).await;
                }
            }
        }
    }

    /// Holds the doorbell lock, so every writer rings. Polls once for writers that began before, then once per ring.
    async fn wait_asleep(&mut self) -> Result<PollResult, Error> {
        self.source.observe.asleep();
        if self.poll_to_end(Flush::AtOnce).await?.is_closed() {
            return Ok(PollResult::Closed);
        }
        let mut burst = Instant::now();
        let mut count = 0;
        let mut last_heard = Instant::now();
        loop {
            let wait = (self.source.poll.saturating_sub(self.last_poll.elapsed()))
                .min(PROBE.saturating_sub(last_heard.elapsed()));
            let Some(rings) = self.wait_for_ring(wait).await? else {
                if last_heard.elapsed() >= PROBE {
                    if !self.doorbell.is_heard(self.changelog.client()).await? {
                        return Err(Error::Lost("notifications do not arrive any more"));
                    }
                    last_heard = Instant::now();
                }
                match self.poll_to_end(Flush::AtOnce).await? {
                    PollResult::Closed => return Ok(PollResult::Closed),
                    PollResult::Nothing => {}
                    PollResult::Some | PollResult::Full => self.source.observe.found_by_polling(),
                }
                continue;
            };
            if burst.elapsed() > BURST {
                burst = Instant::now();
                count = 0;
            }
            count += rings.count;
            if count >= BURST_RINGS {
                self.doorbell.wake().await?;
                self.source.observe.awake();
                return Ok(PollResult::Some);
            }
            if self.poll_to_end(Flush::AtOnce).await?.is_closed() {
                return Ok(PollResult::Closed);
            }
        }
    }

    /// Forwards a ring about materialized views or collections, which would be lost while polling.
    fn forward_jobs(&mut self) {
        if self.doorbell.jobs() {
            self.source.jobs.send_replace(());
        }
    }

    /// Reads one page and sends it in batches. The position moves with each batch sent.
    async fn poll(&mut self, mode: Flush) -> Result<PollResult, Error> {
        let found = self.read_page(mode).await?;
        match self.stepped_down {
            false => Ok(found),
            true => Err(Error::Lost("policies could not be evaluated for long, gave up the lead")),
        }
    }

    async fn read_page(&mut self, mode: Flush) -> Result<PollResult, Error> {
        let since_last_poll = std::mem::replace(&mut self.last_poll, Instant::now()).elapsed();
        let resumed = self.position.page.until.is_some();
        let (mut page, span) = self.open_page().await?;
        let (mut total, mut page_continues, mut batches) = (0, false, 0);
        let mut unflushed = page.unflushed.take();
        loop {
            let (changes, more) = self.source.await_changelog(page.part(BATCH_CHANGES, BATCH_BYTES)).await?;
            let Some(last) = changes.last().map(|change| change.number) else {
                self.source.stall_monitor.record_read();
                break;
            };
            // Changes trimmed before they were read would be missing in the page. While the page is open, nothing
            // more can be trimmed.
            if total == 0
                && since_last_poll > TRIM_CHECK_AFTER
                && let Some(result) = self.skip_trimmed(&span.seen).await?
            {
                return Ok(result);
            }
            if let Some(through) = unflushed.take() {
                self.source.await_changelog(self.source.flush(mode, &through)).await?;
            }
            let first = total == 0;
            if first {
                self.source.observe.page_read(self.last_poll.elapsed());
            }
            total += changes.len();
            page_continues = more;
            if !self.send_batch(changes, more, &span, page.mark).await? {
                return Ok(PollResult::Closed);
            }
            self.position.page.until = Some(span.until.clone());
            self.position.page.after = last;
            if first {
                self.doorbell.notify_followers(true).await?;
            }
            if !more {
                break;
            }
            batches += 1;
            if batches == LARGE_PAGE_BATCHES {
                return self.send_rest(&span, last).await;
            }
        }
        // Without the flush, a transaction id counted as finished here could be assigned again after a crash. So an
        // empty page moves the position only when it needs no flush.
        if unflushed.is_none() && !self.end_page(&span, page_continues, total == 0).await {
            return Ok(PollResult::Closed);
        }
        self.doorbell.notify_followers(false).await?;
        Ok(match total {
            // This was the end of an interrupted page; newer changes are on the next one.
            _ if resumed => PollResult::Full,
            0 => PollResult::Nothing,
            _ if total < BATCH_CHANGES => PollResult::Some,
            _ => PollResult::Full,
        })
    }

    /// Opens the page that begins at the position.
    async fn open_page(&self) -> Result<(Page, Arc<Span>), Error> {
        let scope = Arc::clone(&self.source.scope.borrow());
        let opening = self.changelog.open(&self.position.page, LARGE_PAGE_BATCHES * BATCH_CHANGES, &scope);
        let page = self.source.await_changelog(opening).await?;
        let (epoch, seen) = (self.position.epoch, self.position.page.seen.clone());
        let span = Arc::new(Span { epoch, seen, until: page.until.clone() });
        Ok((page, span))
    }

    /// Sends changes of a page as a batch; false when the receiver is closed. `more`: the page continues after them.
    async fn send_batch(
        &mut self,
        mut changes: Vec<Change>,
        more: bool,
        span: &Arc<Span>,
        mark: Option<i64>,
    ) -> Result<bool, Error> {
        self.source.observe.read(changes.len());
        log_unsent(&changes);
        let completed = self.source.access.transactions.complete(span.epoch, &mut changes, !more);
        let unfinished = self.source.await_changelog(completed).await?;
        let batch = Batch { changes, unfinished, more, span: Arc::clone(span), mark };
        if !self.send(FeedItem::Changes(Arc::new(batch))).await {
            return Ok(false);
        }
        self.source.stall_monitor.record_read();
        self.last_sent = Instant::now();
        Ok(true)
    }

    /// Skips to the horizon, with a gap, if changes after `seen` were trimmed.
    async fn skip_trimmed(&mut self, seen: &Snapshot) -> Result<Option<PollResult>, Error> {
        let horizon = self.source.await_changelog(self.source.horizon()).await?;
        if horizon.is_before_or_equal(seen) {
            return Ok(None);
        }
        self.position.page = PagePosition::after(horizon);
        let why = "changes were trimmed before they could be delivered, read the rows again";
        let is_taken = self.send(FeedItem::Gap(String::from(why))).await;
        Ok(Some(if is_taken { PollResult::Full } else { PollResult::Closed }))
    }

    /// Moves the position to the end of the page, and sends it when it is due; false when the receiver is closed.
    async fn end_page(&mut self, span: &Span, was_continued: bool, is_empty: bool) -> bool {
        self.position.page = PagePosition::after(span.until.clone());
        self.unsent = was_continued || (is_empty && (self.unsent || span.seen != span.until));
        // Announce the end of the page at once if the last batch said that it continues.
        let is_due = self.unsent && self.last_sent.elapsed() > POSITION_INTERVAL;
        if !was_continued && !is_due {
            return true;
        }
        self.last_sent = Instant::now();
        self.unsent = false;
        self.send(FeedItem::Moved(span.end())).await
    }

    /// Sends an item; false when the receiver is closed. While the router takes nothing for long because policies
    /// cannot be evaluated, gives up the lead: another relay may be able to evaluate them, and a blocked leader rings
    /// for no follower.
    async fn send(&mut self, item: FeedItem) -> bool {
        let items = self.items;
        let mut room = pin!(items.reserve());
        let room = loop {
            match timeout(self.source.access.query_timeout, &mut room).await {
                Ok(room) => break room,
                Err(_) if self.doorbell.has_followers() => {
                    // If this fails, the connection fails too, which ends the page.
                    let _ = self.doorbell.step_down().await;
                    self.source.observe.leads(false);
                    self.stepped_down = true;
                }
                Err(_) => {}
            }
        };
        room.map(|room| room.send(item)).is_ok()
    }

    /// Sends the rest of a large page as counts per relation, to be replayed to the subscribers it concerns.
    async fn send_rest(&mut self, span: &Arc<Span>, after: i64) -> Result<PollResult, Error> {
        // The old connection streams large rows: it would have to receive the unread ones first.
        self.changelog =
            Changelog::connect(&self.source.access.server, self.source.access.query_timeout).await?;
        let counts = self.changelog.counts(&span.seen, &span.until, after);
        let counts = self.source.await_changelog(counts).await?;
        self.position.page = PagePosition::after(span.until.clone());
        self.unsent = false;
        let rest = FeedItem::Rest { span: Arc::clone(span), after, counts };
        Ok(if self.send(rest).await { PollResult::Full } else { PollResult::Closed })
    }
}

/// Logs which broadcasts are not sent, and why. Their rows are named by the number in the changelog.
fn log_unsent(changes: &[Change]) {
    let unsent =
        changes.iter().filter_map(|change| Some((change.number, StoredBroadcast::of(change)?.err()?)));
    for (number, why) in unsent.filter(|(_, why)| *why != NotSent::AlreadySent) {
        tracing::warn!(number, "broadcast from the database not sent: {why}");
    }
}

impl PollResult {
    fn is_closed(&self) -> bool {
        matches!(self, Self::Closed)
    }
}
