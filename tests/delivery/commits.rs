//! Transactions as clients see them: one commit timestamp for all changes of each, and a mark on the last one that is told.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::delivery::crash::Cluster;
use crate::support::client::Client;
use crate::support::database::{connect, make_logins};
use crate::support::http::{Events, get};
use crate::support::relay::Relay;
use crate::support::stage::Stage;
use crate::support::{ANN, BOB, token};

const TABLES: &str =
    "create table t (id int primary key, owner uuid, v text); alter table t enable row level security;
     create policy own on t using (owner = auth.uid()); create table u (like t including all);
     grant select on t, u to authenticated; select relay.watch('t'), relay.watch('u')";

fn ann() -> String {
    token("authenticated", Some(ANN), json!({}))
}

/// All changes since a cursor, by polls.
async fn polled(relay: &Relay, table: &str, mut since: String) -> Vec<Value> {
    let mut changes = Vec::new();
    loop {
        let path = format!("/realtime/v1/changes?table={table}&wait=0&since={since}&apikey={}", ann());
        let answer = get(relay.address, &path, "").await;
        assert_eq!(answer.status, 200, "{answer:?}");
        changes.extend(answer.body["changes"].as_array().unwrap().iter().cloned());
        since = answer.body["cursor"].as_str().unwrap().to_owned();
        if answer.body["more"] != true {
            return changes;
        }
    }
}

/// A socket that is told cursors, with a channel for these tables.
async fn exact(relay: &Relay, more: &str, tables: &[&str]) -> Client {
    let mut client = Client::at(relay.address, &ann(), more).await.unwrap();
    let bindings: Vec<_> =
        tables.iter().map(|table| json!({"event": "*", "schema": "public", "table": table})).collect();
    client.subscribe("realtime:t", Value::Array(bindings)).await;
    client
}

fn text(change: &Value, name: &str) -> String {
    change[name].as_str().unwrap_or_else(|| panic!("{name} in {change}")).to_owned()
}

/// The commit timestamps that are told of each transaction.
fn times(changes: &[Value]) -> BTreeMap<String, BTreeSet<String>> {
    let mut times = BTreeMap::<_, BTreeSet<_>>::new();
    for change in changes {
        times.entry(text(change, "txid")).or_default().insert(text(change, "commit_timestamp"));
    }
    times
}

/// The numbers of the changes with the mark, which must be the last ones told of their transactions.
#[track_caller]
fn check_marks(changes: &[Value]) {
    let mut last = BTreeMap::new();
    for change in changes {
        last.insert(text(change, "txid"), text(change, "number"));
        assert!([None, Some(&json!(true))].contains(&change.get("last")), "{change}");
    }
    let marked = changes.iter().filter(|change| change["last"] == true);
    let marked: BTreeMap<_, _> =
        marked.map(|change| (text(change, "txid"), text(change, "number"))).collect();
    assert_eq!(marked, last);
    let count = changes.iter().filter(|change| change["last"] == true).count();
    assert_eq!(count, last.len(), "each is marked once");
}

