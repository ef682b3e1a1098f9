//! Who may see what: for one part of the changelog, the verdict of every policy and filter that somebody's subscription needs.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::model::change::{Change, RelationId, Row};
use crate::model::policy::{Denied, Identity, Sight};
use crate::model::relation::{Access, Catalog, Relation};
use crate::model::subscription::{BoundFilter, Subscription};
use crate::observe::Observe;
use crate::postgres::connect::Error;
use crate::postgres::judge::{Judge, Question};

/// Asks and remembers for the length of one part. Unknown means "no".
pub struct Verdicts {
    places: Vec<Place>,
    answers: HashMap<Asked, Answer>,
}

/// What is known of one change before anybody asks.
struct Place {
    /// Where its images stand among the images of its relation.
    before: Option<usize>,
    after: Option<usize>,
    layout: Layout,
}

/// How the columns of a change's images compare with those of its relation now.
enum Layout {
    /// The same names.
    Same,
    /// Some are left out, because the row was too large.
    Lacking(Vec<String>),
    /// Others: the relation was altered in between, and a rule would read the wrong values.
    Other,
}

/// The answer to one question.
enum Answer {
    /// For each image of the relation.
    Allowed(Vec<bool>),
    /// It took too long, so nobody knows.
    TookTooLong,
}

