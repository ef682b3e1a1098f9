//! Channels that get the same frames, and the encoding of a change into one frame for all of them.

use std::sync::Arc;

use crate::feed::authorize::gate::{Candidate, GroupReader, Verdict, Verdicts};
use crate::feed::deliver::broadcast_cache::BroadcastCache;
use crate::feed::deliver::encode_cache::{EncodeCache, EncodeError, RecentPayloads};
use crate::feed::deliver::frame::Frame;
use crate::feed::deliver::members::Members;
use crate::feed::deliver::memory_budget::MemoryBudget;
use crate::feed::deliver::outbox::Outbox;
use crate::feed::deliver::queue::Unit;
use crate::model::catalog::relation::{Access, Catalog, Relation, Widening};
use crate::model::codec::payload::View;
use crate::model::codec::protocol::{Codec, Notice};
use crate::model::log::cursor::Cursor;
use crate::model::policy::visibility::{EventKind, event_kind};
use crate::model::row::change::{Change, Operation, RelationId};
use crate::model::session::channel::ChannelId;
use crate::model::subscription::binding::{Binding, Subscription};
use crate::model::subscription::error::raising;
use crate::model::subscription::request::Events;

/// A channel to register with the hub.
pub struct Subscriber {
    /// The wire format of its frames.
    pub codec: Codec,
    /// The subscription.
    pub subscription: Subscription,
    /// Its position, when that is beyond the feed's.
    pub since: Option<Cursor>,
    /// The queue for its frames.
    pub outbox: Arc<Outbox>,
    /// Why changes may be missing, to be sent when delivery continues.
    pub missed: Option<&'static str>,
}

impl Subscriber {
    /// Returns the frame of a gap whose cursor is not known.
    pub fn gap(&self, why: &str) -> Frame {
        Frame::notice(self.codec.encoding().gap(why, None), self.outbox.budget())
    }
}

/// What the channels of a group have in common, so that they get the same frames.
#[derive(PartialEq, Eq, Hash)]
pub struct GroupKey {
    /// The wire format.
    pub codec: Codec,
    /// The subscription.
    pub subscription: Subscription,
    /// The position of the channels, when that is beyond the feed's.
    pub since: Option<Cursor>,
}

/// Channels with the same codec, claims and bindings. A clone refers to the same channels.
#[derive(Clone)]
pub struct SubscriberGroup {
    key: Arc<GroupKey>,
    subscription: Subscription,
    members: Arc<Members>,
}

/// What a binding gets of a change: columns, event kind, id.
type Wanted<'a> = (Option<&'a [String]>, EventKind, u32);

/// Bindings with an equal key share a message that names all their ids. Bindings that select different columns need
/// different messages, and so does a binding that loses the row beside one that keeps it.
fn message_key<'a>((select, meaning, _): &Wanted<'a>) -> (Option<&'a [String]>, bool) {
    (*select, *meaning <= EventKind::Delete)
}

/// How a change concerns a group.
enum Disposition<'a> {
    /// It is not delivered.
    Nothing,
    /// The relation was truncated.
    Truncated,
    /// It is replaced by a gap with this reason.
    Lost(&'static str),
    /// Some bindings get it, with these rights.
    Wanted(&'a Access),
}

/// The frames under construction for one group; reused to save allocations.
#[derive(Default)]
pub struct FrameBuffer<'a> {
    /// What the bindings get of the current change.
    wanted: Vec<Wanted<'a>>,
    ids: Vec<u32>,
    /// Relations with a gap.
    lost: Vec<RelationId>,
    /// The frames of the batch so far.
    frames: Vec<Frame>,
    /// A frame did not fit in memory.
    has_no_room: bool,
    /// Payloads kept for the next group.
    recent: RecentPayloads,
    /// The memory budget of the frames.
    budget: Option<Arc<MemoryBudget>>,
}

impl FrameBuffer<'_> {
    /// Prepares the buffer for the next group.
    pub fn clear(&mut self) {
        self.lost.clear();
        self.frames.clear();
        self.has_no_room = false;
    }
}

impl SubscriberGroup {
    /// Creates a group with its first channel.
    pub fn new(key: Arc<GroupKey>, channel: ChannelId, outbox: Arc<Outbox>) -> Self {
        let subscription = key.subscription.clone();
        Self { key, subscription, members: Arc::new(Members::new(channel, outbox)) }
    }

    /// Returns what its channels have in common.
    pub fn key(&self) -> &Arc<GroupKey> {
        &self.key
    }

    /// Returns its channels.
    pub fn members(&self) -> &Members {
        &self.members
    }

