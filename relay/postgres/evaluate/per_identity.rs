//! Evaluates policies in PostgreSQL for one identity: with its role and claims, all images of a page in one statement.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::{Either, ready};
use futures_util::stream::FuturesOrdered;
use tokio::sync::Mutex;
use tokio_postgres::Statement;

use crate::model::catalog::relation::Relation;
use crate::model::policy::visibility::{Denied, Identity};
use crate::postgres::connect::pool::{Error, JUDGING, Server};
use crate::postgres::evaluate::circuit_breaker::CircuitBreaker;
use crate::postgres::evaluate::impersonation::{ActingAs, Bisection, Impersonation, Run, with_user};

/// The evaluator, with its connection.
pub struct IdentityEvaluator {
    server: Server,
    limit: Duration,
    session: Mutex<Option<Impersonation>>,
    slow: CircuitBreaker,
}

/// The verdicts on the images of a query.
#[derive(Debug)]
pub struct IdentityAnswer {
    /// For each image whether it may be seen.
    pub allowed: Vec<bool>,
    /// Why images were denied without a verdict of PostgreSQL, if any were.
    pub denied: Option<Denied>,
    /// The indexes of images that PostgreSQL cannot read back.
    pub unreadable: Vec<usize>,
}

/// A query: which of these images does the statement allow to this identity?
#[derive(Clone)]
pub struct IdentityQuery<'a> {
    /// The identity.
    pub identity: Identity,
    /// The statement of a policy, from the catalog, or of a filter.
    pub statement: Arc<str>,
    /// Row images as JSON, with the columns that the statement reads.
    pub images: &'a [String],
    /// The statement of [`reading`] for the relation.
    pub reading: Arc<str>,
    /// Whether the statement calls user-defined functions, which may rely on the search path.
    pub with_path: bool,
    /// The private channel that is asked about; `None` for rows of watched tables.
    pub topic: Option<&'a str>,
}

impl IdentityQuery<'_> {
    fn acting_as(&self) -> ActingAs<'_> {
        ActingAs::with(self.identity.claims(), self.with_path).in_topic(self.topic.unwrap_or_default())
    }

    /// What is skipped after a timeout: the statement. That of private channels is the same for all of them, and only some may be
    /// slow: it is skipped for an identity.
    fn breaker_key(&self) -> Arc<str> {
        match self.topic {
            None => Arc::clone(&self.statement),
            Some(_) => format!("{} {}", self.identity.claims().json(), self.statement).into(),
        }
    }
}

impl IdentityAnswer {
    /// Denies all images.
    pub fn none(images: &[String], denied: Denied) -> Self {
        Self { allowed: vec![false; images.len()], denied: Some(denied), unreadable: Vec::new() }
    }
}

impl IdentityEvaluator {
    /// Creates an evaluator that connects with the login of `server`. Each statement ends after `limit`.
    pub fn new(server: Server, limit: Duration) -> Self {
        Self { server, limit, session: Mutex::new(None), slow: CircuitBreaker::new(limit) }
    }

    /// Discards all plans. Before PostgreSQL 15.19 and its siblings a cached plan outlives a revoked membership.
    pub async fn discard_plans(&self) {
        let mut session = self.session.lock().await;
        let failed = match session.as_mut() {
            Some(open) => {
                open.forget();
                open.client.batch_execute("discard plans").await.is_err()
            }
            None => false,
        };
        if failed {
            *session = None;
        }
    }

    /// Connects if there is no open connection.
    ///
    /// # Errors
    /// As the connection.
    pub async fn open(&self) -> Result<(), Error> {
        let mut slot = self.session.lock().await;
        if slot.as_ref().is_none_or(|session| session.client.is_closed()) {
            *slot = Some(Impersonation::open(&self.server, JUDGING, self.limit).await?);
        }
        Ok(())
    }

