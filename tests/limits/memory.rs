//! The memory of the process itself, as the system counts it, stays within the bound for what waits for clients, plus
//! what the process and its clients take in any case.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::process::Child;
use tokio::sync::{Mutex, MutexGuard};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::program::cli;
use crate::support::client::Client;
use crate::support::database::Database;
use crate::support::http::{get, metrics_path, stalled, text};
use crate::support::{PATIENCE, eventually, token};

const MIB: usize = 1 << 20;
/// What the program takes beside the bound: its code, the changes on their way, and what its allocator keeps.
const CONSTANT: usize = 192 * MIB;
/// What one client or channel takes, whatever it does, in a program that is not optimised.
const CLIENT: usize = 24 * 1024;

const TABLE: &str = "create table t (id int primary key, v text); grant select on t to anon, authenticated;
    select relay.watch('t');";

/// One at a time: each of these tests is work for all cores.
static TURN: Mutex<()> = Mutex::const_new(());

/// The program, with a bound for what waits.
struct Program {
    _turn: MutexGuard<'static, ()>,
    child: Child,
    database: Database,
    address: SocketAddr,
    bound: usize,
}

impl Program {
    async fn start(sql: &str, bound: usize, flags: &[&str]) -> Self {
        let _turn = TURN.lock().await;
        let database = Database::new().await;
        database.run(sql).await;
        let text = bound.to_string();
        let mut arguments = vec!["--database-url", &database.url, "--total-outbox-bytes", &text];
        arguments.extend(flags);
        let (child, lines, address) = cli::serve(&arguments).await;
        // Its output is not read: it must not wait for that.
        tokio::spawn(async move {
            let mut lines = lines;
            while let Ok(Some(_)) = lines.next_line().await {}
        });
        let address = address.strip_prefix("http://").unwrap().parse().unwrap();
        Self { _turn, child, database, address, bound }
    }

    fn status(&self, name: &str) -> usize {
        let path = format!("/proc/{}/status", self.child.id().unwrap());
        let status = std::fs::read_to_string(path).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap().trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() * 1024
    }

    /// The most that was ever resident is within the bound, the constant, and what so many clients take.
    #[track_caller]
    fn check(&self, clients: usize) {
        let peak = self.status("VmHWM");
        let most = self.bound + CONSTANT + clients * CLIENT;
        assert!(peak <= most, "{} MiB where {} MiB are allowed", peak / MIB, most / MIB);
    }

