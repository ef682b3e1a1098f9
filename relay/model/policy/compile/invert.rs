//! Inversion of sub-selects, from "may this reader see the row?" to "which readers may?", so that PostgreSQL can start from the
//! row.
//!
//! `exists (select from members m where m.team = t.team and m.user_id = auth.uid())` becomes a query with the readers as another
//! table: `… from members m where m.team = t.team and m.user_id = reader.v0`. It is joined and not nested, so the planner can go
//! by index from the row to its members, and from those to the connected readers.

use std::borrow::Cow;
use std::ops::ControlFlow;

use sqlparser::ast::{
    BinaryOperator, Distinct, Expr, Ident, JoinConstraint, JoinOperator, LimitClause, ObjectName, Query,
    Select, SelectItem, SetExpr, TableFactor, TableWithJoins, Value, visit_expressions,
};

use super::dependencies::{dependencies, written};
use super::list::{only_expression, plain_select};
use super::operand::{Operand, Type};
use super::rewrite::binary;
use super::row_security::may_raise;
use super::{Compiler, Unsupported, operands_of, parser, unsupported};
use crate::model::policy::plan::{READER, ServerQuery};
use crate::model::policy::rights::Rights;
use crate::model::row::datum::Kind;

/// The claims that a query reads of its readers.
#[derive(Default)]
struct Readers {
    by: Vec<(usize, Kind)>,
    /// Whether an index can find readers by each claim.
    indexed: Vec<bool>,
    /// The number of sub-selects that were joined so far, for their aliases.
    laterals: usize,
}

impl Readers {
    fn column(&mut self, claim: usize, kind: Kind) -> Expr {
        let at = self.by.iter().position(|known| *known == (claim, kind)).unwrap_or_else(|| {
            self.by.push((claim, kind));
            self.indexed.push(false);
            self.by.len() - 1
        });
        Expr::CompoundIdentifier(vec![Ident::with_quote('"', READER), Ident::new(format!("v{at}"))])
    }
}

