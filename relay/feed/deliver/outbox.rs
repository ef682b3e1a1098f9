//! The bounded queue of frames to one client. Whoever fills it never waits; when it is full the client is closed.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::feed::deliver::frame::Frame;
use crate::feed::deliver::memory_budget::{Holder, MemoryBudget, Owner, Reservation, Waiting};
use crate::model::session::machine::ChannelId;

/// A client for which this much waits …
const MUCH: usize = 64 * 1024;
/// … for this long is slow.
const LONG: Duration = Duration::from_millis(250);
/// What waits may be this much before more of a page is to wait for the client, or half of the limit if that is less.
const BEHIND: usize = 256 * 1024;
/// An answer to what the client says is no reason to close it, if it is this small.
const SMALL: usize = 4 * 1024;
/// Places for frames that an outbox has without being counted for them.
const PLACES: usize = 32;

/// Frames on their way to one client, bounded in bytes.
///
/// The client is closed when more is to be added while more than the limit waits. So all that one change is to a client
/// fits, whatever it is, if the client has read enough of what was before it.
pub struct Outbox {
    shared: Arc<Shared>,
    limit: usize,
    budget: Arc<MemoryBudget>,
    _place: Reservation,
}

struct Shared {
    // Neither is held across an await. The hand may be held while the socket is written to, so never by those who push.
    queue: Mutex<Queue>,
    hand: Mutex<Hand>,
    owner: Option<Arc<Owner>>,
    budget: Arc<MemoryBudget>,
}

#[derive(Debug, Default)]
struct Queue {
    frames: VecDeque<Frame>,
    bytes: usize,
    /// What the last change is of.
    part: Unit,
    /// How many of the bytes are replies and the like.
    said: usize,
    /// How many of the bytes are of the past, and how many of those that were taken.
    past: usize,
    past_taken: usize,
    /// What was taken and cannot be written now.
    stuck: usize,
    /// Since when much waits.
    since: Option<Instant>,
    /// Places for frames that are counted.
    places: usize,
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

/// What belongs together: a client that had room for the beginning has room for the rest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unit(u64);

/// The last unit that was begun.
static UNITS: AtomicU64 = AtomicU64::new(1);

impl Unit {
    /// What one reader missed. It is read as fast as the reader takes it.
    pub const PAST: Self = Self(1);