    async fn metric(&self, name: &str) -> i64 {
        let (_, text) = text(self.address, &metrics_path()).await;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name}")).parse().unwrap()
    }

    async fn until(&self, name: &str, is_so: impl Fn(i64) -> bool) {
        let started = Instant::now();
        while !is_so(self.metric(name).await) {
            assert!(started.elapsed() < PATIENCE * 4, "{name}: {}", self.metric(name).await);
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until everything written so far has been delivered or given up.
    async fn settled(&self) {
        let written = self.database.value("select count(*) from t").await;
        let mut client = Client::at(self.address, &anon(), "").await.unwrap();
        client.subscribe("realtime:settled", json!([{"event": "*", "schema": "public", "table": "t"}])).await;
        self.database.run("insert into t (id) values (-1)").await;
        loop {
            match client.frame_within(PATIENCE * 4).await {
                Some(frame) if frame[4]["data"]["record"]["id"] == -1 => break,
                Some(_) => {}
                None => panic!("nothing more comes after {written} rows"),
            }
        }
        self.database.run("delete from t where id = -1").await;
    }
}

fn anon() -> String {
    token("anon", None, json!({}))
}

/// What a client has read.
#[derive(Clone, Default)]
struct Read(Arc<AtomicUsize>);

impl Read {
    fn bytes(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// Reads all that comes.
fn drained(mut stream: TcpStream) -> (Read, JoinHandle<()>) {
    let read = Read::default();
    let counted = read.clone();
    let task = tokio::spawn(async move {
        let mut bytes = vec![0; 64 * 1024];
        while let Ok(count @ 1..) = stream.read(&mut bytes).await {
            counted.0.fetch_add(count, Ordering::Relaxed);
        }
    });
    (read, task)
}

/// A connection whose own end takes little, that has shaken hands.
async fn shaken(address: SocketAddr, token: &str) -> TcpStream {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(8 * 1024).unwrap();
    socket.set_nonblocking(true).unwrap();
    let mut stream = TcpSocket::from_std_stream(socket.into()).connect(address).await.unwrap();
    let handshake = format!(
        "GET /socket/websocket?vsn=2.0.0&apikey={token} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    stream.write_all(handshake.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    stream
}

/// A connection that joins all of these topics with these bindings, and reads nothing from then on.
async fn joined(address: SocketAddr, topics: impl Iterator<Item = (String, Value)>) -> TcpStream {
    let (mut reading, mut writing) = shaken(address, &anon()).await.into_split();
    let joins: Vec<Vec<u8>> = topics.map(|(topic, bindings)| framed(&join(&topic, bindings))).collect();
    let count = joins.len();
    let write = async {
        for join in joins {
            writing.write_all(&join).await.unwrap();
        }
    };
    let read = async {
        let confirmed = b"Subscribed to PostgreSQL";
        let (mut bytes, mut confirmations) = (Vec::new(), 0);
        while confirmations < count {
            assert!(reading.read_buf(&mut bytes).await.unwrap() > 0, "it was closed");
            while let Some(at) = bytes.windows(confirmed.len()).position(|part| part == confirmed) {
                bytes.drain(..at + confirmed.len());
                confirmations += 1;
            }
        }
    };
    tokio::join!(write, read);
    reading.reunite(writing).unwrap()
}

/// A text as a client frames it.
fn framed(text: &str) -> Vec<u8> {
    let mut frame = vec![0x81, 0x80 | 127];
    frame.extend((text.len() as u64).to_be_bytes());
    frame.extend([0; 4]);
    frame.extend(text.as_bytes());
    frame
}

fn join(topic: &str, bindings: Value) -> String {
    json!(["1", "1", topic, "phx_join", {"config": {"postgres_changes": bindings}}]).to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_large_row_for_readers_with_a_topic_each_is_in_memory_once() {
    const CLIENTS: usize = 600;
    let program = Program::start(TABLE, 8 * MIB, &[]).await;
    let mut clients = Vec::new();
    for number in 0..CLIENTS {
        clients.push(drained(stalled(program.address, &anon(), &format!("realtime:own{number}"), "t").await));
    }
    program.until("relay_channels_open", |open| open == CLIENTS as i64).await;
    for id in 0..3 {
        program.database.run(&format!("insert into t values ({id}, repeat('x', 1000000))")).await;
        eventually("all have read it", || async {
            clients.iter().all(|(read, _)| read.bytes() > (id + 1) * 1_000_000).then_some(())
        })
        .await;
    }
    program.check(CLIENTS);
    assert_eq!(program.metric("relay_sessions_closed_full_total").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_a_hundred_topics_each_of_sockets_that_read_nothing_is_within_the_bound() {
    const SOCKETS: usize = 10;
    const TOPICS: usize = 100;
    let columns: Vec<String> = (0..10).map(|n| format!("c{n} text default repeat('c{n}', 30000)")).collect();
    let wide = format!(
        "{TABLE} create table wide (id int primary key, {}); grant select on wide to anon; select relay.watch('wide');",
        columns.join(", ")
    );
    let program = Program::start(&wide, 32 * MIB, &[]).await;
    let mut sockets = Vec::new();
    for socket in 0..SOCKETS {
        let topics = (0..TOPICS).map(|topic| {
            let all = json!({"event": "*", "schema": "public", "table": "t"});
            // Some with columns of their own, thus rows of their own.
            let number = 1 + socket * TOPICS + topic;
            let select: Vec<String> =
                (0..10).filter(|bit| number >> bit & 1 == 1).map(|bit| format!("c{bit}")).collect();
            let wide = json!({"event": "*", "schema": "public", "table": "wide", "select": select});
            let bindings = if topic % 4 == 0 { json!([wide, all]) } else { json!([all]) };
            (format!("realtime:{socket} {topic}"), bindings)
        });
        sockets.push(joined(program.address, topics).await);
    }
    program.until("relay_channels_open", |open| open == (TOPICS * SOCKETS) as i64).await;
    for id in 0..3 {
        program.database.run(&format!("insert into wide (id) values ({id})")).await;
        program.database.run(&format!("insert into t values ({id}, repeat('x', 900000))")).await;
    }
    program.settled().await;
    program.check(TOPICS * SOCKETS);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_small_changes_for_many_topics_of_stopped_readers_are_within_the_bound() {
    const SOCKETS: usize = 20;
    let program = Program::start(TABLE, 16 * MIB, &[]).await;
    let mut sockets = Vec::new();
    for _ in 0..SOCKETS {
        let all = json!([{"event": "*", "schema": "public", "table": "t"}]);
        let topics = (0..100).map(|topic| (format!("realtime:{topic}{}", "t".repeat(1000)), all.clone()));
        sockets.push(joined(program.address, topics).await);
    }
    program.until("relay_channels_open", |open| open == 100 * SOCKETS as i64).await;
    program.database.run("insert into t select n, 'v' from generate_series(1, 2000) n").await;
    program.settled().await;
    program.check(100 * SOCKETS);
}

#[tokio::test(flavor = "multi_thread")]
async fn topics_filters_and_what_pads_a_join_take_no_more_than_their_part() {
    const SOCKETS: usize = 12;
    let program = Program::start(TABLE, 16 * MIB, &[]).await;
    let long = format!("realtime:{}", "t".repeat(250_000));
    let mut client = Client::at(program.address, &anon(), "").await.unwrap();
    let all = json!([{"event": "*", "schema": "public", "table": "t"}]);
    let refused = client.try_subscribe(&long, all.clone()).await;
    assert_eq!(refused["response"]["reason"], "TopicNameTooLong: A topic may have 1024 bytes at most");
    let tasks = (0..SOCKETS).map(|_| async {
        let stream = shaken(program.address, &anon()).await;
        let (mut reading, mut stream) = stream.into_split();
        let task = tokio::spawn(async move {
            let mut bytes = vec![0; 64 * 1024];
            while let Ok(1..) = reading.read(&mut bytes).await {}
        });
        for topic in 0..12 {
            let filter = format!("v=in.({})", "x".repeat(200_000));
            let zeros = vec![0; 100_000];
            let padded = match topic % 3 {
                0 => json!([{"event": "*", "schema": "public", "table": "t", "filter": filter}]),
                1 => json!([{"event": "*", "schema": "public", "table": "t", "padding": zeros}]),
                _ => all.clone(),
            };
            let topic = if topic % 3 == 2 { format!("{long}{topic}") } else { format!("realtime:{topic}") };
            if stream.write_all(&framed(&join(&topic, padded))).await.is_err() {
                break;
            }
        }
        (stream, task)
    });
    let held = join_all(tasks).await;
    program.settled().await;
    program.check(SOCKETS);
    drop(held);
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_and_heads_that_never_end_take_no_more_than_their_part() {
    const EACH: usize = 60;
    let program = Program::start(TABLE, 32 * MIB, &[]).await;
    let mut held = Vec::new();
    for _ in 0..EACH {
        let mut stream = shaken(program.address, &anon()).await;
        let mut part = vec![0x81, 0x80 | 127];
        part.extend(4_900_000_u64.to_be_bytes());
        part.extend([0; 4]);
        part.extend(vec![b' '; 4_800_000]);
        // Cut off where there is no room for it.
        let _ = tokio::time::timeout(Duration::from_millis(500), stream.write_all(&part)).await;
        held.push(stream);
    }
    for _ in 0..EACH * 5 {
        let mut stream = TcpStream::connect(program.address).await.unwrap();
        let head = format!("GET /livez HTTP/1.1\r\nhost: x\r\nx-long: {}", "x".repeat(60_000));
        let _ = stream.write_all(head.as_bytes()).await;
        held.push(stream);
    }
    program.settled().await;
    program.check(6 * EACH);
    drop(held);
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_read_a_byte_at_a_time_are_within_the_bound() {
    const STREAMS: usize = 60;
    let program = Program::start(TABLE, 16 * MIB, &[]).await;
    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        let mut stream = TcpStream::connect(program.address).await.unwrap();
        let request = format!(
            "GET /realtime/v1/changes?table=t&apikey={} HTTP/1.1\r\nhost: x\r\naccept: text/event-stream\r\n\r\n",
            anon()
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        streams.push(stream);
    }
    program.until("relay_channels_open", |open| open == STREAMS as i64).await;
    for id in 0..30 {
        program.database.run(&format!("insert into t values ({id}, repeat('x', 900000))")).await;
        for stream in &mut streams {
            let _ = tokio::time::timeout(Duration::from_millis(1), stream.read_u8()).await;
        }
    }
    program.settled().await;
    program.check(STREAMS);
}

/// Reads an answer slowly, once it has begun.
fn read_slowly(address: SocketAddr, path: String, begun: Read) -> JoinHandle<()> {
    tokio::spawn(async move {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
        socket.set_recv_buffer_size(16 * 1024).unwrap();
        socket.set_nonblocking(true).unwrap();
        let mut stream = TcpSocket::from_std_stream(socket.into()).connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: relay\r\nconnection: close\r\n\r\n");
        let _ = stream.write_all(request.as_bytes()).await;
        let mut bytes = vec![0; 4096];
        let first = stream.read(&mut bytes).await;
        begun.0.fetch_add(1, Ordering::Relaxed);
        while first.is_ok()
            && let Ok(1..) = stream.read(&mut bytes).await
        {
            sleep(Duration::from_millis(20)).await;
        }
    })
}

/// How long each of some rows takes to a client, the longest of a hundred left out.
async fn p99(program: &Program, client: &mut Client, ids: std::ops::Range<i64>) -> Duration {
    let mut took = Vec::new();
    for id in ids {
        let started = Instant::now();
        program.database.run(&format!("insert into other values ({id})")).await;
        assert_eq!(client.change().await["record"]["id"], id);
        took.push(started.elapsed());
        sleep(Duration::from_millis(5)).await;
    }
    took.sort();
    took[took.len() - 1 - took.len() / 100]
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_are_read_slowly_close_no_socket_and_keep_no_other_reader_waiting() {
    const SLOW: usize = 24;
    const SOCKETS: usize = 200;
    let sql = format!(
        "{TABLE} insert into t select n, repeat('x', 100000) from generate_series(1, 100) n;
         create table other (id int primary key); grant select on other to anon; select relay.watch('other');"
    );
    let program = Program::start(&sql, 64 * MIB, &["--judge-timeout-ms", "20000"]).await;
    let mut client = Client::at(program.address, &anon(), "").await.unwrap();
    client.subscribe("realtime:other", json!([{"event": "*", "schema": "public", "table": "other"}])).await;
    let mut sockets = Vec::new();
    for _ in 0..SOCKETS {
        sockets.push(drained(stalled(program.address, &anon(), "realtime:other", "other").await));
    }
    program.until("relay_channels_open", |open| open == 1 + SOCKETS as i64).await;
    let alone = p99(&program, &mut client, 0..150).await;
    let path = |who: &str| {
        let token = if who.is_empty() { anon() } else { token("anon", Some(who), json!({})) };
        format!("/realtime/v1/changes?table=t&apikey={token}")
    };
    let begun = Read::default();
    let slow: Vec<_> = (0..SLOW).map(|_| read_slowly(program.address, path(""), begun.clone())).collect();
    let started = Instant::now();
    while begun.bytes() < SLOW {
        assert!(started.elapsed() < PATIENCE * 4, "{} of them have an answer", begun.bytes());
        sleep(Duration::from_millis(20)).await;
    }
    let waiting = program.metric("relay_outbox_bytes").await;
    let beside = p99(&program, &mut client, 150..300).await;
    // A client that reads gets its answer, even with the same key and address.
    for who in ["", "ann", "", "ann"] {
        let answer = get(program.address, &path(who), "").await;
        assert_eq!(answer.status, 200, "{who}: {}", answer.body);
        assert_eq!(answer.body["rows"].as_array().unwrap().len(), 100);
    }
    assert!(waiting > 8 << 20, "{waiting} bytes wait");
    assert!(sockets.iter().all(|(_, task)| !task.is_finished()), "a healthy socket was closed");
    assert!(beside <= Duration::from_millis(50).max(alone * 2), "{beside:?}, alone {alone:?}");
    program.check(SOCKETS + SLOW);
    slow.iter().for_each(JoinHandle::abort);
}

/// What the kernel holds for the connections of this process at a port, by its own count: of what is to be sent, and of
/// what was received.
fn kernel_bytes(port: u16) -> Vec<(usize, usize)> {
    let output =
        Command::new("ss").args(["-tmnH", "state", "established", &format!("( sport = :{port} )")]).output();
    let text = String::from_utf8(output.expect("ss, of iproute2").stdout).unwrap();
    let field = |memory: &str, name: &str| -> usize {
        let field = memory.split(',').find_map(|field| field.strip_prefix(name)?.parse().ok());
        field.unwrap_or_else(|| panic!("no {name} in {memory}"))
    };
    text.split("skmem:(")
        .skip(1)
        .map(|memory| {
            let memory = memory.split(')').next().unwrap();
            // Taken in advance, and queued.
            let queued = field(memory, "w") + field(memory, "f") + field(memory, "o");
            (queued.max(field(memory, "t")), field(memory, "r"))
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_stopped_costs_less_than_a_mebibyte_with_the_kernels_part() {
    const READERS: usize = 100;
    let sql = "create table own (id serial primary key, owner uuid, v text); alter table own enable row level security;
         create policy p on own using (owner = auth.uid()); grant select on own to authenticated;
         select relay.watch('own');";
    let sql = format!("{TABLE} {sql}");
    let program = Program::start(&sql, 256 * MIB, &[]).await;
    let mut readers = Vec::new();
    for number in 0..READERS {
        let who = format!("00000000-0000-4000-8000-{number:012}");
        let token = token("authenticated", Some(&who), json!({}));
        let mut stream = shaken(program.address, &token).await;
        let own = json!([{"event": "*", "schema": "public", "table": "own"}]);
        stream.write_all(&framed(&join(&format!("realtime:{number}"), own))).await.unwrap();
        readers.push(stream);
    }
    program.until("relay_channels_open", |open| open == READERS as i64).await;
    let before = program.status("VmRSS");
    // Rows of their own, so that nothing that waits for them is shared, until some are closed for it.
    let (mut most, mut kernel_most, mut written) = (0, 0, 0);
    while program.metric("relay_sessions_closed_full_total").await == 0 {
        assert!(written < 200, "4 MB went to each reader that stopped");
        let insert = format!(
            "insert into own (owner, v) select ('00000000-0000-4000-8000-' || lpad(n::text, 12, '0'))::uuid, repeat('x', 20000)
             from generate_series(0, {}) n",
            READERS - 1
        );
        program.database.run(&insert).await;
        written += 1;
        let all = written * READERS as i64;
        program.until("relay_changes_read_total", |read| read >= all).await;
        let kernel = kernel_bytes(program.address.port());
        let largest = kernel.iter().map(|(sent, received)| sent + received).max().unwrap_or_default();
        let all: usize = kernel.iter().map(|(sent, received)| sent + received).sum();
        kernel_most = kernel_most.max(largest);
        most = most.max(program.status("VmRSS").saturating_sub(before) + all);
    }
    assert!(kernel_most <= 256 * 1024, "{} KiB in the kernel", kernel_most / 1024);
    assert!(most / READERS <= MIB, "{} KiB each", most / READERS / 1024);
}
