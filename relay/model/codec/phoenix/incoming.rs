//! What the messages of a Phoenix client mean to its session.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::model::codec::phoenix::{Head, Message, TOPIC_PREFIX};
use crate::model::log::cursor::{Cursor, CursorError};
use crate::model::session::broadcast::{Broadcast, object};
use crate::model::session::join::{
    Join, MAX_ENTRIES, MAX_JOIN_BYTES, MAX_KEY_BYTES, MAX_RECALLED, MAX_TOPIC_BYTES, MEMBERSHIP_BYTES,
    Recall, too_large,
};
use crate::model::session::member::MembershipOptions;
use crate::model::session::message::{ChannelName, ClientRequest, Incoming, Origin, Reference};
use crate::model::subscription::request::Request;

/// The event of a join.
const JOIN: &str = "phx_join";

/// Returns the message for the session.
pub fn message(message: Message) -> Incoming {
    let request = match (message.topic.as_str(), message.event.as_str()) {
        ("phoenix", "heartbeat") => ClientRequest::Heartbeat,
        (_, JOIN) => match join(&message) {
            Ok(join) => ClientRequest::Join(Box::new(join)),
            Err(reason) => ClientRequest::InvalidJoin(reason),
        },
        (_, "phx_leave") => ClientRequest::Leave,
        (_, "access_token") => ClientRequest::AccessToken(token(&message.payload, "access_token")),
        _ => ClientRequest::Unknown,
    };
    let Message { join_ref, ref_, topic, event, .. } = message;
    with_request(Head { join_ref, ref_, topic, event }, request)
}

/// Returns the message for the session, when the payload was too large to be decoded.
pub fn cut_message(head: Head) -> Incoming {
    match head.event.as_str() {
        JOIN => with_request(head, ClientRequest::OversizedJoin),
        _ => message(head.with(Value::Null)),
    }
}

/// Returns the broadcast for the session. Its payload is passed on as it is.
pub fn broadcast(head: Head, payload: &RawValue) -> Incoming {
    let broadcast = Broadcast::message(payload).map(ClientRequest::Broadcast);
    let refused = ClientRequest::Invalid("Broadcast payload must be a map, nested by at most 120");
    with_request(head, broadcast.unwrap_or(refused))
}

/// Returns the change of presence for the session. What is tracked is passed on as it is.
pub fn presence(head: Head, payload: &RawValue) -> Incoming {
    #[derive(Deserialize)]
    struct Presence<'a> {
        #[serde(borrow)]
        event: Option<Cow<'a, str>>,
        #[serde(borrow)]
        payload: Option<&'a RawValue>,
    }
    let request = match serde_json::from_str::<Presence<'_>>(payload.get()) {
        Ok(Presence { event: Some(event), payload }) if event.eq_ignore_ascii_case("track") => {
            let tracked = payload.filter(|payload| payload.get() != "null").map_or(Some("{}"), object);
            tracked.map_or(ClientRequest::Invalid("Presence track payload must be a map"), |tracked| {
                ClientRequest::Track(tracked.to_owned())
            })
        }
        Ok(Presence { event: Some(event), .. }) if event.eq_ignore_ascii_case("untrack") => {
            ClientRequest::Untrack
        }
        _ => ClientRequest::Invalid("Presence event must be track or untrack"),
    };
    with_request(head, request)
}

/// Returns a message for the session.
pub fn with_request(head: Head, request: ClientRequest) -> Incoming {
    let channel = ChannelName { topic: head.topic, join: reference(&head.join_ref) };
    Incoming { origin: Origin { channel, reference: reference(&head.ref_) }, request }
}

fn reference(value: &Value) -> Reference {
    Reference((!value.is_null()).then(|| value.to_string().into()))
}

