//! Sockets that name their session: after any interruption they get what they missed before anything new.

use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime};

use relay::model::log::cursor::Cursor;
use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::proxy::Proxy;
use crate::support::relay::Relay;
use crate::support::stage::Stage;
use crate::support::{ANN, BOB, PATIENCE, eventually, token, token_for};

const NAME: &str = "5e551011-0000-4000-8000-000000000001";

fn ann() -> String {
    token("authenticated", Some(ANN), json!({}))
}

/// `t (id, owner)`: each sees their own rows.
async fn stage() -> Stage {
    Stage::new(
        "create table t (id int primary key, owner uuid); alter table t enable row level security;
         create policy own on t using (owner = auth.uid()); grant select on t to authenticated; select relay.watch('t')",
    )
    .await
}

/// Connects as the session of this name, and joins.
async fn come(relay: &Relay, token: &str, name: &str) -> Client {
    come_at(relay.address, token, name).await
}

async fn come_at(address: std::net::SocketAddr, token: &str, name: &str) -> Client {
    let mut client = Client::at(address, token, &format!("&session={name}")).await.unwrap();
    client.subscribe("realtime:t", bindings()).await;
    client
}

fn bindings() -> Value {
    json!([{"event": "*", "schema": "public", "table": "t"}, {"event": "*", "schema": "public", "table": "marker"}])
}

async fn insert(stage: &Stage, ids: std::ops::Range<i64>) {
    stage
        .run(&format!(
            "insert into t select n, '{ANN}' from generate_series({}, {}) n",
            ids.start,
            ids.end - 1
        ))
        .await;
}

/// What a client was told up to now: ids of `t`, and gaps.
async fn heard(stage: &Stage, client: &mut Client) -> (Vec<i64>, Vec<String>) {
    let marker: i64 =
        stage.database.value("insert into marker default values returning id").await.parse().unwrap();
    let (mut ids, mut gaps) = (Vec::new(), Vec::new());
    loop {
        let frame = client.frame().await;
        let data = &frame[4]["data"];
        match frame[3].as_str() {
            Some("system") if frame[4]["status"] == "error" => {
                gaps.push(frame[4]["message"].as_str().unwrap().to_owned());
            }
            Some("postgres_changes") if data["table"] == "t" => {
                ids.push(data["record"]["id"].as_i64().unwrap());
            }
            Some("postgres_changes") if data["record"]["id"] == marker => return (ids, gaps),
            _ => {}
        }
    }
}

