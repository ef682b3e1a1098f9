//! Generated tables, policies, rows and claims: what arrives is what PostgreSQL itself would show of the real table.
//!
//! A failure names its seed; `RELAY_TEST_SEED=…` plays it again.

use std::collections::BTreeSet;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::support::stage::Stage;
use crate::support::token;

/// Conditions of policies; `N` becomes a small number, `S` one of [`TEXTS`].
const CONDITIONS: &[&str] = &[
    "true",
    "owner = (select auth.jwt() ->> 'sub')",
    "owner = current_setting('request.jwt.claims', true)::json ->> 'sub'",
    "owner is distinct from auth.jwt() ->> 'sub'",
    "a = N",
    "a < N or a > 2 * N",
    "a is null",
    "not (a = N)",
    "coalesce(a, N) % 2 = 0",
    "a in (N, N + 1, null)",
    "a not in (N, N + 1, null)",
    "10 / a > N",
    "(auth.jwt() ->> 'level')::int >= a",
    "auth.jwt() -> 'tags' ? c",
    "b",
    "not b",
    "b is not true",
    "c = S",
    "c > S",
    "c like '%''%' or c ~* '[a-z]{2}'",
    "length(c) > N",
    "c = any (tags)",
    "tags @> array[owner]",
    "cardinality(tags) = N",
    "price between N and N + 1.5",
    "at > timestamptz '2026-01-01 00:00:00+00' + make_interval(hours => N)",
    "doc ->> 'k' = S",
    "doc @> '{\"k\": 1}'",
    "mood >= 'fine'",
    "id_text::uuid is not null",
    "to_jsonb(t) ->> 'c' = S",
    "t is not null",
    "exists (select from teams m where m.team = t.a and m.sub = auth.jwt() ->> 'sub')",
    "a in (select team from teams where sub = auth.jwt() ->> 'sub')",
    "owner = (select m.sub from teams m where m.team = t.a)",
    "case when b then a > N else c is not null end",
    "a = any (array(select team from teams where sub = auth.jwt() ->> 'sub'))",
    "owner = (select p.sub from people p where p.id = t.a)",
    "(select p.sub from people p where p.id = t.a) = auth.jwt() ->> 'sub'",
    "exists (select from teams m where m.team = t.a and (m.sub = auth.jwt() ->> 'sub' or m.sub = t.owner))",
    "a not in (select team from teams where sub = auth.jwt() ->> 'sub')",
    "private.is_member(a)",
    "not private.is_member(a)",
    "private.knows(a, owner)",
    "a in (select private.teams_of(auth.jwt() ->> 'sub'))",
    "a in (select private.teams_of(owner))",
    "a = any (private.team_ids())",
    "private.name_of(a) = owner",
    "private.level() >= a",
    "(select private.is_known())",
    "own_team(a)",
    "own_team(a) or private.is_member(N)",
    "id % (N + 1) = 0",
];

/// Quoted as SQL.
const TEXTS: &[&str] =
    &["''", "'x'", "'o''dd'", "'\"quoted\" \\ back'", "'ünï 🦀'", "'null'", "'{x}'", "E'two\\nlines'"];

/// A small generator: the same seed gives the same numbers everywhere.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % bound as u64) as usize
    }

    fn one<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.below(of.len())]
    }

    /// An expression that is sometimes null.
    fn or_null(&mut self, expression: String) -> String {
        if self.below(5) == 0 { "null".to_owned() } else { expression }
    }

    fn condition(&mut self) -> String {
        let words = self.one(CONDITIONS).split_inclusive(|c: char| !c.is_ascii_alphanumeric());
        let fill = |word: &str| match word.strip_prefix(['N', 'S']).map(|rest| (word.as_bytes()[0], rest)) {
            Some((b'N', rest)) if !rest.starts_with(char::is_alphanumeric) => {
                format!("{}{rest}", self.below(4))
            }
            Some((_, rest)) if !rest.starts_with(char::is_alphanumeric) => {
                format!("{}{rest}", self.one(TEXTS))
            }
            _ => word.to_owned(),
        };
        words.map(fill).collect()
    }

    /// The values of a row after its id.
    fn row(&mut self) -> String {
        let subs = ["'ann'", "'bob'", "'o''dd'", "''"];
        let number = |numbers: &mut Self| numbers.below(5).to_string();
        let values = [
            self.one(&subs).to_owned(),
            number(self),
            self.one(&["true", "false"]).to_owned(),
            self.one(TEXTS).to_owned(),
            format!("array[{}, {}, null]", self.one(TEXTS), self.one(&subs)),
            self.one(&["0", "1.50", "2.5", "'NaN'", "1e3"]).to_owned(),
            format!("timestamptz '2026-01-01 02:00:00+01' + make_interval(hours => {})", self.below(5)),
            self.one(&["'{}'", "'{\"k\": 1}'", "'{\"k\": \"x\"}'", "'[]'", "'\"x\"'", "'17'"]).to_owned(),
            self.one(&["'bad'", "'fine'", "'good'"]).to_owned(),
            self.one(&["gen_random_uuid()::text", "'no uuid'"]).to_owned(),
        ];
        values.map(|value| self.or_null(value)).join(", ")
    }
}

