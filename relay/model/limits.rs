//! How much one client may ask for, hold and take its time over.

use std::time::Duration;

/// The bounds of a relay towards its clients.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Clients at a time.
    pub connections: usize,
    /// Bytes that wait for one client.
    pub outbox_bytes: usize,
    /// Bytes that wait for all clients together.
    pub total_outbox_bytes: usize,
    /// Rows of one answer.
    pub rows: usize,
    /// A client that takes nothing for this long is gone.
    pub write: Duration,
    /// A stream says this often that it lives, and where it stands.
    pub keep_alive: Duration,
}
