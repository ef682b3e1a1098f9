//! The past, read from the changelog for those who missed it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use deadpool_postgres::Pool;
use tokio::sync::{Mutex, Semaphore};
use tokio::time::timeout;

use crate::feed::gate::Gate;
use crate::feed::source::{PART_BYTES, PART_CHANGES};
use crate::feed::stretch::Stretch;
use crate::model::cursor::{Cursor, Snapshot, Span};
use crate::model::relation::Catalog;
use crate::postgres::catalog::CatalogKeeper;
use crate::postgres::changelog::{self, Changelog, Position};
use crate::postgres::connect::{Error, Server};

/// Readers of the past at a time: a storm of them queues here, and not at the database.
const AT_ONCE: usize = 4;
/// A connection is kept so long for the next reader.
const SPARE: Duration = Duration::from_secs(5);
/// The same for convoys.
const CONVOYS: usize = 2;
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
    convoys: Arc<Semaphore>,
    /// PostgreSQL may take this long for a page, or a part of one.
    patience: Duration,
    /// Connections whose last reader came to the end, and since when nobody has used them.
    spare: Mutex<Vec<(Changelog, Instant)>>,
    judged_with: Mutex<Option<Arc<Catalog>>>,
}

/// Why a cursor leads nowhere.
#[derive(Debug)]
pub enum Missed {
    /// What was missed cannot be had any more, and why: read the rows again.
    Gap(&'static str),
    /// The database cannot be asked now.
    Unavailable(Error),
    /// The reader's token has ended: what is left is for its next one.
    Ended,
}

impl From<Error> for Missed {
    fn from(error: Error) -> Self {
        Self::Unavailable(error)
    }
}

/// Whom the past is told.
pub trait Listeners {
    /// Tells them a stretch.
    fn tell(
        &mut self,
        gate: &Gate,
        catalog: &Arc<Catalog>,
        stretch: &Stretch,
    ) -> impl Future<Output = Result<(), Missed>> + Send;

    /// Waits for something of the past. Whoever has others to listen to does so meanwhile.
    fn meanwhile<T: Send>(
        &mut self,
        asked: impl Future<Output = T> + Send,
    ) -> impl Future<Output = T> + Send {
        asked
    }

    /// They were told everything up to here.
    fn reached(&mut self, here: Cursor);

    /// Whether they have enough for now.
    fn has_enough(&self) -> bool;
}

impl Past {
    /// Reads the changelog of `server`, which has `patience` for each part of a page; `pool` is for questions while a page
    /// is open.
    pub fn new(
        server: Server,
        pool: Pool,
        catalog: Arc<CatalogKeeper>,
        gate: Gate,
        patience: Duration,
    ) -> Self {
        Self {
            server,
            pool,
            catalog,
            gate,
            turns: Semaphore::new(AT_ONCE),
            convoys: Arc::new(Semaphore::new(CONVOYS)),
            patience,
            spare: Mutex::default(),
            judged_with: Mutex::new(None),
        }
    }

    /// Whether the cursor is of a moment that has been, and whose changes are still there.
    ///
    /// # Errors
    /// When it is not.
    pub async fn check(&self, cursor: &Cursor) -> Result<(), Missed> {
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
        let now = self.in_time(changelog.now()).await?;
        let reach = cursor.within().map_or(cursor.seen().xmax(), |within| within.until().xmax());
        match () {
            () if self.in_time(changelog.epoch()).await? != cursor.epoch() => Err(Missed::Gap(ELSEWHERE)),
            () if reach > now.xmax() => Err(Missed::Gap("the cursor is of a moment that has not been")),
            () => self.check_kept(cursor.seen()).await,
        }
    }

    /// A connection on which nothing comes any more may look open for ever.
    async fn in_time<T>(&self, asked: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        match timeout(self.patience, asked).await {
            Ok(answered) => answered,
            Err(_) => Err(Error::Lost("the connection that reads the past does not answer")),
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

    /// Tells what was delivered to others a moment ago.
    ///
    /// # Errors
    /// When it cannot be told.
    pub async fn tell_again(
        &self,
        missed: &[Arc<Stretch>],
        listeners: &mut impl Listeners,
    ) -> Result<(), Missed> {
        let is_news = missed.iter().any(|stretch| stretch.more || stretch.is_news());
        let catalog = if is_news { self.catalog.reloaded().await? } else { self.catalog.fresh().await? };
        self.judge_with(&catalog).await;
        for stretch in missed {
            listeners.tell(&self.gate, &catalog, stretch).await?;
            if let Some(end) = stretch.end() {
                listeners.reached(end);
            }
        }
        Ok(())
    }

    /// Tells one reader what lies between two cursors; stops when it has enough, or for others to have their turn. True
    /// when that was all.
    ///
    /// # Errors
    /// When it cannot be told.
    pub async fn tell_one(
        &self,
        since: &Cursor,
        to: &Cursor,
        listener: &mut impl Listeners,
    ) -> Result<bool, Missed> {
        let _turn = self.turns.acquire().await;
        Box::pin(self.tell(since, to, Some(Instant::now() + TURN), listener)).await
    }

    /// Tells many together what lies between two cursors, unless they have enough before.
    ///
    /// # Errors
    /// When it cannot be told.
    pub async fn tell_many(
        &self,
        since: &Cursor,
        to: &Cursor,
        listeners: &mut impl Listeners,
    ) -> Result<(), Missed> {
        let _place = listeners.meanwhile(Arc::clone(&self.convoys).acquire_owned()).await;
        Box::pin(self.tell(since, to, None, listeners)).await.map(|_| ())
    }

    async fn tell(
        &self,
        since: &Cursor,
        to: &Cursor,
        until: Option<Instant>,
        listeners: &mut impl Listeners,
    ) -> Result<bool, Missed> {
        let changelog = listeners.meanwhile(self.changelog()).await?;
        listeners.meanwhile(self.check_with(&changelog, since)).await?;
        let is_over = |listeners: &mut _| {
            Listeners::has_enough(listeners) || until.is_some_and(|until| Instant::now() > until)
        };
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
            let mut page = listeners.meanwhile(self.in_time(changelog.open(&position))).await?;
            // While it is open nothing can be trimmed; what was trimmed before would be missing in it.
            listeners.meanwhile(self.check_kept(&position.seen)).await?;
            loop {
                let (changes, more) =
                    listeners.meanwhile(self.in_time(page.part(PART_CHANGES, PART_BYTES))).await?;
                let Some(last) = changes.last().map(|change| change.number) else { break };
                let catalog = listeners.meanwhile(self.catalog.reloaded()).await?;
                self.judge_with(&catalog).await;
                let stretch = Stretch { changes, more, span: Arc::clone(&span) };
                listeners.tell(&self.gate, &catalog, &stretch).await?;
                listeners.reached(span.after(last, !more));
                if more && is_over(listeners) {
                    return Ok(false);
                }
                if !more {
                    break;
                }
            }
            listeners.reached(span.end());
            let is_there = to.seen().is_before_or_equal(&until);
            drop(page);
            if is_there || is_over(listeners) {
                self.put_back(changelog).await;
                return Ok(is_there);
            }
            position = Position::after(until);
        }
    }
}

const TOO_OLD: &str = "the cursor is older than what is kept of the changelog";
const ELSEWHERE: &str = "the cursor is of another database, or of an older state of it";
