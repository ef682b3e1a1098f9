//! Who reads a relation with one role: grouped by what the policy reads of their claims, and found by the values of a row.

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
use crate::postgres::evaluate::set_based::SubscriberSet;

/// The number of an audience in the router.
pub type GroupId = usize;

/// Readers of one relation who have one role.
pub struct SubscriberIndex {
    id: u64,
    relation: Arc<Relation>,
    role: String,
    /// By numbers that grow and never come again.
    cohorts: BTreeMap<u64, PolicyCohort>,
    by_key: HashMap<Arc<CohortKey>, u64>,
    last: Option<u64>,
    seats: HashMap<GroupId, CohortEntry>,
    index: SubscriptionIndex<GroupId>,
}

/// Readers of whom the policy says the same.
pub struct PolicyCohort {
    /// One of them; to the policy they are all alike.
    pub identity: Identity,
    key: Arc<CohortKey>,
    /// The claims make the policy raise: nothing is shown.
    raises: bool,
    seats: BTreeSet<GroupId>,
    /// Those whom PostgreSQL names.
    named: BTreeSet<GroupId>,
}

/// What readers have in common when the policy cannot tell them apart.
#[derive(PartialEq, Eq, Hash)]
struct CohortKey {
    terms: Vec<ClaimValue>,
    /// The policy may read more than the terms, or only PostgreSQL knows what they come to.
    identity: Option<Identity>,
}

struct CohortEntry {
    cohort: u64,
    anchors: IndexKeys,
}

impl SubscriberIndex {
    /// Nobody yet. None when the role may not read the relation.
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
            seats: HashMap::new(),
            index: SubscriptionIndex::default(),
        })
    }

    /// A number of its own.
    pub fn number(&self) -> u64 {
        self.id
    }

    /// The relation that is read.
    pub fn relation(&self) -> &Arc<Relation> {
        &self.relation
    }

    /// The role that reads.
    pub fn role(&self) -> &str {
        &self.role
    }

    /// What the role may see; there is such a thing, or there were no readership.
    pub fn access(&self) -> Option<&Access> {
        self.relation.access(&self.role)
    }

    /// A group by its number.
    pub fn cohort(&self, number: u64) -> Option<&PolicyCohort> {
        self.cohorts.get(&number)
    }

    /// Whether the claims of a group make the policy raise, as far as that is known without PostgreSQL.
    pub fn raises(&self, cohort: u64) -> bool {
        self.cohorts.get(&cohort).is_some_and(|cohort| cohort.raises)
    }

    /// The audiences of a group.
    pub fn groups(&self, cohort: u64) -> impl Iterator<Item = GroupId> {
        self.cohorts.get(&cohort).into_iter().flat_map(|cohort| cohort.seats.iter().copied())
    }

    /// The group of an audience.
    pub fn cohort_of(&self, group: GroupId) -> Option<u64> {
        self.seats.get(&group).map(|seat| seat.cohort)
    }

    /// All audiences.
    pub fn everybody(&self) -> impl Iterator<Item = GroupId> {
        self.seats.keys().copied()
    }

    /// All audiences that stand under what PostgreSQL names.
    pub fn all_named(&self) -> impl Iterator<Item = GroupId> {
        self.cohorts.values().flat_map(|cohort| cohort.named.iter().copied())
    }

    /// The audiences of a group that stand under what PostgreSQL names.
    pub fn named(&self, cohort: u64) -> impl Iterator<Item = GroupId> {
        self.cohorts.get(&cohort).into_iter().flat_map(|cohort| cohort.named.iter().copied())
    }

    /// Calls `found` for each audience that the image may concern by its values, some more than once.
    pub fn look_up(&self, image: &Image<'_>, found: impl FnMut(GroupId)) {
        self.index.look_up(image, found);
    }

    /// What the policy says of an image to a group.
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

    fn seat(&mut self, group: GroupId, subscription: &Subscription) {
        let relation = Arc::clone(&self.relation);
        let Some(access) = relation.access(&self.role) else { return };
        self.unseat(group);
        let number = self.grouped(&access.plan, subscription.identity());
        let Some(cohort) = self.cohorts.get_mut(&number) else { return };
        let anchors = match cohort.raises {
            true => IndexKeys::Any,
            false => access.plan.predicate.index_keys(&cohort.key.terms),
        };
        let anchors = anchors.and(wanted(subscription, &relation, access));
        cohort.seats.insert(group);
        match &anchors {
            IndexKeys::Any => self.index.insert(None, group),
            IndexKeys::OneOf(anchors) => {
                for anchor in anchors {
                    if anchor.named {
                        cohort.named.insert(group);
                    } else {
                        self.index.insert(Some(anchor), group);
                    }
                }
            }
        }
        self.seats.insert(group, CohortEntry { cohort: number, anchors });
    }

    /// The group of an identity.
    fn grouped(&mut self, plan: &Plan, identity: &Identity) -> u64 {
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
            PolicyCohort { identity, key, raises, seats: BTreeSet::new(), named: BTreeSet::new() },
        );
        self.last = Some(number);
        number
    }

    fn unseat(&mut self, group: GroupId) {
        let Some(seat) = self.seats.remove(&group) else { return };
        match &seat.anchors {
            IndexKeys::Any => self.index.remove(None, group),
            IndexKeys::OneOf(anchors) => {
                anchors.iter().filter(|anchor| !anchor.named).for_each(|anchor: &IndexKey| {
                    self.index.remove(Some(anchor), group);
                });
            }
        }
        if let Some(cohort) = self.cohorts.get_mut(&seat.cohort) {
            cohort.seats.remove(&group);
            cohort.named.remove(&group);
            if cohort.seats.is_empty() {
                self.by_key.remove(&cohort.key);
                self.cohorts.remove(&seat.cohort);
            }
        }
    }
}

