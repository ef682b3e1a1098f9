//! A session that runs single statements with the role and claims of a subscriber. A rollback resets both afterwards.

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

/// Sets the subscriber's claims and role for the rest of the transaction. The role comes last: it may not set the others. A transaction
/// that follows a failed one in a [`Run`] is not read-only by itself.
const IMPERSONATE: &str = "select set_config('transaction_read_only', 'on', true), set_config('request.jwt.claims', $2, true), set_config('request.jwt.claim.sub', $3, true), \
     set_config('request.jwt.claim.role', $1, true), set_config('statement_timeout', $4, true), \
     set_config('search_path', $5, true), set_config('lock_timeout', $6, true), set_config('row_security', $7, true), \
     set_config('realtime.topic', $8, true), set_config('role', $1, true)";

/// Sets the same limits and search path for the rest of the transaction, and keeps the login's role.
const AS_LOGIN: &str = "select set_config('statement_timeout', $1, true), set_config('search_path', $2, true), \
     set_config('lock_timeout', $3, true), set_config('row_security', $4, true)";

/// Lock timeout. Short, because the changes of other tables wait meanwhile.
const LOCK_WAIT: &str = "20ms";
/// Lock timeout for [`LOCKED_FOR`] after one was exceeded.
const LOCK_WAIT_AGAIN: &str = "1ms";
const LOCKED_FOR: Duration = Duration::from_secs(1);

/// A policy can reset the role: the result is discarded if `current_user` changed.
const CURRENT_USER: &str = "select current_user::text";

/// Maximum number of prepared statements, which bounds the server's memory: one per relation, role and policy text, and one
/// per distinct filter that needs PostgreSQL. Beyond it all are discarded and prepared again.
const MAX_STATEMENTS: usize = 1000;

static NO_PATH: String = String::new();

/// The session.
pub(super) struct Impersonation {
    /// The connection, for statements with the login's own role.
    pub client: Client,
    begin: Statement,
    impersonate: Statement,
    as_login: Statement,
    current_user: Statement,
    rollback: Statement,
    rollback_and_chain: Statement,
    statements: HashMap<Arc<str>, Statement>,
    /// Statements that only the login's role could prepare.
    prepared_by_login: HashSet<Arc<str>>,
    limit: String,
    /// The time of the last lock timeout.
    locked: Mutex<Option<Instant>>,
    /// The search path of the login.
    path: String,
}

/// The role and claims of a statement.
#[derive(Clone, Copy)]
pub(super) struct ActingAs<'a> {
    role: &'a str,
    json: &'a str,
    sub: &'a str,
    /// Whether to set the login's search path, which user-defined functions may rely on. Otherwise it is empty, so that a
    /// name cannot resolve to another object.
    with_path: bool,
    /// The channel that policies of private channels are asked about; empty otherwise.
    topic: &'a str,
    /// The setting `row_security`: `off` makes PostgreSQL raise where row security would hide rows.
    row_security: &'static str,
}

impl<'a> ActingAs<'a> {
    /// The role and claims of a token.
    pub fn with(claims: &'a Claims, with_path: bool) -> Self {
        Self {
            role: claims.role(),
            json: claims.json(),
            sub: claims.sub().unwrap_or_default(),
            with_path,
            topic: "",
            row_security: "on",
        }
    }

    /// The same for a private channel.
    pub fn in_topic(self, topic: &'a str) -> Self {
        Self { topic, ..self }
    }

    /// A role without claims.
    pub fn of_role(role: &'a str) -> Self {
        Self { role, json: "", sub: "", with_path: false, topic: "", row_security: "on" }
    }

