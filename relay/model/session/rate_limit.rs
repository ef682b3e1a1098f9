//! Rate limits of one client: an average rate with bursts, as the Supabase server counts it.

use std::time::Duration;

use crate::model::session::limits::Limits;

/// The period of the average in seconds, which is also the largest burst.
const PERIOD: f64 = 60.0;

/// A token bucket.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    per_second: f64,
    left: f64,
    filled: Duration,
}

/// The rate limits of one client.
#[derive(Debug, Clone)]
pub struct RateLimit {
    /// Messages from the client.
    pub messages: TokenBucket,
    /// Joins of channels.
    pub joins: TokenBucket,
    /// Changes of its presence.
    pub presence: TokenBucket,
}

impl RateLimit {
    /// Creates the limits of a new client, with full buckets.
    pub fn new(limits: &Limits) -> Self {
        Self {
            messages: TokenBucket::new(limits.messages_per_second),
            joins: TokenBucket::new(limits.joins_per_second),
            presence: TokenBucket::new(limits.presence_per_second),
        }
    }
}

impl TokenBucket {
    /// Creates a full bucket that holds the tokens of one period.
    pub fn new(per_second: u32) -> Self {
        let per_second = f64::from(per_second);
        Self { per_second, left: per_second * PERIOD, filled: Duration::ZERO }
    }

    /// Takes a token at time `at`, measured from any fixed moment. Returns false if there is none.
    pub fn take(&mut self, at: Duration) -> bool {
        self.take_all(1, at)
    }

    /// Takes `count` tokens, or none and returns false if there are fewer.
    pub fn take_all(&mut self, count: usize, at: Duration) -> bool {
        self.fill(at);
        let are_left = self.left >= count as f64;
        if are_left {
            self.left -= count as f64;
        }
        are_left
    }

    /// Whether nothing was taken for a period.
    pub fn is_full(&mut self, at: Duration) -> bool {
        self.fill(at);
        self.left >= self.per_second * PERIOD
    }

    /// Returns the number of tokens of a full bucket.
    pub fn capacity(per_second: u32) -> usize {
        (f64::from(per_second) * PERIOD) as usize
    }

    fn fill(&mut self, at: Duration) {
        let passed = at.saturating_sub(self.filled).as_secs_f64();
        self.filled = self.filled.max(at);
        self.left = (self.left + passed * self.per_second).min(self.per_second * PERIOD);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_of_one_period_passes_and_then_the_rate() {
        let mut bucket = TokenBucket::new(2);
        let mut taken = |seconds: f64, tries: usize| {
            let at = Duration::from_secs_f64(seconds);
            (0..tries).filter(|_| bucket.take(at)).count()
        };
        assert_eq!(taken(1.0, 500), 120);
        assert_eq!(taken(1.4, 5), 0);
        assert_eq!(taken(1.5, 5), 1, "it fills while it is empty, and loses nothing by being asked");
        assert_eq!(taken(4.0, 50), 5);
        assert_eq!(taken(3.0, 5), 0, "time never runs backwards");
        assert_eq!(taken(10_000.0, 500), 120, "it holds no more than a minute's worth");
    }

    #[test]
    fn a_steady_client_at_the_rate_is_never_refused() {
        let mut bucket = TokenBucket::new(100);
        assert!((0..100_000).all(|number| bucket.take(Duration::from_millis(10) * number)));
    }
}
