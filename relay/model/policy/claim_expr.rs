//! Expressions over claims alone, evaluated as in a policy: `auth.jwt() ->> 'org'` and similar.

use std::fmt;
use std::sync::Arc;

use serde_json::Value;

use crate::model::identity::claims::Claims;
use crate::model::row::datum::{Datum, Kind, Read};

/// An expression that reads only claims.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClaimExpr {
    /// A constant; `None` is null.
    Constant(Option<Datum>),
    /// `request.jwt.claims` as text.
    Claims,
    /// `request.jwt.claim.sub`: the subject, empty when there is none.
    Subject,
    /// `request.jwt.claim.role`
    Role,
    /// Another `request.jwt.claim.…` setting, which is never set: null or empty.
    OtherSetting,
    /// A cast from text to `json` (`false`) or `jsonb` (`true`).
    Document(Box<ClaimExpr>, bool),
    /// `->` with a key or an index.
    Element(Box<ClaimExpr>, ClaimStep),
    /// `->>`: the element as text.
    ElementText(Box<ClaimExpr>, ClaimStep),
    /// The texts of `jsonb_array_elements_text`, or the keys and strings that `?` compares (`true`).
    TextList(Box<ClaimExpr>, bool),
    /// A cast to one of the kinds, element by element for a list.
    Cast(Box<ClaimExpr>, Kind),
    /// `nullif`
    NullIf(Box<ClaimExpr>, Box<ClaimExpr>),
    /// `coalesce`
    Coalesce(Vec<ClaimExpr>),
    /// `||` of texts
    Concat(Box<ClaimExpr>, Box<ClaimExpr>),
}

/// One step into a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClaimStep {
    /// The value of a key.
    Key(String),
    /// An array element; negative counts from the end.
    Index(i64),
}

/// The value of an expression for some claims.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ClaimValue {
    /// Null.
    Null,
    /// A value.
    One(Datum),
    /// A list, without its nulls, in ascending order. See [`ClaimValue::list`].
    List(Arc<[Datum]>),
    /// PostgreSQL raises an error.
    Error,
    /// Only PostgreSQL can evaluate it.
    Undecided,
}

/// An intermediate value, which may be a document.
enum Evaluated {
    Null,
    One(Datum),
    Document(Value),
    List(Vec<Datum>),
    /// An empty text or null; which of them is unknown.
    EmptyOrNull,
}

enum ClaimFailure {
    Error,
    Undecided,
}

impl ClaimValue {
    /// Creates a list of values, which need not be in order.
    pub fn list(mut values: Vec<Datum>) -> Self {
        values.sort_unstable();
        values.dedup();
        Self::List(values.into())
    }
}

impl ClaimExpr {
    /// Evaluates the expression for these claims.
    pub fn value(&self, claims: &Claims) -> ClaimValue {
        match self.evaluate(claims) {
            Ok(Evaluated::Null) => ClaimValue::Null,
            Ok(Evaluated::One(datum)) => ClaimValue::One(datum),
            Ok(Evaluated::List(list)) => ClaimValue::list(list),
            Ok(Evaluated::Document(_) | Evaluated::EmptyOrNull) | Err(ClaimFailure::Undecided) => {
                ClaimValue::Undecided
            }
            Err(ClaimFailure::Error) => ClaimValue::Error,
        }
    }

    /// Whether the value is the same for all claims.
    pub fn is_constant(&self) -> bool {
        match self {
            Self::Constant(_) => true,
            Self::Claims | Self::Subject | Self::Role | Self::OtherSetting => false,
            Self::Document(inner, _)
            | Self::Element(inner, _)
            | Self::ElementText(inner, _)
            | Self::TextList(inner, _)
            | Self::Cast(inner, _) => inner.is_constant(),
            Self::NullIf(one, other) | Self::Concat(one, other) => one.is_constant() && other.is_constant(),
            Self::Coalesce(exprs) => exprs.iter().all(Self::is_constant),
        }
    }

