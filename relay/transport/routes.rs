//! The one port: connections, and which answer a path has.

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
use crate::transport::app::{App, origin_is_allowed};
use crate::transport::changes::request as changes;
use crate::transport::connection_limits::ConnectionSlot;
use crate::transport::early_refusal::Refusing;
use crate::transport::exchange::{Answered, Exchange};
use crate::transport::held_answer::Watched;
use crate::transport::intake::Intake;
use crate::transport::response::Answer;
use crate::transport::response::{error, preflight, text};
use crate::transport::socket::handshake::handshake;
use crate::transport::write_timeout::WriteTimeout;

/// An answer on its way when the relay ends gets this long.
const LAST_ANSWER: Duration = Duration::from_secs(1);
/// The largest head. Tokens travel in it, so it must hold a few of them.
const HEAD_BYTES: usize = 64 * 1024;
/// The largest body that is passed over.
const MOST_BODY: u64 = 64 * 1024;

/// Serves one connection until it ends or becomes a session.
pub async fn serve(app: Arc<App>, stream: TcpStream, address: IpAddr) {
    let place = match app.connection_limits.admit(address) {
        Ok(admitted) => Arc::new(admitted),
        Err(refused) => {
            app.observe.connection_refused(refused.why);
            return app.connection_limits.turn_away(stream, refused).await;
        }
    };
    let (watched, watching) = watch::channel(None);
    let exchange = Arc::new(Exchange::default());
    let (answering, exchanging) = (Arc::clone(&app), Arc::clone(&exchange));
    let stream = Intake::new(stream, &app.budget);
    let unfinished = stream.unfinished();
    let stream = WriteTimeout::new(stream, app.limits.write, Arc::clone(&exchange));
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
    place: Arc<ConnectionSlot>,
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
    place: Arc<ConnectionSlot>,
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