    /// Answers all queries, in order, pipelined. An image that makes a policy raise is denied; the other images of the
    /// query are evaluated.
    ///
    /// # Errors
    /// Only when the connection fails. There is no result then: call again.
    pub async fn judge(&self, queries: &[IdentityQuery<'_>]) -> Result<Vec<IdentityAnswer>, Error> {
        let is_slow: Vec<bool> =
            queries.iter().map(|query| self.slow.is_open(&query.breaker_key())).collect();
        let sent: Vec<IdentityQuery<'_>> = queries
            .iter()
            .zip(&is_slow)
            .filter(|(_, slow)| !**slow)
            .map(|(query, _)| query.clone())
            .collect();
        let mut answers = self.judge_all(&sent).await?.into_iter();
        let answers = queries.iter().zip(is_slow).map(|(query, slow)| match slow {
            true => IdentityAnswer::none(query.images, Denied::TimedOut),
            false => answers.next().unwrap_or_else(|| IdentityAnswer::none(query.images, Denied::Raised)),
        });
        let answers: Vec<IdentityAnswer> = answers.collect();
        for (query, answer) in queries.iter().zip(&answers) {
            if answer.denied == Some(Denied::TimedOut) {
                self.slow.open(&query.breaker_key());
            }
        }
        Ok(answers)
    }

    async fn judge_all(&self, queries: &[IdentityQuery<'_>]) -> Result<Vec<IdentityAnswer>, Error> {
        if queries.is_empty() {
            return Ok(Vec::new());
        }
        let mut slot = self.session.lock().await;
        if let Ok(answers) = self.judge_once(&mut slot, queries).await {
            return Ok(answers);
        }
        // PostgreSQL stopped, or a policy ended the session. Each query alone finds the policy, and answers the others.
        let mut answers = Vec::with_capacity(queries.len());
        for query in queries {
            let single = std::slice::from_ref(query);
            let answered = match self.judge_once(&mut slot, single).await {
                Err(Lost::Session(_)) => match self.judge_once(&mut slot, single).await {
                    Err(Lost::Session(_)) => vec![IdentityAnswer::none(query.images, Denied::Raised)],
                    answered => answered?,
                },
                answered => answered?,
            };
            answers.extend(answered);
        }
        Ok(answers)
    }

    async fn judge_once(
        &self,
        slot: &mut Option<Impersonation>,
        queries: &[IdentityQuery<'_>],
    ) -> Result<Vec<IdentityAnswer>, Lost> {
        let mut session = match slot.take() {
            Some(session) if !session.client.is_closed() => session,
            _ => Impersonation::open(&self.server, JUDGING, self.limit).await.map_err(Lost::Server)?,
        };
        let answers = run_all(&mut session, queries).await.map_err(Lost::Session)?;
        // A session whose role a policy changed is not used again.
        if !answers.iter().any(|answer| matches!(answer.denied, Some(Denied::Role))) {
            *slot = Some(session);
        }
        Ok(answers)
    }
}

/// Where an evaluation failed.
enum Lost {
    /// No session could be opened.
    Server(Error),
    /// The session ended or is unusable.
    Session(Error),
}

impl From<Lost> for Error {
    fn from(lost: Lost) -> Self {
        match lost {
            Lost::Server(error) | Lost::Session(error) => error,
        }
    }
}

async fn run_all(
    session: &mut Impersonation,
    queries: &[IdentityQuery<'_>],
) -> Result<Vec<IdentityAnswer>, Error> {
    let mut refusals: HashMap<Arc<str>, Denied> = HashMap::new();
    let mut checked: HashMap<Arc<str>, Arc<str>> = HashMap::new();
    for text in queries.iter().flat_map(|query| [&query.statement, &query.reading]) {
        if !checked.contains_key(text) {
            checked.insert(Arc::clone(text), with_user(text));
        }
    }
    session.make_room(checked.len());
    for query in queries {
        let role = query.acting_as();
        if let Err(denied) = session.prepare(role, &checked[&query.statement]).await? {
            refusals.insert(Arc::clone(&query.statement), denied);
        }
        let _ = session.prepare(role, &checked[&query.reading]).await?;
    }
    let run = Run::begin(session).await?;
    let prepared = |text: &Arc<str>| checked.get(text).and_then(|text| session.prepared(text));
    let judge = |query| one(&run, query, prepared(&query.statement), prepared(&query.reading));
    let answers = pipelined(queries, &refusals, judge).await?;
    run.end().await?;
    Ok(answers)
}

/// Judges all queries, in order. The more answers come in time, the more queries are on their way, so that their number costs no round
/// trips. A statement that takes too long is not asked again.
async fn pipelined<'q, Judging: Future<Output = Result<IdentityAnswer, Error>>>(
    queries: &'q [IdentityQuery<'q>],
    refusals: &HashMap<Arc<str>, Denied>,
    judge: impl Fn(&'q IdentityQuery<'q>) -> Judging,
) -> Result<Vec<IdentityAnswer>, Error> {
    let mut answers = Vec::with_capacity(queries.len());
    let mut too_slow: HashSet<Arc<str>> = HashSet::new();
    let mut waiting = queries.iter();
    let mut running = FuturesOrdered::new();
    let mut most = FIRST_IN_FLIGHT;
    loop {
        while running.len() < most
            && let Some(query) = waiting.next()
        {
            let is_slow = !too_slow.is_empty() && too_slow.contains(&query.breaker_key());
            let refused = if is_slow { Some(&Denied::TimedOut) } else { refusals.get(&query.statement) };
            running.push_back(match refused {
                Some(denied) => Either::Left(ready(Ok(IdentityAnswer::none(query.images, *denied)))),
                None => Either::Right(judge(query)),
            });
        }
        let Some(answer) = running.next().await else { return Ok(answers) };
        let answer = answer?;
        match answer.denied {
            Some(Denied::TimedOut) => {
                too_slow.insert(queries[answers.len()].breaker_key());
                most = FIRST_IN_FLIGHT;
            }
            _ => most = MAX_IN_FLIGHT.min(most + 1),
        }
        answers.push(answer);
    }
}

async fn one(
    run: &Run<'_>,
    query: &IdentityQuery<'_>,
    statement: Option<&Statement>,
    reading: Option<&Statement>,
) -> Result<IdentityAnswer, Error> {
    let Some(statement) = statement else {
        return Ok(IdentityAnswer::none(query.images, Denied::Raised));
    };
    let role = query.acting_as();
    let mut answer =
        IdentityAnswer { allowed: vec![false; query.images.len()], denied: None, unreadable: Vec::new() };
    let mut ranges = Bisection::of(query.images.len());
    while let Some(range) = ranges.next() {
        let images = &query.images[range.clone()];
        let row = run.query(role, statement, &[&images]).await?;
        match row.map(|row| row.try_get::<_, Vec<bool>>(0).ok()) {
            Ok(Some(allowed)) if allowed.len() == images.len() => {
                answer.allowed[range].copy_from_slice(&allowed);
            }
            Ok(_) | Err(Denied::Raised) => {
                // Without images only the claims can make the statement raise.
                if answer.denied.is_none() {
                    let none: &[String] = &[];
                    if let Err(Denied::Raised) = run.query(role, statement, &[&none]).await? {
                        return Ok(IdentityAnswer::none(query.images, Denied::Claims));
                    }
                }
                if range.len() == 1
                    && let Some(reading) = reading
                    && let Err(Denied::Raised) = run.query(role, reading, &[&images]).await?
                {
                    answer.unreadable.push(range.start);
                }
                answer.denied = Some(match answer.unreadable.is_empty() {
                    true => Denied::Raised,
                    false => Denied::Unreadable,
                });
                ranges.split(range);
            }
            Err(denied) => {
                return Ok(IdentityAnswer::none(query.images, denied));
            }
        }
    }
    Ok(answer)
}

/// Number of queries that are sent before the first answer. A statement that takes too long delays the others by that many time limits
/// at first, before it is skipped.
const FIRST_IN_FLIGHT: usize = 4;
/// Maximum number of queries without an answer.
const MAX_IN_FLIGHT: usize = 64;

/// Returns the statement that only parses row images, `$1`, back into rows: it fails if one cannot be read back.
pub fn reading(relation: &Relation) -> String {
    let quote = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
    format!(
        "select pg_catalog.count(*) from pg_catalog.unnest($1::pg_catalog.text[]) as i (image) cross join lateral \
         pg_catalog.json_populate_record(null::{}.{}, i.image::pg_catalog.json) as r",
        quote(&relation.schema),
        quote(&relation.table)
    )
}
