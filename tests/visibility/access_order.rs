//! A transaction that changes a rule and a row shows that row to no reader who may not see it any more, also where
//! PostgreSQL fires no event trigger for the change, or a session keeps it from firing.

use serde_json::json;

use crate::support::client::Client;
use crate::support::database::{JUDGE, READER, with_login};
use crate::support::program::output;
use crate::support::stage::Stage;
use crate::support::token;

/// What makes a table and its readers, and what takes the sight of it. `T` is the table, with row security and a key `id`;
/// `M` and `N` are tables that it may look into, `R` the role of its reader, `G` and `H` other roles.
struct Case {
    name: &'static str,
    made: &'static str,
    taken: &'static str,
    /// Writes the row with the id that stands for `1`.
    write: &'static str,
}

const WRITE: &str = "insert into T values (1)";

const fn case(name: &'static str, made: &'static str, taken: &'static str) -> Case {
    Case { name, made, taken, write: WRITE }
}

const OPEN: &str = "grant select on T to R; create policy p on T using (true)";

const CASES: [Case; 15] = [
    case(
        "replica",
        OPEN,
        "set local session_replication_role = replica; drop policy p on T; create policy p on T using (false);
         set local session_replication_role = origin",
    ),
    case("quiet", OPEN, "set local relay.quiet = 'on'; alter policy p on T using (false)"),
    // A name that reads like a temporary table's.
    case("named", OPEN, "create policy \"x on pg_temp.y\" on T as restrictive using (false)"),
    case(
        "named_anew",
        OPEN,
        "alter policy p on T rename to \"z on pg_temp.z\"; alter policy \"z on pg_temp.z\" on T using (false)",
    ),
    case("bypass", "grant select on T to R; alter role R bypassrls", "alter role R nobypassrls"),
    case(
        "member",
        "grant select on T to R; create policy p on T to G using (true); grant G to R",
        "revoke G from R",
    ),
    case(
        "between",
        "grant select on T to R; create policy p on T to G using (true); grant G to H; grant H to R",
        "drop role H",
    ),
    case("right", "grant select on T to G; create policy p on T using (true); grant G to R", "revoke G from R"),
    case(
        "heir",
        "grant select on T to R; create policy p on T to G using (true); grant G to R",
        // Since PostgreSQL 16 each membership says so itself.
        "do $$ begin
           if current_setting('server_version_num')::int < 160000 then alter role R noinherit;
           else execute 'grant G to R with inherit false'; end if;
         end $$",
    ),
    case(
        "restrictive",
        "grant select on T to R; create policy p on T using (true);
         create policy r on T as restrictive to G using (false)",
        "grant G to R",
    ),
    case("renamed", OPEN, "drop role H; alter role R rename to H; create role R"),
    case("login", OPEN, "revoke R from JUDGE"),
    case("owner", "alter table T owner to R", "reassign owned by R to postgres"),
    case(
        "database",
        "grant select on T to pg_database_owner; create policy p on T using (true); alter database D owner to R",
        "alter database D owner to postgres",
    ),
    Case {
        name: "view",
        made: "drop table T; create table base_T (id int primary key);
               create materialized view T as select * from base_T; create unique index on T (id);
               grant select on T to R; select relay.watch('T'), relay.allow('T', 'true')",
        taken: "select relay.allow('T', 'id < 0')",
        write: "insert into base_T values (1); select relay.refresh('T')",
    },
];

/// `T` is seen by a look into `M`, which has row security of its own: the member's name is a claim.
macro_rules! members {
    ($made:literal) => {
        concat!(
            "create table M (id int, who text, other text); insert into M select n, 'R' from generate_series(1, 9) n;
             create table N (who text, nobody bool); insert into N values ('R', false);
             alter table M enable row level security; alter table N enable row level security;
             grant select on M, N to R, service_role; grant select on T to R; grant usage on schema auth to R;
             create policy p on T using (exists (select from M where M.id = T.id));",
            $made
        )
    };
}

const OWN: &str = members!("create policy m on M using (who = auth.role())");
const NESTED: &str = members!(
    "create policy m on M using (who in (select N.who from N)); create policy n on N using (N.who = auth.role())"
);

