//! `relay explain` and `relay doctor` say how policies are decided, and why a reader would get nothing.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::database::Database;
use crate::support::program::output;
use crate::support::{ANN, SECRET, token, token_for};

async fn database() -> Database {
    let database = Database::new().await;
    database
        .run(&format!(
            "create table members (team int, member uuid);
             create table docs (id int primary key, owner uuid, team int, title text, secret text);
             alter table docs enable row level security;
             grant select on members to authenticated; grant select (id, owner, team, title) on docs to authenticated;
             create policy own on docs for select to authenticated using (owner = (select auth.uid()));
             create policy team on docs for select to authenticated using (
               exists (select from members m where m.team = docs.team and m.member = auth.uid()));
             create policy mfa on docs as restrictive for select to authenticated using (auth.jwt() ->> 'aal' = 'aal2');
             select relay.watch('docs');
             insert into docs values (1, '{ANN}', 5, 'hers', 's'), (2, null, 6, 'other', 's');
             create function is_member(team int) returns bool language plpgsql as 'begin return true; end';
             create table notes (id int primary key, team int); grant select on notes to authenticated;
             alter table notes enable row level security;
             create policy p on notes using (is_member(team)); select relay.watch('notes')"
        ))
        .await;
    database
}

async fn explained(database: &Database, arguments: &[&str]) -> Value {
    let all = [&["explain", "--json", "--database-url", &database.url], arguments].concat();
    let (code, text, error) = output(&all).await;
    assert_eq!(error, "", "{arguments:?}");
    let found: Value = serde_json::from_str(&text).unwrap();
    let expected = if found["would_receive"] == true { 0 } else { 1 };
    assert_eq!(code, expected, "{arguments:?}: {found}");
    found
}

