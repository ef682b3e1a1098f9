//! Conditions over a row image and somebody's claims, with SQL's three truth values and its errors.
//!
//! What cannot be told here is [`Truth::Undecided`], never a guess; then PostgreSQL is asked. Operands are looked at from
//! left to right, as PostgreSQL does: what raises before something decides, denies.

use crate::model::policy::claim_expr::ClaimValue;
pub use crate::model::policy::scalar::{List, Scalar};
use crate::model::row::datum::{Datum, Kind};
use crate::model::row::image::{ColumnValue, Image};
use crate::model::row::pattern::Pattern;
use crate::model::row::truth::Truth;

/// A condition. Numbers of columns are places in the relation's list, those of terms and leaves places in the plan's.
#[derive(Debug, Clone, PartialEq)]
pub enum Predicate {
    /// Always the same; none is null.
    Constant(Option<bool>),
    /// A boolean value.
    Truth(Scalar),
    /// A comparison; null when either side is.
    Compare(Scalar, Comparison, Scalar),
    /// `is not distinct from`
    Same(Scalar, Scalar),
    /// `= any`: equal to one of a list.
    Among(Scalar, List),
    /// `like` or `ilike` of a column; null when the column is.
    Matches(usize, Pattern),
    /// `is null`
    IsNull(Scalar),
    /// `is true` or `is false`: never null.
    Is(Box<Predicate>, bool),
    /// `is unknown`
    IsUnknown(Box<Predicate>),
    /// `not`
    Not(Box<Predicate>),
    /// All of them.
    And(Vec<Predicate>),
    /// One of them.
    Or(Vec<Predicate>),
    /// `case when … then … else …`
    Case(Vec<(Predicate, Predicate)>, Box<Predicate>),
    /// Depends on the row and not on who reads it; PostgreSQL tells once for all. The number of a leaf.
    Fact(usize),
    /// Holds for certain readers, whom PostgreSQL names.
    Readers {
        /// The number of a leaf.
        query: usize,
        /// The terms by which it knows readers.
        by: Vec<usize>,
    },
    /// Only PostgreSQL can tell, for one reader at a time.
    Opaque,
    /// The condition itself is not known yet.
    Pending,
}

/// How two values compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

/// What PostgreSQL said of a leaf for one image.
pub trait Answers {
    /// A [`Predicate::Fact`].
    fn fact(&self, query: usize) -> Truth;
    /// A [`Predicate::Readers`], for the reader at hand.
    fn reads(&self, query: usize) -> Truth;
}

/// Nobody was asked.
pub struct NoAnswers;

impl Answers for NoAnswers {
    fn fact(&self, _: usize) -> Truth {
        Truth::Undecided
    }

    fn reads(&self, _: usize) -> Truth {
        Truth::Undecided
    }
}

impl Comparison {
    /// With the sides exchanged.
    pub fn mirrored(self) -> Self {
        match self {
            Self::Less => Self::Greater,
            Self::LessOrEqual => Self::GreaterOrEqual,
            Self::Greater => Self::Less,
            Self::GreaterOrEqual => Self::LessOrEqual,
            same => same,
        }
    }

    fn holds(self, one: &Datum, other: &Datum) -> bool {
        match self {
            Self::Equal => one == other,
            Self::NotEqual => one != other,
            Self::Less => one < other,
            Self::LessOrEqual => one <= other,
            Self::Greater => one > other,
            Self::GreaterOrEqual => one >= other,
        }
    }

    /// Whether values of the kind compare so here.
    pub fn is_known_for(self, kind: Kind) -> bool {
        matches!(self, Self::Equal | Self::NotEqual) || kind.is_ordered()
    }
}

