//! What must never leak, whichever way a policy is decided: other readers' rows, rights that were taken back, and names that
//! stand for something else than they did when the policy was made.

use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::stage::Stage;
use crate::support::{ANN, BOB, token};

/// Ann is in team 1, bob in team 2.
pub const TEAMS: &str = "create table members (team int, member uuid);
    insert into members values (1, 'ANN'), (2, 'BOB'); grant select on members to authenticated, anon;";

/// The condition that is asked once for all readers.
pub const IN_TEAM: &str =
    "exists (select from members m where m.team = TABLE.team and m.member = auth.uid())";

pub fn user(sub: &str) -> String {
    token("authenticated", Some(sub), json!({}))
}

/// With the people's ids in the place of their names.
fn with_people(sql: &str) -> String {
    sql.replace("ANN", ANN).replace("BOB", BOB)
}

/// A table with these columns whose rows are shown under a condition, in which `TABLE` stands for its name.
pub fn table(name: &str, columns: &str, condition: &str) -> String {
    let condition = condition.replace("TABLE", name);
    format!(
        "create table {name} (id int primary key, {columns}); alter table {name} enable row level security;
         create policy p on {name} using ({condition});
         grant select on {name} to authenticated, anon; select relay.watch('{name}');"
    )
}

pub async fn stage(sql: &str) -> Stage {
    Stage::new(&with_people(sql)).await
}

pub async fn run(stage: &Stage, sql: &str) {
    stage.run(&with_people(sql)).await;
}

