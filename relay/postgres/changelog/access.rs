//! What every reader of the changelog needs.

use std::sync::Arc;
use std::time::Duration;

use crate::postgres::changelog::transactions::Transactions;
use crate::postgres::connect::pool::{Pool, Server};

/// How a reader reaches the changelog.
#[derive(Clone)]
pub struct ChangelogAccess {
    /// The server with the changelog.
    pub server: Server,
    /// For queries beside the connection that streams a page.
    pub pool: Pool,
    /// Adds transaction data to the batches of a page.
    pub transactions: Arc<Transactions>,
    /// Time limit for each statement.
    pub query_timeout: Duration,
}
