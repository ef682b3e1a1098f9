//! The past, read from the changelog for those who missed it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use deadpool_postgres::Pool;
use tokio::sync::{Mutex, Semaphore};
use tokio::time::timeout;

use crate::feed::authorize::gate::Gate;
use crate::feed::read::batch::Batch;
use crate::feed::read::source::{PART_BYTES, PART_CHANGES};
use crate::model::catalog::relation::Catalog;
use crate::model::log::cursor::{Cursor, Snapshot};
use crate::model::log::position::Missing;
use crate::postgres::catalog::CatalogCache;
use crate::postgres::changelog::chunks::{Chunk, ChunkPosition, ChunkReader};
use crate::postgres::changelog::reader;
use crate::postgres::changelog::transactions::Transactions;
use crate::postgres::connect::pool::{Error, Server};

/// Portions of the past that are read and judged at a time: a storm of readers queues here, and not at the database.
const AT_ONCE: usize = 4;
/// The same for those that many are told together.
const SHARED: usize = 2;
/// A connection is kept so long for the next portion.
const SPARE: Duration = Duration::from_secs(5);
/// One reader's turn, as somebody may wait for the answer; a long past takes several.
const TURN: Duration = Duration::from_secs(2);

/// Reads the past for those who missed it.
pub struct ReplayReader {
    server: Server,
    pool: Pool,
    transactions: Arc<Transactions>,
    catalog: Arc<CatalogCache>,
    /// Apart from the gate of what happens now, which must not wait for the past.
    gate: Gate,
    places: Arc<Semaphore>,
    shared: Arc<Semaphore>,
    /// PostgreSQL may take this long for a portion.
    patience: Duration,
    /// Connections that nobody reads by, and since when.
    spare: Mutex<Vec<(ChunkReader, Instant)>>,
    judged_with: Mutex<Option<Arc<Catalog>>>,
}

/// Why a cursor leads nowhere.
#[derive(Debug)]
pub enum ReplayError {
    /// What was missed cannot be had any more, and why: read the rows again.
    Gap(&'static str),
    /// The database cannot be asked now.
    Unavailable(Error),
    /// The reader's token has ended: what is left is for its next one.
    Ended,
}

impl From<Error> for ReplayError {
    fn from(error: Error) -> Self {
        Self::Unavailable(error)
    }
}

/// Whom the past is told.
pub trait ReplaySink {
    /// Tells them a stretch.
    fn tell(
        &mut self,
        gate: &Gate,
        catalog: &Arc<Catalog>,
        batch: &Batch,
    ) -> impl Future<Output = Result<(), ReplayError>> + Send;

    /// Waits for something of the past. Whoever has others to listen to does so meanwhile.
    fn meanwhile<T: Send>(
        &mut self,
        asked: impl Future<Output = T> + Send,
    ) -> impl Future<Output = T> + Send {
        asked
    }

    /// Whether they are to read what they were told before more of it comes.
    fn is_behind(&self) -> bool {
        false
    }

    /// Lets them read it.
    fn let_read(&mut self) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }

    /// The relations whose changes are all that concerns them of the page in which they stand, when that is known.
    fn only(&self) -> Option<Arc<[i32]>> {
        None
    }

    /// They were told everything up to here.
    fn reached(&mut self, here: Cursor);

    /// Whether they have enough for now.
    fn has_enough(&self) -> bool;
}

impl ReplayReader {
    /// Reads the changelog of `server`, which has `patience` for each portion; `pool` is for other questions.
    pub fn new(
        server: Server,
        pool: Pool,
        transactions: Arc<Transactions>,
        catalog: Arc<CatalogCache>,
        gate: Gate,
        patience: Duration,
    ) -> Self {
        Self {
            server,
            pool,
            transactions,
            catalog,
            gate,
            places: Arc::new(Semaphore::new(AT_ONCE)),
            shared: Arc::new(Semaphore::new(SHARED)),
            patience,
            spare: Mutex::default(),
            judged_with: Mutex::new(None),
        }
    }

