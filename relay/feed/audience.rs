//! Channels that get the same frames, and how a change becomes one frame for all of them.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::feed::gate::{Candidate, Verdict, Verdicts};
use crate::feed::members::Members;
use crate::feed::outbox::Outbox;
use crate::model::change::{Change, Operation, RelationId};
use crate::model::cursor::{Cursor, Snapshot, Span};
use crate::model::delivery::{View, data};
use crate::model::dress::{Dress, with_cursor};
use crate::model::policy::{Meaning, meaning};
use crate::model::relation::{Catalog, Relation};
use crate::model::session::ChannelId;
use crate::model::subscription::{Binding, Events, Subscription};

/// A channel's place among the audiences.
pub struct Registration {
    /// How its frames are written.
    pub dress: Dress,
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
pub struct AudienceKey {
    /// How frames are written.
    pub dress: Dress,
    /// What is received.
    pub subscription: Subscription,
    /// What its channels have already, when that is more than what was delivered to the others.
    pub since: Option<Cursor>,
}

/// Channels with the same dress, claims and bindings; a copy is the same audience.
#[derive(Clone)]
pub struct Audience {
    key: Arc<AudienceKey>,
    subscription: Subscription,
    members: Arc<Members>,
}

/// Texts of one change that were written already, for the next audience that gets the same.
pub struct Written<'a> {
    /// Where a reader is after the change, written when it is first asked for.
    cursor: OnceCell<String>,
    /// The same for readers who had seen more than what lies before the page.
    based: HashMap<&'a Snapshot, String>,
    after: (&'a Span, i64, bool),
    data: HashMap<(DataKey<'a>, bool), Option<Arc<str>>>,
    frames: HashMap<FrameKey<'a>, Bytes>,
    /// The frame used last, which as a rule is the next one too.
    last: Option<(FrameKey<'a>, Bytes)>,
}

/// What is being put together for one audience; kept for its allocations.
#[derive(Default)]
pub struct Desk<'a> {
    /// What the bindings want of the change at hand: columns, meaning, id.
    wanted: Vec<(Option<&'a [String]>, Meaning, u32)>,
    ids: Vec<u32>,
    /// Relations of which a change was lost.
    lost: Vec<RelationId>,
    /// The frames of the part so far.
    frames: Vec<Bytes>,
}

impl Desk<'_> {
    /// For the next audience.
    pub fn clear(&mut self) {
        self.lost.clear();
        self.frames.clear();
    }
}

/// What the text of a change depends on: rights, selected columns, meaning, and what the cursor in it says that the
/// reader had seen whole, when that is more than what lies before the page.
type DataKey<'a> = (&'a str, Option<&'a [String]>, Meaning, Option<&'a Snapshot>);

/// What a frame depends on: where it goes, the ids it names, the text it holds.
type FrameKey<'a> = (&'a Dress, Vec<u32>, DataKey<'a>);

impl<'a> Written<'a> {
    /// Nothing yet of the change of this number on a page; `last` when nothing of the page comes after it.
    pub fn new(span: &'a Span, number: i64, last: bool) -> Self {
        let after = (span, number, last);
        let (cursor, based) = (OnceCell::new(), HashMap::new());
        Self { cursor, based, after, data: HashMap::new(), frames: HashMap::new(), last: None }
    }

    /// What a reader with this position had seen whole, when its cursors have to say so.
    fn base(&self, position: Option<&'a Cursor>) -> Option<&'a Snapshot> {
        position.and_then(|position| self.after.0.base(position))
    }

    fn cursor(&mut self, base: Option<&'a Snapshot>) -> &str {
        let (span, number, last) = self.after;
        match base {
            None => self.cursor.get_or_init(|| span.after(number, last).to_string()),
            Some(seen) => self.based.entry(seen).or_insert_with(|| {
                span.after(number, last).and(&Cursor::after(span.epoch, seen.clone())).to_string()
            }),
        }
    }
}

impl Audience {
    /// With its first channel.
    pub fn new(key: Arc<AudienceKey>, channel: ChannelId, outbox: Arc<Outbox>) -> Self {
        let subscription = key.subscription.clone();
        Self { key, subscription, members: Arc::new(Members::new(channel, outbox)) }
    }

