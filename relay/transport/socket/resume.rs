//! Resumable sessions: channels continue from their bookmarks, and the bookmarks follow what the client has acknowledged.
//!
//! A ping is queued behind everything up to a known position of the feed. Its pong acknowledges all of that.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::{pending, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::time::{Instant, Sleep, sleep};

use crate::auth::verifier::now;
use crate::feed::catch_up::{CatchUp, Progress};
use crate::feed::command::DeliveredUpTo;
use crate::feed::deliver::frame::Frame;
use crate::feed::deliver::group::Subscriber;
use crate::feed::deliver::outbox::Outbox;
use crate::feed::handle::Feed;
use crate::feed::replay::reader::ReplayError;
use crate::feed::subscribe::BindError;
use crate::model::codec::protocol::Codec;
use crate::model::identity::bookmark::{Bookmark, BookmarkKey, Opened, SessionName};
use crate::model::identity::claims::Claims;
use crate::model::log::cursor::Cursor;
use crate::model::session::channel::ChannelId;
use crate::model::subscription::binding::Subscription;
use crate::transport::socket::acks::{AckMode, AckPings};
use crate::transport::socket::channel_catch_up::ChannelCatchUp;

/// Delay between a delivery and the ping that asks for its acknowledgement.
const PING_DELAY: Duration = Duration::from_millis(500);
/// Maximum interval between bookmark updates when nothing is delivered.
const MAX_IDLE_INTERVAL: Duration = Duration::from_secs(240);
/// Delay before a failed replay is retried.
const RETRY_DELAY: Duration = Duration::from_millis(500);

/// Maximum number of pings without a pong.
const MAX_PENDING_PINGS: usize = 16;

/// The gap text for a client that was disconnected for too long.
const LAPSED: &str = "this session was disconnected for longer than it is kept, read the rows again";
/// The gap text for a connection whose session was taken over.
const TAKEN_OVER: &str = "another connection took over this session, or its user has too many sessions: changes missed from here on are not replayed";

/// A bookmark that this connection owns.
struct OpenBookmark {
    bookmark: Bookmark,
    /// Set when another connection has taken the bookmark over.
    taken_over: Arc<AtomicBool>,
    codec: Codec,
    /// The position it was opened at, then the position the client has acknowledged.
    at: Option<Cursor>,
    /// Expiry of the channel's token, in Unix seconds. Nothing is delivered from then on, although the feed's position advances.
    expires_at: u64,
}

/// A bookmark that is being opened for a channel.
struct Opening {
    channel: ChannelId,
    key: BookmarkKey,
    /// Shared with the task that opens it. True when the client left the channel or opens another bookmark for it.
    left: Arc<AtomicBool>,
}

/// The position up to which a channel is received once a pong arrives.
type BookmarkMark = (ChannelId, Bookmark, Cursor);

/// A pending query for the feed's position, with a ping queued behind that position.
struct PendingPing {
    ping: u64,
    /// The live channels with a bookmark.
    channels: Vec<(ChannelId, Bookmark)>,
    position: BoxFuture<'static, Option<DeliveredUpTo>>,
}

/// The bookmarks and replays of one resumable session.
pub struct Resume {
    name: SessionName,
    feed: Feed,
    outbox: Arc<Outbox>,
    /// Interval between bookmark updates when nothing is delivered. Keeps bookmarks from expiring.
    idle_interval: Duration,
    bookmarks: BTreeMap<ChannelId, OpenBookmark>,
    opening: Vec<Opening>,
    /// Channels that are catching up.
    catching_up: BTreeMap<ChannelId, ChannelCatchUp>,
    pending: Option<PendingPing>,
    pings: AckPings<Vec<BookmarkMark>>,
    next_ping: Pin<Box<Sleep>>,
}