impl Compiler<'_> {
    /// Compiles a condition on the reader's claims to a query for all readers. Returns the query's index.
    pub(super) fn invert(&self, expr: &Expr, lenient: bool, why: Unsupported) -> Result<usize, Unsupported> {
        let same = || self.as_list(expr).or_else(|| self.as_exists(expr)).or_else(|| self.as_condition(expr));
        if let Some(found) = lenient.then(same).flatten() {
            return self.invert(&found, lenient, why);
        }
        match expr {
            Expr::Nested(inner) => self.invert(inner, lenient, why),
            Expr::Exists { subquery, negated: false } => self.membership_query(&without_limit(subquery), &[]),
            // Below `not`, false and null differ, but both would be "not found" here.
            _ if !lenient => Err(unsupported(
                "under `not`, `is` or `case`, PostgreSQL cannot evaluate it for all readers at once",
            )),
            Expr::InSubquery { expr, subquery, negated: false } => {
                let mut wanted = (**expr).clone();
                self.qualify(&mut wanted);
                self.membership_query(subquery, values(&wanted))
            }
            Expr::BinaryOp { left, op: BinaryOperator::Eq, right } => {
                for (claim, value) in [(left, right), (right, left)] {
                    if let Ok(Operand::Claim(claim, Type::Known(kind))) = self.operand(claim)
                        && !dependencies(&**value, self.rights).claims
                    {
                        let by = (self.claim_index(claim), kind);
                        return Ok(
                            self.query_index(ServerQuery::Equals { expression: value.to_string(), by })
                        );
                    }
                }
                Err(why)
            }
            _ => Err(why),
        }
    }

    fn membership_query(&self, query: &Query, wanted: &[Expr]) -> Result<usize, Unsupported> {
        let mut readers = Readers::default();
        let query = self.invert_query(query, wanted, &mut readers)?;
        if readers.by.is_empty() || !readers.indexed.iter().all(|indexed| *indexed) {
            return Err(unsupported(
                "it does not compare the claim by `=` with a column in a `where` whose parts are joined by `and`, \
                 so no index leads from the row to its readers",
            ));
        }
        Ok(self.query_index(ServerQuery::Found { query: query.to_string(), by: readers.by }))
    }

    /// Inverts a query. `wanted` are the values that its result has to equal.
    fn invert_query(
        &self,
        query: &Query,
        wanted: &[Expr],
        readers: &mut Readers,
    ) -> Result<Query, Unsupported> {
        let not_plain = || unsupported("it is more than `select … from … where …`");
        let select = plain_select(query).ok_or_else(not_plain)?;
        // An aggregate returns a row without input, and a set-returning function several or none: neither means that a row was
        // found.
        if !select.projection.iter().all(|item| self.is_row_value(item))
            || matches!(select.distinct, Some(Distinct::On(_)))
        {
            return Err(not_plain());
        }
        let mut conditions = Vec::new();
        if let Some(selection) = &select.selection {
            conjuncts(selection, &mut conditions);
        }
        if !wanted.is_empty() && wanted.len() != select.projection.len() {
            return Err(not_plain());
        }
        for (wanted, item) in wanted.iter().zip(&select.projection) {
            let given = selected(item).ok_or_else(not_plain)?;
            conditions.push(binary(wanted.clone(), BinaryOperator::Eq, given.clone()));
        }
        let mut inverted: Select = select.clone();
        inverted.distinct = None;
        inverted.projection =
            vec![SelectItem::UnnamedExpr(Expr::value(Value::Number(String::from("1"), false)))];
        inverted.from.iter().try_for_each(require_tables)?;
        let mut rest = Vec::new();
        for condition in conditions {
            self.invert_condition(condition, &mut inverted.from, &mut rest, readers)?;
        }
        self.replace_claims(&mut inverted.from, &mut |claim, kind| readers.column(claim, kind));
        inverted.from.iter().for_each(|source| mark_joined(source, readers));
        inverted.selection = rest.into_iter().reduce(|left, right| Expr::BinaryOp {
            left: nest(left),
            op: BinaryOperator::And,
            right: nest(right),
        });
        let mut query = query.clone();
        query.order_by = None;
        *query.body = SetExpr::Select(Box::new(inverted));
        match dependencies(&query, self.rights).claims {
            true => Err(unsupported("it reads claims in an expression that only PostgreSQL evaluates")),
            false => Ok(query),
        }
    }

    /// Joins a sub-select to the tables in `from`; adds any other condition to `rest`, with the claims replaced.
    fn invert_condition(
        &self,
        condition: Expr,
        from: &mut Vec<TableWithJoins>,
        rest: &mut Vec<Expr>,
        readers: &mut Readers,
    ) -> Result<(), Unsupported> {
        let found = self.as_list(&condition).or_else(|| self.as_exists(&condition));
        match found.unwrap_or(condition) {
            condition if !dependencies(&condition, self.rights).claims => rest.push(condition),
            Expr::Exists { subquery, negated: false } => {
                let inner = self.invert_query(&without_limit(&subquery), &[], readers)?;
                from.push(lateral(&inner, &mut readers.laterals)?);
            }
            Expr::InSubquery { expr, subquery, negated: false } if only_expression(&subquery).is_none() => {
                // An unqualified name is a column merged by a join; inside the sub-select it could be another table's.
                if has_unqualified_names(&expr) {
                    return Err(unsupported("it compares a column that a join merged"));
                }
                let inner = self.invert_query(&subquery, values(&expr), readers)?;
                from.push(lateral(&inner, &mut readers.laterals)?);
            }
            mut condition => {
                self.replace_claims(&mut condition, &mut |claim, kind| readers.column(claim, kind));
                mark_indexed(&condition, readers);
                rest.push(condition);
            }
        }
        Ok(())
    }

    /// Returns the sub-select once for each operand of an `or` in its `where` that reads claims; it finds a row if one of them does.
    /// `None` if there is no such `or`, or if one operand may keep PostgreSQL from evaluating another that raises.
    pub(super) fn alternatives(&self, expr: &Expr) -> Option<Vec<Expr>> {
        let mut parts = Vec::new();
        let (Expr::Exists { subquery, negated: false } | Expr::InSubquery { subquery, negated: false, .. }) =
            bare(expr)
        else {
            return None;
        };
        conjuncts(plain_select(subquery)?.selection.as_ref()?, &mut parts);
        let reads_claims = |part: &Expr| dependencies(part, self.rights).claims;
        let is_choice = |part: &Expr| matches!(part, Expr::BinaryOp { op: BinaryOperator::Or, .. });
        let at = parts.iter().position(|part| is_choice(part) && reads_claims(part))?;
        let choice = parts.remove(at);
        let mut choices = Vec::new();
        operands_of(&choice, &BinaryOperator::Or, &mut choices);
        if choices.iter().any(|choice| !reads_claims(choice) && may_raise(choice)) {
            return None;
        }
        let branch = |choice: &&Expr| {
            let mut branch = bare(expr).clone();
            if let Expr::Exists { subquery, .. } | Expr::InSubquery { subquery, .. } = &mut branch
                && let SetExpr::Select(select) = &mut *subquery.body
            {
                let parts = parts.iter().cloned().chain([(*choice).clone()]);
                select.selection = parts.reduce(|left, right| Expr::BinaryOp {
                    left: nest(left),
                    op: BinaryOperator::And,
                    right: nest(right),
                });
            }
            branch
        };
        Some(choices.iter().map(branch).collect())
    }

    /// Whether the item is a column, constant, claim or wildcard, so that it gives one value for each row.
    pub(super) fn is_row_value(&self, item: &SelectItem) -> bool {
        fn is_plain(expr: &Expr) -> bool {
            match expr {
                Expr::Nested(inner) | Expr::Cast { expr: inner, .. } => is_plain(inner),
                Expr::Identifier(_) | Expr::CompoundIdentifier(_) | Expr::Value(_) => true,
                _ => false,
            }
        }
        match item {
            SelectItem::UnnamedExpr(expr) | SelectItem::ExprWithAlias { expr, .. } => {
                is_plain(expr) || self.function_body().operand(expr).is_ok()
            }
            SelectItem::Wildcard(_) | SelectItem::QualifiedWildcard(..) => true,
            SelectItem::ExprWithAliases { .. } => false,
        }
    }

    /// Qualifies the table's columns, because the expression moves to where other tables are.
    pub(super) fn qualify(&self, expr: &mut Expr) {
        let table = self.table;
        let _ = sqlparser::ast::visit_expressions_mut(expr, |expr| {
            if let Expr::Identifier(column) = expr {
                let column = Ident::with_quote('"', column.value.clone());
                *expr = Expr::CompoundIdentifier(vec![Ident::with_quote('"', table.to_owned()), column]);
            }
            ControlFlow::<()>::Continue(())
        });
    }
}

