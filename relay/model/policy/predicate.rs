//! Conditions over a row image and claims, with SQL's three truth values and its errors.
//!
//! What the relay cannot decide is [`Truth::Undecided`], never a guess; PostgreSQL evaluates it then. Operands are evaluated from
//! left to right, as in PostgreSQL: an error before the deciding operand denies.

use crate::model::policy::claim_expr::ClaimValue;
pub use crate::model::policy::scalar::{List, Scalar};
use crate::model::row::datum::{Datum, Kind};
use crate::model::row::image::{ColumnValue, Image};
use crate::model::row::pattern::Pattern;
use crate::model::row::truth::Truth;

/// A condition. Columns are indexes into the relation's list; claims and queries are indexes into the plan's lists.
#[derive(Debug, Clone, PartialEq)]
pub enum Predicate {
    /// A constant; `None` is null.
    Constant(Option<bool>),
    /// A boolean value.
    Truth(Scalar),
    /// A comparison; null when either side is null.
    Compare(Scalar, Comparison, Scalar),
    /// `is not distinct from`
    Same(Scalar, Scalar),
    /// `= any`: equal to an element of a list.
    Among(Scalar, List),
    /// `&&` or `@>` of lists; null when one of them is null.
    Lists(List, ListRelation, List),
    /// `like` or `ilike` of a column; null when the column is null.
    Matches(usize, Pattern),
    /// `like` of a column and a pattern in a claim.
    MatchesClaim(usize, usize),
    /// `is null`
    IsNull(Scalar),
    /// `is true` or `is false`: never null.
    Is(Box<Predicate>, bool),
    /// `is unknown`
    IsUnknown(Box<Predicate>),
    /// `not`
    Not(Box<Predicate>),
    /// `and`
    And(Vec<Predicate>),
    /// `or`
    Or(Vec<Predicate>),
    /// `case when … then … else …`
    Case(Vec<(Predicate, Predicate)>, Box<Predicate>),
    /// A query whose result depends on the row and not on the reader.
    Fact(usize),
    /// True for the readers that PostgreSQL names.
    Readers {
        /// The query.
        query: usize,
        /// The claims that identify a reader.
        by: Vec<usize>,
    },
    /// Only PostgreSQL can evaluate it, for one identity at a time.
    Opaque,
    /// The condition is not known yet.
    Pending,
}

/// A relation of two lists. A null in a list equals nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListRelation {
    /// They have an element in common.
    Overlap,
    /// The first has all elements of the second.
    Contains,
}

/// A comparison of two values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "named for the operators")]
pub enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

/// PostgreSQL's answers to the queries of a plan, for one image.
pub trait Answers {
    /// Returns the answer to a [`Predicate::Fact`].
    fn fact(&self, query: usize) -> Truth;
    /// Returns the answer to a [`Predicate::Readers`], for the reader being evaluated.
    fn reads(&self, query: usize) -> Truth;
}

/// No answers: every query is undecided.
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
    /// Returns the comparison with the sides exchanged.
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

    /// Whether the relay knows this comparison for values of the kind.
    pub fn is_known_for(self, kind: Kind) -> bool {
        matches!(self, Self::Equal | Self::NotEqual) || kind.is_ordered()
    }
}

impl ListRelation {
    fn holds(self, one: &[Option<Datum>], other: &[Option<Datum>]) -> bool {
        let is_in_one = |datum: &Option<Datum>| datum.is_some() && one.contains(datum);
        match self {
            Self::Overlap => other.iter().any(is_in_one),
            Self::Contains => other.iter().all(is_in_one),
        }
    }
}

