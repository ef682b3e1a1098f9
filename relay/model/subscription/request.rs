//! Requests of a channel: the entries of `postgres_changes`, as the client wrote them.

use std::hash::{DefaultHasher, Hash, Hasher};

use serde_json::{Map, Value};

use crate::model::catalog::relation::Catalog;
use crate::model::row::change::{Operation, RelationId};
use crate::model::row::column::ColumnKind;
use crate::model::row::pattern::Folding;
use crate::model::subscription::error::{SubscribeError, identifier};
use crate::model::subscription::filter::{self, Filter};

/// One entry of a join's `config.postgres_changes`, as the client wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The event as the client wrote it.
    event: String,
    /// The requested operations. An unknown name means all, as on the Supabase server.
    pub events: Events,
    /// The relations.
    pub target: Target,
    /// The filter; empty means none.
    pub filter: String,
    /// The selected columns; empty means all.
    pub select: Vec<String>,
}

/// The operations that a binding receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Events {
    /// `*`
    All,
    /// One operation.
    Only(Operation),
}

/// The relations that a request names.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// One table.
    Table {
        /// Its schema.
        schema: String,
        /// Its name.
        table: String,
    },
    /// Every watched relation with this name, in any schema.
    Named(String),
    /// Every watched relation of a schema.
    Schema(String),
    /// Every watched relation.
    All,
}

impl Target {
    /// Returns its name as in SQL; `*` stands for all.
    pub fn name(&self) -> String {
        match self {
            Self::Table { schema, table } => format!("{}.{}", identifier(schema), identifier(table)),
            Self::Named(table) => identifier(table),
            Self::Schema(schema) => format!("{}.*", identifier(schema)),
            Self::All => String::from("*"),
        }
    }
}

/// The parts of the catalog, as one role sees them, that the outcome of a request depends on. While they are unchanged, a
/// refusal stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct CatalogView {
    /// Id and `oid` of the table, if the role may read it.
    relation: Option<(RelationId, u32)>,
    /// The partition of this name whose rights the catalog does not hold.
    unloaded_part: Option<u32>,
    /// The grant that the role is missing for its policies.
    missing_grant: Option<String>,
    /// The columns of filter and selection; `None` if the role may not read one.
    columns: Vec<Option<(String, ColumnKind, Option<Folding>)>>,
}

