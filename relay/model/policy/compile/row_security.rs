//! Row security of the tables that a policy looks into: PostgreSQL adds their policies to each look, and so does the relay.
//!
//! `exists (select from members m where m.team = t.team)` becomes `… where (m.user_id = auth.uid()) and (m.team = t.team)`, when
//! `user_id = auth.uid()` is the policy of `members` for the role. A role without row security then evaluates the query for all
//! readers at once.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use sqlparser::ast::{
    BinaryOperator, DataType, Expr, Ident, Join, JoinConstraint, JoinOperator, Query, Select, TableAlias,
    TableFactor, TableWithJoins, UnaryOperator, Value, Visit, VisitMut, Visitor, VisitorMut,
};

use super::dependencies::written;
use super::inline::{Whose, inline};
use super::invert::{last_part, nest};
use super::parse;
use crate::model::policy::rights::{Rights, SecuredTable};

/// The maximum nesting of policies of tables that other policies look into.
const MAX_NESTING: usize = 4;
/// The maximum number of policies that are added to one policy.
const MAX_POLICIES: usize = 16;
/// The maximum length of an added policy, which bounds the depth of the tree.
const MAX_LENGTH: usize = 2000;

/// A policy with the policies of the tables that it looks into.
#[derive(Debug)]
pub(super) struct Expanded {
    pub expr: Expr,
    /// The tables whose policies were added.
    pub tables: BTreeSet<String>,
}

/// Why the policies cannot be added.
#[derive(Debug)]
pub(super) enum Refused {
    /// The policy of this table reads the table itself, directly or by other policies: PostgreSQL raises for every query.
    Recursive(String),
    /// The relay does not model the policy of this table, or how it is looked into.
    Unsupported { table: String, why: String },
}

/// Adds the policies of the tables that the policy looks into.
pub(super) fn expand(policy: &str, expr: &Expr, rights: &Rights) -> Result<Expanded, Refused> {
    let mut expander =
        Expander { policy, rights, open: Vec::new(), aliases: 0, tables: BTreeSet::new(), added: 0 };
    let mut expr = expr.clone();
    match VisitMut::visit(&mut expr, &mut expander) {
        ControlFlow::Break(refused) => Err(refused),
        ControlFlow::Continue(()) => Ok(Expanded { expr, tables: expander.tables }),
    }
}

struct Expander<'a> {
    policy: &'a str,
    rights: &'a Rights,
    /// The tables whose policies are being added, from the outside.
    open: Vec<String>,
    /// The number of aliases tried so far.
    aliases: usize,
    tables: BTreeSet<String>,
    added: usize,
}

impl VisitorMut for Expander<'_> {
    type Break = Refused;

    /// After the visit of its parts, because the added policies are complete already.
    fn post_visit_select(&mut self, select: &mut Select) -> ControlFlow<Refused> {
        let mut conditions = Vec::new();
        for source in &mut select.from {
            match self.source(source) {
                Ok(found) => conditions.extend(found),
                Err(refused) => return ControlFlow::Break(refused),
            }
        }
        // First, as PostgreSQL evaluates them.
        conditions.extend(select.selection.take());
        select.selection = conditions.into_iter().reduce(both);
        ControlFlow::Continue(())
    }
}

