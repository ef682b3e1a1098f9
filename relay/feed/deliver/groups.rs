//! Audiences that are told together, by one reading of the changelog: who reads what of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use slab::Slab;
use tokio::time::sleep;

use crate::feed::authorize::gate::Gate;
use crate::feed::authorize::subscriber_index::{GroupId, SubscriberIndexes};
use crate::feed::deliver::fan_out::tell;
use crate::feed::deliver::group::SubscriberGroup;
use crate::feed::deliver::outbox::Unit;
use crate::feed::read::batch::Batch;
use crate::model::catalog::relation::Catalog;
use crate::model::log::cursor::Cursor;
use crate::model::subscription::binding::Subscription;
use crate::postgres::connect::pool::Error;

/// The audiences, by number.
#[derive(Default)]
pub struct SubscriberGroups {
    audiences: Slab<SubscriberGroup>,
    readerships: SubscriberIndexes,
    judged_with: Option<Arc<Catalog>>,
    /// One came that was bound by other rules than these. Which are the older ones shows when the next change is judged.
    is_doubtful: bool,
}

impl SubscriberGroups {
    /// None yet; what comes is judged with these rules until there are others.
    pub fn judged_by(catalog: Option<Arc<Catalog>>) -> Self {
        Self { judged_with: catalog, ..Self::default() }
    }

    /// The rules that changes are judged with.
    pub fn rules(&self) -> Option<&Arc<Catalog>> {
        self.judged_with.as_ref()
    }

    /// Takes one in.
    pub fn insert(&mut self, audience: SubscriberGroup) -> GroupId {
        self.is_doubtful |= self.is_bound_by_others(audience.subscription());
        let number = self.audiences.insert(audience);
        self.seat(number);
        number
    }

    /// Changes one, which may have another subscription then.
    pub fn change(&mut self, number: GroupId, change: impl FnOnce(&mut SubscriberGroup)) {
        let audience = &mut self.audiences[number];
        change(audience);
        let subscription = audience.subscription().clone();
        self.is_doubtful |= self.is_bound_by_others(&subscription);
        self.seat(number);
    }

    /// Takes one out.
    pub fn remove(&mut self, number: GroupId) -> SubscriberGroup {
        self.readerships.leave(number);
        self.audiences.remove(number)
    }

    /// One of them.
    pub fn get(&self, number: GroupId) -> &SubscriberGroup {
        &self.audiences[number]
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (GroupId, &SubscriberGroup)> {
        self.audiences.iter()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.audiences.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.audiences.is_empty()
    }

    fn seat(&mut self, number: GroupId) {
        let catalog = self.judged_with.as_ref();
        let relation = |id| catalog.and_then(|catalog| catalog.relation(id)).cloned();
        self.readerships.join(number, self.audiences[number].subscription(), relation);
    }

    /// Whether what the subscription was bound to is gone, or another, by the rules that changes are judged with.
    pub fn is_stale(&self, subscription: &Subscription) -> bool {
        self.judged_with.as_ref().is_some_and(|catalog| subscription.is_stale(catalog))
    }

    /// Whether the subscription was bound by other rules than those that changes are judged with, as far as that shows.
    fn is_bound_by_others(&self, subscription: &Subscription) -> bool {
        let is_other =
            |catalog: &Arc<Catalog>| subscription.is_stale(catalog) || subscription.may_be_lifted(catalog);
        self.judged_with.as_ref().is_some_and(is_other)
    }

    /// Whether a subscription came that was bound by other rules than changes are judged with; the rules are then read again.
    pub fn is_doubtful(&self) -> bool {
        self.is_doubtful
    }

    /// Whether changes are judged with this catalog already.
    pub fn is_judged_with(&self, catalog: &Arc<Catalog>) -> bool {
        !self.is_doubtful && self.judged_with.as_ref().is_some_and(|last| Arc::ptr_eq(last, catalog))
    }

    /// From now on changes are judged with this catalog. Those who subscribed to what is gone are told so, with the cursor:
    /// `here` is what was delivered to all.
    pub fn judge_with(&mut self, catalog: &Arc<Catalog>, here: Option<&Cursor>) {
        if self.is_judged_with(catalog) {
            return;
        }
        self.readerships.forget();
        for (_, audience) in &self.audiences {
            audience.follow_the_rules(self.judged_with.as_deref(), catalog, here);
        }
        self.judged_with = Some(Arc::clone(catalog));
        self.is_doubtful = false;
    }

    /// Tells a stretch to all whom it concerns; returns how many frames that makes.
    ///
    /// # Errors
    /// Only when PostgreSQL cannot be asked; then nobody was told anything.
    pub async fn tell(&mut self, gate: &Gate, catalog: &Catalog, stretch: &Batch) -> Result<usize, Error> {
        for change in &stretch.changes {
            if let Some(relation) = catalog.relation(change.relation) {
                let audiences = self.audiences.iter().map(|(id, audience)| (id, audience.subscription()));
                self.readerships.prepare(relation, audiences);
            }
        }
        tell(gate, catalog, stretch, &self.readerships, |id| &self.audiences[id], Unit::part()).await
    }

    /// Gives clients that have much to read the time to do so, up to `most`; returns how much they took.
    pub async fn let_clients_read(&self, most: Duration) -> Duration {
        let started = Instant::now();
        while started.elapsed() < most && self.is_behind() {
            sleep(Duration::from_millis(1)).await;
        }
        started.elapsed()
    }

    /// Whether a client has much to read.
    pub fn is_behind(&self) -> bool {
        self.audiences.iter().any(|(_, audience)| audience.members().is_behind())
    }
}
