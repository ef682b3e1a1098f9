//! Broadcasts and presence as Phoenix frames: what is written around a content that all members of a topic share.

use crate::model::codec::phoenix::outgoing::{json_of, quoted};
use crate::model::codec::phoenix::{BROADCAST, Version};
use crate::model::codec::protocol::Wrapping;
use crate::model::session::broadcast::BroadcastKind;
use crate::model::session::message::{ChannelName, Reference};

/// The kind of the only binary frame that clients decode: a user broadcast.
const USER_BROADCAST: u8 = 4;
/// The encodings of its payload.
const BYTES: u8 = 0;
const JSON: u8 = 1;

/// Whether a binary frame can carry bytes under these names: their lengths are single bytes.
pub fn carries_bytes(topic: &str, event: &str) -> bool {
    topic.len() <= usize::from(u8::MAX) && event.len() <= usize::from(u8::MAX)
}

/// Wraps a broadcast. JSON under names that are too long for a binary frame is a text; bytes are not delivered then, nor to
/// version 1.0.0.
pub fn broadcast(
    version: Version,
    topic: &str,
    kind: &BroadcastKind,
    meta: Option<&str>,
) -> Option<Wrapping> {
    match (version, kind) {
        (_, BroadcastKind::Message) => Some(push(version, None, topic, BROADCAST)),
        (Version::V2, BroadcastKind::Bytes(event)) => user_broadcast(topic, event, meta, BYTES),
        (Version::V1, BroadcastKind::Bytes(_)) => None,
        (Version::V2, BroadcastKind::Json(event)) if carries_bytes(topic, event) => {
            user_broadcast(topic, event, meta, JSON)
        }
        (_, BroadcastKind::Json(event)) => {
            let Wrapping { mut before, after, .. } = push(version, None, topic, BROADCAST);
            let meta = meta.map_or_else(String::new, |meta| format!(r#""meta":{meta},"#));
            let fields = format!(r#"{{"type":"broadcast","event":{},{meta}"payload":"#, quoted(event));
            before.extend_from_slice(fields.as_bytes());
            let after = if after == "]" { "}]" } else { r#"},"ref":null}"# };
            Some(Wrapping { is_binary: false, before, after })
        }
    }
}

/// Wraps a presence state.
pub fn presence_state(version: Version, channel: &ChannelName) -> Wrapping {
    push(version, Some(&channel.join), &channel.topic, "presence_state")
}

/// Wraps changes of the presence.
pub fn presence_diff(version: Version, topic: &str) -> Wrapping {
    push(version, None, topic, "presence_diff")
}

/// Wraps the payload of a message without a reference.
fn push(version: Version, join: Option<&Reference>, topic: &str, event: &str) -> Wrapping {
    let (topic, event) = (quoted(topic), quoted(event));
    let (before, after) = match version {
        Version::V1 => (format!(r#"{{"topic":{topic},"event":{event},"payload":"#), r#","ref":null}"#),
        Version::V2 => (format!("[{},null,{topic},{event},", join.map_or("null", json_of)), "]"),
    };
    Wrapping { is_binary: false, before: before.into(), after }
}

/// Wraps the payload of a binary frame; `None` if its names are too long.
fn user_broadcast(topic: &str, event: &str, meta: Option<&str>, encoding: u8) -> Option<Wrapping> {
    let fields = [topic, event, meta.unwrap_or_default()];
    let mut before = vec![USER_BROADCAST];
    for field in fields {
        before.push(u8::try_from(field.len()).ok()?);
    }
    before.push(encoding);
    fields.iter().for_each(|field| before.extend_from_slice(field.as_bytes()));
    Some(Wrapping { is_binary: true, before, after: "" })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn wrapped(
        version: Version,
        topic: &str,
        kind: &BroadcastKind,
        content: &[u8],
    ) -> Option<(bool, Vec<u8>)> {
        let Wrapping { is_binary, before, after } = broadcast(version, topic, kind, None)?;
        Some((is_binary, [before.as_slice(), content, after.as_bytes()].concat()))
    }

    #[test]
    fn a_binary_broadcast_has_the_bytes_of_the_protocol() {
        let expected = b"\x04\x0e\x04\x00\x01realtime:room1ping{\"n\":1}".to_vec();
        let json = BroadcastKind::Json(String::from("ping"));
        assert_eq!(wrapped(Version::V2, "realtime:room1", &json, br#"{"n":1}"#), Some((true, expected)));
        let bytes = BroadcastKind::Bytes(String::from("e"));
        assert_eq!(
            wrapped(Version::V2, "t", &bytes, &[0, 255]),
            Some((true, vec![4, 1, 1, 0, 0, b't', b'e', 0, 255]))
        );
        assert_eq!(wrapped(Version::V1, "t", &bytes, &[0]), None);
    }

    #[test]
    fn what_is_told_beside_the_content_is_in_the_frame_of_each_version() {
        let (json, meta) = (BroadcastKind::Json(String::from("e")), r#"{"id":"7"}"#);
        let frame = |version, topic: &str| {
            let Wrapping { before, after, .. } = broadcast(version, topic, &json, Some(meta)).unwrap();
            [before.as_slice(), b"{}", after.as_bytes()].concat()
        };
        assert_eq!(frame(Version::V2, "t"), b"\x04\x01\x01\x0a\x01te{\"id\":\"7\"}{}");
        let payload = json!({"type": "broadcast", "event": "e", "payload": {}, "meta": {"id": "7"}});
        let v1: Value = serde_json::from_slice(&frame(Version::V1, "t")).unwrap();
        assert_eq!(v1["payload"], payload);
        let long: Value = serde_json::from_slice(&frame(Version::V2, &"x".repeat(300))).unwrap();
        assert_eq!(long[4], payload);
    }

    #[test]
    fn names_too_long_for_a_binary_frame_make_json_a_text_and_bytes_undeliverable() {
        let (fits, long) = ("é".repeat(127), "é".repeat(128));
        for (topic, event, is_binary) in [(&fits, &fits, true), (&long, &fits, false), (&fits, &long, false)]
        {
            let json = BroadcastKind::Json(event.clone());
            assert_eq!(wrapped(Version::V2, topic, &json, b"{}").unwrap().0, is_binary);
            let bytes = BroadcastKind::Bytes(event.clone());
            assert_eq!(wrapped(Version::V2, topic, &bytes, b"{}").is_some(), is_binary);
            assert_eq!(carries_bytes(topic, event), is_binary);
        }
    }

    #[test]
    fn texts_are_frames_of_their_version() {
        let text = |version, topic: &str, kind: &BroadcastKind, content: &str| -> Value {
            let (is_binary, frame) = wrapped(version, topic, kind, content.as_bytes()).unwrap();
            assert!(!is_binary);
            serde_json::from_slice(&frame).unwrap()
        };
        let long = "x".repeat(300);
        let json_kind = BroadcastKind::Json(String::from("a\"b"));
        let payload = json!({"type": "broadcast", "event": "a\"b", "payload": {"n": 1}});
        let v1 = json!({"topic": "t\"", "event": "broadcast", "payload": payload, "ref": null});
        assert_eq!(text(Version::V1, "t\"", &json_kind, r#"{"n":1}"#), v1);
        assert_eq!(text(Version::V1, "t\"", &BroadcastKind::Message, &payload.to_string()), v1);
        let v2 = json!([null, null, long, "broadcast", payload]);
        assert_eq!(text(Version::V2, &long, &json_kind, r#"{"n":1}"#), v2);
        assert_eq!(text(Version::V2, &long, &BroadcastKind::Message, &payload.to_string()), v2);
    }

    #[test]
    fn a_state_has_the_reference_of_the_join_and_a_diff_has_none() {
        let channel = ChannelName { topic: String::from("t"), join: Reference(Some(r#""7""#.into())) };
        let frame = |wrapping: Wrapping| {
            format!("{}{{}}{}", String::from_utf8(wrapping.before).unwrap(), wrapping.after)
        };
        assert_eq!(frame(presence_state(Version::V2, &channel)), r#"["7",null,"t","presence_state",{}]"#);
        assert_eq!(frame(presence_diff(Version::V2, "t")), r#"[null,null,"t","presence_diff",{}]"#);
        let v1 = r#"{"topic":"t","event":"presence_state","payload":{},"ref":null}"#;
        assert_eq!(frame(presence_state(Version::V1, &channel)), v1);
    }
}
