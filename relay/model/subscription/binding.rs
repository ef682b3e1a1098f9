//! Subscriptions: the requests of a channel, bound to verified claims.

use std::collections::{BTreeMap, HashSet};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use crate::model::catalog::held_parts::HeldParts;
use crate::model::catalog::near_names::near_names;
use crate::model::catalog::relation::{Access, Catalog, Naming, Relation};
use crate::model::log::cursor::Cursor;
use crate::model::policy::index_key::IndexKeys;
use crate::model::policy::visibility::Identity;
use crate::model::row::change::{Change, RelationId};
use crate::model::subscription::error::{SubscribeError, identifier};
use crate::model::subscription::hidden::hidden_from;
use crate::model::subscription::request::{CatalogView, Events, Request, Target};
use crate::model::subscription::topic::TopicScope;
use crate::model::subscription::typed_filter::TypedFilter;

/// A refused request, with the state of the catalog that led to the refusal.
#[derive(Debug, PartialEq, Eq)]
pub struct RefusedBinding {
    /// The error for the client.
    pub why: SubscribeError,
    request: Request,
    catalog_view: CatalogView,
}

/// A request bound to a relation and to the rights of its claims. Equality compares the content, because ids may collide.
#[derive(Debug)]
pub struct Binding {
    /// See [`Request::id`].
    pub id: u32,
    /// The operations.
    pub events: Events,
    /// The relations.
    pub scope: Scope,
    /// The filter on rows; `None` means all rows.
    pub filter: Option<Arc<TypedFilter>>,
    /// The selected columns; `None` means all.
    pub select: Option<Vec<String>>,
}

impl PartialEq for Binding {
    fn eq(&self, other: &Self) -> bool {
        let filters = (self.filter.as_ref(), other.filter.as_ref());
        (self.id, self.events, &self.scope, &self.select)
            == (other.id, other.events, &other.scope, &other.select)
            && match filters {
                (Some(one), Some(other)) => one.has_same_conditions(other),
                (one, other) => one.is_none() && other.is_none(),
            }
    }
}

impl Eq for Binding {}

impl Binding {
    /// Returns the relations that it names, as in SQL; `*` stands for all.
    pub fn name(&self) -> String {
        match &self.scope {
            Scope::Relation(_, _, name, _) => format!("{}.{}", identifier(&name.0), identifier(&name.1)),
            Scope::Named(table) => identifier(table),
            Scope::Schema(schema) => format!("{}.*", identifier(schema)),
            Scope::All => String::from("*"),
            Scope::Refused(refused) => refused.request.target.name(),
        }
    }

    /// Whether the entry was refused, so that it receives nothing.
    pub fn is_refused(&self) -> bool {
        matches!(self.scope, Scope::Refused(_))
    }
}

impl Hash for Binding {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.id.hash(state);
    }
}

/// The cost of encoding a frame, as a number of value comparisons.
const COMPARISONS_PER_FRAME: usize = 10;

/// The relations of a binding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// No relation: the entry was refused, temporarily or permanently.
    Refused(Arc<RefusedBinding>),
    /// One relation: its id in the catalog, its `oid`, the requested schema and table, and when it got that name.
    Relation(RelationId, u32, Arc<(String, String)>, Option<Naming>),
    /// Every watched relation with a name, including future ones.
    Named(String),
    /// Every watched relation of a schema, including future ones.
    Schema(String),
    /// Every watched relation, including future ones.
    All,
}

impl Scope {
    /// Whether it includes the relation under its current name.
    fn includes(&self, relation: &Relation) -> bool {
        match self {
            Self::Relation(id, oid, name, _) => {
                (*id, *oid, &name.0, &name.1)
                    == (relation.id(), relation.oid, &relation.schema, &relation.table)
            }
            Self::Refused(_) => false,
            // A row of a partition is already among those of the watched relation.
            _ if relation.is_part() => false,
            Self::Named(table) => *table == relation.table,
            Self::Schema(schema) => *schema == relation.schema,
            Self::All => true,
        }
    }
}

/// The subscription of one channel. It always has verified claims: only [`Subscription::bind`] and [`Subscription::of_topic`] create
/// one. Equality ignores what the subscriber was told at the bind, and what it holds.
#[derive(Debug, Clone)]
pub struct Subscription {
    identity: Identity,
    bindings: Arc<[Binding]>,
    /// The named relations that showed the role no row when it was bound, each with what to do.
    hidden: Arc<[(RelationId, String)]>,
    #[allow(dead_code, reason = "counted by its holder, the catalog")]
    held_parts: HeldParts,
    /// The topic whose broadcasts it follows.
    topic: Option<TopicScope>,
}

