//! All topics of a relay: who is a member of which, and the way of broadcasts and presence to them.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::feed::deliver::memory_budget::{MemoryBudget, Reserved};
use crate::feed::deliver::outbox::Outbox;
use crate::model::catalog::topic_rules::TopicRights;
use crate::model::codec::protocol::SocketProtocol;
use crate::model::node::message;
use crate::model::session::broadcast::Broadcast;
use crate::model::session::channel::ChannelId;
use crate::model::session::limits::TopicLimits;
use crate::model::session::member::{MemberId, MembershipOptions, NodeId};
use crate::model::session::message::ChannelName;
use crate::observe::Observe;
use crate::pubsub::outgoing::Outgoing;
use crate::pubsub::topic::{Announcement, Member, PresenceFull, PresenceUpdates, TICK, Topic, TopicSummary};

/// Number of maps that topics are spread over.
const SHARDS: usize = 16;
/// How long a publisher waits at most for the readers of its last message.
const MAX_EASE: Duration = Duration::from_secs(1);
/// Interval at which it looks whether they have read.
const EASE_INTERVAL: Duration = Duration::from_millis(2);

/// The topics of a relay.
pub struct Topics {
    node: NodeId,
    // A lock is held only to find, add or remove a topic, never while one delivers.
    public: Shards,
    private: Shards,
    hasher: RandomState,
    limits: TopicLimits,
    budget: Arc<MemoryBudget>,
    observe: Arc<Observe>,
    /// The topics to tell with the next tick.
    scheduled: Mutex<Vec<Arc<Topic>>>,
    is_scheduled: Notify,
    /// Number of the last reference of a meta.
    references: AtomicU64,
    /// What other relays are to be told.
    outgoing: Outgoing,
}

/// Topics by their names.
type Shards = [Mutex<HashMap<Arc<str>, Arc<Topic>>>; SHARDS];

/// The membership of a channel in its topic. Dropping it ends the membership, and what the channel tracks.
pub struct Membership {
    topics: Arc<Topics>,
    topic: Arc<Topic>,
    id: MemberId,
    /// The key of its presence.
    key: Arc<str>,
    /// Whether it asked for the presence.
    wants_presence: bool,
    /// Memory of what it tracks.
    reserved: Reserved,
}

/// The readers that should be given time before the next message.
pub struct Congestion(Vec<Arc<Outbox>>);

/// Why a message or a change of presence is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The memory for clients is used up.
    #[error("The memory for queued data is full, try again")]
    NoRoom,
    /// The tracked object is larger than this number of bytes.
    #[error("Track message size exceeded: {0} bytes at most")]
    TrackTooLarge(usize),
    /// What all members track together would be larger than this number of bytes.
    #[error("Too many members are present in this topic: what they track may have {0} bytes together")]
    PresenceFull(usize),
}

impl Topics {
    /// Creates a relay without topics.
    pub fn new(limits: TopicLimits, budget: Arc<MemoryBudget>, observe: Arc<Observe>) -> Arc<Self> {
        let hasher = RandomState::new();
        Arc::new(Self {
            node: NodeId(hasher.hash_one("node")),
            public: Default::default(),
            private: Default::default(),
            hasher,
            limits,
            budget,
            observe,
            scheduled: Mutex::default(),
            is_scheduled: Notify::new(),
            references: AtomicU64::new(0),
            outgoing: Outgoing::default(),
        })
    }

    /// Returns the id of this relay.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// Returns what other relays are to be told.
    pub fn outgoing(&self) -> &Outgoing {
        &self.outgoing
    }

    /// Returns the id of a channel as a sender.
    pub fn member(&self, channel: ChannelId) -> MemberId {
        MemberId { node: self.node, channel }
    }

    /// Makes a channel a member of its topic; `private` is what it may read of a private one. If it asked for the presence, the state is queued for it, after everything that is
    /// queued already and before any change.
    pub fn enter(
        self: &Arc<Self>,
        channel: ChannelId,
        name: ChannelName,
        protocol: &'static dyn SocketProtocol,
        membership: MembershipOptions,
        private: Option<TopicRights>,
        outbox: Arc<Outbox>,
    ) -> Membership {
        let id = self.member(channel);
        let MembershipOptions { receives_own, presence_key, wants_presence } = membership;
        let rights = private.unwrap_or(TopicRights::ALL);
        let presence = following(rights, wants_presence);
        let receives_broadcasts = rights.broadcast;
        let mut member = Member { outbox, join: name.join, receives_own, receives_broadcasts, presence };
        let topic = loop {
            let topic = self.find_or_create(&name.topic, private.is_some());
            match topic.enter(id, protocol, member) {
                Ok(()) => break topic,
                Err(returned) => member = returned,
            }
        };
        let key = if presence_key.is_empty() { self.new_key() } else { Arc::from(presence_key) };
        let (topics, reserved) = (Arc::clone(self), self.budget.reserved());
        let membership = Membership { topics, topic, id, key, wants_presence, reserved };
        membership.settle();
        membership
    }

