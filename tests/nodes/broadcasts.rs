//! Broadcasts between relays: in the order of each sender, none twice, and nothing is written while a relay is alone.

use serde_json::json;

use super::{TOPIC, anon, heard, know, know_each_other, member, relays, say};
use crate::support::database::Database;
use crate::support::http::post;
use crate::support::relay::Relay;
use crate::support::socket::Socket;
use crate::support::{ANN, BOB, eventually, token};

#[tokio::test(flavor = "multi_thread")]
async fn what_clients_send_reaches_the_members_at_every_relay_in_order_and_once() {
    let database = Database::new().await;
    let relays = relays(&database, 3).await;
    let mut members = Vec::new();
    for relay in &relays {
        members.push(member(&relay.address.to_string(), json!({})).await);
    }
    for n in 0..100 {
        for (from, socket) in members.iter_mut().enumerate() {
            say(socket, json!({"from": from, "n": n})).await;
        }
    }
    for (place, socket) in members.iter_mut().enumerate() {
        let mut next = [0, 0, 0];
        while (0..3).any(|from| from != place && next[from] < 100) {
            let frame = socket.message_frame().await;
            let content = &frame[4]["payload"];
            let from = content["from"].as_u64().unwrap() as usize;
            assert_eq!(content["n"], next[from], "member {place}, from {from}");
            next[from] += 1;
        }
        assert_eq!(next[place], 0, "nobody gets its own");
        socket.is_quiet().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_large_texts_and_broadcasts_over_http_arrive_as_they_were_sent() {
    let database = Database::new().await;
    let relays = relays(&database, 2).await;
    let mut here =
        member(&relays[0].address.to_string(), json!({"broadcast": {"self": true, "ack": true}})).await;
    let mut there = member(&relays[1].address.to_string(), json!({})).await;
    let large = json!({"x": "é".repeat(150_000), "last": true});
    say(&mut here, large.clone()).await;
    assert_eq!(heard(&mut there, &large).await, std::slice::from_ref(&large));
    assert_eq!(heard(&mut here, &large).await, [large]);
    let messages = json!({"messages": [
        {"topic": "room", "event": "e", "payload": {"n": 1}},
        {"topic": "elsewhere", "event": "e", "payload": {"n": 2}},
        {"topic": "room", "event": "e", "payload": {"n": 3}},
    ]});
    let headers = format!("apikey: {}\r\ncontent-type: application/json\r\n", anon());
    let body = messages.to_string();
    let answer = post(relays[0].address, "/realtime/v1/api/broadcast", &headers, body.as_bytes()).await;
    assert_eq!(answer.status, 202, "{}", answer.body);
    for socket in [&mut here, &mut there] {
        assert_eq!(heard(socket, &json!({"n": 3})).await, [json!({"n": 1}), json!({"n": 3})]);
    }
}

/// What was ever written for other relays.
async fn written(database: &Database) -> String {
    let written = "select sum(n_tup_ins + n_tup_upd + n_tup_del)::text || ' ' || (select count(*) from relay.node_numbers())
                   from pg_stat_all_tables where relname like 'node\\_log\\__'";
    database.value(written).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_is_alone_writes_nothing_and_one_that_is_alone_again_stops_writing() {
    let database = Database::new().await;
    let alone = Relay::start(&database.url).await;
    let mut sender = member(&alone.address.to_string(), json!({"broadcast": {"self": true}})).await;
    for n in 0..50 {
        say(&mut sender, json!(n)).await;
    }
    heard(&mut sender, &json!(49)).await;
    let other = Relay::start(&database.url).await;
    know_each_other(&[&alone, &other]).await;
    // Statistics come late: the counter of the relay itself counts, too.
    let before = alone.figure("relay_node_batches_total");
    assert!(before <= 2, "{before} batches to tell the first other relay who is here");
    let mut reader = member(&other.address.to_string(), json!({})).await;
    say(&mut sender, json!("both")).await;
    assert_eq!(heard(&mut reader, &json!("both")).await, [json!("both")]);
    drop(reader);
    other.stop().await;
    know(&[&alone], 1).await;
    let before = alone.figure("relay_node_batches_total");
    for n in 0..50 {
        say(&mut sender, json!(n)).await;
    }
    heard(&mut sender, &json!(49)).await;
    assert_eq!(alone.figure("relay_node_batches_total"), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_with_one_relay_has_no_message_between_relays() {
    let database = Database::new().await;
    let before = written(&database).await;
    let alone = Relay::start(&database.url).await;
    let mut sender = member(&alone.address.to_string(), json!({"broadcast": {"self": true}})).await;
    for n in 0..50 {
        say(&mut sender, json!(n)).await;
    }
    heard(&mut sender, &json!(49)).await;
    alone.stop().await;
    // The statistics of its sessions are complete when they have ended.
    eventually("its sessions have ended", || async {
        let sessions = "select count(*) from pg_stat_activity where datname = current_database() and application_name like 'relay%'";
        (database.value(sessions).await == "0").then_some(())
    })
    .await;
    assert_eq!(written(&database).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn private_channels_stay_private_and_policies_hold_at_both_ends() {
    let database = Database::new().await;
    database
        .run(
            "create policy reads on realtime.messages for select to authenticated
               using (auth.uid()::text like '0a%' or realtime.topic() = 'room');
             create policy writes on realtime.messages for insert to authenticated with check (auth.uid()::text like '0a%')",
        )
        .await;
    let relays = relays(&database, 2).await;
    let user = |sub| token("authenticated", Some(sub), json!({}));
    let private = json!({"private": true, "broadcast": {"ack": true}});
    let mut sockets = Vec::new();
    for (place, sub) in [(0, ANN), (1, ANN), (1, BOB)] {
        let mut socket = Socket::at(&relays[place].address.to_string(), "2.0.0", &user(sub)).await;
        socket.join("1", TOPIC, private.clone()).await;
        assert_eq!(socket.message_frame().await[4]["status"], "ok");
        sockets.push(socket);
    }
    let mut public = member(&relays[1].address.to_string(), json!({})).await;
    let [ann, there, bob] = &mut sockets[..] else { unreachable!() };
    // Bob may read and not send.
    let payload = json!({"type": "broadcast", "event": "e", "payload": "forbidden"});
    bob.push(json!("1"), json!("b"), TOPIC, "broadcast", payload).await;
    let refused = bob.message_frame().await;
    assert_eq!(refused[4]["status"], "error", "{refused}");
    say(ann, json!("allowed")).await;
    for socket in [there, bob] {
        assert_eq!(heard(socket, &json!("allowed")).await, [json!("allowed")]);
    }
    // The public channel of the same name is another one.
    let mut other = member(&relays[0].address.to_string(), json!({})).await;
    say(&mut other, json!("public")).await;
    assert_eq!(heard(&mut public, &json!("public")).await, [json!("public")]);
    sockets[1].is_quiet().await;
}