/// Waits until the bookmarks say that everything up to now was received.
async fn bookmarked(stage: &Stage, client: &mut Client) {
    let id: i64 =
        stage.database.value("insert into marker default values returning id").await.parse().unwrap();
    let changes =
        client.changes_until(|change| change["table"] == "marker" && change["record"]["id"] == id).await;
    let cursor = |text: &str| text.parse::<Cursor>().unwrap();
    let here = cursor(changes.last().unwrap()["cursor"].as_str().unwrap());
    let started = Instant::now();
    loop {
        let bookmarks = stage.database.value("select string_agg(cursor, ' ') from relay.bookmarks").await;
        if bookmarks.split(' ').all(|bookmark| cursor(bookmark).is_at_or_after(&here)) {
            return;
        }
        assert!(started.elapsed() < PATIENCE, "the bookmark does not move");
        // The pong is sent when the client reads.
        client.frame_within(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_comes_back_gets_what_it_missed_before_anything_new() {
    let stage = stage().await;
    let mut client = come(&stage.relay, &ann(), NAME).await;
    insert(&stage, 1..4).await;
    assert_eq!(heard(&stage, &mut client).await.0, [1, 2, 3]);
    bookmarked(&stage, &mut client).await;
    drop(client);
    insert(&stage, 4..7).await;
    let mut client = come(&stage.relay, &ann(), NAME).await;
    insert(&stage, 7..8).await;
    assert_eq!(heard(&stage, &mut client).await, (vec![4, 5, 6, 7], vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_into_a_dead_connection_comes_again() {
    let stage = stage().await;
    let proxy = Proxy::start(stage.relay.address).await;
    let mut client = come_at(proxy.address, &ann(), NAME).await;
    insert(&stage, 1..3).await;
    assert_eq!(heard(&stage, &mut client).await.0, [1, 2]);
    bookmarked(&stage, &mut client).await;
    let mut beside = stage.join(&ann()).await;
    proxy.hold();
    insert(&stage, 3..6).await;
    // A client beside it has them: as far as the relay can tell, so has ours.
    assert_eq!(heard(&stage, &mut beside).await.0, [3, 4, 5]);
    proxy.cut();
    drop(client);
    let mut client = come(&stage.relay, &ann(), NAME).await;
    assert_eq!(heard(&stage, &mut client).await, (vec![3, 4, 5], vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_relay_goes_on_where_the_first_one_ended() {
    let stage = stage().await;
    let mut client = come(&stage.relay, &ann(), NAME).await;
    bookmarked(&stage, &mut client).await;
    let other = Relay::start(&stage.database.url).await;
    insert(&stage, 1..3).await;
    assert_eq!(heard(&stage, &mut client).await.0, [1, 2]);
    drop(client);
    insert(&stage, 3..4).await;
    let mut client = come(&other, &ann(), NAME).await;
    let (ids, gaps) = heard(&stage, &mut client).await;
    // What was told a moment ago may come again, in order.
    assert!(ids.ends_with(&[3]) && ids.is_sorted(), "{ids:?} {gaps:?}");
    other.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_identity_with_the_same_session_name_gets_nothing_of_it() {
    let stage = stage().await;
    let mut client = come(&stage.relay, &ann(), NAME).await;
    bookmarked(&stage, &mut client).await;
    drop(client);
    insert(&stage, 1..3).await;
    let mut stranger = come(&stage.relay, &token("authenticated", Some(BOB), json!({})), NAME).await;
    stage.run(&format!("insert into t values (9, '{BOB}')")).await;
    assert_eq!(heard(&stage, &mut stranger).await, (vec![9], vec![]));
    let mut client = come(&stage.relay, &ann(), NAME).await;
    assert_eq!(heard(&stage, &mut client).await, (vec![1, 2], vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_channel_that_was_left_begins_anew() {
    let stage = stage().await;
    let mut client = come(&stage.relay, &ann(), NAME).await;
    bookmarked(&stage, &mut client).await;
    client.push(Some("1"), "realtime:t", "phx_leave", json!({})).await;
    eventually("the bookmark is dropped", || async {
        (stage.database.value("select count(*) from relay.bookmarks").await == "0").then_some(())
    })
    .await;
    let mut beside = stage.join(&ann()).await;
    insert(&stage, 1..3).await;
    assert_eq!(heard(&stage, &mut beside).await.0, [1, 2]);
    client.subscribe("realtime:t", bindings()).await;
    insert(&stage, 3..4).await;
    assert_eq!(heard(&stage, &mut client).await, (vec![3], vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_channel_that_was_left_before_it_was_subscribed_begins_anew() {
    let stage = stage().await;
    let mut client = come(&stage.relay, &ann(), NAME).await;
    bookmarked(&stage, &mut client).await;
    drop(client);
    let mut beside = stage.join(&ann()).await;
    insert(&stage, 1..3).await;
    assert_eq!(heard(&stage, &mut beside).await.0, [1, 2]);
    let holder = stage.database.connect().await;
    holder.batch_execute("begin; lock relay.bookmarks in access exclusive mode").await.unwrap();
    let mut client = Client::at(stage.relay.address, &ann(), &format!("&session={NAME}")).await.unwrap();
    client.try_join("realtime:t", bindings()).await.unwrap();
    client.push(Some("1"), "realtime:t", "phx_leave", json!({})).await;
    while client.frame().await[3] != "phx_close" {}
    holder.batch_execute("rollback").await.unwrap();
    client.subscribe("realtime:t", bindings()).await;
    insert(&stage, 3..4).await;
    assert_eq!(heard(&stage, &mut client).await, (vec![3], vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_returns_too_late_gets_a_gap() {
    let stage = Stage::with(
        "create table t (id int primary key, owner uuid); grant select on t to authenticated; select relay.watch('t')",
        |settings, _| settings.resume_seconds = Some(600),
    )
    .await;
    let mut client = come(&stage.relay, &ann(), NAME).await;
    bookmarked(&stage, &mut client).await;
    drop(client);
    let mut other = stage.subscribe(&ann(), bindings()).await;
    insert(&stage, 1..3).await;
    stage.run("update relay.bookmarks set at = at - interval '11 minutes', owner = gen_random_uuid()").await;
    // What is told only after it came back is no more than new to it.
    for id in 1..3 {
        assert_eq!(other.change().await["record"]["id"], id);
    }
    let mut client = come(&stage.relay, &ann(), NAME).await;
    insert(&stage, 3..4).await;
    let (ids, gaps) = heard(&stage, &mut client).await;
    assert_eq!(ids, [3]);
    assert!(gaps.len() == 1 && gaps[0].starts_with("Gap: this session was disconnected"), "{gaps:?}");
    // From there on it is resumed again.
    bookmarked(&stage, &mut client).await;
    drop(client);
    insert(&stage, 4..5).await;
    let mut client = come(&stage.relay, &ann(), NAME).await;
    assert_eq!(heard(&stage, &mut client).await, (vec![4], vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_absence_is_given_back_as_fast_as_the_client_reads() {
    let stage = stage().await;
    let mut client = come(&stage.relay, &ann(), NAME).await;
    bookmarked(&stage, &mut client).await;
    drop(client);
    insert(&stage, 1..20_001).await;
    stage.run(&format!("insert into t values (0, '{BOB}')")).await;
    let mut client = come(&stage.relay, &ann(), NAME).await;
    insert(&stage, 20_001..20_002).await;
    let (ids, gaps) = heard(&stage, &mut client).await;
    assert_eq!(gaps, [""; 0]);
    assert!(ids.iter().copied().eq(1..20_002), "{} ids, sorted: {}", ids.len(), ids.is_sorted());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_renewed_while_the_past_is_read_repeats_nothing_of_it() {
    // An outbox that has room for much is filled in one go.
    let stage = Stage::with(
        "create table t (id int primary key, owner uuid); grant select on t to authenticated; select relay.watch('t')",
        |settings, _| settings.outbox_bytes = Some(64 << 20),
    )
    .await;
    let mut client = come(&stage.relay, &ann(), NAME).await;
    bookmarked(&stage, &mut client).await;
    drop(client);
    insert(&stage, 1..20_001).await;
    // So that it is past.
    let mut beside = stage.join(&ann()).await;
    heard(&stage, &mut beside).await;
    let mut client = come(&stage.relay, &ann(), NAME).await;
    for expected in 1..20_001 {
        assert_eq!(client.change().await["record"]["id"], expected);
        if expected % 500 == 0 {
            let renewed = json!({"access_token": token("authenticated", Some(ANN), json!({"n": expected}))});
            client.push(Some("1"), "realtime:t", "access_token", renewed).await;
        }
    }
    insert(&stage, 20_001..20_002).await;
    assert_eq!(heard(&stage, &mut client).await, (vec![20_001], vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_as_a_table_is_altered_comes_with_the_new_binding() {
    let stage = stage().await;
    let mut client = Client::at(stage.relay.address, &ann(), &format!("&session={NAME}")).await.unwrap();
    let mut filtered = bindings();
    filtered[0]["filter"] = json!("id=gt.0");
    client.subscribe("realtime:t", filtered).await;
    bookmarked(&stage, &mut client).await;
    stage
        .run(&format!("begin; alter table t alter id type bigint; insert into t values (1, '{ANN}'); commit"))
        .await;
    while client.change().await["record"]["id"] != 1 {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_whose_table_is_altered_while_the_past_is_read_goes_on() {
    let stage = stage().await;
    let mut filtered = bindings();
    filtered[0]["filter"] = json!("id=gt.0");
    let (ann, name) = (ann(), format!("&session={NAME}"));
    let connect = || Client::at(stage.relay.address, &ann, &name);
    let mut client = connect().await.unwrap();
    client.subscribe("realtime:t", filtered.clone()).await;
    bookmarked(&stage, &mut client).await;
    drop(client);
    insert(&stage, 1..20_001).await;
    // So that it is past.
    let mut beside = stage.join(&ann).await;
    heard(&stage, &mut beside).await;
    let mut client = connect().await.unwrap();
    client.subscribe("realtime:t", filtered).await;
    client.change().await;
    // Much is left, which waits for this client.
    stage.run("alter table t alter id type bigint").await;
    insert(&stage, 20_001..20_002).await;
    assert!(heard(&stage, &mut beside).await.0.ends_with(&[20_001]));
    let (mut last, started) = (20_001, Instant::now());
    loop {
        let Some(frame) = client.frame_within(Duration::from_millis(200)).await else {
            last += 1;
            assert!(started.elapsed() < PATIENCE, "it receives nothing more");
            insert(&stage, last..last + 1).await;
            continue;
        };
        if frame[4]["data"]["record"]["id"].as_i64().is_some_and(|id| id > 20_001) {
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_subject_with_very_many_bookmarks_the_oldest_go_first() {
    let stage = stage().await;
    drop(come(&stage.relay, &ann(), NAME).await);
    drop(come(&stage.relay, &token("authenticated", Some(BOB), json!({})), NAME).await);
    drop(come(&stage.relay, &token("authenticated", None, json!({})), NAME).await);
    // As if each of them had named many sessions a while ago: ann too many, bob not; and those without a name of their
    // own, who are many.
    stage
        .run(
            "insert into relay.bookmarks select gen_random_uuid(), b.channel, gen_random_uuid(), b.cursor, b.at - interval '1 second' * n
             from (select *, row_number() over () as nth from relay.bookmarks) b, generate_series(1, 12000) n
             where nth <> 2 or n <= 100",
        )
        .await;
    let counts = || async {
        let counts = "select string_agg(count::text, ' ' order by count) from (select count(*) from relay.bookmarks group by channel) c";
        stage.database.value(counts).await
    };
    assert_eq!(counts().await, "101 12001 12001");
    let other = Relay::start(&stage.database.url).await;
    eventually("the oldest are dropped", || async { (counts().await == "101 10000 12001").then_some(()) })
        .await;
    let oldest = "select max(now() - at) < interval '10200 seconds' from relay.bookmarks where get_byte(channel, 0) <> 0";
    assert_eq!(stage.database.value(oldest).await, "t");
    other.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_connections_with_one_name_the_older_is_told_that_it_is_not_resumed() {
    let stage = stage().await;
    let mut older = come(&stage.relay, &ann(), NAME).await;
    let mut newer = come(&stage.relay, &ann(), NAME).await;
    insert(&stage, 1..2).await;
    assert_eq!(heard(&stage, &mut newer).await, (vec![1], vec![]));
    let told = async {
        loop {
            let frame = older.frame().await;
            if frame[3] == "system" && frame[4]["status"] == "error" {
                return frame[4]["message"].as_str().unwrap().to_owned();
            }
            if frame[4]["data"]["table"] == "marker" {
                stage.run("insert into marker default values").await;
            }
        }
    };
    assert!(told.await.starts_with("Gap: another connection took over this session"));
    insert(&stage, 2..3).await;
    assert!(heard(&stage, &mut newer).await.0.ends_with(&[2]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_as_a_token_ends_comes_with_the_next_one() {
    let stage = stage().await;
    // The channel is closed some hundred milliseconds after its token's end, and is not delivered to in between; what
    // comes shortly before makes that the moment in which its client is asked what it has.
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let until = |time: Duration| tokio::time::sleep(time.saturating_sub(now()));
    let second = Duration::from_secs(now().as_secs());
    until(second + Duration::from_millis(1500)).await;
    let short = token_for("authenticated", Some(ANN), json!({}), Duration::from_secs(3));
    let mut client = come(&stage.relay, &short, NAME).await;
    until(second + Duration::from_millis(3700)).await;
    let mut told = BTreeSet::new();
    let mut id = 0;
    // Its pongs go out while it reads.
    while let Ok(frame) = client.try_frame(Duration::from_millis(20)).await {
        let frame = frame.unwrap_or_default();
        if frame[3] == "phx_close" {
            break;
        }
        told.extend(frame[4]["data"]["record"]["id"].as_i64());
        id += 1;
        insert(&stage, id..id + 1).await;
    }
    let mut client = come(&stage.relay, &ann(), NAME).await;
    let (ids, gaps) = heard(&stage, &mut client).await;
    told.extend(ids);
    assert_eq!(gaps, [""; 0]);
    assert!(told.iter().copied().eq(1..=id), "{id} rows, not {}", told.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_after_a_tokens_end_comes_with_the_one_it_is_renewed_by() {
    let stage = stage().await;
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let until = |time: Duration| tokio::time::sleep(time.saturating_sub(now()));
    // As above, the channel is closed half a second after its token's end; the next one comes before that.
    let second = Duration::from_secs(now().as_secs());
    until(second + Duration::from_millis(1500)).await;
    let short = token_for("authenticated", Some(ANN), json!({}), Duration::from_secs(3));
    let mut client = come(&stage.relay, &short, NAME).await;
    until(second + Duration::from_millis(4050)).await;
    let mut beside = stage.join(&ann()).await;
    insert(&stage, 1..2).await;
    assert_eq!(beside.change().await["record"]["id"], 1);
    let renewed = json!({"access_token": ann()});
    client.push(Some("1"), "realtime:t", "access_token", renewed).await;
    loop {
        let frame = client.frame().await;
        assert!(!frame[4]["message"].as_str().is_some_and(|text| text.starts_with("Gap:")), "{frame}");
        match frame[3].as_str() {
            Some("postgres_changes") if frame[4]["data"]["record"]["id"] == 1 => break,
            // On a slow machine it came too late.
            Some("phx_close") => return,
            _ => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_while_a_renewed_token_waits_to_be_bound_comes_with_it() {
    let stage = stage().await;
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let short = token_for("authenticated", Some(ANN), json!({}), Duration::from_secs(4));
    let ended = now() + Duration::from_secs(5);
    let mut client = come(&stage.relay, &short, NAME).await;
    let mut beside = stage.join(&ann()).await;
    let holder = stage.database.connect().await;
    holder.batch_execute("begin; lock table relay.watch_list in access exclusive mode").await.unwrap();
    let renewed = json!({"access_token": ann()});
    client.push(Some("1"), "realtime:t", "access_token", renewed).await;
    let waits = "select count(*) from pg_locks where not granted and relation = 'relay.watch_list'::regclass";
    eventually("it waits to be bound", || async { (stage.database.value(waits).await != "0").then_some(()) })
        .await;
    insert(&stage, 1..2).await;
    tokio::time::sleep(ended.saturating_sub(now())).await;
    holder.batch_execute("rollback").await.unwrap();
    assert_eq!(beside.change().await["record"]["id"], 1);
    assert_eq!(heard(&stage, &mut client).await, (vec![1], vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_renewed_during_an_outage_does_not_take_the_session_from_its_own_connection() {
    let stage = stage().await;
    let (proxy, url) = Proxy::to_server(&stage.database.url).await;
    let relay = Relay::with(&url, |settings| settings.resume_seconds = Some(4)).await;
    let mut client = Client::at(relay.address, &ann(), &format!("&session={NAME}")).await.unwrap();
    // Each try to bind comes twice as long after the one before.
    let began = Instant::now();
    proxy.cut();
    client.try_join("realtime:t", bindings()).await.unwrap();
    while began.elapsed() < Duration::from_millis(1800) {
        proxy.cut();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let renewed = json!({"access_token": token("authenticated", Some(ANN), json!({"n": 1}))});
    client.push(Some("1"), "realtime:t", "access_token", renewed).await;
    while client.frame().await[4]["message"] != "Subscribed to PostgreSQL" {}
    let subscribed = Instant::now();
    let owner = || stage.database.value("select string_agg(owner::text, ' ') from relay.bookmarks");
    let first = owner().await;
    while subscribed.elapsed() < Duration::from_secs(4) {
        assert_eq!(heard(&stage, &mut client).await, (vec![], vec![]));
        assert_eq!(owner().await, first);
    }
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_have_number_time_and_cursor_where_a_client_may_get_them_twice() {
    let stage = stage().await;
    let mut client = come(&stage.relay, &ann(), NAME).await;
    let mut plain = stage.join(&ann()).await;
    insert(&stage, 1..2).await;
    let (change, other) = (client.change().await, plain.change().await);
    assert!(change["cursor"].is_string() && other.get("cursor").is_none());
    let time = |change: &Value| change["commit_timestamp"].as_str().unwrap().to_owned();
    assert_eq!((time(&change).len(), time(&other).len()), (27, 24), "{change} {other}");
    assert_eq!(time(&change)[..23], time(&other)[..23]);
    let mark = stage
        .database
        .value(
            "select xid || ' ' || number from relay.changes where relation > 0 order by number desc limit 1",
        )
        .await;
    let told = |change: &Value| {
        Some(format!("{} {}", change.get("txid")?.as_str()?, change.get("number")?.as_str()?))
    };
    assert_eq!((told(&change), told(&other)), (Some(mark), None), "{change} {other}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_has_a_uuid_for_a_name() {
    let stage = stage().await;
    for name in ["1", "", "5e551011-0000-4000-8000-00000000000g", "%ff"] {
        let Err(refused) = Client::at(stage.relay.address, &ann(), &format!("&session={name}")).await else {
            panic!("{name} is no name");
        };
        assert!(refused.starts_with("400") && refused.contains("session: a UUID is expected"), "{refused}");
    }
}
