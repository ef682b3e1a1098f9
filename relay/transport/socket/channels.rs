//! The channels of one client: gives the session its inputs, and performs the actions that the session returns.

use std::net::IpAddr;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, OptionFuture};

use crate::auth::verifier::now;
use crate::feed::authorize::topic_judge::{TopicQuestion, TopicUnknown};
use crate::feed::deliver::frame::Frame;
use crate::feed::deliver::outbox::Outbox;
use crate::feed::subscribe::BindError;
use crate::model::catalog::topic_rules::TopicAct;
use crate::model::codec::protocol::{ChannelFormat, SocketProtocol};
use crate::model::identity::bookmark::SessionName;
use crate::model::identity::claims::Claims;
use crate::model::session::action::Action;
use crate::model::session::channel::{BindOutcome, ChannelId};
use crate::model::session::machine::{Session, UNAVAILABLE};
use crate::model::session::message::{ClientRequest, Incoming, Outgoing, Response};
use crate::model::session::private::{NOT_RECALLED, RESUMED_INSTEAD};
use crate::model::subscription::topic::TopicScope;
use crate::status::board::Connected;
use crate::transport::app::App;
use crate::transport::clients::{ClientEntry, ClientKind};
use crate::transport::socket::allowance::Allowance;
use crate::transport::socket::deliveries::{BindAttempt, BindRequest, Bound, Deliveries, Finished};
use crate::transport::socket::judgements::{Judgements, ReadJudgement, WriteJudgement};
use crate::transport::socket::memberships::Memberships;
use crate::transport::socket::resume::Resume;

/// The reason for closing a channel or connection whose client exceeds its message rate.
pub const TOO_MANY_MESSAGES: &str = "Too many messages per second";
/// The refusal of a join whose topic, filters and token do not fit.
const NO_ROOM: &str = "ChannelRateLimitReached: The topics, filters and tokens of all channels are too long";
/// The refusal of a public channel where only private ones are allowed.
const PRIVATE_ONLY: &str = "PrivateOnly: This project only allows private channels";
/// Why a private channel is refused, for the log, when its policies say so.
const NO_POLICY: &str = "no SELECT policy of realtime.messages lets the token's role and claims read it";
/// Number of superseded binds that may still be pending. With more, no further message is read from the socket.
const MAX_SUPERSEDED_BINDS: usize = 8;

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
    /// Its address.
    pub address: IpAddr,
}

