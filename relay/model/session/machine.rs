//! One client's session as a state machine: its channels, from their joins to their ends. It has no side effects: each input returns
//! the actions to perform.

use std::collections::HashMap;

use crate::model::identity::claims::{Claims, Tokens};
use crate::model::policy::visibility::Identity;
use crate::model::session::action::Action;
use crate::model::session::channel::{Channel, ChannelId};
use crate::model::session::join::{Join, TWO_POSITIONS, disabled, too_large};
use crate::model::session::message::{ClientRequest, Incoming, Origin, Response, SessionEvent};

/// The error for a channel that cannot be bound because PostgreSQL is unavailable. The client may join it again.
pub const UNAVAILABLE: &str =
    "UnableToConnectToProject: Realtime was unable to connect to the project database";

/// The state of a session. Each input returns the actions to perform.
#[derive(Debug)]
pub struct Session {
    number: u64,
    pub(super) connection_identity: Identity,
    // Boxed because a map has spare capacity, and most clients have one channel.
    pub(super) channels: HashMap<String, Box<Channel>>,
    max_channels: usize,
    join_count: u32,
    /// Whether the client may resume its channels.
    resumable: bool,
}

impl Session {
    /// Creates the session of a client that connected with these claims and may join `max_channels`.
    pub fn new(number: u64, claims: Claims, max_channels: usize) -> Self {
        Self {
            number,
            connection_identity: Identity::new(claims),
            channels: HashMap::new(),
            max_channels,
            join_count: 0,
            resumable: false,
        }
    }

    /// Makes its channels resumable: each has a position from its join on.
    #[must_use]
    pub fn resumable(self, resumable: bool) -> Self {
        Self { resumable, ..self }
    }

    /// Returns the number of joined channels.
    pub fn channel_count(&self) -> usize {
        self.channels.len()
    }

    /// Returns the approximate size of all kept topics, filters and tokens, in bytes.
    pub fn bytes(&self) -> usize {
        self.channels.values().map(|channel| channel.bytes).sum()
    }

    /// Returns the identity that the client connected with.
    pub fn connection_identity(&self) -> &Identity {
        &self.connection_identity
    }

    /// Returns the topic of a channel.
    pub fn topic(&self, channel: ChannelId) -> Option<&str> {
        self.channels.iter().find(|(_, state)| state.id == channel).map(|(topic, _)| topic.as_str())
    }

    /// Returns the topic whose broadcasts from the database a channel gets, and whether it is private.
    pub fn heard_topic(&self, channel: ChannelId) -> Option<(&str, bool)> {
        let mut heard = self.channels.iter().filter(|(_, state)| state.hears_topic());
        let (topic, state) = heard.find(|(_, state)| state.id == channel)?;
        Some((topic, state.private.is_some()))
    }

    /// Whether this is a private channel.
    pub fn is_private(&self, channel: ChannelId) -> bool {
        self.channels.values().any(|state| state.id == channel && state.private.is_some())
    }

    /// Handles a message from the client.
    pub fn receive(&mut self, message: Incoming, now: u64, tokens: &impl Tokens) -> Vec<Action> {
        let Incoming { origin, request } = message;
        let is_joined = self.channels.contains_key(&origin.channel.topic);
        match request {
            ClientRequest::Heartbeat => vec![Action::Send(origin.reply(Response::Alive))],
            ClientRequest::Join(join) => self.join(&origin, *join, now, tokens),
            ClientRequest::InvalidJoin(reason) => vec![Action::Send(origin.refusal(reason))],
            ClientRequest::OversizedJoin => vec![Action::Send(origin.refusal(too_large()))],
            ClientRequest::Leave if !is_joined => vec![Action::Send(origin.reply(Response::Left))],
            _ if !is_joined => vec![Action::Send(origin.refusal("unmatched topic"))],
            ClientRequest::Leave => self.leave(&origin),
            ClientRequest::AccessToken(Some(token)) => {
                self.access_token(&origin.channel.topic, &token, tokens)
            }
            ClientRequest::Broadcast(broadcast) => self.broadcast(origin, broadcast),
            ClientRequest::Track(object) => self.track(origin, Some(object)),
            ClientRequest::Untrack => self.track(origin, None),
            ClientRequest::Invalid(reason) => refusal_if_expected(&origin, reason),
            ClientRequest::AccessToken(None) | ClientRequest::Unknown => Vec::new(),
        }
    }

    /// Closes the channel of a topic with a reason. Returns no actions if there is none.
    pub fn close(&mut self, topic: &str, reason: &str) -> Vec<Action> {
        let Some(channel) = self.channels.remove(topic) else { return Vec::new() };
        channel.end(topic, [SessionEvent::Error(reason.to_owned()), SessionEvent::Closed])
    }

    /// Ends all channels. Called when the socket is closed.
    pub fn end(&mut self) -> Vec<Action> {
        self.channels.drain().flat_map(|(_, channel)| channel.drop_silently()).collect()
    }

