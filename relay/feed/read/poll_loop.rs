//! Reads the changelog page by page while its connections hold. Decides when to poll and when to sleep until the
//! doorbell rings: writers ring for the leader, the leader rings for its followers.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::Sender;
use tokio::time::timeout;

use crate::feed::read::batch::Batch;
use crate::feed::read::source::{FeedItem, PART_BYTES, PART_CHANGES, Source, SourcePosition};
use crate::model::log::cursor::Span;
use crate::postgres::changelog::doorbell::{Doorbell, Rings};
use crate::postgres::changelog::reader::{Changelog, Flush, PagePosition};
use crate::postgres::connect::pool::Error;

/// Batches after which a page counts as large: its rest is replayed to the subscribers it concerns, instead of
/// delaying the others.
const PARTS: usize = 16;

/// Pause after a page that was not full, while awake. Adds at most one or two milliseconds of latency and costs
/// PostgreSQL at most a few hundred small statements a second.
const POLL: Duration = Duration::from_millis(2);
/// Time awake without changes after which the source tries to sleep.
const IDLE: Duration = Duration::from_millis(30);
/// Pause between two attempts to sleep while a writer that did not ring is in flight.
const CALM: Duration = Duration::from_millis(10);
/// Rings within [`BURST`] that end the sleep: at a few hundred commits a second, polling is cheaper for writers.
const RUSH_RINGS: usize = 6;
/// See [`BURST_RINGS`].
const RUSH: Duration = Duration::from_millis(20);
/// Longest pause between polls when the doorbell does not work: a pooler swallows it, the database turned it off, or
/// the leader does not ring.
const DEAF: Duration = Duration::from_millis(100);
/// While asleep, the source rings the doorbell itself this often, to check that it is still heard.
const PROBE: Duration = Duration::from_secs(10);
/// A follower tries this often to become the leader, so that one takes over within half a second.
const SUCCEED: Duration = Duration::from_millis(400);

/// Pages read within this time after the last poll cannot have been trimmed: trimming looks at the changelog several
/// times first.
const TRIMMED: Duration = Duration::from_millis(100);
/// The position is sent this often when there are no changes, so that cursors do not grow old.
const QUIET: Duration = Duration::from_secs(1);

/// The state of the source while its connections hold.
pub(super) struct PollLoop<'a> {
    source: &'a Source,
    changelog: Changelog,
    doorbell: Doorbell,
    place: &'a mut SourcePosition,
    parts: &'a Sender<FeedItem>,
    /// When the position was sent last.
    told: Instant,
    /// The position has moved since, without changes.
    unheard: bool,
    /// When the last poll began. Sending its batches may have taken long.
    looked: Instant,
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
    Plenty,
    /// The receiver is closed.
    Over,
}

impl<'a> PollLoop<'a> {
    pub(super) fn new(
        source: &'a Source,
        changelog: Changelog,
        doorbell: Doorbell,
        place: &'a mut SourcePosition,
        parts: &'a Sender<FeedItem>,
    ) -> Self {
        let now = Instant::now();
        let (unheard, stepped_down) = (false, false);
        Self { source, changelog, doorbell, place, parts, told: now, unheard, looked: now, stepped_down }
    }

    /// Waits to become the leader, then alternates between polling and sleeping. Returns `Ok` when the receiver is
    /// closed, as all loops here.
    pub(super) async fn run_with_notifications(&mut self) -> Result<(), Error> {
        if self.until_leader().await?.is_over() {
            return Ok(());
        }
        loop {
            if self.awake().await?.is_over() || self.asleep().await?.is_over() {
                return Ok(());
            }
        }
    }

    /// Waits to become the leader, then polls for itself and its followers. Writers do not ring.
    pub(super) async fn poll_as_leader(&mut self) -> Result<(), Error> {
        if self.until_leader().await?.is_over() {
            return Ok(());
        }
        self.poll_alone().await
    }

