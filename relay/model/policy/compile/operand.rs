//! Values in a policy: columns of the row, and expressions over claims.

use sqlparser::ast::{
    BinaryOperator, CastKind, Expr, Function, FunctionArg, FunctionArgExpr, FunctionArguments, Ident, Value,
};

use super::list::only_expression;
use super::{Compiler, Refused, parse_body, refuse};
use crate::model::policy::claim_expr::{ClaimExpr, ClaimStep};
use crate::model::policy::predicate::Scalar;
use crate::model::row::column::{Column, ColumnKind};
use crate::model::row::datum::{Datum, Kind, Read};

/// The type of an operand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Type {
    /// One of those that are compared here.
    Known(Kind),
    /// An enum, by its name.
    Enum(String),
    /// A literal that takes the type of what it is compared with.
    Untyped,
    Json,
    Jsonb,
    /// A list of values.
    Many(Kind),
    /// Compared by PostgreSQL only.
    Foreign,
}

/// A value before it has its place in a predicate.
#[derive(Debug, Clone)]
pub(super) enum Operand {
    /// Of the row.
    Row(Scalar, Type),
    /// Of the claims.
    Claim(ClaimExpr, Type),
}

impl Operand {
    pub(super) fn of(&self) -> &Type {
        match self {
            Self::Row(_, of) | Self::Claim(_, of) => of,
        }
    }

    /// The operand as a value of a type that it may be compared with.
    pub(super) fn typed_as(self, wanted: &Type) -> Result<Self, Refused> {
        match (self, wanted) {
            (Self::Claim(ClaimExpr::Constant(None), Type::Untyped), _) => {
                Ok(Self::Claim(ClaimExpr::Constant(None), wanted.clone()))
            }
            (Self::Claim(ClaimExpr::Constant(Some(Datum::Text(text))), Type::Untyped), Type::Known(kind)) => {
                literal(&text, *kind)
            }
            (operand, _) => Ok(operand),
        }
    }
}

fn literal(text: &str, kind: Kind) -> Result<Operand, Refused> {
    match kind.read(text) {
        Read::Value(datum) => Ok(Operand::Claim(ClaimExpr::Constant(Some(datum)), Type::Known(kind))),
        Read::Raises | Read::Unsure => Err(refuse("its spelling is PostgreSQL's to read")),
    }
}

