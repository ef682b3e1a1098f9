//! What this relay knows of the others: how far each was read, whether its members are known, and whether it lives.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use crate::model::node::message::TopicKey;
use crate::model::session::channel::ChannelId;
use crate::model::session::member::NodeId;
use crate::pubsub::remote::Members;

/// How long a relay whose connection ended may take to come back before its members leave.
const GRACE: Duration = Duration::from_secs(2);
/// The same after this relay lost its own connection: the database may have been away, and all relays have to come back.
const RETURN_GRACE: Duration = Duration::from_secs(10);
/// Maximum number of relays whose last number is kept after they are gone.
const MAX_KEPT: usize = 1000;

/// The other relays.
#[derive(Default)]
pub struct Peers {
    peers: HashMap<NodeId, Peer>,
    /// The last number that was read of each relay, also of those that are gone: one that comes back goes on from there.
    read: HashMap<NodeId, u64>,
    /// Until when no relay is taken for dead.
    spared_until: Option<Instant>,
}

struct Peer {
    incarnation: i32,
    dead_since: Option<Instant>,
    state: PeerState,
    /// When its state was last asked for.
    asked: Instant,
}

/// What is known of the members of a relay.
enum PeerState {
    /// Nothing that holds: its changes are ignored until its state comes.
    Unknown,
    /// Those that its state has named so far.
    Coming(Members),
    /// All.
    Known,
}

/// What the number of a batch says.
#[derive(Debug, PartialEq, Eq)]
pub enum Turn {
    /// It is the next one.
    Next,
    /// It was read before.
    Repeated,
    /// So many before it are missing.
    Hole(u64),
}

impl Peers {
    /// Begins with a new connection. Batches of relays that were not read before are passed over: their state is asked for.
    pub fn begin(&mut self, numbers: Vec<(NodeId, u64)>, now: Instant) {
        for (node, number) in numbers {
            self.read.entry(node).or_insert(number);
        }
        self.spared_until = (!self.peers.is_empty()).then(|| now + RETURN_GRACE);
        self.peers.values_mut().for_each(|peer| peer.dead_since = None);
    }

    /// Returns the relays to be read, with the last number that was read of each: those that are there, and these.
    pub fn positions(&self, rang: &BTreeSet<NodeId>) -> Vec<(NodeId, u64)> {
        let nodes: BTreeSet<NodeId> = self.peers.keys().chain(rang).copied().collect();
        nodes.into_iter().map(|node| (node, self.last_read(node))).collect()
    }

    /// Whether a relay with one of these incarnations was not read yet.
    pub fn lacks(&self, incarnations: &BTreeSet<i32>) -> bool {
        let known: BTreeSet<i32> = self.peers.values().map(|peer| peer.incarnation).collect();
        !incarnations.is_subset(&known)
    }

    /// Whether there is any.
    pub fn is_empty(&self) -> bool {
        self.peers.is_empty()
    }

    /// Returns the number of those whose members are known.
    pub fn known_count(&self) -> usize {
        self.peers.values().filter(|peer| matches!(peer.state, PeerState::Known)).count()
    }

    /// Takes the number of a batch.
    pub fn take(&mut self, node: NodeId, number: u64, incarnation: i32, now: Instant) -> Turn {
        let last = self.last_read(node);
        if number <= last {
            return Turn::Repeated;
        }
        self.read.insert(node, number);
        let peer = self.peers.entry(node).or_insert_with(|| Peer {
            incarnation,
            dead_since: None,
            state: PeerState::Unknown,
            asked: now,
        });
        if peer.incarnation != incarnation {
            (peer.incarnation, peer.dead_since) = (incarnation, None);
        }
        match number - last - 1 {
            0 => Turn::Next,
            missing => {
                peer.state = PeerState::Unknown;
                peer.asked = now;
                Turn::Hole(missing)
            }
        }
    }

    /// Notes that the state of a relay begins.
    pub fn begin_state(&mut self, node: NodeId) {
        if let Some(peer) = self.peers.get_mut(&node) {
            peer.state = PeerState::Coming(Members::new());
        }
    }

    /// Notes a member that a relay names. Returns whether what it tracks counts.
    pub fn names(&mut self, node: NodeId, topic: &TopicKey, channel: ChannelId) -> bool {
        match self.peers.get_mut(&node).map(|peer| &mut peer.state) {
            Some(PeerState::Coming(members)) => {
                members.entry(topic.clone()).or_default().insert(channel);
                true
            }
            Some(PeerState::Known) => true,
            Some(PeerState::Unknown) | None => false,
        }
    }

    /// Notes that the state of a relay is complete, and returns its members; `None` if its begin was not read.
    pub fn end_state(&mut self, node: NodeId) -> Option<Members> {
        let peer = self.peers.get_mut(&node)?;
        match std::mem::replace(&mut peer.state, PeerState::Known) {
            PeerState::Coming(members) => Some(members),
            before => {
                peer.state = before;
                None
            }
        }
    }

