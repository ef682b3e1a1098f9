//! HTTP answers. None may be cached: each is for the bearer of one token at one moment.

use std::convert::Infallible;
use std::io;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Body;
use hyper::header::{self, HeaderValue};
use hyper::{Response, StatusCode};

/// An answer with a body of any kind.
pub type Answer = Response<AnswerBody>;

/// The body of an answer. Only one that another server sends can fail: then it is incomplete.
pub type AnswerBody = UnsyncBoxBody<Bytes, io::Error>;

/// Makes a body that cannot fail the body of an answer.
pub fn body(body: impl Body<Data = Bytes, Error = Infallible> + Send + 'static) -> AnswerBody {
    body.map_err(|never| match never {}).boxed_unsync()
}

/// `Retry-After` of temporary errors, in seconds.
const RETRY_AFTER: &str = "2";

/// Answers a CORS preflight request.
pub fn preflight() -> Answer {
    let mut answer = empty(StatusCode::NO_CONTENT);
    let headers = answer.headers_mut();
    // The wildcard does not cover `Authorization`.
    headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static("Authorization, *"));
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, OPTIONS"));
    answer
}

/// A plain text answer.
pub fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(self::body(Full::new(body.into())));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

/// An answer without a body.
pub fn empty(status: StatusCode) -> Answer {
    let mut answer = text(status, Bytes::new());
    answer.headers_mut().remove(header::CONTENT_TYPE);
    answer
}

/// An error as JSON, with what to do where its text alone does not say it.
pub fn error_with_hint(status: StatusCode, why: &str, hint: Option<&str>) -> Answer {
    match hint {
        Some(hint) => json(status, serde_json::json!({ "error": why, "hint": hint }).to_string()),
        None => error(status, why),
    }
}

/// An error as JSON. Status 503 gets a `Retry-After`.
pub fn error(status: StatusCode, why: &str) -> Answer {
    let mut answer = json(status, serde_json::json!({ "error": why }).to_string());
    if status == StatusCode::SERVICE_UNAVAILABLE {
        answer.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER));
    }
    answer
}

/// Status 403: a private channel is not for this client. Clients know the text.
pub fn unauthorized() -> Answer {
    json(StatusCode::FORBIDDEN, r#"{"message":"Unauthorized"}"#)
}

/// A complete HTTP error answer as bytes, for a connection that is closed after it.
pub fn refusal(status: &str, why: &str) -> Vec<u8> {
    let body = serde_json::json!({ "error": why }).to_string();
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncache-control: no-store\r\n\
         access-control-allow-origin: *\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

/// A JSON answer.
pub fn json(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    let mut answer = text(status, body);
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}
