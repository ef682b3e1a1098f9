//! Policies as people write them, each by the way that it should be decided, compared with what the table itself shows.
//!
//! Each case is a line: the way, in parentheses why it is no cheaper one, a name, and after `|` the condition or the
//! policies as SQL; longer ones go on below.
//! This file: who owns a row, and the database that all of them share.

use relay::model::policy::plan::PlanKind;
use serde_json::Value;

use crate::support::ways::Ways;
use crate::support::{ANN, BOB};

const CID: &str = "0c000000-0000-4000-8000-00000000000c";
const EVE: &str = "0e000000-0000-4000-8000-00000000000e";
const ONE: &str = "10000000-0000-4000-8000-000000000001";
const TWO: &str = "20000000-0000-4000-8000-000000000002";

const SCHEMA: &str = r#"
    create type status as enum ('draft', 'review', 'published', 'archived');
    create domain mail as text check (value <> 'no mail');
    create table items (
      id int primary key, owner uuid, author text, email text, team int, org text, tenant uuid, status status,
      state varchar(20), visibility text, published bool, archived bool, deleted_at timestamptz,
      starts timestamptz, ends timestamptz, due date, members uuid[], readers text[], tags text[], team_ids int[],
      price numeric(10, 2), level int, rank smallint, size bigint, title text, code varchar(40), path text,
      doc jsonb, meta json, assignee uuid, span tstzrange, score float8,
      flag char(3), mail mail, ids bigint[], "userId" uuid, "group" text);
    create index on items (owner);

    create table profiles (id uuid primary key, role text, org text, banned bool, level int, manager uuid, tenant uuid);
    create table teams (id int primary key, org text, boss uuid, plan text, archived bool);
    create table members (team int, person uuid, role text, state text, until timestamptz);
    create table shares (item int, person uuid, email text, can text);
    create table blocks (blocker uuid, blocked uuid);
    create table follows (follower uuid, followed uuid, accepted bool);
    create table user_roles (person uuid, role text, team int);
    create table role_permissions (role text, permission text);
    create table org_members (org text, person text, role text);
    create table plans (person uuid, plan text, until timestamptz);
    create table invitations (team int, email text, accepted_at timestamptz);
    create table settings (name text primary key, value text);
    create table admins (id uuid primary key);
    create index on members (team); create index on members (person); create index on shares (item);
    create index on shares (person); create index on user_roles (person);
    create table "TeamMember" ("teamId" int, "userId" uuid, "order" int);
    create materialized view counted as select team, person, count(*) from members group by team, person;
    create table own_members (team int, person uuid, role text);
    alter table own_members enable row level security;
    create policy own on own_members using (person = auth.uid());
    create table open_teams (id int primary key, org text);
    alter table open_teams enable row level security;
    create policy everyone on open_teams for select using (true);
    create table secured_profiles (like profiles including all); alter table secured_profiles enable row level security;
    create policy own on secured_profiles using (id = (select auth.uid())); grant select on secured_profiles to authenticated, anon;
    create table projects (id int, team int); create table tasks (item int, project int); create table notes (item int, author uuid);
    create table strict_members (like own_members); create table closed_members (like own_members);
    create table peers (like own_members); create table endless_members (like own_members);
    create table backward_members (like own_members); create table opaque_members (like own_members);
    create policy p on projects using (exists (select 1 from members m where m.team = projects.team and m.person = auth.uid()));
    create policy p on tasks using (project in (select p.id from projects p));
    create policy p on notes using (exists (select 1 from members notes join teams m on m.id = notes.team
      where notes.person = author and m.boss = auth.uid()));
    create policy p on strict_members using (person = auth.uid()); create policy q on strict_members using (role = 'nobody');
    create policy r on strict_members as restrictive using (role <> 'admin');
    create policy p on peers using (person = auth.uid() or role = 'owner');
    create policy p on endless_members using (team in (select e.team from endless_members e where e.person = auth.uid()));
    create policy p on backward_members using (team in (select i.team from items i));
    create function opaque(person uuid) returns bool language plpgsql stable as $$ begin return person = auth.uid(); end $$;
    create policy p on opaque_members using (opaque(person));
    do $$ declare t text; begin
      foreach t in array '{projects,tasks,notes,strict_members,closed_members,peers,endless_members,backward_members,opaque_members}'::text[] loop
        execute format('alter table %I enable row level security; grant select on %1$I to authenticated, anon', t);
      end loop; end $$;
    create view member_view as select team, person from members;
    grant select on items, profiles, teams, members, shares, blocks, follows, user_roles, role_permissions, org_members,
      plans, invitations, settings, own_members, open_teams, member_view, "TeamMember", counted to authenticated, anon;

    create schema private;
    create function private.is_member(team int) returns bool language sql stable security definer set search_path = '' as
      $$ select exists (select from public.members m where m.team = is_member.team and m.person = auth.uid()) $$;
    create function private.has_role(role text) returns bool language sql stable security definer set search_path = '' as
      $$ select exists (select from public.user_roles u where u.role = has_role.role and u.person = auth.uid()) $$;
    create function private.my_teams() returns setof int language sql stable security definer set search_path = '' as
      $$ select team from public.members where person = auth.uid() $$;
    create function private.my_team_ids() returns int[] language sql stable security definer set search_path = '' as
      $$ select coalesce(array_agg(team), '{}') from public.members where person = auth.uid() $$;
    create function private.is_site_admin() returns bool language sql stable security definer set search_path = '' as
      $$ select exists (select from public.admins where id = auth.uid()) $$;
    create function private.my_org() returns text language plpgsql stable security definer set search_path = '' as
      $$ begin return (select org from public.profiles where id = auth.uid()); end $$;
    create function authorize(wanted text) returns bool language plpgsql stable security definer set search_path = '' as
      $$ begin return exists (select from public.role_permissions
           where permission = wanted and role = (select auth.jwt() ->> 'user_role')); end $$;
    create function claim(name text) returns jsonb language sql stable as
      $$ select coalesce(nullif(current_setting('request.jwt.claims', true), '')::jsonb -> 'app_metadata' -> name, null) $$;
    create function my_claims() returns jsonb language sql stable as
      $$ select nullif(current_setting('request.jwt.claims', true), '')::jsonb $$;
    create function me() returns uuid language sql stable as
      $$ select nullif(current_setting('request.jwt.claim.sub', true), '')::uuid $$;
    create function my_tenant() returns uuid language sql stable as
      $$ select (auth.jwt() -> 'app_metadata' ->> 'tenant')::uuid $$;
    create function org_of_claims() returns text language sql stable as
      $$ select auth.jwt() -> 'app_metadata' ->> 'org' $$;
    create function is_admin() returns bool language sql stable as
      $$ select coalesce((auth.jwt() -> 'app_metadata' ->> 'role') = 'admin', false) $$;
    create function is_claims_admin() returns bool language sql stable as
      $$ select coalesce((auth.jwt() -> 'app_metadata' ->> 'admin')::boolean, false) $$;
    create function is_boss() returns bool language sql stable as
      $$ select exists (select from public.teams where boss = auth.uid()) $$;
    create function can_read(item items) returns bool language sql stable as
      $$ select item.owner = auth.uid() or item.published $$;
    create function is_public(visibility text) returns bool language sql immutable as $$ select visibility = 'public' $$;

    alter table items enable row level security;
    select relay.watch('items');
    create table ids_items (id int); insert into ids_items select generate_series(1, 12);
    grant select on ids_items to authenticated, anon;
    create function sees_items(wanted int) returns bool language plpgsql stable as
      $$ begin return exists (select from items where id = wanted); exception when others then return null; end $$;
    -- No claims here raise where no policy reads them.
    create function claims_raise() returns bool language sql as 'select false';"#;

