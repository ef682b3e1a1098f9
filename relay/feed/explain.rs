//! Explains why a subscriber gets a row or does not: its effective subscription, with the reasons.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::feed::subscribe::{BindError, Binder};
use crate::model::catalog::relation::{Access, Relation};
use crate::model::policy::compile::compile;
use crate::model::policy::index_key::IndexKeys;
use crate::model::policy::plan::{Plan, ServerQuery};
use crate::model::policy::rights::Policy;
use crate::model::policy::visibility::{Denied, Identity};
use crate::model::row::change::Row;
use crate::model::subscription::binding::Request;
use crate::model::subscription::error::SubscribeError;
use crate::model::subscription::typed_filter::TypedFilter;
use crate::postgres::catalog::CatalogCache;
use crate::postgres::connect::pool::Error;
use crate::postgres::evaluate::per_identity::{IdentityEvaluator, IdentityQuery, reading};
use crate::postgres::explain_queries::ExplainQueries;

/// A request to explain a subscription.
pub struct ExplainRequest {
    /// The table as in SQL.
    pub table: String,
    /// The subscriber.
    pub identity: Identity,
    /// Its filter.
    pub filter: Option<String>,
    /// A row to evaluate.
    pub row: Option<ExplainTarget>,
}

/// How a row is given.
pub enum ExplainTarget {
    /// By values that a row of the table has.
    Like(Value),
    /// By its image in the changelog.
    Image(String),
}

/// The answer. Its JSON is a contract: fields are added, never removed.
#[derive(Debug, Serialize)]
pub struct Explanation {
    /// Schema and name.
    pub table: String,
    /// The role of the subscriber.
    pub role: String,
    /// Why the subscriber would never get anything, and what to do; empty when it may get changes.
    pub blockers: Vec<String>,
    /// Columns that the role may not read, and that are never sent.
    pub hidden_columns: Vec<String>,
    /// The evaluation strategy: `compiled`, `inverted` or `one by one`; `None` when nothing would be delivered.
    pub way: Option<&'static str>,
    /// What rules out a cheaper strategy.
    pub obstacles: Vec<Reason>,
    /// The claims that the policies read; `None` when it may be any.
    pub claims_read: Option<Vec<String>>,
    /// The queries to PostgreSQL, once a page for all subscribers.
    pub questions: Vec<String>,
    /// The index keys by which a change finds this subscription, one a line; `None` when every change of the table is
    /// evaluated.
    pub index: Option<Vec<String>>,
    /// The policies that apply to the role.
    pub policies: Vec<PolicyPart>,
    /// The filter, when one was given.
    pub filter: Option<FilterPart>,
    /// The row, when one was given.
    pub row: Option<RowPart>,
}

/// A part of a policy and a remark.
#[derive(Debug, Serialize)]
pub struct Reason {
    /// The part as SQL.
    pub part: String,
    /// The remark.
    pub why: String,
}

/// One policy.
#[derive(Debug, Serialize)]
pub struct PolicyPart {
    /// Its name.
    pub name: String,
    /// `permissive` or `restrictive`.
    pub kind: &'static str,
    /// Its condition as PostgreSQL reads it.
    pub condition: String,
    /// Its evaluation strategy on its own.
    pub way: &'static str,
    /// Its result for the row: `yes`, `no`, or why there is none.
    pub says: Option<&'static str>,
}

/// The filter.
#[derive(Debug, Serialize)]
pub struct FilterPart {
    /// Its text.
    pub text: String,
    /// Why it is refused.
    pub refused: Option<String>,
}

/// The row.
#[derive(Debug, Serialize)]
pub struct RowPart {
    /// Whether the row exists.
    pub found: bool,
    /// Whether the policies let the subscriber see it.
    pub allowed: bool,
    /// The policies that decided: those that allowed it, or the restrictive ones that did not; empty when no
    /// permissive one allowed it, or when no policy applies.
    pub by: Vec<String>,
    /// Whether it matches the filter, when one was given that is accepted.
    pub matches: Option<bool>,
}

/// Explains a subscription.
///
/// # Errors
/// As the connections.
pub async fn explain(
    catalog_cache: &CatalogCache,
    binder: &Binder,
    evaluator: &IdentityEvaluator,
    queries: &ExplainQueries,
    request: &ExplainRequest,
) -> Result<Explanation, Error> {
    let role = request.identity.claims().role();
    let catalog = catalog_cache.with_role(role).await?;
    let named = queries.named(&request.table).await?;
    let relation = named.as_ref().and_then(|(schema, table)| catalog.named(schema, table));
    let mut explanation = Explanation {
        table: named
            .as_ref()
            .map_or_else(|| request.table.clone(), |(schema, table)| format!("{schema}.{table}")),
        role: role.to_owned(),
        blockers: queries.blockers(&request.table, role).await?,
        hidden_columns: Vec::new(),
        way: None,
        obstacles: Vec::new(),
        claims_read: Some(Vec::new()),
        questions: Vec::new(),
        index: None,
        policies: Vec::new(),
        filter: None,
        row: None,
    };
    let Some((relation, access)) = relation.and_then(|relation| Some((relation, relation.access(role)?)))
    else {
        return Ok(explanation);
    };
    if access.rights.missing.is_empty() {
        explanation.blockers.extend(relation.missing_grants(role));
    }
    let hidden = relation.columns.iter().filter(|column| !access.sees(&column.name));
    explanation.hidden_columns = hidden.map(|column| column.name.clone()).collect();
    explanation.way = Some(access.plan.kind.name());
    let reasons = access.plan.obstacles.iter();
    explanation.obstacles =
        reasons.map(|obstacle| Reason { part: obstacle.part.clone(), why: obstacle.why.clone() }).collect();
    explanation.claims_read = claims_read(&access.plan);
    explanation.questions = access.plan.queries.iter().map(describe_query).collect();
    let mut keys = access.plan.predicate.index_keys(&access.plan.values(request.identity.claims()));
    for policy in &access.rights.policies {
        explanation.policies.push(describe_policy(policy, relation, access));
    }
    let mut bound = None;
    if let Some(text) = &request.filter {
        match filter(binder, request, relation, text).await {
            Ok(filter) => {
                keys = filter.as_ref().map_or(IndexKeys::Any, |filter| filter.index_keys()).and(keys);
                bound = filter;
                explanation.filter = Some(FilterPart { text: text.clone(), refused: None });
            }
            Err(why) => explanation.filter = Some(FilterPart { text: text.clone(), refused: Some(why) }),
        }
    }
    explanation.index = index(&keys, relation);
    if let Some(target) = &request.row {
        let context = ExplainContext { evaluator, queries, identity: &request.identity };
        let row = context.row(relation, access, target, &mut explanation.policies, bound.as_deref()).await?;
        explanation.row = Some(row);
    }
    Ok(explanation)
}

