//! What a channel asks for (`postgres_changes` entries) and what it becomes once bound to verified claims.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::model::catalog::relation::{Catalog, Naming, Relation};
use crate::model::log::cursor::Cursor;
use crate::model::policy::index_key::IndexKeys;
use crate::model::policy::visibility::Identity;
use crate::model::row::change::{Change, Operation, RelationId};
use crate::model::row::column::ColumnKind;
use crate::model::row::pattern::Folding;
use crate::model::subscription::error::{CAUSE, EXCEPTION, FILTER, FORBIDDEN, SubscribeError, UNREADABLE};
use crate::model::subscription::filter;
use crate::model::subscription::typed_filter::TypedFilter;

/// One entry of a join's `config.postgres_changes`, as the client wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The word for the operations, as it was written.
    event: String,
    /// Which operations; an unknown word means all of them, as on the real server.
    pub events: Events,
    /// Which relations.
    pub target: Target,
    /// The filter's text; empty means none.
    pub filter: String,
    /// The columns asked for; empty means all.
    pub select: Vec<String>,
}

/// Which operations a binding wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Events {
    /// `*`
    All,
    /// One by name.
    Only(Operation),
}

/// Which relations a request names.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// One table.
    Table {
        /// Its schema.
        schema: String,
        /// Its name.
        table: String,
    },
    /// The tables of one name in every schema.
    Named(String),
    /// Every watched relation of a schema.
    Schema(String),
    /// Every watched relation.
    All,
}

/// What the catalog says, to one role, of all that an entry names. As long as that stays, a refusal stays as well.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Grounds {
    /// The table, if the role may read it.
    relation: Option<(RelationId, u32)>,
    /// What the role lacks for its policies.
    lack: Option<String>,
    /// The columns that filter and selection name, as far as the role may read them.
    columns: Vec<Option<(String, ColumnKind, Option<Folding>)>>,
}

/// An entry that was refused, and what may lift the refusal.
#[derive(Debug, PartialEq, Eq)]
pub struct Refused {
    /// Why, for the client.
    pub why: SubscribeError,
    request: Request,
    grounds: Grounds,
}