    /// What its channels have in common.
    pub fn key(&self) -> &Arc<AudienceKey> {
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
        let (dress, since) = (self.key.dress.clone(), Some(position.clone()));
        members.begin_at(Arc::new(position));
        let key = Arc::new(AudienceKey { dress, subscription: subscription.clone(), since });
        Self { key, subscription, members }
    }

    /// Its channels let go, each as it would be registered with what it has.
    pub fn into_registrations(
        self,
        since: Option<Cursor>,
    ) -> impl Iterator<Item = (ChannelId, Registration)> {
        let Self { key, subscription, members } = self;
        let missed = members.missed();
        members.take().into_iter().map(move |(channel, outbox)| {
            let (dress, since, subscription) = (key.dress.clone(), since.clone(), subscription.clone());
            (channel, Registration { dress, subscription, since, outbox, missed })
        })
    }

    /// What its channels get.
    pub fn subscription(&self) -> &Subscription {
        &self.subscription
    }

    /// Up to where its channels were told everything when `here` is what was delivered to all who are told together.
    pub fn position(&self, here: &Cursor) -> Cursor {
        match (self.members.position(), &self.key.since) {
            (Some(position), _) => Cursor::clone(&position),
            (None, Some(since)) => here.and(since),
            (None, None) => here.clone(),
        }
    }

    /// Whoever subscribed to a relation that is not watched any more, or watched anew, or has another name or other
    /// types than a filter was read with, would wait for ever: such channels are told of a gap and bound anew, and then
    /// told again, because of what comes in between.
    /// Whoever subscribed to a whole schema is told of what was there `before` and is not any more.
    ///
    /// `here` is up to where everything was delivered to all.
    pub fn leave_what_is_gone(&self, before: Option<&Catalog>, catalog: &Catalog, here: Option<&Cursor>) {
        if self.subscription.is_stale(catalog) {
            self.tell_gap(ALTERED, &self.reached(here));
            self.members.misses(ALTERED);
            self.members.each(|channel, outbox| outbox.rebind(channel));
        } else if before.is_some_and(|before| self.subscription.loses(before, catalog)) {
            self.tell_gap(ALTERED, &self.reached(here));
        }
    }

    /// Whether it is told on its own, and has everything up to here.
    pub fn has_reached(&self, here: &Cursor) -> bool {
        self.members.position().is_some_and(|position| position.is_at_or_after(here))
    }

    fn reached(&self, here: Option<&Cursor>) -> String {
        here.map_or_else(String::new, |here| self.position(here).to_string())
    }

    /// Adds what one change is to this audience, a candidate for it, to the frames on the desk.
    pub fn write<'a>(
        &'a self,
        candidate: &Candidate,
        change: &Change,
        relation: &'a Relation,
        verdicts: &Verdicts,
        written: &mut Written<'a>,
        desk: &mut Desk<'a>,
    ) {
        if self.key.since.as_ref().is_some_and(|since| since.has(change.xid, change.number)) {
            return;
        }
        let role = self.subscription.identity().claims().role();
        let Some(access) = relation.access(role) else {
            return;
        };
        let base = written.base(self.key.since.as_ref());
        if change.operation == Operation::Truncate {
            let why = format!("{}.{} was truncated, read its rows again", relation.schema, relation.table);
            desk.frames.push(self.gap(&why, written.cursor(base)));
            return;
        }
        desk.wanted.clear();
        let policy = match verdicts.policy(candidate) {
            Verdict::Sight(sight) => sight,
            Verdict::Lost(why) => return self.lose(relation, why, written.cursor(base), desk),
        };
        for binding in self.subscription.concerning(relation) {
            let sight = match &binding.filter {
                None => policy,
                Some(filter) if filter.is_usable(relation, access) => {
                    match verdicts.filter(candidate, access, filter) {
                        Verdict::Sight(matches) => policy.and(matches),
                        Verdict::Lost(why) => return self.lose(relation, why, written.cursor(base), desk),
                    }
                }
                Some(_) => continue,
            };
            let Some(meaning) = meaning(change.operation, sight, relation.leave_events) else {
                continue;
            };
            if wants(binding, meaning) {
                desk.wanted.push((binding.select.as_deref(), meaning, binding.id));
            }
        }
        // One message per channel, naming all ids; bindings that select different columns need different messages.
        // Likewise one binding that loses the row from another that keeps it.
        let kind = |(select, meaning, _): &(Option<&'a [String]>, Meaning, u32)| {
            (*select, *meaning <= Meaning::Delete)
        };
        desk.wanted.sort_by_key(kind);
        for group in desk.wanted.chunk_by(|one, other| kind(one) == kind(other)) {
            let select = group[0].0;
            let Some(meaning) = group.iter().map(|(_, meaning, _)| *meaning).max() else {
                continue;
            };
            desk.ids.clear();
            desk.ids.extend(group.iter().map(|(_, _, id)| *id));
            let dress = &self.key.dress;
            let exact = dress.tells_cursor();
            let key: DataKey<'a> = (role, select, meaning, base.filter(|_| exact));
            if let Some(((last_dress, ids, last), frame)) = &written.last
                && (*last_dress, ids, *last) == (dress, &desk.ids, key)
            {
                desk.frames.push(frame.clone());
                continue;
            }
            let view = View { relation, access, select, meaning, exact };
            let cursor = if exact { written.cursor(base).to_owned() } else { String::new() };
            let text = written.data.entry((key, exact)).or_insert_with(|| {
                let text = data(change, view)?;
                Some(if exact { with_cursor(&text, &cursor).into() } else { text.into() })
            });
            let Some(text) = text else { continue };
            let key: FrameKey<'a> = (dress, desk.ids.clone(), key);
            let frame = written
                .frames
                .entry(key.clone())
                .or_insert_with_key(|(dress, ids, _)| self.counted(dress.change(ids, text, &cursor)));
            desk.frames.push(frame.clone());
            written.last = Some((key, frame.clone()));
        }
    }

