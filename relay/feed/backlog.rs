//! The bounded queue of parts in front of a router that may be slow. Adding never waits; an overflow becomes a gap.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

use crate::feed::source::Part;
use crate::model::cursor::Cursor;

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
    parts: VecDeque<(Part, usize)>,
    bytes: usize,
}

impl Backlog {
    /// Adds a part, before which everything up to `here` was added. When too much waits, all of that gives way to a gap.
    pub fn add(&self, part: Part, here: Option<&Cursor>) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = LEAST + part.bytes();
        // One part fits always.
        if waiting.bytes + bytes > MOST_BYTES && !waiting.parts.is_empty() {
            waiting.parts.clear();
            waiting.bytes = 0;
            waiting.add(Part::Gap(String::from(TOO_SLOW)), LEAST);
            if let Some(here) = here {
                waiting.add(Part::Quiet(here.clone()), LEAST);
            }
        }
        waiting.add(part, bytes);
        drop(waiting);
        self.news.notify_one();
    }

    /// The next part, as soon as there is one. Cancel safe. Only one task may wait at a time.
    pub async fn next(&self) -> Part {
        loop {
            if let Some(part) = self.take() {
                return part;
            }
            self.news.notified().await;
        }
    }

    fn take(&self) -> Option<Part> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let (part, bytes) = waiting.parts.pop_front()?;
        waiting.bytes -= bytes;
        Some(part)
    }
}

impl Waiting {
    fn add(&mut self, part: Part, bytes: usize) {
        self.parts.push_back((part, bytes));
        self.bytes += bytes;
    }
}

const TOO_SLOW: &str = "changes came faster than these filters can be decided, read the rows again";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::feed::stretch::tests::stretch;

    #[tokio::test]
    async fn what_waits_too_long_gives_way_to_one_gap_and_what_comes_after_it_is_there() {
        let backlog = Backlog::default();
        let here = stretch(1, 100).end();
        for number in 0..20 {
            backlog.add(Part::Changes(stretch(number, 1 << 20)), here.as_ref());
        }
        let mut told = Vec::new();
        while let Some(part) = backlog.take() {
            told.push(match part {
                Part::Changes(stretch) => format!("{}", stretch.changes[0].number),
                Part::Gap(_) => String::from("gap"),
                Part::Quiet(_) => String::from("here"),
                Part::Rest { .. } => String::from("rest"),
            });
        }
        assert_eq!(told, ["gap", "here", "14", "15", "16", "17", "18", "19"]);
    }
}
