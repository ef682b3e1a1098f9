//! Operands in a policy: columns of the row, and expressions over claims.

use sqlparser::ast::{
    BinaryOperator, CastKind, Expr, Function, FunctionArg, FunctionArgExpr, FunctionArguments, Ident, Value,
};

use super::claim_call::{follow, is_path_part};
use super::list::only_expression;
use super::{Compiler, Unsupported, parse_body, unsupported};
use crate::model::policy::claim_document::document;
use crate::model::policy::claim_expr::{ClaimExpr, ClaimStep};
use crate::model::policy::predicate::Scalar;
use crate::model::row::column::{Column, ColumnKind};
use crate::model::row::datum::{Datum, Kind, Read};

/// The type of an operand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Type {
    /// A type whose values the relay compares.
    Known(Kind),
    /// An enum, by its name.
    Enum(String),
    /// A literal, which takes the type of the other operand.
    Untyped,
    Json,
    Jsonb,
    /// A list of values.
    Many(Kind),
    /// A type that only PostgreSQL compares.
    Foreign,
}

/// An operand before it is part of a predicate.
#[derive(Debug, Clone)]
pub(super) enum Operand {
    /// A value of the row.
    Row(Scalar, Type),
    /// A value of the claims.
    Claim(ClaimExpr, Type),
}

impl Operand {
    pub(super) fn of(&self) -> &Type {
        match self {
            Self::Row(_, of) | Self::Claim(_, of) => of,
        }
    }

    /// Converts a literal to the type of the other operand.
    pub(super) fn typed_as(self, wanted: &Type) -> Result<Self, Unsupported> {
        match (self, wanted) {
            (Self::Claim(ClaimExpr::Constant(None), Type::Untyped), _) => {
                Ok(Self::Claim(ClaimExpr::Constant(None), wanted.clone()))
            }
            (Self::Claim(ClaimExpr::Constant(Some(Datum::Text(text))), Type::Untyped), Type::Known(kind)) => {
                literal(&text, *kind)
            }
            (Self::Claim(ClaimExpr::Constant(Some(Datum::Text(text))), Type::Untyped), Type::Jsonb) => {
                constant_document(&text)
            }
            (operand, _) => Ok(operand),
        }
    }
}

fn literal(text: &str, kind: Kind) -> Result<Operand, Unsupported> {
    match kind.read(text) {
        Read::Value(datum) => Ok(Operand::Claim(ClaimExpr::Constant(Some(datum)), Type::Known(kind))),
        Read::Error | Read::Undecided => Err(unsupported("only PostgreSQL parses this literal")),
    }
}

fn constant_document(text: &str) -> Result<Operand, Unsupported> {
    document(text).map_err(|_| unsupported("only PostgreSQL parses this document"))?;
    let constant = ClaimExpr::Constant(Some(Datum::Text(text.into())));
    Ok(Operand::Claim(ClaimExpr::Document(Box::new(constant), true), Type::Jsonb))
}

