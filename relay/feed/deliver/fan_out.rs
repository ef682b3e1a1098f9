//! Delivers a batch to every subscriber group it concerns.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::SystemTime;

use crate::feed::authorize::gate::{Candidate, Gate, Verdicts};
use crate::feed::authorize::subscriber_index::{GroupId, SubscriberIndexes};
use crate::feed::deliver::broadcast_cache::BroadcastCache;
use crate::feed::deliver::encode_cache::EncodeCache;
use crate::feed::deliver::group::{FrameBuffer, SubscriberGroup, TOKEN_EXPIRED};
use crate::feed::deliver::queue::Unit;
use crate::feed::read::batch::Batch;
use crate::model::catalog::relation::{Catalog, Widening};
use crate::model::catalog::shape;
use crate::model::row::change::{Change, Operation, RelationId};
use crate::model::session::stored_broadcast::StoredBroadcast;
use crate::postgres::connect::pool::Error;

/// Delivers a batch to all groups it concerns; returns the number of frames queued.
///
/// # Errors
/// Only when PostgreSQL does not answer; nothing was delivered then.
pub async fn deliver<'a>(
    gate: &Gate,
    catalog: &'a Catalog,
    batch: &'a Batch,
    subscriber_indexes: &'a SubscriberIndexes,
    group: impl Fn(GroupId) -> &'a SubscriberGroup,
    unit: Unit,
) -> Result<usize, Error> {
    let end = batch.end().map(Arc::new);
    let changes = &*shape::read(catalog, &batch.changes);
    let mut verdicts = gate.verdicts(catalog, changes, subscriber_indexes, |id| group(id).reader()).await?;
    for (id, relation) in &verdicts.raising {
        if let Some(relation) = catalog.relation(*relation) {
            group(*id).send_policy_error(relation);
        }
    }
    let broadcasts = broadcasts(changes, subscriber_indexes);
    let candidates =
        with_broadcasts(std::mem::take(&mut verdicts.candidates), &broadcasts, subscriber_indexes);
    let now = now();
    let last = changes.len().saturating_sub(1);
    let cache = |(index, change): (usize, &Change)| {
        EncodeCache::new(&batch.span, change.number, index == last && !batch.more)
    };
    let mut caches: Vec<EncodeCache<'_>> = changes.iter().enumerate().map(cache).collect();
    let widenings =
        catalog.widenings().iter().filter(|widening| widening.is_after(&batch.span.seen)).collect();
    let authorized = AuthorizedBatch { catalog, batch, changes, verdicts: &verdicts, widenings };
    let mut encodings: HashMap<usize, BroadcastCache<'_>> =
        broadcasts.iter().map(|(index, stored)| (*index, BroadcastCache::new(stored))).collect();
    let mut buffer = FrameBuffer::default();
    let mut frames = 0;
    // Group by group, not change by change: the frames of a batch are queued for a client at once.
    for candidates in by_group(&candidates) {
        let Some(first) = candidates.first() else { continue };
        let group = group(first.group);
        if group.subscription().identity().claims().expires_at() <= now {
            group.members().set_missed(TOKEN_EXPIRED);
            continue;
        }
        if end.as_ref().is_some_and(|end| group.has_reached(end)) {
            continue;
        }
        if group.is_closed() {
            continue;
        }
        authorized.encode(group, &candidates, (&mut caches, &mut encodings), &mut buffer);
        frames += group.send(unit, &mut buffer, end.as_ref());
        buffer.clear();
    }
    Ok(frames)
}

/// A batch with the verdicts on it.
struct AuthorizedBatch<'a, 'b> {
    catalog: &'a Catalog,
    batch: &'a Batch,
    /// The changes, with their images in the current columns.
    changes: &'b [Change],
    verdicts: &'b Verdicts,
    /// The widenings of rights that are newer than the page.
    widenings: Vec<&'a Widening>,
}

