//! Under which values of a row a condition can hold at all: what the filter index keeps subscriptions under.

use std::sync::Arc;

use crate::model::policy::claim_expr::ClaimValue;
use crate::model::policy::predicate::{Comparison, List, Predicate, Scalar, known_by};
use crate::model::row::datum::{Datum, Kind, Read};

/// A condition that is necessary for another: the row has these values.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct IndexKey {
    /// Columns and values, in order of the columns. An array column has the value among its elements.
    pub equal: Vec<(usize, Datum)>,
    /// A column whose number lies in a range.
    pub range: Option<(usize, Range)>,
    /// A column whose text begins with this; it is short.
    pub prefix: Option<(usize, Arc<str>)>,
    /// PostgreSQL names the readers of the row.
    pub named: bool,
}

/// Numbers from the first to the last, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Range {
    /// The least.
    pub first: i64,
    /// The greatest.
    pub last: i64,
}

/// What is necessary for a condition to hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IndexKeys {
    /// Nothing that is known: any row may fulfil it.
    Any,
    /// At least one of these; none at all means that no row fulfils it.
    OneOf(Vec<IndexKey>),
}

/// Terms of one key: each further one costs a look-up per change and makes the index larger.
const MAX_COLUMNS: usize = 3;
/// Anchors of one subscription. More than that, and one side of an `and` has to do.
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

    /// Both at once.
    fn and(&self, other: &Self) -> Self {
        let mut both = self.clone();
        both.named |= other.named;
        for pair in &other.equal {
            // Two values of one column: impossible, or an array that has both. Keeping one is right for either.
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

    /// What is necessary for both.
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

    /// What is necessary for one of them.
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
    /// What a row must have for this to be true, given what the terms come to.
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
            Self::Compare(one, comparison, other) => compared(one, *comparison, other, claims),
            Self::Among(scalar, List::Of(scalars)) => scalars
                .iter()
                .map(|other| compared(scalar, Comparison::Equal, other, claims))
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
            Self::And(all) => {
                all.iter().map(|one| one.index_keys(claims)).fold(IndexKeys::Any, IndexKeys::and)
            }
            Self::Or(all) => {
                all.iter().map(|one| one.index_keys(claims)).fold(IndexKeys::NEVER, IndexKeys::or)
            }
            Self::Readers { by, .. } => match known_by(by, claims) {
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

fn compared(one: &Scalar, comparison: Comparison, other: &Scalar, claims: &[ClaimValue]) -> IndexKeys {
    let is_text = [one, other].iter().any(|side| matches!(side, Scalar::ColumnText(_)));
    let (column, comparison, other) = match (one, other) {
        (Scalar::Column(column) | Scalar::ColumnText(column), _) => (*column, comparison, other),
        (_, Scalar::Column(column) | Scalar::ColumnText(column)) => (*column, comparison.mirrored(), one),
        (Scalar::Claim(one), Scalar::Claim(other)) => {
            // Of claims alone: the same for every row.
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
        let written = |datum| IndexKey::equal(column, datum);
        return match comparison {
            Comparison::Equal => IndexKeys::OneOf(written_so(text).into_iter().map(written).collect()),
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

/// What a column may hold whose cast to text gives this.
fn written_so(text: &str) -> Vec<Datum> {
    let kinds = [Kind::Uuid, Kind::Bool].into_iter().filter_map(|kind| match kind.read(text) {
        Read::Value(datum) => Some(datum),
        Read::Error | Read::Undecided => None,
    });
    let number = text.parse().ok().map(Datum::Int);
    std::iter::once(Datum::Text(text.into())).chain(kinds).chain(number).collect()
}
