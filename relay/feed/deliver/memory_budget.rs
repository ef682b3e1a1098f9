//! The bound on memory that waits for clients: frames, answers, and what is kept of clients' requests.
//!
//! Memory is counted from allocation to release. When it runs out, the clients with the most waiting are evicted
//! until the rest fits.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use slab::Slab;

use crate::feed::deliver::frame::Frame;

/// The memory bound of a relay, in bytes.
pub struct MemoryBudget {
    limit: usize,
    /// Maximum bytes of the frame of one change.
    change_bytes: usize,
    /// Counted bytes.
    held: AtomicUsize,
    /// Those of them that cannot be evicted.
    reserved: AtomicUsize,
    holders: Mutex<Slab<Weak<dyn Evictable>>>,
    owners: Mutex<HashMap<u64, Weak<Owner>>>,
}

/// A client with memory that can be evicted.
pub trait Evictable: Send + Sync {
    /// Returns what waits for the client; `None` when nothing does.
    fn waiting(&self) -> Option<WaitingBytes>;

    /// Returns the owner of an answer; `None` for a socket or stream.
    fn owner(&self) -> Option<&Arc<Owner>>;

    /// Frees everything that waits, and closes the client.
    fn evict(&self);
}

/// The memory that waits for a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct WaitingBytes {
    /// It has waited for long: the client is slow.
    pub is_slow: bool,
    /// Its size.
    pub bytes: usize,
}

/// An identity whose answers share a part of the memory.
#[derive(Debug)]
pub struct Owner {
    key: u64,
}

/// Counted memory; released when dropped.
#[derive(Debug)]
pub struct Held {
    budget: Arc<MemoryBudget>,
    bytes: usize,
}

/// Counted memory that cannot be evicted, and that may grow and shrink.
#[derive(Debug)]
pub struct Reserved(Held);

/// The registration of a holder that can be evicted.
pub struct Registration {
    budget: Arc<MemoryBudget>,
    number: usize,
}

impl MemoryBudget {
    /// Creates the budget of a process with `memory` bytes. A quarter of it is left for the allocator's overhead when
    /// thousands of clients come and go.
    pub fn within(memory: usize, change_bytes: usize) -> Self {
        Self { change_bytes, ..Self::new(memory - memory / 4) }
    }

    /// Creates an empty budget.
    pub fn new(limit: usize) -> Self {
        let (held, reserved) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let (holders, owners) = (Mutex::default(), Mutex::default());
        Self { limit, change_bytes: usize::MAX, held, reserved, holders, owners }
    }

