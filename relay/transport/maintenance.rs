//! `/maintenance/…`: the status of users, for the service role. Answers are `{"success": true, "data": …}` or
//! `{"success": false, "error": …}`.

use std::net::IpAddr;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode};
use serde_json::{Value, json};

use crate::status::service::StatusError;
use crate::transport::admission::admit_service;
use crate::transport::app::App;
use crate::transport::body;
use crate::transport::response::{Answer, json as json_answer};

/// Maximum size of a body in bytes.
const MAX_BODY: usize = 16 * 1024;

/// What an endpoint does.
#[derive(Clone, Copy)]
enum MaintenanceRequest {
    Stats,
    Metrics,
    ResetMetrics,
    SetStatus,
    CleanUp,
}

/// Returns the endpoint of a path, and its method.
fn endpoint(path: &str) -> Option<(MaintenanceRequest, Method)> {
    Some(match path.strip_prefix("/maintenance/")? {
        "stats" => (MaintenanceRequest::Stats, Method::GET),
        "status-metrics" => (MaintenanceRequest::Metrics, Method::GET),
        "status-metrics/reset" => (MaintenanceRequest::ResetMetrics, Method::POST),
        "user-status" => (MaintenanceRequest::SetStatus, Method::POST),
        "cleanup" => (MaintenanceRequest::CleanUp, Method::POST),
        _ => return None,
    })
}

/// Whether there is an endpoint at this path.
pub fn is_maintenance(path: &str) -> bool {
    endpoint(path).is_some()
}

/// Answers a request. The second value says whether its body was read.
pub async fn serve(app: &App, address: IpAddr, request: Request<Incoming>) -> (Answer, bool) {
    let path = request.uri().path();
    let Some((endpoint, method)) = endpoint(path) else {
        return (failure(StatusCode::NOT_FOUND, "there is nothing at this path"), false);
    };
    let by_method = format!("{path} is asked by {method}");
    let need = "only the role service_role may do this";
    if let Err(refused) = admit_service(app, address, &request, (&method, &by_method), need).await {
        return (enveloped(refused).await, false);
    }
    let body = match body::read(request.into_body(), MAX_BODY, app.limits.write).await {
        Ok(body) => body,
        Err(refused) => return (enveloped(refused).await, false),
    };
    (perform(app, endpoint, &body).await, true)
}

async fn perform(app: &App, endpoint: MaintenanceRequest, body: &[u8]) -> Answer {
    let done = match endpoint {
        MaintenanceRequest::Stats => app.status.stats().await,
        MaintenanceRequest::Metrics => Ok(app.status.metrics()),
        MaintenanceRequest::ResetMetrics => {
            app.status.reset_metrics();
            Ok(json!({}))
        }
        MaintenanceRequest::CleanUp => app.status.clean_up().await,
        MaintenanceRequest::SetStatus => return set_status(app, body).await,
    };
    done.map_or_else(|error| failed(&error), success)
}

/// Sets the status of a user: `{"userId": …, "isOnline": true}`.
async fn set_status(app: &App, body: &[u8]) -> Answer {
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    let user = match &body["userId"] {
        Value::String(id) => Some(id.clone()),
        Value::Number(id) => Some(id.to_string()),
        _ => None,
    };
    let (Some(user), Some(is_online)) = (user, body["isOnline"].as_bool()) else {
        let why = r#"a body like {"userId": "…", "isOnline": true} is expected"#;
        return failure(StatusCode::BAD_REQUEST, why);
    };
    match app.status.set(&user, is_online).await {
        Ok(true) => success(json!({"userId": body["userId"], "isOnline": is_online})),
        Ok(false) => failure(StatusCode::NOT_FOUND, "the status table has no row of this user"),
        Err(error) => failed(&error),
    }
}

fn failed(error: &StatusError) -> Answer {
    match error {
        StatusError::Refused(why) => failure(StatusCode::BAD_REQUEST, why),
        StatusError::Unavailable(why) => {
            failure(StatusCode::SERVICE_UNAVAILABLE, &format!("{why}, try again"))
        }
    }
}

/// Puts the error of a refusal into the form of these endpoints.
async fn enveloped(refused: Answer) -> Answer {
    let status = refused.status();
    let body = refused.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let error: Value = serde_json::from_slice(&body).unwrap_or_default();
    failure(status, error["error"].as_str().unwrap_or("refused"))
}

fn success(data: Value) -> Answer {
    json_answer(StatusCode::OK, json!({"success": true, "data": data}).to_string())
}

fn failure(status: StatusCode, why: &str) -> Answer {
    json_answer(status, json!({"success": false, "error": why}).to_string())
}
