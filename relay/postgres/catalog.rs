//! The catalog of watched relations and rights, reloaded when its fingerprint says that something changed.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use deadpool_postgres::{Client, Pool};
use serde::Deserialize;
use tokio::sync::{Mutex, watch};

use crate::model::catalog::held_parts::{HeldParts, NamedParts};
use crate::model::catalog::marks::{Marks, Outdated};
use crate::model::catalog::relation::{Catalog, PartNames, Relation, Widening};
use crate::model::catalog::topic_rules::TopicRules;
use crate::model::identity::claims::Claims;
use crate::model::row::change::RelationId;
use crate::model::subscription::filter::{Condition, Filter};
use crate::model::subscription::typed_filter::{TypedCondition, TypedFilter};
use crate::postgres::connect::pool::{Error, Lease};
use crate::postgres::function_bodies::bodies;

/// Maximum age of the catalog between pages. Only what neither the changelog nor the mark of a page reports depends on it:
/// the changelog reports policies, grants and columns, the mark reports roles and memberships. Without an event trigger the
/// catalog is checked before each page.
const MAX_AGE: Duration = Duration::from_millis(250);

/// Maximum number of reads when the catalog changes while it is read.
const MAX_READS: u32 = 20;

/// A cache of the catalog, shared by all readers.
pub struct CatalogCache {
    pool: Pool,
    /// Connections for filters, kept apart because they run expressions of clients.
    filters: Pool,
    judge: Option<String>,
    // Held across the query on purpose: callers that arrive meanwhile share its result.
    state: Mutex<CacheState>,
    scope: watch::Sender<Arc<RuleScope>>,
    topics: watch::Sender<TopicState>,
}

/// The rules of private channels as far as they are known.
#[derive(Debug, Default)]
pub struct TopicState {
    rules: Option<Arc<TopicRules>>,
    /// The watched relations that they look into.
    looked_into: BTreeSet<i32>,
    /// Changes with the rules and with these relations.
    pub version: u64,
}

/// The inputs of the mark of a page, by object id: see `relay.rules_mark()`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct RuleScope {
    /// The roles of subscribers and of the judging login, and all roles that these are members of.
    pub roles: Vec<u32>,
    /// Watched relations and schemas that one of these roles owns.
    pub owned: Vec<u32>,
}

struct CacheState {
    catalog: Arc<Catalog>,
    roles: BTreeSet<String>,
    /// The partitions whose rights the catalog holds, because subscribers name them.
    parts: NamedParts,
    /// When the database was last told of them.
    parts_told: Option<Instant>,
    /// The marks of the database objects that the catalog was read from.
    marks: Marks,
    /// The number of the last widening in the catalog.
    widened: Option<i64>,
    /// The mark of rules that fire no event trigger, as of the last check.
    mark: Option<i64>,
    checked: Option<Instant>,
    /// The time of the last attempt to read pending policies.
    pending_tried: Option<Instant>,
}

/// Interval between attempts to read policies that a lock made unreadable.
const PENDING_RETRY: Duration = Duration::from_millis(250);

/// Interval at which the database is told again of the partitions that are named; it forgets others after an hour.
const PARTS_INTERVAL: Duration = Duration::from_secs(600);

/// The fingerprint that tells whether the catalog is out of date.
struct Fingerprint {
    marks: Marks,
    scope: RuleScope,
    /// See [`CacheState::mark`].
    mark: Option<i64>,
    /// See [`CacheState::widened`].
    widened: Option<i64>,
}

#[derive(Deserialize)]
struct CatalogRows {
    ordered: bool,
    relations: Vec<Relation>,
}

impl CacheState {
    /// The roles whose rights the catalog holds.
    fn role_names(&self) -> Vec<&String> {
        self.roles.iter().collect()
    }
}

impl CatalogCache {
    /// Creates an empty cache. `filters` are connections with a short time limit for expressions of clients; `judge` is the
    /// judging login, if it is not the pool's own.
    pub fn new(pool: Pool, filters: Pool, judge: Option<String>) -> Self {
        let state = CacheState {
            catalog: Arc::default(),
            roles: BTreeSet::new(),
            parts: NamedParts::default(),
            parts_told: None,
            marks: Marks::default(),
            widened: None,
            mark: None,
            checked: None,
            pending_tried: None,
        };
        let (scope, topics) = (watch::Sender::default(), watch::Sender::default());
        Self { pool, filters, judge, state: Mutex::new(state), scope, topics }
    }

