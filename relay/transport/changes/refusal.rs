//! The answers that refuse a request for changes, and what is said with those that are empty.

use hyper::StatusCode;

use crate::auth::token::TokenError;
use crate::auth::verifier::now;
use crate::model::subscription::binding::Subscription;
use crate::model::subscription::error::SubscribeError;
use crate::transport::response::{Answer, error, json};

/// Status 410: the missed changes are not available. Says how to start again.
pub fn gap(why: &str) -> Answer {
    let body = serde_json::json!({
        "error": format!("Gap: {why}"),
        "hint": "request it again without since= to get the current rows and a cursor",
    });
    json(StatusCode::GONE, body.to_string())
}

/// Status 401: the token expired while the request was answered. No changes are returned.
pub fn expired(subscription: &Subscription) -> Answer {
    let seconds_ago = now().saturating_sub(subscription.identity().claims().expires_at());
    error(StatusCode::UNAUTHORIZED, &TokenError::Expired { seconds_ago }.connect_text())
}

/// Status 400: the request is wrong.
pub fn bad_request(why: SubscribeError) -> Answer {
    error(StatusCode::BAD_REQUEST, &why.to_string())
}

/// Returns the member `notice` of an answer, which says why the table shows no row; empty when it may show some.
pub fn notice(hidden: Option<&str>) -> String {
    hidden.map_or_else(String::new, |why| format!(r#","notice":{}"#, serde_json::Value::from(why)))
}

/// Status 503: there is no memory for the answer.
pub fn no_room() -> Answer {
    error(StatusCode::SERVICE_UNAVAILABLE, "the memory for queued data is full, try again")
}

/// Status 503: PostgreSQL does not answer.
pub fn unavailable() -> Answer {
    error(StatusCode::SERVICE_UNAVAILABLE, "the database is unavailable, try again")
}
