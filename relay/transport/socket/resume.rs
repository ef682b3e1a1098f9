//! What makes a socket one that can be resumed: its channels begin where their bookmarks are, and the bookmarks follow
//! what the client has surely received.
//!
//! A ping goes out behind everything up to a known place of the feed. Its pong says that the client has all of that.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::{pending, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::time::{Instant, Sleep, sleep};

use crate::auth::verifier::now;
use crate::feed::catch_up::{CatchUp, Progress};
use crate::feed::command::DeliveredUpTo;
use crate::feed::deliver::group::Subscriber;
use crate::feed::deliver::outbox::Outbox;
use crate::feed::handle::Feed;
use crate::feed::replay::reader::ReplayError;
use crate::feed::subscribe::BindError;
use crate::model::codec::event::Codec;
use crate::model::identity::bookmark::{Bookmark, BookmarkKey, Opened, SessionName};
use crate::model::identity::claims::Claims;
use crate::model::log::cursor::Cursor;
use crate::model::session::machine::ChannelId;
use crate::model::subscription::binding::Subscription;
use crate::transport::socket::acks::{AckMode, AckPings};
use crate::transport::socket::catch_up::ChannelCatchUp;
use crate::transport::socket::frame_writer::ping;

/// After something was delivered, the client is asked so much later what it has.
const SOON: Duration = Duration::from_millis(500);
/// Without anything delivered, bookmarks move at least this often.
const LATE: Duration = Duration::from_secs(240);
/// When the past cannot be read, the next try comes so much later.
const PAUSE: Duration = Duration::from_millis(500);

/// So many pings may be without their pong.
const MOST_PINGS: usize = 16;

/// What is told to whoever was away for too long.
const LAPSED: &str = "this session was away for longer than it is kept, read the rows again";
/// What is told to a connection whose session goes on elsewhere.
const TAKEN: &str = "another connection goes on with this session, or its user has too many of them: what this one misses from here on is not given back";

/// A channel's bookmark in our hands.
struct OpenBookmark {
    bookmark: Bookmark,
    /// It was taken over by another connection.
    taken: Arc<AtomicBool>,
    codec: Codec,
    /// Where it was found, and then where the client's pongs have brought it.
    at: Option<Cursor>,
    /// The second at which the channel's token ends: from then on nothing is delivered to it, whatever the position.
    expires_at: u64,
}

/// A bookmark that is being opened for a channel.
struct Opening {
    channel: ChannelId,
    key: BookmarkKey,
    /// Shared with whoever opens it. True when the client left the channel, or opens another bookmark for it.
    left: Arc<AtomicBool>,
}

/// Up to where a channel is received once a pong has come.
type BookmarkMark = (ChannelId, Bookmark, Cursor);

/// The position is being asked for, with a ping behind it.
struct PendingPing {
    ping: u64,
    /// The channels that it is about: those that were delivered to.
    channels: Vec<(ChannelId, Bookmark)>,
    position: BoxFuture<'static, Option<DeliveredUpTo>>,
}

/// The channels of one socket that named its session.
pub struct Resume {
    name: SessionName,
    feed: Feed,
    outbox: Arc<Outbox>,
    /// Without anything delivered, bookmarks move this often, so that they do not grow old.
    late: Duration,
    held: BTreeMap<ChannelId, OpenBookmark>,
    opening: Vec<Opening>,
    /// Channels that are told what they missed.
    behind: BTreeMap<ChannelId, ChannelCatchUp>,
    asked: Option<PendingPing>,
    pings: AckPings<Vec<BookmarkMark>>,
    due: Pin<Box<Sleep>>,
}

impl Resume {
    /// For the session of this name; `away` is how long it may be away.
    pub fn new(name: SessionName, feed: Feed, outbox: Arc<Outbox>, away: Duration) -> Self {
        let late = LATE.min(away / 4);
        Self {
            name,
            feed,
            outbox,
            late,
            held: BTreeMap::new(),
            opening: Vec::new(),
            behind: BTreeMap::new(),
            asked: None,
            pings: AckPings::default(),
            due: Box::pin(sleep(late)),
        }
    }

    /// Opens the bookmark of a channel; none inside when the channel has it in hand. Once its token has ended it has not:
    /// from then on nothing was delivered to it, and it goes on at the bookmark.
    pub fn open(
        &mut self,
        channel: ChannelId,
        claims: &Claims,
        topic: &str,
    ) -> impl Future<Output = Result<Option<Opened>, BindError>> + use<> {
        let key = BookmarkKey::new(self.name, claims, topic);
        let has_it =
            self.is_in_force(channel) && self.held.get(&channel).is_some_and(|held| held.bookmark.key == key);
        let (feed, left) = (self.feed.clone(), Arc::<AtomicBool>::default());
        self.opening.retain(Opening::goes_on);
        // An earlier try may come later than this one, and would take the bookmark from us.
        for earlier in self.opening.iter().filter(|opening| opening.channel == channel) {
            earlier.left.store(true, Ordering::Relaxed);
        }
        if !has_it {
            self.opening.push(Opening { channel, key: key.clone(), left: Arc::clone(&left) });
        }
        async move {
            match has_it {
                true => Ok(None),
                false => feed.bookmark(key, || !left.load(Ordering::Relaxed)).await.map(Some),
            }
        }
    }

