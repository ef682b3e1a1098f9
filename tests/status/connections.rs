//! Sockets and streams: who has one is online.

use serde_json::json;

use super::{becomes, heartbeat, id, is_online, of, settled, socket, stage, writes};
use crate::support::client::Client;
use crate::support::http::Events;
use crate::support::stage::Stage;
use crate::support::{eventually, token};

#[tokio::test(flavor = "multi_thread")]
async fn three_tabs_go_offline_with_the_last() {
    let stage = stage(|_| {}).await;
    let mut tabs = vec![socket(&stage.relay, 1).await, socket(&stage.relay, 1).await];
    becomes(&stage.database, 1, true).await;
    tabs.push(socket(&stage.relay, 1).await);
    let other = socket(&stage.relay, 2).await;
    becomes(&stage.database, 2, true).await;
    for _ in 0..2 {
        tabs.pop();
        let left = tabs.len() + 1;
        eventually("the tab is gone", || async { (stage.relay.session_count() == left).then_some(()) }).await;
        settled(&stage, &stage.relay).await;
        assert_eq!(is_online(&stage.database, 1).await, Some(true), "with {left} tabs");
    }
    drop(tabs);
    becomes(&stage.database, 1, false).await;
    assert_eq!(is_online(&stage.database, 2).await, Some(true));
    let row = "select is_guest or seen is null or active is null from people where is_online is false and name = ''";
    assert_eq!(stage.database.value(row).await, "f");
    drop(other);
    becomes(&stage.database, 2, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_anonymous_participant_has_a_status_and_a_server_has_none() {
    let stage = stage(|settings| settings.status_anonymous_claim = Some("guest".to_owned())).await;
    let claims = [
        ("anon", None, json!({"guest": id(1)})),
        ("authenticated", Some(id(2)), json!({"is_anonymous": true, "guest": id(9)})),
        ("anon", None, json!({})),
        ("anon", None, json!({"participantId": id(8)})),
        ("service_role", Some(id(7)), json!({})),
    ];
    let mut clients = Vec::new();
    for (role, sub, more) in claims {
        clients.push(Client::connect(&stage.relay, &token(role, sub.as_deref(), more)).await);
    }
    becomes(&stage.database, 1, true).await;
    becomes(&stage.database, 2, true).await;
    settled(&stage, &stage.relay).await;
    let guests = "select string_agg(left(id::text, 8), ' ' order by id) from people where is_guest";
    assert_eq!(stage.database.value(guests).await, "00000001 00000002");
    for number in [7, 8, 9] {
        assert_eq!(is_online(&stage.database, number).await, None, "{number}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_user_whose_token_was_shown_last_is_connected() {
    let stage = stage(|_| {}).await;
    // As supabase-js does: it connects with the key, and shows the user's token in joins and when it has a new one.
    let anon = token("anon", None, json!({}));
    let mut client = Client::connect(&stage.relay, &anon).await;
    let join = json!({"config": {"postgres_changes": []}, "access_token": of(1)});
    client.push(Some("1"), "realtime:a", "phx_join", join).await;
    becomes(&stage.database, 1, true).await;
    client.push(Some("1"), "realtime:a", "access_token", json!({"access_token": of(2)})).await;
    becomes(&stage.database, 2, true).await;
    becomes(&stage.database, 1, false).await;
    client.push(Some("1"), "realtime:a", "access_token", json!({"access_token": anon})).await;
    becomes(&stage.database, 2, false).await;
    let join = json!({"config": {"private": true}, "access_token": of(3)});
    client.push(Some("2"), "realtime:b", "phx_join", join).await;
    becomes(&stage.database, 3, true).await;
    drop(client);
    becomes(&stage.database, 3, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_stream_is_a_connection() {
    let stage = stage(|_| {}).await;
    let path = format!("/realtime/v1/changes?table=marker&apikey={}", of(1));
    let stream = Events::open(stage.relay.address, &path, None).await;
    becomes(&stage.database, 1, true).await;
    let socket = socket(&stage.relay, 1).await;
    drop(stream);
    settled(&stage, &stage.relay).await;
    assert_eq!(is_online(&stage.database, 1).await, Some(true), "the socket is open");
    drop(socket);
    becomes(&stage.database, 1, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_was_last_seen_at_the_last_frame() {
    let stage = stage(|_| {}).await;
    let mut client = socket(&stage.relay, 1).await;
    becomes(&stage.database, 1, true).await;
    heartbeat(&mut client).await;
    let heard = stage.database.value("select clock_timestamp()").await;
    eventually("two seconds are over", || async {
        let over = format!("select clock_timestamp() > '{heard}'::timestamptz + interval '2 seconds'");
        (stage.database.value(&over).await == "t").then_some(())
    })
    .await;
    drop(client);
    becomes(&stage.database, 1, false).await;
    let seen = format!(
        "select seen between '{heard}'::timestamptz - interval '1 second' and '{heard}'::timestamptz + interval '1 second'
         and seen = active from people where id = '{}'",
        id(1)
    );
    assert_eq!(stage.database.value(&seen).await, "t");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_stops_in_order_leaves_nobody_online() {
    let stage = stage(|_| {}).await;
    let mut clients = Vec::new();
    for number in 1..=5 {
        clients.push(socket(&stage.relay, number).await);
        becomes(&stage.database, number, true).await;
    }
    let Stage { relay, database, .. } = stage;
    relay.stop().await;
    assert_eq!(database.value("select count(*) from people where is_online").await, "0");
    assert_eq!(database.value("select count(*) from relay.status_connected").await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_connected_before_the_status_is_turned_on_is_online_after() {
    let stage = Stage::new("").await;
    let clients = [socket(&stage.relay, 1).await, socket(&stage.relay, 2).await];
    stage.run(super::PEOPLE).await;
    writes(&stage.relay).await;
    becomes(&stage.database, 1, true).await;
    becomes(&stage.database, 2, true).await;
    stage.run("select relay.status_off()").await;
    eventually("the status is off", || async { (stage.relay.figure("relay_status_on") == 0).then_some(()) })
        .await;
    drop(clients);
    eventually("they are gone", || async { (stage.relay.session_count() == 0).then_some(()) }).await;
    assert_eq!(is_online(&stage.database, 1).await, Some(true), "nobody writes any more");
    // Into another table.
    let _third = socket(&stage.relay, 3).await;
    stage
        .run("create table others (id text primary key, up boolean); select relay.status_on('others', 'id', 'up', null, null)")
        .await;
    eventually("the other table is written", || async {
        let rows = "select coalesce(string_agg(left(id, 8) || up, ' '), '') from others";
        (stage.database.value(rows).await == "00000003true").then_some(())
    })
    .await;
}
