//! Subscribe errors: with the texts of the protocol, and in a plain form that says what to do.

use crate::model::subscription::filter::{FORM, FilterError, Operator};

/// Why a request cannot be served. Its `Display` is the text of the protocol, which may be sent to the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubscribeError {
    /// The table does not exist, is not watched or may not be read: which of these is not revealed.
    #[error("{UNREADABLE} for the given connect parameters: {request}{advice}")]
    Unreadable {
        /// The request, as the protocol describes it.
        request: String,
        /// What to do.
        advice: String,
    },
    /// The filter is not of the form that filters have.
    #[error("{FILTER}{0}")]
    Filter(String),
    /// A column does not exist or may not be read.
    #[error(
        "{EXCEPTION} so please check your connect parameters: {request}. {CAUSE}{UNKNOWN_COLUMN}{what} {column}{near}"
    )]
    UnknownColumn {
        /// The request, as the protocol describes it.
        request: String,
        /// The parameter that names it: `filter` or `select`.
        what: &'static str,
        /// Its name.
        column: String,
        /// The readable columns whose names are near, after `NEAR`; empty if there are none.
        near: String,
    },
    /// A grant is missing.
    #[error("{EXCEPTION} so please check your connect parameters: {request}. {CAUSE}{FORBIDDEN}{lack}")]
    MissingGrant {
        /// The request, as the protocol describes it.
        request: String,
        /// What is missing, with the statements that grant it.
        lack: String,
    },
    /// PostgreSQL refused the filter.
    #[error("{EXCEPTION} so please check your connect parameters: {request}. {CAUSE}{error}")]
    Exception {
        /// The request, as the protocol describes it.
        request: String,
        /// The error of PostgreSQL, after its code.
        error: String,
    },
    /// Another reason, in words for every client.
    #[error("{0}")]
    Other(String),
}

/// Start of the protocol's text for a table that does not exist or may not be read.
const UNREADABLE: &str =
    "Unable to subscribe to changes with given parameters. Please check Realtime is enabled";
/// Start of the protocol's text for an error of PostgreSQL.
const EXCEPTION: &str = "Unable to subscribe to changes with given parameters. An exception happened";
/// Text before PostgreSQL's own message.
const CAUSE: &str = "Exception: ";
/// Start of PostgreSQL's message for a missing grant.
const FORBIDDEN: &str = "ERROR 42501 (insufficient_privilege) ";
/// Start of the protocol's message for an unknown column.
const UNKNOWN_COLUMN: &str = "ERROR P0001 (raise_exception) invalid column for ";
/// Start of the protocol's text for an invalid filter.
const FILTER: &str = "Error parsing `filter` params: ";
/// Starts of the texts that name a missing grant. PostgreSQL's own messages of that code begin otherwise.
const MISSING_GRANTS: [&str; 2] = ["the policies of ", "the filter of "];
/// Text before the columns whose names are near an unknown one.
const NEAR: &str = "; there is ";

impl From<FilterError> for SubscribeError {
    fn from(error: FilterError) -> Self {
        Self::Filter(error.to_string())
    }
}

impl SubscribeError {
    /// Returns the error for a column that does not exist or may not be read, with the readable columns whose names are near.
    pub fn unknown_column(request: String, what: &'static str, column: &str, near: &[&str]) -> Self {
        let near = if near.is_empty() { String::new() } else { format!("{NEAR}{}", near.join(", ")) };
        Self::UnknownColumn { request, what, column: column.to_owned(), near }
    }

    /// Reads the text of the protocol, as a relay sends it.
    pub fn of_protocol(text: &str) -> Self {
        if text.starts_with(UNREADABLE) {
            return Self::Unreadable { request: String::new(), advice: String::new() };
        }
        if let Some(why) = text.strip_prefix(FILTER) {
            return Self::Filter(why.to_owned());
        }
        let Some((_, cause)) = text.starts_with(EXCEPTION).then(|| text.rsplit_once(CAUSE)).flatten() else {
            return Self::Other(text.to_owned());
        };
        let request = String::new();
        let is_missing_grant = |lack: &&str| MISSING_GRANTS.iter().any(|begin| lack.starts_with(begin));
        if let Some(lack) = cause.strip_prefix(FORBIDDEN).filter(is_missing_grant) {
            return Self::MissingGrant { request, lack: lack.to_owned() };
        }
        for what in ["filter", "select"] {
            if let Some(column) = cause.strip_prefix(&format!("{UNKNOWN_COLUMN}{what} ")) {
                let (column, near) = column.rsplit_once(NEAR).unwrap_or((column, ""));
                let near: Vec<&str> = if near.is_empty() { Vec::new() } else { vec![near] };
                return Self::unknown_column(request, what, column, &near);
            }
        }
        Self::Exception { request, error: cause.to_owned() }
    }

