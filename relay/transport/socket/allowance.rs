//! What one client may send and have kept: rates of messages, joins and changes of presence, and memory for its channels.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::feed::deliver::memory_budget::{MemoryBudget, Reserved};
use crate::model::session::join::Join;
use crate::model::session::limits::Limits;
use crate::model::session::machine::Session;
use crate::model::session::rate_limit::RateLimit;

/// Maximum number of bytes kept for one client: topics, filters and tokens of all its channels.
const MAX_KEPT: usize = 1 << 20;
/// Number of these bytes that are not counted in the memory budget.
const UNCOUNTED: usize = 16 * 1024;

/// The rates of one client, and the memory reserved for its topics, filters and tokens.
pub struct Allowance {
    connected_at: Instant,
    rates: RateLimit,
    kept: Reserved,
}

impl Allowance {
    /// Creates the allowance of a client that connects now.
    pub fn new(limits: &Limits, budget: &Arc<MemoryBudget>) -> Self {
        Self { connected_at: Instant::now(), rates: RateLimit::new(limits), kept: budget.reserved() }
    }

    /// Counts a message. Returns false if it exceeds the rate.
    pub fn take_message(&mut self) -> bool {
        self.rates.messages.take(self.elapsed())
    }

    /// Counts a join. Returns false if it exceeds the rate.
    pub fn take_join(&mut self) -> bool {
        self.rates.joins.take(self.elapsed())
    }

    /// Counts a change of presence. Returns false if it exceeds the rate.
    pub fn take_presence(&mut self) -> bool {
        self.rates.presence.take(self.elapsed())
    }

    /// Reserves memory for a join. Returns false if there is no room.
    pub fn reserve(&mut self, session: &Session, join: &Join) -> bool {
        let bytes = session.bytes() + join.bytes;
        bytes <= MAX_KEPT && self.kept.resize(bytes.saturating_sub(UNCOUNTED))
    }

    /// Adjusts the reservation to what the session keeps now.
    pub fn update(&mut self, session: &Session) {
        self.kept.resize(session.bytes().saturating_sub(UNCOUNTED));
    }

    fn elapsed(&self) -> Duration {
        self.connected_at.elapsed()
    }
}
