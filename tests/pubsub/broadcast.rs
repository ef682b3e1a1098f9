//! Broadcasts over sockets: who gets them, in which form, in which order, and what happens when they are too many or too large.

use std::time::Instant;

use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use super::{VERSIONS, anon, done, join, joined, refused};
use crate::support::PATIENCE;
use crate::support::http::stalled;
use crate::support::relay::Relay;
use crate::support::socket::Socket;
use crate::support::stage::Stage;

const TOPIC: &str = "realtime:room";

/// A broadcast in the form in which supabase-js sends each of them.
fn push(reference: &str, topic: &str, event: &str, encoding: u8, payload: &[u8]) -> Message {
    let fields = ["1", reference, topic, event, ""];
    let mut frame = vec![3];
    frame.extend(fields.map(|field| field.len() as u8));
    frame.push(encoding);
    frame.extend(fields.concat().as_bytes());
    frame.extend(payload);
    Message::binary(frame)
}

/// The same as members of version 2.0.0 get it.
fn pushed(topic: &str, event: &str, encoding: u8, payload: &[u8]) -> Message {
    let mut frame = vec![4, topic.len() as u8, event.len() as u8, 0, encoding];
    frame.extend(topic.as_bytes());
    frame.extend(event.as_bytes());
    frame.extend(payload);
    Message::binary(frame)
}

fn message(event: &str, payload: Value) -> Value {
    json!({"type": "broadcast", "event": event, "payload": payload})
}

async fn send_text(socket: &mut Socket, reference: Value, payload: Value) {
    socket.push(json!("1"), reference, TOPIC, "broadcast", payload).await;
}

