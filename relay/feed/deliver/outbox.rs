//! The bounded queue of frames to one client. Adding never waits; a client whose queue is full is closed.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};

use time::OffsetDateTime;

use crate::feed::deliver::frame::Frame;
use crate::feed::deliver::memory_budget::{Evictable, MemoryBudget, Owner, Registration, WaitingBytes};
use crate::feed::deliver::queue::{FrameKind, InFlight, Queue, Taken, Unit, lock};
use crate::model::session::channel::ChannelId;

/// A frame this small does not close the client when the memory budget is exhausted.
const SMALL_REPLY: usize = 4 * 1024;

/// Frames queued for one client, bounded in bytes.
///
/// The client is closed when frames are added while more than the limit waits. So all frames of one unit fit,
/// whatever their size, if the client has read enough before it.
pub struct Outbox {
    shared: Arc<Shared>,
    limit: usize,
    budget: Arc<MemoryBudget>,
    _registration: Registration,
}

/// What waits for one client.
#[derive(Debug, Clone, Copy)]
pub struct Waiting {
    /// Number of bytes.
    pub bytes: usize,
    /// When the oldest change among them was written.
    pub oldest: Option<OffsetDateTime>,
}

struct Shared {
    // Neither lock is held across an await. `in_flight` may be held during a socket write, so it is never locked by those
    // who add.
    queue: Mutex<Queue>,
    in_flight: Mutex<InFlight>,
    owner: Option<Arc<Owner>>,
    budget: Arc<MemoryBudget>,
}

impl Outbox {
    /// Creates an outbox for up to `limit` bytes, counted in `budget`.
    pub fn new(limit: usize, budget: Arc<MemoryBudget>) -> Self {
        Self::of(None, limit, budget)
    }

    /// The same for the answer of an owner.
    pub fn of(owner: Option<Arc<Owner>>, limit: usize, budget: Arc<MemoryBudget>) -> Self {
        let (queue, in_flight) = (Mutex::default(), Mutex::default());
        let shared = Arc::new(Shared { queue, in_flight, owner, budget: Arc::clone(&budget) });
        let holder: Weak<dyn Evictable> = Arc::<Shared>::downgrade(&shared);
        let _registration = budget.register(holder);
        Self { shared, limit, budget, _registration }
    }

    /// Adds a single frame. It is accepted whatever its size, or it could never be delivered.
    pub fn push(&self, frame: Frame) {
        let has_room = frame.len() <= SMALL_REPLY || self.budget.make_room(0);
        self.add(has_room, [frame], FrameKind::Reply);
    }

    /// Adds the frames of a push to the members of a topic, if the client is not too slow. Memory is checked by the publisher.
    /// Returns whether another push might not fit, as [`Self::is_congested`] does.
    pub fn publish(&self, frames: impl IntoIterator<Item = Frame>) -> bool {
        self.add(true, frames, FrameKind::Push)
    }

    /// Adds the frames of a unit for one channel. Without room in memory, the client is closed.
    pub fn deliver(&self, unit: Unit, frames: impl IntoIterator<Item = Frame>, has_room: bool) {
        self.add(has_room, frames, FrameKind::Changes(unit));
    }

    /// Adds a piece of an answer; false when the owner may not have more, or the answer was evicted.
    pub fn answer(&self, text: String) -> bool {
        let has_room = match &self.shared.owner {
            Some(owner) => self.budget.make_room_for(owner, text.len()),
            None => self.budget.make_room(text.len()),
        };
        if !has_room {
            return false;
        }
        let frame = Frame::text(text, &self.budget);
        let mut queue = self.lock();
        if !queue.full {
            queue.add(frame);
        }
        !queue.full
    }

    fn add(&self, has_room: bool, frames: impl IntoIterator<Item = Frame>, kind: FrameKind) -> bool {
        let (wakers, is_congested) = {
            let mut queue = self.lock();
            queue.add_all(frames, kind, self.limit, has_room);
            if !queue.full {
                queue.count_slots(&self.budget);
            }
            (queue.wakers(), queue.is_congested(self.limit))
        };
        wakers.into_iter().flatten().for_each(Waker::wake);
        is_congested
    }

    /// Returns the owner of the answers.
    pub fn owner(&self) -> Option<Arc<Owner>> {
        self.shared.owner.clone()
    }

