//! Reads missed changes from the changelog and replays them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};

use crate::feed::authorize::gate::Gate;
use crate::feed::read::batch::Batch;
use crate::feed::read::source::{BATCH_BYTES, BATCH_CHANGES};
use crate::model::catalog::relation::Catalog;
use crate::model::log::cursor::{Cursor, Snapshot, Span};
use crate::model::log::position::Missing;
use crate::model::row::change::Change;
use crate::postgres::catalog::CatalogCache;
use crate::postgres::changelog::access::ChangelogAccess;
use crate::postgres::changelog::chunks::{Chunk, ChunkPosition, ChunkReader};
use crate::postgres::changelog::reader;
use crate::postgres::connect::pool::Error;
use crate::postgres::connect::within::within;

/// Chunks read and authorized concurrently for single subscribers: a storm of reconnects queues here, not at the
/// database.
const MAX_CONCURRENT: usize = 4;
/// The same for replays to many groups.
const MAX_CONCURRENT_SHARED: usize = 2;
/// Time that an idle connection is kept for the next chunk.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum time of one replay to a single subscriber, whose answer may be waiting; a long replay takes several.
const TURN: Duration = Duration::from_secs(2);

/// How long a replay may take, and what limits the number of replays.
struct Turn<'p> {
    permits: &'p Arc<Semaphore>,
    /// When it should stop; `None` if it need not.
    until: Option<Instant>,
}

impl Turn<'_> {
    async fn permit(&self, sink: &mut impl ReplaySink) -> Option<OwnedSemaphorePermit> {
        sink.while_waiting(Arc::clone(self.permits).acquire_owned()).await.ok()
    }

    fn is_over(&self, sink: &impl ReplaySink) -> bool {
        sink.has_enough() || self.until.is_some_and(|until| Instant::now() > until)
    }
}

/// A chunk of a page that was read.
struct ReadChunk {
    batches: Vec<Vec<Change>>,
    span: Arc<Span>,
    /// Whether it has the changes of all relations.
    is_of_all: bool,
    /// Whether another chunk follows.
    has_next: bool,
    /// Whether the page ends with it. What is missing of a page may end earlier.
    is_end_of_page: bool,
}

/// Reads missed changes from the changelog.
pub struct ReplayReader {
    access: ChangelogAccess,
    catalog: Arc<CatalogCache>,
    /// Separate from the gate of live delivery, which must not wait for a replay.
    gate: Gate,
    permits: Arc<Semaphore>,
    shared: Arc<Semaphore>,
    /// Idle connections, and since when.
    idle: Mutex<Vec<(ChunkReader, Instant)>>,
    current_catalog: Mutex<Option<Arc<Catalog>>>,
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
    fn deliver(
        &mut self,
        gate: &Gate,
        catalog: &Arc<Catalog>,
        batch: &Batch,
    ) -> impl Future<Output = Result<(), ReplayError>> + Send;

    /// Awaits a query of the replay. A sink may do other work meanwhile.
    fn while_waiting<T: Send>(
        &mut self,
        query: impl Future<Output = T> + Send,
    ) -> impl Future<Output = T> + Send {
        query
    }

    /// Returns whether clients should read before more is delivered.
    fn is_behind(&self) -> bool {
        false
    }

    /// Waits for clients to read.
    fn wait_for_clients(&mut self) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }

    /// Returns the relations to replay from a partly delivered page; `None` for all.
    fn only(&self) -> Option<Arc<[i32]>> {
        None
    }

    /// Records that everything up to `position` was delivered.
    fn reached(&mut self, position: Cursor);

    /// Returns whether the replay should stop here.
    fn has_enough(&self) -> bool;
}

impl ReplayReader {
    /// Creates a reader of the changelog.
    pub fn new(access: ChangelogAccess, catalog: Arc<CatalogCache>, gate: Gate) -> Self {
        Self {
            access,
            catalog,
            gate,
            permits: Arc::new(Semaphore::new(MAX_CONCURRENT)),
            shared: Arc::new(Semaphore::new(MAX_CONCURRENT_SHARED)),
            idle: Mutex::default(),
            current_catalog: Mutex::new(None),
        }
    }

    /// Checks that the cursor is not in the future and that the changes after it are still kept.
    ///
    /// # Errors
    /// When the cursor is invalid, or PostgreSQL does not answer.
    pub async fn check(&self, cursor: &Cursor) -> Result<(), ReplayError> {
        self.check_by(&self.permits, cursor).await
    }

