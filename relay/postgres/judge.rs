//! Asks PostgreSQL who may see which row images: role and claims of a subscriber, a whole page of images in one statement.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::{BoxFuture, ready};
use futures_util::{FutureExt, StreamExt, TryStreamExt};
use tokio::sync::Mutex;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Statement};

use crate::model::claims::Claims;
use crate::model::policy::{Denied, Identity};
use crate::postgres::connect::{Error, Server};

/// Becomes the subscriber for the rest of the transaction. The role comes last: after it, nothing else is ours to set.
const BECOME: &str = "select set_config('request.jwt.claims', $2, true), set_config('request.jwt.claim.sub', $3, true), \
     set_config('request.jwt.claim.role', $1, true), set_config('statement_timeout', $4, true), \
     set_config('role', $1, true)";

/// A policy can undo the role that we took; whoever has another name afterwards is not to be believed.
const WHO: &str = "select current_user::text";

/// The judging connection.
pub struct Judge {
    server: Server,
    limit: Duration,
    session: Mutex<Option<Session>>,
    /// Statements that took too long, and until when they are not asked again.
    slow: std::sync::Mutex<HashMap<Arc<str>, Instant>>,
}

struct Session {
    client: Client,
    begin: Statement,
    become_subscriber: Statement,
    who: Statement,
    end: Statement,
    statements: HashMap<Arc<str>, Statement>,
}

/// The verdict on a page of images, and what went wrong on the way.
#[derive(Debug)]
pub struct Verdict {
    /// For each image whether it may be seen.
    pub allowed: Vec<bool>,
    /// Why some were denied without a judgement.
    pub denied: Option<Denied>,
}

/// What is asked: which of these images does the statement allow to this identity?
#[derive(Clone)]
pub struct Question<'a> {
    /// Who wants to see them.
    pub identity: Identity,
    /// From the catalog, or a filter's.
    pub statement: Arc<str>,
    /// Row images as JSON.
    pub images: &'a [&'a str],
}

impl Verdict {
    fn none(images: &[&str], denied: Denied) -> Self {
        Self { allowed: vec![false; images.len()], denied: Some(denied) }
    }
}

impl Judge {
    /// Judges as the login of `server`, each statement within `limit`.
    pub fn new(server: Server, limit: Duration) -> Self {
        Self { server, limit, session: Mutex::new(None), slow: std::sync::Mutex::default() }
    }

    /// Forgets all plans. Before PostgreSQL 15.19 and its siblings a cached plan outlives a revoked membership.
    pub async fn discard_plans(&self) {
        let mut session = self.session.lock().await;
        let failed = match session.as_ref() {
            Some(open) => open.client.batch_execute("discard plans").await.is_err(),
            None => false,
        };
        if failed {
            *session = None;
        }
    }

