//! Views that are refreshed on change: a commit in a table reaches the subscribers of the view, and no writer waits for that.
#![allow(clippy::print_stdout, reason = "the figures are part of what is shown")]

use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::database::{Database, READER, with_login};
use crate::support::program::{output, relay};
use crate::support::relay::Relay;
use crate::support::{SECRET, eventually, token};

/// A view of a table with so many rows. It counts its refreshes: a query evaluates `tick()` once.
async fn view(rows: u32) -> Database {
    let database = Database::new().await;
    database
        .run(&format!(
            "create table source (id int primary key, v int);
             insert into source select i, 0 from generate_series(1, {rows}) i;
             create sequence ticks;
             create function tick() returns bigint language sql volatile security definer as 'select nextval(''public.ticks'')';
             create materialized view m as select id, v from source where (select public.tick()) > 0;
             create unique index on m (id);
             create table marker (id int primary key);
             grant select on m, marker to authenticated;
             select relay.watch('m'), relay.watch('marker')"
        ))
        .await;
    database
}

async fn subscriber(relay: &Relay) -> Client {
    let mut client = Client::connect(relay, &token("authenticated", None, json!({}))).await;
    let bindings = json!([
        {"event": "*", "schema": "public", "table": "m"},
        {"event": "*", "schema": "public", "table": "marker"},
    ]);
    client.subscribe("realtime:m", bindings).await;
    client
}

/// Waits until the view has the rows of its table, and no change may be missing.
async fn fresh(database: &Database) {
    eventually("the view has all changes", || async {
        let differs = "select exists (select id, v from m except select id, v from source) or exists (select id, v from source except select id, v from m)";
        (database.value(differs).await == "f").then_some(())
    })
    .await;
    quiet(database).await;
}

/// Waits until no noted change may be missing in a view.
async fn quiet(database: &Database) {
    eventually("the view is up to date", || async {
        let dirty = "select exists (select from relay.refreshes where dirty_since is not null or is_untold)";
        (database.value(dirty).await == "f").then_some(())
    })
    .await;
}

async fn ticks(database: &Database) -> i64 {
    database.value("select last_value from ticks").await.parse().unwrap()
}

