//! Passes requests for paths that are not the relay's on to the server behind it (`--upstream`), so that clients need one address:
//! bodies are streamed both ways, and a connection that both sides upgrade is passed on byte by byte.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::upgrade::OnUpgrade;
use hyper::{Request, Response, StatusCode, Version};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncWriteExt, copy};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::transport::app::App;
use crate::transport::connection_limits::ConnectionSlot;
use crate::transport::early_refusal::into_connection;
use crate::transport::response::{Answer, empty, error};
use crate::transport::upstream::{Upstream, UpstreamError, is_upgrade, remove_connection_headers};

/// A request for the server, and its connection.
pub struct PassedRequest {
    /// The request.
    pub request: Request<Incoming>,
    /// The slot of its connection.
    pub slot: Arc<ConnectionSlot>,
    /// Number of bytes of it that are in memory.
    pub unfinished: Arc<AtomicUsize>,
    /// Cancelled when the client has closed its side.
    pub closed: CancellationToken,
}

/// Passes a request on, and its answer back.
pub async fn pass(app: &Arc<App>, upstream: &Upstream, passed: PassedRequest) -> Answer {
    let PassedRequest { mut request, slot, unfinished, closed } = passed;
    app.observe.upstream_requested();
    let upgrade = is_upgrade(request.headers()).then(|| hyper::upgrade::on(&mut request));
    let gone = Gone { closed, grace: app.limits.write };
    let answered = tokio::select! {
        answered = upstream.send(request, slot.address(), unfinished) => answered,
        () = gone.wait() => return error(StatusCode::BAD_REQUEST, "the client closed the connection"),
    };
    match (answered, upgrade) {
        (Err(failed), _) => not_answered(app, &failed),
        (Ok(answer), Some(client)) if answer.status() == StatusCode::SWITCHING_PROTOCOLS => {
            upgraded(app, slot, client, answer)
        }
        (Ok(answer), _) => passed_back(answer, gone),
    }
}

fn not_answered(app: &App, failed: &UpstreamError) -> Answer {
    let (status, why) = match failed {
        UpstreamError::Request => {
            return error(StatusCode::BAD_REQUEST, "this address or its headers cannot be passed on");
        }
        UpstreamError::Circle => (StatusCode::LOOP_DETECTED, "--upstream leads back to this relay"),
        UpstreamError::Unreachable(_) => {
            (StatusCode::BAD_GATEWAY, "the server behind the relay (--upstream) does not answer")
        }
        UpstreamError::Late => {
            (StatusCode::GATEWAY_TIMEOUT, "the server behind the relay (--upstream) did not answer in time")
        }
    };
    app.observe.upstream_failed(&failed.to_string());
    error(status, why)
}

/// Tells that a client is gone: it has closed its side, and some time has passed in which an answer could still be written.
#[derive(Clone)]
struct Gone {
    closed: CancellationToken,
    grace: Duration,
}

impl Gone {
    async fn wait(&self) {
        self.closed.cancelled().await;
        sleep(self.grace).await;
    }
}

/// Returns the server's answer. Its body ends with an error if it is incomplete, or when the client is gone.
fn passed_back(answer: Response<Incoming>, gone: Gone) -> Answer {
    let (mut parts, body) = answer.into_parts();
    remove_connection_headers(&mut parts.headers);
    parts.version = Version::HTTP_11;
    let ended = Box::pin(async move { gone.wait().await });
    Answer::from_parts(parts, PassedBack { body, gone: ended }.boxed_unsync())
}

/// The body of an answer, until the client is gone.
struct PassedBack {
    body: Incoming,
    gone: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Body for PassedBack {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            return Poll::Ready(frame.map(|frame| frame.map_err(io::Error::other)));
        }
        ready!(self.gone.as_mut().poll(context));
        Poll::Ready(Some(Err(io::Error::from(io::ErrorKind::ConnectionAborted))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Accepts an upgrade that the server accepted, and passes on what either side sends. It counts as a client.
fn upgraded(
    app: &Arc<App>,
    slot: Arc<ConnectionSlot>,
    client: OnUpgrade,
    mut answer: Response<Incoming>,
) -> Answer {
    let Some(client_slot) = app.connection_limits.admit_client() else {
        return error(StatusCode::TOO_MANY_REQUESTS, "Too many connected users");
    };
    let server = hyper::upgrade::on(&mut answer);
    let (end, grace) = (app.end.clone(), app.limits.write);
    app.sessions.spawn(async move {
        let (Ok(client), Ok(server)) = (client.await, server.await) else { return };
        let Some((mut client, read)) = into_connection(client) else { return };
        let (mut of_client, mut to_client) = client.stream_mut().split();
        let (mut of_server, mut to_server) = tokio::io::split(TokioIo::new(server));
        let up = async {
            to_server.write_all(&read).await?;
            copy(&mut of_client, &mut to_server).await?;
            to_server.shutdown().await
        };
        let down = async {
            copy(&mut of_server, &mut to_client).await?;
            to_client.shutdown().await
        };
        tokio::pin!(up, down);
        // A side that has ended gives the other some time to end, too.
        tokio::select! {
            _ = &mut up => { let _ = timeout(grace, down).await; }
            _ = &mut down => { let _ = timeout(grace, up).await; }
            () = end.cancelled() => {}
        }
        drop((slot, client_slot));
    });
    let (parts, _) = answer.into_parts();
    let mut accepted = empty(StatusCode::SWITCHING_PROTOCOLS);
    *accepted.headers_mut() = parts.headers;
    accepted
}
