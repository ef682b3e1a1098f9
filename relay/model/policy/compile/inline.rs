//! SQL functions of one select: a call is replaced by the body, with the arguments in the place of the parameters.
//!
//! `is_member(team)` becomes `exists (select from members m where m.team = t.team and m.user_id = auth.uid())`, and
//! `room in (select rooms_of(auth.uid()))` becomes `room in (select m.room from members m where …)`. The bodies are PostgreSQL's own
//! deparsed form, and `relay.bodies_for()` names those that may be replaced.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use sqlparser::ast::{
    BinaryOperator, CaseWhen, Expr, Function, FunctionArg, FunctionArgExpr, FunctionArguments, Ident,
    ObjectName, Query, Select, SetExpr, Value, VisitMut, VisitorMut,
};

use super::dependencies::written;
use super::invert::{finds_one_row, nest};
use super::list::{plain_select, projected};
use super::row_security::may_raise;
use super::{Unsupported, unsupported};
use crate::model::policy::rights::{Body, Rights};
use body::{Filled, Names, Parameters, names_of_tables};
pub(super) use form::is_condition;
use form::{aggregates, and, is_column, set_projection, source, typed};

mod body;
mod form;

/// The maximum nesting of calls.
const MAX_NESTING: usize = 4;
/// The maximum number of calls in one policy that are replaced.
const MAX_CALLS: usize = 16;
/// The maximum length of a body, which bounds the depth of the tree.
const MAX_LENGTH: usize = 2000;

/// The functions that are replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whose {
    /// Those that read with the rights of the caller: row security applies to what they read.
    Callers,
    /// Definers, and what their bodies call: row security is added already where it applies.
    Definers,
}

/// What replaced calls read.
#[derive(Debug, Default)]
pub(super) struct Inlined {
    /// The number of calls.
    pub calls: usize,
    /// The tables that bodies read.
    pub tables: BTreeSet<String>,
    /// Whether the reader's role may not see all of their rows.
    pub past: bool,
    /// Why other calls were not replaced, by the name of the function.
    pub left: BTreeMap<String, String>,
}

/// Replaces the calls in a policy of `table`, its name without schema and quotes. Calls that cannot be replaced stay as they are.
pub(super) fn inline(expr: &mut Expr, table: &str, rights: &Rights, whose: Whose) -> Inlined {
    let text = expr.to_string();
    if rights.bodies.keys().all(|name| !text.contains(name.as_str())) {
        return Inlined::default();
    }
    let hides_table = names_of_tables(expr).contains(table);
    let mut inliner = Inliner {
        table: (!hides_table).then_some(table),
        rights,
        whose,
        text,
        queries: 0,
        nesting: 0,
        aliases: 0,
        inlined: Inlined::default(),
    };
    let _ = VisitMut::visit(expr, &mut inliner);
    inliner.inlined
}

struct Inliner<'a> {
    /// The policy's table, which its columns are qualified with; `None` if the policy gives the name to another one.
    table: Option<&'a str>,
    rights: &'a Rights,
    whose: Whose,
    /// The policy, whose names new aliases must not equal.
    text: String,
    /// The number of sub-selects around the expression.
    queries: usize,
    nesting: usize,
    aliases: usize,
    inlined: Inlined,
}

impl VisitorMut for Inliner<'_> {
    type Break = ();

    fn pre_visit_query(&mut self, _: &mut Query) -> ControlFlow<()> {
        self.queries += 1;
        ControlFlow::Continue(())
    }

    fn post_visit_query(&mut self, query: &mut Query) -> ControlFlow<()> {
        self.queries -= 1;
        if let Some((body, call)) = self.listed(query)
            && let Some(list) = self.replaced(&body, &call, |inliner| inliner.list(query, &body, &call))
        {
            *query = list;
        }
        ControlFlow::Continue(())
    }

    /// After the visit of the arguments, so that a body is visited with its own names.
    fn post_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<()> {
        if let Expr::Function(function) = &*expr
            && let Some(call) = Call::of(function)
            && let Some(body) = self.body(&call.name).filter(|body| !body.many)
            && let Some(value) = self.replaced(&body, &call, |inliner| inliner.value(&body, &call))
        {
            *expr = value;
        }
        ControlFlow::Continue(())
    }
}

/// A call with its arguments.
struct Call {
    name: String,
    arguments: Vec<Expr>,
}

impl Call {
    fn of(function: &Function) -> Option<Self> {
        let FunctionArguments::List(list) = &function.args else { return None };
        let is_plain = list.clauses.is_empty()
            && list.duplicate_treatment.is_none()
            && function.over.is_none()
            && function.filter.is_none()
            && function.within_group.is_empty();
        is_plain.then(|| Self::with(&function.name, &list.args))?
    }

    fn with(name: &ObjectName, arguments: &[FunctionArg]) -> Option<Self> {
        let one = |argument: &FunctionArg| match argument {
            FunctionArg::Unnamed(FunctionArgExpr::Expr(expr)) => Some(expr.clone()),
            _ => None,
        };
        let arguments = arguments.iter().map(one).collect::<Option<Vec<Expr>>>()?;
        Some(Self { name: written(name), arguments })
    }
}

