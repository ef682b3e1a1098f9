//! Under which values of a row a condition can hold at all: what the filter index keeps subscriptions under.

use std::sync::Arc;

use crate::model::policy::claim_expr::TermValue;
use crate::model::policy::predicate::{Comparison, List, Predicate, Scalar, known_by};
use crate::model::row::datum::{Datum, Kind, Read};

/// A condition that is necessary for another: the row has these values.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Anchor {
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
pub enum Anchors {
    /// Nothing that is known: any row may fulfil it.
    Any,
    /// At least one of these; none at all means that no row fulfils it.
    OneOf(Vec<Anchor>),
}

/// Terms of one anchor: each further one costs a look-up per change and makes the index larger.
const MOST_TERMS: usize = 3;
/// Anchors of one subscription. More than that, and one side of an `and` has to do.
const MOST_ANCHORS: usize = 256;

impl Anchor {
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
        for term in &other.equal {
            // Two values of one column: impossible, or an array that has both. Keeping one is right for either.
            if both.equal.len() < MOST_TERMS && !both.equal.iter().any(|(column, _)| *column == term.0) {
                both.equal.push(term.clone());
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

impl Anchors {
    const NEVER: Self = Self::OneOf(Vec::new());

    /// What is necessary for both.
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Any, anchors) | (anchors, Self::Any) => anchors,
            (Self::OneOf(some), Self::OneOf(others)) => match some.len() * others.len() {
                count if count > MOST_ANCHORS => {
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
            (Self::OneOf(mut some), Self::OneOf(others)) if some.len() + others.len() <= MOST_ANCHORS => {
                some.extend(others);
                Self::OneOf(some)
            }
            (anchors, Self::OneOf(none)) | (Self::OneOf(none), anchors) if none.is_empty() => anchors,
            _ => Self::Any,
        }
    }
}

impl Predicate {
    /// What a row must have for this to be true, given what the terms come to.
    pub fn anchors(&self, terms: &[TermValue]) -> Anchors {
        match self {
            Self::Constant(value) => {
                if *value == Some(true) {
                    Anchors::Any
                } else {
                    Anchors::NEVER
                }
            }
            Self::Truth(scalar) => match scalar {
                Scalar::Column(column) => Anchors::OneOf(vec![Anchor::equal(*column, Datum::Bool(true))]),
                Scalar::Term(term) => match terms.get(*term) {
                    Some(TermValue::One(Datum::Bool(true)) | TermValue::Unsure) | None => Anchors::Any,
                    Some(_) => Anchors::NEVER,
                },
                Scalar::ColumnText(_) | Scalar::Coalesce(_) => Anchors::Any,
            },
            Self::Compare(one, comparison, other) => compared(one, *comparison, other, terms),
            Self::Among(scalar, List::Of(scalars)) => scalars
                .iter()
                .map(|other| compared(scalar, Comparison::Equal, other, terms))
                .fold(Anchors::NEVER, Anchors::or),
            Self::Among(scalar, List::Term(term) | List::Keys(term)) => match (scalar, terms.get(*term)) {
                (Scalar::Column(column), Some(TermValue::List(list))) if list.len() <= MOST_ANCHORS => {
                    Anchors::OneOf(list.iter().map(|datum| Anchor::equal(*column, datum.clone())).collect())
                }
                (_, Some(TermValue::Null | TermValue::Raises)) => Anchors::NEVER,
                _ => Anchors::Any,
            },
            Self::Among(Scalar::Term(term), List::Column(column)) => match terms.get(*term) {
                Some(TermValue::One(datum)) => Anchors::OneOf(vec![Anchor::equal(*column, datum.clone())]),
                Some(TermValue::Null | TermValue::Raises) => Anchors::NEVER,
                _ => Anchors::Any,
            },
            Self::And(all) => all.iter().map(|one| one.anchors(terms)).fold(Anchors::Any, Anchors::and),
            Self::Or(all) => all.iter().map(|one| one.anchors(terms)).fold(Anchors::NEVER, Anchors::or),
            Self::Readers { by, .. } => match known_by(by, terms) {
                Some(true) => Anchors::OneOf(vec![Anchor { named: true, ..Anchor::default() }]),
                Some(false) => Anchors::NEVER,
                None => Anchors::Any,
            },
            Self::Matches(column, pattern) => match pattern.prefix() {
                "" => Anchors::Any,
                prefix => Anchors::OneOf(vec![Anchor::prefix(*column, prefix)]),
            },
            Self::Is(inner, true) => inner.anchors(terms),
            Self::Among(..)
            | Self::Same(..)
            | Self::IsNull(_)
            | Self::Is(_, false)
            | Self::IsUnknown(_)
            | Self::Not(_)
            | Self::Case(..)
            | Self::Fact(_)
            | Self::Opaque
            | Self::Pending => Anchors::Any,
        }
    }
}

fn compared(one: &Scalar, comparison: Comparison, other: &Scalar, terms: &[TermValue]) -> Anchors {
    let is_text = [one, other].iter().any(|side| matches!(side, Scalar::ColumnText(_)));
    let (column, comparison, other) = match (one, other) {
        (Scalar::Column(column) | Scalar::ColumnText(column), _) => (*column, comparison, other),
        (_, Scalar::Column(column) | Scalar::ColumnText(column)) => (*column, comparison.mirrored(), one),
        (Scalar::Term(one), Scalar::Term(other)) => {
            // Of claims alone: the same for every row.
            return match (terms.get(*one), terms.get(*other)) {
                (Some(TermValue::One(one)), Some(TermValue::One(other)))
                    if comparison == Comparison::Equal && one != other =>
                {
                    Anchors::NEVER
                }
                (Some(TermValue::Null | TermValue::Raises), _)
                | (_, Some(TermValue::Null | TermValue::Raises)) => Anchors::NEVER,
                _ => Anchors::Any,
            };
        }
        _ => return Anchors::Any,
    };
    let Scalar::Term(term) = other else { return Anchors::Any };
    let datum = match terms.get(*term) {
        Some(TermValue::One(datum)) => datum,
        Some(TermValue::Null | TermValue::Raises) => return Anchors::NEVER,
        _ => return Anchors::Any,
    };
    if is_text {
        let Datum::Text(text) = datum else { return Anchors::Any };
        let written = |datum| Anchor::equal(column, datum);
        return match comparison {
            Comparison::Equal => Anchors::OneOf(written_so(text).into_iter().map(written).collect()),
            _ => Anchors::Any,
        };
    }
    let range = |first: Option<i64>, last: Option<i64>| match (first, last) {
        (Some(first), Some(last)) => Anchors::OneOf(vec![Anchor::range(column, first, last)]),
        _ => Anchors::NEVER,
    };
    match (comparison, datum) {
        (Comparison::Equal, datum) => Anchors::OneOf(vec![Anchor::equal(column, datum.clone())]),
        (Comparison::Less, Datum::Int(value)) => range(Some(i64::MIN), value.checked_sub(1)),
        (Comparison::LessOrEqual, Datum::Int(value)) => range(Some(i64::MIN), Some(*value)),
        (Comparison::Greater, Datum::Int(value)) => range(value.checked_add(1), Some(i64::MAX)),
        (Comparison::GreaterOrEqual, Datum::Int(value)) => range(Some(*value), Some(i64::MAX)),
        _ => Anchors::Any,
    }
}

/// What a column may hold whose cast to text gives this.
fn written_so(text: &str) -> Vec<Datum> {
    let kinds = [Kind::Uuid, Kind::Bool].into_iter().filter_map(|kind| match kind.read(text) {
        Read::Value(datum) => Some(datum),
        Read::Raises | Read::Unsure => None,
    });
    let number = text.parse().ok().map(Datum::Int);
    std::iter::once(Datum::Text(text.into())).chain(kinds).chain(number).collect()
}
