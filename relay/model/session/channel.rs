//! One channel of a session: from its join, which is answered once it is bound, to the end of its delivery.

use std::collections::HashSet;

use crate::model::log::cursor::Cursor;
use crate::model::policy::visibility::Identity;
use crate::model::session::action::Action;
use crate::model::session::join::Join;
use crate::model::session::member::MembershipOptions;
use crate::model::session::message::{ChannelName, Origin, Outgoing, Reference, Response, SessionEvent};
use crate::model::session::private::Private;
use crate::model::subscription::error::SubscribeError;
use crate::model::subscription::request::Request;

/// The id of a joined channel. Unique in the process and never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChannelId {
    /// The session's number.
    pub session: u64,
    /// The channel's number in the session.
    pub channel: u32,
}

/// The outcome of an attempt to bind a channel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BindOutcome {
    /// The errors of refused entries; the others are bound.
    pub refusals: Vec<SubscribeError>,
    /// The tables that show the channel's role no row: why, and what to do.
    pub hidden: Vec<String>,
}

/// The state of a channel. Its topic is the key under which the session keeps it.
#[derive(Debug)]
pub struct Channel {
    pub(super) id: ChannelId,
    /// The reference of its join.
    pub(super) join: Reference,
    pub(super) identity: Identity,
    pub(super) attempt: u32,
    /// Approximate size of the kept topic, filters and token, in bytes.
    pub(super) bytes: usize,
    /// Whether the router delivers changes to it.
    pub(super) delivering: bool,
    /// Whether the router delivers nothing but broadcasts from the database to it.
    listening: bool,
    /// Whether its client may resume it: then it is bound before its join is answered, so that it has a position.
    resumable: bool,
    /// Whether its broadcasts are answered.
    pub(super) acknowledges: bool,
    /// What it may do, if it is private.
    pub(super) private: Option<Box<Private>>,
    requests: Vec<Request>,
    /// The errors of entries that could not be parsed.
    malformed: Vec<SubscribeError>,
    /// The join, until it is answered.
    unanswered: Option<Box<UnansweredJoin>>,
    /// Whether changes are events named after their operation.
    by_operation: bool,
    /// The cursor after which its changes begin, until they do.
    since: Option<Box<Cursor>>,
}

/// What the answer to a join depends on.
#[derive(Debug)]
struct UnansweredJoin {
    reference: Reference,
    entries: Vec<String>,
    waits: bool,
    membership: MembershipOptions,
}

impl Channel {
    /// Creates the channel of a join and returns its first actions.
    pub(super) fn open(
        id: ChannelId,
        origin: &Origin,
        identity: Identity,
        join: Join,
        resumable: bool,
    ) -> (Self, Vec<Action>) {
        let Origin { channel: ChannelName { topic, join: join_reference }, reference } = origin.clone();
        let unanswered = UnansweredJoin {
            reference,
            entries: join.entries,
            waits: join.waits,
            membership: join.membership,
        };
        let mut channel = Self {
            id,
            join: join_reference,
            identity,
            attempt: 0,
            bytes: join.bytes,
            delivering: false,
            listening: false,
            resumable,
            acknowledges: join.acknowledges,
            private: join.private_channel.map(|name| Box::new(Private::new(name, join.recall))),
            requests: join.requests,
            malformed: join.malformed,
            unanswered: Some(Box::new(unanswered)),
            by_operation: join.by_operation,
            since: join.since.map(Box::new),
        };
        let first = match channel.judge(false) {
            Some(judge) => vec![judge],
            None => channel.begin(&topic),
        };
        (channel, first)
    }

    /// Begins to bind the channel. A join without valid requests is answered at once, unless the channel is resumable.
    pub(super) fn begin(&mut self, topic: &str) -> Vec<Action> {
        if self.is_bound() {
            return vec![self.bind()];
        }
        // Before the answer, so that nothing is missed after it. Who gets earlier broadcasts begins after those.
        let mut answer: Vec<Action> = self.listen().into_iter().collect();
        let accepted = self.accept_join(topic);
        match self.private.as_ref().is_some_and(|private| private.has_recalled) {
            true => answer.splice(0..0, accepted).for_each(drop),
            false => answer.extend(accepted),
        }
        if !self.malformed.is_empty() {
            answer.extend(self.outcome(topic, &self.malformed).into_iter().map(Action::Send));
        }
        answer
    }

    /// Starts to judge what a private channel may read; `None` if it is public.
    pub(super) fn judge(&mut self, is_recheck: bool) -> Option<Action> {
        let private = self.private.as_mut()?;
        let (judgement, name) = (private.begin(), private.name.clone());
        Some(Action::Judge { channel: self.id, judgement, identity: self.identity.clone(), name, is_recheck })
    }

    /// Whether its join was answered.
    pub(super) fn is_answered(&self) -> bool {
        self.unanswered.is_none()
    }

    /// Whether its subscription is bound.
    pub(super) fn is_bound(&self) -> bool {
        !self.requests.is_empty() || (self.resumable && self.hears_topic())
    }

    /// Whether it gets the broadcasts from the database to its topic.
    pub(super) fn hears_topic(&self) -> bool {
        self.private.as_ref().is_none_or(|private| private.read.broadcast)
    }

    /// Starts delivery of broadcasts from the database with its current identity, if it gets them.
    pub(super) fn listen(&mut self) -> Option<Action> {
        self.listening = self.hears_topic();
        self.listening.then(|| Action::Listen { channel: self.id, identity: self.identity.clone() })
    }

