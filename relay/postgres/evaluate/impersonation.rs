//! A session that acts as somebody else for the length of one statement: role and claims are set, and taken back whatever happens.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row, Statement};

use crate::model::identity::claims::Claims;
use crate::model::policy::visibility::Denied;
use crate::postgres::connect::pool::{Error, Server};

/// Becomes the subscriber for the rest of the transaction. The role comes last: after it, nothing else is ours to set.
const BECOME: &str = "select set_config('request.jwt.claims', $2, true), set_config('request.jwt.claim.sub', $3, true), \
     set_config('request.jwt.claim.role', $1, true), set_config('statement_timeout', $4, true), \
     set_config('search_path', $5, true), set_config('lock_timeout', $6, true), set_config('role', $1, true)";

/// Stays the login for the rest of the transaction, under the same settings.
const KEEP: &str = "select set_config('statement_timeout', $1, true), set_config('search_path', $2, true), \
     set_config('lock_timeout', $3, true)";

/// A table that is locked is waited for so long, since the changes of other tables wait meanwhile …
const LOCK_WAIT: &str = "20ms";
/// … and, for a while after that was in vain, so long.
const LOCK_GLANCE: &str = "1ms";
const LOCKED_FOR: Duration = Duration::from_secs(1);

/// A policy can undo the role that we took; whoever has another name afterwards is not to be believed.
const WHO: &str = "select current_user::text";

/// Statements kept prepared: one per relation, role and policy text, and one per distinct filter that needs
/// PostgreSQL. Past this number all are prepared anew, which bounds the server's memory.
const MOST_STATEMENTS: usize = 1000;

static NO_PATH: String = String::new();

/// The session.
pub(super) struct Impersonation {
    /// Its connection, for what is to be done as the login itself.
    pub client: Client,
    begin: Statement,
    become_somebody: Statement,
    keep: Statement,
    who: Statement,
    end: Statement,
    statements: HashMap<Arc<str>, Statement>,
    /// Those that the subscriber's role could not prepare.
    lent: HashSet<Arc<str>>,
    limit: String,
    /// When a lock was waited for in vain.
    locked: Mutex<Option<Instant>>,
    /// The search path of the login.
    path: String,
}

/// Whom to act as.
#[derive(Clone, Copy)]
pub(super) struct ActingAs<'a> {
    role: &'a str,
    json: &'a str,
    sub: &'a str,
    /// With the login's search path, which functions of users may rely on. Otherwise with none, where nothing can get between
    /// a name and what it means.
    with_path: bool,
}

impl<'a> ActingAs<'a> {
    /// Somebody with these claims.
    pub fn with(claims: &'a Claims, with_path: bool) -> Self {
        Self { role: claims.role(), json: claims.json(), sub: claims.sub().unwrap_or_default(), with_path }
    }

    /// Nobody in particular, who has this role.
    pub fn of_role(role: &'a str) -> Self {
        Self { role, json: "", sub: "", with_path: false }
    }
}

impl Impersonation {
    /// Connects. `settings` are statements for the session.
    pub async fn open(server: &Server, settings: &str, limit: Duration) -> Result<Self, Error> {
        let client = server.connect().await?;
        client.batch_execute(&format!("{settings}; set lock_timeout = '{LOCK_WAIT}'")).await?;
        let path = client.query_one("select current_setting('search_path')", &[]).await?.get(0);
        Ok(Self {
            path,
            begin: client.prepare("begin read only").await?,
            become_somebody: client.prepare(BECOME).await?,
            keep: client.prepare(KEEP).await?,
            who: client.prepare(WHO).await?,
            // What a policy set for the session goes with the transaction: a rollback undoes it, a commit would not.
            end: client.prepare("rollback").await?,
            statements: HashMap::new(),
            lent: HashSet::new(),
            limit: format!("{}ms", limit.as_millis()),
            locked: Mutex::new(None),
            client,
        })
    }

    /// Makes room for so many statements. All at once and before any is prepared: none that is about to be asked may go.
    pub fn make_room(&mut self, count: usize) {
        if self.statements.len() + count > MOST_STATEMENTS {
            self.forget();
        }
    }

    /// Forgets all statements.
    pub fn forget(&mut self) {
        self.statements.clear();
        self.lent.clear();
    }

    /// A statement that was prepared.
    pub fn prepared(&self, statement: &str) -> Option<&Statement> {
        self.statements.get(statement)
    }

