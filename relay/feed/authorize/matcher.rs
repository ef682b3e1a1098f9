//! Finds the groups that a change may concern, evaluates policies and filters in memory where possible, and collects
//! queries for PostgreSQL.

use std::collections::HashMap;
use std::sync::Arc;

use crate::feed::authorize::change_images::{ChangeImages, ImageColumns};
use crate::feed::authorize::filter_cost::Client;
use crate::feed::authorize::gate::{AnswerSlot, Candidate, PendingQuery, Reader, Verdicts, filter_key};
use crate::feed::authorize::subscriber_index::{GroupId, SubscriberIndex};
use crate::model::catalog::relation::{Access, Relation};
use crate::model::policy::predicate::Answers;
use crate::model::policy::visibility::Identity;
use crate::model::row::change::{Change, Operation};
use crate::model::row::truth::Truth;
use crate::model::subscription::typed_filter::TypedFilter;
use crate::postgres::evaluate::set_based::SetAnswer;

/// Finds the candidates of one change after another.
pub(super) struct Matcher<'v, 'a> {
    pub(super) verdicts: &'v mut Verdicts,
    pub(super) asked: &'v mut Vec<PendingQuery<'a>>,
    /// The position of each rule's pending query.
    pub(super) questions: HashMap<Rule, usize>,
}

/// Clients that pay for a filter: beyond this many, the share of each is negligible.
const MOST_PAYERS: usize = 16;

/// A policy or filter whose images are evaluated by one query.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Rule {
    /// The policy of a subscriber index, for one cohort.
    Policy(u64, u64),
    /// A filter, for a role: by their addresses, as in a [`FilterKey`](crate::feed::authorize::gate::FilterKey).
    Filter(usize, usize),
}

/// The set-based answers for one image and one cohort.
struct EventMatch<'s> {
    said: &'s [Vec<SetAnswer>],
    slot: usize,
    cohort: u64,
    /// The image is missing a column that the policy reads.
    lacks: bool,
}

impl Answers for EventMatch<'_> {
    fn fact(&self, leaf: usize) -> Truth {
        match self.said.get(leaf).and_then(|said| said.get(self.slot)) {
            _ if self.lacks => Truth::Error,
            Some(SetAnswer::Fact(truth) | SetAnswer::Nothing(truth)) => *truth,
            Some(SetAnswer::Readers(_)) | None => Truth::Undecided,
        }
    }

    fn reads(&self, leaf: usize) -> Truth {
        match self.said.get(leaf).and_then(|said| said.get(self.slot)) {
            _ if self.lacks => Truth::Error,
            Some(SetAnswer::Readers(readers)) => readers.binary_search(&self.cohort).is_ok().into(),
            Some(SetAnswer::Nothing(truth)) => *truth,
            Some(SetAnswer::Fact(_)) | None => Truth::Undecided,
        }
    }
}

/// One change, evaluated for one subscriber index.
struct MatchContext<'s, 'a> {
    index: usize,
    place: &'s ChangeImages<'a>,
    subscriber_index: &'a SubscriberIndex,
    access: &'a Access,
    /// The set-based answers, by query and image.
    said: &'s [Vec<SetAnswer>],
    /// An image is missing a column that the policy reads.
    lacks: bool,
}

