//! What other relays tell: broadcasts to the members here, and who is present there.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::model::node::message::{self, TopicKey, Tracked};
use crate::model::session::broadcast::Broadcast;
use crate::model::session::channel::ChannelId;
use crate::model::session::member::{MemberId, NodeId};
use crate::pubsub::topics::{Congestion, Topics};

/// The members of a relay that track something, by topic.
pub type Members = HashMap<TopicKey, HashSet<ChannelId>>;

impl Topics {
    /// Sends a broadcast of another relay to the members here. Returns those that should be given time before the next.
    pub fn receive(&self, topic: &TopicKey, broadcast: Broadcast) -> Option<Congestion> {
        match self.publish_here((&topic.name, topic.is_private), None, broadcast) {
            Ok(congestion) => Some(congestion),
            Err(_) => {
                self.observe().node_dropped();
                None
            }
        }
    }

    /// Notes what a member of another relay tracks.
    pub fn track_remote(&self, node: NodeId, tracked: Tracked) {
        let Tracked { topic: TopicKey { name, is_private }, channel, key, reference, object } = tracked;
        let (id, key) = (MemberId { node, channel }, Arc::<str>::from(key));
        loop {
            let topic = self.find_or_create(&name, is_private);
            if topic.track_remote(id, &key, reference.clone(), object.clone()) {
                return self.settle(&topic);
            }
        }
    }

    /// Notes that a member of another relay tracks nothing any more.
    pub fn untrack_remote(&self, node: NodeId, topic: &TopicKey, channel: ChannelId) {
        if let Some(topic) = self.find(&topic.name, topic.is_private) {
            if topic.untrack_remote(MemberId { node, channel }) {
                self.remove_if_empty(&topic);
            }
            self.settle(&topic);
        }
    }

    /// Removes the members of another relay that are not among these.
    pub fn retain_remote(&self, node: NodeId, members: &Members) {
        for topic in self.all() {
            let key = TopicKey { name: topic.name().to_string(), is_private: topic.is_private() };
            let kept = members.get(&key);
            if topic.retain_remote(node, |channel| kept.is_some_and(|kept| kept.contains(&channel))) {
                self.remove_if_empty(&topic);
            }
            self.settle(&topic);
        }
    }

    /// Returns what all members of this relay track, as messages.
    pub fn state(&self) -> Vec<Vec<u8>> {
        let mut messages = Vec::new();
        for topic in self.all() {
            for (channel, key, meta) in topic.tracked(self.node()) {
                let meta = (&*key, &*meta.reference, &*meta.object);
                messages.push(message::track(topic.name(), topic.is_private(), channel, meta));
            }
        }
        messages
    }
}
