//! Somebody who comes with a cursor: first what was missed, then what is delivered to everybody.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};
use tokio::time::sleep;

use crate::feed::authorize::gate::Gate;
use crate::feed::command::{Command, FollowOutcome};
use crate::feed::deliver::fan_out::{now, tell_one};
use crate::feed::deliver::group::{ALTERED, ANOTHER, GroupKey, Subscriber, SubscriberGroup};
use crate::feed::deliver::outbox::Outbox;
use crate::feed::handle::Feed;
use crate::feed::read::batch::Batch;
use crate::feed::replay::reader::{ReplayError, ReplaySink};
use crate::model::catalog::relation::Catalog;
use crate::model::codec::event::Codec;
use crate::model::log::cursor::Cursor;
use crate::model::row::change::Change;
use crate::model::session::machine::ChannelId;
use crate::model::subscription::binding::Subscription;

/// The longest pause before the router is asked again whether it is ready.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// A feed that moves on all the time is followed for so long in one go: who waits for the answer gets it then.
const TURN: Duration = Duration::from_secs(2);

/// What is told to a client for whose past there is no room in memory.
const NO_ROOM: &str = "too much waits for clients to read what was missed, read the rows again";

/// A channel that came with a cursor. It leaves when it is dropped.
pub struct CatchUp {
    feed: Feed,
    channel: ChannelId,
    subscription: Subscription,
    codec: Codec,
    /// Up to where it was told everything; whoever drops it amid a step knows it, too.
    since: watch::Sender<Cursor>,
    /// Where pieces arrive.
    pub outbox: Arc<Outbox>,
    /// The database was asked whether the cursor is of its future.
    is_known: bool,
    /// Delivery goes on without it.
    stays: bool,
}

/// How far a follower has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Everything missed is in the outbox, and what comes will be.
    Live,
    /// The outbox has so much that it is to be read first.
    More,
}

impl CatchUp {
    /// Whoever comes with this cursor; nothing is delivered before [`Self::go_on`].
    pub fn new(
        feed: Feed,
        channel: ChannelId,
        subscription: Subscription,
        codec: Codec,
        since: Cursor,
        outbox: Arc<Outbox>,
    ) -> Self {
        let since = watch::Sender::new(since);
        Self { feed, channel, subscription, codec, since, outbox, is_known: false, stays: false }
    }

