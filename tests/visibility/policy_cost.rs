//! What a change costs follows from who sees it, not from who is waiting: statements, rows and readers are counted.
#![allow(clippy::print_stdout, reason = "the figures are part of what is shown")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use relay::model::identity::claims::Claims;
use relay::model::policy::visibility::Identity;
use relay::postgres::connect::pool::Server;
use relay::postgres::evaluate::per_identity::{IdentityEvaluator, IdentityQuery, reading};
use serde_json::{Value, json};
use tokio_postgres::types::ToSql;

use crate::support::commands::Commands;
use crate::support::eventually;
use crate::support::ways::Ways;

const READERS: usize = 1000;
const ROWS: usize = 100;
/// Users of a team.
const TEAM: usize = 10;

fn sub(user: usize) -> String {
    format!("00000000-0000-4000-8000-{user:012x}")
}

/// A thousand users, each with a token of its own.
fn readers() -> Vec<Value> {
    let claims = |user: usize| {
        let exp = 4_000_000_000_u64 + user as u64;
        json!({"role": "authenticated", "exp": exp, "sub": sub(user), "org": format!("org {}", user % 50)})
    };
    (0..READERS).map(claims).collect()
}

/// `t` with a hundred rows of as many owners, organisations and teams, under this policy.
async fn ways(policy: &str) -> Ways {
    Ways::new(&format!(
        "create function user_id(n int) returns uuid language sql immutable as
           $$ select ('00000000-0000-4000-8000-' || lpad(to_hex(n), 12, '0'))::uuid $$;
         create function opaque(owner uuid) returns bool language plpgsql stable as
           $$ begin return owner = auth.uid(); end $$;
         create table members (team int, member uuid, primary key (team, member));
         insert into members select n / {TEAM}, user_id(n) from generate_series(0, {READERS} * 20) n; analyze members;
         grant select on members to authenticated;
         create table own (team int, member uuid, primary key (team, member)); insert into own
           select n / {TEAM}, user_id(n) from generate_series(0, {READERS} * 20) n; analyze own;
         alter table own enable row level security; create policy own on own using (member = (select auth.uid()));
         create table peers (team int, member uuid, primary key (team, member)); insert into peers
           select n / {TEAM}, user_id(n) from generate_series(0, {READERS} * 20) n;
         alter table peers enable row level security; analyze peers;
         create policy peers on peers using (team in (select o.team from own o where o.team = peers.team));
         grant select on own, peers to authenticated;
         create table t (id int primary key, owner uuid, org text, team int);
         alter table t enable row level security; create policy p on t using ({policy}); grant select on t to authenticated;
         insert into t select n, user_id(n), 'org ' || n % 50, n from generate_series(0, {ROWS} - 1) n;
         select relay.watch('t')"
    ))
    .await
}

