//! The groups that read a relation with one role: in cohorts by the claims that the policy reads, and indexed by the
//! values of a row.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::model::catalog::relation::{Access, Relation};
use crate::model::policy::claim_expr::ClaimValue;
use crate::model::policy::index::SubscriptionIndex;
use crate::model::policy::index_key::{IndexKey, IndexKeys};
use crate::model::policy::plan::Plan;
use crate::model::policy::predicate::Answers;
use crate::model::policy::visibility::Identity;
use crate::model::row::change::RelationId;
use crate::model::row::datum::Kind;
use crate::model::row::image::Image;
use crate::model::row::truth::Truth;
use crate::model::subscription::binding::Subscription;
use crate::model::subscription::topic::TopicScope;
use crate::postgres::evaluate::set_based::SubscriberSet;

/// Identifies a group within a router.
pub type GroupId = usize;

/// The groups that read one relation with one role.
pub struct SubscriberIndex {
    id: u64,
    relation: Arc<Relation>,
    role: String,
    /// By increasing numbers that are never reused.
    cohorts: BTreeMap<u64, PolicyCohort>,
    by_key: HashMap<Arc<CohortKey>, u64>,
    last: Option<u64>,
    entries: HashMap<GroupId, CohortEntry>,
    index: SubscriptionIndex<GroupId>,
}

/// Groups for which the policy has equal results.
pub struct PolicyCohort {
    /// The identity of one group; the policy cannot tell them apart.
    pub identity: Identity,
    key: Arc<CohortKey>,
    /// The claims make the policy raise an error: nothing is shown.
    raises: bool,
    groups: BTreeSet<GroupId>,
    /// Groups that PostgreSQL finds by set-based queries.
    named: BTreeSet<GroupId>,
}

/// What the groups of a cohort have in common.
#[derive(PartialEq, Eq, Hash)]
struct CohortKey {
    terms: Vec<ClaimValue>,
    /// Set when the policy may read more than these claims, or only PostgreSQL can evaluate them.
    identity: Option<Identity>,
}

struct CohortEntry {
    cohort: u64,
    keys: IndexKeys,
}

impl SubscriberIndex {
    /// Creates an empty index; `None` when the role may not read the relation.
    fn new(relation: &Arc<Relation>, role: &str) -> Option<Self> {
        static NUMBERS: AtomicU64 = AtomicU64::new(1);
        relation.access(role)?;
        Some(Self {
            id: NUMBERS.fetch_add(1, Ordering::Relaxed),
            relation: Arc::clone(relation),
            role: role.to_owned(),
            cohorts: BTreeMap::new(),
            by_key: HashMap::new(),
            last: None,
            entries: HashMap::new(),
            index: SubscriptionIndex::default(),
        })
    }

    /// Returns its unique number.
    pub fn number(&self) -> u64 {
        self.id
    }

    /// Returns the relation.
    pub fn relation(&self) -> &Arc<Relation> {
        &self.relation
    }

    /// Returns the role.
    pub fn role(&self) -> &str {
        &self.role
    }

    /// Returns the rights of the role. Always `Some`: `new` requires it.
    pub fn access(&self) -> Option<&Access> {
        self.relation.access(&self.role)
    }

    /// Returns a cohort.
    pub fn cohort(&self, number: u64) -> Option<&PolicyCohort> {
        self.cohorts.get(&number)
    }

    /// Returns whether the claims of a cohort make the policy raise an error, as far as that is known without
    /// PostgreSQL.
    pub fn raises(&self, cohort: u64) -> bool {
        self.cohorts.get(&cohort).is_some_and(|cohort| cohort.raises)
    }

    /// Returns the groups of a cohort.
    pub fn groups(&self, cohort: u64) -> impl Iterator<Item = GroupId> {
        self.cohorts.get(&cohort).into_iter().flat_map(|cohort| cohort.groups.iter().copied())
    }

    /// Returns the cohort of a group.
    pub fn cohort_of(&self, group: GroupId) -> Option<u64> {
        self.entries.get(&group).map(|entry| entry.cohort)
    }

    /// Returns all groups.
    pub fn all_groups(&self) -> impl Iterator<Item = GroupId> {
        self.entries.keys().copied()
    }

    /// Returns all groups that PostgreSQL finds by set-based queries.
    pub fn all_named(&self) -> impl Iterator<Item = GroupId> {
        self.cohorts.values().flat_map(|cohort| cohort.named.iter().copied())
    }

