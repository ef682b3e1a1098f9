//! The rows of a table as somebody may see them, and the cursor of that very moment.

use std::pin::pin;
use std::time::Duration;

use deadpool_postgres::{Client, Pool, Timeouts};
use futures_util::TryStreamExt;
use tokio::time::timeout;
use tokio_postgres::Transaction;
use tokio_postgres::types::ToSql;

use crate::model::catalog::relation::{Access, Relation};
use crate::model::identity::claims::Claims;
use crate::model::session::limits::{ExceededLimit, RowLimit};
use crate::model::subscription::paging::OrderBy;
use crate::postgres::connect::pool::{Error, SPELLING, Server, give_up};

/// Connections that read rows as somebody else.
const READERS: usize = 2;

/// Rows asked for at a time.
const AT_ONCE: i32 = 100;

/// Who reads a table that is locked gives way to those who read others.
const LOCK_WAIT: &str = "set local lock_timeout = '40ms'";

/// Policies may call functions that rely on the search path of the login.
const PATH: &str = "set local search_path = default";

/// Reads rows.
pub struct SnapshotRows {
    /// Takes the snapshot and its cursor.
    main: Pool,
    /// Reads in that snapshot, with the reader's role and claims.
    readers: Pool,
    /// How long to wait for one of them. Whoever came first gets it first.
    wait: Duration,
    /// How long one may read: others wait, and a connection on which nothing comes any more may look open for ever.
    patience: Duration,
}

/// What came of reading rows, and where the feed goes on after them.
#[derive(Debug)]
pub struct RowsRead {
    /// There are more than may be given.
    pub beyond: Option<ExceededLimit>,
    /// The cursor.
    pub cursor: String,
}

/// Which rows of a relation, and in which order.
pub struct Selection<'a> {
    /// The relation.
    pub relation: &'a Relation,
    /// What the role may read of it.
    pub access: &'a Access,
    /// What they fulfil, as SQL.
    pub conditions: Vec<&'a str>,
    /// Their order.
    pub order: &'a [OrderBy],
}

/// Takes rows as JSON objects, in their order; false when there is no room for more.
pub type RowSink<'a> = &'a mut (dyn FnMut(&str) -> bool + Send);

impl SnapshotRows {
    /// Reads as the login of `judge`, each statement within `limit`, all of them within `patience`. Whoever finds no place
    /// to read waits for one, for `wait`.
    ///
    /// # Errors
    /// When the pool cannot be built.
    pub fn new(
        main: &Server,
        judge: &Server,
        limit: Duration,
        wait: Duration,
        patience: Duration,
    ) -> Result<Self, Error> {
        Ok(Self { main: main.pool(READERS, limit)?, readers: judge.pool(READERS, limit)?, wait, patience })
    }

    /// Reads the rows of a selection that somebody may see, up to `most`.
    ///
    /// # Errors
    /// As the connections, or what the policies raise.
    pub async fn read(
        &self,
        claims: &Claims,
        selection: &Selection<'_>,
        most: RowLimit,
        take: RowSink<'_>,
    ) -> Result<RowsRead, Error> {
        let wait = Timeouts { wait: Some(self.wait), ..self.readers.timeouts() };
        // The scarcer one first: whoever waits for it holds nothing.
        let mut reader = self.readers.timeout_get(&wait).await?;
        let mut main = self.main.get().await?;
        let found = read_with(&mut main, &mut reader, claims, selection, most, take);
        match timeout(self.patience, found).await {
            Ok(found) => found,
            Err(_) => {
                give_up(&self.readers, reader);
                give_up(&self.main, main);
                Err(Error::Lost("the rows were not read in time"))
            }
        }
    }
}

async fn read_with(
    main: &mut Client,
    reader: &mut Client,
    claims: &Claims,
    selection: &Selection<'_>,
    most: RowLimit,
    take: RowSink<'_>,
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
    // The name is PostgreSQL's own, of digits and hyphens.
    reading.batch_execute(&format!("set transaction snapshot '{name}'; {LOCK_WAIT}; {PATH}")).await?;
    let spelling = Spelling::in_place_of_those_of(&reading).await?;
    let become_somebody = "select set_config('request.jwt.claims', $2, true), \
             set_config('request.jwt.claim.sub', $3, true), set_config('request.jwt.claim.role', $1, true), \
             set_config('role', $1, true)";
    let (role, json, sub) = (claims.role(), &**claims.json(), claims.sub().unwrap_or_default());
    reading.execute(become_somebody, &[&role, &json, &sub]).await?;
    let query = query(&spelling, selection, most.number + 1);
    let beyond = fetch(&reading, &query, &spelling.own(), most, take).await?;
    let who: String = reading.query_one("select current_user::text", &[]).await?.get(0);
    reading.rollback().await?;
    // Its commit is what keeps a crash from taking back what the cursor counts as seen.
    snapshot.commit().await?;
    if who != role {
        return Err(Error::Unfit(String::from("a policy changed the role of whoever reads")));
    }
    Ok(RowsRead { beyond, cursor })
}

