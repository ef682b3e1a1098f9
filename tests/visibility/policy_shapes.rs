//! Policies of every shape: sub-selects, whole rows, other tables with row security, and names that look like trouble.

use serde_json::json;

use crate::support::stage::Stage;
use crate::support::{ANN, BOB, token};

fn user(sub: &str) -> String {
    token("authenticated", Some(sub), json!({}))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_may_name_the_table_from_within_a_sub_select_and_read_tables_with_row_security() {
    let stage = Stage::new(
        "create table members (room_id int, user_id uuid, id int);
         create table messages (id int primary key, room_id int, body text);
         alter table members enable row level security; alter table messages enable row level security;
         create policy own on members for select using (user_id = (select auth.uid()));
         create policy shared on messages for select to authenticated
           using (exists (select from members m where m.room_id = messages.room_id and m.id is null));
         create policy by_list on messages for select to authenticated
           using (id in (select m.id from members m where m.user_id = auth.uid()));
         create policy counted on messages for select to anon using ((select count(*) from members) > 0);
         grant select on members, messages to authenticated, anon; select relay.watch('messages')",
    )
    .await;
    let (mut ann, mut bob) = (stage.join(&user(ANN)).await, stage.join(&user(BOB)).await);
    // What row security hides from the subscriber, it hides from the subscriber's policy.
    let mut anon = stage.join(&token("anon", None, json!({}))).await;
    stage
        .run(&format!(
            "insert into members values (1, '{ANN}', null), (1, '{BOB}', null), (2, '{BOB}', null), (9, '{ANN}', 13)"
        ))
        .await;
    stage
        .run(
            "insert into messages values (10, 1, 'both'), (12, 2, 'bob'), (13, 9, 'ann'), (14, null, 'none')",
        )
        .await;
    stage.run(&format!("delete from members where user_id = '{BOB}'")).await;
    stage.run("insert into messages values (15, 1, 'ann')").await;
    let line =
        |id: i32, room: i32, body: &str| format!(r#"INSERT {{"id":{id},"room_id":{room},"body":"{body}"}}"#);
    let [both, ann_only, later] = [line(10, 1, "both"), line(13, 9, "ann"), line(15, 1, "ann")];
    assert_eq!(stage.told(&mut ann).await, [both, ann_only, later]);
    let bobs = stage.told(&mut bob).await;
    assert!(bobs.iter().all(|line| !line.contains("ann")), "{bobs:?}");
    assert_eq!(stage.told(&mut anon).await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_may_call_what_its_subscribers_may_not_name() {
    let stage = Stage::new(
        "create schema private; create table private.admins (id uuid); insert into private.admins values ('ANN');
         create function private.is_admin() returns bool language sql stable security definer
           as 'select exists (select from private.admins where id = auth.uid())';
         create table t (id int primary key); alter table t enable row level security;
         create policy admins on t using (private.is_admin());
         create table u (id int primary key); alter table u enable row level security;
         create policy admins on u using (exists (select from private.admins where id = auth.uid()));
         grant usage on schema private to relay_test_judge;
         grant select on t, u to authenticated; select relay.watch('t'), relay.watch('u')"
            .replace("ANN", ANN)
            .as_str(),
    )
    .await;
    let (mut ann, mut bob) = (stage.join(&user(ANN)).await, stage.join(&user(BOB)).await);
    // The second policy reads a table on which the subscriber has no right: a SELECT would raise.
    stage.run("insert into t values (1); insert into u values (2)").await;
    assert_eq!(stage.told(&mut ann).await, [r#"INSERT {"id":1}"#]);
    assert_eq!(stage.told(&mut bob).await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_may_read_the_whole_row_and_columns_of_any_type() {
    let stage = Stage::new(
        "create type mood as enum ('sad', 'glad'); create domain score as int check (value between 0 and 100);
         create type point3 as (x int, y int, z text);
         create table t (id int primary key, mood mood, score score, at timestamptz, tags text[], place point3,
           raw bytea, code char(4), bits bit(3), span int4range, doc jsonb, price numeric(8, 2), f float8);
         alter table t enable row level security;
         create policy whole on t using (to_jsonb(t) ->> 'mood' = 'glad' and t is distinct from null
           and mood > 'sad' and score >= 50 and at > '2020-01-01 00:00:00+00' and 'x' = any (tags)
           and (place).x = 1 and (place).z is null and raw = '\\xdead' and code = 'ab' and bits = '101'
           and span @> 5 and doc @> '{\"a\": [1]}' and price = 1.5 and f = 'NaN');
         grant select on t to anon; select relay.watch('t')",
    )
    .await;
    let mut anon = stage.join(&token("anon", None, json!({}))).await;
    let row = |id: i32, mood: &str, place: &str| {
        format!(
            "insert into t values ({id}, '{mood}', 50, '2020-01-01 01:00+00', '{{x,y}}', '{place}', '\\xdead', 'ab',
              '101', '[1,9)', '{{\"a\": [1, 2]}}', 1.50, 'NaN')"
        )
    };
    for (id, mood, place) in [(1, "glad", "(1,2,)"), (2, "sad", "(1,2,)"), (3, "glad", "(1,2,\"\")")] {
        stage.run(&row(id, mood, place)).await;
    }
    let ids: Vec<_> =
        stage.changes(&mut anon).await.iter().map(|change| change["record"]["id"].clone()).collect();
    assert_eq!(ids, [1]);
    assert_eq!(stage.selected("anon", &json!({}), "select id from t").await, ["1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_only_names() {
    let long = "x".repeat(63);
    let tables =
        ["we\"ird; drop table marker", "UPPER", &long, "select", "relay images", "a.b", "naïve 🦀", "t%I$1"];
    let quoted = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
    let literal = |text: &str| format!("'{}'", text.replace('\'', "''"));
    let mut sql = String::new();
    for table in tables {
        let name = quoted(table);
        // A column of the table's own name, where none has it already.
        let own = if table == "relay images" { "own".to_owned() } else { name.clone() };
        // Columns with the names that judging uses itself, the table's own, and some that break bad quoting.
        sql += &format!(
            "create table {name} (\"relay n\" int primary key, \"relay image\" uuid, \"relay images\" int, \"a\"\"b\" int,
               \"O'Neill; --\" text, {own} text, \"Mixed Case\" text);
             alter table {name} enable row level security;
             create policy {name} on {name} using (\"relay image\" = (select auth.uid()) and \"relay n\" > 0
               and {name}.\"relay images\" = 1 and \"a\"\"b\" = 2 and \"O'Neill; --\" = 'it''s' and {own} = 'own'
               and exists (select from (values (1)) \"relay verdicts\"(\"relay n\") where \"relay verdicts\".\"relay n\" = {name}.\"relay images\"));
             grant select on {name} to authenticated; select relay.watch({regclass}::regclass);",
            regclass = literal(&name),
        );
    }
    let stage = Stage::new(&sql).await;
    for table in tables {
        let filter = r#"a"b=eq.2,O'Neill; --=eq.it's,Mixed Case=not.is.null,relay n=gt.0"#;
        let binding = json!([
            {"event": "*", "schema": "public", "table": table},
            {"event": "*", "schema": "public", "table": table, "filter": filter},
        ]);
        let mut ann = stage.subscribe(&user(ANN), binding.clone()).await;
        let mut bob = stage.subscribe(&user(BOB), binding).await;
        let name = quoted(table);
        stage
            .run(&format!(
                "insert into {name} values (1, '{ANN}', 1, 2, 'it''s', 'own', 'x'), (2, '{ANN}', 1, 2, 'its', 'own', 'x'),
                  (3, '{ANN}', 2, 2, 'it''s', 'own', 'x'), (4, null, 1, 2, 'it''s', 'own', 'x')"
            ))
            .await;
        let told = stage.changes(&mut ann).await;
        assert_eq!(told.len(), 1, "{table}: {told:?}");
        assert_eq!((&told[0]["table"], &told[0]["record"]["relay n"]), (&json!(table), &json!(1)));
        assert_eq!(told[0]["record"]["O'Neill; --"], "it's");
        assert_eq!(stage.told(&mut bob).await, [""; 0], "{table}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_with_an_odd_name_is_a_schema() {
    let stage = Stage::new(
        "create schema \"My \"\"own\"\" schema\"; create table \"My \"\"own\"\" schema\".\"T\" (id int primary key, v text);
         alter table \"My \"\"own\"\" schema\".\"T\" enable row level security;
         create policy p on \"My \"\"own\"\" schema\".\"T\" using (v = 'yes');
         grant usage on schema \"My \"\"own\"\" schema\" to anon; grant select on \"My \"\"own\"\" schema\".\"T\" to anon;
         select relay.watch('\"My \"\"own\"\" schema\".\"T\"')",
    )
    .await;
    let binding =
        json!([{"event": "INSERT", "schema": "My \"own\" schema", "table": "T", "filter": "id=in.(1,2)"}]);
    let mut anon = stage.subscribe(&token("anon", None, json!({})), binding).await;
    stage.run("insert into \"My \"\"own\"\" schema\".\"T\" values (1, 'yes'), (2, 'no'), (3, 'yes')").await;
    assert_eq!(stage.told(&mut anon).await, [r#"INSERT {"id":1,"v":"yes"}"#]);
}
