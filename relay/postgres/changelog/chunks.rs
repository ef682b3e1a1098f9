//! A page of the changelog in portions, for those who read it long after: each is one statement of bounded cost, and between
//! two of them nothing is held at the database.

use std::sync::Arc;

use tokio_postgres::Statement;

use crate::model::log::cursor::{Epoch, Snapshot, Span};
use crate::model::row::change::Change;
use crate::postgres::changelog::reader::{Changelog, Page, PagePosition, committed};
use crate::postgres::connect::pool::{Error, Server};

/// The first portion has at most so many changes …
const FIRST: usize = 250;
/// … and the next up to twice as many as the one before, up to so many.
const MOST: usize = 2000;
/// A portion ends with the part in which it has so many …
const PARTS: usize = 8;
/// … or so many bytes of images: several readers may have one in memory.
const BYTES: usize = 1 << 20;

/// So many transactions of a page are looked up one by one for each portion. A page that has more is looked through in the index.
const NAMED: i32 = 2000;

/// The transactions of a page; none where they are too many.
type Transactions = Arc<Option<Vec<String>>>;

/// A connection that reads portions.
pub struct ChunkReader {
    changelog: Changelog,
    head: Statement,
    slice: Statement,
    transactions: Statement,
    named: i32,
}

/// Where a reader is in a page.
#[derive(Debug, Clone)]
pub struct ChunkPosition {
    /// What was told before the page.
    pub seen: Snapshot,
    /// The page's end.
    pub until: Snapshot,
    /// What has numbers up to this one was told.
    after: i64,
    /// What has numbers above this one is not asked for.
    through: Option<i64>,
    /// The next portion is looked for among all that is left: it is not known to begin close by.
    far: bool,
    size: usize,
    /// The page's transactions, as far as they were asked for.
    transactions: Option<Transactions>,
    /// Of these relations alone, when not of all; 0 is the schema.
    only: Option<Arc<[i32]>>,
}

/// A portion of a page.
pub struct Chunk {
    /// Its changes, in parts of the size in which they are told.
    pub parts: Vec<Vec<Change>>,
    /// Where the next one begins; none when this was the last.
    pub next: Option<ChunkPosition>,
}

impl ChunkPosition {
    /// In this page, behind the change with this number; 0 at its start.
    pub fn new(page: &Span, after: i64) -> Self {
        let (seen, until) = (page.seen.clone(), page.until.clone());
        Self {
            seen,
            until,
            after,
            through: None,
            far: after == 0,
            size: FIRST,
            transactions: None,
            only: None,
        }
    }

    /// The same up to the change with this number.
    pub fn through(self, number: Option<i64>) -> Self {
        Self { through: number, ..self }
    }

    /// The same for the changes of these relations alone; 0 is the schema.
    pub fn only(self, relations: Option<Arc<[i32]>>) -> Self {
        Self { only: relations, ..self }
    }

    /// Whether it has the changes of all relations.
    pub fn is_of_all(&self) -> bool {
        self.only.is_none()
    }
}

impl ChunkReader {
    /// Connects.
    ///
    /// # Errors
    /// As [`Changelog::connect`].
    pub async fn connect(server: &Server) -> Result<Self, Error> {
        let changelog = Changelog::connect(server).await?;
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
        Ok(Self { changelog, head, slice, transactions, named: NAMED })
    }

    /// The same with another bound on how many transactions of a page are looked up one by one.
    pub fn naming(self, most: i32) -> Self {
        Self { named: most, ..self }
    }

    /// Whether the connection still stands, as far as is known.
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

    /// Reads a portion, in parts of at most so many changes, or so many bytes of images and the change that goes beyond.
    ///
    /// # Errors
    /// As the connection.
    pub async fn read(&self, from: &ChunkPosition, most: usize, most_bytes: usize) -> Result<Chunk, Error> {
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
        let (parts, is_cut) = parts(&mut page, most, most_bytes).await?;
        let read = parts.iter().map(Vec::len).sum::<usize>();
        let last = parts.last().and_then(|part| part.last()).map(|change| change.number);
        let size = if is_cut { read.max(1) } else { from.size.saturating_mul(2).min(MOST) };
        let next = |after, far| {
            Some(ChunkPosition { after, far, size, transactions: known.clone(), ..from.clone() })
        };
        let next = match last {
            Some(last) if is_cut => next(last, false),
            Some(last) if from.far => (read == from.size).then(|| next(last, false)).flatten(),
            None if from.far => None,
            _ if through == end => None,
            // Numbers of other pages and of what was rolled back lie in between.
            last => next(through, last.is_none()),
        };
        Ok(Chunk { parts, next })
    }

    /// The transactions of the page in which a reader is.
    async fn transactions(&self, from: &ChunkPosition) -> Result<Transactions, Error> {
        if let Some(known) = &from.transactions {
            return Ok(Arc::clone(known));
        }
        let (seen, until) = (from.seen.to_string(), from.until.to_string());
        let row =
            self.changelog.client().query_one(&self.transactions, &[&seen, &until, &self.named]).await?;
        Ok(Arc::new(row.try_get(0)?))
    }
}

/// The parts, and whether more would have come.
async fn parts(page: &mut Page, most: usize, most_bytes: usize) -> Result<(Vec<Vec<Change>>, bool), Error> {
    let (mut parts, mut bytes) = (Vec::new(), 0);
    while parts.len() < PARTS && bytes < BYTES {
        let (part, more) = page.part(most, most_bytes).await?;
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
