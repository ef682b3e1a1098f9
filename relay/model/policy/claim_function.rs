//! Functions of claims alone, as PostgreSQL computes them: texts, lists and documents.
//!
//! Texts of claims have the database's collation, which is deterministic: they are compared by their bytes.

use serde_json::Value;

use crate::model::policy::claim_document::{contains, is_same, text_list};
use crate::model::policy::claim_expr::{ClaimFailure, Evaluated};
use crate::model::row::datum::Datum;
use crate::model::row::pattern::{Folding, Pattern};
use crate::model::row::truth::Truth;

/// A function. All but [`IsNull`](Self::IsNull) return null if an argument is null.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClaimFunction {
    /// `lower`, in a database whose letters are folded so.
    Lower(Folding),
    /// `upper`, likewise.
    Upper(Folding),
    /// `btrim`, `ltrim` and `rtrim`: whether the start and the end are trimmed of these characters.
    Trim(bool, bool),
    /// `split_part`
    SplitPart,
    /// `left`
    Left,
    /// `right`
    Right,
    /// `length`
    Length,
    /// `replace`
    Replace,
    /// `starts_with`
    StartsWith,
    /// `strpos`
    Position,
    /// `string_to_array` with a delimiter
    Split,
    /// `like` a pattern
    Like(Box<Pattern>),
    /// `jsonb_array_length`
    ArrayLength,
    /// `jsonb_typeof`
    TypeOf,
    /// `=` of documents
    Same,
    /// `@>` of documents
    Contains,
    /// `?|`, and `?` with a list of one key
    HasAny,
    /// `?&`
    HasAll,
    /// `is null` of a document
    IsNull,
}

/// Texts longer than this are left to PostgreSQL.
const MAX_TEXT: usize = 10_000;

impl ClaimFunction {
    /// Returns the name as in SQL, for the reader of a reason.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Lower(_) => "lower",
            Self::Upper(_) => "upper",
            Self::Trim(true, false) => "ltrim",
            Self::Trim(false, _) => "rtrim",
            Self::Trim(true, true) => "btrim",
            Self::SplitPart => "split_part",
            Self::Left => "left",
            Self::Right => "right",
            Self::Length => "length",
            Self::Replace => "replace",
            Self::StartsWith => "starts_with",
            Self::Position => "strpos",
            Self::Split => "string_to_array",
            Self::Like(_) => "like",
            Self::ArrayLength => "jsonb_array_length",
            Self::TypeOf => "jsonb_typeof",
            Self::Same => "=",
            Self::Contains => "@>",
            Self::HasAny => "?|",
            Self::HasAll => "?&",
            Self::IsNull => "is null",
        }
    }

    /// Evaluates the function.
    pub(super) fn call(&self, arguments: &[Evaluated]) -> Result<Evaluated, ClaimFailure> {
        if *self == Self::IsNull {
            return match arguments {
                [Evaluated::EmptyOrNull] => Err(ClaimFailure::Undecided),
                [value] => Ok(truth(matches!(value, Evaluated::Null))),
                _ => Err(ClaimFailure::Undecided),
            };
        }
        // PostgreSQL splits by a null delimiter into characters.
        if *self == Self::Split && matches!(arguments, [_, Evaluated::Null | Evaluated::EmptyOrNull, ..]) {
            return Err(ClaimFailure::Undecided);
        }
        if arguments.iter().any(|argument| matches!(argument, Evaluated::Null)) {
            return Ok(Evaluated::Null);
        }
        match arguments {
            [Evaluated::Document(one), keys @ ..] if matches!(self, Self::HasAny | Self::HasAll) => {
                let mut wanted = Vec::with_capacity(keys.len());
                for key in keys {
                    match key {
                        Evaluated::List(list) => wanted.extend(list),
                        Evaluated::One(key) => wanted.push(key),
                        _ => return Err(ClaimFailure::Undecided),
                    }
                }
                let known = text_list(one, true)?;
                let mut are_known = wanted.into_iter().map(|key| known.contains(key));
                Ok(truth(match self {
                    Self::HasAny => are_known.any(|is_known| is_known),
                    _ => are_known.all(|is_known| is_known),
                }))
            }
            [Evaluated::Document(one)] => self.of_document(one),
            [Evaluated::Document(one), Evaluated::Document(other)] => match self {
                Self::Same => is_same(one, other).map(truth),
                Self::Contains => contains(one, other).map(truth),
                _ => Err(ClaimFailure::Undecided),
            },
            arguments => self.of_texts(arguments),
        }
    }

    fn of_document(&self, document: &Value) -> Result<Evaluated, ClaimFailure> {
        match (self, document) {
            (Self::ArrayLength, Value::Array(list)) => Ok(number(list.len())),
            (Self::ArrayLength, _) => Err(ClaimFailure::Error),
            (Self::TypeOf, document) => Ok(text(match document {
                Value::Null => "null",
                Value::Bool(_) => "boolean",
                Value::Number(_) => "number",
                Value::String(_) => "string",
                Value::Array(_) => "array",
                Value::Object(_) => "object",
            })),
            _ => Err(ClaimFailure::Undecided),
        }
    }

    fn of_texts(&self, arguments: &[Evaluated]) -> Result<Evaluated, ClaimFailure> {
        let data = arguments.iter().map(|argument| match argument {
            Evaluated::One(datum) => Ok(datum),
            _ => Err(ClaimFailure::Undecided),
        });
        let data = data.collect::<Result<Vec<_>, _>>()?;
        let is_long = |datum: &&Datum| matches!(datum, Datum::Text(text) if text.len() > MAX_TEXT);
        if data.iter().any(is_long) {
            return Err(ClaimFailure::Undecided);
        }
        match (self, data.as_slice()) {
            (Self::Lower(folding), [Datum::Text(one)]) => fold(one, *folding, str::to_ascii_lowercase),
            (Self::Upper(folding), [Datum::Text(one)]) => fold(one, *folding, str::to_ascii_uppercase),
            (Self::Trim(start, end), [Datum::Text(one)]) => Ok(text(trimmed(one, " ", *start, *end))),
            (Self::Trim(start, end), [Datum::Text(one), Datum::Text(of)]) => {
                Ok(text(trimmed(one, of, *start, *end)))
            }
            (Self::SplitPart, [Datum::Text(one), Datum::Text(by), Datum::Int(at)]) => {
                split_part(one, by, *at).map(text)
            }
            (Self::Left, [Datum::Text(one), Datum::Int(count)]) => {
                Ok(text(&one[..boundary(one, *count, false)]))
            }
            (Self::Right, [Datum::Text(one), Datum::Int(count)]) => {
                Ok(text(&one[boundary(one, *count, true)..]))
            }
            (Self::Length, [Datum::Text(one)]) => Ok(number(one.chars().count())),
            (Self::Replace, [Datum::Text(one), Datum::Text(from), Datum::Text(to)]) => {
                match from.is_empty() {
                    true => Ok(text(one)),
                    false => Ok(text(&one.replace(&**from, to))),
                }
            }
            (Self::StartsWith, [Datum::Text(one), Datum::Text(with)]) => Ok(truth(one.starts_with(&**with))),
            (Self::Position, [Datum::Text(one), Datum::Text(part)]) => Ok(match one.find(&**part) {
                Some(at) => number(one[..at].chars().count() + 1),
                None => number(0),
            }),
            (Self::Split, [Datum::Text(one), Datum::Text(by)]) => Ok(Evaluated::List(split(one, by))),
            (Self::Like(pattern), [Datum::Text(one)]) => match pattern.matches(one) {
                Truth::True => Ok(truth(true)),
                Truth::False => Ok(truth(false)),
                _ => Err(ClaimFailure::Undecided),
            },
            _ => Err(ClaimFailure::Undecided),
        }
    }
}

