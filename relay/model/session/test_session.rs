//! For tests: a session, inputs for it, and a short text of the actions that it returns.

use serde_json::{Value, json};

use crate::model::identity::claims::{Claims, TokenRefusal, Tokens};
use crate::model::session::action::Action;
use crate::model::session::broadcast::Broadcast;
use crate::model::session::channel::{BindOutcome, ChannelId};
use crate::model::session::join::Join;
use crate::model::session::machine::Session;
use crate::model::session::member::MembershipOptions;
use crate::model::session::message::{
    ChannelName, ClientRequest, Incoming, Origin, Outgoing, Reference, Response, SessionEvent,
};
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
        since: None,
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

/// Returns a join of the table `todos` with a token of Ann.
pub(crate) fn ann() -> Join {
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
        Action::Leave { farewell, .. } => farewell.iter().map(|message| line("leave: ", message)).collect(),
    };
    actions.iter().flat_map(lines).collect()
}

pub(crate) fn broadcast() -> ClientRequest {
    ClientRequest::Broadcast(Broadcast::bytes(String::from("e"), vec![1]))
}
