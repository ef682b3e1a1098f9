//! Authorization: finds the subscribers that a batch concerns, and what each may see of it.
//!
//! The index finds candidates by the values of a row; PostgreSQL finds others, for policies that lead to subscribers
//! through a table. Policies and filters are evaluated in memory where possible, else by PostgreSQL, once for all
//! subscribers that the policy cannot tell apart. Unknown means "no".

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::block_in_place;

use crate::feed::authorize::change_images::{ChangeOf, change_images};
use crate::feed::authorize::filter_cost::Client;
use crate::feed::authorize::filter_evaluator::{ChargedQuery, FilterEvaluator};
use crate::feed::authorize::matcher::Matcher;
use crate::feed::authorize::subscriber_index::{GroupId, SubscriberIndex, SubscriberIndexes};
use crate::model::catalog::relation::{Access, Catalog, Relation};
use crate::model::policy::visibility::{Denied, Identity, Visibility};
use crate::model::row::change::{Change, RelationId, Row};
use crate::model::row::truth::Truth;
use crate::model::subscription::binding::Subscription;
use crate::model::subscription::typed_filter::TypedFilter;
use crate::observe::Observe;
use crate::postgres::connect::pool::Error;
use crate::postgres::evaluate::per_identity::{
    IdentityAnswer as Answered, IdentityEvaluator, IdentityQuery, reading,
};
use crate::postgres::evaluate::set_based::{SetAnswer, SetEvaluator, SetQuery};

/// Authorizes batches.
pub struct Gate {
    evaluator: IdentityEvaluator,
    set_evaluator: SetEvaluator,
    /// Evaluates filters that cannot be decided in memory; without it, their changes are reported as a gap.
    filters: Option<FilterEvaluator>,
    observe: Arc<Observe>,
}

/// The verdict of a policy or filter on a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Which images may be seen.
    Visibility(Visibility),
    /// It cannot be decided any more, and why.
    Lost(&'static str),
}

/// A subscriber group as the gate sees it.
#[derive(Clone, Copy)]
pub struct GroupReader<'a> {
    /// Its subscription.
    pub subscription: &'a Subscription,
    /// One of its sessions.
    pub session: u64,
}

/// A change that may concern a group.
#[derive(Debug, Clone, Copy)]
pub struct Candidate {
    /// The group.
    pub group: GroupId,
    /// The relation that the group gets the change of: the watched one, or a partition.
    pub relation: RelationId,
    /// The change's position in the batch.
    pub change: usize,
    /// The position of the policy's evaluation; `None` for a change without images.
    pub(super) policy: Option<usize>,
}

impl Candidate {
    /// A group that follows the topic of the broadcast at this position.
    pub fn of_broadcast(group: GroupId, change: usize) -> Self {
        Self { group, relation: RelationId::MESSAGES, change, policy: None }
    }
}

/// The verdicts on a batch.
#[derive(Default)]
pub struct Verdicts {
    /// In order of the changes.
    pub candidates: Vec<Candidate>,
    pub(super) policies: Vec<Evaluation>,
    pub(super) filters: HashMap<FilterKey, Evaluation>,
    /// Images that PostgreSQL cannot parse.
    unreadable: HashSet<AnswerSlot>,
    /// Groups whose claims make the policy raise an error, and the relation.
    pub raising: Vec<(GroupId, RelationId)>,
    /// Statements run.
    pub statements: usize,
    /// Groups considered, summed over the changes.
    pub considered: usize,
}

/// The truth values of a policy or filter for the images before and after.
pub(super) type Evaluation = [Truth; 2];

/// A filter, the rights of a role, and a change: a role may not be allowed to evaluate a filter that another may.
/// Filters and rights are compared by address; both outlive the batch.
pub(super) type FilterKey = (usize, usize, usize);

/// A query for one policy or filter, and where its answers go.
pub(super) struct PendingQuery<'a> {
    pub(super) identity: &'a Identity,
    pub(super) statement: &'a Arc<str>,
    pub(super) relation: &'a Relation,
    pub(super) images: Vec<String>,
    pub(super) answers: Vec<AnswerSlot>,
    /// For a policy: the cohort that the answer applies to.
    pub(super) cohort: Option<(&'a SubscriberIndex, u64)>,
    pub(super) with_path: bool,
    /// The clients that chose the filter; empty for a policy.
    pub(super) clients: Vec<Client>,
}

/// One truth value of an evaluation: side 0 before, 1 after.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum AnswerSlot {
    Policy(usize, usize),
    Filter(FilterKey, usize),
}

