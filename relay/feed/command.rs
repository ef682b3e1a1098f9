//! What is asked of whoever delivers, and what comes of it.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::oneshot;

use crate::feed::deliver::group::Subscriber;
use crate::feed::deliver::outbox::Outbox;
use crate::feed::read::batch::Batch;
use crate::feed::read::recent::RecentBatches;
use crate::model::catalog::relation::Catalog;
use crate::model::log::cursor::Cursor;
use crate::model::session::machine::ChannelId;

/// What a session asks of the router.
pub enum Command {
    /// Deliver to this channel from now on, in place of what it had.
    Join {
        /// Which channel.
        channel: ChannelId,
        /// What, and where to.
        registration: Subscriber,
        /// Frames that go out before any change.
        greeting: Vec<Bytes>,
    },
    /// Deliver to this channel what comes after the registration's cursor, as soon as that is near enough.
    Follow {
        /// Which channel.
        channel: ChannelId,
        /// What, where to, and since when.
        registration: Subscriber,
        /// The cursor is known not to be of the future.
        checked: bool,
        /// Hears what came of it.
        outcome: oneshot::Sender<FollowOutcome>,
    },
    /// Deliver nothing more to this channel.
    Leave {
        /// Which channel.
        channel: ChannelId,
        /// Its client's outbox.
        outbox: Arc<Outbox>,
        /// Frames that go out after the last change.
        farewell: Vec<Bytes>,
        /// Hears up to where everything was delivered to it.
        until: Option<oneshot::Sender<Option<Cursor>>>,
    },
    /// Say up to where everything was delivered to some channels of one client.
    DeliveredUpTo {
        /// Which; none for the feed as a whole.
        channels: Vec<ChannelId>,
        /// A frame that goes out behind all that was delivered up to there, and where to.
        then: Option<(Arc<Outbox>, Bytes)>,
        /// Hears it, unless nobody knows.
        until: oneshot::Sender<DeliveredUpTo>,
    },
    /// A replay has come as far as it was sent, or can't go on.
    Arrived {
        /// Which.
        replay: u64,
        /// Up to where its channels were told everything, or why that cannot be had any more.
        at: Result<Cursor, &'static str>,
        /// What it was judged with.
        rules: Option<Arc<Catalog>>,
        /// Its channels were told that nothing comes.
        stalled: bool,
        /// Hears what is still before it: nothing when it is over.
        answer: oneshot::Sender<FollowOutcome>,
    },
}

/// Up to where everything was delivered.
pub struct DeliveredUpTo {
    /// By the feed as a whole.
    pub here: Cursor,
    /// To the channels that were asked about.
    pub channels: Vec<(ChannelId, Cursor)>,
}

impl DeliveredUpTo {
    /// Answers for these channels, with the frame behind what was delivered to them.
    pub fn tell(
        here: Option<Cursor>,
        channels: Vec<(ChannelId, Cursor)>,
        then: Option<(Arc<Outbox>, Bytes)>,
        until: oneshot::Sender<Self>,
    ) {
        if let Some((outbox, frame)) = then {
            outbox.push(frame);
        }
        if let Some(here) = here {
            let _ = until.send(Self { here, channels });
        }
    }
}

/// What came of a wish to follow.
pub enum FollowOutcome {
    /// Delivered from here on.
    Live,
    /// The cursor is of a moment that the feed has not come to, if it has been at all.
    Ahead,
    /// What was missed up to this cursor is still at hand: tell it, then ask again.
    Missed(Vec<Arc<Batch>>, Cursor),
    /// What lies before this cursor has to be read from the changelog.
    Behind(Cursor),
    /// Nobody can say what was missed; why.
    Gap(&'static str),
    /// The changelog is not being read yet.
    NotYet,
}

impl FollowOutcome {
    /// Where what comes after a cursor is to be had, when everything up to `position` was delivered, the last of it
    /// `recent`; `checked` says that the cursor is not of the future.
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
