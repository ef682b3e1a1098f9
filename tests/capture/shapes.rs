//! An image keeps the meaning that it was written with, whatever its table and types have become since.
#![allow(clippy::print_stdout, reason = "the seed repeats a run")]

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::support::away::{Away, Told, told_until};
use crate::support::client::Client;
use crate::support::dice::Dice;
use crate::support::stage::Stage;
use crate::support::token;

/// What no reader of these tests may ever be told.
const SECRET: &str = "top secret";
/// The row that ends each case, which every reader may see.
const LAST: i64 = 999;

fn user() -> String {
    token("authenticated", None, json!({}))
}

fn bindings() -> Value {
    json!([{"event": "*", "schema": "public", "table": "t"}])
}

fn is_last(change: &Value) -> bool {
    change["record"]["id"] == LAST
}

/// Changes, and gaps as their texts.
fn values(told: Vec<Told>) -> Vec<Value> {
    told.into_iter().map(|told| told.unwrap_or_else(Value::from)).collect()
}

/// What a socket is told up to the last row.
async fn until_last(client: &mut Client) -> Vec<Value> {
    values(told_until(client, is_last).await)
}

/// A reader of `t` who is away.
async fn away(stage: &Stage) -> Away {
    Away::from(stage, &user(), "t").await
}

/// What each way tells it up to the last row.
async fn back(away: &Away, stage: &Stage) -> BTreeMap<&'static str, Vec<Value>> {
    away.back(stage, is_last).await.into_iter().map(|(way, told)| (way, values(told))).collect()
}

/// What is told of `write` when `alter` comes after it: to those who come back, and live with both in one transaction.
/// `open` makes the table `t` and what it needs, `last` its last row.
async fn told_of(open: &str, write: &str, alter: &str, last: &str) -> BTreeMap<&'static str, Vec<Value>> {
    let stage = Stage::new(open).await;
    let reader = away(&stage).await;
    stage.run(&format!("{write}; {alter}; {last}")).await;
    let mut told = back(&reader, &stage).await;
    let stage = Stage::new(open).await;
    let mut client = stage.subscribe(&user(), bindings()).await;
    stage.run(&format!("begin; {write}; {alter}; commit")).await;
    stage.run(last).await;
    told.insert("live", until_last(&mut client).await);
    told
}

fn is_gap(told: &Value) -> bool {
    told.as_str().is_some_and(|text| text.to_lowercase().contains("gap") || text.contains("columns changed"))
}

/// Each way must have been told a gap, and of no row.
#[track_caller]
fn only_gaps(told: &BTreeMap<&'static str, Vec<Value>>) {
    for (way, told) in told {
        assert!(!told.is_empty() && told.iter().all(|one| one.is_string()), "{way}: {told:?}");
    }
}

/// Whatever each way was told, the secret is not in it; what is told of rows are these records.
#[track_caller]
fn only_records(told: &BTreeMap<&'static str, Vec<Value>>, records: &[Value]) {
    for (way, told) in told {
        let rows: Vec<&Value> =
            told.iter().filter(|one| one.is_object()).map(|change| &change["record"]).collect();
        let gaps = told.len() - rows.len();
        assert!(!format!("{told:?}").contains(SECRET), "{way}: {told:?}");
        assert!(gaps > 0 || rows.iter().copied().eq(records), "{way}: {told:?}");
        assert!(rows.iter().all(|row| records.contains(row)), "{way}: {told:?}");
    }
}

