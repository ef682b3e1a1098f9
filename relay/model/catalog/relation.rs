//! The catalog: watched relations, their columns and keys, and the access of each role.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Deserializer};

use crate::model::catalog::shape::{ShapeRecord, Shapes};
use crate::model::catalog::topic_rules::TopicRules;
use crate::model::log::cursor::{Cursor, Snapshot};
use crate::model::policy::compile::compile;
use crate::model::policy::plan::{Obstacle, Plan, PlanKind};
use crate::model::policy::rights::Rights;
use crate::model::row::change::{Change, Operation, RelationId, Row, Spelling};
use crate::model::row::column::Column;

/// All watched relations at one moment. Immutable: a change of the catalog makes a new one.
#[derive(Debug, Default, Clone)]
pub struct Catalog {
    relations: HashMap<RelationId, Arc<Relation>>,
    /// The partitions among the relations.
    parts: Vec<RelationId>,
    roles: BTreeSet<String>,
    ordered: bool,
    widenings: Vec<Widening>,
    /// The rules of private channels; `None` without the table that has them.
    topics: Option<Arc<TopicRules>>,
}

/// An event after which readers may see more of a relation.
#[derive(Debug, Clone, Deserialize)]
pub struct Widening {
    /// The changelog number of the event: older changes have smaller ones. `None` where a role was altered or became a member,
    /// which the changelog does not record.
    number: Option<i64>,
    /// The transaction of the event. For a role it may be a subtransaction, whose top-level transaction began earlier.
    xid: u64,
    /// The relation; 0 means every relation.
    relation: i32,
    /// The partition whose own rules were widened; 0 means those of the relation itself.
    part: u32,
    /// The role whose readers are affected; `None` means every role.
    role: Option<String>,
}

impl Widening {
    /// Whether a reader that has seen exactly this snapshot is before the event.
    pub fn is_after(&self, seen: &Snapshot) -> bool {
        match self.number {
            Some(_) => !seen.has_finished(self.xid),
            None => self.xid >= seen.xmin(),
        }
    }

    /// Whether the event may affect readers of this role.
    pub fn is_for(&self, role: &str) -> bool {
        self.role.as_ref().is_none_or(|widened| widened == role)
    }

    /// Whether the change precedes the event, so that today's rules of the relation may show more of it than the rules of its time.
    pub fn concerns(&self, change: &Change, relation: RelationId) -> bool {
        let is_older = match self.number {
            Some(number) => change.number < number && change.xid != self.xid,
            None => change.xid < self.xid,
        };
        is_older
            && (self.relation == 0
                || (self.relation, self.part) == (relation.watched, relation.part.unwrap_or_default()))
    }
}

impl Catalog {
    /// Creates a catalog with the access of exactly these roles. `ordered`: see [`Catalog::is_ordered`].
    pub fn new(relations: Vec<Relation>, roles: BTreeSet<String>, ordered: bool) -> Self {
        let compiled = |relation: Relation| (relation.id(), Arc::new(relation.compiled()));
        let relations = relations.into_iter().map(compiled).collect();
        Self { relations, parts: Vec::new(), roles, ordered, widenings: Vec::new(), topics: None }
            .with_parts()
    }

    /// Sets the events that widened access.
    pub fn with_widenings(self, widenings: Vec<Widening>) -> Self {
        Self { widenings, ..self }
    }

    /// Sets the rules of private channels.
    #[must_use]
    pub fn with_topics(self, topics: Option<Arc<TopicRules>>) -> Self {
        Self { topics, ..self }
    }

    /// Returns the rules of private channels; `None` without the table that has them.
    pub fn topics(&self) -> Option<&Arc<TopicRules>> {
        self.topics.as_ref()
    }

    /// Returns the events that widened access, as far as a reader may be before them.
    pub fn widenings(&self) -> &[Widening] {
        &self.widenings
    }

