//! Delivery of changes to a client's channels: binds their subscriptions, and starts delivery live, from a bookmark, from the cursor of
//! a join, or after earlier broadcasts.

use std::future::pending;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;

use crate::feed::catch_up::CatchUp;
use crate::feed::deliver::frame::Frame;
use crate::feed::deliver::group::Subscriber;
use crate::feed::deliver::outbox::Outbox;
use crate::feed::deliver::queue::Unit;
use crate::feed::handle::Feed;
use crate::feed::subscribe::BindError;
use crate::model::codec::protocol::{ChannelFormat, SocketProtocol};
use crate::model::identity::bookmark::Opened;
use crate::model::log::cursor::Cursor;
use crate::model::policy::visibility::Identity;
use crate::model::session::channel::ChannelId;
use crate::model::session::join::Recall;
use crate::model::subscription::binding::Subscription;
use crate::model::subscription::request::Request;
use crate::model::subscription::topic::TopicScope;
use crate::transport::socket::recalls::Recalls;
use crate::transport::socket::resume::{self, Resume};

/// A finished attempt to bind a channel: the channel, the number of the attempt, and the outcome.
pub type BindAttempt = (ChannelId, u32, Result<Bound, BindError>);

/// A bound subscription, ready for delivery.
pub struct Bound {
    /// The subscription.
    pub subscription: Subscription,
    /// The channel's bookmark, if it was opened for this bind.
    opened: Option<Opened>,
}

impl Bound {
    /// Returns the subscription of a channel that gets only the broadcasts from the database to its topic.
    pub fn of_topic(identity: Identity, topic: TopicScope) -> Self {
        Self { subscription: Subscription::of_topic(identity, topic), opened: None }
    }
}

/// What a channel subscribes to.
pub struct BindRequest<'a> {
    /// The identity to bind to.
    pub identity: Identity,
    /// The requests of its join.
    pub requests: Vec<Request>,
    /// Its topic, and whether it is private.
    pub scope: (&'a str, bool),
    /// The topic whose broadcasts from the database it gets.
    pub heard_topic: Option<TopicScope>,
}

/// What has finished for a channel.
#[expect(clippy::large_enum_variant, reason = "it is handled where it is returned, and never kept")]
pub enum Finished {
    /// An attempt to bind it.
    Bind(BindAttempt),
    /// Reading its earlier broadcasts, and whether they could be read.
    Recall(ChannelId, bool),
}

/// The deliveries to one client's channels.
pub struct Deliveries {
    feed: Feed,
    outbox: Arc<Outbox>,
    protocol: &'static dyn SocketProtocol,
    binds: FuturesUnordered<BoxFuture<'static, BindAttempt>>,
    /// Bookmarks of the channels, if the client named its session.
    resume: Option<Box<Resume>>,
    /// The channels that want earlier broadcasts or continue from a cursor, if there are any.
    recalls: Option<Box<Recalls>>,
}

impl Deliveries {
    /// Creates the deliveries of a new client: none. `resume` is there if the client named its session.
    pub fn new(
        feed: Feed,
        outbox: Arc<Outbox>,
        protocol: &'static dyn SocketProtocol,
        resume: Option<Box<Resume>>,
    ) -> Self {
        Self { feed, outbox, protocol, binds: FuturesUnordered::new(), resume, recalls: None }
    }

    /// Whether the client named its session.
    pub fn is_resumable(&self) -> bool {
        self.resume.is_some()
    }