/// The same, and no way was told a gap.
#[track_caller]
fn exactly_records(told: &BTreeMap<&'static str, Vec<Value>>, records: &[Value]) {
    for (way, told) in told {
        assert!(told.iter().map(|change| &change["record"]).eq(records), "{way}: {told:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_column_that_is_dropped_and_added_again_does_not_show_what_the_old_one_held() {
    let told = told_of(
        "create table t (id int primary key, pub text, secret text); grant select (id, pub) on t to authenticated; select relay.watch('t')",
        "insert into t values (1, 'p', 'top secret')",
        "alter table t drop column secret; alter table t add column secret text; grant select (secret) on t to authenticated",
        "insert into t values (999)",
    )
    .await;
    only_records(&told, &[json!({"id": 1, "pub": "p"})]);
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_that_exchange_their_names_keep_what_they_hold() {
    let told = told_of(
        "create table t (id int primary key, a text, b text, c text); grant select (id, a) on t to authenticated; select relay.watch('t')",
        "insert into t values (1, 'mine', 'top secret', 'top secret')",
        "alter table t rename a to x; alter table t rename b to a; alter table t rename c to b; alter table t rename x to c",
        "insert into t (id, c) values (999, 'mine')",
    )
    .await;
    // The right to select went with the column.
    exactly_records(&told, &[json!({"id": 1, "c": "mine"})]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_reads_the_column_that_it_means_under_whatever_name() {
    let told = told_of(
        "create table t (id int primary key, open bool, other bool, v text); alter table t enable row level security;
         create policy p on t using (open); grant select on t to authenticated; select relay.watch('t')",
        "insert into t values (1, false, true, 'top secret'), (2, true, false, 'shown')",
        "alter table t rename open to x; alter table t rename other to open; alter table t rename x to other",
        "insert into t values (999, true, false)",
    )
    .await;
    exactly_records(&told, &[json!({"id": 2, "other": true, "open": false, "v": "shown"})]);
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_that_exchange_their_names_stay_what_they_were() {
    let swap = "alter type mood rename value 'open' to 'x'; alter type mood rename value 'closed' to 'open'; alter type mood rename value 'x' to 'closed'";
    let told = told_of(
        "create type mood as enum ('open', 'closed'); create table t (id int primary key, m mood, all_m mood[], v text);
         alter table t enable row level security; create policy p on t using (m = 'open');
         grant select on t to authenticated; select relay.watch('t')",
        "insert into t values (1, 'closed', '{closed,open}', 'top secret'), (2, 'open', '{open,NULL}', 'shown')",
        swap,
        "insert into t values (999, 'closed')",
    )
    .await;
    exactly_records(&told, &[json!({"id": 2, "m": "closed", "all_m": ["closed", null], "v": "shown"})]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_carried_over_is_a_gap() {
    let pair = "create type pair as (x text, y text); create table t (id int primary key, p pair); grant select on t to authenticated;
                select relay.watch('t')";
    let plain = "create table t (id int primary key, v text); grant select on t to authenticated; select relay.watch('t')";
    let mood = "create type mood as enum ('a', 'b'); create table t (id int primary key, m mood); grant select on t to authenticated;
                select relay.watch('t')";
    for (open, write, alter) in [
        // An attribute has another name, a column another type, a value another text in JSON, the row another key.
        (pair, "insert into t values (1, row('top secret', 'y'))", "alter type pair rename attribute x to z"),
        (plain, "insert into t values (1, '17')", "alter table t alter v type int using v::int"),
        (
            plain,
            "insert into t values (1, 'x')",
            "alter table t drop constraint t_pkey; alter table t add k serial primary key",
        ),
        (
            mood,
            "insert into t values (1, 'a')",
            "create function j(mood) returns json language sql as 'select ''1''::json'; create cast (mood as json) with function j(mood)",
        ),
    ] {
        only_gaps(&told_of(open, write, alter, "insert into t (id) values (999)").await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_labels_and_domains_that_are_added_or_altered_make_no_gap() {
    let open = "create type mood as enum ('a', 'b'); create domain small as int check (value < 1000);
                create table t (id int primary key, m mood, s small, v varchar(5)); grant select on t to authenticated; select relay.watch('t')";
    for (alter, record) in [
        ("alter table t add extra text default 'x'", json!({"id": 1, "m": "a", "s": 1, "v": "v"})),
        ("alter type mood add value 'c'", json!({"id": 1, "m": "a", "s": 1, "v": "v"})),
        ("alter domain small add check (value > 0)", json!({"id": 1, "m": "a", "s": 1, "v": "v"})),
        ("alter table t alter v type varchar(10)", json!({"id": 1, "m": "a", "s": 1, "v": "v"})),
        ("alter table t drop v", json!({"id": 1, "m": "a", "s": 1})),
        ("alter table t rename v to w", json!({"id": 1, "m": "a", "s": 1, "w": "v"})),
        ("alter type mood rename value 'a' to 'z'", json!({"id": 1, "m": "z", "s": 1, "v": "v"})),
    ] {
        let told =
            told_of(open, "insert into t values (1, 'a', 1, 'v')", alter, "insert into t (id) values (999)")
                .await;
        exactly_records(&told, &[record]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_that_reads_a_column_which_an_image_lacks_is_a_gap_and_not_a_null() {
    let open = "create table t (id int primary key, v text); alter table t enable row level security;
                create policy p on t using (true); grant select on t to authenticated; select relay.watch('t')";
    let alter = "alter table t add owner text default 'somebody'; alter policy p on t using (owner is null or id = 999)";
    only_gaps(
        &told_of(open, "insert into t values (1, 'top secret')", alter, "insert into t values (999)").await,
    );
    // Nor can a filter be told.
    let stage = Stage::new(open).await;
    stage.run("alter table t add n int").await;
    let mut client = stage
        .subscribe(&user(), json!([{"event": "*", "schema": "public", "table": "t", "filter": "n=eq.1"}]))
        .await;
    stage.run("begin; insert into t values (1, 'x', 1); alter table t drop n; alter table t add n int default 2; commit").await;
    let told = loop {
        let frame = client.frame().await;
        assert_ne!(frame[3], "postgres_changes", "{frame}");
        if frame[3] == "system" && frame[4]["status"] == "error" {
            break frame[4]["message"].clone();
        }
    };
    assert!(is_gap(&told), "{told}");
}

const LABELS: &str =
    "create type mood as enum ('open', 'closed'); create table t (id int primary key, m mood, v text);
     alter table t enable row level security; create policy p on t using (m = 'open' or id = 999);
     grant select on t to authenticated; select relay.watch('t')";
const SWAP: &str =
    "begin; alter type mood rename value 'open' to 'x'; alter type mood rename value 'closed' to 'open';
     alter type mood rename value 'x' to 'closed'; commit";

/// Labels are exchanged while a transaction is open that has the table's lock already, so that it hears of it late.
#[tokio::test(flavor = "multi_thread")]
async fn labels_that_change_under_a_writer_show_nothing_that_is_hidden() {
    for isolation in ["read committed", "repeatable read", "serializable"] {
        for before in
            ["update t set v = v where false", "insert into t values (3, 'closed', 'top secret')", "select"]
        {
            let stage = Stage::new(LABELS).await;
            // So that its functions and labels are at hand.
            stage.run("insert into t values (0, 'closed', 'top secret')").await;
            let mut client = stage.subscribe(&user(), bindings()).await;
            let writer = stage.database.connect().await;
            writer.batch_execute("insert into t values (-1, 'closed', 'top secret'); prepare w (int, text) as insert into t values ($1, $2::mood, 'top secret')").await.unwrap();
            writer.batch_execute(&format!("begin isolation level {isolation}; {before}")).await.unwrap();
            stage.run(SWAP).await;
            // What the table holds afterwards is the judge.
            writer.batch_execute("execute w (1, 'open'); execute w (2, 'closed'); commit").await.unwrap();
            let visible = stage.selected("authenticated", &json!({}), "select id from t order by id").await;
            stage.run("insert into t values (999, 'open')").await;
            for change in until_last(&mut client).await.iter().filter(|told| told.is_object()) {
                let id = change["record"]["id"].to_string();
                assert!(visible.contains(&id), "{isolation}, {before}: {change}, visible are {visible:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_event_trigger_the_shape_is_looked_up_and_what_is_not_certain_is_a_gap() {
    let stage = Stage::new(
        "drop event trigger relay_schema_changes; create table t (id int primary key, a text, b text);
         grant select (id, a) on t to authenticated; select relay.watch('t')",
    )
    .await;
    let reader = away(&stage).await;
    let mut client = Client::connect(&stage.relay, &user()).await;
    client.subscribe("realtime:t", bindings()).await;
    stage.run("insert into t values (1, 'shown', 'top secret')").await;
    assert_eq!(client.change().await["record"], json!({"id": 1, "a": "shown"}));
    let exchange = "alter table t rename a to x; alter table t rename b to a; alter table t rename x to b; grant select (a) on t to authenticated;
                    revoke select (b) on t from authenticated";
    stage.run(&format!("begin; insert into t values (2, 'shown', 'top secret'); {exchange}; commit")).await;
    stage.run("insert into t values (3, 'top secret', 'x')").await;
    // From some moment on the new shape is known.
    let last = loop {
        stage.run("insert into t (id) values ((select max(id) + 1 from t))").await;
        match client.frame_within(std::time::Duration::from_millis(200)).await {
            Some(frame) if frame[3] == "postgres_changes" => break frame[4]["data"]["record"].clone(),
            _ => {}
        }
    };
    assert_eq!(last["a"], Value::Null, "{last}");
    stage.run("insert into t (id) values (999)").await;
    for (way, told) in back(&reader, &stage).await {
        assert!(told.iter().any(Value::is_string), "{way}: {told:?}");
        assert!(told.iter().all(|one| !one.to_string().contains(SECRET)), "{way}: {told:?}");
    }
}

/// Columns come, go, exchange names and rights between rows; after each transaction PostgreSQL says what may be seen.
#[tokio::test(flavor = "multi_thread")]
async fn random_changes_of_columns_between_random_changes_of_rows_show_nothing_that_postgresql_hides() {
    let seed =
        std::env::var("RELAY_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64 | 1
        });
    let mut dice = Dice(seed);
    let stage = Stage::new(
        "create type mood as enum ('l0', 'l1', 'l2');
         create table t (id int primary key, c0 text, c1 text, c2 text, m mood, seen bool);
         alter table t enable row level security; create policy p on t using (seen and m <> 'l2' or id = 999);
         grant select (id, c0, m) on t to authenticated; select relay.watch('t')",
    )
    .await;
    let reader = away(&stage).await;
    let mut client = stage.subscribe(&user(), bindings()).await;
    // What may be seen of a row after the transaction that wrote it last, for each such transaction.
    let mut visible: BTreeMap<i64, Vec<Value>> = BTreeMap::new();
    let mut next = 1;
    for _ in 0..40 {
        let mut script = String::from("begin; ");
        for _ in 0..1 + dice.below(5) {
            script += &match dice.below(9) {
                0..=3 => {
                    next += 1;
                    // Each text names its row and column number, so that no other can be taken for it.
                    format!(
                        "do $$ declare names text[] := array(select attname from pg_attribute where attrelid = 't'::regclass and attnum > 0
                           and not attisdropped and atttypid = 'text'::regtype order by attnum); one text;
                         begin insert into t (id, m, seen) values ({id}, (select e.enumlabel from pg_enum e where e.enumtypid = 'mood'::regtype order by e.oid offset {label} limit 1)::mood, {seen});
                           foreach one in array names loop execute format('update t set %I = %L where id = {id}', one,
                             'row {id} column ' || (select attnum from pg_attribute where attrelid = 't'::regclass and attname = one)); end loop; end $$; ",
                        id = next - 1,
                        label = dice.below(3),
                        seen = dice.below(2) == 0,
                    )
                }
                4 => exchange(&mut dice, "alter table t rename column c%1$s to c%2$s"),
                5 => exchange(&mut dice, "alter type mood rename value ''l%1$s'' to ''l%2$s''"),
                6 => {
                    let column = dice.below(3);
                    format!("alter table t drop column c{column}; alter table t add column c{column} text; ")
                }
                7 => format!("grant select (c{}) on t to authenticated; ", dice.below(3)),
                _ => format!("revoke select (c{0}) on t from authenticated; ", dice.below(3)),
            };
        }
        script += "commit";
        stage.run(&script).await;
        let columns = stage
            .selected("authenticated", &json!({}),
                "select string_agg(quote_literal(attname) || ', ' || quote_ident(attname), ', ' order by attnum) from pg_attribute
                 where attrelid = 't'::regclass and attnum > 0 and not attisdropped and has_column_privilege(attrelid, attnum, 'select')
                 and atttypid <> 'bool'::regtype")
            .await;
        let select = format!("select jsonb_build_object({}) from t", columns[0]);
        for row in stage.selected("authenticated", &json!({}), &select).await {
            let row: Value = serde_json::from_str(&row).unwrap();
            visible.entry(row["id"].as_i64().unwrap()).or_default().push(row);
        }
    }
    stage.run("insert into t (id) values (999)").await;
    let mut told = back(&reader, &stage).await;
    told.insert("live", until_last(&mut client).await);
    let mut rows = 0;
    for (way, told) in &told {
        for change in told.iter().filter(|one| one.is_object()) {
            rows += 1;
            let record = change["record"].as_object().unwrap();
            let id = record["id"].as_i64().unwrap();
            // A row is written by an insert and updates of one transaction: values may be missing yet, but none is another's.
            let allowed =
                visible.get(&id).unwrap_or_else(|| panic!("{way}: seed {seed}: hidden row {change}"));
            for (column, value) in
                record.iter().filter(|(column, value)| column.starts_with('c') && !value.is_null())
            {
                let is_shown =
                    allowed.iter().any(|row| row.as_object().unwrap().values().any(|one| one == value));
                assert!(is_shown, "{way}: seed {seed}: {column} of {change}, visible were {allowed:?}");
            }
        }
    }
    // On a busy machine an evaluation may take too long, and its changes are a gap.
    let took_too_long = told.values().flatten().any(|one| one.to_string().contains("took too long"));
    assert!(rows > 0 || took_too_long, "seed {seed}: {told:?}");
}

/// Two of three exchange something in three steps.
fn exchange(dice: &mut Dice, how: &str) -> String {
    let (one, other) = (dice.below(3), dice.below(3));
    if one == other {
        return String::new();
    }
    let step = |from: &str, to: &str| how.replace("''", "'").replace("%1$s", from).replace("%2$s", to) + "; ";
    let (one, other) = (one.to_string(), other.to_string());
    step(&one, "9") + &step(&other, &one) + &step("9", &other)
}

/// What a socket is told up to the next row of `marker`: each record, and each gap as its text.
async fn until_marker(client: &mut Client) -> Vec<Value> {
    let mut told = Vec::new();
    loop {
        let frame = client.frame().await;
        let data = &frame[4]["data"];
        match frame[3].as_str() {
            Some("postgres_changes") if data["table"] == "marker" => return told,
            Some("postgres_changes") => told.push(data["record"].clone()),
            Some("system") if frame[4]["status"] == "error" => told.push(frame[4]["message"].clone()),
            _ => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_altered_between_a_write_and_its_delivery_is_told_as_the_row_is_or_as_a_gap() {
    for alter in [
        "alter type mood rename value 'a' to 'z'",
        "alter type mood rename value 'a' to 'x'; alter type mood rename value 'b' to 'a'; alter type mood rename value 'x' to 'b'",
        "alter type mood add value 'before' before 'a'",
        "alter type pair rename attribute x to z",
        "alter domain small rename to tiny",
        "alter table t alter n type text",
        "alter table t alter n type bigint",
        "alter table t alter n type int using n * 2",
        "alter table t alter m type text",
        "alter table t alter m type mood using case m when 'a' then 'b'::mood else 'a' end",
        "alter table t rename n to k; alter table t rename v to n",
        "alter table t drop n",
        "alter table t drop n; alter table t add n int default 1",
        "alter table t add k float default random()",
    ] {
        let stage = Stage::new(
            "create type mood as enum ('a', 'b'); create type pair as (x int, y int); create domain small as int;
             create table t (id int primary key, m mood, n int, v text, p pair, s small); alter table t enable row level security;
             create policy p on t using (id = 1); grant select on t to authenticated; select relay.watch('t')",
        )
        .await;
        let mut readers = Vec::new();
        for filter in ["id=eq.1", "m=eq.a", "n=eq.1", "n=lt.5,v=like.shown"] {
            let binding = json!([{"event": "*", "schema": "public", "table": "t", "filter": filter}]);
            readers.push((filter, stage.subscribe(&user(), binding).await));
        }
        // Nothing is delivered while the changelog cannot be read.
        let holder = stage.database.connect().await;
        holder.batch_execute("begin; lock table only relay.log in access exclusive mode").await.unwrap();
        stage.run("insert into t values (1, 'a', 1, 'shown', '(1,2)', 3)").await;
        stage.run(alter).await;
        stage.run("insert into marker default values").await;
        let row = stage.database.value("select row_to_json(t) from t where id = 1").await;
        let row: Value = serde_json::from_str(&row).unwrap();
        holder.batch_execute("rollback").await.unwrap();
        for (filter, client) in &mut readers {
            let told = until_marker(client).await;
            // A row that was told before a gap is read again. What is told has no columns that came later.
            let is_right = |last: &Value| match last.as_object() {
                Some(told) => told.iter().all(|(name, value)| row[name] == *value),
                None => is_gap(last),
            };
            assert!(told.last().is_some_and(is_right), "{alter}, {filter}: {told:?}, not {row}");
        }
    }
}
