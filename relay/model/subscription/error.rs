//! Subscribe errors: with the texts of the protocol, and in a plain form that says what to do.

use crate::model::subscription::filter::FORM;

/// Why a request cannot be served. The text may be sent to the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SubscribeError(pub String);

/// Start of the protocol's text for a table that does not exist or may not be read.
pub const UNREADABLE: &str =
    "Unable to subscribe to changes with given parameters. Please check Realtime is enabled";
/// Start of the protocol's text for an error of PostgreSQL.
pub const EXCEPTION: &str = "Unable to subscribe to changes with given parameters. An exception happened";
/// Text before PostgreSQL's own message.
pub const CAUSE: &str = "Exception: ";
/// Start of PostgreSQL's message for a missing grant.
pub const FORBIDDEN: &str = "ERROR 42501 (insufficient_privilege) ";
/// Start of the protocol's text for an invalid filter.
pub const FILTER: &str = "Error parsing `filter` params: ";

/// Starts of the texts that name a missing grant.
const MISSING_GRANTS: [&str; 2] = ["the policies of ", "the filter of "];
/// Text before the columns whose names are near an unknown one.
pub const NEAR: &str = "; there is ";
/// The list of operators, for error messages.
const OPERATORS: &str = "op is one of eq neq lt lte gt gte in like ilike match imatch is isdistinct, or not. and one of them; several \
     filters are joined by commas and must all hold; or=(a.eq.1,b.gt.2) holds when one of its conditions does";

impl SubscribeError {
    /// Returns the text for clients that do not use the protocol: the command line and HTTP requests.
    ///
    /// `table` is the requested schema and table. `role` is the requesting role, if known.
    pub fn plain(&self, table: (&str, &str), role: Option<&str>) -> String {
        let text = self.0.as_str();
        let (schema, name) = table;
        let shown = format!("{schema}.{name}");
        let reader =
            role.map_or_else(|| String::from("the role of the token"), |role| format!("the role {role}"));
        if text.starts_with(UNREADABLE) {
            let grantee = role.unwrap_or("<role>");
            let table = format!("{}.{}", identifier(schema), identifier(name));
            let usage = match schema {
                "public" => String::new(),
                _ => format!(
                    ", that role may use the schema (grant usage on schema {} to {grantee})",
                    identifier(schema)
                ),
            };
            let parameter = match name.split_once('.') {
                Some((schema, table)) => {
                    format!(". The schema is a parameter of its own: schema={schema}, table={table}")
                }
                None => String::new(),
            };
            return format!(
                "{shown} cannot be followed by {reader}. It can when there is such a table, it is watched (select \
                 relay.watch('{}')){usage}, that role may select from it (grant select on {table} to {grantee}), and the role exists, is \
                 no superuser, and the relay's judging login is a member of it (grant {grantee} to that login){parameter}. To find \
                 what is missing: relay explain {table} --role {grantee}",
                table.replace('\'', "''"),
            );
        }
        if let Some(why) = text.strip_prefix(FILTER) {
            let form = if why.contains(FORM) { String::new() } else { format!(". {FORM}") };
            return format!("the filter cannot be used: {why}{form}; {OPERATORS}");
        }
        let Some((_, cause)) = text.starts_with(EXCEPTION).then(|| text.rsplit_once(CAUSE)).flatten() else {
            return text.to_owned();
        };
        let is_whole = |lack: &&str| MISSING_GRANTS.iter().any(|begin| lack.starts_with(begin));
        if let Some(lack) = cause.strip_prefix(FORBIDDEN).filter(is_whole) {
            return lack.to_owned();
        }
        // Strip the error code and its name.
        let is_code = |(code, _): &(&str, &str)| code.starts_with("ERROR ") && code.contains(" (");
        let cause = cause.split_once(") ").filter(is_code).map_or(cause, |(_, cause)| cause);
        for what in ["filter", "select"] {
            if let Some(column) = cause.strip_prefix(&format!("invalid column for {what} ")) {
                let (column, near) = column.rsplit_once(NEAR).unwrap_or((column, ""));
                let near = if near.is_empty() { String::new() } else { format!("{NEAR}{near}") };
                return format!("{what}: {shown} has no column {column} that {reader} may read{near}");
            }
        }
        format!("the filter does not fit {shown}: {cause}")
    }
}

