//! The comparisons of filters, each with the operator of SQL that it means.

/// Operators that compare a column with one value.
pub const COMPARISONS: [(&str, &str); 7] = [
    ("eq", "="),
    ("neq", "<>"),
    ("lt", "<"),
    ("lte", "<="),
    ("gt", ">"),
    ("gte", ">="),
    ("isdistinct", "is distinct from"),
];

/// Returns a text as an SQL literal.
pub fn literal(value: &str) -> String {
    format!("'{}'", value.replace('\'', "''"))
}
