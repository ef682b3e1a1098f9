//! Drives one session over one WebSocket: reads frames, writes the outbox, and handles timers, key changes and shutdown.

use std::future::ready;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{FutureExt, SinkExt, StreamExt};
use tokio::sync::watch;
use tokio::task::coop::consume_budget;
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error as SocketError, Message as SocketFrame, Utf8Bytes};

use crate::auth::jwks::KeySet;
use crate::auth::verifier::now;
use crate::feed::deliver::frame::Frame;
use crate::feed::deliver::outbox::Outbox;
use crate::feed::deliver::queue::Taken;
use crate::model::codec::protocol::SocketProtocol;
use crate::transport::app::App;
use crate::transport::clients::ClientKind;
use crate::transport::intake::Intake;
use crate::transport::socket::channels::{Channels, CloseConnection, ConnectRequest, close_unless};
use crate::transport::socket::frame_writer::{Broken, Socket, Writer};
use crate::transport::socket::inbound::{Inbound, decode};

/// Time limit for each step of an orderly close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// Number of consecutive writes after which the other branches of the loop are polled.
const MAX_CONSECUTIVE_WRITES: u8 = 16;
/// Read buffer in bytes. It lives as long as the socket: the library's default of 128 KiB would be resident for every client.
const READ_BUFFER: usize = 1024;
/// Interval, while a write is stuck, of the check for ended tokens and for private channels to judge again.
const STUCK_CHECK: Duration = Duration::from_secs(1);

/// Why a session ends.
enum SessionEnd {
    /// The client left, or its connection broke.
    Gone,
    /// The relay closes the connection with this code and reason.
    Close(u16, &'static str),
}

impl From<Broken> for SessionEnd {
    fn from(_: Broken) -> Self {
        Self::Gone
    }
}

impl From<CloseConnection> for SessionEnd {
    fn from(CloseConnection(code, reason): CloseConnection) -> Self {
        Self::Close(code, reason)
    }
}

/// Serves a connection from the handshake to its close. `read` holds the bytes read beyond the handshake.
pub async fn serve(app: Arc<App>, stream: Intake, read: Vec<u8>, request: ConnectRequest) {
    let mut config = WebSocketConfig::default();
    config.read_buffer_size = READ_BUFFER;
    config.write_buffer_size = 0;
    config.max_write_buffer_size = usize::MAX;
    config.max_message_size = Some(app.limits.message_bytes);
    config.max_frame_size = Some(app.limits.message_bytes);
    let socket = WebSocketStream::from_partially_read(stream, read, Role::Server, Some(config)).await;
    app.observe.session_opened();
    let outbox = Arc::new(Outbox::new(app.limits.outbox_bytes, Arc::clone(&app.budget)));
    let mut driver = Driver {
        protocol: request.protocol,
        channels: Channels::new(Arc::clone(&app), Arc::clone(&outbox), request),
        keys: app.verifier.follow_keys(),
        rechecks: app.topic_judge.rechecks(),
        socket,
        outbox,
        writer: Writer::default(),
        consecutive_writes: 0,
        last_read: Instant::now(),
        app,
    };
    let end = driver.run().await;
    driver.channels.end();
    driver.close(end).await;
    driver.count_sent();
}

struct Driver {
    app: Arc<App>,
    protocol: &'static dyn SocketProtocol,
    socket: Socket,
    outbox: Arc<Outbox>,
    writer: Writer,
    /// Writes since the other branches were polled.
    consecutive_writes: u8,
    last_read: Instant,
    channels: Channels,
    /// Changes when a key is added or withdrawn.
    keys: watch::Receiver<Arc<KeySet>>,
    /// Changes when private channels are to be judged again.
    rechecks: watch::Receiver<u64>,
}

impl Driver {
    async fn run(&mut self) -> SessionEnd {
        let app = Arc::clone(&self.app);
        // Both outlive the steps: to register them for each step would contend with all other sessions.
        let mut shutdown = pin!(app.drained());
        let mut alarm = pin!(sleep(app.limits.silence));
        loop {
            if let Err(end) = self.step(alarm.as_mut(), shutdown.as_mut()).await {
                return end;
            }
        }
    }

    /// Waits for something to do, and does it.
    ///
    /// # Errors
    /// How the session ends, if it ends.
    async fn step(
        &mut self,
        mut alarm: Pin<&mut Sleep>,
        shutdown: Pin<&mut impl Future<Output = ()>>,
    ) -> Result<(), SessionEnd> {
        tokio::select! {
            // Poll writes first because they are the most frequent. The last branch prevents the others from starving.
            biased;
            taken = self.outbox.take(), if self.consecutive_writes < MAX_CONSECUTIVE_WRITES => match taken {
                Taken::Frames => self.write_in_time().await?,
                Taken::Rebind(channel) => self.channels.rebind(channel),
                Taken::Full => return Err(self.too_slow()),
            },
            frame = self.socket.next(), if self.channels.may_receive() => {
                self.last_read = Instant::now();
                self.socket.get_ref().message_complete();
                self.writer.frame_read();
                if let Err(end) = self.handle_frame(frame) {
                    self.write_before(&end).await;
                    return Err(end);
                }
                self.advance_alarm(alarm);
            }
            event = self.channels.next() => {
                self.channels.handle(event);
                self.advance_alarm(alarm);
            }
            Ok(()) = self.rechecks.changed(), if self.channels.has_private() => self.channels.recheck_rules(),
            Ok(()) = self.keys.changed() => self.channels.recheck_keys(),
            () = shutdown => {
                self.write_last().await;
                return Err(SessionEnd::Close(1012, "the relay restarts, connect again"));
            }
            () = alarm.as_mut() => {
                let silence = self.app.limits.silence;
                if self.last_read.elapsed() >= silence {
                    return Err(SessionEnd::Close(1000, "no heartbeat received"));
                }
                self.channels.check_time();
                alarm.as_mut().reset(self.last_read + silence);
                self.advance_alarm(alarm);
            }
            () = ready(()), if self.consecutive_writes >= MAX_CONSECUTIVE_WRITES => self.consecutive_writes = 0,
        }
        Ok(())
    }