/// Whether the query is `select … from one_table where its_unique_column = value and …`, whose value no row of the table gives.
pub(super) fn finds_one_row(query: &Query, rights: &Rights) -> bool {
    let Some((select, selection)) =
        plain_select(query).and_then(|select| Some((select, select.selection.as_ref()?)))
    else {
        return false;
    };
    let [TableWithJoins { relation: TableFactor::Table { name, alias, args: None, .. }, joins }] =
        select.from.as_slice()
    else {
        return false;
    };
    let Some(unique) = rights.unique.get(&written(name)).filter(|_| joins.is_empty()) else {
        return false;
    };
    let table = alias.as_ref().map_or_else(|| last_part(name), |alias| &alias.name.value);
    let mut conditions = Vec::new();
    conjuncts(selection, &mut conditions);
    let claims = Compiler::of("", &[], rights).function_body();
    conditions.iter().any(|condition| {
        let Expr::BinaryOp { left, op: BinaryOperator::Eq, right } = condition else { return false };
        [(left, right), (right, left)].into_iter().any(|(column, value)| {
            matches!(bare(column), Expr::CompoundIdentifier(parts) if matches!(parts.as_slice(),
                [of, column] if of.value == table && unique.contains(&column.value)))
                && (claims.operand(value).is_ok() || matches!(uncast(value),
                    Expr::CompoundIdentifier(parts) if matches!(parts.as_slice(), [of, _] if of.value != table)))
        })
    })
}

/// Returns the values of a row, or the only one.
fn values(expr: &Expr) -> &[Expr] {
    match expr {
        Expr::Tuple(values) => values,
        one => std::slice::from_ref(one),
    }
}

pub(super) fn selected(item: &SelectItem) -> Option<&Expr> {
    match item {
        SelectItem::UnnamedExpr(expr) | SelectItem::ExprWithAlias { expr, .. } => Some(expr),
        _ => None,
    }
}

pub(super) fn nest(expr: Expr) -> Box<Expr> {
    Box::new(match expr {
        nested @ Expr::Nested(_) => nested,
        other => Expr::Nested(Box::new(other)),
    })
}

