//! Reads the changelog page after page, and decides when to poll and when to sleep until somebody rings.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use deadpool_postgres::Pool;
use tokio::sync::Notify;
use tokio::sync::mpsc::Sender;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::model::change::{Change, RelationId};
use crate::model::cursor::{Cursor, Epoch, Span};
use crate::observe::Observe;
use crate::postgres::changelog::{self, Changelog, Flush, Position};
use crate::postgres::connect::{Error, Server};
use crate::postgres::doorbell::{Doorbell, Ring};

/// A part of a page goes on at this many changes …
pub(super) const PART_CHANGES: usize = 250;
/// … or this many bytes of row images, whichever comes first. It bounds the memory of what is on its way, and its
/// frames must fit well into an empty outbox.
pub(super) const PART_BYTES: usize = 128 * 1024;

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
/// Without a bell (a pooler swallows it, or the database turned it off) the source polls, at most this slowly.
const DEAF: Duration = Duration::from_millis(100);
/// Asleep, the bell is rung by ourselves this often, to prove that it is still heard.
const PROBE: Duration = Duration::from_secs(30);

/// Trimming takes several looks after the changelog, so what was read a moment ago cannot be affected.
const TRIMMED: Duration = Duration::from_millis(100);
/// Where we are is told this often when there is nothing else to tell, so that cursors do not grow old.
const QUIET: Duration = Duration::from_secs(1);

/// What goes from the source to the router.
pub enum Part {
    /// Changes in the order of their numbers.
    Changes {
        /// They.
        changes: Vec<Change>,
        /// The page goes on: more comes at once.
        more: bool,
        /// The page.
        span: Arc<Span>,
    },
    /// The page goes on, but is too large for everybody to wait for it: who wants its rest reads that by itself.
    Rest {
        /// The page.
        span: Arc<Span>,
        /// The number of the last change that was handed on.
        after: i64,
        /// The relations of the others; 0 is the schema.
        relations: HashSet<RelationId>,
    },
    /// There was nothing for anybody up to here.
    Quiet(Cursor),
    /// Changes may be missing here and cannot be had any more; the text says why.
    Gap(String),
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
    /// What is counted.
    pub observe: Arc<Observe>,
    /// Told when the refresh schedule changed.
    pub refresh_jobs: Arc<Notify>,
}

/// Where the source stands; it outlives connections.
struct Place {
    epoch: Epoch,
    position: Position,
}

impl Source {
    /// Reads until the end, over any number of connections.
    pub async fn run(self, parts: Sender<Part>, end: CancellationToken) {
        let mut place = None;
        let mut pause = Duration::from_millis(50);
        loop {
            let started = Instant::now();
            let worked = tokio::select! {
                () = end.cancelled() => return,
                worked = self.work(&mut place, &parts) => worked,
            };
            self.observe.source_down();
            match worked {
                Ok(()) => return,
                Err(error) => {
                    if started.elapsed() > Duration::from_secs(5) {
                        pause = Duration::from_millis(50);
                    }
                    tracing::warn!(error = %error, pause_ms = pause.as_millis() as u64, "the feed is interrupted");
                }
            }
            tokio::select! {
                () = end.cancelled() => return,
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(Duration::from_secs(5)),
            }
        }
    }

    /// One connection's life. Ends well only when nobody takes parts any more.
    async fn work(&self, place: &mut Option<Place>, parts: &Sender<Part>) -> Result<(), Error> {
        let mut doorbell = Doorbell::connect(&self.bell).await?;
        let changelog = Changelog::connect(&self.server).await?;
        let epoch = changelog.epoch().await?;
        match place {
            // The files of an earlier moment, put back, have the same epoch but have not come as far yet.
            Some(known)
                if known.epoch == epoch
                    && known.position.is_reached_by(&changelog.now().await?)
                    && changelog::horizon(&self.pool).await?.is_before_or_equal(&known.position.seen) => {}
            Some(known) => {
                // Both or neither: if the start fails, the next try has to find the difference again.
                let position = self.start(&changelog).await?;
                *known = Place { epoch, position };
                let why = String::from(
                    "the database is another one, or an older state of it, or was away for too long, read the rows again",
                );
                if parts.send(Part::Gap(why)).await.is_err() {
                    return Ok(());
                }
            }
            None => {
                *place = Some(Place { epoch, position: self.start(&changelog).await? });
            }
        }
        let Some(place) = place else { return Ok(()) };
        if place.position.until.is_none() {
            let here = Cursor::after(place.epoch, place.position.seen.clone());
            if parts.send(Part::Quiet(here)).await.is_err() {
                return Ok(());
            }
        }
        let hears = if doorbell.is_off().await? {
            tracing::info!("relay.doorbell is off in this database: polling");
            false
        } else if doorbell.is_heard().await? {
            true
        } else {
            tracing::warn!(
                "the doorbell is not heard (a pooler in between?): polling; give a direct --doorbell-url"
            );
            false
        };
        self.observe.source_up(hears);
        let mut reading = Reading {
            source: self,
            changelog,
            place,
            parts,
            told: Instant::now(),
            unheard: false,
            looked: Instant::now(),
        };
        if hears { reading.by_bell(&mut doorbell).await } else { reading.by_polling(&mut doorbell).await }
    }

