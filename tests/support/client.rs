//! A plain Phoenix client: it sends what it is told and shows every frame that comes.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use super::PATIENCE;
use super::relay::Relay;

/// A socket of version 2.0.0.
pub struct Client {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    reference: u32,
}

impl Client {
    /// Connects with a token.
    pub async fn connect(relay: &Relay, token: &str) -> Self {
        Self::open(relay, token).await.unwrap()
    }

    /// Connects, or says with which status the handshake was refused.
    pub async fn open(relay: &Relay, token: &str) -> Result<Self, String> {
        Self::at(relay.address, token, "").await
    }

    /// The same by address, with more parameters.
    pub async fn at(address: std::net::SocketAddr, token: &str, more: &str) -> Result<Self, String> {
        let url = format!("ws://{address}/realtime/v1/websocket?apikey={token}&vsn=2.0.0{more}");
        let (socket, _) = connect_async(url).await.map_err(|error| match error {
            tokio_tungstenite::tungstenite::Error::Http(answer) => {
                let body = answer.body().clone().unwrap_or_default();
                format!("{} {}", answer.status().as_u16(), String::from_utf8_lossy(&body))
            }
            other => other.to_string(),
        })?;
        Ok(Self { socket, reference: 0 })
    }

    /// Sends any text.
    pub async fn send(&mut self, text: &str) {
        self.socket.send(Message::text(text)).await.unwrap();
    }

    /// Sends an event of a topic; returns its reference.
    pub async fn push(&mut self, join_ref: Option<&str>, topic: &str, event: &str, payload: Value) -> String {
        self.reference += 1;
        let reference = self.reference.to_string();
        self.send(&json!([join_ref, reference, topic, event, payload]).to_string()).await;
        reference
    }

    /// Joins with these bindings and waits until the subscription is confirmed. Panics when it is refused.
    pub async fn subscribe(&mut self, topic: &str, bindings: Value) {
        let answer = self.try_subscribe(topic, bindings).await;
        assert_eq!(answer["status"], "ok", "{answer}");
    }

    /// Joins with these bindings and returns the payload of the reply (when it is an error) or of the `system` message.
    pub async fn try_subscribe(&mut self, topic: &str, bindings: Value) -> Value {
        let payload = json!({"config": {"postgres_changes": bindings}});
        self.push(Some("1"), topic, "phx_join", payload).await;
        loop {
            let frame = self.frame().await;
            match frame[3].as_str() {
                // Messages of channels that were joined before may come, too.
                _ if frame[2] != topic => {}
                Some("phx_reply") if frame[4]["status"] == "error" => return frame[4].clone(),
                Some("system") => return frame[4].clone(),
                _ => {}
            }
        }
    }

    /// The next frame, whatever it is.
    pub async fn frame(&mut self) -> Value {
        self.frame_within(PATIENCE).await.expect("no frame came")
    }

    /// The next frame, if one comes in time.
    pub async fn frame_within(&mut self, time: Duration) -> Option<Value> {
        tokio::time::timeout(time, async {
            loop {
                match self.socket.next().await {
                    Some(Ok(Message::Text(text))) => return serde_json::from_str(&text).unwrap(),
                    Some(Ok(Message::Close(close))) => panic!("closed: {close:?}"),
                    Some(Ok(_)) => {}
                    other => panic!("the socket ended: {other:?}"),
                }
            }
        })
        .await
        .ok()
    }

    /// The next frame, if one comes in time; an error when the connection is over.
    pub async fn try_frame(&mut self, time: Duration) -> Result<Option<Value>, String> {
        let next = async {
            loop {
                match self.socket.next().await {
                    Some(Ok(Message::Text(text))) => return Ok(serde_json::from_str(&text).unwrap()),
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                    other => return Err(format!("{other:?}")),
                }
            }
        };
        match tokio::time::timeout(time, next).await {
            Ok(frame) => frame.map(Some),
            Err(_) => Ok(None),
        }
    }

    /// Joins with these bindings; what comes of it is to be read.
    pub async fn try_join(&mut self, topic: &str, bindings: Value) -> Result<(), String> {
        let payload = json!({"config": {"postgres_changes": bindings}});
        let text = json!(["1", "1", topic, "phx_join", payload]).to_string();
        self.socket.send(Message::text(text)).await.map_err(|error| error.to_string())
    }

    /// The `data` of the next change.
    pub async fn change(&mut self) -> Value {
        loop {
            let frame = self.frame().await;
            if frame[3] == "postgres_changes" {
                return frame[4]["data"].clone();
            }
        }
    }

    /// All changes up to and including the one that `is_last` knows.
    pub async fn changes_until(&mut self, mut is_last: impl FnMut(&Value) -> bool) -> Vec<Value> {
        let mut changes = Vec::new();
        loop {
            let change = self.change().await;
            let last = is_last(&change);
            changes.push(change);
            if last {
                return changes;
            }
        }
    }

    /// How the server closes the socket: code and reason.
    pub async fn closed(&mut self) -> (u16, String) {
        tokio::time::timeout(PATIENCE, async {
            loop {
                match self.socket.next().await {
                    Some(Ok(Message::Close(Some(close)))) => {
                        return (close.code.into(), close.reason.to_string());
                    }
                    Some(Ok(_)) => {}
                    other => return (1006, format!("{other:?}")),
                }
            }
        })
        .await
        .expect("the socket was not closed")
    }
}