    /// The inputs for the mark of the next page.
    pub fn scope(&self) -> watch::Receiver<Arc<RuleScope>> {
        self.scope.subscribe()
    }

    /// The rules of private channels, as far as they are known.
    pub fn topics(&self) -> watch::Receiver<TopicState> {
        self.topics.subscribe()
    }

    /// Notes that these relations have changed: private channels whose rules look into one of them are judged again.
    pub fn note_changes(&self, relations: impl Iterator<Item = RelationId>) {
        let mut relations = relations;
        self.topics.send_if_modified(|state| {
            let concerns = !state.looked_into.is_empty()
                && relations.any(|relation| state.looked_into.contains(&relation.watched));
            state.version += u64::from(concerns);
            concerns
        });
    }

    /// Returns the catalog that is valid for a page with this mark, up to a schema change in the changelog.
    ///
    /// # Errors
    /// As the connection.
    pub async fn fresh(&self, mark: Option<i64>) -> Result<Arc<Catalog>, Error> {
        let mut state = self.state.lock().await;
        if state.mark != mark || state.checked.is_none() || !state.catalog.is_ordered() {
            self.refresh(&mut state).await?;
        }
        Ok(Arc::clone(&state.catalog))
    }

    /// Checks the catalog if the last check is older than `MAX_AGE`. Called between two pages, so that no change waits
    /// for it.
    ///
    /// # Errors
    /// As the connection.
    pub async fn refresh_if_stale(&self) -> Result<(), Error> {
        let mut state = self.state.lock().await;
        if state.checked.is_none_or(|checked| checked.elapsed() > MAX_AGE) {
            self.refresh(&mut state).await?;
        }
        Ok(())
    }

    /// Returns the catalog with the rights of this role, checked after the call: a join must find a relation that was
    /// watched just before.
    ///
    /// # Errors
    /// As the connection.
    pub async fn with_role(&self, role: &str) -> Result<Arc<Catalog>, Error> {
        let called = Instant::now();
        let mut state = self.state.lock().await;
        state.roles.insert(role.to_owned());
        // A check that began after this call, by another caller, serves this one as well.
        if !state.catalog.knows_role(role) || state.checked.is_none_or(|checked| checked < called) {
            self.refresh(&mut state).await?;
        }
        Ok(Arc::clone(&state.catalog))
    }

    /// Whether the database's encoding has all characters of these claims. A missing one would fail every statement that
    /// carries the claims, also statements shared with other subscribers.
    ///
    /// # Errors
    /// As the connection.
    pub async fn has_characters_of(&self, claims: &Claims) -> Result<bool, Error> {
        self.has_characters(&claims.plain()).await
    }

    /// Whether the database's encoding has all characters of this text.
    ///
    /// # Errors
    /// As the connection.
    pub async fn has_characters(&self, plain: &str) -> Result<bool, Error> {
        if plain.is_ascii() {
            return Ok(true);
        }
        let lease = Lease::of(&self.pool).await?;
        let query = async {
            let client = lease.client()?;
            let echo = client.prepare_cached("select $1::text").await?;
            Ok(client.query_one(&echo, &[&plain]).await.map(|_| ())?)
        };
        let result = query.await;
        lease.done();
        match result {
            Ok(()) => Ok(true),
            Err(error) => match Error::code(&error) {
                // untranslatable_character, character_not_in_repertoire
                Some("22P05" | "22021") => Ok(false),
                _ => Err(error),
            },
        }
    }

    /// Returns the catalog, checked after the call: for a caller that found an entry missing.
    ///
    /// # Errors
    /// As the connection.
    pub async fn reload(&self) -> Result<Arc<Catalog>, Error> {
        let called = Instant::now();
        let mut state = self.state.lock().await;
        if state.checked.is_none_or(|checked| checked < called) {
            self.refresh(&mut state).await?;
        }
        Ok(Arc::clone(&state.catalog))
    }

