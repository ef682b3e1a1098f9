//! Channels that are with a convoy are left as all others.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::client::Client;
use crate::support::http::{stalled, text};
use crate::support::relay::Relay;
use crate::support::stage::Stage;
use crate::support::{eventually, token};

const MANY: i64 = 40_000;

fn reader() -> String {
    token("authenticated", None, json!({}))
}

async fn join(relay: &Relay, table: &str) -> Client {
    let mut client = Client::connect(relay, &reader()).await;
    client
        .subscribe(&format!("realtime:{table}"), json!([{"event": "*", "schema": "public", "table": table}]))
        .await;
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn a_channel_is_left_at_once_while_its_convoy_waits_for_others() {
    let stage = Stage::with(
        "create table a (id int primary key); create table b (id int primary key); create table c (id int primary key);
         grant select on a, b, c to authenticated; select relay.watch('a'), relay.watch('b'), relay.watch('c')",
        |settings, _| settings.outbox_bytes = Some(8 << 20),
    )
    .await;
    let mut client = join(&stage.relay, "c").await;
    let mut others = Vec::new();
    for table in ["a", "b"] {
        others.push(stalled(stage.relay.address, &reader(), &format!("realtime:{table}"), table).await);
    }
    eventually("all are subscribed", || async {
        text(stage.relay.address, "/metrics").await.1.contains("relay_channels_open 3\n").then_some(())
    })
    .await;
    for table in ["a", "b"] {
        stage.run(&format!("insert into {table} select generate_series(1, {})", 2 * MANY)).await;
    }
    // Of these, the convoys of those who do not read have the only places.
    stage.run(&format!("insert into c select generate_series(1, {MANY})")).await;
    for expected in 1..=4000 {
        assert_eq!(client.change().await["record"]["id"], expected);
    }
    let left = Instant::now();
    client.push(Some("1"), "realtime:c", "phx_leave", json!({})).await;
    while client.frame().await[3] != "phx_close" {}
    assert!(left.elapsed() < Duration::from_secs(3), "{:?}", left.elapsed());
    drop(others);
}
