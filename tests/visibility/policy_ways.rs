//! Compiled, inverted, one by one: whichever way a policy is decided, a reader sees what the table itself would show.
//!
//! Policies, rows and claims are generated. A failure names its seed; `RELAY_TEST_SEED=…` plays it again.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use relay::model::policy::plan::PlanKind;
use serde_json::{Value, json};

use crate::support::ANN;
use crate::support::ways::Ways;

const BOB: &str = "0B000000-0000-4000-8000-00000000000b";

/// Conditions that read claims.
const OF_CLAIMS: &[&str] = &[
    "owner = auth.uid()",
    "(select auth.uid()) = owner",
    "owner <> auth.uid()",
    "owner is distinct from auth.uid()",
    "owner::text = auth.jwt() ->> 'sub'",
    "owner::text = current_setting('request.jwt.claims', true)::json ->> 'sub'",
    "owner = nullif(current_setting('request.jwt.claim.sub', true), '')::uuid",
    "owner::text <> current_setting('request.jwt.claim.sub', true)",
    "auth.role() = 'authenticated'",
    "auth.email() = name",
    "name = (auth.jwt() -> 'app_metadata' ->> 'org')",
    "code = (auth.jwt() #>> '{app_metadata,org}')",
    "name = any(array(select jsonb_array_elements_text(auth.jwt() -> 'orgs')))",
    "name in (select jsonb_array_elements_text(auth.jwt() -> 'orgs'))",
    "name in (select x from jsonb_array_elements_text(auth.jwt() -> 'orgs') x)",
    "owner = any(array(select jsonb_array_elements_text(auth.jwt() -> 'ids')::uuid))",
    "auth.jwt() -> 'orgs' ? name",
    "(auth.jwt() ->> 'level')::int >= n",
    "(auth.jwt() ->> 'level')::bigint = big",
    "n between 1 and (auth.jwt() ->> 'level')::smallint",
    "coalesce((auth.jwt() ->> 'admin')::bool, false)",
    "(auth.jwt() -> 'admin')::bool",
    "(auth.jwt() ->> 'admin')::bool is true",
    "auth.jwt() -> 'app_metadata' is not null",
    "auth.jwt() ->> 'level' is null",
    "auth.uid() = any(owners)",
    "auth.jwt() ->> 'org' = any(tags)",
    "my_org() = name",
    "is_admin()",
    "coalesce(name, auth.jwt() ->> 'org') = 'x'",
    "auth.jwt() -> 'orgs' ->> 0 = name",
    "auth.jwt() ->> 'org' in ('x', name)",
    "case when open then owner = auth.uid() else name = auth.jwt() ->> 'org' end",
    "exists (select from members m where m.team = t.n and m.member = auth.uid())",
    "exists (select 1 from members m where m.team = t.n and m.member = (select auth.uid()) and m.role in ('x', 'boss'))",
    "n in (select team from members where member = auth.uid())",
    "n in (select team from members where member = auth.uid() and role = auth.jwt() ->> 'org')",
    "auth.uid() in (select member from members where team = n)",
    "n in (select id from teams where org in (select role from members where member = auth.uid()))",
    "exists (select from teams join members on team = id where id = t.n and member = auth.uid())",
    "auth.uid() = (select boss from teams where id = n)",
    "name = (select org from teams where id = (auth.jwt() ->> 'level')::int)",
    "name = (select role from members where member = auth.uid())",
    "(select org from teams where (auth.jwt() ->> 'level')::int = id and boss = auth.uid()) = 'x'",
    "not (name = (select org from teams where id = (auth.jwt() ->> 'level')::int))",
    "exists (select from members m where m.team = t.n and m.member = auth.uid() limit 1)",
    "n = any (array(select team from members where member = auth.uid()))",
    "exists (select from members m where m.team = t.n and (m.member = auth.uid() or m.role = auth.jwt() ->> 'org'))",
    "not exists (select from members m where m.team = t.n and (m.member = auth.uid() or m.role = 'boss'))",
    "exists (select from members m where (m.team = t.n and m.member = auth.uid()) or (m.team = t.small and m.member = t.owner))",
    "n in (select team from members where member = auth.uid() or role = 'y' or 10 / team > 3)",
    "n in (select team from members where (member = auth.uid() or role = 'y') and (role = auth.jwt() ->> 'org' or team = 1))",
    "not (n = any (array(select team from members where member = auth.uid())))",
    "auth.uid() = any (array(select member from members where team = n))",
    "n in (select id from teams where org = (select o.org from teams o where o.id = n) and boss = auth.uid())",
    "auth.jwt() ->> 'org' = lower(name)",
    "n not in (select team from members where member = auth.uid())",
    "not exists (select from members m where m.team = t.n and m.member = auth.uid())",
    "exists (select from members where member = auth.uid())",
    "(select count(*) from members where member = auth.uid()) > n",
    "lower(auth.email()) = name",
    "length(name) > (auth.jwt() ->> 'level')::int",
    "may_see(n)",
];

