//! Explains why a subscriber gets a row or does not, with queries to PostgreSQL where it decides.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value, json};
use tokio::sync::Mutex;

use crate::feed::explain::explanation::{Explanation, FilterPart, NO, PolicyPart, RowPart, YES, index_lines};
use crate::feed::subscribe::{BindError, Binder, RequestError};
use crate::model::catalog::near_names::near_names;
use crate::model::catalog::relation::{Access, Relation};
use crate::model::policy::visibility::{Denied, Identity};
use crate::model::row::change::Row;
use crate::model::subscription::error::{SubscribeError, identifier};
use crate::model::subscription::filter::{Filter, parse};
use crate::model::subscription::request::Request;
use crate::model::subscription::typed_filter::TypedFilter;
use crate::postgres::catalog::CatalogCache;
use crate::postgres::connect::pool::{Error, Server};
use crate::postgres::evaluate::per_identity::{IdentityEvaluator, IdentityQuery, reading};
use crate::postgres::explain_queries::ExplainQueries;
use crate::postgres::filter_compiler::FilterCompiler;

/// Maximum number of relations named for an unknown one.
const MAX_NEAR: usize = 5;

/// A request to explain a subscription.
pub struct ExplainRequest {
    /// The table as in SQL.
    pub table: String,
    /// The subscriber.
    pub identity: Identity,
    /// Its filter.
    pub filter: Option<String>,
    /// A filter that is bound already, instead.
    pub bound: Option<Arc<TypedFilter>>,
    /// A row to evaluate.
    pub row: Option<ExplainTarget>,
    /// Why a relay refuses the subscriber's token, if it does.
    pub token_refused: Option<String>,
}

/// How a row is given.
#[derive(Debug, Clone)]
pub enum ExplainTarget {
    /// By its key: a value, or a JSON object of columns.
    Key(String),
    /// By its image in the changelog.
    Image(String),
    /// By the number of its change in the changelog, and the transaction, which finds it by index.
    Change(i64, Option<u64>),
}

/// Explains subscriptions, one at a time.
pub struct Explainer {
    server: Server,
    login: Option<String>,
    catalog: Arc<CatalogCache>,
    binder: Binder,
    evaluator: IdentityEvaluator,
    limit: Duration,
    turn: Mutex<()>,
}

impl Explainer {
    /// Creates an explainer that queries `server` and evaluates by `judge`, each statement within the time limit.
    pub fn new(
        server: Server,
        judge: Server,
        catalog: Arc<CatalogCache>,
        filters: FilterCompiler,
        limit: Duration,
    ) -> Self {
        Self {
            server,
            login: judge.login().map(str::to_owned),
            binder: Binder::new(Arc::clone(&catalog), filters),
            catalog,
            evaluator: IdentityEvaluator::new(judge, limit),
            limit,
            turn: Mutex::new(()),
        }
    }

    /// Returns the watched relation that a name in SQL syntax resolves to.
    ///
    /// # Errors
    /// As the connection, or when the name is not valid SQL.
    pub async fn relation(&self, name: &str) -> Result<Option<Arc<Relation>>, RequestError> {
        let _turn = self.turn.lock().await;
        let queries = self.queries().await?;
        let Some((schema, table)) = queries.named(name).await? else { return Ok(None) };
        Ok(self.catalog.fresh(None).await?.named(&schema, &table).cloned())
    }

    async fn queries(&self) -> Result<ExplainQueries, Error> {
        ExplainQueries::connect(&self.server, self.login.as_deref(), self.limit).await
    }

    /// Explains subscriptions of one table, each with the verdict.
    ///
    /// # Errors
    /// When a request names a row that cannot be read, or as the connections.
    pub async fn explain(&self, requests: &[ExplainRequest]) -> Result<Vec<Explanation>, RequestError> {
        let _turn = self.turn.lock().await;
        let explained = async {
            let queries = self.queries().await?;
            let mut explanations = Vec::with_capacity(requests.len());
            for request in requests {
                let mut explanation = self.examine(&queries, request).await?;
                explanation.conclude();
                explanations.push(explanation);
            }
            Ok(explanations)
        };
        explained.await.map_err(|error| match error {
            Error::Unfit(why) => RequestError::Refused(SubscribeError::Other(why)),
            error => RequestError::Failed(error),
        })
    }

