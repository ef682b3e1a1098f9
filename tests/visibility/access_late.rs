//! A late reader gets what the rules of now allow, and a gap in place of what was written before they were widened;
//! a live reader gets what PostgreSQL shows right after the commit. Rules and rows change at random.
#![allow(clippy::print_stdout, reason = "the seed repeats a run")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;

use crate::support::client::Client;
use crate::support::dice::Dice;
use crate::support::http::get;
use crate::support::stage::Stage;
use crate::support::{PATIENCE, token};

/// A table `T` that the role `R` reads, and a group `G`.
const MADE: &str = "create role $DB_r; create role $DB_g; create table t (id int primary key, team int);
    alter table t enable row level security; select relay.watch('t');";

/// A statement that lets a reader see more, and what it needs before; `R` and `G` are roles.
const WIDENINGS: &[(&str, &str)] = &[
    ("grant select on t to R", "create policy p on t using (true)"),
    ("grant select (id) on t to R", "create policy p on t using (true)"),
    ("grant select on t to public", "create policy p on t using (true)"),
    ("create policy p on t using (true)", "grant select on t to R"),
    ("alter policy p on t using (true)", "grant select on t to R; create policy p on t using (false)"),
    ("alter policy p on t to R", "grant select on t to R; create policy p on t to G using (true)"),
    (
        "drop policy r on t",
        "grant select on t to R; create policy p on t using (true); create policy r on t as restrictive using (false)",
    ),
    ("alter table t disable row level security", "grant select on t to R"),
    ("alter table t owner to R", "grant select on t to R"),
    (
        "create or replace function f() returns bool language sql stable as 'select true'",
        "grant select on t to R; create function f() returns bool language sql stable as 'select false';
         create policy p on t using (f())",
    ),
    (
        "set session_replication_role = replica; alter policy p on t using (true); reset session_replication_role",
        "grant select on t to R; create policy p on t using (false)",
    ),
    ("grant G to R", "grant select on t to R; create policy p on t to G using (true)"),
    ("grant G to R", "grant select on t to G; create policy p on t using (true)"),
    (
        "grant G to R_more",
        "grant select on t to R; create policy p on t to G using (true); create role R_more; grant R_more to R",
    ),
    ("alter role R bypassrls", "grant select on t to R"),
    // Since PostgreSQL 16 each membership says so itself.
    (
        "do $$ begin
           if current_setting('server_version_num')::int < 160000 then alter role R inherit;
           else execute 'grant G to R with inherit true'; end if;
         end $$",
        "grant select on t to R; create policy p on t to G using (true); alter role R noinherit; grant G to R",
    ),
    (
        "alter database $DB owner to R",
        "grant select on t to R; create policy p on t to pg_database_owner using (true)",
    ),
];

/// What widens nothing for anybody.
const OTHERS: &[&str] = &[
    "revoke select on t from G",
    "create index on t (team)",
    "comment on table t is 'x'",
    "alter table t enable row level security",
    "drop policy more on t",
    "create policy less on t as restrictive using (id > 0)",
    "create table other (id int); grant select on other to R",
    "create role R_more",
];

fn named(sql: &str) -> String {
    let words = sql.split_inclusive(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let name = |word: &str| {
        let end = word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric() && c != '_').len();
        let (word, rest) = word.split_at(end);
        let word = match word {
            "R" | "G" | "R_more" => format!("$DB_{}", word.to_lowercase()),
            other => other.to_owned(),
        };
        word + rest
    };
    words.map(name).collect()
}

fn reader(stage: &Stage) -> String {
    token(&format!("{}_r", stage.name), None, json!({}))
}

async fn poll(stage: &Stage, since: &str) -> (u16, BTreeSet<i64>, String) {
    let path = format!("/realtime/v1/changes?table=t&wait=0&since={since}&apikey={}", reader(stage));
    let answer = get(stage.relay.address, &path, "").await;
    let ids = answer.body["changes"].as_array().into_iter().flatten();
    let ids = ids.map(|change| change["record"]["id"].as_i64().unwrap()).collect();
    (answer.status, ids, answer.body["cursor"].as_str().unwrap_or_default().to_owned())
}

async fn cursor(stage: &Stage) -> String {
    stage.database.value("select relay.cursor()").await
}

/// What the table shows to `R` now.
async fn shown(stage: &Stage) -> BTreeSet<i64> {
    let role = format!("{}_r", stage.name);
    stage.database.client.batch_execute(&format!("begin; set local role \"{role}\"")).await.unwrap();
    let rows = stage.database.client.query("select id::bigint from t", &[]).await;
    stage.database.client.batch_execute("rollback").await.unwrap();
    rows.map(|rows| rows.iter().map(|row| row.get(0)).collect()).unwrap_or_default()
}

