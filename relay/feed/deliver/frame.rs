//! A frame queued for clients, in pieces: the payload common to many channels is in memory once.

use std::sync::Arc;

use bytes::Bytes;

use crate::feed::deliver::memory_budget::{Held, MemoryBudget};

/// Bytes counted for a frame beside its text: reference counts, queue slot, allocator overhead.
pub const FRAME_OVERHEAD: usize = 256;

/// A text for one or many clients. Counted until the last clone is dropped.
#[derive(Debug, Clone)]
pub struct Frame(Arc<Pieces>);

#[derive(Debug)]
struct Pieces {
    head: Bytes,
    payload: Option<SharedPayload>,
    tail: &'static str,
    _held: Held,
}

/// The part that many frames share. Counted until the last clone is dropped.
pub type SharedPayload = Arc<PayloadText>;

/// The text of a payload.
#[derive(Debug)]
pub struct PayloadText {
    text: String,
    _held: Held,
}

impl PayloadText {
    /// Creates a shared text.
    pub fn new(text: String, budget: &Arc<MemoryBudget>) -> SharedPayload {
        let held = budget.hold(FRAME_OVERHEAD + text.capacity());
        Arc::new(Self { text, _held: held })
    }

    /// Returns the text as it is sent.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl Frame {
    /// Creates a frame of one piece.
    pub fn whole(text: impl Into<Bytes>, budget: &Arc<MemoryBudget>) -> Self {
        Self::new(text.into(), None, "", budget)
    }

    /// Creates a frame of a payload with a head and a tail.
    pub fn around(
        head: String,
        payload: SharedPayload,
        tail: &'static str,
        budget: &Arc<MemoryBudget>,
    ) -> Self {
        Self::new(head.into(), Some(payload), tail, budget)
    }

    fn new(
        head: Bytes,
        payload: Option<SharedPayload>,
        tail: &'static str,
        budget: &Arc<MemoryBudget>,
    ) -> Self {
        let held = budget.hold(FRAME_OVERHEAD + head.len());
        Self(Arc::new(Pieces { head, payload, tail, _held: held }))
    }

    /// Returns the piece before the payload; the whole text when there is no payload.
    pub fn head(&self) -> &[u8] {
        &self.0.head
    }

    /// Returns the shared payload.
    pub fn payload(&self) -> Option<&SharedPayload> {
        self.0.payload.as_ref()
    }

    /// Returns its pieces, in order.
    pub fn pieces(&self) -> [&[u8]; 3] {
        let payload = self.0.payload.as_ref().map_or(&[][..], |payload| payload.as_str().as_bytes());
        [&self.0.head, payload, self.0.tail.as_bytes()]
    }

    /// Returns its size on the wire in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a frame is never empty")]
    pub fn len(&self) -> usize {
        let payload = self.0.payload.as_ref().map_or(0, |payload| payload.as_str().len());
        self.0.head.len() + payload + self.0.tail.len()
    }
}
