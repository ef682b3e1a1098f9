//! Policies that call SQL functions: replaced by their bodies only where that shows exactly what the call shows.
//!
//! A case is a line as in [`policy_patterns`](crate::visibility::policy_patterns). `one by one` is the sign that a call was not
//! replaced.

use serde_json::json;

use crate::support::ANN;
use crate::support::ways::Ways;
use crate::visibility::policy_patterns::all_hold_with;

#[tokio::test(flavor = "multi_thread")]
async fn names_in_a_body_mean_what_they_mean_to_postgresql() {
    all_hold_with(NAMES, OF_NAMES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn functions_that_are_more_than_a_stable_select_are_called() {
    all_hold_with(KINDS, OF_KINDS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_reads_with_the_rights_and_the_row_security_of_who_runs_it() {
    all_hold_with(RIGHTS, OF_RIGHTS).await;
}

/// `M` is "a member of the team", with the team in the place of `T`.
macro_rules! definer {
    ($signature:literal, $body:literal) => {
        concat!(
            "create function ",
            $signature,
            " language sql stable security definer set search_path = '' as $$ select exists (select from ",
            $body,
            ") $$;"
        )
    };
}

const NAMES: &str = concat!(
    "create schema f; grant usage on schema f to authenticated, anon; create schema g;
     create table g.members (like members); insert into g.members select t.id, m.person, m.role from teams t, (select distinct person, role from members) m;
     create table g.only_here (id int); create view g.teams as select * from public.teams;
     create schema h; create operator h.= (function = int4ne, leftarg = int, rightarg = int);
     create operator h.<> (function = texteq, leftarg = text, rightarg = text);
     create function g.lower(text) returns text language sql immutable as $$ select 'boss' $$;
     create function g.is_it(team int) returns bool language sql stable as $$ select team = 1 $$;
     create function f.is_it(team int) returns bool language sql stable set search_path = '' as $$ select team = 2 $$;
     create function f.column(team int) returns bool language sql stable security definer set search_path = '' as
       $$ select exists (select 1 from public.members where team = team and person = auth.uid()) $$;
     create function f.argument(team int) returns bool language sql stable security definer set search_path = '' as
       $$ select exists (select 1 from public.members m where m.team = argument.team and m.person = auth.uid()) $$;
     create function f.numbered(int) returns bool language sql stable security definer set search_path = '' as
       $$ select exists (select 1 from public.members m where $1 = m.team and m.person = auth.uid()) $$;
     create function f.outer_column(wanted int) returns bool language sql stable security definer set search_path = public as
       $$ select exists (select 1 from teams where id = wanted and exists (select * from members where team = id and person = auth.uid())) $$;
     create function f.written(\"Team\" int) returns bool language sql stable security definer set search_path to public, pg_temp as $$
       /* as people write */ SELECT EXISTS (SELECT 1 FROM \"members\" AS M -- all of them
         WHERE m.TEAM = \"Team\" AND (m.Person = (SELECT auth.uid())) AND (m.role IN ('owner', 'member') OR NOT m.state = 'active') LIMIT 1); $$;
     create function f.joined(wanted int) returns bool language sql stable security definer set search_path = public as
       $$ select exists (select from members m join teams t on t.id = m.team left join plans p on p.person = m.person
            where t.id = wanted and m.person = auth.uid() and t.archived is not true and (p.plan is null or p.plan = 'pro')) $$;
     create function f.both(wanted int) returns bool language sql stable security definer set search_path = public as
       $$ select exists (select from members m, teams t where t.id = m.team and t.id = wanted and m.person = auth.uid()) $$;
     create function f.first_schema(team int) returns bool language sql stable security definer set search_path = g, public as
       $$ select exists (select from members m where m.team = first_schema.team and m.person = auth.uid()) $$;
     create function f.second_schema(wanted int) returns bool language sql stable security definer set search_path = f, public as
       $$ select exists (select from members m where m.team = wanted and m.person = auth.uid() and f.is_it(wanted)) $$;
     create function f.by_path(wanted int) returns bool language sql stable security definer set search_path = f as
       $$ select is_it(wanted) and auth.uid() is not null $$;
     create function f.own_path(wanted int) returns bool language sql stable security definer as
       $$ select exists (select from members m where m.team = wanted and m.person = auth.uid()) $$;
     create function f.own_function(wanted int) returns bool language sql stable as $$ select lower('X') = 'x' and wanted > 1 $$;
     create function f.own_view(wanted int) returns bool language sql stable security definer set search_path = g as
       $$ select exists (select from teams where id = wanted and boss = auth.uid()) $$;
     create function f.own_operator(wanted int) returns bool language sql stable security definer set search_path = h, pg_catalog as
       $$ select exists (select from public.members m where m.team = wanted and m.person = auth.uid()) $$;
     create function f.path_operator(wanted int) returns bool language sql stable security definer set search_path = h as
       $$ select exists (select from public.members m where m.team = wanted and m.person = auth.uid()) $$;
     create function f.precedence(wanted int) returns bool language sql stable security definer set search_path = '' as
       $$ select auth.jwt() ->> 'org' = 'acme' and wanted = 1 or not auth.uid() is null and wanted > 2 $$;
     create function f.odd_precedence(wanted bool) returns bool language sql stable security definer set search_path = '' as
       $$ select auth.uid() is not null = wanted $$;
     create function f.system_column(wanted int) returns bool language sql stable security definer set search_path = '' as
       $$ select exists (select from public.members m where tableoid is not null and m.team = wanted and m.person = auth.uid()) $$;
     create function f.whole_row(wanted int) returns bool language sql stable security definer set search_path = '' as
       $$ select exists (select from public.members m where m is not null and m.team = wanted and m.person = auth.uid()) $$;
     create function f.of_column(wanted int) returns bool language sql stable security definer set search_path = '' as
       $$ select max(wanted) > 1 from public.members where role = 'owner' $$;
     create function f.of_column_atomic(wanted int) returns bool language sql stable security definer
       begin atomic select (max(wanted) > 1) from public.members where role = 'owner'; end;
     create function f.draft(status) returns bool language sql stable set search_path = '' as $$ select $1 = 'draft' $$;
     create function f.flagged(char) returns bool language sql stable set search_path = '' as $$ select $1 = 'no' $$;
     create function f.coded(code varchar) returns bool language sql stable set search_path = '' as $$ select code = auth.jwt() ->> 'user_role' or code = 'B-2' $$;",
    definer!("f.\"table\"(items int) returns bool", "public.members where team = items and person = auth.uid()"),
    definer!("f.\"table_too\"(team int) returns bool", "public.members items where items.team = table_too.team and person = auth.uid()"),
);

const OF_NAMES: &str = r#"
inverted: a column before the parameter of the same name | f.column(team)
inverted: a parameter by the name of the function | f.argument(team)
inverted: a parameter by its number | f.numbered(team)
inverted: a column of an outer query | f.outer_column(team)
inverted: as people write | f.written(team)
inverted: two joins | f.joined(team)
inverted: a list of tables | f.both(team)
inverted: a table of the first schema, not of the second | f.first_schema(team)
inverted: a table of the second schema, for want of one in the first | f.second_schema(team)
compiled: a function of the path | f.by_path(team)
one by one: the caller's path | f.own_path(team)
one by one: a function that the caller's path may hide | f.own_function(team)
one by one: a view | f.own_view(team)
one by one: an operator before PostgreSQL's own | f.own_operator(team)
one by one: an operator of the path that may be meant | f.path_operator(team)
compiled: operators without brackets | f.precedence(team)
one by one: operators whose order few know | f.odd_precedence(published)
one by one: a system column | f.system_column(team)
one by one: a whole row | f.whole_row(team)
one by one: an aggregate of the argument | f.of_column(team) and auth.uid() is not null
one by one: an aggregate of the argument, parsed at once | f.of_column_atomic(team) and auth.uid() is not null
inverted: an enum | f.draft(status)
inverted: characters with blanks behind them | f.flagged(flag)
inverted: a short text | f.coded(code)
inverted: a parameter with the name of the table | f."table"(team)
inverted: a table with the name of the policy's | f.table_too(team)
inverted: a column that is hidden by a table of the same name | f.argument(items.team) and exists (select from teams items where items.id > 1)
"#;

const KINDS: &str = "
     create schema f; grant usage on schema f to authenticated, anon;
     create function f.volatile(n int) returns bool language sql security definer set search_path = '' as
       $$ select exists (select from public.members where team = n and person = auth.uid()) $$;
     create function f.immutable(n int) returns bool language sql immutable security definer set search_path = '' as
       $$ select exists (select from public.members where team = n and person = auth.uid()) $$;
     create function f.calls_volatile(n int) returns bool language sql stable security definer set search_path = '' as
       $$ select f.volatile(n) $$;
     create function f.with_setting(n int) returns bool language sql stable security definer set search_path = '' set enable_seqscan = off as
       $$ select exists (select from public.members where team = n and person = auth.uid()) $$;
     create function f.with_claims(n int) returns bool language sql stable security definer set \"request.jwt.claims\" = '{}' as
       $$ select n > 1 and coalesce(auth.jwt() ->> 'sub', '') = '' $$;
     create function f.strict(n int, who uuid) returns bool language sql stable strict security definer set search_path = '' as
       $$ select coalesce(who is null, true) or exists (select from public.members where team = n and person = auth.uid()) $$;
     create function f.not_strict(n int, who uuid) returns bool language sql stable security definer set search_path = '' as
       $$ select who is null or exists (select from public.members where team = n and person = auth.uid()) $$;
     create function f.rows(who uuid) returns setof int language sql stable security definer set search_path = '' as
       $$ select team from public.members where person = who $$;
     create function f.strict_rows(who uuid) returns setof int language sql stable strict security definer set search_path = '' as
       $$ select id from public.teams where who is null or boss = who $$;
     create function f.as_table(who uuid) returns table (team int) language sql stable security definer set search_path = '' as
       $$ select m.team from public.members m where m.person = who $$;
     create function f.two_columns(who uuid) returns table (team int, role text) language sql stable security definer set search_path = '' as
       $$ select m.team, m.role from public.members m where m.person = who $$;
     create function f.out_of(n int, out bool) language sql stable security definer set search_path = '' as
       $$ select exists (select from public.members where team = n and person = auth.uid()) $$;
     create function f.variadic(variadic n int[]) returns bool language sql stable security definer set search_path = '' as
       $$ select exists (select from public.members where team = any (n) and person = auth.uid()) $$;
     create function f.default(n int, who uuid default auth.uid()) returns bool language sql stable security definer set search_path = '' as
       $$ select exists (select from public.members where team = n and person = who) $$;
     create function f.several(n int) returns bool language sql stable security definer set search_path = '' as
       $$ select exists (select from public.members where team = n and person = auth.uid()) $$;
     create function f.several(n smallint) returns bool language sql stable as $$ select n > 1 $$;
     create function f.any(n anyelement) returns bool language sql stable security definer set search_path = '' as
       $$ select exists (select from public.members where team::text = n::text and person = auth.uid()) $$;
     create function f.of_domain(mail) returns bool language sql stable as $$ select $1 = auth.jwt() ->> 'email' $$;
     create function f.of_row(items) returns bool language sql stable as $$ select $1.owner = auth.uid() $$;
     create function f.program(n int) returns bool language plpgsql stable security definer set search_path = '' as
       $$ begin return exists (select from public.members where team = n and person = auth.uid()); end $$;
     create function f.twice(n int) returns bool language sql stable security definer set search_path = '' as
       $$ select false; select exists (select from public.members where team = n and person = auth.uid()) $$;
     create function f.first(n int) returns bool language sql stable security definer set search_path = '' as
       $$ select person = auth.uid() from public.members where team = n order by person $$;
     create function f.one_of(n int) returns bool language sql stable security definer set search_path = '' as
       $$ select boss = auth.uid() from public.teams where id = n $$;
     create function f.none(n int) returns uuid language sql stable security definer set search_path = '' as
       $$ select boss from public.teams where id = n and org = 'acme' $$;
     create function f.wide(n bigint) returns bool language sql stable security definer set search_path = '' as
       $$ select exists (select from public.members where team = n and person = auth.uid()) $$;
     create function f.cast(n int) returns text language sql stable security definer set search_path = '' as
       $$ select (t.org)::varchar from public.teams t where t.id = n $$;
     create function f.divided(n int) returns bool language sql stable security definer set search_path = '' as
       $$ select exists (select from public.members where 12 / team > 3 and team = n and person = auth.uid()) $$;
     create function f.who() returns text language sql stable security definer set search_path = '' as $$ select current_user::text $$;
     create function f.itself(n int) returns bool language sql stable security definer set search_path = '' as $$ select true $$;
     create or replace function f.itself(n int) returns bool language sql stable security definer set search_path = '' as
       $$ select case when n > 3 then f.itself(n - 1) else exists (select from public.members where team = n and person = auth.uid()) end $$;
     create table f.orgs (id int primary key, org text); insert into f.orgs select id, org from teams;
     create function f.changed(n int) returns text language sql stable security definer set search_path = '' as
       $$ select org from f.orgs where id = n $$;
     alter table f.orgs alter org type int using 1;";

const OF_KINDS: &str = r#"
one by one: volatile | f.volatile(team)
inverted: called immutable | f.immutable(team)
one by one: stable, but it calls one that is not | f.calls_volatile(team)
one by one: with a setting | f.with_setting(team)
one by one: with claims of its own | f.with_claims(team)
inverted: null for null | f.strict(team, owner)
inverted: null for null, negated | not f.strict(team, owner)
inverted: something for null | f.not_strict(team, owner)
inverted: a set | team in (select f.rows(auth.uid()))
inverted: a set for the owner | team in (select f.rows(owner)) and f.one_of(team)
one by one: a set by an `or` | team in (select f.strict_rows(auth.uid()))
inverted: a table | team in (select r.team from f.as_table(auth.uid()) r)
one by one: a table of two columns | team in (select r.team from f.two_columns(auth.uid()) r where r.role = 'owner')
one by one: an output | f.out_of(team)
one by one: any number of arguments | f.variadic(team, level)
one by one: a default | f.default(team)
one by one: one of several of the name | f.several(team)
one by one: of any type | f.any(team)
one by one: of a domain | f.of_domain(mail)
one by one: of a row | f.of_row(items)
one by one: a program | f.program(team)
one by one: two selects | f.twice(team)
one by one: the first of several rows | f.first(team)
inverted: of the one row | f.one_of(team)
inverted: none for no row | owner = f.none(team) and auth.uid() is not null and f.one_of(team)
one by one: a wider argument | f.wide(team)
one by one: a result that is cast | org = f.cast(team) and auth.uid() is not null
one by one: a division | f.divided(team)
one by one: whoever runs it, and so nothing | f.who() = 'authenticated'
one by one: itself | f.itself(team)
one by one: a result that has become another type, and so nothing | f.changed(team) = '1' and auth.uid() is not null
"#;

const RIGHTS: &str = "
     create schema f; grant usage on schema f to authenticated, anon;
     create table own (like members); create table shut (like members); create table forced (like members);
     create table part (like members); create table hidden (like members); create schema closed;
     create table closed.inside (like members); grant select on closed.inside to public;
     insert into own select * from members; insert into shut select * from members; insert into forced select * from members;
     insert into part select * from members; insert into hidden select * from members; insert into closed.inside select * from members;
     alter table own enable row level security; alter table shut enable row level security;
     alter table forced enable row level security; alter table forced force row level security;
     create policy p on shut using (role = 'owner'); create policy p on forced using (role = 'owner');
     do $$ declare o text := current_database() || '_o'; b text := current_database() || '_b'; begin
       execute format('create role %I; create role %I bypassrls; grant usage on schema auth to %1$I, %2$I', o, b);
       execute format('alter table own owner to %I; alter table forced owner to %1$I', o);
       execute format('grant select on shut to %I, %I; grant select (team, person) on part to %1$I; grant create, usage on schema f, public to %1$I, %2$I', o, b);
     end $$;
     create function f.of_own(n int) returns bool language sql stable security definer set search_path = '' as
       $$ select exists (select from public.own where team = n and person = auth.uid()) $$;
     create function f.of_forced(n int) returns bool language sql stable security definer set search_path = '' as
       $$ select exists (select from public.forced where team = n and person = auth.uid()) $$;
     create function f.of_shut(n int) returns bool language sql stable security definer set search_path = '' as
       $$ select exists (select from public.shut where team = n and person = auth.uid()) $$;
     create function f.past(n int) returns bool language sql stable security definer set search_path = '' as
       $$ select exists (select from public.shut where team = n and person = auth.uid()) $$;
     create function f.of_part(n int) returns bool language sql stable security definer set search_path = '' as
       $$ select exists (select from public.part where team = n and person = auth.uid()) $$;
     create function f.part_all(n int) returns bool language sql stable security definer set search_path = '' as
       $$ select exists (select * from public.part where team = n and person = auth.uid()) $$;
     create function f.part_other(n int) returns bool language sql stable security definer set search_path = '' as
       $$ select exists (select from public.part where team = n and person = auth.uid() and role = 'owner') $$;
     create function f.part_atomic(n int) returns bool language sql stable security definer
       begin atomic select exists (select from public.part where team = n and person = auth.uid() and role = 'owner'); end;
     create function f.of_hidden(n int) returns bool language sql stable security definer set search_path = '' as
       $$ select exists (select from public.hidden where team = n and person = auth.uid()) $$;
     create function f.closed(n int) returns bool language sql stable security definer set search_path = '' as
       $$ select exists (select from closed.inside where team = n and person = auth.uid()) $$;
     create function f.by_superuser(n int) returns bool language sql stable security definer set search_path = '' as
       $$ select exists (select from public.hidden where team = n and person = auth.uid()) $$;
     create function f.barred(n int) returns bool language sql stable security definer set search_path = '' as
       $$ select exists (select from public.members where team = n and person = auth.uid()) $$;
     create function f.calls_barred(n int) returns bool language sql stable security definer set search_path = '' as $$ select f.barred(n) $$;
     create function f.invoker(n int) returns bool language sql stable as
       $$ select exists (select from public.own_members where team = n and person = auth.uid()) $$;
     create function f.invoker_hidden(n int) returns bool language sql stable as
       $$ select exists (select from public.hidden where team = n and person = auth.uid()) $$;
     create function f.invoker_in_definer(n int) returns bool language sql stable security definer set search_path = '' as $$ select f.invoker(n) $$;
     do $$ declare o text := current_database() || '_o'; b text := current_database() || '_b'; f text; begin
       foreach f in array '{of_own,of_forced,of_shut,of_part,part_all,part_other,part_atomic,of_hidden,closed,calls_barred}'::text[] loop
         execute format('alter function f.%I owner to %I', f, o);
       end loop;
       execute format('alter function f.past owner to %I', b);
     end $$;
     revoke execute on function f.barred from public; grant execute on function f.barred to authenticated, anon;";

const OF_RIGHTS: &str = r#"
inverted: past the row security of the owner's table | f.of_own(team)
one by one: row security that is forced on the owner | f.of_forced(team)
one by one: row security of another's table | f.of_shut(team)
inverted: past row security by right | f.past(team)
inverted: the columns that the owner may read | f.of_part(team)
one by one: all columns, of which the owner may not read one, and so nothing | f.part_all(team)
one by one: a column that the owner may not read, and so nothing | f.part_other(team)
one by one: the same, parsed at once, and so nothing | f.part_atomic(team)
one by one: a table that the owner may not read, and so nothing | f.of_hidden(team)
one by one: a schema that the owner may not use, and so nothing | f.closed(team)
inverted: what only a superuser may read | f.by_superuser(team)
one by one: a function that the owner may not call, and so nothing | f.calls_barred(team)
inverted: the caller's row security | f.invoker(team)
one by one: what the caller may not read, and so nothing | f.invoker_hidden(team)
inverted: the caller's within a superuser's | f.invoker_in_definer(team)
"#;

/// Watches `t`, whose policy calls a definer that looks into `members`.
const MEMBERS: &str = "
     create schema private; grant usage on schema private to authenticated, anon;
     create table members (team int, person uuid); create table t (id int primary key, team int); create table more (id int primary key);
     create function private.is_member(n int) returns bool language sql stable security definer set search_path = '' as
       $$ select exists (select from public.members where team = n and person = auth.uid()) $$;
     create function private.is_one(n int) returns bool language sql stable security definer
       begin atomic select exists (select from public.members where team = n and person = auth.uid()); end;
     alter table t enable row level security; grant select on t, members to authenticated, anon;
     create policy p on t using (private.is_member(team) or private.is_one(team));
     insert into members values (1, 'ANN'); insert into t values (1, 1), (2, 2); select relay.watch('t');
     create table ids_t (id int); insert into ids_t values (1), (2); grant select on ids_t to authenticated, anon;
     create function sees_t(wanted int) returns bool language sql stable as $$ select exists (select from t where id = wanted) $$;
     create function claims_raise() returns bool language sql as 'select false';";

async fn way(ways: &Ways) -> &'static str {
    let readers = [json!({"exp": 4_000_000_000_u64, "role": "authenticated", "sub": ANN})];
    ways.check("t", &readers, "").await.0.name()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_function_whose_table_was_locked_is_replaced_when_the_lock_is_gone() {
    let ways = Ways::new("select 1").await;
    ways.database.run(&MEMBERS.replace("ANN", ANN)).await;
    ways.catalog().await;
    let mut other = ways.database.connect().await;
    let held = other.transaction().await.unwrap();
    held.batch_execute("lock table members in access exclusive mode").await.unwrap();
    ways.database.run("alter table t rename team to team_id").await;
    let plan = |catalog: std::sync::Arc<relay::model::catalog::relation::Catalog>| {
        let relation = catalog.named("public", "t").unwrap();
        relation.access("authenticated").unwrap().plan.kind.name()
    };
    assert_eq!(plan(ways.catalog().await), "one by one");
    held.rollback().await.unwrap();
    // Nothing in the catalog changes, so only a new attempt can find that the lock is gone.
    let found = async {
        while plan(ways.catalog().await) != "inverted" {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(crate::support::PATIENCE, found).await.expect("it is not tried again");
    assert_eq!(way(&ways).await, "inverted");
}

#[tokio::test(flavor = "multi_thread")]
async fn reading_a_function_creates_nothing_not_even_for_a_moment() {
    // A number of a sequence is not taken back with the transaction.
    let ways = Ways::new(
        "create sequence fired;
         create function fires() returns event_trigger language plpgsql as $$ begin perform nextval('public.fired'); end $$;",
    )
    .await;
    ways.database.run(&MEMBERS.replace("ANN", ANN)).await;
    assert_eq!(way(&ways).await, "inverted");
    ways.database
        .run(
            "create event trigger fires_at_end on ddl_command_end execute function fires();
             create event trigger fires_at_start on ddl_command_start execute function fires();
             create event trigger fires_at_drop on sql_drop execute function fires()",
        )
        .await;
    let mut fired = Vec::new();
    // What the relay does for any policy is not what it does for a function.
    let looks = "exists (select from members m where m.team = t.team and m.person = auth.uid())";
    for policy in [looks, "private.is_member(team)", "private.is_one(team)"] {
        ways.database.run(&format!("alter policy p on t using ({policy}); select setval('fired', 1)")).await;
        assert_eq!(way(&ways).await, "inverted");
        fired.push(ways.database.value("select last_value from fired").await);
    }
    assert!(fired.iter().all(|one| *one == fired[0]), "{fired:?}");
}
