//! The state that all connections share, and the checks that every request needs.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hyper::header::{self, HeaderMap};
use serde_json::Value;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::auth::token::TokenError;
use crate::auth::verifier::{Verifier, now};
use crate::feed::authorize::topic_judge::TopicJudge;
use crate::feed::deliver::memory_budget::MemoryBudget;
use crate::feed::explain::explainer::Explainer;
use crate::feed::explain::inspection::Inspection;
use crate::feed::handle::Feed;
use crate::feed::read::stall::StallMonitor;
use crate::model::identity::claims::Claims;
use crate::model::session::limits::Limits;
use crate::observe::{Observe, Readings};
use crate::pubsub::topics::Topics;
use crate::status::service::StatusService;
use crate::transport::broadcast_rates::BroadcastRates;
use crate::transport::clients::{ClientKind, Clients};
use crate::transport::connection_limits::ConnectionLimits;
use crate::transport::upstream::Upstream;

/// The state that every connection shares.
pub struct App {
    /// Turns tokens and API keys into claims.
    pub verifier: Verifier,
    /// The handle to the feed.
    pub feed: Feed,
    /// Explains subscriptions to the service role.
    pub explainer: Explainer,
    /// Who is online.
    pub status: StatusService,
    /// The topics.
    pub topics: Arc<Topics>,
    /// Decides who may use which private channel.
    pub topic_judge: Arc<TopicJudge>,
    /// The rates of broadcasts over HTTP.
    pub broadcast_rates: BroadcastRates,
    /// What is measured.
    pub observe: Arc<Observe>,
    /// Tells whether the feed reads, and whether it is stalled.
    pub stall_monitor: Arc<StallMonitor>,
    /// Origins that browsers may connect from; empty means any.
    pub allowed_origins: Vec<String>,
    /// The server that gets requests for other paths.
    pub upstream: Option<Upstream>,
    /// The connected clients.
    pub clients: Arc<Clients>,
    /// What the inspector reads from the database.
    pub inspection: Inspection,
    /// The settings as the inspector shows them, without secrets.
    pub shown_settings: Value,
    /// Whether there is an admin port, which then has the inspector.
    pub has_admin_port: bool,
    /// When the relay was started.
    pub started: Instant,
    /// Limits on open connections.
    pub connection_limits: Arc<ConnectionLimits>,
    /// Limits on what clients may request and hold.
    pub limits: Limits,
    /// Memory budget for data queued for all clients together.
    pub budget: Arc<MemoryBudget>,
    /// How long a named session can be resumed after its client disconnected.
    pub resume: Duration,
    /// True once the database was reached and found to have the relay's schema. Never reset.
    pub prepared: AtomicBool,
    /// How long closing the sockets takes when the relay shuts down.
    pub drain: Duration,
    /// Cancelled when the relay begins to shut down.
    pub end: CancellationToken,
    /// The tasks of all sessions.
    pub sessions: TaskTracker,
    /// The number of the next session.
    pub numbers: AtomicU64,
}

impl App {
    /// Returns the reason why the relay is not ready for clients; `None` if it is ready.
    pub fn unready(&self) -> Option<&'static str> {
        if self.end.is_cancelled() {
            return Some("the relay is shutting down");
        }
        self.stall_monitor.unready()
    }

    /// Returns the text of `/metrics`.
    pub fn metrics(&self) -> String {
        self.observe.text(&Readings {
            clients: ClientKind::ALL.map(|kind| self.clients.count(kind)),
            sessions: self.connection_limits.client_count(),
            outbox_bytes: self.budget.held_bytes(),
            status_users: self.status.board.user_counts(),
            status_cache_bound: self.status.board.settings().cache,
            status_is_on: self.status.board.is_on(),
        })
    }

    /// Completes when a socket is to be closed because the relay shuts down: at a random time of [`Self::drain`], so that not all
    /// clients come to the other relays at once.
    pub async fn drained(&self) {
        self.end.cancelled().await;
        let random = RandomState::new().hash_one(0) as u32;
        // Boxed: every socket waits for this, and hardly ever for its second half.
        Box::pin(sleep(self.drain.mul_f64(f64::from(random) / f64::from(u32::MAX)))).await;
    }

    /// Returns a session number that was never used before in this process.
    pub fn next_session(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// Returns the claims of a token or API key. For a token signed by an unknown key, waits for a refresh of the JWK set.
    ///
    /// # Errors
    /// If the token or key is refused.
    pub async fn identify(&self, credential: &str) -> Result<Claims, TokenError> {
        match self.verifier.identify(credential, now()) {
            Err(TokenError::Signer) => {
                if let Some(refreshed) = self.verifier.refresh_for(credential) {
                    refreshed.await;
                }
                self.verifier.identify(credential, now())
            }
            outcome => outcome,
        }
    }
}

/// Whether a request's `Origin` is allowed. An empty list allows any. A request without `Origin` does not come from a browser
/// and is always allowed.
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
