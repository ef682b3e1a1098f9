//! One client's session as a state machine: joins, leaves and the outcomes of binds. It has no side effects: each input returns the
//! actions to perform.

use std::collections::HashMap;

use crate::model::identity::claims::{Claims, Tokens};
use crate::model::policy::visibility::Identity;
use crate::model::session::action::Action;
use crate::model::session::broadcast::Broadcast;
use crate::model::session::channel::{BindOutcome, Channel, ChannelId};
use crate::model::session::join::{Join, disabled, too_large};
use crate::model::session::message::{ClientRequest, Incoming, Origin, Response, SessionEvent};
use crate::model::subscription::error::SubscribeError;

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

    /// Handles an [`Action::Bind`] that failed because PostgreSQL is unavailable. The client joins again by itself.
    pub fn unavailable(&mut self, channel: ChannelId, attempt: u32) -> Vec<Action> {
        let found = self.topic_in_attempt(channel, attempt);
        found.map_or_else(Vec::new, |topic| self.fail(&topic))
    }

    /// Ends the channel of a topic because PostgreSQL is unavailable. The client joins again by itself.
    pub(super) fn fail(&mut self, topic: &str) -> Vec<Action> {
        let Some((topic, mut channel)) = self.channels.remove_entry(topic) else { return Vec::new() };
        let reason = String::from(UNAVAILABLE);
        match channel.refuse_join(&topic, reason.clone()) {
            Some(refusal) => vec![Action::Send(refusal)],
            None => channel.end(&topic, [SessionEvent::Error(reason), SessionEvent::Failed]),
        }
    }

    /// Binds a channel again: its table changed, or a refused entry may be accepted now.
    pub fn rebind(&mut self, channel: ChannelId) -> Vec<Action> {
        let found = self.channels.values_mut().find(|state| state.id == channel && state.delivering);
        found.map_or_else(Vec::new, |state| vec![state.bind()])
    }

    /// Handles the outcome of [`Action::Bind`]; `Err` means that nothing is bound. The channel is reported as subscribed only if no entry is refused.
    pub fn bound(
        &mut self,
        channel: ChannelId,
        attempt: u32,
        outcome: Result<BindOutcome, SubscribeError>,
    ) -> Vec<Action> {
        let Some(topic) = self.topic_in_attempt(channel, attempt) else { return Vec::new() };
        let Some(channel) = self.channels.get_mut(&topic) else { return Vec::new() };
        match channel.bound(&topic, outcome) {
            Ok(actions) => actions,
            Err(refusal) => {
                let reply = channel.refuse_join(&topic, disabled(&refusal));
                self.channels.remove(&topic);
                reply.map(Action::Send).into_iter().collect()
            }
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

    /// Sends a broadcast of a joined channel, also of one whose join is not answered yet.
    fn broadcast(&self, origin: Origin, broadcast: Broadcast) -> Vec<Action> {
        let Some(channel) = self.channels.get(&origin.channel.topic) else { return Vec::new() };
        let (acknowledges, is_private) = (channel.acknowledges, channel.private.is_some());
        if channel.private.as_ref().is_some_and(|private| !private.may_write().broadcast) {
            let refusal = acknowledges.then(|| Action::Send(origin.reply(Response::MayNotSend)));
            return refusal.into_iter().collect();
        }
        vec![Action::Broadcast { channel: channel.id, origin, broadcast, acknowledges, is_private }]
    }

    /// Changes what a joined channel tracks.
    fn track(&self, origin: Origin, object: Option<String>) -> Vec<Action> {
        let Some(channel) = self.channels.get(&origin.channel.topic) else { return Vec::new() };
        if !channel.is_answered() {
            return refusal_if_expected(
                &origin,
                "The channel is not joined yet, wait for the reply to its join",
            );
        }
        // A member may end its presence without any right.
        let tracks = object.is_some();
        if tracks && channel.private.as_ref().is_some_and(|private| !private.may_write().presence) {
            return vec![Action::Send(origin.reply(Response::MayNotTrack))];
        }
        vec![Action::Track { channel: channel.id, origin, object }]
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

    /// Returns the topic of a channel whose latest attempt to bind is this one.
    fn topic_in_attempt(&self, channel: ChannelId, attempt: u32) -> Option<String> {
        let mut channels = self.channels.iter();
        let found = channels.find(|(_, state)| state.id == channel && state.attempt == attempt);
        found.map(|(topic, _)| topic.clone())
    }
}

/// Refuses a message, if its client expects a reply.
fn refusal_if_expected(origin: &Origin, reason: &str) -> Vec<Action> {
    if origin.reference.is_none() { Vec::new() } else { vec![Action::Send(origin.refusal(reason))] }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::model::catalog::topic_rules::TopicRights;
    use crate::model::identity::claims::TokenRefusal;
    use crate::model::session::member::MembershipOptions;
    use crate::model::session::message::{ChannelName, Outgoing, Reference};
    use crate::model::subscription::request::Request;

    pub(crate) const NOW: u64 = 1000;
    pub(crate) const MAX_CHANNELS: usize = 100;

    /// Verifies tokens of the form `name` or `name:expiry`; a text with a blank is no token.
    pub(crate) struct TestTokens;

    impl Tokens for TestTokens {
        fn verify(&self, token: &str) -> Result<Claims, TokenRefusal> {
            if token.contains(' ') || token.is_empty() {
                return Err(TokenRefusal { code: "MalformedJWT", text: "no token".to_owned() });
            }
            let (name, expiry) = token.split_once(':').unwrap_or((token, "5000"));
            Ok(claims(name, expiry.parse().unwrap()))
        }

        fn recheck(&self, claims: &Claims) -> Result<(), TokenRefusal> {
            match claims.key() {
                None => Ok(()),
                Some(_) => Err(TokenRefusal { code: "JwtSignerError", text: "no key".to_owned() }),
            }
        }
    }

    pub(crate) fn claims(name: &str, expiry: u64) -> Claims {
        let payload = json!({"role": "authenticated", "sub": name, "exp": expiry});
        Claims::from_verified_payload(&payload.to_string()).unwrap()
    }

    pub(crate) fn session() -> Session {
        Session::new(7, claims("own", 9000), MAX_CHANNELS)
    }

    pub(crate) fn receive(
        session: &mut Session,
        reference: &str,
        topic: &str,
        request: ClientRequest,
    ) -> Vec<Action> {
        let reference = Reference(Some(reference.into()));
        let channel = ChannelName { topic: topic.to_owned(), join: reference.clone() };
        session.receive(Incoming { origin: Origin { channel, reference }, request }, NOW, &TestTokens)
    }

    pub(crate) fn token(token: &str) -> ClientRequest {
        ClientRequest::AccessToken(Some(token.to_owned()))
    }

    /// Returns a join with these `postgres_changes` entries.
    pub(crate) fn joining(entries: &Value, token: Option<&str>) -> Join {
        let entries = entries.as_array().unwrap();
        let parsed = entries.iter().map(|entry| Request::parse(entry.as_object().unwrap()));
        let (requests, malformed): (Vec<_>, Vec<_>) = parsed.partition(Result::is_ok);
        Join {
            requests: requests.into_iter().map(Result::unwrap).collect(),
            malformed: malformed.into_iter().map(Result::unwrap_err).collect(),
            entries: entries.iter().map(Value::to_string).collect(),
            token: token.map(str::to_owned),
            waits: false,
            membership: MembershipOptions::default(),
            acknowledges: false,
            private_channel: None,
            recall: None,
            by_operation: false,
            bytes: 100,
        }
    }

    pub(crate) fn todos() -> Value {
        json!([{"event": "*", "table": "todos"}])
    }

    /// Joins the channel `t`.
    pub(crate) fn join(session: &mut Session, reference: &str, join: Join) -> Vec<Action> {
        receive(session, reference, "t", ClientRequest::Join(Box::new(join)))
    }

    fn ann() -> Join {
        joining(&todos(), Some("ann"))
    }

    /// Returns the channel, attempt and subject of the bind action.
    pub(crate) fn bind(actions: &[Action]) -> (ChannelId, u32, String) {
        let found = actions.iter().find_map(|action| match action {
            Action::Bind { channel, attempt, identity, .. } => {
                Some((*channel, *attempt, identity.claims().sub().unwrap().to_owned()))
            }
            _ => None,
        });
        found.unwrap_or_else(|| panic!("nothing is to be bound: {actions:?}"))
    }

    /// Returns a session with one channel that is being delivered to.
    pub(crate) fn delivering() -> (Session, ChannelId) {
        let mut session = session();
        let (channel, attempt, _) = bind(&join(&mut session, "1", ann()));
        session.bound(channel, attempt, Ok(BindOutcome::default()));
        (session, channel)
    }

    /// Returns the messages in order, each with the reference of its join, prefixed by the action they belong to.
    pub(crate) fn messages_of(actions: &[Action]) -> Vec<String> {
        let line = |kind: &str, message: &Outgoing| {
            let text = match &message.event {
                SessionEvent::Reply(_, Response::Refused(reason)) => format!("refused: {reason}"),
                SessionEvent::Reply(_, Response::Joined(_)) => String::from("joined"),
                SessionEvent::Reply(_, Response::Left) => String::from("left"),
                SessionEvent::Reply(_, Response::Alive) => String::from("alive"),
                SessionEvent::Reply(_, other) => format!("{other:?}"),
                SessionEvent::NotDelivered(text) => format!("not delivered: {text}"),
                SessionEvent::Subscribed => String::from("subscribed"),
                SessionEvent::Hidden(why) => format!("hidden: {why}"),
                SessionEvent::NotSubscribed(refusal) => format!("not subscribed: {refusal}"),
                SessionEvent::Error(reason) => format!("error: {reason}"),
                SessionEvent::Closed => String::from("closed"),
                SessionEvent::Failed => String::from("failed"),
            };
            format!("{kind}{} {text}", message.channel.join.0.as_deref().unwrap_or("-"))
        };
        let lines = |action: &Action| match action {
            Action::Send(message) => vec![line("", message)],
            Action::Bind { .. } => vec!["bind".to_owned()],
            Action::Listen { .. } => vec!["listen".to_owned()],
            Action::Judge { identity, is_recheck, .. } => {
                let again = if *is_recheck { " again" } else { "" };
                vec![format!("judge {}{again}", identity.claims().sub().unwrap())]
            }
            Action::Recall { recall, .. } => vec![format!("recall {}", recall.limit)],
            Action::Permit { rights, .. } => vec![format!("permit {rights:?}")],
            Action::Join { greeting, .. } => greeting.iter().map(|message| line("join: ", message)).collect(),
            Action::Enter { membership, .. } if membership.wants_presence => {
                vec!["enter with presence".to_owned()]
            }
            Action::Forget { .. } | Action::Enter { .. } | Action::Exit { .. } => Vec::new(),
            Action::Broadcast { .. } => vec!["broadcast".to_owned()],
            Action::Track { object, .. } => vec![format!("track {object:?}")],
            Action::Leave { farewell, .. } if farewell.is_empty() => vec!["leave".to_owned()],
            Action::Leave { farewell, .. } => {
                farewell.iter().map(|message| line("leave: ", message)).collect()
            }
        };
        actions.iter().flat_map(lines).collect()
    }

    #[test]
    fn a_join_is_answered_when_it_is_bound_and_before_any_change() {
        let mut session = session();
        let membership = MembershipOptions { wants_presence: true, ..MembershipOptions::default() };
        let actions = join(&mut session, "1", Join { membership, ..ann() });
        assert_eq!(messages_of(&actions), ["bind"]);
        let (channel, attempt, who) = bind(&actions);
        assert_eq!(who, "ann");
        let actions = session.bound(channel, attempt, Ok(BindOutcome::default()));
        assert_eq!(messages_of(&actions), ["1 joined", "enter with presence", "join: 1 subscribed"]);
    }

    #[test]
    fn a_channel_with_a_hidden_table_is_subscribed_and_told_why_at_each_bind() {
        let hidden = |refusals: &[&str]| BindOutcome {
            refusals: refusals.iter().map(|text| SubscribeError((*text).to_owned())).collect(),
            hidden: vec![String::from("why")],
        };
        let mut session = session();
        let (channel, attempt, _) = bind(&join(&mut session, "1", Join { waits: true, ..ann() }));
        let actions = session.bound(channel, attempt, Ok(hidden(&[])));
        assert_eq!(messages_of(&actions), ["1 joined", "join: 1 subscribed", "join: 1 hidden: why"]);
        let (_, attempt, _) = bind(&receive(&mut session, "1", "t", token("bob")));
        let actions = session.bound(channel, attempt, Ok(hidden(&["no"])));
        assert_eq!(messages_of(&actions), ["join: 1 not subscribed: no", "join: 1 hidden: why"]);
    }

    #[test]
    fn a_join_without_bindings_is_answered_at_once() {
        let mut session = session();
        let actions = join(&mut session, "1", joining(&json!([]), None));
        assert_eq!(messages_of(&actions), ["listen", "1 joined"], "nothing is missed after the answer");
        assert_eq!(messages_of(&session.end()), ["leave"]);
    }

    #[test]
    fn a_resumable_join_is_answered_once_it_has_a_position() {
        let mut session = session().resumable(true);
        let actions = join(&mut session, "1", joining(&json!([]), None));
        assert_eq!(messages_of(&actions), ["bind"]);
        let (channel, attempt, _) = bind(&actions);
        let actions = session.bound(channel, attempt, Ok(BindOutcome::default()));
        assert_eq!(messages_of(&actions), ["1 joined"]);
        assert!(actions.iter().any(|action| matches!(action, Action::Join { .. })), "{actions:?}");
        let (_, attempt, who) = bind(&receive(&mut session, "1", "t", token("bob")));
        assert_eq!(
            (who.as_str(), messages_of(&session.bound(channel, attempt, Ok(BindOutcome::default())))),
            ("bob", Vec::new())
        );
        assert_eq!(messages_of(&session.end()), ["leave"]);
    }

    #[test]
    fn a_channel_hears_broadcasts_from_the_database_whatever_becomes_of_its_requests() {
        let mut session = session();
        let (channel, attempt, _) = bind(&join(&mut session, "1", ann()));
        let refusal = || Err(SubscribeError("no".to_owned()));
        let actions = session.bound(channel, attempt, refusal());
        assert_eq!(messages_of(&actions), ["1 joined", "1 not subscribed: no", "listen"]);
        let (_, attempt, _) = bind(&receive(&mut session, "1", "t", token("bob")));
        assert_eq!(
            messages_of(&session.bound(channel, attempt, Ok(BindOutcome::default()))),
            ["join: 1 subscribed"]
        );
        let (_, attempt, _) = bind(&receive(&mut session, "1", "t", token("cat")));
        let actions = session.bound(channel, attempt, refusal());
        assert_eq!(messages_of(&actions), ["leave: 1 not subscribed: no", "listen"]);
        let left = receive(&mut session, "1", "t", ClientRequest::Leave);
        assert_eq!(messages_of(&left), ["1 left", "1 closed", "leave"]);
        join(&mut session, "2", joining(&json!([]), None));
        assert_eq!(
            messages_of(&receive(&mut session, "2", "t", token("bob"))),
            ["listen"],
            "until the new token ends"
        );
        assert_eq!(session.heard_topic(ChannelId { session: 7, channel: 2 }), Some(("t", false)));
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

    fn broadcast() -> ClientRequest {
        ClientRequest::Broadcast(Broadcast::bytes(String::from("e"), vec![1]))
    }

    #[test]
    fn a_joined_channel_broadcasts_and_tracks_once_its_join_is_answered() {
        let (mut joined, _) = delivering();
        let mut answer = |request| messages_of(&receive(&mut joined, "1", "t", request));
        assert_eq!(answer(broadcast()), ["broadcast"]);
        assert_eq!(answer(ClientRequest::Track(String::from("{}"))), [r#"track Some("{}")"#]);
        assert_eq!(answer(ClientRequest::Untrack), ["track None"]);
        assert_eq!(answer(ClientRequest::Invalid("no")), ["1 refused: no"]);
        let mut waiting = session();
        join(&mut waiting, "1", ann());
        assert_eq!(messages_of(&receive(&mut waiting, "1", "t", broadcast())), ["broadcast"]);
        let refused = messages_of(&receive(&mut waiting, "1", "t", ClientRequest::Untrack));
        assert!(refused[0].starts_with("1 refused: The channel is not joined yet"), "{refused:?}");
    }

    #[test]
    fn an_outcome_counts_only_for_the_latest_attempt() {
        let mut session = session();
        let (channel, first, _) = bind(&join(&mut session, "1", ann()));
        let (_, second, who) = bind(&receive(&mut session, "1", "t", token("bob")));
        assert_eq!((second, who.as_str()), (first + 1, "bob"));
        assert_eq!(session.bound(channel, first, Ok(BindOutcome::default())), []);
        assert_eq!(session.unavailable(channel, first), []);
        assert_eq!(messages_of(&session.bound(channel, second, Ok(BindOutcome::default()))).len(), 2);

        // The same for a channel that is joined again or left while it is being bound.
        let (old, attempt, _) = bind(&join(&mut session, "2", ann()));
        let actions = join(&mut session, "3", ann());
        assert_eq!(messages_of(&actions), ["2 closed", "bind"]);
        let (new, ..) = bind(&actions);
        assert_ne!(old, new);
        assert_eq!(session.bound(old, attempt, Ok(BindOutcome::default())), []);
        let left = receive(&mut session, "3", "t", ClientRequest::Leave);
        assert_eq!(messages_of(&left), ["3 left", "3 closed"]);
        assert_eq!(session.bound(new, 1, Ok(BindOutcome::default())), []);
    }

    #[test]
    fn a_refusal_follows_the_join_or_fails_it() {
        let refusal = || Err(SubscribeError("no".to_owned()));
        let mut session = session();
        let (channel, attempt, _) = bind(&join(&mut session, "1", ann()));
        let actions = session.bound(channel, attempt, refusal());
        assert_eq!(messages_of(&actions), ["1 joined", "1 not subscribed: no", "listen"]);
        assert_eq!(session.channel_count(), 1);

        let (channel, attempt, _) = bind(&join(&mut session, "2", Join { waits: true, ..ann() }));
        let actions = session.bound(channel, attempt, refusal());
        assert_eq!(messages_of(&actions), ["2 refused: RealtimeDisabledForConfiguration: no"]);
        assert_eq!(session.channel_count(), 0);

        let unreadable = joining(&json!([{}]), Some("ann"));
        let actions = join(&mut session, "3", Join { waits: true, ..unreadable });
        assert!(
            messages_of(&actions)[0]
                .starts_with("3 refused: RealtimeDisabledForConfiguration: No subscription")
        );
        assert_eq!(session.channel_count(), 0);
    }

    #[test]
    fn a_refused_entry_does_not_affect_the_others_and_is_reported_each_time() {
        let refused = |texts: &[&str]| {
            let refusals = texts.iter().map(|text| SubscribeError((*text).to_owned())).collect();
            BindOutcome { refusals, ..BindOutcome::default() }
        };
        let mut session = session();
        let entries = joining(&json!([{"table": "todos"}, {}, {"table": "others"}]), Some("ann"));
        let (channel, attempt, _) = bind(&join(&mut session, "1", entries));
        let actions = session.bound(channel, attempt, Ok(refused(&["others", "others"])));
        let malformed = "No subscription params provided. Please provide at least a `schema` or `table` to subscribe to: {}";
        let no = format!("join: 1 not subscribed: {malformed}");
        assert_eq!(messages_of(&actions), ["1 joined", &no, "join: 1 not subscribed: others"]);
        let (_, attempt, _) = bind(&session.rebind(channel));
        assert_eq!(messages_of(&session.bound(channel, attempt, Ok(BindOutcome::default()))), [no]);

        let waiting = Join { waits: true, ..joining(&json!([{"table": "todos"}]), Some("ann")) };
        let (channel, attempt, _) = bind(&join(&mut session, "2", waiting));
        let actions = session.bound(channel, attempt, Ok(refused(&["others"])));
        assert_eq!(messages_of(&actions), ["2 refused: RealtimeDisabledForConfiguration: others"]);
    }

    #[test]
    fn a_client_joins_again_when_postgresql_is_unavailable() {
        let mut joining = session();
        let (channel, attempt, _) = bind(&join(&mut joining, "1", ann()));
        let actions = joining.unavailable(channel, attempt);
        assert_eq!(messages_of(&actions), [format!("1 refused: {UNAVAILABLE}")]);
        assert_eq!(joining.channel_count(), 0);

        let (mut session, channel) = delivering();
        let (_, attempt, _) = bind(&receive(&mut session, "1", "t", token("bob")));
        let actions = session.unavailable(channel, attempt);
        let failed = [format!("leave: 1 error: {UNAVAILABLE}"), "leave: 1 failed".to_owned()];
        assert_eq!(messages_of(&actions), failed);
        assert_eq!(session.channel_count(), 0);
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
                        let outcome = if flag { Ok(BindOutcome::default()) } else { Err(SubscribeError("no".to_owned())) };
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
