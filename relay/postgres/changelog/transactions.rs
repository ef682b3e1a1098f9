//! Transactions whose changes are read in several parts: commit times, and the relations that have more changes.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use time::OffsetDateTime;

use crate::model::log::cursor::Epoch;
use crate::model::row::change::{Change, RelationId};
use crate::postgres::connect::pool::{Error, Lease, Pool};

/// Maximum number of cached transactions: enough for those that a few readers are reading.
const MAX_CACHED: usize = 256;

/// Transactions of a part that have changes after it, with the relations of these changes.
pub type Unfinished = HashMap<u64, Vec<RelationId>>;

/// Completes the changes of a part of a page with facts about their whole transactions.
pub struct Transactions {
    pool: Pool,
    /// Transactions with changes after a part, oldest first. The lock is never held across an await.
    cache: Mutex<VecDeque<(Epoch, u64, Arc<End>)>>,
}

/// The end of a transaction.
#[derive(Clone)]
struct End {
    committed: OffsetDateTime,
    /// The number of its last change in each relation.
    last: Vec<(RelationId, i64)>,
}

impl Transactions {
    /// Creates an empty cache; queries use connections of this pool.
    pub fn new(pool: Pool) -> Self {
        Self { pool, cache: Mutex::default() }
    }

    /// Sets the commit time of all changes: PostgreSQL's own if it records it, else the time of the transaction's latest
    /// change. Returns the transactions that have more changes after these.
    ///
    /// `is_all` means that the part has all remaining changes of its page, of all relations; then no query is needed.
    ///
    /// # Errors
    /// As the connection.
    pub async fn complete(
        &self,
        epoch: Epoch,
        changes: &mut [Change],
        is_all: bool,
    ) -> Result<Unfinished, Error> {
        let Some(through) = changes.last().map(|change| change.number) else { return Ok(Unfinished::new()) };
        let mut latest: HashMap<u64, OffsetDateTime> = HashMap::new();
        for change in &*changes {
            let latest = latest.entry(change.xid).or_insert(change.committed);
            *latest = change.committed.max(*latest);
        }
        let mut ends = self.cached(epoch, &latest);
        if !is_all {
            let unknown: Vec<u64> = latest.keys().filter(|xid| !ends.contains_key(xid)).copied().collect();
            for (xid, end) in self.query(&unknown).await? {
                let end = Arc::new(end);
                if end.last.iter().any(|(_, number)| *number > through) {
                    self.insert(epoch, xid, &end);
                }
                ends.insert(xid, end);
            }
        }
        for change in changes {
            let latest = latest.get(&change.xid).copied().unwrap_or(change.committed);
            change.committed = ends.get(&change.xid).map_or(latest, |end| end.committed);
        }
        let after = |end: &End| {
            let relations = end.last.iter().filter(|(_, number)| *number > through);
            relations.map(|(relation, _)| *relation).collect::<Vec<_>>()
        };
        let unfinished = ends.iter().map(|(xid, end)| (*xid, after(end)));
        Ok(unfinished.filter(|(_, relations)| !relations.is_empty()).collect())
    }

    fn cached(&self, epoch: Epoch, wanted: &HashMap<u64, OffsetDateTime>) -> HashMap<u64, Arc<End>> {
        let cache = self.cache();
        let is_wanted = |of: Epoch, xid: &u64| of == epoch && wanted.contains_key(xid);
        let found = cache.iter().filter(|(of, xid, _)| is_wanted(*of, xid));
        found.map(|(_, xid, end)| (*xid, Arc::clone(end))).collect()
    }

    fn insert(&self, epoch: Epoch, xid: u64, end: &Arc<End>) {
        let mut cache = self.cache();
        if cache.len() == MAX_CACHED {
            cache.pop_front();
        }
        cache.push_back((epoch, xid, Arc::clone(end)));
    }

    async fn query(&self, xids: &[u64]) -> Result<HashMap<u64, End>, Error> {
        let mut ends: HashMap<u64, End> = HashMap::new();
        if xids.is_empty() {
            return Ok(ends);
        }
        let xids: Vec<String> = xids.iter().map(u64::to_string).collect();
        let lease = Lease::of(&self.pool).await?;
        let query = async {
            let client = lease.client()?;
            let ends = "select * from relay.transaction_ends($1::text[]::xid8[])";
            let ends = client.prepare_cached(ends).await?;
            Ok::<_, Error>(client.query(&ends, &[&xids]).await?)
        };
        let rows = query.await;
        lease.done();
        for row in rows? {
            let xid = row.try_get::<_, &str>(0)?.parse();
            let xid = xid.map_err(|_| {
                Error::Unfit(String::from("relay.transaction_ends returned an invalid transaction id"))
            })?;
            let committed = row.try_get(3)?;
            let end = ends.entry(xid).or_insert_with(|| End { committed, last: Vec::new() });
            end.last.push((RelationId::whole(row.try_get(1)?), row.try_get(2)?));
        }
        Ok(ends)
    }

    fn cache(&self) -> MutexGuard<'_, VecDeque<(Epoch, u64, Arc<End>)>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
