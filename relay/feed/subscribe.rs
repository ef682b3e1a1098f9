//! Binds the requests of a channel to the rights of its role.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::time::{sleep, timeout};

use crate::model::catalog::held_parts::HeldParts;
use crate::model::catalog::relation::{Catalog, Relation};
use crate::model::policy::visibility::Identity;
use crate::model::row::change::RelationId;
use crate::model::subscription::binding::{Subscription, readable, unknown_column};
use crate::model::subscription::error::SubscribeError;
use crate::model::subscription::filter;
use crate::model::subscription::paging::{OrderBy, PageToken, Paging};
use crate::model::subscription::request::{Request, Target};
use crate::model::subscription::typed_filter::TypedFilter;
use crate::postgres::catalog::CatalogCache;
use crate::postgres::connect::pool::Error;
use crate::postgres::connect::within::within;
use crate::postgres::filter_compiler::FilterCompiler;

/// Binds requests to the rights of their role.
pub struct Binder {
    catalog: Arc<CatalogCache>,
    compiler: FilterCompiler,
    filters: Filters,
}

/// Filters in use, so that equal ones are parsed by PostgreSQL, and evaluated per change, once.
type Filters = Mutex<HashMap<(RelationId, String), Weak<TypedFilter>>>;

/// Why a channel could not be bound.
#[derive(Debug)]
pub enum BindError {
    /// The request is wrong or not allowed; the text is for the client.
    Refused(SubscribeError),
    /// PostgreSQL did not answer in time.
    Unavailable,
}

/// Time limit of a join for PostgreSQL; clients give up after ten seconds.
pub const BIND_TIMEOUT: Duration = Duration::from_secs(8);

/// Why a request failed.
#[derive(Debug)]
pub enum RequestError {
    /// The request is wrong or not allowed.
    Refused(SubscribeError),
    /// PostgreSQL did not answer, or failed.
    Failed(Error),
}

impl From<Error> for RequestError {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<SubscribeError> for RequestError {
    fn from(refusal: SubscribeError) -> Self {
        Self::Refused(refusal)
    }
}

impl Binder {
    /// Creates a binder that reads rights from this catalog, and compiles filters with this compiler.
    pub fn new(catalog: Arc<CatalogCache>, compiler: FilterCompiler) -> Self {
        Self { catalog, compiler, filters: Filters::default() }
    }

    /// Returns the catalog.
    pub(super) fn catalog(&self) -> &CatalogCache {
        &self.catalog
    }

    /// Binds a channel's requests to an identity, retrying while the connection fails, up to a time limit. The
    /// refusal of a single request is recorded in its binding.
    ///
    /// # Errors
    /// When nothing can be bound to these claims, or PostgreSQL does not answer.
    pub async fn bind(&self, identity: Identity, requests: &[Request]) -> Result<Subscription, BindError> {
        let attempts = async {
            let mut pause = Duration::from_millis(50);
            loop {
                match self.try_bind(&identity, requests).await {
                    Ok(subscription) => return Ok(subscription),
                    Err(RequestError::Refused(refusal)) => return Err(BindError::Refused(refusal)),
                    Err(RequestError::Failed(error)) if error.is_transient() => {
                        tracing::debug!(error = %error, "channel not bound, retrying");
                    }
                    Err(RequestError::Failed(error)) => {
                        tracing::warn!(error = %error, "channel not bound");
                        return Err(BindError::Unavailable);
                    }
                }
                sleep(pause).await;
                pause *= 2;
            }
        };
        timeout(BIND_TIMEOUT, attempts).await.unwrap_or(Err(BindError::Unavailable))
    }

