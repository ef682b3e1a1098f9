//! Drives one session over one WebSocket: frames in, the outbox out, time, and the end.

use std::future::ready;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, OptionFuture};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, SinkExt, StreamExt};
use tokio::sync::watch;
use tokio::task::coop::consume_budget;
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error as SocketError, Message as Frame, Utf8Bytes};

use crate::auth::jwks::KeySet;
use crate::auth::verifier::now;
use crate::feed::deliver::group::Subscriber;
use crate::feed::deliver::outbox::{Outbox, Taken};
use crate::feed::subscribe::BindError;
use crate::model::codec::event::Codec;
use crate::model::codec::phoenix::Version;
use crate::model::codec::phoenix::{Message, fan_out, system};
use crate::model::identity::bookmark::Opened;
use crate::model::identity::bookmark::SessionName;
use crate::model::identity::claims::Claims;
use crate::model::session::join::too_large;
use crate::model::session::machine::{Action, ChannelId, Session};
use crate::model::session::rate_limit::RateLimit;
use crate::model::subscription::binding::Subscription;
use crate::transport::app::App;
use crate::transport::intake::Intake;
use crate::transport::socket::frame_writer::{Broken, Socket, Writer};
use crate::transport::socket::inbound::{Inbound, Kept, NO_ROOM, said};
use crate::transport::socket::resume::{Resume, work};

/// What a client said when it connected.
pub struct ConnectRequest {
    /// The serialisation of frames.
    pub version: Version,
    /// It wants to be told cursors.
    pub with_cursor: bool,
    /// It named its session.
    pub name: Option<SessionName>,
    /// Who it is.
    pub claims: Claims,
}

/// Each step of an end in order may take this long.
const LAST: Duration = Duration::from_secs(1);
/// A client speaks faster than it may.
const TOO_MANY: &str = "Too many messages per second";
/// After this many writes in a row the client is heard, the clock looked at and so on.
const TURNS: u8 = 16;
/// So many joins that later ones made void may still be on their way. The next message waits in the socket for them.
const VOID: usize = 8;
/// Small, because it lives as long as the socket: the library's default of 128 KiB would be resident for every client.
const READ_BUFFER: usize = 1024;

