//! Drives one session over one WebSocket: reads frames, writes the outbox, and handles timers, key changes and shutdown.

use std::collections::HashMap;
use std::future::{pending, ready};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

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
use tokio_tungstenite::tungstenite::{Error as SocketError, Message as SocketFrame, Utf8Bytes};

use crate::auth::jwks::KeySet;
use crate::auth::verifier::now;
use crate::feed::authorize::topic_judge::{TopicJudge, TopicQuestion, TopicUnknown, TopicVerdict};
use crate::feed::catch_up::CatchUp;
use crate::feed::deliver::frame::Frame;
use crate::feed::deliver::group::Subscriber;
use crate::feed::deliver::outbox::{Outbox, Taken, Unit};
use crate::feed::subscribe::BindError;
use crate::model::catalog::topic_rules::TopicAct;
use crate::model::codec::protocol::{ChannelFormat, SocketProtocol};
use crate::model::identity::bookmark::Opened;
use crate::model::identity::bookmark::SessionName;
use crate::model::identity::claims::Claims;
use crate::model::policy::visibility::Identity;
use crate::model::session::action::Action;
use crate::model::session::broadcast::Broadcast;
use crate::model::session::channel::{BindOutcome, ChannelId};
use crate::model::session::machine::{Session, UNAVAILABLE};
use crate::model::session::message::{ClientRequest, Incoming, Origin, Outgoing, Response};
use crate::model::session::private::{NOT_RECALLED, RESUMED_INSTEAD, WriteQuestion};
use crate::model::session::rate_limit::RateLimit;
use crate::model::subscription::binding::Subscription;
use crate::model::subscription::topic::TopicScope;
use crate::pubsub::topics::Membership;
use crate::transport::app::App;
use crate::transport::intake::Intake;
use crate::transport::socket::frame_writer::{Broken, Socket, Writer};
use crate::transport::socket::inbound::{Inbound, KeptMemory, NO_ROOM, decode};
use crate::transport::socket::recalls::Recalls;
use crate::transport::socket::resume::{Resume, work};

/// The parameters of a client's handshake.
pub struct ConnectRequest {
    /// The wire protocol.
    pub protocol: &'static dyn SocketProtocol,
    /// Whether changes carry their cursor.
    pub with_cursor: bool,
    /// Name of the session, if it can be resumed.
    pub name: Option<SessionName>,
    /// Claims of the client's token or API key.
    pub claims: Claims,
}

/// Time limit for each step of an orderly close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// The message for a client that exceeds its message rate.
const TOO_MANY_MESSAGES: &str = "Too many messages per second";
/// The refusal of a public channel where only private ones are allowed.
const PRIVATE_ONLY: &str = "PrivateOnly: This project only allows private channels";
/// The refusal of a change of presence by a client that exceeds its rate.
const TOO_MANY_PRESENCES: &str = "Client presence rate limit exceeded";
/// Bytes that the fields around the payload of a broadcast may have.
const BROADCAST_FIELDS: usize = 500;
/// Number of consecutive writes after which the other branches of the loop are polled.
const MAX_CONSECUTIVE_WRITES: u8 = 16;
/// Number of superseded binds that may still be pending. With more, no further message is read from the socket.
const MAX_SUPERSEDED_BINDS: usize = 8;
/// Read buffer in bytes. It lives as long as the socket: the library's default of 128 KiB would be resident for every client.
const READ_BUFFER: usize = 1024;

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
    let ConnectRequest { protocol, with_cursor, name, claims } = request;
    let session = Session::new(app.next_session(), claims, app.limits.channels).resumable(name.is_some());
    let resume =
        name.map(|name| Box::new(Resume::new(name, app.feed.clone(), Arc::clone(&outbox), app.resume)));
    let binds = FuturesUnordered::new();
    let mut driver = Driver {
        app: Arc::clone(&app),
        socket,
        protocol,
        session,
        outbox,
        writer: Writer::default(),
        consecutive_writes: 0,
        connected_at: Instant::now(),
        rate_limit: RateLimit::new(&app.limits),
        kept: KeptMemory::new(&app.budget),
        with_cursor,
        resume,
        binds,
        judgements: FuturesUnordered::new(),
        recalls: None,
        waiting_message: None,
        memberships: HashMap::new(),
        easing: None,
    };
    let end = driver.run().await;
    let actions = driver.session.end();
    driver.perform(actions, &mut None);
    driver.resume = None;
    if let SessionEnd::Close(code, reason) = end {
        let close = CloseFrame { code: CloseCode::from(code), reason: Utf8Bytes::from_static(reason) };
        let _ = timeout(CLOSE_TIMEOUT, async {
            driver.writer.discard(&driver.outbox);
            driver.writer.write(&mut driver.socket, &driver.outbox).await?;
            driver.socket.close(Some(close)).await.map_err(|_| SessionEnd::Gone)
        })
        .await;
        // Wait for the client's close frame: closing the connection earlier could lose the last frames.
        let _ = timeout(CLOSE_TIMEOUT, async {
            while driver.socket.next().await.is_some_and(|frame| frame.is_ok()) {}
        })
        .await;
    } else if !driver.writer.is_within_frame() {
        // The library still holds the answer to the client's close frame.
        let _ = timeout(Duration::from_millis(100), driver.socket.flush()).await;
    }
}

