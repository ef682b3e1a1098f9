//! The changelog is trimmed by whole segments: what is kept can be resumed from, what is not is a gap, and no writer waits.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::sync::watch;

use crate::support::database::Database;
use crate::support::http::{Events, get};
use crate::support::relay::Relay;
use crate::support::{eventually, token};

/// What was done by one look after the changelog.
async fn trim(database: &Database) -> String {
    let started = Instant::now();
    let done = database.value("select relay.trim_changelog()").await;
    assert!(started.elapsed() < Duration::from_secs(1), "it waits for no other");
    done
}

async fn database() -> Database {
    let database = Database::new().await;
    database
        .run(
            "create table t (id int primary key); grant select on t to authenticated; select relay.watch('t');
             select relay.retain(age => '1 second')",
        )
        .await;
    database
}

async fn count(database: &Database) -> i32 {
    database.value("select count(*) from relay.changes where relation > 0").await.parse().unwrap()
}

/// Looks after the changelog until it did this.
async fn trim_until(database: &Database, wanted: &str) {
    eventually(wanted, || async { trim(database).await.contains(wanted).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn old_segments_are_truncated_and_young_ones_kept() {
    let database = database().await;
    database.run("insert into t values (1)").await;
    trim_until(&database, "moved on to 1").await;
    database.run("insert into t values (2)").await;
    assert_eq!(count(&database).await, 2);
    trim_until(&database, "truncated 0").await;
    let left =
        database.value("select string_agg(after ->> 'id', ',') from relay.changes where relation > 0").await;
    assert_eq!(left, "2");
    trim_until(&database, "truncated 1").await;
    assert_eq!(count(&database).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_held_open_delays_a_truncation_and_nothing_else() {
    let database = database().await;
    let held = database.connect().await;
    held.batch_execute("begin; insert into t values (1)").await.unwrap();
    database.run("insert into t values (2)").await;
    trim_until(&database, "moved on to 1").await;
    // The held one goes on where it began, the others in the next segment, and none of them waits.
    held.batch_execute("insert into t values (3)").await.unwrap();
    database.run("insert into t values (4)").await;
    let rule = Instant::now();
    while rule.elapsed() < Duration::from_millis(1500) {
        let done = trim(&database).await;
        assert!(!done.contains("truncated") && !done.contains("settled 0"), "{done}");
    }
    held.batch_execute("commit").await.unwrap();
    trim_until(&database, "settled 0").await;
    trim_until(&database, "truncated 0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_to_a_segment_after_it_was_settled_is_kept_as_long_as_the_rest() {
    let database = database().await;
    database.run("insert into t values (1)").await;
    trim_until(&database, "moved on to 1").await;
    trim_until(&database, "settled 0").await;
    // As a writer would that chose its segment before the move and was halted since.
    database
        .run(
            "insert into relay.log_0 (number, xid, at, kind)
             values (nextval('relay.change_number'), pg_current_xact_id(), now(), 'T 1 0')",
        )
        .await;
    trim_until(&database, "settled 0 again").await;
    assert_eq!(database.value("select count(*) from relay.log_0 where kind like 'T %'").await, "1");
    trim_until(&database, "truncated 0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cursor_older_than_what_is_kept_is_a_gap_and_a_younger_one_goes_on() {
    let database = database().await;
    let old = database.value("select relay.cursor()").await;
    database.run("insert into t values (1)").await;
    trim_until(&database, "moved on to 1").await;
    database.run("insert into t values (2)").await;
    trim_until(&database, "settled 0").await;
    let young = database.value("select relay.cursor()").await;
    trim_until(&database, "truncated 0").await;
    database.run("select relay.retain(age => '1 day'); insert into t values (3)").await;
    // It has nothing in its memory: it has to look into the changelog.
    let relay = Relay::start(&database.url).await;
    let path = format!("/realtime/v1/changes?table=t&apikey={}", token("authenticated", None, json!({})));
    let since = async |cursor: &str| get(relay.address, &format!("{path}&wait=1&since={cursor}"), "").await;
    assert_eq!(since(&old).await.status, 410);
    let answer = since(&young).await;
    assert_eq!(answer.body["changes"][0]["record"]["id"], 3, "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_trims_by_itself_and_its_metrics_show_the_size() {
    let database = database().await;
    let relay = Relay::start(&database.url).await;
    database.run("insert into t select generate_series(1, 1000)").await;
    eventually("the relay moved on and truncated", || async { (count(&database).await == 0).then_some(()) })
        .await;
    let bytes = |text: String| -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix("relay_changelog_bytes ")).unwrap();
        line.parse().unwrap()
    };
    assert!(bytes(relay.metrics()) > 0.0);
    let health =
        database.value("select segment || ' ' || (bytes > 0) || ' ' || kept_for from relay.health").await;
    assert!(health.ends_with("true 00:00:01"), "{health}");
}

/// Reads a stream, as an EventSource does: one that ends, as at a change of roles, is opened again with its last id.
async fn follow(relay: SocketAddr, path: String, positions: watch::Sender<String>) {
    let mut last = None;
    loop {
        let mut stream = Events::open(relay, &path, last.as_deref()).await;
        positions.send_replace(stream.last.clone());
        while stream.step().await.is_some() {
            positions.send_replace(stream.last.clone());
        }
        last = Some(stream.last);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_a_quiet_table_comes_back_after_what_it_began_with_was_trimmed() {
    let database = database().await;
    // Long enough for a stream that has to be opened again.
    database.run("select relay.retain(age => '4 seconds')").await;
    database
        .run("create table other (id int generated always as identity); select relay.watch('other')")
        .await;
    let relay = Relay::with(&database.url, |settings| settings.keep_alive_ms = Some(50)).await;
    // It has nothing in its memory, and looks into the changelog for everything.
    let elsewhere = Relay::start(&database.url).await;
    let path = format!("/realtime/v1/changes?table=t&apikey={}", token("authenticated", None, json!({})));
    let (positions, mut position) = watch::channel(String::new());
    let follower = tokio::spawn(follow(relay.address, path.clone(), positions));
    position.changed().await.unwrap();
    let began = position.borrow().clone();
    let status =
        async |since: &str| get(elsewhere.address, &format!("{path}&wait=0&since={since}"), "").await.status;
    eventually("what it began with is trimmed", || async {
        database.run("insert into other default values").await;
        (status(&began).await == 410).then_some(())
    })
    .await;
    // Nothing is trimmed between the last look at its position and its return.
    database.run("select relay.retain(age => '1 hour')").await;
    let last = eventually("its position is kept", || async {
        let last = position.borrow().clone();
        (status(&last).await != 410).then_some(last)
    })
    .await;
    follower.abort();
    database.run("insert into t values (1)").await;
    let mut stream = Events::open(elsewhere.address, &path, Some(&last)).await;
    assert_eq!(stream.next().await.unwrap().data["record"]["id"], 1);
}
