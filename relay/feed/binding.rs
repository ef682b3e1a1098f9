//! The way in for sessions: requests are bound to rights here, and registered with the router.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use crate::feed::audience::Registration;
use crate::feed::bookmarks::Keeper;
use crate::feed::command::{Command, Position};
use crate::feed::lanes::Lanes;
use crate::feed::outbox::Outbox;
use crate::feed::past::Past;
use crate::model::bookmark::{BookmarkKey, Opened};
use crate::model::bound_filter::BoundFilter;
use crate::model::change::RelationId;
use crate::model::cursor::Cursor;
use crate::model::delivery::record;
use crate::model::filter::{self, Condition};
use crate::model::limits::MostRows;
use crate::model::paging::{After, By, Paging};
use crate::model::policy::Identity;
use crate::model::refusal::{FORBIDDEN, Refusal};
use crate::model::relation::{Catalog, Relation};
use crate::model::session::ChannelId;
use crate::model::subscription::{Request, Scope, Subscription, Target, exception, readable};
use crate::postgres::catalog::CatalogKeeper;
use crate::postgres::connect::Error;
use crate::postgres::rows::{Found, Rows, Selection, Take};

/// A session's handle on the feed.
#[derive(Clone)]
pub struct Feed {
    binder: Arc<Binder>,
    lanes: Arc<Lanes>,
    past: Arc<Past>,
    rows: Arc<Rows>,
    bookmarks: Keeper,
}

/// Binds requests to rights.
pub struct Binder {
    catalog: Arc<CatalogKeeper>,
    filters: Filters,
}

/// Filters in use, so that equal ones are read by PostgreSQL and decided per change once.
type Filters = Mutex<HashMap<(RelationId, String), Weak<BoundFilter>>>;

/// Why a channel could not be bound.
#[derive(Debug)]
pub enum BindError {
    /// The request is wrong, or not allowed; the text is for the client.
    Refused(Refusal),
    /// PostgreSQL could not be asked in time.
    Unavailable,
}

/// A join waits this long for PostgreSQL; clients give up after ten seconds.
const PATIENCE: Duration = Duration::from_secs(8);

/// Why something asked for cannot be had.
#[derive(Debug)]
pub enum Attempt {
    /// It cannot be served as it is.
    Refused(Refusal),
    /// PostgreSQL did not answer, or refused.
    Failed(Error),
}

/// What came of reading rows.
pub struct Given {
    /// Which bound they went beyond, if they did, and the cursor.
    pub found: Found,
    /// The last one, for a page to begin after it; none where rows have no order or none was asked for.
    pub last: Option<After>,
}

impl From<Error> for Attempt {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<Refusal> for Attempt {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl Feed {
    /// Joins the parts.
    pub fn new(binder: Binder, lanes: Lanes, past: Arc<Past>, rows: Rows, bookmarks: Keeper) -> Self {
        Self { binder: Arc::new(binder), lanes: Arc::new(lanes), past, rows: Arc::new(rows), bookmarks }
    }

    /// Binds a channel's requests to an identity, each for itself.
    ///
    /// # Errors
    /// As [`Binder::bind`]; also when the client of the channel asks for more than one may.
    pub async fn bind(
        &self,
        channel: ChannelId,
        identity: Identity,
        requests: &[Request],
    ) -> Result<Subscription, BindError> {
        let subscription = self.binder.bind(identity, requests).await?;
        self.lanes.admit(channel, &subscription).map_err(BindError::Refused)?;
        Ok(subscription)
    }

    /// Starts delivery to a channel, or changes what is delivered; `greeting` goes out first.
    pub fn join(&self, channel: ChannelId, registration: Registration, greeting: Vec<Bytes>) {
        self.send(Command::Join { channel, registration, greeting });
    }

