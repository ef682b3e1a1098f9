//! Connections to PostgreSQL: the pool, single connections, TLS, and which errors are worth another try.

use std::time::Duration;

use deadpool_postgres::{
    HookError, Manager, ManagerConfig, Object, Pool, PoolError, RecyclingMethod, Runtime,
};
use futures_util::future::poll_fn;
use tokio::time::timeout;
use tokio_postgres::config::Host;
use tokio_postgres::error::SqlState;
use tokio_postgres::{AsyncMessage, Client, Notification, SimpleQueryMessage};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::tls;

/// What can go wrong with PostgreSQL.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server refused, or the connection broke. The chain below tells which.
    #[error("PostgreSQL: {}", told(.0))]
    Postgres(#[from] tokio_postgres::Error),
    /// No connection could be had: the server refused it, or cannot be reached. Nothing of it is for clients.
    #[error("no connection to PostgreSQL: {}", told(.0))]
    Connect(tokio_postgres::Error),
    /// No connection could be had from the pool, for no reason of PostgreSQL's.
    #[error("no connection to PostgreSQL: {0}")]
    Pool(String),
    /// The database is not as the relay needs it; the text says what to do.
    #[error("{0}")]
    Unfit(String),
    /// The connection is of no use any more, as far as can be seen from here; the text says why.
    #[error("{0}")]
    Lost(&'static str),
}

impl Error {
    /// Whether the same thing may succeed later without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Pool(_) | Self::Lost(_) => true,
            Self::Unfit(_) => false,
            Self::Postgres(error) | Self::Connect(error) => match error.code() {
                None => true,
                Some(code) => {
                    let class = &code.code()[..2];
                    matches!(class, "08" | "53" | "57") && *code != SqlState::QUERY_CANCELED
                        || matches!(code.code(), "40001" | "40P01" | "55P03" | "25006")
                }
            },
        }
    }

    /// PostgreSQL's code for it, when it was PostgreSQL that refused.
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Postgres(error) | Self::Connect(error) => error.code().map(SqlState::code),
            Self::Pool(_) | Self::Unfit(_) | Self::Lost(_) => None,
        }
    }

    /// What it is, in words that anybody may read: no name, no address.
    pub fn kind(&self) -> &'static str {
        if matches!(self, Self::Unfit(_)) {
            return "the database is not as the relay needs it, its log says why";
        }
        match self.code() {
            None => "PostgreSQL cannot be reached",
            Some("53300") => "PostgreSQL has no connection left",
            Some("42501") => "PostgreSQL refuses the relay a right that it needs",
            Some(code) if code.starts_with("28") => "PostgreSQL refuses the relay's login",
            Some(code) if code.starts_with("57") => "PostgreSQL is stopping or starting",
            Some(_) => "PostgreSQL refuses, the relay's log says why",
        }
    }

    /// PostgreSQL's own word on it as `ERROR 22P02 (invalid_text_representation) …`, when it was PostgreSQL that refused
    /// a statement.
    pub fn refusal(&self) -> Option<String> {
        let Self::Postgres(error) = self else { return None };
        let told = error.as_db_error()?;
        let name = match *told.code() {
            SqlState::INVALID_TEXT_REPRESENTATION => "invalid_text_representation",
            SqlState::UNDEFINED_FUNCTION => "undefined_function",
            SqlState::RAISE_EXCEPTION => "raise_exception",
            SqlState::DATETIME_FIELD_OVERFLOW => "datetime_field_overflow",
            SqlState::INVALID_DATETIME_FORMAT => "invalid_datetime_format",
            SqlState::NUMERIC_VALUE_OUT_OF_RANGE => "numeric_value_out_of_range",
            SqlState::INVALID_REGULAR_EXPRESSION => "invalid_regular_expression",
            SqlState::INVALID_ESCAPE_SEQUENCE => "invalid_escape_sequence",
            _ => "error",
        };
        Some(format!("ERROR {} ({name}) {}", told.code().code(), told.message()))
    }
}

impl From<PoolError> for Error {
    fn from(error: PoolError) -> Self {
        match error {
            PoolError::Backend(error) | PoolError::PostCreateHook(HookError::Backend(error)) => {
                Self::Connect(error)
            }
            error => Self::Pool(error.to_string()),
        }
    }
}

fn told(error: &tokio_postgres::Error) -> String {
    match (error.as_db_error(), std::error::Error::source(error)) {
        (Some(db), _) => match db.hint() {
            Some(hint) => format!("{} ({}). {hint}", db.message(), db.code().code()),
            None => format!("{} ({})", db.message(), db.code().code()),
        },
        (None, Some(source)) => format!("{error}: {source}"),
        (None, None) => error.to_string(),
    }
}

