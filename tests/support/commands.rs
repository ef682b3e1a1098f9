//! A proxy in front of PostgreSQL that counts the commands of its clients.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// It listens until it is dropped.
pub struct Commands {
    /// The connection string through it.
    pub url: String,
    count: Arc<AtomicUsize>,
    accepting: JoinHandle<()>,
}

impl Commands {
    /// In front of the server of this connection string.
    pub async fn to_server(url: &str) -> Self {
        let (head, rest) = url.split_once('@').unwrap();
        let (server, database) = rest.split_once('/').unwrap();
        let server = server.to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("{head}@{}/{database}", listener.local_addr().unwrap());
        let count = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&count);
        let accepting = tokio::spawn(async move {
            while let Ok((here, _)) = listener.accept().await {
                let there = TcpStream::connect(&server).await.unwrap();
                let ((from_here, mut to_here), (mut from_there, to_there)) =
                    (here.into_split(), there.into_split());
                let counted = Arc::clone(&counted);
                tokio::spawn(async move {
                    tokio::select! {
                        _ = pass(from_here, to_there, &counted) => {}
                        _ = copy(&mut from_there, &mut to_here) => {}
                    }
                });
            }
        });
        Self { url, count, accepting }
    }

    /// The commands since the last call: each ends with a message `Sync` or is a `Query`.
    pub fn take(&self) -> usize {
        self.count.swap(0, Relaxed)
    }
}

async fn pass(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    count: &AtomicUsize,
) -> Result<(), std::io::Error> {
    const STARTUP: u32 = 3 << 16;
    let mut has_started = false;
    loop {
        let mut message = Vec::new();
        if has_started {
            message.push(from.read_u8().await?);
        }
        let length = from.read_u32().await?;
        message.extend(length.to_be_bytes());
        let mut body = vec![0; length as usize - 4];
        from.read_exact(&mut body).await?;
        if has_started && matches!(message[0], b'S' | b'Q') {
            count.fetch_add(1, Relaxed);
        }
        has_started |= body.starts_with(&STARTUP.to_be_bytes());
        message.extend(body);
        to.write_all(&message).await?;
    }
}

impl Drop for Commands {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}