/// What a rule says of a change.
pub enum Verdict {
    /// Which images may be seen.
    Sight(Sight),
    /// That cannot be told any more, and never will be; the text says why.
    Lost(&'static str),
}

#[derive(Clone, PartialEq, Eq, Hash)]
enum Asked {
    Policy(RelationId, Identity),
    /// A filter, for a role: what one role may not evaluate, another may.
    Filter(RelationId, usize, usize),
}

impl Asked {
    fn relation(&self) -> RelationId {
        match self {
            Self::Policy(relation, _) | Self::Filter(relation, ..) => *relation,
        }
    }
}

impl Verdicts {
    /// Judges `changes` for these subscriptions. A rule that can be decided here is; PostgreSQL is asked for the rest,
    /// once per distinct claims and relation.
    ///
    /// # Errors
    /// Only when PostgreSQL cannot be asked; then nothing may be delivered yet.
    pub async fn gather<'a>(
        judge: &Judge,
        observe: &Observe,
        catalog: &Catalog,
        changes: &[Change],
        subscriptions: impl Iterator<Item = &'a Subscription>,
    ) -> Result<Self, Error> {
        let (places, images) = places(catalog, changes);
        let mut answers: HashMap<Asked, Answer> = HashMap::new();
        let mut questions: Vec<(Asked, Question<'_>)> = Vec::new();
        let mut asked: HashSet<Asked> = HashSet::new();
        let relations: Vec<(&Relation, &Vec<&str>)> =
            images.iter().filter_map(|(id, images)| Some((&**catalog.relation(*id)?, images))).collect();
        for subscription in subscriptions {
            let identity = subscription.identity();
            for (relation, images) in &relations {
                let Some(access) = relation.access(identity.claims().role()) else { continue };
                let mut concerned = false;
                for binding in subscription.concerning(relation) {
                    concerned = true;
                    let Some(filter) = &binding.filter else { continue };
                    let key = filter_key(relation, filter, access);
                    if !asked.insert(key.clone()) {
                        continue;
                    }
                    match decide_here(filter, images) {
                        Some(allowed) => _ = answers.insert(key, Answer::Allowed(allowed)),
                        None => questions.push((key, question(identity, &filter.statement, images))),
                    }
                }
                if let Some(statement) = access.judge.as_ref().filter(|_| concerned) {
                    let key = Asked::Policy(relation.id(), identity.clone());
                    if asked.insert(key.clone()) {
                        questions.push((key, question(identity, statement, images)));
                    }
                }
            }
        }
        let (keys, questions): (Vec<Asked>, Vec<Question<'_>>) = questions.into_iter().unzip();
        for (key, verdict) in keys.into_iter().zip(judge.judge(&questions).await?) {
            if let Some(denied) = verdict.denied {
                let relation = catalog.relation(key.relation());
                observe.judgement_failed(denied, relation.map_or("", |relation| &relation.table));
            }
            answers.insert(
                key,
                match verdict.denied {
                    Some(Denied::TimedOut) => Answer::TookTooLong,
                    _ => Answer::Allowed(verdict.allowed),
                },
            );
        }
        observe.judged(questions.len());
        Ok(Self { places, answers })
    }

    /// What somebody with this identity may see of the images of the change at `index` by the relation's policy alone.
    /// `access` is what the identity's role has to the relation.
    pub fn policy(&self, index: usize, relation: &Relation, access: &Access, identity: &Identity) -> Verdict {
        let Some(policy) = &access.policy else { return self.verdict(index, None, |_| false) };
        let key = Asked::Policy(relation.id(), identity.clone());
        // The text of a policy of row security is PostgreSQL's own; a name that only looks like a column's denies too
        // much, never too little. Other policies are as somebody wrote them, and may read any column in any spelling.
        let reads = |column: &str| {
            matches!(relation.kind.as_str(), "m" | "f")
                || policy.contains(&column.replace('"', "\"\""))
                || policy.contains(".*")
        };
        self.verdict(index, Some(&key), reads)
    }

    /// Which images of the change at `index` match the filter.
    pub fn filter(
        &self,
        index: usize,
        relation: &Relation,
        access: &Access,
        filter: &Arc<BoundFilter>,
    ) -> Verdict {
        let key = filter_key(relation, filter, access);
        self.verdict(index, Some(&key), |column| filter.columns().any(|name| name == column))
    }

    /// The answer to a question about a change; no question means everything may be seen. An image that lacks a column
    /// which the rule reads is answered with "no": judged as null it could pass.
    fn verdict(&self, index: usize, asked: Option<&Asked>, reads: impl Fn(&str) -> bool) -> Verdict {
        let place = &self.places[index];
        match &place.layout {
            Layout::Same => {}
            Layout::Lacking(columns) if !columns.iter().any(|column| reads(column)) => {}
            Layout::Lacking(_) => return Verdict::Sight(Sight::NONE),
            Layout::Other => return Verdict::Lost("its columns changed while a change was on its way"),
        }
        let allowed = match asked.map(|asked| self.answers.get(asked)) {
            None => None,
            Some(Some(Answer::Allowed(allowed))) => Some(allowed.as_slice()),
            Some(Some(Answer::TookTooLong)) => return Verdict::Lost("the policy or filter took too long"),
            Some(None) => Some([].as_slice()),
        };
        let sees = |image: usize| allowed.is_none_or(|allowed| allowed.get(image) == Some(&true));
        Verdict::Sight(Sight { before: place.before.is_some_and(sees), after: place.after.is_some_and(sees) })
    }
}

/// Filters and rights are told apart by address: both outlive the part that is being judged.
fn filter_key(relation: &Relation, filter: &Arc<BoundFilter>, access: &Access) -> Asked {
    Asked::Filter(relation.id(), Arc::as_ptr(filter).addr(), std::ptr::from_ref(access).addr())
}

fn layout(relation: Option<&Arc<Relation>>, change: &Change) -> Layout {
    let Some(relation) = relation else { return Layout::Same };
    let mut lacking = Vec::new();
    for image in [&change.before, &change.after].into_iter().flatten() {
        let Ok(row) = Row::parse(image) else { return Layout::Other };
        let known = row.names().filter(|name| relation.column(name).is_some()).count();
        if known < row.names().len() {
            return Layout::Other;
        }
        if known < relation.columns.len() {
            let missing =
                relation.columns.iter().map(|column| &column.name).filter(|name| row.value(name).is_none());
            lacking.extend(missing.cloned());
        }
    }
    match (lacking.is_empty(), change.oversize) {
        (true, _) => Layout::Same,
        (false, true) => Layout::Lacking(lacking),
        (false, false) => Layout::Other,
    }
}

fn question<'a>(identity: &Identity, statement: &Arc<str>, images: &'a [&'a str]) -> Question<'a> {
    Question { identity: identity.clone(), statement: Arc::clone(statement), images }
}

fn places<'a>(catalog: &Catalog, changes: &'a [Change]) -> (Vec<Place>, HashMap<RelationId, Vec<&'a str>>) {
    let mut images: HashMap<RelationId, Vec<&str>> = HashMap::new();
    let mut places = Vec::with_capacity(changes.len());
    for change in changes {
        let images = images.entry(change.relation).or_default();
        let mut add = |image: &'a Option<String>| -> Option<usize> {
            images.push(image.as_deref()?);
            Some(images.len() - 1)
        };
        let (before, after) = (add(&change.before), add(&change.after));
        places.push(Place { before, after, layout: layout(catalog.relation(change.relation), change) });
    }
    (places, images)
}

fn decide_here(filter: &BoundFilter, images: &[&str]) -> Option<Vec<bool>> {
    images.iter().map(|image| Row::parse(image).ok().and_then(|row| filter.decide(&row))).collect()
}
