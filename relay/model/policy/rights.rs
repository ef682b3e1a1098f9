//! The objects that the policies of a relation refer to, as far as a role may use them.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

/// The objects that the policies of a relation refer to, as far as the role may use them.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Rights {
    /// The policies that apply to the role, in the order in which PostgreSQL evaluates them.
    pub policies: Vec<Policy>,
    /// Functions without arguments whose body is one expression, by name.
    pub helpers: BTreeMap<String, Helper>,
    /// Tables without row security for the role, by name.
    pub tables: BTreeSet<String>,
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

/// A policy.
#[derive(Debug, Deserialize)]
pub struct Policy {
    /// The name.
    pub name: String,
    /// Whether it is permissive; a restrictive policy only removes rows.
    pub permissive: bool,
    /// The condition as SQL.
    pub condition: String,
}

/// A function that is replaced by its body.
#[derive(Debug, Deserialize)]
pub struct Helper {
    /// The return type.
    pub returns: String,
    /// The source text.
    pub body: String,
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
