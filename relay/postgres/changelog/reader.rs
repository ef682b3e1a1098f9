//! The changelog, read between two snapshots: one statement returns the new snapshot and the changes visible since the old.

use std::collections::HashMap;
use std::pin::Pin;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use time::OffsetDateTime;
use tokio::time::sleep;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row, RowStream, Statement};

use crate::model::log::cursor::{Epoch, Snapshot};
use crate::model::row::change::{self, Change, ChangeHeader, ImageState, Operation, RelationId};
use crate::postgres::catalog::RuleScope;
use crate::postgres::connect::pool::{Error, Lease, NO_PATH, Pool, Server};

/// Time after the query timeout at which PostgreSQL ends a statement that waits for a lock.
const LOCK_GRACE: Duration = Duration::from_secs(1);

/// A connection that reads pages.
pub struct Changelog {
    client: Client,
    page: Statements,
}

/// The statement that reads a page, in forms without parts of the plan: `settled` if no transaction runs in the snapshot before
/// the page, `unowned` if no watched relation belongs to a role of the scope.
struct Statements {
    whole: Statement,
    settled: Statement,
    unowned: Statement,
    settled_unowned: Statement,
}

/// A position in a page. The page has the changes that finished after `seen`, up to `until` (`None`: now); those with numbers
/// above `after` are still to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PagePosition {
    /// The snapshot before this page.
    pub seen: Snapshot,
    /// The page's end, known once its first part was delivered.
    pub until: Option<Snapshot>,
    /// The number of the last change of this page that was delivered.
    pub after: i64,
}

impl PagePosition {
    /// The start of the page after `seen`.
    pub fn after(seen: Snapshot) -> Self {
        Self { seen, until: None, after: 0 }
    }

    /// Whether a server with this snapshot has assigned all transaction ids before the position.
    pub fn is_reached_by(&self, now: &Snapshot) -> bool {
        self.until.as_ref().unwrap_or(&self.seen).xmax() <= now.xmax()
    }
}

/// A page being read: its end is known, its changes arrive.
pub struct Page {
    /// The snapshot at its end.
    pub until: Snapshot,
    /// The WAL position to flush so that a crash cannot undo the page; `None` if it is flushed.
    pub unflushed: Option<String>,
    /// The mark of the rules that fire no event trigger, as of its end; `None` on replay, and before the first change is read.
    pub mark: Option<i64>,
    /// Whether its rows have the mark.
    is_marked: bool,
    changes: Pin<Box<RowStream>>,
}

impl Changelog {
    /// Connects, for statements that the caller gives up after `query_timeout`. Refuses a standby, where running transactions look
    /// finished.
    ///
    /// # Errors
    /// As the connection, or when the server is a standby.
    pub async fn connect(server: &Server, query_timeout: Duration) -> Result<Self, Error> {
        let client = server.connect().await?;
        let standby: bool = client.query_one("select pg_is_in_recovery()", &[]).await?.get(0);
        if standby {
            return Err(Error::Unfit(String::from(
                "this server is a standby: the changelog can only be read on the primary",
            )));
        }
        // Parallel workers would lose the order of the rows; JIT compilation would cost more than the statement.
        // Scans are off, because a plan made while the changelog is small would use one until the next analyze. The plan is
        // generic, because planning for each page would cost more than reading it.
        let settings = "set max_parallel_workers_per_gather = 0; set jit = off; set enable_seqscan = off; set enable_bitmapscan = off; \
                        set plan_cache_mode = force_generic_plan";
        // A statement that waits for a lock ends soon after the relay gave it up. Otherwise each new attempt would occupy one
        // more connection of the server.
        let lock_timeout = (query_timeout + LOCK_GRACE).as_millis();
        client.batch_execute(&format!("{NO_PATH}; {settings}; set lock_timeout = {lock_timeout}")).await?;
        let page = Statements::prepare(&client).await?;
        Ok(Self { client, page })
    }

    /// Whether the connection is not known to be closed.
    pub fn is_open(&self) -> bool {
        !self.client.is_closed()
    }

    /// The connection itself, for notifications.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Returns the epoch of this history; a position of another epoch is invalid.
    ///
    /// # Errors
    /// As the connection.
    pub async fn epoch(&self) -> Result<Epoch, Error> {
        Ok(Epoch(self.client.query_one("select relay.epoch()", &[]).await?.get(0)))
    }

    /// Returns the current snapshot.
    ///
    /// # Errors
    /// As the connection.
    pub async fn now(&self) -> Result<Snapshot, Error> {
        let text: String = self.client.query_one("select pg_current_snapshot()::text", &[]).await?.get(0);
        parse(&text)
    }

