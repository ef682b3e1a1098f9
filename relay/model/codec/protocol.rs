//! What a wire protocol is to the rest of the relay: a way to write the changes of a subscription, and, on a socket, to read and
//! write the messages of a session.

use crate::model::codec::change_event::ChangeEvents;
use crate::model::codec::phoenix::changes::ChannelChanges;
use crate::model::session::broadcast::BroadcastKind;
use crate::model::session::message::{ChannelName, Incoming, Outgoing, Reference, SessionEvent};
use crate::model::session::stored_broadcast::StoredBroadcast;

/// The message of a channel that receives changes.
pub const SUBSCRIBED: &str = "Subscribed to PostgreSQL";
/// The message when the feed stalls.
pub const STALLED: &str =
    "Stalled: the database cannot be asked now, changes follow in order once it is back";
/// The message when it resumes.
pub const RESUMED: &str = "Feed resumed";

/// The encoding of a subscription, one variant for each protocol. Subscriptions with equal codecs share their frames.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Codec {
    /// Phoenix frames of a joined topic.
    Phoenix(ChannelChanges),
    /// Changes with their cursors, for event streams and polls.
    ChangeEvents,
    /// The same for streams that want the latest change of each row.
    LatestChangeEvents,
}

impl Codec {
    /// Returns the implementation of the protocol.
    pub fn encoding(&self) -> &dyn ChangeEncoding {
        match self {
            Self::Phoenix(channel) => channel,
            Self::ChangeEvents | Self::LatestChangeEvents => &ChangeEvents,
        }
    }

    /// Whether only the latest change of each row is wanted.
    pub fn is_conflated(&self) -> bool {
        matches!(self, Self::LatestChangeEvents)
    }
}

/// Writes the changes of a subscription. Called once for each group of equal subscriptions.
pub trait ChangeEncoding {
    /// Whether the object of a change includes its cursor.
    fn includes_cursor(&self) -> bool;

    /// Returns what is written with the object of a change, for the bindings with these ids. `operation` is the one that the
    /// subscriber sees; `cursor` is empty unless changes include it.
    fn envelope(&self, ids: &[u32], operation: &str, cursor: &str) -> Envelope;

    /// Encodes that changes before the cursor are missing. `None` means that no cursor is known.
    fn gap(&self, reason: &str, cursor: Option<&str>) -> Notice;

    /// Encodes that nothing of a table is shown, because its policy raises an error for the subscriber's claims.
    fn policy_error(&self, why: &str) -> Notice {
        self.gap(why, None)
    }

    /// Encodes that a table shows the subscriber no row any more, with the reason and what to do.
    fn hidden(&self, why: &str) -> Notice;

    /// Encodes that the feed is stalled or has resumed. `None` if the transport observes stalls by itself.
    fn stall(&self, stalls: bool) -> Option<Notice>;

    /// Returns how a broadcast from the database is written.
    fn broadcast(&self, stored: &StoredBroadcast) -> BroadcastForm;
}

/// How a broadcast is written for the subscribers of a topic.
#[derive(Debug, PartialEq, Eq)]
pub enum BroadcastForm {
    /// Its content, with this around it.
    Wrapped(Wrapping),
    /// As an object with its cursor, which the transport writes.
    Object,
    /// It is not delivered, and this message says so.
    Refused(Notice),
    /// Clients of the protocol cannot receive its kind.
    Nothing,
}

/// What is written with the object of a change.
#[derive(Debug, PartialEq, Eq)]
pub enum Envelope {
    /// The text before and after the object: together they are one message.
    Text {
        /// The text before the object.
        before: String,
        /// The text after it.
        after: &'static str,
    },
    /// The cursor of the change. The transport writes the message.
    Cursor(String),
}

/// What is written around a content that all members of a topic share: together they are one frame.
#[derive(Debug, PartialEq, Eq)]
pub struct Wrapping {
    /// Whether the frame is of bytes, and not a text.
    pub is_binary: bool,
    /// What precedes the content.
    pub before: Vec<u8>,
    /// What follows it.
    pub after: &'static str,
}

