//! The frames that wait for one client, and the rules by which they are too many.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use time::OffsetDateTime;

use crate::feed::deliver::frame::Frame;
use crate::feed::deliver::memory_budget::MemoryBudget;
use crate::model::session::channel::ChannelId;

/// A client with this many bytes waiting …
const SLOW_BYTES: usize = 64 * 1024;
/// … for this long is slow.
const SLOW_AFTER: Duration = Duration::from_millis(250);
/// Bytes waiting, or half of the limit if less, above which the next batch of a page should wait for the client.
const BEHIND_BYTES: usize = 256 * 1024;
/// Pushes may exceed the limit of a client that is not slow by this factor: a large one is not read before others follow it.
const PUSH_FACTOR: usize = 16;
/// Number of frames among which the oldest change is looked for: the lock must not be held for long.
const SCANNED_FRAMES: usize = 64;
/// Queue slots that are not counted in the memory budget.
const UNCOUNTED_SLOTS: usize = 32;

/// What waits for one client.
#[derive(Debug, Default)]
pub(super) struct Queue {
    frames: VecDeque<Frame>,
    pub(super) bytes: usize,
    /// The unit delivered last.
    unit: Unit,
    /// Bytes of replies and pings.
    reply_bytes: usize,
    /// Bytes of replayed frames, queued and taken.
    replay_bytes: usize,
    replay_bytes_taken: usize,
    /// Bytes of pushes, queued and taken.
    push_bytes: usize,
    push_bytes_taken: usize,
    /// Bytes taken that the socket does not accept now.
    pub(super) unwritten: usize,
    /// Since when more than [`SLOW_BYTES`] have waited.
    since: Option<Instant>,
    /// Queue slots that are counted.
    pub(super) slots: usize,
    /// Channels to bind anew.
    pub(super) rebind: Vec<ChannelId>,
    pub(super) full: bool,
    /// Changes were delivered since the last query.
    pub(super) delivered: bool,
    /// The task that waits to take frames. Woken once, not once per frame.
    pub(super) taker: Option<Waker>,
    /// The task that waits for the outbox to overflow.
    pub(super) watcher: Option<Waker>,
}

/// Frames that belong together: a client that has room for the first of them has room for all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unit(u64);

/// What frames are, which decides when they are too many.
#[derive(Clone, Copy)]
pub(super) enum FrameKind {
    /// Replies and pings.
    Reply,
    /// Changes, of this unit.
    Changes(Unit),
    /// A push to the members of a topic.
    Push,
}

/// The number of the last unit.
static UNITS: AtomicU64 = AtomicU64::new(1);

impl Unit {
    /// Replayed frames. They are read at the client's pace.
    pub const REPLAY: Self = Self(1);

