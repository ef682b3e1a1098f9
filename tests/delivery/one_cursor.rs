//! One cursor, any relay: who returns the cursor of the last answer gets each change exactly once, whichever relay gives the
//! next answer, by whichever transport, and whatever was outstanding when the rows were read.
//!
//! `RELAY_TEST_SECONDS=…` makes the first test that long for each of one, two and three relays.
#![allow(clippy::print_stdout, reason = "the figures are part of what is shown")]

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use relay::model::log::cursor::Cursor;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use crate::delivery::order::CROWD;
use crate::support::client::Client;
use crate::support::database::{Database, READER, connect, with_login};
use crate::support::dice::Dice;
use crate::support::http::{Answer, Events, get};
use crate::support::proxy::Proxy;
use crate::support::relay::Relay;
use crate::support::{PATIENCE, eventually, token};

const ROWS: i64 = 60;
const WRITERS: u64 = 6;
const SECONDS: u64 = 6;
const TOPIC: &str = "realtime:once";

fn reader() -> String {
    token("authenticated", Some("0a000000-0000-4000-8000-00000000000a"), json!({}))
}

fn path() -> String {
    format!("/realtime/v1/changes?table=once&apikey={}", reader())
}

fn bindings() -> Value {
    json!([{"event": "*", "schema": "public", "table": "once"}])
}

/// Small transactions that overlap, commit late and some of which are rolled back: each adds one to some rows.
async fn write(url: String, number: u64, end: Arc<End>) {
    let (session, mut dice) = (connect(&url).await, Dice(number * 7_919 + 3));
    while !end.is_near() {
        let mut ids: Vec<u64> = (0..8).map(|_| 1 + dice.below(ROWS as u64)).collect();
        ids.sort_unstable();
        ids.dedup();
        let updates: String =
            ids.iter().map(|id| format!("update once set v = v + 1 where id = {id};")).collect();
        let pause = [0, 0, 10, 40][dice.below(4) as usize];
        let last = if dice.below(6) == 0 { "rollback" } else { "commit" };
        let text = format!("begin; {updates} select pg_sleep({pause} / 1000.0); {last}");
        session.batch_execute(&text).await.unwrap();
        sleep(Duration::from_millis(dice.below(15))).await;
    }
}

/// What a reader has of each row, and where it is.
struct Reader {
    relays: Vec<SocketAddr>,
    dice: Dice,
    has: HashMap<i64, i64>,
    cursor: String,
    told: usize,
    busy: usize,
    end: Arc<End>,
}

/// When nothing is written any more, and how many changes there were then.
#[derive(Default)]
struct End {
    is_near: AtomicBool,
    is_there: AtomicBool,
    total: AtomicI64,
}

impl End {
    fn is_near(&self) -> bool {
        self.is_near.load(Ordering::Relaxed)
    }

    fn total(&self) -> Option<i64> {
        self.is_there.load(Ordering::Acquire).then(|| self.total.load(Ordering::Relaxed))
    }
}

impl Reader {
    fn relay(&mut self) -> SocketAddr {
        self.relays[self.dice.below(self.relays.len() as u64) as usize]
    }

    fn take(&mut self, change: &Value) {
        let number = |name: &str| change["record"][name].as_i64().unwrap();
        let before = self.has.insert(number("id"), number("v"));
        assert_eq!(before.map(|before| before + 1), Some(number("v")), "at {}: {change}", self.cursor);
        self.cursor = change["cursor"].as_str().unwrap().to_owned();
        self.told += 1;
    }

    /// An answer of either relay; one that has no time now is asked again, and counted.
    async fn ask(&mut self, path: &str) -> Answer {
        loop {
            let answer = get(self.relay(), path, "").await;
            match answer.status {
                200 => return answer,
                503 => self.busy += 1,
                _ => panic!("{answer:?}"),
            }
            assert!(self.busy < 5, "{answer:?}");
        }
    }

