//! All channels of one router, each in exactly one group: live, or in a replay. Channels are added, removed and
//! rebound here at once, whichever task delivers to them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use slab::Slab;

use crate::feed::authorize::subscriber_index::GroupId;
use crate::feed::deliver::frame::Frame;
use crate::feed::deliver::group::{GroupKey, Subscriber, SubscriberGroup};
use crate::feed::deliver::groups::SubscriberGroups;
use crate::feed::deliver::members::Reader;
use crate::feed::deliver::outbox::Outbox;
use crate::model::catalog::relation::{Catalog, Relation};
use crate::model::log::cursor::Cursor;
use crate::model::row::change::RelationId;
use crate::model::session::channel::ChannelId;
use crate::model::subscription::binding::{Binding, Subscription};

/// The channels, groups and replays of a router.
#[derive(Default)]
pub struct Hub {
    /// The groups that get live batches.
    pub live: SubscriberGroups,
    by_key: HashMap<Arc<GroupKey>, GroupId>,
    /// The live groups whose position is beyond the feed's.
    ahead: BTreeSet<GroupId>,
    channels: HashMap<ChannelId, ChannelState>,
    replays: BTreeMap<u64, ReplayEntry>,
    last_replay: u64,
}

/// What a channel subscribes to, and where it is.
pub struct ChannelDescription {
    /// The channel.
    pub channel: ChannelId,
    /// Its subscription.
    pub subscription: Subscription,
    /// Up to where everything was delivered; `None` before the feed has a position.
    pub position: Option<Cursor>,
    /// Whether it reads what it missed.
    pub is_replayed: bool,
}

/// The group that a channel is in.
#[derive(Clone, Copy)]
enum ChannelState {
    Live(GroupId),
    /// In a replay, by its number and the group's index.
    Replay(u64, usize),
}

/// The hub's record of a replay.
struct ReplayEntry {
    groups: Slab<SubscriberGroup>,
    newcomers: Arc<Newcomers>,
}

/// Groups that join a replay that has begun. Each has its own position.
#[derive(Default)]
pub struct Newcomers(Mutex<Vec<SubscriberGroup>>);

