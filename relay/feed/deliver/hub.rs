//! All channels of the relay, each in one place: told what comes, or told the past beside it. They come, go and have other
//! tokens here, at once, whoever tells them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use slab::Slab;

use crate::feed::authorize::subscriber_index::GroupId;
use crate::feed::deliver::group::{GroupKey, Subscriber, SubscriberGroup};
use crate::feed::deliver::groups::SubscriberGroups;
use crate::feed::deliver::outbox::Outbox;
use crate::model::catalog::relation::Catalog;
use crate::model::log::cursor::Cursor;
use crate::model::row::change::RelationId;
use crate::model::session::machine::ChannelId;

/// The channels.
#[derive(Default)]
pub struct Hub {
    /// Those who are told what comes.
    pub live: SubscriberGroups,
    by_key: HashMap<Arc<GroupKey>, GroupId>,
    /// Of those, the audiences that have more than what was delivered to the others.
    ahead: BTreeSet<GroupId>,
    channels: HashMap<ChannelId, ChannelState>,
    replays: BTreeMap<u64, Listed>,
    last_replay: u64,
}

/// Where a channel is.
#[derive(Clone, Copy)]
enum ChannelState {
    Live(GroupId),
    /// In the replay of this number.
    Replay(u64, usize),
}

/// A replay, as seen from here.
struct Listed {
    groups: Slab<SubscriberGroup>,
    newcomers: Arc<Newcomers>,
}

/// Audiences on their way into a replay that has begun. Each has its position.
#[derive(Default)]
pub struct Newcomers(Mutex<Vec<SubscriberGroup>>);

