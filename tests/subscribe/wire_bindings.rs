//! The bindings of a channel: which changes each of them gets, in which frames, and what is refused.

use serde_json::{Value, json};

use crate::support::socket::Socket;
use crate::support::stage::Stage;
use crate::transport::wire::{TABLES, VERSIONS, anon, refused, system};

/// Joins `realtime:NAME` and returns the ids of its bindings, once it is subscribed.
async fn subscribe(socket: &mut Socket, name: &str, bindings: Value) -> Vec<u64> {
    let topic = format!("realtime:{name}");
    socket.join("1", &topic, json!({"postgres_changes": bindings})).await;
    let reply = socket.message_frame().await;
    assert_eq!((&reply[3], &reply[4]["status"]), (&json!("phx_reply"), &json!("ok")), "{reply}");
    let subscribed = socket.expected(
        json!("1"),
        Value::Null,
        &topic,
        "system",
        system(name, "postgres_changes", "ok", "Subscribed to PostgreSQL"),
    );
    assert_eq!(socket.frame().await, subscribed);
    let echo = reply[4]["response"]["postgres_changes"].as_array().unwrap();
    echo.iter().map(|entry| entry["id"].as_u64().unwrap()).collect()
}

/// The next frame must be a change: its topic, ids (sorted) and data.
async fn change(socket: &mut Socket) -> (String, Vec<u64>, Value) {
    let frame = socket.message_frame().await;
    assert_eq!(frame[3], "postgres_changes", "{frame}");
    let mut ids: Vec<u64> =
        frame[4]["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
    ids.sort_unstable();
    (frame[2].as_str().unwrap().to_owned(), ids, frame[4]["data"].clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bindings_of_a_channel_share_a_frame_and_channels_have_their_own() {
    let stage = Stage::new(TABLES).await;
    for version in VERSIONS {
        let mut socket = Socket::open(&stage.relay, version, &anon()).await;
        let on = |event: &str, filter: Value| json!({"event": event, "schema": "public", "table": "t", "filter": filter});
        let bindings = json!([
            on("*", Value::Null),
            on("INSERT", Value::Null),
            on("UPDATE", Value::Null),
            on("insert", json!("id=eq.1")),
            on("NONSENSE", json!("id=eq.2")),
            on("*", Value::Null),
            {"event": "DELETE", "table": "t"},
            {"event": "*", "schema": "public", "table": "u", "extra": [1]},
        ]);
        let ids = subscribe(&mut socket, "many", bindings).await;
        assert_eq!(ids[0], ids[5], "equal entries have equal ids");
        let other = subscribe(&mut socket, "other", json!([on("INSERT", Value::Null)])).await;
        assert_eq!(other, [ids[1]], "the same everywhere");
        stage.run("insert into t values (1), (2); update t set v = 'x' where id = 1; delete from t").await;
        let expected = [
            ("INSERT", 1, vec![ids[0], ids[1], ids[3]]),
            ("INSERT", 2, vec![ids[0], ids[1], ids[4]]),
            ("UPDATE", 1, vec![ids[0], ids[2]]),
            ("DELETE", 2, vec![ids[0], ids[4], ids[6]]),
            ("DELETE", 1, vec![ids[0], ids[6]]),
        ];
        let mut of_many = Vec::new();
        let mut of_other = Vec::new();
        for _ in 0..7 {
            let (topic, mut ids, data) = change(&mut socket).await;
            ids.dedup();
            let id = data.get("record").unwrap_or(&data["old_record"])["id"].clone();
            let into = if topic == "realtime:many" { &mut of_many } else { &mut of_other };
            into.push((data["type"].as_str().unwrap().to_owned(), id.as_i64().unwrap(), ids));
        }
        let mut expected = expected.map(|(kind, id, mut ids)| {
            ids.sort_unstable();
            (kind.to_owned(), id, ids)
        });
        // Both rows leave in one statement, in the order of the table.
        expected[3..].sort_by_key(|(_, id, _)| *id);
        of_many[3..].sort_by_key(|(_, id, _)| *id);
        assert_eq!(of_many, expected);
        assert_eq!(
            of_other.iter().map(|(kind, id, _)| (kind.as_str(), *id)).collect::<Vec<_>>(),
            [("INSERT", 1), ("INSERT", 2)]
        );
        socket.is_quiet().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_selection_of_columns_shows_them_and_the_key_in_every_place() {
    let stage = Stage::new(&format!("{TABLES} alter table t replica identity full;")).await;
    let mut socket = Socket::open(&stage.relay, "2.0.0", &anon()).await;
    let select = |columns: Value| json!({"event": "*", "schema": "public", "table": "t", "select": columns});
    let ids =
        subscribe(&mut socket, "t", json!([select(json!(["v"])), select(json!([])), select(json!(["id"]))]))
            .await;
    stage.run("insert into t values (1, 'a', '\\x00')").await;
    stage.run("delete from t").await;
    let mut seen = Vec::new();
    for _ in 0..6 {
        let (_, bound, data) = change(&mut socket).await;
        assert_eq!(bound.len(), 1);
        let names: Vec<&str> =
            data["columns"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
        let place = ids.iter().position(|id| *id == bound[0]).unwrap();
        seen.push((
            data["type"] == "DELETE",
            place,
            data.get("record").unwrap_or(&data["old_record"]).clone(),
            names.join(","),
        ));
    }
    seen.sort_by_key(|(deleted, place, ..)| (*deleted, *place));
    for (n, (deleted, place, image, names)) in seen.iter().enumerate() {
        assert_eq!((*deleted, *place), (n >= 3, n % 3));
        let expected =
            [json!({"id": 1, "v": "a"}), json!({"id": 1, "v": "a", "raw": "00"}), json!({"id": 1})];
        assert_eq!((image, names.as_str()), (&expected[*place], ["id,v", "id,v,raw", "id"][*place]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_to_a_schema_or_to_everything_has_what_is_watched_later_too() {
    let stage = Stage::new(&format!("{TABLES} create schema s; grant usage on schema s to anon;")).await;
    let mut socket = Socket::open(&stage.relay, "2.0.0", &anon()).await;
    let mut ids = Vec::new();
    for (name, binding) in [
        ("schema", json!({"event": "*", "schema": "public"})),
        ("star", json!({"event": "*", "schema": "*"})),
        ("both", json!({"event": "INSERT", "schema": "*", "table": "*"})),
        ("table", json!({"event": "*", "schema": "public", "table": "*"})),
        ("public", json!({"table": "u"})),
        ("named", json!({"event": "*", "schema": "*", "table": "later"})),
        ("absent", json!({"event": "*", "schema": "*", "table": "nowhere"})),
    ] {
        ids.extend(subscribe(&mut socket, name, json!([binding])).await);
    }
    stage
        .run(
            "create table later (id int primary key); create table s.later (id int primary key);
             grant select on later, s.later to anon; select relay.watch('later'), relay.watch('s.later')",
        )
        .await;
    stage.run("insert into later values (1)").await;
    stage.run("insert into s.later values (2)").await;
    stage.run("insert into u values (3)").await;
    let mut topics: Vec<(i64, String)> = Vec::new();
    for _ in 0..13 {
        let (topic, _, data) = change(&mut socket).await;
        topics.push((data["record"]["id"].as_i64().unwrap(), topic.replace("realtime:", "")));
    }
    topics.sort();
    let expected = [
        (1, "both"),
        (1, "named"),
        (1, "schema"),
        (1, "star"),
        (1, "table"),
        (2, "both"),
        (2, "named"),
        (2, "star"),
        (3, "both"),
        (3, "public"),
        (3, "schema"),
        (3, "star"),
        (3, "table"),
    ];
    assert_eq!(topics, expected.map(|(id, topic)| (id, topic.to_owned())));
    socket.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_binding_that_cannot_be_leaves_the_others_and_fails_the_join_only_if_it_waits() {
    let stage = Stage::new(TABLES).await;
    for version in VERSIONS {
        let mut socket = Socket::open(&stage.relay, version, &anon()).await;
        for (n, (bad, text)) in [
            (json!({"event": "*", "schema": "public", "table": "nope"}), "Unable to subscribe to changes with given parameters."),
            (json!({"event": "*"}), "No subscription params provided. Please provide at least a `schema` or `table` to subscribe to: {\"event\":\"*\"}"),
            (json!({"schema": "public", "table": 5}), "No subscription params provided."),
            (json!({"schema": ["public"], "table": "t"}), "No subscription params provided."),
            (json!({"schema": "public", "select": ["id"]}), "Column selection is not supported for wildcard subscriptions."),
            (json!({"table": "t", "select": "id,v"}), "Error parsing `select` params: expected a list of column name strings"),
            (json!({"table": "t", "select": ["id", 5]}), "Error parsing `select` params: expected a list of column name strings"),
            (json!({"table": "t", "select": ["nope"]}), "Unable to subscribe to changes with given parameters. An exception happened"),
            (json!({"table": "t", "filter": "wrong"}), "Error parsing `filter` params: [\"wrong\"]"),
        ]
        .into_iter()
        .enumerate()
        {
            let good = json!({"event": "*", "schema": "public", "table": "u"});
            let config = json!({"postgres_changes": [good, bad], "presence": {"enabled": true}});
            let (name, topic) = (format!("c{n}"), format!("realtime:c{n}"));
            socket.join("1", &topic, config.clone()).await;
            let reply = socket.message_frame().await;
            assert_eq!(reply[4]["status"], "ok", "{reply}");
            let mut echo = bad.clone();
            echo["id"] = reply[4]["response"]["postgres_changes"][1]["id"].clone();
            assert!(echo["id"].as_u64().is_some_and(|id| id > 0), "{reply}");
            assert_eq!(reply[4]["response"]["postgres_changes"][1], echo);
            let state = socket.message_frame().await;
            assert_eq!((&state[3], &state[4]), (&json!("presence_state"), &json!({})), "{state}");
            let told = socket.message_frame().await;
            let message = told[4]["message"].as_str().unwrap().to_owned();
            assert!(message.starts_with(text), "{message}");
            assert_eq!(told[4], system(&name, "postgres_changes", "error", &message));

            let mut waiting = config;
            waiting["postgres_changes_options"] = json!({"wait": true});
            socket.join("2", &format!("realtime:w{n}"), waiting).await;
            let reason = format!("RealtimeDisabledForConfiguration: {message}");
            let answer = socket.expected(json!("2"), json!("2"), &format!("realtime:w{n}"), "phx_reply", refused(&reason));
            assert_eq!(socket.frame().await, answer);
        }
        // Each of the channels has the good half, and those that were refused have nothing.
        stage.run("insert into u values (1); delete from u").await;
        let mut told = Vec::new();
        for _ in 0..18 {
            told.push(change(&mut socket).await.0);
        }
        told.sort();
        assert_eq!(told, (0..18).map(|n| format!("realtime:c{}", n / 2)).collect::<Vec<_>>());
        socket.is_quiet().await;
        for n in 0..9 {
            socket.push(json!("1"), json!("leave"), &format!("realtime:c{n}"), "phx_leave", json!({})).await;
            assert_eq!(
                (&socket.message_frame().await[3], &socket.message_frame().await[3]),
                (&json!("phx_reply"), &json!("phx_close"))
            );
        }
        let waiting = json!({"postgres_changes": [{"table": "u"}], "postgres_changes_options": {"wait": true, "timeout": 5000}});
        socket.join("3", "realtime:good", waiting).await;
        assert_eq!(socket.message_frame().await[4]["status"], "ok");
        assert_eq!(socket.message_frame().await[4]["message"], "Subscribed to PostgreSQL");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_channel_may_have_a_hundred_bindings() {
    let stage = Stage::new(TABLES).await;
    let mut socket = Socket::open(&stage.relay, "2.0.0", &anon()).await;
    let bindings = |n: usize| Value::Array(vec![json!({"event": "*", "table": "u"}); n]);
    assert_eq!(subscribe(&mut socket, "all", bindings(100)).await.len(), 100);
    socket.join("2", "realtime:more", json!({"postgres_changes": bindings(101)})).await;
    let reason = "ChannelRateLimitReached: More than 100 postgres_changes entries";
    assert_eq!(socket.frame().await[4], refused(reason));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_without_a_configuration_names_its_table_by_the_topic_and_gets_events_named_after_operations()
{
    let stage = Stage::new(TABLES).await;
    for version in VERSIONS {
        let mut socket = Socket::open(&stage.relay, version, &anon()).await;
        for (n, topic) in
            ["realtime:public:t", "realtime:public:t:id=eq.1", "realtime:public:*", "realtime:*:t"]
                .into_iter()
                .enumerate()
        {
            let reference = json!(n.to_string());
            let payload = json!({"user_token": anon()});
            socket.push(reference.clone(), reference, topic, "phx_join", payload).await;
            assert_eq!(socket.message_frame().await[4]["status"], "ok", "{topic}");
            assert_eq!(socket.message_frame().await[4]["message"], "Subscribed to PostgreSQL", "{topic}");
            for (write, event, old, new) in [
                (
                    "insert into t values (1, 'a')",
                    "INSERT",
                    Value::Null,
                    json!({"id": 1, "v": "a", "raw": null}),
                ),
                ("update t set v = 'b'", "UPDATE", json!({"id": 1}), json!({"id": 1, "v": "b", "raw": null})),
                ("delete from t", "DELETE", json!({"id": 1}), Value::Null),
            ] {
                stage.run(write).await;
                let frame = socket.message_frame().await;
                assert_eq!((&frame[2], &frame[3]), (&json!(topic), &json!(event)), "{frame}");
                let told = &frame[4];
                assert_eq!((&told["type"], &told["table"]), (&json!(event), &json!("t")), "{frame}");
                assert_eq!((&told["old_record"], &told["record"]), (&old, &new), "{frame}");
            }
            socket.push(json!(n.to_string()), json!("leave"), topic, "phx_leave", json!({})).await;
            assert_eq!(socket.message_frame().await[3], "phx_reply");
            assert_eq!(socket.message_frame().await[3], "phx_close");
        }
        socket.push(json!("9"), json!("9"), "realtime:public:nope", "phx_join", json!({})).await;
        assert_eq!(socket.message_frame().await[4]["status"], "ok");
        assert_eq!(socket.message_frame().await[4]["status"], "error");
        socket.is_quiet().await;
    }
}
