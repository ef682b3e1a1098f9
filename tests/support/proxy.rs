//! A TCP proxy in front of the relay or of PostgreSQL: it cuts connections that neither side meant to end, or lets
//! them stand while nothing passes any more.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

/// It listens until it is dropped.
pub struct Proxy {
    /// Where it listens.
    pub address: SocketAddr,
    connections: Arc<Mutex<JoinSet<()>>>,
    holds: watch::Sender<bool>,
    accepting: AbortHandle,
}

impl Proxy {
    /// Passes on everything to `target`.
    pub async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(Mutex::new(JoinSet::new()));
        let open = Arc::clone(&connections);
        let (holds, holding) = watch::channel(false);
        let accepting = tokio::spawn(async move {
            while let Ok((here, _)) = listener.accept().await {
                let holding = holding.clone();
                open.lock().unwrap().spawn(async move {
                    if let Ok(there) = TcpStream::connect(target).await {
                        let (from_here, to_here) = here.into_split();
                        let (from_there, to_there) = there.into_split();
                        tokio::select! {
                            () = pass(from_here, to_there, holding.clone()) => {}
                            () = pass(from_there, to_here, holding) => {}
                        }
                    }
                });
            }
        });
        Self { address, connections, holds, accepting: accepting.abort_handle() }
    }

    /// In front of the server of this URL, and the URL that leads through it.
    pub async fn to_server(url: &str) -> (Self, String) {
        let (head, rest) = url.split_once('@').unwrap();
        let (server, database) = rest.split_once('/').unwrap();
        let proxy = Self::start(server.parse().unwrap()).await;
        let through = format!("{head}@{}/{database}", proxy.address);
        (proxy, through)
    }

    /// Ends all connections without a word; new ones are let through.
    pub fn cut(&self) {
        self.connections.lock().unwrap().abort_all();
    }

    /// From now on takes whatever comes, from both sides, and passes nothing on, as a network does that died. The
    /// connections that are open stay so for good, as what they lost is lost.
    pub fn hold(&self) {
        self.holds.send_replace(true);
    }

    /// Lets new connections through again.
    pub fn release(&self) {
        self.holds.send_replace(false);
    }
}

async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut holds: watch::Receiver<bool>,
) {
    let mut bytes = vec![0; 64 * 1024];
    let mut lost = *holds.borrow_and_update();
    loop {
        let count = tokio::select! {
            count = from.read(&mut bytes) => count.unwrap_or(0),
            Ok(()) = holds.changed() => {
                lost |= *holds.borrow_and_update();
                continue;
            }
        };
        // A connection that was held is not told of the end either.
        if count == 0 && lost {
            return std::future::pending().await;
        }
        if count == 0 || (!lost && to.write_all(&bytes[..count]).await.is_err()) {
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
