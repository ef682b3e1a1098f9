//! What one client may hold or ask for is bounded, and whoever goes beyond it is closed without hurting the others.

use serde_json::json;
use tokio::net::TcpStream;

use crate::support::http::stalled;
use crate::support::relay::Relay;
use crate::support::stage::Stage;
use crate::support::{eventually, token};

const TABLE: &str =
    "create table t (id int primary key, v text); grant select on t to anon; select relay.watch('t');";

fn anon() -> String {
    token("anon", None, json!({}))
}

/// A metric's number.
fn metric(relay: &Relay, name: &str) -> i64 {
    let text = relay.observe.text();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name}")).parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_clients_that_read_nothing_hold_no_more_than_all_may_together() {
    const MOST: i64 = 8 << 20;
    let stage = Stage::with(TABLE, |settings, _| {
        settings.total_outbox_bytes = Some(MOST as usize);
    })
    .await;
    let mut idle: Vec<TcpStream> = Vec::new();
    for number in 0..200 {
        // Each its own topic, thus its own frames.
        idle.push(stalled(stage.relay.address, &anon(), &format!("realtime:idle{number}"), "t").await);
    }
    let mut good = stage.subscribe(&anon(), json!([{"event": "*", "schema": "public", "table": "t"}])).await;
    eventually("all are subscribed", || async {
        (metric(&stage.relay, "relay_channels_open") == 201).then_some(())
    })
    .await;
    let mut most = 0;
    let mut written = 0;
    while metric(&stage.relay, "relay_sessions_closed_full_total") < 100 {
        assert!(written < 200, "a hundred times more than all may hold went to clients that read nothing");
        stage.run(&format!("insert into t values ({written}, repeat('x', 100000))")).await;
        assert_eq!(good.change().await["record"]["id"], written, "a client that reads gets everything");
        most = most.max(metric(&stage.relay, "relay_outbox_bytes"));
        written += 1;
    }
    // One change on its way to everybody comes on top.
    assert!(most < MOST + 200 * 110_000, "{most}");
    drop(idle);
    eventually("what waited is given back", || async {
        (metric(&stage.relay, "relay_outbox_bytes") == 0).then_some(())
    })
    .await;
    stage.run("insert into t values (-1, 'after')").await;
    assert_eq!(stage.told(&mut good).await, [r#"INSERT {"id":-1,"v":"after"}"#]);
}
