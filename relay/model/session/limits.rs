//! Limits on what clients may request and hold, and how long they may take.

use std::time::Duration;

/// The relay's limits for its clients.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Concurrent clients.
    pub connections: usize,
    /// Concurrent connections from one address; `None` means no limit.
    pub connections_per_address: Option<usize>,
    /// Channels joined by one client.
    pub channels: usize,
    /// Whether only private channels may be joined.
    pub private_only: bool,
    /// Joins of one client per second, on average over a minute.
    pub joins_per_second: u32,
    /// Messages of one client per second, on average over a minute.
    pub messages_per_second: u32,
    /// Size of one message from a client, in bytes.
    pub message_bytes: usize,
    /// Size of a broadcast, in bytes.
    pub broadcast_bytes: usize,
    /// Broadcasts of one identity over HTTP per second, on average over a minute.
    pub http_broadcasts_per_second: u32,
    /// Changes of the presence of one client per second, on average over a minute.
    pub presence_per_second: u32,
    /// What topics hold.
    pub topics: TopicLimits,
    /// Bytes queued for one client.
    pub outbox_bytes: usize,
    /// Bytes queued for all clients together.
    pub total_outbox_bytes: usize,
    /// Size of the frame of one change, in bytes.
    pub change_bytes: usize,
    /// Size of the kernel's send buffer of one client, in bytes.
    pub send_buffer_bytes: usize,
    /// Rows in one answer.
    pub rows: RowLimit,
    /// Time limit for a complete request head.
    pub head: Duration,
    /// Write timeout: how long a client may read nothing while data waits for it.
    pub write: Duration,
    /// How long a WebSocket client may be silent. Clients send a heartbeat every 25 seconds, in sleeping browser tabs every minute.
    pub silence: Duration,
    /// Interval between keep-alives of an idle event stream.
    pub keep_alive: Duration,
}

/// Limits on what topics hold.
#[derive(Debug, Clone, Copy)]
pub struct TopicLimits {
    /// Size of what one member tracks, in bytes.
    pub presence_bytes: usize,
    /// Size of what all members of a topic track, in bytes.
    pub topic_presence_bytes: usize,
}

/// Limits on the rows of one answer.
#[derive(Debug, Clone, Copy)]
pub struct RowLimit {
    /// Maximum row count.
    pub number: usize,
    /// Maximum size as JSON, in bytes.
    pub bytes: usize,
}

/// The limit that an answer exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExceededLimit {
    /// The row count.
    Number,
    /// The size in bytes.
    Bytes,
    /// The memory available now.
    Room,
}
