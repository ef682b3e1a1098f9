//! Readers by HTTP that only count: event streams and long polls. Cut off, they come back with their cursor.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::ledger::Ledger;
use crate::swarm::{row, token_of};

/// The pause before a reader comes back.
const PAUSE: Duration = Duration::from_millis(100);
/// Read at a time.
const SCRATCH: usize = 256 * 1024;

/// How a reader reads.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum By {
    Stream,
    Polls,
}

/// One reader of a table, from the moment it is made.
pub struct Follower {
    by: By,
    user: usize,
    address: SocketAddr,
    path: String,
    ledger: Arc<Ledger>,
    cursor: String,
    /// The row up to which it has everything.
    last: u64,
    /// Where the row's number stood in the last change.
    offset: usize,
    latencies: Vec<u32>,
}

/// Why a connection is over.
enum Over {
    /// It can come back with its cursor.
    Cut,
    /// That would be no use.
    Lost(String),
}

impl From<std::io::Error> for Over {
    fn from(_: std::io::Error) -> Self {
        Self::Cut
    }
}

/// An answer's head and body.
struct Answer {
    status: u16,
    body: Vec<u8>,
}

impl Follower {
    /// Takes its place after the rows of now; what comes is read until the task is ended.
    pub async fn start(
        by: By,
        user: usize,
        address: SocketAddr,
        table: &str,
        ledger: &Arc<Ledger>,
    ) -> JoinHandle<()> {
        let path = format!("/realtime/v1/changes?table={table}&apikey={}", token_of(user));
        let ledger = Arc::clone(ledger);
        let mut follower = Self {
            by,
            user,
            address,
            path,
            ledger,
            cursor: String::new(),
            last: 0,
            offset: 0,
            latencies: Vec::new(),
        };
        let mut stream = TcpStream::connect(address).await.unwrap();
        let Ok(Answer { status: 200, body }) = follower.ask(&mut stream).await else {
            panic!("a reader was refused")
        };
        follower.cursor = cursor(&body).unwrap();
        follower.ledger.joined.fetch_add(1, Relaxed);
        tokio::spawn(async move {
            loop {
                let over = match follower.by {
                    By::Stream => follower.stream().await,
                    By::Polls => follower.polls().await,
                };
                if let Err(Over::Lost(why)) = over {
                    println!("   reader {}: {why}", follower.user);
                    follower.ledger.broken.fetch_add(1, Relaxed);
                    return;
                }
                sleep(PAUSE).await;
            }
        })
    }

    async fn stream(&mut self) -> Result<(), Over> {
        let mut stream = TcpStream::connect(self.address).await?;
        self.request(&mut stream, "text/event-stream").await?;
        let mut rest = Vec::with_capacity(SCRATCH);
        let (mut id, mut is_accepted) = (String::new(), false);
        loop {
            if stream.read_buf(&mut rest).await? == 0 {
                return Ok(());
            }
            if !is_accepted {
                let Some(status) = status(&rest) else { continue };
                judge(status)?;
                is_accepted = true;
            }
            // The lengths of chunks stand on lines of their own, between events.
            let mut used = 0;
            while let Some(length) = rest[used..].iter().position(|byte| *byte == b'\n') {
                let line = &rest[used..used + length];
                used += length + 1;
                if let Some(next) = line.strip_prefix(b"id: ") {
                    id.clear();
                    id.push_str(&String::from_utf8_lossy(next));
                } else if line == b"event: gap" {
                    return Err(Over::Lost(String::from("a gap")));
                } else if let Some(change) = line.strip_prefix(b"data: ")
                    && let Some(number) = row(change, &mut self.offset)
                {
                    self.count(number);
                    self.cursor.clone_from(&id);
                }
            }
            rest.drain(..used);
            self.ledger.keep(&mut self.latencies);
        }
    }

    async fn polls(&mut self) -> Result<(), Over> {
        const MARK: &[u8] = br#""record":{"id":"#;
        let mut stream = TcpStream::connect(self.address).await?;
        loop {
            let Answer { status, body } = self.ask(&mut stream).await?;
            judge(status)?;
            let mut rest = &body[..];
            while let Some(at) = rest.windows(MARK.len()).position(|part| part == MARK) {
                rest = &rest[at..];
                if let Some(number) = row(rest, &mut 0) {
                    self.count(number);
                }
                rest = &rest[MARK.len()..];
            }
            self.ledger.keep(&mut self.latencies);
            self.cursor =
                cursor(&body).ok_or_else(|| Over::Lost(String::from_utf8_lossy(&body).into_owned()))?;
        }
    }

    fn count(&mut self, number: u64) {
        let now = self.ledger.now();
        self.ledger.messages.fetch_add(1, Relaxed);
        self.last = self.ledger.received(self.user, self.last, number, now, &mut self.latencies);
    }

    async fn request(&self, stream: &mut TcpStream, accept: &str) -> Result<(), Over> {
        let since = if self.cursor.is_empty() { "" } else { "&since=" };
        let request = format!(
            "GET {}{since}{} HTTP/1.1\r\nhost: bench\r\naccept: {accept}\r\n\r\n",
            self.path, self.cursor
        );
        Ok(stream.write_all(request.as_bytes()).await?)
    }

    async fn ask(&self, stream: &mut TcpStream) -> Result<Answer, Over> {
        self.request(stream, "application/json").await?;
        let mut bytes = Vec::with_capacity(SCRATCH);
        loop {
            if stream.read_buf(&mut bytes).await? == 0 {
                return Err(Over::Cut);
            }
            let Some(head) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else { continue };
            let text = String::from_utf8_lossy(&bytes[..head]).into_owned();
            let length = text.lines().find_map(|line| line.strip_prefix("content-length: "));
            let length: usize = length.and_then(|length| length.parse().ok()).ok_or(Over::Cut)?;
            let mut body = bytes.split_off(head + 4);
            while body.len() < length {
                if stream.read_buf(&mut body).await? == 0 {
                    return Err(Over::Cut);
                }
            }
            return Ok(Answer { status: status(text.as_bytes()).ok_or(Over::Cut)?, body });
        }
    }
}

/// The cursor with which an answer begins.
fn cursor(body: &[u8]) -> Option<String> {
    let rest = body.strip_prefix(br#"{"cursor":""#)?;
    let end = rest.iter().position(|byte| *byte == b'"')?;
    Some(String::from_utf8_lossy(&rest[..end]).into_owned())
}

/// The status of an answer, once its first line is there.
fn status(head: &[u8]) -> Option<u16> {
    std::str::from_utf8(head.get(9..12)?).ok()?.parse().ok()
}

/// A database that is busy is asked again; a cursor that leads nowhere is the end.
fn judge(status: u16) -> Result<(), Over> {
    match status {
        200 => Ok(()),
        503 => Err(Over::Cut),
        status => Err(Over::Lost(format!("status {status}"))),
    }
}