    /// Whether the cursor is of a moment that has been, and whose changes are still there.
    ///
    /// # Errors
    /// When it is not.
    pub async fn check(&self, cursor: &Cursor) -> Result<(), ReplayError> {
        self.check_by(&self.places, cursor).await
    }

    async fn check_by(&self, places: &Arc<Semaphore>, cursor: &Cursor) -> Result<(), ReplayError> {
        let _place = Arc::clone(places).acquire_owned().await;
        let chunks = self.connection().await?;
        let checked = self.check_with(&chunks, cursor).await;
        if !matches!(checked, Err(ReplayError::Unavailable(_))) {
            self.put_back(chunks).await;
        }
        checked
    }

    /// The connection of a reader before, when many come one after the other; else a new one.
    async fn connection(&self) -> Result<ChunkReader, Error> {
        let mut spare = self.spare.lock().await;
        spare.retain(|(chunks, since)| since.elapsed() < SPARE && chunks.is_open());
        let known = spare.pop();
        drop(spare);
        match known {
            Some((chunks, _)) => Ok(chunks),
            None => self.in_time(Box::pin(ChunkReader::connect(&self.server))).await,
        }
    }

    async fn put_back(&self, chunks: ChunkReader) {
        self.spare.lock().await.push((chunks, Instant::now()));
    }

    async fn check_with(&self, chunks: &ChunkReader, cursor: &Cursor) -> Result<(), ReplayError> {
        let now = self.in_time(chunks.now()).await?;
        match () {
            () if self.in_time(chunks.epoch()).await? != cursor.epoch() => Err(ReplayError::Gap(ELSEWHERE)),
            () if cursor.reach().xmax() > now.xmax() => {
                Err(ReplayError::Gap("the cursor is of a moment that has not been"))
            }
            () => self.check_kept(cursor.seen()).await,
        }
    }

    /// A connection on which nothing comes any more may look open for ever, and so may those that wait for their next use.
    async fn in_time<T>(&self, asked: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        match timeout(self.patience, asked).await {
            Ok(answered) => answered,
            Err(_) => {
                self.spare.lock().await.clear();
                Err(Error::Lost("the connection that reads the past does not answer"))
            }
        }
    }

    /// Whether everything after the snapshot is still there.
    async fn check_kept(&self, seen: &Snapshot) -> Result<(), ReplayError> {
        match self.in_time(reader::horizon(&self.pool)).await?.is_before_or_equal(seen) {
            true => Ok(()),
            false => Err(ReplayError::Gap(TOO_OLD)),
        }
    }

    /// What was planned with other rules is forgotten.
    async fn set_catalog(&self, catalog: &Arc<Catalog>) {
        let mut judged_with = self.judged_with.lock().await;
        if !judged_with.as_ref().is_some_and(|last| Arc::ptr_eq(last, catalog)) {
            self.gate.forget().await;
            *judged_with = Some(Arc::clone(catalog));
        }
    }

    /// Tells what was delivered to others a moment ago. Where the rules were looked at for these listeners already
    /// (`looked`), those count that counted for the others.
    ///
    /// # Errors
    /// When it cannot be told.
    pub async fn replay_recent(
        &self,
        missed: &[Arc<Batch>],
        looked: bool,
        listeners: &mut impl ReplaySink,
    ) -> Result<(), ReplayError> {
        let is_news = missed.iter().any(|batch| batch.more || batch.is_news());
        let mark = missed.last().and_then(|batch| batch.mark);
        let catalog = match looked && !is_news && mark.is_some() {
            true => self.in_time(self.catalog.fresh(mark)).await?,
            false => self.in_time(self.catalog.reload()).await?,
        };
        self.set_catalog(&catalog).await;
        for batch in missed {
            listeners.tell(&self.gate, &catalog, batch).await?;
            if let Some(end) = batch.end() {
                listeners.reached(end);
            }
        }
        Ok(())
    }