    async fn check_by(&self, permits: &Arc<Semaphore>, cursor: &Cursor) -> Result<(), ReplayError> {
        let _permit = Arc::clone(permits).acquire_owned().await;
        let chunks = self.connection().await?;
        let checked = self.check_with(&chunks, cursor).await;
        if !matches!(checked, Err(ReplayError::Unavailable(_))) {
            self.put_back(chunks).await;
        }
        checked
    }

    /// Takes an idle connection or opens one.
    async fn connection(&self) -> Result<ChunkReader, Error> {
        let mut idle = self.idle.lock().await;
        idle.retain(|(chunks, since)| since.elapsed() < IDLE_TIMEOUT && chunks.is_open());
        let known = idle.pop();
        drop(idle);
        match known {
            Some((chunks, _)) => Ok(chunks),
            None => {
                self.in_time(Box::pin(ChunkReader::connect(&self.access.server, self.access.query_timeout)))
                    .await
            }
        }
    }

    async fn put_back(&self, chunks: ChunkReader) {
        self.idle.lock().await.push((chunks, Instant::now()));
    }

    async fn check_with(&self, chunks: &ChunkReader, cursor: &Cursor) -> Result<(), ReplayError> {
        let now = self.in_time(chunks.now()).await?;
        match () {
            () if self.in_time(chunks.epoch()).await? != cursor.epoch() => {
                Err(ReplayError::Gap(OTHER_DATABASE))
            }
            () if cursor.reach().xmax() > now.xmax() => {
                Err(ReplayError::Gap("the cursor is of a moment that has not been"))
            }
            () => self.check_kept(cursor.seen()).await,
        }
    }

    /// Applies the time limit. When it is exceeded, the idle connections may be dead as well: they are dropped.
    async fn in_time<T>(&self, query: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let answer =
            within(self.access.query_timeout, "the connection that reads missed changes", query).await;
        if matches!(answer, Err(Error::Late { .. })) {
            self.idle.lock().await.clear();
        }
        answer
    }

    /// Checks that everything after the snapshot is still kept.
    async fn check_kept(&self, seen: &Snapshot) -> Result<(), ReplayError> {
        match self.in_time(reader::horizon(&self.access.pool)).await?.is_before_or_equal(seen) {
            true => Ok(()),
            false => Err(ReplayError::Gap(TOO_OLD)),
        }
    }

    /// Discards plans that were made with another catalog.
    async fn set_catalog(&self, catalog: &Arc<Catalog>) {
        let mut current_catalog = self.current_catalog.lock().await;
        if !current_catalog.as_ref().is_some_and(|last| Arc::ptr_eq(last, catalog)) {
            self.gate.forget().await;
            *current_catalog = Some(Arc::clone(catalog));
        }
    }

    /// Replays batches that were delivered live a moment ago. When the catalog was already reloaded for this sink
    /// (`is_catalog_checked`), the version mark of the batches suffices.
    ///
    /// # Errors
    /// When delivery fails.
    pub async fn replay_recent(
        &self,
        missed: &[Arc<Batch>],
        is_catalog_checked: bool,
        sink: &mut impl ReplaySink,
    ) -> Result<(), ReplayError> {
        let needs_reload = missed.iter().any(|batch| batch.more || batch.has_schema_changes());
        let mark = missed.last().and_then(|batch| batch.mark);
        let catalog = match is_catalog_checked && !needs_reload && mark.is_some() {
            true => self.in_time(self.catalog.fresh(mark)).await?,
            false => self.in_time(self.catalog.reload()).await?,
        };
        self.set_catalog(&catalog).await;
        for batch in missed {
            sink.deliver(&self.gate, &catalog, batch).await?;
            if let Some(end) = batch.end() {
                sink.reached(end);
            }
        }
        Ok(())
    }

    /// Replays the changes between two cursors to one subscriber; stops when it has enough, or after two seconds.
    /// Returns whether that was all.
    ///
    /// # Errors
    /// When reading or delivery fails.
    pub async fn replay_to_one(
        &self,
        since: &Cursor,
        to: &Cursor,
        sink: &mut impl ReplaySink,
    ) -> Result<bool, ReplayError> {
        let until = Some(Instant::now() + TURN);
        Box::pin(self.replay(&self.permits, since, to, until, sink)).await
    }

