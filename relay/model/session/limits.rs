//! How much one client may ask for, hold and take its time over.

use std::time::Duration;

/// The bounds of a relay towards its clients.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Clients at a time.
    pub connections: usize,
    /// Connections from one address at a time; none means any number.
    pub connections_per_address: Option<usize>,
    /// Channels that one client may join.
    pub channels: usize,
    /// Joins of one client a second, on average over a minute.
    pub joins_per_second: u32,
    /// Messages of one client a second, on average over a minute.
    pub messages_per_second: u32,
    /// Bytes of one message from a client.
    pub message_bytes: usize,
    /// Bytes that wait for one client.
    pub outbox_bytes: usize,
    /// Bytes that wait for all clients together.
    pub total_outbox_bytes: usize,
    /// Bytes of the frame of one change.
    pub change_bytes: usize,
    /// Bytes that may be on their way to one client.
    pub send_buffer_bytes: usize,
    /// Rows of one answer.
    pub rows: MostRows,
    /// A connection that sends no whole head of a request for this long is gone.
    pub head: Duration,
    /// A client that takes nothing for this long is gone.
    pub write: Duration,
    /// A socket that says nothing for this long is gone; clients send a heartbeat every 25 seconds.
    pub silence: Duration,
    /// A stream says this often that it lives, and where it stands.
    pub keep_alive: Duration,
}

/// How many rows are given at once.
#[derive(Debug, Clone, Copy)]
pub struct MostRows {
    /// So many.
    pub number: usize,
    /// So many bytes of them, as JSON.
    pub bytes: usize,
}

/// What is beyond a bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beyond {
    /// The number.
    Number,
    /// The bytes.
    Bytes,
    /// What there is room for in memory now.
    Room,
}
