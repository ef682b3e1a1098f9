//! Tables and columns in a body: which one each name means.

use std::collections::{BTreeMap, BTreeSet};

use sqlparser::ast::{
    Distinct, Expr, Ident, JoinConstraint, JoinOperator, LimitClause, ObjectName, ObjectNamePart, Query,
    Select, SelectItem, SetExpr, TableFactor, TableWithJoins, Value,
};

use super::super::{Unsupported, parse_query, parser, unsupported};
use super::{BodyText, NamedColumn, NamedTable, Part};

pub(super) struct Resolver<'a> {
    pub body: &'a BodyText,
    /// The tables of the queries around the expression, the innermost last.
    scopes: Vec<Vec<Shown<'a>>>,
    pub parts: BTreeSet<Part>,
    /// The number of columns of the innermost query that were found so far.
    pub columns: usize,
    /// The types of columns by table and name; `None`: two tables of one name have different ones.
    pub types: BTreeMap<(String, String), Option<String>>,
}

/// A table by the name that a query gives it.
#[derive(Clone)]
struct Shown<'a> {
    name: String,
    table: &'a NamedTable,
}

/// System columns, which every table has.
const SYSTEM_COLUMNS: &[&str] = &["cmax", "cmin", "ctid", "tableoid", "xmax", "xmin"];

/// The name as PostgreSQL reads it.
fn folded(ident: &Ident) -> Result<String, Unsupported> {
    let name = match ident.quote_style {
        None => ident.value.to_ascii_lowercase(),
        Some('"') => ident.value.clone(),
        Some(_) => return Err(unsupported("a name in its body is quoted in an unusual way")),
    };
    // PostgreSQL shortens longer ones.
    if name.is_empty() || name.len() > 63 {
        Err(unsupported("a name in its body is too long"))
    } else {
        Ok(name)
    }
}

pub(super) fn parts_of(name: &ObjectName) -> Result<Vec<String>, Unsupported> {
    let part = |part: &ObjectNamePart| match part {
        ObjectNamePart::Identifier(ident) => folded(ident),
        ObjectNamePart::Function(_) => Err(unsupported("its body reads a name that is not known")),
    };
    name.0.iter().map(part).collect()
}

pub(super) fn object_name(written: &str) -> Result<ObjectName, Unsupported> {
    parser(written)?.parse_object_name(false).map_err(|error| Unsupported(error.to_string()))
}

impl<'a> Resolver<'a> {
    pub fn of(body: &'a BodyText) -> Self {
        Self { body, scopes: Vec::new(), parts: BTreeSet::new(), columns: 0, types: BTreeMap::new() }
    }

    /// Resolves a query that gives one value for each row.
    pub fn query(&mut self, query: &mut Query) -> Result<(), Unsupported> {
        let outside = std::mem::take(&mut self.columns);
        let select = plain(query)?;
        self.sources(&mut select.from)?;
        let [SelectItem::UnnamedExpr(value) | SelectItem::ExprWithAlias { expr: value, .. }] =
            select.projection.as_mut_slice()
        else {
            return Err(unsupported("a select in its body gives no value, or several"));
        };
        self.expr(value)?;
        select.projection = vec![SelectItem::UnnamedExpr(value.clone())];
        self.condition(select)?;
        self.scopes.pop();
        self.columns = outside;
        Ok(())
    }