    /// Returns the catalog with the rights of this role, also on the table of this schema and name when that is a partition.
    ///
    /// # Errors
    /// As the connection.
    pub async fn with_table(
        &self,
        role: &str,
        named: Option<&(String, String)>,
    ) -> Result<Arc<Catalog>, Error> {
        let catalog = self.with_role(role).await?;
        match named.and_then(|(schema, table)| catalog.unloaded_part(schema, table)) {
            Some(part) => self.with_parts(&[part]).await.map(|(catalog, _)| catalog),
            None => Ok(catalog),
        }
    }

    /// Returns the catalog with the rights on these partitions as well, and what keeps them in it.
    ///
    /// # Errors
    /// As the connection.
    pub async fn with_parts(&self, parts: &[u32]) -> Result<(Arc<Catalog>, HeldParts), Error> {
        let mut state = self.state.lock().await;
        let held = state.parts.hold(parts);
        if !parts.iter().all(|oid| state.catalog.has_loaded_part(*oid)) {
            self.refresh(&mut state).await?;
        }
        Ok((Arc::clone(&state.catalog), held))
    }

    /// Returns the catalog after a new attempt to read pending policies, at once because a change waits for them.
    ///
    /// # Errors
    /// As the connection.
    pub async fn retry_pending(&self) -> Result<Arc<Catalog>, Error> {
        let mut state = self.state.lock().await;
        state.pending_tried = None;
        self.refresh(&mut state).await?;
        Ok(Arc::clone(&state.catalog))
    }

    /// Records widened rules where no event trigger does, for subscribers that resume later.
    async fn note_rules(&self, client: &Client) {
        if let Err(error) = client.execute("select relay.note_rules()", &[]).await {
            tracing::warn!(error = %Error::from(error), "widened rules not recorded");
        }
    }

    /// Tells the database which partitions are named, so that widenings of their rules are recorded. A rule that was changed by a
    /// transaction which did not know of that yet is recorded now.
    async fn name_parts(&self, client: &Client, state: &mut CacheState) -> Result<(), Error> {
        let parts = state.parts.oids();
        if !parts.is_empty() {
            client.execute("select relay.name_parts($1)", &[&parts]).await?;
            self.note_rules(client).await;
        }
        state.parts_told = Some(Instant::now());
        Ok(())
    }

    async fn refresh(&self, state: &mut CacheState) -> Result<(), Error> {
        let lease = Lease::of(&self.pool).await?;
        let refreshed = Box::pin(self.refresh_by(lease.client()?, state)).await;
        lease.done();
        refreshed
    }

    async fn refresh_by(&self, client: &Client, state: &mut CacheState) -> Result<(), Error> {
        let started = Instant::now();
        let mut current = self.fingerprint(client, state).await?;
        let mut reads = 0;
        loop {
            let mut outdated = state.marks.outdated(&current.marks);
            // A role that may do nothing has no mark, and is told why.
            outdated.topics |= state.catalog.topics().is_some_and(|topics| !topics.know(&state.roles));
            let pending = state.catalog.pending();
            let has_changed = !outdated.is_empty();
            if !has_changed
                && (pending == 0 || state.pending_tried.is_some_and(|when| when.elapsed() < PENDING_RETRY))
            {
                break;
            }
            reads += 1;
            if reads > MAX_READS {
                return Err(Error::Lost("the schema changes faster than it can be read"));
            }
            if has_changed {
                self.name_parts(client, state).await?;
            }
            // Where there is an event trigger, it has recorded them.
            if has_changed && !state.catalog.is_ordered() {
                self.note_rules(client).await;
            }
            if self.repair(client, &outdated).await {
                current = self.fingerprint(client, state).await?;
                outdated = state.marks.outdated(&current.marks);
            }
            if !outdated.everything {
                outdated.relations.extend(state.catalog.pending_relations());
                outdated.topics |= state.catalog.topics().is_some_and(|topics| topics.is_pending());
                state.pending_tried = Some(Instant::now());
            }
            let catalog = self.load(client, state, &outdated).await?;
            // PostgreSQL formats policies and rights by a later snapshot than the one the query reads by. The result is
            // consistent only if the fingerprint is the same before and after.
            let before = std::mem::replace(&mut current, self.fingerprint(client, state).await?);
            if before.marks != current.marks {
                continue;
            }
            // An unchanged catalog is not replaced, so that the plans made for it stay valid.
            if has_changed || catalog.pending() < pending {
                if catalog.pending() > 0 {
                    tracing::warn!(
                        policy.count = catalog.pending(),
                        "policies cannot be read, because tables are locked"
                    );
                }
                state.catalog = Arc::new(catalog);
                state.parts.retain(&state.catalog);
                self.note_topics(&state.catalog);
                tracing::debug!(relation.count = state.catalog.relations().count(), "catalog loaded");
            }
            state.marks = before.marks;
            state.widened = before.widened;
            break;
        }
        if state.parts_told.is_none_or(|told| told.elapsed() > PARTS_INTERVAL) {
            self.name_parts(client, state).await?;
        }
        // Rules that were changed and changed back leave no other trace.
        if current.widened != state.widened {
            let widenings = self.widenings(client, state).await?;
            state.catalog = Arc::new(Catalog::clone(&state.catalog).with_widenings(widenings));
            state.widened = current.widened;
        }
        state.mark = current.mark;
        state.checked = Some(started);
        self.scope.send_if_modified(|known| {
            let has_changed = **known != current.scope;
            if has_changed {
                *known = Arc::new(current.scope);
            }
            has_changed
        });
        Ok(())
    }

