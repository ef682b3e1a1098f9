//! Broadcasts and presence: from client to client, by socket and by HTTP.

pub mod broadcast;
pub mod http;
pub mod presence;

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
