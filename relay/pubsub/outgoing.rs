//! What the other relays are to be told: a bounded queue, closed while there is no other relay.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::model::node::message;
use crate::model::session::channel::ChannelId;
use crate::model::session::member::NodeId;

/// Maximum bytes of broadcasts and changes of presence that wait. A state comes on top.
const MAX_BYTES: usize = 16 << 20;
/// Bytes after which a batch gets no further message. A larger message is a batch of its own.
const BATCH_BYTES: usize = 256 << 10;

/// The queue of a relay. Messages leave it in the order in which they came.
#[derive(Default)]
pub struct Outgoing {
    queue: Mutex<Queue>,
    ready: Notify,
}

#[derive(Default)]
struct Queue {
    is_open: bool,
    messages: VecDeque<Vec<u8>>,
    bytes: usize,
    /// What came since the state is being made. It belongs after it.
    after: Option<Vec<Vec<u8>>>,
    /// Whether the others are to be told the whole state.
    owes_state: bool,
}

impl Outgoing {
    /// Takes messages from now on.
    pub fn open(&self) {
        self.lock().is_open = true;
    }

    /// Whether it takes messages.
    pub fn is_open(&self) -> bool {
        self.lock().is_open
    }

    /// Takes no more messages, and forgets those that wait.
    pub fn close(&self) {
        *self.lock() = Queue::default();
    }

    /// Queues an encoded broadcast. Returns false if there is no room for it.
    pub fn broadcast(&self, message: Vec<u8>) -> bool {
        self.push(|| message)
    }

    /// Queues what a member tracks: key, reference and object.
    pub fn track(&self, topic: &str, is_private: bool, channel: ChannelId, meta: (&str, &str, &str)) {
        if !self.push(|| message::track(topic, is_private, channel, meta)) {
            self.owe_state();
        }
    }

    /// Queues that a member tracks nothing any more.
    pub fn untrack(&self, topic: &str, is_private: bool, channel: ChannelId) {
        if !self.push(|| message::untrack(topic, is_private, channel)) {
            self.owe_state();
        }
    }

    /// Queues the question for the state of a relay, or of all.
    pub fn ask(&self, node: Option<NodeId>) {
        let mut queue = self.lock();
        if queue.is_open {
            queue.add(message::ask(node));
            self.ready.notify_one();
        }
    }

    /// Notes that the whole state is to be told.
    pub fn owe_state(&self) {
        let mut queue = self.lock();
        queue.owes_state = queue.is_open;
        self.ready.notify_one();
    }

    /// Completes when there is something to write.
    pub async fn ready(&self) {
        loop {
            let ready = self.ready.notified();
            if self.lock().is_ready() {
                return;
            }
            ready.await;
        }
    }

    /// Queues the state that `make` returns, if it is owed. What is queued before this call is part of it; what comes while it is
    /// made follows it, and may be part of it, too.
    pub fn state(&self, make: impl FnOnce() -> Vec<Vec<u8>>) {
        {
            let mut queue = self.lock();
            if !std::mem::take(&mut queue.owes_state) {
                return;
            }
            queue.after = Some(Vec::new());
        }
        let state = make();
        let mut queue = self.lock();
        // It may have been closed meanwhile.
        let Some(after) = queue.after.take() else { return };
        let state = std::iter::once(message::begin_state()).chain(state).chain([message::end_state()]);
        state.chain(after).for_each(|message| queue.add(message));
    }

    /// Takes the next batch; `None` if nothing waits.
    pub fn take(&self) -> Option<Vec<u8>> {
        let mut queue = self.lock();
        let (mut messages, mut bytes) = (Vec::new(), 0);
        while let Some(message) = queue.messages.pop_front() {
            if !messages.is_empty() && bytes + message.len() > BATCH_BYTES {
                queue.messages.push_front(message);
                break;
            }
            bytes += message.len();
            messages.push(message);
        }
        queue.bytes -= bytes;
        (!messages.is_empty()).then(|| message::batch(&messages))
    }

