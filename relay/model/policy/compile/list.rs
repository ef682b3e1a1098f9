//! Lists in a policy: array columns, and the elements of claims that are arrays.

use sqlparser::ast::{
    BinaryOperator, Distinct, Expr, Function, FunctionArg, FunctionArgExpr, FunctionArguments, GroupByExpr,
    Ident, Query, Select, SelectItem, SetExpr, TableFactor,
};

use super::invert::bare;
use super::operand::{Operand, Type};
use super::{Compiler, Unsupported, unsupported};
use crate::model::policy::claim_expr::ClaimExpr;
use crate::model::policy::predicate::Predicate;
use crate::model::row::datum::Kind;

impl Compiler<'_> {
    /// Compiles an expression that is a list: an array column, or `array(select jsonb_array_elements_text(…))`.
    pub(super) fn list(&self, expr: &Expr) -> Result<Operand, Unsupported> {
        match expr {
            Expr::Nested(inner) => self.list(inner),
            Expr::Function(Function { name, args: FunctionArguments::Subquery(query), .. })
                if name.to_string().eq_ignore_ascii_case("array") =>
            {
                self.claim_list(query)
            }
            Expr::Cast { expr, data_type, .. } => {
                let name = data_type.to_string().to_ascii_lowercase();
                match (self.list(expr)?, name.strip_suffix("[]").and_then(Kind::named)) {
                    (Operand::Claim(list, _), Some(kind)) => {
                        Ok(Operand::Claim(ClaimExpr::Cast(Box::new(list), kind), Type::Many(kind)))
                    }
                    (Operand::Row(column, Type::Many(Kind::Text | Kind::Varchar)), Some(Kind::Text)) => {
                        Ok(Operand::Row(column, Type::Many(Kind::Text)))
                    }
                    _ => Err(unsupported(&format!("only PostgreSQL evaluates the cast to {name}"))),
                }
            }
            _ => match self.operand(expr)? {
                operand if matches!(operand.of(), Type::Many(_)) => Ok(operand),
                _ => Err(unsupported("only PostgreSQL evaluates this kind of list")),
            },
        }
    }

    /// Compiles a query that lists the elements of a claim.
    pub(super) fn claim_list(&self, query: &Query) -> Result<Operand, Unsupported> {
        let not_plain = || unsupported("only PostgreSQL evaluates a sub-select");
        let select = plain_select(query).ok_or_else(not_plain)?;
        let projected = projected(select).ok_or_else(not_plain)?;
        if select.selection.is_some() || matches!(select.distinct, Some(Distinct::On(_))) {
            return Err(not_plain());
        }
        match select.from.as_slice() {
            [] => self.elements(projected, None),
            [one] if one.joins.is_empty() => {
                self.elements(projected, Some(&ListSource::of(&one.relation).ok_or_else(not_plain)?))
            }
            _ => Err(not_plain()),
        }
    }

    /// Compiles the projection of such a query: the elements, with or without a cast.
    fn elements(&self, expr: &Expr, source: Option<&ListSource<'_>>) -> Result<Operand, Unsupported> {
        let texts = |name: &str, argument: &Expr| -> Result<Operand, Unsupported> {
            let bare = name.strip_prefix("pg_catalog.").unwrap_or(name);
            match (bare, self.operand(argument)?) {
                ("jsonb_array_elements_text", Operand::Claim(claim, Type::Jsonb))
                | ("json_array_elements_text", Operand::Claim(claim, Type::Json)) => {
                    Ok(Operand::Claim(ClaimExpr::TextList(Box::new(claim), false), Type::Many(Kind::Text)))
                }
                _ => Err(unsupported(&format!("only PostgreSQL evaluates {name}()"))),
            }
        };
        match (expr, source) {
            (expr, Some(source)) if source.is_of_documents() => self.mapped(expr, source),
            (Expr::Nested(inner), _) => self.elements(inner, source),
            (Expr::Cast { expr, data_type, .. }, _) => {
                let kind = Kind::named(&data_type.to_string().to_ascii_lowercase());
                match (self.elements(expr, source)?, kind) {
                    (Operand::Claim(list, _), Some(kind)) => {
                        Ok(Operand::Claim(ClaimExpr::Cast(Box::new(list), kind), Type::Many(kind)))
                    }
                    _ => Err(unsupported(&format!("only PostgreSQL evaluates the cast to {data_type}"))),
                }
            }
            (column, Some(source)) if source.is_its_column(column) => {
                texts(&source.function, source.argument)
            }
            (expr, Some(source)) => self.mapped(expr, source),
            (Expr::Function(Function { name, args: FunctionArguments::List(list), .. }), None) => {
                match list.args.as_slice() {
                    [FunctionArg::Unnamed(FunctionArgExpr::Expr(argument))] => {
                        texts(&name.to_string(), argument)
                    }
                    _ => Err(unsupported(&format!("only PostgreSQL evaluates {name}()"))),
                }
            }
            _ => Err(unsupported("only PostgreSQL evaluates this kind of list")),
        }
    }
}