/// Parses a `phx_join`.
///
/// # Errors
/// The reason for the reply: an invalid topic, too many bytes, or `postgres_changes` entries that are too many or not objects.
fn join(message: &Message) -> Result<Join, String> {
    if message.topic.len() > MAX_TOPIC_BYTES {
        return Err(format!("TopicNameTooLong: A topic may have {MAX_TOPIC_BYTES} bytes at most"));
    }
    let references = message.join_ref.to_string().len() + message.ref_.to_string().len();
    let bytes = message.topic.len() + references + message.payload.to_string().len();
    if bytes > MAX_JOIN_BYTES {
        return Err(too_large());
    }
    match message.topic.strip_prefix(TOPIC_PREFIX) {
        None => return Err(String::from("unmatched topic")),
        Some("") => return Err(String::from("TopicNameRequired: You must provide a topic name")),
        Some(_) => {}
    }
    let payload = &message.payload;
    let by_topic = entry_of_topic(message);
    let entries = match &by_topic {
        Some(entry) => vec![entry],
        None => entries(payload)?,
    };
    let (mut requests, mut malformed, mut texts) = (Vec::new(), Vec::new(), Vec::new());
    for entry in entries {
        texts.push(serde_json::to_string(entry).expect("a JSON object can be written"));
        match Request::parse(entry) {
            Ok(request) => requests.push(request),
            Err(refusal) => malformed.push(refusal),
        }
    }
    requests.shrink_to_fit();
    let membership = membership(payload)?;
    let is_private = payload.get("config").and_then(|config| config.get("private")).is_some_and(is_not_false);
    let recall = setting(payload, "broadcast", "replay").filter(|replay| !replay.is_null()).map(recall);
    if recall.is_some() && !is_private {
        return Err(String::from("UnableToReplayMessages: Replay is not allowed for public channels"));
    }
    let since = payload.get("config").and_then(|config| config.get("since"));
    let since = since.filter(|since| !since.is_null()).map(cursor).transpose()?;
    if since.is_some() && requests.is_empty() {
        return Err(String::from("since: it is for postgres_changes, of which the channel has none"));
    }
    Ok(Join {
        requests,
        malformed,
        entries: texts,
        token: join_token(payload),
        waits: is_set(payload, "postgres_changes_options", "wait"),
        membership,
        acknowledges: is_set(payload, "broadcast", "ack"),
        private_channel: message.topic.strip_prefix(TOPIC_PREFIX).filter(|_| is_private).map(str::to_owned),
        recall: recall.transpose()?,
        since,
        by_operation: by_topic.is_some(),
        // The topic is the session's and the topic's own.
        bytes: bytes + message.topic.len() + MEMBERSHIP_BYTES,
    })
}

/// Returns a setting of the join's `config`.
fn setting<'p>(payload: &'p Value, group: &str, name: &str) -> Option<&'p Value> {
    payload.get("config")?.get(group)?.get(name)
}

fn is_set(payload: &Value, group: &str, name: &str) -> bool {
    setting(payload, group, name).is_some_and(truthy)
}

/// Parses what a join asks of its topic.
///
/// # Errors
/// The reason for the reply.
fn membership(payload: &Value) -> Result<MembershipOptions, String> {
    let presence_key = match setting(payload, "presence", "key") {
        Some(Value::String(key)) => key.clone(),
        Some(Value::Number(key)) => key.to_string(),
        _ => String::new(),
    };
    if presence_key.len() > MAX_KEY_BYTES {
        return Err(format!("PresenceKeyTooLong: A presence key may have {MAX_KEY_BYTES} bytes at most"));
    }
    Ok(MembershipOptions {
        receives_own: is_set(payload, "broadcast", "self"),
        presence_key,
        wants_presence: is_set(payload, "presence", "enabled"),
    })
}

/// Parses `config.since`.
///
/// # Errors
/// The reason for the reply.
fn cursor(since: &Value) -> Result<Cursor, String> {
    let text = since.as_str().ok_or("since: a cursor is expected, as a text")?;
    text.parse().map_err(|why: CursorError| format!("since: {why}; without it the changes of now on come"))
}