    async fn try_bind(
        &self,
        identity: &Identity,
        requests: &[Request],
    ) -> Result<Subscription, RequestError> {
        if !self.catalog.has_characters_of(identity.claims()).await? {
            let why = "Unable to subscribe to changes: the token has a character that the database's encoding does not have";
            return Err(SubscribeError::Other(String::from(why)).into());
        }
        let role = identity.claims().role();
        let mut catalog = self.catalog.with_role(role).await?;
        if requests.iter().any(|request| is_missing(&catalog, role, request)) {
            catalog = self.catalog.reload().await?;
        }
        let parts: Vec<u32> = requests.iter().filter_map(|request| request.part(&catalog)).collect();
        let mut held_parts = HeldParts::default();
        if !parts.is_empty() {
            (catalog, held_parts) = self.catalog.with_parts(&parts).await?;
        }
        let mut filters = Vec::with_capacity(requests.len());
        for request in requests {
            filters.push(match self.filter(identity, &catalog, request).await {
                Err(RequestError::Refused(why)) => Err(why),
                filter => Ok(filter?),
            });
        }
        Ok(Subscription::bind(identity.clone(), &catalog, requests, filters).holding(held_parts))
    }

    async fn filter(
        &self,
        identity: &Identity,
        catalog: &Catalog,
        request: &Request,
    ) -> Result<Option<Arc<TypedFilter>>, RequestError> {
        let filter = filter::parse(&request.filter).map_err(SubscribeError::from)?;
        if filter.is_empty() {
            return Ok(None);
        }
        if !matches!(request.target, Target::Table { .. }) {
            let text = format!(
                "Unable to subscribe to changes with given parameters. A filter needs one table: {}",
                request.described()
            );
            return Err(SubscribeError::Other(text).into());
        }
        let relation = readable(identity, catalog, request)?;
        let access = relation.access(identity.claims().role());
        let unknown = access.and_then(|access| {
            let conditions = filter.conditions();
            let unknown = conditions.into_iter().find(|condition| !access.sees(&condition.column))?;
            Some(unknown_column(request, "filter", &unknown.column, relation, access))
        });
        if let Some(unknown) = unknown {
            return Err(unknown.into());
        }
        let key = (relation.id(), request.filter.clone());
        if let Some(known) = self.cached(relation, &key) {
            return Ok(Some(known));
        }
        let missing = self.compiler.missing_for(relation, &filter, identity.claims().role()).await?;
        if !missing.is_empty() {
            let (schema, table, grants) = (&relation.schema, &relation.table, missing.join("; "));
            let lack =
                format!("the filter of {schema}.{table} names a type that may not be looked up: {grants}");
            return Err(SubscribeError::MissingGrant { request: request.described(), lack }.into());
        }
        match self.compiler.compile(relation, &filter).await {
            Ok(bound) => {
                let bound = Arc::new(bound);
                let mut filters = self.filters.lock().unwrap_or_else(PoisonError::into_inner);
                filters.retain(|_, filter| filter.strong_count() > 0);
                filters.insert(key, Arc::downgrade(&bound));
                Ok(Some(bound))
            }
            Err(error) => match error.refusal() {
                Some(error_text) if !error.is_transient() => {
                    Err(SubscribeError::Exception { request: request.described(), error: error_text }.into())
                }
                _ => Err(error.into()),
            },
        }
    }

    /// Returns the SQL condition of a page that begins after a row.
    pub(super) async fn after(
        &self,
        paging: &Paging,
        order: &[OrderBy],
        relation: &Relation,
    ) -> Result<Option<String>, RequestError> {
        let Some(beyond) = paging.keyset(order, relation)? else { return Ok(None) };
        let read = self.compiler.condition(relation, &beyond);
        match within(BIND_TIMEOUT, "the catalog", read).await {
            Ok(condition) => Ok(Some(condition)),
            Err(error) if error.refusal().is_some() && !error.is_transient() => {
                Err(PageToken::invalid().into())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn cached(&self, relation: &Relation, key: &(RelationId, String)) -> Option<Arc<TypedFilter>> {
        let filters = self.filters.lock().unwrap_or_else(PoisonError::into_inner);
        filters.get(key).and_then(Weak::upgrade).filter(|filter| filter.fits(relation))
    }
}

/// Returns whether the request's table is missing in the catalog, which may be older than a recent watch or grant.
fn is_missing(catalog: &Catalog, role: &str, request: &Request) -> bool {
    match &request.target {
        Target::Table { schema, table } => {
            catalog.named(schema, table).and_then(|relation| relation.access(role)).is_none()
        }
        Target::Named(_) | Target::Schema(_) | Target::All => false,
    }
}
