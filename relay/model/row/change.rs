//! One row's change as the changelog tells it, and the JSON object it becomes for a subscriber.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use time::OffsetDateTime;
use time::macros::format_description;

/// The number under which a relation is watched (`relay.watch_list.id`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RelationId(pub i32);

/// What happened to the row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// A row came: `after` is set.
    Insert,
    /// A row changed: `before` and `after` are set.
    Update,
    /// A row went: `before` is set.
    Delete,
    /// All rows went at once: no images.
    Truncate,
    /// Not of rows: from here on the schema, or who may see what, is another.
    Schema,
    /// Changes of the relation may be missing here; `after` says why, see [`Change::loss`].
    Gap,
}

/// Why changes of a relation may be missing.
#[derive(Debug, Deserialize)]
pub struct Loss {
    why: String,
    /// The schema in which the relation is not watched any more.
    #[serde(rename = "left")]
    pub former_schema: Option<String>,
}

impl Loss {
    /// What its subscribers are told; none when it only concerns those who followed the schema that it left.
    pub fn text(&self) -> Option<&'static str> {
        match &*self.why {
            "gone" => None,
            "unheard" => Some("its triggers did not capture every change"),
            "parts" => Some("rows came or went with a partition"),
            "rewritten" => Some("its rows were rewritten as a whole"),
            _ => Some("what became of it could not be told"),
        }
    }
}

impl Operation {
    /// From the changelog's letter.
    pub fn from_letter(letter: &str) -> Option<Self> {
        match letter {
            "I" => Some(Self::Insert),
            "U" => Some(Self::Update),
            "D" => Some(Self::Delete),
            "T" => Some(Self::Truncate),
            "S" => Some(Self::Schema),
            "G" => Some(Self::Gap),
            _ => None,
        }
    }

    /// The word on the wire (`data.type`).
    pub fn name(self) -> &'static str {
        match self {
            Self::Insert => "INSERT",
            Self::Update => "UPDATE",
            Self::Delete => "DELETE",
            Self::Truncate => "TRUNCATE",
            Self::Schema => "SCHEMA",
            Self::Gap => "GAP",
        }
    }
}

/// What a change is, as one word after the other: `U 17 3 L16402 B731 S`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChangeHeader {
    /// What happened.
    pub operation: Operation,
    /// To which watched relation.
    pub relation: RelationId,
    /// The number of the shape that the images were written under; 0 where that is not known.
    pub shape: i32,
    /// The partition that holds the row.
    pub leaf: Option<u32>,
    /// As [`Change::began`].
    pub began: Option<u64>,
    /// As [`Change::oversize`].
    pub oversize: bool,
}

impl ChangeHeader {
    /// Reads these words; none when they are others.
    pub fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let operation = Operation::from_letter(words.next()?)?;
        let relation = RelationId(words.next()?.parse().ok()?);
        let shape = words.next()?.parse().ok()?;
        let mut header = Self { operation, relation, shape, leaf: None, began: None, oversize: false };
        for word in words {
            match word.split_at_checked(1)? {
                ("L", leaf) => header.leaf = Some(leaf.parse().ok()?),
                ("B", began) => header.began = Some(began.parse().ok()?),
                ("S", "") => header.oversize = true,
                _ => return None,
            }
        }
        Some(header)
    }
}

/// How the images of a change are to be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ImageState {
    /// By the columns of the relation.
    #[default]
    Whole,
    /// The same, but they lack columns that were added since.
    Partial,
    /// Not at all: what they meant cannot be told any more.
    Unreadable,
}

/// One line of the changelog. Images are JSON objects as PostgreSQL wrote them, in column order.
///
/// `Debug` leaves the images out: row contents never reach a log.
#[derive(Clone)]
pub struct Change {
    /// Place in the changelog; per row it grows in the order of the writes.
    pub number: i64,
    /// The writer's top-level transaction.
    pub xid: u64,
    /// When the transaction committed, as exactly as that is known.
    pub committed: OffsetDateTime,
    /// Which watched relation.
    pub relation: RelationId,
    /// The number of the shape that the images were written under; 0 or none where that is not known.
    pub shape: Option<i32>,
    /// All transactions before this one were over in the snapshot by which the writer read, where that matters to how the images are read.
    pub began: Option<u64>,
    /// How the images are to be read.
    pub image_state: ImageState,
    /// What happened.
    pub operation: Operation,
    /// The images hold the key and the small columns only: the row was too large for one image.
    pub oversize: bool,
    /// The row as it was.
    pub before: Option<String>,
    /// The row as it became.
    pub after: Option<String>,
}

impl Change {
    /// How many bytes its images have.
    pub fn bytes(&self) -> usize {
        [&self.before, &self.after].into_iter().flatten().map(String::len).sum()
    }

    /// Why changes may be missing here; none when this is a change.
    pub fn loss(&self) -> Option<Loss> {
        let unknown = Loss { why: String::new(), former_schema: None };
        let parse = |text: &String| serde_json::from_str(text).ok();
        (self.operation == Operation::Gap).then(|| self.after.as_ref().and_then(parse).unwrap_or(unknown))
    }

    /// The time as clients expect it: UTC, milliseconds, `Z`.
    pub fn commit_timestamp(&self) -> String {
        let shape =
            format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
        self.committed.format(shape).unwrap_or_else(|_| String::from("1970-01-01T00:00:00.000Z"))
    }

    /// The same with microseconds, as exact as PostgreSQL knows it.
    pub fn exact_timestamp(&self) -> String {
        let shape =
            format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z");
        self.committed.format(shape).unwrap_or_else(|_| String::from("1970-01-01T00:00:00.000000Z"))
    }
}

