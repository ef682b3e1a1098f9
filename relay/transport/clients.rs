//! The clients of a relay, for the inspector and the metrics: who is connected, how and since when, with which channels.
//!
//! A client notes its channels under a lock of its own. A listing holds the lock of a shard only to copy references, so that it
//! delays neither clients nor delivery.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use crate::feed::deliver::outbox::Outbox;
use crate::model::identity::claims::Claims;
use crate::model::session::channel::ChannelId;
use crate::observe::TRANSPORTS;

/// Number of maps that clients are spread over.
const SHARDS: usize = 16;

/// How a client is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientKind {
    /// By a WebSocket.
    WebSocket,
    /// By an event stream.
    EventStream,
    /// By a poll that waits for its answer.
    Poll,
}

impl ClientKind {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::WebSocket, Self::EventStream, Self::Poll];

    /// Returns its name in metrics and JSON.
    pub fn name(self) -> &'static str {
        TRANSPORTS[self as usize]
    }
}

/// The connected clients.
#[derive(Default)]
pub struct Clients {
    shards: [Mutex<HashMap<u64, Arc<Client>>>; SHARDS],
    /// Number of clients by [`ClientKind`].
    counts: [AtomicUsize; 3],
}

/// A connected client.
pub struct Client {
    /// The number of its session.
    pub number: u64,
    /// How it is connected.
    pub kind: ClientKind,
    /// Its address, as connections are counted.
    pub address: IpAddr,
    /// When it connected.
    pub since: Instant,
    /// Its queue.
    pub outbox: Arc<Outbox>,
    state: Mutex<ClientState>,
}

/// What changes while a client is connected.
#[derive(Debug, Clone)]
pub struct ClientState {
    /// The role of its last token.
    pub role: Box<str>,
    /// The user of its last token.
    pub sub: Option<Box<str>>,
    /// Its channels, in the order of their joins.
    pub channels: Vec<OpenChannel>,
}

/// A channel of a client.
#[derive(Debug, Clone)]
pub struct OpenChannel {
    /// Its id.
    pub id: ChannelId,
    /// Its topic as the client wrote it; the tables of a request over HTTP.
    pub topic: Box<str>,
    /// Whether it is private.
    pub is_private: bool,
}

/// A client's entry in the list. Dropping it removes the client.
pub struct ClientEntry {
    clients: Arc<Clients>,
    client: Arc<Client>,
}

impl Clients {
    /// Adds a client without channels.
    pub fn add(
        self: &Arc<Self>,
        number: u64,
        (kind, address): (ClientKind, IpAddr),
        claims: &Claims,
        outbox: Arc<Outbox>,
    ) -> ClientEntry {
        let (role, sub) = names(claims);
        let state = Mutex::new(ClientState { role, sub, channels: Vec::new() });
        let client = Arc::new(Client { number, kind, address, since: Instant::now(), outbox, state });
        lock(self.shard(number)).insert(number, Arc::clone(&client));
        self.counts[kind as usize].fetch_add(1, Ordering::Relaxed);
        ClientEntry { clients: Arc::clone(self), client }
    }

    /// Returns all clients, in no order.
    pub fn all(&self) -> Vec<Arc<Client>> {
        let mut all = Vec::new();
        for shard in &self.shards {
            all.extend(lock(shard).values().cloned());
        }
        all
    }

    /// Returns the number of clients of a kind.
    pub fn count(&self, kind: ClientKind) -> usize {
        self.counts[kind as usize].load(Ordering::Relaxed)
    }

    fn shard(&self, number: u64) -> &Mutex<HashMap<u64, Arc<Client>>> {
        &self.shards[number as usize % SHARDS]
    }
}

impl Client {
    /// Returns what its entry notes now.
    pub fn state(&self) -> ClientState {
        lock(&self.state).clone()
    }

    /// Whether its user, role, address or one of its topics contains this text.
    pub fn is_like(&self, text: &str) -> bool {
        let state = lock(&self.state);
        let mut names = [Some(&state.role), state.sub.as_ref()].into_iter().flatten();
        names.any(|name| name.contains(text))
            || state.channels.iter().any(|channel| channel.topic.contains(text))
            || self.address.to_string().contains(text)
    }

    /// Returns the number of its channels.
    pub fn channel_count(&self) -> usize {
        lock(&self.state).channels.len()
    }
}

impl ClientEntry {
    /// Takes the user of these claims for its own.
    pub fn is_of(&self, claims: &Claims) {
        let mut state = lock(&self.client.state);
        (state.role, state.sub) = names(claims);
    }

    /// Adds a channel, unless it is there.
    pub fn opened(&self, id: ChannelId, topic: &str, is_private: bool) {
        let mut state = lock(&self.client.state);
        if !state.channels.iter().any(|channel| channel.id == id) {
            state.channels.push(OpenChannel { id, topic: topic.into(), is_private });
        }
    }

    /// Removes a channel.
    pub fn closed(&self, id: ChannelId) {
        let mut state = lock(&self.client.state);
        state.channels.retain(|channel| channel.id != id);
        state.channels.shrink_to_fit();
    }
}

impl Drop for ClientEntry {
    fn drop(&mut self) {
        lock(self.clients.shard(self.client.number)).remove(&self.client.number);
        self.clients.counts[self.client.kind as usize].fetch_sub(1, Ordering::Relaxed);
    }
}

/// Returns the role and the user of claims.
fn names(claims: &Claims) -> (Box<str>, Option<Box<str>>) {
    (claims.role().into(), claims.sub().map(Into::into))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
