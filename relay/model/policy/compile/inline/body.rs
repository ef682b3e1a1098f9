//! A body in the place of a call: its tables get names of their own, and its parameters become the arguments.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use sqlparser::ast::{
    Expr, Function, FunctionArg, FunctionArgExpr, FunctionArguments, Ident, ObjectName, Query, SetExpr,
    TableAlias, TableFactor, Value, ValueWithSpan, Visit, VisitMut, Visitor, VisitorMut,
};

use super::super::dependencies::written;
use super::super::invert::{last_part, nest};
use super::super::list::only_expression;
use super::super::row_security::may_raise;
use super::super::{Unsupported, parse, parse_query, unsupported};
use super::form::is_aggregate;
use crate::model::policy::rights::Body;

/// A parsed body.
#[derive(Clone)]
pub(super) enum Filled {
    /// `return …` or `select …` without tables.
    Value(Box<Expr>),
    /// A query of tables.
    Rows(Box<Query>),
}

impl Filled {
    pub fn parse(sql: &str) -> Result<Self, Unsupported> {
        // A whole row, whose name would have to be replaced, too.
        if sql.contains(".*") {
            return Err(unsupported("its body reads a whole row"));
        }
        if let Some(value) = sql.strip_prefix("RETURN ") {
            return parse(value).map(|value| Self::Value(Box::new(value)));
        }
        let query = sql.strip_prefix("BEGIN ATOMIC").and_then(|rest| rest.trim_end().strip_suffix("END"));
        let query = query.and_then(|rest| rest.trim_end().strip_suffix(';'));
        let query = parse_query(query.ok_or_else(|| unsupported("its body is not a query"))?)?;
        if let Some(value) = only_expression(&query) {
            return Ok(Self::Value(Box::new(value.clone())));
        }
        match (&*query.body, &query.with, &query.limit_clause) {
            (SetExpr::Select(select), None, None) if !select.from.is_empty() => {
                Ok(Self::Rows(Box::new(query)))
            }
            _ => Err(unsupported("its body is more than `select … from … where …`")),
        }
    }

    /// Whether it may raise for some row, apart from the bodies of these functions.
    pub fn may_raise(&self, bodies: &BTreeMap<String, Body>) -> bool {
        let mut apart = self.clone();
        let _ = apart.visit(&mut Apart(bodies));
        match apart {
            Self::Value(value) => may_raise(&value),
            Self::Rows(subquery) => may_raise(&Expr::Exists { subquery, negated: false }),
        }
    }

    pub fn visit<V: VisitorMut>(&mut self, visitor: &mut V) -> ControlFlow<V::Break> {
        match self {
            Self::Value(value) => VisitMut::visit(&mut **value, visitor),
            Self::Rows(rows) => VisitMut::visit(&mut **rows, visitor),
        }
    }
}

/// Puts calls that raise nothing in the place of calls that are replaced later, or else left to PostgreSQL with all that is around them.
struct Apart<'a>(&'a BTreeMap<String, Body>);

impl VisitorMut for Apart<'_> {
    type Break = ();

    fn pre_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<()> {
        if let Expr::Function(Function { name, .. }) = expr
            && self.0.contains_key(&written(name))
        {
            *name = ObjectName::from(vec![Ident::new("coalesce")]);
        }
        ControlFlow::Continue(())
    }
}

/// The names of tables in a body.
pub(super) struct Names {
    /// The new name of each.
    pub tables: BTreeMap<String, Ident>,
    /// The name of the only table of the outer query, which its columns are not qualified with.
    only: Option<String>,
}

impl Names {
    pub fn of(filled: &Filled, body: &Body) -> Result<Self, Unsupported> {
        let (names, only) = match filled {
            Filled::Value(value) => (names_of_tables(&**value), None),
            Filled::Rows(rows) => {
                let from = match &*rows.body {
                    SetExpr::Select(select) => select.from.as_slice(),
                    _ => &[],
                };
                let only = match from {
                    [one] if one.joins.is_empty() => shown(&one.relation),
                    _ => None,
                };
                (names_of_tables(&**rows), only)
            }
        };
        if names.contains(&body.function) {
            return Err(unsupported("a table in its body has the name of the function"));
        }
        let tables = names.into_iter().map(|name| (name, Ident::new(""))).collect();
        Ok(Self { tables, only })
    }
}

/// Puts arguments in the place of parameters, and gives tables their new names.
pub(super) struct Parameters<'a> {
    pub body: &'a Body,
    pub names: &'a Names,
    pub arguments: &'a [Expr],
    pub used: Vec<bool>,
    pub queries: usize,
}

