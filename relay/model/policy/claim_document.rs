//! Documents in claims (`jsonb`), read as PostgreSQL reads them: parsing, steps, texts, equality and containment.
//!
//! PostgreSQL keeps numbers as decimals. Only integers are compared here; a document with another number is undecided where the
//! number matters.

use serde_json::{Number, Value};

use crate::model::policy::claim_expr::{ClaimFailure, ClaimStep, Evaluated};
use crate::model::row::datum::{Datum, Kind};

/// Parses claims that PostgreSQL's `json` and `jsonb` and serde_json read alike. A null character makes `jsonb` raise for the
/// whole document.
pub fn document(text: &str) -> Result<Value, ClaimFailure> {
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

/// Takes one step into a document; `None` is null.
///
/// # Errors
/// [`ClaimFailure::Undecided`] for an index of a scalar: PostgreSQL stores it in `jsonb` as an array of one, in `json` it does not.
pub(super) fn element<'a>(value: &'a Value, step: &ClaimStep) -> Result<Option<&'a Value>, ClaimFailure> {
    let at = |list: &'a [Value], index: i64| {
        let at = if index < 0 { index.checked_add_unsigned(list.len() as u64)? } else { index };
        list.get(usize::try_from(at).ok()?)
    };
    Ok(match (step, value) {
        (ClaimStep::Key(key) | ClaimStep::PathPart(key), Value::Object(fields)) => fields.get(key),
        (ClaimStep::PathPart(index), Value::Array(list)) => {
            index.parse().ok().and_then(|index| at(list, index))
        }
        (ClaimStep::Index(index), Value::Array(list)) => at(list, *index),
        (ClaimStep::Index(_), Value::Object(_)) => None,
        (ClaimStep::Index(_), _) => return Err(ClaimFailure::Undecided),
        _ => None,
    })
}

/// Returns what `->>` makes of an element.
pub(super) fn as_text(value: &Value) -> Result<Evaluated, ClaimFailure> {
    match value {
        Value::Null => Ok(Evaluated::Null),
        Value::Bool(value) => Ok(Evaluated::One(Datum::Text((if *value { "true" } else { "false" }).into()))),
        Value::Number(number) => Ok(Evaluated::One(Datum::Text(integer(number)?.to_string().into()))),
        Value::String(text) => Ok(Evaluated::One(Datum::Text(text.as_str().into()))),
        // PostgreSQL formats them with its own blanks.
        Value::Array(_) | Value::Object(_) => Err(ClaimFailure::Undecided),
    }
}

/// Returns the texts of `jsonb_array_elements_text`, or the keys and strings that `?` compares.
pub(super) fn text_list(value: &Value, is_key_list: bool) -> Result<Vec<Datum>, ClaimFailure> {
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

/// Returns the values of this kind that equal a document, or that an array contains (`within`), as documents.
pub(super) fn scalars(value: &Value, kind: Kind, within: bool) -> Result<Vec<Datum>, ClaimFailure> {
    let one = |value: &Value| match (value, kind) {
        (Value::String(text), Kind::Text) => Ok(Some(Datum::Text(text.as_str().into()))),
        (Value::Bool(value), Kind::Bool) => Ok(Some(Datum::Bool(*value))),
        (Value::Number(number), _) if kind.is_integer() => match integer(number) {
            // A larger number equals no integer of a column.
            Ok(number) => Ok(i64::try_from(number).ok().map(Datum::Int)),
            Err(undecided) => Err(undecided),
        },
        _ => Ok(None),
    };
    match value {
        Value::Array(list) if within => list.iter().filter_map(|item| one(item).transpose()).collect(),
        other => Ok(one(other)?.into_iter().collect()),
    }
}

/// Whether two documents are equal.
pub(super) fn is_same(one: &Value, other: &Value) -> Result<bool, ClaimFailure> {
    let pairs =
        |one: &[Value], other: &[Value]| all(one.iter().zip(other), |(one, other)| is_same(one, other));
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => Ok(integer(one)? == integer(other)?),
        (Value::Array(one), Value::Array(other)) => Ok(one.len() == other.len() && pairs(one, other)?),
        (Value::Object(one), Value::Object(other)) if one.len() == other.len() => {
            all(one, |(key, value)| match other.get(key) {
                Some(same) => is_same(value, same),
                None => Ok(false),
            })
        }
        (one, other) => Ok(one == other),
    }
}

/// Evaluates `whole @> part`. As an exception, an array contains a single value; its nested arrays do not.
pub(super) fn contains(whole: &Value, part: &Value) -> Result<bool, ClaimFailure> {
    match (whole, part) {
        (Value::Array(list), part) if !part.is_array() && !part.is_object() => {
            any(list, |item| is_same(item, part))
        }
        (whole, part) => contains_within(whole, part),
    }
}

fn contains_within(whole: &Value, part: &Value) -> Result<bool, ClaimFailure> {
    match (whole, part) {
        (Value::Array(whole), Value::Array(part)) => {
            all(part, |wanted| any(whole, |item| contains_within(item, wanted)))
        }
        (Value::Object(whole), Value::Object(part)) => all(part, |(key, wanted)| match whole.get(key) {
            Some(value) => contains_within(value, wanted),
            None => Ok(false),
        }),
        (Value::Array(_) | Value::Object(_), _) | (_, Value::Array(_) | Value::Object(_)) => Ok(false),
        (whole, part) => is_same(whole, part),
    }
}

fn integer(number: &Number) -> Result<i128, ClaimFailure> {
    let number = number.as_i64().map(i128::from).or_else(|| number.as_u64().map(i128::from));
    number.ok_or(ClaimFailure::Undecided)
}

/// Whether the test holds for all items; undecided as soon as one is.
fn all<T>(
    items: impl IntoIterator<Item = T>,
    mut test: impl FnMut(T) -> Result<bool, ClaimFailure>,
) -> Result<bool, ClaimFailure> {
    let mut holds = true;
    for item in items {
        holds &= test(item)?;
    }
    Ok(holds)
}

/// Whether the test holds for one of the items; undecided as soon as one is.
fn any<T>(
    items: impl IntoIterator<Item = T>,
    mut test: impl FnMut(T) -> Result<bool, ClaimFailure>,
) -> Result<bool, ClaimFailure> {
    all(items, |item| test(item).map(|holds| !holds)).map(|none| !none)
}
