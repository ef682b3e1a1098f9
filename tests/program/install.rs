//! Installing: fresh, again, many at once, as a plain owner, over an older and under a newer version.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;
use tokio_postgres::Client as Session;

use relay::postgres::connect::pool::Error;
use relay::postgres::install::{check, install};

use crate::delivery::crash::Cluster;
use crate::support::client::Client;
use crate::support::database::{Database, connect, with_database};
use crate::support::http::get;
use crate::support::relay::Relay;
use crate::support::{eventually, token};

const LEDGER: &str =
    "select string_agg(concat_ws(' ', file, checksum, version, applied_at), ';' order by file)
    from relay.ledger where file !~ '^9'";

fn of_kind(files: &[&'static str], first: char) -> Vec<&'static str> {
    files.iter().copied().filter(|file| file.starts_with(first)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_database_gets_every_file_and_then_only_rights() {
    let database = Database::bare().await;
    let mut session = database.connect().await;
    let applied = install(&mut session).await.unwrap();
    assert!(of_kind(&applied, '0').len() >= 3 && of_kind(&applied, '1').len() >= 5, "{applied:?}");
    let listed = database.value("select string_agg(file, ' ' order by file) from relay.ledger").await;
    assert_eq!(listed, applied.join(" "));
    check(&session).await.unwrap();
    let mark = database.value("select mark::text from relay.history").await;
    let ledger = database.value(LEDGER).await;
    let again = install(&mut session).await.unwrap();
    assert_eq!(again, of_kind(&applied, '9'));
    assert_eq!(database.value(LEDGER).await, ledger);
    assert_eq!(database.value("select mark::text from relay.history").await, mark, "the history goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_installers_at_once_do_no_harm() {
    let database = Database::bare().await;
    let mut installers = Vec::new();
    for _ in 0..20 {
        let mut session = database.connect().await;
        installers.push(tokio::spawn(async move { install(&mut session).await }));
    }
    let mut applied = Vec::new();
    for installer in installers {
        applied.push(installer.await.unwrap().unwrap());
    }
    let structure: usize = applied.iter().map(|files| of_kind(files, '0').len()).sum();
    assert_eq!(
        structure,
        applied.iter().map(|files| of_kind(files, '0').len()).max().unwrap(),
        "applied once"
    );
    check(&database.client).await.unwrap();
    assert_eq!(database.value("select count(*) from relay.history").await, "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_changed_is_applied_again() {
    let database = Database::new().await;
    database
        .run("create or replace function relay.cursor() returns text language sql as $$ select 'older' $$")
        .await;
    database
        .run("update relay.ledger set checksum = 'older' where file like '103%' or file like '002%'")
        .await;
    let error = check(&database.client).await.unwrap_err().to_string();
    assert!(error.contains("103") && error.contains("relay install"), "{error}");
    let mut session = database.connect().await;
    let applied = install(&mut session).await.unwrap();
    assert_eq!(of_kind(&applied, '1').len(), 1, "{applied:?}");
    assert_eq!(of_kind(&applied, '0').len(), 0, "structure is applied once");
    assert_ne!(database.value("select relay.cursor()").await, "older");
    check(&session).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_newer_version_wrote_is_left_alone() {
    let database = Database::new().await;
    database
        .run("create or replace function relay.cursor() returns text language sql as $$ select 'newer' $$")
        .await;
    database
        .run("update relay.ledger set checksum = 'newer', version = '99.0.0' where file like '103%'")
        .await;
    check(&database.client).await.unwrap();
    let mut session = database.connect().await;
    let applied = install(&mut session).await.unwrap();
    assert_eq!(of_kind(&applied, '1'), [""; 0]);
    assert_eq!(database.value("select relay.cursor()").await, "newer");
    assert_eq!(database.value("select version from relay.ledger where file like '103%'").await, "99.0.0");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_unreleased_build_with_more_structure_wrote_is_left_alone() {
    let database = Database::new().await;
    database
        .run(
            "insert into relay.ledger select '099_later.sql', 'later', version from relay.ledger where file like '103%';
             update relay.ledger set checksum = 'later' where file like '103%'",
        )
        .await;
    check(&database.client).await.unwrap();
    let mut session = database.connect().await;
    assert_eq!(of_kind(&install(&mut session).await.unwrap(), '1'), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_watched_before_an_update_is_watched_after_it() {
    let database = Database::new().await;
    database.run("create table t (id int primary key); grant select on t to authenticated; select relay.watch('t')").await;
    database
        .run("insert into t values (1); update relay.ledger set checksum = 'older' where file like '1%'")
        .await;
    let mut session = database.connect().await;
    assert!(of_kind(&install(&mut session).await.unwrap(), '1').len() >= 5);
    assert_eq!(database.value("select intact from relay.watched").await, "t");
    assert_eq!(database.value("select count(*) from relay.changes where operation <> 'S'").await, "1");
    let relay = Relay::start(&database.url).await;
    let mut client = Client::connect(&relay, &token("authenticated", None, json!({}))).await;
    client.subscribe("realtime:t", json!([{"event": "*", "schema": "public", "table": "t"}])).await;
    database.run("insert into t values (2)").await;
    assert_eq!(client.change().await["record"]["id"], 2);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_that_waits_for_an_open_transaction_does_not_hold_up_other_writers() {
    let database = Database::new().await;
    database.run("create table t (id int); select relay.watch('t')").await;
    database.run(&as_it_was()).await;
    let slow = database.connect().await;
    slow.batch_execute("begin; insert into t values (1)").await.unwrap();
    let mut installer = database.connect().await;
    let installing = tokio::spawn(async move { install(&mut installer).await });
    eventually("it waits for the lock", || async {
        let waits = "select exists (select from pg_locks where not granted and locktype = 'relation' \
                     and database = (select oid from pg_database where datname = current_database()))";
        (database.value(waits).await == "t").then_some(())
    })
    .await;
    database.run("set statement_timeout = '3s'; insert into t values (2)").await;
    assert!(!installing.is_finished());
    slow.batch_execute("commit").await.unwrap();
    installing.await.unwrap().unwrap();
    check(&database.client).await.unwrap();
    assert_eq!(database.value("select intact from relay.watched").await, "t");
}

/// What makes the changelog that of an older version, in tables whose columns were others.
fn as_it_was() -> String {
    let columns = "number, xid, at, relation, shape, operation, oversize, before, after, leaf, began";
    format!(
        "alter event trigger relay_schema_changes disable; alter event trigger relay_schema_drops disable;
         drop view relay.changes; drop table relay.log cascade;
         update relay.ledger set checksum = 'older' where file like '1%'; delete from relay.ledger where file = '010_log.sql';
         insert into relay.ledger values ('006_indexes.sql', 'older', '0.1.0');
         create table relay.changes (number bigint not null, xid xid8 not null, at timestamptz not null, relation int not null,
           operation \"char\" not null, oversize boolean not null, before json, after json, shape int, leaf oid, began xid8);
         create table relay.changes_0 () inherits (relay.changes); create table relay.changes_1 () inherits (relay.changes);
         create table relay.changes_2 () inherits (relay.changes); create index changes_0_xid on relay.changes_0 (xid);
         grant insert on relay.changes_0, relay.changes_1, relay.changes_2 to relay_writer;
         create or replace function relay.log_change(relation int, shape int, operation \"char\", oversize boolean, before json, after json,
                                                     leaf oid default null, began xid8 default null) returns void
         language plpgsql volatile as $$ begin
           insert into relay.changes_0 ({columns})
           values (nextval('relay.change_number'), pg_current_xact_id(), clock_timestamp(), relation, shape, operation, oversize, before, after, leaf, began);
         end $$;
         create or replace function relay.capture_body(relation regclass, id int, shape int, operation text) returns text
         language sql stable as $$ select format($text$ begin
           insert into relay.changes_0 (number, xid, at, relation, shape, operation, oversize, after)
           values (pg_catalog.nextval('relay.change_number'::pg_catalog.regclass), pg_catalog.pg_current_xact_id(),
                   pg_catalog.clock_timestamp(), %s, %s, 'I', false, pg_catalog.row_to_json(new));
           return null; end $text$, $2, $3) $$;
         select relay.set_functions('t', id, relay.shape(id)) from relay.watched;
         alter event trigger relay_schema_changes enable always; alter event trigger relay_schema_drops enable always"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_changelog_gives_way_while_writers_go_on_and_what_they_write_is_told_or_a_gap() {
    let database = Database::new().await;
    database
        .run("create table t (x xid8 default pg_current_xact_id(), n int default 0); grant select on t to authenticated; select relay.watch('t')")
        .await;
    database.run(&as_it_was()).await;
    let cursor = database.value("select relay.cursor()").await;
    database.run("insert into t default values").await;
    let is_over = Arc::new(AtomicBool::new(false));
    let mut writing = Vec::new();
    // Single rows, many in one statement, transactions of several statements by one snapshot, prepared statements.
    for statement in [
        "insert into t default values",
        "insert into t (n) select n from generate_series(1, 300) n",
        "begin isolation level repeatable read; insert into t default values; select pg_sleep(0.02); insert into t default values; commit",
        "execute one(1)",
    ] {
        let (session, is_over) = (database.connect().await, Arc::clone(&is_over));
        session.batch_execute("prepare one as insert into t (n) values ($1)").await.unwrap();
        writing.push(tokio::spawn(async move {
            while !is_over.load(Ordering::Relaxed) {
                session.batch_execute(statement).await.unwrap();
            }
        }));
    }
    install(&mut database.connect().await).await.unwrap();
    database.run("insert into t default values").await;
    is_over.store(true, Ordering::Relaxed);
    for writer in writing {
        writer.await.unwrap();
    }
    // What a function of the older version writes late.
    database
        .run(
            "insert into relay.changes_0 (number, xid, at, relation, shape, operation, oversize, after, leaf, began)
             values (nextval('relay.change_number'), pg_current_xact_id(), now(), 1, 1, 'I', true, '{\"late\": true}', 16402, '731')",
        )
        .await;
    let late = "select count(*) from relay.changes where after ->> 'late' = 'true' and oversize and leaf = 16402 and began = '731'";
    assert_eq!(database.value(late).await, "1");
    let silent = "select count(*) from (select x, count(*) from t, relay.history h where not pg_visible_in_snapshot(x, h.horizon) group by x
                  except select xid, count(*) from relay.changes where operation = 'I' group by xid) lost";
    assert_eq!(database.value(silent).await, "0");
    assert_ne!(database.value("select count(*) from relay.changes where operation = 'I'").await, "1");
    check(&database.client).await.unwrap();
    let relay = Relay::start(&database.url).await;
    let path = format!(
        "/realtime/v1/changes?table=t&wait=0&since={cursor}&apikey={}",
        token("authenticated", None, json!({}))
    );
    let answer = get(relay.address, &path, "").await;
    assert_eq!(answer.status, 410, "{answer:?}");
    relay.stop().await;
    // Nothing of it is left once no transaction can still write there.
    let is_left = "select to_regclass('relay.changes_0') is not null or to_regprocedure('relay.redirect()') is not null";
    install(&mut database.connect().await).await.unwrap();
    assert_eq!(database.value(is_left).await, "t");
    database
        .run("update relay.ledger set applied_at = now() - interval '2 hours' where file = '010_log.sql'")
        .await;
    install(&mut database.connect().await).await.unwrap();
    assert_eq!(database.value(is_left).await, "f");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_without_the_relay_says_what_to_do() {
    let database = Database::bare().await;
    let error = check(&database.client).await.unwrap_err();
    assert!(matches!(error, Error::Unfit(_)) && !error.is_transient());
    let text = error.to_string();
    assert!(text.contains("relay install --database-url") && text.contains("--install"), "{text}");
}

/// In a cluster of its own: roles belong to the cluster, and here no other test has made them before.
#[tokio::test(flavor = "multi_thread")]
async fn a_plain_owner_with_createrole_installs_watches_and_serves() {
    let cluster = Cluster::start(&["-c", "fsync=off"]).await;
    let admin = connect(&cluster.url).await;
    admin.batch_execute("create role owner login createrole").await.unwrap();
    admin.batch_execute("create database app owner owner").await.unwrap();
    let url = with_database(&cluster.url, "app").replace("postgres@", "owner@");
    let mut session = connect(&url).await;
    install(&mut session).await.unwrap();
    install(&mut session).await.unwrap();
    check(&session).await.unwrap();
    let run = async |session: &Session, sql: &str| session.batch_execute(sql).await.unwrap();
    run(
        &session,
        "create table t (id int primary key, owner uuid); alter table t enable row level security;
         create policy own on t for select using (owner = auth.uid());
         grant select on t to authenticated; select relay.watch('t')",
    )
    .await;
    let relay = Relay::start(&url).await;
    let someone = "11111111-1111-4111-8111-111111111111";
    let mut client = Client::connect(&relay, &token("authenticated", Some(someone), json!({}))).await;
    client.subscribe("realtime:t", json!([{"event": "*", "schema": "public", "table": "t"}])).await;
    run(&session, &format!("insert into t values (1, gen_random_uuid()), (2, '{someone}')")).await;
    assert_eq!(client.change().await["record"]["id"], 2);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_installation_beside_writers_of_the_cluster_leaves_a_horizon_that_the_relay_reads() {
    let database = Database::new().await;
    database
        .run("create table t (id int primary key); grant select on t to anon; select relay.watch('t')")
        .await;
    let others = database.connect().await;
    // The installer's own transaction has a number, and those of others begin and end behind it. Others of the cluster may
    // be there, too: again until the first one is its own.
    eventually("the horizon begins with the transaction that wrote it", || async {
        database.run("begin; select pg_current_xact_id()").await;
        for _ in 0..3 {
            others.batch_execute("select pg_current_xact_id()").await.unwrap();
        }
        database.run("update relay.history set horizon = pg_current_snapshot(); commit").await;
        let horizon = database.value("select relay.horizon()").await;
        let ends: Vec<_> = horizon.split([':', ',']).collect();
        (ends[0] != ends[1] && ends[0] != ends[2]).then_some(())
    })
    .await;
    let relay = Relay::start(&database.url).await;
    let mut client = Client::connect(&relay, &token("anon", None, json!({}))).await;
    client.subscribe("realtime:t", json!([{"event": "*", "schema": "public", "table": "t"}])).await;
    database.run("insert into t values (1)").await;
    assert_eq!(client.change().await["record"]["id"], 1);
    relay.stop().await;
}
