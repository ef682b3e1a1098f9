//! Conditions in another form that the compiler knows better, equal in all three truth values.

use sqlparser::ast::{
    BinaryOperator, CaseWhen, Expr, Function, FunctionArg, FunctionArgExpr, FunctionArguments, Query, Select,
    SelectItem, SetExpr, SetOperator, UnaryOperator, Value,
};

use super::inline::is_condition;
use super::invert::{bare, nest};
use super::list::{plain_select, projected};

/// Returns the condition in another form; `None` if there is none.
pub(super) fn rewritten(expr: &Expr) -> Option<Expr> {
    match expr {
        Expr::Case { operand: Some(operand), conditions, else_result, case_token, end_token } => {
            let conditions = conditions.iter().map(|branch| CaseWhen {
                condition: binary((**operand).clone(), BinaryOperator::Eq, branch.condition.clone()),
                result: branch.result.clone(),
            });
            Some(Expr::Case {
                operand: None,
                conditions: conditions.collect(),
                else_result: else_result.clone(),
                case_token: case_token.clone(),
                end_token: end_token.clone(),
            })
        }
        Expr::BinaryOp { left, op, right } => counted(left, op, right).or_else(|| equal(left, op, right)),
        Expr::IsNotNull(value) => extreme(value),
        Expr::IsNull(value) => extreme(value).map(not),
        Expr::AnyOp { left, compare_op: BinaryOperator::Eq, right, .. } => listed(left, right),
        Expr::AllOp { left, compare_op: BinaryOperator::NotEq, right } => listed(left, right).map(not),
        Expr::Exists { subquery, negated: false } => {
            united(subquery, |query| Expr::Exists { subquery: Box::new(query), negated: false })
        }
        Expr::InSubquery { expr, subquery, negated: false } => united(subquery, |query| Expr::InSubquery {
            expr: expr.clone(),
            subquery: Box::new(query),
            negated: false,
        }),
        _ => None,
    }
}

/// Rewrites `(select count(*) …) > 0` and the like to `exists (…)`, or its contrary.
fn counted(left: &Expr, op: &BinaryOperator, right: &Expr) -> Option<Expr> {
    let number = |expr: &Expr| match bare(expr) {
        Expr::Value(value) => match &value.value {
            Value::Number(digits, _) => digits.parse::<u8>().ok(),
            _ => None,
        },
        _ => None,
    };
    let is_count = |value: &Expr| match value {
        Expr::Function(function) if function.name.to_string().eq_ignore_ascii_case("count") => {
            match argument(function) {
                Some(FunctionArgExpr::Wildcard) => true,
                Some(FunctionArgExpr::Expr(Expr::Value(value))) => value.value != Value::Null,
                _ => false,
            }
        }
        _ => false,
    };
    let (select, mut query) = valued(left)?;
    if !is_count(projected(select)?) {
        return None;
    }
    select_null(&mut query)?;
    let exists = Expr::Exists { subquery: Box::new(query), negated: false };
    match (op, number(right)?) {
        (BinaryOperator::Gt | BinaryOperator::NotEq, 0) | (BinaryOperator::GtEq, 1) => Some(exists),
        (BinaryOperator::Eq, 0) | (BinaryOperator::Lt, 1) => Some(not(exists)),
        _ => None,
    }
}

/// Rewrites `(select max(x) …) is not null` to `exists (… where x is not null)`.
fn extreme(value: &Expr) -> Option<Expr> {
    let (select, mut query) = valued(value)?;
    let Expr::Function(function) = projected(select)? else { return None };
    if !["max", "min"].iter().any(|name| function.name.to_string().eq_ignore_ascii_case(name)) {
        return None;
    }
    let Some(FunctionArgExpr::Expr(value)) = argument(function) else { return None };
    let is_there = Expr::IsNotNull(nest(value.clone()));
    select_null(&mut query)?;
    with_condition(&mut query, is_there)?;
    Some(Expr::Exists { subquery: Box::new(query), negated: false })
}