const ROWS: &str = r#"
    insert into profiles values ('ANN', 'admin', 'acme', false, 5, null, 'ONE'), ('BOB', 'editor', 'acme', null, 2, 'ANN', 'ONE'),
      ('CID', 'viewer', 'beta', true, 1, 'ANN', 'TWO'), ('EVE', 'viewer', null, false, null, null, null);
    insert into teams values (1, 'acme', 'ANN', 'pro', false), (2, 'acme', 'BOB', 'free', null), (3, 'beta', 'CID', 'pro', true), (4, null, null, null, false);
    insert into members values (1, 'ANN', 'owner', 'active', null), (1, 'BOB', 'member', 'active', '2999-01-01'), (2, 'ANN', 'admin', 'invited', '2001-01-01'),
      (2, 'BOB', 'admin', 'active', null), (3, 'CID', 'owner', 'active', null), (3, 'EVE', 'member', 'left', '2001-01-01'), (null, 'BOB', 'member', 'active', null), (4, null, 'guest', null, null);
    insert into shares values (1, 'BOB', 'bob@acme.org', 'read'), (3, 'CID', null, 'write'), (5, 'EVE', 'eve@x.org', 'read'), (8, null, 'bob@acme.org', 'read'), (9, 'ANN', 'ann@acme.org', null);
    insert into blocks values ('ANN', 'EVE'), ('CID', 'BOB'), ('BOB', 'CID');
    insert into follows values ('BOB', 'ANN', true), ('CID', 'ANN', false), ('EVE', 'BOB', true), ('ANN', 'CID', true);
    insert into user_roles values ('ANN', 'admin', null), ('BOB', 'editor', 1), ('CID', 'admin', 3), ('EVE', 'viewer', null);
    insert into role_permissions values ('admin', 'items.read'), ('admin', 'items.write'), ('editor', 'items.read'), ('viewer', 'items.list');
    insert into org_members values ('acme', 'ANN', 'owner'), ('acme', 'BOB', 'member'), ('beta', 'CID', 'owner'), ('O''Dd & Co', 'BOB', 'member');
    insert into plans values ('ANN', 'pro', '2999-01-01'), ('BOB', 'pro', '2001-01-01'), ('CID', 'free', null);
    insert into invitations values (3, 'bob@acme.org', null), (1, 'eve@x.org', '2020-01-01'), (4, 'cid@beta.io', null);
    insert into settings values ('open', 'true'), ('least_level', '2'), ('org', 'acme'); insert into admins values ('ANN');
    insert into own_members values (1, 'ANN', 'owner'), (1, 'BOB', 'member'), (3, 'CID', 'owner'), (2, 'BOB', 'admin');
    insert into secured_profiles select * from profiles;
    insert into projects values (1, 1), (2, 2), (3, 3); insert into tasks values (1, 1), (2, 2), (4, 3), (8, 9);
    insert into notes values (1, 'ANN'), (2, 'BOB'), (5, 'EVE');
    insert into strict_members select * from own_members; insert into closed_members select * from own_members;
    insert into peers select * from own_members; insert into endless_members select * from own_members;
    insert into backward_members select * from own_members; insert into opaque_members select * from own_members;
    insert into open_teams values (1, 'acme'), (3, 'beta');
    insert into "TeamMember" select team, person, 1 from members; refresh materialized view counted;
    insert into items values
      (1, 'ANN', 'ANN', 'ann@acme.org', 1, 'acme', 'ONE', 'published', 'open', 'public', true, false, null, '2001-01-01', '2999-01-01', '2001-01-01',
       '{ANN,BOB}', '{ANN,bob}', '{news,acme}', '{1,2}', 10, 1, 1, 1, 'Hello', 'A-1', '/acme/a', '{"owner": "ANN", "public": true, "tags": ["news"], "level": 2, "org": "acme"}', '{"public": "true"}', 'BOB', '[2001-01-01,2999-01-01)', 1.5),
      (2, 'ANN', 'ANN', 'Ann@acme.org', 2, 'acme', 'ONE', 'draft', 'closed', 'private', false, false, '2020-01-01', '2999-01-01', null, '2999-01-01',
       '{ANN}', '{}', '{}', '{2}', 0, 2, 2, 0, 'hello', 'a-1', '/acme', '{"owner": "BOB", "public": false, "tags": [], "level": "3"}', '{}', null, 'empty', 'NaN'),
      (3, 'BOB', 'BOB', 'bob@acme.org', 1, 'acme', 'ONE', 'review', 'open', 'team', null, true, null, null, '2001-01-01', null,
       '{BOB,null}', '{BOB}', '{internal,null}', '{1}', -5.5, 3, null, 9007199254740993, '', '', '', '{}', null, 'ANN', null, -1),
      (4, 'BOB', 'bob', 'bob@beta.io', 3, 'beta', 'TWO', 'published', null, 'public', true, null, null, '2001-01-01', null, '2001-01-01',
       '{CID,BOB}', '{admin,editor}', '{news}', '{3}', 99.99, null, 5, 100, E'two\nlines', 'B-2', '/beta/x', '{"owner": null, "members": ["BOB", "CID"], "org": "beta"}', '[]', 'CID', '(,2001-01-01)', 0),
      (5, 'CID', 'CID', 'cid@beta.io', 3, 'beta', 'TWO', 'archived', 'open', 'unlisted', true, true, '2999-01-01', '2001-01-01', '2001-01-02', '2010-10-10',
       '{CID}', '{editor}', '{beta,news}', '{3,1}', null, 4, -1, -1, 'O''Dd & Co', 'B-3', '/beta', '["news"]', '{"public": false}', null, '[2001-01-01,2001-01-02]', 100),
      (6, 'CID', null, 'Cid@Beta.io', null, null, null, null, 'done', null, false, false, null, null, null, null,
       null, null, null, null, 1, 0, 0, null, null, null, null, null, null, null, null, null),
      (7, null, 'auth0|17', null, 4, 'O''Dd & Co', null, 'published', 'open', 'public', true, false, null, '2999-01-01', '2999-06-01', '2999-01-01',
       '{}', '{public}', '{"odd tag",ünï}', '{}', 2.5, 5, 3, 9223372036854775807, 'null', 'null', '/null', '{"public": "true", "tags": ["odd tag", null]}', '{"a": 1}', 'EVE', '[2999-01-01,)', 'Infinity'),
      (8, 'EVE', 'EVE', 'eve@x.org', 99, 'acme', 'TWO', 'draft', 'Open', 'Public', null, null, null, '2001-01-01', '2999-01-01', null,
       '{null}', '{null}', '{acme}', '{null}', 5, 2, 4, 2, 'ünï 🦀', 'ü', '/acme/ü', '{"level": 2, "public": null}', '{"public": true}', 'ANN', '[2001-01-01,)', 2),
      (9, 'EVE', '', '', 2, '', 'ONE', 'review', '', '', true, false, '2020-01-01', null, '2999-01-01', '2999-01-01',
       '{EVE,ANN}', '{BOB,ANN}', '{{a,news},{c,acme}}', '{4,2}', 1000000, 1, 32767, 1, '%', '_', '/', '1', '1', 'BOB', '[,]', 0.1),
      (10, 'ANN', 'ANN ', 'x@notacme.org', 3, 'Acme', 'ONE', 'published', 'open ', 'public', false, false, null, '2001-01-01', '2999-01-01', '2001-01-01',
       '{BOB,CID,EVE}', '{viewer}', '{News}', '{1,3}', 10.00, 7, -32768, 3, '"quoted" \ back', 'A-10', '/acme/a/b', '{"owner": "ANN", "org": "acme", "a": {"b": [1, {"c": "x"}]}}', '{"public": "yes"}', 'ANN', '[2001-01-01,2999-01-01)', 3),
      (11, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null,
       null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null),
      (12, 'BOB', 'BOB', 'bob@ACME.org', 1, 'acme', 'TWO', 'archived', 'closed', 'team', true, true, '2020-01-01', '2999-01-01', '2001-01-01', '2020-02-02',
       '{ANN,BOB,CID,EVE}', '{ann@acme.org}', '{acme,beta}', '{1,2,3,4}', 0.01, -1, 2, 5, 'Hello World', 'C-1', '/acme/c', '{"tags": ["acme"], "level": 9}', '{"public": null}', 'EVE', '[2001-01-01,2010-01-01)', -0.0);
    update items set flag = case when published then 'Y' else 'no' end, mail = email, ids = team_ids, "userId" = owner, "group" = org;"#;

