//! Who is told what: row policies, rights and column rights, with PostgreSQL as the judge.

use relay::model::subscription::error::identifier;
use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::stage::Stage;
use crate::support::{ANN, BOB, token};

fn user(sub: &str) -> String {
    token("authenticated", Some(sub), json!({}))
}

/// `t (id, owner, v)` with "own rows only", under these options.
fn owned(identity: &str, leave_events: bool) -> String {
    format!(
        "create table t (id int primary key, owner uuid, v text);
         alter table t replica identity {identity};
         alter table t enable row level security;
         create policy own on t for select to authenticated using (owner = (select auth.uid()));
         grant select on t to authenticated, anon, service_role;
         select relay.watch('t', {leave_events})"
    )
}

/// Every operation with every combination of visible images, told to ann.
async fn check_operations(identity: &str, leave_events: bool, expected: &[&str]) {
    let stage = Stage::new(&owned(identity, leave_events)).await;
    let mut ann = stage.join(&user(ANN)).await;
    let write = async |sql: &str| stage.run(&sql.replace("ANN", ANN).replace("BOB", BOB)).await;
    write("insert into t values (1, 'ANN', 'a'), (2, 'BOB', 'b'), (3, null, 'c')").await;
    write("update t set v = 'A' where id = 1").await;
    write("update t set v = 'B' where id = 2").await;
    write("update t set owner = 'ANN', v = 'bought' where id = 2").await;
    write("update t set owner = 'BOB', v = 'sold' where id = 1").await;
    write("update t set id = 4 where id = 2").await;
    write("delete from t where id = 1").await;
    write("delete from t where id = 3").await;
    write("delete from t where id = 4").await;
    let expected: Vec<String> = expected.iter().map(|line| line.replace("ANN", ANN)).collect();
    assert_eq!(stage.told(&mut ann).await, expected, "identity {identity}, leave events {leave_events}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_operation_is_told_by_what_may_be_seen_of_its_images() {
    let mut key = vec![
        r#"INSERT {"id":1,"owner":"ANN","v":"a"}"#,
        r#"UPDATE {"id":1,"owner":"ANN","v":"A"} {"id":1}"#,
        r#"UPDATE {"id":2,"owner":"ANN","v":"bought"} {"id":2}"#,
        r#"UPDATE {"id":4,"owner":"ANN","v":"bought"} {"id":2}"#,
        r#"DELETE {"id":4}"#,
    ];
    check_operations("default", false, &key).await;
    key.insert(3, r#"DELETE {"id":1} leave"#);
    check_operations("default", true, &key).await;
    let whole = [
        r#"INSERT {"id":1,"owner":"ANN","v":"a"}"#,
        r#"UPDATE {"id":1,"owner":"ANN","v":"A"} {"id":1,"owner":"ANN","v":"a"}"#,
        // The row came from another owner: its old image is not hers to see.
        r#"UPDATE {"id":2,"owner":"ANN","v":"bought"} {"id":2}"#,
        r#"DELETE {"id":1} leave"#,
        r#"UPDATE {"id":4,"owner":"ANN","v":"bought"} {"id":2,"owner":"ANN","v":"bought"}"#,
        r#"DELETE {"id":4,"owner":"ANN","v":"bought"}"#,
    ];
    check_operations("full", true, &whole).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_changes_its_owner_shows_each_owner_only_their_image() {
    let stage = Stage::new(&owned("full", false)).await;
    let (mut ann, mut bob) = (stage.join(&user(ANN)).await, stage.join(&user(BOB)).await);
    stage.run(&format!("insert into t values (1, '{ANN}', 'hers')")).await;
    stage.run(&format!("update t set owner = '{BOB}', v = 'his' where id = 1")).await;
    stage.run("delete from t").await;
    let hers = format!(r#"{{"id":1,"owner":"{ANN}","v":"hers"}}"#);
    let his = format!(r#"{{"id":1,"owner":"{BOB}","v":"his"}}"#);
    assert_eq!(stage.told(&mut ann).await, [format!("INSERT {hers}")]);
    assert_eq!(stage.told(&mut bob).await, [format!(r#"UPDATE {his} {{"id":1}}"#), format!("DELETE {his}")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_users_of_one_socket_each_see_their_own_rows_of_one_transaction() {
    let stage = Stage::new(&owned("default", false)).await;
    let sub = |n: usize| format!("00000000-0000-4000-8000-{n:012}");
    let mut client = Client::connect(&stage.relay, &token("anon", None, json!({}))).await;
    for n in 0..50 {
        let bindings = ["t", "marker"].map(|table| json!({"event": "*", "schema": "public", "table": table}));
        let config = json!({"postgres_changes": bindings});
        let payload = json!({"access_token": user(&sub(n)), "config": config});
        client.push(Some("1"), &format!("realtime:{n}"), "phx_join", payload).await;
    }
    let mut subscribed = 0;
    while subscribed < 50 {
        let frame = client.frame().await;
        if frame[3] == "system" {
            assert_eq!(frame[4]["message"], "Subscribed to PostgreSQL", "{frame}");
            subscribed += 1;
        }
    }
    stage
        .run(
            "insert into t select n, ('00000000-0000-4000-8000-' || lpad((n % 60)::text, 12, '0'))::uuid, 'x'
             from generate_series(0, 599) n; insert into marker default values",
        )
        .await;
    let mut seen = vec![Vec::new(); 50];
    let mut done = 0;
    while done < 50 {
        let frame = client.frame().await;
        let data = &frame[4]["data"];
        let n: usize = frame[2].as_str().unwrap().replace("realtime:", "").parse().unwrap();
        if data["table"] == "marker" {
            done += 1;
        } else {
            seen[n].push(data["record"]["id"].as_u64().unwrap());
        }
    }
    for (n, ids) in seen.iter().enumerate() {
        let own: Vec<u64> = (0..10).map(|k| n as u64 + 60 * k).collect();
        assert_eq!(*ids, own, "user {n}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn permissive_policies_are_joined_by_or_and_restrictive_ones_by_and() {
    let stage = Stage::new(
        "create role $DB_member; create role $DB_group; create role $DB_other; grant $DB_group to $DB_member;
         create table t (id int generated always as identity primary key, a bool, b bool, c bool, d bool);
         alter table t enable row level security;
         create policy everybody on t for select using (a);
         create policy of_group on t for all to $DB_group using (b);
         create policy of_others on t for select to $DB_other using (true);
         create policy of_writers on t for update using (true);
         create policy always on t as restrictive for select using (c);
         create policy always_group on t as restrictive for all to $DB_group using (d);
         create policy always_others on t as restrictive for select to $DB_other using (false);
         grant select on t to $DB_member, $DB_group, $DB_other, service_role, anon;
         select relay.watch('t')",
    )
    .await;
    let roles = ["member", "group", "other"].map(|role| format!("{}_{role}", stage.name));
    let mut checked = Vec::new();
    for role in roles.iter().map(String::as_str).chain(["anon", "service_role"]) {
        checked.push((role, stage.join(&token(role, None, json!({}))).await));
    }
    stage
        .run(
            "insert into t (a, b, c, d) select a, b, c, d from
             (values (true), (false), (null)) a(a), (values (true), (false), (null)) b(b),
             (values (true), (false), (null)) c(c), (values (true), (false), (null)) d(d)",
        )
        .await;
    let mut counts = Vec::new();
    for (role, client) in &mut checked {
        let told: Vec<String> =
            stage.changes(client).await.iter().map(|change| change["record"]["id"].to_string()).collect();
        assert_eq!(told, stage.selected(role, &json!({}), "select id from t order by id").await, "{role}");
        counts.push(told.len());
    }
    assert_eq!(counts, [5, 5, 0, 9, 81], "the roles differ");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_row_security_the_right_to_select_decides_and_without_a_policy_nothing_is_seen() {
    let stage = Stage::new(
        "create table open (id int primary key); create table closed (id int primary key);
         create table hidden (id int primary key); alter table closed enable row level security;
         grant select on open, closed to anon, service_role; revoke all on hidden from public;
         select relay.watch(t) from unnest('{open,closed,hidden}'::regclass[]) t",
    )
    .await;
    let mut anon = stage.join(&token("anon", None, json!({}))).await;
    let mut service = stage.join(&token("service_role", None, json!({}))).await;
    stage
        .run("insert into open values (1); insert into closed values (2); insert into hidden values (3)")
        .await;
    stage.run("delete from open; delete from closed; delete from hidden").await;
    assert_eq!(stage.told(&mut anon).await, [r#"INSERT {"id":1}"#, r#"DELETE {"id":1}"#]);
    let all = [r#"INSERT {"id":1}"#, r#"INSERT {"id":2}"#, r#"DELETE {"id":1}"#, r#"DELETE {"id":2}"#];
    assert_eq!(stage.told(&mut service).await, all);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_sees_all_unless_row_security_is_forced() {
    let stage = Stage::new(
        "create role $DB_owner; create role $DB_heir; grant $DB_owner to $DB_heir;
         create table free (id int primary key); create table forced (id int primary key);
         alter table free enable row level security; alter table forced enable row level security;
         alter table forced force row level security;
         create policy small on forced using (id < 10); create policy small on free using (id < 10);
         alter table free owner to $DB_owner; alter table forced owner to $DB_owner;
         grant usage on schema public to $DB_owner;
         select relay.watch('free'), relay.watch('forced')",
    )
    .await;
    for role in ["owner", "heir"] {
        let role = format!("{}_{role}", stage.name);
        let mut client = stage.join(&token(&role, None, json!({}))).await;
        stage.run("insert into free values (1), (11); insert into forced values (2), (12)").await;
        let free = stage.selected(&role, &json!({}), "select id from free order by id").await;
        let forced = stage.selected(&role, &json!({}), "select id from forced order by id").await;
        assert_eq!((free, forced), (vec!["1".to_owned(), "11".to_owned()], vec!["2".to_owned()]));
        let told = [r#"INSERT {"id":1}"#, r#"INSERT {"id":11}"#, r#"INSERT {"id":2}"#];
        assert_eq!(stage.told(&mut client).await, told, "{role}");
        stage.run("delete from free; delete from forced").await;
        // Told before the next client joins, which would get what is still on its way.
        let told = [r#"DELETE {"id":1}"#, r#"DELETE {"id":11}"#, r#"DELETE {"id":2}"#];
        assert_eq!(stage.told(&mut client).await, told, "{role}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_column_without_the_right_to_select_appears_nowhere() {
    let stage = Stage::new(
        "create table t (id int primary key, v text, secret text); alter table t replica identity full;
         create table keyless (code text primary key, v text);
         grant select (id, v) on t to authenticated; grant select (v) on keyless to authenticated;
         select relay.watch('t'), relay.watch('keyless')",
    )
    .await;
    let mut client = stage.join(&user(ANN)).await;
    stage.run("insert into t values (1, 'a', 'canary')").await;
    stage.run("update t set v = 'b', secret = 'canary2'").await;
    stage.run("delete from t").await;
    stage.run("insert into keyless values ('canary3', 'x'); delete from keyless").await;
    let changes = stage.changes(&mut client).await;
    assert!(!format!("{changes:?}").contains("canary"), "{changes:?}");
    assert!(!format!("{changes:?}").contains("secret"), "{changes:?}");
    let parts =
        |name: &str| changes.iter().filter_map(|change| change.get(name)).cloned().collect::<Vec<Value>>();
    assert_eq!(parts("record"), [json!({"id": 1, "v": "a"}), json!({"id": 1, "v": "b"}), json!({"v": "x"})]);
    assert_eq!(parts("old_record"), [json!({"id": 1, "v": "a"}), json!({"id": 1, "v": "b"}), json!({})]);
    let columns = json!([{"name": "id", "type": "int4"}, {"name": "v", "type": "text"}]);
    assert_eq!(parts("columns")[..3], [columns.clone(), columns.clone(), columns]);
    for (binding, text) in [
        (json!({"table": "t", "filter": "secret=eq.canary"}), "invalid column for filter secret"),
        (json!({"table": "t", "filter": "id=eq.1,secret=is.null"}), "invalid column for filter secret"),
        (json!({"table": "t", "select": ["id", "secret"]}), "invalid column for select secret"),
        (json!({"table": "t", "filter": "ctid=eq.(0,1)"}), "invalid column for filter ctid; there is id"),
    ] {
        let answer = stage.answer(&user(ANN), binding).await;
        assert!(answer.ends_with(text), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn deletes_are_authorised_and_filtered_by_any_column() {
    let stage = Stage::new(&owned("default", false)).await;
    let by_v = json!([{"event": "DELETE", "schema": "public", "table": "t", "filter": "v=eq.x"}]);
    let mut ann = stage.subscribe(&user(ANN), by_v.clone()).await;
    let mut anon = stage.subscribe(&token("anon", None, json!({})), by_v).await;
    stage
        .run(&format!(
            "insert into t values (1, '{ANN}', 'x'), (2, '{ANN}', 'y'), (3, '{BOB}', 'x'), (4, null, 'x');
             delete from t"
        ))
        .await;
    assert_eq!(stage.told(&mut ann).await, [r#"DELETE {"id":1}"#]);
    assert_eq!(stage.told(&mut anon).await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_and_what_is_not_allowed_have_one_answer() {
    let stage = Stage::new(
        "create table unwatched (id int primary key); create table secret (id int primary key);
         create view a_view as select 1 as id; create schema closed; create table closed.t (id int primary key);
         grant select on unwatched, a_view to anon, service_role; grant select on closed.t to anon, service_role;
         select relay.watch('secret'), relay.watch('closed.t')",
    )
    .await;
    for role in ["anon", "service_role"] {
        let token = token(role, None, json!({}));
        let mut answers = Vec::new();
        for name in [
            "public.missing",
            "missing.missing",
            "public.unwatched",
            "public.secret",
            "public.a_view",
            "closed.t",
            "pg_catalog.pg_authid",
            "relay.changes",
            "relay.log_0",
            "relay.watch_list",
            "public.secret; drop table secret",
            "public.marker\"",
        ] {
            let (schema, table) = name.split_once('.').unwrap();
            let binding = json!({"event": "*", "schema": schema, "table": table});
            let answer = stage.answer(&token, binding).await;
            let named = format!("{}.{}", identifier(schema), identifier(table));
            let answer = answer.replace(&format!("schema: {schema}, table: {table},"), "NAME");
            let usage = format!("grant usage on schema {} to {role}; ", identifier(schema));
            answers.push(answer.replace(&named, "NAME").replace(&usage, ""));
        }
        assert!(answers[0].contains("Please check Realtime is enabled"), "{}", answers[0]);
        assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:#?}");
    }
    for own in ["relay.log", "relay.log_0", "relay.watch_list", "pg_catalog.pg_authid"] {
        let watched = stage.database.client.batch_execute(&format!("select relay.watch('{own}')")).await;
        assert!(watched.unwrap_err().as_db_error().unwrap().message().contains("cannot be watched"), "{own}");
    }
    // Neither does a subscription to everything reach what belongs to the relay.
    let everything = json!([{"event": "*", "schema": "*"}]);
    let mut service = stage.subscribe(&token("service_role", None, json!({})), everything).await;
    stage
        .run(
            "insert into secret values (1); insert into closed.t values (1); select relay.watch('unwatched')",
        )
        .await;
    assert_eq!(stage.told(&mut service).await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_logins_for_reading_and_judging_need_no_right_beyond_their_own() {
    let sql = "create role $DB_reader login; grant relay_reader to $DB_reader;
               create role $DB_judge login noinherit; grant anon, authenticated, service_role to $DB_judge;
               create table friends (a uuid, b uuid); alter table friends enable row level security;
               create policy own on friends using (a = auth.uid()); grant select on friends to authenticated;
               grant usage on schema auth to anon, authenticated, service_role;";
    let policy = "drop policy own on t; create policy friends on t for select to authenticated
                  using (owner = auth.uid() or owner in (select f.b from friends f))";
    let stage = Stage::with(&format!("{sql} {}; {policy}", owned("default", false)), |settings, url| {
        let (_, name) = url.rsplit_once('/').unwrap();
        let login = |role: &str| url.replacen("postgres@", &format!("{name}_{role}@"), 1);
        settings.database_url = Some(login("reader"));
        settings.judge_url = Some(login("judge"));
    })
    .await;
    let filter = json!([{"event": "*", "schema": "public", "table": "t", "filter": "v=like.h%"}]);
    let mut ann = stage.subscribe(&user(ANN), filter).await;
    let mut service = stage.join(&token("service_role", None, json!({}))).await;
    // Roles that the judging login may not take see nothing, even where there is nothing to judge.
    for role in ["postgres", "relay_reader", &format!("{}_reader", stage.name)] {
        let answer = stage.answer(&token(role, None, json!({})), json!({"table": "marker"})).await;
        assert!(answer.contains("Please check Realtime is enabled"), "{role}: {answer}");
    }
    stage
        .run(&format!(
            "insert into friends values ('{ANN}', '{BOB}');
             insert into t values (1, '{ANN}', 'hers'), (2, '{BOB}', 'his'), (3, null, 'h'), (4, '{ANN}', 'x')"
        ))
        .await;
    let ids =
        |changes: Vec<Value>| changes.iter().map(|one| one["record"]["id"].clone()).collect::<Vec<Value>>();
    assert_eq!(ids(stage.changes(&mut ann).await), [1, 2]);
    assert_eq!(ids(stage.changes(&mut service).await), [1, 2, 3, 4]);
    for (login, forbidden) in [
        ("reader", "select count(*) from t"),
        ("reader", "delete from relay.changes"),
        ("reader", "delete from relay.log_0"),
        ("judge", "select count(*) from relay.changes"),
        ("judge", "select count(*) from t"),
    ] {
        let denied = format!("set role {}_{login}; {forbidden}", stage.name);
        let error = stage.database.connect().await.batch_execute(&denied).await.unwrap_err();
        assert_eq!(error.as_db_error().unwrap().code().code(), "42501", "{denied}");
    }
}
