//! The bounded queue of frames to one client. Whoever fills it never waits; when it is full the client is closed.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;

use crate::model::session::ChannelId;

/// Frames on their way to one client, bounded in bytes.
#[derive(Debug)]
pub struct Outbox {
    // Never held across an await, and only for a push or a take.
    queue: Mutex<Queue>,
    limit: usize,
}

#[derive(Debug, Default)]
struct Queue {
    frames: VecDeque<Bytes>,
    bytes: usize,
    /// Channels to be bound anew.
    rebind: Vec<ChannelId>,
    full: bool,
    /// Something was delivered since somebody asked.
    delivered: bool,
    /// The session's task, while it waits: it is woken once, not once per frame.
    waiting: Option<Waker>,
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
    /// An empty outbox that holds up to `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { queue: Mutex::default(), limit }
    }

    /// Adds a frame. One frame is always taken, however large: otherwise it could never be delivered.
    pub fn push(&self, frame: Bytes) {
        self.add([frame], false);
    }

    /// Adds frames that tell changes, in one go.
    pub fn deliver(&self, frames: impl IntoIterator<Item = Bytes>) {
        self.add(frames, true);
    }

    fn add(&self, frames: impl IntoIterator<Item = Bytes>, delivered: bool) {
        let waiting = {
            let mut queue = self.lock();
            queue.delivered |= delivered;
            for frame in frames {
                queue.add(frame, self.limit);
            }
            queue.waiting.take()
        };
        if let Some(waiting) = waiting {
            waiting.wake();
        }
    }

    /// Asks the session to bind a channel anew, after the frames that are there.
    pub fn rebind(&self, channel: ChannelId) {
        let waiting = {
            let mut queue = self.lock();
            if !queue.rebind.contains(&channel) {
                queue.rebind.push(channel);
            }
            queue.waiting.take()
        };
        if let Some(waiting) = waiting {
            waiting.wake();
        }
    }

    /// Whether so much waits that another part of a page might not fit.
    pub fn is_behind(&self) -> bool {
        let queue = self.lock();
        !queue.full && queue.bytes > self.limit / 4
    }

    /// Whether it overflowed.
    pub fn is_full(&self) -> bool {
        self.lock().is_full()
    }

    /// Whether changes were delivered since this was asked last.
    pub fn was_delivered_to(&self) -> bool {
        std::mem::take(&mut self.lock().delivered)
    }

    /// Waits until there is something and takes it all, in exchange for `empty`, whose room the next frames use.
    /// Cancel safe. Only one task may wait at a time.
    pub async fn take(&self, empty: &mut VecDeque<Bytes>) -> Taken {
        poll_fn(|context| self.poll(context, |queue| queue.take(empty))).await
    }

    /// Waits until it overflows. Cancel safe. Only one task may wait at a time.
    pub async fn overflowed(&self) {
        poll_fn(|context| self.poll(context, |queue| queue.is_full().then_some(()))).await;
    }

    fn poll<T>(&self, context: &Context<'_>, find: impl FnOnce(&mut Queue) -> Option<T>) -> Poll<T> {
        let mut queue = self.lock();
        match find(&mut queue) {
            Some(found) => Poll::Ready(found),
            None => {
                match &mut queue.waiting {
                    Some(waiting) => waiting.clone_from(context.waker()),
                    nobody => *nobody = Some(context.waker().clone()),
                }
                Poll::Pending
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn add(&mut self, frame: Bytes, limit: usize) {
        if self.full {
            return;
        }
        if self.bytes + frame.len() > limit && !self.frames.is_empty() {
            // What is queued would come before a gap: none of it may be delivered as if nothing were missing.
            self.full = true;
            self.frames = VecDeque::new();
            self.bytes = 0;
        } else {
            self.bytes += frame.len();
            self.frames.push_back(frame);
        }
    }

    fn take(&mut self, empty: &mut VecDeque<Bytes>) -> Option<Taken> {
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

    fn is_full(&self) -> bool {
        self.full
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let outbox = Outbox::new(10);
        outbox.push(frame(6));
        outbox.push(frame(6));
        outbox.push(frame(1));
        assert_eq!(take(&outbox).await, (Taken::Full, 0));
        outbox.overflowed().await;
    }

    #[tokio::test]
    async fn a_frame_larger_than_the_limit_goes_alone() {
        let outbox = Outbox::new(10);
        outbox.push(frame(100));
        assert_eq!(take(&outbox).await, (Taken::Frames, 1));
    }
}
