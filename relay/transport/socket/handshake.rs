//! The WebSocket handshake: checks the request and the token, then starts a session.

use std::sync::Arc;

use hyper::body::{Body, Incoming};
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Method, Request, StatusCode};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::model::codec::phoenix::Version;
use crate::model::identity::bookmark::InvalidSessionName;
use crate::observe::{Refusal, RefusalReason};
use crate::transport::app::{App, origin_is_allowed};
use crate::transport::connection_limits::ConnectionSlot;
use crate::transport::early_refusal::into_connection;
use crate::transport::query::repeated_error;
use crate::transport::query::{is_unreadable, parameter, repeated};
use crate::transport::response::Answer;
use crate::transport::response::{empty, error, error_with_hint};
use crate::transport::socket::channels::ConnectRequest;
use crate::transport::socket::driver;

/// Answers a handshake request.
pub async fn handshake(app: &Arc<App>, slot: Arc<ConnectionSlot>, mut request: Request<Incoming>) -> Answer {
    let (address, path) = (slot.address(), request.uri().path().to_owned());
    let count = |reason: RefusalReason, sub: Option<&str>, why: &str| {
        app.observe.connection_refused(&Refusal { reason, address, path: Some(&path), sub, why });
    };
    let refused = |status: StatusCode, why: &str| {
        let reason =
            if status == StatusCode::FORBIDDEN { RefusalReason::Origin } else { RefusalReason::Request };
        count(reason, None, why);
        error(status, why)
    };
    let Some(key) = upgrade_key(&request) else {
        return refused(StatusCode::BAD_REQUEST, "a WebSocket handshake is expected here");
    };
    if !origin_is_allowed(&app.allowed_origins, request.headers()) {
        return refused(StatusCode::FORBIDDEN, "this origin is not allowed");
    }
    let query = request.uri().query().unwrap_or_default();
    if let Some(name) = repeated(query) {
        count(RefusalReason::Request, None, "repeated parameter");
        return error(StatusCode::BAD_REQUEST, &repeated_error(&name));
    }
    let Some(version) = Version::from_vsn(parameter(query, "vsn").as_deref()) else {
        count(RefusalReason::Request, None, "unknown protocol version (vsn)");
        return empty(StatusCode::FORBIDDEN);
    };
    let claims = match app.identify(&credential(request.headers(), query)).await {
        Ok(claims) => claims,
        Err(why) => {
            count(RefusalReason::Token, None, &why.advised_text());
            return error_with_hint(StatusCode::UNAUTHORIZED, &why.connect_text(), why.advice());
        }
    };
    let Some(client) = app.connection_limits.admit_client() else {
        count(RefusalReason::Limit, claims.sub(), "Too many connected users");
        return error(StatusCode::TOO_MANY_REQUESTS, "Too many connected users");
    };
    let with_cursor = match parameter(query, "cursor").as_deref() {
        None | Some("" | "false") => false,
        Some("true") => true,
        Some(_) => return refused(StatusCode::BAD_REQUEST, "cursor: true or false is expected"),
    };
    let name = match parameter(query, "session") {
        None if is_unreadable(query, "session") => Err(InvalidSessionName),
        name => name.map(|name| name.parse()).transpose(),
    };
    let name = match name {
        Ok(name) => name,
        Err(error) => return refused(StatusCode::BAD_REQUEST, &error.to_string()),
    };
    let protocol = version.protocol();
    let connect_request = ConnectRequest { protocol, with_cursor, name, claims, address };
    let upgrade = hyper::upgrade::on(&mut request);
    let session_app = Arc::clone(app);
    app.sessions.spawn(async move {
        let Ok(upgraded) = upgrade.await else { return };
        let Some((stream, read)) = into_connection(upgraded) else { return };
        driver::serve(session_app, stream, read, connect_request).await;
        drop((slot, client));
    });
    switching_protocols(&key)
}

/// The answer that accepts a handshake.
fn switching_protocols(key: &str) -> Answer {
    let mut answer = empty(StatusCode::SWITCHING_PROTOCOLS);
    let headers = answer.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    if let Ok(accept) = HeaderValue::from_str(&derive_accept_key(key.as_bytes())) {
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    }
    answer
}

/// Returns the API key or token of a handshake; empty if there is none.
fn credential(headers: &HeaderMap, query: &str) -> String {
    let header = headers.get("x-api-key").and_then(|value| value.to_str().ok()).map(str::to_owned);
    header.or_else(|| parameter(query, "apikey")).unwrap_or_default()
}

/// Returns the `Sec-WebSocket-Key`; `None` if the request is no valid handshake.
fn upgrade_key(request: &Request<Incoming>) -> Option<String> {
    let headers = request.headers();
    let has = |name: header::HeaderName, token: &str| {
        let values = headers.get_all(name);
        values
            .iter()
            .filter_map(|value| value.to_str().ok())
            .any(|value| value.split(',').any(|part| part.trim().eq_ignore_ascii_case(token)))
    };
    let is_handshake = request.method() == Method::GET
        && request.body().is_end_stream()
        && has(header::CONNECTION, "upgrade")
        && has(header::UPGRADE, "websocket")
        && has(header::SEC_WEBSOCKET_VERSION, "13");
    let key = headers.get(header::SEC_WEBSOCKET_KEY)?.to_str().ok()?;
    is_handshake.then(|| key.to_owned())
}
