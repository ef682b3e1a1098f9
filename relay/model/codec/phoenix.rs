//! The Phoenix wire format, versions 1.0.0 and 2.0.0: the shape of a client's frames. What they mean to a session is in `incoming`,
//! what a session writes in `outgoing`, and what its subscriptions write in [`changes`].

pub mod changes;
mod incoming;
mod outgoing;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::model::codec::phoenix::changes::ChannelChanges;
use crate::model::codec::protocol::{ChannelFormat, Codec, FrameError, SocketProtocol};
use crate::model::session::join::MAX_JOIN_BYTES;
use crate::model::session::message::{Incoming, Outgoing};

/// The kind of the only binary frame that a client may send: a user broadcast.
const USER_BROADCAST_PUSH: u8 = 3;

/// The protocol version of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    /// 1.0.0: JSON objects.
    V1,
    /// 2.0.0: JSON arrays of five, and binary broadcasts.
    V2,
}

/// A message from a client, of either version.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// Reference of the join it belongs to: a string, a number or null, echoed unchanged.
    pub join_ref: Value,
    /// Reference of the message: a string, a number or null, echoed unchanged.
    pub ref_: Value,
    /// The channel's topic.
    pub topic: String,
    /// The event.
    pub event: String,
    /// The payload.
    pub payload: Value,
}

/// The content of a binary frame.
#[derive(Clone, Debug, PartialEq)]
pub enum Binary {
    /// A broadcast of JSON, as the message of the equivalent text frame.
    Message(Message),
    /// A broadcast of bytes, which only version 2 sockets can receive.
    Opaque(OpaqueBroadcast),
}

/// A broadcast whose content is not JSON.
#[derive(Clone, Debug, PartialEq)]
pub struct OpaqueBroadcast {
    /// Reference of the join it belongs to, or null.
    pub join_ref: Value,
    /// Reference of the message, or null.
    pub ref_: Value,
    /// The channel's topic.
    pub topic: String,
    /// The user's name for the event.
    pub event: String,
    /// The content.
    pub payload: Vec<u8>,
}

impl Version {
    /// Returns the version named by `vsn`, by default 1.0.0. `None` if it is not supported.
    pub fn from_vsn(vsn: Option<&str>) -> Option<Self> {
        match vsn {
            None | Some("1.0.0") => Some(Self::V1),
            Some("2.0.0") => Some(Self::V2),
            Some(_) => None,
        }
    }

    /// Returns the protocol of the version's sockets.
    pub fn protocol(self) -> &'static dyn SocketProtocol {
        match self {
            Self::V1 => &Self::V1,
            Self::V2 => &Self::V2,
        }
    }
}

impl SocketProtocol for Version {
    fn decode_text(&self, text: &str) -> Result<Incoming, FrameError> {
        if text.len() <= MAX_JOIN_BYTES {
            return decode_text(*self, text).map(incoming::message);
        }
        let (message, is_cut) = decode_large(*self, text, MAX_JOIN_BYTES)?;
        Ok(if is_cut { incoming::cut_message(message) } else { incoming::message(message) })
    }

    fn decode_binary(&self, frame: &[u8]) -> Result<Option<Incoming>, FrameError> {
        if frame.len() > MAX_JOIN_BYTES {
            return Err(FrameError::TooLarge);
        }
        match decode_binary(*self, frame)? {
            Binary::Message(message) => Ok(Some(incoming::message(message))),
            Binary::Opaque(_) => Ok(None),
        }
    }

    fn encode(&self, message: &Outgoing) -> String {
        outgoing::encode(*self, message)
    }

    fn unreadable(&self, error: FrameError) -> String {
        outgoing::unreadable(*self, error)
    }

    fn codec(&self, format: ChannelFormat) -> Codec {
        Codec::Phoenix(ChannelChanges { version: *self, format })
    }
}

/// Decodes a text frame.
pub fn decode_text(version: Version, text: &str) -> Result<Message, FrameError> {
    // serde_json limits nesting to 128, so a hostile frame cannot exhaust the stack.
    let frame = serde_json::from_str(text).map_err(|_| FrameError::NotJson)?;
    let message = match (version, frame) {
        (Version::V1, Value::Object(fields)) => from_object(fields),
        (Version::V2, Value::Array(elements)) => from_array(elements),
        _ => None,
    };
    message.ok_or(FrameError::WrongShape)
}

fn from_object(mut fields: Map<String, Value>) -> Option<Message> {
    Some(Message {
        join_ref: reference(fields.remove("join_ref").unwrap_or(Value::Null))?,
        ref_: reference(fields.remove("ref")?)?,
        topic: text(fields.remove("topic")?)?,
        event: text(fields.remove("event")?)?,
        payload: fields.remove("payload")?,
    })
}

