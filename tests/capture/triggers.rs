//! The trigger functions that are written for each table: what they log does not depend on who writes, under which settings and
//! search path, and they are what they should be after every change of the table, of the relay, and of its settings.

use serde_json::{Value, json};

use crate::support::database::{Database, connect, with_login};
use crate::support::program::output;
use crate::support::stage::Stage;
use crate::support::token;
use relay::postgres::install::install;

fn user() -> String {
    token("authenticated", None, json!({}))
}

/// A table with a column of each kind whose text follows a setting, and some whose does not; and rows for it.
const TYPES: &str = "create type place as (at timestamptz, x float8, note text); create domain moment as timestamptz;
     create domain moments as timestamptz[]; create type mood as enum ('a', 'b');
     create table t (id int primary key generated always as identity, v text, at timestamptz, ats timestamptz[], moment moment,
       moments moments, f float8, fs float4[], day date, tz timetz, ts timestamp, n numeric);
     create table u (id int primary key generated always as identity, at timestamptz, span interval, raw bytea, price money, during tstzrange, days daterange, raws bytea[], m mood,
       p point, num numrange, reg regclass, place place, places place[]);
     grant select on t, u to authenticated; grant insert, update, delete on t, u to public; select relay.watch('t'), relay.watch('u')";

const ROWS: &[&str] = &[
    r#"insert into t (v, at, ats, moment, moments, f, fs, day, tz, ts, n) values ('2026-01-02T03:04:05+02:00', '2026-07-02 03:04:05.678901+00', '{2026-01-02 03:04+00,NULL,infinity}',
       '1880-06-01 00:00+00', '{{2000-02-29 23:30+00,NULL},{-infinity,0001-01-01 00:00+00 BC}}'::timestamptz[], 1.1, '{0.1,NULL}', '2026-01-02', '03:04:05+02', '2026-01-02 03:04:05', 1.50)"#,
    "insert into t (at, ats) values (null, '{}'), ('4714-11-24 00:00+00 BC', '{294276-12-31 23:59:59.999999+00}')",
    r"insert into u (at, span, raw, price, during, days, raws, m, p, num, reg, place, places) values ('2026-07-02 03:04+00', '1 day 02:00:00', decode('deadbeef', 'hex'), 1.5::numeric::money, '[2026-01-02 00:00+00,)', '[2026-01-02,2026-01-09)',
       array[decode('00ff', 'hex')], 'a', '(1.1,0.30000000000000004)', '[1,2]', 't'::regclass,
       row('1999-12-31 23:59:59.5+00', 0.1::float8 + 0.2::float8, '2026-01-02T03:04:05+02:00'), array[row('0044-03-15 12:00+00 BC', 'NaN', null)::place, null])",
    "update t set v = 'x' where id = 1",
    "delete from u",
];