    /// Delivers to a channel from its bookmark on, after the greeting. With a bookmark in hand: goes on, as somebody else
    /// or with other rights.
    pub fn start(
        &mut self,
        channel: ChannelId,
        subscription: Subscription,
        codec: Codec,
        greeting: Vec<Bytes>,
        opened: Option<Opened>,
    ) {
        let mut since = self.behind.remove(&channel).map(|behind| behind.place());
        let mut gap = None;
        let expires_at = subscription.identity().claims().expires_at();
        let has_ended = !self.is_in_force(channel);
        if let Some(held) = self.held.get_mut(&channel) {
            if has_ended {
                // While this one was bound: from then on nothing was delivered, whatever a position says.
                since = since.or_else(|| held.at.clone());
                if let Some(asked) = &mut self.asked {
                    asked.channels.retain(|(asked, _)| *asked != channel);
                }
            }
            held.expires_at = expires_at;
        }
        if let Some(opened) = opened {
            let (bookmark, taken) = (opened.bookmark().clone(), Arc::default());
            (since, gap) = match opened {
                Opened::At(_, cursor) => (Some(cursor), None),
                Opened::Lapsed(_) => (None, Some(LAPSED)),
            };
            let at = since.clone();
            self.held.insert(channel, OpenBookmark { bookmark, taken, codec: codec.clone(), at, expires_at });
        }
        match since {
            Some(since) => self.read(channel, subscription, codec, greeting, since),
            None => self.begin_anew(channel, subscription, codec, greeting, gap),
        }
    }

    fn read(
        &mut self,
        channel: ChannelId,
        subscription: Subscription,
        codec: Codec,
        greeting: Vec<Bytes>,
        since: Cursor,
    ) {
        // What was delivered until now, if anything, was for other rights.
        self.feed.leave(channel, &self.outbox, greeting);
        let (feed, outbox) = (self.feed.clone(), Arc::clone(&self.outbox));
        let follower = CatchUp::new(feed, channel, subscription, codec, since, outbox);
        self.behind.insert(channel, ChannelCatchUp::new(follower, Duration::ZERO));
    }

    /// Delivers from now on; `gap` says why what came before is missing.
    fn begin_anew(
        &mut self,
        channel: ChannelId,
        subscription: Subscription,
        codec: Codec,
        mut greeting: Vec<Bytes>,
        gap: Option<&str>,
    ) {
        greeting.extend(gap.map(|why| Bytes::from(codec.gap(why, ""))));
        let outbox = Arc::clone(&self.outbox);
        self.feed.join(
            channel,
            Subscriber { codec, subscription, since: None, outbox, missed: None },
            greeting,
        );
        if gap.is_some() {
            self.due.as_mut().reset(Instant::now());
            // Where it was cannot be had any more.
            if let Some(held) = self.held.get_mut(&channel) {
                held.at = None;
            }
        }
    }

    /// Delivery to a channel ends; its client may come back to it.
    pub fn stop(&mut self, channel: ChannelId) {
        self.behind.remove(&channel);
        self.held.remove(&channel);
    }

    /// A client left a channel and will not come back to it.
    pub fn forget(&mut self, channel: ChannelId) {
        if let Some(held) = self.held.remove(&channel) {
            self.feed.bookmarks().forget(held.bookmark);
        }
        for opening in self.opening.extract_if(.., |opening| opening.channel == channel && opening.goes_on())
        {
            opening.left.store(true, Ordering::Relaxed);
            self.feed.bookmarks().forget_opening(opening.key);
        }
    }

    /// A pong came: the client has everything before the ping of this number. False when it was not asked for.
    pub fn pong(&mut self, payload: &[u8]) -> bool {
        let Ok(number) = payload.try_into().map(u64::from_be_bytes) else { return false };
        let is_asked_for = self.pings.answered(number);
        self.receive();
        is_asked_for
    }

    /// Frames were written.
    pub fn written(&mut self) {
        if self.outbox.was_delivered_to() && self.due.deadline() > Instant::now() + SOON {
            self.due.as_mut().reset(Instant::now() + SOON);
        }
        if !self.behind.is_empty() && !self.outbox.is_behind() {
            self.behind.values_mut().for_each(ChannelCatchUp::go_on);
        }
    }

    /// Does what there is to do, for ever. Cancel safe.
    pub async fn work(&mut self) -> Infallible {
        poll_fn(|context| {
            while self.step(context) {}
            Poll::Pending
        })
        .await
    }

