//! The changelog, read between two snapshots: one statement gives the new snapshot and what became visible since.

use std::collections::HashMap;
use std::pin::Pin;
use std::time::Duration;

use deadpool_postgres::Pool;
use futures_util::{StreamExt, TryStreamExt};
use time::OffsetDateTime;
use tokio::time::sleep;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row, RowStream, Statement};

use crate::model::log::cursor::{Epoch, Snapshot};
use crate::model::row::change::{self, Change, ChangeHeader, ImageState, RelationId};
use crate::postgres::catalog::RuleScope;
use crate::postgres::connect::pool::{Error, Lease, NO_PATH, Server};

/// A connection that reads pages.
pub struct Changelog {
    client: Client,
    page: Statements,
}

/// The statement that reads a page, in forms that lack what is not asked for: which transactions ran in the snapshot before it,
/// and whose owner is one of the roles.
struct Statements {
    whole: Statement,
    settled: Statement,
    unowned: Statement,
    settled_unowned: Statement,
}

/// Which page: what finished after `seen`, up to `until` (now, when none), with numbers above `after`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PagePosition {
    /// What was delivered before this page.
    pub seen: Snapshot,
    /// The page's end, when it is known because a first part of the page was delivered.
    pub until: Option<Snapshot>,
    /// The number of the last change delivered of this page.
    pub after: i64,
}

impl PagePosition {
    /// The start of the page after `seen`.
    pub fn after(seen: Snapshot) -> Self {
        Self { seen, until: None, after: 0 }
    }

    /// Whether a server with this snapshot has handed out all transaction ids that the position knows.
    pub fn is_reached_by(&self, now: &Snapshot) -> bool {
        self.until.as_ref().unwrap_or(&self.seen).xmax() <= now.xmax()
    }
}

/// A page being read: its end is known, its changes arrive.
pub struct Page {
    /// The snapshot at its end.
    pub until: Snapshot,
    /// Up to where the log has to be flushed so that a crash cannot take anything of it back; none when it is.
    pub unflushed: Option<String>,
    /// The sign of the rules that fire no event trigger, as they were at its end; none for a page of the past and before
    /// the first change was read.
    pub mark: Option<i64>,
    /// Its rows have the mark.
    is_marked: bool,
    changes: Pin<Box<RowStream>>,
}

impl Changelog {
    /// Connects. Refuses a standby, where running transactions look finished.
    ///
    /// # Errors
    /// As the connection, or when the server is a standby.
    pub async fn connect(server: &Server) -> Result<Self, Error> {
        let client = server.connect().await?;
        let standby: bool = client.query_one("select pg_is_in_recovery()", &[]).await?.get(0);
        if standby {
            return Err(Error::Unfit(String::from(
                "this server is a standby: the changelog can only be read on the primary",
            )));
        }
        // Parallel workers would give up the order of the rows; the JIT compiler would cost more than the statement.
        // A plan made while the changelog was small would scan all of it until the next analyze, and one made for each
        // look would cost more than the look: hence the index, and one plan.
        let settings = "set max_parallel_workers_per_gather = 0; set jit = off; set enable_seqscan = off; set enable_bitmapscan = off; \
                        set plan_cache_mode = force_generic_plan";
        client.batch_execute(&format!("{NO_PATH}; {settings}")).await?;
        let page = Statements::prepare(&client).await?;
        Ok(Self { client, page })
    }

    /// Whether the connection still stands, as far as is known.
    pub fn is_open(&self) -> bool {
        !self.client.is_closed()
    }

    /// The connection itself, to ring from.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The name of this history; another one makes every position void.
    ///
    /// # Errors
    /// As the connection.
    pub async fn epoch(&self) -> Result<Epoch, Error> {
        Ok(Epoch(self.client.query_one("select relay.epoch()", &[]).await?.get(0)))
    }

    /// The snapshot of this moment.
    ///
    /// # Errors
    /// As the connection.
    pub async fn now(&self) -> Result<Snapshot, Error> {
        let text: String = self.client.query_one("select pg_current_snapshot()::text", &[]).await?.get(0);
        parse(&text)
    }

    /// How many changes of which relation a page has after a number.
    ///
    /// # Errors
    /// As the connection.
    pub async fn counts(
        &self,
        seen: &Snapshot,
        until: &Snapshot,
        after: i64,
    ) -> Result<HashMap<RelationId, i64>, Error> {
        let question = "select * from relay.page_counts($1::text::pg_snapshot, $2::text::pg_snapshot, $3)";
        let rows = self.client.query(question, &[&seen.to_string(), &until.to_string(), &after]).await?;
        rows.iter().map(|row| Ok((RelationId(row.try_get(0)?), row.try_get(1)?))).collect()
    }

