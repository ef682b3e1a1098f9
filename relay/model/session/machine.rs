//! One client's session on a Phoenix socket as a state machine: joins, leaves, tokens and their expiry. It has no side effects:
//! each input returns the actions to perform.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::model::codec::phoenix::{Message, Status, Version, close, error, push, reply, system};
use crate::model::identity::claims::{Claims, TokenRefusal, Tokens};
use crate::model::policy::visibility::Identity;
use crate::model::session::join::{Join, MAX_JOIN_BYTES, changes_system, disabled};
use crate::model::subscription::binding::Request;
use crate::model::subscription::error::SubscribeError;

/// The error for a channel that cannot be bound because PostgreSQL is unavailable. The client may join it again.
pub const UNAVAILABLE: &str =
    "UnableToConnectToProject: Realtime was unable to connect to the project database";

/// The id of a joined channel. Unique in the process and never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChannelId {
    /// The session's number.
    pub session: u64,
    /// The channel's number in the session.
    pub channel: u32,
}

/// An action for the driver. Actions are performed in order.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Send this frame.
    Send(String),
    /// Bind these requests to this identity and give the outcome to [`Session::bound`].
    Bind {
        /// The channel to bind.
        channel: ChannelId,
        /// Number of the channel's attempt. A later attempt supersedes an earlier one, whose outcome is ignored.
        attempt: u32,
        /// The identity to bind to.
        identity: Identity,
        /// The requests to bind.
        requests: Vec<Request>,
    },
    /// Start delivery with the bound subscription, after the greeting.
    Join {
        /// The channel.
        channel: ChannelId,
        /// Its topic.
        topic: String,
        /// Whether changes are events named after their operation.
        by_operation: bool,
        /// Frames to send before the first change.
        greeting: Vec<String>,
    },
    /// Delete the bookmark of a channel that the client left.
    Forget {
        /// The channel.
        channel: ChannelId,
    },
    /// End delivery, then send the farewell.
    Leave {
        /// The channel.
        channel: ChannelId,
        /// Frames to send after the last change.
        farewell: Vec<String>,
    },
}

/// The state of a session. Each input returns the actions to perform.
#[derive(Debug)]
pub struct Session {
    number: u64,
    version: Version,
    connection_identity: Identity,
    // Boxed because a map has spare capacity, and most clients have one channel.
    channels: HashMap<String, Box<Channel>>,
    max_channels: usize,
    join_count: u32,
}

#[derive(Debug)]
struct Channel {
    id: ChannelId,
    join_ref: Value,
    identity: Identity,
    requests: Vec<Request>,
    /// The errors of entries that could not be parsed.
    malformed: Vec<SubscribeError>,
    attempt: u32,
    /// Approximate size of the kept topic, filters and token, in bytes.
    bytes: usize,
    /// The join, until it is answered.
    joining: Option<Box<Join>>,
    /// Whether the router delivers changes to the channel.
    delivering: bool,
    /// Whether changes are events named after their operation.
    by_operation: bool,
}

impl Session {
    /// Creates the session of a client that connected with these claims and may join `max_channels`.
    pub fn new(number: u64, version: Version, claims: Claims, max_channels: usize) -> Self {
        Self {
            number,
            version,
            connection_identity: Identity::new(claims),
            channels: HashMap::new(),
            max_channels,
            join_count: 0,
        }
    }

