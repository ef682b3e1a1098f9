//! What waits for all clients together. A frame that waits for many is in memory once, and counts once.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;

use crate::observe::Observe;

/// What it takes to keep a frame beside its text: its counters, its place in a queue, and what the allocator adds.
pub const KEPT: usize = 256;

/// The bound of all outboxes of a relay, in bytes.
pub struct Budget {
    limit: usize,
    /// How many share it.
    outboxes: AtomicUsize,
    /// Counts what waits, for everybody to see.
    observe: Arc<Observe>,
}

/// A frame that is counted as long as somebody has it.
struct Counted {
    text: Bytes,
    budget: Arc<Budget>,
}

impl Budget {
    /// Of so much memory. A quarter of it is for what the allocator adds when a thousand clients come and go.
    pub fn within(memory: usize, observe: Arc<Observe>) -> Self {
        Self::new(memory - memory / 4, observe)
    }

    /// Nothing waits yet.
    pub fn new(limit: usize, observe: Arc<Observe>) -> Self {
        Self { limit, outboxes: AtomicUsize::new(0), observe }
    }

    /// The same bytes, counted until the last copy of them is gone.
    pub fn count(self: &Arc<Self>, text: impl Into<Bytes>) -> Bytes {
        let text = text.into();
        self.observe.waits(KEPT + text.len());
        Bytes::from_owner(Counted { text, budget: Arc::clone(self) })
    }

    /// Whether more waits than may.
    pub fn is_exceeded(&self) -> bool {
        self.observe.waiting_bytes() > self.limit
    }

    /// Whether an outbox with so many bytes has more than its part of what may wait, while too much does.
    pub fn is_exceeded_by(&self, bytes: usize) -> bool {
        bytes > 0 && self.is_exceeded() && bytes > self.limit / self.outboxes.load(Ordering::Relaxed).max(1)
    }

    /// One more shares it.
    pub fn outbox_opened(&self) {
        self.outboxes.fetch_add(1, Ordering::Relaxed);
    }

    /// One less shares it.
    pub fn outbox_closed(&self) {
        self.outboxes.fetch_sub(1, Ordering::Relaxed);
    }
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.text
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.budget.observe.waits_no_more(KEPT + self.text.len());
    }
}

impl fmt::Debug for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Budget").field("limit", &self.limit).finish_non_exhaustive()
    }
}