impl Resume {
    /// Creates the state of a named session that can be resumed for `away` after its client disconnected.
    pub fn new(name: SessionName, feed: Feed, outbox: Arc<Outbox>, away: Duration) -> Self {
        let idle_interval = MAX_IDLE_INTERVAL.min(away / 4);
        Self {
            name,
            feed,
            outbox,
            idle_interval,
            bookmarks: BTreeMap::new(),
            opening: Vec::new(),
            catching_up: BTreeMap::new(),
            pending: None,
            pings: AckPings::default(),
            next_ping: Box::pin(sleep(idle_interval)),
        }
    }

    /// Opens the bookmark of a channel. Returns `None` if the channel already owns it and its token has not expired. After the
    /// expiry nothing was delivered, so the bookmark is opened again and the channel continues from it.
    pub fn open(
        &mut self,
        channel: ChannelId,
        claims: &Claims,
        (topic, is_private): (&str, bool),
    ) -> impl Future<Output = Result<Option<Opened>, BindError>> + use<> {
        let key = BookmarkKey::new(self.name, claims, topic, is_private);
        let is_owned = self.is_in_force(channel)
            && self.bookmarks.get(&channel).is_some_and(|held| held.bookmark.key == key);
        let (feed, left) = (self.feed.clone(), Arc::<AtomicBool>::default());
        self.opening.retain(Opening::is_pending);
        // An earlier attempt may finish later than this one and would take the bookmark over.
        for earlier in self.opening.iter().filter(|opening| opening.channel == channel) {
            earlier.left.store(true, Ordering::Relaxed);
        }
        if !is_owned {
            self.opening.push(Opening { channel, key: key.clone(), left: Arc::clone(&left) });
        }
        async move {
            match is_owned {
                true => Ok(None),
                false => feed.bookmark(key, || !left.load(Ordering::Relaxed)).await.map(Some),
            }
        }
    }

    /// Starts delivery to a channel after the greeting: from its opened bookmark, or, if it already owns one, from its current
    /// position with another identity or other rights.
    pub fn start(
        &mut self,
        channel: ChannelId,
        subscription: Subscription,
        codec: Codec,
        greeting: Vec<Frame>,
        opened: Option<Opened>,
    ) {
        let mut since = self.catching_up.remove(&channel).map(|catching_up| catching_up.position());
        let mut gap = None;
        let expires_at = subscription.identity().claims().expires_at();
        let has_expired = !self.is_in_force(channel);
        if let Some(held) = self.bookmarks.get_mut(&channel) {
            if has_expired {
                // The old token expired during the bind. Nothing was delivered since, so ignore positions of the feed.
                since = since.or_else(|| held.at.clone());
                if let Some(pending) = &mut self.pending {
                    pending.channels.retain(|(other, _)| *other != channel);
                }
            }
            held.expires_at = expires_at;
        }
        if let Some(opened) = opened {
            let (bookmark, taken_over) = (opened.bookmark().clone(), Arc::default());
            (since, gap) = match opened {
                Opened::At(_, cursor) => (Some(cursor), None),
                Opened::Lapsed(_) => (None, Some(LAPSED)),
            };
            let at = since.clone();
            self.bookmarks
                .insert(channel, OpenBookmark { bookmark, taken_over, codec: codec.clone(), at, expires_at });
        }
        match since {
            Some(since) => self.replay(channel, subscription, codec, greeting, since),
            None => self.start_live(channel, subscription, codec, greeting, gap),
        }
    }

    /// Ends live delivery to a channel and replays from `since`.
    fn replay(
        &mut self,
        channel: ChannelId,
        subscription: Subscription,
        codec: Codec,
        greeting: Vec<Frame>,
        since: Cursor,
    ) {
        // Deliveries until now, if any, were for other rights.
        self.feed.leave(channel, &self.outbox, greeting);
        let (feed, outbox) = (self.feed.clone(), Arc::clone(&self.outbox));
        let catch_up = CatchUp::new(feed, channel, subscription, codec, since, outbox);
        self.catching_up.insert(channel, ChannelCatchUp::new(catch_up, Duration::ZERO));
    }

