//! Fetches one small document over HTTP. The server is not trusted otherwise: its address, the duration and the size are limited.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper::client::conn::http1;
use hyper::header::{self, HeaderValue};
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, lookup_host};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::tls;

/// Time limit for the whole fetch, including name resolution.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit for connecting to one address, so that an unreachable one does not use up the time of the others.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// The URL to fetch, parsed, and the restrictions on it.
pub struct Endpoint {
    host: String,
    port: u16,
    path: Uri,
    authority: HeaderValue,
    /// None for plain HTTP.
    tls: Option<TlsConnector>,
    allow_private: bool,
}

/// Why a fetch failed. Contains nothing that the server sent, except its status.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The time limit was exceeded.
    #[error("no answer within {} seconds", FETCH_TIMEOUT.as_secs())]
    Slow,
    /// The name has no address.
    #[error("{0} cannot be resolved: {1}")]
    Unresolved(String, io::Error),
    /// The address is private, which needs `--jwks-allow-private`.
    #[error("{0} is not a public address; --jwks-allow-private allows it")]
    Private(IpAddr),
    /// Plain HTTP to a public address.
    #[error("{0} is a public address, use https://")]
    Plain(IpAddr),
    /// No connection, or no trusted TLS.
    #[error("no connection: {0}")]
    Unreachable(#[from] io::Error),
    /// The answer is not HTTP, or incomplete.
    #[error("no HTTP answer: {0}")]
    Broken(#[from] hyper::Error),
    /// The answer is a redirect.
    #[error("status {0}: redirects are not followed")]
    Redirect(u16),
    /// The answer has an error status.
    #[error("status {0}")]
    Status(u16),
    /// The answer is too long.
    #[error("the answer is longer than {0} bytes")]
    Large(usize),
    /// The answer is not UTF-8.
    #[error("the answer is not UTF-8")]
    NotText,
}

impl Endpoint {
    /// Parses a URL. Private addresses need `allow_private`. Plain HTTP is only for private addresses.
    ///
    /// # Errors
    /// If the URL is never fetched; the text says why.
    pub fn parse(url: &str, allow_private: bool) -> Result<Self, String> {
        let uri = Uri::from_str(url).map_err(|error| error.to_string())?;
        let tls = match uri.scheme_str() {
            Some("https") => {
                let client = tls::trusting(None).map_err(|error| error.to_string())?;
                Some(TlsConnector::from(Arc::new(client)))
            }
            Some("http") if allow_private => None,
            Some("http") => {
                return Err("http:// is only for private addresses, with --jwks-allow-private".to_owned());
            }
            _ => return Err("https:// is expected".to_owned()),
        };
        let authority = uri.authority().ok_or("there is no host in it")?;
        if authority.as_str().contains('@') {
            return Err("a name or password in it is not supported".to_owned());
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        if let (Ok(address), false) = (host.parse(), allow_private)
            && !is_public(address)
        {
            return Err(FetchError::Private(address).to_string());
        }
        let port = authority.port_u16().unwrap_or(if tls.is_some() { 443 } else { 80 });
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        Ok(Self {
            host,
            port,
            path: path.parse().map_err(|_| "its path cannot be read")?,
            authority: HeaderValue::from_str(authority.as_str()).map_err(|_| "its host cannot be read")?,
            tls,
            allow_private,
        })
    }

    /// Returns the host, for logs. The rest of the URL may contain secrets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Fetches the document, a UTF-8 text of at most `max_bytes`.
    ///
    /// # Errors
    /// If it cannot be fetched, or is something else.
    pub async fn fetch(&self, max_bytes: usize) -> Result<String, FetchError> {
        let fetched = timeout(FETCH_TIMEOUT, async {
            let stream = self.connect().await?;
            match &self.tls {
                None => self.request(stream, max_bytes).await,
                Some(tls) => {
                    let name = ServerName::try_from(self.host.clone()).map_err(io::Error::other)?;
                    self.request(tls.connect(name, stream).await?, max_bytes).await
                }
            }
        });
        fetched.await.unwrap_or(Err(FetchError::Slow))
    }

    /// Resolves the name once and connects to an address that was checked, so that a second lookup cannot change it.
    async fn connect(&self) -> Result<TcpStream, FetchError> {
        let unresolved = |error| FetchError::Unresolved(self.host.clone(), error);
        let found: Vec<SocketAddr> =
            lookup_host((self.host.as_str(), self.port)).await.map_err(unresolved)?.collect();
        let mut outcome = FetchError::Unresolved(self.host.clone(), io::ErrorKind::NotFound.into());
        for address in found {
            match self.permits(address.ip()) {
                Ok(()) => match timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
                    Ok(Ok(stream)) => return Ok(stream),
                    Ok(Err(error)) => outcome = FetchError::Unreachable(error),
                    Err(_) => outcome = FetchError::Unreachable(io::ErrorKind::TimedOut.into()),
                },
                Err(refused) => outcome = refused,
            }
        }
        Err(outcome)
    }

    fn permits(&self, address: IpAddr) -> Result<(), FetchError> {
        match is_public(address) {
            false if !self.allow_private => Err(FetchError::Private(address)),
            true if self.tls.is_none() => Err(FetchError::Plain(address)),
            _ => Ok(()),
        }
    }

    /// Requests the document over a connection.
    async fn request<S>(&self, stream: S, max_bytes: usize) -> Result<String, FetchError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // Dropping the set ends the connection when this call returns.
        let mut driver = JoinSet::new();
        driver.spawn(connection);
        let mut request = Request::new(Empty::<Bytes>::new());
        *request.uri_mut() = self.path.clone();
        let headers = request.headers_mut();
        headers.insert(header::HOST, self.authority.clone());
        headers.insert(header::ACCEPT, HeaderValue::from_static("application/json"));
        headers.insert(header::USER_AGENT, HeaderValue::from_static("relay"));
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        let answer = sender.send_request(request).await?;
        match answer.status() {
            StatusCode::OK => {}
            status if status.is_redirection() => return Err(FetchError::Redirect(status.as_u16())),
            status => return Err(FetchError::Status(status.as_u16())),
        }
        let body = Limited::new(answer.into_body(), max_bytes).collect().await;
        let body = body.map_err(|error| match error.downcast::<hyper::Error>() {
            Ok(error) => FetchError::Broken(*error),
            Err(error) if error.is::<LengthLimitError>() => FetchError::Large(max_bytes),
            Err(error) => FetchError::Unreachable(io::Error::other(error)),
        })?;
        String::from_utf8(body.to_bytes().into()).map_err(|_| FetchError::NotText)
    }
}

