//! Connections to PostgreSQL that cannot be had, or are not what they seem.

use std::time::Duration;

use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_postgres::NoTls;

use relay::postgres::connect::pool::{Lease, Server};

use crate::support::client::Client;
use crate::support::database::{Database, with_database};
use crate::support::http::{Answer, get};
use crate::support::pooler::Pooler;
use crate::support::program::output;
use crate::support::proxy::Proxy;
use crate::support::relay::Relay;
use crate::support::{PATIENCE, SECRET, eventually, token};

/// What `relay serve` says as it ends.
async fn refused(urls: &[&str]) -> String {
    let serve = ["serve", "--jwt-secret", SECRET, "--listen", "127.0.0.1:0"];
    let (code, _, told) = timeout(PATIENCE, output(&[&serve, urls].concat())).await.expect("it ends");
    assert_eq!(code, 1, "{told}");
    told
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_in_transaction_mode_is_found_at_the_start_and_refused() {
    let database = Database::new().await;
    let pooler = Pooler::start(&database.url, "transaction").await;
    for crowd in [0, 8] {
        // Others who use the pooler get and give back its sessions all the time.
        let mut others = JoinSet::new();
        for _ in 0..crowd {
            let (client, connection) = tokio_postgres::connect(&pooler.url, NoTls).await.unwrap();
            others.spawn(async { _ = connection.await });
            others.spawn(async move { while client.batch_execute("select").await.is_ok() {} });
        }
        for (urls, setting) in [
            (vec!["--database-url", &pooler.url], "--database-url (DATABASE_URL)"),
            (
                vec!["--database-url", &database.url, "--judge-url", &pooler.url],
                "--judge-url (RELAY_JUDGE_URL)",
            ),
        ] {
            let told = refused(&urls).await;
            assert!(told.contains(setting) && told.contains("transaction mode"), "{told}");
        }
        for command in [&["install"][..], &["watch", "t"], &["doctor"], &["explain", "t"]] {
            let (code, findings, told) = output(&[command, &["--database-url", &pooler.url]].concat()).await;
            assert_eq!(code, 1);
            assert!((findings + &told).contains("transaction mode"), "{command:?}: {told}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_in_session_mode_is_as_good_as_none() {
    let database = Database::new().await;
    database.run("create table t (id int primary key); grant select on t to authenticated; select relay.watch('t')").await;
    let pooler = Pooler::start(&database.url, "session").await;
    let through = |settings: &mut relay::settings::Settings| {
        settings.database_url = Some(pooler.url.clone());
        settings.judge_url = Some(pooler.url.clone());
    };
    let relay = Relay::with(&database.url, through).await;
    let mut client = Client::connect(&relay, &token("authenticated", None, json!({}))).await;
    client.subscribe("realtime:t", json!([{"event": "*", "schema": "public", "table": "t"}])).await;
    database.run("insert into t values (1)").await;
    assert_eq!(client.change().await["record"]["id"], 1);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_says_why_postgresql_refuses() {
    let database = Database::bare().await;
    let login = database.url.rsplit_once('/').unwrap().1;
    database.run(&format!("create role {login} login")).await;
    let url = database.url.replacen("postgres@", &format!("{login}@"), 1);
    let pool = Server::parse(&url, "test", None).unwrap().pool(1, Duration::from_secs(1)).unwrap();
    for (change, code, is_transient) in [("connection limit 0", "53300", true), ("nologin", "28000", false)] {
        database.run(&format!("alter role {login} {change}")).await;
        let Err(error) = Lease::of(&pool).await else { panic!("{change}: it is let in") };
        assert_eq!((error.code(), error.is_transient()), (Some(code), is_transient));
        assert!(error.to_string().contains(login), "{error}");
        assert_eq!(error.refusal(), None, "this error is not for clients");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_not_there_is_to_be_made() {
    let database = Database::bare().await;
    let url = with_database(&database.url, "not_made_yet");
    for command in
        [&["serve", "--jwt-secret", SECRET, "--listen", "127.0.0.1:0"][..], &["install"], &["doctor"]]
    {
        let arguments = [command, &["--database-url", &url]].concat();
        let (code, findings, told) = timeout(PATIENCE, output(&arguments)).await.expect("it ends");
        assert_eq!(code, 1);
        let told = findings + &told;
        assert!(told.contains("createdb") && told.contains(" not_made_yet"), "{command:?}: {told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_setting_that_is_missing_is_named_as_flag_and_as_variable() {
    let database = ["--database-url", "DATABASE_URL"];
    let secret = ["--jwt-secret", "RELAY_JWT_SECRET"];
    for (command, names) in [
        (&["install"][..], &[database][..]),
        (&["doctor"], &[database]),
        (&["watch", "t"], &[database]),
        (&["serve"], &[database, secret, ["--jwks", "RELAY_JWKS"]]),
        (&["token"], &[secret]),
        (&["tail", "t"], &[secret, ["--token", "RELAY_TOKEN"]]),
    ] {
        let (code, _, told) = output(command).await;
        assert_ne!(code, 0);
        for name in names.iter().flatten() {
            assert!(told.contains(name), "{command:?} does not name {name}: {told}");
        }
    }
}

/// A relay whose rows of the table `slow` take so many seconds, while rows of `t` are there at once.
async fn slow_rows(seconds: f64, stall: u64) -> (Database, Relay) {
    let database = Database::new().await;
    let sql = format!(
        "create table t (id int primary key); create table slow (id int primary key); insert into slow values (1);
         alter table slow enable row level security; grant select on t, slow to authenticated;
         create policy slow on slow using ((select pg_sleep({seconds})) is not null);
         select relay.watch('t'), relay.watch('slow')"
    );
    database.run(&sql).await;
    let relay = Relay::with(&database.url, |settings| {
        settings.stall_seconds = Some(stall);
        settings.judge_timeout_ms = Some(10_000);
    })
    .await;
    (database, relay)
}

fn rows_of(table: &str) -> String {
    format!("/realtime/v1/changes?table={table}&apikey={}", token("authenticated", None, json!({})))
}

/// Reads that take long, at every place there is for one.
async fn fill_places(database: &Database, relay: &Relay) -> JoinSet<Answer> {
    const SLEEPING: &str = "select count(*) from pg_stat_activity
        where datname = current_database() and wait_event = 'PgSleep'";
    let mut readers = JoinSet::new();
    for _ in 0..2 {
        let address = relay.address;
        readers.spawn(async move { get(address, &rows_of("slow"), "").await });
    }
    eventually("both read", || async { (database.value(SLEEPING).await == "2").then_some(()) }).await;
    readers
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_for_rows_wait_for_those_that_read_many() {
    let (database, relay) = slow_rows(7.0, 10).await;
    let readers = fill_places(&database, &relay).await;
    assert_eq!(get(relay.address, &rows_of("t"), "").await.status, 200);
    assert!(readers.join_all().await.iter().all(|answer| answer.status == 200));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_would_wait_too_long_for_rows_is_answered_503() {
    let (database, relay) = slow_rows(2.0, 1).await;
    let readers = fill_places(&database, &relay).await;
    let answer = get(relay.address, &rows_of("t"), "").await;
    assert_eq!(answer.status, 503);
    assert!(answer.head.contains("\r\nretry-after: "), "{}", answer.head);
    assert!(readers.join_all().await.iter().all(|answer| answer.status == 200));
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_are_read_again_after_a_connection_on_which_nothing_passes_any_more() {
    let database = Database::new().await;
    database.run("create table t (id int primary key); grant select on t to authenticated; select relay.watch('t')").await;
    let (proxy, url) = Proxy::to_server(&database.url).await;
    let relay = Relay::with(&database.url, |settings| {
        settings.stall_seconds = Some(1);
        settings.judge_url = Some(url);
    })
    .await;
    let path = rows_of("t");
    assert_eq!(get(relay.address, &path, "").await.status, 200);
    proxy.hold();
    assert_eq!(get(relay.address, &path, "").await.status, 503);
    proxy.release();
    assert_eq!(get(relay.address, &path, "").await.status, 200);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_are_found_again_after_a_connection_on_which_nothing_passes_any_more() {
    let database = Database::new().await;
    database.run("create table t (id int primary key); grant select on t to authenticated; select relay.watch('t')").await;
    let (proxy, url) = Proxy::to_server(&database.url).await;
    let relay = Relay::with(&url, |settings| {
        settings.stall_seconds = Some(1);
        settings.judge_url = Some(database.url.clone());
        settings.doorbell_url = Some(database.url.clone());
    })
    .await;
    let bindings = json!([{"event": "*", "schema": "public", "table": "t"}]);
    let come = async || {
        let session = "&session=5e551011-0000-4000-8000-000000000001";
        let mut client =
            Client::at(relay.address, &token("authenticated", None, json!({})), session).await.unwrap();
        client.subscribe("realtime:t", bindings.clone()).await;
        client
    };
    let mut client = come().await;
    proxy.hold();
    database.run("insert into t values (1)").await;
    let frame = client.frame().await;
    assert_eq!(frame[4]["status"], "error", "it is told of the stall: {frame}");
    proxy.release();
    client.changes_until(|change| change["record"]["id"] == 1).await;
    come().await;
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn statements_that_the_relay_gave_up_end_in_postgresql_too() {
    let database = Database::new().await;
    let relay = Relay::with(&database.url, |settings| settings.stall_seconds = Some(1)).await;
    let other = database.connect().await;
    other.batch_execute("begin; lock table only relay.log in access exclusive mode").await.unwrap();
    eventually("reading was given up several times", || async {
        (relay.figure("relay_source_interruptions_total") >= 5).then_some(())
    })
    .await;
    // The last attempt, and those of the few seconds before it.
    let waiting = "select count(*) <= 3 from pg_stat_activity
        where datname = current_database() and wait_event_type = 'Lock' and query like '%relay.page(%'";
    eventually("the statements end", || async { (database.value(waiting).await == "t").then_some(()) }).await;
    other.batch_execute("rollback").await.unwrap();
    relay.stop().await;
}
