//! Compiles a policy's SQL to a [`Plan`]: the relay decides what it can, queries to PostgreSQL decide the rest.
//!
//! The text is PostgreSQL's own deparsed form: names outside `pg_catalog` are qualified, constants carry their types,
//! user-defined operators are spelled out. Only parts with one meaning in that form are compiled. PostgreSQL evaluates the
//! others: once for all readers where the part cannot depend on the reader, otherwise for each identity.

use std::cell::{Cell, RefCell};

use sqlparser::ast::{
    BinaryOperator, Expr, Function, FunctionArg, FunctionArgExpr, FunctionArguments, UnaryOperator, Value,
    VisitMut, VisitorMut,
};

use crate::model::policy::claim_expr::ClaimExpr;
use crate::model::policy::compile::dependencies::dependencies;
use crate::model::policy::compile::list::{Item, only_expression};
use crate::model::policy::compile::operand::{Operand, Type};
use crate::model::policy::compile::parse::{parse, parse_body, parse_query, parser};
use crate::model::policy::compile::prepare::prepared;
use crate::model::policy::compile::rewrite::rewritten;
use crate::model::policy::plan::{Obstacle, Plan, PlanKind, ServerQuery};
use crate::model::policy::predicate::{Predicate, Scalar};
use crate::model::policy::rights::Rights;
use crate::model::row::column::Column;
use crate::model::row::datum::Kind;

mod claim_call;
mod condition;
mod containment;
mod depth;
mod invert;
mod dependencies;
mod fold;
pub mod body_text;
mod inline;
mod list;
mod operand;
mod parse;
mod prepare;
mod probe;
mod rewrite;
mod reworded;
mod row_security;
mod same_rows;
mod three_valued;
mod topic;

/// The reason why a part is not compiled, for the author of the policy.
#[derive(Debug, Clone)]
struct Unsupported(String);

fn unsupported(why: &str) -> Unsupported {
    Unsupported(why.to_owned())
}

/// The maximum nesting of expressions, far above that of real policies in PostgreSQL's own text.
const MAX_DEPTH: usize = 200;

/// The maximum number of sub-selects that are split at an `or`, each branch being a query of its own, and of comparisons of conditions.
const MAX_SPLITS: usize = 4;

/// The maximum nesting of functions of claims.
const MAX_CALLS: usize = 12;

/// Compiles the policy of a table with these columns for a role with these rights. Never fails: the fallback is a plan that is
/// evaluated per identity.
pub fn compile(policy: &str, table: &str, columns: &[Column], rights: &Rights) -> Plan {
    if invert::is_reserved_name(table) {
        let why = String::from(
            "the table's name begins with `relay `, which the relay's own statements use; rename the table",
        );
        return Plan::opaque(Obstacle { part: table.to_owned(), why });
    }
    if rights.user_casts {
        let why = String::from(
            "the database has a user-defined cast between system types; the relay does not model it",
        );
        return Plan::opaque(Obstacle { part: policy.to_owned(), why });
    }
    let expr = match parse(policy) {
        Ok(expr) => fold::folded(expr),
        Err(why) => return Plan::opaque(Obstacle { part: policy.to_owned(), why: why.0 }),
    };
    let written = match rights.topic_is_column {
        true => topic::as_column(expr, table, columns, rights),
        false => expr,
    };
    let (expr, rights) = match prepared(policy, &written, table, rights) {
        Ok(prepared) => prepared,
        Err(table) => {
            return nothing(&table, "its row security reads the table itself, so every query of it raises");
        }
    };
    let rights = &*rights;
    // The bodies of functions name the topic, too.
    let expr = match rights.topic_is_column {
        true => topic::as_column(expr, table, columns, rights),
        false => expr,
    };
    // A table that is named only for the fields of its row type is not read.
    if let Some(table) = rights.unreadable.as_ref().filter(|table| dependencies::reads_table(&expr, table)) {
        return nothing(
            table,
            "the role may not read this table, so every query of the policy's table raises",
        );
    }
    let compiler = Compiler::of(table, columns, rights);
    let predicate = compiler.predicate(&expr, true);
    let obstacles = compiler.obstacles.borrow().clone();
    if obstacles.is_empty() {
        let queries = compiler.queries.into_inner();
        let kind = if queries.is_empty() { PlanKind::Compiled } else { PlanKind::Inverted };
        return Plan {
            kind,
            predicate,
            claim_exprs: compiler.claim_exprs.into_inner(),
            reads_all: false,
            queries,
            reads_as: rights.reads_as.clone().filter(|_| rights.as_other_role),
            obstacles,
            probe: probe::probe(&expr, rights),
        };
    }
    let reads_all = !compiler.claims_are_known(&expr);
    Plan {
        kind: PlanKind::PerIdentity,
        // Per-identity evaluation takes the whole policy, so the plan needs no queries.
        predicate: without_queries(predicate),
        claim_exprs: compiler.claim_exprs.into_inner(),
        reads_all,
        queries: Vec::new(),
        reads_as: None,
        obstacles,
        probe: probe::probe(&written, rights),
    }
}