/// Who asks: two of one organisation, one of another, one whose token says nothing, one whose token says it oddly, and
/// a client that is not signed in.
const READERS: &[&str] = &[
    r#"{"exp": 4000000000, "role": "authenticated", "aud": "authenticated", "sub": "ANN", "email": "ann@acme.org", "phone": "", "aal": "aal2",
        "amr": [{"method": "password", "timestamp": 1700000000}, {"method": "totp", "timestamp": 1700000001}],
        "is_anonymous": false, "email_verified": true, "user_role": "admin", "limit": 1.5, "level": 3, "state": "published", "admin": true, "tenant_id": "ONE",
        "org": "acme", "org_id": "acme", "orgs": ["acme", "O'Dd & Co"], "teams": [1, 2], "ids": ["ANN", "BOB"], "scope": "items:read items:write",
        "groups": ["admin", "editor"], "permissions": ["items.read", "items.write"], "amr_methods": ["password", "totp"],
        "app_metadata": {"provider": "email", "providers": ["email"], "org": "acme", "role": "admin", "roles": ["admin", "editor"],
          "teams": [1, 2], "team_ids": ["1", "2"], "team": 1, "tenant": "ONE", "tenants": ["ONE"], "level": 5, "plan": "pro", "admin": true},
        "user_metadata": {"name": "Ann", "org": "acme", "plan": "pro", "over_18": true, "hidden": ["spam"]},
        "https://example.org/claims": {"org": "acme", "roles": ["admin"]}, "o": {"id": "acme", "rol": "admin"}}"#,
    r#"{"exp": 4000000000, "role": "authenticated", "aud": "authenticated", "sub": "BOB", "email": "bob@acme.org", "aal": "aal1", "amr": [{"method": "otp"}],
        "is_anonymous": false, "email_verified": false, "user_role": "editor", "limit": 99.99, "level": 2, "state": "review", "flag": "Y", "admin": false, "tenant_id": "ONE",
        "org": "acme", "org_id": "acme", "orgs": ["acme"], "teams": [1], "ids": ["BOB"], "scope": "items:read", "groups": ["editor"],
        "permissions": ["items.read"], "amr_methods": ["otp"],
        "app_metadata": {"provider": "google", "providers": ["google", "email"], "org": "acme", "role": "editor", "roles": ["editor"],
          "teams": [1], "team_ids": ["1"], "team": 1, "tenant": "ONE", "tenants": ["ONE", "TWO"], "level": 2, "plan": "free", "admin": false},
        "user_metadata": {"name": "Bob", "org": "beta", "plan": "free"}, "https://example.org/claims": {"org": "acme", "roles": []}}"#,
    r#"{"exp": 4000000000, "role": "authenticated", "aud": "authenticated", "sub": "CID", "email": "cid@beta.io", "aal": "aal2", "amr": [{"method": "totp"}],
        "is_anonymous": false, "user_role": "viewer", "level": 1, "tenant_id": "TWO", "org": "beta", "org_id": "beta", "orgs": ["beta"],
        "teams": [3], "ids": ["CID"], "scope": "", "groups": [], "permissions": [], "amr_methods": ["totp"],
        "app_metadata": {"provider": "github", "providers": ["github"], "org": "beta", "role": "viewer", "roles": ["viewer"],
          "teams": [3], "team_ids": ["3"], "team": 3, "tenant": "TWO", "tenants": ["TWO"], "level": 1, "plan": "free"},
        "user_metadata": {"name": "Cid", "org": "beta"}, "o": {"id": "beta", "rol": "member"}}"#,
    r#"{"exp": 4000000000, "role": "authenticated", "sub": "EVE"}"#,
    r#"{"exp": 4000000000, "role": "authenticated", "sub": "0B000000-0000-4000-8000-00000000000B", "email": "", "aal": null, "amr": [], "is_anonymous": true,
        "user_role": "", "level": "7", "admin": "false", "tenant_id": "", "org": null, "org_id": "Acme", "orgs": [], "teams": [], "ids": [],
        "groups": ["public", "null"], "app_metadata": {"org": "O'Dd & Co", "role": null, "roles": [], "teams": [], "team_ids": [], "level": "1"},
        "user_metadata": {}, "o": null}"#,
    r#"{"exp": 4000000000, "role": "anon"}"#,
];

