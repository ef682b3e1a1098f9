//! Forms of expressions and queries in a policy, and what they are made of.

use std::ops::ControlFlow;

use sqlparser::ast::{
    BinaryOperator, CastKind, Expr, Function, Ident, Query, Select, SelectItem, TableFactor, Visit, Visitor,
};

use super::super::body_text::AGGREGATES;
use super::super::invert::nest;
use super::super::{Unsupported, coalesced, parse, unsupported};
use super::Call;

/// Returns the call of `f(…) alias (column)`, with both names.
pub(in super::super) fn source(factor: &TableFactor) -> Option<(Call, Ident, Ident)> {
    let (call, alias) = match factor {
        TableFactor::Table { name, args: Some(args), alias: Some(alias), with_ordinality: false, .. } => {
            (Call::with(name, &args.args)?, alias)
        }
        TableFactor::Function { name, args, alias: Some(alias), with_ordinality: false, .. } => {
            (Call::with(name, args)?, alias)
        }
        _ => return None,
    };
    let [column] = alias.columns.as_slice() else { return None };
    Some((call, alias.name.clone(), column.name.clone()))
}

pub(in super::super) fn is_column(expr: Option<&Expr>, alias: &Ident, column: &Ident) -> bool {
    matches!(expr, Some(Expr::CompoundIdentifier(parts))
        if matches!(parts.as_slice(), [of, name] if of.value == alias.value && name.value == column.value))
}

pub(in super::super) fn set_projection(select: &mut Select, value: Expr) {
    select.projection = vec![SelectItem::UnnamedExpr(value)];
}

pub(in super::super) fn and(one: Option<Expr>, other: Expr) -> Expr {
    match one {
        Some(one) => Expr::BinaryOp { left: nest(one), op: BinaryOperator::And, right: nest(other) },
        None => other,
    }
}

/// Returns the expression cast to a type, which the call of a function does without saying so.
pub(in super::super) fn typed(expr: &Expr, of: &str) -> Result<Expr, Unsupported> {
    match parse(&format!("NULL::{of}"))? {
        Expr::Cast { data_type, .. } => {
            Ok(Expr::Cast { kind: CastKind::DoubleColon, expr: nest(expr.clone()), data_type, format: None })
        }
        _ => Err(unsupported("a type of it is not understood")),
    }
}

/// Whether the expression is boolean by its form, so that a cast to boolean changes nothing. This is the one list of such forms.
pub(in super::super) fn is_condition(expr: &Expr) -> bool {
    match expr {
        Expr::Nested(inner) => is_condition(inner),
        Expr::Function(function) => coalesced(function).is_some(),
        Expr::BinaryOp { op, .. } => matches!(
            op,
            BinaryOperator::And
                | BinaryOperator::Or
                | BinaryOperator::Eq
                | BinaryOperator::NotEq
                | BinaryOperator::Lt
                | BinaryOperator::LtEq
                | BinaryOperator::Gt
                | BinaryOperator::GtEq
                | BinaryOperator::Question
        ),
        Expr::UnaryOp { op, .. } => *op == sqlparser::ast::UnaryOperator::Not,
        Expr::Exists { .. }
        | Expr::InSubquery { .. }
        | Expr::InList { .. }
        | Expr::AnyOp { .. }
        | Expr::AllOp { .. }
        | Expr::IsNull(_)
        | Expr::IsNotNull(_)
        | Expr::IsTrue(_)
        | Expr::IsNotTrue(_)
        | Expr::IsFalse(_)
        | Expr::IsNotFalse(_)
        | Expr::IsUnknown(_)
        | Expr::IsNotUnknown(_)
        | Expr::IsDistinctFrom(..)
        | Expr::IsNotDistinctFrom(..) => true,
        _ => false,
    }
}

/// Whether it is the call of a function that makes one value of many rows.
pub(super) fn is_aggregate(expr: &Expr) -> bool {
    matches!(expr, Expr::Function(Function { name, over: None, .. })
        if AGGREGATES.contains(&name.to_string().trim_start_matches("pg_catalog.")))
}

/// Whether the value is an aggregate of the query that it is in.
pub(super) fn aggregates(value: &Expr) -> bool {
    struct Found(usize, bool);
    impl Visitor for Found {
        type Break = ();

        fn pre_visit_query(&mut self, _: &Query) -> ControlFlow<()> {
            self.0 += 1;
            ControlFlow::Continue(())
        }

        fn post_visit_query(&mut self, _: &Query) -> ControlFlow<()> {
            self.0 -= 1;
            ControlFlow::Continue(())
        }

        fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<()> {
            self.1 |= self.0 == 0 && is_aggregate(expr);
            ControlFlow::Continue(())
        }
    }
    let mut found = Found(0, false);
    let _ = Visit::visit(value, &mut found);
    found.1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_is_known_by_its_form() {
        for condition in [
            "a = b",
            "a <> b",
            "a < b",
            "a >= b",
            "a ? 'b'",
            "a and b",
            "a or b",
            "not a",
            "(not a)",
            "a is null",
            "a is not null",
            "a is true",
            "a is not true",
            "a is false",
            "a is not false",
            "a is unknown",
            "a is not unknown",
            "a is distinct from b",
            "a is not distinct from b",
            "a in (1, 2)",
            "a in (select 1)",
            "a = any (b)",
            "a > all (b)",
            "exists (select 1)",
            "coalesce(a = b, false)",
        ] {
            assert!(is_condition(&parse(condition).unwrap()), "{condition}");
        }
        for other in
            ["a", "true", "a + b", "a || b", "a -> 'b'", "a ->> 'b'", "a::boolean", "coalesce(a, b)", "f(a)"]
        {
            assert!(!is_condition(&parse(other).unwrap()), "{other}");
        }
    }
}