    /// Returns the text for clients that do not use the protocol: the command line and HTTP requests.
    ///
    /// `table` is the requested schema and table. `role` is the requesting role, if known.
    pub fn plain(&self, table: (&str, &str), role: Option<&str>) -> String {
        let shown = format!("{}.{}", table.0, table.1);
        let reader =
            role.map_or_else(|| String::from("the role of the token"), |role| format!("the role {role}"));
        match self {
            Self::Unreadable { .. } => unreadable_advice(table, &reader, role.unwrap_or("<role>")),
            Self::Filter(why) => {
                let form = if why.contains(FORM) { String::new() } else { format!(". {FORM}") };
                format!("the filter cannot be used: {why}{form}; {}", operators())
            }
            Self::UnknownColumn { what, column, near, .. } => {
                format!("{what}: {shown} has no column {column} that {reader} may read{near}")
            }
            Self::MissingGrant { lack, .. } => lack.clone(),
            Self::Exception { error, .. } => {
                // Without the error code and its name.
                let is_code = |(code, _): &(&str, &str)| code.starts_with("ERROR ") && code.contains(" (");
                let message = error.split_once(") ").filter(is_code).map_or(&**error, |(_, message)| message);
                format!("the filter does not fit {shown}: {message}")
            }
            Self::Other(text) => text.clone(),
        }
    }

    /// Returns the text for the log: [`plain`](Self::plain) without what the client wrote as a filter, which may name values of rows.
    pub fn logged(&self, table: (&str, &str), role: &str) -> String {
        let shown = format!("{}.{}", identifier(table.0), identifier(table.1));
        match self {
            Self::Unreadable { .. } | Self::MissingGrant { .. } | Self::UnknownColumn { .. } => {
                self.plain(table, Some(role))
            }
            Self::Filter(_) => {
                format!("a filter of {shown} cannot be used by the role {role}. {FORM}; {}", operators())
            }
            Self::Exception { .. } | Self::Other(_) => format!(
                "a subscription of {shown} by the role {role} is refused, mostly because a value of its filter does not fit the type of \
                 the column; the client was told which"
            ),
        }
    }
}

/// Returns which operators there are, and how filters are joined.
fn operators() -> String {
    format!(
        "op is one of {}, or not. and one of them; several filters are joined by commas and must all hold; or=(a.eq.1,b.gt.2) holds when \
         one of its conditions does",
        Operator::names()
    )
}

/// Returns what a table needs so that a role can subscribe to it.
fn unreadable_advice((schema, name): (&str, &str), reader: &str, grantee: &str) -> String {
    let table = format!("{}.{}", identifier(schema), identifier(name));
    let literal = table.replace('\'', "''");
    let usage = match schema {
        "public" => String::new(),
        _ => format!("; grant usage on schema {} to {grantee}", identifier(schema)),
    };
    let parameter = match name.split_once('.') {
        Some((schema, table)) => {
            format!(". The schema is a parameter of its own: schema={schema}, table={table}")
        }
        None => String::new(),
    };
    format!(
        "{schema}.{name} is not available to {reader}. It needs: select relay.watch('{literal}'){usage}; grant select on {table} to \
         {grantee}. The role must exist and be no superuser, and the relay's judging login must be a member of it{parameter}. To see what \
         is missing: relay explain {table} --role {grantee}"
    )
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
        "the policy of {schema}.{table} raises an error for the claims of this token{or}, so nothing of it is shown (relay explain {named} --token … says \
         which)"
    )
}

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
        let plain = SubscribeError::of_protocol(text).plain(("public", "Todos"), Some("anon"));
        assert!(plain.contains(expected), "{plain}");
    }

    #[test]
    fn an_unreadable_table_is_reported_with_the_statements_that_fix_it() {
        let text = format!("{UNREADABLE} for the given connect parameters: […]");
        check(&text, "public.Todos is not available to the role anon");
        check(&text, r#"select relay.watch('public."Todos"')"#);
        check(&text, r#"grant select on public."Todos" to anon"#);
        let elsewhere = SubscribeError::of_protocol(&text).plain(("shop", "orders"), None);
        assert!(elsewhere.contains("grant usage on schema shop to <role>"), "{elsewhere}");
        assert!(elsewhere.contains("The role must exist and be no superuser"), "{elsewhere}");
        assert!(!elsewhere.contains("a parameter of its own"), "{elsewhere}");
    }

    #[test]
    fn a_schema_in_the_name_of_the_table_is_reported_as_a_separate_parameter() {
        let refusal =
            SubscribeError::of_protocol(&format!("{UNREADABLE} for the given connect parameters: […]"));
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
    fn the_text_of_the_protocol_is_read_back_as_the_error_it_was() {
        let request = || String::from("[schema: public, table: Todos]");
        for error in [
            SubscribeError::Unreadable { request: request(), advice: String::from(". The table …") },
            SubscribeError::Filter(String::from("[\"x\"]")),
            SubscribeError::unknown_column(request(), "select", "nme", &["name", "names"]),
            SubscribeError::unknown_column(request(), "filter", "nme", &[]),
            SubscribeError::MissingGrant {
                request: request(),
                lack: String::from("the policies of t call f"),
            },
            SubscribeError::Exception { request: request(), error: String::from("ERROR 22P02 (x) no") },
            SubscribeError::Other(String::from("one table is expected")),
        ] {
            let read = SubscribeError::of_protocol(&error.to_string());
            let plain = |error: &SubscribeError| error.plain(("public", "Todos"), Some("anon"));
            assert_eq!(plain(&read), plain(&error), "{error}");
            assert_eq!(read.logged(("public", "Todos"), "anon"), error.logged(("public", "Todos"), "anon"));
        }
    }

    #[test]
    fn any_other_text_is_unchanged() {
        check("one table is expected", "one table is expected");
    }
}
