//! A client's request to join a channel, and the frames that answer it.

use std::collections::HashSet;

use serde_json::{Map, Value, json};

use crate::model::codec::phoenix::{Message, Status, Version, push, reply, system};
use crate::model::subscription::binding::Request;
use crate::model::subscription::error::SubscribeError;

/// Maximum number of `postgres_changes` entries of a channel. Each is checked for each change.
pub const MAX_ENTRIES: usize = 100;

/// Maximum size in bytes of a join's topic, configuration and token together. Most of it is kept while the channel is joined,
/// and a client may join a hundred channels.
pub const MAX_JOIN_BYTES: usize = 256 * 1024;

/// Maximum length of a topic in bytes. Each frame of the channel repeats it.
pub const MAX_TOPIC_BYTES: usize = 1024;

/// A join with a valid topic and configuration. It may wait long for PostgreSQL, so it keeps the entries as JSON text, which is
/// much smaller than parsed values, and drops the rest of the payload.
#[derive(Debug)]
pub struct Join {
    /// The message, without its payload.
    message: Message,
    /// The entries of `postgres_changes`, each as JSON.
    entries: Vec<String>,
    token: Option<String>,
    waits: bool,
    wants_presence: bool,
    by_operation: bool,
    bytes: usize,
}

impl Join {
    /// Parses a `phx_join`.
    ///
    /// # Errors
    /// The reason for the reply: an invalid topic, too many bytes, or `postgres_changes` entries that are too many or not
    /// objects.
    pub fn parse(message: &Message) -> Result<Self, String> {
        if message.topic.len() > MAX_TOPIC_BYTES {
            return Err(format!("TopicNameTooLong: A topic may have {MAX_TOPIC_BYTES} bytes at most"));
        }
        let references = message.join_ref.to_string().len() + message.ref_.to_string().len();
        let bytes = message.topic.len() + references + message.payload.to_string().len();
        if bytes > MAX_JOIN_BYTES {
            return Err(too_large());
        }
        match message.topic.strip_prefix("realtime:") {
            None => return Err(String::from("unmatched topic")),
            Some("") => return Err(String::from("TopicNameRequired: You must provide a topic name")),
            Some(_) => {}
        }
        let payload = &message.payload;
        let by_topic = entry_of_topic(message);
        let by_operation = by_topic.is_some();
        let entries = by_topic.map_or_else(|| entries(payload), |entry| Ok(vec![entry.to_string()]))?;
        let setting = |group: &str, name: &str| {
            let config = payload.get("config");
            config.and_then(|config| config.get(group)?.get(name)).is_some_and(truthy)
        };
        let text = |name: &str| payload.get(name).and_then(Value::as_str);
        let token =
            text("user_token").or_else(|| text("access_token")).filter(|token| !token.starts_with("sb_"));
        Ok(Self {
            entries,
            token: token.map(str::to_owned),
            waits: setting("postgres_changes_options", "wait"),
            wants_presence: setting("presence", "enabled"),
            by_operation,
            bytes,
            message: Message {
                join_ref: message.join_ref.clone(),
                ref_: message.ref_.clone(),
                topic: message.topic.clone(),
                event: message.event.clone(),
                payload: Value::Null,
            },
        })
    }

    /// Returns the topic.
    pub fn topic(&self) -> &str {
        &self.message.topic
    }

    /// Returns the reference that ties the channel's frames to this join.
    pub fn join_ref(&self) -> &Value {
        &self.message.join_ref
    }

    /// Returns the token of the join, if any. An opaque key (`sb_…`) is not a token.
    pub fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    /// Returns the size of the join in bytes, which approximates what its channel keeps.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether the join requests changes.
    pub fn wants_changes(&self) -> bool {
        !self.entries.is_empty()
    }

    /// Returns the requests to bind, and the errors of entries that cannot be parsed.
    pub fn requests(&self) -> (Vec<Request>, Vec<SubscribeError>) {
        let (mut requests, mut malformed) = (Vec::new(), Vec::new());
        for entry in self.entries() {
            match Request::parse(&entry) {
                Ok(request) => requests.push(request),
                Err(refusal) => malformed.push(refusal),
            }
        }
        requests.shrink_to_fit();
        (requests, malformed)
    }

    /// Whether the topic names the table, so that changes are events named after their operation.
    pub fn is_by_operation(&self) -> bool {
        self.by_operation
    }

    /// Whether a failed subscription must fail the join.
    pub fn waits(&self) -> bool {
        self.waits
    }

