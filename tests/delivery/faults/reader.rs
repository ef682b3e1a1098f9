//! A reader that continues through every fault: by polls, streams, sockets, or in turns.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use super::{ANN, BOB, Run, Told};
use crate::support::client::Client;
use crate::support::http::{Events, try_get};
use crate::support::token;

/// A reader that continues through every fault.
pub struct Reader {
    run: Arc<Run>,
    /// How many answers it asked for: each is the other relay's.
    turn: usize,
    pub place: usize,
    path: String,
    pub cursor: Option<String>,
    pub told: Vec<Told>,
    client: Option<Client>,
    /// The number of changes it has, for tests that wait for it.
    pub count: Arc<AtomicU64>,
}

impl Reader {
    pub fn new(run: &Arc<Run>, place: usize) -> Self {
        let path = format!("/realtime/v1/changes?table=events&apikey={}", Self::token(place));
        Self {
            run: Arc::clone(run),
            turn: place,
            place,
            path,
            cursor: None,
            told: Vec::new(),
            client: None,
            count: Arc::default(),
        }
    }

    pub fn token(place: usize) -> String {
        token("authenticated", Some([ANN, BOB][place]), json!({}))
    }

    /// Whether everything has come.
    pub fn is_done(&self) -> bool {
        self.run.settled.load(Ordering::Relaxed)
            && self.told.len() as u64 >= self.run.owed[self.place].load(Ordering::Relaxed)
    }

    /// The relay whose turn it is.
    fn relay(&mut self) -> SocketAddr {
        self.turn += 1;
        self.run.addresses[self.turn % 2]
    }

    fn take(&mut self, change: &Value) {
        assert_eq!(change["record"]["owner"], [ANN, BOB][self.place], "a row of another owner");
        let number = |name: &str| change["record"][name].as_i64().unwrap();
        self.told.push((number("id"), number("n")));
        self.count.fetch_add(1, Ordering::Relaxed);
        self.cursor = Some(change["cursor"].as_str().unwrap().to_owned());
    }

    /// One answer to a poll, if one comes.
    pub async fn poll(&mut self) {
        let since = self.cursor.as_ref().map_or(String::new(), |cursor| format!("&wait=1&since={cursor}"));
        let (relay, path) = (self.relay(), format!("{}{since}", self.path));
        let Some(answer) = try_get(relay, &path, "").await else {
            return sleep(Duration::from_millis(20)).await;
        };
        match answer.status {
            200 => {
                assert!(
                    answer.body["rows"].as_array().is_none_or(Vec::is_empty),
                    "it begins before the first row"
                );
                for change in answer.body["changes"].as_array().into_iter().flatten() {
                    self.take(change);
                }
                self.cursor = Some(answer.body["cursor"].as_str().unwrap().to_owned());
            }
            503 => sleep(Duration::from_millis(20)).await,
            _ => panic!("{answer:?}"),
        }
    }

    /// Some events of a stream.
    pub async fn stream(&mut self, most: usize) {
        let relay = self.relay();
        let mut events = match Events::try_open(relay, &self.path, self.cursor.as_deref()).await {
            Ok(events) => events,
            Err(None | Some(503)) => return sleep(Duration::from_millis(20)).await,
            Err(status) => panic!("{status:?}"),
        };
        for _ in 0..most {
            match timeout(Duration::from_secs(2), events.next()).await {
                Ok(Some(event)) => {
                    assert_eq!(event.name, "change", "{event:?}");
                    self.take(&event.data);
                }
                Ok(None) => return,
                Err(_) if self.is_done() => return,
                Err(_) => {}
            }
        }
    }

    /// What comes to a socket that named its session, over any number of connections, each change once.
    pub async fn resume(&mut self) {
        let name = format!("&session=00000000-0000-4000-8000-{:012}", self.place);
        let mut told = HashSet::new();
        while !self.is_done() {
            self.turn += 1;
            let relay = self.run.cut[self.turn % 2];
            let Ok(mut client) = Client::at(relay, &Self::token(self.place), &name).await else {
                sleep(Duration::from_millis(20)).await;
                continue;
            };
            let mut joined = client.try_join("realtime:events", bindings()).await;
            while joined.is_ok() && !self.is_done() {
                match client.try_frame(Duration::from_secs(2)).await {
                    Ok(Some(frame)) if frame[3] == "postgres_changes" => {
                        self.take(&frame[4]["data"]);
                        if self.told.last().is_some_and(|change| !told.insert(*change)) {
                            self.told.pop();
                            self.count.fetch_sub(1, Ordering::Relaxed);
                            self.run.repeated.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    Ok(Some(frame)) if frame[3] == "system" => {
                        let message = frame[4]["message"].as_str().unwrap();
                        assert!(!message.starts_with("Gap"), "{message}");
                    }
                    // It joins again, on another connection.
                    Ok(Some(frame)) if frame[4]["status"] == "error" || frame[3] == "phx_error" => break,
                    Ok(_) => {}
                    Err(over) => joined = Err(over),
                }
            }
        }
    }

    /// Joins over a socket, which tells cursors but does not take one.
    pub async fn join(&mut self) {
        let relay = self.relay();
        let mut client = Client::at(relay, &Self::token(self.place), "&cursor=true").await.unwrap();
        client.subscribe("realtime:events", bindings()).await;
        self.client = Some(client);
    }

    /// The first changes over that socket, which then is left.
    pub async fn listen(&mut self, most: usize) {
        let Some(mut client) = self.client.take() else { return };
        while self.told.len() < most {
            let frame = client.frame().await;
            if frame[3] == "postgres_changes" {
                self.take(&frame[4]["data"]);
            }
        }
    }
}

/// Everything of the table.
pub fn bindings() -> Value {
    json!([{"event": "*", "schema": "public", "table": "events"}])
}
