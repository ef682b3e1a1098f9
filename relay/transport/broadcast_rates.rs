//! How many broadcasts each identity may send over HTTP.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::model::session::rate_limit::TokenBucket;

/// Number of identities above which those that have sent nothing for a minute are forgotten.
const MAX_REMEMBERED: usize = 10_000;

/// The rates of all identities.
pub struct BroadcastRates {
    per_second: u32,
    started: Instant,
    hasher: RandomState,
    buckets: Mutex<HashMap<u64, TokenBucket>>,
}

impl BroadcastRates {
    /// Creates rates of `per_second` broadcasts for each identity, on average over a minute.
    pub fn new(per_second: u32) -> Self {
        Self { per_second, started: Instant::now(), hasher: RandomState::new(), buckets: Mutex::default() }
    }

    /// Returns the number of broadcasts per second.
    pub fn per_second(&self) -> u32 {
        self.per_second
    }

    /// Counts `count` broadcasts of an identity. Returns false, and counts none, if they are too many.
    pub fn take(&self, identity: impl Hash, count: usize) -> bool {
        let at = self.started.elapsed();
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() > MAX_REMEMBERED {
            buckets.retain(|_, bucket| !bucket.is_full(at));
        }
        let bucket = buckets.entry(self.hasher.hash_one(identity));
        bucket.or_insert_with(|| TokenBucket::new(self.per_second)).take_all(count, at)
    }

    /// Whether so many broadcasts are never allowed at once.
    pub fn is_never_allowed(&self, count: usize) -> bool {
        count > TokenBucket::capacity(self.per_second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_identity_has_its_own_rate_and_a_refused_batch_counts_nothing() {
        let rates = BroadcastRates::new(1);
        assert!(rates.take("ann", 50) && !rates.take("ann", 20) && rates.take("ann", 10));
        assert!(!rates.take("ann", 1) && rates.take("ben", 60));
        assert!(rates.is_never_allowed(61) && !rates.is_never_allowed(60));
    }
}
