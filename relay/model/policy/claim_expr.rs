//! Expressions over claims alone, evaluated as in a policy: `auth.jwt() ->> 'org'` and similar.

use std::fmt;
use std::sync::Arc;

use serde_json::Value;

use crate::model::identity::claims::Claims;
use crate::model::policy::claim_document::{as_text, document, element, scalars, text_list};
use crate::model::policy::claim_function::ClaimFunction;
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
    /// The documents of `jsonb_array_elements`.
    Items(Box<ClaimExpr>),
    /// An expression of [`ClaimExpr::Item`], for each element of a list.
    Map(Box<ClaimExpr>, Box<ClaimExpr>),
    /// The element of the list around it.
    Item,
    /// The values of a kind that `to_jsonb` makes equal to a document, or to an element of an array (`true`).
    Scalars(Box<ClaimExpr>, Kind, bool),
    /// A function.
    Call(ClaimFunction, Vec<ClaimExpr>),
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
    /// A part of a path (`#>`): a key, or in an array an index.
    PathPart(String),
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
#[derive(Debug, Clone)]
pub(super) enum Evaluated {
    Null,
    One(Datum),
    Document(Value),
    Documents(Vec<Value>),
    List(Vec<Datum>),
    /// An empty text or null; which of them is unknown.
    EmptyOrNull,
}

/// Why an expression has no value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClaimFailure {
    /// PostgreSQL raises an error.
    Error,
    /// Only PostgreSQL can evaluate it.
    Undecided,
}