    /// Counts the changes of a page after a number, per relation.
    ///
    /// # Errors
    /// As the connection.
    pub async fn counts(
        &self,
        seen: &Snapshot,
        until: &Snapshot,
        after: i64,
    ) -> Result<HashMap<RelationId, i64>, Error> {
        let counts = "select * from relay.page_counts($1::text::pg_snapshot, $2::text::pg_snapshot, $3)";
        let rows = self.client.query(counts, &[&seen.to_string(), &until.to_string(), &after]).await?;
        rows.iter().map(|row| Ok((RelationId::whole(row.try_get(0)?), row.try_get(1)?))).collect()
    }

    /// Opens a page of at most `max_changes` changes: PostgreSQL reads all of the page, but sorts and sends no more. Read it
    /// to the end, or drop it, before opening the next.
    ///
    /// # Errors
    /// As the connection.
    pub async fn open(
        &self,
        position: &PagePosition,
        max_changes: usize,
        scope: &RuleScope,
    ) -> Result<Page, Error> {
        let limit = i64::try_from(max_changes).unwrap_or(i64::MAX - 1);
        let statement = self.page.form(!position.seen.running().is_empty(), !scope.owned.is_empty());
        let mut page = self.open_by(statement, position, &[&limit, &scope.roles, &scope.owned]).await?;
        page.is_marked = true;
        Ok(page)
    }

    /// Opens a page by another statement, whose parameters after those of the position are `more`.
    pub(super) async fn open_by(
        &self,
        statement: &Statement,
        position: &PagePosition,
        more: &[&(dyn ToSql + Sync)],
    ) -> Result<Page, Error> {
        let seen = position.seen.to_string();
        let until = position.until.as_ref().map(ToString::to_string);
        let mut parameters: Vec<&(dyn ToSql + Sync)> = vec![&seen, &until, &position.after];
        parameters.extend(more);
        let mut changes = Box::pin(self.client.query_raw(statement, parameters).await?);
        let header = changes.try_next().await?.ok_or_else(|| unfit("relay.page returned no header"))?;
        Ok(Page {
            until: parse(header.try_get("snapshot")?)?,
            unflushed: header.try_get("unflushed")?,
            mark: None,
            is_marked: false,
            changes,
        })
    }
}

impl Statements {
    async fn prepare(client: &Client) -> Result<Self, Error> {
        let committed = committed(client).await?;
        // The subquery is evaluated for the first change, so that a page without changes does not pay for the mark.
        let page = |some_run, some_owned| {
            format!(
                "select p.*, {committed} as committed, \
                 case when p.number is not null then (select m.mark from relay.rules_mark($5, $6, {some_owned}) m) end as mark \
                 from relay.page($1::text::pg_snapshot, $2::text::pg_snapshot, $3, {some_run}) p limit $4::bigint + 1"
            )
        };
        Ok(Self {
            whole: client.prepare(&page(true, true)).await?,
            settled: client.prepare(&page(false, true)).await?,
            unowned: client.prepare(&page(true, false)).await?,
            settled_unowned: client.prepare(&page(false, false)).await?,
        })
    }

    fn form(&self, some_run: bool, some_owned: bool) -> &Statement {
        match (some_run, some_owned) {
            (true, true) => &self.whole,
            (false, true) => &self.settled,
            (true, false) => &self.unowned,
            (false, false) => &self.settled_unowned,
        }
    }
}

impl Page {
    /// Reads the next changes, up to `max_changes` or the change that reaches `max_bytes` of images. Returns whether more
    /// may follow.
    ///
    /// # Errors
    /// As the connection.
    pub async fn part(&mut self, max_changes: usize, max_bytes: usize) -> Result<(Vec<Change>, bool), Error> {
        let mut changes = Vec::new();
        let mut bytes = 0;
        while let Some(change) = self.next().await? {
            bytes += change.bytes();
            changes.push(change);
            if changes.len() >= max_changes || bytes >= max_bytes {
                return Ok((changes, true));
            }
        }
        Ok((changes, false))
    }

    /// Reads the next change; `None` at the end.
    ///
    /// # Errors
    /// As the connection.
    async fn next(&mut self) -> Result<Option<Change>, Error> {
        match self.changes.next().await {
            None => Ok(None),
            Some(row) => {
                let row = row?;
                if self.is_marked {
                    self.mark = row.try_get("mark")?;
                }
                change(&row).map(Some)
            }
        }
    }
}

/// How the WAL gets flushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flush {
    /// By the relay, at once: there may be no other flush soon.
    AtOnce,
    /// By the commits of writers, within a few milliseconds: a flush of the relay would make each of them wait.
    WithWriters,
}

