//! Functions and operators of claims alone, whose value the relay computes once for each identity.

use sqlparser::ast::{AccessExpr, BinaryOperator, Expr, Subscript, TrimWhereField, Value};

use super::condition::constants;
use super::operand::{Operand, Type};
use super::{Compiler, MAX_CALLS, Unsupported, unsupported};
use crate::model::policy::claim_expr::{ClaimExpr, ClaimStep};
use crate::model::policy::claim_function::ClaimFunction;
use crate::model::row::datum::{Datum, Kind};
use crate::model::row::pattern::Pattern;

const TEXT: Type = Type::Known(Kind::Text);
const INT: Type = Type::Known(Kind::Int4);

/// The type of a parameter; `None` is a document.
type Parameter = Option<Kind>;
const T: Parameter = Some(Kind::Text);
const N: Parameter = Some(Kind::Int4);
const DOCUMENT: Parameter = None;

impl Compiler<'_> {
    /// Compiles the call of a system function whose arguments are all claims or constants.
    pub(super) fn claim_call(&self, name: &str, arguments: &[Expr]) -> Result<Operand, Unsupported> {
        let folding = || {
            self.rights
                .folding
                .ok_or_else(|| unsupported("only PostgreSQL folds the letters of this database"))
        };
        let (function, of, returns): (_, &[Parameter], _) = match (name, arguments.len()) {
            ("lower", 1) => (ClaimFunction::Lower(folding()?), &[T], TEXT),
            ("upper", 1) => (ClaimFunction::Upper(folding()?), &[T], TEXT),
            ("btrim", 1) => (ClaimFunction::Trim(true, true), &[T], TEXT),
            ("ltrim", 1) => (ClaimFunction::Trim(true, false), &[T], TEXT),
            ("rtrim", 1) => (ClaimFunction::Trim(false, true), &[T], TEXT),
            ("btrim", 2) => (ClaimFunction::Trim(true, true), &[T, T], TEXT),
            ("ltrim", 2) => (ClaimFunction::Trim(true, false), &[T, T], TEXT),
            ("rtrim", 2) => (ClaimFunction::Trim(false, true), &[T, T], TEXT),
            ("split_part", 3) => (ClaimFunction::SplitPart, &[T, T, N], TEXT),
            ("left", 2) => (ClaimFunction::Left, &[T, N], TEXT),
            ("right", 2) => (ClaimFunction::Right, &[T, N], TEXT),
            ("length" | "char_length" | "character_length", 1) => (ClaimFunction::Length, &[T], INT),
            ("replace", 3) => (ClaimFunction::Replace, &[T, T, T], TEXT),
            ("starts_with", 2) => (ClaimFunction::StartsWith, &[T, T], Type::Known(Kind::Bool)),
            ("strpos", 2) => (ClaimFunction::Position, &[T, T], INT),
            ("string_to_array", 2) if !is_null(&arguments[1]) => {
                (ClaimFunction::Split, &[T, T], Type::Many(Kind::Text))
            }
            ("jsonb_array_length", 1) => (ClaimFunction::ArrayLength, &[DOCUMENT], INT),
            ("jsonb_typeof", 1) => (ClaimFunction::TypeOf, &[DOCUMENT], TEXT),
            ("jsonb_extract_path", 2..) => return self.extracted(arguments, false),
            ("jsonb_extract_path_text", 2..) => return self.extracted(arguments, true),
            _ => return Err(unsupported(&format!("only PostgreSQL evaluates {name}()"))),
        };
        self.called(function, arguments.iter().zip(of), returns)
    }

    /// Compiles a call with arguments of these types.
    fn called<'e>(
        &self,
        function: ClaimFunction,
        arguments: impl Iterator<Item = (&'e Expr, &'e Parameter)>,
        returns: Type,
    ) -> Result<Operand, Unsupported> {
        let arguments = arguments.map(|(expr, of)| {
            let of = of.map_or(Type::Jsonb, Type::Known);
            match self.operand(expr)?.typed_as(&of)? {
                Operand::Claim(claim, found) if found == of => Ok(claim),
                _ => Err(unsupported(&format!("only PostgreSQL evaluates {}", function.name()))),
            }
        });
        if self.calls.get() >= MAX_CALLS {
            return Err(unsupported("its calls are too deeply nested"));
        }
        self.calls.set(self.calls.get() + 1);
        let arguments = arguments.collect::<Result<Vec<_>, _>>();
        self.calls.set(self.calls.get() - 1);
        Ok(Operand::Claim(ClaimExpr::Call(function, arguments?), returns))
    }

    /// Compiles `jsonb_extract_path` of constant steps.
    fn extracted(&self, arguments: &[Expr], for_text: bool) -> Result<Operand, Unsupported> {
        let Operand::Claim(document, Type::Jsonb) = self.operand(&arguments[0])? else {
            return Err(unsupported("only PostgreSQL reads documents in columns"));
        };
        let steps = arguments[1..].iter().map(|step| match self.step(step)? {
            ClaimStep::Key(key) if is_path_part(&key) => Ok(ClaimStep::PathPart(key)),
            _ => Err(unsupported("only PostgreSQL follows this path")),
        });
        Ok(follow(document, steps.collect::<Result<_, _>>()?, for_text, Type::Jsonb))
    }

    /// Compiles `document['key']`.
    pub(super) fn subscripted(&self, root: &Expr, chain: &[AccessExpr]) -> Result<Operand, Unsupported> {
        let Operand::Claim(document, Type::Jsonb) = self.operand(root)? else {
            return Err(unsupported("only PostgreSQL reads subscripts of columns"));
        };
        let steps = chain.iter().map(|access| match access {
            AccessExpr::Subscript(Subscript::Index { index }) => match self.step(index)? {
                ClaimStep::Key(key) if is_path_part(&key) => Ok(ClaimStep::PathPart(key)),
                _ => Err(unsupported("only PostgreSQL reads this subscript")),
            },
            _ => Err(unsupported("only PostgreSQL reads this subscript")),
        });
        Ok(follow(document, steps.collect::<Result<_, _>>()?, false, Type::Jsonb))
    }

    /// Compiles `position(part in text)`.
    pub(super) fn position(&self, part: &Expr, within: &Expr) -> Result<Operand, Unsupported> {
        self.claim_call("strpos", &[within.clone(), part.clone()])
    }

    /// Compiles `trim` with its words.
    pub(super) fn trimmed(
        &self,
        side: Option<TrimWhereField>,
        what: Option<&Expr>,
        expr: &Expr,
    ) -> Result<Operand, Unsupported> {
        let name = match side {
            None | Some(TrimWhereField::Both) => "btrim",
            Some(TrimWhereField::Leading) => "ltrim",
            Some(TrimWhereField::Trailing) => "rtrim",
        };
        let arguments: Vec<Expr> = std::iter::once(expr).chain(what).cloned().collect();
        self.claim_call(name, &arguments)
    }

    /// Compiles an operator whose operands are claims or constants, and whose result is a truth value.
    pub(super) fn claim_operator(
        &self,
        left: &Expr,
        op: &BinaryOperator,
        right: &Expr,
    ) -> Result<Operand, Unsupported> {
        let pair = |one, other| [one, other].into_iter().zip(&[DOCUMENT, DOCUMENT]);
        let truth = Type::Known(Kind::Bool);
        match op {
            BinaryOperator::Eq => self.called(ClaimFunction::Same, pair(left, right), truth),
            BinaryOperator::AtArrow => self.called(ClaimFunction::Contains, pair(left, right), truth),
            BinaryOperator::ArrowAt => self.called(ClaimFunction::Contains, pair(right, left), truth),
            BinaryOperator::QuestionPipe => self.has_keys(ClaimFunction::HasAny, left, right),
            BinaryOperator::QuestionAnd => self.has_keys(ClaimFunction::HasAll, left, right),
            BinaryOperator::PGLikeMatch => {
                let unknown = || unsupported("only PostgreSQL matches this pattern");
                let Operand::Claim(ClaimExpr::Constant(Some(Datum::Text(pattern))), TEXT) =
                    self.operand(right)?.typed_as(&TEXT)?
                else {
                    return Err(unknown());
                };
                let pattern = Pattern::new(&pattern, None).ok_or_else(unknown)?;
                self.called(ClaimFunction::Like(Box::new(pattern)), std::iter::once((left, &T)), truth)
            }
            _ => Err(unsupported(&format!("only PostgreSQL evaluates the operator {op}"))),
        }
    }

    /// Compiles `?|` and `?&`: nulls among the keys count for nothing.
    fn has_keys(&self, function: ClaimFunction, left: &Expr, right: &Expr) -> Result<Operand, Unsupported> {
        let unknown = || unsupported("only PostgreSQL reads keys in columns");
        let Operand::Claim(document, Type::Jsonb) = self.operand(left)? else { return Err(unknown()) };
        let mut arguments = vec![document];
        match constants(right) {
            Some(keys) => {
                for key in &keys {
                    match self.operand(key)?.typed_as(&TEXT)? {
                        Operand::Claim(ClaimExpr::Constant(None), TEXT) => {}
                        Operand::Claim(key @ ClaimExpr::Constant(_), TEXT) => arguments.push(key),
                        _ => return Err(unknown()),
                    }
                }
            }
            None => match self.list(right)? {
                Operand::Claim(keys, Type::Many(Kind::Text)) => arguments.push(keys),
                _ => return Err(unknown()),
            },
        }
        Ok(Operand::Claim(ClaimExpr::Call(function, arguments), Type::Known(Kind::Bool)))
    }
}

/// Follows steps into a document.
pub(super) fn follow(document: ClaimExpr, mut steps: Vec<ClaimStep>, for_text: bool, of: Type) -> Operand {
    let last = if for_text { steps.pop() } else { None };
    let inner = steps.into_iter().fold(document, |inner, step| ClaimExpr::Element(Box::new(inner), step));
    match last {
        Some(last) => Operand::Claim(ClaimExpr::ElementText(Box::new(inner), last), TEXT),
        None => Operand::Claim(inner, of),
    }
}

/// Whether the relay reads the part of a path as PostgreSQL does: as a key, or in an array as an index if it is a number. Of
/// numbers only one spelling is known here.
pub(super) fn is_path_part(part: &str) -> bool {
    let is_word = part.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_');
    is_word || part.parse::<u16>().is_ok_and(|number| number.to_string() == part)
}

fn is_null(expr: &Expr) -> bool {
    match expr {
        Expr::Nested(inner) | Expr::Cast { expr: inner, .. } => is_null(inner),
        Expr::Value(value) => value.value == Value::Null,
        _ => false,
    }
}
