//! The changes of a channel as Phoenix frames.

use std::fmt::Write;

use crate::model::codec::phoenix::Version;
use crate::model::codec::phoenix::outgoing::{fan_out, quoted, system};
use crate::model::codec::protocol::{
    BroadcastForm, ChangeEncoding, ChannelFormat, Envelope, Notice, RESUMED, STALLED,
};
use crate::model::session::stored_broadcast::StoredBroadcast;

/// The encoding of a channel's changes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ChannelChanges {
    /// The protocol version.
    pub version: Version,
    /// The form of the changes.
    pub format: ChannelFormat,
}

impl ChangeEncoding for ChannelChanges {
    fn includes_cursor(&self) -> bool {
        self.format.with_cursor
    }

    fn envelope(&self, ids: &[u32], operation: &str, _: &str) -> Envelope {
        let topic = &self.format.topic;
        match self.format.by_operation {
            true => around_event(self.version, topic, operation),
            false => around_changes(self.version, topic, ids),
        }
    }

    fn gap(&self, reason: &str, _: Option<&str>) -> Notice {
        Notice::GapText(self.text("error", &format!("Gap: {reason}")))
    }

    fn hidden(&self, why: &str) -> Notice {
        self.notice("ok", why)
    }

    fn stall(&self, stalls: bool) -> Option<Notice> {
        let (status, text) = if stalls { ("error", STALLED) } else { ("ok", RESUMED) };
        Some(self.notice(status, text))
    }

    fn broadcast(&self, stored: &StoredBroadcast) -> BroadcastForm {
        let (topic, protocol) = (&self.format.topic, self.version.protocol());
        let wrapping = protocol.broadcast(topic, &stored.broadcast.kind, Some(&stored.meta(false)));
        let Some(wrapping) = wrapping else { return BroadcastForm::Nothing };
        let length = wrapping.before.len() + stored.broadcast.content.len() + wrapping.after.len();
        match length > protocol.max_frame_bytes() {
            true => BroadcastForm::Refused(Notice::Text(protocol.broadcast_too_large(topic, length))),
            false => BroadcastForm::Wrapped(wrapping),
        }
    }
}

impl ChannelChanges {
    fn notice(&self, status: &str, text: &str) -> Notice {
        Notice::Text(self.text(status, text))
    }

    fn text(&self, status: &str, text: &str) -> String {
        let topic = &self.format.topic;
        let payload = system(topic, "postgres_changes", status, text);
        fan_out(self.version, topic, "system", &payload)
    }
}

/// Returns the envelope of a change for the subscriptions `ids` of a channel. All channels share the object, which is its `data`.
fn around_changes(version: Version, topic: &str, ids: &[u32]) -> Envelope {
    let (start, event, payload, after) = match version {
        Version::V1 => {
            (r#"{"topic":"#, r#","event":"postgres_changes""#, r#","payload":"#, r#"},"ref":null}"#)
        }
        Version::V2 => ("[null,null,", r#","postgres_changes""#, ",", "}]"),
    };
    let mut before = String::with_capacity(topic.len() + 12 * ids.len() + 80);
    for part in [start, &quoted(topic), event, payload, r#"{"ids":["#] {
        before.push_str(part);
    }
    for (n, id) in ids.iter().enumerate() {
        let comma = if n == 0 { "" } else { "," };
        write!(before, "{comma}{id}").expect("a String takes whatever is written");
    }
    before.push_str(r#"],"data":"#);
    Envelope::Text { before, after }
}

/// Returns the envelope of a change that is sent as an event named after its operation, with the object as payload.
fn around_event(version: Version, topic: &str, operation: &str) -> Envelope {
    let (topic, operation) = (quoted(topic), quoted(operation));
    let (before, after) = match version {
        Version::V1 => (format!(r#"{{"topic":{topic},"event":{operation},"payload":"#), r#","ref":null}"#),
        Version::V2 => (format!("[null,null,{topic},{operation},"), "]"),
    };
    Envelope::Text { before, after }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::model::codec::phoenix::{Message, decode_text};

    fn channel(version: Version, topic: &str, by_operation: bool) -> ChannelChanges {
        let format = ChannelFormat { topic: topic.to_owned(), with_cursor: false, by_operation };
        ChannelChanges { version, format }
    }

    fn change(channel: &ChannelChanges, ids: &[u32], object: &str) -> String {
        match channel.envelope(ids, "DELETE", "") {
            Envelope::Text { before, after } => format!("{before}{object}{after}"),
            envelope @ Envelope::Cursor(_) => panic!("{envelope:?}"),
        }
    }

    fn check(encode: impl Fn(Version) -> String, v1: &str, v2: &str) {
        assert_eq!(encode(Version::V1), v1);
        assert_eq!(encode(Version::V2), v2);
    }

    #[test]
    fn a_change_is_encoded_for_its_subscriptions() {
        check(
            |version| {
                let channel = channel(version, "realtime:t", false);
                change(&channel, &[7, 4_294_967_295], r#"{"type":"DELETE"}"#)
            },
            r#"{"topic":"realtime:t","event":"postgres_changes","payload":{"ids":[7,4294967295],"data":{"type":"DELETE"}},"ref":null}"#,
            r#"[null,null,"realtime:t","postgres_changes",{"ids":[7,4294967295],"data":{"type":"DELETE"}}]"#,
        );
    }

    #[test]
    fn a_change_is_an_event_of_its_operation_where_the_topic_names_the_table() {
        check(
            |version| change(&channel(version, "realtime:s:t", true), &[7], r#"{"type":"DELETE"}"#),
            r#"{"topic":"realtime:s:t","event":"DELETE","payload":{"type":"DELETE"},"ref":null}"#,
            r#"[null,null,"realtime:s:t","DELETE",{"type":"DELETE"}]"#,
        );
    }

    #[test]
    fn gaps_and_stalls_are_system_messages_of_the_channel() {
        let text = |notice: Notice| match notice {
            Notice::Text(text) | Notice::GapText(text) => text,
            Notice::Gap { .. } | Notice::PolicyError(_) | Notice::Hidden(_) => panic!("{notice:?}"),
        };
        check(
            |version| text(channel(version, "realtime:t", false).gap("why", Some("AQ"))),
            r#"{"topic":"realtime:t","event":"system","payload":{"channel":"t","extension":"postgres_changes","message":"Gap: why","status":"error"},"ref":null}"#,
            r#"[null,null,"realtime:t","system",{"channel":"t","extension":"postgres_changes","message":"Gap: why","status":"error"}]"#,
        );
        for (stalls, status, message) in [(true, "error", STALLED), (false, "ok", RESUMED)] {
            let sent = text(channel(Version::V2, "realtime:t", false).stall(stalls).unwrap());
            let payload = json!({"channel": "t", "extension": "postgres_changes", "message": message, "status": status});
            assert_eq!(sent, json!([null, null, "realtime:t", "system", payload]).to_string());
        }
    }

    proptest! {
        #[test]
        fn encoded_changes_are_decoded(topic in "\\PC*", ids in any::<[u32; 3]>()) {
            let object = json!({"text": topic}).to_string();
            for version in [Version::V1, Version::V2] {
                let sent = change(&channel(version, &topic, false), &ids, &object);
                let expected = Message {
                    join_ref: Value::Null,
                    ref_: Value::Null,
                    topic: topic.clone(),
                    event: String::from("postgres_changes"),
                    payload: json!({"ids": ids, "data": {"text": topic}}),
                };
                prop_assert_eq!(decode_text(version, &sent), Ok(expected));
            }
        }
    }
}
