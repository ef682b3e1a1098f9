//! Explains why a subscriber gets a row or does not: its effective subscription, with the reasons.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Map, Value, json};
use tokio::sync::Mutex;

use crate::feed::subscribe::{BindError, Binder, RequestError};
use crate::model::catalog::near_names::near_names;
use crate::model::catalog::relation::{Access, Relation};
use crate::model::policy::claim_expr::ClaimValue;
use crate::model::policy::compile::compile;
use crate::model::policy::index_key::IndexKeys;
use crate::model::policy::plan::{Plan, ServerQuery};
use crate::model::policy::rights::Policy;
use crate::model::policy::visibility::{Denied, Identity};
use crate::model::row::change::Row;
use crate::model::subscription::error::{SubscribeError, identifier};
use crate::model::subscription::filter::parse;
use crate::model::subscription::request::Request;
use crate::model::subscription::typed_filter::TypedFilter;
use crate::postgres::catalog::CatalogCache;
use crate::postgres::connect::pool::{Error, Server};
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

/// The answer. Its JSON is a contract: fields are added, never removed.
#[derive(Debug, Serialize)]
pub struct Explanation {
    /// Whether the subscriber would receive the row or, without one, may receive rows.
    pub would_receive: bool,
    /// Why it would not, and what to do; `None` when it would.
    pub verdict: Option<String>,
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
    /// The claims that it reads, as far as the relay knows.
    pub claims: Vec<ClaimPart>,
    /// Its result for the row: `yes`, `no`, or why there is none.
    pub says: Option<&'static str>,
}

/// A claim that a policy reads.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct ClaimPart {
    /// The expression as SQL.
    pub claim: String,
    /// Its value in the subscriber's token; null when the token has none.
    pub value: Value,
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
    pub fn new(server: Server, judge: Server, catalog: Arc<CatalogCache>, limit: Duration) -> Self {
        Self {
            server,
            login: judge.login().map(str::to_owned),
            binder: Binder::new(Arc::clone(&catalog)),
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
                explanation.verdict = explanation.reason();
                explanation.would_receive = explanation.verdict.is_none();
                explanations.push(explanation);
            }
            Ok(explanations)
        };
        explained.await.map_err(|error| match error {
            Error::Unfit(why) => RequestError::Refused(SubscribeError(why)),
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
            let filter = explanation.describe_filter(&context, relation, access).await;
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
    let conditions = parse(text).unwrap_or_default();
    let hidden = conditions.iter().map(|condition| &condition.column).find(|name| !access.sees(name));
    let Some(column) = hidden.filter(|name| relation.column(name).is_some()) else { return String::new() };
    let [schema, table, column, role] = [&relation.schema, &relation.table, column, role].map(identifier);
    format!(": grant select ({column}) on {schema}.{table} to {role}")
}

/// Returns why the policies raise an error for these claims; `None` when they do not, or only PostgreSQL knows.
fn raising_claims(plan: &Plan, values: &[ClaimValue]) -> Option<String> {
    let unusable = plan.claim_exprs.iter().zip(values).filter(|(_, value)| **value == ClaimValue::Error);
    let unusable: Vec<String> = unusable.map(|(claim, _)| claim.to_string()).collect();
    plan.raises(values).then(|| {
        format!(
            "its policies raise an error for these claims, so no row is shown: the token needs a claim from which {} can be read",
            unusable.join(" and ")
        )
    })
}

impl Explanation {
    /// Creates the explanation of a relation of which nothing is known yet.
    fn new(table: String, role: String, blockers: Vec<String>) -> Self {
        Self {
            would_receive: false,
            verdict: None,
            table,
            role,
            blockers,
            hidden_columns: Vec::new(),
            way: None,
            obstacles: Vec::new(),
            claims_read: Some(Vec::new()),
            questions: Vec::new(),
            index: None,
            policies: Vec::new(),
            filter: None,
            row: None,
        }
    }

    /// Describes what the role may see of the relation, and how that is decided for these claims.
    fn describe(&mut self, relation: &Relation, access: &Access, reader: &Identity) {
        let plan = &access.plan;
        let values = plan.values(reader.claims());
        if access.rights.missing.is_empty() {
            self.blockers.extend(relation.missing_grants(&self.role));
        }
        self.blockers.extend(raising_claims(plan, &values));
        let hidden = relation.columns.iter().filter(|column| !access.sees(&column.name));
        self.hidden_columns = hidden.map(|column| column.name.clone()).collect();
        self.way = Some(plan.kind.name());
        let obstacles = plan.obstacles.iter();
        self.obstacles = obstacles
            .map(|obstacle| Reason { part: obstacle.part.clone(), why: obstacle.why.clone() })
            .collect();
        self.claims_read = claims_read(plan);
        self.questions = plan.queries.iter().map(describe_query).collect();
        let policies = access.rights.policies.iter();
        self.policies = policies.map(|policy| describe_policy(policy, relation, access, reader)).collect();
    }

    /// Describes the filter, if there is one, and by what a change finds the subscription. Returns the filter if it is accepted.
    async fn describe_filter(
        &mut self,
        context: &ExplainContext<'_>,
        relation: &Relation,
        access: &Access,
    ) -> Option<Arc<TypedFilter>> {
        let keys = access.plan.predicate.index_keys(&access.plan.values(context.request.identity.claims()));
        let (mut refused, mut accepted) = (None, context.request.bound.clone());
        if let Some(bound) = &accepted {
            self.filter = Some(FilterPart { text: bound.condition.clone(), refused: None });
        } else if let Some(text) = &context.request.filter {
            match context.filter(relation, text).await {
                Ok(filter) => accepted = filter,
                Err(why) => refused = Some(why + &column_grant(relation, access, &self.role, text)),
            }
            self.filter = Some(FilterPart { text: text.clone(), refused });
        }
        let keys = match &accepted {
            Some(filter) => filter.index_keys().and(keys),
            None => keys,
        };
        self.index = index(&keys, relation);
        accepted
    }

    /// Returns the first reason why nothing would be received, with the remedy.
    fn reason(&self) -> Option<String> {
        if let Some(blocker) = self.blockers.first() {
            return Some(blocker.clone());
        }
        if let Some(filter) = &self.filter
            && let Some(refused) = &filter.refused
        {
            return Some(refused.clone());
        }
        match &self.row {
            Some(row) => self.reason_for_row(row),
            None if self.index.as_ref().is_some_and(Vec::is_empty) => {
                let filter = if self.filter.is_some() { " and this filter" } else { "" };
                Some(format!("no row can be seen with these claims{filter}{}", claims_said(&self.policies)))
            }
            None => None,
        }
    }

    /// Returns the verdict as one line: whether the subscriber would receive rows, or why not and what to do.
    pub fn first_line(&self) -> String {
        self.verdict.as_ref().map_or_else(
            || String::from("would receive"),
            |why| format!("would not: {}", why.split_whitespace().collect::<Vec<_>>().join(" ")),
        )
    }

    /// Returns all reasons why nothing would be received, the verdict first.
    pub fn reasons(&self) -> Vec<&str> {
        let refused = self.filter.as_ref().and_then(|filter| filter.refused.as_ref());
        let mut reasons: Vec<&str> = Vec::new();
        for why in self.verdict.iter().chain(&self.blockers).chain(refused) {
            if !reasons.contains(&why.as_str()) {
                reasons.push(why);
            }
        }
        reasons
    }

    fn reason_for_row(&self, row: &RowPart) -> Option<String> {
        if !row.found {
            return Some(String::from("there is no such row"));
        }
        if !row.allowed {
            let (kind, told) = match row.by.is_empty() {
                true => ("permissive", "no permissive policy lets the row through"),
                false => ("restrictive", "a restrictive policy keeps the row back"),
            };
            let decided = |policy: &&PolicyPart| policy.kind == kind && policy.says != Some(YES);
            let decided = || self.policies.iter().filter(decided);
            let conditions: Vec<String> = decided().map(PolicyPart::shown).collect();
            return Some(format!("{told}: {}{}", conditions.join(", "), claims_said(decided())));
        }
        let filter = self.filter.as_ref().filter(|_| row.matches == Some(false))?;
        Some(format!("the row does not match the filter {}", filter.text))
    }
}

impl PolicyPart {
    /// Returns its name and condition on one line.
    pub fn shown(&self) -> String {
        let says = match self.says {
            Some(says) if says != NO => format!(", {says}"),
            _ => String::new(),
        };
        format!("`{}`: {}{says}", self.name, one_line(&self.condition))
    }
}

/// Returns which of the claims that the policies read the token lacks, and what it says for the others.
fn claims_said<'a>(policies: impl IntoIterator<Item = &'a PolicyPart>) -> String {
    let mut claims: Vec<&ClaimPart> = Vec::new();
    for claim in policies.into_iter().flat_map(|policy| &policy.claims) {
        if !claims.contains(&claim) {
            claims.push(claim);
        }
    }
    let (lacking, given): (Vec<&ClaimPart>, Vec<&ClaimPart>) =
        claims.into_iter().partition(|claim| claim.value.is_null());
    let mut text = String::new();
    if !lacking.is_empty() {
        let lacking: Vec<&str> = lacking.iter().map(|claim| claim.claim.as_str()).collect();
        text += &format!("; the token has no {}", lacking.join(" and no "));
    }
    if !given.is_empty() {
        let given: Vec<String> =
            given.iter().map(|claim| format!("{} = {}", claim.claim, claim.value)).collect();
        text += &format!("; the token says: {}", given.join(", "));
    }
    text
}

