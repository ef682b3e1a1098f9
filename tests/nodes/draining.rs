//! A relay that is told to end: its clients go one after the other, served until they go, and go on at another relay.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::support::client::Client;
use crate::support::database::Database;
use crate::support::relay::Relay;
use crate::support::{eventually, token};

const RESTARTS: &str = "the relay restarts, connect again";

async fn database() -> Database {
    let database = Database::new().await;
    database.run("create table t (id int primary key); grant select on t to authenticated; select relay.watch('t')").await;
    database
}

async fn subscriber(address: SocketAddr, more: &str) -> Client {
    let mut client = Client::at(address, &token("authenticated", None, json!({})), more).await.unwrap();
    client.subscribe("realtime:t", json!([{"event": "*", "schema": "public", "table": "t"}])).await;
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_close_one_after_the_other_and_are_served_until_then() {
    const CLIENTS: usize = 60;
    const DRAIN: Duration = Duration::from_secs(3);
    let database = database().await;
    let relay =
        Relay::with(&database.url, |settings| settings.drain_ms = Some(DRAIN.as_millis() as u64)).await;
    let address = relay.address;
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..CLIENTS {
        let mut client = subscriber(address, "").await;
        clients.spawn(async move {
            // The change was made when no connection was taken any more.
            let frame = client.try_frame(Duration::from_secs(60)).await;
            let is_served = matches!(&frame, Ok(Some(frame)) if frame[3] == "postgres_changes");
            let close = match frame {
                Ok(_) => client.closed().await,
                Err(close) => {
                    (if close.contains("1012") || close.contains("Restart") { 1012 } else { 0 }, close)
                }
            };
            (Instant::now(), is_served, close.0)
        });
    }
    let began = Instant::now();
    let stopping = tokio::spawn(relay.stop());
    eventually("no new client is taken", || async {
        TcpStream::connect(address).await.is_err().then_some(())
    })
    .await;
    database.run("insert into t values (1)").await;
    let told = clients.join_all().await;
    stopping.await.unwrap();
    assert!(told.iter().all(|(_, _, code)| *code == 1012), "{told:?}");
    let served = told.iter().filter(|(_, is_served, _)| *is_served).count();
    assert!(served > CLIENTS / 3, "{served} of {CLIENTS} got a change of the time in which the relay ended");
    let early = told.iter().filter(|(at, ..)| *at < began + DRAIN / 2).count();
    assert!((CLIENTS / 6..=CLIENTS * 5 / 6).contains(&early), "{early} of {CLIENTS} in the first half");
    // A moment for the last ones to be told.
    assert!(began.elapsed() < DRAIN + Duration::from_secs(10), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_go_on_at_another_relay_without_a_gap() {
    const ROWS: i64 = 400;
    let database = database().await;
    let one = Relay::with(&database.url, |settings| settings.drain_ms = Some(500)).await;
    let other = Relay::start(&database.url).await;
    let (first, second) = (one.address, other.address);
    let mut readers = tokio::task::JoinSet::new();
    for number in 0..8 {
        let session = format!("&session=5e551011-0000-4000-8000-{number:012}");
        let mut client = subscriber(first, &session).await;
        readers.spawn(async move {
            let (mut ids, mut moved) = (Vec::new(), 0);
            while ids.last() != Some(&ROWS) {
                match client.try_frame(Duration::from_secs(60)).await {
                    Ok(frame) => {
                        let frame: Value = frame.expect("a frame");
                        let is_gap = frame[3] == "system" && frame[4]["status"] == "error";
                        assert!(!is_gap, "{frame}");
                        if frame[3] == "postgres_changes" {
                            ids.push(frame[4]["data"]["record"]["id"].as_i64().unwrap());
                        }
                    }
                    Err(close) => {
                        assert!(close.contains(RESTARTS), "{close}");
                        moved += 1;
                        client = Client::at(second, &token("authenticated", None, json!({})), &session)
                            .await
                            .unwrap();
                        client
                            .try_join("realtime:t", json!([{"event": "*", "schema": "public", "table": "t"}]))
                            .await
                            .unwrap();
                    }
                }
            }
            (ids, moved)
        });
    }
    let writer = database.connect().await;
    let mut stopping = None;
    let mut one = Some(one);
    for id in 1..=ROWS {
        writer.execute("insert into t values ($1)", &[&(id as i32)]).await.unwrap();
        if id == ROWS / 4 {
            stopping = one.take().map(|relay| tokio::spawn(relay.stop()));
        }
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
    for (mut ids, moved) in readers.join_all().await {
        assert_eq!(moved, 1);
        // What was on its way when the socket closed may come again.
        ids.dedup();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids, (1..=ROWS).collect::<Vec<_>>());
    }
    stopping.unwrap().await.unwrap();
    other.stop().await;
}
