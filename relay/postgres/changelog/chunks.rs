//! Pages of the changelog read in chunks, for replay: each chunk is one statement of bounded cost, and no transaction or
//! portal is open between two of them.

use std::time::Duration;

use std::sync::Arc;

use tokio_postgres::Statement;

use crate::model::log::cursor::{Epoch, Snapshot, Span};
use crate::model::row::change::Change;
use crate::postgres::changelog::reader::{Changelog, Page, PagePosition, committed};
use crate::postgres::connect::pool::{Error, Server};

/// Maximum number of changes of the first chunk. Each further chunk may have twice as many, up to [`MAX_CHANGES`].
const FIRST_CHANGES: usize = 250;
/// Maximum number of changes of a chunk.
const MAX_CHANGES: usize = 2000;
/// Number of parts with which a chunk ends.
const MAX_PARTS: usize = 8;
/// Bytes of images with which a chunk ends, because several readers may hold one in memory.
const MAX_BYTES: usize = 1 << 20;

/// Maximum number of transactions of a page that are looked up one by one for each chunk. If a page has more, each chunk
/// scans the index of the whole page.
const MAX_TRANSACTIONS: i32 = 2000;

/// The transactions of a page; `None` if they are too many.
type PageTransactions = Arc<Option<Vec<String>>>;

/// A connection that reads chunks.
pub struct ChunkReader {
    changelog: Changelog,
    head: Statement,
    slice: Statement,
    transactions: Statement,
    max_transactions: i32,
}

/// The position of a reader in a page.
#[derive(Debug, Clone)]
pub struct ChunkPosition {
    /// The snapshot before the page.
    pub seen: Snapshot,
    /// The snapshot at the end of the page.
    pub until: Snapshot,
    /// The number of the last change read.
    after: i64,
    /// The number of the last change to read.
    through: Option<i64>,
    /// Whether the next change may be far away, so that the next chunk is read by number of changes, not by a range.
    far: bool,
    /// Maximum number of changes of the next chunk.
    size: usize,
    /// The page's transactions, once they are known.
    transactions: Option<PageTransactions>,
    /// The relations to read, 0 being the schema; `None` means all.
    only: Option<Arc<[i32]>>,
}

/// A chunk of a page.
pub struct Chunk {
    /// Its changes, in parts of the size in which they are delivered.
    pub parts: Vec<Vec<Change>>,
    /// The position of the next chunk; `None` after the last.
    pub next: Option<ChunkPosition>,
}

impl ChunkPosition {
    /// The position in this page after the change with this number; 0 is the start.
    pub fn new(page: &Span, after: i64) -> Self {
        let (seen, until) = (page.seen.clone(), page.until.clone());
        Self {
            seen,
            until,
            after,
            through: None,
            far: after == 0,
            size: FIRST_CHANGES,
            transactions: None,
            only: None,
        }
    }

    /// Ends the reading at the change with this number.
    pub fn through(self, number: Option<i64>) -> Self {
        Self { through: number, ..self }
    }

    /// Restricts the reading to these relations; 0 is the schema.
    pub fn only(self, relations: Option<Arc<[i32]>>) -> Self {
        Self { only: relations, ..self }
    }

    /// Whether changes of all relations are read.
    pub fn is_of_all(&self) -> bool {
        self.only.is_none()
    }
}

impl ChunkReader {
    /// Connects, as [`Changelog::connect`] does.
    ///
    /// # Errors
    /// The same.
    pub async fn connect(server: &Server, query_timeout: Duration) -> Result<Self, Error> {
        let changelog = Changelog::connect(server, query_timeout).await?;
        let client = changelog.client();
        let committed = committed(client).await?;
        // The header has no number.
        let head = format!(
            "select p.*, {committed} as committed from relay.page($1::text::pg_snapshot, $2::text::pg_snapshot, $3) p \
             where number is null or (($5::int[] is null or relay.relation_of(kind) = any($5)) and number <= $6) \
             limit $4::bigint + 1"
        );
        let slice = format!(
            "select p.*, {committed} as committed \
             from relay.page_slice($1::text::pg_snapshot, $2::text::pg_snapshot, $3, $4, $6::text[]::xid8[]) p \
             where $5::int[] is null or number is null or relay.relation_of(kind) = any($5)"
        );
        let transactions =
            "select relay.page_transactions($1::text::pg_snapshot, $2::text::pg_snapshot, $3)::text[]";
        let (head, slice) = (client.prepare(&head).await?, client.prepare(&slice).await?);
        let transactions = client.prepare(transactions).await?;
        Ok(Self { changelog, head, slice, transactions, max_transactions: MAX_TRANSACTIONS })
    }