impl PartialEq for Subscription {
    fn eq(&self, other: &Self) -> bool {
        (&self.identity, &self.bindings, &self.topic) == (&other.identity, &other.bindings, &other.topic)
    }
}

impl Eq for Subscription {}

impl Hash for Subscription {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (&self.identity, &self.bindings, &self.topic).hash(state);
    }
}

impl Subscription {
    /// Binds requests to an identity with the rights in the catalog. A refused request does not affect the others.
    ///
    /// `filters` has each request's typed filter or error, in the order of `requests`. A request is also refused if the relation
    /// is not watched or not readable by the role (the same text for both), or if a selected column is not readable.
    pub fn bind(
        identity: Identity,
        catalog: &Catalog,
        requests: &[Request],
        filters: Vec<Result<Option<Arc<TypedFilter>>, SubscribeError>>,
    ) -> Self {
        let bind = |(request, filter): (&Request, Result<Option<Arc<TypedFilter>>, SubscribeError>)| {
            let bound = filter.and_then(|filter| Ok((scope(&identity, catalog, request)?, filter)));
            let (scope, filter) = bound.unwrap_or_else(|why| {
                let catalog_view = request.catalog_view(catalog, identity.claims().role());
                (
                    Scope::Refused(Arc::new(RefusedBinding { why, request: request.clone(), catalog_view })),
                    None,
                )
            });
            // Remove duplicate columns, which would be checked again for each change.
            let mut seen = HashSet::new();
            let select = request.select.iter().filter(|column| seen.insert(*column)).cloned();
            let select = (!request.select.is_empty()).then(|| select.collect());
            Binding { id: request.id(), events: request.events, scope, filter, select }
        };
        let bindings = requests.iter().zip(filters).map(bind).collect();
        let (hidden, held_parts) = (Arc::default(), HeldParts::default());
        let mut subscription = Self { identity, bindings, hidden, held_parts, topic: None };
        let hidden = subscription.hidden_in(catalog);
        if !hidden.is_empty() {
            subscription.hidden = hidden.into_iter().collect();
        }
        subscription
    }

    /// Creates a subscription to the broadcasts of a topic, and to nothing else.
    pub fn of_topic(identity: Identity, topic: TopicScope) -> Self {
        let (bindings, hidden, held_parts) = (Arc::default(), Arc::default(), HeldParts::default());
        Self { identity, bindings, hidden, held_parts, topic: Some(topic) }
    }

    /// Adds the broadcasts of a topic.
    #[must_use]
    pub fn with_topic(self, topic: Option<TopicScope>) -> Self {
        Self { topic, ..self }
    }

    /// Returns the topic whose broadcasts it follows.
    pub fn topic(&self) -> Option<&TopicScope> {
        self.topic.as_ref()
    }

    /// Returns why named relations showed its role no row when it was bound, and what to do.
    pub fn hidden(&self) -> impl Iterator<Item = &str> {
        self.hidden.iter().map(|(_, why)| why.as_str())
    }

    /// Returns the named relations that show its role no row, each with the reason.
    pub fn hidden_in(&self, catalog: &Catalog) -> BTreeMap<RelationId, String> {
        let role = self.identity.claims().role();
        let named = self.bindings.iter().filter_map(|binding| match binding.scope {
            Scope::Relation(id, ..) => catalog.relation(id),
            _ => None,
        });
        named.filter_map(|relation| Some((relation.id(), hidden_from(relation, role)?))).collect()
    }

    /// Returns the reasons of the relations that show its role no row `now` and may have shown it rows `before`; where the
    /// earlier catalog does not have the role, when it was bound.
    pub fn newly_hidden(&self, before: Option<&Catalog>, now: &Catalog) -> Vec<String> {
        let role = self.identity.claims().role();
        let before = before.filter(|before| before.knows_role(role));
        let was_told = |id: &RelationId| match before.and_then(|before| before.relation(*id)) {
            Some(relation) => hidden_from(relation, role).is_some(),
            None => self.hidden.iter().any(|(told, _)| told == id),
        };
        self.hidden_in(now).into_iter().filter(|(id, _)| !was_told(id)).map(|(_, why)| why).collect()
    }

