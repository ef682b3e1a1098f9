//! Channels that are told the rest of a large transaction on their own: they come, go and have other tokens as all others.

use std::time::{Duration, Instant};

use relay::model::log::cursor::Cursor;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::support::client::Client;
use crate::support::http::{metrics_path, stalled, text};
use crate::support::stage::Stage;
use crate::support::{PATIENCE, eventually, token};

const MANY: i64 = 40_000;

fn reader() -> String {
    token("authenticated", None, json!({}))
}

/// Tables `a`, `b`, `c`, and two clients that do not read what comes of `a` and `b`.
async fn stage() -> (Stage, Vec<TcpStream>) {
    let stage = Stage::with(
        "create table a (id int primary key); create table b (id int primary key); create table c (id int primary key);
         grant select on a, b, c to authenticated; select relay.watch('a'), relay.watch('b'), relay.watch('c')",
        |settings, _| settings.outbox_bytes = Some(8 << 20),
    )
    .await;
    let mut others = Vec::new();
    for table in ["a", "b"] {
        others.push(stalled(stage.relay.address, &reader(), &format!("realtime:{table}"), table).await);
    }
    (stage, others)
}

/// Large transactions of `a`, `b` and then `c`: of the places for such readers those who do not read have the only two.
async fn fill(stage: &Stage, channels: usize) {
    let open = format!("relay_channels_open {channels}\n");
    eventually("all are subscribed", || async {
        text(stage.relay.address, &metrics_path()).await.1.contains(&open).then_some(())
    })
    .await;
    for (table, rows) in [("a", 2 * MANY), ("b", 2 * MANY), ("c", MANY)] {
        stage.run(&format!("insert into {table} select generate_series(1, {rows})")).await;
    }
}

/// The next change of the marker, whatever else comes meanwhile.
async fn marker(client: &mut Client) -> Value {
    client.changes_until(|change| change["table"] == "marker").await.pop().unwrap()
}

async fn join(client: &mut Client, table: &str) {
    let bindings = json!([{"event": "*", "schema": "public", "table": table}]);
    client.subscribe(&format!("realtime:{table}"), bindings).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_channel_is_left_at_once_while_it_waits_for_the_rest_of_a_large_transaction() {
    let (stage, others) = stage().await;
    let mut client = Client::connect(&stage.relay, &reader()).await;
    join(&mut client, "c").await;
    fill(&stage, 3).await;
    for expected in 1..=4000 {
        assert_eq!(client.change().await["record"]["id"], expected);
    }
    let left = Instant::now();
    client.push(Some("1"), "realtime:c", "phx_leave", json!({})).await;
    while client.frame().await[3] != "phx_close" {}
    assert!(left.elapsed() < Duration::from_secs(3), "{:?}", left.elapsed());
    drop(others);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_bookmark_of_a_session_moves_by_what_its_own_channel_has_received() {
    let (stage, others) = stage().await;
    let session = "&session=5e551011-0000-4000-8000-000000000003";
    let mut client = Client::at(stage.relay.address, &reader(), session).await.unwrap();
    join(&mut client, "c").await;
    join(&mut client, "marker").await;
    fill(&stage, 4).await;
    for expected in 1..=4000 {
        assert_eq!(client.change().await["record"]["id"], expected);
    }
    stage.run("insert into marker default values").await;
    let cursor = |text: &str| text.parse::<Cursor>().unwrap();
    let here = cursor(marker(&mut client).await["cursor"].as_str().unwrap());
    let started = Instant::now();
    loop {
        let bookmarks = stage.database.value("select string_agg(cursor, ' ') from relay.bookmarks").await;
        let bookmarks: Vec<Cursor> = bookmarks.split(' ').map(cursor).collect();
        // The one is amid the large transaction, the other after what came since.
        if bookmarks.iter().any(|bookmark| bookmark.within().is_some())
            && bookmarks.iter().any(|bookmark| bookmark.is_at_or_after(&here))
        {
            break;
        }
        assert!(started.elapsed() < PATIENCE, "{bookmarks:?}");
        // The pong is sent when the client reads.
        client.frame_within(Duration::from_millis(50)).await;
    }
    // A client that joins now begins here, too.
    client.subscribe("realtime:other", json!([{"event": "*", "schema": "public", "table": "marker"}])).await;
    stage.run("insert into marker default values").await;
    for _ in 0..2 {
        assert_eq!(marker(&mut client).await["record"]["id"], 2);
    }
    drop(others);
}

/// A token of another subject, so that the channel is bound anew by it.
async fn renew(client: &mut Client, topic: &str, subject: i64) {
    let subject = format!("0a000000-0000-4000-8000-{subject:012}");
    let token = token("authenticated", Some(&subject), json!({}));
    client.push(Some("1"), topic, "access_token", json!({"access_token": token})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_renewed_while_a_large_transaction_is_told_repeat_and_skip_nothing() {
    let stage = Stage::new(
        "create table c (id int primary key); grant select on c to authenticated; select relay.watch('c')",
    )
    .await;
    let mut readers = Vec::new();
    for number in 0..3 {
        let more = if number == 0 { "&cursor=true" } else { "" };
        let mut client = Client::at(stage.relay.address, &reader(), more).await.unwrap();
        join(&mut client, "c").await;
        readers.push(tokio::spawn(async move {
            for expected in 1..=MANY {
                assert_eq!(client.change().await["record"]["id"], expected);
                // Often enough that some come while a part is being told.
                if expected % 97 == 0 {
                    renew(&mut client, "realtime:c", 1000 * number + expected % 7).await;
                }
            }
            client
        }));
    }
    stage.run(&format!("insert into c select generate_series(1, {MANY})")).await;
    let mut clients = Vec::new();
    for reader in readers {
        clients.push(reader.await.unwrap());
    }
    stage.run("insert into c values (0)").await;
    for client in &mut clients {
        assert_eq!(client.change().await["record"]["id"], 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_joins_while_a_large_transaction_is_told_to_others_begins_now() {
    let (stage, others) = stage().await;
    let mut early = Client::connect(&stage.relay, &reader()).await;
    join(&mut early, "c").await;
    fill(&stage, 3).await;
    // It is told the first parts as all others, and waits for the rest of it.
    for expected in 1..=4000 {
        assert_eq!(early.change().await["record"]["id"], expected);
    }
    // What comes behind it is told to others, so the rest is left to those who have it before them.
    let mut other = stage.subscribe(&reader(), json!([])).await;
    stage.changes(&mut other).await;
    let mut late = Client::connect(&stage.relay, &reader()).await;
    join(&mut late, "c").await;
    stage.run("insert into c values (0)").await;
    assert_eq!(
        late.change().await["record"]["id"],
        0,
        "it does not wait for what was committed before it came"
    );
    drop(others);
    for expected in (4001..=MANY).chain([0]) {
        assert_eq!(early.change().await["record"]["id"], expected);
    }
}