struct Driver {
    app: Arc<App>,
    socket: Socket,
    protocol: &'static dyn SocketProtocol,
    session: Session,
    outbox: Arc<Outbox>,
    writer: Writer,
    /// Writes since the other branches were polled.
    consecutive_writes: u8,
    connected_at: Instant,
    rate_limit: RateLimit,
    /// Memory reserved for the client's topics, filters and tokens.
    kept: KeptMemory,
    /// Whether changes carry their cursor.
    with_cursor: bool,
    /// Bookmarks of the channels, if the client named its session.
    resume: Option<Box<Resume>>,
    binds: FuturesUnordered<BoxFuture<'static, BindAttempt>>,
    /// What private channels may read, while it is being judged.
    judgements: FuturesUnordered<BoxFuture<'static, Judged>>,
    /// The earlier broadcasts of channels, if one wanted any.
    recalls: Option<Box<Recalls>>,
    /// A message that waits for a refresh of the JWK set, or to be allowed. Later messages wait in the socket.
    waiting_message: Option<BoxFuture<'static, Waited>>,
    /// The memberships of the channels in their topics.
    memberships: HashMap<ChannelId, Membership>,
    /// Completes when the readers of the last broadcast have room. Later messages wait in the socket.
    easing: Option<BoxFuture<'static, ()>>,
}

/// While a write is stuck, the session looks this often whether a token has ended, or a private channel is to be judged.
const STUCK_CHECK: Duration = Duration::from_secs(1);
/// Why a private channel is refused, for the log, when its policies say so.
const NO_POLICY: &str = "no SELECT policy of realtime.messages lets the token's role and claims read it";

/// The outcome of a judgement of a channel.
type Judged = (ChannelId, u32, Result<TopicVerdict, TopicUnknown>);

/// A message that waited, and what for, if it was to be allowed.
type Waited = (Incoming, Option<(WriteQuestion, Result<TopicVerdict, TopicUnknown>)>);

/// A finished attempt to bind a channel.
type BindAttempt = (ChannelId, u32, Result<Bound, BindError>);

/// A bound subscription, ready for delivery.
struct Bound {
    subscription: Subscription,
    /// The channel's bookmark, if it was opened for this bind.
    opened: Option<Opened>,
}