impl Request {
    /// Reads one entry.
    ///
    /// # Errors
    /// With the real server's texts: no schema or table, a `select` that is no list or stands beside a wildcard.
    pub fn parse(entry: &Map<String, Value>) -> Result<Self, SubscribeError> {
        let word = |name: &str| entry.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
        // What is there but no text must not widen the subscription by counting as absent.
        let is_text = |name: &str| entry.get(name).is_none_or(|value| value.is_string() || value.is_null());
        let named = (word("schema"), word("table"));
        let target = match (named.0, named.1.filter(|table| *table != "*")) {
            _ if named == (None, None) || !is_text("schema") || !is_text("table") => {
                return Err(SubscribeError(format!(
                    "No subscription params provided. Please provide at least a `schema` or `table` to subscribe to: {}",
                    Value::Object(entry.clone())
                )));
            }
            (Some("*"), Some(table)) => Target::Named(table.to_owned()),
            (Some("*"), None) => Target::All,
            (schema, Some(table)) => {
                Target::Table { schema: schema.unwrap_or("public").to_owned(), table: table.to_owned() }
            }
            (schema, None) => Target::Schema(schema.unwrap_or("public").to_owned()),
        };
        let select = match entry.get("select") {
            None | Some(Value::Null) => Vec::new(),
            Some(value) => {
                let names = value
                    .as_array()
                    .and_then(|list| list.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
                names.ok_or_else(|| {
                    SubscribeError(String::from(
                        "Error parsing `select` params: expected a list of column name strings, e.g. select: [\"col1\", \"col2\"]",
                    ))
                })?
            }
        };
        let select: Vec<String> = select.into_iter().map(str::to_owned).collect();
        if !select.is_empty() && !matches!(target, Target::Table { .. }) {
            return Err(SubscribeError(String::from(
                "Column selection is not supported for wildcard subscriptions. Provide an explicit schema and table name.",
            )));
        }
        let events = match word("event").unwrap_or("*").to_ascii_uppercase().as_str() {
            "INSERT" => Events::Only(Operation::Insert),
            "UPDATE" => Events::Only(Operation::Update),
            "DELETE" => Events::Only(Operation::Delete),
            _ => Events::All,
        };
        if let Some(other) = entry.get("filter").filter(|_| !is_text("filter")) {
            return Err(SubscribeError(format!("{FILTER}[{other}]")));
        }
        let filter = word("filter").unwrap_or_default().trim().to_owned();
        let event = entry.get("event").and_then(Value::as_str).unwrap_or("*").to_owned();
        Ok(Self { event, events, target, filter, select })
    }

    /// The id under which changes for this entry are reported: equal entries have equal ids, everywhere.
    /// 27 bits and never zero, which clients take for "none".
    pub fn id(&self) -> u32 {
        let mut hasher = DefaultHasher::new();
        (self.events, &self.target, &self.filter, &self.select).hash(&mut hasher);
        (hasher.finish() as u32 & 0x07ff_ffff).max(1)
    }

    /// The entry that it was read from, as the join's reply echoes it.
    pub fn echo(&self, mut entry: Map<String, Value>) -> Value {
        entry.insert(String::from("id"), Value::from(self.id()));
        Value::Object(entry)
    }

    /// The parameters as the real server's error texts list them.
    pub fn described(&self) -> String {
        let event = &self.event;
        let (schema, table) = match &self.target {
            Target::Table { schema, table } => (schema.as_str(), table.as_str()),
            Target::Named(table) => ("*", table.as_str()),
            Target::Schema(schema) => (schema.as_str(), "*"),
            Target::All => ("*", "*"),
        };
        let select = if self.select.is_empty() { String::from("nil") } else { format!("{:?}", self.select) };
        format!(
            "[event: {event}, schema: {schema}, table: {table}, filters: [{}], select: {select}]",
            self.filter
        )
    }

    fn grounds(&self, catalog: &Catalog, role: &str) -> Grounds {
        let found = match &self.target {
            Target::Table { schema, table } => catalog.named(schema, table),
            Target::Named(_) | Target::Schema(_) | Target::All => None,
        };
        let found = found.and_then(|relation| Some((relation, relation.access(role)?)));
        let conditions = filter::parse(&self.filter).unwrap_or_default();
        let named = conditions.iter().map(|condition| &condition.column).chain(&self.select);
        let column = |name: &String| {
            let (relation, access) = found?;
            let column = relation.column(name).filter(|_| access.sees(name))?;
            Some((column.kind.clone(), column.shape(), column.folding))
        };
        let relation = found.map(|(relation, _)| (relation.id(), relation.oid));
        let lack = found.and_then(|(relation, _)| relation.missing_grants(role));
        Grounds { relation, lack, columns: named.map(column).collect() }
    }
}

/// A request bound to a relation and to the rights of the claims it was made with. Equal when they mean the same; ids
/// alone may collide.
#[derive(Debug)]
pub struct Binding {
    /// See [`Request::id`].
    pub id: u32,
    /// Which operations.
    pub events: Events,
    /// Which relations.
    pub scope: Scope,
    /// Which rows.
    pub filter: Option<Arc<TypedFilter>>,
    /// Which columns; none means all.
    pub select: Option<Vec<String>>,
}

impl PartialEq for Binding {
    fn eq(&self, other: &Self) -> bool {
        let filters = (self.filter.as_ref(), other.filter.as_ref());
        (self.id, self.events, &self.scope, &self.select)
            == (other.id, other.events, &other.scope, &other.select)
            && match filters {
                (Some(one), Some(other)) => one.says_the_same(other),
                (one, other) => one.is_none() && other.is_none(),
            }
    }
}

impl Eq for Binding {}

impl Binding {
    /// Whether its entry was refused, so that it gets nothing.
    pub fn is_refused(&self) -> bool {
        matches!(self.scope, Scope::Refused(_))
    }
}

impl Hash for Binding {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.id.hash(state);
    }
}

/// To write a frame takes as long as to compare so many values.
const VALUES_OF_FRAME: usize = 10;

/// The relations of a binding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// None: the entry was refused, for now or for good.
    Refused(Arc<Refused>),
    /// One relation: the number under which it is watched, its own, and schema and table as they were asked for.
    Relation(RelationId, u32, Arc<(String, String)>, Option<Naming>),
    /// Every watched relation of a name, also those to come.
    Named(String),
    /// Every watched relation of a schema, also those to come.
    Schema(String),
    /// Every watched relation, also those to come.
    All,
}