    /// The position of this moment, safe from a crash.
    async fn start(&self, changelog: &Changelog) -> Result<Position, Error> {
        let now = changelog.now().await?;
        self.flush(Flush::AtOnce).await?;
        Ok(Position::after(now))
    }

    /// What a crash could take back is never shown: waits until everything up to now is flushed.
    async fn flush(&self, how: Flush) -> Result<(), Error> {
        let started = Instant::now();
        changelog::flush(&self.pool, how).await?;
        self.observe.flushed(started.elapsed());
        Ok(())
    }
}

/// The source while its connections hold.
struct Reading<'a> {
    source: &'a Source,
    changelog: Changelog,
    place: &'a mut Place,
    parts: &'a Sender<Part>,
    /// When somebody last heard where we are.
    told: Instant,
    /// The position moved since, with nothing to tell.
    unheard: bool,
    /// When the last look at the changelog began; handing on what it found may have taken long.
    looked: Instant,
}

/// What a look at the changelog found.
enum Look {
    /// Nothing new.
    Nothing,
    /// Some changes.
    Some,
    /// More than a part: look again at once.
    Plenty,
    /// Nobody takes parts any more.
    Over,
}

impl Reading<'_> {
    async fn by_bell(&mut self, doorbell: &mut Doorbell) -> Result<(), Error> {
        loop {
            if self.awake(doorbell).await?.is_over() || self.asleep(doorbell).await?.is_over() {
                return Ok(());
            }
        }
    }

    /// Polls until it is quiet and every writer that did not ring is done.
    async fn awake(&mut self, doorbell: &mut Doorbell) -> Result<Look, Error> {
        let mut found = Instant::now();
        loop {
            self.pass_on(doorbell);
            match self.look(Flush::WithWriters).await? {
                Look::Over => return Ok(Look::Over),
                Look::Plenty => found = Instant::now(),
                Look::Some => {
                    found = Instant::now();
                    tokio::time::sleep(POLL).await;
                }
                Look::Nothing if found.elapsed() < IDLE => tokio::time::sleep(POLL).await,
                Look::Nothing => {
                    if doorbell.try_sleep().await? {
                        return Ok(Look::Nothing);
                    }
                    tokio::time::sleep(CALM).await;
                }
            }
        }
    }

    /// Holds the lock, so everybody rings: looks once for those who came before, then once per ring.
    async fn asleep(&mut self, doorbell: &mut Doorbell) -> Result<Look, Error> {
        self.source.observe.asleep();
        if self.look(Flush::AtOnce).await?.is_over() {
            return Ok(Look::Over);
        }
        let mut rush = Instant::now();
        let mut rings = 0;
        loop {
            let wait = self.source.poll.min(PROBE);
            let Ok(rung) = timeout(wait, doorbell.rung()).await else {
                if wait == PROBE && !doorbell.is_heard().await? {
                    return Err(Error::Unfit(String::from("the doorbell is not heard any more")));
                }
                match self.look(Flush::AtOnce).await? {
                    Look::Over => return Ok(Look::Over),
                    Look::Nothing => {}
                    Look::Some | Look::Plenty => self.source.observe.found_by_polling(),
                }
                continue;
            };
            let count =
                match rung.ok_or_else(|| Error::Unfit(String::from("the listening connection ended")))? {
                    Ring::Changes(count) => count,
                    Ring::RefreshJobs => {
                        self.source.refresh_jobs.notify_one();
                        1
                    }
                };
            self.source.observe.rung(count);
            if rush.elapsed() > RUSH {
                rush = Instant::now();
                rings = 0;
            }
            rings += count;
            if rings >= RUSH_RINGS {
                doorbell.wake().await?;
                self.source.observe.awake();
                return Ok(Look::Some);
            }
            if self.look(Flush::AtOnce).await?.is_over() {
                return Ok(Look::Over);
            }
        }
    }

    async fn by_polling(&mut self, doorbell: &mut Doorbell) -> Result<(), Error> {
        let mut pause = POLL;
        loop {
            self.pass_on(doorbell);
            match self.look(Flush::WithWriters).await? {
                Look::Over => return Ok(()),
                Look::Plenty => pause = POLL,
                Look::Some => {
                    pause = POLL;
                    tokio::time::sleep(pause).await;
                }
                Look::Nothing => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(DEAF);
                }
            }
        }
    }

    /// Awake, nobody waits for rings; one about the refresh schedule must count all the same.
    fn pass_on(&self, doorbell: &mut Doorbell) {
        if doorbell.refresh_jobs() {
            self.source.refresh_jobs.notify_one();
        }
    }

    /// Reads one page and hands it on in parts. The position moves with what was handed on.
    async fn look(&mut self, how: Flush) -> Result<Look, Error> {
        let slept = std::mem::replace(&mut self.looked, Instant::now()).elapsed();
        let mut page = self.changelog.open(&self.place.position).await?;
        let until = page.until.clone();
        let seen = self.place.position.seen.clone();
        let span = Arc::new(Span { epoch: self.place.epoch, seen, until: until.clone() });
        let (mut total, mut goes_on, mut parts) = (0, false, 0);
        let mut flushed = !page.unflushed;
        loop {
            let (changes, more) = page.part(PART_CHANGES, PART_BYTES).await?;
            let Some(last) = changes.last().map(|change| change.number) else {
                break;
            };
            // What was trimmed before it was read would be missing in the page. While the page is open nothing more can be.
            if total == 0 && slept > TRIMMED {
                let horizon = changelog::horizon(&self.source.pool).await?;
                if !horizon.is_before_or_equal(&span.seen) {
                    self.place.position = Position::after(horizon);
                    let why =
                        String::from("changes were trimmed before they could be told, read the rows again");
                    let over = self.parts.send(Part::Gap(why)).await.is_err();
                    return Ok(if over { Look::Over } else { Look::Plenty });
                }
            }
            if !flushed {
                self.source.flush(how).await?;
                flushed = true;
            }
            total += changes.len();
            goes_on = more;
            self.source.observe.read(changes.len());
            let part = Part::Changes { changes, more, span: Arc::clone(&span) };
            if self.parts.send(part).await.is_err() {
                return Ok(Look::Over);
            }
            self.told = Instant::now();
            self.place.position.until = Some(until.clone());
            self.place.position.after = last;
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
        if flushed {
            self.place.position = Position::after(until);
            self.unheard = goes_on || (total == 0 && (self.unheard || span.seen != span.until));
            // Whoever was told that a page goes on is told at once that it does not.
            if goes_on || (self.unheard && self.told.elapsed() > QUIET) {
                self.told = Instant::now();
                self.unheard = false;
                if self.parts.send(Part::Quiet(span.end())).await.is_err() {
                    return Ok(Look::Over);
                }
            }
        }
        Ok(match total {
            0 => Look::Nothing,
            _ if total < PART_CHANGES => Look::Some,
            _ => Look::Plenty,
        })
    }
}

impl Reading<'_> {
    /// Leaves the rest of a page to whom it concerns.
    async fn hand_over_rest(&mut self, span: &Arc<Span>, after: i64) -> Result<Look, Error> {
        // On the connection that streams the page, all of it would have to come first.
        self.changelog = Changelog::connect(&self.source.server).await?;
        let relations = self.changelog.relations(&span.seen, &span.until, after).await?;
        self.place.position = Position::after(span.until.clone());
        self.unheard = false;
        let rest = Part::Rest { span: Arc::clone(span), after, relations };
        Ok(if self.parts.send(rest).await.is_err() { Look::Over } else { Look::Plenty })
    }
}

impl Look {
    fn is_over(&self) -> bool {
        matches!(self, Self::Over)
    }
}