    /// Returns the frames that accept the join. Every entry is echoed; a malformed one with an id that no change will carry.
    pub fn accept(&self, version: Version) -> Vec<String> {
        // Parse one entry at a time: a parsed entry may need many times its size.
        let echo = |(n, entry): (usize, Map<String, Value>)| match Request::parse(&entry) {
            Ok(request) => request.echo(entry).to_string(),
            Err(_) => with_id(entry, n + 1).to_string(),
        };
        let echo: Vec<String> = self.entries().enumerate().map(echo).collect();
        let response = format!(r#"{{"postgres_changes":[{}]}}"#, echo.join(","));
        let mut frames = vec![reply(version, &self.message, Status::Ok, &response)];
        if self.wants_presence {
            frames.push(push(version, self.join_ref(), self.topic(), "presence_state", "{}"));
        }
        frames
    }

    /// Returns the frame that refuses the join.
    pub fn refuse(&self, version: Version, reason: &str) -> String {
        reply(version, &self.message, Status::Error, &json!({"reason": reason}))
    }

    fn entries(&self) -> impl Iterator<Item = Map<String, Value>> {
        self.entries.iter().map(|entry| serde_json::from_str(entry).unwrap_or_default())
    }
}

/// Returns the `system` frames with the outcome of a subscription: each distinct error once, or success if there is none.
pub fn changes_system(
    version: Version,
    join_ref: &Value,
    topic: &str,
    refusals: &[SubscribeError],
) -> Vec<String> {
    let frame = |status, message: &str| {
        push(version, join_ref, topic, "system", &system(topic, "postgres_changes", status, message))
    };
    if refusals.is_empty() {
        return vec![frame("ok", "Subscribed to PostgreSQL")];
    }
    let mut seen = HashSet::new();
    refusals
        .iter()
        .filter(|refusal| seen.insert(&refusal.0))
        .map(|refusal| frame("error", &refusal.0))
        .collect()
}

/// Returns the reason for refusing a join whose subscription failed.
pub fn disabled(refusal: &SubscribeError) -> String {
    format!("RealtimeDisabledForConfiguration: {refusal}")
}

/// Returns the reason for refusing a join of more than [`MAX_JOIN_BYTES`].
pub fn too_large() -> String {
    format!("ChannelRateLimitReached: A join may have {MAX_JOIN_BYTES} bytes at most")
}

/// Returns the entry that a join without a configuration requests by its topic: `realtime:schema:table` or
/// `realtime:schema:table:filter`, the form of older clients.
fn entry_of_topic(message: &Message) -> Option<Value> {
    let topic =
        message.topic.strip_prefix("realtime:").filter(|_| message.payload.get("config").is_none())?;
    let (schema, rest) = topic.split_once(':')?;
    let (table, filter) = rest.split_once(':').unwrap_or((rest, ""));
    Some(json!({"event": "*", "schema": schema, "table": table, "filter": filter}))
}

/// Returns the entries of `config.postgres_changes` as JSON. Null entries are ignored.
fn entries(payload: &Value) -> Result<Vec<String>, String> {
    let list =
        payload.get("config").and_then(|config| config.get("postgres_changes")).and_then(Value::as_array);
    let list = list.map(Vec::as_slice).unwrap_or_default();
    if list.len() > MAX_ENTRIES {
        return Err(format!("ChannelRateLimitReached: More than {MAX_ENTRIES} postgres_changes entries"));
    }
    list.iter()
        .filter(|entry| !entry.is_null())
        .map(|entry| match entry {
            Value::Object(_) => Ok(entry.to_string()),
            other => Err(format!("UnknownErrorOnChannel: expected a map, got: {other}")),
        })
        .collect()
}

fn with_id(mut entry: Map<String, Value>, id: usize) -> Value {
    entry.insert(String::from("id"), Value::from(id));
    Value::Object(entry)
}

fn truthy(value: &Value) -> bool {
    matches!(value, Value::Bool(true)) || value.as_str() == Some("true")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(topic: &str, payload: Value) -> Result<Join, String> {
        let (join_ref, ref_) = (json!("1"), json!("1"));
        Join::parse(&Message {
            join_ref,
            ref_,
            topic: topic.to_owned(),
            event: "phx_join".to_owned(),
            payload,
        })
    }

    #[test]
    fn a_topic_is_required_and_entries_are_objects_of_limited_number() {
        let with = |entries: Value| read("realtime:t", json!({"config": {"postgres_changes": entries}}));
        assert_eq!(read("phoenix", json!({})).unwrap_err(), "unmatched topic");
        assert!(read("realtime:", json!({})).unwrap_err().starts_with("TopicNameRequired"));
        assert!(with(json!(["x"])).unwrap_err().starts_with("UnknownErrorOnChannel"));
        assert!(with(json!(vec![json!({}); 101])).unwrap_err().starts_with("ChannelRateLimitReached"));
        assert!(!with(json!([null])).unwrap().wants_changes());
        assert!(!with(json!(null)).unwrap().wants_changes());
        assert!(with(json!([{"table": "t"}])).unwrap().wants_changes());
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
            let entries: Vec<Value> = join.entries().map(Value::Object).collect();
            assert_eq!(entries, Vec::from_iter(entry.clone()), "{topic}");
            assert_eq!(join.is_by_operation(), entry.is_some(), "{topic}");
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
        let token = |payload: Value| read("realtime:t", payload).unwrap().token().map(str::to_owned);
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
                .waits()
        };
        assert!(waits(json!(true)) && waits(json!("true")));
        assert!(!waits(json!(false)) && !waits(json!(1)) && !waits(json!(null)));
    }
}
