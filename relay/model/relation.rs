//! The catalog as the relay knows it: watched relations, their columns and keys, and what each role may see.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use serde::Deserialize;

use crate::model::change::{RelationId, Spelling};

/// All watched relations at one moment. Immutable: a change of the catalog makes a new one.
#[derive(Debug, Default)]
pub struct Catalog {
    relations: HashMap<RelationId, Arc<Relation>>,
    roles: BTreeSet<String>,
    ordered: bool,
}

impl Catalog {
    /// The relations with the rights of exactly these roles. `ordered`: see [`Catalog::is_ordered`].
    pub fn new(relations: Vec<Relation>, roles: BTreeSet<String>, ordered: bool) -> Self {
        let relations = relations.into_iter().map(|relation| (relation.id(), Arc::new(relation))).collect();
        Self { relations, roles, ordered }
    }

    /// Whether the rights of this role are part of the catalog.
    pub fn knows_role(&self, role: &str) -> bool {
        self.roles.contains(role)
    }

    /// Changes of the schema stand in the changelog, in order with the changes of rows.
    pub fn is_ordered(&self) -> bool {
        self.ordered
    }

    /// The relation watched under that number.
    pub fn relation(&self, id: RelationId) -> Option<&Arc<Relation>> {
        self.relations.get(&id)
    }

    /// The relation of that name.
    pub fn named(&self, schema: &str, table: &str) -> Option<&Arc<Relation>> {
        self.relations().find(|relation| relation.schema == schema && relation.table == table)
    }

    /// All of them, in no order.
    pub fn relations(&self) -> impl Iterator<Item = &Arc<Relation>> {
        self.relations.values()
    }
}

/// A watched relation as `relay.catalog()` describes it.
#[derive(Debug, Deserialize)]
pub struct Relation {
    id: i32,
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub table: String,
    /// Its kind in `pg_class`: `r`, `p`, `m`, `f`.
    pub kind: String,
    /// Rows that leave a subscriber's sight are reported to it.
    pub leave_events: bool,
    /// Replica identity is FULL: `old_record` is the whole old row.
    pub full: bool,
    /// The columns of the primary key (of a materialized view: of its unique index).
    pub key: Vec<String>,
    /// All columns, in table order.
    pub columns: Vec<Column>,
    // A handful of roles, looked up for every subscriber and change: faster by order than by hash.
    access: BTreeMap<String, Access>,
}

/// A column of a relation.
#[derive(Debug, Clone, Deserialize)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// Its type's name in `pg_type` (`int4`, `_text`).
    #[serde(rename = "type")]
    pub kind: String,
}

impl Column {
    /// How its values are written for clients.
    pub fn spelling(&self) -> Spelling {
        if self.kind == "bytea" { Spelling::BareHex } else { Spelling::Plain }
    }
}

/// What one role may see of a relation.
#[derive(Debug, Deserialize)]
pub struct Access {
    /// The columns it may select; never empty.
    pub columns: Vec<String>,
    /// The row policy that applies to it as SQL; none means every row.
    pub policy: Option<String>,
    /// The statement by which PostgreSQL judges row images under that policy.
    pub judge: Option<Arc<str>>,
}

impl Access {
    /// Whether the role may select the column.
    pub fn sees(&self, column: &str) -> bool {
        self.columns.iter().any(|name| name == column)
    }
}

impl Relation {
    /// The number under which it is watched.
    pub fn id(&self) -> RelationId {
        RelationId(self.id)
    }

    /// What the role may see; none means nothing at all.
    pub fn access(&self, role: &str) -> Option<&Access> {
        self.access.get(role).filter(|access| !access.columns.is_empty())
    }

    /// The column of that name.
    pub fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|column| column.name == name)
    }

    /// Whether the column belongs to the key.
    pub fn is_key(&self, name: &str) -> bool {
        self.key.iter().any(|key| key == name)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A catalog entry for tests: `public.todos (id int8 key, owner uuid, title text, raw bytea)`, seen whole by `authenticated`.
    pub(crate) fn todos(full: bool, leave_events: bool) -> Relation {
        serde_json::from_value(serde_json::json!({
            "id": 7, "oid": 16400, "schema": "public", "table": "todos", "kind": "r",
            "leave_events": leave_events, "full": full, "key": ["id"],
            "columns": [
                {"name": "id", "type": "int8"}, {"name": "owner", "type": "uuid"},
                {"name": "title", "type": "text"}, {"name": "raw", "type": "bytea"},
            ],
            "access": {
                "authenticated": {"columns": ["id", "owner", "title", "raw"], "policy": "true", "judge": "select"},
                "narrow": {"columns": ["id", "title"], "policy": null, "judge": null},
                "blind": {"columns": [], "policy": null, "judge": null},
            },
        }))
        .unwrap()
    }

    #[test]
    fn a_role_without_a_column_or_unknown_has_no_access() {
        let relation = todos(false, false);
        assert!(relation.access("authenticated").is_some());
        assert!(relation.access("blind").is_none());
        assert!(relation.access("anon").is_none());
        assert!(!relation.access("narrow").unwrap().sees("owner"));
    }
}