    /// Tells one reader what lies between two cursors; stops when it has enough, or for it to answer whom it tells. True
    /// when that was all.
    ///
    /// # Errors
    /// When it cannot be told.
    pub async fn replay_to_one(
        &self,
        since: &Cursor,
        to: &Cursor,
        listener: &mut impl ReplaySink,
    ) -> Result<bool, ReplayError> {
        let until = Some(Instant::now() + TURN);
        Box::pin(self.tell(&self.places, since, to, until, listener)).await
    }

    /// Tells many together what lies between two cursors, unless they have enough before.
    ///
    /// # Errors
    /// When it cannot be told.
    pub async fn replay_to_many(
        &self,
        since: &Cursor,
        to: &Cursor,
        listeners: &mut impl ReplaySink,
    ) -> Result<(), ReplayError> {
        Box::pin(self.tell(&self.shared, since, to, None, listeners)).await.map(|_| ())
    }

    async fn tell(
        &self,
        places: &Arc<Semaphore>,
        since: &Cursor,
        to: &Cursor,
        until: Option<Instant>,
        listeners: &mut impl ReplaySink,
    ) -> Result<bool, ReplayError> {
        listeners.meanwhile(self.check_by(places, since)).await?;
        let is_over = |listeners: &mut _| {
            ReplaySink::has_enough(listeners) || until.is_some_and(|until| Instant::now() > until)
        };
        let mut here = since.clone();
        // The page in which the cursor stands comes first.
        while let Some(missing) = here.missing(to) {
            here = missing.end();
            let Missing { span, after, through } = missing;
            let only = if after > 0 { listeners.only() } else { None };
            let mut bearing = ChunkPosition::new(&span, after).through(through).only(only);
            let span = Arc::new(span);
            loop {
                // Kept until the portion is told: those who wait for a place must not each have one in memory.
                let mut place = Some(listeners.meanwhile(Arc::clone(places).acquire_owned()).await);
                let chunk = listeners.meanwhile(self.chunk(&bearing)).await?;
                let mut parts = chunk.parts.into_iter().peekable();
                while let Some(mut changes) = parts.next() {
                    let Some(last) = changes.last().map(|change| change.number) else { continue };
                    let more = chunk.next.is_some() || parts.peek().is_some();
                    let page_goes_on = more || through.is_some();
                    let is_all = !page_goes_on && bearing.is_of_all();
                    let completed = self.transactions.complete(span.epoch, &mut changes, is_all);
                    let unfinished = listeners.meanwhile(self.in_time(completed)).await?;
                    let page = Arc::clone(&span);
                    let batch = Batch { changes, unfinished, more: page_goes_on, span: page, mark: None };
                    if place.is_none() {
                        place = Some(listeners.meanwhile(Arc::clone(places).acquire_owned()).await);
                    }
                    let catalog = listeners.meanwhile(self.in_time(self.catalog.reload())).await?;
                    self.set_catalog(&catalog).await;
                    listeners.tell(&self.gate, &catalog, &batch).await?;
                    listeners.reached(span.after(last, !page_goes_on));
                    if more && is_over(listeners) {
                        return Ok(false);
                    }
                    if listeners.is_behind() {
                        // Whoever reads slowly has no place meanwhile.
                        place = None;
                        listeners.let_read().await;
                    }
                }
                match chunk.next {
                    Some(next) => bearing = next,
                    None => break,
                }
                if is_over(listeners) {
                    return Ok(false);
                }
            }
            listeners.reached(here.clone());
            if is_over(listeners) && here.missing(to).is_some() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads a portion; nothing of it was trimmed before.
    async fn chunk(&self, from: &ChunkPosition) -> Result<Chunk, ReplayError> {
        let chunks = self.connection().await?;
        let chunk = self.in_time(chunks.read(from, PART_CHANGES, PART_BYTES)).await?;
        self.put_back(chunks).await;
        self.check_kept(&from.seen).await?;
        Ok(chunk)
    }
}

const TOO_OLD: &str = "the cursor is older than what is kept of the changelog";
const ELSEWHERE: &str = "the cursor is of another database, or of an older state of it";
