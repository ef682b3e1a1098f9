//! What a policy rests on may change under live subscriptions, whichever way it is decided: members, columns, helpers, and the row
//! security of the tables that it looks into. The next change is judged by what is there then.

use serde_json::json;

use crate::support::{ANN, BOB, token};
use crate::visibility::policy_leaks::{IN_TEAM, TEAMS, rows, run, stage, table, user};

#[tokio::test(flavor = "multi_thread")]
async fn a_membership_counts_for_the_very_next_change_after_it_came_or_went() {
    let sub_select = "team in (select m.team from members m where m.member = auth.uid())";
    let stage =
        stage(&(TEAMS.to_owned() + &table("t", "team int", IN_TEAM) + &table("u", "team int", sub_select)))
            .await;
    let (mut ann, mut bob) = (stage.join(&user(ANN)).await, stage.join(&user(BOB)).await);
    for id in (0..40).step_by(4) {
        let insert = |id: i32| format!("insert into t values ({id}, 1); insert into u values ({id}, 1);");
        run(&stage, &insert(id)).await;
        assert_eq!(rows(&stage, &mut ann).await, [format!("t{id}"), format!("u{id}")]);
        // In one transaction, and then in the one before.
        run(&stage, &format!("begin; delete from members where member = 'ANN'; {} commit", insert(id + 1)))
            .await;
        run(&stage, &insert(id + 2)).await;
        assert_eq!(rows(&stage, &mut ann).await, [""; 0]);
        run(&stage, "insert into members values (1, 'ANN')").await;
        run(&stage, &insert(id + 3)).await;
        assert_eq!(rows(&stage, &mut ann).await, [format!("t{}", id + 3), format!("u{}", id + 3)]);
    }
    assert_eq!(rows(&stage, &mut bob).await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn row_security_that_a_referenced_table_gets_under_way_counts_at_once() {
    let stage = stage(&(TEAMS.to_owned() + &table("t", "team int", IN_TEAM))).await;
    let (mut ann, mut bob) = (stage.join(&user(ANN)).await, stage.join(&user(BOB)).await);
    for (id, change, anns, bobs) in [
        (10, "", true, true),
        // Without a policy no lookup finds a member.
        (20, "alter table members enable row level security", false, false),
        (30, "create policy bobs on members using (member = 'BOB')", false, true),
        (
            40,
            "create policy own on members using (member = auth.uid()); drop policy bobs on members",
            true,
            true,
        ),
        (50, "create policy not_one on members as restrictive using (team <> 1)", false, true),
        (60, "alter table members disable row level security", true, true),
        (70, "revoke select on members from authenticated", false, false),
        (80, "grant select on members to authenticated", true, true),
    ] {
        run(&stage, change).await;
        run(&stage, &format!("insert into t values ({id}, 1), ({id} + 1, 2), ({id} + 2, null)")).await;
        let expected = |sees: bool, id: i32| if sees { vec![format!("t{id}")] } else { vec![] };
        assert_eq!(rows(&stage, &mut ann).await, expected(anns, id), "ann after: {change}");
        assert_eq!(rows(&stage, &mut bob).await, expected(bobs, id + 1), "bob after: {change}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_helper_that_gets_another_body_under_way_counts_at_once() {
    let me = "create or replace function me() returns uuid stable";
    let stage = stage(&format!(
        "create schema hidden; {me} language sql as 'select auth.uid()'; {}{TEAMS}{}",
        table("t", "owner uuid", "owner = me()"),
        table("u", "team int", &IN_TEAM.replace("auth.uid()", "me()")),
    ))
    .await;
    let boss = token("authenticated", Some(ANN), json!({"boss": BOB}));
    let mut ann = stage.join(&boss).await;
    let (hers, his, none) = (Some(0), Some(1), None);
    for (at, change, sees) in [
        ("", String::new(), hers),
        ("claim", format!("{me} language sql as $$ select (auth.jwt() ->> 'boss')::uuid $$"), his),
        ("null", format!("{me} language sql as 'select null::uuid'"), none),
        ("opaque", format!("{me} language plpgsql as 'begin return auth.uid(); end'"), hers),
        ("other opaque", format!("{me} language plpgsql as $$ begin return 'BOB'; end $$"), his),
        ("powerful", format!("{me} language sql security definer as 'select auth.uid()'"), hers),
        ("no path", format!("{me} language sql set search_path = 'hidden' as 'select auth.uid()'"), hers),
        ("two", format!("{me} language sql as 'select auth.uid(); select null::uuid'"), none),
        ("again", format!("{me} language sql as 'select auth.uid()'"), hers),
        ("not allowed", String::from("revoke execute on function me() from public"), none),
        ("allowed", String::from("grant execute on function me() to authenticated"), hers),
        (
            "uid itself",
            String::from(
                "create or replace function auth.uid() returns uuid language sql stable as $$ select 'BOB'::uuid $$",
            ),
            his,
        ),
    ]
    .into_iter()
    .enumerate()
    .map(|(number, (name, change, sees))| ((number * 10, name), change, sees))
    {
        let (first, name) = at;
        run(&stage, &change).await;
        let values = |table: &str, one: &str, two: &str| {
            format!("insert into {table} values ({first}, {one}), ({first} + 1, {two});")
        };
        run(&stage, &(values("t", "'ANN'", "'BOB'") + &values("u", "1", "2"))).await;
        let expected =
            sees.map(|offset| vec![format!("t{}", first + offset), format!("u{}", first + offset)]);
        assert_eq!(rows(&stage, &mut ann).await, expected.unwrap_or_default(), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_column_that_a_policy_reads_may_be_revoked_and_the_policy_stays_what_it_was() {
    let stage = stage(
        &(TEAMS.to_owned()
            + &table("t", "owner uuid, v text", "owner = auth.uid()")
            + &table("u", "team int, v text", IN_TEAM)
            + "alter table t replica identity full;"),
    )
    .await;
    let mut ann = stage.join(&user(ANN)).await;
    let filtered =
        json!([{"event": "*", "schema": "public", "table": "t", "filter": format!("owner=eq.{BOB}")}]);
    let mut ann_by_owner = stage.subscribe(&user(ANN), filtered.clone()).await;
    let mut bob_by_owner = stage.subscribe(&user(BOB), filtered).await;
    let write = async |id: i32| {
        let insert = format!(
            "insert into t values ({id}, 'ANN', 'a'), ({id} + 1, 'BOB', 'b'); insert into u values ({id}, 1, 'a'), ({id} + 1, 2, 'b')"
        );
        run(&stage, &insert).await;
    };
    write(1).await;
    let whole = [
        format!(r#"INSERT {{"id":1,"owner":"{ANN}","v":"a"}}"#),
        String::from(r#"INSERT {"id":1,"team":1,"v":"a"}"#),
    ];
    assert_eq!(stage.told(&mut ann).await, whole);
    assert_eq!(
        stage.told(&mut bob_by_owner).await,
        [format!(r#"INSERT {{"id":2,"owner":"{BOB}","v":"b"}}"#)]
    );
    run(&stage, "revoke select on t, u from authenticated; grant select (id, v) on t, u to authenticated")
        .await;
    write(11).await;
    // The owner passes from bob to ann and back, which neither is told.
    run(&stage, "update t set owner = 'ANN' where id = 12; update t set owner = 'BOB' where id = 11; delete from t where id = 1").await;
    let narrow = [
        r#"INSERT {"id":11,"v":"a"}"#,
        r#"INSERT {"id":11,"v":"a"}"#,
        r#"UPDATE {"id":12,"v":"b"} {"id":12}"#,
        r#"DELETE {"id":1,"v":"a"}"#,
    ];
    assert_eq!(stage.told(&mut ann).await, narrow);
    // A filter on what may not be seen tells nothing any more, not even of one's own rows.
    assert_eq!(stage.told(&mut ann_by_owner).await, [""; 0]);
    assert_eq!(stage.told(&mut bob_by_owner).await, [""; 0]);
    for table in ["t", "u"] {
        let shown = stage
            .selected("authenticated", &json!({"sub": ANN}), &format!("select id from {table} order by id"))
            .await;
        let expected: &[&str] = if table == "t" { &["12"] } else { &["1", "11"] };
        assert_eq!(shown, expected, "{table}");
    }
}