/// Conditions that the relay or one query decides for all readers, also below `not`.
const NOT_ONE_BY_ONE: &[&str] = &[
    "n not in (select team from members where member = auth.uid())",
    "name not in (select role from members where member = auth.uid() and team = n)",
    "n <> all (array(select team from members where member = auth.uid()))",
    "auth.uid() not in (select member from members where team = n)",
    "owner not in (select boss from teams where id = n)",
    "name in (select role from members where member = auth.uid()) is not true",
    "not exists (select from members m where m.team = t.n and m.member = auth.uid() and m.role = t.name)",
    "(select count(*) from members m where m.team = t.n and m.member = auth.uid()) > 0",
    "(select count(*) from members m where m.team = t.n and m.member = auth.uid()) = 0",
    "(select count(1) from members m where m.team = t.n and m.member = auth.uid()) >= 1",
    "(select max(role) from members m where m.team = t.n and m.member = auth.uid()) is not null",
    "(select min(team) from members m where m.role = t.name and m.member = auth.uid()) is null",
    "coalesce((select bool_or(role = 'x') from members m where m.team = t.n and m.member = auth.uid()), false)",
    "n in (select id from teams where boss = auth.uid() union select team from members where member = auth.uid())",
    "exists (select from members m where m.team = t.n and m.member = auth.uid() union all select from teams where id = t.n and boss = auth.uid())",
    "exists (select from teams g join members m on m.team = g.id and m.member = auth.uid() where g.id = t.n)",
    "auth.jwt() -> 'orgs' ?| array['x', 'y']",
    "auth.jwt() -> 'orgs' ?& array['x', 'y']",
    "auth.jwt() -> 'orgs' ?| '{x,y}'",
    "auth.jwt() -> 'orgs' ?| tags",
    "auth.jwt() -> 'orgs' ? (auth.jwt() ->> 'org')",
    "auth.jwt() -> 'orgs' @> '[\"x\"]'",
    "auth.jwt() -> 'orgs' @> '\"x\"'",
    "auth.jwt() -> 'orgs' <@ '[\"x\", \"y\", 1, null, true]'",
    "auth.jwt() -> 'app_metadata' @> '{\"org\": \"x\"}'",
    "auth.jwt() @> '{\"app_metadata\": {}}'",
    "auth.jwt() -> 'orgs' @> to_jsonb(name)",
    "to_jsonb(code) <@ (auth.jwt() -> 'orgs')",
    "auth.jwt() -> 'ids' @> to_jsonb(owner)",
    "to_jsonb(n) = auth.jwt() -> 'level'",
    "to_jsonb(open) = auth.jwt() -> 'admin'",
    "auth.jwt() -> 'level' = '1'",
    "auth.jwt() -> 'org' <> '\"x\"'",
    "auth.jwt() -> 'orgs' = '[\"x\", \"y\"]'",
    "auth.jwt() -> 'org' is null",
    "jsonb_typeof(auth.jwt() -> 'orgs') = 'array'",
    "jsonb_array_length(auth.jwt() -> 'orgs') > n",
    "(auth.jwt() -> 'level')::int = n",
    "auth.jwt() #>> '{orgs,0}' = name",
    "jsonb_extract_path_text(auth.jwt(), 'app_metadata', 'org') = name",
    "(auth.jwt())['app_metadata'] ->> 'org' = name",
    "name in (select jsonb_array_elements_text(coalesce(auth.jwt() -> 'orgs', '[]')))",
    "exists (select from jsonb_array_elements_text(auth.jwt() -> 'orgs') e where e = name)",
    "not exists (select from jsonb_array_elements_text(auth.jwt() -> 'orgs') e where e = name)",
    "name in (select e ->> 0 from jsonb_array_elements(auth.jwt() -> 'orgs') e)",
    "n in (select e::int from jsonb_array_elements(auth.jwt() -> 'orgs') e)",
    "tags && array(select jsonb_array_elements_text(auth.jwt() -> 'orgs'))",
    "tags @> array(select jsonb_array_elements_text(auth.jwt() -> 'orgs'))",
    "owners @> array[auth.uid()]",
    "array[auth.uid(), owner] <@ owners",
    "tags && array[auth.jwt() ->> 'org', 'x', name]",
    "array[auth.jwt() ->> 'org'] <@ array['x', 'y']",
    "btrim(auth.jwt() ->> 'level') = '2'",
    "trim(auth.email()) = name",
    "trim(both 'xo' from auth.email()) = name",
    "ltrim(auth.email(), 'o''') = name and rtrim(auth.email(), 'd') = name",
    "split_part(auth.email(), '''', 1) = name",
    "split_part(auth.email(), '', 2) = name",
    "split_part(auth.email(), 'd', (auth.jwt() ->> 'level')::int) = name",
    "lower(auth.email()) = name",
    "upper(auth.email()) = upper(name)",
    "left(auth.email(), 1) = name or right(auth.email(), -2) = name",
    "replace(auth.jwt() ->> 'org', 'x', 'y') = code",
    "length(auth.email()) > n",
    "position('d' in auth.email()) > n",
    "auth.email() like '%d_'",
    "auth.email() not like '_'",
    "name like auth.email() || '%'",
    "'x' = any (string_to_array(auth.email(), ''''))",
    "starts_with(auth.email(), 'o')",
    "case auth.jwt() ->> 'org' when 'x' then open when name then true end",
    "case n when 1 then owner = auth.uid() when (auth.jwt() ->> 'level')::int then open else name = 'x' end",
    "(owner = auth.uid()) = open",
    "(owner = auth.uid()) <> (n = 1)",
    "(n = (auth.jwt() ->> 'level')::int) = true",
    "n between (auth.jwt() ->> 'level')::int and 3",
    "nullif(auth.jwt() ->> 'org', '') is distinct from name",
    "(n, name) = ((auth.jwt() ->> 'level')::int, auth.jwt() ->> 'org')",
];

