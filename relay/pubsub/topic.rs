//! One topic: its members, the broadcasts to them, and who is present. Nothing waits while its lock is held.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::feed::deliver::frame::{CountedBytes, Frame, SharedBytes};
use crate::feed::deliver::memory_budget::{Held, MemoryBudget};
use crate::feed::deliver::outbox::Outbox;
use crate::model::codec::presence::{self, PresencePiece};
use crate::model::codec::protocol::{SocketProtocol, Wrapping};
use crate::model::presence::state::{Meta, PresenceState};
use crate::model::session::broadcast::Broadcast;
use crate::model::session::channel::ChannelId;
use crate::model::session::member::{MemberId, NodeId};
use crate::model::session::message::{ChannelName, Reference};

/// Minimum interval between two messages about the presence in one topic. Changes in between are told together.
pub const TICK: Duration = Duration::from_millis(50);

/// A topic with this many members or fewer sends the state to a new one at once. In a larger one, members that come together share
/// a state, so that a thousand joins do not encode it a thousand times.
const SMALL: usize = 64;

/// A topic with members.
pub struct Topic {
    name: Arc<str>,
    is_private: bool,
    budget: Arc<MemoryBudget>,
    state: Mutex<TopicState>,
}

#[derive(Default)]
struct TopicState {
    /// The members by their protocol: each message is encoded once for each.
    audiences: Vec<Audience>,
    presence: PresenceState,
    /// When members were last told of the presence.
    told: Option<Instant>,
    /// Whether members are to be told of changes.
    is_changed: bool,
    /// Whether a member waits for the state.
    is_awaited: bool,
    /// Whether the ticker will tell them.
    is_scheduled: bool,
    /// Memory of what members of other relays track.
    remote: HashMap<MemberId, Held>,
    /// Whether the topic was removed because it had no members.
    is_removed: bool,
    /// What was sent to it.
    traffic: Traffic,
}

/// What was sent to a topic since it has members.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Number of broadcasts.
    pub broadcasts: u64,
    /// Number of frames of them for members.
    pub frames: u64,
    /// Bytes of the broadcasts, each counted once.
    pub bytes: u64,
}

/// A topic at one moment.
#[derive(Debug, Clone)]
pub struct TopicSummary {
    /// Its name.
    pub name: Arc<str>,
    /// Whether it is private.
    pub is_private: bool,
    /// Number of its members.
    pub members: usize,
    /// Number of objects that members track.
    pub present: usize,
    /// What was sent to it.
    pub traffic: Traffic,
}

struct Audience {
    protocol: &'static dyn SocketProtocol,
    members: HashMap<MemberId, Member>,
}

/// A member of a topic.
pub struct Member {
    /// The queue of its client.
    pub outbox: Arc<Outbox>,
    /// The reference of its join.
    pub join: Reference,
    /// Whether it receives its own broadcasts.
    pub receives_own: bool,
    /// Whether it receives broadcasts of others.
    pub receives_broadcasts: bool,
    /// What it knows of the presence.
    pub presence: PresenceUpdates,
}

/// What a member knows of the presence in its topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PresenceUpdates {
    /// Nothing, whatever happens: it may not.
    Forbidden,
    /// Nothing: it did not ask.
    Off,
    /// Nothing yet: it gets the state first.
    Awaits,
    /// The state and all changes until the last message.
    Follows,
}

/// When to tell members of the presence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Announcement {
    /// They are told, or nothing changed.
    Done,
    /// After [`TICK`], by [`Topic::tick`].
    Later,
}

impl Topic {
    /// Creates a topic without members.
    pub fn new(name: Arc<str>, is_private: bool, budget: Arc<MemoryBudget>) -> Self {
        Self { name, is_private, budget, state: Mutex::default() }
    }

    /// Whether its members are private channels.
    pub fn is_private(&self) -> bool {
        self.is_private
    }

    /// Returns its name.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Adds a member. Returns it back if the topic was removed meanwhile.
    pub fn enter(
        &self,
        id: MemberId,
        protocol: &'static dyn SocketProtocol,
        member: Member,
    ) -> Result<(), Member> {
        let mut state = self.lock();
        if state.is_removed {
            return Err(member);
        }
        state.is_awaited |= member.presence == PresenceUpdates::Awaits;
        let index = state.audiences.iter().position(|audience| audience.protocol.name() == protocol.name());
        let index = index.unwrap_or_else(|| {
            state.audiences.push(Audience { protocol, members: HashMap::new() });
            state.audiences.len() - 1
        });
        state.audiences[index].members.insert(id, member);
        Ok(())
    }

    /// Removes a member, and what it tracks. Returns whether no member of any relay is left.
    pub fn exit(&self, id: MemberId) -> bool {
        let mut state = self.lock();
        for audience in &mut state.audiences {
            audience.members.remove(&id);
        }
        state.audiences.retain(|audience| !audience.members.is_empty());
        state.is_changed |= state.presence.untrack(id);
        state.is_empty()
    }

