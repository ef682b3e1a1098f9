//! What a channel asks for (`postgres_changes` entries) and what it becomes once bound to verified claims.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::model::change::{Operation, RelationId, Row};
use crate::model::filter::{Condition, Operator};
use crate::model::policy::Identity;
use crate::model::relation::{Catalog, Relation};

/// One entry of a join's `config.postgres_changes`, as the client wrote it.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The entry itself, to be echoed.
    entry: Map<String, Value>,
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
    /// Every watched relation of a schema.
    Schema(String),
    /// Every watched relation.
    All,
}

/// A request that cannot be served; the text is fit for the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(pub String);

impl Request {
    /// Reads one entry.
    ///
    /// # Errors
    /// With the real server's texts: no schema or table, a `select` that is no list or stands beside a wildcard.
    pub fn parse(entry: &Map<String, Value>) -> Result<Self, Refusal> {
        let word = |name: &str| entry.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
        // What is there but no text must not widen the subscription by counting as absent.
        let is_text = |name: &str| entry.get(name).is_none_or(|value| value.is_string() || value.is_null());
        let named = (word("schema"), word("table"));
        let target = match (named.0, named.1.filter(|table| *table != "*")) {
            _ if named == (None, None) || !is_text("schema") || !is_text("table") => {
                return Err(Refusal(format!(
                    "No subscription params provided. Please provide at least a `schema` or `table` to subscribe to: {}",
                    Value::Object(entry.clone())
                )));
            }
            (Some("*"), _) => Target::All,
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
                    Refusal(String::from(
                        "Error parsing `select` params: expected a list of column name strings, e.g. select: [\"col1\", \"col2\"]",
                    ))
                })?
            }
        };
        let select: Vec<String> = select.into_iter().map(str::to_owned).collect();
        if !select.is_empty() && !matches!(target, Target::Table { .. }) {
            return Err(Refusal(String::from(
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
            return Err(Refusal(format!("Error parsing `filter` params: [{other}]")));
        }
        let filter = word("filter").unwrap_or_default().trim().to_owned();
        Ok(Self { entry: entry.clone(), events, target, filter, select })
    }

    /// The id under which changes for this entry are reported: equal entries have equal ids, everywhere.
    /// 27 bits and never zero, which clients take for "none".
    pub fn id(&self) -> u32 {
        let mut hasher = DefaultHasher::new();
        (self.events, &self.target, &self.filter, &self.select).hash(&mut hasher);
        (hasher.finish() as u32 & 0x07ff_ffff).max(1)
    }

    /// The entry as the join's reply echoes it.
    pub fn echo(&self) -> Value {
        let mut entry = self.entry.clone();
        entry.insert(String::from("id"), Value::from(self.id()));
        Value::Object(entry)
    }

    /// The parameters as the real server's error texts list them.
    pub fn described(&self) -> String {
        let event = self.entry.get("event").and_then(Value::as_str).unwrap_or("*");
        let (schema, table) = match &self.target {
            Target::Table { schema, table } => (schema.as_str(), table.as_str()),
            Target::Schema(schema) => (schema.as_str(), "*"),
            Target::All => ("*", "*"),
        };
        let select = if self.select.is_empty() { String::from("nil") } else { format!("{:?}", self.select) };
        format!(
            "[event: {event}, schema: {schema}, table: {table}, filters: [{}], select: {select}]",
            self.filter
        )
    }
}

/// A filter whose values PostgreSQL has read with the column's type.
#[derive(Debug)]
pub struct BoundFilter {
    conditions: Vec<Typed>,
    /// The statement by which PostgreSQL judges row images against this filter.
    pub statement: Arc<str>,
}

/// One condition of a filter with its values in PostgreSQL's own spelling.
#[derive(Debug)]
pub struct Typed {
    /// The condition.
    pub condition: Condition,
    /// The column's type (`pg_type.typname`).
    pub kind: String,
    /// Equal values have equal texts (no collation says otherwise).
    pub comparable: bool,
    /// Its values as `value::type::text` spells them.
    pub values: Vec<String>,
}

impl BoundFilter {
    /// Brings conditions and statement together.
    pub fn new(conditions: Vec<Typed>, statement: Arc<str>) -> Self {
        Self { conditions, statement }
    }

    /// Whether the columns still have the types with which the filter was read.
    pub fn fits(&self, relation: &Relation) -> bool {
        let same = |typed: &Typed| {
            relation.column(&typed.condition.column).is_some_and(|now| now.kind == typed.kind)
        };
        self.conditions.iter().all(same)
    }

    /// The columns that the filter reads.
    pub fn columns(&self) -> impl Iterator<Item = &str> {
        self.conditions.iter().map(|typed| typed.condition.column.as_str())
    }

    /// Whether the row matches; none when only PostgreSQL can tell.
    pub fn decide(&self, row: &Row<'_>) -> Option<bool> {
        let mut verdict = true;
        for typed in &self.conditions {
            verdict &= typed.decide(row)?;
        }
        Some(verdict)
    }
}

impl Typed {
    /// Types whose JSON has one spelling per value, so that equality is equality of the text.
    fn decide(&self, row: &Row<'_>) -> Option<bool> {
        // For the others null is no reason to say no.
        let strict = matches!(
            self.condition.operator,
            Operator::Eq
                | Operator::Neq
                | Operator::In
                | Operator::Lt
                | Operator::Lte
                | Operator::Gt
                | Operator::Gte
        );
        if !self.comparable || !strict || self.values.is_empty() {
            return None;
        }
        let value = row.value(&self.condition.column)?;
        let held = match self.kind.as_str() {
            "int2" | "int4" | "int8" | "bool" => value.to_owned(),
            "uuid" | "text" => match serde_json::from_str::<Option<String>>(value).ok()? {
                Some(text) => text,
                None => return Some(false),
            },
            _ => return None,
        };
        if value == "null" {
            return Some(false);
        }
        let compare = |wanted: &String| -> Option<std::cmp::Ordering> {
            match self.kind.as_str() {
                "int2" | "int4" | "int8" => Some(held.parse::<i64>().ok()?.cmp(&wanted.parse::<i64>().ok()?)),
                _ => None,
            }
        };
        let first = self.values.first()?;
        let truth = match self.condition.operator {
            Operator::Eq => held == *first,
            Operator::Neq => held != *first,
            Operator::In => self.values.contains(&held),
            Operator::Lt => compare(first)?.is_lt(),
            Operator::Lte => compare(first)?.is_le(),
            Operator::Gt => compare(first)?.is_gt(),
            Operator::Gte => compare(first)?.is_ge(),
            _ => return None,
        };
        Some(truth != self.condition.negated)
    }
}

/// A request bound to a relation and to the rights of the claims it was made with.
#[derive(Debug)]
pub struct Binding {
    /// See [`Request::id`].
    pub id: u32,
    /// Which operations.
    pub events: Events,
    /// Which relations.
    pub scope: Scope,
    /// Which rows.
    pub filter: Option<Arc<BoundFilter>>,
    /// Which columns; none means all.
    pub select: Option<Vec<String>>,
}

/// The relations of a binding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// One relation.
    Relation(RelationId),
    /// Every watched relation of a schema, also those to come.
    Schema(String),
    /// Every watched relation, also those to come.
    All,
}

