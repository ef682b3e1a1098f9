//! The body of a batch of broadcasts: `{"messages": [{"topic", "event", "payload", "private", "id"}]}`.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::model::session::broadcast::{Broadcast, BroadcastKind, object};

/// Why a field of a message is refused.
const BLANK: &str = "can't be blank";
const INVALID: &str = "is invalid";
const TOO_LARGE: &str = "Payload size exceeds tenant limit";

/// Bytes of a message beside its payload, at most: its event, its id, and what surrounds them.
const ENVELOPE_BYTES: usize = 500;
/// Maximum number of messages of a batch, whatever the rate allows.
pub const MAX_MESSAGES: usize = 1000;

/// A message of a batch.
#[derive(Debug, PartialEq)]
pub struct BatchMessage {
    /// The name of the channel, without the prefix of its topic.
    pub channel: String,
    /// Whether it is for the private channel of this name.
    pub is_private: bool,
    /// What to send.
    pub broadcast: Broadcast,
}

/// Why a batch is refused.
#[derive(Debug, PartialEq)]
pub enum BatchError {
    /// The body is not JSON.
    NotJson,
    /// What is wrong with which message, as JSON.
    Invalid(String),
    /// More messages than are ever allowed at once.
    TooMany,
}

#[derive(Deserialize)]
struct BroadcastBatch<'a> {
    #[serde(borrow)]
    messages: Vec<&'a RawValue>,
}

#[derive(Deserialize, Default)]
struct BroadcastFields<'a> {
    #[serde(borrow)]
    topic: Option<&'a RawValue>,
    #[serde(borrow)]
    event: Option<&'a RawValue>,
    #[serde(borrow)]
    payload: Option<&'a RawValue>,
    #[serde(borrow)]
    private: Option<&'a RawValue>,
    #[serde(borrow)]
    id: Option<&'a RawValue>,
}

/// Parses a batch of at most `max_messages`. One invalid message refuses all.
///
/// # Errors
/// If the body is not JSON, has too many messages, or a message is invalid: its errors are at its place in the list.
pub fn parse(body: &[u8], max_bytes: usize, max_messages: usize) -> Result<Vec<BatchMessage>, BatchError> {
    let body: &RawValue = serde_json::from_slice(body).map_err(|_| BatchError::NotJson)?;
    let batch: BroadcastBatch<'_> = serde_json::from_str(body.get())
        .map_err(|_| BatchError::Invalid(json!({"errors": {"messages": [BLANK]}}).to_string()))?;
    // Before any of them is parsed: the errors of a message take more memory than the message.
    if batch.messages.len() > max_messages {
        return Err(BatchError::TooMany);
    }
    let parsed: Vec<_> = batch.messages.iter().map(|message| parse_message(message, max_bytes)).collect();
    if parsed.iter().all(Result::is_ok) {
        return Ok(parsed.into_iter().filter_map(Result::ok).collect());
    }
    let errors: Vec<Value> =
        parsed.into_iter().map(|message| Value::Object(message.err().unwrap_or_default())).collect();
    Err(BatchError::Invalid(json!({"errors": {"messages": errors}}).to_string()))
}