/// Conditions that one query decides for all readers, where false and null mean the same.
const NOT_ONE_BY_ONE_ALONE: &[&str] = &[
    "(n, name) in (select team, role from members where member = auth.uid())",
    "(n, auth.uid()) in (select team, member from members)",
    "(select bool_or(role = 'x') from members m where m.team = t.n and m.member = auth.uid())",
    "(select org from teams where id = (auth.jwt() ->> 'level')::int) in ('x', name)",
    "(select org from teams where id = (auth.jwt() ->> 'level')::int) not in ('x', name)",
    "name <> (select org from teams where id = (auth.jwt() ->> 'level')::int)",
    "(select boss from teams where id = n) <> auth.uid()",
    "(select org from teams where id = n and boss = auth.uid()) > name",
];

/// Conditions on claims that look into tables with row security of their own.
const OF_SECURED: &[&str] = &[
    "exists (select from mine m where m.team = t.n and m.member = auth.uid())",
    "exists (select from mine where team = t.n)",
    "not exists (select from mine m where m.team = t.n and m.member = auth.uid())",
    "n in (select team from mine)",
    "n in (select team from mine where member = (select auth.uid()) and role in ('x', 'boss'))",
    "auth.uid() in (select member from mine where team = n)",
    "auth.uid() in (select g.boss from groups g join mine m on m.team = g.id where g.id = t.n)",
    "exists (select from groups g join mine m on m.team = g.id where g.id = t.n and m.member = auth.uid())",
    "exists (select from members m left join mine on mine.team = m.team and mine.member = m.member
       where m.team = t.n and m.member = auth.uid() and mine.team is null)",
    "exists (select from mine left join groups g on g.id = mine.team where mine.team = t.n and g.id is null)",
    "exists (select from mine join members using (team) where team = t.n and members.member = auth.uid())",
    "exists (select from mine left join members using (team) where team = t.n)",
    "exists (select from mine right join members m on m.team = mine.team where m.team = t.n and m.member = auth.uid())",
    "n in (select id from groups)",
    "n in (select id from groups where boss = auth.uid())",
    "n in (select id from groups where org in (select role from mine where member = auth.uid()))",
    "exists (select from groups where groups.id = t.n and groups.org = t.name)",
    "name = (select org from groups where id = n)",
    "(select count(*) from mine where team = n) > 0",
    "(select count(*) from groups) > n",
    "n = (select max(team) from mine)",
    "exists (select from (select * from mine) m where m.team = t.n and m.member = auth.uid())",
    "n not in (select team from mine)",
    "n = any (array(select team from mine))",
];

