//! Asks PostgreSQL what has one answer for all readers: facts about row images, and who may see them.
//!
//! The readers who are connected stand in temporary tables, one for each question, brought up to date before it is asked.
//! So PostgreSQL can begin with the row, go by index to those it names, and from there by index to those who are here.
//! Nothing that is asked here can read claims or call a user's function, which is why all readers may stand side by side.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::Mutex;
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

/// The connection that asks.
pub struct SetEvaluator {
    server: Server,
    limit: Duration,
    session: Mutex<Option<SetSession>>,
    slow: CircuitBreaker,
    /// Sessions in a row that ended over a question.
    losses: AtomicU32,
}

struct SetSession {
    impersonation: Impersonation,
    tables: HashMap<TableKey, SubscriberTable>,
    /// The login may not make temporary tables.
    without_tables: bool,
}

/// A roster's table for one leaf.
type TableKey = (u64, usize);

/// A table of readers.
#[derive(Default)]
struct SubscriberTable {
    /// The last reader that was put in.
    through: Option<u64>,
    rows: usize,
    /// Its rows when the planner last looked.
    analyzed: usize,
}

/// Those who might see something, by growing numbers.
pub trait SubscriberSet: Send + Sync {
    /// A number of its own.
    fn id(&self) -> u64;
    /// How many there are now.
    fn count(&self) -> usize;
    /// Those after this number, with the texts of these terms; who lacks one is left out.
    fn after(&self, number: Option<u64>, terms: &[(usize, Kind)]) -> Vec<(u64, Vec<Arc<str>>)>;
    /// The greatest number that was given so far.
    fn last(&self) -> Option<u64>;
}

/// A question about a page of images.
pub struct SetQuery<'a> {
    /// Whose images they are.
    pub relation: &'a Relation,
    /// With whose rights to look.
    pub role: &'a str,
    /// Which of its plan's leaves, and the number of it.
    pub leaf: (usize, &'a ServerQuery),
    /// Who is here.
    pub roster: &'a dyn SubscriberSet,
    /// The images as JSON.
    pub images: &'a [String],
}

/// What was said of one image.
#[derive(Debug, Clone, PartialEq)]
pub enum SetAnswer {
    /// Of a fact.
    Fact(Truth),
    /// The numbers of the readers for whom it holds, in order.
    Readers(Vec<u64>),
    /// Nothing: it raised, took too long, or cannot be asked.
    Nothing(Truth),
}

impl SetEvaluator {
    /// Asks as the login of `server`, each statement within `limit`.
    pub fn new(server: Server, limit: Duration) -> Self {
        Self {
            server,
            limit,
            session: Mutex::new(None),
            slow: CircuitBreaker::new(limit),
            losses: AtomicU32::new(0),
        }
    }

    /// Forgets all readers and plans: the rules are others now.
    pub async fn forget(&self) {
        *self.session.lock().await = None;
    }