/// Returns the plan of a policy that shows no row, because PostgreSQL raises for every query.
fn nothing(table: &str, why: &str) -> Plan {
    let obstacles = vec![Obstacle { part: table.to_owned(), why: why.to_owned() }];
    Plan { obstacles, ..Plan::compiled(Predicate::Constant(Some(false))) }
}

fn without_queries(predicate: Predicate) -> Predicate {
    let all = |list: Vec<Predicate>| list.into_iter().map(without_queries).collect();
    let boxed = |inner: Box<Predicate>| Box::new(without_queries(*inner));
    match predicate {
        Predicate::Fact(_) | Predicate::Readers { .. } => Predicate::Opaque,
        Predicate::And(list) => Predicate::And(all(list)),
        Predicate::Or(list) => Predicate::Or(all(list)),
        Predicate::Not(inner) => Predicate::Not(boxed(inner)),
        Predicate::Is(inner, wanted) => Predicate::Is(boxed(inner), wanted),
        Predicate::IsUnknown(inner) => Predicate::IsUnknown(boxed(inner)),
        Predicate::Case(branches, otherwise) => Predicate::Case(
            branches.into_iter().map(|(one, then)| (without_queries(one), without_queries(then))).collect(),
            boxed(otherwise),
        ),
        other => other,
    }
}

struct Compiler<'a> {
    table: &'a str,
    columns: &'a [Column],
    rights: &'a Rights,
    /// Whether this is a function body, where a name is not a column of the table.
    without_columns: bool,
    /// The element of the list that a sub-select reads.
    item: Option<Item>,
    depth: usize,
    claim_exprs: RefCell<Vec<ClaimExpr>>,
    queries: RefCell<Vec<ServerQuery>>,
    obstacles: RefCell<Vec<Obstacle>>,
    /// The number of conditions that were compiled more than once: sub-selects that were split, and comparisons of conditions.
    splits: Cell<usize>,
    /// The number of calls around the expression.
    calls: Cell<usize>,
}

impl<'a> Compiler<'a> {
    /// Returns the compiler for policies of a table.
    fn of(table: &'a str, columns: &'a [Column], rights: &'a Rights) -> Self {
        Compiler {
            table,
            columns,
            rights,
            without_columns: false,
            item: None,
            depth: 0,
            claim_exprs: RefCell::default(),
            queries: RefCell::default(),
            obstacles: RefCell::default(),
            splits: Cell::default(),
            calls: Cell::default(),
        }
    }
}

