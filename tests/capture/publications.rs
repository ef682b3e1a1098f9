//! Publications and schemas whose tables are watched: `relay.watch_publication`, `relay.watch_schema`.

use relay::postgres::install::install;
use serde_json::json;

use crate::delivery::crash::Cluster;
use crate::support::database::{Database, connect, with_database};
use crate::support::program::output;
use crate::support::relay::Relay;
use crate::support::stage::Stage;
use crate::support::{eventually, token};

const TABLES: &str = "create table a (id int primary key); create table b (id int primary key); create table c (id int primary key, v text);
    create schema s; create table s.d (id int primary key);";

/// The watched tables, in order of name.
async fn watched(database: &Database) -> String {
    database
        .value(
            "select coalesce(string_agg(relation::text, ' ' order by relation::text), '') from relay.watched",
        )
        .await
}

/// Waits until just these tables are watched.
async fn settles(database: &Database, tables: &str) {
    eventually(&format!("just {tables:?} is watched"), || async {
        (watched(database).await == tables).then_some(())
    })
    .await;
}

/// The same without a relay, whose part it does.
async fn is_synced(database: &Database, tables: &str) {
    eventually(&format!("just {tables:?} is watched"), || async {
        database.run("select relay.sync_collections()").await;
        (watched(database).await == tables).then_some(())
    })
    .await;
}

/// What is told of a table that is not watched, or nothing.
async fn told(database: &Database, table: &str) -> String {
    let told = format!(
        "select coalesce((select string_agg(n, '; ') from relay.health, unnest(not_watched) n where starts_with(n, '{table} is ')), '')"
    );
    database.value(&told).await
}

async fn is_14(database: &Database) -> bool {
    database.value("select current_setting('server_version_num')::int < 150000").await == "t"
}

