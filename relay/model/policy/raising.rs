//! Whether claims make a condition raise, whatever the row is.

use crate::model::policy::claim_expr::ClaimValue;
use crate::model::policy::predicate::{Predicate, Unasked};
use crate::model::policy::scalar::{List, Scalar};
use crate::model::row::image::Image;
use crate::model::row::truth::Truth;

impl Predicate {
    /// Whether one of the terms that it reads raises. PostgreSQL works claims out before it looks at rows, or for the first row
    /// that needs them, and then shows none. What a `case` guards by claims alone is looked at only where the guard lets it.
    pub fn raises(&self, terms: &[ClaimValue]) -> bool {
        let any = |list: &[Self]| list.iter().any(|one| one.raises(terms));
        let bad = |term: &usize| terms.get(*term) == Some(&ClaimValue::Raises);
        match self {
            Self::Constant(_) | Self::Matches(..) | Self::Fact(_) | Self::Opaque | Self::Pending => false,
            Self::Truth(scalar) | Self::IsNull(scalar) => scalar.raises(terms),
            Self::Compare(one, _, other) | Self::Same(one, other) => one.raises(terms) || other.raises(terms),
            Self::Among(scalar, list) => {
                scalar.raises(terms)
                    || match list {
                        List::Of(scalars) => scalars.iter().any(|scalar| scalar.raises(terms)),
                        List::Term(term) | List::Keys(term) => bad(term),
                        List::Column(_) => false,
                    }
            }
            Self::Is(inner, _) | Self::IsUnknown(inner) | Self::Not(inner) => inner.raises(terms),
            Self::And(all) | Self::Or(all) => any(all),
            Self::Case(branches, otherwise) => {
                for (condition, result) in branches {
                    if condition.raises(terms) {
                        return true;
                    }
                    match condition.is_of_claims() {
                        true => match condition.truth(&Image::none(), terms, &Unasked, false) {
                            Truth::True => return result.raises(terms),
                            Truth::False | Truth::Null => {}
                            _ if result.raises(terms) => return true,
                            _ => {}
                        },
                        false if result.raises(terms) => return true,
                        false => {}
                    }
                }
                otherwise.raises(terms)
            }
            Self::Readers { by, .. } => by.iter().any(bad),
        }
    }

    /// Whether it depends on claims alone.
    fn is_of_claims(&self) -> bool {
        let all = |list: &[Self]| list.iter().all(Self::is_of_claims);
        match self {
            Self::Constant(_) => true,
            Self::Truth(scalar) | Self::IsNull(scalar) => scalar.is_of_claims(),
            Self::Compare(one, _, other) | Self::Same(one, other) => {
                one.is_of_claims() && other.is_of_claims()
            }
            Self::Among(scalar, list) => {
                scalar.is_of_claims()
                    && match list {
                        List::Of(scalars) => scalars.iter().all(Scalar::is_of_claims),
                        List::Term(_) | List::Keys(_) => true,
                        List::Column(_) => false,
                    }
            }
            Self::Is(inner, _) | Self::IsUnknown(inner) | Self::Not(inner) => inner.is_of_claims(),
            Self::And(list) | Self::Or(list) => all(list),
            Self::Matches(..)
            | Self::Case(..)
            | Self::Fact(_)
            | Self::Readers { .. }
            | Self::Opaque
            | Self::Pending => false,
        }
    }
}