impl Compiler<'_> {
    /// Returns the compiler for a function body.
    fn function_body(&self) -> Self {
        Compiler {
            without_columns: true,
            depth: self.depth + 1,
            ..Compiler::of(self.table, self.columns, self.rights)
        }
    }

    fn claim_index(&self, claim: ClaimExpr) -> usize {
        index_of(&mut self.claim_exprs.borrow_mut(), claim)
    }

    fn query_index(&self, query: ServerQuery) -> usize {
        index_of(&mut self.queries.borrow_mut(), query)
    }

    fn scalar(&self, operand: Operand) -> Scalar {
        match operand {
            Operand::Row(scalar, _) => scalar,
            Operand::Claim(claim, _) => Scalar::Claim(self.claim_index(claim)),
        }
    }

    /// Compiles a condition. `lenient`: only `and` and `or` surround it, so false and null mean the same.
    fn predicate(&self, expr: &Expr, lenient: bool) -> Predicate {
        let before = self.queries.borrow().len();
        let predicate = self.by_structure(expr, lenient);
        let is_whole = matches!(predicate, Predicate::Fact(_));
        if self.queries.borrow().len() > before && !is_whole && self.reads_only_row(expr) {
            // As one query, PostgreSQL keeps the guards before what may raise.
            self.queries.borrow_mut().truncate(before);
            return self.fact(expr.to_string());
        }
        predicate
    }

    /// Whether the condition depends on the row alone, and PostgreSQL can evaluate it for all readers.
    fn reads_only_row(&self, expr: &Expr) -> bool {
        let found = dependencies(expr, self.rights);
        !found.claims && found.obstacle.is_none() && self.rights.obstacles.is_empty()
    }

    fn fact(&self, expression: String) -> Predicate {
        Predicate::Fact(self.query_index(ServerQuery::Fact { expression }))
    }

    /// Compiles operands of `and` or `or`. A query for one operand includes the row conditions before it, which may guard it from
    /// raising.
    fn chain(&self, expr: &Expr, op: &BinaryOperator, lenient: bool) -> Predicate {
        let mut parts = Vec::new();
        operands_of(expr, op, &mut parts);
        let joiner = if *op == BinaryOperator::And { " and " } else { " or " };
        let mut guards: Vec<String> = Vec::new();
        let mut list = Vec::with_capacity(parts.len());
        for part in parts {
            let before = self.queries.borrow().len();
            let mut predicate = self.predicate(part, lenient);
            if self.reads_only_row(part) {
                guards.push(format!("({part})"));
                if self.queries.borrow().len() > before {
                    self.queries.borrow_mut().truncate(before);
                    predicate = self.fact(guards.join(joiner));
                }
            }
            list.push(predicate);
        }
        joined(list, *op == BinaryOperator::And)
    }

    fn by_structure(&self, expr: &Expr, lenient: bool) -> Predicate {
        match expr {
            Expr::Nested(inner) => self.predicate(inner, lenient),
            // `(select f())`, which PostgreSQL evaluates once.
            Expr::Subquery(query) if only_expression(query).is_some() => match only_expression(query) {
                Some(inner) => self.predicate(inner, lenient),
                None => Predicate::Opaque,
            },
            Expr::BinaryOp { op: op @ (BinaryOperator::And | BinaryOperator::Or), .. } => {
                self.chain(expr, op, lenient)
            }
            Expr::UnaryOp { op: UnaryOperator::Not, expr } => {
                Predicate::Not(Box::new(self.predicate(expr, false)))
            }
            // Only true counts for `is true`, `coalesce(…, false)` and the conditions of `case`.
            Expr::IsTrue(inner) => Predicate::Is(Box::new(self.predicate(inner, true)), true),
            Expr::IsFalse(inner) => Predicate::Is(Box::new(self.predicate(inner, false)), false),
            Expr::IsNotTrue(inner) => not(Predicate::Is(Box::new(self.predicate(inner, true)), true)),
            Expr::IsNotFalse(inner) => not(Predicate::Is(Box::new(self.predicate(inner, false)), false)),
            Expr::IsUnknown(inner) => Predicate::IsUnknown(Box::new(self.predicate(inner, false))),
            Expr::IsNotUnknown(inner) => not(Predicate::IsUnknown(Box::new(self.predicate(inner, false)))),
            Expr::Case { operand: None, conditions, else_result, .. } => {
                let branches = conditions.iter().map(|branch| {
                    (self.predicate(&branch.condition, true), self.predicate(&branch.result, lenient))
                });
                let branches = branches.collect();
                let otherwise = else_result.as_ref().map(|result| self.predicate(result, lenient));
                Predicate::Case(branches, Box::new(otherwise.unwrap_or(Predicate::Constant(None))))
            }
            Expr::Function(function) if coalesced(function).is_some() => match coalesced(function) {
                Some((inner, false)) => Predicate::Is(Box::new(self.predicate(inner, true)), true),
                Some((inner, true)) => not(Predicate::Is(Box::new(self.predicate(inner, false)), false)),
                None => Predicate::Opaque,
            },
            Expr::Exists { subquery, negated: true } => {
                let exists = Expr::Exists { subquery: subquery.clone(), negated: false };
                not(self.predicate(&exists, false))
            }
            Expr::InSubquery { expr, subquery, negated: true } => {
                let found =
                    Expr::InSubquery { expr: expr.clone(), subquery: subquery.clone(), negated: false };
                not(self.predicate(&found, false))
            }
            _ => {
                let known = self.claim_exprs.borrow().len();
                self.condition(expr).unwrap_or_else(|why| {
                    self.claim_exprs.borrow_mut().truncate(known);
                    self.in_another_way(expr, lenient, why)
                })
            }
        }
    }

    /// Compiles a condition that the relay does not decide in this form.
    #[inline(never)]
    fn in_another_way(&self, expr: &Expr, lenient: bool, why: Unsupported) -> Predicate {
        // A comparison becomes two of the same conditions.
        let is_comparison = matches!(expr, Expr::BinaryOp { .. });
        let other = if is_comparison && self.splits.get() >= MAX_SPLITS { None } else { rewritten(expr) };
        match other {
            Some(other) => {
                self.splits.set(self.splits.get() + usize::from(is_comparison));
                self.predicate(&other, lenient)
            }
            None => self.query(expr, lenient, why),
        }
    }

    /// Compiles a condition that PostgreSQL evaluates: for all readers at once if possible.
    fn query(&self, expr: &Expr, lenient: bool, why: Unsupported) -> Predicate {
        let found = dependencies(expr, self.rights);
        let obstacle = self.rights.obstacles.first().cloned().or(found.obstacle);
        let outcome = match obstacle {
            Some(obstacle) => Err(Unsupported(obstacle)),
            None if !found.claims => return self.fact(expr.to_string()),
            None => self.invert(expr, lenient, why),
        };
        let readers = |query: usize| {
            let by = self.queries.borrow()[query].by().iter().map(|(claim, _)| *claim).collect();
            Predicate::Readers { query, by }
        };
        let otherwise = |why| {
            let is_different = matches!(expr, Expr::BinaryOp { op: BinaryOperator::NotEq, .. });
            let known = if lenient && !is_different { None } else { self.three_valued(expr) };
            known.or_else(|| self.split(expr, lenient)).ok_or(why)
        };
        outcome.map(readers).or_else(otherwise).unwrap_or_else(|why| {
            let mut part = expr.clone();
            while let Expr::Nested(inner) = part {
                part = *inner;
            }
            self.obstacles.borrow_mut().push(Obstacle { part: part.to_string(), why: why.0 });
            Predicate::Opaque
        })
    }

    /// Compiles `exists (… where a or b)` as `exists (… where a) or exists (… where b)`, if PostgreSQL can evaluate each for all readers.
    fn split(&self, expr: &Expr, lenient: bool) -> Option<Predicate> {
        if self.splits.get() >= MAX_SPLITS {
            return None;
        }
        let branches = self.alternatives(expr)?;
        self.splits.set(self.splits.get() + 1);
        self.attempt(|| {
            Predicate::Or(branches.iter().map(|branch| self.predicate(branch, lenient)).collect())
        })
    }

    /// Returns what is compiled, unless PostgreSQL has to evaluate a part of it for each identity.
    fn attempt(&self, compiled: impl FnOnce() -> Predicate) -> Option<Predicate> {
        let (queries, obstacles) = (self.queries.borrow().len(), self.obstacles.borrow().len());
        let claim_exprs = self.claim_exprs.borrow().len();
        let predicate = compiled();
        if self.obstacles.borrow().len() == obstacles {
            return Some(predicate);
        }
        self.queries.borrow_mut().truncate(queries);
        self.obstacles.borrow_mut().truncate(obstacles);
        self.claim_exprs.borrow_mut().truncate(claim_exprs);
        None
    }

    /// Whether the claim expressions cover all claims that the policy reads. Adds missing ones.
    fn claims_are_known(&self, expr: &Expr) -> bool {
        let found = dependencies(expr, self.rights);
        if !self.rights.obstacles.is_empty() || found.obstacle.is_some() {
            return false;
        }
        let mut rest = expr.clone();
        self.replace_claims(&mut rest, &mut |_, _| Expr::value(Value::Null));
        !dependencies(&rest, self.rights).claims
    }

    /// Replaces each largest claim expression, by its index and type.
    fn replace_claims(&self, within: &mut impl VisitMut, by: &mut dyn FnMut(usize, Kind) -> Expr) {
        let _ = within.visit(&mut Replace { compiler: self, by });
    }
}

