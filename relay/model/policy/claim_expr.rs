//! Expressions over claims alone, with the meaning that they have in a policy: `auth.jwt() ->> 'org'` and their like.

use std::fmt;
use std::sync::Arc;

use serde_json::Value;

use crate::model::identity::claims::Claims;
use crate::model::row::datum::{Datum, Kind, Read};

/// An expression that reads nothing but claims.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClaimExpr {
    /// A constant; none is null.
    Constant(Option<Datum>),
    /// `request.jwt.claims` as text.
    Claims,
    /// `request.jwt.claim.sub`: the subject, empty when there is none.
    Subject,
    /// `request.jwt.claim.role`
    Role,
    /// Another setting of that family; nobody sets it, so that it is null or empty.
    Unset,
    /// A cast from text to `json` (`false`) or `jsonb` (`true`).
    Document(Box<ClaimExpr>, bool),
    /// `->` with a key or an index.
    Part(Box<ClaimExpr>, ClaimStep),
    /// `->>`: the part as text.
    PartText(Box<ClaimExpr>, ClaimStep),
    /// `jsonb_array_elements_text`, or the keys and strings that `?` looks at (`true`): a list of texts.
    Texts(Box<ClaimExpr>, bool),
    /// A cast to one of the kinds, element by element for a list.
    Cast(Box<ClaimExpr>, Kind),
    /// `nullif`
    NullIf(Box<ClaimExpr>, Box<ClaimExpr>),
    /// `coalesce`
    Coalesce(Vec<ClaimExpr>),
}

/// One step into a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClaimStep {
    /// The value of a key.
    Key(String),
    /// An element; negative from the end.
    Index(i64),
}

/// What a term comes to for some claims.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ClaimValue {
    /// Null.
    Null,
    /// A value.
    One(Datum),
    /// A list, without its nulls.
    List(Arc<[Datum]>),
    /// PostgreSQL raises an error.
    Raises,
    /// Only PostgreSQL knows.
    Unsure,
}

/// While it is worked out: also documents.
enum Found {
    Null,
    One(Datum),
    Document(Value),
    List(Vec<Datum>),
    /// An empty text or null, nobody knows which.
    EmptyOrNull,
}

enum Stop {
    Raises,
    Unsure,
}

impl ClaimExpr {
    /// Works it out for these claims.
    pub fn value(&self, claims: &Claims) -> ClaimValue {
        match self.find(claims) {
            Ok(Found::Null) => ClaimValue::Null,
            Ok(Found::One(datum)) => ClaimValue::One(datum),
            Ok(Found::List(list)) => ClaimValue::List(list.into()),
            Ok(Found::Document(_) | Found::EmptyOrNull) | Err(Stop::Unsure) => ClaimValue::Unsure,
            Err(Stop::Raises) => ClaimValue::Raises,
        }
    }

    /// Whether it depends on the claims at all.
    pub fn is_constant(&self) -> bool {
        match self {
            Self::Constant(_) => true,
            Self::Claims | Self::Subject | Self::Role | Self::Unset => false,
            Self::Document(inner, _)
            | Self::Part(inner, _)
            | Self::PartText(inner, _)
            | Self::Texts(inner, _)
            | Self::Cast(inner, _) => inner.is_constant(),
            Self::NullIf(one, other) => one.is_constant() && other.is_constant(),
            Self::Coalesce(terms) => terms.iter().all(Self::is_constant),
        }
    }

