//! Answers as they are put together. None may be kept on its way: each is for the bearer of one token at one moment.

use std::convert::Infallible;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::header::{self, HeaderValue};
use hyper::{Response, StatusCode};

/// An answer with a body of any kind.
pub type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// Seconds after which whoever is told to try again should.
const RETRY_AFTER: &str = "2";

/// What a page of another origin may send.
pub fn preflight() -> Answer {
    let mut answer = empty(StatusCode::NO_CONTENT);
    let headers = answer.headers_mut();
    // The star does not stand for this one.
    headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static("Authorization, *"));
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, OPTIONS"));
    answer
}

/// A plain text.
pub fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()).boxed_unsync());
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

/// No body at all.
pub fn empty(status: StatusCode) -> Answer {
    let mut answer = text(status, Bytes::new());
    answer.headers_mut().remove(header::CONTENT_TYPE);
    answer
}

/// An error as JSON. What may be otherwise soon is to be asked again.
pub fn error(status: StatusCode, why: &str) -> Answer {
    let mut answer = json(status, serde_json::json!({ "error": why }).to_string());
    if status == StatusCode::SERVICE_UNAVAILABLE {
        answer.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER));
    }
    answer
}

/// An error as bytes, for a connection that is closed with it.
pub fn refusal(status: &str, why: &str) -> Vec<u8> {
    let body = serde_json::json!({ "error": why }).to_string();
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncache-control: no-store\r\n\
         access-control-allow-origin: *\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

/// A JSON text as answer.
pub fn json(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    let mut answer = text(status, body);
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}
