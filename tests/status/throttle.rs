//! Signs of life: few writes for many of them.

use serde_json::{Value, json};
use std::time::{Duration, Instant};

use super::{
    ask, becomes, heartbeat, id, is_online, maintain, of, settled, socket, stage, writes, writes_of,
};
use crate::support::client::Client;
use crate::support::eventually;
use crate::support::stage::Stage;

#[tokio::test(flavor = "multi_thread")]
async fn six_hundred_heartbeats_of_one_user_are_one_write() {
    let stage = stage(|_| {}).await;
    let mut client = socket(&stage.relay, 1).await;
    becomes(&stage.database, 1, true).await;
    for _ in 0..600 {
        heartbeat(&mut client).await;
    }
    settled(&stage, &stage.relay).await;
    assert_eq!(writes_of(&stage, 1).await, "1");
    assert!(stage.relay.figure("relay_status_throttled_total") >= 600);
    assert_eq!(stage.relay.figure("relay_status_failed_updates_total"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_after_the_interval_is_written() {
    let stage = stage(|settings| settings.status_throttle_ms = Some(400)).await;
    let mut client = socket(&stage.relay, 1).await;
    becomes(&stage.database, 1, true).await;
    let began = Instant::now();
    while writes_of(&stage, 1).await != "4" {
        heartbeat(&mut client).await;
        assert!(began.elapsed() < crate::support::PATIENCE);
    }
    assert!(began.elapsed() > Duration::from_millis(800), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_requests_of_one_user_are_one_write_and_nine_throttled() {
    let stage = stage(|_| {}).await;
    for _ in 0..10 {
        assert_eq!(ask(&stage.relay, &of(1)).await.status, 200);
    }
    becomes(&stage.database, 1, true).await;
    settled(&stage, &stage.relay).await;
    assert_eq!(writes_of(&stage, 1).await, "1");
    let metrics = maintain(&stage.relay, "GET", "status-metrics", Value::Null).await.body["data"].clone();
    assert_eq!(metrics["throttledRequests"], 9, "{metrics}");
    // Requests for other things count, too.
    let presence = format!("/realtime/v1/presence?topic=a&apikey={}", of(1));
    crate::support::http::get(stage.relay.address, &presence, "").await;
    let headers = format!("authorization: Bearer {}\r\ncontent-type: application/json\r\n", of(1));
    let broadcast = json!({"messages": [{"topic": "a", "event": "e", "payload": {}}]}).to_string();
    crate::support::http::post(
        stage.relay.address,
        "/realtime/v1/api/broadcast",
        &headers,
        broadcast.as_bytes(),
    )
    .await;
    let metrics = maintain(&stage.relay, "GET", "status-metrics", Value::Null).await.body["data"].clone();
    assert_eq!(metrics["throttledRequests"], 11, "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_after_the_last_connection_is_written_at_once() {
    let stage = stage(|_| {}).await;
    let client = socket(&stage.relay, 1).await;
    becomes(&stage.database, 1, true).await;
    drop(client);
    becomes(&stage.database, 1, false).await;
    ask(&stage.relay, &of(1)).await;
    becomes(&stage.database, 1, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_users_that_connect_are_a_handful_of_statements() {
    let stage = stage(|_| {}).await;
    let began = Instant::now();
    let mut clients = Vec::new();
    for hundred in 0..10 {
        let connecting = (0..100).map(|n| socket(&stage.relay, 100 * hundred + n));
        clients.extend(futures_util::future::join_all(connecting).await);
    }
    let online = |count: &'static str| {
        let database = &stage.database;
        eventually("all are written", move || async move {
            let sql = "select count(*) from people where is_online";
            (database.value(sql).await == count).then_some(())
        })
    };
    online("1000").await;
    let statements =
        "select count(distinct c.xid) from relay.changes c join relay.watch_list w on w.id = c.relation
         where w.relation = 'people'::regclass";
    // Five a second at most, for as long as they come.
    let most = 2 + began.elapsed().as_millis() / 200;
    let count: u128 = stage.database.value(statements).await.parse().unwrap();
    assert!(count <= most, "{count} statements in {:?}", began.elapsed());
    // Together they are one.
    stage.run("update people set is_online = false").await;
    stage.run("delete from relay.status_connected; delete from relay.status_relays; notify relay, '{\"status\":true}'").await;
    online("1000").await;
    let again: u128 = stage.database.value(statements).await.parse().unwrap();
    assert!(again - count <= 3, "{} statements", again - count - 1);
    drop(clients);
    online("0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_polls_is_online_until_silent_and_who_is_connected_is_never_silent() {
    let stage = stage(|settings| {
        settings.status_sweep_ms = Some(200);
        settings.status_silence_ms = Some(1500);
    })
    .await;
    let _client = socket(&stage.relay, 1).await;
    ask(&stage.relay, &of(2)).await;
    becomes(&stage.database, 1, true).await;
    // On a busy machine it is silent before anyone looks.
    let was_online = format!(
        "select count(*) > 0 from relay.changes c where c.after ->> 'id' = '{}' and c.after ->> 'is_online' = 'true'",
        id(2)
    );
    eventually("the poll was written", || async {
        (stage.database.value(&was_online).await == "t").then_some(())
    })
    .await;
    stage
        .run("insert into people (id, is_online) values ('00000003-0000-4000-8000-000000000000', true)")
        .await;
    becomes(&stage.database, 2, false).await;
    becomes(&stage.database, 3, false).await;
    assert_eq!(is_online(&stage.database, 1).await, Some(true));
    let seen = format!("select seen = active from people where id = '{}'", id(2));
    assert_eq!(stage.database.value(&seen).await, "t");
    eventually("both are counted", || async {
        (stage.relay.figure("relay_status_set_offline_total") == 2).then_some(())
    })
    .await;
    let old = "select clock_timestamp() - active > interval '1500 milliseconds' from people where id = '00000001-0000-4000-8000-000000000000'";
    assert_eq!(stage.database.value(old).await, "t", "its last write is as old");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_asked_of_the_database_without_a_status_table() {
    let stage = Stage::new("").await;
    let _client = socket(&stage.relay, 1).await;
    let sessions = "select count(*) from pg_stat_activity where datname = current_database() and query like '%status%' and pid <> pg_backend_pid()";
    eventually("the look is over", || async { (stage.database.value(sessions).await == "0").then_some(()) })
        .await;
    stage.run(super::PEOPLE).await;
    writes(&stage.relay).await;
    becomes(&stage.database, 1, true).await;
    let _other = Client::connect(&stage.relay, &of(2)).await;
    becomes(&stage.database, 2, true).await;
}
