//! The dependencies of an expression: whether it reads only the row, the tables that it names, and the claims that it names.

use std::ops::ControlFlow;

use sqlparser::ast::{Expr, Function, ObjectName, Query, TableFactor, Visit, Visitor, visit_relations};

use crate::model::policy::rights::Rights;

/// Functions of `pg_catalog` that read no setting, in which claims could be, and call no user-defined function. Sorted.
const SAFE_FUNCTIONS: &[&str] = &[
    "abs",
    "age",
    "any_value",
    "array_agg",
    "array_length",
    "array_lower",
    "array_ndims",
    "array_position",
    "array_remove",
    "array_to_string",
    "array_upper",
    "ascii",
    "avg",
    "bit_length",
    "bool_and",
    "bool_or",
    "btrim",
    "cardinality",
    "ceil",
    "ceiling",
    "char_length",
    "character_length",
    "chr",
    "clock_timestamp",
    "coalesce",
    "count",
    "current_date",
    "current_role",
    "current_time",
    "current_timestamp",
    "current_user",
    "date_bin",
    "date_part",
    "date_trunc",
    "decode",
    "div",
    "encode",
    "every",
    "exp",
    "extract",
    "floor",
    "generate_series",
    "greatest",
    "initcap",
    "isempty",
    "isfinite",
    "json_array_elements",
    "json_array_elements_text",
    "json_array_length",
    "json_each_text",
    "json_extract_path",
    "json_extract_path_text",
    "json_object_keys",
    "json_typeof",
    "jsonb_array_elements",
    "jsonb_array_elements_text",
    "jsonb_array_length",
    "jsonb_each",
    "jsonb_each_text",
    "jsonb_exists",
    "jsonb_exists_all",
    "jsonb_exists_any",
    "jsonb_extract_path",
    "jsonb_extract_path_text",
    "jsonb_object_keys",
    "jsonb_path_exists",
    "jsonb_path_match",
    "jsonb_strip_nulls",
    "jsonb_typeof",
    "justify_days",
    "justify_hours",
    "least",
    "left",
    "length",
    "ln",
    "localtime",
    "localtimestamp",
    "log",
    "lower",
    "lower_inc",
    "lower_inf",
    "lpad",
    "ltrim",
    "make_date",
    "make_interval",
    "make_time",
    "make_timestamp",
    "make_timestamptz",
    "max",
    "md5",
    "min",
    "mod",
    "now",
    "nullif",
    "num_nonnulls",
    "num_nulls",
    "numrange",
    "octet_length",
    "overlay",
    "position",
    "power",
    "range_merge",
    "regexp_match",
    "regexp_matches",
    "regexp_replace",
    "repeat",
    "replace",
    "reverse",
    "right",
    "round",
    "row_number",
    "rpad",
    "rtrim",
    "sha224",
    "sha256",
    "sha384",
    "sha512",
    "sign",
    "split_part",
    "sqrt",
    "starts_with",
    "statement_timestamp",
    "string_to_array",
    "strpos",
    "substr",
    "substring",
    "sum",
    "timezone",
    "to_char",
    "to_date",
    "to_number",
    "to_timestamp",
    "transaction_timestamp",
    "translate",
    "trim",
    "trim_array",
    "trunc",
    "tstzrange",
    "unnest",
    "upper",
    "upper_inc",
    "upper_inf",
];

/// The dependencies of an expression.
#[derive(Debug, Default)]
pub(super) struct Dependencies {
    /// Whether it calls a function that returns claims.
    pub claims: bool,
    /// The first reason why PostgreSQL cannot evaluate it once for all readers.
    pub obstacle: Option<String>,
}

/// Analyzes an expression or query.
pub(super) fn dependencies(of: &impl Visit, rights: &Rights) -> Dependencies {
    let mut analyzer = Analyzer { rights, dependencies: Dependencies::default() };
    let _ = of.visit(&mut analyzer);
    analyzer.dependencies
}

/// Whether the expression reads a table with this name.
pub(super) fn reads_table(expr: &Expr, table: &str) -> bool {
    let matches = |name: &ObjectName| match written(name) == table {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    };
    visit_relations(expr, matches).is_break()
}

/// Returns the name as in SQL, quoted where necessary.
pub(super) fn written(name: &ObjectName) -> String {
    name.to_string()
}

struct Analyzer<'a> {
    rights: &'a Rights,
    dependencies: Dependencies,
}

impl Analyzer<'_> {
    fn call(&mut self, name: &ObjectName) {
        let written = written(name);
        // Some names are quoted because they are also keywords.
        let bare =
            written.strip_prefix("pg_catalog.").unwrap_or(&written).trim_matches('"').to_ascii_lowercase();
        if bare == "current_setting" || self.rights.helpers.contains_key(&written) {
            self.dependencies.claims = true;
        } else if self.rights.as_other_role && matches!(bare.as_str(), "current_user" | "current_role") {
            self.add_obstacle(format!("{written} is another role in a look past row security"));
        } else if bare != "array" && SAFE_FUNCTIONS.binary_search(&bare.as_str()).is_err() {
            self.add_obstacle(match self.rights.not_replaced.get(&written) {
                Some(why) => format!("{written}() may read anything: {why}"),
                None => format!("{written}() may read anything"),
            });
        }
    }

    fn add_obstacle(&mut self, why: String) {
        self.dependencies.obstacle.get_or_insert(why);
    }
}

impl Visitor for Analyzer<'_> {
    type Break = ();

    fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<()> {
        if let Expr::Function(Function { name, .. }) = expr {
            self.call(name);
        }
        ControlFlow::Continue(())
    }

    fn pre_visit_table_factor(&mut self, factor: &TableFactor) -> ControlFlow<()> {
        match factor {
            TableFactor::Table { name, args: None, .. } => {
                let name = written(name);
                if !self.rights.tables.contains(&name) {
                    self.add_obstacle(match self.rights.not_added.get(&name) {
                        Some(why) => format!("{name} has row security, and {why}"),
                        None => format!("{name} is a view, or is not readable for the role"),
                    });
                }
            }
            TableFactor::Table { name, args: Some(_), .. } | TableFactor::Function { name, .. } => {
                self.call(name);
            }
            TableFactor::Derived { .. } | TableFactor::NestedJoin { .. } | TableFactor::UNNEST { .. } => {}
            other => self.add_obstacle(format!("the relay does not understand {other}")),
        }
        ControlFlow::Continue(())
    }

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<()> {
        // Names of common table expressions could be taken for tables.
        if query.with.is_some() {
            self.add_obstacle(String::from("it has a `with` clause"));
        }
        ControlFlow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    use super::SAFE_FUNCTIONS;

    #[test]
    fn the_list_of_functions_is_sorted() {
        assert!(SAFE_FUNCTIONS.is_sorted());
    }
}
