//! A client's wish to join a channel: what it asks for, and the frames that answer it.

use std::collections::HashSet;

use serde_json::{Map, Value, json};

use crate::model::codec::phoenix::{Message, Status, Version, push, reply, system};
use crate::model::subscription::binding::Request;
use crate::model::subscription::error::SubscribeError;

/// How many entries of `postgres_changes` one channel may have: each is looked at for each change.
pub const MOST_ENTRIES: usize = 100;

/// How many bytes of topic, configuration and token a join may have: most of them are kept as long as the channel is
/// joined, and a client may have a hundred.
pub const MOST_BYTES: usize = 256 * 1024;

/// How many bytes a topic may have: each frame of its channel says it again.
pub const MOST_TOPIC: usize = 1024;

/// A join that has a topic and a readable configuration. It may wait long for PostgreSQL, so it keeps texts, which are
/// much smaller than what they are read to, and no more of them than it needs.
#[derive(Debug)]
pub struct Join {
    /// Without its payload.
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
    /// Reads a `phx_join`.
    ///
    /// # Errors
    /// With the reason for the reply: no topic of ours, too many bytes, or entries of `postgres_changes` that are too many
    /// or no objects.
    pub fn read(message: &Message) -> Result<Self, String> {
        if message.topic.len() > MOST_TOPIC {
            return Err(format!("TopicNameTooLong: A topic may have {MOST_TOPIC} bytes at most"));
        }
        let references = message.join_ref.to_string().len() + message.ref_.to_string().len();
        let bytes = message.topic.len() + references + message.payload.to_string().len();
        if bytes > MOST_BYTES {
            return Err(too_large());
        }
        match message.topic.strip_prefix("realtime:") {
            None => return Err(String::from("unmatched topic")),
            Some("") => return Err(String::from("TopicNameRequired: You must provide a topic name")),
            Some(_) => {}
        }
        let payload = &message.payload;
        let named = named_by_topic(message);
        let by_operation = named.is_some();
        let entries = named.map_or_else(|| entries(payload), |entry| Ok(vec![entry.to_string()]))?;
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

    /// Its topic.
    pub fn topic(&self) -> &str {
        &self.message.topic
    }

    /// The reference that ties the channel's frames to this join.
    pub fn join_ref(&self) -> &Value {
        &self.message.join_ref
    }

    /// The token that it shows, if it shows one; an opaque key (`sb_…`) is none.
    pub fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    /// How many bytes it had, about as much as its channel keeps.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether changes are asked for at all.
    pub fn wants_changes(&self) -> bool {
        !self.entries.is_empty()
    }

    /// What is to be bound, and why other entries cannot be served as they are written.
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

    /// Whether its topic names the table, and changes are events named after their operation.
    pub fn is_by_operation(&self) -> bool {
        self.by_operation
    }

    /// Whether a failed subscription is to fail the join.
    pub fn waits(&self) -> bool {
        self.waits
    }

    /// The frames that say yes. Every entry is echoed; one that cannot be served with an id that nothing will carry.
    pub fn accept(&self, version: Version) -> Vec<String> {
        // One after the other: read, an entry may take many times its size.
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

    /// The frame that says no.
    pub fn refuse(&self, version: Version, reason: &str) -> String {
        reply(version, &self.message, Status::Error, &json!({"reason": reason}))
    }

    fn entries(&self) -> impl Iterator<Item = Map<String, Value>> {
        self.entries.iter().map(|entry| serde_json::from_str(entry).unwrap_or_default())
    }
}

/// The outcome of a subscription as the client is told it: each reason why an entry is refused, once, or that all of it stands.
pub fn changes_system(
    version: Version,
    join_ref: &Value,
    topic: &str,
    refusals: &[SubscribeError],
) -> Vec<String> {
    let told = |status, message: &str| {
        push(version, join_ref, topic, "system", &system(topic, "postgres_changes", status, message))
    };
    if refusals.is_empty() {
        return vec![told("ok", "Subscribed to PostgreSQL")];
    }
    let mut known = HashSet::new();
    refusals
        .iter()
        .filter(|refusal| known.insert(&refusal.0))
        .map(|refusal| told("error", &refusal.0))
        .collect()
}

/// The refusal of a join whose subscription is refused.
pub fn disabled(refusal: &SubscribeError) -> String {
    format!("RealtimeDisabledForConfiguration: {refusal}")
}

/// Why a join is refused that has more than [`MOST_BYTES`].
pub fn too_large() -> String {
    format!("ChannelRateLimitReached: A join may have {MOST_BYTES} bytes at most")
}

/// What a join without any configuration asks for by its topic, `realtime:schema:table` or `realtime:schema:table:filter`, as
/// clients did before there was one.
fn named_by_topic(message: &Message) -> Option<Value> {
    let topic =
        message.topic.strip_prefix("realtime:").filter(|_| message.payload.get("config").is_none())?;
    let (schema, rest) = topic.split_once(':')?;
    let (table, filter) = rest.split_once(':').unwrap_or((rest, ""));
    Some(json!({"event": "*", "schema": schema, "table": table, "filter": filter}))
}

/// The entries of `config.postgres_changes`; null and `[null]` mean none.
fn entries(payload: &Value) -> Result<Vec<String>, String> {
    let list =
        payload.get("config").and_then(|config| config.get("postgres_changes")).and_then(Value::as_array);
    let list = list.map(Vec::as_slice).unwrap_or_default();
    if list.len() > MOST_ENTRIES {
        return Err(format!("ChannelRateLimitReached: More than {MOST_ENTRIES} postgres_changes entries"));
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
        Join::read(&Message {
            join_ref,
            ref_,
            topic: topic.to_owned(),
            event: "phx_join".to_owned(),
            payload,
        })
    }

    #[test]
    fn a_topic_is_needed_and_entries_are_bounded_objects() {
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
    fn what_a_channel_keeps_is_bounded() {
        let filter = |bytes| json!([{"table": "t", "filter": "x".repeat(bytes)}]);
        let with = |topic: &str, bytes: usize| {
            read(topic, json!({"config": {"postgres_changes": filter(bytes)}})).err()
        };
        assert_eq!(with("realtime:t", MOST_BYTES - 1000), None);
        let refused = Some(String::from("ChannelRateLimitReached: A join may have 262144 bytes at most"));
        assert_eq!(with("realtime:t", MOST_BYTES), refused);
        assert_eq!(with(&format!("realtime:{}", "t".repeat(MOST_TOPIC - 9)), 0), None);
        let refused = with(&format!("realtime:{}", "t".repeat(MOST_TOPIC - 8)), 0);
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
    fn settings_are_read_as_booleans_or_their_words() {
        let waits = |value: Value| {
            read("realtime:t", json!({"config": {"postgres_changes_options": {"wait": value}}}))
                .unwrap()
                .waits()
        };
        assert!(waits(json!(true)) && waits(json!("true")));
        assert!(!waits(json!(false)) && !waits(json!(1)) && !waits(json!(null)));
    }
}
