//! Materialized views: a refresh tells exactly the rows that changed, by hand or on the relay's schedule.

use std::time::{Duration, Instant};

use relay::postgres::locks::Lock;
use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::database::Database;
use crate::support::relay::Relay;
use crate::support::stage::Stage;
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

/// The same with a second view, and a subscriber of that alone.
async fn beside_a_healthy_view() -> (Database, Relay, Client) {
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
    (database, relay, client)
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

/// Waits until subscribers were told of each refresh.
async fn all_is_told(database: &Database) {
    eventually("all refreshes are told", || async {
        let untold = "select exists (select from relay.refreshes where is_untold)";
        (database.value(untold).await == "f").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_changed_rows_of_ten_thousand_are_three_changes_whoever_refreshes() {
    let database = thousand().await;
    database
        .run(
            "insert into source select i, 0 from generate_series(1001, 10000) i; refresh materialized view m;
             create function refresh_admin_metrics_view() returns void language sql as 'refresh materialized view m';
             create procedure refresh_all() language plpgsql as 'begin refresh materialized view concurrently m; commit; end'",
        )
        .await;
    let relay = Relay::start(&database.url).await;
    all_is_told(&database).await;
    let mut client = subscriber(&relay, json!({})).await;
    for (v, by_hand) in (1..).zip([
        "refresh materialized view m",
        "refresh materialized view concurrently m",
        "select refresh_admin_metrics_view()",
        "call refresh_all()",
        "refresh materialized view m; refresh materialized view m; refresh materialized view concurrently m",
        "begin; select relay.refresh('m'); refresh materialized view m; commit",
        "begin; refresh materialized view concurrently m; select relay.refresh('m'); commit",
        "set session_replication_role = replica; refresh materialized view m; reset session_replication_role",
        "refresh materialized view m with no data; refresh materialized view m",
    ]) {
        database.run(&format!("update source set v = {v} where id in (7, 5000, 10000)")).await;
        database.run(by_hand).await;
        all_is_told(&database).await;
        let changes = until_marker(&mut client, &database, v).await;
        let mut told: Vec<_> = changes.iter().map(summary).collect();
        told.sort_by_key(|(_, old, _)| old["id"].as_i64());
        let expected = [7, 5000, 10000].map(|id| {
            (json!("UPDATE"), json!({"id": id}), json!({"id": id, "v": v, "share": 1000 / (10 - v)}))
        });
        assert_eq!(told, expected, "{by_hand}");
    }
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_that_nothing_reports_is_found() {
    for unreported in [
        "drop event trigger relay_schema_changes",
        "alter event trigger relay_schema_changes disable",
        "do $$ begin execute format('alter database %I set relay.doorbell = off', current_database()); end $$",
    ] {
        let database = thousand().await;
        database.run(unreported).await;
        let relay = Relay::start(&database.url).await;
        let mut client = subscriber(&relay, json!({})).await;
        let session = database.connect().await;
        for statement in ["update source set v = 5 where id = 7", "refresh materialized view m"] {
            session.batch_execute(statement).await.unwrap();
        }
        assert_eq!(client.change().await["record"], json!({"id": 7, "v": 5, "share": 200}), "{unreported}");
        relay.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_while_no_relay_runs_is_told_by_the_next_one() {
    let database = thousand().await;
    database.run("update source set v = 4 where id = 1; refresh materialized view m").await;
    database
        .run("update source set v = 5 where id in (1, 2); refresh materialized view concurrently m")
        .await;
    let (one, two) = tokio::join!(Relay::start(&database.url), Relay::start(&database.url));
    all_is_told(&database).await;
    let told = "select string_agg(concat(operation, after), ' ' order by after ->> 'id') from relay.changes where operation in ('I', 'U', 'D', 'G')";
    assert_eq!(database.value(told).await, r#"U{"id":1,"v":5,"share":200} U{"id":2,"v":5,"share":200}"#);
    one.stop().await;
    two.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_by_others_that_is_rolled_back_tells_nothing() {
    let database = thousand().await;
    let relay = Relay::start(&database.url).await;
    let mut client = subscriber(&relay, json!({})).await;
    for rolled_back in [
        "begin; update source set v = 1; refresh materialized view m; rollback",
        "begin; savepoint s; update source set v = 1; refresh materialized view concurrently m; rollback to s; commit",
        "do $$ begin update source set v = 1; perform relay.refresh('m'); refresh materialized view m; perform 1 / 0;
         exception when division_by_zero then null; end $$",
    ] {
        database.run(rolled_back).await;
        all_is_told(&database).await;
    }
    assert_eq!(until_marker(&mut client, &database, 1).await, [Value::Null; 0]);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_in_an_older_snapshot_fails_instead_of_telling_a_row_twice() {
    let database = thousand().await;
    for (n, isolation) in (1..).zip(["repeatable read", "serializable"]) {
        let older = database.connect().await;
        let begin = format!("begin isolation level {isolation}; select count(*) from source");
        older.batch_execute(&begin).await.unwrap();
        database.run(&format!("update source set v = {n} where id = 7; refresh materialized view m")).await;
        database.run("select relay.run_refreshes()").await;
        let error = older.batch_execute("select relay.refresh('m')").await.unwrap_err();
        assert_eq!(error.code().unwrap().code(), "40001", "{isolation}: {error}");
        older.batch_execute("rollback").await.unwrap();
        older.batch_execute(&begin).await.unwrap();
        older.batch_execute("select relay.refresh('m'); commit").await.unwrap();
    }
    let told = "select string_agg(concat(operation, after), ' ' order by number) from relay.changes where operation in ('I', 'U', 'D', 'G')";
    assert_eq!(database.value(told).await, r#"U{"id":7,"v":1,"share":111} U{"id":7,"v":2,"share":125}"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renamed_column_is_no_change_and_a_refresh_after_it_tells_the_rows_that_changed() {
    let database = thousand().await;
    let relay = Relay::start(&database.url).await;
    database
        .run("alter materialized view m rename column v to value; update source set v = 4 where id = 1")
        .await;
    assert_eq!(database.value("select relay.refresh('m')").await, "1");
    let altered = Instant::now();
    database.run("alter materialized view m rename column share to part").await;
    all_is_told(&database).await;
    // Without being woken, the relay looks once a minute.
    assert!(altered.elapsed() < Duration::from_secs(40), "{:?}", altered.elapsed());
    database.run("update source set v = 5 where id = 2; refresh materialized view m").await;
    all_is_told(&database).await;
    let told = "select string_agg(concat(operation, after), ' ' order by number) from relay.changes where operation in ('I', 'U', 'D', 'G')";
    assert_eq!(
        database.value(told).await,
        r#"U{"id":1,"value":4,"share":166} U{"id":2,"value":5,"part":200}"#
    );
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_view_that_is_refreshed_without_the_relay_is_a_gap() {
    for altered in [
        "alter materialized view m rename column share to part",
        "update relay.told_views set shape = 0",
        // Nothing is known of what subscribers were told.
        "truncate relay.told_views, relay.told_rows",
    ] {
        let database = thousand().await;
        // Both before it was told: the old images have other columns.
        database.run(&format!("{altered}; update source set v = 5; refresh materialized view m")).await;
        let relay = Relay::start(&database.url).await;
        all_is_told(&database).await;
        let told = "select string_agg(operation::text, '') from relay.changes where operation in ('I', 'U', 'D', 'G')";
        assert_eq!(database.value(told).await, "G", "{altered}");
        assert_eq!(database.value("select relay.refresh('m')").await, "0");
        relay.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_view_that_cannot_be_told_says_why_keeps_no_other_and_is_told_later() {
    let (database, relay, mut client) = beside_a_healthy_view().await;
    database.run("drop index m_id_idx; update source set v = 5 where id = 7").await;
    database.run("refresh materialized view m; refresh materialized view healthy").await;
    assert_eq!(client.change().await["record"], json!({"id": 7, "v": 5}));
    let error = "select coalesce(error, '') from relay.refreshes where relation = 'm'::regclass";
    eventually("the error is recorded", || async {
        database.value(error).await.contains("has no unique index").then_some(())
    })
    .await;
    let (code, findings, _) =
        crate::support::program::output(&["doctor", "--database-url", &database.url]).await;
    assert!(code == 1 && findings.contains("has no unique index"), "{findings}");
    database.run("create unique index on m (id)").await;
    all_is_told(&database).await;
    assert_eq!(database.value(error).await, "");
    let told = "select string_agg(concat(operation, after), ' ') from relay.changes where after -> 'share' is not null";
    assert_eq!(database.value(told).await, r#"U{"id":7,"v":5,"share":200}"#);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_without_a_key_are_told_by_their_number() {
    let database = thousand().await;
    database
        .run(
            "create table loose (k int, v int); insert into loose values (null, 1), (null, 1), (null, 2);
             create materialized view pairs as select k, v from loose; create unique index on pairs (k); select relay.watch('pairs')",
        )
        .await;
    let told = "select coalesce(string_agg(concat(operation, before ->> 'v', '>', after ->> 'v'), ' ' order by number), '') from relay.changes
                where operation in ('I', 'U', 'D', 'G')";
    for (statement, expected) in [
        ("insert into loose values (null, 1)", "I>1"),
        ("delete from loose where ctid in (select ctid from loose where v = 1 limit 2)", "D1> D1>"),
        ("update loose set v = 3 where v = 2", "U2>3"),
        ("delete from loose", "D1> D3>"),
        ("insert into loose values (null, 7), (null, 7)", "I>7 I>7"),
    ] {
        // Nothing may keep rows of the changelog from being removed here: no relay runs.
        database.run("truncate relay.log_0, relay.log_1, relay.log_2").await;
        database.run(&format!("{statement}; refresh materialized view pairs")).await;
        database.run("select relay.run_refreshes()").await;
        assert_eq!(database.value(told).await, expected, "{statement}");
        assert_eq!(
            database.value("select (select sum(copies) from relay.told_rows where view = (select id from relay.watched where relation = 'pairs'::regclass)) is not distinct from nullif((select count(*) from loose), 0)").await,
            "t"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_user_defined_cast_does_it_does_without_rights() {
    let database = thousand().await;
    database
        .run(
            "create type wish as enum ('a', 'b');
             create table wishes (id int primary key, wish wish); insert into wishes values (1, 'a');
             create function spell(wish) returns json language plpgsql as $$
             begin
               begin execute 'delete from relay.watch_list'; exception when insufficient_privilege then null; end;
               return json_build_object('as', current_user::text);
             end $$;
             create cast (wish as json) with function spell(wish);
             create materialized view spelled as select id, wish, 1 as v from wishes; create unique index on spelled (id);
             select relay.watch('spelled'); insert into wishes values (2, 'b'); refresh materialized view spelled;
             select relay.run_refreshes()",
        )
        .await;
    assert_eq!(
        database.value("select after ->> 'wish' from relay.changes where operation = 'I'").await,
        r#"{"as" : "relay_image"}"#
    );
    assert_eq!(database.value("select count(*) from relay.watch_list").await, "3");
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
    let (database, relay, mut client) = beside_a_healthy_view().await;
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
    for (n, refresh) in (1..).zip([
        "select relay.refresh('m')",
        "refresh materialized view m",
        "refresh materialized view concurrently m",
    ]) {
        database
            .run(&format!(
                "update source set v = 4 where id = {n}; update source set v = 9 where id = {n} + 10"
            ))
            .await;
        database.run(refresh).await;
        all_is_told(&database).await;
        database.run(&format!("insert into marker values ({n})")).await;
        assert_eq!(admin.change().await["record"], json!({"id": n, "v": 4, "share": 166}));
        assert_eq!(admin.change().await["table"], "marker");
        assert_eq!(other.change().await["table"], "marker");
    }
    // The right to SELECT, too.
    database.run("revoke select on m from authenticated; update source set v = 3 where id = 5; refresh materialized view m").await;
    all_is_told(&database).await;
    database.run("insert into marker values (9)").await;
    assert!(admin.changes_until(|change| change["table"] == "marker").await.len() == 1);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn functions_in_an_index_of_a_view_do_not_run_with_the_rights_of_the_installer() {
    let stage = Stage::new("").await;
    let owner = format!("{}_owner", stage.name);
    stage
        .run(&format!(
            "create role {owner}; grant create on schema public to {owner}; create table ran (as_role text); grant insert on ran to public;
             create function noted() returns int language plpgsql volatile as
               $$ begin insert into public.ran values (current_user); return 1; end $$;
             create function hidden(n int) returns int language plpgsql immutable as $$ begin return n + public.noted(); end $$;
             set role {owner}; create materialized view theirs as select 1 as id; create unique index on theirs (id); reset role"
        ))
        .await;
    stage.run("select relay.watch('theirs')").await;
    stage.run(&format!("set role {owner}; create index on theirs ((id + hidden(1)))")).await;
    stage.run("reset role; truncate ran").await;
    let refused = stage.database.client.batch_execute("select relay.refresh('theirs')").await.unwrap_err();
    let refused = refused.as_db_error().unwrap().message().to_owned();
    assert!(refused.contains("calls a function that a user wrote"), "{refused}");
    stage.run("refresh materialized view theirs").await;
    eventually("the relay says so", || async {
        let said = stage.database.value("select coalesce(max(error), '') from relay.refreshes").await;
        said.contains("calls a function that a user wrote").then_some(())
    })
    .await;
    let ran = "select coalesce(string_agg(distinct as_role, ' '), '') from ran";
    assert!(["", &owner].contains(&stage.database.value(ran).await.as_str()));
}