async fn until_marker(client: &mut Client, database: &Database, id: i32) -> Vec<Value> {
    database.run(&format!("insert into marker values ({id})")).await;
    let mut changes =
        client.changes_until(|change| change["table"] == "marker" && change["record"]["id"] == id).await;
    changes.pop();
    changes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_reaches_the_subscribers_of_the_view_at_once() {
    let database = view(1000).await;
    database.run("select relay.refresh_on_change('m', '100 milliseconds')").await;
    let relay = Relay::start(&database.url).await;
    let mut client = subscriber(&relay).await;
    let mut times = Vec::new();
    for v in 1..=20 {
        quiet(&database).await;
        tokio::time::sleep(Duration::from_millis(120)).await;
        let begun = Instant::now();
        database.run(&format!("update source set v = {v} where id = 42")).await;
        assert_eq!(client.change().await["record"], json!({"id": 42, "v": v}));
        times.push(begun.elapsed());
    }
    times.sort();
    println!("commit to subscriber: median {:?}, worst {:?}", times[10], times[19]);
    // A hundred milliseconds on a machine of its own.
    assert!(times[10] < Duration::from_secs(2), "{times:?}");
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_changed_rows_of_ten_thousand_are_three_changes_and_the_table_is_not_published() {
    let database = view(10_000).await;
    database.run("grant select on source to authenticated; select relay.refresh_on_change('m')").await;
    let relay = Relay::start(&database.url).await;
    quiet(&database).await;
    let mut client = subscriber(&relay).await;
    for (n, statement) in (1..).zip([
        "update source set v = 1 where id in (7, 5000, 10000)",
        "begin; update source set v = 2 where id = 7; update source set v = 2 where id in (5000, 10000); commit",
        "delete from source where id < 4",
        "insert into source select i, 0 from generate_series(20001, 20003) i",
        "copy source from program 'printf ''30001\t1\n30002\t1\n30003\t1\n'''",
    ]) {
        database.run(statement).await;
        fresh(&database).await;
        let changes = until_marker(&mut client, &database, n).await;
        assert_eq!(changes.len(), 3, "{statement}: {changes:?}");
        assert!(changes.iter().all(|change| change["table"] == "m"), "{changes:?}");
    }
    database.run("truncate source").await;
    fresh(&database).await;
    assert_eq!(until_marker(&mut client, &database, 99).await.len(), 10_003);
    let logged = "select count(*) from relay.changes where relation not in (0, (select id from relay.watched where relation = 'm'::regclass),
                  (select id from relay.watched where relation = 'marker'::regclass))";
    assert_eq!(database.value(logged).await, "0");
    assert_eq!(
        database.value("select count(*) from relay.watched where relation = 'source'::regclass").await,
        "0"
    );
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_writer_causes_one_refresh_an_interval_and_the_last_change_is_seen() {
    let database = view(100).await;
    database.run("select relay.refresh_on_change('m', '500 milliseconds')").await;
    // Two: one of them works.
    let relay = Relay::start(&database.url).await;
    let other = Relay::start(&database.url).await;
    quiet(&database).await;
    let mut client = subscriber(&relay).await;
    let (before, begun) = (ticks(&database).await, Instant::now());
    let writers = (0..2).map(async |writer| {
        let session = database.connect().await;
        let mut commits = 0;
        while begun.elapsed() < Duration::from_secs(3) {
            let id = 2 + writer;
            session.batch_execute(&format!("update source set v = v + 1 where id = {id}")).await.unwrap();
            commits += 1;
        }
        commits
    });
    let commits: u32 = futures_util::future::join_all(writers).await.into_iter().sum();
    database.run("update source set v = 77 where id = 1").await;
    client.changes_until(|change| change["record"]["v"] == 77).await;
    quiet(&database).await;
    let (refreshes, most) = (ticks(&database).await - before, begun.elapsed().as_millis() as i64 / 500 + 2);
    println!("{commits} commits, {refreshes} refreshes in {:?}", begun.elapsed());
    assert!((2..=most).contains(&refreshes), "{refreshes} refreshes, at most {most}");
    // Neither a row nor a notification for each commit.
    assert!(commits > 100, "{commits}");
    let signals = "select n_tup_ins from pg_stat_user_tables where relname = 'signals'";
    let signals: u32 = database.value(signals).await.parse().unwrap();
    assert!(signals <= 20 + commits / 10, "{signals} signals of {commits} commits");
    relay.stop().await;
    other.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_wait_neither_for_each_other_nor_for_a_refresh() {
    let database = view(100).await;
    database.run("select relay.refresh_on_change('m', '100 milliseconds')").await;
    let relay = Relay::start(&database.url).await;
    quiet(&database).await;
    let mut client = subscriber(&relay).await;
    let mut sessions = Vec::new();
    for _ in 0..3 {
        let session = database.connect().await;
        session.batch_execute("set lock_timeout = '2s'; set deadlock_timeout = '100ms'").await.unwrap();
        sessions.push(session);
    }
    // While the view is sealed, and while it is dirty; the first one stays open over refreshes.
    for (n, session) in (1..).zip(&sessions) {
        session.batch_execute(&format!("begin; update source set v = {n} where id = {n}")).await.unwrap();
    }
    for (n, session) in (1..).zip(&sessions).skip(1) {
        session.batch_execute("commit").await.unwrap();
        client.changes_until(|change| change["record"] == json!({"id": n, "v": n})).await;
    }
    sessions[0]
        .batch_execute("savepoint s; update source set v = 9 where id = 9; rollback to s; commit")
        .await
        .unwrap();
    let changes = client.changes_until(|change| change["record"] == json!({"id": 1, "v": 1})).await;
    assert_eq!(changes.len(), 1, "{changes:?}");
    quiet(&database).await;
    assert_eq!(until_marker(&mut client, &database, 1).await, [Value::Null; 0]);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_source_is_followed() {
    let database = view(10).await;
    database
        .run(
            "create table parted (id int, v int) partition by range (id);
             create table parted_1 partition of parted for values from (0) to (10);
             create table parent (id int, v int); create table child () inherits (parent);
             create view inner_one as select id, v from parent union all select id + 100, v from parted;
             create view outer_one as select id + 1000 as id, v from inner_one union all select id, v from m;
             create materialized view top as select id, v from outer_one;
             create unique index on top (id); grant select on top to authenticated;
             select relay.watch('top'), relay.refresh_on_change('top', '100 milliseconds')",
        )
        .await;
    let relay = Relay::start(&database.url).await;
    quiet(&database).await;
    let mut client = Client::connect(&relay, &token("authenticated", None, json!({}))).await;
    client.subscribe("realtime:t", json!([{"event": "*", "schema": "public", "table": "top"}])).await;
    for (statement, expected) in [
        ("insert into parent values (1, 1)", json!({"id": 1001, "v": 1})),
        ("insert into child values (2, 1)", json!({"id": 1002, "v": 1})),
        ("insert into parted values (1, 1)", json!({"id": 1101, "v": 1})),
        ("insert into parted_1 values (2, 1)", json!({"id": 1102, "v": 1})),
        ("update source set v = 8 where id = 1; refresh materialized view m", json!({"id": 1, "v": 8})),
        ("update source set v = 8 where id = 2; select relay.refresh('m')", json!({"id": 2, "v": 8})),
        ("create table parted_2 partition of parted for values from (10) to (20); insert into parted_2 values (11, 1)", json!({"id": 1111, "v": 1})),
        ("alter table child rename to offspring; insert into offspring values (3, 1)", json!({"id": 1003, "v": 1})),
        ("create table late (id int, v int); create or replace view inner_one as select id, v from parent union all select id + 100, v from parted
          union all select id + 200, v from late", Value::Null),
        ("insert into late values (1, 1)", json!({"id": 1201, "v": 1})),
    ] {
        database.run(statement).await;
        if expected.is_null() {
            eventually("the new table is a source", || async {
                let is_source = "select 'late'::regclass = any (sources) from relay.refresh_schedule";
                (database.value(is_source).await == "t").then_some(())
            })
            .await;
        } else {
            assert_eq!(client.change().await["record"], expected, "{statement}");
        }
    }
    // A trigger that a user disables is left as it is, and said.
    database.run("alter table late disable trigger all").await;
    let unheard = "select unheard::text from relay.refresh_jobs";
    eventually("the trigger is missed", || async {
        database.value(unheard).await.contains("00_relay_signal").then_some(())
    })
    .await;
    let (_, findings, _) = output(&["doctor", "--database-url", &database.url]).await;
    assert!(
        findings.contains("of public.late is disabled: alter table public.late enable always trigger"),
        "{findings}"
    );
    database.run("insert into late values (2, 1); alter table late enable trigger all").await;
    assert_eq!(client.change().await["record"], json!({"id": 1202, "v": 1}));
    quiet(&database).await;
    assert_eq!(database.value(unheard).await, "{}");
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_unnoticed_is_named() {
    let database = view(10).await;
    let (session, mut notices) = database.heard("NOTICE").await;
    session
        .batch_execute(
            "create function rate() returns int language sql stable as 'select 1';
             create function pure(int) returns int language sql immutable as 'select $1';
             create extension postgres_fdw; create server elsewhere foreign data wrapper postgres_fdw;
             create foreign table far (id int) server elsewhere;
             create view timely as select now() as at, current_date as day;
             create materialized view stale as
               select s.id, rate(), pure(s.id), lower(to_char(t.at, 'YYYY')), t.day, random() as chance, (select count(*) from far) as far,
                      (select count(*) from m) as m, (select count(*) from pg_class) as classes, json_build_object('id', s.id) as json
               from source s, timely t with no data;
             create unique index on stale (id);
             select relay.watch('stale'), relay.refresh_on_change('stale')",
        )
        .await
        .unwrap();
    let mut named = Vec::new();
    while let Ok(notice) = notices.try_recv() {
        named.extend(
            notice.strip_prefix("public.stale: ").filter(|n| !n.contains("may read it")).map(str::to_owned),
        );
    }
    named.sort();
    assert_eq!(
        named,
        [
            "it calls current_date, whose result may change without a change of a table",
            "it calls now(), whose result may change without a change of a table",
            "it calls public.rate(), whose result may change without a change of a table",
            "it calls random(), whose result may change without a change of a table",
            "it reads pg_class, a system catalog, which has no triggers",
            "public.far is a foreign table: changes at its server fire no trigger here",
            "public.m is a materialized view: a change counts when it is refreshed",
        ]
    );
    for (statement, expected) in [
        ("select relay.refresh_on_change('source')", "source is not a materialized view"),
        (
            "select relay.refresh_on_change('m', '1 millisecond')",
            "the interval must be at least 100 milliseconds",
        ),
        (
            "create materialized view bare as select 1 as id; select relay.refresh_on_change('bare')",
            "bare is not watched",
        ),
        (
            "create unique index on bare (id); select relay.watch('bare'); select relay.refresh_on_change('bare')",
            "bare reads 0 tables",
        ),
        ("drop index bare_id_idx; select relay.refresh_on_change('bare')", "bare has no unique index"),
    ] {
        let setup: Vec<&str> = statement.rsplitn(2, "; ").collect();
        if let Some(setup) = setup.get(1) {
            session.batch_execute(setup).await.unwrap();
        }
        let error = session.batch_execute(setup[0]).await.unwrap_err();
        let message = error.as_db_error().unwrap().message();
        assert!(message.contains(expected), "{statement}: {message}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_refresh_is_told_backs_off_and_is_made_good() {
    let database = view(10).await;
    database
        .run(
            "create materialized view d as select id, 10 / (9 - v) as v from source; create unique index on d (id);
             select relay.watch('d'), relay.refresh_on_change('d', '100 milliseconds'), relay.refresh_on_change('m', '100 milliseconds')",
        )
        .await;
    let relay = Relay::start(&database.url).await;
    quiet(&database).await;
    let mut client = subscriber(&relay).await;
    database.run("update source set v = 9 where id = 1").await;
    assert_eq!(client.change().await["record"], json!({"id": 1, "v": 9}));
    let state = "select error || ' ' || (dirty_since is not null) || ' ' || (tries > 1 and not_before > last_run + interval '1 second')
                 from relay.refresh_schedule where relation = 'd'::regclass";
    eventually("it was tried again", || async {
        (database.value(state).await == "division by zero true true").then_some(())
    })
    .await;
    let (code, findings, _) = output(&["doctor", "--database-url", &database.url]).await;
    assert!(code == 1 && findings.contains("the refresh of d fails: division by zero"), "{findings}");
    database.run("update source set v = 4 where id = 1").await;
    eventually("it is made good", || async {
        (database.value("select v from d where id = 1").await == "2").then_some(())
    })
    .await;
    quiet(&database).await;
    assert_eq!(database.value("select count(*) from relay.refreshes where error is not null").await, "0");
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_is_killed_between_a_change_and_its_refresh_loses_nothing() {
    let database = view(100).await;
    database.run("select relay.refresh_on_change('m', '100 milliseconds')").await;
    let url = with_login(&database.url, READER);
    let serve = ["serve", "--database-url", &url, "--jwt-secret", SECRET, "--listen", "127.0.0.1:0"];
    let mut killed = relay(&serve).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    quiet(&database).await;
    // Nothing can refresh the view now.
    let mut holder = database.connect().await;
    let lock = holder.transaction().await.unwrap();
    lock.execute("select pg_advisory_xact_lock(relay.lock_class('refresh'), 'm'::regclass::oid::int4)", &[])
        .await
        .unwrap();
    database.run("update source set v = 5 where id = 7").await;
    eventually("the change is noted", || async {
        let noted = "select dirty_since is not null and error is not null from relay.refresh_jobs";
        (database.value(noted).await == "t").then_some(())
    })
    .await;
    killed.kill().await.unwrap();
    // This one is not even signalled: nobody listens.
    database.run("update source set v = 6 where id = 8").await;
    lock.rollback().await.unwrap();
    let relay = Relay::start(&database.url).await;
    fresh(&database).await;
    let told = "select string_agg(after::text, ' ' order by after ->> 'id') from relay.changes where operation = 'U'";
    assert_eq!(database.value(told).await, r#"{"id":7,"v":5} {"id":8,"v":6}"#);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_relay_takes_over() {
    let database = view(100).await;
    database.run("select relay.refresh_on_change('m', '100 milliseconds')").await;
    let first = Relay::start(&database.url).await;
    quiet(&database).await;
    let second = Relay::start(&database.url).await;
    let mut client = subscriber(&second).await;
    database.run("update source set v = 5 where id = 7").await;
    assert_eq!(client.change().await["record"], json!({"id": 7, "v": 5}));
    first.stop().await;
    for v in 6..9 {
        database.run(&format!("update source set v = {v} where id = 7")).await;
        assert_eq!(client.change().await["record"], json!({"id": 7, "v": v}));
    }
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_view_that_is_stopped_or_dropped_leaves_no_trigger() {
    let database = view(100).await;
    let triggers = "select count(*) from pg_trigger where tgname = '00_relay_signal'";
    database
        .run(
            "create materialized view n as select id, v from source; create unique index on n (id); select relay.watch('n');
             select relay.refresh_on_change('m'), relay.refresh_on_change('n')",
        )
        .await;
    assert_eq!(database.value(triggers).await, "1");
    let relay = Relay::start(&database.url).await;
    quiet(&database).await;
    database.run("select relay.refresh_stop('m')").await;
    assert_eq!(database.value(triggers).await, "1");
    database.run("update source set v = 1; select relay.refresh_stop('n')").await;
    assert_eq!(database.value(triggers).await, "0");
    database.run("select relay.refresh_on_change('n')").await;
    quiet(&database).await;
    database.run("drop materialized view n; notify relay_jobs").await;
    eventually("the trigger is dropped", || async { (database.value(triggers).await == "0").then_some(()) })
        .await;
    relay.stop().await;
}