    /// Creates the unit of a batch: all of its frames for a client, over all channels.
    pub fn next() -> Self {
        Self(UNITS.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

/// Frames that were taken and are being written.
#[derive(Debug, Default)]
pub struct InFlight {
    /// The frames, in order.
    pub frames: VecDeque<Frame>,
    /// The client was evicted: the frames were dropped, even one that is partly written.
    pub is_evicted: bool,
}

impl InFlight {
    /// Returns when the first change was written.
    pub fn oldest(&self) -> Option<OffsetDateTime> {
        self.frames.iter().take(SCANNED_FRAMES).find_map(Frame::written_at)
    }
}

/// What [`Outbox::take`](crate::feed::deliver::outbox::Outbox::take) found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// Frames, which are in flight now.
    Frames,
    /// A channel to bind anew, because its relation is gone or changed.
    Rebind(ChannelId),
    /// The outbox overflowed and is closed: the client reads too slowly and should reconnect.
    Full,
}

impl Queue {
    /// Adds frames, or closes the queue, if too much waits already or there is no room in memory for them.
    pub(super) fn add_all(
        &mut self,
        frames: impl IntoIterator<Item = Frame>,
        kind: FrameKind,
        limit: usize,
        has_room: bool,
    ) {
        self.delivered |= matches!(kind, FrameKind::Changes(_));
        if !has_room || self.has_too_much(kind, limit) {
            self.close();
        }
        if self.full {
            return;
        }
        let (before, mut pushed) = (self.bytes, 0);
        for frame in frames {
            pushed += if frame.is_push() { frame.len() } else { 0 };
            self.add(frame);
        }
        let added = self.bytes - before;
        match kind {
            FrameKind::Changes(Unit::REPLAY) => self.replay_bytes += added,
            // Broadcasts from the database are among the changes, and have the limit of other broadcasts.
            FrameKind::Changes(unit) => {
                self.unit = unit;
                self.push_bytes += pushed;
            }
            FrameKind::Reply => self.reply_bytes += added,
            FrameKind::Push => self.push_bytes += added,
        }
    }

    /// Whether so much waits that no frames of this kind may be added.
    fn has_too_much(&self, kind: FrameKind, limit: usize) -> bool {
        let is_over = self.bytes > 0 && self.limited_bytes() > limit;
        let has_too_many_pushes = self.has_too_many_pushes(limit);
        match kind {
            FrameKind::Changes(unit) => {
                unit != Unit::REPLAY && unit != self.unit && (is_over || has_too_many_pushes)
            }
            // Replies and pings do not close a client that is receiving a large change.
            FrameKind::Reply => is_over && self.reply_bytes > limit / 4,
            FrameKind::Push => has_too_many_pushes,
        }
    }

    pub(super) fn add(&mut self, frame: Frame) {
        self.bytes += frame.len();
        self.frames.push_back(frame);
        self.note_slow();
    }

    /// Returns the bytes that count against the limit. Replayed frames do not: more of them come only when the client
    /// has read the last. Pushes are limited on their own.
    fn limited_bytes(&self) -> usize {
        let unlimited_taken = self.replay_bytes_taken + self.push_bytes_taken;
        self.bytes - self.replay_bytes - self.push_bytes + self.unwritten.saturating_sub(unlimited_taken)
    }

    /// Returns when the first change was written.
    pub(super) fn oldest(&self) -> Option<OffsetDateTime> {
        self.frames.iter().take(SCANNED_FRAMES).find_map(Frame::written_at)
    }

    pub(super) fn is_behind(&self, limit: usize) -> bool {
        !self.full && self.bytes > BEHIND_BYTES.min(limit / 2)
    }

    pub(super) fn is_congested(&self, limit: usize) -> bool {
        !self.full && self.push_bytes > BEHIND_BYTES.min(limit / 2) && !self.is_slow()
    }

    fn has_too_many_pushes(&self, limit: usize) -> bool {
        let is_far_over = self.push_bytes > limit.saturating_mul(PUSH_FACTOR);
        self.push_bytes > limit && (is_far_over || self.is_slow())
    }

    pub(super) fn is_slow(&self) -> bool {
        self.since.is_some_and(|since| since.elapsed() > SLOW_AFTER)
    }

    pub(super) fn note_slow(&mut self) {
        if self.since.is_none() && self.bytes + self.unwritten > SLOW_BYTES {
            self.since = Some(Instant::now());
        }
    }

    /// Counts queue slots: frames are shared by many clients, their slots are not.
    pub(super) fn count_slots(&mut self, budget: &MemoryBudget) {
        let slots = self.frames.capacity();
        if slots > UNCOUNTED_SLOTS.max(self.slots) || slots * 4 < self.slots {
            budget.set_slots(self.slots, slots);
            self.slots = slots;
        }
    }

    /// Closes the queue. Queued frames precede a gap, so none of them may be delivered.
    pub(super) fn close(&mut self) {
        self.full = true;
        self.frames = VecDeque::new();
        (self.bytes, self.replay_bytes, self.push_bytes) = (0, 0, 0);
    }

    /// Takes the wakers of the tasks to wake.
    pub(super) fn wakers(&mut self) -> [Option<Waker>; 2] {
        [self.taker.take(), if self.full { self.watcher.take() } else { None }]
    }

    pub(super) fn take(&mut self, in_flight: &Mutex<InFlight>) -> Option<Taken> {
        self.unwritten = 0;
        self.since = None;
        self.reply_bytes = 0;
        if !self.frames.is_empty() {
            let mut in_flight = lock(in_flight);
            if in_flight.frames.is_empty() {
                std::mem::swap(&mut self.frames, &mut in_flight.frames);
            } else {
                in_flight.frames.append(&mut self.frames);
            }
            self.replay_bytes_taken = std::mem::take(&mut self.replay_bytes);
            self.push_bytes_taken = std::mem::take(&mut self.push_bytes);
            self.bytes = 0;
            return Some(Taken::Frames);
        }
        if let Some(channel) = self.rebind.pop() {
            return Some(Taken::Rebind(channel));
        }
        self.full.then_some(Taken::Full)
    }
}

/// Locks a mutex, also after a thread that held it has panicked.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
