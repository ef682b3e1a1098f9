//! The pauses between tries to reach PostgreSQL: each about twice as long, no two relays at the same moment.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// What a pause grows from, and to.
#[derive(Debug)]
pub struct Backoff {
    first: Duration,
    most: Duration,
    next: Duration,
}

impl Backoff {
    /// Pauses from `first` on, which never exceed `most`.
    pub fn new(first: Duration, most: Duration) -> Self {
        Self { first, most, next: first }
    }

    /// The pause before the next try: between half of what is due and all of it, so that those whom one fault cut off
    /// do not come back together.
    pub fn pause(&mut self) -> Duration {
        let due = self.next;
        self.next = (due * 2).min(self.most);
        let dice = RandomState::new().hash_one(0) as u32;
        due.mul_f64(0.5 + f64::from(dice) / f64::from(u32::MAX) / 2.0)
    }

    /// Something has to be changed first: the next pauses are the longest.
    pub fn slow_down(&mut self) {
        self.next = self.most;
    }

    /// It worked: the next pause is the first again.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_most_and_differ() {
        let (first, most) = (Duration::from_millis(64), Duration::from_secs(1));
        let pauses = || {
            let mut backoff = Backoff::new(first, most);
            (0..8).map(|_| backoff.pause()).collect::<Vec<_>>()
        };
        let some = pauses();
        for (at, pause) in some.iter().enumerate() {
            let due = (first * (1 << at)).min(most);
            assert!(due / 2 <= *pause && *pause <= due, "{some:?}");
        }
        assert_ne!(some, pauses());
    }
}
