//! The catalog as the relay knows it: watched relations, their columns and keys, and what each role may see.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Deserializer};

use crate::model::catalog::shape::{ShapeRecord, Shapes};
use crate::model::log::cursor::{Cursor, Snapshot};
use crate::model::policy::compile::compile;
use crate::model::policy::plan::{Obstacle, Plan};
use crate::model::policy::rights::Rights;
use crate::model::row::change::{Change, RelationId, Row, Spelling};
use crate::model::row::column::Column;

/// All watched relations at one moment. Immutable: a change of the catalog makes a new one.
#[derive(Debug, Default, Clone)]
pub struct Catalog {
    relations: HashMap<RelationId, Arc<Relation>>,
    roles: BTreeSet<String>,
    ordered: bool,
    widenings: Vec<Widening>,
}

/// When somebody came to see more of a relation.
#[derive(Debug, Clone, Deserialize)]
pub struct Widening {
    /// Changes with smaller numbers are older; none where a role was altered or came to be a member, which stands in no
    /// changelog.
    number: Option<i64>,
    /// Who has this transaction behind it stood after it. Of a role it may be a part of a transaction, which began before.
    xid: u64,
    /// Which relation; 0 is every one.
    relation: i32,
    /// For readers of which role; none is every one.
    role: Option<String>,
}

impl Widening {
    /// Whether whoever has this snapshot behind it stood before it.
    pub fn is_after(&self, seen: &Snapshot) -> bool {
        match self.number {
            Some(_) => !seen.has_finished(self.xid),
            None => self.xid >= seen.xmin(),
        }
    }

    /// Whether a reader of this role may see more by it.
    pub fn is_for(&self, role: &str) -> bool {
        self.role.as_ref().is_none_or(|widened| widened == role)
    }

    /// Whether a change was made before it, so that today's rules may show more of it than those of its time.
    pub fn concerns(&self, change: &Change) -> bool {
        let is_older = match self.number {
            Some(number) => change.number < number && change.xid != self.xid,
            None => change.xid < self.xid,
        };
        is_older && (self.relation == 0 || self.relation == change.relation.0)
    }
}

impl Catalog {
    /// The relations with the rights of exactly these roles. `ordered`: see [`Catalog::is_ordered`].
    pub fn new(relations: Vec<Relation>, roles: BTreeSet<String>, ordered: bool) -> Self {
        let compiled = |relation: Relation| (relation.id(), Arc::new(relation.compiled()));
        let relations = relations.into_iter().map(compiled).collect();
        Self { relations, roles, ordered, widenings: Vec::new() }
    }

    /// The same, knowing when rules were widened.
    pub fn with_widenings(self, widenings: Vec<Widening>) -> Self {
        Self { widenings, ..self }
    }

    /// When rules were widened, as far as somebody may stand before it.
    pub fn widenings(&self) -> &[Widening] {
        &self.widenings
    }

    /// The same with what was read anew: `read` in place of the relations `outdated`, and what `roles` may see of all others,
    /// which came with `others`.
    #[must_use]
    pub fn renewed(
        &self,
        outdated: &BTreeSet<i32>,
        read: Vec<Relation>,
        roles: &BTreeSet<String>,
        others: Vec<Relation>,
    ) -> Self {
        let mut renewed = self.clone();
        for id in outdated {
            renewed.relations.remove(&RelationId(*id));
        }
        for relation in others {
            let Some(known) = renewed.relations.get_mut(&relation.id()) else { continue };
            let mut relation = relation.compiled();
            let kept = known.access.iter().filter(|(role, _)| !roles.contains(*role));
            relation.access.extend(kept.map(|(role, access)| (role.clone(), Arc::clone(access))));
            *known = Arc::new(relation);
        }
        renewed
            .relations
            .extend(read.into_iter().map(|relation| (relation.id(), Arc::new(relation.compiled()))));
        renewed
    }

    /// The same for readers of these roles, too.
    #[must_use]
    pub fn with_roles(self, roles: BTreeSet<String>) -> Self {
        Self { roles, ..self }
    }

    /// Whether the rights of this role are part of the catalog.
    pub fn knows_role(&self, role: &str) -> bool {
        self.roles.contains(role)
    }

    /// Changes of the schema stand in the changelog, in order with the changes of rows.
    pub fn is_ordered(&self) -> bool {
        self.ordered
    }

