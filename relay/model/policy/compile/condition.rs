//! Conditions that the relay decides: comparisons of operands whose equality, or order, it knows.

use sqlparser::ast::{BinaryOperator, CastKind, DataType, Expr, Value};

use super::invert::nest;
use super::operand::{Operand, Type, is_plain};
use super::{Compiler, Unsupported, not, unsupported};
use crate::model::policy::claim_expr::ClaimExpr;
use crate::model::policy::claim_function::ClaimFunction;
use crate::model::policy::predicate::{Comparison, List, Predicate, Scalar};
use crate::model::row::datum::{Datum, Kind};
use crate::model::row::pattern::Pattern;

impl Compiler<'_> {
    /// Compiles a condition that the relay decides.
    pub(super) fn condition(&self, expr: &Expr) -> Result<Predicate, Unsupported> {
        match expr {
            Expr::BinaryOp { left, op: BinaryOperator::Question, right } => {
                let (Operand::Claim(document, Type::Jsonb), key) =
                    (self.operand(left)?, self.operand(right)?)
                else {
                    return Err(unsupported("only PostgreSQL reads documents in columns"));
                };
                let key = key.typed_as(&Type::Known(Kind::Text))?;
                if *key.of() != Type::Known(Kind::Text) {
                    return Err(unsupported("the key is not a text"));
                }
                let keys = List::ClaimKeys(self.claim_index(ClaimExpr::TextList(Box::new(document), true)));
                Ok(Predicate::Among(self.scalar(key), keys))
            }
            Expr::BinaryOp { left, op: BinaryOperator::PGLikeMatch, right } => self.like(left, right),
            Expr::BinaryOp { left, op: BinaryOperator::PGNotLikeMatch, right } => {
                self.like(left, right).map(not)
            }
            Expr::BinaryOp {
                left,
                op:
                    op @ (BinaryOperator::AtArrow
                    | BinaryOperator::ArrowAt
                    | BinaryOperator::PGOverlap
                    | BinaryOperator::QuestionPipe),
                right,
            } => self
                .truth_of_claims(left, op, right)
                .or_else(|_| self.lists(left, op, right))
                .or_else(|why| self.document_of_row(left, op, right).map_err(|_| why)),
            Expr::BinaryOp { left, op, right } if comparison(op).is_some() => {
                let Some(comparison) = comparison(op) else { return Err(unsupported("")) };
                self.compared(left, comparison, right).or_else(|why| match op {
                    BinaryOperator::Eq => self.documents(left, right).map_err(|_| why),
                    BinaryOperator::NotEq => self.documents(left, right).map(not).map_err(|_| why),
                    _ => Err(why),
                })
            }
            Expr::Exists { subquery, negated: false } => self.exists_in_list(subquery),
            Expr::IsDistinctFrom(left, right) => {
                let (one, other) = self.pair(self.operand(left)?, self.operand(right)?, None)?;
                Ok(not(Predicate::Same(one, other)))
            }
            Expr::IsNotDistinctFrom(left, right) => {
                let (one, other) = self.pair(self.operand(left)?, self.operand(right)?, None)?;
                Ok(Predicate::Same(one, other))
            }
            Expr::IsNull(inner) => self.is_null(inner),
            Expr::IsNotNull(inner) => self.is_null(inner).map(not),
            Expr::AnyOp { left, compare_op: BinaryOperator::Eq, right, .. } => self.among(left, right),
            Expr::AllOp { left, compare_op: BinaryOperator::NotEq, right } => {
                self.among(left, right).map(not)
            }
            Expr::InList { expr, list, negated } => {
                let found = self.among_values(expr, list)?;
                Ok(if *negated { not(found) } else { found })
            }
            Expr::InSubquery { expr, subquery, negated: false } => {
                let list = self.claim_list(subquery)?;
                self.among_list(self.operand(expr)?, list)
            }
            _ => match self.operand(expr)? {
                operand if *operand.of() == Type::Known(Kind::Bool) => Ok(match operand {
                    Operand::Claim(ClaimExpr::Constant(value), _) => {
                        Predicate::Constant(value.map(|value| value == Datum::Bool(true)))
                    }
                    operand => Predicate::Truth(self.scalar(operand)),
                }),
                _ => Err(unsupported("it is not a condition that the relay evaluates")),
            },
        }
    }

    fn compared(&self, left: &Expr, by: Comparison, right: &Expr) -> Result<Predicate, Unsupported> {
        let (one, other) = self.pair(self.operand(left)?, self.operand(right)?, Some(by))?;
        Ok(Predicate::Compare(one, by, other))
    }

    /// Returns both sides, when the relay knows their equality, or order.
    fn pair(
        &self,
        one: Operand,
        other: Operand,
        comparison: Option<Comparison>,
    ) -> Result<(Scalar, Scalar), Unsupported> {
        let of = match (one.of(), other.of()) {
            (Type::Untyped, Type::Untyped) => Type::Known(Kind::Text),
            (Type::Untyped, of) | (of, _) => of.clone(),
        };
        let (one, other) = (one.typed_as(&of)?, other.typed_as(&of)?);
        let known = match (one.of(), other.of()) {
            (Type::Known(one), Type::Known(other)) => {
                one.compares_with(*other) && comparison.is_none_or(|comparison| comparison.is_known_for(*one))
            }
            (Type::Enum(one), Type::Enum(other)) => {
                one == other && comparison.is_none_or(|comparison| comparison.is_known_for(Kind::Enum))
            }
            _ => false,
        };
        match known {
            true => Ok((self.scalar(one), self.scalar(other))),
            false => Err(unsupported("only PostgreSQL compares values of these types")),
        }
    }

    /// Compiles `like` of a column and a constant pattern.
    fn like(&self, left: &Expr, right: &Expr) -> Result<Predicate, Unsupported> {
        let foreign = || unsupported("only PostgreSQL matches this pattern");
        let text = Type::Known(Kind::Text);
        let pattern = match self.operand(right)?.typed_as(&text)? {
            Operand::Claim(ClaimExpr::Constant(Some(Datum::Text(pattern))), of) if of == text => pattern,
            Operand::Claim(pattern, of) if of == text => return self.like_claim(left, pattern),
            _ => return Err(foreign()),
        };
        match self.operand(left)? {
            Operand::Claim(..) => self.truth_of_claims(left, &BinaryOperator::PGLikeMatch, right),
            Operand::Row(Scalar::Column(at), of) if of == text && self.columns[at].folding.is_some() => {
                let pattern = Pattern::new(&pattern, None).ok_or_else(foreign)?;
                Ok(Predicate::Matches(at, pattern))
            }
            _ => Err(foreign()),
        }
    }

    /// Compiles `like` of a column and a pattern in a claim.
    fn like_claim(&self, left: &Expr, pattern: ClaimExpr) -> Result<Predicate, Unsupported> {
        match self.operand(left)? {
            Operand::Row(Scalar::Column(at), Type::Known(Kind::Text))
                if self.columns[at].folding.is_some() =>
            {
                Ok(Predicate::MatchesClaim(at, self.claim_index(pattern)))
            }
            _ => Err(unsupported("only PostgreSQL matches this pattern")),
        }
    }

    fn is_null(&self, expr: &Expr) -> Result<Predicate, Unsupported> {
        let operand = self.operand(expr)?;
        if let Operand::Row(Scalar::Column(column), _) = operand
            && !self.columns[column].plain
        {
            return Err(unsupported("only PostgreSQL evaluates `is null` of a row or domain"));
        }
        match operand {
            Operand::Claim(document, Type::Json | Type::Jsonb) => {
                let is_null = ClaimExpr::Call(ClaimFunction::IsNull, vec![document]);
                Ok(Predicate::Truth(Scalar::Claim(self.claim_index(is_null))))
            }
            operand => Ok(Predicate::IsNull(self.scalar(operand))),
        }
    }

    fn among(&self, left: &Expr, right: &Expr) -> Result<Predicate, Unsupported> {
        match constants(right) {
            Some(list) => self.among_values(left, &list),
            None => {
                let list = self.list(right)?;
                self.among_list(self.operand(left)?, list)
            }
        }
    }

    fn among_values(&self, left: &Expr, list: &[Expr]) -> Result<Predicate, Unsupported> {
        let value = self.operand(left)?;
        let mut scalars = Vec::with_capacity(list.len());
        let mut compared = None;
        for element in list {
            let (one, other) = self.pair(value.clone(), self.operand(element)?, Some(Comparison::Equal))?;
            compared = Some(one);
            scalars.push(other);
        }
        match compared {
            Some(value) => Ok(Predicate::Among(value, List::Of(scalars))),
            None => Ok(Predicate::Constant(Some(false))),
        }
    }

    pub(super) fn among_list(&self, value: Operand, list: Operand) -> Result<Predicate, Unsupported> {
        let Type::Many(kind) = *list.of() else {
            return Err(unsupported("only PostgreSQL evaluates this kind of list"));
        };
        let value = value.typed_as(&Type::Known(kind))?;
        let compares = matches!(value.of(), Type::Known(of) if of.compares_with(kind));
        let list = match list {
            _ if !compares => return Err(unsupported("only PostgreSQL compares values of these types")),
            Operand::Claim(claim, _) => List::Claim(self.claim_index(claim)),
            Operand::Row(Scalar::Column(column), _) => List::Column(column),
            Operand::Row(..) => return Err(unsupported("only PostgreSQL evaluates this kind of list")),
        };
        Ok(Predicate::Among(self.scalar(value), list))
    }
}