    /// A part of a page: all that its changes are to a client, in whichever of its channels.
    pub fn part() -> Self {
        Self(UNITS.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

/// Frames that were taken and are being written.
#[derive(Debug, Default)]
pub struct Hand {
    /// They, in order.
    pub frames: VecDeque<Frame>,
    /// They were taken away, also one that was begun.
    pub is_evicted: bool,
}

/// What the session finds in its outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// Frames: they are in the hand.
    Frames,
    /// A channel's relation is gone, or another: it is to be bound anew.
    Rebind(ChannelId),
    /// It was full, and nothing more will come: the client reads too slowly and should come back.
    Full,
}

impl Outbox {
    /// An empty outbox that holds up to `limit` bytes of what `budget` allows all together.
    pub fn new(limit: usize, budget: Arc<MemoryBudget>) -> Self {
        Self::of(None, limit, budget)
    }

    /// The same for an answer that belongs to somebody.
    pub fn of(owner: Option<Arc<Owner>>, limit: usize, budget: Arc<MemoryBudget>) -> Self {
        let (queue, hand) = (Mutex::default(), Mutex::default());
        let shared = Arc::new(Shared { queue, hand, owner, budget: Arc::clone(&budget) });
        let holder: Weak<dyn Holder> = Arc::<Shared>::downgrade(&shared);
        let _place = budget.enter(holder);
        Self { shared, limit, budget, _place }
    }

    /// Adds a frame of its own. One frame is always taken, however large: otherwise it could never be delivered.
    pub fn push(&self, frame: impl Into<Bytes>) {
        let frame = Frame::whole(frame, &self.budget);
        let has_room = frame.len() <= SMALL || self.budget.make_room(0);
        self.add(has_room, [frame], None);
    }

    /// Adds all that a part of a page is to a channel. Without room for it in memory, the client is closed.
    pub fn deliver(&self, part: Unit, frames: impl IntoIterator<Item = Frame>, has_room: bool) {
        self.add(has_room, frames, Some(part));
    }

    /// Adds a piece of an answer; false when it may not have more, or was evicted.
    pub fn answer(&self, text: String) -> bool {
        let has_room = match &self.shared.owner {
            Some(owner) => self.budget.make_room_for(owner, text.len()),
            None => self.budget.make_room(text.len()),
        };
        if !has_room {
            return false;
        }
        let frame = Frame::whole(text, &self.budget);
        let mut queue = self.lock();
        if !queue.full {
            queue.add(frame);
        }
        !queue.full
    }

    fn add(&self, has_room: bool, frames: impl IntoIterator<Item = Frame>, part: Option<Unit>) {
        let wakers = {
            let mut queue = self.lock();
            queue.delivered |= part.is_some();
            let goes_on = match part {
                Some(part) => part == Unit::PAST || part == queue.part,
                // Replies and pings are no reason to close a client to which a large change is on its way.
                None => queue.said <= self.limit / 4,
            };
            let is_too_much = queue.bytes > 0 && queue.pressing() > self.limit;
            if !has_room || (is_too_much && !goes_on) {
                queue.end();
            }
            if !queue.full {
                let before = queue.bytes;
                frames.into_iter().for_each(|frame| queue.add(frame));
                match part {
                    Some(Unit::PAST) => queue.past += queue.bytes - before,
                    Some(part) => queue.part = part,
                    None => queue.said += queue.bytes - before,
                }
                queue.count_places(&self.budget);
            }
            queue.wakers()
        };
        wakers.into_iter().flatten().for_each(Waker::wake);
    }

    /// Whose answers it holds.
    pub fn owner(&self) -> Option<Arc<Owner>> {
        self.shared.owner.clone()
    }

    /// What counts for it.
    pub fn budget(&self) -> &Arc<MemoryBudget> {
        &self.budget
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
        let mut queue = self.lock();
        queue.stuck = bytes;
        queue.note_since();
    }

    /// Whether a channel is to be bound anew, and the session did not hear of it yet: what comes is not told to it.
    pub fn is_to_rebind(&self, channel: ChannelId) -> bool {
        self.lock().rebind.contains(&channel)
    }

    /// Whether so much waits that another part of a page might not fit.
    pub fn is_behind(&self) -> bool {
        let queue = self.lock();
        !queue.full && queue.bytes > BEHIND.min(self.limit / 2)
    }

    /// Whether it overflowed.
    pub fn is_full(&self) -> bool {
        self.lock().full
    }

    /// Whether changes were delivered since this was asked last.
    pub fn was_delivered_to(&self) -> bool {
        std::mem::take(&mut self.lock().delivered)
    }

    /// Waits until there is something and takes it all into the hand. Cancel safe. Only one task may wait at a time.
    pub async fn take(&self) -> Taken {
        poll_fn(|context| {
            let mut queue = self.lock();
            queue.take(&self.shared.hand).map_or_else(|| wait(&mut queue.waiting, context), Poll::Ready)
        })
        .await
    }

    /// What was taken.
    pub fn hand(&self) -> MutexGuard<'_, Hand> {
        lock(&self.shared.hand)
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
        lock(&self.shared.queue)
    }
}

impl Holder for Shared {
    fn waiting(&self) -> Option<Waiting> {
        let queue = lock(&self.queue);
        let bytes = queue.bytes + queue.stuck;
        let is_old = queue.since.is_some_and(|since| since.elapsed() > LONG);
        (bytes > 0 && !queue.full).then_some(Waiting { is_old, bytes })
    }

    fn owner(&self) -> Option<&Arc<Owner>> {
        self.owner.as_ref()
    }