impl Newcomers {
    /// Takes the groups added since the last call.
    pub fn take(&self) -> Vec<SubscriberGroup> {
        std::mem::take(&mut self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<SubscriberGroup>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The initial state of a replay.
pub struct Replayed {
    /// The replay's number.
    pub number: u64,
    /// The groups to replay to.
    pub groups: Vec<SubscriberGroup>,
    /// Groups that join later.
    pub newcomers: Arc<Newcomers>,
}

impl Hub {
    /// Starts delivery to a channel, replacing its last subscription; the greeting goes out first. A channel in a
    /// replay stays there with its new subscription.
    pub fn join(&mut self, channel: ChannelId, subscriber: Subscriber, greeting: Vec<Frame>) {
        let state = self.channels.get(&channel).copied();
        let missed = state.and_then(|state| self.group(state).members().missed());
        let replay = match state {
            Some(ChannelState::Replay(number, _)) => {
                Some((number, Arc::clone(&self.replays[&number].newcomers)))
            }
            _ => None,
        };
        // Held until the channel has moved: the replay checks this list after each batch, once all positions are
        // updated.
        let mut newcomers = replay.as_ref().map(|(_, newcomers)| newcomers.lock());
        let at = self.remove(channel);
        for frame in greeting {
            subscriber.outbox.push(frame);
        }
        if let Some(why) = missed {
            subscriber.outbox.push(subscriber.gap(why));
        }
        match (replay.as_ref(), newcomers.as_mut(), at) {
            (Some((number, _)), Some(newcomers), Some(at)) => {
                newcomers.push(self.add_to_replay(*number, channel, subscriber, &at));
            }
            _ => self.add_live(channel, subscriber),
        }
    }

    /// Starts live delivery to a channel after its position.
    pub fn admit(&mut self, channel: ChannelId, subscriber: Subscriber) {
        self.remove(channel);
        self.add_live(channel, subscriber);
    }

    /// Ends delivery to a channel; the farewell goes out after the last change. Returns the channel's position, if it
    /// is known.
    pub fn leave(
        &mut self,
        channel: ChannelId,
        outbox: &Outbox,
        farewell: Vec<Frame>,
        feed_position: Option<&Cursor>,
    ) -> Option<Cursor> {
        let live = feed_position.map(|feed_position| self.position(channel, feed_position));
        let at = self.remove(channel);
        for frame in farewell {
            outbox.push(frame);
        }
        at.map(|at| Cursor::clone(&at)).or(live)
    }

    /// Returns a channel's position, given the feed's.
    pub fn position(&self, channel: ChannelId, feed_position: &Cursor) -> Cursor {
        match self.channels.get(&channel) {
            Some(state) => self.group(*state).position(feed_position),
            None => feed_position.clone(),
        }
    }

    /// Returns whether a channel is in a replay.
    pub fn is_replayed(&self, channel: ChannelId) -> bool {
        matches!(self.channels.get(&channel), Some(ChannelState::Replay(..)))
    }

    /// Returns what a channel subscribes to, and where it is; `None` for an unknown one.
    pub fn describe(&self, channel: ChannelId, feed_position: Option<&Cursor>) -> Option<ChannelDescription> {
        let group = self.group(*self.channels.get(&channel)?);
        Some(ChannelDescription {
            channel,
            subscription: group.subscription().clone(),
            position: feed_position.map(|feed_position| group.position(feed_position)),
            is_replayed: self.is_replayed(channel),
        })
    }

    /// Returns the number of channels and of groups.
    pub fn count(&self) -> (usize, usize) {
        let replayed: usize = self.replays.values().map(|entry| entry.groups.len()).sum();
        (self.channels.len(), self.live.len() + replayed)
    }

    /// Records the feed's new position: groups that were ahead of it and are not any more join the others. `None`
    /// after a gap: all groups are at the same, unknown position.
    pub fn set_position(&mut self, feed_position: Option<&Cursor>) {
        let is_behind =
            |since: &Cursor| feed_position.is_none_or(|feed_position| feed_position.is_at_or_after(since));
        let is_reached = |number: &GroupId| self.live.get(*number).key().since.as_ref().is_none_or(is_behind);
        for number in self.ahead.iter().copied().filter(is_reached).collect::<Vec<_>>() {
            let group = self.remove_live(number);
            self.make_live(group, None);
        }
    }

    /// Moves the groups that these relations may concern into a replay of the rest of a page after `at`; `None` when
    /// there are none.
    pub fn begin_replay(&mut self, relations: &HashSet<RelationId>, at: &Cursor) -> Option<Replayed> {
        let catalog = self.live.catalog().cloned().unwrap_or_default();
        let concerned = self.live.iter().filter(|(_, group)| group.concerns(&catalog, relations));
        let concerned: Vec<GroupId> = concerned.map(|(number, _)| number).collect();
        if concerned.is_empty() {
            return None;
        }
        self.last_replay += 1;
        let number = self.last_replay;
        let mut entry = ReplayEntry { groups: Slab::new(), newcomers: Arc::default() };
        for live in concerned {
            let group = self.remove_live(live);
            let group = group.at_position(group.position(at));
            let index = entry.groups.insert(group.clone());
            group.members().for_each(|channel, _| {
                self.channels.insert(channel, ChannelState::Replay(number, index));
            });
        }
        let groups = entry.groups.iter().map(|(_, group)| group.clone()).collect();
        let newcomers = Arc::clone(&entry.newcomers);
        self.replays.insert(number, entry);
        Some(Replayed { number, groups, newcomers })
    }

    /// Ends a replay: its groups are live from now on. `at` is where they are, with nothing missing before the feed's
    /// position; `None` when what they miss cannot be recovered and they got a gap. Returns false when the
    /// replay must continue, because a group has joined that it does not know yet.
    pub fn end_replay(
        &mut self,
        replay: u64,
        at: Option<&Cursor>,
        replay_catalog: Option<&Catalog>,
        feed_position: Option<&Cursor>,
    ) -> bool {
        let Some(entry) = self.replays.get(&replay) else { return true };
        if at.is_some() && !entry.newcomers.lock().is_empty() {
            return false;
        }
        let groups = self.replays.remove(&replay).map(|entry| entry.groups);
        for (_, group) in groups.into_iter().flatten() {
            let position = at.map(|at| at.merge(&group.position(at)));
            if let Some(catalog) = self.live.catalog() {
                group.apply_catalog(replay_catalog, catalog, position.as_ref());
            }
            let is_behind = |position: &Cursor| {
                feed_position.is_some_and(|feed_position| feed_position.is_at_or_after(position))
            };
            self.make_live(group, position.filter(|position| !is_behind(position)));
        }
        true
    }

    /// Returns why tables show no row to the role of a channel that names them, and what to do.
    pub fn hidden(&self, catalog: &Catalog) -> BTreeSet<String> {
        self.groups().flat_map(|group| group.subscription().hidden_in(catalog).into_values()).collect()
    }

    /// Returns who follows a relation, one entry for each group and filter.
    pub fn readers(&self, relation: &Relation) -> Vec<Reader> {
        let readers = |group: &SubscriberGroup| {
            let (identity, channels) = (group.subscription().identity().clone(), group.members().count());
            let reader = |binding: &Binding| {
                let (identity, filter) = (identity.clone(), binding.filter.clone());
                Reader { identity, filter, channels }
            };
            group.subscription().concerning(relation).map(reader).collect::<Vec<_>>()
        };
        self.groups().flat_map(readers).collect()
    }

    fn groups(&self) -> impl Iterator<Item = &SubscriberGroup> {
        let replayed = self.replays.values().flat_map(|entry| &entry.groups).map(|(_, group)| group);
        self.live.iter().map(|(_, group)| group).chain(replayed)
    }

    /// Calls `with` for each group of a replay.
    pub fn for_each_group(&self, replay: u64, with: impl FnMut(&SubscriberGroup)) {
        let groups = self.replays.get(&replay).map(|entry| &entry.groups);
        groups.into_iter().flatten().map(|(_, group)| group).for_each(with);
    }

    fn group(&self, state: ChannelState) -> &SubscriberGroup {
        match state {
            ChannelState::Live(number) => self.live.get(number),
            ChannelState::Replay(number, index) => &self.replays[&number].groups[index],
        }
    }

    /// Makes the channels of a group live at `since`.
    fn make_live(&mut self, group: SubscriberGroup, since: Option<Cursor>) {
        for (channel, subscriber) in group.into_subscribers(since) {
            self.add_live(channel, subscriber);
        }
    }

    fn add_live(&mut self, channel: ChannelId, subscriber: Subscriber) {
        let Subscriber { codec, subscription, since, outbox, missed } = subscriber;
        let is_ahead = since.is_some();
        let key = GroupKey { codec, subscription: subscription.clone(), since };
        let number = match self.by_key.get(&key) {
            Some(known) => {
                self.live.update(*known, |group| group.add(channel, outbox, subscription));
                *known
            }
            None => {
                let key = Arc::new(key);
                let number = self.live.insert(SubscriberGroup::new(Arc::clone(&key), channel, outbox));
                self.by_key.insert(key, number);
                if is_ahead {
                    self.ahead.insert(number);
                }
                number
            }
        };
        self.channels.insert(channel, ChannelState::Live(number));
        if let Some(why) = missed {
            self.live.get(number).members().set_missed(why);
        }
    }

    /// Adds a channel to a replay at its own position.
    fn add_to_replay(
        &mut self,
        replay: u64,
        channel: ChannelId,
        subscriber: Subscriber,
        at: &Arc<Cursor>,
    ) -> SubscriberGroup {
        let Subscriber { codec, subscription, outbox, missed, .. } = subscriber;
        let key = GroupKey { codec, subscription, since: None };
        let group = SubscriberGroup::new(Arc::new(key), channel, outbox).at_position(Cursor::clone(at));
        if let Some(why) = missed {
            group.members().set_missed(why);
        }
        if let Some(entry) = self.replays.get_mut(&replay) {
            let index = entry.groups.insert(group.clone());
            self.channels.insert(channel, ChannelState::Replay(replay, index));
        }
        group
    }

    /// Removes a channel; returns its position if it was in a replay.
    fn remove(&mut self, channel: ChannelId) -> Option<Arc<Cursor>> {
        let state = self.channels.remove(&channel)?;
        let members = self.group(state).members();
        let (at, is_empty) = (members.remove(channel), members.is_empty());
        match state {
            _ if !is_empty => {}
            ChannelState::Live(number) => _ = self.remove_live(number),
            ChannelState::Replay(number, index) => {
                if let Some(entry) = self.replays.get_mut(&number) {
                    entry.groups.remove(index);
                }
            }
        }
        at
    }

    fn remove_live(&mut self, number: GroupId) -> SubscriberGroup {
        let group = self.live.remove(number);
        self.by_key.remove(group.key());
        self.ahead.remove(&number);
        group
    }
}
