//! Reads the changelog page after page while its connections hold, and decides when to poll, and when to sleep until
//! somebody rings: writers for the leader, the leader for its deputies.

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

/// After so many parts a page is large: everybody waits for them, and no longer.
const PARTS: usize = 16;

/// Awake, the pause after a page that was not full: the added wait stays under a millisecond or two, the load on
/// PostgreSQL under a few hundred small statements a second.
const POLL: Duration = Duration::from_millis(2);
/// Awake without finding anything for this long, the source tries to sleep.
const IDLE: Duration = Duration::from_millis(30);
/// The pause between two tries to sleep while a writer that did not ring is in flight.
const CALM: Duration = Duration::from_millis(10);
/// This many rings within [`RUSH`] end the sleep: at a few hundred commits a second polling is cheaper for writers.
const RUSH_RINGS: usize = 6;
/// See [`RUSH_RINGS`].
const RUSH: Duration = Duration::from_millis(20);
/// Without a bell (a pooler swallows it, the database turned it off, whoever leads does not ring) the source polls, at
/// most this slowly.
const DEAF: Duration = Duration::from_millis(100);
/// Asleep, the bell is rung by ourselves this often, to prove that it is still heard.
const PROBE: Duration = Duration::from_secs(10);
/// A deputy tries this often to lead, so that it does within half a second when the leader is gone.
const SUCCEED: Duration = Duration::from_millis(400);

/// Trimming takes several looks after the changelog, so what was read a moment ago cannot be affected.
const TRIMMED: Duration = Duration::from_millis(100);
/// Where we are is told this often when there is nothing else to tell, so that cursors do not grow old.
const QUIET: Duration = Duration::from_secs(1);

/// The source while its connections hold.
pub(super) struct PollLoop<'a> {
    source: &'a Source,
    changelog: Changelog,
    doorbell: Doorbell,
    place: &'a mut SourcePosition,
    parts: &'a Sender<FeedItem>,
    /// When somebody last heard where we are.
    told: Instant,
    /// The position moved since, with nothing to tell.
    unheard: bool,
    /// When the last look at the changelog began; handing on what it found may have taken long.
    looked: Instant,
    /// It led, and let another lead while nobody took what it read.
    stepped_down: bool,
}

/// What a look at the changelog found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PollResult {
    /// Nothing new.
    Nothing,
    /// Some changes.
    Some,
    /// More than a part: look again at once.
    Plenty,
    /// Nobody takes parts any more.
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

    /// Sleeps when nothing happens, once it leads. Ends well, as all of these, when nobody takes parts any more.
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

    /// Polls for itself and its deputies, once it leads: writers do not ring.
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

    /// Looks when the leader rings, until this relay leads itself.
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
                // Anybody in the database may take the leader's lock: who does not ring is not relied on.
                PollResult::Some if !rung => {
                    self.source.observe.found_by_polling();
                    poll = poll.min(DEAF);
                }
                _ if rung => poll = self.source.poll,
                _ => {}
            }
            // Asked and not only waited for: under many rings in a row the leader may be another one by now.
            loop {
                if tried.elapsed() >= SUCCEED {
                    tried = Instant::now();
                    if self.try_lead().await? {
                        // Whatever happened since the other's end has to be looked for; being awake does.
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

    /// Looks until a page is not full.
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

    /// What was rung, if anything was in time.
    async fn rung_within(&mut self, wait: Duration) -> Result<Option<Rings>, Error> {
        let Ok(rung) = timeout(wait, self.doorbell.rung()).await else { return Ok(None) };
        let rings = rung.ok_or(Error::Lost("the listening connection ended"))?;
        if rings.refresh_jobs {
            self.source.refresh_jobs.notify_one();
        }
        self.source.observe.rung(rings.count);
        Ok(Some(rings))
    }

    /// Polls until it is quiet and every writer that did not ring is done.
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

    /// Holds the lock, so everybody rings: looks once for those who came before, then once per ring.
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

    /// Awake, nobody waits for rings; one about the refresh schedule must count all the same.
    fn pass_on(&mut self) {
        if self.doorbell.refresh_jobs() {
            self.source.refresh_jobs.notify_one();
        }
    }

    /// Reads one page and hands it on in parts. The position moves with what was handed on.
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
            // What was trimmed before it was read would be missing in the page. While the page is open nothing more can be.
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
        // Without the flush an id counted as finished here could be handed out again after a crash, so an empty page
        // moves the position only when it is safe by itself.
        if unflushed.is_none() {
            self.place.position = PagePosition::after(until);
            self.unheard = goes_on || (total == 0 && (self.unheard || span.seen != span.until));
            // Whoever was told that a page goes on is told at once that it does not.
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
            // The end of a page that an interruption cut short; what came since is on the next.
            _ if resumed => PollResult::Plenty,
            0 => PollResult::Nothing,
            _ if total < PART_CHANGES => PollResult::Some,
            _ => PollResult::Plenty,
        })
    }

    /// False when nobody takes parts any more. While nothing is taken for long, because policies cannot be judged, another
    /// relay may be able to: it is to lead, since who waits here rings for nobody.
    async fn hand_on(&mut self, part: FeedItem) -> bool {
        let parts = self.parts;
        let mut room = pin!(parts.reserve());
        let room = loop {
            match timeout(self.source.patience, &mut room).await {
                Ok(room) => break room,
                Err(_) if self.doorbell.has_followers() => {
                    // Where this fails the connection does, which ends with the page.
                    let _ = self.doorbell.step_down().await;
                    self.source.observe.leads(false);
                    self.stepped_down = true;
                }
                Err(_) => {}
            }
        };
        room.map(|room| room.send(part)).is_ok()
    }

    /// Leaves the rest of a page to whom it concerns.
    async fn hand_over_rest(&mut self, span: &Arc<Span>, after: i64) -> Result<PollResult, Error> {
        // On the connection that streams large rows, those that were not looked at would have to come first.
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