    fn evaluate(&self, claims: &Claims) -> Result<Evaluated, ClaimFailure> {
        let text = |text: &str| Ok(Evaluated::One(Datum::Text(text.into())));
        match self {
            Self::Constant(None) => Ok(Evaluated::Null),
            Self::Constant(Some(datum)) => Ok(Evaluated::One(datum.clone())),
            Self::Claims => text(claims.json()),
            Self::Subject => text(claims.sub().unwrap_or_default()),
            Self::Role => text(claims.role()),
            Self::OtherSetting => Ok(Evaluated::EmptyOrNull),
            Self::Document(inner, _) => match inner.evaluate(claims)? {
                Evaluated::Null => Ok(Evaluated::Null),
                Evaluated::One(Datum::Text(text)) => document(&text).map(Evaluated::Document),
                _ => Err(ClaimFailure::Undecided),
            },
            Self::Element(inner, step) => match inner.evaluate(claims)? {
                Evaluated::Null => Ok(Evaluated::Null),
                Evaluated::Document(value) => Ok(element(&value, step)
                    .map_or(Evaluated::Null, |element| Evaluated::Document(element.clone()))),
                _ => Err(ClaimFailure::Undecided),
            },
            Self::ElementText(inner, step) => match inner.evaluate(claims)? {
                Evaluated::Null => Ok(Evaluated::Null),
                Evaluated::Document(value) => match element(&value, step) {
                    None => Ok(Evaluated::Null),
                    Some(element) => as_text(element),
                },
                _ => Err(ClaimFailure::Undecided),
            },
            Self::TextList(inner, is_key_list) => match inner.evaluate(claims)? {
                Evaluated::Null if *is_key_list => Ok(Evaluated::Null),
                Evaluated::Null => Ok(Evaluated::List(Vec::new())),
                Evaluated::Document(value) => text_list(&value, *is_key_list).map(Evaluated::List),
                _ => Err(ClaimFailure::Undecided),
            },
            Self::Cast(inner, kind) => match inner.evaluate(claims)? {
                Evaluated::Null => Ok(Evaluated::Null),
                Evaluated::One(datum) => cast(&datum, *kind).map(Evaluated::One),
                Evaluated::List(list) => {
                    list.iter().map(|datum| cast(datum, *kind)).collect::<Result<_, _>>().map(Evaluated::List)
                }
                Evaluated::Document(Value::Bool(value)) if *kind == Kind::Bool => {
                    Ok(Evaluated::One(Datum::Bool(value)))
                }
                Evaluated::Document(_) | Evaluated::EmptyOrNull => Err(ClaimFailure::Undecided),
            },
            Self::NullIf(one, other) => match (one.evaluate(claims)?, other.evaluate(claims)?) {
                (Evaluated::Null, _) => Ok(Evaluated::Null),
                (Evaluated::EmptyOrNull, Evaluated::One(Datum::Text(text))) if text.is_empty() => {
                    Ok(Evaluated::Null)
                }
                (Evaluated::One(one), Evaluated::One(other)) if one == other => Ok(Evaluated::Null),
                (Evaluated::One(one), Evaluated::One(_) | Evaluated::Null) => Ok(Evaluated::One(one)),
                _ => Err(ClaimFailure::Undecided),
            },
            Self::Concat(one, other) => match (one.evaluate(claims)?, other.evaluate(claims)?) {
                (Evaluated::Null, _) | (_, Evaluated::Null) => Ok(Evaluated::Null),
                (Evaluated::One(one), Evaluated::One(other)) => {
                    text(&format!("{}{}", one.to_text(), other.to_text()))
                }
                _ => Err(ClaimFailure::Undecided),
            },
            Self::Coalesce(exprs) => {
                for expr in exprs {
                    match expr.evaluate(claims)? {
                        Evaluated::Null => {}
                        found => return Ok(found),
                    }
                }
                Ok(Evaluated::Null)
            }
        }
    }
}