/// Whether an address is on the public internet: not loopback, private, link-local or reserved.
fn is_public(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    !(address.is_private()
        || address.is_loopback()
        || address.is_link_local()
        || address.is_multicast()
        || address.is_documentation()
        || a == 0
        || a >= 240
        // Shared between a provider and its customers, protocol assignments, benchmarks.
        || (a == 100 && b & 0xc0 == 64)
        || (a, b, c) == (192, 0, 0)
        || (a == 198 && b & 0xfe == 18))
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let segments = address.segments();
    match segments {
        // NAT64: as public as the IPv4 address it maps.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => {
            let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
            is_public_v4(Ipv4Addr::new(a, b, c, d))
        }
        // Tunnels that can embed any IPv4 address, protocol assignments, documentation.
        [0x2001, second, ..] if second < 0x200 || second == 0xdb8 => false,
        [0x2002, ..] => false,
        [0x3fff, second, ..] if second < 0x1000 => false,
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_and_reserved_addresses_are_not_public() {
        for address in [
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "169.254.169.254",
            "0.0.0.0",
            "100.64.0.1",
            "192.0.0.8",
            "192.0.2.1",
            "198.18.0.1",
            "198.19.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::127.0.0.1",
            "fe80::1",
            "fc00::1",
            "fd12::1",
            "fec0::1",
            "ff02::1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "2002:7f00:1::",
            "2001::1",
            "2001:db8::1",
            "3fff::1",
        ] {
            assert!(!is_public(address.parse().unwrap()), "{address}");
        }
        for address in [
            "1.1.1.1",
            "8.8.8.8",
            "172.32.0.1",
            "100.128.0.1",
            "198.20.0.1",
            "192.0.1.1",
            "::ffff:8.8.8.8",
            "2606:4700::1111",
            "2001:4860:4860::8888",
            "64:ff9b::808:808",
            "2a00::1",
        ] {
            assert!(is_public(address.parse().unwrap()), "{address}");
        }
    }

    #[test]
    fn only_https_is_fetched_from_public_places() {
        let check = |url: &str, allow_private, refused: Option<&str>| {
            let error = Endpoint::parse(url, allow_private).err();
            assert_eq!(error.as_deref(), refused, "{url}");
        };
        check("https://id.example/jwks.json?v=1", false, None);
        check("HTTPS://id.example", false, None);
        check("https://[2606:4700::1111]:8443/", false, None);
        let plain = "http:// is only for private addresses, with --jwks-allow-private";
        check("http://id.example/", false, Some(plain));
        check("http://localhost:1/", true, None);
        for private in ["127.0.0.1", "169.254.169.254", "::1"] {
            let host = if private.contains(':') { format!("[{private}]") } else { private.to_owned() };
            let refused = format!("{private} is not a public address; --jwks-allow-private allows it");
            check(&format!("https://{host}/"), false, Some(&refused));
            check(&format!("https://{host}/"), true, None);
        }
        check("https://ann:secret@id.example/", false, Some("a name or password in it is not supported"));
        check("ftp://id.example/", false, Some("https:// is expected"));
        assert!(Endpoint::parse("https://", true).is_err());
    }
}
