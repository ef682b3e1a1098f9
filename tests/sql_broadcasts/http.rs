//! Broadcasts from SQL over HTTP: with a cursor, each exactly once, whatever happens to relays and connections between.

use std::time::Duration;

use relay::model::log::cursor::Cursor;
use relay::postgres::broadcast_history::BroadcastHistory;
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::{anon, heard, member};
use crate::support::database::Database;
use crate::support::http::{Answer, Events, get};
use crate::support::relay::Relay;
use crate::support::stage::Stage;

async fn changes(relay: &Relay, query: &str) -> Answer {
    get(relay.address, &format!("/realtime/v1/changes?{query}&wait=5&apikey={}", anon()), "").await
}

/// Follows `query` from a cursor until an event of this name. Returns the cursor and the events.
async fn follow(relay: &Relay, query: &str, since: &str, last: &str) -> (String, Vec<String>) {
    let (mut cursor, mut events) = (since.to_owned(), Vec::new());
    while events.last().map(String::as_str) != Some(last) {
        let answer = changes(relay, &format!("{query}&since={cursor}")).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.body["cursor"].as_str().unwrap().clone_into(&mut cursor);
        let found = answer.body["changes"].as_array().unwrap();
        events.extend(found.iter().map(|found| found["event"].as_str().unwrap_or("row").to_owned()));
    }
    (cursor, events)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poll_begins_now_and_gets_each_broadcast_once() {
    let stage = Stage::new("").await;
    let mut witness = member(&stage.relay, "2.0.0", "room").await;
    stage.run("select realtime.send('{}', 'before', 'room', false)").await;
    assert_eq!(heard(&mut witness).await.1, "before");
    let begin = changes(&stage.relay, "topic=room").await;
    assert_eq!((begin.status, &begin.body["changes"], &begin.body["more"]), (200, &json!([]), &json!(false)));
    let cursor = begin.body["cursor"].as_str().unwrap();
    stage.run("select realtime.send('{\"a\": 1}', 'one', 'room', false)").await;
    stage
        .run(
            "select realtime.send('{}', 'elsewhere', 'rooms', false), realtime.send('{}', 'private', 'room', true);
             select realtime.send_binary('\\x00ff', 'two', 'room', false)",
        )
        .await;
    let id = stage.database.value("select id from realtime.messages where event = 'one'").await;
    let answer = changes(&stage.relay, &format!("topic=room&since={cursor}")).await;
    let one = &answer.body["changes"][0];
    for (field, value) in [
        ("type", json!("broadcast")),
        ("topic", json!("room")),
        ("private", json!(false)),
        ("event", json!("one")),
        ("payload", json!({"a": 1, "id": id})),
        ("meta", json!({"id": id})),
        ("last", json!(true)),
    ] {
        assert_eq!(one[field], value, "{field} of {one}");
    }
    assert!(
        one["cursor"].as_str().unwrap().parse::<Cursor>().is_ok() && one["commit_timestamp"].is_string(),
        "{one}"
    );
    // Whatever part of them the first answer had.
    let (cursor, events) = follow(&stage.relay, "topic=room", cursor, "two").await;
    assert_eq!(events, ["one", "two"]);
    let again = follow(&stage.relay, "topic=room", one["cursor"].as_str().unwrap(), "two").await;
    assert_eq!(again.1, ["two"], "the cursor of a broadcast is the position after it");
    let nothing = get(
        stage.relay.address,
        &format!("/realtime/v1/changes?topic=room&since={cursor}&wait=0&apikey={}", anon()),
        "",
    )
    .await;
    assert_eq!(nothing.body["changes"], json!([]));
    let query = format!("topic=room&since={cursor}");
    let waiting = changes(&stage.relay, &query);
    let sending = async {
        tokio::task::yield_now().await;
        stage.run("select realtime.send_binary('\\x00ff', 'three', 'room', false)").await;
    };
    let (answer, ()) = tokio::join!(waiting, sending);
    let three = &answer.body["changes"][0];
    assert_eq!(
        (&three["event"], &three["binary_payload"], &three["payload"]),
        (&json!("three"), &json!("00ff"), &Value::Null)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_while_no_relay_runs_is_there_for_a_cursor() {
    let database = Database::new().await;
    let mut relay = Relay::start(&database.url).await;
    let begin = changes(&relay, "topic=room").await;
    let mut cursor = begin.body["cursor"].as_str().unwrap().to_owned();
    let mut found = Vec::new();
    let mut expected = Vec::new();
    for round in 0..3 {
        relay.stop().await;
        let send = format!(
            "select realtime.send('{{}}', '{round} ' || n, 'room', false) from generate_series(1, 2000) n"
        );
        database.run(&send).await;
        expected.extend((1..=2000).map(|n| format!("{round} {n}")));
        relay = Relay::start(&database.url).await;
        let events;
        (cursor, events) = follow(&relay, "topic=room", &cursor, &format!("{round} 2000")).await;
        found.extend(events);
    }
    assert_eq!(found, expected);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_continues_from_the_last_id_at_another_relay() {
    let database = Database::new().await;
    let relays = [Relay::start(&database.url).await, Relay::start(&database.url).await];
    let path = format!("/realtime/v1/changes?topic=room&apikey={}", anon());
    let mut last: Option<String> = None;
    for n in 0..6 {
        if n > 0 {
            database.run(&format!("select realtime.send('{{}}', 'between {n}', 'room', false)")).await;
        }
        let mut events = Events::open(relays[n % 2].address, &path, last.as_deref()).await;
        if n > 0 {
            let event = events.next().await.unwrap();
            assert_eq!(
                (event.name.as_str(), &event.data["event"]),
                ("broadcast", &json!(format!("between {n}")))
            );
        }
        database.run(&format!("select realtime.send('{{}}', 'live {n}', 'room', false)")).await;
        let event = events.next().await.unwrap();
        assert_eq!(event.data["event"], json!(format!("live {n}")));
        assert_eq!(event.data["cursor"], json!(event.id));
        last = Some(event.id);
    }
    for relay in relays {
        relay.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_cursor_serves_tables_and_topics() {
    let stage =
        Stage::new("create table t (id int); grant select on t to anon; select relay.watch('t')").await;
    let begin = changes(&stage.relay, "topic=room").await;
    let cursor = begin.body["cursor"].as_str().unwrap();
    stage.run("begin; insert into t values (1); select realtime.send('{}', 'e', 'room', false); insert into t values (2); commit").await;
    let (_, events) = follow(&stage.relay, "topic=room", cursor, "e").await;
    assert_eq!(events, ["e"]);
    let rows = changes(&stage.relay, &format!("table=t&since={cursor}")).await;
    let numbers = |answer: &Answer| -> Vec<(u64, u64)> {
        let number = |change: &Value, field: &str| change[field].as_str().unwrap().parse().unwrap();
        let changes = answer.body["changes"].as_array().unwrap();
        changes.iter().map(|change| (number(change, "txid"), number(change, "number"))).collect()
    };
    let told = changes(&stage.relay, &format!("topic=room&since={cursor}")).await;
    let (rows, told) = (numbers(&rows), numbers(&told));
    assert!(
        rows.len() == 2 && rows[0] < told[0] && told[0] < rows[1] && told[0].0 == rows[0].0,
        "{rows:?} {told:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_topic_is_refused_and_so_is_what_makes_no_sense() {
    let stage = Stage::new("").await;
    for (query, status, text) in [
        ("topic=room&private=true", 403, "permissions to read from this Channel topic: room"),
        ("topic=room&private=yes", 400, "true or false"),
        ("table=marker&private=true", 400, "only a topic is private"),
        ("topic=", 400, "the name of a channel is expected"),
        ("topic=room&table=marker", 400, "leave one of them out"),
        ("topic=room&filter=id=eq.1", 400, "leave one of them out"),
        ("topic=room&limit=7", 400, "leave one of them out"),
        ("topic=room&since=nonsense", 400, "since"),
        ("topic=room&topic=other", 400, "topic"),
    ] {
        let answer = changes(&stage.relay, query).await;
        let error = answer.body["error"].as_str().unwrap_or_default();
        assert!(answer.status == status && error.contains(text), "{query}: {answer:?}");
    }
    let answer = get(stage.relay.address, "/realtime/v1/changes?topic=room", "").await;
    assert_eq!(answer.status, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_history_of_a_private_topic_is_its_newest_broadcasts_oldest_first() {
    let database = Database::new().await;
    let pool = relay::postgres::connect::pool::Server::parse(&database.url, "test", None)
        .unwrap()
        .pool(1, Duration::from_secs(10))
        .unwrap();
    database
        .run(
            "select realtime.send('{}', 'n' || n, 'room') from generate_series(1, 30) n;
             select realtime.send('{}', 'public', 'room', false), realtime.send('{}', 'elsewhere', 'rooms');
             insert into realtime.messages (topic, extension, event, private) values ('room', 'presence', 'no', true);
             select realtime.send_binary('\\x00ff', 'bytes', 'room');
             set timezone = 'Asia/Tokyo'",
        )
        .await;
    let history = BroadcastHistory::new(pool);
    let read = async |since: OffsetDateTime, limit: u32| -> Vec<String> {
        let found = history.newest("room", since, limit).await.unwrap();
        found.broadcasts.iter().map(|stored| stored.broadcast.event().to_owned()).collect()
    };
    let long_ago = OffsetDateTime::UNIX_EPOCH;
    assert_eq!(read(long_ago, 3).await, ["n29", "n30", "bytes"]);
    assert_eq!(read(long_ago, 1000).await.len(), 25);
    assert_eq!(read(long_ago, 0).await, ["bytes"]);
    let since: OffsetDateTime = database
        .client
        .query_one("select inserted_at at time zone 'UTC' from realtime.messages where event = 'n28'", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(read(since, 25).await, ["n28", "n29", "n30", "bytes"]);
    assert_eq!(read(OffsetDateTime::now_utc() + Duration::from_secs(3600), 25).await, [""; 0]);
    database.run("alter schema realtime rename to elsewhere").await;
    assert_eq!(read(long_ago, 3).await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_are_kept_for_three_days_and_those_of_others_for_ever() {
    let stage = Stage::with("", |settings, _| settings.poll_ms = Some(1000)).await;
    let insert = "insert into realtime.messages (topic, extension, event, payload, inserted_at)
                  select 't', 'broadcast', 'e' || n, '{}', timezone('UTC', now()) - n * interval '1 hour' from generate_series(0, 100) n";
    stage.run(insert).await;
    assert_eq!(stage.database.value("select relay.trim_messages(10)").await, "10");
    crate::support::eventually("old messages are gone", || async {
        stage.run("select relay.trim_messages(10)").await;
        let left = stage
            .database
            .value("select count(*) || ' ' || max(substr(event, 2)::int) from realtime.messages")
            .await;
        (left == "72 71").then_some(())
    })
    .await;
    stage.run(insert).await;
    stage.run("comment on table realtime.messages is 'of somebody else'").await;
    assert_eq!(stage.database.value("select relay.trim_messages(10)").await, "0");
}