const TOO_LONG: &str = "the policy or filter took too long, or a table that it reads is locked";
const FILTER_TOO_LONG: &str =
    "the filters of this client take more of the database's time than one client may";
const UNREADABLE: &str = "a value that the policy or filter reads cannot be read back from its image";
const COLUMNS_CHANGED: &str = "its columns changed while a change was on its way";

impl Gate {
    /// Creates a gate.
    pub fn new(
        evaluator: IdentityEvaluator,
        set_evaluator: SetEvaluator,
        filters: Option<FilterEvaluator>,
        observe: Arc<Observe>,
    ) -> Self {
        Self { evaluator, set_evaluator, filters, observe }
    }

    /// Discards prepared plans and cached tables after the catalog changed.
    pub async fn forget(&self) {
        self.evaluator.discard_plans().await;
        self.set_evaluator.forget().await;
        if let Some(filters) = &self.filters {
            filters.discard_plans().await;
        }
    }

    /// Finds the groups that `changes` concern, and what each may see.
    ///
    /// # Errors
    /// Only when PostgreSQL does not answer; nothing may be delivered then.
    pub async fn verdicts<'a>(
        &self,
        catalog: &'a Catalog,
        changes: &'a [Change],
        subscriber_indexes: &'a SubscriberIndexes,
        reader: impl Fn(GroupId) -> GroupReader<'a>,
    ) -> Result<Verdicts, Error> {
        let started = Instant::now();
        let (changes_of, images) = change_images(catalog, changes);
        let mut verdicts = Verdicts::default();
        let mut set_answers: HashMap<u64, Vec<Vec<SetAnswer>>> = HashMap::new();
        for (relation, images) in &images {
            for subscriber_index in subscriber_indexes.of(*relation) {
                let (answers, statements) = self.query_sets(subscriber_index, images).await?;
                verdicts.statements += statements;
                set_answers.insert(subscriber_index.number(), answers);
            }
        }
        let mut pending: Vec<PendingQuery<'a>> = Vec::new();
        self.run_blocking(|| {
            let mut matcher =
                Matcher { verdicts: &mut verdicts, pending: &mut pending, queries: HashMap::new() };
            for ChangeOf { index, relation, images } in &changes_of {
                for subscriber_index in subscriber_indexes.of(*relation) {
                    let set_answers =
                        set_answers.get(&subscriber_index.number()).map_or(&[][..], Vec::as_slice);
                    let change = (*index, &changes[*index]);
                    matcher.find(change, images.as_ref(), subscriber_index, set_answers, &reader);
                }
            }
        });
        drop(changes_of);
        self.run_pending(&mut verdicts, pending).await?;
        self.observe.judged(verdicts.statements);
        if verdicts.statements > 0 {
            self.observe.judging_took(started.elapsed());
        }
        Ok(verdicts)
    }

    /// Runs work that may take long, because clients may have thousands of filters, without blocking other tasks of
    /// this thread.
    fn run_blocking<T>(&self, work: impl FnOnce() -> T) -> T {
        let has_threads = Handle::current().runtime_flavor() == RuntimeFlavor::MultiThread;
        if self.filters.is_some() && has_threads { block_in_place(work) } else { work() }
    }

    /// Runs the set-based queries of a policy: one answer per query and image. Also returns the number of statements.
    async fn query_sets(
        &self,
        subscriber_index: &SubscriberIndex,
        images: &[&str],
    ) -> Result<(Vec<Vec<SetAnswer>>, usize), Error> {
        let Some(access) = subscriber_index.access() else { return Ok((Vec::new(), 0)) };
        let mut answers = Vec::with_capacity(access.plan.queries.len());
        let mut statements = 0;
        if access.plan.queries.is_empty() {
            return Ok((answers, statements));
        }
        let relation = subscriber_index.relation();
        let narrowed = |image: &&str| match Row::parse(image) {
            Ok(row) => relation.narrowed(&row, |name| relation.policy_reads(access, name)),
            Err(_) => (*image).to_owned(),
        };
        let images: Vec<String> = images.iter().map(narrowed).collect();
        for leaf in access.plan.queries.iter().enumerate() {
            let (relation, role) = (&**subscriber_index.relation(), subscriber_index.role());
            let reads_as = access.plan.reads_as.as_deref();
            let query =
                SetQuery { relation, role, reads_as, leaf, roster: subscriber_index, images: &images };
            let (set_answers, count) = self.set_evaluator.ask(&query).await?;
            for truth in [Truth::TimedOut, Truth::Error] {
                if set_answers.contains(&SetAnswer::Nothing(truth)) {
                    let denied = if truth == Truth::TimedOut { Denied::TimedOut } else { Denied::Raised };
                    self.observe.judgement_failed(denied, &relation.table);
                }
            }
            statements += count;
            answers.push(set_answers);
        }
        Ok((answers, statements))
    }

    /// Runs the pending queries and records their answers.
    async fn run_pending(
        &self,
        verdicts: &mut Verdicts,
        pending: Vec<PendingQuery<'_>>,
    ) -> Result<(), Error> {
        verdicts.statements += pending.len();
        let (policies, filters): (Vec<_>, Vec<_>) =
            pending.into_iter().partition(|pending| pending.clients.is_empty());
        let queries: Vec<IdentityQuery<'_>> = policies.iter().map(PendingQuery::query).collect();
        let answers = self.evaluator.judge(&queries).await?;
        self.record(verdicts, &policies, answers);
        let queries: Vec<ChargedQuery<'_>> = filters
            .iter()
            .map(|pending| ChargedQuery { query: pending.query(), clients: &pending.clients })
            .collect();
        let answers = match &self.filters {
            Some(evaluator) => Box::pin(evaluator.evaluate(&queries)).await?,
            None => filters.iter().map(|pending| Answered::none(&pending.images, Denied::TimedOut)).collect(),
        };
        self.record(verdicts, &filters, answers);
        Ok(())
    }

    fn record(&self, verdicts: &mut Verdicts, pending: &[PendingQuery<'_>], answers: Vec<Answered>) {
        for (pending, answer) in pending.iter().zip(answers) {
            if let Some(denied) = answer.denied {
                self.observe.judgement_failed(denied, &pending.relation.table);
            }
            if let (Some(Denied::Claims), Some((subscriber_index, cohort))) = (answer.denied, pending.cohort)
            {
                let relation = pending.relation.id();
                verdicts.raising.extend(subscriber_index.groups(cohort).map(|group| (group, relation)));
            }
            let is_timed_out = matches!(answer.denied, Some(Denied::TimedOut | Denied::Locked));
            for (number, (slot, allowed)) in pending.answers.iter().zip(answer.allowed).enumerate() {
                let is_unreadable = answer.unreadable.contains(&number);
                if is_unreadable {
                    verdicts.unreadable.insert(*slot);
                }
                let truth = if is_timed_out || is_unreadable { Truth::TimedOut } else { allowed.into() };
                match slot {
                    AnswerSlot::Policy(policy, side) => verdicts.policies[*policy][*side] = truth,
                    AnswerSlot::Filter(key, side) => {
                        if let Some(evaluation) = verdicts.filters.get_mut(key) {
                            evaluation[*side] = truth;
                        }
                    }
                }
            }
        }
    }
}

