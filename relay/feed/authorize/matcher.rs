//! Finds the groups that a change may concern, evaluates policies and filters in memory where possible, and collects
//! queries for PostgreSQL.

use std::collections::HashMap;
use std::sync::Arc;

use crate::feed::authorize::change_images::{ChangeImages, ImageColumns};
use crate::feed::authorize::filter_cost::Client;
use crate::feed::authorize::gate::{AnswerSlot, Candidate, GroupReader, PendingQuery, Verdicts, filter_key};
use crate::feed::authorize::subscriber_index::{GroupId, SubscriberIndex};
use crate::model::catalog::relation::{Access, Relation};
use crate::model::policy::predicate::Answers;
use crate::model::policy::visibility::Identity;
use crate::model::row::change::{Change, Operation};
use crate::model::row::truth::Truth;
use crate::model::subscription::binding::Subscription;
use crate::model::subscription::typed_filter::TypedFilter;
use crate::postgres::evaluate::set_based::SetAnswer;

/// Finds the candidates of one change after another.
pub(super) struct Matcher<'v, 'a> {
    pub(super) verdicts: &'v mut Verdicts,
    pub(super) pending: &'v mut Vec<PendingQuery<'a>>,
    /// The position of each rule's pending query.
    pub(super) queries: HashMap<Rule, usize>,
}

/// Clients that pay for a filter: beyond this many, the share of each is negligible.
const MAX_PAYERS: usize = 16;

/// A policy or filter whose images are evaluated by one query.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Rule {
    /// The policy of a subscriber index, for one cohort.
    Policy(u64, u64),
    /// A filter, for a role: by their addresses, as in a [`FilterKey`](crate::feed::authorize::gate::FilterKey).
    Filter(usize, usize),
}

/// The set-based answers for one image and one cohort.
struct CohortAnswers<'s> {
    set_answers: &'s [Vec<SetAnswer>],
    slot: usize,
    cohort: u64,
    /// The image is missing a column that the policy reads.
    is_incomplete: bool,
}

impl Answers for CohortAnswers<'_> {
    fn fact(&self, leaf: usize) -> Truth {
        match self.set_answers.get(leaf).and_then(|set_answers| set_answers.get(self.slot)) {
            _ if self.is_incomplete => Truth::Error,
            Some(SetAnswer::Fact(truth) | SetAnswer::Nothing(truth)) => *truth,
            Some(SetAnswer::Readers(_)) | None => Truth::Undecided,
        }
    }

    fn reads(&self, leaf: usize) -> Truth {
        match self.set_answers.get(leaf).and_then(|set_answers| set_answers.get(self.slot)) {
            _ if self.is_incomplete => Truth::Error,
            Some(SetAnswer::Readers(readers)) => readers.binary_search(&self.cohort).is_ok().into(),
            Some(SetAnswer::Nothing(truth)) => *truth,
            Some(SetAnswer::Fact(_)) | None => Truth::Undecided,
        }
    }
}

/// One change, evaluated for one subscriber index.
struct MatchContext<'s, 'a> {
    index: usize,
    images: &'s ChangeImages<'a>,
    subscriber_index: &'a SubscriberIndex,
    access: &'a Access,
    /// The set-based answers, by query and image.
    set_answers: &'s [Vec<SetAnswer>],
    /// An image is missing a column that the policy reads.
    is_incomplete: bool,
}