impl Compiler<'_> {
    /// Compiles an expression of each element of a claim that is an array.
    fn mapped(&self, expr: &Expr, source: &ListSource<'_>) -> Result<Operand, Unsupported> {
        let Operand::Claim(claim, Type::Jsonb) = self.operand(source.argument)? else {
            return Err(unsupported("only PostgreSQL reads documents in columns"));
        };
        let (list, of) = match source.bare_function() {
            "jsonb_array_elements" => (ClaimExpr::Items(Box::new(claim)), Type::Jsonb),
            "jsonb_array_elements_text" => {
                (ClaimExpr::TextList(Box::new(claim), false), Type::Known(Kind::Text))
            }
            name => return Err(unsupported(&format!("only PostgreSQL evaluates {name}()"))),
        };
        let item = Item { source: source.alias.value.clone(), column: source.column.value.clone(), of };
        let compiler = Compiler {
            without_columns: true,
            item: Some(item),
            ..Compiler::of(self.table, self.columns, self.rights)
        };
        match compiler.operand(expr)? {
            Operand::Claim(expr, Type::Known(kind)) if kind != Kind::Enum => {
                Ok(Operand::Claim(ClaimExpr::Map(Box::new(list), Box::new(expr)), Type::Many(kind)))
            }
            _ => Err(unsupported("only PostgreSQL evaluates this kind of list")),
        }
    }

    /// Compiles `exists (select from jsonb_array_elements_text(…) e where e = value)`.
    pub(super) fn exists_in_list(&self, query: &Query) -> Result<Predicate, Unsupported> {
        let not_plain = || unsupported("only PostgreSQL evaluates a sub-select");
        let select = plain_select(query).ok_or_else(not_plain)?;
        let ([from], Some(selection)) = (select.from.as_slice(), &select.selection) else {
            return Err(not_plain());
        };
        let source =
            ListSource::of(&from.relation).filter(|_| from.joins.is_empty()).ok_or_else(not_plain)?;
        let Expr::BinaryOp { left, op: BinaryOperator::Eq, right } = bare(selection) else {
            return Err(not_plain());
        };
        let compared = |element: &Expr, value: &Expr| {
            let list = self.elements(element, Some(&source))?;
            self.among_list(self.operand(value)?, list)
        };
        let found = compared(left, right).or_else(|_| compared(right, left))?;
        // Without an equal element it finds none, whether or not it compares with null.
        Ok(Predicate::Is(Box::new(found), true))
    }
}

/// The element of a list, by the names that it has in a query.
#[derive(Debug, Clone)]
pub(super) struct Item {
    source: String,
    column: String,
    pub of: Type,
}

impl Item {
    pub fn is_named(&self, source: &Ident, column: &Ident) -> bool {
        source.value == self.source && column.value == self.column
    }
}

/// `from jsonb_array_elements_text(…) alias (column)`
struct ListSource<'a> {
    function: String,
    argument: &'a Expr,
    alias: &'a Ident,
    column: &'a Ident,
}

impl<'a> ListSource<'a> {
    fn of(factor: &'a TableFactor) -> Option<Self> {
        let TableFactor::Table { name, args: Some(args), alias: Some(alias), with_ordinality: false, .. } =
            factor
        else {
            return None;
        };
        let [FunctionArg::Unnamed(FunctionArgExpr::Expr(argument))] = args.args.as_slice() else {
            return None;
        };
        let [column] = alias.columns.as_slice() else { return None };
        Some(Self { function: name.to_string(), argument, alias: &alias.name, column: &column.name })
    }

    fn bare_function(&self) -> &str {
        self.function.strip_prefix("pg_catalog.").unwrap_or(&self.function)
    }

    fn is_of_documents(&self) -> bool {
        self.bare_function() == "jsonb_array_elements"
    }

    fn is_its_column(&self, expr: &Expr) -> bool {
        match expr {
            Expr::Identifier(column) => column == self.column,
            Expr::CompoundIdentifier(parts) => {
                matches!(parts.as_slice(), [alias, column] if alias == self.alias && column == self.column)
            }
            _ => false,
        }
    }
}

/// Returns the expression of a query that is only `select x`.
pub(super) fn only_expression(query: &Query) -> Option<&Expr> {
    let select = plain_select(query)?;
    (select.from.is_empty() && select.selection.is_none()).then(|| projected(select))?
}

/// Returns the one expression of a select.
pub(super) fn projected(select: &Select) -> Option<&Expr> {
    match select.projection.as_slice() {
        [SelectItem::UnnamedExpr(expr) | SelectItem::ExprWithAlias { expr, .. }] => Some(expr),
        _ => None,
    }
}

/// Returns the select of a query that is only `select … from … where …`.
pub(super) fn plain_select(query: &Query) -> Option<&Select> {
    let Query { with: None, body, limit_clause: None, fetch: None, locks, .. } = query else { return None };
    let SetExpr::Select(select) = &**body else { return None };
    let no_groups = matches!(&select.group_by, GroupByExpr::Expressions(by, modifiers) if by.is_empty() && modifiers.is_empty());
    let plain = locks.is_empty() && no_groups && select.having.is_none() && select.named_window.is_empty();
    plain.then_some(select)
}