impl Parameters<'_> {
    fn parameter(&mut self, at: Option<usize>) -> Result<Expr, &'static str> {
        let at =
            at.filter(|at| *at < self.arguments.len()).ok_or("its body reads a name that is not known")?;
        self.used[at] = true;
        Ok(*nest(self.arguments[at].clone()))
    }

    fn named(&self, name: &Ident) -> Option<usize> {
        self.body.names.iter().position(|known| !known.is_empty() && *known == name.value)
    }

    /// Whether the expression reads a table of the body. With a parameter alone, it would belong to the query of its argument.
    fn reads_a_row(&self, expr: &Expr) -> bool {
        struct Reads<'a>(&'a Names);
        impl Visitor for Reads<'_> {
            type Break = ();

            fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<()> {
                let reads = match expr {
                    Expr::Identifier(_) => self.0.only.is_some(),
                    Expr::CompoundIdentifier(parts) => {
                        parts.first().is_some_and(|of| self.0.tables.contains_key(&of.value))
                    }
                    _ => false,
                };
                if reads { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            }
        }
        let counts_rows = matches!(expr, Expr::Function(Function { args: FunctionArguments::List(list), .. })
            if matches!(list.args.as_slice(), [FunctionArg::Unnamed(FunctionArgExpr::Wildcard)]));
        counts_rows || Visit::visit(expr, &mut Reads(self.names)).is_break()
    }

    fn replace(&mut self, expr: &mut Expr) -> Result<(), &'static str> {
        let replaced = match &mut *expr {
            Expr::Identifier(name) => match (&self.names.only, self.queries) {
                // The outer query of a body with one table.
                (Some(only), 1) => {
                    Expr::CompoundIdentifier(vec![self.names.tables[only].clone(), name.clone()])
                }
                (None, 0) => {
                    let at = self.named(name);
                    self.parameter(at)?
                }
                _ => return Err("its body reads a merged column"),
            },
            Expr::CompoundIdentifier(parts) => match parts.as_mut_slice() {
                [of, name] => match self.names.tables.get(&of.value) {
                    Some(alias) => {
                        *of = alias.clone();
                        return Ok(());
                    }
                    None if of.value == self.body.function => {
                        let at = self.named(name);
                        self.parameter(at)?
                    }
                    None => return Err("its body reads a name that is not known"),
                },
                _ => return Err("its body reads a field of a row"),
            },
            Expr::Value(ValueWithSpan { value: Value::Placeholder(number), .. }) => {
                let at =
                    number.trim_start_matches('$').parse::<usize>().ok().and_then(|at| at.checked_sub(1));
                self.parameter(at)?
            }
            Expr::CompoundFieldAccess { .. } | Expr::QualifiedWildcard(..) | Expr::Wildcard(_) => {
                return Err("its body reads a whole row");
            }
            _ => return Ok(()),
        };
        *expr = replaced;
        Ok(())
    }
}

impl VisitorMut for Parameters<'_> {
    type Break = &'static str;

    fn pre_visit_query(&mut self, _: &mut Query) -> ControlFlow<&'static str> {
        self.queries += 1;
        ControlFlow::Continue(())
    }

    fn post_visit_query(&mut self, _: &mut Query) -> ControlFlow<&'static str> {
        self.queries -= 1;
        ControlFlow::Continue(())
    }

    fn pre_visit_table_factor(&mut self, factor: &mut TableFactor) -> ControlFlow<&'static str> {
        let Some(known) = shown(factor) else { return ControlFlow::Continue(()) };
        let unique = self.names.tables[&known].clone();
        match factor {
            TableFactor::Table { alias, args: None, .. } => match alias {
                Some(alias) if alias.columns.is_empty() => alias.name = unique,
                Some(_) => return ControlFlow::Break("its body gives columns of a table other names"),
                None => {
                    *alias = Some(TableAlias { explicit: true, name: unique, columns: Vec::new(), at: None });
                }
            },
            TableFactor::Table { alias: Some(alias), .. }
            | TableFactor::Function { alias: Some(alias), .. }
            | TableFactor::Derived { alias: Some(alias), .. } => alias.name = unique,
            _ => return ControlFlow::Break("its body reads something else than tables"),
        }
        ControlFlow::Continue(())
    }

    /// Before the visit of its parts, which replaces them.
    fn pre_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<&'static str> {
        match is_aggregate(expr) && !self.reads_a_row(expr) {
            true => ControlFlow::Break("an aggregate in its body may be of another query"),
            false => ControlFlow::Continue(()),
        }
    }

    /// After the visit of its parts, so that an argument is not visited.
    fn post_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<&'static str> {
        match self.replace(expr) {
            Ok(()) => ControlFlow::Continue(()),
            Err(why) => ControlFlow::Break(why),
        }
    }
}

/// Returns the name by which a query shows a table.
fn shown(factor: &TableFactor) -> Option<String> {
    match factor {
        TableFactor::Table { name, alias, .. } => Some(match alias {
            Some(alias) => alias.name.value.clone(),
            None => last_part(name).to_owned(),
        }),
        TableFactor::Derived { alias, .. }
        | TableFactor::Function { alias, .. }
        | TableFactor::UNNEST { alias, .. }
        | TableFactor::NestedJoin { alias, .. } => alias.as_ref().map(|alias| alias.name.value.clone()),
        _ => None,
    }
}

pub(super) fn names_of_tables(of: &impl Visit) -> BTreeSet<String> {
    struct Found(BTreeSet<String>);
    impl Visitor for Found {
        type Break = ();

        fn pre_visit_table_factor(&mut self, factor: &TableFactor) -> ControlFlow<()> {
            self.0.extend(shown(factor));
            ControlFlow::Continue(())
        }
    }
    let mut found = Found(BTreeSet::new());
    let _ = of.visit(&mut found);
    found.0
}