/// The time of the latest change of each transaction, as the changelog has it.
async fn latest(stage: &Stage) -> BTreeMap<String, BTreeSet<String>> {
    let rows = stage
        .database
        .client
        .query(
            "select xid::text, to_char(max(at) at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')
             from relay.changes where relation <> 0 group by xid",
            &[],
        )
        .await
        .unwrap();
    rows.iter().map(|row| (row.get(0), BTreeSet::from([row.get(1)]))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn all_changes_of_a_transaction_have_one_commit_timestamp_however_they_are_told() {
    let stage = Stage::new(TABLES).await;
    let since = stage.database.value("select relay.cursor()").await;
    let mut plain = stage.join(&ann()).await;
    let mut sockets = Vec::new();
    for more in ["&cursor=true", "&session=5e551011-0000-4000-8000-000000000001"] {
        sockets.push(exact(&stage.relay, more, &["t", "u"]).await);
    }
    let path = format!("/realtime/v1/changes?table=t&apikey={}", ann());
    let mut events = Events::open(stage.relay.address, &path, Some(&since)).await;
    let other = stage.database.connect().await;
    let insert =
        |table: &str, id: i32| format!("insert into {table} values ({id}, '{ANN}'); select pg_sleep(0.01);");
    // Two transactions whose changes lie between each other's, one with work of it taken back.
    stage.run(&format!("begin; {} {}", insert("t", 1), insert("u", 1))).await;
    other.batch_execute(&format!("begin; {} savepoint s; {}", insert("t", 2), insert("t", 3))).await.unwrap();
    stage.run(&format!("update t set v = 'a'; {}", insert("t", 4))).await;
    other.batch_execute(&format!("rollback to s; {} commit", insert("u", 2))).await.unwrap();
    stage.run(&format!("delete from t where id = 4; {} commit", insert("t", 5))).await;
    let latest = latest(&stage).await;
    let of_t: BTreeMap<_, _> = latest.clone();
    for mut client in sockets {
        let mut changes = Vec::new();
        for _ in 0..8 {
            changes.push(client.change().await);
        }
        assert_eq!(times(&changes), latest);
        check_marks(&changes);
    }
    let mut streamed = Vec::new();
    for _ in 0..6 {
        streamed.push(events.next().await.unwrap().data);
    }
    let polled = polled(&stage.relay, "t", since).await;
    for changes in [streamed, polled] {
        assert_eq!(changes.len(), 6);
        assert_eq!(times(&changes), of_t);
        check_marks(&changes);
    }
    let mut told = BTreeSet::new();
    for change in stage.changes(&mut plain).await {
        assert!(change.get("txid").is_none() && change.get("last").is_none(), "{change}");
        told.insert(text(&change, "commit_timestamp"));
    }
    let latest: BTreeSet<_> = latest.values().flatten().map(|time| format!("{}Z", &time[..23])).collect();
    assert_eq!(told, latest);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_of_many_parts_has_one_commit_timestamp_and_one_last_change() {
    let stage = Stage::new(TABLES).await;
    let since = stage.database.value("select relay.cursor()").await;
    let mut both = exact(&stage.relay, "&cursor=true", &["t", "u"]).await;
    let mut of_u = exact(&stage.relay, "&cursor=true", &["u"]).await;
    // One that is told in a few parts, and one of which the rest is told beside the feed.
    for (first, last) in [(1, 700), (1001, 5600)] {
        stage
            .run(&format!(
                "begin; insert into u values ({first}, '{ANN}');
                 insert into t select i, '{ANN}' from generate_series({first}, {first} + 299) i; select pg_sleep(0.01);
                 insert into t select i, '{ANN}' from generate_series({first} + 300, {last}) i; commit"
            ))
            .await;
    }
    let latest = latest(&stage).await;
    let is_end = |change: &Value| change["record"]["id"] == 5600;
    let told = both.changes_until(is_end).await;
    assert_eq!(told.len(), 701 + 4601);
    let mut of_u_told = Vec::new();
    for _ in 0..2 {
        of_u_told.push(of_u.change().await);
    }
    for changes in [
        told,
        of_u_told,
        polled(&stage.relay, "t", since.clone()).await,
        polled(&stage.relay, "u", since).await,
    ] {
        assert_eq!(times(&changes), latest);
        check_marks(&changes);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_change_is_the_last_one_that_the_channel_gets() {
    let stage = Stage::new(TABLES).await;
    let since = stage.database.value("select relay.cursor()").await;
    let mut client = Client::at(stage.relay.address, &ann(), "&cursor=true").await.unwrap();
    let bindings = json!([
        {"event": "INSERT", "schema": "public", "table": "t", "filter": "id=lt.10"},
        {"event": "INSERT", "schema": "public", "table": "t", "select": ["id"]},
        {"event": "UPDATE", "schema": "public", "table": "u"},
    ]);
    client.subscribe("realtime:t", bindings).await;
    stage
        .run(&format!(
            "begin; insert into t values (1, '{ANN}'), (2, '{ANN}'), (3, '{BOB}'); insert into u values (1, '{ANN}'); commit;
             begin; insert into u values (2, '{BOB}'); commit;
             begin; insert into u values (3, '{ANN}'); update u set v = 'a'; delete from u; commit;
             begin; insert into t values (4, '{ANN}'); delete from t where id < 4; commit;
             insert into t values (20, '{ANN}')"
        ))
        .await;
    // What two bindings of one channel select differently comes in two messages.
    let told = client.changes_until(|change| change["record"]["id"] == 20).await;
    let shown: Vec<_> = told
        .iter()
        .map(|change| {
            let last = if change["last"] == true { " last" } else { "" };
            format!("{} {}{last}", text(change, "table"), change["record"]["id"])
        })
        .collect();
    let twice = |id: i32, last: &str| [format!("t {id}"), format!("t {id}{last}")];
    let expected = [
        twice(1, "").to_vec(),
        twice(2, " last").to_vec(),
        vec!["u 1".to_owned(), "u 2".to_owned(), "u 3 last".to_owned()],
    ];
    let expected = expected.concat().into_iter().chain(twice(4, " last")).chain(["t 20 last".to_owned()]);
    assert_eq!(shown, expected.collect::<Vec<_>>());
    let polled = polled(&stage.relay, "u", since).await;
    assert_eq!(polled.len(), 9);
    check_marks(&polled);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_postgresql_keeps_commit_timestamps_they_are_what_is_told() {
    let cluster = Cluster::start(&["-c", "track_commit_timestamp=on"]).await;
    let mut client = connect(&cluster.url).await;
    relay::postgres::install::install(&mut client).await.unwrap();
    make_logins(&client).await;
    client.batch_execute(TABLES).await.unwrap();
    let relay = Relay::start(&cluster.url).await;
    let since: String = client.query_one("select relay.cursor()", &[]).await.unwrap().get(0);
    let mut socket = exact(&relay, "&cursor=true", &["t", "u"]).await;
    for (sql, count) in [
        (format!("insert into t values (1, '{ANN}')"), 1),
        (
            format!(
                "begin; insert into u values (1, '{ANN}'); insert into t values (2, '{ANN}'); select pg_sleep(0.02); commit"
            ),
            2,
        ),
        (format!("insert into t select i, '{ANN}' from generate_series(10, 609) i"), 600),
    ] {
        client.batch_execute(&sql).await.unwrap();
        let mut live = Vec::new();
        for _ in 0..count {
            live.push(socket.change().await);
        }
        let later =
            [polled(&relay, "t", since.clone()).await, polled(&relay, "u", since.clone()).await].concat();
        let committed = "select xid::text, to_char(pg_xact_commit_timestamp(xid::xid) at time zone 'UTC',
                         'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"') from relay.changes where relation <> 0 group by xid";
        let rows = client.query(committed, &[]).await.unwrap();
        let committed: BTreeMap<String, BTreeSet<String>> =
            rows.iter().map(|row| (row.get(0), BTreeSet::from([row.get(1)]))).collect();
        for (xid, times) in times(&live) {
            assert_eq!(Some(&times), committed.get(&xid), "live, {sql}");
        }
        assert_eq!(times(&later), committed, "later, {sql}");
        check_marks(&live);
    }
    relay.stop().await;
}
