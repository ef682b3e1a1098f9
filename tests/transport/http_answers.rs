//! What every answer has, whom it is for, and what is asked for in words that are not known.

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::http::{Events, get, metrics_path};
use crate::support::stage::Stage;
use crate::support::{PATIENCE, eventually, token};

const CHANGES: &str = "/realtime/v1/changes?table=marker";

fn anon() -> String {
    token("anon", None, json!({}))
}

/// The answer up to `end`, for a client that closes its side first, or does not.
async fn heard(stage: &Stage, request: &str, closes: bool, end: &str) -> String {
    let mut stream = TcpStream::connect(stage.relay.address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    if closes {
        stream.shutdown().await.unwrap();
    }
    let mut heard = Vec::new();
    let all = async {
        while !String::from_utf8_lossy(&heard).contains(end) {
            if stream.read_buf(&mut heard).await.unwrap() == 0 {
                break;
            }
        }
    };
    timeout(PATIENCE, all).await.expect("it is answered");
    String::from_utf8(heard).unwrap()
}

fn request(method: &str, path: &str, headers: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nhost: relay\r\n{headers}\r\n")
}

async fn head(stage: &Stage, method: &str, path: &str, headers: &str) -> String {
    heard(stage, &request(method, path, headers), false, "\r\n\r\n").await.to_ascii_lowercase()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_answer_may_be_kept_by_anybody_on_its_way() {
    let stage = Stage::with("", |settings, _| {
        settings.allowed_origin = vec!["https://app.example".to_owned()];
        settings.most_rows = Some(1);
        settings.connections_per_address = Some(5);
    })
    .await;
    let key = format!("&apikey={}", anon());
    let cursor = stage.database.value("select relay.cursor()").await;
    stage.run("insert into marker default values; insert into marker default values").await;
    let socket = "/realtime/v1/websocket";
    for (method, path, headers, status) in [
        ("GET", format!("{CHANGES}{key}&filter=id=eq.1"), "", 200),
        ("GET", format!("{CHANGES}{key}&since={cursor}"), "", 200),
        ("GET", format!("{CHANGES}{key}"), "accept: text/event-stream\r\n", 200),
        ("GET", format!("{CHANGES}{key}"), "", 413),
        ("GET", format!("{CHANGES}{key}&since=nothing"), "", 400),
        ("GET", CHANGES.to_owned(), "", 401),
        ("GET", format!("{CHANGES}{key}"), "origin: https://evil.example\r\n", 403),
        ("POST", format!("{CHANGES}{key}"), "", 405),
        ("OPTIONS", CHANGES.to_owned(), "", 204),
        ("GET", "/nowhere".to_owned(), "", 404),
        ("GET", "/healthcheck".to_owned(), "", 200),
        ("GET", "/livez".to_owned(), "", 200),
        ("GET", "/readyz".to_owned(), "", 200),
        ("GET", "/metrics".to_owned(), "", 401),
        ("GET", format!("/metrics?x=1{key}"), "", 403),
        ("GET", metrics_path(), "", 200),
        ("POST", metrics_path(), "", 405),
        ("GET", socket.to_owned(), "", 400),
        ("GET", format!("{socket}?vsn=7{key}"), "", 400),
    ] {
        let head = head(&stage, method, &path, headers).await;
        assert!(head.starts_with(&format!("http/1.1 {status} ")), "{method} {path}: {head}");
        assert_eq!(head.matches("cache-control: no-store\r\n").count(), 1, "{method} {path}: {head}");
    }
    let mut held = Vec::new();
    let refused = loop {
        held.push(TcpStream::connect(stage.relay.address).await.unwrap());
        let head = head(&stage, "GET", "/livez", "connection: close\r\n").await;
        if !head.starts_with("http/1.1 200 ") {
            break head;
        }
    };
    assert!(refused.starts_with("http/1.1 429 ") && refused.contains("cache-control: no-store"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_another_origin_may_send_its_token_in_a_header() {
    let stage = Stage::new("").await;
    let asked = "origin: https://app.example\r\naccess-control-request-headers: authorization\r\n";
    for path in [CHANGES, "/realtime/v1/websocket", "/nowhere"] {
        let head = head(&stage, "OPTIONS", path, asked).await;
        let allowed = head.lines().find_map(|line| line.strip_prefix("access-control-allow-headers: "));
        let allowed: Vec<_> = allowed.unwrap_or_else(|| panic!("{head}")).split(", ").collect();
        // The star alone does not stand for it.
        assert!(allowed.contains(&"authorization") && allowed.contains(&"*"), "{head}");
    }
    let bearer = format!("authorization: Bearer {}\r\n", anon());
    assert_eq!(get(stage.relay.address, CHANGES, &bearer).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_word_that_is_not_one_of_those_there_are_is_refused() {
    let stage = Stage::new("").await;
    let changes = format!("{CHANGES}&apikey={}", anon());
    for (more, status) in [
        ("event=INSERT", 200),
        ("event=delete", 200),
        ("event=*", 200),
        ("event=%2A", 200),
        ("event=", 200),
        ("event=FOO", 400),
        ("event=TRUNCATE", 400),
        ("event=INSERT,UPDATE", 400),
        ("event=%00", 400),
        ("wait=soon", 400),
        ("wait=-1", 400),
        ("wait=56", 400),
        ("since=now", 400),
        ("order=id", 200),
        ("orders=id", 400),
    ] {
        let answer = get(stage.relay.address, &format!("{changes}&{more}"), "").await;
        assert_eq!(answer.status, status, "{more}: {answer:?}");
    }
    let upgrade = "connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
                   sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    for (more, status) in [
        ("cursor=true", 101),
        ("cursor=false", 101),
        ("cursor=yes", 400),
        ("cursor=TRUE", 400),
        ("vsn=1.0.0", 101),
        ("vsn=7", 403),
        ("session=not-a-uuid", 400),
    ] {
        let path = format!("/realtime/v1/websocket?apikey={}&{more}", anon());
        let head = head(&stage, "GET", &path, upgrade).await;
        assert!(head.starts_with(&format!("http/1.1 {status} ")), "{more}: {head}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_for_those_who_accept_one() {
    let stage = Stage::new("").await;
    let path = format!("{CHANGES}&apikey={}", anon());
    for (accept, kind) in [
        ("text/event-stream", "text/event-stream"),
        ("TEXT/EVENT-STREAM, */*;q=0.1", "text/event-stream"),
        ("text/event-stream;q=0", "application/json"),
        ("application/json, text/event-stream;q=0.5", "application/json"),
        ("text/event-streams", "application/json"),
        ("*/*", "application/json"),
    ] {
        let head = head(&stage, "GET", &path, &format!("accept: {accept}\r\n")).await;
        assert!(head.contains(&format!("content-type: {kind}\r\n")), "{accept}: {head}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_closes_its_side_after_the_request_gets_the_whole_answer_at_once() {
    let stage = Stage::new(
        "create table large (id int primary key, v text); grant select on large to anon;
         insert into large select n, repeat('x', 10000) from generate_series(1, 900) n; select relay.watch('large')",
    )
    .await;
    let key = format!("&apikey={}", anon());
    let cursor = stage.database.value("select relay.cursor()").await;
    let started = Instant::now();
    for (path, headers, status) in [
        (format!("{CHANGES}{key}"), "", 200),
        // Larger than what the sockets hold.
        (format!("/realtime/v1/changes?table=large{key}"), "", 200),
        (format!("{CHANGES}{key}&wait=55&since={cursor}"), "", 200),
        (format!("{CHANGES}{key}"), "accept: text/event-stream\r\n", 200),
        (CHANGES.to_owned(), "", 401),
        ("/livez".to_owned(), "", 200),
        ("/metrics".to_owned(), "", 401),
        (metrics_path(), "", 200),
        ("/nowhere".to_owned(), "", 404),
        ("/realtime/v1/websocket".to_owned(), "", 400),
    ] {
        let answer = heard(&stage, &request("GET", &path, headers), true, "\u{0}").await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{path}: {answer}");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        if let Some(length) = head.lines().find_map(|line| line.strip_prefix("content-length: ")) {
            assert_eq!(body.len().to_string(), length, "{path}");
        }
    }
    assert!(started.elapsed() < Duration::from_secs(40), "a poll whose client has gone still waits");
    // One that sends two requests at once hears both.
    let two = request("GET", "/livez", "") + &request("GET", "/nowhere", "");
    let both = heard(&stage, &two, true, "\u{0}").await;
    assert!(both.contains("HTTP/1.1 200 ") && both.contains("HTTP/1.1 404 "), "{both}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_and_a_poll_end_with_their_client_and_free_its_place() {
    let stage = Stage::with("", |settings, _| settings.connections_per_address = Some(2)).await;
    let path = format!("{CHANGES}&apikey={}", anon());
    let cursor = stage.database.value("select relay.cursor()").await;
    let events = Events::open(stage.relay.address, &path, None).await;
    let mut poll = TcpStream::connect(stage.relay.address).await.unwrap();
    let asked = request("GET", &format!("{path}&wait=55&since={cursor}"), "");
    poll.write_all(asked.as_bytes()).await.unwrap();
    assert_eq!(stage.relay.session_count(), 1);
    drop((events, poll));
    let alive = request("GET", "/livez", "connection: close\r\n");
    eventually("the places of both are free", || async {
        let both = tokio::join!(heard(&stage, &alive, false, "\u{0}"), heard(&stage, &alive, false, "\u{0}"));
        let are_let_in = [both.0, both.1].iter().all(|heard| heard.starts_with("HTTP/1.1 200 "));
        (are_let_in && stage.relay.session_count() == 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn claims_that_make_a_policy_raise_are_said_by_rows_and_polls_alike() {
    let stage = Stage::new(
        "create table t (id int primary key, team int); alter table t enable row level security;
         create policy p on t using (team = (current_setting('request.jwt.claims')::jsonb->>'team')::int);
         grant select on t to authenticated; select relay.watch('t'); insert into t values (1, 1)",
    )
    .await;
    let bad = token("authenticated", None, json!({"team": "red"}));
    let cursor = stage.database.value("select relay.cursor()").await;
    stage.run("insert into t values (2, 1)").await;
    let raising = "the policy of public.t raises an error for the claims of this token";
    for (query, more) in [("", ", or for a row"), (&*format!("&since={cursor}&wait=5"), "")] {
        let path = format!("/realtime/v1/changes?table=t{query}&apikey={bad}");
        let answer = get(stage.relay.address, &path, "").await;
        let expected = format!(
            "{raising}{more}, so nothing of it is shown (relay explain public.t --token … says which)"
        );
        assert_eq!((answer.status, answer.body["error"].as_str()), (403, Some(&*expected)), "{query}");
    }
}
