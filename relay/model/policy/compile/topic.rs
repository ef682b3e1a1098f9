//! The setting `realtime.topic` in policies of private channels: for the rows that they are asked about it equals the column `topic`.

use std::ops::ControlFlow;

use sqlparser::ast::{
    DataType, Expr, Function, FunctionArg, FunctionArgExpr, FunctionArguments, Ident, TableFactor, Value,
    Visit, VisitMut, Visitor, VisitorMut,
};

use super::operand::MAX_HELPER_DEPTH;
use super::parse_body;
use crate::model::policy::rights::Rights;
use crate::model::row::column::{Column, ColumnKind};
use crate::model::row::datum::Kind;

/// The name of the column.
const TOPIC: &str = "topic";

/// Replaces the setting, and functions that return it, by the column. A policy in which the column's name could mean another one stays
/// as it is.
pub(super) fn as_column(mut expr: Expr, table: &str, columns: &[Column], rights: &Rights) -> Expr {
    let is_text = |column: &Column| column.name == TOPIC && column.shape() == ColumnKind::One(Kind::Text);
    if columns.iter().any(is_text) && expr.visit(&mut Names(table)).is_continue() {
        let _ = VisitMut::visit(&mut expr, &mut Replace { table, rights });
    }
    expr
}

/// Finds whether a table or alias has the name.
struct Names<'a>(&'a str);

impl Visitor for Names<'_> {
    type Break = ();

    fn pre_visit_table_factor(&mut self, factor: &TableFactor) -> ControlFlow<()> {
        let names = match factor {
            TableFactor::Table { name, alias, .. } => {
                let last = name.0.last().and_then(|part| part.as_ident()).map(|ident| ident.value.as_str());
                [last, alias.as_ref().map(|alias| alias.name.value.as_str())]
            }
            // Of other sources only the alias is a name.
            TableFactor::Derived { alias, .. }
            | TableFactor::UNNEST { alias, .. }
            | TableFactor::Function { alias, .. } => {
                [None, alias.as_ref().map(|alias| alias.name.value.as_str())]
            }
            _ => return ControlFlow::Break(()),
        };
        if names.contains(&Some(self.0)) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

struct Replace<'a> {
    table: &'a str,
    rights: &'a Rights,
}

impl VisitorMut for Replace<'_> {
    type Break = ();

    fn pre_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<()> {
        if is_topic(expr, self.rights, MAX_HELPER_DEPTH) {
            *expr = Expr::CompoundIdentifier(vec![Ident::new(self.table), Ident::new(TOPIC)]);
        }
        ControlFlow::Continue(())
    }
}

/// Whether the expression is the setting as text. It is never empty.
fn is_topic(expr: &Expr, rights: &Rights, depth: usize) -> bool {
    match expr {
        Expr::Nested(inner) => is_topic(inner, rights, depth),
        Expr::Cast { expr, data_type, .. } if is_text(data_type) => is_topic(expr, rights, depth),
        Expr::Function(function) => {
            let written = function.name.to_string();
            let bare = written.strip_prefix("pg_catalog.").unwrap_or(&written).to_ascii_lowercase();
            match (bare.as_str(), arguments(function).as_deref()) {
                ("current_setting", Some([name, missing_ok])) => {
                    is_constant(name, &Value::SingleQuotedString(String::from("realtime.topic")))
                        && is_constant(missing_ok, &Value::Boolean(true))
                }
                ("nullif", Some([inner, empty])) => {
                    is_constant(empty, &Value::SingleQuotedString(String::new()))
                        && is_topic(inner, rights, depth)
                }
                (_, Some([])) if depth > 0 => rights.helpers.get(&written).is_some_and(|helper| {
                    let body = parse_body(&helper.body);
                    helper.returns == "text" && body.is_ok_and(|body| is_topic(&body, rights, depth - 1))
                }),
                _ => false,
            }
        }
        _ => false,
    }
}

fn arguments(function: &Function) -> Option<Vec<&Expr>> {
    let FunctionArguments::List(list) = &function.args else { return None };
    let one = |argument| match argument {
        &FunctionArg::Unnamed(FunctionArgExpr::Expr(ref expr)) => Some(expr),
        _ => None,
    };
    list.args.iter().map(one).collect()
}

/// Whether the expression is this constant, possibly with a cast to text.
fn is_constant(expr: &Expr, value: &Value) -> bool {
    match expr {
        Expr::Nested(inner) => is_constant(inner, value),
        Expr::Cast { expr: inner, data_type, .. } if is_text(data_type) => is_constant(inner, value),
        Expr::Value(found) => found.value == *value,
        _ => false,
    }
}

fn is_text(data_type: &DataType) -> bool {
    matches!(data_type.to_string().to_ascii_lowercase().as_str(), "text" | "pg_catalog.text")
}