    /// Replaces what was read again: the relations `outdated` by `read`, and the access of `roles` to all other relations by the
    /// access in `others`.
    #[must_use]
    pub fn renewed(
        &self,
        outdated: &BTreeSet<i32>,
        read: Vec<Relation>,
        roles: &BTreeSet<String>,
        others: Vec<Relation>,
    ) -> Self {
        let mut renewed = self.clone();
        renewed.relations.retain(|id, _| !outdated.contains(&id.watched));
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
        renewed.with_parts()
    }

    fn with_parts(mut self) -> Self {
        self.parts = self.relations.keys().copied().filter(|id| id.part.is_some()).collect();
        self.parts.sort_unstable();
        self
    }

    /// Sets the roles whose access the catalog holds.
    #[must_use]
    pub fn with_roles(self, roles: BTreeSet<String>) -> Self {
        Self { roles, ..self }
    }

    /// Whether the catalog holds the access of this role.
    pub fn knows_role(&self, role: &str) -> bool {
        self.roles.contains(role)
    }

    /// Whether schema changes are in the changelog, ordered with the row changes.
    pub fn is_ordered(&self) -> bool {
        self.ordered
    }

    /// Counts the policies, per relation and role, that could not be read because a table was locked.
    pub fn pending(&self) -> usize {
        let of_topics = usize::from(self.topics.as_ref().is_some_and(|topics| topics.is_pending()));
        self.relations().map(|relation| relation.pending()).sum::<usize>() + of_topics
    }

    /// Returns the relations with such policies.
    pub fn pending_relations(&self) -> impl Iterator<Item = i32> {
        self.relations().filter(|relation| relation.pending() > 0).map(|relation| relation.id)
    }

    /// Returns the relation with this id.
    pub fn relation(&self, id: RelationId) -> Option<&Arc<Relation>> {
        self.relations.get(&id)
    }

    /// Returns the relations that the change is of: the watched one, and the loaded partitions that held the row when it was
    /// written. A truncation or gap of the whole is of all its partitions.
    pub fn affected(&self, change: &Change) -> Vec<&Arc<Relation>> {
        let Some(whole) = self.relation(change.relation) else { return Vec::new() };
        let mut affected = vec![whole];
        if self.parts.is_empty() {
            return affected;
        }
        match (change.leaf, change.operation) {
            (Some(leaf), _) => {
                let part = |oid| self.relation(RelationId { part: Some(oid), ..whole.id() });
                affected.extend(whole.path_from(leaf, change.number).filter_map(part));
            }
            (None, Operation::Truncate | Operation::Gap) => affected.extend(self.loaded_parts(whole.id())),
            (None, _) => {}
        }
        affected
    }

    /// Returns a watched relation and its loaded partitions.
    pub fn with_loaded_parts(&self, id: RelationId) -> impl Iterator<Item = &Arc<Relation>> {
        self.relation(id).into_iter().chain(self.loaded_parts(id))
    }

    fn loaded_parts(&self, of: RelationId) -> impl Iterator<Item = &Arc<Relation>> {
        let parts = self.parts.iter().filter(move |part| part.watched == of.watched);
        parts.filter_map(|part| self.relation(*part))
    }

    /// Returns the partition with this name when the catalog does not hold its rights, because no subscriber names it.
    pub fn unloaded_part(&self, schema: &str, table: &str) -> Option<u32> {
        self.part_named(schema, table).filter(|_| self.named(schema, table).is_none())
    }

    /// Returns the partition with this name, unless it is watched itself.
    pub fn part_named(&self, schema: &str, table: &str) -> Option<u32> {
        if let Some(relation) = self.named(schema, table) {
            return relation.id().part;
        }
        let names = self.relations().flat_map(|relation| &*relation.parts);
        let mut named = names.filter(|(_, part)| part.schema == schema && part.table == table);
        named.next().map(|(oid, _)| *oid)
    }

    /// Whether the catalog holds the rights on this partition.
    pub fn has_loaded_part(&self, oid: u32) -> bool {
        self.parts.iter().any(|id| id.part == Some(oid))
    }

