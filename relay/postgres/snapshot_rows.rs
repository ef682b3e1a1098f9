//! The rows of tables that one subscriber may see, and the cursor of the same snapshot.

use std::pin::pin;
use std::time::Duration;

use deadpool_postgres::{Client, Timeouts};
use futures_util::TryStreamExt;
use tokio_postgres::Transaction;
use tokio_postgres::types::ToSql;

use crate::model::catalog::relation::{Access, Relation};
use crate::model::identity::claims::Claims;
use crate::model::session::limits::{ExceededLimit, RowLimit};
use crate::model::subscription::paging::OrderBy;
use crate::postgres::connect::pool::{Error, Pool, SPELLING, Server, give_up};
use crate::postgres::connect::within::within;

/// Number of connections that read rows as a subscriber.
const READERS: usize = 2;

/// Rows per fetch.
const FETCH_ROWS: i32 = 100;

/// A short lock timeout: a read of a locked table must not keep the connection from reads of other tables.
const LOCK_WAIT: &str = "set local lock_timeout = '40ms'";

/// Policies may call functions that rely on the search path of the login.
const PATH: &str = "set local search_path = default";

/// A reader of rows.
pub struct SnapshotRows {
    /// Connections that take the snapshot and its cursor.
    main: Pool,
    /// Connections that read in that snapshot, with the subscriber's role and claims.
    readers: Pool,
    /// Maximum wait for a reader. Waiting callers are served in order.
    wait: Duration,
    /// Maximum duration of one read: others wait for the connection, and one whose peer is gone may look open for ever.
    read_timeout: Duration,
}

/// The outcome of a read.
#[derive(Debug)]
pub struct RowsRead {
    /// The limit that the rows exceed, if they do.
    pub beyond: Option<ExceededLimit>,
    /// Whether a table has more rows than its page.
    pub is_cut: bool,
    /// The cursor from which the feed continues after these rows.
    pub cursor: String,
}

/// Which rows of a relation to read, and in which order.
pub struct Selection<'a> {
    /// The relation.
    pub relation: &'a Relation,
    /// What the role may read of it.
    pub access: &'a Access,
    /// Conditions on the rows, as SQL.
    pub conditions: Vec<String>,
    /// Sort order.
    pub order: Vec<OrderBy>,
    /// The size of the page, if it is one.
    pub limit: Option<usize>,
}

impl Selection<'_> {
    /// Returns the columns of the relation's key; empty if it has none that the role may read.
    pub fn readable_key(&self) -> Vec<String> {
        let key = &self.relation.key;
        if key.iter().all(|column| self.access.sees(column)) { key.to_vec() } else { Vec::new() }
    }
}

/// Receives rows as JSON objects, in order, each with the number of its selection; returns false when there is no room for more.
pub type RowSink<'a> = &'a mut (dyn FnMut(usize, &str) -> bool + Send);

impl SnapshotRows {
    /// Creates a reader with the login of `judge`. Each statement ends after `limit`, each read after `read_timeout`; a
    /// read waits for a free connection for at most `wait`.
    ///
    /// # Errors
    /// When the pool cannot be built.
    pub fn new(
        main: &Server,
        judge: &Server,
        limit: Duration,
        wait: Duration,
        read_timeout: Duration,
    ) -> Result<Self, Error> {
        let (main, readers) = (main.pool(READERS, limit)?, judge.pool(READERS, limit)?);
        Ok(Self { main, readers, wait, read_timeout })
    }

