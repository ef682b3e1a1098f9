//! Evaluates in one query what has one answer for all subscribers: facts about row images, and which subscribers may see
//! them.
//!
//! Connected subscribers are rows of temporary tables, one table per query of a plan, updated before the query runs.
//! So PostgreSQL starts with the row image, finds the users it refers to by index, and the connected ones among them by
//! index. These queries cannot read claims or call user-defined functions: only therefore may subscribers share one.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use crate::model::catalog::relation::Relation;
use crate::model::policy::plan::{READER, ServerQuery};
use crate::model::policy::visibility::Denied;
use crate::model::row::datum::Kind;
use crate::model::row::truth::Truth;
use crate::postgres::connect::pool::{Error, JUDGING, Server};
use crate::postgres::evaluate::circuit_breaker::CircuitBreaker;
use crate::postgres::evaluate::impersonation::{ActingAs, Bisection, Impersonation, reads_back};
use crate::postgres::evaluate::per_identity::reading;

/// The evaluator, with its connection.
pub struct SetEvaluator {
    server: Server,
    limit: Duration,
    session: Mutex<Option<SetSession>>,
    slow: CircuitBreaker,
    /// Number of consecutive sessions that ended during a query.
    losses: AtomicU32,
}

struct SetSession {
    impersonation: Impersonation,
    tables: HashMap<TableKey, SubscriberTable>,
    /// Whether the login may not create temporary tables.
    without_tables: bool,
}

/// The ids of a subscriber set and of a query of the plan.
type TableKey = (u64, usize);

/// A temporary table of subscribers.
#[derive(Default)]
struct SubscriberTable {
    /// The greatest number inserted so far.
    through: Option<u64>,
    rows: usize,
    /// Row count at the last ANALYZE.
    analyzed: usize,
}

/// Subscribers that a policy applies to, with ascending numbers.
pub trait SubscriberSet: Send + Sync {
    /// A unique id of the set.
    fn id(&self) -> u64;
    /// Current number of subscribers.
    fn count(&self) -> usize;
    /// Subscribers after this number, with the texts of these terms; those that lack a term are left out.
    fn after(&self, number: Option<u64>, terms: &[(usize, Kind)]) -> Vec<(u64, Vec<Arc<str>>)>;
    /// The greatest number assigned so far.
    fn last(&self) -> Option<u64>;
}

/// A query about a page of images.
pub struct SetQuery<'a> {
    /// The relation of the images.
    pub relation: &'a Relation,
    /// The role whose rights apply.
    pub role: &'a str,
    /// Another role that runs the query, because it contains the row security of the tables that it reads.
    pub reads_as: Option<&'a str>,
    /// The query, and its number in the plan.
    pub leaf: (usize, &'a ServerQuery),
    /// The connected subscribers.
    pub roster: &'a dyn SubscriberSet,
    /// The images as JSON.
    pub images: &'a [String],
}

/// The answer for one image.
#[derive(Debug, Clone, PartialEq)]
pub enum SetAnswer {
    /// The value of a fact.
    Fact(Truth),
    /// The numbers of the subscribers for whom the query holds, ascending.
    Readers(Vec<u64>),
    /// No answer: the query raised, timed out, or cannot be evaluated for a set.
    Nothing(Truth),
}

impl SetEvaluator {
    /// Creates an evaluator that connects with the login of `server`. Each statement ends after `limit`.
    pub fn new(server: Server, limit: Duration) -> Self {
        Self {
            server,
            limit,
            session: Mutex::new(None),
            slow: CircuitBreaker::new(limit),
            losses: AtomicU32::new(0),
        }
    }

    /// Discards the session with its tables and plans, after the rules changed.
    pub async fn forget(&self) {
        *self.session.lock().await = None;
    }

