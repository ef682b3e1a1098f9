//! Materialized views: a refresh tells exactly the rows that changed, by hand or on the relay's schedule.

use relay::postgres::locks::Lock;
use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::database::Database;
use crate::support::relay::Relay;
use crate::support::{eventually, token};

/// A view of a thousand rows, and a table that tells when nothing else came.
async fn thousand() -> Database {
    let database = Database::new().await;
    database
        .run(
            "create table source (id int primary key, v int);
             insert into source select i, 0 from generate_series(1, 1000) i;
             create materialized view m as select id, v, 1000 / (10 - v) as share from source;
             create unique index on m (id);
             create table marker (id int primary key);
             grant select on m, marker to authenticated;
             select relay.watch('m'), relay.watch('marker')",
        )
        .await;
    database
}

async fn subscriber(relay: &Relay, claims: Value) -> Client {
    let mut client = Client::connect(relay, &token("authenticated", None, claims)).await;
    let bindings = json!([
        {"event": "*", "schema": "public", "table": "m"},
        {"event": "*", "schema": "public", "table": "marker"},
    ]);
    client.subscribe("realtime:m", bindings).await;
    client
}

async fn until_marker(client: &mut Client, database: &Database, id: i32) -> Vec<Value> {
    database.run(&format!("insert into marker values ({id})")).await;
    let mut changes =
        client.changes_until(|change| change["table"] == "marker" && change["record"]["id"] == id).await;
    changes.pop();
    changes
}

