//! The edges of plain HTTP: what is malformed, slow, endless or too much is refused in bounded time, and others go on.

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use crate::support::client::Client;
use crate::support::http::{get, stalled};
use crate::support::relay::Relay;
use crate::support::stage::Stage;
use crate::support::{PATIENCE, eventually, token};

fn anon() -> String {
    token("anon", None, json!({}))
}

/// All that is answered to these bytes until the relay closes; the client never does.
async fn answered(relay: &Relay, said: &[u8]) -> String {
    let mut stream = TcpStream::connect(relay.address).await.unwrap();
    let (mut reading, mut writing) = stream.split();
    let mut heard = Vec::new();
    // It may be closed before everything was said.
    let both = async { tokio::join!(writing.write_all(said), reading.read_to_end(&mut heard)) };
    let _ = timeout(PATIENCE, both).await.expect("the connection stays open");
    String::from_utf8_lossy(&heard).into_owned()
}

async fn is_alive(relay: &Relay) {
    assert_eq!(get(relay.address, "/livez", "").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_malformed_or_too_large_is_refused_and_closed() {
    let stage = Stage::new("").await;
    let changes = format!("GET /realtime/v1/changes?table=marker&apikey={} HTTP/1.1\r\nHost: x\r\n", anon());
    let socket = format!(
        "GET /socket/websocket?apikey={} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\n",
        anon()
    );
    let key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    for (what, said, expected) in [
        ("nonsense", "\u{1}\u{2}\u{3}\r\n\r\n".to_owned(), "HTTP/1.1 400 "),
        ("HTTP/0.9", "GET /livez\r\n\r\n".to_owned(), "HTTP/1.1 400 "),
        ("h2c by preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(), ""),
        ("ten thousand headers", format!("{changes}{}\r\n", "a: b\r\n".repeat(10_000)), "HTTP/1.1 431 "),
        ("a header of 1 MB", format!("{changes}a: {}\r\n\r\n", "b".repeat(1 << 20)), "HTTP/1.1 431 "),
        ("a target of 1 MB", format!("GET /{} HTTP/1.1\r\n\r\n", "b".repeat(1 << 20)), "HTTP/1.1 4"),
        (
            "two lengths",
            format!("{changes}Content-Length: 1\r\nContent-Length: 2\r\n\r\nabc"),
            "HTTP/1.1 400 ",
        ),
        (
            "length and chunks",
            format!(
                "{changes}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /livez HTTP/1.1\r\n\r\n"
            ),
            "HTTP/1.1 400 ",
        ),
        (
            "chunks and length",
            format!("{changes}Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n"),
            "HTTP/1.1 400 ",
        ),
        ("odd coding", format!("{changes}Transfer-Encoding: chunked, identity\r\n\r\n"), "HTTP/1.1 400 "),
        ("garbage for chunks", format!("{changes}Transfer-Encoding: chunked\r\n\r\nzz\r\n"), "HTTP/1.1 400 "),
        (
            "no key",
            format!("{socket}Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n"),
            "HTTP/1.1 400 ",
        ),
        (
            "another version",
            format!("{socket}Upgrade: websocket\r\nSec-WebSocket-Version: 8\r\n{key}\r\n"),
            "HTTP/1.1 400 ",
        ),
        (
            "another protocol",
            format!("{socket}Upgrade: h2c\r\nSec-WebSocket-Version: 13\r\n{key}\r\n"),
            "HTTP/1.1 400 ",
        ),
        (
            "a body",
            format!(
                "{socket}Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nContent-Length: 5\r\n{key}\r\nhello"
            ),
            "HTTP/1.1 400 ",
        ),
        (
            "eight megabytes of lines",
            format!(
                "POST /realtime/v1/changes HTTP/1.1\r\nHost: x\r\nContent-Length: 8000000\r\n\r\n{}",
                "\n".repeat(8_000_000)
            ),
            "HTTP/1.1 413 ",
        ),
        (
            "a body that never comes",
            "POST /realtime/v1/changes HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n".to_owned(),
            "HTTP/1.1 405 ",
        ),
    ] {
        let started = Instant::now();
        let heard = answered(&stage.relay, said.as_bytes()).await;
        assert!(heard.starts_with(expected), "{what}: {heard:.300}");
        assert_eq!(
            heard.matches("HTTP/1.1 ").count(),
            usize::from(!heard.is_empty()),
            "{what}: {heard:.300}"
        );
        assert!(!heard.starts_with("HTTP/1.1 2") && !heard.starts_with("HTTP/1.1 1"), "{what}: {heard:.300}");
        assert!(started.elapsed() < Duration::from_secs(8), "{what}");
    }
    is_alive(&stage.relay).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_too_large_or_too_slow_is_refused_as_json_that_is_not_cached() {
    let stage = Stage::with("", |settings, _| settings.head_timeout_ms = Some(700)).await;
    let body = |method: &str, path: &str, length: usize| {
        format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{}",
            "x".repeat(length)
        )
    };
    let long = "b".repeat(100_000);
    for (what, said, status, told) in [
        ("a body of 70 kB", body("POST", "/realtime/v1/changes?table=t", 70_000), 413, "65536 bytes"),
        ("a body of 8 MB", body("POST", "/nowhere", 8 << 20), 413, "without a body"),
        ("a body behind GET", body("GET", "/livez", 100_000), 413, "without a body"),
        ("a small body", body("POST", "/realtime/v1/changes?table=t", 100), 405, "by GET"),
        (
            "a body in chunks",
            "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(),
            400,
            "without a body",
        ),
        ("a path of 100 kB", format!("GET /{long} HTTP/1.1\r\nHost: x\r\n\r\n"), 414, "address is too long"),
        (
            "a query of 1 MB",
            format!("GET /livez?x={} HTTP/1.1\r\nHost: x\r\n\r\n", long.repeat(10)),
            414,
            "Authorization: Bearer",
        ),
        (
            "a header of 100 kB",
            format!("GET /livez HTTP/1.1\r\nHost: x\r\nx: {long}\r\n\r\n"),
            431,
            "headers are too large",
        ),
        (
            "many headers",
            format!("GET /livez HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(5000)),
            431,
            "headers are too large",
        ),
        ("no request", "nonsense\r\n\r\n".to_owned(), 400, "not valid HTTP/1.1"),
        ("a head that does not end", "GET /livez HTTP/1.1\r\nHost".to_owned(), 408, "took too long"),
        ("a line that does not end", "GET /li".to_owned(), 408, "took too long"),
    ] {
        let heard = answered(&stage.relay, said.as_bytes()).await;
        let last = heard.rfind("HTTP/1.1 ").unwrap_or_else(|| panic!("{what}: {heard}"));
        let (head, body) = heard[last..].split_once("\r\n\r\n").unwrap();
        let head = head.to_ascii_lowercase();
        assert!(head.starts_with(&format!("http/1.1 {status} ")), "{what}: {head}");
        for header in ["content-type: application/json", "cache-control: no-store", "connection: close"] {
            assert_eq!(head.matches(header).count(), 1, "{what}: {header}: {head}");
        }
        assert!(head.contains(&format!("content-length: {}", body.len())), "{what}: {head}");
        let error: serde_json::Value =
            serde_json::from_str(body).unwrap_or_else(|_| panic!("{what}: {body}"));
        assert!(error["error"].as_str().unwrap().contains(told), "{what}: {body}");
    }
    is_alive(&stage.relay).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_sends_its_head_slowly_or_nothing_at_all_is_closed_also_between_requests() {
    let stage = Stage::with("", |settings, _| settings.head_timeout_ms = Some(700)).await;
    let started = Instant::now();
    let mut slow = TcpStream::connect(stage.relay.address).await.unwrap();
    let (mut reading, mut writing) = slow.split();
    let mut heard = Vec::new();
    let slowly = async {
        let mut tick = tokio::time::interval(Duration::from_millis(50));
        loop {
            tick.tick().await;
            let _ = writing.write_all(b"G").await;
        }
    };
    tokio::select! {
        () = slowly => {}
        read = timeout(PATIENCE, reading.read_to_end(&mut heard)) => { let _ = read.expect("slow heads are let in"); }
    }
    answered(&stage.relay, b"").await;
    let idle = answered(&stage.relay, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(idle.starts_with("HTTP/1.1 200 "), "{idle}");
    assert!(started.elapsed() >= Duration::from_millis(2100));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_of_a_last_event_that_is_none_is_refused_and_never_a_stream_from_now() {
    let stage = Stage::new("").await;
    let path = format!("/realtime/v1/changes?table=marker&apikey={}", anon());
    for id in ["garbage", "1", "AAAA", "-1", "null", "'; drop table t"] {
        let headers = format!("accept: text/event-stream\r\nlast-event-id: {id}\r\n");
        assert_eq!(get(stage.relay.address, &path, &headers).await.status, 400, "{id}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_origin_that_is_not_on_the_list_reads_no_changes() {
    let stage = Stage::with("", |settings, _| {
        settings.allowed_origin = vec!["https://app.example".to_owned()];
    })
    .await;
    let path = format!("/realtime/v1/changes?table=marker&apikey={}", anon());
    for (origin, status) in [
        ("", 200),
        ("origin: https://app.example\r\n", 200),
        ("origin: https://evil.example\r\n", 403),
        ("origin: null\r\n", 403),
    ] {
        assert_eq!(get(stage.relay.address, &path, origin).await.status, status, "{origin}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_say_nothing_are_bounded_and_clients_stay() {
    let stage = Stage::with("", |settings, _| settings.max_connections = Some(1)).await;
    let mut good = stage.subscribe(&anon(), json!([])).await;
    let alive = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let mut silent = Vec::new();
    let refused = loop {
        // One client and a thousand others; the kernel may keep some of so many at once from the relay.
        assert!(silent.len() < 3000, "any number is let in");
        silent.extend(join_all((0..20).map(|_| TcpStream::connect(stage.relay.address))).await);
        let heard = answered(&stage.relay, alive).await;
        if !heard.starts_with("HTTP/1.1 200 ") {
            break heard;
        }
    };
    assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");
    assert!(refused.ends_with(r#"{"error":"Too many connections"}"#), "{refused}");
    assert!(stage.changes(&mut good).await.is_empty());
    drop(silent);
    eventually("there is room again", || async {
        answered(&stage.relay, alive).await.starts_with("HTTP/1.1 200 ").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_from_one_address_are_bounded_where_it_is_set() {
    let stage = Stage::with("", |settings, _| settings.connections_per_address = Some(2)).await;
    let first = stalled(stage.relay.address, &anon(), "realtime:1", "marker").await;
    let _second = stalled(stage.relay.address, &anon(), "realtime:2", "marker").await;
    let refused = answered(&stage.relay, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(refused.starts_with("HTTP/1.1 429 "), "{refused}");
    drop(first);
    eventually("its place is free", || async {
        let heard =
            answered(&stage.relay, b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
        heard.starts_with("HTTP/1.1 200 ").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_clients_that_come_at_once_are_all_served_by_few_connections_to_postgresql() {
    let stage = Stage::new("").await;
    let token = anon();
    let mut clients = join_all((0..1000).map(async |number| {
        let mut client = Client::connect(&stage.relay, &token).await;
        client
            .subscribe(
                &format!("realtime:{number}"),
                json!([{"event": "*", "schema": "public", "table": "marker"}]),
            )
            .await;
        client
    }))
    .await;
    let used = "select count(*) from pg_stat_activity where datname = current_database() and application_name like 'relay%'";
    let used: i32 = stage.database.value(used).await.parse().unwrap();
    assert!(used < 25, "{used}");
    stage.run("insert into marker default values").await;
    for client in &mut clients {
        assert_eq!(client.change().await["type"], "INSERT");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parameter_that_is_there_twice_is_refused_and_never_widens() {
    let stage = Stage::new(
        "create table t (id int primary key); grant select on t to authenticated; select relay.watch('t')",
    )
    .await;
    let token = token("authenticated", None, json!({}));
    let once = format!("table=t&schema=public&event=*&select=id&wait=0&apikey={token}");
    let address = stage.relay.address;
    let ask = async |query: &str| get(address, &format!("/realtime/v1/changes?{query}"), "").await;
    assert_eq!(ask(&once).await.status, 200);
    for (name, more) in [
        ("filter", "filter=id=eq.1&filter=id=gt.0"),
        ("filter", "filter=id=eq.1&%66ilter=id=gt.0"),
        ("filter", "f%69lter=&filter=id=eq.1"),
        ("filter", "filter&filter=id=eq.1"),
        ("table", "table=t"),
        ("schema", "%73chema=public"),
        ("event", "event=INSERT"),
        ("select", "select=*"),
        ("since", "since=a&since=a"),
        ("wait", "wait=1"),
        ("apikey", "apikey=other"),
        ("apikey", "%61pikey=other"),
    ] {
        let answer = ask(&format!("{once}&{more}")).await;
        let said = answer.body.to_string();
        assert_eq!(
            (answer.status, said.contains(&format!("{name}: this parameter is there more than once"))),
            (400, true),
            "{more} {said}"
        );
    }
    for more in
        ["&vsn=1.0.0", "&apikey=x", "&%61pikey=x", "&cursor=true&cursor=false", "&session=a&sessio%6E=b"]
    {
        let refused = Client::at(address, &token, more).await.err();
        let refused = refused.unwrap_or_default();
        assert!(refused.starts_with("400") && refused.contains("more than once"), "{more}: {refused}");
    }
}
