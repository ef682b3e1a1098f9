//! Published keys while the relay runs: new ones count, removed ones do not, and nothing that their place does harms.

use std::path::PathBuf;

use futures_util::future::join_all;
use relay::settings::Settings;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::time::timeout;

use crate::support::database::Database;
use crate::support::http::{Events, get};
use crate::support::issuer::{Behaviour, Issuer, jwks, signed, signed_as};
use crate::support::program::relay;
use crate::support::socket::Socket;
use crate::support::stage::Stage;
use crate::support::{PATIENCE, eventually, token};

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
    let text = stage.relay.metrics();
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
    let mut socket = Socket::open(&stage.relay, "2.0.0", &signed(1, "service_role")).await;
    file.write(&jwks(&[1, 2]));
    let bindings = json!([{"event": "*", "schema": "public", "table": "t"}]);
    let join = json!({"config": {"postgres_changes": bindings}, "access_token": signed(2, "service_role")});
    socket.push(json!("1"), json!("1"), "realtime:t", "phx_join", join).await;
    assert_eq!(socket.frame().await[4]["status"], "ok");
    assert_eq!(socket.frame().await[4]["message"], "Subscribed to PostgreSQL");
    // A client does not join again by itself where its new token was refused.
    file.write(&jwks(&[1, 2, 3]));
    let refreshed = json!({"access_token": signed(3, "service_role")});
    socket.push(json!("1"), json!("2"), "realtime:t", "access_token", refreshed).await;
    assert_eq!(socket.frame().await[4]["message"], "Subscribed to PostgreSQL");
    socket.is_quiet().await;
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

/// A relay that knows nothing but the keys of this issuer, changed further by `more`.
async fn with_issuer(issuer: &Issuer, more: impl FnOnce(&mut Settings)) -> Stage {
    Stage::with(TABLE, |settings, _| {
        settings.jwt_secret = None;
        settings.jwks = Some(issuer.url());
        settings.jwks_allow_private = true;
        settings.jwks_refresh_ms = Some(3_600_000);
        settings.jwks_cooldown_ms = Some(0);
        more(settings);
    })
    .await
}

/// Waits until this many keys are in force.
async fn have_keys(stage: &Stage, keys: u64) {
    eventually("the keys are there", || async { (count(stage, "relay_jwks_keys") == keys).then_some(()) })
        .await;
}