/// Removes the line breaks and the outer parentheses of a condition as PostgreSQL formats it.
pub fn one_line(condition: &str) -> String {
    let words: Vec<&str> = condition.split_whitespace().collect();
    let text = words.join(" ");
    text.strip_prefix('(').and_then(|text| text.strip_suffix(')')).map_or(text.clone(), str::to_owned)
}

/// Describes a policy, before a row is evaluated.
fn describe_policy(policy: &Policy, relation: &Relation, access: &Access, reader: &Identity) -> PolicyPart {
    let plan = compile(&policy.condition, &relation.table, &relation.columns, &access.rights);
    let read = plan.claim_exprs.iter().zip(plan.values(reader.claims()));
    let claims = read.filter(|(claim, _)| !claim.is_constant()).filter_map(|(claim, value)| {
        let value = match value {
            ClaimValue::Null => Value::Null,
            ClaimValue::One(datum) => Value::from(&*datum.to_text()),
            ClaimValue::List(list) => list.iter().map(|datum| Value::from(&*datum.to_text())).collect(),
            ClaimValue::Error | ClaimValue::Undecided => return None,
        };
        Some(ClaimPart { claim: claim.to_string(), value })
    });
    PolicyPart {
        claims: claims.collect(),
        name: policy.name.clone(),
        kind: if policy.permissive { "permissive" } else { "restrictive" },
        condition: policy.condition.clone(),
        way: plan.kind.name(),
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

/// The context to evaluate the filter and one row for one subscriber.
struct ExplainContext<'a> {
    binder: &'a Binder,
    evaluator: &'a IdentityEvaluator,
    queries: &'a ExplainQueries,
    request: &'a ExplainRequest,
}

impl ExplainContext<'_> {
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

const YES: &str = "yes";
const NO: &str = "no";
/// Maximum number of relations named for an unknown one.
const MAX_NEAR: usize = 5;
