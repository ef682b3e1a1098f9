//! The fault run: writers with delays, savepoints and rollbacks; relays that are killed, a PostgreSQL that crashes, readers that
//! come back by any transport. What was committed is told exactly once to whom it may be told.
//!
//! `RELAY_TEST_MINUTES=…` makes it longer; a short one is part of the suite.
#![allow(clippy::print_stdout, reason = "the figures are part of what is shown")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::process::Child;
use tokio::time::{sleep, timeout};
use tokio_postgres::{Client as Session, NoTls};

use crate::crash::Cluster;
use crate::support::client::Client;
use crate::support::database::connect;
use crate::support::dice::Dice;
use crate::support::http::{Events, try_get};
use crate::support::program;
use crate::support::{PATIENCE, SECRET, eventually, token};

const ANN: &str = "0a000000-0000-4000-8000-00000000000a";
const BOB: &str = "0b000000-0000-4000-8000-00000000000b";
const WRITERS: u64 = 8;

/// What the writers and readers know of the run.
struct Run {
    url: String,
    address: SocketAddr,
    writing: AtomicBool,
    /// When nothing is written any more: how many rows each reader is owed.
    owed: [AtomicU64; 2],
    settled: AtomicBool,
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
            let back = if dice.below(2) == 0 { "rollback to s" } else { "release s" };
            session.batch_execute(&format!("savepoint s; {} {back}", insert(dice))).await?;
        }
        session.batch_execute(&format!("select pg_sleep({})", dice.below(15) as f64 / 1000.0)).await?;
    }
    session.batch_execute(if dice.below(5) == 0 { "rollback" } else { "commit" }).await
}

/// Somebody who reads on, whatever happens.
struct Reader {
    run: Arc<Run>,
    place: usize,
    path: String,
    cursor: Option<String>,
    ids: Vec<i64>,
    client: Option<Client>,
    /// How many it has, for whoever waits for it.
    count: Arc<AtomicU64>,
}

impl Reader {
    fn new(run: &Arc<Run>, place: usize) -> Self {
        let path = format!("/realtime/v1/changes?table=events&apikey={}", Self::token(place));
        Self {
            run: Arc::clone(run),
            place,
            path,
            cursor: None,
            ids: Vec::new(),
            client: None,
            count: Arc::default(),
        }
    }

    fn token(place: usize) -> String {
        token("authenticated", Some([ANN, BOB][place]), json!({}))
    }

    /// Whether everything has come.
    fn is_done(&self) -> bool {
        self.run.settled.load(Ordering::Relaxed)
            && self.ids.len() as u64 >= self.run.owed[self.place].load(Ordering::Relaxed)
    }

    fn take(&mut self, change: &Value) {
        assert_eq!(change["record"]["owner"], [ANN, BOB][self.place], "a row of somebody else's");
        self.ids.push(change["record"]["id"].as_i64().unwrap());
        self.count.fetch_add(1, Ordering::Relaxed);
        self.cursor = Some(change["cursor"].as_str().unwrap().to_owned());
    }

    /// One answer to a poll, if one comes.
    async fn poll(&mut self) {
        let since = self.cursor.as_ref().map_or(String::new(), |cursor| format!("&wait=1&since={cursor}"));
        let Some(answer) = try_get(self.run.address, &format!("{}{since}", self.path), "").await else {
            return sleep(Duration::from_millis(20)).await;
        };
        match answer.status {
            200 => {
                assert!(
                    answer.body["rows"].as_array().is_none_or(Vec::is_empty),
                    "it begins before the first row"
                );
                for change in answer.body["changes"].as_array().into_iter().flatten() {
                    self.take(change);
                }
                self.cursor = Some(answer.body["cursor"].as_str().unwrap().to_owned());
            }
            503 => sleep(Duration::from_millis(20)).await,
            _ => panic!("{answer:?}"),
        }
    }

    /// Some events of a stream.
    async fn stream(&mut self, most: usize) {
        let mut events = match Events::try_open(self.run.address, &self.path, self.cursor.as_deref()).await {
            Ok(events) => events,
            Err(None | Some(503)) => return sleep(Duration::from_millis(20)).await,
            Err(status) => panic!("{status:?}"),
        };
        for _ in 0..most {
            match timeout(Duration::from_secs(2), events.next()).await {
                Ok(Some(event)) => {
                    assert_eq!(event.name, "change", "{event:?}");
                    self.take(&event.data);
                }
                Ok(None) => return,
                Err(_) if self.is_done() => return,
                Err(_) => {}
            }
        }
    }

