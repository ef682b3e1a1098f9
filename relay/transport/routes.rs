//! Serves the connections of the listening port and dispatches requests by path.

use std::convert::Infallible;
use std::error::Error;
use std::future::pending;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hyper::body::{Body, Incoming};
use hyper::header::{self, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::feed::deliver::outbox::Outbox;
use crate::observe::{Refusal, RefusalReason};
use crate::transport::app::App;
use crate::transport::broadcast::request as broadcast;
use crate::transport::changes::request as changes;
use crate::transport::connection_limits::ConnectionSlot;
use crate::transport::early_refusal::EarlyRefusal;
use crate::transport::exchange::{Answered, Exchange};
use crate::transport::explain;
use crate::transport::health;
use crate::transport::held_answer::WatchedOutbox;
use crate::transport::inspector::request as inspector;
use crate::transport::intake::Intake;
use crate::transport::maintenance;
use crate::transport::metrics;
use crate::transport::presence;
use crate::transport::proxy::{self, PassedRequest};
use crate::transport::response::Answer;
use crate::transport::response::{error, preflight};
use crate::transport::socket::handshake::handshake;
use crate::transport::write_timeout::WriteTimeout;

/// Time limit for an answer that is being written when the relay shuts down.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum size of a request head. It must hold several tokens.
const MAX_HEAD_BYTES: usize = 64 * 1024;
/// Maximum size of a request body that is ignored; a larger one is refused.
const MAX_IGNORED_BODY: u64 = 64 * 1024;

/// Serves one connection until it ends or becomes a session.
pub async fn serve(app: Arc<App>, stream: TcpStream, address: IpAddr) {
    let slot = match app.connection_limits.admit(address) {
        Ok(admitted) => Arc::new(admitted),
        Err(refused) => {
            let (reason, why) = (RefusalReason::Limit, refused.why);
            app.observe.connection_refused(&Refusal { reason, address, path: None, sub: None, why });
            return app.connection_limits.refuse(stream, refused).await;
        }
    };
    let (watched, watching) = watch::channel(None);
    let exchange = Arc::new(Exchange::default());
    let (answering, exchanging) = (Arc::clone(&app), Arc::clone(&exchange));
    let stream = Intake::new(stream, &app.budget);
    let unfinished = stream.unfinished();
    let stream = WriteTimeout::new(stream, app.limits.write, Arc::clone(&exchange));
    let stream = EarlyRefusal::new(stream, Arc::clone(&exchange), Arc::clone(&unfinished), app.limits.head);
    let service = service_fn(move |request: Request<Incoming>| {
        unfinished.store(0, Ordering::Relaxed);
        let (app, slot, watched) = (Arc::clone(&answering), Arc::clone(&slot), watched.clone());
        let begun = exchanging.begin();
        let (exchange, unfinished) = (Arc::clone(&exchanging), Arc::clone(&unfinished));
        let reads_body = reads_body(request.uri().path());
        async move {
            let answer = match app.upstream.as_ref().filter(|_| !is_own(&app, request.uri().path())) {
                Some(upstream) => {
                    let closed = exchange.closed();
                    let passed = PassedRequest { request, slot, unfinished: Arc::clone(&unfinished), closed };
                    Box::pin(proxy::pass(&app, upstream, passed)).await
                }
                None => Box::pin(answer(Arc::clone(&app), slot, request, watched, &exchange)).await,
            };
            if reads_body {
                // What was counted is the body, and no incomplete head.
                unfinished.store(0, Ordering::Relaxed);
            }
            app.observe.answered(answer.status().as_u16());
            Ok::<_, Infallible>(answer.map(|body| Answered::with(body, begun)))
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        // Longer than the limit of `EarlyRefusal`, which answers an incomplete head before hyper closes the connection.
        .header_read_timeout(app.limits.head + Duration::from_secs(1))
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(connection);
    tokio::select! {
        // Poll the overflow first: the client is not reading, so the stream could not deliver its end.
        biased;
        () = overflowed(watching) => app.observe.session_full(),
        served = connection.as_mut() => if served.is_err_and(|error| is_write_timeout(&error)) {
            app.observe.session_full();
        },
        () = app.end.cancelled() => {
            connection.as_mut().graceful_shutdown();
            let _ = timeout(SHUTDOWN_TIMEOUT, connection).await;
        }
    }
}

/// Completes when the watched outbox overflows.
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

/// Whether a connection ended because the client did not read.
fn is_write_timeout(error: &hyper::Error) -> bool {
    let mut source = error.source();
    while let Some(error) = source {
        if error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == ErrorKind::TimedOut) {
            return true;
        }
        source = error.source();
    }
    false
}

/// Whether requests of this path have a body.
fn reads_body(path: &str) -> bool {
    broadcast::is_broadcast(path) || maintenance::is_maintenance(path)
}

/// Answers a request. The bodies of broadcasts and maintenance are read. The connection is closed after a request whose body was not.
async fn answer(
    app: Arc<App>,
    slot: Arc<ConnectionSlot>,
    request: Request<Incoming>,
    watched: WatchedOutbox,
    exchange: &Exchange,
) -> Answer {
    let has_body = !request.body().is_end_stream();
    if request.method() != Method::OPTIONS && reads_body(request.uri().path()) {
        let (mut answer, is_read) = match maintenance::is_maintenance(request.uri().path()) {
            true => Box::pin(maintenance::serve(&app, slot.address(), request)).await,
            false => Box::pin(broadcast::serve(&app, slot.address(), request)).await,
        };
        if has_body && !is_read {
            exchange.leaves_unread();
            answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        return answer;
    }
    if has_body {
        exchange.leaves_unread();
    }
    let mut answer = if request.body().size_hint().lower() > MAX_IGNORED_BODY {
        let why =
            format!("the body is larger than {MAX_IGNORED_BODY} bytes: send the request without a body");
        error(StatusCode::PAYLOAD_TOO_LARGE, &why)
    } else if request.headers().contains_key(header::TRANSFER_ENCODING) {
        error(StatusCode::BAD_REQUEST, "a request without a body is expected here")
    } else {
        route(app, slot, request, watched, exchange.closed()).await
    };
    if has_body {
        answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    answer
}

async fn route(
    app: Arc<App>,
    slot: Arc<ConnectionSlot>,
    request: Request<Incoming>,
    watched: WatchedOutbox,
    closed: CancellationToken,
) -> Answer {
    if request.method() == Method::OPTIONS {
        return preflight();
    }
    match request.uri().path() {
        "/realtime/v1/websocket" | "/socket/websocket" => handshake(&app, slot, request).await,
        // Boxed: a connection that becomes a WebSocket never needs the memory of this future.
        "/realtime/v1/changes" => {
            Box::pin(changes::serve(app, request, slot.address(), watched, closed)).await
        }
        "/realtime/v1/explain" => Box::pin(explain::serve(&app, &request, slot.address())).await,
        "/realtime/v1/presence" => Box::pin(presence::serve(&app, slot.address(), &request)).await,
        "/metrics" => Box::pin(metrics::serve(&app, &request, slot.address())).await,
        path if has_inspector(&app, path) => {
            Box::pin(inspector::serve(app, request, slot.address(), watched, closed)).await
        }
        path => {
            if let Some(answer) = health::answer(&app, path) {
                return answer;
            }
            if is_of_client(path) {
                let (reason, address) = (RefusalReason::Path, slot.address());
                app.observe.request_refused(&Refusal {
                    reason,
                    address,
                    path: Some(path),
                    sub: None,
                    why: NOTHING_HERE,
                });
            }
            error(StatusCode::NOT_FOUND, NOTHING_HERE)
        }
    }
}

/// Whether the listening port has the inspector at this path: an admin port has it instead.
fn has_inspector(app: &App, path: &str) -> bool {
    !app.has_admin_port && inspector::is_inspector(path)
}

/// Whether the relay answers this path itself, and never a server behind it.
fn is_own(app: &App, path: &str) -> bool {
    let below =
        |base: &str| path.strip_prefix(base).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    below("/realtime/v1")
        || maintenance::is_maintenance(path)
        || has_inspector(app, path)
        || health::PATHS.contains(&path)
        || ["/socket/websocket", "/metrics"].contains(&path)
}

const NOTHING_HERE: &str = "there is nothing at this path; the WebSocket is at /realtime/v1/websocket, changes are at /realtime/v1/changes, \
    broadcasts at /realtime/v1/api/broadcast, presence at /realtime/v1/presence, explanations at /realtime/v1/explain";

/// Whether a client with a wrong address, rather than a probe or a scanner, may have meant this path.
fn is_of_client(path: &str) -> bool {
    path.len() < 200 && ["realtime", "websocket", "socket", "changes"].iter().any(|part| path.contains(part))
}