    /// Keeps these partitions in the catalog as long as the subscription exists.
    #[must_use]
    pub fn holding(self, held_parts: HeldParts) -> Self {
        Self { held_parts, ..self }
    }

    /// Returns the errors of refused entries, in order.
    pub fn refusals(&self) -> impl Iterator<Item = &SubscribeError> {
        self.bindings.iter().filter_map(|binding| match &binding.scope {
            Scope::Refused(refused) => Some(&refused.why),
            _ => None,
        })
    }

    /// Returns the subscription if no entry was refused.
    ///
    /// # Errors
    /// The error of the first refused entry.
    pub fn whole(self) -> Result<Self, SubscribeError> {
        let refusal = self.refusals().next().cloned();
        refusal.map_or(Ok(self), Err)
    }

    /// Returns the subscriber's identity.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Returns the bindings.
    pub fn bindings(&self) -> &[Binding] {
        &self.bindings
    }

    /// Returns a shared reference to the bindings.
    pub fn shared_bindings(&self) -> Arc<[Binding]> {
        Arc::clone(&self.bindings)
    }

    /// Returns the cost of a change for this subscription, in value comparisons: those of filters that no index covers, and the
    /// encoding of a frame for each further column selection.
    pub fn scanned_values(&self) -> usize {
        let (mut index_keys, mut values, mut selections) = (IndexKeys::OneOf(Vec::new()), 0, HashSet::new());
        for binding in self.bindings.iter().filter(|binding| !binding.is_refused()) {
            let filter = binding.filter.as_ref();
            index_keys = index_keys.or(filter.map_or(IndexKeys::Any, |filter| filter.index_keys()));
            values += filter.map_or(0, |filter| filter.value_count());
            selections.insert(&binding.select);
        }
        let frames = selections.len().saturating_sub(1) * COMPARISONS_PER_FRAME;
        if index_keys == IndexKeys::Any { values + frames } else { frames }
    }

    /// Whether PostgreSQL may have to evaluate its filters.
    pub fn asks(&self) -> bool {
        self.bindings.iter().any(|binding| binding.filter.as_ref().is_some_and(|filter| filter.asks()))
    }

    /// Whether it must be bound again: a named relation is no longer watched, was watched again, has another name or schema, or no
    /// longer fits its filter. Otherwise it would receive nothing, or changes of a table that it did not name.
    pub fn is_stale(&self, catalog: &Catalog) -> bool {
        self.bindings.iter().any(|binding| match &binding.scope {
            Scope::Relation(id, ..) => match catalog.relation(*id) {
                Some(relation) if binding.scope.includes(relation) => {
                    binding.filter.as_ref().is_some_and(|filter| !filter.fits(relation))
                }
                _ => true,
            },
            Scope::Refused(_) | Scope::Named(_) | Scope::Schema(_) | Scope::All => false,
        })
    }

    /// Whether the catalog changed for a refused entry, so that it may be accepted now.
    pub fn may_be_lifted(&self, catalog: &Catalog) -> bool {
        let role = self.identity.claims().role();
        self.bindings.iter().any(|binding| match &binding.scope {
            Scope::Refused(refused) => refused.request.catalog_view(catalog, role) != refused.catalog_view,
            _ => false,
        })
    }

    /// Whether a named relation is watched under this name only since after the cursor.
    pub fn is_younger_than(&self, cursor: &Cursor) -> bool {
        self.bindings.iter().any(
            |binding| matches!(&binding.scope, Scope::Relation(.., Some(named)) if named.is_after(cursor)),
        )
    }

    /// Whether the change reports that a relation left a schema this subscription follows, so that earlier changes of that relation
    /// cannot be delivered.
    pub fn has_lost(&self, change: &Change, now: &Catalog) -> bool {
        let Some(left) = change.loss().and_then(|loss| loss.former_schema) else { return false };
        let is_followed =
            now.relation(change.relation).is_some_and(|relation| self.concerning(relation).next().is_some());
        !is_followed
            && self.bindings.iter().any(|binding| match &binding.scope {
                Scope::Refused(_) | Scope::Relation(..) | Scope::Named(_) => false,
                Scope::Schema(schema) => *schema == left,
                Scope::All => true,
            })
    }

