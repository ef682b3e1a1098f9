//! How a change, or the news of a gap, is written for a client: in Phoenix frames, or bare with its cursor.

use crate::model::phoenix::{Version, changes_frame, fan_out, system};

/// The form of what goes to a client.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Dress {
    /// Frames of a joined topic.
    Phoenix {
        /// The serialisation.
        version: Version,
        /// The topic, as on the wire.
        topic: String,
        /// Whether `data` tells the cursor.
        with_cursor: bool,
    },
    /// A [`Bare`] piece: for event streams and polls.
    Bare,
}

/// What clients are told when the feed stalls …
pub const STALLED: &str =
    "Stalled: the database cannot be asked now, changes follow in order once it is back";
/// … and when it goes on.
pub const RESUMED: &str = "Feed resumed";

/// A piece without a frame around it, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bare<'a> {
    /// A change: the object that a `postgres_changes` message has as `data`, with its `cursor`.
    Change(&'a str),
    /// Changes are missing; why.
    Gap(&'a str),
}

impl Dress {
    /// Whether a change is written with its cursor.
    pub fn tells_cursor(&self) -> bool {
        match self {
            Self::Phoenix { with_cursor, .. } => *with_cursor,
            Self::Bare => true,
        }
    }

    /// A change for the bindings of these ids. `data` is its object, with the cursor in it if that is told.
    pub fn change(&self, ids: &[u32], data: &str, cursor: &str) -> String {
        match self {
            Self::Phoenix { version, topic, .. } => changes_frame(*version, topic, ids, data),
            Self::Bare => format!("C{cursor}\n{data}"),
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
            Self::Bare => format!("G{cursor}\n{why}"),
        }
    }
}

/// The object of a change with its cursor as the last field.
pub fn with_cursor(data: &str, cursor: &str) -> String {
    let open = data.strip_suffix('}').unwrap_or(data);
    format!(r#"{open},"cursor":"{cursor}"}}"#)
}

impl<'a> Bare<'a> {
    /// A piece as [`Dress::Bare`] writes it, and its cursor.
    pub fn parse(piece: &'a str) -> Option<(&'a str, Self)> {
        let (head, body) = piece.split_once('\n')?;
        match head.strip_prefix('C') {
            Some(cursor) => Some((cursor, Self::Change(body))),
            None => Some((head.strip_prefix('G')?, Self::Gap(body))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_piece_is_taken_apart_as_it_was_written() {
        let data = with_cursor(r#"{"a":"x\ny"}"#, "AQ");
        assert_eq!(data, r#"{"a":"x\ny","cursor":"AQ"}"#);
        assert_eq!(Bare::parse(&Dress::Bare.change(&[1], &data, "AQ")), Some(("AQ", Bare::Change(&data))));
        assert_eq!(Bare::parse(&Dress::Bare.gap("why", "AQ")), Some(("AQ", Bare::Gap("why"))));
    }
}
