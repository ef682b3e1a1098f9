//! Rules and columns that are changed by transactions which overlap, or changed back at once: no reader is told what was
//! hidden when it was written, and no writer waits for another because of it.

use std::time::Duration;

use serde_json::json;

use crate::support::client::Client;
use crate::support::http::get;
use crate::support::stage::Stage;
use crate::support::token;

const HIDDEN: &str = "top secret";

fn reader() -> String {
    token("authenticated", None, json!({}))
}

/// A table `t` of which `authenticated` may read `seen`, one client that is there, and the cursor of one that is away.
async fn readers() -> (Stage, Client, String) {
    let stage = Stage::new(
        "create table t (id int primary key, seen text, hidden text); select relay.watch('t');
         alter table t enable row level security; create policy p on t using (true);
         grant select (id, seen) on t to authenticated",
    )
    .await;
    let mut client = stage.join(&reader()).await;
    stage.changes(&mut client).await;
    let cursor = stage.database.value("select relay.cursor()").await;
    (stage, client, cursor)
}

/// Neither the client nor the one who comes back by its cursor is told the secret, nor anybody who comes back once more
/// after another change of the schema.
async fn is_kept(stage: &Stage, client: &mut Client, cursor: &str) {
    for more in ["", "create table later (id int)"] {
        stage.run(more).await;
        let mut is_told = false;
        // A marker may be lost to a gap, too.
        while !is_told {
            stage.run("insert into marker default values").await;
            while let Some(frame) = client.frame_within(Duration::from_secs(1)).await {
                assert!(!frame.to_string().contains(HIDDEN), "live: {frame}");
                is_told = frame[3] == "postgres_changes" && frame[4]["data"]["table"] == "marker";
                if is_told {
                    break;
                }
            }
        }
        let path = format!("/realtime/v1/changes?table=t&wait=0&since={cursor}&apikey={}", reader());
        let answer = get(stage.relay.address, &path, "").await;
        assert!(!answer.body.to_string().contains(HIDDEN), "late: {}", answer.body);
        assert_ne!((answer.status, &answer.body["changes"]), (200, &json!([])), "nothing is told of a loss");
    }
}

