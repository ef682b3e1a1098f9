//! Channels that get the same frames, and how a change becomes one frame for all of them.

use std::sync::Arc;

use bytes::Bytes;

use crate::feed::authorize::gate::{Candidate, Reader, Verdict, Verdicts};
use crate::feed::deliver::encode_cache::{EncodeCache, Kept, Unwritten};
use crate::feed::deliver::frame::Frame;
use crate::feed::deliver::members::Members;
use crate::feed::deliver::memory_budget::MemoryBudget;
use crate::feed::deliver::outbox::{Outbox, Unit};
use crate::model::catalog::relation::{Access, Catalog, Relation, Widening};
use crate::model::codec::event::Codec;
use crate::model::codec::payload::View;
use crate::model::log::cursor::Cursor;
use crate::model::policy::visibility::{EventKind, event_kind};
use crate::model::row::change::{Change, Operation, RelationId};
use crate::model::session::machine::ChannelId;
use crate::model::subscription::binding::{Binding, Events, Subscription};
use crate::model::subscription::error::raising;

/// A channel's place among the audiences.
pub struct Subscriber {
    /// How its frames are written.
    pub codec: Codec,
    /// What it receives.
    pub subscription: Subscription,
    /// What it has already, when that is more than what was delivered to the others.
    pub since: Option<Cursor>,
    /// Where frames go.
    pub outbox: Arc<Outbox>,
    /// Why something was not told to it, which it is to hear of when it goes on.
    pub missed: Option<&'static str>,
}

/// What makes channels one audience: they get the same frames.
#[derive(PartialEq, Eq, Hash)]
pub struct GroupKey {
    /// How frames are written.
    pub codec: Codec,
    /// What is received.
    pub subscription: Subscription,
    /// What its channels have already, when that is more than what was delivered to the others.
    pub since: Option<Cursor>,
}

/// Channels with the same dress, claims and bindings; a copy is the same audience.
#[derive(Clone)]
pub struct SubscriberGroup {
    key: Arc<GroupKey>,
    subscription: Subscription,
    members: Arc<Members>,
}

/// What a binding wants of a change: columns, meaning, id.
type Wanted<'a> = (Option<&'a [String]>, EventKind, u32);

/// One message per channel, naming all ids; bindings that select different columns need different messages. Likewise one
/// binding that loses the row from another that keeps it.
fn kind<'a>((select, meaning, _): &Wanted<'a>) -> (Option<&'a [String]>, bool) {
    (*select, *meaning <= EventKind::Delete)
}

/// What a change is to an audience.
enum Weighed<'a> {
    /// It is not told.
    Nothing,
    /// All rows went at once.
    Truncated,
    /// It cannot be told, and why.
    Lost(&'static str),
    /// Some bindings want it, with these rights.
    Wanted(&'a Access),
}

/// What is being put together for one audience; kept for its allocations.
#[derive(Default)]
pub struct FrameBuffer<'a> {
    /// What the bindings want of the change at hand.
    wanted: Vec<Wanted<'a>>,
    ids: Vec<u32>,
    /// Relations of which a change was lost.
    lost: Vec<RelationId>,
    /// The frames of the part so far.
    frames: Vec<Frame>,
    /// There was no room in memory for one of them.
    has_no_room: bool,
    /// Payloads for the next audience.
    kept: Kept,
    /// What frames count for.
    budget: Option<Arc<MemoryBudget>>,
}

impl FrameBuffer<'_> {
    /// For the next audience.
    pub fn clear(&mut self) {
        self.lost.clear();
        self.frames.clear();
        self.has_no_room = false;
    }
}

impl SubscriberGroup {
    /// With its first channel.
    pub fn new(key: Arc<GroupKey>, channel: ChannelId, outbox: Arc<Outbox>) -> Self {
        let subscription = key.subscription.clone();
        Self { key, subscription, members: Arc::new(Members::new(channel, outbox)) }
    }

    /// What its channels have in common.
    pub fn key(&self) -> &Arc<GroupKey> {
        &self.key
    }