    /// Starts live delivery to a channel. `gap` says why earlier changes are missing.
    fn start_live(
        &mut self,
        channel: ChannelId,
        subscription: Subscription,
        codec: Codec,
        mut greeting: Vec<Frame>,
        gap: Option<&str>,
    ) {
        let outbox = Arc::clone(&self.outbox);
        let subscriber = Subscriber { codec, subscription, since: None, outbox, missed: None };
        greeting.extend(gap.map(|why| subscriber.gap(why)));
        self.feed.join(channel, subscriber, greeting);
        if gap.is_some() {
            self.next_ping.as_mut().reset(Instant::now());
            // The old position cannot be replayed any more.
            if let Some(held) = self.bookmarks.get_mut(&channel) {
                held.at = None;
            }
        }
    }

    /// Stops delivery to a channel and keeps its bookmark, so that the client can resume it.
    pub fn stop(&mut self, channel: ChannelId) {
        self.catching_up.remove(&channel);
        self.bookmarks.remove(&channel);
    }

    /// Deletes the bookmark of a channel that the client left.
    pub fn forget(&mut self, channel: ChannelId) {
        if let Some(held) = self.bookmarks.remove(&channel) {
            self.feed.bookmarks().forget(held.bookmark);
        }
        for opening in
            self.opening.extract_if(.., |opening| opening.channel == channel && opening.is_pending())
        {
            opening.left.store(true, Ordering::Relaxed);
            self.feed.bookmarks().forget_opening(opening.key);
        }
    }

    /// Handles a pong: the client has everything sent before the ping of this number. Returns false if it was not expected.
    pub fn pong(&mut self, payload: &[u8]) -> bool {
        let Ok(number) = payload.try_into().map(u64::from_be_bytes) else { return false };
        let is_expected = self.pings.handle_pong(number);
        self.move_bookmarks();
        is_expected
    }

    /// Called after frames were written: schedules a ping and continues replays that waited for the client.
    pub fn written(&mut self) {
        if self.outbox.was_delivered_to() && self.next_ping.deadline() > Instant::now() + PING_DELAY {
            self.next_ping.as_mut().reset(Instant::now() + PING_DELAY);
        }
        if !self.catching_up.is_empty() && !self.outbox.is_behind() {
            self.catching_up.values_mut().for_each(ChannelCatchUp::resume);
        }
    }

    /// Runs replays and pings; never returns. Cancel safe.
    pub async fn work(&mut self) -> Infallible {
        poll_fn(|context| {
            while self.step(context) {}
            Poll::Pending
        })
        .await
    }

    /// Performs one step. Returns false if there is nothing to do now.
    fn step(&mut self, context: &mut Context<'_>) -> bool {
        let mut finished = None;
        for (channel, catching_up) in &mut self.catching_up {
            if let Poll::Ready(outcome) = catching_up.poll(context) {
                finished = Some((*channel, outcome));
                break;
            }
        }
        if let Some((channel, (catch_up, outcome))) = finished {
            self.replay_step_done(channel, catch_up, outcome);
            return true;
        }
        if let Some(pending) = &mut self.pending
            && let Poll::Ready(position) = pending.position.poll_unpin(context)
        {
            if let (Some(pending), Some(DeliveredUpTo { channels, .. })) = (self.pending.take(), position) {
                let position =
                    |channel| channels.iter().find(|(other, _)| *other == channel).map(|(_, at)| at.clone());
                let in_force = pending.channels.into_iter().filter(|(channel, _)| self.is_in_force(*channel));
                let marks = in_force
                    .filter_map(|(channel, bookmark)| Some((channel, bookmark, position(channel)?)))
                    .collect();
                self.pings.record(pending.ping, marks);
                self.move_bookmarks();
            }
            return true;
        }
        if self.next_ping.as_mut().poll(context).is_ready() {
            self.next_ping.as_mut().reset(Instant::now() + self.idle_interval);
            self.query_position();
            return true;
        }
        false
    }

