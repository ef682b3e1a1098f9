//! Drives one session over one WebSocket: frames in, the outbox out, time, and the end.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error as SocketError, Message as Frame, Utf8Bytes};

use crate::feed::binding::BindError;
use crate::feed::outbox::{End, Outbox, Taken};
use crate::feed::router::Registration;
use crate::model::claims::Claims;
use crate::model::phoenix::{Binary, Version, decode_binary, decode_text, fan_out};
use crate::model::session::{Action, ChannelId, Session, TokenRefusal, Tokens};
use crate::model::subscription::Subscription;
use crate::transport::auth::Verifier;
use crate::transport::http::App;

/// A client that says nothing for this long is gone; clients send a heartbeat every 25 seconds.
const SILENCE: Duration = Duration::from_secs(60);
/// A client that takes nothing for this long is gone.
const WRITE: Duration = Duration::from_secs(30);
/// The largest message a client may send, as on the real server.
const MOST_BYTES: usize = 5_000_000;
/// Frames are written together up to this size. The reader's buffer is small because it lives as long as the
/// socket: the library's default of 128 KiB would be resident for every idle client.
const WRITE_BUFFER: usize = 32 * 1024;
const READ_BUFFER: usize = 1024;

type Socket = WebSocketStream<TcpStream>;

/// Why a session ends.
enum Over {
    /// The client left, or its connection broke.
    Gone,
    /// We end it with this close frame.
    Close(u16, &'static str),
}

/// Takes over a connection after the handshake and serves it to its end.
pub async fn serve(app: Arc<App>, stream: TcpStream, read: Vec<u8>, version: Version, claims: Claims) {
    let mut config = WebSocketConfig::default();
    config.read_buffer_size = READ_BUFFER;
    config.write_buffer_size = WRITE_BUFFER;
    config.max_write_buffer_size = usize::MAX;
    config.max_message_size = Some(MOST_BYTES);
    config.max_frame_size = Some(MOST_BYTES);
    let socket = WebSocketStream::from_partially_read(stream, read, Role::Server, Some(config)).await;
    app.observe.session_opened();
    let number = app.next_session();
    let outbox = Arc::new(Outbox::new(app.outbox_bytes));
    let session = Session::new(number, version, claims);
    let mut driver =
        Driver { app: Arc::clone(&app), socket, session, outbox, binds: FuturesUnordered::new() };
    let over = driver.run().await;
    let actions = driver.session.end();
    driver.obey(actions, &mut None);
    if let Over::Close(code, reason) = over {
        let close = CloseFrame { code: CloseCode::from(code), reason: Utf8Bytes::from_static(reason) };
        let _ = timeout(Duration::from_secs(1), driver.socket.close(Some(close))).await;
        // The client answers with its own close frame; cutting before that could cost it the last frames.
        let _ = timeout(Duration::from_secs(1), async {
            while driver.socket.next().await.is_some_and(|frame| frame.is_ok()) {}
        })
        .await;
    }
    app.observe.session_closed();
}

struct Driver {
    app: Arc<App>,
    socket: Socket,
    session: Session,
    outbox: Arc<Outbox>,
    binds: FuturesUnordered<futures_util::future::BoxFuture<'static, Outcome>>,
}

type Outcome = (ChannelId, u32, Result<Subscription, BindError>);

impl Driver {
    async fn run(&mut self) -> Over {
        let mut heard = Instant::now();
        loop {
            let silent = heard + SILENCE;
            let expiry = self
                .session
                .next_expiry()
                .map(|at| Instant::now() + Duration::from_secs(at.saturating_sub(now()).min(86_400)));
            tokio::select! {
                () = self.app.end.cancelled() => {
                    if let Some(Taken::Frames(frames)) = self.outbox.take().now_or_never() {
                        let _ = timeout(Duration::from_secs(1), write(&mut self.socket, frames)).await;
                    }
                    return Over::Close(1012, "the relay restarts, connect again");
                }
                taken = self.outbox.take() => match taken {
                    Taken::Frames(frames) => if let Err(over) = self.write(frames).await {
                        return over;
                    },
                    Taken::End(End::Full) => return self.full(),
                    Taken::End(End::Shutdown) => return Over::Close(1012, "the relay restarts, connect again"),
                },
                frame = self.socket.next() => {
                    heard = Instant::now();
                    if let Err(over) = self.hear(frame) {
                        return over;
                    }
                }
                Some(outcome) = self.binds.next(), if !self.binds.is_empty() => self.bound(outcome),
                () = sleep_until(expiry.map_or(silent, |expiry| expiry.min(silent))) => {
                    if Instant::now() >= silent {
                        return Over::Close(1000, "no heartbeat came");
                    }
                    let actions = self.session.expire(now());
                    self.obey(actions, &mut None);
                }
            }
        }
    }

