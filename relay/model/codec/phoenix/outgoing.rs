//! What a session says, as Phoenix frames.

use serde_json::{Map, Value, json};

use crate::model::codec::phoenix::{TOPIC_PREFIX, Version};
use crate::model::codec::protocol::{FrameError, SUBSCRIBED};
use crate::model::session::message::{Outgoing, Reference, Response, SessionEvent};
use crate::model::subscription::request::Request;

/// The JSON of a reference that there is not.
const NULL: &str = "null";

/// Encodes a message of a session.
pub fn encode(version: Version, message: &Outgoing) -> String {
    let topic = &message.channel.topic;
    let join_ref = json_of(&message.channel.join);
    let push = |event: &str, payload: &str| frame(version, join_ref, NULL, topic, event, payload);
    let system = |extension, status, text: &str| push("system", &system(topic, extension, status, text));
    match &message.event {
        SessionEvent::Reply(to, response) => {
            frame(version, join_ref, json_of(to), topic, "phx_reply", &reply(response))
        }
        SessionEvent::Subscribed => system("postgres_changes", "ok", SUBSCRIBED),
        SessionEvent::Hidden(why) => system("postgres_changes", "ok", why),
        SessionEvent::NotSubscribed(refusal) => system("postgres_changes", "error", &refusal.to_string()),
        // Not an error: clients may take one for an error of the channel and leave it.
        SessionEvent::NotDelivered(text) => system("broadcast", "ok", text),
        SessionEvent::Error(text) => system("system", "error", text),
        SessionEvent::Closed => frame(version, join_ref, join_ref, topic, "phx_close", "{}"),
        SessionEvent::Failed => frame(version, join_ref, join_ref, topic, "phx_error", "{}"),
    }
}

/// Encodes that a frame of the client is not a message. It belongs to no channel.
pub fn unreadable(version: Version, error: FrameError) -> String {
    fan_out(version, "phoenix", "system", &system("phoenix", "system", "error", &error.to_string()))
}

/// Encodes a push that is the same for every member of a topic. `payload` is JSON.
pub fn fan_out(version: Version, topic: &str, event: &str, payload: &str) -> String {
    frame(version, NULL, NULL, topic, event, payload)
}

/// Returns the payload of a `system` message as JSON. Clients require all four fields.
pub fn system(topic: &str, extension: &str, status: &str, message: &str) -> String {
    let channel = topic.strip_prefix(TOPIC_PREFIX).unwrap_or(topic);
    json!({"channel": channel, "extension": extension, "message": message, "status": status}).to_string()
}

/// Returns a text as JSON.
pub fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("a string always has a JSON form")
}

