//! Asks PostgreSQL who may see which row images: role and claims of a subscriber, a whole page of images in one statement.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

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
        Self { server, limit, session: Mutex::new(None) }
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
        let mut held = self.session.lock().await;
        if held.as_ref().is_none_or(|session| session.client.is_closed()) {
            *held = Some(Session::open(&self.server).await?);
        }
        let Some(session) = held.as_mut() else {
            return Err(Error::Pool(String::from("the judging connection is gone")));
        };
        let answered = session.answer(questions, self.limit).await;
        let tampered = |verdict: &Verdict| matches!(verdict.denied, Some(Denied::Role));
        if answered.as_ref().map_or(true, |verdicts| verdicts.iter().any(tampered)) {
            *held = None;
        }
        answered
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
        for question in questions {
            if !self.statements.contains_key(&question.statement)
                && let Err(denied) = self.prepare(question.identity.claims(), &question.statement).await?
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
        let (begun, became, judged, who, _ended) = tokio::join!(
            client.execute(&self.begin, &[]),
            client.execute(&self.become_subscriber, subscriber),
            client.query_one(judgement, judged),
            client.query_one(&self.who, &[]),
            client.execute(&self.end, &[]),
        );
        begun?;
        if let Err(error) = became {
            return refused(error).map(|_| Err(Denied::Role));
        }
        let row = match judged {
            Ok(row) => row,
            Err(error) => return refused(error).map(Err),
        };
        match who {
            Ok(who) if who.get::<_, &str>(0) == role => {}
            Ok(_) => return Ok(Err(Denied::Role)),
            Err(error) => return refused(error).map(Err),
        }
        let allowed: Vec<bool> = row.try_get(0)?;
        Ok(if allowed.len() == images.len() { Ok(allowed) } else { Err(Denied::Raised) })
    }

    /// Prepares under the subscriber's role: what it may not even name is refused here, as it would be to itself.
    async fn prepare(&mut self, claims: &Claims, statement: &Arc<str>) -> Result<Result<(), Denied>, Error> {
        let client = &self.client;
        let role = claims.role();
        client.execute(&self.begin, &[]).await?;
        let (json, sub) = (&**claims.json(), claims.sub().unwrap_or_default());
        let became = client.execute(&self.become_subscriber, &[&role, &json, &sub, &"0"]).await;
        let prepared = match became {
            Ok(_) => client.prepare(statement).await,
            Err(error) => Err(error),
        };
        client.execute(&self.end, &[]).await?;
        match prepared {
            Ok(prepared) => {
                if self.statements.len() >= MOST_STATEMENTS {
                    self.statements.clear();
                }
                self.statements.insert(Arc::clone(statement), prepared);
                Ok(Ok(()))
            }
            Err(error) => refused(error).map(Err),
        }
    }
}

/// Statements kept prepared: one per relation, role and policy text, and one per distinct filter that needs
/// PostgreSQL. Past this number all are prepared anew, which bounds the server's memory.
const MOST_STATEMENTS: usize = 1000;

/// Questions on the way at once: enough to hide the round trips, few enough that a dropped connection repeats little.
const IN_FLIGHT: usize = 16;

/// PostgreSQL's "no" is a denial; anything else means that nobody answered.
fn refused(error: tokio_postgres::Error) -> Result<Denied, Error> {
    match error.code() {
        Some(code) if *code == SqlState::QUERY_CANCELED => Ok(Denied::TimedOut),
        Some(code) if !code.code().starts_with("57P") && !code.code().starts_with("08") => Ok(Denied::Raised),
        _ => Err(Error::Postgres(error)),
    }
}