#[tokio::test(flavor = "multi_thread")]
async fn the_watched_tables_follow_a_publication_as_it_is_altered() {
    let database = Database::new().await;
    database.run(TABLES).await;
    let relay = Relay::start(&database.url).await;
    database
        .run("create publication \"Pub 1\" for table a, b; select relay.watch_publication('Pub 1')")
        .await;
    settles(&database, "a b").await;
    database.run("alter publication \"Pub 1\" add table c, s.d").await;
    settles(&database, "a b c s.d").await;
    database.run("alter publication \"Pub 1\" drop table a").await;
    settles(&database, "b c s.d").await;
    database.run("alter publication \"Pub 1\" set table a").await;
    settles(&database, "a").await;
    // Renamed tables are the same tables, dropped ones are gone.
    database.run("alter table a rename to z; alter publication \"Pub 1\" add table b; drop table b").await;
    settles(&database, "z").await;
    database.run("drop publication \"Pub 1\"").await;
    settles(&database, "").await;
    let missing = "there is no such publication: create it, or select relay.unwatch_publication('Pub 1')";
    assert!(told(&database, "publication \"Pub 1\"").await.ends_with(missing));
    database.run("create publication \"Pub 1\" for table c").await;
    settles(&database, "c").await;
    database.run("select relay.unwatch_publication('Pub 1')").await;
    settles(&database, "").await;
    database.run("alter publication \"Pub 1\" add table z; select relay.watch_publication('Pub 1')").await;
    settles(&database, "c z").await;
    let unknown = database.client.batch_execute("select relay.watch_publication('nope')").await.unwrap_err();
    assert_eq!(unknown.as_db_error().unwrap().message(), "there is no publication nope");
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_for_all_tables_includes_new_ones_from_their_first_row_and_excludes_schemas_of_servers()
{
    let stage =
        Stage::new(&format!("{TABLES} alter default privileges grant select on tables to anon")).await;
    stage.run("create publication p for all tables; select relay.watch_publication('p')").await;
    settles(&stage.database, "a b c marker s.d").await;
    let mut client = stage.join(&token("anon", None, json!({}))).await;
    stage.run("begin; create table made (id int primary key); insert into made values (1); commit").await;
    stage.run("create table as_selected as select 2 as id; insert into as_selected values (3)").await;
    stage.run("create table split (id int primary key) partition by range (id); create table low partition of split for values from (0) to (10);
               insert into split values (4); create temp table hidden (id int); create unlogged table unlogged (id int)").await;
    assert_eq!(
        stage.told(&mut client).await,
        [r#"INSERT {"id":1}"#, r#"INSERT {"id":3}"#, r#"INSERT {"id":4}"#]
    );
    assert_eq!(watched(&stage.database).await, "a as_selected b c made marker s.d split");
    stage.run("create table realtime.more (id int); create table s.more (id int)").await;
    settles(&stage.database, "a as_selected b c made marker s.d s.more split").await;
    assert_eq!(stage.database.value("select not_watched from relay.health").await, "{}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_of_the_schemas_of_a_publication_are_watched_and_partitions_with_their_table() {
    let database = Database::new().await;
    if is_14(&database).await {
        return;
    }
    let relay = Relay::start(&database.url).await;
    database.run(TABLES).await;
    database
        .run(
            "create table split (id int primary key) partition by range (id); create table s.low partition of split for values from (0) to (10);
             create publication p for tables in schema s, realtime; select relay.watch_publication('p')",
        )
        .await;
    // Of `split` only the partition is in the publication.
    settles(&database, "s.d s.low").await;
    database.run("alter publication p add table split").await;
    settles(&database, "s.d split").await;
    database.run("create table s.e (id int); alter table c set schema s").await;
    settles(&database, "s.c s.d s.e split").await;
    database.run("alter table s.d set schema public; alter publication p add tables in schema public").await;
    settles(&database, "a b d s.c s.e split").await;
    database.run("alter publication p drop tables in schema s").await;
    settles(&database, "a b d split").await;
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_publication_restricts_is_refused_by_name_and_the_others_are_watched() {
    let database = Database::new().await;
    database.run(TABLES).await;
    database.run("create publication few for table a with (publish = 'insert, update'); select relay.watch_publication('few')").await;
    let told_of = async |table: &str| told(&database, table).await;
    assert_eq!(
        told_of("a").await,
        "a is refused: publication few publishes only: insert, update; the relay shows all changes: alter publication few set (publish = \
         'insert, update, delete, truncate'); or watch all of it: select relay.watch('public.a')"
    );
    let (code, findings, _) = output(&["doctor", "--database-url", &database.url]).await;
    assert!(
        code == 1 && findings.contains("FAULT a is refused: publication few publishes only"),
        "{findings}"
    );
    let relay = Relay::start(&database.url).await;
    database.run("alter publication few set (publish = 'insert, update, delete, truncate')").await;
    settles(&database, "a").await;
    assert_eq!(told_of("a").await, "");
    database.run("create publication named for table realtime.messages, b; select relay.watch_publication('named')").await;
    settles(&database, "a b").await;
    assert_eq!(
        told_of("realtime.messages").await,
        "realtime.messages is refused: tables of the schema realtime are not watched"
    );
    if is_14(&database).await {
        return;
    }
    database
        .run(
            "alter publication few add table c (id), b where (id > 5), s.d; create publication \"all\" for all tables;
             alter publication named set table realtime.messages",
        )
        .await;
    settles(&database, "a s.d").await;
    let (filtered, listed) = (told_of("b").await, told_of("c").await);
    assert!(filtered.starts_with("b is refused: publication few has a row filter for it, "), "{filtered}");
    assert!(listed.starts_with("c is refused: publication few lists its columns, "), "{listed}");
    // The remedies help.
    for told in [filtered, listed] {
        let (_, remedy) = told.split_once("policies only: ").or(told.split_once("may select: ")).unwrap();
        let (remedy, _) = remedy.split_once("; or watch").unwrap();
        database.run(remedy).await;
    }
    settles(&database, "a b c s.d").await;
    // A table that becomes refused is watched no more; another collection may accept it.
    database.run("alter publication few set table c (v), b").await;
    settles(&database, "b").await;
    database.run("select relay.watch_publication('all')").await;
    settles(&database, "a b c s.d").await;
    database.run("select relay.unwatch_publication('all'); select relay.watch('c')").await;
    settles(&database, "b c").await;
    assert_eq!(told_of("c").await, "", "somebody watched it by hand");
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_that_somebody_watched_stay_when_they_leave_and_when_nothing_is_followed_any_more() {
    let database = Database::new().await;
    database.run(TABLES).await;
    database.run("select relay.watch('a', true)").await;
    let relay = Relay::start(&database.url).await;
    database.run("create publication p for table a, b, c; select relay.watch_publication('p'); select relay.watch('b')").await;
    settles(&database, "a b c").await;
    assert_eq!(
        database.value("select leave_events from relay.watched where relation = 'a'::regclass").await,
        "t"
    );
    database.run("alter publication p set table s.d").await;
    settles(&database, "a b s.d").await;
    // Unwatched by hand, it stays for the publication.
    database.run("alter publication p add table b; select relay.unwatch('b'), relay.unwatch('a')").await;
    settles(&database, "b s.d").await;
    let (code, _, said) = output(&["unwatch", "b", "--database-url", &database.url]).await;
    assert!(code == 0 && said.starts_with("b stays watched, because it is in a publication"), "{said}");
    database.run("select relay.unwatch_publication('p')").await;
    settles(&database, "").await;
    let triggers = "select count(*) from pg_trigger where tgname ~ '^00_relay_(capture|truncate)_'";
    assert_eq!(database.value(triggers).await, "0");
    assert_eq!(database.value("select count(*) from relay.collection_work").await, "0");
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_without_publication_is_watched_with_its_future_tables() {
    let database = Database::new().await;
    database.run(TABLES).await;
    database.run("select relay.watch_schema('public'), relay.watch_schema('s')").await;
    is_synced(&database, "a b c s.d").await;
    // Without a relay, what a statement made is watched by that statement, and by no other.
    database.run("create table e (id int); create unlogged table f (id int); create view v as select 1; create table t (id int)").await;
    assert_eq!(watched(&database).await, "a b c e f s.d t");
    database.run("begin; create table g (id int); rollback; alter table s.d set schema realtime; alter table e set schema s").await;
    assert_eq!(watched(&database).await, "a b c f realtime.d s.e t");
    let relay = Relay::start(&database.url).await;
    settles(&database, "a b c f s.e t").await;
    database.run("drop schema s cascade").await;
    settles(&database, "a b c f t").await;
    assert!(told(&database, "schema s").await.contains("select relay.unwatch_schema('s')"));
    database.run("select relay.unwatch_schema('s'), relay.unwatch_schema('public')").await;
    settles(&database, "").await;
    for (schema, told) in [
        ("relay", "tables of the schema relay are not watched"),
        ("realtime", "tables of the schema realtime are not watched"),
        ("pg_catalog", "tables of the schema pg_catalog are not watched"),
        ("nope", "there is no schema nope"),
    ] {
        let refused = database.client.batch_execute(&format!("select relay.watch_schema('{schema}')")).await;
        assert_eq!(refused.unwrap_err().as_db_error().unwrap().message(), told);
    }
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_locked_is_tried_again_and_keeps_neither_writers_nor_statements_nor_other_tables_waiting()
 {
    let database = Database::new().await;
    database.run(TABLES).await;
    database.run("create publication p for table s.d; select relay.watch_publication('p')").await;
    let relay = Relay::start(&database.url).await;
    let open = database.connect().await;
    open.batch_execute("begin; insert into b values (1)").await.unwrap();
    // These would fail if they waited.
    let user = database.connect().await;
    user.batch_execute("set lock_timeout = '1s'; set statement_timeout = '5s'").await.unwrap();
    user.batch_execute("alter publication p add table a, b, c").await.unwrap();
    settles(&database, "a c s.d").await;
    eventually("it was tried", || async {
        (told(&database, "b").await
            == "b is failed: a transaction that is open has locked it; it is tried again")
            .then_some(())
    })
    .await;
    for id in 2..50 {
        user.batch_execute(&format!("insert into b values ({id})")).await.unwrap();
    }
    let (_, findings, _) = output(&["doctor", "--database-url", &database.url]).await;
    assert!(findings.contains("FAULT b is failed: a transaction that is open has locked it"), "{findings}");
    open.batch_execute("commit").await.unwrap();
    settles(&database, "a b c s.d").await;
    // The same when it leaves.
    open.batch_execute("begin; insert into b values (50)").await.unwrap();
    user.batch_execute("alter publication p drop table b, a").await.unwrap();
    settles(&database, "b c s.d").await;
    open.batch_execute("commit").await.unwrap();
    settles(&database, "c s.d").await;
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn statements_of_users_never_fail_or_wait_because_of_a_collection() {
    let database = Database::new().await;
    database.run("create publication p for all tables; select relay.watch_publication('p')").await;
    let user = database.connect().await;
    user.batch_execute("set statement_timeout = '5s'").await.unwrap();
    // While a migration with a new table stays open.
    let open = database.connect().await;
    open.batch_execute("begin; create table first (id int primary key)").await.unwrap();
    user.batch_execute("create table second (id int primary key)").await.unwrap();
    assert_eq!(watched(&database).await, "second");
    open.batch_execute("commit").await.unwrap();
    assert_eq!(watched(&database).await, "first second");
    // What the relay cannot do is told.
    let body =
        database.value("select pg_get_functiondef('relay.set_triggers(regclass, int)'::regprocedure)").await;
    database
        .run(
            "create or replace function relay.set_triggers(relation regclass, id int) returns void language plpgsql as
             $$ begin raise exception 'no trigger today'; end $$",
        )
        .await;
    user.batch_execute("create table third (id int primary key); alter publication p owner to current_user")
        .await
        .unwrap();
    let relay = Relay::start(&database.url).await;
    eventually("it was tried", || async {
        (told(&database, "third").await == "third is failed: no trigger today").then_some(())
    })
    .await;
    database.run(&body).await;
    settles(&database, "first second third").await;
    // A lock on a table that a statement of a user does not need is not taken in its transaction.
    open.batch_execute("begin; alter publication p rename to q; alter publication q rename to p")
        .await
        .unwrap();
    let locks = "select count(*) from pg_locks l join pg_class c on c.oid = l.relation
                 where l.mode in ('ShareRowExclusiveLock', 'AccessExclusiveLock') and c.relname in ('first', 'second', 'third')";
    assert_eq!(database.value(locks).await, "0");
    open.batch_execute("rollback").await.unwrap();
    relay.stop().await;
}

/// In a cluster of its own: roles belong to the cluster.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_the_installer_may_not_watch_is_told_with_the_grant_that_helps() {
    let cluster = Cluster::start(&["-c", "fsync=off"]).await;
    let admin = connect(&cluster.url).await;
    for sql in
        ["create role owner login createrole", "create role other login", "create database app owner owner"]
    {
        admin.batch_execute(sql).await.unwrap();
    }
    let url = with_database(&cluster.url, "app");
    let owner = url.replace("postgres@", "owner@");
    let mut client = connect(&owner).await;
    install(&mut client).await.unwrap();
    let database = Database { url: owner, client };
    let admin = connect(&url).await;
    admin
        .batch_execute(
            "grant create on schema public to other, owner; set role other; create table theirs (id int primary key);
             set role owner; create table mine (id int primary key); reset role; create publication p for all tables",
        )
        .await
        .unwrap();
    database.run("select relay.watch_publication('p')").await;
    is_synced(&database, "mine").await;
    eventually("it was tried", || async {
        database.run("select relay.sync_collections()").await;
        told(&database, "theirs").await.contains("failed").then_some(())
    })
    .await;
    let told = told(&database, "theirs").await;
    assert!(
        told.ends_with(": grant other to owner, or as a superuser: select relay.watch('public.theirs')"),
        "{told}"
    );
    let relay = Relay::start(&database.url).await;
    admin
        .batch_execute(
            "set role other; create table more (id int primary key); reset role; grant other to owner",
        )
        .await
        .unwrap();
    settles(&database, "mine more theirs").await;
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_event_trigger_the_relay_finds_what_changed() {
    let database = Database::new().await;
    database.run(TABLES).await;
    database
        .run("drop event trigger relay_schema_changes; drop event trigger relay_schema_drops; drop event trigger relay_rewrites")
        .await;
    let relay = Relay::start(&database.url).await;
    database
        .run("create publication p for table a; select relay.watch_publication('p'), relay.watch_schema('s')")
        .await;
    settles(&database, "a s.d").await;
    database.run("alter publication p set table b; create table s.e (id int primary key)").await;
    settles(&database, "b s.d s.e").await;
    database.run("drop publication p; drop table s.e").await;
    settles(&database, "s.d").await;
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_that_is_made_anew_costs_its_readers_nothing() {
    let stage = Stage::new("create table t (id int primary key); grant select on t to anon").await;
    stage.run("create publication p for table t; select relay.watch_publication('p')").await;
    let mut client =
        stage.subscribe(&token("anon", None, json!({})), json!([{"event": "*", "table": "t"}])).await;
    let id = "select id from relay.watched where relation = 't'::regclass";
    let before = stage.database.value(id).await;
    stage.run("insert into t values (1)").await;
    stage.run("drop publication p").await;
    stage.run("create publication p").await;
    stage.run("insert into t values (2)").await;
    stage.run("alter publication p add table t").await;
    stage.run("insert into t values (3)").await;
    let told = stage.told(&mut client).await;
    assert_eq!(told, [r#"INSERT {"id":1}"#, r#"INSERT {"id":2}"#, r#"INSERT {"id":3}"#]);
    assert_eq!(stage.database.value(id).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_tables_are_watched_one_by_one_and_a_table_without_key_as_by_hand() {
    let database = Database::new().await;
    database
        .run(
            "do $$ begin for n in 1..60 loop execute format('create table t%s (id int)', n); end loop; end $$;
             create publication p for all tables; select relay.watch_publication('p')",
        )
        .await;
    let count = "select count(*) from relay.watched";
    let pending = "select count(*) from relay.collected where state = 'pending'";
    let at_once: usize = database.value(count).await.parse().unwrap();
    let left: usize = database.value(pending).await.parse().unwrap();
    assert!(at_once > 0 && at_once + left == 60, "{at_once} {left}");
    let relay = Relay::start(&database.url).await;
    eventually("all are watched", || async { (database.value(count).await == "60").then_some(()) }).await;
    assert!(database.value("select relay.notes('t1')").await.contains("it has no primary key"));
    database.run("insert into t47 values (1)").await;
    assert_eq!(database.value("select count(*) from relay.changes where operation = 'I'").await, "1");
    relay.stop().await;
}
