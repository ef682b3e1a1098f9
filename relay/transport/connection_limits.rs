//! Limits on open connections: in total, including those that have not sent a request yet, and from one address; and on clients
//! among them, which have a socket or an event stream.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::transport::response::refusal;

/// Connections allowed beyond the client limit, for plain HTTP requests and idle connections.
const SPARE_CONNECTIONS: usize = 1000;
/// Maximum number of refused connections that are answered at the same time. The others are closed without an answer.
const MAX_REFUSALS: usize = 100;
/// Time limit for answering a refused connection.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);

/// Counts connections and clients.
pub struct ConnectionLimits {
    max_clients: usize,
    clients: AtomicUsize,
    max_open: usize,
    max_per_address: Option<usize>,
    open: Mutex<Open>,
    refusals: Semaphore,
}

#[derive(Default)]
struct Open {
    all: usize,
    /// Open connections of each address; empty without a limit per address.
    by_address: HashMap<IpAddr, usize>,
}

/// The slot of an admitted connection. Dropping it frees the slot.
pub struct ConnectionSlot {
    connection_limits: Arc<ConnectionLimits>,
    address: IpAddr,
}

/// The slot of a client. Dropping it frees the slot.
pub struct ClientSlot(Arc<ConnectionLimits>);

impl ConnectionSlot {
    /// Returns the address that the connection is counted for.
    pub fn address(&self) -> IpAddr {
        self.address
    }
}

/// Why a connection is refused: HTTP status line and message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RefusedConnection {
    status: &'static str,
    /// The message.
    pub why: &'static str,
}

impl ConnectionLimits {
    /// Creates the limits: `max_clients` in total, and `max_per_address` connections from one address.
    pub fn new(max_clients: usize, max_per_address: Option<usize>) -> Self {
        Self {
            max_clients,
            clients: AtomicUsize::new(0),
            max_open: max_clients.saturating_add(SPARE_CONNECTIONS),
            max_per_address,
            open: Mutex::default(),
            refusals: Semaphore::new(MAX_REFUSALS),
        }
    }

    /// Takes a slot for a connection.
    ///
    /// # Errors
    /// If there are too many connections, in total or from this address.
    pub fn admit(self: &Arc<Self>, address: IpAddr) -> Result<ConnectionSlot, RefusedConnection> {
        let address = counted_address(address);
        let mut open = self.lock();
        if open.all >= self.max_open {
            return Err(RefusedConnection { status: "503 Service Unavailable", why: "Too many connections" });
        }
        if let Some(max) = self.max_per_address {
            let count = open.by_address.entry(address).or_default();
            if *count >= max {
                let why = "Too many connections from this address";
                return Err(RefusedConnection { status: "429 Too Many Requests", why });
            }
            *count += 1;
        }
        open.all += 1;
        Ok(ConnectionSlot { connection_limits: Arc::clone(self), address })
    }

    /// Takes a slot for a client; `None` if there are too many.
    pub fn admit_client(self: &Arc<Self>) -> Option<ClientSlot> {
        let more = |clients| (clients < self.max_clients).then_some(clients + 1);
        self.clients.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(ClientSlot(Arc::clone(self)))
    }

    /// Returns the number of clients.
    pub fn client_count(&self) -> usize {
        self.clients.load(Ordering::Relaxed)
    }

    /// Answers a refused connection without waiting for its request, then closes it.
    pub async fn refuse(&self, mut stream: TcpStream, refused: RefusedConnection) {
        let Ok(_permit) = self.refusals.try_acquire() else { return };
        let answer = refusal(refused.status, refused.why);
        let _ = timeout(REFUSAL_TIMEOUT, async {
            stream.write_all(&answer).await?;
            stream.shutdown().await?;
            // Read the request first: closing with unread data resets the connection, and the client loses the answer.
            let mut request = [0; 1024];
            while stream.read(&mut request).await? > 0 {}
            std::io::Result::Ok(())
        })
        .await;
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The address that a connection is counted for. IPv6 addresses count by their /64 network, which usually belongs to one client.
fn counted_address(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address => address,
    }
}

impl Drop for ClientSlot {
    fn drop(&mut self) {
        self.0.clients.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        let mut open = self.connection_limits.lock();
        open.all -= 1;
        if let Some(count) = open.by_address.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                open.by_address.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_one_ipv6_network_count_together() {
        let connection_limits = Arc::new(ConnectionLimits::new(10, Some(1)));
        let admit = |address: &str| connection_limits.admit(address.parse().unwrap());
        let first = admit("2001:db8:0:1::1").unwrap_or_else(|_| panic!("it is the first"));
        assert!(admit("2001:db8:0:1:ffff::2").is_err());
        let others = [admit("2001:db8:0:2::1"), admit("192.0.2.1"), admit("::ffff:192.0.2.2")];
        assert!(others.iter().all(Result::is_ok));
        assert!(admit("::ffff:192.0.2.1").is_err());
        drop(first);
        assert!(admit("2001:db8:0:1:ffff::2").is_ok());
    }

    #[test]
    fn no_more_clients_are_admitted_than_there_are_slots_even_at_once() {
        let connection_limits = Arc::new(ConnectionLimits::new(7, None));
        let admitted: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..20).map(|_| scope.spawn(|| connection_limits.admit_client())).collect();
            threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!((admitted.len(), connection_limits.client_count()), (7, 7));
        drop(admitted);
        assert_eq!(connection_limits.client_count(), 0);
        assert!(connection_limits.admit_client().is_some());
    }
}
