//! K1: a thousand clients that join and never read again, beside fifty that do: what they cost the others, and the
//! relay's memory.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};

use crate::ledger::Ledger;
use crate::process::Server;
use crate::report::{Report, Target, percentile};
use crate::support::database::Database;
use crate::swarm::{Hello, Peer, Swarm, frame, row};
use crate::writer::Stage;

const TABLE: &str = "bench_stalled";
const HEALTHY: usize = 50;
const STALLED: usize = 1000;
const WARM_UP: u64 = 100;
/// The bytes that may wait for one client: the relay's default, told to it all the same.
const OUTBOX: usize = 1 << 20;
/// The bytes that may wait for all clients together, where the relay has such a bound.
const TOTAL: usize = 256 << 20;
const TOTAL_FLAG: &str = "--total-outbox-bytes";
/// Memory for a byte that waits: an allocator rounds up.
const ALLOCATED: f64 = 1.25;
/// What waits unseen in the kernel is as little as over a real network: this much where it is received …
const RECEIVE_BUFFER: usize = 8 * 1024;
/// … and no more at the sender than segments of this size come to. The loopback device's own, 64 KiB long, would hide
/// megabytes for each client.
const SEGMENT: u32 = 1448;
/// Stalled clients at a time, while they join and at the end.
const AT_ONCE: usize = 64;
/// A client that is not closed so long after the last row never will be: a write may take 30 seconds.
const PATIENCE: Duration = Duration::from_secs(40);

/// What the stalled ones have in common.
struct Case {
    name: &'static str,
    /// Then no frame is shared: all that waits for them is memory of its own.
    own_topics: bool,
    rate: f64,
}

const CASES: [Case; 2] = [
    Case { name: "one topic", own_topics: false, rate: 200.0 },
    Case { name: "a topic each", own_topics: true, rate: 100.0 },
];

pub async fn run(report: &mut Report) {
    report.section("stalled");
    for case in &CASES {
        measure(report, case).await;
    }
}

async fn measure(report: &mut Report, case: &Case) {
    let seconds = if report.quick { 10 } else { 20 };
    let rows = case.rate as u64 * seconds;
    let has_total = Server::knows(TOTAL_FLAG);
    let (outbox, total) = (OUTBOX.to_string(), TOTAL.to_string());
    let mut flags = vec!["--outbox-bytes", &outbox];
    if has_total {
        flags.extend([TOTAL_FLAG, &total]);
    }
    let database = Database::bare().await;
    let server = Server::relay_with(&database.url, &flags).await;
    let stage = Stage::watched_with(&database, TABLE, &"x".repeat(1024)).await;
    let ledger = Arc::new(Ledger::new(HEALTHY, (WARM_UP + 2 * rows) as usize));
    let swarm = Swarm::connect(Peer::Relay { table: TABLE }, server.address, &ledger, 0..HEALTHY).await;
    let mut written = 0;
    for stretch in [WARM_UP, rows] {
        ledger.take_latencies();
        stage.write_paced(&ledger, written + 1, stretch, case.rate).await;
        written += stretch;
        ledger.settle(written).await;
    }
    let mut alone = ledger.take_latencies();

    let stalled: Vec<Stalled> = stream::iter(HEALTHY..HEALTHY + STALLED)
        .map(|user| {
            let topic = if case.own_topics { format!("bench {user}") } else { String::from("bench") };
            Stalled::join(server.address, TABLE, topic, user)
        })
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    sleep(Duration::from_secs(1)).await;
    server.forget_peak();
    let before = server.resident_kib();
    let (_, gone) = tokio::join!(
        stage.write_paced(&ledger, written + 1, rows, case.rate),
        until_gone(&server, Duration::from_secs(seconds) + PATIENCE)
    );
    written += rows;
    ledger.settle(written).await;
    let mut beside = ledger.take_latencies();
    let peak = server.peak_kib();
    let full = server.metric("relay_sessions_closed_full_total").await;
    let ends: Vec<End> = stream::iter(stalled).map(Stalled::end).buffer_unordered(AT_ONCE).collect().await;
    sleep(Duration::from_secs(1)).await;
    let after = server.resident_kib();
    swarm.leave();

    let name = case.name;
    let mut figure = |what: &str, value: f64, unit: &str, target: Target, how: &str| {
        report.figure(&format!("   {name}: {what}"), value, unit, &target, how);
    };
    let how = format!(
        "{HEALTHY} clients, rows of 1 KiB at {}/s for {seconds} s; INSERT sent to frame read",
        case.rate
    );
    let with = format!("the same beside {STALLED} clients that never read, until these are closed and after");
    for (what, part, most) in [("p50", 0.5, 2.0), ("p99", 0.99, 3.0)] {
        let (alone, beside) = (percentile(&mut alone, part), percentile(&mut beside, part));
        figure(&format!("alone, {what}"), alone, "ms", Target::None, &how);
        figure(&format!("beside the stalled, {what}"), beside, "ms", Target::None, &with);
        figure(&format!("K1 {what}, beside : alone"), beside / alone, "", Target::AtMost(most), "");
    }
    let mib = |kib: u64| kib as f64 / 1024.0;
    let bound = match has_total {
        true => TOTAL.min(STALLED * OUTBOX),
        false => STALLED * OUTBOX,
    } as f64
        / 1048576.0;
    let how = match has_total {
        true => format!("{STALLED} x {OUTBOX} bytes, and {TOTAL} for all together"),
        false => format!("{STALLED} x {OUTBOX} bytes; there is no bound for all together"),
    };
    figure("resident before the rows", mib(before), "MiB", Target::None, "all joined; VmRSS");
    figure(
        "K1 resident at most, over that",
        mib(peak) - mib(before),
        "MiB",
        Target::AtMost(bound * ALLOCATED),
        &how,
    );
    figure("resident when the stalled are gone", mib(after), "MiB", Target::None, "");
    let count = |is: &dyn Fn(&End) -> bool| ends.iter().filter(|end| is(end)).count() as f64;
    let stalled = STALLED as f64;
    figure("K1 stalled, closed for it", full, "", Target::AtLeast(stalled), "by the relay's own count");
    let mut codes: Vec<u16> = ends.iter().filter_map(|end| end.code).collect();
    codes.sort_unstable();
    codes.dedup();
    for code in codes {
        figure(&format!("stalled, told {code}"), count(&|end| end.code == Some(code)), "", Target::None, "");
    }
    let cut = count(&|end| end.code.is_none() && end.is_over);
    figure("stalled, cut without a code", cut, "", Target::None, "read to the end afterwards");
    figure("K1 stalled, still connected", count(&|end| !end.is_over), "", Target::AtMost(0.0), "");
    let took = gone.map_or(f64::NAN, |gone| gone.as_secs_f64());
    figure("the last of them closed after", took, "s", Target::None, "from the first row on");
    let told = ends.iter().map(|end| end.bytes).max().unwrap_or_default() as f64 / 1024.0;
    figure("in the kernel for one of them, at most", told, "KiB", Target::None, "read after the end");
    let skipped = ends.iter().map(|end| end.skipped).sum();
    report.faults(&format!("   {name}: told to the stalled"), &[("rows skipped", skipped)]);
    report.faults(&format!("   {name}: {written} rows to {HEALTHY} clients"), &ledger.faults(written));
}