fn swapped() -> String {
    format!(
        "alter table t rename seen to other; alter table t rename hidden to seen; alter table t rename other to hidden;
         insert into t (id, hidden, seen) values (1, 'x', '{HIDDEN}')"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_renamed_in_an_old_snapshot_show_nothing_that_was_hidden() {
    let (stage, mut client, cursor) = readers().await;
    // By number the columns are as before: what was granted is called `hidden` now.
    let session = stage.database.connect().await;
    session.batch_execute("begin isolation level repeatable read; select 1").await.unwrap();
    stage.run("alter table t add column z int").await;
    session.batch_execute(&swapped()).await.unwrap();
    session.batch_execute("commit").await.unwrap();
    is_kept(&stage, &mut client, &cursor).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_renamed_while_another_transaction_alters_a_type_show_nothing_that_was_hidden() {
    let (stage, mut client, cursor) = readers().await;
    stage.run("create type mood as enum ('sad'); alter table t add column m mood").await;
    let session = stage.database.connect().await;
    session.batch_execute("begin; alter type mood rename value 'sad' to 'blue'").await.unwrap();
    let other = stage.database.connect().await;
    other.batch_execute(&format!("begin; {}; commit", swapped())).await.unwrap();
    session.batch_execute("commit").await.unwrap();
    is_kept(&stage, &mut client, &cursor).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_was_hidden_stays_so_when_rules_are_changed_and_changed_back() {
    let (stage, mut client, cursor) = readers().await;
    stage.run("revoke select on t from authenticated; grant select on t to authenticated").await;
    // A transaction each, faster than the relay looks.
    stage
        .run(&format!(
            "do $$ begin
               revoke select on t from authenticated; grant select (id, seen) on t to authenticated; commit;
               insert into t values (1, 'x', '{HIDDEN}'); commit;
               update t set hidden = null; commit;
               revoke select on t from authenticated; grant select on t to authenticated; commit;
             end $$"
        ))
        .await;
    is_kept(&stage, &mut client, &cursor).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_widens_wherever_it_stands() {
    for grant in [
        "create schema s grant select on public.t to authenticated",
        "create schema s authorization current_user grant select on public.t to public",
    ] {
        let (stage, mut client, cursor) = readers().await;
        stage.run(&format!("insert into t values (1, 'x', '{HIDDEN}')")).await;
        stage.run("update t set hidden = null").await;
        stage.changes(&mut client).await;
        stage.run(grant).await;
        is_kept(&stage, &mut client, &cursor).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_in_an_old_snapshot_widens_what_was_narrowed_since() {
    let (stage, mut client, cursor) = readers().await;
    stage.run("grant select on t to authenticated").await;
    let session = stage.database.connect().await;
    session.batch_execute("begin isolation level repeatable read; select 1").await.unwrap();
    stage.run("revoke select on t from authenticated; grant select (id, seen) on t to authenticated").await;
    stage.run(&format!("insert into t values (1, 'x', '{HIDDEN}')")).await;
    stage.run("update t set hidden = null").await;
    stage.changes(&mut client).await;
    session.batch_execute("grant select on t to authenticated; commit").await.unwrap();
    is_kept(&stage, &mut client, &cursor).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn functions_of_every_kind_and_views_in_a_policy_widen_when_they_are_replaced() {
    for (before, policy, after) in [
        (
            "create function f() returns bool language sql stable begin atomic select false; end",
            "f()",
            "create or replace function f() returns bool language sql stable begin atomic select true; end",
        ),
        (
            "create function same(a int, b int) returns bool language sql immutable as 'select false';
             create operator ==> (leftarg = int, rightarg = int, function = same)",
            "id ==> 1",
            "create or replace function same(a int, b int) returns bool language sql immutable as 'select true'",
        ),
        (
            "create view v as select 1 as one where false; grant select on v to authenticated",
            "exists (select from v)",
            "create or replace view v as select 1 as one where true",
        ),
    ] {
        let stage = Stage::new(&format!(
            "{before}; create table t (id int primary key, seen text); alter table t enable row level security;
             create policy p on t using ({policy}); grant select on t to authenticated; select relay.watch('t')"
        ))
        .await;
        let cursor = stage.database.value("select relay.cursor()").await;
        stage.run(&format!("insert into t values (1, '{HIDDEN}')")).await;
        stage.run(after).await;
        stage.run("insert into t values (2, 'x')").await;
        let path = format!("/realtime/v1/changes?table=t&since={cursor}&apikey={}", reader());
        let answer = get(stage.relay.address, &path, "").await;
        assert_eq!(answer.status, 410, "{policy}: {}", answer.body);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_no_rules_waits_for_no_other_transaction_and_widens_nothing() {
    let (stage, ..) = readers().await;
    let widenings = async || stage.database.value("select count(*) from relay.widenings").await;
    let before = widenings().await;
    let [one, other] = [stage.database.connect().await, stage.database.connect().await];
    let scratch = "begin; create temp table scratch (i int); drop table scratch";
    one.batch_execute(scratch).await.unwrap();
    other.batch_execute(scratch).await.unwrap();
    // Held by the other, which waits for nothing that the first holds: no deadlock can be made of it.
    other.batch_execute("alter table t add column c1 int; alter table t add column c2 int").await.unwrap();
    let waits = tokio::spawn(async move {
        one.batch_execute("insert into t (id) values (1); commit").await.unwrap();
    });
    other.batch_execute("alter table t add column c3 int; commit").await.unwrap();
    waits.await.unwrap();
    assert_eq!(widenings().await, before);
}

/// A watched table `t`, what its policy looks into (`inside`, `f`), what its columns are of (`pair`, `mood`), its parent, and
/// tables that have nothing to do with it.
const AROUND: &str =
    "create table parent (p int); create type mood as enum ('a'); create table pair (x int, y int);
    create table inside (id int); create function f() returns bool language sql stable as 'select true';
    create table t (id int primary key, m mood, z pair) inherits (parent); select relay.watch('t');
    alter table t enable row level security;
    create policy p on t using (f() and exists (select from inside)); grant select on t to authenticated;
    create table far (id int primary key); alter table far enable row level security;";

/// DDL of temporary objects.
const TEMPORARY: &[&str] = &[
    "create temp table x (id serial primary key, v text)",
    "create temp table y as select 1 as one",
    "alter table x add column z int",
    "create index on x (v)",
    "alter table x enable row level security",
    "create policy p on x using (true)",
    "create trigger g before insert on x for each row execute function suppress_redundant_updates_trigger()",
    "create temp view w as select * from x",
    "drop trigger g on x",
    "drop policy p on x",
    "drop table if exists nothing",
    "drop table x cascade",
    "drop table y",
];

const FAR: &[&str] = &[
    "create table further (id int)",
    "alter table far add column z int",
    "create policy p on far using (id in (select one.id from far one))",
    "alter table far disable row level security",
    "create function h() returns int language sql as 'select 1'",
    "create view w as select 1 as one",
    "create type other as enum ('a')",
    "create trigger g before insert on far for each row execute function suppress_redundant_updates_trigger()",
    "drop trigger g on far",
    "drop view w",
    "drop table further, far",
];

const NEAR: &[&str] = &[
    "alter table t add column more int",
    "alter table parent add column more_yet int",
    "alter table pair rename x to a",
    "alter type mood rename value 'a' to 'b'",
    "alter table inside enable row level security",
    "create or replace function f() returns bool language sql stable as 'select false'",
    "alter policy p on t using (true)",
    "grant select on inside to authenticated",
    "drop policy p on t",
    "drop type mood cascade",
    "drop table t",
];

#[tokio::test(flavor = "multi_thread")]
async fn statements_compare_the_rules_where_they_may_concern_a_watched_table_and_temporary_objects_log_nothing()
 {
    let stage = Stage::new(AROUND).await;
    let writer = stage.database.connect().await;
    writer.batch_execute("set track_functions = 'all'").await.unwrap();
    // How often the shapes were compared, and how many schema lines there are.
    let counted = async || {
        let counts = "select coalesce(pg_stat_get_xact_function_calls('relay.renew_shapes(boolean, int[])'::regprocedure), 0),
                             (select count(*) from relay.changes c where c.operation = 'S')";
        let row = writer.query_one(counts, &[]).await.unwrap();
        (row.get::<_, i64>(0), row.get::<_, i64>(1))
    };
    let of = async |begin: &str, statement: &str| {
        writer.batch_execute(begin).await.unwrap();
        let before = counted().await;
        writer.batch_execute(statement).await.expect(statement);
        let after = counted().await;
        writer.batch_execute("commit").await.unwrap();
        (after.0 > before.0, after.1 - before.1)
    };
    for (statements, expected) in [(TEMPORARY, (false, 0)), (FAR, (false, 1)), (NEAR, (true, 1))] {
        for statement in statements {
            assert_eq!(of("begin", statement).await, expected, "compared and logged: {statement}");
        }
    }
    // In an older snapshot nothing is certain.
    let old = of("begin isolation level repeatable read", "create table far (id int)").await;
    assert_eq!(old, (true, 1));
}