/// The same for the table that the policy looks into.
const LOOKED_INTO: [Case; 16] = [
    case("anew", OWN, "drop policy m on M; create policy m on M using (who = auth.uid()::text)"),
    case("gone", OWN, "drop policy m on M"),
    case("altered", OWN, "alter policy m on M using (other = auth.role())"),
    case("kept_out", OWN, "create policy r on M as restrictive using (other = auth.role())"),
    case("other_role", OWN, "alter policy m on M to G"),
    case(
        "secured",
        members!("alter table M disable row level security"),
        "alter table M enable row level security",
    ),
    case(
        "forced",
        members!("create policy m on M using (other = auth.role()); alter table M owner to R"),
        "alter table M force row level security",
    ),
    case(
        "new_owner",
        members!("create policy m on M using (other = auth.role()); alter table M owner to R"),
        "alter table M owner to postgres; grant select on M to R",
    ),
    case(
        "reassigned",
        members!("create policy m on M using (other = auth.role()); alter table M owner to R"),
        "grant select on M to R; reassign owned by R to postgres",
    ),
    case("revoked", OWN, "revoke select on M from R"),
    case(
        "renamed_columns",
        OWN,
        "alter table M rename who to was; alter table M rename other to who; drop policy m on M;
         create policy m on M using (who = auth.role())",
    ),
    case("nested_anew", NESTED, "drop policy n on N; create policy n on N using (N.nobody)"),
    case(
        "nested_secured",
        members!(
            "alter table N disable row level security; create policy m on M using (who in (select N.who from N))"
        ),
        "alter table N enable row level security",
    ),
    case("nested_revoked", NESTED, "revoke select on N from R"),
    case(
        "no_key",
        "create table M (who text, other text); create unique index k on M (who); insert into M values ('R', 'x');
         grant select on M, T to R; grant usage on schema auth to R;
         create policy p on T using ('x' = (select other from M where who = auth.role()))",
        // Two rows are an error, and then the policy shows nothing.
        "drop index k; insert into M values ('R', 'x')",
    ),
    case("unread", OWN, "revoke select on M from service_role; drop policy m on M"),
];

/// `T` is seen by a definer `F` that looks into `M`, which shows nobody anything: the member's name is a claim. `G` owns both.
macro_rules! definer {
    ($body:literal, $made:literal) => {
        concat!(
            "create table M (id int, who text, other text); insert into M select n, 'R' from generate_series(1, 9) n;
             create schema S; grant create, usage on schema S to G, H; grant usage on schema auth to R, G, H; grant create on schema public to G;
             alter table M enable row level security; alter table M owner to G; create function E() returns text language sql stable as $$ select auth.role() $$;
             create function F(n int) returns bool language sql stable security definer ",
            $body,
            "; alter function F owner to G; grant select on T to R; grant usage on schema S to R;
             create policy p on T using (F(id)); grant usage on schema S to service_role; grant select on M to service_role;",
            $made
        )
    };
}

const STRING: &str = definer!(
    "set search_path = '' as $$ select exists (select from public.M m where m.id = n and m.who = auth.role()) $$",
    ""
);
const ATOMIC: &str =
    definer!("begin atomic select exists (select from M m where m.id = n and m.who = auth.role()); end", "");
const PATH: &str = definer!(
    "set search_path = S, public as $$ select exists (select from M m where m.id = n and m.who = auth.role()) $$",
    ""
);

