//! One change as the changelog records it, and the JSON object that a subscriber gets of its row.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use time::OffsetDateTime;
use time::macros::format_description;

/// The id of a relation whose changes are delivered: a watched one, or a partition of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RelationId {
    /// The watched relation (`relay.watch_list.id`).
    pub watched: i32,
    /// The OID of the partition; `None` for the watched relation itself.
    pub part: Option<u32>,
}

impl RelationId {
    /// Returns the id of a watched relation.
    pub const fn whole(watched: i32) -> Self {
        Self { watched, part: None }
    }

    /// The table of broadcasts, `realtime.messages`. It is not a watched relation: the catalog does not have it.
    pub const MESSAGES: Self = Self::whole(-1);
}

/// The kind of a changelog entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// A row was inserted: `after` is set.
    Insert,
    /// A row was updated: `before` and `after` are set.
    Update,
    /// A row was deleted: `before` is set.
    Delete,
    /// All rows were removed at once: no images.
    Truncate,
    /// Not a row change: the schema or the access rules differ from here on.
    Schema,
    /// Changes of the relation may be missing here; `after` holds the reason, see [`Change::loss`].
    Gap,
    /// A broadcast: `after` is the row of `realtime.messages`.
    Broadcast,
}

/// The reason why changes of a relation may be missing.
#[derive(Debug, Deserialize)]
pub struct Loss {
    why: String,
    /// The schema in which the relation is no longer watched.
    #[serde(rename = "left")]
    pub former_schema: Option<String>,
}

impl Loss {
    /// Returns the text for subscribers; `None` when only subscribers of the former schema are affected.
    pub fn text(&self) -> Option<&'static str> {
        match &*self.why {
            "gone" => None,
            "unheard" => Some("its triggers did not capture every change"),
            "parts" => Some("a partition with rows was attached or detached"),
            "rewritten" => Some("its rows were rewritten as a whole"),
            _ => Some("the reason is unknown"),
        }
    }
}

impl Operation {
    /// Parses the changelog's letter.
    pub fn from_letter(letter: &str) -> Option<Self> {
        match letter {
            "I" => Some(Self::Insert),
            "U" => Some(Self::Update),
            "D" => Some(Self::Delete),
            "T" => Some(Self::Truncate),
            "S" => Some(Self::Schema),
            "G" => Some(Self::Gap),
            "M" => Some(Self::Broadcast),
            _ => None,
        }
    }

    /// Returns the name on the wire (`data.type`).
    pub fn name(self) -> &'static str {
        match self {
            Self::Insert => "INSERT",
            Self::Update => "UPDATE",
            Self::Delete => "DELETE",
            Self::Truncate => "TRUNCATE",
            Self::Schema => "SCHEMA",
            Self::Gap => "GAP",
            Self::Broadcast => "BROADCAST",
        }
    }
}

/// The header of a changelog entry, space-separated fields: `U 17 3 L16402 B731 S`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChangeHeader {
    /// The operation.
    pub operation: Operation,
    /// The watched relation.
    pub relation: RelationId,
    /// The number of the shape that the images were written under; 0 where it is unknown.
    pub shape: i32,
    /// The OID of the partition that holds the row.
    pub leaf: Option<u32>,
    /// See [`Change::began`].
    pub began: Option<u64>,
    /// See [`Change::oversize`].
    pub oversize: bool,
}

impl ChangeHeader {
    /// Parses a header; `None` when a field is malformed or unknown.
    pub fn parse(text: &str) -> Option<Self> {
        let mut fields = text.split(' ');
        let operation = Operation::from_letter(fields.next()?)?;
        let relation = RelationId::whole(fields.next()?.parse().ok()?);
        let shape = fields.next()?.parse().ok()?;
        let mut header = Self { operation, relation, shape, leaf: None, began: None, oversize: false };
        for field in fields {
            match field.split_at_checked(1)? {
                ("L", leaf) => header.leaf = Some(leaf.parse().ok()?),
                ("B", began) => header.began = Some(began.parse().ok()?),
                ("S", "") => header.oversize = true,
                _ => return None,
            }
        }
        Some(header)
    }
}

/// How the images of a change map to the columns of today.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ImageState {
    /// They have all columns of the relation.
    #[default]
    Whole,
    /// They lack columns that were added since.
    Partial,
    /// They cannot be interpreted any more.
    Unreadable,
}