    /// Sends a broadcast to the members of a topic: to those of this relay at once, to those of others soon.
    ///
    /// # Errors
    /// If there is no memory for it, even after slow clients were closed.
    pub fn publish(
        &self,
        topic: (&str, bool),
        sender: Option<ChannelId>,
        broadcast: Broadcast,
    ) -> Result<Congestion, PublishError> {
        let is_alone = !self.outgoing.is_open();
        let message = (!is_alone).then(|| message::broadcast(topic.0, topic.1, &broadcast));
        let congestion = self.publish_here(topic, sender, broadcast)?;
        if let Some(message) = message
            && !self.outgoing.broadcast(message)
        {
            self.observe.node_dropped();
        }
        Ok(congestion)
    }

    /// Sends a broadcast to the members of a topic at this relay.
    ///
    /// # Errors
    /// If there is no memory for it, even after slow clients were closed.
    pub fn publish_here(
        &self,
        (topic, is_private): (&str, bool),
        sender: Option<ChannelId>,
        broadcast: Broadcast,
    ) -> Result<Congestion, PublishError> {
        let Some(topic) = self.find(topic, is_private) else { return Ok(Congestion(Vec::new())) };
        if !self.budget.make_room(broadcast.content.len()) {
            return Err(PublishError::NoRoom);
        }
        let (count, congested) = topic.publish(sender.map(|channel| self.member(channel)), broadcast);
        self.observe.broadcast(count);
        Ok(Congestion(congested))
    }

    /// Returns who is present in a topic, as JSON.
    pub fn presence(&self, topic: &str, is_private: bool) -> String {
        self.find(topic, is_private).map_or_else(|| String::from("{}"), |topic| topic.presence())
    }

    /// Returns the numbers of all topics, in no order. The lock of a shard is held only to copy references.
    pub fn summaries(&self) -> Vec<TopicSummary> {
        let mut topics: Vec<Arc<Topic>> = Vec::new();
        for shard in self.public.iter().chain(&self.private) {
            topics.extend(lock(shard).values().cloned());
        }
        topics.iter().map(|topic| topic.summary()).collect()
    }

    /// Tells members of changes of the presence that came soon after others.
    pub async fn run(self: Arc<Self>, end: CancellationToken) {
        let ticks = async {
            loop {
                self.is_scheduled.notified().await;
                sleep(TICK).await;
                let topics = std::mem::take(&mut *lock(&self.scheduled));
                topics.iter().for_each(|topic| topic.tick());
            }
        };
        let _: Option<()> = end.run_until_cancelled(ticks).await;
    }

    pub(super) fn find(&self, topic: &str, is_private: bool) -> Option<Arc<Topic>> {
        lock(self.shard(topic, is_private)).get(topic).map(Arc::clone)
    }

    pub(super) fn find_or_create(&self, topic: &str, is_private: bool) -> Arc<Topic> {
        let mut shard = lock(self.shard(topic, is_private));
        if let Some(found) = shard.get(topic) {
            return Arc::clone(found);
        }
        let created = Arc::new(Topic::new(Arc::from(topic), is_private, Arc::clone(&self.budget)));
        shard.insert(Arc::clone(created.name()), Arc::clone(&created));
        created
    }

    pub(super) fn observe(&self) -> &Observe {
        &self.observe
    }

    /// Returns all topics, in any order.
    pub(super) fn all(&self) -> Vec<Arc<Topic>> {
        let shards = self.public.iter().chain(&self.private);
        shards.flat_map(|shard| lock(shard).values().cloned().collect::<Vec<_>>()).collect()
    }

    pub(super) fn remove_if_empty(&self, topic: &Topic) {
        let mut shard = lock(self.shard(topic.name(), topic.is_private()));
        // Another member may have removed this topic before, and a new one have its name.
        let is_current = shard.get(topic.name()).is_some_and(|current| std::ptr::eq(&**current, topic));
        if is_current && topic.remove_if_empty() {
            shard.remove(topic.name());
        }
    }

    fn shard(&self, topic: &str, is_private: bool) -> &Mutex<HashMap<Arc<str>, Arc<Topic>>> {
        let shards = if is_private { &self.private } else { &self.public };
        &shards[self.hasher.hash_one(topic) as usize % SHARDS]
    }

