//! The statements by which relays of one database exchange messages, over a connection that each keeps for this.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Notification, Row, Statement};

use crate::model::session::member::NodeId;
use crate::postgres::connect::pool::{Error, NO_PATH, Server};
use crate::postgres::connect::within::within;

/// Client-side timeout of a statement: on a connection whose peer is gone, it would never end.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum number of batches of one relay that a statement reads.
pub const READ_BATCHES: i32 = 16;
/// Maximum number of relays that rang and were not read yet. Any login of the database can ring under any number.
const MAX_RINGS: usize = 256;
const WHAT: &str = "the connection to other relays";

/// The lock of a relay whose host is gone is released after half a minute. Messages do not survive a crash, nor need their commits.
const SETTINGS: &str = "set tcp_keepalives_idle = 15; set tcp_keepalives_interval = 5; set tcp_keepalives_count = 3; \
     set tcp_user_timeout = '30s'; set synchronous_commit = off; set jit = off; set lock_timeout = '2s'; listen relay_nodes";

/// A connection. It holds the advisory lock of its incarnation, by which others know that this relay lives.
pub struct NodeConnection {
    client: Client,
    incarnation: i32,
    rang: Arc<Mutex<BTreeSet<NodeId>>>,
    rings: watch::Receiver<()>,
    write: Statement,
    read: Statement,
    incarnations: Statement,
}

/// A batch of another relay.
pub struct NodeBatch {
    /// The relay.
    pub node: NodeId,
    /// Its number among the batches of that relay.
    pub number: u64,
    /// The connection over which it was written.
    pub incarnation: i32,
    /// Its messages.
    pub content: Vec<u8>,
}

impl NodeConnection {
    /// Connects, listens for others than `own`, and takes the lock of a new incarnation.
    ///
    /// # Errors
    /// As the connection.
    pub async fn open(server: &Server, own: NodeId) -> Result<Self, Error> {
        let rang: Arc<Mutex<BTreeSet<NodeId>>> = Arc::default();
        let (sender, rings) = watch::channel(());
        let waiting = Arc::clone(&rang);
        let handle = move |ring: Notification| {
            let node = ring.payload().parse::<i64>().map(|node| NodeId(node as u64));
            if let Ok(node) = node
                && node != own
            {
                let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
                if waiting.len() < MAX_RINGS {
                    waiting.insert(node);
                }
                sender.send_replace(());
            }
        };
        let client = server.connect_listening(handle).await?;
        let open = async {
            client.batch_execute(NO_PATH).await?;
            client.batch_execute(SETTINGS).await?;
            let write = client.prepare("select relay.node_write($1, $2, $3, $4)").await?;
            let read = client.prepare("select * from relay.node_read($1, $2, $3)").await?;
            let incarnations = client.prepare("select * from relay.node_incarnations()").await?;
            let take = "select pg_try_advisory_lock(relay.lock_class('node'), $1)";
            let incarnation = loop {
                let random = RandomState::new().hash_one(own.0) as i32 & i32::MAX;
                if client.query_one(take, &[&random]).await?.get(0) {
                    break random;
                }
            };
            Ok::<_, tokio_postgres::Error>((write, read, incarnations, incarnation))
        };
        let (write, read, incarnations, incarnation) = within(STATEMENT_TIMEOUT, WHAT, open).await?;
        Ok(Self { client, incarnation, rang, rings, write, read, incarnations })
    }

    /// Waits until another relay rings. Returns false when the connection is lost. Cancel safe.
    pub async fn rung(&mut self) -> bool {
        self.rings.changed().await.is_ok()
    }

    /// Takes the relays that rang since the last call.
    pub fn rang(&self) -> BTreeSet<NodeId> {
        std::mem::take(&mut *self.rang.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns its incarnation.
    pub fn incarnation(&self) -> i32 {
        self.incarnation
    }

    /// Returns the incarnations of the other relays that live.
    ///
    /// # Errors
    /// As the connection.
    pub async fn others(&self) -> Result<BTreeSet<i32>, Error> {
        let rows = self.query(&self.incarnations, &[]).await?;
        Ok(rows.iter().map(|row| row.get(0)).filter(|other| *other != self.incarnation).collect())
    }

    /// Writes batches with ascending numbers from `first`, and rings.
    ///
    /// # Errors
    /// As the connection. They may have been written nevertheless, and can be written again under the same numbers.
    pub async fn write(&self, own: NodeId, first: u64, batches: &[Vec<u8>]) -> Result<(), Error> {
        let parameters: &[&(dyn ToSql + Sync)] =
            &[&(own.0 as i64), &self.incarnation, &(first as i64), &batches];
        self.query(&self.write, parameters).await.map(drop)
    }

    /// Returns batches of these relays after these numbers, in order for each; at most [`READ_BATCHES`] of one.
    ///
    /// # Errors
    /// As the connection.
    pub async fn read(&self, after: &[(NodeId, u64)]) -> Result<Vec<NodeBatch>, Error> {
        let (nodes, numbers): (Vec<i64>, Vec<i64>) =
            after.iter().map(|(node, number)| (node.0 as i64, *number as i64)).unzip();
        let rows = self.query(&self.read, &[&nodes, &numbers, &READ_BATCHES]).await?;
        let batch = |row: &Row| {
            let (node, number): (i64, i64) = (row.get(0), row.get(1));
            NodeBatch {
                node: NodeId(node as u64),
                number: number as u64,
                incarnation: row.get(2),
                content: row.get(3),
            }
        };
        Ok(rows.iter().map(batch).collect())
    }

    /// Returns the number of the last batch of each relay.
    ///
    /// # Errors
    /// As the connection.
    pub async fn numbers(&self) -> Result<Vec<(NodeId, u64)>, Error> {
        let numbers = self.client.query("select * from relay.node_numbers()", &[]);
        let rows = within(STATEMENT_TIMEOUT, WHAT, numbers).await?;
        let number = |row: &Row| (NodeId(row.get::<_, i64>(0) as u64), row.get::<_, i64>(1) as u64);
        Ok(rows.iter().map(number).collect())
    }

    /// Removes old batches of all relays. Returns whether any are left.
    ///
    /// # Errors
    /// As the connection.
    pub async fn trim(&self) -> Result<bool, Error> {
        let trim = self.client.query_one("select relay.node_trim()", &[]);
        Ok(within(STATEMENT_TIMEOUT, WHAT, trim).await?.get(0))
    }

    async fn query(
        &self,
        statement: &Statement,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Error> {
        within(STATEMENT_TIMEOUT, WHAT, self.client.query(statement, parameters)).await
    }
}