fn named(text: &str) -> String {
    let names = [("ANN", ANN), ("BOB", BOB), ("CID", CID), ("EVE", EVE), ("ONE", ONE), ("TWO", TWO)];
    names.iter().fold(text.to_owned(), |text, (name, id)| text.replace(name, id))
}

/// Every case holds: the relay shows what the table shows, decides it that way, and asks as little as the way promises.
pub async fn all_hold(cases: &str) {
    all_hold_with("", cases).await;
}

/// The same after more SQL.
pub async fn all_hold_with(more: &str, cases: &str) {
    let ways = Ways::new(&format!("{SCHEMA}{}{more}", named(ROWS))).await;
    let readers: Vec<Value> =
        READERS.iter().map(|claims| serde_json::from_str(&named(claims)).unwrap()).collect();
    let mut found = Vec::new();
    for case in each(cases) {
        let Case { way, name, policies } = &case;
        let drop_all = "do $$ declare p record; begin
            for p in select polname from pg_policy where polrelid = 'items'::regclass loop
              execute format('drop policy %I on items', p.polname);
            end loop; end $$;";
        ways.database.run(&format!("{drop_all}{policies}")).await;
        let compared = Box::pin(ways.compare("items", &readers)).await;
        let mut say = |what: String| found.push(format!("{name}: {what}\n    {policies}"));
        compared.wrong.into_iter().for_each(&mut say);
        if compared.plan.kind.name() != way {
            say(format!("{}, not {way}: {:?}", compared.plan.kind.name(), compared.plan.obstacles));
        }
        let most = match compared.plan.kind {
            PlanKind::Compiled => 0,
            // Once for each of the two roles.
            PlanKind::Inverted => 2 * compared.plan.queries.len(),
            PlanKind::PerIdentity => readers.len(),
        };
        // A question that a busy machine gave up is asked in another way; the next time it is not.
        if compared.statements > most {
            let again = Box::pin(ways.compare("items", &readers)).await;
            again.wrong.into_iter().for_each(&mut say);
            if again.statements > most {
                say(format!(
                    "{} and {} statements, {most} are enough",
                    compared.statements, again.statements
                ));
            }
        }
        // A case that shows nothing, or everything, to every reader could not tell right from wrong.
        if !name.contains("nothing") && compared.yes == 0
            || !name.contains("everything") && compared.yes == compared.answers
        {
            say(format!("shows {} of {}", compared.yes, compared.answers));
        }
    }
    assert!(found.is_empty(), "{}\n{} findings", found.join("\n"), found.len());
}

