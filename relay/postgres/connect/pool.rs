//! Connections to PostgreSQL: the pool, single connections, and TLS.

use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::{Connect, HookError, Manager, ManagerConfig, Object, Pool, RecyclingMethod, Runtime};
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, poll_fn};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{AsyncMessage, Client, Config, Connection, Notification, SimpleQueryMessage, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::postgres::connect::address::Address;
use crate::postgres::connect::advice::{cure, place, wants_other_encryption};
pub use crate::postgres::connect::error::Error;
use crate::tls::{self, Verification};

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

/// What sessions that judge set beside that. Whatever else a policy may depend on is as a user's own session would have it; images hold
/// money as it is spelled.
pub const JUDGING: &str = "set jit = off; set lc_monetary = 'C'";

/// How rows are spelled: as in the images of the changelog, whatever the policies that show them are judged with.
pub const SPELLING: [(&str, &str); 6] = [
    ("TimeZone", "UTC"),
    ("DateStyle", "ISO, MDY"),
    ("IntervalStyle", "postgres"),
    ("bytea_output", "hex"),
    ("extra_float_digits", "1"),
    ("lc_monetary", "C"),
];

/// What `PINNED` leaves, for connections that only run statements of our own, in which nothing may get between a name and what it means.
pub const NO_PATH: &str = "set search_path = pg_catalog";

/// How long a connection may take to begin, password and settings included.
const BEGIN: Duration = Duration::from_secs(10);

/// So often each of two connections is asked who it is, to find a pooler that gives its sessions to others in between.
const ROUNDS: usize = 8;

/// What names the main connection.
pub const DATABASE: &str = "--database-url (DATABASE_URL)";
/// What names the connection for LISTEN.
pub const DOORBELL: &str = "--doorbell-url (RELAY_DOORBELL_URL)";
/// What names the judging connection.
pub const JUDGE: &str = "--judge-url (RELAY_JUDGE_URL)";

/// Where and how to connect.
#[derive(Clone)]
pub struct Server {
    /// What names its URL.
    setting: &'static str,
    address: Arc<Address>,
    tls: MakeTls,
}

impl Server {
    /// Reads a connection string; `name` becomes `application_name` where the string has none.
    ///
    /// # Errors
    /// When the string cannot be read, or the authority file holds no certificate.
    pub fn parse(url: &str, name: &str, authority: Option<&str>) -> Result<Self, Error> {
        Self::named("the database URL", url, name, authority)
    }

    /// The same, where `setting` is what has the string: it is named in what goes wrong.
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

    /// What somebody should know about the connection string.
    pub fn notes(&self) -> impl Iterator<Item = String> {
        self.address.notes.iter().map(|note| format!("{}: {note}", self.setting))
    }

    /// Whether the server has to show who it is.
    pub fn is_verified(&self) -> bool {
        self.address.trust.verification > Verification::None
    }

    /// As whom and where to.
    fn config(&self) -> &Config {
        &self.address.attempts[0]
    }

    /// Connects, encrypted in the first way that the server lets in.
    async fn open(&self) -> Result<(Client, Connection<Socket, TlsStream>), tokio_postgres::Error> {
        let mut opened = self.config().connect(self.tls.clone()).await;
        for next in &self.address.attempts[1..] {
            let Err(refused) = &opened else { break };
            if !wants_other_encryption(refused) {
                break;
            }
            match next.connect(self.tls.clone()).await {
                // What the first said is what has to be changed.
                Err(error) if wants_other_encryption(&error) => {}
                other => opened = other,
            }
        }
        opened
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
        let manager = Manager::from_connect(self.config().clone(), self.clone(), manager_settings);
        Pool::builder(manager)
            .max_size(size)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(Duration::from_secs(5)))
            .create_timeout(Some(self.patience()))
            .post_create(deadpool_postgres::Hook::async_fn(move |client, _| {
                let settings = settings.clone();
                Box::pin(async move { client.batch_execute(&settings).await.map_err(HookError::Backend) })
            }))
            .build()
            .map_err(|error| Error::Pool(error.to_string()))
    }

    /// The login's name, when the connection string has one.
    pub fn login(&self) -> Option<&str> {
        self.config().get_user()
    }

    /// How long a connection may take to begin.
    fn patience(&self) -> Duration {
        self.config().get_connect_timeout().map_or(BEGIN, |limit| BEGIN.max(*limit * 2))
    }

    /// Refuses a pooler that gives each transaction another session: settings, locks, temporary tables and prepared
    /// statements would be somebody else's.
    ///
    /// Two connections that are never used at once are given the same session by such a pooler, or one of them another than
    /// before. Nothing is set on them: it would stay with sessions that are others' next.
    ///
    /// # Errors
    /// When there is such a pooler, or the server cannot be reached or refuses.
    pub async fn check_sessions(&self) -> Result<(), Error> {
        let is_own = async {
            let (one, connection) = self.open().await?;
            tokio::spawn(connection);
            let (other, connection) = self.open().await?;
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
                "{} leads through a pooler in transaction mode, which gives each transaction another session of \
                 PostgreSQL: give PostgreSQL's own address, or that of a pool in session mode",
                self.setting
            ))),
        }
    }

    /// One connection of our own. It ends when the client is dropped.
    ///
    /// # Errors
    /// When the server cannot be reached or refuses.
    pub async fn connect(&self) -> Result<Client, Error> {
        let begin = async {
            let (client, connection) = self.open().await?;
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
            let (client, mut connection) = self.open().await?;
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
        match timeout(self.patience(), begin).await {
            Ok(Ok(begun)) => Ok(begun),
            Ok(Err(error)) => Err(match cure(&error, self.config(), self.setting) {
                Some(cure) => Error::Refused { error, cure },
                None if error.code().is_none() => Error::Away { place: place(self.config()), error },
                None => Error::Connect(error),
            }),
            Err(_) => Err(Error::Lost("PostgreSQL does not answer")),
        }
    }
}

impl Connect for Server {
    fn connect(
        &self,
        _config: &Config,
    ) -> BoxFuture<'_, Result<(Client, JoinHandle<()>), tokio_postgres::Error>> {
        async move {
            let (client, connection) = self.open().await?;
            // Its end is seen by whoever asks on it.
            Ok((client, tokio::spawn(connection.map(drop))))
        }
        .boxed()
    }
}

/// TLS for servers with a name. Those behind a Unix socket have none and are not asked for it.
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
