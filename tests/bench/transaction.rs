//! T1: one transaction of a million rows, for readers of every kind, and its effect on readers of another table.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::Instant;

use crate::follower::{By, Follower};
use crate::ledger::Ledger;
use crate::machine;
use crate::process::Server;
use crate::report::{Report, Target, percentile};
use crate::stalled::Stalled;
use crate::support::database::Database;
use crate::swarm::{Peer, Swarm};
use crate::writer::Stage;

const TABLE: &str = "bench_transaction";
const BESIDE: &str = "bench_beside";
const SOCKETS: usize = 10;
const FOLLOWERS: usize = 2;
/// Of the other table.
const CLIENTS: usize = 10;
/// Rows a second of the other table.
const RATE: f64 = 50.0;
/// More rows of the other table than are written in a run.
const MOST_ROWS: usize = 100_000;
/// Rows of the other table between two looks whether it is over.
const STEP: u64 = 10;

/// A smaller transaction is told beside one reader who reads so many bytes a second: too few to keep up with the others,
/// enough not to be closed soon.
const SLOW_ROWS: u64 = 20_000;
const SLOW_RATE: f64 = 150_000.0;

/// Readers of the transaction, of one kind.
struct Readers {
    name: String,
    ledger: Arc<Ledger>,
}

impl Readers {
    fn new(name: &str, count: usize, rows: u64) -> Self {
        Self { name: format!("{count} {name}"), ledger: Arc::new(Ledger::new(count, rows as usize)) }
    }

    /// Waits until each has everything; false when that takes too long.
    async fn wait(&self, rows: u64, until: Instant) -> bool {
        while self.ledger.complete() < rows && Instant::now() < until {
            self.ledger.settle(rows).await;
        }
        self.ledger.complete() == rows
    }

    /// Seconds from the commit until every client had this row.
    fn took(&self, row: u64) -> f64 {
        self.ledger.since_acknowledgement(row..=row)[0] / 1000.0
    }

    fn tell(&self, report: &mut Report, rows: u64, is_there: bool, patience: Duration) {
        let name = &self.name;
        if is_there {
            let (took, first) = (self.took(rows), self.took(1));
            let how = format!("the last row {took:.1} s after the commit, the first {first:.2} s after it");
            report.figure(
                &format!("   {name}: rows a second, each"),
                rows as f64 / took,
                "/s",
                &Target::None,
                &how,
            );
        } else {
            let how = format!("given up {} s after the commit", patience.as_secs());
            let share = self.ledger.complete() as f64 / rows as f64;
            report.figure(&format!("T1 {name}: share of the rows"), share, "", &Target::AtLeast(1.0), &how);
        }
        let told = if is_there { rows } else { self.ledger.complete() };
        report.faults(&format!("   {name}: {told} rows"), &self.ledger.faults(told));
    }
}

/// The other table, its clients and its writer.
struct Beside {
    stage: Stage,
    ledger: Arc<Ledger>,
    rows: AtomicU64,
    is_over: AtomicBool,
}

impl Beside {
    async fn write(&self, rows: u64) {
        self.stage.write_paced(&self.ledger, self.rows.load(Relaxed) + 1, rows, RATE).await;
        self.rows.fetch_add(rows, Relaxed);
    }

    async fn write_on(&self) {
        while !self.is_over.load(Relaxed) {
            self.write(STEP).await;
        }
    }

    /// The latencies of all that was written so far, since the last call.
    async fn latencies(&self) -> Vec<f64> {
        self.ledger.settle(self.rows.load(Relaxed)).await;
        self.ledger.take_latencies()
    }
}