/// One entry of the changelog. Images are JSON objects as PostgreSQL wrote them, in column order.
///
/// `Debug` omits the images: row contents never reach a log.
#[derive(Clone)]
pub struct Change {
    /// The position in the changelog. For one row, numbers ascend in the order of the writes.
    pub number: i64,
    /// The writer's top-level transaction.
    pub xid: u64,
    /// The commit time, as exactly as it is known.
    pub committed: OffsetDateTime,
    /// The watched relation.
    pub relation: RelationId,
    /// The partition that the change is of, by its OID; `None` when it is of the watched relation as a whole.
    pub leaf: Option<u32>,
    /// The number of the shape that the images were written under; 0 or `None` where it is unknown.
    pub shape: Option<i32>,
    /// The lower bound of what the writer's snapshot did not see: all transactions below it had finished. Set where it affects
    /// how the images are read.
    pub began: Option<u64>,
    /// The state of the images.
    pub image_state: ImageState,
    /// The operation.
    pub operation: Operation,
    /// Whether the images hold only the key and the small columns, because the row was too large for one image.
    pub oversize: bool,
    /// The row before the change.
    pub before: Option<String>,
    /// The row after the change.
    pub after: Option<String>,
}

impl Change {
    /// Returns the size of both images in bytes.
    pub fn bytes(&self) -> usize {
        [&self.before, &self.after].into_iter().flatten().map(String::len).sum()
    }

    /// Returns why changes may be missing here; `None` when the entry is not a gap.
    pub fn loss(&self) -> Option<Loss> {
        let unknown = Loss { why: String::new(), former_schema: None };
        let parse = |text: &String| serde_json::from_str(text).ok();
        (self.operation == Operation::Gap).then(|| self.after.as_ref().and_then(parse).unwrap_or(unknown))
    }

    /// Returns the commit time as clients expect it: UTC, milliseconds, `Z`.
    pub fn commit_timestamp(&self) -> String {
        let shape =
            format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
        self.committed.format(shape).unwrap_or_else(|_| String::from("1970-01-01T00:00:00.000Z"))
    }

    /// Returns the commit time with microseconds, PostgreSQL's own precision.
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

/// A parsed row image: its columns in order, each value as its original JSON text.
#[derive(Default)]
pub struct Row<'a> {
    columns: Vec<(Cow<'a, str>, &'a RawValue)>,
}

impl<'a> Row<'a> {
    /// Parses an image without rebuilding its values.
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

    /// Returns the names of the columns, in order.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.columns.iter().map(|(name, _)| &**name)
    }

    /// Returns the columns and their values as JSON text, in order.
    pub fn fields(&self) -> impl ExactSizeIterator<Item = (&str, &'a str)> {
        self.columns.iter().map(|(name, value)| (&**name, value.get()))
    }

    /// Returns the object without the values whose JSON text is longer than `max` bytes.
    pub fn without_long_values(&self, max: usize) -> String {
        self.project(|name| {
            self.value(name).is_some_and(|value| value.len() <= max).then_some(Spelling::Plain)
        })
    }

    /// Returns the JSON text of a column's value; `None` when the image does not hold the column.
    pub fn value(&self, column: &str) -> Option<&'a str> {
        self.columns.iter().find(|(name, _)| name == column).map(|(_, value)| value.get())
    }

    /// Returns the object reduced to the columns for which `keep` returns a spelling.
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
    /// As in PostgreSQL's JSON.
    Plain,
    /// A `bytea` as hex digits without the leading `\x`, as Supabase clients expect it.
    BareHex,
}

/// Returns `text` as a JSON string literal.
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
    fn headers_are_parsed_completely_or_refused() {
        let plain = ChangeHeader::parse("I 17 3").unwrap();
        assert_eq!(
            (plain.operation, plain.relation, plain.shape),
            (Operation::Insert, RelationId::whole(17), 3)
        );
        assert_eq!((plain.leaf, plain.began, plain.oversize), (None, None, false));
        let full = ChangeHeader::parse("U 17 0 L4294967295 B18446744073709551615 S").unwrap();
        assert_eq!((full.leaf, full.began, full.oversize), (Some(u32::MAX), Some(u64::MAX), true));
        let message = ChangeHeader::parse("M -1 0 S").unwrap();
        assert_eq!((message.operation, message.relation), (Operation::Broadcast, RelationId::MESSAGES));
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
    fn only_bytea_loses_its_prefix() {
        let row = Row::parse(r#"{"raw":"\\xdeadbeef","text":"\\xdeadbeef","none":null}"#).unwrap();
        let text = row.project(|name| Some(if name == "text" { Spelling::Plain } else { Spelling::BareHex }));
        assert_eq!(text, r#"{"raw":"deadbeef","text":"\\xdeadbeef","none":null}"#);
    }

    #[test]
    fn images_that_are_not_objects_are_refused() {
        for image in ["", "[1]", "null", "{\"a\":1}x", "{\"a\"", "{1:2}"] {
            assert!(Row::parse(image).is_err(), "{image}");
        }
    }
}