impl Inliner<'_> {
    fn body(&self, name: &str) -> Option<Body> {
        let body = self.rights.bodies.get(name)?;
        let is_wanted = match self.whose {
            Whose::Callers => !body.definer,
            Whose::Definers => body.definer || self.nesting > 0,
        };
        is_wanted.then(|| body.clone())
    }

    /// Runs `make` for a call, and records what became of it.
    fn replaced<T>(
        &mut self,
        body: &Body,
        call: &Call,
        make: impl FnOnce(&mut Self) -> Result<T, Unsupported>,
    ) -> Option<T> {
        let made = match () {
            () if self.inlined.calls >= MAX_CALLS || self.nesting >= MAX_NESTING => {
                Err(unsupported("its calls are nested too deeply, or too many"))
            }
            () if body.sql.len() > MAX_LENGTH => Err(unsupported("its body is too long")),
            () => make(self),
        };
        match made {
            Ok(made) => {
                self.inlined.calls += 1;
                self.inlined.tables.extend(body.tables.iter().cloned());
                self.inlined.past |= body.past;
                Some(made)
            }
            Err(why) => {
                self.inlined.left.insert(call.name.clone(), why.0);
                None
            }
        }
    }

    /// Returns the body and the call of `select f(…)` or `select x from f(…) f(x)`, if the function returns a set.
    fn listed(&self, query: &Query) -> Option<(Body, Call)> {
        let select = plain_select(query)?;
        let call = match (select.from.as_slice(), projected(select)) {
            ([], Some(Expr::Function(function))) if select.selection.is_none() => Call::of(function)?,
            ([one], _) if one.joins.is_empty() => source(&one.relation)?.0,
            _ => return None,
        };
        self.body(&call.name).filter(|body| body.many).map(|body| (body, call))
    }

    /// Returns the query that gives the rows of the function.
    fn list(&mut self, query: &Query, body: &Body, call: &Call) -> Result<Query, Unsupported> {
        let mut rows = match self.filled(body, call)? {
            Filled::Rows(rows) => *rows,
            Filled::Value(value) => {
                // `select jsonb_array_elements_text(…)`
                let mut query = query.clone();
                return match &mut *query.body {
                    SetExpr::Select(select) if select.from.is_empty() && !body.strict => {
                        set_projection(select, typed(&value, &body.returns)?);
                        Ok(query)
                    }
                    _ => Err(unsupported("its body is one value")),
                };
            }
        };
        let not_plain = || unsupported("its body is more than `select … from … where …`");
        let (Some(outer), SetExpr::Select(inner)) = (plain_select(query), &mut *rows.body) else {
            return Err(not_plain());
        };
        let value = typed(projected(inner).ok_or_else(not_plain)?, &body.returns)?;
        set_projection(inner, value.clone());
        for argument in call.arguments.iter().filter(|_| body.strict) {
            let known = Expr::IsNotNull(nest(self.argument(argument)?));
            inner.selection = Some(and(inner.selection.take(), known));
        }
        let Some((_, alias, column)) = outer.from.first().and_then(|one| source(&one.relation)) else {
            return Ok(rows);
        };
        if outer.selection.is_none()
            && outer.distinct.is_none()
            && is_column(projected(outer), &alias, &column)
        {
            return Ok(rows);
        }
        // `select … from f(…) f(x) where …`: its condition is one more of the body.
        if plain_select(&rows).is_none_or(|select| select.distinct.is_some() || aggregates(&value)) {
            return Err(not_plain());
        }
        let SetExpr::Select(inner) = &mut *rows.body else { return Err(not_plain()) };
        let mut outer: Select = outer.clone();
        let _ = sqlparser::ast::visit_expressions_mut(&mut outer, |expr| {
            if is_column(Some(expr), &alias, &column) {
                *expr = *nest(value.clone());
            }
            ControlFlow::<()>::Continue(())
        });
        outer.from = std::mem::take(&mut inner.from);
        outer.selection = match (inner.selection.take(), outer.selection.take()) {
            (inner, Some(outer)) => Some(and(inner, outer)),
            (inner, None) => inner,
        };
        let mut query = query.clone();
        *query.body = SetExpr::Select(Box::new(outer));
        Ok(query)
    }

    /// Returns the expression that has the value of the call.
    fn value(&mut self, body: &Body, call: &Call) -> Result<Expr, Unsupported> {
        let value = match self.filled(body, call)? {
            Filled::Value(value) => match is_condition(&value) && body.returns == "boolean" {
                true => *value,
                false => typed(&value, &body.returns)?,
            },
            Filled::Rows(mut rows) => {
                let several = || unsupported("several rows may give its value, and any of them may be first");
                let select = plain_select(&rows).ok_or_else(several)?;
                let value = projected(select).ok_or_else(several)?.clone();
                if !aggregates(&value) && !finds_one_row(&rows, self.rights) {
                    return Err(several());
                }
                if !(is_condition(&value) && body.returns == "boolean") {
                    let value = typed(&value, &body.returns)?;
                    let SetExpr::Select(select) = &mut *rows.body else { return Err(several()) };
                    set_projection(select, value);
                }
                let value = Expr::Subquery(rows);
                // `= any ((select …))` would compare with the rows of a list.
                if body.returns.ends_with("[]") { typed(&value, &body.returns)? } else { value }
            }
        };
        if !body.strict || call.arguments.is_empty() {
            return Ok(*nest(value));
        }
        let nulls =
            call.arguments.iter().map(|argument| self.argument(argument).map(|one| Expr::IsNull(nest(one))));
        let nulls = nulls.collect::<Result<Vec<_>, _>>()?.into_iter().reduce(|one, other| Expr::BinaryOp {
            left: nest(one),
            op: BinaryOperator::Or,
            right: nest(other),
        });
        let null = typed(&Expr::value(Value::Null), &body.returns)?;
        let conditions =
            nulls.into_iter().map(|condition| CaseWhen { condition, result: null.clone() }).collect();
        Ok(*nest(Expr::Case {
            case_token: sqlparser::ast::helpers::attached_token::AttachedToken::empty(),
            end_token: sqlparser::ast::helpers::attached_token::AttachedToken::empty(),
            operand: None,
            conditions,
            else_result: Some(nest(value)),
        }))
    }

    /// Returns an argument as it is in the body, where other tables are.
    fn argument(&self, argument: &Expr) -> Result<Expr, Unsupported> {
        let mut argument = argument.clone();
        let outside = self.queries == 0 && self.nesting == 0;
        let qualified =
            sqlparser::ast::visit_expressions_mut(&mut argument, |expr| match (&*expr, self.table) {
                (Expr::Identifier(column), Some(table)) if outside => {
                    *expr = Expr::CompoundIdentifier(vec![
                        Ident::with_quote('"', table),
                        Ident::with_quote('"', &*column.value),
                    ]);
                    ControlFlow::Continue(())
                }
                (Expr::Identifier(_) | Expr::QualifiedWildcard(..) | Expr::Wildcard(_), _) => {
                    ControlFlow::Break(())
                }
                _ => ControlFlow::Continue(()),
            });
        match qualified {
            ControlFlow::Break(()) => {
                Err(unsupported("an argument is a column that cannot be named inside the body"))
            }
            ControlFlow::Continue(()) => Ok(argument),
        }
    }

    /// Returns the body with the arguments of the call in it.
    fn filled(&mut self, body: &Body, call: &Call) -> Result<Filled, Unsupported> {
        if call.arguments.len() != body.types.len() {
            return Err(unsupported("it is called with other arguments"));
        }
        // Those of a nested call are parts of a body and arguments that were looked at before.
        if self.nesting == 0 && call.arguments.iter().any(may_raise) {
            return Err(unsupported("an argument may raise an error, also where the body does not read it"));
        }
        let mut filled = Filled::parse(&body.sql)?;
        if filled.may_raise(&self.rights.bodies) {
            return Err(unsupported("its body may raise an error for a row"));
        }
        let mut arguments = Vec::with_capacity(call.arguments.len());
        for (argument, of) in call.arguments.iter().zip(&body.types) {
            arguments.push(typed(&self.argument(argument)?, of)?);
        }
        let mut names = Names::of(&filled, body)?;
        for alias in names.tables.values_mut() {
            *alias = self.alias();
        }
        let mut parameters = Parameters {
            body,
            names: &names,
            arguments: &arguments,
            used: vec![false; arguments.len()],
            queries: 0,
        };
        if let ControlFlow::Break(why) = filled.visit(&mut parameters) {
            return Err(unsupported(why));
        }
        // PostgreSQL evaluates such an argument also where the body does not.
        let reads_nothing = |argument: &Expr| {
            matches!(argument, Expr::Identifier(_) | Expr::CompoundIdentifier(_) | Expr::Value(_))
        };
        if parameters
            .used
            .iter()
            .zip(&call.arguments)
            .any(|(used, argument)| !used && !reads_nothing(argument))
        {
            return Err(unsupported("its body does not read an argument that may raise an error"));
        }
        let (text, queries) = (std::mem::take(&mut self.text), std::mem::take(&mut self.queries));
        self.text = format!("{text} {}", body.sql);
        self.nesting += 1;
        let _ = filled.visit(self);
        self.nesting -= 1;
        self.queries = queries;
        Ok(filled)
    }

    /// Returns an alias that nothing uses.
    fn alias(&mut self) -> Ident {
        loop {
            self.aliases += 1;
            let name = match self.whose {
                Whose::Callers => format!("called {}", self.aliases),
                Whose::Definers => format!("body {}", self.aliases),
            };
            let is_used = |text: &str| text.contains(&name);
            if !is_used(&self.text)
                && !self.rights.secured.values().any(|table| is_used(&table.policy))
                && !self.rights.bodies.values().any(|body| is_used(&body.sql))
            {
                return Ident::with_quote('"', name);
            }
        }
    }
}
