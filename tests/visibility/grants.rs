//! What a role lacks for the policies by which it reads: PostgreSQL shows it nothing, and everything that is asked says which
//! grant helps.

use serde_json::json;

use crate::support::client::Client;
use crate::support::database::{JUDGE, with_login};
use crate::support::http::get;
use crate::support::program::output;
use crate::support::stage::Stage;
use crate::support::{ANN, PATIENCE, token};

/// Policies of `public.docs`, and the grant that is missing.
const LACKS: [(&str, &str); 7] = [
    (
        "exists (select from members m where m.doc = docs.id)",
        "grant select on public.members to authenticated",
    ),
    (
        "id in (select doc from members where member = auth.uid())",
        "grant select on public.members to authenticated",
    ),
    ("exists (select from narrow m where m.doc = docs.id)", "grant select on public.narrow to authenticated"),
    ("exists (select from seen m where m.doc = docs.id)", "grant select on public.seen to authenticated"),
    ("price > 1 and is_shown(id)", "grant execute on function public.is_shown(integer) to authenticated"),
    (
        "id operator(public.===) 1",
        "grant execute on function public.is_same(integer,integer) to authenticated",
    ),
    (
        "auth.uid() is null or exists (select from \"Odd members\" m where m.doc = docs.id)",
        "grant select on public.\"Odd members\" to authenticated",
    ),
];

fn made(policy: &str) -> String {
    format!(
        "create table members (doc int, member uuid); insert into members values (1, '{ANN}');
         create table narrow (doc int, member uuid); insert into narrow values (1, '{ANN}');
         grant select (member) on narrow to authenticated;
         create view seen as select * from members;
         create table \"Odd members\" (doc int); insert into \"Odd members\" values (1);
         create function is_shown(id int) returns bool language plpgsql stable as 'begin return id = 1; end';
         create function is_same(a int, b int) returns bool language plpgsql stable as 'begin return a = b; end';
         create operator === (function = is_same, leftarg = int, rightarg = int);
         revoke execute on function is_shown, is_same from public;
         create table docs (id int primary key, price numeric default 2);
         alter table docs enable row level security; create policy p on docs using ({policy});
         grant select on docs to authenticated; select relay.watch('docs');"
    )
}

fn ann() -> String {
    token("authenticated", Some(ANN), json!({}))
}

