//! The admin port: metrics and health checks without a token, for an address that only operators reach.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use crate::transport::app::App;
use crate::transport::response::{Answer, error};
use crate::transport::{health, metrics};

/// Maximum number of connections. More than these wait.
const MAX_CONNECTIONS: usize = 64;
/// How long a connection may last, so that one that is forgotten leaves its place.
const MAX_AGE: Duration = Duration::from_secs(300);
/// Time limit for the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves the connections of `listener`. Never returns.
pub async fn accept(app: &Arc<App>, listener: &TcpListener) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let served = serve(Arc::clone(app), stream);
                app.sessions.spawn(async move {
                    let _ = timeout(MAX_AGE, served).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(error = %error, "connection to the admin port not accepted");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve(app: Arc<App>, stream: TcpStream) {
    let end = app.end.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let answer = answer(&app, &request);
        async move { Ok::<_, Infallible>(answer) }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        _ = connection.as_mut() => {}
        () = end.cancelled() => {
            connection.as_mut().graceful_shutdown();
            let _ = timeout(Duration::from_secs(1), connection).await;
        }
    }
}

fn answer<B>(app: &App, request: &Request<B>) -> Answer {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return error(StatusCode::METHOD_NOT_ALLOWED, "the admin port is read by GET");
    }
    match request.uri().path() {
        "/metrics" => metrics::answer(app),
        path => health::answer(app, path).unwrap_or_else(|| {
            error(StatusCode::NOT_FOUND, "the admin port has /metrics, /healthcheck, /livez and /readyz")
        }),
    }
}
