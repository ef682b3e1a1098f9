//! One subscriber with a cursor: replays what it missed, then hands it over to live delivery.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};
use tokio::time::sleep;

use crate::feed::authorize::gate::Gate;
use crate::feed::command::{Command, FollowOutcome};
use crate::feed::deliver::fan_out::{deliver_to_one, now};
use crate::feed::deliver::frame::Frame;
use crate::feed::deliver::group::{GroupKey, NOT_WATCHED, Subscriber, SubscriberGroup, TABLE_CHANGED};
use crate::feed::deliver::outbox::Outbox;
use crate::feed::handle::Feed;
use crate::feed::read::batch::Batch;
use crate::feed::replay::reader::{ReplayError, ReplaySink};
use crate::model::catalog::relation::Catalog;
use crate::model::codec::protocol::Codec;
use crate::model::log::cursor::Cursor;
use crate::model::row::change::Change;
use crate::model::session::channel::ChannelId;
use crate::model::subscription::binding::Subscription;

/// Longest pause between two queries to the router.
const MAX_PAUSE: Duration = Duration::from_secs(1);
/// Maximum time of one step while the feed keeps moving, so that a waiting answer can be sent.
const TURN: Duration = Duration::from_secs(2);

/// The gap for a client whose replay does not fit in memory.
pub const NO_ROOM: &str = "not enough memory to replay what was missed, read the rows again";

/// A channel with a cursor. Dropping it ends delivery.
pub struct CatchUp {
    feed: Feed,
    channel: ChannelId,
    subscription: Subscription,
    codec: Codec,
    /// The position of the replay. Valid even when a step is cancelled.
    since: watch::Sender<Cursor>,
    /// The queue for its frames.
    pub outbox: Arc<Outbox>,
    /// The cursor is known not to be in the future.
    is_checked: bool,
    /// Delivery continues after it is dropped.
    is_detached: bool,
}

/// The progress of a catch-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Everything missed is in the outbox, and live changes follow.
    Live,
    /// The outbox has to be read before more is replayed.
    More,
}

impl CatchUp {
    /// Creates a subscriber at this cursor; nothing is delivered before [`Self::go_on`].
    pub fn new(
        feed: Feed,
        channel: ChannelId,
        subscription: Subscription,
        codec: Codec,
        since: Cursor,
        outbox: Arc<Outbox>,
    ) -> Self {
        let since = watch::Sender::new(since);
        Self { feed, channel, subscription, codec, since, outbox, is_checked: false, is_detached: false }
    }

    /// Leaves and returns the same subscriber at another cursor, with another outbox.
    pub fn restarted(self, since: Cursor, outbox: Arc<Outbox>) -> Self {
        let (feed, channel) = (self.feed.clone(), self.channel);
        let (subscription, codec) = (self.subscription.clone(), self.codec.clone());
        // It must leave before the next one joins with the same channel id.
        drop(self);
        Self::new(feed, channel, subscription, codec, since, outbox)
    }

    /// Returns the position of the replay, as it moves. It stays what it was when this is dropped.
    pub fn positions(&self) -> watch::Receiver<Cursor> {
        self.since.subscribe()
    }

    /// Replays until nothing is missing, or the outbox has enough to read.
    ///
    /// # Errors
    /// When what was missed cannot be read.
    pub async fn go_on(&mut self) -> Result<Progress, ReplayError> {
        let (mut pause, mut is_catalog_checked, started) = (Duration::from_millis(50), false, Instant::now());
        if self.subscription.is_younger_than(&self.since()) {
            return Err(ReplayError::Gap(NOT_WATCHED));
        }
        loop {
            match self.request_delivery().await {
                Some(FollowOutcome::Live) => return Ok(Progress::Live),
                Some(FollowOutcome::Ahead) => {
                    self.feed.replay_reader().check(&self.since()).await?;
                    self.is_checked = true;
                }
                Some(FollowOutcome::Missed(missed, to)) => {
                    let reader = self.feed.replay_reader();
                    let mut sink = self.sink();
                    reader.replay_recent(&missed, is_catalog_checked, &mut sink).await?;
                    let has_sent = sink.sent > 0;
                    self.since.send_replace(self.since().merge(&to));
                    // The feed may have moved during the replay, and may do so each time.
                    let is_enough = is_catalog_checked && has_sent || started.elapsed() > TURN;
                    if is_enough || self.outbox.is_behind() {
                        return Ok(Progress::More);
                    }
                    is_catalog_checked = true;
                }
                Some(FollowOutcome::Behind(to)) => {
                    let (reader, since) = (self.feed.replay_reader(), self.since());
                    let is_there = reader.replay_to_one(&since, &to, &mut self.sink()).await?;
                    if !is_there || self.outbox.is_behind() {
                        return Ok(Progress::More);
                    }
                }
                Some(FollowOutcome::Gap(why)) => return Err(ReplayError::Gap(why)),
                Some(FollowOutcome::NotYet) | None => {
                    sleep(pause).await;
                    pause = (pause * 2).min(MAX_PAUSE);
                }
            }
        }
    }

