//! A partition is subscribed to by its own name: its rows, under its name, by its own rights.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::support::away::{Away, Told, told_until};
use crate::support::client::Client;
use crate::support::http::{Events, get};
use crate::support::stage::Stage;
use crate::support::{eventually, token};

const NAME: &str = "5e551011-0000-4000-8000-000000001eaf";
const ALICE: &str = "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa";
/// The name of the row that ends each story.
const END: &str = "end";
/// Two levels: the rows of `eu` are in `eu_old` and `eu_new`.
const EVENTS: &str = "
    create table events (region text, id int, name text, primary key (region, id)) partition by list (region);
    create table eu partition of events for values in ('eu') partition by range (id);
    create table eu_old partition of eu for values from (0) to (100);
    create table eu_new partition of eu for values from (100) to (1000);
    create table us partition of events for values in ('us');
    grant select on events, eu, eu_old, eu_new, us to authenticated;
    select relay.watch('events')";

fn alice() -> String {
    token("authenticated", Some(ALICE), json!({}))
}

fn path(table: &str, more: &str) -> String {
    format!("/realtime/v1/changes?table={table}&apikey={}{more}", alice())
}

fn of(table: &str) -> Value {
    json!([{"event": "*", "schema": "public", "table": table}])
}

/// A change in short: `INSERT eu_new {record} {old_record}`.
fn line(change: &Value) -> String {
    let parts = [&change["record"], &change["old_record"]].into_iter().filter(|part| part.is_object());
    let parts: Vec<String> = parts.map(ToString::to_string).collect();
    format!("{} {} {}", change["type"].as_str().unwrap(), change["table"].as_str().unwrap(), parts.join(" "))
}

fn is_end(change: &Value) -> bool {
    change["record"]["name"] == END
}

/// A reader of one table who is away.
async fn gone(stage: &Stage, table: &'static str) -> Away {
    Away::from(stage, &alice(), table).await
}

/// What each way delivers to it up to the last row, in short.
async fn back(away: &Away, stage: &Stage) -> BTreeMap<&'static str, Vec<String>> {
    away.back(stage, is_end).await.into_iter().map(|(way, told)| (way, brief(told))).collect()
}

/// Changes in short. A gap is the line `gap`.
fn brief(told: Vec<Told>) -> Vec<String> {
    told.iter().map(|told| told.as_ref().map_or_else(|_| String::from("gap"), line)).collect()
}

/// What a poll delivers to it, in short.
async fn polled(away: &Away, stage: &Stage) -> Vec<String> {
    brief(away.poll(stage, is_end).await)
}

async fn until_end(client: &mut Client) -> Vec<String> {
    brief(told_until(client, is_end).await)
}

/// The next `system` message of a channel: its status and text.
async fn system(client: &mut Client) -> (String, String) {
    loop {
        let frame = client.frame().await;
        if frame[3] == "system" {
            let text = |field: &str| frame[4][field].as_str().unwrap().to_owned();
            return (text("status"), text("message"));
        }
    }
}

