//! What conditions compare: values of a row image and of somebody's claims, and lists of them.

use crate::model::policy::claim_expr::ClaimValue;
use crate::model::row::datum::Datum;
use crate::model::row::image::{ColumnValue, Image};
use crate::model::row::truth::Truth;

/// A value of the row or of the claims.
#[derive(Debug, Clone, PartialEq)]
pub enum Scalar {
    /// A column.
    Column(usize),
    /// A column cast to text.
    ColumnText(usize),
    /// A term.
    Term(usize),
    /// The first that is not null.
    Coalesce(Vec<Scalar>),
}

/// What a value can be among.
#[derive(Debug, Clone, PartialEq)]
pub enum List {
    /// These values.
    Of(Vec<Scalar>),
    /// A term that is a list.
    Term(usize),
    /// A term that is a list of keys; null is neither among them nor not, even if there are none.
    Keys(usize),
    /// An array column.
    Column(usize),
}

impl Scalar {
    pub(super) fn raises(&self, terms: &[ClaimValue]) -> bool {
        match self {
            Self::Column(_) | Self::ColumnText(_) => false,
            Self::Term(term) => terms.get(*term) == Some(&ClaimValue::Raises),
            Self::Coalesce(scalars) => scalars.iter().any(|scalar| scalar.raises(terms)),
        }
    }

    pub(super) fn is_of_claims(&self) -> bool {
        match self {
            Self::Column(_) | Self::ColumnText(_) => false,
            Self::Term(_) => true,
            Self::Coalesce(scalars) => scalars.iter().all(Self::is_of_claims),
        }
    }

    /// Its value, or why there is none.
    pub(super) fn held(&self, image: &Image<'_>, terms: &[ClaimValue]) -> Result<ColumnValue, Truth> {
        match self {
            Self::Column(column) => match image.held(*column) {
                // A rule cannot be read as if what is missing were null.
                ColumnValue::Missing => Err(Truth::Error),
                held => Ok(held.clone()),
            },
            Self::ColumnText(column) => match image.held(*column) {
                ColumnValue::Missing => Err(Truth::Error),
                ColumnValue::Null => Ok(ColumnValue::Null),
                ColumnValue::One(datum) => Ok(ColumnValue::One(Datum::Text(datum.to_text()))),
                _ => Err(Truth::Undecided),
            },
            Self::Term(term) => match terms.get(*term) {
                Some(ClaimValue::Null) => Ok(ColumnValue::Null),
                Some(ClaimValue::One(datum)) => Ok(ColumnValue::One(datum.clone())),
                Some(ClaimValue::Raises) => Err(Truth::Error),
                Some(ClaimValue::List(_) | ClaimValue::Unsure) | None => Err(Truth::Undecided),
            },
            Self::Coalesce(scalars) => {
                for scalar in scalars {
                    match scalar.held(image, terms)? {
                        ColumnValue::Null => {}
                        held => return Ok(held),
                    }
                }
                Ok(ColumnValue::Null)
            }
        }
    }
}

impl List {
    /// `value = any (list)`
    pub(super) fn holds(&self, value: &ColumnValue, image: &Image<'_>, terms: &[ClaimValue]) -> Truth {
        let elements: Vec<Option<Datum>> = match self {
            Self::Of(scalars) => {
                let mut elements = Vec::with_capacity(scalars.len());
                for scalar in scalars {
                    match scalar.held(image, terms) {
                        Ok(ColumnValue::Null) => elements.push(None),
                        Ok(ColumnValue::One(datum)) => elements.push(Some(datum)),
                        Ok(_) => return Truth::Undecided,
                        Err(stop) => return stop,
                    }
                }
                elements
            }
            Self::Term(term) | Self::Keys(term) => match terms.get(*term) {
                Some(ClaimValue::List(list)) => {
                    return match value {
                        _ if list.is_empty() && matches!(self, Self::Term(_)) => Truth::False,
                        ColumnValue::Null => Truth::Null,
                        ColumnValue::One(value) => list.contains(value).into(),
                        _ => Truth::Undecided,
                    };
                }
                Some(ClaimValue::Null) => return Truth::Null,
                Some(ClaimValue::Raises) => return Truth::Error,
                _ => return Truth::Undecided,
            },
            Self::Column(column) => match image.held(*column) {
                ColumnValue::Many(elements) => elements.clone(),
                ColumnValue::Null => return Truth::Null,
                ColumnValue::Missing => return Truth::Error,
                _ => return Truth::Undecided,
            },
        };
        match value {
            _ if elements.is_empty() => Truth::False,
            ColumnValue::Null => Truth::Null,
            ColumnValue::One(value) if elements.iter().flatten().any(|element| element == value) => {
                Truth::True
            }
            ColumnValue::One(_) if elements.contains(&None) => Truth::Null,
            ColumnValue::One(_) => Truth::False,
            _ => Truth::Undecided,
        }
    }
}
