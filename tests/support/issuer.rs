//! An issuer of tokens: key pairs of its own, JWK sets that publish some of them, and the server that is asked for them.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use futures_util::future::pending;
use futures_util::stream::unfold;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::Response;
use hyper::body::Frame;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use jsonwebtoken::{Algorithm, EncodingKey, crypto};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::AbortHandle;
use tokio::time::sleep;
use tokio_rustls::TlsAcceptor;

/// The public halves of the Ed25519 keys whose seeds are 32 times 1, 2 and 3; the names are `key-1` and so on.
const PUBLIC: [&str; 3] = [
    "iojj3XQJ8ZX9UtstPLpdcspnCb8dlBIb83SIAbQPb1w",
    "gTl3Dqh9F19Wo1Rmw0x-zMuNipG07jeiXfYPW4_Js5Q",
    "7UkoxijRwsbq6QM4kFmVYSlZJzpcY_k2NsFGFKyHN9E",
];

/// The set of these keys, counted from 1.
pub fn jwks(keys: &[usize]) -> String {
    let jwk =
        |n: &usize| json!({"kid": format!("key-{n}"), "kty": "OKP", "crv": "Ed25519", "x": PUBLIC[n - 1]});
    json!({"keys": keys.iter().map(jwk).collect::<Vec<_>>()}).to_string()
}

/// A token of this role that this key signed.
pub fn signed(n: usize, role: &str) -> String {
    signed_as(n, &json!(format!("key-{n}")), role)
}

/// The same with another `kid` in its header.
pub fn signed_as(n: usize, kid: &Value, role: &str) -> String {
    let header = json!({"alg": "EdDSA", "typ": "JWT", "kid": kid}).to_string();
    let payload = json!({"role": role, "exp": 4_000_000_000_u64, "by": n}).to_string();
    let message = [header, payload].map(|part| URL_SAFE_NO_PAD.encode(part)).join(".");
    let private = [&b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20"[..], &[n as u8; 32]];
    let key = EncodingKey::from_ed_der(&private.concat());
    let signature = crypto::sign(message.as_bytes(), &key, Algorithm::EdDSA).unwrap();
    format!("{message}.{signature}")
}

/// How the server answers.
#[derive(Clone)]
pub enum Behaviour {
    /// With this text.
    Text(String),
    /// With this status and a JWK set that must not count.
    Status(u16),
    /// With a redirect to this URL.
    Redirect(String),
    /// With a JWK set that is preceded by 100 MB of blanks.
    Long,
    /// With a JWK set of which a blank comes every 100 ms, for ever.
    Drip,
    /// Not at all.
    Silent,
}

/// An HTTP server on loopback. It listens until it is dropped.
pub struct Issuer {
    /// Where it listens.
    pub address: SocketAddr,
    state: Arc<State>,
    accepting: AbortHandle,
}

struct State {
    behaviour: Mutex<Behaviour>,
    connections: AtomicUsize,
    /// MiB of long answers that were taken from it.
    sent: AtomicUsize,
}

impl Issuer {
    /// One that behaves like this.
    pub async fn start(behaviour: Behaviour) -> Self {
        Self::at("127.0.0.1:0".parse().unwrap(), behaviour).await
    }

    /// One that speaks TLS as `localhost`, by the word of the authority in `tests/support/tls`.
    pub async fn start_tls(behaviour: Behaviour) -> Self {
        // Made with openssl, good for a hundred years; the authority's own key is gone.
        let pem = include_bytes!("tls/localhost.pem");
        let certificate = CertificateDer::from_pem_slice(pem).unwrap();
        let key = PrivateKeyDer::from_pem_slice(pem).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.unwrap().with_no_client_auth().with_single_cert(vec![certificate], key);
        let tls = TlsAcceptor::from(Arc::new(config.unwrap()));
        Self::listen("127.0.0.1:0".parse().unwrap(), behaviour, Some(tls)).await
    }

    /// One at a known address.
    pub async fn at(address: SocketAddr, behaviour: Behaviour) -> Self {
        Self::listen(address, behaviour, None).await
    }

    async fn listen(address: SocketAddr, behaviour: Behaviour, tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let counts = || AtomicUsize::new(0);
        let state =
            Arc::new(State { behaviour: Mutex::new(behaviour), connections: counts(), sent: counts() });
        let shared = Arc::clone(&state);
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                shared.connections.fetch_add(1, Ordering::SeqCst);
                let state = Arc::clone(&shared);
                let service = service_fn(move |_| answer(Arc::clone(&state)));
                let server = http1::Builder::new();
                match tls.clone() {
                    None => _ = tokio::spawn(server.serve_connection(TokioIo::new(stream), service)),
                    Some(tls) => {
                        tokio::spawn(async move {
                            if let Ok(stream) = tls.accept(stream).await {
                                let _ = server.serve_connection(TokioIo::new(stream), service).await;
                            }
                        });
                    }
                }
            }
        });
        Self { address, state, accepting: accepting.abort_handle() }
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("http://{}/jwks.json", self.address)
    }

    /// From now on it behaves like this.
    pub fn behave(&self, behaviour: Behaviour) {
        *self.state.behaviour.lock().unwrap() = behaviour;
    }

    /// From now on it publishes these keys.
    pub fn publish(&self, keys: &[usize]) {
        self.behave(Behaviour::Text(jwks(keys)));
    }

    /// How often it was connected to: once for each question.
    pub fn asked(&self) -> usize {
        self.state.connections.load(Ordering::SeqCst)
    }

    /// How many MiB of long answers left it.
    pub fn sent(&self) -> usize {
        self.state.sent.load(Ordering::SeqCst)
    }
}

impl Drop for Issuer {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn answer(state: Arc<State>) -> Result<Response<UnsyncBoxBody<Bytes, Infallible>>, Infallible> {
    let whole = |status: u16, text: String| {
        Response::builder().status(status).body(Full::new(Bytes::from(text)).boxed_unsync()).unwrap()
    };
    let behaviour = state.behaviour.lock().unwrap().clone();
    Ok(match behaviour {
        Behaviour::Text(text) => whole(200, text),
        Behaviour::Status(status) => whole(status, jwks(&[3])),
        Behaviour::Redirect(to) => {
            let mut answer = whole(302, jwks(&[3]));
            answer.headers_mut().insert("location", to.parse().unwrap());
            answer
        }
        Behaviour::Long => {
            let pieces = unfold((0, state), |(n, state)| async move {
                state.sent.fetch_add(1, Ordering::SeqCst);
                let piece = if n < 100 { " ".repeat(1 << 20) } else { jwks(&[3]) };
                (n <= 100).then(|| (Ok(Frame::data(Bytes::from(piece))), (n + 1, state)))
            });
            Response::new(StreamBody::new(pieces).boxed_unsync())
        }
        Behaviour::Drip => {
            let pieces = unfold(jwks(&[3]), |piece| async move {
                sleep(Duration::from_millis(100)).await;
                Some((Ok(Frame::data(Bytes::from(piece))), String::from(" ")))
            });
            Response::new(StreamBody::new(pieces).boxed_unsync())
        }
        Behaviour::Silent => pending().await,
    })
}
