//! Several relays on one database: one leads, the others read when it rings, and take over when it is gone.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::process::Child;
use tokio::sync::mpsc::unbounded_channel;

use relay::postgres::connect::pool::Server;
use relay::postgres::locks::Lock;

use crate::support::client::Client;
use crate::support::database::Database;
use crate::support::http::get;
use crate::support::program;
use crate::support::proxy::Proxy;
use crate::support::relay::Relay;
use crate::support::{SECRET, eventually, token};

/// The relays' statements but for the try for the lock, and the look who lives on a connection of its own, the newest first.
fn asked() -> String {
    format!(
        "select coalesce(max(query_start)::text, '') from pg_stat_activity where datname = current_database() \
         and application_name in ('relay', 'relay doorbell', 'relay judge') and query not like '%try_advisory_lock({})%'",
        Lock::Leader
    )
}

async fn watched() -> Database {
    let database = Database::new().await;
    database.run("create table t (id int primary key); grant select on t to authenticated; select relay.watch('t')").await;
    database
}

fn reader() -> String {
    token("authenticated", None, json!({}))
}

async fn subscriber(relay: &Relay) -> Client {
    let mut client = Client::connect(relay, &reader()).await;
    client.subscribe("realtime:t", json!([{"event": "*", "schema": "public", "table": "t"}])).await;
    client
}

fn leads(relay: &Relay) -> bool {
    relay.metrics().lines().any(|line| line == "relay_leader 1")
}

/// Waits until the leader sleeps and there are so many others.
async fn asleep(database: &Database, followers: u32) {
    eventually("the leader sleeps", || async {
        let state = database
            .value("select concat_ws(' ', asleep, leader is not null, followers) from relay.health")
            .await;
        (state == format!("t t {followers}")).then_some(())
    })
    .await;
}

/// The program on this database, and its address.
fn process(database: &Database) -> (Child, std::net::SocketAddr) {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let listen = port.to_string();
    let arguments = ["serve", "--database-url", &database.url, "--jwt-secret", SECRET, "--listen", &listen];
    let child = program::relay(&arguments)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    (child, port)
}

