//! The columns of a relation, and how their values are read here.

use serde::Deserialize;

use crate::model::row::change::Spelling;
use crate::model::row::datum::Kind;
use crate::model::row::pattern::Folding;

/// A column of a relation.
#[derive(Debug, Clone, Deserialize)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// Its type's name in `pg_type` (`int4`, `_text`).
    #[serde(rename = "type")]
    pub kind: String,
    /// Its type as one writes it, with its schema where it is not the system's.
    #[serde(default)]
    pub readable_type: String,
    /// The kind of its values, or of its elements, when they can be compared here.
    #[serde(default)]
    pub(crate) known: Option<Kind>,
    /// Whether it is an array.
    #[serde(default)]
    pub(crate) many: bool,
    /// What `lower` does to its texts, when they are matched with patterns here.
    #[serde(default)]
    pub folding: Option<Folding>,
    /// Whether `is null` asks for one value: neither a row nor a domain over one.
    #[serde(default)]
    pub plain: bool,
    /// Whether it is of a domain, which may refuse nulls.
    #[serde(default)]
    pub domain: bool,
}

/// How the values of a column are read here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ColumnKind {
    /// One value.
    One(Kind),
    /// An array of values.
    Many(Kind),
    /// A text that patterns read as it is, while `=` does not look at all of it.
    Padded,
    /// Not at all.
    Foreign,
}

impl Column {
    /// How its values are read here.
    pub fn shape(&self) -> ColumnKind {
        match (self.known, self.many) {
            (Some(kind), false) => ColumnKind::One(kind),
            (Some(kind), true) => ColumnKind::Many(kind),
            (None, _) if self.folding.is_some() => ColumnKind::Padded,
            (None, _) => ColumnKind::Foreign,
        }
    }

    /// How its values are written for clients.
    pub fn spelling(&self) -> Spelling {
        if self.kind == "bytea" { Spelling::BareHex } else { Spelling::Plain }
    }
}