/// Describes a policy, before a row is evaluated.
fn describe_policy(policy: &Policy, relation: &Relation, access: &Access) -> PolicyPart {
    PolicyPart {
        name: policy.name.clone(),
        kind: if policy.permissive { "permissive" } else { "restrictive" },
        condition: policy.condition.clone(),
        way: compile(&policy.condition, &relation.table, &relation.columns, &access.rights).kind.name(),
        says: None,
    }
}

fn claims_read(plan: &Plan) -> Option<Vec<String>> {
    let terms = plan.claim_exprs.iter().filter(|term| !term.is_constant());
    (!plan.reads_all).then(|| terms.map(ToString::to_string).collect())
}

fn describe_query(leaf: &ServerQuery) -> String {
    match leaf {
        ServerQuery::Fact { expression } => format!("which rows fulfil: {expression}"),
        ServerQuery::Found { query, .. } => format!("which readers are found by: {query}"),
        ServerQuery::Equals { expression, .. } => format!("which readers' claim equals: {expression}"),
    }
}

fn index(keys: &IndexKeys, relation: &Relation) -> Option<Vec<String>> {
    let IndexKeys::OneOf(keys) = keys else { return None };
    let name = |column: &usize| relation.columns.get(*column).map_or("?", |column| &column.name);
    let mut lines: Vec<String> = keys
        .iter()
        .map(|key| match (&key.equal[..], &key.range) {
            _ if key.named => String::from("named by PostgreSQL"),
            ([], Some((column, _))) => format!("{} in a range", name(column)),
            ([], None) if let Some((column, _)) = &key.prefix => {
                format!("{} by what it begins with", name(column))
            }
            (equal, _) => {
                equal.iter().map(|(column, _)| name(column)).collect::<Vec<_>>().join(" and ") + " by hash"
            }
        })
        .collect();
    lines.sort();
    lines.dedup();
    Some(lines)
}

/// Returns the parsed filter, or why it is refused.
async fn filter(
    binder: &Binder,
    request: &ExplainRequest,
    relation: &Relation,
    text: &str,
) -> Result<Option<Arc<TypedFilter>>, String> {
    let mut entry = Map::new();
    for (name, value) in [("schema", relation.schema.as_str()), ("table", &relation.table), ("filter", text)]
    {
        entry.insert(name.to_owned(), Value::from(value));
    }
    let plain = |refusal: SubscribeError| {
        refusal.plain((&relation.schema, &relation.table), Some(request.identity.claims().role()))
    };
    let subscription_request = Request::parse(&entry).map_err(plain)?;
    match binder.bind(request.identity.clone(), &[subscription_request]).await {
        Ok(subscription) => {
            let subscription = subscription.whole().map_err(plain)?;
            Ok(subscription.bindings().first().and_then(|binding| binding.filter.clone()))
        }
        Err(BindError::Refused(refusal)) => Err(plain(refusal)),
        Err(BindError::Unavailable) => Err(String::from("PostgreSQL did not answer in time, try again")),
    }
}

/// The context to evaluate one row for one subscriber.
struct ExplainContext<'a> {
    evaluator: &'a IdentityEvaluator,
    queries: &'a ExplainQueries,
    identity: &'a Identity,
}

impl ExplainContext<'_> {
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
            ExplainTarget::Like(values) => self.queries.row(relation, values).await?,
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
        let (identity, reading) = (self.identity.clone(), Arc::clone(reading));
        let question = IdentityQuery { identity, statement, images: &[image], reading, with_path };
        let verdict = self.evaluator.judge(&[question]).await?;
        Ok(match verdict.first().map(|verdict| (verdict.allowed.first(), verdict.denied)) {
            Some((_, Some(Denied::TimedOut))) => "it took too long",
            Some((_, Some(Denied::Locked))) => "a table that it reads is locked",
            Some((_, Some(Denied::Role))) => "it cannot be evaluated in this role",
            Some((_, Some(Denied::Unreadable))) => "a value that it reads cannot be read back",
            Some((Some(true), _)) => YES,
            Some((_, Some(Denied::Claims))) => "it raises an error for these claims",
            Some((_, Some(Denied::Raised))) => "it raises an error",
            _ => "no",
        })
    }
}

const YES: &str = "yes";
