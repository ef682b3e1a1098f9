//! How much one client may say: messages, joins, channels, bytes; and how long it may say nothing.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout};
use tokio_tungstenite::tungstenite::Message;

use crate::support::database::Database;
use crate::support::http::stalled;
use crate::support::proxy::Proxy;
use crate::support::relay::Relay;
use crate::support::socket::Socket;
use crate::support::stage::Stage;
use crate::support::{PATIENCE, token};

fn anon() -> String {
    token("anon", None, json!({}))
}

fn marker() -> Value {
    json!({"postgres_changes": [{"event": "*", "schema": "public", "table": "marker"}]})
}

fn broadcast() -> Message {
    let payload = json!({"type": "broadcast", "event": "x", "payload": {}});
    Message::text(json!(["1", null, "realtime:t", "broadcast", payload]).to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_broadcasts_at_once_close_the_channel_then_the_socket_and_no_other_client() {
    let stage = Stage::new("").await;
    let mut good = stage.subscribe(&anon(), json!([])).await;
    let mut socket = Socket::open(&stage.relay, "2.0.0", &anon()).await;
    socket.join("1", "realtime:t", marker()).await;
    let (reply, subscribed) = (socket.frame().await, socket.frame().await);
    assert_eq!((&reply[4]["status"], &subscribed[4]["status"]), (&json!("ok"), &json!("ok")));
    for _ in 0..10_000 {
        socket.try_send(broadcast()).await;
    }
    let text = "Too many messages per second";
    let payload = json!({"channel": "t", "extension": "system", "message": text, "status": "error"});
    let mut told = Vec::new();
    while told.len() < 2 {
        let frame = socket.frame().await;
        // One that came in time again, for which there is no channel any more.
        if frame[4]["response"]["reason"] != "unmatched topic" {
            told.push(frame);
        }
    }
    assert_eq!(told[0], json!(["1", null, "realtime:t", "system", payload]));
    assert_eq!(told[1], json!(["1", "1", "realtime:t", "phx_close", {}]));
    assert_eq!(socket.closed().await, (1008, text.to_owned()));
    assert_eq!(stage.changes(&mut good).await, [Value::Null; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn heartbeats_garbage_and_unsolicited_pongs_count_as_messages() {
    let stage = Stage::with("", |settings, _| settings.messages_per_second = Some(1)).await;
    let heartbeat = Message::text(r#"[null,"1","phoenix","heartbeat",{}]"#);
    for message in [heartbeat, Message::text("garbage"), Message::Pong("nobody asked".into())] {
        let mut socket = Socket::open(&stage.relay, "2.0.0", &anon()).await;
        for _ in 0..200 {
            socket.try_send(message.clone()).await;
        }
        assert_eq!(socket.closed().await.0, 1008, "{message:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_joins_a_second_are_refused_in_the_words_of_the_protocol_and_close_the_socket() {
    let stage = Stage::with("", |settings, _| settings.joins_per_second = Some(1)).await;
    let mut socket = Socket::open(&stage.relay, "2.0.0", &anon()).await;
    for number in 0..100 {
        let message = json!(["1", number.to_string(), "realtime:t", "phx_join", {"config": {}}]);
        socket.try_send(Message::text(message.to_string())).await;
    }
    let mut joined = 0;
    let refused = loop {
        let frame = socket.frame().await;
        match frame[4]["status"].as_str() {
            Some("ok") => joined += 1,
            Some(_) => break frame,
            None => {}
        }
    };
    assert!(joined >= 60, "{joined}");
    let reason = "ClientJoinRateLimitReached: Too many joins per second";
    assert_eq!(refused[4], json!({"status": "error", "response": {"reason": reason}}));
    assert_eq!(socket.closed().await, (1001, "Too many joins per second".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn channels_and_bytes_of_a_message_are_bounded_as_it_is_set() {
    let stage = Stage::with("", |settings, _| {
        settings.max_channels = Some(2);
        settings.message_bytes = Some(1000);
    })
    .await;
    let mut socket = Socket::open(&stage.relay, "2.0.0", &anon()).await;
    let mut join = async |topic: &str| {
        socket.join("1", topic, json!({})).await;
        socket.frame().await[4].clone()
    };
    for topic in ["realtime:1", "realtime:2"] {
        assert_eq!(join(topic).await["status"], "ok");
    }
    let reason = "ChannelRateLimitReached: Too many channels";
    assert_eq!(join("realtime:3").await, json!({"status": "error", "response": {"reason": reason}}));
    socket.try_send(Message::text("x".repeat(1001))).await;
    assert_eq!(socket.closed().await.0, 1009);
}

#[tokio::test(flavor = "multi_thread")]
async fn joins_that_wait_for_postgresql_are_taken_no_faster_than_they_end() {
    let database = Database::new().await;
    database.run("create table t (id int); grant select on t to anon; select relay.watch('t')").await;
    let (proxy, url) = Proxy::to_server(&database.url).await;
    let relay = Relay::start(&url).await;
    let mut socket = Socket::open(&relay, "2.0.0", &anon()).await;
    proxy.hold();
    let started = Instant::now();
    for number in 0..12 {
        let filter = format!("id=eq.{number}");
        let binding = json!({"event": "*", "schema": "public", "table": "t", "filter": filter});
        socket.join(&number.to_string(), "realtime:t", json!({"postgres_changes": [binding]})).await;
    }
    socket.try_send(Message::text(r#"[null,"h","phoenix","heartbeat",{}]"#)).await;
    while socket.frame().await[1] != "h" {}
    // The first ones were given up by then.
    assert!(started.elapsed() > Duration::from_secs(5), "{:?}", started.elapsed());
    proxy.release();
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_says_nothing_or_never_ends_a_message_is_closed_and_one_with_heartbeats_stays() {
    let stage = Stage::with("", |settings, _| settings.silence_ms = Some(1000)).await;
    let started = Instant::now();
    let mut lively = Socket::open(&stage.relay, "2.0.0", &anon()).await;
    let mut silent = stalled(stage.relay.address, &anon(), "realtime:t", "marker").await;
    let mut endless = stalled(stage.relay.address, &anon(), "realtime:t", "marker").await;
    let (mut said, mut heard) = (Vec::new(), Vec::new());
    let close = |bytes: &[u8]| bytes.windows(2).any(|pair| pair == 1000_u16.to_be_bytes());
    // The beginning of a text, one byte of it, and on it goes.
    endless.write_all(&[0x01, 0x81, 0, 0, 0, 0, b'[']).await.unwrap();
    let ended = timeout(PATIENCE, async {
        let mut tick = tokio::time::interval(Duration::from_millis(20));
        let (mut is_over, mut is_cut) = (false, false);
        while !(is_over && is_cut) {
            tokio::select! {
                _ = tick.tick() => {
                    let _ = endless.write_all(&[0x00, 0x81, 0, 0, 0, 0, b' ']).await;
                    lively.is_quiet().await;
                }
                read = silent.read_buf(&mut said), if !is_over => is_over = !matches!(read, Ok(1..)),
                read = endless.read_buf(&mut heard), if !is_cut => is_cut = !matches!(read, Ok(1..)) || close(&heard),
            }
        }
    });
    ended.await.expect("both are closed");
    assert!(started.elapsed() >= Duration::from_secs(1) && close(&said) && close(&heard));
    lively.is_quiet().await;
}
