//! `GET /realtime/v1/presence?topic=`: who is present in a topic, without joining it.

use std::net::IpAddr;

use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode};

use crate::model::codec::phoenix::topic_of;
use crate::transport::app::{App, origin_is_allowed};
use crate::transport::query::{bearer, names, parameter, repeated, repeated_error};
use crate::transport::response::{Answer, error, json};

/// The known parameters.
const PARAMETERS: [&str; 2] = ["apikey", "topic"];

/// Answers a request with the presence state as a member gets it.
pub async fn serve(app: &App, address: IpAddr, request: &Request<Incoming>) -> Answer {
    if !origin_is_allowed(&app.allowed_origins, request.headers()) {
        return error(StatusCode::FORBIDDEN, "this origin is not allowed");
    }
    if request.method() != Method::GET {
        return error(StatusCode::METHOD_NOT_ALLOWED, "the presence is read by GET");
    }
    let query = request.uri().query().unwrap_or_default();
    if let Some(name) = repeated(query) {
        return error(StatusCode::BAD_REQUEST, &repeated_error(&name));
    }
    let token = bearer(request.headers()).or_else(|| parameter(query, "apikey")).unwrap_or_default();
    if let Err(why) = app.identify(&token).await {
        let why = why.advised_text();
        app.observe.request_refused(address, request.uri().path(), &why);
        return error(StatusCode::UNAUTHORIZED, &why);
    }
    if let Some(unknown) = names(query).find(|name| !PARAMETERS.contains(&name.as_str())) {
        let unknown: String = unknown.chars().take(40).collect();
        return error(
            StatusCode::BAD_REQUEST,
            &format!("{unknown}: this parameter is unknown, topic= is expected"),
        );
    }
    match parameter(query, "topic").filter(|topic| !topic.is_empty()) {
        Some(topic) => json(StatusCode::OK, app.topics.presence(&topic_of(&topic))),
        None => error(StatusCode::BAD_REQUEST, "topic= is missing: the name of a channel"),
    }
}
