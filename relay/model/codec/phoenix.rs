//! The Phoenix wire format, versions 1.0.0 and 2.0.0: the shape of a client's frames. What they mean to a session is in `incoming`,
//! what a session writes in `outgoing`, what its subscriptions write in [`changes`], and what is written to all members of a topic
//! in `pushes`.

pub mod changes;
mod incoming;
mod outgoing;
mod pushes;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::model::codec::phoenix::changes::ChannelChanges;
use crate::model::codec::protocol::{ChannelFormat, Codec, FrameError, SocketProtocol, Wrapping};
use crate::model::session::broadcast::{Broadcast, BroadcastKind};
use crate::model::session::join::MAX_JOIN_BYTES;
use crate::model::session::message::{ChannelName, ClientRequest, Incoming, Outgoing};

/// The kind of the only binary frame that a client may send: a user broadcast.
const USER_BROADCAST_PUSH: u8 = 3;
/// The event of broadcasts.
const BROADCAST: &str = "broadcast";
/// The event of tracking and untracking.
const PRESENCE: &str = "presence";
/// Maximum size in bytes of a frame that clients of version 1.0.0 accept.
const MAX_V1_FRAME: usize = 1 << 20;

pub use pushes::carries_bytes;

/// What precedes the name of a channel in its topic.
const TOPIC_PREFIX: &str = "realtime:";

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
    fn name(&self) -> &'static str {
        match self {
            Self::V1 => "version 1.0.0",
            Self::V2 => "version 2.0.0",
        }
    }

    fn decode_text(&self, text: &str) -> Result<Incoming, FrameError> {
        let parts = match (split(*self, text), text.len() <= MAX_JOIN_BYTES) {
            (Ok(parts), _) => parts,
            // Splitting skips what it does not need: parsing tells a wrong shape from what is not JSON.
            (Err(error), true) => return Err(decode_text(*self, text).err().unwrap_or(error)),
            (Err(error), false) => return Err(error),
        };
        let head = Head::parse(&parts)?;
        let [.., payload] = parts;
        match head.event.as_str() {
            BROADCAST => Ok(incoming::broadcast(head, payload)),
            PRESENCE => Ok(incoming::presence(head, payload)),
            _ if payload.get().len() > MAX_JOIN_BYTES => Ok(incoming::cut_message(head)),
            _ => {
                let payload = serde_json::from_str(payload.get()).map_err(|_| FrameError::NotJson)?;
                Ok(incoming::message(head.with(payload)))
            }
        }
    }

    fn decode_binary(&self, frame: &[u8]) -> Result<Incoming, FrameError> {
        decode_binary(*self, frame)
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

    fn channel_of<'a>(&self, topic: &'a str) -> &'a str {
        topic.strip_prefix(TOPIC_PREFIX).unwrap_or(topic)
    }

    fn broadcast(&self, topic: &str, kind: &BroadcastKind, meta: Option<&str>) -> Option<Wrapping> {
        pushes::broadcast(*self, topic, kind, meta)
    }

    fn presence_state(&self, channel: &ChannelName) -> Wrapping {
        pushes::presence_state(*self, channel)
    }

    fn presence_diff(&self, topic: &str) -> Wrapping {
        pushes::presence_diff(*self, topic)
    }

    fn max_frame_bytes(&self) -> usize {
        match self {
            Self::V1 => MAX_V1_FRAME,
            Self::V2 => usize::MAX,
        }
    }
}