/// Waits until the keys can be read, or cannot.
async fn is_stale(stage: &Stage, stale: bool) {
    let is = || async { (count(stage, "relay_jwks_stale") == u64::from(stale)).then_some(()) };
    eventually(if stale { "the keys are stale" } else { "the keys are fresh" }, is).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_key_of_the_endpoint_counts_at_once_and_a_removed_one_no_more() {
    let issuer = Issuer::start(Behaviour::Text(jwks(&[1]))).await;
    let stage = with_issuer(&issuer, |_| {}).await;
    assert_eq!(refusal(&stage, &signed(1, "service_role")).await, None);
    issuer.publish(&[1, 2]);
    assert_eq!(refusal(&stage, &signed(2, "service_role")).await, None);
    issuer.publish(&[2, 3]);
    let headers = format!("authorization: Bearer {}\r\n", signed(3, "service_role"));
    assert_eq!(get(stage.relay.address, "/realtime/v1/changes?table=t", &headers).await.status, 200);
    assert_eq!(refusal(&stage, &signed(1, "service_role")).await.as_deref(), Some(SIGNER));
    assert_eq!(refusal(&stage, &signed(2, "service_role")).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_endpoint_is_asked_again_by_the_clock() {
    let issuer = Issuer::start(Behaviour::Text(jwks(&[1, 2]))).await;
    let stage = with_issuer(&issuer, |settings| settings.jwks_refresh_ms = Some(20)).await;
    have_keys(&stage, 2).await;
    issuer.publish(&[2]);
    have_keys(&stage, 1).await;
    assert_eq!(refusal(&stage, &signed(1, "service_role")).await.as_deref(), Some(SIGNER));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_unknown_keys_asks_the_endpoint_once_within_the_cooldown() {
    let issuer = Issuer::start(Behaviour::Text(jwks(&[1]))).await;
    let stage = with_issuer(&issuer, |settings| settings.jwks_cooldown_ms = Some(3_600_000)).await;
    have_keys(&stage, 1).await;
    assert_eq!(issuer.asked(), 1);
    for _ in 0..2 {
        let forged: Vec<_> =
            (0..50).map(|n| signed_as(3, &json!(format!("forged-{n}")), "service_role")).collect();
        let refusals = join_all(forged.iter().map(|token| refusal(&stage, token))).await;
        assert!(refusals.iter().all(|text| text.as_deref() == Some(SIGNER)), "{refusals:?}");
        assert_eq!(issuer.asked(), 2);
    }
    // A known key that signed badly is no unknown key.
    let bad = signed_as(3, &json!("key-1"), "service_role");
    assert_eq!(refusal(&stage, &bad).await.as_deref(), Some("Failed to validate JWT signature"));
    assert_eq!(refusal(&stage, &signed(1, "service_role")).await, None);
    assert_eq!(issuer.asked(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_endpoint_answers_with_something_else_the_keys_at_hand_count() {
    let elsewhere = Issuer::start(Behaviour::Text(jwks(&[3]))).await;
    let issuer = Issuer::start(Behaviour::Text(jwks(&[1]))).await;
    let stage = with_issuer(&issuer, |settings| settings.jwks_refresh_ms = Some(20)).await;
    have_keys(&stage, 1).await;
    for behaviour in [
        Behaviour::Status(500),
        Behaviour::Status(204),
        Behaviour::Text("<html>".to_owned()),
        Behaviour::Text("{}".to_owned()),
        Behaviour::Redirect(elsewhere.url()),
        Behaviour::Redirect("/elsewhere".to_owned()),
        Behaviour::Long,
    ] {
        issuer.behave(behaviour);
        is_stale(&stage, true).await;
        assert_eq!(refusal(&stage, &signed(1, "service_role")).await, None);
        assert_eq!(refusal(&stage, &signed(3, "service_role")).await.as_deref(), Some(SIGNER));
        issuer.publish(&[1]);
        is_stale(&stage, false).await;
    }
    assert_eq!(elsewhere.asked(), 0, "a redirect was followed");
    assert!(issuer.sent() > 0, "the long answer was not asked for");
    let address = issuer.address;
    drop(issuer);
    is_stale(&stage, true).await;
    assert_eq!(refusal(&stage, &signed(1, "service_role")).await, None);
    let _issuer = Issuer::at(address, Behaviour::Text(jwks(&[1, 2]))).await;
    have_keys(&stage, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_answer_is_not_read_to_its_end() {
    let issuer = Issuer::start(Behaviour::Long).await;
    let stage = with_issuer(&issuer, |_| {}).await;
    is_stale(&stage, true).await;
    // What the kernel's buffers hold has left, too.
    assert!(issuer.sent() < 50, "{} MiB of 100 were read", issuer.sent());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_hangs_times_out_and_delays_no_client_with_a_known_key() {
    let issuer = Issuer::start(Behaviour::Text(jwks(&[1]))).await;
    let stage = with_issuer(&issuer, |settings| settings.jwks_refresh_ms = Some(20)).await;
    have_keys(&stage, 1).await;
    for behaviour in [Behaviour::Silent, Behaviour::Drip] {
        issuer.behave(behaviour);
        let asked = issuer.asked();
        eventually("it hangs", || async { (issuer.asked() > asked).then_some(()) }).await;
        let (unknown, known) = (signed(3, "service_role"), signed(1, "service_role"));
        let waiting = refusal(&stage, &unknown);
        tokio::pin!(waiting);
        // While one client waits for an unknown key, others connect.
        tokio::select! {
            biased;
            early = &mut waiting => panic!("no answer is possible yet: {early:?}"),
            refused = refusal(&stage, &known) => assert_eq!(refused, None),
        }
        assert_eq!(waiting.await.as_deref(), Some(SIGNER));
        is_stale(&stage, true).await;
        issuer.publish(&[1]);
        is_stale(&stage, false).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_were_not_confirmed_for_too_long_are_no_longer_valid() {
    let issuer = Issuer::start(Behaviour::Text(jwks(&[1]))).await;
    let stage = with_issuer(&issuer, |settings| {
        settings.jwks_refresh_ms = Some(20);
        settings.jwks_keep_ms = Some(500);
    })
    .await;
    have_keys(&stage, 1).await;
    issuer.behave(Behaviour::Status(503));
    is_stale(&stage, true).await;
    have_keys(&stage, 0).await;
    assert_eq!(refusal(&stage, &signed(1, "service_role")).await.as_deref(), Some(SIGNER));
    issuer.publish(&[1]);
    have_keys(&stage, 1).await;
    assert_eq!(refusal(&stage, &signed(1, "service_role")).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_whose_endpoint_is_down_starts_and_refuses_until_keys_come() {
    let issuer = Issuer::start(Behaviour::Status(503)).await;
    let stage = with_issuer(&issuer, |settings| {
        settings.jwt_secret = Some(crate::support::SECRET.to_owned());
        settings.jwks_refresh_ms = Some(20);
    })
    .await;
    is_stale(&stage, true).await;
    assert_eq!(refusal(&stage, &signed(1, "service_role")).await.as_deref(), Some(SIGNER));
    assert_eq!(refusal(&stage, &token("service_role", None, json!({}))).await, None);
    issuer.publish(&[1]);
    is_stale(&stage, false).await;
    assert_eq!(refusal(&stage, &signed(1, "service_role")).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_address_is_not_asked_without_leave() {
    let issuer = Issuer::start(Behaviour::Text(jwks(&[1]))).await;
    let port = issuer.address.port();
    for url in [format!("https://127.0.0.1:{port}/"), format!("https://[::1]:{port}/"), issuer.url()] {
        let settings = Settings {
            database_url: Some(String::from("postgres://nowhere/")),
            jwks: Some(url.clone()),
            ..Settings::default()
        };
        let mistakes = settings.resolve().err().unwrap_or_else(|| panic!("{url} is allowed"));
        assert!(mistakes.to_string().contains("--jwks-allow-private"), "{mistakes}");
    }
    // A name shows only when it is resolved where it leads.
    let stage = with_issuer(&issuer, |settings| {
        settings.jwks = Some(format!("https://localhost:{port}/"));
        settings.jwks_allow_private = false;
    })
    .await;
    is_stale(&stage, true).await;
    assert_eq!(refusal(&stage, &signed(1, "service_role")).await.as_deref(), Some(SIGNER));
    assert_eq!(issuer.asked(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_withdrawn_key_ends_what_its_tokens_opened_at_once_and_nothing_else() {
    let issuer = Issuer::start(Behaviour::Text(jwks(&[1, 2]))).await;
    let stage = with_issuer(&issuer, |settings| settings.jwks_refresh_ms = Some(20)).await;
    have_keys(&stage, 2).await;
    let mut socket = Socket::open(&stage.relay, "2.0.0", &signed(2, "service_role")).await;
    let bindings = json!({"postgres_changes": [{"event": "*", "schema": "public", "table": "t"}]});
    for (topic, token) in [("realtime:one", Some(signed(1, "service_role"))), ("realtime:two", None)] {
        let join = json!({"config": bindings, "access_token": token});
        socket.push(json!("1"), json!("1"), topic, "phx_join", join).await;
        assert_eq!(socket.frame().await[4]["status"], "ok");
        assert_eq!(socket.frame().await[4]["message"], "Subscribed to PostgreSQL");
    }
    let path = |n| format!("/realtime/v1/changes?table=t&apikey={}", signed(n, "service_role"));
    let mut first = Events::open(stage.relay.address, &path(1), None).await;
    let mut second = Events::open(stage.relay.address, &path(2), None).await;
    let cursor = stage.database.value("select relay.cursor()").await;
    let address = stage.relay.address;
    let poll = tokio::spawn(async move { get(address, &format!("{}&since={cursor}", path(1)), "").await });
    let all = || async { (count(&stage, "relay_channels_open") == 5).then_some(()) };
    eventually("the poll waits, beside two channels and two streams", all).await;
    issuer.publish(&[2]);
    assert_eq!(socket.frame().await[4]["message"], SIGNER);
    let closed = socket.frame().await;
    assert_eq!((&closed[2], &closed[3]), (&json!("realtime:one"), &json!("phx_close")));
    let told = first.next().await.unwrap();
    // Not `error`, which an EventSource has for its own.
    let expected = json!({"error": "the token's key was withdrawn"});
    assert_eq!((told.name.as_str(), told.data), ("failure", expected));
    assert!(first.next().await.is_none());
    assert_eq!(poll.await.unwrap().status, 401);
    stage.run("insert into t values (1)").await;
    let change = socket.frame().await;
    assert_eq!((&change[2], &change[3]), (&json!("realtime:two"), &json!("postgres_changes")));
    assert_eq!(second.next().await.unwrap().name, "change");
    // What the socket was opened with is gone, too: what stands on it ends and does not come back.
    issuer.publish(&[1]);
    assert_eq!(socket.frame().await[4]["message"], SIGNER);
    assert_eq!(socket.frame().await[3], "phx_close");
    socket.join("2", "realtime:two", bindings).await;
    assert_eq!(socket.frame().await[4]["response"]["reason"], format!("JwtSignerError: {SIGNER}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_is_believed_by_its_certificate_and_its_failure_is_told_once() {
    let database = Database::new().await;
    let authority = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/tls/authority.pem");
    for (trusted, told) in [(Some(authority), "JWK set loaded"), (None, "JWK set not loaded")] {
        let issuer = Issuer::start_tls(Behaviour::Text(jwks(&[1]))).await;
        let url = format!("https://localhost:{}/jwks.json?canary", issuer.address.port());
        let mut program = relay(&["serve", "--listen", "127.0.0.1:0", "--database-url", &database.url]);
        program.args(["--jwks", &url, "--jwks-allow-private", "--jwks-refresh-ms", "20"]);
        let mut program = program.envs(trusted.map(|path| ("SSL_CERT_FILE", path))).spawn().unwrap();
        let mut said = BufReader::new(program.stderr.take().unwrap());
        let mut log = String::new();
        while !log.contains(told) {
            let read = timeout(PATIENCE, said.read_line(&mut log)).await;
            assert!(read.expect("nothing more is told").unwrap() > 0, "it ended: {log}");
        }
        let asked = issuer.asked();
        eventually("more tries", || async { (issuer.asked() > asked + 3).then_some(()) }).await;
        program.kill().await.unwrap();
        said.read_to_string(&mut log).await.unwrap();
        let told: Vec<&str> = log.lines().filter(|line| line.contains("JWK")).collect();
        assert_eq!(told.len(), 1, "{log}");
        assert_eq!(told[0].contains("invalid peer certificate: UnknownIssuer"), trusted.is_none(), "{log}");
        assert!(!log.contains("canary"), "{log}");
    }
}
