//! Reads missed changes from the changelog and replays them.

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

/// Chunks read and authorized concurrently for single subscribers: a storm of reconnects queues here, not at the
/// database.
const AT_ONCE: usize = 4;
/// The same for replays to many groups.
const SHARED: usize = 2;
/// Time that an idle connection is kept for the next chunk.
const SPARE: Duration = Duration::from_secs(5);
/// Maximum time of one replay to a single subscriber, whose answer may be waiting; a long replay takes several.
const TURN: Duration = Duration::from_secs(2);

/// Reads missed changes from the changelog.
pub struct ReplayReader {
    server: Server,
    pool: Pool,
    transactions: Arc<Transactions>,
    catalog: Arc<CatalogCache>,
    /// Separate from the gate of live delivery, which must not wait for a replay.
    gate: Gate,
    places: Arc<Semaphore>,
    shared: Arc<Semaphore>,
    /// Time limit for a chunk.
    patience: Duration,
    /// Idle connections, and since when.
    spare: Mutex<Vec<(ChunkReader, Instant)>>,
    judged_with: Mutex<Option<Arc<Catalog>>>,
}

/// Why a replay failed.
#[derive(Debug)]
pub enum ReplayError {
    /// What was missed cannot be recovered, and why: the rows have to be read again.
    Gap(&'static str),
    /// PostgreSQL does not answer.
    Unavailable(Error),
    /// The subscriber's token has expired: the rest waits for its next token.
    Ended,
}

impl From<Error> for ReplayError {
    fn from(error: Error) -> Self {
        Self::Unavailable(error)
    }
}

/// The receiver of a replay.
pub trait ReplaySink {
    /// Delivers a batch.
    fn tell(
        &mut self,
        gate: &Gate,
        catalog: &Arc<Catalog>,
        batch: &Batch,
    ) -> impl Future<Output = Result<(), ReplayError>> + Send;

    /// Awaits a query of the replay. A sink may do other work meanwhile.
    fn meanwhile<T: Send>(
        &mut self,
        asked: impl Future<Output = T> + Send,
    ) -> impl Future<Output = T> + Send {
        asked
    }

    /// Returns whether clients should read before more is delivered.
    fn is_behind(&self) -> bool {
        false
    }

    /// Waits for clients to read.
    fn let_read(&mut self) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }

    /// Returns the relations to replay from a partly delivered page; `None` for all.
    fn only(&self) -> Option<Arc<[i32]>> {
        None
    }

    /// Records that everything up to `here` was delivered.
    fn reached(&mut self, here: Cursor);

    /// Returns whether the replay should stop here.
    fn has_enough(&self) -> bool;
}

impl ReplayReader {
    /// Creates a reader of the changelog of `server`, with a time limit of `patience` per chunk; `pool` is for other
    /// queries.
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

    /// Checks that the cursor is not in the future and that the changes after it are still kept.
    ///
    /// # Errors
    /// When the cursor is invalid, or PostgreSQL does not answer.
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

    /// Takes an idle connection or opens one.
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

    /// Applies the time limit. A dead connection may look open for ever, and so may the idle ones: they are dropped.
    async fn in_time<T>(&self, asked: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        match timeout(self.patience, asked).await {
            Ok(answered) => answered,
            Err(_) => {
                self.spare.lock().await.clear();
                Err(Error::Lost("the connection that reads the past does not answer"))
            }
        }
    }

    /// Checks that everything after the snapshot is still kept.
    async fn check_kept(&self, seen: &Snapshot) -> Result<(), ReplayError> {
        match self.in_time(reader::horizon(&self.pool)).await?.is_before_or_equal(seen) {
            true => Ok(()),
            false => Err(ReplayError::Gap(TOO_OLD)),
        }
    }

    /// Discards plans that were made with another catalog.
    async fn set_catalog(&self, catalog: &Arc<Catalog>) {
        let mut judged_with = self.judged_with.lock().await;
        if !judged_with.as_ref().is_some_and(|last| Arc::ptr_eq(last, catalog)) {
            self.gate.forget().await;
            *judged_with = Some(Arc::clone(catalog));
        }
    }

    /// Replays batches that were delivered live a moment ago. When the catalog was already reloaded for this sink
    /// (`looked`), the version mark of the batches suffices.
    ///
    /// # Errors
    /// When delivery fails.
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

    /// Replays the changes between two cursors to one subscriber; stops when it has enough, or after [`TURN`].
    /// Returns whether that was all.
    ///
    /// # Errors
    /// When reading or delivery fails.
    pub async fn replay_to_one(
        &self,
        since: &Cursor,
        to: &Cursor,
        listener: &mut impl ReplaySink,
    ) -> Result<bool, ReplayError> {
        let until = Some(Instant::now() + TURN);
        Box::pin(self.tell(&self.places, since, to, until, listener)).await
    }

    /// Replays the changes between two cursors to many groups, until they have enough.
    ///
    /// # Errors
    /// When reading or delivery fails.
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
        // The page that the cursor is in comes first.
        while let Some(missing) = here.missing(to) {
            here = missing.end();
            let Missing { span, after, through } = missing;
            let only = if after > 0 { listeners.only() } else { None };
            let mut bearing = ChunkPosition::new(&span, after).through(through).only(only);
            let span = Arc::new(span);
            loop {
                // Held until the chunk is delivered: waiting replays must not each have a chunk in memory.
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
                        // A replay that waits for slow clients frees its permit.
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

    /// Reads a chunk, and checks that nothing of it was trimmed before.
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
