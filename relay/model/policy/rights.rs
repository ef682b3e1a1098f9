//! What the policies of a relation refer to, as far as a role may use it.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

/// What policies of a relation refer to, as far as the role may use it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Rights {
    /// The policies that apply to the role, in the order in which PostgreSQL tries them.
    pub policies: Vec<Policy>,
    /// Functions without arguments whose body is one expression, by their names.
    pub helpers: BTreeMap<String, Helper>,
    /// Tables without row security of their own for the role, by their names.
    pub tables: BTreeSet<String>,
    /// Why nobody knows what the policies depend on.
    pub obstacles: Vec<String>,
    /// They call functions of users, whose bodies may depend on the search path.
    pub calls_user_functions: bool,
    /// A table that they look into and the role may not read.
    pub unreadable: Option<String>,
    /// Grants that the role lacks for them: until it has them all, PostgreSQL shows it nothing.
    pub missing: Vec<String>,
    /// Grants that the judging login lacks to look up what the policies name, where PostgreSQL is asked.
    pub unusable: BTreeMap<String, String>,
    /// Somebody made a cast between types of the system.
    pub user_casts: bool,
}

/// One policy.
#[derive(Debug, Deserialize)]
pub struct Policy {
    /// Its name.
    pub name: String,
    /// Whether it lets rows through; a restrictive one only keeps them back.
    pub permissive: bool,
    /// Its condition as SQL.
    pub condition: String,
}

/// A function that stands for its body.
#[derive(Debug, Deserialize)]
pub struct Helper {
    /// The type it returns.
    pub returns: String,
    /// Its text.
    pub body: String,
}