/// What the live socket of each table gets of `sql`.
async fn live(stage: &Stage, tables: &[&'static str], sql: &str) -> BTreeMap<&'static str, Vec<String>> {
    let mut clients = Vec::new();
    for table in tables {
        clients.push((*table, stage.subscribe(&alice(), of(table)).await));
    }
    stage.run(sql).await;
    let mut told = BTreeMap::new();
    for (table, client) in &mut clients {
        told.insert(*table, stage.changes(client).await.iter().map(line).collect());
    }
    told
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_of_any_level_delivers_its_own_rows_under_its_own_name() {
    let stage = Stage::new(EVENTS).await;
    let tables = ["events", "eu", "eu_old", "eu_new", "us"];
    let mut aways = Vec::new();
    for table in tables {
        aways.push(gone(&stage, table).await);
    }
    let rows = "insert into events values ('eu', 1, 'a'), ('us', 2, 'b'), ('eu', 100, 'c'); insert into eu values ('eu', 3, 'd');
                update events set name = 'e' where id = 100; delete from us where id = 2";
    let expected = |table: &str| -> Vec<String> {
        let key = |region: &str, id: i32| format!(r#"{{"region":"{region}","id":{id}}}"#);
        let row = |region: &str, id: i32, name: &str| {
            format!(r#"{{"region":"{region}","id":{id},"name":"{name}"}}"#)
        };
        let all = [
            ("eu_old", format!("INSERT {table} {}", row("eu", 1, "a"))),
            ("us", format!("INSERT {table} {}", row("us", 2, "b"))),
            ("eu_new", format!("INSERT {table} {}", row("eu", 100, "c"))),
            ("eu_old", format!("INSERT {table} {}", row("eu", 3, "d"))),
            ("eu_new", format!("UPDATE {table} {} {}", row("eu", 100, "e"), key("eu", 100))),
            ("us", format!("DELETE {table} {}", key("us", 2))),
        ];
        let is_in = |leaf: &str| match table {
            "events" => true,
            "eu" => leaf.starts_with("eu_"),
            table => leaf == table,
        };
        all.into_iter().filter(|(leaf, _)| is_in(leaf)).map(|(_, line)| line).collect()
    };
    for (table, lines) in live(&stage, &tables, rows).await {
        assert_eq!(lines, expected(table), "{table}");
    }
    stage
        .run(&format!(
            "insert into events values ('eu', 9, '{END}'), ('eu', 109, '{END}'), ('us', 9, '{END}')"
        ))
        .await;
    for away in aways {
        for (way, lines) in back(&away, &stage).await {
            assert_eq!(lines, expected(away.table), "{} by {way}", away.table);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_channel_of_the_whole_and_of_partitions_gets_a_row_once_for_each() {
    let stage = Stage::new(EVENTS).await;
    let bindings = json!([
        {"event": "*", "schema": "public", "table": "events"},
        {"event": "INSERT", "schema": "public", "table": "eu"},
        {"event": "*", "schema": "public", "table": "eu_old", "filter": "id=lt.5"},
        // The key comes in any case.
        {"event": "*", "schema": "public", "table": "us", "select": ["id"]},
    ]);
    let mut client = stage.subscribe(&alice(), bindings).await;
    stage.run("insert into events values ('eu', 1, 'a'), ('eu', 7, 'b'), ('us', 2, 'c'); delete from events where id = 1").await;
    let mut lines: Vec<String> = stage.changes(&mut client).await.iter().map(line).collect();
    lines.sort();
    assert_eq!(
        lines,
        [
            r#"DELETE eu_old {"region":"eu","id":1}"#,
            r#"DELETE events {"region":"eu","id":1}"#,
            r#"INSERT eu {"region":"eu","id":1,"name":"a"}"#,
            r#"INSERT eu {"region":"eu","id":7,"name":"b"}"#,
            r#"INSERT eu_old {"region":"eu","id":1,"name":"a"}"#,
            r#"INSERT events {"region":"eu","id":1,"name":"a"}"#,
            r#"INSERT events {"region":"eu","id":7,"name":"b"}"#,
            r#"INSERT events {"region":"us","id":2,"name":"c"}"#,
            r#"INSERT us {"region":"us","id":2}"#,
        ]
    );
    // A wildcard is of watched relations: the row of a partition comes once, under the name of the whole.
    let mut all = stage.join(&alice()).await;
    stage.run("insert into events values ('eu', 4, 'd')").await;
    let changes = stage.changes(&mut all).await;
    assert_eq!(
        changes.iter().map(line).collect::<Vec<_>>(),
        [r#"INSERT events {"region":"eu","id":4,"name":"d"}"#]
    );
}

/// Partitions with rules other than those of the whole.
const RULES: &str = "
    create table notes (part text, id int, owner uuid, open bool, primary key (part, id)) partition by list (part);
    create table own partition of notes for values in ('own'); create table opened partition of notes for values in ('opened');
    create table bare partition of notes for values in ('bare'); create table shut partition of notes for values in ('shut');
    create table secret partition of notes for values in ('secret'); create table few partition of notes for values in ('few');
    create table asked partition of notes for values in ('asked'); create table member (id uuid primary key);
    alter table notes enable row level security; create policy own on notes for select using (owner = auth.uid());
    alter table own enable row level security; create policy mine on own for select using (owner = auth.uid());
    alter table opened enable row level security; create policy opened on opened for select using (open);
    alter table shut enable row level security;
    alter table asked enable row level security;
    create policy asked on asked for select using (exists (select from member where member.id = auth.uid()) and id > 1);
    grant select on notes, own, opened, bare, shut, asked, member to authenticated; grant select (part, id) on few to authenticated;
    select relay.watch('notes')";

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_is_judged_by_its_own_policies_and_grants_as_a_query_on_it_is() {
    let stage = Stage::new(RULES).await;
    stage.run(&format!("insert into member values ('{ALICE}')")).await;
    let claims = json!({"sub": ALICE, "role": "authenticated"});
    let tables = ["notes", "own", "opened", "bare", "shut", "few", "asked"];
    let refused = stage.answer(&alice(), of("secret")[0].clone()).await;
    assert!(refused.contains("table: secret") && refused.contains("must be allowed to select"), "{refused}");
    let answer = get(stage.relay.address, &path("secret", ""), "").await;
    assert!(answer.status == 403 || answer.status == 404 || answer.status == 400, "{answer:?}");
    let rows: Vec<String> = ["own", "opened", "bare", "shut", "secret", "few", "asked"]
        .iter()
        .map(|part| {
            format!(
                "('{part}', 1, '{ALICE}', false), ('{part}', 2, gen_random_uuid(), true), ('{part}', 3, '{ALICE}', true), \
                 ('{part}', 4, gen_random_uuid(), false)"
            )
        })
        .collect();
    let told = live(&stage, &tables, &format!("insert into notes values {}", rows.join(", "))).await;
    for table in tables {
        let select = format!("select format('%s %s', part, id) from {table} order by 1");
        let mut shown = stage.selected("authenticated", &claims, &select).await;
        let id = |line: &String| {
            let record: Value = serde_json::from_str(line.splitn(3, ' ').last().unwrap()).unwrap();
            format!("{} {}", record["part"].as_str().unwrap(), record["id"])
        };
        let mut ours: Vec<String> = told[table].iter().map(id).collect();
        shown.sort();
        ours.sort();
        assert_eq!(ours, shown, "{table}");
        let answer = get(stage.relay.address, &path(table, ""), "").await;
        let mut read: Vec<String> = answer.body["rows"]
            .as_array()
            .unwrap_or_else(|| panic!("{answer:?}"))
            .iter()
            .map(|row| format!("{} {}", row["part"].as_str().unwrap(), row["id"]))
            .collect();
        read.sort();
        assert_eq!(read, shown, "{table}");
    }
    // Deletes, too.
    let told = live(&stage, &tables, "delete from notes").await;
    let count = |table: &str| told[table].len();
    assert_eq!(
        (count("own"), count("opened"), count("bare"), count("shut"), count("asked")),
        (2, 2, 4, 0, 3)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_of_a_partition_applies_from_its_own_statement_on() {
    let stage = Stage::new(RULES).await;
    let bindings = json!([{"event": "*", "table": "opened"}, {"event": "*", "table": "notes"}]);
    let mut client = stage.subscribe(&alice(), bindings).await;
    let away = gone(&stage, "opened").await;
    let whole = gone(&stage, "notes").await;
    for (rule, shown) in [
        ("", "24"),
        ("drop policy opened on opened", ""),
        ("create policy closed on opened for select using (not open)", "13"),
        ("alter table opened disable row level security", "1234"),
        ("revoke select on opened from authenticated", ""),
        ("grant select on opened to authenticated", "1234"),
    ] {
        stage.run(rule).await;
        stage
            .run("insert into notes select 'opened', i, null, i % 2 = 0 from generate_series(1, 4) i; delete from notes")
            .await;
        let mut changes = stage.changes(&mut client).await;
        changes.retain(|change| change["type"] == "INSERT");
        let ids: String = changes.iter().map(|change| change["record"]["id"].to_string()).collect();
        assert_eq!(ids, shown, "{rule}");
    }
    // Who comes back gets a gap for the partition alone: by the rules of now, more would be shown than by those of then.
    assert_eq!(polled(&away, &stage).await, ["gap"]);
    stage
        .run(&format!(
            "alter table notes add name text; insert into notes values ('own', 9, '{ALICE}', true, '{END}')"
        ))
        .await;
    assert_eq!(polled(&whole, &stage).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_moves_between_partitions_is_a_delete_of_one_and_an_insert_of_the_other() {
    let stage = Stage::new(EVENTS).await;
    stage.run("insert into events values ('eu', 1, 'a')").await;
    let tables = ["events", "eu", "eu_old", "eu_new", "us"];
    let mut aways = Vec::new();
    for table in tables {
        aways.push(gone(&stage, table).await);
    }
    let moves = "update events set id = 100 where id = 1; update events set region = 'us' where id = 100";
    let expected = |table: &str| -> Vec<&str> {
        match table {
            "events" => vec!["DELETE", "INSERT", "DELETE", "INSERT"],
            "eu" => vec!["DELETE", "INSERT", "DELETE"],
            "eu_old" => vec!["DELETE"],
            "eu_new" => vec!["INSERT", "DELETE"],
            _ => vec!["INSERT"],
        }
    };
    let kinds = |lines: &[String], table: &str| -> Vec<String> {
        assert!(lines.iter().all(|line| line.split(' ').nth(1) == Some(table)), "{lines:?}");
        lines.iter().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
    };
    for (table, lines) in live(&stage, &tables, moves).await {
        assert_eq!(kinds(&lines, table), expected(table), "{table}");
    }
    stage
        .run(&format!(
            "insert into events values ('eu', 9, '{END}'), ('eu', 109, '{END}'), ('us', 9, '{END}')"
        ))
        .await;
    for away in aways {
        for (way, lines) in back(&away, &stage).await {
            assert_eq!(kinds(&lines, away.table), expected(away.table), "{} by {way}", away.table);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_with_other_columns_numbers_and_identity_is_read_by_its_own() {
    let stage = Stage::new(
        "create table w (id int, gone int, region text, name text, at timestamptz) partition by list (region);
         alter table w drop gone; alter table w add n int;
         create table p (junk1 text, n int, at timestamptz, junk2 int, name text, region text, id int primary key);
         alter table p drop junk1; alter table p drop junk2; alter table p replica identity full;
         alter table p enable row level security; create policy few on p using (n < 10 and name <> 'hidden');
         alter table w attach partition p for values in ('p');
         create table q partition of w for values in ('q');
         grant select on w to authenticated; grant select (id, name, region, n) on p to authenticated; grant select on q to authenticated;
         select relay.watch('w')",
    )
    .await;
    let filtered = json!([{"event": "*", "table": "p", "filter": "n=gt.1"}]);
    let mut filter = stage.subscribe(&alice(), filtered).await;
    let aways = [gone(&stage, "p").await, gone(&stage, "w").await];
    let rows = "set timezone = 'Asia/Tokyo'; insert into w (id, region, name, n) values (1, 'p', 'a', 1), (2, 'p', 'hidden', 2), (3, 'p', 'c', 3), (4, 'p', 'd', 40);
                update w set name = 'b' where id = 3; delete from w where id = 3; insert into w (id, region, name, n, at) values (5, 'q', 'e', 5, '2026-01-01 00:00+00')";
    let of_p = [
        r#"INSERT p {"n":1,"name":"a","region":"p","id":1}"#,
        r#"INSERT p {"n":3,"name":"c","region":"p","id":3}"#,
        r#"UPDATE p {"n":3,"name":"b","region":"p","id":3} {"n":3,"name":"c","region":"p","id":3}"#,
        r#"DELETE p {"n":3,"name":"b","region":"p","id":3}"#,
    ];
    let told = live(&stage, &["p", "q", "w"], rows).await;
    assert_eq!(told["p"], of_p);
    assert_eq!(
        told["q"],
        [r#"INSERT q {"id":5,"region":"q","name":"e","at":"2026-01-01T00:00:00+00:00","n":5}"#]
    );
    assert_eq!(told["w"].len(), 7, "{told:?}");
    assert_eq!(stage.changes(&mut filter).await.iter().map(line).collect::<Vec<_>>(), of_p[1..]);
    // Columns that are renamed, dropped and added meanwhile.
    stage.run("alter table w rename name to title; alter table w rename n to name; alter table w rename title to n; alter table w add more int").await;
    stage.run("alter table w rename n to number; alter table w rename name to n; alter table w rename number to name").await;
    stage.run(&format!("insert into w (id, region, name, n) values (9, 'p', '{END}', 9)")).await;
    for (way, lines) in back(&aways[0], &stage).await {
        assert_eq!(lines, of_p, "by {way}");
    }
    for (way, lines) in back(&aways[1], &stage).await {
        assert_eq!(lines.len(), 7, "by {way}: {lines:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_is_detached_renamed_or_dropped_is_a_gap_and_then_heals_or_answers_as_any_other() {
    for (statement, heals) in [
        (
            "alter table events detach partition us",
            Some("alter table events attach partition us for values in ('us')"),
        ),
        ("alter table us rename to us_before", Some("alter table us_before rename to us")),
        (
            "drop table us",
            Some(
                "create table us partition of events for values in ('us'); grant select on us to authenticated",
            ),
        ),
        ("alter table events detach partition us; select relay.watch('us')", None),
        (
            "create schema archive; alter table us set schema archive",
            Some("alter table archive.us set schema public"),
        ),
    ] {
        let stage = Stage::new(EVENTS).await;
        let away = gone(&stage, "us").await;
        let mut client = stage.subscribe(&alice(), of("us")).await;
        let mut other = stage.subscribe(&alice(), of("eu_old")).await;
        stage.run("insert into events values ('us', 1, 'a')").await;
        client.changes_until(|change| change["table"] == "us").await;
        stage.run(statement).await;
        let (status, message) = system(&mut client).await;
        assert!(status == "error" && message.starts_with("Gap: "), "{statement}: {message}");
        if let Some(heal) = heals {
            let (status, message) = system(&mut client).await;
            assert!(status == "error" && message.contains("must be watched"), "{statement}: {message}");
            let refused = stage.answer(&alice(), of("us")[0].clone()).await;
            let unwatched = stage.answer(&alice(), of("unknown")[0].clone()).await;
            assert_eq!(refused, unwatched.replace("unknown", "us"), "{statement}");
            stage.run(heal).await;
        }
        loop {
            match system(&mut client).await {
                (status, message) if status == "ok" && message.starts_with("Subscribed") => break,
                (_, message) => assert!(
                    message.contains("Gap: ") || message.contains("must be watched"),
                    "{statement}: {message}"
                ),
            }
        }
        stage.run(&format!("insert into us values ('us', 2, '{END}')")).await;
        let lines = until_end(&mut client).await;
        assert!(lines.iter().all(|line| line == "gap"), "{statement}: {lines:?}");
        // The reader that was away gets a gap as well.
        assert_eq!(polled(&away, &stage).await.last().map(String::as_str), Some("gap"), "{statement}");
        stage.run("insert into events values ('eu', 1, 'e')").await;
        assert_eq!(other.changes_until(|change| change["table"] == "eu_old").await.len(), 1, "{statement}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_is_created_or_attached_under_a_waiting_channel_is_subscribed() {
    for create in [
        "create table asia partition of events for values in ('asia'); grant select on asia to authenticated",
        "create table asia (like events including all); grant select on asia to authenticated;
         alter table events attach partition asia for values in ('asia')",
        "create table asia (like events including all); grant select on asia to authenticated; insert into asia values ('asia', 1, 'old');
         alter table events attach partition asia for values in ('asia')",
        "create table other partition of events for values in ('asia'); grant select on other to authenticated; alter table other rename to asia",
    ] {
        let stage = Stage::new(EVENTS).await;
        let mut client = Client::connect(&stage.relay, &alice()).await;
        let answer = client.try_subscribe("realtime:asia", of("asia")).await;
        assert!(answer["message"].as_str().unwrap().contains("must be watched"), "{answer}");
        stage.run(create).await;
        loop {
            let (status, message) = system(&mut client).await;
            if status == "ok" {
                assert!(message.starts_with("Subscribed"), "{message}");
                break;
            }
        }
        stage.run(&format!("insert into events values ('asia', 2, 'b'); insert into asia values ('asia', 3, '{END}')")).await;
        let mut lines = until_end(&mut client).await;
        lines.retain(|line| line != "gap");
        assert_eq!(lines, [r#"INSERT asia {"region":"asia","id":2,"name":"b"}"#], "{create}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_moves_to_another_parent_leaves_the_one_and_joins_the_other() {
    let stage = Stage::new(
        "create table w (id int primary key, name text) partition by range (id);
         create table one partition of w for values from (0) to (100) partition by range (id);
         create table two partition of w for values from (100) to (200) partition by range (id);
         create table leaf partition of one for values from (0) to (50);
         grant select on w, one, two, leaf to authenticated; select relay.watch('w')",
    )
    .await;
    let mut one = stage.subscribe(&alice(), of("one")).await;
    let mut two = stage.subscribe(&alice(), of("two")).await;
    let mut leaf = stage.subscribe(&alice(), of("leaf")).await;
    stage.run("insert into leaf values (1, 'a')").await;
    stage.run("delete from leaf; begin; alter table one detach partition leaf; alter table two attach partition leaf for values from (100) to (150); commit").await;
    stage.run("insert into w values (101, 'b')").await;
    let names = |changes: Vec<Value>| -> Vec<String> {
        let inserted = changes.into_iter().filter(|change| change["type"] == "INSERT");
        inserted.map(|change| change["record"]["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(stage.changes(&mut one).await), ["a"]);
    assert_eq!(names(stage.changes(&mut two).await), ["b"]);
    assert_eq!(names(stage.changes(&mut leaf).await), ["a", "b"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncate_is_a_gap_of_the_partitions_that_it_empties_and_of_those_above() {
    for (truncate, emptied) in [
        ("truncate us", &["us", "events"][..]),
        ("truncate eu", &["eu", "eu_old", "eu_new", "events"]),
        ("truncate eu_old", &["eu", "eu_old", "events"]),
        ("truncate events", &["us", "eu", "eu_old", "eu_new", "events"]),
    ] {
        let stage = Stage::new(EVENTS).await;
        let tables = ["events", "eu", "eu_old", "eu_new", "us"];
        let mut clients = Vec::new();
        for table in tables {
            let mut client = Client::connect(&stage.relay, &alice()).await;
            client.subscribe("realtime:t", of(table)).await;
            clients.push((table, client));
        }
        stage.run(truncate).await;
        stage
            .run(&format!(
                "insert into events values ('eu', 9, '{END}'), ('eu', 109, '{END}'), ('us', 9, '{END}')"
            ))
            .await;
        for (table, client) in &mut clients {
            let expected = if emptied.contains(table) { vec!["gap"] } else { Vec::new() };
            assert_eq!(until_end(client).await, expected, "{truncate}: {table}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncate_of_the_whole_is_told_once_for_each_table_of_a_channel() {
    let stage = Stage::new(EVENTS).await;
    let tables = ["events", "eu", "eu_old", "us"];
    let mut client = Client::connect(&stage.relay, &alice()).await;
    client.subscribe("realtime:t", tables.iter().map(|table| of(table)[0].clone()).collect()).await;
    stage.run("truncate events").await;
    stage.run(&format!("insert into events values ('us', 9, '{END}')")).await;
    assert_eq!(until_end(&mut client).await, ["gap"; 4]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exchange_of_names_is_a_gap_for_a_reader_that_was_away() {
    let stage = Stage::new(EVENTS).await;
    let away = gone(&stage, "us").await;
    let other = gone(&stage, "eu_old").await;
    stage
        .run(&format!(
            "begin; alter table us rename to x; alter table eu_new rename to us; alter table x rename to eu_new; commit;
             insert into events values ('us', 1, 'a'), ('eu', 101, 'b'), ('eu', 109, '{END}'), ('eu', 9, '{END}')"
        ))
        .await;
    assert_eq!(polled(&away, &stage).await, ["gap"]);
    let stream = Events::try_open(stage.relay.address, &path("us", ""), Some(&away.cursor)).await;
    assert_eq!(stream.err(), Some(Some(410)));
    let mut session = away.connect(&stage).await;
    session.try_join("realtime:us", of("us")).await.unwrap();
    while !system(&mut session).await.1.starts_with("Gap: ") {}
    for (way, lines) in back(&other, &stage).await {
        assert_eq!(lines, Vec::<String>::new(), "by {way}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_is_watched_itself_is_delivered_as_itself_and_under_the_whole() {
    let stage = Stage::new(EVENTS).await;
    let mut client = stage
        .subscribe(&alice(), json!([{"event": "*", "table": "us"}, {"event": "*", "table": "events"}]))
        .await;
    stage.run("select relay.watch('us')").await;
    loop {
        if system(&mut client).await.1.starts_with("Subscribed") {
            break;
        }
    }
    stage.run("insert into events values ('us', 1, 'a')").await;
    let mut lines: Vec<String> = stage.changes(&mut client).await.iter().map(line).collect();
    lines.sort();
    assert_eq!(
        lines,
        [
            r#"INSERT events {"region":"us","id":1,"name":"a"}"#,
            r#"INSERT us {"region":"us","id":1,"name":"a"}"#
        ]
    );
}

/// Two halves of a whole, each with partitions of its own; `leaf` is in the first.
const HALVES: &str = "
    create table w (id int primary key, name text) partition by range (id);
    create table one partition of w for values from (0) to (100) partition by range (id);
    create table two partition of w for values from (100) to (200) partition by range (id);
    create table leaf partition of one for values from (0) to (50);
    create table rest partition of one for values from (50) to (100);
    create table more partition of two for values from (150) to (200);
    grant select on w, one, two, leaf, rest, more to authenticated; select relay.watch('w')";

/// Vacuums the table until its file is empty: another session's snapshot keeps the rows that it may see.
async fn empty(stage: &Stage, table: &str) {
    eventually("the file is empty", || async {
        stage.run(&format!("vacuum {table}")).await;
        let size = stage.database.value(&format!("select pg_relation_size('{table}')")).await;
        (size == "0").then_some(())
    })
    .await;
}

/// What a line says in short: `INSERT 1`.
fn short(lines: &[String]) -> Vec<String> {
    let id = |line: &str| {
        line.split("\"id\":").nth(1).map(|rest| rest.split([',', '}']).next().unwrap().to_owned())
    };
    let kind = |line: &str| line.split(' ').next().unwrap().to_owned();
    lines.iter().map(|line| id(line).map_or(line.clone(), |id| format!("{} {id}", kind(line)))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_change_of_a_partition_that_moved_is_of_the_parents_that_it_had() {
    const DETACH: &str = "alter table one detach partition leaf";
    const ATTACH: &str = "alter table two attach partition leaf for values from (100) to (150)";
    for moves in [
        &[
            "begin; alter table one detach partition leaf; alter table two attach partition leaf for values from (100) to (150); commit",
        ][..],
        &[DETACH, ATTACH],
        // Under another name, and there and back again.
        &[
            DETACH,
            "alter table leaf rename to other",
            "alter table two attach partition other for values from (100) to (150)",
            "alter table other rename to leaf",
        ],
        &[
            DETACH,
            ATTACH,
            "alter table two detach partition leaf",
            "alter table one attach partition leaf for values from (0) to (50)",
            "alter table one detach partition leaf",
            ATTACH,
        ],
    ] {
        let stage = Stage::new(HALVES).await;
        let (one, two, whole) =
            (gone(&stage, "one").await, gone(&stage, "two").await, gone(&stage, "w").await);
        let mut live = Vec::new();
        for table in ["one", "two", "w"] {
            let mut client = Client::connect(&stage.relay, &alice()).await;
            client.subscribe(&format!("realtime:{table}"), of(table)).await;
            live.push(client);
        }
        // Whose file is empty when it moves: then there is no gap that covers what was lost.
        stage.run("insert into leaf values (1, 'a'); delete from leaf").await;
        empty(&stage, "leaf").await;
        for statement in moves {
            stage.run(statement).await;
        }
        stage.run(&format!("insert into w values (101, 'b'), (60, '{END}'), (160, '{END}')")).await;
        let expected = [
            ("one", vec!["INSERT 1", "DELETE 1"]),
            ("two", vec!["INSERT 101"]),
            ("w", vec!["INSERT 1", "DELETE 1", "INSERT 101"]),
        ];
        for (client, (table, lines)) in live.iter_mut().zip(&expected) {
            assert_eq!(short(&until_end(client).await), *lines, "{table}, live: {moves:?}");
        }
        for (away, (table, lines)) in [one, two, whole].iter().zip(&expected) {
            for (way, told) in back(away, &stage).await {
                assert_eq!(short(&told), *lines, "{table} by {way}: {moves:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_branch_that_moves_takes_none_of_its_older_changes_along() {
    let stage = Stage::new(
        "create table w (id int primary key, name text) partition by range (id);
         create table one partition of w for values from (0) to (100) partition by range (id);
         create table two partition of w for values from (100) to (300) partition by range (id);
         create table branch partition of one for values from (0) to (50) partition by range (id);
         create table leaf partition of branch for values from (0) to (50);
         create table rest partition of one for values from (50) to (100);
         create table more partition of two for values from (200) to (300);
         grant select on w, one, two, branch, leaf, rest, more to authenticated; select relay.watch('w')",
    )
    .await;
    let (one, two) = (gone(&stage, "one").await, gone(&stage, "two").await);
    let branch = gone(&stage, "branch").await;
    stage.run("insert into leaf values (1, 'a'); delete from leaf").await;
    empty(&stage, "leaf").await;
    stage
        .run(
            "begin; alter table branch detach partition leaf; alter table one detach partition branch;
             alter table two attach partition branch for values from (100) to (200);
             alter table branch attach partition leaf for values from (100) to (150); commit",
        )
        .await;
    stage
        .run(&format!(
            "insert into w values (101, 'b'), (60, '{END}'), (260, '{END}'); insert into w values (102, '{END}')"
        ))
        .await;
    for (way, lines) in back(&one, &stage).await {
        assert_eq!(short(&lines), ["INSERT 1", "DELETE 1"], "one by {way}");
    }
    for (way, lines) in back(&two, &stage).await {
        assert_eq!(short(&lines), ["INSERT 101"], "two by {way}");
    }
    assert_eq!(polled(&branch, &stage).await, ["gap"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncate_is_told_once_for_each_table_however_many_bindings_name_it() {
    let stage = Stage::new(EVENTS).await;
    let mut client = Client::connect(&stage.relay, &alice()).await;
    let bindings = json!([
        {"event": "*", "schema": "public", "table": "events"},
        {"event": "INSERT", "schema": "public", "table": "events", "filter": "id=gt.1"},
        {"event": "*", "schema": "public", "table": "us"},
        {"event": "*", "schema": "public", "table": "us", "filter": "id=gt.1"},
        {"event": "DELETE", "schema": "public", "table": "us"},
        {"event": "*", "schema": "public"},
    ]);
    client.subscribe("realtime:t", bindings).await;
    stage.run("truncate us").await;
    stage.run(&format!("insert into events values ('us', 9, '{END}')")).await;
    assert_eq!(until_end(&mut client).await, ["gap"; 2]);
    // A change is one message for each table, with the ids of all bindings that it matches.
    stage
        .run(&format!(
            "insert into events values ('us', 3, 'a'); insert into events values ('us', 10, '{END}')"
        ))
        .await;
    let mut told = Vec::new();
    while told.len() < 2 {
        let frame = client.frame().await;
        if frame[3] == "postgres_changes" && frame[4]["data"]["record"]["id"] == 3 {
            told.push((
                frame[4]["data"]["table"].as_str().unwrap().to_owned(),
                frame[4]["ids"].as_array().unwrap().len(),
            ));
        }
    }
    told.sort();
    assert_eq!(told, [(String::from("events"), 3), (String::from("us"), 2)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_of_a_partition_that_a_lock_made_unreadable_are_read_again_and_keep_no_other_reader_waiting() {
    let stage = Stage::new(RULES).await;
    stage.run(&format!("insert into member values ('{ALICE}')")).await;
    let mut other = stage.database.connect().await;
    let held = other.transaction().await.unwrap();
    held.batch_execute("lock table member in access exclusive mode").await.unwrap();
    // Nobody has named it before: its rules are to be read under the lock.
    let mut asked = stage.subscribe(&alice(), of("asked")).await;
    let mut bare = stage.subscribe(&alice(), of("bare")).await;
    let started = std::time::Instant::now();
    for id in 10..20 {
        stage.run(&format!("insert into notes values ('bare', {id}, null, true)")).await;
        assert_eq!(bare.change().await["record"]["id"], id);
    }
    assert!(started.elapsed() < std::time::Duration::from_secs(5), "{:?}", started.elapsed());
    held.rollback().await.unwrap();
    stage.run(&format!("insert into notes values ('asked', 5, '{ALICE}', true)")).await;
    let changes = stage.changes(&mut asked).await;
    assert_eq!(changes.iter().map(|change| change["record"]["id"].clone()).collect::<Vec<_>>(), [json!(5)]);
}

/// How many partitions the database records the rules of, and the rules of how many relations.
async fn held(stage: &Stage) -> (usize, usize) {
    let count = |sql: &'static str| async move { stage.database.value(sql).await.parse::<usize>().unwrap() };
    let named = count("select count(*) from relay.named_parts").await;
    let rules = count("select count(*) from relay.rules_now()").await;
    (named, rules)
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_that_are_not_named_cost_nothing_and_named_ones_are_released() {
    let stage = Stage::new(
        "create table w (id int primary key, name text) partition by range (id);
         do $$ begin for n in 1..120 loop
           execute format('create table w_%s partition of w for values from (%s) to (%s)', n, n, n + 1);
         end loop; end $$;
         grant select on all tables in schema public to authenticated; select relay.watch('w')",
    )
    .await;
    let mut live = stage.subscribe(&alice(), of("w")).await;
    let before = held(&stage).await;
    assert_eq!(before, (0, 2));
    // The relay holds the last of them; the database remembers them for an hour.
    for n in 1..=120 {
        let answer = get(stage.relay.address, &path(&format!("w_{n}"), ""), "").await;
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    assert_eq!(held(&stage).await, (120, 122));
    stage.run("update relay.named_parts set used = used - interval '2 hours'").await;
    let mut one = stage.subscribe(&alice(), of("w_7")).await;
    stage.run("delete from relay.named_parts where part = 'w_8'::regclass").await;
    let mut two = stage.subscribe(&alice(), of("w_8")).await;
    let (named, rules) = held(&stage).await;
    assert!(named < 40 && rules == named + 2, "{named} {rules}");
    stage.run("insert into w values (7, 'a'), (8, 'b')").await;
    assert_eq!(stage.changes(&mut one).await.len(), 1);
    assert_eq!(stage.changes(&mut two).await.len(), 1);
    assert_eq!(stage.changes(&mut live).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_before_a_rule_of_a_forgotten_partition_widened_is_a_gap() {
    let stage = Stage::new(RULES).await;
    let away = gone(&stage, "opened").await;
    let kept = gone(&stage, "own").await;
    stage
        .run(&format!("insert into notes values ('opened', 1, null, false), ('own', 1, '{ALICE}', true)"))
        .await;
    // As after an hour in which no subscriber named it, with another relay.
    stage.run("delete from relay.named_parts where part = 'opened'::regclass").await;
    stage.run("create policy more on opened for select using (true)").await;
    stage
        .run(&format!("insert into notes values ('opened', 2, null, true), ('own', 9, '{ALICE}', true)"))
        .await;
    assert_eq!(polled(&away, &stage).await.last().map(String::as_str), Some("gap"));
    stage
        .run(&format!(
            "alter table notes add name text; insert into notes values ('own', 10, '{ALICE}', true, '{END}')"
        ))
        .await;
    assert_eq!(polled(&kept, &stage).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_event_trigger_a_partition_is_judged_by_its_rules_of_the_next_look() {
    let stage = Stage::new(RULES).await;
    stage.run("drop event trigger relay_schema_changes").await;
    let mut client = stage.subscribe(&alice(), of("opened")).await;
    let away = gone(&stage, "opened").await;
    stage.run("insert into notes values ('opened', 1, null, true), ('opened', 2, null, false)").await;
    let ids = |changes: Vec<Value>| -> Vec<Value> {
        changes.into_iter().map(|change| change["record"]["id"].clone()).collect()
    };
    assert_eq!(ids(stage.changes(&mut client).await), [json!(1)]);
    stage
        .run("drop policy opened on opened; create policy closed on opened for select using (not open)")
        .await;
    // What was written before the look would be a gap.
    assert_eq!(stage.changes(&mut client).await, Vec::<Value>::new());
    stage.run("insert into notes values ('opened', 3, null, true), ('opened', 4, null, false)").await;
    assert_eq!(ids(stage.changes(&mut client).await), [json!(4)]);
    assert_eq!(polled(&away, &stage).await, ["gap"]);
    // A partition that comes, and one that goes.
    stage.run("create table late partition of notes for values in ('late'); grant select on late to authenticated").await;
    let mut late = stage.subscribe(&alice(), of("late")).await;
    stage.run("insert into notes values ('late', 5, null, true)").await;
    assert_eq!(ids(stage.changes(&mut late).await), [json!(5)]);
    stage
        .run("alter table notes detach partition late; insert into late values ('late', 6, null, true)")
        .await;
    stage.run("insert into marker default values").await;
    let (status, message) = system(&mut late).await;
    assert!(status == "error" && message.starts_with("Gap: "), "{message}");
}

/// Partitions of other owners, with rules on each level: forced, restrictive, for one role, by way of the whole and of a sibling.
const LEVELS: &str = "
    create role $DB_keeper; create role $DB_member; grant $DB_keeper to $DB_member; create role $DB_plain;
    grant usage on schema public, auth to $DB_keeper, $DB_member, $DB_plain; grant execute on all functions in schema auth to $DB_keeper, $DB_member, $DB_plain;
    create table f (region text, n int, owner uuid, open bool, note text, primary key (region, n)) partition by list (region);
    create table f_eu partition of f for values in ('eu') partition by range (n);
    create table f_eu_low partition of f_eu for values from (0) to (100);
    create table f_eu_high (gone text, note text, open bool, owner uuid, lost int, n int not null, region text not null, primary key (region, n));
    alter table f_eu_high drop gone, drop lost; alter table f_eu attach partition f_eu_high for values from (100) to (200);
    create table f_us partition of f for values in ('us'); create table f_as partition of f for values in ('as');
    create table f_af partition of f for values in ('af');
    alter table f enable row level security; create policy whole on f for select using (n % 2 = 0);
    alter table f_eu enable row level security; create policy middle on f_eu for select using (open);
    create policy narrow on f_eu as restrictive for select to $DB_plain using (n <> 2);
    alter table f_eu_low enable row level security; alter table f_eu_low force row level security; alter table f_eu_low owner to $DB_keeper;
    create policy forced on f_eu_low for select to $DB_keeper using (owner = auth.uid());
    alter table f_eu_high enable row level security; alter table f_eu_high owner to $DB_keeper;
    create policy few on f_eu_high for select using (n > 101 and (f_eu_high.note like 'x%' or f_eu_high.* is null));
    alter table f_us enable row level security; create policy by_whole on f_us for select using (exists (select from f where f.n = 2 and f.region = 'as') and n > 1);
    alter table f_as enable row level security; create policy by_leaf on f_as for select using (n in (select h.n - 100 from f_eu_high h));
    grant select on f, f_eu, f_us, f_as to $DB_keeper, $DB_plain, $DB_member; grant select on f_eu_high to $DB_plain;
    grant select (region, n) on f_eu_low to $DB_plain; grant select (note) on f_af to $DB_plain; grant select (region, note, n) on f_af to $DB_keeper;
    select relay.watch('f')";

#[tokio::test(flavor = "multi_thread")]
async fn every_level_shows_each_role_what_a_query_on_it_shows() {
    let stage = Stage::new(LEVELS).await;
    let name = &stage.name;
    let tables = ["f", "f_eu", "f_eu_low", "f_eu_high", "f_us", "f_as", "f_af"];
    let roles = ["keeper", "member", "plain"];
    let (mut readers, mut refused) = (Vec::new(), Vec::new());
    for role in roles {
        let role = format!("{name}_{role}");
        let token = token(&role, Some(ALICE), json!({}));
        for table in tables {
            let mut client = Client::connect(&stage.relay, &token).await;
            let bindings = json!([of(table)[0], {"event": "*", "schema": "public", "table": "marker"}]);
            let answer = client.try_subscribe("realtime:stage", bindings).await;
            match answer["status"] == "ok" {
                true => readers.push((role.clone(), table, client)),
                false => refused.push((role.clone(), table, answer)),
            }
        }
    }
    stage
        .run(&format!(
            "insert into f select r, i + h, case when i % 2 = 0 then '{ALICE}'::uuid else gen_random_uuid() end, i % 3 <> 0, case when i > 2 then 'x' else 'y' end || i
             from generate_series(1, 6) i, (values ('eu', 0), ('eu', 100), ('us', 0), ('as', 0), ('af', 0)) v (r, h)"
        ))
        .await;
    for (role, table, answer) in refused {
        let sql = format!("select has_any_column_privilege('{role}', '{table}', 'select')");
        assert_eq!(stage.database.value(&sql).await, "f", "{role} {table}: {answer}");
    }
    for (role, table, client) in &mut readers {
        let claims = json!({"sub": ALICE, "role": role});
        let columns = format!(
            "select string_agg(quote_ident(attname), ', ' order by attnum) from pg_attribute where attrelid = '{table}'::regclass
             and attnum > 0 and not attisdropped and has_column_privilege('{role}', attrelid, attnum, 'select')"
        );
        let columns = stage.database.value(&columns).await;
        let select = format!("select row_to_json(r) from (select {columns} from {table}) r");
        // A record has the columns in the order of the partition that holds the row.
        let sorted = |record: &Value| {
            let columns: BTreeMap<&String, &Value> = record.as_object().unwrap().iter().collect();
            format!("{columns:?}")
        };
        let shown = stage.selected(role, &claims, &select).await;
        let mut shown: Vec<String> =
            shown.iter().map(|row| sorted(&serde_json::from_str(row).unwrap())).collect();
        let mut told: Vec<String> =
            stage.changes(client).await.iter().map(|change| sorted(&change["record"])).collect();
        shown.sort();
        told.sort();
        assert_eq!(told, shown, "{role} {table}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_of_the_whole_and_of_partitions_that_breaks_again_and_again_loses_nothing() {
    let stage = Stage::new(EVENTS).await;
    let tables = ["events", "eu", "eu_old"];
    let bindings: Vec<Value> = tables.iter().map(|table| of(table)[0].clone()).collect();
    let mut told: Vec<(String, i64)> = Vec::new();
    let open = || async {
        let mut client =
            Client::at(stage.relay.address, &alice(), &format!("&session={NAME}")).await.unwrap();
        client.try_join("realtime:t", Value::Array(bindings.clone())).await.unwrap();
        client
    };
    let mut client = open().await;
    while system(&mut client).await.0 != "ok" {}
    let mut rows: i64 = 0;
    for part in 0..12 {
        let from = rows + 1;
        rows += 5;
        stage
            .run(&format!("insert into events select 'eu', i, 'a' from generate_series({from}, {rows}) i"))
            .await;
        let wanted = if part == 11 { usize::MAX } else { told.len() + 1 + part };
        while told.len() < wanted && told.len() < 180 {
            let frame = client.frame().await;
            assert!(frame[3] != "system" || frame[4]["status"] == "ok", "{frame}");
            if frame[3] == "postgres_changes" {
                let data = &frame[4]["data"];
                let one =
                    (data["table"].as_str().unwrap().to_owned(), data["record"]["id"].as_i64().unwrap());
                if !told.contains(&one) {
                    told.push(one);
                }
            }
        }
        if part < 11 {
            drop(client);
            client = open().await;
        }
    }
    for table in tables {
        let mut ids: Vec<i64> = told.iter().filter(|one| one.0 == table).map(|one| one.1).collect();
        ids.sort_unstable();
        assert_eq!(ids, (1..=rows).collect::<Vec<_>>(), "{table}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_the_whole_and_a_partition_exchange_are_a_gap_of_both() {
    let stage = Stage::new(EVENTS).await;
    let aways = [gone(&stage, "us").await, gone(&stage, "events").await];
    let mut live = Vec::new();
    for table in ["us", "events"] {
        let mut client = Client::connect(&stage.relay, &alice()).await;
        client.subscribe(&format!("realtime:{table}"), of(table)).await;
        live.push(client);
    }
    stage.run("insert into events values ('us', 1, 'a')").await;
    stage
        .run("begin; alter table us rename to x; alter table events rename to us; alter table x rename to events; commit")
        .await;
    for client in &mut live {
        while !system(client).await.1.starts_with("Subscribed") {}
    }
    stage.run(&format!("insert into us values ('eu', 2, 'b'), ('us', 3, 'c'), ('us', 4, '{END}')")).await;
    let lines: Vec<Vec<String>> =
        [until_end(&mut live[0]).await, until_end(&mut live[1]).await].map(|lines| short(&lines)).to_vec();
    let newest = |lines: &[String]| -> Vec<String> {
        lines.iter().filter(|line| !matches!(line.as_str(), "gap" | "INSERT 1")).cloned().collect()
    };
    assert_eq!(newest(&lines[0]), ["INSERT 2", "INSERT 3"]);
    assert_eq!(newest(&lines[1]), ["INSERT 3"]);
    for away in aways {
        assert_eq!(polled(&away, &stage).await, ["gap"], "{}", away.table);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_partition_is_judged_by_its_own_read_policy() {
    let stage = Stage::new(
        "create table w (id int not null, open bool) partition by range (id);
         create extension postgres_fdw; create table far (id int, open bool);
         do $$ begin execute format('create server here foreign data wrapper postgres_fdw options (host %L, port %L, dbname %L)',
           split_part(current_setting('unix_socket_directories'), ',', 1), current_setting('port'), current_database()); end $$;
         create user mapping for current_user server here;
         create foreign table away partition of w for values from (0) to (10) server here options (table_name 'far');
         create table near partition of w for values from (10) to (20);
         grant select on w, away, near to authenticated; select relay.watch('w'); select relay.allow('away', 'open')",
    )
    .await;
    let mut clients = Vec::new();
    for table in ["w", "away", "near"] {
        clients.push(stage.subscribe(&alice(), of(table)).await);
    }
    let told = |changes: Vec<Value>| -> Vec<i64> {
        changes.iter().filter_map(|change| change["record"]["id"].as_i64()).collect()
    };
    stage.run("insert into w values (1, true), (2, false), (11, false)").await;
    assert_eq!(told(stage.changes(&mut clients[0]).await), [1, 2, 11]);
    assert_eq!(told(stage.changes(&mut clients[1]).await), [1]);
    assert_eq!(told(stage.changes(&mut clients[2]).await), [11]);
    stage.run("select relay.allow('away', 'not open')").await;
    stage.run("insert into w values (3, true), (4, false)").await;
    assert_eq!(told(stage.changes(&mut clients[1]).await), [4]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_with_a_watch_of_its_own_keeps_its_readers_when_it_becomes_a_partition_and_loses_the_watch() {
    let stage = Stage::new(&format!(
        "{EVENTS}; create table asia (name text, id int not null, region text not null, primary key (region, id));
         grant select on asia to authenticated; select relay.watch('asia');
         alter table asia enable row level security; create policy few on asia for select using (id > 1)"
    ))
    .await;
    let mut asia = Client::connect(&stage.relay, &alice()).await;
    asia.subscribe("realtime:t", json!([of("asia")[0], of("events")[0]])).await;
    let mut expected = Vec::new();
    for (number, statement) in [
        "",
        "alter table events attach partition asia for values in ('asia')",
        "select relay.unwatch('asia')",
        "select relay.watch('asia')",
        "alter table events detach partition asia",
    ]
    .into_iter()
    .enumerate()
    {
        let is_part = (1..=3).contains(&number);
        stage.run(statement).await;
        if (2..4).contains(&number) {
            while !system(&mut asia).await.1.starts_with("Subscribed") {}
        }
        let id = number * 10;
        expected.push(format!("asia {}", id + 2));
        if is_part {
            expected.extend([format!("events {}", id + 1), format!("events {}", id + 2)]);
        }
        stage
            .run(&format!(
                "insert into asia (region, id, name) values ('asia', {}, 'a'), ('asia', {}, 'b'); insert into events values ('us', {id}, '{END}')",
                if id == 0 { 1 } else { id + 1 },
                id + 2
            ))
            .await;
        let mut lines = until_end(&mut asia).await;
        lines.retain(|line| line != "gap");
        let mut told: Vec<String> = lines
            .iter()
            .map(|line| {
                let mut words = line.splitn(3, ' ');
                let (_, table, row) = (words.next(), words.next().unwrap(), words.next().unwrap());
                format!("{table} {}", serde_json::from_str::<Value>(row).unwrap()["id"])
            })
            .collect();
        told.sort();
        if id > 0 {
            // The policy shows these as well.
            expected.push(format!("asia {}", id + 1));
        }
        expected.sort();
        assert_eq!(told, expected, "{statement}");
        expected.clear();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_is_shown_by_the_role_of_the_newest_token() {
    let stage = Stage::new(&format!(
        "create role $DB_less; grant usage on schema public to $DB_less; {EVENTS};
         grant select (region, id) on eu_old to $DB_less; grant select on eu to $DB_less;
         alter table eu_old enable row level security; create policy less on eu_old for select to $DB_less using (id > 5);
         create policy more on eu_old for select to authenticated using (true)"
    ))
    .await;
    let mut client = stage.subscribe(&alice(), json!([of("eu_old")[0], of("events")[0]])).await;
    let less = token(&format!("{}_less", stage.name), Some(ALICE), json!({}));
    let mut id = 0;
    for (token, expected) in [
        (None, vec!["eu_old", "eu_old", "events", "events"]),
        (Some(&less), vec!["eu_old"]),
        (Some(&alice()), vec!["eu_old", "eu_old", "events", "events"]),
    ] {
        if let Some(token) = token {
            client.push(Some("1"), "realtime:stage", "access_token", json!({"access_token": token})).await;
            // Refused where the role may not read the whole, or subscribed again.
            system(&mut client).await;
        }
        id += 1;
        stage.run(&format!("insert into events values ('eu', {id}, 'a'), ('eu', {}, 'b')", id + 10)).await;
        let mut told: Vec<String> = stage
            .changes(&mut client)
            .await
            .iter()
            .map(|change| {
                let is_whole = change["record"].get("name").is_some();
                assert_eq!(is_whole, expected.len() > 1, "{change}");
                change["table"].as_str().unwrap().to_owned()
            })
            .collect();
        told.sort();
        assert_eq!(told, expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_is_named_while_another_transaction_changes_rules_keeps_no_reader_waiting() {
    // As after an hour in which no subscriber named it.
    const FORGET: &str = "delete from relay.named_parts where part = 'own'::regclass";
    for (before, rule, after) in [
        (FORGET, "grant select on member to anon; grant select on notes to anon", ""),
        ("", "grant select on own to anon", FORGET),
        ("", "revoke select on own from authenticated", FORGET),
    ] {
        let stage = Stage::new(RULES).await;
        let mut bare = stage.subscribe(&alice(), of("bare")).await;
        let answer = get(stage.relay.address, &path("own", ""), "").await;
        assert_eq!(answer.status, 200, "{answer:?}");
        stage.run(before).await;
        let mut other = stage.database.connect().await;
        let held = other.transaction().await.unwrap();
        held.batch_execute(rule).await.unwrap();
        stage.run(after).await;
        let started = std::time::Instant::now();
        let opened = get(stage.relay.address, &path("opened", ""), "").await;
        assert_eq!(opened.status, 200, "{rule}: {opened:?}");
        for id in 10..20 {
            stage.run(&format!("insert into notes values ('bare', {id}, null, true)")).await;
            assert_eq!(stage.changes(&mut bare).await.len(), 1, "{rule}");
        }
        assert!(started.elapsed() < std::time::Duration::from_secs(5), "{rule}: {:?}", started.elapsed());
        held.rollback().await.unwrap();
    }
}