    /// Returns the protocol version of the frames.
    pub fn version(&self) -> Version {
        self.version
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

    /// Returns the earliest expiry of the channels' tokens, in Unix seconds.
    pub fn next_expiry(&self) -> Option<u64> {
        self.channels.values().map(|channel| channel.identity.claims().expires_at()).min()
    }

    /// Handles a message from the client.
    pub fn receive(&mut self, message: Message, now: u64, tokens: &impl Tokens) -> Vec<Action> {
        match (message.topic.as_str(), message.event.as_str()) {
            ("phoenix", "heartbeat") => vec![self.reply_ok(&message)],
            (_, "phx_join") => self.join(&message, now, tokens),
            (topic, "phx_leave") if !self.channels.contains_key(topic) => vec![self.reply_ok(&message)],
            (topic, _) if !self.channels.contains_key(topic) => {
                vec![self.refuse(&message, "unmatched topic")]
            }
            (_, "phx_leave") => self.leave(&message),
            (_, "access_token") => self.access_token(&message, tokens),
            (_, event @ ("broadcast" | "presence")) => self.unsupported(&message, event),
            _ => Vec::new(),
        }
    }

    /// Handles an [`Action::Bind`] that failed because PostgreSQL is unavailable. The client joins again by itself.
    pub fn unavailable(&mut self, channel: ChannelId, attempt: u32) -> Vec<Action> {
        let found = self.channels.iter().find(|(_, state)| state.id == channel && state.attempt == attempt);
        let Some(topic) = found.map(|(topic, _)| topic.clone()) else {
            return Vec::new();
        };
        let Some(mut state) = self.channels.remove(&topic) else {
            return Vec::new();
        };
        match state.joining.take() {
            Some(join) => vec![Action::Send(join.refuse(self.version, UNAVAILABLE))],
            None => {
                let payload = system(&topic, "system", "error", UNAVAILABLE);
                let frames = vec![
                    push(self.version, &state.join_ref, &topic, "system", &payload),
                    error(self.version, &state.join_ref, &topic),
                ];
                state.farewell(frames)
            }
        }
    }

    /// Binds a channel again: its table changed, or a refused entry may be accepted now.
    pub fn rebind(&mut self, channel: ChannelId) -> Vec<Action> {
        let found = self.channels.values_mut().find(|state| state.id == channel && state.delivering);
        found.map_or_else(Vec::new, |state| vec![state.bind()])
    }

    /// Handles the outcome of [`Action::Bind`]: `Ok` has the errors of refused entries while the others are bound, `Err` means
    /// that nothing is bound. The channel is reported as subscribed only if no entry is refused.
    pub fn bound(
        &mut self,
        channel: ChannelId,
        attempt: u32,
        outcome: Result<Vec<SubscribeError>, SubscribeError>,
    ) -> Vec<Action> {
        let version = self.version;
        let Some((topic, state)) = self.channels.iter_mut().find(|(_, state)| state.id == channel) else {
            return Vec::new();
        };
        if state.attempt != attempt {
            return Vec::new();
        }
        let topic = topic.clone();
        let is_bound = outcome.is_ok();
        let mut refusals = state.malformed.clone();
        refusals.extend(outcome.unwrap_or_else(|refusal| vec![refusal]));
        let mut frames = Vec::new();
        if let Some(join) = state.joining.take() {
            if let (Some(refusal), true) = (refusals.first(), join.waits()) {
                self.channels.remove(&topic);
                return vec![Action::Send(join.refuse(version, &disabled(refusal)))];
            }
            frames.extend(join.accept(version));
        }
        frames.extend(changes_system(version, &state.join_ref, &topic, &refusals));
        if is_bound {
            state.delivering = true;
            vec![Action::Join { channel, topic, by_operation: state.by_operation, greeting: frames }]
        } else {
            state.end_delivery(frames)
        }
    }

    /// Closes the channels whose token has expired at `now`, in Unix seconds.
    pub fn expire(&mut self, now: u64) -> Vec<Action> {
        self.close_where(|claims| {
            let seconds_ago = now.checked_sub(claims.expires_at())?;
            Some(format!("Token has expired {seconds_ago} seconds ago"))
        })
    }

    /// Closes the channels whose token was signed by a withdrawn key. Called when the keys change.
    pub fn recheck(&mut self, tokens: &impl Tokens) -> Vec<Action> {
        self.close_where(|claims| tokens.recheck(claims).err().map(|refusal| refusal.text))
    }

    /// Ends delivery to all channels. Called when the socket is closed.
    pub fn end(&mut self) -> Vec<Action> {
        let delivering =
            self.channels.drain().map(|(_, channel)| channel).filter(|channel| channel.delivering);
        delivering.map(|channel| Action::Leave { channel: channel.id, farewell: Vec::new() }).collect()
    }

    fn join(&mut self, message: &Message, now: u64, tokens: &impl Tokens) -> Vec<Action> {
        let join = match Join::parse(message) {
            Ok(join) => Box::new(join),
            Err(reason) => return vec![self.refuse(message, &reason)],
        };
        let mut actions = Vec::new();
        if let Some(old) = self.channels.remove(join.topic()) {
            let frame = close(self.version, &old.join_ref, join.topic());
            actions.extend(old.farewell(vec![frame]));
        }
        if self.channels.len() >= self.max_channels {
            actions.push(self.refuse(message, "ChannelRateLimitReached: Too many channels"));
            return actions;
        }
        let identity = match self.identity(&join, now, tokens) {
            Ok(identity) => identity,
            Err(refusal) => {
                actions.push(self.refuse(message, &format!("{}: {}", refusal.code, refusal.text)));
                return actions;
            }
        };
        let (requests, malformed) = join.requests();
        if let (Some(refusal), true) = (malformed.first(), join.waits()) {
            actions.push(self.refuse(message, &disabled(refusal)));
            return actions;
        }
        self.join_count += 1;
        let id = ChannelId { session: self.number, channel: self.join_count };
        let (topic, join_ref) = (join.topic().to_owned(), join.join_ref().clone());
        let bytes = join.bytes();
        let mut channel = Channel {
            id,
            join_ref,
            identity,
            requests,
            malformed,
            attempt: 0,
            bytes,
            joining: None,
            delivering: false,
            by_operation: join.is_by_operation(),
        };
        if !channel.requests.is_empty() {
            channel.joining = Some(join);
            actions.push(channel.bind());
        } else {
            actions.extend(join.accept(self.version).into_iter().map(Action::Send));
            if !channel.malformed.is_empty() {
                let frames = changes_system(self.version, &channel.join_ref, &topic, &channel.malformed);
                actions.extend(frames.into_iter().map(Action::Send));
            }
        }
        self.channels.insert(topic, Box::new(channel));
        actions
    }

    /// Returns the identity of a new channel: that of the token in the join, else the connection's own.
    fn identity(&self, join: &Join, now: u64, tokens: &impl Tokens) -> Result<Identity, TokenRefusal> {
        if let Some(token) = join.token() {
            return tokens.verify(token).map(Identity::new);
        }
        tokens.recheck(self.connection_identity.claims())?;
        let expires_at = self.connection_identity.claims().expires_at();
        if expires_at <= now {
            let text = format!("Token has expired {} seconds ago", now - expires_at);
            return Err(TokenRefusal { code: "InvalidJWTToken", text });
        }
        Ok(self.connection_identity.clone())
    }

    fn leave(&mut self, message: &Message) -> Vec<Action> {
        let Some(channel) = self.channels.get(&message.topic) else {
            return Vec::new();
        };
        // A leave for an earlier join of the topic must not end this one.
        if !message.join_ref.is_null() && message.join_ref != channel.join_ref {
            return vec![self.reply_ok(message)];
        }
        let frames = vec![
            reply(self.version, message, Status::Ok, &json!({})),
            close(self.version, &channel.join_ref, &message.topic),
        ];
        let Some(channel) = self.channels.remove(&message.topic) else {
            return Vec::new();
        };
        let mut actions = vec![Action::Forget { channel: channel.id }];
        actions.extend(channel.farewell(frames));
        actions
    }

    fn access_token(&mut self, message: &Message, tokens: &impl Tokens) -> Vec<Action> {
        let token = message.payload.get("access_token").and_then(Value::as_str);
        let Some(token) = token.filter(|token| !token.starts_with("sb_")) else {
            return Vec::new();
        };
        if token.len() > MAX_JOIN_BYTES {
            return self.close(&message.topic, "Token is too long");
        }
        let claims = match tokens.verify(token) {
            Ok(claims) => claims,
            Err(refusal) => return self.close(&message.topic, &refusal.text),
        };
        let Some(channel) = self.channels.get_mut(&message.topic) else {
            return Vec::new();
        };
        let identity = Identity::new(claims);
        if identity == channel.identity {
            return Vec::new();
        }
        channel.identity = identity;
        channel.bytes = channel.bytes.max(token.len());
        if channel.requests.is_empty() { Vec::new() } else { vec![channel.bind()] }
    }

    fn unsupported(&self, message: &Message, event: &str) -> Vec<Action> {
        if message.ref_.is_null() {
            return Vec::new();
        }
        vec![
            self.refuse(
                message,
                &format!("NotAvailable: {event} is not available in this version of the relay"),
            ),
        ]
    }

    /// Closes the channels for whose claims `objection` returns a reason.
    fn close_where(&mut self, objection: impl Fn(&Claims) -> Option<String>) -> Vec<Action> {
        let channels = self.channels.iter();
        let affected = channels
            .filter_map(|(topic, channel)| Some((topic.clone(), objection(channel.identity.claims())?)));
        let affected: Vec<_> = affected.collect();
        affected.iter().flat_map(|(topic, text)| self.close(topic, text)).collect()
    }

    /// Closes the channel of a topic with a reason. Returns no actions if there is none.
    pub fn close(&mut self, topic: &str, text: &str) -> Vec<Action> {
        let Some(channel) = self.channels.remove(topic) else {
            return Vec::new();
        };
        let frames = vec![
            push(self.version, &channel.join_ref, topic, "system", &system(topic, "system", "error", text)),
            close(self.version, &channel.join_ref, topic),
        ];
        channel.farewell(frames)
    }

    fn reply_ok(&self, message: &Message) -> Action {
        Action::Send(reply(self.version, message, Status::Ok, &json!({})))
    }

    /// Returns the error reply to a message.
    pub fn refuse(&self, message: &Message, reason: &str) -> Action {
        Action::Send(reply(self.version, message, Status::Error, &json!({"reason": reason})))
    }
}

impl Channel {
    /// Starts a new attempt to bind the channel.
    fn bind(&mut self) -> Action {
        self.attempt += 1;
        Action::Bind {
            channel: self.id,
            attempt: self.attempt,
            identity: self.identity.clone(),
            requests: self.requests.clone(),
        }
    }

