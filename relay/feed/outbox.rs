//! The bounded queue of frames to one client. Whoever fills it never waits; when it is full the client is closed.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::Notify;

/// Frames on their way to one client, bounded in bytes.
#[derive(Debug)]
pub struct Outbox {
    // Never held across an await, and only for a push or a take.
    queue: Mutex<Queue>,
    changed: Notify,
    limit: usize,
}

#[derive(Debug, Default)]
struct Queue {
    frames: VecDeque<Bytes>,
    bytes: usize,
    end: Option<End>,
}

/// Why nothing more goes into an outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It was full: the client reads too slowly and should come back.
    Full,
    /// The relay shuts down.
    Shutdown,
}

/// What the session finds in its outbox.
#[derive(Debug)]
pub enum Taken {
    /// Frames, oldest first.
    Frames(VecDeque<Bytes>),
    /// Nothing more will come.
    End(End),
}

impl Outbox {
    /// An empty outbox that holds up to `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { queue: Mutex::default(), changed: Notify::new(), limit }
    }

    /// Adds a frame. One frame is always taken, however large: otherwise it could never be delivered.
    pub fn push(&self, frame: Bytes) {
        {
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            if queue.end.is_some() {
                return;
            }
            if queue.bytes + frame.len() > self.limit && !queue.frames.is_empty() {
                // What is queued would come before a gap: none of it may be delivered as if nothing were missing.
                *queue = Queue { end: Some(End::Full), ..Queue::default() };
            } else {
                queue.bytes += frame.len();
                queue.frames.push_back(frame);
            }
        }
        self.changed.notify_one();
    }

    /// Lets what is queued go out, and nothing after it.
    pub fn shut_down(&self) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).end.get_or_insert(End::Shutdown);
        self.changed.notify_one();
    }

    /// Whether so much waits that another part of a page might not fit.
    pub fn is_behind(&self) -> bool {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.end.is_none() && queue.bytes > self.limit / 4
    }

    /// Whether it overflowed.
    pub fn is_full(&self) -> bool {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).end == Some(End::Full)
    }

    /// Waits until there is something and takes it all. Cancel safe.
    pub async fn take(&self) -> Taken {
        loop {
            let waiting = self.changed.notified();
            if let Some(taken) = self.try_take() {
                return taken;
            }
            waiting.await;
        }
    }

    /// Waits until it overflows. Cancel safe.
    pub async fn overflowed(&self) {
        while !self.is_full() {
            self.changed.notified().await;
        }
    }

    fn try_take(&self) -> Option<Taken> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if !queue.frames.is_empty() {
            queue.bytes = 0;
            return Some(Taken::Frames(std::mem::take(&mut queue.frames)));
        }
        queue.end.map(Taken::End)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(bytes: usize) -> Bytes {
        Bytes::from(vec![b'x'; bytes])
    }

    #[tokio::test]
    async fn a_full_outbox_gives_nothing_but_its_end() {
        let outbox = Outbox::new(10);
        outbox.push(frame(6));
        outbox.push(frame(6));
        outbox.push(frame(1));
        assert!(matches!(outbox.take().await, Taken::End(End::Full)));
        outbox.overflowed().await;
    }

    #[tokio::test]
    async fn a_frame_larger_than_the_limit_goes_alone() {
        let outbox = Outbox::new(10);
        outbox.push(frame(100));
        assert!(matches!(outbox.take().await, Taken::Frames(frames) if frames.len() == 1));
    }

    #[tokio::test]
    async fn shutting_down_lets_the_queue_out_first() {
        let outbox = Outbox::new(10);
        outbox.push(frame(3));
        outbox.shut_down();
        outbox.push(frame(3));
        assert!(matches!(outbox.take().await, Taken::Frames(frames) if frames.len() == 1));
        assert!(matches!(outbox.take().await, Taken::End(End::Shutdown)));
    }
}
