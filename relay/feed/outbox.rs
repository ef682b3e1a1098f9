//! The bounded queue of frames to one client. Whoever fills it never waits; when it is full the client is closed.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;

use crate::feed::budget::Budget;
use crate::model::session::ChannelId;

/// Frames on their way to one client, bounded in bytes.
#[derive(Debug)]
pub struct Outbox {
    // Never held across an await, and only for a push or a take.
    queue: Mutex<Queue>,
    limit: usize,
    budget: Arc<Budget>,
}

#[derive(Debug, Default)]
struct Queue {
    frames: VecDeque<Bytes>,
    bytes: usize,
    /// What was taken and cannot be written now.
    stuck: usize,
    /// Channels to be bound anew.
    rebind: Vec<ChannelId>,
    full: bool,
    /// Something was delivered since somebody asked.
    delivered: bool,
    /// The session's task, while it waits: it is woken once, not once per frame.
    waiting: Option<Waker>,
    /// Whoever waits for nothing but its end.
    watching: Option<Waker>,
}

/// What the session finds in its outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// Frames: they are in the queue that was given.
    Frames,
    /// A channel's relation is gone, or another: it is to be bound anew.
    Rebind(ChannelId),
    /// It was full, and nothing more will come: the client reads too slowly and should come back.
    Full,
}

impl Outbox {
    /// An empty outbox that holds up to `limit` bytes of what `budget` allows all together.
    pub fn new(limit: usize, budget: Arc<Budget>) -> Self {
        budget.outbox_opened();
        Self { queue: Mutex::default(), limit, budget }
    }

    /// Adds a frame. One frame is always taken, however large: otherwise it could never be delivered.
    pub fn push(&self, frame: Bytes) {
        self.add([self.budget.count(frame)], false);
    }

    /// Adds frames that tell changes and are counted already ([`Self::counted`]), in one go.
    pub fn deliver(&self, frames: impl IntoIterator<Item = Bytes>) {
        self.add(frames, true);
    }

    fn add(&self, frames: impl IntoIterator<Item = Bytes>, delivered: bool) {
        let wakers = {
            let mut queue = self.lock();
            queue.delivered |= delivered;
            // Whoever has nothing waiting is never the one for whom there is no room.
            if self.budget.is_exceeded_by(queue.bytes + queue.stuck) {
                queue.end();
            }
            for frame in frames {
                queue.add(frame, self.limit);
            }
            queue.wakers()
        };
        wakers.into_iter().flatten().for_each(Waker::wake);
    }

    /// A frame for this outbox and others, counted once.
    pub fn counted(&self, frame: impl Into<Bytes>) -> Bytes {
        self.budget.count(frame)
    }

    /// Asks the session to bind a channel anew, after the frames that are there.
    pub fn rebind(&self, channel: ChannelId) {
        let wakers = {
            let mut queue = self.lock();
            if !queue.rebind.contains(&channel) {
                queue.rebind.push(channel);
            }
            queue.wakers()
        };
        wakers.into_iter().flatten().for_each(Waker::wake);
    }

    /// So many bytes of what was taken cannot be written now. That counts beside the rest until more is taken.
    pub fn is_stuck_with(&self, bytes: usize) {
        self.lock().stuck = bytes;
    }

    /// Whether a channel is to be bound anew, and the session did not hear of it yet: what comes is not told to it.
    pub fn is_to_rebind(&self, channel: ChannelId) -> bool {
        self.lock().rebind.contains(&channel)
    }

    /// Whether so much waits that another part of a page might not fit.
    pub fn is_behind(&self) -> bool {
        let queue = self.lock();
        !queue.full && queue.bytes > self.limit / 4
    }

    /// Whether it overflowed.
    pub fn is_full(&self) -> bool {
        self.lock().full
    }

    /// Whether changes were delivered since this was asked last.
    pub fn was_delivered_to(&self) -> bool {
        std::mem::take(&mut self.lock().delivered)
    }

    /// Waits until there is something and takes it all, in exchange for `empty`, whose room the next frames use.
    /// Cancel safe. Only one task may wait at a time.
    pub async fn take(&self, empty: &mut VecDeque<Bytes>) -> Taken {
        poll_fn(|context| {
            let mut queue = self.lock();
            queue.take(empty).map_or_else(|| wait(&mut queue.waiting, context), Poll::Ready)
        })
        .await
    }

    /// Waits until it overflows, also while somebody waits to take. Cancel safe. Only one task may wait at a time.
    pub async fn overflowed(&self) {
        poll_fn(|context| {
            let mut queue = self.lock();
            if queue.full { Poll::Ready(()) } else { wait(&mut queue.watching, context) }
        })
        .await;
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.budget.outbox_closed();
    }
}

fn wait<T>(place: &mut Option<Waker>, context: &Context<'_>) -> Poll<T> {
    match place {
        Some(waker) => waker.clone_from(context.waker()),
        nobody => *nobody = Some(context.waker().clone()),
    }
    Poll::Pending
}

