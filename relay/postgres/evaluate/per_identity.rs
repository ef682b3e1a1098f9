//! Asks PostgreSQL who may see which row images: role and claims of a subscriber, a whole page of images in one statement.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, ready};
use futures_util::{FutureExt, StreamExt, TryStreamExt};
use tokio::sync::Mutex;

use crate::model::catalog::relation::Relation;
use crate::model::policy::visibility::{Denied, Identity};
use crate::postgres::connect::pool::{Error, JUDGING, Server};
use crate::postgres::evaluate::circuit_breaker::CircuitBreaker;
use crate::postgres::evaluate::impersonation::{ActingAs, Bisection, Impersonation, reads_back};

/// The judging connection.
pub struct IdentityEvaluator {
    server: Server,
    limit: Duration,
    session: Mutex<Option<Impersonation>>,
    slow: CircuitBreaker,
}

/// The verdict on a page of images, and what went wrong on the way.
#[derive(Debug)]
pub struct IdentityAnswer {
    /// For each image whether it may be seen.
    pub allowed: Vec<bool>,
    /// Why some were denied without a judgement.
    pub denied: Option<Denied>,
    /// The numbers of images that PostgreSQL cannot read back.
    pub unreadable: Vec<usize>,
}

/// What is asked: which of these images does the statement allow to this identity?
#[derive(Clone)]
pub struct IdentityQuery<'a> {
    /// Who wants to see them.
    pub identity: Identity,
    /// From the catalog, or a filter's.
    pub statement: Arc<str>,
    /// Row images as JSON, of what the statement reads.
    pub images: &'a [String],
    /// What [`reading`] gives for the relation.
    pub reading: Arc<str>,
    /// The statement calls functions of users, which may rely on the search path.
    pub with_path: bool,
}

impl IdentityAnswer {
    /// Nothing may be seen.
    pub fn none(images: &[String], denied: Denied) -> Self {
        Self { allowed: vec![false; images.len()], denied: Some(denied), unreadable: Vec::new() }
    }
}

impl IdentityEvaluator {
    /// Judges as the login of `server`, each statement within `limit`.
    pub fn new(server: Server, limit: Duration) -> Self {
        Self { server, limit, session: Mutex::new(None), slow: CircuitBreaker::new(limit) }
    }

    /// Forgets all plans. Before PostgreSQL 15.19 and its siblings a cached plan outlives a revoked membership.
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

    /// Connects if there is no connection yet.
    ///
    /// # Errors
    /// As the connection.
    pub async fn open(&self) -> Result<(), Error> {
        let mut held = self.session.lock().await;
        if held.as_ref().is_none_or(|session| session.client.is_closed()) {
            *held = Some(Impersonation::open(&self.server, JUDGING, self.limit).await?);
        }
        Ok(())
    }

