//! What the triggers log, and how it arrives.

use std::collections::HashMap;

use futures_util::{SinkExt, StreamExt};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::Message;

use relay::model::log::cursor::{Cursor, Epoch};

use crate::support::client::Client;
use crate::support::database::Database;
use crate::support::relay::Relay;
use crate::support::token;

/// A database with this schema, a relay, and a subscriber to everything that is watched.
async fn scene(schema: &str) -> (Database, Relay, Client) {
    let database = Database::new().await;
    database.run(schema).await;
    let relay = Relay::start(&database.url).await;
    let mut client = Client::connect(&relay, &token("authenticated", None, json!({}))).await;
    client.subscribe("realtime:all", json!([{"event": "*", "schema": "public"}])).await;
    (database, relay, client)
}

/// Operation, old row and new row of a change, which must have come whole.
fn told(change: &Value) -> (Value, Value, Value) {
    assert_eq!(change["errors"], Value::Null, "{change}");
    (change["type"].clone(), change["old_record"].clone(), change["record"].clone())
}

#[track_caller]
fn check(change: &Value, operation: &str, old: Value, new: Value) {
    assert_eq!(told(change), (json!(operation), old, new));
}

const T: &str = "create table t (id int primary key, v text); grant select on t to authenticated; select relay.watch('t');";

