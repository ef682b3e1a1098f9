//! Drives one session over one WebSocket: frames in, the outbox out, time, and the end.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::ready;
use std::io::ErrorKind;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio::task::coop::consume_budget;
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error as SocketError, Message as Frame, Utf8Bytes};

use crate::feed::binding::BindError;
use crate::feed::outbox::{Outbox, Taken};
use crate::feed::router::Registration;
use crate::model::claims::Claims;
use crate::model::dress::Dress;
use crate::model::phoenix::{Binary, Version, decode_binary, decode_text, fan_out, system};
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
/// Frames are written together up to this size.
const TOGETHER: usize = 64 * 1024;
/// A client's queue keeps room for this many frames: enough for steady changes, little for an idle client.
const ROOM: usize = 16;
/// After this many writes in a row the client is heard, the clock looked at and so on.
const TURNS: u8 = 16;
/// Small, because it lives as long as the socket: the library's default of 128 KiB would be resident for every client.
const READ_BUFFER: usize = 1024;

thread_local! {
    /// Where frames are put together for one system call: a thread's, as nothing stays in it when the call is done.
    static WRITTEN: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

type Socket = WebSocketStream<TcpStream>;

/// Why a session ends.
enum Over {
    /// The client left, or its connection broke.
    Gone,
    /// We end it with this close frame.
    Close(u16, &'static str),
}

/// Takes over a connection after the handshake and serves it to its end.
pub async fn serve(
    app: Arc<App>,
    stream: TcpStream,
    read: Vec<u8>,
    version: Version,
    with_cursor: bool,
    claims: Claims,
) {
    let mut config = WebSocketConfig::default();
    config.read_buffer_size = READ_BUFFER;
    config.write_buffer_size = 0;
    config.max_write_buffer_size = usize::MAX;
    config.max_message_size = Some(MOST_BYTES);
    config.max_frame_size = Some(MOST_BYTES);
    let socket = WebSocketStream::from_partially_read(stream, read, Role::Server, Some(config)).await;
    app.observe.session_opened();
    let number = app.next_session();
    let outbox = Arc::new(Outbox::new(app.outbox_bytes));
    let session = Session::new(number, version, claims);
    let binds = FuturesUnordered::new();
    let mut driver = Driver {
        app: Arc::clone(&app),
        socket,
        session,
        outbox,
        rest: Vec::new(),
        frames: VecDeque::new(),
        turns: 0,
        answers: false,
        with_cursor,
        binds,
    };
    let over = driver.run().await;
    let actions = driver.session.end();
    driver.obey(actions, &mut None);
    if let Over::Close(code, reason) = over {
        let close = CloseFrame { code: CloseCode::from(code), reason: Utf8Bytes::from_static(reason) };
        let _ = timeout(Duration::from_secs(1), async {
            driver.frames.clear();
            driver.write().await?;
            driver.socket.close(Some(close)).await.map_err(|_| Over::Gone)
        })
        .await;
        // The client answers with its own close frame; cutting before that could cost it the last frames.
        let _ = timeout(Duration::from_secs(1), async {
            while driver.socket.next().await.is_some_and(|frame| frame.is_ok()) {}
        })
        .await;
    } else if driver.rest.is_empty() {
        // The answer to the client's own close frame is still with the library.
        let _ = timeout(Duration::from_millis(100), driver.socket.flush()).await;
    }
    app.observe.session_closed();
}

struct Driver {
    app: Arc<App>,
    socket: Socket,
    session: Session,
    outbox: Arc<Outbox>,
    /// The end of a frame that the socket has not taken yet. Nothing else may be written before it.
    rest: Vec<u8>,
    /// What was taken from the outbox and is not written yet.
    frames: VecDeque<Bytes>,
    /// Writes since everything else had its turn.
    turns: u8,
    /// The library may have something to say by itself: a pong.
    answers: bool,
    /// The client asked for cursors.
    with_cursor: bool,
    binds: FuturesUnordered<futures_util::future::BoxFuture<'static, Outcome>>,
}

type Outcome = (ChannelId, u32, Result<Subscription, BindError>);

impl Driver {
    async fn run(&mut self) -> Over {
        let app = Arc::clone(&self.app);
        let mut ended = pin!(app.end.cancelled());
        let mut heard = Instant::now();
        // Moved only when it is due or a token ends before it: most turns of the loop concern neither.
        let mut alarm = pin!(sleep_until(heard + SILENCE));
        loop {
            tokio::select! {
                // Writing first, as that is what most turns are for; the last branch keeps the others from waiting for ever.
                biased;
                taken = self.outbox.take(&mut self.frames), if self.turns < TURNS => match taken {
                    Taken::Frames => if let Err(over) = self.write_in_time().await {
                        return over;
                    },
                    Taken::Rebind(channel) => {
                        let actions = self.session.rebind(channel);
                        self.obey(actions, &mut None);
                    }
                    Taken::Full => return self.full(),
                },
                frame = self.socket.next() => {
                    heard = Instant::now();
                    self.answers = true;
                    if let Err(over) = self.hear(frame) {
                        return over;
                    }
                    self.be_woken_for_expiry(alarm.as_mut());
                }
                Some(outcome) = self.binds.next(), if !self.binds.is_empty() => {
                    self.bound(outcome);
                    self.be_woken_for_expiry(alarm.as_mut());
                }
                () = ended.as_mut() => {
                    if let Some(Taken::Frames) = self.outbox.take(&mut self.frames).now_or_never() {
                        let _ = timeout(Duration::from_secs(1), self.write()).await;
                    }
                    return Over::Close(1012, "the relay restarts, connect again");
                }
                () = alarm.as_mut() => {
                    if heard.elapsed() >= SILENCE {
                        return Over::Close(1000, "no heartbeat came");
                    }
                    let actions = self.session.expire(now());
                    self.obey(actions, &mut None);
                    alarm.as_mut().reset(heard + SILENCE);
                    self.be_woken_for_expiry(alarm.as_mut());
                }
                () = ready(()), if self.turns >= TURNS => self.turns = 0,
            }
        }
    }

    /// Sets the alarm earlier when a token ends before it.
    fn be_woken_for_expiry(&self, alarm: Pin<&mut Sleep>) {
        if let Some(at) = self.session.next_expiry() {
            let expiry = Instant::now() + Duration::from_secs(at.saturating_sub(now()).min(86_400));
            if expiry < alarm.deadline() {
                alarm.reset(expiry);
            }
        }
    }

    fn full(&self) -> Over {
        self.app.observe.session_full();
        Over::Close(1013, "the client reads too slowly: connect again and read the rows anew")
    }

    /// Writes what was taken, unless the client takes too long for it.
    async fn write_in_time(&mut self) -> Result<(), Over> {
        // A client to which there is always something to write must not keep its thread from the others.
        consume_budget().await;
        self.turns += 1;
        if self.write_now()? {
            return Ok(());
        }
        self.turns = TURNS;
        let outbox = Arc::clone(&self.outbox);
        tokio::select! {
            written = timeout(WRITE, self.write()) => written.unwrap_or_else(|_| Err(self.full())),
            () = outbox.overflowed() => Err(self.full()),
        }
    }

    /// Writes what was taken, however long that takes.
    async fn write(&mut self) -> Result<(), Over> {
        while !self.write_now()? {
            self.socket.flush().await.map_err(|_| Over::Gone)?;
            self.socket.get_ref().writable().await.map_err(|_| Over::Gone)?;
        }
        Ok(())
    }

    /// Writes what the socket takes at once; true when that was everything.
    ///
    /// Past the library, which would copy each frame into a buffer of this client's own, and keep that for good.
    fn write_now(&mut self) -> Result<bool, Over> {
        // An answer of the library's own must not end up inside a frame of ours.
        if self.answers {
            match self.socket.flush().now_or_never() {
                Some(flushed) => flushed.map_err(|_| Over::Gone)?,
                None => return Ok(false),
            }
            self.answers = false;
        }
        let stream = self.socket.get_ref();
        if !self.rest.is_empty() {
            let count = write_some(stream, &self.rest)?;
            self.rest.drain(..count);
            if !self.rest.is_empty() {
                return Ok(false);
            }
            self.rest = Vec::new();
        }
        WRITTEN.with_borrow_mut(|written| {
            while !self.frames.is_empty() {
                written.clear();
                while written.len() < TOGETHER
                    && let Some(frame) = self.frames.pop_front()
                {
                    put_text(written, &frame);
                }
                let count = write_some(stream, written)?;
                self.rest.extend_from_slice(&written[count..]);
                written.shrink_to(2 * TOGETHER);
                if !self.rest.is_empty() {
                    return Ok(false);
                }
            }
            self.frames.shrink_to(ROOM);
            Ok(true)
        })
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
                let payload = system("phoenix", "system", "error", &error.to_string());
                self.outbox.push(fan_out(version, "phoenix", "system", &payload).into());
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
                    let dress = Dress::Phoenix { version, topic, with_cursor: self.with_cursor };
                    let registration = Registration { dress, subscription, since: None, outbox };
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

/// One text frame, as a server writes it.
fn put_text(written: &mut Vec<u8>, text: &[u8]) {
    written.push(0x81);
    match text.len() {
        length @ 0..126 => written.push(length as u8),
        length @ 126..0x1_0000 => {
            written.push(126);
            written.extend_from_slice(&(length as u16).to_be_bytes());
        }
        length => {
            written.push(127);
            written.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    written.extend_from_slice(text);
}

/// How much of it the socket takes at once.
fn write_some(stream: &TcpStream, bytes: &[u8]) -> Result<usize, Over> {
    match stream.try_write(bytes) {
        Ok(count) => Ok(count),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
        Err(_) => Err(Over::Gone),
    }
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
