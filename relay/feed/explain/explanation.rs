//! What is known of one subscription: what its role may see, how that is decided, and the verdict in words.

use serde::Serialize;
use serde_json::Value;

use crate::model::catalog::relation::{Access, Relation};
use crate::model::policy::claim_expr::ClaimValue;
use crate::model::policy::compile::compile;
use crate::model::policy::index_key::IndexKeys;
use crate::model::policy::plan::{Plan, ServerQuery};
use crate::model::policy::rights::Policy;
use crate::model::policy::visibility::Identity;

/// A policy's result for a row that it lets through.
pub(super) const YES: &str = "yes";
/// A policy's result for a row that it does not let through.
pub(super) const NO: &str = "no";

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

impl Explanation {
    /// Creates the explanation of a relation of which nothing is known yet.
    pub(super) fn new(table: String, role: String, blockers: Vec<String>) -> Self {
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
    pub(super) fn describe(&mut self, relation: &Relation, access: &Access, reader: &Identity) {
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
        let allowed = access.allowed.iter().map(|condition| Policy {
            name: String::from("of relay.allow"),
            permissive: true,
            condition: condition.clone(),
        });
        let policies: Vec<Policy> = access.rights.policies.iter().cloned().chain(allowed).collect();
        self.policies =
            policies.iter().map(|policy| describe_policy(policy, relation, access, reader)).collect();
    }

    /// Draws the verdict from what is described.
    pub(super) fn conclude(&mut self) {
        self.verdict = self.reason();
        self.would_receive = self.verdict.is_none();
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

/// Describes the keys by which a change finds a subscription; `None` when there are none.
pub(super) fn index_lines(keys: &IndexKeys, relation: &Relation) -> Option<Vec<String>> {
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