impl Compiler<'_> {
    /// The value of an expression.
    pub(super) fn operand(&self, expr: &Expr) -> Result<Operand, Refused> {
        match expr {
            Expr::Nested(inner) => self.operand(inner),
            Expr::Identifier(column) => self.column(column),
            Expr::CompoundIdentifier(parts) => match parts.as_slice() {
                [relation, column] if relation.value == self.table => self.column(column),
                _ => Err(refuse("it is not a column of the table")),
            },
            Expr::Value(value) => constant(&value.value),
            Expr::Cast { kind: CastKind::DoubleColon | CastKind::Cast, expr, data_type, .. } => {
                self.cast(expr, &data_type.to_string().to_ascii_lowercase(), &data_type.to_string())
            }
            Expr::BinaryOp { left, op, right } => {
                let (for_text, path) = match op {
                    BinaryOperator::Arrow => (false, false),
                    BinaryOperator::LongArrow => (true, false),
                    BinaryOperator::HashArrow => (false, true),
                    BinaryOperator::HashLongArrow => (true, true),
                    _ => return Err(refuse(&format!("the operator {op} is PostgreSQL's"))),
                };
                self.part(left, right, for_text, path)
            }
            Expr::Subquery(query) => match only_expression(query) {
                Some(inner) => self.operand(inner),
                None => Err(refuse("a sub-select is PostgreSQL's")),
            },
            Expr::Function(function) => self.call(function),
            _ => Err(refuse("this kind of expression is PostgreSQL's")),
        }
    }

    fn column(&self, name: &Ident) -> Result<Operand, Refused> {
        if self.without_columns {
            return Err(refuse("it names a column"));
        }
        let found = self.columns.iter().position(|column| column.name == name.value);
        let Some(at) = found else { return Err(refuse("it is not a column of the table")) };
        let column = &self.columns[at];
        let of = match column.shape() {
            ColumnKind::One(Kind::Enum) => Type::Enum(column.readable_type.clone()),
            ColumnKind::One(kind) => Type::Known(kind),
            ColumnKind::Many(kind) => Type::Many(kind),
            ColumnKind::Padded | ColumnKind::Foreign => Type::Foreign,
        };
        Ok(Operand::Row(Scalar::Column(at), of))
    }

    fn cast(&self, expr: &Expr, name: &str, as_written: &str) -> Result<Operand, Refused> {
        let foreign = || refuse(&format!("the cast to {as_written} is PostgreSQL's"));
        let inner = self.operand(expr)?;
        let is_enum = |column: &Column| {
            column.shape() == ColumnKind::One(Kind::Enum) && column.readable_type == as_written
        };
        if let Operand::Claim(ClaimExpr::Constant(value), Type::Untyped) = &inner
            && self.columns.iter().any(is_enum)
        {
            return Ok(Operand::Claim(ClaimExpr::Constant(value.clone()), Type::Enum(as_written.to_owned())));
        }
        let document = |term: ClaimExpr, binary: bool| {
            let of = if binary { Type::Jsonb } else { Type::Json };
            Ok(Operand::Claim(ClaimExpr::Document(Box::new(term), binary), of))
        };
        match (name, &inner) {
            ("json", Operand::Claim(term, Type::Known(Kind::Text))) => return document(term.clone(), false),
            ("jsonb", Operand::Claim(term, Type::Known(Kind::Text))) => return document(term.clone(), true),
            _ => {}
        }
        let kind = Kind::named(name).ok_or_else(foreign)?;
        let known = Type::Known(kind);
        match inner {
            Operand::Claim(term, of) => match of {
                Type::Untyped => match term {
                    ClaimExpr::Constant(None) => Ok(Operand::Claim(term, known)),
                    ClaimExpr::Constant(Some(Datum::Text(text))) => literal(&text, kind),
                    _ => Err(foreign()),
                },
                Type::Known(from) if from == kind => Ok(Operand::Claim(term, known)),
                Type::Known(Kind::Text | Kind::Varchar) => {
                    Ok(Operand::Claim(ClaimExpr::Cast(Box::new(term), kind), known))
                }
                Type::Known(from) if kind == Kind::Text || (from.is_integer() && kind.is_integer()) => {
                    Ok(Operand::Claim(ClaimExpr::Cast(Box::new(term), kind), known))
                }
                Type::Jsonb if kind == Kind::Bool => {
                    Ok(Operand::Claim(ClaimExpr::Cast(Box::new(term), kind), known))
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

    fn part(&self, left: &Expr, right: &Expr, for_text: bool, path: bool) -> Result<Operand, Refused> {
        let Operand::Claim(document, of @ (Type::Json | Type::Jsonb)) = self.operand(left)? else {
            return Err(refuse("a document in a column is PostgreSQL's to read"));
        };
        let mut steps = if path { keys(right)? } else { vec![self.step(right)?] };
        let Some(last) = steps.pop() else { return Err(refuse("the path is empty")) };
        // Of a key that stands twice, `json` looks into the first and we into the last.
        if of == Type::Json && !steps.is_empty() {
            return Err(refuse("a path into json is PostgreSQL's to read"));
        }
        let inner = steps.into_iter().fold(document, |inner, step| ClaimExpr::Part(Box::new(inner), step));
        Ok(match for_text {
            true => Operand::Claim(ClaimExpr::PartText(Box::new(inner), last), Type::Known(Kind::Text)),
            false => Operand::Claim(ClaimExpr::Part(Box::new(inner), last), of),
        })
    }

    fn step(&self, expr: &Expr) -> Result<ClaimStep, Refused> {
        match self.operand(expr)? {
            Operand::Claim(ClaimExpr::Constant(Some(Datum::Text(key))), _) => {
                Ok(ClaimStep::Key(key.to_string()))
            }
            Operand::Claim(ClaimExpr::Constant(Some(Datum::Int(index))), _) => Ok(ClaimStep::Index(index)),
            _ => Err(refuse("the key is not a constant")),
        }
    }

    fn call(&self, function: &Function) -> Result<Operand, Refused> {
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
            return Err(refuse(&format!("{written} is PostgreSQL's")));
        };
        match (bare.as_str(), arguments.as_slice()) {
            ("current_setting", [name]) => self.setting(name, false),
            ("current_setting", [name, Expr::Value(may_miss)]) => {
                self.setting(name, may_miss.value == Value::Boolean(true))
            }
            ("nullif", [one, other]) => match (self.operand(one)?, self.operand(other)?) {
                (Operand::Claim(one, of), other) => match other.typed_as(&of)? {
                    Operand::Claim(other, same) if same == of && matches!(of, Type::Known(_)) => {
                        Ok(Operand::Claim(ClaimExpr::NullIf(Box::new(one), Box::new(other)), of))
                    }
                    _ => Err(refuse("nullif of different types is PostgreSQL's")),
                },
                _ => Err(refuse("nullif of a column is PostgreSQL's")),
            },
            ("coalesce", _) => self.coalesce(&arguments),
            (_, []) if self.rights.helpers.contains_key(&written) => self.helper(&written),
            _ => Err(refuse(&format!("{written}() is PostgreSQL's"))),
        }
    }

    fn setting(&self, name: &Expr, may_miss: bool) -> Result<Operand, Refused> {
        let term = match self.operand(name)? {
            Operand::Claim(ClaimExpr::Constant(Some(Datum::Text(name))), _) => match &*name {
                "request.jwt.claims" => ClaimExpr::Claims,
                "request.jwt.claim.sub" => ClaimExpr::Subject,
                "request.jwt.claim.role" => ClaimExpr::Role,
                name if may_miss && name.starts_with("request.jwt.claim") => ClaimExpr::Unset,
                _ => return Err(refuse("this setting is PostgreSQL's")),
            },
            _ => return Err(refuse("the setting's name is not a constant")),
        };
        Ok(Operand::Claim(term, Type::Known(Kind::Text)))
    }

    fn coalesce(&self, arguments: &[Expr]) -> Result<Operand, Refused> {
        let operands = arguments.iter().map(|one| self.operand(one)).collect::<Result<Vec<_>, _>>()?;
        let typed = operands.iter().map(Operand::of).find(|of| **of != Type::Untyped);
        let of = typed.cloned().unwrap_or(Type::Known(Kind::Text));
        let mut same = Vec::with_capacity(operands.len());
        for operand in operands {
            let operand = operand.typed_as(&of)?;
            if *operand.of() != of || matches!(of, Type::Foreign | Type::Many(_)) {
                return Err(refuse("coalesce of different types is PostgreSQL's"));
            }
            same.push(operand);
        }
        let term = |operand: &Operand| match operand {
            Operand::Claim(term, _) => Some(term.clone()),
            Operand::Row(..) => None,
        };
        if let Some(terms) = same.iter().map(term).collect() {
            return Ok(Operand::Claim(ClaimExpr::Coalesce(terms), of));
        }
        let scalars = same.into_iter().map(|operand| self.scalar(operand)).collect();
        Ok(Operand::Row(Scalar::Coalesce(scalars), of))
    }

    /// What a function without arguments gives: its body stands for it.
    fn helper(&self, name: &str) -> Result<Operand, Refused> {
        let Some(helper) = self.rights.helpers.get(name).filter(|_| self.depth < DEEPEST) else {
            return Err(refuse(&format!("{name}() is PostgreSQL's")));
        };
        let unread = |why: Refused| refuse(&format!("the body of {name}() is PostgreSQL's: {}", why.0));
        let body = parse_body(&helper.body).map_err(unread)?;
        let found = self.inside().operand(&body).map_err(unread)?;
        let promised = match helper.returns.as_str() {
            "json" => Type::Json,
            "jsonb" => Type::Jsonb,
            other => Kind::named(other).map_or(Type::Foreign, Type::Known),
        };
        match found.typed_as(&promised).map_err(unread)? {
            Operand::Claim(term, of) if of == promised => Ok(Operand::Claim(term, of)),
            _ => Err(refuse(&format!("{name}() returns what PostgreSQL casts"))),
        }
    }
}

/// Helpers that call helpers that call helpers.
const DEEPEST: usize = 4;

fn constant(value: &Value) -> Result<Operand, Refused> {
    let (datum, of) = match value {
        Value::SingleQuotedString(text) | Value::EscapedStringLiteral(text) => {
            (Some(Datum::Text(text.as_str().into())), Type::Untyped)
        }
        Value::Number(digits, _) => match digits.parse::<i64>() {
            Ok(number) => {
                let kind = if i32::try_from(number).is_ok() { Kind::Int4 } else { Kind::Int8 };
                (Some(Datum::Int(number)), Type::Known(kind))
            }
            Err(_) => return Err(refuse("a fraction is PostgreSQL's to compare")),
        },
        Value::Boolean(value) => (Some(Datum::Bool(*value)), Type::Known(Kind::Bool)),
        Value::Null => (None, Type::Untyped),
        _ => return Err(refuse("this kind of constant is PostgreSQL's")),
    };
    Ok(Operand::Claim(ClaimExpr::Constant(datum), of))
}

/// The keys of a path, `'{a,b}'::text[]`, when each can only be a key.
fn keys(expr: &Expr) -> Result<Vec<ClaimStep>, Refused> {
    let odd = || refuse("this path is PostgreSQL's to read");
    match expr {
        Expr::Nested(inner) | Expr::Cast { expr: inner, .. } => keys(inner),
        Expr::Value(value) => {
            let (Value::SingleQuotedString(text) | Value::EscapedStringLiteral(text)) = &value.value else {
                return Err(odd());
            };
            let inside = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')).ok_or_else(odd)?;
            let is_word = |key: &str| {
                key.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
                    && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
                    && !key.eq_ignore_ascii_case("null")
            };
            inside
                .split(',')
                .map(|key| if is_word(key) { Ok(ClaimStep::Key(key.to_owned())) } else { Err(odd()) })
                .collect()
        }
        _ => Err(odd()),
    }
}
