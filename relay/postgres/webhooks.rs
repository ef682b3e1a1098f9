//! The statements of webhooks: which relay delivers, what it has to deliver, and what it has done.

use std::time::Duration;

use serde::Serialize;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row, Statement};

use crate::postgres::connect::pool::{Error, Lease, NO_PATH, Pool, Server};
use crate::postgres::connect::within::within;
use crate::postgres::locks::Lock;

/// Client-side timeout of a statement: on a connection whose peer is gone, it would never end.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(20);
const WHAT: &str = "the connection of webhooks";
/// Where the peer is gone, PostgreSQL ends the session after half a minute, and another relay gets its lock. Statements wait
/// shortly for a row that an operator is changing.
const SETTINGS: &str = "set tcp_keepalives_idle = 10; set tcp_keepalives_interval = 5; set tcp_keepalives_count = 3; \
     set tcp_user_timeout = '30s'; set synchronous_commit = on; set jit = off; set statement_timeout = '15s'";

/// A webhook as `relay.webhook` was told. It has no `Debug`, because it has secrets.
#[derive(Clone, PartialEq)]
pub struct Hook {
    /// Its name.
    pub name: String,
    /// Tells it from a dropped one of the same name.
    pub version: String,
    /// How often an operator changed it.
    pub changes: i32,
    /// Why it has no changes.
    pub problem: Option<String>,
    /// Schema and name of the relation; `None` if it was dropped.
    pub relation: Option<(String, String)>,
    /// The key of the relation.
    pub key: Vec<String>,
    /// Where deliveries are sent.
    pub url: String,
    /// The operations that are delivered.
    pub events: Vec<String>,
    /// The filter, as in a subscription.
    pub filter: Option<String>,
    /// The columns; `None` for all.
    pub columns: Option<Vec<String>>,
    /// The role with whose rights changes are delivered.
    pub role: String,
    /// The keys of the signatures, separated by blanks.
    pub secret: String,
    /// Whether the changes of a row are delivered one after the other.
    pub in_order: bool,
    /// The number of attempts after which a delivery becomes a dead letter.
    pub attempts: u32,
    /// The pause after the first failure.
    pub pause: Duration,
    /// A hash of the rights, policies and options that decide what is delivered.
    pub rules: String,
}

/// Where a webhook continues.
#[derive(Clone)]
pub struct HookPosition {
    /// Everything before this cursor is delivered or waits in the database.
    pub cursor: String,
    /// How long the receiver wants nothing.
    pub paused: Duration,
    /// How often an operator retried or discarded dead letters.
    pub handled: i64,
}

/// A delivery that waits in the database.
pub struct HeldDelivery {
    /// Its id.
    pub id: String,
    /// Hashes of the keys of its rows; `None`: of any row.
    pub keys: Option<Vec<i64>>,
    /// Whether it tells a gap.
    pub is_gap: bool,
    /// The number of failed attempts.
    pub attempts: u32,
    /// The time until the next one.
    pub due: Duration,
    /// The size of its body.
    pub bytes: usize,
}

/// What waits in the database for a webhook.
#[derive(Default)]
pub struct Held {
    /// Deliveries, in order.
    pub deliveries: Vec<HeldDelivery>,
    /// Number and bytes of the dead letters.
    pub dead: (usize, usize),
}

/// What was done for a webhook since the last settlement. Written in one transaction.
#[derive(Debug, Default, Serialize, PartialEq)]
pub struct Settlement {
    /// [`Hook::rules`], by which new deliveries were read.
    pub rules: String,
    /// The new position, if it moved.
    pub cursor: Option<String>,
    /// The time of the position, as text.
    pub reached: Option<String>,
    /// How many were delivered.
    pub delivered: u64,
    /// The ids of deliveries that wait no more.
    pub gone: Vec<String>,
    /// Deliveries that wait, or are dead letters.
    pub held: Vec<HeldUpdate>,
    /// What is wrong; `None` if nothing is.
    pub error: Option<String>,
    /// How long the receiver wants nothing, in seconds.
    pub pause: Option<f64>,
    /// Why nothing is sent any more.
    pub disabled: Option<String>,
}

/// A delivery as it is held from now on.
#[derive(Debug, Serialize, PartialEq)]
pub struct HeldUpdate {
    /// Its id.
    pub id: String,
    /// See [`HeldDelivery::keys`].
    pub keys: Option<Vec<i64>>,
    /// See [`HeldDelivery::is_gap`].
    pub is_gap: bool,
    /// Its body, if it was not held before.
    pub body: Option<String>,
    /// The number of failed attempts.
    pub attempts: u32,
    /// Seconds until the next one.
    pub pause: f64,
    /// Why the last one failed.
    pub error: Option<String>,
    /// Whether there is no next one.
    pub is_dead: bool,
}

/// The connection of webhooks. While it has the lock, its relay delivers all webhooks of the database, and no other relay does.
pub struct WebhookConnection {
    client: Client,
    lead: Statement,
    work: Statement,
    held: Statement,
    body: Statement,
    settle: Statement,
}