impl Expander<'_> {
    /// Returns the conditions on the rows of joined tables, except those that belong to a join and were added to it.
    fn source(&mut self, source: &mut TableWithJoins) -> Result<Vec<Expr>, Refused> {
        let mut conditions = self.factor(&mut source.relation)?;
        let mut joined = Vec::new();
        for join in &mut source.joins {
            let found = self.factor(&mut join.relation)?;
            joined.extend(found.iter().cloned());
            let Some(condition) = found.into_iter().reduce(both) else { continue };
            match &mut join.join_operator {
                JoinOperator::Left(JoinConstraint::On(on))
                | JoinOperator::LeftOuter(JoinConstraint::On(on)) => {
                    *on = both(condition, on.clone());
                }
                JoinOperator::Left(_) | JoinOperator::LeftOuter(_) => {
                    return Err(self.refused("it is joined by `left join … using`"));
                }
                _ => conditions.push(condition),
            }
        }
        let is_known = |join: &Join| {
            use JoinOperator::{CrossJoin, Inner, Join, Left, LeftOuter};
            matches!(join.join_operator, Join(_) | Inner(_) | CrossJoin(_) | Left(_) | LeftOuter(_))
        };
        if (conditions.is_empty() && joined.is_empty()) || source.joins.iter().all(is_known) {
            Ok(conditions)
        } else {
            Err(self.refused("it is part of a right or full join"))
        }
    }

    fn factor(&mut self, factor: &mut TableFactor) -> Result<Vec<Expr>, Refused> {
        match factor {
            TableFactor::Table { name, alias, args: None, sample, .. } => {
                let table = written(name);
                if table == self.rights.name || self.open.contains(&table) {
                    return Err(Refused::Recursive(table));
                }
                let rights = self.rights;
                let Some(secured) = rights.secured.get(&table) else { return Ok(Vec::new()) };
                let shown = match alias {
                    Some(alias) => alias.name.clone(),
                    None => Ident::with_quote('"', last_part(name)),
                };
                self.open.push(table);
                if sample.is_some() || alias.as_ref().is_some_and(|alias| !alias.columns.is_empty()) {
                    return Err(self.refused("the policy gives its columns other names or samples its rows"));
                }
                let condition = self.condition(secured, &shown)?;
                self.tables.extend(self.open.pop());
                Ok(vec![condition])
            }
            TableFactor::NestedJoin { table_with_joins, alias } => {
                let conditions = self.source(table_with_joins)?;
                match alias {
                    Some(_) if !conditions.is_empty() => {
                        Err(self.refused("it is part of a join with a name"))
                    }
                    _ => Ok(conditions),
                }
            }
            _ => Ok(Vec::new()),
        }
    }

    /// Returns the policy of a table, for the rows that have this name in the query.
    fn condition(&mut self, secured: &SecuredTable, shown: &Ident) -> Result<Expr, Refused> {
        self.added += 1;
        if self.open.len() > MAX_NESTING || self.added > MAX_POLICIES || secured.policy.len() > MAX_LENGTH {
            return Err(self
                .refused("the policies of the tables that it looks into are too long or too deeply nested"));
        }
        // A whole row, whose name would have to be replaced, too.
        if secured.policy.contains(".*") {
            return Err(self.refused("its policy reads a whole row"));
        }
        let mut expr = parse(&secured.policy).map_err(|why| self.refused(&why.0))?;
        let mut read = expr.clone();
        inline(&mut read, &secured.table, self.rights, Whose::Callers);
        inline(&mut read, &secured.table, self.rights, Whose::Definers);
        if may_raise(&read) {
            return Err(self.refused(
                "its policy may raise an error for a row, which then ends every query that reads this row",
            ));
        }
        inline(&mut expr, &secured.table, self.rights, Whose::Callers);
        let mut named = Named { expander: self, names: BTreeMap::new() };
        if let ControlFlow::Break(refused) = VisitMut::visit(&mut expr, &mut named) {
            return Err(refused);
        }
        let names = named.names;
        let mut qualified = Qualified { secured, shown, names: &names, queries: 0 };
        if let ControlFlow::Break(why) = VisitMut::visit(&mut expr, &mut qualified) {
            return Err(self.refused(why));
        }
        match VisitMut::visit(&mut expr, self) {
            ControlFlow::Break(refused) => Err(refused),
            ControlFlow::Continue(()) => Ok(*nest(expr)),
        }
    }

    /// Returns an alias that no policy uses.
    fn alias(&mut self) -> Ident {
        loop {
            self.aliases += 1;
            let name = format!("read {}", self.aliases);
            let is_used = |text: &str| text.contains(&name);
            if !is_used(self.policy) && !self.rights.secured.values().any(|table| is_used(&table.policy)) {
                return Ident::with_quote('"', name);
            }
        }
    }

    fn refused(&self, why: &str) -> Refused {
        // Outside the policy of another table, only names are unsupported, of any of the tables.
        let table = self.open.last().or_else(|| self.rights.secured.keys().next()).cloned();
        Refused::Unsupported { table: table.unwrap_or_default(), why: why.to_owned() }
    }
}

