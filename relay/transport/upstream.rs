//! The server behind the relay (`--upstream`): its address, connections to it, and requests as it gets them.

use std::net::IpAddr;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::http::uri::{Authority, PathAndQuery, Scheme};
use hyper::{Request, Response, Uri, Version};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::time::timeout;

use crate::tls;

/// Time limit for connecting to the server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit for the head of its answer. Longer than what hosted functions may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(300);
/// Idle connections to the server are closed after this time, before most servers close them.
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);

/// Headers that concern one connection only (RFC 9110, section 7.6.1), beside those that `Connection` names. `Expect` is answered
/// here when the body is read.
const OF_ONE_CONNECTION: [HeaderName; 8] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::EXPECT,
];

/// How the relay names itself in the header `Via`, by which a circle of relays is found.
const VIA: &str = "1.1 relay";
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// The server behind the relay.
#[derive(Debug, Clone)]
pub struct Upstream {
    scheme: Scheme,
    authority: Authority,
    /// The path before that of each request; empty if there is none.
    prefix: String,
    client: Client<HttpsConnector<HttpConnector>, Passing>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// The request has no path, or its headers cannot be passed on.
    #[error("the request cannot be passed on")]
    Request,
    /// The request came through a relay already.
    #[error("the server is this relay")]
    Circle,
    /// No connection, or no HTTP.
    #[error("{0}")]
    Unreachable(String),
    /// The server took too long.
    #[error("no answer within {} seconds", ANSWER_TIMEOUT.as_secs())]
    Late,
}

impl Upstream {
    /// Parses the URL of the server: `http://` or `https://`, a host, and perhaps a path.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(url: &str) -> Result<Self, String> {
        let uri = Uri::from_str(url).map_err(|error| error.to_string())?;
        let parts = uri.into_parts();
        let scheme = parts.scheme.filter(|scheme| *scheme == Scheme::HTTP || *scheme == Scheme::HTTPS);
        let (Some(scheme), Some(authority)) = (scheme, parts.authority) else {
            return Err(String::from(
                "http:// or https:// and a host are expected, as in https://PROJECT.example",
            ));
        };
        if authority.as_str().contains('@') {
            return Err(String::from("a name or password in it is not supported"));
        }
        let path = parts.path_and_query;
        if path.as_ref().is_some_and(|path| path.query().is_some()) {
            return Err(String::from("a query in it is not supported"));
        }
        let prefix = path.as_ref().map_or("", PathAndQuery::path).trim_end_matches('/').to_owned();
        let connector = tls::https(CONNECT_TIMEOUT).map_err(|error| error.to_string())?;
        let client = Client::builder(TokioExecutor::new()).pool_idle_timeout(IDLE_TIMEOUT).build(connector);
        Ok(Self { scheme, authority, prefix, client })
    }

    /// Its address.
    pub fn url(&self) -> String {
        format!("{}://{}{}", self.scheme, self.authority, self.prefix)
    }

    /// Sends a request of a client at this address to the server, and returns its answer. The bytes of the body that are in memory
    /// are counted in `unfinished`.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn send(
        &self,
        request: Request<Incoming>,
        address: IpAddr,
        unfinished: Arc<AtomicUsize>,
    ) -> Result<Response<Incoming>, UpstreamError> {
        if names_relay(request.headers()) {
            return Err(UpstreamError::Circle);
        }
        let request = self.request(request, address, unfinished).ok_or(UpstreamError::Request)?;
        match timeout(ANSWER_TIMEOUT, self.client.request(request)).await {
            Ok(answered) => answered.map_err(|error| UpstreamError::Unreachable(tls::with_causes(&error))),
            Err(_) => Err(UpstreamError::Late),
        }
    }

    /// Returns the request as the server gets it; `None` if it has no path.
    fn request(
        &self,
        request: Request<Incoming>,
        address: IpAddr,
        unfinished: Arc<AtomicUsize>,
    ) -> Option<Request<Passing>> {
        let (mut parts, body) = request.into_parts();
        // Only the path of an absolute address is passed on: the relay is no proxy to other servers.
        let path = parts.uri.path_and_query()?.as_str();
        let uri = Uri::builder().scheme(self.scheme.clone()).authority(self.authority.clone());
        parts.uri = uri.path_and_query(format!("{}{path}", self.prefix)).build().ok()?;
        parts.version = Version::HTTP_11;
        let headers = &mut parts.headers;
        let upgrade = headers.get(header::UPGRADE).filter(|_| is_upgrade(headers)).cloned();
        remove_connection_headers(headers);
        if let Some(upgrade) = upgrade {
            headers.insert(header::UPGRADE, upgrade);
            headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        }
        let host = headers.insert(header::HOST, HeaderValue::from_str(self.authority.as_str()).ok()?);
        if let Some(host) = host.filter(|_| !headers.contains_key(FORWARDED_HOST)) {
            headers.insert(FORWARDED_HOST, host);
        }
        headers.entry(FORWARDED_PROTO).or_insert(HeaderValue::from_static("http"));
        let before = headers.get(FORWARDED_FOR).and_then(|known| known.to_str().ok());
        let addresses = before.map_or_else(|| address.to_string(), |before| format!("{before}, {address}"));
        headers.insert(FORWARDED_FOR, HeaderValue::from_str(&addresses).ok()?);
        headers.append(header::VIA, HeaderValue::from_static(VIA));
        Some(Request::from_parts(parts, Passing { body, unfinished }))
    }
}

/// The body of a request. What was passed on no longer counts as in memory.
struct Passing {
    body: Incoming,
    unfinished: Arc<AtomicUsize>,
}

impl Body for Passing {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        self.unfinished.store(0, Ordering::Relaxed);
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Whether the client asks for another protocol on the connection.
pub fn is_upgrade(headers: &HeaderMap) -> bool {
    headers.contains_key(header::UPGRADE)
        && connection_options(headers).any(|option| option.eq_ignore_ascii_case("upgrade"))
}

fn connection_options(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let values = headers.get_all(header::CONNECTION).iter();
    values.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(',')).map(str::trim)
}

/// Removes the headers that concern the connection, and not the message.
pub fn remove_connection_headers(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> =
        connection_options(headers).filter_map(|option| HeaderName::from_str(option).ok()).collect();
    for name in OF_ONE_CONNECTION.iter().chain(&named) {
        headers.remove(name);
    }
}

/// Whether the request came through a relay that passes requests on.
fn names_relay(headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::VIA).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|via| via.trim() == VIA)
}