    /// Returns one answer per image, and the number of statements run.
    ///
    /// # Errors
    /// Only when the connection fails. There is no result then: call again.
    pub async fn ask(&self, query: &SetQuery<'_>) -> Result<(Vec<SetAnswer>, usize), Error> {
        let statement: Arc<str> = statement(query).into();
        let nothing = |truth| Ok((vec![SetAnswer::Nothing(truth); query.images.len()], 0));
        if self.slow.is_open(&statement) {
            return nothing(Truth::TimedOut);
        }
        let mut slot = self.session.lock().await;
        let mut session = match slot.take() {
            Some(session) if !session.impersonation.client.is_closed() => session,
            _ => SetSession {
                impersonation: Impersonation::open(
                    &self.server,
                    &format!("{JUDGING}; {SETTINGS}"),
                    self.limit,
                )
                .await?,
                tables: HashMap::new(),
                without_tables: false,
            },
        };
        if !query.leaf.1.by().is_empty() {
            if !session.without_tables
                && let Err(error) = session.update_table(query).await
            {
                if session.impersonation.client.is_closed() {
                    return Err(error);
                }
                tracing::warn!(error = %error, "judging login cannot use temporary tables, subscribers are evaluated one by one");
                session.without_tables = true;
            }
            if session.without_tables {
                *slot = Some(session);
                return nothing(Truth::Undecided);
            }
        }
        let (answers, statements, denied) = match session.run(query, &statement).await {
            Ok(result) => result,
            Err(error) => return self.lost(&mut slot, error, query),
        };
        self.losses.store(0, Relaxed);
        if denied == Some(Denied::TimedOut) {
            self.slow.open(&statement);
        }
        if denied != Some(Denied::Role) {
            *slot = Some(session);
        }
        Ok((answers, statements))
    }

    /// Handles a session that ended. The first losses in a row count as server failures, and the caller retries. After that
    /// the query is taken for the cause: it is left undecided, so that it does not block the others.
    fn lost(
        &self,
        slot: &mut Option<SetSession>,
        error: Error,
        query: &SetQuery<'_>,
    ) -> Result<(Vec<SetAnswer>, usize), Error> {
        *slot = None;
        match self.losses.fetch_add(1, Relaxed) {
            0..2 => Err(error),
            _ => Ok((vec![SetAnswer::Nothing(Truth::Undecided); query.images.len()], 1)),
        }
    }
}

impl SetSession {
    /// Creates the query's table of subscribers, or adds the subscribers that it lacks.
    async fn update_table(&mut self, query: &SetQuery<'_>) -> Result<(), Error> {
        let (number, leaf) = query.leaf;
        let key = (query.roster.id(), number);
        let name = table_name(key);
        let client = &self.impersonation.client;
        let Some(table) = self.tables.get_mut(&key) else {
            client.batch_execute(&create_table(&name, leaf)).await?;
            self.tables.insert(key, SubscriberTable::default());
            return Box::pin(self.update_table(query)).await;
        };
        if table.rows > SLACK + 2 * query.roster.count() {
            client.batch_execute(&format!("truncate {name}")).await?;
            *table = SubscriberTable::default();
        }
        if table.through >= query.roster.last() {
            return Ok(());
        }
        let added = query.roster.after(table.through, leaf.by());
        let ids: Vec<i64> = added.iter().map(|(id, _)| id.cast_signed()).collect();
        let values: Vec<Vec<&str>> =
            (0..leaf.by().len()).map(|at| added.iter().map(|(_, texts)| &*texts[at]).collect()).collect();
        let mut parameters: Vec<&(dyn ToSql + Sync)> = vec![&ids];
        parameters.extend(values.iter().map(|texts| texts as &(dyn ToSql + Sync)));
        let (mut arrays, mut columns, mut casts) = (String::new(), String::new(), String::new());
        for (at, (_, kind)) in leaf.by().iter().enumerate() {
            let _ = write!(arrays, ", ${}::text[]", at + 2);
            let _ = write!(columns, ", v{at}");
            let _ = write!(casts, ", v{at}::{}", type_name(*kind));
        }
        let insert =
            format!("insert into {name} select id{casts} from unnest($1::bigint[]{arrays}) r (id{columns})");
        client.execute(&insert, &parameters).await?;
        table.rows += added.len();
        table.through = query.roster.last();
        if table.rows > 2 * table.analyzed {
            client.batch_execute(&format!("analyze {name}")).await?;
            table.analyzed = table.rows;
        }
        Ok(())
    }

