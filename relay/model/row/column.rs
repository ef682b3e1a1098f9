//! The columns of a relation, and which of their values the relay can compare.

use serde::Deserialize;

use crate::model::row::change::Spelling;
use crate::model::row::datum::Kind;
use crate::model::row::pattern::Folding;

/// A column of a relation.
#[derive(Debug, Clone, Deserialize)]
pub struct Column {
    /// The column name.
    pub name: String,
    /// The type's name in `pg_type` (`int4`, `_text`).
    #[serde(rename = "type")]
    pub kind: String,
    /// The type as written in SQL, with its schema unless it is `pg_catalog`.
    #[serde(default)]
    pub readable_type: String,
    /// The kind of the values, or of the array's elements, where the relay can compare them.
    #[serde(default)]
    pub(crate) known: Option<Kind>,
    /// Whether the column is an array.
    #[serde(default)]
    pub(crate) many: bool,
    /// What `lower` does to the texts, where the relay can match them with patterns.
    #[serde(default)]
    pub folding: Option<Folding>,
    /// Whether `is null` tests one value: the type is neither composite nor a domain over a composite type.
    #[serde(default)]
    pub plain: bool,
    /// Whether the type is a domain, which may refuse nulls.
    #[serde(default)]
    pub domain: bool,
}

/// How the relay reads the values of a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ColumnKind {
    /// As one value.
    One(Kind),
    /// As an array of values.
    Many(Kind),
    /// As a text that patterns match as stored, while `=` ignores part of it (`char(n)`).
    Padded,
    /// Not at all: only PostgreSQL compares them.
    Foreign,
}

impl Column {
    /// Returns how the relay reads the values.
    pub fn shape(&self) -> ColumnKind {
        match (self.known, self.many) {
            (Some(kind), false) => ColumnKind::One(kind),
            (Some(kind), true) => ColumnKind::Many(kind),
            (None, _) if self.folding.is_some() => ColumnKind::Padded,
            (None, _) => ColumnKind::Foreign,
        }
    }

    /// Returns how the values are written for clients.
    pub fn spelling(&self) -> Spelling {
        if self.kind == "bytea" { Spelling::BareHex } else { Spelling::Plain }
    }
}
