//! The doorbell: writers ring only when the relay sleeps, and nothing depends on the ring being heard.
#![allow(clippy::print_stdout, reason = "the figures are part of what is shown")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio_postgres::{Client as Session, Notification};

use relay::postgres::connect::pool::Server;
use relay::postgres::locks::Lock;

use crate::delivery::order::CROWD;
use crate::support::client::Client;
use crate::support::database::Database;
use crate::support::pooler::Pooler;
use crate::support::relay::Relay;
use crate::support::{PATIENCE, eventually, token};

/// While another session holds it shared, the relay cannot fall asleep.
fn stay_awake() -> String {
    format!("select pg_advisory_lock_shared({})", Lock::Doorbell)
}

async fn watched() -> Database {
    let database = Database::new().await;
    database.run("create table t (id int primary key); grant select on t to authenticated; select relay.watch('t')").await;
    database
}

async fn subscriber(relay: &Relay) -> Client {
    let mut client = Client::connect(relay, &token("authenticated", None, json!({}))).await;
    client.subscribe("realtime:t", json!([{"event": "*", "schema": "public", "table": "t"}])).await;
    client
}

/// Waits until the relay holds the lock, so that writers ring, and listens for nothing but new rings.
async fn asleep(relay: &Relay, database: &Database) {
    let held = format!(
        "select count(*) from pg_locks l where {} and l.mode = 'ExclusiveLock'",
        Lock::Doorbell.is_held()
    );
    eventually("the relay falls asleep", || async {
        let counted =
            relay.figure("relay_doorbell_sleeps_total") > relay.figure("relay_doorbell_wakes_total");
        (counted && database.value(&held).await == "1").then_some(())
    })
    .await;
}

/// Another listening session, and the session that ends it.
async fn listener(database: &Database) -> (Session, UnboundedReceiver<Notification>) {
    let (sender, heard) = unbounded_channel();
    let server = Server::parse(&database.url, "listener", None).unwrap();
    let session = server.connect_listening(move |notification| _ = sender.send(notification)).await.unwrap();
    session.batch_execute("listen relay").await.unwrap();
    (session, heard)
}