    async fn fingerprint(&self, client: &Client, state: &CacheState) -> Result<Fingerprint, Error> {
        let fingerprint = client.prepare_cached(FINGERPRINT).await?;
        let row =
            client.query_one(&fingerprint, &[&state.role_names(), &self.judge, &state.parts.oids()]).await?;
        let (kinds, names, hashes): (Vec<&str>, Vec<String>, Vec<String>) =
            (row.get(0), row.get(1), row.get(2));
        let mut marks = Marks::default();
        for ((kind, name), mark) in kinds.into_iter().zip(names).zip(hashes) {
            marks.add(kind, name, mark);
        }
        let scope = RuleScope { roles: row.get(3), owned: row.get(4) };
        Ok(Fingerprint { marks, scope, mark: row.get(5), widened: row.get(6) })
    }

    /// Publishes the rules of private channels.
    fn note_topics(&self, catalog: &Catalog) {
        let rules = catalog.topics();
        self.topics.send_if_modified(|known| {
            known.looked_into = rules.into_iter().flat_map(|rules| catalog.watched(rules.tables())).collect();
            if known.rules.as_ref().map(Arc::as_ptr) == rules.map(Arc::as_ptr) {
                return false;
            }
            known.rules = rules.cloned();
            known.version += 1;
            true
        });
    }

    /// Renews the recorded shapes, before the catalog is read, so that they match its columns. If that fails, changes of a
    /// relation without a recorded shape are not delivered. Returns whether the marks may have changed.
    async fn repair(&self, client: &Client, outdated: &Outdated) -> bool {
        let relations: Vec<i32> = outdated.relations.iter().copied().collect();
        let which = (!outdated.everything).then_some(&relations);
        if which.is_some_and(Vec::is_empty) {
            return false;
        }
        let repaired = client.execute("select relay.repair($1)", &[&which]).await;
        let repaired = repaired.map_err(Error::from);
        if let Err(error) = &repaired {
            tracing::warn!(error = %error, "table shapes not renewed");
        }
        repaired.is_ok()
    }

    async fn load(&self, client: &Client, state: &CacheState, outdated: &Outdated) -> Result<Catalog, Error> {
        let roles = state.role_names();
        let parts = state.parts.oids();
        let catalog = if outdated.everything {
            let all = self.read(client, &state.catalog, &roles, None, &parts).await?;
            Catalog::new(all.relations, state.roles.clone(), all.ordered)
        } else {
            let relations: Vec<i32> = outdated.relations.iter().copied().collect();
            let read = match relations.is_empty() {
                true => Vec::new(),
                false => self.read(client, &state.catalog, &roles, Some(&relations), &parts).await?.relations,
            };
            let others = match outdated.roles.is_empty() {
                true => Vec::new(),
                false => {
                    let roles: Vec<&String> = outdated.roles.iter().collect();
                    let known = state.catalog.relations().map(|relation| relation.id().watched);
                    let others: Vec<i32> = known.filter(|id| !outdated.relations.contains(id)).collect();
                    self.read(client, &state.catalog, &roles, Some(&others), &parts).await?.relations
                }
            };
            state
                .catalog
                .renewed(&outdated.relations, read, &outdated.roles, others)
                .with_roles(state.roles.clone())
        };
        let needs_topics = outdated.everything || outdated.topics || !outdated.roles.is_empty();
        let topics = match needs_topics {
            true => self.read_topics(client, &roles).await?,
            false => state.catalog.topics().cloned(),
        };
        let catalog = catalog.with_topics(topics);
        // Read after the rules, so that no rule in the catalog lacks its widening.
        Ok(catalog.with_widenings(self.widenings(client, state).await?))
    }

