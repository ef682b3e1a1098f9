//! The operands of conditions: values of a row image and of claims, and lists of them.

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
    /// A claim value.
    Claim(usize),
    /// The first value that is not null.
    Coalesce(Vec<Scalar>),
}

/// The right side of `= any`.
#[derive(Debug, Clone, PartialEq)]
pub enum List {
    /// These values.
    Of(Vec<Scalar>),
    /// A claim value that is a list.
    Claim(usize),
    /// A claim value that is a list of keys; null compares to it as null, even when it is empty.
    ClaimKeys(usize),
    /// An array column.
    Column(usize),
}

impl Scalar {
    pub(super) fn raises(&self, claims: &[ClaimValue]) -> bool {
        match self {
            Self::Column(_) | Self::ColumnText(_) => false,
            Self::Claim(claim) => claims.get(*claim) == Some(&ClaimValue::Error),
            Self::Coalesce(scalars) => scalars.iter().any(|scalar| scalar.raises(claims)),
        }
    }

    pub(super) fn reads_only_claims(&self) -> bool {
        match self {
            Self::Column(_) | Self::ColumnText(_) => false,
            Self::Claim(_) => true,
            Self::Coalesce(scalars) => scalars.iter().all(Self::reads_only_claims),
        }
    }

    /// Returns the value, or the result of the condition when there is none.
    pub(super) fn value(&self, image: &Image<'_>, claims: &[ClaimValue]) -> Result<ColumnValue, Truth> {
        match self {
            Self::Column(column) => match image.value(*column) {
                // A missing value must not be read as null.
                ColumnValue::Missing => Err(Truth::Error),
                value => Ok(value.clone()),
            },
            Self::ColumnText(column) => match image.value(*column) {
                ColumnValue::Missing => Err(Truth::Error),
                ColumnValue::Null => Ok(ColumnValue::Null),
                ColumnValue::One(datum) => Ok(ColumnValue::One(Datum::Text(datum.to_text()))),
                _ => Err(Truth::Undecided),
            },
            Self::Claim(claim) => match claims.get(*claim) {
                Some(ClaimValue::Null) => Ok(ColumnValue::Null),
                Some(ClaimValue::One(datum)) => Ok(ColumnValue::One(datum.clone())),
                Some(ClaimValue::Error) => Err(Truth::Error),
                Some(ClaimValue::List(_) | ClaimValue::Undecided) | None => Err(Truth::Undecided),
            },
            Self::Coalesce(scalars) => {
                for scalar in scalars {
                    match scalar.value(image, claims)? {
                        ColumnValue::Null => {}
                        value => return Ok(value),
                    }
                }
                Ok(ColumnValue::Null)
            }
        }
    }
}

impl List {
    pub(super) fn raises(&self, claims: &[ClaimValue]) -> bool {
        match self {
            Self::Of(scalars) => scalars.iter().any(|scalar| scalar.raises(claims)),
            Self::Claim(claim) | Self::ClaimKeys(claim) => claims.get(*claim) == Some(&ClaimValue::Error),
            Self::Column(_) => false,
        }
    }

    pub(super) fn reads_only_claims(&self) -> bool {
        match self {
            Self::Of(scalars) => scalars.iter().all(Scalar::reads_only_claims),
            Self::Claim(_) | Self::ClaimKeys(_) => true,
            Self::Column(_) => false,
        }
    }

    /// Returns the elements, or the result of the condition when there is no list.
    pub(super) fn elements(
        &self,
        image: &Image<'_>,
        claims: &[ClaimValue],
    ) -> Result<Vec<Option<Datum>>, Truth> {
        match self {
            Self::Of(scalars) => {
                let element = |scalar: &Scalar| match scalar.value(image, claims)? {
                    ColumnValue::Null => Ok(None),
                    ColumnValue::One(datum) => Ok(Some(datum)),
                    _ => Err(Truth::Undecided),
                };
                scalars.iter().map(element).collect()
            }
            Self::Claim(claim) | Self::ClaimKeys(claim) => match claims.get(*claim) {
                Some(ClaimValue::List(list)) => Ok(list.iter().cloned().map(Some).collect()),
                Some(ClaimValue::Null) => Err(Truth::Null),
                Some(ClaimValue::Error) => Err(Truth::Error),
                _ => Err(Truth::Undecided),
            },
            Self::Column(column) => match image.value(*column) {
                ColumnValue::Many(elements) => Ok(elements.clone()),
                ColumnValue::Null => Err(Truth::Null),
                ColumnValue::Missing => Err(Truth::Error),
                _ => Err(Truth::Undecided),
            },
        }
    }

    /// Evaluates `value = any (list)`.
    pub(super) fn contains(&self, value: &ColumnValue, image: &Image<'_>, claims: &[ClaimValue]) -> Truth {
        if let Self::Claim(claim) | Self::ClaimKeys(claim) = self
            && let Some(ClaimValue::List(list)) = claims.get(*claim)
        {
            return match value {
                _ if list.is_empty() && matches!(self, Self::Claim(_)) => Truth::False,
                ColumnValue::Null => Truth::Null,
                ColumnValue::One(value) => list.binary_search(value).is_ok().into(),
                _ => Truth::Undecided,
            };
        }
        let elements = match self.elements(image, claims) {
            Ok(elements) => elements,
            Err(result) => return result,
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