#[tokio::test(flavor = "multi_thread")]
async fn two_relays_serve_the_same_changes() {
    let database = watched().await;
    let (one, other) = (Relay::start(&database.url).await, Relay::start(&database.url).await);
    asleep(&database, 1).await;
    assert_eq!((leads(&one), leads(&other)), (true, false));
    let mut clients = [subscriber(&one).await, subscriber(&other).await];
    let writer = database.connect().await;
    // Polling is an hour away: whatever arrives was rung for, whether the leader slept or was awake.
    for id in 1..=300 {
        if id % 100 == 1 {
            asleep(&database, 1).await;
        }
        writer.execute("insert into t values ($1)", &[&id]).await.unwrap();
    }
    for client in &mut clients {
        let changes = client.changes_until(|change| change["record"]["id"] == 300).await;
        let ids: Vec<i64> = changes.iter().map(|change| change["record"]["id"].as_i64().unwrap()).collect();
        assert_eq!(ids, (1..=300).collect::<Vec<_>>());
    }
    for relay in [&one, &other] {
        assert!(relay.metrics().contains("relay_changes_found_by_polling_total 0"));
    }
    one.stop().await;
    other.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_pair_asks_postgresql_nothing_but_who_leads() {
    let database = watched().await;
    let (one, other) = (Relay::start(&database.url).await, Relay::start(&database.url).await);
    let _clients = [subscriber(&one).await, subscriber(&other).await];
    asleep(&database, 1).await;
    // The last statement of the follower's doorbell is a try from now on; what others asked last stays.
    eventually("nothing is asked any more", || async {
        let last = database.value(&asked()).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        (database.value(&asked()).await == last).then_some(())
    })
    .await;
    let tries = format!(
        "select query_start::text from pg_stat_activity where datname = current_database() \
         and application_name = 'relay doorbell' and query like '%try_advisory_lock({})%'",
        Lock::Leader
    );
    let mut seen = BTreeSet::new();
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(2) {
        seen.insert(database.value(&tries).await);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // One every 400 ms, and the last of the leader's.
    let most = 2 + started.elapsed().as_millis() / 350;
    assert!(2 <= seen.len() && seen.len() as u128 <= most, "{} tries in {:?}", seen.len(), started.elapsed());
    one.stop().await;
    other.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_who_takes_the_leaders_lock_delays_the_first_change_and_no_other() {
    let database = watched().await;
    let stranger = database.connect().await;
    stranger.batch_execute(&format!("select pg_advisory_lock({})", Lock::Leader)).await.unwrap();
    let poll = Duration::from_secs(4);
    let relay = Relay::with(&database.url, |settings| settings.poll_ms = Some(poll.as_millis() as u64)).await;
    let mut client = subscriber(&relay).await;
    let started = Instant::now();
    for id in 1..=5 {
        database.run(&format!("insert into t values ({id})")).await;
        client.changes_until(|change| change["record"]["id"] == id).await;
    }
    // Each would have waited for the next poll.
    assert!(started.elapsed() < 3 * poll, "{:?}", started.elapsed());
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_without_followers_sends_no_notification() {
    let database = watched().await;
    let relay = Relay::start(&database.url).await;
    let mut client = subscriber(&relay).await;
    asleep(&database, 0).await;
    let follower = Relay::start(&database.url).await;
    asleep(&database, 1).await;
    follower.stop().await;
    asleep(&database, 0).await;
    let (sender, mut heard) = unbounded_channel();
    let server = Server::parse(&database.url, "listener", None).unwrap();
    let session = server.connect_listening(move |notification| _ = sender.send(notification)).await.unwrap();
    session.batch_execute("listen relay_page").await.unwrap();
    for id in 1..=3 {
        asleep(&database, 0).await;
        database.run(&format!("insert into t values ({id})")).await;
        assert_eq!(client.change().await["record"]["id"], id);
    }
    asleep(&database, 0).await;
    database.run("select pg_notify('relay_page', 'end of list')").await;
    assert_eq!(heard.recv().await.unwrap().payload(), "end of list");
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_leader_is_killed_another_tells_what_came_after_within_a_second() {
    let database = watched().await;
    let (mut leader, address) = process(&database);
    eventually("it leads", || async { (get_status(address, "/readyz").await == Some(200)).then_some(()) })
        .await;
    asleep(&database, 0).await;
    let other = Relay::start(&database.url).await;
    asleep(&database, 1).await;
    let mut client = subscriber(&other).await;
    database.run("insert into t values (1)").await;
    assert_eq!(client.change().await["record"]["id"], 1);
    asleep(&database, 1).await;
    leader.kill().await.unwrap();
    let killed = Instant::now();
    database.run("insert into t values (2)").await;
    assert!(killed.elapsed() < Duration::from_millis(300), "the writer waited {:?}", killed.elapsed());
    assert_eq!(client.change().await["record"]["id"], 2);
    assert!(killed.elapsed() < Duration::from_millis(1500), "{:?}", killed.elapsed());
    assert!(leads(&other));
    asleep(&database, 0).await;
    other.stop().await;
}

async fn get_status(address: std::net::SocketAddr, path: &str) -> Option<u16> {
    crate::support::http::try_get(address, path, "").await.map(|answer| answer.status)
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_while_the_lead_changes_hands_under_load() {
    let database = watched().await;
    let mut relays = vec![Relay::start(&database.url).await, Relay::start(&database.url).await];
    asleep(&database, 1).await;
    let last = Relay::start(&database.url).await;
    let mut client = subscriber(&last).await;
    let writer = database.connect().await;
    let writing = tokio::spawn(async move {
        for id in 1..=1500 {
            writer.execute("insert into t values ($1)", &[&id]).await.unwrap();
            if id % 100 == 0 {
                tokio::time::sleep(Duration::from_millis(80)).await;
            }
        }
    });
    while let Some(relay) = relays.pop() {
        if leads(&relay) || relays.is_empty() {
            relay.stop().await;
        } else {
            relays.insert(0, relay);
        }
    }
    writing.await.unwrap();
    let changes = client.changes_until(|change| change["record"]["id"] == 1500).await;
    let ids: Vec<i64> = changes.iter().map(|change| change["record"]["id"].as_i64().unwrap()).collect();
    assert_eq!(ids, (1..=1500).collect::<Vec<_>>());
    last.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_whose_judge_does_not_answer_lets_another_lead() {
    let database = Database::new().await;
    let sql = "create function mine(int) returns boolean stable language plpgsql as 'begin return true; end';
        create table t (id int primary key); alter table t enable row level security;
        create policy own on t for select to authenticated using (mine(id));
        grant select on t to authenticated; select relay.watch('t')";
    database.run(sql).await;
    let (proxy, through) = Proxy::to_server(&database.url).await;
    let one = Relay::with(&database.url, |settings| {
        settings.stall_seconds = Some(1);
        settings.judge_url = Some(through);
    })
    .await;
    let other = Relay::start(&database.url).await;
    asleep(&database, 1).await;
    let mut clients = [subscriber(&one).await, subscriber(&other).await];
    proxy.hold();
    let writer = database.connect().await;
    for id in 1..=20 {
        writer.execute("insert into t values ($1)", &[&id]).await.unwrap();
        // Polling is an hour away: the leader has rung for it.
        assert_eq!(clients[1].change().await["record"]["id"], id);
    }
    assert_eq!((leads(&one), leads(&other)), (false, true));
    proxy.release();
    for id in 1..=20 {
        assert_eq!(clients[0].change().await["record"]["id"], id);
    }
    asleep(&database, 1).await;
    one.stop().await;
    other.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cursor_of_one_relay_is_good_for_another() {
    let database = watched().await;
    let (one, other) = (Relay::start(&database.url).await, Relay::start(&database.url).await);
    let path = format!("/realtime/v1/changes?table=t&apikey={}", reader());
    let rows = get(one.address, &path, "").await.body;
    let mut cursor = rows["cursor"].as_str().unwrap().to_owned();
    for id in 1..=6 {
        database.run(&format!("insert into t values ({id})")).await;
        let relay = if id % 2 == 0 { &one } else { &other };
        let answer = get(relay.address, &format!("{path}&since={cursor}"), "").await.body;
        let told: Vec<&Value> =
            answer["changes"].as_array().unwrap().iter().map(|change| &change["record"]["id"]).collect();
        assert_eq!(told, [&json!(id)]);
        cursor = answer["cursor"].as_str().unwrap().to_owned();
    }
    one.stop().await;
    other.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_relays_that_start_at_once_exactly_one_leads() {
    let database = watched().await;
    for _ in 0..20 {
        let (one, other) = tokio::join!(Relay::start(&database.url), Relay::start(&database.url));
        asleep(&database, 1).await;
        assert!(leads(&one) != leads(&other));
        tokio::join!(one.stop(), other.stop());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_writers_do_not_ring_the_leader_alone_polls() {
    let database = watched().await;
    database.run("do $$ begin execute format('alter database %I set relay.doorbell = off', current_database()); end $$").await;
    let (one, other) = (Relay::start(&database.url).await, Relay::start(&database.url).await);
    eventually("one leads", || async {
        (database.value("select followers from relay.health").await == "1").then_some(())
    })
    .await;
    assert!(leads(&one));
    let mut clients = [subscriber(&one).await, subscriber(&other).await];
    let writer = database.connect().await;
    for id in 1..=20 {
        writer.execute("insert into t values ($1)", &[&id]).await.unwrap();
        for client in &mut clients {
            assert_eq!(client.change().await["record"]["id"], id);
        }
    }
    assert!(other.metrics().contains("relay_changes_found_by_polling_total 0"));
    one.stop().await;
    other.stop().await;
}