    /// Hands what is on the desk to all members, which brings those that are told on their own up to `here`; returns how
    /// many frames that makes.
    pub fn send(&self, desk: &mut Desk<'_>, here: Option<&Arc<Cursor>>) -> usize {
        match desk.frames.is_empty() {
            true => 0,
            false => self.members.deliver(&mut desk.frames, here),
        }
    }

    /// A change that this audience might have had to be told cannot be told: says so, once per relation and part.
    fn lose(&self, relation: &Relation, why: &str, cursor: &str, desk: &mut Desk<'_>) {
        if !desk.lost.contains(&relation.id()) {
            desk.lost.push(relation.id());
            let why = format!("{}.{}: {why}, read its rows again", relation.schema, relation.table);
            desk.frames.push(self.gap(&why, cursor));
        }
    }

    /// Tells all members that changes are missing before the cursor.
    pub fn tell_gap(&self, why: &str, cursor: &str) {
        let gap = Bytes::from(self.key.dress.gap(why, cursor));
        self.members.each(|_, outbox| outbox.push(gap.clone()));
    }

    /// The claims of all members make the policy of the relation raise, so that it shows them nothing: says so, once.
    pub fn tell_raising(&self, relation: &Relation) {
        let (schema, table) = (&relation.schema, &relation.table);
        self.members.each_once(relation.id(), |outbox| {
            tracing::info!(
                relation.name = table,
                "a policy raises an error for the claims of a reader: nothing is shown"
            );
            let why = format!(
                "the policy of {schema}.{table} raises an error for the claims of this token, nothing of it is shown"
            );
            outbox.push(self.key.dress.gap(&why, "").into());
        });
    }

    /// Tells all members that nothing comes for now, or that it goes on.
    pub fn tell_stall(&self, stalls: bool) {
        if let Some(frame) = self.key.dress.stall(stalls).map(Bytes::from) {
            self.members.each(|_, outbox| outbox.push(frame.clone()));
        }
    }

    fn gap(&self, why: &str, cursor: &str) -> Bytes {
        self.counted(self.key.dress.gap(why, cursor))
    }

    /// A frame for the members and for others.
    fn counted(&self, frame: String) -> Bytes {
        self.members.counted(frame)
    }
}

/// What is told to whoever subscribed to a table that is another now.
pub const ALTERED: &str = "a table of this channel was altered, dropped or watched anew, read its rows again";

/// What is told to whoever goes on with a new token after something came for which the last one was too old.
pub const BETWEEN: &str =
    "something changed after the last token had ended and before this one came, read the rows again";

fn wants(binding: &Binding, meaning: Meaning) -> bool {
    match binding.events {
        Events::All => true,
        Events::Only(operation) => match meaning {
            Meaning::Insert => operation == Operation::Insert,
            Meaning::Update | Meaning::Enter => operation == Operation::Update,
            Meaning::Delete | Meaning::Leave => operation == Operation::Delete,
        },
    }
}