/// How many of a thousand readers are told of a page of a hundred rows, how many were looked at, and the statements it took.
async fn counted(ways: &Ways) -> (usize, usize, usize) {
    let catalog = ways.catalog().await;
    let relation = catalog.named("public", "t").unwrap();
    let images = ways.images("t").await;
    let (seen, cost) = ways.ours(&catalog, relation, &images, &readers()).await;
    let told = seen.iter().flat_map(|seen| seen.values()).filter(|seen| **seen == Some(true)).count();
    (told, cost.candidates, cost.statements)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ownership_policy_checks_only_the_owner_without_a_query() {
    let ways = ways("owner = (select auth.uid())").await;
    assert_eq!(counted(&ways).await, (ROWS, ROWS, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_policy_checks_only_the_readers_with_the_claim_without_a_query() {
    let ways = ways("org = (auth.jwt() ->> 'org')").await;
    let of_an_org = READERS / 50;
    assert_eq!(counted(&ways).await, (ROWS * of_an_org, ROWS * of_an_org, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_membership_policy_asks_once_a_page_and_reads_the_members_of_the_rows() {
    let ways = ways("exists (select from members m where m.team = t.team and m.member = auth.uid())").await;
    let read = "select coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) from pg_stat_user_tables where relname = 'members'";
    let made = "select pg_stat_clear_snapshot()";
    let before: i64 = ways.database.value(read).await.parse().unwrap();
    assert_eq!(counted(&ways).await, (ROWS * TEAM, ROWS * TEAM, 1));
    // What a session counted is there for others when it ends.
    ways.catalog().await;
    let rows = eventually("the rows that were read are counted", || async {
        ways.database.run(made).await;
        let rows: i64 = ways.database.value(read).await.parse().unwrap();
        (rows > before).then_some(rows - before)
    })
    .await;
    assert!(rows <= 2 * (ROWS * TEAM) as i64, "{rows} members were read for {ROWS} rows of {TEAM} each");
}

#[tokio::test(flavor = "multi_thread")]
async fn row_security_of_the_membership_table_costs_no_more_statements() {
    for policy in [
        "exists (select from members m where m.team = t.team and m.member = auth.uid())",
        "exists (select from own m where m.team = t.team and m.member = auth.uid())",
        "exists (select from own where own.team = t.team)",
        "team in (select team from own)",
        "exists (select from peers p where p.team = t.team)",
    ] {
        assert_eq!(counted(&ways(policy).await).await, (ROWS * TEAM, ROWS * TEAM, 1), "{policy}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_opaque_policy_asks_once_for_each_claims_and_page() {
    let ways = ways("opaque(owner)").await;
    assert_eq!(counted(&ways).await, (ROWS, ROWS * READERS, READERS));
}

/// Judges as many images for all readers, twice; returns how long the second time took, when all statements are prepared.
async fn judged(ways: &Ways, url: &str, images: usize, between: impl Fn()) -> Duration {
    let catalog = ways.catalog().await;
    let relation = catalog.named("public", "t").unwrap();
    let images: Vec<String> = ways.images("t").await.into_values().take(images).collect();
    let evaluator =
        IdentityEvaluator::new(Server::parse(url, "relay", None).unwrap(), Duration::from_secs(30));
    let query = |claims: Value| IdentityQuery {
        identity: Identity::new(Claims::from_verified_payload(&claims.to_string()).unwrap()),
        statement: Arc::clone(relation.access("authenticated").unwrap().judge.as_ref().unwrap()),
        images: &images,
        reading: reading(relation).into(),
        with_path: true,
        topic: None,
    };
    let queries: Vec<IdentityQuery<'_>> = readers().into_iter().map(query).collect();
    evaluator.judge(&queries).await.unwrap();
    between();
    let started = Instant::now();
    let answers = evaluator.judge(&queries).await.unwrap();
    let took = started.elapsed();
    let seen = answers.iter().flat_map(|answer| &answer.allowed).filter(|seen| **seen).count();
    assert_eq!(seen, images.len(), "each row has one owner");
    took
}

/// The loop that it is compared with: claims set, the row selected by its key, for each reader, without waiting between the two.
async fn naive_loop(ways: &Ways, id: i32) -> Duration {
    let client = ways.database.connect().await;
    client.batch_execute("set role authenticated").await.unwrap();
    let set = client.prepare("select set_config('request.jwt.claims', $1, false)").await.unwrap();
    let sees = client.prepare("select exists (select from t where id = $1)").await.unwrap();
    let started = Instant::now();
    for claims in readers() {
        let claims = claims.to_string();
        let (claims, id): ([&(dyn ToSql + Sync); 1], [&(dyn ToSql + Sync); 1]) = ([&claims], [&id]);
        let (set, seen) = tokio::join!(client.query_one(&set, &claims), client.query_one(&sees, &id));
        set.and(seen).unwrap();
    }
    started.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_opaque_policy_takes_three_commands_for_each_claims_however_many_rows() {
    let ways = ways("opaque(owner)").await;
    let commands = Commands::to_server(&ways.database.url).await;
    let mut counts = [0; 2];
    for (count, images) in counts.iter_mut().zip([1, ROWS]) {
        judged(&ways, &commands.url, images, || _ = commands.take()).await;
        *count = commands.take();
    }
    let url = &ways.database.url;
    let (one, page) = (judged(&ways, url, 1, || {}).await, judged(&ways, url, ROWS, || {}).await);
    let naive = naive_loop(&ways, 0).await;
    println!(
        "{READERS} readers: one row {one:?}, {ROWS} rows {page:?}, the naive loop for one row {naive:?}"
    );
    // The naive loop takes two, and a transaction around them two more; for a page it takes a hundred times as many.
    let most = 3 * READERS + 2;
    assert!(counts.iter().all(|count| *count <= most), "{counts:?} commands, {most} are enough");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_be_told_here_narrows_whom_an_opaque_part_is_asked_for() {
    let ways = ways("org = (auth.jwt() ->> 'org') and owner = auth.uid() and opaque(owner)").await;
    assert_eq!(counted(&ways).await, (ROWS, ROWS, ROWS));
}

#[tokio::test(flavor = "multi_thread")]
async fn claims_that_no_policy_reads_split_no_cohort() {
    let ways = ways("length(org) > length(auth.jwt() ->> 'org')").await;
    let (_, _, statements) = counted(&ways).await;
    assert_eq!(
        statements, 2,
        "one for each length of an organisation's name, whatever else their tokens say"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_condition_of_the_row_alone_is_asked_once_for_all() {
    let ways = ways("length(org) = 5").await;
    assert_eq!(counted(&ways).await, (20 * READERS, ROWS * READERS, 1));
}
