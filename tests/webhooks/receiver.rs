//! A receiver of webhooks, which writes down what it gets and answers as a test says.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::future::pending;
use futures_util::stream::unfold;
use hmac::{Hmac, Mac};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::Value;
use sha2::Sha256;
use tokio::net::TcpListener;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::sleep;
use tokio_rustls::TlsAcceptor;

/// A request that came.
#[derive(Debug, Clone)]
pub struct Received {
    /// The header `webhook-id`.
    pub id: String,
    /// The header `webhook-timestamp`.
    pub timestamp: u64,
    /// The header `webhook-signature`.
    pub signature: String,
    /// The body as it came.
    pub text: String,
    /// The same as JSON.
    pub body: Value,
    /// When it came.
    pub at: Instant,
    /// How often this id had come before.
    pub repeats: usize,
}

impl Received {
    /// The number of the change; 0 for a gap.
    pub fn number(&self) -> u64 {
        self.body["number"].as_str().and_then(|number| number.parse().ok()).unwrap_or_default()
    }

    /// Whether one of its signatures is by this secret.
    pub fn is_signed_by(&self, secret: &str) -> bool {
        let key = STANDARD.decode(secret.strip_prefix("whsec_").unwrap()).unwrap();
        let mut mac = Hmac::<Sha256>::new_from_slice(&key).unwrap();
        mac.update(format!("{}.{}.{}", self.id, self.timestamp, self.text).as_bytes());
        let expected = format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()));
        self.signature.split(' ').any(|signature| signature == expected)
    }
}

/// What it does with a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Reaction {
    /// Answers with this status.
    Status(u16),
    /// The same with a header.
    With(u16, &'static str, String),
    /// Answers with 200 after this time.
    Late(Duration),
    /// Never answers.
    Hang,
    /// Closes the connection without an answer.
    Close,
    /// Answers with 200, and closes the connection within the body.
    Cut,
}

type React = Box<dyn Fn(&Received) -> Reaction + Send>;
type Answer = Result<Response<UnsyncBoxBody<Bytes, io::Error>>, io::Error>;

/// The receiver. It listens until it is dropped.
pub struct Receiver {
    address: SocketAddr,
    scheme: &'static str,
    state: Arc<State>,
    listening: Mutex<Option<AbortHandle>>,
}

struct State {
    react: Mutex<React>,
    received: Mutex<Vec<Received>>,
    /// Those that were answered with success, by the order of the answers.
    taken: Mutex<Vec<Received>>,
}

impl Receiver {
    /// One that takes everything.
    pub async fn start() -> Self {
        Self::reacting(|_| Reaction::Status(200)).await
    }

    /// One that reacts like this.
    pub async fn reacting(react: impl Fn(&Received) -> Reaction + Send + 'static) -> Self {
        Self::new(react, "http").await
    }

    /// One that speaks TLS as `localhost`, by the word of the authority in `tests/support/tls`.
    pub async fn tls() -> Self {
        Self::new(|_| Reaction::Status(200), "https").await
    }

    async fn new(react: impl Fn(&Received) -> Reaction + Send + 'static, scheme: &'static str) -> Self {
        let state =
            State { react: Mutex::new(Box::new(react)), received: Mutex::default(), taken: Mutex::default() };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let receiver = Self { address, scheme, state: Arc::new(state), listening: Mutex::default() };
        receiver.listen(listener);
        receiver
    }

    fn listen(&self, listener: TcpListener) {
        let state = Arc::clone(&self.state);
        let tls = (self.scheme == "https").then(acceptor);
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (state, tls) = (Arc::clone(&state), tls.clone());
                let service = service_fn(move |request| answer(Arc::clone(&state), request));
                connections.spawn(async move {
                    let server = http1::Builder::new();
                    match tls {
                        None => _ = server.serve_connection(TokioIo::new(stream), service).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                let _ = server.serve_connection(TokioIo::new(stream), service).await;
                            }
                        }
                    }
                });
            }
        });
        *self.listening.lock().unwrap() = Some(accepting.abort_handle());
    }

    /// Its URL.
    pub fn url(&self) -> String {
        let host = if self.scheme == "https" { "localhost" } else { "127.0.0.1" };
        format!("{}://{host}:{}/hook?token=canary-path", self.scheme, self.address.port())
    }

    /// From now on it reacts like this.
    pub fn react(&self, react: impl Fn(&Received) -> Reaction + Send + 'static) {
        *self.state.react.lock().unwrap() = Box::new(react);
    }

    /// Closes all connections, and listens no more.
    pub fn go_away(&self) {
        if let Some(listening) = self.listening.lock().unwrap().take() {
            listening.abort();
        }
    }

    /// Listens again.
    pub async fn come_back(&self) {
        crate::support::eventually("the port is free", || async {
            let listener = TcpListener::bind(self.address).await.ok()?;
            self.listen(listener);
            Some(())
        })
        .await;
    }

    /// All requests, in the order in which they came.
    pub fn received(&self) -> Vec<Received> {
        self.state.received.lock().unwrap().clone()
    }

    /// Those that it has taken.
    pub fn taken(&self) -> Vec<Received> {
        self.state.taken.lock().unwrap().clone()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.go_away();
    }
}

fn acceptor() -> TlsAcceptor {
    let pem = include_bytes!("../support/tls/localhost.pem");
    let certificate = CertificateDer::from_pem_slice(pem).unwrap();
    let key = PrivateKeyDer::from_pem_slice(pem).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = config.unwrap().with_no_client_auth().with_single_cert(vec![certificate], key);
    TlsAcceptor::from(Arc::new(config.unwrap()))
}

async fn answer(state: Arc<State>, request: Request<Incoming>) -> Answer {
    let (head, body) = request.into_parts();
    let header = |name: &str| head.headers[name].to_str().unwrap().to_owned();
    let text = String::from_utf8(body.collect().await.map_err(io::Error::other)?.to_bytes().into()).unwrap();
    assert_eq!((head.method.as_str(), header("content-type").as_str()), ("POST", "application/json"));
    let received = {
        let mut all = state.received.lock().unwrap();
        let id = header("webhook-id");
        let repeats = all.iter().filter(|one| one.id == id).count();
        let (timestamp, signature) =
            (header("webhook-timestamp").parse().unwrap(), header("webhook-signature"));
        let (body, at) = (serde_json::from_str(&text).unwrap(), Instant::now());
        all.push(Received { id, timestamp, signature, text, body, at, repeats });
        all.last().unwrap().clone()
    };
    let reaction = (state.react.lock().unwrap())(&received);
    let empty = || Empty::new().map_err(|never: Infallible| match never {}).boxed_unsync();
    let status = |status: u16| Response::builder().status(status);
    let response = match reaction {
        Reaction::Status(code) => status(code).body(empty()),
        Reaction::With(code, name, value) => status(code).header(name, value).body(empty()),
        Reaction::Late(pause) => {
            sleep(pause).await;
            status(200).body(empty())
        }
        Reaction::Hang => pending().await,
        Reaction::Close => return Err(io::Error::other("closed")),
        Reaction::Cut => {
            // The head goes out before the end.
            let pieces = unfold(0, |n| async move {
                sleep(Duration::from_millis(n * 100)).await;
                let piece =
                    if n == 0 { Ok(Frame::data(Bytes::from("o"))) } else { Err(io::Error::other("cut")) };
                Some((piece, n + 1))
            });
            let body = StreamBody::new(pieces).boxed_unsync();
            status(200).header("content-length", "100").body(body)
        }
    };
    let response = response.unwrap();
    if response.status().is_success() {
        state.taken.lock().unwrap().push(received);
    }
    Ok(response)
}