    /// Collects what the verdict follows from.
    async fn examine(
        &self,
        queries: &ExplainQueries,
        request: &ExplainRequest,
    ) -> Result<Explanation, Error> {
        let role = request.identity.claims().role();
        let named = queries.named(&request.table).await?;
        let catalog = self.catalog.with_table(role, named.as_ref()).await?;
        let relation = named.as_ref().and_then(|(schema, table)| catalog.named(schema, table));
        let mut blockers: Vec<String> = request.token_refused.iter().cloned().collect();
        match named {
            Some(_) => blockers.extend(queries.blockers(&request.table, role).await?),
            None => blockers.push(unknown(queries, &request.table).await?),
        }
        let table = match &named {
            Some((schema, table)) => format!("{schema}.{table}"),
            None => request.table.clone(),
        };
        let mut explanation = Explanation::new(table, role.to_owned(), blockers);
        let found = relation.and_then(|relation| Some((relation, relation.access(role)?)));
        if let Some((relation, access)) = found {
            explanation.describe(relation, access, &request.identity);
            let context =
                ExplainContext { binder: &self.binder, evaluator: &self.evaluator, queries, request };
            let filter = context.describe_filter(&mut explanation, relation, access).await;
            if let Some(target) = &request.row {
                let policies = &mut explanation.policies;
                explanation.row =
                    Some(context.row(relation, access, target, policies, filter.as_deref()).await?);
            }
        }
        Ok(explanation)
    }
}

/// Returns the text for a relation that does not exist, with those whose names are near.
async fn unknown(queries: &ExplainQueries, name: &str) -> Result<String, Error> {
    let (parts, candidates) = queries.candidates(name).await?;
    let near = near_names(parts.last().map_or(name, String::as_str), &candidates, |(_, bare)| bare);
    let is_bare = parts.len() == 1;
    let place = if is_bare { " on the search path" } else { "" };
    let advice = match near.as_slice() {
        [] if is_bare => format!("; for a table in another schema: relay explain SCHEMA.{name}"),
        [] => String::new(),
        near => {
            let near: Vec<&str> = near.iter().take(MAX_NEAR).map(|(shown, _)| shown.as_str()).collect();
            format!("; there is {}", near.join(", "))
        }
    };
    Ok(format!("there is no relation {name}{place}{advice}"))
}

/// Returns the grant for the first column of a filter that exists and the role may not read; empty when there is none.
fn column_grant(relation: &Relation, access: &Access, role: &str, text: &str) -> String {
    let filter = parse(text).ok();
    let conditions = filter.iter().flat_map(Filter::conditions);
    let hidden = conditions.map(|condition| &condition.column).find(|name| !access.sees(name));
    let Some(column) = hidden.filter(|name| relation.column(name).is_some()) else { return String::new() };
    let [schema, table, column, role] = [&relation.schema, &relation.table, column, role].map(identifier);
    format!(": grant select ({column}) on {schema}.{table} to {role}")
}

/// The context to evaluate the filter and one row for one subscriber.
struct ExplainContext<'a> {
    binder: &'a Binder,
    evaluator: &'a IdentityEvaluator,
    queries: &'a ExplainQueries,
    request: &'a ExplainRequest,
}