/// How long it takes until only the healthy ones are connected; none when that never happens.
async fn until_gone(server: &Server, patience: Duration) -> Option<Duration> {
    let started = Instant::now();
    while server.metric("relay_sessions_open").await > HEALTHY as f64 {
        if started.elapsed() > patience {
            return None;
        }
        sleep(Duration::from_millis(100)).await;
    }
    Some(started.elapsed())
}

/// A client that joins and then doesn't read, or slowly.
pub struct Stalled {
    stream: TcpStream,
    rest: Vec<u8>,
}

/// What became of one.
struct End {
    /// Of the close frame, if one came.
    code: Option<u16>,
    is_over: bool,
    /// What it could still read.
    bytes: usize,
    /// Rows missing between those it was told.
    skipped: u64,
}

impl Stalled {
    /// The clients that joined this topic for a table.
    pub async fn join(address: SocketAddr, table: &str, topic: String, user: usize) -> Self {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
        socket.set_recv_buffer_size(RECEIVE_BUFFER).unwrap();
        socket.set_tcp_mss(SEGMENT).unwrap();
        socket.set_nonblocking(true).unwrap();
        let mut stream = TcpSocket::from_std_stream(socket.into()).connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let hello = Hello::relay(table, &topic, user);
        stream.write_all(hello.request().as_bytes()).await.unwrap();
        stream.write_all(&hello.join.unwrap()).await.unwrap();
        let mut rest = Vec::new();
        let confirmed = b"Subscribed to PostgreSQL";
        while !rest.windows(confirmed.len()).any(|part| part == confirmed) {
            let count = stream.read_buf(&mut rest).await.unwrap();
            assert!(count > 0, "a stalled client was refused: {}", String::from_utf8_lossy(&rest));
        }
        // What follows the confirmation's frame begins with the next frame.
        let head = rest.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
        rest.drain(..head + 4);
        Self { stream, rest }
    }

    /// Reads so many bytes a second, to the end of the connection.
    pub async fn read_slowly(mut self, per_second: f64) {
        let started = Instant::now();
        let mut read = 0;
        loop {
            sleep(Duration::from_millis(10)).await;
            let mut room = (started.elapsed().as_secs_f64() * per_second) as usize - read;
            while room > 0 {
                self.rest.resize(room, 0);
                let Ok(count @ 1..) = self.stream.read(&mut self.rest).await else { return };
                (read, room) = (read + count, room - count);
            }
        }
    }

    /// Reads what there is, to the end of the connection.
    async fn end(mut self) -> End {
        let held = self.rest.len();
        let is_over = loop {
            match timeout(Duration::from_secs(5), self.stream.read_buf(&mut self.rest)).await {
                Ok(Ok(0) | Err(_)) => break true,
                Ok(Ok(_)) => {}
                Err(_) => break false,
            }
        };
        let mut end = End { code: None, is_over, bytes: self.rest.len() - held, skipped: 0 };
        let (mut rest, mut last, mut offset) = (&self.rest[..], None, 0);
        loop {
            if let [0x88, _, high, low, ..] = *rest {
                end.code = Some(u16::from_be_bytes([high, low]));
            }
            let Ok(Some((body, next))) = frame(rest) else { return end };
            if let Some(id) = row(&rest[body..next], &mut offset) {
                end.skipped += last.map_or(0, |last| id - last - 1);
                last = Some(id);
            }
            rest = &rest[next..];
        }
    }
}