    /// Changes what a member receives. If it may know of the presence from now on and wants to, it gets the state first.
    pub fn permit(&self, id: MemberId, receives_broadcasts: bool, presence: PresenceUpdates) {
        let mut state = self.lock();
        let member = state.audiences.iter_mut().find_map(|audience| audience.members.get_mut(&id));
        let Some(member) = member else { return };
        member.receives_broadcasts = receives_broadcasts;
        let may_follow = presence != PresenceUpdates::Forbidden;
        if may_follow != (member.presence != PresenceUpdates::Forbidden) {
            member.presence = presence;
            state.is_awaited |= presence == PresenceUpdates::Awaits;
        }
    }

    /// Marks the topic as removed if it has no member.
    pub fn remove_if_empty(&self) -> bool {
        let mut state = self.lock();
        state.is_removed |= state.is_empty();
        state.is_removed
    }

    /// Sends a broadcast to all members but its sender, unless that receives its own. Returns the number of frames, and the
    /// outboxes that should be given time before the next.
    pub fn publish(&self, sender: Option<MemberId>, broadcast: Broadcast) -> (usize, Vec<Arc<Outbox>>) {
        let Broadcast { kind, content } = broadcast;
        let bytes = content.len();
        let content = CountedBytes::new(content, &self.budget);
        let (mut count, mut congested) = (0, Vec::new());
        let mut state = self.lock();
        for Audience { protocol, members } in &state.audiences {
            let Some(wrapping) = protocol.broadcast(&self.name, &kind, None) else { continue };
            let frame = match wrapping.before.len() + bytes + wrapping.after.len() {
                length if length > protocol.max_frame_bytes() => {
                    Frame::text(protocol.broadcast_too_large(&self.name, length), &self.budget)
                }
                _ => Frame::push(wrapping, Arc::clone(&content), &self.budget),
            };
            let receives = |(id, member): &(&MemberId, &Member)| {
                member.receives_broadcasts && (Some(**id) != sender || member.receives_own)
            };
            for (_, member) in members.iter().filter(receives) {
                count += 1;
                if member.outbox.publish([frame.clone()]) {
                    congested.push(Arc::clone(&member.outbox));
                }
            }
        }
        let Traffic { broadcasts, frames, bytes: sum } = &mut state.traffic;
        (*broadcasts, *frames, *sum) = (*broadcasts + 1, *frames + count as u64, *sum + bytes as u64);
        (count, congested)
    }

    /// Changes what a member tracks, and lets it follow the presence from now on: first the state, then the changes with its
    /// own. Returns whether it tracked something else before.
    ///
    /// # Errors
    /// If the presence of the topic would have more than `max_bytes`.
    pub fn track(
        &self,
        id: MemberId,
        key: &Arc<str>,
        reference: String,
        object: String,
        max_bytes: usize,
    ) -> Result<bool, PresenceFull> {
        let mut state = self.lock();
        let others = state.presence.bytes() - state.presence.bytes_of(id);
        if others + key.len() + object.len() > max_bytes {
            return Err(PresenceFull);
        }
        let has_changed = state.presence.track(id, key, reference, object);
        state.is_changed |= has_changed;
        let member = state.audiences.iter_mut().find_map(|audience| audience.members.get_mut(&id));
        if let Some(member) = member.filter(|member| member.presence == PresenceUpdates::Off) {
            member.presence = PresenceUpdates::Awaits;
            state.is_awaited = true;
        }
        Ok(has_changed)
    }

    /// Removes what a member tracks.
    pub fn untrack(&self, id: MemberId) {
        let mut state = self.lock();
        state.is_changed |= state.presence.untrack(id);
    }

    /// Returns its numbers.
    pub fn summary(&self) -> TopicSummary {
        let state = self.lock();
        TopicSummary {
            name: Arc::clone(&self.name),
            is_private: self.is_private,
            members: state.audiences.iter().map(|audience| audience.members.len()).sum(),
            present: state.presence.count(),
            traffic: state.traffic,
        }
    }

    /// Changes what a member of another relay tracks. Returns false if the topic was removed meanwhile.
    pub fn track_remote(&self, id: MemberId, key: &Arc<str>, reference: String, object: String) -> bool {
        let mut state = self.lock();
        if !state.is_removed {
            let held = self.budget.hold(key.len() + object.len());
            state.is_changed |= state.presence.track(id, key, reference, object);
            state.remote.insert(id, held);
        }
        !state.is_removed
    }

    /// Removes what a member of another relay tracks. Returns whether no member of any relay is left.
    pub fn untrack_remote(&self, id: MemberId) -> bool {
        let mut state = self.lock();
        state.remote.remove(&id);
        state.is_changed |= state.presence.untrack(id);
        state.is_empty()
    }

    /// Removes what members of another relay track, but for those that `keeps` says. Returns whether no member of any relay is left.
    pub fn retain_remote(&self, node: NodeId, keeps: impl Fn(ChannelId) -> bool) -> bool {
        let mut state = self.lock();
        let is_gone = |id: &MemberId| id.node == node && !keeps(id.channel);
        let gone: Vec<MemberId> = state.remote.keys().copied().filter(is_gone).collect();
        for id in gone {
            state.remote.remove(&id);
            state.is_changed |= state.presence.untrack(id);
        }
        state.is_empty()
    }