/// Policies of these tables.
const POLICIES_OF_MINE: &[&str] = &[
    "true",
    "false",
    "null",
    "member = auth.uid()",
    "member = (select auth.uid())",
    "member = auth.uid() and role <> 'y'",
    "member = auth.uid() or role = 'boss'",
    "member = auth.uid() or team in (select g.id from groups g where g.boss = auth.uid())",
    "team in (select id from groups)",
    "exists (select from groups g where g.id = team)",
    "exists (select from groups mine where mine.id = team)",
    "exists (select from members m where m.team = mine.team and m.member = auth.uid())",
    "team in (select m.team from members m join teams t on t.id = m.team where m.member = auth.uid())",
    "team in (select team from members m left join teams on id = team left join members o using (team) where m.member = auth.uid())",
    "role = auth.jwt() ->> 'org'",
    "auth.role() = 'authenticated'",
    "auth.role() = 'anon'",
    "auth.uid() is not null",
    "current_user = 'authenticated'",
    "10 / team > 3",
    "mine is not null",
    "may_see(team)",
    "team in (select team from mine)",
    "private.is_member(team)",
    "team in (select private.rooms_of(auth.uid()))",
    "private.is_mine(team)",
    "own_group(team)",
    "private.knows(team, member)",
];

const POLICIES_OF_GROUPS: &[&str] = &[
    "true",
    "org = 'x'",
    "boss = auth.uid()",
    "boss = auth.uid() or org = auth.jwt() ->> 'org'",
    "org = (auth.jwt() -> 'app_metadata' ->> 'org')",
    "id in (select team from members where member = auth.uid())",
    "exists (select from members m where m.team = id and m.member = auth.uid())",
    "exists (select from mine m where m.team = id)",
    "(select count(*) from members m where m.team = id) > 1",
    "10 / id > 3",
    "org in (select jsonb_array_elements_text(auth.jwt() -> 'orgs'))",
];

/// Conditions that call functions of one select, and some that call others.
const OF_FUNCTIONS: &[&str] = &[
    "private.is_member(n)",
    "private.is_member(small)",
    "(select private.is_member(2))",
    "not private.is_member(n)",
    "private.is_member(n) is not true",
    "private.knows(n, auth.uid())",
    "private.knows(n, owner) and open",
    "not private.knows(n, owner)",
    "private.knows(null, auth.uid())",
    "n in (select private.rooms_of(auth.uid()))",
    "n in (select private.rooms_of((select auth.uid())))",
    "n in (select private.rooms_of(owner))",
    "n not in (select private.rooms_of(auth.uid()))",
    "n in (select r from private.rooms_of(auth.uid()) r)",
    "n in (select r.room from private.rooms_of(auth.uid()) r(room) where r.room > 1)",
    "exists (select from private.rooms_of(auth.uid()) r(room) where r.room = t.n)",
    "exists (select from private.rooms_of(auth.uid()) r(room) where r.room = t.n and t.open)",
    "n = any (array(select private.rooms_of(auth.uid())))",
    "n = any (private.room_ids())",
    "not (n = any (private.room_ids()))",
    "n = any ((select private.room_ids())::int[])",
    "auth.uid() = private.boss_of(n)",
    "owner = private.boss_of(n)",
    "name = private.org_of(n)",
    "name <> private.org_of(n)",
    "private.org_of((auth.jwt() ->> 'level')::int) = name",
    "private.some_role(n) = 'x'",
    "private.is_open(n)",
    "private.has_role(n, 'boss')",
    "private.has_role(n, name)",
    "private.has_role(n, 'x') or private.has_role(n, 'y')",
    "private.in_path(n)",
    "private.without_path(n)",
    "private.atomic_member(n)",
    "private.atomic_org() = name",
    "private.nested(n)",
    "private.twice(n)",
    "private.level() >= n",
    "private.is_level(n)",
    "private.is_mine(n)",
    "own_mine(n)",
    "n in (select own_mines())",
    "own_mine(n) or owner = auth.uid()",
    "own_group(n)",
    "own_nested(n)",
    "private.secret(n)",
    "private.table_rooms(n)",
    "n in (select private.rooms_table(auth.uid()))",
    "private.counted(n)",
    "private.any_boss(n)",
    "private.volatile_member(n)",
    "private.divided(n)",
    "private.closed(n)",
    "private.who() = 'authenticated'",
    "own_who() = 'authenticated'",
    "private.first_of(n)",
    "private.over(n)",
    "private.is_member(n) and n in (select team from mine)",
    "n in (select team from mine) or private.is_member(n)",
    "exists (select from mine where mine.team = t.n and private.is_member(mine.team))",
    "exists (select from groups where groups.id = t.n and private.is_member(groups.id))",
    "case when private.is_member(n) then open else owner = auth.uid() end",
    "coalesce(private.is_member(n), false)",
    "coalesce(owner = auth.uid(), true)",
    "n in (select t.id from teams t where t.boss = auth.uid())",
    "exists (select from teams t where t.id = n and t.boss = auth.uid())",
    "(select is_boss(m.role) from members m where m.team = t.n and m.member = auth.uid() limit 1)",
];

