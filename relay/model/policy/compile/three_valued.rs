//! `x in (select …)` and `x = claim` where false and null differ, below `not`: true, null or false by up to three queries.
//!
//! The first is true for an equal value; null if a value of the list is null, or `x` itself and the list is not empty; otherwise false.

use sqlparser::ast::{BinaryOperator, Distinct, Expr, Query, Value};

use super::list::{plain_select, projected};
use super::rewrite::{binary, select_null, with_condition};
use super::{Compiler, not};
use crate::model::policy::predicate::Predicate;

impl Compiler<'_> {
    /// Compiles it, if PostgreSQL can evaluate each of the queries for all readers.
    pub(super) fn three_valued(&self, expr: &Expr) -> Option<Predicate> {
        match expr {
            Expr::Nested(inner) => self.three_valued(inner),
            Expr::InSubquery { expr: value, subquery, negated: false } => {
                self.found_in(expr, value, subquery)
            }
            Expr::BinaryOp { left, op: BinaryOperator::Eq, right } => {
                self.when_known(expr, vec![is_null(left), is_null(right)])
            }
            Expr::BinaryOp { left, op: BinaryOperator::NotEq, right } => {
                self.three_valued(&binary((**left).clone(), BinaryOperator::Eq, (**right).clone())).map(not)
            }
            _ => None,
        }
    }

    fn found_in(&self, expr: &Expr, value: &Expr, subquery: &Query) -> Option<Predicate> {
        let select = plain_select(subquery)?;
        let listed = projected(select)?;
        if matches!(value, Expr::Tuple(_))
            || matches!(select.distinct, Some(Distinct::On(_)))
            || !select.projection.iter().all(|item| self.is_row_value(item))
        {
            return None;
        }
        let mut any = subquery.clone();
        select_null(&mut any)?;
        let mut null = any.clone();
        with_condition(&mut null, is_null(listed))?;
        let exists = |query| Expr::Exists { subquery: Box::new(query), negated: false };
        let without_value = binary(is_null(value), BinaryOperator::And, exists(any));
        self.when_known(expr, vec![without_value, exists(null)])
    }

    /// Compiles a condition that is null if one of these holds, unless it is true.
    fn when_known(&self, expr: &Expr, unknown: Vec<Expr>) -> Option<Predicate> {
        self.attempt(|| {
            let found = self.predicate(expr, true);
            let unknown = unknown.iter().map(|unknown| self.predicate(unknown, true)).collect();
            Predicate::Case(
                vec![
                    (found, Predicate::Constant(Some(true))),
                    (Predicate::Or(unknown), Predicate::Constant(None)),
                ],
                Box::new(Predicate::Constant(Some(false))),
            )
        })
    }
}

/// A test for null that, unlike `is null`, does not look into a row.
fn is_null(value: &Expr) -> Expr {
    Expr::IsNotDistinctFrom(Box::new(value.clone()), Box::new(Expr::value(Value::Null)))
}
