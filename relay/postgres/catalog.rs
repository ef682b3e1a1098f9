//! The catalog of watched relations and rights, reloaded when its fingerprint says that something changed.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use deadpool_postgres::{Client, Pool};
use serde::Deserialize;
use tokio::sync::{Mutex, watch};

use crate::model::catalog::marks::{Marks, Outdated};
use crate::model::catalog::relation::{Catalog, Relation, Widening};
use crate::model::identity::claims::Claims;
use crate::model::row::column::{Column, ColumnKind};
use crate::model::subscription::filter::Condition;
use crate::model::subscription::typed_filter::{TypedCondition, TypedFilter};
use crate::postgres::connect::pool::{Error, Lease};

/// How often the catalog is looked at for what neither the changelog nor the mark of a page tells: policies, grants and
/// columns stand in the changelog, roles and memberships in the mark. Where there is no event trigger, each page of
/// changes is preceded by a look.
const FRESH: Duration = Duration::from_millis(250);

/// How often the catalog is read again because it changed while it was read.
const TRIES: u32 = 20;

/// Keeps the catalog.
pub struct CatalogCache {
    pool: Pool,
    /// Apart from the pool, because what runs there comes from clients.
    filters: Pool,
    judge: Option<String>,
    // Held across the query on purpose: whoever comes meanwhile wants the same answer.
    state: Mutex<State>,
    scope: watch::Sender<Arc<RuleScope>>,
}

/// What the mark of a page is made of, by object numbers: see `relay.rules_mark()`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct RuleScope {
    /// The roles of subscribers and of the judging login, and all that these are members of.
    pub roles: Vec<u32>,
    /// Watched relations and schemas that one of them owns.
    pub owned: Vec<u32>,
}

struct State {
    catalog: Arc<Catalog>,
    roles: BTreeSet<String>,
    /// What the catalog was made of.
    marks: Marks,
    /// The last widening that the catalog knows.
    widened: Option<i64>,
    /// The sign of what fires no event trigger, at the time of the last look.
    mark: Option<i64>,
    checked: Option<Instant>,
    /// When what is pending was asked for last.
    retry_pending: Option<Instant>,
}

/// What could not be read because of a lock is asked for again this often.
const RETRY: Duration = Duration::from_millis(250);

/// What is looked at to know whether the catalog is out of date.
struct CatalogLook {
    marks: Marks,
    scope: RuleScope,
    /// See [`State::mark`].
    mark: Option<i64>,
    /// See [`State::widened`].
    widened: Option<i64>,
}

#[derive(Deserialize)]
struct CatalogAnswer {
    ordered: bool,
    relations: Vec<Relation>,
}

impl State {
    /// The roles whose rights are asked for.
    fn wanted(&self) -> Vec<&String> {
        self.roles.iter().collect()
    }
}

impl CatalogCache {
    /// Knows nothing at first. `filters` are connections with a short time limit for what clients ask; `judge` is the login that judges, when it is not the pool's own.
    pub fn new(pool: Pool, filters: Pool, judge: Option<String>) -> Self {
        let state = State {
            catalog: Arc::default(),
            roles: BTreeSet::new(),
            marks: Marks::default(),
            widened: None,
            mark: None,
            checked: None,
            retry_pending: None,
        };
        let scope = watch::Sender::default();
        Self { pool, filters, judge, state: Mutex::new(state), scope }
    }

    /// What the mark of the next page is to be made of.
    pub fn scope(&self) -> watch::Receiver<Arc<RuleScope>> {
        self.scope.subscribe()
    }

    /// The catalog that is right for changes of a page with this mark, unless the changelog says that the schema changed.
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

    /// Looks again for what neither the changelog nor the mark of a page tells, if the last look is long ago. Called between
    /// two pages, so that no change waits for it.
    ///
    /// # Errors
    /// As the connection.
    pub async fn refresh_if_stale(&self) -> Result<(), Error> {
        let mut state = self.state.lock().await;
        if state.checked.is_none_or(|checked| checked.elapsed() > FRESH) {
            self.refresh(&mut state).await?;
        }
        Ok(())
    }

    /// The catalog with the rights of this role, looked at anew: for joins, which must see what was watched just now.
    ///
    /// # Errors
    /// As the connection.
    pub async fn with_role(&self, role: &str) -> Result<Arc<Catalog>, Error> {
        let asked = Instant::now();
        let mut state = self.state.lock().await;
        state.roles.insert(role.to_owned());
        // Whoever waited for another's look has had its own.
        if !state.catalog.knows_role(role) || state.checked.is_none_or(|checked| checked < asked) {
            self.refresh(&mut state).await?;
        }
        Ok(Arc::clone(&state.catalog))
    }