impl ExplainContext<'_> {
    /// Describes the filter, if there is one, and by what a change finds the subscription. Returns the filter if it is accepted.
    async fn describe_filter(
        &self,
        explanation: &mut Explanation,
        relation: &Relation,
        access: &Access,
    ) -> Option<Arc<TypedFilter>> {
        let keys = access.plan.predicate.index_keys(&access.plan.values(self.request.identity.claims()));
        let (mut refused, mut accepted) = (None, self.request.bound.clone());
        if let Some(bound) = &accepted {
            explanation.filter = Some(FilterPart { text: bound.condition.clone(), refused: None });
        } else if let Some(text) = &self.request.filter {
            match self.filter(relation, text).await {
                Ok(filter) => accepted = filter,
                Err(why) => refused = Some(why + &column_grant(relation, access, &explanation.role, text)),
            }
            explanation.filter = Some(FilterPart { text: text.clone(), refused });
        }
        let keys = match &accepted {
            Some(filter) => filter.index_keys().and(keys),
            None => keys,
        };
        explanation.index = index_lines(&keys, relation);
        accepted
    }

    /// Returns the parsed filter, or why it is refused.
    async fn filter(&self, relation: &Relation, text: &str) -> Result<Option<Arc<TypedFilter>>, String> {
        let identity = &self.request.identity;
        let [schema, table] = [&relation.schema, &relation.table];
        let entry = [("schema", schema.as_str()), ("table", table), ("filter", text)];
        let entry = entry.map(|(name, value)| (name.to_owned(), Value::from(value)));
        let plain = |refusal: SubscribeError| refusal.plain((schema, table), Some(identity.claims().role()));
        let request = Request::parse(&Map::from_iter(entry)).map_err(plain)?;
        match self.binder.bind(identity.clone(), &[request]).await {
            Ok(subscription) => {
                let subscription = subscription.whole().map_err(plain)?;
                Ok(subscription.bindings().first().and_then(|binding| binding.filter.clone()))
            }
            Err(BindError::Refused(refusal)) => Err(plain(refusal)),
            Err(BindError::Unavailable) => Err(String::from("PostgreSQL did not answer in time, try again")),
        }
    }

    async fn row(
        &self,
        relation: &Relation,
        access: &Access,
        target: &ExplainTarget,
        policies: &mut [PolicyPart],
        filter: Option<&TypedFilter>,
    ) -> Result<RowPart, Error> {
        let image = match target {
            ExplainTarget::Image(image) => Some(image.clone()),
            ExplainTarget::Key(key) => self.queries.row(relation, &columns_of(relation, key)?).await?,
            ExplainTarget::Change(number, xid) => self.queries.change(relation, *number, *xid).await?,
        };
        let Some(image) = image else {
            return Ok(RowPart { found: false, allowed: false, by: Vec::new(), matches: None });
        };
        // As in the feed: only columns that are read.
        let narrowed = |reads: &dyn Fn(&str) -> bool| match Row::parse(&image) {
            Ok(row) => relation.narrowed(&row, reads),
            Err(_) => image.clone(),
        };
        let of_policy = narrowed(&|name| relation.policy_reads(access, name));
        let reading: Arc<str> = reading(relation).into();
        let says = |image: String, statement, with_path| self.says(image, statement, &reading, with_path);
        for policy in policies.iter_mut() {
            let judgement = self.queries.judgement(relation, &policy.condition).await?;
            policy.says = Some(says(of_policy.clone(), judgement, access.rights.calls_user_functions).await?);
        }
        let allowed = match (&access.policy, &access.judge) {
            (None, _) => true,
            (Some(_), Some(statement)) => says(of_policy, Arc::clone(statement), true).await? == YES,
            (Some(_), None) => false,
        };
        let (kind, says_yes) = if allowed { ("permissive", true) } else { ("restrictive", false) };
        let decided = |policy: &PolicyPart| policy.kind == kind && (policy.says == Some(YES)) == says_yes;
        let by = policies.iter().filter(|policy| decided(policy)).map(|policy| policy.name.clone());
        let by = by.collect();
        let matches = match filter {
            Some(filter) => {
                let image = narrowed(&|name| filter.columns().any(|read| read == name));
                Some(says(image, Arc::clone(&filter.statement), false).await? == YES)
            }
            None => None,
        };
        Ok(RowPart { found: true, allowed, by, matches })
    }

    async fn says(
        &self,
        image: String,
        statement: Arc<str>,
        reading: &Arc<str>,
        with_path: bool,
    ) -> Result<&'static str, Error> {
        let (identity, reading) = (self.request.identity.clone(), Arc::clone(reading));
        let question =
            IdentityQuery { identity, statement, images: &[image], reading, with_path, topic: None };
        let verdict = self.evaluator.judge(&[question]).await?;
        Ok(match verdict.first().map(|verdict| (verdict.allowed.first(), verdict.denied)) {
            Some((_, Some(Denied::TimedOut))) => "it took too long",
            Some((_, Some(Denied::Locked))) => "a table that it reads is locked",
            Some((_, Some(Denied::Role))) => "it cannot be evaluated in this role",
            Some((_, Some(Denied::Unreadable))) => "a value that it reads cannot be read back",
            Some((Some(true), _)) => YES,
            Some((_, Some(Denied::Claims))) => "it raises an error for these claims",
            Some((_, Some(Denied::Raised))) => "it raises an error",
            _ => NO,
        })
    }
}

/// Returns the columns that a key names: of a JSON object each of its members, of another text the column of the key.
fn columns_of(relation: &Relation, key: &str) -> Result<Value, Error> {
    if let Ok(columns @ Value::Object(_)) = serde_json::from_str(key) {
        return Ok(columns);
    }
    match relation.key.as_slice() {
        // A string, because PostgreSQL converts it to the type of the column.
        [column] => Ok(json!({ column.as_str(): key })),
        _ => Err(Error::Unfit(String::from(
            "the table has no key of one column: give --key a JSON object of columns",
        ))),
    }
}