/// Conditions that do not; `N` becomes a small number, `S` one of [`TEXTS`].
const OF_ROWS: &[&str] = &[
    "true",
    "false",
    "null",
    "open",
    "not open",
    "open is not true",
    "open is unknown",
    "n = N",
    "n <> N",
    "n < N",
    "n in (N, 2, null)",
    "n not in (N, 2)",
    "n not in (N, null)",
    "big > 9223372036854775800",
    "big = n",
    "small = n",
    "small < N",
    "name = S",
    "name <> S",
    "code = S",
    "code in (S, 'x')",
    "name is null",
    "name = code",
    "name > S",
    "coalesce(open, n = N)",
    "coalesce(name, code, 'x') = S",
    "mood = 'good'",
    "mood <> 'bad'",
    "mood in ('bad', 'good')",
    "mood > 'bad'",
    "mood::text = S",
    "n::text = S",
    "owner::text = S",
    "S = any(tags)",
    "'x' <> all(tags)",
    "tags is null",
    "price > N",
    "price is not null",
    "at > timestamptz '2026-01-01' + interval 'N hours'",
    "at < now()",
    "doc ->> 'k' = S",
    "lower(name) = 'x'",
    "name like 'x%'",
    "10 / n > N",
    "n = N is distinct from open",
    "case when n > N then open else name = S end",
    "exists (select from teams where teams.id = t.n and teams.org = t.name)",
    "n in (select id from teams)",
    "name = (select org from teams where id = n)",
];

const TEXTS: &[&str] =
    &["''", "'x'", "'o''dd'", "'\"q\" \\ b'", "'ünï 🦀'", "'null'", "'1'", "'y'", "E'two\\nlines'"];

