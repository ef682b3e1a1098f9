//! C2: ten thousand clients are cut off and come back, all at once, beside one that stays.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};
use tokio_postgres::Client;

use crate::ledger::Ledger;
use crate::machine;
use crate::process::Server;
use crate::report::{Report, Target, percentile};
use crate::support::database::{Database, cluster_url, connect};
use crate::swarm::{Hello, Peer, Swarm};
use crate::writer::Stage;

const TABLE: &str = "bench_storm";
const BESIDE: &str = "bench_calm";
/// Rows a second for the one that stays.
const RATE: f64 = 50.0;
/// More rows for it than are written in a run.
const MOST_ROWS: usize = 100_000;
/// Rows of it between two looks whether it is over.
const STEP: u64 = 5;
/// Rows for every client, before and after.
const ROWS: u64 = 10;
/// A client that has not joined after so long never will.
const PATIENCE: Duration = Duration::from_secs(90);
/// Backends tell their counts no later than this.
const COUNTED: Duration = Duration::from_millis(1500);

/// What storms came to, a value each, or one for each row.
#[derive(Default)]
struct Done {
    took: Vec<f64>,
    before: Vec<f64>,
    during: Vec<f64>,
    /// The most connections of the relay to the database at a time, and how many were opened.
    connections: Vec<f64>,
    opened: Vec<f64>,
    /// Beyond those of as long a time before.
    transactions: Vec<f64>,
    cpu: Vec<f64>,
}

pub async fn run(report: &mut Report) {
    report.section("storm");
    let clients = match machine::file_limit() {
        _ if report.quick => 1000,
        limit if limit > 11_000 => 10_000,
        limit => limit.saturating_sub(1000).min(5000),
    };
    let repetitions = if report.quick { 1 } else { 3 };
    let database = Database::bare().await;
    let server = Server::relay(&database.url).await;
    let everybody = Stage::watched(&database, TABLE).await;
    let calm = Calm::new(&database, &server).await;
    let room = (ROWS * (repetitions + 1)) as usize;

    // Rows go on being numbered from one crowd to the next, so none of them begins with the first.
    let crowd = || Arc::new(Ledger::selective(clients, room, |_, _| true));
    let mut ledger = crowd();
    let mut swarm = Swarm::connect(Peer::Relay { table: TABLE }, server.address, &ledger, 0..clients).await;
    let mut done = Done::default();
    for storm in 1..=repetitions {
        deliver(&everybody, &ledger, storm).await;
        let next = crowd();
        swarm = calm.storm(swarm, &server, &next, clients, &mut done).await;
        let last = std::mem::replace(&mut ledger, next);
        tell_crowd(report, clients, storm, &last);
    }
    deliver(&everybody, &ledger, repetitions + 1).await;
    swarm.leave();
    tell_crowd(report, clients, repetitions + 1, &ledger);
    calm.leave(report);
    tell(report, clients, done);
}

/// Proves that every client that joined is delivered to.
async fn deliver(stage: &Stage, ledger: &Ledger, crowd: u64) {
    stage.write_paced(ledger, (crowd - 1) * ROWS + 1, ROWS, 5.0).await;
    ledger.settle(ROWS).await;
}

fn tell_crowd(report: &mut Report, clients: usize, crowd: u64, ledger: &Ledger) {
    let when = if crowd == 1 { String::from("first") } else { format!("after storm {}", crowd - 1) };
    report.faults(&format!("   {clients} clients joined, {when}: {ROWS} rows"), &ledger.faults(ROWS));
}

fn tell(report: &mut Report, clients: usize, mut done: Done) {
    let most = |values: &[f64]| values.iter().copied().fold(f64::NAN, f64::max);
    let count = done.took.len();
    let mut figure = |name: &str, value: f64, unit: &str, target: Target, how: &str| {
        report.figure(name, value, unit, &target, how);
    };
    let how = format!("{clients} sockets closed and opened again at once; median of {count}");
    let took = percentile(&mut done.took.clone(), 0.5);
    figure("C2 storm, until all are joined again", took, "s", Target::AtMost(10.0), &how);
    figure("   the longest of them", most(&done.took), "s", Target::None, "");
    figure("   joins per second", clients as f64 / took, "/s", Target::None, "by this one client process");
    let cpu = percentile(&mut done.cpu, 0.5) * 1e6 / clients as f64;
    figure(
        "   the relay's CPU per client",
        cpu,
        "µs",
        Target::None,
        "the old one's end and the new one's join",
    );
    let how = format!("one client of another table, {RATE} rows/s; INSERT sent to frame read");
    for (when, latencies) in [("before", &mut done.before), ("during", &mut done.during)] {
        for (what, part) in [("p50", 0.5), ("p99", 0.99), ("most", 1.0)] {
            let name = format!("   beside it, {when}: {what}");
            figure(&name, percentile(latencies, part), "ms", Target::None, &how);
        }
    }
    let how = "of the relay, at a time";
    figure("C2 connections to the database, at most", most(&done.connections), "", Target::AtMost(20.0), how);
    figure("   opened by a storm, at most", most(&done.opened), "", Target::None, "pg_stat_database");
    let transactions = most(&done.transactions) / clients as f64;
    let how = "pg_stat_database, less those of as long a time before; the most of all storms";
    figure("C2 transactions per returning client", transactions, "", Target::AtMost(1.0), how);
}