    /// Returns the memory budget.
    pub fn budget(&self) -> &Arc<MemoryBudget> {
        &self.budget
    }

    /// Asks the session to bind a channel anew, after the queued frames.
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

    /// Records that `bytes` of the taken frames cannot be written now. They count as waiting until more is taken.
    pub fn is_stuck_with(&self, bytes: usize) {
        let mut queue = self.lock();
        queue.unwritten = bytes;
        queue.note_slow();
    }

    /// Returns whether a channel waits to be bound anew: changes are not delivered to it.
    pub fn is_to_rebind(&self, channel: ChannelId) -> bool {
        self.lock().rebind.contains(&channel)
    }

    /// Returns whether another batch of the page might not fit.
    pub fn is_behind(&self) -> bool {
        self.lock().is_behind(self.limit)
    }

    /// Returns whether another push might not fit, although the client is not slow: publishers should wait a little.
    pub fn is_congested(&self) -> bool {
        self.lock().is_congested(self.limit)
    }

    /// Returns what waits now.
    pub fn waiting(&self) -> Waiting {
        // One lock at a time, and the second only if no write holds it: a task that adds frames must not wait for this.
        let taken = self.shared.in_flight.try_lock().ok().and_then(|in_flight| in_flight.oldest());
        let queue = self.lock();
        let bytes = queue.bytes + queue.unwritten;
        Waiting { bytes, oldest: taken.or_else(|| queue.oldest()) }
    }

    /// Returns whether it overflowed.
    pub fn is_full(&self) -> bool {
        self.lock().full
    }

    /// Returns whether changes were delivered since the last call.
    pub fn was_delivered_to(&self) -> bool {
        std::mem::take(&mut self.lock().delivered)
    }

    /// Waits for frames and moves all of them in flight. Cancel safe. Only one task may wait at a time.
    pub async fn take(&self) -> Taken {
        poll_fn(|context| {
            let mut queue = self.lock();
            queue.take(&self.shared.in_flight).map_or_else(|| wait(&mut queue.taker, context), Poll::Ready)
        })
        .await
    }

    /// Locks the taken frames.
    pub fn in_flight(&self) -> MutexGuard<'_, InFlight> {
        lock(&self.shared.in_flight)
    }

    /// Waits until it overflows, even while another task waits to take. Cancel safe. Only one task may wait at a
    /// time.
    pub async fn overflowed(&self) {
        poll_fn(|context| {
            let mut queue = self.lock();
            if queue.full { Poll::Ready(()) } else { wait(&mut queue.watcher, context) }
        })
        .await;
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        lock(&self.shared.queue)
    }
}

impl Evictable for Shared {
    fn waiting(&self) -> Option<WaitingBytes> {
        let queue = lock(&self.queue);
        let bytes = queue.bytes + queue.unwritten;
        let is_slow = queue.is_slow();
        (bytes > 0 && !queue.full).then_some(WaitingBytes { is_slow, bytes })
    }

    fn owner(&self) -> Option<&Arc<Owner>> {
        self.owner.as_ref()
    }

    fn evict(&self) {
        let wakers = {
            let mut queue = lock(&self.queue);
            queue.close();
            queue.unwritten = 0;
            queue.count_slots(&self.budget);
            queue.wakers()
        };
        let mut in_flight = lock(&self.in_flight);
        in_flight.frames = VecDeque::new();
        in_flight.is_evicted = true;
        drop(in_flight);
        wakers.into_iter().flatten().for_each(Waker::wake);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let queue = self.queue.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.budget.set_slots(queue.slots, 0);
    }
}