    /// Returns what the members of a relay track, with their keys.
    pub fn tracked(&self, node: NodeId) -> Vec<(ChannelId, Arc<str>, Arc<Meta>)> {
        let state = self.lock();
        let of = state.presence.metas().filter(|(id, ..)| id.node == node);
        of.map(|(id, key, meta)| (id.channel, Arc::clone(key), Arc::clone(meta))).collect()
    }

    /// Returns the current presence as JSON.
    pub fn presence(&self) -> String {
        presence::object(&self.lock().presence.current())
    }

    /// Tells members of changes of the presence: now, or with the next tick if they were told of others just now.
    pub fn settle(&self) -> Announcement {
        let mut state = self.lock();
        if state.audiences.is_empty() {
            // Only other relays have members: nobody here knows the presence.
            state.presence.settle();
            (state.is_changed, state.is_awaited) = (false, false);
            return Announcement::Done;
        }
        let members: usize = state.audiences.iter().map(|audience| audience.members.len()).sum();
        let is_due = state.told.is_none_or(|told| told.elapsed() >= TICK) && !state.is_scheduled;
        match state.is_changed || state.is_awaited {
            true if is_due || (state.is_awaited && members <= SMALL) => self.tell(&mut state),
            true if !state.is_scheduled => {
                state.is_scheduled = true;
                return Announcement::Later;
            }
            _ => {}
        }
        Announcement::Done
    }

    /// Tells members of all changes of the presence until now.
    pub fn tick(&self) {
        let mut state = self.lock();
        state.is_scheduled = false;
        if state.is_changed || state.is_awaited {
            self.tell(&mut state);
        }
    }

    /// Sends the changes since the last call, encoded once, and the state to the members that wait for it: the current one, or,
    /// to those that have tracked since, the one before the changes.
    fn tell(&self, state: &mut TopicState) {
        let TopicState { audiences, presence, told, is_changed, is_awaited, .. } = state;
        let diff = self.shared(presence::diff(&presence.diff()));
        let (mut current, mut before) = (None, None);
        for Audience { protocol, members } in audiences {
            let diff = self.diff_frames(*protocol, &diff);
            for (id, member) in members {
                match std::mem::replace(&mut member.presence, PresenceUpdates::Follows) {
                    unchanged @ (PresenceUpdates::Off | PresenceUpdates::Forbidden) => {
                        member.presence = unchanged;
                    }
                    PresenceUpdates::Follows => _ = member.outbox.publish(diff.iter().cloned()),
                    PresenceUpdates::Awaits => {
                        let has_changed = presence.has_changed(*id);
                        let pieces = match has_changed {
                            true => {
                                before.get_or_insert_with(|| self.shared(presence::state(&presence.before())))
                            }
                            false => current
                                .get_or_insert_with(|| self.shared(presence::state(&presence.current()))),
                        };
                        let channel = ChannelName { topic: self.name.to_string(), join: member.join.clone() };
                        let first = pieces.first().map(|first| {
                            let wrapping = protocol.presence_state(&channel);
                            Frame::push(wrapping, Arc::clone(first), &self.budget)
                        });
                        let rest = self.diff_frames(*protocol, pieces.get(1..).unwrap_or_default());
                        let changes = diff.iter().filter(|_| has_changed).cloned();
                        member.outbox.publish(first.into_iter().chain(rest).chain(changes));
                    }
                }
            }
        }
        presence.settle();
        *told = Some(Instant::now());
        (*is_changed, *is_awaited) = (false, false);
    }

    fn shared(&self, pieces: Vec<PresencePiece>) -> Vec<SharedBytes> {
        let bytes = |piece| match piece {
            PresencePiece::State(json) | PresencePiece::Diff(json) => json.into_bytes(),
        };
        let pieces: Vec<Vec<u8>> = pieces.into_iter().map(bytes).collect();
        // Closes slow clients if the memory is used up. It is told in any case: a member that missed it would not know who is present.
        self.budget.make_room(pieces.iter().map(Vec::len).sum());
        pieces.into_iter().map(|piece| CountedBytes::new(piece, &self.budget)).collect()
    }

    fn diff_frames(&self, protocol: &dyn SocketProtocol, pieces: &[SharedBytes]) -> Vec<Frame> {
        let frame = |piece| {
            let wrapping: Wrapping = protocol.presence_diff(&self.name);
            Frame::push(wrapping, Arc::clone(piece), &self.budget)
        };
        pieces.iter().map(frame).collect()
    }

    fn lock(&self) -> MutexGuard<'_, TopicState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TopicState {
    /// Whether it has no member, of this relay or another one that tracks something.
    fn is_empty(&self) -> bool {
        self.audiences.is_empty() && self.remote.is_empty()
    }
}

/// The presence of the topic has no room for more.
#[derive(Debug, PartialEq, Eq)]
pub struct PresenceFull;
