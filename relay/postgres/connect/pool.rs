//! Connections to PostgreSQL: the pool, single connections, and TLS.

use std::sync::Arc;
use std::time::{Duration, Instant};

use deadpool_postgres::{
    Connect, HookError, Manager, ManagerConfig, Object, PoolError, QueueMode, RecyclingMethod, Runtime,
    Timeouts,
};
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, poll_fn};
use tokio::task::JoinHandle;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{AsyncMessage, Client, Config, Connection, Notification, SimpleQueryMessage, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::observe::Observe;
use crate::postgres::connect::address::Address;
use crate::postgres::connect::advice::{cure, place, wants_other_encryption};
pub use crate::postgres::connect::error::Error;
use crate::postgres::connect::within::within;
use crate::tls::{self, Verification};

/// Settings of every connection, which override defaults of the database and the login. They fix the meaning of statements
/// (constants, quoting, transactions) and turn timeouts off, because connections are idle for long and read long pages. Other
/// settings that policies may depend on, such as the time zone or the search path, keep the default that a user's own
/// session would have.
const PINNED: &str = "set standard_conforming_strings = on; set escape_string_warning = off; \
     set backslash_quote = safe_encoding; set quote_all_identifiers = off; set transform_null_equals = off; \
     set array_nulls = on; set xmloption = content; set client_encoding = 'UTF8'; set client_min_messages = notice; \
     set row_security = on; set check_function_bodies = on; set plpgsql.extra_errors = 'none'; \
     set plpgsql.extra_warnings = 'none'; set plpgsql.variable_conflict = 'error'; \
     set default_transaction_isolation = 'read committed'; set default_transaction_read_only = off; \
     set default_transaction_deferrable = off; \
     set idle_session_timeout = 0; set idle_in_transaction_session_timeout = 0; set statement_timeout = 0; \
     set lock_timeout = 0; \
     select pg_catalog.set_config('transaction_timeout', '0', false) \
     where pg_catalog.current_setting('transaction_timeout', true) operator(pg_catalog.<>) '0'";

/// Additional settings of judging sessions. `lc_monetary` is that of the images, which contain money as text. All other
/// settings that a policy may depend on are as in a user's own session.
pub const JUDGING: &str = "set jit = off; set lc_monetary = 'C'";

/// Output settings of row images in the changelog. Rows read from tables use them, too, whatever settings policies run with.
pub const SPELLING: [(&str, &str); 6] = [
    ("TimeZone", "UTC"),
    ("DateStyle", "ISO, MDY"),
    ("IntervalStyle", "postgres"),
    ("bytea_output", "hex"),
    ("extra_float_digits", "1"),
    ("lc_monetary", "C"),
];

/// The search path of connections that only run the relay's own statements, so that a name cannot resolve to another object.
pub const NO_PATH: &str = "set search_path = pg_catalog";

/// Minimum timeout for opening a connection, including login and settings.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// Number of checks of each of two connections, to find a pooler that switches their sessions.
const ROUNDS: usize = 8;

/// The setting of the main connection.
pub const DATABASE: &str = "--database-url (DATABASE_URL)";
/// The setting of the connection for LISTEN.
pub const DOORBELL: &str = "--doorbell-url (RELAY_DOORBELL_URL)";
/// The setting of the judging connection.
pub const JUDGE: &str = "--judge-url (RELAY_JUDGE_URL)";

/// Connections for short statements, shared by many callers.
#[derive(Clone)]
pub struct Pool {
    connections: deadpool_postgres::Pool,
    /// Records waits, if they are measured.
    observe: Option<Arc<Observe>>,
}

impl Pool {
    /// Measures the waits for its connections.
    #[must_use]
    pub fn measured(self, observe: &Arc<Observe>) -> Self {
        Self { observe: Some(Arc::clone(observe)), ..self }
    }

    /// Takes a connection, and opens one if there is room for it.
    ///
    /// # Errors
    /// When none is available in time, or the server cannot be reached.
    pub async fn get(&self) -> Result<Object, PoolError> {
        self.timeout_get(&self.timeouts()).await
    }

    /// The same with other time limits.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn timeout_get(&self, timeouts: &Timeouts) -> Result<Object, PoolError> {
        let began = Instant::now();
        let taken = self.connections.timeout_get(timeouts).await;
        if let Some(observe) = &self.observe {
            observe.pool_waited(began.elapsed());
        }
        taken
    }

    /// Its time limits.
    pub fn timeouts(&self) -> Timeouts {
        self.connections.timeouts()
    }
}

/// A PostgreSQL server, and how to connect to it.
#[derive(Clone)]
pub struct Server {
    /// The setting with its URL, for error messages.
    setting: &'static str,
    address: Arc<Address>,
    tls: MakeTls,
}

