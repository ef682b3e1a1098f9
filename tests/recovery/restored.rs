//! A dump that was restored elsewhere, with owners, rights and triggers or without: `relay install` makes it whole.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::delivery::crash::Cluster;
use crate::support::client::Client;
use crate::support::database::{Database, connect, make_logins, with_database};
use crate::support::http::get;
use crate::support::program;
use crate::support::relay::Relay;
use crate::support::token;

/// Runs a program of PostgreSQL. What it says is of no interest: that roles are missing, for one, is what is tried here.
fn run(program: &Path, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() || program.ends_with("pg_restore"), "{program:?} {arguments:?}: {said}");
}

const ANN: &str = "11111111-1111-4111-8111-111111111111";

/// What the dumped database has: a table with rules, one whose images run a user's cast, a partitioned one, and changes of all.
const SOURCE: &str = "
    create table own (id bigint generated always as identity primary key, gone int, owner uuid, name text);
    alter table own drop column gone;
    alter table own enable row level security;
    create policy own on own for select using (owner = auth.uid());
    create type mood as enum ('sad', 'glad');
    create table care (id int primary key, mood mood);
    create table parted (id int primary key) partition by range (id);
    create table parted_1 partition of parted for values from (0) to (1000);
    grant select on own, care, parted to authenticated, service_role;
    select relay.watch('own', leave_events => true, ignore => '{name}'), relay.watch('care'), relay.watch('parted');
    insert into own (owner, name) values ('11111111-1111-4111-8111-111111111111', 'before');
    insert into care values (1, 'sad'); insert into parted values (1)";

/// Whether writes, reads, verdicts, the event trigger and the sequences are as they were.
async fn is_whole(url: &str, what: &str) {
    let (code, said, error) = program::output(&["install", "--database-url", url]).await;
    assert_eq!(code, 0, "{what}: {said}{error}");
    let session = connect(url).await;
    make_logins(&session).await;
    // The rights to tables of one's own are one's own to restore.
    session.batch_execute("grant select on own, care, parted to authenticated").await.unwrap();
    let amiss = session.query("select a from relay.install_problems() a", &[]).await.unwrap();
    let amiss: Vec<String> = amiss.iter().map(|row| row.get(0)).collect();
    assert!(amiss.is_empty(), "{what}: {amiss:?}");
    let owners = "select string_agg(distinct p.proowner::regrole::text, ' ') from pg_proc p where p.pronamespace = 'relay'::regnamespace
                  and (p.proname ~ '^capture_([0-9]+|truncate)' or p.proname in ('image', 'log_schema_change'))";
    let owners: String = session.query_one(owners, &[]).await.unwrap().get(0);
    assert_eq!(owners, "relay_image relay_writer", "{what}");
    let intact =
        "select count(*) filter (where intact), count(*) filter (where leave_events) from relay.watched";
    let intact = session.query_one(intact, &[]).await.unwrap();
    let all = "select string_agg(format('%s %s %s', relation, relay.triggers_intact(relation, id), relay.functions_intact(relation, id)), ', ') from relay.watched";
    let all: String = session.query_one(all, &[]).await.unwrap().get(0);
    assert_eq!((intact.get::<_, i64>(0), intact.get::<_, i64>(1)), (3, 1), "{what}: {all}");
    let ignored = "select string_agg(ignored::text, ' ' order by relation::text) from relay.watched";
    let ignored = async || session.query_one(ignored, &[]).await.unwrap().get::<_, String>(0);
    assert_eq!(ignored().await, "{} {name} {}", "{what}");
    let relay = Relay::start(url).await;
    let ann = token("authenticated", Some(ANN), json!({}));
    let mut client = Client::connect(&relay, &ann).await;
    client.subscribe("realtime:all", json!([{"event": "*", "schema": "public"}])).await;
    let writes = format!(
        "insert into own (owner, name) values (gen_random_uuid(), 'hidden'), ('{ANN}', 'seen');
         alter table own rename column name to title;
         insert into own (owner, title) values ('{ANN}', 'renamed');
         set session_replication_role = replica;
         insert into care values (2, 'glad'); insert into parted values (2);
         set session_replication_role = origin"
    );
    session.batch_execute(&writes).await.unwrap_or_else(|error| panic!("{what}: {error:?}"));
    let mut told = Vec::new();
    for _ in 0..4 {
        let change = client.change().await;
        let record = &change["record"];
        told.push(match &record["mood"] {
            _ if record["name"].is_string() => record["name"].clone(),
            _ if record["title"].is_string() => record["title"].clone(),
            mood if mood.is_string() => mood.clone(),
            _ => record["id"].clone(),
        });
    }
    assert_eq!(told, [json!("seen"), json!("renamed"), json!("glad"), json!(2)], "{what}");
    let rows = get(relay.address, &format!("/realtime/v1/changes?table=own&apikey={ann}"), "").await;
    assert_eq!(rows.body["rows"].as_array().map(Vec::len), Some(3), "{what}: {rows:?}");
    session
        .batch_execute("create table next (id int); select relay.watch('next'); truncate care")
        .await
        .unwrap();
    assert_eq!(ignored().await, "{} {} {title} {}", "{what}");
    relay.stop().await;
}