    /// Whether a watched relation has this partition.
    pub fn has_part(&self, oid: u32) -> bool {
        self.relations().any(|relation| relation.parts.contains_key(&oid))
    }

    /// Returns the relation with this name.
    pub fn named(&self, schema: &str, table: &str) -> Option<&Arc<Relation>> {
        self.relations().find(|relation| relation.schema == schema && relation.table == table)
    }

    /// Returns the watched relations among these tables, by id.
    pub fn watched(&self, tables: &BTreeSet<u32>) -> impl Iterator<Item = i32> {
        self.relations().filter(|relation| tables.contains(&relation.oid)).map(|relation| relation.id)
    }

    /// Describes the grants that roles lack for their policies.
    pub fn missing_grants(&self) -> impl Iterator<Item = String> {
        self.relations()
            .flat_map(|relation| self.roles.iter().filter_map(|role| relation.missing_grants(role)))
    }

    /// Returns all relations, in no order.
    pub fn relations(&self) -> impl Iterator<Item = &Arc<Relation>> {
        self.relations.values()
    }
}

/// A watched relation as `relay.catalog()` describes it.
#[derive(Debug, Default, Deserialize)]
pub struct Relation {
    id: i32,
    /// The OID in `pg_class`. Unlike `id`, it survives a new installation of the relay.
    #[serde(default)]
    pub oid: u32,
    /// The schema.
    pub schema: String,
    /// The name.
    pub table: String,
    /// Since when the relation is watched under this name.
    #[serde(default)]
    pub named: Option<Naming>,
    /// Whether it is a partition of the watched relation with this id.
    #[serde(default)]
    part: bool,
    /// A hash of its partitions' names and parents; 0 when there are none.
    #[serde(default)]
    parts_mark: i64,
    /// Its partitions at all levels; empty for a partition.
    #[serde(skip)]
    parts: Arc<PartNames>,
    /// What its partitions were partitions of before, by number.
    #[serde(default)]
    former_parents: Vec<FormerParent>,
    /// The kind in `pg_class`: `r`, `p`, `m`, `f`.
    pub kind: String,
    /// Whether subscribers are notified of rows that leave their visibility.
    pub leave_events: bool,
    /// Whether the replica identity is FULL: `old_record` is the whole old row.
    pub full: bool,
    /// The columns of the primary key (for a materialized view: of its unique index).
    pub key: Vec<String>,
    /// All columns, in table order.
    pub columns: Vec<Column>,
    // A few roles, looked up for every subscriber and change: an ordered map is faster than hashing.
    access: BTreeMap<String, Arc<Access>>,
    /// The number of the current shape; `None` when the recorded shape differs from the actual one.
    #[serde(default)]
    shape: Option<i32>,
    #[serde(default, rename = "shapes")]
    recorded: Vec<ShapeRecord>,
    #[serde(skip)]
    shapes: Shapes,
}

/// Names and places of partitions, by OID, as `relay.known_relations` records them.
pub type PartNames = HashMap<u32, PartName>;

/// The name and place of a partition.
#[derive(Debug, Deserialize)]
pub struct PartName {
    schema: String,
    table: String,
    /// The OID of the table that it is directly a partition of.
    parent: u32,
}

/// What a partition was a partition of up to a change of its parent.
#[derive(Debug, Deserialize)]
struct FormerParent {
    part: u32,
    /// `None`: it was no partition of the relation.
    parent: Option<u32>,
    /// The changelog number of the event: older changes have smaller ones.
    number: i64,
}

/// When a relation was first watched, or got its name: the transaction and the changelog number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
pub struct Naming {
    #[serde(deserialize_with = "transaction")]
    xid: u64,
    number: i64,
}

impl Naming {
    /// Whether the cursor is before this event.
    pub fn is_after(&self, cursor: &Cursor) -> bool {
        !cursor.has(self.xid, self.number)
    }
}