impl Request {
    /// Parses one entry.
    ///
    /// # Errors
    /// The Supabase server's texts: no schema or table, a `select` that is no list, or one with a wildcard.
    pub fn parse(entry: &Map<String, Value>) -> Result<Self, SubscribeError> {
        let text = |name: &str| entry.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
        // A value that is no text is refused. Treating it as absent would widen the subscription.
        let is_text_or_null =
            |name: &str| entry.get(name).is_none_or(|value| value.is_string() || value.is_null());
        let named = (text("schema"), text("table"));
        let target = match (named.0, named.1.filter(|table| *table != "*")) {
            _ if named == (None, None) || !is_text_or_null("schema") || !is_text_or_null("table") => {
                return Err(SubscribeError::Other(format!(
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
                    SubscribeError::Other(String::from(
                        "Error parsing `select` params: expected a list of column name strings, e.g. select: [\"col1\", \"col2\"]",
                    ))
                })?
            }
        };
        let select: Vec<String> = select.into_iter().map(str::to_owned).collect();
        if !select.is_empty() && !matches!(target, Target::Table { .. }) {
            return Err(SubscribeError::Other(String::from(
                "Column selection is not supported for wildcard subscriptions. Provide an explicit schema and table name.",
            )));
        }
        let events = match text("event").unwrap_or("*").to_ascii_uppercase().as_str() {
            "INSERT" => Events::Only(Operation::Insert),
            "UPDATE" => Events::Only(Operation::Update),
            "DELETE" => Events::Only(Operation::Delete),
            _ => Events::All,
        };
        if let Some(other) = entry.get("filter").filter(|_| !is_text_or_null("filter")) {
            return Err(SubscribeError::Filter(format!("[{other}]")));
        }
        let filter = text("filter").unwrap_or_default().trim().to_owned();
        let event = entry.get("event").and_then(Value::as_str).unwrap_or("*").to_owned();
        Ok(Self { event, events, target, filter, select })
    }

    /// Returns the id that changes for this entry are reported with. Equal entries have equal ids in every relay. It has 27 bits
    /// and is never zero, which clients treat as "none".
    pub fn id(&self) -> u32 {
        let mut hasher = DefaultHasher::new();
        (self.events, &self.target, &self.filter, &self.select).hash(&mut hasher);
        (hasher.finish() as u32 & 0x07ff_ffff).max(1)
    }

    /// Returns the original entry with its id, as echoed in the reply to the join.
    pub fn echo(&self, mut entry: Map<String, Value>) -> Value {
        entry.insert(String::from("id"), Value::from(self.id()));
        Value::Object(entry)
    }

    /// Describes the parameters as in the Supabase server's error texts.
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

    /// Returns the partition of a watched relation that the request names.
    pub fn part(&self, catalog: &Catalog) -> Option<u32> {
        match &self.target {
            Target::Table { schema, table } => catalog.part_named(schema, table),
            Target::Named(_) | Target::Schema(_) | Target::All => None,
        }
    }

    /// Returns the parts of the catalog that decide about this request.
    pub(super) fn catalog_view(&self, catalog: &Catalog, role: &str) -> CatalogView {
        let found = match &self.target {
            Target::Table { schema, table } => catalog.named(schema, table),
            Target::Named(_) | Target::Schema(_) | Target::All => None,
        };
        let found = found.and_then(|relation| Some((relation, relation.access(role)?)));
        let filter = filter::parse(&self.filter).ok();
        let conditions = filter.iter().flat_map(Filter::conditions);
        let named = conditions.map(|condition| &condition.column).chain(&self.select);
        let column = |name: &String| {
            let (relation, access) = found?;
            let column = relation.column(name).filter(|_| access.sees(name))?;
            Some((column.kind.clone(), column.shape(), column.folding))
        };
        let relation = found.map(|(relation, _)| (relation.id(), relation.oid));
        let missing_grant = found.and_then(|(relation, _)| relation.missing_grants(role));
        let unloaded_part = match &self.target {
            Target::Table { schema, table } => catalog.unloaded_part(schema, table),
            Target::Named(_) | Target::Schema(_) | Target::All => None,
        };
        CatalogView { relation, unloaded_part, missing_grant, columns: named.map(column).collect() }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::json;

    use super::*;

    fn parse(entry: &Value) -> Result<Request, SubscribeError> {
        Request::parse(entry.as_object().unwrap())
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
    fn a_value_that_is_no_text_does_not_count_as_absent() {
        for entry in [
            json!({}),
            json!({"event": "*", "filter": "id=eq.1"}),
            json!({"schema": "public", "table": 5}),
            json!({"schema": ["public"], "table": "t"}),
            json!({"schema": {}, "table": {}}),
        ] {
            let refusal = parse(&entry).unwrap_err().to_string();
            assert!(refusal.starts_with("No subscription params provided."), "{refusal}");
        }
        for filter in [json!(5), json!(true), json!(["id=eq.1"]), json!({"id": 1})] {
            let refusal = parse(&json!({"table": "t", "filter": filter})).unwrap_err().to_string();
            assert_eq!(refusal, format!("Error parsing `filter` params: [{filter}]"));
        }
        for select in [json!("id"), json!([1]), json!({"id": true}), json!(["id", null])] {
            let refusal = parse(&json!({"table": "t", "select": select})).unwrap_err().to_string();
            assert!(refusal.starts_with("Error parsing `select` params:"), "{refusal}");
        }
        let refusal = parse(&json!({"schema": "public", "select": ["id"]})).unwrap_err().to_string();
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
    fn an_id_is_positive_and_equal_for_equal_entries() {
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
}