    pub(super) async fn poll_alone(&mut self) -> Result<(), Error> {
        let mut pause = POLL;
        loop {
            self.pass_on();
            match self.look(Flush::WithWriters).await? {
                PollResult::Over => return Ok(()),
                PollResult::Plenty => pause = POLL,
                PollResult::Some => {
                    pause = POLL;
                    tokio::time::sleep(pause).await;
                }
                PollResult::Nothing => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(DEAF);
                }
            }
        }
    }

    /// Polls when the leader rings, until this relay becomes the leader.
    async fn until_leader(&mut self) -> Result<PollResult, Error> {
        if self.try_lead().await? {
            return Ok(PollResult::Nothing);
        }
        self.doorbell.follow().await?;
        tracing::info!("another relay leads: this one is its deputy");
        let (mut tried, mut rung, mut poll) = (Instant::now(), true, self.source.poll);
        loop {
            let found = self.look_to_the_end(Flush::WithWriters).await?;
            match found {
                PollResult::Over => return Ok(PollResult::Over),
                // Any database user may take the leader's lock, so a leader that does not ring is not relied on.
                PollResult::Some if !rung => {
                    self.source.observe.found_by_polling();
                    poll = poll.min(DEAF);
                }
                _ if rung => poll = self.source.poll,
                _ => {}
            }
            // Checked between rings too: under many rings in a row the leader may have changed.
            loop {
                if tried.elapsed() >= SUCCEED {
                    tried = Instant::now();
                    if self.try_lead().await? {
                        // Changes since the last leader's end are found by polling while awake.
                        self.source.refresh_jobs.notify_one();
                        return Ok(PollResult::Nothing);
                    }
                }
                let wait = SUCCEED.saturating_sub(tried.elapsed());
                let wait = wait.min(poll.saturating_sub(self.looked.elapsed()));
                rung = self.rung_within(wait).await?.is_some();
                if rung || self.looked.elapsed() >= poll {
                    break;
                }
            }
        }
    }

    async fn try_lead(&mut self) -> Result<bool, Error> {
        let leads = self.doorbell.try_lead().await?;
        if leads {
            tracing::info!("this relay leads: it is the one that writers ring");
            self.source.observe.leads(true);
        }
        Ok(leads)
    }

    /// Polls until a page is not full.
    async fn look_to_the_end(&mut self, how: Flush) -> Result<PollResult, Error> {
        let mut found = PollResult::Nothing;
        loop {
            match self.look(how).await? {
                PollResult::Plenty => found = PollResult::Some,
                PollResult::Nothing => return Ok(found),
                last => return Ok(last),
            }
        }
    }

    /// Waits for rings; `None` on timeout.
    async fn rung_within(&mut self, wait: Duration) -> Result<Option<Rings>, Error> {
        let Ok(rung) = timeout(wait, self.doorbell.rung()).await else { return Ok(None) };
        let rings = rung.ok_or(Error::Lost("the listening connection ended"))?;
        if rings.refresh_jobs {
            self.source.refresh_jobs.notify_one();
        }
        self.source.observe.rung(rings.count);
        Ok(Some(rings))
    }

    /// Polls until there are no changes and every writer that did not ring is done.
    async fn awake(&mut self) -> Result<PollResult, Error> {
        let mut found = Instant::now();
        loop {
            self.pass_on();
            match self.look(Flush::WithWriters).await? {
                PollResult::Over => return Ok(PollResult::Over),
                PollResult::Plenty => found = Instant::now(),
                PollResult::Some => {
                    found = Instant::now();
                    tokio::time::sleep(POLL).await;
                }
                PollResult::Nothing if found.elapsed() < IDLE => tokio::time::sleep(POLL).await,
                PollResult::Nothing => {
                    if self.doorbell.try_sleep().await? {
                        return Ok(PollResult::Nothing);
                    }
                    tokio::time::sleep(CALM).await;
                }
            }
        }
    }

    /// Holds the doorbell lock, so every writer rings. Polls once for writers that began before, then once per ring.
    async fn asleep(&mut self) -> Result<PollResult, Error> {
        self.source.observe.asleep();
        if self.look_to_the_end(Flush::AtOnce).await?.is_over() {
            return Ok(PollResult::Over);
        }
        let mut rush = Instant::now();
        let mut count = 0;
        let mut heard = Instant::now();
        loop {
            let wait = (self.source.poll.saturating_sub(self.looked.elapsed()))
                .min(PROBE.saturating_sub(heard.elapsed()));
            let Some(rings) = self.rung_within(wait).await? else {
                if heard.elapsed() >= PROBE {
                    if !self.doorbell.is_heard(self.changelog.client()).await? {
                        return Err(Error::Lost("the doorbell is not heard any more"));
                    }
                    heard = Instant::now();
                }
                match self.look_to_the_end(Flush::AtOnce).await? {
                    PollResult::Over => return Ok(PollResult::Over),
                    PollResult::Nothing => {}
                    PollResult::Some | PollResult::Plenty => self.source.observe.found_by_polling(),
                }
                continue;
            };
            if rush.elapsed() > RUSH {
                rush = Instant::now();
                count = 0;
            }
            count += rings.count;
            if count >= RUSH_RINGS {
                self.doorbell.wake().await?;
                self.source.observe.awake();
                return Ok(PollResult::Some);
            }
            if self.look_to_the_end(Flush::AtOnce).await?.is_over() {
                return Ok(PollResult::Over);
            }
        }
    }

    /// Forwards a ring about the refresh schedule, which would be lost while polling.
    fn pass_on(&mut self) {
        if self.doorbell.refresh_jobs() {
            self.source.refresh_jobs.notify_one();
        }
    }

    /// Reads one page and sends it in batches. The position moves with each batch sent.
    async fn look(&mut self, how: Flush) -> Result<PollResult, Error> {
        let found = self.read_page(how).await?;
        match self.stepped_down {
            false => Ok(found),
            true => Err(Error::Lost("what was read could not be judged for long, so another relay leads")),
        }
    }

    async fn read_page(&mut self, how: Flush) -> Result<PollResult, Error> {
        let slept = std::mem::replace(&mut self.looked, Instant::now()).elapsed();
        let resumed = self.place.position.until.is_some();
        let scope = Arc::clone(&self.source.scope.borrow());
        let mut page =
            self.source.page(self.changelog.open(&self.place.position, PARTS * PART_CHANGES, &scope)).await?;
        let until = page.until.clone();
        let seen = self.place.position.seen.clone();
        let span = Arc::new(Span { epoch: self.place.epoch, seen, until: until.clone() });
        let (mut total, mut goes_on, mut parts) = (0, false, 0);
        let mut unflushed = page.unflushed.take();
        loop {
            let (mut changes, more) = self.source.page(page.part(PART_CHANGES, PART_BYTES)).await?;
            let Some(last) = changes.last().map(|change| change.number) else {
                self.source.stall_monitor.is_read();
                break;
            };
            // Changes trimmed before they were read would be missing in the page. While the page is open, nothing
            // more can be trimmed.
            if total == 0 && slept > TRIMMED {
                let horizon = self.source.page(self.source.horizon()).await?;
                if !horizon.is_before_or_equal(&span.seen) {
                    self.place.position = PagePosition::after(horizon);
                    let why =
                        String::from("changes were trimmed before they could be told, read the rows again");
                    let is_taken = self.hand_on(FeedItem::Gap(why)).await;
                    return Ok(if is_taken { PollResult::Plenty } else { PollResult::Over });
                }
            }
            if let Some(through) = unflushed.take() {
                self.source.page(self.source.flush(how, &through)).await?;
            }
            let first = total == 0;
            total += changes.len();
            goes_on = more;
            self.source.observe.read(changes.len());
            let completed = self.source.transactions.complete(span.epoch, &mut changes, !more);
            let unfinished = self.source.page(completed).await?;
            let batch = Batch { changes, unfinished, more, span: Arc::clone(&span), mark: page.mark };
            let part = FeedItem::Changes(Arc::new(batch));
            if !self.hand_on(part).await {
                return Ok(PollResult::Over);
            }
            self.source.stall_monitor.is_read();
            self.told = Instant::now();
            self.place.position.until = Some(until.clone());
            self.place.position.after = last;
            if first {
                self.doorbell.notify_followers(true).await?;
            }
            if !more {
                break;
            }
            parts += 1;
            if parts == PARTS {
                return self.hand_over_rest(&span, last).await;
            }
        }
        // Without the flush, a transaction id counted as finished here could be assigned again after a crash. So an
        // empty page moves the position only when it needs no flush.
        if unflushed.is_none() {
            self.place.position = PagePosition::after(until);
            self.unheard = goes_on || (total == 0 && (self.unheard || span.seen != span.until));
            // Announce the end of the page at once if the last batch said that it continues.
            if goes_on || (self.unheard && self.told.elapsed() > QUIET) {
                self.told = Instant::now();
                self.unheard = false;
                if !self.hand_on(FeedItem::Quiet(span.end())).await {
                    return Ok(PollResult::Over);
                }
            }
        }
        self.doorbell.notify_followers(false).await?;
        Ok(match total {
            // This was the end of an interrupted page; newer changes are on the next one.
            _ if resumed => PollResult::Plenty,
            0 => PollResult::Nothing,
            _ if total < PART_CHANGES => PollResult::Some,
            _ => PollResult::Plenty,
        })
    }

    /// Sends an item; false when the receiver is closed. While the router takes nothing for long because policies
    /// cannot be evaluated, gives up the lead: another relay may be able to evaluate them, and a blocked leader rings
    /// for no follower.
    async fn hand_on(&mut self, part: FeedItem) -> bool {
        let parts = self.parts;
        let mut room = pin!(parts.reserve());
        let room = loop {
            match timeout(self.source.patience, &mut room).await {
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
        room.map(|room| room.send(part)).is_ok()
    }

    /// Sends the rest of a large page as counts per relation, to be replayed to the subscribers it concerns.
    async fn hand_over_rest(&mut self, span: &Arc<Span>, after: i64) -> Result<PollResult, Error> {
        // The old connection streams large rows: it would have to receive the unread ones first.
        self.changelog = Changelog::connect(&self.source.server).await?;
        let counts = self.changelog.counts(&span.seen, &span.until, after);
        let counts = self.source.page(counts).await?;
        self.place.position = PagePosition::after(span.until.clone());
        self.unheard = false;
        let rest = FeedItem::Rest { span: Arc::clone(span), after, counts };
        Ok(if self.hand_on(rest).await { PollResult::Plenty } else { PollResult::Over })
    }
}

impl PollResult {
    fn is_over(&self) -> bool {
        matches!(self, Self::Over)
    }
}
