//! PostgreSQL comes and goes: clients stay connected, are told when nothing can come, and get everything afterwards.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::delivery::crash::Cluster;
use crate::support::client::Client;
use crate::support::database::{Database, connect, make_logins};
use crate::support::http::Events;
use crate::support::proxy::Proxy;
use crate::support::relay::Relay;
use crate::support::{eventually, token};

const TABLE: &str =
    "create table t (id int primary key); grant select on t to authenticated; select relay.watch('t')";
const BINDING: &str = r#"[{"event": "*", "schema": "public", "table": "t"}]"#;

fn reader() -> String {
    token("authenticated", None, json!({}))
}

async fn join(relay: &Relay) -> Client {
    let mut client = Client::connect(relay, &reader()).await;
    client.subscribe("realtime:t", serde_json::from_str(BINDING).unwrap()).await;
    client
}

fn system(status: &str, message: &str) -> Value {
    json!({"channel": "t", "extension": "postgres_changes", "message": message, "status": status})
}

fn stalled() -> Value {
    system("error", "Stalled: the database cannot be asked now, changes follow in order once it is back")
}

fn resumed() -> Value {
    system("ok", "Feed resumed")
}

/// What `/readyz` and `/livez` say.
async fn state(relay: &Relay) -> [(u16, String); 2] {
    let mut told = Vec::new();
    for path in ["/readyz", "/livez"] {
        let answer = crate::support::http::text(relay.address, path).await;
        told.push(answer);
    }
    told.try_into().unwrap()
}

/// The ids of the next changes, which must be these; what the client is told beside them.
async fn told(client: &mut Client, ids: std::ops::RangeInclusive<i64>) -> Vec<Value> {
    let mut beside = Vec::new();
    for id in ids {
        loop {
            let frame = client.frame().await;
            if frame[3] == "postgres_changes" {
                assert_eq!(frame[4]["data"]["record"]["id"], id);
                break;
            }
            beside.push(frame[4].clone());
        }
    }
    beside
}

