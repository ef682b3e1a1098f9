//! The result of a condition: SQL's three-valued logic, an error, or undecided.

/// The result of a condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Truth {
    /// True.
    True,
    /// False.
    False,
    /// Null.
    Null,
    /// PostgreSQL raises an error.
    Error,
    /// Only PostgreSQL can decide.
    Undecided,
    /// PostgreSQL did not answer within the time limit.
    TimedOut,
}

impl From<Option<bool>> for Truth {
    fn from(value: Option<bool>) -> Self {
        value.map_or(Self::Null, Self::from)
    }
}

impl From<bool> for Truth {
    fn from(value: bool) -> Self {
        if value { Self::True } else { Self::False }
    }
}
