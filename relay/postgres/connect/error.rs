//! Errors of PostgreSQL and of connections to it, with texts for the log and for clients.

use std::time::Duration;

use deadpool_postgres::{HookError, PoolError};
use tokio_postgres::error::SqlState;

use crate::postgres::connect::advice::chain;

/// An error of PostgreSQL or of a connection to it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A statement failed, or the connection broke.
    #[error("PostgreSQL: {}", described(.0))]
    Postgres(#[from] tokio_postgres::Error),
    /// No connection: the server refused it, or cannot be reached. The text is not for clients.
    #[error("no connection to PostgreSQL: {}", described(.0))]
    Connect(tokio_postgres::Error),
    /// The pool gave no connection, for a reason of its own.
    #[error("no connection to PostgreSQL: {0}")]
    Pool(String),
    /// The server refuses the login, or failed verification: its message, and the remedy.
    #[error("no connection to PostgreSQL: {}: {cure}", described(.error))]
    Refused {
        /// The refusal.
        error: tokio_postgres::Error,
        /// The remedy.
        cure: String,
    },
    /// No server answers at the address.
    #[error("no connection to PostgreSQL at {place}: {}", described(.error))]
    Away {
        /// The address.
        place: String,
        /// The cause.
        error: tokio_postgres::Error,
    },
    /// The database does not meet the relay's requirements; the text has the remedy.
    #[error("{0}")]
    Unfit(String),
    /// The connection is unusable; the text says which.
    #[error("{0}")]
    Lost(&'static str),
    /// No answer within the time limit.
    #[error("{what} did not answer within {limit:?}")]
    Late {
        /// What was awaited.
        what: &'static str,
        /// The limit.
        limit: Duration,
    },
}

impl Error {
    /// Whether a retry may succeed without a change by a user.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Pool(_) | Self::Lost(_) | Self::Late { .. } => true,
            Self::Unfit(_) | Self::Refused { .. } => false,
            Self::Postgres(error) | Self::Connect(error) | Self::Away { error, .. } => match error.code() {
                None => true,
                Some(code) => {
                    let class = &code.code()[..2];
                    matches!(class, "08" | "53" | "57") && *code != SqlState::QUERY_CANCELED
                        || matches!(code.code(), "40001" | "40P01" | "55P03" | "25006")
                }
            },
        }
    }

    /// Whether a time limit ended the statement.
    pub fn is_late(&self) -> bool {
        matches!(self, Self::Late { .. }) || self.code() == Some(SqlState::QUERY_CANCELED.code())
    }

    /// PostgreSQL's error code, if PostgreSQL raised the error.
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Postgres(error)
            | Self::Connect(error)
            | Self::Refused { error, .. }
            | Self::Away { error, .. } => error.code().map(SqlState::code),
            Self::Pool(_) | Self::Unfit(_) | Self::Lost(_) | Self::Late { .. } => None,
        }
    }

    /// A text for clients and probes, without names or addresses.
    pub fn kind(&self) -> &'static str {
        if matches!(self, Self::Unfit(_)) {
            return "the database is not as the relay needs it, its log says why";
        }
        match self.code() {
            None if matches!(self, Self::Refused { .. }) => "PostgreSQL refuses the relay's login",
            None => "PostgreSQL cannot be reached",
            Some("53300") => "PostgreSQL has no connection left",
            Some("55P03") => "a table that must be read is locked by another transaction",
            Some("57014") => "PostgreSQL did not finish a statement in time",
            Some("42501") => "PostgreSQL refuses the relay a right that it needs",
            Some(code) if code.starts_with("28") => "PostgreSQL refuses the relay's login",
            Some(code) if code.starts_with("57") => "PostgreSQL is stopping or starting",
            Some(_) => "PostgreSQL refuses, the relay's log says why",
        }
    }

    /// PostgreSQL's own message as `ERROR 22P02 (invalid_text_representation) …`, if a statement failed.
    pub fn refusal(&self) -> Option<String> {
        let Self::Postgres(error) = self else { return None };
        let error = error.as_db_error()?;
        let name = match *error.code() {
            SqlState::INVALID_TEXT_REPRESENTATION => "invalid_text_representation",
            SqlState::UNDEFINED_FUNCTION => "undefined_function",
            SqlState::RAISE_EXCEPTION => "raise_exception",
            SqlState::DATETIME_FIELD_OVERFLOW => "datetime_field_overflow",
            SqlState::INVALID_DATETIME_FORMAT => "invalid_datetime_format",
            SqlState::NUMERIC_VALUE_OUT_OF_RANGE => "numeric_value_out_of_range",
            SqlState::INVALID_REGULAR_EXPRESSION => "invalid_regular_expression",
            SqlState::INVALID_ESCAPE_SEQUENCE => "invalid_escape_sequence",
            _ => "error",
        };
        Some(format!("ERROR {} ({name}) {}", error.code().code(), error.message()))
    }
}

impl From<PoolError> for Error {
    fn from(error: PoolError) -> Self {
        match error {
            PoolError::Backend(error) | PoolError::PostCreateHook(HookError::Backend(error)) => {
                Self::Connect(error)
            }
            error => Self::Pool(error.to_string()),
        }
    }
}

fn described(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(db) => match db.hint() {
            Some(hint) => format!("{} ({}). {hint}", db.message(), db.code().code()),
            None => format!("{} ({})", db.message(), db.code().code()),
        },
        None => chain(error),
    }
}