    /// Adds a channel. The newest subscription serves all: its filters were parsed with the current column types.
    pub fn add(&mut self, channel: ChannelId, outbox: Arc<Outbox>, subscription: Subscription) {
        self.subscription = subscription;
        self.members.add(channel, outbox);
    }

    /// Returns a group of the same channels with their own position.
    pub fn at_position(&self, position: Cursor) -> Self {
        let Self { subscription, members, .. } = self.clone();
        let (codec, since) = (self.key.codec.clone(), Some(position.clone()));
        members.set_position(Arc::new(position));
        let key = Arc::new(GroupKey { codec, subscription: subscription.clone(), since });
        Self { key, subscription, members }
    }

    /// Removes its channels and returns them as subscribers at `since`.
    pub fn into_subscribers(self, since: Option<Cursor>) -> impl Iterator<Item = (ChannelId, Subscriber)> {
        let Self { key, subscription, members } = self;
        let missed = members.missed();
        members.take().into_iter().map(move |(channel, outbox)| {
            let (codec, since, subscription) = (key.codec.clone(), since.clone(), subscription.clone());
            (channel, Subscriber { codec, subscription, since, outbox, missed })
        })
    }

    /// Returns the subscription of its channels.
    pub fn subscription(&self) -> &Subscription {
        &self.subscription
    }

