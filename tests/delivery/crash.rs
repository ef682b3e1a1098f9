//! PostgreSQL stops, crashes and comes back under connected subscribers: nothing is lost, and nothing shown that is gone.
#![allow(clippy::print_stdout, reason = "the figures are part of what is shown")]

use std::collections::BTreeSet;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};

use serde_json::{Value, json};
use tokio_postgres::{Client as Session, NoTls};

use crate::support::client::Client;
use crate::support::database::{connect, make_logins};
use crate::support::relay::Relay;
use crate::support::{eventually, token};

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A cluster that a test may crash: PostgreSQL's own defaults for fsync and synchronous_commit.
pub struct Cluster {
    folder: PathBuf,
    /// As its superuser.
    pub url: String,
    keeper: Child,
}

fn script(words: &[&str]) -> Command {
    let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/cluster.sh"));
    command.args(words).stdin(Stdio::null());
    command
}

impl Cluster {
    /// A fresh one. The script that keeps it stops it when this process ends, in whatever way.
    pub async fn start(settings: &[&str]) -> Self {
        let name = format!("cluster-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        let path = folder.to_str().unwrap();
        let keeper = script(&["run", path])
            .args(settings)
            .args(["--", "tail", &format!("--pid={}", std::process::id()), "-f", "/dev/null"])
            // Apart from the tests, so that what ends them cannot end it before it has stopped the cluster.
            .process_group(0)
            .spawn()
            .unwrap();
        let url = eventually("the cluster starts", || async {
            let answer = script(&["url", path]).stderr(Stdio::null()).output().unwrap();
            let url = String::from_utf8(answer.stdout).unwrap().trim().to_owned();
            (answer.status.success() && tokio_postgres::connect(&url, NoTls).await.is_ok()).then_some(url)
        })
        .await;
        Self { folder, url, keeper }
    }

    /// `stop`: as at a restart; `kill`: as in a crash.
    pub fn stop(&self, how: &str) {
        self.control(how, &[]);
    }

    /// Starts it again on the same port.
    pub fn restart(&self, settings: &[&str]) {
        self.control("start", settings);
    }

    /// Stopped, it starts as a standby that waits for a primary.
    pub fn become_standby(&self) {
        let note = PathBuf::from(format!("{}.path", self.folder.display()));
        let folder = std::fs::read_to_string(note).map_or(self.folder.clone(), |path| path.trim().into());
        std::fs::write(folder.join("data/standby.signal"), "").unwrap();
    }

    fn control(&self, word: &str, settings: &[&str]) {
        let mut command = script(&[word, self.folder.to_str().unwrap()]);
        let status = command.args(settings).stdout(Stdio::null()).status().unwrap();
        assert!(status.success(), "cluster.sh {word}");
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-TERM", &self.keeper.id().to_string()]).status();
        let _ = self.keeper.wait();
        let _ = script(&["drop", self.folder.to_str().unwrap()]).status();
        let _ = std::fs::remove_file(self.folder.with_extension("lock"));
    }
}

/// The walwriter stays away for ten seconds, so that what was not flushed is really lost in a crash.
const SETTINGS: [&str; 2] = ["-c", "wal_writer_delay=10s"];

pub async fn reconnected(url: &str) -> Session {
    eventually("PostgreSQL takes connections", || async {
        let (session, connection) = tokio_postgres::connect(url, NoTls).await.ok()?;
        tokio::spawn(connection);
        Some(session)
    })
    .await
}

/// A cluster with the watched table `t`, a relay that looks every few milliseconds, and a subscriber.
async fn scene() -> (Cluster, Relay, Client) {
    let cluster = Cluster::start(&SETTINGS).await;
    let mut session = connect(&cluster.url).await;
    relay::postgres::install::install(&mut session).await.unwrap();
    make_logins(&session).await;
    let table =
        "create table t (id int primary key); grant select on t to authenticated; select relay.watch('t')";
    session.batch_execute(table).await.unwrap();
    let relay = Relay::with(&cluster.url, |settings| settings.poll_ms = Some(5)).await;
    let mut client = Client::connect(&relay, &token("authenticated", None, json!({}))).await;
    client.subscribe("realtime:t", json!([{"event": "*", "schema": "public", "table": "t"}])).await;
    (cluster, relay, client)
}

async fn xid(session: &Session, sql: &str) -> i64 {
    session.query_one(sql, &[]).await.unwrap().get(0)
}

/// Waits until the relay has asked for a page that began after this moment.
async fn looked(session: &Session) {
    let now: String = session.query_one("select clock_timestamp()::text", &[]).await.unwrap().get(0);
    eventually("the relay looks at the changelog", || async {
        let sql = "select exists (select from pg_stat_activity where query like '%relay.page%' and state like 'idle%'
                     and pid <> pg_backend_pid() and query_start > $1::text::timestamptz)";
        session.query_one(sql, &[&now]).await.unwrap().get::<_, bool>(0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_id_that_a_crash_gave_back_is_delivered_when_it_is_used_again() {
    const XID: &str = "select pg_current_xact_id()::text::int8";
    let (cluster, relay, mut client) = scene().await;
    let mut reused = 0;
    for trial in 1..=5 {
        let session = reconnected(&cluster.url).await;
        let mut given_back = 0;
        for _ in 0..3 {
            session.batch_execute("begin; insert into t values (-1)").await.unwrap();
            given_back = xid(&session, XID).await;
            session.batch_execute("rollback").await.unwrap();
        }
        // By now a careless relay counts these ids as done.
        looked(&session).await;
        cluster.stop("kill");
        cluster.restart(&SETTINGS);
        let session = reconnected(&cluster.url).await;
        let sql = format!("insert into t values ({trial}) returning pg_current_xact_id()::text::int8");
        let committed = xid(&session, &sql).await;
        println!("trial {trial}: rolled back {given_back}, crash, committed {committed}");
        reused += i32::from(committed <= given_back);
        assert_eq!(client.change().await["record"]["id"], trial);
    }
    assert!(reused > 0, "no id was used twice: the trials prove nothing");
    relay.stop().await;
}

/// Inserts growing ids until told to end, over any number of connections.
async fn insert_until(url: String, prologue: &'static str, next: Arc<AtomicI32>, end: Arc<AtomicBool>) {
    while !end.load(Ordering::Relaxed) {
        let session = reconnected(&url).await;
        let _ = session.batch_execute(prologue).await;
        while !end.load(Ordering::Relaxed) {
            let id = next.fetch_add(1, Ordering::Relaxed);
            if session.execute("insert into t values ($1)", &[&id]).await.is_err() {
                break;
            }
        }
    }
}

fn ids(changes: &[Value]) -> Vec<i64> {
    changes.iter().map(|change| change["record"]["id"].as_i64().unwrap()).collect()
}

/// Stops PostgreSQL under load, again and again; afterwards what was told must be the table, row for row.
async fn interrupted(how: &'static str, prologue: &'static str) {
    const WRITERS: usize = 4;
    let (cluster, relay, mut client) = scene().await;
    let reader =
        tokio::spawn(async move { client.changes_until(|change| change["record"]["id"] == -1).await });
    let next = Arc::new(AtomicI32::new(0));
    for _ in 0..3 {
        let end = Arc::new(AtomicBool::new(false));
        let writers: Vec<_> = (0..WRITERS)
            .map(|_| {
                tokio::spawn(insert_until(cluster.url.clone(), prologue, Arc::clone(&next), Arc::clone(&end)))
            })
            .collect();
        let target = next.load(Ordering::Relaxed) + 400;
        eventually("the writers are at work", || async {
            (next.load(Ordering::Relaxed) > target).then_some(())
        })
        .await;
        cluster.stop(how);
        cluster.restart(&SETTINGS);
        let target = next.load(Ordering::Relaxed) + 100;
        eventually("the writers are at work again", || async {
            (next.load(Ordering::Relaxed) > target).then_some(())
        })
        .await;
        end.store(true, Ordering::Relaxed);
        for writer in writers {
            writer.await.unwrap();
        }
    }
    let session = reconnected(&cluster.url).await;
    session.batch_execute("insert into t values (-1)").await.unwrap();
    let told = ids(&reader.await.unwrap());
    let rows: BTreeSet<i64> = session
        .query("select id from t", &[])
        .await
        .unwrap()
        .iter()
        .map(|row| row.get::<_, i32>(0).into())
        .collect();
    let once: BTreeSet<i64> = told.iter().copied().collect();
    println!("{} written, {} there, {} told", next.load(Ordering::Relaxed), rows.len(), told.len());
    let phantoms: Vec<_> = once.difference(&rows).collect();
    assert!(phantoms.is_empty(), "told, but gone: {phantoms:?}");
    let lost: Vec<_> = rows.difference(&once).collect();
    assert!(lost.is_empty(), "there, but never told: {lost:?}");
    assert_eq!(told.len(), once.len(), "told twice");
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_under_load_loses_nothing() {
    interrupted("stop", "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_under_load_loses_nothing() {
    interrupted("kill", "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_crash_takes_back_was_never_told() {
    interrupted("kill", "set synchronous_commit = off").await;
}