/// The ids that the client is told up to now, and whether of a gap.
async fn told(stage: &Stage, client: &mut Client) -> (BTreeSet<i64>, bool) {
    let marker: i64 =
        stage.database.value("insert into marker default values returning id").await.parse().unwrap();
    let (mut ids, mut gap, mut heard) = (BTreeSet::new(), false, Vec::new());
    loop {
        let frame = client
            .frame_within(PATIENCE)
            .await
            .unwrap_or_else(|| panic!("after {ids:?}, gap {gap}: {heard:?}"));
        let data = &frame[4]["data"];
        if frame[3] == "system" {
            heard.push(frame[4]["message"].to_string());
            gap |= frame[4]["message"].as_str().is_some_and(|message| message.starts_with("Gap"));
        } else if frame[3] == "postgres_changes" && data["table"] == "marker" {
            if data["record"]["id"] == marker {
                return (ids, gap);
            }
        } else if frame[3] == "postgres_changes" {
            ids.insert(data["record"]["id"].as_i64().unwrap());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_older_than_a_widening_is_a_gap_for_cursors_from_before_it_and_for_no_others() {
    for (widening, made) in WIDENINGS {
        let stage = Stage::new(&format!("{MADE} {}", named(made))).await;
        let mut live = stage.join(&reader(&stage)).await;
        let before = cursor(&stage).await;
        stage.run("insert into t values (1, 1)").await;
        assert_eq!(told(&stage, &mut live).await, (BTreeSet::new(), false), "{widening}");
        let between = cursor(&stage).await;
        stage.run(&named(widening)).await;
        let after = cursor(&stage).await;
        stage.run("insert into t values (2, 1)").await;
        assert_eq!(shown(&stage).await, BTreeSet::from([1, 2]), "{widening}");
        assert_eq!(told(&stage, &mut live).await, (BTreeSet::from([2]), false), "live: {widening}");
        let late = poll(&stage, &before).await;
        assert_eq!(late.0, 410, "{widening}: {late:?}");
        for since in [&between, &after] {
            let late = poll(&stage, since).await;
            assert_eq!((late.0, late.1), (200, BTreeSet::from([2])), "{widening}");
        }
        // In one transaction with the rule it is as PostgreSQL shows it after the commit.
        let stage = Stage::new(&format!("{MADE} {}", named(made))).await;
        let mut live = stage.join(&reader(&stage)).await;
        let before = cursor(&stage).await;
        stage
            .run(&format!(
                "begin; insert into t values (1, 1); {}; insert into t values (2, 1); commit",
                named(widening)
            ))
            .await;
        let got = told(&stage, &mut live).await;
        assert_eq!(got, (BTreeSet::from([1, 2]), false), "in one: {widening}");
        let late = poll(&stage, &before).await;
        assert_eq!((late.0, late.1), (200, BTreeSet::from([1, 2])), "in one: {widening}");
    }
}

/// Once with each change in a transaction of its own, of which the relay reads several at once, and for another role.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_older_than_a_widening_in_the_same_page_is_a_gap_for_those_whom_it_concerns() {
    for (widening, made) in WIDENINGS {
        let stage = Stage::new(&format!("{MADE} {}", named(made))).await;
        let mut live = stage.join(&reader(&stage)).await;
        told(&stage, &mut live).await;
        // The page waits here: it reads the empty parent of the segments, too, which nothing writes to.
        let holds = stage.database.connect().await;
        let lock = "begin; lock table only relay.log in access exclusive mode";
        holds.batch_execute(lock).await.unwrap();
        for sql in ["insert into t values (1, 1)", &named(widening), "insert into t values (2, 1)"] {
            stage.run(sql).await;
        }
        holds.batch_execute("rollback").await.unwrap();
        assert_eq!(told(&stage, &mut live).await, (BTreeSet::from([2]), true), "{widening}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_is_widened_is_a_gap_for_its_own_late_readers_alone() {
    for widening in ["grant G to R", "alter role R bypassrls", "revoke G from R; grant G to R"] {
        let made = "create role $DB_h; grant select on t to R, $DB_h; create policy p on t using (true)";
        let stage = Stage::new(&format!("{MADE} {}", named(made))).await;
        let before = cursor(&stage).await;
        stage.run("insert into t values (1, 1)").await;
        stage.run(&named(widening)).await;
        assert_eq!(poll(&stage, &before).await.0, 410, "{widening}");
        let path = format!("/realtime/v1/changes?table=t&wait=0&since={before}&apikey=");
        let other = token(&format!("{}_h", stage.name), None, json!({}));
        let answer = get(stage.relay.address, &format!("{path}{other}"), "").await;
        assert_eq!(answer.status, 200, "{widening}: {answer:?}");
        assert_eq!(answer.body["changes"][0]["record"]["id"], 1, "{widening}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_widens_nothing_is_no_gap_for_anybody() {
    let stage = Stage::new(&format!(
        "{MADE} {}",
        named(
            "grant select on t to R, G; create policy p on t using (true); create policy more on t using (id > 5)"
        )
    ))
    .await;
    let mut live = stage.join(&reader(&stage)).await;
    let before = cursor(&stage).await;
    for (id, other) in OTHERS.iter().enumerate() {
        stage.run(&format!("insert into t values ({id} + 1, 1); {}", named(other))).await;
        // The feed has come so far.
        told(&stage, &mut live).await;
        let late = poll(&stage, &before).await;
        let all = (1..=i64::try_from(id).unwrap() + 1).collect();
        assert_eq!((late.0, late.1), (200, all), "{other}");
    }
}

/// Changes of the rules; `K` is a number of a team.
const CHANGES: &[&str] = &[
    "grant select on t to R",
    "grant select (id, team) on t to R",
    "revoke select on t from R",
    "alter table t disable row level security",
    "alter table t enable row level security",
    "drop policy if exists p on t; create policy p on t using (team = K)",
    "drop policy if exists p on t; create policy p on t using (lower('X') = 'x' and team >= K)",
    "drop policy if exists p on t",
    "drop policy if exists g on t; create policy g on t to G using (team <> K)",
    "drop policy if exists r on t; create policy r on t as restrictive using (team <> K)",
    "drop policy if exists r on t; create policy r on t as restrictive to G using (team = K)",
    "drop policy if exists r on t",
    "set session_replication_role = replica; drop policy if exists p on t; reset session_replication_role",
];

#[tokio::test(flavor = "multi_thread")]
async fn random_changes_of_rules_between_random_changes_of_rows_show_no_reader_more_than_the_rules_allow() {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
    let seed: u64 = std::env::var("RELAY_TEST_SEED")
        .map_or_else(|_| u64::try_from(now() % 1_000_000).unwrap() + 1, |seed| seed.parse().unwrap());
    println!("RELAY_TEST_SEED={seed}");
    let mut dice = Dice(seed);
    let stage = Stage::new(&format!(
        "{MADE} {}",
        named("grant select on t to R; create policy p on t using (team = 1)")
    ))
    .await;
    let mut live = stage.join(&reader(&stage)).await;
    let mut since = cursor(&stage).await;
    // Of each row that the late reader has not come to: whether it was shown right after its commit.
    let mut missed: BTreeMap<i64, bool> = BTreeMap::new();
    let (mut id, mut script, mut exact) = (0, String::new(), [0, 0]);
    for step in 0..120 {
        let mut parts = Vec::new();
        let mut written = BTreeSet::new();
        for _ in 0..=dice.below(3) {
            let at = usize::try_from(dice.below(u64::try_from(2 * CHANGES.len()).unwrap())).unwrap();
            match CHANGES.get(at) {
                Some(change) => parts.push(named(&change.replace('K', &dice.below(3).to_string()))),
                None => {
                    id += 1;
                    written.insert(id);
                    parts.push(format!("insert into t values ({id}, {})", dice.below(3)));
                }
            }
        }
        let transaction = format!("begin; {}; commit", parts.join("; "));
        script += &format!("{transaction}\n");
        stage.run(&transaction).await;
        let visible = shown(&stage).await;
        let expected: BTreeSet<i64> = written.intersection(&visible).copied().collect();
        let (ids, gap) = told(&stage, &mut live).await;
        let context = format!("RELAY_TEST_SEED={seed}, step {step}\n{script}");
        assert!(ids.is_subset(&expected), "live: {ids:?}, PostgreSQL shows {expected:?}\n{context}");
        assert!(gap || ids == expected, "live: only {ids:?} of {expected:?}\n{context}");
        exact[0] += usize::from(!gap && !ids.is_empty());
        missed.extend(written.iter().map(|id| (*id, visible.contains(id))));
        if dice.below(4) > 0 {
            continue;
        }
        let (status, ids, cursor_after) = poll(&stage, &since).await;
        let may: BTreeSet<i64> =
            missed.iter().filter(|(id, shown)| **shown && visible.contains(id)).map(|(id, _)| *id).collect();
        assert!(ids.is_subset(&may), "late: {ids:?}, but only {may:?} may be told\n{context}");
        match status {
            200 => {
                assert_eq!(ids, may, "late\n{context}");
                exact[1] += usize::from(!ids.is_empty());
                since = cursor_after;
                missed.clear();
            }
            410 => {
                since = cursor(&stage).await;
                missed.clear();
            }
            // It may read nothing of it now.
            _ => {}
        }
    }
    assert!(exact[0] > 0 && exact[1] > 0, "{exact:?} RELAY_TEST_SEED={seed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_to_execute_a_function_widens_what_policies_show_that_call_it_directly_or_not() {
    let stage = Stage::new(
        "create table t (id int primary key); alter table t enable row level security; select relay.watch('t');
         create function within() returns bool language sql stable as 'select true';
         create function called() returns bool language sql stable as 'select within()';
         create function unused() returns bool language sql stable as 'select true';
         revoke execute on function within(), called(), unused() from public;
         create policy p on t using (called())",
    )
    .await;
    let widenings =
        async || stage.database.value("select count(*) from relay.widenings").await.parse::<i64>().unwrap();
    for (sql, more) in [
        ("grant execute on function called() to authenticated", true),
        ("grant execute on function within() to authenticated, anon", true),
        ("grant execute on function unused() to authenticated", false),
        ("revoke execute on function called() from authenticated", false),
        ("grant execute on function called() to public", true),
    ] {
        let before = widenings().await;
        stage.run(sql).await;
        assert_eq!(widenings().await > before, more, "{sql}");
    }
}
