//! Conditions as others that are true for the same rows, where false and null mean the same: sub-selects as `in` or `exists`.

use std::ops::ControlFlow;

use sqlparser::ast::{
    ArrayElemTypeDef, BinaryOperator, CastKind, DataType, Expr, Function, FunctionArg, FunctionArgExpr,
    FunctionArguments, Query, SelectItem, SetExpr, Value, visit_expressions,
};

use super::Compiler;
use super::invert::{bare, finds_one_row, nest, selected, uncast};
use super::list::{only_expression, plain_select, projected};
use super::rewrite::{argument, binary, select_null, with_condition};

impl Compiler<'_> {
    /// Returns `x in (select …)` for conditions that are true for the same rows: `x = any (array(select …))`, and `x = (select …)` if
    /// that finds one row at most.
    pub(super) fn as_list(&self, expr: &Expr) -> Option<Expr> {
        let list = |value: &Expr, query: &Query| Expr::InSubquery {
            expr: Box::new(value.clone()),
            subquery: Box::new(query.clone()),
            negated: false,
        };
        match expr {
            Expr::Nested(inner) => self.as_list(inner),
            Expr::AnyOp { left, compare_op: BinaryOperator::Eq, right, .. } => match bare(right) {
                Expr::Cast {
                    expr: array,
                    data_type: DataType::Array(ArrayElemTypeDef::SquareBracket(of, None)),
                    ..
                } => Some(list(left, &collected(array, of)?)),
                Expr::Function(Function { name, args: FunctionArguments::Subquery(query), .. })
                    if name.to_string().eq_ignore_ascii_case("array") =>
                {
                    Some(list(left, query))
                }
                _ => None,
            },
            Expr::BinaryOp { left, op: BinaryOperator::Eq, right } => {
                [(left, right), (right, left)].into_iter().find_map(|(value, query)| match bare(query) {
                    Expr::Subquery(query) if finds_one_row(query, self.rights) => Some(list(value, query)),
                    _ => None,
                })
            }
            _ => None,
        }
    }

    /// Returns `exists (select … where … and condition)` for `(select condition …)`, if that finds one row at most, and for
    /// `(select bool_or(condition) …)`: it is true for the same rows.
    pub(super) fn as_exists(&self, expr: &Expr) -> Option<Expr> {
        let Expr::Subquery(query) = bare(expr) else { return None };
        let mut condition = projected(plain_select(query)?)?;
        match condition {
            Expr::Function(function) if function.name.to_string().eq_ignore_ascii_case("bool_or") => {
                let Some(FunctionArgExpr::Expr(any)) = argument(function) else { return None };
                condition = any;
            }
            _ if finds_one_row(query, self.rights) => {}
            _ => return None,
        }
        let mut found = (**query).clone();
        select_null(&mut found)?;
        with_condition(&mut found, condition.clone())?;
        Some(Expr::Exists { subquery: Box::new(found), negated: false })
    }

    /// Returns `exists (select … where … and column > x)` for `(select column …) > x` and other conditions that are null for null, if
    /// the sub-select finds one row at most: it is true for the same rows.
    pub(super) fn as_condition(&self, expr: &Expr) -> Option<Expr> {
        let one_row = |expr: &Expr| match bare(expr) {
            Expr::Subquery(query) if finds_one_row(query, self.rights) => {
                let [item] = plain_select(query)?.projection.as_slice() else { return None };
                let value = selected(item).filter(|_| self.is_row_value(item))?;
                Some(((**query).clone(), value.clone()))
            }
            _ => None,
        };
        let outer = |expr: &Expr| {
            let mut outer = expr.clone();
            self.qualify(&mut outer);
            // The names of tables in a sub-select could mean those of another.
            (!has_queries(&outer)).then_some(outer)
        };
        let (mut query, condition) = match expr {
            Expr::BinaryOp { left, op, right } if is_strict(op) => {
                let (query, left, right) = match one_row(left) {
                    Some((query, value)) => (query, value, outer(right)?),
                    None => {
                        let (query, value) = one_row(right)?;
                        (query, outer(left)?, value)
                    }
                };
                (query, binary(left, op.clone(), right))
            }
            Expr::InList { expr, list, negated } => {
                let (query, value) = one_row(expr)?;
                let list = list.iter().map(outer).collect::<Option<_>>()?;
                (query, Expr::InList { expr: nest(value), list, negated: *negated })
            }
            Expr::AnyOp { left, compare_op, right, is_some } if is_strict(compare_op) => {
                let (query, value) = one_row(left)?;
                let (left, right) = (nest(value), nest(outer(right)?));
                (query, Expr::AnyOp { left, compare_op: compare_op.clone(), right, is_some: *is_some })
            }
            _ => return None,
        };
        select_null(&mut query)?;
        with_condition(&mut query, condition)?;
        Some(Expr::Exists { subquery: Box::new(query), negated: false })
    }
}

