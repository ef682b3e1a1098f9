//! The one port: the WebSocket handshake, and the pages for machines.

use std::convert::Infallible;
use std::error::Error;
use std::future::pending;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use hyper::body::{Body, Incoming};
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::feed::binding::Feed;
use crate::feed::budget::Budget;
use crate::feed::outbox::Outbox;
use crate::feed::pulse::{Cause, Pulse};
use crate::model::bookmark::{NoSessionName, SessionName};
use crate::model::claims::Claims;
use crate::model::limits::Limits;
use crate::model::phoenix::Version;
use crate::observe::Observe;
use crate::transport::admission::{Admission, Admitted};
use crate::transport::auth::{TokenError, Verifier};
use crate::transport::changes::{self, Answer};
use crate::transport::deadline::Deadline;
use crate::transport::exchange::{Answered, Exchange};
use crate::transport::intake::Intake;
use crate::transport::query::{is_unreadable, parameter, repeated};
use crate::transport::refusing::Refusing;
use crate::transport::replies::{empty, error, preflight, text};
use crate::transport::ws;

/// An answer on its way when the relay ends gets this long.
const LAST_ANSWER: Duration = Duration::from_secs(1);
/// The largest head. Tokens travel in it, so it must hold a few of them.
const HEAD_BYTES: usize = 64 * 1024;
/// The largest body that is passed over.
const MOST_BODY: u64 = 64 * 1024;

/// What every connection needs.
pub struct App {
    /// Who somebody is.
    pub verifier: Verifier,
    /// The way into the feed.
    pub feed: Feed,
    /// What is counted.
    pub observe: Arc<Observe>,
    /// Whether the feed goes on.
    pub pulse: Arc<Pulse>,
    /// Origins that browsers may connect from; empty means any.
    pub allowed_origins: Vec<String>,
    /// Who may connect.
    pub admission: Arc<Admission>,
    /// What clients may ask for and hold.
    pub limits: Limits,
    /// What may wait for all of them together.
    pub budget: Arc<Budget>,
    /// How long a client that named its session may be away.
    pub resume: Duration,
    /// The database is reached and has the relay's schema, or once was and had.
    pub prepared: Arc<AtomicBool>,
    /// The end of the relay.
    pub end: CancellationToken,
    /// Every session's task.
    pub sessions: TaskTracker,
    /// The number of the next session.
    pub numbers: AtomicU64,
}

impl App {
    /// Why clients should not be sent here, if they should not.
    fn unready(&self) -> Option<&'static str> {
        match (self.pulse.why_cut_off(), self.pulse.stalled()) {
            (Some(why), _) => Some(why),
            (None, Some(Cause::Changelog)) => Some("the changelog could not be read for too long"),
            (None, Some(Cause::Judgement)) => Some("policies could not be judged for too long"),
            (None, None) if self.observe.is_ready() => None,
            (None, None) => Some("the changelog is not being read"),
        }
    }

    /// A number that no session had before.
    pub fn next_session(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// Claims for what a client connects with. A token of an unknown key waits for the keys to be read anew.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn identify(&self, key: &str) -> Result<Claims, TokenError> {
        match self.verifier.identify(key, ws::now()) {
            Err(TokenError::Signer) => {
                if let Some(refreshed) = self.verifier.refresh_for(key) {
                    refreshed.await;
                }
                self.verifier.identify(key, ws::now())
            }
            outcome => outcome,
        }
    }
}

/// Where an answer that takes long says whose overflow ends its connection. The body of a client that does not read is
/// not polled: it cannot notice by itself.
pub type Watched = watch::Sender<Option<Arc<Outbox>>>;

/// What a client said when it connected.
pub struct Greeting {
    /// The serialisation of frames.
    pub version: Version,
    /// It wants to be told cursors.
    pub with_cursor: bool,
    /// It named its session.
    pub name: Option<SessionName>,
    /// Who it is.
    pub claims: Claims,
}

