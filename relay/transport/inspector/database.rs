//! What the inspector tells of the database side.

use hyper::StatusCode;
use serde_json::{Value, json};

use crate::feed::subscribe::RequestError;
use crate::transport::app::App;
use crate::transport::explain::failed;
use crate::transport::query::parameter;
use crate::transport::response::{Answer, error, json as json_answer};

/// Answers with what `relay doctor` finds, the state of the changelog, the refresh jobs and the webhooks.
pub(super) async fn checks(app: &App) -> Answer {
    let checks = app.inspection.checks().await;
    // The checks say why the state cannot be read.
    let state = app.inspection.state().await.unwrap_or_else(|_| [Value::Null, json!([]), json!([])]);
    let [health, jobs, webhooks] = state;
    ok(&json!({ "checks": checks, "health": health, "refresh_jobs": jobs, "webhooks": webhooks }))
}

/// Answers with the watched relations and how their policies are decided.
pub(super) async fn relations(app: &App) -> Answer {
    match app.inspection.relations().await {
        Ok(relations) => ok(&json!({ "relations": relations })),
        Err(why) => failed(&why),
    }
}

/// Answers with the last changes of a table.
pub(super) async fn last_changes(app: &App, query: &str) -> Answer {
    let Some(table) = parameter(query, "table").filter(|table| !table.is_empty()) else {
        return error(StatusCode::BAD_REQUEST, "table: the name of a watched table is expected, as in SQL");
    };
    match changes_of(app, &table).await {
        Ok(Some(changes)) => ok(&json!({ "changes": changes })),
        Ok(None) => error(StatusCode::BAD_REQUEST, "table: it is not watched: select relay.watch('…')"),
        Err(why) => failed(&why),
    }
}

async fn changes_of(app: &App, table: &str) -> Result<Option<Value>, RequestError> {
    match app.explainer.relation(table).await? {
        Some(relation) => Ok(Some(app.inspection.last_changes(&relation).await?)),
        None => Ok(None),
    }
}

fn ok(body: &Value) -> Answer {
    json_answer(StatusCode::OK, body.to_string())
}