    /// Returns the groups of a cohort that PostgreSQL finds by set-based queries.
    pub fn named(&self, cohort: u64) -> impl Iterator<Item = GroupId> {
        self.cohorts.get(&cohort).into_iter().flat_map(|cohort| cohort.named.iter().copied())
    }

    /// Calls `found` for each group that the values of the image may concern, possibly more than once.
    pub fn look_up(&self, image: &Image<'_>, found: impl FnMut(GroupId)) {
        self.index.look_up(image, found);
    }

    /// Evaluates the policy on an image for a cohort.
    pub fn truth(&self, cohort: u64, image: &Image<'_>, answers: &dyn Answers) -> Truth {
        match (self.cohorts.get(&cohort), self.access()) {
            (Some(cohort), _) if cohort.raises => Truth::Error,
            (Some(cohort), Some(access)) => {
                let truth = access.plan.predicate.truth(image, &cohort.key.terms, answers, true);
                match truth {
                    Truth::True | Truth::Error if access.plan.needs_probe(&cohort.key.terms) => {
                        Truth::Undecided
                    }
                    truth => truth,
                }
            }
            _ => Truth::False,
        }
    }

    fn insert(&mut self, group: GroupId, subscription: &Subscription) {
        let relation = Arc::clone(&self.relation);
        let Some(access) = relation.access(&self.role) else { return };
        self.remove(group);
        let number = self.cohort_for(&access.plan, subscription.identity());
        let Some(cohort) = self.cohorts.get_mut(&number) else { return };
        let keys = match cohort.raises {
            true => IndexKeys::Any,
            false => access.plan.predicate.index_keys(&cohort.key.terms),
        };
        let keys = keys.and(filter_keys(subscription, &relation, access));
        cohort.groups.insert(group);
        match &keys {
            IndexKeys::Any => self.index.insert(None, group),
            IndexKeys::OneOf(keys) => {
                for key in keys {
                    if key.named {
                        cohort.named.insert(group);
                    } else {
                        self.index.insert(Some(key), group);
                    }
                }
            }
        }
        self.entries.insert(group, CohortEntry { cohort: number, keys });
    }

    /// Returns the cohort of an identity, creating it if needed.
    fn cohort_for(&mut self, plan: &Plan, identity: &Identity) -> u64 {
        let terms = plan.values(identity.claims());
        let is_alone = plan.reads_all || terms.contains(&ClaimValue::Undecided);
        let key = CohortKey { terms, identity: is_alone.then(|| identity.clone()) };
        if let Some(number) = self.by_key.get(&key) {
            return *number;
        }
        let number = self.last.map_or(0, |last| last + 1);
        let raises = plan.raises(&key.terms);
        let key = Arc::new(key);
        self.by_key.insert(Arc::clone(&key), number);
        let identity = identity.clone();
        self.cohorts.insert(
            number,
            PolicyCohort { identity, key, raises, groups: BTreeSet::new(), named: BTreeSet::new() },
        );
        self.last = Some(number);
        number
    }

    fn remove(&mut self, group: GroupId) {
        let Some(entry) = self.entries.remove(&group) else { return };
        match &entry.keys {
            IndexKeys::Any => self.index.remove(None, group),
            IndexKeys::OneOf(keys) => {
                keys.iter().filter(|key| !key.named).for_each(|key: &IndexKey| {
                    self.index.remove(Some(key), group);
                });
            }
        }
        if let Some(cohort) = self.cohorts.get_mut(&entry.cohort) {
            cohort.groups.remove(&group);
            cohort.named.remove(&group);
            if cohort.groups.is_empty() {
                self.by_key.remove(&cohort.key);
                self.cohorts.remove(&entry.cohort);
            }
        }
    }
}

/// Returns the index keys of the subscription's filters.
fn filter_keys(subscription: &Subscription, relation: &Relation, access: &Access) -> IndexKeys {
    let mut filter_keys = IndexKeys::OneOf(Vec::new());
    for binding in subscription.concerning(relation) {
        let one = match &binding.filter {
            None => IndexKeys::Any,
            Some(filter) if filter.is_usable(relation, access) => filter.index_keys(),
            Some(_) => continue,
        };
        filter_keys = filter_keys.or(one);
    }
    filter_keys
}

impl SubscriberSet for SubscriberIndex {
    fn id(&self) -> u64 {
        self.id
    }

    fn count(&self) -> usize {
        self.cohorts.len()
    }

