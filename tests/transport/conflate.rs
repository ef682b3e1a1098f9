//! Streams with `conflate=`: the latest change of each row, so that a client that keeps rows by key has what a plain one has.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::support::dice::Dice;
use crate::support::http::{Events, get, metrics_path, text};
use crate::support::stage::Stage;
use crate::support::token;

fn path(more: &str) -> String {
    format!("/realtime/v1/changes?{more}&apikey={}", token("authenticated", None, json!({})))
}

/// The value of a metric.
async fn metric(stage: &Stage, name: &str) -> f64 {
    let (_, page) = text(stage.relay.address, &metrics_path()).await;
    let line = page.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap();
    line.rsplit_once(' ').unwrap().1.parse().unwrap()
}

async fn beginning(stage: &Stage, of: &str) -> String {
    let answer = get(stage.relay.address, &path(of), "").await;
    answer.body["cursor"].as_str().unwrap_or_else(|| panic!("{answer:?}")).to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hot_table_costs_a_frame_a_row_and_interval() {
    let stage = Stage::new(
        "create table t (id int primary key, v int, w text); grant select on t to authenticated; insert into t select g from generate_series(1, 5) g;
         select relay.watch('t')",
    )
    .await;
    let cursor = beginning(&stage, "table=t").await;
    let path = path("table=t&conflate=3000");
    let mut events = Events::open(stage.relay.address, &path, Some(&cursor)).await;
    stage.run("update t set v = 0 where id = 1").await;
    let first = events.next().await.unwrap();
    assert_eq!(first.data["record"]["v"], 0, "what comes after a pause does not wait");
    stage.run("do $$ begin for i in 1 .. 100 loop update t set v = i; end loop; end $$;
               insert into t values (6, 0, 'new'); update t set v = 7 where id = 6; insert into t values (7); delete from t where id = 7").await;
    let mut told = Vec::new();
    while told.len() < 7 {
        let event = events.next().await.unwrap();
        let record = event.data.get("record").or(event.data.get("old_record")).unwrap();
        assert_eq!(event.id, event.data["cursor"].as_str().unwrap());
        told.push(format!(
            "{} {} {} {}",
            event.data["type"].as_str().unwrap(),
            record["id"],
            record["v"],
            record["w"]
        ));
    }
    let mut rows: Vec<String> = (1..=5).map(|id| format!("UPDATE {id} 100 null")).collect();
    rows.extend([String::from("INSERT 6 7 \"new\""), String::from("DELETE 7 null null")]);
    // Rows are updated in an order of PostgreSQL's.
    told[..5].sort();
    assert_eq!(told, rows);
    assert_eq!(metric(&stage, "relay_changes_conflated_total").await, 497.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_and_more_rows_than_are_held_do_not_wait() {
    let stage = Stage::new(
        "create table t (id int primary key, v int); grant select on t to authenticated; select relay.watch('t')",
    )
    .await;
    let cursor = beginning(&stage, "table=t").await;
    let mut events = Events::open(stage.relay.address, &path("table=t&conflate=10000"), Some(&cursor)).await;
    let started = std::time::Instant::now();
    stage.run("insert into t values (-1, 1)").await;
    assert_eq!(events.next().await.unwrap().data["record"]["id"], -1);
    stage.run("insert into t select g, 1 from generate_series(1, 12000) g").await;
    for id in 1..=5000 {
        assert_eq!(events.next().await.unwrap().data["record"]["id"], id);
    }
    stage.run("truncate t; insert into t values (1, 2)").await;
    loop {
        let event = events.next().await.unwrap();
        if event.name == "gap" {
            break;
        }
    }
    assert!(started.elapsed().as_secs() < 10, "they waited for the interval");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_conflated_is_refused_with_the_cure() {
    let stage = Stage::new(
        "create table t (id int primary key); create table \"No key\" (id int); grant select on t, \"No key\" to authenticated;
         select relay.watch('t'), relay.watch('\"No key\"')",
    )
    .await;
    let stream = "accept: text/event-stream\r\n";
    for (parameters, accept, said) in [
        ("table=No%20key&conflate=250", stream, "alter table public.\"No key\" add primary key"),
        ("tables=t,%22No%20key%22&conflate=250", stream, "has no primary key"),
        ("table=t&conflate=250", "", "it is for event streams"),
        ("table=t&conflate=49", stream, "from 50 to 10000"),
        ("table=t&conflate=10001", stream, "from 50 to 10000"),
        ("table=t&conflate=often", stream, "from 50 to 10000"),
        ("table=t&conflate=", stream, "from 50 to 10000"),
        ("table=t&event=UPDATE&conflate=250", stream, "leave event= out"),
        ("topic=room&conflate=250", stream, "leave it out"),
        ("tables=t&t.conflate=250", stream, "no such parameter"),
    ] {
        let answer = get(stage.relay.address, &path(parameters), accept).await;
        assert_eq!(answer.status, 400, "{parameters}: {answer:?}");
        assert!(answer.body["error"].as_str().unwrap().contains(said), "{parameters}: {answer:?}");
    }
}

/// The rows that a client keeps, by key.
type Rows = BTreeMap<String, Value>;

/// What a reader is told of the rows that it keeps.
#[derive(Clone, Copy, PartialEq)]
enum Trust {
    /// An insert is of a row that it does not have, any other change of one that it has.
    Plain,
    /// The same, but a row may be deleted that it never had.
    Conflated,
    /// Rows also come and go by the policy.
    Hidden,
}

/// Takes a change as a client does that keeps rows by key.
fn take(rows: &mut Rows, change: &Value, trust: Trust) {
    let key = |record: &Value| format!("{} {} {}", change["table"], record["a"], record["b"]);
    let (old, new) = (&change["old_record"], &change["record"]);
    match change["type"].as_str().unwrap() {
        "INSERT" => assert!(rows.insert(key(new), new.clone()).is_none(), "twice: {change}"),
        "UPDATE" => {
            assert!(rows.remove(&key(old)).is_some() || trust == Trust::Hidden, "not there: {change}");
            rows.insert(key(new), new.clone());
        }
        _ => {
            let removed = rows.remove(&key(old));
            assert!(removed.is_some() || trust != Trust::Plain, "not there: {change}");
        }
    }
}

/// Reads until the row that ends the run has come, in a stream that is cut again and again.
fn read(
    stage: &Stage,
    cursor: &str,
    conflate: Option<u64>,
    is_hidden: bool,
    seed: u64,
) -> JoinHandle<(Rows, usize)> {
    let trust = match conflate {
        _ if is_hidden => Trust::Hidden,
        None => Trust::Plain,
        Some(_) => Trust::Conflated,
    };
    let address = stage.relay.address;
    let conflate = conflate.map_or(String::new(), |interval| format!("&conflate={interval}"));
    let path = path(&format!("tables=t,u{conflate}"));
    let cursor = cursor.to_owned();
    tokio::spawn(async move {
        let (mut dice, mut rows, mut last, mut told) = (Dice(seed), Rows::new(), cursor, 0);
        loop {
            let mut events = match Events::try_open(address, &path, Some(&last)).await {
                // The database may be too busy to read what was missed.
                Err(Some(503)) => continue,
                opened => opened.expect("a stream"),
            };
            for _ in 0..dice.below(60) + 1 {
                let event = events.next().await.expect("the stream goes on");
                assert_eq!(event.name, "change", "{event:?}");
                take(&mut rows, &event.data, trust);
                told += 1;
                last = event.id;
                if event.data["record"]["a"] == -1 {
                    return (rows, told);
                }
            }
        }
    })
}

/// A statement on few rows: inserts, updates of any or all columns, also of the key, and deletes.
fn statement(dice: &mut Dice) -> String {
    let table = ["t", "u"][dice.below(2) as usize];
    let (a, b, v) = (dice.below(6), dice.below(2), dice.below(1000));
    match dice.below(10) {
        0..3 => format!("insert into {table} values ({a}, 'k{b}', {v}) on conflict do nothing"),
        3..7 => format!("update {table} set v = {v} where a = {a}"),
        7 => format!(
            "update {table} x set a = {v} % 6 where (a, b) = ({a}, 'k{b}') and not exists (select from {table} y where (y.a, y.b) = ({v} % 6, x.b))"
        ),
        8 => format!("delete from {table} where (a, b) = ({a}, 'k{b}')"),
        _ => format!(
            "insert into {table} values ({a}, 'k{b}', {v}) on conflict (a, b) do update set v = excluded.v"
        ),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_kept_by_key_are_those_of_the_table_and_of_a_plain_reader_whatever_is_cut() {
    check("", u64::from(std::process::id())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_a_policy_hides_and_shows_again_are_those_that_postgresql_shows() {
    let policies = "alter table t enable row level security; create policy p on t using (v % 3 <> 1);
        alter table u enable row level security; create policy p on u using (v % 2 = 0 or a = -1);
        select relay.watch('t', leave_events => true), relay.watch('u', leave_events => true)";
    check(policies, u64::from(std::process::id()) + 1000).await;
}

/// Readers, all but one conflated, while rows are written at random: what they keep in the end is what PostgreSQL shows them.
async fn check(policies: &str, seed: u64) {
    let stage = Stage::new(
        "create table t (a int, b text, v int, primary key (b, a)); create table u (v int, c int, b text, a int, primary key (a, b));
         alter table u drop column c; alter table u replica identity full; grant select on t, u to authenticated;
         select relay.watch('t'), relay.watch('u')",
    )
    .await;
    stage.run(policies).await;
    let mut dice = Dice(seed);
    let cursor = beginning(&stage, "tables=t,u").await;
    let readers: Vec<_> = [None, Some(50), Some(50), Some(120), Some(400)]
        .into_iter()
        .zip(1..)
        .map(|(conflate, n)| (conflate, read(&stage, &cursor, conflate, !policies.is_empty(), seed + n)))
        .collect();
    for _ in 0..400 {
        let statements: Vec<String> = (0..dice.below(8) + 1).map(|_| statement(&mut dice)).collect();
        let statements = statements.join("; ").replace("into u values (", "into u (a, b, v) values (");
        stage.run(&format!("begin; {statements}; commit")).await;
    }
    stage.run("insert into t values (-1, 'end', 0)").await;
    let table = "select coalesce(json_object_agg(key, row), '{}')::text from (
        select format('\"t\" %s \"%s\"', a, b) as key, to_json(t) as row from t union all select format('\"u\" %s \"%s\"', a, b), to_json(u) from u) r";
    let shown = stage.selected("authenticated", &json!({}), table).await;
    let shown: Rows = serde_json::from_str(&shown[0]).unwrap();
    let mut plain = 0;
    for (conflate, reader) in readers {
        let (rows, told) = reader.await.unwrap();
        assert_eq!(rows, shown, "conflate {conflate:?}, seed {seed}");
        match conflate {
            None => plain = told,
            Some(_) => assert!(told <= plain * 2, "{told} of {plain}"),
        }
    }
    assert!(metric(&stage, "relay_changes_conflated_total").await > 0.0);
}