impl<'a> Matcher<'_, 'a> {
    /// Adds the candidates of a subscriber index for the change at `index`.
    pub(super) fn find(
        &mut self,
        (index, change): (usize, &Change),
        images: Option<&ChangeImages<'a>>,
        subscriber_index: &'a SubscriberIndex,
        set_answers: &[Vec<SetAnswer>],
        reader: &impl Fn(GroupId) -> GroupReader<'a>,
    ) {
        let Some(access) = subscriber_index.access() else { return };
        let reads_policy = |column: &str| subscriber_index.relation().policy_reads(access, column);
        let is_readable = |images: &&ChangeImages<'_>| match &images.layout {
            ImageColumns::Other => false,
            ImageColumns::Partial(_) => !images.is_missing(reads_policy),
            ImageColumns::Same | ImageColumns::Oversize(_) => true,
        };
        let Some(images) = images.filter(is_readable) else {
            // A truncation, or an altered relation: it concerns every group.
            if change.operation != Operation::Schema {
                let relation = subscriber_index.relation().id();
                let unevaluated = |group| Candidate { group, relation, change: index, policy: None };
                self.verdicts.candidates.extend(subscriber_index.all_groups().map(unevaluated));
            }
            return;
        };
        let is_incomplete = images.is_missing(reads_policy);
        let context = MatchContext { index, images, subscriber_index, access, set_answers, is_incomplete };
        self.find_by_policy(&context, reader);
    }

    /// Adds the groups that the index finds, and whose policy and filters do not exclude them. The policy is evaluated once for each
    /// cohort.
    fn find_by_policy(
        &mut self,
        context: &MatchContext<'_, 'a>,
        reader: &impl Fn(GroupId) -> GroupReader<'a>,
    ) {
        let MatchContext { index, images, subscriber_index, .. } = *context;
        let relation = subscriber_index.relation().id();
        let mut found = context.find_groups();
        if matches!(images.layout, ImageColumns::Partial(_)) {
            let is_lost = |group: &GroupId| context.has_undecidable_filter(reader(*group).subscription);
            let lost: Vec<GroupId> = subscriber_index.all_groups().filter(is_lost).collect();
            found.retain(|group| !lost.contains(group));
            let unevaluated = |group| Candidate { group, relation, change: index, policy: None };
            self.verdicts.candidates.extend(lost.into_iter().map(unevaluated));
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
                _ => *known.entry(cohort).or_insert_with(|| self.evaluate_policy(context, cohort)),
            };
            last = Some((cohort, policy));
            if subscriber_index.raises(cohort) {
                self.verdicts.raising.push((group, relation));
            }
            if self.verdicts.policies[policy].iter().all(|truth| is_denied(*truth)) {
                continue;
            }
            if self.may_match(context, reader(group)) {
                self.verdicts.candidates.push(Candidate {
                    group,
                    relation,
                    change: index,
                    policy: Some(policy),
                });
            }
        }
    }

    /// Returns whether the change may match a binding of the reader. Evaluates all of its filters, or queues them.
    fn may_match(&mut self, context: &MatchContext<'_, 'a>, reader: GroupReader<'a>) -> bool {
        let mut may_match = false;
        for binding in reader.subscription.concerning(context.relation()) {
            may_match |= match &binding.filter {
                None => true,
                Some(filter) => {
                    filter.is_usable(context.relation(), context.access)
                        && self.filter_may_match(context, filter, reader)
                }
            };
        }
        may_match
    }

    /// Evaluates the policy for a cohort, or queues it for PostgreSQL. Returns the position of the evaluation.
    fn evaluate_policy(&mut self, context: &MatchContext<'_, 'a>, cohort: u64) -> usize {
        let &MatchContext { subscriber_index, access, set_answers, is_incomplete, .. } = context;
        let number = self.verdicts.policies.len();
        let mut evaluation = [Truth::False; 2];
        for (side, truth) in evaluation.iter_mut().enumerate() {
            let Some((image, slot)) = context.images.image(side) else { continue };
            *truth = subscriber_index.truth(
                cohort,
                image,
                &CohortAnswers { set_answers, slot, cohort, is_incomplete },
            );
            if *truth != Truth::Undecided {
                continue;
            }
            let representative = subscriber_index.cohort(cohort).map(|cohort| &cohort.identity);
            match (&access.judge, representative) {
                (Some(statement), Some(identity)) if !is_incomplete => {
                    let rule = Rule::Policy(subscriber_index.number(), cohort);
                    let answer = AnswerSlot::Policy(number, side);
                    let cohort = Some((subscriber_index, cohort));
                    self.add_query(
                        rule,
                        cohort,
                        subscriber_index.relation(),
                        identity,
                        statement,
                        (context.relation().narrowed(image.row(), |name| context.policy_reads(name)), answer),
                    );
                }
                _ => *truth = Truth::Error,
            }
        }
        self.verdicts.policies.push(evaluation);
        number
    }

    /// Evaluates a filter, or queues it for PostgreSQL. Returns whether the change may match.
    fn filter_may_match(
        &mut self,
        context: &MatchContext<'_, 'a>,
        filter: &'a Arc<TypedFilter>,
        reader: GroupReader<'a>,
    ) -> bool {
        let identity = reader.subscription.identity();
        let key = filter_key(context.index, context.access, filter);
        let rule = Rule::Filter(key.0, key.1);
        if let Some(known) = self.verdicts.filters.get(&key) {
            let may_match = !known.iter().all(|truth| is_denied(*truth));
            self.add_payer(rule, reader);
            return may_match;
        }
        let reads = |column: &str| filter.columns().any(|read| read == column);
        let is_incomplete = context.images.is_missing(reads);
        let mut evaluation = [Truth::False; 2];
        for (side, truth) in evaluation.iter_mut().enumerate() {
            let Some((image, _)) = context.images.image(side) else { continue };
            *truth = if is_incomplete { Truth::Error } else { filter.truth(image) };
            if *truth == Truth::Undecided {
                let (relation, answer) = (context.subscriber_index.relation(), AnswerSlot::Filter(key, side));
                self.add_query(
                    rule,
                    None,
                    relation,
                    identity,
                    &filter.statement,
                    (relation.narrowed(image.row(), reads), answer),
                );
            }
        }
        self.verdicts.filters.insert(key, evaluation);
        self.add_payer(rule, reader);
        !evaluation.iter().all(|truth| is_denied(*truth))
    }

    /// Adds the reader's client to those that pay for a pending filter query.
    fn add_payer(&mut self, rule: Rule, reader: GroupReader<'_>) {
        if let Some(number) = self.queries.get(&rule) {
            let client = Client::of(reader.subscription.identity(), reader.session);
            let clients = &mut self.pending[*number].clients;
            if clients.len() < MAX_PAYERS && !clients.contains(&client) {
                clients.push(client);
            }
        }
    }

    fn add_query(
        &mut self,
        rule: Rule,
        cohort: Option<(&'a SubscriberIndex, u64)>,
        relation: &'a Relation,
        identity: &'a Identity,
        statement: &'a Arc<str>,
        (image, answer): (String, AnswerSlot),
    ) {
        let number = *self.queries.entry(rule).or_insert_with(|| {
            let (images, answers) = (Vec::new(), Vec::new());
            // A filter calls no functions of users; a policy may.
            let with_path = matches!(rule, Rule::Policy(..)) && needs_path(relation, identity);
            let clients = Vec::new();
            self.pending.push(PendingQuery {
                identity,
                statement,
                relation,
                images,
                answers,
                cohort,
                with_path,
                clients,
            });
            self.pending.len() - 1
        });
        self.pending[number].images.push(image);
        self.pending[number].answers.push(answer);
    }
}

impl<'a> MatchContext<'_, 'a> {
    fn relation(&self) -> &'a Relation {
        self.subscriber_index.relation()
    }

    fn policy_reads(&self, column: &str) -> bool {
        self.relation().policy_reads(self.access, column)
    }

    /// Returns whether a filter of the subscription reads a column that an image is missing.
    fn has_undecidable_filter(&self, subscription: &Subscription) -> bool {
        let is_undecidable = |filter: &TypedFilter| {
            self.images.is_missing(|column| filter.columns().any(|read| read == column))
        };
        let mut bindings = subscription.concerning(self.relation());
        bindings.any(|binding| binding.filter.as_deref().is_some_and(is_undecidable))
    }

    /// Returns the groups found by the index and by PostgreSQL, possibly with duplicates.
    fn find_groups(&self) -> Vec<GroupId> {
        let mut found = Vec::new();
        for (image, slot) in (0..2).filter_map(|side| self.images.image(side)) {
            self.subscriber_index.look_up(image, |group| found.push(group));
            for set_answers in self.set_answers {
                match set_answers.get(slot) {
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

fn is_denied(truth: Truth) -> bool {
    matches!(truth, Truth::False | Truth::Null | Truth::Error)
}