/// Parses `config.broadcast.replay`.
///
/// # Errors
/// The reason for the reply.
fn recall(replay: &Value) -> Result<Recall, String> {
    let limit = match replay.get("limit") {
        None | Some(Value::Null) => Some(MAX_RECALLED),
        Some(limit) => limit.as_u64().and_then(|limit| u32::try_from(limit).ok()),
    };
    let limit = limit.filter(|limit| (1..=MAX_RECALLED).contains(limit));
    match (replay.get("since").and_then(Value::as_u64), limit) {
        (Some(since), Some(limit)) => Ok(Recall { since, limit }),
        _ => Err(format!(
            "UnableToReplayMessages: Replay params are not valid: since is a number of milliseconds since 1970, limit is 1 to \
             {MAX_RECALLED}"
        )),
    }
}

/// Returns the token of a join. Older clients name it `user_token`.
fn join_token(payload: &Value) -> Option<String> {
    let has_user_token = payload.get("user_token").is_some_and(Value::is_string);
    token(payload, if has_user_token { "user_token" } else { "access_token" })
}

/// Returns a token. An opaque key (`sb_…`) is not one.
fn token(payload: &Value, name: &str) -> Option<String> {
    let text = payload.get(name).and_then(Value::as_str);
    text.filter(|text| !text.starts_with("sb_")).map(str::to_owned)
}

/// Returns the entry that a join without a configuration requests by its topic: `realtime:schema:table` or
/// `realtime:schema:table:filter`, the form of older clients.
fn entry_of_topic(message: &Message) -> Option<Map<String, Value>> {
    let topic =
        message.topic.strip_prefix(TOPIC_PREFIX).filter(|_| message.payload.get("config").is_none())?;
    let (schema, rest) = topic.split_once(':')?;
    let (table, filter) = rest.split_once(':').unwrap_or((rest, ""));
    let entry = json!({"event": "*", "schema": schema, "table": table, "filter": filter});
    entry.as_object().cloned()
}

/// Returns the entries of `config.postgres_changes`. Null entries are ignored.
fn entries(payload: &Value) -> Result<Vec<&Map<String, Value>>, String> {
    let list =
        payload.get("config").and_then(|config| config.get("postgres_changes")).and_then(Value::as_array);
    let list = list.map(Vec::as_slice).unwrap_or_default();
    if list.len() > MAX_ENTRIES {
        return Err(format!("ChannelRateLimitReached: More than {MAX_ENTRIES} postgres_changes entries"));
    }
    list.iter()
        .filter(|entry| !entry.is_null())
        .map(|entry| match entry {
            Value::Object(entry) => Ok(entry),
            other => Err(format!("UnknownErrorOnChannel: expected a map, got: {other}")),
        })
        .collect()
}

fn truthy(value: &Value) -> bool {
    matches!(value, Value::Bool(true)) || value.as_str().is_some_and(|text| text.eq_ignore_ascii_case("true"))
}