    /// Returns the relays whose members are not known although they were asked for long ago, and notes that they are asked again.
    pub fn to_ask(&mut self, after: Duration, now: Instant) -> Vec<NodeId> {
        let is_due =
            |peer: &Peer| !matches!(peer.state, PeerState::Known) && now.duration_since(peer.asked) >= after;
        let due = self.peers.iter_mut().filter(|(_, peer)| is_due(peer));
        due.map(|(node, peer)| {
            peer.asked = now;
            *node
        })
        .collect()
    }

    /// Notes which incarnations live. Forgets and returns the relays that are gone for good.
    pub fn look(&mut self, incarnations: &BTreeSet<i32>, now: Instant) -> Vec<NodeId> {
        let is_spared = self.spared_until.is_some_and(|until| now < until);
        let mut gone = Vec::new();
        for (node, peer) in &mut self.peers {
            if incarnations.contains(&peer.incarnation) {
                peer.dead_since = None;
                continue;
            }
            let since = *peer.dead_since.get_or_insert(now);
            if !is_spared && now.duration_since(since) >= GRACE {
                gone.push(*node);
            }
        }
        gone.iter().for_each(|node| _ = self.peers.remove(node));
        if self.read.len() > MAX_KEPT {
            self.read.retain(|node, _| self.peers.contains_key(node));
        }
        gone
    }

    /// Returns the last number that was read of a relay.
    fn last_read(&self, node: NodeId) -> u64 {
        self.read.get(&node).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: NodeId = NodeId(1);
    const B: NodeId = NodeId(2);

    fn topic() -> TopicKey {
        TopicKey { name: String::from("t"), is_private: false }
    }

    fn channel(session: u64) -> ChannelId {
        ChannelId { session, channel: 1 }
    }

    fn live(incarnations: &[i32]) -> BTreeSet<i32> {
        incarnations.iter().copied().collect()
    }

    #[test]
    fn batches_are_taken_in_order_once_and_a_hole_makes_the_members_unknown() {
        let (mut peers, now) = (Peers::default(), Instant::now());
        peers.begin(vec![(A, 7)], now);
        assert_eq!(peers.take(A, 7, 1, now), Turn::Repeated);
        assert_eq!(peers.take(A, 8, 1, now), Turn::Next);
        assert!(!peers.names(A, &topic(), channel(1)), "its state was not read");
        assert!(peers.end_state(A).is_none(), "nor its begin");
        peers.begin_state(A);
        assert!(peers.names(A, &topic(), channel(1)));
        assert_eq!(peers.end_state(A).unwrap()[&topic()].len(), 1);
        assert_eq!(peers.known_count(), 1);
        assert_eq!(peers.take(A, 8, 1, now), Turn::Repeated);
        assert_eq!(peers.take(A, 12, 1, now), Turn::Hole(3));
        assert_eq!(peers.known_count(), 0);
        assert!(peers.to_ask(GRACE, now).is_empty(), "it is asked where the hole is found");
        assert_eq!(peers.to_ask(GRACE, now + GRACE), [A]);
        assert!(peers.to_ask(GRACE, now + GRACE).is_empty());
    }

    #[test]
    fn a_relay_that_comes_back_in_time_stays_and_another_leaves_once() {
        let (mut peers, now) = (Peers::default(), Instant::now());
        for (node, incarnation) in [(A, 1), (B, 2)] {
            assert_eq!(peers.take(node, 1, incarnation, now), Turn::Next);
        }
        assert!(peers.look(&live(&[1, 2]), now).is_empty());
        assert!(peers.look(&live(&[]), now).is_empty());
        // A has a new connection, and its batch shows it.
        peers.take(A, 2, 3, now + GRACE / 2);
        assert_eq!(peers.look(&live(&[3]), now + GRACE), [B]);
        assert!(peers.look(&live(&[3]), now + GRACE * 9).is_empty());
        // What B wrote before is not read again when it was no more than away.
        assert_eq!(peers.take(B, 1, 2, now), Turn::Repeated);
        assert_eq!(peers.take(B, 2, 4, now), Turn::Next);
        assert!(!peers.names(B, &topic(), channel(1)), "its members left");
    }

    #[test]
    fn after_an_outage_of_its_own_a_relay_gives_the_others_more_time() {
        let (mut peers, now) = (Peers::default(), Instant::now());
        peers.begin(Vec::new(), now);
        peers.take(A, 1, 1, now);
        peers.begin(Vec::new(), now);
        assert!(peers.look(&live(&[]), now).is_empty());
        assert!(peers.look(&live(&[]), now + RETURN_GRACE - GRACE / 2).is_empty());
        assert_eq!(peers.look(&live(&[]), now + RETURN_GRACE), [A]);
    }

    #[test]
    fn what_is_kept_of_relays_that_are_gone_is_bounded() {
        let (mut peers, now) = (Peers::default(), Instant::now());
        for node in 1..=MAX_KEPT as u64 + 1 {
            peers.take(NodeId(node), 1, node as i32, now);
        }
        peers.look(&live(&[]), now);
        assert_eq!(peers.look(&live(&[]), now + GRACE).len(), MAX_KEPT + 1);
        assert!(peers.read.is_empty() && peers.is_empty());
    }
}