const SCHEMA: &str = "
    create type mood as enum ('bad', 'fine', 'good');
    create table teams (id int primary key, org text, boss uuid);
    create table members (team int, member uuid, role text);
    create index on members (team); grant select on teams, members to authenticated;
    create table mine (team int, member uuid, role text); create table groups (id int, org text, boss uuid);
    alter table mine enable row level security; alter table groups enable row level security;
    create index on mine (team); grant select on mine, groups to authenticated;
    create function my_org() returns text language sql stable as $$ select auth.jwt() -> 'app_metadata' ->> 'org' $$;
    create function is_admin() returns bool language sql stable as
      $$ select coalesce((auth.jwt() ->> 'admin')::boolean, false) $$;
    create function may_see(n int) returns bool language plpgsql stable security definer as
      -- The claim is read first: whether it raises must not depend on the plan.
      $$ declare me constant uuid := auth.uid(); begin return exists (select from public.members where team = n and member = me); end $$;
    create schema private; grant usage on schema private to authenticated;
    create table private.secrets (team int, who uuid); insert into private.secrets values (1, '0a000000-0000-4000-8000-00000000000a'), (2, null);
    create function private.is_member(team int) returns bool language sql stable security definer set search_path = '' as
      $$ select exists (select from public.members m where m.team = is_member.team and m.member = (select auth.uid())) $$;
    create function private.is_mine(wanted int) returns bool language sql stable security definer set search_path = '' as
      $$ select exists (select 1 from public.mine where team = wanted and member = auth.uid()) $$;
    create function private.knows(int, uuid) returns bool language sql stable strict security definer set search_path = '' as
      $$ select exists (select 1 from public.members where team = $1 and member = $2) $$;
    create function private.rooms_of(who uuid) returns setof int language sql stable security definer set search_path = '' as
      $$ select team from public.members where member = who $$;
    create function private.rooms_table(who uuid) returns table (team int) language sql stable strict security definer set search_path = '' as
      $$ select m.team from public.members m where m.member = who $$;
    create function private.table_rooms(n int) returns bool language sql stable security definer set search_path = '' as
      $$ select n in (select r.team from private.rooms_table(auth.uid()) r) $$;
    create function private.room_ids() returns int[] language sql stable security definer set search_path = '' as
      $$ select coalesce(array_agg(team), '{}') from public.members where member = auth.uid() $$;
    create function private.boss_of(id int) returns uuid language sql stable security definer set search_path = '' as
      $$ select boss from public.teams where teams.id = boss_of.id $$;
    create function private.org_of(bigint) returns text language sql stable security definer set search_path = '' as
      $$ select org from public.teams where id = $1 $$;
    create function private.some_role(n int) returns text language sql stable security definer set search_path = '' as
      $$ select min(role) from public.members where team = n and member = auth.uid() $$;
    create function private.is_open(n int) returns bool language sql stable security definer set search_path = '' as
      $$ select boss = auth.uid() from public.teams where id = n $$;
    create function private.has_role(n int, wanted text) returns bool language sql stable security definer set search_path = '' as
      $$ select exists (select from public.members where team = n and role = wanted and member = auth.uid()) $$;
    create function private.in_path(n int) returns bool language sql stable security definer set search_path = public as
      $$ select exists (select from members where team = n and member = auth.uid()) $$;
    create function private.without_path(n int) returns bool language sql stable security definer as
      $$ select exists (select from public.members where team = n and member = auth.uid()) $$;
    create function private.atomic_member(n int) returns bool language sql stable security definer
      begin atomic select exists (select from members where team = n and member = auth.uid()); end;
    create function private.atomic_org() returns text language sql stable return auth.jwt() ->> 'org';
    create function private.nested(n int) returns bool language sql stable security definer set search_path = '' as
      $$ select private.is_member(n) or private.is_open(n) $$;
    create function private.twice(n int) returns bool language sql stable as
      $$ select private.is_member(n) and private.is_mine(n) $$;
    create function private.level() returns int language sql stable as $$ select (auth.jwt() ->> 'level')::int $$;
    create function private.is_level(n int) returns bool language sql stable as $$ select private.level() >= n $$;
    create function private.secret(n int) returns bool language sql stable security definer set search_path = '' as
      $$ select exists (select from private.secrets where team = n and who = auth.uid()) $$;
    create function private.counted(n int) returns bool language sql stable security definer set search_path = '' as
      $$ select count(*) > 0 from public.members where team = n and member = auth.uid() $$;
    create function private.any_boss(n int) returns bool language sql stable security definer set search_path = '' as
      $$ select bool_or(role = 'boss') from public.members where team = n and member = auth.uid() $$;
    create function private.volatile_member(n int) returns bool language sql security definer set search_path = '' as
      $$ select exists (select from public.members where team = n and member = auth.uid()) $$;
    create function private.divided(n int) returns bool language sql stable security definer set search_path = '' as
      $$ select exists (select from public.members where 10 / team > 3 and team = n and member = auth.uid()) $$;
    create function private.closed(n int) returns bool language sql stable security definer set search_path = '' as
      $$ select exists (select from public.members where team = n and member = auth.uid()) $$;
    revoke execute on function private.closed from public;
    create function private.who() returns text language sql stable security definer set search_path = '' as $$ select current_user::text $$;
    create function own_who() returns text language sql stable as $$ select current_user::text $$;
    create function private.first_of(n int) returns bool language sql stable security definer set search_path = '' as
      $$ select role = 'x' from public.members where team = n and member = auth.uid() order by role $$;
    create function private.over(n int) returns bool language sql stable security definer set search_path = '' as
      $$ select exists (select from public.members where team = n and member = auth.uid()) $$;
    create function private.over(n bigint) returns bool language sql stable security definer set search_path = '' as $$ select n = 1 $$;
    create function own_mine(n int) returns bool language sql stable as
      $$ select exists (select from public.mine where team = n and member = auth.uid()) $$;
    create function own_mines() returns setof int language sql stable as $$ select team from public.mine $$;
    create function own_group(n int) returns bool language sql stable as
      $$ select exists (select from public.groups g where g.id = n and private.is_member(g.id)) $$;
    create function own_nested(n int) returns bool language sql stable as $$ select own_mine(n) or own_group(n) $$;
    create function is_boss(role text) returns bool language sql immutable as $$ select role = 'boss' $$;
    create table t (id int primary key, owner uuid, owners uuid[], n int, small smallint, big bigint, name text, code varchar(40),
      open bool, mood mood, tags text[], price numeric, at timestamptz, doc jsonb);
    create index on t (owner);
    alter table t enable row level security; grant select on t to authenticated; select relay.watch('t');
    create table ids_t (id int); grant select on ids_t to authenticated;
    insert into ids_t select generate_series(1, 16);
    create function sees_t(wanted int) returns bool language plpgsql stable as $$
      begin return exists (select from t where id = wanted); exception when others then return null; end $$;
    create function claims_raise() returns bool language plpgsql stable as $$
      begin
        perform auth.uid(), (auth.jwt() ->> 'level')::smallint, (auth.jwt() ->> 'admin')::bool, (auth.jwt() -> 'admin')::bool,
          array(select jsonb_array_elements_text(auth.jwt() -> 'orgs')), array(select jsonb_array_elements_text(auth.jwt() -> 'ids')::uuid);
        return false;
      exception when others then return true;
      end $$;";

