//! Who may see what: for one part of the changelog, whom it concerns and what of it each may see.
//!
//! The index names candidates by the values of a row, PostgreSQL names others for policies that lead to readers by a table. What
//! can be told of a candidate here is; what cannot is asked, once for all whom the rule cannot tell apart. Unknown means "no".

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::block_in_place;

use crate::feed::authorize::change_images::places;
use crate::feed::authorize::filter_cost::Client;
use crate::feed::authorize::filter_evaluator::{ChargedQuery, FilterEvaluator};
use crate::feed::authorize::matcher::Matcher;
use crate::feed::authorize::subscriber_index::{GroupId, SubscriberIndex, SubscriberIndexes};
use crate::model::catalog::relation::{Access, Catalog, Relation};
use crate::model::policy::visibility::{Denied, Identity, Visibility};
use crate::model::row::change::{Change, Row};
use crate::model::row::truth::Truth;
use crate::model::subscription::binding::Subscription;
use crate::model::subscription::typed_filter::TypedFilter;
use crate::observe::Observe;
use crate::postgres::connect::pool::Error;
use crate::postgres::evaluate::per_identity::{
    IdentityAnswer as Answered, IdentityEvaluator, IdentityQuery, reading,
};
use crate::postgres::evaluate::set_based::{SetAnswer, SetEvaluator, SetQuery};

/// Asks and remembers for the length of one part.
pub struct Gate {
    judge: IdentityEvaluator,
    set_evaluator: SetEvaluator,
    /// For filters that are not decided here; without it these are lost.
    filters: Option<FilterEvaluator>,
    observe: Arc<Observe>,
}

/// What a rule says of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Which images may be seen.
    Visibility(Visibility),
    /// That cannot be told any more, and never will be; the text says why.
    Lost(&'static str),
}

/// An audience as the gate knows it.
#[derive(Clone, Copy)]
pub struct Reader<'a> {
    /// What it is subscribed to.
    pub subscription: &'a Subscription,
    /// One of the sessions that it is of.
    pub session: u64,
}

/// A change that may concern an audience.
#[derive(Debug, Clone, Copy)]
pub struct Candidate {
    /// Whom.
    pub group: GroupId,
    /// Which change of the part.
    pub change: usize,
    /// What the policy says of it; none for a change without images.
    pub(super) policy: Option<usize>,
}

/// What was found out about a part.
#[derive(Default)]
pub struct Verdicts {
    /// In order of the changes.
    pub candidates: Vec<Candidate>,
    pub(super) policies: Vec<Evaluation>,
    pub(super) filters: HashMap<FilterKey, Evaluation>,
    /// Of these sides PostgreSQL cannot read the image back.
    unreadable: HashSet<AnswerSlot>,
    /// Audiences whose claims make the policy raise, and the change about which that was found out.
    pub raising: Vec<(GroupId, usize)>,
    /// Statements asked of PostgreSQL.
    pub statements: usize,
    /// Audiences that were looked at, change by change.
    pub considered: usize,
}

/// What a rule says of the images before and after.
pub(super) type Evaluation = [Truth; 2];

/// A filter, for a role: what one role may not evaluate, another may. Filters and rights are told apart by address:
/// both outlive the part that is being judged. Then the change.
pub(super) type FilterKey = (usize, usize, usize);

/// What one rule is asked, and where its answers go.
pub(super) struct PendingQuery<'a> {
    pub(super) identity: &'a Identity,
    pub(super) statement: &'a Arc<str>,
    pub(super) relation: &'a Relation,
    pub(super) images: Vec<String>,
    pub(super) answers: Vec<AnswerSlot>,
    /// Of a policy: the change about which it is asked first, and who is judged by the answer.
    pub(super) cohort: Option<(usize, &'a SubscriberIndex, u64)>,
    pub(super) with_path: bool,
    /// Who chose it; nobody did when it is a policy.
    pub(super) clients: Vec<Client>,
}

