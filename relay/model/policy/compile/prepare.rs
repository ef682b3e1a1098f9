//! What a policy reads is put into it before it is compiled: bodies of functions, and row security of tables.

use std::borrow::Cow;
use std::collections::BTreeMap;

use sqlparser::ast::Expr;

use super::inline::{self, Whose};
use super::row_security::{self, Refused};
use crate::model::policy::rights::Rights;

/// Replaces calls of functions by their bodies, and adds the row security of the tables that the policy and functions of the caller look
/// into; the bodies of definers are put in last, because they read past it. Returns the rights with which the policy is compiled then.
/// Fails with the table whose row security is recursive.
pub(super) fn prepared<'a>(
    policy: &str,
    written: &Expr,
    table: &str,
    rights: &'a Rights,
) -> Result<(Expr, Cow<'a, Rights>), String> {
    let mut expr = written.clone();
    let callers = inline::inline(&mut expr, table, rights, Whose::Callers);
    let (mut expr, mut rights) = match with_row_security(&policy_text(policy, &expr, &callers), &expr, rights)
    {
        Ok(expanded) => expanded,
        // PostgreSQL raises only when the function is called, so it is asked.
        Err(_) if !rights.bodies.is_empty() => {
            let without = Rights { bodies: BTreeMap::new(), ..rights.clone() };
            let (expr, rights) = with_row_security(policy, written, &without)?;
            return Ok((expr, Cow::Owned(rights.into_owned())));
        }
        Err(table) => return Err(table),
    };
    // A table whose row security is not added may be read by nothing then.
    if !rights.not_added.is_empty() {
        return Ok((expr, rights));
    }
    let before = expr.clone();
    let all = inline::inline(&mut expr, table, &rights, Whose::Definers);
    let is_other_role = rights.as_other_role || all.past;
    if all.calls == 0 && all.left.is_empty() && callers.left.is_empty() {
        return Ok((expr, rights));
    }
    let changed = rights.to_mut();
    changed.not_replaced.extend(callers.left);
    changed.not_replaced.extend(all.left);
    if is_other_role && changed.reads_as.is_none() {
        let why = "the evaluating login has no role that reads what its owner may: grant it one with BYPASSRLS and SELECT";
        changed.not_replaced.extend(changed.bodies.keys().map(|name| (name.clone(), why.to_owned())));
        return Ok((before, rights));
    }
    changed.as_other_role = is_other_role;
    changed.tables.extend(all.tables);
    Ok((expr, rights))
}

/// Returns the policy with what was put in, for a search of names that it uses.
fn policy_text(policy: &str, expr: &Expr, inlined: &inline::Inlined) -> String {
    match inlined.calls {
        0 => policy.to_owned(),
        _ => format!("{policy} {expr}"),
    }
}

/// Adds the row security of the tables that the policy looks into, and returns the rights with which it is compiled then. Where
/// this is not possible, the policy stays as it is. Fails with the table whose row security is recursive.
fn with_row_security<'a>(
    policy: &str,
    expr: &Expr,
    rights: &'a Rights,
) -> Result<(Expr, Cow<'a, Rights>), String> {
    if !row_security::reads_secured(expr, rights) {
        return Ok((expr.clone(), Cow::Borrowed(rights)));
    }
    let mut changed = rights.clone();
    match row_security::expand(policy, expr, rights) {
        Err(Refused::Recursive(table)) => return Err(table),
        Err(Refused::Unsupported { table, why }) => {
            changed.not_added.insert(table, why);
        }
        Ok(_) if rights.reads_as.is_none() => {
            let why = "the evaluating login has no role that reads it without: grant it one with BYPASSRLS and SELECT";
            changed.not_added.extend(rights.secured.keys().map(|table| (table.clone(), why.to_owned())));
        }
        Ok(expanded) => {
            changed.tables.extend(expanded.tables);
            changed.as_other_role = true;
            return Ok((expanded.expr, Cow::Owned(changed)));
        }
    }
    Ok((expr.clone(), Cow::Owned(changed)))
}
