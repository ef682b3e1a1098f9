//! The catalog of watched relations and rights, reloaded when its fingerprint says that something changed.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use deadpool_postgres::Client;
use tokio::sync::{Mutex, watch};

use crate::model::catalog::held_parts::{HeldParts, NamedParts};
use crate::model::catalog::marks::{Marks, Outdated};
use crate::model::catalog::relation::Catalog;
use crate::model::catalog::topic_rules::TopicRules;
use crate::model::identity::claims::Claims;
use crate::model::row::change::RelationId;
use crate::postgres::catalog::queries::{CatalogQueries, Fingerprint};
use crate::postgres::connect::pool::{Error, Lease, Pool};

mod queries;

pub use crate::postgres::catalog::queries::RuleScope;

/// Maximum age of the mark of the rules between pages: it reports changed roles and memberships.
const MARK_MAX_AGE: Duration = Duration::from_millis(250);

/// Maximum age of the catalog between pages. Only what neither the changelog nor the mark reports depends on it, such as what
/// a superuser changes without event triggers: the changelog reports policies, grants and columns. Without an event trigger,
/// the catalog is checked before each page, and each time that the mark would be.
const MAX_AGE: Duration = Duration::from_secs(1);

/// Maximum number of reads when the catalog changes while it is read.
const MAX_READS: u32 = 20;

/// A cache of the catalog, shared by all readers.
pub struct CatalogCache {
    pool: Pool,
    judge: Option<String>,
    // Held across the query on purpose: callers that arrive meanwhile share its result.
    state: Mutex<CacheState>,
    scope: watch::Sender<Arc<RuleScope>>,
    topics: watch::Sender<KnownTopicRules>,
}

/// The rules of private channels as far as they are known.
#[derive(Debug, Default)]
pub struct KnownTopicRules {
    rules: Option<Arc<TopicRules>>,
    /// The watched relations that they look into.
    looked_into: BTreeSet<i32>,
    /// Changes with the rules and with these relations.
    pub version: u64,
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
    /// When the mark alone was last found unchanged.
    mark_checked: Option<Instant>,
    /// The time of the last attempt to read pending policies.
    pending_tried: Option<Instant>,
}

/// Interval between attempts to read policies that a lock made unreadable.
const PENDING_RETRY: Duration = Duration::from_millis(250);

/// Interval at which the database is told again of the partitions that are named; it forgets others after an hour.
const PARTS_INTERVAL: Duration = Duration::from_secs(600);

impl CacheState {
    /// Returns what must be read again, given the current marks; `None` if nothing.
    fn outdated(&self, current: &Marks) -> Option<Outdated> {
        let mut outdated = self.marks.outdated(current);
        // A role that may do nothing has no mark, and is told why.
        outdated.topics |= self.catalog.topics().is_some_and(|topics| !topics.know(&self.roles));
        let is_retry_due = self.catalog.pending() > 0
            && self.pending_tried.is_none_or(|when| when.elapsed() >= PENDING_RETRY);
        (!outdated.is_empty() || is_retry_due).then_some(outdated)
    }
}

impl CatalogCache {
    /// Creates an empty cache. `judge` is the judging login, if it is not the pool's own.
    pub fn new(pool: Pool, judge: Option<String>) -> Self {
        let state = CacheState {
            catalog: Arc::default(),
            roles: BTreeSet::new(),
            parts: NamedParts::default(),
            parts_told: None,
            marks: Marks::default(),
            widened: None,
            mark: None,
            checked: None,
            mark_checked: None,
            pending_tried: None,
        };
        let (scope, topics) = (watch::Sender::default(), watch::Sender::default());
        Self { pool, judge, state: Mutex::new(state), scope, topics }
    }

    /// The inputs for the mark of the next page.
    pub fn scope(&self) -> watch::Receiver<Arc<RuleScope>> {
        self.scope.subscribe()
    }

