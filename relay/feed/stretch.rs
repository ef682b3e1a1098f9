//! A stretch of the changelog on its way to its readers, and the last ones, kept for those who come with a cursor.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::SystemTime;

use crate::feed::audience::{Audience, BETWEEN, Desk};
use crate::feed::gate::{Candidate, Gate};
use crate::feed::outbox::Unit;
use crate::feed::readership::{AudienceId, Readerships};
use crate::feed::written::Written;
use crate::model::change::{Change, Operation};
use crate::model::cursor::{Cursor, Span};
use crate::model::relation::{Catalog, Widening};
use crate::model::shape;
use crate::postgres::connect::Error;
use crate::postgres::transactions::Unfinished;

/// A part of a page.
pub struct Stretch {
    /// Its changes.
    pub changes: Vec<Change>,
    /// Which of their transactions go on after it.
    pub unfinished: Unfinished,
    /// The page goes on after it.
    pub more: bool,
    /// The page.
    pub span: Arc<Span>,
    /// The sign of the rules at the end of the page, where it was read live.
    pub mark: Option<i64>,
}

impl Stretch {
    /// Where one stands after it; none when it is empty.
    pub fn end(&self) -> Option<Cursor> {
        Some(self.span.after(self.changes.last()?.number, !self.more))
    }

    /// Whether a change of the schema, or of what is watched, stands in it.
    pub fn is_news(&self) -> bool {
        self.changes.iter().any(|change| matches!(change.operation, Operation::Schema | Operation::Gap))
    }

    /// Which of its changes are the last of their transactions that an audience gets, of those that it `gets`.
    fn lasts(
        &self,
        catalog: &Catalog,
        audience: &Audience,
        candidates: &[Candidate],
        mut gets: impl FnMut(&Candidate) -> bool,
    ) -> HashSet<usize> {
        let mut passed: HashSet<u64> = self
            .unfinished
            .iter()
            .filter(|(_, relations)| audience.concerns(catalog, relations))
            .map(|(xid, _)| *xid)
            .collect();
        let mut lasts = HashSet::new();
        for candidate in candidates.iter().rev() {
            let xid = self.changes[candidate.change].xid;
            if !passed.contains(&xid) && gets(candidate) {
                passed.insert(xid);
                lasts.insert(candidate.change);
            }
        }
        lasts
    }

    /// How many bytes its images have, about.
    pub fn bytes(&self) -> usize {
        self.changes.iter().map(|change| 100 + change.bytes()).sum()
    }
}

/// Tells a stretch to all whom it concerns; returns how many frames that makes.
///
/// # Errors
/// Only when PostgreSQL cannot be asked; then nobody was told anything.
pub async fn tell<'a>(
    gate: &Gate,
    catalog: &'a Catalog,
    stretch: &'a Stretch,
    readerships: &'a Readerships,
    audience: impl Fn(AudienceId) -> &'a Audience,
    part: Unit,
) -> Result<usize, Error> {
    let here = stretch.end().map(Arc::new);
    let changes = &*shape::read(catalog, &stretch.changes);
    let verdicts = gate.verdicts(catalog, changes, readerships, |id| audience(id).reader()).await?;
    for (id, change) in &verdicts.raising {
        if let Some(relation) = catalog.relation(changes[*change].relation) {
            audience(*id).tell_raising(relation);
        }
    }
    let now = now();
    let last = changes.len().saturating_sub(1);
    let is_last = |index: usize| index == last && !stretch.more;
    let written =
        |(index, change): (usize, &Change)| Written::new(&stretch.span, change.number, is_last(index));
    let widenings: Vec<&Widening> =
        catalog.widenings().iter().filter(|widening| widening.is_after(&stretch.span.seen)).collect();
    let mut written: Vec<Written<'_>> = changes.iter().enumerate().map(written).collect();
    let mut desk = Desk::default();
    let mut frames = 0;
    // Audience by audience, not change by change: what a stretch holds for a client reaches it in one piece.
    for candidates in by_audience(&verdicts.candidates) {
        let Some(first) = candidates.first() else { continue };
        let audience = audience(first.audience);
        if audience.subscription().identity().claims().expires_at() <= now {
            audience.members().misses(BETWEEN);
            continue;
        }
        if here.as_ref().is_some_and(|here| audience.has_reached(here)) {
            continue;
        }
        if audience.is_over() {
            continue;
        }
        let is_older = |change: &Change| {
            widenings.iter().any(|widening| widening.concerns(change) && audience.stood_before(widening))
        };
        let mut lasts = HashSet::new();
        if audience.key().dress.tells_cursor() {
            lasts = stretch.lasts(catalog, audience, &candidates, |candidate| {
                let change = &changes[candidate.change];
                let relation = catalog.relation(change.relation);
                let change = (change, is_older(change));
                relation
                    .is_some_and(|relation| audience.gets(candidate, change, relation, &verdicts, &mut desk))
            });
        }
        for candidate in &candidates {
            let index = candidate.change;
            let change = &changes[index];
            if let Some(relation) = catalog.relation(change.relation)
                && !is_repeated_truncate(changes, index)
            {
                audience.write(
                    candidate,
                    (change, is_older(change), lasts.contains(&index)),
                    relation,
                    &verdicts,
                    &mut written[index],
                    &mut desk,
                );
            }
        }
        frames += audience.send(part, &mut desk, here.as_ref());
        desk.clear();
    }
    Ok(frames)
}

