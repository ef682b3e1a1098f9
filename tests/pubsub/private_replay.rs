//! Private channels: the stored broadcasts that a join gets again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use super::{BOSS, VERSIONS, frames, policy, private, refusal, user};
use crate::support::relay::Relay;
use crate::support::socket::Socket;
use crate::support::stage::Stage;
use crate::support::{ANN, BOB};

const TOPIC: &str = "realtime:room";

async fn stage() -> Stage {
    let reads = "topic = 'room' and extension = 'broadcast' or extension = 'presence'";
    Stage::new(&format!("{BOSS}{}", policy("r", "select", reads))).await
}

fn replay(since: u64, limit: Value) -> Value {
    json!({"broadcast": {"replay": {"since": since, "limit": limit}}})
}

/// The broadcasts that come with a join: number, id and whether they are replayed.
async fn replayed(relay: &Relay, version: &'static str, topic: &str, config: Value) -> (Socket, Vec<Value>) {
    let mut socket = Socket::open(relay, version, &user(ANN)).await;
    super::join(&mut socket, topic, private(config)).await;
    let frames = match version {
        "1.0.0" => frames(&mut socket).await,
        _ => Vec::new(),
    };
    (socket, frames)
}

fn numbers(frames: &[Value]) -> Vec<u64> {
    frames.iter().map(|frame| frame[4]["payload"]["n"].as_u64().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_broadcasts_come_right_after_the_answer_oldest_first_and_say_that_they_are_replayed() {
    let stage = stage().await;
    let sends = "select realtime.send(jsonb_build_object('n', n), 'e', 'room') from generate_series(1, 30) n;
         select realtime.send('{\"n\": 99}', 'public', 'room', false), realtime.send('{\"n\": 99}', 'e', 'hall')";
    stage.run(sends).await;
    for (limit, expected) in
        [(json!(3), 28..=30), (json!(25), 6..=30), (json!(null), 6..=30), (json!(1), 30..=30)]
    {
        let (_, found) = replayed(&stage.relay, "1.0.0", TOPIC, replay(0, limit)).await;
        assert_eq!(numbers(&found), expected.collect::<Vec<u64>>());
        for frame in &found {
            let id = &frame[4]["meta"]["id"];
            assert_eq!(frame[4]["meta"], json!({"id": id, "replayed": true}));
            assert_eq!(
                (&frame[4]["type"], &frame[4]["event"], &frame[4]["payload"]["id"]),
                (&json!("broadcast"), &json!("e"), id)
            );
        }
    }
    let since =
        "select floor(extract(epoch from inserted_at at time zone 'UTC') * 1000) from realtime.messages
         where topic = 'room' and payload ->> 'n' = '29'";
    let since: u64 = stage.database.value(since).await.parse().unwrap();
    let (_, found) = replayed(&stage.relay, "1.0.0", TOPIC, replay(since, json!(25))).await;
    assert!(numbers(&found).ends_with(&[29, 30]), "{found:?}");
    let (_, found) =
        replayed(&stage.relay, "1.0.0", TOPIC, replay(u64::from(u32::MAX) * 1000, json!(25))).await;
    assert_eq!(found, [Value::Null; 0]);
    // As bytes to version 2.0.0.
    let (mut socket, _) = replayed(&stage.relay, "2.0.0", TOPIC, replay(0, json!(1))).await;
    let frame = socket.raw().await.into_data();
    assert_eq!(frame[0], 4);
    assert!(String::from_utf8_lossy(&frame).contains(r#""replayed":true"#));
    // Who may not read broadcasts gets none.
    let (_, found) = replayed(&stage.relay, "1.0.0", "realtime:hall", replay(0, json!(5))).await;
    assert_eq!(found, [Value::Null; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_that_cannot_be_had_is_refused_with_a_reason() {
    let stage = stage().await;
    for version in VERSIONS {
        let mut socket = Socket::open(&stage.relay, version, &user(ANN)).await;
        socket.join("1", TOPIC, replay(0, json!(5))).await;
        let public = "UnableToReplayMessages: Replay is not allowed for public channels";
        assert_eq!(socket.message_frame().await[4]["response"]["reason"], public);
        socket.is_quiet().await;
    }
    for params in [
        json!({"since": 0, "limit": 0}),
        json!({"since": 0, "limit": 26}),
        json!({"since": "now", "limit": 5}),
        json!({"since": -1}),
        json!({"limit": 5}),
        json!([]),
        json!(7),
    ] {
        let config = json!({"broadcast": {"replay": params}});
        let reason = refusal(&stage.relay, &user(ANN), TOPIC, config).await.unwrap();
        assert!(reason.starts_with("UnableToReplayMessages: Replay params are not valid"), "{reason}");
    }
    let mut named = Socket::handshake(
        &stage.relay,
        &format!("/socket/websocket?apikey={}&session=0d000000-0000-4000-8000-00000000000d", user(ANN)),
        &[],
    )
    .await
    .unwrap();
    named.join("1", TOPIC, private(replay(0, json!(5)))).await;
    let reply = named.message_frame().await;
    assert!(reply[4]["response"]["reason"].as_str().unwrap().contains("named session"), "{reply}");
    stage.run("drop table realtime.messages").await;
    assert!(refusal(&stage.relay, &user(BOB), TOPIC, replay(0, json!(5))).await.is_some());
}

/// A writer goes on while clients join: each gets every broadcast from the first that it was given on, once and in order.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_missing_or_comes_twice_between_replay_and_live() {
    let stage = stage().await;
    stage.run("select realtime.send('{\"n\": 0}', 'e', 'room')").await;
    let writer = stage.database.connect().await;
    let have_joined = Arc::new(AtomicBool::new(false));
    let is_last = Arc::clone(&have_joined);
    let writing = tokio::spawn(async move {
        for n in 1.. {
            // One more after the last join.
            let event = if is_last.load(Ordering::Relaxed) { "last" } else { "e" };
            let send = format!("begin; select realtime.send('{{\"n\": {n}}}', '{event}', 'room'); commit");
            writer.batch_execute(&send).await.unwrap();
            if event == "last" {
                return;
            }
        }
    });
    let mut readers = Vec::new();
    for number in 0..40 {
        let entries = match number % 2 {
            0 => json!([]),
            _ => json!([{"event": "*", "schema": "public", "table": "marker"}]),
        };
        let mut config = replay(0, json!(1 + number % 25));
        config["postgres_changes"] = entries;
        let mut socket = Socket::open(&stage.relay, "1.0.0", &user(ANN)).await;
        socket.join("1", TOPIC, private(config)).await;
        assert_eq!(socket.message_frame().await[4]["status"], "ok");
        readers.push(tokio::spawn(read_to_the_last(socket)));
    }
    have_joined.store(true, Ordering::Relaxed);
    writing.await.unwrap();
    for reader in readers {
        reader.await.unwrap();
    }
}

/// Reads up to the last broadcast: each follows the one before, and none is replayed after a live one.
async fn read_to_the_last(mut socket: Socket) {
    let (mut last, mut is_live) = (None, false);
    loop {
        let frame = socket.message_frame().await;
        if frame[3] != "broadcast" {
            continue;
        }
        let (n, replayed) =
            (frame[4]["payload"]["n"].as_u64().unwrap(), frame[4]["meta"]["replayed"] == true);
        assert!(!(replayed && is_live), "{n} is replayed after a live one");
        is_live |= !replayed;
        assert!(last.is_none_or(|last| n == last + 1), "{n} after {last:?}");
        last = Some(n);
        if frame[4]["event"] == "last" {
            break;
        }
    }
    assert!(is_live);
    assert!(frames(&mut socket).await.iter().all(|frame| frame[3] != "broadcast"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_of_large_broadcasts_comes_whole_to_a_client_that_reads() {
    let stage = stage().await;
    let sends = "select realtime.send(jsonb_build_object('n', n, 'text', repeat('x', 200000)), 'e', 'room') from generate_series(1, 25) n";
    stage.run(sends).await;
    let (mut socket, found) = replayed(&stage.relay, "1.0.0", TOPIC, replay(0, json!(25))).await;
    assert_eq!(numbers(&found), (1..=25).collect::<Vec<u64>>());
    stage.run("select realtime.send('{\"n\": 26}', 'e', 'room')").await;
    assert_eq!(socket.message_frame().await[4]["payload"]["n"], 26);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_renewed_while_a_replay_catches_up_loses_nothing() {
    let stage = stage().await;
    let sends = |from: u32, to: u32| {
        format!(
            "select realtime.send(jsonb_build_object('n', n, 'text', repeat('x', 20000)), 'e', 'room')
             from generate_series({from}, {to}) n"
        )
    };
    stage.run(&sends(1, 25)).await;
    let mut socket = Socket::open(&stage.relay, "1.0.0", &user(ANN)).await;
    socket.join("1", TOPIC, private(replay(0, json!(25)))).await;
    assert_eq!(socket.message_frame().await[4]["status"], "ok");
    // More than fits into its queue, so that it is still catching up when the token is renewed.
    stage.run(&sends(26, 325)).await;
    let other = crate::support::token("authenticated", Some(ANN), json!({"renewed": true}));
    socket.push(json!("1"), Value::Null, TOPIC, "access_token", json!({"access_token": other})).await;
    stage.run(&sends(326, 335)).await;
    let (mut last, mut got) = (0, Vec::new());
    while last < 335 {
        let frame = socket.message_frame().await;
        if frame[3] == "broadcast" {
            last = frame[4]["payload"]["n"].as_u64().unwrap();
            got.push(last);
        }
    }
    got.dedup();
    assert_eq!(got, (1..=335).collect::<Vec<u64>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn joins_with_a_replay_that_are_left_at_once_keep_nothing() {
    let stage = stage().await;
    let sends = "select realtime.send(jsonb_build_object('n', n, 'text', repeat('x', 200000)), 'e', 'room') from generate_series(1, 25) n";
    stage.run(sends).await;
    let mut socket = Socket::open(&stage.relay, "1.0.0", &user(ANN)).await;
    for number in 0..20 {
        let reference = number.to_string();
        socket.join(&reference, TOPIC, private(replay(0, json!(25)))).await;
        socket.push(json!(reference), json!("leave"), TOPIC, "phx_leave", json!({})).await;
    }
    // A join that stays gets its own.
    socket.join("last", TOPIC, private(replay(0, json!(25)))).await;
    let mut of_last = 0;
    while of_last < 25 {
        let frame = socket.message_frame().await;
        of_last += u32::from(frame[3] == "broadcast");
    }
    assert!(
        frames(&mut socket).await.iter().all(|frame| frame[3] != "broadcast"),
        "those of a channel that was left came"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bookmark_of_a_public_channel_is_none_of_the_private_one() {
    let stage = Stage::new(BOSS).await;
    let path = format!("/socket/websocket?apikey={}&session=0d000000-0000-4000-8000-00000000000d", user(ANN));
    let mut socket = Socket::handshake(&stage.relay, &path, &[]).await.unwrap();
    socket.join("1", TOPIC, json!({})).await;
    while socket.message_frame().await[4]["status"] != "ok" {}
    stage.run("select realtime.send('{\"n\": 1}', 'e', 'room', false)").await;
    while socket.message_frame().await[3] != "broadcast" {}
    frames(&mut socket).await;
    drop(socket);
    // Before there is a right to read.
    stage.run("select realtime.send('{\"n\": 2}', 'e', 'room', true)").await;
    stage.run(&policy("r", "select", "topic = 'room'")).await;
    let mut socket = Socket::handshake(&stage.relay, &path, &[]).await.unwrap();
    socket.join("1", TOPIC, private(json!({}))).await;
    while socket.message_frame().await[4]["status"] != "ok" {}
    stage.run("select realtime.send('{\"n\": 3}', 'e', 'room', true)").await;
    loop {
        let frame = socket.message_frame().await;
        if frame[3] == "broadcast" {
            assert_eq!(frame[4]["payload"]["n"], 3, "{frame}");
            break;
        }
    }
}