impl Predicate {
    /// What it comes to for this image, these terms and these answers.
    ///
    /// `lenient`: nothing stands around it but `and`, so only true counts, and what is behind something unsure may still make
    /// it false. Elsewhere an error and false differ.
    pub fn truth(
        &self,
        image: &Image<'_>,
        claims: &[ClaimValue],
        answers: &dyn Answers,
        lenient: bool,
    ) -> Truth {
        let truth = |predicate: &Self, lenient| predicate.truth(image, claims, answers, lenient);
        match self {
            Self::Constant(value) => (*value).into(),
            Self::Truth(scalar) => match scalar.value(image, claims) {
                Ok(ColumnValue::One(Datum::Bool(value))) => value.into(),
                Ok(ColumnValue::Null) => Truth::Null,
                Ok(_) => Truth::Undecided,
                Err(stop) => stop,
            },
            Self::Compare(one, comparison, other) => {
                match (one.value(image, claims), other.value(image, claims)) {
                    (Err(stop), _) | (Ok(_), Err(stop)) => stop,
                    (Ok(ColumnValue::Null), Ok(_)) | (Ok(_), Ok(ColumnValue::Null)) => Truth::Null,
                    (Ok(ColumnValue::One(one)), Ok(ColumnValue::One(other))) => {
                        comparison.holds(&one, &other).into()
                    }
                    _ => Truth::Undecided,
                }
            }
            Self::Same(one, other) => match (one.value(image, claims), other.value(image, claims)) {
                (Err(stop), _) | (Ok(_), Err(stop)) => stop,
                (Ok(ColumnValue::Foreign | ColumnValue::Padded(_) | ColumnValue::Many(_)), Ok(_))
                | (Ok(_), Ok(ColumnValue::Foreign | ColumnValue::Padded(_) | ColumnValue::Many(_))) => {
                    Truth::Undecided
                }
                (Ok(one), Ok(other)) => (one == other).into(),
            },
            Self::Among(scalar, list) => match scalar.value(image, claims) {
                Err(stop) => stop,
                Ok(held) => list.holds(&held, image, claims),
            },
            Self::Matches(column, pattern) => match image.value(*column) {
                ColumnValue::Null => Truth::Null,
                ColumnValue::One(Datum::Text(text)) | ColumnValue::Padded(text) => pattern.matches(text),
                ColumnValue::Missing => Truth::Error,
                _ => Truth::Undecided,
            },
            Self::IsNull(scalar) => match scalar.value(image, claims) {
                Ok(held) => (held == ColumnValue::Null).into(),
                Err(stop) => stop,
            },
            Self::Is(inner, wanted) => match truth(inner, false) {
                Truth::Null => Truth::False,
                found @ (Truth::True | Truth::False) => ((found == Truth::True) == *wanted).into(),
                stop => stop,
            },
            Self::IsUnknown(inner) => match truth(inner, false) {
                found @ (Truth::True | Truth::False | Truth::Null) => (found == Truth::Null).into(),
                stop => stop,
            },
            Self::Not(inner) => match truth(inner, false) {
                Truth::True => Truth::False,
                Truth::False => Truth::True,
                other => other,
            },
            Self::And(all) => {
                let mut whole = Truth::True;
                for one in all {
                    match (whole, truth(one, lenient)) {
                        (Truth::True | Truth::Null, stop @ (Truth::False | Truth::Error)) => return stop,
                        (Truth::Undecided | Truth::TimedOut, Truth::False | Truth::Null | Truth::Error)
                            if lenient =>
                        {
                            return Truth::False;
                        }
                        (Truth::Null, Truth::Undecided | Truth::TimedOut) if lenient => return Truth::Null,
                        (Truth::True, found) => whole = found,
                        (Truth::Null, found @ (Truth::Undecided | Truth::TimedOut)) => whole = found,
                        (Truth::Undecided, Truth::TimedOut) => whole = Truth::TimedOut,
                        _ => {}
                    }
                }
                whole
            }
            Self::Or(all) => {
                let mut whole = Truth::False;
                for one in all {
                    match (whole, truth(one, false)) {
                        (Truth::False | Truth::Null, stop @ (Truth::True | Truth::Error)) => return stop,
                        (Truth::False, found) => whole = found,
                        (Truth::Null, found @ (Truth::Undecided | Truth::TimedOut)) => whole = found,
                        (Truth::Undecided, Truth::TimedOut) => whole = Truth::TimedOut,
                        _ => {}
                    }
                }
                whole
            }
            Self::Case(branches, otherwise) => {
                for (condition, result) in branches {
                    match truth(condition, false) {
                        Truth::True => return truth(result, lenient),
                        Truth::False | Truth::Null => {}
                        stop => return stop,
                    }
                }
                truth(otherwise, lenient)
            }
            Self::Fact(query) => answers.fact(*query),
            Self::Readers { query, by } => match known_by(by, claims) {
                Some(true) => answers.reads(*query),
                Some(false) => Truth::False,
                // It may raise, or find nothing to compare the claim with.
                None => Truth::Undecided,
            },
            Self::Opaque => Truth::Undecided,
            Self::Pending => Truth::TimedOut,
        }
    }
}

impl Predicate {
    /// Whether it may be that only PostgreSQL knows what it comes to for an image, whatever the terms are.
    pub fn needs_postgres(&self) -> bool {
        match self {
            Self::Fact(_) | Self::Readers { .. } | Self::Opaque => true,
            Self::Matches(_, pattern) => !pattern.is_exact(),
            Self::Is(inner, _) | Self::IsUnknown(inner) | Self::Not(inner) => inner.needs_postgres(),
            Self::And(all) | Self::Or(all) => all.iter().any(Self::needs_postgres),
            Self::Case(branches, otherwise) => {
                branches
                    .iter()
                    .any(|(condition, result)| condition.needs_postgres() || result.needs_postgres())
                    || otherwise.needs_postgres()
            }
            _ => false,
        }
    }
}

/// Whether PostgreSQL can name a reader with such terms: each is compared by `=`, so null finds nothing. None when it
/// has to be asked.
pub(super) fn known_by(by: &[usize], claims: &[ClaimValue]) -> Option<bool> {
    let mut is_known = true;
    for claim in by {
        match claims.get(*claim) {
            Some(ClaimValue::One(datum)) if datum.is_short() => {}
            Some(ClaimValue::Null) => is_known = false,
            Some(_) | None => return None,
        }
    }
    Some(is_known)
}
