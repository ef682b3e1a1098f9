//! Histories that end: a standby takes over, a disk is put back, a dump comes into another cluster, the schema is dropped.
//! Connected readers get a gap and then everything after it; no reader waits for changes that will never come.

use std::path::PathBuf;
use std::process::Command;

use serde_json::json;
use tokio_postgres::Client as Session;

use crate::delivery::crash::{Cluster, reconnected};
use crate::support::client::Client;
use crate::support::database::{Database, connect, make_logins, with_database};
use crate::support::http::get;
use crate::support::program::clients_of_postgresql;
use crate::support::relay::Relay;
use crate::support::stage::Stage;
use crate::support::{eventually, token};

const TABLE: &str = "create table t (id int primary key); grant select on t to authenticated;";

fn user() -> String {
    token("authenticated", None, json!({}))
}

async fn joined(relay: &Relay) -> Client {
    let mut client = Client::connect(relay, &user()).await;
    client.subscribe("realtime:t", json!([{"event": "*", "schema": "public", "table": "t"}])).await;
    client
}

async fn install(url: &str) -> Session {
    let mut session = connect(url).await;
    relay::postgres::install::install(&mut session).await.unwrap();
    make_logins(&session).await;
    session
}

/// Runs statements one by one: each is a transaction.
async fn each(session: &Session, ids: std::ops::RangeInclusive<i32>) {
    for id in ids {
        session.execute("insert into t values ($1)", &[&id]).await.unwrap();
    }
}

/// Where the files of a cluster are.
async fn files(session: &Session) -> PathBuf {
    session.query_one("show data_directory", &[]).await.unwrap().get::<_, String>(0).into()
}

fn copy(from: &PathBuf, to: &PathBuf) {
    let _ = std::fs::remove_dir_all(to);
    assert!(Command::new("cp").arg("-a").args([from, to]).status().unwrap().success());
}

async fn told(client: &mut Client, ids: std::ops::RangeInclusive<i32>) {
    for id in ids {
        assert_eq!(client.change().await["record"]["id"], id);
    }
}

/// Reads until a gap is told.
async fn gap(client: &mut Client) {
    loop {
        let frame = client.frame().await;
        assert_ne!(frame[3], "postgres_changes", "a change before the gap: {frame}");
        if frame[4]["message"].as_str().is_some_and(|message| message.starts_with("Gap: ")) {
            return;
        }
    }
}

fn path(more: &str) -> String {
    format!("/realtime/v1/changes?table=t&apikey={}{more}", user())
}

async fn cursor(relay: &Relay) -> String {
    let answer = get(relay.address, &path(""), "").await;
    answer.body["cursor"].as_str().unwrap_or_else(|| panic!("{answer:?}")).to_owned()
}

