//! What writers and owners of tables may do beside plain inserts: two-phase commits, savepoints by the thousand, keys that
//! change places, tables without a key, transactions held open, tables dropped and changelogs locked.

use serde_json::{Value, json};

use crate::delivery::crash::Cluster;
use crate::support::client::Client;
use crate::support::database::{connect, make_logins};
use crate::support::relay::Relay;
use crate::support::stage::Stage;
use crate::support::{eventually, token};

fn user() -> String {
    token("authenticated", None, json!({}))
}

/// `t` with these columns, which every role may read.
async fn stage(columns: &str) -> Stage {
    Stage::new(&format!(
        "create table t ({columns}); grant select on t to authenticated; select relay.watch('t')"
    ))
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prepared_transaction_is_told_once_it_is_committed_where_the_doorbell_is_off() {
    let cluster = Cluster::start(&["-c", "max_prepared_transactions=4", "-c", "fsync=off"]).await;
    let mut session = connect(&cluster.url).await;
    relay::postgres::install::install(&mut session).await.unwrap();
    make_logins(&session).await;
    session
        .batch_execute(
            "create table t (id int primary key); grant select on t to authenticated; select relay.watch('t')",
        )
        .await
        .unwrap();
    let relay = Relay::with(&cluster.url, |settings| settings.poll_ms = Some(20)).await;
    let mut client = Client::connect(&relay, &user()).await;
    client.subscribe("realtime:t", json!([{"event": "*", "schema": "public", "table": "t"}])).await;
    eventually("the relay sleeps, so that writers ring", || async {
        let row = session.query_one("select asleep from relay.health", &[]).await.unwrap();
        row.get::<_, bool>(0).then_some(())
    })
    .await;
    let refused = session.batch_execute("begin; insert into t values (0); prepare transaction 'loud'").await;
    assert!(refused.unwrap_err().as_db_error().unwrap().message().contains("NOTIFY"));
    session.batch_execute("rollback; set relay.doorbell = 'off'").await.unwrap();
    for sql in [
        "begin; insert into t values (1); prepare transaction 'one'",
        "begin; insert into t values (2); prepare transaction 'two'",
        "insert into t values (3)",
    ] {
        session.batch_execute(sql).await.unwrap();
    }
    assert_eq!(client.change().await["record"]["id"], 3);
    session.batch_execute("rollback prepared 'two'").await.unwrap();
    session.batch_execute("insert into t values (4)").await.unwrap();
    assert_eq!(client.change().await["record"]["id"], 4);
    session.batch_execute("commit prepared 'one'").await.unwrap();
    assert_eq!(client.change().await["record"]["id"], 1);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_thousand_savepoints_only_what_was_kept_is_told() {
    let stage = stage("id int primary key").await;
    let mut client = stage.join(&user()).await;
    let step = |id: i32| {
        let end = if id % 3 == 0 { "rollback to" } else { "release" };
        format!("savepoint s; insert into t values ({id}); {end} s;")
    };
    stage.run(&format!("begin; {} commit", (1..=1000).map(step).collect::<String>())).await;
    let told = stage.changes(&mut client).await;
    let ids: Vec<i64> = told.iter().map(|change| change["record"]["id"].as_i64().unwrap()).collect();
    assert_eq!(ids, (1..=1000).filter(|id| id % 3 != 0).collect::<Vec<i64>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_change_their_keys_are_told_with_the_old_key_and_the_new_one() {
    let stage = stage("id int primary key deferrable, v text").await;
    let mut client = stage.join(&user()).await;
    stage.run("insert into t values (1, 'a'), (2, 'b'), (3, 'c')").await;
    assert_eq!(stage.told(&mut client).await.len(), 3);
    // Two change places, one moves away, and another comes to where it was.
    stage.run("update t set id = 3 - id where id in (1, 2); update t set id = 9 where id = 3").await;
    stage.run("insert into t values (3, 'd')").await;
    let expected = [
        r#"UPDATE {"id":2,"v":"a"} {"id":1}"#,
        r#"UPDATE {"id":1,"v":"b"} {"id":2}"#,
        r#"UPDATE {"id":9,"v":"c"} {"id":3}"#,
        r#"INSERT {"id":3,"v":"d"}"#,
    ];
    assert_eq!(stage.told(&mut client).await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_without_a_key_is_told_of_with_empty_old_rows_or_whole_ones() {
    let stage = stage("v text").await;
    let mut client = stage.join(&user()).await;
    stage.run("insert into t values ('a'), ('a'); update t set v = 'b'; delete from t").await;
    let expected = [
        r#"INSERT {"v":"a"}"#,
        r#"INSERT {"v":"a"}"#,
        r#"UPDATE {"v":"b"} {}"#,
        r#"UPDATE {"v":"b"} {}"#,
        "DELETE {}",
        "DELETE {}",
    ];
    assert_eq!(stage.told(&mut client).await, expected);
    stage.run("alter table t replica identity full; insert into t values ('c'); update t set v = 'd'; delete from t").await;
    let expected = [r#"INSERT {"v":"c"}"#, r#"UPDATE {"v":"d"} {"v":"c"}"#, r#"DELETE {"v":"d"}"#];
    assert_eq!(stage.told(&mut client).await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_held_open_delays_no_other_and_makes_no_poll_slower() {
    let stage = stage("id int primary key").await;
    let mut client = stage.join(&user()).await;
    let holder = stage.database.connect().await;
    holder.batch_execute("begin; insert into t values (-1)").await.unwrap();
    let ((), told) = tokio::join!(
        stage
            .run("do $$ begin for id in 1 .. 20000 loop insert into t values (id); commit; end loop; end $$"),
        client.changes_until(|change| change["record"]["id"] == 20_000),
    );
    assert_eq!(told.len(), 20_000);
    // What a look reads of the 20,000 changes that the open transaction is older than: pages of the index and the table.
    let seen = stage.database.value("select pg_current_snapshot()").await;
    stage.run("insert into t values (20001)").await;
    let session = stage.database.connect().await;
    session.batch_execute("set enable_seqscan = off").await.unwrap();
    let explained =
        format!("explain (analyze, buffers, format json) select * from relay.page('{seen}', null, 0)");
    let plan: String = session
        .simple_query(&explained)
        .await
        .unwrap()
        .iter()
        .find_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        })
        .unwrap();
    let plan: Value = serde_json::from_str(&plan).unwrap();
    let pages = plan[0]["Plan"]["Shared Hit Blocks"].as_i64().unwrap()
        + plan[0]["Plan"]["Shared Read Blocks"].as_i64().unwrap();
    assert!(pages < 100, "{pages} pages: {plan}");
    holder.batch_execute("commit").await.unwrap();
    assert_eq!(stage.told(&mut client).await, [r#"INSERT {"id":20001}"#, r#"INSERT {"id":-1}"#]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_dropped_is_told_of_as_a_gap_and_ends_the_channel() {
    let stage = stage("id int primary key").await;
    let mut client = Client::connect(&stage.relay, &user()).await;
    client.subscribe("realtime:t", json!([{"event": "*", "schema": "public", "table": "t"}])).await;
    let mut other = stage.join(&user()).await;
    stage.run("insert into t values (1); drop table t").await;
    let mut told = Vec::new();
    while told.len() < 2 {
        let frame = client.frame().await;
        if frame[3] == "system" {
            told.push(frame[4]["message"].as_str().unwrap().to_owned());
        }
    }
    assert!(
        told[0].starts_with("Gap: ") && told[1].starts_with("Unable to subscribe to changes"),
        "{told:?}"
    );
    // No other writer is disturbed.
    stage.changes(&mut other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_whose_trigger_is_disabled_or_dropped_is_told_of_as_a_gap_and_refused_until_it_is_watched_anew()
 {
    let stage = stage("id int primary key").await;
    let binding = json!({"event": "*", "schema": "public", "table": "t"});
    let trigger =
        stage.database.value("select tgname from pg_trigger where tgrelid = 't'::regclass order by 1").await;
    for (id, change) in [
        (1, String::from("alter table t disable trigger all")),
        (2, String::from("alter table t disable trigger user")),
        (3, format!("drop trigger \"{trigger}\" on t")),
    ] {
        let mut client = stage.subscribe(&user(), json!([binding])).await;
        stage.run(&change).await;
        let mut told = Vec::new();
        while told.len() < 2 {
            let frame = client.frame().await;
            assert_eq!(frame[3], "system", "{frame}");
            told.push(frame[4]["message"].as_str().unwrap().to_owned());
        }
        assert!(told[0].starts_with("Gap: ") && told[1].contains("The table must be watched"), "{told:?}");
        assert!(
            stage.answer(&user(), binding.clone()).await.contains("The table must be watched"),
            "{change}"
        );
        stage.run("select relay.watch('t')").await;
        let mut client = stage.subscribe(&user(), json!([binding])).await;
        stage.run(&format!("insert into t values ({id})")).await;
        assert_eq!(stage.told(&mut client).await, [format!(r#"INSERT {{"id":{id}}}"#)]);
    }
    // Enabled again it captures everything, whatever it was enabled for; what was written meanwhile may be missing.
    let mut client = stage.subscribe(&user(), json!([binding])).await;
    for (id, change) in [
        (8, format!("alter table t enable replica trigger \"{trigger}\"")),
        (
            9,
            String::from(
                "begin; alter table t disable trigger all; alter table t enable trigger all; commit",
            ),
        ),
    ] {
        stage.run(&format!("{change}; insert into t values ({id})")).await;
        let gap = client.frame().await;
        assert!(gap[4]["message"].as_str().unwrap().starts_with("Gap: "), "{change}: {gap}");
        assert_eq!(stage.told(&mut client).await, [format!(r#"INSERT {{"id":{id}}}"#)]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_follows_a_whole_schema_and_may_see_a_table_is_told_when_it_is_watched_no_more() {
    for change in ["alter table t disable trigger all", "select relay.unwatch('t')", "drop table t"] {
        let stage = stage("id int primary key").await;
        let mut ann = stage.join(&user()).await;
        let mut stranger = stage.join(&token("anon", None, json!({}))).await;
        stage.run("insert into t values (1)").await;
        assert_eq!(stage.told(&mut ann).await.len(), 1);
        assert_eq!(stage.told(&mut stranger).await.len(), 0);
        stage.run(&format!("{change}; insert into marker values (default), (default)")).await;
        for (client, expected) in [(&mut ann, 1), (&mut stranger, 0)] {
            let mut gaps = 0;
            let mut markers = 0;
            while markers < 2 {
                let frame = client.frame().await;
                gaps += i32::from(frame[4]["message"].as_str().is_some_and(|text| text.starts_with("Gap: ")));
                markers += i32::from(frame[4]["data"]["table"] == "marker");
            }
            assert_eq!(gaps, expected, "{change}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_locked_changelog_delays_changes_and_loses_none() {
    let stage = stage("id int primary key").await;
    let mut client = stage.join(&user()).await;
    stage.run("insert into t values (1)").await;
    assert_eq!(stage.told(&mut client).await.len(), 1);
    let (holder, writer) = (stage.database.connect().await, stage.database.connect().await);
    holder.batch_execute("begin; lock relay.log, relay.log_0 in access exclusive mode").await.unwrap();
    let writing = tokio::spawn(async move { writer.batch_execute("insert into t values (2)").await });
    eventually("the writer and the relay wait", || async {
        let waiting = "select count(*) >= 2 from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()";
        stage.run("select pg_notify('relay', '')").await;
        (stage.database.value(waiting).await == "t").then_some(())
    })
    .await;
    holder.batch_execute("rollback").await.unwrap();
    writing.await.unwrap().unwrap();
    assert_eq!(stage.told(&mut client).await, [r#"INSERT {"id":2}"#]);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_replication_brings_are_told() {
    let (from, to) = (Cluster::start(&["-c", "wal_level=logical"]).await, Cluster::start(&[]).await);
    let table = "create table t (id int primary key, v text)";
    let source = connect(&from.url).await;
    source.batch_execute(&format!("{table}; insert into t values (1, 'before')")).await.unwrap();
    source.batch_execute("create publication p for table t").await.unwrap();
    let mut session = connect(&to.url).await;
    relay::postgres::install::install(&mut session).await.unwrap();
    make_logins(&session).await;
    session
        .batch_execute(&format!("{table}; grant select on t to authenticated; select relay.watch('t')"))
        .await
        .unwrap();
    let relay = Relay::start(&to.url).await;
    let mut client = Client::connect(&relay, &user()).await;
    client.subscribe("realtime:t", json!([{"event": "*", "schema": "public", "table": "t"}])).await;
    session
        .batch_execute(&format!("create subscription s connection '{}' publication p", from.url))
        .await
        .unwrap();
    assert_eq!(client.change().await["record"], json!({"id": 1, "v": "before"}));
    source
        .batch_execute(
            "insert into t values (2, 'a'); update t set v = 'b' where id = 2; delete from t where id = 1",
        )
        .await
        .unwrap();
    let mut told = Vec::new();
    for _ in 0..3 {
        let change = client.change().await;
        told.push((change["type"].as_str().unwrap().to_owned(), change["record"]["v"].clone()));
    }
    assert_eq!(
        told,
        [("INSERT", json!("a")), ("UPDATE", json!("b")), ("DELETE", Value::Null)]
            .map(|(kind, v)| (kind.to_owned(), v))
    );
    session.batch_execute("drop subscription s").await.unwrap();
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn watching_behind_an_open_transaction_keeps_no_writer_waiting() {
    for call in ["select relay.watch('w')", "select relay.unwatch('t')", "select relay.watch('t')"] {
        let stage = stage("id int primary key").await;
        stage.run("create table w (id int primary key)").await;
        if call == "select relay.watch('t')" {
            stage.run("drop trigger \"00_relay_capture_2_insert\" on t").await;
        }
        let holder = stage.database.connect().await;
        holder.batch_execute("begin; insert into w values (1); insert into t values (1)").await.unwrap();
        let caller = stage.database.connect().await;
        let watching = tokio::spawn(async move { caller.batch_execute(call).await });
        let waits = "select count(*) from pg_stat_activity where query like 'select relay.%watch(%' and pid <> pg_backend_pid() and state = 'active'
                     and datname = current_database()";
        eventually("the call", async || (stage.database.value(waits).await == "1").then_some(())).await;
        for id in 2..12 {
            let writer = stage.database.connect().await;
            writer
                .batch_execute(&format!(
                    "set lock_timeout = '1s'; insert into w values ({id}); insert into t values ({id})"
                ))
                .await
                .unwrap_or_else(|error| panic!("{call}: {error:?}"));
        }
        assert!(!watching.is_finished(), "{call} did not wait");
        holder.batch_execute("commit").await.unwrap();
        watching.await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trigger_that_fires_before_those_of_the_relay_is_noted() {
    let stage = stage("id int primary key").await;
    stage.run("create function f() returns trigger language plpgsql as $$ begin return null; end $$").await;
    for (trigger, is_noted) in [
        ("\"!x\" after update on t for each row", true),
        ("\"000\" after insert or update on t for each row", true),
        ("\"00_a\" after delete on t for each row", true),
        ("\"00_s\" after delete on t for each row", false),
        ("aaa after update on t for each row", false),
        ("\"00_b\" before update on t for each row", false),
        ("\"00_c\" after update on t for each statement", false),
        ("\"00_d\" after truncate on t for each statement", false),
    ] {
        stage.run(&format!("create trigger {trigger} execute function f()")).await;
        let noted = "select count(*) from unnest(relay.notes('t')) n where n like 'trigger % fires before%'";
        assert_eq!(stage.database.value(noted).await == "1", is_noted, "{trigger}");
        stage.run(&format!("drop trigger {} on t", trigger.split(' ').next().unwrap())).await;
    }
}