/// Reads a few rows at a time: what comes after the bound is never asked for.
async fn fetch(
    reading: &Transaction<'_>,
    query: &str,
    parameters: &[&(dyn ToSql + Sync)],
    most: RowLimit,
    take: RowSink<'_>,
) -> Result<Option<ExceededLimit>, Error> {
    let portal = reading.bind(query, parameters).await?;
    let (mut number, mut bytes) = (0, 0);
    loop {
        let before = number;
        let mut found = pin!(reading.query_portal_raw(&portal, AT_ONCE).await?);
        while let Some(row) = found.try_next().await? {
            let row: &str = row.try_get(0)?;
            number += 1;
            bytes += row.len();
            let beyond = match () {
                () if number > most.number => ExceededLimit::Number,
                () if bytes > most.bytes => ExceededLimit::Bytes,
                () if !take(row) => ExceededLimit::Room,
                () => continue,
            };
            return Ok(Some(beyond));
        }
        if number < before + AT_ONCE as usize {
            return Ok(None);
        }
    }
}

/// The settings that spell a row, where the session has others: set for each row once it is found, and taken back before the policy looks
/// at the next.
struct Spelling(Vec<(&'static str, &'static str, String)>);

impl Spelling {
    async fn in_place_of_those_of(reading: &Transaction<'_>) -> Result<Self, Error> {
        let asked = SPELLING.map(|(name, _)| format!("pg_catalog.current_setting('{name}')")).join(", ");
        let own = reading.query_one(&format!("select {asked}"), &[]).await?;
        let settings = SPELLING.iter().enumerate();
        let settings = settings.map(|(number, (name, value))| (*name, *value, own.get::<_, String>(number)));
        Ok(Self(settings.filter(|(_, value, own)| value != own).collect()))
    }

    /// The session's own settings: the parameters of what [`Self::of`] gives.
    fn own(&self) -> Vec<&(dyn ToSql + Sync)> {
        self.0.iter().map(|(_, _, own)| own as &(dyn ToSql + Sync)).collect()
    }

    /// An expression that spells a row. The elements of an array are computed in their order.
    fn of(&self, row: &str) -> String {
        let spelled = format!("pg_catalog.row_to_json({row})::text");
        if self.0.is_empty() {
            return spelled;
        }
        let set =
            self.0.iter().map(|(name, value, _)| format!("pg_catalog.set_config('{name}', '{value}', true)"));
        let back = self
            .0
            .iter()
            .zip(1..)
            .map(|((name, _, _), number)| format!("pg_catalog.set_config('{name}', ${number}, true)"));
        let steps: Vec<String> = set.chain([spelled]).chain(back).collect();
        format!("(array[{}])[{}]", steps.join(", "), self.0.len() + 1)
    }
}

fn query(spelling: &Spelling, selection: &Selection<'_>, most: usize) -> String {
    let Selection { relation, access, conditions, order } = selection;
    let quote = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
    let list = |names: &[String]| names.iter().map(|name| quote(name)).collect::<Vec<_>>().join(", ");
    // Tables that inherit from it without being its partitions are watched by themselves, if at all.
    let only = if relation.kind == "r" { "only " } else { "" };
    let (schema, table) = (quote(&relation.schema), quote(&relation.table));
    // Row security is PostgreSQL's own to add; the read policy of a relation that cannot have it is not.
    let policy = access.policy.as_deref().filter(|_| matches!(relation.kind.as_str(), "m" | "f"));
    let conditions: Vec<String> = policy
        .into_iter()
        .chain(conditions.iter().copied())
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
        "select {} from (select {} from {only}{schema}.{table}{condition}{order} limit {most}) \
         as \"relay row\"",
        spelling.of("\"relay row\""),
        list(&access.columns)
    )
}
