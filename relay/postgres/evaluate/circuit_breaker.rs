//! Keeps what took too long from being asked again at once, so that it holds up everybody else for a fraction of the time only.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A statement that took too long is not asked again for this many times the limit.
const BREAK: u32 = 10;

/// Statements that took too long, and until when they are not asked.
#[derive(Debug)]
pub(super) struct CircuitBreaker {
    limit: Duration,
    slow: Mutex<HashMap<Arc<str>, Instant>>,
}

impl CircuitBreaker {
    /// For statements with this time limit.
    pub fn new(limit: Duration) -> Self {
        Self { limit, slow: Mutex::default() }
    }

    /// Whether the statement took too long a short time ago.
    pub fn is_open(&self, statement: &str) -> bool {
        let mut slow = self.slow.lock().unwrap_or_else(PoisonError::into_inner);
        slow.retain(|_, until| *until > Instant::now());
        slow.contains_key(statement)
    }

    /// It took too long just now.
    pub fn open(&self, statement: &Arc<str>) {
        let mut slow = self.slow.lock().unwrap_or_else(PoisonError::into_inner);
        slow.entry(Arc::clone(statement)).or_insert_with(|| Instant::now() + self.limit * BREAK);
    }
}