/// The next `system` message.
async fn system(client: &mut Client, policy: &str) -> String {
    loop {
        let frame =
            client.frame_within(PATIENCE).await.unwrap_or_else(|| panic!("{policy}: nothing is told"));
        if frame[3] == "system" {
            return frame[4]["message"].as_str().unwrap().to_owned();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_that_a_policy_lacks_is_named_by_all_that_is_asked_and_helps_at_once() {
    for (policy, grant) in LACKS {
        let stage = Stage::new(&made(policy)).await;
        let client = stage.database.connect().await;
        client.batch_execute("set role authenticated").await.unwrap();
        let refused = client.batch_execute("select * from docs").await.unwrap_err();
        assert_eq!(refused.code().unwrap().code(), "42501", "{policy}: {refused}");

        let mut other = stage.join(&ann()).await;
        let mut client = Client::connect(&stage.relay, &ann()).await;
        let told = client.try_subscribe("realtime:c", json!([{"event": "*", "table": "docs"}])).await;
        let told = told["message"].as_str().unwrap();
        assert!(told.ends_with(grant), "{told}");
        stage.changes(&mut other).await;
        let metrics = stage.relay.metrics();
        assert!(metrics.lines().any(|line| line == "relay_roles_lacking_grants 1"), "{metrics}");
        let notes = stage.database.value("select relay.notes('docs')::text").await;
        assert!(notes.replace("\\\"", "\"").contains(grant), "{notes}");
        let url = ["--database-url", &stage.database.url];
        let (_, text, _) = output(&[&["explain", "docs", "--sub", ANN], &url[..]].concat()).await;
        assert!(text.contains(grant), "{text}");
        let (code, text, _) = output(&[&["doctor"], &url[..]].concat()).await;
        assert!(
            code == 1 && text.lines().any(|line| line.starts_with("FAULT") && line.ends_with(grant)),
            "{text}"
        );

        stage.run(grant).await;
        assert_eq!(system(&mut client, policy).await, "Subscribed to PostgreSQL", "{policy}");
        stage.run("insert into docs values (1), (2)").await;
        assert_eq!(client.change().await["record"]["id"], 1, "{policy}");
        let notes = stage.database.value("select relay.notes('docs')::text").await;
        assert!(!notes.contains("grant"), "{notes}");
        let metrics = stage.relay.metrics();
        assert!(metrics.lines().any(|line| line == "relay_roles_lacking_grants 0"), "{metrics}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_that_is_taken_from_under_a_policy_is_told_and_counts_again_once_it_is_back() {
    for (policy, grant) in LACKS {
        let stage = Stage::new(&made(policy)).await;
        stage.run(grant).await;
        let mut client = stage.subscribe(&ann(), json!([{"event": "*", "table": "docs"}])).await;
        stage.run(&grant.replace("grant", "revoke").replace(" to ", " from ")).await;
        let told = system(&mut client, policy).await;
        assert!(told.starts_with("Gap: ") && told.ends_with(grant), "{told}");
        stage.run("insert into docs values (1)").await;
        assert!(stage.changes(&mut client).await.is_empty(), "{policy}");
        stage.run(&format!("{grant}; delete from docs; insert into docs values (1)")).await;
        assert_eq!(stage.changes(&mut client).await.len(), 2, "{policy}");
    }
}

/// Policies that name what stands in a schema which the reader may not use. PostgreSQL looked them up when they were made.
const NAMING: [&str; 6] = [
    "hidden.is_shown(id)",
    "mood = any (array['a', 'b']::hidden.mood[]) and price > 1.5",
    "id operator(hidden.===) 1",
    "exists (select from hidden.members m where m.doc = docs.id and m.member = auth.uid())",
    "exists (select from hidden.members m where m.doc = docs.id) and hidden.is_shown(id)",
    "price::text::hidden.word is not null and id = 1",
];

fn naming(policy: &str) -> String {
    format!(
        "create schema hidden; create type hidden.mood as enum ('a', 'b'); create domain hidden.word as text;
         create table hidden.members (doc int, member uuid); insert into hidden.members values (1, '{ANN}');
         grant select on hidden.members to authenticated;
         create function hidden.is_shown(id int) returns bool language plpgsql stable as 'begin return id = 1; end';
         create function hidden.is_same(a int, b int) returns bool language plpgsql stable as 'begin return a = b; end';
         create operator hidden.=== (function = hidden.is_same, leftarg = int, rightarg = int);
         create table docs (id int primary key, price numeric default 2, mood hidden.mood default 'a');
         alter table docs enable row level security; create policy p on docs using ({policy});
         grant select on docs to authenticated; select relay.watch('docs');"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_shows_what_postgresql_shows_though_its_reader_may_not_look_up_the_names_in_it() {
    for policy in NAMING {
        let stage = Stage::new(&naming(policy)).await;
        stage.run(&format!("grant usage on schema hidden to {JUDGE}")).await;
        let mut client = stage.subscribe(&ann(), json!([{"event": "*", "table": "docs"}])).await;
        // What is prepared outlives neither an analyze nor another rule.
        for meanwhile in [
            "select",
            "analyze hidden.members, docs",
            "alter table hidden.members add more int",
            "analyze docs",
        ] {
            stage.run(&format!("{meanwhile}; insert into docs values (1)")).await;
            let expected = stage.selected("authenticated", &json!({"sub": ANN}), "select id from docs").await;
            assert_eq!(stage.changes(&mut client).await.len(), expected.len(), "{policy}, {meanwhile}");
            stage.run("delete from docs").await;
            assert_eq!(stage.changes(&mut client).await.len(), expected.len(), "{policy}, {meanwhile}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_neither_the_reader_nor_the_judge_may_look_up_is_said_and_comes_with_the_grant() {
    let grant = format!("grant usage on schema hidden to {JUDGE}");
    for policy in NAMING {
        let stage = Stage::new(&naming(policy)).await;
        let mut client = Client::connect(&stage.relay, &ann()).await;
        let told = client.try_subscribe("realtime:c", json!([{"event": "*", "table": "docs"}])).await;
        let told = told["message"].as_str().unwrap();
        assert!(told.ends_with(&grant), "{policy}: {told}");
        let judge = with_login(&stage.database.url, JUDGE);
        let urls = ["--database-url", &stage.database.url, "--judge-url", &judge];
        let (_, text, _) = output(&[&["explain", "docs", "--sub", ANN], &urls[..]].concat()).await;
        assert!(text.contains(&grant), "{text}");
        let (_, text, _) = output(&[&["doctor"], &urls[..]].concat()).await;
        assert!(text.lines().any(|line| line.starts_with("FAULT") && line.ends_with(&grant)), "{text}");
        stage.run(&grant).await;
        assert_eq!(system(&mut client, policy).await, "Subscribed to PostgreSQL");
        stage.run("insert into docs values (1), (2)").await;
        assert_eq!(client.change().await["record"]["id"], 1, "{policy}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_may_look_names_up_along_the_search_path() {
    for policy in [
        "has_table_privilege('docs', 'select')",
        "has_column_privilege('docs', 'id', 'select') and id = 1",
        "to_regclass(name) is not null",
        "name::regclass = 'docs'::regclass",
        "current_schema() = 'public'",
    ] {
        let stage = Stage::new(&format!(
            "create table docs (id int primary key, name text default 'docs'); alter table docs enable row level security;
             create policy p on docs using ({policy}); grant select on docs to authenticated; select relay.watch('docs');"
        ))
        .await;
        let mut client = stage.subscribe(&ann(), json!([{"event": "*", "table": "docs"}])).await;
        stage.run("insert into docs values (1)").await;
        assert_eq!(stage.changes(&mut client).await.len(), 1, "{policy}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_with_row_security_off_is_judged_and_read_as_any_other() {
    for policy in [
        "price > 1.5",
        "exists (select from members m where m.doc = docs.id and m.member = auth.uid())",
        "exists (select from members m where m.doc = docs.id) and is_shown(id)",
    ] {
        let stage = Stage::new("do $$ begin execute format('alter database %I set row_security = off', current_database()); end $$").await;
        stage.run(&made(policy)).await;
        stage
            .run(
                "grant select on members to authenticated; grant execute on function is_shown to authenticated;
                 alter table members enable row level security; create policy p on members using (true)",
            )
            .await;
        let mut client = stage.subscribe(&ann(), json!([{"event": "*", "table": "docs"}])).await;
        stage.run("insert into docs values (1)").await;
        assert_eq!(stage.changes(&mut client).await.len(), 1, "{policy}");
        let path = format!("/realtime/v1/changes?table=docs&apikey={}", ann());
        for _ in 0..3 {
            let answer = get(stage.relay.address, &path, "").await;
            assert_eq!((answer.status, answer.body["rows"][0]["id"].as_i64()), (200, Some(1)), "{policy}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_a_policy_names_and_does_not_read_needs_no_grant() {
    let stage = Stage::new(
        "create table named (id int); create table t (id int primary key, k regclass); alter table t enable row level security;
         grant select on t to authenticated; create policy p on t using (k = 'named'::regclass)",
    )
    .await;
    let missing = "select relay.missing_grants('t', 'authenticated'::regrole)";
    assert_eq!(stage.database.value(missing).await, "{}");
    stage.run("alter policy p on t using (exists (select from named n where n.id = t.id))").await;
    assert_eq!(stage.database.value(missing).await, "{\"grant select on public.named to authenticated\"}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filter_whose_type_may_not_be_looked_up_is_refused_with_the_grant_that_is_missing() {
    for (column, filter) in [
        ("hidden.mood", "v=eq.a"),
        ("hidden.mood", "v=gt.a"),
        ("hidden.word", "v=match.^a"),
        ("hidden.mood[]", "v=eq.{a}"),
        ("hidden.pair", "v=neq.(1,a)"),
    ] {
        let stage = Stage::new(&format!(
            "create schema hidden; create type hidden.mood as enum ('a', 'b'); create domain hidden.word as text;
             create type hidden.pair as (a int, b text);
             create table docs (id int primary key, v {column}); grant select on docs to authenticated;
             select relay.watch('docs')"
        ))
        .await;
        let binding = json!({"event": "*", "schema": "public", "table": "docs", "filter": filter});
        let reader = stage.database.value("select 'relay_test_reader'").await;
        let grants = [JUDGE, &reader].map(|login| format!("grant usage on schema hidden to {login}"));
        for given in [None, Some(0), Some(1)] {
            if let Some(given) = given {
                stage.run(&grants[1 - given]).await;
            }
            let told = stage.answer(&ann(), binding.clone()).await;
            let missing: Vec<_> = (0..2)
                .filter(|grant| given.is_none_or(|given| *grant == given))
                .map(|grant| &*grants[grant])
                .collect();
            assert!(told.ends_with(&format!(": {}", missing.join("; "))), "{column} {filter}: {told}");
            let path = format!("/realtime/v1/changes?table=docs&filter={filter}&apikey={}", ann());
            let answer = get(stage.relay.address, &path, "").await;
            let error = answer.body["error"].as_str().unwrap();
            assert!(answer.status == 400 && error.ends_with(missing.join("; ").as_str()), "{answer:?}");
            if let Some(given) = given {
                stage.run(&grants[1 - given].replace("grant", "revoke").replace(" to ", " from ")).await;
            }
        }
        stage.run(&grants.join("; ")).await;
        let mut client = stage.subscribe(&ann(), json!([binding])).await;
        stage
            .run(&format!(
                "insert into docs values (1, {})",
                if column.contains("pair") {
                    "'(2,b)'"
                } else if column.contains("[]") {
                    "'{a}'"
                } else {
                    "'a'"
                }
            ))
            .await;
        let expected = if filter == "v=gt.a" { 0 } else { 1 };
        assert_eq!(stage.changes(&mut client).await.len(), expected, "{column} {filter}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_looked_up_for_each_reader_anew_names_the_grant_that_the_reader_lacks() {
    for policy in [
        "exists (select from hidden.seen m where m.doc = docs.id)",
        "exists (select from hidden.members m where m.doc = docs.id)",
        "exists (select from hidden.over m where m.doc = docs.id) and price > 1",
        "exists (select from public.seen m where m.doc = docs.id and hidden.is_shown(m.doc))",
        "id in (select hidden.is_member())",
    ] {
        let stage = Stage::new(&format!(
            "create schema hidden;
             create table hidden.members (doc int, member uuid); insert into hidden.members values (1, '{ANN}');
             alter table hidden.members enable row level security;
             create policy own on hidden.members using (member = auth.uid());
             create view hidden.seen as select * from hidden.members; create view hidden.over as select * from hidden.seen;
             create view public.seen as select * from hidden.members;
             create function hidden.is_shown(id int) returns bool language plpgsql stable as 'begin return id = 1; end';
             create function hidden.is_member() returns setof int language plpgsql stable security definer as
               'begin return query select 1; end';
             grant select on hidden.members, hidden.seen, hidden.over, public.seen to authenticated;
             create table docs (id int primary key, price numeric default 2);
             alter table docs enable row level security; create policy p on docs using ({policy});
             grant select on docs to authenticated; select relay.watch('docs');
             grant usage on schema hidden to {JUDGE}"
        ))
        .await;
        let needs_no_more = policy.contains("is_member");
        let mut client = Client::connect(&stage.relay, &ann()).await;
        let told = client.try_subscribe("realtime:c", json!([{"event": "*", "table": "docs"}])).await;
        let told = told["message"].as_str().unwrap();
        let grant = "grant usage on schema hidden to authenticated";
        let path = format!("/realtime/v1/changes?table=docs&apikey={}", ann());
        let polled = format!("{path}&wait=5&since={}", stage.database.value("select relay.cursor()").await);
        if !needs_no_more {
            assert!(told.ends_with(grant) && !told.contains('\n'), "{policy}: {told}");
            let (url, judge) = (&stage.database.url, with_login(&stage.database.url, JUDGE));
            let of = ["explain", "docs", "--sub", ANN, "--database-url", url, "--judge-url", &judge];
            let (_, text, _) = output(&of).await;
            assert!(text.contains(grant), "{policy}: {text}");
            stage.run("insert into docs values (0)").await;
            for path in [&path, &polled] {
                let answer = get(stage.relay.address, path, "").await;
                let error = answer.body["error"].as_str().unwrap_or_default();
                assert!(answer.status == 400 && error.ends_with(grant), "{policy}: {answer:?}");
            }
            stage.run(&format!("delete from docs; {grant}")).await;
            assert_eq!(system(&mut client, policy).await, "Subscribed to PostgreSQL", "{policy}");
        }
        stage.run("insert into docs values (1), (2)").await;
        let expected = stage.selected("authenticated", &json!({"sub": ANN}), "select id from docs").await;
        assert_eq!(expected, ["1"], "{policy}");
        assert_eq!(client.change().await["record"]["id"], 1, "{policy}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_look_past_row_security_needs_no_right_of_the_reader_to_look_names_up() {
    let stage = Stage::new(&format!(
        "create schema hidden; grant usage on schema hidden to service_role;
         create table hidden.members (doc int, member uuid); insert into hidden.members values (1, '{ANN}'), (2, null);
         alter table hidden.members enable row level security;
         create policy own on hidden.members using (member = auth.uid());
         grant select on hidden.members to authenticated, service_role;
         create table docs (id int primary key); alter table docs enable row level security;
         create policy p on docs using (exists (select from hidden.members m where m.doc = docs.id));
         grant select on docs to authenticated; select relay.watch('docs')"
    ))
    .await;
    let mut client = Client::connect(&stage.relay, &ann()).await;
    client.subscribe("realtime:c", json!([{"event": "*", "table": "docs"}])).await;
    stage.run("insert into docs values (2), (1)").await;
    let expected = stage.selected("authenticated", &json!({"sub": ANN}), "select id from docs").await;
    assert_eq!(expected, ["1"]);
    assert_eq!(client.change().await["record"]["id"], 1);
}

/// PostgreSQL leaves out what is joined by OR to a policy that is true, and asks for no rights on it.
#[tokio::test(flavor = "multi_thread")]
async fn beside_a_policy_that_is_true_for_all_rows_no_grant_for_other_permissive_ones_is_needed() {
    for ((policy, _), open) in LACKS.iter().zip(["true", "not false", "false or true"].iter().cycle()) {
        let stage = Stage::new(&format!("{}; create policy open on docs using ({open})", made(policy))).await;
        let claims = json!({"role": "authenticated", "sub": ANN});
        let docs = json!([{"event": "*", "schema": "public", "table": "docs"}]);
        let mut client = stage.subscribe(&ann(), docs).await;
        stage.run("insert into docs values (1)").await;
        assert_eq!(
            stage.selected("authenticated", &claims, "select id::text from docs").await,
            ["1"],
            "{policy}"
        );
        assert_eq!(stage.changes(&mut client).await.len(), 1, "{policy} beside {open}");
        // A restrictive policy is evaluated for each row.
        stage
            .run(&format!("drop policy p on docs; create policy p on docs as restrictive using ({policy})"))
            .await;
        assert!(system(&mut client, policy).await.contains("grant "), "{policy}");
        stage.run("insert into docs values (2)").await;
        assert_eq!(stage.changes(&mut client).await.len(), 0, "{policy} as restrictive");
    }
}
