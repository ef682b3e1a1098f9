//! The result of a condition: three-valued logic of SQL, an error, or not known here.

/// What a condition comes to.
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
    /// Only PostgreSQL knows.
    Undecided,
    /// PostgreSQL was asked and took too long.
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