    /// Joins over a socket, which tells cursors but does not take one.
    async fn join(&mut self) {
        let mut client =
            Client::at(self.run.address, &Self::token(self.place), "&cursor=true").await.unwrap();
        client
            .subscribe("realtime:events", json!([{"event": "*", "schema": "public", "table": "events"}]))
            .await;
        self.client = Some(client);
    }

    /// The first changes over that socket, which then is left.
    async fn listen(&mut self, most: usize) {
        let Some(mut client) = self.client.take() else { return };
        while self.ids.len() < most {
            let frame = client.frame().await;
            if frame[3] == "postgres_changes" {
                self.take(&frame[4]["data"]);
            }
        }
    }
}

/// The program, on an address that stays.
async fn serve(run: &Run) -> Child {
    let address = run.address.to_string();
    let arguments = ["serve", "--jwt-secret", SECRET, "--listen", &address, "--database-url", &run.url];
    let mut command = program::relay(&arguments);
    let child =
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
    eventually("the relay is ready", || async {
        let answer = timeout(Duration::from_secs(1), try_get(run.address, "/readyz", "")).await.ok()??;
        (answer.status == 200).then_some(())
    })
    .await;
    child
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_committed_is_told_once_whatever_is_killed_and_by_whichever_transport() {
    let cluster = Cluster::start(&[]).await;
    let mut admin = connect(&cluster.url).await;
    relay::postgres::install::install(&mut admin).await.unwrap();
    admin
        .batch_execute(
            "create table events (id bigserial primary key, owner uuid, v text); alter table events enable row level security;
             create policy own on events using (owner = auth.uid()); grant select on events to authenticated;
             select relay.watch('events')",
        )
        .await
        .unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let run = Arc::new(Run {
        url: cluster.url.clone(),
        address: port,
        writing: AtomicBool::new(true),
        owed: [AtomicU64::new(0), AtomicU64::new(0)],
        settled: AtomicBool::new(false),
    });
    let mut serving = serve(&run).await;

    // All readers begin before the first row; the last of each begin over a socket and go on by turns.
    let mut readers = Vec::new();
    for place in [0, 1] {
        for kind in ["poll", "stream", "all"] {
            let mut reader = Reader::new(&run, place);
            match kind {
                "all" => reader.join().await,
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
        let (count, place) = (Arc::clone(&reader.count), reader.place);
        let reading = tokio::spawn(async move {
            reader.listen(40).await;
            while !reader.is_done() {
                match (kind, reader.ids.len() / 50 % 2) {
                    ("poll", _) | ("all", 0) => reader.poll().await,
                    _ => reader.stream(30).await,
                }
            }
            reader.ids
        });
        (kind, place, count, reading)
    };
    let reading: Vec<_> = readers.into_iter().map(read).collect();
    let writing: Vec<_> = (1..=WRITERS).map(|number| tokio::spawn(write(Arc::clone(&run), number))).collect();

    let mut faults = 0;
    while Instant::now() < end {
        sleep(Duration::from_millis(2500)).await;
        faults += 1;
        if faults % 2 == 1 {
            // Not asked, not told.
            serving.kill().await.unwrap();
            serving = serve(&run).await;
        } else {
            cluster.stop("kill");
            cluster.restart(&[]);
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
            .query(&format!("select id from events where owner = '{owner}' order by id"), &[])
            .await
            .unwrap();
        let ids: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
        run.owed[place].store(ids.len() as u64, Ordering::Relaxed);
        owed.push(ids);
    }
    run.settled.store(true, Ordering::Relaxed);
    for (kind, place, count, mut reading) in reading {
        let mut before = 0;
        let mut ids = loop {
            if let Ok(ids) = timeout(PATIENCE, &mut reading).await {
                break ids.unwrap();
            }
            let now = count.load(Ordering::Relaxed);
            let owed = owed[place].len();
            assert!(now > before, "{kind} {place}: stopped at {now} of {owed} rows");
            before = now;
        };
        let count = ids.len();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(count, ids.len(), "{kind}: something came twice");
        assert_eq!(ids, owed[place], "{kind}: not what was committed");
    }
    println!("{transactions} transactions, {} rows, {faults} faults", owed[0].len() + owed[1].len());
}
