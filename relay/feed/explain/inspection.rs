//! What the inspector shows of the database side: checks, jobs, watched relations and how their policies are decided.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use tokio::sync::Mutex;

use crate::feed::subscribe::RequestError;
use crate::model::catalog::relation::{Access, Relation};
use crate::model::subscription::error::identifier;
use crate::postgres::catalog::CatalogCache;
use crate::postgres::connect::pool::Server;
use crate::postgres::doctor;
use crate::postgres::inspect_queries::InspectQueries;

/// The roles whose rights are shown.
const ROLES: [&str; 3] = ["anon", "authenticated", "service_role"];

/// Reads the database side for the inspector, one request at a time: many operators cost no more connections than one.
pub struct Inspection {
    server: Server,
    judge: Server,
    catalog: Arc<CatalogCache>,
    limit: Duration,
    turn: Mutex<()>,
}

/// A check of the database side, as `relay doctor` prints it.
#[derive(Debug, Serialize)]
pub struct Check {
    /// `good`, `note` or `fault`.
    pub kind: &'static str,
    /// What was found, and what to do.
    pub text: String,
}

/// A watched relation.
#[derive(Debug, Serialize)]
pub struct WatchedRelation {
    /// Its name as in SQL.
    pub name: String,
    /// Its kind in `pg_class`.
    pub kind: String,
    /// The columns of its key.
    pub key: Vec<String>,
    /// Its columns.
    pub columns: Vec<String>,
    /// Whether its readers are told of rows that leave their sight.
    pub leave_events: bool,
    /// How the policies of each role are decided; roles that may not read it are left out.
    pub roles: BTreeMap<&'static str, RoleAccess>,
}

/// How a role reads a relation.
#[derive(Debug, Serialize)]
pub struct RoleAccess {
    /// The way, as `relay explain` names it.
    pub way: &'static str,
    /// Whether it sees every row.
    pub sees_all: bool,
    /// What rules out a cheaper way.
    pub obstacles: Vec<String>,
    /// Why it sees nothing, and what to do.
    pub missing: Option<String>,
}

impl Inspection {
    /// Creates an inspection of `server`, whose policies `judge` evaluates; each statement has the time limit.
    pub fn new(server: Server, judge: Server, catalog: Arc<CatalogCache>, limit: Duration) -> Self {
        Self { server, judge, catalog, limit, turn: Mutex::new(()) }
    }

    /// Returns what `relay doctor` finds.
    pub async fn checks(&self) -> Vec<Check> {
        let _turn = self.turn.lock().await;
        let findings = doctor::findings(&self.server, &self.judge).await;
        let check = |finding: &doctor::Finding| {
            let (kind, text) = finding.parts();
            Check { kind, text: text.to_owned() }
        };
        findings.iter().map(check).collect()
    }

    /// Returns the state of the changelog, the refresh jobs and the webhooks.
    ///
    /// # Errors
    /// As the connection.
    pub async fn state(&self) -> Result<[Value; 3], RequestError> {
        let _turn = self.turn.lock().await;
        let queries = InspectQueries::connect(&self.server, self.limit).await?;
        Ok([queries.health().await?, queries.refresh_jobs().await?, queries.webhooks().await?])
    }

    /// Returns the watched relations in order of their names, without partitions.
    ///
    /// # Errors
    /// As the connection.
    pub async fn relations(&self) -> Result<Vec<WatchedRelation>, RequestError> {
        let _turn = self.turn.lock().await;
        let mut catalog = self.catalog.fresh(None).await?;
        for role in ROLES {
            if !catalog.knows_role(role) {
                catalog = self.catalog.with_role(role).await?;
            }
        }
        let whole = catalog.relations().filter(|relation| !relation.is_part());
        let mut relations: Vec<WatchedRelation> = whole.map(|relation| watched(relation)).collect();
        relations.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(relations)
    }

    /// Returns the last changes of a relation, the newest first.
    ///
    /// # Errors
    /// As the connection.
    pub async fn last_changes(&self, relation: &Relation) -> Result<Value, RequestError> {
        let _turn = self.turn.lock().await;
        Ok(InspectQueries::connect(&self.server, self.limit).await?.last_changes(relation).await?)
    }
}

fn watched(relation: &Relation) -> WatchedRelation {
    let role = |role: &'static str| Some((role, access(relation, role, relation.access(role)?)));
    WatchedRelation {
        name: format!("{}.{}", identifier(&relation.schema), identifier(&relation.table)),
        kind: relation.kind.clone(),
        key: relation.key.clone(),
        columns: relation.columns.iter().map(|column| column.name.clone()).collect(),
        leave_events: relation.leave_events,
        roles: ROLES.into_iter().filter_map(role).collect(),
    }
}

fn access(relation: &Relation, role: &str, access: &Access) -> RoleAccess {
    RoleAccess {
        way: access.plan.kind.name(),
        sees_all: access.policy.is_none(),
        obstacles: access.plan.obstacles.iter().map(|obstacle| obstacle.why.clone()).collect(),
        missing: relation.missing_grants(role),
    }
}