    /// Resolves the query in `exists (…)`, of which only the rows matter.
    pub fn existing(&mut self, query: &mut Query) -> Result<(), Unsupported> {
        let is_one =
            |limit: &Expr| matches!(limit, Expr::Value(one) if one.value == Value::Number("1".into(), false));
        if matches!(&query.limit_clause, Some(LimitClause::LimitOffset { limit: Some(limit), offset: None, limit_by })
            if limit_by.is_empty() && is_one(limit))
        {
            query.limit_clause = None;
        }
        let outside = std::mem::take(&mut self.columns);
        let select = plain(query)?;
        self.sources(&mut select.from)?;
        for item in &mut select.projection {
            match item {
                // All of these have to be readable.
                SelectItem::Wildcard(options) if options.to_string().is_empty() => {
                    let shown = self.scopes.last().cloned().unwrap_or_default();
                    for table in shown.iter().map(|shown| shown.table) {
                        let part = |column: &NamedColumn| Part::column(table, column.number);
                        self.parts.extend(table.columns.values().map(part));
                    }
                }
                SelectItem::UnnamedExpr(value) | SelectItem::ExprWithAlias { expr: value, .. }
                    if matches!(
                        value,
                        Expr::Identifier(_) | Expr::CompoundIdentifier(_) | Expr::Value(_)
                    ) =>
                {
                    self.expr(value)?;
                }
                _ => return Err(unsupported("`exists` in its body has more than columns")),
            }
        }
        select.projection = vec![SelectItem::UnnamedExpr(Expr::value(Value::Number("1".into(), false)))];
        self.condition(select)?;
        self.scopes.pop();
        self.columns = outside;
        Ok(())
    }

    fn condition(&mut self, select: &mut Select) -> Result<(), Unsupported> {
        select.selection.as_mut().map_or(Ok(()), |condition| self.expr(condition))
    }