impl Scope {
    /// Whether it holds the relation, by the name that the relation has now.
    fn has(&self, relation: &Relation) -> bool {
        match self {
            Self::Relation(id, oid, name, _) => {
                (*id, *oid, &name.0, &name.1)
                    == (relation.id(), relation.oid, &relation.schema, &relation.table)
            }
            Self::Refused(_) => false,
            Self::Named(table) => *table == relation.table,
            Self::Schema(schema) => *schema == relation.schema,
            Self::All => true,
        }
    }
}

/// What one channel receives. It exists only bound to verified claims, and only [`Subscription::bind`] makes one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Subscription {
    identity: Identity,
    bindings: Arc<[Binding]>,
}

impl Subscription {
    /// Binds requests to an identity by the catalog's rights, each for itself: one that is refused leaves the others.
    ///
    /// `filters` holds, in the order of `requests`, each filter as PostgreSQL read it, or why it is refused. A request is
    /// also refused when a relation is not watched or not readable by the identity's role (one text for both), or a
    /// selected column is not one that the role may read.
    pub fn bind(
        identity: Identity,
        catalog: &Catalog,
        requests: &[Request],
        filters: Vec<Result<Option<Arc<TypedFilter>>, SubscribeError>>,
    ) -> Self {
        let bind = |(request, filter): (&Request, Result<Option<Arc<TypedFilter>>, SubscribeError>)| {
            let bound = filter.and_then(|filter| Ok((scope(&identity, catalog, request)?, filter)));
            let (scope, filter) = bound.unwrap_or_else(|why| {
                let grounds = request.grounds(catalog, identity.claims().role());
                (Scope::Refused(Arc::new(Refused { why, request: request.clone(), grounds })), None)
            });
            // A column that is named again is no news, and would be looked at again for each change.
            let mut named = HashSet::new();
            let select = request.select.iter().filter(|column| named.insert(*column)).cloned();
            let select = (!request.select.is_empty()).then(|| select.collect());
            Binding { id: request.id(), events: request.events, scope, filter, select }
        };
        let bindings = requests.iter().zip(filters).map(bind).collect();
        Self { identity, bindings }
    }

    /// Why entries were refused, in their order.
    pub fn refusals(&self) -> impl Iterator<Item = &SubscribeError> {
        self.bindings.iter().filter_map(|binding| match &binding.scope {
            Scope::Refused(refused) => Some(&refused.why),
            _ => None,
        })
    }

    /// It, if no entry was refused.
    ///
    /// # Errors
    /// With the first refusal.
    pub fn whole(self) -> Result<Self, SubscribeError> {
        let refusal = self.refusals().next().cloned();
        refusal.map_or(Ok(self), Err)
    }

    /// Whose it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What it asks for.
    pub fn bindings(&self) -> &[Binding] {
        &self.bindings
    }

    /// The same, for as long as somebody has them.
    pub fn shared_bindings(&self) -> Arc<[Binding]> {
        Arc::clone(&self.bindings)
    }

    /// How many values of its filters are compared with each change, since no index leads from a row to them; and what
    /// columns its bindings select beyond those of the first, which make another frame of a change.
    pub fn scanned_values(&self) -> usize {
        let (mut anchors, mut values, mut selections) = (IndexKeys::OneOf(Vec::new()), 0, HashSet::new());
        for binding in self.bindings.iter().filter(|binding| !binding.is_refused()) {
            let filter = binding.filter.as_ref();
            anchors = anchors.or(filter.map_or(IndexKeys::Any, |filter| filter.index_keys()));
            values += filter.map_or(0, |filter| filter.value_count());
            selections.insert(&binding.select);
        }
        let frames = selections.len().saturating_sub(1) * VALUES_OF_FRAME;
        if anchors == IndexKeys::Any { values + frames } else { frames }
    }

    /// Whether PostgreSQL may have to be asked which rows match its filters.
    pub fn asks(&self) -> bool {
        self.bindings.iter().any(|binding| binding.filter.as_ref().is_some_and(|filter| filter.asks()))
    }