/// Why a session ends.
enum SessionEnd {
    /// The client left, or its connection broke.
    Gone,
    /// We end it with this close frame.
    Close(u16, &'static str),
}

impl From<Broken> for SessionEnd {
    fn from(_: Broken) -> Self {
        Self::Gone
    }
}

/// Takes over a connection after the handshake and serves it to its end.
pub async fn serve(app: Arc<App>, stream: Intake, read: Vec<u8>, greeting: ConnectRequest) {
    let mut config = WebSocketConfig::default();
    config.read_buffer_size = READ_BUFFER;
    config.write_buffer_size = 0;
    config.max_write_buffer_size = usize::MAX;
    config.max_message_size = Some(app.limits.message_bytes);
    config.max_frame_size = Some(app.limits.message_bytes);
    let socket = WebSocketStream::from_partially_read(stream, read, Role::Server, Some(config)).await;
    app.observe.session_opened();
    let outbox = Arc::new(Outbox::new(app.limits.outbox_bytes, Arc::clone(&app.budget)));
    let ConnectRequest { version, with_cursor, name, claims } = greeting;
    let session = Session::new(app.next_session(), version, claims, app.limits.channels);
    let resume =
        name.map(|name| Box::new(Resume::new(name, app.feed.clone(), Arc::clone(&outbox), app.resume)));
    let binds = FuturesUnordered::new();
    let mut driver = Driver {
        app: Arc::clone(&app),
        socket,
        session,
        outbox,
        writer: Writer::default(),
        turns: 0,
        began: Instant::now(),
        pace: RateLimit::new(&app.limits),
        kept: Kept::new(&app.budget),
        with_cursor,
        resume,
        binds,
        held: None,
    };
    let over = driver.run().await;
    let actions = driver.session.end();
    driver.obey(actions, &mut None);
    driver.resume = None;
    if let SessionEnd::Close(code, reason) = over {
        let close = CloseFrame { code: CloseCode::from(code), reason: Utf8Bytes::from_static(reason) };
        let _ = timeout(LAST, async {
            driver.writer.forget(&driver.outbox);
            driver.writer.write(&mut driver.socket, &driver.outbox).await?;
            driver.socket.close(Some(close)).await.map_err(|_| SessionEnd::Gone)
        })
        .await;
        // The client answers with its own close frame; cutting before that could cost it the last frames.
        let _ =
            timeout(LAST, async { while driver.socket.next().await.is_some_and(|frame| frame.is_ok()) {} })
                .await;
    } else if !driver.writer.is_amid_a_frame() {
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
    writer: Writer,
    /// Writes since everything else had its turn.
    turns: u8,
    began: Instant,
    pace: RateLimit,
    /// Memory for what is kept of the client's own words.
    kept: Kept,
    /// The client asked for cursors.
    with_cursor: bool,
    /// The client named its session.
    resume: Option<Box<Resume>>,
    binds: FuturesUnordered<BoxFuture<'static, Outcome>>,
    /// A message whose token waits for keys to be read anew. Those after it wait in the socket.
    held: Option<BoxFuture<'static, Message>>,
}

/// What came of binding a channel, at this attempt.
type Outcome = (ChannelId, u32, Result<Bound, BindError>);

/// What delivery begins with.
struct Bound {
    subscription: Subscription,
    /// The channel's bookmark, when it was opened for it.
    opened: Option<Opened>,
}

impl Driver {
    async fn run(&mut self) -> SessionEnd {
        let app = Arc::clone(&self.app);
        let mut ended = pin!(app.end.cancelled());
        let mut keys = app.verifier.follow_keys();
        let silence = app.limits.silence;
        let mut heard = Instant::now();
        // Moved only when it is due or a token ends before it: most turns of the loop concern neither.
        let mut alarm = pin!(sleep_until(heard + silence));
        loop {
            tokio::select! {
                // Writing first, as that is what most turns are for; the last branch keeps the others from waiting for ever.
                biased;
                taken = self.outbox.take(), if self.turns < TURNS => match taken {
                    Taken::Frames => if let Err(over) = self.write_in_time(&mut keys).await {
                        return over;
                    },
                    Taken::Rebind(channel) => {
                        // It goes on at its bookmark: of what comes in between nothing is told to it.
                        if let Some(resume) = &mut self.resume {
                            resume.stop(channel);
                        }
                        let actions = self.session.rebind(channel);
                        self.obey(actions, &mut None);
                    }
                    Taken::Full => return self.full(),
                },
                Some(message) = OptionFuture::from(self.held.as_mut()) => {
                    self.held = None;
                    self.receive(message);
                    self.be_woken_for_expiry(alarm.as_mut());
                }
                frame = self.socket.next(), if self.held.is_none()
                    && self.binds.len() <= self.session.channel_count() + VOID => {
                    heard = Instant::now();
                    self.socket.get_ref().understood();
                    self.writer.heard();
                    if let Err(over) = self.hear(frame) {
                        if matches!(over, SessionEnd::Close(..)) {
                            // What the router has to say before it, such as the end of a channel, goes first.
                            let _ = timeout(LAST, app.feed.settled()).await;
                            self.write_last().await;
                        }
                        return over;
                    }
                    self.be_woken_for_expiry(alarm.as_mut());
                }
                Some(outcome) = self.binds.next(), if !self.binds.is_empty() => {
                    self.bound(outcome);
                    self.be_woken_for_expiry(alarm.as_mut());
                }
                _ = work(&mut self.resume) => {}
                Ok(()) = keys.changed() => {
                    let actions = self.session.recheck(&app.verifier);
                    self.obey(actions, &mut None);
                }
                () = ended.as_mut() => {
                    self.write_last().await;
                    return SessionEnd::Close(1012, "the relay restarts, connect again");
                }
                () = alarm.as_mut() => {
                    if heard.elapsed() >= silence {
                        return SessionEnd::Close(1000, "no heartbeat came");
                    }
                    let actions = self.session.expire(now());
                    self.obey(actions, &mut None);
                    alarm.as_mut().reset(heard + silence);
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

    /// Writes what there is before the end, if the client takes it.
    async fn write_last(&mut self) {
        if let Some(Taken::Frames) = self.outbox.take().now_or_never() {
            let _ = timeout(LAST, self.writer.write(&mut self.socket, &self.outbox)).await;
        }
    }

    fn full(&self) -> SessionEnd {
        self.app.observe.session_full();
        SessionEnd::Close(1013, "the client reads too slowly: connect again and read the rows anew")
    }

    /// Writes what was taken, unless the client takes nothing for too long.
    async fn write_in_time(&mut self, keys: &mut watch::Receiver<Arc<KeySet>>) -> Result<(), SessionEnd> {
        // A client to which there is always something to write must not keep its thread from the others.
        consume_budget().await;
        self.turns += 1;
        while !self.writer.write_now(&mut self.socket, &self.outbox)? {
            self.turns = TURNS;
            self.outbox.is_stuck_with(self.writer.left(&self.outbox));
            tokio::select! {
                room = timeout(self.app.limits.write, Writer::room(&mut self.socket)) => match room {
                    Ok(room) => room?,
                    Err(_) => return Err(self.full()),
                },
                () = self.outbox.overflowed() => return Err(self.full()),
                // Nothing more may be told by a token whose key is gone, however long this takes.
                Ok(()) = keys.changed() => {
                    let actions = self.session.recheck(&self.app.verifier);
                    self.obey(actions, &mut None);
                }
            }
        }
        if let Some(resume) = &mut self.resume {
            resume.written();
        }
        Ok(())
    }

    fn hear(&mut self, frame: Option<Result<Frame, SocketError>>) -> Result<(), SessionEnd> {
        let (version, at) = (self.session.version(), self.began.elapsed());
        let is_asked_for = match (&frame, &mut self.resume) {
            (Some(Ok(Frame::Pong(payload))), Some(resume)) => resume.pong(payload),
            _ => false,
        };
        // The pong to a ping of ours is no message.
        let is_in_time = is_asked_for || self.pace.messages.take(at);
        let message = match said(version, frame) {
            Inbound::Message(message) => Ok(message),
            Inbound::Unreadable(error) => Err(error),
            Inbound::LargeJoin(message) => {
                let refused = self.session.refuse(&message, &too_large());
                self.obey(vec![refused], &mut None);
                return may_stay(is_in_time);
            }
            Inbound::Nothing => return may_stay(is_in_time),
            Inbound::Gone => return Err(SessionEnd::Gone),
            Inbound::Close(code, reason) => return Err(SessionEnd::Close(code, reason)),
        };
        match message {
            Ok(message) if !is_in_time => {
                let actions = self.session.shut(&message.topic, TOO_MANY);
                may_stay(!actions.is_empty())?;
                self.obey(actions, &mut None);
            }
            Ok(message) if message.event == "phx_join" && !self.pace.joins.take(at) => {
                let reason = "ClientJoinRateLimitReached: Too many joins per second";
                let refused = self.session.refuse(&message, reason);
                self.obey(vec![refused], &mut None);
                return Err(SessionEnd::Close(1001, "Too many joins per second"));
            }
            Ok(message) if message.event == "phx_join" && !self.kept.may_keep(&self.session, &message) => {
                let refused = self.session.refuse(&message, NO_ROOM);
                self.obey(vec![refused], &mut None);
            }
            Ok(message) => {
                let refreshed = ["user_token", "access_token"]
                    .into_iter()
                    .find_map(|name| self.app.verifier.refresh_for(message.payload.get(name)?.as_str()?));
                match refreshed {
                    Some(refreshed) => self.held = Some(refreshed.map(|()| message).boxed()),
                    None => self.receive(message),
                }
            }
            Err(_) if !is_in_time => return may_stay(is_in_time),
            Err(error) => {
                let payload = system("phoenix", "system", "error", &error.to_string());
                self.outbox.push(fan_out(version, "phoenix", "system", &payload));
            }
        }
        Ok(())
    }

    fn receive(&mut self, message: Message) {
        let actions = self.session.receive(message, now(), &self.app.verifier);
        self.kept.keeps(&self.session);
        self.obey(actions, &mut None);
    }

    fn bound(&mut self, (channel, attempt, outcome): Outcome) {
        let (actions, mut bound) = match outcome {
            Ok(bound) => {
                let refusals = bound.subscription.refusals().cloned().collect();
                (self.session.bound(channel, attempt, Ok(refusals)), Some(bound))
            }
            Err(BindError::Refused(refusal)) => (self.session.bound(channel, attempt, Err(refusal)), None),
            Err(BindError::Unavailable) => (self.session.unavailable(channel, attempt), None),
        };
        self.obey(actions, &mut bound);
    }

    fn obey(&mut self, actions: Vec<Action>, bound: &mut Option<Bound>) {
        for action in actions {
            match action {
                Action::Send(frame) => self.outbox.push(frame),
                Action::Bind { channel, attempt, identity, requests } => {
                    let feed = self.app.feed.clone();
                    let topic = self.session.topic(channel).unwrap_or_default();
                    let opening =
                        self.resume.as_mut().map(|resume| resume.open(channel, identity.claims(), topic));
                    let bind = async move {
                        let subscription = feed.bind(channel, identity, &requests).await?;
                        let opened = match opening {
                            Some(opening) => {
                                // A bookmark of before its table was watched would be a gap.
                                feed.beginning(&subscription).await.ok_or(BindError::Unavailable)?;
                                opening.await?
                            }
                            None => None,
                        };
                        Ok(Bound { subscription, opened })
                    };
                    self.binds.push(async move { (channel, attempt, bind.await) }.boxed());
                }
                Action::Join { channel, topic, by_operation, greeting } => {
                    if let Some(bound) = bound.take() {
                        self.join(channel, (topic, by_operation), greeting, bound);
                    }
                }
                Action::Forget { channel } => {
                    if let Some(resume) = &mut self.resume {
                        resume.forget(channel);
                    }
                }
                Action::Leave { channel, farewell } => {
                    if let Some(resume) = &mut self.resume {
                        resume.stop(channel);
                    }
                    let farewell = farewell.into_iter().map(Bytes::from).collect();
                    self.app.feed.leave(channel, &self.outbox, farewell);
                }
            }
        }
    }

    fn join(
        &mut self,
        channel: ChannelId,
        (topic, by_operation): (String, bool),
        greeting: Vec<String>,
        bound: Bound,
    ) {
        let Bound { subscription, opened } = bound;
        let with_cursor = self.with_cursor || self.resume.is_some();
        let codec = Codec::Phoenix { version: self.session.version(), topic, with_cursor, by_operation };
        let greeting = greeting.into_iter().map(Bytes::from).collect();
        match &mut self.resume {
            Some(resume) => resume.start(channel, subscription, codec, greeting, opened),
            None => {
                let outbox = Arc::clone(&self.outbox);
                let registration = Subscriber { codec, subscription, since: None, outbox, missed: None };
                self.app.feed.join(channel, registration, greeting);
            }
        }
    }
}

/// Whoever speaks too fast and has no channel that could be closed for it is closed itself.
fn may_stay(is_in_time: bool) -> Result<(), SessionEnd> {
    if is_in_time { Ok(()) } else { Err(SessionEnd::Close(1008, TOO_MANY)) }
}