/// The connection is to be closed with this code and reason.
pub struct CloseConnection(pub u16, pub &'static str);

/// A message that waited, and the answer to what it waited for, if that was the right to write.
type Waited = (Incoming, Option<WriteJudgement>);

/// Something that the channels waited for.
pub enum Event {
    /// The message that waited.
    Message(Waited),
    /// The readers of the last broadcast have room.
    Eased,
    /// A delivery.
    Delivery(Finished),
    /// What a private channel may read.
    Judgement(ReadJudgement),
}

/// The channels of one client.
pub struct Channels {
    app: Arc<App>,
    protocol: &'static dyn SocketProtocol,
    outbox: Arc<Outbox>,
    session: Session,
    /// The client in the list of all.
    entry: ClientEntry,
    /// The user that the last token named is connected.
    connected: Option<Connected>,
    allowance: Allowance,
    deliveries: Deliveries,
    memberships: Memberships,
    judgements: Judgements,
    /// Whether changes carry their cursor.
    with_cursor: bool,
    /// A message that waits for a refresh of the JWK set, or to be allowed. Later messages wait in the socket.
    waiting_message: Option<BoxFuture<'static, Waited>>,
}

impl Channels {
    /// Creates the channels of a client that has just connected: none.
    pub fn new(app: Arc<App>, outbox: Arc<Outbox>, request: ConnectRequest) -> Self {
        let ConnectRequest { protocol, with_cursor, name, claims, address } = request;
        let connected = app.status.board.connect(&claims);
        let number = app.next_session();
        let entry = app.clients.add(number, (ClientKind::WebSocket, address), &claims, Arc::clone(&outbox));
        let session = Session::new(number, claims, app.limits.channels).resumable(name.is_some());
        let (feed, limits) = (app.feed.clone(), &app.limits);
        let resume =
            name.map(|name| Box::new(Resume::new(name, feed.clone(), Arc::clone(&outbox), app.resume)));
        let topics = Arc::clone(&app.topics);
        Self {
            protocol,
            session,
            entry,
            connected,
            allowance: Allowance::new(limits, &app.budget),
            with_cursor: with_cursor || resume.is_some(),
            deliveries: Deliveries::new(feed, Arc::clone(&outbox), protocol, resume),
            memberships: Memberships::new(topics, Arc::clone(&outbox), protocol, limits.broadcast_bytes),
            judgements: Judgements::new(Arc::clone(&app.topic_judge)),
            waiting_message: None,
            outbox,
            app,
        }
    }

    /// Whether another message may be received now.
    pub fn may_receive(&self) -> bool {
        let pending = self.deliveries.pending_binds() + self.judgements.pending();
        self.waiting_message.is_none()
            && !self.memberships.is_easing()
            && pending <= self.session.channel_count() + MAX_SUPERSEDED_BINDS
    }

    /// Waits for the next event, and runs replays and bookmarks meanwhile. Cancel safe.
    pub async fn next(&mut self) -> Event {
        tokio::select! {
            biased;
            Some(waited) = OptionFuture::from(self.waiting_message.as_mut()) => {
                self.waiting_message = None;
                Event::Message(waited)
            }
            Some(()) = self.memberships.eased() => Event::Eased,
            finished = self.deliveries.next() => Event::Delivery(finished),
            Some(judged) = self.judgements.next() => Event::Judgement(judged),
        }
    }

    /// Handles an event.
    pub fn handle(&mut self, event: Event) {
        match event {
            Event::Message(waited) => self.resume_message(waited),
            Event::Eased => {}
            Event::Delivery(Finished::Bind(attempt)) => self.bound(attempt),
            Event::Delivery(Finished::Recall(channel, is_done)) => {
                let actions = self.session.recalled(channel, (!is_done).then_some(NOT_RECALLED));
                self.perform(actions);
            }
            Event::Judgement(judged) => self.judged(judged),
        }
    }

    /// Waits for what private channels may read; `None` if nothing is judged. Cancel safe.
    pub async fn next_judgement(&mut self) -> Option<ReadJudgement> {
        self.judgements.next().await
    }

    /// Notes that the client sent a frame.
    pub fn note_frame(&self) {
        if let Some(connected) = &self.connected {
            connected.note();
        }
    }

    /// Whether a frame is within the client's message rate. A pong that the relay asked for is not counted.
    pub fn count_frame(&mut self, pong: Option<&[u8]>) -> bool {
        let is_expected_pong = pong.is_some_and(|payload| self.deliveries.pong(payload));
        is_expected_pong || self.allowance.take_message()
    }

    /// Handles a message from the client, within its limits.
    ///
    /// # Errors
    /// If the connection is to be closed.
    pub fn receive(&mut self, message: Incoming, is_within_rate: bool) -> Result<(), CloseConnection> {
        if message.request == ClientRequest::OversizedJoin {
            self.accept(message);
            return close_unless(is_within_rate);
        }
        if !is_within_rate {
            let actions = self.session.close(&message.origin.channel.topic, TOO_MANY_MESSAGES);
            close_unless(!actions.is_empty())?;
            self.perform(actions);
            return Ok(());
        }
        if message.request.is_join() && !self.allowance.take_join() {
            self.send(&message.origin.refusal("ClientJoinRateLimitReached: Too many joins per second"));
            return Err(CloseConnection(1001, "Too many joins per second"));
        }
        match self.join_refusal(&message.request) {
            Some(refusal) => self.send(&message.origin.refusal(refusal)),
            None => self.accept_or_wait(message),
        }
        Ok(())
    }

    /// Returns why a join exceeds what the client may have.
    fn join_refusal(&mut self, request: &ClientRequest) -> Option<&'static str> {
        let ClientRequest::Join(join) = request else { return None };
        if self.app.limits.private_only && join.private_channel.is_none() {
            return Some(PRIVATE_ONLY);
        }
        (!self.allowance.reserve(&self.session, join)).then_some(NO_ROOM)
    }

    /// Gives a message to the session, now or once its channel is known to be allowed to write, or the keys were refreshed.
    fn accept_or_wait(&mut self, message: Incoming) {
        if let Some(question) = self.session.write_question(&message, now(), self.judgements.version()) {
            self.waiting_message = Some(self.judgements.may_write(question, message).boxed());
            return;
        }
        let token = message.request.token();
        match token.and_then(|token| self.app.verifier.refresh_for(token)) {
            Some(refreshed) => self.waiting_message = Some(refreshed.map(|()| (message, None)).boxed()),
            None => self.accept(message),
        }
    }

    /// Gives a message that waited to the session.
    fn resume_message(&mut self, (message, answer): Waited) {
        match answer {
            None => self.accept(message),
            Some((question, Ok(verdict))) => {
                self.session.may_write(&question, now(), verdict.version, verdict.rights);
                self.accept(message);
            }
            Some((_, Err(TopicUnknown))) => self.send(&message.origin.refusal(UNAVAILABLE)),
        }
    }

    fn accept(&mut self, message: Incoming) {
        let actions = self.session.receive(message, now(), &self.app.verifier);
        self.allowance.update(&self.session);
        if let Some(identity) = actions.iter().rev().find_map(Action::identity) {
            self.is_of(identity.claims());
        }
        self.perform(actions);
    }

    /// Takes the user of these claims for the one who is connected: clients connect with a key, and show the user's token in joins.
    fn is_of(&mut self, claims: &Claims) {
        self.entry.is_of(claims);
        if !self.connected.as_ref().is_some_and(|connected| connected.is_of(claims)) {
            self.connected = self.app.status.board.connect(claims);
        }
    }

    /// Handles what a private channel may read.
    pub fn judged(&mut self, (channel, judgement, outcome): ReadJudgement) {
        if let Ok(verdict) = outcome.as_ref()
            && !verdict.rights.any()
        {
            let why = verdict.why.as_deref().unwrap_or(NO_POLICY);
            let sub = self.session.connection_identity().claims().sub();
            self.app.observe.subscription_refused(sub, &format!("private channel: {why}"));
        }
        let outcome = outcome.ok().map(|verdict| (verdict.rights, verdict.why));
        let actions = self.session.judged(channel, judgement, now(), outcome);
        self.allowance.update(&self.session);
        self.perform(actions);
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
        for action in actions {
            match action {
                Action::Join { channel, topic, by_operation, since, greeting } => {
                    if let Some(bound) = bound.take() {
                        self.note_open(channel);
                        let format = ChannelFormat { topic, with_cursor: self.with_cursor, by_operation };
                        let since = since.map(|since| *since);
                        if since.is_some() {
                            self.app.observe.resumed_from_cursor();
                        }
                        self.deliveries.start(channel, format, since, self.frames(&greeting), bound);
                    }
                }
                other => self.perform([other]),
            }
        }
    }

    /// Binds a channel again, because its relation is gone or changed. Nothing is delivered to it until it is bound.
    pub fn rebind(&mut self, channel: ChannelId) {
        self.deliveries.pause(channel);
        let actions = self.session.rebind(channel);
        self.perform(actions);
    }

    /// Closes the channels whose token was signed by a key that was withdrawn.
    pub fn recheck_keys(&mut self) {
        let actions = self.session.recheck(&self.app.verifier);
        self.perform(actions);
    }

    /// Judges all private channels again, because the rules changed.
    pub fn recheck_rules(&mut self) {
        let actions = self.session.judge_again(now(), true);
        self.perform(actions);
    }

    /// Whether there is a private channel.
    pub fn has_private(&self) -> bool {
        self.session.has_private_channels()
    }

    /// Closes the channels whose token has expired, and judges private channels again that are due.
    pub fn check_time(&mut self) {
        let mut actions = self.session.expire(now());
        actions.extend(self.session.judge_again(now(), false));
        self.perform(actions);
    }

    /// Returns when [`Self::check_time`] is due, in Unix seconds.
    pub fn next_check(&self) -> Option<u64> {
        [self.session.next_expiry(), self.session.next_judgement()].into_iter().flatten().min()
    }

    /// Called after all taken frames were written.
    pub fn written(&mut self) {
        self.deliveries.written();
    }

    /// Ends all channels.
    pub fn end(&mut self) {
        self.connected = None;
        let actions = self.session.end();
        self.perform(actions);
        self.deliveries.end();
    }

    /// Performs the session's actions. [`Action::Join`] needs a subscription: [`Self::bound`] performs it.
    fn perform(&mut self, actions: impl IntoIterator<Item = Action>) {
        for action in actions {
            match action {
                Action::Send(message) => self.send(&message),
                Action::Bind { channel, attempt, identity, requests } => {
                    let heard_topic = self.heard_topic(channel);
                    let topic = self.session.topic(channel).unwrap_or_default();
                    let scope = (topic, self.session.is_private(channel));
                    let request = BindRequest { identity, requests, scope, heard_topic };
                    self.deliveries.bind(channel, attempt, request);
                }
                Action::Join { .. } => {}
                Action::Listen { channel, identity } => {
                    self.note_open(channel);
                    let topic = self.session.topic(channel).unwrap_or_default().to_owned();
                    if let Some(heard) = self.heard_topic(channel) {
                        let format = ChannelFormat { topic, with_cursor: false, by_operation: false };
                        let bound = Bound::of_topic(identity, heard);
                        self.deliveries.start(channel, format, None, Vec::new(), bound);
                    }
                }
                Action::Judge { channel, judgement, identity, name, is_recheck } => {
                    let question = TopicQuestion { identity, channel: name, act: TopicAct::Read, is_recheck };
                    self.judgements.begin(channel, judgement, question);
                }
                Action::Recall { channel, .. } if self.deliveries.is_resumable() => {
                    let actions = self.session.recalled(channel, Some(RESUMED_INSTEAD));
                    self.perform(actions);
                }
                Action::Recall { channel, name, recall } => self.deliveries.recall(channel, name, recall),
                Action::Enter { channel, name, membership, private } => {
                    self.note_open(channel);
                    self.deliveries.deliver_recalled(channel, &name.topic);
                    self.memberships.enter(channel, name, membership, private);
                }
                Action::Permit { channel, rights } => self.memberships.permit(channel, rights),
                Action::Exit { channel } => {
                    self.note_closed(channel);
                    self.memberships.exit(channel);
                }
                Action::Broadcast { channel, origin, broadcast, acknowledges, is_private } => {
                    let topic = (origin.channel.topic.as_str(), is_private);
                    let response = self.memberships.broadcast(topic, channel, broadcast);
                    // A refusal is always answered.
                    if acknowledges || response != Response::Done {
                        self.send(&origin.reply(response));
                    }
                }
                Action::Track { channel, origin, object } => {
                    let is_within_rate = object.is_none() || self.allowance.take_presence();
                    if let Some(response) = self.memberships.track(channel, object, is_within_rate) {
                        self.send(&origin.reply(response));
                        self.memberships.settle(channel);
                    }
                }
                Action::Forget { channel } => self.deliveries.forget(channel),
                Action::Leave { channel, farewell } => {
                    self.note_closed(channel);
                    self.deliveries.stop(channel, self.frames(&farewell));
                }
            }
        }
    }

    /// Adds a channel to the client's entry.
    fn note_open(&self, channel: ChannelId) {
        if let Some(topic) = self.session.topic(channel) {
            self.entry.opened(channel, topic, self.session.is_private(channel));
        }
    }

    /// Removes a channel from the client's entry, unless the session keeps it.
    fn note_closed(&self, channel: ChannelId) {
        if self.session.topic(channel).is_none() {
            self.entry.closed(channel);
        }
    }

    /// Returns the topic whose broadcasts from the database a channel gets.
    fn heard_topic(&self, channel: ChannelId) -> Option<TopicScope> {
        let (topic, is_private) = self.session.heard_topic(channel)?;
        Some(TopicScope { name: self.protocol.channel_of(topic).into(), is_private })
    }

    /// Queues a message of the session.
    fn send(&self, message: &Outgoing) {
        self.outbox.push(self.frame(message));
    }

    fn frames(&self, messages: &[Outgoing]) -> Vec<Frame> {
        messages.iter().map(|message| self.frame(message)).collect()
    }

    fn frame(&self, message: &Outgoing) -> Frame {
        Frame::text(self.protocol.encode(message), self.outbox.budget())
    }
}

/// Closes the connection of a client that exceeds its message rate where no channel can be closed instead.
pub fn close_unless(is_within_rate: bool) -> Result<(), CloseConnection> {
    if is_within_rate { Ok(()) } else { Err(CloseConnection(1008, TOO_MANY_MESSAGES)) }
}
