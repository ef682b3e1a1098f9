//! Many light clients on one thread: a WebSocket of our own that sends masked text and reads only what is counted.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use futures_util::future::poll_fn;
use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, sleep, sleep_until};

use crate::ledger::Ledger;
use crate::support::token;

/// Clients that connect at the same time.
const AT_ONCE: usize = 64;
/// What the clients of supabase-js do every 25 seconds.
const HEARTBEAT: Duration = Duration::from_secs(25);
/// Read at a time; also the longest frame.
const SCRATCH: usize = 256 * 1024;

/// Whom the clients talk to.
#[derive(Clone)]
pub enum Peer {
    /// The relay: each client is another user and joins one channel for this table.
    Relay {
        table: &'static str,
    },
    /// The relay: each client is another user and joins this topic.
    Topic {
        name: &'static str,
    },
    Floor,
}

/// They leave when it is dropped.
pub struct Swarm {
    _end: oneshot::Sender<()>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// What a client says first.
pub struct Hello {
    user: usize,
    path: String,
    pub join: Option<Vec<u8>>,
    /// A part of the message that confirms the join.
    confirmed: &'static str,
}

impl Swarm {
    /// Connects the clients of a ledger, from number `first` on, and waits until every subscription is confirmed.
    pub async fn connect(
        peer: Peer,
        address: SocketAddr,
        ledger: &Arc<Ledger>,
        users: std::ops::Range<usize>,
    ) -> Self {
        // Made beforehand: signing is none of what is measured.
        let hellos: Vec<Hello> = users.map(|user| hello(&peer, user)).collect();
        let wanted = ledger.joined.load(Relaxed) + hellos.len();
        let swarm = Self::start(hellos, AT_ONCE, address, ledger);
        let started = Instant::now();
        while ledger.joined.load(Relaxed) < wanted {
            sleep(Duration::from_millis(1)).await;
            let (joined, broken) = (ledger.joined.load(Relaxed), ledger.broken.load(Relaxed));
            assert!(broken == 0, "{broken} clients were refused, {joined} joined");
            assert!(started.elapsed() < Duration::from_secs(60), "only {joined} of {wanted} clients joined");
        }
        swarm
    }

    /// Lets clients connect, so many of them at the same time, and doesn't wait for that: the ledger tells who joined.
    pub fn start(hellos: Vec<Hello>, at_once: usize, address: SocketAddr, ledger: &Arc<Ledger>) -> Self {
        let (end, ended) = oneshot::channel();
        let ledger = Arc::clone(ledger);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let tasks = tokio::task::LocalSet::new();
            tasks.block_on(&runtime, run(hellos, at_once, address, ledger, ended));
        });
        Self { _end: end, thread: Some(thread) }
    }

    /// Ends all connections and waits for that.
    pub fn leave(mut self) {
        let thread = self.thread.take();
        drop(self);
        thread.unwrap().join().unwrap();
    }
}

fn hello(peer: &Peer, user: usize) -> Hello {
    match peer {
        Peer::Floor => Hello::bare(user, "/"),
        Peer::Topic { name } => Hello::topic(name, user),
        Peer::Relay { table } => Hello::relay(table, "bench", user),
    }
}

impl Hello {
    /// To the relay, from this user, who joins one topic for a table.
    pub fn relay(table: &str, topic: &str, user: usize) -> Self {
        let token = token_of(user);
        let change = serde_json::json!({"event": "*", "schema": "public", "table": table});
        let payload = serde_json::json!({"config": {"postgres_changes": [change]}, "access_token": token});
        Self::joining(user, topic, &token, &payload, "Subscribed to PostgreSQL")
    }

