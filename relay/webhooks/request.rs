//! One attempt to deliver: an HTTP request, and what its answer means.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderName};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::time::timeout;

use crate::tls::{self, TlsError};
use crate::webhooks::signature::SigningKeys;

/// Time limit for an answer, including the connection.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit for connecting.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Idle connections are closed after this time, before most servers close them.
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest pause that a receiver may ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(3600);
/// Bytes of an answer that are read, so that its connection can be used again.
const MAX_ANSWER: usize = 16 * 1024;

const ID: HeaderName = HeaderName::from_static("webhook-id");
const TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
const SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");

/// Sends requests, over connections that all webhooks share.
pub struct Sender {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

/// A receiver and how deliveries to it are signed.
pub struct Receiver {
    /// Its address; `None` if it cannot be used.
    address: Option<Uri>,
    keys: SigningKeys,
}

/// What an answer means.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// The receiver has the delivery.
    Delivered,
    /// The delivery has to be tried again.
    Failed {
        /// Why, without anything that the receiver sent, except its status.
        why: String,
        /// How long the receiver wants no requests.
        retry_after: Option<Duration>,
    },
    /// The receiver wants nothing any more.
    Gone,
}

impl Receiver {
    /// Creates it from an address and secrets.
    pub fn new(url: &str, secrets: &str) -> Self {
        Self { address: url.parse().ok(), keys: SigningKeys::parse(secrets) }
    }

    /// Returns the request of a delivery at this time.
    fn request(&self, id: &str, body: Bytes, timestamp: u64) -> Option<Request<Full<Bytes>>> {
        let signature = self.keys.sign(id, timestamp, std::str::from_utf8(&body).ok()?);
        let request = Request::builder()
            .method(Method::POST)
            .uri(self.address.clone()?)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::USER_AGENT, concat!("relay/", env!("CARGO_PKG_VERSION")))
            .header(ID, id)
            .header(TIMESTAMP, timestamp)
            .header(SIGNATURE, signature);
        request.body(Full::new(body)).ok()
    }
}

impl Sender {
    /// Creates it without connections.
    ///
    /// # Errors
    /// When the trusted certificates cannot be read.
    pub fn new() -> Result<Self, TlsError> {
        let connector = tls::https(CONNECT_TIMEOUT)?;
        let client = Client::builder(TokioExecutor::new()).pool_idle_timeout(IDLE_TIMEOUT).build(connector);
        Ok(Self { client })
    }

    /// Sends a delivery, and waits for the answer.
    pub async fn send(&self, receiver: &Receiver, id: &str, body: Bytes) -> Answer {
        let failed = |why: String| Answer::Failed { why, retry_after: None };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let Some(request) = receiver.request(id, body, now.as_secs()) else {
            return failed(String::from("the address of the receiver cannot be used"));
        };
        let answered = async {
            let answer = self.client.request(request).await?;
            let meaning = meaning(&answer);
            drain(answer).await;
            Ok::<_, hyper_util::client::legacy::Error>(meaning)
        };
        match timeout(ANSWER_TIMEOUT, Box::pin(answered)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => failed(format!("no answer: {}", tls::with_causes(&error))),
            Err(_) => failed(format!("no answer within {} seconds", ANSWER_TIMEOUT.as_secs())),
        }
    }
}

/// Reads the rest of an answer. What is wrong with it changes nothing: the status has said what it means.
async fn drain(answer: Response<Incoming>) {
    let _ = timeout(Duration::from_secs(1), Limited::new(answer.into_body(), MAX_ANSWER).collect()).await;
}

fn meaning<B>(answer: &Response<B>) -> Answer {
    let status = answer.status();
    if status.is_success() {
        return Answer::Delivered;
    }
    if status == StatusCode::GONE {
        return Answer::Gone;
    }
    let wants_pause = matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
    let retry_after = wants_pause.then(|| retry_after(answer.headers())).flatten();
    let redirect = if status.is_redirection() { ", and redirects are not followed" } else { "" };
    Answer::Failed { why: format!("status {}{redirect}", status.as_u16()), retry_after }
}

/// Reads `Retry-After`: seconds, or a date.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    let wish = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let date = httpdate::parse_http_date(text).ok()?;
            date.duration_since(SystemTime::now()).unwrap_or_default()
        }
    };
    Some(wish.min(MAX_RETRY_AFTER))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, retry_after: Option<&str>) -> Answer {
        let mut answer = Response::builder().status(status);
        if let Some(value) = retry_after {
            answer = answer.header("retry-after", value);
        }
        meaning(&answer.body(()).unwrap())
    }

    fn failed(why: &str, retry_after: Option<u64>) -> Answer {
        Answer::Failed { why: why.to_owned(), retry_after: retry_after.map(Duration::from_secs) }
    }

    #[test]
    fn a_status_says_whether_to_try_again() {
        for status in [200, 201, 202, 204] {
            assert_eq!(answer(status, None), Answer::Delivered);
        }
        assert_eq!(answer(410, None), Answer::Gone);
        for status in [400, 401, 404, 408, 500, 502, 503] {
            assert_eq!(answer(status, None), failed(&format!("status {status}"), None));
        }
        assert_eq!(answer(302, None), failed("status 302, and redirects are not followed", None));
    }

    #[test]
    fn a_pause_is_kept_within_an_hour_of_two_statuses() {
        assert_eq!(answer(429, Some("7")), failed("status 429", Some(7)));
        assert_eq!(answer(503, Some(" 7 ")), failed("status 503", Some(7)));
        assert_eq!(answer(503, Some("999999999")), failed("status 503", Some(3600)));
        assert_eq!(answer(503, Some("soon")), failed("status 503", None));
        assert_eq!(answer(503, Some("-1")), failed("status 503", None));
        assert_eq!(answer(500, Some("7")), failed("status 500", None));
        assert_eq!(answer(429, Some("Wed, 21 Oct 2015 07:28:00 GMT")), failed("status 429", Some(0)));
        assert_eq!(answer(429, Some("Wed, 21 Oct 2099 07:28:00 GMT")), failed("status 429", Some(3600)));
    }

    #[test]
    fn a_request_has_the_headers_of_the_specification() {
        let receiver =
            Receiver::new("https://pager.example/hook?a=b", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
        let body = Bytes::from_static(br#"{"test": 2432232314}"#);
        let request = receiver.request("msg_p5jXN8AQM9LWM0D4loKWxJek", body, 1_614_265_330).unwrap();
        let header = |name: &str| request.headers()[name].to_str().unwrap();
        assert_eq!(request.method(), Method::POST);
        assert_eq!(header("content-type"), "application/json");
        assert_eq!(header("webhook-timestamp"), "1614265330");
        assert_eq!(header("webhook-signature"), "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }
}
