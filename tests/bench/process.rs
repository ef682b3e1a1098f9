//! The servers under measurement, each a process of its own that ends with its handle.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::machine;
use crate::support::http::metrics_path;
use crate::support::{SECRET, eventually};

/// The relay of this build.
pub const RELAY: &str = env!("CARGO_BIN_EXE_relay");

/// The relay that is measured.
static MEASURED: Mutex<Option<String>> = Mutex::new(None);

/// Measures this binary from now on, which may be one of an older build.
pub fn measure(binary: &str) {
    *MEASURED.lock().unwrap() = Some(binary.to_owned());
}

fn measured() -> String {
    MEASURED.lock().unwrap().clone().unwrap_or_else(|| RELAY.to_owned())
}

pub struct Server {
    child: Child,
    pub address: SocketAddr,
}

impl Server {
    /// The relay, installed, reading the changelog.
    pub async fn relay(database_url: &str) -> Self {
        Self::relay_with(database_url, &[]).await
    }

    /// The same with more flags.
    pub async fn relay_with(database_url: &str, flags: &[&str]) -> Self {
        let mut command = Command::new(measured());
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("RELAY_")) {
            command.env_remove(name);
        }
        command.args(["serve", "--install", "--listen", "127.0.0.1:0", "--max-connections", "20000"]);
        command.args(["--database-url", database_url, "--jwt-secret", SECRET, "--log-json"]).args(flags);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = loop {
            let line = lines.next().expect("the relay ended at once").unwrap();
            let told: serde_json::Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("{line}"));
            if let Some(address) = told["fields"]["address"].as_str() {
                break address.parse().unwrap();
            }
        };
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok).filter(|line| !line.contains("\"INFO\"")) {
                println!("   relay: {line}");
            }
        });
        let server = Self { child, address };
        eventually("the relay is ready", || async {
            server.get("/readyz").await.starts_with("HTTP/1.1 200").then_some(())
        })
        .await;
        server
    }

    /// The same program as this, serving what a machine can do at all.
    pub fn floor(database_url: &str) -> Self {
        let program = std::env::current_exe().unwrap();
        let mut child =
            Command::new(program).args(["--floor", database_url]).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self { child, address: line.trim().parse().unwrap() }
    }

    /// Whether `relay serve` has this flag.
    pub fn knows(flag: &str) -> bool {
        let output = Command::new(measured()).args(["serve", "--help"]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).split_whitespace().any(|word| word == flag)
    }

    pub fn cpu(&self) -> Duration {
        machine::cpu(self.child.id())
    }

    pub fn resident_kib(&self) -> u64 {
        machine::resident_kib(self.child.id())
    }

    /// From now on the peak is that of what follows.
    pub fn forget_peak(&self) {
        machine::forget_peak(self.child.id());
    }

    /// The most that was resident, in KiB.
    pub fn peak_kib(&self) -> u64 {
        machine::peak_kib(self.child.id())
    }

    /// One of the relay's counters.
    pub async fn metric(&self, name: &str) -> f64 {
        let text = self.get(&metrics_path()).await;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no metric {name} in\n{text}")).trim().parse().unwrap()
    }

    async fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
