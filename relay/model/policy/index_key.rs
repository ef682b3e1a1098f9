//! Index keys: values of a row that are necessary for a condition, under which the index stores subscriptions.

use std::sync::Arc;

use crate::model::policy::claim_expr::ClaimValue;
use crate::model::policy::predicate::{Comparison, List, ListRelation, Predicate, Scalar, identifies_reader};
use crate::model::row::datum::{Datum, Kind, Read};

/// A necessary condition: the row has these values.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct IndexKey {
    /// Columns and values, ordered by column. An array column contains the value.
    pub equal: Vec<(usize, Datum)>,
    /// A column whose integer lies in a range.
    pub range: Option<(usize, Range)>,
    /// A column whose text has this short prefix.
    pub prefix: Option<(usize, Arc<str>)>,
    /// Whether PostgreSQL names the readers of the row.
    pub named: bool,
}

/// A range of integers, both bounds included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Range {
    /// The lower bound.
    pub first: i64,
    /// The upper bound.
    pub last: i64,
}

/// The necessary conditions of a predicate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IndexKeys {
    /// None is known: any row may fulfil it.
    Any,
    /// At least one of these; an empty list means that no row fulfils it.
    OneOf(Vec<IndexKey>),
}

/// The maximum columns of one key: each costs a lookup per change and makes the index larger.
const MAX_COLUMNS: usize = 3;
/// The maximum keys of one subscription. Beyond it, only one side of an `and` is used.
const MAX_KEYS: usize = 256;

impl IndexKey {
    fn equal(column: usize, datum: Datum) -> Self {
        Self { equal: vec![(column, datum)], ..Self::default() }
    }

    fn range(column: usize, first: i64, last: i64) -> Self {
        Self { range: Some((column, Range { first, last })), ..Self::default() }
    }

    fn prefix(column: usize, prefix: &str) -> Self {
        Self { prefix: Some((column, prefix.into())), ..Self::default() }
    }

    /// Returns a key that requires both.
    fn and(&self, other: &Self) -> Self {
        let mut both = self.clone();
        both.named |= other.named;
        for pair in &other.equal {
            // Two values of one column: impossible, or an array that contains both. One of them is necessary in either case.
            if both.equal.len() < MAX_COLUMNS && !both.equal.iter().any(|(column, _)| *column == pair.0) {
                both.equal.push(pair.clone());
            }
        }
        both.equal.sort();
        both.range = match (both.range, other.range) {
            (Some((column, one)), Some((same, other))) if column == same => {
                Some((column, Range { first: one.first.max(other.first), last: one.last.min(other.last) }))
            }
            (one, other) => one.or(other),
        };
        if both.prefix.is_none() {
            both.prefix.clone_from(&other.prefix);
        }
        both
    }
}

impl IndexKeys {
    const NEVER: Self = Self::OneOf(Vec::new());

    /// Returns what is necessary for both conditions.
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Any, keys) | (keys, Self::Any) => keys,
            (Self::OneOf(some), Self::OneOf(others)) => match some.len() * others.len() {
                count if count > MAX_KEYS => {
                    Self::OneOf(if some.len() < others.len() { some } else { others })
                }
                _ => Self::OneOf(
                    some.iter().flat_map(|one| others.iter().map(|other| one.and(other))).collect(),
                ),
            },
        }
    }

    /// Returns what is necessary for either condition.
    pub fn or(self, other: Self) -> Self {
        match (self, other) {
            (Self::OneOf(mut some), Self::OneOf(others)) if some.len() + others.len() <= MAX_KEYS => {
                some.extend(others);
                Self::OneOf(some)
            }
            (keys, Self::OneOf(none)) | (Self::OneOf(none), keys) if none.is_empty() => keys,
            _ => Self::Any,
        }
    }
}

