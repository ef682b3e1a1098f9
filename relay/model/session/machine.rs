//! One client's life on a Phoenix socket: joins, leaves, tokens and their expiry. It does nothing itself; it says what to do.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::model::codec::phoenix::{Message, Status, Version, close, error, push, reply, system};
use crate::model::identity::claims::{Claims, TokenRefusal, Tokens};
use crate::model::policy::visibility::Identity;
use crate::model::session::join::{Join, MOST_BYTES, changes_system, disabled};
use crate::model::subscription::binding::Request;
use crate::model::subscription::error::SubscribeError;

/// PostgreSQL cannot be asked who may see what.
/// What a channel is told that cannot be bound while PostgreSQL is away; it may be joined again.
pub const UNAVAILABLE: &str =
    "UnableToConnectToProject: Realtime was unable to connect to the project database";

/// A joined channel: unique in the process, never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChannelId {
    /// The session's number.
    pub session: u64,
    /// The channel's number in it.
    pub channel: u32,
}

/// What the driver has to do, in order.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Send this frame.
    Send(String),
    /// Bind these requests to this identity and give the outcome to [`Session::bound`].
    Bind {
        /// For which channel.
        channel: ChannelId,
        /// Which of the channel's attempts: a later one makes the outcome of an earlier one void.
        attempt: u32,
        /// As whom.
        identity: Identity,
        /// What for.
        requests: Vec<Request>,
    },
    /// Start delivery with the subscription that was bound; the frames go out first.
    Join {
        /// Which channel.
        channel: ChannelId,
        /// Its topic.
        topic: String,
        /// Changes are events named after their operation.
        by_operation: bool,
        /// What the client hears before any change.
        greeting: Vec<String>,
    },
    /// The client left this channel by itself, and will not come back to it.
    Forget {
        /// Which channel.
        channel: ChannelId,
    },
    /// End delivery; the frames go out after the last change.
    Leave {
        /// Which channel.
        channel: ChannelId,
        /// What the client hears after the last change.
        farewell: Vec<String>,
    },
}

/// The machine. Each input returns what to do.
#[derive(Debug)]
pub struct Session {
    number: u64,
    version: Version,
    own: Identity,
    // Boxed: a map has room for a few more than it holds, and most clients have one channel.
    channels: HashMap<String, Box<Channel>>,
    most_channels: usize,
    joins: u32,
}

#[derive(Debug)]
struct Channel {
    id: ChannelId,
    join_ref: Value,
    identity: Identity,
    requests: Vec<Request>,
    /// Why other entries cannot be served at all.
    malformed: Vec<SubscribeError>,
    attempt: u32,
    /// How much of the client's own words it keeps, about.
    bytes: usize,
    /// The join that still waits for its reply.
    joining: Option<Box<Join>>,
    /// The router delivers to it.
    delivering: bool,
    /// Its changes are events named after their operation.
    by_operation: bool,
}

impl Session {
    /// A client that connected with these claims, and how many channels it may join.
    pub fn new(number: u64, version: Version, claims: Claims, most_channels: usize) -> Self {
        Self {
            number,
            version,
            own: Identity::new(claims),
            channels: HashMap::new(),
            most_channels,
            joins: 0,
        }
    }

    /// The serialisation of its frames.
    pub fn version(&self) -> Version {
        self.version
    }

    /// How many channels are joined.
    pub fn channel_count(&self) -> usize {
        self.channels.len()
    }

    /// How many bytes of the client's own words are kept, about: topics, filters, tokens.
    pub fn bytes(&self) -> usize {
        self.channels.values().map(|channel| channel.bytes).sum()
    }

    /// The topic of a channel.
    pub fn topic(&self, channel: ChannelId) -> Option<&str> {
        self.channels.iter().find(|(_, state)| state.id == channel).map(|(topic, _)| topic.as_str())
    }

    /// The second at which the first token of a channel ends.
    pub fn next_expiry(&self) -> Option<u64> {
        self.channels.values().map(|channel| channel.identity.claims().expires_at()).min()
    }