/// A side of a ruling, 0 before and 1 after.
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
    /// Asks by these.
    pub fn new(
        judge: IdentityEvaluator,
        set_evaluator: SetEvaluator,
        filters: Option<FilterEvaluator>,
        observe: Arc<Observe>,
    ) -> Self {
        Self { judge, set_evaluator, filters, observe }
    }

    /// The rules are others now.
    pub async fn forget(&self) {
        self.judge.discard_plans().await;
        self.set_evaluator.forget().await;
        if let Some(filters) = &self.filters {
            filters.forget().await;
        }
    }

    /// Finds whom `changes` concern among the readers, and what each may see.
    ///
    /// # Errors
    /// Only when PostgreSQL cannot be asked; then nothing may be delivered yet.
    pub async fn verdicts<'a>(
        &self,
        catalog: &'a Catalog,
        changes: &'a [Change],
        subscriber_indexes: &'a SubscriberIndexes,
        reader: impl Fn(GroupId) -> Reader<'a>,
    ) -> Result<Verdicts, Error> {
        let (places, images) = places(catalog, changes);
        let mut verdicts = Verdicts::default();
        let mut said: HashMap<u64, Vec<Vec<SetAnswer>>> = HashMap::new();
        for (relation, images) in &images {
            for subscriber_index in subscriber_indexes.of(*relation) {
                let (answers, statements) = self.inquire(subscriber_index, images).await?;
                verdicts.statements += statements;
                said.insert(subscriber_index.number(), answers);
            }
        }
        let mut asked: Vec<PendingQuery<'a>> = Vec::new();
        self.apart(|| {
            let mut finder =
                Matcher { verdicts: &mut verdicts, asked: &mut asked, questions: HashMap::new() };
            for (index, change) in changes.iter().enumerate() {
                for subscriber_index in subscriber_indexes.of(change.relation) {
                    let said = said.get(&subscriber_index.number()).map_or(&[][..], Vec::as_slice);
                    let place = places[index].as_ref();
                    finder.find((index, change), place, subscriber_index, said, &reader);
                }
            }
        });
        drop(places);
        self.ask(&mut verdicts, asked).await?;
        self.observe.judged(verdicts.statements);
        Ok(verdicts)
    }

    /// Does what may take long, as clients may have thousands of filters here: others are served meanwhile.
    fn apart<T>(&self, work: impl FnOnce() -> T) -> T {
        let has_threads = Handle::current().runtime_flavor() == RuntimeFlavor::MultiThread;
        if self.filters.is_some() && has_threads { block_in_place(work) } else { work() }
    }

    /// What PostgreSQL tells once for all readers: for each leaf of the plan what it says of each image.
    async fn inquire(
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
            let inquiry = SetQuery { relation, role, leaf, roster: subscriber_index, images: &images };
            let (said, asked) = self.set_evaluator.ask(&inquiry).await?;
            for truth in [Truth::TimedOut, Truth::Error] {
                if said.contains(&SetAnswer::Nothing(truth)) {
                    let denied = if truth == Truth::TimedOut { Denied::TimedOut } else { Denied::Raised };
                    self.observe.judgement_failed(denied, &relation.table);
                }
            }
            statements += asked;
            answers.push(said);
        }
        Ok((answers, statements))
    }

    /// Asks what could not be told, and puts the answers in their places.
    async fn ask(&self, verdicts: &mut Verdicts, asked: Vec<PendingQuery<'_>>) -> Result<(), Error> {
        verdicts.statements += asked.len();
        let (policies, filters): (Vec<_>, Vec<_>) =
            asked.into_iter().partition(|asked| asked.clients.is_empty());
        let questions: Vec<IdentityQuery<'_>> = policies.iter().map(PendingQuery::question).collect();
        let answers = self.judge.judge(&questions).await?;
        self.note(verdicts, &policies, answers);
        let questions: Vec<ChargedQuery<'_>> = filters
            .iter()
            .map(|asked| ChargedQuery { question: asked.question(), clients: &asked.clients })
            .collect();
        let answers = match &self.filters {
            Some(judge) => Box::pin(judge.judge(&questions)).await?,
            None => filters.iter().map(|asked| Answered::none(&asked.images, Denied::TimedOut)).collect(),
        };
        self.note(verdicts, &filters, answers);
        Ok(())
    }

    fn note(&self, verdicts: &mut Verdicts, asked: &[PendingQuery<'_>], answers: Vec<Answered>) {
        for (asked, answer) in asked.iter().zip(answers) {
            if let Some(denied) = answer.denied {
                self.observe.judgement_failed(denied, &asked.relation.table);
            }
            if let (Some(Denied::Claims), Some((change, subscriber_index, cohort))) =
                (answer.denied, asked.cohort)
            {
                verdicts.raising.extend(subscriber_index.groups(cohort).map(|group| (group, change)));
            }
            let is_late = matches!(answer.denied, Some(Denied::TimedOut | Denied::Locked));
            for (number, (place, allowed)) in asked.answers.iter().zip(answer.allowed).enumerate() {
                let is_unreadable = answer.unreadable.contains(&number);
                if is_unreadable {
                    verdicts.unreadable.insert(*place);
                }
                let truth = if is_late || is_unreadable { Truth::TimedOut } else { allowed.into() };
                match place {
                    AnswerSlot::Policy(policy, side) => verdicts.policies[*policy][*side] = truth,
                    AnswerSlot::Filter(key, side) => {
                        if let Some(ruling) = verdicts.filters.get_mut(key) {
                            ruling[*side] = truth;
                        }
                    }
                }
            }
        }
    }
}

impl PendingQuery<'_> {
    fn question(&self) -> IdentityQuery<'_> {
        IdentityQuery {
            identity: self.identity.clone(),
            statement: Arc::clone(self.statement),
            images: &self.images,
            reading: reading(self.relation).into(),
            with_path: self.with_path,
        }
    }
}

impl Verdicts {
    /// What the candidate may see by the relation's policy alone.
    pub fn policy(&self, candidate: &Candidate) -> Verdict {
        let Some(policy) = candidate.policy else { return Verdict::Lost(COLUMNS_CHANGED) };
        self.verdict(&self.policies[policy], |side| AnswerSlot::Policy(policy, side), TOO_LONG)
    }

    /// Which images of the candidate's change match the filter.
    pub fn filter(&self, candidate: &Candidate, access: &Access, filter: &Arc<TypedFilter>) -> Verdict {
        let key = filter_key(candidate.change, access, filter);
        let Some(ruling) = self.filters.get(&key) else { return Verdict::Visibility(Visibility::NONE) };
        self.verdict(ruling, |side| AnswerSlot::Filter(key, side), FILTER_TOO_LONG)
    }

    fn verdict(
        &self,
        ruling: &Evaluation,
        answer: impl Fn(usize) -> AnswerSlot,
        too_long: &'static str,
    ) -> Verdict {
        if [0, 1].into_iter().any(|side| self.unreadable.contains(&answer(side))) {
            return Verdict::Lost(UNREADABLE);
        }
        if ruling.contains(&Truth::TimedOut) {
            return Verdict::Lost(too_long);
        }
        Verdict::Visibility(Visibility { before: ruling[0] == Truth::True, after: ruling[1] == Truth::True })
    }
}

pub(super) fn filter_key(change: usize, access: &Access, filter: &Arc<TypedFilter>) -> FilterKey {
    (Arc::as_ptr(filter).addr(), std::ptr::from_ref(access).addr(), change)
}