struct Case {
    way: String,
    name: String,
    policies: String,
}

fn each(cases: &str) -> impl Iterator<Item = Case> {
    let mut joined: Vec<String> = Vec::new();
    for line in cases.lines().filter(|line| !line.trim().is_empty()) {
        match (line.starts_with(' '), joined.last_mut()) {
            (true, Some(last)) => *last += &format!(" {}", line.trim()),
            _ => joined.push(line.to_owned()),
        }
    }
    joined.into_iter().map(|line| {
        let (head, sql) = line.split_once(" | ").unwrap_or_else(|| panic!("no policy: {line}"));
        let (way, name) = head.split_once(": ").unwrap_or_else(|| panic!("no way: {line}"));
        let way = way.split_once(" (").map_or(way, |(way, _)| way);
        let policies = match sql.starts_with("create policy") {
            true => sql.to_owned(),
            false => format!("create policy p on items for select using ({sql})"),
        };
        Case { way: way.to_owned(), name: name.to_owned(), policies }
    })
}

/// The promise about policies as people write them, counted over all cases.
#[test]
fn at_least_nine_in_ten_policies_are_not_decided_one_by_one() {
    let files = [
        include_str!("policy_patterns.rs"),
        include_str!("policy_patterns_claims.rs"),
        include_str!("policy_patterns_members.rs"),
        include_str!("policy_patterns_mixed.rs"),
        include_str!("policy_patterns_odd.rs"),
        include_str!("policy_patterns_rows.rs"),
    ];
    let lines = || files.iter().flat_map(|file| file.lines());
    let of = |way: &str| lines().filter(|line| line.starts_with(way)).count();
    let (cheap, dear) = (of("compiled: ") + of("inverted: "), of("one by one"));
    assert!(cheap + dear >= 600, "{cheap} and {dear} cases");
    assert!(cheap >= 9 * dear, "{dear} of {} one by one", cheap + dear);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_owns_a_row() {
    all_hold(OWNERS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_helpers_that_look_at_single_settings_first() {
    all_hold_with(
        "create or replace function auth.uid() returns uuid language sql stable as $$
           select coalesce(nullif(current_setting('request.jwt.claim.sub', true), ''),
             (nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'))::uuid $$;
         create or replace function auth.role() returns text language sql stable as $$
           select coalesce(nullif(current_setting('request.jwt.claim.role', true), ''),
             (nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'role'))::text $$;
         create or replace function auth.email() returns text language sql stable as $$
           select coalesce(nullif(current_setting('request.jwt.claim.email', true), ''),
             (nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'email'))::text $$;
         create or replace function auth.jwt() returns jsonb language sql stable as $$
           select coalesce(nullif(current_setting('request.jwt.claim', true), ''),
             nullif(current_setting('request.jwt.claims', true), ''))::jsonb $$;",
        HELPERS,
    )
    .await;
}

const HELPERS: &str = r#"
compiled: the owner | owner = auth.uid()
compiled: the owner, asked once | (select auth.uid()) = owner
compiled: the owner as text | auth.uid()::text = author
compiled: the subject | owner::text = auth.jwt() ->> 'sub'
compiled: the email | email = auth.email()
compiled: one's organisation | org = auth.jwt() -> 'app_metadata' ->> 'org'
compiled: one's tenant | tenant = (auth.jwt() -> 'app_metadata' ->> 'tenant')::uuid
compiled: a flag | coalesce((auth.jwt() ->> 'admin')::boolean, false)
compiled: who is signed in | auth.uid() is not null and auth.role() = 'authenticated'
compiled: one of the readers | auth.uid() = any (members) or auth.email() = any (readers)
compiled: one of one's organisations | org in (select jsonb_array_elements_text(auth.jwt() -> 'orgs'))
inverted: a member | exists (select 1 from members m where m.team = items.team and m.person = auth.uid())
inverted: shared by email | id in (select item from shares where email = auth.email())
inverted: the owner in a document | doc ->> 'owner' = auth.uid()::text
"#;

const OWNERS: &str = r#"
compiled: the owner | owner = auth.uid()
compiled: the owner, other way round | auth.uid() = owner
compiled: the owner, asked once | (select auth.uid()) = owner
compiled: the owner, asked once, other way round | owner = (select auth.uid())
compiled: the owner, asked once, with a name | owner = (select auth.uid() as uid)
compiled: the owner, who is signed in | auth.uid() is not null and auth.uid() = owner
compiled: the owner, who is signed in, asked once | (select auth.uid()) is not null and (select auth.uid()) = owner
compiled: the owner by the role | auth.role() = 'authenticated' and owner = auth.uid()
compiled: the owner as text | auth.uid()::text = author
compiled: the owner as text, asked once | (select auth.uid())::text = author
compiled: the owner as text within | (select auth.uid()::text) = author
compiled: both as text | owner::text = auth.uid()::text
compiled: cast with words | cast(owner as text) = cast(auth.uid() as text)
compiled: the subject | owner::text = auth.jwt() ->> 'sub'
compiled: the subject, asked once | (select auth.jwt() ->> 'sub') = author
compiled: the subject within | ((select auth.jwt()) ->> 'sub') = owner::text
compiled: the subject as uuid | owner = (auth.jwt() ->> 'sub')::uuid
compiled: the subject as uuid, asked once | owner = (select (auth.jwt() ->> 'sub')::uuid)
compiled: the subject of another provider | (select auth.jwt() ->> 'sub') = (author)::text
compiled: the setting as json | author = current_setting('request.jwt.claims', true)::json ->> 'sub'
compiled: the setting as json, asked once | author = (select current_setting('request.jwt.claims', true)::json ->> 'sub')
compiled: the setting as jsonb | author = current_setting('request.jwt.claims', true)::jsonb ->> 'sub'
compiled: the setting as json and uuid | owner = (current_setting('request.jwt.claims', true)::json ->> 'sub')::uuid
compiled: the setting, empty or not | owner = (nullif(current_setting('request.jwt.claims', true), '')::json ->> 'sub')::uuid
compiled: the setting must be there | author = current_setting('request.jwt.claims')::json ->> 'sub'
compiled: the claim's setting | author = current_setting('request.jwt.claim.sub', true)
compiled: the claim's setting as uuid | owner = nullif(current_setting('request.jwt.claim.sub', true), '')::uuid
compiled: the claim's setting, asked once | owner = (select nullif(current_setting('request.jwt.claim.sub', true), '')::uuid)
compiled: either setting | owner = coalesce(nullif(current_setting('request.jwt.claim.sub', true), ''),
  nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub')::uuid
compiled: the claim's setting as text | owner::text = current_setting('request.jwt.claim.sub', true)
compiled: a function of one's own for the setting | owner = me()
compiled: the same, asked once | owner = (select me())
compiled: the email | email = auth.email()
compiled: the email, asked once | email = (select auth.email())
compiled: the email in the token | email = auth.jwt() ->> 'email'
compiled: the email of the setting | email = current_setting('request.jwt.claims', true)::json ->> 'email'
compiled: the email, if there is one | auth.jwt() ->> 'email' <> '' and email = auth.jwt() ->> 'email'
inverted: the email in any case | lower(email) = auth.email()
inverted: the email in any case on both sides | lower(email) = lower(auth.jwt() ->> 'email')
compiled: the owner or whom it is assigned to | owner = auth.uid() or assignee = auth.uid()
compiled: either of them, as a list | auth.uid() in (owner, assignee)
compiled: either of them, as an array | auth.uid() = any (array[owner, assignee])
compiled: the owner, or everybody where there is none | owner is null or owner = auth.uid()
compiled: the one or the other | coalesce(assignee, owner) = auth.uid()
compiled: anybody but the owner | owner <> auth.uid()
compiled: anybody but the owner, null included | owner is distinct from auth.uid()
compiled: the owner, null like null | owner is not distinct from auth.uid()
compiled: not the owner | not (owner = auth.uid())
compiled: the owner while it is not deleted | auth.uid() = owner and deleted_at is null
compiled: one certain person | auth.uid() = '0a000000-0000-4000-8000-00000000000a'
compiled: certain people | auth.uid() in ('0a000000-0000-4000-8000-00000000000a', '0b000000-0000-4000-8000-00000000000b')
compiled: certain people, by name | auth.jwt() ->> 'email' in ('ann@acme.org', 'cid@beta.io') and published
compiled: who is signed in | auth.uid() is not null
compiled: who is signed in, by the role | auth.role() = 'authenticated'
compiled: who is signed in, asked once | (select auth.role()) = 'authenticated'
compiled: who is signed in, by the claim | auth.jwt() ->> 'role' = 'authenticated'
compiled: who is signed in, by the setting | current_setting('request.jwt.claim.role', true) = 'authenticated'
compiled: who is not signed in | auth.uid() is null and published
compiled: signed in or public | auth.role() = 'authenticated' or published
compiled: roles in a list | auth.role() in ('authenticated', 'service_role')
inverted: the role by its name in the database | current_user = 'authenticated'
compiled: the service only, and so nothing | auth.role() = 'service_role'
compiled: everything | true
compiled: nothing | false
inverted: the first part of a path | split_part(path, '/', 2) = org and auth.uid() is not null
inverted: a folder of one's own | (string_to_array(path, '/'))[2] = auth.jwt() ->> 'org'
inverted: a folder by the function | split_part(path, '/', 2) = (select auth.jwt() ->> 'org')
inverted: the owner in a document | doc ->> 'owner' = auth.uid()::text
inverted: the owner in a document as uuid | (doc ->> 'owner')::uuid = auth.uid()
inverted: the owner in a document, asked once | (select auth.uid())::text = doc ->> 'owner'
inverted: the owner in a document, by path | doc #>> '{owner}' = (select auth.jwt() ->> 'sub')
compiled: a column in mixed case | "userId" = auth.uid()
compiled: a column in mixed case, asked once | (select auth.uid()) = "userId" and "group" is not null
compiled: a column named like a word of SQL | "group" = auth.jwt() ->> 'org'
compiled: with a table's name and quotes | "items"."userId" = auth.uid() or items."group" = 'beta'
compiled: written as rows | (owner, team) = (auth.uid(), 1)
compiled: either of two pairs | (owner, team) in ((auth.uid(), 1), (auth.uid(), 2))
compiled: whether it is as the claim says | published = (auth.jwt() ->> 'admin')::boolean
compiled: whether two flags agree | published = archived
compiled: a state of the token | status::text = auth.jwt() ->> 'state'
one by one (the claim is cast to a type of the user's): a state of the token, cast | status = (auth.jwt() ->> 'state')::status
inverted: a short text with blanks | flag = 'Y' and auth.uid() is not null
inverted: a short text of the token | flag = auth.jwt() ->> 'flag'
inverted: an email of a type of its own | mail = auth.email()
compiled: a condition that is true | (owner = auth.uid()) = true
compiled: either, not both | (owner = auth.uid()) <> published
inverted: a collation of one's own | email collate "C" = auth.email()
compiled: a number among large ones | (auth.jwt() -> 'app_metadata' ->> 'team')::bigint = any (ids)
inverted: a sub-select without a table | exists (select 1 where owner = auth.uid())
"#;