/// A message of the feed that is not a change.
#[derive(Debug, PartialEq, Eq)]
pub enum Notice {
    /// The text of one message.
    Text(String),
    /// The text of a message which tells that changes are missing.
    GapText(String),
    /// Changes are missing. The transport writes the message.
    Gap {
        /// Why they are missing.
        reason: String,
        /// The position after the missing changes, if it is known.
        cursor: Option<String>,
    },
    /// A policy raises an error for the subscriber's claims, so nothing of its table is shown. The transport writes the message.
    PolicyError(String),
    /// A table shows the subscriber no row: why, and what to do. The transport writes the message.
    Hidden(String),
}

/// Reads and writes the messages of a session on a socket.
pub trait SocketProtocol: Send + Sync {
    /// Returns the protocol's name, which no other has.
    fn name(&self) -> &'static str;

    /// Decodes a text frame.
    ///
    /// # Errors
    /// If the frame is not a message. The socket stays open.
    fn decode_text(&self, text: &str) -> Result<Incoming, FrameError>;

    /// Decodes a binary frame.
    ///
    /// # Errors
    /// As [`Self::decode_text`].
    fn decode_binary(&self, frame: &[u8]) -> Result<Incoming, FrameError>;

    /// Encodes a message of the session as a text frame.
    fn encode(&self, message: &Outgoing) -> String;

    /// Encodes that a frame of the client is not a message.
    fn unreadable(&self, error: FrameError) -> String;

    /// Returns the encoding of a channel's changes.
    fn codec(&self, format: ChannelFormat) -> Codec;

    /// Returns the name of the channel with this topic, as SQL and HTTP have it.
    fn channel_of<'a>(&self, topic: &'a str) -> &'a str;

    /// Returns what is written around the content of a broadcast, the same for all members of the topic. `meta` is a JSON object
    /// that clients get beside the content, if there is one. `None` if clients of this protocol cannot receive its kind.
    fn broadcast(&self, topic: &str, kind: &BroadcastKind, meta: Option<&str>) -> Option<Wrapping>;

    /// Encodes that a broadcast is not delivered because its frame would have `length` bytes.
    fn broadcast_too_large(&self, topic: &str, length: usize) -> String {
        let text = format!(
            "Broadcast not delivered: its frame has {length} bytes, and clients of {} accept {} at most",
            self.name(),
            self.max_frame_bytes()
        );
        let channel = ChannelName { topic: topic.to_owned(), join: Reference::default() };
        self.encode(&Outgoing { channel, event: SessionEvent::NotDelivered(text) })
    }

    /// Returns what is written around the presence state of a topic, for the member with this channel.
    fn presence_state(&self, channel: &ChannelName) -> Wrapping;

    /// Returns what is written around changes of the presence in a topic, the same for all of its members.
    fn presence_diff(&self, topic: &str) -> Wrapping;

    /// Maximum size in bytes of a frame that clients of this protocol accept.
    fn max_frame_bytes(&self) -> usize;
}

/// How the changes of a channel are written.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ChannelFormat {
    /// The topic, as the client wrote it.
    pub topic: String,
    /// Whether the object of a change includes its cursor.
    pub with_cursor: bool,
    /// Whether a change is an event named after its operation, with its object as the payload.
    pub by_operation: bool,
}

/// Why a frame is not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not JSON, or nested too deeply.
    #[error("the frame is not JSON")]
    NotJson,
    /// JSON without the shape of a message of this version.
    #[error("the frame does not have the shape of a message")]
    WrongShape,
    /// A binary frame that is truncated or has text that is not UTF-8.
    #[error("the binary frame is malformed")]
    MalformedBinary,
    /// A binary frame of a kind that clients of this version do not send.
    #[error("the kind of binary frame is not supported")]
    UnknownKind,
}
