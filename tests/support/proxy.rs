//! A TCP proxy in front of the relay, to cut connections that neither side meant to end.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};

/// It listens until it is dropped.
pub struct Proxy {
    /// Where it listens.
    pub address: SocketAddr,
    connections: Arc<Mutex<JoinSet<()>>>,
    held: Arc<AtomicBool>,
    accepting: AbortHandle,
}

impl Proxy {
    /// Passes on everything to `target`.
    pub async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(Mutex::new(JoinSet::new()));
        let open = Arc::clone(&connections);
        let held = Arc::new(AtomicBool::new(false));
        let swallow = Arc::clone(&held);
        let accepting = tokio::spawn(async move {
            while let Ok((here, _)) = listener.accept().await {
                let swallow = Arc::clone(&swallow);
                open.lock().unwrap().spawn(async move {
                    if let Ok(there) = TcpStream::connect(target).await {
                        let (from_here, to_here) = here.into_split();
                        let (from_there, to_there) = there.into_split();
                        tokio::select! {
                            () = pass(from_here, to_there, &swallow) => {}
                            () = pass(from_there, to_here, &swallow) => {}
                        }
                    }
                });
            }
        });
        Self { address, connections, held, accepting: accepting.abort_handle() }
    }

    /// From now on takes whatever comes, from both sides, and passes nothing on, as a network does that died.
    pub fn hold(&self) {
        self.held.store(true, Ordering::Relaxed);
    }

    /// Ends all connections without a word; new ones are let through.
    pub fn cut(&self) {
        self.connections.lock().unwrap().abort_all();
    }
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, swallow: &AtomicBool) {
    let mut bytes = vec![0; 64 * 1024];
    while let Ok(count) = from.read(&mut bytes).await
        && count > 0
    {
        if !swallow.load(Ordering::Relaxed) && to.write_all(&bytes[..count]).await.is_err() {
            return;
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.cut();
    }
}
