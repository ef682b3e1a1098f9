//! The probe: the claim expressions of a policy, evaluated before any row. Where one raises, PostgreSQL shows nothing of the
//! table, whatever the rows are.
//!
//! PostgreSQL evaluates such expressions when it plans a query, or for the first row that needs them, and then the whole query
//! fails. Evaluation on a row image may never need them. A `case` guarded by claims stays guarded, as in PostgreSQL.

use std::ops::ControlFlow;

use sqlparser::ast::{Expr, Function, Query, Value, Visit, VisitMut, Visitor, VisitorMut};

use crate::model::policy::compile::dependencies::{dependencies, written};
use crate::model::policy::rights::Rights;

/// Functions that are allowed in a probe: they return one value and read no table.
const SCALAR_FUNCTIONS: &[&str] = &[
    "btrim",
    "coalesce",
    "current_setting",
    "length",
    "lower",
    "ltrim",
    "nullif",
    "replace",
    "rtrim",
    "split_part",
    "upper",
];

/// Returns a condition that holds unless it raises; `None` when the policy has no such expression.
pub(super) fn probe(policy: &Expr, rights: &Rights) -> Option<String> {
    let parts = parts(policy, rights);
    (!parts.is_empty()).then(|| format!("array[{}] is not null", parts.join(", ")))
}

/// Returns the claim expressions as conditions, each true or false.
fn parts(policy: &Expr, rights: &Rights) -> Vec<String> {
    let mut reads = ClaimReads { rights, parts: Vec::new() };
    let _ = VisitMut::visit(&mut policy.clone(), &mut reads);
    reads.parts
}

struct ClaimReads<'a> {
    rights: &'a Rights,
    parts: Vec<String>,
}

impl ClaimReads<'_> {
    fn reads_only_claims(&self, expr: &Expr) -> bool {
        let mut visitor = ReadsOther { rights: self.rights, found: false };
        let _ = Visit::visit(expr, &mut visitor);
        !visitor.found && dependencies(expr, self.rights).claims
    }

    /// Returns a `case` whose guards read only claims.
    fn guarded(&self, expr: &Expr) -> Option<String> {
        let Expr::Case { operand: None, conditions, else_result, .. } = expr else { return None };
        let of = |result: &Expr| probe(result, self.rights).unwrap_or_else(|| String::from("true"));
        let mut text = String::from("case");
        for branch in conditions {
            if !self.reads_only_claims(&branch.condition) {
                return None;
            }
            text += &format!(" when {} then {}", branch.condition, of(&branch.result));
        }
        let otherwise = else_result.as_deref().map_or_else(|| String::from("true"), of);
        Some(format!("{text} else {otherwise} end"))
    }
}

impl VisitorMut for ClaimReads<'_> {
    type Break = ();

    fn pre_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<()> {
        let part = match self.reads_only_claims(expr) {
            true => Some(format!("({expr}) is null")),
            false => self.guarded(expr),
        };
        if let Some(part) = part {
            if !self.parts.contains(&part) {
                self.parts.push(part);
            }
            *expr = Expr::value(Value::Null);
        }
        ControlFlow::Continue(())
    }
}

/// Finds columns, queries, and functions outside the list.
struct ReadsOther<'a> {
    rights: &'a Rights,
    found: bool,
}

impl Visitor for ReadsOther<'_> {
    type Break = ();

    fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<()> {
        self.found |= match expr {
            Expr::Identifier(_)
            | Expr::CompoundIdentifier(_)
            | Expr::CompoundFieldAccess { .. }
            | Expr::Wildcard(_)
            | Expr::QualifiedWildcard(..) => true,
            Expr::Function(Function { name, .. }) => {
                let written = written(name);
                let bare = written
                    .strip_prefix("pg_catalog.")
                    .unwrap_or(&written)
                    .trim_matches('"')
                    .to_ascii_lowercase();
                !self.rights.helpers.contains_key(&written) && !SCALAR_FUNCTIONS.contains(&bare.as_str())
            }
            _ => false,
        };
        if self.found { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<()> {
        // `(select auth.uid())` is one expression; queries with tables are visited on their own.
        match crate::model::policy::compile::list::only_expression(query) {
            Some(_) => ControlFlow::Continue(()),
            None => {
                self.found = true;
                ControlFlow::Break(())
            }
        }
    }
}