    /// How many policies, relation by relation and role by role, could not be read because a table was locked.
    pub fn pending(&self) -> usize {
        self.relations().map(|relation| relation.pending()).sum()
    }

    /// The relations of which that holds.
    pub fn pending_relations(&self) -> impl Iterator<Item = i32> {
        self.relations().filter(|relation| relation.is_pending()).map(|relation| relation.id)
    }

    /// The relation watched under that number.
    pub fn relation(&self, id: RelationId) -> Option<&Arc<Relation>> {
        self.relations.get(&id)
    }

    /// The relation of that name.
    pub fn named(&self, schema: &str, table: &str) -> Option<&Arc<Relation>> {
        self.relations().find(|relation| relation.schema == schema && relation.table == table)
    }

    /// What roles lack for the policies by which they read, and the grants that help.
    pub fn missing_grants(&self) -> impl Iterator<Item = String> {
        self.relations()
            .flat_map(|relation| self.roles.iter().filter_map(|role| relation.missing_grants(role)))
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
    /// Its number in `pg_class`. The one under which it is watched is given out anew where the relay is installed anew.
    #[serde(default)]
    pub oid: u32,
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub table: String,
    /// Since when it is watched under this name.
    #[serde(default)]
    pub named: Option<Naming>,
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
    access: BTreeMap<String, Arc<Access>>,
    /// The number of its shape; none when what is recorded is not what it is.
    #[serde(default)]
    shape: Option<i32>,
    #[serde(default, rename = "shapes")]
    recorded: Vec<ShapeRecord>,
    #[serde(skip)]
    shapes: Shapes,
}

/// When a relation was watched first, or got its name: the transaction, and its place in the changelog.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
pub struct Naming {
    #[serde(deserialize_with = "transaction")]
    xid: u64,
    number: i64,
}

impl Naming {
    /// Whether somebody here stands before it.
    pub fn is_after(&self, cursor: &Cursor) -> bool {
        !cursor.has(self.xid, self.number)
    }
}

/// Written as a text, for JSON has no numbers of that size.
fn transaction<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
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
    /// What the policy may rely on.
    #[serde(default)]
    pub rights: Rights,
    /// The policy could not be read, because a table in it is locked.
    #[serde(default)]
    pub pending: bool,
    /// How the policy is decided.
    #[serde(skip, default = "Plan::allow_all")]
    pub plan: Plan,
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

    /// With the policies compiled.
    fn compiled(mut self) -> Self {
        let mut roles = std::mem::take(&mut self.access);
        for access in roles.values_mut().filter_map(Arc::get_mut) {
            access.plan = match &access.policy {
                _ if access.pending => Plan::pending(),
                None => Plan::allow_all(),
                Some(policy) if matches!(self.kind.as_str(), "m" | "f") => Plan::opaque(Obstacle {
                    part: policy.clone(),
                    why: String::from(
                        "the policy of relay.allow is text, of which PostgreSQL keeps no parsed form",
                    ),
                }),
                Some(policy) => compile(policy, &self.table, &self.columns, &access.rights),
            };
            // Worked out before the images, once.
            if let (Some(probe), Some(judge)) = (&access.plan.probe, &mut access.judge) {
                *judge = format!("{judge} where {probe}").into();
            }
        }
        self.access = roles;
        self.shapes = Shapes::new(&std::mem::take(&mut self.recorded), self.shape, &self.key);
        self
    }

    /// For how many roles its policies could not be read.
    fn pending(&self) -> usize {
        self.access.values().filter(|access| access.pending).count()
    }

    /// Whether policies of it could not be read.
    pub fn is_pending(&self) -> bool {
        self.pending() > 0
    }

    /// What its images were written under.
    pub fn shapes(&self) -> &Shapes {
        &self.shapes
    }

    /// What the role may see; none means nothing at all.
    pub fn access(&self, role: &str) -> Option<&Access> {
        self.access.get(role).map(|access| &**access).filter(|access| !access.columns.is_empty())
    }

