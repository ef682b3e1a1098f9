//! How a change, or the news of a gap, is written for a client: in Phoenix frames, or bare with its cursor.

use crate::model::codec::phoenix::{Version, around_changes, around_event, fan_out, system};

/// The form of what goes to a client.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Codec {
    /// Frames of a joined topic.
    Phoenix {
        /// The serialisation.
        version: Version,
        /// The topic, as on the wire.
        topic: String,
        /// Whether `data` tells the cursor.
        with_cursor: bool,
        /// Whether a change is an event named after its operation, with its object as the payload.
        by_operation: bool,
    },
    /// A [`ChangeEvent`] piece: for event streams and polls.
    ChangeEvent,
}

/// What clients are told when the feed stalls …
pub const STALLED: &str =
    "Stalled: the database cannot be asked now, changes follow in order once it is back";
/// … and when it goes on.
pub const RESUMED: &str = "Feed resumed";

/// A piece without a frame around it, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeEvent<'a> {
    /// A change: the object that a `postgres_changes` message has as `data`, with its `cursor`.
    Change(&'a str),
    /// Changes are missing; why.
    Gap(&'a str),
}

impl Codec {
    /// Whether a change is written with its cursor.
    pub fn tells_cursor(&self) -> bool {
        match self {
            Self::Phoenix { with_cursor, .. } => *with_cursor,
            Self::ChangeEvent => true,
        }
    }

    /// What stands before and after the object of a change that comes as this operation, for the bindings of these ids.
    pub fn around(&self, ids: &[u32], operation: &str, cursor: &str) -> (String, &'static str) {
        match self {
            Self::Phoenix { version, topic, by_operation: true, .. } => {
                around_event(*version, topic, operation)
            }
            Self::Phoenix { version, topic, .. } => around_changes(*version, topic, ids),
            Self::ChangeEvent => (format!("C{cursor}\n"), ""),
        }
    }

    /// The news that nothing comes for now, or that it goes on. None for what is bare: whoever writes that hears of it
    /// by itself.
    pub fn stall(&self, stalls: bool) -> Option<String> {
        let Self::Phoenix { version, topic, .. } = self else { return None };
        let (status, text) = if stalls { ("error", STALLED) } else { ("ok", RESUMED) };
        let payload = system(topic, "postgres_changes", status, text);
        Some(fan_out(*version, topic, "system", &payload))
    }

    /// The news that changes are missing before the cursor.
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

/// The object of a change with its cursor as the last field.
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
    /// A piece as [`Codec::ChangeEvent`] writes it, and its cursor; `payload` is what stands behind the head of a change.
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
    fn a_bare_piece_is_taken_apart_as_it_was_written() {
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