/// Returns the query without `limit n`, which makes no difference to whether it finds a row.
fn without_limit(query: &Query) -> Cow<'_, Query> {
    let Some(LimitClause::LimitOffset { limit: Some(limit), offset: None, limit_by }) = &query.limit_clause
    else {
        return Cow::Borrowed(query);
    };
    let is_some = matches!(limit, Expr::Value(value) if matches!(&value.value,
        Value::Number(count, _) if count.parse::<u32>().is_ok_and(|count| count > 0)));
    match is_some && limit_by.is_empty() {
        true => Cow::Owned(Query { limit_clause: None, ..query.clone() }),
        false => Cow::Borrowed(query),
    }
}

pub(super) fn bare(expr: &Expr) -> &Expr {
    match expr {
        Expr::Nested(inner) => bare(inner),
        other => other,
    }
}

pub(super) fn uncast(expr: &Expr) -> &Expr {
    match expr {
        Expr::Nested(inner) | Expr::Cast { expr: inner, .. } => uncast(inner),
        other => other,
    }
}

fn conjuncts(expr: &Expr, list: &mut Vec<Expr>) {
    match expr {
        Expr::Nested(inner) => conjuncts(inner, list),
        Expr::BinaryOp { left, op: BinaryOperator::And, right } => {
            conjuncts(left, list);
            conjuncts(right, list);
        }
        other => list.push(other.clone()),
    }
}

/// Marks claims that equal a value without claims: an index can find the readers from that value.
fn mark_indexed(condition: &Expr, readers: &mut Readers) {
    let Expr::BinaryOp { left, op: BinaryOperator::Eq, right } = condition else { return };
    for (reader, other) in [(left, right), (right, left)] {
        let mut reader = &**reader;
        while let Expr::Nested(inner) = reader {
            reader = inner;
        }
        let Expr::CompoundIdentifier(parts) = reader else { continue };
        let [table, column] = parts.as_slice() else { continue };
        if table.value == READER && !other.to_string().contains(READER) {
            let at = column.value.strip_prefix('v').and_then(|at| at.parse::<usize>().ok());
            if let Some(indexed) = at.and_then(|at| readers.indexed.get_mut(at)) {
                *indexed = true;
            }
        }
    }
}

/// The same for the conditions of inner joins.
fn mark_joined(source: &TableWithJoins, readers: &mut Readers) {
    let mut conditions = Vec::new();
    for join in &source.joins {
        if let JoinOperator::Join(JoinConstraint::On(on)) | JoinOperator::Inner(JoinConstraint::On(on)) =
            &join.join_operator
        {
            conjuncts(on, &mut conditions);
        }
    }
    conditions.iter().for_each(|condition| mark_indexed(condition, readers));
    for factor in std::iter::once(&source.relation).chain(source.joins.iter().map(|join| &join.relation)) {
        if let TableFactor::NestedJoin { table_with_joins, .. } = factor {
            mark_joined(table_with_joins, readers);
        }
    }
}

fn has_unqualified_names(expr: &Expr) -> bool {
    visit_expressions(expr, |expr| match expr {
        Expr::Identifier(_) => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    })
    .is_break()
}

fn require_tables(source: &TableWithJoins) -> Result<(), Unsupported> {
    let factors = std::iter::once(&source.relation).chain(source.joins.iter().map(|join| &join.relation));
    for factor in factors {
        match factor {
            TableFactor::Table { name, args: None, alias, .. }
                if !is_reserved_name(
                    alias.as_ref().map_or_else(|| last_part(name), |alias| &alias.name.value),
                ) => {}
            TableFactor::NestedJoin { table_with_joins, .. } => require_tables(table_with_joins)?,
            other => return Err(unsupported(&format!("{other} is not a table"))),
        }
    }
    Ok(())
}

pub(super) fn last_part(name: &ObjectName) -> &str {
    name.0.last().and_then(|part| part.as_ident()).map_or("", |part| &part.value)
}

/// Whether the relay's own statements use the name.
pub(super) fn is_reserved_name(name: &str) -> bool {
    name.starts_with("relay ")
}

fn lateral(query: &Query, count: &mut usize) -> Result<TableWithJoins, Unsupported> {
    *count += 1;
    let text = format!("LATERAL ({query}) AS \"relay nested {count}\"");
    parser(&text)?.parse_table_and_joins().map_err(|error| Unsupported(error.to_string()))
}
