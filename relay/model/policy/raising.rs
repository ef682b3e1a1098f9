//! Whether claims make a condition raise, whatever the row is.

use crate::model::policy::claim_expr::ClaimValue;
use crate::model::policy::predicate::{NoAnswers, Predicate};
use crate::model::row::image::Image;
use crate::model::row::truth::Truth;

impl Predicate {
    /// Whether a claim that the condition reads raises. PostgreSQL evaluates claims when it plans, or for the first row that
    /// needs them, and the whole query fails. A branch of a `case` whose guard reads only claims counts only where the guard
    /// selects it.
    pub fn raises(&self, claims: &[ClaimValue]) -> bool {
        let any = |list: &[Self]| list.iter().any(|one| one.raises(claims));
        let bad = |claim: &usize| claims.get(*claim) == Some(&ClaimValue::Error);
        match self {
            Self::Constant(_) | Self::Matches(..) | Self::Fact(_) | Self::Opaque | Self::Pending => false,
            Self::Truth(scalar) | Self::IsNull(scalar) => scalar.raises(claims),
            Self::Compare(one, _, other) | Self::Same(one, other) => {
                one.raises(claims) || other.raises(claims)
            }
            Self::Among(scalar, list) => scalar.raises(claims) || list.raises(claims),
            Self::Lists(one, _, other) => one.raises(claims) || other.raises(claims),
            Self::MatchesClaim(_, pattern) => bad(pattern),
            Self::Is(inner, _) | Self::IsUnknown(inner) | Self::Not(inner) => inner.raises(claims),
            Self::And(all) | Self::Or(all) => any(all),
            Self::Case(branches, otherwise) => {
                for (condition, result) in branches {
                    if condition.raises(claims) {
                        return true;
                    }
                    match condition.reads_only_claims() {
                        true => match condition.truth(&Image::none(), claims, &NoAnswers, false) {
                            Truth::True => return result.raises(claims),
                            Truth::False | Truth::Null => {}
                            _ if result.raises(claims) => return true,
                            _ => {}
                        },
                        false if result.raises(claims) => return true,
                        false => {}
                    }
                }
                otherwise.raises(claims)
            }
            Self::Readers { by, .. } => by.iter().any(bad),
        }
    }

    /// Whether the condition depends on claims alone.
    fn reads_only_claims(&self) -> bool {
        let all = |list: &[Self]| list.iter().all(Self::reads_only_claims);
        match self {
            Self::Constant(_) => true,
            Self::Truth(scalar) | Self::IsNull(scalar) => scalar.reads_only_claims(),
            Self::Compare(one, _, other) | Self::Same(one, other) => {
                one.reads_only_claims() && other.reads_only_claims()
            }
            Self::Among(scalar, list) => scalar.reads_only_claims() && list.reads_only_claims(),
            Self::Lists(one, _, other) => one.reads_only_claims() && other.reads_only_claims(),
            Self::Is(inner, _) | Self::IsUnknown(inner) | Self::Not(inner) => inner.reads_only_claims(),
            Self::And(list) | Self::Or(list) => all(list),
            Self::Matches(..)
            | Self::MatchesClaim(..)
            | Self::Case(..)
            | Self::Fact(_)
            | Self::Readers { .. }
            | Self::Opaque
            | Self::Pending => false,
        }
    }
}