    /// The answers, image by image. Also how many statements were asked.
    ///
    /// # Errors
    /// Only when the connection fails, so that nothing was answered: ask again.
    pub async fn ask(&self, inquiry: &SetQuery<'_>) -> Result<(Vec<SetAnswer>, usize), Error> {
        let statement: Arc<str> = statement(inquiry).into();
        let nothing = |truth| Ok((vec![SetAnswer::Nothing(truth); inquiry.images.len()], 0));
        if self.slow.is_open(&statement) {
            return nothing(Truth::TimedOut);
        }
        let mut held = self.session.lock().await;
        let mut open = match held.take() {
            Some(open) if !open.impersonation.client.is_closed() => open,
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
        if !inquiry.leaf.1.by().is_empty() {
            if !open.without_tables
                && let Err(error) = open.bring_up_to_date(inquiry).await
            {
                if open.impersonation.client.is_closed() {
                    return Err(error);
                }
                tracing::warn!(error = %error, "readers are judged one by one: the judging login cannot keep temporary tables");
                open.without_tables = true;
            }
            if open.without_tables {
                *held = Some(open);
                return nothing(Truth::Undecided);
            }
        }
        let (said, asked, denied) = match open.answer(inquiry, &statement).await {
            Ok(answered) => answered,
            Err(error) => return self.lost(&mut held, error, inquiry),
        };
        self.losses.store(0, Relaxed);
        if denied == Some(Denied::TimedOut) {
            self.slow.open(&statement);
        }
        if denied != Some(Denied::Role) {
            *held = Some(open);
        }
        Ok((said, asked))
    }
}

impl SetEvaluator {
    /// The session ended. Once that is the server's affair, and asked again; more often the question ends it, and then it
    /// must not hold up everybody.
    fn lost(
        &self,
        held: &mut Option<SetSession>,
        error: Error,
        inquiry: &SetQuery<'_>,
    ) -> Result<(Vec<SetAnswer>, usize), Error> {
        *held = None;
        match self.losses.fetch_add(1, Relaxed) {
            0..2 => Err(error),
            _ => Ok((vec![SetAnswer::Nothing(Truth::Undecided); inquiry.images.len()], 1)),
        }
    }
}

impl SetSession {
    async fn bring_up_to_date(&mut self, inquiry: &SetQuery<'_>) -> Result<(), Error> {
        let (number, leaf) = inquiry.leaf;
        let key = (inquiry.roster.id(), number);
        let name = table_name(key);
        let client = &self.impersonation.client;
        let Some(table) = self.tables.get_mut(&key) else {
            let columns: String =
                leaf.by().iter().enumerate().fold(String::new(), |mut text, (at, (_, kind))| {
                    let _ = write!(text, ", v{at} {}", type_name(*kind));
                    text
                });
            let first: Vec<String> = (0..leaf.by().len()).map(|at| format!("v{at}")).collect();
            let make = format!(
                "create temporary table {name} (id bigint primary key{columns}); create index on {name} ({}); \
                 grant select on {name} to public",
                first.join(", ")
            );
            client.batch_execute(&make).await?;
            self.tables.insert(key, SubscriberTable::default());
            return Box::pin(self.bring_up_to_date(inquiry)).await;
        };
        if table.rows > SLACK + 2 * inquiry.roster.count() {
            client.batch_execute(&format!("truncate {name}")).await?;
            *table = SubscriberTable::default();
        }
        if table.through >= inquiry.roster.last() {
            return Ok(());
        }
        let added = inquiry.roster.after(table.through, leaf.by());
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
        table.through = inquiry.roster.last();
        if table.rows > 2 * table.analyzed {
            client.batch_execute(&format!("analyze {name}")).await?;
            table.analyzed = table.rows;
        }
        Ok(())
    }

