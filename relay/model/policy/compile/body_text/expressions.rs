//! Expressions in a body: constants, operators, casts and calls, with the order in which PostgreSQL evaluates them.

use sqlparser::ast::{
    BinaryOperator, CastKind, Expr, Function, FunctionArg, FunctionArgExpr, FunctionArguments, ObjectName,
    UnaryOperator, Value,
};

use super::super::invert::nest;
use super::super::{Unsupported, parser, unsupported};
use super::names::{Resolver, object_name, parts_of};
use super::{NamedFunction, Part, parameter};

/// Words that stand before brackets and are no functions.
const NO_FUNCTIONS: &[&str] = &["all", "any", "exists", "grouping", "row", "some", "treat", "values"];

/// Functions that make one value of many rows: those of the query whose columns they read.
pub(in super::super) const AGGREGATES: &[&str] = &[
    "array_agg",
    "avg",
    "bit_and",
    "bit_or",
    "bit_xor",
    "bool_and",
    "bool_or",
    "count",
    "every",
    "max",
    "min",
    "string_agg",
    "sum",
];

/// How tightly an expression binds: PostgreSQL and the parser agree on the operands of one that contains only tighter ones.
fn tightness(expr: &Expr) -> u8 {
    match expr {
        Expr::BinaryOp { op: BinaryOperator::Or, .. } => 1,
        Expr::BinaryOp { op: BinaryOperator::And, .. } => 2,
        Expr::UnaryOp { .. } => 3,
        Expr::IsNull(_)
        | Expr::IsNotNull(_)
        | Expr::IsTrue(_)
        | Expr::IsNotTrue(_)
        | Expr::IsFalse(_)
        | Expr::IsNotFalse(_)
        | Expr::IsUnknown(_)
        | Expr::IsNotUnknown(_)
        | Expr::IsDistinctFrom(..)
        | Expr::IsNotDistinctFrom(..) => 4,
        Expr::BinaryOp { op: BinaryOperator::Arrow | BinaryOperator::LongArrow, .. } => 7,
        Expr::BinaryOp { .. } => 5,
        Expr::InList { .. } | Expr::InSubquery { .. } | Expr::AnyOp { .. } => 6,
        _ => 9,
    }
}

