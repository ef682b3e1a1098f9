//! Policies whose text is easily taken for something else: they show what the table shows, to the letter.

use relay::model::policy::plan::PlanKind;
use serde_json::{Value, json};

use crate::support::ways::Ways;
use crate::support::{ANN, BOB};
use crate::visibility::policy_leaks::{IN_TEAM, TEAMS, rows, run, stage, table, user};

const SCHEMA: &str = "
    create table members (team int, member uuid, role text, since int, teams int[], level int);
    create index on members (team);
    create table teams (id int primary key, boss uuid); create table other (team bigint, x int);
    create table secret (member uuid); grant select on members, teams, other to authenticated;
    create table t (id int primary key, owner uuid, n int, big bigint, name text, code text);
    alter table t enable row level security; grant select on t to authenticated; select relay.watch('t');
    create table ids_t (id int); grant select on ids_t to authenticated; insert into ids_t select generate_series(1, 5);
    create function sees_t(wanted int) returns bool language plpgsql stable as $$
      begin return exists (select from t where id = wanted); exception when others then return null; end $$;
    create function claims_raise() returns bool language sql stable as 'select false';
    insert into teams values (1, 'ANN'), (2, 'BOB'); insert into other values (1, 5), (2, 6);
    insert into members values (1, 'ANN', 'boss', 1, '{1,2}', 1), (1, 'ANN', 'x', 4, null, 1), (2, 'ANN', 'x', 2, '{}', 2),
      (3, 'BOB', 'y', 3, '{4}', 5), (1, 'BOB', 'y', 9, null, 0), (2, 'BOB', 'z', 1, '{2}', 5);
    insert into t values (1, 'ANN', 1, 1, 'x', 'x'), (2, 'BOB', 2, 2, 'y', 'y'), (3, null, 3, null, null, null),
      (4, 'ANN', 0, -9223372036854775808, '1', 'y'), (5, 'BOB', 4, 5, '3', '3');";

