//! The channels of one subscriber group and their position. Shared by the task that delivers to them and the hub that
//! adds and removes them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::feed::deliver::frame::Frame;
use crate::feed::deliver::memory_budget::MemoryBudget;
use crate::feed::deliver::outbox::Outbox;
use crate::feed::deliver::queue::Unit;
use crate::model::log::cursor::Cursor;
use crate::model::policy::visibility::Identity;
use crate::model::row::change::RelationId;
use crate::model::session::channel::ChannelId;
use crate::model::subscription::typed_filter::TypedFilter;

/// Channels that get the same frames.
pub struct Members {
    // Held while frames are queued, never across an await: the frames of a channel and its position change together.
    state: Mutex<MemberState>,
    /// Why changes may be missing.
    missed: OnceLock<&'static str>,
}

/// Channels that follow a relation with the same claims and filter.
#[derive(Debug, Clone)]
pub struct Reader {
    /// Their identity.
    pub identity: Identity,
    /// Their filter; `None` means all rows.
    pub filter: Option<Arc<TypedFilter>>,
    /// How many they are.
    pub channels: usize,
}

struct MemberState {
    outboxes: BTreeMap<ChannelId, Arc<Outbox>>,
    /// The position of the channels while it differs from the feed's.
    position: Option<Arc<Cursor>>,
    /// Relations whose policy error was sent, with the channel.
    notified: BTreeSet<(RelationId, ChannelId)>,
}

impl Members {
    /// Creates the members with a first channel.
    pub fn new(channel: ChannelId, outbox: Arc<Outbox>) -> Self {
        let outboxes = BTreeMap::from([(channel, outbox)]);
        let state = MemberState { outboxes, position: None, notified: BTreeSet::new() };
        Self { state: Mutex::new(state), missed: OnceLock::new() }
    }

    /// Adds a channel.
    pub fn add(&self, channel: ChannelId, outbox: Arc<Outbox>) {
        self.lock().outboxes.insert(channel, outbox);
    }

    /// Removes a channel and returns its position if that differs from the feed's.
    pub fn remove(&self, channel: ChannelId) -> Option<Arc<Cursor>> {
        let mut state = self.lock();
        state.outboxes.remove(&channel);
        state.position.clone()
    }

    /// Removes and returns all channels.
    pub fn take(&self) -> BTreeMap<ChannelId, Arc<Outbox>> {
        std::mem::take(&mut self.lock().outboxes)
    }

    /// Returns the number of channels.
    pub fn count(&self) -> usize {
        self.lock().outboxes.len()
    }

    /// Returns the first channel.
    pub fn first(&self) -> Option<ChannelId> {
        self.lock().outboxes.keys().next().copied()
    }

    /// Returns whether no channel is left.
    pub fn is_empty(&self) -> bool {
        self.lock().outboxes.is_empty()
    }

    /// Returns the position of the channels; `None` when it is the feed's.
    pub fn position(&self) -> Option<Arc<Cursor>> {
        self.lock().position.clone()
    }

    /// Gives the channels their own position: they are replayed from here.
    pub fn set_position(&self, position: Arc<Cursor>) {
        self.lock().position = Some(position);
    }

    /// Records that everything up to `end` was delivered, besides what they already have.
    pub fn reached(&self, end: &Arc<Cursor>) {
        self.lock().reached(end);
    }

    /// Queues the frames of a unit for all channels and moves their own position, if they have one, to `end`.
    /// Returns the number of frames queued.
    pub fn deliver(
        &self,
        unit: Unit,
        frames: &mut Vec<Frame>,
        has_room: bool,
        end: Option<&Arc<Cursor>>,
    ) -> usize {
        let mut state = self.lock();
        if let Some(end) = end {
            state.reached(end);
        }
        let count = frames.len() * state.outboxes.len();
        let mut outboxes = state.outboxes.values();
        // The last outbox, usually the only one, takes the frames without cloning: their reference counts are a
        // bottleneck.
        let last = outboxes.next_back();
        for outbox in outboxes {
            outbox.deliver(unit, frames.iter().cloned(), has_room);
        }
        if let Some(outbox) = last {
            outbox.deliver(unit, frames.drain(..), has_room);
        }
        count
    }

    /// Calls `with` for each channel.
    pub fn for_each(&self, mut with: impl FnMut(ChannelId, &Arc<Outbox>)) {
        self.lock().outboxes.iter().for_each(|(channel, outbox)| with(*channel, outbox));
    }

    /// Calls `with` for each channel that was not called for this relation before.
    pub fn for_each_once(&self, relation: RelationId, mut with: impl FnMut(&Arc<Outbox>)) {
        let mut state = self.lock();
        let MemberState { outboxes, notified, .. } = &mut *state;
        for (channel, outbox) in outboxes {
            if notified.insert((relation, *channel)) {
                with(outbox);
            }
        }
    }

    /// Returns whether the clients of all channels are closed.
    pub fn are_closed(&self) -> bool {
        self.lock().outboxes.values().all(|outbox| outbox.is_full())
    }

    /// Returns whether a client has much to read.
    pub fn is_behind(&self) -> bool {
        self.lock().outboxes.values().any(|outbox| outbox.is_behind())
    }

    /// Records why changes may be missing from now on.
    pub fn set_missed(&self, why: &'static str) {
        let _ = self.missed.set(why);
    }

    /// Returns why changes may be missing.
    pub fn missed(&self) -> Option<&'static str> {
        self.missed.get().copied()
    }

    /// Returns the memory budget of the channels; `None` without channels.
    pub fn budget(&self) -> Option<Arc<MemoryBudget>> {
        self.lock().outboxes.values().next().map(|outbox| Arc::clone(outbox.budget()))
    }

    fn lock(&self) -> MutexGuard<'_, MemberState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MemberState {
    fn reached(&mut self, end: &Arc<Cursor>) {
        if let Some(position) = &mut self.position {
            let has_more = !end.is_at_or_after(position);
            *position = if has_more { Arc::new(end.merge(position)) } else { Arc::clone(end) };
        }
    }
}