async fn installed(settings: &[&str]) -> Cluster {
    let cluster = Cluster::start(settings).await;
    let mut session = connect(&cluster.url).await;
    relay::postgres::install::install(&mut session).await.unwrap();
    make_logins(&session).await;
    session.batch_execute(TABLE).await.unwrap();
    cluster
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_connect_while_the_database_is_away_and_are_joined_when_it_comes() {
    let cluster = installed(&[]).await;
    cluster.stop("stop");
    let relay = Relay::unready(&cluster.url, |_| {}).await;
    let mut waiting = Client::connect(&relay, &reader()).await;
    let bindings: Value = serde_json::from_str(BINDING).unwrap();
    let payload = json!({"config": {"postgres_changes": bindings}});
    waiting.push(Some("1"), "realtime:t", "phx_join", payload.clone()).await;
    // No client waits longer than its join may take: it is told to join again.
    let started = Instant::now();
    let refused = waiting.frame().await;
    assert_eq!(refused[4]["status"], "error", "{refused}");
    assert!(started.elapsed() > Duration::from_secs(7), "{:?}", started.elapsed());
    eventually("the reason is told", || async {
        (state(&relay).await == [(503, "not ready: PostgreSQL cannot be reached".into()), (200, "ok".into())])
            .then_some(())
    })
    .await;
    waiting.push(Some("2"), "realtime:t", "phx_join", payload).await;
    cluster.restart(&[]);
    assert_eq!(waiting.frame().await[4]["status"], "ok");
    connect(&cluster.url).await.batch_execute("insert into t values (1)").await.unwrap();
    eventually("it is ready", || async { (state(&relay).await[0] == (200, "ready".into())).then_some(()) })
        .await;
    connect(&cluster.url).await.batch_execute("insert into t values (2)").await.unwrap();
    loop {
        let frame = waiting.frame().await;
        if frame[4]["data"]["record"]["id"] == 2 {
            break;
        }
    }
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_without_the_relay_ends_it_with_a_clear_error() {
    let database = Database::bare().await;
    let arguments = [
        "serve",
        "--database-url",
        &database.url,
        "--jwt-secret",
        crate::support::SECRET,
        "--listen",
        "127.0.0.1:0",
    ];
    let (code, _, errors) = crate::support::program::output(&arguments).await;
    assert_eq!(code, 1);
    assert!(errors.contains("run `relay install"), "{errors}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_outage_is_told_and_everything_follows_in_order() {
    let cluster = installed(&[]).await;
    let relay = Relay::with(&cluster.url, |settings| settings.stall_seconds = Some(1)).await;
    let mut client = join(&relay).await;
    let path = format!("/realtime/v1/changes?table=t&apikey={}", reader());
    let mut events = Events::open(relay.address, &path, None).await;
    cluster.stop("stop");
    assert_eq!(client.frame().await[4], stalled());
    let event = events.next().await.unwrap();
    assert_eq!((event.name.as_str(), &event.data["error"]), ("stalled", &stalled()["message"]));
    assert_eq!(state(&relay).await[0].0, 503);
    // A client that joins meanwhile is told as well, once it is joined; here no database can bind it.
    cluster.restart(&[]);
    let session = connect(&cluster.url).await;
    for id in 1..=20 {
        session.execute("insert into t values ($1)", &[&id]).await.unwrap();
    }
    let mut beside = told(&mut client, 1..=20).await;
    if beside.is_empty() {
        beside.push(client.frame().await[4].clone());
    }
    assert_eq!(beside, [resumed()]);
    let mut ids = Vec::new();
    let mut names = Vec::new();
    while ids.len() < 20 || names.is_empty() {
        let event = events.next().await.unwrap();
        match event.name.as_str() {
            "change" => ids.push(event.data["record"]["id"].as_i64().unwrap()),
            name => names.push(name.to_owned()),
        }
    }
    assert_eq!((ids, names), ((1..=20).collect(), vec!["resumed".to_owned()]));
    assert_eq!(state(&relay).await[0], (200, "ready".into()));
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_judge_that_does_not_answer_stalls_the_feed_and_loses_nothing() {
    let sql = "create function mine(int) returns boolean stable language plpgsql as 'begin return true; end';
        create table t (id int primary key); alter table t enable row level security;
        create policy own on t for select to authenticated using (mine(id));
        grant select on t to authenticated; select relay.watch('t')";
    let database = Database::new().await;
    database.run(sql).await;
    let (proxy, through) = Proxy::to_server(&database.url).await;
    let relay = Relay::with(&database.url, |settings| {
        settings.stall_seconds = Some(1);
        settings.judge_url = Some(through);
    })
    .await;
    let mut client = join(&relay).await;
    database.run("insert into t values (1)").await;
    assert_eq!(told(&mut client, 1..=1).await, [Value::Null; 0]);
    proxy.hold();
    database.run("insert into t values (2)").await;
    assert_eq!(client.frame().await[4], stalled());
    assert_eq!(
        state(&relay).await,
        [(503, "not ready: policies could not be evaluated for too long".into()), (200, "ok".into())]
    );
    proxy.release();
    database.run("insert into t values (3)").await;
    let mut beside = told(&mut client, 2..=3).await;
    if beside.is_empty() {
        beside.push(client.frame().await[4].clone());
    }
    assert_eq!(beside, [resumed()]);
    relay.stop().await;
}

/// A relay on a database of its own, its changelog and its doorbell each behind a proxy, its judge not.
async fn behind_proxies() -> (Database, Relay, Proxy, Proxy) {
    let database = Database::new().await;
    database.run(TABLE).await;
    let (changelog, changelog_url) = Proxy::to_server(&database.url).await;
    let (bell, bell_url) = Proxy::to_server(&database.url).await;
    let relay = Relay::with(&changelog_url, |settings| {
        settings.stall_seconds = Some(1);
        settings.doorbell_url = Some(bell_url);
        settings.judge_url = Some(database.url.clone());
    })
    .await;
    (database, relay, changelog, bell)
}

async fn asleep(database: &Database) {
    eventually("the relay sleeps", || async {
        (database.value("select asleep from relay.health").await == "t").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_doorbell_that_goes_silent_is_noticed_and_the_relay_leads_again_at_once() {
    let (database, relay, _changelog, bell) = behind_proxies().await;
    let mut client = join(&relay).await;
    asleep(&database).await;
    let silent = Instant::now();
    bell.hold();
    // Its connection stands at both ends, with all its locks; polling is an hour away.
    database.run("insert into t values (1)").await;
    eventually("the probe fails", || async {
        (relay.figure("relay_source_interruptions_total") > 0).then_some(())
    })
    .await;
    assert!(silent.elapsed() < Duration::from_secs(15), "{:?}", silent.elapsed());
    bell.release();
    eventually("it leads", || async { (relay.figure("relay_leader") == 1).then_some(()) }).await;
    told(&mut client, 1..=1).await;
    database.run("insert into t values (2)").await;
    told(&mut client, 2..=2).await;
    assert_eq!(database.value("select followers from relay.health").await, "0");
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changelog_that_goes_silent_stalls_the_feed_and_is_read_on_from_where_it_was() {
    let (database, relay, changelog, _bell) = behind_proxies().await;
    let mut client = join(&relay).await;
    database.run("insert into t values (1)").await;
    told(&mut client, 1..=1).await;
    changelog.hold();
    database.run("insert into t values (2)").await;
    assert_eq!(client.frame().await[4], stalled());
    assert_eq!(state(&relay).await[0].0, 503);
    database.run("insert into t values (3)").await;
    changelog.release();
    let mut beside = told(&mut client, 2..=3).await;
    if beside.is_empty() {
        beside.push(client.frame().await[4].clone());
    }
    assert_eq!(beside, [resumed()]);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_is_refused_with_its_reason_and_read_once_it_is_promoted() {
    let cluster = installed(&[]).await;
    cluster.stop("stop");
    cluster.become_standby();
    cluster.restart(&[]);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let arguments =
        ["serve", "--database-url", &cluster.url, "--jwt-secret", crate::support::SECRET, "--listen", &port];
    let mut child = crate::support::program::relay(&arguments).spawn().unwrap();
    let started = Instant::now();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut refusals = 0;
    while refusals < 2 {
        let line = tokio::time::timeout(crate::support::PATIENCE, lines.next_line())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        refusals += u32::from(line.contains("this server is a standby"));
    }
    assert!(started.elapsed() > Duration::from_secs(2), "twice in {:?}", started.elapsed());
    let (status, why) = crate::support::http::text(port.parse().unwrap(), "/readyz").await;
    assert_eq!(
        (status, why.as_str()),
        (503, "not ready: the database is not as the relay needs it, its log says why")
    );
    connect(&cluster.url).await.batch_execute("select pg_promote()").await.unwrap();
    eventually("it is ready", || async {
        (crate::support::http::text(port.parse().unwrap(), "/readyz").await.0 == 200).then_some(())
    })
    .await;
}

/// A login of its own for the relay, which a test may take rights from.
async fn with_login() -> (Database, String, String) {
    let database = Database::new().await;
    database.run(TABLE).await;
    let login = format!("relay_{}", database.url.rsplit_once('/').unwrap().1);
    database
        .run(&format!("create role {login} login in role relay_reader; grant authenticated to {login}"))
        .await;
    let url = database.url.replacen("postgres@", &format!("{login}@"), 1);
    (database, login, url)
}

/// What is taken away and given back, what ends the relay's connections in between, and what `/readyz` says of it.
async fn taken_away(take: &str, give: &str, why: &str) {
    let (database, login, url) = with_login().await;
    let relay = Relay::with(&url, |settings| settings.stall_seconds = Some(1)).await;
    let mut client = join(&relay).await;
    database.run("insert into t values (1)").await;
    told(&mut client, 1..=1).await;
    database.run(&take.replace("$LOGIN", &login)).await;
    let cut = format!("select pg_terminate_backend(pid) from pg_stat_activity where usename = '{login}'");
    database.run(&cut).await;
    database.run("insert into t values (2)").await;
    assert_eq!(client.frame().await[4], stalled());
    assert_eq!(state(&relay).await[0], (503, format!("not ready: {why}")));
    let tries = relay.figure("relay_source_interruptions_total");
    assert!(tries < 10, "{tries} tries in a second or two");
    database.run("insert into t values (3)").await;
    database.run(&give.replace("$LOGIN", &login)).await;
    let mut beside = told(&mut client, 2..=3).await;
    if beside.is_empty() {
        beside.push(client.frame().await[4].clone());
    }
    assert_eq!(beside, [resumed()]);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_is_refused_for_a_while_loses_nothing() {
    taken_away(
        "alter role $LOGIN nologin",
        "alter role $LOGIN login",
        "PostgreSQL refuses the relay's login",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_that_are_revoked_for_a_while_lose_nothing() {
    taken_away(
        "revoke relay_reader from $LOGIN",
        "grant relay_reader to $LOGIN",
        "PostgreSQL refuses the relay a right that it needs",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_connection_left_for_a_while_loses_nothing_and_is_not_hammered() {
    taken_away(
        "alter role $LOGIN connection limit 0",
        "alter role $LOGIN connection limit -1",
        "PostgreSQL has no connection left",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn timeouts_of_idle_sessions_do_not_interrupt_the_feed() {
    let (database, login, url) = with_login().await;
    for timeout in ["idle_session_timeout", "idle_in_transaction_session_timeout", "statement_timeout"] {
        database.run(&format!("alter role {login} set {timeout} = '300ms'")).await;
    }
    let relay = Relay::start(&url).await;
    let mut client = join(&relay).await;
    for id in 1..=2 {
        asleep(&database).await;
        // The timeouts are to pass: nothing else can be waited for.
        tokio::time::sleep(Duration::from_secs(1)).await;
        database.run(&format!("insert into t values ({id})")).await;
        told(&mut client, id..=id).await;
    }
    assert_eq!(relay.figure("relay_source_interruptions_total"), 0);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_read_only_by_default_is_served() {
    let database = Database::new().await;
    database.run(TABLE).await;
    database
        .run("do $$ begin execute format('alter database %I set default_transaction_read_only = on', current_database()); end $$")
        .await;
    let relay = Relay::start(&database.url).await;
    let mut client = join(&relay).await;
    for id in 1..=3 {
        asleep(&database).await;
        // This session is older than the setting.
        database.run(&format!("insert into t values ({id})")).await;
        told(&mut client, id..=id).await;
    }
    assert_eq!(relay.figure("relay_source_interruptions_total"), 0);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_from_before_the_changelog_is_read_misses_nothing() {
    let database = Database::new().await;
    database.run(TABLE).await;
    for id in 1..=5 {
        // Joined while the relay is still on its way to the changelog.
        let relay = Relay::unready(&database.url, |_| {}).await;
        let mut client = join(&relay).await;
        database.run(&format!("insert into t values ({id})")).await;
        assert_eq!(client.change().await["record"]["id"], id);
        relay.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changelog_that_goes_silent_in_the_middle_of_a_large_transaction_is_told_and_the_rest_follows() {
    const MANY: i64 = 40_000;
    let (database, relay, changelog, _bell) = behind_proxies().await;
    let mut client = join(&relay).await;
    database.run(&format!("insert into t select generate_series(1, {MANY})")).await;
    told(&mut client, 1..=6000).await;
    changelog.hold();
    let mut next = 6001;
    loop {
        let frame = client.frame().await;
        if frame[3] != "postgres_changes" {
            assert_eq!(frame[4], stalled());
            break;
        }
        assert_eq!(frame[4]["data"]["record"]["id"], next);
        next += 1;
    }
    assert!(next < MANY, "all of it had been read before");
    changelog.release();
    let beside = told(&mut client, next..=MANY).await;
    assert!(beside.is_empty() || beside == [resumed()], "{beside:?}");
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_feed_that_fails_again_and_again_is_stalled_though_it_connects_each_time() {
    let database = Database::new().await;
    database.run(TABLE).await;
    // Longer than any pause between two tries.
    let relay = Relay::with(&database.url, |settings| settings.stall_seconds = Some(7)).await;
    let mut client = join(&relay).await;
    // What no relay can read.
    database
        .run(
            "insert into relay.log_0 (number, xid, at, kind)
             values (nextval('relay.change_number'), pg_current_xact_id(), now(), 'X 0 0')",
        )
        .await;
    database.run("insert into t values (1)").await;
    assert_eq!(client.frame().await[4], stalled());
    assert_eq!(state(&relay).await[0].0, 503);
    database.run("delete from relay.log_0 where kind = 'X 0 0'").await;
    let mut beside = told(&mut client, 1..=1).await;
    if beside.is_empty() {
        beside.push(client.frame().await[4].clone());
    }
    assert_eq!(beside, [resumed()]);
    relay.stop().await;
}
