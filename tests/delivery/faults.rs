//! The fault run: writers with delays, savepoints and rollbacks; two relays of which the leader or the other is killed, a
//! PostgreSQL that crashes, connections that are cut, clients that never read; readers that come back to either relay by any
//! transport. What was committed is told to whom it may be
//! told: exactly once to those with a cursor, at least once to sockets that named their session, each row's changes in order.
//!
//! `RELAY_TEST_MINUTES=…` makes it longer; a short one is part of the suite.
#![allow(clippy::print_stdout, reason = "the figures are part of what is shown")]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::process::Child;
use tokio::time::{sleep, timeout};
use tokio_postgres::{Client as Session, NoTls};

use crate::delivery::crash::Cluster;
use crate::support::client::Client;
use crate::support::database::connect;
use crate::support::dice::Dice;
use crate::support::http::{metrics_path, text, try_get};
use crate::support::program;
use crate::support::proxy::Proxy;
use crate::support::{ANN, BOB, PATIENCE, SECRET, eventually};

mod reader;

use reader::{Reader, bindings};

const WRITERS: u64 = 8;

/// A change: which row, and how often it had been updated.
type Told = (i64, i64);

/// What the writers and readers know of the run.
struct Run {
    url: String,
    /// Of the relays.
    addresses: [SocketAddr; 2],
    /// The same behind proxies that are cut every now and then.
    cut: [SocketAddr; 2],
    writing: AtomicBool,
    /// When nothing is written any more: how many changes each reader is owed.
    owed: [AtomicU64; 2],
    settled: AtomicBool,
    /// Changes that came to a resumed socket again.
    repeated: AtomicU64,
}

async fn session(url: &str) -> Session {
    eventually("PostgreSQL takes connections", || async {
        let (session, connection) =
            timeout(Duration::from_secs(2), tokio_postgres::connect(url, NoTls)).await.ok()?.ok()?;
        tokio::spawn(connection);
        Some(session)
    })
    .await
}

/// Writes until the end; what fails is begun anew.
async fn write(run: Arc<Run>, number: u64) -> u64 {
    let mut dice = Dice(number * 7_919 + 17);
    let mut transactions = 0;
    while run.writing.load(Ordering::Relaxed) {
        let session = session(&run.url).await;
        while run.writing.load(Ordering::Relaxed) && transaction(&session, &mut dice).await.is_ok() {
            transactions += 1;
        }
    }
    transactions
}

async fn transaction(session: &Session, dice: &mut Dice) -> Result<(), tokio_postgres::Error> {
    let insert = |dice: &mut Dice| {
        let owner = [ANN, BOB][dice.below(2) as usize];
        format!("insert into events (owner, v) values ('{owner}', repeat('x', {}));", dice.below(300))
    };
    session.batch_execute("begin").await?;
    for _ in 0..=dice.below(3) {
        session.batch_execute(&insert(dice)).await?;
        if dice.below(3) == 0 {
            session.batch_execute("update events set n = n + 1 where id = currval('events_id_seq')").await?;
        }
        if dice.below(3) == 0 {
            let back = if dice.below(2) == 0 { "rollback to s" } else { "release s" };
            session.batch_execute(&format!("savepoint s; {} {back}", insert(dice))).await?;
        }
        session.batch_execute(&format!("select pg_sleep({})", dice.below(15) as f64 / 1000.0)).await?;
    }
    session.batch_execute(if dice.below(5) == 0 { "rollback" } else { "commit" }).await
}

/// Joins and never reads; when it is closed, another takes its place.
async fn stall(run: Arc<Run>) {
    while run.writing.load(Ordering::Relaxed) {
        if let Ok(mut client) = Client::at(run.addresses[0], &Reader::token(0), "").await
            && client.try_join("realtime:events", bindings()).await.is_ok()
        {
            sleep(Duration::from_secs(3)).await;
        }
        sleep(Duration::from_millis(100)).await;
    }
}

/// One of the relays, on an address that stays.
async fn serve(run: &Run, which: usize) -> Child {
    let address = run.addresses[which].to_string();
    let arguments = ["serve", "--jwt-secret", SECRET, "--listen", &address, "--database-url", &run.url];
    let mut command = program::relay(&arguments);
    let child =
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
    eventually("the relay is ready", || async {
        let answer =
            timeout(Duration::from_secs(1), try_get(run.addresses[which], "/readyz", "")).await.ok()??;
        (answer.status == 200).then_some(())
    })
    .await;
    child
}