impl Resolver<'_> {
    /// Resolves operands that have to bind tighter than the expression itself.
    fn operand(&mut self, expr: &mut Box<Expr>, looser: u8) -> Result<(), Unsupported> {
        if tightness(expr) <= looser {
            return Err(unsupported("its body has operators without brackets whose order is not certain"));
        }
        self.expr(expr)?;
        if tightness(expr) < 9 {
            *expr = nest((**expr).clone());
        }
        Ok(())
    }

    pub fn expr(&mut self, expr: &mut Expr) -> Result<(), Unsupported> {
        let own = tightness(expr);
        match expr {
            Expr::Nested(inner) => self.expr(inner),
            Expr::Identifier(ident) => self.name(ident).map(|found| *expr = found),
            Expr::CompoundIdentifier(parts) => self.qualified(parts).map(|found| *expr = found),
            Expr::Value(value) => self.constant(&value.value),
            Expr::BinaryOp { left, op, right } => {
                use BinaryOperator::{And, Arrow, Eq, Gt, GtEq, LongArrow, Lt, LtEq, NotEq, Or};
                let looser = match op {
                    And | Or | Arrow | LongArrow => own - 1,
                    Eq | NotEq | Lt | LtEq | Gt | GtEq => own,
                    _ => return Err(unsupported("its body has an operator that the relay does not know")),
                };
                self.operand(left, looser)?;
                self.operand(right, if matches!(op, And | Or) { looser } else { own })
            }
            Expr::UnaryOp { op: UnaryOperator::Not, expr }
            | Expr::IsNull(expr)
            | Expr::IsNotNull(expr)
            | Expr::IsTrue(expr)
            | Expr::IsNotTrue(expr)
            | Expr::IsFalse(expr)
            | Expr::IsNotFalse(expr)
            | Expr::IsUnknown(expr)
            | Expr::IsNotUnknown(expr) => self.operand(expr, own.max(if own == 3 { 3 } else { 6 })),
            Expr::IsDistinctFrom(one, other) | Expr::IsNotDistinctFrom(one, other) => {
                self.operand(one, 6)?;
                self.operand(other, 6)
            }
            Expr::Exists { subquery, .. } => self.existing(subquery),
            Expr::InSubquery { expr, subquery, .. } => {
                self.operand(expr, own)?;
                self.query(subquery)
            }
            Expr::InList { expr, list, .. } => {
                self.operand(expr, own)?;
                list.iter_mut().try_for_each(|one| self.expr(one))
            }
            Expr::AnyOp { left, compare_op: BinaryOperator::Eq, right, .. }
                if matches!(**right, Expr::Function(_) | Expr::Cast { .. }) =>
            {
                self.operand(left, own)?;
                self.expr(right)
            }
            Expr::Subquery(query) => self.query(query),
            Expr::Cast {
                kind: kind @ (CastKind::DoubleColon | CastKind::Cast),
                expr,
                data_type,
                format: None,
            } => {
                let name = data_type.to_string().to_ascii_lowercase();
                let of =
                    system_type(&name).ok_or_else(|| unsupported("its body has a cast to another type"))?;
                *data_type =
                    parser(&of)?.parse_data_type().map_err(|error| Unsupported(error.to_string()))?;
                if tightness(expr) < 9 && *kind == CastKind::DoubleColon {
                    return Err(unsupported(
                        "its body has operators without brackets whose order is not certain",
                    ));
                }
                *kind = CastKind::DoubleColon;
                self.operand(expr, 0)
            }
            Expr::Function(function) => self.call(function),
            Expr::Case { operand: None, conditions, else_result, .. } => {
                for branch in conditions {
                    self.expr(&mut branch.condition)?;
                    self.expr(&mut branch.result)?;
                }
                else_result.as_mut().map_or(Ok(()), |result| self.expr(result))
            }
            _ => Err(unsupported("its body has an expression that the relay does not know")),
        }
    }

    fn constant(&self, value: &Value) -> Result<(), Unsupported> {
        let is_known = match value {
            Value::Number(digits, false) => digits.bytes().all(|digit| digit.is_ascii_digit()),
            Value::Placeholder(number) => parameter(number).is_some_and(|at| at < self.body.types.len()),
            // `EscapedStringLiteral` is one with a quote in it: there are no backslashes.
            Value::SingleQuotedString(_)
            | Value::EscapedStringLiteral(_)
            | Value::Boolean(_)
            | Value::Null => true,
            _ => false,
        };
        if is_known {
            Ok(())
        } else {
            Err(unsupported("its body has a constant that the relay does not know"))
        }
    }

    fn call(&mut self, function: &mut Function) -> Result<(), Unsupported> {
        let is_plain = function.over.is_none()
            && function.filter.is_none()
            && function.null_treatment.is_none()
            && function.within_group.is_empty()
            && matches!(function.parameters, FunctionArguments::None);
        let not_plain = || unsupported("its body calls a function in an unusual way");
        let name = parts_of(&function.name)?;
        let is_aggregate = matches!(name.as_slice(), [.., name] if AGGREGATES.contains(&name.as_str()));
        let before = self.columns;
        match &mut function.args {
            FunctionArguments::List(list)
                if is_plain && list.clauses.is_empty() && list.duplicate_treatment.is_none() =>
            {
                for argument in &mut list.args {
                    match argument {
                        FunctionArg::Unnamed(FunctionArgExpr::Expr(argument)) => self.expr(argument)?,
                        FunctionArg::Unnamed(FunctionArgExpr::Wildcard) if is_aggregate => self.columns += 1,
                        _ => return Err(not_plain()),
                    }
                }
            }
            FunctionArguments::Subquery(query)
                if is_plain && function.name.to_string().eq_ignore_ascii_case("array") =>
            {
                return self.query(query);
            }
            _ => return Err(not_plain()),
        }
        if is_aggregate && self.columns == before {
            return Err(unsupported("an aggregate in its body may be of another query"));
        }
        function.name = self.function(&name)?;
        Ok(())
    }

    /// Resolves the name of a function: the only one that it can mean.
    fn function(&mut self, name: &[String]) -> Result<ObjectName, Unsupported> {
        let not_known = || unsupported("its body calls a function that is not known, or one of several");
        let (found, is_system): (Vec<&NamedFunction>, bool) = match name {
            [schema, name] if schema == "pg_catalog" => (Vec::new(), self.body.system.contains(name)),
            [schema, name] => {
                let functions = self.body.functions.iter();
                (functions.filter(|known| known.schema == *schema && known.name == *name).collect(), false)
            }
            [name] if !NO_FUNCTIONS.contains(&name.as_str()) => {
                let is_reached = |known: &&NamedFunction| {
                    self.body.path.as_ref().is_none_or(|path| path.contains(&known.schema))
                        && known.name == *name
                };
                let is_system =
                    self.body.system.contains(name) || matches!(name.as_str(), "coalesce" | "nullif");
                (self.body.functions.iter().filter(is_reached).collect(), is_system)
            }
            _ => return Err(not_known()),
        };
        match (found.as_slice(), is_system, name) {
            ([], true, [.., name]) => object_name(name),
            ([one], false, [_, _]) => {
                self.parts.insert(Part::function(one));
                object_name(&one.written)
            }
            ([one], false, [_]) if self.body.path.is_some() => {
                self.parts.insert(Part::function(one));
                object_name(&one.written)
            }
            _ => Err(not_known()),
        }
    }
}

/// Returns the name that PostgreSQL gives a type of its own, or a list of it.
pub(super) fn system_type(name: &str) -> Option<String> {
    let (one, list) = name.strip_suffix("[]").map_or((name, ""), |one| (one, "[]"));
    let one = match one {
        "int" | "integer" | "int4" => "integer",
        "bigint" | "int8" => "bigint",
        "smallint" | "int2" => "smallint",
        "bool" | "boolean" => "boolean",
        "varchar" | "character varying" => "character varying",
        "text" | "uuid" | "json" | "jsonb" => one,
        _ => return None,
    };
    Some(format!("{one}{list}"))
}
