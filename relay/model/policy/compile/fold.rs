//! Constants in conditions, folded as PostgreSQL's planner folds them: what is joined to a deciding constant is left out, and needs no
//! rights.

use std::ops::ControlFlow;

use sqlparser::ast::{BinaryOperator, Expr, UnaryOperator, Value, VisitMut, VisitorMut};

/// Returns the condition without what constants decide: `true or …` is true, `false and …` is false, whatever else is in it.
pub(super) fn folded(mut expr: Expr) -> Expr {
    let _ = VisitMut::visit(&mut expr, &mut Folding);
    expr
}

struct Folding;

impl VisitorMut for Folding {
    type Break = ();

    fn post_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<()> {
        let value = match expr {
            Expr::Nested(inner) => constant(inner),
            Expr::UnaryOp { op: UnaryOperator::Not, expr: inner } => constant(inner).map(|value| !value),
            Expr::BinaryOp { left, op: op @ (BinaryOperator::And | BinaryOperator::Or), right } => {
                let deciding = *op == BinaryOperator::Or;
                match (constant(left), constant(right)) {
                    (Some(value), _) | (_, Some(value)) if value == deciding => Some(deciding),
                    (Some(value), Some(_)) => Some(value),
                    _ => None,
                }
            }
            _ => None,
        };
        if let Some(value) = value {
            *expr = Expr::Value(Value::Boolean(value).into());
        }
        ControlFlow::Continue(())
    }
}

fn constant(expr: &Expr) -> Option<bool> {
    match expr {
        Expr::Value(value) => match value.value {
            Value::Boolean(value) => Some(value),
            _ => None,
        },
        _ => None,
    }
}
