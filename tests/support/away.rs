//! A reader of one table who went away, and comes back: by a session, by the cursor of a poll, by the id of a stream.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::client::Client;
use super::http::{Events, get};
use super::stage::Stage;

/// What a reader is told: a change, or a gap with its text.
pub type Told = Result<Value, String>;

/// The reader, away.
pub struct Away {
    token: String,
    /// Its table.
    pub table: &'static str,
    /// Where it went away.
    pub cursor: String,
}

impl Away {
    /// The bearer of this token, who was subscribed to the table until now.
    pub async fn from(stage: &Stage, token: &str, table: &'static str) -> Self {
        let mut away = Self { token: token.to_owned(), table, cursor: String::new() };
        let mut session = away.session(stage).await;
        let answer = get(stage.relay.address, &away.path(""), "").await;
        away.cursor = answer.body["cursor"].as_str().unwrap_or_else(|| panic!("{answer:?}")).to_owned();
        // Confirmed, so there is a bookmark from here on.
        stage.run("insert into marker default values").await;
        session.push(None, "phoenix", "heartbeat", json!({})).await;
        while session.frame().await[3] != "phx_reply" {}
        away
    }

    /// The path of its requests, with more parameters.
    pub fn path(&self, more: &str) -> String {
        format!("/realtime/v1/changes?table={}&apikey={}{more}", self.table, self.token)
    }

    /// A socket of its session, without a channel.
    pub async fn connect(&self, stage: &Stage) -> Client {
        let session = "&session=5e551011-0000-4000-8000-00000000005a";
        Client::at(stage.relay.address, &self.token, session).await.unwrap()
    }

    /// The channel of its session, and what it subscribes to.
    pub fn channel(&self) -> (String, Value) {
        let bindings = json!([{"event": "*", "schema": "public", "table": self.table}]);
        (format!("realtime:{}", self.table), bindings)
    }

    /// Its session, subscribed.
    pub async fn session(&self, stage: &Stage) -> Client {
        let mut client = self.connect(stage).await;
        let (topic, bindings) = self.channel();
        client.subscribe(&topic, bindings).await;
        client
    }

    /// What each way tells up to the last change. A gap ends a poll and a stream.
    pub async fn back(
        &self,
        stage: &Stage,
        is_last: fn(&Value) -> bool,
    ) -> BTreeMap<&'static str, Vec<Told>> {
        let session = told_until(&mut self.session(stage).await, is_last).await;
        BTreeMap::from([
            ("session", session),
            ("poll", self.poll(stage, is_last).await),
            ("stream", self.stream(stage, is_last).await),
        ])
    }

    /// What a poll tells.
    pub async fn poll(&self, stage: &Stage, is_last: fn(&Value) -> bool) -> Vec<Told> {
        let (mut told, mut since) = (Vec::new(), self.cursor.clone());
        loop {
            let path = self.path(&format!("&wait=5&since={since}"));
            let answer = get(stage.relay.address, &path, "").await;
            if answer.status == 410 {
                told.push(Err(answer.body.to_string()));
                return told;
            }
            assert_eq!(answer.status, 200, "{answer:?}");
            for change in answer.body["changes"].as_array().unwrap() {
                if is_last(change) {
                    return told;
                }
                told.push(Ok(change.clone()));
            }
            since = answer.body["cursor"].as_str().unwrap().to_owned();
        }
    }

    /// What a stream tells.
    pub async fn stream(&self, stage: &Stage, is_last: fn(&Value) -> bool) -> Vec<Told> {
        let mut told = Vec::new();
        let mut events = Events::open(stage.relay.address, &self.path(""), Some(&self.cursor)).await;
        while let Some(event) = events.next().await {
            match &*event.name {
                "change" if is_last(&event.data) => break,
                "change" => told.push(Ok(event.data)),
                _ => told.push(Err(event.data.to_string())),
            }
            if event.name == "gap" {
                break;
            }
        }
        told
    }
}

/// What a socket is told up to the last change, markers left out.
pub async fn told_until(client: &mut Client, is_last: fn(&Value) -> bool) -> Vec<Told> {
    let mut told = Vec::new();
    loop {
        let frame = client.frame().await;
        let payload = &frame[4];
        match frame[3].as_str() {
            Some("postgres_changes") if is_last(&payload["data"]) => return told,
            Some("postgres_changes") if payload["data"]["table"] != "marker" => {
                told.push(Ok(payload["data"].clone()));
            }
            Some("system") if payload["status"] == "error" => {
                told.push(Err(payload["message"].as_str().unwrap_or_default().to_owned()));
            }
            _ => {}
        }
    }
}