    fn join(&mut self, origin: &Origin, join: Join, now: u64, tokens: &impl Tokens) -> Vec<Action> {
        let topic = &origin.channel.topic;
        let mut actions = Vec::new();
        if let Some(old) = self.channels.remove(topic) {
            actions.extend(old.end(topic, [SessionEvent::Closed]));
        }
        match self.open(origin, join, now, tokens) {
            Ok((channel, first)) => {
                self.channels.insert(topic.clone(), Box::new(channel));
                actions.extend(first);
            }
            Err(reason) => actions.push(Action::Send(origin.refusal(reason))),
        }
        actions
    }

    /// Returns the channel of a join and its first actions.
    ///
    /// # Errors
    /// The reason for refusing the join.
    fn open(
        &mut self,
        origin: &Origin,
        join: Join,
        now: u64,
        tokens: &impl Tokens,
    ) -> Result<(Channel, Vec<Action>), String> {
        if self.channels.len() >= self.max_channels {
            return Err(String::from("ChannelRateLimitReached: Too many channels"));
        }
        let identity = self
            .identity(join.token.as_deref(), now, tokens)
            .map_err(|refusal| format!("{}: {}", refusal.code, refusal.text))?;
        if self.resumable && join.since.is_some() {
            return Err(String::from(TWO_POSITIONS));
        }
        if let Some(refusal) = join.malformed.first().filter(|_| join.waits) {
            return Err(disabled(refusal));
        }
        self.join_count += 1;
        let id = ChannelId { session: self.number, channel: self.join_count };
        Ok(Channel::open(id, origin, identity, join, self.resumable))
    }

    fn leave(&mut self, origin: &Origin) -> Vec<Action> {
        let topic = &origin.channel.topic;
        let join = &origin.channel.join;
        // A leave for an earlier join of the topic must not end this one.
        let is_current = |channel: &Channel| join.is_none() || *join == channel.join;
        if !self.channels.get(topic).is_some_and(|channel| is_current(channel)) {
            return vec![Action::Send(origin.reply(Response::Left))];
        }
        let Some(channel) = self.channels.remove(topic) else { return Vec::new() };
        let mut actions = vec![Action::Forget { channel: channel.id }];
        actions.extend(channel.leave(topic, origin.reply(Response::Left)));
        actions
    }
}

