//! A WebSocket of either version that sends anything and hides nothing.

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::{HeaderName, HeaderValue};
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use super::PATIENCE;
use super::relay::Relay;

/// One socket.
pub struct Socket {
    inner: WebSocketStream<MaybeTlsStream<TcpStream>>,
    version: &'static str,
}

impl Socket {
    /// Opens one of this version (`1.0.0`, `2.0.0`) with a token.
    pub async fn open(relay: &Relay, version: &'static str, token: &str) -> Self {
        Self::at(&relay.address.to_string(), version, token).await
    }

    /// The same at the address of a relay that may be another process.
    pub async fn at(address: &str, version: &'static str, token: &str) -> Self {
        let path = format!("/realtime/v1/websocket?apikey={token}&vsn={version}");
        let opened = Self::try_at(address, &path, &[]).await;
        let mut socket = opened.unwrap_or_else(|(status, body)| panic!("{status} {body}"));
        socket.version = version;
        socket
    }

    /// Opens one of the first version at any path, or gives the status and body with which that was refused.
    pub async fn handshake(
        relay: &Relay,
        path: &str,
        headers: &[(&str, &str)],
    ) -> Result<Self, (u16, String)> {
        Self::try_at(&relay.address.to_string(), path, headers).await
    }

    /// The same at an address.
    pub async fn try_at(address: &str, path: &str, headers: &[(&str, &str)]) -> Result<Self, (u16, String)> {
        let mut request = format!("ws://{address}{path}").into_client_request().unwrap();
        for (name, value) in headers {
            let name: HeaderName = name.parse().unwrap();
            request.headers_mut().insert(name, HeaderValue::from_str(value).unwrap());
        }
        match connect_async(request).await {
            Ok((inner, _)) => Ok(Self { inner, version: "1.0.0" }),
            Err(Error::Http(answer)) => {
                let body = answer.body().clone().unwrap_or_default();
                Err((answer.status().as_u16(), String::from_utf8(body).unwrap()))
            }
            Err(other) => panic!("{other}"),
        }
    }

    /// A message in the form of this version.
    pub fn message(
        &self,
        join_ref: Value,
        reference: Value,
        topic: &str,
        event: &str,
        payload: Value,
    ) -> Value {
        match self.version {
            "1.0.0" => {
                json!({"topic": topic, "event": event, "payload": payload, "ref": reference, "join_ref": join_ref})
            }
            _ => json!([join_ref, reference, topic, event, payload]),
        }
    }

    /// A message as the server has to write it: version 1.0.0 knows no `join_ref`.
    pub fn expected(
        &self,
        join_ref: Value,
        reference: Value,
        topic: &str,
        event: &str,
        payload: Value,
    ) -> Value {
        let mut message = self.message(join_ref, reference, topic, event, payload);
        if let Some(fields) = message.as_object_mut() {
            fields.remove("join_ref");
        }
        message
    }

    /// Sends a message in the form of this version.
    pub async fn push(
        &mut self,
        join_ref: Value,
        reference: Value,
        topic: &str,
        event: &str,
        payload: Value,
    ) {
        let message = self.message(join_ref, reference, topic, event, payload);
        self.send(Message::text(message.to_string())).await;
    }

    /// Joins with this reference and configuration.
    pub async fn join(&mut self, reference: &str, topic: &str, config: Value) {
        self.push(json!(reference), json!(reference), topic, "phx_join", json!({"config": config})).await;
    }

    /// Sends any frame.
    pub async fn send(&mut self, message: Message) {
        self.inner.send(message).await.unwrap();
    }

    /// Sends any frame, if the other side still takes one.
    pub async fn try_send(&mut self, message: Message) {
        let _ = self.inner.send(message).await;
    }

    /// The next frame.
    pub async fn frame(&mut self) -> Value {
        let next = async {
            loop {
                match self.inner.next().await {
                    Some(Ok(Message::Text(text))) => return serde_json::from_str(&text).unwrap(),
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                    other => panic!("no frame but {other:?}"),
                }
            }
        };
        timeout(PATIENCE, next).await.expect("no frame came")
    }

    /// The next frame as it is: a text or bytes.
    pub async fn raw(&mut self) -> Message {
        let next = async {
            loop {
                match self.inner.next().await {
                    Some(Ok(frame @ (Message::Text(_) | Message::Binary(_)))) => return frame,
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                    other => panic!("no frame but {other:?}"),
                }
            }
        };
        timeout(PATIENCE, next).await.expect("no frame came")
    }

    /// The next frame in the form of version 2.0.0, whatever the version; the missing `join_ref` is null.
    pub async fn message_frame(&mut self) -> Value {
        let frame = self.frame().await;
        match frame {
            Value::Object(fields) => {
                json!([null, fields["ref"], fields["topic"], fields["event"], fields["payload"]])
            }
            frame => frame,
        }
    }

    /// Proves that the socket lives and that nothing was on its way: the reply to a heartbeat is the next frame.
    pub async fn is_quiet(&mut self) {
        self.push(Value::Null, json!("quiet"), "phoenix", "heartbeat", json!({})).await;
        let reply = json!({"status": "ok", "response": {}});
        assert_eq!(
            self.frame().await,
            self.expected(Value::Null, json!("quiet"), "phoenix", "phx_reply", reply)
        );
    }

    /// How the server closes the socket, after any frames: code and reason.
    pub async fn closed(&mut self) -> (u16, String) {
        let next = async {
            loop {
                match self.inner.next().await {
                    Some(Ok(Message::Close(Some(close)))) => {
                        return (close.code.into(), close.reason.to_string());
                    }
                    Some(Ok(_)) => {}
                    other => return (1006, format!("{other:?}")),
                }
            }
        };
        timeout(PATIENCE, next).await.expect("the socket was not closed")
    }
}