impl<'a> Matcher<'_, 'a> {
    /// Adds the candidates of a subscriber index for the change at `index`.
    pub(super) fn find(
        &mut self,
        (index, change): (usize, &Change),
        place: Option<&ChangeImages<'a>>,
        subscriber_index: &'a SubscriberIndex,
        said: &[Vec<SetAnswer>],
        reader: &impl Fn(GroupId) -> Reader<'a>,
    ) {
        let Some(access) = subscriber_index.access() else { return };
        let reads_policy = |column: &str| subscriber_index.relation().policy_reads(access, column);
        let is_told = |place: &&ChangeImages<'_>| match &place.layout {
            ImageColumns::Other => false,
            ImageColumns::Partial(_) => !place.lacks(reads_policy),
            ImageColumns::Same | ImageColumns::Lacking(_) => true,
        };
        let told = |group| Candidate { group, change: index, policy: None };
        let Some(place) = place.filter(is_told) else {
            // A truncation, or an altered relation: it concerns every group.
            if change.operation != Operation::Schema {
                self.verdicts.candidates.extend(subscriber_index.everybody().map(told));
            }
            return;
        };
        let lacks = place.lacks(reads_policy);
        let scene = MatchContext { index, place, subscriber_index, access, said, lacks };
        let mut found = scene.concerned();
        if matches!(place.layout, ImageColumns::Partial(_)) {
            // A filter that reads an added column cannot be decided either.
            let cannot_tell = |group: &GroupId| {
                let mut bindings = reader(*group).subscription.concerning(subscriber_index.relation());
                bindings.any(|binding| {
                    binding.filter.as_ref().is_some_and(|filter| {
                        place.lacks(|column| filter.columns().any(|read| read == column))
                    })
                })
            };
            let lost: Vec<GroupId> = subscriber_index.everybody().filter(cannot_tell).collect();
            found.retain(|group| !lost.contains(group));
            self.verdicts.candidates.extend(lost.into_iter().map(told));
        }
        found.sort_unstable();
        found.dedup();
        self.verdicts.considered += found.len();
        // Consecutive groups usually are of one cohort.
        let mut last: Option<(u64, usize)> = None;
        let mut known: HashMap<u64, usize> = HashMap::new();
        for group in found {
            let Some(cohort) = subscriber_index.cohort_of(group) else { continue };
            let policy = match last {
                Some((same, policy)) if same == cohort => policy,
                _ => *known.entry(cohort).or_insert_with(|| self.rule(&scene, cohort)),
            };
            last = Some((cohort, policy));
            if subscriber_index.raises(cohort) {
                self.verdicts.raising.push((group, index));
            }
            if self.verdicts.policies[policy].iter().all(|truth| is_no(*truth)) {
                continue;
            }
            let reader = reader(group);
            let mut may_match = false;
            for binding in reader.subscription.concerning(subscriber_index.relation()) {
                may_match |= match &binding.filter {
                    None => true,
                    Some(filter) => {
                        filter.is_usable(subscriber_index.relation(), access)
                            && self.filter(&scene, filter, reader)
                    }
                };
            }
            if !may_match {
                continue;
            }
            self.verdicts.candidates.push(Candidate { group, change: index, policy: Some(policy) });
        }
    }

    /// Evaluates the policy for a cohort, or queues it for PostgreSQL. Returns the position of the evaluation.
    fn rule(&mut self, scene: &MatchContext<'_, 'a>, cohort: u64) -> usize {
        let &MatchContext { subscriber_index, access, said, lacks, .. } = scene;
        let number = self.verdicts.policies.len();
        let mut ruling = [Truth::False; 2];
        for (side, truth) in ruling.iter_mut().enumerate() {
            let Some((image, slot)) = scene.place.image(side) else { continue };
            *truth = subscriber_index.truth(cohort, image, &EventMatch { said, slot, cohort, lacks });
            if *truth != Truth::Undecided {
                continue;
            }
            let whom = subscriber_index.cohort(cohort).map(|cohort| &cohort.identity);
            match (&access.judge, whom) {
                (Some(statement), Some(identity)) if !lacks => {
                    let rule = Rule::Policy(subscriber_index.number(), cohort);
                    let answer = AnswerSlot::Policy(number, side);
                    let cohort = Some((scene.index, subscriber_index, cohort));
                    self.question(
                        rule,
                        cohort,
                        subscriber_index.relation(),
                        identity,
                        statement,
                        (scene.relation().narrowed(image.row(), |name| scene.policy_reads(name)), answer),
                    );
                }
                _ => *truth = Truth::Error,
            }
        }
        self.verdicts.policies.push(ruling);
        number
    }

    /// Evaluates a filter, or queues it for PostgreSQL. Returns whether the change may match.
    fn filter(
        &mut self,
        scene: &MatchContext<'_, 'a>,
        filter: &'a Arc<TypedFilter>,
        reader: Reader<'a>,
    ) -> bool {
        let identity = reader.subscription.identity();
        let key = filter_key(scene.index, scene.access, filter);
        let rule = Rule::Filter(key.0, key.1);
        if let Some(known) = self.verdicts.filters.get(&key) {
            let may_match = !known.iter().all(|truth| is_no(*truth));
            self.is_paid_by(rule, reader);
            return may_match;
        }
        let reads = |column: &str| filter.columns().any(|read| read == column);
        let lacks = scene.place.lacks(reads);
        let mut ruling = [Truth::False; 2];
        for (side, truth) in ruling.iter_mut().enumerate() {
            let Some((image, _)) = scene.place.image(side) else { continue };
            *truth = if lacks { Truth::Error } else { filter.truth(image) };
            if *truth == Truth::Undecided {
                let (relation, answer) = (scene.subscriber_index.relation(), AnswerSlot::Filter(key, side));
                self.question(
                    rule,
                    None,
                    relation,
                    identity,
                    &filter.statement,
                    (relation.narrowed(image.row(), reads), answer),
                );
            }
        }
        self.verdicts.filters.insert(key, ruling);
        self.is_paid_by(rule, reader);
        !ruling.iter().all(|truth| is_no(*truth))
    }

    /// Adds the reader's client to those that pay for a pending filter query.
    fn is_paid_by(&mut self, rule: Rule, reader: Reader<'_>) {
        if let Some(number) = self.questions.get(&rule) {
            let client = Client::of(reader.subscription.identity(), reader.session);
            let clients = &mut self.asked[*number].clients;
            if clients.len() < MOST_PAYERS && !clients.contains(&client) {
                clients.push(client);
            }
        }
    }

    fn question(
        &mut self,
        rule: Rule,
        cohort: Option<(usize, &'a SubscriberIndex, u64)>,
        relation: &'a Relation,
        identity: &'a Identity,
        statement: &'a Arc<str>,
        (image, answer): (String, AnswerSlot),
    ) {
        let number = *self.questions.entry(rule).or_insert_with(|| {
            let (images, answers) = (Vec::new(), Vec::new());
            // A filter calls no functions of users; a policy may.
            let with_path = matches!(rule, Rule::Policy(..)) && needs_path(relation, identity);
            let clients = Vec::new();
            self.asked.push(PendingQuery {
                identity,
                statement,
                relation,
                images,
                answers,
                cohort,
                with_path,
                clients,
            });
            self.asked.len() - 1
        });
        self.asked[number].images.push(image);
        self.asked[number].answers.push(answer);
    }
}