    fn find(&self, claims: &Claims) -> Result<Found, Stop> {
        let text = |text: &str| Ok(Found::One(Datum::Text(text.into())));
        match self {
            Self::Constant(None) => Ok(Found::Null),
            Self::Constant(Some(datum)) => Ok(Found::One(datum.clone())),
            Self::Claims => text(claims.json()),
            Self::Subject => text(claims.sub().unwrap_or_default()),
            Self::Role => text(claims.role()),
            Self::Unset => Ok(Found::EmptyOrNull),
            Self::Document(inner, _) => match inner.find(claims)? {
                Found::Null => Ok(Found::Null),
                Found::One(Datum::Text(text)) => document(&text).map(Found::Document),
                _ => Err(Stop::Unsure),
            },
            Self::Part(inner, step) => match inner.find(claims)? {
                Found::Null => Ok(Found::Null),
                Found::Document(value) => {
                    Ok(part(&value, step).map_or(Found::Null, |part| Found::Document(part.clone())))
                }
                _ => Err(Stop::Unsure),
            },
            Self::PartText(inner, step) => match inner.find(claims)? {
                Found::Null => Ok(Found::Null),
                Found::Document(value) => match part(&value, step) {
                    None => Ok(Found::Null),
                    Some(part) => as_text(part),
                },
                _ => Err(Stop::Unsure),
            },
            Self::Texts(inner, for_keys) => match inner.find(claims)? {
                Found::Null if *for_keys => Ok(Found::Null),
                Found::Null => Ok(Found::List(Vec::new())),
                Found::Document(value) => texts(&value, *for_keys).map(Found::List),
                _ => Err(Stop::Unsure),
            },
            Self::Cast(inner, kind) => match inner.find(claims)? {
                Found::Null => Ok(Found::Null),
                Found::One(datum) => cast(&datum, *kind).map(Found::One),
                Found::List(list) => {
                    list.iter().map(|datum| cast(datum, *kind)).collect::<Result<_, _>>().map(Found::List)
                }
                Found::Document(Value::Bool(value)) if *kind == Kind::Bool => {
                    Ok(Found::One(Datum::Bool(value)))
                }
                Found::Document(_) | Found::EmptyOrNull => Err(Stop::Unsure),
            },
            Self::NullIf(one, other) => match (one.find(claims)?, other.find(claims)?) {
                (Found::Null, _) => Ok(Found::Null),
                (Found::EmptyOrNull, Found::One(Datum::Text(text))) if text.is_empty() => Ok(Found::Null),
                (Found::One(one), Found::One(other)) if one == other => Ok(Found::Null),
                (Found::One(one), Found::One(_) | Found::Null) => Ok(Found::One(one)),
                _ => Err(Stop::Unsure),
            },
            Self::Coalesce(terms) => {
                for term in terms {
                    match term.find(claims)? {
                        Found::Null => {}
                        found => return Ok(found),
                    }
                }
                Ok(Found::Null)
            }
        }
    }
}

impl fmt::Display for ClaimExpr {
    /// As SQL, with `auth.jwt()` for the claims.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Constant(None) => f.write_str("null"),
            Self::Constant(Some(datum)) => write!(f, "'{}'", datum.to_text()),
            Self::Claims | Self::Unset => f.write_str("auth.jwt()"),
            Self::Subject => f.write_str("auth.jwt() ->> 'sub'"),
            Self::Role => f.write_str("auth.jwt() ->> 'role'"),
            // What stands around the claims to make them a document, or nothing of an empty text, is no news.
            Self::Document(inner, _) | Self::NullIf(inner, _) => inner.fmt(f),
            Self::Part(inner, step) => write!(f, "{inner} -> {step}"),
            Self::PartText(inner, step) => write!(f, "{inner} ->> {step}"),
            Self::Texts(inner, _) => write!(f, "elements of {inner}"),
            Self::Cast(inner, kind) => write!(f, "({inner})::{}", format!("{kind:?}").to_lowercase()),
            Self::Coalesce(terms) => {
                let terms: Vec<String> = terms.iter().map(ToString::to_string).collect();
                write!(f, "coalesce({})", terms.join(", "))
            }
        }
    }
}

impl fmt::Display for ClaimStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(key) => write!(f, "'{key}'"),
            Self::Index(index) => write!(f, "{index}"),
        }
    }
}

