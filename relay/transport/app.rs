//! What all connections share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use hyper::header::{self, HeaderMap};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::auth::verifier::now;
use crate::auth::verifier::{TokenError, Verifier};
use crate::feed::deliver::memory_budget::MemoryBudget;
use crate::feed::handle::Feed;
use crate::feed::read::stall::{StallCause, StallMonitor};
use crate::model::identity::claims::Claims;
use crate::model::session::limits::Limits;
use crate::observe::Observe;
use crate::transport::connection_limits::ConnectionLimits;

/// What every connection needs.
pub struct App {
    /// Who somebody is.
    pub verifier: Verifier,
    /// The way into the feed.
    pub feed: Feed,
    /// What is counted.
    pub observe: Arc<Observe>,
    /// Whether the feed goes on.
    pub stall_monitor: Arc<StallMonitor>,
    /// Origins that browsers may connect from; empty means any.
    pub allowed_origins: Vec<String>,
    /// Who may connect.
    pub connection_limits: Arc<ConnectionLimits>,
    /// What clients may ask for and hold.
    pub limits: Limits,
    /// What may wait for all of them together.
    pub budget: Arc<MemoryBudget>,
    /// How long a client that named its session may be away.
    pub resume: Duration,
    /// The database is reached and has the relay's schema, or once was and had.
    pub prepared: Arc<AtomicBool>,
    /// The end of the relay.
    pub end: CancellationToken,
    /// Every session's task.
    pub sessions: TaskTracker,
    /// The number of the next session.
    pub numbers: AtomicU64,
}

impl App {
    /// Why clients should not be sent here, if they should not.
    pub fn unready(&self) -> Option<&'static str> {
        match (self.stall_monitor.why_cut_off(), self.stall_monitor.stalled()) {
            (Some(why), _) => Some(why),
            (None, Some(StallCause::Changelog)) => Some("the changelog could not be read for too long"),
            (None, Some(StallCause::Judgement)) => Some("policies could not be judged for too long"),
            (None, None) if self.observe.is_ready() => None,
            (None, None) => Some("the changelog is not being read"),
        }
    }

    /// A number that no session had before.
    pub fn next_session(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// Claims for what a client connects with. A token of an unknown key waits for the keys to be read anew.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn identify(&self, key: &str) -> Result<Claims, TokenError> {
        match self.verifier.identify(key, now()) {
            Err(TokenError::Signer) => {
                if let Some(refreshed) = self.verifier.refresh_for(key) {
                    refreshed.await;
                }
                self.verifier.identify(key, now())
            }
            outcome => outcome,
        }
    }
}

/// Without a list any origin may connect; with one, a browser's must be on it. Others send no origin.
pub fn origin_is_allowed(allowed: &[String], headers: &HeaderMap) -> bool {
    match headers.get(header::ORIGIN) {
        None => true,
        Some(_) if allowed.is_empty() => true,
        Some(origin) => {
            origin.to_str().is_ok_and(|origin| allowed.iter().any(|one| one.eq_ignore_ascii_case(origin)))
        }
    }
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    #[test]
    fn origins_count_only_against_a_list() {
        let mut headers = HeaderMap::new();
        let list = [String::from("https://app.example")];
        assert!(origin_is_allowed(&list, &headers));
        headers.insert(header::ORIGIN, HeaderValue::from_static("https://evil.example"));
        assert!(origin_is_allowed(&[], &headers));
        assert!(!origin_is_allowed(&list, &headers));
        headers.insert(header::ORIGIN, HeaderValue::from_static("https://APP.example"));
        assert!(origin_is_allowed(&list, &headers));
    }
}
