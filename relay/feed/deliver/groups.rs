//! Subscriber groups that get each batch together, with their indexes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use slab::Slab;
use tokio::time::sleep;

use crate::feed::authorize::gate::Gate;
use crate::feed::authorize::subscriber_index::{GroupId, SubscriberIndexes};
use crate::feed::deliver::fan_out::deliver;
use crate::feed::deliver::group::SubscriberGroup;
use crate::feed::deliver::queue::Unit;
use crate::feed::read::batch::Batch;
use crate::model::catalog::relation::Catalog;
use crate::model::log::cursor::Cursor;
use crate::model::subscription::binding::Subscription;
use crate::postgres::connect::pool::Error;

/// The groups, by id, and the catalog that changes are authorized with.
#[derive(Default)]
pub struct SubscriberGroups {
    groups: Slab<SubscriberGroup>,
    subscriber_indexes: SubscriberIndexes,
    catalog: Option<Arc<Catalog>>,
    /// A group was bound with another catalog. Which of the two is newer shows when the next change is authorized.
    has_other_catalog: bool,
}

impl SubscriberGroups {
    /// Creates an empty set that authorizes with this catalog until it gets another.
    pub fn with_catalog(catalog: Option<Arc<Catalog>>) -> Self {
        Self { catalog, ..Self::default() }
    }

    /// Returns the catalog that changes are authorized with.
    pub fn catalog(&self) -> Option<&Arc<Catalog>> {
        self.catalog.as_ref()
    }

    /// Adds a group.
    pub fn insert(&mut self, group: SubscriberGroup) -> GroupId {
        self.has_other_catalog |= self.is_bound_by_other_catalog(group.subscription());
        let number = self.groups.insert(group);
        self.index(number);
        number
    }

    /// Changes a group, which may get another subscription.
    pub fn update(&mut self, number: GroupId, update: impl FnOnce(&mut SubscriberGroup)) {
        let group = &mut self.groups[number];
        update(group);
        let subscription = group.subscription().clone();
        self.has_other_catalog |= self.is_bound_by_other_catalog(&subscription);
        self.index(number);
    }

    /// Removes a group.
    pub fn remove(&mut self, number: GroupId) -> SubscriberGroup {
        self.subscriber_indexes.remove(number);
        self.groups.remove(number)
    }

    /// Returns a group.
    pub fn get(&self, number: GroupId) -> &SubscriberGroup {
        &self.groups[number]
    }

    /// Iterates over all groups.
    pub fn iter(&self) -> impl Iterator<Item = (GroupId, &SubscriberGroup)> {
        self.groups.iter()
    }

    /// Returns the number of groups.
    pub fn len(&self) -> usize {
        self.groups.len()
    }

    /// Returns whether there are no groups.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    fn index(&mut self, number: GroupId) {
        let catalog = self.catalog.as_ref();
        let relation = |id| catalog.and_then(|catalog| catalog.relation(id)).cloned();
        self.subscriber_indexes.insert(number, self.groups[number].subscription(), relation);
    }

    /// Returns whether the subscription was bound to a relation that is gone or changed in the current catalog.
    pub fn is_stale(&self, subscription: &Subscription) -> bool {
        self.catalog.as_ref().is_some_and(|catalog| subscription.is_stale(catalog))
    }

    /// Returns whether the subscription was evidently bound with another catalog than the current one.
    fn is_bound_by_other_catalog(&self, subscription: &Subscription) -> bool {
        let is_other =
            |catalog: &Arc<Catalog>| subscription.is_stale(catalog) || subscription.may_be_lifted(catalog);
        self.catalog.as_ref().is_some_and(is_other)
    }

    /// Returns whether a group was bound with another catalog; the catalog has to be reloaded then.
    pub fn has_other_catalog(&self) -> bool {
        self.has_other_catalog
    }

    /// Returns whether changes are already authorized with this catalog.
    pub fn has_catalog(&self, catalog: &Arc<Catalog>) -> bool {
        !self.has_other_catalog && self.catalog.as_ref().is_some_and(|last| Arc::ptr_eq(last, catalog))
    }

    /// Sets the catalog that changes are authorized with. Groups that lost a relation get a gap with their cursor.
    pub fn set_catalog(&mut self, catalog: &Arc<Catalog>, feed_position: Option<&Cursor>) {
        if self.has_catalog(catalog) {
            return;
        }
        self.subscriber_indexes.clear();
        for (_, group) in &self.groups {
            group.apply_catalog(self.catalog.as_deref(), catalog, feed_position);
        }
        self.catalog = Some(Arc::clone(catalog));
        self.has_other_catalog = false;
    }

    /// Delivers a batch to all groups it concerns; returns the number of frames queued.
    ///
    /// # Errors
    /// Only when PostgreSQL does not answer; nothing was delivered then.
    pub async fn deliver(&mut self, gate: &Gate, catalog: &Catalog, batch: &Batch) -> Result<usize, Error> {
        for change in &batch.changes {
            for relation in catalog.affected(change) {
                let groups = self.groups.iter().map(|(id, group)| (id, group.subscription()));
                self.subscriber_indexes.prepare(relation, groups);
            }
        }
        deliver(gate, catalog, batch, &self.subscriber_indexes, |id| &self.groups[id], Unit::next()).await
    }

    /// Waits up to `limit` for clients that have much to read; returns the time waited.
    pub async fn wait_for_clients(&self, limit: Duration) -> Duration {
        let started = Instant::now();
        while started.elapsed() < limit && self.is_behind() {
            sleep(Duration::from_millis(1)).await;
        }
        started.elapsed()
    }

    /// Returns whether a client has much to read.
    pub fn is_behind(&self) -> bool {
        self.groups.iter().any(|(_, group)| group.members().is_behind())
    }
}
