//! Pauses between attempts to reach PostgreSQL: exponential backoff with jitter.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// Bounds and state of the backoff.
#[derive(Debug)]
pub struct Backoff {
    first: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    /// Creates a backoff that starts at `first` and never exceeds `max`.
    pub fn new(first: Duration, max: Duration) -> Self {
        Self { first, max, next: first }
    }

    /// Returns the pause before the next attempt: a random part, at least half, of the full pause. The jitter keeps relays
    /// that failed together from returning together.
    pub fn pause(&mut self) -> Duration {
        let full = self.next;
        self.next = (full * 2).min(self.max);
        jittered(full)
    }

    /// Makes the next pauses the longest: for errors that need a change at the database first.
    pub fn slow_down(&mut self) {
        self.next = self.max;
    }

    /// Starts again at the first pause, after a success.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

/// Returns a random part of a pause, at least half of it.
pub fn jittered(full: Duration) -> Duration {
    let random = RandomState::new().hash_one(0) as u32;
    full.mul_f64(0.5 + f64::from(random) / f64::from(u32::MAX) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_maximum_and_differ() {
        let (first, max) = (Duration::from_millis(64), Duration::from_secs(1));
        let pauses = || {
            let mut backoff = Backoff::new(first, max);
            (0..8).map(|_| backoff.pause()).collect::<Vec<_>>()
        };
        let sequence = pauses();
        for (index, pause) in sequence.iter().enumerate() {
            let full = (first * (1 << index)).min(max);
            assert!(full / 2 <= *pause && *pause <= full, "{sequence:?}");
        }
        assert_ne!(sequence, pauses());
    }
}