/// What every connection of ours sets, whatever the database or the login has as its default. What its texts mean: how
/// constants are read and written, how names are quoted, what a transaction is. And that it has time: our connections idle
/// for long and read long pages. Not set is what policies may depend on beyond that, such as the time zone or the search
/// path: a user's own session would have the default.
const PINNED: &str = "set standard_conforming_strings = on; set escape_string_warning = off; \
     set backslash_quote = safe_encoding; set quote_all_identifiers = off; set transform_null_equals = off; \
     set array_nulls = on; set xmloption = content; set client_encoding = 'UTF8'; set client_min_messages = notice; \
     set row_security = on; set check_function_bodies = on; set plpgsql.extra_errors = 'none'; \
     set plpgsql.extra_warnings = 'none'; set plpgsql.variable_conflict = 'error'; \
     set default_transaction_isolation = 'read committed'; set default_transaction_read_only = off; \
     set default_transaction_deferrable = off; \
     set idle_session_timeout = 0; set idle_in_transaction_session_timeout = 0; set statement_timeout = 0; \
     set lock_timeout = 0; \
     do $$ begin set transaction_timeout = 0; exception when undefined_object then null; end $$";

/// The same for connections that only run statements of our own, in which nothing may get between a name and what it means.
pub const NO_PATH: &str = "set search_path = pg_catalog";

/// How long a connection may take to begin, password and settings included.
const BEGIN: Duration = Duration::from_secs(10);

/// So often each of two connections is asked who it is, to find a pooler that gives its sessions to others in between.
const ROUNDS: usize = 8;

/// Where and how to connect.
#[derive(Clone)]
pub struct Server {
    config: tokio_postgres::Config,
    tls: MakeRustlsConnect,
}

