//! Skips statements that timed out recently, so that a slow one delays the others only for a fraction of the time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a statement that timed out is skipped, as a multiple of the time limit.
const BREAK: u32 = 10;

/// Statements that timed out, each with the time until which it is skipped.
#[derive(Debug)]
pub(super) struct CircuitBreaker {
    limit: Duration,
    slow: Mutex<HashMap<Arc<str>, Instant>>,
}

impl CircuitBreaker {
    /// Creates a breaker for statements with this time limit.
    pub fn new(limit: Duration) -> Self {
        Self { limit, slow: Mutex::default() }
    }

    /// Whether the statement is skipped now.
    pub fn is_open(&self, statement: &str) -> bool {
        let mut slow = self.slow.lock().unwrap_or_else(PoisonError::into_inner);
        slow.retain(|_, until| *until > Instant::now());
        slow.contains_key(statement)
    }

    /// Records a timeout of the statement.
    pub fn open(&self, statement: &Arc<str>) {
        let mut slow = self.slow.lock().unwrap_or_else(PoisonError::into_inner);
        slow.entry(Arc::clone(statement)).or_insert_with(|| Instant::now() + self.limit * BREAK);
    }
}