    /// Whether a relation it names is not watched any more, or watched anew, or has another name or schema, or other types
    /// than its filter was read with: then it would wait for ever, or be told of a table that it did not name.
    pub fn is_stale(&self, catalog: &Catalog) -> bool {
        self.bindings.iter().any(|binding| match &binding.scope {
            Scope::Relation(id, ..) => match catalog.relation(*id) {
                Some(relation) if binding.scope.has(relation) => {
                    binding.filter.as_ref().is_some_and(|filter| !filter.fits(relation))
                }
                _ => true,
            },
            Scope::Refused(_) | Scope::Named(_) | Scope::Schema(_) | Scope::All => false,
        })
    }

    /// Whether the catalog says something else than before of what a refused entry names, so that it may be bound now.
    pub fn may_be_lifted(&self, catalog: &Catalog) -> bool {
        let role = self.identity.claims().role();
        self.bindings.iter().any(|binding| match &binding.scope {
            Scope::Refused(refused) => refused.request.grounds(catalog, role) != refused.grounds,
            _ => false,
        })
    }

    /// Whether a relation that it names is watched under this name only since a later moment than this.
    pub fn is_younger_than(&self, cursor: &Cursor) -> bool {
        self.bindings.iter().any(
            |binding| matches!(&binding.scope, Scope::Relation(.., Some(named)) if named.is_after(cursor)),
        )
    }

    /// Whether the change says that a relation left the schema that it follows, so that earlier changes of that cannot be told.
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

    /// What its role lacks for the policies of tables that it names, and did not lack `before`.
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

    /// Whether a relation that it had `before` is not watched any more, or is in a schema that it does not follow.
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

    /// The bindings that concern a relation.
    pub fn concerning<'a>(&'a self, relation: &'a Relation) -> impl Iterator<Item = &'a Binding> {
        self.bindings.iter().filter(|binding| binding.scope.has(relation))
    }
}

/// The relations of a request.
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

/// The relation a request names, if the identity's role may read it and every column the request mentions.
///
/// # Errors
/// The same text whether the table is missing, not watched or not readable.
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
        return Err(SubscribeError(format!(
            "{UNREADABLE} for the given connect parameters: {}. The table must be watched (select relay.watch('schema.table')) and the token's \
             role must be allowed to select from it",
            request.described()
        )));
    };
    for column in &request.select {
        if relation.column(column).is_none() || !access.sees(column) {
            return Err(exception(
                request,
                &format!("ERROR P0001 (raise_exception) invalid column for select {column}"),
            ));
        }
    }
    if let Some(lack) = relation.missing_grants(identity.claims().role()) {
        return Err(exception(request, &format!("{FORBIDDEN}{lack}")));
    }
    Ok(relation)
}