/// What a row must have for one of the subscription's filters to match.
fn wanted(subscription: &Subscription, relation: &Relation, access: &Access) -> IndexKeys {
    let mut wanted = IndexKeys::OneOf(Vec::new());
    for binding in subscription.concerning(relation) {
        let one = match &binding.filter {
            None => IndexKeys::Any,
            Some(filter) if filter.is_usable(relation, access) => filter.index_keys(),
            Some(_) => continue,
        };
        wanted = wanted.or(one);
    }
    wanted
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

/// The readerships of all relations that changed so far.
#[derive(Default)]
pub struct SubscriberIndexes(HashMap<RelationId, Vec<SubscriberIndex>>);

impl SubscriberIndexes {
    /// Forgets all of them: the rules are others now.
    pub fn forget(&mut self) {
        self.0.clear();
    }

    /// Makes those of a relation if there are none yet.
    pub fn prepare<'a>(
        &mut self,
        relation: &Arc<Relation>,
        groups: impl Iterator<Item = (GroupId, &'a Subscription)>,
    ) {
        if self.0.contains_key(&relation.id()) {
            return;
        }
        let mut subscriber_indexes = Vec::new();
        for (group, subscription) in groups {
            take_seat(&mut subscriber_indexes, relation, group, subscription);
        }
        self.0.insert(relation.id(), subscriber_indexes);
    }

    /// An audience came, or has another subscription.
    pub fn join(
        &mut self,
        group: GroupId,
        subscription: &Subscription,
        relation: impl Fn(RelationId) -> Option<Arc<Relation>>,
    ) {
        for (id, subscriber_indexes) in &mut self.0 {
            if let Some(relation) = relation(*id) {
                take_seat(subscriber_indexes, &relation, group, subscription);
            }
        }
    }

    /// An audience went. A readership that nobody is left of stays: PostgreSQL may keep a table for it.
    pub fn leave(&mut self, group: GroupId) {
        for subscriber_indexes in self.0.values_mut() {
            for subscriber_index in subscriber_indexes.iter_mut() {
                subscriber_index.unseat(group);
            }
        }
    }

    /// Those of a relation, a role each.
    pub fn of(&self, relation: RelationId) -> &[SubscriberIndex] {
        self.0.get(&relation).map_or(&[], Vec::as_slice)
    }
}

fn take_seat(
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
    subscriber_indexes[at].seat(group, subscription);
}