    /// Starts an attempt to bind a channel, which opens its bookmark, too.
    pub fn bind(&mut self, channel: ChannelId, attempt: u32, request: BindRequest<'_>) {
        let BindRequest { identity, requests, scope, heard_topic } = request;
        let feed = self.feed.clone();
        let opening = self.resume.as_mut().map(|resume| resume.open(channel, identity.claims(), scope));
        let bind = async move {
            let subscription = feed.bind(channel, identity, &requests).await?.with_topic(heard_topic);
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

    /// Returns the number of attempts to bind that are not finished.
    pub fn pending_binds(&self) -> usize {
        self.binds.len()
    }

    /// Starts delivery to a channel after the greeting, from the cursor if there is one.
    pub fn start(
        &mut self,
        channel: ChannelId,
        format: ChannelFormat,
        since: Option<Cursor>,
        greeting: Vec<Frame>,
        bound: Bound,
    ) {
        let Bound { subscription, opened } = bound;
        let codec = self.protocol.codec(format);
        if let Some(resume) = &mut self.resume {
            return resume.start(channel, subscription, codec, greeting, opened);
        }
        let outbox = Arc::clone(&self.outbox);
        let reached = self.recalls.as_mut().and_then(|recalls| recalls.cursor(channel));
        if let Some(cursor) = reached.or(since) {
            greeting.into_iter().for_each(|frame| outbox.push(frame));
            let feed = self.feed.clone();
            let catch_up = CatchUp::new(feed, channel, subscription, codec, cursor, outbox);
            return self.recalls.get_or_insert_default().follow(channel, catch_up);
        }
        let subscriber = Subscriber { codec, subscription, since: None, outbox, missed: None };
        self.feed.join(channel, subscriber, greeting);
    }

    /// Stops delivery to a channel until it is bound again. A resumable one then continues from its bookmark.
    pub fn pause(&mut self, channel: ChannelId) {
        if let Some(resume) = &mut self.resume {
            resume.stop(channel);
        }
    }

    /// Ends delivery to a channel, then sends the farewell.
    pub fn stop(&mut self, channel: ChannelId, farewell: Vec<Frame>) {
        if let Some(recalls) = &mut self.recalls {
            recalls.stop(channel);
        }
        self.pause(channel);
        self.feed.leave(channel, &self.outbox, farewell);
    }

    /// Deletes the bookmark of a channel that the client left.
    pub fn forget(&mut self, channel: ChannelId) {
        if let Some(resume) = &mut self.resume {
            resume.forget(channel);
        }
    }

    /// Starts to read the earlier broadcasts of a channel. Must not be called for a resumable session.
    pub fn recall(&mut self, channel: ChannelId, name: String, recall: Recall) {
        let recalls = self.recalls.get_or_insert_default();
        recalls.begin(self.feed.clone(), channel, name, recall);
    }

    /// Queues the earlier broadcasts of a channel that were read.
    pub fn deliver_recalled(&mut self, channel: ChannelId, topic: &str) {
        if let Some(recalls) = &mut self.recalls {
            let frames = recalls.frames(channel, topic, self.protocol, &self.outbox);
            // As what is replayed of changes: together they may be more than the limit of the queue.
            self.outbox.deliver(Unit::REPLAY, frames, true);
        }
    }

    /// Handles a pong. Returns false if none was expected.
    pub fn pong(&mut self, payload: &[u8]) -> bool {
        self.resume.as_mut().is_some_and(|resume| resume.pong(payload))
    }

    /// Called after all taken frames were written.
    pub fn written(&mut self) {
        if let Some(resume) = &mut self.resume {
            resume.written();
        }
    }

    /// Runs replays and bookmarks until a bind or a recall has finished. Cancel safe.
    pub async fn next(&mut self) -> Finished {
        tokio::select! {
            biased;
            Some(attempt) = self.binds.next(), if !self.binds.is_empty() => Finished::Bind(attempt),
            (channel, is_done) = next_recalled(&mut self.recalls) => Finished::Recall(channel, is_done),
            never = resume::work(&mut self.resume) => match never {},
        }
    }

    /// Ends all bookmarks and replays.
    pub fn end(&mut self) {
        self.resume = None;
    }
}

/// Returns the next channel whose earlier broadcasts are read.
async fn next_recalled(recalls: &mut Option<Box<Recalls>>) -> (ChannelId, bool) {
    match recalls {
        Some(recalls) => recalls.next().await,
        None => pending().await,
    }
}