    /// A role that reads past row security. Where the role may not, PostgreSQL raises.
    pub fn past_row_security(role: &'a str) -> Self {
        Self { row_security: "off", ..Self::of_role(role) }
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
            impersonate: client.prepare(IMPERSONATE).await?,
            as_login: client.prepare(AS_LOGIN).await?,
            current_user: client.prepare(CURRENT_USER).await?,
            // A rollback undoes settings that a policy made for the session, a commit would not.
            rollback: client.prepare("rollback").await?,
            rollback_and_chain: client.prepare("rollback and chain").await?,
            statements: HashMap::new(),
            prepared_by_login: HashSet::new(),
            limit: format!("{}ms", limit.as_millis()),
            locked: Mutex::new(None),
            client,
        })
    }

    /// Makes room for this many statements. Call it once before the first of a batch is prepared: it may discard all.
    pub fn make_room(&mut self, count: usize) {
        if self.statements.len() + count > MAX_STATEMENTS {
            self.forget();
        }
    }

    /// Discards all statements.
    pub fn forget(&mut self) {
        self.statements.clear();
        self.prepared_by_login.clear();
    }

    /// Returns a prepared statement.
    pub fn prepared(&self, statement: &str) -> Option<&Statement> {
        self.statements.get(statement)
    }

    /// Prepares a statement with the subscriber's role, or with the login's if that role lacks a right. A policy may name
    /// objects in a schema that subscribers may not use, because PostgreSQL resolves its names when it is created. Rights on
    /// tables and functions are checked for the subscriber in any case. A statement prepared by the login is prepared again
    /// for each page: after a table in it is altered or analyzed, PostgreSQL would resolve the names with the subscriber's role.
    pub async fn prepare(
        &mut self,
        as_role: ActingAs<'_>,
        statement: &Arc<str>,
    ) -> Result<Result<(), Denied>, Error> {
        let needs_login = self.prepared_by_login.contains(statement);
        if self.statements.contains_key(statement) && !needs_login {
            return Ok(Ok(()));
        }
        let by_role = match needs_login {
            true => None,
            false => Some(self.prepare_as(&self.impersonate, &self.settings(&as_role), statement).await?),
        };
        let prepared = match by_role {
            Some(Err(error)) if error.code() != Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Err(error),
            Some(Ok(prepared)) => Ok(prepared),
            // With the search path that the query will have: with another PostgreSQL would resolve the names again.
            None | Some(Err(_)) => {
                let [.., path, wait, row_security, _] = self.settings(&as_role);
                let settings = [&self.limit, path, wait, row_security];
                let prepared = self.prepare_as(&self.as_login, &settings, statement).await?;
                self.prepared_by_login.insert(Arc::clone(statement));
                prepared
            }
        };
        match prepared {
            Ok(prepared) => {
                self.statements.insert(Arc::clone(statement), prepared);
                Ok(Ok(()))
            }
            Err(error) => Ok(Err(self.denied(&error))),
        }
    }

    /// Prepares a statement in a transaction that begins with `first`, which sets the limits: preparing waits for a lock on
    /// a table that a policy reads.
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
        client.execute(&self.rollback, &[]).await?;
        Ok(prepared)
    }

    /// The parameters of [`IMPERSONATE`].
    fn settings<'p>(&'p self, as_role: &'p ActingAs<'_>) -> [&'p (dyn ToSql + Sync); 8] {
        let path = if as_role.with_path { &self.path } else { &NO_PATH };
        let locked = *self.locked.lock().unwrap_or_else(PoisonError::into_inner);
        let is_locked = locked.is_some_and(|when| when.elapsed() < LOCKED_FOR);
        let wait = if is_locked { &LOCK_WAIT_AGAIN } else { &LOCK_WAIT };
        let ActingAs { role, json, sub, row_security, topic, .. } = as_role;
        [role, json, sub, &self.limit, path, wait, row_security, topic]
    }

    /// Classifies an error of PostgreSQL. A policy can raise any code, so no code counts as a lost connection.
    fn denied(&self, error: &tokio_postgres::Error) -> Denied {
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

    /// Runs a statement with a role and its claims. The five steps are pipelined into one round trip.
    ///
    /// # Errors
    /// When the session ended or is unusable. The inner result is PostgreSQL's refusal.
    pub async fn query(
        &self,
        as_role: ActingAs<'_>,
        statement: &Statement,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Result<Vec<Row>, Denied>, Error> {
        let client = &self.client;
        let settings = self.settings(&as_role);
        let (begun, impersonated, rows, current_user, rolled_back) = tokio::join!(
            client.execute(&self.begin, &[]),
            client.execute(&self.impersonate, &settings),
            client.query(statement, parameters),
            client.query_one(&self.current_user, &[]),
            client.execute(&self.rollback, &[]),
        );
        begun?;
        // If the rollback succeeded the session is sound, and an earlier failure was PostgreSQL's refusal.
        rolled_back?;
        if impersonated.is_err() {
            return Ok(Err(Denied::Role));
        }
        let rows = match rows {
            Ok(rows) => rows,
            Err(error) => return Ok(Err(self.denied(&error))),
        };
        Ok(match current_user {
            Ok(user) if user.get::<_, &str>(0) == as_role.role => Ok(rows),
            Ok(_) => Err(Denied::Role),
            Err(error) => Err(self.denied(&error)),
        })
    }
}

/// A run of statements, each with a role and claims of its own, in transactions that follow one another. It saves two of five commands
/// a statement. The statements are those of [`with_user`].
pub(super) struct Run<'a>(&'a Impersonation);

