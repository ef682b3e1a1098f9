//! B1 and B2: a thousand members of one topic, and one more who sends to them.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until};

use crate::ledger::Ledger;
use crate::process::Server;
use crate::report::{Report, Target, percentile};
use crate::support::database::Database;
use crate::swarm::{Hello, Peer, Swarm, masked};
use crate::writer::AHEAD;

const MEMBERS: usize = 1000;
const RATE: f64 = 100.0;
const WARM_UP: u64 = 100;
/// More than any machine delivers in a run.
const MOST: usize = 400_000;
/// What makes a frame about 300 bytes long.
const BODY: &str = "warm and still, the wind from the west, a little rain towards the evening, clearing again after midnight; \
                    pressure rising slowly, visibility good";

/// A server, its members, and the one who sends. Broadcasts are numbered from 1, as rows are.
struct Topic {
    name: &'static str,
    server: Server,
    ledger: Arc<Ledger>,
    swarm: Swarm,
    sender: TcpStream,
    sent: u64,
}

/// What one server did, a value a repetition.
#[derive(Default)]
struct Done {
    paced: Vec<f64>,
    saturated: Vec<f64>,
    rate: Vec<f64>,
    /// Milliseconds from the sender's write to each receipt.
    latencies: Vec<f64>,
}

impl Topic {
    async fn floor() -> Self {
        let database = Database::bare().await;
        let server = Server::floor(&database.url);
        let sender = Hello::bare(MEMBERS, "/send");
        Self::of("floor", Peer::Floor, server, sender).await
    }

    async fn relay() -> Self {
        let database = Database::bare().await;
        // The sender alone is above the limits of a client.
        let flags = ["--messages-per-second", "1000000"];
        let server = Server::relay_with(&database.url, &flags).await;
        let sender = Hello::topic("bench", MEMBERS);
        Self::of("relay", Peer::Topic { name: "bench" }, server, sender).await
    }