    /// Reads the rows of selections that a subscriber with these claims may see, in one snapshot, up to `max_rows` together.
    ///
    /// # Errors
    /// As the connections, or what the policies raise.
    pub async fn read(
        &self,
        claims: &Claims,
        selections: &[Selection<'_>],
        max_rows: RowLimit,
        sink: RowSink<'_>,
    ) -> Result<RowsRead, Error> {
        let wait = Timeouts { wait: Some(self.wait), ..self.readers.timeouts() };
        // The scarce connection first, so that a waiting caller holds no other.
        let mut reader = self.readers.timeout_get(&wait).await?;
        let mut main = self.main.get().await?;
        let read = read_with(&mut main, &mut reader, claims, selections, max_rows, sink);
        let read = within(self.read_timeout, "the connection that reads rows", read).await;
        if matches!(read, Err(Error::Late { .. })) {
            give_up(&self.readers, reader);
            give_up(&self.main, main);
        }
        read
    }
}

async fn read_with(
    main: &mut Client,
    reader: &mut Client,
    claims: &Claims,
    selections: &[Selection<'_>],
    max_rows: RowLimit,
    sink: RowSink<'_>,
) -> Result<RowsRead, Error> {
    let snapshot = main
        .build_transaction()
        .isolation_level(tokio_postgres::IsolationLevel::RepeatableRead)
        .start()
        .await?;
    let taken = snapshot.query_one("select relay.cursor(), pg_export_snapshot()", &[]).await?;
    let (cursor, name): (String, String) = (taken.get(0), taken.get(1));
    let reading = reader
        .build_transaction()
        .isolation_level(tokio_postgres::IsolationLevel::RepeatableRead)
        .read_only(true)
        .start()
        .await?;
    // PostgreSQL made the name, of digits and hyphens: it needs no quoting.
    reading.batch_execute(&format!("set transaction snapshot '{name}'; {LOCK_WAIT}; {PATH}")).await?;
    let formats = OutputFormats::differing_in(&reading).await?;
    let impersonate = "select set_config('request.jwt.claims', $2, true), \
             set_config('request.jwt.claim.sub', $3, true), set_config('request.jwt.claim.role', $1, true), \
             set_config('role', $1, true)";
    let (role, json, sub) = (claims.role(), &**claims.json(), claims.sub().unwrap_or_default());
    reading.execute(impersonate, &[&role, &json, &sub]).await?;
    let (mut left, mut is_cut, mut beyond) = (max_rows, false, None);
    for (number, selection) in selections.iter().enumerate() {
        let page = selection.limit.filter(|limit| *limit <= left.number);
        let most = RowLimit { number: page.unwrap_or(left.number), ..left };
        let query = query(&formats, selection, most.number + 1);
        let mut take = |row: &str| sink(number, row);
        let (exceeded, read) = fetch(&reading, &query, &formats.session_values(), most, &mut take).await?;
        left = RowLimit { number: left.number - read.number, bytes: left.bytes - read.bytes };
        match exceeded {
            Some(ExceededLimit::Number) if page.is_some() => is_cut = true,
            None => {}
            Some(_) => {
                beyond = exceeded;
                break;
            }
        }
    }
    let current_user: String = reading.query_one("select current_user::text", &[]).await?.get(0);
    reading.rollback().await?;
    // The commit flushes what the cursor counts as seen, so that a crash cannot lose it.
    snapshot.commit().await?;
    if current_user != role {
        return Err(Error::Unfit(String::from("a policy changed the role of the reading session")));
    }
    Ok(RowsRead { beyond, is_cut, cursor })
}

/// Reads rows in fetches of [`FETCH_ROWS`], and stops at the first row beyond the limit. Returns also how much was read.
async fn fetch(
    reading: &Transaction<'_>,
    query: &str,
    parameters: &[&(dyn ToSql + Sync)],
    max_rows: RowLimit,
    sink: &mut (dyn FnMut(&str) -> bool + Send),
) -> Result<(Option<ExceededLimit>, RowLimit), Error> {
    let portal = reading.bind(query, parameters).await?;
    let (mut number, mut bytes) = (0, 0);
    loop {
        let before = number;
        let mut rows = pin!(reading.query_portal_raw(&portal, FETCH_ROWS).await?);
        while let Some(row) = rows.try_next().await? {
            let row: &str = row.try_get(0)?;
            number += 1;
            bytes += row.len();
            let beyond = match () {
                () if number > max_rows.number => ExceededLimit::Number,
                () if bytes > max_rows.bytes => ExceededLimit::Bytes,
                () if !sink(row) => ExceededLimit::Room,
                () => continue,
            };
            let read = RowLimit { number: number.min(max_rows.number), bytes: bytes.min(max_rows.bytes) };
            return Ok((Some(beyond), read));
        }
        if number < before + FETCH_ROWS as usize {
            return Ok((None, RowLimit { number, bytes }));
        }
    }
}

/// The output settings of row images that differ in this session: name, value for the image, value of the session. They are
/// set for the output of each row and reset before the policy is evaluated on the next.
struct OutputFormats(Vec<(&'static str, &'static str, String)>);

impl OutputFormats {
    async fn differing_in(reading: &Transaction<'_>) -> Result<Self, Error> {
        let current = SPELLING.map(|(name, _)| format!("pg_catalog.current_setting('{name}')")).join(", ");
        let current = reading.query_one(&format!("select {current}"), &[]).await?;
        let settings = SPELLING.iter().enumerate();
        let settings =
            settings.map(|(number, (name, value))| (*name, *value, current.get::<_, String>(number)));
        Ok(Self(settings.filter(|(_, value, current)| value != current).collect()))
    }

    /// The session's values: the parameters of the expression that [`Self::to_json`] returns.
    fn session_values(&self) -> Vec<&(dyn ToSql + Sync)> {
        self.0.iter().map(|(_, _, value)| value as &(dyn ToSql + Sync)).collect()
    }

    /// Returns an expression for a row as JSON. It relies on PostgreSQL computing array elements in order.
    fn to_json(&self, row: &str) -> String {
        let json = format!("pg_catalog.row_to_json({row})::text");
        if self.0.is_empty() {
            return json;
        }
        let set =
            self.0.iter().map(|(name, value, _)| format!("pg_catalog.set_config('{name}', '{value}', true)"));
        let reset = self
            .0
            .iter()
            .zip(1..)
            .map(|((name, _, _), number)| format!("pg_catalog.set_config('{name}', ${number}, true)"));
        let steps: Vec<String> = set.chain([json]).chain(reset).collect();
        format!("(array[{}])[{}]", steps.join(", "), self.0.len() + 1)
    }
}

fn query(formats: &OutputFormats, selection: &Selection<'_>, limit: usize) -> String {
    let Selection { relation, access, conditions, order, .. } = selection;
    let quote = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
    let list = |names: &[String]| names.iter().map(|name| quote(name)).collect::<Vec<_>>().join(", ");
    // Inheriting tables that are not partitions are watched separately, if at all.
    let only = if relation.kind == "r" { "only " } else { "" };
    let (schema, table) = (quote(&relation.schema), quote(&relation.table));
    // PostgreSQL adds row security itself. It does not know the read policy of a relation that cannot have row security.
    let policy = access.policy.as_deref().filter(|_| matches!(relation.kind.as_str(), "m" | "f"));
    let conditions: Vec<String> = policy
        .into_iter()
        .chain(conditions.iter().map(String::as_str))
        .map(|condition| format!("({condition}\n)"))
        .collect();
    let condition = match conditions.is_empty() {
        true => String::new(),
        false => format!(" where {}", conditions.join(" and ")),
    };
    let term = |by: &OrderBy| {
        let direction = if by.descending { "desc" } else { "asc" };
        let nulls = if by.nulls_first { "first" } else { "last" };
        format!("{} {direction} nulls {nulls}", quote(&by.column))
    };
    let order = match order.iter().map(term).collect::<Vec<_>>().join(", ") {
        none if none.is_empty() => none,
        terms => format!(" order by {terms}"),
    };
    format!(
        "select {} from (select {} from {only}{schema}.{table}{condition}{order} limit {limit}) \
         as \"relay row\"",
        formats.to_json("\"relay row\""),
        list(&access.columns)
    )
}
