//! Each metric of clients moves with what it counts, and the log of refusals says who and where.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use serde_json::json;

use crate::program::cli::{line_with, serve};
use crate::support::client::Client;
use crate::support::database::Database;
use crate::support::http::{Events, get, text};
use crate::support::stage::Stage;
use crate::support::{ANN, eventually, token};

async fn stage() -> Stage {
    let sql = "create table todos (id int primary key); grant select on todos to authenticated, service_role;
               select relay.watch('todos')";
    Stage::with(sql, |settings, _| settings.allowed_origin = vec![String::from("https://app.example")]).await
}

fn ann() -> String {
    token("authenticated", Some(ANN), json!({}))
}

/// The value of a metric with one label.
fn of(stage: &Stage, name: &str, label: &str, value: &str) -> u64 {
    stage.relay.figure(&format!("relay_{name}{{{label}=\"{value}\"}}"))
}

/// Waits until a metric has this value.
async fn until(stage: &Stage, name: &str, (label, value): (&str, &str), expected: u64) {
    eventually(&format!("{name} {value} of {expected}"), || async {
        (of(stage, name, label, value) == expected).then_some(())
    })
    .await;
}

async fn stream(stage: &Stage, more: &str) -> Events {
    let path = format!("/realtime/v1/changes?table=todos&apikey={}{more}", ann());
    Events::open(stage.relay.address, &path, None).await
}

/// A cursor of now.
async fn cursor(stage: &Stage) -> String {
    let path = format!("/realtime/v1/changes?table=todos&apikey={}", ann());
    get(stage.relay.address, &path, "").await.body["cursor"].as_str().unwrap().to_owned()
}

fn poll(stage: &Stage, cursor: &str, wait: u64) -> impl Future<Output = u16> + use<> {
    let address = stage.relay.address;
    let path = format!("/realtime/v1/changes?table=todos&since={cursor}&wait={wait}&apikey={}", ann());
    async move { get(address, &path, "").await.status }
}

const TODOS: &str = r#"[{"event": "*", "schema": "public", "table": "todos"}]"#;