    /// Prepares under the subscriber's role, or else our own: a policy may call what is in a schema that its subscribers
    /// may not use, since PostgreSQL resolves the names in it when it is made. Rights on tables and functions are
    /// those of whoever is judged in any case. What was prepared as our own is prepared anew for each page: once a table in it
    /// was altered or analyzed, PostgreSQL would look the names up again, as the subscriber.
    pub async fn prepare(
        &mut self,
        somebody: ActingAs<'_>,
        statement: &Arc<str>,
    ) -> Result<Result<(), Denied>, Error> {
        let is_lent = self.lent.contains(statement);
        if self.statements.contains_key(statement) && !is_lent {
            return Ok(Ok(()));
        }
        let as_somebody = match is_lent {
            true => None,
            false => Some(self.prepare_as(&self.become_somebody, &self.whom(&somebody), statement).await?),
        };
        let prepared = match as_somebody {
            Some(Err(error)) if error.code() != Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Err(error),
            Some(Ok(prepared)) => Ok(prepared),
            // Under the search path under which it will be asked: under another it would be looked up again, too.
            None | Some(Err(_)) => {
                let [.., path, wait] = self.whom(&somebody);
                let prepared = self.prepare_as(&self.keep, &[&self.limit, path, wait], statement).await?;
                self.lent.insert(Arc::clone(statement));
                prepared
            }
        };
        match prepared {
            Ok(prepared) => {
                self.statements.insert(Arc::clone(statement), prepared);
                Ok(Ok(()))
            }
            Err(error) => Ok(Err(self.refused(&error))),
        }
    }

    /// Prepares a statement in a transaction that begins with `first`. Limited as well: a table that a policy reads may be
    /// locked, and then the statement cannot even be read.
    async fn prepare_as(
        &self,
        first: &Statement,
        parameters: &[&(dyn ToSql + Sync)],
        statement: &str,
    ) -> Result<Result<Statement, tokio_postgres::Error>, Error> {
        let client = &self.client;
        client.execute(&self.begin, &[]).await?;
        let prepared = match client.execute(first, parameters).await {
            Ok(_) => client.prepare(statement).await,
            Err(error) => Err(error),
        };
        client.execute(&self.end, &[]).await?;
        Ok(prepared)
    }

    fn whom<'p>(&'p self, somebody: &'p ActingAs<'_>) -> [&'p (dyn ToSql + Sync); 6] {
        let path = if somebody.with_path { &self.path } else { &NO_PATH };
        let locked = *self.locked.lock().unwrap_or_else(PoisonError::into_inner);
        let wait =
            if locked.is_some_and(|when| when.elapsed() < LOCKED_FOR) { &LOCK_GLANCE } else { &LOCK_WAIT };
        [&somebody.role, &somebody.json, &somebody.sub, &self.limit, path, wait]
    }

    /// What PostgreSQL's "no" counts as. A policy can raise any code, so none says that nobody answered.
    fn refused(&self, error: &tokio_postgres::Error) -> Denied {
        match error.code() {
            Some(code) if *code == SqlState::QUERY_CANCELED => Denied::TimedOut,
            Some(code) if *code == SqlState::LOCK_NOT_AVAILABLE => {
                let mut locked = self.locked.lock().unwrap_or_else(PoisonError::into_inner);
                if locked.is_none_or(|when| when.elapsed() >= LOCKED_FOR) {
                    *locked = Some(Instant::now());
                }
                Denied::Locked
            }
            _ => Denied::Raised,
        }
    }

    /// What the statement gives to somebody. One round trip: the five steps leave together.
    ///
    /// # Errors
    /// When the session ended or is of no use any more. What PostgreSQL refused is the inner result.
    pub async fn ask(
        &self,
        somebody: ActingAs<'_>,
        statement: &Statement,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Result<Vec<Row>, Denied>, Error> {
        let client = &self.client;
        let whom = self.whom(&somebody);
        let (begun, became, answered, who, ended) = tokio::join!(
            client.execute(&self.begin, &[]),
            client.execute(&self.become_somebody, &whom),
            client.query(statement, parameters),
            client.query_one(&self.who, &[]),
            client.execute(&self.end, &[]),
        );
        begun?;
        // Where the end went through the session is sound, and whatever failed before it was PostgreSQL's "no".
        ended?;
        if became.is_err() {
            return Ok(Err(Denied::Role));
        }
        let rows = match answered {
            Ok(rows) => rows,
            Err(error) => return Ok(Err(self.refused(&error))),
        };
        Ok(match who {
            Ok(who) if who.get::<_, &str>(0) == somebody.role => Ok(rows),
            Ok(_) => Err(Denied::Role),
            Err(error) => Err(self.refused(&error)),
        })
    }
}

/// Whether PostgreSQL can read these images back, by a statement that does nothing else; also when nobody can tell, as that
/// statement could not be prepared.
///
/// # Errors
/// As [`Impersonation::ask`].
pub(super) async fn reads_back(
    session: &Impersonation,
    somebody: ActingAs<'_>,
    reading: &str,
    images: &[String],
) -> Result<bool, Error> {
    let Some(reading) = session.prepared(reading) else { return Ok(true) };
    Ok(!matches!(session.ask(somebody, reading, &[&images]).await?, Err(Denied::Raised)))
}

/// A page of images asked whole, and in halves of what raised, down to the images that do.
pub(super) struct Bisection(Vec<Range<usize>>);

impl Bisection {
    /// All of so many.
    pub fn of(count: usize) -> Self {
        Self(std::iter::once(0..count).filter(|all| !all.is_empty()).collect())
    }

    /// What is to be asked next.
    pub fn next(&mut self) -> Option<Range<usize>> {
        self.0.pop()
    }

    /// These raised.
    pub fn split(&mut self, raised: Range<usize>) {
        if raised.len() > 1 {
            let middle = raised.start + raised.len() / 2;
            self.0.extend([raised.start..middle, middle..raised.end]);
        }
    }
}
