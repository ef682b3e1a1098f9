//! Evaluates queries of a plan for many pairs of a row image and a reader in one statement: each reader has its own image.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio_postgres::types::ToSql;

use crate::model::catalog::relation::Relation;
use crate::model::policy::plan::{READER, ServerQuery};
use crate::model::policy::visibility::Denied;
use crate::model::row::truth::Truth;
use crate::postgres::connect::pool::{Error, JUDGING, Server};
use crate::postgres::evaluate::circuit_breaker::CircuitBreaker;
use crate::postgres::evaluate::impersonation::{ActingAs, Impersonation};
use crate::postgres::evaluate::set_based::{SETTINGS, type_name};

/// The evaluator, with its connection.
pub struct PairEvaluator {
    server: Server,
    limit: Duration,
    session: Mutex<Option<Impersonation>>,
    slow: CircuitBreaker,
}

/// A query about pairs.
pub struct PairQuery<'a> {
    /// The relation of the images.
    pub relation: &'a Relation,
    /// The role whose rights apply.
    pub role: &'a str,
    /// Another role that runs the query, because it contains the row security of the tables that it reads.
    pub reads_as: Option<&'a str>,
    /// The query.
    pub query: &'a ServerQuery,
    /// The pairs.
    pub pairs: &'a [Pair<'a>],
}

/// An image and a reader.
#[derive(Debug, Clone)]
pub struct Pair<'a> {
    /// The image as JSON.
    pub image: &'a str,
    /// The texts of the reader's claims that the query compares, in its order.
    pub values: Vec<Arc<str>>,
}

impl PairEvaluator {
    /// Creates an evaluator that connects with the login of `server`. Each statement ends after `limit`.
    pub fn new(server: Server, limit: Duration) -> Self {
        Self { server, limit, session: Mutex::new(None), slow: CircuitBreaker::new(limit) }
    }

    /// Discards the session with its plans, after the rules changed.
    pub async fn forget(&self) {
        *self.session.lock().await = None;
    }

    /// Returns one answer for each pair; all are undecided if the statement raised or took too long for one of them.
    ///
    /// # Errors
    /// When the connection fails.
    pub async fn ask(&self, query: &PairQuery<'_>) -> Result<Vec<Truth>, Error> {
        let undecided = || Ok(vec![Truth::Undecided; query.pairs.len()]);
        let statement: Arc<str> = statement(query).into();
        if query.pairs.is_empty() || self.slow.is_open(&statement) {
            return undecided();
        }
        let mut slot = self.session.lock().await;
        let mut session = match slot.take() {
            Some(session) if !session.client.is_closed() => session,
            _ => Impersonation::open(&self.server, &format!("{JUDGING}; {SETTINGS}"), self.limit).await?,
        };
        let answers = run(&mut session, query, &statement).await?;
        if answers.as_ref().err() == Some(&Denied::TimedOut) {
            self.slow.open(&statement);
        }
        if answers.as_ref().err() != Some(&Denied::Role) {
            *slot = Some(session);
        }
        answers.or_else(|_| undecided())
    }
}

async fn run(
    session: &mut Impersonation,
    query: &PairQuery<'_>,
    statement: &Arc<str>,
) -> Result<Result<Vec<Truth>, Denied>, Error> {
    let as_role = query.reads_as.map_or(ActingAs::of_role(query.role), ActingAs::past_row_security);
    session.make_room(1);
    if let Err(denied) = session.prepare(as_role, statement).await? {
        return Ok(Err(denied));
    }
    let Some(prepared) = session.prepared(statement) else { return Ok(Err(Denied::Raised)) };
    let images: Vec<&str> = query.pairs.iter().map(|pair| pair.image).collect();
    let value = |at: usize| move |pair: &Pair<'_>| pair.values.get(at).map(ToString::to_string);
    let values: Vec<Vec<Option<String>>> =
        (0..query.query.by().len()).map(|at| query.pairs.iter().map(value(at)).collect()).collect();
    let mut parameters: Vec<&(dyn ToSql + Sync)> = vec![&images];
    parameters.extend(values.iter().map(|texts| texts as &(dyn ToSql + Sync)));
    let rows = match session.query(as_role, prepared, &parameters).await? {
        Ok(rows) => rows,
        Err(denied) => return Ok(Err(denied)),
    };
    let found: Vec<Option<bool>> = match rows.first() {
        Some(row) => row.try_get(0)?,
        None => Vec::new(),
    };
    let is_complete = found.len() == query.pairs.len();
    Ok(if is_complete { Ok(found.into_iter().map(Truth::from).collect()) } else { Err(Denied::Raised) })
}

/// Returns the statement for a query: `$1` are row images as JSON, the other parameters the claims of their readers. The images have
/// the relation's own name, as in the statements of a set.
fn statement(query: &PairQuery<'_>) -> String {
    let quote = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
    let (schema, table) = (quote(&query.relation.schema), quote(&query.relation.table));
    let (mut arrays, mut names, mut casts) = (String::new(), String::new(), String::from("select"));
    for (at, (_, kind)) in query.query.by().iter().enumerate() {
        let comma = if at > 0 { "," } else { "" };
        let _ = write!(arrays, ", pg_catalog.unnest(${}::pg_catalog.text[])", at + 2);
        let _ = write!(names, "\"relay v{at}\", ");
        let _ = write!(casts, "{comma} \"relay pairs\".\"relay v{at}\"::{} as v{at}", type_name(*kind));
    }
    let verdict = match query.query {
        ServerQuery::Fact { expression } => format!("({expression}\n)"),
        ServerQuery::Found { query, .. } => format!("exists ({query})"),
        ServerQuery::Equals { expression, .. } => format!("({expression}\n) = {}.v0", quote(READER)),
    };
    format!(
        "select coalesce(pg_catalog.array_agg(\"relay verdicts\".\"relay verdict\" order by \"relay pairs\".\"relay n\"), '{{}}') \
         from rows from (pg_catalog.unnest($1::pg_catalog.text[]){arrays}) with ordinality as \"relay pairs\" (\"relay image\", {names}\"relay n\") \
         cross join lateral pg_catalog.json_populate_record(null::{schema}.{table}, \"relay pairs\".\"relay image\"::pg_catalog.json) as {table} \
         cross join lateral ({casts}) as {} cross join lateral (select {verdict}) as \"relay verdicts\" (\"relay verdict\")",
        quote(READER)
    )
}