/// The same for functions, and for the tables that only their bodies name.
const CALLED: [Case; 21] = [
    case(
        "f_anew",
        STRING,
        "create or replace function F(n int) returns bool language sql stable security definer set search_path = '' as
           $$ select exists (select from public.M m where m.id = n and m.other = auth.role()) $$",
    ),
    case("f_gone", STRING, "drop policy p on T; drop function F; create policy p on T using (id < 0)"),
    case("f_invoker", STRING, "alter function F security invoker; grant select on M to R"),
    case("f_owner", STRING, "grant select on M to H; alter function F owner to H"),
    case("f_table_owner", STRING, "alter table M owner to postgres; grant select on M to G"),
    case(
        "f_reassigned",
        definer!(
            "set search_path = '' as $$ select exists (select from public.M m where m.id = n and m.who = auth.role()) $$",
            "alter table M owner to postgres; grant select on M to G, H; alter role G bypassrls;"
        ),
        "reassign owned by G to H",
    ),
    case(
        "f_bypass",
        definer!(
            "set search_path = '' as $$ select exists (select from public.M m where m.id = n and m.who = auth.role()) $$",
            "alter table M owner to postgres; grant select on M to G; alter role G bypassrls;"
        ),
        "alter role G nobypassrls",
    ),
    case(
        "f_membership",
        definer!(
            "set search_path = '' as $$ select exists (select from public.M m where m.id = n and m.who = auth.role()) $$",
            "alter table M owner to H; grant H to G;"
        ),
        "revoke H from G; grant select on M to G",
    ),
    case("f_forced", STRING, "alter table M force row level security"),
    case("f_executed", STRING, "revoke execute on function F from public"),
    case("f_shadowed", PATH, "create table S.M (id int, who text); grant select on S.M to G, service_role"),
    case("f_path", PATH, "create table S.M (like public.M); grant select on S.M to G; alter function F set search_path = S"),
    case("f_moved", STRING, "alter table M set schema S"),
    case("f_renamed", STRING, "alter table M rename to renamed_f_renamed"),
    case("f_columns", STRING, "alter table M rename who to was; alter table M rename other to who"),
    case("f_columns_atomic", ATOMIC, "alter table M rename who to was; alter table M rename other to who; update M set was = null"),
    case("f_revoked", STRING, "alter table M owner to postgres; alter table M disable row level security; revoke all on M from G"),
    case(
        "f_nested",
        definer!(
            "set search_path = '' as $$ select exists (select from public.M m where m.id = n and m.who = public.E()) $$",
            ""
        ),
        "create or replace function E() returns text language sql stable as $$ select auth.uid()::text $$",
    ),
    case(
        "f_nested_executed",
        definer!(
            "set search_path = '' as $$ select exists (select from public.M m where m.id = n and m.who = public.E()) $$",
            ""
        ),
        "revoke execute on function E from public",
    ),
    case(
        "f_column_revoked",
        definer!(
            "set search_path = '' as $$ select exists (select from public.M m where m.id = n and m.who = auth.role()) $$",
            "alter table M disable row level security; alter table M owner to postgres; grant select (id, who) on M to G;"
        ),
        "revoke select (who) on M from G",
    ),
    case("f_volatile", STRING, "alter function F volatile; delete from M"),
];

/// The same while the event trigger is away, which concerns the whole database: each in a database of its own.
const TRIGGERS: [Case; 3] = [
    case(
        "disabled",
        OPEN,
        "alter event trigger relay_schema_changes disable; alter policy p on T using (false);
         alter event trigger relay_schema_changes enable always",
    ),
    case("dropped", OPEN, "drop event trigger relay_schema_changes; alter policy p on T using (false)"),
    case(
        "replaced",
        OPEN,
        "alter event trigger relay_schema_changes disable; drop policy p on T;
         drop event trigger relay_schema_changes;
         create event trigger relay_schema_changes on ddl_command_end execute function relay.log_schema_change();
         alter event trigger relay_schema_changes enable always",
    ),
];

/// The statements with the names of this case in the place of the single letters.
fn named(case: &Case, sql: &str) -> String {
    let words = sql.split_inclusive(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let name = |word: &str| {
        let end = word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric() && c != '_').len();
        let (word, rest) = word.split_at(end);
        let word = match word {
            "T" => format!("t_{}", case.name),
            "M" | "N" => format!("{}_{}", word.to_lowercase(), case.name),
            "F" | "E" | "S" => format!("{}_{}", word.to_lowercase(), case.name),
            "base_T" => format!("base_{}", case.name),
            "R" | "G" | "H" => format!("$DB_{}_{}", case.name, word.to_lowercase()),
            "D" => String::from("$DB"),
            "JUDGE" => String::from(JUDGE),
            other => other.to_owned(),
        };
        word + rest
    };
    words.map(name).collect()
}

fn made(case: &Case) -> String {
    let table = "create role R; create role G; create role H; create table T (id int primary key);
                 alter table T enable row level security; select relay.watch('T');";
    named(case, &format!("{table} {};", case.made))
}

async fn reader(stage: &Stage, case: &Case) -> Client {
    let token = token(&format!("{}_{}_r", stage.name, case.name), None, json!({}));
    stage.subscribe(&token, json!([{"event": "*", "schema": "*"}])).await
}

