//! W1: what being watched costs the writers, by pgbench, with the same table unwatched for comparison.

use std::process::Command;
use std::time::Duration;

use tokio::time::sleep;

use crate::process::Server;
use crate::report::{Report, Target, percentile};
use crate::support::database::Database;

const CLIENTS: [(u32, f64); 3] = [(1, 0.85), (16, 0.75), (64, 0.65)];

/// One run of pgbench.
struct Run {
    per_second: f64,
    commits: f64,
}

pub async fn run(report: &mut Report) {
    report.section("writers");
    let (repetitions, seconds) = if report.quick { (1, 1) } else { (3, 4) };
    let database = Database::bare().await;
    let server = Server::relay(&database.url).await;
    for table in ["bench_plain", "bench_watched"] {
        let id = "bigint generated always as identity primary key";
        database.run(&format!("create table {table} (id {id}, device int, body text)")).await;
    }
    database.run("select relay.watch('bench_watched')").await;
    let scripts = Scripts::write();
    // Warm caches, and the tables no longer new.
    scripts.run(&database.url, "bench_plain", 4, 1);
    scripts.run(&database.url, "bench_watched", 4, 1);
    for (clients, target) in CLIENTS {
        let (mut ratios, mut plain_rates) = (Vec::new(), Vec::new());
        let (mut rings, mut commits, mut cpu) = (0.0, 0.0, 0.0);
        for _ in 0..repetitions {
            let plain = scripts.run(&database.url, "bench_plain", clients, seconds);
            let rung = server.metric("relay_doorbell_rings_total").await;
            let read = server.metric("relay_changes_read_total").await;
            let before = server.cpu();
            let watched = scripts.run(&database.url, "bench_watched", clients, seconds);
            // What the relay still has to read is not the next run's work.
            while server.metric("relay_changes_read_total").await < read + watched.commits {
                sleep(Duration::from_millis(20)).await;
            }
            rings += server.metric("relay_doorbell_rings_total").await - rung;
            commits += watched.commits;
            cpu += (server.cpu() - before).as_secs_f64();
            ratios.push(watched.per_second / plain.per_second);
            plain_rates.push(plain.per_second);
        }
        let plain = percentile(&mut plain_rates, 0.5);
        let how = format!(
            "pgbench, single-row inserts, {seconds} s each, alternating, median of {repetitions}; plain {plain:.0}/s"
        );
        let ratio = percentile(&mut ratios, 0.5);
        report.figure(
            &format!("W1 writers, watched : plain, {clients} clients"),
            ratio,
            "",
            &Target::AtLeast(target),
            &how,
        );
        let how = format!("{rings:.0} notifications for {commits:.0} commits");
        report.figure("   notifications per commit", rings / commits, "", &Target::None, &how);
        let how = "its process alone, reading without a subscriber";
        report.figure("   the relay's CPU per change", cpu * 1e6 / commits, "µs", &Target::None, how);
    }
}

/// One script a table, as pgbench wants files.
struct Scripts {
    folder: std::path::PathBuf,
}

impl Scripts {
    fn write() -> Self {
        let folder = std::env::temp_dir().join(format!("relay-bench-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        for table in ["bench_plain", "bench_watched"] {
            let body = "warm and still, the wind from the west, a little rain towards the evening";
            let insert = format!("insert into {table} (device, body) values (:client_id, '{body}');\n");
            std::fs::write(folder.join(table), insert).unwrap();
        }
        Self { folder }
    }

    fn run(&self, url: &str, table: &str, clients: u32, seconds: u32) -> Run {
        let script = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/cluster.sh"));
        let found = { script }.arg("bin").output().unwrap();
        let pgbench = std::path::Path::new(String::from_utf8(found.stdout).unwrap().trim()).join("pgbench");
        let output = Command::new(pgbench)
            .args(["-n", "-M", "prepared", "-c", &clients.to_string(), "-j", &clients.min(2).to_string()])
            .args(["-T", &seconds.to_string(), "-f"])
            .arg(self.folder.join(table))
            .arg(url)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        let number = |name: &str| -> f64 {
            let line =
                text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{text}"));
            line.trim_start().split(' ').next().unwrap().parse().unwrap()
        };
        Run { per_second: number("tps = "), commits: number("number of transactions actually processed: ") }
    }
}

impl Drop for Scripts {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
