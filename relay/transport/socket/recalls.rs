//! The earlier broadcasts of a client's channels: they are read before the join is answered, sent right after, and followed by
//! everything later in the changelog. A channel that joins with a cursor is followed in the same way.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use futures_util::future::{AbortHandle, Abortable, BoxFuture, abortable};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::watch;
use tokio::time::sleep;

use crate::feed::catch_up::{CatchUp, Progress};
use crate::feed::deliver::frame::{CountedBytes, Frame};
use crate::feed::deliver::outbox::Outbox;
use crate::feed::handle::Feed;
use crate::feed::replay::reader::ReplayError;
use crate::feed::subscribe::BindError;
use crate::model::codec::protocol::SocketProtocol;
use crate::model::log::cursor::Cursor;
use crate::model::session::channel::ChannelId;
use crate::model::session::join::Recall;
use crate::model::session::stored_broadcast::{Recalled, StoredBroadcast};

/// Pause before more is read for a client whose queue is long.
const PAUSE: Duration = Duration::from_millis(20);

/// The earlier broadcasts of a client's channels.
#[derive(Default)]
pub struct Recalls {
    reading: FuturesUnordered<RecallTask>,
    /// Ends the reading for a channel.
    aborts: HashMap<ChannelId, AbortHandle>,
    read: HashMap<ChannelId, Recalled>,
    /// Channels on their way from the broadcasts to the live feed.
    following: HashMap<ChannelId, Following>,
}

type RecallTask = Abortable<BoxFuture<'static, (ChannelId, Result<Recalled, BindError>)>>;

/// A channel on its way, and how far it is.
struct Following {
    task: BoxFuture<'static, ()>,
    at: watch::Receiver<Cursor>,
}

impl Recalls {
    /// Starts to read.
    pub fn begin(&mut self, feed: Feed, channel: ChannelId, name: String, recall: Recall) {
        let reading = async move { (channel, feed.recall(&name, recall).await) };
        let (reading, abort) = abortable(reading.boxed());
        self.reading.push(reading);
        self.aborts.insert(channel, abort);
    }

    /// Returns a channel whose broadcasts are read now, and whether they could be.
    pub async fn next(&mut self) -> (ChannelId, bool) {
        let following = &mut self.following;
        let all_follow = poll_fn(|context| {
            following.retain(|_, channel| channel.task.poll_unpin(context).is_pending());
            Poll::<Infallible>::Pending
        });
        tokio::pin!(all_follow);
        loop {
            tokio::select! {
                // One that was aborted belongs to a channel that was left.
                Some(outcome) = self.reading.next(), if !self.reading.is_empty() => if let Ok((channel, outcome)) = outcome {
                    self.aborts.remove(&channel);
                    let is_done = outcome.is_ok();
                    self.read.extend(outcome.ok().map(|recalled| (channel, recalled)));
                    return (channel, is_done);
                },
                never = &mut all_follow => match never {},
            }
        }
    }

    /// Returns the frames of a channel's broadcasts, once.
    pub fn frames(
        &mut self,
        channel: ChannelId,
        topic: &str,
        protocol: &dyn SocketProtocol,
        outbox: &Outbox,
    ) -> Vec<Frame> {
        let Some(recalled) = self.read.get_mut(&channel) else { return Vec::new() };
        let broadcasts = std::mem::take(&mut recalled.broadcasts);
        broadcasts.into_iter().filter_map(|stored| frame(stored, topic, protocol, outbox)).collect()
    }

    /// Ends what is under way for a channel. Returns the position up to which it has everything, if it is not at the live feed.
    pub fn cursor(&mut self, channel: ChannelId) -> Option<Cursor> {
        let reached = self.following.remove(&channel).map(|following| following.at.borrow().clone());
        self.read.remove(&channel).map(|recalled| recalled.cursor).or(reached)
    }

    /// Delivers to a channel from its cursor on.
    pub fn follow(&mut self, channel: ChannelId, catch_up: CatchUp) {
        let at = catch_up.positions();
        self.following.insert(channel, Following { task: follow(catch_up).boxed(), at });
    }

    /// Ends what is under way for a channel, and its delivery if that has not reached the live feed.
    pub fn stop(&mut self, channel: ChannelId) {
        self.aborts.remove(&channel).inspect(AbortHandle::abort);
        self.read.remove(&channel);
        self.following.remove(&channel);
    }
}

/// Returns the frame of a broadcast that was sent before; `None` if clients of the protocol cannot receive its kind.
fn frame(
    stored: StoredBroadcast,
    topic: &str,
    protocol: &dyn SocketProtocol,
    outbox: &Outbox,
) -> Option<Frame> {
    let budget = outbox.budget();
    let wrapping = protocol.broadcast(topic, &stored.broadcast.kind, Some(&stored.meta(true)))?;
    let content = stored.broadcast.content;
    let length = wrapping.before.len() + content.len() + wrapping.after.len();
    Some(match length > protocol.max_frame_bytes() {
        true => Frame::text(protocol.broadcast_too_large(topic, length), budget),
        false => Frame::push(wrapping, CountedBytes::new(content, budget), budget),
    })
}

async fn follow(mut catch_up: CatchUp) {
    loop {
        match catch_up.go_on().await {
            Ok(Progress::Live) => return catch_up.settle(),
            Ok(Progress::More) | Err(ReplayError::Unavailable(_)) => sleep(PAUSE).await,
            // The channel ends with its token.
            Err(ReplayError::Ended) => return,
            Err(ReplayError::Gap(why)) => return catch_up.begin_anew(why),
        }
    }
}
