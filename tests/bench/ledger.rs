//! Which row was written when, and who has it: what makes a count of deliveries true.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::time::timeout;

/// Whether a row, by its number, is for a user.
pub type IsFor = fn(user: usize, row: u64) -> bool;

/// Rows are numbered from 1 in the order of their commits; every client must get each that is for it once, in that order.
pub struct Ledger {
    epoch: Instant,
    /// Clients for whom a row is.
    readers: u32,
    /// None: every row is for every client.
    is_for: Option<IsFor>,
    rows: Box<[Row]>,
    /// Clients whose subscription is confirmed.
    pub joined: AtomicUsize,
    /// Rows that every client has.
    complete: AtomicU64,
    pub progress: Notify,
    pub messages: AtomicU64,
    pub bytes: AtomicU64,
    lost: AtomicU64,
    repeated: AtomicU64,
    /// Rows that were shown to a client that may not see them.
    leaked: AtomicU64,
    /// Clients that were refused or cut off.
    pub broken: AtomicU64,
    /// Microseconds from the statement to each receipt.
    latencies: Mutex<Vec<u32>>,
}

#[derive(Default)]
struct Row {
    sent: AtomicU64,
    acknowledged: AtomicU64,
    received: AtomicU64,
    holders: AtomicU32,
}

impl Ledger {
    /// Every row is for every client.
    pub fn new(clients: usize, rows: usize) -> Self {
        Self::with(clients, rows, None)
    }

    /// Each row is for so many clients.
    pub fn selective(readers: usize, rows: usize, is_for: IsFor) -> Self {
        Self::with(readers, rows, Some(is_for))
    }

    fn with(readers: usize, rows: usize, is_for: Option<IsFor>) -> Self {
        Self {
            epoch: Instant::now(),
            readers: readers as u32,
            is_for,
            rows: (0..=rows).map(|_| Row::default()).collect(),
            joined: AtomicUsize::new(0),
            complete: AtomicU64::new(0),
            progress: Notify::new(),
            messages: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            repeated: AtomicU64::new(0),
            leaked: AtomicU64::new(0),
            broken: AtomicU64::new(0),
            latencies: Mutex::default(),
        }
    }

    /// Nanoseconds on the ledger's clock.
    pub fn now(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }

    pub fn sent(&self, id: u64) {
        self.rows[id as usize].sent.store(self.now(), Relaxed);
    }

    pub fn acknowledged(&self, id: u64) {
        self.rows[id as usize].acknowledged.store(self.now(), Relaxed);
    }

    /// A client that has everything up to `last` got `id`; returns what it has now.
    pub fn received(&self, user: usize, last: u64, id: u64, now: u64, latencies: &mut Vec<u32>) -> u64 {
        if id <= last || id as usize >= self.rows.len() {
            self.repeated.fetch_add(1, Relaxed);
            return last;
        }
        match self.is_for {
            None => _ = self.lost.fetch_add(id - last - 1, Relaxed),
            Some(is_for) => _ = self.leaked.fetch_add(u64::from(!is_for(user, id)), Relaxed),
        }
        let row = &self.rows[id as usize];
        latencies.push((now.saturating_sub(row.sent.load(Relaxed)) / 1000) as u32);
        row.received.store(now, Relaxed);
        if row.holders.fetch_add(1, Relaxed) + 1 == self.readers {
            self.complete.fetch_add(1, Relaxed);
            self.progress.notify_one();
        }
        id
    }

    pub fn keep(&self, latencies: &mut Vec<u32>) {
        self.latencies.lock().unwrap().append(latencies);
    }

    pub fn complete(&self) -> u64 {
        self.complete.load(Relaxed)
    }

    /// Waits until every client has `rows` rows; gives up when nothing comes any more.
    pub async fn settle(&self, rows: u64) {
        while self.complete() < rows {
            if timeout(Duration::from_secs(5), self.progress.notified()).await.is_err() {
                return;
            }
        }
    }

    /// The latencies since the last call, in milliseconds.
    pub fn take_latencies(&self) -> Vec<f64> {
        let taken = std::mem::take(&mut *self.latencies.lock().unwrap());
        taken.into_iter().map(|micros| f64::from(micros) / 1000.0).collect()
    }

    /// Milliseconds from the acknowledgement of each commit to the last receipt; none below zero.
    pub fn since_acknowledgement(&self, ids: std::ops::RangeInclusive<u64>) -> Vec<f64> {
        let span = |id: u64| {
            let row = &self.rows[id as usize];
            row.received.load(Relaxed).saturating_sub(row.acknowledged.load(Relaxed)) as f64 / 1e6
        };
        ids.map(span).collect()
    }

    /// What must be zero, after `rows` rows.
    pub fn faults(&self, rows: u64) -> [(&'static str, u64); 4] {
        let owed = rows * u64::from(self.readers);
        let missing = owed.saturating_sub(self.messages.load(Relaxed) - self.repeated.load(Relaxed));
        [
            ("lost", missing.max(self.lost.load(Relaxed))),
            ("repeated or out of order", self.repeated.load(Relaxed)),
            ("shown to another client", self.leaked.load(Relaxed)),
            ("clients broken", self.broken.load(Relaxed)),
        ]
    }
}
