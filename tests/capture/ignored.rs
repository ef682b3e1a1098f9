//! Columns that `relay.watch` is told to ignore: an UPDATE of nothing else is not logged, and every other change is.

use serde_json::json;

use crate::support::database::Database;
use crate::support::program::output;
use crate::support::stage::Stage;
use crate::support::token;
use relay::postgres::install::install;

/// How many changes of tables are logged.
async fn logged(database: &Database) -> usize {
    let count = "select count(*) from relay.changes where relation > 0 and operation in ('I', 'U', 'D')";
    database.value(count).await.parse().unwrap()
}

/// How many changes a statement logs.
async fn logs(database: &Database, statement: &str) -> usize {
    let before = logged(database).await;
    database.run(statement).await;
    logged(database).await - before
}

/// A table for each way in which the trigger functions compare rows: as jsonb, as text, and where images are made with care; with
/// the settings of a session that make them take the careful way, and as a partition.
const TABLES: &str = "
    create type mood as enum ('sad', 'glad');
    create table plain (id int primary key, v text, seen timestamptz, n int);
    create table texts (id int primary key, v text, seen timestamptz, n int, j json default '{\"a\": [1]}');
    create table moods (id int primary key, v text, seen timestamptz, n int, m mood default 'sad');
    create table floats (id int primary key, v text, seen timestamptz, n int, f float8 default 0.1);
    create table narrow (id int primary key, v bool, seen timestamptz, n int);
    create table parted (id int, v text, gone int, seen timestamptz, n int, primary key (id)) partition by range (id);
    create table part (id int not null, seen timestamptz, n int, v text, gone int);
    alter table parted drop column gone; alter table part drop column gone; alter table parted attach partition part default;";

const NAMES: [&str; 6] = ["plain", "texts", "moods", "floats", "narrow", "parted"];

