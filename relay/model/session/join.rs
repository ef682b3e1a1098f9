//! A client's request to join a channel, as its codec has parsed it.

use crate::model::log::cursor::Cursor;
use crate::model::session::member::MembershipOptions;
use crate::model::subscription::error::SubscribeError;
use crate::model::subscription::request::Request;

/// Maximum number of `postgres_changes` entries of a channel. Each is checked for each change.
pub const MAX_ENTRIES: usize = 100;

/// Maximum size in bytes of a join's topic, configuration and token together. Most of it is kept while the channel is joined,
/// and a client may join a hundred channels.
pub const MAX_JOIN_BYTES: usize = 256 * 1024;

/// Maximum length of a topic in bytes. Each frame of the channel repeats it.
pub const MAX_TOPIC_BYTES: usize = 1024;

/// Maximum length of a presence key in bytes.
pub const MAX_KEY_BYTES: usize = 1024;

/// Approximate memory of a channel's membership in its topic, beside the names, in bytes.
pub const MEMBERSHIP_BYTES: usize = 512;

/// The configuration of a join with a valid topic.
#[derive(Debug, PartialEq)]
pub struct Join {
    /// The requests to bind.
    pub requests: Vec<Request>,
    /// The errors of entries that cannot be parsed.
    pub malformed: Vec<SubscribeError>,
    /// All entries as the client wrote them, for the codec to repeat. A join may wait long for PostgreSQL, and the text is much
    /// smaller than parsed values.
    pub entries: Vec<String>,
    /// The token, if any. An opaque key (`sb_…`) is not a token.
    pub token: Option<String>,
    /// Whether a failed subscription must fail the join.
    pub waits: bool,
    /// What the channel asks of its topic.
    pub membership: MembershipOptions,
    /// Whether its broadcasts are answered.
    pub acknowledges: bool,
    /// The name of the channel, if it is private.
    pub private_channel: Option<String>,
    /// Which earlier broadcasts it wants, if any.
    pub recall: Option<Recall>,
    /// The cursor after which its changes begin, if it has one.
    pub since: Option<Cursor>,
    /// Whether changes are events named after their operation.
    pub by_operation: bool,
    /// The size of the join in bytes, which approximates what its channel keeps.
    pub bytes: usize,
}

/// The stored broadcasts that a private channel gets again when it is joined: the newest ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recall {
    /// Since when, in milliseconds since 1970.
    pub since: u64,
    /// How many at most.
    pub limit: u32,
}

/// Maximum number of broadcasts that a join gets again.
pub const MAX_RECALLED: u32 = 25;

/// Returns the reason for refusing a join whose subscription failed.
pub fn disabled(refusal: &SubscribeError) -> String {
    format!("RealtimeDisabledForConfiguration: {refusal}")
}

/// Returns the reason for refusing to let a client read a private channel, with why if that is not for its policies to say.
pub fn unauthorized(channel: &str, why: Option<&str>) -> String {
    let why = why.map(|why| format!(" ({why})")).unwrap_or_default();
    format!("You do not have permissions to read from this Channel topic: {channel}{why}")
}

/// The reason for refusing a cursor in a session that has bookmarks.
pub const TWO_POSITIONS: &str =
    "since: a named session continues from its bookmark: leave out the cursor, or the parameter session";

/// Returns the reason for refusing a join of more than [`MAX_JOIN_BYTES`].
pub fn too_large() -> String {
    format!("ChannelRateLimitReached: A join may have {MAX_JOIN_BYTES} bytes at most")
}