struct Dice(TestRunner);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        (0..bound).new_tree(&mut self.0).unwrap().current()
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    fn or_null(&mut self, value: String) -> String {
        if self.below(5) == 0 { String::from("null") } else { value }
    }

    /// A condition of so many levels.
    fn condition(&mut self, depth: usize) -> String {
        match self.below(if depth == 0 { 2 } else { 6 }) {
            0 if self.below(3) == 0 => self.one(OF_SECURED).to_owned(),
            0 if self.below(2) == 0 => self.one(OF_FUNCTIONS).to_owned(),
            0 if self.below(2) == 0 => self.one(NOT_ONE_BY_ONE).to_owned(),
            0 if self.below(8) == 0 => self.one(NOT_ONE_BY_ONE_ALONE).to_owned(),
            0 => self.one(OF_CLAIMS).to_owned(),
            1 => {
                let number = self.below(4).to_string();
                let text = self.one(TEXTS);
                let words = self.one(OF_ROWS).split_inclusive(|c: char| !c.is_ascii_alphanumeric());
                let fill = |word: &str| match (word.strip_prefix('N'), word.strip_prefix('S')) {
                    (Some(rest), _) if !rest.starts_with(char::is_alphanumeric) => format!("{number}{rest}"),
                    (_, Some(rest)) if !rest.starts_with(char::is_alphanumeric) => format!("{text}{rest}"),
                    _ => word.to_owned(),
                };
                words.map(fill).collect()
            }
            2 => format!("({}) and ({})", self.condition(depth - 1), self.condition(depth - 1)),
            3 | 4 => format!("({}) or ({})", self.condition(depth - 1), self.condition(depth - 1)),
            _ => format!("not ({})", self.condition(depth - 1)),
        }
    }

    fn row(&mut self) -> String {
        let people = [format!("'{ANN}'"), format!("'{BOB}'"), String::from("gen_random_uuid()")];
        let person = |dice: &mut Self| people[dice.below(3)].clone();
        let values = [
            person(self),
            format!("array[{}, {}, null]::uuid[]", person(self), person(self)),
            self.below(5).to_string(),
            self.one(&["0", "1", "2", "32767", "-32768"]).to_owned(),
            self.one(&["0", "1", "9223372036854775807", "-9223372036854775808"]).to_owned(),
            self.one(TEXTS).to_owned(),
            self.one(TEXTS).to_owned(),
            self.one(&["true", "false"]).to_owned(),
            self.one(&["'bad'", "'fine'", "'good'"]).to_owned(),
            format!("array[{}, {}, null]", self.one(TEXTS), self.one(TEXTS)),
            self.one(&["0", "1.50", "2.5", "'NaN'", "1e3"]).to_owned(),
            format!("timestamptz '2026-01-01 00:30:00+00' + interval '{} hours'", self.below(5)),
            self.one(&["'{}'", "'{\"k\": 1}'", "'{\"k\": \"x\"}'", "'[]'"]).to_owned(),
        ];
        values.map(|value| self.or_null(value)).join(", ")
    }

    /// Rows for all tables, without policies.
    fn tables(&mut self) -> String {
        let dice = self;
        let mut sql = String::from("truncate t, teams, members, mine, groups;");
        for n in 0..3 {
            for table in ["t", "mine", "groups"] {
                sql += &format!("drop policy if exists p{n} on {table};");
            }
        }
        for id in 1..=3 {
            sql += &format!(
                "insert into teams values ({id}, {}, '{}');",
                dice.one(TEXTS),
                dice.one(&[ANN, BOB])
            );
        }
        for _ in 0..4 {
            let (member, role) = (dice.one(&[ANN, BOB]), dice.one(&["x", "boss", "y"]));
            let team = dice.below(4).to_string();
            let team = dice.or_null(team);
            sql += &format!("insert into members values ({team}, '{member}', '{role}');");
        }
        sql += "insert into mine select * from members; insert into groups select * from teams;";
        let rows: Vec<String> = (1..=16).map(|id| format!("({id}, {})", dice.row())).collect();
        sql += &format!("insert into t values {};", rows.join(", "));
        sql
    }

    fn claims(&mut self) -> Value {
        let values = |choices: Value| choices.as_array().unwrap().clone();
        let texts = json!(["x", "y", "", "o'dd", "\"q\" \\ b", "ünï 🦀", "null", "1", "two\nlines"]);
        let mut claims = json!({"role": "authenticated", "exp": 4_000_000_000_u64});
        let wild = self.below(3) == 0;
        let mut put = |name: &str, choices: Vec<Value>| {
            let choices = if wild { choices } else { choices[..choices.len().div_ceil(2)].to_vec() };
            if self.below(6) > 0 {
                claims[name] = choices[self.below(choices.len())].clone();
            }
        };
        put(
            "sub",
            values(json!([
                ANN,
                ANN,
                BOB,
                BOB,
                "no uuid",
                "",
                format!("{{{ANN}}}"),
                "0a0000000000400080000000000000ab"
            ])),
        );
        put("org", [values(texts.clone()), values(json!([1, 1.5, null, true, ["x"], {"x": 1}]))].concat());
        put("email", values(texts.clone()));
        put(
            "level",
            values(json!([
                0,
                1,
                2,
                3,
                "1",
                "2 ",
                "-1",
                1.5,
                "many",
                99999999999_i64,
                "32768",
                null,
                "0x1",
                ""
            ])),
        );
        put("admin", values(json!([true, false, "true", "yes", "t", "maybe", 1, null])));
        put(
            "orgs",
            values(
                json!([["x", "y"], ["x", 1, true], ["x", null], [], "x", {"x": 1, "y": 2}, [["x"]], 7, null, ["o'dd", ""]]),
            ),
        );
        put("ids", values(json!([[ANN, BOB], [BOB.to_lowercase()], [ANN, "no uuid"], [], [null], ANN])));
        put(
            "app_metadata",
            values(json!([{"org": "x"}, {"org": "y"}, {"org": null}, {"org": 7}, {}, [], "x", null])),
        );
        claims
    }
}