impl Server {
    /// Parses a connection string; `name` becomes `application_name` if the string has none.
    ///
    /// # Errors
    /// When the string cannot be read, or the authority file holds no certificate.
    pub fn parse(url: &str, name: &str, authority: Option<&str>) -> Result<Self, Error> {
        Self::named("the database URL", url, name, authority)
    }

    /// Parses the connection string of a setting, which error messages name.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub fn named(
        setting: &'static str,
        url: &str,
        name: &str,
        authority: Option<&str>,
    ) -> Result<Self, Error> {
        let unfit = |why: &dyn std::fmt::Display| Error::Unfit(format!("{setting} cannot be used: {why}"));
        let mut address =
            Address::parse(url, authority, |name| std::env::var(name).ok()).map_err(|why| unfit(&why))?;
        for config in &mut address.attempts {
            if config.get_application_name().is_none() {
                config.application_name(name);
            }
        }
        let tls = tls::to_postgres(&address.trust).map_err(|why| unfit(&why))?;
        Ok(Self { setting, address: Arc::new(address), tls: MakeTls(MakeRustlsConnect::new(tls)) })
    }

    /// Notes for the user about the connection string.
    pub fn notes(&self) -> impl Iterator<Item = String> {
        self.address.notes.iter().map(|note| format!("{}: {note}", self.setting))
    }

    /// Whether the server's certificate is verified.
    pub fn is_verified(&self) -> bool {
        self.address.trust.verification > Verification::None
    }

    /// The preferred configuration.
    fn config(&self) -> &Config {
        &self.address.attempts[0]
    }

    /// Connects with the first choice of encryption that the server accepts.
    async fn open(&self) -> Result<(Client, Connection<Socket, TlsStream>), tokio_postgres::Error> {
        let mut opened = self.config().connect(self.tls.clone()).await;
        for next in &self.address.attempts[1..] {
            let Err(refused) = &opened else { break };
            if !wants_other_encryption(refused) {
                break;
            }
            match next.connect(self.tls.clone()).await {
                // The first refusal is the one to report.
                Err(error) if wants_other_encryption(&error) => {}
                other => opened = other,
            }
        }
        opened
    }

    /// Creates a pool of `size` connections for short statements, which JIT compilation would make many times slower. Their
    /// commits wait for the WAL flush, whatever the database's default; their statements end after `limit`.
    ///
    /// # Errors
    /// When the pool cannot be built.
    pub fn pool(&self, size: usize, limit: Duration) -> Result<Pool, Error> {
        let settings = format!(
            "{PINNED}; {NO_PATH}; set jit = off; set synchronous_commit = on; set statement_timeout = {}",
            limit.as_millis()
        );
        let manager_settings = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let manager = Manager::from_connect(self.config().clone(), self.clone(), manager_settings);
        let connections = deadpool_postgres::Pool::builder(manager)
            .max_size(size)
            // The newest first: the session that was used last has the plans of what runs most often, and others stay unopened.
            .queue_mode(QueueMode::Lifo)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(Duration::from_secs(5)))
            .create_timeout(Some(self.open_timeout()))
            .post_create(deadpool_postgres::Hook::async_fn(move |client, _| {
                let settings = settings.clone();
                Box::pin(async move { client.batch_execute(&settings).await.map_err(HookError::Backend) })
            }))
            .build()
            .map_err(|error| Error::Pool(error.to_string()))?;
        Ok(Pool { connections, observe: None })
    }

    /// The login's name, when the connection string has one.
    pub fn login(&self) -> Option<&str> {
        self.config().get_user()
    }

    /// Timeout for opening a connection.
    fn open_timeout(&self) -> Duration {
        self.config().get_connect_timeout().map_or(OPEN_TIMEOUT, |limit| OPEN_TIMEOUT.max(*limit * 2))
    }

    /// Refuses a pooler in transaction mode: settings, locks, temporary tables and prepared statements would belong to
    /// another session after each transaction.
    ///
    /// Uses two connections in turn. Such a pooler gives both the same session, or one of them a new session. No settings are
    /// made on them, because they would remain in sessions that the pooler gives to others.
    ///
    /// # Errors
    /// When there is such a pooler, or the server cannot be reached or refuses.
    pub async fn check_sessions(&self) -> Result<(), Error> {
        let is_own = async {
            let (one, connection) = self.open().await?;
            drive(connection);
            let (other, connection) = self.open().await?;
            drive(connection);
            let first = (session(&one).await?, session(&other).await?);
            for _ in 1..ROUNDS {
                if first.0 == first.1 || (session(&one).await?, session(&other).await?) != first {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        match self.within_open_timeout(is_own).await? {
            true => Ok(()),
            false => Err(Error::Unfit(format!(
                "{} leads through a pooler in transaction mode, which gives each transaction another session of \
                 PostgreSQL: give PostgreSQL's own address, or that of a pooler in session mode",
                self.setting
            ))),
        }
    }

    /// Opens a single connection. It ends when the client is dropped.
    ///
    /// # Errors
    /// When the server cannot be reached or refuses.
    pub async fn connect(&self) -> Result<Client, Error> {
        let begin = async {
            let (client, connection) = self.open().await?;
            drive(connection);
            client.batch_execute(PINNED).await?;
            Ok(client)
        };
        self.within_open_timeout(begin).await
    }

    /// Opens a connection that passes notifications to `handler`, which is dropped when the connection ends.
    ///
    /// # Errors
    /// When the server cannot be reached or refuses.
    pub async fn connect_listening(
        &self,
        mut handler: impl FnMut(Notification) + Send + 'static,
    ) -> Result<Client, Error> {
        let begin = async {
            let (client, mut connection) = self.open().await?;
            drive(async move {
                while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
                    if let AsyncMessage::Notification(notification) = message {
                        handler(notification);
                    }
                }
            });
            client.batch_execute(PINNED).await?;
            Ok(client)
        };
        self.within_open_timeout(begin).await
    }

    /// Bounds the whole login. The connect timeout covers only the TCP connection: a peer that accepts it may never answer.
    async fn within_open_timeout<T>(
        &self,
        begin: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, Error> {
        let failed = |error| match cure(&error, self.config(), self.setting) {
            Some(cure) => Error::Refused { error, cure },
            None if error.code().is_none() => Error::Away { place: place(self.config()), error },
            None => Error::Connect(error),
        };
        // Boxed: a login is large, and every connection waits for one.
        let begin = Box::pin(async { begin.await.map_err(failed) });
        within(self.open_timeout(), "PostgreSQL", begin).await
    }
}

impl Connect for Server {
    fn connect(
        &self,
        _config: &Config,
    ) -> BoxFuture<'_, Result<(Client, JoinHandle<()>), tokio_postgres::Error>> {
        async move {
            let (client, connection) = self.open().await?;
            // The pool aborts the task with the client.
            Ok((client, drive(connection)))
        }
        .boxed()
    }
}

/// Runs a connection. The task is not tracked, because it ends with its client, and statements on the client report its end.
fn drive<T: Send + 'static>(connection: impl Future<Output = T> + Send + 'static) -> JoinHandle<()> {
    tokio::spawn(connection.map(drop))
}