    /// Moves the alarm forward if a check of the channels is due before it; most steps do not change it.
    fn advance_alarm(&self, alarm: Pin<&mut Sleep>) {
        if let Some(at) = self.channels.next_check() {
            let due = Instant::now() + Duration::from_secs(at.saturating_sub(now()).min(86_400));
            if due < alarm.deadline() {
                alarm.reset(due);
            }
        }
    }

    /// Writes the frames taken from the outbox, with the write timeout.
    async fn write_in_time(&mut self) -> Result<(), SessionEnd> {
        // Yield now and then: a client with a steady stream of frames must not starve other tasks of its thread.
        consume_budget().await;
        self.consecutive_writes += 1;
        let oldest = self.outbox.in_flight().oldest();
        let mut check = Instant::now() + STUCK_CHECK;
        while !self.writer.write_now(&mut self.socket, &self.outbox)? {
            self.consecutive_writes = MAX_CONSECUTIVE_WRITES;
            self.outbox.is_stuck_with(self.writer.left(&self.outbox));
            tokio::select! {
                writable = timeout(self.app.limits.write, Writer::writable(&mut self.socket)) => match writable {
                    Ok(writable) => writable?,
                    Err(_) => return Err(self.too_slow()),
                },
                () = self.outbox.overflowed() => return Err(self.too_slow()),
                // Nothing more may be queued under a token that has ended, or for a channel that may not be read any more, even
                // during a long write.
                Ok(()) = self.keys.changed() => self.channels.recheck_keys(),
                Ok(()) = self.rechecks.changed(), if self.channels.has_private() => self.channels.recheck_rules(),
                Some(judged) = self.channels.next_judgement() => self.channels.judged(judged),
                () = sleep_until(check) => {
                    check = Instant::now() + STUCK_CHECK;
                    self.channels.check_time();
                }
            }
        }
        self.count_sent();
        if let Some(oldest) = oldest {
            self.app.observe.written(oldest);
        }
        self.channels.written();
        Ok(())
    }

    fn count_sent(&mut self) {
        self.app.observe.sent(ClientKind::WebSocket.name(), self.writer.take_sent());
    }

    /// Handles a frame from the client.
    ///
    /// # Errors
    /// How the session ends, if the frame ends it.
    fn handle_frame(&mut self, frame: Option<Result<SocketFrame, SocketError>>) -> Result<(), SessionEnd> {
        if let Some(Ok(frame)) = &frame {
            self.app.observe.received(frame.len());
            self.channels.note_frame();
        }
        let pong = match &frame {
            Some(Ok(SocketFrame::Pong(payload))) => Some(&payload[..]),
            _ => None,
        };
        let is_within_rate = self.channels.count_frame(pong);
        match decode(self.protocol, frame) {
            Inbound::Message(message) => self.channels.receive(message, is_within_rate)?,
            Inbound::Ignored => close_unless(is_within_rate)?,
            Inbound::Unreadable(error) => {
                close_unless(is_within_rate)?;
                self.outbox.push(Frame::text(self.protocol.unreadable(error), self.outbox.budget()));
            }
            Inbound::Gone => return Err(SessionEnd::Gone),
            Inbound::Close(code, reason) => return Err(SessionEnd::Close(code, reason)),
        }
        Ok(())
    }

    /// Counts and returns the end of a session whose client reads too slowly.
    fn too_slow(&self) -> SessionEnd {
        self.app.observe.session_full();
        SessionEnd::Close(1013, "the client reads too slowly: connect again and read the rows again")
    }

    /// Writes the router's pending frames, such as the end of a channel, before the relay closes the connection.
    async fn write_before(&mut self, end: &SessionEnd) {
        if matches!(end, SessionEnd::Close(..)) {
            let _ = timeout(CLOSE_TIMEOUT, self.app.feed.settled()).await;
            self.write_last().await;
        }
    }

    /// Writes the outbox once more before the session ends, if the client reads it.
    async fn write_last(&mut self) {
        if let Some(Taken::Frames) = self.outbox.take().now_or_never() {
            let _ = timeout(CLOSE_TIMEOUT, self.writer.write(&mut self.socket, &self.outbox)).await;
        }
    }

    /// Closes the socket.
    async fn close(&mut self, end: SessionEnd) {
        let SessionEnd::Close(code, reason) = end else {
            if !self.writer.is_within_frame() {
                // The library still holds the answer to the client's close frame.
                let _ = timeout(Duration::from_millis(100), self.socket.flush()).await;
            }
            return;
        };
        let frame = CloseFrame { code: CloseCode::from(code), reason: Utf8Bytes::from_static(reason) };
        let _ = timeout(CLOSE_TIMEOUT, async {
            self.writer.discard(&self.outbox);
            self.writer.write(&mut self.socket, &self.outbox).await?;
            self.socket.close(Some(frame)).await.map_err(|_| SessionEnd::Gone)
        })
        .await;
        // Wait for the client's close frame: closing the connection earlier could lose the last frames.
        let _ = timeout(CLOSE_TIMEOUT, async {
            while self.socket.next().await.is_some_and(|frame| frame.is_ok()) {}
        })
        .await;
    }
}
