//! What the service role may ask of the status, and do to it.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::postgres::connect::pool::Error;
use crate::postgres::status::StatusTable;
use crate::status::board::Board;

/// Why a request of the service role failed.
pub enum StatusError {
    /// PostgreSQL refuses what it asks, and says why.
    Refused(String),
    /// It may succeed later.
    Unavailable(&'static str),
}

impl From<Error> for StatusError {
    fn from(error: Error) -> Self {
        match error.refusal() {
            Some(refusal) if !error.is_transient() && !error.is_late() => Self::Refused(refusal),
            _ => {
                tracing::warn!(error = %error, "status not read or set");
                Self::Unavailable(error.kind())
            }
        }
    }
}

/// The status, for requests of the service role.
pub struct StatusService {
    /// The board of this relay.
    pub board: Arc<Board>,
    table: StatusTable,
}

impl StatusService {
    /// Creates it.
    pub fn new(board: Arc<Board>, table: StatusTable) -> Self {
        Self { board, table }
    }

    /// Returns the numbers of users and what the last sweep did. Without a status table, the sweeps are inactive.
    ///
    /// # Errors
    /// As the connection, or of the status table.
    pub async fn stats(&self) -> Result<Value, StatusError> {
        let stats = self.table.stats(self.board.settings().lease()).await?;
        let none = || json!({"maintenanceActive": false, "onlineUsers": 0, "totalUsers": 0});
        Ok(stats.and_then(|stats| serde_json::from_str(&stats).ok()).unwrap_or_else(none))
    }

    /// Returns what this relay counted since the last reset.
    pub fn metrics(&self) -> Value {
        let counts = self.board.counts();
        let rate = match counts.requests {
            0 => 0.0,
            requests => (counts.throttled as f64 / requests as f64 * 10_000.0).round() / 100.0,
        };
        json!({
            "totalRequests": counts.requests,
            "throttledRequests": counts.throttled,
            "throttleRate": rate,
            "failedUpdates": counts.failed,
            "cacheSize": counts.users,
        })
    }

    /// Counts from zero again.
    pub fn reset_metrics(&self) {
        self.board.reset_counts();
    }

    /// Sets the status of a user. Returns whether the user has a row.
    ///
    /// # Errors
    /// As [`Self::stats`].
    pub async fn set(&self, user: &str, is_online: bool) -> Result<bool, StatusError> {
        Ok(self.table.set(user, is_online).await?)
    }

    /// Sweeps, and forgets what the throttle does not need. Returns the counts.
    ///
    /// # Errors
    /// As [`Self::stats`].
    pub async fn clean_up(&self) -> Result<Value, StatusError> {
        let settings = self.board.settings();
        let swept = self.table.sweep(settings.lease(), settings.silence).await?;
        let before = self.board.counts().users;
        self.board.tidy();
        let forgotten = before.saturating_sub(self.board.counts().users);
        Ok(json!({"setOffline": swept.unwrap_or(0), "cacheEntriesRemoved": forgotten}))
    }
}