/// TLS for servers with a name. A server behind a Unix socket has none, and no TLS.
#[derive(Clone)]
struct MakeTls(MakeRustlsConnect);

type TlsStream = <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream;

impl MakeTlsConnect<Socket> for MakeTls {
    type Stream = TlsStream;
    type TlsConnect = <MakeRustlsConnect as MakeTlsConnect<Socket>>::TlsConnect;
    type Error = <MakeRustlsConnect as MakeTlsConnect<Socket>>::Error;

    fn make_tls_connect(&mut self, host: &str) -> Result<Self::TlsConnect, Self::Error> {
        let host = if host.is_empty() { "localhost" } else { host };
        MakeTlsConnect::<Socket>::make_tls_connect(&mut self.0, host)
    }
}

/// Returns the backend pid of the session that answers.
async fn session(client: &Client) -> Result<Option<String>, tokio_postgres::Error> {
    let answers = client.simple_query("select pg_backend_pid()").await?;
    Ok(answers.iter().find_map(|answer| match answer {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    }))
}

/// Drops a connection on which an answer timed out, and all idle connections of its pool: they may be dead as well, although
/// none is closed.
pub fn give_up(pool: &Pool, client: Object) {
    drop(Object::take(client));
    pool.connections.retain(|_, _| false);
}

/// A connection of a pool for one query. If it is dropped before [`Self::done`], the query was cancelled or timed out, and the
/// connection is given up ([`give_up`]).
pub struct Lease {
    pool: Pool,
    client: Option<Object>,
}

impl Lease {
    /// Takes a connection from the pool.
    ///
    /// # Errors
    /// When none is available in time.
    pub async fn of(pool: &Pool) -> Result<Self, Error> {
        let client = pool.get().await?;
        Ok(Self { pool: pool.clone(), client: Some(client) })
    }

    /// The connection.
    ///
    /// # Errors
    /// Never in practice: the connection is present until [`Self::done`].
    pub fn client(&self) -> Result<&deadpool_postgres::Client, Error> {
        self.client.as_ref().ok_or(Error::Lost("the connection was given back"))
    }

    /// The connection, for a transaction.
    ///
    /// # Errors
    /// As [`Self::client`].
    pub fn client_mut(&mut self) -> Result<&mut deadpool_postgres::Client, Error> {
        self.client.as_mut().ok_or(Error::Lost("the connection was given back"))
    }

    /// Returns the connection to the pool, after an answer of PostgreSQL, be it an error.
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
