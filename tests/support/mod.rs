//! A database of its own for each test, a relay in this process, and a plain Phoenix client.

pub mod away;
pub mod client;
pub mod commands;
pub mod database;
pub mod dice;
pub mod filters;
pub mod http;
pub mod issuer;
pub mod pooler;
pub mod program;
pub mod proxy;
pub mod relay;
pub mod script;
pub mod socket;
pub mod stage;
pub mod ways;

use std::time::Duration;

/// What every test waits at most for one fact: long, for only a fault or a very busy machine makes it wait so long.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The secret of all relays in tests.
pub const SECRET: &str = "a-secret-for-tests-with-at-least-32-bytes";

/// A user, as the `sub` of a token and the owner of a row.
pub const ANN: &str = "0a000000-0000-4000-8000-00000000000a";
/// Another user.
pub const BOB: &str = "0b000000-0000-4000-8000-00000000000b";

/// A token of this role and subject, good for an hour, with more claims.
pub fn token(role: &str, sub: Option<&str>, more: serde_json::Value) -> String {
    token_for(role, sub, more, Duration::from_secs(3600))
}

/// A token that ends after `ttl`.
pub fn token_for(role: &str, sub: Option<&str>, more: serde_json::Value, ttl: Duration) -> String {
    let mut claims = more.as_object().cloned().unwrap_or_default();
    claims.insert("role".into(), role.into());
    if let Some(sub) = sub {
        claims.insert("sub".into(), sub.into());
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    ::relay::auth::verifier::mint(SECRET, &claims, now, ttl).unwrap()
}

/// Waits until `fact` gives something, and says what was waited for when it never does.
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut fact: impl FnMut() -> F) -> T {
    let started = std::time::Instant::now();
    loop {
        if let Some(found) = fact().await {
            return found;
        }
        assert!(started.elapsed() < PATIENCE, "never came: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
