//! The bounded queue of parts in front of a router that may be slow. Adding never waits; what does not fit is left to be read
//! from the changelog. A router without channels is not woken for changes: it learns where the feed is when it gets a channel.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::feed::read::source::FeedItem;
use crate::model::log::cursor::Cursor;

/// So much may wait: bytes of changes, of which most are shared with those who were told already.
const MOST_BYTES: usize = 8 << 20;
/// A part counts at least so much.
const LEAST: usize = 1 << 10;

/// Parts on their way to a router that may be slow.
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
    /// The router has channels.
    is_heard: bool,
}

impl Backlog {
    /// Adds a part, before which everything up to `here` was added. When too much waits, all of that gives way to a part that
    /// says so.
    pub fn add(&self, part: FeedItem, here: Option<&Cursor>) {
        let mut waiting = self.waiting();
        if !waiting.is_heard
            && let Some(end) = part.end_if_plain()
        {
            return waiting.skip_to(end);
        }
        let bytes = LEAST + part.bytes();
        // One part fits always.
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

    /// The next part, as soon as there is one. Cancel safe. Only one task may wait at a time.
    pub async fn next(&self) -> FeedItem {
        loop {
            if let Some(part) = self.take() {
                return part;
            }
            self.news.notified().await;
        }
    }

    /// From now on the router is woken for every part: it is about to get a channel. Returns how far the feed came meanwhile.
    pub fn listen(&self) -> Option<FeedItem> {
        let mut waiting = self.waiting();
        waiting.is_heard = true;
        let is_skipped = matches!(waiting.parts.front(), Some((FeedItem::Skipped(_), _)));
        if is_skipped { waiting.take() } else { None }
    }

    /// The router has no channel any more.
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

    /// What was a gap already stays one; without one, the changelog has what is left out here.
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
