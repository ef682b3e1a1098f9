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
