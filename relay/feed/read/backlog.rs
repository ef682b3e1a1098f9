//! The bounded queue of feed items in front of a secondary router. Adding never waits; items that do not fit are
//! dropped and replayed from the changelog. A router without channels is not woken for changes: it takes over the
//! feed's position when it gets its first channel.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::feed::read::source::FeedItem;
use crate::model::log::cursor::Cursor;

/// Maximum bytes of queued changes. Most of them are shared with the main router.
const MAX_BYTES: usize = 8 << 20;
/// Minimum bytes counted per item.
const MIN_ITEM_BYTES: usize = 1 << 10;

/// Feed items queued for one router.
#[derive(Default)]
pub struct Backlog {
    // Never held across an await.
    waiting: Mutex<QueuedItems>,
    added: Notify,
}

#[derive(Default)]
struct QueuedItems {
    items: VecDeque<(FeedItem, usize)>,
    bytes: usize,
    /// The router has channels and must be woken.
    has_channels: bool,
}

impl Backlog {
    /// Adds an item; `position` is the feed's position before it. When the queue is full, all queued items are
    /// replaced by one [`FeedItem::Overflow`].
    pub fn add(&self, item: FeedItem, position: Option<&Cursor>) {
        let mut waiting = self.waiting();
        if !waiting.has_channels
            && let Some(end) = item.end_if_plain()
        {
            return waiting.skip_to(end);
        }
        let bytes = MIN_ITEM_BYTES + item.bytes();
        // A single item always fits.
        if waiting.bytes + bytes > MAX_BYTES
            && !waiting.items.is_empty()
            && let Some(position) = position
        {
            waiting.overflow(position.clone());
        }
        waiting.add(item, bytes);
        drop(waiting);
        self.added.notify_one();
    }

    /// Waits for the next item. Cancel safe. Only one task may wait at a time.
    pub async fn next(&self) -> FeedItem {
        loop {
            if let Some(item) = self.take() {
                return item;
            }
            self.added.notified().await;
        }
    }

    /// Wakes the router for every item from now on, because it is about to get a channel. Returns the position that
    /// the feed reached meanwhile.
    pub fn resume(&self) -> Option<FeedItem> {
        let mut waiting = self.waiting();
        waiting.has_channels = true;
        let is_skipped = matches!(waiting.items.front(), Some((FeedItem::Skipped(_), _)));
        if is_skipped { waiting.take() } else { None }
    }

    /// Stops waking the router for changes: its last channel is gone.
    pub fn pause(&self) {
        self.waiting().has_channels = false;
    }

    fn take(&self) -> Option<FeedItem> {
        self.waiting().take()
    }

    fn waiting(&self) -> MutexGuard<'_, QueuedItems> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl QueuedItems {
    fn take(&mut self) -> Option<FeedItem> {
        let (item, bytes) = self.items.pop_front()?;
        self.bytes -= bytes;
        Some(item)
    }

    /// Keeps a queued gap as a gap. Without one, the dropped changes can be read from the changelog.
    fn overflow(&mut self, position: Cursor) {
        let gap = self.items.iter().rev().find_map(|(item, _)| match item {
            FeedItem::Gap(why) => Some(why.clone()),
            _ => None,
        });
        self.items.clear();
        self.bytes = 0;
        if let Some(why) = gap {
            self.add(FeedItem::Gap(why), MIN_ITEM_BYTES);
            self.add(FeedItem::Moved(position), MIN_ITEM_BYTES);
        } else {
            self.add(FeedItem::Overflow(position), MIN_ITEM_BYTES);
        }
    }

    fn skip_to(&mut self, end: Cursor) {
        match self.items.back_mut() {
            Some((FeedItem::Skipped(last), _)) => *last = end,
            _ => self.add(FeedItem::Skipped(end), MIN_ITEM_BYTES),
        }
    }

    fn add(&mut self, item: FeedItem, bytes: usize) {
        self.items.push_back((item, bytes));
        self.bytes += bytes;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;
    use crate::feed::read::batch::tests::batch;

    #[tokio::test]
    async fn an_overflow_drops_queued_changes_and_keeps_later_ones() {
        let backlog = Backlog::default();
        assert!(backlog.resume().is_none());
        let position = batch(1, 100).end();
        for number in 0..20 {
            backlog.add(FeedItem::Changes(batch(number, 1 << 20)), position.as_ref());
        }
        let mut received = Vec::new();
        while let Some(item) = backlog.take() {
            received.push(name(&item));
        }
        assert_eq!(received, ["overflow", "14", "15", "16", "17", "18", "19"]);
    }

    #[tokio::test]
    async fn a_router_without_channels_is_not_woken_and_gets_the_position_before_its_first_channel() {
        let backlog = Backlog::default();
        for number in 0..3 {
            backlog.add(FeedItem::Changes(batch(number, 100)), None);
        }
        assert!(timeout(Duration::ZERO, backlog.added.notified()).await.is_err(), "nothing to wake it for");
        let Some(FeedItem::Skipped(end)) = backlog.resume() else { panic!("the position is missing") };
        assert_eq!(Some(end), batch(2, 100).end());
        backlog.add(FeedItem::Changes(batch(3, 100)), None);
        assert_eq!(name(&backlog.next().await), "3");
        backlog.pause();
        backlog.add(FeedItem::Gap(String::from("why")), None);
        assert_eq!(name(&backlog.next().await), "gap", "gaps count for later channels, too");
    }

    fn name(item: &FeedItem) -> String {
        match item {
            FeedItem::Changes(batch) => format!("{}", batch.changes[0].number),
            FeedItem::Gap(_) => String::from("gap"),
            FeedItem::Moved(_) => String::from("moved"),
            FeedItem::Skipped(_) => String::from("skipped"),
            FeedItem::Overflow(_) => String::from("overflow"),
            FeedItem::Rest { .. } => String::from("rest"),
        }
    }
}