    /// Replays the changes between two cursors to many groups, until they have enough.
    ///
    /// # Errors
    /// When reading or delivery fails.
    pub async fn replay_to_many(
        &self,
        since: &Cursor,
        to: &Cursor,
        sink: &mut impl ReplaySink,
    ) -> Result<(), ReplayError> {
        Box::pin(self.replay(&self.shared, since, to, None, sink)).await.map(|_| ())
    }

    async fn replay(
        &self,
        permits: &Arc<Semaphore>,
        since: &Cursor,
        to: &Cursor,
        until: Option<Instant>,
        sink: &mut impl ReplaySink,
    ) -> Result<bool, ReplayError> {
        sink.while_waiting(self.check_by(permits, since)).await?;
        let turn = Turn { permits, until };
        let mut cursor = since.clone();
        // The page that the cursor is in comes first.
        while let Some(missing) = cursor.missing(to) {
            cursor = missing.end();
            if !self.replay_page(&turn, missing, sink).await? {
                return Ok(false);
            }
            sink.reached(cursor.clone());
            if turn.is_over(sink) && cursor.missing(to).is_some() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Replays what is missing of a page, in chunks. Returns false if the turn was over before its end.
    async fn replay_page(
        &self,
        turn: &Turn<'_>,
        missing: Missing,
        sink: &mut impl ReplaySink,
    ) -> Result<bool, ReplayError> {
        let Missing { span, after, through } = missing;
        let only = if after > 0 { sink.only() } else { None };
        let span = Arc::new(span);
        let mut next = Some(ChunkPosition::new(&span, after).through(through).only(only));
        while let Some(position) = next {
            // Held until the chunk is delivered: waiting replays must not each have a chunk in memory.
            let permit = turn.permit(sink).await;
            let chunk = sink.while_waiting(self.chunk(&position)).await?;
            next = chunk.next;
            let read = ReadChunk {
                batches: chunk.parts,
                span: Arc::clone(&span),
                is_of_all: position.is_of_all(),
                has_next: next.is_some(),
                is_end_of_page: next.is_none() && through.is_none(),
            };
            let is_delivered = self.deliver_chunk(turn, permit, read, sink).await?;
            if !is_delivered || (next.is_some() && turn.is_over(sink)) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Delivers a chunk in batches. Returns false if the turn was over before its end.
    async fn deliver_chunk(
        &self,
        turn: &Turn<'_>,
        mut permit: Option<OwnedSemaphorePermit>,
        chunk: ReadChunk,
        sink: &mut impl ReplaySink,
    ) -> Result<bool, ReplayError> {
        let ReadChunk { batches, span, is_of_all, has_next, is_end_of_page } = chunk;
        let mut batches = batches.into_iter().peekable();
        while let Some(mut changes) = batches.next() {
            let Some(last) = changes.last().map(|change| change.number) else { continue };
            let is_last = batches.peek().is_none();
            let page_goes_on = !(is_last && is_end_of_page);
            let completes_page = is_of_all && !page_goes_on;
            let completed = self.access.transactions.complete(span.epoch, &mut changes, completes_page);
            let unfinished = sink.while_waiting(self.in_time(completed)).await?;
            let page = Arc::clone(&span);
            let batch = Batch { changes, unfinished, more: page_goes_on, span: page, mark: None };
            if permit.is_none() {
                permit = turn.permit(sink).await;
            }
            let catalog = sink.while_waiting(self.in_time(self.catalog.reload())).await?;
            self.set_catalog(&catalog).await;
            sink.deliver(&self.gate, &catalog, &batch).await?;
            sink.reached(span.after(last, !page_goes_on));
            if (has_next || !is_last) && turn.is_over(sink) {
                return Ok(false);
            }
            if sink.is_behind() {
                // A replay that waits for slow clients frees its permit.
                permit = None;
                sink.wait_for_clients().await;
            }
        }
        Ok(true)
    }

    /// Reads a chunk, and checks that nothing of it was trimmed before.
    async fn chunk(&self, from: &ChunkPosition) -> Result<Chunk, ReplayError> {
        let chunks = self.connection().await?;
        let chunk = self.in_time(chunks.read(from, BATCH_CHANGES, BATCH_BYTES)).await?;
        self.put_back(chunks).await;
        self.check_kept(&from.seen).await?;
        Ok(chunk)
    }
}

const TOO_OLD: &str = "the cursor is older than what is kept of the changelog";
const OTHER_DATABASE: &str = "the cursor is of another database, or of an older state of it";