/// Rewrites `a = b` of conditions to `(a and b) or (not a and not b)`, and `<>` to the contrary.
fn equal(left: &Expr, op: &BinaryOperator, right: &Expr) -> Option<Expr> {
    let is_truth =
        |expr: &Expr| matches!(bare(expr), Expr::Value(value) if matches!(value.value, Value::Boolean(_)));
    let is_known = |expr: &Expr| is_condition(expr) || is_truth(expr) || is_name(bare(expr));
    if !(is_condition(left) && is_known(right) || is_condition(right) && is_known(left)) {
        return None;
    }
    let both = binary(left.clone(), BinaryOperator::And, right.clone());
    let none = binary(not(left.clone()), BinaryOperator::And, not(right.clone()));
    let same = binary(both, BinaryOperator::Or, none);
    match op {
        BinaryOperator::Eq => Some(same),
        BinaryOperator::NotEq => Some(not(same)),
        _ => None,
    }
}

fn is_name(expr: &Expr) -> bool {
    matches!(expr, Expr::Identifier(_) | Expr::CompoundIdentifier(_))
}

/// Rewrites `x = any (array(select …))` to `x in (select …)`.
fn listed(value: &Expr, array: &Expr) -> Option<Expr> {
    match bare(array) {
        Expr::Function(Function { name, args: FunctionArguments::Subquery(query), .. })
            if name.to_string().eq_ignore_ascii_case("array") =>
        {
            Some(Expr::InSubquery { expr: Box::new(value.clone()), subquery: query.clone(), negated: false })
        }
        _ => None,
    }
}

/// Rewrites a condition on `a union b` to that on `a`, or that on `b`.
fn united(query: &Query, condition: impl Fn(Query) -> Expr) -> Option<Expr> {
    let Query { with: None, body, limit_clause: None, fetch: None, locks, .. } = query else { return None };
    let SetExpr::SetOperation { left, op: SetOperator::Union, right, .. } = &**body else { return None };
    let side = |body: &SetExpr| match body {
        SetExpr::Query(query) => (**query).clone(),
        body => Query { body: Box::new(body.clone()), order_by: None, ..query.clone() },
    };
    locks.is_empty().then(|| binary(condition(side(left)), BinaryOperator::Or, condition(side(right))))
}

/// Returns the sub-select of a value.
fn valued(value: &Expr) -> Option<(&Select, Query)> {
    let Expr::Subquery(query) = bare(value) else { return None };
    let select = plain_select(query)?;
    (select.distinct.is_none() && !select.from.is_empty()).then(|| (select, (**query).clone()))
}

/// Returns the only argument of an aggregate.
pub(super) fn argument(function: &Function) -> Option<&FunctionArgExpr> {
    let Function { args: FunctionArguments::List(list), filter: None, over: None, .. } = function else {
        return None;
    };
    match list.args.as_slice() {
        [FunctionArg::Unnamed(argument)] if list.duplicate_treatment.is_none() && list.clauses.is_empty() => {
            Some(argument)
        }
        _ => None,
    }
}

/// Replaces what a query selects by null.
pub(super) fn select_null(query: &mut Query) -> Option<()> {
    let SetExpr::Select(select) = &mut *query.body else { return None };
    select.projection = vec![SelectItem::UnnamedExpr(Expr::value(Value::Null))];
    query.order_by = None;
    Some(())
}

/// Adds a condition to a query.
pub(super) fn with_condition(query: &mut Query, condition: Expr) -> Option<()> {
    let SetExpr::Select(select) = &mut *query.body else { return None };
    select.selection = Some(match select.selection.take() {
        Some(selection) => binary(selection, BinaryOperator::And, condition),
        None => condition,
    });
    Some(())
}

pub(super) fn binary(left: Expr, op: BinaryOperator, right: Expr) -> Expr {
    Expr::BinaryOp { left: nest(left), op, right: nest(right) }
}

fn not(expr: Expr) -> Expr {
    Expr::UnaryOp { op: UnaryOperator::Not, expr: nest(expr) }
}