    /// Delivers to its current identity what it may get now.
    pub(super) fn renew(&mut self) -> Vec<Action> {
        match (self.is_bound(), self.hears_topic()) {
            (true, _) => vec![self.bind()],
            (false, true) => self.listen().into_iter().collect(),
            (false, false) => self.end_delivery(Vec::new()),
        }
    }

    /// Starts a new attempt to bind the channel.
    pub(super) fn bind(&mut self) -> Action {
        self.attempt += 1;
        Action::Bind {
            channel: self.id,
            attempt: self.attempt,
            identity: self.identity.clone(),
            requests: self.requests.clone(),
        }
    }

    /// Handles the outcome of the current attempt. An error means that nothing is bound.
    ///
    /// # Errors
    /// The refusal for which the join fails. The channel ends then.
    pub(super) fn bound(
        &mut self,
        topic: &str,
        outcome: Result<BindOutcome, SubscribeError>,
    ) -> Result<Vec<Action>, SubscribeError> {
        let is_bound = outcome.is_ok();
        let mut refusals = self.malformed.clone();
        let BindOutcome { refusals: refused, hidden } = outcome
            .unwrap_or_else(|refusal| BindOutcome { refusals: vec![refusal], ..BindOutcome::default() });
        refusals.extend(refused);
        if !refusals.is_empty() && self.unanswered.as_ref().is_some_and(|join| join.waits) {
            return Err(refusals.swap_remove(0));
        }
        let mut actions = self.accept_join(topic);
        let mut greeting = self.outcome(topic, &refusals);
        greeting.extend(hidden.into_iter().map(|why| self.message(topic, SessionEvent::Hidden(why))));
        if !is_bound {
            actions.extend(self.end_delivery(greeting));
            actions.extend(self.listen());
            return Ok(actions);
        }
        (self.delivering, self.listening) = (true, false);
        actions.push(Action::Join {
            channel: self.id,
            topic: topic.to_owned(),
            by_operation: self.by_operation,
            since: self.since.take(),
            greeting,
        });
        Ok(actions)
    }

    /// Returns the reply that refuses the join; `None` if it was answered before.
    pub(super) fn refuse_join(&mut self, topic: &str, reason: String) -> Option<Outgoing> {
        let join = self.unanswered.take()?;
        Some(self.message(topic, SessionEvent::Reply(join.reference, Response::Refused(reason))))
    }

    /// Ends the channel and sends these events after the last change.
    pub(super) fn end(mut self, topic: &str, events: impl IntoIterator<Item = SessionEvent>) -> Vec<Action> {
        let farewell = events.into_iter().map(|event| self.message(topic, event)).collect();
        self.exit(farewell)
    }

    /// Ends the channel when its socket is closed.
    pub(super) fn drop_silently(mut self) -> Vec<Action> {
        self.exit(Vec::new())
    }

    /// Ends the channel and sends the reply to a leave after the last change.
    pub(super) fn leave(mut self, topic: &str, reply: Outgoing) -> Vec<Action> {
        let closed = self.message(topic, SessionEvent::Closed);
        self.exit(vec![reply, closed])
    }

    /// Ends the membership of the topic, then delivery.
    fn exit(&mut self, farewell: Vec<Outgoing>) -> Vec<Action> {
        let is_member = self.is_answered();
        let exit = is_member.then_some(Action::Exit { channel: self.id });
        exit.into_iter().chain(self.end_delivery(farewell)).collect()
    }

    /// Ends delivery and sends the messages after the last change. Without changes, sends them at once.
    fn end_delivery(&mut self, farewell: Vec<Outgoing>) -> Vec<Action> {
        if std::mem::take(&mut self.delivering) {
            return vec![Action::Leave { channel: self.id, farewell }];
        }
        let farewell = farewell.into_iter().map(Action::Send);
        let leave = std::mem::take(&mut self.listening)
            .then(|| Action::Leave { channel: self.id, farewell: Vec::new() });
        farewell.chain(leave).collect()
    }

    /// Returns the reply that accepts the join, and makes the channel a member of its topic; nothing if it was answered before.
    fn accept_join(&mut self, topic: &str) -> Vec<Action> {
        let Some(join) = self.unanswered.take() else { return Vec::new() };
        let UnansweredJoin { reference, entries, membership, .. } = *join;
        let reply = self.message(topic, SessionEvent::Reply(reference, Response::Joined(entries)));
        let name = ChannelName { topic: topic.to_owned(), join: self.join.clone() };
        let private = self.private.as_ref().map(|private| private.read);
        vec![Action::Send(reply), Action::Enter { channel: self.id, name, membership, private }]
    }

    /// Returns the messages with the outcome of the subscription: each distinct error once, or success if there is none.
    fn outcome(&self, topic: &str, refusals: &[SubscribeError]) -> Vec<Outgoing> {
        if self.requests.is_empty() && self.malformed.is_empty() {
            return Vec::new();
        }
        if refusals.is_empty() {
            return vec![self.message(topic, SessionEvent::Subscribed)];
        }
        let mut seen = HashSet::new();
        refusals
            .iter()
            .filter(|refusal| seen.insert(refusal.to_string()))
            .map(|refusal| self.message(topic, SessionEvent::NotSubscribed(refusal.clone())))
            .collect()
    }

    fn message(&self, topic: &str, event: SessionEvent) -> Outgoing {
        Outgoing { channel: ChannelName { topic: topic.to_owned(), join: self.join.clone() }, event }
    }
}
