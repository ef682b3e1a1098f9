//! Somebody who comes with a cursor: first what was missed, from the changelog, then what is delivered to everybody.

use std::sync::Arc;
use std::time::{Duration, Instant};

use deadpool_postgres::Pool;
use tokio::sync::{Mutex, Semaphore, oneshot};
use tokio::time::sleep;

use crate::feed::audience::{ALTERED, Audience, AudienceKey};
use crate::feed::binding::Feed;
use crate::feed::gate::Gate;
use crate::feed::outbox::Outbox;
use crate::feed::router::{Command, Handover, Registration};
use crate::feed::source::{PART_BYTES, PART_CHANGES};
use crate::feed::stretch::{Stretch, tell_one};
use crate::model::cursor::{Cursor, Snapshot, Span};
use crate::model::dress::Dress;
use crate::model::relation::Catalog;
use crate::model::session::ChannelId;
use crate::model::subscription::Subscription;
use crate::postgres::catalog::CatalogKeeper;
use crate::postgres::changelog::{self, Changelog, Position};
use crate::postgres::connect::{Error, Server};

/// Readers of the past at a time: a storm of them queues here, and not at the database.
const AT_ONCE: usize = 4;
/// A connection is kept so long for the next reader.
const SPARE: Duration = Duration::from_secs(5);
/// The longest pause before the router is asked again whether it is ready.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// One reader's turn; a long past takes several.
const TURN: Duration = Duration::from_secs(2);

/// Reads the past for those who missed it.
pub struct Past {
    server: Server,
    pool: Pool,
    catalog: Arc<CatalogKeeper>,
    /// Apart from the gate of what happens now, which must not wait for the past.
    gate: Gate,
    turns: Semaphore,
    /// Connections whose last reader came to the end, and since when nobody has used them.
    spare: Mutex<Vec<(Changelog, Instant)>>,
    judged_with: Mutex<Option<Arc<Catalog>>>,
}

/// A channel that came with a cursor. It leaves when it is dropped.
pub struct Follower {
    feed: Feed,
    channel: ChannelId,
    subscription: Subscription,
    dress: Dress,
    since: Cursor,
    /// Where pieces arrive.
    pub outbox: Arc<Outbox>,
    /// The database was asked whether the cursor is of its future.
    is_known: bool,
    /// Delivery goes on without it.
    stays: bool,
}

/// How far a follower has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Everything missed is in the outbox, and what comes will be.
    Live,
    /// The outbox has so much that it is to be read first.
    More,
}

/// Why a cursor leads nowhere.
#[derive(Debug)]
pub enum Missed {
    /// What was missed cannot be had any more, and why: read the rows again.
    Gap(&'static str),
    /// The database cannot be asked now.
    Unavailable(Error),
}

impl From<Error> for Missed {
    fn from(error: Error) -> Self {
        Self::Unavailable(error)
    }
}

impl Past {
    /// Reads the changelog of `server`; `pool` is for questions while a page is open.
    pub fn new(server: Server, pool: Pool, catalog: Arc<CatalogKeeper>, gate: Gate) -> Self {
        Self {
            server,
            pool,
            catalog,
            gate,
            turns: Semaphore::new(AT_ONCE),
            spare: Mutex::default(),
            judged_with: Mutex::new(None),
        }
    }

    /// Whether the cursor is of a moment that has been, and whose changes are still there.
    async fn check(&self, cursor: &Cursor) -> Result<(), Missed> {
        let _turn = self.turns.acquire().await;
        let changelog = self.changelog().await?;
        let checked = self.check_with(&changelog, cursor).await;
        self.put_back(changelog).await;
        checked
    }

    /// The connection of a reader before, when many come one after the other; else a new one.
    async fn changelog(&self) -> Result<Changelog, Error> {
        let mut spare = self.spare.lock().await;
        spare.retain(|(changelog, since)| since.elapsed() < SPARE && changelog.is_open());
        let known = spare.pop();
        drop(spare);
        match known {
            Some((changelog, _)) => Ok(changelog),
            None => Changelog::connect(&self.server).await,
        }
    }

