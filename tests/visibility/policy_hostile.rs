//! Policies that raise, sleep, write or change the role affect only the readers that they apply to.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::stage::Stage;
use crate::support::{ANN, BOB, PATIENCE, token};

fn user(sub: &str) -> String {
    token("authenticated", Some(sub), json!({}))
}

async fn ids(stage: &Stage, client: &mut Client) -> Vec<Value> {
    stage.changes(client).await.iter().map(|change| change["record"]["id"].clone()).collect()
}

/// The value of a counter.
fn counted(stage: &Stage, name: &str) -> u64 {
    let text = stage.relay.metrics();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("relay_{name}_total ")));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_raises_denies_only_the_rows_and_the_subscribers_for_which_it_does() {
    let stage = Stage::new(
        "create table t (id int primary key, n int); create table quiet (id int primary key);
         alter table t enable row level security;
         create policy divides on t to authenticated using (10 / n > 1);
         create policy casts on t to anon using ((auth.jwt() ->> 'team')::int = n);
         grant select on t, quiet to anon, authenticated; select relay.watch('t'), relay.watch('quiet')",
    )
    .await;
    let mut divides = stage.join(&user(ANN)).await;
    let mut red = stage.join(&token("anon", None, json!({"team": "2"}))).await;
    let mut none = stage.join(&token("anon", None, json!({"team": "not a number"}))).await;
    stage
        .run(
            "insert into t values (1, 1), (2, 0), (3, 2), (4, 100), (5, 0), (6, null), (7, 2); insert into quiet values (8);
             insert into t select n, n % 2 from generate_series(100, 299) n",
        )
        .await;
    let mut divided: Vec<i32> = vec![1, 3, 7, 8];
    divided.extend((100..300).filter(|n| n % 2 == 1));
    assert_eq!(ids(&stage, &mut divides).await, divided);
    assert_eq!(ids(&stage, &mut red).await, [3, 7, 8]);
    assert_eq!(ids(&stage, &mut none).await, [8]);
    assert!(counted(&stage, "judgements_raised") > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_sleeps_is_cut_off_and_other_tables_go_on() {
    let sql = "create table slow (id int primary key); create table fast (id int primary key);
               alter table slow enable row level security; alter table fast enable row level security;
               create policy sleeps on slow using (id > 1 or pg_sleep(60) is null); create policy p on fast using (true);
               grant select on slow, fast to anon; select relay.watch('slow'), relay.watch('fast')";
    let stage = Stage::with(sql, |settings, _| settings.judge_timeout_ms = Some(100)).await;
    let mut anon = stage.join(&token("anon", None, json!({}))).await;
    stage.run("insert into slow values (1); insert into fast values (2)").await;
    let told = tokio::time::timeout(PATIENCE / 2, ids(&stage, &mut anon)).await.expect("the feed is held up");
    assert_eq!(told, [2]);
    assert!(counted(&stage, "judgements_timed_out") > 0);
    // It is not evaluated for a while, so that it delays no other, and then evaluated again.
    let started = Instant::now();
    for id in 3.. {
        stage.run(&format!("insert into slow values ({id})")).await;
        if ids(&stage, &mut anon).await == [id] {
            break;
        }
        assert!(started.elapsed() < PATIENCE, "the table itself goes on as well");
    }
}

/// A table `evil` whose policy calls `evil()`, and `t` with "own rows only".
fn with_evil(body: &str) -> String {
    format!(
        "create table loot (id int); insert into loot values (1);
         create function evil() returns bool language plpgsql volatile as $evil$ begin {body} end $evil$;
         create table evil (id int primary key); create table t (id int primary key, owner uuid);
         alter table evil enable row level security; alter table t enable row level security;
         create policy evil on evil using (evil());
         create policy own on t using (owner = (select auth.uid()) and current_setting('TimeZone') <> 'Asia/Tokyo');
         grant select on evil, t to authenticated, anon, service_role; select relay.watch('evil'), relay.watch('t')"
    )
}

/// Ann and bob see their own rows and nothing else, in the same transactions in which `evil` has rows.
/// Returns what they are told of `evil`.
async fn check_others_unharmed(stage: &Stage) -> Vec<Value> {
    let (mut ann, mut bob) = (stage.join(&user(ANN)).await, stage.join(&user(BOB)).await);
    let mut of_evil = Vec::new();
    for round in 0..3 {
        let id = round * 10;
        stage
            .run(&format!(
                "insert into evil values ({id}); insert into t values ({id}, '{ANN}'), ({id} + 1, '{BOB}'), ({id} + 2, null);
                 insert into evil values ({id} + 1)"
            ))
            .await;
        for (client, own) in [(&mut ann, id), (&mut bob, id + 1)] {
            let told =
                tokio::time::timeout(PATIENCE, stage.changes(client)).await.expect("the feed stands still");
            let (evil, t): (Vec<Value>, Vec<Value>) =
                told.into_iter().partition(|change| change["table"] == "evil");
            assert_eq!(t.iter().map(|change| change["record"]["id"].clone()).collect::<Vec<_>>(), [own]);
            of_evil.extend(evil);
        }
    }
    of_evil
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_changes_the_role_denies_its_rows() {
    for role in ["none", "postgres", "service_role", "anon"] {
        let body =
            format!("perform set_config('role', '{role}', true); return (select count(*) > 0 from loot);");
        let stage = Stage::new(&with_evil(&body)).await;
        assert_eq!(check_others_unharmed(&stage).await, [Value::Null; 0], "{role}");
        stage.relay.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_changes_settings_changes_no_other_evaluation() {
    let claims = json!({"sub": BOB, "role": "authenticated"}).to_string();
    for local in [true, false] {
        let body = format!(
            "perform set_config('request.jwt.claims', '{claims}', {local}), set_config('request.jwt.claim.sub', '{BOB}', {local}),
               set_config('search_path', 'pg_temp', {local}), set_config('statement_timeout', '1', {local}),
               set_config('row_security', 'off', {local}), set_config('TimeZone', 'Asia/Tokyo', {local});
             return true;"
        );
        let stage = Stage::new(&with_evil(&body)).await;
        check_others_unharmed(&stage).await;
        stage.relay.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_writes_is_denied_and_leaves_nothing_behind() {
    for write in [
        "insert into loot values (2)",
        "perform nextval('seq')",
        "create temp table x ()",
        "delete from loot",
    ] {
        let setup = "create sequence seq; grant all on sequence seq to public;";
        let stage = Stage::new(&format!(
            "{setup} {}; grant all on loot to public",
            with_evil(&format!("{write}; return true;"))
        ))
        .await;
        assert_eq!(check_others_unharmed(&stage).await, [Value::Null; 0], "{write}");
        assert_eq!(stage.database.value("select string_agg(id::text, ',') from loot").await, "1");
        stage.relay.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_notifies_is_not_heard() {
    let body = "perform pg_notify('evil', 'from the policy'); return true;";
    let stage = Stage::new(&with_evil(body)).await;
    let server = relay::postgres::connect::pool::Server::parse(&stage.database.url, "test", None).unwrap();
    let (sender, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let listener = server.connect_listening(move |notification| _ = sender.send(notification)).await.unwrap();
    listener.batch_execute("listen evil").await.unwrap();
    check_others_unharmed(&stage).await;
    stage.run("notify evil, 'from the test'").await;
    let first = tokio::time::timeout(PATIENCE, heard.recv()).await.unwrap().unwrap();
    assert_eq!(first.payload(), "from the test");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_cannot_stop_the_feed_by_what_it_raises_or_ends() {
    for body in [
        // Codes by which a server says that it is going away, and that a statement was cancelled.
        "raise exception 'no' using errcode = '57P01';",
        "raise exception 'no' using errcode = '08006';",
        "raise exception 'no' using errcode = '57014';",
        "raise exception 'no' using errcode = '40001';",
        "perform pg_terminate_backend(pg_backend_pid()); return true;",
        "perform pg_cancel_backend(pg_backend_pid()); perform pg_sleep(1); return true;",
        "execute 'deallocate all'; return true;",
        "perform evil(); return true;",
    ] {
        let stage = Stage::new(&with_evil(body)).await;
        let checked = tokio::time::timeout(PATIENCE, check_others_unharmed(&stage)).await;
        let of_evil = checked.unwrap_or_else(|_| panic!("the feed stands still: {body}"));
        assert_eq!(of_evil, [Value::Null; 0], "{body}");
        tokio::time::timeout(Duration::from_secs(5), stage.relay.stop()).await.unwrap();
    }
}