    /// Ends delivery to a channel; `farewell` goes out after everything that was delivered.
    pub fn leave(&self, channel: ChannelId, outbox: &Arc<Outbox>, farewell: Vec<Bytes>) {
        self.send(Command::Leave { channel, outbox: Arc::clone(outbox), farewell, until: None });
    }

    /// Up to where everything was delivered to channels of one client, or by the feed when there are none; none while the
    /// changelog is not being read. The frame, if there is one, goes out after all that was delivered up to there.
    pub async fn position(
        &self,
        channels: Vec<ChannelId>,
        then: Option<(Arc<Outbox>, Bytes)>,
    ) -> Option<Position> {
        let mut lists = self.lanes.by_router(channels).into_iter().peekable();
        let mut then = then;
        let mut found: Option<Position> = None;
        while let Some(channels) = lists.next() {
            // Behind what was delivered before the last answer is behind all of it.
            let then = if lists.peek().is_none() { then.take() } else { None };
            let (until, heard) = oneshot::channel();
            self.send(Command::Position { channels, then, until });
            if let Ok(position) = heard.await {
                match &mut found {
                    Some(found) => found.channels.extend(position.channels),
                    None => found = Some(position),
                }
            }
        }
        found
    }

    /// Waits until everything that sessions asked for before is in their outboxes.
    pub async fn settled(&self) {
        self.lanes.settled().await;
    }