fn from_array(elements: Vec<Value>) -> Option<Message> {
    let mut elements = elements.into_iter();
    Some(Message {
        join_ref: reference(elements.next()?)?,
        ref_: reference(elements.next()?)?,
        topic: text(elements.next()?)?,
        event: text(elements.next()?)?,
        payload: elements.next()?,
    })
}

fn reference(value: Value) -> Option<Value> {
    matches!(value, Value::Null | Value::String(_) | Value::Number(_)).then_some(value)
}

/// Decodes a large text frame. A payload of more than `max_bytes` is skipped and replaced by null, because a parsed payload may
/// need many times its size. The second value says whether it was skipped.
///
/// # Errors
/// As [`decode_text`].
pub fn decode_large(version: Version, text: &str, max_bytes: usize) -> Result<(Message, bool), FrameError> {
    let parts: [&RawValue; 5] = match version {
        Version::V1 => {
            let fields = known_fields(text)?;
            let field = |name: &str| fields.get(name).copied().ok_or(FrameError::WrongShape);
            let none = RawValue::NULL;
            let join_ref = field("join_ref").unwrap_or(none);
            [join_ref, field("ref")?, field("topic")?, field("event")?, field("payload")?]
        }
        Version::V2 => first_five(text)?,
    };
    let is_large = parts[4].get().len() > max_bytes;
    let payload = if is_large { "null" } else { parts[4].get() };
    let [join_ref, ref_, topic, event] = [0, 1, 2, 3].map(|n: usize| parts[n].get());
    if [join_ref, ref_, event].iter().any(|part| part.len() > max_bytes) {
        return Err(FrameError::WrongShape);
    }
    let text = format!("[{join_ref},{ref_},{topic},{event},{payload}]");
    decode_text(Version::V2, &text).map(|message| (message, is_large))
}

/// Returns the first five elements of a JSON array, unparsed.
fn first_five(text: &str) -> Result<[&RawValue; 5], FrameError> {
    struct Five;
    impl<'de> Visitor<'de> for Five {
        type Value = Option<[&'de RawValue; 5]>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a message")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut parts = [RawValue::NULL; 5];
            for part in &mut parts {
                match list.next_element()? {
                    Some(found) => *part = found,
                    None => return Ok(None),
                }
            }
            while list.next_element::<IgnoredAny>()?.is_some() {}
            Ok(Some(parts))
        }
    }
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let parts = deserializer.deserialize_seq(Five).map_err(|_| FrameError::WrongShape)?;
    deserializer.end().map_err(|_| FrameError::NotJson)?;
    parts.ok_or(FrameError::WrongShape)
}

/// Returns the known fields of a JSON object, unparsed.
fn known_fields(text: &str) -> Result<BTreeMap<&'static str, &RawValue>, FrameError> {
    struct Fields;
    impl<'de> Visitor<'de> for Fields {
        type Value = BTreeMap<&'static str, &'de RawValue>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a message")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut fields = BTreeMap::new();
            while let Some(name) = map.next_key::<Cow<'de, str>>()? {
                let known =
                    ["join_ref", "ref", "topic", "event", "payload"].into_iter().find(|one| *one == name);
                match known {
                    Some(known) => _ = fields.insert(known, map.next_value()?),
                    None => _ = map.next_value::<IgnoredAny>()?,
                }
            }
            Ok(fields)
        }
    }
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let fields = deserializer.deserialize_map(Fields).map_err(|_| FrameError::WrongShape)?;
    deserializer.end().map_err(|_| FrameError::NotJson)?;
    Ok(fields)
}

fn text(value: Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text),
        _ => None,
    }
}

/// Decodes a binary frame.
pub fn decode_binary(version: Version, frame: &[u8]) -> Result<Binary, FrameError> {
    let malformed = FrameError::MalformedBinary;
    let (kind, rest) = frame.split_first().ok_or(malformed)?;
    if version == Version::V1 || *kind != USER_BROADCAST_PUSH {
        return Err(FrameError::UnknownKind);
    }
    let ([join_ref, ref_, topic, event, metadata, encoding], mut rest) =
        rest.split_first_chunk().ok_or(malformed)?;
    let mut field = |length: &u8| {
        let (field, after) = rest.split_at_checked(usize::from(*length)).ok_or(malformed)?;
        rest = after;
        std::str::from_utf8(field).map_err(|_| malformed)
    };
    let join_ref = reference_or_null(field(join_ref)?);
    let ref_ = reference_or_null(field(ref_)?);
    let topic = field(topic)?.to_owned();
    let event = field(event)?.to_owned();
    // Ignored: the metadata only requests storage, which public broadcasts do not have.
    field(metadata)?;
    if *encoding == 0 {
        let payload = rest.to_vec();
        return Ok(Binary::Opaque(OpaqueBroadcast { join_ref, ref_, topic, event, payload }));
    }
    let content: Value = serde_json::from_slice(rest).map_err(|_| FrameError::NotJson)?;
    let payload = json!({"type": "broadcast", "event": event, "payload": content});
    Ok(Binary::Message(Message { join_ref, ref_, topic, event: "broadcast".to_owned(), payload }))
}