impl<'a> MatchContext<'_, 'a> {
    fn relation(&self) -> &'a Relation {
        self.subscriber_index.relation()
    }

    fn policy_reads(&self, column: &str) -> bool {
        self.relation().policy_reads(self.access, column)
    }

    /// Returns the groups found by the index and by PostgreSQL, possibly with duplicates.
    fn concerned(&self) -> Vec<GroupId> {
        let mut found = Vec::new();
        for (image, slot) in (0..2).filter_map(|side| self.place.image(side)) {
            self.subscriber_index.look_up(image, |group| found.push(group));
            for said in self.said {
                match said.get(slot) {
                    Some(SetAnswer::Readers(cohorts)) => {
                        found.extend(cohorts.iter().flat_map(|cohort| self.subscriber_index.named(*cohort)));
                    }
                    Some(SetAnswer::Nothing(Truth::TimedOut | Truth::Undecided)) => {
                        found.extend(self.subscriber_index.all_named());
                    }
                    _ => {}
                }
            }
        }
        found
    }
}

/// Returns whether the policy calls functions of users or may contain their SQL, so that it needs their
/// `search_path`.
fn needs_path(relation: &Relation, identity: &Identity) -> bool {
    let access = relation.access(identity.claims().role());
    matches!(relation.kind.as_str(), "m" | "f")
        || access.is_none_or(|access| access.rights.calls_user_functions)
}

fn is_no(truth: Truth) -> bool {
    matches!(truth, Truth::False | Truth::Null | Truth::Error)
}