    /// Keeps a connection for the next reader. One on which a page was not read to its end is dropped instead: the rest
    /// of the page would still come.
    async fn put_back(&self, changelog: Changelog) {
        self.spare.lock().await.push((changelog, Instant::now()));
    }

    async fn check_with(&self, changelog: &Changelog, cursor: &Cursor) -> Result<(), Missed> {
        let now = changelog.now().await?;
        let reach = cursor.within().map_or(cursor.seen().xmax(), |within| within.until().xmax());
        match () {
            () if changelog.epoch().await? != cursor.epoch() => Err(Missed::Gap(ELSEWHERE)),
            () if reach > now.xmax() => Err(Missed::Gap("the cursor is of a moment that has not been")),
            () => self.check_kept(cursor.seen()).await,
        }
    }

    /// Whether everything after the snapshot is still there.
    async fn check_kept(&self, seen: &Snapshot) -> Result<(), Missed> {
        match changelog::horizon(&self.pool).await?.is_before_or_equal(seen) {
            true => Ok(()),
            false => Err(Missed::Gap(TOO_OLD)),
        }
    }

    /// What was planned with other rules is forgotten.
    async fn judge_with(&self, catalog: &Arc<Catalog>) {
        let mut judged_with = self.judged_with.lock().await;
        if !judged_with.as_ref().is_some_and(|last| Arc::ptr_eq(last, catalog)) {
            self.gate.forget().await;
            *judged_with = Some(Arc::clone(catalog));
        }
    }

    /// Tells an audience of one what was delivered to others a moment ago.
    async fn tell_again(&self, missed: &[Arc<Stretch>], audience: &Audience) -> Result<(), Missed> {
        let is_news = missed.iter().any(|stretch| stretch.more || stretch.is_news());
        let catalog = if is_news { self.catalog.reloaded().await? } else { self.catalog.fresh().await? };
        self.judge_with(&catalog).await;
        if audience.subscription().is_stale(&catalog) {
            return Err(Missed::Gap(ALTERED));
        }
        for stretch in missed {
            tell_one(&self.gate, &catalog, stretch, audience).await?;
        }
        Ok(())
    }

    /// Tells an audience of one what lies between two cursors; stops when its outbox has enough, or for others to have their
    /// turn. Gives where it stands then, and whether that is the end.
    async fn tell(
        &self,
        since: &Cursor,
        to: &Cursor,
        audience: &Audience,
        outbox: &Outbox,
    ) -> Result<(Cursor, bool), Missed> {
        let _turn = self.turns.acquire().await;
        let changelog = self.changelog().await?;
        self.check_with(&changelog, since).await?;
        let started = Instant::now();
        let has_enough = || outbox.is_behind() || outbox.is_full() || started.elapsed() > TURN;
        let mut position = Position::after(since.seen().clone());
        if let Some(within) = since.within() {
            position.until = Some(within.until().clone());
            position.after = within.number();
        }
        loop {
            // The page in which the cursor stands goes first, to its own end.
            let until = position.until.clone().unwrap_or_else(|| to.seen().clone());
            position.until = Some(until.clone());
            let span =
                Arc::new(Span { epoch: since.epoch(), seen: position.seen.clone(), until: until.clone() });
            let mut page = changelog.open(&position).await?;
            // While it is open nothing can be trimmed; what was trimmed before would be missing in it.
            self.check_kept(&position.seen).await?;
            loop {
                let (changes, more) = page.part(PART_CHANGES, PART_BYTES).await?;
                let Some(last) = changes.last().map(|change| change.number) else { break };
                let catalog = self.catalog.reloaded().await?;
                self.judge_with(&catalog).await;
                if audience.subscription().is_stale(&catalog) {
                    return Err(Missed::Gap(ALTERED));
                }
                let stretch = Stretch { changes, more, span: Arc::clone(&span) };
                tell_one(&self.gate, &catalog, &stretch, audience).await?;
                if more && has_enough() {
                    return Ok((span.after(last, false), false));
                }
                if !more {
                    break;
                }
            }
            let is_there = to.seen().is_before_or_equal(&until);
            drop(page);
            if is_there || has_enough() {
                self.put_back(changelog).await;
                return Ok((span.end(), is_there));
            }
            position = Position::after(until);
        }
    }
}

const TOO_OLD: &str = "the cursor is older than what is kept of the changelog";
const ELSEWHERE: &str = "the cursor is of another database, or of an older state of it";

impl Follower {
    /// Whoever comes with this cursor; nothing is delivered before [`Self::go_on`].
    pub fn new(
        feed: Feed,
        channel: ChannelId,
        subscription: Subscription,
        dress: Dress,
        since: Cursor,
        outbox: Arc<Outbox>,
    ) -> Self {
        Self { feed, channel, subscription, dress, since, outbox, is_known: false, stays: false }
    }

