//! Values that the relay compares exactly as PostgreSQL does: booleans, integers, uuids, texts compared bytewise, enum labels.

use std::sync::Arc;

use serde::Deserialize;

/// The column types whose values the relay compares. PostgreSQL compares all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// `boolean`
    Bool,
    /// `smallint`
    Int2,
    /// `integer`
    Int4,
    /// `bigint`
    Int8,
    /// `uuid`
    Uuid,
    /// `text` with a deterministic collation: equality is bytewise. The order is the collation's and unknown here.
    Text,
    /// `varchar`, with the same rules as `text`.
    Varchar,
    /// An enum: equal values have equal labels. Their order is unknown here.
    Enum,
}

/// A value that is not null.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Datum {
    /// `boolean`
    Bool(bool),
    /// An integer of any width.
    Int(i64),
    /// `uuid`
    Uuid(u128),
    /// `text`, `varchar`, or an enum label.
    Text(Arc<str>),
}

/// The result of parsing a text as a value of a type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Read {
    /// The value.
    Value(Datum),
    /// PostgreSQL raises an error.
    Error,
    /// A rare spelling that only PostgreSQL parses.
    Undecided,
}

impl Kind {
    /// Whether the kind is an integer.
    pub fn is_integer(self) -> bool {
        matches!(self, Self::Int2 | Self::Int4 | Self::Int8)
    }

    /// Whether the relay knows the order of the kind's values.
    pub fn is_ordered(self) -> bool {
        self.is_integer()
    }

    /// Whether values of both kinds compare by the same equality.
    pub fn compares_with(self, other: Self) -> bool {
        self == other || (self.is_integer() && other.is_integer())
    }

    /// Returns the kind of the type with this name in PostgreSQL.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "boolean" | "bool" => Self::Bool,
            "smallint" | "int2" => Self::Int2,
            "integer" | "int" | "int4" => Self::Int4,
            "bigint" | "int8" => Self::Int8,
            "uuid" => Self::Uuid,
            "text" => Self::Text,
            "character varying" | "varchar" => Self::Varchar,
            _ => return None,
        })
    }

    /// Parses a text as PostgreSQL's input function of the type does.
    pub fn read(self, text: &str) -> Read {
        match self {
            Self::Text | Self::Varchar | Self::Enum => Read::Value(Datum::Text(text.into())),
            Self::Bool => match text {
                "true" | "t" => Read::Value(Datum::Bool(true)),
                "false" | "f" => Read::Value(Datum::Bool(false)),
                _ if text.trim().starts_with(|c: char| "tTfFyYnNoO01".contains(c)) => Read::Undecided,
                _ => Read::Error,
            },
            Self::Uuid => read_uuid(text),
            Self::Int2 => read_integer(text, i16::MIN.into(), i16::MAX.into()),
            Self::Int4 => read_integer(text, i32::MIN.into(), i32::MAX.into()),
            Self::Int8 => read_integer(text, i64::MIN, i64::MAX),
        }
    }

    /// Parses the JSON text of a row image as a value of this kind; `None` when it is not one.
    pub fn from_json(self, json: &str) -> Option<Datum> {
        match self {
            Self::Bool => serde_json::from_str(json).ok().map(Datum::Bool),
            Self::Int2 | Self::Int4 | Self::Int8 => json.parse().ok().map(Datum::Int),
            Self::Uuid => match read_uuid(&serde_json::from_str::<String>(json).ok()?) {
                Read::Value(uuid) => Some(uuid),
                _ => None,
            },
            Self::Text | Self::Varchar | Self::Enum => {
                serde_json::from_str::<String>(json).ok().map(|text| Datum::Text(text.into()))
            }
        }
    }
}

impl Datum {
    /// Whether the value fits into a PostgreSQL index together with others.
    pub fn is_short(&self) -> bool {
        !matches!(self, Self::Text(text) if text.len() > 500)
    }