/// What one subscriber sees of the real table now, row by row.
struct Seen {
    rows: BTreeSet<String>,
    /// Rows for which the table raises. PostgreSQL may raise where another policy would have decided (it tries
    /// expressions while it plans), so these may come or not; that an error itself shows nothing is tried elsewhere.
    raising: BTreeSet<String>,
}

async fn seen(stage: &Stage, table: &str, role: &str, claims: &Value) -> Seen {
    let which = |verdict: &str| {
        format!("select id from generate_series(1, 12) id where sees_{table}(id) is {verdict}")
    };
    let rows = stage.selected(role, claims, &which("true")).await.into_iter().collect();
    let raising = stage.selected(role, claims, &which("null")).await.into_iter().collect();
    Seen { rows, raising }
}

/// The ids of these changes; each must be there once and `part` is where it stands.
fn told(changes: &[Value], part: &str, seen: &Seen, context: &str) -> BTreeSet<String> {
    let mut ids = BTreeSet::new();
    for change in changes {
        let id = change[part]["id"].to_string();
        assert!(ids.insert(id.clone()), "{id} came twice\n{context}");
    }
    &ids - &seen.raising
}

#[tokio::test(flavor = "multi_thread")]
async fn what_arrives_is_what_the_table_would_show() {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed =
        std::env::var("RELAY_TEST_SEED").map_or_else(|_| now() % 1_000_000, |seed| seed.parse().unwrap());
    let stage = Stage::new(
        "create role $DB_plain; create role $DB_group; create role $DB_member; grant $DB_group to $DB_member;
         create type mood as enum ('bad', 'fine', 'good');
         create table teams (team int, sub text); alter table teams enable row level security;
         create policy own on teams using (sub = auth.jwt() ->> 'sub' or sub = 'bob');
         grant select on teams to public; grant usage on schema auth to public;
         create schema private; grant usage on schema private to public;
         create table people (id int primary key, sub text); grant select on people to public;
         insert into people values (1, 'ann'), (2, 'bob'), (3, null);
         create function private.is_member(team int) returns bool language sql stable security definer set search_path = '' as
           $$ select exists (select from public.teams t where t.team = is_member.team and t.sub = auth.jwt() ->> 'sub') $$;
         create function private.knows(int, text) returns bool language sql stable strict security definer set search_path = '' as
           $$ select exists (select from public.teams where team = $1 and sub = $2) $$;
         create function private.teams_of(who text) returns setof int language sql stable security definer set search_path = public as
           $$ select team from teams where sub = who $$;
         create function private.team_ids() returns int[] language sql stable security definer set search_path = '' as
           $$ select array_agg(team) from public.teams where sub = auth.jwt() ->> 'sub' $$;
         create function private.name_of(wanted int) returns text language sql stable security definer
           begin atomic select sub from people where id = wanted; end;
         create function private.level() returns int language sql stable return (auth.jwt() ->> 'level')::int;
         create function private.is_known() returns bool language sql stable security definer set search_path = '' as
           $$ select exists (select from public.people where sub = auth.jwt() ->> 'sub') $$;
         create function own_team(n int) returns bool language sql stable as
           $$ select exists (select from public.teams where team = n and sub = auth.jwt() ->> 'sub') $$;
         insert into teams values (1, 'ann'), (2, 'ann'), (2, 'bob'), (3, 'o''dd')",
    )
    .await;
    for round in 0..12 {
        check_round(
            &stage,
            &mut Numbers(seed + round),
            &format!("t{round}"),
            &format!("RELAY_TEST_SEED={seed}, round {round}"),
        )
        .await;
    }
}