    async fn begin(&mut self) {
        let answer = self.ask(&path()).await;
        let row = |row: &Value| (row["id"].as_i64().unwrap(), row["v"].as_i64().unwrap());
        let rows = answer.body["rows"].as_array().unwrap_or_else(|| panic!("{answer:?}"));
        self.has = rows.iter().map(row).collect();
        self.cursor = answer.body["cursor"].as_str().unwrap().to_owned();
    }

    /// False when there is nothing more.
    async fn poll(&mut self) -> bool {
        let path = format!("{}&wait=1&since={}", path(), self.cursor);
        let answer = self.ask(&path).await;
        let changes = answer.body["changes"].as_array().unwrap_or_else(|| panic!("{answer:?}"));
        changes.iter().for_each(|change| self.take(change));
        self.cursor = answer.body["cursor"].as_str().unwrap().to_owned();
        !changes.is_empty() || answer.body["more"] == true
    }

    async fn stream(&mut self, most: usize) {
        let (relay, cursor) = (self.relay(), self.cursor.clone());
        let mut events = Events::open(relay, &path(), Some(&cursor)).await;
        for _ in 0..most {
            let Ok(Some(event)) = timeout(Duration::from_millis(300), events.next()).await else { return };
            assert_eq!(event.name, "change", "{event:?}");
            self.take(&event.data);
            assert_eq!(event.id, self.cursor);
        }
    }

    /// A socket begins now: what it missed before comes by a poll with its first cursor, so it is a way to begin.
    async fn join(&mut self) -> Client {
        let mut client = Client::at(self.relay(), &reader(), "&cursor=true").await.unwrap();
        client.subscribe(TOPIC, bindings()).await;
        client
    }

    async fn read(mut self, kind: &'static str, socket: Option<Client>) -> (&'static str, Self) {
        if let Some(mut client) = socket {
            while self.told < 150 {
                self.take(&client.change().await);
            }
        }
        let mut begun = Instant::now();
        while !self.end.is_near() {
            match (kind, self.dice.below(3)) {
                ("anew", _) if begun.elapsed() > Duration::from_millis(400) => {
                    self.begin().await;
                    begun = Instant::now();
                }
                ("poll" | "anew", _) | (_, 0) => _ = self.poll().await,
                (_, size) => self.stream(if size == 1 { 7 } else { 120 }).await,
            }
        }
        // The last writers end in a moment; all of theirs comes, and nothing more.
        let started = Instant::now();
        while self.end.total() != Some(self.has.values().sum()) {
            self.poll().await;
            assert!(started.elapsed() < 3 * PATIENCE, "{kind}: something is missing");
        }
        assert!(!self.poll().await, "{kind}: something comes again");
        (kind, self)
    }
}

/// An unmodified client that named its session and is cut off all the time: nothing is lost, and what comes again is known
/// by its transaction and number.
async fn resume(relays: Vec<SocketAddr>, mut client: Client, end: Arc<End>) -> (usize, usize) {
    let (mut has, mut seen, mut again, mut turn) = (HashMap::new(), HashSet::new(), 0, 0);
    loop {
        let cut = Instant::now() + Duration::from_millis(700);
        while Instant::now() < cut {
            match client.try_frame(Duration::from_millis(100)).await {
                Ok(Some(frame)) if frame[3] == "postgres_changes" => {
                    let change = &frame[4]["data"];
                    let mark = (
                        change["txid"].as_str().unwrap().to_owned(),
                        change["number"].as_str().unwrap().to_owned(),
                    );
                    if !seen.insert(mark) {
                        again += 1;
                        continue;
                    }
                    let number = |name: &str| change["record"][name].as_i64().unwrap();
                    let before = has.insert(number("id"), number("v")).unwrap_or(0);
                    assert_eq!(before + 1, number("v"), "{change}");
                }
                Ok(Some(frame)) => assert!(!frame.to_string().contains("Gap"), "{frame}"),
                Ok(None) => {}
                Err(over) => panic!("{over}"),
            }
        }
        if end.total() == Some(has.values().sum()) {
            return (seen.len(), again);
        }
        turn += 1;
        client = Client::at(relays[turn % relays.len()], &reader(), SESSION).await.unwrap();
        client.try_join(TOPIC, bindings()).await.unwrap();
    }
}