async fn socket(stage: &Stage, more: &str) -> Client {
    let mut socket = Client::at(stage.relay.address, &ann(), more).await.unwrap();
    socket.subscribe("realtime:one", serde_json::from_str(TODOS).unwrap()).await;
    socket
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_messages_and_bytes_are_counted_by_transport() {
    let stage = stage().await;
    let mut socket = socket(&stage, "").await;
    let mut events = stream(&stage, "").await;
    let start = cursor(&stage).await;
    let waiting = tokio::spawn(poll(&stage, &start, 55));
    for transport in ["websocket", "event_stream", "poll"] {
        until(&stage, "clients_open", ("transport", transport), 1).await;
    }
    let received = of(&stage, "received_messages_total", "transport", "websocket");
    assert!(received >= 1, "the join");
    assert!(of(&stage, "received_bytes_total", "transport", "websocket") > received * 20);
    let sent = |name: &str| ["websocket", "event_stream"].map(|by| of(&stage, name, "transport", by));
    let (messages, bytes) = (sent("sent_messages_total"), sent("sent_bytes_total"));
    stage.run("insert into todos values (1)").await;
    socket.change().await;
    events.next().await.unwrap();
    assert_eq!(waiting.await.unwrap(), 200);
    for (number, transport) in ["websocket", "event_stream"].into_iter().enumerate() {
        let label = ("transport", transport);
        eventually(&format!("a message by {transport}"), || async {
            let count = of(&stage, "sent_messages_total", label.0, label.1);
            (count > messages[number]).then_some(())
        })
        .await;
        assert!(of(&stage, "sent_bytes_total", label.0, label.1) > bytes[number] + 50, "{transport}");
    }
    assert_eq!(of(&stage, "sent_messages_total", "transport", "poll"), 1);
    until(&stage, "clients_open", ("transport", "poll"), 0).await;
    drop((socket, events));
    for transport in ["websocket", "event_stream"] {
        until(&stage, "clients_open", ("transport", transport), 0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lag_to_the_socket_is_at_least_that_to_the_outbox_and_waits_for_connections_are_measured() {
    let stage = stage().await;
    let (mut socket, mut events) = (socket(&stage, "").await, stream(&stage, "").await);
    let written = || stage.relay.figure("relay_written_lag_seconds_count");
    assert_eq!(written(), 0);
    stage.run("insert into todos values (1)").await;
    socket.change().await;
    events.next().await.unwrap();
    eventually("both writes", || async { (written() == 2).then_some(()) }).await;
    let sum = |name: &str| -> f64 {
        let text = stage.relay.metrics();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(&format!("relay_{name}_seconds_sum "))?.parse().ok());
        line.unwrap()
    };
    assert!(sum("written_lag") >= sum("lag"), "{} {}", sum("written_lag"), sum("lag"));
    assert!(stage.relay.figure("relay_pool_wait_seconds_count") > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn gaps_are_counted_for_each_transport_that_is_told() {
    let stage = stage().await;
    let (mut socket, mut events) = (socket(&stage, "").await, stream(&stage, "").await);
    let old = cursor(&stage).await;
    stage.run("truncate todos").await;
    assert_eq!(events.next().await.unwrap().name, "gap");
    loop {
        let frame = socket.frame().await;
        if frame[4]["message"].as_str().is_some_and(|text| text.starts_with("Gap: ")) {
            break;
        }
    }
    assert_eq!(poll(&stage, &old, 1).await, 410);
    for transport in ["websocket", "event_stream", "poll"] {
        until(&stage, "gaps_total", ("transport", transport), 1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_continues_from_a_cursor_or_a_bookmark_is_counted_and_what_begins_is_not() {
    let stage = stage().await;
    let name = "&session=0f8fad5b-d9cb-469f-a165-70867728950e";
    let mut first = socket(&stage, name).await;
    let begun = stream(&stage, "").await;
    assert_eq!(["cursor", "session"].map(|way| of(&stage, "resumes_total", "way", way)), [0, 0]);
    let start = cursor(&stage).await;
    drop((begun, stream(&stage, &format!("&since={start}")).await));
    assert_eq!(of(&stage, "resumes_total", "way", "cursor"), 1);
    stage.run("insert into todos values (1)").await;
    first.change().await;
    drop(first);
    until(&stage, "clients_open", ("transport", "websocket"), 0).await;
    stage.run("insert into todos values (2)").await;
    let mut again = Client::at(stage.relay.address, &ann(), name).await.unwrap();
    again.try_join("realtime:one", serde_json::from_str(TODOS).unwrap()).await.unwrap();
    again.changes_until(|change| change["record"]["id"] == 2).await;
    assert_eq!(of(&stage, "resumes_total", "way", "session"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_are_counted_by_reason() {
    let stage = stage().await;
    let address = stage.relay.address;
    let socket = |query: String| format!("/realtime/v1/websocket?{query}");
    let evil = "origin: https://evil.example\r\n";
    let upgrade = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
                   sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    for (reason, path, headers) in [
        ("token", String::from("/realtime/v1/changes?table=todos&apikey=x"), String::new()),
        ("token", socket(String::from("apikey=x&vsn=2.0.0")), upgrade.to_owned()),
        ("role", format!("/realtime/v1/explain?table=todos&apikey={}", ann()), String::new()),
        ("origin", format!("/realtime/v1/changes?table=todos&apikey={}", ann()), evil.to_owned()),
        ("origin", socket(format!("apikey={}&vsn=2.0.0", ann())), format!("{upgrade}{evil}")),
        ("request", socket(String::from("vsn=2.0.0")), String::new()),
        ("path", String::from("/realtime/v2/changes"), String::new()),
    ] {
        let before = of(&stage, "connections_refused_total", "reason", reason);
        get(address, &path, &headers).await;
        assert_eq!(of(&stage, "connections_refused_total", "reason", reason), before + 1, "{reason} {path}");
    }
    let full = Stage::with("", |settings, _| settings.connections_per_address = Some(1)).await;
    let _first = Client::connect(&full.relay, &ann()).await;
    assert!(Client::open(&full.relay, &ann()).await.is_err());
    assert_eq!(of(&full, "connections_refused_total", "reason", "limit"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_metric_has_a_type_a_help_and_a_line() {
    let metrics = stage().await.relay.metrics();
    let names = |kind: &str| -> BTreeSet<String> {
        let lines = metrics.lines().filter_map(|line| line.strip_prefix(kind)?.split(' ').next());
        lines.map(str::to_owned).collect()
    };
    let (types, helps) = (names("# TYPE "), names("# HELP "));
    assert_eq!(types, helps);
    for name in types {
        let is_its = |line: &str| line.starts_with(&name) && !line.starts_with('#');
        assert!(metrics.lines().any(is_its), "{name} has no value before the first event");
    }
}

/// The SHA-256 of a text, as `sha256sum` prints it.
fn digest_of(text: &str) -> String {
    let command = format!("printf %s {text} | sha256sum");
    let output = std::process::Command::new("sh").args(["-c", &command]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_of_a_user_is_logged_with_address_path_reason_and_a_digest_of_the_user_and_without_claim_or_token()
 {
    let database = Database::new().await;
    let ann = ann();
    let digest = format!("user.digest=\"{:.12}\"", digest_of(ANN));
    for path in ["/metrics", "/inspector/overview"] {
        // At most one line a second: a relay for each, so that its first refusal is logged.
        let (_relay, mut log, url) = serve(&["--database-url", &database.url]).await;
        let address: SocketAddr = url.trim_start_matches("http://").parse().unwrap();
        assert_eq!(text(address, &format!("{path}?apikey={ann}")).await.0, 403);
        let line = loop {
            let line = line_with(&mut log, "request refused").await;
            if line.contains(path) {
                break line;
            }
        };
        for part in ["127.0.0.1", &digest, path, "reason=\"role\"", "not of the role service_role"] {
            assert!(line.contains(part), "{part}: {line}");
        }
        assert!(!line.contains(&ann[..40]) && !line.contains(ANN), "{line}");
    }
}