fn comparison(op: &BinaryOperator) -> Option<Comparison> {
    Some(match op {
        BinaryOperator::Eq => Comparison::Equal,
        BinaryOperator::NotEq => Comparison::NotEqual,
        BinaryOperator::Lt => Comparison::Less,
        BinaryOperator::LtEq => Comparison::LessOrEqual,
        BinaryOperator::Gt => Comparison::Greater,
        BinaryOperator::GtEq => Comparison::GreaterOrEqual,
        _ => return None,
    })
}

/// Returns the elements of `array[…]`, or of an array constant, with the cast of the array.
pub(super) fn constants(expr: &Expr) -> Option<Vec<Expr>> {
    match expr {
        Expr::Nested(inner) => constants(inner),
        Expr::Array(array) => Some(array.elem.clone()),
        Expr::Cast { expr, data_type: DataType::Array(element), .. } => {
            use sqlparser::ast::ArrayElemTypeDef::{AngleBracket, Parenthesis, SquareBracket};
            let elements = match &**expr {
                Expr::Value(value) => spelled(&value.value)?,
                Expr::Nested(inner) if matches!(**inner, Expr::Cast { .. }) => return None,
                Expr::Cast { .. } => return None,
                array => constants(array)?,
            };
            let (AngleBracket(kind) | SquareBracket(kind, None) | Parenthesis(kind)) = element else {
                return None;
            };
            // A cast of the array casts each element.
            let cast = |element: Expr| Expr::Cast {
                kind: CastKind::DoubleColon,
                expr: nest(element),
                data_type: (**kind).clone(),
                format: None,
            };
            Some(elements.into_iter().map(cast).collect())
        }
        _ => None,
    }
}

/// Returns the elements of an array constant, if each stands for itself.
fn spelled(constant: &Value) -> Option<Vec<Expr>> {
    let (Value::SingleQuotedString(text) | Value::EscapedStringLiteral(text)) = constant else { return None };
    let inside = text.strip_prefix('{')?.strip_suffix('}')?;
    if inside.is_empty() {
        return Some(Vec::new());
    }
    let element =
        |element: &str| is_plain(element).then(|| Expr::value(Value::SingleQuotedString(element.to_owned())));
    inside.split(',').map(element).collect()
}
