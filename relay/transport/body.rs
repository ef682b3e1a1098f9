//! The body of a request, read whole, within a size and a time.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::StatusCode;
use hyper::body::{Body, Incoming};
use tokio::time::timeout;

use crate::transport::response::{Answer, error};

/// Reads a body. Its bytes are counted in the memory budget by the connection.
///
/// # Errors
/// The answer that refuses the request: the body is too large or too slow, or the connection is broken.
pub async fn read(body: Incoming, max_bytes: usize, limit: Duration) -> Result<Bytes, Answer> {
    let too_large =
        || error(StatusCode::PAYLOAD_TOO_LARGE, &format!("the body may have {max_bytes} bytes at most"));
    if body.size_hint().lower() > max_bytes as u64 {
        return Err(too_large());
    }
    match timeout(limit, Limited::new(body, max_bytes).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(failed)) if failed.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(_)) => Err(error(StatusCode::BAD_REQUEST, "the body is incomplete")),
        Err(_) => Err(error(StatusCode::REQUEST_TIMEOUT, "the body took too long")),
    }
}