/// Refuses a message, if its client expects a reply.
pub(super) fn refusal_if_expected(origin: &Origin, reason: &str) -> Vec<Action> {
    if origin.reference.is_none() { Vec::new() } else { vec![Action::Send(origin.refusal(reason))] }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::model::catalog::topic_rules::TopicRights;
    use crate::model::session::channel::BindOutcome;
    use crate::model::session::message::{ChannelName, Reference};
    use crate::model::session::test_session::{
        MAX_CHANNELS, NOW, TestTokens, broadcast, delivering, join, joining, messages_of, receive, session,
        todos, token,
    };
    use crate::model::subscription::error::SubscribeError;

    #[test]
    fn a_join_without_bindings_is_answered_at_once() {
        let mut session = session();
        let actions = join(&mut session, "1", joining(&json!([]), None));
        assert_eq!(messages_of(&actions), ["listen", "1 joined"], "nothing is missed after the answer");
        assert_eq!(messages_of(&session.end()), ["leave"]);
    }

    #[test]
    fn a_message_outside_a_joined_channel_is_answered() {
        let mut session = session();
        let mut answer = |request| messages_of(&receive(&mut session, "1", "t", request));
        assert_eq!(answer(ClientRequest::Heartbeat), ["1 alive"]);
        assert_eq!(answer(ClientRequest::Leave), ["1 left"]);
        assert_eq!(answer(ClientRequest::InvalidJoin(String::from("no"))), ["1 refused: no"]);
        assert_eq!(answer(ClientRequest::OversizedJoin), [format!("1 refused: {}", too_large())]);
        for request in [
            token("ann"),
            ClientRequest::AccessToken(None),
            broadcast(),
            ClientRequest::Untrack,
            ClientRequest::Invalid("no"),
            ClientRequest::Unknown,
        ] {
            assert_eq!(answer(request), ["1 refused: unmatched topic"]);
        }
    }

    #[test]
    fn what_ends_a_channel_comes_after_its_last_change() {
        let (mut session, _) = delivering();
        let bad = receive(&mut session, "1", "t", token("no token"));
        assert_eq!(messages_of(&bad), ["leave: 1 error: no token", "leave: 1 closed"]);
        let (mut session, _) = delivering();
        let left = receive(&mut session, "1", "t", ClientRequest::Leave);
        assert_eq!(messages_of(&left), ["leave: 1 left", "leave: 1 closed"]);
        let (mut session, _) = delivering();
        let stale = receive(&mut session, "0", "t", ClientRequest::Leave);
        assert_eq!(messages_of(&stale), ["0 left"]);
        assert_eq!(messages_of(&session.end()), ["leave"]);
    }

    #[test]
    fn the_reply_to_a_leave_has_the_references_of_the_leave() {
        let (mut session, _) = delivering();
        let channel = ChannelName { topic: String::from("t"), join: Reference::default() };
        let origin = Origin { channel, reference: Reference(Some("9".into())) };
        let message = Incoming { origin, request: ClientRequest::Leave };
        let actions = session.receive(message, NOW, &TestTokens);
        assert_eq!(messages_of(&actions), ["leave: - left", "leave: 1 closed"]);
    }

    #[test]
    fn channels_are_bounded() {
        let mut session = session();
        let mut joins = |reference: &str, topic: &str| {
            let join = Box::new(joining(&json!([]), None));
            let actions = receive(&mut session, reference, topic, ClientRequest::Join(join));
            (messages_of(&actions), session.channel_count())
        };
        for n in 0..MAX_CHANNELS {
            joins("1", &format!("{n}"));
        }
        let refused = vec![String::from("1 refused: ChannelRateLimitReached: Too many channels")];
        assert_eq!(joins("1", "more"), (refused, MAX_CHANNELS));
        let again = ["1 closed", "leave", "listen", "2 joined"].map(str::to_owned).to_vec();
        assert_eq!(joins("2", "5"), (again, MAX_CHANNELS));
    }

    proptest! {
        /// For any sequence of inputs: delivery ends only after it began, a channel gets deliveries only when bound for its
        /// latest identity, it is a member of its topic at most once, and all of this ends with the session.
        #[test]
        fn delivery_begins_and_ends_in_pairs(
            steps in proptest::collection::vec((0_usize..11, 0_usize..3, 0_usize..3, any::<bool>()), 0..60)
        ) {
            let mut session = session();
            let mut delivering: HashSet<ChannelId> = HashSet::new();
            let mut members: HashSet<ChannelId> = HashSet::new();
            let mut binding: Vec<(ChannelId, u32, String)> = Vec::new();
            let mut judging: Vec<(ChannelId, u32)> = Vec::new();
            let mut latest: HashMap<ChannelId, (u32, String)> = HashMap::new();
            let mut now = NOW;
            for (step, topic, name, flag) in steps {
                let private_channel = (topic == 2).then(|| String::from("2"));
                let topic = format!("{topic}");
                let rights = [TopicRights::ALL, TopicRights::default(), TopicRights { broadcast: true, presence: false }][name];
                let name = ["ann", "bob", "cat:1200"][name];
                let actions = match step {
                    0 | 1 => {
                        let join = Join { waits: flag, private_channel, ..joining(&todos(), Some(name)) };
                        receive(&mut session, "1", &topic, ClientRequest::Join(Box::new(join)))
                    }
                    2 => receive(&mut session, if flag { "1" } else { "0" }, &topic, ClientRequest::Leave),
                    3 => receive(&mut session, "1", &topic, token(if flag { name } else { "no token" })),
                    4 => {
                        now += 50;
                        session.expire(now)
                    }
                    5 if !binding.is_empty() => {
                        let (channel, attempt, _) = binding.remove(0);
                        session.unavailable(channel, attempt)
                    }
                    8 => session.judge_again(now, flag),
                    9 | 10 if !judging.is_empty() => {
                        let (channel, judgement) = judging.remove(0);
                        session.judged(channel, judgement, now, (step == 9 || flag).then_some((rights, None)))
                    }
                    _ if binding.is_empty() => Vec::new(),
                    _ => {
                        let (channel, attempt, who) = binding.remove(0);
                        let outcome = if flag { Ok(BindOutcome::default()) } else { Err(SubscribeError::Other("no".to_owned())) };
                        let actions = session.bound(channel, attempt, outcome);
                        if actions.iter().any(|action| matches!(action, Action::Join { .. })) {
                            prop_assert_eq!(&latest[&channel], &(attempt, who));
                        }
                        actions
                    }
                };
                for action in actions {
                    match action {
                        Action::Bind { channel, attempt, identity, .. } => {
                            let who = identity.claims().sub().unwrap().to_owned();
                            binding.push((channel, attempt, who.clone()));
                            latest.insert(channel, (attempt, who));
                        }
                        Action::Join { channel, .. } | Action::Listen { channel, .. } => {
                            delivering.insert(channel);
                        }
                        Action::Leave { channel, .. } => prop_assert!(delivering.remove(&channel)),
                        Action::Enter { channel, .. } => prop_assert!(members.insert(channel)),
                        Action::Exit { channel } => prop_assert!(members.remove(&channel)),
                        Action::Permit { channel, rights } => prop_assert!(members.contains(&channel) && rights.any()),
                        Action::Judge { channel, judgement, .. } => judging.push((channel, judgement)),
                        Action::Recall { .. } => prop_assert!(false),
                        Action::Forget { .. } | Action::Send(_) => {}
                        Action::Broadcast { .. } | Action::Track { .. } => prop_assert!(false),
                    }
                }
            }
            for action in session.end() {
                match action {
                    Action::Leave { channel, .. } => prop_assert!(delivering.remove(&channel)),
                    Action::Exit { channel } => prop_assert!(members.remove(&channel)),
                    action => panic!("{action:?}"),
                }
            }
            prop_assert!(delivering.is_empty() && members.is_empty());
        }
    }
}