    /// Its channels.
    pub fn members(&self) -> &Members {
        &self.members
    }

    /// Takes in another channel. The newest subscription serves all: its filters were read with today's column types.
    pub fn add(&mut self, channel: ChannelId, outbox: Arc<Outbox>, subscription: Subscription) {
        self.subscription = subscription;
        self.members.add(channel, outbox);
    }

    /// The same channels, told on their own from this position on.
    pub fn beginning_at(&self, position: Cursor) -> Self {
        let Self { subscription, members, .. } = self.clone();
        let (codec, since) = (self.key.codec.clone(), Some(position.clone()));
        members.begin_at(Arc::new(position));
        let key = Arc::new(GroupKey { codec, subscription: subscription.clone(), since });
        Self { key, subscription, members }
    }

    /// Its channels let go, each as it would be registered with what it has.
    pub fn into_registrations(self, since: Option<Cursor>) -> impl Iterator<Item = (ChannelId, Subscriber)> {
        let Self { key, subscription, members } = self;
        let missed = members.missed();
        members.take().into_iter().map(move |(channel, outbox)| {
            let (codec, since, subscription) = (key.codec.clone(), since.clone(), subscription.clone());
            (channel, Subscriber { codec, subscription, since, outbox, missed })
        })
    }

    /// What its channels get.
    pub fn subscription(&self) -> &Subscription {
        &self.subscription
    }