const SESSION: &str = "&session=5e551011-0000-4000-8000-00000000000c";

#[tokio::test(flavor = "multi_thread")]
async fn each_change_comes_once_by_whichever_relay_and_transport() {
    let _alone = CROWD.lock().await;
    match std::env::var("RELAY_TEST_SECONDS").ok().and_then(|seconds| seconds.parse().ok()) {
        None => tell_once(2, Duration::from_secs(SECONDS)).await,
        Some(seconds) => {
            for relays in 1..=3 {
                tell_once(relays, Duration::from_secs(seconds)).await;
            }
        }
    }
}

async fn tell_once(relays: usize, writing: Duration) {
    let database = Database::new().await;
    database
        .run(&format!(
            "create table once (id bigint primary key, v bigint not null); grant select on once to authenticated;
             insert into once select g, 0 from generate_series(1, {ROWS}) g; select relay.watch('once')"
        ))
        .await;
    let relays = join_all((0..relays).map(|_| Relay::start(&database.url))).await;
    let addresses: Vec<SocketAddr> = relays.iter().map(|relay| relay.address).collect();
    let end = Arc::<End>::default();
    let mut readers = Vec::new();
    for (number, kind) in ["poll", "poll", "anew", "anew", "turns", "turns", "socket"].into_iter().enumerate()
    {
        let mut reader = Reader {
            relays: addresses.clone(),
            dice: Dice(number as u64 + 11),
            has: HashMap::new(),
            cursor: String::new(),
            told: 0,
            busy: 0,
            end: Arc::clone(&end),
        };
        let socket = if kind == "socket" { Some(reader.join().await) } else { None };
        // Nothing is written yet.
        reader.begin().await;
        readers.push(tokio::spawn(reader.read(kind, socket)));
    }
    let mut client = Client::at(addresses[0], &reader(), SESSION).await.unwrap();
    client.subscribe(TOPIC, bindings()).await;
    let resuming = tokio::spawn(resume(addresses, client, Arc::clone(&end)));
    let writers: Vec<_> = (1..=WRITERS)
        .map(|number| tokio::spawn(write(database.url.clone(), number, Arc::clone(&end))))
        .collect();
    sleep(writing).await;
    end.is_near.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
    let rows = database.client.query("select id, v from once", &[]).await.unwrap();
    let truth: HashMap<i64, i64> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    end.total.store(truth.values().sum(), Ordering::Relaxed);
    end.is_there.store(true, Ordering::Release);
    let mut told = Vec::new();
    for reader in readers {
        let (kind, reader) = timeout(3 * PATIENCE, reader).await.expect("it comes to an end").unwrap();
        assert_eq!(reader.has, truth, "{kind}");
        told.push((kind, reader.told, reader.busy));
    }
    let (seen, again) = timeout(3 * PATIENCE, resuming).await.expect("the session has all").unwrap();
    println!(
        "relays: {}; {} changes; told to each: {told:?}; a session: {seen}, again {again}",
        relays.len(),
        truth.values().sum::<i64>()
    );
    assert!(told.iter().all(|(_, told, _)| *told > 300), "too little to prove anything: {told:?}");
}

async fn once() -> Database {
    let database = Database::new().await;
    database
        .run(
            "create table once (id bigint primary key, v bigint not null default 0);
             grant select on once to authenticated; select relay.watch('once')",
        )
        .await;
    database
}

/// A relay whose bell can be made silent: asleep, it stands still then, as after an outage, while the rest of it works.
struct Deaf {
    database: Database,
    relay: Relay,
    bell: Proxy,
}