impl Predicate {
    /// Returns what a row must have for the predicate to be true with these claim values.
    pub fn index_keys(&self, claims: &[ClaimValue]) -> IndexKeys {
        match self {
            Self::Constant(value) => {
                if *value == Some(true) {
                    IndexKeys::Any
                } else {
                    IndexKeys::NEVER
                }
            }
            Self::Truth(scalar) => match scalar {
                Scalar::Column(column) => IndexKeys::OneOf(vec![IndexKey::equal(*column, Datum::Bool(true))]),
                Scalar::Claim(claim) => match claims.get(*claim) {
                    Some(ClaimValue::One(Datum::Bool(true)) | ClaimValue::Undecided) | None => IndexKeys::Any,
                    Some(_) => IndexKeys::NEVER,
                },
                Scalar::ColumnText(_) | Scalar::Coalesce(_) => IndexKeys::Any,
            },
            Self::Compare(one, comparison, other) => comparison_keys(one, *comparison, other, claims),
            Self::Among(scalar, List::Of(scalars)) => scalars
                .iter()
                .map(|other| comparison_keys(scalar, Comparison::Equal, other, claims))
                .fold(IndexKeys::NEVER, IndexKeys::or),
            Self::Among(scalar, List::Claim(claim) | List::ClaimKeys(claim)) => {
                match (scalar, claims.get(*claim)) {
                    (Scalar::Column(column), Some(ClaimValue::List(list))) if list.len() <= MAX_KEYS => {
                        IndexKeys::OneOf(
                            list.iter().map(|datum| IndexKey::equal(*column, datum.clone())).collect(),
                        )
                    }
                    (_, Some(ClaimValue::Null | ClaimValue::Error)) => IndexKeys::NEVER,
                    _ => IndexKeys::Any,
                }
            }
            Self::Among(Scalar::Claim(claim), List::Column(column)) => match claims.get(*claim) {
                Some(ClaimValue::One(datum)) => {
                    IndexKeys::OneOf(vec![IndexKey::equal(*column, datum.clone())])
                }
                Some(ClaimValue::Null | ClaimValue::Error) => IndexKeys::NEVER,
                _ => IndexKeys::Any,
            },
            Self::Lists(one, ListRelation::Overlap, other) => list_keys(one, other, claims)
                .or_else(|| list_keys(other, one, claims))
                .map_or(IndexKeys::Any, |keys| keys.into_iter().fold(IndexKeys::NEVER, IndexKeys::or)),
            Self::Lists(whole, ListRelation::Contains, part) => list_keys(whole, part, claims)
                .map_or(IndexKeys::Any, |keys| keys.into_iter().fold(IndexKeys::Any, IndexKeys::and)),
            Self::And(all) => {
                all.iter().map(|one| one.index_keys(claims)).fold(IndexKeys::Any, IndexKeys::and)
            }
            Self::Or(all) => {
                all.iter().map(|one| one.index_keys(claims)).fold(IndexKeys::NEVER, IndexKeys::or)
            }
            Self::Readers { by, .. } => match identifies_reader(by, claims) {
                Some(true) => IndexKeys::OneOf(vec![IndexKey { named: true, ..IndexKey::default() }]),
                Some(false) => IndexKeys::NEVER,
                None => IndexKeys::Any,
            },
            Self::Matches(column, pattern) => match pattern.prefix() {
                "" => IndexKeys::Any,
                prefix => IndexKeys::OneOf(vec![IndexKey::prefix(*column, prefix)]),
            },
            Self::Is(inner, true) => inner.index_keys(claims),
            Self::Among(..)
            | Self::MatchesClaim(..)
            | Self::Same(..)
            | Self::IsNull(_)
            | Self::Is(_, false)
            | Self::IsUnknown(_)
            | Self::Not(_)
            | Self::Case(..)
            | Self::Fact(_)
            | Self::Opaque
            | Self::Pending => IndexKeys::Any,
        }
    }
}

