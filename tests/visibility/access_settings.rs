//! Settings of a database and its encoding change nothing of who may see what, and stop no other reader.

use relay::postgres::locks::Lock;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::time::timeout;

use crate::support::client::Client;
use crate::support::database::{Database, JUDGE, READER, make_logins};
use crate::support::http::get;
use crate::support::relay::Relay;
use crate::support::stage::Stage;
use crate::support::{ANN, program};
use crate::support::{PATIENCE, token};
use crate::visibility::policy_leaks::{table, user};

/// Settings of the database that mean something else than those with which the relay was written.
const ODD: &[&str] = &[
    "standard_conforming_strings = off",
    "escape_string_warning = on",
    "backslash_quote = off",
    "quote_all_identifiers = on",
    "transform_null_equals = on",
    "array_nulls = off",
    "xmloption = document",
    "search_path = odd, public, pg_catalog",
    "default_transaction_isolation = 'serializable'",
    "default_transaction_read_only = on",
    "default_transaction_deferrable = on",
    "row_security = off",
    "check_function_bodies = off",
    "client_min_messages = debug1",
    "client_encoding = 'SQL_ASCII'",
    "statement_timeout = '2s'",
    "lock_timeout = '1s'",
    "idle_in_transaction_session_timeout = '1s'",
    "idle_session_timeout = '1s'",
    "DateStyle = 'SQL, DMY'",
    "IntervalStyle = 'sql_standard'",
    "extra_float_digits = -10",
    "bytea_output = 'escape'",
    "timezone = 'Asia/Kolkata'",
    "synchronous_commit = off",
    "plpgsql.extra_errors = 'all'",
    "plpgsql.variable_conflict = 'use_column'",
];

