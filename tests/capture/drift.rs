//! Rules and tables that change under a live subscription, and what then can no longer be told.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::stage::Stage;
use crate::support::{ANN, BOB, token};

fn user(sub: &str) -> String {
    token("authenticated", Some(sub), json!({}))
}

/// The text of the next gap that is told before a row of the marker, if one is.
async fn gap(stage: &Stage, client: &mut Client) -> Option<String> {
    stage.run("insert into marker default values").await;
    let mut gap = None;
    loop {
        let frame = client.frame().await;
        if frame[3] == "system" && frame[4]["status"] == "error" {
            gap = Some(frame[4]["message"].as_str().unwrap().to_owned());
        }
        if frame[3] == "postgres_changes" {
            assert_eq!(frame[4]["data"]["table"], "marker", "{frame}");
            return gap;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_is_judged_by_the_rules_that_came_with_it_and_not_by_those_before() {
    let stage = Stage::new(
        "create table t (id int primary key, v text); alter table t enable row level security;
         create policy p on t using (true); grant select on t to authenticated;
         create table r (id int primary key, v text); grant select on r to authenticated;
         select relay.watch('t'), relay.watch('r')",
    )
    .await;
    let mut bob = stage.join(&user(BOB)).await;
    stage.run("insert into t values (1, 'open'); insert into r values (1, 'open')").await;
    assert_eq!(stage.changes(&mut bob).await.len(), 2);
    stage
        .run(
            "begin; drop policy p on t; create policy p on t using (false); insert into t values (2, 'secret');
             revoke select on r from authenticated; insert into r values (2, 'secret'); commit",
        )
        .await;
    assert_eq!(stage.told(&mut bob).await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_whose_columns_have_other_names_by_now_is_judged_by_what_they_are() {
    let stage = Stage::new(
        "create table t (id int primary key, owner uuid, v text); alter table t enable row level security;
         create policy p on t using (owner is null or owner = auth.uid());
         grant select on t to authenticated; select relay.watch('t')",
    )
    .await;
    let mut bob = stage.join(&user(BOB)).await;
    stage.run(&format!("insert into t values (1, '{ANN}', 'secret'), (2, '{BOB}', 'mine')")).await;
    assert_eq!(stage.told(&mut bob).await.len(), 1);
    stage
        .run(&format!(
            "begin; insert into t values (3, '{ANN}', 'secret'); alter table t rename owner to owner_id; commit"
        ))
        .await;
    assert_eq!(gap(&stage, &mut bob).await, None);
    stage.run(&format!("insert into t values (4, '{ANN}', 'secret'), (5, '{BOB}', 'mine')")).await;
    assert_eq!(stage.told(&mut bob).await.len(), 1, "the rows after it are judged by the new names");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_judged_in_time_is_told_as_a_gap() {
    let sql = "create table members (id int); create table t (id int primary key);
               alter table t enable row level security; grant select on t, members to authenticated;
               create policy p on t using (exists (select from members)); select relay.watch('t')";
    let stage = Stage::with(sql, |settings, _| settings.judge_timeout_ms = Some(100)).await;
    stage.run("insert into members values (1)").await;
    let mut ann = stage.join(&user(ANN)).await;
    let locking = stage.database.connect().await;
    locking.batch_execute("begin; lock members in access exclusive mode").await.unwrap();
    stage.run("insert into t values (1)").await;
    let gap = gap(&stage, &mut ann).await.expect("a gap is told");
    assert!(gap.starts_with("Gap: public.t: the policy or filter took too long"), "{gap}");
    locking.batch_execute("rollback").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_watched_anew_is_followed_again() {
    let stage = Stage::new(
        "create table t (id int primary key); grant select on t to authenticated; select relay.watch('t')",
    )
    .await;
    let mut ann = stage.subscribe(&user(ANN), json!([{"event": "*", "table": "t"}])).await;
    stage.run("select relay.unwatch('t'); select relay.watch('t')").await;
    loop {
        let frame = ann.frame_within(Duration::from_secs(5)).await;
        stage.run("insert into t select coalesce(max(id), 0) + 1 from t").await;
        let Some(frame) = frame else { continue };
        if frame[3] == "postgres_changes" && frame[4]["data"]["table"] == "t" {
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_label_of_an_enum_that_gets_another_name_stays_the_same_in_policies() {
    let stage = Stage::new(
        "create type mood as enum ('a', 'b'); create table t (id int primary key, m mood);
         alter table t enable row level security; create policy p on t using (m = 'a');
         grant select on t to authenticated; select relay.watch('t')",
    )
    .await;
    let mut ann = stage.join(&user(ANN)).await;
    stage.run("insert into t values (1, 'a')").await;
    assert_eq!(stage.changes(&mut ann).await.len(), 1);
    stage.run("alter type mood rename value 'a' to 'z'").await;
    stage.run("insert into t values (2, 'z'), (3, 'b')").await;
    let ids: Vec<Value> =
        stage.changes(&mut ann).await.iter().map(|change| change["record"]["id"].clone()).collect();
    assert_eq!(ids, [2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_small_as_stored_and_large_as_text_comes_cut_down() {
    let stage = Stage::new(
        "create table t (id int primary key, n numeric[]); grant select on t to authenticated; select relay.watch('t')",
    )
    .await;
    let mut ann = stage.join(&user(ANN)).await;
    stage
        .run("insert into t values (1, (select array_agg(1e131071::numeric) from generate_series(1, 30)))")
        .await;
    let changes = stage.changes(&mut ann).await;
    assert_eq!(changes[0]["record"], json!({"id": 1}));
    assert_eq!(changes[0]["errors"], json!(["Error 413: Payload Too Large"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filter_of_two_roles_is_judged_for_each() {
    let stage = Stage::new(
        "create table t (id int primary key, v text); grant select on t to anon, authenticated; select relay.watch('t');
         create schema hidden; grant usage on schema hidden to authenticated;
         create domain hidden.word as text; alter table t add w hidden.word",
    )
    .await;
    let binding = json!([{"event": "*", "table": "t", "filter": "v=like.a%"}]);
    let mut anon = stage.subscribe(&token("anon", None, json!({})), binding.clone()).await;
    let mut ann = stage.subscribe(&user(ANN), binding).await;
    stage.run("insert into t values (1, 'ab'), (2, 'b')").await;
    assert_eq!(stage.told(&mut ann).await.len(), 1);
    assert_eq!(stage.told(&mut anon).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_gets_another_name_is_told_of_as_a_gap() {
    for (filter, renaming) in [
        (json!("v=like.a%"), "alter table s.t rename to u; insert into s.u values (1, 'ab')"),
        (Value::Null, "alter table s.t rename to u; insert into s.u values (1, 'ab')"),
        (Value::Null, "begin; alter table s.t rename to u; insert into s.u values (1, 'ab'); commit"),
        (Value::Null, "alter table s.t set schema public; insert into public.t values (1, 'ab')"),
        (Value::Null, "alter schema s rename to r; insert into r.t values (1, 'ab')"),
    ] {
        let stage = Stage::new(
            "create schema s; grant usage on schema s to authenticated; create table s.t (id int primary key, v text);
             grant select on s.t to authenticated; select relay.watch('s.t')",
        )
        .await;
        let binding = json!([{"event": "*", "schema": "s", "table": "t", "filter": filter}]);
        let mut ann = stage.subscribe(&user(ANN), binding).await;
        stage.run(renaming).await;
        // Then the channel is bound anew, which the missing table ends.
        for text in ["Gap: ", "Unable to subscribe to changes"] {
            let frame = loop {
                let frame = ann.frame().await;
                assert_ne!(frame[3], "postgres_changes", "{renaming}: {frame}");
                if frame[3] == "system" {
                    break frame;
                }
            };
            let message = frame[4]["message"].as_str().unwrap();
            assert!(message.starts_with(text), "{renaming}: {message}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_leaves_a_schema_is_told_to_who_follows_the_schema_and_not_to_who_follows_all() {
    let stage = Stage::new(
        "create schema s; grant usage on schema s to authenticated; create table s.t (id int primary key);
         grant select on s.t to authenticated; select relay.watch('s.t')",
    )
    .await;
    let mut of_schema = stage
        .subscribe(&user(ANN), json!([{"event": "*", "schema": "s"}, {"event": "*", "table": "marker"}]))
        .await;
    let mut of_all = stage.subscribe(&user(ANN), json!([{"event": "*", "schema": "*"}])).await;
    stage.run("insert into s.t values (1)").await;
    for client in [&mut of_schema, &mut of_all] {
        assert_eq!(client.change().await["table"], "t");
    }
    stage.run("alter table s.t set schema public").await;
    assert!(
        gap(&stage, &mut of_schema).await.is_some_and(|gap| gap.starts_with("Gap: a table of this channel"))
    );
    assert_eq!(gap(&stage, &mut of_all).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_between_an_altered_table_and_its_new_binding_is_told_as_a_gap_after_it() {
    let stage = Stage::new(
        "create table t (id int primary key, v text); grant select on t to authenticated; select relay.watch('t')",
    )
    .await;
    let mut ann =
        stage.subscribe(&user(ANN), json!([{"event": "*", "table": "t", "filter": "v=eq.a"}])).await;
    stage.run("begin; alter table t alter v type varchar; insert into t values (1, 'a'); commit").await;
    for text in ["Gap: a table of this channel", "Subscribed to PostgreSQL", "Gap: a table of this channel"] {
        let frame = ann.frame().await;
        assert!(
            frame[4]["message"].as_str().is_some_and(|message| message.starts_with(text)),
            "{text}: {frame}"
        );
    }
    stage.run("insert into t values (2, 'a')").await;
    assert_eq!(ann.change().await["record"]["id"], 2);
}