impl Compiler<'_> {
    /// Compiles an expression.
    pub(super) fn operand(&self, expr: &Expr) -> Result<Operand, Unsupported> {
        match expr {
            Expr::Nested(inner) => self.operand(inner),
            Expr::Identifier(column) => self.column(column),
            Expr::CompoundIdentifier(parts) => match parts.as_slice() {
                [source, column] if self.item.as_ref().is_some_and(|item| item.is_named(source, column)) => {
                    let of = self.item.as_ref().map_or(Type::Foreign, |item| item.of.clone());
                    Ok(Operand::Claim(ClaimExpr::Item, of))
                }
                [relation, column] if relation.value == self.table => self.column(column),
                _ => Err(unsupported("it is not a column of the table")),
            },
            Expr::Value(value) => constant(&value.value),
            Expr::Cast { kind: CastKind::DoubleColon | CastKind::Cast, expr, data_type, .. } => {
                self.cast(expr, &data_type.to_string().to_ascii_lowercase(), &data_type.to_string())
            }
            Expr::BinaryOp { left, op: BinaryOperator::StringConcat, right } => self.concat(left, right),
            Expr::BinaryOp { left, op, right } => {
                let (for_text, path) = match op {
                    BinaryOperator::Arrow => (false, false),
                    BinaryOperator::LongArrow => (true, false),
                    BinaryOperator::HashArrow => (false, true),
                    BinaryOperator::HashLongArrow => (true, true),
                    _ => return self.claim_operator(left, op, right),
                };
                self.element(left, right, for_text, path)
            }
            Expr::CompoundFieldAccess { root, access_chain } => self.subscripted(root, access_chain),
            Expr::Position { expr, r#in } => self.position(expr, r#in),
            Expr::Trim { trim_where, trim_what, expr, trim_characters: None } => {
                self.trimmed(*trim_where, trim_what.as_deref(), expr)
            }
            Expr::Subquery(query) => match only_expression(query) {
                Some(inner) => self.operand(inner),
                None => Err(unsupported("only PostgreSQL evaluates a sub-select")),
            },
            Expr::Function(function) => self.call(function),
            _ => Err(unsupported("only PostgreSQL evaluates this kind of expression")),
        }
    }

    fn column(&self, name: &Ident) -> Result<Operand, Unsupported> {
        if self.without_columns {
            return Err(unsupported("it names a column"));
        }
        let found = self.columns.iter().position(|column| column.name == name.value);
        let Some(at) = found else { return Err(unsupported("it is not a column of the table")) };
        let column = &self.columns[at];
        let of = match column.shape() {
            ColumnKind::One(Kind::Enum) => Type::Enum(column.readable_type.clone()),
            ColumnKind::One(kind) => Type::Known(kind),
            ColumnKind::Many(kind) => Type::Many(kind),
            ColumnKind::Padded | ColumnKind::Foreign => Type::Foreign,
        };
        Ok(Operand::Row(Scalar::Column(at), of))
    }

    fn cast(&self, expr: &Expr, name: &str, as_written: &str) -> Result<Operand, Unsupported> {
        let foreign = || unsupported(&format!("only PostgreSQL evaluates the cast to {as_written}"));
        let inner = self.operand(expr)?;
        let is_enum = |column: &Column| {
            column.shape() == ColumnKind::One(Kind::Enum) && column.readable_type == as_written
        };
        if let Operand::Claim(ClaimExpr::Constant(value), Type::Untyped) = &inner
            && self.columns.iter().any(is_enum)
        {
            return Ok(Operand::Claim(ClaimExpr::Constant(value.clone()), Type::Enum(as_written.to_owned())));
        }
        let document = |claim: ClaimExpr, binary: bool| {
            let of = if binary { Type::Jsonb } else { Type::Json };
            Ok(Operand::Claim(ClaimExpr::Document(Box::new(claim), binary), of))
        };
        match (name, &inner) {
            ("json", Operand::Claim(claim, Type::Known(Kind::Text))) => {
                return document(claim.clone(), false);
            }
            ("json", Operand::Claim(_, Type::Json)) | ("jsonb", Operand::Claim(_, Type::Jsonb)) => {
                return Ok(inner);
            }
            ("jsonb", Operand::Claim(claim, Type::Known(Kind::Text))) => {
                return document(claim.clone(), true);
            }
            ("jsonb", Operand::Claim(ClaimExpr::Constant(Some(Datum::Text(text))), Type::Untyped)) => {
                return constant_document(text);
            }
            _ => {}
        }
        let kind = Kind::named(name).ok_or_else(foreign)?;
        let known = Type::Known(kind);
        match inner {
            Operand::Claim(claim, of) => match of {
                Type::Untyped => match claim {
                    ClaimExpr::Constant(None) => Ok(Operand::Claim(claim, known)),
                    ClaimExpr::Constant(Some(Datum::Text(text))) => literal(&text, kind),
                    _ => Err(foreign()),
                },
                Type::Known(from) if from == kind => Ok(Operand::Claim(claim, known)),
                Type::Known(Kind::Text | Kind::Varchar) => {
                    Ok(Operand::Claim(ClaimExpr::Cast(Box::new(claim), kind), known))
                }
                Type::Known(from) if kind == Kind::Text || (from.is_integer() && kind.is_integer()) => {
                    Ok(Operand::Claim(ClaimExpr::Cast(Box::new(claim), kind), known))
                }
                Type::Jsonb if kind == Kind::Bool || kind.is_integer() => {
                    Ok(Operand::Claim(ClaimExpr::Cast(Box::new(claim), kind), known))
                }
                _ => Err(foreign()),
            },
            Operand::Row(Scalar::Column(column), of) => match (of, kind) {
                (Type::Known(from), _) if from == kind => Ok(Operand::Row(Scalar::Column(column), known)),
                (Type::Known(Kind::Text | Kind::Varchar), Kind::Text | Kind::Varchar)
                | (Type::Known(Kind::Int2), Kind::Int4 | Kind::Int8)
                | (Type::Known(Kind::Int4), Kind::Int8) => Ok(Operand::Row(Scalar::Column(column), known)),
                (Type::Known(_) | Type::Enum(_), Kind::Text) => {
                    Ok(Operand::Row(Scalar::ColumnText(column), known))
                }
                _ => Err(foreign()),
            },
            Operand::Row(..) => Err(foreign()),
        }
    }

    fn element(&self, left: &Expr, right: &Expr, for_text: bool, path: bool) -> Result<Operand, Unsupported> {
        let Operand::Claim(document, of @ (Type::Json | Type::Jsonb)) = self.operand(left)? else {
            return Err(unsupported("only PostgreSQL reads documents in columns"));
        };
        let steps = if path { keys(right)? } else { vec![self.step(right)?] };
        // For a duplicate key, `json` steps into the first value, and serde_json into the last.
        if of == Type::Json && steps.len() > 1 {
            return Err(unsupported("only PostgreSQL follows a path into json"));
        }
        Ok(follow(document, steps, for_text, of))
    }

    /// Compiles `||` of texts. Of other types it means something else.
    fn concat(&self, left: &Expr, right: &Expr) -> Result<Operand, Unsupported> {
        let text = Type::Known(Kind::Text);
        match (self.operand(left)?, self.operand(right)?) {
            (one, other) if *one.of() != text && *other.of() != text => {
                Err(unsupported("only PostgreSQL evaluates || of other types than text"))
            }
            (one, other) => match (one.typed_as(&text)?, other.typed_as(&text)?) {
                (Operand::Claim(one, of), Operand::Claim(other, same)) if of == text && same == text => {
                    Ok(Operand::Claim(ClaimExpr::Concat(Box::new(one), Box::new(other)), text))
                }
                _ => Err(unsupported("only PostgreSQL evaluates || of columns")),
            },
        }
    }

    pub(super) fn step(&self, expr: &Expr) -> Result<ClaimStep, Unsupported> {
        match self.operand(expr)? {
            Operand::Claim(ClaimExpr::Constant(Some(Datum::Text(key))), _) => {
                Ok(ClaimStep::Key(key.to_string()))
            }
            Operand::Claim(ClaimExpr::Constant(Some(Datum::Int(index))), _) => Ok(ClaimStep::Index(index)),
            _ => Err(unsupported("the key is not a constant")),
        }
    }

    fn call(&self, function: &Function) -> Result<Operand, Unsupported> {
        let written = function.name.to_string();
        let bare = written.strip_prefix("pg_catalog.").unwrap_or(&written).to_ascii_lowercase();
        let arguments = match &function.args {
            FunctionArguments::List(list)
                if list.clauses.is_empty() && list.duplicate_treatment.is_none() =>
            {
                let one = |argument: &FunctionArg| match argument {
                    FunctionArg::Unnamed(FunctionArgExpr::Expr(expr)) => Some(expr.clone()),
                    _ => None,
                };
                list.args.iter().map(one).collect::<Option<Vec<Expr>>>()
            }
            _ => None,
        };
        let Some(arguments) = arguments.filter(|_| function.over.is_none() && function.filter.is_none())
        else {
            return Err(unsupported(&format!("only PostgreSQL evaluates {written}")));
        };
        match (bare.as_str(), arguments.as_slice()) {
            ("current_setting", [name]) => self.setting(name, false),
            ("current_setting", [name, Expr::Value(missing_ok)]) => {
                self.setting(name, missing_ok.value == Value::Boolean(true))
            }
            ("nullif", [one, other]) => match (self.operand(one)?, self.operand(other)?) {
                (Operand::Claim(one, of), other) => match other.typed_as(&of)? {
                    Operand::Claim(other, same) if same == of && matches!(of, Type::Known(_)) => {
                        Ok(Operand::Claim(ClaimExpr::NullIf(Box::new(one), Box::new(other)), of))
                    }
                    _ => Err(unsupported("only PostgreSQL evaluates nullif of different types")),
                },
                _ => Err(unsupported("only PostgreSQL evaluates nullif of a column")),
            },
            ("coalesce", _) => self.coalesce(&arguments),
            (_, []) if self.rights.helpers.contains_key(&written) => self.helper(&written),
            // Some names are quoted because they are also keywords.
            _ => match written.trim_start_matches("pg_catalog.").trim_matches('"') {
                name if name == name.to_ascii_lowercase() || !written.contains('"') => {
                    self.claim_call(&name.to_ascii_lowercase(), &arguments)
                }
                _ => Err(unsupported(&format!("only PostgreSQL evaluates {written}()"))),
            },
        }
    }

    fn setting(&self, name: &Expr, missing_ok: bool) -> Result<Operand, Unsupported> {
        let claim = match self.operand(name)? {
            Operand::Claim(ClaimExpr::Constant(Some(Datum::Text(name))), _) => match &*name {
                "request.jwt.claims" => ClaimExpr::Claims,
                "request.jwt.claim.sub" => ClaimExpr::Subject,
                "request.jwt.claim.role" => ClaimExpr::Role,
                name if missing_ok && name.starts_with("request.jwt.claim") => ClaimExpr::OtherSetting,
                _ => return Err(unsupported("only PostgreSQL evaluates this setting")),
            },
            _ => return Err(unsupported("the setting's name is not a constant")),
        };
        Ok(Operand::Claim(claim, Type::Known(Kind::Text)))
    }

    fn coalesce(&self, arguments: &[Expr]) -> Result<Operand, Unsupported> {
        let operands = arguments.iter().map(|one| self.operand(one)).collect::<Result<Vec<_>, _>>()?;
        let typed = operands.iter().map(Operand::of).find(|of| **of != Type::Untyped);
        let of = typed.cloned().unwrap_or(Type::Known(Kind::Text));
        let mut same = Vec::with_capacity(operands.len());
        for operand in operands {
            let operand = operand.typed_as(&of)?;
            if *operand.of() != of || matches!(of, Type::Foreign | Type::Many(_)) {
                return Err(unsupported("only PostgreSQL evaluates coalesce of different types"));
            }
            same.push(operand);
        }
        let claim = |operand: &Operand| match operand {
            Operand::Claim(claim, _) => Some(claim.clone()),
            Operand::Row(..) => None,
        };
        if let Some(exprs) = same.iter().map(claim).collect() {
            return Ok(Operand::Claim(ClaimExpr::Coalesce(exprs), of));
        }
        let scalars = same.into_iter().map(|operand| self.scalar(operand)).collect();
        Ok(Operand::Row(Scalar::Coalesce(scalars), of))
    }

    /// Compiles a call of a function without arguments by compiling its body.
    fn helper(&self, name: &str) -> Result<Operand, Unsupported> {
        let Some(helper) = self.rights.helpers.get(name).filter(|_| self.depth < MAX_HELPER_DEPTH) else {
            return Err(unsupported(&format!("only PostgreSQL evaluates {name}()")));
        };
        let in_body = |why: Unsupported| {
            unsupported(&format!("only PostgreSQL evaluates the body of {name}(): {}", why.0))
        };
        let body = parse_body(&helper.body).map_err(in_body)?;
        let result = self.function_body().operand(&body).map_err(in_body)?;
        let declared = match helper.returns.as_str() {
            "json" => Type::Json,
            "jsonb" => Type::Jsonb,
            other => Kind::named(other).map_or(Type::Foreign, Type::Known),
        };
        match result.typed_as(&declared).map_err(in_body)? {
            Operand::Claim(claim, of) if of == declared => Ok(Operand::Claim(claim, of)),
            _ => Err(unsupported(&format!("only PostgreSQL casts the result of {name}()"))),
        }
    }
}