    /// Queues a message, unless the queue is closed. Returns false if it is full.
    fn push(&self, message: impl FnOnce() -> Vec<u8>) -> bool {
        let mut queue = self.lock();
        if !queue.is_open {
            return true;
        }
        let message = message();
        if queue.bytes + message.len() > MAX_BYTES {
            return false;
        }
        match &mut queue.after {
            Some(after) => after.push(message),
            None => queue.add(message),
        }
        self.ready.notify_one();
        true
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn add(&mut self, message: Vec<u8>) {
        self.bytes += message.len();
        self.messages.push_back(message);
    }

    fn is_ready(&self) -> bool {
        self.owes_state || !self.messages.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::node::message::NodeMessage;

    const CHANNEL: ChannelId = ChannelId { session: 1, channel: 1 };

    fn open() -> Outgoing {
        let outgoing = Outgoing::default();
        outgoing.open();
        outgoing
    }

    fn taken(outgoing: &Outgoing) -> Vec<NodeMessage> {
        std::iter::from_fn(|| outgoing.take()).flat_map(|batch| message::decode(&batch).unwrap()).collect()
    }

    fn track(outgoing: &Outgoing, object: &str) {
        outgoing.track("t", false, CHANNEL, ("k", "r", object));
    }

    fn object(message: &NodeMessage) -> Option<&str> {
        match message {
            NodeMessage::Track(tracked) => Some(&tracked.object),
            NodeMessage::BeginState => Some("begin"),
            NodeMessage::EndState => Some("end"),
            _ => None,
        }
    }

    fn objects(messages: &[NodeMessage]) -> Vec<&str> {
        messages.iter().filter_map(object).collect()
    }

    #[test]
    fn a_closed_queue_takes_nothing_and_forgets_what_waited() {
        let outgoing = Outgoing::default();
        track(&outgoing, "1");
        outgoing.owe_state();
        assert!(outgoing.broadcast(vec![0; MAX_BYTES + 1]), "without another relay, no broadcast is dropped");
        outgoing.open();
        assert_eq!(outgoing.take(), None);
        track(&outgoing, "2");
        outgoing.close();
        outgoing.open();
        assert_eq!(outgoing.take(), None);
    }

    #[test]
    fn a_state_stands_between_what_came_before_it_and_what_came_while_it_was_made() {
        let outgoing = open();
        track(&outgoing, "before");
        outgoing.state(|| unreachable!("nobody asked"));
        outgoing.owe_state();
        outgoing.state(|| {
            track(&outgoing, "meanwhile");
            vec![message::track("t", false, CHANNEL, ("k", "r", "state"))]
        });
        assert_eq!(objects(&taken(&outgoing)), ["before", "begin", "state", "end", "meanwhile"]);
    }

    #[test]
    fn a_full_queue_refuses_broadcasts_and_owes_the_state_for_changes_of_presence() {
        let outgoing = open();
        assert!(outgoing.broadcast(vec![0; MAX_BYTES]));
        assert!(!outgoing.broadcast(vec![0]));
        track(&outgoing, "lost");
        assert_eq!(outgoing.take().map(|batch| batch.len()), Some(MAX_BYTES + 1));
        outgoing.state(|| vec![message::track("t", false, CHANNEL, ("k", "r", "now"))]);
        assert_eq!(objects(&taken(&outgoing)), ["begin", "now", "end"]);
        assert!(outgoing.broadcast(vec![0]));
    }

    #[test]
    fn batches_are_bounded_and_a_larger_message_is_one_of_its_own() {
        let outgoing = open();
        for bytes in [BATCH_BYTES / 2, BATCH_BYTES / 2, 1, BATCH_BYTES * 3, 1] {
            outgoing.broadcast(vec![0; bytes]);
        }
        let lengths: Vec<usize> =
            std::iter::from_fn(|| outgoing.take()).map(|batch| batch.len() - 1).collect();
        assert_eq!(lengths, [BATCH_BYTES, 1, BATCH_BYTES * 3, 1]);
    }
}
