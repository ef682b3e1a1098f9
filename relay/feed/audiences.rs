//! All audiences that are told together: who is in which, and who reads what.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use slab::Slab;
use tokio::time::sleep;

use crate::feed::audience::{Audience, AudienceKey, Registration};
use crate::feed::gate::Gate;
use crate::feed::outbox::Outbox;
use crate::feed::readership::{AudienceId, Readerships};
use crate::feed::stretch::{Stretch, tell};
use crate::model::change::RelationId;
use crate::model::cursor::Cursor;
use crate::model::relation::Catalog;
use crate::model::session::ChannelId;
use crate::model::subscription::Subscription;
use crate::postgres::connect::Error;

/// The audiences, by what they get and by channel.
#[derive(Default)]
pub struct Audiences {
    audiences: Slab<Audience>,
    by_key: HashMap<Arc<AudienceKey>, AudienceId>,
    channels: HashMap<ChannelId, AudienceId>,
    /// Those that have more than what was delivered to the others.
    ahead: BTreeSet<AudienceId>,
    readerships: Readerships,
    judged_with: Option<Arc<Catalog>>,
    /// Somebody came who was bound by other rules than these. Which are the older ones shows when the next change is judged.
    is_doubtful: bool,
}

impl Audiences {
    /// Delivers to this channel from now on, in place of what it had; the greeting goes out first.
    pub fn join(&mut self, channel: ChannelId, registration: Registration, greeting: Vec<Bytes>) {
        let before = self.channels.get(&channel).map(|number| &self.audiences[*number]);
        let missed = before.and_then(Audience::missed);
        self.remove(channel);
        for frame in greeting {
            registration.outbox.push(frame);
        }
        if let Some(why) = missed {
            registration.outbox.push(registration.dress.gap(why, "").into());
        }
        self.take_in(channel, registration);
    }

    /// Delivers nothing more to this channel; the farewell goes out after the last change.
    pub fn leave(&mut self, channel: ChannelId, outbox: &Outbox, farewell: Vec<Bytes>) {
        self.remove(channel);
        for frame in farewell {
            outbox.push(frame);
        }
    }

    /// Whether this channel is among them.
    pub fn has(&self, channel: ChannelId) -> bool {
        self.channels.contains_key(&channel)
    }

    /// Whether nobody is among them.
    pub fn is_empty(&self) -> bool {
        self.channels.is_empty()
    }

    /// How many channels, and how many audiences.
    pub fn count(&self) -> (usize, usize) {
        (self.channels.len(), self.audiences.len())
    }

    /// All audiences.
    pub fn iter(&self) -> impl Iterator<Item = &Audience> {
        self.audiences.iter().map(|(_, audience)| audience)
    }

    /// Whether what the subscription was bound to is gone, or another, by the rules that changes are judged with.
    pub fn is_stale(&self, subscription: &Subscription) -> bool {
        self.judged_with.as_ref().is_some_and(|catalog| subscription.is_stale(catalog))
    }

    fn take_in(&mut self, channel: ChannelId, registration: Registration) {
        let Registration { dress, subscription, since, outbox, missed } = registration;
        let is_ahead = since.is_some();
        self.is_doubtful |= self.is_stale(&subscription);
        let key = AudienceKey { dress, subscription: subscription.clone(), since };
        let audience = match self.by_key.get(&key) {
            Some(known) => {
                self.audiences[*known].add(channel, outbox, subscription);
                *known
            }
            None => {
                let key = Arc::new(key);
                let audience = self.audiences.insert(Audience::new(Arc::clone(&key), channel, outbox));
                self.by_key.insert(key, audience);
                if is_ahead {
                    self.ahead.insert(audience);
                }
                audience
            }
        };
        self.channels.insert(channel, audience);
        if let Some(why) = missed {
            self.audiences[audience].misses(why);
        }
        let catalog = self.judged_with.as_ref();
        let relation = |id| catalog.and_then(|catalog| catalog.relation(id)).cloned();
        self.readerships.join(audience, self.audiences[audience].subscription(), relation);
    }

    fn remove(&mut self, channel: ChannelId) {
        let Some(number) = self.channels.remove(&channel) else { return };
        let audience = &mut self.audiences[number];
        audience.remove(channel);
        if audience.is_empty() {
            self.discard(number);
        }
    }

    fn discard(&mut self, number: AudienceId) -> Audience {
        let audience = self.audiences.remove(number);
        self.readerships.leave(number);
        self.by_key.remove(audience.key());
        self.ahead.remove(&number);
        audience
    }