/// What was rung so far: a notification of our own ends the list.
async fn rings(database: &Database, heard: &mut UnboundedReceiver<Notification>) -> Vec<String> {
    database.run("select pg_notify('relay', 'end of list')").await;
    let mut payloads = Vec::new();
    loop {
        let notification = tokio::time::timeout(PATIENCE, heard.recv()).await.unwrap().unwrap();
        if notification.payload() == "end of list" {
            return payloads;
        }
        payloads.push(notification.payload().to_owned());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_insert_arrives_at_once_though_polling_is_an_hour_away() {
    let database = watched().await;
    let relay = Relay::start(&database.url).await;
    let mut client = subscriber(&relay).await;
    let (_session, mut heard) = listener(&database).await;
    for id in 1..=3 {
        asleep(&relay, &database).await;
        let before = relay.ring_count();
        let written = Instant::now();
        database.run(&format!("insert into t values ({id})")).await;
        assert_eq!(client.change().await["record"]["id"], id);
        assert!(written.elapsed() < Duration::from_secs(1), "{:?}", written.elapsed());
        assert_eq!(relay.ring_count(), before + 1);
    }
    assert_eq!(relay.figure("relay_changes_found_by_polling_total"), 0);
    let rung = rings(&database, &mut heard).await;
    assert_eq!(rung.len(), 3);
    assert!(
        rung.iter().all(|payload| payload.contains("\"public.t\"") && payload.contains("\"xid\"")),
        "{rung:?}"
    );
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_without_the_bell_is_polled() {
    let database = watched().await;
    database.run("do $$ begin execute format('alter database %I set relay.doorbell = off', current_database()); end $$").await;
    let relay = Relay::start(&database.url).await;
    assert_eq!(relay.figure("relay_source_up"), 1, "it knows that it hears nothing");
    let mut client = subscriber(&relay).await;
    let (_session, mut heard) = listener(&database).await;
    let writer = database.connect().await;
    for id in 1..=20 {
        writer.execute("insert into t values ($1)", &[&id]).await.unwrap();
        assert_eq!(client.change().await["record"]["id"], id);
    }
    assert_eq!(rings(&database, &mut heard).await, [""; 0]);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_that_does_not_ring_is_found_by_polling() {
    let database = watched().await;
    let relay = Relay::with(&database.url, |settings| settings.poll_ms = Some(50)).await;
    let mut client = subscriber(&relay).await;
    database.run("set relay.doorbell = 'off'").await;
    asleep(&relay, &database).await;
    database.run("insert into t values (1)").await;
    assert_eq!(client.change().await["record"]["id"], 1);
    eventually("it is counted", || async {
        (relay.figure("relay_changes_found_by_polling_total") == 1).then_some(())
    })
    .await;
    assert_eq!(relay.ring_count(), 0);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_writers_ring_a_handful_of_times() {
    const WRITERS: i32 = 64;
    const COMMITS: i32 = 60;
    let _alone = CROWD.lock().await;
    let database = watched().await;
    let relay = Relay::start(&database.url).await;
    let mut client = subscriber(&relay).await;
    let reader =
        tokio::spawn(async move { client.changes_until(|change| change["record"]["id"] == -1).await });
    let mut sessions = Vec::new();
    for _ in 0..WRITERS {
        sessions.push(database.connect().await);
    }
    asleep(&relay, &database).await;
    let started = Instant::now();
    let writers: Vec<_> = sessions
        .into_iter()
        .enumerate()
        .map(|(number, session)| {
            tokio::spawn(async move {
                let insert = session.prepare("insert into t values ($1)").await.unwrap();
                for step in 0..COMMITS {
                    session.execute(&insert, &[&(number as i32 * COMMITS + step)]).await.unwrap();
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    let rings = relay.ring_count();
    println!("{rings} rings for {} commits in {:?}", WRITERS * COMMITS, started.elapsed());
    database.run("insert into t values (-1)").await;
    let mut changes = reader.await.unwrap();
    assert_eq!(changes.pop().unwrap()["record"]["id"], -1);
    assert_eq!(changes.len(), (WRITERS * COMMITS) as usize);
    let ids: BTreeSet<i64> = changes.iter().map(|change| change["record"]["id"].as_i64().unwrap()).collect();
    assert_eq!(ids.len(), changes.len());
    assert!(rings * 10 < (WRITERS * COMMITS) as u64, "{rings} rings");
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_relay_writers_neither_fail_nor_ring() {
    let database = watched().await;
    let (_session, mut heard) = listener(&database).await;
    for id in 1..=300 {
        database.client.execute("insert into t values ($1)", &[&id]).await.unwrap();
    }
    assert_eq!(rings(&database, &mut heard).await, [""; 0], "before any relay");
    let relay = Relay::start(&database.url).await;
    asleep(&relay, &database).await;
    relay.stop().await;
    eventually("the relay's connections end", || async {
        let left = "select count(*) from pg_stat_activity where datname = current_database() and application_name like 'relay%'";
        (database.value(left).await == "0").then_some(())
    })
    .await;
    rings(&database, &mut heard).await;
    for id in 301..=600 {
        database.client.execute("insert into t values ($1)", &[&id]).await.unwrap();
    }
    assert_eq!(rings(&database, &mut heard).await, [""; 0], "after one that slept");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_that_did_not_ring_is_waited_for() {
    let database = watched().await;
    let holder = database.connect().await;
    holder.batch_execute(&stay_awake()).await.unwrap();
    let relay = Relay::start(&database.url).await;
    let mut client = subscriber(&relay).await;
    // The relay is awake, so this writer is silent; then nothing but this writer keeps the relay from sleeping.
    let writer = database.connect().await;
    writer.batch_execute("begin; insert into t values (1)").await.unwrap();
    holder.batch_execute("select pg_advisory_unlock_all()").await.unwrap();
    database.run("insert into t values (2)").await;
    assert_eq!(client.change().await["record"]["id"], 2);
    writer.batch_execute("commit").await.unwrap();
    assert_eq!(client.change().await["record"]["id"], 1);
    assert_eq!(relay.ring_count(), 0);
    asleep(&relay, &database).await;
    database.run("insert into t values (3)").await;
    assert_eq!(client.change().await["record"]["id"], 3);
    assert_eq!(relay.ring_count(), 1);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_cut_lose_nothing() {
    let database = watched().await;
    let relay = Relay::start(&database.url).await;
    let mut client = subscriber(&relay).await;
    let mut id = 0;
    for cut in ["relay doorbell", "relay", "relay judge", "relay%"] {
        asleep(&relay, &database).await;
        database
            .run(&format!(
                "select pg_terminate_backend(pid) from pg_stat_activity
                 where datname = current_database() and application_name like '{cut}'"
            ))
            .await;
        for _ in 0..3 {
            id += 1;
            database.run(&format!("insert into t values ({id})")).await;
        }
        for expected in id - 2..=id {
            assert_eq!(client.change().await["record"]["id"], expected, "{cut} was cut");
        }
    }
    assert!(relay.figure("relay_source_interruptions_total") >= 2);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_relay_asks_postgresql_nothing() {
    const LAST: &str = "select max(query_start) from pg_stat_activity
        where datname = current_database() and application_name like 'relay%'";
    let database = watched().await;
    let relay = Relay::start(&database.url).await;
    let _client = subscriber(&relay).await;
    asleep(&relay, &database).await;
    let last = database.value(LAST).await;
    // Nothing can be waited for where nothing is to happen; a second holds 500 polls.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(database.value(LAST).await, last);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_changes_come_the_whole_catalog_is_compared_once_a_second() {
    let database = watched().await;
    database
        .run("do $$ begin execute format('alter database %I set track_functions = pl', current_database()); end $$")
        .await;
    let relay = Relay::start(&database.url).await;
    let mut client = subscriber(&relay).await;
    let began = Instant::now();
    for id in 1.. {
        database.run(&format!("insert into t values ({id})")).await;
        assert_eq!(client.change().await["record"]["id"], id);
        if began.elapsed() > Duration::from_secs(5) {
            break;
        }
    }
    let seconds = began.elapsed().as_secs();
    relay.stop().await;
    let count = "select coalesce(sum(calls), 0) from pg_stat_user_functions where funcname = 'catalog_marks'";
    let calls = eventually("the comparisons are counted", || async {
        let calls: u64 = database.value(count).await.parse().unwrap();
        (calls >= seconds).then_some(calls)
    })
    .await;
    // The start and the join compare it a few times.
    assert!(calls <= seconds + 8, "{calls} in {seconds} s");
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_pooler_that_swallows_the_bell_the_relay_polls_and_holds_no_lock() {
    let held = format!("select count(*) from pg_locks l where {}", Lock::any_is_held());
    let database = watched().await;
    let pooler = Pooler::start(&database.url, "transaction").await;
    let relay = Relay::with(&database.url, |settings| settings.doorbell_url = Some(pooler.url.clone())).await;
    assert_eq!(relay.figure("relay_source_up"), 1, "it knows that it hears nothing");
    let mut client = subscriber(&relay).await;
    for id in 1..=20 {
        database.run(&format!("insert into t values ({id})")).await;
        assert_eq!(client.change().await["record"]["id"], id);
    }
    assert_eq!(database.value(&held).await, "0");
    assert_eq!(relay.figure("relay_leader"), 0);
    relay.stop().await;
}