fn seed() -> u64 {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    std::env::var("RELAY_TEST_SEED").map_or_else(|_| now() % 1_000_000, |seed| seed.parse().unwrap())
}

fn dice(seed: u64) -> Dice {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    Dice(TestRunner::new_with_rng(Config::default(), rng))
}

#[tokio::test(flavor = "multi_thread")]
async fn each_form_alone_and_below_not_is_not_decided_one_by_one_and_shows_what_the_table_shows() {
    let seed = seed();
    let ways = Ways::new(SCHEMA).await;
    let negated: Vec<String> = NOT_ONE_BY_ONE.iter().map(|condition| format!("not ({condition})")).collect();
    let alone = NOT_ONE_BY_ONE.iter().chain(NOT_ONE_BY_ONE_ALONE).copied();
    let mut found = Vec::new();
    for (round, condition) in alone.chain(negated.iter().map(String::as_str)).enumerate() {
        let mut dice = dice(seed + round as u64);
        let policy = format!("drop policy if exists p0 on t; create policy p0 on t using ({condition})");
        ways.database.run(&format!("{}{policy}", dice.tables())).await;
        let readers: Vec<Value> = (0..10).map(|_| dice.claims()).collect();
        let compared = Box::pin(ways.compare("t", &readers)).await;
        if compared.plan.kind == PlanKind::PerIdentity {
            found.push(format!("{condition}: {:?}", compared.plan.obstacles));
        }
        found.extend(compared.wrong.first().map(|wrong| format!("seed {seed}, {condition}: {wrong}")));
    }
    assert!(found.is_empty(), "{}\n{} findings", found.join("\n"), found.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_way_shows_what_the_table_would_show() {
    let seed = seed();
    let ways = Ways::new(SCHEMA).await;
    let mut taken: BTreeMap<PlanKind, usize> = BTreeMap::new();
    let mut answers = 0;
    let rounds = std::env::var("RELAY_TEST_ROUNDS").map_or(120, |rounds| rounds.parse().unwrap());
    for round in 0..rounds {
        let mut dice = dice(seed + round);
        let sql = dice.tables();
        let mut policies = String::new();
        for n in 0..=dice.below(6).saturating_sub(3) {
            let kind = if n > 0 && dice.below(2) == 0 { "restrictive" } else { "permissive" };
            let depth = dice.below(3);
            let condition = dice.condition(depth);
            policies += &format!("create policy p{n} on t as {kind} using ({condition});\n");
        }
        for (table, conditions) in [("mine", POLICIES_OF_MINE), ("groups", POLICIES_OF_GROUPS)] {
            for n in 0..[1, 1, 1, 1, 2, 3, 0][dice.below(7)] {
                let kind = if n > 0 && dice.below(2) == 0 { "restrictive" } else { "permissive" };
                let condition = dice.one(conditions);
                policies += &format!("create policy p{n} on {table} as {kind} using ({condition});\n");
            }
        }
        ways.database.run(&format!("{sql}{policies}")).await;
        let readers: Vec<Value> = (0..10).map(|_| dice.claims()).collect();
        let context = format!("RELAY_TEST_SEED={} RELAY_TEST_ROUNDS=1\n{policies}", seed + round);
        let (way, compared) = ways.check("t", &readers, &context).await;
        *taken.entry(way).or_default() += 1;
        answers += compared;
    }
    let summary = format!("seed {seed}: {answers} answers; {taken:?}");
    assert!(
        rounds == 1 || (taken.len() == 3 && answers >= 100 * usize::try_from(rounds).unwrap()),
        "{summary}"
    );
}