impl WebhookConnection {
    /// Connects.
    ///
    /// # Errors
    /// As the connection.
    pub async fn open(server: &Server) -> Result<Self, Error> {
        let client = server.connect().await?;
        let open = async {
            client.batch_execute(&format!("{NO_PATH}; {SETTINGS}")).await?;
            let lead = client.prepare(&format!("select pg_try_advisory_lock({})", Lock::Webhooks)).await?;
            let work = client.prepare("select * from relay.webhook_work()").await?;
            let held = client.prepare("select * from relay.webhook_held($1)").await?;
            let body = client.prepare("select relay.webhook_body($1, $2)").await?;
            let settle = client.prepare("select relay.webhook_settle($1, $2, $3, $4::text::json)").await?;
            Ok::<_, tokio_postgres::Error>((lead, work, held, body, settle))
        };
        let (lead, work, held, body, settle) = within(STATEMENT_TIMEOUT, WHAT, open).await?;
        Ok(Self { client, lead, work, held, body, settle })
    }

    /// Takes the lock, if no other relay has it. Not to be called again with the lock, which would be held twice.
    ///
    /// # Errors
    /// As the connection.
    pub async fn lead(&self) -> Result<bool, Error> {
        Ok(within(STATEMENT_TIMEOUT, WHAT, self.client.query_one(&self.lead, &[])).await?.get(0))
    }

    /// Returns the webhooks to deliver.
    ///
    /// # Errors
    /// As the connection.
    pub async fn work(&self) -> Result<Vec<(Hook, HookPosition)>, Error> {
        Ok(self.query(&self.work, &[]).await?.iter().map(hook).collect())
    }

    /// Returns what waits for a webhook.
    ///
    /// # Errors
    /// As the connection.
    pub async fn held(&self, name: &str) -> Result<Held, Error> {
        let mut held = Held::default();
        for row in self.query(&self.held, &[&name]).await? {
            let (attempts, bytes): (i32, i64) = (row.get(3), row.get(5));
            let (attempts, bytes) = (attempts.unsigned_abs(), usize::try_from(bytes).unwrap_or(usize::MAX));
            let Some(id) = row.get(0) else {
                held.dead = (attempts as usize, bytes);
                continue;
            };
            let (keys, is_gap, due) = (row.get(1), row.get(2), seconds(row.get(4)));
            held.deliveries.push(HeldDelivery { id, keys, is_gap, attempts, due, bytes });
        }
        Ok(held)
    }

    /// Returns the body of a delivery; `None` if it waits no more.
    ///
    /// # Errors
    /// As the connection.
    pub async fn body(&self, name: &str, id: &str) -> Result<Option<String>, Error> {
        let parameters: &[&(dyn ToSql + Sync)] = &[&name, &id];
        let row = within(STATEMENT_TIMEOUT, WHAT, self.client.query_one(&self.body, parameters)).await?;
        Ok(row.get(0))
    }

    /// Writes what was done. Returns false if the webhook was dropped meanwhile; nothing is written then.
    ///
    /// # Errors
    /// As the connection.
    pub async fn settle(&self, hook: &Hook, settlement: &Settlement) -> Result<bool, Error> {
        let work = serde_json::to_string(settlement)
            .map_err(|_| Error::Unfit(String::from("what was delivered cannot be written as JSON")))?;
        let parameters: &[&(dyn ToSql + Sync)] = &[&hook.name, &hook.version, &hook.changes, &work];
        let row = within(STATEMENT_TIMEOUT, WHAT, self.client.query_one(&self.settle, parameters)).await?;
        Ok(row.get(0))
    }

    async fn query(
        &self,
        statement: &Statement,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Error> {
        within(STATEMENT_TIMEOUT, WHAT, self.client.query(statement, parameters)).await
    }
}

/// Whether there is a webhook to deliver.
///
/// # Errors
/// As the connection.
pub async fn has_webhooks(pool: &Pool) -> Result<bool, Error> {
    let lease = Lease::of(pool).await?;
    let query = lease
        .client()?
        .query_one("select exists (select from relay.webhooks where state <> 'disabled')", &[]);
    let row = within(STATEMENT_TIMEOUT, WHAT, query).await?;
    lease.done();
    Ok(row.get(0))
}

fn hook(row: &Row) -> (Hook, HookPosition) {
    let relation = row.get::<_, Option<String>>(2).zip(row.get(3));
    let attempts: i32 = row.get(12);
    let hook = Hook {
        name: row.get(0),
        version: row.get(1),
        changes: row.get(17),
        problem: row.get(18),
        relation,
        key: row.get::<_, Option<Vec<String>>>(4).unwrap_or_default(),
        url: row.get(5),
        events: row.get(6),
        filter: row.get(7),
        columns: row.get(8),
        role: row.get(9),
        secret: row.get(10),
        in_order: row.get(11),
        attempts: attempts.unsigned_abs(),
        pause: seconds(row.get(13)),
        rules: row.get(19),
    };
    let paused = row.get::<_, Option<f64>>(15).map_or(Duration::ZERO, seconds);
    (hook, HookPosition { cursor: row.get(14), paused, handled: row.get(16) })
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}