    /// Whether the database's encoding has all characters of these claims. Those that it has not would fail every statement
    /// in which they stand, those that are asked for others too. Without a role that cannot be, no question is asked for it.
    ///
    /// # Errors
    /// As the connection.
    pub async fn has_characters_of(&self, claims: &Claims) -> Result<bool, Error> {
        let plain = claims.plain();
        if plain.is_ascii() {
            return Ok(true);
        }
        let lease = Lease::of(&self.pool).await?;
        let asked = async {
            let client = lease.client()?;
            let same = client.prepare_cached("select $1::text").await?;
            Ok(client.query_one(&same, &[&plain]).await.map(|_| ())?)
        };
        let asked = asked.await;
        lease.done();
        match asked {
            Ok(()) => Ok(true),
            Err(error) => match Error::code(&error) {
                // Untranslatable, and not in the repertoire.
                Some("22P05" | "22021") => Ok(false),
                _ => Err(error),
            },
        }
    }

    /// The catalog, looked at now because something in it was missed.
    ///
    /// # Errors
    /// As the connection.
    pub async fn reload(&self) -> Result<Arc<Catalog>, Error> {
        let asked = Instant::now();
        let mut state = self.state.lock().await;
        if state.checked.is_none_or(|checked| checked < asked) {
            self.refresh(&mut state).await?;
        }
        Ok(Arc::clone(&state.catalog))
    }

    /// The same, once more at once where policies could not be read the last time: a change waits for them.
    ///
    /// # Errors
    /// As the connection.
    pub async fn retry_pending(&self) -> Result<Arc<Catalog>, Error> {
        let mut state = self.state.lock().await;
        state.retry_pending = None;
        self.refresh(&mut state).await?;
        Ok(Arc::clone(&state.catalog))
    }

    /// Notes what was widened without an event trigger, for all who come later.
    async fn note_rules(&self, client: &Client) {
        if let Err(error) = client.execute("select relay.note_rules()", &[]).await {
            tracing::warn!(error = %Error::from(error), "what was widened could not be noted");
        }
    }

    async fn refresh(&self, state: &mut State) -> Result<(), Error> {
        let lease = Lease::of(&self.pool).await?;
        let refreshed = Box::pin(self.refresh_by(lease.client()?, state)).await;
        lease.done();
        refreshed
    }

    async fn refresh_by(&self, client: &Client, state: &mut State) -> Result<(), Error> {
        let asked = Instant::now();
        let mut seen = self.look(client, state).await?;
        let mut tries = 0;
        loop {
            let mut outdated = state.marks.outdated(&seen.marks);
            let pending = state.catalog.pending();
            let is_other = !outdated.is_empty();
            if !is_other && (pending == 0 || state.retry_pending.is_some_and(|when| when.elapsed() < RETRY)) {
                break;
            }
            tries += 1;
            if tries > TRIES {
                return Err(Error::Lost("the schema changes faster than it can be read"));
            }
            // The event trigger notes what fires it.
            if is_other && !state.catalog.is_ordered() {
                self.note_rules(client).await;
            }
            if self.repair(client, &outdated).await {
                seen = self.look(client, state).await?;
                outdated = state.marks.outdated(&seen.marks);
            }
            if !outdated.everything {
                outdated.relations.extend(state.catalog.pending_relations());
                state.retry_pending = Some(Instant::now());
            }
            let catalog = self.load(client, state, &outdated).await?;
            // What PostgreSQL writes as text (policies, rights) is of a later moment than what it reads: both count only where nothing
            // changed in between.
            let then = std::mem::replace(&mut seen, self.look(client, state).await?);
            if then.marks != seen.marks {
                continue;
            }
            // What is as it was keeps the plans that were made for it.
            if is_other || catalog.pending() < pending {
                if catalog.pending() > 0 {
                    tracing::warn!(
                        policy.count = catalog.pending(),
                        "policies cannot be read, because tables are locked"
                    );
                }
                state.catalog = Arc::new(catalog);
                tracing::debug!(relation.count = state.catalog.relations().count(), "catalog loaded");
            }
            state.marks = then.marks;
            state.widened = then.widened;
            break;
        }
        // Rules that were changed back leave no other trace.
        if seen.widened != state.widened {
            let widenings = self.widenings(client, state).await?;
            state.catalog = Arc::new(Catalog::clone(&state.catalog).with_widenings(widenings));
            state.widened = seen.widened;
        }
        state.mark = seen.mark;
        state.checked = Some(asked);
        self.scope.send_if_modified(|known| {
            let is_other = **known != seen.scope;
            if is_other {
                *known = Arc::new(seen.scope);
            }
            is_other
        });
        Ok(())
    }

