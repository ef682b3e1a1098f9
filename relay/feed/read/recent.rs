//! The last batches, kept for those who come back after a moment.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::feed::read::batch::Batch;
use crate::model::log::cursor::Cursor;

/// What was delivered last, bounded in bytes: those who come back after a moment need not go to the changelog.
#[derive(Default)]
pub struct RecentBatches {
    /// Where one stood before the first of them.
    start: Option<Cursor>,
    batches: VecDeque<(Arc<Batch>, usize)>,
    bytes: usize,
}

/// The bound.
const MOST_BYTES: usize = 4 << 20;
/// How much of it one client is handed.
const MOST_AT_ONCE: usize = 256 << 10;

impl RecentBatches {
    /// Adds what was delivered after `start`.
    pub fn add(&mut self, start: Option<Cursor>, batch: Arc<Batch>) {
        if self.start.is_none() {
            self.start = start;
        }
        let bytes = batch.bytes();
        self.bytes += bytes;
        self.batches.push_back((batch, bytes));
        while self.bytes > MOST_BYTES
            && let Some((oldest, bytes)) = self.batches.pop_front()
        {
            self.bytes -= bytes;
            self.start = oldest.end();
        }
    }

    /// The position moved without anything to deliver.
    pub fn moved(&mut self, from: &Option<Cursor>, to: &Cursor) {
        // With nothing at hand, whoever stands between the two has missed nothing either.
        if self.start.is_none() {
            self.start = Some(from.as_ref().unwrap_or(to).clone());
        }
    }

    /// What was delivered that a reader here lacks; none when that is not all at hand.
    pub fn since(&self, cursor: &Cursor) -> Option<Vec<Arc<Batch>>> {
        let start = self.start.as_ref()?;
        if !cursor.is_at_or_after(start) {
            return None;
        }
        let is_missed = |batch: &Batch| batch.end().is_some_and(|end| !cursor.is_at_or_after(&end));
        let missed: Vec<&(Arc<Batch>, usize)> =
            self.batches.iter().filter(|(batch, _)| is_missed(batch)).collect();
        // Amid a page of another relay it has to come to the end of that first.
        if !missed.first()?.0.span.continues(cursor) {
            return None;
        }
        // More than a client should get in one go is read from the changelog, as fast as the client reads.
        let bytes: usize = missed.iter().map(|(_, bytes)| bytes).sum();
        (bytes <= MOST_AT_ONCE).then(|| missed.iter().map(|(batch, _)| Arc::clone(batch)).collect())
    }
}
