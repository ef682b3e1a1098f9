//! Plain requests to a relay, and event streams, over a bare connection.

use std::net::SocketAddr;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{PATIENCE, token};

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its head: the status line and the headers, a line each.
    pub head: String,
    /// Its body; null when it is no JSON.
    pub body: Value,
}

/// `GET` with these headers, a line each.
pub async fn get(address: SocketAddr, path: &str, headers: &str) -> Answer {
    try_get(address, path, headers).await.expect("an answer")
}

/// `POST` with these headers, a line each, and this body.
pub async fn post(address: SocketAddr, path: &str, headers: &str, body: &[u8]) -> Answer {
    request(address, "POST", path, headers, body).await
}

/// Any request with a body.
pub async fn request(address: SocketAddr, method: &str, path: &str, headers: &str, body: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: relay\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    // The relay may refuse it before it has all.
    let _ = stream.write_all(body).await;
    let mut text = String::new();
    timeout(PATIENCE * 2, stream.read_to_string(&mut text)).await.expect("no answer came").unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    Answer {
        status: head.split(' ').nth(1).unwrap().parse().unwrap(),
        head: head.to_owned(),
        body: serde_json::from_str(body).unwrap_or(Value::Null),
    }
}

/// The path of the metrics, with a token that may read them.
pub fn metrics_path() -> String {
    format!("/metrics?apikey={}", token("service_role", None, json!({})))
}

/// The same; none when the connection cannot be had, or ends before the answer is whole.
pub async fn try_get(address: SocketAddr, path: &str, headers: &str) -> Option<Answer> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: relay\r\nconnection: close\r\n{headers}\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut text = String::new();
    timeout(PATIENCE * 2, stream.read_to_string(&mut text)).await.expect("no answer came").ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    let length: usize = head.lines().find_map(|line| line.strip_prefix("content-length: "))?.parse().ok()?;
    let status: u16 = head.split(' ').nth(1)?.parse().ok()?;
    (body.len() == length).then(|| Answer {
        status,
        head: head.to_owned(),
        body: serde_json::from_str(body).unwrap_or(Value::Null),
    })
}

/// An event of a stream.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: String,
    /// Its data.
    pub data: Value,
}

/// An open event stream.
pub struct Events {
    /// The last id that came, with an event or without.
    pub last: String,
    stream: TcpStream,
    /// What was read and is no whole chunk yet; none before the head has ended.
    raw: Option<Vec<u8>>,
    rest: Vec<u8>,
}

impl Events {
    /// Opens one; `last` is the id of the last event that was seen.
    pub async fn open(address: SocketAddr, path: &str, last: Option<&str>) -> Self {
        Self::try_open(address, path, last).await.expect("a stream")
    }

    /// The same, or the status with which it was refused; none when there is no answer.
    pub async fn try_open(address: SocketAddr, path: &str, last: Option<&str>) -> Result<Self, Option<u16>> {
        let mut stream = TcpStream::connect(address).await.map_err(|_| None)?;
        let last = last.map_or(String::new(), |last| format!("last-event-id: {last}\r\n"));
        let request =
            format!("GET {path} HTTP/1.1\r\nhost: relay\r\naccept: text/event-stream\r\n{last}\r\n");
        stream.write_all(request.as_bytes()).await.map_err(|_| None)?;
        let mut events = Self { last: String::new(), stream, raw: None, rest: Vec::new() };
        let head = events.until(b"\r\n\r\n").await.ok_or(None)?;
        events.raw = Some(std::mem::take(&mut events.rest));
        events.take_chunks();
        match head.split(' ').nth(1).and_then(|status| status.parse().ok()) {
            Some(200) => {}
            status => return Err(status),
        }
        assert!(events.block().await.ok_or(None)?.starts_with("retry: 1000\nid: "));
        Ok(events)
    }

    /// The next event; none at the end of the stream.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.step().await? {
                return Some(event);
            }
        }
    }

    /// The next block, which is an event or not; none at the end of the stream.
    pub async fn step(&mut self) -> Option<Option<Event>> {
        let block = self.block().await?;
        let field = |name: &str| {
            let lines = block.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            lines.collect::<Vec<_>>().join("\n")
        };
        if !field("event").is_empty() {
            let data = serde_json::from_str(&field("data")).unwrap();
            return Some(Some(Event { name: field("event"), id: field("id"), data }));
        }
        Some(None)
    }

    /// The next block of lines, without the chunks' lengths.
    async fn block(&mut self) -> Option<String> {
        let block = self.until(b"\n\n").await?;
        if let Some(id) = block.lines().find_map(|line| line.strip_prefix("id: ")) {
            self.last = id.to_owned();
        }
        Some(block)
    }

    async fn until(&mut self, end: &[u8]) -> Option<String> {
        loop {
            if let Some(at) = self.rest.windows(end.len()).position(|part| part == end) {
                let text: Vec<u8> = self.rest.drain(..at + end.len()).collect();
                return Some(String::from_utf8(text).unwrap().trim().to_owned());
            }
            let mut bytes = vec![0; 16 * 1024];
            match timeout(PATIENCE, self.stream.read(&mut bytes)).await.expect("no event came").unwrap_or(0) {
                0 => return None,
                count => self.raw.as_mut().unwrap_or(&mut self.rest).extend(&bytes[..count]),
            }
            self.take_chunks();
        }
    }

    /// Takes what is in whole chunks: a length on a line of its own, the text, the end of the line.
    fn take_chunks(&mut self) {
        let Some(raw) = &mut self.raw else { return };
        while let Some(line) = raw.windows(2).position(|pair| pair == b"\r\n") {
            let length = usize::from_str_radix(std::str::from_utf8(&raw[..line]).unwrap(), 16).unwrap();
            let end = line + 2 + length + 2;
            if raw.len() < end {
                return;
            }
            self.rest.extend(&raw[line + 2..end - 2]);
            raw.drain(..end);
        }
    }
}

/// A connection that reads a little beyond its handshake, if anything, and joins a topic for the changes of a table.
pub async fn stalled(address: SocketAddr, token: &str, topic: &str, table: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let handshake = format!(
        "GET /socket/websocket?vsn=2.0.0&apikey={token} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    stream.write_all(handshake.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let config = json!({"postgres_changes": [{"event": "*", "schema": "public", "table": table}]});
    let join = json!(["1", "1", topic, "phx_join", {"config": config}]).to_string();
    let mut frame = vec![0x81, 0x80 | 126];
    frame.extend((join.len() as u16).to_be_bytes());
    frame.extend([0; 4]);
    frame.extend(join.as_bytes());
    stream.write_all(&frame).await.unwrap();
    stream
}

/// Status and body of a page for machines.
pub async fn text(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: relay\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut text)).await.expect("no answer came").unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}