/// Each of these conditions shows what the table shows, to ann, to bob and to a client without a user.
async fn check(conditions: &[&str]) {
    let ways = Box::pin(Ways::new(&SCHEMA.replace("ANN", ANN).replace("BOB", BOB))).await;
    let reader = |sub: &str, orgs: Value| json!({"role": "authenticated", "exp": 4_000_000_000_u64, "sub": sub, "orgs": orgs});
    let readers = [
        reader(ANN, json!(["x", "1"])),
        reader(BOB, json!(["y", "3", "3"])),
        json!({"role": "authenticated", "exp": 4_000_000_000_u64}),
    ];
    for condition in conditions {
        ways.database
            .run(&format!("drop policy if exists p on t; create policy p on t using ({condition})"))
            .await;
        Box::pin(ways.check("t", &readers, condition)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sub_select_that_aggregates_finds_its_one_row() {
    let mine = "from members m where m.member = auth.uid()";
    check(&[
        &format!("n in (select max(m.team) {mine})"),
        &format!("exists (select count(*) {mine} and m.team = t.n)"),
        &format!("not exists (select count(*) {mine} and m.team = t.n)"),
        &format!("exists (select {mine} and m.team = t.n and m.team in (select max(id) from teams where boss = auth.uid()))"),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sub_select_that_makes_sets_finds_what_is_in_them() {
    let mine = "from members m where m.member = auth.uid()";
    check(&[
        &format!("n in (select unnest(m.teams) {mine})"),
        &format!("exists (select unnest(m.teams) {mine} and m.team = t.n)"),
        &format!("not exists (select unnest(m.teams) {mine} and m.team = t.n)"),
        &format!("exists (select generate_series(1, 0) {mine} and m.team = t.n)"),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sub_select_of_one_row_each_finds_no_other() {
    check(&["n in (select distinct on (m.team) m.since from members m where m.member = auth.uid()
             order by m.team, m.since desc)"])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn beside_the_elements_of_a_claim_other_columns_are_what_they_are() {
    let orgs = "jsonb_array_elements_text(auth.jwt() -> 'orgs')";
    check(&[
        &format!("n in (select e.number::int from {orgs} with ordinality e (value, number))"),
        &format!("name in (select t.name from {orgs} e)"),
        &format!("name = any (array(select t.code from {orgs} e))"),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_column_of_two_joined_tables_is_not_taken_for_one_of_a_third() {
    check(&[
        "exists (select from other a full join teams b on a.team = b.id full join members c using (team)
             where team in (select m.since from members m where m.member = auth.uid() and m.team = t.n))",
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_on_a_table_without_the_right_to_read_it_shows_nothing_of_either_side() {
    check(&[
        "owner = auth.uid() or exists (select from secret s where s.member = auth.uid())",
        "owner = auth.uid() or exists (select from secret)",
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_setting_that_is_not_set_raises_unless_it_may_be_missing() {
    check(&["nullif(current_setting('request.jwt.claim.email'), '') is null"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_number_without_a_negative_raises() {
    check(&["n > - '-2147483648'::integer", "big = - '-9223372036854775808'::bigint"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_raises_for_one_reader_is_shown_to_another() {
    // Bob's membership in team 1 has the level 0; ann's have not.
    check(&[
        "exists (select from members m where m.member = auth.uid() and m.team = t.n and 10 / m.level > 1)",
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_always_true_is_true_beside_what_raises() {
    check(&["(auth.jwt() ->> 'sub')::int = n or true", "10 / n > 0 or true"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_may_have_any_name_however_its_policy_is_evaluated() {
    const NAMES: [&str; 4] = ["relay images", "relay reader", "relay found", "relay verdicts"];
    let mut sql = TEAMS.to_owned();
    for name in NAMES {
        let quoted = format!("\"{name}\"");
        sql += &table(&quoted, "team int", IN_TEAM);
    }
    let stage = stage(&sql).await;
    let mut ann = stage.join(&user(ANN)).await;
    let mut told = Vec::new();
    for name in NAMES {
        run(&stage, &format!("insert into \"{name}\" values (1, 1), (2, 2)")).await;
        told.extend(rows(&stage, &mut ann).await);
    }
    assert_eq!(told, NAMES.map(|name| format!("{name}1")));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_or_function_in_public_does_not_take_the_place_of_the_systems() {
    let of = "tags text[]";
    let stage = stage(
        &(table("compared", of, "tags = '{never}' and session_user <> ''")
            + &table("counted", of, "array_length(tags, 1) = 77 and session_user <> ''")),
    )
    .await;
    let mut ann = stage.join(&user(ANN)).await;
    run(
        &stage,
        "create function always(text[], text[]) returns bool language sql as 'select true';
         create operator public.= (leftarg = text[], rightarg = text[], function = always);
         create function public.array_length(text[], int) returns int language sql as 'select 77';
         insert into compared values (1, '{a}'); insert into counted values (1, '{a}')",
    )
    .await;
    for table in ["compared", "counted"] {
        let shown =
            stage.selected("authenticated", &json!({"sub": ANN}), &format!("select id from {table}")).await;
        assert_eq!(shown, [""; 0], "{table}");
    }
    assert_eq!(rows(&stage, &mut ann).await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_who_come_and_go_leave_no_tables_behind() {
    let stage = stage(&(TEAMS.to_owned() + &table("t", "team int", IN_TEAM))).await;
    for id in 0..8 {
        let mut ann = stage.join(&user(ANN)).await;
        run(&stage, &format!("insert into t values ({id}, 1)")).await;
        assert_eq!(rows(&stage, &mut ann).await, [format!("t{id}")]);
        drop(ann);
        crate::support::eventually("she is gone", || async {
            stage.relay.metrics().contains("relay_channels_open 0\n").then_some(())
        })
        .await;
    }
    let count = "select count(*) from pg_class where relkind = 'r' and relname like 'readers\\_%'";
    let left: i32 = stage.database.value(count).await.parse().unwrap();
    assert!(left <= 2, "{left} tables of readers");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_with_a_long_claim_slows_down_no_other_reader() {
    let mail = "exists (select from mails m where m.team = TABLE.team and m.mail = auth.email())";
    let sql = "create table mails (team int, mail text); grant select on mails to authenticated;
               insert into mails select 1, n || '@example.org' from generate_series(1, 20) n;";
    let stage = stage(&(sql.to_owned() + &table("t", "team int", mail))).await;
    let reader = |mail: String| crate::support::token("authenticated", Some(ANN), json!({"email": mail}));
    let mut readers = Vec::new();
    for number in 1..=20 {
        readers.push(stage.join(&reader(format!("{number}@example.org"))).await);
    }
    let judgements = || -> u64 {
        let text = stage.relay.metrics();
        let line = text.lines().find_map(|line| line.strip_prefix("relay_judgements_total "));
        line.unwrap().parse().unwrap()
    };
    let cost = async |id: i32, readers: &mut [crate::support::client::Client]| {
        let before = judgements();
        run(&stage, &format!("insert into t values ({id}, 1)")).await;
        for reader in readers {
            assert_eq!(rows(&stage, reader).await, [format!("t{id}")]);
        }
        judgements() - before
    };
    let alone = cost(1, &mut readers).await;
    // Too long for an index, however well it is packed.
    let long: String = (0..900).map(|number: u32| number.wrapping_mul(2_654_435_761).to_string()).collect();
    let _long = stage.join(&reader(long)).await;
    let together = cost(2, &mut readers).await;
    assert!(together <= alone + 2, "{alone} questions without, {together} with");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_whose_transactions_only_read_judges_no_worse() {
    let sql = TEAMS.to_owned()
        + &table("t", "team int", IN_TEAM)
        + "create role $DB_judge login noinherit; grant anon, authenticated to $DB_judge;
           alter role $DB_judge set default_transaction_read_only = on;";
    let sql = sql.replace("ANN", ANN).replace("BOB", BOB);
    let stage = crate::support::stage::Stage::with(&sql, |settings, url| {
        let (_, name) = url.rsplit_once('/').unwrap();
        settings.judge_url = Some(url.replacen("postgres@", &format!("{name}_judge@"), 1));
    })
    .await;
    let mut ann = stage.join(&user(ANN)).await;
    run(&stage, "insert into t values (1, 1), (2, 2)").await;
    assert_eq!(rows(&stage, &mut ann).await, ["t1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_for_others_does_not_keep_a_role_from_a_cheaper_way() {
    let ways = Ways::new(&SCHEMA.replace("ANN", ANN).replace("BOB", BOB)).await;
    ways.database
        .run(
            "create function opaque() returns bool language plpgsql as 'begin return true; end';
             create policy theirs on t to anon using (opaque());
             create policy p on t to authenticated
               using (exists (select from members m where m.team = t.n and m.member = auth.uid()))",
        )
        .await;
    let ann = json!({"role": "authenticated", "exp": 4_000_000_000_u64, "sub": ANN});
    assert_eq!(ways.check("t", &[ann], "").await.0, PlanKind::Inverted);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_of_thousands_of_parts_is_only_a_policy() {
    // Both ways of nesting; a stack that is used up ends the whole process.
    for joint in [" or ", " and "] {
        let parts: Vec<String> = (0..5000).map(|n| format!("n <> {}", n + 10)).collect();
        check(&[&parts.join(joint)]).await;
    }
}