impl Server {
    /// Reads a connection string; `name` becomes `application_name` where the string has none.
    ///
    /// Keepalives are short because a LISTEN connection only ever waits: without them a dead peer goes unnoticed for hours.
    ///
    /// # Errors
    /// When the string cannot be read, or the authority file holds no certificate.
    pub fn parse(url: &str, name: &str, authority: Option<&str>) -> Result<Self, Error> {
        let mut config: tokio_postgres::Config = url.parse().map_err(|error: tokio_postgres::Error| {
            Error::Unfit(format!(
                "the database URL cannot be read ({}): postgres://user@host:port/database is expected",
                told(&error)
            ))
        })?;
        // It would be found only when connecting, where it looks like a server that is away.
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            let why = "the database URL names no host: postgres://user@host:port/database is expected";
            return Err(Error::Unfit(String::from(why)));
        }
        if config.get_application_name().is_none() {
            config.application_name(name);
        }
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(Duration::from_secs(5));
        }
        config
            .keepalives_idle(Duration::from_secs(15))
            .keepalives_interval(Duration::from_secs(5))
            .keepalives_retries(3);
        config.tcp_user_timeout(Duration::from_secs(30));
        let tls = tls::trusting(authority).map_err(|error| Error::Unfit(error.to_string()))?;
        Ok(Self { config, tls: MakeRustlsConnect::new(tls) })
    }

    /// A pool of `size` connections whose commits wait for the flush, whatever the database's default is, and whose
    /// statements end after `limit`.
    ///
    /// # Errors
    /// When the pool cannot be built.
    pub fn pool(&self, size: usize, limit: Duration) -> Result<Pool, Error> {
        let settings = format!(
            "{PINNED}; {NO_PATH}; set synchronous_commit = on; set statement_timeout = {}",
            limit.as_millis()
        );
        let manager_settings = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let manager = Manager::from_config(self.config.clone(), self.tls.clone(), manager_settings);
        Pool::builder(manager)
            .max_size(size)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(Duration::from_secs(5)))
            .create_timeout(Some(Duration::from_secs(5)))
            .post_create(deadpool_postgres::Hook::async_fn(move |client, _| {
                let settings = settings.clone();
                Box::pin(async move { client.batch_execute(&settings).await.map_err(HookError::Backend) })
            }))
            .build()
            .map_err(|error| Error::Pool(error.to_string()))
    }

    /// The login's name, when the connection string has one.
    pub fn login(&self) -> Option<&str> {
        self.config.get_user()
    }

    /// Refuses a pooler that gives each transaction another session: settings, locks, temporary tables and prepared
    /// statements would be somebody else's. `setting` is named as what to change.
    ///
    /// Two connections that are never used at once are given the same session by such a pooler, or one of them another than
    /// before. Nothing is set on them: it would stay with sessions that are others' next.
    ///
    /// # Errors
    /// When there is such a pooler, or the server cannot be reached or refuses.
    pub async fn check_sessions(&self, setting: &str) -> Result<(), Error> {
        let is_own = async {
            let (one, connection) = self.config.connect(self.tls.clone()).await?;
            tokio::spawn(connection);
            let (other, connection) = self.config.connect(self.tls.clone()).await?;
            tokio::spawn(connection);
            let first = (session(&one).await?, session(&other).await?);
            for _ in 1..ROUNDS {
                if first.0 == first.1 || (session(&one).await?, session(&other).await?) != first {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        match self.begun(is_own).await? {
            true => Ok(()),
            false => Err(Error::Unfit(format!(
                "{setting} leads through a pooler in transaction mode, which gives each transaction another session of \
                 PostgreSQL: give PostgreSQL's own address, or that of a pool in session mode"
            ))),
        }
    }

    /// One connection of our own. It ends when the client is dropped.
    ///
    /// # Errors
    /// When the server cannot be reached or refuses.
    pub async fn connect(&self) -> Result<Client, Error> {
        let begin = async {
            let (client, connection) = self.config.connect(self.tls.clone()).await?;
            tokio::spawn(connection);
            client.batch_execute(PINNED).await?;
            Ok(client)
        };
        self.begun(begin).await
    }

    /// One connection that hands what it hears by LISTEN to `heard`, which is dropped when the connection ends.
    ///
    /// # Errors
    /// When the server cannot be reached or refuses.
    pub async fn connect_listening(
        &self,
        mut heard: impl FnMut(Notification) + Send + 'static,
    ) -> Result<Client, Error> {
        let begin = async {
            let (client, mut connection) = self.config.connect(self.tls.clone()).await?;
            tokio::spawn(async move {
                while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
                    if let AsyncMessage::Notification(notification) = message {
                        heard(notification);
                    }
                }
            });
            client.batch_execute(PINNED).await?;
            Ok(client)
        };
        self.begun(begin).await
    }

    /// The limit of the socket's connection counts until it is open; whoever answers then may still say nothing.
    async fn begun<T>(
        &self,
        begin: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, Error> {
        match timeout(BEGIN, begin).await {
            Ok(Ok(begun)) => Ok(begun),
            Ok(Err(error)) if error.code() == Some(&SqlState::UNDEFINED_DATABASE) => {
                Err(Error::Unfit(format!("{}: {}", told(&error), self.createdb())))
            }
            Ok(Err(error)) => Err(Error::Connect(error)),
            Err(_) => Err(Error::Lost("PostgreSQL does not answer")),
        }
    }

    /// The command that makes the database.
    fn createdb(&self) -> String {
        let mut command = String::from("createdb");
        if let Some(Host::Tcp(host)) = self.config.get_hosts().first() {
            command += &format!(" -h {host}");
        }
        if let Some(port) = self.config.get_ports().first() {
            command += &format!(" -p {port}");
        }
        let user = self.config.get_user();
        if let Some(user) = user {
            command += &format!(" -U {user}");
        }
        format!("{command} {}", self.config.get_dbname().or(user).unwrap_or_default())
    }
}

/// Which session of PostgreSQL answers.
async fn session(client: &Client) -> Result<Option<String>, tokio_postgres::Error> {
    let answers = client.simple_query("select pg_backend_pid()").await?;
    Ok(answers.iter().find_map(|answer| match answer {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    }))
}

/// Gives up a connection of a pool on which nothing came in time. On that one, and on those that idle in the pool since as
/// long, nothing may come ever again, though none of them is closed: they are not used again.
pub fn give_up(pool: &Pool, client: Object) {
    drop(Object::take(client));
    pool.retain(|_, _| false);
}

/// A connection of a pool, for as long as something is asked on it. Dropped before [`Self::done`], it is given up
/// ([`give_up`]).
pub struct Lease {
    pool: Pool,
    client: Option<Object>,
}

impl Lease {
    /// One connection.
    ///
    /// # Errors
    /// When none can be had in time.
    pub async fn of(pool: &Pool) -> Result<Self, Error> {
        let client = pool.get().await?;
        Ok(Self { pool: pool.clone(), client: Some(client) })
    }

    /// The connection.
    ///
    /// # Errors
    /// None in fact: it is there until [`Self::done`].
    pub fn client(&self) -> Result<&deadpool_postgres::Client, Error> {
        self.client.as_ref().ok_or(Error::Lost("the connection was given back"))
    }

    /// PostgreSQL has answered, whatever it said.
    pub fn done(mut self) {
        self.client = None;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(client) = self.client.take() {
            give_up(&self.pool, client);
        }
    }
}
