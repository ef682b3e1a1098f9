//! A broadcast, as its sender wrote it: it is checked once and passed on unchanged.

use serde_json::value::RawValue;

/// Maximum nesting of arrays and objects in JSON that is passed on. Parsers of clients have limits of 128 and more, and frames add
/// a few levels.
pub const MAX_DEPTH: usize = 120;

/// A message to all members of a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broadcast {
    /// How its content is written.
    pub kind: BroadcastKind,
    /// Its content.
    pub content: Vec<u8>,
}

/// How the content of a broadcast is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BroadcastKind {
    /// A JSON object that has the name of the event and everything else.
    Message,
    /// The JSON of an event with this name.
    Json(String),
    /// The bytes of an event with this name.
    Bytes(String),
}

impl Broadcast {
    /// Creates a broadcast of a whole message; `None` if it is not an object or is nested too deeply.
    pub fn message(message: &RawValue) -> Option<Self> {
        let text = object(message)?;
        Some(Self { kind: BroadcastKind::Message, content: text.into() })
    }

    /// Creates a broadcast of JSON; `None` if it is nested too deeply.
    pub fn json(event: String, payload: &RawValue) -> Option<Self> {
        let text = payload.get();
        is_shallow(text).then(|| Self { kind: BroadcastKind::Json(event), content: text.into() })
    }

    /// Creates a broadcast of bytes.
    pub fn bytes(event: String, payload: Vec<u8>) -> Self {
        Self { kind: BroadcastKind::Bytes(event), content: payload }
    }

    /// Returns the name of the event; empty for a whole message, which has it in its content.
    pub fn event(&self) -> &str {
        match &self.kind {
            BroadcastKind::Message => "",
            BroadcastKind::Json(event) | BroadcastKind::Bytes(event) => event,
        }
    }
}

/// Returns the text of a JSON object; `None` if it is another value or is nested too deeply.
pub fn object(value: &RawValue) -> Option<&str> {
    let text = value.get();
    (text.starts_with('{') && is_shallow(text)).then_some(text)
}

/// Whether valid JSON is nested by at most [`MAX_DEPTH`].
fn is_shallow(json: &str) -> bool {
    let (mut depth, mut is_string, mut is_escaped) = (0_usize, false, false);
    for byte in json.bytes() {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' => is_escaped = true,
            b'"' => is_string = !is_string,
            _ if is_string => {}
            b'[' | b'{' => {
                depth += 1;
                if depth > MAX_DEPTH {
                    return false;
                }
            }
            b']' | b'}' => depth -= 1,
            _ => {}
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(json: &str) -> &RawValue {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn json_is_kept_as_it_was_written() {
        for text in [r#"{ "a" : 1.50, "a":2, "é":"\u00e9" }"#, "{}", r#"{"event":[],"x":"[[{\"\\"}"#] {
            let found = Broadcast::message(raw(text)).unwrap();
            assert_eq!((found.kind, found.content.as_slice()), (BroadcastKind::Message, text.as_bytes()));
        }
        for text in ["12345678901234567890.10", "null", "[1]", r#""x""#] {
            assert_eq!(Broadcast::message(raw(text)), None);
            let found = Broadcast::json(String::from("e"), raw(text)).unwrap();
            assert_eq!(found.content, text.as_bytes());
        }
    }

    #[test]
    fn deep_json_is_refused_and_brackets_in_texts_do_not_count() {
        let nested = |depth: usize| format!("{{\"a\":{}{}}}", "[".repeat(depth - 1), "]".repeat(depth - 1));
        assert!(Broadcast::message(raw(&nested(MAX_DEPTH))).is_some());
        assert!(Broadcast::message(raw(&nested(MAX_DEPTH + 1))).is_none());
        assert!(Broadcast::json(String::new(), raw(&nested(MAX_DEPTH + 1))).is_none());
        let text = format!("{{\"a\":\"\\\"{}\",\"b\":[[],[]]}}", "[{".repeat(1000));
        assert!(Broadcast::message(raw(&text)).is_some());
    }
}