/// The time in seconds, as tokens count it: from the second on in which one ends nothing is told to who has it.
pub fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Tells a stretch to one audience alone.
///
/// # Errors
/// As [`tell`].
pub async fn tell_one(
    gate: &Gate,
    catalog: &Catalog,
    stretch: &Stretch,
    audience: &Audience,
) -> Result<usize, Error> {
    let mut readerships = Readerships::default();
    for change in &stretch.changes {
        if let Some(relation) = catalog.relation(change.relation) {
            readerships.prepare(relation, std::iter::once((0, audience.subscription())));
        }
    }
    tell(gate, catalog, stretch, &readerships, |_| audience, Unit::PAST).await
}

/// The candidates of each audience, in order of the changes.
fn by_audience(candidates: &[Candidate]) -> Vec<Vec<Candidate>> {
    let mut places: HashMap<AudienceId, usize> = HashMap::new();
    let mut groups: Vec<Vec<Candidate>> = Vec::new();
    for candidate in candidates {
        let place = *places.entry(candidate.audience).or_insert_with(|| {
            groups.push(Vec::new());
            groups.len() - 1
        });
        groups[place].push(*candidate);
    }
    groups
}

/// A partitioned table is truncated part by part; its subscribers hear of it once.
fn is_repeated_truncate(changes: &[Change], index: usize) -> bool {
    let told =
        |change: &Change| (change.operation == Operation::Truncate).then_some((change.relation, change.xid));
    index > 0 && told(&changes[index]).is_some() && told(&changes[index]) == told(&changes[index - 1])
}

/// What was delivered last, bounded in bytes: those who come back after a moment need not go to the changelog.
#[derive(Default)]
pub struct Recent {
    /// Where one stood before the first of them.
    start: Option<Cursor>,
    stretches: VecDeque<(Arc<Stretch>, usize)>,
    bytes: usize,
}

/// The bound.
const MOST_BYTES: usize = 4 << 20;
/// How much of it one client is handed.
const MOST_AT_ONCE: usize = 256 << 10;

impl Recent {
    /// Adds what was delivered after `start`.
    pub fn add(&mut self, start: Option<Cursor>, stretch: Arc<Stretch>) {
        if self.start.is_none() {
            self.start = start;
        }
        let bytes = stretch.bytes();
        self.bytes += bytes;
        self.stretches.push_back((stretch, bytes));
        while self.bytes > MOST_BYTES
            && let Some((oldest, bytes)) = self.stretches.pop_front()
        {
            self.bytes -= bytes;
            self.start = oldest.end();
        }
    }

    /// The position moved without anything to deliver.
    pub fn moved(&mut self, from: &Option<Cursor>, to: &Cursor) {
        // With nothing at hand, whoever stands between the two has missed nothing either.
        if self.start.is_none() {
            self.start = Some(from.as_ref().unwrap_or(to).clone());
        }
    }

    /// What was delivered that a reader here lacks; none when that is not all at hand.
    pub fn since(&self, cursor: &Cursor) -> Option<Vec<Arc<Stretch>>> {
        let start = self.start.as_ref()?;
        if !cursor.is_at_or_after(start) {
            return None;
        }
        let is_missed = |stretch: &Stretch| stretch.end().is_some_and(|end| !cursor.is_at_or_after(&end));
        let missed: Vec<&(Arc<Stretch>, usize)> =
            self.stretches.iter().filter(|(stretch, _)| is_missed(stretch)).collect();
        // Amid a page of another relay it has to come to the end of that first.
        if !missed.first()?.0.span.continues(cursor) {
            return None;
        }
        // More than a client should get in one go is read from the changelog, as fast as the client reads.
        let bytes: usize = missed.iter().map(|(_, bytes)| bytes).sum();
        (bytes <= MOST_AT_ONCE).then(|| missed.iter().map(|(stretch, _)| Arc::clone(stretch)).collect())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::model::change::{Reading, RelationId};
    use crate::model::cursor::{Epoch, Snapshot};

    /// A page with one change of this number, whose image has so many bytes.
    pub(crate) fn stretch(number: i64, bytes: usize) -> Arc<Stretch> {
        let snapshot = |xmax| Snapshot::new(xmax, Vec::new()).unwrap();
        let span = Arc::new(Span { epoch: Epoch(1), seen: snapshot(1), until: snapshot(2) });
        let change = Change {
            number,
            xid: 1,
            committed: SystemTime::UNIX_EPOCH.into(),
            relation: RelationId(1),
            shape: None,
            began: None,
            reading: Reading::Whole,
            operation: Operation::Insert,
            oversize: false,
            before: None,
            after: Some("x".repeat(bytes)),
        };
        let (unfinished, mark) = (Unfinished::new(), None);
        Arc::new(Stretch { changes: vec![change], unfinished, more: false, span, mark })
    }
}