    /// The rules of private channels, as far as they are known.
    pub fn topics(&self) -> watch::Receiver<KnownTopicRules> {
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

    /// Checks the catalog, or the mark of the rules alone, if the last check is too old. Called between two pages, so that no
    /// change waits for it.
    ///
    /// # Errors
    /// As the connection.
    pub async fn refresh_if_stale(&self) -> Result<(), Error> {
        let mut state = self.state.lock().await;
        let is_older = |checked: Option<Instant>, age| checked.is_none_or(|checked| checked.elapsed() > age);
        if !is_older(state.checked.max(state.mark_checked), MARK_MAX_AGE) {
            return Ok(());
        }
        let may_differ =
            is_older(state.checked, MAX_AGE) || !state.catalog.is_ordered() || state.catalog.pending() > 0;
        if may_differ || !self.has_same_mark(&mut state).await? {
            self.refresh(&mut state).await?;
        }
        Ok(())
    }

    /// Whether the mark of the rules is that of the last check.
    async fn has_same_mark(&self, state: &mut CacheState) -> Result<bool, Error> {
        let started = Instant::now();
        let scope = Arc::clone(&self.scope.borrow());
        let lease = Lease::of(&self.pool).await?;
        let mark = self.queries(lease.client()?, state).mark(&scope).await;
        lease.done();
        let is_same = mark? == state.mark;
        if is_same {
            state.mark_checked = Some(started);
        }
        Ok(is_same)
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

    async fn refresh(&self, state: &mut CacheState) -> Result<(), Error> {
        let lease = Lease::of(&self.pool).await?;
        let refreshed = Box::pin(self.refresh_by(lease.client()?, state)).await;
        lease.done();
        refreshed
    }

    /// Checks the fingerprint, and reads what is outdated.
    async fn refresh_by(&self, client: &Client, state: &mut CacheState) -> Result<(), Error> {
        let started = Instant::now();
        let mut current = self.queries(client, state).fingerprint().await?;
        let mut reads = 0;
        while let Some(outdated) = state.outdated(&current.marks) {
            reads += 1;
            if reads > MAX_READS {
                return Err(Error::Lost("the schema changes faster than it can be read"));
            }
            if self.read_outdated(client, state, &mut current, outdated).await? {
                break;
            }
        }
        if state.parts_told.is_none_or(|told| told.elapsed() > PARTS_INTERVAL) {
            self.name_parts(client, state).await?;
        }
        // Rules that were changed and changed back leave no other trace.
        if current.widened != state.widened {
            let widenings = self.queries(client, state).widenings().await?;
            state.catalog = Arc::new(Catalog::clone(&state.catalog).with_widenings(widenings));
            state.widened = current.widened;
        }
        state.mark = current.mark;
        state.checked = Some(started);
        self.note_scope(current.scope);
        Ok(())
    }

    /// Reads what is outdated by this fingerprint, and the next fingerprint. Returns false if the database changed meanwhile, so that
    /// nothing was taken over.
    async fn read_outdated(
        &self,
        client: &Client,
        state: &mut CacheState,
        current: &mut Fingerprint,
        mut outdated: Outdated,
    ) -> Result<bool, Error> {
        let has_changed = !outdated.is_empty();
        if has_changed {
            self.name_parts(client, state).await?;
        }
        // Where there is an event trigger, it has recorded them.
        if has_changed && !state.catalog.is_ordered() {
            self.queries(client, state).note_rules().await;
        }
        if self.queries(client, state).repair(&outdated).await {
            *current = self.queries(client, state).fingerprint().await?;
            outdated = state.marks.outdated(&current.marks);
        }
        if !outdated.everything {
            outdated.relations.extend(state.catalog.pending_relations());
            outdated.topics |= state.catalog.topics().is_some_and(|topics| topics.is_pending());
            state.pending_tried = Some(Instant::now());
        }
        let queries = self.queries(client, state);
        let catalog = queries.load(&state.catalog, &outdated).await?;
        // PostgreSQL formats policies and rights by a later snapshot than the one the query reads by. The result is
        // consistent only if the fingerprint is the same before and after.
        let before = std::mem::replace(current, queries.fingerprint().await?);
        if before.marks != current.marks {
            return Ok(false);
        }
        // An unchanged catalog is not replaced, so that the plans made for it stay valid.
        if has_changed || catalog.pending() < state.catalog.pending() {
            self.replace(state, catalog);
        }
        state.marks = before.marks;
        state.widened = before.widened;
        Ok(true)
    }

    fn replace(&self, state: &mut CacheState, catalog: Catalog) {
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

    async fn name_parts(&self, client: &Client, state: &mut CacheState) -> Result<(), Error> {
        self.queries(client, state).name_parts().await?;
        state.parts_told = Some(Instant::now());
        Ok(())
    }

    fn queries<'c>(&'c self, client: &'c Client, state: &'c CacheState) -> CatalogQueries<'c> {
        CatalogQueries { client, judge: &self.judge, roles: &state.roles, parts: state.parts.oids() }
    }

    /// Publishes the inputs for the mark of the next page.
    fn note_scope(&self, scope: RuleScope) {
        self.scope.send_if_modified(|known| {
            let has_changed = **known != scope;
            if has_changed {
                *known = Arc::new(scope);
            }
            has_changed
        });
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
}