impl Driver {
    async fn run(&mut self) -> SessionEnd {
        let app = Arc::clone(&self.app);
        let mut shutdown = pin!(app.end.cancelled());
        let mut keys = app.verifier.follow_keys();
        let mut rechecks = app.topic_judge.rechecks();
        let silence = app.limits.silence;
        let mut last_read = Instant::now();
        // Reset only when it fires or a token expires before it: most iterations need neither.
        let mut alarm = pin!(sleep_until(last_read + silence));
        loop {
            tokio::select! {
                // Poll writes first because they are the most frequent. The last branch prevents the others from starving.
                biased;
                taken = self.outbox.take(), if self.consecutive_writes < MAX_CONSECUTIVE_WRITES => match taken {
                    Taken::Frames => if let Err(end) = self.write_in_time(&mut keys, &mut rechecks).await {
                        return end;
                    },
                    Taken::Rebind(channel) => {
                        // A resumable channel continues from its bookmark. Nothing is delivered to it until it is bound.
                        if let Some(resume) = &mut self.resume {
                            resume.stop(channel);
                        }
                        let actions = self.session.rebind(channel);
                        self.perform(actions, &mut None);
                    }
                    Taken::Full => return self.too_slow(),
                },
                Some(waited) = OptionFuture::from(self.waiting_message.as_mut()) => {
                    self.waiting_message = None;
                    self.resume_message(waited);
                    self.advance_alarm_to_expiry(alarm.as_mut());
                }
                Some(()) = OptionFuture::from(self.easing.as_mut()) => self.easing = None,
                frame = self.socket.next(), if self.waiting_message.is_none() && self.easing.is_none()
                    && self.binds.len() + self.judgements.len() <= self.session.channel_count() + MAX_SUPERSEDED_BINDS => {
                    last_read = Instant::now();
                    self.socket.get_ref().message_complete();
                    self.writer.frame_read();
                    if let Err(end) = self.handle_frame(frame) {
                        if matches!(end, SessionEnd::Close(..)) {
                            // Write the router's pending frames first, such as the end of a channel.
                            let _ = timeout(CLOSE_TIMEOUT, app.feed.settled()).await;
                            self.write_last().await;
                        }
                        return end;
                    }
                    self.advance_alarm_to_expiry(alarm.as_mut());
                }
                Some(outcome) = self.binds.next(), if !self.binds.is_empty() => {
                    self.bound(outcome);
                    self.advance_alarm_to_expiry(alarm.as_mut());
                }
                Some(judged) = self.judgements.next(), if !self.judgements.is_empty() => {
                    self.judged(judged);
                    self.advance_alarm_to_expiry(alarm.as_mut());
                }
                (channel, is_done) = next_recalled(&mut self.recalls) => {
                    let actions = self.session.recalled(channel, (!is_done).then_some(NOT_RECALLED));
                    self.perform(actions, &mut None);
                }
                Ok(()) = rechecks.changed(), if self.session.has_private_channels() => {
                    let actions = self.session.judge_again(now(), true);
                    self.perform(actions, &mut None);
                }
                _ = work(&mut self.resume) => {}
                Ok(()) = keys.changed() => {
                    let actions = self.session.recheck(&app.verifier);
                    self.perform(actions, &mut None);
                }
                () = shutdown.as_mut() => {
                    self.write_last().await;
                    return SessionEnd::Close(1012, "the relay restarts, connect again");
                }
                () = alarm.as_mut() => {
                    if last_read.elapsed() >= silence {
                        return SessionEnd::Close(1000, "no heartbeat received");
                    }
                    let mut actions = self.session.expire(now());
                    actions.extend(self.session.judge_again(now(), false));
                    self.perform(actions, &mut None);
                    alarm.as_mut().reset(last_read + silence);
                    self.advance_alarm_to_expiry(alarm.as_mut());
                }
                () = ready(()), if self.consecutive_writes >= MAX_CONSECUTIVE_WRITES => self.consecutive_writes = 0,
            }
        }
    }

    /// Moves the alarm forward if a token expires before it, or a private channel is to be judged.
    fn advance_alarm_to_expiry(&self, alarm: Pin<&mut Sleep>) {
        let due = [self.session.next_expiry(), self.session.next_judgement()];
        if let Some(at) = due.into_iter().flatten().min() {
            let expiry = Instant::now() + Duration::from_secs(at.saturating_sub(now()).min(86_400));
            if expiry < alarm.deadline() {
                alarm.reset(expiry);
            }
        }
    }

    /// Writes the outbox once more before the session ends, if the client reads it.
    async fn write_last(&mut self) {
        if let Some(Taken::Frames) = self.outbox.take().now_or_never() {
            let _ = timeout(CLOSE_TIMEOUT, self.writer.write(&mut self.socket, &self.outbox)).await;
        }
    }

    /// Counts and returns the end of a session whose client reads too slowly.
    fn too_slow(&self) -> SessionEnd {
        self.app.observe.session_full();
        SessionEnd::Close(1013, "the client reads too slowly: connect again and read the rows again")
    }

