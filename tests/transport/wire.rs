//! The Phoenix wire, frame by frame, in both versions: joins and leaves, replies and their order.

use serde_json::{Value, json};

use crate::support::socket::Socket;
use crate::support::stage::Stage;
use crate::support::token;

/// Every promise of the wire holds in both.
pub const VERSIONS: [&str; 2] = ["1.0.0", "2.0.0"];

/// Two watched tables that anybody may read.
pub const TABLES: &str =
    "create table t (id int primary key, v text, raw bytea); create table u (id int primary key);
    grant select on t, u to anon; select relay.watch('t'), relay.watch('u');";

/// A token without a user.
pub fn anon() -> String {
    token("anon", None, json!({}))
}

fn ok(response: Value) -> Value {
    json!({"status": "ok", "response": response})
}

/// The payload of a reply that refuses.
pub fn refused(reason: &str) -> Value {
    json!({"status": "error", "response": {"reason": reason}})
}

/// The payload of a system message.
pub fn system(channel: &str, extension: &str, status: &str, message: &str) -> Value {
    json!({"channel": channel, "extension": extension, "message": message, "status": status})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_is_answered_then_confirmed_then_served_in_these_very_frames() {
    let stage = Stage::new(TABLES).await;
    for version in VERSIONS {
        let mut socket = Socket::open(&stage.relay, version, &anon()).await;
        let entry = json!({"event": "*", "schema": "public", "table": "t", "filter": "id=gt.0"});
        socket.join("6", "realtime:a \"room\" ü", json!({"postgres_changes": [entry]})).await;
        let reply = socket.frame().await;
        let response = if version == "1.0.0" { &reply["payload"]["response"] } else { &reply[4]["response"] };
        let id = response["postgres_changes"][0]["id"].as_i64().unwrap();
        assert!(0 < id && id < 1 << 31, "{id}");
        let topic = "realtime:a \"room\" ü";
        let mut echo = entry.clone();
        echo["id"] = json!(id);
        let answer = ok(json!({"postgres_changes": [echo]}));
        assert_eq!(reply, socket.expected(json!("6"), json!("6"), topic, "phx_reply", answer));
        let subscribed = system("a \"room\" ü", "postgres_changes", "ok", "Subscribed to PostgreSQL");
        assert_eq!(
            socket.frame().await,
            socket.expected(json!("6"), Value::Null, topic, "system", subscribed)
        );

        stage.run("insert into t values (1, 'a', '\\xdeadbeef')").await;
        stage.run("update t set v = null").await;
        stage.run("delete from t").await;
        let columns = json!([{"name": "id", "type": "int4"}, {"name": "v", "type": "text"}, {"name": "raw", "type": "bytea"}]);
        for expected in [
            json!({"type": "INSERT", "record": {"id": 1, "v": "a", "raw": "deadbeef"}}),
            json!({"type": "UPDATE", "record": {"id": 1, "v": null, "raw": "deadbeef"}, "old_record": {"id": 1}}),
            json!({"type": "DELETE", "old_record": {"id": 1}}),
        ] {
            let frame = socket.frame().await;
            let data = if version == "1.0.0" { &frame["payload"]["data"] } else { &frame[4]["data"] };
            let at = data["commit_timestamp"].as_str().unwrap().to_owned();
            assert_eq!((at.len(), &at[10..11], &at[19..20], &at[23..]), (24, "T", ".", "Z"), "{at}");
            let mut data = expected;
            for (name, value) in [
                ("schema", json!("public")),
                ("table", json!("t")),
                ("commit_timestamp", json!(at)),
                ("columns", columns.clone()),
                ("errors", Value::Null),
            ] {
                data[name] = value;
            }
            let payload = json!({"ids": [id], "data": data});
            assert_eq!(frame, socket.expected(Value::Null, Value::Null, topic, "postgres_changes", payload));
        }
        socket.is_quiet().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn references_are_echoed_in_the_type_in_which_they_came() {
    let stage = Stage::new(TABLES).await;
    for version in VERSIONS {
        let mut socket = Socket::open(&stage.relay, version, &anon()).await;
        for reference in [json!("7"), json!(7), Value::Null, json!("")] {
            socket.push(Value::Null, reference.clone(), "phoenix", "heartbeat", json!({})).await;
            let reply =
                socket.expected(Value::Null, reference.clone(), "phoenix", "phx_reply", ok(json!({})));
            assert_eq!(socket.frame().await, reply);
            socket
                .push(reference.clone(), reference.clone(), "realtime:r", "phx_join", json!({"config": {}}))
                .await;
            let reply = ok(json!({"postgres_changes": []}));
            assert_eq!(
                socket.frame().await,
                socket.expected(reference.clone(), reference.clone(), "realtime:r", "phx_reply", reply)
            );
            socket.push(reference.clone(), json!("leave"), "realtime:r", "phx_leave", json!({})).await;
            let left =
                socket.expected(reference.clone(), json!("leave"), "realtime:r", "phx_reply", ok(json!({})));
            assert_eq!(socket.frame().await, left);
            let closed = socket.expected(reference.clone(), reference, "realtime:r", "phx_close", json!({}));
            assert_eq!(socket.frame().await, closed);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn joining_a_topic_again_closes_the_old_channel_under_its_own_reference() {
    let stage = Stage::new(TABLES).await;
    for version in VERSIONS {
        let mut socket = Socket::open(&stage.relay, version, &anon()).await;
        let bindings = json!({"postgres_changes": [{"event": "INSERT", "schema": "public", "table": "u"}]});
        socket.join("1", "realtime:u", bindings.clone()).await;
        let (first, _system) = (socket.frame().await, socket.frame().await);
        socket.join("2", "realtime:u", bindings).await;
        let mut frames = vec![socket.frame().await, socket.frame().await, socket.frame().await];
        let closed = socket.expected(json!("1"), json!("1"), "realtime:u", "phx_close", json!({}));
        let at = frames.iter().position(|frame| *frame == closed).unwrap_or_else(|| panic!("{frames:?}"));
        frames.remove(at);
        let mut reply = first;
        if version == "1.0.0" {
            reply["ref"] = json!("2");
        } else {
            (reply[0], reply[1]) = (json!("2"), json!("2"));
        }
        assert_eq!(frames[0], reply);
        let subscribed = system("u", "postgres_changes", "ok", "Subscribed to PostgreSQL");
        assert_eq!(frames[1], socket.expected(json!("2"), Value::Null, "realtime:u", "system", subscribed));

        // A leave of the first join comes late: it is answered and the second join stays.
        socket.push(json!("1"), json!("3"), "realtime:u", "phx_leave", json!({})).await;
        assert_eq!(
            socket.frame().await,
            socket.expected(json!("1"), json!("3"), "realtime:u", "phx_reply", ok(json!({})))
        );
        stage.run("insert into u values (1)").await;
        let frame = socket.message_frame().await;
        assert_eq!(frame[4]["data"]["record"], json!({"id": 1}), "once, not for both joins");

        socket.push(json!("2"), json!("4"), "realtime:u", "phx_leave", json!({})).await;
        assert_eq!(
            socket.frame().await,
            socket.expected(json!("2"), json!("4"), "realtime:u", "phx_reply", ok(json!({})))
        );
        assert_eq!(
            socket.frame().await,
            socket.expected(json!("2"), json!("2"), "realtime:u", "phx_close", json!({}))
        );
        let mut other = stage.join(&anon()).await;
        stage.run("delete from u").await;
        assert_eq!(stage.told(&mut other).await, [r#"DELETE {"id":1}"#]);
        socket.is_quiet().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn topics_that_are_not_joined_or_cannot_be_are_told_so() {
    let stage = Stage::new(TABLES).await;
    for version in VERSIONS {
        let mut socket = Socket::open(&stage.relay, version, &anon()).await;
        for (topic, event, answer) in [
            ("room", "phx_join", refused("unmatched topic")),
            ("phoenix", "phx_join", refused("unmatched topic")),
            ("realtime", "phx_join", refused("unmatched topic")),
            ("", "phx_join", refused("unmatched topic")),
            ("realtime:", "phx_join", refused("TopicNameRequired: You must provide a topic name")),
            ("realtime:x", "broadcast", refused("unmatched topic")),
            ("realtime:x", "access_token", refused("unmatched topic")),
            ("realtime:x", "anything", refused("unmatched topic")),
            ("realtime:x", "phx_leave", ok(json!({}))),
        ] {
            socket.push(json!("1"), json!("2"), topic, event, json!({})).await;
            assert_eq!(
                socket.frame().await,
                socket.expected(json!("1"), json!("2"), topic, "phx_reply", answer)
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_succeeds_with_any_settings_of_broadcast_and_presence() {
    let stage = Stage::new(TABLES).await;
    for version in VERSIONS {
        let mut socket = Socket::open(&stage.relay, version, &anon()).await;
        for (n, (payload, presence)) in [
            (json!({"config": {"broadcast": {"self": true, "ack": true}, "presence": {"key": "ann", "enabled": true}, "private": false}}), true),
            (json!({"config": {"presence": {"key": "", "enabled": "true"}, "postgres_changes": []}}), true),
            (json!({"config": {"presence": {"key": 5, "enabled": false}, "postgres_changes": null}}), false),
            (json!({"config": {"presence": "nonsense", "broadcast": 7, "postgres_changes": [null]}}), false),
            (json!({"config": {"postgres_changes": {"event": "*"}}, "version": "realtime-js/2.119.0"}), false),
            (json!({"config": null, "access_token": null}), false),
            (json!({}), false),
            (json!("nonsense"), false),
            (Value::Null, false),
        ]
        .into_iter()
        .enumerate()
        {
            let topic = format!("realtime:{n}");
            socket.push(json!("1"), json!("1"), &topic, "phx_join", payload).await;
            let reply = ok(json!({"postgres_changes": []}));
            assert_eq!(socket.frame().await, socket.expected(json!("1"), json!("1"), &topic, "phx_reply", reply));
            if presence {
                let state = socket.expected(json!("1"), Value::Null, &topic, "presence_state", json!({}));
                assert_eq!(socket.frame().await, state);
            }
        }
        socket.join("1", "realtime:s", json!({"postgres_changes": ["x"]})).await;
        let reply = socket.message_frame().await;
        assert_eq!(reply[4], refused("UnknownErrorOnChannel: expected a map, got: \"x\""));
        socket.is_quiet().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_may_join_a_hundred_channels() {
    let stage = Stage::new(TABLES).await;
    let mut socket = Socket::open(&stage.relay, "2.0.0", &anon()).await;
    for n in 0..100 {
        socket.join("1", &format!("realtime:{n}"), json!({})).await;
        assert_eq!(socket.frame().await[4]["status"], "ok");
    }
    socket.join("2", "realtime:more", json!({})).await;
    let refused = refused("ChannelRateLimitReached: Too many channels");
    assert_eq!(
        socket.frame().await,
        socket.expected(json!("2"), json!("2"), "realtime:more", "phx_reply", refused)
    );
    // One of the hundred may be joined again, and makes room when it leaves.
    socket.join("3", "realtime:7", json!({})).await;
    assert_eq!(socket.frame().await[3], "phx_close");
    assert_eq!(socket.frame().await[4]["status"], "ok");
    socket.push(json!("3"), json!("4"), "realtime:7", "phx_leave", json!({})).await;
    assert_eq!(
        (&socket.frame().await[3], &socket.frame().await[3]),
        (&json!("phx_reply"), &json!("phx_close"))
    );
    socket.join("5", "realtime:more", json!({})).await;
    assert_eq!(socket.frame().await[4]["status"], "ok");
}
