//! The messages between a client and its session, whatever protocol they are written in.

use crate::model::session::broadcast::Broadcast;
use crate::model::session::join::Join;
use crate::model::subscription::error::SubscribeError;

/// A reference that the client chose for a join or a message, or none. Only the codec reads its text; the session compares it and
/// returns it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reference(pub Option<Box<str>>);

/// A channel as its client names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChannelName {
    /// The topic. Only the codec reads its parts.
    pub topic: String,
    /// The reference of the join that opened the channel.
    pub join: Reference,
}

/// A message from a client.
#[derive(Debug, PartialEq)]
pub struct Incoming {
    /// Where it comes from.
    pub origin: Origin,
    /// What the client wants.
    pub request: ClientRequest,
}

/// Where a message comes from, and its reply goes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The channel it belongs to, which need not be joined.
    pub channel: ChannelName,
    /// The reference of the message, which its reply repeats.
    pub reference: Reference,
}

/// What a client wants.
#[derive(Debug, PartialEq)]
pub enum ClientRequest {
    /// To know that the connection is alive.
    Heartbeat,
    /// To join a channel.
    Join(Box<Join>),
    /// To join a channel, with a topic or configuration that is refused for this reason.
    InvalidJoin(String),
    /// To join a channel, with a message that is too large to be parsed.
    OversizedJoin,
    /// To leave a channel.
    Leave,
    /// To change a channel's identity to that of this token. Without a token, nothing changes.
    AccessToken(Option<String>),
    /// To send this to all members of the channel's topic.
    Broadcast(Broadcast),
    /// To be present with this JSON object.
    Track(String),
    /// To be present no longer.
    Untrack,
    /// To send something that is refused for this reason.
    Invalid(&'static str),
    /// Something else, which is ignored.
    Unknown,
}

/// A message to a client.
#[derive(Debug, Clone, PartialEq)]
pub struct Outgoing {
    /// The channel it belongs to.
    pub channel: ChannelName,
    /// What it says.
    pub event: SessionEvent,
}

/// What a session tells its client.
#[derive(Debug, Clone, PartialEq)]
pub enum SessionEvent {
    /// The reply to the message with this reference.
    Reply(Reference, Response),
    /// The channel receives changes.
    Subscribed,
    /// A table of the channel shows its role no row: why, and what to do. The channel stays subscribed.
    Hidden(String),
    /// An entry of the channel's subscription is refused.
    NotSubscribed(SubscribeError),
    /// Why a broadcast is not delivered to the channel.
    NotDelivered(String),
    /// Why the channel ends. [`Self::Closed`] or [`Self::Failed`] follows.
    Error(String),
    /// The channel has ended. The client does not join it again by itself.
    Closed,
    /// The channel has failed. The client joins it again by itself.
    Failed,
}

/// The reply to a message.
#[derive(Debug, Clone, PartialEq)]
pub enum Response {
    /// The connection is alive.
    Alive,
    /// The channel is joined. Repeats the entries of [`Join`].
    Joined(Vec<String>),
    /// The channel is left.
    Left,
    /// The broadcast is sent, or the presence is changed.
    Done,
    /// The request is refused for this reason.
    Refused(String),
    /// The broadcast is too large.
    TooLarge,
    /// The client may not send broadcasts to the channel.
    MayNotSend,
    /// The client may not be present in the channel.
    MayNotTrack,
}

impl Origin {
    /// Returns the reply to the message.
    pub fn reply(&self, response: Response) -> Outgoing {
        Outgoing {
            channel: self.channel.clone(),
            event: SessionEvent::Reply(self.reference.clone(), response),
        }
    }

    /// Returns the reply that refuses the message.
    pub fn refusal(&self, reason: impl Into<String>) -> Outgoing {
        self.reply(Response::Refused(reason.into()))
    }
}

impl ClientRequest {
    /// Whether the client wants to join a channel.
    pub fn is_join(&self) -> bool {
        matches!(self, Self::Join(_) | Self::InvalidJoin(_) | Self::OversizedJoin)
    }

    /// Returns the token that comes with the request.
    pub fn token(&self) -> Option<&str> {
        match self {
            Self::Join(join) => join.token.as_deref(),
            Self::AccessToken(token) => token.as_deref(),
            _ => None,
        }
    }
}

impl Reference {
    /// Whether the client chose no reference.
    pub fn is_none(&self) -> bool {
        self.0.is_none()
    }
}