/// The frame of a broadcast as a text of the socket's version.
fn text(socket: &Socket, payload: Value) -> Value {
    socket.expected(Value::Null, Value::Null, TOPIC, "broadcast", payload)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_reaches_both_versions_as_it_was_written_and_not_its_sender() {
    let stage = Stage::new("").await;
    for version in VERSIONS {
        let mut sender = joined(&stage.relay, version, TOPIC, json!({})).await;
        let mut other = joined(&stage.relay, version, "realtime:other", json!({})).await;
        for receiving in VERSIONS {
            let mut receiver = joined(&stage.relay, receiving, TOPIC, json!({})).await;
            for payload in [
                message("e", json!({"n": 1})),
                json!({"event": "x", "more": [null, {"é": "\u{0}"}], "payload": [1, "a"]}),
                json!({}),
            ] {
                send_text(&mut sender, json!("2"), payload.clone()).await;
                assert_eq!(receiver.frame().await, text(&receiver, payload));
            }
            // Numbers, order and repeated names stay as they are: no tree is built of them.
            let raw = r#"{ "b":12345678901234567890.10, "a" : 1e3,"a":2}"#;
            let frame = match version {
                "1.0.0" => format!(r#"{{"topic":"{TOPIC}","event":"broadcast","payload":{raw},"ref":null}}"#),
                _ => format!(r#"["1",null,"{TOPIC}","broadcast",{raw}]"#),
            };
            sender.send(Message::text(frame)).await;
            let found = receiver.raw().await;
            assert!(found.to_text().unwrap().contains(raw), "{found}");
        }
        sender.is_quiet().await;
        other.is_quiet().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_binary_broadcast_of_json_reaches_version_2_as_bytes_and_version_1_as_text() {
    let stage = Stage::new("").await;
    let mut sender = joined(&stage.relay, "2.0.0", TOPIC, json!({})).await;
    let mut first = joined(&stage.relay, "1.0.0", TOPIC, json!({})).await;
    let mut second = joined(&stage.relay, "2.0.0", TOPIC, json!({})).await;
    for payload in [r#"{"n": 1.50}"#, "[1]", "null", r#""é""#] {
        sender.send(push("2", TOPIC, "ping", 1, payload.as_bytes())).await;
        assert_eq!(second.raw().await, pushed(TOPIC, "ping", 1, payload.as_bytes()));
        let value: Value = serde_json::from_str(payload).unwrap();
        assert_eq!(first.frame().await, text(&first, message("ping", value)));
    }
    sender.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_reach_version_2_and_never_a_socket_of_version_1() {
    let stage = Stage::new("").await;
    let mut sender = joined(&stage.relay, "2.0.0", TOPIC, json!({"broadcast": {"ack": true}})).await;
    let mut first = joined(&stage.relay, "1.0.0", TOPIC, json!({})).await;
    let mut second = joined(&stage.relay, "2.0.0", TOPIC, json!({})).await;
    for payload in [&[0, 255, 1][..], b"", b"{}"] {
        sender.send(push("2", TOPIC, "blob", 0, payload)).await;
        assert_eq!(sender.frame().await, done(&sender, TOPIC, "2"));
        assert_eq!(second.raw().await, pushed(TOPIC, "blob", 0, payload));
    }
    first.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn self_and_ack_are_of_the_channel_and_the_own_copy_comes_before_the_ack() {
    let stage = Stage::new("").await;
    for version in VERSIONS {
        for (own, ack) in [(false, false), (false, true), (true, false), (true, true)] {
            let config = json!({"broadcast": {"self": own, "ack": ack}});
            let mut socket = joined(&stage.relay, version, TOPIC, config).await;
            let mut tab = joined(&stage.relay, version, TOPIC, json!({})).await;
            let payload = message("e", json!({"own": own, "ack": ack}));
            send_text(&mut socket, json!("7"), payload.clone()).await;
            if own {
                assert_eq!(socket.frame().await, text(&socket, payload.clone()));
            }
            if ack {
                assert_eq!(socket.frame().await, done(&socket, TOPIC, "7"));
            }
            socket.is_quiet().await;
            assert_eq!(tab.frame().await, text(&tab, payload));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broadcast_with_a_stale_or_no_reference_of_its_join_is_delivered() {
    let stage = Stage::new("").await;
    for version in VERSIONS {
        let mut sender = joined(&stage.relay, version, TOPIC, json!({})).await;
        let mut receiver = joined(&stage.relay, version, TOPIC, json!({})).await;
        for join_ref in [json!("0"), Value::Null, json!(5)] {
            let payload = message("e", json!({"ref": join_ref}));
            sender.push(join_ref, Value::Null, TOPIC, "broadcast", payload.clone()).await;
            assert_eq!(receiver.frame().await, text(&receiver, payload));
        }
        // One that is sent before the join is answered, too.
        let mut hasty = Socket::open(&stage.relay, version, &anon()).await;
        let marker = json!({"postgres_changes": [{"event": "*", "schema": "public", "table": "marker"}]});
        hasty.join("1", TOPIC, marker).await;
        send_text(&mut hasty, json!("2"), message("hasty", json!({}))).await;
        assert_eq!(receiver.frame().await, text(&receiver, message("hasty", json!({}))));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_sends_without_waiting_arrive_in_order() {
    let stage = Stage::new("").await;
    let mut sender = joined(&stage.relay, "2.0.0", TOPIC, json!({"broadcast": {"self": true}})).await;
    let mut first = joined(&stage.relay, "1.0.0", TOPIC, json!({})).await;
    let mut second = joined(&stage.relay, "2.0.0", TOPIC, json!({})).await;
    for n in 0..100 {
        match n % 2 {
            0 => send_text(&mut sender, Value::Null, message("n", json!({"n": n}))).await,
            _ => sender.send(push("", TOPIC, "n", 1, format!("{{\"n\":{n}}}").as_bytes())).await,
        }
    }
    for socket in [&mut sender, &mut first, &mut second] {
        for n in 0..100 {
            let frame = socket.raw().await;
            let bytes = frame.clone().into_data();
            let (start, end) = (format!("{{\"n\":{n}}}"), String::from_utf8_lossy(&bytes));
            assert!(end.contains(&start), "{n}: {end}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn large_sends_without_waiting_arrive_in_order_and_close_no_reader_that_reads() {
    let stage = Stage::new("").await;
    let mut sender = joined(&stage.relay, "2.0.0", TOPIC, json!({})).await;
    let mut reader = joined(&stage.relay, "2.0.0", TOPIC, json!({})).await;
    let reading = tokio::spawn(async move {
        for n in 0..60_u8 {
            let bytes = reader.raw().await.into_data();
            assert_eq!((bytes.len(), bytes.last()), (500_000 + 5 + TOPIC.len() + 1, Some(&n)));
        }
        reader
    });
    for n in 0..60_u8 {
        sender.send(push("", TOPIC, "e", 0, &vec![n; 500_000])).await;
    }
    reading.await.unwrap().is_quiet().await;
    sender.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_reads_nothing_is_closed_alone_and_delays_the_others_only_once() {
    let stage = Stage::with("", |settings, _| settings.send_buffer_bytes = Some(4096)).await;
    let mut sender = joined(&stage.relay, "2.0.0", TOPIC, json!({"broadcast": {"ack": true}})).await;
    let mut reader = joined(&stage.relay, "2.0.0", TOPIC, json!({})).await;
    let _stalled = stalled(stage.relay.address, &anon(), TOPIC, "marker").await;
    let full = || stage.relay.figure("relay_sessions_closed_full_total") == 1;
    crate::support::eventually("three are connected", || async {
        (stage.relay.session_count() == 3).then_some(())
    })
    .await;
    let started = Instant::now();
    while !full() {
        assert!(started.elapsed() < PATIENCE, "it is never closed");
        sender.send(push("2", TOPIC, "e", 0, &[7; 50_000])).await;
        assert_eq!(sender.frame().await, done(&sender, TOPIC, "2"));
        reader.raw().await;
    }
    reader.is_quiet().await;
    sender.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oversize_broadcast_is_refused_and_the_channel_lives() {
    let stage = Stage::new("").await;
    for version in VERSIONS {
        for ack in [true, false] {
            let mut socket =
                joined(&stage.relay, version, TOPIC, json!({"broadcast": {"ack": ack, "self": true}})).await;
            let large = message("e", json!({"x": "x".repeat(3_000_600)}));
            send_text(&mut socket, json!("2"), large).await;
            let error = json!({"error": "payload_size_exceeded"});
            assert_eq!(socket.frame().await, refused(&socket, TOPIC, "2", error.clone()));
            if version == "2.0.0" {
                socket.send(push("3", TOPIC, "e", 0, &vec![0; 3_000_501])).await;
                assert_eq!(socket.frame().await, refused(&socket, TOPIC, "3", error));
                socket.send(push("", TOPIC, "e", 0, &vec![0; 3_000_000])).await;
                assert_eq!(socket.raw().await.into_data().len(), 3_000_000 + 5 + TOPIC.len() + 1);
                if ack {
                    socket.frame().await;
                }
            }
            send_text(&mut socket, json!("4"), message("e", json!({}))).await;
            assert_eq!(socket.frame().await, text(&socket, message("e", json!({}))));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn version_1_gets_no_frame_above_a_mebibyte_but_is_told() {
    let stage = Stage::new("").await;
    let mut sender = joined(&stage.relay, "2.0.0", TOPIC, json!({})).await;
    let mut first = joined(&stage.relay, "1.0.0", TOPIC, json!({})).await;
    let mut second = joined(&stage.relay, "2.0.0", TOPIC, json!({})).await;
    let payload = |bytes: usize| format!("{{\"x\":\"{}\"}}", "x".repeat(bytes));
    for (bytes, fits) in [(1_000_000, true), (1_048_576, false), (2_000_000, false)] {
        sender.send(push("", TOPIC, "e", 1, payload(bytes).as_bytes())).await;
        let frame = first.frame().await;
        if fits {
            assert_eq!(frame["event"], "broadcast");
        } else {
            assert_eq!(
                (&frame["event"], &frame["payload"]["extension"]),
                (&json!("system"), &json!("broadcast"))
            );
            // As an error it would make realtime-py leave the channel.
            assert_eq!(
                (&frame["payload"]["status"], &frame["payload"]["channel"]),
                (&json!("ok"), &json!("room"))
            );
            let told = frame["payload"]["message"].as_str().unwrap();
            assert!(told.starts_with("Broadcast not delivered: ") && told.contains("1048576"), "{told}");
        }
        assert_eq!(second.raw().await, pushed(TOPIC, "e", 1, payload(bytes).as_bytes()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_valid_broadcast_is_refused_and_passed_on_to_no_member() {
    let stage = Stage::new("").await;
    let nested = |depth: usize| format!("{{\"a\":{}{}}}", "[".repeat(depth), "]".repeat(depth));
    for version in VERSIONS {
        let mut sender = joined(&stage.relay, version, TOPIC, json!({})).await;
        let mut receiver = joined(&stage.relay, version, TOPIC, json!({})).await;
        for payload in ["7", "null", "[]", "\"x\"", &nested(121), &nested(50_000)] {
            let frame = match version {
                "1.0.0" => format!(
                    r#"{{"topic":"{TOPIC}","event":"broadcast","payload":{payload},"ref":"2","join_ref":"1"}}"#
                ),
                _ => format!(r#"["1","2","{TOPIC}","broadcast",{payload}]"#),
            };
            sender.send(Message::text(frame)).await;
            let answer = sender.message_frame().await;
            assert_eq!((&answer[1], &answer[4]["status"]), (&json!("2"), &json!("error")), "{answer}");
        }
        for broken in ["{", "{\"a\":1]}", "{\"a\":tru}", "{} {}"] {
            sender.send(Message::text(format!(r#"["1","2","{TOPIC}","broadcast",{broken}]"#))).await;
            assert_eq!(sender.message_frame().await[3], "system");
        }
        receiver.is_quiet().await;
        let topic = "realtime:not joined";
        sender.push(json!("1"), json!("2"), topic, "broadcast", message("e", json!({}))).await;
        let reason = json!({"reason": "unmatched topic"});
        assert_eq!(sender.frame().await, refused(&sender, topic, "2", reason));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_above_255_bytes_carry_json_as_text() {
    let stage = Stage::new("").await;
    let topic = format!("realtime:{}", "r".repeat(300));
    let mut sender = joined(&stage.relay, "1.0.0", &topic, json!({})).await;
    let mut second = joined(&stage.relay, "2.0.0", &topic, json!({})).await;
    let payload = message(&"e".repeat(300), json!({"n": 1}));
    sender.push(json!("1"), Value::Null, &topic, "broadcast", payload.clone()).await;
    let expected = second.expected(Value::Null, Value::Null, &topic, "broadcast", payload);
    assert_eq!(second.frame().await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_comes_after_a_leave_and_each_topic_is_of_its_own() {
    let stage = Stage::new("").await;
    for version in VERSIONS {
        let mut sender = joined(&stage.relay, version, TOPIC, json!({})).await;
        let mut receiver = joined(&stage.relay, version, TOPIC, json!({})).await;
        join(&mut receiver, "realtime:Room", json!({})).await;
        receiver.push(json!("1"), json!("2"), TOPIC, "phx_leave", json!({})).await;
        assert_eq!(receiver.message_frame().await[3], "phx_reply");
        assert_eq!(receiver.message_frame().await[3], "phx_close");
        send_text(&mut sender, Value::Null, message("e", json!({}))).await;
        sender.is_quiet().await;
        receiver.is_quiet().await;
        // A rejoin of the topic is one membership, not two.
        join(&mut receiver, TOPIC, json!({})).await;
        receiver.join("9", TOPIC, json!({})).await;
        assert_eq!(receiver.message_frame().await[3], "phx_close");
        assert_eq!(receiver.message_frame().await[3], "phx_reply");
        send_text(&mut sender, Value::Null, message("e", json!({}))).await;
        assert_eq!(receiver.frame().await, text(&receiver, message("e", json!({}))));
        receiver.is_quiet().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_channel_and_the_public_one_of_the_same_name_are_apart() {
    let stage = Stage::new("create policy p on realtime.messages for all to anon using (true)").await;
    let mut public = joined(&stage.relay, "2.0.0", TOPIC, json!({})).await;
    let mut private =
        joined(&stage.relay, "2.0.0", TOPIC, json!({"private": true, "broadcast": {"ack": true}})).await;
    send_text(&mut private, json!("2"), message("e", json!({}))).await;
    assert_eq!(private.frame().await[4]["status"], "ok");
    public.is_quiet().await;
    send_text(&mut public, json!("2"), message("e", json!({}))).await;
    public.is_quiet().await;
    private.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deliveries_do_not_count_against_the_reader_and_one_who_sends_too_much_is_closed_alone() {
    let stage = Stage::with("", |settings, _| settings.messages_per_second = Some(2)).await;
    let mut reader = joined(&stage.relay, "2.0.0", TOPIC, json!({})).await;
    let mut senders = Vec::new();
    for _ in 0..5 {
        senders.push(joined(&stage.relay, "2.0.0", TOPIC, json!({})).await);
    }
    for sender in &mut senders {
        for _ in 0..130 {
            send_text(sender, Value::Null, message("e", json!({}))).await;
        }
        send_text(sender, Value::Null, message("e", json!({}))).await;
        // The broadcasts of the earlier ones are before it.
        let told = loop {
            let frame = sender.frame().await;
            if frame[3] == "system" {
                break frame;
            }
        };
        assert_eq!(told[4]["message"], "Too many messages per second");
        assert_eq!(sender.frame().await[3], "phx_close");
    }
    reader.push(Value::Null, json!("last"), "phoenix", "heartbeat", json!({})).await;
    let mut received = 0;
    while reader.frame().await[3] == "broadcast" {
        received += 1;
    }
    assert!(received >= 5 * 119, "{received}");
    reader.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn broadcasts_and_presence_need_no_database() {
    let relay = Relay::unready("postgres://postgres@127.0.0.1:1/nowhere", |_| {}).await;
    let mut sender = joined(&relay, "2.0.0", TOPIC, json!({})).await;
    let mut reader = joined(&relay, "2.0.0", TOPIC, json!({"presence": {"enabled": true}})).await;
    assert_eq!(reader.message_frame().await[3], "presence_state");
    send_text(&mut sender, Value::Null, message("e", json!({}))).await;
    assert_eq!(reader.frame().await, text(&reader, message("e", json!({}))));
    sender.push(json!("1"), json!("2"), TOPIC, "presence", json!({"event": "track"})).await;
    assert_eq!(reader.message_frame().await[3], "presence_diff");
    relay.stop().await;
}