/// The exit code and the first line of what a person is told.
async fn verdict(database: &Database, arguments: &[&str]) -> (i32, String) {
    let all = [&["explain", "--database-url", &database.url], arguments].concat();
    let (code, text, error) = output(&all).await;
    assert_eq!(error, "", "{arguments:?}");
    (code, text.lines().next().unwrap().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn it_tells_the_way_the_index_and_what_decided() {
    let database = database().await;
    let second_factor = token("authenticated", Some(ANN), json!({"aal": "aal2"}));
    let found =
        explained(&database, &["docs", "--token", &second_factor, "--key", "1", "--filter", "title=eq.hers"])
            .await;
    assert_eq!(found["way"], "inverted");
    assert_eq!(found["hidden_columns"], json!(["secret"]));
    assert_eq!(found["index"], json!(["named by PostgreSQL", "owner and title by hash"]));
    assert_eq!(found["claims_read"], json!(["auth.jwt() ->> 'aal'", "(auth.jwt() ->> 'sub')::uuid"]));
    assert_eq!(found["row"], json!({"found": true, "allowed": true, "by": ["own"], "matches": true}));
    let ways: Vec<&Value> =
        found["policies"].as_array().unwrap().iter().map(|policy| &policy["way"]).collect();
    assert_eq!(ways, ["compiled", "inverted", "compiled"]);

    let found = explained(&database, &["docs", "--sub", ANN, "--key", "1"]).await;
    assert_eq!(found["row"], json!({"found": true, "allowed": false, "by": ["mfa"], "matches": null}));
    assert_eq!(found["index"], json!([]), "no row can be seen with these claims");
    let found = explained(&database, &["docs", "--token", &second_factor, "--key", "2"]).await;
    assert_eq!(found["row"], json!({"found": true, "allowed": false, "by": [], "matches": null}));
    let row = json!({"id": 9, "owner": ANN, "team": 1, "title": "", "secret": ""}).to_string();
    let found = explained(&database, &["docs", "--token", &second_factor, "--row", &row]).await;
    assert_eq!(found["row"]["allowed"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_tells_which_part_keeps_a_policy_from_being_compiled() {
    let database = database().await;
    let found = explained(&database, &["notes", "--sub", ANN]).await;
    assert_eq!(found["way"], "one by one");
    assert_eq!(
        found["obstacles"],
        json!([{"part": "public.is_member(team)", "why": "public.is_member() may read any claim"}])
    );
    assert_eq!((&found["claims_read"], &found["index"]), (&Value::Null, &Value::Null));
    let (_, text, _) = output(&["doctor", "--database-url", &database.url]).await;
    let line = text.lines().find(|line| line.contains("public.notes")).unwrap_or_else(|| panic!("{text}"));
    assert!(line.starts_with("note") && line.contains("public.is_member() may read any claim"), "{line}");
    assert!(!text.contains("public.docs: for"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_policy_of_a_materialized_view_is_shown() {
    let database = database().await;
    database
        .run(
            "create materialized view counts as select team, count(*) as n from docs group by team;
             create unique index on counts (team); grant select on counts to authenticated; select relay.watch('counts')",
        )
        .await;
    for (policy, condition) in [
        ("auth.role() = 'authenticated'", "(auth.role() = 'authenticated'::text)"),
        ("(team > 3) or (n < 5)", "((counts.team > 3) OR (counts.n < 5))"),
        ("team > 3 -- (the teams of today)", "(counts.team > 3)"),
    ] {
        database.run(&format!("select relay.allow('counts', $policy${policy}$policy$)")).await;
        let found = explained(&database, &["counts", "--sub", ANN]).await;
        assert_eq!((&found["obstacles"], &found["way"]), (&json!([]), &json!("compiled")), "{found}");
        let [shown] = found["policies"].as_array().unwrap().as_slice() else { panic!("{found}") };
        assert_eq!((&shown["name"], &shown["condition"]), (&json!("of relay.allow"), &json!(condition)));
        let (_, text, _) =
            output(&["explain", "counts", "--database-url", &database.url, "--sub", ANN]).await;
        assert!(text.contains("permissive policy of relay.allow (compiled): "), "{text}");
    }
    // One that PostgreSQL evaluates is shown as it was given.
    for policy in [
        "exists (select from public.members m where m.team = counts.team) -- (the teams of today)",
        "team in (\n  select team from public.members\n)",
    ] {
        database.run(&format!("select relay.allow('counts', $policy${policy}$policy$)")).await;
        let found = explained(&database, &["counts", "--sub", ANN]).await;
        let [obstacle] = found["obstacles"].as_array().unwrap().as_slice() else { panic!("{found}") };
        assert_eq!(obstacle["part"], policy);
        let (_, text, _) =
            output(&["explain", "counts", "--database-url", &database.url, "--sub", ANN]).await;
        assert!(text.contains(&format!("    because of: {policy}\n    where ")), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn explain_says_why_a_reader_would_get_nothing() {
    let database = database().await;
    database.run("create table quiet (id int); create view seen as select * from quiet; alter table docs add hidden int").await;
    for (arguments, why) in [
        (
            vec!["nowhere"],
            "there is no relation nowhere on the search path; for a table in another schema: relay explain SCHEMA.nowhere",
        ),
        (vec!["public.nowhere"], "there is no relation public.nowhere"),
        (vec!["seen"], "it is a view: watch the tables it reads"),
        (vec!["quiet"], "it is not watched: select relay.watch('public.quiet')"),
        (vec!["quiet"], "authenticated may not read it: grant select on public.quiet to authenticated"),
        (vec!["docs", "--role", "nobody"], "the role nobody does not exist"),
        (
            vec!["docs", "--role", "postgres"],
            "postgres is a superuser, and tokens with a superuser role receive nothing",
        ),
        (
            vec!["docs", "--role", "anon"],
            "no row-level policy lets anon read a row: create policy ... on public.docs for select to anon using (...)",
        ),
    ] {
        let found = explained(&database, &arguments).await;
        let blockers = found["blockers"].as_array().unwrap();
        assert!(blockers.iter().any(|blocker| blocker == why), "{arguments:?}: {blockers:?}");
        assert_eq!(found["way"], Value::Null, "{arguments:?}");
    }
    let found = explained(&database, &["docs", "--filter", "secret=eq.s"]).await;
    let refused = found["filter"]["refused"].as_str().unwrap();
    assert!(refused.contains("has no column secret"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_says_that_no_user_was_named() {
    let database = database().await;
    let hint = "public.docs for the role authenticated without a user: name one by --sub UUID or --token";
    for (who, is_hinted) in [
        (vec![], true),
        (vec!["--claims", r#"{"app_metadata":{"role":"admin"}}"#], true),
        (vec!["--sub", ANN], false),
        (vec!["--claims", r#"{"sub":"x"}"#], false),
        (vec!["--role", "anon"], false),
    ] {
        let arguments = [&["explain", "docs", "--database-url", &database.url], &who[..]].concat();
        let (_, text, error) = output(&arguments).await;
        assert_eq!((text.contains(hint), error.as_str()), (is_hinted, ""), "{who:?}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_tells_a_person_in_words() {
    let database = database().await;
    let arguments = ["explain", "docs", "--database-url", &database.url, "--sub", ANN, "--key", "1"];
    let (code, text, error) = output(&arguments).await;
    assert_eq!((code, error.as_str()), (1, ""));
    for line in [
        "public.docs for the role authenticated",
        "  columns that the role may not read: secret",
        "  decided: inverted, by one query a page for the subscribers who may see its rows",
        "  permissive policy own (compiled, of this row: yes): (owner = ( SELECT auth.uid() AS uid))",
        "  the row is hidden by mfa",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\nis not in\n{text}");
    }
    for (wrong, told) in [
        (["--token", "x"], "--token is not a JWT"),
        (["--claims", "[]"], "--claims is not a JSON object"),
        (["--row", "1"], "--row is not a JSON object"),
    ] {
        let arguments = [&["explain", "docs", "--database-url", &database.url], &wrong[..]].concat();
        let (code, _, error) = output(&arguments).await;
        assert!(code == 1 && error.contains(told), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filter_or_key_that_does_not_fit_is_told_what_is_wrong_with_it() {
    let database = database().await;
    database
        .run(&format!(
            "create table odd (id uuid primary key, at timestamptz, price numeric(6, 2), kind char(3), doc jsonb);
             grant select on odd to authenticated; select relay.watch('odd');
             insert into odd values ('{ANN}', '2026-01-01 10:00+02', 1.5, 'a', '{{}}');
             create table pair (a int, b text, primary key (a, b)); grant select on pair to authenticated;
             select relay.watch('pair'); insert into pair values (1, '1')"
        ))
        .await;
    for (filter, told) in [
        ("id=eq.x", "the filter does not fit public.docs: invalid input syntax for type integer: \"x\""),
        ("owner=eq.7", "the filter does not fit public.docs: invalid input syntax for type uuid: \"7\""),
        ("id=gt.99999999999", "the filter does not fit public.docs: value \"99999999999\" is out of range"),
        ("id=like.5%", "the filter does not fit public.docs: operator does not exist: integer ~~ text"),
        ("nowhere=eq.1", "filter: public.docs has no column nowhere that the role authenticated may read"),
        ("id>7", "the filter cannot be used: "),
    ] {
        let found = explained(&database, &["docs", "--sub", ANN, "--filter", filter]).await;
        let refused = found["filter"]["refused"].as_str().unwrap();
        assert!(refused.starts_with(told), "{filter}: {refused}");
    }
    for (table, key, told) in [
        ("docs", "x", "--key does not fit public.docs: invalid input syntax for type integer: \"x\""),
        ("docs", "1.5", "--key does not fit public.docs: invalid input syntax for type integer: \"1.5\""),
        ("docs", r#"{"nowhere": 1}"#, "--key does not fit public.docs: docs has no column nowhere"),
        (
            "docs",
            r#"{"owner": 7}"#,
            "--key does not fit public.docs: invalid input syntax for type uuid: \"7\"",
        ),
        ("odd", "7", "--key does not fit public.odd: invalid input syntax for type uuid: \"7\""),
        (
            "odd",
            r#"{"at": "soon"}"#,
            "--key does not fit public.odd: invalid input syntax for type timestamp with time zone",
        ),
        ("pair", "1", "the table has no key of one column"),
    ] {
        let arguments = ["explain", table, "--sub", ANN, "--key", key, "--database-url", &database.url];
        let (code, said, error) = output(&arguments).await;
        assert!(code == 1 && error.contains(told), "{table} {key}: {said} {error}");
    }
    // What PostgreSQL reads as the same value is the same key.
    for (table, key) in [
        ("docs", "1"),
        ("docs", " 1 "),
        ("odd", &*ANN.to_uppercase()),
        ("odd", r#"{"at": "2026-01-01T08:00:00Z"}"#),
        ("odd", r#"{"price": "1.50", "kind": "a"}"#),
        ("pair", r#"{"a": "1", "b": 1}"#),
    ] {
        let found = explained(&database, &[table, "--sub", ANN, "--key", key]).await;
        assert_eq!(found["row"]["found"], true, "{table} {key}");
    }
    let found = explained(&database, &["docs", "--sub", ANN, "--key", "77"]).await;
    assert_eq!(found["row"]["found"], false);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_line_tells_what_is_missing_and_the_statement_that_mends_it() {
    let database = database().await;
    database
        .run(
            "create table quiet (id int); grant select on quiet to authenticated;
             create table closed (id int); select relay.watch('closed');
             create table bare (id int); alter table bare enable row level security;
             grant select on bare to authenticated; select relay.watch('bare');
             create table teams (id int, member uuid);
             create table plans (id int, team int); alter table plans enable row level security;
             grant select on plans to authenticated; select relay.watch('plans');
             create policy p on plans using (team in (select id from teams where member = auth.uid()));
             create schema crm; create table crm.deals (id int); select relay.watch('crm.deals');
             grant select on crm.deals to authenticated",
        )
        .await;
    for (table, told) in [
        ("quiet", "it is not watched: select relay.watch('public.quiet')"),
        ("closed", "authenticated may not read it: grant select on public.closed to authenticated"),
        ("crm.deals", "authenticated may not use its schema: grant usage on schema crm to authenticated"),
        (
            "bare",
            "no row-level policy lets authenticated read a row: create policy ... on public.bare for select to authenticated using (...)",
        ),
        (
            "plans",
            "its policies read what authenticated may not: grant select on public.teams to authenticated",
        ),
    ] {
        let found = verdict(&database, &[table, "--sub", ANN]).await;
        assert_eq!(found, (1, format!("would not: {told}")), "{table}");
    }
    database
        .run(
            "select relay.watch('quiet'); grant select on closed to authenticated;
             grant usage on schema crm to authenticated; create policy p on bare for select to authenticated using (true);
             grant select on public.teams to authenticated",
        )
        .await;
    for table in ["quiet", "closed", "crm.deals", "bare", "plans"] {
        assert_eq!(
            verdict(&database, &[table, "--sub", ANN]).await,
            (0, "would receive".to_owned()),
            "{table}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_line_names_the_tables_whose_names_are_near_an_unknown_one() {
    let database = database().await;
    database
        .run(
            "create schema crm; create table crm.deals (id int); create table crm.\"Orders\" (id int);
             create table crm.docs (id int)",
        )
        .await;
    let none = "there is no relation";
    let path = "on the search path";
    for (table, told) in [
        ("deals", format!("{none} deals {path}; there is crm.deals")),
        ("deal", format!("{none} deal {path}; there is crm.deals")),
        ("public.dael", format!("{none} public.dael; there is crm.deals")),
        ("dosc", format!("{none} dosc {path}; there is public.docs, crm.docs")),
        ("Docs_", format!("{none} Docs_ {path}; there is public.docs, crm.docs")),
        ("mcr.orders", format!("{none} mcr.orders; there is crm.\"Orders\"")),
        (
            "nowhere",
            format!("{none} nowhere {path}; for a table in another schema: relay explain SCHEMA.nowhere"),
        ),
        ("id", format!("{none} id {path}; for a table in another schema: relay explain SCHEMA.id")),
    ] {
        let found = verdict(&database, &[table, "--sub", ANN]).await;
        assert_eq!(found, (1, format!("would not: {told}")), "{table}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_line_tells_what_is_wrong_with_a_token() {
    let database = database().await;
    let good = token("authenticated", Some(ANN), json!({"aal": "aal2"}));
    let (code, line) = verdict(&database, &["docs", "--token", &good, "--jwt-secret", SECRET]).await;
    assert_eq!((code, &*line), (0, "would receive"));
    let other = ["--jwt-secret", "another-secret-of-at-least-32-bytes-of-nobody"];
    let (code, line) = verdict(&database, &[&["docs", "--token", &good][..], &other].concat()).await;
    assert_eq!(
        (code, &*line),
        (
            1,
            "would not: Failed to validate JWT signature: the secret or key that signed it is not this relay's: relay token \
             --sub UUID makes one with the secret of RELAY_JWT_SECRET"
        )
    );
    let ended = token_for("authenticated", Some(ANN), json!({}), Duration::ZERO);
    for secret in [&[][..], &["--jwt-secret", SECRET]] {
        let (code, line) = verdict(&database, &[&["docs", "--token", &ended], secret].concat()).await;
        assert!(code == 1 && line.starts_with("would not: the token expired "), "{line}");
        assert!(line.ends_with(" seconds ago: relay token --sub UUID makes another one"), "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_that_is_too_short_is_told_and_the_rest_is_explained() {
    let database = database().await;
    let good = token("authenticated", Some(ANN), json!({"aal": "aal2"}));
    let ended = token_for("authenticated", Some(ANN), json!({}), Duration::ZERO);
    for (secret, token, code, first) in [
        ("short", &good, 0, "would receive"),
        ("", &good, 0, "would receive"),
        ("short", &ended, 1, "would not: the token expired "),
    ] {
        let arguments =
            ["explain", "docs", "--database-url", &database.url, "--token", token, "--jwt-secret", secret];
        let (found, text, told) = output(&arguments).await;
        assert!(
            found == code && text.starts_with(first) && text.contains("permissive policy own"),
            "{secret:?} {text} {told}"
        );
        let is_told = told.contains("RELAY_JWT_SECRET") && told.contains("is not checked");
        assert_eq!(is_told, first == "would receive", "{secret:?}: {told}");
        assert!(secret.is_empty() || !told.contains(secret) || told.contains("too short"), "{told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_line_tells_which_claim_policy_or_filter_keeps_a_row_back() {
    let database = database().await;
    database
        .run(&format!(
            "create table org (id int primary key, org text, hidden bool); grant select on org to authenticated;
             alter table org enable row level security; select relay.watch('org');
             create policy \"own rows\" on org using (org = auth.jwt() ->> 'org');
             insert into org values (1, 'a', false); insert into docs values (3, '{ANN}', 7, 'third', 's')"
        ))
        .await;
    let second_factor = token("authenticated", Some(ANN), json!({"aal": "aal2"}));
    let none = "no permissive policy lets the row through";
    let own_rows = "`own rows`: (org = (auth.jwt() ->> 'org'::text))";
    for (arguments, told) in [
        (vec!["org"], String::from("no row can be seen with these claims; the token has no auth.jwt() ->> 'org'")),
        (
            vec!["org", "--key", "1"],
            format!("{none}: {own_rows}; the token has no auth.jwt() ->> 'org'"),
        ),
        (
            vec!["org", "--key", "1", "--claims", r#"{"org": "b"}"#],
            format!("{none}: {own_rows}; the token says: auth.jwt() ->> 'org' = \"b\""),
        ),
        (vec!["org", "--key", "2"], "there is no such row".to_owned()),
        (
            vec!["docs", "--sub", ANN, "--key", "1"],
            "a restrictive policy keeps the row back: `mfa`: ((auth.jwt() ->> 'aal'::text) = 'aal2'::text); the token has no \
             auth.jwt() ->> 'aal'"
                .to_owned(),
        ),
        (
            vec!["docs", "--token", &second_factor, "--filter", "titel=eq.hers"],
            "filter: public.docs has no column titel that the role authenticated may read; there is title".to_owned(),
        ),
        (
            vec!["docs", "--token", &second_factor, "--filter", "secret=eq.s"],
            "filter: public.docs has no column secret that the role authenticated may read: grant select (secret) on public.docs \
             to authenticated"
                .to_owned(),
        ),
        (
            vec!["docs", "--token", &second_factor, "--filter", "title=eq.hers", "--key", "3"],
            "the row does not match the filter title=eq.hers".to_owned(),
        ),
    ] {
        let found = verdict(&database, &arguments).await;
        assert_eq!(found, (1, format!("would not: {told}")), "{arguments:?}");
    }
    for arguments in [
        vec!["org", "--claims", r#"{"org": "a"}"#, "--key", "1"],
        vec!["docs", "--token", &second_factor, "--filter", "title=eq.third", "--key", "3"],
        vec!["notes", "--sub", ANN],
    ] {
        assert_eq!(verdict(&database, &arguments).await, (0, "would receive".to_owned()), "{arguments:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_is_explained_by_its_own_rules() {
    let database = database().await;
    database
        .run(
            "create table parted (id int primary key, open bool) partition by range (id);
             create table low partition of parted for values from (0) to (10);
             create table high partition of parted for values from (10) to (20);
             alter table low enable row level security; create policy opened on low for select using (open);
             grant select on parted, low to authenticated; select relay.watch('parted');
             insert into parted values (1, true), (2, false)",
        )
        .await;
    let found = explained(&database, &["low", "--sub", ANN, "--key", "1", "--filter", "open=eq.true"]).await;
    assert_eq!((&found["blockers"], &found["row"]["by"]), (&json!([]), &json!(["opened"])), "{found}");
    let found = explained(&database, &["low", "--sub", ANN, "--key", "2"]).await;
    assert_eq!((&found["row"]["found"], &found["row"]["allowed"]), (&json!(true), &json!(false)), "{found}");
    let (code, line) = verdict(&database, &["high", "--sub", ANN]).await;
    assert!(code == 1 && line.contains("grant select on public.high to authenticated"), "{line}");
}