    /// The column of that name.
    pub fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|column| column.name == name)
    }

    /// Whether the role's policy may read a column. The text of a policy of row security is PostgreSQL's own, in which a column
    /// stands by its name; a name that only looks like a column's reads too much, never too little. Other policies are as
    /// somebody wrote them, and may read any column in any spelling.
    pub fn policy_reads(&self, access: &Access, column: &str) -> bool {
        let Some(policy) = &access.policy else { return false };
        matches!(self.kind.as_str(), "m" | "f")
            || policy.contains(".*")
            || contains_name(policy, &column.replace('"', "\"\""))
    }

    /// A row image with nothing but what is read, for PostgreSQL, which need not be able to take back the other columns. It
    /// holds domains in any case: one may refuse the null that stands for what is left out.
    pub fn narrowed(&self, row: &Row<'_>, reads: impl Fn(&str) -> bool) -> String {
        let is_domain = |name: &str| self.column(name).is_some_and(|column| column.domain);
        row.project(|name| (is_domain(name) || reads(name)).then_some(Spelling::Plain))
    }

    /// What the role lacks for the policies by which it reads, and the grants that help, in one line.
    pub fn missing_grants(&self, role: &str) -> Option<String> {
        let Access { rights: Rights { missing, unusable, .. }, plan, .. } = self.access(role)?;
        let unusable =
            unusable.iter().filter(|(schema, _)| plan.names(schema)).map(|(_, grant)| grant.clone());
        let unusable: Vec<String> = unusable.collect();
        let (problem, grants) = match (missing.is_empty(), unusable.is_empty()) {
            (false, _) => (format!("read what the role {role} may not"), missing),
            (true, true) => return None,
            (true, false) => (
                format!("name what may not be looked up where they are judged for the role {role}"),
                &unusable,
            ),
        };
        let (schema, table, grants) = (&self.schema, &self.table, grants.join("; "));
        Some(format!("the policies of {schema}.{table} {problem}, so that nothing of it is shown: {grants}"))
    }

    /// Whether the column belongs to the key.
    pub fn is_key(&self, name: &str) -> bool {
        self.key.iter().any(|key| key == name)
    }
}

/// Whether the name stands in a text of SQL as a whole word.
fn contains_name(sql: &str, name: &str) -> bool {
    let continues_name = |next: Option<char>| {
        next.is_some_and(|next| next.is_alphanumeric() || next == '_' || next == '$' || !next.is_ascii())
    };
    sql.match_indices(name).any(|(at, _)| {
        !continues_name(sql[..at].chars().next_back())
            && !continues_name(sql[at + name.len()..].chars().next())
    })
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
                {"name": "id", "type": "int8", "known": "int8"},
                {"name": "owner", "type": "uuid", "known": "uuid", "plain": true},
                {"name": "title", "type": "text", "known": "text", "plain": true},
                {"name": "raw", "type": "bytea", "plain": true},
            ],
            "access": {
                "authenticated": {"columns": ["id", "owner", "title", "raw"], "policy": "true", "judge": "select"},
                "narrow": {"columns": ["id", "title"], "policy": null, "judge": null},
                "blind": {"columns": [], "policy": null, "judge": null},
            },
        }))
        .unwrap()
    }

    /// A relation with one column `c`, all of whose values are of this kind, if they can be compared here.
    pub(crate) fn one_column(kind: &str, known: Option<&str>) -> Relation {
        serde_json::from_value(serde_json::json!({
            "id": 8, "schema": "public", "table": "ones", "kind": "r", "leave_events": false, "full": false, "key": [],
            "columns": [{"name": "c", "type": kind, "known": known, "plain": true}], "access": {},
        }))
        .unwrap()
    }

    #[test]
    fn a_policy_reads_the_columns_whose_names_are_words_of_it() {
        for (column, policy, reads) in [
            ("id", "(id = 1)", true),
            ("id", "(todos.id = 1)", true),
            ("id", "(paid = identity)", false),
            ("id", r#"("id" = 1)"#, true),
            ("a-b", r#"("a-b" = 1)"#, true),
            ("é", "(é = 1)", true),
            ("e", "(né = 1)", false),
            ("x\"y", r#"("x""y" = 1)"#, true),
            ("id", "(todos.* IS NOT NULL)", true),
            ("d", "is_d(id)", false),
        ] {
            assert_eq!(
                policy.contains(".*") || contains_name(policy, &column.replace('"', "\"\"")),
                reads,
                "{column} in {policy}"
            );
        }
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
