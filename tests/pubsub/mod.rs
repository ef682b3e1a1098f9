//! Broadcasts and presence: from client to client, by socket and by HTTP.

pub mod broadcast;
pub mod http;
pub mod presence;
pub mod private_http;
pub mod private_joins;
pub mod private_judging;
pub mod private_replay;
pub mod private_revoked;

use serde_json::{Value, json};

use crate::support::relay::Relay;
use crate::support::socket::Socket;
use crate::support::token;

/// The versions of the protocol.
const VERSIONS: [&str; 2] = ["1.0.0", "2.0.0"];

fn anon() -> String {
    token("anon", None, json!({}))
}

/// A socket that has joined a topic with this configuration, and has read the reply.
async fn joined(relay: &Relay, version: &'static str, topic: &str, config: Value) -> Socket {
    let mut socket = Socket::open(relay, version, &anon()).await;
    join(&mut socket, topic, config).await;
    socket
}

async fn join(socket: &mut Socket, topic: &str, config: Value) {
    socket.join("1", topic, config).await;
    let reply = socket.message_frame().await;
    assert_eq!((&reply[3], &reply[4]["status"]), (&json!("phx_reply"), &json!("ok")), "{reply}");
}

/// The reply that a message was done.
fn done(socket: &Socket, topic: &str, reference: &str) -> Value {
    let reply = json!({"status": "ok", "response": {}});
    socket.expected(json!("1"), json!(reference), topic, "phx_reply", reply)
}

fn refused(socket: &Socket, topic: &str, reference: &str, response: Value) -> Value {
    let reply = json!({"status": "error", "response": response});
    socket.expected(json!("1"), json!(reference), topic, "phx_reply", reply)
}

/// A policy of `realtime.messages` for `authenticated`.
fn policy(name: &str, command: &str, condition: &str) -> String {
    let clause = match command {
        "insert" => format!("with check ({condition})"),
        _ => format!("using ({condition})"),
    };
    format!("create policy {name} on realtime.messages for {command} to authenticated {clause};")
}

/// Lets `service_role` do everything in private channels.
const BOSS: &str = "create policy boss on realtime.messages for all to service_role using (true);";

fn user(sub: &str) -> String {
    token("authenticated", Some(sub), json!({}))
}

fn boss() -> String {
    token("service_role", None, json!({}))
}

/// The configuration of a private channel, with more.
fn private(more: Value) -> Value {
    let mut config = json!({"private": true, "broadcast": {"ack": true}});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

/// A socket of this token that has joined a private topic with this configuration, and has read the reply.
async fn privately_joined(relay: &Relay, token: &str, topic: &str, more: Value) -> Socket {
    let mut socket = Socket::open(relay, "2.0.0", token).await;
    join(&mut socket, topic, private(more)).await;
    socket
}

/// Why a private join is refused; nothing if it is not.
async fn refusal(relay: &Relay, token: &str, topic: &str, more: Value) -> Option<String> {
    let mut socket = Socket::open(relay, "2.0.0", token).await;
    socket.join("1", topic, private(more)).await;
    let reply = socket.message_frame().await;
    assert_eq!(reply[3], "phx_reply", "{reply}");
    reply[4]["response"]["reason"].as_str().map(str::to_owned)
}

/// The text of a refusal by policies.
fn denied(channel: &str) -> Option<String> {
    Some(format!("Unauthorized: You do not have permissions to read from this Channel topic: {channel}"))
}

/// All frames that are on their way to the socket.
async fn frames(socket: &mut Socket) -> Vec<Value> {
    socket.push(Value::Null, json!("all"), "phoenix", "heartbeat", json!({})).await;
    let mut frames = Vec::new();
    loop {
        let frame = socket.message_frame().await;
        if frame[1] == "all" {
            return frames;
        }
        frames.push(frame);
    }
}

/// Sends a broadcast with this content over a channel that acknowledges, and returns the reply.
async fn send(socket: &mut Socket, topic: &str, content: Value) -> Value {
    let payload = json!({"type": "broadcast", "event": "e", "payload": content});
    socket.push(json!("1"), json!("send"), topic, "broadcast", payload).await;
    reply_to(socket, "send").await
}

/// Sends until the reply is such a one; at most 50 times a second, because the number of messages is limited.
async fn send_until(socket: &mut Socket, topic: &str, content: Value, is_it: impl Fn(&Value) -> bool) {
    while !is_it(&send(socket, topic, content.clone()).await) {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// Tracks something, and returns the reply.
async fn track(socket: &mut Socket, topic: &str, content: Value) -> Value {
    let payload = json!({"type": "presence", "event": "track", "payload": content});
    socket.push(json!("1"), json!("track"), topic, "presence", payload).await;
    reply_to(socket, "track").await
}

async fn reply_to(socket: &mut Socket, reference: &str) -> Value {
    loop {
        let frame = socket.message_frame().await;
        if frame[1] == reference {
            return frame[4].clone();
        }
    }
}
