//! Who may see what: for one part of the changelog, the verdict of every policy and filter that somebody's subscription needs.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::model::change::{Change, RelationId, Row};
use crate::model::policy::{Identity, Sight};
use crate::model::relation::{Catalog, Relation};
use crate::model::subscription::{BoundFilter, Subscription};
use crate::observe::Observe;
use crate::postgres::connect::Error;
use crate::postgres::judge::{Judge, Question};

/// Asks and remembers for the length of one part. Unknown means "no".
pub struct Verdicts {
    places: Vec<Place>,
    policies: HashMap<(RelationId, Identity), Vec<bool>>,
    filters: HashMap<usize, Vec<bool>>,
}

/// Where a change's images stand among the images of its relation.
struct Place {
    before: Option<usize>,
    after: Option<usize>,
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
        let (places, images) = places(changes);
        let mut verdicts = Self { places, policies: HashMap::new(), filters: HashMap::new() };
        let mut questions: Vec<(Asked, Question<'_>)> = Vec::new();
        let mut asked: HashSet<Asked> = HashSet::new();
        for subscription in subscriptions {
            let identity = subscription.identity();
            for (id, images) in &images {
                let Some(relation) = catalog.relation(*id) else {
                    continue;
                };
                let Some(access) = relation.access(identity.claims().role()) else {
                    continue;
                };
                let mut concerned = false;
                for binding in subscription.concerning(relation) {
                    concerned = true;
                    let Some(filter) = &binding.filter else { continue };
                    let key = Asked::Filter(address(filter));
                    if !asked.insert(key.clone()) {
                        continue;
                    }
                    match decide_here(filter, images) {
                        Some(allowed) => _ = verdicts.filters.insert(address(filter), allowed),
                        None => questions.push((key, question(identity, &filter.statement, images))),
                    }
                }
                let key = Asked::Policy(*id, identity.clone());
                if let Some(statement) = access.judge.as_ref().filter(|_| concerned)
                    && asked.insert(key.clone())
                {
                    questions.push((key, question(identity, statement, images)));
                }
            }
        }
        let (keys, questions): (Vec<Asked>, Vec<Question<'_>>) = questions.into_iter().unzip();
        if !questions.is_empty() {
            for (key, verdict) in keys.into_iter().zip(judge.judge(&questions).await?) {
                if let Some(denied) = verdict.denied {
                    observe.judgement_failed(denied);
                }
                match key {
                    Asked::Policy(relation, identity) => {
                        _ = verdicts.policies.insert((relation, identity), verdict.allowed);
                    }
                    Asked::Filter(filter) => _ = verdicts.filters.insert(filter, verdict.allowed),
                }
            }
            observe.judged(questions.len());
        }
        Ok(verdicts)
    }

    /// What somebody with this identity may see of the images of the change at `index` by the relation's policy alone.
    /// The identity's role must have access to the relation.
    pub fn policy(&self, index: usize, change: &Change, relation: &Relation, identity: &Identity) -> Sight {
        let Some(access) = relation.access(identity.claims().role()) else { return Sight::NONE };
        let Some(policy) = &access.policy else { return self.sight(index, |_| true) };
        let verdict = self.policies.get(&(relation.id(), identity.clone()));
        let sight =
            self.sight(index, |image| verdict.is_some_and(|allowed| allowed.get(image) == Some(&true)));
        // A name that only looks like a column's denies too much, never too little.
        sight.and(known(change, relation, |column| {
            policy.contains(&column.replace('"', "\"\"")) || policy.contains(".*")
        }))
    }

    /// Which images of the change at `index` match the filter.
    pub fn filter(
        &self,
        index: usize,
        change: &Change,
        relation: &Relation,
        filter: &Arc<BoundFilter>,
    ) -> Sight {
        let verdict = self.filters.get(&address(filter));
        let sight =
            self.sight(index, |image| verdict.is_some_and(|matches| matches.get(image) == Some(&true)));
        sight.and(known(change, relation, |column| filter.columns().any(|name| name == column)))
    }

    fn sight(&self, index: usize, allowed: impl Fn(usize) -> bool) -> Sight {
        let place = &self.places[index];
        Sight { before: place.before.is_some_and(&allowed), after: place.after.is_some_and(&allowed) }
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
enum Asked {
    Policy(RelationId, Identity),
    Filter(usize),
}

/// Filters are shared by address: each was bound once for its subscription, and outlives the part being judged.
fn address(filter: &Arc<BoundFilter>) -> usize {
    Arc::as_ptr(filter).addr()
}

/// Which images of a change hold every column that a rule mentions. The images of an oversize row lack some: judged
/// as null they could pass, so a rule that reads one of those is answered with "no".
fn known(change: &Change, relation: &Relation, mentions: impl Fn(&str) -> bool) -> Sight {
    let holds = |image: &Option<String>| {
        image.as_deref().and_then(|image| Row::parse(image).ok()).is_some_and(|row| {
            let missing = |name: &str| row.value(name).is_none() && mentions(name);
            !relation.columns.iter().any(|column| missing(&column.name))
        })
    };
    if !change.oversize {
        return Sight { before: true, after: true };
    }
    Sight { before: holds(&change.before), after: holds(&change.after) }
}

fn question<'a>(identity: &Identity, statement: &Arc<str>, images: &'a [&'a str]) -> Question<'a> {
    Question { identity: identity.clone(), statement: Arc::clone(statement), images }
}

fn places<'a>(changes: &'a [Change]) -> (Vec<Place>, HashMap<RelationId, Vec<&'a str>>) {
    let mut images: HashMap<RelationId, Vec<&str>> = HashMap::new();
    let mut places = Vec::with_capacity(changes.len());
    for change in changes {
        let images = images.entry(change.relation).or_default();
        let mut add = |image: &'a Option<String>| -> Option<usize> {
            images.push(image.as_deref()?);
            Some(images.len() - 1)
        };
        places.push(Place { before: add(&change.before), after: add(&change.after) });
    }
    (places, images)
}

fn decide_here(filter: &BoundFilter, images: &[&str]) -> Option<Vec<bool>> {
    images.iter().map(|image| Row::parse(image).ok().and_then(|row| filter.decide(&row))).collect()
}
