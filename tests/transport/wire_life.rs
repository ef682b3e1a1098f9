//! The life of a channel: tokens that change what is seen, tokens that are no good, tokens that end.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use crate::support::client::Client;
use crate::support::socket::Socket;
use crate::support::stage::Stage;
use crate::support::{ANN, BOB, SECRET, token, token_for};

const TABLE: &str =
    "create table t (id int primary key, owner uuid); alter table t enable row level security;
    create policy own on t for select to authenticated using (owner = (select auth.uid()));
    grant select on t to authenticated, anon; select relay.watch('t');";

fn user(sub: &str) -> String {
    token("authenticated", Some(sub), json!({}))
}

/// A token whose time was over `ago` seconds ago.
fn expired(ago: u64) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    token("authenticated", Some(ANN), json!({"exp": now - ago}))
}

/// Sends a token to the channel `realtime:stage`.
async fn refresh(client: &mut Client, token: Value) {
    client.push(Some("1"), "realtime:stage", "access_token", json!({"access_token": token})).await;
}

fn system(status: &str, extension: &str, message: &str) -> Value {
    let payload = json!({"channel": "stage", "extension": extension, "message": message, "status": status});
    json!(["1", null, "realtime:stage", "system", payload])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_token_changes_what_is_seen_and_is_confirmed() {
    let stage = Stage::new(TABLE).await;
    let mut client = stage.join(&user(ANN)).await;
    let write = async |id: i32| {
        stage.run(&format!("insert into t values ({id}, '{ANN}'), ({id} + 1, '{BOB}')")).await;
    };
    write(10).await;
    assert_eq!(stage.told(&mut client).await, [format!(r#"INSERT {{"id":10,"owner":"{ANN}"}}"#)]);
    refresh(&mut client, json!(user(BOB))).await;
    assert_eq!(client.frame().await, system("ok", "postgres_changes", "Subscribed to PostgreSQL"));
    write(20).await;
    assert_eq!(stage.told(&mut client).await, [format!(r#"INSERT {{"id":21,"owner":"{BOB}"}}"#)]);
    // A role without a policy, and one without any right: the channel stays and shows nothing.
    refresh(&mut client, json!(token("anon", None, json!({})))).await;
    assert_eq!(client.frame().await, system("ok", "postgres_changes", "Subscribed to PostgreSQL"));
    write(30).await;
    assert_eq!(stage.told(&mut client).await, [""; 0]);
    stage.run("create role $DB_none; revoke select on marker from public; grant select on marker to authenticated, anon").await;
    let mut narrow = Client::connect(&stage.relay, &user(ANN)).await;
    narrow.subscribe("realtime:stage", json!([{"event": "*", "schema": "public", "table": "t"}])).await;
    refresh(&mut narrow, json!(token(&format!("{}_none", stage.name), None, json!({})))).await;
    let refused = narrow.frame().await;
    assert_eq!((&refused[3], &refused[4]["status"]), (&json!("system"), &json!("error")), "{refused}");
    write(40).await;
    assert_eq!(stage.told(&mut client).await, [""; 0]);
    refresh(&mut narrow, json!(user(ANN))).await;
    assert_eq!(narrow.frame().await, system("ok", "postgres_changes", "Subscribed to PostgreSQL"));
    write(50).await;
    assert_eq!(narrow.change().await["record"]["id"], 50, "nothing of the time in between");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_says_nothing_new_changes_nothing() {
    let stage = Stage::new(TABLE).await;
    let token = user(ANN);
    let mut client = stage.join(&token).await;
    for same in [json!(token), Value::Null, json!("sb_publishable_x"), json!(5)] {
        refresh(&mut client, same).await;
    }
    client.push(Some("1"), "realtime:stage", "access_token", json!({})).await;
    client.push(None, "phoenix", "heartbeat", json!({})).await;
    assert_eq!(client.frame().await[3], "phx_reply", "no confirmation came");
    stage.run(&format!("insert into t values (1, '{ANN}')")).await;
    assert_eq!(stage.told(&mut client).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_no_good_closes_the_channel_and_nothing_comes_after() {
    let stage = Stage::new(TABLE).await;
    let good = user(ANN);
    let (unsigned, _) = good.rsplit_once('.').unwrap();
    let without = |claims: Value| {
        relay::auth::verifier::mint(
            SECRET,
            claims.as_object().unwrap(),
            0,
            Duration::from_secs(4_000_000_000),
        )
        .unwrap()
    };
    for (bad, text) in [
        ("garbage".to_owned(), "The token provided is not a valid JWT"),
        (String::new(), "The token provided is not a valid JWT"),
        (format!("{unsigned}.AAAA"), "Failed to validate JWT signature"),
        (expired(5), "Token has expired 5 seconds ago"),
        (without(json!({"sub": ANN})), "Fields `role` and `exp` are required in JWT"),
    ] {
        let mut client = stage.join(&good).await;
        client.subscribe("realtime:other", json!([{"event": "*", "schema": "public", "table": "t"}])).await;
        refresh(&mut client, json!(bad)).await;
        let told = client.frame().await;
        let message = told[4]["message"].as_str().unwrap().to_owned();
        // More seconds may have gone by since the token was made.
        let is_late = (6..60).any(|seconds| message == text.replace('5', &seconds.to_string()));
        assert!(message == text || is_late, "{message}");
        assert_eq!(told, system("error", "system", &message));
        assert_eq!(client.frame().await, json!(["1", "1", "realtime:stage", "phx_close", {}]));
        stage.run(&format!("insert into t values (1, '{ANN}'); delete from t")).await;
        for _ in 0..2 {
            assert_eq!(client.frame().await[2], "realtime:other", "the socket and its other channel stay");
        }
        client.push(Some("1"), "realtime:stage", "access_token", json!({"access_token": good})).await;
        assert_eq!(client.frame().await[4]["response"]["reason"], "unmatched topic");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_shows_its_own_token_or_has_the_one_of_the_connection() {
    let stage = Stage::new(TABLE).await;
    let good = user(BOB);
    let (unsigned, _) = good.rsplit_once('.').unwrap();
    let mut socket = Socket::open(&stage.relay, "2.0.0", &user(ANN)).await;
    for (bad, reason) in [
        ("abc".to_owned(), "MalformedJWT: The token provided is not a valid JWT"),
        (String::new(), "MalformedJWT: The token provided is not a valid JWT"),
        (format!("{unsigned}.AAAA"), "JwtSignatureError: Failed to validate JWT signature"),
        (
            format!("{}.", unsigned.replacen("eyJ", "fyJ", 1)),
            "MalformedJWT: The token provided is not a valid JWT",
        ),
        (token("", None, json!({})), "InvalidJWTToken: Fields `role` and `exp` are required in JWT"),
        (token("anon", None, json!({"exp": "soon"})), "InvalidJWTToken: Token expiration time is invalid"),
    ] {
        socket
            .push(
                json!("1"),
                json!("1"),
                "realtime:t",
                "phx_join",
                json!({"config": {}, "access_token": bad}),
            )
            .await;
        let payload = json!({"status": "error", "response": {"reason": reason}});
        assert_eq!(socket.frame().await, json!(["1", "1", "realtime:t", "phx_reply", payload]), "{bad}");
    }
    let bindings = json!({"postgres_changes": [{"event": "INSERT", "schema": "public", "table": "t"}]});
    for (topic, payload) in [
        ("realtime:ann", json!({"config": bindings})),
        ("realtime:null", json!({"config": bindings, "access_token": null})),
        ("realtime:opaque", json!({"config": bindings, "access_token": "sb_publishable_x"})),
        ("realtime:bob", json!({"config": bindings, "access_token": good})),
        ("realtime:legacy", json!({"config": bindings, "user_token": good, "access_token": "garbage"})),
        ("realtime:both", json!({"config": bindings, "user_token": null, "access_token": good})),
    ] {
        socket.push(json!("1"), json!("1"), topic, "phx_join", payload).await;
        assert_eq!(socket.frame().await[4]["status"], "ok", "{topic}");
        assert_eq!(socket.frame().await[4]["message"], "Subscribed to PostgreSQL");
    }
    stage.run(&format!("insert into t values (1, '{ANN}'), (2, '{BOB}')")).await;
    let mut seen = Vec::new();
    for _ in 0..6 {
        let frame = socket.frame().await;
        let id = frame[4]["data"]["record"]["id"].as_i64().unwrap();
        seen.push((id, frame[2].as_str().unwrap().replace("realtime:", "")));
    }
    seen.sort();
    let expected = [(1, "ann"), (1, "null"), (1, "opaque"), (2, "bob"), (2, "both"), (2, "legacy")];
    assert_eq!(seen, expected.map(|(id, name)| (id, name.to_owned())));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_ends_closes_its_channel_at_that_second_and_nothing_comes_after() {
    let stage = Stage::new(TABLE).await;
    let short = || token_for("authenticated", Some(ANN), json!({}), Duration::from_secs(3));
    let made = Instant::now();
    // The connection's own token ends too, which is that of every channel without one.
    let mut client = stage.join(&short()).await;
    let other = json!({
        "access_token": user(ANN),
        "config": {"postgres_changes": [{"event": "*", "schema": "public", "table": "t"}]},
    });
    client.push(Some("2"), "realtime:long", "phx_join", other).await;
    let (_reply, subscribed) = (client.frame().await, client.frame().await);
    assert_eq!(subscribed[4]["status"], "ok");
    stage.run(&format!("insert into t values (1, '{ANN}')")).await;
    let mut topics = [client.frame().await[2].clone(), client.frame().await[2].clone()];
    topics.sort_by_key(Value::to_string);
    assert_eq!(topics, ["realtime:long", "realtime:stage"]);
    assert_eq!(client.frame().await, system("error", "system", "Token has expired 0 seconds ago"));
    assert_eq!(client.frame().await, json!(["1", "1", "realtime:stage", "phx_close", {}]));
    let passed = made.elapsed();
    assert!(Duration::from_secs(1) < passed && passed < Duration::from_secs(5), "{passed:?}");
    stage.run(&format!("insert into t values (2, '{ANN}'), (3, '{ANN}')")).await;
    for id in [2, 3] {
        let frame = client.frame().await;
        assert_eq!((&frame[2], &frame[4]["data"]["record"]["id"]), (&json!("realtime:long"), &json!(id)));
    }
    // A client with only the connection's token can't join any more; the socket itself stays.
    client.push(Some("3"), "realtime:late", "phx_join", json!({"config": {}})).await;
    let refused = client.frame().await;
    let reason = refused[4]["response"]["reason"].as_str().unwrap_or_else(|| panic!("{refused}"));
    assert!(
        reason.starts_with("InvalidJWTToken: Token has expired ") && reason.ends_with(" seconds ago"),
        "{reason}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_in_time_carries_a_channel_past_the_end_of_its_first_token() {
    let stage = Stage::new(TABLE).await;
    let made = Instant::now();
    let mut client =
        stage.join(&token_for("authenticated", Some(ANN), json!({}), Duration::from_secs(2))).await;
    refresh(&mut client, json!(user(ANN))).await;
    assert_eq!(client.frame().await, system("ok", "postgres_changes", "Subscribed to PostgreSQL"));
    tokio::time::sleep_until(made + Duration::from_millis(3500)).await;
    stage.run(&format!("insert into t values (1, '{ANN}')")).await;
    assert_eq!(client.frame().await[3], "postgres_changes", "neither an end nor a close came before");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_comes_to_a_channel_after_the_reply_to_its_leave_however_much_is_on_its_way() {
    let stage = Stage::new(TABLE).await;
    let config = json!({"postgres_changes": [{"event": "*", "schema": "public", "table": "t"}]});
    let writer = stage.database.connect().await;
    let writing = tokio::spawn(async move {
        for id in 1.. {
            writer.batch_execute(&format!("insert into t values ({id}, '{ANN}')")).await.unwrap();
        }
    });
    for _ in 0..20 {
        let mut socket = Socket::open(&stage.relay, "2.0.0", &user(ANN)).await;
        socket.join("1", "realtime:t", config.clone()).await;
        while socket.frame().await[3] != "postgres_changes" {}
        socket.push(json!("1"), json!("2"), "realtime:t", "phx_leave", json!({})).await;
        let reply = loop {
            let frame = socket.frame().await;
            if frame[3] != "postgres_changes" {
                break frame;
            }
        };
        assert_eq!((&reply[1], &reply[3]), (&json!("2"), &json!("phx_reply")));
        assert_eq!(socket.frame().await, json!(["1", "1", "realtime:t", "phx_close", {}]));
        socket.is_quiet().await;
    }
    writing.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_written_upon_the_reply_to_a_join_is_delivered() {
    let stage = Stage::new(TABLE).await;
    let config = json!({"postgres_changes": [{"event": "*", "schema": "public", "table": "t"}]});
    for id in 1..=30 {
        let mut socket = Socket::open(&stage.relay, "2.0.0", &user(ANN)).await;
        socket.join("1", "realtime:t", config.clone()).await;
        assert_eq!(socket.frame().await[3], "phx_reply");
        stage.run(&format!("insert into t values ({id}, '{ANN}')")).await;
        assert_eq!(socket.frame().await[3], "system");
        assert_eq!(socket.frame().await[4]["data"]["record"]["id"], id);
    }
}