/// Returns the snapshot before which changes are not kept.
///
/// # Errors
/// As the connection.
pub async fn horizon(pool: &Pool) -> Result<Snapshot, Error> {
    let lease = Lease::of(pool).await?;
    let query = async {
        let client = lease.client()?;
        let horizon = client.prepare_cached("select relay.horizon()").await?;
        parse(client.query_one(&horizon, &[]).await?.get(0))
    };
    let horizon = query.await;
    lease.done();
    horizon
}

/// Pauses between checks for writers' commits, together a few commits on a slow disk.
const PAUSES: [Duration; 6] = [Duration::from_micros(500); 6];

/// Flushes the WAL, so that all earlier commits survive a crash.
///
/// # Errors
/// As the connection.
pub async fn flush(pool: &Pool) -> Result<(), Error> {
    let lease = Lease::of(pool).await?;
    let flushed = async {
        let client = lease.client()?;
        let flush = client.prepare_cached("select relay.flush()").await?;
        client.execute(&flush, &[]).await?;
        Ok(())
    };
    let flushed = flushed.await;
    lease.done();
    flushed
}

/// Waits for others to flush the WAL up to `through`; returns false if they do not within a few milliseconds.
///
/// # Errors
/// As the connection.
pub async fn is_flushed_by_others(pool: &Pool, through: &str) -> Result<bool, Error> {
    let lease = Lease::of(pool).await?;
    let waited = async {
        let client = lease.client()?;
        let reached = client.prepare_cached("select pg_current_wal_flush_lsn() >= $1::text::pg_lsn").await?;
        for pause in PAUSES {
            sleep(pause).await;
            if client.query_one(&reached, &[&through]).await?.get(0) {
                return Ok(true);
            }
        }
        Ok(false)
    };
    let waited = waited.await;
    lease.done();
    waited
}

/// Maximum size of an image; a larger one is reduced to its short values. Writers do this where they can tell cheaply, which
/// they cannot for a value that is small as stored and large as text.
const MAX_IMAGE: usize = 1 << 20;
/// Maximum size of a value in a reduced image.
const MAX_SHORT_VALUE: usize = 1026;

fn image(row: &Row, name: &str, oversize: &mut bool) -> Result<Option<String>, Error> {
    let image: Option<String> = row.try_get(name)?;
    let Some(text) = image.as_deref().filter(|text| text.len() > MAX_IMAGE) else {
        return Ok(image);
    };
    *oversize = true;
    let parsed = change::Row::parse(text)
        .map_err(|_| unfit("relay.page returned an image that is not a JSON object"))?;
    Ok(Some(parsed.without_long_values(MAX_SHORT_VALUE)))
}

/// Returns the SQL expression for the commit time of a page's row `p`: null if PostgreSQL does not record it.
///
/// # Errors
/// As the connection.
pub(super) async fn committed(client: &Client) -> Result<&'static str, Error> {
    let kept = "select current_setting('track_commit_timestamp')::boolean";
    Ok(match client.query_one(kept, &[]).await?.get(0) {
        true => "pg_catalog.pg_xact_commit_timestamp(p.xid::xid8::xid)",
        false => "null::timestamptz",
    })
}

fn change(row: &Row) -> Result<Change, Error> {
    let xid: &str = row.try_get("xid")?;
    let kind = ChangeHeader::parse(row.try_get("kind")?)
        .ok_or_else(|| unfit("relay.page returned an unknown kind of change"))?;
    let mut oversize = kind.oversize;
    let (before, after) = match kind.operation {
        // Its size is checked when it is sent.
        Operation::Broadcast => (None, row.try_get("after")?),
        _ => (image(row, "before", &mut oversize)?, image(row, "after", &mut oversize)?),
    };
    Ok(Change {
        number: row.try_get("number")?,
        xid: xid.parse().map_err(|_| unfit("relay.page returned an invalid transaction id"))?,
        committed: match row.try_get::<_, Option<OffsetDateTime>>("committed")? {
            Some(committed) => committed,
            None => row.try_get("at")?,
        },
        relation: kind.relation,
        leaf: kind.leaf,
        shape: Some(kind.shape),
        began: kind.began,
        image_state: ImageState::default(),
        operation: kind.operation,
        oversize,
        before,
        after,
    })
}

fn parse(snapshot: &str) -> Result<Snapshot, Error> {
    Snapshot::parse(snapshot)
        .map_err(|error| unfit(&format!("PostgreSQL returned an unreadable snapshot: {error}")))
}

fn unfit(why: &str) -> Error {
    Error::Unfit(why.to_owned())
}