    /// Goes on until everything missed is delivered, or there is enough to read for now.
    ///
    /// # Errors
    /// When what was missed cannot be had.
    pub async fn go_on(&mut self) -> Result<Progress, Missed> {
        let mut pause = Duration::from_millis(50);
        loop {
            match self.ask().await {
                Some(Handover::Live) => return Ok(Progress::Live),
                Some(Handover::Ahead) => {
                    self.feed.past().check(&self.since).await?;
                    self.is_known = true;
                }
                Some(Handover::Missed(missed, to)) => {
                    self.feed.past().tell_again(&missed, &self.alone(Some(self.since.clone()))).await?;
                    self.since = to;
                    if self.outbox.is_behind() {
                        return Ok(Progress::More);
                    }
                }
                Some(Handover::Behind(to)) => {
                    let alone = self.alone(None);
                    let (since, is_there) =
                        self.feed.past().tell(&self.since, &to, &alone, &self.outbox).await?;
                    self.since = since;
                    if !is_there || self.outbox.is_behind() {
                        return Ok(Progress::More);
                    }
                }
                Some(Handover::Gap(why)) => return Err(Missed::Gap(why)),
                Some(Handover::NotYet) | None => {
                    sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    /// Asks the router to deliver from here on. None when the relay ends.
    async fn ask(&self) -> Option<Handover> {
        let (outcome, heard) = oneshot::channel();
        let registration = Registration {
            dress: self.dress.clone(),
            subscription: self.subscription.clone(),
            since: Some(self.since.clone()),
            outbox: Arc::clone(&self.outbox),
        };
        let checked = self.is_known;
        self.feed.send(Command::Follow { channel: self.channel, registration, checked, outcome });
        heard.await.ok()
    }

    /// An audience of this channel alone, which has what lies before `since`.
    fn alone(&self, since: Option<Cursor>) -> Audience {
        let key = AudienceKey { dress: self.dress.clone(), subscription: self.subscription.clone(), since };
        Audience::new(Arc::new(key), self.channel, Arc::clone(&self.outbox))
    }

    /// Ends, while delivery goes on until the channel is left.
    pub fn settle(mut self) {
        self.stays = true;
    }

    /// What it receives.
    pub fn subscription(&self) -> &Subscription {
        &self.subscription
    }

    /// Up to where it was told everything from the past.
    pub fn since(&self) -> &Cursor {
        &self.since
    }

    /// Up to where everything is in the outbox; none while the changelog is not being read.
    pub async fn position(&self) -> Option<Cursor> {
        // Asked as a channel that never was, because this one stays.
        let nobody = ChannelId { channel: u32::MAX, ..self.channel };
        self.feed.position(nobody, &self.outbox, None).await
    }

    /// Ends delivery; everything up to the cursor that comes back is in the outbox.
    pub async fn leave(&self) -> Option<Cursor> {
        let (until, heard) = oneshot::channel();
        let outbox = Arc::clone(&self.outbox);
        let farewell = Vec::new();
        self.feed.send(Command::Leave { channel: self.channel, outbox, farewell, until: Some(until) });
        heard.await.ok().flatten()
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        if !self.stays {
            self.feed.leave(self.channel, &self.outbox, Vec::new());
        }
    }
}