    /// Answers all questions; they travel together. Images that make a policy raise are denied alone, the others of
    /// the same question are judged.
    ///
    /// # Errors
    /// Only when the connection fails, so that nothing was judged: ask again.
    pub async fn judge(&self, questions: &[IdentityQuery<'_>]) -> Result<Vec<IdentityAnswer>, Error> {
        let is_slow: Vec<bool> =
            questions.iter().map(|question| self.slow.is_open(&question.statement)).collect();
        let asked: Vec<IdentityQuery<'_>> = questions
            .iter()
            .zip(&is_slow)
            .filter(|(_, slow)| !**slow)
            .map(|(question, _)| question.clone())
            .collect();
        let mut answers = self.judge_all(&asked).await?.into_iter();
        let verdicts = questions.iter().zip(is_slow).map(|(question, slow)| match slow {
            true => IdentityAnswer::none(question.images, Denied::TimedOut),
            false => answers.next().unwrap_or_else(|| IdentityAnswer::none(question.images, Denied::Raised)),
        });
        let verdicts: Vec<IdentityAnswer> = verdicts.collect();
        for (question, verdict) in questions.iter().zip(&verdicts) {
            if verdict.denied == Some(Denied::TimedOut) {
                self.slow.open(&question.statement);
            }
        }
        Ok(verdicts)
    }

    async fn judge_all(&self, questions: &[IdentityQuery<'_>]) -> Result<Vec<IdentityAnswer>, Error> {
        if questions.is_empty() {
            return Ok(Vec::new());
        }
        let mut held = self.session.lock().await;
        if let Ok(verdicts) = self.ask(&mut held, questions).await {
            return Ok(verdicts);
        }
        // PostgreSQL went away, or one of the policies ended the session: then the others must not wait for it.
        let mut verdicts = Vec::with_capacity(questions.len());
        for question in questions {
            let alone = std::slice::from_ref(question);
            let denied = || vec![IdentityAnswer::none(question.images, Denied::Raised)];
            let answered = match self.ask(&mut held, alone).await {
                Err(Lost::Session(_)) => match self.ask(&mut held, alone).await {
                    Err(Lost::Session(_)) => denied(),
                    answered => answered?,
                },
                answered => answered?,
            };
            verdicts.extend(answered);
        }
        Ok(verdicts)
    }

    async fn ask(
        &self,
        held: &mut Option<Impersonation>,
        questions: &[IdentityQuery<'_>],
    ) -> Result<Vec<IdentityAnswer>, Lost> {
        let mut session = match held.take() {
            Some(session) if !session.client.is_closed() => session,
            _ => Impersonation::open(&self.server, JUDGING, self.limit).await.map_err(Lost::Server)?,
        };
        let verdicts = answer(&mut session, questions).await.map_err(Lost::Session)?;
        // What a policy tampered with is not used again.
        if !verdicts.iter().any(|verdict| matches!(verdict.denied, Some(Denied::Role))) {
            *held = Some(session);
        }
        Ok(verdicts)
    }
}

/// Where a judgement was lost.
enum Lost {
    /// There is no session to be had.
    Server(Error),
    /// The session ended, or is of no use any more.
    Session(Error),
}

impl From<Lost> for Error {
    fn from(lost: Lost) -> Self {
        match lost {
            Lost::Server(error) | Lost::Session(error) => error,
        }
    }
}

async fn answer(
    session: &mut Impersonation,
    questions: &[IdentityQuery<'_>],
) -> Result<Vec<IdentityAnswer>, Error> {
    let mut refusals: HashMap<Arc<str>, Denied> = HashMap::new();
    session.make_room(2 * questions.len());
    for question in questions {
        let somebody = ActingAs::with(question.identity.claims(), question.with_path);
        if let Err(denied) = session.prepare(somebody, &question.statement).await? {
            refusals.insert(Arc::clone(&question.statement), denied);
        }
        let _ = session.prepare(somebody, &question.reading).await?;
    }
    let session = &*session;
    let mut asked: Vec<BoxFuture<'_, Result<IdentityAnswer, Error>>> = Vec::with_capacity(questions.len());
    for question in questions {
        asked.push(match refusals.get(&question.statement) {
            Some(denied) => ready(Ok(IdentityAnswer::none(question.images, *denied))).boxed(),
            None => decide(session, question).boxed(),
        });
    }
    futures_util::stream::iter(asked).buffered(IN_FLIGHT).try_collect().await
}

async fn decide(session: &Impersonation, question: &IdentityQuery<'_>) -> Result<IdentityAnswer, Error> {
    let Some(judgement) = session.prepared(&question.statement) else {
        return Ok(IdentityAnswer::none(question.images, Denied::Raised));
    };
    let somebody = ActingAs::with(question.identity.claims(), question.with_path);
    let mut verdict =
        IdentityAnswer { allowed: vec![false; question.images.len()], denied: None, unreadable: Vec::new() };
    let mut halves = Bisection::of(question.images.len());
    while let Some(range) = halves.next() {
        let images = &question.images[range.clone()];
        let answered = session.ask(somebody, judgement, &[&images]).await?;
        let allowed = answered.map(|rows| rows.first().and_then(|row| row.try_get::<_, Vec<bool>>(0).ok()));
        match allowed {
            Ok(Some(allowed)) if allowed.len() == images.len() => {
                verdict.allowed[range].copy_from_slice(&allowed);
            }
            Ok(_) | Err(Denied::Raised) => {
                // Without an image nothing but the claims can raise.
                if verdict.denied.is_none() {
                    let none: &[String] = &[];
                    if let Err(Denied::Raised) = session.ask(somebody, judgement, &[&none]).await? {
                        return Ok(IdentityAnswer::none(question.images, Denied::Claims));
                    }
                }
                if range.len() == 1 && !reads_back(session, somebody, &question.reading, images).await? {
                    verdict.unreadable.push(range.start);
                }
                verdict.denied = Some(match verdict.unreadable.is_empty() {
                    true => Denied::Raised,
                    false => Denied::Unreadable,
                });
                halves.split(range);
            }
            Err(denied) => {
                return Ok(IdentityAnswer::none(question.images, denied));
            }
        }
    }
    Ok(verdict)
}

/// Questions on the way at once: enough to hide the round trips, few enough that a policy that has become slow delays
/// the others by so many time limits at most before it is noticed.
const IN_FLIGHT: usize = 4;

/// The statement that has PostgreSQL take back row images, `$1`, and nothing else: it fails where one cannot be.
pub fn reading(relation: &Relation) -> String {
    let quote = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
    format!(
        "select pg_catalog.count(*) from pg_catalog.unnest($1::pg_catalog.text[]) as i (image) cross join lateral \
         pg_catalog.json_populate_record(null::{}.{}, i.image::pg_catalog.json) as r",
        quote(&relation.schema),
        quote(&relation.table)
    )
}
