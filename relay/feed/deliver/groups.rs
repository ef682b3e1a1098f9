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
    groups: Slab<SubscriberGroup>,
    subscriber_indexes: SubscriberIndexes,
    catalog: Option<Arc<Catalog>>,
    /// One came that was bound by other rules than these. Which are the older ones shows when the next change is judged.
    is_doubtful: bool,
}

impl SubscriberGroups {
    /// None yet; what comes is judged with these rules until there are others.
    pub fn with_catalog(catalog: Option<Arc<Catalog>>) -> Self {
        Self { catalog, ..Self::default() }
    }

    /// The rules that changes are judged with.
    pub fn rules(&self) -> Option<&Arc<Catalog>> {
        self.catalog.as_ref()
    }

    /// Takes one in.
    pub fn insert(&mut self, group: SubscriberGroup) -> GroupId {
        self.is_doubtful |= self.is_bound_by_others(group.subscription());
        let number = self.groups.insert(group);
        self.seat(number);
        number
    }

    /// Changes one, which may have another subscription then.
    pub fn change(&mut self, number: GroupId, change: impl FnOnce(&mut SubscriberGroup)) {
        let group = &mut self.groups[number];
        change(group);
        let subscription = group.subscription().clone();
        self.is_doubtful |= self.is_bound_by_others(&subscription);
        self.seat(number);
    }

    /// Takes one out.
    pub fn remove(&mut self, number: GroupId) -> SubscriberGroup {
        self.subscriber_indexes.leave(number);
        self.groups.remove(number)
    }

    /// One of them.
    pub fn get(&self, number: GroupId) -> &SubscriberGroup {
        &self.groups[number]
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (GroupId, &SubscriberGroup)> {
        self.groups.iter()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.groups.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    fn seat(&mut self, number: GroupId) {
        let catalog = self.catalog.as_ref();
        let relation = |id| catalog.and_then(|catalog| catalog.relation(id)).cloned();
        self.subscriber_indexes.join(number, self.groups[number].subscription(), relation);
    }

    /// Whether what the subscription was bound to is gone, or another, by the rules that changes are judged with.
    pub fn is_stale(&self, subscription: &Subscription) -> bool {
        self.catalog.as_ref().is_some_and(|catalog| subscription.is_stale(catalog))
    }

    /// Whether the subscription was bound by other rules than those that changes are judged with, as far as that shows.
    fn is_bound_by_others(&self, subscription: &Subscription) -> bool {
        let is_other =
            |catalog: &Arc<Catalog>| subscription.is_stale(catalog) || subscription.may_be_lifted(catalog);
        self.catalog.as_ref().is_some_and(is_other)
    }

    /// Whether a subscription came that was bound by other rules than changes are judged with; the rules are then read again.
    pub fn is_doubtful(&self) -> bool {
        self.is_doubtful
    }

    /// Whether changes are judged with this catalog already.
    pub fn has_catalog(&self, catalog: &Arc<Catalog>) -> bool {
        !self.is_doubtful && self.catalog.as_ref().is_some_and(|last| Arc::ptr_eq(last, catalog))
    }

    /// From now on changes are judged with this catalog. Those who subscribed to what is gone are told so, with the cursor:
    /// `here` is what was delivered to all.
    pub fn set_catalog(&mut self, catalog: &Arc<Catalog>, here: Option<&Cursor>) {
        if self.has_catalog(catalog) {
            return;
        }
        self.subscriber_indexes.forget();
        for (_, group) in &self.groups {
            group.apply_catalog(self.catalog.as_deref(), catalog, here);
        }
        self.catalog = Some(Arc::clone(catalog));
        self.is_doubtful = false;
    }

    /// Tells a stretch to all whom it concerns; returns how many frames that makes.
    ///
    /// # Errors
    /// Only when PostgreSQL cannot be asked; then nobody was told anything.
    pub async fn tell(&mut self, gate: &Gate, catalog: &Catalog, batch: &Batch) -> Result<usize, Error> {
        for change in &batch.changes {
            if let Some(relation) = catalog.relation(change.relation) {
                let groups = self.groups.iter().map(|(id, group)| (id, group.subscription()));
                self.subscriber_indexes.prepare(relation, groups);
            }
        }
        tell(gate, catalog, batch, &self.subscriber_indexes, |id| &self.groups[id], Unit::part()).await
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
        self.groups.iter().any(|(_, group)| group.members().is_behind())
    }
}