fn both(one: Expr, other: Expr) -> Expr {
    Expr::BinaryOp { left: nest(one), op: BinaryOperator::And, right: nest(other) }
}

/// Gives the tables in the sub-selects of a policy names that are unique in the query that the policy is added to.
struct Named<'a, 'e> {
    expander: &'a mut Expander<'e>,
    names: BTreeMap<String, Ident>,
}

impl VisitorMut for Named<'_, '_> {
    type Break = Refused;

    fn pre_visit_table_factor(&mut self, factor: &mut TableFactor) -> ControlFlow<Refused> {
        let (name, alias) = match factor {
            TableFactor::Table { name, alias, .. } => (Some(&*name), alias),
            TableFactor::Derived { alias, .. }
            | TableFactor::Function { alias, .. }
            | TableFactor::UNNEST { alias, .. }
            | TableFactor::NestedJoin { alias, .. } => (None, alias),
            other => return ControlFlow::Break(self.expander.refused(&format!("its policy reads {other}"))),
        };
        let known = match (&*alias, name) {
            (Some(alias), _) => alias.name.value.clone(),
            (None, Some(name)) => last_part(name).to_owned(),
            (None, None) => return ControlFlow::Continue(()),
        };
        let expander = &mut *self.expander;
        let unique = self.names.entry(known).or_insert_with(|| expander.alias()).clone();
        match alias {
            Some(alias) => alias.name = unique,
            None => {
                *alias = Some(TableAlias { explicit: true, name: unique, columns: Vec::new(), at: None });
            }
        }
        ControlFlow::Continue(())
    }
}

/// Names the columns in a policy by the name that the table has in the query, and those in its sub-selects by the new names.
struct Qualified<'a> {
    secured: &'a SecuredTable,
    shown: &'a Ident,
    names: &'a BTreeMap<String, Ident>,
    /// The number of sub-selects around the expression.
    queries: usize,
}

impl VisitorMut for Qualified<'_> {
    type Break = &'static str;

    fn pre_visit_query(&mut self, _: &mut Query) -> ControlFlow<&'static str> {
        self.queries += 1;
        ControlFlow::Continue(())
    }

    fn post_visit_query(&mut self, _: &mut Query) -> ControlFlow<&'static str> {
        self.queries -= 1;
        ControlFlow::Continue(())
    }

    fn pre_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<&'static str> {
        match expr {
            Expr::Identifier(column) if self.queries == 0 && self.secured.columns.contains(&column.value) => {
                *expr = Expr::CompoundIdentifier(vec![self.shown.clone(), column.clone()]);
            }
            // In a sub-select, PostgreSQL qualifies all names but those of merged columns.
            Expr::Identifier(_) => return ControlFlow::Break("its policy reads a merged or a system column"),
            Expr::CompoundIdentifier(parts) => match parts.as_mut_slice() {
                [table, column] => match self.names.get(&table.value) {
                    Some(unique) => *table = unique.clone(),
                    None if table.value == self.secured.table
                        && self.secured.columns.contains(&column.value) =>
                    {
                        *table = self.shown.clone();
                    }
                    None => return ControlFlow::Break("its policy reads a column that is not known"),
                },
                _ => return ControlFlow::Break("its policy reads a field of a row"),
            },
            _ => {}
        }
        ControlFlow::Continue(())
    }
}

