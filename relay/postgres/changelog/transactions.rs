//! Transactions whose changes are read in several parts: when each committed, and in which relations it goes on.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use deadpool_postgres::Pool;
use time::OffsetDateTime;

use crate::model::log::cursor::Epoch;
use crate::model::row::change::{Change, RelationId};
use crate::postgres::connect::pool::{Error, Lease};

/// So many transactions are remembered: those that a few readers are amid.
const REMEMBERED: usize = 256;

/// The transactions of a part that have changes after it, and of which relations.
pub type Unfinished = HashMap<u64, Vec<RelationId>>;

/// Completes what a part of a page says of its transactions.
pub struct Transactions {
    pool: Pool,
    /// Those that went on after a part, the oldest first. Never held across an await.
    known: Mutex<VecDeque<(Epoch, u64, Arc<End>)>>,
}

/// Where a transaction ends.
#[derive(Clone)]
struct End {
    committed: OffsetDateTime,
    /// The number of its last change of each relation.
    last: Vec<(RelationId, i64)>,
}

impl Transactions {
    /// Asks by connections of this pool.
    pub fn new(pool: Pool) -> Self {
        Self { pool, known: Mutex::default() }
    }

    /// Gives all changes of a transaction its commit time: PostgreSQL's own where it keeps that, else the time of the
    /// transaction's latest change. Returns which transactions go on after these changes.
    ///
    /// `is_all` says that the part has all that is left of its page, of all relations; then nothing is asked.
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
        let mut ends = self.remembered(epoch, &latest);
        if !is_all {
            let unknown: Vec<u64> = latest.keys().filter(|xid| !ends.contains_key(xid)).copied().collect();
            for (xid, end) in self.asked(&unknown).await? {
                let end = Arc::new(end);
                if end.last.iter().any(|(_, number)| *number > through) {
                    self.remember(epoch, xid, &end);
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

    fn remembered(&self, epoch: Epoch, wanted: &HashMap<u64, OffsetDateTime>) -> HashMap<u64, Arc<End>> {
        let known = self.known();
        let is_wanted = |of: Epoch, xid: &u64| of == epoch && wanted.contains_key(xid);
        let found = known.iter().filter(|(of, xid, _)| is_wanted(*of, xid));
        found.map(|(_, xid, end)| (*xid, Arc::clone(end))).collect()
    }

    fn remember(&self, epoch: Epoch, xid: u64, end: &Arc<End>) {
        let mut known = self.known();
        if known.len() == REMEMBERED {
            known.pop_front();
        }
        known.push_back((epoch, xid, Arc::clone(end)));
    }

    async fn asked(&self, xids: &[u64]) -> Result<HashMap<u64, End>, Error> {
        let mut ends: HashMap<u64, End> = HashMap::new();
        if xids.is_empty() {
            return Ok(ends);
        }
        let xids: Vec<String> = xids.iter().map(u64::to_string).collect();
        let lease = Lease::of(&self.pool).await?;
        let asked = async {
            let client = lease.client()?;
            let ends = "select * from relay.transaction_ends($1::text[]::xid8[])";
            let ends = client.prepare_cached(ends).await?;
            Ok::<_, Error>(client.query(&ends, &[&xids]).await?)
        };
        let rows = asked.await;
        lease.done();
        for row in rows? {
            let xid = row.try_get::<_, &str>(0)?.parse();
            let xid =
                xid.map_err(|_| Error::Unfit(String::from("relay.transaction_ends gave no transaction id")))?;
            let committed = row.try_get(3)?;
            let end = ends.entry(xid).or_insert_with(|| End { committed, last: Vec::new() });
            end.last.push((RelationId(row.try_get(1)?), row.try_get(2)?));
        }
        Ok(ends)
    }

    fn known(&self) -> MutexGuard<'_, VecDeque<(Epoch, u64, Arc<End>)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