    fn full(&self) -> Over {
        self.app.observe.session_full();
        Over::Close(1013, "the client reads too slowly: connect again and read the rows anew")
    }

    async fn write(&mut self, frames: impl IntoIterator<Item = Bytes>) -> Result<(), Over> {
        let outbox = Arc::clone(&self.outbox);
        tokio::select! {
            written = write(&mut self.socket, frames) => written.map_err(|_| Over::Gone),
            () = outbox.overflowed() => Err(self.full()),
            () = sleep(WRITE) => Err(self.full()),
        }
    }

    fn hear(&mut self, frame: Option<Result<Frame, SocketError>>) -> Result<(), Over> {
        let version = self.session.version();
        let message = match frame {
            None | Some(Ok(Frame::Close(_))) => return Err(Over::Gone),
            Some(Err(SocketError::Capacity(_))) => return Err(Over::Close(1009, "the message is too large")),
            Some(Err(SocketError::Utf8(_))) => return Err(Over::Close(1007, "the text is not UTF-8")),
            Some(Err(SocketError::Protocol(_))) => {
                return Err(Over::Close(1002, "this is not the WebSocket protocol"));
            }
            Some(Err(_)) => return Err(Over::Gone),
            Some(Ok(Frame::Text(text))) => decode_text(version, &text),
            Some(Ok(Frame::Binary(bytes))) => match decode_binary(version, &bytes) {
                Ok(Binary::Message(message)) => Ok(message),
                Ok(Binary::Opaque(_)) => return Ok(()),
                Err(error) => Err(error),
            },
            Some(Ok(_)) => return Ok(()),
        };
        match message {
            Ok(message) => {
                let actions = self.session.receive(message, now(), &Verifying(&self.app.verifier));
                self.obey(actions, &mut None);
            }
            Err(error) => {
                let payload = serde_json::json!({
                    "channel": "phoenix", "extension": "system", "status": "error", "message": error.to_string(),
                });
                self.outbox.push(fan_out(version, "phoenix", "system", &payload.to_string()).into());
            }
        }
        Ok(())
    }

    fn bound(&mut self, (channel, attempt, outcome): Outcome) {
        let (actions, mut subscription) = match outcome {
            Ok(subscription) => (self.session.bound(channel, attempt, Ok(())), Some(subscription)),
            Err(BindError::Refused(refusal)) => (self.session.bound(channel, attempt, Err(refusal)), None),
            Err(BindError::Unavailable) => (self.session.unavailable(channel, attempt), None),
        };
        self.obey(actions, &mut subscription);
    }

    fn obey(&mut self, actions: Vec<Action>, subscription: &mut Option<Subscription>) {
        for action in actions {
            match action {
                Action::Send(frame) => self.outbox.push(frame.into()),
                Action::Bind { channel, attempt, identity, requests } => {
                    let feed = self.app.feed.clone();
                    self.binds.push(
                        async move { (channel, attempt, feed.bind(identity, &requests).await) }.boxed(),
                    );
                }
                Action::Join { channel, topic, greeting } => {
                    let Some(subscription) = subscription.take() else {
                        continue;
                    };
                    let outbox = Arc::clone(&self.outbox);
                    let version = self.session.version();
                    let registration = Registration { version, topic, subscription, outbox };
                    self.app.feed.join(
                        channel,
                        registration,
                        greeting.into_iter().map(Bytes::from).collect(),
                    );
                }
                Action::Leave { channel, farewell } => {
                    let farewell = farewell.into_iter().map(Bytes::from).collect();
                    self.app.feed.leave(channel, &self.outbox, farewell);
                }
            }
        }
    }
}

async fn write(socket: &mut Socket, frames: impl IntoIterator<Item = Bytes>) -> Result<(), SocketError> {
    for frame in frames {
        // Frames are made from strings; the check is the price of sharing their bytes.
        let Ok(text) = Utf8Bytes::try_from(frame) else {
            continue;
        };
        socket.feed(Frame::Text(text)).await?;
    }
    socket.flush().await
}

struct Verifying<'a>(&'a Verifier);

impl Tokens for Verifying<'_> {
    fn verify(&self, token: &str) -> Result<Claims, TokenRefusal> {
        self.0
            .verify(token, now())
            .map_err(|error| TokenRefusal { code: error.code(), text: error.to_string() })
    }
}

/// Tokens are judged by the wall clock, read anew each time.
pub fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}