impl SubscribeError {
    /// Returns the text for the log: [`plain`](Self::plain) without what the client wrote as a filter, which may name values of rows.
    pub fn logged(&self, table: (&str, &str), role: &str) -> String {
        let text = self.0.as_str();
        let shown = format!("{}.{}", identifier(table.0), identifier(table.1));
        let names_no_value = text.starts_with(UNREADABLE)
            || text.contains(FORBIDDEN)
            || ["filter", "select"].iter().any(|what| text.contains(&format!("invalid column for {what} ")));
        match names_no_value {
            true => self.plain(table, Some(role)),
            false if text.starts_with(FILTER) => {
                format!("a filter of {shown} cannot be used by the role {role}. {FORM}; {OPERATORS}")
            }
            false => format!(
                "a subscription of {shown} by the role {role} is refused, mostly because a value of its filter does not fit the type of the column; \
                 the client was told which"
            ),
        }
    }
}

/// Returns the error for a table whose policy raises an error for the claims of a token.
pub fn raising(schema: &str, table: &str) -> String {
    raising_for(schema, table, "")
}

/// Returns the error for a table whose policy raises an error for the claims or for a row, which fails a read of all rows.
pub fn raising_on_read(schema: &str, table: &str) -> String {
    raising_for(schema, table, ", or for a row")
}

fn raising_for(schema: &str, table: &str, or: &str) -> String {
    let named = format!("{}.{}", identifier(schema), identifier(table));
    format!(
        "the policy of {schema}.{table} raises an error{CLAIMS}{or}, so nothing of it is shown (relay explain {named} --token … says \
         which)"
    )
}

/// Whether this is a text of [`raising`].
pub fn is_raising(why: &str) -> bool {
    why.starts_with("the policy of ") && why.contains(CLAIMS)
}

/// The part of the text that identifies it.
const CLAIMS: &str = " for the claims of this token";

/// Quotes a name as an SQL identifier if necessary.
pub fn identifier(name: &str) -> String {
    let is_plain =
        |character: char| character.is_ascii_lowercase() || character.is_ascii_digit() || character == '_';
    match name.chars().all(is_plain) && !name.starts_with(|first: char| first.is_ascii_digit()) {
        true => name.to_owned(),
        false => format!("\"{}\"", name.replace('"', "\"\"")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &str) {
        let plain = SubscribeError(text.to_owned()).plain(("public", "Todos"), Some("anon"));
        assert!(plain.contains(expected), "{plain}");
    }

    #[test]
    fn an_unreadable_table_is_reported_with_the_statements_that_fix_it() {
        let text = format!("{UNREADABLE} for the given connect parameters: […]");
        check(&text, "public.Todos cannot be followed by the role anon");
        check(&text, r#"select relay.watch('public."Todos"')"#);
        check(&text, r#"grant select on public."Todos" to anon"#);
        let elsewhere = SubscribeError(text).plain(("shop", "orders"), None);
        assert!(elsewhere.contains("grant usage on schema shop to <role>"), "{elsewhere}");
        assert!(elsewhere.contains("the role exists, is no superuser"), "{elsewhere}");
        assert!(!elsewhere.contains("a parameter of its own"), "{elsewhere}");
    }

    #[test]
    fn a_schema_in_the_name_of_the_table_is_reported_as_a_separate_parameter() {
        let refusal = SubscribeError(format!("{UNREADABLE} for the given connect parameters: […]"));
        let told = refusal.plain(("public", "shop.orders"), Some("anon"));
        assert!(told.contains("The schema is a parameter of its own: schema=shop, table=orders."), "{told}");
    }

    #[test]
    fn an_invalid_filter_is_reported_with_the_right_form() {
        check(
            &format!("{FILTER}[\"id>7\"]"),
            r#"["id>7"]. A filter is column=op.value, such as id=gt.7; op is one of eq"#,
        );
    }

    #[test]
    fn an_error_of_postgresql_is_reported_without_the_request() {
        let exception =
            |cause: &str| format!("{EXCEPTION} so please check your connect parameters: […]. {CAUSE}{cause}");
        check(
            &exception("ERROR P0001 (raise_exception) invalid column for filter x"),
            "Todos has no column x that the role anon may read",
        );
        check(&exception("ERROR 22P02 (invalid_text_representation) no"), "does not fit public.Todos: no");
    }

    #[test]
    fn any_other_text_is_unchanged() {
        check("one table is expected", "one table is expected");
    }
}
