//! Published keys while the relay runs: new ones count, removed ones do not, and nothing that their place does harms.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::issuer::{jwks, signed};
use crate::support::socket::Socket;
use crate::support::stage::Stage;

const TABLE: &str =
    "create table t (id int primary key); grant select on t to service_role; select relay.watch('t')";
const SIGNER: &str = "Failed to generate JWT signer, check your JWT secret or JWKS configuration";

/// With which text the handshake is refused, if it is.
async fn refusal(stage: &Stage, token: &str) -> Option<String> {
    let path = format!("/realtime/v1/websocket?apikey={token}&vsn=2.0.0");
    let (status, body) = Socket::handshake(&stage.relay, &path, &[]).await.err()?;
    assert_eq!(status, 401, "{body}");
    let body: Value = serde_json::from_str(&body).unwrap();
    Some(body["error"].as_str().unwrap().to_owned())
}

/// What the relay counts under this name.
fn count(stage: &Stage, name: &str) -> u64 {
    let text = stage.relay.observe.text();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("{name} is not in {text}")).parse().unwrap()
}

/// A file that is gone with the test.
struct Temporary(PathBuf);

impl Temporary {
    fn new(name: &str, text: &str) -> Self {
        let path = std::env::temp_dir().join(format!("relay-{name}-{}", std::process::id()));
        std::fs::write(&path, text).unwrap();
        Self(path)
    }

    fn write(&self, text: &str) {
        std::fs::write(&self.0, text).unwrap();
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A relay that knows nothing but the keys of this file.
async fn with_file(file: &Temporary, refresh_ms: u64) -> Stage {
    Stage::with(TABLE, |settings, _| {
        settings.jwt_secret = None;
        settings.jwks = Some(file.0.to_str().unwrap().to_owned());
        settings.jwks_refresh_ms = Some(refresh_ms);
        settings.jwks_cooldown_ms = Some(0);
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_written_into_the_file_counts_and_one_taken_out_does_not() {
    let file = Temporary::new("rewritten", &jwks(&[1]));
    let stage = with_file(&file, 50).await;
    assert_eq!(refusal(&stage, &signed(1, "service_role")).await, None);
    assert_eq!(refusal(&stage, &signed(2, "service_role")).await.as_deref(), Some(SIGNER));
    file.write(&jwks(&[2]));
    eventually("the key that was taken out is refused", || async {
        refusal(&stage, &signed(1, "service_role")).await.filter(|text| text == SIGNER)
    })
    .await;
    assert_eq!(refusal(&stage, &signed(2, "service_role")).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_a_new_key_has_the_file_read_at_once() {
    let file = Temporary::new("asked", &jwks(&[1]));
    let stage = with_file(&file, 3_600_000).await;
    file.write(&jwks(&[1, 2]));
    assert_eq!(refusal(&stage, &signed(2, "service_role")).await, None);
    // On a socket that is open, too: no join and no new token is refused for a key that is published.
    file.write(&jwks(&[1, 2, 3]));
    let mut socket = Socket::open(&stage.relay, "2.0.0", &signed(1, "service_role")).await;
    let bindings = json!([{"event": "*", "schema": "public", "table": "t"}]);
    let join = json!({"config": {"postgres_changes": bindings}, "access_token": signed(3, "service_role")});
    socket.push(json!("1"), json!("1"), "realtime:t", "phx_join", join).await;
    assert_eq!(socket.frame().await[4]["status"], "ok");
    assert_eq!(socket.frame().await[4]["message"], "Subscribed to PostgreSQL");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_file_leaves_the_keys_at_hand_in_force() {
    let file = Temporary::new("broken", &jwks(&[1]));
    let stage = with_file(&file, 20).await;
    for broken in ["{\"keys\": [", "", "[]"] {
        file.write(broken);
        eventually("it is noticed", || async { (count(&stage, "relay_jwks_stale") == 1).then_some(()) })
            .await;
        assert_eq!(refusal(&stage, &signed(1, "service_role")).await, None);
        file.write(&jwks(&[1]));
        eventually("it is whole again", || async { (count(&stage, "relay_jwks_stale") == 0).then_some(()) })
            .await;
    }
    std::fs::remove_file(&file.0).unwrap();
    eventually("it is missed", || async { (count(&stage, "relay_jwks_stale") == 1).then_some(()) }).await;
    assert_eq!(refusal(&stage, &signed(1, "service_role")).await, None);
    assert_eq!(count(&stage, "relay_jwks_keys"), 1);
}