    async fn look(&self, client: &Client, state: &State) -> Result<CatalogLook, Error> {
        let look = client.prepare_cached(LOOK).await?;
        let row = client.query_one(&look, &[&state.wanted(), &self.judge]).await?;
        let (kinds, names, hashes): (Vec<&str>, Vec<String>, Vec<String>) =
            (row.get(0), row.get(1), row.get(2));
        let mut marks = Marks::default();
        for ((kind, name), mark) in kinds.into_iter().zip(names).zip(hashes) {
            marks.add(kind, name, mark);
        }
        let scope = RuleScope { roles: row.get(3), owned: row.get(4) };
        Ok(CatalogLook { marks, scope, mark: row.get(5), widened: row.get(6) })
    }

    /// Before anything is read, so that the shapes are those of the columns. Where that fails, nothing is told of a relation whose
    /// shape is not recorded. Says whether the marks may be others now.
    async fn repair(&self, client: &Client, outdated: &Outdated) -> bool {
        let relations: Vec<i32> = outdated.relations.iter().copied().collect();
        let which = (!outdated.everything).then_some(&relations);
        if which.is_some_and(Vec::is_empty) {
            return false;
        }
        let repaired = client.execute("select relay.repair($1)", &[&which]).await;
        let repaired = repaired.map_err(Error::from);
        if let Err(error) = &repaired {
            tracing::warn!(error = %error, "the shapes of tables could not be looked at");
        }
        repaired.is_ok()
    }

    async fn load(&self, client: &Client, state: &State, outdated: &Outdated) -> Result<Catalog, Error> {
        let roles = state.wanted();
        let catalog = if outdated.everything {
            let all = self.read(client, &roles, None).await?;
            Catalog::new(all.relations, state.roles.clone(), all.ordered)
        } else {
            let relations: Vec<i32> = outdated.relations.iter().copied().collect();
            let read = match relations.is_empty() {
                true => Vec::new(),
                false => self.read(client, &roles, Some(&relations)).await?.relations,
            };
            let others = match outdated.roles.is_empty() {
                true => Vec::new(),
                false => {
                    let roles: Vec<&String> = outdated.roles.iter().collect();
                    let known = state.catalog.relations().map(|relation| relation.id().0);
                    let others: Vec<i32> = known.filter(|id| !outdated.relations.contains(id)).collect();
                    self.read(client, &roles, Some(&others)).await?.relations
                }
            };
            state
                .catalog
                .renewed(&outdated.relations, read, &outdated.roles, others)
                .with_roles(state.roles.clone())
        };
        // After the rules themselves: none of these may have been widened by one that is not among them.
        Ok(catalog.with_widenings(self.widenings(client, state).await?))
    }

    /// What these roles may see of these relations; none: of all.
    async fn read(
        &self,
        client: &Client,
        roles: &[&String],
        relations: Option<&Vec<i32>>,
    ) -> Result<CatalogAnswer, Error> {
        let read = client
            .prepare_cached("select relay.catalog(relay.subscriber_roles($1, $2), $2, $3)::text")
            .await?;
        let text: String = client.query_one(&read, &[&roles, &self.judge, &relations]).await?.get(0);
        serde_json::from_str(&text)
            .map_err(|error| Error::Unfit(format!("relay.catalog gave what this relay cannot read: {error}")))
    }

    /// When rules were widened, for readers of these roles.
    async fn widenings(&self, client: &Client, state: &State) -> Result<Vec<Widening>, Error> {
        let asked = client.prepare_cached(WIDENINGS).await?;
        let text: String = client.query_one(&asked, &[&state.wanted(), &self.judge]).await?.get(0);
        serde_json::from_str(&text).map_err(|error| {
            Error::Unfit(format!("relay.widenings has what this relay cannot read: {error}"))
        })
    }