/// What an expression may read.
#[derive(Clone, Copy)]
struct Scope<'a> {
    claims: &'a Claims,
    /// The value of [`ClaimExpr::Item`].
    item: Option<&'a Evaluated>,
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
        match self.evaluate(Scope { claims, item: None }) {
            Ok(Evaluated::Null) => ClaimValue::Null,
            Ok(Evaluated::One(datum)) => ClaimValue::One(datum),
            Ok(Evaluated::List(list)) => ClaimValue::list(list),
            Ok(Evaluated::Document(_) | Evaluated::Documents(_) | Evaluated::EmptyOrNull)
            | Err(ClaimFailure::Undecided) => ClaimValue::Undecided,
            Err(ClaimFailure::Error) => ClaimValue::Error,
        }
    }

    /// Whether the value is the same for all claims.
    pub fn is_constant(&self) -> bool {
        match self {
            Self::Constant(_) => true,
            Self::Claims | Self::Subject | Self::Role | Self::OtherSetting | Self::Item => false,
            Self::Document(inner, _)
            | Self::Element(inner, _)
            | Self::ElementText(inner, _)
            | Self::TextList(inner, _)
            | Self::Items(inner)
            | Self::Map(inner, _)
            | Self::Scalars(inner, ..)
            | Self::Cast(inner, _) => inner.is_constant(),
            Self::NullIf(one, other) | Self::Concat(one, other) => one.is_constant() && other.is_constant(),
            Self::Coalesce(exprs) | Self::Call(_, exprs) => exprs.iter().all(Self::is_constant),
        }
    }

    fn evaluate(&self, scope: Scope<'_>) -> Result<Evaluated, ClaimFailure> {
        match self {
            Self::Constant(None) => Ok(Evaluated::Null),
            Self::Constant(Some(datum)) => Ok(Evaluated::One(datum.clone())),
            Self::Claims => Ok(text(scope.claims.json())),
            Self::Subject => Ok(text(scope.claims.sub().unwrap_or_default())),
            Self::Role => Ok(text(scope.claims.role())),
            Self::OtherSetting => Ok(Evaluated::EmptyOrNull),
            Self::Item => scope.item.cloned().ok_or(ClaimFailure::Undecided),
            Self::Document(inner, _)
            | Self::Element(inner, _)
            | Self::ElementText(inner, _)
            | Self::TextList(inner, _)
            | Self::Items(inner)
            | Self::Scalars(inner, ..) => self.of_document(inner.evaluate(scope)?),
            Self::Map(list, expr) => {
                let items = match list.evaluate(scope)? {
                    Evaluated::Documents(list) => list.into_iter().map(Evaluated::Document).collect(),
                    Evaluated::List(list) => list.into_iter().map(Evaluated::One).collect(),
                    _ => Vec::new(),
                };
                let one = |item: &Evaluated| match expr.evaluate(Scope { item: Some(item), ..scope })? {
                    Evaluated::One(datum) => Ok(datum),
                    // With a null in the list, "not found" is null instead of false.
                    _ => Err(ClaimFailure::Undecided),
                };
                items.iter().map(one).collect::<Result<_, _>>().map(Evaluated::List)
            }
            Self::Call(function, arguments) => {
                let arguments = arguments.iter().map(|argument| argument.evaluate(scope));
                function.call(&arguments.collect::<Result<Vec<_>, _>>()?)
            }
            Self::Cast(inner, kind) => as_kind(inner.evaluate(scope)?, *kind),
            Self::NullIf(one, other) => match (one.evaluate(scope)?, other.evaluate(scope)?) {
                (Evaluated::Null, _) => Ok(Evaluated::Null),
                (Evaluated::EmptyOrNull, Evaluated::One(Datum::Text(text))) if text.is_empty() => {
                    Ok(Evaluated::Null)
                }
                (Evaluated::One(one), Evaluated::One(other)) if one == other => Ok(Evaluated::Null),
                (Evaluated::One(one), Evaluated::One(_) | Evaluated::Null) => Ok(Evaluated::One(one)),
                _ => Err(ClaimFailure::Undecided),
            },
            Self::Concat(one, other) => match (one.evaluate(scope)?, other.evaluate(scope)?) {
                (Evaluated::Null, _) | (_, Evaluated::Null) => Ok(Evaluated::Null),
                (Evaluated::One(one), Evaluated::One(other)) => {
                    Ok(text(&format!("{}{}", one.to_text(), other.to_text())))
                }
                _ => Err(ClaimFailure::Undecided),
            },
            Self::Coalesce(exprs) => {
                let mut rest = exprs.iter();
                while let Some(expr) = rest.next() {
                    match expr.evaluate(scope)? {
                        Evaluated::Null => {}
                        // Empty is the value, null is the next one.
                        Evaluated::EmptyOrNull if rest.len() > 0 => return Err(ClaimFailure::Undecided),
                        found => return Ok(found),
                    }
                }
                Ok(Evaluated::Null)
            }
        }
    }

    /// Evaluates an expression of a document, which may be null.
    fn of_document(&self, inner: Evaluated) -> Result<Evaluated, ClaimFailure> {
        let inner = match (self, inner) {
            // Functions that return rows return none for null.
            (Self::TextList(_, false), Evaluated::Null) => return Ok(Evaluated::List(Vec::new())),
            (Self::Items(_), Evaluated::Null) => return Ok(Evaluated::Documents(Vec::new())),
            (_, Evaluated::Null) => return Ok(Evaluated::Null),
            (Self::Document(..), Evaluated::One(Datum::Text(text))) => {
                return document(&text).map(Evaluated::Document);
            }
            (Self::Document(..), _) => return Err(ClaimFailure::Undecided),
            (_, Evaluated::Document(inner)) => inner,
            _ => return Err(ClaimFailure::Undecided),
        };
        match self {
            Self::Element(_, step) => Ok(element(&inner, step)?
                .map_or(Evaluated::Null, |element| Evaluated::Document(element.clone()))),
            Self::ElementText(_, step) => element(&inner, step)?.map_or(Ok(Evaluated::Null), as_text),
            Self::TextList(_, is_key_list) => text_list(&inner, *is_key_list).map(Evaluated::List),
            Self::Items(_) => match inner {
                Value::Array(items) => Ok(Evaluated::Documents(items)),
                _ => Err(ClaimFailure::Error),
            },
            Self::Scalars(_, kind, within) => scalars(&inner, *kind, *within).map(Evaluated::List),
            _ => Err(ClaimFailure::Undecided),
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
            Self::TextList(inner, _)
            | Self::Items(inner)
            | Self::Map(inner, _)
            | Self::Scalars(inner, ..) => {
                write!(f, "elements of {inner}")
            }
            Self::Item => f.write_str("the element"),
            Self::Call(function, arguments) => {
                let arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
                match function.name() {
                    name if name.starts_with(|first: char| first.is_ascii_alphabetic()) => {
                        write!(f, "{name}({})", arguments.join(", "))
                    }
                    operator => f.write_str(&arguments.join(&format!(" {operator} "))),
                }
            }
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
            Self::Key(key) | Self::PathPart(key) => write!(f, "'{key}'"),
            Self::Index(index) => write!(f, "{index}"),
        }
    }
}

fn text(text: &str) -> Evaluated {
    Evaluated::One(Datum::Text(text.into()))
}

fn as_kind(value: Evaluated, kind: Kind) -> Result<Evaluated, ClaimFailure> {
    match value {
        Evaluated::Null => Ok(Evaluated::Null),
        Evaluated::One(datum) => cast(&datum, kind).map(Evaluated::One),
        Evaluated::List(list) => {
            list.iter().map(|datum| cast(datum, kind)).collect::<Result<_, _>>().map(Evaluated::List)
        }
        Evaluated::Document(Value::Bool(value)) if kind == Kind::Bool => {
            Ok(Evaluated::One(Datum::Bool(value)))
        }
        // PostgreSQL rounds fractions.
        Evaluated::Document(Value::Number(number)) if kind.is_integer() => match number.as_i64() {
            Some(number) => cast(&Datum::Int(number), kind).map(Evaluated::One),
            None => Err(ClaimFailure::Undecided),
        },
        Evaluated::Document(_) | Evaluated::Documents(_) | Evaluated::EmptyOrNull => {
            Err(ClaimFailure::Undecided)
        }
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