impl PendingQuery<'_> {
    fn query(&self) -> IdentityQuery<'_> {
        IdentityQuery {
            identity: self.identity.clone(),
            statement: Arc::clone(self.statement),
            images: &self.images,
            reading: reading(self.relation).into(),
            with_path: self.with_path,
            topic: None,
        }
    }
}

impl Verdicts {
    /// Returns what the candidate may see by the policy alone.
    pub fn policy(&self, candidate: &Candidate) -> Verdict {
        let Some(policy) = candidate.policy else { return Verdict::Lost(COLUMNS_CHANGED) };
        self.verdict(&self.policies[policy], |side| AnswerSlot::Policy(policy, side), TOO_LONG)
    }

    /// Returns which images of the candidate's change match the filter.
    pub fn filter(&self, candidate: &Candidate, access: &Access, filter: &Arc<TypedFilter>) -> Verdict {
        let key = filter_key(candidate.change, access, filter);
        let Some(evaluation) = self.filters.get(&key) else { return Verdict::Visibility(Visibility::NONE) };
        self.verdict(evaluation, |side| AnswerSlot::Filter(key, side), FILTER_TOO_LONG)
    }

    fn verdict(
        &self,
        evaluation: &Evaluation,
        answer: impl Fn(usize) -> AnswerSlot,
        too_long: &'static str,
    ) -> Verdict {
        if [0, 1].into_iter().any(|side| self.unreadable.contains(&answer(side))) {
            return Verdict::Lost(UNREADABLE);
        }
        if evaluation.contains(&Truth::TimedOut) {
            return Verdict::Lost(too_long);
        }
        Verdict::Visibility(Visibility {
            before: evaluation[0] == Truth::True,
            after: evaluation[1] == Truth::True,
        })
    }
}

pub(super) fn filter_key(change: usize, access: &Access, filter: &Arc<TypedFilter>) -> FilterKey {
    (Arc::as_ptr(filter).addr(), std::ptr::from_ref(access).addr(), change)
}