fn reference_or_null(text: &str) -> Value {
    if text.is_empty() { Value::Null } else { Value::from(text) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(join_ref: Value, ref_: Value, topic: &str, event: &str, payload: Value) -> Message {
        Message { join_ref, ref_, topic: topic.to_owned(), event: event.to_owned(), payload }
    }

    fn check(version: Version, text: &str, expected: Result<Message, FrameError>) {
        assert_eq!(decode_text(version, text), expected, "{text}");
    }

    #[test]
    fn a_missing_version_is_the_first() {
        assert_eq!(Version::from_vsn(None), Some(Version::V1));
        assert_eq!(Version::from_vsn(Some("1.0.0")), Some(Version::V1));
        assert_eq!(Version::from_vsn(Some("2.0.0")), Some(Version::V2));
        for vsn in ["", "2", "3.0.0", "1.0.0 "] {
            assert_eq!(Version::from_vsn(Some(vsn)), None);
        }
    }

    #[test]
    fn messages_are_decoded() {
        let join = message(json!("1"), json!("2"), "realtime:room1", "phx_join", json!({"config": {}}));
        let object = r#"{"topic":"realtime:room1","event":"phx_join","payload":{"config":{}},"ref":"2","join_ref":"1","x":0}"#;
        check(Version::V1, object, Ok(join.clone()));
        check(Version::V2, r#"["1","2","realtime:room1","phx_join",{"config":{}}]"#, Ok(join.clone()));
        check(Version::V2, r#"["1","2","realtime:room1","phx_join",{"config":{}},7,8]"#, Ok(join));
        let heartbeat = message(Value::Null, Value::Null, "phoenix", "heartbeat", json!({}));
        let object = r#"{"topic":"phoenix","event":"heartbeat","payload":{},"ref":null}"#;
        check(Version::V1, object, Ok(heartbeat.clone()));
        check(Version::V2, r#"[null,null,"phoenix","heartbeat",{}]"#, Ok(heartbeat));
        check(Version::V2, r#"[7,8.5,"","",null]"#, Ok(message(json!(7), json!(8.5), "", "", Value::Null)));
    }

    #[test]
    fn a_large_payload_is_skipped_and_a_small_one_in_a_large_text_is_decoded() {
        let join = |payload: Value| message(json!("1"), json!("2"), "realtime:t", "phx_join", payload);
        let zeros = vec![0; 1000];
        for (payload, is_large) in [(json!({"a": zeros}), true), (json!({"b": [1]}), false)] {
            let expected = join(if is_large { Value::Null } else { payload.clone() });
            let list = json!(["1", "2", "realtime:t", "phx_join", payload, zeros]).to_string();
            assert_eq!(decode_large(Version::V2, &list, 100), Ok((expected.clone(), is_large)));
            let object = json!({"topic": "realtime:t", "x": zeros, "event": "phx_join", "payload": payload, "ref": "2", "join_ref": "1"});
            assert_eq!(decode_large(Version::V1, &object.to_string(), 100), Ok((expected, is_large)));
        }
        let long = format!(r#"[{:?},"2","t","e",{{}}]"#, [0; 1000]);
        for text in ["[]", "{}", "[1,2,3,4]", &long, &format!("{}1", "[".repeat(100_000))] {
            assert!(decode_large(Version::V2, text, 100).is_err());
            assert!(decode_large(Version::V1, text, 100).is_err());
        }
        check(Version::V2, &long, Err(FrameError::WrongShape));
    }

    #[test]
    fn other_shapes_are_refused() {
        let nested = format!(r#"["1","1","t","e",{}{}]"#, "[".repeat(100_000), "]".repeat(100_000));
        for text in ["", "{", "\u{feff}[]", "nul", "[1e999]", r#"["\ud800"]"#, "[NaN]", &nested, "[] []"] {
            check(Version::V1, text, Err(FrameError::NotJson));
            check(Version::V2, text, Err(FrameError::NotJson));
        }
        for text in [
            "null",
            "7",
            r#""a""#,
            "[]",
            "{}",
            r#"[null,null,"t","e"]"#,
            r#"[null,null,1,"e",{}]"#,
            r#"[null,null,"t",null,{}]"#,
            r#"[[],null,"t","e",{}]"#,
            r#"[null,{},"t","e",{}]"#,
            r#"{"topic":"t","event":"e","payload":{}}"#,
            r#"{"topic":"t","event":"e","ref":null}"#,
            r#"{"topic":1,"event":"e","payload":{},"ref":null}"#,
            r#"{"event":"e","payload":{},"ref":null}"#,
            r#"{"topic":"t","event":"e","payload":{},"ref":true}"#,
        ] {
            check(Version::V1, text, Err(FrameError::WrongShape));
            check(Version::V2, text, Err(FrameError::WrongShape));
        }
        check(Version::V1, r#"[null,null,"t","e",{}]"#, Err(FrameError::WrongShape));
        check(
            Version::V2,
            r#"{"topic":"t","event":"e","payload":{},"ref":null}"#,
            Err(FrameError::WrongShape),
        );
    }

    fn binary(fields: [&str; 5], encoding: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![USER_BROADCAST_PUSH];
        frame.extend(fields.map(|field| field.len() as u8));
        frame.push(encoding);
        frame.extend(fields.concat().as_bytes());
        frame.extend(payload);
        frame
    }

    #[test]
    fn a_binary_broadcast_is_decoded_like_its_text() {
        let frame = binary(["1", "2", "realtime:room1", "ping", ""], 1, br#"{"n":1}"#);
        assert_eq!(frame[..7], [3, 1, 1, 14, 4, 0, 1]);
        let payload = json!({"type": "broadcast", "event": "ping", "payload": {"n": 1}});
        let expected = message(json!("1"), json!("2"), "realtime:room1", "broadcast", payload);
        assert_eq!(decode_binary(Version::V2, &frame), Ok(Binary::Message(expected)));
        let frame = binary(["", "", "t", "e", r#"{"persist":true}"#], 9, b"7");
        let payload = json!({"type": "broadcast", "event": "e", "payload": 7});
        let expected = message(Value::Null, Value::Null, "t", "broadcast", payload);
        assert_eq!(decode_binary(Version::V2, &frame), Ok(Binary::Message(expected)));
    }

    #[test]
    fn a_broadcast_of_bytes_is_kept() {
        let frame = binary(["1", "", "t", "e", ""], 0, &[0, 255]);
        let expected = OpaqueBroadcast {
            join_ref: json!("1"),
            ref_: Value::Null,
            topic: "t".to_owned(),
            event: "e".to_owned(),
            payload: vec![0, 255],
        };
        assert_eq!(decode_binary(Version::V2, &frame), Ok(Binary::Opaque(expected)));
    }

    #[test]
    fn other_binary_frames_are_refused() {
        let frame = binary(["1", "2", "realtime:room1", "ping", "{}"], 1, b"{}");
        assert_eq!(decode_binary(Version::V1, &frame), Err(FrameError::UnknownKind));
        for kind in [0, 1, 2, 4, 255] {
            assert_eq!(decode_binary(Version::V2, &[kind]), Err(FrameError::UnknownKind));
        }
        for length in 0..frame.len() {
            assert!(decode_binary(Version::V2, &frame[..length]).is_err(), "{length}");
        }
        let mut frame = binary(["1", "2", "topic", "ping", ""], 1, b"{}");
        frame[9] = 0xff;
        assert_eq!(decode_binary(Version::V2, &frame), Err(FrameError::MalformedBinary));
        let frame = binary(["1", "2", "topic", "ping", ""], 1, b"{");
        assert_eq!(decode_binary(Version::V2, &frame), Err(FrameError::NotJson));
    }

    proptest! {
        #[test]
        fn no_frame_panics(text in "\\PC*", bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            for version in [Version::V1, Version::V2] {
                let _ = decode_text(version, &text);
                let _ = decode_binary(version, &bytes);
                let _ = decode_binary(version, &[&[USER_BROADCAST_PUSH], bytes.as_slice()].concat());
            }
        }

        #[test]
        fn a_binary_broadcast_comes_back(
            join_ref in "[a-z0-9]{1,9}", topic in "\\PC{0,60}", event in "\\PC{0,60}", payload: Vec<u8>
        ) {
            let frame = binary([&join_ref, "", &topic, &event, ""], 0, &payload);
            let join_ref = Value::from(join_ref);
            let expected = OpaqueBroadcast { join_ref, ref_: Value::Null, topic, event, payload };
            prop_assert_eq!(decode_binary(Version::V2, &frame), Ok(Binary::Opaque(expected)));
        }
    }
}
