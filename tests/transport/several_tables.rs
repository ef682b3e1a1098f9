//! Several tables in one request: their rows of one moment, and one cursor for the changes of all.

use std::collections::HashSet;

use serde_json::{Value, json};
use tokio::time::timeout;

use crate::support::http::{Answer, Events, get};
use crate::support::stage::Stage;
use crate::support::{ANN, BOB, PATIENCE, token};

/// `t` with "own rows only", `crm.deals` that everyone reads, and `Odd, "name"`.
async fn stage() -> Stage {
    Stage::new(
        r#"create table t (id int primary key, owner uuid, v text); alter table t enable row level security;
         create policy own on t using (owner = auth.uid()); grant select on t to authenticated;
         create schema crm; create table crm.deals (id int primary key, v text, price int);
         grant usage on schema crm to authenticated; grant select on crm.deals to authenticated;
         create table "Odd, ""name" (id int primary key); grant select on "Odd, ""name" to authenticated;
         select relay.watch('t'), relay.watch('crm.deals'), relay.watch('"Odd, ""name"')"#,
    )
    .await
}

fn path(parameters: &str) -> String {
    format!("/realtime/v1/changes?{parameters}&apikey={}", token("authenticated", Some(ANN), json!({})))
}

async fn ask(stage: &Stage, parameters: &str) -> Answer {
    get(stage.relay.address, &path(parameters), "").await
}

fn ids(rows: &Value) -> Vec<i64> {
    rows.as_array()
        .unwrap_or_else(|| panic!("{rows}"))
        .iter()
        .map(|row| row["id"].as_i64().unwrap())
        .collect()
}

fn cursor(answer: &Answer) -> String {
    answer.body["cursor"].as_str().unwrap_or_else(|| panic!("{answer:?}")).to_owned()
}