/// A right that only another file of the installation grants would be missing after `pg_restore --no-acl`.
#[tokio::test(flavor = "multi_thread")]
async fn each_right_in_the_schema_is_one_that_an_installation_gives_back() {
    let database = Database::new().await;
    let rights = "
        select format('%s %s %s', a.privilege_type, o.object, a.grantee::regrole)
        from (select c.oid::regclass::text, coalesce(t.attacl, c.relacl), t.attname from pg_class c
              left join pg_attribute t on t.attrelid = c.oid and t.attacl is not null
              where c.relnamespace = 'relay'::regnamespace
              union all
              select c.oid::regclass::text, c.relacl, null from pg_class c where c.relnamespace = 'relay'::regnamespace
              union all
              select p.oid::regprocedure::text, p.proacl, null from pg_proc p where p.pronamespace = 'relay'::regnamespace) o (object, acl, part)
        cross join aclexplode(o.acl) a
        where a.grantee::regrole::text in ('relay_writer', 'relay_reader') and a.grantor <> a.grantee
          and not exists (
            select from relay.rights_due() d
            where d.role = a.grantee::regrole::text and upper(case when d.kind = 'column' then 'select' else d.privilege end) = a.privilege_type
              and case d.kind when 'function' then to_regprocedure(d.object)::text = o.object
                              when 'column' then to_regclass(d.object)::text = o.object and d.privilege = o.part
                              when 'owner' then false when 'schema' then false
                              else to_regclass(d.object)::text = o.object end)
        order by 1";
    let session = database.connect().await;
    let missing: Vec<String> =
        session.query(rights, &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
    assert!(missing.is_empty(), "not in relay.rights_due(): {missing:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_restored_in_whatever_way_is_made_whole_by_an_installation() {
    let source = Database::new().await;
    let Some(programs) = program::clients_of_postgresql(&source).await else { return };
    source.run(SOURCE).await;
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("dump-{}", std::process::id()));
    let dump = folder.to_str().unwrap();
    let _ = std::fs::remove_dir_all(&folder);
    run(&programs.join("pg_dump"), &["-Fd", "-f", dump, &source.url]);
    let cluster = Cluster::start(&["-c", "fsync=off"]).await;
    let admin = connect(&cluster.url).await;
    for way in 0..16_usize {
        let mut options: Vec<&str> = Vec::new();
        options.extend((way & 1 != 0).then_some("--no-owner"));
        options.extend((way & 2 != 0).then_some("--no-acl"));
        options.extend((way & 4 != 0).then_some("-j2"));
        let with_triggers = way & 8 == 0;
        let name = format!("restored_{way}");
        admin.batch_execute(&format!("create database {name}")).await.unwrap();
        let url = with_database(&cluster.url, &name);
        let restore = |more: &[&str]| {
            run(&programs.join("pg_restore"), &[&options, more, &["-d", &url, dump]].concat());
        };
        match with_triggers {
            true => restore(&[]),
            // `--disable-triggers` is for data alone.
            false => {
                restore(&["--schema-only"]);
                // Without rights the event trigger refuses to have triggers disabled, and they refuse the rows.
                if way & 2 != 0 {
                    let (code, _, said) = program::output(&["install", "--database-url", &url]).await;
                    assert_eq!(code, 0, "{said}");
                }
                restore(&["--data-only", "--disable-triggers"]);
            }
        }
        is_whole(&url, &format!("{options:?} with triggers: {with_triggers}")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_of_the_schema_alone_leaves_no_trigger_that_logs_for_another_table() {
    let source = Database::new().await;
    let Some(programs) = program::clients_of_postgresql(&source).await else { return };
    source.run(SOURCE).await;
    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("schema-{}.dump", std::process::id()));
    let file = file.to_str().unwrap();
    run(&programs.join("pg_dump"), &["-Fc", "--schema-only", "-f", file, &source.url]);
    let target = Database::bare().await;
    run(&programs.join("pg_restore"), &["-d", &target.url, file]);
    let (code, _, said) = program::output(&["install", "--database-url", &target.url]).await;
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("relay.watch") && said.contains("own") && said.contains("parted_1"), "{said}");
    let left = "select count(*) from pg_trigger where tgname ~ '^00_relay_(capture|truncate)_'";
    assert_eq!(target.value(left).await, "0");
    target.run("insert into care values (1, 'sad'); select relay.watch('care')").await;
    target.run("insert into care values (2, 'sad')").await;
    assert_eq!(target.value("select count(*) from relay.changes where operation = 'I'").await, "1");
}

/// Whatever is removed of the list, `doctor` names it and an installation restores it.
#[tokio::test(flavor = "multi_thread")]
async fn doctor_names_what_an_installation_gives_back() {
    let database = Database::new().await;
    database.run(SOURCE).await;
    // Before PostgreSQL 15 every role may create there, which is a fault of its own.
    database.run("revoke create on schema public from public").await;
    for (harm, named) in [
        (
            "alter function relay.image(record) owner to postgres",
            "relay.image(record) does not belong to relay_image",
        ),
        ("alter function relay.log_schema_change() owner to postgres", "log_schema_change"),
        ("revoke insert on relay.log_1 from relay_writer", "relay_writer lacks insert"),
        ("revoke usage on sequence relay.change_number from relay_writer", "change_number"),
        ("revoke select (shape) on relay.shapes from relay_writer", "shape"),
        ("revoke usage on schema relay from relay_writer", "schema relay"),
        ("revoke all on all functions in schema relay from relay_reader", "relay.trim_changelog()"),
        (
            "grant execute on function relay.retain(interval, bigint) to public",
            "PUBLIC may execute relay.retain",
        ),
        ("grant select on relay.log_0 to public", "PUBLIC has select on relay.log_0"),
        (
            "alter table relay.shape_doubts replica identity default",
            "relay.shape_doubts has no replica identity",
        ),
        ("select setval('relay.watch_list_id_seq', 1)", "watch_list"),
        ("revoke usage on schema auth from authenticated", "authenticated lacks usage on schema auth"),
        ("alter event trigger relay_schema_changes disable", "event trigger"),
        ("alter event trigger relay_schema_changes enable", "event trigger"),
        ("alter event trigger relay_schema_drops disable", "event trigger"),
        ("alter event trigger relay_rewrites disable", "event trigger"),
        ("drop event trigger relay_rewrites", "event trigger"),
        ("alter table care disable trigger all", "care"),
        ("alter table own enable trigger user", "own"),
    ] {
        // Most of this the event trigger itself would refuse.
        let quietly = format!(
            "alter event trigger relay_schema_changes disable; {harm}; alter event trigger relay_schema_changes enable always"
        );
        database.run(if harm.contains("event trigger") { harm } else { &quietly }).await;
        let doctor = ["doctor", "--database-url", &database.url];
        let (code, said, _) = program::output(&doctor).await;
        assert!(code == 1 && said.contains(named), "{harm}: {said}");
        let (code, _, error) = program::output(&["install", "--database-url", &database.url]).await;
        assert_eq!(code, 0, "{harm}: {error}");
        let (code, said, _) = program::output(&doctor).await;
        assert_eq!(code, 0, "{harm}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_for_all_tables_neither_prevents_an_installation_nor_the_trimming_of_the_changelog() {
    let fresh = Database::bare().await;
    fresh.run("create publication everything for all tables").await;
    let (code, _, said) = program::output(&["install", "--database-url", &fresh.url]).await;
    assert_eq!(code, 0, "{said}");
    // One that came before this was known.
    let older = Database::new().await;
    for table in ["history", "known_rules", "widenings", "shape_doubts"] {
        older.run(&format!("alter table relay.{table} replica identity default")).await;
    }
    older.run("create publication everything for all tables").await;
    for database in [&older, &fresh] {
        let (code, _, said) = program::output(&["install", "--database-url", &database.url]).await;
        assert_eq!(code, 0, "{said}");
        database
            .run(
                "create table t (id int primary key); select relay.watch('t'); select relay.retain('1 second');
                 insert into t values (1); update t set id = 2; delete from t;
                 create policy p on t for select using (true); drop policy p on t;
                 insert into relay.shape_doubts (relation) values (0); create table u (id int)",
            )
            .await;
        let horizon = database.value("select horizon::text from relay.history").await;
        crate::support::eventually("a segment is truncated", || async {
            database.run("insert into t values (1); delete from t; select relay.trim_changelog()").await;
            (database.value("select horizon::text from relay.history").await != horizon).then_some(())
        })
        .await;
        database.run("select relay.unwatch('t'); select relay.watch('t'); select relay.repair()").await;
    }
}