/// What is told of the rows when they are written by this session.
async fn told(stage: &Stage, writer: &tokio_postgres::Client) -> Vec<Value> {
    stage.run("truncate t, u restart identity; alter table t replica identity full; alter table u replica identity full").await;
    let mut client = stage.join(&user()).await;
    for row in ROWS {
        if let Err(error) = writer.batch_execute(row).await {
            panic!("{row}: {error:?}");
        }
    }
    let changes = stage.changes(&mut client).await;
    assert_eq!(changes.len(), 6, "{changes:?}");
    changes
        .into_iter()
        .map(|change| {
            assert_eq!(change["errors"], Value::Null, "{change}");
            json!([change["type"], change["record"], change["old_record"]])
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_setting_of_a_session_a_role_or_the_database_shows_in_what_is_told() {
    let stage = Stage::new(TYPES).await;
    stage.run("create role $DB_odd login superuser; create role $DB_far login superuser").await;
    let expected = told(&stage, &stage.database.client).await;
    assert_eq!(expected[0][1]["at"], "2026-07-02T03:04:05.678901+00:00");
    assert_eq!(expected[0][1]["v"], "2026-01-02T03:04:05+02:00");
    let settings = [
        "timezone = 'Asia/Kathmandu'",
        "timezone = 'America/New_York'",
        "timezone = 'Europe/Amsterdam'",
        "timezone = 'Europe/London'",
        "timezone = 'Africa/Monrovia'",
        "timezone = '<odd>-05:30'",
        "datestyle = 'German'",
        "datestyle = 'Postgres, DMY'",
        "intervalstyle = 'iso_8601'",
        "bytea_output = 'escape'",
        "extra_float_digits = 0",
        "extra_float_digits = -15",
        "extra_float_digits = 3",
        "standard_conforming_strings = off",
        "default_transaction_isolation = 'serializable'",
        "plan_cache_mode = force_custom_plan",
        "plpgsql.extra_errors = 'all'",
    ];
    for setting in settings {
        let session = stage.database.connect().await;
        session.batch_execute(&format!("set {setting}; set search_path = public")).await.unwrap();
        assert_eq!(told(&stage, &session).await, expected, "{setting}");
    }
    let all = [
        "timezone = 'Asia/Tokyo'",
        "datestyle = 'SQL, DMY'",
        "intervalstyle = 'sql_standard'",
        "bytea_output = 'escape'",
        "extra_float_digits = -3",
        "standard_conforming_strings = off",
    ];
    for setting in all {
        stage.run(&format!("alter role $DB_odd set {setting}")).await;
    }
    let odd = connect(&with_login(&stage.database.url, &format!("{}_odd", stage.name))).await;
    assert_eq!(told(&stage, &odd).await, expected);
    for setting in all {
        stage.run(&format!("alter database $DB set {setting}")).await;
    }
    let far = connect(&with_login(&stage.database.url, &format!("{}_far", stage.name))).await;
    let zone: String = far.query_one("show timezone", &[]).await.unwrap().get(0);
    assert_eq!(zone, "Asia/Tokyo");
    assert_eq!(told(&stage, &far).await, expected);
}

/// Functions, operators and types of a role that has them found before the system's own.
const HOSTILE: &str = r#"
    create schema evil; grant usage, create on schema evil to public;
    create function evil.row_to_json(record) returns json language plpgsql as $$ begin return '{"id": 666}'; end $$;
    create function evil.row_to_json(anyelement) returns json language sql as $$ select '{"id": 666}'::json $$;
    create function evil.nextval(regclass) returns bigint language sql as $$ select 1::bigint $$;
    create function evil.pg_current_xact_id() returns xid8 language sql as $$ select '1'::xid8 $$;
    create function evil.clock_timestamp() returns timestamptz language sql as $$ select 'epoch'::timestamptz $$;
    create function evil.pg_column_size(anyelement) returns int language sql as $$ select 1000000000 $$;
    create function evil.current_setting(text) returns text language sql as $$ select 'evil' $$;
    create function evil.concat(name, text, name) returns text language sql as $$ select 'evil' $$;
    create function evil.pg_try_advisory_xact_lock_shared(int, int) returns bool language sql as $$ select true $$;
    create function evil.no(int, int) returns bool language plpgsql as $$ begin raise exception 'evil = was called'; end $$;
    create operator evil.= (leftarg = int, rightarg = int, function = evil.no);
    create function evil.to_jsonb(anyelement) returns jsonb language sql as $$ select '1'::jsonb $$;
    create function evil.minus(jsonb, text[]) returns jsonb language plpgsql as $$ begin raise exception 'evil - was called'; end $$;
    create operator evil.- (leftarg = jsonb, rightarg = text[], function = evil.minus);
    create operator evil.<= (leftarg = int, rightarg = int, function = evil.no);
    create function evil.plus(int, int) returns int language plpgsql as $$ begin raise exception 'evil + was called'; end $$;
    create operator evil.+ (leftarg = int, rightarg = int, function = evil.plus);
    create function evil.no(text, text) returns bool language plpgsql as $$ begin raise exception 'evil = was called'; end $$;
    create operator evil.= (leftarg = text, rightarg = text, function = evil.no);
    create domain evil.json as text check (value = 'evil'); create domain evil.regclass as text check (value = 'evil');
    create domain evil.oid as text check (value = 'evil'); create domain evil.bool as text check (value = 'evil');
    create domain evil."char" as text check (value = 'evil'); create domain evil.text as pg_catalog.text check (value = 'evil');
    create domain evil.int4 as pg_catalog.text check (value = 'evil'); create domain evil.trigger as pg_catalog.text check (value = 'evil');
    create table evil.log_0 (number int); create table evil.old (id int); create table evil.new (id int)"#;

const HOSTILE_SESSION: &str = r"
    set standard_conforming_strings = off; set escape_string_warning = off; set extra_float_digits = 0; set bytea_output = 'escape';
    create domain pg_temp.json as pg_catalog.text check (value operator(pg_catalog.=) 'evil');
    create domain pg_temp.oid as pg_catalog.text check (value operator(pg_catalog.=) 'evil');
    create domain pg_temp.bool as pg_catalog.text check (value operator(pg_catalog.=) 'evil');
    create domain pg_temp.regclass as pg_catalog.text check (value operator(pg_catalog.=) 'evil');
    create table pg_temp.log_0 (number pg_catalog.int4); create table pg_temp.new (id pg_catalog.int4);
    set search_path = evil, pg_temp, public, pg_catalog";

#[tokio::test(flavor = "multi_thread")]
async fn a_role_with_objects_of_its_own_under_the_names_of_the_systems_changes_nothing() {
    let stage = Stage::new(&format!(
        "create table t (id int primary key, v text, f float8, raw bytea); create table w (id int primary key);
         create table p (id int primary key, v text) partition by range (id); create table low partition of p for values from (0) to (10);
         create type mood as enum ('a'); create table e (id int primary key, m mood);
         create role $DB_odd login; grant insert, update, delete, select, truncate on t, w, p, low, e to $DB_odd, authenticated;
         select relay.watch('t', ignore => '{{raw}}'), relay.watch('w'), relay.watch('p', ignore => '{{v}}'), relay.watch('e', ignore => '{{m}}'); {HOSTILE}"
    ))
    .await;
    let writer = connect(&with_login(&stage.database.url, &format!("{}_odd", stage.name))).await;
    writer.batch_execute(HOSTILE_SESSION).await.unwrap();
    let mut client = stage.join(&user()).await;
    writer
        .batch_execute(
            "insert into public.t values (1, 'a', 1.1, pg_catalog.decode('ff', 'hex')); update public.t set raw = null; update public.t set v = 'b'; delete from public.t;
             insert into public.t values (2, pg_catalog.repeat('x', 5000), null, null); insert into public.w values (3);
             insert into public.p values (4, 'c'); insert into public.e values (5, 'a'); update public.p set v = 'd'; update public.e set m = null; truncate public.w",
        )
        .await
        .unwrap_or_else(|error| panic!("{error:?}"));
    let records: Vec<String> =
        stage.told(&mut client).await.into_iter().map(|line| line.replace(&"x".repeat(5000), "x…")).collect();
    assert_eq!(
        records,
        [
            r#"INSERT {"id":1,"v":"a","f":1.1,"raw":"ff"}"#,
            r#"UPDATE {"id":1,"v":"b","f":1.1,"raw":null} {"id":1}"#,
            r#"DELETE {"id":1}"#,
            r#"INSERT {"id":2,"v":"x…","f":null,"raw":null}"#,
            r#"INSERT {"id":3}"#,
            r#"INSERT {"id":4,"v":"c"}"#,
            r#"INSERT {"id":5,"m":"a"}"#,
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_that_change_their_search_path_in_each_transaction_log_the_same() {
    let stage = Stage::new(
        "create table t (id int primary key, v text, f float8); grant select on t to authenticated; select relay.watch('t');
         create schema a; create schema b; create function a.row_to_json(record) returns json language plpgsql as $$ begin return null; end $$;
         create table b.t (id int)",
    )
    .await;
    let mut client = stage.join(&user()).await;
    let writer = stage.database.connect().await;
    writer.batch_execute("prepare w (int) as insert into public.t values ($1, 'v', 0.1)").await.unwrap();
    for id in 0..60 {
        let path = ["public", "a, pg_catalog, public", "b", "pg_temp, a", "''"][id % 5];
        writer
            .batch_execute(&format!("begin; set local search_path = {path}; execute w ({id}); commit"))
            .await
            .unwrap();
    }
    let told = stage.told(&mut client).await;
    assert_eq!(
        told,
        (0..60).map(|id| format!(r#"INSERT {{"id":{id},"v":"v","f":0.1}}"#)).collect::<Vec<_>>()
    );
}

/// Words that may stand before a parenthesis, or as they are, in a function whose names must all be qualified.
const WORDS: &[&str] = &["values", "into", "if", "elsif", "then", "and", "or", "row"];

#[tokio::test(flavor = "multi_thread")]
async fn every_name_in_a_trigger_function_is_qualified_and_no_form_stands_there_that_cannot_be() {
    let database = Database::new().await;
    database.run(TYPES).await;
    database
        .run(
            "create table narrow (id int); create table whole (id int, v text) partition by range (id); create table part partition of whole default;
             create table document (id int primary key, v json, seen int);
             select relay.watch('narrow'), relay.watch('whole', ignore => '{v}'), relay.watch('document', ignore => '{seen}'),
               relay.watch('t', ignore => '{at}'), relay.watch('u', ignore => '{at}')",
        )
        .await;
    let functions = database
        .client
        .query("select proname::text, prosrc, proconfig is null and prosecdef from pg_proc where proname like 'capture\\__\\_%'", &[])
        .await
        .unwrap();
    assert_eq!(functions.len(), 15);
    for function in functions {
        let (name, text, is_bare): (String, String, bool) =
            (function.get(0), function.get(1), function.get(2));
        assert!(is_bare && !text.contains('\\'), "{name}");
        let lower = text.to_lowercase();
        for form in
            [" in (", " between ", " like ", "nullif", " distinct ", " case ", " using", "::", " any "]
        {
            let count = lower.matches(form).count();
            let qualified = if form == "::" { lower.matches("::pg_catalog.").count() } else { 0 };
            assert_eq!(count, qualified, "{name}: {form}: {text}");
        }
        for (at, _) in text.match_indices('(') {
            let before = text[..at].trim_end();
            let start =
                before.rfind(|c: char| !(c.is_alphanumeric() || "_.".contains(c))).map_or(0, |at| at + 1);
            let word = &before[start..];
            assert!(
                word.is_empty()
                    || word.starts_with("pg_catalog.")
                    || word.starts_with("relay.")
                    || word == "operator"
                    || WORDS.contains(&word),
                "{name}: {word} in {text}"
            );
        }
        let without = text.replace("operator(pg_catalog.", "");
        for (at, sign) in without.match_indices(['=', '<', '+', '>']) {
            let is_qualified = without[at..].trim_start_matches(['=', '<', '+', '>']).starts_with(')');
            assert!(is_qualified, "{name}: {sign} in {text}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn altered_functions_are_found_by_doctor_and_restored_by_install_and_watch() {
    let database = Database::new().await;
    database.run("create table t (id int primary key, v text); grant select on t to authenticated; select relay.watch('t')").await;
    let id = database.value("select id from relay.watched").await;
    let alter = format!(
        "create or replace function relay.capture_{id}_update() returns trigger language plpgsql security definer as 'begin return null; end'"
    );
    let fault = "t: its trigger functions are outdated or altered";
    let examined = async || output(&["doctor", "--database-url", &database.url]).await.1;
    assert!(!examined().await.contains(fault));
    for mend in ["install", "watch"] {
        database.run(&alter).await;
        assert_eq!(database.value("select intact from relay.watched").await, "f");
        let said = examined().await;
        assert!(said.contains(fault), "{said}");
        match mend {
            "install" => _ = install(&mut database.connect().await).await.unwrap(),
            _ => database.run("select relay.watch('t')").await,
        }
        assert_eq!(database.value("select intact from relay.watched").await, "t", "{mend}");
        assert!(!examined().await.contains(fault));
    }
    database.run("insert into t values (1, 'a'); update t set v = 'b'").await;
    assert_eq!(
        database
            .value(
                "select string_agg(operation::text, '' order by number) from relay.changes where relation > 0"
            )
            .await,
        "IU"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_older_version_watched_is_captured_by_functions_of_its_own_after_the_install() {
    let database = Database::new().await;
    database.run("create table t (id int primary key, v text); grant select on t to authenticated; select relay.watch('t')").await;
    let id = database.value("select id from relay.watched").await;
    database
        .run(&format!(
            "do $$ declare one name; begin for one in select tgname from pg_trigger where tgrelid = 't'::regclass loop
               execute format('drop trigger %I on t', one); end loop; end $$;
             create function relay.capture() returns trigger language plpgsql security definer as $$ begin return null; end $$;
             create trigger \"00_relay_capture_{id}\" after insert or update or delete on t for each row execute function relay.capture('{id}');
             alter table t enable always trigger \"00_relay_capture_{id}\"; delete from relay.shapes; drop function relay.capture_{id}_insert()"
        ))
        .await;
    // It logged in another form, and no role has rights on what is new.
    database
        .run(
            "drop event trigger relay_schema_drops; alter event trigger relay_schema_changes disable; drop function relay.log_change(int, int, \"char\", boolean, json, json, oid, xid8);
             create function relay.log_change(relation int, operation \"char\", oversize boolean, before json, after json) returns void
             language plpgsql as $$ begin
               insert into relay.log_0 (number, xid, at, kind)
               values (nextval('relay.change_number'), pg_current_xact_id(), clock_timestamp(), concat_ws(' ', operation, relation, 0)); end $$;
             revoke all on function relay.log_change(int, \"char\", boolean, json, json) from public;
             grant execute on function relay.log_change(int, \"char\", boolean, json, json) to relay_writer;
             revoke all on function relay.renew_shapes(boolean, int[]) from relay_writer;
             create or replace function relay.log_schema_change() returns event_trigger language plpgsql security definer
             set search_path = pg_catalog, pg_temp as $$ begin perform relay.log_change(0, 'S', false, null, null); end $$;
             alter event trigger relay_schema_changes enable always; update relay.ledger set checksum = 'older' where file like '1%'",
        )
        .await;
    install(&mut database.connect().await).await.unwrap();
    assert_eq!(database.value("select intact from relay.watched").await, "t");
    assert_eq!(database.value("select to_regprocedure('relay.capture()') is null").await, "t");
    database.run("insert into t values (1, 'a')").await;
    assert_eq!(
        database
            .value(
                "select count(*) from relay.changes c where relation > 0 and shape = relay.shape(c.relation)"
            )
            .await,
        "1"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_unwatched_or_dropped_leaves_no_function_and_no_shape() {
    let database = Database::new().await;
    database.run("create table t (id int); create table u (id int); create table v (id int); select relay.watch('t'), relay.watch('u'), relay.watch('v')").await;
    let left = "select count(*) from pg_proc where proname ~ '^capture_[0-9]'";
    assert_eq!(database.value(left).await, "9");
    database.run("select relay.unwatch('t')").await;
    assert_eq!(database.value(left).await, "6");
    database.run("drop table u; select relay.trim_changelog()").await;
    assert_eq!(database.value(left).await, "3");
    assert_eq!(database.value("select count(*) from relay.shapes").await, "1");
    database.run("drop table v; create table w (id int); select relay.watch('w')").await;
    assert_eq!(database.value(left).await, "3");
    assert_eq!(database.value("select count(*) from relay.shapes").await, "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_partition_of_a_row_stands_in_the_changelog() {
    let database = Database::new().await;
    database
        .run(
            "create table whole (id int primary key, v text) partition by range (id);
             create table low partition of whole for values from (0) to (10);
             create table high (v text, gone int, id int not null); alter table high drop gone;
             select relay.watch('whole'); alter table whole attach partition high for values from (10) to (20);
             insert into whole values (1, 'a'), (11, 'b'); insert into high (id, v) values (12, 'c'); delete from whole where id = 1",
        )
        .await;
    let leaves = "select string_agg(operation::text || leaf::regclass, ' ' order by number) from relay.changes where relation > 0";
    assert_eq!(database.value(leaves).await, "Ilow Ihigh Ihigh Dlow");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_without_other_rights_adds_and_attaches_partitions() {
    let stage = Stage::new("create table p (id int primary key) partition by range (id)").await;
    stage
        .run(
            "create role $DB_own login; grant create, usage on schema public to $DB_own; alter table p owner to $DB_own;
             select relay.watch('p')",
        )
        .await;
    let owner = connect(&with_login(&stage.database.url, &format!("{}_own", stage.name))).await;
    owner
        .batch_execute(
            "create table one partition of p for values from (0) to (10); create table two (like p including all);
             alter table p attach partition two for values from (10) to (20); insert into p values (1), (11)",
        )
        .await
        .unwrap();
    assert_eq!(stage.database.value("select count(*) from relay.changes where operation = 'I'").await, "2");
}