#[tokio::test(flavor = "multi_thread")]
async fn an_update_of_nothing_but_ignored_columns_is_not_logged_and_any_other_is_with_all_columns() {
    let database = Database::new().await;
    database.run(TABLES).await;
    for table in NAMES {
        database.run(&format!("select relay.watch('{table}', ignore => '{{seen,n}}')")).await;
        for settings in
            ["", "set extra_float_digits = 0", "set default_transaction_isolation = 'serializable'"]
        {
            database.run(settings).await;
            let context = format!("{table}: {settings}");
            database.run(&format!("truncate {table}")).await;
            let logs = async |statement: &str| logs(&database, &statement.replace("TABLE", table)).await;
            assert_eq!(logs("insert into TABLE values (1), (2)").await, 2, "{context}");
            assert_eq!(logs("update TABLE set seen = now()").await, 0, "{context}");
            assert_eq!(logs("update TABLE set n = 1, seen = null where id = 1").await, 0, "{context}");
            assert_eq!(logs("update TABLE set v = v").await, 0, "{context}");
            assert_eq!(logs("update TABLE set v = 't', n = 7 where id = 1").await, 1, "{context}");
            let image =
                "select after ->> 'n' from relay.changes where relation > 0 order by number desc limit 1";
            assert_eq!(database.value(image).await, "7", "{context}");
            assert_eq!(logs("update TABLE set id = 3 where id = 1").await, 1, "{context}");
            assert_eq!(logs("update TABLE set v = null where id = 3").await, 1, "{context}");
            assert_eq!(logs("delete from TABLE").await, 2, "{context}");
        }
        database.run("reset all").await;
    }
    // Rows that are not small.
    database
        .run("insert into plain select 1, string_agg(md5(g::text), '') from generate_series(1, 2000) g")
        .await;
    assert_eq!(logs(&database, "update plain set n = 5").await, 0);
    assert_eq!(logs(&database, "update plain set n = 6, v = v || '.'").await, 1);
    database
        .run("insert into texts select 1, string_agg(md5(g::text), '') from generate_series(1, 2000) g")
        .await;
    assert_eq!(logs(&database, "update texts set n = 5").await, 0);
    assert_eq!(logs(&database, r#"update texts set j = '{"a":[1]}'"#).await, 1);
}

/// Pairs of values that differ in the image, many of them equal for an operator.
const PAIRS: &[(&str, &str, &str)] = &[
    ("numeric", "1.0", "1.00"),
    ("numeric", "0", "null"),
    ("text", "''", "null"),
    ("text", "'a'", "'a '"),
    ("text", "'a,b'", "'a\",\"b'"),
    ("text[]", "'{a,b}'", r#"'{"a,b"}'"#),
    ("int[]", "'{1,null}'", "'{1}'"),
    ("varchar", "'A'", "'a'"),
    ("bool", "false", "null"),
    ("float8", "0.1", "0.10000000000000002"),
    ("float8", "'NaN'", "'infinity'"),
    ("timestamptz", "'2026-01-01 00:00Z'", "'2026-01-01 00:00:00.000001Z'"),
    ("interval", "'1 day'", "'24 hours'"),
    ("bytea", "'\\x00'", "'\\x0000'"),
    ("bit(3)", "'101'", "'100'"),
    ("json", r#"'{"a":1}'"#, r#"'{"a": 1}'"#),
    ("json", r#"'{"a":1,"a":2}'"#, r#"'{"a":2}'"#),
    ("json", "'1e400000'", "'1e400001'"),
    ("json", "'1.0'", "'1.00'"),
    ("json", r#"'"\u0000"'"#, r#"'"\u0001"'"#),
    ("jsonb", r#"'{"a": 1.0}'"#, r#"'{"a": 1.00}'"#),
    ("jsonb", r#"'"seen"'"#, r#"'{"seen": 1}'"#),
    ("inet", "'10.0.0.1'", "'10.0.0.1/31'"),
    ("int4range", "'[1,2]'", "'[1,2)'"),
    ("citext", "'A'", "'a'"),
    ("pair", "row(1, 'a')", "row(1, null)"),
    ("positive", "1", "2"),
];

#[tokio::test(flavor = "multi_thread")]
async fn values_that_an_operator_takes_for_equal_are_told_apart() {
    let database = Database::new().await;
    database
        .run("create type pair as (a int, b text); create domain positive as int check (value > 0)")
        .await;
    let has_citext =
        database.value("select count(*) from pg_available_extensions where name = 'citext'").await == "1";
    if has_citext {
        database.run("create extension citext").await;
    }
    for (at, (kind, from, to)) in PAIRS.iter().enumerate() {
        if *kind == "citext" && !has_citext {
            continue;
        }
        database
            .run(&format!(
                "create table t{at} (id int primary key, seen int, x {kind}); select relay.watch('t{at}', ignore => '{{seen}}');
                 insert into t{at} values (1, 1, {from})"
            ))
            .await;
        for (x, count) in [(to, 1), (to, 0), (from, 1)] {
            let made = logs(&database, &format!("update t{at} set seen = seen + 1, x = {x}")).await;
            // What PostgreSQL takes apart for nobody is logged each time.
            assert!(made == count || made == 1 && from.contains("u0000"), "{kind}: {from} → {x}: {made}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renamed_column_stays_ignored_and_one_that_is_dropped_and_added_again_does_not() {
    let stage = Stage::new(
        "create table t (id int primary key, v int, seen int, \"To, \"\"do\\'\" int); grant select on t to authenticated;
         select relay.watch('t', ignore => array['seen', 'To, \"do\\'''])",
    )
    .await;
    let database = &stage.database;
    let ignored = "select ignored::text from relay.watched where relation = 't'::regclass and intact";
    assert_eq!(database.value(ignored).await, r#"{seen,"To, \"do\\'"}"#);
    let mut client = stage.join(&token("authenticated", None, json!({}))).await;
    stage.run("insert into t values (1, 1, 1, 1)").await;
    assert_eq!(logs(database, r#"update t set seen = 2, "To, ""do\'" = 2"#).await, 0);
    let mut told = stage.changes(&mut client).await;
    // A rename, and one of the table and its schema; a swap of names.
    for (statement, one, other) in [
        ("alter table t rename seen to last", "last", "v"),
        (
            "begin; alter table t rename last to x; alter table t rename v to last; alter table t rename x to v; commit",
            "v",
            "last",
        ),
        (
            "alter table t rename to u; alter table u rename to t; alter table t alter v type bigint",
            "v",
            "last",
        ),
        ("alter table t add column more int; alter table t drop column more", "v", "last"),
    ] {
        stage.run(statement).await;
        assert_eq!(logs(database, &format!("update t set {one} = {one} + 1")).await, 0, "{statement}");
        assert_eq!(logs(database, &format!("update t set {other} = {other} + 1")).await, 1, "{statement}");
        // Told before the next statement: an image of the type before would be a gap.
        told.extend(stage.changes(&mut client).await);
    }
    stage.run(r#"alter table t drop column "To, ""do\'"; alter table t drop column v; alter table t add column v int"#).await;
    assert_eq!(database.value(ignored).await, "{}");
    assert_eq!(logs(database, "update t set v = 1").await, 1);
    told.extend(stage.changes(&mut client).await);
    assert_eq!(told.len(), 6, "{told:?}");
    // A column that comes to the key identifies rows.
    stage
        .run("select relay.watch('t', ignore => '{v}'); alter table t drop constraint t_pkey; alter table t add primary key (id, v)")
        .await;
    assert_eq!(logs(database, "update t set v = 2").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trigger_function_that_is_older_than_its_table_fails_no_writer_and_loses_no_change() {
    let database = Database::new().await;
    database
        .run(
            "create type mood as enum ('a', 'b'); create domain sure as int not null check (value > 0);
             create table t (id int primary key, v int, seen int); create table e (id int primary key, v int, seen int, m mood);
             create table j (id int primary key, v int, seen int, o json);
             select relay.watch(r, ignore => '{seen}') from unnest('{t,e,j}'::regclass[]) r;
             insert into t values (1, 1, 1); insert into e values (1, 1, 1); insert into j values (1, 1, 1);
             alter event trigger relay_schema_changes disable; alter event trigger relay_schema_drops disable;
             alter event trigger relay_rewrites disable",
        )
        .await;
    for table in ["t", "e", "j"] {
        let writer = database.connect().await;
        let write = async |statement: &str| {
            let before = logged(&database).await;
            let statement = statement.replace("TABLE", table);
            if let Err(error) = writer.batch_execute(&statement).await {
                panic!("{statement}: {error:?}");
            }
            logged(&database).await - before
        };
        let ddl = async |statement: &str| database.run(&statement.replace("TABLE", table)).await;
        assert_eq!(write("update TABLE set seen = 2").await, 0);
        ddl("alter table TABLE rename seen to x; alter table TABLE rename v to seen; alter table TABLE rename x to v").await;
        assert_eq!(write("update TABLE set seen = 2").await, 1, "{table}: a column that has the name now");
        assert_eq!(
            write("update TABLE set v = 3").await,
            1,
            "{table}: what was ignored is logged until then"
        );
        // In one transaction, as the functions are kept for it; and with a snapshot from before.
        assert_eq!(
            write("begin; update TABLE set v = 4; alter table TABLE alter seen type text; update TABLE set seen = 'x';
                   alter table TABLE alter v type sure; update TABLE set v = 5; alter table TABLE add w text default 'w';
                   update TABLE set w = 'x'; commit")
            .await,
            4,
            "{table}"
        );
        ddl("update TABLE set v = 1; select relay.watch('TABLE', ignore => '{v}')").await;
        writer
            .batch_execute("begin isolation level repeatable read; select 1 from pg_class limit 1")
            .await
            .unwrap();
        ddl("alter table TABLE rename v to y; alter table TABLE rename w to v").await;
        writer.batch_execute(&format!("update {table} set v = 'z'; commit")).await.unwrap();
        let last = "select after ->> 'v' from relay.changes order by number desc limit 1";
        assert_eq!(database.value(last).await, "z", "{table}");
        ddl("alter table TABLE drop column y; alter table TABLE drop column v").await;
        assert_eq!(write("update TABLE set seen = 'y'").await, 1, "{table}");
        assert_eq!(
            write("alter table TABLE add column v text; update TABLE set v = 'y'").await,
            1,
            "{table}"
        );
        database.run("select relay.repair()").await;
        assert_eq!(write("update TABLE set v = 'z'").await, 1, "{table}: another column of this name");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_column_that_there_is_not_or_that_belongs_to_the_key_is_refused_with_the_cure() {
    let database = Database::new().await;
    database
        .run(
            "create table t (id int, part int, v text, primary key (id, part)); create materialized view m as select 1 as id, 2 as v;
             create unique index on m (id)",
        )
        .await;
    for (call, said, cure) in [
        ("'t', ignore => '{v,w}'", "has no column w", "v: select relay.watch('public.t', ignore"),
        ("'t', ignore => '{ctid}'", "has no column ctid", "Its columns are v"),
        ("'t', ignore => '{null}'", "has no column null", "Its columns are v"),
        (
            "'t', ignore => '{v,part}'",
            "column part of public.t cannot be ignored",
            "select relay.watch('public.t', ignore => '{v}')",
        ),
        (
            "'m', ignore => '{v}'",
            "materialized view public.m cannot ignore",
            "select relay.watch('public.m')",
        ),
    ] {
        let error = database.client.batch_execute(&format!("select relay.watch({call})")).await.unwrap_err();
        let error = error.as_db_error().unwrap();
        assert!(error.message().contains(said), "{call}: {error:?}");
        assert!(error.hint().unwrap().contains(cure), "{call}: {error:?}");
        assert_eq!(database.value("select count(*) from relay.watched").await, "0");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_called_again_changes_what_is_ignored_and_doctor_install_and_unwatch_know_of_it() {
    let database = Database::new().await;
    database
        .run(
            "create table t (id int primary key, a int, b int); alter table t enable row level security;
             create policy busy on t for select using (a > 0); grant select on t to authenticated; insert into t values (1, 1, 1);
             create publication p for table t; select relay.watch_publication('p')",
        )
        .await;
    let counts = async || {
        (logs(&database, "update t set a = a + 1").await, logs(&database, "update t set b = b + 1").await)
    };
    let watched = "select format('%s %s', ignored, intact) from relay.watched";
    assert_eq!(counts().await, (1, 1));
    let url = ["--database-url", &database.url];
    for (command, ignored, expected) in [
        (vec!["watch", "t", "--ignore", "a,b"], "{a,b} t", (0, 0)),
        (vec!["watch", "t", "--ignore", "a"], "{a} t", (0, 1)),
        (vec!["watch", "t"], "{} t", (1, 1)),
        (vec!["watch", "t", "--ignore", "b"], "{b} t", (1, 0)),
        (vec!["unwatch", "t"], "{} t", (1, 1)),
        (vec!["watch", "t", "--ignore", "a"], "{a} t", (0, 1)),
    ] {
        let (code, said, error) = output(&[&command[..], &url].concat()).await;
        assert_eq!(code, 0, "{command:?}: {said}{error}");
        assert_eq!(database.value(watched).await, ignored, "{command:?}");
        assert_eq!(counts().await, expected, "{command:?}");
    }
    let (_, said, _) = output(&[&["doctor"][..], &url].concat()).await;
    assert!(said.contains("policy busy reads the ignored column a"), "{said}");
    let id = database.value("select id from relay.watched").await;
    let alter = format!(
        "create or replace function relay.capture_{id}_update() returns trigger language plpgsql security definer as 'begin return null; end'"
    );
    database.run(&alter).await;
    assert_eq!(database.value(watched).await, "{a} f");
    install(&mut database.connect().await).await.unwrap();
    assert_eq!(database.value(watched).await, "{a} t");
    assert_eq!(counts().await, (0, 1));
}