    /// It as the gate knows it. Where it is of several sessions, one of them stands for all.
    pub fn reader(&self) -> Reader<'_> {
        let session = self.members.first().map_or(0, |channel| channel.session);
        Reader { subscription: &self.subscription, session }
    }

    /// Up to where its channels were told everything when `here` is what was delivered to all who are told together.
    pub fn position(&self, here: &Cursor) -> Cursor {
        match (self.members.position(), &self.key.since) {
            (Some(position), _) => Cursor::clone(&position),
            (None, Some(since)) => here.merge(since),
            (None, None) => here.clone(),
        }
    }

    /// Whether all of its clients are closed: nothing more is to be written for them.
    pub fn is_over(&self) -> bool {
        self.members.are_over()
    }

    /// Whoever subscribed to a relation that is not watched any more, or watched anew, or has another name or other
    /// types than a filter was read with, would wait for ever: such channels are told of a gap and bound anew, and then
    /// told again, because of what comes in between.
    /// Whoever subscribed to a whole schema is told of what was there `before` and is not any more.
    /// Channels of which an entry was refused that may be bound now are bound anew, and told because of what they did not
    /// hear of before.
    ///
    /// `here` is up to where everything was delivered to all.
    pub fn apply_catalog(&self, before: Option<&Catalog>, catalog: &Catalog, here: Option<&Cursor>) {
        if self.subscription.is_stale(catalog) {
            self.send_gap(ALTERED, &self.reached(here));
            self.members.misses(ALTERED);
            self.members.each(|channel, outbox| outbox.rebind(channel));
        } else if before.is_some_and(|before| self.subscription.loses(before, catalog)) {
            self.send_gap(ALTERED, &self.reached(here));
        }
        for lack in self.subscription.lacks(before, catalog) {
            self.send_gap(&lack, &self.reached(here));
        }
        if self.subscription.may_be_lifted(catalog) {
            self.members.misses(ALTERED);
            self.members.each(|channel, outbox| outbox.rebind(channel));
        }
    }

    /// Whether it is told on its own, and has everything up to here.
    pub fn has_reached(&self, here: &Cursor) -> bool {
        self.members.position().is_some_and(|position| position.is_at_or_after(here))
    }

    fn reached(&self, here: Option<&Cursor>) -> String {
        here.map_or_else(String::new, |here| self.position(here).to_string())
    }

    /// Whether it has come less far than a widening of what its role may see.
    pub fn stood_before(&self, widening: &Widening) -> bool {
        widening.is_for(self.subscription.identity().claims().role())
            && self.key.since.as_ref().is_none_or(|since| widening.is_after(since.seen()))
    }

    /// Whether it gets messages of a change, a candidate for it.
    pub fn gets<'a>(
        &'a self,
        candidate: &Candidate,
        change: (&Change, bool),
        relation: &'a Relation,
        verdicts: &Verdicts,
        desk: &mut FrameBuffer<'a>,
    ) -> bool {
        matches!(self.weigh(candidate, change, relation, verdicts, &mut desk.wanted), Weighed::Wanted(_))
    }

    /// Whether it may get changes of one of these relations.
    pub fn concerns(&self, catalog: &Catalog, relations: &[RelationId]) -> bool {
        let mut relations = relations.iter().filter_map(|id| catalog.relation(*id));
        relations.any(|relation| self.subscription.concerning(relation).next().is_some())
    }

    /// Adds what one change is to this audience, a candidate for it, to the frames on the desk. The last of them is marked
    /// if the change `is_last`: nothing else of its transaction comes to the audience.
    pub fn write<'a>(
        &'a self,
        candidate: &Candidate,
        (change, is_older, is_last): (&Change, bool, bool),
        relation: &'a Relation,
        verdicts: &Verdicts,
        written: &mut EncodeCache<'a>,
        desk: &mut FrameBuffer<'a>,
    ) {
        let base = written.base(self.key.since.as_ref());
        let access = match self.weigh(candidate, (change, is_older), relation, verdicts, &mut desk.wanted) {
            Weighed::Nothing => return,
            Weighed::Truncated => {
                let (schema, table) = (&relation.schema, &relation.table);
                let why = format!("{schema}.{table} was truncated, read its rows again");
                return desk.frames.extend(self.gap(&why, written.cursor(base)));
            }
            Weighed::Lost(why) => return self.lose(relation, why, written.cursor(base), desk),
            Weighed::Wanted(access) => access,
        };
        if desk.budget.is_none() {
            desk.budget = self.members.budget();
        }
        let role = self.subscription.identity().claims().role();
        let exact = self.key.codec.tells_cursor();
        let mut groups = desk.wanted.chunk_by(|one, other| kind(one) == kind(other)).peekable();
        while let Some(group) = groups.next() {
            let select = group[0].0;
            let Some(meaning) = group.iter().map(|(_, meaning, _)| *meaning).max() else {
                continue;
            };
            desk.ids.clear();
            desk.ids.extend(group.iter().map(|(_, _, id)| *id));
            let is_last = exact && is_last && groups.peek().is_none();
            let view = View { relation, access, select, meaning, exact, is_last };
            let codec = &self.key.codec;
            let Some(budget) = &desk.budget else { return };
            match written.frame(codec, &desk.ids, change, (role, view, base), budget, &mut desk.kept) {
                Ok(frame) => desk.frames.push(frame),
                Err(Unwritten::Unreadable) => {}
                Err(Unwritten::NoRoom) => desk.has_no_room = true,
            }
        }
    }

    /// What a change is to this audience; `wanted` is what its bindings want of it, in the order of their messages.
    fn weigh<'a>(
        &'a self,
        candidate: &Candidate,
        (change, is_older): (&Change, bool),
        relation: &'a Relation,
        verdicts: &Verdicts,
        wanted: &mut Vec<Wanted<'a>>,
    ) -> Weighed<'a> {
        wanted.clear();
        if self.key.since.as_ref().is_some_and(|since| since.has(change.xid, change.number)) {
            return Weighed::Nothing;
        }
        let Some(access) = relation.access(self.subscription.identity().claims().role()) else {
            return Weighed::Nothing;
        };
        if change.operation == Operation::Truncate {
            return Weighed::Truncated;
        }
        if let Some(loss) = change.loss() {
            return loss.text().map_or(Weighed::Nothing, Weighed::Lost);
        }
        let policy = match verdicts.policy(candidate) {
            Verdict::Visibility(sight) => sight,
            Verdict::Lost(why) => return Weighed::Lost(why),
        };
        for binding in self.subscription.concerning(relation) {
            let sight = match &binding.filter {
                None => policy,
                Some(filter) if filter.is_usable(relation, access) => {
                    match verdicts.filter(candidate, access, filter) {
                        Verdict::Visibility(matches) => policy.and(matches),
                        Verdict::Lost(why) => return Weighed::Lost(why),
                    }
                }
                Some(_) => continue,
            };
            let Some(meaning) = event_kind(change.operation, sight, relation.leave_events) else {
                continue;
            };
            if wants(binding, meaning) {
                wanted.push((binding.select.as_deref(), meaning, binding.id));
            }
        }
        if wanted.is_empty() {
            return Weighed::Nothing;
        }
        if is_older {
            return Weighed::Lost(WIDENED);
        }
        wanted.sort_by_key(kind);
        Weighed::Wanted(access)
    }

    /// Hands what is on the desk to all members, as belonging to a part, which brings those that are told on their own up
    /// to `here`; returns how many frames that makes. A client without room for it is closed: going on would lose it.
    pub fn send(&self, part: Unit, desk: &mut FrameBuffer<'_>, here: Option<&Arc<Cursor>>) -> usize {
        if desk.frames.is_empty() && !desk.has_no_room {
            return 0;
        }
        let has_room = !desk.has_no_room && desk.budget.as_ref().is_none_or(|budget| budget.make_room(0));
        self.members.deliver(part, &mut desk.frames, has_room, here)
    }

    /// A change that this audience might have had to be told cannot be told: says so, once per relation and part.
    fn lose(&self, relation: &Relation, why: &str, cursor: &str, desk: &mut FrameBuffer<'_>) {
        if !desk.lost.contains(&relation.id()) {
            desk.lost.push(relation.id());
            let why = format!("{}.{}: {why}, read its rows again", relation.schema, relation.table);
            desk.frames.extend(self.gap(&why, cursor));
        }
    }

    /// Tells all members that changes are missing before the cursor.
    pub fn send_gap(&self, why: &str, cursor: &str) {
        let gap = Bytes::from(self.key.codec.gap(why, cursor));
        self.members.each(|_, outbox| outbox.push(gap.clone()));
    }

    /// The claims of all members make the policy of the relation raise, so that it shows them nothing: says so, once.
    pub fn send_policy_error(&self, relation: &Relation) {
        let (schema, table) = (&relation.schema, &relation.table);
        self.members.each_once(relation.id(), |outbox| {
            tracing::info!(
                relation.name = table,
                "a policy raises an error for the claims of a reader: nothing is shown"
            );
            outbox.push(self.key.codec.gap(&raising(schema, table), ""));
        });
    }

    /// Tells all members that nothing comes for now, or that it goes on.
    pub fn send_stall(&self, stalls: bool) {
        if let Some(frame) = self.key.codec.stall(stalls).map(Bytes::from) {
            self.members.each(|_, outbox| outbox.push(frame.clone()));
        }
    }

    fn gap(&self, why: &str, cursor: &str) -> Option<Frame> {
        Some(Frame::whole(self.key.codec.gap(why, cursor), &self.members.budget()?))
    }
}

/// What is told of changes that today's rules show and those of their time may not have shown.
const WIDENED: &str = "a policy, grant or role was widened after this change was written";

/// What is told to whoever subscribed to a table that is another now.
pub const ALTERED: &str = "a table of this channel was altered, dropped or watched anew, read its rows again";

/// What is told to who comes back to a table that was watched, or got its name, after they went.
pub const ANOTHER: &str = "a table was not watched under this name all the time since, read its rows again";

/// What is told to whoever goes on with a new token after something came for which the last one was too old.
pub const BETWEEN: &str =
    "something changed after the last token had ended and before this one came, read the rows again";

fn wants(binding: &Binding, meaning: EventKind) -> bool {
    match binding.events {
        Events::All => true,
        Events::Only(operation) => operation == meaning.operation(),
    }
}