impl Newcomers {
    /// Those who came since this was asked last.
    pub fn take(&self) -> Vec<SubscriberGroup> {
        std::mem::take(&mut self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<SubscriberGroup>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a replay begins with.
pub struct Replayed {
    /// Its number.
    pub number: u64,
    /// Who is told.
    pub groups: Vec<SubscriberGroup>,
    /// Who comes later.
    pub newcomers: Arc<Newcomers>,
}

impl Hub {
    /// Delivers to this channel from now on, in place of what it had; the greeting goes out first. While it is told the
    /// past it goes on there, with what is given here.
    pub fn join(&mut self, channel: ChannelId, registration: Subscriber, greeting: Vec<Bytes>) {
        let place = self.channels.get(&channel).copied();
        let missed = place.and_then(|place| self.group(place).members().missed());
        let replay = match place {
            Some(ChannelState::Replay(number, _)) => {
                Some((number, Arc::clone(&self.replays[&number].newcomers)))
            }
            _ => None,
        };
        // Held until the channel has come over: whoever tells looks here after each part, when all have their new positions.
        let mut newcomers = replay.as_ref().map(|(_, newcomers)| newcomers.lock());
        let at = self.remove(channel);
        for frame in greeting {
            registration.outbox.push(frame);
        }
        if let Some(why) = missed {
            registration.outbox.push(registration.codec.gap(why, ""));
        }
        match (replay.as_ref(), newcomers.as_mut(), at) {
            (Some((number, _)), Some(newcomers), Some(at)) => {
                newcomers.push(self.enter(*number, channel, registration, &at));
            }
            _ => self.take_in(channel, registration),
        }
    }

    /// Delivers to this channel what comes after what it has.
    pub fn admit(&mut self, channel: ChannelId, registration: Subscriber) {
        self.remove(channel);
        self.take_in(channel, registration);
    }

    /// Delivers nothing more to this channel; the farewell goes out after the last change. Returns up to where it was told
    /// everything, when `here` is what was delivered to all.
    pub fn leave(
        &mut self,
        channel: ChannelId,
        outbox: &Outbox,
        farewell: Vec<Bytes>,
        here: Option<&Cursor>,
    ) -> Option<Cursor> {
        let live = here.map(|here| self.position(channel, here));
        let at = self.remove(channel);
        for frame in farewell {
            outbox.push(frame);
        }
        at.map(|at| Cursor::clone(&at)).or(live)
    }

    /// Up to where this channel was told everything when `here` is what was delivered to all.
    pub fn position(&self, channel: ChannelId, here: &Cursor) -> Cursor {
        match self.channels.get(&channel) {
            Some(place) => self.group(*place).position(here),
            None => here.clone(),
        }
    }

    /// Whether this channel is told the past.
    pub fn is_replayed(&self, channel: ChannelId) -> bool {
        matches!(self.channels.get(&channel), Some(ChannelState::Replay(..)))
    }

    /// How many channels, and how many audiences.
    pub fn count(&self) -> (usize, usize) {
        let replayed: usize = self.replays.values().map(|listed| listed.groups.len()).sum();
        (self.channels.len(), self.live.len() + replayed)
    }

    /// Everything up to `here` was delivered to all: those that had as much before are not apart from the others any more.
    /// Without a place all are in the same one.
    pub fn moved(&mut self, here: Option<&Cursor>) {
        let is_behind = |since: &Cursor| here.is_none_or(|here| here.is_at_or_after(since));
        let met = |number: &GroupId| self.live.get(*number).key().since.as_ref().is_none_or(is_behind);
        for number in self.ahead.iter().copied().filter(met).collect::<Vec<_>>() {
            let group = self.discard(number);
            self.make_live(group, None);
        }
    }

    /// The rest of a page, after `at`, is told on their own to all whom changes of one of these relations may concern; none
    /// when there are none.
    pub fn begin_replay(&mut self, relations: &HashSet<RelationId>, at: &Cursor) -> Option<Replayed> {
        let catalog = Arc::clone(self.live.rules()?);
        let relations: Vec<_> = relations.iter().filter_map(|id| catalog.relation(*id)).collect();
        let is_concerned = |group: &SubscriberGroup| {
            let concerns = |relation| group.subscription().concerning(relation).next().is_some();
            relations.iter().any(|relation| concerns(relation))
        };
        let concerned = self.live.iter().filter(|(_, group)| is_concerned(group));
        let concerned: Vec<GroupId> = concerned.map(|(number, _)| number).collect();
        if concerned.is_empty() {
            return None;
        }
        self.last_replay += 1;
        let number = self.last_replay;
        let mut listed = Listed { groups: Slab::new(), newcomers: Arc::default() };
        for live in concerned {
            let group = self.discard(live);
            let group = group.beginning_at(group.position(at));
            let place = listed.groups.insert(group.clone());
            group.members().each(|channel, _| {
                self.channels.insert(channel, ChannelState::Replay(number, place));
            });
        }
        let groups = listed.groups.iter().map(|(_, group)| group.clone()).collect();
        let newcomers = Arc::clone(&listed.newcomers);
        self.replays.insert(number, listed);
        Some(Replayed { number, groups, newcomers })
    }

    /// Those of a replay have come to `at`, where they lack nothing of what was delivered to all, which is `here`: from now
    /// on they are told what comes. Nobody knows where they are when what they lack cannot be had; they know. False when
    /// the replay has to ask again: somebody has come to it whom it has not heard of.
    pub fn end_replay(
        &mut self,
        replay: u64,
        at: Option<&Cursor>,
        rules: Option<&Catalog>,
        here: Option<&Cursor>,
    ) -> bool {
        let Some(listed) = self.replays.get(&replay) else { return true };
        if at.is_some() && !listed.newcomers.lock().is_empty() {
            return false;
        }
        let groups = self.replays.remove(&replay).map(|listed| listed.groups);
        for (_, group) in groups.into_iter().flatten() {
            let position = at.map(|at| at.merge(&group.position(at)));
            if let Some(catalog) = self.live.rules() {
                group.apply_catalog(rules, catalog, position.as_ref());
            }
            let is_behind = |position: &Cursor| here.is_some_and(|here| here.is_at_or_after(position));
            self.make_live(group, position.filter(|position| !is_behind(position)));
        }
        true
    }

    /// Calls `with` for each audience of a replay.
    pub fn each_of(&self, replay: u64, with: impl FnMut(&SubscriberGroup)) {
        let groups = self.replays.get(&replay).map(|listed| &listed.groups);
        groups.into_iter().flatten().map(|(_, group)| group).for_each(with);
    }

    fn group(&self, place: ChannelState) -> &SubscriberGroup {
        match place {
            ChannelState::Live(number) => self.live.get(number),
            ChannelState::Replay(number, place) => &self.replays[&number].groups[place],
        }
    }

    /// Its channels are told what comes and they do not have.
    fn make_live(&mut self, group: SubscriberGroup, since: Option<Cursor>) {
        for (channel, registration) in group.into_registrations(since) {
            self.take_in(channel, registration);
        }
    }

    fn take_in(&mut self, channel: ChannelId, registration: Subscriber) {
        let Subscriber { codec, subscription, since, outbox, missed } = registration;
        let is_ahead = since.is_some();
        let key = GroupKey { codec, subscription: subscription.clone(), since };
        let number = match self.by_key.get(&key) {
            Some(known) => {
                self.live.change(*known, |group| group.add(channel, outbox, subscription));
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
            self.live.get(number).members().misses(why);
        }
    }

    /// A channel goes on in a replay, from its own position.
    fn enter(
        &mut self,
        replay: u64,
        channel: ChannelId,
        registration: Subscriber,
        at: &Arc<Cursor>,
    ) -> SubscriberGroup {
        let Subscriber { codec, subscription, outbox, missed, .. } = registration;
        let key = GroupKey { codec, subscription, since: None };
        let group = SubscriberGroup::new(Arc::new(key), channel, outbox).beginning_at(Cursor::clone(at));
        if let Some(why) = missed {
            group.members().misses(why);
        }
        if let Some(listed) = self.replays.get_mut(&replay) {
            let place = listed.groups.insert(group.clone());
            self.channels.insert(channel, ChannelState::Replay(replay, place));
        }
        group
    }

    /// Takes a channel out, and says where it was if it was told the past.
    fn remove(&mut self, channel: ChannelId) -> Option<Arc<Cursor>> {
        let place = self.channels.remove(&channel)?;
        let members = self.group(place).members();
        let (at, is_empty) = (members.remove(channel), members.is_empty());
        match place {
            _ if !is_empty => {}
            ChannelState::Live(number) => _ = self.discard(number),
            ChannelState::Replay(number, place) => {
                if let Some(listed) = self.replays.get_mut(&number) {
                    listed.groups.remove(place);
                }
            }
        }
        at
    }

    fn discard(&mut self, number: GroupId) -> SubscriberGroup {
        let group = self.live.remove(number);
        self.by_key.remove(group.key());
        self.ahead.remove(&number);
        group
    }
}