impl Predicate {
    /// Evaluates the condition for this image, these claim values and these answers.
    ///
    /// `lenient`: only `and` surrounds the condition, so only true counts, and an operand after an undecided one may still make
    /// it false. Otherwise an error and false differ.
    pub fn truth(
        &self,
        image: &Image<'_>,
        claims: &[ClaimValue],
        answers: &dyn Answers,
        lenient: bool,
    ) -> Truth {
        let truth = |predicate: &Self, lenient| predicate.truth(image, claims, answers, lenient);
        // A short arm for each kind of condition: read together, they are the semantics.
        match self {
            Self::Constant(value) => (*value).into(),
            Self::Truth(scalar) => of_value(scalar.value(image, claims), |value| match value {
                ColumnValue::One(Datum::Bool(value)) => value.into(),
                ColumnValue::Null => Truth::Null,
                _ => Truth::Undecided,
            }),
            Self::Compare(one, comparison, other) => {
                of_values([one, other].map(|scalar| scalar.value(image, claims)), |values| match values {
                    [ColumnValue::Null, _] | [_, ColumnValue::Null] => Truth::Null,
                    [ColumnValue::One(one), ColumnValue::One(other)] => comparison.holds(&one, &other).into(),
                    _ => Truth::Undecided,
                })
            }
            Self::Same(one, other) => {
                of_values([one, other].map(|scalar| scalar.value(image, claims)), |values| match values {
                    [ColumnValue::Foreign | ColumnValue::Padded(_) | ColumnValue::Many(_), _]
                    | [_, ColumnValue::Foreign | ColumnValue::Padded(_) | ColumnValue::Many(_)] => {
                        Truth::Undecided
                    }
                    [one, other] => (one == other).into(),
                })
            }
            Self::Among(scalar, list) => {
                of_value(scalar.value(image, claims), |value| list.contains(&value, image, claims))
            }
            Self::Matches(column, pattern) => match image.value(*column) {
                ColumnValue::Null => Truth::Null,
                ColumnValue::One(Datum::Text(text)) | ColumnValue::Padded(text) => pattern.matches(text),
                ColumnValue::Missing => Truth::Error,
                _ => Truth::Undecided,
            },
            Self::MatchesClaim(column, pattern) => {
                matches_pattern(image.value(*column), Scalar::Claim(*pattern).value(image, claims))
            }
            Self::Lists(one, relation, other) => {
                match (one.elements(image, claims), other.elements(image, claims)) {
                    (Err(result), _) | (Ok(_), Err(result)) => result,
                    (Ok(one), Ok(other)) => relation.holds(&one, &other).into(),
                }
            }
            Self::IsNull(scalar) => {
                of_value(scalar.value(image, claims), |value| (value == ColumnValue::Null).into())
            }
            Self::Is(inner, wanted) => {
                let wanted = if *wanted { Truth::True } else { Truth::False };
                decided_as(truth(inner, false), wanted)
            }
            Self::IsUnknown(inner) => decided_as(truth(inner, false), Truth::Null),
            Self::Not(inner) => match truth(inner, false) {
                Truth::True => Truth::False,
                Truth::False => Truth::True,
                other => other,
            },
            Self::And(operands) => Self::all(operands, |operand| truth(operand, lenient), lenient),
            Self::Or(operands) => Self::any(operands, |operand| truth(operand, false)),
            Self::Case(branches, otherwise) => Self::case(branches, otherwise, truth, lenient),
            Self::Fact(query) => answers.fact(*query),
            Self::Readers { query, by } => match identifies_reader(by, claims) {
                Some(true) => answers.reads(*query),
                Some(false) => Truth::False,
                // The query may raise, or have no value to compare the claim with.
                None => Truth::Undecided,
            },
            Self::Opaque => Truth::Undecided,
            Self::Pending => Truth::TimedOut,
        }
    }

    /// Evaluates `case`. `lenient`: see [`Predicate::truth`].
    fn case(
        branches: &[(Self, Self)],
        otherwise: &Self,
        truth: impl Fn(&Self, bool) -> Truth,
        lenient: bool,
    ) -> Truth {
        for (condition, result) in branches {
            match truth(condition, false) {
                Truth::True => return truth(result, lenient),
                Truth::False | Truth::Null => {}
                other => return other,
            }
        }
        truth(otherwise, lenient)
    }

