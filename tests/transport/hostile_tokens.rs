//! A channel whose token changes at the worst moment: told everything, or told that something is missing.

use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::stage::Stage;
use crate::support::{ANN, token};

async fn until(time: Duration) {
    tokio::time::sleep(time.saturating_sub(now())).await;
}

fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_between_two_tokens_is_told_to_be_missing() {
    let stage = Stage::new(
        "create table t (id int primary key); grant select on t to authenticated; select relay.watch('t')",
    )
    .await;
    let bindings = json!([{"event": "*", "schema": "public", "table": "t"}]);
    let mut beside = stage.join(&token("authenticated", Some(ANN), json!({}))).await;
    // Channels of ended tokens are closed a part of a second later, the same in which this one joined.
    let second = Duration::from_secs(now().as_secs() + 1);
    until(second + Duration::from_millis(800)).await;
    let short =
        token("authenticated", Some(ANN), json!({"exp": (second + Duration::from_secs(2)).as_secs()}));
    let mut client = Client::connect(&stage.relay, &short).await;
    client.subscribe("realtime:t", bindings).await;
    until(second + Duration::from_millis(2050)).await;
    stage.run("insert into t values (1)").await;
    assert_eq!(beside.change().await["record"]["id"], 1, "it was delivered to others");
    let fresh = token("authenticated", Some(ANN), json!({"n": 1}));
    client.push(Some("1"), "realtime:t", "access_token", json!({"access_token": fresh})).await;
    // Whatever comes of it, the client can tell.
    let frame: Value = loop {
        let frame = client.frame().await;
        if frame[3] == "system" && frame[4]["message"] == "Subscribed to PostgreSQL" {
            stage.run("insert into t values (2)").await;
            continue;
        }
        break frame;
    };
    let is_told =
        frame[4]["status"] == "error" || frame[4]["data"]["record"]["id"] == 1 || frame[3] == "phx_close";
    assert!(is_told, "{frame}");
}