async fn check_round(stage: &Stage, numbers: &mut Numbers, table: &str, context: &str) {
    let mut sql = format!(
        "create table {table} (id int primary key, owner text, a int, b bool, c text, tags text[], price numeric,
           at timestamptz, doc jsonb, mood mood, id_text text);
         alter table {table} replica identity full; alter table {table} enable row level security;
         grant select on {table} to public;
         create function sees_{table}(wanted int) returns bool language plpgsql stable as $$
           begin return exists (select from {table} where id = wanted); exception when others then return null; end $$;"
    );
    for n in 0..=numbers.below(3) {
        let kind = if numbers.below(4) == 0 { "restrictive" } else { "permissive" };
        let to = numbers.one(&["public", "$DB_group", "$DB_plain, $DB_group"]);
        let command = numbers.one(&["select", "select", "all", "update"]);
        let condition = numbers.condition().replace("t.", &format!("{table}."));
        let condition = condition.replace("to_jsonb(t)", &format!("to_jsonb({table})"));
        let condition = condition.replace("t is not null", &format!("{table} is not null"));
        sql +=
            &format!("create policy p{n} on {table} as {kind} for {command} to {to} using ({condition});\n");
    }
    stage.run(&format!("{sql} select relay.watch('{table}')")).await;
    let context = format!("{context}\n{sql}");

    let mut subscribers = Vec::new();
    for (role, claims) in [
        ("plain", json!({"sub": "ann", "level": 2, "tags": ["x", "o'dd"]})),
        ("member", json!({"sub": "bob", "level": "3", "tags": {"x": 1}})),
        ("member", json!({"sub": "o'dd", "level": "not a number"})),
        ("group", json!({"sub": ""})),
    ] {
        let role = format!("{}_{role}", stage.name);
        let mut claims = claims.clone();
        claims["role"] = json!(role);
        claims["exp"] = json!(4_000_000_000_u64);
        let filter = json!([{"event": "*", "schema": "public", "table": table}]);
        let client = stage.subscribe(&token(&role, None, claims.clone()), filter).await;
        subscribers.push((role, claims, client));
    }

    let rows: Vec<String> = (1..=12).map(|id| format!("({id}, {})", numbers.row())).collect();
    stage.run(&format!("insert into {table} values {}", rows.join(", "))).await;
    let mut before = Vec::new();
    for (role, claims, client) in &mut subscribers {
        let visible = seen(stage, table, role, claims).await;
        let changes = stage.changes(client).await;
        let told = told(&changes, "record", &visible, &context);
        assert_eq!(told, visible.rows, "inserts to {role} {claims}\n{context}");
        before.push(visible);
    }

    let columns = "owner, a, b, c, tags, price, at, doc, mood, id_text";
    let set: Vec<String> = (1..=12)
        .map(|id| format!("update {table} set ({columns}) = row({}) where id = {id};", numbers.row()))
        .collect();
    stage.run(&set.concat()).await;
    let mut after = Vec::new();
    for ((role, claims, client), before) in subscribers.iter_mut().zip(&before) {
        let visible = seen(stage, table, role, claims).await;
        let changes = stage.changes(client).await;
        let told = told(&changes, "record", &visible, &context);
        assert_eq!(told, visible.rows, "updates to {role} {claims}\n{context}");
        for change in &changes {
            let whole = change["old_record"].as_object().unwrap().len() > 1;
            let id = change["old_record"]["id"].to_string();
            let expected = before.rows.contains(&id) || (whole && before.raising.contains(&id));
            assert_eq!(whole, expected, "the old row {id} to {role} {claims}\n{context}");
        }
        after.push(visible);
    }

    stage.run(&format!("delete from {table}")).await;
    for ((role, claims, client), visible) in subscribers.iter_mut().zip(&after) {
        let changes = stage.changes(client).await;
        let told = told(&changes, "old_record", visible, &context);
        assert_eq!(told, visible.rows, "deletes to {role} {claims}\n{context}");
    }
}