    /// Runs the statement on all images, bisecting those that make it raise. Returns one answer per image, the number of
    /// statements run, and why all were denied, if they were.
    async fn run(
        &mut self,
        query: &SetQuery<'_>,
        statement: &Arc<str>,
    ) -> Result<(Vec<SetAnswer>, usize, Option<Denied>), Error> {
        let all = |truth| vec![SetAnswer::Nothing(truth); query.images.len()];
        let is_fact = matches!(query.leaf.1, ServerQuery::Fact { .. });
        // A query that contains row security may raise for a row that PostgreSQL hides first, and the rights of the other role may
        // have changed. Both are left undecided, and each subscriber's own role is asked.
        let is_final = is_fact && query.reads_as.is_none();
        let as_role = query.reads_as.map_or(ActingAs::of_role(query.role), ActingAs::past_row_security);
        self.impersonation.make_room(2);
        if let Err(denied) = self.impersonation.prepare(as_role, statement).await? {
            let truth = match denied {
                Denied::Raised if !is_final => Truth::Undecided,
                denied => truth_of(denied),
            };
            return Ok((all(truth), 1, Some(denied)));
        }
        let reading: Arc<str> = reading(query.relation).into();
        let _ = self.impersonation.prepare(as_role, &reading).await?;
        let Some(prepared) = self.impersonation.prepared(statement) else {
            return Ok((all(Truth::Error), 1, None));
        };
        let mut answers = all(Truth::Error);
        let mut statements = 0;
        let mut ranges = Bisection::of(query.images.len());
        while let Some(range) = ranges.next() {
            let images = &query.images[range.clone()];
            statements += 1;
            match self.impersonation.query(as_role, prepared, &[&images]).await? {
                Ok(rows) if is_fact => read_facts(&rows, &mut answers[range])?,
                Ok(rows) => read_subscribers(rows, &mut answers[range])?,
                Err(Denied::Raised) => {
                    // A query can raise for one subscriber and not for another. A fact raises for all, unless the image
                    // itself cannot be read back, which the per-identity evaluator finds out.
                    if range.len() == 1
                        && (!is_final || !reads_back(&self.impersonation, as_role, &reading, images).await?)
                    {
                        answers[range.start] = SetAnswer::Nothing(Truth::Undecided);
                    }
                    ranges.split(range);
                }
                Err(denied @ Denied::Role) if query.reads_as.is_some() => {
                    return Ok((all(Truth::Undecided), statements, Some(denied)));
                }
                Err(denied) => return Ok((all(truth_of(denied)), statements, Some(denied))),
            }
        }
        Ok((answers, statements, None))
    }
}

/// Reads the facts of images from the result of their statement: one row with one array.
fn read_facts(rows: &[Row], answers: &mut [SetAnswer]) -> Result<(), Error> {
    let facts: Vec<Option<bool>> = match rows.first() {
        Some(row) => row.try_get(0)?,
        None => Vec::new(),
    };
    for (answer, fact) in answers.iter_mut().zip(facts) {
        *answer = SetAnswer::Fact(fact.into());
    }
    Ok(())
}

/// Reads the subscribers of images from the result of their statement: rows of an image's number, from 1, and a subscriber.
fn read_subscribers(rows: Vec<Row>, answers: &mut [SetAnswer]) -> Result<(), Error> {
    answers.fill(SetAnswer::Readers(Vec::new()));
    for row in rows {
        let (image, id): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
        let image = usize::try_from(image - 1).ok();
        if let Some(SetAnswer::Readers(subscribers)) = image.and_then(|image| answers.get_mut(image)) {
            subscribers.push(id.cast_unsigned());
        }
    }
    for answer in answers {
        if let SetAnswer::Readers(subscribers) = answer {
            subscribers.sort_unstable();
        }
    }
    Ok(())
}