async fn check(stage: &Stage, case: &Case, client: &mut Client) {
    let write = |id: u32| named(case, &case.write.replace("(1)", &format!("({id})")));
    // The look at the catalog that this makes is as young as can be when the rule changes.
    stage.run(&write(1)).await;
    assert_eq!(stage.told(client).await, [r#"INSERT {"id":1}"#], "{} before", case.name);
    let mut observer = stage.join(&token("authenticated", None, json!({}))).await;
    stage.run(&format!("begin; {}; {}; {}; commit", write(2), named(case, case.taken), write(3))).await;
    stage.told(&mut observer).await;
    // A role that does not count any more would not even see the marker.
    stage.database.let_judge().await;
    assert_eq!(stage.told(client).await, [""; 0], "{} taken", case.name);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_that_changes_with_a_row_counts_for_it_whatever_fires_for_the_rule() {
    let stage = Stage::new(&CASES.iter().map(made).collect::<String>()).await;
    for case in &CASES {
        let mut client = reader(&stage, case).await;
        check(&stage, case, &mut client).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_of_a_table_that_is_looked_into_counts_for_a_row_that_is_written_with_it() {
    check_inverted(&LOOKED_INTO).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_of_a_function_or_of_what_its_body_reads_counts_for_a_row_that_is_written_with_it() {
    check_inverted(&CALLED).await;
}

async fn check_inverted(cases: &[Case]) {
    let stage = Stage::new(&cases.iter().map(made).collect::<String>()).await;
    for case in cases {
        // The judge acts as readers, and not as the owners of tables and functions.
        stage.run(&named(case, "revoke G, H from JUDGE")).await;
        let mut client = reader(&stage, case).await;
        let (table, role) = (format!("t_{}", case.name), format!("{}_{}_r", stage.name, case.name));
        // With the rights that the relay has.
        let login = |login| with_login(&stage.database.url, login);
        let (url, judge) = (login(READER), login(JUDGE));
        let of = ["explain", &table, "--role", &role, "--database-url", &url, "--judge-url", &judge];
        let (_, text, _) = output(&of).await;
        assert!(text.contains("decided: inverted"), "otherwise nothing could be old: {text}");
        check(&stage, case, &mut client).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_of_a_table_that_is_looked_into_keeps_a_row_that_it_still_shows() {
    let case = case("kept", NESTED, "");
    let stage = Stage::new(&made(&case)).await;
    let mut client = reader(&stage, &case).await;
    for (id, changed) in [
        (1, "alter table M rename who to was"),
        (2, "alter table N rename who to was"),
        (3, "drop policy n on N; create policy n on N using (was = auth.role())"),
        (4, "alter table N disable row level security"),
        (5, "revoke select on M from service_role"),
        (6, "alter table M disable row level security; alter table N enable row level security"),
        (7, "alter table M rename to renamed"),
    ] {
        let changed = named(&case, changed);
        let sql = named(&case, &format!("begin; {changed}; insert into T values ({id}); commit"));
        stage.run(&sql).await;
        assert_eq!(stage.told(&mut client).await, [format!(r#"INSERT {{"id":{id}}}"#)], "{changed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_that_changes_with_a_row_counts_for_it_while_the_event_trigger_is_away() {
    for case in &TRIGGERS {
        let stage = Stage::new(&made(case)).await;
        let mut client = reader(&stage, case).await;
        check(&stage, case, &mut client).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_that_is_given_to_another_owner_counts_beside_a_table_of_a_second_one() {
    let stage = Stage::new(
        "create role \"$DB_r\"; create role \"$DB_s\"; create role \"$DB_t\"; grant \"$DB_s\", \"$DB_t\" to \"$DB_r\";
         create schema housed authorization \"$DB_s\"; create table housed.t (id int primary key);
         alter table housed.t owner to \"$DB_t\"; grant select on marker to \"$DB_r\"; select relay.watch('housed.t')",
    )
    .await;
    let reader = token(&format!("{}_r", stage.name), None, json!({}));
    let mut client =
        stage.subscribe(&reader, json!([{"event": "*", "schema": "housed", "table": "t"}])).await;
    stage.run("insert into housed.t values (1)").await;
    assert_eq!(stage.changes(&mut client).await.len(), 1);
    stage
        .run("begin; reassign owned by \"$DB_s\" to postgres; insert into housed.t values (2); commit")
        .await;
    assert_eq!(stage.changes(&mut client).await.len(), 0, "the reader may not use the schema any more");
}
