//! The parameters of a table: those of a request that names one, or those with its name before them where `tables=` names several.

use std::collections::HashSet;

use crate::model::session::join::MAX_ENTRIES;
use crate::model::subscription::error::SubscribeError;
use crate::transport::query::{is_unreadable, names, parameter};

/// The known parameters.
const PARAMETERS: [&str; 19] = [
    "apikey", "topic", "private", "event", "schema", "table", "tables", "filter", "or", "and", "not.or",
    "not.and", "select", "since", "wait", "conflate", "order", "limit", "after",
];
/// The parameters that only apply to one table.
const OF_ONE: [&str; 12] = [
    "event", "schema", "table", "filter", "or", "and", "not.or", "not.and", "select", "order", "limit",
    "after",
];
/// The parameters that each of several tables may have.
const OF_EACH: [&str; 8] = ["filter", "or", "and", "not.or", "not.and", "select", "order", "limit"];

/// A table of a request, and where its parameters are.
#[derive(Debug)]
pub struct TableParameters<'a> {
    query: &'a str,
    /// Which one it is, if the request names several.
    listed: Option<ListedTable>,
}

/// A table of `tables=`.
#[derive(Debug)]
struct ListedTable {
    /// As the client wrote it.
    name: String,
    schema: String,
    table: String,
}

impl<'a> TableParameters<'a> {
    /// Returns the tables of a request: one, or those of `tables=`.
    ///
    /// # Errors
    /// If the list is malformed, or has other parameters than [`check_parameters`] allows beside it.
    pub fn of(query: &'a str) -> Result<Vec<Self>, SubscribeError> {
        let Some(list) = parameter(query, "tables") else { return Ok(vec![Self { query, listed: None }]) };
        let refused = |why: String| Err(SubscribeError::Other(why));
        let mut tables: Vec<Self> = Vec::new();
        let mut seen = HashSet::new();
        for table in listed(&list)? {
            if !seen.insert((table.schema.clone(), table.table.clone())) {
                return refused(format!("tables: {} is there more than once", table.name));
            }
            if tables.len() == MAX_ENTRIES {
                return refused(format!("tables: {MAX_ENTRIES} tables at most"));
            }
            tables.push(Self { query, listed: Some(table) });
        }
        match OF_ONE.into_iter().find(|name| parameter(query, name).is_some()) {
            Some(one) => {
                let first = tables.first().and_then(Self::name).unwrap_or_default();
                let instead = match OF_EACH.contains(&one) {
                    true => format!(": write {first}.{one}="),
                    false => String::new(),
                };
                refused(format!("{one}: it is for one table, and tables= is given{instead}"))
            }
            None => Ok(tables),
        }
    }

    /// Returns its name among several, as the client wrote it.
    pub fn name(&self) -> Option<&str> {
        self.listed.as_ref().map(|listed| listed.name.as_str())
    }

    /// Returns the value of a parameter.
    pub fn get(&self, parameter_name: &str) -> Option<String> {
        match (&self.listed, parameter_name) {
            (None, _) => parameter(self.query, parameter_name),
            (Some(listed), "schema") => Some(listed.schema.clone()),
            (Some(listed), "table") => Some(listed.table.clone()),
            (Some(listed), _) => parameter(self.query, &format!("{}.{parameter_name}", listed.name)),
        }
    }
}

/// Refuses unknown parameters and values that are not UTF-8.
///
/// # Errors
/// The first such parameter.
pub fn check_parameters(query: &str, tables: &[TableParameters<'_>]) -> Result<(), SubscribeError> {
    let of_tables = tables.iter().filter_map(TableParameters::name);
    let of_tables = of_tables.flat_map(|table| OF_EACH.map(|name| format!("{table}.{name}")));
    let known: Vec<String> = PARAMETERS.map(str::to_owned).into_iter().chain(of_tables).collect();
    if let Some(unknown) = names(query).find(|name| !known.contains(name)) {
        let name: String = unknown.chars().take(40).collect();
        return Err(SubscribeError::Other(format!(
            "{name}: there is no such parameter, only {}",
            PARAMETERS.join(", ")
        )));
    }
    match known.iter().find(|name| is_unreadable(query, name)) {
        Some(name) => Err(SubscribeError::Other(format!("{name}: this is not UTF-8"))),
        None => Ok(()),
    }
}

/// Returns a parameter of tables that a request has beside `topic=`.
pub fn beside_topic(query: &str) -> Option<String> {
    let given = |name: &&str| parameter(query, name).is_some();
    if given(&"tables") {
        return Some(String::from("tables: it is for tables, and topic= is given: leave one of them out"));
    }
    let name = OF_ONE.into_iter().find(given)?;
    Some(format!("{name}: it is for a table, and topic= is given: leave one of them out"))
}

/// Reads a list of names as in SQL: `todos,crm.deals,"a, b"`.
fn listed(list: &str) -> Result<Vec<ListedTable>, SubscribeError> {
    let malformed = || {
        SubscribeError::Other(String::from(
            "tables: names of tables are expected, separated by commas, such as tables=todos,crm.deals (one with a comma, a dot or a \
             quote in double quotes)",
        ))
    };
    let mut found = Vec::new();
    for item in split(list, ',').ok_or_else(malformed)? {
        let item = item.trim();
        let parts = split(item, '.').ok_or_else(malformed)?;
        let parts: Option<Vec<String>> = parts.into_iter().map(unquoted).collect();
        let (schema, table) = match <[String; 2]>::try_from(parts.ok_or_else(malformed)?) {
            Ok([schema, table]) => (schema, table),
            Err(mut parts) if parts.len() == 1 => (String::from("public"), parts.remove(0)),
            Err(_) => return Err(malformed()),
        };
        found.push(ListedTable { name: item.to_owned(), schema, table });
    }
    Ok(found)
}

/// Splits a text outside of double quotes; `None` if a quote is not closed.
fn split(text: &str, separator: char) -> Option<Vec<&str>> {
    let mut is_quoted = false;
    let parts = text.split(|character| {
        is_quoted ^= character == '"';
        character == separator && !is_quoted
    });
    let parts = parts.collect();
    (!is_quoted).then_some(parts)
}

/// Returns a name without its quotes; `None` if it is empty or has a quote that is not doubled.
fn unquoted(part: &str) -> Option<String> {
    let name = match part.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
        Some(inner) if !inner.replace("\"\"", "").contains('"') => inner.replace("\"\"", "\""),
        Some(_) => return None,
        None if part.contains('"') => return None,
        None => part.to_owned(),
    };
    (!name.is_empty() && name != "*").then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_as_in_sql() {
        let names = r#"todos, crm.deals,"a, ""b.","S.x"."T""#;
        let found = listed(names).unwrap();
        let found: Vec<_> =
            found.iter().map(|one| (one.name.as_str(), one.schema.as_str(), one.table.as_str())).collect();
        let expected = [
            ("todos", "public", "todos"),
            ("crm.deals", "crm", "deals"),
            (r#""a, ""b.""#, "public", "a, \"b."),
            (r#""S.x"."T""#, "S.x", "T"),
        ];
        assert_eq!(found, expected);
        for wrong in ["", ",", "a,", "a..b", "a.b.c", "\"a", "a\"b", "\"a\"b", "*", "crm.*", "\"\""] {
            assert!(listed(wrong).is_err(), "{wrong}");
        }
    }
}
