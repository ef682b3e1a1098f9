//! The type of the value that a body gives, as far as its form tells.

use sqlparser::ast::{
    BinaryOperator, Expr, Function, FunctionArg, FunctionArgExpr, FunctionArguments, Value,
};

use super::super::inline::is_condition;
use super::super::list::{plain_select, projected};
use super::expressions::system_type;
use super::names::Resolver;
use super::parameter;

impl Resolver<'_> {
    /// Returns the type of a resolved expression; `None` if its form does not tell.
    pub fn type_of(&self, expr: &Expr) -> Option<String> {
        let of = |name: &str| Some(name.to_owned());
        match expr {
            Expr::Nested(inner) => self.type_of(inner),
            Expr::CompoundIdentifier(parts) => match parts.as_slice() {
                [of, column] => self.types.get(&(of.value.clone(), column.value.clone())).cloned()?,
                _ => None,
            },
            Expr::Value(value) => match &value.value {
                Value::Placeholder(number) => self.body.types.get(parameter(number)?).cloned(),
                Value::Boolean(_) => of("boolean"),
                Value::Number(digits, _) if digits.parse::<i32>().is_ok() => of("integer"),
                Value::Number(digits, _) if digits.parse::<i64>().is_ok() => of("bigint"),
                Value::SingleQuotedString(_) | Value::EscapedStringLiteral(_) => of("text"),
                _ => None,
            },
            Expr::BinaryOp { op: BinaryOperator::LongArrow, .. } => of("text"),
            Expr::BinaryOp { left, op: BinaryOperator::Arrow, .. } => self.type_of(left),
            condition if is_condition(condition) => of("boolean"),
            Expr::Subquery(query) => self.type_of(projected(plain_select(query)?)?),
            Expr::Cast { data_type, .. } => system_type(&data_type.to_string().to_ascii_lowercase()),
            Expr::Case { conditions, else_result, .. } => {
                let results = conditions.iter().map(|branch| &branch.result);
                self.type_of_all(results.chain(else_result.as_deref()))
            }
            Expr::Function(function) => self.type_of_call(function),
            _ => None,
        }
    }

    /// Returns the type that all of them have which are no constants.
    fn type_of_all<'e>(&self, exprs: impl Iterator<Item = &'e Expr>) -> Option<String> {
        let is_constant =
            |expr: &Expr| matches!(expr, Expr::Value(value) if !matches!(value.value, Value::Placeholder(_)));
        let mut types = exprs.filter(|expr| !is_constant(expr)).map(|expr| self.type_of(expr));
        let first = types.next()??;
        types.all(|other| other.as_ref() == Some(&first)).then_some(first)
    }

    fn type_of_call(&self, function: &Function) -> Option<String> {
        let name = function.name.to_string();
        let FunctionArguments::List(list) = &function.args else { return None };
        let arguments = list.args.iter().filter_map(|argument| match argument {
            FunctionArg::Unnamed(FunctionArgExpr::Expr(expr)) => Some(expr),
            _ => None,
        });
        match name.as_str() {
            "count" => Some(String::from("bigint")),
            "bool_and" | "bool_or" | "every" => Some(String::from("boolean")),
            "lower" | "upper" | "json_array_elements_text" | "jsonb_array_elements_text" => {
                Some(String::from("text"))
            }
            "coalesce" | "max" | "min" => self.type_of_all(arguments),
            "array_agg" => {
                let one = self.type_of_all(arguments)?;
                (!one.ends_with("[]")).then(|| format!("{one}[]"))
            }
            _ => {
                let mut known = self.body.functions.iter();
                known.find(|known| known.written == name).map(|known| known.returns.clone())
            }
        }
    }
}