impl fmt::Display for ClaimExpr {
    /// Writes SQL, with `auth.jwt()` for the claims.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Constant(None) => f.write_str("null"),
            Self::Constant(Some(datum)) => write!(f, "'{}'", datum.to_text()),
            Self::Claims | Self::OtherSetting => f.write_str("auth.jwt()"),
            Self::Subject => f.write_str("auth.jwt() ->> 'sub'"),
            Self::Role => f.write_str("auth.jwt() ->> 'role'"),
            // The cast to a document and the `nullif` of an empty text add nothing for the reader.
            Self::Document(inner, _) | Self::NullIf(inner, _) => inner.fmt(f),
            Self::Element(inner, step) => write!(f, "{inner} -> {step}"),
            Self::ElementText(inner, step) => write!(f, "{inner} ->> {step}"),
            Self::TextList(inner, _) => write!(f, "elements of {inner}"),
            Self::Cast(inner, kind) => write!(f, "({inner})::{}", format!("{kind:?}").to_lowercase()),
            Self::Concat(one, other) => write!(f, "{one} || {other}"),
            Self::Coalesce(exprs) => {
                let exprs: Vec<String> = exprs.iter().map(ToString::to_string).collect();
                write!(f, "coalesce({})", exprs.join(", "))
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

/// Parses claims that PostgreSQL's `json` and `jsonb` and serde_json read alike. A null character makes `jsonb` raise for the
/// whole document.
fn document(text: &str) -> Result<Value, ClaimFailure> {
    let value: Value = serde_json::from_str(text).map_err(|_| ClaimFailure::Undecided)?;
    fn is_plain(value: &Value) -> bool {
        match value {
            Value::Null | Value::Bool(_) => true,
            // PostgreSQL keeps or rewrites fractions and exponents; the parser already refused what f64 cannot hold.
            Value::Number(_) => true,
            Value::String(text) => !text.contains('\0'),
            Value::Array(list) => list.iter().all(is_plain),
            Value::Object(fields) => fields.iter().all(|(key, value)| !key.contains('\0') && is_plain(value)),
        }
    }
    if is_plain(&value) { Ok(value) } else { Err(ClaimFailure::Undecided) }
}

fn element<'a>(value: &'a Value, step: &ClaimStep) -> Option<&'a Value> {
    match (step, value) {
        (ClaimStep::Key(key), Value::Object(fields)) => fields.get(key),
        (ClaimStep::Index(index), Value::Array(list)) => {
            let at = if *index < 0 { index.checked_add_unsigned(list.len() as u64)? } else { *index };
            list.get(usize::try_from(at).ok()?)
        }
        _ => None,
    }
}

fn as_text(value: &Value) -> Result<Evaluated, ClaimFailure> {
    match value {
        Value::Null => Ok(Evaluated::Null),
        Value::Bool(value) => Ok(Evaluated::One(Datum::Text((if *value { "true" } else { "false" }).into()))),
        Value::Number(number) if number.is_i64() || number.is_u64() => {
            Ok(Evaluated::One(Datum::Text(number.to_string().into())))
        }
        Value::String(text) => Ok(Evaluated::One(Datum::Text(text.as_str().into()))),
        // PostgreSQL formats them with its own blanks and digits.
        Value::Number(_) | Value::Array(_) | Value::Object(_) => Err(ClaimFailure::Undecided),
    }
}

fn text_list(value: &Value, is_key_list: bool) -> Result<Vec<Datum>, ClaimFailure> {
    let text = |text: &String| Datum::Text(text.as_str().into());
    match (value, is_key_list) {
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
                    Evaluated::One(item) => texts.push(item),
                    // With a null in the list, "not found" is null instead of false.
                    _ => return Err(ClaimFailure::Undecided),
                }
            }
            Ok(texts)
        }
        (_, false) => Err(ClaimFailure::Error),
    }
}

fn cast(datum: &Datum, kind: Kind) -> Result<Datum, ClaimFailure> {
    let fits = |value: i64, min: i64, max: i64| match (min..=max).contains(&value) {
        true => Ok(Datum::Int(value)),
        false => Err(ClaimFailure::Error),
    };
    match (datum, kind) {
        (Datum::Int(value), Kind::Int2) => fits(*value, i16::MIN.into(), i16::MAX.into()),
        (Datum::Int(value), Kind::Int4) => fits(*value, i32::MIN.into(), i32::MAX.into()),
        (Datum::Int(value), Kind::Int8) => Ok(Datum::Int(*value)),
        (Datum::Bool(_), Kind::Bool) | (Datum::Uuid(_), Kind::Uuid) => Ok(datum.clone()),
        (_, Kind::Text) => Ok(Datum::Text(datum.to_text())),
        (Datum::Text(text), _) => match kind.read(text) {
            Read::Value(datum) => Ok(datum),
            Read::Error => Err(ClaimFailure::Error),
            Read::Undecided => Err(ClaimFailure::Undecided),
        },
        _ => Err(ClaimFailure::Undecided),
    }
}