/// Parses a number written as text, because JSON numbers are too small for it.
fn transaction<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}

/// The access of one role to a relation.
#[derive(Debug, Deserialize)]
pub struct Access {
    /// The columns that the role may select.
    pub columns: Vec<String>,
    /// The row policy of the role as SQL; `None` means every row.
    pub policy: Option<String>,
    /// The statement by which PostgreSQL evaluates the policy on row images.
    pub judge: Option<Arc<str>>,
    /// A policy of `relay.allow` as PostgreSQL writes it, if it reads nothing but the row and claims.
    #[serde(default)]
    pub allowed: Option<String>,
    /// What the policy refers to.
    #[serde(default)]
    pub rights: Rights,
    /// Whether the policy could not be read because one of its tables is locked.
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
    /// Returns the id under which the relation is watched.
    pub fn id(&self) -> RelationId {
        RelationId { watched: self.id, part: self.part.then_some(self.oid) }
    }

    /// Whether it is a partition of a watched relation.
    pub fn is_part(&self) -> bool {
        self.part
    }

    /// Takes over the partitions that this relation had in the catalog; false when their names or parents have changed since.
    pub fn keep_parts(&mut self, known: &Catalog) -> bool {
        let known = known.relation(self.id()).filter(|known| known.parts_mark == self.parts_mark);
        if let Some(known) = known {
            self.parts = Arc::clone(&known.parts);
        }
        known.is_some() || self.parts_mark == 0
    }

    /// Sets its partitions.
    pub fn set_parts(&mut self, parts: PartNames) {
        self.parts = Arc::new(parts);
    }

    /// Returns a partition and the partitions above it when the change with this number was written, from below.
    fn path_from(&self, leaf: u32, number: i64) -> impl Iterator<Item = u32> {
        let parent = move |oid: &u32| {
            let mut former = self.former_parents.iter();
            match former.find(|former| former.part == *oid && number < former.number) {
                Some(former) => former.parent,
                None => self.parts.get(oid).map(|part| part.parent),
            }
        };
        std::iter::successors(Some(leaf), parent).take(MAX_LEVELS)
    }

    /// Compiles the policies of private channels.
    pub fn compiled_for_topics(mut self) -> Self {
        for access in self.access.values_mut().filter_map(Arc::get_mut) {
            access.rights.topic_is_column = true;
        }
        self.compiled()
    }

    /// Compiles the policies and shapes.
    fn compiled(mut self) -> Self {
        let mut roles = std::mem::take(&mut self.access);
        for access in roles.values_mut().filter_map(Arc::get_mut) {
            access.plan = match &access.policy {
                _ if access.pending => Plan::pending(),
                None => Plan::allow_all(),
                Some(policy) if matches!(self.kind.as_str(), "m" | "f") => {
                    let compiled =
                        |condition: &String| compile(condition, &self.table, &self.columns, &access.rights);
                    let known = access.allowed.as_ref().map(compiled);
                    known.filter(|plan| plan.kind == PlanKind::Compiled).unwrap_or_else(|| {
                        Plan::opaque(Obstacle {
                            part: as_allowed(policy).to_owned(),
                            why: String::from(
                                "a policy of relay.allow is decided by the relay only if it reads nothing but the row and claims",
                            ),
                        })
                    })
                }
                Some(policy) => compile(policy, &self.table, &self.columns, &access.rights),
            };
            // The probe of the claims is evaluated once, before the images.
            if let (Some(probe), Some(judge)) = (&access.plan.probe, &mut access.judge) {
                *judge = format!("{judge} where {probe}").into();
            }
        }
        self.access = roles;
        self.shapes = Shapes::new(&std::mem::take(&mut self.recorded), self.shape, &self.key);
        self
    }

    /// Counts the roles whose policies could not be read, or not the functions that they call.
    fn pending(&self) -> usize {
        self.access.values().filter(|access| access.pending || access.rights.bodies_locked).count()
    }