fn truth_of(denied: Denied) -> Truth {
    match denied {
        Denied::TimedOut | Denied::Locked => Truth::TimedOut,
        Denied::Raised | Denied::Claims | Denied::Unreadable | Denied::Role => Truth::Error,
    }
}

/// Settings of the session. All names in these statements are qualified, and a generic plan is as good as a custom one.
pub(super) const SETTINGS: &str = "set search_path = ''; set plan_cache_mode = force_generic_plan; set join_collapse_limit = 12; set from_collapse_limit = 12; set synchronous_commit = off; \
     set default_transaction_read_only = off";

/// Number of rows of subscribers that left, beyond the number of those connected, at which a table is refilled.
const SLACK: usize = 1000;

fn table_name((roster, leaf): TableKey) -> String {
    format!("pg_temp.readers_{roster}_{leaf}")
}

fn create_table(name: &str, leaf: &ServerQuery) -> String {
    let columns: String = leaf.by().iter().enumerate().fold(String::new(), |mut text, (at, (_, kind))| {
        let _ = write!(text, ", v{at} {}", type_name(*kind));
        text
    });
    let names: Vec<String> = (0..leaf.by().len()).map(|at| format!("v{at}")).collect();
    format!(
        "create temporary table {name} (id bigint primary key{columns}); create index on {name} ({}); \
         grant select on {name} to public",
        names.join(", ")
    )
}

pub(super) fn type_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Bool => "pg_catalog.bool",
        Kind::Int2 => "pg_catalog.int2",
        Kind::Int4 => "pg_catalog.int4",
        Kind::Int8 => "pg_catalog.int8",
        Kind::Uuid => "pg_catalog.uuid",
        Kind::Text | Kind::Varchar | Kind::Enum => "pg_catalog.text",
    }
}

/// Returns the statement for a query: `$1` are row images as JSON. The images have the relation's own name, so that columns,
/// `todos.col` and whole rows resolve as they do in a policy.
fn statement(query: &SetQuery<'_>) -> String {
    let quote = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
    let (schema, table) = (quote(&query.relation.schema), quote(&query.relation.table));
    let images = "pg_catalog.unnest($1::pg_catalog.text[]) with ordinality as \"relay images\" (\"relay image\", \"relay n\")";
    let rows = format!(
        "pg_catalog.json_populate_record(null::{schema}.{table}, \"relay images\".\"relay image\"::pg_catalog.json) as {table}"
    );
    let (number, leaf) = query.leaf;
    let readers = format!("{} as {}", table_name((query.roster.id(), number)), quote(READER));
    let id = format!("select distinct \"relay images\".\"relay n\", {}.id from {images}", quote(READER));
    match leaf {
        ServerQuery::Fact { expression } => format!(
            "select coalesce(pg_catalog.array_agg(\"relay facts\".\"relay fact\" order by \"relay images\".\"relay n\"), '{{}}') \
             from {images} cross join lateral (select ({expression}\n) from {rows}) as \"relay facts\" (\"relay fact\")"
        ),
        ServerQuery::Found { query, .. } => {
            format!(
                "{id} cross join lateral {rows} cross join {readers} cross join lateral ({query}) as \"relay found\""
            )
        }
        // `offset 0` makes PostgreSQL compute the value once, not for each subscriber.
        ServerQuery::Equals { expression, .. } => format!(
            "{id} cross join lateral (select ({expression}\n) from {rows} offset 0) as \"relay values\" (\"relay value\") \
             join {readers} on {}.v0 = \"relay values\".\"relay value\"",
            quote(READER)
        ),
    }
}
