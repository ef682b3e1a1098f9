//! Readers with a cursor at the worst moments: nothing is lost between an answer and the next request.

use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::support::http::{Events, get};
use crate::support::stage::Stage;
use crate::support::{ANN, token};

const SQL: &str = "create table t (id int primary key, v text); grant select on t to authenticated; select relay.watch('t')";

fn ann() -> String {
    token("authenticated", Some(ANN), json!({}))
}

fn path(token: &str) -> String {
    format!("/realtime/v1/changes?table=t&apikey={token}")
}

async fn cursor(stage: &Stage) -> String {
    text(&get(stage.relay.address, &path(&ann()), "").await.body["cursor"])
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value}")).to_owned()
}

fn id(change: &Value) -> i64 {
    change["record"]["id"].as_i64().unwrap()
}

/// The ids of all changes up to this one after a cursor.
async fn polled(stage: &Stage, mut since: String, last: i64) -> Vec<i64> {
    let mut ids = Vec::new();
    while ids.last() != Some(&last) {
        let answer = get(stage.relay.address, &format!("{}&since={since}&wait=5", path(&ann())), "").await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let changes = answer.body["changes"].as_array().unwrap();
        assert!(!changes.is_empty(), "{last} never came, but {ids:?}");
        ids.extend(changes.iter().map(id));
        since = text(&answer.body["cursor"]);
    }
    ids
}

/// Sleeps until this time after the beginning of 1970.
async fn until(time: Duration) {
    tokio::time::sleep(time.saturating_sub(now())).await;
}

fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_lost_before_its_first_event_gets_what_it_missed_when_it_comes_back() {
    let stage = Stage::new(SQL).await;
    let cursor = cursor(&stage).await;
    stage.run("insert into t values (1), (2)").await;
    assert_eq!(polled(&stage, cursor.clone(), 2).await, [1, 2]);
    let lost = Events::open(stage.relay.address, &path(&ann()), Some(&cursor)).await;
    let last = lost.last.clone();
    drop(lost);
    let mut events = Events::open(stage.relay.address, &path(&ann()), Some(&last)).await;
    stage.run("insert into t values (3)").await;
    for expected in 1..=3 {
        assert_eq!(id(&events.next().await.unwrap().data), expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poll_for_which_there_is_no_room_moves_no_cursor() {
    let stage = Stage::with(SQL, |settings, _| settings.total_outbox_bytes = Some(1 << 20)).await;
    let cursor = cursor(&stage).await;
    stage.run("insert into t select n, repeat('x', 1600) from generate_series(1, 5000) n").await;
    let answer = get(stage.relay.address, &format!("{}&since={cursor}", path(&ann())), "").await;
    let told = answer.body["changes"].as_array().is_some_and(|changes| !changes.is_empty());
    let moved = answer.body["cursor"].as_str().is_some_and(|moved| moved != cursor);
    assert!(told || !moved, "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_poll_reads_as_its_token_ends_is_for_the_next_one() {
    let stage = Stage::new(SQL).await;
    let cursor = cursor(&stage).await;
    // More than is kept at hand for one client.
    stage.run("insert into t select n, repeat('x', 100) from generate_series(1, 3000) n").await;
    let mut beside = stage.join(&ann()).await;
    stage.changes(&mut beside).await;
    let end = Duration::from_secs(now().as_secs() + 4);
    let short = token("authenticated", Some(ANN), json!({"exp": end.as_secs()}));
    let lock = stage.database.connect().await;
    // As long as no reader of the past has its turn: it tells no more than a part of it then.
    until(end.saturating_sub(Duration::from_millis(2500))).await;
    lock.batch_execute("begin; lock table relay.log in access exclusive mode").await.unwrap();
    let (address, request) = (stage.relay.address, format!("{}&since={cursor}", path(&short)));
    let poll = tokio::spawn(async move { get(address, &request, "").await });
    until(end + Duration::from_millis(300)).await;
    lock.batch_execute("rollback").await.unwrap();
    let answer = poll.await.unwrap();
    let mut ids: Vec<i64> = answer.body["changes"].as_array().into_iter().flatten().map(id).collect();
    let since = answer.body["cursor"].as_str().unwrap_or(&cursor).to_owned();
    stage.run("insert into t values (3001)").await;
    ids.extend(polled(&stage, since, 3001).await);
    assert!(
        ids.iter().copied().eq(1..=3001),
        "{} from {:?}, answered {}",
        ids.len(),
        ids.first(),
        answer.status
    );
}