    /// Goes on until everything missed is delivered, or there is enough to read for now.
    ///
    /// # Errors
    /// When what was missed cannot be had.
    pub async fn go_on(&mut self) -> Result<Progress, ReplayError> {
        let (mut pause, mut looked, started) = (Duration::from_millis(50), false, Instant::now());
        if self.subscription.is_younger_than(&self.since()) {
            return Err(ReplayError::Gap(ANOTHER));
        }
        loop {
            match self.ask().await {
                Some(FollowOutcome::Live) => return Ok(Progress::Live),
                Some(FollowOutcome::Ahead) => {
                    self.feed.past().check(&self.since()).await?;
                    self.is_known = true;
                }
                Some(FollowOutcome::Missed(missed, to)) => {
                    let past = self.feed.past();
                    let mut alone = self.alone();
                    past.replay_recent(&missed, looked, &mut alone).await?;
                    let has_told = alone.told > 0;
                    self.since.send_replace(self.since().merge(&to));
                    // While it was told, the feed may have gone on, and may do so each time.
                    let is_enough = looked && has_told || started.elapsed() > TURN;
                    if is_enough || self.outbox.is_behind() {
                        return Ok(Progress::More);
                    }
                    looked = true;
                }
                Some(FollowOutcome::Behind(to)) => {
                    let (past, since) = (self.feed.past(), self.since());
                    let is_there = past.replay_to_one(&since, &to, &mut self.alone()).await?;
                    if !is_there || self.outbox.is_behind() {
                        return Ok(Progress::More);
                    }
                }
                Some(FollowOutcome::Gap(why)) => return Err(ReplayError::Gap(why)),
                Some(FollowOutcome::NotYet) | None => {
                    sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    /// Asks the router to deliver from here on. None when the relay ends.
    async fn ask(&self) -> Option<FollowOutcome> {
        let (outcome, heard) = oneshot::channel();
        let registration = Subscriber {
            codec: self.codec.clone(),
            subscription: self.subscription.clone(),
            since: Some(self.since()),
            outbox: Arc::clone(&self.outbox),
            missed: None,
        };
        let checked = self.is_known;
        self.feed.send(Command::Follow { channel: self.channel, registration, checked, outcome });
        heard.await.ok()
    }

    /// This channel alone, as somebody to whom the past is told. What was delivered to others may begin with what it has.
    fn alone(&self) -> SingleSink<'_> {
        let key = GroupKey {
            codec: self.codec.clone(),
            subscription: self.subscription.clone(),
            since: Some(self.since()),
        };
        let group = SubscriberGroup::new(Arc::new(key), self.channel, Arc::clone(&self.outbox));
        SingleSink { group, outbox: &self.outbox, since: &self.since, told: 0 }
    }

    /// Ends, while delivery goes on until the channel is left.
    pub fn settle(mut self) {
        self.stays = true;
    }

    /// Its channel.
    pub fn channel(&self) -> ChannelId {
        self.channel
    }

    /// What it receives.
    pub fn subscription(&self) -> &Subscription {
        &self.subscription
    }

    /// How its frames are written.
    pub fn codec(&self) -> &Codec {
        &self.codec
    }

    /// Up to where it was told everything from the past.
    pub fn since(&self) -> Cursor {
        self.since.borrow().clone()
    }

    /// The same, for as long as it goes on.
    pub fn place(&self) -> watch::Receiver<Cursor> {
        self.since.subscribe()
    }

    /// Up to where everything is in the outbox; none while the changelog is not being read.
    pub async fn position(&self) -> Option<Cursor> {
        let position = self.feed.position(vec![self.channel], None).await?;
        position.channels.into_iter().next().map(|(_, here)| here)
    }

    /// Ends delivery; everything up to the cursor that comes back is in the outbox.
    pub async fn leave(&self) -> Option<Cursor> {
        let (until, heard) = oneshot::channel();
        let outbox = Arc::clone(&self.outbox);
        let farewell = Vec::new();
        self.feed.send(Command::Leave { channel: self.channel, outbox, farewell, until: Some(until) });
        heard.await.ok().flatten()
    }
}

impl Drop for CatchUp {
    fn drop(&mut self) {
        if !self.stays {
            self.feed.leave(self.channel, &self.outbox, Vec::new());
        }
    }
}

/// A follower while it is told the past.
struct SingleSink<'a> {
    group: SubscriberGroup,
    outbox: &'a Outbox,
    since: &'a watch::Sender<Cursor>,
    /// How many frames it was told.
    told: usize,
}

impl ReplaySink for SingleSink<'_> {
    async fn tell(&mut self, gate: &Gate, catalog: &Arc<Catalog>, batch: &Batch) -> Result<(), ReplayError> {
        let is_new = |change: &&Change| !self.since.borrow().has(change.xid, change.number);
        let subscription = self.group.subscription();
        if subscription.is_stale(catalog)
            || batch.changes.iter().filter(is_new).any(|change| subscription.has_lost(change, catalog))
        {
            return Err(ReplayError::Gap(ALTERED));
        }
        // To be closed for it would end nothing: it would come back for the same.
        if !self.outbox.budget().make_room(batch.bytes()) {
            return Err(ReplayError::Gap(NO_ROOM));
        }
        self.told += tell_one(gate, catalog, batch, &self.group).await?;
        // It may not have been told all of it, so it has not come further.
        match self.group.subscription().identity().claims().expires_at() <= now() {
            true => Err(ReplayError::Ended),
            false => Ok(()),
        }
    }

    fn reached(&mut self, here: Cursor) {
        self.since.send_modify(|since| *since = since.merge(&here));
    }

    fn has_enough(&self) -> bool {
        self.outbox.is_behind() || self.outbox.is_full()
    }
}