    /// Returns a reference for a meta, unique among all relays. Later ones of a relay sort after earlier ones.
    fn new_reference(&self) -> String {
        let number = self.references.fetch_add(1, Ordering::Relaxed);
        format!("{:016x}{number:010x}", self.node.0)
    }

    /// Returns a presence key for a client that chose none: a random UUID.
    fn new_key(&self) -> Arc<str> {
        let random = RandomState::new();
        let (high, low) = (random.hash_one(0), random.hash_one(1));
        let [a, b, c] = [high >> 32, high >> 16 & 0xffff, high & 0xfff];
        let [d, e] = [low >> 48 & 0x3fff | 0x8000, low & 0xffff_ffff_ffff];
        Arc::from(format!("{a:08x}-{b:04x}-4{c:03x}-{d:04x}-{e:012x}"))
    }
}

impl Membership {
    /// Tracks a JSON object. [`Self::settle`] tells the members.
    ///
    /// # Errors
    /// If it is too large, or there is no room for it. What was tracked before stays.
    pub fn track(&mut self, object: String) -> Result<(), PublishError> {
        let TopicLimits { presence_bytes, topic_presence_bytes } = self.topics.limits;
        if object.len() > presence_bytes {
            return Err(PublishError::TrackTooLarge(presence_bytes));
        }
        let before = self.reserved.bytes();
        if !self.reserved.resize(self.key.len() + object.len()) {
            return Err(PublishError::NoRoom);
        }
        let reference = self.topics.new_reference();
        let (told, name) = ((reference.clone(), object.clone()), self.topic.name());
        match self.topic.track(self.id, &self.key, reference, object, topic_presence_bytes) {
            Ok(has_changed) => {
                if has_changed {
                    let meta = (&*self.key, &*told.0, &*told.1);
                    self.topics.outgoing.track(name, self.topic.is_private(), self.id.channel, meta);
                }
                Ok(())
            }
            Err(PresenceFull) => {
                self.reserved.resize(before);
                Err(PublishError::PresenceFull(topic_presence_bytes))
            }
        }
    }

    /// Tracks nothing. [`Self::settle`] tells the members.
    pub fn untrack(&mut self) {
        self.topic.untrack(self.id);
        self.tell_untracked();
        self.reserved.resize(0);
    }

    /// Tells the other relays that it tracks nothing any more, if it tracked something.
    fn tell_untracked(&self) {
        if self.reserved.bytes() > 0 {
            self.topics.outgoing.untrack(self.topic.name(), self.topic.is_private(), self.id.channel);
        }
    }

    /// Changes what the channel may read.
    pub fn permit(&self, rights: TopicRights) {
        self.topic.permit(self.id, rights.broadcast, following(rights, self.wants_presence));
        self.settle();
    }

    /// Tells the members of the topic what changed, at once or with the next tick.
    pub fn settle(&self) {
        self.topics.settle(&self.topic);
    }
}