/// Whether a channel is private by this value: a value that is no boolean must not make it public.
fn is_not_false(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.eq_ignore_ascii_case("false"),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(topic: &str, payload: Value) -> Result<Join, String> {
        match request(topic, JOIN, payload) {
            ClientRequest::Join(join) => Ok(*join),
            ClientRequest::InvalidJoin(reason) => Err(reason),
            other => panic!("{other:?}"),
        }
    }

    fn request(topic: &str, event: &str, payload: Value) -> ClientRequest {
        let (topic, event) = (topic.to_owned(), event.to_owned());
        let received = message(Message { join_ref: json!("1"), ref_: json!(2), topic, event, payload });
        let reference = |text: &str| Reference(Some(text.into()));
        let Origin { channel, reference: own } = received.origin;
        assert_eq!((channel.join, own), (reference(r#""1""#), reference("2")));
        received.request
    }

    #[test]
    fn messages_have_their_meaning() {
        let token = |payload| request("realtime:t", "access_token", payload);
        let none = ClientRequest::AccessToken(None);
        assert_eq!(token(json!({"access_token": "a"})), ClientRequest::AccessToken(Some(String::from("a"))));
        for payload in [json!({"access_token": "sb_publishable_x"}), json!({"access_token": 7}), json!(null)]
        {
            assert_eq!(token(payload), none);
        }
        for (topic, event, expected) in [
            ("phoenix", "heartbeat", ClientRequest::Heartbeat),
            ("realtime:t", "heartbeat", ClientRequest::Unknown),
            ("realtime:t", "phx_leave", ClientRequest::Leave),
            ("realtime:t", "phx_reply", ClientRequest::Unknown),
        ] {
            assert_eq!(request(topic, event, json!({})), expected, "{topic} {event}");
        }
    }

    #[test]
    fn only_a_join_is_refused_when_its_payload_was_cut() {
        let cut = |event: &str| {
            let (topic, event) = (String::from("realtime:t"), event.to_owned());
            cut_message(Head { join_ref: Value::Null, ref_: Value::Null, topic, event }).request
        };
        assert_eq!(cut(JOIN), ClientRequest::OversizedJoin);
        assert_eq!(cut("access_token"), ClientRequest::AccessToken(None));
    }

    #[test]
    fn presence_is_tracked_as_it_was_written() {
        let request = |payload: &str| {
            let head =
                Head { join_ref: Value::Null, ref_: Value::Null, topic: String::new(), event: String::new() };
            presence(head, serde_json::from_str(payload).unwrap()).request
        };
        let track = |object: &str| ClientRequest::Track(object.to_owned());
        let object = r#"{ "n":1.50, "n":2 }"#;
        assert_eq!(
            request(&format!(r#"{{"type":"presence","event":"TRACK","payload":{object}}}"#)),
            track(object)
        );
        assert_eq!(request(r#"{"event":"track"}"#), track("{}"));
        assert_eq!(request(r#"{"event":"track","payload":null}"#), track("{}"));
        assert_eq!(request(r#"{"event":"untrack","payload":7}"#), ClientRequest::Untrack);
        for payload in ["7", "[]", r#""x""#] {
            let refused = ClientRequest::Invalid("Presence track payload must be a map");
            assert_eq!(request(&format!(r#"{{"event":"track","payload":{payload}}}"#)), refused);
        }
        for payload in ["7", "null", "{}", r#"{"event":7}"#, r#"{"event":"other"}"#] {
            let refused = ClientRequest::Invalid("Presence event must be track or untrack");
            assert_eq!(request(payload), refused, "{payload}");
        }
    }

    #[test]
    fn a_join_says_what_it_asks_of_its_topic() {
        let join = |config: Value| read("realtime:t", json!({"config": config})).unwrap();
        let found = join(
            json!({"broadcast": {"self": true, "ack": "true"}, "presence": {"key": "k", "enabled": true}}),
        );
        let membership =
            MembershipOptions { receives_own: true, presence_key: String::from("k"), wants_presence: true };
        assert_eq!((found.membership, found.acknowledges, found.private_channel), (membership, true, None));
        let found = join(json!({"broadcast": 7, "presence": {"key": 5}, "private": true}));
        let private = (found.membership.presence_key.as_str(), found.private_channel.as_deref());
        assert_eq!(private, ("5", Some("t")));
        assert_eq!(join(json!({"presence": {"key": null}})).membership, MembershipOptions::default());
        let long = json!({"config": {"presence": {"key": "k".repeat(MAX_KEY_BYTES + 1)}}});
        assert!(read("realtime:t", long).unwrap_err().starts_with("PresenceKeyTooLong: "));
    }

    #[test]
    fn an_entry_that_cannot_be_parsed_is_kept_beside_the_others() {
        let entries = json!([{"table": "t", "x": 1.50}, {"table": 7}]);
        let join = read("realtime:t", json!({"config": {"postgres_changes": entries}})).unwrap();
        assert_eq!((join.requests.len(), join.malformed.len()), (1, 1));
        assert_eq!(join.entries, [r#"{"table":"t","x":1.5}"#, r#"{"table":7}"#]);
    }

    #[test]
    fn a_topic_is_required_and_entries_are_objects_of_limited_number() {
        let with = |entries: Value| read("realtime:t", json!({"config": {"postgres_changes": entries}}));
        assert_eq!(read("phoenix", json!({})).unwrap_err(), "unmatched topic");
        assert!(read("realtime:", json!({})).unwrap_err().starts_with("TopicNameRequired"));
        assert!(with(json!(["x"])).unwrap_err().starts_with("UnknownErrorOnChannel"));
        assert!(with(json!(vec![json!({}); 101])).unwrap_err().starts_with("ChannelRateLimitReached"));
        assert!(with(json!([null])).unwrap().entries.is_empty());
        assert!(with(json!(null)).unwrap().entries.is_empty());
        assert_eq!(with(json!([{"table": "t"}])).unwrap().entries.len(), 1);
    }

    #[test]
    fn without_a_configuration_the_topic_names_schema_table_and_filter() {
        for (topic, payload, entry) in [
            (
                "realtime:s:t",
                json!({}),
                Some(json!({"event": "*", "schema": "s", "table": "t", "filter": ""})),
            ),
            (
                "realtime:s:t:at=gt.10:30",
                json!({"user_token": "a"}),
                Some(json!({"event": "*", "schema": "s", "table": "t", "filter": "at=gt.10:30"})),
            ),
            (
                "realtime:s:*",
                json!({}),
                Some(json!({"event": "*", "schema": "s", "table": "*", "filter": ""})),
            ),
            ("realtime:room", json!({}), None),
            ("realtime:s:t", json!({"config": {}}), None),
            ("realtime:s:t", json!({"config": null}), None),
        ] {
            let join = read(topic, payload).unwrap();
            let entries = entry.iter().map(Value::to_string);
            assert_eq!(join.entries, Vec::from_iter(entries), "{topic}");
            assert_eq!(join.by_operation, entry.is_some(), "{topic}");
        }
    }

    #[test]
    fn the_size_of_a_join_is_limited() {
        let filter = |bytes| json!([{"table": "t", "filter": "x".repeat(bytes)}]);
        let with = |topic: &str, bytes: usize| {
            read(topic, json!({"config": {"postgres_changes": filter(bytes)}})).err()
        };
        assert_eq!(with("realtime:t", MAX_JOIN_BYTES - 1000), None);
        let refused = Some(String::from("ChannelRateLimitReached: A join may have 262144 bytes at most"));
        assert_eq!(with("realtime:t", MAX_JOIN_BYTES), refused);
        assert_eq!(with(&format!("realtime:{}", "t".repeat(MAX_TOPIC_BYTES - 9)), 0), None);
        let refused = with(&format!("realtime:{}", "t".repeat(MAX_TOPIC_BYTES - 8)), 0);
        assert!(refused.unwrap().starts_with("TopicNameTooLong: "));
    }

    #[test]
    fn the_older_name_of_the_token_wins_and_opaque_keys_are_no_tokens() {
        let token = |payload: Value| read("realtime:t", payload).unwrap().token;
        assert_eq!(token(json!({"user_token": "a", "access_token": "b"})).as_deref(), Some("a"));
        assert_eq!(token(json!({"user_token": null, "access_token": "b"})).as_deref(), Some("b"));
        assert_eq!(token(json!({"access_token": "sb_publishable_x"})), None);
        assert_eq!(token(json!({})), None);
    }

    #[test]
    fn settings_are_booleans_or_their_names() {
        let waits = |value: Value| {
            read("realtime:t", json!({"config": {"postgres_changes_options": {"wait": value}}}))
                .unwrap()
                .waits
        };
        assert!(waits(json!(true)) && waits(json!("true")));
        assert!(!waits(json!(false)) && !waits(json!(1)) && !waits(json!(null)));
    }
}
