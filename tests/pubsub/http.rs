//! Broadcasts and presence over HTTP.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{VERSIONS, anon, joined};
use crate::support::http::{Answer, get, post, request};
use crate::support::socket::Socket;
use crate::support::stage::Stage;
use crate::support::{PATIENCE, token};

const TOPIC: &str = "realtime:room";
const BATCH: &str = "/realtime/v1/api/broadcast";

fn headers(more: &str) -> String {
    format!("authorization: Bearer {}\r\n{more}", anon())
}

async fn batch(stage: &Stage, messages: Value) -> Answer {
    let body = json!({"messages": messages}).to_string();
    post(stage.relay.address, BATCH, &headers("content-type: application/json\r\n"), body.as_bytes()).await
}

async fn single(stage: &Stage, path: &str, content_type: &str, body: &[u8]) -> Answer {
    let headers = headers(&format!("content-type: {content_type}\r\n"));
    post(stage.relay.address, &format!("{BATCH}/{path}"), &headers, body).await
}

async fn broadcast(socket: &mut Socket, topic: &str) -> Value {
    let frame = socket.message_frame().await;
    assert_eq!(
        (&frame[0], &frame[1], &frame[2], &frame[3]),
        (&Value::Null, &Value::Null, &json!(topic), &json!("broadcast"))
    );
    frame[4].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_reaches_both_versions_in_order_and_is_accepted_without_readers() {
    let stage = Stage::new("").await;
    let messages = json!([
        {"topic": "room", "event": "e", "payload": {"n": 1}},
        {"topic": "nobody", "event": "e", "payload": {}},
        {"topic": "room", "event": "f", "payload": {"n": 2}, "private": false, "id": "7"},
        {"topic": "realtime:room", "event": "prefixed", "payload": {}},
        {"topic": "room", "event": "g", "payload": {}},
    ]);
    for version in VERSIONS {
        let mut socket = joined(&stage.relay, version, TOPIC, json!({})).await;
        let answer = batch(&stage, messages.clone()).await;
        assert_eq!(answer.status, 202);
        assert!(answer.head.contains("access-control-allow-origin: *"), "{}", answer.head);
        assert!(answer.head.contains("content-length: 0"), "{}", answer.head);
        let expected = json!({"type": "broadcast", "event": "e", "payload": {"n": 1}});
        assert_eq!(broadcast(&mut socket, TOPIC).await, expected);
        let expected = json!({"type": "broadcast", "event": "f", "payload": {"n": 2}, "meta": {"id": "7"}});
        assert_eq!(broadcast(&mut socket, TOPIC).await, expected);
        assert_eq!(broadcast(&mut socket, TOPIC).await["event"], "g");
        socket.is_quiet().await;
    }
    assert_eq!(batch(&stage, json!([])).await.status, 202);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_invalid_message_refuses_the_batch_and_says_what_is_wrong_with_each() {
    let stage = Stage::new("").await;
    let mut socket = joined(&stage.relay, "2.0.0", TOPIC, json!({})).await;
    let good = json!({"topic": "room", "event": "e", "payload": {}});
    let large = json!({"topic": "room", "event": "e", "payload": {"x": "x".repeat(3_000_000)}});
    for (message, errors) in [
        (
            json!({"topic": "", "event": "e"}),
            json!({"topic": ["can't be blank"], "payload": ["can't be blank"]}),
        ),
        (json!({"topic": "room", "event": "e", "payload": [1]}), json!({"payload": ["is invalid"]})),
        (large, json!({"payload": ["Payload size exceeds tenant limit"]})),
    ] {
        let answer = batch(&stage, json!([good, message])).await;
        assert_eq!((answer.status, &answer.body), (422, &json!({"errors": {"messages": [{}, errors]}})));
    }
    let headers = headers("content-type: application/json\r\n");
    for (body, status) in [("{", 400), ("", 400), ("{}", 422), ("[]", 422)] {
        assert_eq!(
            post(stage.relay.address, BATCH, &headers, body.as_bytes()).await.status,
            status,
            "{body}"
        );
    }
    socket.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_event_takes_json_and_bytes_by_path() {
    let stage = Stage::new("").await;
    let topic = "realtime:a/b c+é";
    let mut first = joined(&stage.relay, "1.0.0", topic, json!({})).await;
    let mut second = joined(&stage.relay, "2.0.0", topic, json!({})).await;
    let path = "a%2Fb%20c+%C3%A9/events/new%20one";
    for payload in [r#"{"n": 1.50}"#, "[1]", "null"] {
        assert_eq!(
            single(&stage, path, "application/json; charset=utf-8", payload.as_bytes()).await.status,
            202
        );
        let value: Value = serde_json::from_str(payload).unwrap();
        let expected = json!({"type": "broadcast", "event": "new one", "payload": value});
        assert_eq!(broadcast(&mut first, topic).await, expected);
        let frame = second.raw().await.into_data();
        assert_eq!(frame[..5], [4, topic.len() as u8, 7, 0, 1]);
        assert!(frame.ends_with(payload.as_bytes()));
    }
    assert_eq!(single(&stage, path, "application/octet-stream", &[0, 255]).await.status, 202);
    let frame = second.raw().await.into_data();
    assert_eq!((frame[4], &frame[frame.len() - 2..]), (0, &[0, 255][..]));
    first.is_quiet().await;
    // The bare path is the same.
    let path = "/api/broadcast/a%2Fb%20c+%C3%A9/events/e?apikey=x&vsn=2.0.0";
    let json = headers("content-type: application/json\r\n");
    assert_eq!(post(stage.relay.address, path, &json, b"{}").await.status, 202);
    assert_eq!(broadcast(&mut first, topic).await["event"], "e");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_refusal_has_a_status_and_a_reason() {
    let stage = Stage::with("", |settings, _| settings.message_bytes = Some(3_500_000)).await;
    let mut socket = joined(&stage.relay, "2.0.0", TOPIC, json!({})).await;
    let long = format!("{}/events/e", "r".repeat(250));
    let deep = format!("{{\"a\":{}{}}}", "[".repeat(200), "]".repeat(200));
    for (path, content_type, body, status) in [
        ("room/events/e", "text/plain", &b"x"[..], 415),
        ("room/events/e", "", b"{}", 415),
        ("room/events/e", "application/json", b"{", 400),
        ("room/events/e", "application/json", b"", 400),
        ("room/events/e", "application/json", b"\"\xff\"", 400),
        ("room/events/e", "application/json", deep.as_bytes(), 422),
        ("room/events/e", "application/octet-stream", &vec![0; 3_000_001], 422),
        ("room/events/e", "application/octet-stream", &vec![0; 3_500_001], 413),
        (&long, "application/octet-stream", b"x", 422),
        ("room/events/e?private=maybe", "application/json", b"{}", 400),
        ("room/events/e?private=false&private=true", "application/json", b"{}", 400),
        ("%ff/events/e", "application/json", b"{}", 400),
        ("room/events", "application/json", b"{}", 404),
        ("room/e", "application/json", b"{}", 404),
        ("/events/e", "application/json", b"{}", 404),
    ] {
        let answer = single(&stage, path, content_type, body).await;
        assert_eq!(answer.status, status, "{path} {content_type}");
        assert!(answer.body["error"].as_str().is_some_and(|why| !why.is_empty()), "{path}: {answer:?}");
    }
    let answer = get(stage.relay.address, BATCH, &headers("")).await;
    assert_eq!(answer.status, 405);
    // JSON under long names is a text.
    assert_eq!(single(&stage, &long, "application/json", b"{}").await.status, 202);
    socket.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_authorization_falls_back_on_the_key_and_without_any_it_is_401_with_a_reason() {
    let stage = Stage::with("", |settings, _| {
        settings.publishable_key = vec!["sb_publishable_x".to_owned()];
    })
    .await;
    let key = anon();
    let mut socket = joined(&stage.relay, "2.0.0", TOPIC, json!({})).await;
    for (path, headers) in [
        (BATCH.to_owned(), format!("authorization: Bearer {key}\r\n")),
        (BATCH.to_owned(), format!("authorization: \r\napikey: {key}\r\n")),
        (BATCH.to_owned(), format!("authorization: Bearer \r\napikey: {key}\r\n")),
        (BATCH.to_owned(), format!("apikey: {key}\r\n")),
        (BATCH.to_owned(), format!("x-api-key: {key}\r\n")),
        (BATCH.to_owned(), "apikey: sb_publishable_x\r\n".to_owned()),
        (format!("{BATCH}?apikey={key}&vsn=2.0.0"), String::new()),
    ] {
        let body = br#"{"messages":[{"topic":"room","event":"e","payload":{}}]}"#;
        let answer = post(stage.relay.address, &path, &headers, body).await;
        assert_eq!(answer.status, 202, "{path} {headers}");
        assert_eq!(broadcast(&mut socket, TOPIC).await["event"], "e");
    }
    for path in [BATCH.to_owned(), format!("{BATCH}/room/events/e")] {
        for (headers, why) in [
            (String::new(), "API key is missing"),
            ("authorization: Bearer\r\n".to_owned(), "API key is missing"),
            ("authorization: Bearer x.y.z\r\n".to_owned(), "The token provided is not a valid JWT"),
            ("apikey: sb_publishable_other\r\n".to_owned(), ""),
        ] {
            let large = vec![b'x'; 100_000];
            let answer = post(stage.relay.address, &path, &headers, &large).await;
            assert_eq!(answer.status, 401, "{headers}");
            assert!(answer.body["error"].as_str().is_some_and(|told| told.contains(why)), "{answer:?}");
        }
    }
    socket.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_message_never_reaches_the_public_channel_of_its_name() {
    let stage = Stage::new("create policy p on realtime.messages for select to anon using (true)").await;
    let mut public = joined(&stage.relay, "2.0.0", TOPIC, json!({})).await;
    let mut private = joined(&stage.relay, "2.0.0", TOPIC, json!({"private": true})).await;
    for private in [json!(true), json!("true")] {
        let message = json!({"topic": "room", "event": "e", "payload": {}, "private": private});
        assert_eq!(batch(&stage, json!([message])).await.status, 202);
    }
    assert_eq!(single(&stage, "room/events/e?private=true", "application/json", b"{}").await.status, 403);
    let odd = json!([{"topic": "room", "event": "e", "payload": {}, "private": 1}]);
    assert_eq!(batch(&stage, odd).await.status, 422);
    for odd in ["private=1", "private=TRUE", "private="] {
        let path = format!("room/events/e?{odd}");
        assert_eq!(single(&stage, &path, "application/json", b"{}").await.status, 400, "{odd}");
    }
    let mut others = Vec::new();
    for private in [json!("True"), json!("TRUE"), json!(1), json!({})] {
        others.push(joined(&stage.relay, "2.0.0", TOPIC, json!({"private": private})).await);
    }
    public.is_quiet().await;
    // Nor does a public one reach a private channel.
    let message = json!([{"topic": "room", "event": "e", "payload": {}}]);
    assert_eq!(batch(&stage, message).await.status, 202);
    assert_eq!(broadcast(&mut public, TOPIC).await["event"], "e");
    private.is_quiet().await;
    for other in &mut others {
        other.is_quiet().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_sends_too_much_is_refused_and_no_other() {
    let stage = Stage::with("", |settings, _| settings.http_broadcasts_per_second = Some(1)).await;
    let send = async |token: &str, count: usize| {
        let message = json!({"topic": "room", "event": "e", "payload": {}});
        let body = json!({"messages": vec![message; count]}).to_string();
        post(stage.relay.address, BATCH, &format!("authorization: Bearer {token}\r\n"), body.as_bytes()).await
    };
    let (ann, ben) =
        (token("authenticated", Some("ann"), json!({})), token("authenticated", Some("ben"), json!({})));
    let refused = send(&ann, 61).await;
    let why = json!({"message": "Too many messages to broadcast, please reduce the batch size"});
    assert_eq!((refused.status, refused.body), (429, why));
    assert_eq!(send(&ann, 50).await.status, 202);
    let refused = send(&ann, 50).await;
    assert_eq!(
        (refused.status, refused.body),
        (429, json!({"message": "You have exceeded your rate limit"}))
    );
    assert!(refused.head.contains("x-rate-limit: 1") && refused.head.contains("x-rate-limit-remaining: 0"));
    assert_eq!((send(&ben, 50).await.status, send(&anon(), 50).await.status), (202, 202));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_serves_several_broadcasts_chunked_or_not_and_may_be_idle_between_them() {
    let stage = Stage::with("", |settings, _| settings.head_timeout_ms = Some(300)).await;
    let mut socket = joined(&stage.relay, "1.0.0", TOPIC, json!({})).await;
    let mut stream = TcpStream::connect(stage.relay.address).await.unwrap();
    let body = format!(
        r#"{{"messages":[{{"topic":"room","event":"e","payload":{{"x":"{}"}}}}]}}"#,
        "x".repeat(100_000)
    );
    for chunked in [false, true, false] {
        let (length, body) = match chunked {
            true => {
                ("transfer-encoding: chunked".to_owned(), format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len()))
            }
            false => (format!("content-length: {}", body.len()), body.clone()),
        };
        let head = format!("POST {BATCH} HTTP/1.1\r\nhost: relay\r\n{length}\r\n{}\r\n", headers(""));
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(body.as_bytes()).await.unwrap();
        let mut answer = vec![0; 4096];
        let count = timeout(PATIENCE, stream.read(&mut answer)).await.unwrap().unwrap();
        assert!(
            answer[..count].starts_with(b"HTTP/1.1 202"),
            "{}",
            String::from_utf8_lossy(&answer[..count])
        );
        assert_eq!(broadcast(&mut socket, TOPIC).await["event"], "e");
        // Nothing comes, in more time than a head may take.
        assert!(timeout(Duration::from_millis(700), stream.read(&mut answer)).await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn presence_is_read_by_http_with_a_valid_token() {
    let stage = Stage::new("").await;
    let address = stage.relay.address;
    let read = async |query: &str| get(address, &format!("/realtime/v1/presence{query}"), &headers("")).await;
    let empty = read("?topic=room").await;
    assert_eq!((empty.status, empty.body), (200, json!({})));
    let config = json!({"presence": {"key": "ann", "enabled": true}});
    let mut ann = joined(&stage.relay, "2.0.0", "realtime:ro+om é", config).await;
    assert_eq!(ann.message_frame().await[3], "presence_state");
    let payload = json!({"event": "track", "payload": {"n": 1}});
    ann.push(json!("1"), json!("2"), "realtime:ro+om é", "presence", payload).await;
    assert_eq!(ann.message_frame().await[3], "phx_reply");
    let joins = ann.message_frame().await[4]["joins"].clone();
    let found = read("?topic=ro%2Bom%20%C3%A9").await;
    assert_eq!((found.status, found.body), (200, joins));
    assert!(found.head.contains("content-type: application/json") && found.head.contains("no-store"));
    for (query, status) in [("", 400), ("?topic=", 400), ("?topic=a&topic=b", 400), ("?topic=a&x=1", 400)] {
        let refused = read(query).await;
        assert_eq!(refused.status, status, "{query}");
        assert!(refused.body["error"].is_string());
    }
    let refused = get(address, "/realtime/v1/presence?topic=room", "").await;
    assert_eq!(refused.status, 401);
    assert!(refused.body["error"].as_str().unwrap().starts_with("API key is missing"), "{refused:?}");
    let expired = "/realtime/v1/presence?topic=room&apikey=x.y.z";
    assert_eq!(get(address, expired, "").await.status, 401);
    assert_eq!(
        request(address, "POST", "/realtime/v1/presence?topic=room", &headers(""), b"").await.status,
        405
    );
}