fn summary(change: &Value) -> (Value, Value, Value) {
    (change["type"].clone(), change["old_record"].clone(), change["record"].clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn three_changed_rows_of_a_thousand_are_three_changes() {
    let database = thousand().await;
    let relay = Relay::start(&database.url).await;
    let mut client = subscriber(&relay, json!({})).await;
    database.run("update source set v = 5 where id in (7, 500, 1000)").await;
    assert_eq!(database.value("select relay.refresh('m')").await, "3");
    let changes = until_marker(&mut client, &database, 1).await;
    let mut told: Vec<_> = changes.iter().map(summary).collect();
    told.sort_by_key(|(_, old, _)| old["id"].as_i64());
    let expected = [7, 500, 1000]
        .map(|id| (json!("UPDATE"), json!({"id": id}), json!({"id": id, "v": 5, "share": 200})));
    assert_eq!(told, expected);
    assert!(changes.iter().all(|change| change["table"] == "m" && change["schema"] == "public"));
    assert_eq!(database.value("select relay.refresh('m')").await, "0");
    assert_eq!(until_marker(&mut client, &database, 2).await, [Value::Null; 0]);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_come_go_and_move_are_told_as_such() {
    let database = thousand().await;
    let relay = Relay::start(&database.url).await;
    let mut client = subscriber(&relay, json!({})).await;
    database.run("delete from source where id = 1; insert into source values (1001, 0); update source set id = 2000 where id = 2").await;
    assert_eq!(database.value("select relay.refresh('m')").await, "4");
    let mut told: Vec<_> = until_marker(&mut client, &database, 1).await.iter().map(summary).collect();
    told.sort_by_key(|(_, old, new)| (old["id"].as_i64(), new["id"].as_i64()));
    let row = |id| json!({"id": id, "v": 0, "share": 100});
    assert_eq!(
        told,
        [
            (json!("INSERT"), Value::Null, row(1001)),
            (json!("INSERT"), Value::Null, row(2000)),
            (json!("DELETE"), json!({"id": 1}), Value::Null),
            (json!("DELETE"), json!({"id": 2}), Value::Null),
        ]
    );
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_that_is_rolled_back_tells_nothing() {
    let database = thousand().await;
    let relay = Relay::start(&database.url).await;
    let mut client = subscriber(&relay, json!({})).await;
    database.run("begin; update source set v = 1; select relay.refresh('m'); rollback").await;
    assert_eq!(until_marker(&mut client, &database, 1).await, [Value::Null; 0]);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_view_that_is_refreshed_without_the_relay_is_a_gap() {
    for by_hand in [
        "refresh materialized view m",
        "refresh materialized view concurrently m",
        "refresh materialized view m with no data",
        "begin; select relay.refresh('m'); refresh materialized view m; commit",
        "do $$ begin update source set v = 10; perform relay.refresh('m'); exception when division_by_zero then
         execute 'refresh materialized view m'; end $$",
    ] {
        let database = thousand().await;
        let relay = Relay::start(&database.url).await;
        let mut client = subscriber(&relay, json!({})).await;
        database.run(by_hand).await;
        database.run("insert into marker values (1)").await;
        let mut gaps = 0;
        loop {
            let frame = client.frame().await;
            let message = frame[4]["message"].as_str().unwrap_or_default();
            gaps += i32::from(message.starts_with("Gap: public.m: "));
            if frame[4]["data"]["table"] == "marker" {
                break;
            }
        }
        assert_eq!(gaps, 1, "{by_hand}");
        relay.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_relay_runs_the_schedule_until_it_is_stopped() {
    let database = thousand().await;
    let relay = Relay::start(&database.url).await;
    let mut client = subscriber(&relay, json!({})).await;
    database.run("select relay.refresh_every('m', '100 milliseconds')").await;
    for v in 1..=3 {
        database.run(&format!("update source set v = {v} where id = 42")).await;
        let change = client.change().await;
        assert_eq!((&change["type"], &change["record"]["v"]), (&json!("UPDATE"), &json!(v)));
    }
    let job = "select every, error is null, last_run is not null, duration is not null, next_run > last_run from relay.refresh_jobs";
    assert_eq!(
        database.value(&format!("select row(j.*)::text from ({job}) j")).await,
        "(00:00:00.1,t,t,t,t)"
    );

    database.run("select relay.refresh_stop('m')").await;
    eventually("the last run ends", || async {
        let busy =
            "select count(*) from pg_stat_activity where datname = current_database() and state = 'active'
                      and query like '%run_refreshes%' and pid <> pg_backend_pid()";
        (database.value(busy).await == "0").then_some(())
    })
    .await;
    assert_eq!(database.value("select count(*) from relay.refresh_jobs").await, "0");
    database.run("update source set v = 9 where id = 42").await;
    assert_eq!(database.value("select relay.run_refreshes() is null").await, "t");
    assert_eq!(until_marker(&mut client, &database, 1).await, [Value::Null; 0]);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_made_while_the_relay_is_awake_is_heard() {
    let database = thousand().await;
    let holder = database.connect().await;
    // The relay cannot fall asleep while another session shares its lock.
    holder.batch_execute(&format!("select pg_advisory_lock_shared({})", Lock::Doorbell)).await.unwrap();
    schedule_is_heard(&database).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_made_while_the_relay_polls_is_heard() {
    let database = thousand().await;
    database.run("do $$ begin execute format('alter database %I set relay.doorbell = off', current_database()); end $$").await;
    schedule_is_heard(&database).await;
}

/// The relay knows of no job when it starts, and would look again only after a minute.
async fn schedule_is_heard(database: &Database) {
    let relay = Relay::start(&database.url).await;
    let mut client = subscriber(&relay, json!({})).await;
    let looked = "select exists (select from pg_stat_activity where datname = current_database()
                    and query like '%relay.run_refreshes%' and state = 'idle' and pid <> pg_backend_pid())";
    eventually("the relay has looked at the schedule", || async {
        (database.value(looked).await == "t").then_some(())
    })
    .await;
    database.run("update source set v = 3 where id = 42; select relay.refresh_every('m', '1 hour')").await;
    assert_eq!(client.change().await["record"], json!({"id": 42, "v": 3, "share": 142}));
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_refresh_is_recorded_and_stops_no_other() {
    let database = thousand().await;
    database
        .run(
            "create materialized view healthy as select id, v from source; create unique index on healthy (id);
             grant select on healthy to authenticated; select relay.watch('healthy')",
        )
        .await;
    let relay = Relay::start(&database.url).await;
    let mut client = Client::connect(&relay, &token("authenticated", None, json!({}))).await;
    client.subscribe("realtime:h", json!([{"event": "*", "schema": "public", "table": "healthy"}])).await;
    database
        .run(
            "update source set v = 10 where id = 5;
             select relay.refresh_every('m', '100 milliseconds'), relay.refresh_every('healthy', '100 milliseconds')",
        )
        .await;
    assert_eq!(client.change().await["record"], json!({"id": 5, "v": 10}));
    let error = "select error from relay.refresh_jobs where relation = 'm'::regclass";
    eventually("the error is recorded", || async {
        (database.value(error).await == "division by zero").then_some(())
    })
    .await;
    database.run("update source set v = 2 where id = 5").await;
    assert_eq!(client.change().await["record"], json!({"id": 5, "v": 2}));
    eventually("the error is forgotten", || async { database.value(error).await.is_empty().then_some(()) })
        .await;
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_view_whose_table_is_locked_keeps_no_other_from_its_refresh() {
    let database = thousand().await;
    database
        .run(
            "create table free (id int primary key, v int); insert into free values (1, 0);
             create materialized view healthy as select id, v from free; create unique index on healthy (id);
             grant select on healthy to authenticated; select relay.watch('healthy')",
        )
        .await;
    let relay = Relay::start(&database.url).await;
    let mut client = Client::connect(&relay, &token("authenticated", None, json!({}))).await;
    client.subscribe("realtime:h", json!([{"event": "*", "schema": "public", "table": "healthy"}])).await;
    let mut holder = database.connect().await;
    let lock = holder.transaction().await.unwrap();
    lock.batch_execute("lock table source in access exclusive mode").await.unwrap();
    // The locked one is due first, each time.
    database.run("select relay.refresh_every('m', '100 milliseconds')").await;
    database.run("select relay.refresh_every('healthy', '100 milliseconds')").await;
    for v in 1..=2 {
        database.run(&format!("update free set v = {v}")).await;
        assert_eq!(client.change().await["record"], json!({"id": 1, "v": v}));
    }
    let error = "select error from relay.refresh_jobs where relation = 'm'::regclass";
    eventually("the lock is recorded", || async {
        database.value(error).await.contains("lock timeout").then_some(())
    })
    .await;
    lock.rollback().await.unwrap();
    eventually("the error is forgotten", || async { database.value(error).await.is_empty().then_some(()) })
        .await;
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_policy_decides_who_sees_a_view() {
    let database = thousand().await;
    database
        .run("select relay.allow('m', $$coalesce((auth.jwt() ->> 'admin')::boolean, false) and v < 9$$)")
        .await;
    let relay = Relay::start(&database.url).await;
    let mut admin = subscriber(&relay, json!({"admin": true})).await;
    let mut other = subscriber(&relay, json!({})).await;
    database.run("update source set v = 4 where id = 1; update source set v = 9 where id = 2").await;
    assert_eq!(database.value("select relay.refresh('m')").await, "2");
    database.run("insert into marker values (1)").await;
    assert_eq!(admin.change().await["record"], json!({"id": 1, "v": 4, "share": 166}));
    assert_eq!(admin.change().await["table"], "marker");
    assert_eq!(other.change().await["table"], "marker");
    relay.stop().await;
}