/// Returns `select x …` for `(select array_agg(x) …)`, also with an empty array for no row, as a list of values of a type: it finds the
/// values that the array has.
fn collected(array: &Expr, of: &DataType) -> Option<Query> {
    let Expr::Subquery(query) = bare(array) else { return None };
    if let Some(inner) = only_expression(query) {
        return collected(as_list_of(inner, of)?, of);
    }
    let mut value = as_list_of(projected(plain_select(query)?)?, of)?;
    let call = |expr: &Expr, wanted: &str| match expr {
        Expr::Function(Function {
            name,
            args: FunctionArguments::List(list),
            filter: None,
            over: None,
            ..
        }) if name.to_string().eq_ignore_ascii_case(wanted) && list.duplicate_treatment.is_none() => list
            .args
            .iter()
            .map(|one| match one {
                FunctionArg::Unnamed(FunctionArgExpr::Expr(expr)) => Some(expr.clone()),
                _ => None,
            })
            .collect::<Option<Vec<Expr>>>(),
        _ => None,
    };
    let parts = call(value, "coalesce");
    if let Some([array, empty]) = parts.as_deref() {
        matches!(uncast(empty), Expr::Value(one) if matches!(&one.value, Value::SingleQuotedString(text) if text == "{}")).then_some(())?;
        value = as_list_of(array, of)?;
    }
    let [element] = call(value, "array_agg")?.try_into().ok()?;
    let mut query = (**query).clone();
    let SetExpr::Select(select) = &mut *query.body else { return None };
    select.projection = vec![SelectItem::UnnamedExpr(Expr::Cast {
        kind: CastKind::DoubleColon,
        expr: nest(element),
        data_type: of.clone(),
        format: None,
    })];
    Some(query)
}

/// Returns a list without casts to a list of this type; `None` if it is cast to another one, which may change its values.
fn as_list_of<'a>(expr: &'a Expr, of: &DataType) -> Option<&'a Expr> {
    match expr {
        Expr::Nested(inner) => as_list_of(inner, of),
        Expr::Cast {
            expr: inner,
            data_type: DataType::Array(ArrayElemTypeDef::SquareBracket(to, None)),
            ..
        } if **to == *of => as_list_of(inner, of),
        Expr::Cast { .. } => None,
        other => Some(other),
    }
}

/// Whether the operator of system types is null for null.
fn is_strict(op: &BinaryOperator) -> bool {
    use BinaryOperator::{Eq, Gt, GtEq, Lt, LtEq, NotEq, PGLikeMatch};
    matches!(op, Eq | NotEq | Lt | LtEq | Gt | GtEq | PGLikeMatch)
}

fn has_queries(expr: &Expr) -> bool {
    visit_expressions(expr, |expr| match expr {
        Expr::Subquery(_) | Expr::Exists { .. } | Expr::InSubquery { .. } => ControlFlow::Break(()),
        Expr::Function(Function { args: FunctionArguments::Subquery(_), .. }) => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    })
    .is_break()
}