impl<'a> AuthorizedBatch<'a, '_> {
    /// Adds the frames of the candidates, all of one group, to the buffer. A partitioned table is truncated partition by partition,
    /// which is reported once.
    fn encode(
        &self,
        group: &'a SubscriberGroup,
        candidates: &[Candidate],
        (caches, encodings): (&mut [EncodeCache<'a>], &mut HashMap<usize, BroadcastCache<'a>>),
        buffer: &mut FrameBuffer<'a>,
    ) {
        let &Self { catalog, batch, changes, verdicts, .. } = self;
        let is_older = |change: &Change, relation: RelationId| {
            let mut widenings = self.widenings.iter();
            widenings.any(|widening| widening.concerns(change, relation) && group.is_before(widening))
        };
        let mut last_of_transaction = HashSet::new();
        if group.key().codec.encoding().includes_cursor() {
            last_of_transaction = last_changes(batch, catalog, group, candidates, |candidate| {
                let change = &changes[candidate.change];
                if candidate.relation == RelationId::MESSAGES {
                    return true;
                }
                let relation = catalog.relation(candidate.relation);
                let change = (change, is_older(change, candidate.relation));
                relation.is_some_and(|relation| group.receives(candidate, change, relation, verdicts, buffer))
            });
        }
        let mut truncated = HashSet::new();
        for candidate in candidates {
            let index = candidate.change;
            let change = &changes[index];
            let is_last = last_of_transaction.contains(&(index, candidate.relation));
            if let Some(broadcast) = encodings.get_mut(&index) {
                group.encode_broadcast((change, is_last), broadcast, &mut caches[index], buffer);
                continue;
            }
            let is_repeated = match change.operation {
                Operation::Truncate => !truncated.insert((candidate.relation, change.xid)),
                _ => {
                    truncated.clear();
                    false
                }
            };
            if let Some(relation) = catalog.relation(candidate.relation)
                && !is_repeated
            {
                let change = (change, is_older(change, candidate.relation), is_last);
                group.encode(candidate, change, relation, verdicts, &mut caches[index], buffer);
            }
        }
    }
}

/// Reads the broadcasts among the changes that a group may follow, by their position. Those that are not sent are left out.
fn broadcasts(changes: &[Change], subscriber_indexes: &SubscriberIndexes) -> Vec<(usize, StoredBroadcast)> {
    if !subscriber_indexes.follow_topics() {
        return Vec::new();
    }
    let of = changes.iter().enumerate().filter(|(_, change)| change.operation == Operation::Broadcast);
    of.filter_map(|(index, change)| Some((index, StoredBroadcast::of(change)?.ok()?))).collect()
}

/// Adds the groups that follow the topics of broadcasts, and keeps the order of the changes.
fn with_broadcasts(
    mut candidates: Vec<Candidate>,
    broadcasts: &[(usize, StoredBroadcast)],
    subscriber_indexes: &SubscriberIndexes,
) -> Vec<Candidate> {
    for (change, stored) in broadcasts {
        let following = subscriber_indexes.following(&stored.topic);
        candidates.extend(following.map(|group| Candidate::of_broadcast(group, *change)));
    }
    if !broadcasts.is_empty() {
        candidates.sort_by_key(|candidate| candidate.change);
    }
    candidates
}

/// Returns the time in seconds, as tokens count it. A token is expired from the second of its expiry on.
pub fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Delivers a batch to one group.
///
/// # Errors
/// As [`deliver`].
pub async fn deliver_to_one(
    gate: &Gate,
    catalog: &Catalog,
    batch: &Batch,
    group: &SubscriberGroup,
) -> Result<usize, Error> {
    let mut subscriber_indexes = SubscriberIndexes::default();
    subscriber_indexes.insert_topic(0, group.subscription());
    for change in &batch.changes {
        for relation in catalog.affected(change) {
            subscriber_indexes.prepare(relation, std::iter::once((0, group.subscription())));
        }
    }
    deliver(gate, catalog, batch, &subscriber_indexes, |_| group, Unit::REPLAY).await
}

/// Groups the candidates by subscriber group, in order of the changes.
fn by_group(candidates: &[Candidate]) -> Vec<Vec<Candidate>> {
    let mut positions: HashMap<GroupId, usize> = HashMap::new();
    let mut groups: Vec<Vec<Candidate>> = Vec::new();
    for candidate in candidates {
        let position = *positions.entry(candidate.group).or_insert_with(|| {
            groups.push(Vec::new());
            groups.len() - 1
        });
        groups[position].push(*candidate);
    }
    groups
}

/// Returns the changes that are the last of their transaction for this group, among those that it `gets`.
fn last_changes(
    batch: &Batch,
    catalog: &Catalog,
    group: &SubscriberGroup,
    candidates: &[Candidate],
    mut gets: impl FnMut(&Candidate) -> bool,
) -> HashSet<(usize, RelationId)> {
    let mut continued: HashSet<u64> = batch
        .unfinished
        .iter()
        .filter(|(_, relations)| group.concerns(catalog, *relations))
        .map(|(xid, _)| *xid)
        .collect();
    let mut last_of_transaction = HashSet::new();
    for candidate in candidates.iter().rev() {
        let xid = batch.changes[candidate.change].xid;
        if !continued.contains(&xid) && gets(candidate) {
            continued.insert(xid);
            last_of_transaction.insert((candidate.change, candidate.relation));
        }
    }
    last_of_transaction
}
