//! A broadcast that was inserted into `realtime.messages`, as an image of its row has it.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::model::log::cursor::Cursor;
use crate::model::row::change::{Change, Operation};
use crate::model::session::broadcast::{Broadcast, BroadcastKind};
use crate::model::subscription::topic::TopicScope;

/// Maximum size in bytes of the content of a broadcast from the database.
pub const MAX_CONTENT_BYTES: usize = 3_000_500;

/// A broadcast from the database.
#[derive(Debug, PartialEq, Eq)]
pub struct StoredBroadcast {
    /// The topic that it is sent to.
    pub topic: TopicScope,
    /// The id of its row, as JSON.
    pub id: String,
    /// Its event and content.
    pub broadcast: Broadcast,
}

/// Why a row is not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotSent {
    /// Its sender has sent it already.
    #[error("it was sent before it was stored")]
    AlreadySent,
    /// It is larger than [`MAX_CONTENT_BYTES`].
    #[error("it has more than {MAX_CONTENT_BYTES} bytes")]
    TooLarge,
    /// It is nested too deeply.
    #[error("its JSON is nested too deeply")]
    TooDeep,
    /// The table is not the one that Supabase and `relay install` make, or the row cannot be read as text.
    #[error("its row lacks the topic or the id, or has values of other types")]
    Unreadable,
}

/// The columns of a row. Others are ignored.
#[derive(Deserialize)]
struct MessageRow<'a> {
    topic: String,
    id: &'a RawValue,
    event: Option<String>,
    private: Option<bool>,
    #[serde(borrow)]
    payload: Option<&'a RawValue>,
    #[serde(borrow)]
    binary_payload: Option<Cow<'a, str>>,
    /// Whether its sender has sent it: newer servers store broadcasts of sockets.
    skip_broadcast: Option<bool>,
}

/// The stored broadcasts of one moment.
#[derive(Debug)]
pub struct Recalled {
    /// The broadcasts, oldest first.
    pub broadcasts: Vec<StoredBroadcast>,
    /// The cursor from which the feed continues after them.
    pub cursor: Cursor,
}

impl StoredBroadcast {
    /// Reads a change; `None` if it is no broadcast.
    pub fn of(change: &Change) -> Option<Result<Self, NotSent>> {
        let image = change.after.as_deref().filter(|_| change.operation == Operation::Broadcast);
        image.map(|image| Self::parse(image, change.oversize))
    }

    /// Reads the image of a row. `is_cut` says that its content was left out because it is too large.
    ///
    /// # Errors
    /// Why the row is not sent.
    pub fn parse(image: &str, is_cut: bool) -> Result<Self, NotSent> {
        // Twice the size, because bytes are written as hex digits, and room for the other columns.
        if is_cut || image.len() > 2 * MAX_CONTENT_BYTES + 64 * 1024 {
            return Err(NotSent::TooLarge);
        }
        let row: MessageRow<'_> = serde_json::from_str(image).map_err(|_| NotSent::Unreadable)?;
        if row.skip_broadcast == Some(true) {
            return Err(NotSent::AlreadySent);
        }
        let event = row.event.unwrap_or_default();
        let broadcast = match (row.binary_payload, row.payload) {
            (Some(hex), _) => Broadcast::bytes(event, bytes(&hex).ok_or(NotSent::Unreadable)?),
            (None, Some(payload)) => Broadcast::json(event, payload).ok_or(NotSent::TooDeep)?,
            (None, None) => Broadcast { kind: BroadcastKind::Json(event), content: b"null".to_vec() },
        };
        if broadcast.content.len() > MAX_CONTENT_BYTES {
            return Err(NotSent::TooLarge);
        }
        let topic = TopicScope { name: row.topic.into(), is_private: row.private.unwrap_or(false) };
        Ok(Self { topic, id: row.id.get().to_owned(), broadcast })
    }

    /// Returns what is told of it beside its content, as JSON. `is_replayed` says that it was sent before.
    pub fn meta(&self, is_replayed: bool) -> String {
        let replayed = if is_replayed { r#","replayed":true"# } else { "" };
        format!(r#"{{"id":{}{replayed}}}"#, self.id)
    }
}

/// Returns the bytes of a `bytea` as PostgreSQL writes it; `None` if it is none.
fn bytes(text: &str) -> Option<Vec<u8>> {
    let digits = text.strip_prefix("\\x")?.as_bytes();
    let digit = |digit: u8| char::from(digit).to_digit(16).map(|value| value as u8);
    let (pairs, []) = digits.as_chunks::<2>() else { return None };
    pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(fields: &str) -> String {
        format!(r#"{{"topic":"t","extension":"broadcast","id":"0b9c","inserted_at":"2026",{fields}}}"#)
    }

    #[test]
    fn a_row_is_read_as_it_was_written() {
        let found = StoredBroadcast::parse(
            &image(r#""event":"e","private":true,"payload":{"b": 1.50, "a":"\u00e9"}"#),
            false,
        )
        .unwrap();
        assert_eq!((&*found.topic.name, found.topic.is_private), ("t", true));
        assert_eq!(found.broadcast.kind, BroadcastKind::Json(String::from("e")));
        assert_eq!(found.broadcast.content, r#"{"b": 1.50, "a":"\u00e9"}"#.as_bytes());
        assert_eq!(found.meta(false), r#"{"id":"0b9c"}"#);
        assert_eq!(found.meta(true), r#"{"id":"0b9c","replayed":true}"#);
        let bytes = StoredBroadcast::parse(
            &image(r#""event":null,"private":null,"payload":null,"binary_payload":"\\x00ff7E""#),
            false,
        );
        let bytes = bytes.unwrap();
        assert_eq!(bytes.broadcast, Broadcast::bytes(String::new(), vec![0, 255, 0x7e]));
        assert!(!bytes.topic.is_private);
        let nothing = StoredBroadcast::parse(&image(r#""event":"e","payload":null"#), false).unwrap();
        assert_eq!(nothing.broadcast.content, b"null");
    }

    #[test]
    fn a_row_that_cannot_be_sent_says_why() {
        let deep = format!(r#""payload":{}{}"#, "[".repeat(200), "]".repeat(200));
        let large = |bytes: usize| format!(r#""payload":"{}""#, "x".repeat(bytes - 2));
        for (fields, why) in [
            (r#""payload":1,"skip_broadcast":true"#, NotSent::AlreadySent),
            (&deep, NotSent::TooDeep),
            (&large(MAX_CONTENT_BYTES + 1), NotSent::TooLarge),
            (r#""binary_payload":"00ff""#, NotSent::Unreadable),
            (r#""binary_payload":"\\x00f""#, NotSent::Unreadable),
            (r#""binary_payload":"\\xzz""#, NotSent::Unreadable),
            (r#""private":"yes""#, NotSent::Unreadable),
        ] {
            assert_eq!(
                StoredBroadcast::parse(&image(fields), false),
                Err(why),
                "{}",
                &fields[..20.min(fields.len())]
            );
        }
        assert!(StoredBroadcast::parse(&image(&large(MAX_CONTENT_BYTES)), false).is_ok());
        assert_eq!(StoredBroadcast::parse(&image(r#""payload":1"#), true), Err(NotSent::TooLarge));
        for image in ["", "[]", "{}", r#"{"topic":"t"}"#, r#"{"topic":null,"id":"x"}"#] {
            assert_eq!(StoredBroadcast::parse(image, false), Err(NotSent::Unreadable));
        }
    }
}