    /// Returns the group as the gate sees it. The session of its first channel represents all.
    pub fn reader(&self) -> GroupReader<'_> {
        let session = self.members.first().map_or(0, |channel| channel.session);
        GroupReader { subscription: &self.subscription, session }
    }

    /// Returns the position of its channels, given the feed's.
    pub fn position(&self, feed_position: &Cursor) -> Cursor {
        match (self.members.position(), &self.key.since) {
            (Some(position), _) => Cursor::clone(&position),
            (None, Some(since)) => feed_position.merge(since),
            (None, None) => feed_position.clone(),
        }
    }

    /// Returns whether all of its clients are closed, so that nothing needs to be encoded for them.
    pub fn is_closed(&self) -> bool {
        self.members.are_closed()
    }

    /// Applies a new catalog. Sends a gap and binds the channels anew when a relation is not watched any more, was
    /// watched anew, was renamed, or has other types than a filter was parsed with; the channels get a second gap
    /// once bound, because changes may come in between. Sends a gap when a schema subscription loses a relation that
    /// was there `before`. Reports relations that show the role no row any more. Binds channels anew when a refused
    /// entry may be accepted now, with a gap for what they missed.
    pub fn apply_catalog(&self, before: Option<&Catalog>, catalog: &Catalog, feed_position: Option<&Cursor>) {
        if self.subscription.is_stale(catalog) {
            self.send_gap(TABLE_CHANGED, self.reached(feed_position).as_deref());
            self.members.set_missed(TABLE_CHANGED);
            self.members.for_each(|channel, outbox| outbox.rebind(channel));
        } else if before.is_some_and(|before| self.subscription.loses(before, catalog)) {
            self.send_gap(TABLE_CHANGED, self.reached(feed_position).as_deref());
        }
        for lack in self.subscription.lacks(before, catalog) {
            self.send_gap(&lack, self.reached(feed_position).as_deref());
        }
        for why in self.subscription.newly_hidden(before, catalog) {
            self.send_hidden(&why);
        }
        if self.subscription.may_be_lifted(catalog) {
            self.members.set_missed(TABLE_CHANGED);
            self.members.for_each(|channel, outbox| outbox.rebind(channel));
        }
    }

    /// Returns whether it has its own position, which is at or after `cursor`.
    pub fn has_reached(&self, cursor: &Cursor) -> bool {
        self.members.position().is_some_and(|position| position.is_at_or_after(cursor))
    }

    fn reached(&self, feed_position: Option<&Cursor>) -> Option<String> {
        feed_position.map(|feed_position| self.position(feed_position).to_string())
    }

    /// Returns whether its position is before a widening of its role's rights.
    pub fn is_before(&self, widening: &Widening) -> bool {
        widening.is_for(self.subscription.identity().claims().role())
            && self.key.since.as_ref().is_none_or(|since| widening.is_after(since.seen()))
    }

    /// Returns whether the change of this candidate is sent to the group.
    pub fn receives<'a>(
        &'a self,
        candidate: &Candidate,
        change: (&Change, bool),
        relation: &'a Relation,
        verdicts: &Verdicts,
        buffer: &mut FrameBuffer<'a>,
    ) -> bool {
        matches!(
            self.classify(candidate, change, relation, verdicts, &mut buffer.wanted),
            Disposition::Wanted(_)
        )
    }

    /// Returns whether it may get changes of one of these relations.
    pub fn concerns<'r>(
        &self,
        catalog: &Catalog,
        relations: impl IntoIterator<Item = &'r RelationId>,
    ) -> bool {
        relations.into_iter().any(|id| {
            let mut with_parts = catalog.with_loaded_parts(*id);
            (*id == RelationId::MESSAGES && self.subscription.topic().is_some())
                || with_parts.any(|relation| self.subscription.concerning(relation).next().is_some())
        })
    }

    /// Encodes a broadcast that it follows and adds its frame to the buffer. When the broadcast `is_last`, it is marked as the end of
    /// its transaction for this group.
    pub fn encode_broadcast<'a>(
        &'a self,
        (change, is_last): (&Change, bool),
        broadcast: &mut BroadcastCache<'a>,
        cache: &mut EncodeCache<'a>,
        buffer: &mut FrameBuffer<'_>,
    ) {
        if self.key.since.as_ref().is_some_and(|since| since.has(change.xid, change.number)) {
            return;
        }
        if buffer.budget.is_none() {
            buffer.budget = self.members.budget();
        }
        let Some(budget) = &buffer.budget else { return };
        let base = cache.base(self.key.since.as_ref());
        match broadcast.frame(&self.key.codec, change, is_last, cache.cursor(base), budget) {
            Ok(frame) => buffer.frames.extend(frame),
            Err(_) => buffer.has_no_room = true,
        }
    }

    /// Encodes the change of this candidate and adds its frames to the buffer. When the change `is_last`, the last
    /// frame is marked as the end of its transaction for this group.
    pub fn encode<'a>(
        &'a self,
        candidate: &Candidate,
        (change, is_older, is_last): (&Change, bool, bool),
        relation: &'a Relation,
        verdicts: &Verdicts,
        cache: &mut EncodeCache<'a>,
        buffer: &mut FrameBuffer<'a>,
    ) {
        let base = cache.base(self.key.since.as_ref());
        let access =
            match self.classify(candidate, (change, is_older), relation, verdicts, &mut buffer.wanted) {
                Disposition::Nothing => return,
                Disposition::Truncated => {
                    let (schema, table) = (&relation.schema, &relation.table);
                    let why = format!("{schema}.{table} was truncated, read its rows again");
                    return buffer.frames.extend(self.gap(&why, Some(cache.cursor(base))));
                }
                Disposition::Lost(why) => return self.add_gap(relation, why, cache.cursor(base), buffer),
                Disposition::Wanted(access) => access,
            };
        if buffer.budget.is_none() {
            buffer.budget = self.members.budget();
        }
        let role = self.subscription.identity().claims().role();
        let exact = self.key.codec.encoding().includes_cursor();
        let mut messages =
            buffer.wanted.chunk_by(|one, other| message_key(one) == message_key(other)).peekable();
        while let Some(bindings) = messages.next() {
            let select = bindings[0].0;
            let Some(meaning) = bindings.iter().map(|(_, meaning, _)| *meaning).max() else {
                continue;
            };
            buffer.ids.clear();
            buffer.ids.extend(bindings.iter().map(|(_, _, id)| *id));
            let is_last = exact && is_last && messages.peek().is_none();
            let view = View { relation, access, select, meaning, exact, is_last };
            let codec = &self.key.codec;
            let Some(budget) = &buffer.budget else { return };
            match cache.frame(codec, &buffer.ids, change, (role, view, base), budget, &mut buffer.recent) {
                Ok(frame) => buffer.frames.push(frame),
                Err(EncodeError::Unreadable) => {}
                Err(EncodeError::NoRoom) => buffer.has_no_room = true,
            }
        }
    }

    /// Decides how a change concerns the group. Fills `wanted` in the order of the messages.
    fn classify<'a>(
        &'a self,
        candidate: &Candidate,
        (change, is_older): (&Change, bool),
        relation: &'a Relation,
        verdicts: &Verdicts,
        wanted: &mut Vec<Wanted<'a>>,
    ) -> Disposition<'a> {
        wanted.clear();
        if self.key.since.as_ref().is_some_and(|since| since.has(change.xid, change.number)) {
            return Disposition::Nothing;
        }
        let Some(access) = relation.access(self.subscription.identity().claims().role()) else {
            return Disposition::Nothing;
        };
        if change.operation == Operation::Truncate {
            return Disposition::Truncated;
        }
        if let Some(loss) = change.loss() {
            return loss.text().map_or(Disposition::Nothing, Disposition::Lost);
        }
        let policy = match verdicts.policy(candidate) {
            Verdict::Visibility(visibility) => visibility,
            Verdict::Lost(why) => return Disposition::Lost(why),
        };
        for binding in self.subscription.concerning(relation) {
            let visibility = match &binding.filter {
                None => policy,
                Some(filter) if filter.is_usable(relation, access) => {
                    match verdicts.filter(candidate, access, filter) {
                        Verdict::Visibility(matches) => policy.and(matches),
                        Verdict::Lost(why) => return Disposition::Lost(why),
                    }
                }
                Some(_) => continue,
            };
            let Some(meaning) = event_kind(change.operation, visibility, relation.leave_events) else {
                continue;
            };
            if wants(binding, meaning) {
                wanted.push((binding.select.as_deref(), meaning, binding.id));
            }
        }
        if wanted.is_empty() {
            return Disposition::Nothing;
        }
        if is_older {
            return Disposition::Lost(WIDENED);
        }
        wanted.sort_by_key(message_key);
        Disposition::Wanted(access)
    }

    /// Queues the frames of the buffer for all channels as part of a unit and moves their own position, if they have
    /// one, to `end`. Returns the number of frames queued. A client without room is closed, because continuing would
    /// lose changes.
    pub fn send(&self, unit: Unit, buffer: &mut FrameBuffer<'_>, end: Option<&Arc<Cursor>>) -> usize {
        if buffer.frames.is_empty() && !buffer.has_no_room {
            return 0;
        }
        let has_room = !buffer.has_no_room && buffer.budget.as_ref().is_none_or(|budget| budget.make_room(0));
        self.members.deliver(unit, &mut buffer.frames, has_room, end)
    }

    /// Adds a gap for a change that cannot be delivered, once per relation and batch.
    fn add_gap(&self, relation: &Relation, why: &str, cursor: &str, buffer: &mut FrameBuffer<'_>) {
        if !buffer.lost.contains(&relation.id()) {
            buffer.lost.push(relation.id());
            let why = format!("{}.{}: {why}, read its rows again", relation.schema, relation.table);
            buffer.frames.extend(self.gap(&why, Some(cursor)));
        }
    }

    /// Sends a gap before this cursor, if it is known, to all channels.
    pub fn send_gap(&self, why: &str, cursor: Option<&str>) {
        if let Some(gap) = self.gap(why, cursor) {
            self.members.for_each(|_, outbox| outbox.push(gap.clone()));
        }
    }

    /// Reports once per channel that the relation's policy raises an error for its claims, so that nothing is shown.
    pub fn send_policy_error(&self, relation: &Relation) {
        let (schema, table) = (&relation.schema, &relation.table);
        self.members.for_each_once(relation.id(), |outbox| {
            let why = raising(schema, table);
            tracing::info!("{why}");
            let notice = self.key.codec.encoding().policy_error(&why);
            outbox.push(Frame::notice(notice, outbox.budget()));
        });
    }

    /// Reports to all channels that a table shows them no row any more.
    fn send_hidden(&self, why: &str) {
        if let Some(frame) = self.frame(self.key.codec.encoding().hidden(why)) {
            self.members.for_each(|_, outbox| outbox.push(frame.clone()));
        }
    }

    /// Reports to all channels that the feed stalls or continues. Channels without tables are not told: what clients send each other
    /// does not stall.
    pub fn send_stall(&self, stalls: bool) {
        if self.subscription.bindings().is_empty() {
            return;
        }
        let notice = self.key.codec.encoding().stall(stalls);
        if let Some(frame) = notice.and_then(|notice| self.frame(notice)) {
            self.members.for_each(|_, outbox| outbox.push(frame.clone()));
        }
    }

    fn gap(&self, why: &str, cursor: Option<&str>) -> Option<Frame> {
        self.frame(self.key.codec.encoding().gap(why, cursor))
    }

    /// Returns the frame of a notice; `None` without channels.
    fn frame(&self, notice: Notice) -> Option<Frame> {
        Some(Frame::notice(notice, &self.members.budget()?))
    }
}

/// The gap for changes that the current policies show, but those at their time may not have shown.
const WIDENED: &str = "a policy, grant or role was widened after this change was written";

/// The gap for a subscription whose table was changed.
pub const TABLE_CHANGED: &str =
    "a table of this channel was altered, dropped or watched anew, read its rows again";

/// The gap for a cursor from before the table was watched under its name.
pub const NOT_WATCHED: &str =
    "a table was not watched under this name all the time since, read its rows again";

/// The gap for a new token that comes after changes for which the last one had expired.
pub const TOKEN_EXPIRED: &str =
    "something changed after the last token had ended and before this one came, read the rows again";

fn wants(binding: &Binding, meaning: EventKind) -> bool {
    match binding.events {
        Events::All => true,
        Events::Only(operation) => operation == meaning.operation(),
    }
}