    /// Where the feed is, as soon as it has come to where the tables of the subscription have their names; none when that
    /// takes too long.
    pub async fn beginning(&self, subscription: &Subscription) -> Option<Cursor> {
        let tries = async {
            loop {
                let here = self.position_soon().await?;
                if !subscription.is_younger_than(&here) {
                    return Some(here);
                }
                sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(PATIENCE, tries).await.ok().flatten()
    }

    /// Where the feed is, as soon as the changelog is read; none when that takes too long.
    pub async fn position_soon(&self) -> Option<Cursor> {
        let tries = async {
            loop {
                if let Some(position) = self.position(Vec::new(), None).await {
                    return position.here;
                }
                sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(PATIENCE, tries).await.ok()
    }

    /// Takes over a bookmark, or makes it where the feed is now, unless it is not `wanted` any more by then.
    ///
    /// # Errors
    /// When PostgreSQL cannot be asked in time.
    pub async fn bookmark(
        &self,
        key: BookmarkKey,
        wanted: impl FnOnce() -> bool,
    ) -> Result<Opened, BindError> {
        let opened = async {
            let here = self.position_soon().await.filter(|_| wanted())?;
            self.bookmarks.open(key, here).await
        };
        timeout(PATIENCE, opened).await.ok().flatten().ok_or(BindError::Unavailable)
    }

    /// Where bookmarks are kept.
    pub fn bookmarks(&self) -> &Keeper {
        &self.bookmarks
    }

    /// Reads the rows that a subscription of one table may see now, up to `most`, and the cursor after which it goes on.
    ///
    /// # Errors
    /// As [`Rows::read`]; also when the table is gone, or has no such order.
    pub async fn rows(
        &self,
        subscription: &Subscription,
        paging: &Paging,
        most: MostRows,
        take: Take<'_>,
    ) -> Result<Given, Attempt> {
        let claims = subscription.identity().claims();
        let catalog = timeout(PATIENCE, self.binder.catalog.with_role(claims.role())).await;
        let catalog = catalog.map_err(|_| Error::Lost("the catalog does not answer"))??;
        let relation = subscription.bindings().first().and_then(|binding| match binding.scope {
            Scope::Relation(id, oid, ..) => {
                Some((catalog.relation(id).filter(|relation| relation.oid == oid)?, binding))
            }
            Scope::Refused(_) | Scope::Named(_) | Scope::Schema(_) | Scope::All => None,
        });
        let access = relation.and_then(|(relation, _)| relation.access(claims.role()));
        let (Some((relation, binding)), Some(access)) = (relation, access) else {
            return Err(Error::Unfit(String::from("the table is gone")).into());
        };
        let order = paging.order(relation, access, claims.role())?;
        let after = self.binder.after(paging, &order, relation).await?;
        let filter = binding.filter.as_ref().map(|filter| filter.condition.as_str());
        let conditions = filter.into_iter().chain(after.as_deref()).collect();
        let select = binding.select.as_deref();
        let mut last_row = String::new();
        let mut number = 0;
        let mut take = |row: &str| {
            number += 1;
            if Some(number) == paging.limit {
                row.clone_into(&mut last_row);
            }
            match record(row, relation, access, select) {
                Some(told) => take(&told),
                None => take(row),
            }
        };
        let selection = Selection { relation, access, conditions, order: &order };
        let found = self.rows.read(claims, &selection, most, &mut take).await?;
        let has_key = !relation.key.is_empty() && relation.key.iter().all(|key| access.sees(key));
        let last = if has_key { After::of(&order, &last_row) } else { None };
        Ok(Given { found, last })
    }

    pub(super) fn send(&self, command: Command) {
        self.lanes.send(command);
    }

    pub(super) fn past(&self) -> Arc<Past> {
        Arc::clone(&self.past)
    }
}

impl Binder {
    /// Binds by the rights in this catalog.
    pub fn new(catalog: Arc<CatalogKeeper>) -> Self {
        Self { catalog, filters: Filters::default() }
    }

    /// Binds a channel's requests to an identity, as long as PostgreSQL may still come back in time. What is wrong with one
    /// request, or not allowed, stands in its binding.
    ///
    /// # Errors
    /// When nothing can be bound to these claims, or PostgreSQL cannot be asked.
    pub async fn bind(&self, identity: Identity, requests: &[Request]) -> Result<Subscription, BindError> {
        let tries = async {
            let mut pause = Duration::from_millis(50);
            loop {
                match self.try_bind(&identity, requests).await {
                    Ok(subscription) => return Ok(subscription),
                    Err(Attempt::Refused(refusal)) => return Err(BindError::Refused(refusal)),
                    Err(Attempt::Failed(error)) if error.is_transient() => {
                        tracing::debug!(error = %error, "a channel waits to be bound");
                    }
                    Err(Attempt::Failed(error)) => {
                        tracing::warn!(error = %error, "a channel could not be bound");
                        return Err(BindError::Unavailable);
                    }
                }
                sleep(pause).await;
                pause *= 2;
            }
        };
        timeout(PATIENCE, tries).await.unwrap_or(Err(BindError::Unavailable))
    }

    async fn try_bind(&self, identity: &Identity, requests: &[Request]) -> Result<Subscription, Attempt> {
        if !self.catalog.has_characters_of(identity.claims()).await? {
            let why = "Unable to subscribe to changes: the token has a character that the database's encoding does not have";
            return Err(Refusal(String::from(why)).into());
        }
        let role = identity.claims().role();
        let mut catalog = self.catalog.with_role(role).await?;
        if requests.iter().any(|request| is_missed(&catalog, role, request)) {
            catalog = self.catalog.reloaded().await?;
        }
        let mut filters = Vec::with_capacity(requests.len());
        for request in requests {
            filters.push(match self.filter(identity, &catalog, request).await {
                Err(Attempt::Refused(why)) => Err(why),
                filter => Ok(filter?),
            });
        }
        Ok(Subscription::bind(identity.clone(), &catalog, requests, filters))
    }

    async fn filter(
        &self,
        identity: &Identity,
        catalog: &Catalog,
        request: &Request,
    ) -> Result<Option<Arc<BoundFilter>>, Attempt> {
        let conditions = filter::parse(&request.filter).map_err(|error| Refusal(error.to_string()))?;
        if conditions.is_empty() {
            return Ok(None);
        }
        if !matches!(request.target, Target::Table { .. }) {
            let text = format!(
                "Unable to subscribe to changes with given parameters. A filter needs one table: {}",
                request.described()
            );
            return Err(Refusal(text).into());
        }
        let relation = readable(identity, catalog, request)?;
        let sees = |column: &str| {
            relation.access(identity.claims().role()).is_some_and(|access| access.sees(column))
        };
        if let Some(hidden) = conditions.iter().find(|condition| !sees(&condition.column)) {
            let why = format!("ERROR P0001 (raise_exception) invalid column for filter {}", hidden.column);
            return Err(exception(request, &why).into());
        }
        let key = (relation.id(), request.filter.clone());
        if let Some(known) = self.known(relation, &key) {
            return Ok(Some(known));
        }
        let missing = self.catalog.missing_for(relation, &conditions, identity.claims().role()).await?;
        if !missing.is_empty() {
            let (schema, table, grants) = (&relation.schema, &relation.table, missing.join("; "));
            let why = format!(
                "{FORBIDDEN}the filter of {schema}.{table} names a type that may not be looked up: {grants}"
            );
            return Err(exception(request, &why).into());
        }
        match self.catalog.filter(relation, conditions).await {
            Ok(bound) => {
                let bound = Arc::new(bound);
                let mut filters = self.filters.lock().unwrap_or_else(PoisonError::into_inner);
                filters.retain(|_, filter| filter.strong_count() > 0);
                filters.insert(key, Arc::downgrade(&bound));
                Ok(Some(bound))
            }
            Err(error) => match error.refusal() {
                Some(why) if !error.is_transient() => Err(exception(request, &why).into()),
                _ => Err(error.into()),
            },
        }
    }

    /// The condition of a page that begins after a row, as SQL.
    async fn after(
        &self,
        paging: &Paging,
        order: &[By],
        relation: &Relation,
    ) -> Result<Option<String>, Attempt> {
        let Some(beyond) = paging.beyond(order, relation)? else { return Ok(None) };
        let mut condition: Option<String> = None;
        for (by, beyond) in order.iter().zip(&beyond).rev() {
            let read: Vec<&Condition> = [Some(&beyond.equal), beyond.later.as_ref(), beyond.from.as_ref()]
                .into_iter()
                .flatten()
                .collect();
            let mut read = match timeout(PATIENCE, self.catalog.conditions(relation, &read)).await {
                Ok(Ok(read)) => read.into_iter(),
                Ok(Err(error)) if error.refusal().is_some() && !error.is_transient() => {
                    return Err(After::unknown().into());
                }
                Ok(Err(error)) => return Err(error.into()),
                Err(_) => return Err(Error::Lost("the catalog does not answer").into()),
            };
            let mut next = || read.next().unwrap_or_default();
            let (equal, later) = (next(), beyond.later.as_ref().map(|_| next()));
            let null = beyond.or_null.then(|| format!("\"{}\" is null", by.column.replace('"', "\"\"")));
            let rest = condition.map(|rest| format!("{equal} and ({rest})"));
            let ways: Vec<String> = [later, null, rest].into_iter().flatten().collect();
            let any = if ways.is_empty() { String::from("false") } else { ways.join(" or ") };
            condition = Some(match beyond.from {
                Some(_) => format!("{} and ({any})", next()),
                None => any,
            });
        }
        Ok(condition)
    }

    fn known(&self, relation: &Relation, key: &(RelationId, String)) -> Option<Arc<BoundFilter>> {
        let filters = self.filters.lock().unwrap_or_else(PoisonError::into_inner);
        filters.get(key).and_then(Weak::upgrade).filter(|filter| filter.fits(relation))
    }
}

/// A table that was watched or granted a moment ago may not be so in the catalog at hand yet.
fn is_missed(catalog: &Catalog, role: &str, request: &Request) -> bool {
    match &request.target {
        Target::Table { schema, table } => {
            catalog.named(schema, table).and_then(|relation| relation.access(role)).is_none()
        }
        Target::Named(_) | Target::Schema(_) | Target::All => false,
    }
}
