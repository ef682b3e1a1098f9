//! What an installation makes of schema `realtime`, and what it leaves as it is.

use relay::postgres::install::install;

use super::SUPABASE;
use crate::support::database::{Database, connect, with_login};
use crate::support::program::output;

/// All that a query on the schema can show of its objects: owners, rights, bodies, triggers apart.
const REALTIME: &str = "
    select string_agg(concat_ws(' ', o, owner::regrole, acl::text, body), E'\\n' order by o, body)
    from (
      select nspname, nspowner, nspacl, '' from pg_namespace where nspname = 'realtime'
      union all
      select c.oid::regclass::text, c.relowner, c.relacl, c.relrowsecurity::text || c.relkind::text from pg_class c
      where c.relnamespace = 'realtime'::regnamespace
      union all
      select p.oid::regprocedure::text, p.proowner, p.proacl, p.prosrc from pg_proc p where p.pronamespace = 'realtime'::regnamespace
      union all
      select a.attrelid::regclass || '.' || a.attname, 0, null, format_type(a.atttypid, a.atttypmod) from pg_attribute a
      join pg_class c on c.oid = a.attrelid where c.relnamespace = 'realtime'::regnamespace and a.attnum > 0
    ) x (o, owner, acl, body)";

async fn notes(url: &str) -> String {
    let (code, findings, _) = output(&["doctor", "--database-url", url]).await;
    assert_eq!(code, 0, "nothing of a table is wrong: {findings}");
    findings.lines().filter(|line| line.contains("broadcasts")).map(|line| format!("{line}\n")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_functions_that_supabase_has_insert_a_broadcast_each() {
    let database = Database::new().await;
    database
        .run(
            "create table todos (id int, title text);
             create function told() returns trigger language plpgsql as $$ begin
               perform realtime.broadcast_changes('todos', tg_op || '!', tg_op, tg_table_name, tg_table_schema, new, old);
               return null;
             end $$;
             create trigger told after insert or update or delete on todos for each row execute function told();
             insert into todos values (1, 'a');
             update todos set title = 'b';
             delete from todos;
             select realtime.send('{\"a\": 1}', 'e', 't', false);
             select realtime.send('{\"id\": 7}', 'e', 't');
             select realtime.send('[1]', event => 'e', topic => 't', private => false);
             select realtime.send_binary('\\x00ff', 'e', 't', false)",
        )
        .await;
    let rows = database
        .client
        .query(
            "select concat_ws(' ', topic, extension, event, private, payload - 'id', binary_payload,
                 case when jsonb_typeof(payload) = 'object' then case payload ->> 'id' when id::text then 'of its id' else 'of another id' end end)
             from realtime.messages order by inserted_at",
            &[],
        )
        .await
        .unwrap();
    let change = |operation: &str, record: &str, old: &str| {
        format!(
            "todos broadcast {operation}! t {{\"table\": \"todos\", \"record\": {record}, \"schema\": \"public\", \
             \"operation\": \"{operation}\", \"old_record\": {old}}} of its id"
        )
    };
    let (a, b) = (r#"{"id": 1, "title": "a"}"#, r#"{"id": 1, "title": "b"}"#);
    let expected = [
        change("INSERT", a, "null"),
        change("UPDATE", b, a),
        change("DELETE", "null", b),
        String::from(r#"t broadcast e f {"a": 1} of its id"#),
        String::from(r"t broadcast e t {} of another id"),
        String::from(r"t broadcast e f [1]"),
        String::from(r"t broadcast e f \x00ff"),
    ];
    assert_eq!(rows.iter().map(|row| row.get(0)).collect::<Vec<String>>(), expected);
    let now = "select bool_and(inserted_at between timezone('utc', now()) - interval '1 minute' and timezone('utc', now())
               + interval '1 minute') from realtime.messages";
    database.run("set timezone = 'Asia/Tokyo'; select realtime.send('{}', 'e', 't')").await;
    assert_eq!(database.value(now).await, "t", "in UTC, whatever the time zone of the writer");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_send_that_fails_is_a_warning_and_the_transaction_of_its_writer_goes_on() {
    let database = Database::new().await;
    let (writer, mut warnings) = database.warned().await;
    let failing = [
        "select realtime.send('{}', 'e', null)",
        "select realtime.send_binary('x', 'e', null)",
        "set local role anon; select realtime.send('{}', 'e', 't'); reset role",
        "alter table realtime.messages add check (event <> 'no'); select realtime.send('{}', 'no', 't')",
    ];
    writer.batch_execute("begin; create table t (id int)").await.unwrap();
    for sql in failing {
        writer.batch_execute(sql).await.unwrap();
        let warning = warnings.recv().await.unwrap();
        assert!(warning.starts_with("WarnSendingBroadcastMessage: "), "{sql}: {warning}");
    }
    writer.batch_execute("commit").await.unwrap();
    assert_eq!(database.value("select count(*) from realtime.messages").await, "0");
    database.run("insert into t values (1)").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_write_a_topic_cannot_send_to_it() {
    let database = Database::new().await;
    database
        .run(
            "create policy one on realtime.messages for insert to authenticated
             with check (realtime.topic() = 'mine' and topic = 'mine');
             set role authenticated;
             select realtime.send('{}', 'e', 'mine'), realtime.send('{}', 'e', 'theirs');
             reset role",
        )
        .await;
    assert_eq!(database.value("select string_agg(topic, ',') from realtime.messages").await, "mine");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_that_is_there_is_not_changed() {
    let database = Database::bare().await;
    let (_, name) = database.url.rsplit_once('/').unwrap();
    database.run(&SUPABASE.replace("$DB", name)).await;
    // Of the function that is missing, only that.
    let before = database.value(REALTIME).await;
    let mut session = database.connect().await;
    for _ in 0..2 {
        install(&mut session).await.unwrap();
        let after = database.value(REALTIME).await;
        for line in before.lines() {
            assert!(after.contains(line), "{line}\n\n{after}");
        }
    }
    assert!(notes(&database.url).await.starts_with("ok"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_installer_without_rights_on_the_schema_installs_all_the_same_and_doctor_says_what_is_missing() {
    // Makes the roles of the cluster.
    Database::new().await;
    for (there, missing) in [
        ("", "the table realtime.messages does not exist"),
        ("create table realtime.messages (topic text, payload jsonb)", "lacks columns (extension, event,"),
        ("create view realtime.messages as select 1 as topic", "lacks columns (extension, payload,"),
    ] {
        let database = Database::bare().await;
        let (_, name) = database.url.rsplit_once('/').unwrap();
        let owner = format!("{name}_owner");
        database
            .run(&format!(
                "create role {owner} login createrole; alter database {name} owner to {owner};
                 create schema realtime; {there}; grant relay_reader, relay_writer, relay_image, anon, authenticated, service_role to {owner}"
            ))
            .await;
        let url = with_login(&database.url, &owner);
        let mut session = connect(&url).await;
        install(&mut session).await.unwrap();
        let found = notes(&url).await;
        assert!(
            found.starts_with("note") && found.contains(missing) && found.lines().count() == 1,
            "{found}"
        );
        let cure = found.split_once("does not exist: ").map(|(_, cure)| cure.split_once(", then").unwrap().0);
        if let Some(cure) = cure {
            database.run(cure).await;
            install(&mut session).await.unwrap();
            assert!(notes(&url).await.starts_with("ok"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_trigger_is_created_again_and_enabled_for_all_sessions_unless_somebody_disabled_it() {
    let database = Database::new().await;
    let mut session = database.connect().await;
    let enabled = "select coalesce((select tgenabled::text from pg_trigger where tgname = '00_relay_broadcasts'), 'none')";
    for (harm, enabled_after, note) in [
        ("enable trigger all", "A", "ok"),
        ("disable trigger \"00_relay_broadcasts\"", "D", "note"),
        ("enable replica trigger \"00_relay_broadcasts\"", "R", "note"),
    ] {
        database.run(&format!("alter table realtime.messages {harm}")).await;
        install(&mut session).await.unwrap();
        assert_eq!(database.value(enabled).await, enabled_after, "{harm}");
        assert!(notes(&database.url).await.starts_with(note), "{harm}");
    }
    database.run("drop trigger \"00_relay_broadcasts\" on realtime.messages").await;
    assert!(notes(&database.url).await.contains("has no trigger of the relay"));
    // A writer keeps the table locked, and is kept waiting by nothing.
    let writer = database.connect().await;
    writer.batch_execute("begin; select realtime.send('{}', 'e', 't', false)").await.unwrap();
    let installing = tokio::spawn(async move { install(&mut session).await });
    for _ in 0..20 {
        database.run("select realtime.send('{}', 'e', 't', false)").await;
    }
    writer.batch_execute("commit").await.unwrap();
    installing.await.unwrap().unwrap();
    assert_eq!(database.value(enabled).await, "A");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_function_of_an_older_relay_is_renewed_and_one_of_somebody_else_is_not() {
    let database = Database::new().await;
    database
        .run(
            "create or replace function realtime.topic() returns text language sql stable as $$ select 'older' $$;
             create or replace function realtime.send_binary(payload bytea, event text, topic text, private boolean default true)
             returns void language sql as 'select null::void';
             comment on function realtime.send_binary(bytea, text, text, boolean) is 'ours';
             drop function realtime.broadcast_changes;
             drop table realtime.messages",
        )
        .await;
    let mut session = database.connect().await;
    install(&mut session).await.unwrap();
    assert_eq!(database.value("select realtime.topic()").await, "");
    assert_eq!(database.value("select realtime.send_binary('x', 'e', 't')").await, "");
    assert_eq!(database.value("select count(*) from realtime.messages").await, "0");
    database
        .run("select realtime.broadcast_changes('t', 'e', 'INSERT', 't', 's', null::record, null::record)")
        .await;
    let versions = "select string_agg(xmin::text, ' ' order by oid) from pg_proc where pronamespace = 'realtime'::regnamespace";
    let before = database.value(versions).await;
    install(&mut session).await.unwrap();
    assert_eq!(database.value(versions).await, before, "what is up to date is not replaced");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partitioned_table_gets_its_next_partitions_and_loses_only_those_that_the_relay_made() {
    let database = Database::bare().await;
    let (_, name) = database.url.rsplit_once('/').unwrap();
    database.run(&SUPABASE.replace("$DB", name)).await;
    database.run("alter table realtime.messages_today rename to messages_2000_01_01").await;
    let mut session = database.connect().await;
    install(&mut session).await.unwrap();
    let parts = "select string_agg(substr(relname, 10), ' ' order by relname) from pg_class where relname ~ '^messages_2' and relkind = 'r'";
    database.run("select relay.make_partitions()").await;
    assert_eq!(database.value(parts).await, "2000_01_01", "its partitions reach as far as is needed");
    database
        .run(
            "drop table realtime.messages_2000_01_01;
             create table realtime.messages_2001_01_01 partition of realtime.messages for values from ('2001-01-01') to ('2001-01-02');
             create table realtime.messages_2001_01_02 partition of realtime.messages for values from ('2001-01-02') to ('2001-01-03');
             comment on table realtime.messages_2001_01_02 is 'made by relay, which drops it after 72 hours'",
        )
        .await;
    assert!(notes(&database.url).await.contains("no partition for tomorrow"));
    database.run("select relay.make_partitions()").await;
    let days = "select '2001_01_01 ' || string_agg(to_char(timezone('UTC', now()) + n * interval '1 day', 'YYYY_MM_DD'), ' ' order by n) from generate_series(0, 3) n";
    assert_eq!(database.value(parts).await, database.value(days).await);
    assert!(notes(&database.url).await.starts_with("ok"));
    database.run("select realtime.send('{}', 'e', 't', false)").await;
    assert_eq!(database.value("select count(*) from relay.changes where operation = 'M'").await, "1");
}