impl Topics {
    pub(super) fn settle(&self, topic: &Arc<Topic>) {
        if topic.settle() == Announcement::Later {
            lock(&self.scheduled).push(Arc::clone(topic));
            self.is_scheduled.notify_one();
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        let is_empty = self.topic.exit(self.id);
        self.tell_untracked();
        if is_empty {
            self.topics.remove_if_empty(&self.topic);
        } else {
            self.settle();
        }
    }
}

impl Congestion {
    /// Whether no reader needs time.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Waits until the readers have room again, or are slow.
    pub async fn eased(mut self) {
        let started = Instant::now();
        while !self.0.is_empty() && started.elapsed() < MAX_EASE {
            sleep(EASE_INTERVAL).await;
            self.0.retain(|outbox| outbox.is_congested());
        }
    }
}

/// Returns what a new member knows of the presence.
fn following(rights: TopicRights, wants_presence: bool) -> PresenceUpdates {
    match (rights.presence, wants_presence) {
        (false, _) => PresenceUpdates::Forbidden,
        (true, true) => PresenceUpdates::Awaits,
        (true, false) => PresenceUpdates::Off,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::thread::scope;

    use super::*;
    use crate::model::codec::phoenix::Version;
    use crate::model::session::broadcast::BroadcastKind;
    use crate::model::session::message::Reference;

    struct Stage {
        topics: Arc<Topics>,
    }

    fn stage() -> Stage {
        let budget = Arc::new(MemoryBudget::new(100 << 20));
        let limits = TopicLimits { presence_bytes: 1000, topic_presence_bytes: 100_000 };
        Stage { topics: Topics::new(limits, budget, Arc::default()) }
    }

    impl Stage {
        fn outbox(&self) -> Arc<Outbox> {
            Arc::new(Outbox::new(1 << 20, Arc::clone(&self.topics.budget)))
        }

        fn enter(&self, session: u64, topic: &str, outbox: &Arc<Outbox>) -> Membership {
            let channel = ChannelId { session, channel: 1 };
            let name = ChannelName { topic: topic.to_owned(), join: Reference::default() };
            let membership = MembershipOptions { wants_presence: true, ..MembershipOptions::default() };
            let protocol = if session.is_multiple_of(2) { Version::V1 } else { Version::V2 }.protocol();
            self.topics.enter(channel, name, protocol, membership, None, Arc::clone(outbox))
        }

        fn topic_count(&self) -> usize {
            self.topics.public.iter().map(|shard| lock(shard).len()).sum()
        }
    }

    fn frames(outbox: &Outbox) -> Vec<String> {
        use futures_util::FutureExt;
        outbox.take().now_or_never();
        let frames = std::mem::take(&mut outbox.in_flight().frames);
        frames.iter().map(|frame| String::from_utf8_lossy(&frame.pieces().concat()).into_owned()).collect()
    }

    #[test]
    fn members_that_come_and_go_at_once_leave_nothing_behind() {
        let stage = stage();
        scope(|scope| {
            for thread in 0..8_u64 {
                let stage = &stage;
                scope.spawn(move || {
                    let outbox = stage.outbox();
                    for round in 0..300 {
                        let topic = format!("t{}", round % 3);
                        let mut membership = stage.enter(thread, &topic, &outbox);
                        membership.track(format!("{{\"round\":{round}}}")).unwrap();
                        membership.settle();
                        let broadcast = Broadcast::bytes(String::from("e"), vec![1]);
                        assert!(stage.topics.publish((&topic, false), None, broadcast).is_ok());
                        drop(membership);
                        frames(&outbox);
                    }
                });
            }
        });
        assert_eq!(stage.topic_count(), 0);
        lock(&stage.topics.scheduled).clear();
        assert_eq!(stage.topics.budget.held_bytes(), 0);
    }

    #[test]
    fn a_topic_that_was_removed_before_does_not_take_away_the_one_that_has_its_name_now() {
        let stage = stage();
        let outbox = stage.outbox();
        let first = stage.enter(1, "t", &outbox);
        let old = Arc::clone(&first.topic);
        drop(first);
        let second = stage.enter(2, "t", &outbox);
        // As a member does that left at the same time as the first.
        stage.topics.remove_if_empty(&old);
        assert!(Arc::ptr_eq(&stage.topics.find("t", false).unwrap(), &second.topic));
    }

    #[test]
    fn each_message_is_encoded_once_for_each_protocol() {
        let stage = stage();
        let outboxes: Vec<_> = (0..100).map(|_| stage.outbox()).collect();
        let memberships: Vec<_> =
            outboxes.iter().zip(0..).map(|(outbox, n)| stage.enter(n, "t", outbox)).collect();
        stage.topics.find("t", false).unwrap().tick();
        outboxes.iter().for_each(|outbox| _ = frames(outbox));
        assert_eq!(stage.topics.budget.held_bytes(), 0);
        let broadcast =
            Broadcast { kind: BroadcastKind::Json(String::from("e")), content: vec![b' '; 10_000] };
        assert!(stage.topics.publish(("t", false), None, broadcast).is_ok());
        // The content once, a frame for each protocol, and the slots of the queues.
        assert!(stage.topics.budget.held_bytes() < 12_000, "{}", stage.topics.budget.held_bytes());
        assert!(outboxes.iter().all(|outbox| frames(outbox).len() == 1));
        drop(memberships);
    }

    #[test]
    fn the_members_of_a_large_topic_share_a_state_and_its_changes() {
        let stage = stage();
        let outboxes: Vec<_> = (0..300).map(|_| stage.outbox()).collect();
        let mut memberships = Vec::new();
        for (outbox, n) in outboxes.iter().zip(0..) {
            let mut membership = stage.enter(n, "t", outbox);
            membership.track(format!("{{\"n\":{n}}}")).unwrap();
            membership.settle();
            memberships.push(membership);
        }
        stage.topics.find("t", false).unwrap().tick();
        for outbox in &outboxes[..2] {
            let frames = frames(outbox);
            assert!(frames[0].contains("presence_state"), "{}", frames[0]);
            let joins: usize = frames.iter().map(|frame| frame.matches("phx_ref\"").count()).sum();
            // Each member once: in the state, or in a change.
            assert_eq!(joins, 300);
        }
        let last = frames(&outboxes[299]);
        assert!(last.len() <= 2 && last[0].contains("presence_state"), "{last:?}");
    }
}