/// Returns the topic of the channel with this name.
pub fn topic_of(channel: &str) -> String {
    format!("{TOPIC_PREFIX}{channel}")
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

/// The parts of a message before its payload.
struct Head {
    join_ref: Value,
    ref_: Value,
    topic: String,
    event: String,
}

impl Head {
    /// Parses the parts of a frame but the last. A reference or event that is too large has the wrong shape; a topic is refused
    /// later, with a reply.
    fn parse(parts: &[&RawValue; 5]) -> Result<Self, FrameError> {
        let [join_ref, ref_, topic, event, _] = parts.map(RawValue::get);
        if [join_ref, ref_, event].iter().any(|part| part.len() > MAX_JOIN_BYTES) {
            return Err(FrameError::WrongShape);
        }
        let value = |part| serde_json::from_str::<Value>(part).map_err(|_| FrameError::NotJson);
        let shape = FrameError::WrongShape;
        Ok(Self {
            join_ref: reference(value(join_ref)?).ok_or(shape)?,
            ref_: reference(value(ref_)?).ok_or(shape)?,
            topic: text(value(topic)?).ok_or(shape)?,
            event: text(value(event)?).ok_or(shape)?,
        })
    }

    fn with(self, payload: Value) -> Message {
        let Self { join_ref, ref_, topic, event } = self;
        Message { join_ref, ref_, topic, event, payload }
    }
}

/// Splits a text frame into the references, topic, event and payload, unparsed. A parsed payload may need many times its size.
///
/// # Errors
/// If it is not JSON of the version's shape.
fn split(version: Version, text: &str) -> Result<[&RawValue; 5], FrameError> {
    match version {
        Version::V1 => {
            let fields = known_fields(text)?;
            let field = |name: &str| fields.get(name).copied().ok_or(FrameError::WrongShape);
            let join_ref = field("join_ref").unwrap_or(RawValue::NULL);
            Ok([join_ref, field("ref")?, field("topic")?, field("event")?, field("payload")?])
        }
        Version::V2 => first_five(text),
    }
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

/// Decodes a binary frame: a broadcast.
fn decode_binary(version: Version, frame: &[u8]) -> Result<Incoming, FrameError> {
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
    let user_event = field(event)?.to_owned();
    // Ignored: the metadata only requests storage, which public broadcasts do not have.
    field(metadata)?;
    let broadcast = if *encoding == 0 {
        Broadcast::bytes(user_event, rest.to_vec())
    } else {
        let payload = serde_json::from_slice(rest).map_err(|_| FrameError::NotJson)?;
        Broadcast::json(user_event, payload).ok_or(FrameError::NotJson)?
    };
    let head = Head { join_ref, ref_, topic, event: String::from(BROADCAST) };
    Ok(incoming::with_request(head, ClientRequest::Broadcast(broadcast)))
}

fn reference_or_null(text: &str) -> Value {
    if text.is_empty() { Value::Null } else { Value::from(text) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::model::session::message::Reference;

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
    fn a_large_join_is_not_parsed_and_a_small_one_in_a_large_text_is() {
        let zeros = vec![0; MAX_JOIN_BYTES];
        for (payload, is_large) in [(json!({"a": zeros}), true), (json!({"b": [1]}), false)] {
            let list = json!(["1", "2", "realtime:t", "phx_join", payload, zeros]).to_string();
            let object = json!({"topic": "realtime:t", "x": zeros, "event": "phx_join", "payload": payload, "ref": "2", "join_ref": "1"});
            for (version, text) in [(Version::V2, list), (Version::V1, object.to_string())] {
                let Incoming { origin, request } = version.decode_text(&text).unwrap();
                assert_eq!(origin.channel, channel("realtime:t", Some("1")));
                assert_eq!(request == ClientRequest::OversizedJoin, is_large);
                assert!(request.is_join());
            }
        }
        let long = format!(r#"[{:?},"2","t","e",{{}}]"#, [0; 1000]);
        for text in ["[]", "{}", "[1,2,3,4]", &long, &format!("{}1", "[".repeat(300_000))] {
            assert!(Version::V1.decode_text(text).is_err() && Version::V2.decode_text(text).is_err());
        }
        assert_eq!(Version::V2.decode_text(&long), Err(FrameError::WrongShape));
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

    /// Returns the broadcast of a decoded message.
    fn broadcast(message: Result<Incoming, FrameError>) -> (ChannelName, Broadcast) {
        match message.unwrap() {
            Incoming { origin, request: ClientRequest::Broadcast(broadcast) } => (origin.channel, broadcast),
            other => panic!("{other:?}"),
        }
    }

    fn channel(topic: &str, join: Option<&str>) -> ChannelName {
        ChannelName {
            topic: topic.to_owned(),
            join: Reference(join.map(|join| Value::from(join).to_string().into())),
        }
    }

    #[test]
    fn a_broadcast_is_passed_on_as_it_was_written() {
        let frame = binary(["1", "2", "realtime:room1", "ping", ""], 1, br#"{"n": 1.50}"#);
        assert_eq!(frame[..7], [3, 1, 1, 14, 4, 0, 1]);
        let json =
            Broadcast { kind: BroadcastKind::Json(String::from("ping")), content: br#"{"n": 1.50}"#.into() };
        let name = channel("realtime:room1", Some("1"));
        assert_eq!(broadcast(Version::V2.decode_binary(&frame)), (name.clone(), json));
        let frame = binary(["", "", "t", "e", r#"{"persist":true}"#], 9, b"7");
        let json = Broadcast { kind: BroadcastKind::Json(String::from("e")), content: b"7".into() };
        assert_eq!(broadcast(Version::V2.decode_binary(&frame)), (channel("t", None), json));
        let text = r#"["1",2,"realtime:room1","broadcast", {"event":"a", "x":12345678901234567890.10}]"#;
        let payload = br#"{"event":"a", "x":12345678901234567890.10}"#;
        let whole = Broadcast { kind: BroadcastKind::Message, content: payload.into() };
        assert_eq!(broadcast(Version::V2.decode_text(text)), (name, whole));
    }

    #[test]
    fn a_broadcast_without_an_object_or_too_deep_is_refused() {
        let nested = format!("{{\"a\":{}{}}}", "[".repeat(200), "]".repeat(200));
        for payload in ["7", "null", "[]", "\"x\"", &nested] {
            let text = format!(r#"["1","2","realtime:t","broadcast",{payload}]"#);
            let request = Version::V2.decode_text(&text).unwrap().request;
            assert!(matches!(request, ClientRequest::Invalid(_)), "{request:?}");
        }
        let frame = binary(["1", "2", "t", "e", ""], 1, nested.as_bytes());
        assert_eq!(Version::V2.decode_binary(&frame), Err(FrameError::NotJson));
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
            let expected = (channel(&topic, Some(&join_ref)), Broadcast::bytes(event, payload));
            prop_assert_eq!(broadcast(Version::V2.decode_binary(&frame)), expected);
        }
    }
}
