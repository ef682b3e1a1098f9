//! M1, M2 and C1: what a client costs that has joined one channel and waits.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::ledger::Ledger;
use crate::machine;
use crate::process::Server;
use crate::report::{Report, Target};
use crate::support::database::Database;
use crate::swarm::{Peer, Swarm};
use crate::writer::Stage;

const TABLE: &str = "bench_memory";
/// Code pages and caches are there once these have joined.
const FIRST: usize = 200;

pub async fn run(report: &mut Report) {
    report.section("memory");
    let clients = match machine::file_limit() {
        _ if report.quick => 2000,
        limit if limit > 11_000 => 10_000,
        limit => limit.saturating_sub(1000).min(5000),
    };
    let seconds = if report.quick { 5 } else { 10 };

    let database = Database::bare().await;
    let server = Server::relay(&database.url).await;
    let _stage = Stage::watched(&database, TABLE).await;
    let peer = Peer::Relay { table: TABLE };
    let ledger = Arc::new(Ledger::new(FIRST + clients, 0));
    let first = Swarm::connect(peer.clone(), server.address, &ledger, 0..FIRST).await;
    sleep(Duration::from_secs(1)).await;

    let (resident, cpu, started) = (server.resident_kib(), server.cpu(), Instant::now());
    let rest = Swarm::connect(peer, server.address, &ledger, FIRST..FIRST + clients).await;
    let (took, cpu) = (started.elapsed(), server.cpu() - cpu);
    sleep(Duration::from_secs(2)).await;
    let each = (server.resident_kib() - resident) as f64 / clients as f64;
    let idle = server.cpu();
    sleep(Duration::from_secs(seconds)).await;
    let idle = (server.cpu() - idle).as_secs_f64() / seconds as f64 * 100.0;

    report.faults(&format!("relay: {clients} clients joined"), &ledger.faults(0));
    let how =
        format!("{clients} clients beyond the first {FIRST}, each another user with one channel; VmRSS");
    report.figure("M1 memory per idle joined client", each, "KiB", &Target::AtMost(8.0), &how);
    let how = format!("over {seconds} s, each client with a heartbeat every 25 s");
    report.figure("M2 idle, share of a core", idle, "%", &Target::AtMost(2.0), &how);
    let per_client = cpu.as_secs_f64() * 1e6 / clients as f64;
    let how = "handshake, both tokens verified, join, confirmation; 64 clients at once";
    report.figure("C1 connect and join, CPU per client", per_client, "µs", &Target::AtMost(200.0), how);
    let rate = clients as f64 / took.as_secs_f64();
    report.figure("   connect and join", rate, "/s", &Target::None, "by this one client process");
    first.leave();
    rest.leave();
}
