//! Who may connect: so many connections in all, also those that are no clients yet, and so many from one address.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::transport::response::refusal;

/// Beside the clients so many connections may be open: requests, and those that say nothing.
const SPARE: usize = 1000;
/// So many at a time are told why they may not stay; others are cut.
const TOLD: usize = 100;
/// They have this long to hear it.
const LINGER: Duration = Duration::from_secs(1);

/// Counts connections.
pub struct ConnectionLimits {
    most: usize,
    most_of_one: Option<usize>,
    open: Mutex<Open>,
    told: Semaphore,
}

#[derive(Default)]
struct Open {
    all: usize,
    /// Only where it matters.
    by_address: HashMap<IpAddr, usize>,
}

/// A connection that may stay; its place is free when this is dropped.
pub struct ConnectionSlot {
    connection_limits: Arc<ConnectionLimits>,
    address: IpAddr,
}

impl ConnectionSlot {
    /// The address that it counts for.
    pub fn address(&self) -> IpAddr {
        self.address
    }
}

/// Why a connection may not stay: status line and words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused {
    status: &'static str,
    /// The words.
    pub why: &'static str,
}

impl ConnectionLimits {
    /// For so many clients, and so many connections from one address.
    pub fn new(clients: usize, of_one: Option<usize>) -> Self {
        Self {
            most: clients.saturating_add(SPARE),
            most_of_one: of_one,
            open: Mutex::default(),
            told: Semaphore::new(TOLD),
        }
    }

    /// Takes in a connection.
    ///
    /// # Errors
    /// When there are too many.
    pub fn admit(self: &Arc<Self>, address: IpAddr) -> Result<ConnectionSlot, Refused> {
        let address = place(address);
        let mut open = self.lock();
        if open.all >= self.most {
            return Err(Refused { status: "503 Service Unavailable", why: "Too many connections" });
        }
        if let Some(most) = self.most_of_one {
            let count = open.by_address.entry(address).or_default();
            if *count >= most {
                let why = "Too many connections from this address";
                return Err(Refused { status: "429 Too Many Requests", why });
            }
            *count += 1;
        }
        open.all += 1;
        Ok(ConnectionSlot { connection_limits: Arc::clone(self), address })
    }

    /// Says why, without waiting for the request.
    pub async fn turn_away(&self, mut stream: TcpStream, refused: Refused) {
        let Ok(_told) = self.told.try_acquire() else { return };
        let answer = refusal(refused.status, refused.why);
        let _ = timeout(LINGER, async {
            stream.write_all(&answer).await?;
            stream.shutdown().await?;
            // Closing before the request is read could cost the client the answer.
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

/// Which address a connection counts for. Whoever has an address of version 6 has all 2^64 of its network.
fn place(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address => address,
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
}