    /// To the relay, from this user, who joins a topic without tables.
    pub fn topic(topic: &str, user: usize) -> Self {
        let token = token_of(user);
        let payload = serde_json::json!({"config": {"broadcast": {"ack": false, "self": false}}, "access_token": token});
        Self::joining(user, topic, &token, &payload, r#""status":"ok""#)
    }

    fn joining(
        user: usize,
        topic: &str,
        token: &str,
        payload: &serde_json::Value,
        confirmed: &'static str,
    ) -> Self {
        let join = serde_json::json!(["1", "1", format!("realtime:{topic}"), "phx_join", payload]);
        let path = format!("/realtime/v1/websocket?apikey={token}&vsn=2.0.0");
        Self { user, path, join: Some(masked(&join.to_string())), confirmed }
    }

    /// To a server at this path, without a join.
    pub fn bare(user: usize, path: &str) -> Self {
        Self { user, path: path.to_owned(), join: None, confirmed: "" }
    }

    /// The request that asks for a WebSocket.
    pub fn request(&self) -> String {
        format!(
            "GET {} HTTP/1.1\r\nHost: bench\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
            self.path
        )
    }
}

/// The token of a user.
pub fn token_of(user: usize) -> String {
    token("authenticated", Some(&sub(user)), serde_json::json!({"org": format!("org {user}")}))
}

/// The id of a user, what `auth.uid()` returns.
pub fn sub(user: usize) -> String {
    format!("00000000-0000-4000-8000-{user:012x}")
}

async fn run(
    hellos: Vec<Hello>,
    at_once: usize,
    address: SocketAddr,
    ledger: Arc<Ledger>,
    ended: oneshot::Receiver<()>,
) {
    let count = hellos.len();
    let gate = Rc::new(Semaphore::new(at_once));
    let scratch = Rc::new(RefCell::new(vec![0; SCRATCH]));
    for (index, hello) in hellos.into_iter().enumerate() {
        let (ledger, gate, scratch) = (Arc::clone(&ledger), Rc::clone(&gate), Rc::clone(&scratch));
        // Spread evenly, as those of clients that came at any time are.
        let beat = HEARTBEAT.mul_f64(index as f64 / count as f64);
        tokio::task::spawn_local(async move {
            let mut client = Client {
                user: hello.user,
                ledger,
                last: 0,
                offset: 0,
                rest: Vec::new(),
                latencies: Vec::new(),
            };
            if let Err(why) = client.live(hello, address, &gate, &scratch, beat).await
                && client.ledger.broken.fetch_add(1, Relaxed) < 3
            {
                println!("   client {index}: {why}");
            }
        });
    }
    let _ = ended.await;
}

struct Client {
    user: usize,
    ledger: Arc<Ledger>,
    /// The row up to which it has everything.
    last: u64,
    /// Where the row's number stood in the last frame.
    offset: usize,
    /// The begin of a frame whose end has not come yet.
    rest: Vec<u8>,
    latencies: Vec<u32>,
}

impl Client {
    /// Only ever ends with what went wrong.
    async fn live(
        &mut self,
        hello: Hello,
        address: SocketAddr,
        gate: &Semaphore,
        scratch: &RefCell<Vec<u8>>,
        beat: Duration,
    ) -> Result<(), String> {
        let turn = gate.acquire().await.unwrap();
        let mut stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
        stream.set_nodelay(true).unwrap();
        stream.write_all(hello.request().as_bytes()).await.map_err(|error| error.to_string())?;
        while !self.accepted()? {
            let rest = &mut self.rest;
            read(&mut stream, scratch, |bytes| rest.extend(bytes)).await?;
        }
        let beats = hello.join.is_some();
        match hello.join {
            Some(join) => {
                stream.write_all(&join).await.map_err(|error| error.to_string())?;
                while !self.confirmed(hello.confirmed)? {
                    let rest = &mut self.rest;
                    read(&mut stream, scratch, |bytes| rest.extend(bytes)).await?;
                }
            }
            None => _ = self.ledger.joined.fetch_add(1, Relaxed),
        }
        drop(turn);
        let mut beat = Instant::now() + beat;
        let heartbeat = masked(r#"[null,"2","phoenix","heartbeat",{}]"#);
        loop {
            tokio::select! {
                biased;
                took = read(&mut stream, scratch, |bytes| self.take(bytes)) => took??,
                () = sleep_until(beat), if beats => {
                    stream.write_all(&heartbeat).await.map_err(|error| error.to_string())?;
                    beat += HEARTBEAT;
                }
            }
        }
    }

    fn accepted(&mut self) -> Result<bool, String> {
        let Some(end) = self.rest.windows(4).position(|four| four == b"\r\n\r\n") else { return Ok(false) };
        if !self.rest.starts_with(b"HTTP/1.1 101") {
            return Err(String::from_utf8_lossy(&self.rest).into_owned());
        }
        self.rest.drain(..end + 4);
        Ok(true)
    }

    fn confirmed(&mut self, part: &str) -> Result<bool, String> {
        while let Some((body, end)) = frame(&self.rest)? {
            let text = String::from_utf8_lossy(&self.rest[body..end]).into_owned();
            self.rest.drain(..end);
            if text.contains(r#""status":"error""#) {
                return Err(text);
            }
            if text.contains(part) {
                self.ledger.joined.fetch_add(1, Relaxed);
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Counts the frames in what was read.
    fn take(&mut self, bytes: &[u8]) -> Result<(), String> {
        if self.rest.is_empty() {
            let used = self.count(bytes)?;
            self.rest.extend(&bytes[used..]);
        } else {
            let mut rest = std::mem::take(&mut self.rest);
            rest.extend(bytes);
            let used = self.count(&rest)?;
            rest.drain(..used);
            self.rest = rest;
        }
        Ok(())
    }

    fn count(&mut self, bytes: &[u8]) -> Result<usize, String> {
        let now = self.ledger.now();
        let mut used = 0;
        let (mut messages, mut payload) = (0, 0);
        while let Some((body, end)) = frame(&bytes[used..])? {
            let text = &bytes[used + body..used + end];
            used += end;
            if let Some(id) = row(text, &mut self.offset) {
                messages += 1;
                payload += text.len() as u64;
                self.last = self.ledger.received(self.user, self.last, id, now, &mut self.latencies);
            }
        }
        if messages > 0 {
            self.ledger.messages.fetch_add(messages, Relaxed);
            self.ledger.bytes.fetch_add(payload, Relaxed);
            self.ledger.keep(&mut self.latencies);
        }
        Ok(used)
    }
}

/// The number of the row in a change, which stands at the same place in nearly every frame: at `offset`.
pub fn row(text: &[u8], offset: &mut usize) -> Option<u64> {
    const MARK: &[u8] = br#""record":{"id":"#;
    if !text.get(*offset..).is_some_and(|tail| tail.starts_with(MARK)) {
        *offset = text.windows(MARK.len()).position(|part| part == MARK)?;
    }
    let digits = text[*offset + MARK.len()..].iter().take_while(|byte| byte.is_ascii_digit());
    Some(digits.fold(0, |number, digit| number * 10 + u64::from(digit - b'0')))
}

/// Reads once, into one buffer that all clients share. Cancel safe.
async fn read<T>(
    stream: &mut TcpStream,
    scratch: &RefCell<Vec<u8>>,
    mut take: impl FnMut(&[u8]) -> T,
) -> Result<T, String> {
    poll_fn(|context| {
        let mut scratch = scratch.borrow_mut();
        let mut buffer = ReadBuf::new(&mut scratch);
        Pin::new(&mut *stream).poll_read(context, &mut buffer).map(|outcome| match outcome {
            Ok(()) if buffer.filled().is_empty() => Err(String::from("the server ended the connection")),
            Ok(()) => Ok(take(buffer.filled())),
            Err(error) => Err(error.to_string()),
        })
    })
    .await
}

/// Where the first frame's payload begins and ends, once it is there whole.
pub fn frame(bytes: &[u8]) -> Result<Option<(usize, usize)>, String> {
    let [first, length, ..] = *bytes else { return Ok(None) };
    if first != 0x81 {
        return Err(format!("a frame that begins with {first:#x}: {}", String::from_utf8_lossy(bytes)));
    }
    let (body, length) = match length {
        126 => match bytes.get(2..4) {
            Some(wide) => (4, usize::from(u16::from_be_bytes(wide.try_into().unwrap()))),
            None => return Ok(None),
        },
        127 => match bytes.get(2..10) {
            Some(wide) => (10, u64::from_be_bytes(wide.try_into().unwrap()) as usize),
            None => return Ok(None),
        },
        short => (2, usize::from(short)),
    };
    Ok((bytes.len() >= body + length).then_some((body, body + length)))
}

/// A text frame as clients must send it; the mask is zero, which changes nothing.
pub fn masked(text: &str) -> Vec<u8> {
    let mut frame = vec![0x81];
    match text.len() {
        short @ 0..126 => frame.push(0x80 | short as u8),
        long => {
            frame.push(0x80 | 126);
            frame.extend(u16::try_from(long).unwrap().to_be_bytes());
        }
    }
    frame.extend([0; 4]);
    frame.extend(text.as_bytes());
    frame
}