pub async fn run(report: &mut Report) {
    report.section("transaction");
    let (rows, seconds, patience) = if report.quick { (50_000, 3, 60) } else { (1_000_000, 10, 300) };
    let patience = Duration::from_secs(patience);
    let database = Database::bare().await;
    let server = Server::relay(&database.url).await;
    // Makes the table; its rows are written by one statement below.
    drop(Stage::watched(&database, TABLE).await);
    let stage = Stage::watched(&database, BESIDE).await;
    let (address, ledger) = (server.address, Arc::new(Ledger::new(CLIENTS, MOST_ROWS)));
    let beside = Beside { stage, ledger, rows: AtomicU64::new(0), is_over: AtomicBool::new(false) };
    let clients = Swarm::connect(Peer::Relay { table: BESIDE }, address, &beside.ledger, 0..CLIENTS).await;
    let kinds = [
        Readers::new("sockets", SOCKETS, rows + SLOW_ROWS),
        Readers::new("event streams", FOLLOWERS, rows),
        Readers::new("long polls", FOLLOWERS, rows),
    ];
    let sockets = Swarm::connect(Peer::Relay { table: TABLE }, address, &kinds[0].ledger, 0..SOCKETS).await;
    let followers = start_followers(address, &kinds[1..]).await;

    beside.write(RATE as u64).await;
    beside.latencies().await;
    let idle = server.resident_kib();
    server.forget_peak();
    beside.write(RATE as u64 * seconds).await;
    let mut phases = vec![("before", beside.latencies().await)];

    let mut there = [false; 3];
    let mut spent = [0.0; 2];
    let mut peaks = Vec::new();
    let change = async {
        insert(&database, 1, rows).await;
        kinds.iter().for_each(|kind| [1, rows].into_iter().for_each(|row| kind.ledger.acknowledged(row)));
        phases.push(("while it is written", beside.ledger.take_latencies()));
        let before = cpu(&server, &database).await;
        let until = Instant::now() + patience;
        there[0] = kinds[0].wait(rows, until).await;
        let after = cpu(&server, &database).await;
        spent = [after[0] - before[0], after[1] - before[1]];
        peaks.push(server.peak_kib());
        phases.push(("while it is told", beside.latencies().await));
        there[1] = kinds[1].wait(rows, until).await;
        there[2] = kinds[2].wait(rows, until).await;
        peaks.push(server.peak_kib());
        phases.push(("while others catch up", beside.latencies().await));

        followers.iter().for_each(tokio::task::JoinHandle::abort);
        let slow = Stalled::join(address, TABLE, String::from("bench"), SOCKETS).await;
        let slow = tokio::spawn(slow.read_slowly(SLOW_RATE));
        beside.latencies().await;
        insert(&database, rows + 1, SLOW_ROWS).await;
        kinds[0].ledger.acknowledged(rows + SLOW_ROWS);
        kinds[0].wait(rows + SLOW_ROWS, Instant::now() + patience).await;
        phases.push(("beside a slow reader", beside.latencies().await));
        slow.abort();
        beside.is_over.store(true, Relaxed);
    };
    tokio::join!(change, beside.write_on());

    sockets.leave();
    beside.latencies().await;
    clients.leave();
    for (kind, is_there) in kinds.iter().zip(there) {
        kind.tell(report, rows, is_there, patience);
    }
    let told = kinds[0].took(rows + SLOW_ROWS);
    let how = format!(
        "{SLOW_ROWS} rows in one transaction, to {SOCKETS} sockets beside one that reads {SLOW_RATE} bytes/s"
    );
    report.figure("T1 beside a slow reader, all told after", told, "s", &Target::AtMost(2.0), &how);
    report.faults("   sockets, with these", &kinds[0].ledger.faults(rows + SLOW_ROWS));
    let how = format!(
        "to the sockets; of the relay {:.1} s, of its connections to PostgreSQL {:.1} s",
        spent[0], spent[1]
    );
    let messages = rows as f64 * SOCKETS as f64 / kinds[0].took(rows);
    report.figure("   messages per second", messages, "/s", &Target::None, &how);
    for (peak, when) in peaks.iter().zip(["while it is told", "to the end"]) {
        let how = format!("{rows} rows, VmHWM over {:.1} MiB idle", idle as f64 / 1024.0);
        let over = peak.saturating_sub(idle) as f64 / 1024.0;
        report.figure(&format!("T1 resident, {when}"), over, "MiB", &Target::AtMost(64.0), &how);
    }
    let how = format!("another table, {RATE} rows/s, {CLIENTS} clients; INSERT sent to frame read");
    for (phase, latencies) in phases.iter_mut().filter(|(_, latencies)| !latencies.is_empty()) {
        for (what, part) in [("p50", 0.5), ("p99", 0.99), ("most", 1.0)] {
            let name = format!("   beside it, {phase}: {what}");
            report.figure(&name, percentile(latencies, part), "ms", &Target::None, &how);
        }
    }
    let written = beside.rows.load(Relaxed);
    report.faults(&format!("   beside it: {written} rows"), &beside.ledger.faults(written));
}

/// The rows from one number on, in one transaction.
async fn insert(database: &Database, first: u64, rows: u64) {
    let body = "warm and still, the wind from the west, a little rain towards the evening";
    let last = first + rows - 1;
    let insert = format!(
        "insert into {TABLE} select n, 'station 7', '{body}' from generate_series({first}, {last}) n"
    );
    database.connect().await.batch_execute(&insert).await.unwrap();
}

async fn start_followers(address: SocketAddr, kinds: &[Readers]) -> Vec<tokio::task::JoinHandle<()>> {
    let mut followers = Vec::new();
    for (kind, by) in kinds.iter().zip([By::Stream, By::Polls]) {
        for user in 0..FOLLOWERS {
            followers.push(Follower::start(by, user, address, TABLE, &kind.ledger).await);
        }
    }
    followers
}

/// Processor seconds of the relay and of its connections to PostgreSQL.
async fn cpu(server: &Server, database: &Database) -> [f64; 2] {
    let sessions = "select pid from pg_stat_activity where application_name like 'relay%' and datname = current_database()";
    let rows = database.client.query(sessions, &[]).await.unwrap();
    let postgres: Duration = rows.iter().map(|row| machine::cpu(row.get::<_, i32>(0).cast_unsigned())).sum();
    [server.cpu().as_secs_f64(), postgres.as_secs_f64()]
}