    /// Asks the router for live delivery from here. `None` when the relay ends.
    async fn request_delivery(&self) -> Option<FollowOutcome> {
        let (outcome, receiver) = oneshot::channel();
        let subscriber = Subscriber {
            codec: self.codec.clone(),
            subscription: self.subscription.clone(),
            since: Some(self.since()),
            outbox: Arc::clone(&self.outbox),
            missed: None,
        };
        let checked = self.is_checked;
        self.feed.send(Command::Follow { channel: self.channel, subscriber, checked, outcome });
        receiver.await.ok()
    }

    /// Returns the channel as a replay sink. A replayed batch may begin with changes that it already has.
    fn sink(&self) -> SingleSink<'_> {
        let key = GroupKey {
            codec: self.codec.clone(),
            subscription: self.subscription.clone(),
            since: Some(self.since()),
        };
        let group = SubscriberGroup::new(Arc::new(key), self.channel, Arc::clone(&self.outbox));
        SingleSink { group, outbox: &self.outbox, since: &self.since, sent: 0 }
    }

    /// Ends the catch-up; delivery continues until the channel leaves.
    pub fn settle(mut self) {
        self.is_detached = true;
    }

    /// Tells a gap, and delivers what comes from now on until the channel leaves.
    pub fn begin_anew(self, why: &str) {
        let (outbox, subscription) = (Arc::clone(&self.outbox), self.subscription.clone());
        let gap = Frame::notice(self.codec.encoding().gap(why, None), outbox.budget());
        let codec = self.codec.clone();
        let subscriber = Subscriber { codec, subscription, since: None, outbox, missed: None };
        self.feed.join(self.channel, subscriber, vec![gap]);
        self.settle();
    }

    /// Returns its subscription.
    pub fn subscription(&self) -> &Subscription {
        &self.subscription
    }

    /// Returns its wire format.
    pub fn codec(&self) -> &Codec {
        &self.codec
    }

    /// Returns the position of the replay.
    pub fn since(&self) -> Cursor {
        self.since.borrow().clone()
    }

    /// Subscribes to the position of the replay.
    pub fn place(&self) -> watch::Receiver<Cursor> {
        self.since.subscribe()
    }

    /// Returns the position up to which everything is in the outbox; `None` while the changelog is not being read.
    pub async fn position(&self) -> Option<Cursor> {
        let position = self.feed.position(vec![self.channel], None).await?;
        position.channels.into_iter().next().map(|(_, position)| position)
    }

    /// Ends delivery and returns the position up to which everything is in the outbox.
    pub async fn leave(&self) -> Option<Cursor> {
        let (reply, receiver) = oneshot::channel();
        let outbox = Arc::clone(&self.outbox);
        let farewell = Vec::new();
        self.feed.send(Command::Leave { channel: self.channel, outbox, farewell, reply: Some(reply) });
        receiver.await.ok().flatten()
    }
}

impl Drop for CatchUp {
    fn drop(&mut self) {
        if !self.is_detached {
            self.feed.leave(self.channel, &self.outbox, Vec::new());
        }
    }
}

/// The replay sink of one channel.
struct SingleSink<'a> {
    group: SubscriberGroup,
    outbox: &'a Outbox,
    since: &'a watch::Sender<Cursor>,
    /// Number of frames queued.
    sent: usize,
}

impl ReplaySink for SingleSink<'_> {
    async fn deliver(
        &mut self,
        gate: &Gate,
        catalog: &Arc<Catalog>,
        batch: &Batch,
    ) -> Result<(), ReplayError> {
        let is_new = |change: &&Change| !self.since.borrow().has(change.xid, change.number);
        let subscription = self.group.subscription();
        if subscription.is_stale(catalog)
            || batch.changes.iter().filter(is_new).any(|change| subscription.has_lost(change, catalog))
        {
            return Err(ReplayError::Gap(TABLE_CHANGED));
        }
        // A gap instead of closing the client: it would come back for the same changes.
        if !self.outbox.budget().make_room(batch.bytes()) {
            return Err(ReplayError::Gap(NO_ROOM));
        }
        self.sent += deliver_to_one(gate, catalog, batch, &self.group).await?;
        // Its token may have expired before the end of the batch: the position stays.
        match self.group.subscription().identity().claims().expires_at() <= now() {
            true => Err(ReplayError::Ended),
            false => Ok(()),
        }
    }

    fn reached(&mut self, position: Cursor) {
        self.since.send_modify(|since| *since = since.merge(&position));
    }

    fn has_enough(&self) -> bool {
        self.outbox.is_behind() || self.outbox.is_full()
    }
}