/// Functions that raise for no argument, among those that policies use on columns.
const QUIET_FUNCTIONS: &[&str] = &[
    "array",
    "array_agg",
    "array_length",
    "bool_and",
    "bool_or",
    "btrim",
    "cardinality",
    "coalesce",
    "count",
    "every",
    "length",
    "lower",
    "ltrim",
    "max",
    "min",
    "nullif",
    "rtrim",
    "starts_with",
    "upper",
];

/// Whether a condition may raise for some row. PostgreSQL reads other rows for a query than the relay, which starts from the row that
/// has changed, and would raise more often. What reads no column raises for a reader and not for a row: the probe finds that.
pub(super) fn may_raise(policy: &Expr) -> bool {
    VisitMut::visit(&mut policy.clone(), &mut Raises).is_break()
}

struct Raises;

impl VisitorMut for Raises {
    type Break = ();

    fn pre_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<()> {
        use BinaryOperator::{And, Arrow, Eq, Gt, GtEq, LongArrow, Lt, LtEq, NotEq, Or, StringConcat};
        if !reads_columns(expr) {
            *expr = Expr::value(Value::Null);
        }
        let is_quiet = match expr {
            Expr::BinaryOp { op, .. }
            | Expr::AnyOp { compare_op: op, .. }
            | Expr::AllOp { compare_op: op, .. } => {
                matches!(op, And | Or | Eq | NotEq | Lt | LtEq | Gt | GtEq | StringConcat | Arrow | LongArrow)
            }
            Expr::UnaryOp { op, .. } => *op == UnaryOperator::Not,
            Expr::Cast { data_type, .. } => matches!(data_type, DataType::Text),
            Expr::Function(function) => {
                let name = function.name.to_string().to_ascii_lowercase();
                QUIET_FUNCTIONS.contains(&name.trim_start_matches("pg_catalog.").trim_matches('"'))
            }
            Expr::Identifier(_)
            | Expr::CompoundIdentifier(_)
            | Expr::Value(_)
            | Expr::Nested(_)
            | Expr::Exists { .. }
            | Expr::InSubquery { .. }
            | Expr::InList { .. }
            | Expr::IsNull(_)
            | Expr::IsNotNull(_)
            | Expr::IsTrue(_)
            | Expr::IsNotTrue(_)
            | Expr::IsFalse(_)
            | Expr::IsNotFalse(_)
            | Expr::IsUnknown(_)
            | Expr::IsNotUnknown(_)
            | Expr::IsDistinctFrom(..)
            | Expr::IsNotDistinctFrom(..)
            | Expr::Array(_)
            | Expr::Case { .. } => true,
            _ => false,
        };
        if is_quiet { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }
}

/// Whether the expression depends on a row, of the table or of any other.
fn reads_columns(expr: &Expr) -> bool {
    struct Reads;
    impl Visitor for Reads {
        type Break = ();

        fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<()> {
            match expr {
                Expr::Identifier(_) | Expr::CompoundIdentifier(_) => ControlFlow::Break(()),
                // A parameter of a function.
                Expr::Value(value) if matches!(value.value, Value::Placeholder(_)) => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        }

        fn pre_visit_table_factor(&mut self, _: &TableFactor) -> ControlFlow<()> {
            ControlFlow::Break(())
        }
    }
    Visit::visit(expr, &mut Reads).is_break()
}

/// Whether an expression reads a table whose policies have to be added.
pub(super) fn reads_secured(expr: &Expr, rights: &Rights) -> bool {
    struct Reads<'a>(&'a Rights);
    impl Visitor for Reads<'_> {
        type Break = ();

        fn pre_visit_table_factor(&mut self, factor: &TableFactor) -> ControlFlow<()> {
            match factor {
                TableFactor::Table { name, args: None, .. }
                    if self.0.secured.contains_key(&written(name)) || written(name) == self.0.name =>
                {
                    ControlFlow::Break(())
                }
                _ => ControlFlow::Continue(()),
            }
        }
    }
    Visit::visit(expr, &mut Reads(rights)).is_break()
}
