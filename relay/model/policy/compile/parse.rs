//! Parses PostgreSQL's text of policies and bodies of functions.

use sqlparser::ast::{Expr, Query, Statement, Value, ValueWithSpan, VisitMut, VisitorMut};
use sqlparser::dialect::PostgreSqlDialect;
use sqlparser::parser::Parser;
use sqlparser::tokenizer::{Token, Tokenizer};

use super::depth::is_too_deep;
use super::list::only_expression;
use super::reworded::reworded;
use super::{MAX_DEPTH, Unsupported, unsupported};

pub(super) fn parser(text: &str) -> Result<Parser<'static>, Unsupported> {
    const DIALECT: PostgreSqlDialect = PostgreSqlDialect {};
    let tokens = Tokenizer::new(&DIALECT, text).tokenize();
    let tokens =
        tokens.map_err(|error| Unsupported(format!("the parser does not understand it: {error}")))?;
    if is_too_deep(&tokens) {
        return Err(unsupported("it is too long or too deeply nested"));
    }
    Ok(Parser::new(&DIALECT).with_recursion_limit(MAX_DEPTH).with_tokens(reworded(tokens)))
}

pub(super) fn parse(text: &str) -> Result<Expr, Unsupported> {
    let not_understood = |error| Unsupported(format!("the parser does not understand it: {error}"));
    // The parser may print such a name as a different one.
    if text.contains("\"\"") || text.contains("\\\"") {
        return Err(unsupported("a name contains a quote"));
    }
    let mut parser = parser(text)?;
    let mut expr = parser.parse_expr().map_err(not_understood)?;
    parser.expect_token(&Token::EOF).map_err(not_understood)?;
    let _ = VisitMut::visit(&mut expr, &mut Unambiguous);
    Ok(expr)
}

/// Rewrites constants so that their text is unambiguous: the parser prints a quote after a backslash or another quote as if it
/// were already escaped.
struct Unambiguous;

impl VisitorMut for Unambiguous {
    type Break = ();

    fn pre_visit_value(&mut self, value: &mut ValueWithSpan) -> std::ops::ControlFlow<()> {
        if let Value::SingleQuotedString(text) = &value.value
            && text.contains(['\\', '\''])
        {
            value.value = Value::EscapedStringLiteral(text.clone());
        }
        std::ops::ControlFlow::Continue(())
    }
}

/// Parses one query.
pub(super) fn parse_query(text: &str) -> Result<Query, Unsupported> {
    // The same as for a policy.
    if text.contains("\"\"") || text.contains("\\\"") {
        return Err(unsupported("a name contains a quote"));
    }
    let statements = parser(text)?.parse_statements().map_err(|error| Unsupported(error.to_string()))?;
    match <[Statement; 1]>::try_from(statements) {
        Ok([Statement::Query(mut query)]) => {
            let _ = VisitMut::visit(&mut query, &mut Unambiguous);
            Ok(*query)
        }
        _ => Err(unsupported("it is more than one query")),
    }
}

/// Returns the expression that the body of an SQL function evaluates.
pub(super) fn parse_body(text: &str) -> Result<Expr, Unsupported> {
    let statements = parser(text)?.parse_statements().map_err(|error| Unsupported(error.to_string()))?;
    match statements.as_slice() {
        [Statement::Query(query)] => {
            only_expression(query).cloned().ok_or_else(|| unsupported("it is more than one expression"))
        }
        _ => Err(unsupported("it is more than one query")),
    }
}
