//! What a cursor promises where it is hardest: as a token ends, as rules change, as the changelog is trimmed.

use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};
use tokio::time::timeout;

use crate::support::client::Client;
use crate::support::http::{Answer, Events, get};
use crate::support::relay::Relay;
use crate::support::stage::Stage;
use crate::support::{ANN, BOB, eventually, token, token_for};

fn path(table: &str, token: &str, more: &str) -> String {
    format!("/realtime/v1/changes?table={table}&apikey={token}{more}")
}

async fn ask(relay: &Relay, table: &str, more: &str) -> Answer {
    let token = token("authenticated", Some(ANN), json!({}));
    get(relay.address, &path(table, &token, more), "").await
}

fn cursor(answer: &Answer) -> String {
    answer.body["cursor"].as_str().unwrap_or_else(|| panic!("{answer:?}")).to_owned()
}

fn ids(answer: &Answer) -> Vec<i64> {
    let record = |change: &Value| change["record"]["id"].as_i64();
    answer.body["changes"].as_array().into_iter().flatten().filter_map(record).collect()
}

/// `t (id, owner, v)` that every role may read.
async fn stage() -> Stage {
    Stage::new(
        "create table t (id int primary key, owner uuid, v text); grant select on t to authenticated; select relay.watch('t')",
    )
    .await
}

/// What the relay counts under this name.
fn count(relay: &Relay, name: &str) -> f64 {
    let text = relay.metrics();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("{name}: {text}")).parse().unwrap()
}