    /// Evaluates `and`. `lenient`: see [`Predicate::truth`].
    fn all(operands: &[Self], truth: impl Fn(&Self) -> Truth, lenient: bool) -> Truth {
        let mut result = Truth::True;
        for operand in operands {
            match (result, truth(operand)) {
                (Truth::True | Truth::Null, decided @ (Truth::False | Truth::Error)) => return decided,
                (Truth::Undecided | Truth::TimedOut, Truth::False | Truth::Null | Truth::Error)
                    if lenient =>
                {
                    return Truth::False;
                }
                (Truth::Null, Truth::Undecided | Truth::TimedOut) if lenient => return Truth::Null,
                (Truth::True, found) => result = found,
                (Truth::Null, found @ (Truth::Undecided | Truth::TimedOut)) => result = found,
                (Truth::Undecided, Truth::TimedOut) => result = Truth::TimedOut,
                _ => {}
            }
        }
        result
    }

    /// Evaluates `or`.
    fn any(operands: &[Self], truth: impl Fn(&Self) -> Truth) -> Truth {
        let mut result = Truth::False;
        for operand in operands {
            match (result, truth(operand)) {
                (Truth::False | Truth::Null, decided @ (Truth::True | Truth::Error)) => return decided,
                (Truth::False, found) => result = found,
                (Truth::Null, found @ (Truth::Undecided | Truth::TimedOut)) => result = found,
                (Truth::Undecided, Truth::TimedOut) => result = Truth::TimedOut,
                _ => {}
            }
        }
        result
    }
}

/// Decides by a value, unless it could not be evaluated.
fn of_value(value: Result<ColumnValue, Truth>, decide: impl FnOnce(ColumnValue) -> Truth) -> Truth {
    value.map_or_else(|failure| failure, decide)
}

/// Decides by two values. The first failure decides if one could not be evaluated.
fn of_values(
    values: [Result<ColumnValue, Truth>; 2],
    decide: impl FnOnce([ColumnValue; 2]) -> Truth,
) -> Truth {
    let [one, other] = values;
    of_value(one, |one| of_value(other, |other| decide([one, other])))
}

/// Returns whether a condition was decided as `wanted`, if it was decided at all.
fn decided_as(found: Truth, wanted: Truth) -> Truth {
    match found {
        Truth::True | Truth::False | Truth::Null => (found == wanted).into(),
        undecided => undecided,
    }
}

impl Predicate {
    /// Whether evaluation may need PostgreSQL for some image, whatever the claims are.
    pub fn needs_postgres(&self) -> bool {
        match self {
            Self::Fact(_) | Self::Readers { .. } | Self::Opaque | Self::MatchesClaim(..) => true,
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

/// Evaluates `like` of a column and the pattern in a claim.
fn matches_pattern(column: &ColumnValue, pattern: Result<ColumnValue, Truth>) -> Truth {
    match (column, pattern) {
        (ColumnValue::Missing, _) => Truth::Error,
        (_, Err(result)) => result,
        (ColumnValue::Null, _) | (_, Ok(ColumnValue::Null)) => Truth::Null,
        (ColumnValue::One(Datum::Text(text)), Ok(ColumnValue::One(Datum::Text(pattern)))) => {
            Pattern::new(&pattern, None).map_or(Truth::Undecided, |pattern| pattern.matches(text))
        }
        _ => Truth::Undecided,
    }
}

/// Whether PostgreSQL can name a reader with such claims: each is compared by `=`, so null matches nothing. `None` when the query
/// is undecided for the reader.
pub(super) fn identifies_reader(by: &[usize], claims: &[ClaimValue]) -> Option<bool> {
    let mut can_match = true;
    for claim in by {
        match claims.get(*claim) {
            Some(ClaimValue::One(datum)) if datum.is_short() => {}
            Some(ClaimValue::Null) => can_match = false,
            Some(_) | None => return None,
        }
    }
    Some(can_match)
}
