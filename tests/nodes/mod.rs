//! Several relays on one database: what clients of one send and track reaches the clients of all.

pub mod broadcasts;
pub mod draining;
pub mod faults;
pub mod presence;
pub mod random;

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::support::database::Database;
use crate::support::relay::Relay;
use crate::support::socket::Socket;
use crate::support::{eventually, token};

const TOPIC: &str = "realtime:room";

/// What is tracked, by the key of the presence; one member a key.
type State = BTreeMap<String, Value>;

fn anon() -> String {
    token("anon", None, json!({}))
}

/// So many relays that know each other.
async fn relays(database: &Database, count: usize) -> Vec<Relay> {
    let mut relays = Vec::new();
    for _ in 0..count {
        relays.push(Relay::start(&database.url).await);
    }
    know_each_other(&relays.iter().collect::<Vec<_>>()).await;
    relays
}

/// Waits until each of these knows all others.
async fn know_each_other(relays: &[&Relay]) {
    know(relays, relays.len() as u64).await;
}

/// Waits until each of these knows so many relays, with itself.
async fn know(relays: &[&Relay], count: u64) {
    for relay in relays {
        eventually("the relays know each other", || async {
            (relay.figure("relay_nodes") == count).then_some(())
        })
        .await;
    }
}

/// A member of the room, who has read the reply to the join.
async fn member(address: &str, config: Value) -> Socket {
    let mut socket = Socket::at(address, "2.0.0", &anon()).await;
    socket.join("1", TOPIC, config).await;
    let reply = socket.message_frame().await;
    assert_eq!(reply[4]["status"], "ok", "{reply}");
    socket
}

/// The configuration of a member with this presence key, who is told of the presence.
fn present(key: &str) -> Value {
    json!({"presence": {"key": key, "enabled": true}})
}

async fn say(socket: &mut Socket, content: Value) {
    let payload = json!({"type": "broadcast", "event": "e", "payload": content});
    socket.push(json!("1"), Value::Null, TOPIC, "broadcast", payload).await;
}

/// The contents of the next broadcasts, up to one that is `last`.
async fn heard(socket: &mut Socket, last: &Value) -> Vec<Value> {
    let mut heard = Vec::new();
    while heard.last() != Some(last) {
        let frame = socket.message_frame().await;
        if frame[3] == "broadcast" {
            heard.push(frame[4]["payload"].clone());
        }
    }
    heard
}

async fn track(socket: &mut Socket, object: Value) {
    let payload = json!({"type": "presence", "event": "track", "payload": object});
    socket.push(json!("1"), json!("t"), TOPIC, "presence", payload).await;
}

async fn untrack(socket: &mut Socket) {
    let payload = json!({"type": "presence", "event": "untrack"});
    socket.push(json!("1"), json!("t"), TOPIC, "presence", payload).await;
}

/// Applies a frame to what a client knows, as a client does. Metas that come twice or go without having come are a mistake.
fn apply(state: &mut State, frame: &Value) {
    let object = |meta: &Value| {
        let mut object = meta.as_object().unwrap().clone();
        object.remove("phx_ref");
        object.remove("phx_ref_prev");
        Value::Object(object)
    };
    let metas = |of: &Value| -> Vec<(String, Value)> {
        let keys = of.as_object().unwrap().iter();
        keys.flat_map(|(key, value)| {
            let metas = value["metas"].as_array().unwrap();
            metas.iter().map(|meta| (key.clone(), object(meta))).collect::<Vec<_>>()
        })
        .collect()
    };
    match frame[3].as_str().unwrap() {
        "presence_state" => *state = metas(&frame[4]).into_iter().collect(),
        "presence_diff" => {
            for (key, object) in metas(&frame[4]["leaves"]) {
                assert_eq!(state.remove(&key), Some(object), "it was not there: {frame}");
            }
            for (key, object) in metas(&frame[4]["joins"]) {
                assert_eq!(state.insert(key, object), None, "it came before: {frame}");
            }
        }
        _ => {}
    }
}

/// Reads until what the client knows is this.
async fn knows(socket: &mut Socket, state: &mut State, expected: &State) {
    while state != expected {
        let frame = socket.message_frame().await;
        apply(state, &frame);
    }
}

fn state(of: &[(&str, Value)]) -> State {
    of.iter().map(|(key, object)| ((*key).to_owned(), object.clone())).collect()
}
