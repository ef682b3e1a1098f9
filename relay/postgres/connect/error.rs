//! What can go wrong with PostgreSQL, in words for the log and for clients, and what is worth another try.

use deadpool_postgres::{HookError, PoolError};
use tokio_postgres::error::SqlState;

use crate::postgres::connect::advice::chain;

/// What can go wrong with PostgreSQL.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server refused, or the connection broke. The chain below tells which.
    #[error("PostgreSQL: {}", told(.0))]
    Postgres(#[from] tokio_postgres::Error),
    /// No connection could be had: the server refused it, or cannot be reached. Nothing of it is for clients.
    #[error("no connection to PostgreSQL: {}", told(.0))]
    Connect(tokio_postgres::Error),
    /// No connection could be had from the pool, for no reason of PostgreSQL's.
    #[error("no connection to PostgreSQL: {0}")]
    Pool(String),
    /// The server lets nobody in like this, or is not to be believed: what it said, and what to do.
    #[error("no connection to PostgreSQL: {}: {cure}", told(.error))]
    Refused {
        /// The refusal.
        error: tokio_postgres::Error,
        /// What to do about it.
        cure: String,
    },
    /// No server answers, or not in time: where it was looked for, and why.
    #[error("no connection to PostgreSQL at {place}: {}", told(.error))]
    Away {
        /// The address.
        place: String,
        /// Why.
        error: tokio_postgres::Error,
    },
    /// The database is not as the relay needs it; the text says what to do.
    #[error("{0}")]
    Unfit(String),
    /// The connection is of no use any more, as far as can be seen from here; the text says why.
    #[error("{0}")]
    Lost(&'static str),
}

impl Error {
    /// Whether the same thing may succeed later without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Pool(_) | Self::Lost(_) => true,
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

    /// PostgreSQL's code for it, when it was PostgreSQL that refused.
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Postgres(error)
            | Self::Connect(error)
            | Self::Refused { error, .. }
            | Self::Away { error, .. } => error.code().map(SqlState::code),
            Self::Pool(_) | Self::Unfit(_) | Self::Lost(_) => None,
        }
    }

    /// What it is, in words that anybody may read: no name, no address.
    pub fn kind(&self) -> &'static str {
        if matches!(self, Self::Unfit(_)) {
            return "the database is not as the relay needs it, its log says why";
        }
        match self.code() {
            None if matches!(self, Self::Refused { .. }) => "PostgreSQL refuses the relay's login",
            None => "PostgreSQL cannot be reached",
            Some("53300") => "PostgreSQL has no connection left",
            Some("42501") => "PostgreSQL refuses the relay a right that it needs",
            Some(code) if code.starts_with("28") => "PostgreSQL refuses the relay's login",
            Some(code) if code.starts_with("57") => "PostgreSQL is stopping or starting",
            Some(_) => "PostgreSQL refuses, the relay's log says why",
        }
    }

    /// PostgreSQL's own word on it as `ERROR 22P02 (invalid_text_representation) …`, when it was PostgreSQL that refused
    /// a statement.
    pub fn refusal(&self) -> Option<String> {
        let Self::Postgres(error) = self else { return None };
        let told = error.as_db_error()?;
        let name = match *told.code() {
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
        Some(format!("ERROR {} ({name}) {}", told.code().code(), told.message()))
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

fn told(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(db) => match db.hint() {
            Some(hint) => format!("{} ({}). {hint}", db.message(), db.code().code()),
            None => format!("{} ({})", db.message(), db.code().code()),
        },
        None => chain(error),
    }
}
