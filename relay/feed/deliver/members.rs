//! The channels of one audience, and up to where they were told: shared by whoever tells them and whoever lets them in.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::feed::deliver::frame::Frame;
use crate::feed::deliver::memory_budget::MemoryBudget;
use crate::feed::deliver::outbox::{Outbox, Unit};
use crate::model::log::cursor::Cursor;
use crate::model::row::change::RelationId;
use crate::model::session::machine::ChannelId;

/// Channels that get the same frames.
pub struct Members {
    // Held to hand out frames, never across an await: what a channel was told and its position change together.
    state: Mutex<State>,
    /// Why something may not have been told to them.
    missed: OnceLock<&'static str>,
}

struct State {
    outboxes: BTreeMap<ChannelId, Arc<Outbox>>,
    /// Up to where they were told everything while that is not up to where the feed is.
    position: Option<Arc<Cursor>>,
    /// The channels that were told why they get nothing of a relation.
    told: BTreeSet<(RelationId, ChannelId)>,
}

impl Members {
    /// With the first channel.
    pub fn new(channel: ChannelId, outbox: Arc<Outbox>) -> Self {
        let outboxes = BTreeMap::from([(channel, outbox)]);
        let state = State { outboxes, position: None, told: BTreeSet::new() };
        Self { state: Mutex::new(state), missed: OnceLock::new() }
    }

    /// Takes in another channel.
    pub fn add(&self, channel: ChannelId, outbox: Arc<Outbox>) {
        self.lock().outboxes.insert(channel, outbox);
    }

    /// Lets a channel go, and says up to where it was told everything if that is not up to where the feed is.
    pub fn remove(&self, channel: ChannelId) -> Option<Arc<Cursor>> {
        let mut state = self.lock();
        state.outboxes.remove(&channel);
        state.position.clone()
    }

    /// Lets all of them go.
    pub fn take(&self) -> BTreeMap<ChannelId, Arc<Outbox>> {
        std::mem::take(&mut self.lock().outboxes)
    }

    /// The first channel.
    pub fn first(&self) -> Option<ChannelId> {
        self.lock().outboxes.keys().next().copied()
    }

    /// Whether no channel is left.
    pub fn is_empty(&self) -> bool {
        self.lock().outboxes.is_empty()
    }

    /// Up to where they were told everything; none when that is up to where the feed is.
    pub fn position(&self) -> Option<Arc<Cursor>> {
        self.lock().position.clone()
    }

    /// From now on they are told on their own, from this position.
    pub fn begin_at(&self, position: Arc<Cursor>) {
        self.lock().position = Some(position);
    }

    /// They were told everything up to here, besides what they have.
    pub fn reached(&self, here: &Arc<Cursor>) {
        self.lock().reached(here);
    }

    /// Hands frames that belong to a part to all of them, which brings those that are told on their own up to `here`; returns how many frames
    /// that makes.
    pub fn deliver(
        &self,
        part: Unit,
        frames: &mut Vec<Frame>,
        has_room: bool,
        here: Option<&Arc<Cursor>>,
    ) -> usize {
        let mut state = self.lock();
        if let Some(here) = here {
            state.reached(here);
        }
        let count = frames.len() * state.outboxes.len();
        let mut outboxes = state.outboxes.values();
        // The last one, as a rule the only one, takes them as they are: a frame's count of owners is a bottleneck.
        let last = outboxes.next_back();
        for outbox in outboxes {
            outbox.deliver(part, frames.iter().cloned(), has_room);
        }
        if let Some(outbox) = last {
            outbox.deliver(part, frames.drain(..), has_room);
        }
        count
    }

    /// Calls `with` for each channel.
    pub fn each(&self, mut with: impl FnMut(ChannelId, &Arc<Outbox>)) {
        self.lock().outboxes.iter().for_each(|(channel, outbox)| with(*channel, outbox));
    }

    /// Calls `with` for each channel, the first time that this is about the relation.
    pub fn each_once(&self, relation: RelationId, mut with: impl FnMut(&Arc<Outbox>)) {
        let mut state = self.lock();
        let State { outboxes, told, .. } = &mut *state;
        for (channel, outbox) in outboxes {
            if told.insert((relation, *channel)) {
                with(outbox);
            }
        }
    }

    /// Whether the clients of all of them are closed.
    pub fn are_over(&self) -> bool {
        self.lock().outboxes.values().all(|outbox| outbox.is_full())
    }

    /// Whether one of them has much to read.
    pub fn is_behind(&self) -> bool {
        self.lock().outboxes.values().any(|outbox| outbox.is_behind())
    }

    /// From now on something may come that is not told to them, and why.
    pub fn misses(&self, why: &'static str) {
        let _ = self.missed.set(why);
    }

    /// Why something may have come that was not told.
    pub fn missed(&self) -> Option<&'static str> {
        self.missed.get().copied()
    }

    /// What their frames count for; none without any channel.
    pub fn budget(&self) -> Option<Arc<MemoryBudget>> {
        self.lock().outboxes.values().next().map(|outbox| Arc::clone(outbox.budget()))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn reached(&mut self, here: &Arc<Cursor>) {
        if let Some(position) = &mut self.position {
            let has_more = !here.is_at_or_after(position);
            *position = if has_more { Arc::new(here.merge(position)) } else { Arc::clone(here) };
        }
    }
}
