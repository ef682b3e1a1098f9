//! Encoding of changes, gaps and stalls for a client: as Phoenix frames, or as change events with a cursor.

use crate::model::codec::phoenix::{Version, around_changes, around_event, fan_out, system};

/// The encoding of a subscription.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Codec {
    /// Phoenix frames of a joined topic.
    Phoenix {
        /// The protocol version.
        version: Version,
        /// The full topic, including `realtime:`.
        topic: String,
        /// Whether `data` includes the cursor.
        with_cursor: bool,
        /// Whether a change is an event named after its operation, with its object as the payload.
        by_operation: bool,
    },
    /// [`ChangeEvent`]s, for event streams and polls.
    ChangeEvent,
}

/// The message when the feed stalls.
pub const STALLED: &str =
    "Stalled: the database cannot be asked now, changes follow in order once it is back";
/// The message when it resumes.
pub const RESUMED: &str = "Feed resumed";

/// A parsed event of [`Codec::ChangeEvent`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeEvent<'a> {
    /// A change: the object that a `postgres_changes` message has as `data`, with its `cursor`.
    Change(&'a str),
    /// Changes are missing, with the reason.
    Gap(&'a str),
}

impl Codec {
    /// Whether a change is encoded with its cursor.
    pub fn tells_cursor(&self) -> bool {
        match self {
            Self::Phoenix { with_cursor, .. } => *with_cursor,
            Self::ChangeEvent => true,
        }
    }

    /// Returns the text before and after the object of a change, for the bindings with these ids. `operation` is the one that the
    /// subscriber sees.
    pub fn around(&self, ids: &[u32], operation: &str, cursor: &str) -> (String, &'static str) {
        match self {
            Self::Phoenix { version, topic, by_operation: true, .. } => {
                around_event(*version, topic, operation)
            }
            Self::Phoenix { version, topic, .. } => around_changes(*version, topic, ids),
            Self::ChangeEvent => (format!("C{cursor}\n"), ""),
        }
    }

    /// Encodes that the feed is stalled or has resumed. `None` for change events: the stream observes stalls by itself.
    pub fn stall(&self, stalls: bool) -> Option<String> {
        let Self::Phoenix { version, topic, .. } = self else { return None };
        let (status, text) = if stalls { ("error", STALLED) } else { ("ok", RESUMED) };
        let payload = system(topic, "postgres_changes", status, text);
        Some(fan_out(*version, topic, "system", &payload))
    }

    /// Encodes that changes before the cursor are missing.
    pub fn gap(&self, why: &str, cursor: &str) -> String {
        match self {
            Self::Phoenix { version, topic, .. } => {
                let payload = system(topic, "postgres_changes", "error", &format!("Gap: {why}"));
                fan_out(*version, topic, "system", &payload)
            }
            Self::ChangeEvent => format!("G{cursor}\n{why}"),
        }
    }
}

/// Adds the cursor to the object of a change, as the last field.
pub fn with_cursor(mut data: String, cursor: &str) -> String {
    if data.ends_with('}') {
        data.pop();
    }
    data.reserve_exact(cursor.len() + 14);
    data.push_str(r#","cursor":""#);
    data.push_str(cursor);
    data.push_str("\"}");
    data
}

impl<'a> ChangeEvent<'a> {
    /// Parses an event written by [`Codec::ChangeEvent`] and returns it with its cursor. `payload` is the text after the head of a
    /// change. `None` if the head is neither a change nor a gap.
    pub fn parse(head: &'a str, payload: &'a str) -> Option<(&'a str, Self)> {
        let (head, body) = head.split_once('\n')?;
        match head.strip_prefix('C') {
            Some(cursor) => Some((cursor, Self::Change(payload))),
            None => Some((head.strip_prefix('G')?, Self::Gap(body))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_event_is_parsed_as_it_was_encoded() {
        let data = with_cursor(String::from(r#"{"a":"x\ny"}"#), "AQ");
        assert_eq!(data, r#"{"a":"x\ny","cursor":"AQ"}"#);
        let (head, tail) = Codec::ChangeEvent.around(&[1], "INSERT", "AQ");
        assert_eq!((ChangeEvent::parse(&head, &data), tail), (Some(("AQ", ChangeEvent::Change(&data))), ""));
        assert_eq!(
            ChangeEvent::parse(&Codec::ChangeEvent.gap("why", "AQ"), ""),
            Some(("AQ", ChangeEvent::Gap("why")))
        );
    }
}