/// The changes of a poll, each as its table and id.
fn changed(answer: &Answer) -> Vec<(String, i64)> {
    let changes = answer.body["changes"].as_array().unwrap_or_else(|| panic!("{answer:?}"));
    let text = |change: &Value| change["table"].as_str().unwrap().to_owned();
    changes.iter().map(|change| (text(change), change["record"]["id"].as_i64().unwrap())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rows_of_several_tables_are_of_one_moment_and_one_cursor_continues_all() {
    let stage = stage().await;
    let session = stage.database.connect().await;
    let writing = tokio::spawn(async move {
        for id in 1..=300 {
            let both = format!(
                "begin; insert into crm.deals values ({id}); insert into t values ({id}, '{ANN}', 'v'); commit"
            );
            session.batch_execute(&both).await.unwrap();
        }
    });
    let mut answer = ask(&stage, "tables=t,crm.deals").await;
    for _ in 0..20 {
        let tables = &answer.body["tables"];
        assert_eq!(ids(&tables["t"]), ids(&tables["crm.deals"]), "they are of two moments");
        if !ids(&tables["t"]).is_empty() {
            break;
        }
        answer = ask(&stage, "tables=t,crm.deals").await;
    }
    let mut has: Vec<HashSet<i64>> = ["t", "crm.deals"]
        .iter()
        .map(|name| ids(&answer.body["tables"][name]).into_iter().collect())
        .collect();
    writing.await.unwrap();
    stage.run(&format!("insert into t values (1000, '{BOB}', 'v')")).await;
    let mut since = cursor(&answer);
    while has.iter().any(|ids| ids.len() < 300) {
        let answer = ask(&stage, &format!("tables=t,crm.deals&since={since}")).await;
        for (table, id) in changed(&answer) {
            let table = usize::from(table == "deals");
            assert!(has[table].insert(id), "{id} comes twice");
        }
        since = cursor(&answer);
    }
    assert!(has.iter().all(|ids| !ids.contains(&1000)), "a row of Bob");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_over_several_tables_ends_once_in_polls_and_streams() {
    let stage = stage().await;
    let since = cursor(&ask(&stage, "tables=t,crm.deals").await);
    let mut events = Events::open(stage.relay.address, &path("tables=t,crm.deals"), Some(&since)).await;
    stage
        .run(&format!(
            "begin; insert into crm.deals values (1); insert into t values (2, '{ANN}', 'v'); insert into crm.deals values (3);
             insert into t values (4, '{BOB}', 'hidden'); commit"
        ))
        .await;
    let expected = [("deals", 1, false), ("t", 2, false), ("deals", 3, true)];
    for (table, id, is_last) in expected {
        let event = timeout(PATIENCE, events.next()).await.expect("it comes").unwrap().data;
        assert_eq!(
            (&event["table"], &event["record"]["id"], event["last"] == true),
            (&json!(table), &json!(id), is_last),
            "{event}"
        );
    }
    let answer = ask(&stage, &format!("tables=t,crm.deals&since={since}")).await;
    let expected: Vec<_> =
        expected.iter().map(|(table, id, _)| ((*table).to_owned(), i64::from(*id))).collect();
    assert_eq!(changed(&answer), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_of_several_tables_has_its_own_filter_columns_order_and_limit() {
    let stage = stage().await;
    stage
        .run(&format!(
            r#"insert into t select g, '{ANN}', 'v' || g from generate_series(1, 5) g;
               insert into crm.deals select g, 'd', 10 * g from generate_series(1, 5) g;
               insert into "Odd, ""name" values (7)"#
        ))
        .await;
    let narrowed = "tables=t,crm.deals,%22Odd,%20%22%22name%22&t.filter=id=gt.2&t.select=id&crm.deals.not.or=(price.lt.20,id.eq.4)";
    let answer = ask(&stage, &format!("{narrowed}&crm.deals.order=price.desc&crm.deals.limit=2")).await;
    assert_eq!(answer.body["tables"]["t"], json!([{"id": 3}, {"id": 4}, {"id": 5}]), "{answer:?}");
    assert_eq!(ids(&answer.body["tables"]["crm.deals"]), [5, 3]);
    assert_eq!(ids(&answer.body["tables"][r#""Odd, ""name""#]), [7]);
    assert_eq!(answer.body["more"], true, "a third deal is left");
    let since = cursor(&answer);
    stage
        .run(&format!(
            r#"insert into t values (0, '{ANN}', 'v'), (9, '{ANN}', 'v'); insert into crm.deals values (6, 'd', 5), (8, 'd', 90);
               insert into "Odd, ""name" values (10)"#
        ))
        .await;
    let mut told = Vec::new();
    let mut since = since;
    while told.len() < 3 {
        let answer = ask(&stage, &format!("{narrowed}&since={since}")).await;
        told.extend(changed(&answer));
        since = cursor(&answer);
    }
    let expected = [("t", 9), ("deals", 8), (r#"Odd, "name"#, 10)].map(|(table, id)| (table.to_owned(), id));
    assert_eq!(told, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_one_of_several_tables_is_told_with_its_name() {
    let stage = stage().await;
    let since = cursor(&ask(&stage, "tables=t").await);
    let many: Vec<String> = (0..=100).map(|number| format!("t{number}")).collect();
    let many = many.join(",");
    for (parameters, text) in [
        (
            "tables=",
            "tables: names of tables are expected, separated by commas, such as tables=todos,crm.deals",
        ),
        ("tables=t,,crm.deals", "tables: names of tables are expected"),
        ("tables=t,%22crm", "tables: names of tables are expected"),
        ("tables=t,a.b.c", "tables: names of tables are expected"),
        ("tables=t,crm.deals,t", "tables: t is there more than once"),
        ("tables=t,public.t", "tables: public.t is there more than once"),
        ("tables=t&table=t", "table: it is for one table, and tables= is given"),
        ("tables=t&filter=id=gt.1", "filter: it is for one table, and tables= is given: write t.filter="),
        ("tables=t&topic=room", "tables: it is for tables, and topic= is given"),
        ("tables=t&deals.filter=id=gt.1", "deals.filter: there is no such parameter"),
        ("tables=t&t.after=x", "t.after: there is no such parameter"),
        ("table=t&t.filter=id=gt.1", "t.filter: there is no such parameter"),
        ("tables=t,crm.deals&crm.deals.filter=nope=eq.1", "crm.deals has no column nope"),
        ("tables=t,crm.nothing", "crm.nothing"),
        (&format!("tables=t&since={since}&t.limit=1"), "limit: it is for rows"),
        (&format!("tables={many}"), "tables: 100 tables at most"),
    ] {
        let answer = ask(&stage, parameters).await;
        let told = answer.body["error"].as_str().unwrap_or_default();
        assert!(answer.status == 400 && told.contains(text), "{parameters}: {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rows_of_several_tables_have_one_bound_together() {
    let sql = "create table t (id int primary key); create table u (id int primary key); grant select on t, u to authenticated;
               insert into t select generate_series(1, 3); insert into u select generate_series(1, 3);
               select relay.watch('t'), relay.watch('u')";
    let stage = Stage::with(sql, |settings, _| settings.most_rows = Some(5)).await;
    let answer = ask(&stage, "tables=t,u").await;
    assert_eq!(answer.status, 413, "{answer:?}");
    let answer = ask(&stage, "tables=t,u&u.limit=2").await;
    assert_eq!((answer.status, &answer.body["more"]), (200, &json!(true)), "{answer:?}");
    let answer = ask(&stage, "tables=t,u&u.filter=id=gt.1").await;
    assert_eq!(ids(&answer.body["tables"]["u"]), [2, 3], "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_of_one_table_is_a_gap_of_all_in_its_request() {
    let stage = stage().await;
    let since = cursor(&ask(&stage, "tables=t,crm.deals").await);
    stage.run("truncate crm.deals").await;
    let answer = ask(&stage, &format!("tables=t,crm.deals&since={since}&wait=5")).await;
    assert_eq!(answer.status, 410, "{answer:?}");
    let other = ask(&stage, &format!("tables=t&since={since}&wait=1")).await;
    assert_eq!(other.status, 200, "{other:?}");
}