    async fn of(name: &'static str, peer: Peer, server: Server, hello: Hello) -> Self {
        let ledger = Arc::new(Ledger::new(MEMBERS, MOST));
        let swarm = Swarm::connect(peer, server.address, &ledger, 0..MEMBERS).await;
        let mut sender = TcpStream::connect(server.address).await.unwrap();
        sender.set_nodelay(true).unwrap();
        sender.write_all(hello.request().as_bytes()).await.unwrap();
        let mut heard = String::new();
        let mut until = async |sender: &mut TcpStream, part: &str| {
            let mut buffer = [0; 4096];
            while !heard.contains(part) {
                let count = sender.read(&mut buffer).await.unwrap();
                assert!(count > 0, "the sender is refused: {heard}");
                heard += &String::from_utf8_lossy(&buffer[..count]);
            }
        };
        until(&mut sender, "\r\n\r\n").await;
        if let Some(join) = &hello.join {
            sender.write_all(join).await.unwrap();
            until(&mut sender, r#""status":"ok""#).await;
        }
        Self { name, server, ledger, swarm, sender, sent: 0 }
    }

    async fn send(&mut self) {
        self.sent += 1;
        let content = format!(r#"{{"id":{},"body":"{BODY}"}}"#, self.sent);
        let message = match self.name {
            "floor" => format!("{content}\n").into_bytes(),
            _ => masked(&format!(
                r#"["1","2","realtime:bench","broadcast",{{"type":"broadcast","event":"row","payload":{{"record":{content}}}}}]"#
            )),
        };
        self.ledger.sent(self.sent);
        self.sender.write_all(&message).await.unwrap();
    }

    /// Broadcasts at a steady rate. Returns the microseconds of the server's processor for each message that it sent.
    async fn paced(&mut self, count: u64) -> f64 {
        let (cpu, messages, started) = self.begin();
        for index in 0..count {
            sleep_until(started + Duration::from_secs_f64(index as f64 / RATE)).await;
            self.send().await;
        }
        self.finish(cpu, messages, started).await.0
    }

    /// Broadcasts as fast as the members read them. Returns the same, and messages a second.
    async fn saturated(&mut self, time: Duration) -> (f64, f64) {
        let (cpu, messages, started) = self.begin();
        while started.elapsed() < time {
            while self.sent < self.ledger.complete() + AHEAD {
                self.send().await;
            }
            tokio::select! {
                () = self.ledger.progress.notified() => {}
                () = sleep_until(started + time) => {}
            }
        }
        self.finish(cpu, messages, started).await
    }

    fn begin(&self) -> (Duration, u64, Instant) {
        (self.server.cpu(), self.ledger.messages.load(Relaxed), Instant::now())
    }

    async fn finish(&self, cpu: Duration, messages: u64, started: Instant) -> (f64, f64) {
        self.ledger.settle(self.sent).await;
        let messages = (self.ledger.messages.load(Relaxed) - messages) as f64;
        let cpu = (self.server.cpu() - cpu).as_secs_f64() * 1e6;
        (cpu / messages, messages / started.elapsed().as_secs_f64())
    }

    fn leave(self, report: &mut Report) {
        self.swarm.leave();
        let bytes = self.ledger.bytes.load(Relaxed) / self.ledger.messages.load(Relaxed).max(1);
        let what = format!("{}: {} broadcasts, frames of {bytes} bytes", self.name, self.sent);
        report.faults(&what, &self.ledger.faults(self.sent));
    }
}

pub async fn run(report: &mut Report) {
    report.section("broadcast");
    let (repetitions, seconds) = if report.quick { (1, 3) } else { (5, 4) };
    let mut sides = [Topic::floor().await, Topic::relay().await];
    let mut done = [Done::default(), Done::default()];
    for side in &mut sides {
        side.paced(WARM_UP).await;
        side.ledger.take_latencies();
    }
    for _ in 0..repetitions {
        for (side, done) in sides.iter_mut().zip(&mut done) {
            done.paced.push(side.paced(RATE as u64 * seconds).await);
            done.latencies.extend(side.ledger.take_latencies());
        }
        for (side, done) in sides.iter_mut().zip(&mut done) {
            let (cpu, rate) = side.saturated(Duration::from_secs(seconds)).await;
            done.saturated.push(cpu);
            done.rate.push(rate);
            side.ledger.take_latencies();
        }
    }
    for side in sides {
        side.leave(report);
    }
    tell(report, done, &format!("median of {repetitions}x {seconds} s"));
}

fn tell(report: &mut Report, [mut floor, mut relay]: [Done; 2], of: &str) {
    let median = |values: &[f64]| percentile(&mut values.to_vec(), 0.5);
    let ratio = |ours: &[f64], theirs: &[f64]| {
        let pairs: Vec<f64> = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
        median(&pairs)
    };
    let beside = "a bare server that sends each line to all, in turns with the relay";
    let how = format!("{MEMBERS} members, {RATE}/s, {of}; the server's processor time");
    let mut figure = |name: &str, value: f64, unit: &str, target: Target, how: &str| {
        report.figure(name, value, unit, &target, how);
    };
    figure("B1 broadcast, CPU per message", median(&relay.paced), "µs", Target::None, &how);
    figure("   floor: CPU per message", median(&floor.paced), "µs", Target::None, beside);
    let against = ratio(&relay.paced, &floor.paced);
    figure("B1 broadcast, CPU against the floor", against, "", Target::AtMost(1.5), &how);
    let how = "the same broadcasts; sent to frame read";
    let [relay_50, floor_50] = [&mut relay, &mut floor].map(|done| percentile(&mut done.latencies, 0.5));
    let [relay_99, floor_99] = [&mut relay, &mut floor].map(|done| percentile(&mut done.latencies, 0.99));
    figure("B1 broadcast, p50", relay_50, "ms", Target::None, how);
    figure("   floor: p50", floor_50, "ms", Target::None, beside);
    figure("B1 broadcast, p50 against the floor", relay_50 / floor_50, "", Target::AtMost(3.0), how);
    figure("B1 broadcast, p99", relay_99, "ms", Target::None, how);
    figure("   floor: p99", floor_99, "ms", Target::None, beside);
    let how = format!("{MEMBERS} members, sender at most {AHEAD} ahead, {of}");
    figure("B2 saturated, CPU per message", median(&relay.saturated), "µs", Target::None, &how);
    figure("   floor: CPU per message", median(&floor.saturated), "µs", Target::None, beside);
    figure("B2 saturated, delivered", median(&relay.rate), "/s", Target::AtLeast(500_000.0), &how);
    figure("   floor: delivered", median(&floor.rate), "/s", Target::None, beside);
}