    fn after(&self, number: Option<u64>, terms: &[(usize, Kind)]) -> Vec<(u64, Vec<Arc<str>>)> {
        let from = number.map_or(Bound::Unbounded, Bound::Excluded);
        let texts = |cohort: &PolicyCohort| {
            let text = |(term, _): &(usize, Kind)| match cohort.key.terms.get(*term) {
                Some(ClaimValue::One(datum)) if datum.is_short() => Some(datum.to_text()),
                _ => None,
            };
            terms.iter().map(text).collect::<Option<Vec<_>>>()
        };
        self.cohorts
            .range((from, Bound::Unbounded))
            .filter_map(|(number, cohort)| Some((*number, texts(cohort)?)))
            .collect()
    }

    fn last(&self) -> Option<u64> {
        self.last
    }
}

/// The subscriber indexes of all relations that have changed so far, and the groups of each topic.
#[derive(Default)]
pub struct SubscriberIndexes {
    relations: HashMap<RelationId, Vec<SubscriberIndex>>,
    topics: HashMap<TopicScope, BTreeSet<GroupId>>,
    topic_of: HashMap<GroupId, TopicScope>,
}

impl SubscriberIndexes {
    /// Drops the indexes of relations after the catalog changed.
    pub fn clear(&mut self) {
        self.relations.clear();
    }

    /// Returns the groups that follow a topic.
    pub fn following(&self, topic: &TopicScope) -> impl Iterator<Item = GroupId> {
        self.topics.get(topic).into_iter().flatten().copied()
    }

    /// Returns whether a group follows any topic.
    pub fn follow_topics(&self) -> bool {
        !self.topics.is_empty()
    }

    /// Adds the topic of a group. A group never has another one.
    pub fn insert_topic(&mut self, group: GroupId, subscription: &Subscription) {
        if let Some(topic) = subscription.topic()
            && self.topics.entry(topic.clone()).or_default().insert(group)
        {
            self.topic_of.insert(group, topic.clone());
        }
    }

    fn remove_topic(&mut self, group: GroupId) {
        let Some(topic) = self.topic_of.remove(&group) else { return };
        if let Some(groups) = self.topics.get_mut(&topic) {
            groups.remove(&group);
            if groups.is_empty() {
                self.topics.remove(&topic);
            }
        }
    }

    /// Creates the indexes of a relation if there are none yet.
    pub fn prepare<'a>(
        &mut self,
        relation: &Arc<Relation>,
        groups: impl Iterator<Item = (GroupId, &'a Subscription)>,
    ) {
        if self.relations.contains_key(&relation.id()) {
            return;
        }
        let mut subscriber_indexes = Vec::new();
        for (group, subscription) in groups {
            insert_group(&mut subscriber_indexes, relation, group, subscription);
        }
        self.relations.insert(relation.id(), subscriber_indexes);
    }

    /// Adds a group, or replaces its subscription.
    pub fn insert(
        &mut self,
        group: GroupId,
        subscription: &Subscription,
        relation: impl Fn(RelationId) -> Option<Arc<Relation>>,
    ) {
        self.insert_topic(group, subscription);
        for (id, subscriber_indexes) in &mut self.relations {
            if let Some(relation) = relation(*id) {
                insert_group(subscriber_indexes, &relation, group, subscription);
            }
        }
    }

    /// Removes a group. An empty index stays: PostgreSQL may keep a table for it.
    pub fn remove(&mut self, group: GroupId) {
        self.remove_topic(group);
        for subscriber_indexes in self.relations.values_mut() {
            for subscriber_index in subscriber_indexes.iter_mut() {
                subscriber_index.remove(group);
            }
        }
    }

    /// Returns the indexes of a relation, one per role.
    pub fn of(&self, relation: RelationId) -> &[SubscriberIndex] {
        self.relations.get(&relation).map_or(&[], Vec::as_slice)
    }
}

fn insert_group(
    subscriber_indexes: &mut Vec<SubscriberIndex>,
    relation: &Arc<Relation>,
    group: GroupId,
    subscription: &Subscription,
) {
    if subscription.concerning(relation).next().is_none() {
        return;
    }
    let role = subscription.identity().claims().role();
    let known = subscriber_indexes.iter().position(|subscriber_index| subscriber_index.role == role);
    let at = match known {
        Some(at) => at,
        None => match SubscriberIndex::new(relation, role) {
            Some(subscriber_index) => {
                subscriber_indexes.push(subscriber_index);
                subscriber_indexes.len() - 1
            }
            None => return,
        },
    };
    subscriber_indexes[at].insert(group, subscription);
}