    fn evict(&self) {
        let wakers = {
            let mut queue = lock(&self.queue);
            queue.end();
            queue.stuck = 0;
            queue.count_places(&self.budget);
            queue.wakers()
        };
        let mut hand = lock(&self.hand);
        hand.frames = VecDeque::new();
        hand.is_evicted = true;
        drop(hand);
        wakers.into_iter().flatten().for_each(Waker::wake);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let queue = self.queue.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.budget.places(queue.places, 0);
    }
}

fn wait<T>(place: &mut Option<Waker>, context: &Context<'_>) -> Poll<T> {
    match place {
        Some(waker) => waker.clone_from(context.waker()),
        nobody => *nobody = Some(context.waker().clone()),
    }
    Poll::Pending
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Queue {
    fn add(&mut self, frame: Frame) {
        self.bytes += frame.len();
        self.frames.push_back(frame);
        self.note_since();
    }

    /// What counts against the limit: more of the past comes only once the client has read what is there of it.
    fn pressing(&self) -> usize {
        self.bytes - self.past + self.stuck.saturating_sub(self.past_taken)
    }

    fn note_since(&mut self) {
        if self.since.is_none() && self.bytes + self.stuck > MUCH {
            self.since = Some(Instant::now());
        }
    }

    /// Frames that are shared by many clients are small for each of them; their places in its queue are its own.
    fn count_places(&mut self, budget: &MemoryBudget) {
        let places = self.frames.capacity();
        if places > PLACES.max(self.places) || places * 4 < self.places {
            budget.places(self.places, places);
            self.places = places;
        }
    }

    /// What is queued would come before a gap: none of it may be delivered as if nothing were missing.
    fn end(&mut self) {
        self.full = true;
        self.frames = VecDeque::new();
        (self.bytes, self.past) = (0, 0);
    }

    /// Whom to wake for what came.
    fn wakers(&mut self) -> [Option<Waker>; 2] {
        [self.waiting.take(), if self.full { self.watching.take() } else { None }]
    }

    fn take(&mut self, hand: &Mutex<Hand>) -> Option<Taken> {
        self.stuck = 0;
        self.since = None;
        self.said = 0;
        if !self.frames.is_empty() {
            let mut hand = lock(hand);
            if hand.frames.is_empty() {
                std::mem::swap(&mut self.frames, &mut hand.frames);
            } else {
                hand.frames.append(&mut self.frames);
            }
            self.past_taken = std::mem::take(&mut self.past);
            self.bytes = 0;
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
    use futures_util::FutureExt;

    use super::*;
    use crate::feed::deliver::frame::{KEPT, Text};
    use crate::observe::Observe;

    fn budget(limit: usize) -> (Arc<MemoryBudget>, Arc<Observe>) {
        let observe = Arc::new(Observe::new());
        (Arc::new(MemoryBudget::new(limit, Arc::clone(&observe))), observe)
    }

    fn outbox(limit: usize) -> Outbox {
        Outbox::new(limit, budget(usize::MAX).0)
    }

    fn frame(bytes: usize) -> Bytes {
        Bytes::from(vec![b'x'; bytes])
    }

    async fn take(outbox: &Outbox) -> (Taken, usize) {
        let taken = outbox.take().await;
        (taken, outbox.hand().frames.len())
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
    async fn what_one_part_is_to_the_channels_of_a_client_fits_whatever_it_is() {
        let outbox = outbox(10);
        let whole = |bytes| Frame::whole(frame(bytes), outbox.budget());
        outbox.push(frame(6));
        let part = Unit::part();
        for _ in 0..3 {
            outbox.deliver(part, [whole(100), whole(100)], true);
        }
        assert_eq!(take(&outbox).await, (Taken::Frames, 7));
        outbox.deliver(Unit::part(), [whole(100)], true);
        outbox.deliver(Unit::part(), [whole(1)], true);
        assert!(outbox.is_full(), "more than the limit waited before this one began");
    }

    #[test]
    fn what_was_missed_closes_no_client_for_what_comes_now() {
        let outbox = outbox(1000);
        let whole = |bytes| Frame::whole(frame(bytes), outbox.budget());
        outbox.deliver(Unit::PAST, [whole(5000)], true);
        outbox.deliver(Unit::part(), [whole(900)], true);
        outbox.deliver(Unit::PAST, [whole(5000)], true);
        outbox.deliver(Unit::part(), [whole(900)], true);
        assert!(!outbox.is_full());
        outbox.deliver(Unit::part(), [whole(1)], true);
        assert!(outbox.is_full());
    }

    #[test]
    fn a_reply_closes_no_client_for_the_change_that_is_before_it_and_many_replies_do() {
        let outbox = outbox(1000);
        outbox.deliver(Unit::part(), [Frame::whole(frame(5000), outbox.budget())], true);
        outbox.push(frame(100));
        outbox.push(frame(100));
        assert!(!outbox.is_full());
        outbox.push(frame(100));
        outbox.push(frame(100));
        assert!(outbox.is_full());
    }

    #[tokio::test]
    async fn its_end_is_heard_by_who_watches_while_another_waits_to_take() {
        let outbox = Arc::new(outbox(10));
        let watched = Arc::clone(&outbox);
        let watching = tokio::spawn(async move { watched.overflowed().await });
        tokio::task::yield_now().await;
        assert_eq!(outbox.take().now_or_never(), None);
        outbox.push(frame(6));
        outbox.push(frame(6));
        outbox.push(frame(6));
        watching.await.unwrap();
    }

    #[tokio::test]
    async fn when_too_much_waits_for_all_the_one_with_most_of_it_ends() {
        let (budget, observe) = budget(10_000 + 4 * KEPT);
        let outboxes: Vec<Outbox> = (0..4).map(|_| Outbox::new(100_000, Arc::clone(&budget))).collect();
        let [slow, small, idle, _] = &outboxes[..] else { panic!("there are four") };
        small.push(frame(1000));
        slow.push(frame(3000));
        slow.push(frame(6000));
        assert!(!slow.is_full(), "it was not too much before");
        idle.push(frame(5000));
        assert!(slow.is_full() && !idle.is_full() && !small.is_full());
        assert_eq!(observe.waiting_bytes(), 6000 + 2 * KEPT);
        drop(outboxes);
        assert_eq!(observe.waiting_bytes(), 0);
    }

    #[tokio::test]
    async fn what_is_being_written_is_freed_when_its_client_is_evicted() {
        let (budget, observe) = budget(10_000);
        let (stuck, other) = (Outbox::new(100_000, Arc::clone(&budget)), Outbox::new(100_000, budget));
        stuck.push(frame(6000));
        stuck.take().await;
        stuck.is_stuck_with(6000);
        other.push(frame(5000));
        assert!(stuck.is_full() && !other.is_full());
        assert!(stuck.hand().is_evicted && stuck.hand().frames.is_empty());
        assert_eq!(observe.waiting_bytes(), 5000 + KEPT);
    }

    #[tokio::test]
    async fn a_client_is_refused_what_does_not_fit_when_all_others_have_less_than_their_part() {
        let (budget, observe) = budget(10_000);
        let outboxes: Vec<Outbox> = (0..10).map(|_| Outbox::new(100_000, Arc::clone(&budget))).collect();
        for outbox in &outboxes[1..] {
            outbox.push(frame(700));
        }
        let whole = |bytes| Frame::whole(frame(bytes), outboxes[0].budget());
        outboxes[0].deliver(Unit::part(), [whole(9000)], outboxes[0].budget().make_room(0));
        assert!(outboxes[0].is_full());
        assert!(outboxes[1..].iter().all(|outbox| !outbox.is_full()));
        assert!(observe.waiting_bytes() <= 10_000);
    }

    #[tokio::test]
    async fn answers_to_one_owner_have_half_of_all_and_the_slow_ones_go_first() {
        let (budget, _) = budget(100_000);
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
    fn memory_that_cannot_be_evicted_is_half_of_all_at_most() {
        let (budget, observe) = budget(10_000);
        let (mut one, mut other) = (budget.reserved(), budget.reserved());
        assert!(one.resize(3000) && !other.resize(3000) && other.resize(2000));
        assert!(one.resize(1000) && other.resize(4000));
        assert_eq!(observe.waiting_bytes(), 5000);
        drop((one, other));
        assert_eq!(observe.waiting_bytes(), 0);
        assert!(budget.reserved().resize(5000));
    }

    #[test]
    fn a_payload_counts_once_until_the_last_has_read_it() {
        let (budget, observe) = budget(usize::MAX);
        let (one, other) = (Outbox::new(10, Arc::clone(&budget)), Outbox::new(10, Arc::clone(&budget)));
        let payload = Text::new("x".repeat(7), &budget);
        let around = |head: &str| Frame::around(head.to_owned(), Arc::clone(&payload), "", &budget);
        one.deliver(Unit::part(), [around("a")], true);
        other.deliver(Unit::part(), [around("b")], true);
        drop(payload);
        assert_eq!(observe.waiting_bytes(), 3 * KEPT + 7 + 2);
        drop(one);
        assert_eq!(observe.waiting_bytes(), 2 * KEPT + 7 + 1);
        drop(other);
        assert_eq!(observe.waiting_bytes(), 0);
    }
}