struct Replace<'a, 'c> {
    compiler: &'a Compiler<'c>,
    by: &'a mut dyn FnMut(usize, Kind) -> Expr,
}

impl VisitorMut for Replace<'_, '_> {
    type Break = ();

    fn pre_visit_expr(&mut self, expr: &mut Expr) -> std::ops::ControlFlow<()> {
        if let Ok(Operand::Claim(claim, Type::Known(kind))) = self.compiler.function_body().operand(expr)
            && !claim.is_constant()
        {
            *expr = (self.by)(self.compiler.claim_index(claim), kind);
        }
        std::ops::ControlFlow::Continue(())
    }
}

fn index_of<T: PartialEq>(list: &mut Vec<T>, item: T) -> usize {
    list.iter().position(|known| *known == item).unwrap_or_else(|| {
        list.push(item);
        list.len() - 1
    })
}

fn not(predicate: Predicate) -> Predicate {
    Predicate::Not(Box::new(predicate))
}

/// Returns the operands of a chain of `and` or `or`, from left to right; iterative because chains may be long.
fn operands_of<'a>(expr: &'a Expr, op: &BinaryOperator, parts: &mut Vec<&'a Expr>) {
    let mut open = vec![expr];
    while let Some(expr) = open.pop() {
        match expr {
            Expr::Nested(inner) => open.push(inner),
            Expr::BinaryOp { left, op: same, right } if same == op => open.extend([&**right, &**left]),
            part => parts.push(part),
        }
    }
}