/// Conditions whose text reads differently under other settings.
const CONDITIONS: &[&str] = &[
    r"name = 'a\' or name = ' or true --'",
    r"lower(name) = 'b\''s' or name = 'x\\y'",
    r"name in ('a\', 'b\''s') and id is not null",
    r"upper(name) = '\'' or true --' or name = 'q''''s'",
    r"lower(name) in ('\'' or true --', 'q''''s', 'q\''''s')",
    r#"name = (auth.jwt() ->> 'a\n') or "Odd" = 'A\'"#,
    r"exists (select from members m where m.name = THIS.name and m.name <> 'c\')",
];

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_database_sets_the_relay_installs_and_shows_what_the_tables_show() {
    let database = Database::bare().await;
    let (_, name) = database.url.rsplit_once('/').unwrap();
    // An operator that precedes the system's own for sessions with such a path.
    database
        .run(
            "create schema odd; create function odd.no(xid8, xid8) returns bool language sql as 'select false';
             create operator odd.>= (function = odd.no, leftarg = xid8, rightarg = xid8);
             grant usage on schema odd to public",
        )
        .await;
    for odd in ODD {
        database.run(&format!("alter database {name} set {odd}")).await;
    }
    let (code, _, said) = program::output(&["install", "--database-url", &database.url]).await;
    assert_eq!(code, 0, "{said}");
    make_logins(&database.client).await;
    for login in [READER, JUDGE] {
        database
            .run(&format!("alter role {login} in database {name} set standard_conforming_strings = off"))
            .await;
    }
    let mut sql = String::from(
        r"create table members (name text); insert into members values ('a\'), ('c\'), ('b\''s');
          grant select on members to authenticated;",
    );
    for (number, condition) in CONDITIONS.iter().enumerate() {
        sql += &table(
            &format!("t{number}"),
            r#"name text, "Odd" text"#,
            &condition.replace("THIS", &format!("t{number}")),
        );
    }
    database.run(&sql).await;
    let relay = Relay::start(&database.url).await;
    let claims = json!({r"a\n": r"q\"});
    let token = token("authenticated", Some(ANN), claims.clone());
    let mut client = Client::connect(&relay, &token).await;
    client.subscribe("realtime:odd", json!([{"event": "*", "schema": "public"}])).await;
    let filter = r"name=eq.a\";
    let mut filtered = Client::connect(&relay, &token).await;
    filtered
        .subscribe(
            "realtime:odd",
            json!([{"event": "*", "schema": "public", "table": "t0", "filter": filter}]),
        )
        .await;
    let names =
        [r"a\", r" or true --", r"B\''s", r"b\''s", r"x\\y", r"xy", r"c\", r"q\", "a", r"q''''s", r"q\''''s"];
    let mut shown = Vec::new();
    for number in 0..CONDITIONS.len() {
        let rows: Vec<String> =
            names.iter().enumerate().map(|(id, name)| format!(r"({id}, '{name}', 'A\')")).collect();
        database.run(&format!("insert into t{number} values {}", rows.join(", "))).await;
        let become_reader = format!(
            "begin; select set_config('request.jwt.claims', $c${claims}$c$, true); set local role authenticated"
        );
        database.client.batch_execute(&become_reader).await.unwrap();
        let rows = database
            .client
            .query(&format!("select id::text from t{number} order by t{number}.id"), &[])
            .await
            .unwrap();
        database.client.batch_execute("rollback").await.unwrap();
        shown.extend(rows.iter().map(|row| format!("t{number} {}", row.get::<_, String>(0))));
    }
    assert!(shown.len() > CONDITIONS.len(), "{shown:?}");
    let mut told = Vec::new();
    while told.len() < shown.len() {
        let Some(frame) = client.frame_within(PATIENCE / 2).await else { break };
        let change = &frame[4]["data"];
        if frame[3] == "postgres_changes" {
            told.push(format!("{} {}", change["table"].as_str().unwrap(), change["record"]["id"]));
        }
    }
    assert_eq!(told, shown);
    assert_eq!(filtered.change().await["record"]["name"], r"a\");
    let rows = get(relay.address, &format!("/realtime/v1/changes?table=t0&apikey={token}"), "").await;
    let of_first = shown.iter().filter(|row| row.starts_with("t0")).count();
    assert_eq!(rows.body["rows"].as_array().map(Vec::len), Some(of_first), "{rows:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_character_that_the_database_cannot_encode_is_refused_to_its_client_alone() {
    for encoding in ["LATIN1", "EUC_JP"] {
        let database = Database::encoded(encoding).await;
        let mut own = database.connect().await;
        relay::postgres::install::install(&mut own).await.unwrap();
        make_logins(&database.client).await;
        database.run(&table("own", "owner uuid, name text", "owner = auth.uid()")).await;
        let member =
            "exists (select from members m where m.team = TABLE.team and m.member = auth.jwt() ->> 'org')";
        database
            .run("create table members (team int, member text); grant select on members to authenticated")
            .await;
        database.run(&table("team", "team int", member)).await;
        let relay = Relay::start(&database.url).await;
        let binding = json!([{"event": "*", "schema": "public"}]);
        let mut ann = Client::connect(&relay, &user(ANN)).await;
        ann.subscribe("realtime:ann", binding.clone()).await;
        let mut id = 0;
        let mut goes_on = async |ann: &mut Client, what: &str| {
            id += 1;
            database
                .run(&format!(
                    "insert into team values ({id}, 1); insert into own values ({id}, '{ANN}', 'x')"
                ))
                .await;
            assert_eq!(ann.change().await["record"]["id"], id, "{encoding}: {what}");
        };
        // A letter of Gujarati: neither has it.
        for (role, sub, more) in [
            ("r\u{a85}le", ANN, json!({})),
            ("authenticated", "s\u{a85}b", json!({})),
            ("authenticated", ANN, json!({"org": "\u{a85}"})),
            ("authenticated", ANN, json!({"\u{a85}": {"x": ["\u{a85}"]}})),
        ] {
            let odd = token(role, Some(sub), more.clone());
            let mut client = Client::connect(&relay, &odd).await;
            let answer = client.try_subscribe("realtime:odd", binding.clone()).await;
            let said = answer.to_string();
            assert!(said.contains("a character that the database's encoding does not have"), "{role} {said}");
            let rows = get(relay.address, &format!("/realtime/v1/changes?table=own&apikey={odd}"), "").await;
            assert_eq!(rows.status, 400, "{rows:?}");
            goes_on(&mut ann, role).await;
        }
        for (topic, binding) in [
            ("realtime:\u{a85}", json!([{"event": "*", "schema": "public"}])),
            (
                "realtime:filter",
                json!([{"event": "*", "schema": "public", "table": "own", "filter": "name=eq.\u{a85}"}]),
            ),
            (
                "realtime:column",
                json!([{"event": "*", "schema": "public", "table": "own", "filter": "\u{a85}=eq.1"}]),
            ),
            ("realtime:table", json!([{"event": "*", "schema": "public", "table": "\u{a85}"}])),
            ("realtime:schema", json!([{"event": "*", "schema": "\u{a85}"}])),
            (
                "realtime:select",
                json!([{"event": "*", "schema": "public", "table": "own", "select": ["\u{a85}"]}]),
            ),
        ] {
            let mut client = Client::connect(&relay, &user(ANN)).await;
            client.try_subscribe(topic, binding).await;
            goes_on(&mut ann, topic).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_installation_that_waits_for_another_says_for_whom_and_goes_on_when_that_is_gone() {
    let database = Database::bare().await;
    let holder = database.connect().await;
    let pid: i32 = holder.query_one("select pg_backend_pid()", &[]).await.unwrap().get(0);
    holder
        .batch_execute(&format!(
            "set application_name = 'somebody'; select pg_advisory_lock({})",
            Lock::Install
        ))
        .await
        .unwrap();
    let mut installing = program::relay(&["install", "--database-url", &database.url]).spawn().unwrap();
    let mut lines = BufReader::new(installing.stderr.take().unwrap()).lines();
    let said = timeout(PATIENCE, lines.next_line()).await.expect("nothing is said").unwrap().unwrap();
    assert!(
        said.contains("waiting") && said.contains(&format!("process {pid} of postgres, somebody")),
        "{said}"
    );
    drop(holder);
    let ended = timeout(PATIENCE, installing.wait()).await.expect("it goes on").unwrap();
    assert!(ended.success());
    // One that is interrupted leaves the lock to the next.
    let holder = database.connect().await;
    holder.batch_execute(&format!("select pg_advisory_lock({})", Lock::Install)).await.unwrap();
    let mut installing = program::relay(&["install", "--database-url", &database.url]).spawn().unwrap();
    let mut lines = BufReader::new(installing.stderr.take().unwrap()).lines();
    timeout(PATIENCE, lines.next_line()).await.expect("nothing is said").unwrap().unwrap();
    let interrupt =
        std::process::Command::new("kill").args(["-TERM", &installing.id().unwrap().to_string()]).status();
    assert!(interrupt.unwrap().success());
    timeout(Duration::from_secs(5), installing.wait()).await.expect("it ends").unwrap();
    drop(holder);
    let (code, _, said) = program::output(&["install", "--database-url", &database.url]).await;
    assert_eq!(code, 0, "{said}");
}

/// A serializable transaction fails when what it read and what it wrote cross with two others. Here one crossing is the application's own,
/// which is harmless; what the relay reads or writes in its place must add none.
#[tokio::test(flavor = "multi_thread")]
async fn a_writer_of_any_isolation_level_succeeds_with_the_relay_where_it_would_without() {
    let database = Database::new().await;
    database
        .run(
            "create type mood as enum ('sad', 'glad'); create domain positive as int check (value > 0); create type pair as (a int, b mood);
             create table enums (id int primary key, n int, v mood); create table domains (id int primary key, n int, v positive);
             create table rows (id int primary key, n int, v pair); create table plain (id int primary key, n int, v text);
             create table other (id int); create table third (id int);
             insert into enums values (1, 1, 'sad'); insert into domains values (1, 1, 1);
             insert into rows values (1, 1, '(1,sad)'); insert into plain values (1, 1, 'x');
             select relay.watch('enums'), relay.watch('domains'), relay.watch('rows'), relay.watch('plain')",
        )
        .await;
    let mut round = 0;
    for level in ["serializable", "repeatable read", "read committed"] {
        for table in ["enums", "domains", "rows", "plain"] {
            for ddl in [
                "alter type mood add value 'm_ROUND'",
                "alter type pair add attribute a_ROUND int",
                "alter table TABLE add column c_ROUND int",
                "create table t_ROUND (id int); select relay.watch('t_ROUND')",
                "create policy p_ROUND on TABLE for select using (true)",
            ] {
                round += 1;
                let ddl = ddl.replace("ROUND", &round.to_string()).replace("TABLE", "third");
                let begin = format!("begin isolation level {level}");
                let [reader, writer, schema] =
                    [database.connect().await, database.connect().await, database.connect().await];
                let run = async |session: &tokio_postgres::Client, sql: &str| {
                    session.batch_execute(sql).await.unwrap_or_else(|error| {
                        panic!("{level} {table} {ddl}: {sql}: {}", error.as_db_error().unwrap())
                    });
                };
                run(
                    &reader,
                    &format!("{begin}; select * from {table} where id = 1; insert into other values (1)"),
                )
                .await;
                run(&writer, &format!("{begin}; update {table} set n = n + 1 where id = 1; insert into {table} values (100 + {round})")).await;
                run(&schema, &format!("set default_transaction_isolation = '{level}'")).await;
                run(&schema, &ddl).await;
                run(
                    &writer,
                    &format!("update {table} set n = n + 1 where id = 1; delete from {table} where id > 100"),
                )
                .await;
                run(&writer, "commit").await;
                run(&reader, "commit").await;
            }
        }
    }
}

/// What a transaction of an older snapshot does to the schema, while others have changed rules and shapes since.
#[tokio::test(flavor = "multi_thread")]
async fn a_schema_change_of_any_isolation_level_succeeds_where_it_would_without_the_relay() {
    let database = Database::new().await;
    database.run("create table t (id int primary key); create table u (id int primary key); select relay.watch('t'), relay.watch('u')").await;
    for (number, level) in ["serializable", "repeatable read", "read committed"].iter().enumerate() {
        let older = database.connect().await;
        older.batch_execute(&format!("begin isolation level {level}; select count(*) from t")).await.unwrap();
        database
            .run(&format!(
                "create policy p{number} on u for select using (true); alter table u add column c{number} int;
                 grant select on u to authenticated; revoke select on u from authenticated"
            ))
            .await;
        for statement in [
            format!("create policy p{number} on t for select using (true)"),
            format!("alter table t add column c{number} int"),
            format!("create table v{number} (id int)"),
            String::from("grant select on t to authenticated"),
            String::from("insert into t (id) values (default) on conflict do nothing")
                .replace("default", &number.to_string()),
        ] {
            older
                .batch_execute(&statement)
                .await
                .unwrap_or_else(|error| panic!("{level} {statement}: {error:?}"));
        }
        older.batch_execute("commit").await.unwrap_or_else(|error| panic!("{level}: {error:?}"));
    }
}

/// Conditions whose verdict follows a setting, each with a value that the condition shows under what the database has set.
const BY_SETTING: &[(&str, &str, &str)] = &[
    ("timestamptz", "v::date = '2026-01-02'", "2026-01-01 20:00+00"),
    ("timestamptz", "to_char(v, 'HH24:MI') = '05:30'", "2026-01-01 00:00+00"),
    ("timestamp", "v::timestamptz < '2026-01-01 00:00+00'", "2026-01-01 05:00"),
    ("date", "v::text = '31/12/2026'", "2026-12-31"),
    ("interval", "v::text = '1-2'", "14 months"),
    ("bytea", r"v::text = '\001'", r"\x01"),
    ("float8", "v::text = '0.33333'", "0.333333333333333"),
];

#[tokio::test(flavor = "multi_thread")]
async fn policies_are_judged_with_the_settings_of_a_users_own_session_and_rows_spelled_with_those_of_changes()
{
    let database = Database::new().await;
    let (_, name) = database.url.rsplit_once('/').unwrap();
    for setting in [
        "timezone = 'Asia/Kolkata'",
        "DateStyle = 'SQL, DMY'",
        "IntervalStyle = 'sql_standard'",
        "bytea_output = 'escape'",
        "extra_float_digits = -10",
    ] {
        database.run(&format!("alter database {name} set {setting}")).await;
    }
    let own = database.connect().await;
    for (number, (kind, condition, _)) in BY_SETTING.iter().enumerate() {
        own.batch_execute(&table(&format!("shown{number}"), &format!("v {kind}"), condition)).await.unwrap();
        own.batch_execute(&table(
            &format!("hidden{number}"),
            &format!("v {kind}"),
            &format!("not ({condition})"),
        ))
        .await
        .unwrap();
    }
    let relay = Relay::start(&database.url).await;
    let token = token("authenticated", Some(ANN), json!({}));
    let mut client = Client::connect(&relay, &token).await;
    client.subscribe("realtime:all", json!([{"event": "*", "schema": "public"}])).await;
    for (number, (kind, condition, value)) in BY_SETTING.iter().enumerate() {
        // Three, so that a row comes after one that was spelled.
        let values = "(1, V), (2, V), (3, V)".replace('V', &format!("'{value}'::{kind}"));
        let insert = format!(
            "set timezone = 'UTC'; set datestyle = 'ISO'; insert into hidden{number} values {values}; insert into shown{number} values {values}"
        );
        database.run(&insert).await;
        let mut told = Vec::new();
        for _ in 0..3 {
            let change = client.change().await;
            assert_eq!(change["table"], format!("shown{number}"), "{condition}");
            told.push(change["record"].clone());
        }
        for (table, expected) in [("shown", told), ("hidden", Vec::new())] {
            let path = format!("/realtime/v1/changes?table={table}{number}&apikey={token}");
            let rows = get(relay.address, &path, "").await;
            assert_eq!(rows.body["rows"], json!(expected), "{table} {condition}");
        }
    }
}

/// Bytes that a database of each encoding may hold, and of which Unicode has no character; the last is one that it has.
const ILLEGIBLE: &[(&str, &str)] =
    &[("SQL_ASCII", r"\xff"), ("SQL_ASCII", r"\x61c3"), ("WIN1252", r"\x81"), ("EUC_JP", r"\x8ffefe")];

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_not_utf_8_is_delivered_in_short_form_and_stops_no_other() {
    for (encoding, bytes) in ILLEGIBLE {
        let database = Database::encoded(encoding).await;
        let mut own = database.connect().await;
        relay::postgres::install::install(&mut own).await.unwrap();
        make_logins(&database.client).await;
        database.run(&table("own", "owner uuid, name text, shout text", "owner = auth.uid()")).await;
        database.run(&table("named", "name text", "name <> 'x'")).await;
        database.run("alter table own replica identity full").await;
        let relay = Relay::start(&database.url).await;
        let mut ann = Client::connect(&relay, &user(ANN)).await;
        ann.subscribe("realtime:ann", json!([{"event": "*", "schema": "public"}])).await;
        let odd = format!("convert_from('{bytes}', '{encoding}')");
        database
            .run(&format!(
                "insert into named values (1, {odd});
                 insert into own values (1, '{ANN}', 'a', 'b'); insert into own values (2, '{ANN}', {odd}, 'b');
                 update own set name = {odd}, shout = {odd} where id = 1; delete from own where id = 2;
                 insert into own values (3, '{ANN}', 'a', 'é')"
            ))
            .await;
        let error = json!(["Error 413: Payload Too Large"]);
        for (kind, id, name, shout, is_short) in [
            ("INSERT", 1, json!("a"), json!("b"), false),
            ("INSERT", 2, json!(null), json!("b"), true),
            ("UPDATE", 1, json!(null), json!(null), true),
            ("DELETE", 2, json!(null), json!(null), true),
            ("INSERT", 3, json!("a"), json!("é"), false),
        ] {
            let change = ann.change().await;
            assert_eq!(
                (&change["table"], &change["type"]),
                (&json!("own"), &json!(kind)),
                "{encoding} {change}"
            );
            let record = if kind == "DELETE" { &change["old_record"] } else { &change["record"] };
            assert_eq!(record["id"], id, "{encoding} {change}");
            if kind != "DELETE" {
                assert_eq!((&record["name"], &record["shout"]), (&name, &shout), "{encoding} {change}");
            }
            assert_eq!(change["errors"] == error, is_short, "{encoding} {change}");
        }
        let rows =
            get(relay.address, &format!("/realtime/v1/changes?table=own&apikey={}", user(ANN)), "").await;
        assert!(rows.status >= 400, "{rows:?}");
        relay.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn schema_changes_and_calls_warn_of_nothing_where_backslashes_are_escapes() {
    let stage = Stage::new(
        "create table t (id int primary key, v text); create table u (id int primary key);
         create materialized view m as select id from t; create unique index on m (id); grant select on t, u, m to authenticated",
    )
    .await;
    let (session, mut warnings) = stage.database.warned().await;
    session
        .batch_execute("set standard_conforming_strings = off; set escape_string_warning = on")
        .await
        .unwrap();
    for statement in [
        "select relay.watch('t'), relay.watch('m')",
        "insert into t values (1, 'x')",
        "create policy p on t using (id > 0)",
        "alter table t enable row level security",
        "grant select on u to anon",
        "alter table t add column c float default random()",
        "alter table t alter v type varchar(9)",
        "create type mood as enum ('a')",
        "alter type mood rename value 'a' to 'b'",
        "create temporary table x (id int)",
        "create temporary view y as select 1 as one",
        "drop view y",
        "create function f() returns int language sql as 'select 1'",
        "drop table u",
        "truncate t",
        "select relay.refresh('m'), relay.cursor(), relay.notes('t'), relay.retain('1 day')",
        "select * from relay.watched, relay.health, relay.refresh_jobs",
        "select relay.allow('m', 'id > 0')",
        "select relay.refresh_every('m', '1 hour')",
        "select relay.refresh_stop('m'), relay.disallow('m')",
        "refresh materialized view m",
        "select relay.watch('t', ignore => '{c}')",
        "select relay.webhook('t', 'https://pager.example/', filter => 'id=eq.1', role => 'authenticated')",
        "select relay.webhook('t', 'https://pager.example/w?x', name => 'a hook', in_order => false, role => 'authenticated')",
        "select relay.enable_webhook('a hook'), relay.retry_dead_letters('a hook'), relay.discard_dead_letters('a hook')",
        "select relay.drop_webhook('public.t'), relay.drop_webhook('a hook')",
        "update t set c = 1",
        "select relay.unwatch('t'), relay.trim_changelog()",
    ] {
        session.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
        session.batch_execute("do $$ begin raise warning 'the end'; end $$").await.unwrap();
        assert_eq!(warnings.recv().await.unwrap(), "the end", "{statement}");
    }
}
