//! Operators of lists and documents: `&&`, `@>`, `<@`, `?|`, and `=` of documents.

use sqlparser::ast::{BinaryOperator, Expr, Function, FunctionArgExpr};

use super::condition::constants;
use super::invert::bare;
use super::operand::{Operand, Type};
use super::rewrite::argument;
use super::{Compiler, Unsupported, unsupported};
use crate::model::policy::claim_expr::ClaimExpr;
use crate::model::policy::predicate::{List, ListRelation, Predicate, Scalar};
use crate::model::row::datum::Kind;

impl Compiler<'_> {
    /// Compiles an operator whose operands are claims.
    pub(super) fn truth_of_claims(
        &self,
        left: &Expr,
        op: &BinaryOperator,
        right: &Expr,
    ) -> Result<Predicate, Unsupported> {
        match self.claim_operator(left, op, right)? {
            Operand::Claim(claim, _) => Ok(Predicate::Truth(Scalar::Claim(self.claim_index(claim)))),
            Operand::Row(..) => Err(unsupported("only PostgreSQL evaluates it")),
        }
    }

    /// Compiles an operator of two lists.
    pub(super) fn lists(
        &self,
        left: &Expr,
        op: &BinaryOperator,
        right: &Expr,
    ) -> Result<Predicate, Unsupported> {
        if *op == BinaryOperator::QuestionPipe {
            let (Operand::Claim(document, Type::Jsonb), (keys, Kind::Text | Kind::Varchar)) =
                (self.operand(left)?, self.any_list(right)?)
            else {
                return Err(unsupported("only PostgreSQL reads documents in columns"));
            };
            let known = self.claim_index(ClaimExpr::TextList(Box::new(document), true));
            return Ok(Predicate::Lists(List::ClaimKeys(known), ListRelation::Overlap, keys));
        }
        let ((one, kind), (other, same)) = (self.any_list(left)?, self.any_list(right)?);
        if !kind.compares_with(same) || kind == Kind::Enum {
            return Err(unsupported("only PostgreSQL compares values of these types"));
        }
        Ok(match op {
            BinaryOperator::PGOverlap => Predicate::Lists(one, ListRelation::Overlap, other),
            BinaryOperator::AtArrow => Predicate::Lists(one, ListRelation::Contains, other),
            BinaryOperator::ArrowAt => Predicate::Lists(other, ListRelation::Contains, one),
            _ => return Err(unsupported(&format!("only PostgreSQL evaluates the operator {op}"))),
        })
    }

    /// Compiles a list of constants, claims or columns, an array column, or a claim that is a list.
    fn any_list(&self, expr: &Expr) -> Result<(List, Kind), Unsupported> {
        let unknown = || unsupported("only PostgreSQL evaluates this kind of list");
        let Some(elements) = constants(expr) else {
            return match self.list(expr)? {
                Operand::Claim(claim, Type::Many(kind)) => Ok((List::Claim(self.claim_index(claim)), kind)),
                Operand::Row(Scalar::Column(column), Type::Many(kind)) => Ok((List::Column(column), kind)),
                _ => Err(unknown()),
            };
        };
        let mut kinds = Vec::with_capacity(elements.len());
        let mut scalars = Vec::with_capacity(elements.len());
        for element in &elements {
            let operand = self.operand(element)?;
            let Type::Known(kind) = *operand.of() else { return Err(unknown()) };
            kinds.push(kind);
            scalars.push(self.scalar(operand));
        }
        match kinds.first() {
            Some(kind) if kinds.iter().all(|other| other == kind) => Ok((List::Of(scalars), *kind)),
            _ => Err(unknown()),
        }
    }

    /// Compiles `=` of documents of claims, or of one with a value of the row.
    pub(super) fn documents(&self, left: &Expr, right: &Expr) -> Result<Predicate, Unsupported> {
        let same = BinaryOperator::Eq;
        self.truth_of_claims(left, &same, right)
            .or_else(|_| self.document_of_row(left, &same, right))
            .or_else(|_| self.document_of_row(right, &same, left))
    }

    /// Compiles `=` or `@>` of a document of claims and `to_jsonb(column)`.
    pub(super) fn document_of_row(
        &self,
        document: &Expr,
        op: &BinaryOperator,
        value: &Expr,
    ) -> Result<Predicate, Unsupported> {
        let foreign = || unsupported("only PostgreSQL compares these documents");
        let within = match op {
            BinaryOperator::Eq => false,
            BinaryOperator::AtArrow => true,
            BinaryOperator::ArrowAt => {
                return self.document_of_row(value, &BinaryOperator::AtArrow, document);
            }
            _ => return Err(foreign()),
        };
        let Expr::Function(function @ Function { name, .. }) = bare(value) else { return Err(foreign()) };
        let Some(FunctionArgExpr::Expr(value)) = argument(function).filter(|_| {
            let name = name.to_string();
            name == "to_jsonb" || name == "pg_catalog.to_jsonb"
        }) else {
            return Err(foreign());
        };
        let (scalar, kind) = match self.operand(value)? {
            Operand::Row(Scalar::Column(at), Type::Known(Kind::Uuid)) => (Scalar::ColumnText(at), Kind::Text),
            Operand::Row(scalar, Type::Known(Kind::Text | Kind::Varchar)) => (scalar, Kind::Text),
            Operand::Row(scalar, Type::Known(kind)) if kind.is_integer() || kind == Kind::Bool => {
                (scalar, kind)
            }
            _ => return Err(foreign()),
        };
        let Operand::Claim(document, Type::Jsonb) = self.operand(document)? else { return Err(foreign()) };
        let values = self.claim_index(ClaimExpr::Scalars(Box::new(document), kind, within));
        Ok(Predicate::Among(scalar, List::ClaimKeys(values)))
    }
}