    /// Returns the text that a cast to `text` gives.
    pub fn to_text(&self) -> Arc<str> {
        match self {
            Self::Bool(value) => (if *value { "true" } else { "false" }).into(),
            Self::Int(value) => value.to_string().into(),
            Self::Uuid(value) => uuid_text(*value).into(),
            Self::Text(text) => Arc::clone(text),
        }
    }
}

fn uuid_text(value: u128) -> String {
    let hex = format!("{value:032x}");
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

/// Accepts all hyphens or none. PostgreSQL also accepts braces and some of the hyphens.
fn read_uuid(text: &str) -> Read {
    let bytes = text.as_bytes();
    let hyphens: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at] == b'-').collect();
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    let is_possible = bytes.iter().all(|byte| byte.is_ascii_hexdigit() || b"-{}".contains(byte));
    if !is_possible || digits.trim_matches(['{', '}']).len() != 32 {
        return Read::Error;
    }
    match u128::from_str_radix(&digits, 16) {
        Ok(value) if hyphens.is_empty() || hyphens == [8, 13, 18, 23] => Read::Value(Datum::Uuid(value)),
        _ => Read::Undecided,
    }
}

fn read_integer(text: &str, min: i64, max: i64) -> Read {
    let digits = text.strip_prefix('-').unwrap_or(text);
    if !digits.is_empty() && digits.len() <= 19 && digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return match text.parse::<i64>() {
            Ok(value) if (min..=max).contains(&value) => Read::Value(Datum::Int(value)),
            _ => Read::Error,
        };
    }
    if text.bytes().any(|byte| byte.is_ascii_digit()) { Read::Undecided } else { Read::Error }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "0a1b2c3d-0000-4000-8000-00000000000f";

    #[test]
    fn common_spellings_are_parsed_and_rare_ones_undecided() {
        let uuid = Datum::Uuid(0x0a1b_2c3d_0000_4000_8000_0000_0000_000f);
        for (kind, text, expected) in [
            (Kind::Uuid, UUID, Read::Value(uuid.clone())),
            (Kind::Uuid, &UUID.to_uppercase(), Read::Value(uuid)),
            (Kind::Uuid, &UUID.replace('-', ""), Kind::Uuid.read(UUID)),
            (Kind::Uuid, &format!("{{{UUID}}}"), Read::Undecided),
            (Kind::Uuid, &UUID.replace("-4", "4"), Read::Undecided),
            (Kind::Uuid, &UUID[1..], Read::Error),
            (Kind::Uuid, "auth0|17", Read::Error),
            (Kind::Uuid, "", Read::Error),
            (Kind::Int4, "-17", Read::Value(Datum::Int(-17))),
            (Kind::Int4, "2147483648", Read::Error),
            (Kind::Int2, "32767", Read::Value(Datum::Int(32767))),
            (Kind::Int8, "9223372036854775807", Read::Value(Datum::Int(i64::MAX))),
            (Kind::Int8, "9223372036854775808", Read::Error),
            (Kind::Int4, " 17 ", Read::Undecided),
            (Kind::Int4, "1.5", Read::Undecided),
            (Kind::Int4, "many", Read::Error),
            (Kind::Bool, "true", Read::Value(Datum::Bool(true))),
            (Kind::Bool, "YES", Read::Undecided),
            (Kind::Bool, "maybe", Read::Error),
        ] {
            assert_eq!(kind.read(text), expected, "{kind:?} {text}");
        }
    }

    #[test]
    fn values_are_parsed_from_images_and_written_as_text() {
        for (kind, json, text) in [
            (Kind::Int8, "9223372036854775807", "9223372036854775807"),
            (Kind::Bool, "true", "true"),
            (Kind::Uuid, &format!("\"{UUID}\""), UUID),
            (Kind::Text, r#""a \"b\" \u00fc""#, "a \"b\" ü"),
        ] {
            assert_eq!(kind.from_json(json).map(|datum| datum.to_text()).as_deref(), Some(text));
        }
        assert_eq!(Kind::Int4.from_json("1.5"), None);
        assert_eq!(Kind::Uuid.from_json("\"x\""), None);
    }
}