fn wait<T>(slot: &mut Option<Waker>, context: &Context<'_>) -> Poll<T> {
    match slot {
        Some(waker) => waker.clone_from(context.waker()),
        empty => *empty = Some(context.waker().clone()),
    }
    Poll::Pending
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::feed::deliver::frame::{CountedBytes, FRAME_OVERHEAD, PayloadText};
    use crate::model::codec::protocol::{Envelope, Wrapping};

    fn budget(limit: usize) -> Arc<MemoryBudget> {
        Arc::new(MemoryBudget::new(limit))
    }

    fn outbox(limit: usize) -> Outbox {
        Outbox::new(limit, budget(usize::MAX))
    }

    fn frame(bytes: usize, outbox: &Outbox) -> Frame {
        Frame::text("x".repeat(bytes), outbox.budget())
    }

    fn push(outbox: &Outbox, bytes: usize) {
        outbox.push(frame(bytes, outbox));
    }

    async fn take(outbox: &Outbox) -> (Taken, usize) {
        let taken = outbox.take().await;
        (taken, outbox.in_flight().frames.len())
    }

    #[tokio::test]
    async fn a_full_outbox_drops_its_frames() {
        let outbox = outbox(10);
        push(&outbox, 6);
        push(&outbox, 6);
        push(&outbox, 1);
        assert_eq!(take(&outbox).await, (Taken::Full, 0));
        outbox.overflowed().await;
    }

    #[tokio::test]
    async fn a_unit_fits_whatever_its_size() {
        let outbox = outbox(10);
        let whole = |bytes| frame(bytes, &outbox);
        push(&outbox, 6);
        let unit = Unit::next();
        for _ in 0..3 {
            outbox.deliver(unit, [whole(100), whole(100)], true);
        }
        assert_eq!(take(&outbox).await, (Taken::Frames, 7));
        outbox.deliver(Unit::next(), [whole(100)], true);
        outbox.deliver(Unit::next(), [whole(1)], true);
        assert!(outbox.is_full(), "more than the limit waited before this one began");
    }

    #[tokio::test]
    async fn a_broadcast_among_the_changes_has_the_limit_of_pushes() {
        let outbox = outbox(1000);
        let broadcast = |bytes: usize| {
            let wrapping = Wrapping { is_binary: true, before: Vec::new(), after: "" };
            Frame::push(wrapping, CountedBytes::new(vec![0; bytes], outbox.budget()), outbox.budget())
        };
        for _ in 0..3 {
            outbox.deliver(Unit::next(), [broadcast(5000), frame(100, &outbox)], true);
        }
        assert_eq!(take(&outbox).await, (Taken::Frames, 6), "none of them had to wait for the one before");
        outbox.deliver(Unit::next(), [broadcast(16_001)], true);
        assert!(!outbox.is_full());
        outbox.deliver(Unit::next(), [frame(1, &outbox)], true);
        assert!(outbox.is_full(), "far too much waits");
    }

    #[tokio::test]
    async fn pushes_close_a_client_that_is_slow_or_has_far_too_many() {
        let outbox = outbox(1000);
        let publish = |bytes| outbox.publish([frame(bytes, &outbox)]);
        publish(5000);
        publish(5000);
        assert!(outbox.is_congested() && !outbox.is_full(), "it had no time to read");
        outbox.deliver(Unit::next(), [frame(900, &outbox)], true);
        assert_eq!(take(&outbox).await, (Taken::Frames, 3));
        assert!(!outbox.is_congested());
        outbox.in_flight().frames.clear();
        publish(17_000);
        publish(1);
        assert!(outbox.is_full());
    }

    #[test]
    fn replayed_frames_do_not_count_against_the_limit() {
        let outbox = outbox(1000);
        let whole = |bytes| frame(bytes, &outbox);
        outbox.deliver(Unit::REPLAY, [whole(5000)], true);
        outbox.deliver(Unit::next(), [whole(900)], true);
        outbox.deliver(Unit::REPLAY, [whole(5000)], true);
        outbox.deliver(Unit::next(), [whole(900)], true);
        assert!(!outbox.is_full());
        outbox.deliver(Unit::next(), [whole(1)], true);
        assert!(outbox.is_full());
    }

    #[test]
    fn a_few_replies_behind_a_large_change_close_no_client_and_many_do() {
        let outbox = outbox(1000);
        outbox.deliver(Unit::next(), [frame(5000, &outbox)], true);
        push(&outbox, 100);
        push(&outbox, 100);
        assert!(!outbox.is_full());
        push(&outbox, 100);
        push(&outbox, 100);
        assert!(outbox.is_full());
    }

    #[tokio::test]
    async fn an_overflow_wakes_the_watcher_while_another_task_waits_to_take() {
        let outbox = Arc::new(outbox(10));
        let watched = Arc::clone(&outbox);
        let watching = tokio::spawn(async move { watched.overflowed().await });
        tokio::task::yield_now().await;
        assert_eq!(outbox.take().now_or_never(), None);
        push(&outbox, 6);
        push(&outbox, 6);
        push(&outbox, 6);
        watching.await.unwrap();
    }

    #[tokio::test]
    async fn the_client_with_the_most_waiting_is_evicted() {
        let budget = budget(10_000 + 4 * FRAME_OVERHEAD);
        let outboxes: Vec<Outbox> = (0..4).map(|_| Outbox::new(100_000, Arc::clone(&budget))).collect();
        let [slow, small, idle, _] = &outboxes[..] else { panic!("there are four") };
        push(small, 1000);
        push(slow, 3000);
        push(slow, 6000);
        assert!(!slow.is_full(), "it was not too much before");
        push(idle, 5000);
        assert!(slow.is_full() && !idle.is_full() && !small.is_full());
        assert_eq!(budget.held_bytes(), 6000 + 2 * FRAME_OVERHEAD);
        drop(outboxes);
        assert_eq!(budget.held_bytes(), 0);
    }

    #[tokio::test]
    async fn eviction_frees_frames_that_are_being_written() {
        let budget = budget(10_000);
        let (stuck, other) =
            (Outbox::new(100_000, Arc::clone(&budget)), Outbox::new(100_000, Arc::clone(&budget)));
        push(&stuck, 6000);
        stuck.take().await;
        stuck.is_stuck_with(6000);
        push(&other, 5000);
        assert!(stuck.is_full() && !other.is_full());
        assert!(stuck.in_flight().is_evicted && stuck.in_flight().frames.is_empty());
        assert_eq!(budget.held_bytes(), 5000 + FRAME_OVERHEAD);
    }

    #[tokio::test]
    async fn a_client_is_closed_when_all_others_have_less_than_an_equal_share() {
        let budget = budget(10_000);
        let outboxes: Vec<Outbox> = (0..10).map(|_| Outbox::new(100_000, Arc::clone(&budget))).collect();
        for outbox in &outboxes[1..] {
            push(outbox, 700);
        }
        let whole = |bytes| frame(bytes, &outboxes[0]);
        outboxes[0].deliver(Unit::next(), [whole(9000)], outboxes[0].budget().make_room(0));
        assert!(outboxes[0].is_full());
        assert!(outboxes[1..].iter().all(|outbox| !outbox.is_full()));
        assert!(budget.held_bytes() <= 10_000);
    }

    #[tokio::test]
    async fn answers_to_one_owner_share_half_of_the_memory() {
        let budget = budget(100_000);
        let answer = |who: &str| Outbox::of(Some(budget.owner(who)), usize::MAX, Arc::clone(&budget));
        let (first, second, other) = (answer("ann"), answer("ann"), answer("ben"));
        assert!(first.answer("x".repeat(30_000)));
        assert!(other.answer("x".repeat(30_000)));
        assert!(second.answer("x".repeat(10_000)));
        assert!(second.answer("x".repeat(15_000)), "the larger one of the same owner makes room");
        assert!(first.is_full() && !other.is_full());
        assert!(!answer("ann").answer("x".repeat(60_000)), "no answer has more than the share");
    }

    #[test]
    fn reserved_memory_is_at_most_half() {
        let budget = budget(10_000);
        let (mut one, mut other) = (budget.reserved(), budget.reserved());
        assert!(one.resize(3000) && !other.resize(3000) && other.resize(2000));
        assert!(one.resize(1000) && other.resize(4000));
        assert_eq!(budget.held_bytes(), 5000);
        drop((one, other));
        assert_eq!(budget.held_bytes(), 0);
        assert!(budget.reserved().resize(5000));
    }

    #[test]
    fn a_shared_payload_counts_once_until_the_last_reader_drops_it() {
        let budget = budget(usize::MAX);
        let (one, other) = (Outbox::new(10, Arc::clone(&budget)), Outbox::new(10, Arc::clone(&budget)));
        let payload = PayloadText::new("x".repeat(7), OffsetDateTime::UNIX_EPOCH, &budget);
        let around = |head: &str| {
            let envelope = Envelope::Text { before: head.to_owned(), after: "" };
            Frame::change(envelope, Arc::clone(&payload), &budget)
        };
        one.deliver(Unit::next(), [around("a")], true);
        other.deliver(Unit::next(), [around("b")], true);
        drop(payload);
        assert_eq!(budget.held_bytes(), 3 * FRAME_OVERHEAD + 7 + 2);
        drop(one);
        assert_eq!(budget.held_bytes(), 2 * FRAME_OVERHEAD + 7 + 1);
        drop(other);
        assert_eq!(budget.held_bytes(), 0);
    }
}
