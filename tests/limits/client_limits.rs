//! What one client may hold or ask for is bounded; a client beyond its bound is closed, and no other is affected.

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::sleep;

use crate::program::cli;
use crate::support::database::Database;
use crate::support::http::{Events, stalled, text};
use crate::support::relay::Relay;
use crate::support::stage::Stage;
use crate::support::{eventually, token};

const TABLE: &str =
    "create table t (id int primary key, v text); grant select on t to anon; select relay.watch('t');";

fn anon() -> String {
    token("anon", None, json!({}))
}

/// A metric's number.
fn metric(relay: &Relay, name: &str) -> i64 {
    let text = relay.metrics();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name}")).parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_clients_that_read_nothing_hold_no_more_than_all_may_together() {
    const MOST: i64 = 8 << 20;
    let stage = Stage::with(TABLE, |settings, _| {
        settings.total_outbox_bytes = Some(MOST as usize);
    })
    .await;
    let mut idle: Vec<TcpStream> = Vec::new();
    for number in 0..200 {
        // Each its own topic, thus its own frames.
        idle.push(stalled(stage.relay.address, &anon(), &format!("realtime:idle{number}"), "t").await);
    }
    let mut good = stage.subscribe(&anon(), json!([{"event": "*", "schema": "public", "table": "t"}])).await;
    eventually("all are subscribed", || async {
        (metric(&stage.relay, "relay_channels_open") == 201).then_some(())
    })
    .await;
    let mut most = 0;
    let mut written = 0;
    while metric(&stage.relay, "relay_sessions_closed_full_total") < 100 {
        assert!(written < 200, "a hundred times more than all may hold went to clients that read nothing");
        stage.run(&format!("insert into t values ({written}, repeat('x', 100000))")).await;
        assert_eq!(good.change().await["record"]["id"], written, "a client that reads gets everything");
        most = most.max(metric(&stage.relay, "relay_outbox_bytes"));
        written += 1;
    }
    assert!(most <= MOST, "{most}");
    drop(idle);
    eventually("what waited is given back", || async {
        (metric(&stage.relay, "relay_outbox_bytes") == 0).then_some(())
    })
    .await;
    stage.run("insert into t values (-1, 'after')").await;
    assert_eq!(stage.told(&mut good).await, [r#"INSERT {"id":-1,"v":"after"}"#]);
}

/// A request whose answer is not read.
async fn asked(relay: &Relay, path: &str, headers: &str) -> TcpStream {
    let mut stream = TcpStream::connect(relay.address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: relay\r\n{headers}\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

async fn closed(relay: &Relay, clients: i64) {
    eventually("who does not read is closed", || async {
        (metric(relay, "relay_sessions_closed_full_total") == clients).then_some(())
    })
    .await;
    eventually("nothing is held for it", || async {
        let held = ["relay_sessions_open", "relay_channels_open", "relay_outbox_bytes"];
        held.iter().all(|name| metric(relay, name) == 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_hardly_read_ends_once_too_much_waits_and_goes_on_after_its_last_id() {
    let stage = Stage::new(TABLE).await;
    let path = format!("/realtime/v1/changes?table=t&apikey={}", anon());
    let mut idle = Events::open(stage.relay.address, &path, None).await;
    let mut slow = asked(&stage.relay, &path, "accept: text/event-stream\r\n").await;
    eventually("both follow", || async { (metric(&stage.relay, "relay_channels_open") == 2).then_some(()) })
        .await;
    let mut written = 0;
    while metric(&stage.relay, "relay_sessions_closed_full_total") < 2 {
        assert!(written < 400, "40 MB went to clients that read nothing");
        stage.run(&format!("insert into t values ({written}, repeat('x', 100000))")).await;
        let _ = slow.read_u8().await;
        written += 1;
        eventually("it is delivered", || async {
            (metric(&stage.relay, "relay_changes_read_total") >= written).then_some(())
        })
        .await;
    }
    closed(&stage.relay, 2).await;
    let mut last = None;
    let mut next = 0;
    for _ in 0..2 {
        while next < written
            && let Some(event) = idle.next().await
        {
            assert_eq!(event.data["record"]["id"], next);
            next += 1;
            last = Some(event.id);
        }
        idle = Events::open(stage.relay.address, &path, last.as_deref()).await;
    }
    assert_eq!(next, written);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_its_client_does_not_read_is_dropped() {
    let sql = format!("{TABLE} insert into t select n, repeat('x', 100000) from generate_series(1, 300) n");
    let stage = Stage::with(&sql, |settings, _| {
        settings.write_timeout_ms = Some(300);
        settings.judge_timeout_ms = Some(10_000);
    })
    .await;
    let path = format!("/realtime/v1/changes?table=t&apikey={}", anon());
    let mut client = asked(&stage.relay, &path, "").await;
    eventually("the answer waits", || async {
        (metric(&stage.relay, "relay_outbox_bytes") > 28_000_000).then_some(())
    })
    .await;
    closed(&stage.relay, 1).await;
    let mut got = Vec::new();
    let _ = client.read_to_end(&mut got).await;
    assert!(got.len() < 30_000_000, "it was cut");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_client_is_waited_for_as_long_as_it_takes_something() {
    const ROWS: i64 = 40;
    let stage = Stage::with(TABLE, |settings, _| {
        settings.outbox_bytes = Some(64 << 20);
        settings.write_timeout_ms = Some(1000);
    })
    .await;
    let mut client =
        stage.subscribe(&anon(), json!([{"event": "*", "schema": "public", "table": "t"}])).await;
    stage
        .run(&format!("insert into t select n, repeat('x', 1000000) from generate_series(1, {ROWS}) n"))
        .await;
    for expected in 1..=ROWS {
        assert_eq!(client.change().await["record"]["id"], expected);
        // All of it takes several times as long as nothing may be taken.
        sleep(Duration::from_millis(100)).await;
    }
}

/// The most that was resident of a process, in MiB.
fn peak(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
    peak.unwrap().parse::<u64>().unwrap() / 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_crowd_that_missed_large_rows_a_few_have_them_in_memory_at_a_time() {
    let database = Database::new().await;
    database.run(TABLE).await;
    let (child, _lines, address) = cli::serve(&["--database-url", &database.url, "--install"]).await;
    let address = address.strip_prefix("http://").unwrap().parse().unwrap();
    let since = database.value("select relay.cursor()").await;
    database.run("insert into t select n, repeat('x', 1000000) from generate_series(1, 12) n").await;
    let path = format!("/realtime/v1/changes?table=t&since={since}&apikey={}", anon());
    let answers = join_all((0..60).map(|_| text(address, &path))).await;
    // A request that is not answered in time is sent again.
    assert!(answers.iter().any(|(status, _)| *status == 200));
    let peak = peak(child.id().unwrap());
    assert!(peak < 256, "{peak} MiB");
}
