//! What a session wants its driver to do.

use crate::model::catalog::topic_rules::TopicRights;
use crate::model::log::cursor::Cursor;
use crate::model::policy::visibility::Identity;
use crate::model::session::broadcast::Broadcast;
use crate::model::session::channel::ChannelId;
use crate::model::session::join::Recall;
use crate::model::session::member::MembershipOptions;
use crate::model::session::message::{ChannelName, Origin, Outgoing};
use crate::model::subscription::request::Request;

/// An action for the driver. Actions are performed in order.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Send this message.
    Send(Outgoing),
    /// Bind these requests to this identity and give the outcome to [`Session::bound`].
    ///
    /// [`Session::bound`]: crate::model::session::machine::Session::bound
    Bind {
        /// The channel to bind.
        channel: ChannelId,
        /// Number of the channel's attempt. A later attempt supersedes an earlier one, whose outcome is ignored.
        attempt: u32,
        /// The identity to bind to.
        identity: Identity,
        /// The requests to bind.
        requests: Vec<Request>,
    },
    /// Judge what an identity may read of a private channel and give the outcome to [`Session::judged`].
    ///
    /// [`Session::judged`]: crate::model::session::machine::Session::judged
    Judge {
        /// The channel.
        channel: ChannelId,
        /// Number of the channel's judgement. A later one supersedes an earlier one, whose outcome is ignored.
        judgement: u32,
        /// The identity.
        identity: Identity,
        /// The name of the channel.
        name: String,
        /// Whether it reads already.
        is_recheck: bool,
    },
    /// Read the earlier broadcasts that a channel wants, and tell [`Session::recalled`]. They are sent right after [`Action::Enter`], and
    /// what follows them in the changelog after that.
    ///
    /// [`Session::recalled`]: crate::model::session::machine::Session::recalled
    Recall {
        /// The channel.
        channel: ChannelId,
        /// The name of the channel.
        name: String,
        /// Which ones.
        recall: Recall,
    },
    /// Start delivery with the bound subscription, after the greeting.
    Join {
        /// The channel.
        channel: ChannelId,
        /// Its topic.
        topic: String,
        /// Whether changes are events named after their operation.
        by_operation: bool,
        /// The cursor after which changes begin, if the client gave one.
        since: Option<Box<Cursor>>,
        /// Messages to send before the first change.
        greeting: Vec<Outgoing>,
    },
    /// Start delivery of the broadcasts from the database to a channel that has no other subscription, or replace its identity.
    Listen {
        /// The channel.
        channel: ChannelId,
        /// The identity of its token.
        identity: Identity,
    },
    /// Make a channel a member of its topic.
    Enter {
        /// The channel.
        channel: ChannelId,
        /// Its topic and join.
        name: ChannelName,
        /// What it asks of the topic.
        membership: MembershipOptions,
        /// What it may read, if it is private: the private topic of a name is not the public one.
        private: Option<TopicRights>,
    },
    /// Change what a channel may read of its private topic.
    Permit {
        /// The channel.
        channel: ChannelId,
        /// What it may read.
        rights: TopicRights,
    },
    /// End a channel's membership of its topic.
    Exit {
        /// The channel.
        channel: ChannelId,
    },
    /// Send a broadcast to the members of a channel's topic.
    Broadcast {
        /// The channel that sends it.
        channel: ChannelId,
        /// The message of the client, whose reply says whether it was sent.
        origin: Origin,
        /// The broadcast.
        broadcast: Broadcast,
        /// Whether success is answered.
        acknowledges: bool,
        /// Whether the topic is private.
        is_private: bool,
    },
    /// Change what a channel tracks, and answer the client.
    Track {
        /// The channel.
        channel: ChannelId,
        /// The message of the client.
        origin: Origin,
        /// The JSON object to track, or `None` to track nothing.
        object: Option<String>,
    },
    /// Delete the bookmark of a channel that the client left.
    Forget {
        /// The channel.
        channel: ChannelId,
    },
    /// End delivery, then send the farewell.
    Leave {
        /// The channel.
        channel: ChannelId,
        /// Messages to send after the last change.
        farewell: Vec<Outgoing>,
    },
}

impl Action {
    /// Returns the identity of the token that this action comes from, if it is a new one.
    pub fn identity(&self) -> Option<&Identity> {
        match self {
            Self::Bind { identity, .. } | Self::Judge { identity, .. } | Self::Listen { identity, .. } => {
                Some(identity)
            }
            _ => None,
        }
    }
}