    /// Opens a page, of which the first so many changes come: PostgreSQL looks at all of it, but neither sorts nor sends
    /// more. They must be read to the end, or the page dropped, before the next is opened.
    ///
    /// # Errors
    /// As the connection.
    pub async fn open(&self, position: &PagePosition, most: usize, scope: &RuleScope) -> Result<Page, Error> {
        let most = i64::try_from(most).unwrap_or(i64::MAX - 1);
        let statement = self.page.form(!position.seen.running().is_empty(), !scope.owned.is_empty());
        let mut page = self.open_by(statement, position, &[&most, &scope.roles, &scope.owned]).await?;
        page.is_marked = true;
        Ok(page)
    }

    /// The same by another statement, which takes these parameters after those that say where.
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
        let header = changes.try_next().await?.ok_or_else(|| unfit("relay.page gave no header"))?;
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
        // A page without changes needs no mark: the subquery is evaluated when the first of them asks for it.
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
    /// The next changes, up to so many or so many bytes of images, and whether more may follow.
    ///
    /// # Errors
    /// As the connection.
    pub async fn part(&mut self, most: usize, most_bytes: usize) -> Result<(Vec<Change>, bool), Error> {
        let mut changes = Vec::new();
        let mut bytes = 0;
        while let Some(change) = self.next().await? {
            bytes += change.bytes();
            changes.push(change);
            if changes.len() >= most || bytes >= most_bytes {
                return Ok((changes, true));
            }
        }
        Ok((changes, false))
    }

    /// The next change; none at the end.
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

/// Who sees to it that the log is flushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flush {
    /// We, now: nobody else may be about to.
    AtOnce,
    /// Writers, by their own commits, for a few milliseconds: another flush of ours would make each of them wait for it.
    WithWriters,
}

/// The snapshot before which changes are not kept any more.
///
/// # Errors
/// As the connection.
pub async fn horizon(pool: &Pool) -> Result<Snapshot, Error> {
    let lease = Lease::of(pool).await?;
    let asked = async {
        let client = lease.client()?;
        let horizon = client.prepare_cached("select relay.horizon()").await?;
        parse(client.query_one(&horizon, &[]).await?.get(0))
    };
    let horizon = asked.await;
    lease.done();
    horizon
}

/// How long writers' commits are waited for: a few of them on a slow disk.
const PAUSES: [Duration; 6] = [Duration::from_micros(500); 6];

/// Waits until everything up to now survives a crash.
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

/// Waits for others to flush the log up to a place in it; false when they do not for long.
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

/// An image over this is cut down to its short values. Writers do so themselves where they can tell cheaply; a
/// value that is small as it is stored and large as text they cannot.
const MOST_IMAGE: usize = 1 << 20;
/// The longest value that is kept of such an image.
const SHORT: usize = 1026;

fn image(row: &Row, name: &str, oversize: &mut bool) -> Result<Option<String>, Error> {
    let image: Option<String> = row.try_get(name)?;
    let Some(text) = image.as_deref().filter(|text| text.len() > MOST_IMAGE) else {
        return Ok(image);
    };
    *oversize = true;
    let parsed = change::Row::parse(text).map_err(|_| unfit("relay.page gave an image that is no object"))?;
    Ok(Some(parsed.without_long_values(SHORT)))
}

/// What a statement says of the row `p` of a page: when its transaction committed, where PostgreSQL keeps that.
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
        .ok_or_else(|| unfit("relay.page gave an unknown kind of change"))?;
    let mut oversize = kind.oversize;
    let (before, after) = (image(row, "before", &mut oversize)?, image(row, "after", &mut oversize)?);
    Ok(Change {
        number: row.try_get("number")?,
        xid: xid.parse().map_err(|_| unfit("relay.page gave no transaction id"))?,
        committed: match row.try_get::<_, Option<OffsetDateTime>>("committed")? {
            Some(committed) => committed,
            None => row.try_get("at")?,
        },
        relation: kind.relation,
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
        .map_err(|error| unfit(&format!("PostgreSQL gave a snapshot we cannot read: {error}")))
}

fn unfit(why: &str) -> Error {
    Error::Unfit(why.to_owned())
}