impl Deaf {
    async fn new() -> Self {
        Self::of(once().await).await
    }

    async fn of(database: Database) -> Self {
        let (bell, url) = Proxy::to_server(&with_login(&database.url, READER)).await;
        let relay = Relay::with(&database.url, |settings| settings.doorbell_url = Some(url)).await;
        Self { database, relay, bell }
    }

    async fn stand_still(&self) {
        let asleep = "select asleep from relay.health";
        eventually("it sleeps", || async { (self.database.value(asleep).await == "t").then_some(()) }).await;
        self.bell.hold();
    }

    fn go_on(&self) {
        self.bell.release();
        self.bell.cut();
    }

    async fn cursor(&self) -> String {
        get(self.relay.address, &path(), "").await.body["cursor"].as_str().unwrap().to_owned()
    }

    async fn events(&self, since: &str) -> Events {
        Events::open(self.relay.address, &path(), Some(since)).await
    }
}

fn id(change: &Value) -> i64 {
    change["record"]["id"].as_i64().unwrap()
}

async fn next(events: &mut Events) -> (i64, String) {
    let event = timeout(PATIENCE, events.next()).await.expect("more is outstanding").unwrap();
    (id(&event.data), event.id)
}

/// While the feed stands still, a transaction is open, another commits, the rows are read, and the first commits: all of it
/// is on one page then, and the rows have a part of it that is anywhere among the rest.
async fn rows_amid_what_is_outstanding(size: i64, events_at_a_time: usize) {
    let stage = Deaf::new().await;
    let mut live = stage.events(&stage.cursor().await).await;
    stage.stand_still().await;
    let (late, early) = (stage.database.connect().await, stage.database.connect().await);
    late.batch_execute("begin").await.unwrap();
    early.batch_execute("begin").await.unwrap();
    for part in 0..4 {
        let insert =
            |first: i64| format!("insert into once select {first} + 2 * g from generate_series(1, {size}) g");
        early.batch_execute(&insert(2 * size * part)).await.unwrap();
        late.batch_execute(&insert(2 * size * part + 1)).await.unwrap();
    }
    early.batch_execute("commit").await.unwrap();
    let rows = get(stage.relay.address, &path(), "").await;
    let mut has: HashSet<i64> =
        rows.body["rows"].as_array().unwrap().iter().map(|row| row["id"].as_i64().unwrap()).collect();
    let all = 8 * size as usize;
    assert_eq!(has.len(), all / 2);
    late.batch_execute("commit").await.unwrap();
    // It is live before the feed goes on: it is told what comes together with others.
    let mut events = stage.events(rows.body["cursor"].as_str().unwrap()).await;
    stage.go_on();
    while has.len() < all {
        let mut cursor = String::new();
        for _ in 0..events_at_a_time.min(all - has.len()) {
            let (id, at) = next(&mut events).await;
            assert!(has.insert(id), "{id} comes again, of {}", has.len());
            cursor = at;
        }
        events = stage.events(&cursor).await;
    }
    stage.database.run("insert into once values (0)").await;
    assert_eq!(next(&mut events).await.0, 0, "something comes again after all");
    let mut told = HashSet::new();
    while told.len() <= all {
        let (id, _) = next(&mut live).await;
        assert!(told.insert(id), "{id} comes again to who was there before");
    }
    stage.relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_rows_have_of_an_outstanding_page_is_not_told_again() {
    rows_amid_what_is_outstanding(250, 100).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_rows_have_of_a_large_outstanding_page_is_not_told_again() {
    rows_amid_what_is_outstanding(1500, 1700).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cursor_ahead_of_a_relay_is_awaited_and_never_goes_back() {
    let stage = Deaf::new().await;
    stage.stand_still().await;
    stage.database.run("insert into once values (1), (2)").await;
    stage.database.run("insert into once values (3)").await;
    let since = stage.database.value("select relay.cursor()").await;
    let poll = async |since: &str, wait: u32| {
        get(stage.relay.address, &format!("{}&wait={wait}&since={since}", path()), "").await
    };
    let answer = poll(&since, 1).await;
    assert_eq!((answer.status, &answer.body["changes"]), (200, &json!([])), "{answer:?}");
    let since = answer.body["cursor"].as_str().unwrap().to_owned();
    let mut events = stage.events(&since).await;
    stage.database.run("insert into once values (4)").await;
    stage.go_on();
    assert_eq!(next(&mut events).await.0, 4, "what it had comes again");
    let answer = poll(&since, 10).await;
    let ids: Vec<i64> = answer.body["changes"].as_array().unwrap().iter().map(id).collect();
    assert_eq!(ids, [4], "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poll_is_answered_while_the_feed_moves_on_faster_than_the_rules_are_looked_at() {
    let database = once().await;
    database
        .run(
            "alter function relay.catalog_marks(text[], text, oid[]) rename to marks_at_once;
             create function relay.catalog_marks(text[], text, oid[]) returns table (kind text, name text, mark text) language plpgsql as
             $$ begin perform pg_sleep(0.1); return query select * from relay.marks_at_once($1, $2, $3); end $$;
             grant execute on function relay.catalog_marks(text[], text, oid[]) to relay_reader",
        )
        .await;
    let relay = Relay::start(&database.url).await;
    let mut cursor = get(relay.address, &path(), "").await.body["cursor"].as_str().unwrap().to_owned();
    let end = Arc::<AtomicBool>::default();
    let (session, ending) = (database.connect().await, Arc::clone(&end));
    let writing = tokio::spawn(async move {
        let mut last = 0;
        while !ending.load(Ordering::Relaxed) {
            last += 1;
            session.batch_execute(&format!("insert into once values ({last})")).await.unwrap();
            sleep(Duration::from_millis(4)).await;
        }
        last
    });
    sleep(Duration::from_millis(300)).await;
    let mut ids = Vec::new();
    for _ in 0..5 {
        let answer = get(relay.address, &format!("{}&wait=5&since={cursor}", path()), "").await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let changes = answer.body["changes"].as_array().unwrap();
        assert!(!changes.is_empty(), "{answer:?}");
        ids.extend(changes.iter().map(id));
        cursor = answer.body["cursor"].as_str().unwrap().to_owned();
    }
    end.store(true, Ordering::Relaxed);
    assert!(ids.len() as i64 <= writing.await.unwrap());
    assert!(ids.iter().copied().eq(1..=ids.len() as i64), "{ids:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_goes_on_at_a_relay_that_is_behind_and_hears_nothing_again() {
    let database = once().await;
    let leader = Relay::start(&database.url).await;
    let stage = Deaf::of(database).await;
    let mut client = Client::at(leader.address, &reader(), SESSION).await.unwrap();
    client.subscribe(TOPIC, bindings()).await;
    stage.stand_still().await;
    stage.database.run("insert into once values (1)").await;
    let first = client.change().await;
    assert_eq!(id(&first), 1);
    let at: Cursor = first["cursor"].as_str().unwrap().parse().unwrap();
    let started = Instant::now();
    loop {
        let bookmark = stage.database.value("select cursor from relay.bookmarks").await;
        if bookmark.parse::<Cursor>().unwrap().is_at_or_after(&at) {
            break;
        }
        assert!(started.elapsed() < PATIENCE, "its bookmark stays behind");
        // The pong is sent by who reads.
        client.frame_within(Duration::from_millis(20)).await;
    }
    drop(client);
    let mut client = Client::at(stage.relay.address, &reader(), SESSION).await.unwrap();
    client.subscribe(TOPIC, bindings()).await;
    stage.go_on();
    stage.database.run("insert into once values (2)").await;
    assert_eq!(id(&client.change().await), 2, "what it had comes again");
}