    /// Whether something was done.
    fn step(&mut self, context: &mut Context<'_>) -> bool {
        let mut done = None;
        for (channel, behind) in &mut self.behind {
            if let Poll::Ready(outcome) = behind.poll(context) {
                done = Some((*channel, outcome));
                break;
            }
        }
        if let Some((channel, (follower, outcome))) = done {
            self.has_read(channel, follower, outcome);
            return true;
        }
        if let Some(asked) = &mut self.asked
            && let Poll::Ready(position) = asked.position.poll_unpin(context)
        {
            if let (Some(asked), Some(DeliveredUpTo { channels, .. })) = (self.asked.take(), position) {
                let place =
                    |asked| channels.iter().find(|(told, _)| *told == asked).map(|(_, here)| here.clone());
                let told = asked.channels.into_iter().filter(|(channel, _)| self.is_in_force(*channel));
                let marks = told
                    .filter_map(|(channel, bookmark)| Some((channel, bookmark, place(channel)?)))
                    .collect();
                self.pings.note(asked.ping, marks);
                self.receive();
            }
            return true;
        }
        if self.due.as_mut().poll(context).is_ready() {
            self.due.as_mut().reset(Instant::now() + self.late);
            self.ask();
            return true;
        }
        false
    }

    fn has_read(&mut self, channel: ChannelId, follower: CatchUp, outcome: Result<Progress, ReplayError>) {
        self.behind.remove(&channel);
        match outcome {
            Ok(Progress::Live) => {
                follower.settle();
                self.due.as_mut().reset(Instant::now() + SOON);
            }
            Ok(Progress::More) => {
                if self.is_in_force(channel)
                    && let Some(held) = self.held.get(&channel)
                {
                    let mark = (channel, held.bookmark.clone(), follower.since());
                    let number = self.pings.next(AckMode::Own);
                    self.pings.note(number, vec![mark]);
                    self.outbox.push(ping(number));
                }
                let mut behind = ChannelCatchUp::waiting(follower);
                if !self.outbox.is_behind() {
                    behind.go_on();
                }
                self.behind.insert(channel, behind);
            }
            Err(ReplayError::Gap(why)) => {
                let (subscription, codec) = (follower.subscription().clone(), follower.codec().clone());
                drop(follower);
                self.begin_anew(channel, subscription, codec, Vec::new(), Some(why));
            }
            Err(missed) => {
                // The database is to be asked again; or the token has ended, and its channel does in a moment.
                if let ReplayError::Unavailable(error) = missed {
                    tracing::debug!(error = %error, "a session waits for what it missed");
                }
                self.behind.insert(channel, ChannelCatchUp::new(follower, PAUSE));
            }
        }
    }

    /// Whether everything up to now was delivered to a channel: its token has not ended.
    fn is_in_force(&self, channel: ChannelId) -> bool {
        self.held.get(&channel).is_some_and(|held| now() < held.expires_at)
    }

    /// Asks where the feed is, with a ping behind everything up to there.
    fn ask(&mut self) {
        self.held.retain(|_, held| {
            let is_ours = !held.taken.load(Ordering::Relaxed);
            if !is_ours {
                self.outbox.push(held.codec.gap(TAKEN, ""));
            }
            is_ours
        });
        let delivered = self.held.iter().filter(|(channel, _)| !self.behind.contains_key(channel));
        let channels: Vec<_> = delivered.map(|(channel, held)| (*channel, held.bookmark.clone())).collect();
        // A client that does not answer pings is not asked for ever.
        if self.asked.is_some() || channels.is_empty() || self.pings.waiting() >= MOST_PINGS {
            return;
        }
        let number = self.pings.next(AckMode::Router);
        let asked = channels.iter().map(|(channel, _)| *channel).collect();
        let (feed, then) = (self.feed.clone(), Some((Arc::clone(&self.outbox), ping(number))));
        let position = async move { feed.position(asked, then).await }.boxed();
        self.asked = Some(PendingPing { ping: number, channels, position });
    }

    /// Moves bookmarks to what the last pong says, and never back: pongs of one way may come long after those of the other.
    fn receive(&mut self) {
        while let Some(marks) = self.pings.received() {
            for (channel, bookmark, to) in marks {
                if let Some(held) = self.held.get_mut(&channel)
                    && held.bookmark == bookmark
                    && held.at.as_ref().is_none_or(|at| to.is_at_or_after(at))
                    && !self.outbox.is_to_rebind(channel)
                {
                    held.at = Some(to.clone());
                    self.feed.bookmarks().move_to(bookmark, to, &held.taken);
                }
            }
        }
    }
}

impl Opening {
    /// Somebody is about it still; else it is ours alone.
    fn goes_on(&self) -> bool {
        Arc::strong_count(&self.left) > 1
    }
}

/// The work of a session that can be resumed; for ever.
pub async fn work(resume: &mut Option<Box<Resume>>) -> Infallible {
    match resume {
        Some(resume) => resume.work().await,
        None => pending().await,
    }
}