/// What one channel receives. It exists only bound to verified claims, and only [`Subscription::bind`] makes one.
#[derive(Debug)]
pub struct Subscription {
    identity: Identity,
    bindings: Vec<Binding>,
}

impl Subscription {
    /// Binds requests to an identity by the catalog's rights.
    ///
    /// `filters` holds, in the order of `requests`, each filter as PostgreSQL read it.
    ///
    /// # Errors
    /// When a relation is not watched or not readable by the identity's role (one text for both), or a filter or
    /// selected column is not one that the role may read.
    pub fn bind(
        identity: Identity,
        catalog: &Catalog,
        requests: &[Request],
        filters: Vec<Option<Arc<BoundFilter>>>,
    ) -> Result<Self, Refusal> {
        let mut bindings = Vec::with_capacity(requests.len());
        for (request, filter) in requests.iter().zip(filters) {
            let scope = match &request.target {
                Target::All => Scope::All,
                Target::Schema(schema) => Scope::Schema(schema.clone()),
                Target::Table { .. } => Scope::Relation(readable(&identity, catalog, request)?.id()),
            };
            let select = (!request.select.is_empty()).then(|| request.select.clone());
            bindings.push(Binding { id: request.id(), events: request.events, scope, filter, select });
        }
        Ok(Self { identity, bindings })
    }

    /// Whose it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What it asks for.
    pub fn bindings(&self) -> &[Binding] {
        &self.bindings
    }

    /// The bindings that concern a relation.
    pub fn concerning<'a>(&'a self, relation: &'a Relation) -> impl Iterator<Item = &'a Binding> {
        self.bindings.iter().filter(|binding| match &binding.scope {
            Scope::Relation(id) => *id == relation.id(),
            Scope::Schema(schema) => *schema == relation.schema,
            Scope::All => true,
        })
    }
}

/// The relation a request names, if the identity's role may read it and every column the request mentions.
///
/// # Errors
/// The same text whether the table is missing, not watched or not readable.
pub fn readable<'a>(
    identity: &Identity,
    catalog: &'a Catalog,
    request: &Request,
) -> Result<&'a Arc<Relation>, Refusal> {
    let found = match &request.target {
        Target::Table { schema, table } => catalog.named(schema, table),
        Target::Schema(_) | Target::All => None,
    };
    let access = found.and_then(|relation| relation.access(identity.claims().role()));
    let (Some(relation), Some(access)) = (found, access) else {
        return Err(Refusal(format!(
            "Unable to subscribe to changes with given parameters. Please check Realtime is enabled for the given \
             connect parameters: {}. The table must be watched (select relay.watch('schema.table')) and the token's \
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
    Ok(relation)
}

/// The real server's text for a subscription that PostgreSQL refused.
pub fn exception(request: &Request, error: &str) -> Refusal {
    Refusal(format!(
        "Unable to subscribe to changes with given parameters. An exception happened so please check your connect \
         parameters: {}. Exception: {error}",
        request.described()
    ))
}