    /// Returns the counted bytes. A frame for many clients counts once.
    pub fn held_bytes(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Returns the maximum bytes of the frame of one change.
    pub fn change_bytes(&self) -> usize {
        self.change_bytes
    }

    /// Counts allocated memory.
    pub fn hold(self: &Arc<Self>, bytes: usize) -> Held {
        self.add(bytes);
        Held { budget: Arc::clone(self), bytes }
    }

    /// Replaces the count of queue slots of an outbox.
    pub fn set_slots(&self, before: usize, now: usize) {
        let bytes = |slots: usize| slots * size_of::<Frame>();
        self.add(bytes(now));
        self.subtract(bytes(before));
    }

    /// Creates a reservation of zero bytes.
    pub fn reserved(self: &Arc<Self>) -> Reserved {
        Reserved(self.hold(0))
    }

    /// Makes room for `bytes` more by evicting the clients with the most waiting; false when that is not enough. A
    /// client with less than an equal share is not evicted.
    pub fn make_room(&self, bytes: usize) -> bool {
        if self.fits(bytes) {
            return true;
        }
        let holders: Vec<Arc<dyn Evictable>> =
            lock(&self.holders).iter().filter_map(|(_, holder)| holder.upgrade()).collect();
        let equal_share =
            self.limit.saturating_sub(self.reserved.load(Ordering::Relaxed)) / holders.len().max(1);
        self.evict(
            holders
                .iter()
                .filter(|holder| holder.waiting().is_some_and(|waiting| waiting.bytes > equal_share)),
            |_| self.fits(bytes),
        );
        self.fits(bytes)
    }

    /// Makes room for an answer to this owner, whose answers together have at most [`Self::share`].
    pub fn make_room_for(&self, owner: &Arc<Owner>, bytes: usize) -> bool {
        let share = self.share();
        if self.held_bytes().saturating_add(bytes) > share {
            let is_own =
                |holder: &Arc<dyn Evictable>| holder.owner().is_some_and(|of| Arc::ptr_eq(of, owner));
            let holders =
                lock(&self.holders).iter().filter_map(|(_, holder)| holder.upgrade()).collect::<Vec<_>>();
            let own: Vec<_> = holders.into_iter().filter(is_own).collect();
            let waiting = |holder: &Arc<dyn Evictable>| holder.waiting().map_or(0, |waiting| waiting.bytes);
            let mut all: usize = own.iter().map(waiting).sum();
            self.evict(own.iter(), |freed| {
                all = all.saturating_sub(freed);
                all + bytes <= share
            });
            if all + bytes > share {
                return false;
            }
        }
        self.make_room(bytes)
    }

    /// Returns the maximum bytes of all answers to one owner: half, so that others always find room.
    pub fn share(&self) -> usize {
        self.limit / 2
    }

    /// Returns the owner with this key, creating it if needed.
    pub fn owner(&self, key_of: impl Hash) -> Arc<Owner> {
        let mut hasher = DefaultHasher::new();
        key_of.hash(&mut hasher);
        let key = hasher.finish();
        let mut owners = lock(&self.owners);
        if let Some(known) = owners.get(&key).and_then(Weak::upgrade) {
            return known;
        }
        let owner = Arc::new(Owner { key });
        owners.retain(|_, owner| owner.strong_count() > 0);
        owners.insert(owner.key, Arc::downgrade(&owner));
        owner
    }

    /// Registers a holder; it can be evicted until the registration is dropped.
    pub fn register(self: &Arc<Self>, holder: Weak<dyn Evictable>) -> Registration {
        let number = lock(&self.holders).insert(holder);
        Registration { budget: Arc::clone(self), number }
    }

    /// Evicts slow clients first, then those with the most waiting, until `enough`. `enough` gets the bytes freed
    /// since its last call.
    fn evict<'a>(
        &self,
        holders: impl Iterator<Item = &'a Arc<dyn Evictable>>,
        mut enough: impl FnMut(usize) -> bool,
    ) {
        let mut waiting: Vec<_> = holders.filter_map(|holder| Some((holder.waiting()?, holder))).collect();
        waiting.sort_by_key(|(waiting, _)| Reverse(*waiting));
        let mut freed = 0;
        for (waiting, holder) in waiting {
            if enough(freed) {
                return;
            }
            holder.evict();
            freed = waiting.bytes;
        }
        enough(freed);
    }

    fn add(&self, bytes: usize) {
        self.held.fetch_add(bytes, Ordering::Relaxed);
    }

    fn subtract(&self, bytes: usize) {
        self.held.fetch_sub(bytes, Ordering::Relaxed);
    }

    fn fits(&self, bytes: usize) -> bool {
        self.held_bytes().saturating_add(bytes) <= self.limit
    }
}

impl Reserved {
    /// Returns the size.
    pub fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// Changes the size to `bytes`; false, with the size unchanged, when that does not fit.
    pub fn resize(&mut self, bytes: usize) -> bool {
        let Held { budget, bytes: now } = &mut self.0;
        if let Some(more) = bytes.checked_sub(*now) {
            // The other half always remains for memory that can be evicted.
            let reserved = budget.reserved.load(Ordering::Relaxed);
            if more > 0 && (reserved + more > budget.limit / 2 || !budget.make_room(more)) {
                return false;
            }
            budget.reserved.fetch_add(more, Ordering::Relaxed);
            budget.add(more);
        } else {
            budget.reserved.fetch_sub(*now - bytes, Ordering::Relaxed);
            budget.subtract(*now - bytes);
        }
        *now = bytes;
        true
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.0.budget.reserved.fetch_sub(self.0.bytes, Ordering::Relaxed);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.subtract(self.bytes);
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        lock(&self.budget.holders).try_remove(self.number);
    }
}

impl fmt::Debug for MemoryBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Budget").field("limit", &self.limit).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
