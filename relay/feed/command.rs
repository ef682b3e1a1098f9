//! Commands to a router, and their outcomes.

use std::sync::Arc;

use tokio::sync::oneshot;

use crate::feed::deliver::frame::Frame;
use crate::feed::deliver::group::Subscriber;
use crate::feed::deliver::hub::ChannelDescription;
use crate::feed::deliver::members::Reader;
use crate::feed::deliver::outbox::Outbox;
use crate::feed::read::batch::Batch;
use crate::feed::read::recent::RecentBatches;
use crate::model::catalog::relation::{Catalog, Relation};
use crate::model::log::cursor::Cursor;
use crate::model::session::channel::ChannelId;

/// A command to a router.
pub enum Command {
    /// Start delivery to a channel, replacing its last subscription.
    Join {
        /// The channel.
        channel: ChannelId,
        /// Its subscription and outbox.
        subscriber: Subscriber,
        /// Frames that go out before any change.
        greeting: Vec<Frame>,
    },
    /// Start delivery to a channel after the subscriber's cursor, if the router can replay from there.
    Follow {
        /// The channel.
        channel: ChannelId,
        /// Its subscription, outbox and cursor.
        subscriber: Subscriber,
        /// The cursor is known not to be in the future.
        checked: bool,
        /// Receives the outcome.
        outcome: oneshot::Sender<FollowOutcome>,
    },
    /// End delivery to a channel.
    Leave {
        /// The channel.
        channel: ChannelId,
        /// Its client's outbox.
        outbox: Arc<Outbox>,
        /// Frames that go out after the last change.
        farewell: Vec<Frame>,
        /// Receives the channel's position.
        reply: Option<oneshot::Sender<Option<Cursor>>>,
    },
    /// Query the positions of channels of one client.
    DeliveredUpTo {
        /// The channels; empty for the feed's position alone.
        channels: Vec<ChannelId>,
        /// A frame to queue after everything before these positions, and its outbox.
        trailing_frame: Option<(Arc<Outbox>, Frame)>,
        /// Receives the positions; dropped when they are unknown.
        reply: oneshot::Sender<DeliveredUpTo>,
    },
    /// Query who follows a relation.
    Readers {
        /// The relation.
        relation: Arc<Relation>,
        /// Receives the readers.
        reply: oneshot::Sender<Vec<Reader>>,
    },
    /// Query what channels subscribe to, and where they are.
    Describe {
        /// The channels.
        channels: Vec<ChannelId>,
        /// Receives those that are known.
        reply: oneshot::Sender<Vec<ChannelDescription>>,
    },
    /// A replay has reached its target, or cannot continue.
    Arrived {
        /// The replay's number.
        replay: u64,
        /// Its position, or why its changes cannot be recovered.
        at: Result<Cursor, &'static str>,
        /// The catalog that it authorizes with.
        catalog: Option<Arc<Catalog>>,
        /// Its channels were told that the feed stalls.
        stalled: bool,
        /// Receives what is still missing; `Live` when the replay is over.
        answer: oneshot::Sender<FollowOutcome>,
    },
}

/// Positions up to which everything was delivered.
pub struct DeliveredUpTo {
    /// The feed's position.
    pub feed: Cursor,
    /// The positions of the channels in the query.
    pub channels: Vec<(ChannelId, Cursor)>,
}

impl DeliveredUpTo {
    /// Sends the answer, and queues the frame, if there is one.
    pub fn answer(
        feed: Option<Cursor>,
        channels: Vec<(ChannelId, Cursor)>,
        trailing_frame: Option<(Arc<Outbox>, Frame)>,
        reply: oneshot::Sender<Self>,
    ) {
        if let Some((outbox, frame)) = trailing_frame {
            outbox.push(frame);
        }
        if let Some(feed) = feed {
            let _ = reply.send(Self { feed, channels });
        }
    }
}

/// The outcome of [`Command::Follow`].
pub enum FollowOutcome {
    /// Delivery continues from here.
    Live,
    /// The cursor is beyond the feed's position, or invalid.
    Ahead,
    /// The batches missed up to this cursor: replay them, then follow again.
    Missed(Vec<Arc<Batch>>, Cursor),
    /// Changes up to this cursor have to be read from the changelog.
    Behind(Cursor),
    /// What was missed cannot be recovered, and why.
    Gap(&'static str),
    /// The feed has no position yet.
    NotYet,
}

impl FollowOutcome {
    /// Returns where to continue from a cursor when the feed is at `position` and delivered `recent` last. `checked`
    /// says that the cursor is not in the future.
    pub fn of(since: &Cursor, checked: bool, position: &Cursor, recent: &RecentBatches) -> Self {
        if since.epoch() != position.epoch() {
            return Self::Gap("the cursor is of another database, or of an older state of it");
        }
        if !since.is_comparable(position) {
            return Self::Gap("the cursor is of no moment of this database");
        }
        if !checked && !since.reach().is_before_or_equal(position.reach()) {
            return Self::Ahead;
        }
        if since.missing(position).is_none() {
            return Self::Live;
        }
        match recent.since(since) {
            Some(missed) => Self::Missed(missed, position.clone()),
            None => Self::Behind(position.clone()),
        }
    }
}