    async fn answer(
        &mut self,
        inquiry: &SetQuery<'_>,
        statement: &Arc<str>,
    ) -> Result<(Vec<SetAnswer>, usize, Option<Denied>), Error> {
        let all = |truth| vec![SetAnswer::Nothing(truth); inquiry.images.len()];
        let somebody = ActingAs::of_role(inquiry.role);
        self.impersonation.make_room(2);
        if let Err(denied) = self.impersonation.prepare(somebody, statement).await? {
            let truth = match denied {
                Denied::Raised if !matches!(inquiry.leaf.1, ServerQuery::Fact { .. }) => Truth::Undecided,
                denied => truth_of(denied),
            };
            return Ok((all(truth), 1, Some(denied)));
        }
        let reading: Arc<str> = reading(inquiry.relation).into();
        let _ = self.impersonation.prepare(somebody, &reading).await?;
        let Some(prepared) = self.impersonation.prepared(statement) else {
            return Ok((all(Truth::Error), 1, None));
        };
        let mut said = all(Truth::Error);
        let mut asked = 0;
        let mut halves = Bisection::of(inquiry.images.len());
        while let Some(range) = halves.next() {
            let images = &inquiry.images[range.clone()];
            asked += 1;
            let rows = match self.impersonation.ask(somebody, prepared, &[&images]).await? {
                Ok(rows) => rows,
                Err(Denied::Raised) => {
                    // What raises for one reader need not for another. A fact raises for all, unless it is the image that
                    // cannot be read back, which is found out where readers are judged one by one.
                    if range.len() == 1
                        && (!matches!(inquiry.leaf.1, ServerQuery::Fact { .. })
                            || !reads_back(&self.impersonation, somebody, &reading, images).await?)
                    {
                        said[range.start] = SetAnswer::Nothing(Truth::Undecided);
                    }
                    halves.split(range);
                    continue;
                }
                Err(denied) => return Ok((all(truth_of(denied)), asked, Some(denied))),
            };
            let said = &mut said[range];
            match inquiry.leaf.1 {
                ServerQuery::Fact { .. } => {
                    let facts: Vec<Option<bool>> = match rows.first() {
                        Some(row) => row.try_get(0)?,
                        None => Vec::new(),
                    };
                    for (said, fact) in said.iter_mut().zip(facts) {
                        *said = SetAnswer::Fact(fact.into());
                    }
                }
                ServerQuery::Found { .. } | ServerQuery::Equals { .. } => {
                    said.fill(SetAnswer::Readers(Vec::new()));
                    for row in rows {
                        let (image, id): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
                        let image = usize::try_from(image - 1).ok();
                        if let Some(SetAnswer::Readers(readers)) = image.and_then(|image| said.get_mut(image))
                        {
                            readers.push(id.cast_unsigned());
                        }
                    }
                    for said in said {
                        if let SetAnswer::Readers(readers) = said {
                            readers.sort_unstable();
                        }
                    }
                }
            }
        }
        Ok((said, asked, None))
    }
}

fn truth_of(denied: Denied) -> Truth {
    match denied {
        Denied::TimedOut | Denied::Locked => Truth::TimedOut,
        Denied::Raised | Denied::Claims | Denied::Unreadable | Denied::Role => Truth::Error,
    }
}

/// What the session has set. Names are qualified in all that is asked here, and a plan that is made once is as good as any.
const SETTINGS: &str = "set search_path = ''; set plan_cache_mode = force_generic_plan; set join_collapse_limit = 12; set from_collapse_limit = 12; set synchronous_commit = off; \
     set default_transaction_read_only = off";

/// Readers who left stay in their table up to so many, or as many as are there.
const SLACK: usize = 1000;

fn table_name((roster, leaf): TableKey) -> String {
    format!("pg_temp.readers_{roster}_{leaf}")
}

fn type_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Bool => "pg_catalog.bool",
        Kind::Int2 => "pg_catalog.int2",
        Kind::Int4 => "pg_catalog.int4",
        Kind::Int8 => "pg_catalog.int8",
        Kind::Uuid => "pg_catalog.uuid",
        Kind::Text | Kind::Varchar | Kind::Enum => "pg_catalog.text",
    }
}

/// The statement: `$1` are row images as JSON. The images take the relation's own name, so that columns, `todos.col` and
/// whole rows resolve as they do in a policy.
fn statement(inquiry: &SetQuery<'_>) -> String {
    let quote = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
    let (schema, table) = (quote(&inquiry.relation.schema), quote(&inquiry.relation.table));
    let images = "pg_catalog.unnest($1::pg_catalog.text[]) with ordinality as \"relay images\" (\"relay image\", \"relay n\")";
    let rows = format!(
        "pg_catalog.json_populate_record(null::{schema}.{table}, \"relay images\".\"relay image\"::pg_catalog.json) as {table}"
    );
    let (number, leaf) = inquiry.leaf;
    let readers = format!("{} as {}", table_name((inquiry.roster.id(), number)), quote(READER));
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
        // `offset 0` keeps the value from being worked out for each reader.
        ServerQuery::Equals { expression, .. } => format!(
            "{id} cross join lateral (select ({expression}\n) from {rows} offset 0) as \"relay values\" (\"relay value\") \
             join {readers} on {}.v0 = \"relay values\".\"relay value\"",
            quote(READER)
        ),
    }
}