    /// Reads what these roles may see of these relations and of those of the partitions that are in them; `None` means all
    /// relations. The names of partitions, which may be thousands, are read only where they are not those in `known`.
    async fn read(
        &self,
        client: &Client,
        known: &Catalog,
        roles: &[&String],
        relations: Option<&Vec<i32>>,
        parts: &[u32],
    ) -> Result<CatalogRows, Error> {
        let read = client
            .prepare_cached(
                "select relay.catalog(relay.subscriber_roles($1, $2), $2, $3, $4, $5::text::jsonb)::text",
            )
            .await?;
        let bodies = bodies(client, parts, relations).await?;
        let text: String =
            client.query_one(&read, &[&roles, &self.judge, &relations, &parts, &bodies]).await?.get(0);
        let mut rows: CatalogRows = serde_json::from_str(&text)
            .map_err(|error| Error::Unfit(format!("relay.catalog returned an unexpected value: {error}")))?;
        for relation in &mut rows.relations {
            if !relation.keep_parts(known) {
                relation.set_parts(part_names(client, relation.id()).await?);
            }
        }
        Ok(rows)
    }

    /// Reads what these roles may do in private channels.
    async fn read_topics(
        &self,
        client: &Client,
        roles: &[&String],
    ) -> Result<Option<Arc<TopicRules>>, Error> {
        let read = client.prepare_cached("select relay.topic_rules($1, $2)::text").await?;
        let row = client.query_opt(&read, &[&roles, &self.judge]).await?;
        let Some(text) = row.and_then(|row| row.get::<_, Option<String>>(0)) else { return Ok(None) };
        let rules: TopicRules = serde_json::from_str(&text).map_err(|error| {
            Error::Unfit(format!("relay.topic_rules returned an unexpected value: {error}"))
        })?;
        Ok(Some(Arc::new(rules.compiled())))
    }

    /// Reads the positions at which rules were widened for the known roles.
    async fn widenings(&self, client: &Client, state: &CacheState) -> Result<Vec<Widening>, Error> {
        let query = client.prepare_cached(WIDENINGS).await?;
        let text: String = client.query_one(&query, &[&state.role_names(), &self.judge]).await?.get(0);
        serde_json::from_str(&text)
            .map_err(|error| Error::Unfit(format!("relay.widenings contains an unexpected value: {error}")))
    }

    /// Lists the grants that are missing for a filter on columns of user-defined types.
    ///
    /// # Errors
    /// As the connection.
    pub async fn missing_for(
        &self,
        relation: &Relation,
        filter: &Filter,
        role: &str,
    ) -> Result<Vec<String>, Error> {
        let is_user_defined =
            |column: &&str| relation.column(column).is_some_and(|column| column.readable_type.contains('.'));
        let columns = filter.conditions().into_iter().map(|condition| condition.column.as_str());
        let columns: Vec<&str> = columns.filter(is_user_defined).collect();
        if columns.is_empty() {
            return Ok(Vec::new());
        }
        let client = self.filters.get().await?;
        let missing = "select relay.missing_filter_usage($1::oid, $2, $3, $4)";
        let missing = client.prepare_cached(missing).await?;
        let row = client.query_one(&missing, &[&relation.oid, &columns, &role, &self.judge]).await?;
        Ok(row.try_get(0)?)
    }

    /// Converts a filter to an SQL condition, with the column types of a relation.
    ///
    /// # Errors
    /// As [`Self::filter`].
    pub async fn condition(&self, relation: &Relation, filter: &Filter) -> Result<String, Error> {
        let client = self.filters.get().await?;
        let terms = typed_conditions(&client, relation, filter).await?;
        Ok(condition_of(filter, &mut terms.iter()))
    }