/// Returns the key of each element that a column may have; `None` if the elements are unknown or too many.
fn list_keys(column: &List, elements: &List, claims: &[ClaimValue]) -> Option<Vec<IndexKeys>> {
    let List::Column(column) = column else { return None };
    let key = |datum: &Datum| IndexKeys::OneOf(vec![IndexKey::equal(*column, datum.clone())]);
    match elements {
        List::Of(scalars) => {
            let element = |scalar: &Scalar| match scalar {
                Scalar::Claim(claim) => match claims.get(*claim)? {
                    ClaimValue::One(datum) => Some(key(datum)),
                    ClaimValue::Null | ClaimValue::Error => Some(IndexKeys::NEVER),
                    _ => None,
                },
                _ => None,
            };
            scalars.iter().map(element).collect()
        }
        List::Claim(claim) | List::ClaimKeys(claim) => match claims.get(*claim)? {
            ClaimValue::List(list) if list.len() <= MAX_KEYS => Some(list.iter().map(key).collect()),
            ClaimValue::Null | ClaimValue::Error => Some(vec![IndexKeys::NEVER]),
            _ => None,
        },
        List::Column(_) => None,
    }
}

fn comparison_keys(one: &Scalar, comparison: Comparison, other: &Scalar, claims: &[ClaimValue]) -> IndexKeys {
    let is_text = [one, other].iter().any(|side| matches!(side, Scalar::ColumnText(_)));
    let (column, comparison, other) = match (one, other) {
        (Scalar::Column(column) | Scalar::ColumnText(column), _) => (*column, comparison, other),
        (_, Scalar::Column(column) | Scalar::ColumnText(column)) => (*column, comparison.mirrored(), one),
        (Scalar::Claim(one), Scalar::Claim(other)) => {
            // Claims alone: the same result for every row.
            return match (claims.get(*one), claims.get(*other)) {
                (Some(ClaimValue::One(one)), Some(ClaimValue::One(other)))
                    if comparison == Comparison::Equal && one != other =>
                {
                    IndexKeys::NEVER
                }
                (Some(ClaimValue::Null | ClaimValue::Error), _)
                | (_, Some(ClaimValue::Null | ClaimValue::Error)) => IndexKeys::NEVER,
                _ => IndexKeys::Any,
            };
        }
        _ => return IndexKeys::Any,
    };
    let Scalar::Claim(claim) = other else { return IndexKeys::Any };
    let datum = match claims.get(*claim) {
        Some(ClaimValue::One(datum)) => datum,
        Some(ClaimValue::Null | ClaimValue::Error) => return IndexKeys::NEVER,
        _ => return IndexKeys::Any,
    };
    if is_text {
        let Datum::Text(text) = datum else { return IndexKeys::Any };
        let equal = |datum| IndexKey::equal(column, datum);
        return match comparison {
            Comparison::Equal => IndexKeys::OneOf(values_with_text(text).into_iter().map(equal).collect()),
            _ => IndexKeys::Any,
        };
    }
    let range = |first: Option<i64>, last: Option<i64>| match (first, last) {
        (Some(first), Some(last)) => IndexKeys::OneOf(vec![IndexKey::range(column, first, last)]),
        _ => IndexKeys::NEVER,
    };
    match (comparison, datum) {
        (Comparison::Equal, datum) => IndexKeys::OneOf(vec![IndexKey::equal(column, datum.clone())]),
        (Comparison::Less, Datum::Int(value)) => range(Some(i64::MIN), value.checked_sub(1)),
        (Comparison::LessOrEqual, Datum::Int(value)) => range(Some(i64::MIN), Some(*value)),
        (Comparison::Greater, Datum::Int(value)) => range(value.checked_add(1), Some(i64::MAX)),
        (Comparison::GreaterOrEqual, Datum::Int(value)) => range(Some(*value), Some(i64::MAX)),
        _ => IndexKeys::Any,
    }
}

/// Returns the column values whose cast to text gives this text.
fn values_with_text(text: &str) -> Vec<Datum> {
    let kinds = [Kind::Uuid, Kind::Bool].into_iter().filter_map(|kind| match kind.read(text) {
        Read::Value(datum) => Some(datum),
        Read::Error | Read::Undecided => None,
    });
    let number = text.parse().ok().map(Datum::Int);
    std::iter::once(Datum::Text(text.into())).chain(kinds).chain(number).collect()
}