/// The real server's text for a subscription that PostgreSQL refused.
pub fn exception(request: &Request, error: &str) -> SubscribeError {
    SubscribeError(format!(
        "{EXCEPTION} so please check your connect parameters: {}. {CAUSE}{error}",
        request.described()
    ))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::json;

    use super::*;
    use crate::model::catalog::relation::tests::{one_column, todos};
    use crate::model::identity::claims::Claims;
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

    fn table(schema: &str, table: &str) -> Target {
        Target::Table { schema: schema.to_owned(), table: table.to_owned() }
    }

    #[test]
    fn an_entry_names_a_table_a_schema_or_everything() {
        let schema = |name: &str| Target::Schema(name.to_owned());
        for (entry, target) in [
            (json!({"schema": "s", "table": "t"}), table("s", "t")),
            (json!({"table": "t"}), table("public", "t")),
            (json!({"schema": null, "table": "T.\"x"}), table("public", "T.\"x")),
            (json!({"schema": "s"}), schema("s")),
            (json!({"schema": "s", "table": "*"}), schema("s")),
            (json!({"schema": "s", "table": ""}), schema("s")),
            (json!({"table": "*"}), schema("public")),
            (json!({"schema": "*"}), Target::All),
            (json!({"schema": "*", "table": "*"}), Target::All),
            (json!({"schema": "*", "table": ""}), Target::All),
            (json!({"schema": "*", "table": "t"}), Target::Named("t".to_owned())),
        ] {
            assert_eq!(parse(&entry).unwrap().target, target, "{entry}");
        }
    }

    #[test]
    fn what_is_no_text_does_not_count_as_absent() {
        for entry in [
            json!({}),
            json!({"event": "*", "filter": "id=eq.1"}),
            json!({"schema": "public", "table": 5}),
            json!({"schema": ["public"], "table": "t"}),
            json!({"schema": {}, "table": {}}),
        ] {
            let refusal = parse(&entry).unwrap_err().0;
            assert!(refusal.starts_with("No subscription params provided."), "{refusal}");
        }
        for filter in [json!(5), json!(true), json!(["id=eq.1"]), json!({"id": 1})] {
            let refusal = parse(&json!({"table": "t", "filter": filter})).unwrap_err().0;
            assert_eq!(refusal, format!("Error parsing `filter` params: [{filter}]"));
        }
        for select in [json!("id"), json!([1]), json!({"id": true}), json!(["id", null])] {
            let refusal = parse(&json!({"table": "t", "select": select})).unwrap_err().0;
            assert!(refusal.starts_with("Error parsing `select` params:"), "{refusal}");
        }
        let refusal = parse(&json!({"schema": "public", "select": ["id"]})).unwrap_err().0;
        assert!(refusal.starts_with("Column selection is not supported for wildcard subscriptions."));
    }

    #[test]
    fn an_event_is_one_of_three_or_all() {
        for (event, events) in [
            (json!("INSERT"), Events::Only(Operation::Insert)),
            (json!("update"), Events::Only(Operation::Update)),
            (json!("Delete"), Events::Only(Operation::Delete)),
            (json!("*"), Events::All),
            (json!("TRUNCATE"), Events::All),
            (json!(""), Events::All),
            (json!(null), Events::All),
        ] {
            assert_eq!(parse(&json!({"table": "t", "event": event})).unwrap().events, events, "{event}");
        }
    }

    #[test]
    fn an_id_is_positive_and_that_of_every_equal_entry() {
        let id = |entry: Value| parse(&entry).unwrap().id();
        let plain = id(json!({"event": "*", "schema": "public", "table": "t"}));
        assert_eq!(plain, id(json!({"table": "t", "filter": " ", "select": [], "extra": 1})));
        let others = [
            json!({"table": "u"}),
            json!({"table": "t", "event": "INSERT"}),
            json!({"table": "t", "filter": "id=eq.1"}),
            json!({"table": "t", "select": ["id"]}),
            json!({"schema": "public"}),
        ];
        let ids: BTreeSet<u32> = others.into_iter().map(id).chain([plain]).collect();
        assert_eq!(ids.len(), 6);
        assert!(ids.iter().all(|id| (1..1 << 27).contains(id)));
    }

    #[test]
    fn an_echo_is_the_entry_with_its_id() {
        let entry = json!({"event": "insert", "schema": "public", "table": "t", "filter": null, "more": [1]});
        let request = parse(&entry).unwrap();
        let mut expected = entry.clone();
        expected["id"] = json!(request.id());
        assert_eq!(request.echo(entry.as_object().unwrap().clone()), expected);
    }

    fn bind(role: &str, entry: &Value) -> Result<Subscription, String> {
        let request = parse(entry).unwrap();
        let subscription = Subscription::bind(identity(role), &catalog(), &[request], vec![Ok(None)]);
        subscription.whole().map_err(|refusal| refusal.0)
    }

    #[test]
    fn what_may_not_be_read_is_refused_like_what_is_not_there() {
        let entry = |table: &str| json!({"event": "*", "schema": "public", "table": table});
        assert!(bind("authenticated", &entry("todos")).is_ok());
        let missing = bind("authenticated", &entry("missing")).unwrap_err();
        for role in ["blind", "unknown"] {
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
    fn subscriptions_are_the_same_only_if_they_mean_the_same_whatever_their_ids() {
        let subscription = |filter: Option<&str>, events| {
            let filter = filter.map(|filter| Arc::new(bound(filter, &one_column("int8", Some("int8")))));
            let scope = Scope::Relation(RelationId(7), 0, Arc::default(), None);
            let bindings = Arc::new([Binding { id: 1, events, scope, filter, select: None }]);
            Subscription { identity: identity("authenticated"), bindings }
        };
        let plain = subscription(None, Events::All);
        assert_eq!(plain, subscription(None, Events::All));
        assert_eq!(subscription(Some("c=eq.1"), Events::All), subscription(Some("c=eq.1"), Events::All));
        assert_ne!(plain, subscription(Some("c=eq.1"), Events::All));
        assert_ne!(subscription(Some("c=eq.2"), Events::All), subscription(Some("c=eq.1"), Events::All));
        assert_ne!(plain, subscription(None, Events::Only(Operation::Insert)));
    }
}