fn text(text: &str) -> Evaluated {
    Evaluated::One(Datum::Text(text.into()))
}

fn truth(value: bool) -> Evaluated {
    Evaluated::One(Datum::Bool(value))
}

fn number(value: usize) -> Evaluated {
    Evaluated::One(Datum::Int(i64::try_from(value).unwrap_or(i64::MAX)))
}

fn fold(one: &str, folding: Folding, change: impl Fn(&str) -> String) -> Result<Evaluated, ClaimFailure> {
    match folding {
        Folding::Ascii => Ok(text(&change(one))),
        Folding::Letters if one.is_ascii() => Ok(text(&change(one))),
        Folding::Letters | Folding::Unknown => Err(ClaimFailure::Undecided),
    }
}

fn trimmed<'a>(one: &'a str, of: &str, start: bool, end: bool) -> &'a str {
    let is_one = |character: char| of.contains(character);
    let one = if start { one.trim_start_matches(is_one) } else { one };
    if end { one.trim_end_matches(is_one) } else { one }
}

fn split_part<'a>(one: &'a str, by: &str, at: i64) -> Result<&'a str, ClaimFailure> {
    match usize::try_from(at) {
        Ok(0) => Err(ClaimFailure::Error),
        Ok(1) if by.is_empty() => Ok(one),
        Ok(_) if by.is_empty() => Ok(""),
        Ok(at) => Ok(one.split(by).nth(at - 1).unwrap_or_default()),
        // Not all servers count from the end.
        Err(_) => Err(ClaimFailure::Undecided),
    }
}

fn split(one: &str, by: &str) -> Vec<Datum> {
    let all = |parts: &mut dyn Iterator<Item = &str>| parts.map(|part| Datum::Text(part.into())).collect();
    match (one.is_empty(), by.is_empty()) {
        (true, _) => Vec::new(),
        (false, true) => all(&mut std::iter::once(one)),
        (false, false) => all(&mut one.split(by)),
    }
}

