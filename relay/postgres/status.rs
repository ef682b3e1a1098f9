//! The statements of the status: who is online, written for many users at once.

use std::time::Duration;

use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row, Statement};

use crate::model::presence::status::StatusUpdate;
use crate::postgres::connect::pool::{Error, Lease, NO_PATH, Pool, Server};
use crate::postgres::connect::within::within;

/// Maximum wait for a lock on the status table. Rows that are held are not waited for.
const LOCK_TIMEOUT: &str = "2s";
/// Client-side timeout of a statement: on a connection whose peer is gone, it would never end.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum number of users that one statement of a sweep sets offline.
const SWEEP_SIZE: i32 = 1000;
const WHAT: &str = "the status connection";

/// The connection of the status writer. No one else waits for it.
pub struct StatusConnection {
    client: Client,
    write: Statement,
    begin: Statement,
    beat: Statement,
    sweep: Statement,
}

/// A user that was not written.
pub struct Unwritten {
    /// The user's id, as in the update.
    pub id: String,
    /// PostgreSQL's error code; `None` if another transaction holds the row.
    pub why: Option<String>,
}

impl StatusConnection {
    /// Connects.
    ///
    /// # Errors
    /// As the connection.
    pub async fn open(server: &Server) -> Result<Self, Error> {
        let client = server.connect().await?;
        let open = async {
            let settings =
                format!("{NO_PATH}; set synchronous_commit = on; set lock_timeout = '{LOCK_TIMEOUT}'");
            client.batch_execute(&settings).await?;
            let write = "select w.who, w.why from relay.status_write($1, $2, $3, $4, $5, $6) w";
            let write = client.prepare(write).await?;
            let begin = client.prepare("select relay.status_begin()").await?;
            let beat = client.prepare("select relay.status_beat($1)").await?;
            let sweep = client.prepare("select relay.status_sweep($1, $2, $3)").await?;
            Ok::<_, tokio_postgres::Error>((write, begin, beat, sweep))
        };
        let (write, begin, beat, sweep) = within(STATEMENT_TIMEOUT, WHAT, open).await?;
        Ok(Self { client, write, begin, beat, sweep })
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// Registers this relay and returns its id; `None` if there is no status table.
    ///
    /// # Errors
    /// As the connection.
    pub async fn begin(&self) -> Result<Option<String>, Error> {
        Ok(self.query_one(&self.begin, &[]).await?.get(0))
    }

    /// Tells that this relay lives. Returns whether it is known; it is not if it was taken for dead or the status was turned off.
    ///
    /// # Errors
    /// As the connection.
    pub async fn beat(&self, relay: &str) -> Result<bool, Error> {
        Ok(self.query_one(&self.beat, &[&relay]).await?.get(0))
    }

    /// Tells that this relay ends.
    ///
    /// # Errors
    /// As the connection.
    pub async fn end(&self, relay: &str) -> Result<(), Error> {
        let parameters: &[&(dyn ToSql + Sync)] = &[&relay];
        let end = self.client.execute("select relay.status_end($1)", parameters);
        within(STATEMENT_TIMEOUT, WHAT, end).await.map(drop)
    }

    /// Writes the status of many users by one statement. Returns those that were not written.
    ///
    /// # Errors
    /// As the connection, or of the status table.
    pub async fn write(&self, relay: &str, updates: &[StatusUpdate]) -> Result<Vec<Unwritten>, Error> {
        let users: Vec<&str> = updates.iter().map(|update| &*update.participant.id).collect();
        let here: Vec<bool> = updates.iter().map(|update| update.is_here).collect();
        let online: Vec<bool> = updates.iter().map(|update| update.is_online).collect();
        let anonymous: Vec<bool> = updates.iter().map(|update| update.participant.is_anonymous).collect();
        let ages: Vec<f64> = updates.iter().map(|update| update.age.as_secs_f64()).collect();
        let parameters: &[&(dyn ToSql + Sync)] = &[&relay, &users, &here, &online, &anonymous, &ages];
        let rows = within(STATEMENT_TIMEOUT, WHAT, self.client.query(&self.write, parameters)).await?;
        Ok(rows.iter().map(|row| Unwritten { id: row.get(0), why: row.get(1) }).collect())
    }

    /// Sets users of dead relays and silent users offline. Returns their number; `None` if another relay sweeps.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn sweep(&self, lease: Duration, silence: Duration) -> Result<Option<u64>, Error> {
        let mut swept = None;
        loop {
            let parameters: &[&(dyn ToSql + Sync)] =
                &[&lease.as_secs_f64(), &silence.as_secs_f64(), &SWEEP_SIZE];
            let step: Option<i64> = self.query_one(&self.sweep, parameters).await?.get(0);
            let Some(step) = step.map(i64::unsigned_abs) else { return Ok(swept) };
            swept = Some(swept.unwrap_or(0) + step);
            if step < SWEEP_SIZE.unsigned_abs().into() {
                return Ok(swept);
            }
        }
    }

    async fn query_one(
        &self,
        statement: &Statement,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Row, Error> {
        within(STATEMENT_TIMEOUT, WHAT, self.client.query_one(statement, parameters)).await
    }
}

/// What the service role may ask and do, over a connection of its own.
pub struct StatusTable {
    pool: Pool,
}

impl StatusTable {
    /// Creates it for the database of `server`.
    ///
    /// # Errors
    /// When the pool cannot be built.
    pub fn new(server: &Server) -> Result<Self, Error> {
        Ok(Self { pool: server.pool(1, STATEMENT_TIMEOUT)? })
    }

    /// Returns the numbers of users and what the last sweep did, as JSON; `None` if there is no status table.
    ///
    /// # Errors
    /// As the connection, or of the status table.
    pub async fn stats(&self, lease: Duration) -> Result<Option<String>, Error> {
        Ok(self.query_one("select relay.status_stats($1)", &[&lease.as_secs_f64()]).await?.get(0))
    }

    /// Sets the status of a user. Returns whether the user has a row.
    ///
    /// # Errors
    /// As [`Self::stats`].
    pub async fn set(&self, user: &str, is_online: bool) -> Result<bool, Error> {
        Ok(self.query_one("select relay.status_set($1, $2)", &[&user, &is_online]).await?.get(0))
    }

    /// Sweeps at once. Returns the number of users set offline; `None` if a relay is sweeping.
    ///
    /// # Errors
    /// As [`Self::stats`].
    pub async fn sweep(&self, lease: Duration, silence: Duration) -> Result<Option<u64>, Error> {
        let parameters: &[&(dyn ToSql + Sync)] = &[&lease.as_secs_f64(), &silence.as_secs_f64(), &SWEEP_SIZE];
        let row = self.query_one("select relay.status_sweep($1, $2, $3)", parameters).await?;
        Ok(row.get::<_, Option<i64>>(0).map(i64::unsigned_abs))
    }

    async fn query_one(&self, statement: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Row, Error> {
        let lease = Lease::of(&self.pool).await?;
        let client = lease.client()?;
        let query = async {
            let statement = client.prepare_cached(statement).await?;
            client.query_one(&statement, parameters).await
        };
        let row = within(STATEMENT_TIMEOUT, WHAT, query).await;
        // After a late answer the connection is given up.
        if !matches!(row, Err(Error::Late { .. })) {
            lease.done();
        }
        row
    }
}