impl Queue {
    fn add(&mut self, frame: Bytes, limit: usize) {
        if self.full {
            return;
        }
        if self.bytes + frame.len() > limit && !self.frames.is_empty() {
            self.end();
        } else {
            self.bytes += frame.len();
            self.frames.push_back(frame);
        }
    }

    /// What is queued would come before a gap: none of it may be delivered as if nothing were missing.
    fn end(&mut self) {
        self.full = true;
        self.frames = VecDeque::new();
        self.bytes = 0;
    }

    /// Whom to wake for what came.
    fn wakers(&mut self) -> [Option<Waker>; 2] {
        [self.waiting.take(), if self.full { self.watching.take() } else { None }]
    }

    fn take(&mut self, empty: &mut VecDeque<Bytes>) -> Option<Taken> {
        self.stuck = 0;
        if !self.frames.is_empty() {
            self.bytes = 0;
            std::mem::swap(&mut self.frames, empty);
            return Some(Taken::Frames);
        }
        if let Some(channel) = self.rebind.pop() {
            return Some(Taken::Rebind(channel));
        }
        self.full.then_some(Taken::Full)
    }
}

#[cfg(test)]
mod tests {
    use crate::feed::budget::KEPT;
    use futures_util::FutureExt;

    use super::*;
    use crate::observe::Observe;

    fn budget(limit: usize) -> (Arc<Budget>, Arc<Observe>) {
        let observe = Arc::new(Observe::new());
        (Arc::new(Budget::new(limit, Arc::clone(&observe))), observe)
    }

    fn outbox(limit: usize) -> Outbox {
        Outbox::new(limit, budget(usize::MAX).0)
    }

    fn frame(bytes: usize) -> Bytes {
        Bytes::from(vec![b'x'; bytes])
    }

    async fn take(outbox: &Outbox) -> (Taken, usize) {
        let mut frames = VecDeque::new();
        let taken = outbox.take(&mut frames).await;
        (taken, frames.len())
    }

    #[tokio::test]
    async fn a_full_outbox_gives_nothing_but_its_end() {
        let outbox = outbox(10);
        outbox.push(frame(6));
        outbox.push(frame(6));
        outbox.push(frame(1));
        assert_eq!(take(&outbox).await, (Taken::Full, 0));
        outbox.overflowed().await;
    }

    #[tokio::test]
    async fn a_frame_larger_than_the_limit_goes_alone() {
        let outbox = outbox(10);
        outbox.push(frame(100));
        assert_eq!(take(&outbox).await, (Taken::Frames, 1));
    }

    #[tokio::test]
    async fn its_end_is_heard_by_who_watches_while_another_waits_to_take() {
        let outbox = Arc::new(outbox(10));
        let watched = Arc::clone(&outbox);
        let watching = tokio::spawn(async move { watched.overflowed().await });
        tokio::task::yield_now().await;
        let mut frames = VecDeque::new();
        assert_eq!(outbox.take(&mut frames).now_or_never(), None);
        outbox.push(frame(6));
        outbox.push(frame(6));
        watching.await.unwrap();
    }

    #[tokio::test]
    async fn when_too_much_waits_for_all_who_has_most_of_it_ends_and_who_has_nothing_never() {
        let (budget, observe) = budget(10_000 + 3 * KEPT);
        let outboxes: Vec<Outbox> = (0..4).map(|_| Outbox::new(100_000, Arc::clone(&budget))).collect();
        let [slow, small, idle, _] = &outboxes[..] else { panic!("there are four") };
        small.push(frame(1000));
        slow.push(frame(3000));
        slow.push(frame(6000));
        assert!(!slow.is_full(), "it was not too much before");
        idle.push(frame(5000));
        small.push(frame(100));
        assert!(!idle.is_full() && !small.is_full(), "these have less than their part");
        slow.push(frame(100));
        assert!(slow.is_full());
        assert_eq!(observe.waiting_bytes(), 6100 + 3 * KEPT);
        drop(outboxes);
        assert_eq!(observe.waiting_bytes(), 0);
    }

    #[tokio::test]
    async fn what_cannot_be_written_counts_where_too_much_waits_for_all() {
        let (budget, _) = budget(10_000);
        let (stuck, other) = (Outbox::new(100_000, Arc::clone(&budget)), Outbox::new(100_000, budget));
        stuck.push(frame(6000));
        let mut frames = VecDeque::new();
        stuck.take(&mut frames).await;
        stuck.is_stuck_with(6000);
        other.push(frame(5000));
        stuck.push(frame(1));
        assert!(stuck.is_full() && !other.is_full());
    }

    #[test]
    fn a_frame_for_many_counts_once_until_the_last_has_read_it() {
        let (budget, observe) = budget(100);
        let (one, other) = (Outbox::new(10, Arc::clone(&budget)), Outbox::new(10, budget));
        let frame = one.counted(frame(7));
        one.deliver([frame.clone()]);
        other.deliver([frame]);
        assert_eq!(observe.waiting_bytes(), KEPT + 7);
        drop(one);
        assert_eq!(observe.waiting_bytes(), KEPT + 7);
        drop(other);
        assert_eq!(observe.waiting_bytes(), 0);
    }
}