/// Serves one connection until it ends or becomes a session.
pub async fn serve(app: Arc<App>, stream: TcpStream, address: IpAddr) {
    let place = match app.admission.admit(address) {
        Ok(admitted) => Arc::new(admitted),
        Err(refused) => {
            app.observe.connection_refused(refused.why);
            return app.admission.turn_away(stream, refused).await;
        }
    };
    let (watched, watching) = watch::channel(None);
    let exchange = Arc::new(Exchange::default());
    let (answering, exchanging) = (Arc::clone(&app), Arc::clone(&exchange));
    let stream = Intake::new(stream, &app.budget);
    let unfinished = stream.unfinished();
    let stream = Deadline::new(stream, app.limits.write, Arc::clone(&exchange));
    let stream = Refusing::new(stream, Arc::clone(&exchange), Arc::clone(&unfinished), app.limits.head);
    let service = service_fn(move |request: Request<Incoming>| {
        unfinished.store(0, Ordering::Relaxed);
        let (app, place, watched) = (Arc::clone(&answering), Arc::clone(&place), watched.clone());
        let (begun, closed) = (exchanging.begin(), exchanging.closed());
        if !request.body().is_end_stream() {
            exchanging.leaves_unread();
        }
        async move {
            let answer = Box::pin(answer(app, place, request, watched, closed)).await;
            Ok::<_, Infallible>(answer.map(|body| Answered::with(body, begun)))
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        // A head that has begun is told before.
        .header_read_timeout(app.limits.head + Duration::from_secs(1))
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(connection);
    tokio::select! {
        // The overflow first: the stream would tell its end to somebody who does not listen.
        biased;
        () = overflowed(watching) => app.observe.session_full(),
        served = connection.as_mut() => if served.is_err_and(|error| is_too_slow(&error)) {
            app.observe.session_full();
        },
        () = app.end.cancelled() => {
            connection.as_mut().graceful_shutdown();
            let _ = timeout(LAST_ANSWER, connection).await;
        }
    }
}

async fn overflowed(mut watching: watch::Receiver<Option<Arc<Outbox>>>) {
    loop {
        let outbox = watching.borrow_and_update().clone();
        tokio::select! {
            () = async {
                match &outbox {
                    Some(outbox) => outbox.overflowed().await,
                    None => pending().await,
                }
            } => return,
            changed = watching.changed() => if changed.is_err() {
                pending::<()>().await;
            },
        }
    }
}

/// Whether a connection ended because its client took nothing.
fn is_too_slow(error: &hyper::Error) -> bool {
    let mut source = error.source();
    while let Some(error) = source {
        if error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == ErrorKind::TimedOut) {
            return true;
        }
        source = error.source();
    }
    false
}

/// Nobody here reads the body of a request, so a connection on which one comes ends with the answer.
async fn answer(
    app: Arc<App>,
    place: Arc<Admitted>,
    request: Request<Incoming>,
    watched: Watched,
    closed: CancellationToken,
) -> Answer {
    let has_body = !request.body().is_end_stream();
    let mut answer = if request.body().size_hint().lower() > MOST_BODY {
        let why = format!("no request of more than {MOST_BODY} bytes is taken here: send it without a body");
        error(StatusCode::PAYLOAD_TOO_LARGE, &why)
    } else if request.headers().contains_key(header::TRANSFER_ENCODING) {
        error(StatusCode::BAD_REQUEST, "a request without a body is expected here")
    } else {
        route(app, place, request, watched, closed).await
    };
    if has_body {
        answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    answer
}

async fn route(
    app: Arc<App>,
    place: Arc<Admitted>,
    request: Request<Incoming>,
    watched: Watched,
    closed: CancellationToken,
) -> Answer {
    if request.method() == Method::OPTIONS {
        return preflight();
    }
    match request.uri().path() {
        "/realtime/v1/websocket" | "/socket/websocket" => handshake(&app, place, request).await,
        "/realtime/v1/changes" if !origin_is_allowed(&app.allowed_origins, request.headers()) => {
            error(StatusCode::FORBIDDEN, "this origin is not allowed")
        }
        "/realtime/v1/changes" if request.method() != Method::GET => {
            error(StatusCode::METHOD_NOT_ALLOWED, "changes are read by GET")
        }
        // On the heap: a connection that becomes a WebSocket never needs the room.
        "/realtime/v1/changes" => {
            Box::pin(changes::serve(app, request, place.address(), watched, closed)).await
        }
        "/healthcheck" if !app.prepared.load(Ordering::Relaxed) => {
            text(StatusCode::SERVICE_UNAVAILABLE, "not ready: the database is being prepared")
        }
        "/healthcheck" | "/livez" => text(StatusCode::OK, "ok"),
        "/readyz" => match app.unready() {
            None => text(StatusCode::OK, "ready"),
            Some(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}")),
        },
        "/metrics" => text(StatusCode::OK, app.observe.text()),
        _ => error(
            StatusCode::NOT_FOUND,
            "nothing is here; the WebSocket is at /realtime/v1/websocket, changes are at /realtime/v1/changes",
        ),
    }
}

async fn handshake(app: &Arc<App>, place: Arc<Admitted>, mut request: Request<Incoming>) -> Answer {
    let refused = |status: StatusCode, why: &str| {
        app.observe.connection_refused(why);
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
        app.observe.connection_refused("a parameter is there more than once");
        return error(StatusCode::BAD_REQUEST, &twice(&name));
    }
    let Some(version) = Version::from_vsn(parameter(query, "vsn").as_deref()) else {
        app.observe.connection_refused("this version of the protocol (vsn) is not known");
        return empty(StatusCode::FORBIDDEN);
    };
    let claims = match app.identify(&shown(request.headers(), query)).await {
        Ok(claims) => claims,
        Err(why) => {
            app.observe.connection_refused(&why.advised_text());
            return error(StatusCode::UNAUTHORIZED, &why.connect_text());
        }
    };
    if app.observe.session_count() >= app.limits.connections {
        return refused(StatusCode::TOO_MANY_REQUESTS, "Too many connected users");
    }
    let with_cursor = match parameter(query, "cursor").as_deref() {
        None | Some("" | "false") => false,
        Some("true") => true,
        Some(_) => return refused(StatusCode::BAD_REQUEST, "cursor: true or false is expected"),
    };
    let name = match parameter(query, "session") {
        None if is_unreadable(query, "session") => Err(NoSessionName),
        name => name.map(|name| name.parse()).transpose(),
    };
    let name = match name {
        Ok(name) => name,
        Err(error) => return refused(StatusCode::BAD_REQUEST, &error.to_string()),
    };
    let greeting = Greeting { version, with_cursor, name, claims };
    let upgrade = hyper::upgrade::on(&mut request);
    let session = Arc::clone(app);
    app.sessions.spawn(async move {
        let Ok(upgraded) = upgrade.await else { return };
        let Some((stream, read)) = taken_over(upgraded) else { return };
        ws::serve(session, stream, read, greeting).await;
        drop(place);
    });
    let mut answer = empty(StatusCode::SWITCHING_PROTOCOLS);
    let headers = answer.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    if let Ok(accept) = HeaderValue::from_str(&derive_accept_key(key.as_bytes())) {
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    }
    answer
}

/// The bare connection, and what was read of it beyond the request. The reader's buffer of 8 KiB ends here: held by
/// the session's future it would be most of what an idle client costs.
fn taken_over(upgraded: Upgraded) -> Option<(Intake, Vec<u8>)> {
    let parts = upgraded.downcast::<TokioIo<Refusing>>().ok()?;
    Some((parts.io.into_inner().into_inner(), parts.read_buf.to_vec()))
}

/// What is said of a parameter that a request has more than once.
pub(super) fn twice(name: &str) -> String {
    let name: String = name.chars().take(40).collect();
    format!("{name}: this parameter is there more than once, nobody knows which of them is meant")
}

/// The key or token that a handshake shows.
fn shown(headers: &HeaderMap, query: &str) -> String {
    let header = headers.get("x-api-key").and_then(|value| value.to_str().ok()).map(str::to_owned);
    header.or_else(|| parameter(query, "apikey")).unwrap_or_default()
}

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

/// Without a list any origin may connect; with one, a browser's must be on it. Others send no origin.
fn origin_is_allowed(allowed: &[String], headers: &HeaderMap) -> bool {
    match headers.get(header::ORIGIN) {
        None => true,
        Some(_) if allowed.is_empty() => true,
        Some(origin) => {
            origin.to_str().is_ok_and(|origin| allowed.iter().any(|one| one.eq_ignore_ascii_case(origin)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_count_only_against_a_list() {
        let mut headers = HeaderMap::new();
        let list = [String::from("https://app.example")];
        assert!(origin_is_allowed(&list, &headers));
        headers.insert(header::ORIGIN, HeaderValue::from_static("https://evil.example"));
        assert!(origin_is_allowed(&[], &headers));
        assert!(!origin_is_allowed(&list, &headers));
        headers.insert(header::ORIGIN, HeaderValue::from_static("https://APP.example"));
        assert!(origin_is_allowed(&list, &headers));
    }
}
