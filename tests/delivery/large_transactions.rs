//! A large transaction: readers of its table get all of it, in order; no other reader waits for it.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::http::{Events, get};
use crate::support::stage::Stage;
use crate::support::{ANN, PATIENCE, eventually, token};

const MANY: i64 = 40_000;

fn ann() -> String {
    token("authenticated", Some(ANN), json!({}))
}

/// `t (id, v)` and `other (id)`, which every role may read.
async fn stage() -> Stage {
    Stage::new(
        "create table t (id int primary key, v int default 0); create table other (id int primary key);
         grant select on t, other to authenticated; select relay.watch('t'), relay.watch('other')",
    )
    .await
}

async fn join(stage: &Stage, table: &str, more: &str) -> Client {
    let mut client = Client::at(stage.relay.address, &ann(), more).await.unwrap();
    client
        .subscribe(&format!("realtime:{table}"), json!([{"event": "*", "schema": "public", "table": table}]))
        .await;
    client
}

async fn insert(stage: &Stage, from: i64, to: i64) {
    stage.run(&format!("insert into t select generate_series({from}, {to})")).await;
}

fn id(change: &Value) -> i64 {
    change["record"]["id"].as_i64().unwrap()
}

/// The ids of the changes up to this one, which must be in order and whole.
async fn all_until(client: &mut Client, last: i64) {
    for expected in 1..=last {
        assert_eq!(id(&client.change().await), expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_of_another_table_do_not_wait_for_it() {
    let stage = stage().await;
    let (mut one, mut other) = (join(&stage, "t", "").await, join(&stage, "other", "").await);
    insert(&stage, 1, MANY).await;
    stage.run("insert into other values (1)").await;
    let reading = tokio::spawn(async move {
        all_until(&mut one, MANY).await;
        one
    });
    assert_eq!(id(&other.change().await), 1);
    assert!(!reading.is_finished(), "it came after all of the large one");
    // The reader that was served apart gets later changes after all of it, and from then on with the others.
    stage.run("update t set v = 1 where id = 1; insert into other values (2)").await;
    assert_eq!(id(&other.change().await), 2);
    let mut one = reading.await.unwrap();
    let change = one.change().await;
    assert_eq!((change["type"].as_str(), id(&change)), (Some("UPDATE"), 1));
    insert(&stage, MANY + 1, MANY + 1).await;
    assert_eq!(id(&one.change().await), MANY + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_of_few_of_its_changes_do_not_wait_for_the_rest() {
    let stage = stage().await;
    let (mut one, mut other) = (join(&stage, "t", "").await, join(&stage, "other", "").await);
    stage
        .run(&format!("insert into t select generate_series(1, {MANY}); insert into other values (1), (2)"))
        .await;
    let reading = tokio::spawn(async move { all_until(&mut one, MANY).await });
    for expected in [1, 2] {
        assert_eq!(id(&other.change().await), expected);
    }
    assert!(!reading.is_finished(), "they came after all of the others");
    stage.run("insert into other values (3)").await;
    assert_eq!(id(&other.change().await), 3);
    reading.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_and_polls_that_wait_for_it_get_each_change_once() {
    let stage = stage().await;
    let path = format!("/realtime/v1/changes?table=t&apikey={}", ann());
    let cursor = get(stage.relay.address, &path, "").await.body["cursor"].as_str().unwrap().to_owned();
    let mut events = Events::open(stage.relay.address, &path, Some(&cursor)).await;
    let address = stage.relay.address;
    let polling = tokio::spawn(async move {
        let (mut cursor, mut ids) = (cursor, Vec::new());
        while ids.len() < MANY as usize {
            let answer = get(address, &format!("{path}&since={cursor}"), "").await;
            ids.extend(
                answer.body["changes"].as_array().unwrap_or_else(|| panic!("{answer:?}")).iter().map(id),
            );
            cursor = answer.body["cursor"].as_str().unwrap().to_owned();
        }
        ids
    });
    insert(&stage, 1, MANY).await;
    for expected in 1..=MANY {
        assert_eq!(id(&events.next().await.unwrap().data), expected);
    }
    assert!(polling.await.unwrap().into_iter().eq(1..=MANY));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_channel_may_leave_and_come_while_it_is_told() {
    let stage = stage().await;
    let mut client = join(&stage, "t", "").await;
    insert(&stage, 1, MANY).await;
    all_until(&mut client, 10_000).await;
    client.push(Some("1"), "realtime:t", "phx_leave", json!({})).await;
    while client.frame().await[3] != "phx_close" {}
    assert_eq!(client.frame_within(Duration::from_millis(300)).await, None, "nothing comes after the leave");
    client.subscribe("realtime:t", json!([{"event": "*", "schema": "public", "table": "t"}])).await;
    insert(&stage, MANY + 1, MANY + 1).await;
    while id(&client.change().await) != MANY + 1 {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_is_cut_off_in_the_middle_gets_the_rest() {
    let stage = stage().await;
    let session = "&session=5e551011-0000-4000-8000-000000000002";
    let mut client = join(&stage, "t", session).await;
    insert(&stage, 1, MANY).await;
    all_until(&mut client, 15_000).await;
    drop(client);
    let mut client = join(&stage, "t", session).await;
    let first = id(&client.change().await);
    assert!((1..=15_001).contains(&first), "{first}");
    for expected in first + 1..=MANY {
        assert_eq!(id(&client.change().await), expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_takes_its_time_does_not_make_the_others_wait() {
    let stage = stage().await;
    let mut other = join(&stage, "other", "").await;
    let mut slow = join(&stage, "t", "").await;
    insert(&stage, 1, MANY).await;
    // The slow reader reads a little each time that the other has received a change. If the other waited for it, that change
    // would never come.
    let mut expected = 1;
    for n in 1..=20 {
        stage.run(&format!("insert into other values ({n})")).await;
        assert_eq!(id(&other.change().await), n);
        for _ in 0..25 {
            assert_eq!(id(&slow.change().await), expected);
            expected += 1;
        }
    }
    while expected <= MANY {
        match slow.try_frame(PATIENCE).await {
            Ok(Some(frame)) => assert_eq!(id(&frame[4]["data"]), expected),
            // It was too slow for the bound of its outbox. The reason may be lost where the connection is reset.
            end => {
                assert_eq!(stage.relay.figure("relay_sessions_closed_full_total"), 1, "{end:?}");
                return;
            }
        }
        expected += 1;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reading_it_by_polls_costs_in_proportion_to_its_size() {
    let stage = stage().await;
    let path = format!("/realtime/v1/changes?table=t&apikey={}", ann());
    let mut cursor = get(stage.relay.address, &path, "").await.body["cursor"].as_str().unwrap().to_owned();
    insert(&stage, 1, MANY).await;
    let (mut ids, mut polls) = (0, 0);
    while ids < MANY {
        let answer = get(stage.relay.address, &format!("{path}&since={cursor}&wait=0"), "").await;
        ids += answer.body["changes"].as_array().unwrap_or_else(|| panic!("{answer:?}")).len() as i64;
        cursor = answer.body["cursor"].as_str().unwrap().to_owned();
        polls += 1;
    }
    assert!(polls >= 10, "{polls}: more would be needed to tell");
    // A session counts what it read at the latest when it ends.
    stage.relay.stop().await;
    let others = "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()";
    eventually("the relay's sessions end", || async {
        (stage.database.value(others).await == "0").then_some(())
    })
    .await;
    let read = "select idx_tup_fetch + seq_tup_read from pg_stat_all_tables where relname = 'log_0'";
    let read: i64 = stage.database.value(read).await.parse().unwrap();
    assert!(read < 12 * MANY, "{polls} polls read {read} rows of the changelog");
}