impl fmt::Debug for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Change")
            .field("number", &self.number)
            .field("relation", &self.relation)
            .field("operation", &self.operation)
            .finish_non_exhaustive()
    }
}

/// A row image taken apart: its columns in order, each value as the JSON text it had.
#[derive(Default)]
pub struct Row<'a> {
    columns: Vec<(Cow<'a, str>, &'a RawValue)>,
}

impl<'a> Row<'a> {
    /// Takes an image apart without rebuilding its values.
    ///
    /// # Errors
    /// When the text is not one JSON object.
    pub fn parse(image: &'a str) -> Result<Self, serde_json::Error> {
        struct Columns;
        impl<'de> Visitor<'de> for Columns {
            type Value = Vec<(Cow<'de, str>, &'de RawValue)>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a row image")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut columns = Vec::new();
                while let Some((name, value)) = map.next_entry::<Name<'de>, &RawValue>()? {
                    columns.push((name.0, value));
                }
                Ok(columns)
            }
        }
        let mut deserializer = serde_json::Deserializer::from_str(image);
        let columns = deserializer.deserialize_map(Columns)?;
        deserializer.end()?;
        Ok(Self { columns })
    }

    /// The names of its columns, in order.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.columns.iter().map(|(name, _)| &**name)
    }

    /// Its columns and their values as JSON text, in order.
    pub fn fields(&self) -> impl ExactSizeIterator<Item = (&str, &'a str)> {
        self.columns.iter().map(|(name, value)| (&**name, value.get()))
    }

    /// The object without the values whose text is longer than this.
    pub fn without_long_values(&self, most: usize) -> String {
        self.project(|name| {
            self.value(name).is_some_and(|value| value.len() <= most).then_some(Spelling::Plain)
        })
    }

    /// The JSON text of a column's value; none when the image does not hold the column.
    pub fn value(&self, column: &str) -> Option<&'a str> {
        self.columns.iter().find(|(name, _)| name == column).map(|(_, value)| value.get())
    }

    /// The object reduced to the columns that `keep` wants; `keep` says how a value is written.
    pub fn project(&self, keep: impl Fn(&str) -> Option<Spelling>) -> String {
        let mut text = String::from("{");
        for (name, value) in &self.columns {
            let Some(spelling) = keep(name) else { continue };
            if text.len() > 1 {
                text.push(',');
            }
            text.push_str(&quoted(name));
            text.push(':');
            match (spelling, value.get().strip_prefix("\"\\\\x")) {
                (Spelling::BareHex, Some(hex)) => {
                    text.push('"');
                    text.push_str(hex);
                }
                _ => text.push_str(value.get()),
            }
        }
        text.push('}');
        text
    }
}

/// How a column's value is written for clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spelling {
    /// As PostgreSQL's JSON has it.
    Plain,
    /// A `bytea`: the hex digits without the leading `\x`, as Supabase clients know it.
    BareHex,
}

/// A JSON string literal of `text`.
pub fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

struct Name<'a>(Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Name<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl<'de> Visitor<'de> for Text {
            type Value = Cow<'de, str>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a column name")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Cow::Borrowed(text))
            }

            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Cow::Owned(text.to_owned()))
            }
        }
        deserializer.deserialize_str(Text).map(Name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(image: &str, keep: &[&str], expected: &str) {
        let row = Row::parse(image).unwrap();
        let text = row.project(|name| keep.contains(&name).then_some(Spelling::Plain));
        assert_eq!(text, expected);
    }

    #[test]
    fn kinds_are_read_whole_or_not_at_all() {
        let plain = ChangeHeader::parse("I 17 3").unwrap();
        assert_eq!((plain.operation, plain.relation, plain.shape), (Operation::Insert, RelationId(17), 3));
        assert_eq!((plain.leaf, plain.began, plain.oversize), (None, None, false));
        let full = ChangeHeader::parse("U 17 0 L4294967295 B18446744073709551615 S").unwrap();
        assert_eq!((full.leaf, full.began, full.oversize), (Some(u32::MAX), Some(u64::MAX), true));
        for text in ["", "I", "I 17", "X 17 3", "I 17 3 ", "I 17 3 L", "I 17 3 Q", "I 17 3 S1", "I a 3"] {
            assert_eq!(ChangeHeader::parse(text), None, "{text}");
        }
    }

    #[test]
    fn projection_keeps_order_and_digits() {
        let image = r#"{"b":9223372036854775807,"a":1.5000,"c":{"x":[1, 2]},"odd \"name":null}"#;
        check(image, &["a", "b"], r#"{"b":9223372036854775807,"a":1.5000}"#);
        check(image, &["c"], r#"{"c":{"x":[1, 2]}}"#);
        check(image, &["odd \"name"], r#"{"odd \"name":null}"#);
        check(image, &[], "{}");
    }

    #[test]
    fn bytea_loses_its_prefix_and_only_bytea() {
        let row = Row::parse(r#"{"raw":"\\xdeadbeef","text":"\\xdeadbeef","none":null}"#).unwrap();
        let text = row.project(|name| Some(if name == "text" { Spelling::Plain } else { Spelling::BareHex }));
        assert_eq!(text, r#"{"raw":"deadbeef","text":"\\xdeadbeef","none":null}"#);
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for image in ["", "[1]", "null", "{\"a\":1}x", "{\"a\"", "{1:2}"] {
            assert!(Row::parse(image).is_err(), "{image}");
        }
    }
}