/// Returns the payload of a reply as JSON. Clients require that the response is an object.
fn reply(response: &Response) -> String {
    let (status, response) = match response {
        Response::Alive | Response::Left | Response::Done => ("ok", String::from("{}")),
        Response::Joined(entries) => ("ok", joined(entries)),
        Response::Refused(reason) => ("error", json!({"reason": reason}).to_string()),
        Response::MayNotSend => ("error", String::from(r#"{"error":"unauthorized"}"#)),
        Response::MayNotTrack => ("error", String::from("{}")),
        Response::TooLarge => ("error", String::from(r#"{"error":"payload_size_exceeded"}"#)),
    };
    format!(r#"{{"status":"{status}","response":{response}}}"#)
}

/// Returns the response to a join: each entry with the id that its changes carry. A malformed one gets an id that no change will
/// carry.
fn joined(entries: &[String]) -> String {
    // Parse one entry at a time: a parsed entry may need many times its size.
    let echo = |(n, entry): (usize, &String)| {
        let mut entry: Map<String, Value> = serde_json::from_str(entry).unwrap_or_default();
        match Request::parse(&entry) {
            Ok(request) => request.echo(entry).to_string(),
            Err(_) => {
                entry.insert(String::from("id"), Value::from(n + 1));
                Value::Object(entry).to_string()
            }
        }
    };
    let entries: Vec<String> = entries.iter().enumerate().map(echo).collect();
    format!(r#"{{"postgres_changes":[{}]}}"#, entries.join(","))
}

/// Returns the JSON of a reference.
pub fn json_of(reference: &Reference) -> &str {
    reference.0.as_deref().unwrap_or(NULL)
}

/// Encodes a frame. The references and the payload are JSON.
fn frame(version: Version, join_ref: &str, ref_: &str, topic: &str, event: &str, payload: &str) -> String {
    let (topic, event) = (quoted(topic), quoted(event));
    match version {
        // Clients of this version drop a frame without `ref`, and none of them uses `join_ref`.
        Version::V1 => format!(r#"{{"topic":{topic},"event":{event},"payload":{payload},"ref":{ref_}}}"#),
        Version::V2 => format!("[{join_ref},{ref_},{topic},{event},{payload}]"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::model::catalog::topic_rules::TopicRights;
    use crate::model::codec::phoenix::decode_text;
    use crate::model::codec::protocol::SocketProtocol;
    use crate::model::session::action::Action;
    use crate::model::session::channel::{BindOutcome, ChannelId};
    use crate::model::session::machine::Session;
    use crate::model::session::message::ChannelName;
    use crate::model::session::test_session::{NOW, TestTokens, claims};
    use crate::model::subscription::error::SubscribeError;

    fn reference(json: &str) -> Reference {
        Reference((json != NULL).then(|| json.into()))
    }

    fn check(topic: &str, join: &str, event: SessionEvent, v1: &str, v2: &str) {
        let channel = ChannelName { topic: topic.to_owned(), join: reference(join) };
        let message = Outgoing { channel, event };
        assert_eq!(encode(Version::V1, &message), v1);
        assert_eq!(encode(Version::V2, &message), v2);
    }

    #[test]
    fn replies_are_encoded() {
        let reply = |to: &str, response| SessionEvent::Reply(reference(to), response);
        check(
            "realtime:a\"b",
            r#""1""#,
            reply("2", Response::Joined(Vec::new())),
            r#"{"topic":"realtime:a\"b","event":"phx_reply","payload":{"status":"ok","response":{"postgres_changes":[]}},"ref":2}"#,
            r#"["1",2,"realtime:a\"b","phx_reply",{"status":"ok","response":{"postgres_changes":[]}}]"#,
        );
        check(
            "phoenix",
            NULL,
            reply(NULL, Response::Refused(String::from("unmatched topic"))),
            r#"{"topic":"phoenix","event":"phx_reply","payload":{"status":"error","response":{"reason":"unmatched topic"}},"ref":null}"#,
            r#"[null,null,"phoenix","phx_reply",{"status":"error","response":{"reason":"unmatched topic"}}]"#,
        );
        check(
            "t",
            NULL,
            reply(r#""7""#, Response::TooLarge),
            r#"{"topic":"t","event":"phx_reply","payload":{"status":"error","response":{"error":"payload_size_exceeded"}},"ref":"7"}"#,
            r#"[null,"7","t","phx_reply",{"status":"error","response":{"error":"payload_size_exceeded"}}]"#,
        );
        for response in [Response::Alive, Response::Left, Response::Done] {
            check(
                "t",
                NULL,
                reply(r#""7""#, response),
                r#"{"topic":"t","event":"phx_reply","payload":{"status":"ok","response":{}},"ref":"7"}"#,
                r#"[null,"7","t","phx_reply",{"status":"ok","response":{}}]"#,
            );
        }
    }

    #[test]
    fn a_join_is_answered_with_each_entry_and_its_id() {
        let entries = [r#"{"table":"t","x":"é"}"#, r#"{"table":7}"#].map(str::to_owned);
        let sent: Value = serde_json::from_str(&joined(&entries)).unwrap();
        let entries = sent["postgres_changes"].as_array().unwrap();
        assert!(entries[0]["id"].as_u64().is_some_and(|id| id > 0));
        assert_eq!((&entries[0]["table"], &entries[0]["x"]), (&json!("t"), &json!("é")));
        assert_eq!(entries[1], json!({"table": 7, "id": 2}));
    }

    #[test]
    fn the_events_of_a_channel_are_encoded() {
        let join = r#""1""#;
        let system = |extension: &str, status: &str, message: &str| {
            format!(
                r#"{{"channel":"t","extension":"{extension}","message":"{message}","status":"{status}"}}"#
            )
        };
        let no = SubscribeError::Other(String::from("no"));
        for (event, name, payload) in [
            (
                SessionEvent::Subscribed,
                "system",
                system("postgres_changes", "ok", "Subscribed to PostgreSQL"),
            ),
            (SessionEvent::Hidden(String::from("why")), "system", system("postgres_changes", "ok", "why")),
            (SessionEvent::NotSubscribed(no), "system", system("postgres_changes", "error", "no")),
            (SessionEvent::Error(String::from("why")), "system", system("system", "error", "why")),
            (SessionEvent::NotDelivered(String::from("why")), "system", system("broadcast", "ok", "why")),
        ] {
            let v1 = format!(r#"{{"topic":"realtime:t","event":"{name}","payload":{payload},"ref":null}}"#);
            let v2 = format!(r#"["1",null,"realtime:t","{name}",{payload}]"#);
            check("realtime:t", join, event, &v1, &v2);
        }
        for (event, name) in [(SessionEvent::Closed, "phx_close"), (SessionEvent::Failed, "phx_error")] {
            let v1 = format!(r#"{{"topic":"t","event":"{name}","payload":{{}},"ref":"1"}}"#);
            let v2 = format!(r#"["1","1","t","{name}",{{}}]"#);
            check("t", join, event, &v1, &v2);
        }
    }

    #[test]
    fn an_unreadable_frame_is_answered_on_the_topic_of_the_socket() {
        let payload = r#"{"channel":"phoenix","extension":"system","message":"the frame is not JSON","status":"error"}"#;
        let v1 = format!(r#"{{"topic":"phoenix","event":"system","payload":{payload},"ref":null}}"#);
        assert_eq!(unreadable(Version::V1, FrameError::NotJson), v1);
        let v2 = format!(r#"[null,null,"phoenix","system",{payload}]"#);
        assert_eq!(unreadable(Version::V2, FrameError::NotJson), v2);
    }

    proptest! {
        #[test]
        fn encoded_messages_are_decoded(topic in "\\PC*", join_ref in ".*", text in ".*") {
            let join_ref = Value::from(join_ref);
            let channel = ChannelName { topic: topic.clone(), join: reference(&join_ref.to_string()) };
            let message = Outgoing { channel, event: SessionEvent::Error(text.clone()) };
            for version in [Version::V1, Version::V2] {
                let found = decode_text(version, &encode(version, &message)).unwrap();
                let kept = if version == Version::V2 { join_ref.clone() } else { Value::Null };
                prop_assert_eq!((found.join_ref, found.ref_), (kept, Value::Null));
                prop_assert_eq!((&found.topic, found.event.as_str()), (&topic, "system"));
                prop_assert_eq!(&found.payload["message"], &text);
            }
        }

        /// For any sequence of valid or nearly valid frames: each answer is one frame of the version.
        #[test]
        fn every_answer_is_a_frame_of_its_version(version in 1..3_u8, frames in proptest::collection::vec(nearly_valid_frame(), 0..12)) {
            let version = if version == 1 { Version::V1 } else { Version::V2 };
            let mut session = Session::new(7, claims("own", 9000), 100);
            let mut delivering = HashSet::new();
            for [join_ref, reference, topic, event, payload] in frames {
                let frame = match version {
                    Version::V1 => format!(
                        r#"{{"topic":{topic},"event":{event},"payload":{payload},"ref":{reference},"join_ref":{join_ref}}}"#
                    ),
                    Version::V2 => format!("[{join_ref},{reference},{topic},{event},{payload}]"),
                };
                let Ok(message) = SocketProtocol::decode_text(&version, &frame) else { continue };
                let mut actions = session.receive(message, NOW, &TestTokens);
                let binds: Vec<(ChannelId, u32)> = actions
                    .iter()
                    .filter_map(|action| match action {
                        Action::Bind { channel, attempt, .. } => Some((*channel, *attempt)),
                        _ => None,
                    })
                    .collect();
                let judgements: Vec<(ChannelId, u32)> = actions
                    .iter()
                    .filter_map(|action| match action {
                        Action::Judge { channel, judgement, .. } => Some((*channel, *judgement)),
                        _ => None,
                    })
                    .collect();
                for (channel, judgement) in judgements {
                    let denied = Some((TopicRights::default(), Some(String::from("why"))));
                    actions.extend(session.judged(channel, judgement, NOW, denied));
                }
                for (channel, attempt) in binds {
                    actions.extend(session.bound(channel, attempt, Ok(BindOutcome::default())));
                }
                for action in actions {
                    let messages = match action {
                        Action::Send(message) => vec![message],
                        Action::Broadcast { origin, .. } | Action::Track { origin, .. } => {
                            vec![origin.reply(Response::Done)]
                        }
                        Action::Bind { .. }
                        | Action::Judge { .. }
                        | Action::Permit { .. }
                        | Action::Recall { .. }
                        | Action::Forget { .. }
                        | Action::Enter { .. }
                        | Action::Exit { .. } => Vec::new(),
                        Action::Listen { channel, .. } => {
                            delivering.insert(channel);
                            Vec::new()
                        }
                        Action::Join { channel, greeting, .. } => {
                            delivering.insert(channel);
                            greeting
                        }
                        Action::Leave { channel, farewell } => {
                            prop_assert!(delivering.remove(&channel));
                            farewell
                        }
                    };
                    for message in messages {
                        let frame = encode(version, &message);
                        let decoded = decode_text(version, &frame);
                        prop_assert!(decoded.is_ok_and(|message| !message.event.is_empty()), "{}", frame);
                    }
                }
            }
            let left = session.end().into_iter().filter(|action| matches!(action, Action::Leave { .. }));
            prop_assert_eq!(left.count(), delivering.len());
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