/// Returns the condition and the constant of `coalesce(condition, true)` or `… false)`.
fn coalesced(function: &Function) -> Option<(&Expr, bool)> {
    let FunctionArguments::List(list) = &function.args else { return None };
    match list.args.as_slice() {
        [
            FunctionArg::Unnamed(FunctionArgExpr::Expr(one)),
            FunctionArg::Unnamed(FunctionArgExpr::Expr(Expr::Value(two))),
        ] if function.name.to_string().eq_ignore_ascii_case("coalesce") && is_condition_or_query(one) => {
            match two.value {
                Value::Boolean(constant) => Some((one, constant)),
                _ => None,
            }
        }
        _ => None,
    }
}

/// Whether it is a condition by its form, or a sub-select with the type of the constant beside it.
fn is_condition_or_query(expr: &Expr) -> bool {
    inline::is_condition(expr) || matches!(invert::bare(expr), Expr::Subquery(_))
}

fn joined(list: Vec<Predicate>, all: bool) -> Predicate {
    // PostgreSQL folds such a chain too, whatever precedes the constant.
    let decides = Predicate::Constant(Some(!all));
    match all {
        _ if list.contains(&decides) => decides,
        true => Predicate::And(list),
        false => Predicate::Or(list),
    }
}

#[cfg(test)]
mod tests;