    /// Answers all questions; they travel together. Images that make a policy raise are denied alone, the others of
    /// the same question are judged.
    ///
    /// # Errors
    /// Only when the connection fails, so that nothing was judged: ask again.
    pub async fn judge(&self, questions: &[Question<'_>]) -> Result<Vec<Verdict>, Error> {
        let is_slow: Vec<bool> = questions.iter().map(|question| self.is_slow(&question.statement)).collect();
        let asked: Vec<Question<'_>> = questions
            .iter()
            .zip(&is_slow)
            .filter(|(_, slow)| !**slow)
            .map(|(question, _)| question.clone())
            .collect();
        let mut answers = self.judge_all(&asked).await?.into_iter();
        let verdicts = questions.iter().zip(is_slow).map(|(question, slow)| match slow {
            true => Verdict::none(question.images, Denied::TimedOut),
            false => answers.next().unwrap_or_else(|| Verdict::none(question.images, Denied::Raised)),
        });
        let verdicts: Vec<Verdict> = verdicts.collect();
        for (question, verdict) in questions.iter().zip(&verdicts) {
            if verdict.denied == Some(Denied::TimedOut) {
                self.note_slow(&question.statement);
            }
        }
        Ok(verdicts)
    }

    fn is_slow(&self, statement: &Arc<str>) -> bool {
        let mut slow = self.slow.lock().unwrap_or_else(PoisonError::into_inner);
        slow.retain(|_, until| *until > Instant::now());
        slow.contains_key(statement)
    }

    fn note_slow(&self, statement: &Arc<str>) {
        let mut slow = self.slow.lock().unwrap_or_else(PoisonError::into_inner);
        slow.entry(Arc::clone(statement)).or_insert_with(|| Instant::now() + self.limit * BREAK);
    }

    async fn judge_all(&self, questions: &[Question<'_>]) -> Result<Vec<Verdict>, Error> {
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
            let denied = || vec![Verdict::none(question.images, Denied::Raised)];
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
        held: &mut Option<Session>,
        questions: &[Question<'_>],
    ) -> Result<Vec<Verdict>, Lost> {
        let mut session = match held.take() {
            Some(session) if !session.client.is_closed() => session,
            _ => Session::open(&self.server).await.map_err(Lost::Server)?,
        };
        let verdicts = session.answer(questions, self.limit).await.map_err(Lost::Session)?;
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

impl Session {
    async fn open(server: &Server) -> Result<Self, Error> {
        let client = server.connect().await?;
        client.batch_execute("set jit = off; set lc_monetary = 'C'").await?;
        Ok(Self {
            begin: client.prepare("begin read only").await?,
            become_subscriber: client.prepare(BECOME).await?,
            who: client.prepare(WHO).await?,
            // What a policy set for the session goes with the transaction: a rollback undoes it, a commit would not.
            end: client.prepare("rollback").await?,
            statements: HashMap::new(),
            client,
        })
    }

    async fn answer(&mut self, questions: &[Question<'_>], limit: Duration) -> Result<Vec<Verdict>, Error> {
        let mut refusals: HashMap<Arc<str>, Denied> = HashMap::new();
        // All at once and before any is prepared: none that is about to be asked may go.
        if self.statements.len() + questions.len() > MOST_STATEMENTS {
            self.statements.clear();
        }
        for question in questions {
            if !self.statements.contains_key(&question.statement)
                && let Err(denied) =
                    self.prepare(question.identity.claims(), &question.statement, limit).await?
            {
                refusals.insert(Arc::clone(&question.statement), denied);
            }
        }
        let session = &*self;
        let mut asked: Vec<BoxFuture<'_, Result<Verdict, Error>>> = Vec::with_capacity(questions.len());
        for question in questions {
            asked.push(match refusals.get(&question.statement) {
                Some(denied) => ready(Ok(Verdict::none(question.images, *denied))).boxed(),
                None => session.decide(question, limit).boxed(),
            });
        }
        futures_util::stream::iter(asked).buffered(IN_FLIGHT).try_collect().await
    }

    async fn decide(&self, question: &Question<'_>, limit: Duration) -> Result<Verdict, Error> {
        let Some(judgement) = self.statements.get(&question.statement) else {
            return Ok(Verdict::none(question.images, Denied::Raised));
        };
        let mut verdict = Verdict { allowed: vec![false; question.images.len()], denied: None };
        // Halves of what raised, down to the images that do.
        let mut open: Vec<(usize, usize)> = vec![(0, question.images.len())];
        while let Some((from, to)) = open.pop() {
            match self.ask(question.identity.claims(), judgement, &question.images[from..to], limit).await? {
                Ok(allowed) => verdict.allowed[from..to].copy_from_slice(&allowed),
                Err(Denied::Raised) => {
                    verdict.denied = Some(Denied::Raised);
                    if to - from > 1 {
                        let middle = from + (to - from) / 2;
                        open.extend([(from, middle), (middle, to)]);
                    }
                }
                Err(denied @ (Denied::TimedOut | Denied::Role)) => {
                    return Ok(Verdict::none(question.images, denied));
                }
            }
        }
        Ok(verdict)
    }

    /// One round trip: the five steps leave together.
    async fn ask(
        &self,
        claims: &Claims,
        judgement: &Statement,
        images: &[&str],
        limit: Duration,
    ) -> Result<Result<Vec<bool>, Denied>, Error> {
        let client = &self.client;
        let (role, json, sub) = (claims.role(), &**claims.json(), claims.sub().unwrap_or_default());
        let limit = format!("{}ms", limit.as_millis());
        type Parameters<'p> = &'p [&'p (dyn ToSql + Sync)];
        let subscriber: Parameters<'_> = &[&role, &json, &sub, &limit];
        let judged: Parameters<'_> = &[&images];
        let (begun, became, judged, who, ended) = tokio::join!(
            client.execute(&self.begin, &[]),
            client.execute(&self.become_subscriber, subscriber),
            client.query_one(judgement, judged),
            client.query_one(&self.who, &[]),
            client.execute(&self.end, &[]),
        );
        begun?;
        // Where the end went through the session is sound, and whatever failed before it was PostgreSQL's "no".
        ended?;
        if became.is_err() {
            return Ok(Err(Denied::Role));
        }
        let row = match judged {
            Ok(row) => row,
            Err(error) => return Ok(Err(refused(&error))),
        };
        match who {
            Ok(who) if who.get::<_, &str>(0) == role => {}
            Ok(_) => return Ok(Err(Denied::Role)),
            Err(error) => return Ok(Err(refused(&error))),
        }
        let allowed: Vec<bool> = row.try_get(0)?;
        Ok(if allowed.len() == images.len() { Ok(allowed) } else { Err(Denied::Raised) })
    }

    /// Prepares under the subscriber's role, or else our own: a policy may call what is in a schema that its subscribers
    /// may not use, since PostgreSQL resolves the names in it when it is made. Rights on tables and functions are
    /// those of whoever is judged in any case.
    async fn prepare(
        &mut self,
        claims: &Claims,
        statement: &Arc<str>,
        limit: Duration,
    ) -> Result<Result<(), Denied>, Error> {
        // Limited as well: a table that a policy reads may be locked, and then the statement cannot even be read.
        let limit = format!("{}ms", limit.as_millis());
        let client = &self.client;
        let role = claims.role();
        client.execute(&self.begin, &[]).await?;
        let (json, sub) = (&**claims.json(), claims.sub().unwrap_or_default());
        let became = client.execute(&self.become_subscriber, &[&role, &json, &sub, &limit]).await;
        let prepared = match became {
            Ok(_) => client.prepare(statement).await,
            Err(error) => Err(error),
        };
        client.execute(&self.end, &[]).await?;
        let prepared = match prepared {
            Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
                let prepared = client.prepare(statement).await;
                client.execute(&self.end, &[]).await?;
                prepared
            }
            prepared => prepared,
        };
        match prepared {
            Ok(prepared) => {
                self.statements.insert(Arc::clone(statement), prepared);
                Ok(Ok(()))
            }
            Err(error) => Ok(Err(refused(&error))),
        }
    }
}

/// Statements kept prepared: one per relation, role and policy text, and one per distinct filter that needs
/// PostgreSQL. Past this number all are prepared anew, which bounds the server's memory.
const MOST_STATEMENTS: usize = 1000;

/// Questions on the way at once: enough to hide the round trips, few enough that a policy that has become slow delays
/// the others by so many time limits at most before it is noticed.
const IN_FLIGHT: usize = 4;

/// A statement that took too long is not asked again for this many times the limit, so that it does not hold up everybody
/// else for more than a fraction of the time.
const BREAK: u32 = 10;

/// What PostgreSQL's "no" counts as. A policy can raise any code, so none says that nobody answered.
fn refused(error: &tokio_postgres::Error) -> Denied {
    match error.code() {
        Some(code) if *code == SqlState::QUERY_CANCELED => Denied::TimedOut,
        _ => Denied::Raised,
    }
}
