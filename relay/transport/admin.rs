//! The admin port: metrics and health checks without a token, and the inspector, for an address that only operators reach.

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::transport::app::App;
use crate::transport::inspector::request as inspector;
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
            Ok((stream, address)) => {
                let served = serve(Arc::clone(app), stream, address.ip());
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

async fn serve(app: Arc<App>, stream: TcpStream, address: IpAddr) {
    let end = app.end.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let app = Arc::clone(&app);
        async move { Ok::<_, Infallible>(answer(app, request, address).await) }
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

async fn answer(app: Arc<App>, request: Request<Incoming>, address: IpAddr) -> Answer {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return error(StatusCode::METHOD_NOT_ALLOWED, "the admin port is read by GET");
    }
    match request.uri().path() {
        "/metrics" => metrics::answer(&app),
        path if inspector::is_inspector(path) => {
            let (watched, _) = watch::channel(None);
            // Dropping the answer ends what it follows.
            Box::pin(inspector::serve(app, request, address, watched, CancellationToken::new())).await
        }
        path => health::answer(&app, path).unwrap_or_else(|| {
            let why = "the admin port has /inspector, /metrics, /healthcheck, /livez and /readyz";
            error(StatusCode::NOT_FOUND, why)
        }),
    }
}