/// Returns the byte after the first `count` characters, or before the last; a negative count is of those that are left out.
fn boundary(one: &str, count: i64, from_end: bool) -> usize {
    let length = i64::try_from(one.chars().count()).unwrap_or(i64::MAX);
    let kept = if count < 0 { length.saturating_add(count) } else { count }.clamp(0, length);
    let at = if from_end { length - kept } else { kept };
    let at = usize::try_from(at).unwrap_or_default();
    one.char_indices().nth(at).map_or(one.len(), |(byte, _)| byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(function: &ClaimFunction, arguments: &[Evaluated]) -> String {
        match function.call(arguments) {
            Ok(Evaluated::One(datum)) => datum.to_text().to_string(),
            Ok(Evaluated::Null) => String::from("null"),
            Ok(Evaluated::List(list)) => list.iter().map(Datum::to_text).collect::<Vec<_>>().join("|"),
            Ok(_) => String::from("other"),
            Err(ClaimFailure::Error) => String::from("raises"),
            Err(ClaimFailure::Undecided) => String::from("undecided"),
        }
    }

    #[test]
    fn texts_are_cut_as_postgresql_cuts_them() {
        use ClaimFunction::{Left, Position, Right, Split, SplitPart, Trim};
        let int = |value: i64| Evaluated::One(Datum::Int(value));
        for (function, arguments, expected) in [
            (SplitPart, vec![text("a@b@c"), text("@"), int(2)], "b"),
            (SplitPart, vec![text("a@b"), text("@"), int(3)], ""),
            (SplitPart, vec![text("a@b"), text(""), int(1)], "a@b"),
            (SplitPart, vec![text("a@b"), text(""), int(2)], ""),
            (SplitPart, vec![text("a@b"), text("@"), int(0)], "raises"),
            (SplitPart, vec![text("a@b"), text("@"), int(-1)], "undecided"),
            (SplitPart, vec![text("a@b"), Evaluated::Null, int(0)], "null"),
            (Left, vec![text("äbc"), int(2)], "äb"),
            (Left, vec![text("äbc"), int(-1)], "äb"),
            (Left, vec![text("äbc"), int(-9)], ""),
            (Right, vec![text("abü"), int(2)], "bü"),
            (Right, vec![text("abü"), int(-1)], "bü"),
            (Right, vec![text("abü"), int(9)], "abü"),
            (Position, vec![text("aübx"), text("x")], "4"),
            (Position, vec![text("a"), text("")], "1"),
            (Position, vec![text("a"), text("b")], "0"),
            (Split, vec![text(""), text(" ")], ""),
            (Split, vec![text("a  b"), text(" ")], "a||b"),
            (Split, vec![text("ab"), text("")], "ab"),
            (Trim(true, true), vec![text(" \ta ")], "\ta"),
            (Trim(true, false), vec![text("xyax"), text("yx")], "ax"),
            (Trim(false, true), vec![text("xyax"), text("")], "xyax"),
        ] {
            assert_eq!(call(&function, &arguments), expected, "{function:?}");
        }
        assert_eq!(call(&ClaimFunction::Lower(Folding::Letters), &[text("AbÄ")]), "undecided");
        assert_eq!(call(&ClaimFunction::Lower(Folding::Ascii), &[text("AbÄ")]), "abÄ");
        assert_eq!(call(&ClaimFunction::Upper(Folding::Unknown), &[text("a")]), "undecided");
    }

    #[test]
    fn documents_are_compared_as_postgresql_compares_them() {
        let of = |json: &str| Evaluated::Document(serde_json::from_str(json).unwrap());
        for (whole, part, expected) in [
            (r#"["a", "b"]"#, r#"["b"]"#, "true"),
            (r#"["a", "b"]"#, r#""b""#, "true"),
            (r#""b""#, r#"["b"]"#, "false"),
            (r#""b""#, r#""b""#, "true"),
            (r#"[["b"]]"#, r#"["b"]"#, "false"),
            (r#"[["b", "c"]]"#, r#"[["b"]]"#, "true"),
            (r#"{"a": ["x"]}"#, r#"{"a": "x"}"#, "false"),
            (r#"{"a": {"b": 1, "c": 2}}"#, r#"{"a": {"b": 1}}"#, "true"),
            (r#"{"a": 1}"#, r#"[]"#, "false"),
            (r#"[]"#, r#"{}"#, "false"),
            (r#"[1, 2]"#, r#"[]"#, "true"),
            (r#"[1, 2]"#, r#"[2, 2]"#, "true"),
            (r#"[1.0]"#, r#"[1]"#, "undecided"),
            ("null", "null", "true"),
        ] {
            assert_eq!(call(&ClaimFunction::Contains, &[of(whole), of(part)]), expected, "{whole} @> {part}");
        }
        assert_eq!(
            call(&ClaimFunction::Same, &[of(r#"{"a": 1, "b": 2}"#), of(r#"{"b": 2, "a": 1}"#)]),
            "true"
        );
        assert_eq!(call(&ClaimFunction::ArrayLength, &[of("{}")]), "raises");
        assert_eq!(call(&ClaimFunction::HasAny, &[of(r#"{"a": 1}"#), Evaluated::List(Vec::new())]), "false");
    }
}