    /// Compiles a filter with the column types of a relation.
    ///
    /// # Errors
    /// PostgreSQL's own, when a value does not fit its column or the type lacks the operator.
    pub async fn filter(&self, relation: &Relation, filter: &Filter) -> Result<TypedFilter, Error> {
        let client = self.filters.get().await?;
        let terms = typed_conditions(&client, relation, filter).await?;
        let condition = condition_of(filter, &mut terms.iter());
        let statement = client.prepare_cached("select relay.judge_statement($1::oid, $2)").await?;
        let text: String = client.query_one(&statement, &[&relation.oid, &condition]).await?.try_get(0)?;
        let mut values = terms.into_iter().map(|term| term.values);
        let typed = filter.map(&mut |condition| {
            TypedCondition::new(relation, condition.clone(), values.next().unwrap_or_default())
        });
        Ok(TypedFilter::new(relation, typed, condition, text.into()))
    }
}

/// Selects a [`Fingerprint`], for the roles `$1` of subscribers, the judging login `$2` and the partitions `$3`.
const FINGERPRINT: &str = "select k.kinds, k.names, k.marks, s.roles, s.owned, m.mark, (select max(w.number) from relay.widenings w) \
     from (select array_agg(k.kind) as kinds, array_agg(k.name) as names, array_agg(k.mark) as marks \
           from relay.catalog_marks(relay.subscriber_roles($1, $2), $2, $3) k) k, \
          relay.rule_scope($1, $2, $3) s, relay.rules_mark(s.roles, s.owned) m";

/// Reads the recorded partitions of a relation. The [`Fingerprint`] tells whether they are those of the catalog that was read just
/// before.
async fn part_names(client: &Client, relation: RelationId) -> Result<PartNames, Error> {
    let read =
        client.prepare_cached("select part_names::text from relay.known_relations where id = $1").await?;
    let Some(row) = client.query_opt(&read, &[&relation.watched]).await? else {
        return Ok(PartNames::default());
    };
    serde_json::from_str(row.get(0)).map_err(|error| {
        Error::Unfit(format!("relay.known_relations has an unexpected value of part_names: {error}"))
    })
}

/// A condition as PostgreSQL parsed it with the type of its column.
#[derive(Deserialize)]
struct ConditionSql {
    sql: String,
    values: Vec<String>,
}

/// Returns the conditions of a filter, in order.
async fn typed_conditions(
    client: &Client,
    relation: &Relation,
    filter: &Filter,
) -> Result<Vec<ConditionSql>, Error> {
    let read = client.prepare_cached("select relay.filter_condition($1::oid, $2, $3, $4)::text").await?;
    let mut typed = Vec::new();
    for Condition { column, operator, values } in filter.conditions() {
        let row = client.query_one(&read, &[&relation.oid, column, &operator.name(), values]).await?;
        typed.push(serde_json::from_str(row.get(0)).map_err(|error| {
            Error::Unfit(format!("relay.filter_condition returned an unexpected value: {error}"))
        })?);
    }
    Ok(typed)
}

/// Joins the conditions of a filter, in order, as its tree does.
fn condition_of<'t>(filter: &Filter, conditions: &mut impl Iterator<Item = &'t ConditionSql>) -> String {
    let mut join = |all: &[Filter], by: &str| {
        let all: Vec<String> = all.iter().map(|one| condition_of(one, conditions)).collect();
        format!("({})", all.join(by))
    };
    match filter {
        Filter::One(_) => conditions.next().map_or_else(|| String::from("null"), |next| next.sql.clone()),
        Filter::Not(inner) => format!("(not {})", condition_of(inner, conditions)),
        Filter::And(all) if all.is_empty() => String::from("true"),
        Filter::Or(all) if all.is_empty() => String::from("false"),
        Filter::And(all) => join(all, " and "),
        Filter::Or(all) => join(all, " or "),
    }
}

/// Selects when rules were widened, and when each role last changed.
const WIDENINGS: &str = "select coalesce(json_agg(w), '[]')::text from ( \
     select number, xid::text::bigint, relation, part::bigint, null as role from relay.widenings \
     union all select null, xid, 0, 0, role from relay.role_versions(relay.subscriber_roles($1, $2))) w";