    fn farewell(mut self, frames: Vec<String>) -> Vec<Action> {
        self.end_delivery(frames)
    }

    /// Ends delivery and sends the frames after the last change. Without delivery, sends them at once.
    fn end_delivery(&mut self, frames: Vec<String>) -> Vec<Action> {
        if std::mem::take(&mut self.delivering) {
            vec![Action::Leave { channel: self.id, farewell: frames }]
        } else {
            frames.into_iter().map(Action::Send).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::model::codec::phoenix::decode_text;
    use crate::model::identity::claims::KeyId;

    const NOW: u64 = 1000;
    const MAX_CHANNELS: usize = 100;

    /// Verifies tokens of the form `name` or `name:expiry`; a text with a blank is no token.
    struct TestTokens;

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

    fn claims(name: &str, expiry: u64) -> Claims {
        let payload = json!({"role": "authenticated", "sub": name, "exp": expiry});
        Claims::from_verified_payload(&payload.to_string()).unwrap()
    }

    fn session() -> Session {
        Session::new(7, Version::V2, claims("own", 9000), MAX_CHANNELS)
    }

    fn receive(
        session: &mut Session,
        reference: &str,
        topic: &str,
        event: &str,
        payload: Value,
    ) -> Vec<Action> {
        let message = Message {
            join_ref: json!(reference),
            ref_: json!(reference),
            topic: topic.to_owned(),
            event: event.to_owned(),
            payload,
        };
        session.receive(message, NOW, &TestTokens)
    }

    fn join(session: &mut Session, reference: &str, token: &str, more: Value) -> Vec<Action> {
        let mut config = json!({"postgres_changes": [{"event": "*", "table": "todos"}]});
        for (name, value) in more.as_object().unwrap() {
            config[name] = value.clone();
        }
        receive(
            session,
            reference,
            "realtime:t",
            "phx_join",
            json!({"config": config, "access_token": token}),
        )
    }

    /// Returns the channel, attempt and subject of the bind action.
    fn bind(actions: &[Action]) -> (ChannelId, u32, String) {
        let found = actions.iter().find_map(|action| match action {
            Action::Bind { channel, attempt, identity, .. } => {
                Some((*channel, *attempt, identity.claims().sub().unwrap().to_owned()))
            }
            _ => None,
        });
        found.unwrap_or_else(|| panic!("nothing is to be bound: {actions:?}"))
    }

    /// Returns a session with one channel that is being delivered to.
    fn delivering() -> (Session, ChannelId) {
        let mut session = session();
        let (channel, attempt, _) = bind(&join(&mut session, "1", "ann", json!({})));
        session.bound(channel, attempt, Ok(Vec::new()));
        (session, channel)
    }

    /// Returns the frames in order, each as `event status-or-message`, prefixed by the action they belong to.
    fn frames_of(actions: &[Action]) -> Vec<String> {
        let line = |kind: &str, frame: &String| {
            let frame: Value = serde_json::from_str(frame).unwrap();
            let payload = &frame[4];
            let more = payload.get("message").or_else(|| payload["response"].get("reason"));
            let more = more.or_else(|| payload.get("status")).map_or("", |text| text.as_str().unwrap());
            format!("{kind}{} {} {more}", frame[0].as_str().unwrap_or("-"), frame[3].as_str().unwrap())
        };
        let lines = |action: &Action| match action {
            Action::Send(frame) => vec![line("", frame)],
            Action::Bind { .. } => vec!["bind".to_owned()],
            Action::Join { greeting, .. } => greeting.iter().map(|frame| line("join: ", frame)).collect(),
            Action::Forget { .. } => Vec::new(),
            Action::Leave { farewell, .. } if farewell.is_empty() => vec!["leave".to_owned()],
            Action::Leave { farewell, .. } => farewell.iter().map(|frame| line("leave: ", frame)).collect(),
        };
        actions.iter().flat_map(lines).collect()
    }

    #[test]
    fn a_join_is_answered_when_it_is_bound_and_before_any_change() {
        let mut session = session();
        let actions = join(&mut session, "1", "ann", json!({"presence": {"enabled": true}}));
        assert_eq!(frames_of(&actions), ["bind"]);
        let (channel, attempt, who) = bind(&actions);
        assert_eq!(who, "ann");
        let actions = session.bound(channel, attempt, Ok(Vec::new()));
        let greeting =
            ["join: 1 phx_reply ok", "join: 1 presence_state ", "join: 1 system Subscribed to PostgreSQL"];
        assert_eq!(frames_of(&actions), greeting);
    }

    #[test]
    fn a_join_without_bindings_is_answered_at_once() {
        let mut session = session();
        let actions = join(&mut session, "1", "ann", json!({"postgres_changes": [null]}));
        assert_eq!(frames_of(&actions), ["1 phx_reply ok"]);
        assert_eq!(frames_of(&session.end()), [""; 0], "nothing was delivered to it");
    }

    #[test]
    fn an_outcome_counts_only_for_the_latest_attempt() {
        let mut session = session();
        let (channel, first, _) = bind(&join(&mut session, "1", "ann", json!({})));
        let token = json!({"access_token": "bob"});
        let (_, second, who) = bind(&receive(&mut session, "1", "realtime:t", "access_token", token));
        assert_eq!((second, who.as_str()), (first + 1, "bob"));
        assert_eq!(session.bound(channel, first, Ok(Vec::new())), []);
        assert_eq!(session.unavailable(channel, first), []);
        assert_eq!(frames_of(&session.bound(channel, second, Ok(Vec::new()))).len(), 2);

        // The same for a channel that is joined again or left while it is being bound.
        let (old, attempt, _) = bind(&join(&mut session, "2", "ann", json!({})));
        let actions = join(&mut session, "3", "ann", json!({}));
        assert_eq!(frames_of(&actions), ["2 phx_close ", "bind"]);
        let (new, ..) = bind(&actions);
        assert_ne!(old, new);
        assert_eq!(session.bound(old, attempt, Ok(Vec::new())), []);
        let left = receive(&mut session, "3", "realtime:t", "phx_leave", json!({}));
        assert_eq!(frames_of(&left), ["3 phx_reply ok", "3 phx_close "]);
        assert_eq!(session.bound(new, 1, Ok(Vec::new())), []);
    }

    #[test]
    fn a_refusal_follows_the_join_or_fails_it() {
        let refusal = || Err(SubscribeError("no".to_owned()));
        let mut session = session();
        let (channel, attempt, _) = bind(&join(&mut session, "1", "ann", json!({})));
        let actions = session.bound(channel, attempt, refusal());
        assert_eq!(frames_of(&actions), ["1 phx_reply ok", "1 system no"]);
        assert_eq!(session.channel_count(), 1);

        let waiting = json!({"postgres_changes_options": {"wait": true}});
        let (channel, attempt, _) = bind(&join(&mut session, "2", "ann", waiting.clone()));
        let actions = session.bound(channel, attempt, refusal());
        assert_eq!(frames_of(&actions), ["2 phx_reply RealtimeDisabledForConfiguration: no"]);
        assert_eq!(session.channel_count(), 0);

        let mut unreadable = waiting;
        unreadable["postgres_changes"] = json!([{}]);
        let actions = join(&mut session, "3", "ann", unreadable);
        assert!(
            frames_of(&actions)[0]
                .starts_with("3 phx_reply RealtimeDisabledForConfiguration: No subscription")
        );
        assert_eq!(session.channel_count(), 0);
    }

    #[test]
    fn a_refused_entry_does_not_affect_the_others_and_is_reported_each_time() {
        let no = |text: &str| SubscribeError(text.to_owned());
        let mut session = session();
        let entries = json!({"postgres_changes": [{"table": "todos"}, {}, {"table": "others"}]});
        let (channel, attempt, _) = bind(&join(&mut session, "1", "ann", entries.clone()));
        let actions = session.bound(channel, attempt, Ok(vec![no("others"), no("others")]));
        let malformed = "No subscription params provided. Please provide at least a `schema` or `table` to subscribe to: {}";
        let refused = format!("join: 1 system {malformed}");
        assert_eq!(frames_of(&actions), ["join: 1 phx_reply ok", &refused, "join: 1 system others"]);
        let (_, attempt, _) = bind(&session.rebind(channel));
        assert_eq!(frames_of(&session.bound(channel, attempt, Ok(Vec::new()))), [refused]);

        let mut waiting = entries;
        waiting["postgres_changes"] = json!([{"table": "todos"}]);
        waiting["postgres_changes_options"] = json!({"wait": true});
        let (channel, attempt, _) = bind(&join(&mut session, "2", "ann", waiting));
        let actions = session.bound(channel, attempt, Ok(vec![no("others")]));
        assert_eq!(frames_of(&actions), ["2 phx_reply RealtimeDisabledForConfiguration: others"]);
    }

    #[test]
    fn a_refusal_of_new_claims_ends_delivery_and_keeps_the_channel() {
        let (mut session, channel) = delivering();
        let token = json!({"access_token": "bob"});
        let (_, attempt, _) = bind(&receive(&mut session, "1", "realtime:t", "access_token", token));
        let actions = session.bound(channel, attempt, Err(SubscribeError("no".to_owned())));
        assert_eq!(frames_of(&actions), ["leave: 1 system no"]);
        assert_eq!(session.channel_count(), 1);
        assert_eq!(frames_of(&session.end()), [""; 0]);
    }

    #[test]
    fn a_client_joins_again_when_postgresql_is_unavailable() {
        let mut joining = session();
        let (channel, attempt, _) = bind(&join(&mut joining, "1", "ann", json!({})));
        let actions = joining.unavailable(channel, attempt);
        assert_eq!(frames_of(&actions), [format!("1 phx_reply {UNAVAILABLE}")]);
        assert_eq!(joining.channel_count(), 0);

        let (mut session, channel) = delivering();
        let token = json!({"access_token": "bob"});
        let (_, attempt, _) = bind(&receive(&mut session, "1", "realtime:t", "access_token", token));
        let actions = session.unavailable(channel, attempt);
        assert_eq!(
            frames_of(&actions),
            [format!("leave: 1 system {UNAVAILABLE}"), "leave: 1 phx_error ".to_owned()]
        );
        assert_eq!(session.channel_count(), 0);
    }

    #[test]
    fn what_ends_a_channel_comes_after_its_last_change() {
        let (mut session, _) = delivering();
        let bad =
            receive(&mut session, "1", "realtime:t", "access_token", json!({"access_token": "no token"}));
        assert_eq!(frames_of(&bad), ["leave: 1 system no token", "leave: 1 phx_close "]);
        let (mut session, _) = delivering();
        let left = receive(&mut session, "1", "realtime:t", "phx_leave", json!({}));
        assert_eq!(frames_of(&left), ["leave: 1 phx_reply ok", "leave: 1 phx_close "]);
        let (mut session, _) = delivering();
        let stale = receive(&mut session, "0", "realtime:t", "phx_leave", json!({}));
        assert_eq!(frames_of(&stale), ["0 phx_reply ok"]);
        assert_eq!(frames_of(&session.end()), ["leave"]);
    }

    #[test]
    fn a_token_with_the_same_claims_or_without_claims_does_nothing() {
        let (mut session, _) = delivering();
        for payload in [
            json!({"access_token": "ann"}),
            json!({"access_token": "sb_publishable_x"}),
            json!({"access_token": null}),
            json!({}),
            json!(null),
        ] {
            assert_eq!(receive(&mut session, "1", "realtime:t", "access_token", payload), []);
        }
    }

    #[test]
    fn a_channel_ends_with_its_token_and_no_other_does() {
        let mut session = session();
        assert_eq!(session.next_expiry(), None);
        for (n, token) in ["ann:2000", "bob:3000", "sb_secret_x"].into_iter().enumerate() {
            let payload = json!({"access_token": token});
            receive(&mut session, &n.to_string(), &format!("realtime:{n}"), "phx_join", payload);
        }
        assert_eq!(session.next_expiry(), Some(2000));
        assert_eq!(session.expire(1999), []);
        let ended = session.expire(2000);
        assert_eq!(frames_of(&ended), ["0 system Token has expired 0 seconds ago", "0 phx_close "]);
        assert_eq!(session.next_expiry(), Some(3000));
        let ended = session.expire(3007);
        assert_eq!(frames_of(&ended), ["1 system Token has expired 7 seconds ago", "1 phx_close "]);
        assert_eq!(session.next_expiry(), Some(9000), "the connection's own");
    }

    #[test]
    fn a_join_has_the_connections_identity_unless_it_shows_another() {
        let mut session = session();
        for (payload, expected) in [
            (json!({}), "own"),
            (json!({"access_token": null}), "own"),
            (json!({"access_token": "sb_publishable_x"}), "own"),
            (json!({"access_token": "ann"}), "ann"),
            (json!({"access_token": "ann", "user_token": "bob"}), "bob"),
            (json!({"access_token": "ann", "user_token": null}), "ann"),
        ] {
            let mut payload = payload;
            payload["config"] = json!({"postgres_changes": [{"table": "todos"}]});
            let (.., who) = bind(&receive(&mut session, "1", "realtime:t", "phx_join", payload.clone()));
            assert_eq!(who, expected, "{payload}");
        }
        let mut late = Session::new(7, Version::V2, claims("own", 900), MAX_CHANNELS);
        let actions = receive(&mut late, "1", "realtime:t", "phx_join", json!({}));
        assert_eq!(frames_of(&actions), ["1 phx_reply InvalidJWTToken: Token has expired 100 seconds ago"]);
    }

    #[test]
    fn channels_of_a_withdrawn_key_are_closed_and_not_joined_again() {
        let own = claims("own", 9000).signed_by(Some(KeyId(7)));
        let mut session = Session::new(7, Version::V2, own, MAX_CHANNELS);
        join(&mut session, "1", "ann", json!({}));
        let bindings = json!({"config": {"postgres_changes": [{"event": "*", "table": "todos"}]}});
        // It has the connection's claims, whose key was valid when it joined.
        session.connection_identity = Identity::new(claims("own", 9000));
        receive(&mut session, "2", "realtime:own", "phx_join", bindings.clone());
        session.connection_identity = Identity::new(claims("own", 9000).signed_by(Some(KeyId(7))));
        assert_eq!(session.recheck(&TestTokens), []);
        let refused = receive(&mut session, "3", "realtime:own", "phx_join", bindings);
        assert_eq!(frames_of(&refused), ["2 phx_close ", "3 phx_reply JwtSignerError: no key"]);
        let channel = session.channels.get_mut("realtime:t").unwrap();
        channel.identity = Identity::new(claims("ann", 5000).signed_by(Some(KeyId(7))));
        assert_eq!(frames_of(&session.recheck(&TestTokens)), ["1 system no key", "1 phx_close "]);
        assert_eq!(session.channel_count(), 0);
    }

    #[test]
    fn channels_are_bounded() {
        let mut session = session();
        for n in 0..MAX_CHANNELS {
            receive(&mut session, "1", &format!("realtime:{n}"), "phx_join", json!({}));
        }
        let refused = receive(&mut session, "1", "realtime:more", "phx_join", json!({}));
        assert_eq!(frames_of(&refused), ["1 phx_reply ChannelRateLimitReached: Too many channels"]);
        let again = receive(&mut session, "2", "realtime:5", "phx_join", json!({}));
        assert_eq!(frames_of(&again), ["1 phx_close ", "2 phx_reply ok"]);
        assert_eq!(session.channel_count(), MAX_CHANNELS);
    }

    proptest! {
        /// For any sequence of inputs: delivery ends only after it began, a channel gets deliveries only when bound for its
        /// latest identity, and all deliveries end with the session.
        #[test]
        fn delivery_begins_and_ends_in_pairs(
            steps in proptest::collection::vec((0_usize..8, 0_usize..3, 0_usize..3, any::<bool>()), 0..60)
        ) {
            let mut session = session();
            let mut delivering: HashSet<ChannelId> = HashSet::new();
            let mut binding: Vec<(ChannelId, u32, String)> = Vec::new();
            let mut latest: HashMap<ChannelId, (u32, String)> = HashMap::new();
            let mut now = NOW;
            for (step, topic, token, flag) in steps {
                let topic = format!("realtime:{topic}");
                let token = ["ann", "bob", "cat:1200"][token];
                let bindings = json!({"postgres_changes": [{"table": "todos"}], "postgres_changes_options": {"wait": flag}});
                let actions = match step {
                    0 | 1 => receive(&mut session, "1", &topic, "phx_join", json!({"config": bindings, "access_token": token})),
                    2 => receive(&mut session, if flag { "1" } else { "0" }, &topic, "phx_leave", json!({})),
                    3 => receive(&mut session, "1", &topic, "access_token", json!({"access_token": if flag { token } else { "no token" }})),
                    4 => {
                        now += 50;
                        session.expire(now)
                    }
                    5 if !binding.is_empty() => {
                        let (channel, attempt, _) = binding.remove(0);
                        session.unavailable(channel, attempt)
                    }
                    _ if binding.is_empty() => Vec::new(),
                    _ => {
                        let (channel, attempt, who) = binding.remove(0);
                        let outcome = if flag { Ok(Vec::new()) } else { Err(SubscribeError("no".to_owned())) };
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
                        Action::Join { channel, .. } => _ = delivering.insert(channel),
                        Action::Leave { channel, .. } => prop_assert!(delivering.remove(&channel)),
                        Action::Forget { .. } => {}
                        Action::Send(frame) => prop_assert!(serde_json::from_str::<Value>(&frame).is_ok()),
                    }
                }
            }
            for action in session.end() {
                let Action::Leave { channel, .. } = action else { panic!("{action:?}") };
                prop_assert!(delivering.remove(&channel));
            }
            prop_assert!(delivering.is_empty());
        }

        /// For any sequence of valid or nearly valid frames: each answer is one frame of the version.
        #[test]
        fn every_answer_is_a_frame_of_its_version(version in 1..3_u8, frames in proptest::collection::vec(nearly_valid_frame(), 0..12)) {
            let version = if version == 1 { Version::V1 } else { Version::V2 };
            let mut session = Session::new(7, version, claims("own", 9000), 100);
            let mut delivering = HashSet::new();
            for [join_ref, reference, topic, event, payload] in frames {
                let frame = match version {
                    Version::V1 => format!(
                        r#"{{"topic":{topic},"event":{event},"payload":{payload},"ref":{reference},"join_ref":{join_ref}}}"#
                    ),
                    Version::V2 => format!("[{join_ref},{reference},{topic},{event},{payload}]"),
                };
                let Ok(message) = decode_text(version, &frame) else { continue };
                let mut actions = session.receive(message, NOW, &TestTokens);
                let binds: Vec<(ChannelId, u32)> = actions
                    .iter()
                    .filter_map(|action| match action {
                        Action::Bind { channel, attempt, .. } => Some((*channel, *attempt)),
                        _ => None,
                    })
                    .collect();
                for (channel, attempt) in binds {
                    actions.extend(session.bound(channel, attempt, Ok(Vec::new())));
                }
                for action in actions {
                    let frames = match action {
                        Action::Send(frame) => vec![frame],
                        Action::Bind { .. } | Action::Forget { .. } => Vec::new(),
                        Action::Join { channel, greeting, .. } => {
                            delivering.insert(channel);
                            greeting
                        }
                        Action::Leave { channel, farewell } => {
                            prop_assert!(delivering.remove(&channel));
                            farewell
                        }
                    };
                    for frame in frames {
                        let message = decode_text(version, &frame);
                        prop_assert!(message.is_ok_and(|message| !message.event.is_empty()), "{}", frame);
                    }
                }
            }
            prop_assert_eq!(session.end().len(), delivering.len());
        }
    }

    /// The five parts of a frame as JSON, mostly of the right type.
    fn nearly_valid_frame() -> impl Strategy<Value = [String; 5]> {
        let texts = |texts: &[&str]| {
            proptest::sample::select(texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>())
        };
        let reference = || texts(&["null", r#""1""#, r#""2""#, "3", "4.5", r#""\u00e9\"""#, "[]"]);
        let topic = texts(&[
            r#""realtime:t""#,
            r#""realtime:u\"\\""#,
            r#""realtime:""#,
            r#""phoenix""#,
            r#""other""#,
            "7",
        ]);
        let event = texts(&[
            r#""phx_join""#,
            r#""phx_join""#,
            r#""phx_leave""#,
            r#""access_token""#,
            r#""heartbeat""#,
            r#""broadcast""#,
            r#""presence""#,
            r#""\u0000""#,
            "null",
        ]);
        let entry = texts(&[
            r#"{"event":"*","schema":"public","table":"todos"}"#,
            r#"{"event":"INSERT","table":"todos","filter":"id=eq.\"1\"","select":["id"]}"#,
            r#"{"schema":"*"}"#,
            r#"{"table":7}"#,
            "{}",
            "null",
            "7",
        ]);
        let entries = proptest::collection::vec(entry, 0..3);
        let token = texts(&[r#""ann""#, r#""bob""#, r#""no token""#, "null", "{}"]);
        let payload = (entries, token, any::<bool>(), any::<bool>()).prop_map(|(entries, token, wait, presence)| {
            let entries = entries.join(",");
            format!(
                r#"{{"config":{{"postgres_changes":[{entries}],"postgres_changes_options":{{"wait":{wait}}},"presence":{{"enabled":{presence}}}}},"access_token":{token}}}"#
            )
        });
        let payload = prop_oneof![8 => payload, 1 => texts(&["{}", "null", "[1]", r#"{"config":7}"#])];
        (reference(), reference(), topic, event, payload).prop_map(
            |(join_ref, reference, topic, event, payload)| [join_ref, reference, topic, event, payload],
        )
    }
}