    /// Up to where this channel, one of them, was told everything when `here` is what was delivered to all.
    pub fn position(&self, channel: ChannelId, here: &Cursor) -> Cursor {
        let audience = self.channels.get(&channel).and_then(|number| self.audiences.get(*number));
        match audience.and_then(|audience| audience.key().since.as_ref()) {
            Some(since) => here.and(since),
            None => here.clone(),
        }
    }

    /// Everything up to `here` was delivered to all: those that had as much before are not apart from the others any more.
    /// Without a place all are in the same one.
    pub fn moved(&mut self, here: Option<&Cursor>) {
        let is_behind = |since: &Cursor| here.is_none_or(|here| here.is_at_or_after(since));
        let met = |number: &AudienceId| self.audiences[*number].key().since.as_ref().is_none_or(is_behind);
        for number in self.ahead.iter().copied().filter(met).collect::<Vec<_>>() {
            for (channel, registration) in self.discard(number).into_registrations() {
                self.take_in(channel, Registration { since: None, ..registration });
            }
        }
    }

    /// Whether changes are judged with this catalog already.
    pub fn is_judged_with(&self, catalog: &Arc<Catalog>) -> bool {
        !self.is_doubtful && self.judged_with.as_ref().is_some_and(|last| Arc::ptr_eq(last, catalog))
    }

    /// From now on changes are judged with this catalog. Whoever subscribed to what is gone is told so, with the cursor.
    pub fn judge_with(&mut self, catalog: &Arc<Catalog>, here: Option<&Cursor>) {
        if self.is_judged_with(catalog) {
            return;
        }
        self.readerships.forget();
        for (_, audience) in &self.audiences {
            audience.leave_what_is_gone(self.judged_with.as_deref(), catalog, here);
        }
        self.judged_with = Some(Arc::clone(catalog));
        self.is_doubtful = false;
    }

    /// Tells a stretch to all whom it concerns; returns how many frames that makes.
    ///
    /// # Errors
    /// Only when PostgreSQL cannot be asked; then nobody was told anything.
    pub async fn tell(&mut self, gate: &Gate, catalog: &Catalog, stretch: &Stretch) -> Result<usize, Error> {
        for change in &stretch.changes {
            if let Some(relation) = catalog.relation(change.relation) {
                let audiences = self.audiences.iter().map(|(id, audience)| (id, audience.subscription()));
                self.readerships.prepare(relation, audiences);
            }
        }
        tell(gate, catalog, stretch, &self.readerships, |id| &self.audiences[id]).await
    }

    /// Gives clients that have much to read the time to do so, up to `most`; returns how much they took.
    pub async fn let_clients_read(&self, most: Duration) -> Duration {
        let started = Instant::now();
        while started.elapsed() < most && self.iter().any(Audience::is_behind) {
            sleep(Duration::from_millis(1)).await;
        }
        started.elapsed()
    }

    /// Takes out all whom changes of one of these relations may concern.
    pub fn split_off(&mut self, relations: &HashSet<RelationId>) -> Self {
        let mut others = Self { judged_with: self.judged_with.clone(), ..Self::default() };
        let Some(catalog) = self.judged_with.clone() else { return others };
        let relations: Vec<_> = relations.iter().filter_map(|id| catalog.relation(*id)).collect();
        let is_concerned = |audience: &Audience| {
            let concerns = |relation| audience.subscription().concerning(relation).next().is_some();
            relations.iter().any(|relation| concerns(relation))
        };
        let concerned = self.audiences.iter().filter(|(_, audience)| is_concerned(audience));
        for number in concerned.map(|(number, _)| number).collect::<Vec<_>>() {
            for (channel, registration) in self.discard(number).into_registrations() {
                self.channels.remove(&channel);
                others.take_in(channel, registration);
            }
        }
        others
    }

    /// Takes in all of `others`, whose rules may have been older ones.
    pub fn absorb(&mut self, others: Self, here: Option<&Cursor>) {
        for (_, audience) in others.audiences {
            if let Some(catalog) = &self.judged_with {
                audience.leave_what_is_gone(others.judged_with.as_deref(), catalog, here);
            }
            for (channel, registration) in audience.into_registrations() {
                self.take_in(channel, registration);
            }
        }
    }

    /// The channels.
    pub fn channels(&self) -> impl Iterator<Item = ChannelId> {
        self.channels.keys().copied()
    }
}