/// Claims that JSON and `jsonb` of PostgreSQL read alike and as we do: no number but plain integers, no null character.
/// A number elsewhere in the claims could make `jsonb` raise for all of them.
fn document(text: &str) -> Result<Value, Stop> {
    let value: Value = serde_json::from_str(text).map_err(|_| Stop::Unsure)?;
    fn is_plain(value: &Value) -> bool {
        match value {
            Value::Null | Value::Bool(_) => true,
            // Fractions and exponents are kept or rewritten by PostgreSQL, but never beyond what f64 can hold.
            Value::Number(_) => true,
            Value::String(text) => !text.contains('\0'),
            Value::Array(list) => list.iter().all(is_plain),
            Value::Object(fields) => fields.iter().all(|(key, value)| !key.contains('\0') && is_plain(value)),
        }
    }
    if is_plain(&value) { Ok(value) } else { Err(Stop::Unsure) }
}

fn part<'a>(value: &'a Value, step: &ClaimStep) -> Option<&'a Value> {
    match (step, value) {
        (ClaimStep::Key(key), Value::Object(fields)) => fields.get(key),
        (ClaimStep::Index(index), Value::Array(list)) => {
            let at = if *index < 0 { index.checked_add_unsigned(list.len() as u64)? } else { *index };
            list.get(usize::try_from(at).ok()?)
        }
        _ => None,
    }
}

fn as_text(value: &Value) -> Result<Found, Stop> {
    match value {
        Value::Null => Ok(Found::Null),
        Value::Bool(value) => Ok(Found::One(Datum::Text((if *value { "true" } else { "false" }).into()))),
        Value::Number(number) if number.is_i64() || number.is_u64() => {
            Ok(Found::One(Datum::Text(number.to_string().into())))
        }
        Value::String(text) => Ok(Found::One(Datum::Text(text.as_str().into()))),
        // Written by PostgreSQL with blanks and digits of its own.
        Value::Number(_) | Value::Array(_) | Value::Object(_) => Err(Stop::Unsure),
    }
}

fn texts(value: &Value, for_keys: bool) -> Result<Vec<Datum>, Stop> {
    let text = |text: &String| Datum::Text(text.as_str().into());
    match (value, for_keys) {
        (Value::Array(list), true) => Ok(list
            .iter()
            .filter_map(|item| if let Value::String(item) = item { Some(text(item)) } else { None })
            .collect()),
        (Value::Object(fields), true) => Ok(fields.keys().map(text).collect()),
        (Value::String(item), true) => Ok(vec![text(item)]),
        (_, true) => Ok(Vec::new()),
        (Value::Array(list), false) => {
            let mut texts = Vec::with_capacity(list.len());
            for item in list {
                match as_text(item)? {
                    Found::One(item) => texts.push(item),
                    // A null among them makes "not found" unknown instead of false.
                    _ => return Err(Stop::Unsure),
                }
            }
            Ok(texts)
        }
        (_, false) => Err(Stop::Raises),
    }
}

fn cast(datum: &Datum, kind: Kind) -> Result<Datum, Stop> {
    let fits = |value: i64, least: i64, most: i64| match (least..=most).contains(&value) {
        true => Ok(Datum::Int(value)),
        false => Err(Stop::Raises),
    };
    match (datum, kind) {
        (Datum::Int(value), Kind::Int2) => fits(*value, i16::MIN.into(), i16::MAX.into()),
        (Datum::Int(value), Kind::Int4) => fits(*value, i32::MIN.into(), i32::MAX.into()),
        (Datum::Int(value), Kind::Int8) => Ok(Datum::Int(*value)),
        (Datum::Bool(_), Kind::Bool) | (Datum::Uuid(_), Kind::Uuid) => Ok(datum.clone()),
        (_, Kind::Text) => Ok(Datum::Text(datum.to_text())),
        (Datum::Text(text), _) => match kind.read(text) {
            Read::Value(datum) => Ok(datum),
            Read::Raises => Err(Stop::Raises),
            Read::Unsure => Err(Stop::Unsure),
        },
        _ => Err(Stop::Unsure),
    }
}