    fn replay_step_done(
        &mut self,
        channel: ChannelId,
        catch_up: CatchUp,
        outcome: Result<Progress, ReplayError>,
    ) {
        self.catching_up.remove(&channel);
        match outcome {
            Ok(Progress::Live) => {
                catch_up.settle();
                self.next_ping.as_mut().reset(Instant::now() + PING_DELAY);
            }
            Ok(Progress::More) => {
                if self.is_in_force(channel)
                    && let Some(held) = self.bookmarks.get(&channel)
                {
                    let mark = (channel, held.bookmark.clone(), catch_up.since());
                    let number = self.pings.next(AckMode::Own);
                    self.pings.record(number, vec![mark]);
                    self.outbox.push(self.ping(number));
                }
                let mut catching_up = ChannelCatchUp::waiting(catch_up);
                if !self.outbox.is_behind() {
                    catching_up.resume();
                }
                self.catching_up.insert(channel, catching_up);
            }
            Err(ReplayError::Gap(why)) => {
                let (subscription, codec) = (catch_up.subscription().clone(), catch_up.codec().clone());
                drop(catch_up);
                self.start_live(channel, subscription, codec, Vec::new(), Some(why));
            }
            Err(error) => {
                // Retry: the database is unavailable, or the token has expired and the channel is about to be closed.
                if let ReplayError::Unavailable(error) = error {
                    tracing::debug!(error = %error, "replay not read, retrying");
                }
                self.catching_up.insert(channel, ChannelCatchUp::new(catch_up, RETRY_DELAY));
            }
        }
    }

    /// Whether the channel's token has not expired, so that everything up to now was delivered to it.
    fn is_in_force(&self, channel: ChannelId) -> bool {
        self.bookmarks.get(&channel).is_some_and(|held| now() < held.expires_at)
    }

    /// Queries the feed's position, with a ping queued behind everything up to it.
    fn query_position(&mut self) {
        self.bookmarks.retain(|_, held| {
            let is_ours = !held.taken_over.load(Ordering::Relaxed);
            if !is_ours {
                let gap = held.codec.encoding().gap(TAKEN_OVER, None);
                self.outbox.push(Frame::notice(gap, self.outbox.budget()));
            }
            is_ours
        });
        let live = self.bookmarks.iter().filter(|(channel, _)| !self.catching_up.contains_key(channel));
        let channels: Vec<_> = live.map(|(channel, held)| (*channel, held.bookmark.clone())).collect();
        // Stop pinging a client that does not answer.
        if self.pending.is_some() || channels.is_empty() || self.pings.pending() >= MAX_PENDING_PINGS {
            return;
        }
        let number = self.pings.next(AckMode::Router);
        let queried = channels.iter().map(|(channel, _)| *channel).collect();
        let (feed, then) = (self.feed.clone(), Some((Arc::clone(&self.outbox), self.ping(number))));
        let position = async move { feed.position(queried, then).await }.boxed();
        self.pending = Some(PendingPing { ping: number, channels, position });
    }

    fn ping(&self, number: u64) -> Frame {
        Frame::ping(number.to_be_bytes(), self.outbox.budget())
    }

    /// Moves bookmarks to the acknowledged positions. Never moves one back: pongs of one mode may arrive long after those of the
    /// other.
    fn move_bookmarks(&mut self) {
        while let Some(marks) = self.pings.next_acknowledged() {
            for (channel, bookmark, to) in marks {
                if let Some(held) = self.bookmarks.get_mut(&channel)
                    && held.bookmark == bookmark
                    && held.at.as_ref().is_none_or(|at| to.is_at_or_after(at))
                    && !self.outbox.is_to_rebind(channel)
                {
                    held.at = Some(to.clone());
                    self.feed.bookmarks().move_to(bookmark, to, &held.taken_over);
                }
            }
        }
    }
}

impl Opening {
    /// Whether the task that opens the bookmark is still running: it holds the other reference.
    fn is_pending(&self) -> bool {
        Arc::strong_count(&self.left) > 1
    }
}

/// Runs the work of a resumable session; never returns.
pub async fn work(resume: &mut Option<Box<Resume>>) -> Infallible {
    match resume {
        Some(resume) => resume.work().await,
        None => pending().await,
    }
}