/// What the client was told up to now: `t1` for the row with the id 1 in the table `t`.
pub async fn rows(stage: &Stage, client: &mut Client) -> Vec<String> {
    let row = |change: &Value| format!("{}{}", change["table"].as_str().unwrap(), change["record"]["id"]);
    stage.changes(client).await.iter().map(row).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_function_that_asks_for_the_reader_is_answered_for_each_reader() {
    let functions = "create schema hidden; create table hidden.admins (id uuid); insert into hidden.admins values ('BOB');
        create function me() returns uuid language sql stable as 'select auth.uid()';
        create function is_me(wanted uuid) returns bool language sql stable as 'select wanted = auth.uid()';
        create function opaque_me() returns uuid language plpgsql stable as 'begin return auth.uid(); end';
        create function powerful_me() returns uuid language sql stable security definer
          as 'select auth.uid() where exists (select from hidden.admins where id = auth.uid())';";
    let mut sql = functions.to_owned();
    for (name, condition) in [
        ("named", "owner = me()"),
        ("given", "is_me(owner)"),
        ("opaque", "owner = opaque_me()"),
        ("powerful", "owner = powerful_me()"),
        ("nested", "owner = (select me())"),
        ("listed", "owner in (select opaque_me())"),
    ] {
        sql += &table(name, "owner uuid", condition);
    }
    let stage = stage(&sql).await;
    let (mut ann, mut bob) = (stage.join(&user(ANN)).await, stage.join(&user(BOB)).await);
    // Twice, for what is kept from the first time; one page, in which the two take turns.
    for first in [1, 11] {
        let tables = ["named", "given", "opaque", "powerful", "nested", "listed"];
        let values = format!("values ({first}, 'ANN'), ({first} + 1, 'BOB'), ({first} + 2, null)");
        let inserts: String = tables.iter().map(|table| format!("insert into {table} {values};")).collect();
        run(&stage, &inserts).await;
        let all = |id: i32| tables.map(|table| format!("{table}{id}"));
        let own: Vec<String> = all(first).into_iter().filter(|row| !row.starts_with("powerful")).collect();
        assert_eq!(rows(&stage, &mut ann).await, own);
        assert_eq!(rows(&stage, &mut bob).await, all(first + 1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_in_a_query_for_all_readers_resets_the_role() {
    let stage = stage(
        &(TEAMS.to_owned()
            + &table(
                "t",
                "team int, n int",
                &IN_TEAM.replace("auth.uid()", "auth.uid() and 10 / TABLE.n > 0"),
            )
            + &table("who", "role name", "current_user = role and lower(role) <> ''")
            + "create role $DB_member; grant select on t, who to $DB_member;
               alter policy p on t to authenticated, anon;
               create policy even on t to $DB_member using (lower(id::text) <> '' and id % 2 = 0);"),
    )
    .await;
    let of_role = |role: &str| token(role, Some(ANN), json!({}));
    let mut ann = stage.join(&user(ANN)).await;
    let mut anon = stage.join(&of_role("anon")).await;
    let mut member = stage.join(&of_role(&format!("{}_member", stage.name))).await;
    let mut bob = stage.join(&user(BOB)).await;
    for first in [1, 11, 21] {
        // Each page has rows on whose account the question of one role raises, before and after those of another.
        run(
            &stage,
            &format!(
                "insert into t values ({first}, 1, 0), ({first} + 1, 1, 1); insert into who values ({first}, 'anon');
                 insert into t values ({first} + 2, 2, 0), ({first} + 3, 2, 1);
                 insert into who values ({first} + 1, 'authenticated'), ({first} + 2, '$DB_member'), ({first} + 3, 'postgres')"
            ),
        )
        .await;
        let [one, two, three, four] = [first, first + 1, first + 2, first + 3];
        assert_eq!(rows(&stage, &mut ann).await, [format!("t{two}"), format!("who{two}")]);
        assert_eq!(rows(&stage, &mut bob).await, [format!("t{four}"), format!("who{two}")]);
        assert_eq!(rows(&stage, &mut anon).await, [format!("t{two}"), format!("who{one}")]);
        let of_member = rows(&stage, &mut member).await;
        assert_eq!(
            of_member,
            [two, four]
                .map(|id| format!("t{id}"))
                .into_iter()
                .chain([format!("who{three}")])
                .collect::<Vec<_>>()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_for_one_role_shows_nothing_to_the_same_subject_in_another() {
    let own = "owner = auth.uid()";
    let stage = stage(
        &(TEAMS.to_owned()
            + &table("own", "owner uuid", own)
            + &table("team", "team int", IN_TEAM)
            + "alter policy p on own to authenticated; alter policy p on team to authenticated;"),
    )
    .await;
    let mut ann = stage.join(&user(ANN)).await;
    let mut anon = stage.join(&token("anon", Some(ANN), json!({}))).await;
    run(&stage, "insert into own values (1, 'ANN'); insert into team values (1, 1)").await;
    assert_eq!(rows(&stage, &mut ann).await, ["own1", "team1"]);
    assert_eq!(rows(&stage, &mut anon).await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_subject_denies_its_own_subscriber_only() {
    let stage = stage(
        &(TEAMS.to_owned()
            + &table("own", "owner uuid", "owner = auth.uid()")
            + &table("team", "team int", IN_TEAM)
            + &table("known", "team int", "auth.uid() is not null or true")),
    )
    .await;
    let mut bad = Vec::new();
    for sub in ["no uuid", "'; drop table own; --", &"x".repeat(500), "0a000000-0000-4000-8000-00000000000"] {
        bad.push(stage.join(&user(sub)).await);
    }
    let mut nobody = Vec::new();
    for sub in [Some(""), None] {
        nobody.push(stage.join(&token("authenticated", sub, json!({}))).await);
    }
    let (mut ann, mut bob) = (stage.join(&user(ANN)).await, stage.join(&user(BOB)).await);
    for id in [1, 11] {
        run(
            &stage,
            &format!(
                "insert into own values ({id}, 'ANN'), ({id} + 1, 'BOB'), ({id} + 2, null);
                 insert into team values ({id}, 1), ({id} + 1, 2), ({id} + 2, null); insert into known values ({id}, 1)"
            ),
        )
        .await;
        let seen = |id: i32| [format!("own{id}"), format!("team{id}")];
        assert_eq!(rows(&stage, &mut ann).await, [&seen(id)[..], &[format!("known{id}")]].concat());
        assert_eq!(rows(&stage, &mut bob).await, [&seen(id + 1)[..], &[format!("known{id}")]].concat());
        for client in &mut nobody {
            assert_eq!(rows(&stage, client).await, [format!("known{id}")]);
        }
        for client in &mut bad {
            let told = rows(&stage, client).await;
            assert!(told.iter().all(|row| row.starts_with("known")), "{told:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_the_name_of_a_function_of_the_system_is_not_taken_for_it() {
    let sub = "current_setting('request.jwt.claims', true)::json ->> 'sub'";
    let me = "create function me() returns uuid language sql stable as $$
                select nullif(current_setting('request.jwt.claims', true)::jsonb ->> 'sub', '')::uuid $$;";
    let own = "owner uuid, name varchar(9)";
    let stage = stage(
        &(format!("{TEAMS} {me}")
            + &table("compiled", own, &format!("owner::text = {sub} and name = 'x'"))
            + &table("helped", own, "owner = me() and name is not null")
            + &table("inverted", "team int", IN_TEAM)
            + &table("lowered", own, "lower(owner::text) = auth.jwt() ->> 'sub' and lower(name) = 'x'")
            + &table("opaque", own, &format!("owner::text = {sub} and name = 'x' and session_user <> ''"))),
    )
    .await;
    let mut ann = stage.join(&user(ANN)).await;
    let tables = ["compiled", "helped", "lowered", "opaque"];
    let write = async |id: i32| {
        let insert = |table: &&str| {
            format!(
                "insert into {table} values ({id}, 'ANN', 'x'), ({id} + 1, 'BOB', 'x'), ({id} + 2, null, 'x');"
            )
        };
        let inserts: String = tables.iter().map(insert).collect();
        run(&stage, &format!("{inserts} insert into inverted values ({id}, 1), ({id} + 1, 2)")).await;
    };
    let own = |id: i32| {
        [&tables[..], &["inverted"]].concat().iter().map(|table| format!("{table}{id}")).collect::<Vec<_>>()
    };
    write(1).await;
    assert_eq!(rows(&stage, &mut ann).await, own(1));
    // Everything that the policies and the helper name without a schema, by that name in `public`.
    run(
        &stage,
        "create function public.current_setting(text, bool) returns text language sql as $$ select '{\"sub\": \"BOB\"}' $$;
         create function public.lower(text) returns text language sql as $$ select 'x' $$;
         create domain public.uuid as text; create domain public.jsonb as text; create domain public.text as int;
         create table public.pg_class (oid oid); create function public.always(pg_catalog.uuid, pg_catalog.uuid) returns bool
           language sql as 'select true';
         create operator public.= (leftarg = pg_catalog.uuid, rightarg = pg_catalog.uuid, function = public.always)",
    )
    .await;
    write(11).await;
    assert_eq!(rows(&stage, &mut ann).await, own(11));
    for (table, id) in tables.iter().zip([1, 1, 1, 1]) {
        let select = format!("select id from {table} order by id");
        let shown = stage.selected("authenticated", &json!({"sub": ANN}), &select).await;
        assert_eq!(shown, [id.to_string(), (id + 10).to_string()], "{table}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_in_a_row_that_row_security_hides_neither_shows_nor_hides_anything() {
    let looks = [
        ("t", "exists (select from mine m where m.team = TABLE.team and 10 / m.weight > 0)"),
        (
            "own",
            "exists (select from mine m where m.team = TABLE.team and m.member = auth.uid() and 10 / m.weight > 0)",
        ),
        ("fact", "exists (select from kinds k where k.id = TABLE.team and 10 / k.weight > 0)"),
        ("lost", "(select sum(10 / k.weight) from kinds k where k.id = TABLE.team) > 0"),
    ];
    let tables: String = looks.iter().map(|(name, policy)| table(name, "team int", policy)).collect();
    let stage = stage(&format!(
        "create table mine (team int, member uuid, weight int); alter table mine enable row level security;
         create policy own on mine using (member = auth.uid());
         insert into mine values (1, 'ANN', 1), (1, 'BOB', 0), (2, 'BOB', 1), (2, 'ANN', 0), (3, 'ANN', 0);
         create table kinds (id int, weight int); alter table kinds enable row level security;
         create policy shown on kinds using (weight > 0); insert into kinds values (1, 1), (1, 0), (2, 0), (3, 2);
         create function sees(name text, wanted int) returns text language plpgsql as $$
           declare found bool; begin
             execute format('select exists (select from %I where id = %s)', name, wanted) into found; return found;
           exception when others then return 'false'; end $$;
         grant select on mine, kinds to authenticated, service_role; {tables}"
    ))
    .await;
    let (mut ann, mut bob) = (stage.join(&user(ANN)).await, stage.join(&user(BOB)).await);
    for (name, _) in looks {
        run(&stage, &format!("insert into {name} values (1, 1), (2, 2), (3, 3)")).await;
    }
    for (sub, client) in [(ANN, &mut ann), (BOB, &mut bob)] {
        let mut shown = Vec::new();
        for (name, _) in looks {
            for id in 1..=3 {
                let (claims, select) = (json!({"sub": sub}), format!("select sees('{name}', {id})"));
                let sees = stage.selected("authenticated", &claims, &select).await;
                shown.extend((sees == ["true"]).then(|| format!("{name}{id}")));
            }
        }
        assert_eq!(rows(&stage, client).await, shown, "{sub}");
        assert!(!shown.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_may_not_make_temporary_tables_judges_no_worse() {
    let sql = with_people(
        &(TEAMS.to_owned()
            + &table("t", "team int", IN_TEAM)
            + &table("own", "owner uuid", "owner = auth.uid()")
            + &table("either", "team int, owner uuid", &format!("owner = auth.uid() or {IN_TEAM}"))
            + "create role $DB_judge login noinherit; grant anon, authenticated to $DB_judge;
               revoke temporary on database $DB from public;"),
    );
    let stage = Stage::with(&sql, |settings, url| {
        let (_, name) = url.rsplit_once('/').unwrap();
        settings.judge_url = Some(url.replacen("postgres@", &format!("{name}_judge@"), 1));
    })
    .await;
    let may = format!("select has_database_privilege('{0}_judge', '{0}', 'temporary')", stage.name);
    assert_eq!(stage.database.value(&may).await, "f");
    let (mut ann, mut bob) = (stage.join(&user(ANN)).await, stage.join(&user(BOB)).await);
    let mut bad = stage.join(&user("no uuid")).await;
    for first in [1, 11] {
        run(
            &stage,
            &format!(
                "insert into t values ({first}, 1), ({first} + 1, 2), ({first} + 2, null);
                 insert into own values ({first}, 'ANN'), ({first} + 1, 'BOB');
                 insert into either values ({first}, 1, null), ({first} + 1, 1, 'BOB'), ({first} + 2, 3, 'ANN'), ({first} + 3, 3, null)"
            ),
        )
        .await;
        let [one, two, three] = [first, first + 1, first + 2];
        let anns = [
            format!("t{one}"),
            format!("own{one}"),
            format!("either{one}"),
            format!("either{two}"),
            format!("either{three}"),
        ];
        assert_eq!(rows(&stage, &mut ann).await, anns);
        assert_eq!(
            rows(&stage, &mut bob).await,
            [format!("t{two}"), format!("own{two}"), format!("either{two}")]
        );
        assert_eq!(rows(&stage, &mut bad).await, [""; 0]);
        run(&stage, "update members set team = team").await;
    }
    run(&stage, "delete from members where member = 'ANN'; insert into t values (21, 1)").await;
    assert_eq!(rows(&stage, &mut ann).await, [""; 0]);
}