/// The client that stays, and the writer of its rows.
struct Calm {
    stage: Stage,
    ledger: Arc<Ledger>,
    swarm: Swarm,
    rows: Cell<u64>,
    /// To another database, so that looking is not counted.
    observer: Client,
    database: String,
}

/// Counts of the database so far.
#[derive(Clone, Copy)]
struct Counts {
    at: Instant,
    transactions: f64,
    opened: f64,
}

impl Calm {
    async fn new(database: &Database, server: &Server) -> Self {
        let stage = Stage::watched(database, BESIDE).await;
        let ledger = Arc::new(Ledger::new(1, MOST_ROWS));
        let swarm = Swarm::connect(Peer::Relay { table: BESIDE }, server.address, &ledger, 0..1).await;
        let (_, name) = database.url.rsplit_once('/').unwrap();
        let observer = connect(&cluster_url()).await;
        Self { stage, ledger, swarm, rows: Cell::new(0), observer, database: name.to_owned() }
    }

    /// Disconnects every client and waits until all are back.
    async fn storm(
        &self,
        swarm: Swarm,
        server: &Server,
        ledger: &Arc<Ledger>,
        clients: usize,
        done: &mut Done,
    ) -> Swarm {
        let hellos: Vec<Hello> = (0..clients).map(|user| Hello::relay(TABLE, "bench", user)).collect();
        let is_over = Cell::new(false);
        let storm = async {
            sleep(COUNTED).await;
            self.ledger.take_latencies();
            let first = self.counts().await;
            sleep(COUNTED * 2).await;
            done.before.extend(self.latencies().await);
            let second = self.counts().await;

            let (cpu, started) = (server.cpu(), Instant::now());
            spawn_blocking(|| swarm.leave()).await.unwrap();
            let swarm = Swarm::start(hellos, clients, server.address, ledger);
            let mut connections = 0.0_f64;
            while ledger.joined.load(Relaxed) + (ledger.broken.load(Relaxed) as usize) < clients
                && started.elapsed() < PATIENCE
            {
                connections = connections.max(self.connections().await);
                sleep(Duration::from_millis(10)).await;
            }
            done.took.push(started.elapsed().as_secs_f64());
            done.cpu.push((server.cpu() - cpu).as_secs_f64());
            done.during.extend(self.latencies().await);
            sleep(COUNTED).await;
            let third = self.counts().await;
            let usual = (second.transactions - first.transactions) / (second.at - first.at).as_secs_f64();
            let usual = usual * (third.at - second.at).as_secs_f64();
            done.transactions.push(third.transactions - second.transactions - usual);
            done.opened.push(third.opened - second.opened);
            done.connections.push(connections);
            is_over.set(true);
            swarm
        };
        let write = async {
            while !is_over.get() {
                self.stage.write_paced(&self.ledger, self.rows.get() + 1, STEP, RATE).await;
                self.rows.set(self.rows.get() + STEP);
            }
        };
        tokio::join!(storm, write).0
    }

    /// The latencies of all that was written so far, since the last call.
    async fn latencies(&self) -> Vec<f64> {
        self.ledger.settle(self.rows.get()).await;
        self.ledger.take_latencies()
    }

    async fn counts(&self) -> Counts {
        let counts = "select (xact_commit + xact_rollback)::float8, sessions::float8 from pg_stat_database where datname = $1";
        let row = self.observer.query_one(counts, &[&self.database]).await.unwrap();
        Counts { at: Instant::now(), transactions: row.get(0), opened: row.get(1) }
    }

    async fn connections(&self) -> f64 {
        let count = "select count(*)::float8 from pg_stat_activity where datname = $1 and application_name like 'relay%'";
        self.observer.query_one(count, &[&self.database]).await.unwrap().get(0)
    }

    fn leave(self, report: &mut Report) {
        self.swarm.leave();
        let rows = self.rows.get();
        report.faults(&format!("   beside it: {rows} rows"), &self.ledger.faults(rows));
    }
}