/// The maximum nesting of helper calls.
pub(super) const MAX_HELPER_DEPTH: usize = 4;

fn constant(value: &Value) -> Result<Operand, Unsupported> {
    let (datum, of) = match value {
        Value::SingleQuotedString(text) | Value::EscapedStringLiteral(text) => {
            (Some(Datum::Text(text.as_str().into())), Type::Untyped)
        }
        Value::Number(digits, _) => match digits.parse::<i64>() {
            Ok(number) => {
                let kind = if i32::try_from(number).is_ok() { Kind::Int4 } else { Kind::Int8 };
                (Some(Datum::Int(number)), Type::Known(kind))
            }
            Err(_) => return Err(unsupported("only PostgreSQL compares fractions")),
        },
        Value::Boolean(value) => (Some(Datum::Bool(*value)), Type::Known(Kind::Bool)),
        Value::Null => (None, Type::Untyped),
        _ => return Err(unsupported("only PostgreSQL evaluates this kind of constant")),
    };
    Ok(Operand::Claim(ClaimExpr::Constant(datum), of))
}

/// Whether an element of an array constant stands for itself.
pub(super) fn is_plain(element: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | ':' | '@');
    !element.is_empty() && element.chars().all(is_plain) && !element.eq_ignore_ascii_case("null")
}

/// Parses a path, `'{a,0}'::text[]`, of keys and indexes.
fn keys(expr: &Expr) -> Result<Vec<ClaimStep>, Unsupported> {
    let unsupported_path = || unsupported("only PostgreSQL parses this path");
    match expr {
        Expr::Nested(inner) | Expr::Cast { expr: inner, .. } => keys(inner),
        Expr::Value(value) => {
            let (Value::SingleQuotedString(text) | Value::EscapedStringLiteral(text)) = &value.value else {
                return Err(unsupported_path());
            };
            let inside = text
                .strip_prefix('{')
                .and_then(|text| text.strip_suffix('}'))
                .ok_or_else(unsupported_path)?;
            let step = |key: &str| match is_plain(key) && is_path_part(key) {
                true => Ok(ClaimStep::PathPart(key.to_owned())),
                false => Err(unsupported_path()),
            };
            inside.split(',').map(step).collect()
        }
        _ => Err(unsupported_path()),
    }
}
