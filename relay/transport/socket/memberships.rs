//! The memberships of a client's channels in their topics: broadcasts and presence.

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, OptionFuture};

use crate::feed::deliver::outbox::Outbox;
use crate::model::catalog::topic_rules::TopicRights;
use crate::model::codec::protocol::SocketProtocol;
use crate::model::session::broadcast::Broadcast;
use crate::model::session::channel::ChannelId;
use crate::model::session::member::MembershipOptions;
use crate::model::session::message::{ChannelName, Response};
use crate::pubsub::topics::{Membership, Topics};

/// Bytes that the fields around the payload of a broadcast may have.
const BROADCAST_FIELDS: usize = 500;
/// The refusal of a change of presence by a client that exceeds its rate.
const TOO_MANY_PRESENCES: &str = "Client presence rate limit exceeded";

/// The memberships of one client.
pub struct Memberships {
    topics: Arc<Topics>,
    outbox: Arc<Outbox>,
    protocol: &'static dyn SocketProtocol,
    /// Maximum size of a broadcast's payload, in bytes.
    max_payload: usize,
    members: HashMap<ChannelId, Membership>,
    /// Completes when the readers of the last broadcast have room. Later messages wait in the socket.
    easing: Option<BoxFuture<'static, ()>>,
}

impl Memberships {
    /// Creates the memberships of a new client: none.
    pub fn new(
        topics: Arc<Topics>,
        outbox: Arc<Outbox>,
        protocol: &'static dyn SocketProtocol,
        max_payload: usize,
    ) -> Self {
        Self { topics, outbox, protocol, max_payload, members: HashMap::new(), easing: None }
    }

    /// Makes a channel a member of its topic. `private` is what it may read, if it is private.
    pub fn enter(
        &mut self,
        channel: ChannelId,
        name: ChannelName,
        options: MembershipOptions,
        private: Option<TopicRights>,
    ) {
        let outbox = Arc::clone(&self.outbox);
        let membership = self.topics.enter(channel, name, self.protocol, options, private, outbox);
        self.members.insert(channel, membership);
    }

    /// Changes what a channel may read.
    pub fn permit(&self, channel: ChannelId, rights: TopicRights) {
        if let Some(membership) = self.members.get(&channel) {
            membership.permit(rights);
        }
    }

    /// Ends a channel's membership.
    pub fn exit(&mut self, channel: ChannelId) {
        self.members.remove(&channel);
    }

    /// Sends a broadcast to the members of a topic, and returns the reply to its sender.
    pub fn broadcast(&mut self, topic: (&str, bool), channel: ChannelId, broadcast: Broadcast) -> Response {
        if broadcast.content.len() > self.max_payload + BROADCAST_FIELDS {
            return Response::TooLarge;
        }
        match self.topics.publish(topic, Some(channel), broadcast) {
            Ok(congestion) => {
                if !congestion.is_empty() {
                    self.easing = Some(congestion.eased().boxed());
                }
                Response::Done
            }
            Err(error) => Response::Refused(error.to_string()),
        }
    }

    /// Changes what a member tracks, if it is within its rate, and returns the reply; `None` tracks nothing. [`Self::settle`] tells the
    /// topic.
    pub fn track(
        &mut self,
        channel: ChannelId,
        object: Option<String>,
        is_within_rate: bool,
    ) -> Option<Response> {
        let membership = self.members.get_mut(&channel)?;
        let outcome = match object {
            Some(_) if !is_within_rate => Err(String::from(TOO_MANY_PRESENCES)),
            Some(object) => membership.track(object).map_err(|error| error.to_string()),
            None => {
                membership.untrack();
                Ok(())
            }
        };
        Some(outcome.map_or_else(Response::Refused, |()| Response::Done))
    }

    /// Tells the topic of a channel what the channel tracks now.
    pub fn settle(&self, channel: ChannelId) {
        if let Some(membership) = self.members.get(&channel) {
            membership.settle();
        }
    }

    /// Whether the readers of the last broadcast are given time.
    pub fn is_easing(&self) -> bool {
        self.easing.is_some()
    }

    /// Waits until the readers of the last broadcast have room; `None` if they have it already. Cancel safe.
    pub async fn eased(&mut self) -> Option<()> {
        OptionFuture::from(self.easing.as_mut()).await?;
        self.easing = None;
        Some(())
    }
}
