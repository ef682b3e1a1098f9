//! The batches delivered last, kept for clients that reconnect after a moment.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::feed::read::batch::Batch;
use crate::model::log::cursor::Cursor;

/// The batches delivered last, bounded in bytes. Clients that reconnect soon need not read the changelog.
#[derive(Default)]
pub struct RecentBatches {
    /// The position before the first batch.
    start: Option<Cursor>,
    batches: VecDeque<(Arc<Batch>, usize)>,
    bytes: usize,
}

/// Maximum bytes kept.
const MAX_BYTES: usize = 4 << 20;
/// Maximum bytes replayed to one client.
const MAX_REPLAY_BYTES: usize = 256 << 10;

impl RecentBatches {
    /// Adds a batch that was delivered after `start`.
    pub fn add(&mut self, start: Option<Cursor>, batch: Arc<Batch>) {
        if self.start.is_none() {
            self.start = start;
        }
        let bytes = batch.bytes();
        self.bytes += bytes;
        self.batches.push_back((batch, bytes));
        while self.bytes > MAX_BYTES
            && let Some((oldest, bytes)) = self.batches.pop_front()
        {
            self.bytes -= bytes;
            self.start = oldest.end();
        }
    }

    /// Records that the position moved without changes.
    pub fn moved(&mut self, from: &Option<Cursor>, to: &Cursor) {
        // With no batch kept, a cursor between the two positions has missed nothing.
        if self.start.is_none() {
            self.start = Some(from.as_ref().unwrap_or(to).clone());
        }
    }

    /// Returns the batches that a reader at `cursor` is missing; `None` when not all of them are kept.
    pub fn since(&self, cursor: &Cursor) -> Option<Vec<Arc<Batch>>> {
        let start = self.start.as_ref()?;
        if !cursor.is_at_or_after(start) {
            return None;
        }
        let is_missed = |batch: &Batch| batch.end().is_some_and(|end| !cursor.is_at_or_after(&end));
        let missed: Vec<&(Arc<Batch>, usize)> =
            self.batches.iter().filter(|(batch, _)| is_missed(batch)).collect();
        // A cursor within a page that another relay cut differently must first reach the end of that page.
        if !missed.first()?.0.span.continues(cursor) {
            return None;
        }
        // More than this is read from the changelog, at the client's pace.
        let bytes: usize = missed.iter().map(|(_, bytes)| bytes).sum();
        (bytes <= MAX_REPLAY_BYTES).then(|| missed.iter().map(|(batch, _)| Arc::clone(batch)).collect())
    }
}
