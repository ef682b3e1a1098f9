//! What conditions compare: values of a row image and of somebody's claims, and lists of them.

use crate::model::policy::claim_expr::TermValue;
use crate::model::row::datum::Datum;
use crate::model::row::image::{Held, Image};
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
    pub(super) fn raises(&self, terms: &[TermValue]) -> bool {
        match self {
            Self::Column(_) | Self::ColumnText(_) => false,
            Self::Term(term) => terms.get(*term) == Some(&TermValue::Raises),
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
    pub(super) fn held(&self, image: &Image<'_>, terms: &[TermValue]) -> Result<Held, Truth> {
        match self {
            Self::Column(column) => match image.held(*column) {
                // A rule cannot be read as if what is missing were null.
                Held::Missing => Err(Truth::Raises),
                held => Ok(held.clone()),
            },
            Self::ColumnText(column) => match image.held(*column) {
                Held::Missing => Err(Truth::Raises),
                Held::Null => Ok(Held::Null),
                Held::One(datum) => Ok(Held::One(Datum::Text(datum.to_text()))),
                _ => Err(Truth::Unsure),
            },
            Self::Term(term) => match terms.get(*term) {
                Some(TermValue::Null) => Ok(Held::Null),
                Some(TermValue::One(datum)) => Ok(Held::One(datum.clone())),
                Some(TermValue::Raises) => Err(Truth::Raises),
                Some(TermValue::List(_) | TermValue::Unsure) | None => Err(Truth::Unsure),
            },
            Self::Coalesce(scalars) => {
                for scalar in scalars {
                    match scalar.held(image, terms)? {
                        Held::Null => {}
                        held => return Ok(held),
                    }
                }
                Ok(Held::Null)
            }
        }
    }
}

impl List {
    /// `value = any (list)`
    pub(super) fn holds(&self, value: &Held, image: &Image<'_>, terms: &[TermValue]) -> Truth {
        let elements: Vec<Option<Datum>> = match self {
            Self::Of(scalars) => {
                let mut elements = Vec::with_capacity(scalars.len());
                for scalar in scalars {
                    match scalar.held(image, terms) {
                        Ok(Held::Null) => elements.push(None),
                        Ok(Held::One(datum)) => elements.push(Some(datum)),
                        Ok(_) => return Truth::Unsure,
                        Err(stop) => return stop,
                    }
                }
                elements
            }
            Self::Term(term) | Self::Keys(term) => match terms.get(*term) {
                Some(TermValue::List(list)) => {
                    return match value {
                        _ if list.is_empty() && matches!(self, Self::Term(_)) => Truth::False,
                        Held::Null => Truth::Null,
                        Held::One(value) => list.contains(value).into(),
                        _ => Truth::Unsure,
                    };
                }
                Some(TermValue::Null) => return Truth::Null,
                Some(TermValue::Raises) => return Truth::Raises,
                _ => return Truth::Unsure,
            },
            Self::Column(column) => match image.held(*column) {
                Held::Many(elements) => elements.clone(),
                Held::Null => return Truth::Null,
                Held::Missing => return Truth::Raises,
                _ => return Truth::Unsure,
            },
        };
        match value {
            _ if elements.is_empty() => Truth::False,
            Held::Null => Truth::Null,
            Held::One(value) if elements.iter().flatten().any(|element| element == value) => Truth::True,
            Held::One(_) if elements.contains(&None) => Truth::Null,
            Held::One(_) => Truth::False,
            _ => Truth::Unsure,
        }
    }
}