#[tokio::test(flavor = "multi_thread")]
async fn a_row_is_told_when_it_comes_changes_and_goes() {
    let (database, relay, mut client) = scene(T).await;
    database.run("insert into t values (1, 'a')").await;
    database.run("update t set v = 'b'").await;
    database.run("update t set id = 2").await;
    database.run("delete from t").await;
    check(&client.change().await, "INSERT", Value::Null, json!({"id": 1, "v": "a"}));
    check(&client.change().await, "UPDATE", json!({"id": 1}), json!({"id": 1, "v": "b"}));
    check(&client.change().await, "UPDATE", json!({"id": 1}), json!({"id": 2, "v": "b"}));
    check(&client.change().await, "DELETE", json!({"id": 2}), Value::Null);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_full_replica_identity_the_old_row_is_whole() {
    let (database, relay, mut client) = scene(&format!("{T} alter table t replica identity full")).await;
    database.run("insert into t values (1, 'a'); update t set v = null; delete from t").await;
    check(&client.change().await, "INSERT", Value::Null, json!({"id": 1, "v": "a"}));
    check(&client.change().await, "UPDATE", json!({"id": 1, "v": "a"}), json!({"id": 1, "v": null}));
    check(&client.change().await, "DELETE", json!({"id": 1, "v": null}), Value::Null);
    relay.stop().await;
}

/// Type, value as SQL, and the JSON that it is on the wire, character by character.
const TYPES: &[(&str, &str, &str)] = &[
    ("int2", "-32768", "-32768"),
    ("int8", "9223372036854775807", "9223372036854775807"),
    ("oid", "4294967295", r#""4294967295""#),
    ("numeric", "12345678901234567890.123456789012345678900", "12345678901234567890.123456789012345678900"),
    ("numeric(6,2)", "1", "1.00"),
    ("numeric", "'NaN'", r#""NaN""#),
    ("numeric", "'Infinity'", r#""Infinity""#),
    ("float4", "1.1", "1.1"),
    ("float8", "0.1::float8 + 0.2::float8", "0.30000000000000004"),
    ("float8", "'NaN'", r#""NaN""#),
    ("float8", "'-Infinity'", r#""-Infinity""#),
    ("bool", "true", "true"),
    ("text", r#"E'"\\\n\tü€😀'"#, r#""\"\\\n\tü€😀""#),
    ("varchar(5)", "'ab'", r#""ab""#),
    ("char(4)", "'ab'", r#""ab  ""#),
    ("text", "''", r#""""#),
    ("text", "null", "null"),
    ("bytea", r"'\xdeadbeef'", r#""deadbeef""#),
    ("bytea", r"'\x'", r#""""#),
    ("bytea", "null", "null"),
    ("json", r#"'{"b": 1.50, "a": [null]}'"#, r#"{"b": 1.50, "a": [null]}"#),
    ("jsonb", r#"'{"b":1.50,"a":"42"}'"#, r#"{"a": "42", "b": 1.50}"#),
    ("jsonb", r#"'"42"'"#, r#""42""#),
    ("timestamptz", "'2026-01-02 03:04:05.678901+02'", r#""2026-01-02T01:04:05.678901+00:00""#),
    ("timestamptz", "'infinity'", r#""infinity""#),
    ("timestamp", "'2026-01-02 03:04:05'", r#""2026-01-02T03:04:05""#),
    ("date", "'2026-01-02'", r#""2026-01-02""#),
    ("time", "'03:04:05.5'", r#""03:04:05.5""#),
    ("timetz", "'03:04:05+02'", r#""03:04:05+02""#),
    ("interval", "'1 day 2 hours'", r#""1 day 02:00:00""#),
    ("uuid", "'11111111-1111-4111-8111-111111111111'", r#""11111111-1111-4111-8111-111111111111""#),
    ("inet", "'192.168.0.1/24'", r#""192.168.0.1/24""#),
    ("cidr", "'10.0.0.0/8'", r#""10.0.0.0/8""#),
    ("macaddr", "'08:00:2b:01:02:03'", r#""08:00:2b:01:02:03""#),
    ("int4range", "'[1,4]'", r#""[1,5)""#),
    ("tstzrange", "'[2026-01-02 00:00+00,)'", r#""[\"2026-01-02 00:00:00+00\",)""#),
    ("int4multirange", "'{[1,2],[7,9)}'", r#""{[1,3),[7,9)}""#),
    ("money", "1.5", r#""$1.50""#),
    ("bit(3)", "B'101'", r#""101""#),
    ("tsvector", "'a:1 b:2'", r#""'a':1 'b':2""#),
    ("point", "'(1,2)'", r#""(1,2)""#),
    ("int[]", "'{1,NULL,3}'", "[1,null,3]"),
    ("int[]", "'{{1,2},{3,4}}'", "[[1,2],[3,4]]"),
    ("int[]", "'{}'", "[]"),
    ("text[]", r#"array['a', 'b"c', null]"#, r#"["a","b\"c",null]"#),
    ("timestamptz[]", "array['2026-01-02 03:04:05+00'::timestamptz]", r#"["2026-01-02T03:04:05+00:00"]"#),
    ("mood", "'so so'", r#""so so""#),
    ("mood[]", "array['fine'::mood]", r#"["fine"]"#),
    ("positive", "5", "5"),
    ("pair", "row(1, 'a')", r#"{"x":1,"y":"a"}"#),
    ("pair[]", "array[row(1, 'a')::pair, null]", r#"[{"x":1,"y":"a"},null]"#),
];

const NEW_TYPES: &str =
    "create type mood as enum ('fine', 'so so'); create domain positive as int check (value > 0);
    create type pair as (x int, y text);";

/// The next change as it stands in the frame: numbers keep all their digits.
async fn raw_record(relay: &Relay, trigger: impl Future<Output = ()>) -> HashMap<String, String> {
    #[derive(Deserialize)]
    struct Payload<'a> {
        #[serde(borrow)]
        data: Data<'a>,
    }
    #[derive(Deserialize)]
    struct Data<'a> {
        #[serde(borrow)]
        record: HashMap<String, &'a RawValue>,
    }
    let key = token("authenticated", None, json!({}));
    let url = format!("ws://{}/realtime/v1/websocket?apikey={key}&vsn=2.0.0", relay.address);
    let (mut socket, _) = connect_async(url).await.unwrap();
    let config = json!({"config": {"postgres_changes": [{"event": "*", "schema": "public", "table": "t"}]}});
    socket
        .send(Message::text(json!(["1", "1", "realtime:t", "phx_join", config]).to_string()))
        .await
        .unwrap();
    let mut frame = async |event: &str| loop {
        let Message::Text(text) = socket.next().await.unwrap().unwrap() else { continue };
        let parts: Vec<&RawValue> = serde_json::from_str(&text).unwrap();
        if parts[3].get() == format!("{event:?}") {
            return parts[4].get().to_owned();
        }
    };
    frame("system").await;
    trigger.await;
    let payload = frame("postgres_changes").await;
    let payload: Payload<'_> = serde_json::from_str(&payload).unwrap();
    payload.data.record.into_iter().map(|(name, value)| (name, value.get().to_owned())).collect()
}

fn table_of_types() -> String {
    let columns =
        TYPES.iter().enumerate().map(|(n, (kind, ..))| format!(", c{n} {kind}")).collect::<String>();
    format!(
        "{NEW_TYPES} create table t (id serial primary key{columns}); grant select on t to authenticated; select relay.watch('t')"
    )
}

fn row_of_types() -> String {
    format!(
        "insert into t values (default{})",
        TYPES.iter().map(|(_, sql, _)| format!(", {sql}")).collect::<String>()
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn every_type_is_written_as_clients_expect_it() {
    let database = Database::new().await;
    database.run(&table_of_types()).await;
    let relay = Relay::start(&database.url).await;
    let record = raw_record(&relay, database.run(&row_of_types())).await;
    for (n, (kind, sql, expected)) in TYPES.iter().enumerate() {
        assert_eq!(record[&format!("c{n}")], *expected, "{kind} {sql}");
    }
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_writers_settings_and_rights_do_not_show() {
    let (database, relay, mut client) = scene(&table_of_types()).await;
    database.run(&row_of_types()).await;
    let mut plain = client.change().await["record"].clone();
    let writer = database.connect().await;
    // A role belongs to the whole cluster, hence the name.
    let role = format!("writer_{}", std::process::id());
    let odd = format!(
        "create role {role}; grant insert on t to {role}; grant usage on sequence t_id_seq to {role};
         create schema odd; grant usage on schema odd to {role};
         create function odd.row_to_json(anyelement) returns json language sql as $$ select 'null'::json $$;
         set timezone = 'Asia/Tokyo'; set datestyle = 'German'; set intervalstyle = 'iso_8601'; set bytea_output = 'escape';
         set extra_float_digits = -3; set quote_all_identifiers = on; set row_security = off; set jit = off;
         set plan_cache_mode = force_generic_plan; set session_replication_role = replica; set synchronous_commit = off;
         set search_path = odd, pg_temp, public, pg_catalog; set role {role}"
    );
    writer.batch_execute(&odd).await.unwrap();
    writer.batch_execute(&row_of_types()).await.unwrap();
    let mut odd = client.change().await["record"].clone();
    plain["id"] = Value::Null;
    odd["id"] = Value::Null;
    assert_eq!(odd, plain);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn copy_merge_upsert_and_cascades_are_captured() {
    let (database, relay, mut client) = scene(
        "create table parent (id int primary key, v int);
         create table child (id int primary key, parent int references parent on update cascade on delete cascade);
         create table note (id int primary key, parent int references parent on delete set null);
         grant select on parent, child, note to authenticated;
         select relay.watch('parent'), relay.watch('child'), relay.watch('note')",
    )
    .await;
    let copy = database.client.copy_in("copy parent from stdin").await.unwrap();
    let mut copy = Box::pin(copy);
    copy.send("1\t10\n2\t20\n".as_bytes()).await.unwrap();
    copy.close().await.unwrap();
    check(&client.change().await, "INSERT", Value::Null, json!({"id": 1, "v": 10}));
    check(&client.change().await, "INSERT", Value::Null, json!({"id": 2, "v": 20}));

    database
        .run("insert into parent values (2, 21), (3, 30) on conflict (id) do update set v = excluded.v")
        .await;
    check(&client.change().await, "UPDATE", json!({"id": 2}), json!({"id": 2, "v": 21}));
    check(&client.change().await, "INSERT", Value::Null, json!({"id": 3, "v": 30}));
    database.run("insert into parent values (3, 31) on conflict do nothing").await;

    if database.value("select current_setting('server_version_num')::int >= 150000").await == "t" {
        database
            .run(
                "merge into parent p using (values (1, null), (2, 22), (4, 40)) n (id, v) on p.id = n.id
                 when matched and n.v is null then delete when matched then update set v = n.v
                 when not matched then insert values (n.id, n.v)",
            )
            .await;
        let mut merged =
            vec![told(&client.change().await), told(&client.change().await), told(&client.change().await)];
        merged.sort_by_key(|(operation, ..)| operation.to_string());
        assert_eq!(
            merged,
            [
                (json!("DELETE"), json!({"id": 1}), Value::Null),
                (json!("INSERT"), Value::Null, json!({"id": 4, "v": 40})),
                (json!("UPDATE"), json!({"id": 2}), json!({"id": 2, "v": 22})),
            ]
        );
    }

    database.run("insert into child values (1, 3); insert into note values (1, 3)").await;
    assert_eq!(client.change().await["table"], "child");
    assert_eq!(client.change().await["table"], "note");
    database.run("update child set parent = null where id = 99; delete from note where id = 99").await;
    database
        .run("alter table note drop constraint note_parent_fkey; update parent set id = 5 where id = 3")
        .await;
    check(&client.change().await, "UPDATE", json!({"id": 3}), json!({"id": 5, "v": 30}));
    check(&client.change().await, "UPDATE", json!({"id": 1}), json!({"id": 1, "parent": 5}));
    database.run("update note set parent = 5; alter table note add foreign key (parent) references parent on delete set null").await;
    check(&client.change().await, "UPDATE", json!({"id": 1}), json!({"id": 1, "parent": 5}));
    database.run("delete from parent where id = 5").await;
    let mut cascade = [client.change().await, client.change().await, client.change().await];
    cascade.sort_by_key(|change| change["table"].to_string());
    check(&cascade[0], "DELETE", json!({"id": 1}), Value::Null);
    check(&cascade[1], "UPDATE", json!({"id": 1}), json!({"id": 1, "parent": null}));
    check(&cascade[2], "DELETE", json!({"id": 5}), Value::Null);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_are_told_under_the_name_of_the_whole() {
    let (database, relay, mut client) = scene(
        "create table whole (id int primary key, v text) partition by range (id);
         create table low partition of whole for values from (0) to (10);
         grant select on whole to authenticated; select relay.watch('whole');
         create table high partition of whole for values from (10) to (20)",
    )
    .await;
    database.run("insert into whole values (1, 'a'), (11, 'b'); insert into low values (2, 'c'); insert into high values (12, 'd')").await;
    for (id, v) in [(1, "a"), (11, "b"), (2, "c"), (12, "d")] {
        let change = client.change().await;
        check(&change, "INSERT", Value::Null, json!({"id": id, "v": v}));
        assert_eq!((&change["schema"], &change["table"]), (&json!("public"), &json!("whole")));
    }
    database.run("update high set v = 'e' where id = 11; update whole set id = 3 where id = 11").await;
    check(&client.change().await, "UPDATE", json!({"id": 11}), json!({"id": 11, "v": "e"}));
    check(&client.change().await, "DELETE", json!({"id": 11}), Value::Null);
    check(&client.change().await, "INSERT", Value::Null, json!({"id": 3, "v": "e"}));
    database.run("delete from low where id = 1; alter table whole detach partition low; insert into whole values (13, 'f')").await;
    check(&client.change().await, "DELETE", json!({"id": 1}), Value::Null);
    check(&client.change().await, "INSERT", Value::Null, json!({"id": 13, "v": "f"}));
    relay.stop().await;
}

/// The next frame must be a gap of this table.
async fn gap(client: &mut Client, table: &str) {
    let frame = client.frame().await;
    assert_eq!(frame[3], "system", "{frame}");
    let payload = &frame[4];
    assert_eq!((&payload["status"], &payload["extension"]), (&json!("error"), &json!("postgres_changes")));
    let message = payload["message"].as_str().unwrap();
    assert!(message.starts_with("Gap:") && message.contains(table), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncate_is_a_gap() {
    let (database, relay, mut client) = scene(&format!(
        "{T} create table part (id int primary key) partition by range (id);
         create table low partition of part for values from (0) to (10);
         grant select on part to authenticated; select relay.watch('part')"
    ))
    .await;
    database.run("insert into t values (1, 'a')").await;
    check(&client.change().await, "INSERT", Value::Null, json!({"id": 1, "v": "a"}));
    database.run("truncate t; insert into t values (2, 'b')").await;
    gap(&mut client, "public.t").await;
    check(&client.change().await, "INSERT", Value::Null, json!({"id": 2, "v": "b"}));
    database.run("truncate low").await;
    gap(&mut client, "public.part").await;
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_of_100_megabytes_is_written_and_told_without_its_text() {
    let (database, relay, mut client) = scene(
        "create table t (id int primary key, small text, large text); alter table t alter large set storage external;
         grant select on t to authenticated; select relay.watch('t')",
    )
    .await;
    database.run("insert into t values (1, 'kept', repeat('x', 100000000))").await;
    let change = client.change().await;
    assert_eq!(change["errors"], json!(["Error 413: Payload Too Large"]));
    assert_eq!((&change["type"], &change["record"]), (&json!("INSERT"), &json!({"id": 1, "small": "kept"})));
    assert_eq!(change["columns"].as_array().unwrap().len(), 3);
    database.run("update t set small = 'still'").await;
    let change = client.change().await;
    assert_eq!(change["errors"], json!(["Error 413: Payload Too Large"]));
    assert_eq!(
        (&change["record"], &change["old_record"]),
        (&json!({"id": 1, "small": "still"}), &json!({"id": 1}))
    );
    database.run("delete from t; insert into t values (2, 'after', 'short')").await;
    assert_eq!(client.change().await["old_record"], json!({"id": 1}));
    check(
        &client.change().await,
        "INSERT",
        Value::Null,
        json!({"id": 2, "small": "after", "large": "short"}),
    );
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_a_reader_may_no_longer_see_is_delivered_as_a_delete_where_the_table_says_so() {
    let alice = "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa";
    let database = Database::new().await;
    for table in ["told", "silent"] {
        database
            .run(&format!(
                "create table {table} (id int primary key, owner uuid); alter table {table} enable row level security;
                 create policy own on {table} for select using (owner = auth.uid());
                 grant select on {table} to authenticated; insert into {table} values (1, '{alice}')"
            ))
            .await;
    }
    database.run("select relay.watch('told', leave_events => true), relay.watch('silent')").await;
    let relay = Relay::start(&database.url).await;
    let mut client = Client::connect(&relay, &token("authenticated", Some(alice), json!({}))).await;
    client.subscribe("realtime:all", json!([{"event": "*", "schema": "public"}])).await;
    database
        .run("update silent set owner = gen_random_uuid(); update told set owner = gen_random_uuid()")
        .await;
    let left = client.change().await;
    check(&left, "DELETE", json!({"id": 1}), Value::Null);
    assert_eq!((&left["table"], &left["leave"]), (&json!("told"), &json!(true)));
    database.run(&format!("update told set owner = '{alice}'")).await;
    check(&client.change().await, "UPDATE", json!({"id": 1}), json!({"id": 1, "owner": alice}));
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unwatching_leaves_no_trace() {
    let (database, relay, mut client) = scene(&format!(
        "{T} create table whole (id int primary key) partition by range (id);
         create table low partition of whole for values from (0) to (10);
         create table high partition of whole for values from (10) to (20);
         grant select on whole to authenticated; select relay.watch('whole');
         alter table whole detach partition high"
    ))
    .await;
    // That of broadcasts stays: it belongs to no watched table.
    let triggers =
        "select count(*) from pg_trigger where not tgisinternal and tgrelid <> 'realtime.messages'::regclass";
    assert_ne!(database.value(triggers).await, "0");
    database.run("select relay.watch('t'), relay.watch('whole')").await;
    database.run("select relay.unwatch('whole')").await;
    database
        .run("insert into whole values (1); insert into high values (11); insert into t values (1, 'a')")
        .await;
    assert_eq!(client.change().await["table"], "t");
    database.run("select relay.unwatch('t'); select relay.unwatch('t')").await;
    assert_eq!(database.value(triggers).await, "0");
    assert_eq!(database.value("select count(*) from relay.watched").await, "0");
    database.run("insert into t values (2, 'b')").await;
    assert_eq!(
        database.value("select count(*) from relay.changes where operation not in ('S', 'G')").await,
        "1"
    );
    database.run("select relay.watch('t'); insert into t values (3, 'c')").await;
    assert_eq!(client.change().await["record"]["id"], 3, "watched again, told again");
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trigger_that_changes_the_row_again_comes_second() {
    let (database, relay, mut client) = scene(&format!(
        "{T} create function again() returns trigger language plpgsql as
           $$ begin update t set v = v || '!' where id = new.id and v not like '%!'; return null; end $$;
         create function before() returns trigger language plpgsql as
           $$ begin if new.v = 'drop' then return null; end if; new.v := lower(new.v); return new; end $$;
         create trigger aaa after insert or update on t for each row execute function again();
         create trigger a before insert on t for each row execute function before();"
    ))
    .await;
    database.run("insert into t values (1, 'A'), (9, 'drop')").await;
    check(&client.change().await, "INSERT", Value::Null, json!({"id": 1, "v": "a"}));
    check(&client.change().await, "UPDATE", json!({"id": 1}), json!({"id": 1, "v": "a!"}));
    database.run("update t set v = 'b'").await;
    check(&client.change().await, "UPDATE", json!({"id": 1}), json!({"id": 1, "v": "b"}));
    check(&client.change().await, "UPDATE", json!({"id": 1}), json!({"id": 1, "v": "b!"}));
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_type_whose_conversion_fails_costs_the_image_and_not_the_write() {
    let (database, relay, mut client) = scene(
        "create type hostile as enum ('x');
         create function to_json(hostile) returns json language plpgsql as $$ begin raise exception 'no'; end $$;
         create cast (hostile as json) with function to_json(hostile);
         create table t (id int primary key, h hostile, v text); grant select on t to authenticated; select relay.watch('t')",
    )
    .await;
    database.run("insert into t values (1, 'x', 'a')").await;
    let change = client.change().await;
    assert_eq!(change["record"], json!({"id": 1, "v": "a"}));
    assert_eq!(change["errors"], json!(["Error 413: Payload Too Large"]));
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cursor_that_sql_gives_is_the_one_that_the_relay_reads() {
    let database = Database::new().await;
    let mut open = Vec::new();
    for _ in 0..3 {
        let session = database.connect().await;
        session.batch_execute("begin; select pg_current_xact_id()").await.unwrap();
        open.push(session);
        database.run("select pg_current_xact_id()").await;
    }
    let reader = database.connect().await;
    reader.batch_execute("begin isolation level repeatable read").await.unwrap();
    let row = reader
        .query_one("select relay.cursor(), relay.epoch(), pg_current_snapshot()::text", &[])
        .await
        .unwrap();
    let (text, epoch, snapshot): (String, i64, String) = (row.get(0), row.get(1), row.get(2));
    let cursor: Cursor = text.parse().unwrap();
    assert_eq!((cursor.epoch(), cursor.seen().to_string()), (Epoch(epoch), snapshot));
    assert!(cursor.seen().running().len() >= 3, "{:?}", cursor.seen());
    assert!(cursor.within().is_none());
    assert_eq!(cursor.to_string(), text);
}