    /// Returns the grants that its role is missing for the policies of its tables now, but was not missing in `before`.
    pub fn lacks<'a>(
        &'a self,
        before: Option<&'a Catalog>,
        now: &'a Catalog,
    ) -> impl Iterator<Item = String> + 'a {
        let role = self.identity.claims().role();
        let named = self.bindings.iter().filter_map(|binding| match binding.scope {
            Scope::Relation(id, ..) => now.relation(id),
            _ => None,
        });
        named.filter_map(move |relation| {
            let had = before
                .and_then(|before| before.relation(relation.id()))
                .and_then(|had| had.missing_grants(role));
            relation.missing_grants(role).filter(|lack| had.as_ref() != Some(lack))
        })
    }

    /// Whether a relation that it received `before` is no longer watched or has moved to a schema that it does not follow.
    pub fn loses(&self, before: &Catalog, now: &Catalog) -> bool {
        let concerns = |relation: &Relation| self.concerning(relation).next().is_some();
        let is_gone = |had: &Relation| {
            let now = now.relation(had.id()).filter(|has| has.oid == had.oid);
            now.is_none_or(|has| !concerns(has))
        };
        let had = |relation: &Relation| {
            concerns(relation) && relation.access(self.identity.claims().role()).is_some()
        };
        before.relations().any(|relation| had(relation) && is_gone(relation))
    }

    /// Returns the bindings that include a relation.
    pub fn concerning<'a>(&'a self, relation: &'a Relation) -> impl Iterator<Item = &'a Binding> {
        self.bindings.iter().filter(|binding| binding.scope.includes(relation))
    }
}

/// Returns the scope of a request.
fn scope(identity: &Identity, catalog: &Catalog, request: &Request) -> Result<Scope, SubscribeError> {
    Ok(match &request.target {
        Target::All => Scope::All,
        Target::Schema(schema) => Scope::Schema(schema.clone()),
        Target::Named(table) => Scope::Named(table.clone()),
        Target::Table { .. } => {
            let relation = readable(identity, catalog, request)?;
            let name = Arc::new((relation.schema.clone(), relation.table.clone()));
            Scope::Relation(relation.id(), relation.oid, name, relation.named)
        }
    })
}

/// Returns the relation that a request names, if the identity's role may read it and every selected column.
///
/// # Errors
/// One text for a table that is missing, not watched or not readable, so that it does not reveal which tables exist.
pub fn readable<'a>(
    identity: &Identity,
    catalog: &'a Catalog,
    request: &Request,
) -> Result<&'a Arc<Relation>, SubscribeError> {
    let found = match &request.target {
        Target::Table { schema, table } => catalog.named(schema, table),
        Target::Named(_) | Target::Schema(_) | Target::All => None,
    };
    let access = found.and_then(|relation| relation.access(identity.claims().role()));
    let (Some(relation), Some(access)) = (found, access) else {
        return Err(unreadable(request, identity.claims().role()));
    };
    for column in &request.select {
        if relation.column(column).is_none() || !access.sees(column) {
            return Err(unknown_column(request, "select", column, relation, access));
        }
    }
    if let Some(lack) = relation.missing_grants(identity.claims().role()) {
        return Err(SubscribeError::MissingGrant { request: request.described(), lack });
    }
    Ok(relation)
}

/// Returns the error for a table that is missing, not watched or not readable. It depends only on the request and the role.
fn unreadable(request: &Request, role: &str) -> SubscribeError {
    let (mut table, mut usage) = (String::from("schema.table"), String::new());
    if let Target::Table { schema, table: name } = &request.target {
        let schema = identifier(schema);
        table = format!("{schema}.{}", identifier(name));
        if schema != "public" {
            usage = format!("grant usage on schema {schema} to {}; ", identifier(role));
        }
    }
    let advice = format!(
        ". The table must be watched (select relay.watch('{}')) and the token's role must be allowed to select from it ({usage}grant select \
         on {table} to {}). What is missing: relay explain {table} --role {role}",
        table.replace('\'', "''"),
        identifier(role)
    );
    SubscribeError::Unreadable { request: request.described(), advice }
}