    /// Whether policies could not be read. Without the functions that they call, PostgreSQL evaluates them reader by reader.
    pub fn is_pending(&self) -> bool {
        self.access.values().any(|access| access.pending)
    }

    /// Returns the shapes that images were written under.
    pub fn shapes(&self) -> &Shapes {
        &self.shapes
    }

    /// Returns the access of the role; `None` when it may not select any column.
    pub fn access(&self, role: &str) -> Option<&Access> {
        self.access.get(role).map(|access| &**access).filter(|access| !access.columns.is_empty())
    }

    /// Returns the column with this name.
    pub fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|column| column.name == name)
    }

    /// Whether the role's policy may read a column. The text of a row security policy is PostgreSQL's own, where each column
    /// stands by its name; a false match only reads too much, never too little. Policies of materialized views and foreign tables
    /// are the user's text and may read any column in any spelling.
    pub fn policy_reads(&self, access: &Access, column: &str) -> bool {
        let Some(policy) = &access.policy else { return false };
        matches!(self.kind.as_str(), "m" | "f")
            || policy.contains(".*")
            || contains_name(policy, &column.replace('"', "\"\""))
    }

    /// Reduces a row image to the columns that are read, because PostgreSQL may not be able to parse the others. Keeps domains in
    /// any case: a domain may refuse the null of an omitted column.
    pub fn narrowed(&self, row: &Row<'_>, reads: impl Fn(&str) -> bool) -> String {
        let is_domain = |name: &str| self.column(name).is_some_and(|column| column.domain);
        row.project(|name| (is_domain(name) || reads(name)).then_some(Spelling::Plain))
    }

    /// Describes the grants that the role lacks for its policies, in one line.
    pub fn missing_grants(&self, role: &str) -> Option<String> {
        let Access { rights: Rights { missing, unusable, .. }, plan, .. } = self.access(role)?;
        let unusable = unusable
            .iter()
            // Another role looks the names up then, which was chosen because it may.
            .filter(|(schema, _)| plan.reads_as.is_none() && plan.may_name_schema(schema))
            .map(|(_, grant)| grant.clone());
        let unusable: Vec<String> = unusable.collect();
        let (problem, grants) = match (missing.is_empty(), unusable.is_empty()) {
            (false, _) => (format!("read objects that the role {role} may not read"), missing),
            (true, true) => return None,
            (true, false) => {
                (format!("name objects that the evaluating login may not look up (role {role})"), &unusable)
            }
        };
        let (schema, table, grants) = (&self.schema, &self.table, grants.join("; "));
        Some(format!("the policies of {schema}.{table} {problem}, so no row is shown. Run: {grants}"))
    }

    /// Whether the column belongs to the key.
    pub fn is_key(&self, name: &str) -> bool {
        self.key.iter().any(|key| key == name)
    }
}

/// The text that `relay.allow` was given, of the condition that `relay.policy_for` makes of it.
fn as_allowed(policy: &str) -> &str {
    policy.strip_prefix('(').and_then(|rest| rest.strip_suffix("\n)")).unwrap_or(policy)
}

/// Maximum number of levels of partitions: PostgreSQL has no cycles, the catalog of two moments might.
const MAX_LEVELS: usize = 64;

/// Whether the name occurs in SQL text as a whole word.
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

    /// A catalog entry for tests: `public.todos (id int8 key, owner uuid, title text, raw bytea)`, fully visible to
    /// `authenticated`.
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

    /// A relation with one column `c` of this type; `known` is its kind if the relay can compare it.
    pub(crate) fn one_column(kind: &str, known: Option<&str>) -> Relation {
        serde_json::from_value(serde_json::json!({
            "id": 8, "schema": "public", "table": "ones", "kind": "r", "leave_events": false, "full": false, "key": [],
            "columns": [{"name": "c", "type": kind, "known": known, "plain": true}], "access": {},
        }))
        .unwrap()
    }

    #[test]
    fn a_policy_reads_the_columns_that_its_text_names() {
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