    /// Resolves the tables of a query, and adds them as a scope.
    fn sources(&mut self, from: &mut [TableWithJoins]) -> Result<(), Unsupported> {
        self.scopes.push(Vec::new());
        // A condition of a join does not see the tables of other items.
        if from.len() > 1 && from.iter().any(|source| !source.joins.is_empty()) {
            return Err(unsupported("its body joins tables in two ways"));
        }
        for source in from {
            self.table(&mut source.relation)?;
            for join in &mut source.joins {
                self.table(&mut join.relation)?;
                match &mut join.join_operator {
                    JoinOperator::Join(JoinConstraint::On(on))
                    | JoinOperator::Inner(JoinConstraint::On(on))
                    | JoinOperator::Left(JoinConstraint::On(on))
                    | JoinOperator::LeftOuter(JoinConstraint::On(on))
                        if !join.global =>
                    {
                        self.expr(on)?;
                    }
                    _ => {
                        return Err(unsupported(
                            "its body has another join than `join … on` and `left join … on`",
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    fn table(&mut self, factor: &mut TableFactor) -> Result<(), Unsupported> {
        let not_known = || unsupported("its body reads something else than tables by their names");
        let TableFactor::Table { name, alias, .. } = &mut *factor else { return Err(not_known()) };
        let parts = parts_of(name)?;
        let found = |schema: &str, name: &str| {
            let mut found =
                self.body.tables.iter().filter(|table| table.schema == schema && table.name == name);
            found.next()
        };
        let table = match parts.as_slice() {
            [schema, name] => found(schema, name),
            // PostgreSQL has tables of such names itself.
            [name] if !name.starts_with("pg_") => {
                let path = self.body.path.iter().flatten();
                path.filter(|schema| *schema != "pg_temp").find_map(|schema| found(schema, name))
            }
            _ => None,
        };
        let table = table.ok_or_else(not_known)?;
        let shown = match alias {
            Some(alias) if alias.columns.is_empty() && alias.at.is_none() => {
                alias.name = Ident::with_quote('"', folded(&alias.name)?);
                alias.name.value.clone()
            }
            Some(_) => return Err(unsupported("its body gives columns of a table other names")),
            None => table.name.clone(),
        };
        *name = object_name(&table.written)?;
        let mut only = parse_query(&format!("SELECT FROM {}", table.written))?;
        let SetExpr::Select(select) = &mut *only.body else { return Err(not_known()) };
        if let Some(TableFactor::Table { alias: none, .. }) =
            select.from.first_mut().map(|one| &mut one.relation)
        {
            none.clone_from(alias);
        }
        // Nothing else belongs to it, such as a sample.
        if select.from.first().is_none_or(|one| one.relation != *factor) {
            return Err(not_known());
        }
        let Some(scope) = self.scopes.last_mut() else { return Err(not_known()) };
        if scope.iter().any(|other| other.name == shown) {
            return Err(unsupported("two tables in its body have one name"));
        }
        self.parts.insert(Part::column(table, 0));
        scope.push(Shown { name: shown, table });
        Ok(())
    }

    fn column(&mut self, level: usize, shown: &Shown<'a>, column: &str) -> Expr {
        if level + 1 == self.scopes.len() {
            self.columns += 1;
        }
        let known = &shown.table.columns[column];
        self.parts.insert(Part::column(shown.table, known.number));
        let types = self.types.entry((shown.name.clone(), column.to_owned()));
        let of = types.or_insert_with(|| Some(known.of.clone()));
        if of.as_ref() != Some(&known.of) {
            *of = None;
        }
        Expr::CompoundIdentifier(vec![
            Ident::with_quote('"', shown.name.as_str()),
            Ident::with_quote('"', column),
        ])
    }

    /// Resolves a name without a qualifier: a column of the innermost query that has one, or else a parameter.
    pub fn name(&mut self, ident: &Ident) -> Result<Expr, Unsupported> {
        let name = folded(ident)?;
        if SYSTEM_COLUMNS.contains(&name.as_str()) {
            return Err(unsupported("its body reads a system column"));
        }
        for level in (0..self.scopes.len()).rev() {
            let having: Vec<Shown<'a>> = self.scopes[level]
                .iter()
                .filter(|shown| shown.table.columns.contains_key(&name))
                .cloned()
                .collect();
            match having.as_slice() {
                [] => {}
                [shown] => return Ok(self.column(level, shown, &name)),
                _ => return Err(unsupported("a name in its body is a column of two tables")),
            }
        }
        if self.scopes.iter().flatten().any(|shown| shown.name == name) {
            return Err(unsupported("its body reads a whole row"));
        }
        self.named_parameter(&name)
    }

    fn named_parameter(&self, name: &str) -> Result<Expr, Unsupported> {
        let mut at = self.body.names.iter().enumerate().filter(|(_, known)| *known == name);
        match (at.next(), at.next()) {
            (Some((at, _)), None) => Ok(Expr::value(Value::Placeholder(format!("${}", at + 1)))),
            _ => Err(unsupported("its body reads a name that is not known")),
        }
    }

    /// Resolves `table.column`, or `function.parameter`.
    pub fn qualified(&mut self, parts: &[Ident]) -> Result<Expr, Unsupported> {
        let not_known = || unsupported("its body reads a name that is not known");
        let [of, column] = parts else { return Err(not_known()) };
        let (of, column) = (folded(of)?, folded(column)?);
        for level in (0..self.scopes.len()).rev() {
            if let Some(shown) = self.scopes[level].iter().find(|shown| shown.name == of).cloned() {
                return match shown.table.columns.contains_key(&column) {
                    true => Ok(self.column(level, &shown, &column)),
                    false => Err(not_known()),
                };
            }
        }
        if of == self.body.function { self.named_parameter(&column) } else { Err(not_known()) }
    }
}

/// Returns the select of a query that has nothing but values, tables and a condition.
fn plain(query: &mut Query) -> Result<&mut Select, Unsupported> {
    let not_plain = || unsupported("its body is more than `select … from … where …`");
    let SetExpr::Select(select) = &*query.body else { return Err(not_plain()) };
    if !matches!(select.distinct, None | Some(Distinct::Distinct)) {
        return Err(not_plain());
    }
    let mut known = parse_query("SELECT 1")?;
    if let SetExpr::Select(plain) = &mut *known.body {
        plain.projection.clone_from(&select.projection);
        plain.from.clone_from(&select.from);
        plain.selection.clone_from(&select.selection);
        plain.distinct.clone_from(&select.distinct);
    }
    // A string as the name of a value is a part of the string before it.
    let is_named_by_string = |item: &SelectItem| matches!(item, SelectItem::ExprWithAlias { alias, .. } if alias.quote_style == Some('\''));
    if known != *query || select.projection.iter().any(is_named_by_string) {
        return Err(not_plain());
    }
    match &mut *query.body {
        SetExpr::Select(select) => Ok(select),
        _ => Err(not_plain()),
    }
}