/// The ids of `t` that the client is told up to the marker, and whether it is told of a gap.
async fn heard(stage: &Stage, client: &mut Client) -> (Vec<i64>, bool) {
    let marker: i64 =
        stage.database.value("insert into marker default values returning id").await.parse().unwrap();
    let (mut ids, mut gap) = (Vec::new(), false);
    loop {
        let frame = client.frame().await;
        let data = &frame[4]["data"];
        match frame[3].as_str() {
            Some("system") => gap |= frame[4]["message"].as_str().is_some_and(|text| text.contains("Gap")),
            Some("postgres_changes") if data["table"] == "t" => {
                ids.push(data["record"]["id"].as_i64().unwrap());
            }
            Some("postgres_changes") if data["record"]["id"] == marker => return (ids, gap),
            _ => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rows_of_a_materialized_view_obey_its_read_policy() {
    let sql = format!(
        "create table base (id int primary key, owner uuid); insert into base values (1, '{ANN}'), (2, '{BOB}');
         create materialized view t as select * from base; create unique index on t (id);
         grant select on t to authenticated; select relay.watch('t');
         select relay.allow('t', 'owner = auth.uid()')"
    );
    let stage = Stage::new(&sql).await;
    let answer = ask(&stage.relay, "t", "").await;
    assert_eq!(answer.body["rows"], json!([{"id": 1, "owner": ANN}]), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_written_as_the_token_ends_comes_with_the_next_token() {
    let stage = stage().await;
    let since = |time: u64| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        now.as_secs_f64() - time as f64
    };
    let start = cursor(&ask(&stage.relay, "t", "").await);
    // Late in a second, so that the token ends early in one.
    eventually("a second is nearly over", || async { (since(0).fract() > 0.7).then_some(()) }).await;
    let end = since(0) as u64 + 2;
    let short = token_for("authenticated", Some(ANN), json!({}), Duration::from_secs(2));
    let poll = path("t", &short, &format!("&since={start}&wait=20"));
    let (answer, ()) = tokio::join!(get(stage.relay.address, &poll, ""), async {
        eventually("the token has ended", || async { (since(end) > 0.1).then_some(()) }).await;
        stage.run("insert into t values (1)").await;
    });
    let mut seen = ids(&answer);
    let after = ask(&stage.relay, "t", &format!("&since={}&wait=1", cursor(&answer))).await;
    seen.extend(ids(&after));
    assert_eq!(seen, [1], "{answer:?} {after:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_trimmed_before_it_was_read_is_a_gap_for_those_who_listen() {
    let stage = stage().await;
    let mut client = stage.join(&token("authenticated", Some(ANN), json!({}))).await;
    stage.run("select relay.retain(age => '1 second')").await;
    assert_eq!(heard(&stage, &mut client).await, (vec![], false));
    let holder = stage.database.connect().await;
    holder.batch_execute("begin; lock table relay.watch_list in access exclusive mode").await.unwrap();
    let mut last = 0;
    let waits = "select count(*) from pg_locks where not granted and relation = 'relay.watch_list'::regclass";
    while stage.database.value(waits).await == "0" {
        last += 1;
        stage.run(&format!("insert into t values ({last}); select pg_sleep(0.05)")).await;
    }
    // Some more are read ahead, then the source stands still.
    let mut read = -1.0;
    while count(&stage.relay, "relay_changes_read_total") > read {
        read = count(&stage.relay, "relay_changes_read_total");
        for _ in 0..5 {
            last += 1;
            stage.run(&format!("insert into t values ({last})")).await;
        }
        stage.run("select pg_sleep(0.2)").await;
    }
    for wanted in ["moved on to 1", "truncated 0"] {
        eventually(wanted, || async {
            stage.database.value("select relay.trim_changelog()").await.contains(wanted).then_some(())
        })
        .await;
    }
    last += 1;
    stage.run(&format!("insert into t values ({last})")).await;
    holder.batch_execute("commit").await.unwrap();
    let (ids, gap) = heard(&stage, &mut client).await;
    assert!(gap || ids == (1..=last).collect::<Vec<i64>>(), "of {last}: {ids:?} and no gap");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_counts_for_what_was_written_after_it_also_for_who_comes_with_a_cursor() {
    let stage = stage().await;
    stage.run("alter table t enable row level security; create policy open on t using (true)").await;
    let start = cursor(&ask(&stage.relay, "t", "").await);
    stage.run(&format!("insert into t values (1, '{BOB}', 'for all')")).await;
    // It has nothing in its memory: it has to look into the changelog. It looks so often that it need not ask anew how far
    // that goes.
    let relay = Relay::with(&stage.database.url, |settings| settings.poll_ms = Some(5)).await;
    let holder = stage.database.connect().await;
    holder.batch_execute("begin; lock table relay.history in access exclusive mode").await.unwrap();
    let since = format!("&since={start}&wait=1");
    let (answer, ()) = tokio::join!(ask(&relay, "t", &since), async {
        eventually("it asks how far the changelog goes", || async {
            let waits =
                "select count(*) from pg_locks where not granted and relation = 'relay.history'::regclass";
            (stage.database.value(waits).await != "0").then_some(())
        })
        .await;
        let read = count(&relay, "relay_changes_read_total");
        stage
            .run(&format!(
                "begin; drop policy open on t; create policy own on t using (owner = auth.uid());
                 insert into t values (2, '{BOB}', 'for Bob alone'); commit"
            ))
            .await;
        eventually("it is read", || async {
            (count(&relay, "relay_changes_read_total") > read).then_some(())
        })
        .await;
        holder.batch_execute("commit").await.unwrap();
    });
    assert!(!ids(&answer).contains(&2), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_history_is_a_gap_also_when_its_beginning_fails() {
    let stage = stage().await;
    let mut client = stage.join(&token("authenticated", Some(ANN), json!({}))).await;
    stage.run("create sequence tries").await;
    assert_eq!(heard(&stage, &mut client).await, (vec![], false));
    let whole = stage.database.value("select pg_get_functiondef('relay.flush()'::regprocedure)").await;
    stage
        .run(
            "create or replace function relay.flush() returns void language plpgsql as
             $$ begin perform nextval('public.tries'); raise exception 'not now'; end $$;
             grant usage on sequence tries to public;
             update relay.history set mark = gen_random_uuid();
             select pg_terminate_backend(pid) from pg_stat_activity
             where datname = current_database() and application_name like 'relay%'",
        )
        .await;
    eventually("the beginning failed", || async {
        (stage.database.value("select is_called from tries").await == "t").then_some(())
    })
    .await;
    stage.run(&whole).await;
    loop {
        let frame = client.frame().await;
        if frame[3] == "system" && frame[4]["message"].as_str().is_some_and(|text| text.starts_with("Gap: "))
        {
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_altered_while_the_past_is_read_is_told() {
    let stage = stage().await;
    let start = cursor(&ask(&stage.relay, "t", "").await);
    stage
        .run(&format!(
            "alter table t add kind text default 'a';
             insert into t select n, '{ANN}', repeat('x', 1000) from generate_series(1, 20000) n"
        ))
        .await;
    let relay = Relay::start(&stage.database.url).await;
    let token = token("authenticated", Some(ANN), json!({}));
    let wanted = path("t", &token, &format!("&filter=kind=eq.a&since={start}"));
    let mut events = Events::open(relay.address, &wanted, None).await;
    // Much waits for this reader: it is still told of the past.
    stage.run("alter table t alter kind type varchar").await;
    stage.run(&format!("insert into t values (30000, '{ANN}', 'last')")).await;
    let patience = Duration::from_secs(10);
    let mut count = 0;
    while let Some(event) =
        timeout(patience, events.next()).await.unwrap_or_else(|_| panic!("nothing after {count} changes"))
    {
        count += 1;
        if event.name == "gap" || event.data["record"]["id"] == 30000 {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_rows_slowly_delays_no_other_clients_changes() {
    let stage = stage().await;
    stage
        .run(
            "create table slow (id int primary key); insert into slow values (1); alter table slow enable row level security;
             create policy slow on slow using (pg_sleep(0.5) is not null); grant select on slow to authenticated;
             select relay.watch('slow')",
        )
        .await;
    let mut client = stage
        .subscribe(
            &token("authenticated", Some(ANN), json!({})),
            json!([{"event": "*", "schema": "public", "table": "t"}]),
        )
        .await;
    heard(&stage, &mut client).await;
    let address = stage.relay.address;
    let slow = path("slow", &token("authenticated", Some(ANN), json!({})), "");
    let readers: Vec<_> = (0..40)
        .map(|_| {
            let slow = slow.clone();
            tokio::spawn(async move { get(address, &slow, "").await.status })
        })
        .collect();
    eventually("they read", || async {
        let reading = "select count(*) from pg_stat_activity where datname = current_database() and wait_event = 'PgSleep'";
        (stage.database.value(reading).await == "2").then_some(())
    })
    .await;
    let mut took = Duration::ZERO;
    while readers.iter().filter(|reader| !reader.is_finished()).count() > 5 {
        let started = Instant::now();
        heard(&stage, &mut client).await;
        took = took.max(started.elapsed());
    }
    let mut statuses = Vec::new();
    for reader in readers {
        statuses.push(reader.await.unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_polls_at_once_take_few_connections() {
    let stage = stage().await;
    stage.run("select pg_current_xact_id()").await;
    let start = cursor(&ask(&stage.relay, "t", "").await);
    let address = stage.relay.address;
    let wanted = path("t", &token("authenticated", Some(ANN), json!({})), &format!("&since={start}&wait=2"));
    let polls: Vec<_> = (0..60)
        .map(|_| {
            let wanted = wanted.clone();
            tokio::spawn(async move { get(address, &wanted, "").await.status })
        })
        .collect();
    let mut most = 0;
    while polls.iter().any(|poll| !poll.is_finished()) {
        let count = "select count(*) from pg_stat_activity where datname = current_database() and application_name = 'relay'";
        most = most.max(stage.database.value(count).await.parse().unwrap());
    }
    assert!(most < 25, "{most} connections");
}

#[tokio::test(flavor = "multi_thread")]
async fn large_rows_one_after_the_other_are_told() {
    let stage = stage().await;
    let mut since = cursor(&ask(&stage.relay, "t", "").await);
    stage
        .run("insert into t select n, null, repeat('x', 100000 * n * n + n * 30000) from generate_series(1, 3) n where n <> 2")
        .await;
    stage.run("insert into t values (9)").await;
    let mut seen = Vec::new();
    for _ in 0..6 {
        let answer = ask(&stage.relay, "t", &format!("&since={since}&wait=1")).await;
        seen.extend(ids(&answer));
        since = cursor(&answer);
    }
    assert_eq!(seen, [1, 3, 9]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_returns_after_a_large_transaction_waits_for_no_other() {
    let stage = stage().await;
    let start = cursor(&ask(&stage.relay, "t", "").await);
    stage.run("insert into t select n, null, repeat('x', 400) from generate_series(1, 20000) n").await;
    eventually("it is being read", || async {
        (count(&stage.relay, "relay_changes_read_total") >= 4_000.0).then_some(())
    })
    .await;
    let mut since = start;
    let mut seen = 0;
    while seen < 20_000 {
        let answer = ask(&stage.relay, "t", &format!("&since={since}&wait=1")).await;
        assert_eq!(answer.status, 200, "{seen} seen: {}", answer.body["error"]);
        seen += ids(&answer).len();
        since = cursor(&answer);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_see_little_of_a_long_past_comes_through_it() {
    let stage = stage().await;
    stage
        .run(
            "create function never(uuid) returns bool language plpgsql stable as $$ begin perform pg_sleep(0.002); return false; end $$;
             alter table t enable row level security; create policy never on t using (never(owner))",
        )
        .await;
    let mut since = cursor(&ask(&stage.relay, "t", "").await);
    stage.run("insert into t select n from generate_series(1, 6000) n").await;
    // The policy is slow on purpose; how slow depends on the machine.
    let relay = Relay::with(&stage.database.url, |settings| settings.judge_timeout_ms = Some(60_000)).await;
    for _ in 0..2 {
        let answer = ask(&relay, "t", &format!("&since={since}&wait=1")).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        since = cursor(&answer);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_does_not_widen_what_is_told() {
    let stage = stage().await;
    stage.run("create table u (id int primary key); grant select on u to authenticated; select relay.watch('u')").await;
    let start = cursor(&ask(&stage.relay, "t", "").await);
    stage.run("insert into u values (1); insert into t values (2)").await;
    let both = format!("&schema=*&since={start}&wait=1");
    let mut wrong = Vec::new();
    for more in ["&schema=*", "&filter=%ff", "&since=%ff", &both] {
        let answer = ask(&stage.relay, "t", more).await;
        if answer.status != 400 {
            wrong.push((more.to_owned(), answer));
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cursor_taken_by_a_writer_loses_nothing_of_its_transaction() {
    let stage = Stage::new(
        "create table w (id int primary key); grant select on w to authenticated; select relay.watch('w')",
    )
    .await;
    let writer = stage.database.connect().await;
    writer.batch_execute("begin; insert into w values (1)").await.unwrap();
    // A later transaction that ended: the writer's own number is below the end of its snapshot then.
    stage.run("insert into w values (2)").await;
    let cursor: String = writer.query_one("select relay.cursor()", &[]).await.unwrap().get(0);
    writer.batch_execute("insert into w values (3); commit").await.unwrap();
    let answer = get(
        stage.relay.address,
        &format!(
            "/realtime/v1/changes?table=w&since={cursor}&apikey={}",
            token("authenticated", None, json!({}))
        ),
        "",
    )
    .await;
    let changes = answer.body["changes"].as_array().unwrap();
    let ids: Vec<_> = changes.iter().map(|change| change["record"]["id"].as_i64().unwrap()).collect();
    assert_eq!(ids, [1, 3], "{answer:?}");
}