/// The status with which a poll is answered that goes on at this cursor.
async fn resumed(relay: &Relay, cursor: &str) -> u16 {
    eventually("the database can be asked", || async {
        let answer = get(relay.address, &path(&format!("&wait=0&since={cursor}")), "").await;
        (answer.status != 503).then_some(answer.status)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_takes_over_without_the_last_changes_is_a_gap() {
    let (primary, standby) = (Cluster::start(&[]).await, Cluster::start(&[]).await);
    let session = install(&primary.url).await;
    session.batch_execute(&format!("{TABLE} select relay.watch('t')")).await.unwrap();
    let (here, there) = (files(&session).await, files(&connect(&standby.url).await).await);
    primary.stop("stop");
    standby.stop("stop");
    copy(&here, &there);
    std::fs::write(there.join("standby.signal"), "").unwrap();
    primary.restart(&[]);
    let follow = format!("primary_conninfo={}", primary.url);
    standby.restart(&["-c", &follow]);

    let host = |url: &str| url.split(['@', '/']).nth(3).unwrap().to_owned();
    let both = format!(
        "postgres://postgres@{},{}/postgres?target_session_attrs=read-write",
        host(&primary.url),
        host(&standby.url)
    );
    let relay = Relay::with(&both, |_| {}).await;
    let mut client = joined(&relay).await;
    let session = reconnected(&primary.url).await;
    each(&session, 1..=3).await;
    told(&mut client, 1..=3).await;
    let replica = reconnected(&standby.url).await;
    eventually("the standby has followed", || async {
        let count: i64 = replica.query_one("select count(*) from t", &[]).await.unwrap().get(0);
        (count == 3).then_some(())
    })
    .await;
    // What is committed and told now, the standby never hears of.
    standby.stop("stop");
    each(&session, 4..=20).await;
    told(&mut client, 4..=20).await;
    let old = cursor(&relay).await;
    primary.stop("kill");
    standby.restart(&["-c", &follow]);
    let session = reconnected(&standby.url).await;
    session.batch_execute("select pg_promote()").await.unwrap();
    each(&session, 101..=103).await;
    gap(&mut client).await;
    // The ids of its transactions were those of others before, and go beyond them.
    each(&session, 104..=160).await;
    // Those of before the relay was there again belong to the gap.
    let changes = client.changes_until(|change| change["record"]["id"] == 160).await;
    let ids: Vec<i64> = changes.iter().map(|change| change["record"]["id"].as_i64().unwrap()).collect();
    assert!(ids.len() >= 57 && ids == (161 - ids.len() as i64..=160).collect::<Vec<_>>(), "{ids:?}");
    assert_eq!(resumed(&relay, &old).await, 410);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_put_back_to_an_earlier_moment_is_a_gap() {
    let cluster = Cluster::start(&[]).await;
    let session = install(&cluster.url).await;
    session.batch_execute(&format!("{TABLE} select relay.watch('t')")).await.unwrap();
    let now = files(&session).await;
    let then = now.with_extension("then");
    cluster.stop("stop");
    copy(&now, &then);
    cluster.restart(&[]);
    let relay = Relay::with(&cluster.url, |_| {}).await;
    let mut client = joined(&relay).await;
    each(&reconnected(&cluster.url).await, 1..=50).await;
    told(&mut client, 1..=50).await;
    let old = cursor(&relay).await;
    cluster.stop("kill");
    std::fs::remove_dir_all(&now).unwrap();
    std::fs::rename(&then, &now).unwrap();
    cluster.restart(&[]);
    let session = reconnected(&cluster.url).await;
    gap(&mut client).await;
    each(&session, 101..=110).await;
    told(&mut client, 101..=110).await;
    assert_eq!(resumed(&relay, &old).await, 410);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changelog_that_came_with_a_dump_never_comes_up_as_new() {
    let source = Database::new().await;
    let Some(programs) = clients_of_postgresql(&source).await else { return };
    let cluster = Cluster::start(&[]).await;
    let session = install(&cluster.url).await;
    session.batch_execute("create database copy").await.unwrap();
    source.run(&format!("{TABLE} select relay.watch('t'); insert into t values (1)")).await;
    let relay = Relay::start(&source.url).await;
    let foreign = cursor(&relay).await;
    relay.stop().await;
    // Its transaction's id is one that the other cluster will hand out soon.
    let xid: String = session.query_one("select pg_current_xact_id()::text", &[]).await.unwrap().get(0);
    let soon = xid.parse::<i64>().unwrap() + 400;
    source.run(&format!("update relay.log set xid = '{soon}' where kind like 'I %'")).await;
    let copy = with_database(&cluster.url, "copy");
    let dump = Command::new(programs.join("pg_dump")).args(["-d", &source.url]).output().unwrap();
    assert!(dump.status.success());
    let file = std::env::temp_dir().join(format!("relay-dump-{}.sql", std::process::id()));
    std::fs::write(&file, dump.stdout).unwrap();
    let restored = Command::new(programs.join("psql"))
        .args(["-q", "-v", "ON_ERROR_STOP=1", "-d", &copy, "-f"])
        .arg(&file)
        .output()
        .unwrap();
    std::fs::remove_file(file).unwrap();
    assert!(restored.status.success(), "{}", String::from_utf8_lossy(&restored.stderr));

    let session = install(&copy).await;
    let relay = Relay::start(&copy).await;
    let mut client = joined(&relay).await;
    let spend = "do $$ begin for n in 1 .. 500 loop perform pg_current_xact_id(); commit; end loop; end $$";
    session.batch_execute(spend).await.unwrap();
    let xid: String = session.query_one("select pg_current_xact_id()::text", &[]).await.unwrap().get(0);
    assert!(xid.parse::<i64>().unwrap() > soon);
    each(&session, 2..=3).await;
    told(&mut client, 2..=3).await;
    assert_eq!(resumed(&relay, &foreign).await, 410);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_that_is_dropped_and_installed_again_is_a_gap_and_then_the_feed_continues() {
    // No writer rings when the triggers are gone.
    let often = |settings: &mut relay::settings::Settings, _: &str| settings.poll_ms = Some(50);
    let stage = Stage::with(&format!("{TABLE} select relay.watch('t')"), often).await;
    let mut client = joined(&stage.relay).await;
    stage.run("insert into t values (1)").await;
    told(&mut client, 1..=1).await;
    let old = cursor(&stage.relay).await;
    stage.run("drop schema relay cascade; insert into t values (2)").await;
    eventually("the feed is interrupted", || async { (!stage.relay.is_ready()).then_some(()) }).await;
    // Another table gets the number that `t` had.
    stage
        .run("create table other (id int primary key); grant select on other to authenticated; insert into other values (7)")
        .await;
    install(&stage.database.url).await;
    stage.run("select relay.watch('other'), relay.watch('marker'), relay.watch('t')").await;
    gap(&mut client).await;
    assert_eq!(resumed(&stage.relay, &old).await, 410);
    // The channel is bound anew: from its confirmation on everything is told, and nothing of the other table.
    let confirmed = loop {
        let frame = client.frame().await;
        if frame[4]["status"] == "ok" && frame[3] == "system" {
            break frame;
        }
    };
    assert_eq!(confirmed[4]["message"], "Subscribed to PostgreSQL");
    stage.run("insert into other values (8); insert into t values (3)").await;
    assert_eq!(client.change().await["record"], json!({"id": 3}));
}