/// Which relay leads; the first when none does.
async fn leader(run: &Run) -> usize {
    let metrics = timeout(Duration::from_secs(1), text(run.addresses[1], &metrics_path())).await;
    usize::from(metrics.is_ok_and(|(_, metrics)| metrics.contains("relay_leader 1\n")))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_committed_is_told_once_whatever_is_killed_and_by_whichever_transport() {
    let cluster = Cluster::start(&[]).await;
    let mut admin = connect(&cluster.url).await;
    relay::postgres::install::install(&mut admin).await.unwrap();
    admin
        .batch_execute(
            "create table events (id bigserial primary key, owner uuid, v text, n int not null default 0); alter table events enable row level security;
             create policy own on events using (owner = auth.uid()); grant select on events to authenticated;
             select relay.watch('events')",
        )
        .await
        .unwrap();
    let ports = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let ports = ports.map(|port| port.local_addr().unwrap());
    let proxies = [Proxy::start(ports[0]).await, Proxy::start(ports[1]).await];
    let run = Arc::new(Run {
        url: cluster.url.clone(),
        addresses: ports,
        cut: [proxies[0].address, proxies[1].address],
        writing: AtomicBool::new(true),
        owed: [AtomicU64::new(0), AtomicU64::new(0)],
        settled: AtomicBool::new(false),
        repeated: AtomicU64::new(0),
    });
    let mut serving = [serve(&run, 0).await, serve(&run, 1).await];

    // All readers begin before the first row; the last of each begin over a socket and go on by turns.
    let mut readers = Vec::new();
    for place in [0, 1] {
        for kind in ["poll", "stream", "all", "session"] {
            let mut reader = Reader::new(&run, place);
            match kind {
                "all" => reader.join().await,
                // Its first connection makes its bookmark before the first row.
                "session" => {}
                _ => {
                    while reader.cursor.is_none() {
                        reader.poll().await;
                    }
                }
            }
            readers.push((kind, reader));
        }
    }
    let minutes: f64 = std::env::var("RELAY_TEST_MINUTES").map_or(0.2, |minutes| minutes.parse().unwrap());
    let end = Instant::now() + Duration::from_secs_f64(60.0 * minutes);
    let read = |(kind, mut reader): (&'static str, Reader)| {
        let (count, place, run) = (Arc::clone(&reader.count), reader.place, Arc::clone(&run));
        let reading = tokio::spawn(async move {
            if kind == "session" {
                reader.resume().await;
                return reader.told;
            }
            reader.listen(40).await;
            while !reader.is_done() {
                match (kind, reader.told.len() / 50 % 2) {
                    ("poll", _) | ("all", 0) => reader.poll().await,
                    // What is begun anew for every few changes falls behind for ever.
                    _ if run.writing.load(Ordering::Relaxed) => reader.stream(30).await,
                    _ => reader.stream(1000).await,
                }
            }
            reader.told
        });
        (kind, place, count, reading)
    };
    let reading: Vec<_> = readers.into_iter().map(read).collect();
    let bookmarks = connect(&cluster.url).await;
    eventually("both sessions have joined", || async {
        let row = bookmarks.query_one("select count(*) from relay.bookmarks", &[]).await.unwrap();
        (row.get::<_, i64>(0) == 2).then_some(())
    })
    .await;
    let stalling: Vec<_> = (0..3).map(|_| tokio::spawn(stall(Arc::clone(&run)))).collect();
    let writing: Vec<_> = (1..=WRITERS).map(|number| tokio::spawn(write(Arc::clone(&run), number))).collect();

    let mut faults = 0;
    while Instant::now() < end {
        for _ in 0..3 {
            sleep(Duration::from_millis(800)).await;
            proxies.iter().for_each(Proxy::cut);
        }
        faults += 1;
        let leader = leader(&run).await;
        match faults % 3 {
            // Not asked, not told.
            1 => serving[leader].kill().await.unwrap(),
            2 => {
                cluster.stop("kill");
                cluster.restart(&[]);
            }
            _ => serving[1 - leader].kill().await.unwrap(),
        }
        for (which, relay) in serving.iter_mut().enumerate() {
            if relay.try_wait().unwrap().is_some() {
                *relay = serve(&run, which).await;
            }
        }
    }
    run.writing.store(false, Ordering::Relaxed);
    let mut transactions = 0;
    for writer in writing {
        transactions += writer.await.unwrap();
    }
    let admin = session(&cluster.url).await;
    let mut owed = Vec::new();
    for (place, owner) in [ANN, BOB].iter().enumerate() {
        let rows = admin
            .query(
                &format!(
                    "select id, k::bigint from events, generate_series(0, n) k where owner = '{owner}' order by id, k"
                ),
                &[],
            )
            .await
            .unwrap();
        let changes: Vec<Told> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        run.owed[place].store(changes.len() as u64, Ordering::Relaxed);
        owed.push(changes);
    }
    run.settled.store(true, Ordering::Relaxed);
    for (kind, place, count, mut reading) in reading {
        let mut before = 0;
        let mut told = loop {
            if let Ok(told) = timeout(PATIENCE, &mut reading).await {
                break told.unwrap();
            }
            let now = count.load(Ordering::Relaxed);
            let owed = owed[place].len();
            assert!(now > before, "{kind} {place}: stopped at {now} of {owed} changes");
            before = now;
        };
        let mut latest = HashMap::new();
        for (id, n) in &told {
            let before = latest.insert(*id, *n);
            assert!(before.is_none_or(|before| before < *n), "{kind}: row {id} out of order");
        }
        let count = told.len();
        told.sort_unstable();
        told.dedup();
        assert_eq!(count, told.len(), "{kind}: something came twice");
        assert_eq!(told, owed[place], "{kind}: not what was committed");
    }
    for stalling in stalling {
        stalling.await.unwrap();
    }
    let repeated = run.repeated.load(Ordering::Relaxed);
    println!(
        "{transactions} transactions, {} changes, {faults} faults; repeated to two resumed sockets: {repeated}",
        owed[0].len() + owed[1].len()
    );
}
