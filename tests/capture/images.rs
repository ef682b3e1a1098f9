//! Row images that PostgreSQL cannot take back as a whole: they are judged by what the rule reads, and what cannot be read
//! is said to be missing.

use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::database::Database;
use crate::support::stage::Stage;
use crate::support::{ANN, token};

/// Columns whose values json_populate_record does not take back, and such a value.
const COLUMNS: [(&str, &str); 7] = [
    ("odd hstore", "'a=>1'"),
    ("odd json", r#"'"\u0000"'"#),
    ("odd jsonb[]", "array['[1]', '2']::jsonb[]"),
    ("odd regclass", "'hidden.secret'"),
    ("odd regproc", "'hidden.nothing'"),
    ("odd pair", r#"row(1, '"\u0000"')"#),
    ("odd pair[]", r#"array[row(1, '"\u0000"')::pair]"#),
];

/// Policies that PostgreSQL decides, each its own way.
const POLICIES: [&str; 4] = [
    "price > 10.5",
    "exists (select from members m where m.id = t.id and m.member = auth.uid())",
    "is_dear(price)",
    "is_dear(price) and exists (select from members m where m.id = t.id and m.member = auth.uid())",
];

fn made(column: &str, policy: &str) -> String {
    let extension = if column.contains("hstore") { "create extension hstore;" } else { "" };
    format!(
        "{extension} create schema hidden; create table hidden.secret (id int);
         create function hidden.nothing() returns int language sql as 'select 1';
         create type pair as (n int, j json);
         create table members (id int, member uuid); insert into members values (1, '{ANN}'), (2, '{ANN}');
         grant select on members to authenticated;
         create function is_dear(price numeric) returns bool language plpgsql stable as 'begin return price > 10.5; end';
         create table t (id int primary key, price numeric, {column}); alter table t replica identity full;
         alter table t enable row level security; create policy p on t using ({policy});
         grant select on t to authenticated, service_role; select relay.watch('t');"
    )
}

/// The columns whose types this server has.
async fn columns() -> impl Iterator<Item = (&'static str, &'static str)> {
    let known = "select count(*) from pg_available_extensions where name = 'hstore'";
    let has_hstore = Database::new().await.value(known).await == "1";
    COLUMNS.into_iter().filter(move |(column, _)| has_hstore || !column.contains("hstore"))
}

fn ann() -> String {
    token("authenticated", Some(ANN), json!({}))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_is_judged_by_the_columns_that_it_reads_whatever_the_others_hold() {
    for (column, value) in columns().await {
        for policy in POLICIES {
            let stage = Stage::new(&made(column, policy)).await;
            let mut client = stage.join(&ann()).await;
            stage
                .run(&format!("insert into t values (1, 11, {value}), (2, 5, {value}), (3, 5, {value})"))
                .await;
            stage.run("update t set price = 12 where id = 1; delete from t").await;
            let told = stage.told(&mut client).await;
            let seen = |told: &Vec<String>| told.iter().filter(|line| line.contains(r#""id":1,"#)).count();
            assert_eq!(seen(&told), 3, "{column}, {policy}: {told:?}");
            assert!(!told.iter().any(|line| line.contains(r#""id":3,"#)), "{column}, {policy}: {told:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filter_is_judged_by_its_own_columns_for_who_sees_every_row_too() {
    for (column, value) in columns().await {
        let stage = Stage::new(&made(column, "true")).await;
        for token in [ann(), token("service_role", None, json!({}))] {
            let by = json!([{"event": "*", "table": "t", "filter": "price=gt.10.5"}]);
            let mut client = stage.subscribe(&token, by).await;
            stage
                .run(&format!("insert into t values (1, 11, {value}), (2, 5, {value}); delete from t"))
                .await;
            assert_eq!(stage.told(&mut client).await.len(), 2, "{column}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_rule_reads_and_postgresql_cannot_read_back_is_a_gap_and_not_a_no() {
    for (column, value, policy, filter) in [
        ("odd json", r#"'"\u0000"'"#, "odd::text <> 'x'", Value::Null),
        ("odd pair", r#"row(1, '"\u0000"')"#, "(odd).n > 0", Value::Null),
        ("odd jsonb[]", "array['[1]', '2']::jsonb[]", "cardinality(odd) > 0", Value::Null),
        ("odd jsonb[]", "array['[1]', '2']::jsonb[]", "is_dear(cardinality(odd))", Value::Null),
        ("odd jsonb[]", "array['[1]', '2']::jsonb[]", "t is not null", Value::Null),
        ("odd regclass", "'hidden.secret'", "odd::oid > 5::oid", Value::Null),
        ("odd jsonb[]", "array['[1]', '2']::jsonb[]", "true", json!("odd=neq.{2}")),
        ("odd regclass", "'hidden.secret'", "true", json!("odd=eq.pg_class")),
    ] {
        let stage = Stage::new(&made(column, policy)).await;
        let mut client =
            stage.subscribe(&ann(), json!([{"event": "*", "table": "t", "filter": filter}])).await;
        stage.run(&format!("insert into t values (1, 11, {value})")).await;
        let gap = next_gap(&stage, &mut client).await;
        assert!(gap.as_deref().is_some_and(|gap| gap.contains("cannot be read back")), "{policy}: {gap:?}");
        // A rule that raises is a "no" still.
        stage.run("drop policy p on t; create policy p on t using (1 / (id - 2) > 0 and price > 0.5)").await;
        stage.run("insert into t values (2, 11, null)").await;
        let gap = next_gap(&stage, &mut client).await;
        assert!(gap.is_none_or(|gap| !gap.contains("cannot be read back")), "{policy}");
    }
}

/// The gap that is told before the next row of the marker.
async fn next_gap(stage: &Stage, client: &mut Client) -> Option<String> {
    stage.run("insert into marker default values").await;
    let mut gap = None;
    loop {
        let frame = client.frame().await;
        match frame[3].as_str() {
            Some("system") if frame[4]["status"] == "error" => {
                gap = frame[4]["message"].as_str().map(str::to_owned);
            }
            Some("postgres_changes") if frame[4]["data"]["table"] == "marker" => return gap,
            _ => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_over_a_mebibyte_fails_for_no_json_that_postgresql_cannot_take_apart() {
    let database = Database::new().await;
    database
        .run(
            r#"create domain note as json; create type pair as (n int, j json); grant usage on schema public to public;
               create table t (id int primary key, j json, js json[], n note, p pair, v text, body text); select relay.watch('t')"#,
        )
        .await;
    let body = "(select string_agg(md5(g::text), '') from generate_series(1, 40000) g)";
    let odd = r#"'"\u0000"'"#;
    for (at, values) in [
        format!("{odd}, null, null, null"),
        format!("null, array[{odd}]::json[], null, null"),
        format!("null, null, {odd}, null"),
        format!("null, null, null, row(1, {odd})"),
    ]
    .iter()
    .enumerate()
    {
        database
            .run(&format!(
                "insert into t values ({at}, {values}, 'short', {body}); update t set v = 'still' where id = {at}; delete from t where id = {at}"
            ))
            .await;
    }
    let images = "select string_agg(distinct concat(operation, before ->> 'v', after ->> 'v'), ' ') from relay.changes where relation > 0 and oversize";
    assert_eq!(database.value(images).await, "Dstill Ishort Ushortstill");
}