    /// Grants that are missing for a filter by columns whose types are not the system's.
    ///
    /// # Errors
    /// As the connection.
    pub async fn missing_for(
        &self,
        relation: &Relation,
        conditions: &[Condition],
        role: &str,
    ) -> Result<Vec<String>, Error> {
        let is_own =
            |column: &&str| relation.column(column).is_some_and(|column| column.readable_type.contains('.'));
        let columns = conditions.iter().map(|condition| condition.column.as_str());
        let columns: Vec<&str> = columns.filter(is_own).collect();
        if columns.is_empty() {
            return Ok(Vec::new());
        }
        let client = self.filters.get().await?;
        let missing =
            "select relay.missing_filter_usage(relation, $2, $3, $4) from relay.watch_list where id = $1";
        let missing = client.prepare_cached(missing).await?;
        let row = client.query_one(&missing, &[&relation.id().0, &columns, &role, &self.judge]).await?;
        Ok(row.try_get(0)?)
    }

    /// Conditions as SQL, read with the column types of a relation.
    ///
    /// # Errors
    /// As [`Self::filter`].
    pub async fn conditions(
        &self,
        relation: &Relation,
        conditions: &[&Condition],
    ) -> Result<Vec<String>, Error> {
        let client = self.filters.get().await?;
        let mut terms = Vec::with_capacity(conditions.len());
        for condition in conditions {
            terms.push(as_read(&client, relation, condition).await?.sql);
        }
        Ok(terms)
    }

    /// Reads a filter with the column types of a relation.
    ///
    /// # Errors
    /// PostgreSQL's own, when a value does not fit its column or the type lacks the operator.
    pub async fn filter(
        &self,
        relation: &Relation,
        conditions: Vec<Condition>,
    ) -> Result<TypedFilter, Error> {
        let client = self.filters.get().await?;
        let mut typed = Vec::with_capacity(conditions.len());
        let mut terms = Vec::with_capacity(conditions.len());
        for condition in conditions {
            let answer = as_read(&client, relation, &condition).await?;
            terms.push(answer.sql);
            let column = relation.column(&condition.column);
            let kind = column.map(|column| column.kind.clone()).unwrap_or_default();
            let shape = column.map_or(ColumnKind::Foreign, Column::shape);
            let folding = column.and_then(|column| column.folding);
            typed.push(TypedCondition { condition, kind, shape, folding, values: answer.values });
        }
        let statement = client
            .prepare_cached("select relay.judge_statement(relation, $2) from relay.watch_list where id = $1")
            .await?;
        let condition = terms.join(" and ");
        let text: String = client.query_one(&statement, &[&relation.id().0, &condition]).await?.get(0);
        Ok(TypedFilter::new(relation, typed, condition, text.into()))
    }
}

/// What [`CatalogLook`] holds, for the roles `$1` of subscribers and the login `$2` that judges.
const LOOK: &str = "select k.kinds, k.names, k.marks, s.roles, s.owned, m.mark, (select max(w.number) from relay.widenings w) \
     from (select array_agg(k.kind) as kinds, array_agg(k.name) as names, array_agg(k.mark) as marks \
           from relay.catalog_marks(relay.subscriber_roles($1, $2), $2) k) k, \
          relay.rule_scope($1, $2) s, relay.rules_mark(s.roles, s.owned) m";

/// A condition as PostgreSQL has read it with the type of its column.
#[derive(Deserialize)]
struct AsRead {
    sql: String,
    values: Vec<String>,
}

async fn as_read(client: &Client, relation: &Relation, condition: &Condition) -> Result<AsRead, Error> {
    let read = client
        .prepare_cached(
            "select relay.filter_condition(relation, $2, $3, $4)::text from relay.watch_list where id = $1",
        )
        .await?;
    let row = client
        .query_one(
            &read,
            &[&relation.id().0, &condition.column, &condition.operator.name(), &condition.values],
        )
        .await?;
    let mut answer: AsRead = serde_json::from_str(row.get(0)).map_err(|error| {
        Error::Unfit(format!("relay.filter_condition gave what this relay cannot read: {error}"))
    })?;
    if condition.negated {
        answer.sql = format!("(not {})", answer.sql);
    }
    Ok(answer)
}

/// When rules were widened, and since when roles are what they are.
const WIDENINGS: &str = "select coalesce(json_agg(w), '[]')::text from ( \
     select number, xid::text::bigint, relation, null as role from relay.widenings \
     union all select null, xid, 0, role from relay.role_versions(relay.subscriber_roles($1, $2))) w";