    /// A message came.
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
            (_, event @ ("broadcast" | "presence")) => self.not_yet(&message, event),
            _ => Vec::new(),
        }
    }

    /// [`Action::Bind`] could not be done now: the client has to join again, which it does by itself.
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
                let told = system(&topic, "system", "error", UNAVAILABLE);
                let frames = vec![
                    push(self.version, &state.join_ref, &topic, "system", &told),
                    error(self.version, &state.join_ref, &topic),
                ];
                state.farewell(frames)
            }
        }
    }

    /// What a channel was bound to is gone, or what it was refused may be there now: it is bound anew.
    pub fn rebind(&mut self, channel: ChannelId) -> Vec<Action> {
        let found = self.channels.values_mut().find(|state| state.id == channel && state.delivering);
        found.map_or_else(Vec::new, |state| vec![state.bind()])
    }

    /// The outcome of [`Action::Bind`]: why single entries were refused, while the others are bound, or why nothing could be
    /// bound. Only when no entry is refused is the channel told that it is subscribed.
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

    /// Time passed: channels whose token ended are closed.
    pub fn expire(&mut self, now: u64) -> Vec<Action> {
        self.shut_where(|claims| {
            let seconds_ago = now.checked_sub(claims.expires_at())?;
            Some(format!("Token has expired {seconds_ago} seconds ago"))
        })
    }

    /// The keys are others: channels whose token was signed by one that is gone are closed.
    pub fn recheck(&mut self, tokens: &impl Tokens) -> Vec<Action> {
        self.shut_where(|claims| tokens.recheck(claims).err().map(|refusal| refusal.text))
    }

    /// The socket is gone: delivery to all channels ends.
    pub fn end(&mut self) -> Vec<Action> {
        let delivering =
            self.channels.drain().map(|(_, channel)| channel).filter(|channel| channel.delivering);
        delivering.map(|channel| Action::Leave { channel: channel.id, farewell: Vec::new() }).collect()
    }

    fn join(&mut self, message: &Message, now: u64, tokens: &impl Tokens) -> Vec<Action> {
        let join = match Join::read(message) {
            Ok(join) => Box::new(join),
            Err(reason) => return vec![self.refuse(message, &reason)],
        };
        let mut actions = Vec::new();
        if let Some(old) = self.channels.remove(join.topic()) {
            let frame = close(self.version, &old.join_ref, join.topic());
            actions.extend(old.farewell(vec![frame]));
        }
        if self.channels.len() >= self.most_channels {
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
        self.joins += 1;
        let id = ChannelId { session: self.number, channel: self.joins };
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
                let told = changes_system(self.version, &channel.join_ref, &topic, &channel.malformed);
                actions.extend(told.into_iter().map(Action::Send));
            }
        }
        self.channels.insert(topic, Box::new(channel));
        actions
    }

    /// Whose channel it will be: the token in the join, or the connection's own identity.
    fn identity(&self, join: &Join, now: u64, tokens: &impl Tokens) -> Result<Identity, TokenRefusal> {
        if let Some(token) = join.token() {
            return tokens.verify(token).map(Identity::new);
        }
        tokens.recheck(self.own.claims())?;
        let expired = self.own.claims().expires_at();
        if expired <= now {
            let text = format!("Token has expired {} seconds ago", now - expired);
            return Err(TokenRefusal { code: "InvalidJWTToken", text });
        }
        Ok(self.own.clone())
    }

    fn leave(&mut self, message: &Message) -> Vec<Action> {
        let Some(channel) = self.channels.get(&message.topic) else {
            return Vec::new();
        };
        // A leave that belongs to an earlier join of the topic must not end this one.
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
        if token.len() > MOST_BYTES {
            return self.shut(&message.topic, "Token is too long");
        }
        let claims = match tokens.verify(token) {
            Ok(claims) => claims,
            Err(refusal) => return self.shut(&message.topic, &refusal.text),
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

    fn not_yet(&self, message: &Message, event: &str) -> Vec<Action> {
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

    /// Closes the channels to whose claims there is an objection.
    fn shut_where(&mut self, objection: impl Fn(&Claims) -> Option<String>) -> Vec<Action> {
        let channels = self.channels.iter();
        let met = channels
            .filter_map(|(topic, channel)| Some((topic.clone(), objection(channel.identity.claims())?)));
        let met: Vec<_> = met.collect();
        met.iter().flat_map(|(topic, text)| self.shut(topic, text)).collect()
    }

    /// Closes a channel with a reason; nothing when there is none of this topic.
    pub fn shut(&mut self, topic: &str, text: &str) -> Vec<Action> {
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

    /// The reply to a message that is not obeyed.
    pub fn refuse(&self, message: &Message, reason: &str) -> Action {
        Action::Send(reply(self.version, message, Status::Error, &json!({"reason": reason})))
    }
}

impl Channel {
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

    /// Frames that come after the last change, if changes were delivered at all.
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
    const MOST_CHANNELS: usize = 100;

    /// Tokens are `name` or `name:expiry`; anything with a blank is none.
    struct Names;

    impl Tokens for Names {
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
        Session::new(7, Version::V2, claims("own", 9000), MOST_CHANNELS)
    }

    fn says(session: &mut Session, reference: &str, topic: &str, event: &str, payload: Value) -> Vec<Action> {
        let message = Message {
            join_ref: json!(reference),
            ref_: json!(reference),
            topic: topic.to_owned(),
            event: event.to_owned(),
            payload,
        };
        session.receive(message, NOW, &Names)
    }

    fn join(session: &mut Session, reference: &str, token: &str, more: Value) -> Vec<Action> {
        let mut config = json!({"postgres_changes": [{"event": "*", "table": "todos"}]});
        for (name, value) in more.as_object().unwrap() {
            config[name] = value.clone();
        }
        says(session, reference, "realtime:t", "phx_join", json!({"config": config, "access_token": token}))
    }

    /// What is to be bound: channel, attempt and for whom.
    fn bind(actions: &[Action]) -> (ChannelId, u32, String) {
        let found = actions.iter().find_map(|action| match action {
            Action::Bind { channel, attempt, identity, .. } => {
                Some((*channel, *attempt, identity.claims().sub().unwrap().to_owned()))
            }
            _ => None,
        });
        found.unwrap_or_else(|| panic!("nothing is to be bound: {actions:?}"))
    }

    /// A session with one channel that delivers.
    fn delivering() -> (Session, ChannelId) {
        let mut session = session();
        let (channel, attempt, _) = bind(&join(&mut session, "1", "ann", json!({})));
        session.bound(channel, attempt, Ok(Vec::new()));
        (session, channel)
    }

    /// The frames in order, each as `event status-or-message`, with what they are part of.
    fn told(actions: &[Action]) -> Vec<String> {
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
        assert_eq!(told(&actions), ["bind"]);
        let (channel, attempt, who) = bind(&actions);
        assert_eq!(who, "ann");
        let actions = session.bound(channel, attempt, Ok(Vec::new()));
        let greeting =
            ["join: 1 phx_reply ok", "join: 1 presence_state ", "join: 1 system Subscribed to PostgreSQL"];
        assert_eq!(told(&actions), greeting);
    }

    #[test]
    fn a_join_without_bindings_is_answered_at_once() {
        let mut session = session();
        let actions = join(&mut session, "1", "ann", json!({"postgres_changes": [null]}));
        assert_eq!(told(&actions), ["1 phx_reply ok"]);
        assert_eq!(told(&session.end()), [""; 0], "nothing was delivered to it");
    }

    #[test]
    fn an_outcome_counts_only_for_the_latest_attempt() {
        let mut session = session();
        let (channel, first, _) = bind(&join(&mut session, "1", "ann", json!({})));
        let token = json!({"access_token": "bob"});
        let (_, second, who) = bind(&says(&mut session, "1", "realtime:t", "access_token", token));
        assert_eq!((second, who.as_str()), (first + 1, "bob"));
        assert_eq!(session.bound(channel, first, Ok(Vec::new())), []);
        assert_eq!(session.unavailable(channel, first), []);
        assert_eq!(told(&session.bound(channel, second, Ok(Vec::new()))).len(), 2);

        // The same for a channel that is joined anew, or left, while it is being bound.
        let (old, attempt, _) = bind(&join(&mut session, "2", "ann", json!({})));
        let actions = join(&mut session, "3", "ann", json!({}));
        assert_eq!(told(&actions), ["2 phx_close ", "bind"]);
        let (new, ..) = bind(&actions);
        assert_ne!(old, new);
        assert_eq!(session.bound(old, attempt, Ok(Vec::new())), []);
        let left = says(&mut session, "3", "realtime:t", "phx_leave", json!({}));
        assert_eq!(told(&left), ["3 phx_reply ok", "3 phx_close "]);
        assert_eq!(session.bound(new, 1, Ok(Vec::new())), []);
    }

    #[test]
    fn a_refusal_is_told_beside_the_join_or_in_its_place() {
        let refusal = || Err(SubscribeError("no".to_owned()));
        let mut session = session();
        let (channel, attempt, _) = bind(&join(&mut session, "1", "ann", json!({})));
        let actions = session.bound(channel, attempt, refusal());
        assert_eq!(told(&actions), ["1 phx_reply ok", "1 system no"]);
        assert_eq!(session.channel_count(), 1);

        let waiting = json!({"postgres_changes_options": {"wait": true}});
        let (channel, attempt, _) = bind(&join(&mut session, "2", "ann", waiting.clone()));
        let actions = session.bound(channel, attempt, refusal());
        assert_eq!(told(&actions), ["2 phx_reply RealtimeDisabledForConfiguration: no"]);
        assert_eq!(session.channel_count(), 0);

        let mut unreadable = waiting;
        unreadable["postgres_changes"] = json!([{}]);
        let actions = join(&mut session, "3", "ann", unreadable);
        assert!(
            told(&actions)[0].starts_with("3 phx_reply RealtimeDisabledForConfiguration: No subscription")
        );
        assert_eq!(session.channel_count(), 0);
    }

    #[test]
    fn an_entry_that_is_refused_leaves_the_others_and_is_told_each_time() {
        let no = |text: &str| SubscribeError(text.to_owned());
        let mut session = session();
        let entries = json!({"postgres_changes": [{"table": "todos"}, {}, {"table": "others"}]});
        let (channel, attempt, _) = bind(&join(&mut session, "1", "ann", entries.clone()));
        let actions = session.bound(channel, attempt, Ok(vec![no("others"), no("others")]));
        let malformed = "No subscription params provided. Please provide at least a `schema` or `table` to subscribe to: {}";
        let refused = format!("join: 1 system {malformed}");
        assert_eq!(told(&actions), ["join: 1 phx_reply ok", &refused, "join: 1 system others"]);
        let (_, attempt, _) = bind(&session.rebind(channel));
        assert_eq!(told(&session.bound(channel, attempt, Ok(Vec::new()))), [refused]);

        let mut waiting = entries;
        waiting["postgres_changes"] = json!([{"table": "todos"}]);
        waiting["postgres_changes_options"] = json!({"wait": true});
        let (channel, attempt, _) = bind(&join(&mut session, "2", "ann", waiting));
        let actions = session.bound(channel, attempt, Ok(vec![no("others")]));
        assert_eq!(told(&actions), ["2 phx_reply RealtimeDisabledForConfiguration: others"]);
    }

    #[test]
    fn a_refusal_of_new_claims_ends_delivery_and_keeps_the_channel() {
        let (mut session, channel) = delivering();
        let token = json!({"access_token": "bob"});
        let (_, attempt, _) = bind(&says(&mut session, "1", "realtime:t", "access_token", token));
        let actions = session.bound(channel, attempt, Err(SubscribeError("no".to_owned())));
        assert_eq!(told(&actions), ["leave: 1 system no"]);
        assert_eq!(session.channel_count(), 1);
        assert_eq!(told(&session.end()), [""; 0]);
    }

    #[test]
    fn without_postgresql_a_client_is_sent_to_join_again() {
        let mut joining = session();
        let (channel, attempt, _) = bind(&join(&mut joining, "1", "ann", json!({})));
        let actions = joining.unavailable(channel, attempt);
        assert_eq!(told(&actions), [format!("1 phx_reply {UNAVAILABLE}")]);
        assert_eq!(joining.channel_count(), 0);

        let (mut session, channel) = delivering();
        let token = json!({"access_token": "bob"});
        let (_, attempt, _) = bind(&says(&mut session, "1", "realtime:t", "access_token", token));
        let actions = session.unavailable(channel, attempt);
        assert_eq!(
            told(&actions),
            [format!("leave: 1 system {UNAVAILABLE}"), "leave: 1 phx_error ".to_owned()]
        );
        assert_eq!(session.channel_count(), 0);
    }

    #[test]
    fn what_ends_a_channel_comes_after_its_last_change() {
        let (mut session, _) = delivering();
        let bad = says(&mut session, "1", "realtime:t", "access_token", json!({"access_token": "no token"}));
        assert_eq!(told(&bad), ["leave: 1 system no token", "leave: 1 phx_close "]);
        let (mut session, _) = delivering();
        let left = says(&mut session, "1", "realtime:t", "phx_leave", json!({}));
        assert_eq!(told(&left), ["leave: 1 phx_reply ok", "leave: 1 phx_close "]);
        let (mut session, _) = delivering();
        let stale = says(&mut session, "0", "realtime:t", "phx_leave", json!({}));
        assert_eq!(told(&stale), ["0 phx_reply ok"]);
        assert_eq!(told(&session.end()), ["leave"]);
    }

    #[test]
    fn tokens_that_say_nothing_new_do_nothing() {
        let (mut session, _) = delivering();
        for payload in [
            json!({"access_token": "ann"}),
            json!({"access_token": "sb_publishable_x"}),
            json!({"access_token": null}),
            json!({}),
            json!(null),
        ] {
            assert_eq!(says(&mut session, "1", "realtime:t", "access_token", payload), []);
        }
    }

    #[test]
    fn a_channel_ends_with_its_token_and_no_other_does() {
        let mut session = session();
        assert_eq!(session.next_expiry(), None);
        for (n, token) in ["ann:2000", "bob:3000", "sb_secret_x"].into_iter().enumerate() {
            let payload = json!({"access_token": token});
            says(&mut session, &n.to_string(), &format!("realtime:{n}"), "phx_join", payload);
        }
        assert_eq!(session.next_expiry(), Some(2000));
        assert_eq!(session.expire(1999), []);
        let ended = session.expire(2000);
        assert_eq!(told(&ended), ["0 system Token has expired 0 seconds ago", "0 phx_close "]);
        assert_eq!(session.next_expiry(), Some(3000));
        let ended = session.expire(3007);
        assert_eq!(told(&ended), ["1 system Token has expired 7 seconds ago", "1 phx_close "]);
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
            let (.., who) = bind(&says(&mut session, "1", "realtime:t", "phx_join", payload.clone()));
            assert_eq!(who, expected, "{payload}");
        }
        let mut late = Session::new(7, Version::V2, claims("own", 900), MOST_CHANNELS);
        let actions = says(&mut late, "1", "realtime:t", "phx_join", json!({}));
        assert_eq!(told(&actions), ["1 phx_reply InvalidJWTToken: Token has expired 100 seconds ago"]);
    }

    #[test]
    fn channels_of_a_withdrawn_key_are_closed_and_not_joined_again() {
        let own = claims("own", 9000).signed_by(Some(KeyId(7)));
        let mut session = Session::new(7, Version::V2, own, MOST_CHANNELS);
        join(&mut session, "1", "ann", json!({}));
        let bindings = json!({"config": {"postgres_changes": [{"event": "*", "table": "todos"}]}});
        // Its claims are those of the connection, which were good when it joined.
        session.own = Identity::new(claims("own", 9000));
        says(&mut session, "2", "realtime:own", "phx_join", bindings.clone());
        session.own = Identity::new(claims("own", 9000).signed_by(Some(KeyId(7))));
        assert_eq!(session.recheck(&Names), []);
        let refused = says(&mut session, "3", "realtime:own", "phx_join", bindings);
        assert_eq!(told(&refused), ["2 phx_close ", "3 phx_reply JwtSignerError: no key"]);
        let channel = session.channels.get_mut("realtime:t").unwrap();
        channel.identity = Identity::new(claims("ann", 5000).signed_by(Some(KeyId(7))));
        assert_eq!(told(&session.recheck(&Names)), ["1 system no key", "1 phx_close "]);
        assert_eq!(session.channel_count(), 0);
    }

    #[test]
    fn channels_are_bounded() {
        let mut session = session();
        for n in 0..MOST_CHANNELS {
            says(&mut session, "1", &format!("realtime:{n}"), "phx_join", json!({}));
        }
        let refused = says(&mut session, "1", "realtime:more", "phx_join", json!({}));
        assert_eq!(told(&refused), ["1 phx_reply ChannelRateLimitReached: Too many channels"]);
        let again = says(&mut session, "2", "realtime:5", "phx_join", json!({}));
        assert_eq!(told(&again), ["1 phx_close ", "2 phx_reply ok"]);
        assert_eq!(session.channel_count(), MOST_CHANNELS);
    }

    proptest! {
        /// Whatever comes in whatever order: delivery that ends had begun, nothing is delivered to a channel that was
        /// not bound for its latest identity, and at the end nothing is left.
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
                    0 | 1 => says(&mut session, "1", &topic, "phx_join", json!({"config": bindings, "access_token": token})),
                    2 => says(&mut session, if flag { "1" } else { "0" }, &topic, "phx_leave", json!({})),
                    3 => says(&mut session, "1", &topic, "access_token", json!({"access_token": if flag { token } else { "no token" }})),
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

        /// Frames that make sense, or nearly, in any order: each answer is one frame of the version.
        #[test]
        fn every_answer_is_a_frame_of_its_version(version in 1..3_u8, frames in proptest::collection::vec(nearly(), 0..12)) {
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
                let mut actions = session.receive(message, NOW, &Names);
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

    /// The five parts of a frame as JSON, mostly of the right kind.
    fn nearly() -> impl Strategy<Value = [String; 5]> {
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
