//! The bounded queue of feed items in front of a secondary router. Adding never waits; items that do not fit are
//! dropped and replayed from the changelog. A router without channels is not woken for changes: it takes over the
//! feed's position when it gets its first channel.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::feed::read::source::FeedItem;
use crate::model::log::cursor::Cursor;

/// Maximum bytes of queued changes. Most of them are shared with the main router.
const MOST_BYTES: usize = 8 << 20;
/// Minimum bytes counted per item.
const LEAST: usize = 1 << 10;

/// Feed items queued for one router.
#[derive(Default)]
pub struct Backlog {
    // Never held across an await.
    waiting: Mutex<Waiting>,
    news: Notify,
}

#[derive(Default)]
struct Waiting {
    parts: VecDeque<(FeedItem, usize)>,
    bytes: usize,
    /// The router has channels and must be woken.
    is_heard: bool,
}

impl Backlog {
    /// Adds an item; `position` is the feed's position before it. When the queue is full, all queued items are
    /// replaced by one [`FeedItem::Overflow`].
    pub fn add(&self, part: FeedItem, here: Option<&Cursor>) {
        let mut waiting = self.waiting();
        if !waiting.is_heard
            && let Some(end) = part.end_if_plain()
        {
            return waiting.skip_to(end);
        }
        let bytes = LEAST + part.bytes();
        // A single item always fits.
        if waiting.bytes + bytes > MOST_BYTES
            && !waiting.parts.is_empty()
            && let Some(here) = here
        {
            waiting.give_way(here.clone());
        }
        waiting.add(part, bytes);
        drop(waiting);
        self.news.notify_one();
    }

    /// Waits for the next item. Cancel safe. Only one task may wait at a time.
    pub async fn next(&self) -> FeedItem {
        loop {
            if let Some(part) = self.take() {
                return part;
            }
            self.news.notified().await;
        }
    }

    /// Wakes the router for every item from now on, because it is about to get a channel. Returns the position that
    /// the feed reached meanwhile.
    pub fn listen(&self) -> Option<FeedItem> {
        let mut waiting = self.waiting();
        waiting.is_heard = true;
        let is_skipped = matches!(waiting.parts.front(), Some((FeedItem::Skipped(_), _)));
        if is_skipped { waiting.take() } else { None }
    }

    /// Stops waking the router for changes: its last channel is gone.
    pub fn rest(&self) {
        self.waiting().is_heard = false;
    }

    fn take(&self) -> Option<FeedItem> {
        self.waiting().take()
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn take(&mut self) -> Option<FeedItem> {
        let (part, bytes) = self.parts.pop_front()?;
        self.bytes -= bytes;
        Some(part)
    }

    /// Keeps a queued gap as a gap. Without one, the dropped changes can be read from the changelog.
    fn give_way(&mut self, here: Cursor) {
        let gap = self.parts.iter().rev().find_map(|(part, _)| match part {
            FeedItem::Gap(why) => Some(why.clone()),
            _ => None,
        });
        self.parts.clear();
        self.bytes = 0;
        if let Some(why) = gap {
            self.add(FeedItem::Gap(why), LEAST);
            self.add(FeedItem::Quiet(here), LEAST);
        } else {
            self.add(FeedItem::TooMuch(here), LEAST);
        }
    }

    fn skip_to(&mut self, end: Cursor) {
        match self.parts.back_mut() {
            Some((FeedItem::Skipped(last), _)) => *last = end,
            _ => self.add(FeedItem::Skipped(end), LEAST),
        }
    }

    fn add(&mut self, part: FeedItem, bytes: usize) {
        self.parts.push_back((part, bytes));
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
    async fn what_waits_too_long_is_left_to_the_changelog_and_what_comes_after_it_is_there() {
        let backlog = Backlog::default();
        assert!(backlog.listen().is_none());
        let here = batch(1, 100).end();
        for number in 0..20 {
            backlog.add(FeedItem::Changes(batch(number, 1 << 20)), here.as_ref());
        }
        let mut told = Vec::new();
        while let Some(part) = backlog.take() {
            told.push(name(&part));
        }
        assert_eq!(told, ["too much", "14", "15", "16", "17", "18", "19"]);
    }

    #[tokio::test]
    async fn a_router_without_channels_is_not_woken_and_learns_where_the_feed_is_before_its_first_channel() {
        let backlog = Backlog::default();
        for number in 0..3 {
            backlog.add(FeedItem::Changes(batch(number, 100)), None);
        }
        assert!(timeout(Duration::ZERO, backlog.news.notified()).await.is_err(), "nothing to wake it for");
        let Some(FeedItem::Skipped(end)) = backlog.listen() else {
            panic!("it is not told where the feed is")
        };
        assert_eq!(Some(end), batch(2, 100).end());
        backlog.add(FeedItem::Changes(batch(3, 100)), None);
        assert_eq!(name(&backlog.next().await), "3");
        backlog.rest();
        backlog.add(FeedItem::Gap(String::from("why")), None);
        assert_eq!(name(&backlog.next().await), "gap", "what counts for later channels, too");
    }

    fn name(part: &FeedItem) -> String {
        match part {
            FeedItem::Changes(batch) => format!("{}", batch.changes[0].number),
            FeedItem::Gap(_) => String::from("gap"),
            FeedItem::Quiet(_) => String::from("here"),
            FeedItem::Skipped(_) => String::from("skipped"),
            FeedItem::TooMuch(_) => String::from("too much"),
            FeedItem::Rest { .. } => String::from("rest"),
        }
    }
}