impl<'a> Run<'a> {
    /// Begins a run.
    ///
    /// # Errors
    /// When the session ended or is unusable.
    pub async fn begin(session: &'a Impersonation) -> Result<Self, Error> {
        session.client.execute(&session.begin, &[]).await?;
        Ok(Self(session))
    }

    /// Ends the run. A session whose run has not ended must not be used again.
    ///
    /// # Errors
    /// When the session ended or is unusable.
    pub async fn end(self) -> Result<(), Error> {
        self.0.client.execute(&self.0.rollback, &[]).await?;
        Ok(())
    }

    /// Runs a statement as [`Impersonation::query`] does.
    ///
    /// # Errors
    /// When the session ended or is unusable. The inner result is PostgreSQL's refusal.
    pub async fn query(
        &self,
        as_role: ActingAs<'_>,
        statement: &Statement,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Result<Row, Denied>, Error> {
        let session = self.0;
        let settings = session.settings(&as_role);
        let (impersonated, row, rolled_back) = tokio::join!(
            session.client.execute(&session.impersonate, &settings),
            session.client.query_one(statement, parameters),
            session.client.execute(&session.rollback_and_chain, &[]),
        );
        rolled_back?;
        if impersonated.is_err() {
            return Ok(Err(Denied::Role));
        }
        Ok(match row {
            Ok(row) if row.try_get::<_, &str>(USER).ok() == Some(as_role.role) => Ok(row),
            Ok(_) => Err(Denied::Role),
            Err(error) => Err(session.denied(&error)),
        })
    }
}

/// The column that [`with_user`] adds.
const USER: &str = "relay user";

/// Returns a statement of one row with the user after it, for a [`Run`]. The statement's aggregate is complete before the user is read.
pub(super) fn with_user(statement: &str) -> Arc<str> {
    format!(
        "select \"relay checked\".*, current_user::pg_catalog.text as \"{USER}\" from ({statement}) as \"relay checked\""
    )
    .into()
}

/// Whether PostgreSQL can read these images back, by the statement `reading`. True if that statement could not be prepared.
///
/// # Errors
/// As [`Impersonation::query`].
pub(super) async fn reads_back(
    session: &Impersonation,
    as_role: ActingAs<'_>,
    reading: &str,
    images: &[String],
) -> Result<bool, Error> {
    let Some(reading) = session.prepared(reading) else { return Ok(true) };
    Ok(!matches!(session.query(as_role, reading, &[&images]).await?, Err(Denied::Raised)))
}

/// A bisection of a page of images: first all of them, then the halves of each range that raised, down to single images.
pub(super) struct Bisection(Vec<Range<usize>>);

impl Bisection {
    /// Begins with all `count` images.
    pub fn of(count: usize) -> Self {
        Self(std::iter::once(0..count).filter(|all| !all.is_empty()).collect())
    }

    /// Returns the next range to evaluate.
    pub fn next(&mut self) -> Option<Range<usize>> {
        self.0.pop()
    }

    /// Queues the halves of a range that raised.
    pub fn split(&mut self, raised: Range<usize>) {
        if raised.len() > 1 {
            let middle = raised.start + raised.len() / 2;
            self.0.extend([raised.start..middle, middle..raised.end]);
        }
    }
}