    /// Sets how many transactions of a page are looked up one by one.
    pub fn naming(self, max_transactions: i32) -> Self {
        Self { max_transactions, ..self }
    }

    /// Whether the connection is not known to be closed.
    pub fn is_open(&self) -> bool {
        self.changelog.is_open()
    }

    /// As [`Changelog::epoch`].
    ///
    /// # Errors
    /// As the connection.
    pub async fn epoch(&self) -> Result<Epoch, Error> {
        self.changelog.epoch().await
    }

    /// As [`Changelog::now`].
    ///
    /// # Errors
    /// As the connection.
    pub async fn now(&self) -> Result<Snapshot, Error> {
        self.changelog.now().await
    }

    /// Reads a chunk in parts. A part ends at `max_changes`, or with the change that reaches `max_bytes` of images.
    ///
    /// # Errors
    /// As the connection.
    pub async fn read(
        &self,
        from: &ChunkPosition,
        max_changes: usize,
        max_bytes: usize,
    ) -> Result<Chunk, Error> {
        let position =
            PagePosition { seen: from.seen.clone(), until: Some(from.until.clone()), after: from.after };
        let only = from.only.as_deref();
        let end = from.through.unwrap_or(i64::MAX);
        let through = from.after.saturating_add(from.size as i64).min(end);
        let mut known = None;
        let mut page = match from.far {
            true => {
                self.changelog.open_by(&self.head, &position, &[&(from.size as i64), &only, &end]).await?
            }
            false => {
                let transactions = self.transactions(from).await?;
                let page = self
                    .changelog
                    .open_by(&self.slice, &position, &[&through, &only, &*transactions])
                    .await?;
                known = Some(transactions);
                page
            }
        };
        let (parts, is_cut) = parts(&mut page, max_changes, max_bytes).await?;
        let read = parts.iter().map(Vec::len).sum::<usize>();
        let last = parts.last().and_then(|part| part.last()).map(|change| change.number);
        let size = if is_cut { read.max(1) } else { from.size.saturating_mul(2).min(MAX_CHANGES) };
        let next = |after, far| {
            Some(ChunkPosition { after, far, size, transactions: known.clone(), ..from.clone() })
        };
        let next = match last {
            Some(last) if is_cut => next(last, false),
            Some(last) if from.far => (read == from.size).then(|| next(last, false)).flatten(),
            None if from.far => None,
            _ if through == end => None,
            // The range may also be empty: numbers belong to other pages and to rolled-back writes, too.
            last => next(through, last.is_none()),
        };
        Ok(Chunk { parts, next })
    }

    /// Returns the transactions of the page at a position.
    async fn transactions(&self, from: &ChunkPosition) -> Result<PageTransactions, Error> {
        if let Some(known) = &from.transactions {
            return Ok(Arc::clone(known));
        }
        let (seen, until) = (from.seen.to_string(), from.until.to_string());
        let row = self
            .changelog
            .client()
            .query_one(&self.transactions, &[&seen, &until, &self.max_transactions])
            .await?;
        Ok(Arc::new(row.try_get(0)?))
    }
}

/// Reads the parts of a chunk. Returns whether the chunk ended before the statement's last row.
async fn parts(
    page: &mut Page,
    max_changes: usize,
    max_bytes: usize,
) -> Result<(Vec<Vec<Change>>, bool), Error> {
    let (mut parts, mut bytes) = (Vec::new(), 0);
    while parts.len() < MAX_PARTS && bytes < MAX_BYTES {
        let (part, more) = page.part(max_changes, max_bytes).await?;
        bytes += part.iter().map(Change::bytes).sum::<usize>();
        if !part.is_empty() {
            parts.push(part);
        }
        if !more {
            return Ok((parts, false));
        }
    }
    Ok((parts, true))
}