/// Returns the error for a column that does not exist or is not readable, with the readable columns whose names are near.
pub fn unknown_column(
    request: &Request,
    what: &'static str,
    column: &str,
    relation: &Relation,
    access: &Access,
) -> SubscribeError {
    let seen = relation.columns.iter().map(|known| known.name.as_str()).filter(|name| access.sees(name));
    let seen: Vec<&str> = seen.collect();
    let near: Vec<&str> = near_names(column, &seen, |name| name).into_iter().copied().collect();
    SubscribeError::unknown_column(request.described(), what, column, &near)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::{Value, json};

    use super::*;
    use crate::model::catalog::relation::tests::{one_column, todos};
    use crate::model::identity::claims::Claims;
    use crate::model::row::change::Operation;
    use crate::model::subscription::typed_filter::tests::bound;

    fn parse(entry: &Value) -> Result<Request, SubscribeError> {
        Request::parse(entry.as_object().unwrap())
    }

    fn identity(role: &str) -> Identity {
        let payload = json!({"role": role, "exp": 1}).to_string();
        Identity::new(Claims::from_verified_payload(&payload).unwrap())
    }

    fn catalog() -> Catalog {
        let roles = ["authenticated", "narrow", "blind"].map(str::to_owned);
        Catalog::new(vec![todos(false, false)], BTreeSet::from(roles), true)
    }

    fn bind(role: &str, entry: &Value) -> Result<Subscription, String> {
        let request = parse(entry).unwrap();
        let subscription = Subscription::bind(identity(role), &catalog(), &[request], vec![Ok(None)]);
        subscription.whole().map_err(|refusal| refusal.to_string())
    }

    #[test]
    fn an_unreadable_table_is_refused_like_a_missing_one() {
        let entry = |table: &str| json!({"event": "*", "schema": "public", "table": table});
        assert!(bind("authenticated", &entry("todos")).is_ok());
        for role in ["blind", "unknown"] {
            let missing = bind(role, &entry("missing")).unwrap_err();
            let refusal = bind(role, &entry("todos")).unwrap_err();
            assert_eq!(refusal.replace("todos", "missing"), missing, "{role}");
        }
        let select = |columns: Value| json!({"table": "todos", "select": columns});
        assert!(bind("narrow", &select(json!(["id", "title"]))).is_ok());
        for (role, columns) in [("narrow", json!(["id", "owner"])), ("authenticated", json!(["nope"]))] {
            let refusal = bind(role, &select(columns.clone())).unwrap_err();
            let column = columns.as_array().unwrap().last().unwrap().as_str().unwrap();
            assert!(refusal.ends_with(&format!("invalid column for select {column}")), "{refusal}");
        }
    }

    #[test]
    fn a_scope_is_the_relation_its_schema_or_all() {
        let relation = todos(false, false);
        for (entry, concerns) in [
            (json!({"table": "todos"}), true),
            (json!({"schema": "public"}), true),
            (json!({"schema": "*"}), true),
            (json!({"schema": "other"}), false),
            (json!({"schema": "*", "table": "todos"}), true),
            (json!({"schema": "*", "table": "others"}), false),
        ] {
            let subscription = bind("authenticated", &entry).unwrap();
            assert_eq!(subscription.concerning(&relation).count(), usize::from(concerns), "{entry}");
        }
    }

    #[test]
    fn subscriptions_are_equal_only_if_their_content_is_equal() {
        let subscription = |filter: Option<&str>, events| {
            let filter = filter.map(|filter| Arc::new(bound(filter, &one_column("int8", Some("int8")))));
            let scope = Scope::Relation(RelationId::whole(7), 0, Arc::default(), None);
            let bindings = Arc::new([Binding { id: 1, events, scope, filter, select: None }]);
            let hidden = Arc::default();
            Subscription {
                identity: identity("authenticated"),
                bindings,
                hidden,
                held_parts: HeldParts::default(),
                topic: None,
            }
        };
        let plain = subscription(None, Events::All);
        assert_eq!(plain, subscription(None, Events::All));
        assert_eq!(subscription(Some("c=eq.1"), Events::All), subscription(Some("c=eq.1"), Events::All));
        assert_ne!(plain, subscription(Some("c=eq.1"), Events::All));
        assert_ne!(subscription(Some("c=eq.2"), Events::All), subscription(Some("c=eq.1"), Events::All));
        assert_ne!(plain, subscription(None, Events::Only(Operation::Insert)));
        let topic = |name: &str, is_private| Some(TopicScope { name: name.into(), is_private });
        let following = |topic| plain.clone().with_topic(topic);
        assert_eq!(following(topic("t", false)), following(topic("t", false)));
        for other in [None, topic("u", false), topic("t", true)] {
            assert_ne!(following(topic("t", false)), following(other));
        }
    }
}
