//! Members of topics, whichever relay they are connected to.

use crate::model::session::channel::ChannelId;

/// A relay. Several relays that share topics have different ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u64);

/// A joined channel of any relay. The messages of one sender are delivered in the order in which it sent them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MemberId {
    /// The relay that the client is connected to.
    pub node: NodeId,
    /// The channel.
    pub channel: ChannelId,
}

/// What a channel asks of its topic when it is joined.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MembershipOptions {
    /// Whether the sender of a broadcast receives it, too.
    pub receives_own: bool,
    /// The key of the client's presence; empty to have one created.
    pub presence_key: String,
    /// Whether it wants to know who is present.
    pub wants_presence: bool,
}
