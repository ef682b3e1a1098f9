//! The objects that the policies of a relation refer to, as far as a role may use them.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use crate::model::row::pattern::Folding;

/// The objects that the policies of a relation refer to, as far as the role may use them.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
pub struct Rights {
    /// The relation, qualified and quoted as in SQL.
    pub name: String,
    /// The policies that apply to the role, in the order in which PostgreSQL evaluates them.
    pub policies: Vec<Policy>,
    /// Functions without arguments whose body is one expression, by name.
    pub helpers: BTreeMap<String, Helper>,
    /// Functions of one select, by name: their calls may be replaced.
    pub bodies: BTreeMap<String, Body>,
    /// Whether the body of one more function could not be read, because one of its tables is locked.
    pub bodies_locked: bool,
    /// Tables without row security for the role, by name.
    pub tables: BTreeSet<String>,
    /// Tables with row security for the role, by name.
    pub secured: BTreeMap<String, SecuredTable>,
    /// Columns of which each value is in one row at most, by the name of their table.
    pub unique: BTreeMap<String, BTreeSet<String>>,
    /// A role that the evaluating login may act as, and that reads all rows of all these tables.
    pub reads_as: Option<String>,
    /// Why the policies of a table are not added where it is looked into, by name.
    #[serde(skip)]
    pub not_added: BTreeMap<String, String>,
    /// Why calls of a function are not replaced, by name.
    #[serde(skip)]
    pub not_replaced: BTreeMap<String, String>,
    /// Whether the queries run as [`reads_as`](Self::reads_as).
    #[serde(skip)]
    pub as_other_role: bool,
    /// Whether the setting `realtime.topic` always equals the column `topic`.
    #[serde(skip)]
    pub topic_is_column: bool,
    /// What `lower` does to texts of claims, if the policies may call it and the relay knows it.
    pub folding: Option<Folding>,
    /// Reasons why the dependencies of the policies are unknown.
    pub obstacles: Vec<String>,
    /// Whether they call user-defined functions, whose bodies may depend on the search path.
    #[serde(rename = "calls_own")]
    pub calls_user_functions: bool,
    /// A table that they read and the role may not.
    pub unreadable: Option<String>,
    /// Grants that the role lacks for them: without all of them PostgreSQL shows it nothing.
    pub missing: Vec<String>,
    /// Grants by schema that the evaluating login lacks to look up what the policies name.
    pub unusable: BTreeMap<String, String>,
    /// Whether a user-defined cast exists between system types.
    #[serde(rename = "own_casts")]
    pub user_casts: bool,
}

/// A table with row security, as far as the role is concerned.
#[derive(Debug, Clone, Deserialize)]
pub struct SecuredTable {
    /// The name without the schema and without quotes.
    pub table: String,
    /// The condition of all its policies as SQL.
    pub policy: String,
    /// All its columns.
    pub columns: Vec<String>,
}

/// A policy.
#[derive(Debug, Clone, Deserialize)]
pub struct Policy {
    /// The name.
    pub name: String,
    /// Whether it is permissive; a restrictive policy only removes rows.
    pub permissive: bool,
    /// The condition as SQL.
    pub condition: String,
}

/// A function that is replaced by its body.
#[derive(Debug, Clone, Deserialize)]
pub struct Helper {
    /// The return type.
    pub returns: String,
    /// The source text.
    pub body: String,
}

/// A function of one select, whose calls are replaced by its body.
#[derive(Debug, Clone, Deserialize)]
pub struct Body {
    /// The name without the schema and without quotes, which the body has before names of parameters.
    pub function: String,
    /// The body as PostgreSQL writes it: `RETURN …` or `BEGIN ATOMIC …`.
    pub sql: String,
    /// The names of the parameters; empty for those without one.
    pub names: Vec<String>,
    /// The types of the parameters.
    pub types: Vec<String>,
    /// The type of the result.
    pub returns: String,
    /// Whether it returns a set.
    pub many: bool,
    /// Whether it returns null if an argument is null.
    pub strict: bool,
    /// Whether it reads with its owner's rights, and so past the row security of the role.
    pub definer: bool,
    /// Whether the role may not see all rows of these tables.
    pub past: bool,
    /// The tables that it reads.
    pub tables: BTreeSet<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Missing fields have defaults, so a wrong name would go unnoticed.
    #[test]
    fn fields_have_the_names_of_the_catalog() {
        let rights: Rights = serde_json::from_str(r#"{"calls_own": true, "own_casts": true}"#).unwrap();
        assert!(rights.calls_user_functions && rights.user_casts);
    }
}
