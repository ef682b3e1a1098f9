//! A frame on its way to clients, in pieces: what is the same for all channels is in memory once.

use std::sync::Arc;

use bytes::Bytes;

use crate::feed::deliver::memory_budget::{Held, MemoryBudget};

/// What it takes to keep a frame beside its text: its counters, its place in a queue, and what the allocator adds.
pub const KEPT: usize = 256;

/// A text for one or many clients. Counted as long as anyone has it.
#[derive(Debug, Clone)]
pub struct Frame(Arc<Pieces>);

#[derive(Debug)]
struct Pieces {
    head: Bytes,
    payload: Option<Payload>,
    tail: &'static str,
    _held: Held,
}

/// The part of a frame that many frames share. Counted as long as one of them is there.
pub type Payload = Arc<Text>;

/// The text of a payload.
#[derive(Debug)]
pub struct Text {
    text: String,
    _held: Held,
}

impl Text {
    /// A text to share.
    pub fn new(text: String, budget: &Arc<MemoryBudget>) -> Payload {
        let held = budget.hold(KEPT + text.capacity());
        Arc::new(Self { text, _held: held })
    }

    /// As it is sent.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl Frame {
    /// A frame of one piece.
    pub fn whole(text: impl Into<Bytes>, budget: &Arc<MemoryBudget>) -> Self {
        Self::new(text.into(), None, "", budget)
    }

    /// A payload with what stands before and after it.
    pub fn around(head: String, payload: Payload, tail: &'static str, budget: &Arc<MemoryBudget>) -> Self {
        Self::new(head.into(), Some(payload), tail, budget)
    }

    fn new(head: Bytes, payload: Option<Payload>, tail: &'static str, budget: &Arc<MemoryBudget>) -> Self {
        let held = budget.hold(KEPT + head.len());
        Self(Arc::new(Pieces { head, payload, tail, _held: held }))
    }

    /// What stands before the payload; all of it when there is none.
    pub fn head(&self) -> &[u8] {
        &self.0.head
    }

    /// What it shares with others.
    pub fn payload(&self) -> Option<&Payload> {
        self.0.payload.as_ref()
    }

    /// Its pieces, in order.
    pub fn pieces(&self) -> [&[u8]; 3] {
        let payload = self.0.payload.as_ref().map_or(&[][..], |payload| payload.as_str().as_bytes());
        [&self.0.head, payload, self.0.tail.as_bytes()]
    }

    /// How many bytes it has on the wire.
    #[expect(clippy::len_without_is_empty, reason = "a frame is never empty")]
    pub fn len(&self) -> usize {
        let payload = self.0.payload.as_ref().map_or(0, |payload| payload.as_str().len());
        self.0.head.len() + payload + self.0.tail.len()
    }
}