/// Parses a message.
///
/// # Errors
/// The errors of each field.
fn parse_message(message: &RawValue, max_bytes: usize) -> Result<BatchMessage, Map<String, Value>> {
    let fields: BroadcastFields<'_> = serde_json::from_str(message.get()).unwrap_or_default();
    let mut errors = Map::new();
    let mut add = |field: &str, error: &str| _ = errors.insert(field.to_owned(), json!([error]));
    let mut text = |name: &str, value: Option<&RawValue>| {
        let text = value.map(|value| serde_json::from_str::<Option<Cow<'_, str>>>(value.get()));
        match text {
            Some(Ok(Some(text))) if !text.trim().is_empty() => return text.into_owned(),
            Some(Err(_)) => add(name, INVALID),
            _ => add(name, BLANK),
        }
        String::new()
    };
    let (channel, event) = (text("topic", fields.topic), text("event", fields.event));
    let payload = fields.payload.filter(|payload| payload.get() != "null");
    let object = payload.and_then(object);
    match (payload, object) {
        (None, _) => add("payload", BLANK),
        (Some(_), None) => add("payload", INVALID),
        (_, Some(object)) if object.len() > max_bytes => add("payload", TOO_LARGE),
        _ => {}
    }
    let is_private = match fields.private.map(RawValue::get) {
        None | Some("null" | "false" | r#""false""#) => false,
        Some("true" | r#""true""#) => true,
        Some(_) => {
            add("private", INVALID);
            true
        }
    };
    let id = fields.id.map(RawValue::get).filter(|id| *id != "null");
    if id.is_some_and(|id| id.starts_with(['{', '['])) {
        add("id", INVALID);
    }
    if !errors.is_empty() {
        return Err(errors);
    }
    let content = whole(&event, object.unwrap_or("{}"), id);
    if content.len() > max_bytes + ENVELOPE_BYTES {
        return Err(Map::from_iter([(String::from("payload"), json!([TOO_LARGE]))]));
    }
    let broadcast = Broadcast { kind: BroadcastKind::Message, content: content.into_bytes() };
    Ok(BatchMessage { channel, is_private, broadcast })
}

/// Returns the message as a client would send it.
fn whole(event: &str, payload: &str, id: Option<&str>) -> String {
    let event = Value::from(event);
    let meta = id.map(|id| format!(r#","meta":{{"id":{id}}}"#)).unwrap_or_default();
    format!(r#"{{"type":"broadcast","event":{event},"payload":{payload}{meta}}}"#)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors(body: &str) -> Value {
        match parse(body.as_bytes(), 100, 5) {
            Err(BatchError::Invalid(errors)) => serde_json::from_str(&errors).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn messages_are_written_as_clients_send_them() {
        let body = r#"{"messages":[
            {"topic":"a","event":"e\"","payload":{ "n" : 1.50 }},
            {"topic":"b","event":"f","payload":{},"private":true,"id":"7","more":[]}]}"#;
        let parsed = parse(body.as_bytes(), 100, 5).unwrap();
        let found: Vec<_> = parsed
            .iter()
            .map(|message| {
                let content = String::from_utf8(message.broadcast.content.clone()).unwrap();
                (message.channel.as_str(), message.is_private, content)
            })
            .collect();
        let first = r#"{"type":"broadcast","event":"e\"","payload":{ "n" : 1.50 }}"#.to_owned();
        let second = r#"{"type":"broadcast","event":"f","payload":{},"meta":{"id":"7"}}"#.to_owned();
        assert_eq!(found, [("a", false, first), ("b", true, second)]);
        assert_eq!(parse(br#"{"messages":[]}"#, 100, 5), Ok(Vec::new()));
    }

    #[test]
    fn each_message_has_its_errors_at_its_place() {
        let long = "x".repeat(100);
        let body = format!(
            r#"{{"messages":[{{"topic":"a","event":"e","payload":{{}}}},{{"topic":" ","event":null}},
                {{"topic":5,"event":[],"payload":[],"private":1,"id":[]}},{{"topic":"a","event":"e","payload":{{"x":"{long}"}}}},7]}}"#
        );
        let blank = json!([BLANK]);
        let expected = json!({"errors": {"messages": [
            {},
            {"topic": blank, "event": blank, "payload": blank},
            {"topic": [INVALID], "event": [INVALID], "payload": [INVALID], "private": [INVALID], "id": [INVALID]},
            {"payload": [TOO_LARGE]},
            {"topic": blank, "event": blank, "payload": blank},
        ]}});
        assert_eq!(errors(&body), expected);
    }

    #[test]
    fn a_body_without_a_list_is_invalid_and_one_that_is_not_json_is_told_so() {
        for body in ["{}", "7", r#"{"messages":{}}"#, r#"{"messages":null}"#, "[]"] {
            assert_eq!(errors(body), json!({"errors": {"messages": [BLANK]}}), "{body}");
        }
        for body in ["", "{", "nonsense", r#"{"messages":[}"#, "{} {}"] {
            assert_eq!(parse(body.as_bytes(), 100, 5), Err(BatchError::NotJson), "{body}");
        }
        assert_eq!(parse(&[b'"', 0xff, b'"'], 100, 5), Err(BatchError::NotJson));
    }

    #[test]
    fn too_many_messages_are_refused_unread_and_every_part_of_a_message_counts() {
        assert_eq!(parse(br#"{"messages":[1,1,1,1,1,1]}"#, 100, 5), Err(BatchError::TooMany));
        let long = "x".repeat(700);
        for message in [
            json!({"topic": "a", "event": long, "payload": {}}),
            json!({"topic": "a", "event": "e", "payload": {}, "id": long}),
        ] {
            let expected = json!({"errors": {"messages": [{"payload": [TOO_LARGE]}]}});
            assert_eq!(errors(&json!({"messages": [message]}).to_string()), expected);
        }
    }
}