    /// Writes the frames taken from the outbox, with the write timeout.
    async fn write_in_time(
        &mut self,
        keys: &mut watch::Receiver<Arc<KeySet>>,
        rechecks: &mut watch::Receiver<u64>,
    ) -> Result<(), SessionEnd> {
        // Yield now and then: a client with a steady stream of frames must not starve other tasks of its thread.
        consume_budget().await;
        self.consecutive_writes += 1;
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
                Ok(()) = keys.changed() => {
                    let actions = self.session.recheck(&self.app.verifier);
                    self.perform(actions, &mut None);
                }
                Ok(()) = rechecks.changed(), if self.session.has_private_channels() => {
                    let actions = self.session.judge_again(now(), true);
                    self.perform(actions, &mut None);
                }
                Some(judged) = self.judgements.next(), if !self.judgements.is_empty() => self.judged(judged),
                () = sleep_until(check) => {
                    check = Instant::now() + STUCK_CHECK;
                    let mut actions = self.session.expire(now());
                    actions.extend(self.session.judge_again(now(), false));
                    self.perform(actions, &mut None);
                }
            }
        }
        if let Some(resume) = &mut self.resume {
            resume.written();
        }
        Ok(())
    }

    /// Handles a frame from the client.
    ///
    /// # Errors
    /// How the session ends, if the frame ends it.
    fn handle_frame(&mut self, frame: Option<Result<SocketFrame, SocketError>>) -> Result<(), SessionEnd> {
        let is_expected_pong = match (&frame, &mut self.resume) {
            (Some(Ok(SocketFrame::Pong(payload))), Some(resume)) => resume.pong(payload),
            _ => false,
        };
        // The pong to one of the relay's pings does not count as a message.
        let is_within_rate = is_expected_pong || self.rate_limit.messages.take(self.connected_at.elapsed());
        match decode(self.protocol, frame) {
            Inbound::Message(message) => self.handle_message(message, is_within_rate),
            Inbound::Ignored => close_unless(is_within_rate),
            Inbound::Unreadable(error) => {
                close_unless(is_within_rate)?;
                self.push(self.protocol.unreadable(error));
                Ok(())
            }
            Inbound::Gone => Err(SessionEnd::Gone),
            Inbound::Close(code, reason) => Err(SessionEnd::Close(code, reason)),
        }
    }

    /// Handles a message from the client, within its limits.
    ///
    /// # Errors
    /// How the session ends, if the message ends it.
    fn handle_message(&mut self, message: Incoming, is_within_rate: bool) -> Result<(), SessionEnd> {
        if message.request == ClientRequest::OversizedJoin {
            self.receive(message);
            return close_unless(is_within_rate);
        }
        if !is_within_rate {
            let actions = self.session.close(&message.origin.channel.topic, TOO_MANY_MESSAGES);
            close_unless(!actions.is_empty())?;
            self.perform(actions, &mut None);
            return Ok(());
        }
        if message.request.is_join() && !self.rate_limit.joins.take(self.connected_at.elapsed()) {
            self.send(&message.origin.refusal("ClientJoinRateLimitReached: Too many joins per second"));
            return Err(SessionEnd::Close(1001, "Too many joins per second"));
        }
        if let ClientRequest::Join(join) = &message.request
            && self.app.limits.private_only
            && join.private_channel.is_none()
        {
            self.send(&message.origin.refusal(PRIVATE_ONLY));
            return Ok(());
        }
        if let ClientRequest::Join(join) = &message.request
            && !self.kept.reserve(&self.session, join)
        {
            self.send(&message.origin.refusal(NO_ROOM));
            return Ok(());
        }
        if let Some(question) = self.session.write_question(&message, now(), self.app.topic_judge.version()) {
            self.waiting_message =
                Some(ask_to_write(Arc::clone(&self.app.topic_judge), question, message).boxed());
            return Ok(());
        }
        let token = message.request.token();
        match token.and_then(|token| self.app.verifier.refresh_for(token)) {
            Some(refreshed) => self.waiting_message = Some(refreshed.map(|()| (message, None)).boxed()),
            None => self.receive(message),
        }
        Ok(())
    }

    /// Receives a message that waited.
    fn resume_message(&mut self, (message, answer): Waited) {
        match answer {
            None => self.receive(message),
            Some((question, Ok(verdict))) => {
                self.session.may_write(&question, now(), verdict.version, verdict.rights);
                self.receive(message);
            }
            Some((_, Err(TopicUnknown))) => self.send(&message.origin.refusal(UNAVAILABLE)),
        }
    }

    /// Handles what a private channel may read.
    fn judged(&mut self, (channel, judgement, outcome): Judged) {
        if let Ok(verdict) = outcome.as_ref()
            && !verdict.rights.any()
        {
            let why = verdict.why.as_deref().unwrap_or(NO_POLICY);
            self.app.observe.subscription_refused(&format!("private channel: {why}"));
        }
        let outcome = outcome.ok().map(|verdict| (verdict.rights, verdict.why));
        let actions = self.session.judged(channel, judgement, now(), outcome);
        self.kept.update(&self.session);
        self.perform(actions, &mut None);
    }

    fn receive(&mut self, message: Incoming) {
        let actions = self.session.receive(message, now(), &self.app.verifier);
        self.kept.update(&self.session);
        self.perform(actions, &mut None);
    }

    fn bound(&mut self, (channel, attempt, outcome): BindAttempt) {
        let (actions, mut bound) = match outcome {
            Ok(bound) => {
                let refusals = bound.subscription.refusals().cloned().collect();
                let hidden = bound.subscription.hidden().map(str::to_owned).collect();
                let outcome = BindOutcome { refusals, hidden };
                (self.session.bound(channel, attempt, Ok(outcome)), Some(bound))
            }
            Err(BindError::Refused(refusal)) => (self.session.bound(channel, attempt, Err(refusal)), None),
            Err(BindError::Unavailable) => (self.session.unavailable(channel, attempt), None),
        };
        self.perform(actions, &mut bound);
    }

    /// Performs the session's actions. `bound` is the subscription for [`Action::Join`].
    fn perform(&mut self, actions: Vec<Action>, bound: &mut Option<Bound>) {
        for action in actions {
            match action {
                Action::Send(message) => self.send(&message),
                Action::Bind { channel, attempt, identity, requests } => {
                    let feed = self.app.feed.clone();
                    let topic = self.session.topic(channel).unwrap_or_default();
                    let heard = self.heard_topic(channel);
                    let scope = (topic, self.session.is_private(channel));
                    let opening =
                        self.resume.as_mut().map(|resume| resume.open(channel, identity.claims(), scope));
                    let bind = async move {
                        let subscription = feed.bind(channel, identity, &requests).await?.with_topic(heard);
                        let opened = match opening {
                            Some(opening) => {
                                // Wait until the tables are watched: a bookmark from before that would be a gap.
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
                        let with_cursor = self.with_cursor || self.resume.is_some();
                        let format = ChannelFormat { topic, with_cursor, by_operation };
                        self.join(channel, format, &greeting, bound);
                    }
                }
                Action::Listen { channel, identity } => self.listen(channel, identity),
                Action::Judge { channel, judgement, identity, name, is_recheck } => {
                    let judge = Arc::clone(&self.app.topic_judge);
                    let question = TopicQuestion { identity, channel: name, act: TopicAct::Read, is_recheck };
                    let judged = async move { (channel, judgement, judge.judge(&question).await) };
                    self.judgements.push(judged.boxed());
                }
                Action::Recall { channel, name, recall } => match self.resume {
                    Some(_) => {
                        let actions = self.session.recalled(channel, Some(RESUMED_INSTEAD));
                        self.perform(actions, &mut None);
                    }
                    None => {
                        let recalls = self.recalls.get_or_insert_default();
                        recalls.begin(self.app.feed.clone(), channel, name, recall);
                    }
                },
                Action::Enter { channel, name, membership, private } => {
                    if let Some(recalls) = &mut self.recalls {
                        let frames = recalls.frames(channel, &name.topic, self.protocol, &self.outbox);
                        // As what is replayed of changes: together they may be more than the limit of the queue.
                        self.outbox.deliver(Unit::REPLAY, frames, true);
                    }
                    let (topics, outbox) = (&self.app.topics, Arc::clone(&self.outbox));
                    let membership = topics.enter(channel, name, self.protocol, membership, private, outbox);
                    self.memberships.insert(channel, membership);
                }
                Action::Permit { channel, rights } => {
                    if let Some(membership) = self.memberships.get(&channel) {
                        membership.permit(rights);
                    }
                }
                Action::Exit { channel } => _ = self.memberships.remove(&channel),
                Action::Broadcast { channel, origin, broadcast, acknowledges, is_private } => {
                    self.broadcast(channel, &origin, (broadcast, is_private), acknowledges);
                }
                Action::Track { channel, origin, object } => self.track(channel, &origin, object),
                Action::Forget { channel } => {
                    if let Some(resume) = &mut self.resume {
                        resume.forget(channel);
                    }
                }
                Action::Leave { channel, farewell } => {
                    if let Some(recalls) = &mut self.recalls {
                        recalls.stop(channel);
                    }
                    if let Some(resume) = &mut self.resume {
                        resume.stop(channel);
                    }
                    self.app.feed.leave(channel, &self.outbox, self.frames(&farewell));
                }
            }
        }
    }

    /// Starts delivery to a channel after the greeting.
    fn join(&mut self, channel: ChannelId, format: ChannelFormat, greeting: &[Outgoing], bound: Bound) {
        let Bound { subscription, opened } = bound;
        let codec = self.protocol.codec(format);
        let greeting = self.frames(greeting);
        match &mut self.resume {
            Some(resume) => resume.start(channel, subscription, codec, greeting, opened),
            None => {
                let outbox = Arc::clone(&self.outbox);
                if let Some(recalls) = &mut self.recalls
                    && let Some(cursor) = recalls.cursor(channel)
                {
                    greeting.into_iter().for_each(|frame| outbox.push(frame));
                    let feed = self.app.feed.clone();
                    let catch_up = CatchUp::new(feed, channel, subscription, codec, cursor, outbox);
                    return recalls.follow(channel, catch_up);
                }
                let subscriber = Subscriber { codec, subscription, since: None, outbox, missed: None };
                self.app.feed.join(channel, subscriber, greeting);
            }
        }
    }

    /// Starts delivery of the broadcasts from the database to a channel that has no other subscription.
    fn listen(&mut self, channel: ChannelId, identity: Identity) {
        let topic = self.session.topic(channel).unwrap_or_default().to_owned();
        let Some(heard) = self.heard_topic(channel) else { return };
        let format = ChannelFormat { topic, with_cursor: false, by_operation: false };
        let bound = Bound { subscription: Subscription::of_topic(identity, heard), opened: None };
        self.join(channel, format, &[], bound);
    }

    /// Returns the topic whose broadcasts from the database a channel gets.
    fn heard_topic(&self, channel: ChannelId) -> Option<TopicScope> {
        let (topic, is_private) = self.session.heard_topic(channel)?;
        Some(TopicScope { name: self.protocol.channel_of(topic).into(), is_private })
    }

    /// Sends a broadcast to its topic, then the acknowledgement, if the channel has them. A refusal is always answered.
    fn broadcast(
        &mut self,
        channel: ChannelId,
        origin: &Origin,
        (broadcast, is_private): (Broadcast, bool),
        acknowledges: bool,
    ) {
        if broadcast.content.len() > self.app.limits.broadcast_bytes + BROADCAST_FIELDS {
            return self.send(&origin.reply(Response::TooLarge));
        }
        match self.app.topics.publish((&origin.channel.topic, is_private), Some(channel), broadcast) {
            Ok(congestion) => {
                if !congestion.is_empty() {
                    self.easing = Some(congestion.eased().boxed());
                }
                if acknowledges {
                    self.send(&origin.reply(Response::Done));
                }
            }
            Err(error) => self.send(&origin.refusal(error.to_string())),
        }
    }

    /// Changes what a channel tracks, answers, then tells the topic.
    fn track(&mut self, channel: ChannelId, origin: &Origin, object: Option<String>) {
        let Some(membership) = self.memberships.get_mut(&channel) else { return };
        let outcome = match object {
            Some(_) if !self.rate_limit.presence.take(self.connected_at.elapsed()) => {
                Err(String::from(TOO_MANY_PRESENCES))
            }
            Some(object) => membership.track(object).map_err(|error| error.to_string()),
            None => {
                membership.untrack();
                Ok(())
            }
        };
        let response = outcome.map_or_else(Response::Refused, |()| Response::Done);
        self.send(&origin.reply(response));
        if let Some(membership) = self.memberships.get(&channel) {
            membership.settle();
        }
    }

    /// Queues a message of the session.
    fn send(&self, message: &Outgoing) {
        self.push(self.protocol.encode(message));
    }

    fn push(&self, text: String) {
        self.outbox.push(Frame::text(text, self.outbox.budget()));
    }

    fn frames(&self, messages: &[Outgoing]) -> Vec<Frame> {
        let frame = |message| Frame::text(self.protocol.encode(message), self.outbox.budget());
        messages.iter().map(frame).collect()
    }
}

/// Returns the next channel whose earlier broadcasts are read.
async fn next_recalled(recalls: &mut Option<Box<Recalls>>) -> (ChannelId, bool) {
    match recalls {
        Some(recalls) => recalls.next().await,
        None => pending().await,
    }
}

/// Lets a message wait until it is known whether its channel may write.
async fn ask_to_write(judge: Arc<TopicJudge>, question: WriteQuestion, message: Incoming) -> Waited {
    let asked = TopicQuestion {
        identity: question.identity.clone(),
        channel: question.name.clone(),
        act: TopicAct::Write,
        is_recheck: false,
    };
    let verdict = judge.judge(&asked).await;
    (message, Some((question, verdict)))
}

/// Closes the connection of a client that exceeds its message rate where no channel can be closed instead.
fn close_unless(is_within_rate: bool) -> Result<(), SessionEnd> {
    if is_within_rate { Ok(()) } else { Err(SessionEnd::Close(1008, TOO_MANY_MESSAGES)) }
}
