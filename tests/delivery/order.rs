//! Completeness and order: every committed change exactly once, nothing rolled back, each row's changes as they were made.
#![allow(clippy::print_stdout, reason = "the figures are part of what is shown")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio_postgres::{Client as Session, Error};

use crate::support::client::Client;
use crate::support::database::Database;
use crate::support::dice::Dice;
use crate::support::relay::Relay;
use crate::support::{PATIENCE, token};

/// Tests with dozens of connections run one after the other, or the server has none left for the rest.
pub static CROWD: Mutex<()> = Mutex::const_new(());

const WRITERS: u64 = 32;
const SHARED_ROWS: u64 = 40;
const WRITING: Duration = Duration::from_secs(3);
/// Each writer makes at least so many transactions, however busy the machine is.
const LEAST: u64 = 8;

/// Every write is one statement that also tells the audit table: which row, what happened, and a mark of its own.
/// The row is locked by then, so that for one row the order of `serial` is the order of its writes.
const SCHEMA: &str = "
    create table items (id int primary key, mark text not null);
    alter table items replica identity full;
    create table audit (serial bigserial primary key, id int not null, operation text not null, mark text not null);
    grant select on items to authenticated;
    insert into items select i, 'start' from generate_series(0, 39) i;
    select relay.watch('items')";
const UPDATE: &str = "with w as (update items set mark = $2 where id = $1 returning id, mark)
    insert into audit (id, operation, mark) select id, 'UPDATE', mark from w";
const DELETE: &str = "with w as (delete from items where id = $1 returning id, mark)
    insert into audit (id, operation, mark) select id, 'DELETE', mark from w";
const UPSERT: &str = "with w as (insert into items values ($1, $2)
        on conflict (id) do update set mark = excluded.mark returning id, mark, xmax::text = '0' as fresh)
    insert into audit (id, operation, mark) select id, case when fresh then 'INSERT' else 'UPDATE' end, mark from w";

#[derive(Default)]
struct Tally {
    commits: u64,
    rollbacks: u64,
}

struct Writer {
    session: Session,
    dice: Dice,
    number: u64,
    step: u64,
}

impl Writer {
    async fn write_until(mut self, end: Instant) -> Tally {
        let mut tally = Tally::default();
        while Instant::now() < end || tally.commits + tally.rollbacks < LEAST {
            match self.transaction().await {
                Ok(true) => tally.commits += 1,
                Ok(false) => tally.rollbacks += 1,
                // Two writers wait for each other: PostgreSQL rolls one back.
                Err(error) if error.code().is_some_and(|code| code.code() == "40P01") => {
                    self.session.batch_execute("rollback").await.unwrap();
                    tally.rollbacks += 1;
                }
                Err(error) => panic!("{error}: {:?}", error.as_db_error()),
            }
        }
        tally
    }

    /// Some writes, some of them taken back to a savepoint; whether it was committed.
    async fn transaction(&mut self) -> Result<bool, Error> {
        self.session.batch_execute("begin").await?;
        // Rows in their order, so that few deadlocks cost time.
        let mut rows: Vec<u64> = (0..=self.dice.below(4)).map(|_| self.dice.below(SHARED_ROWS)).collect();
        rows.sort_unstable();
        for row in rows {
            let doubtful = self.dice.below(3) == 0;
            if doubtful {
                self.session.batch_execute("savepoint s").await?;
            }
            self.write(row).await?;
            match self.dice.below(4) {
                0 if doubtful => self.session.batch_execute("rollback to s").await?,
                1 if doubtful => self.session.batch_execute("release s").await?,
                _ => {}
            }
            self.pause(6).await?;
        }
        let own = 1000 * (self.number + 1) + self.step % 10;
        self.write(own).await?;
        self.pause(20).await?;
        let commit = self.dice.below(5) != 0;
        self.session.batch_execute(if commit { "commit" } else { "rollback" }).await?;
        Ok(commit)
    }

    async fn write(&mut self, row: u64) -> Result<(), Error> {
        self.step += 1;
        let id = row as i32;
        let mark = format!("{}-{}", self.number, self.step);
        match self.dice.below(6) {
            0 => self.session.execute(DELETE, &[&id]).await?,
            1 | 2 => self.session.execute(UPSERT, &[&id, &mark]).await?,
            _ => self.session.execute(UPDATE, &[&id, &mark]).await?,
        };
        Ok(())
    }

    async fn pause(&mut self, below_ms: u64) -> Result<(), Error> {
        let seconds = self.dice.below(below_ms) as f64 / 1000.0;
        self.session.execute("select pg_sleep($1)", &[&seconds]).await?;
        Ok(())
    }
}

/// What happened to each row, in order.
type Lives = BTreeMap<i64, Vec<(String, String)>>;

fn lives(changes: &[Value]) -> Lives {
    let mut lives = Lives::new();
    for change in changes {
        let image = if change["type"] == "DELETE" { &change["old_record"] } else { &change["record"] };
        let told = (change["type"].as_str().unwrap().to_owned(), image["mark"].as_str().unwrap().to_owned());
        lives.entry(image["id"].as_i64().unwrap()).or_default().push(told);
    }
    lives
}

async fn true_lives(database: &Database) -> Lives {
    let mut lives = Lives::new();
    for row in
        database.client.query("select id, operation, mark from audit order by serial", &[]).await.unwrap()
    {
        lives.entry(i64::from(row.get::<_, i32>(0))).or_default().push((row.get(1), row.get(2)));
    }
    lives
}

/// A subscriber to everything in these tables, which may have much waiting for it.
async fn subscriber(relay: &Relay, tables: &[&str]) -> Client {
    let mut client = Client::connect(relay, &token("authenticated", None, json!({}))).await;
    let bindings: Vec<Value> =
        tables.iter().map(|table| json!({"event": "*", "schema": "public", "table": table})).collect();
    client.subscribe("realtime:all", json!(bindings)).await;
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn thirty_two_writers_are_told_completely_once_and_in_order() {
    let _alone = CROWD.lock().await;
    let seed =
        std::env::var("RELAY_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64
        });
    println!("RELAY_TEST_SEED={seed}");
    let database = Database::new().await;
    database.run(SCHEMA).await;
    let relay = Relay::start(&database.url).await;
    let mut client = subscriber(&relay, &["items"]).await;
    let reader = tokio::spawn(async move {
        let changes = client.changes_until(|change| change["record"]["mark"] == "last").await;
        (client, changes)
    });

    // Written first, committed last: a reader that goes by numbers would have passed it long since.
    let open = database.connect().await;
    open.batch_execute("begin").await.unwrap();
    open.execute(UPSERT, &[&900_i32, &"open throughout"]).await.unwrap();
    let end = Instant::now() + WRITING;
    let mut writers = Vec::new();
    for number in 0..WRITERS {
        let session = database.connect().await;
        let dice = Dice(seed.wrapping_mul(2 * number + 1) | 1);
        writers.push(tokio::spawn(Writer { session, dice, number, step: 0 }.write_until(end)));
    }
    let mut tally = Tally::default();
    for writer in writers {
        let one = writer.await.unwrap();
        tally.commits += one.commits;
        tally.rollbacks += one.rollbacks;
    }
    open.execute(UPSERT, &[&901_i32, &"open to the end"]).await.unwrap();
    open.batch_execute("commit").await.unwrap();
    database.client.execute(UPSERT, &[&902_i32, &"last"]).await.unwrap();

    let (mut client, changes) = reader.await.unwrap();
    let told = lives(&changes);
    let truth = true_lives(&database).await;
    println!("{} commits, {} rollbacks, {} changes", tally.commits, tally.rollbacks, changes.len());
    assert!(tally.commits > 100 && tally.rollbacks > 20, "the writers did too little to prove anything");
    for (id, life) in &truth {
        assert_eq!(told.get(id), Some(life), "row {id}");
    }
    assert_eq!(told.len(), truth.len(), "rows were told of that no committed transaction wrote");
    database.client.execute(UPSERT, &[&903_i32, &"after the last"]).await.unwrap();
    assert_eq!(client.change().await["record"]["id"], 903, "something was told twice");
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_larger_than_a_part_arrives_whole_and_in_order() {
    let database = Database::new().await;
    database.run("create table t (id int primary key); grant select on t to authenticated; select relay.watch('t')").await;
    let relay = Relay::start(&database.url).await;
    let mut client = subscriber(&relay, &["t"]).await;
    database.run("insert into t select i from generate_series(1, 5000) i").await;
    database.run("update t set id = -id where id <= 2500").await;
    database.run("insert into t values (0)").await;
    let changes = client.changes_until(|change| change["record"]["id"] == 0).await;
    let mut told = changes.iter().map(|change| change["record"]["id"].as_i64().unwrap());
    for id in 1..=5000 {
        assert_eq!(told.next(), Some(id));
    }
    let mut updated: Vec<i64> = told.by_ref().take(2500).collect();
    updated.sort_unstable();
    assert_eq!(updated, (-2500..=-1).collect::<Vec<_>>());
    assert_eq!(told.collect::<Vec<_>>(), [0]);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_huge_transaction_does_not_hold_up_other_tables() {
    const HUGE: i64 = 50_000;
    let database = Database::new().await;
    database
        .run(
            "create table huge (id int primary key); create table small (id int primary key);
             grant select on huge, small to authenticated; select relay.watch('huge'), relay.watch('small')",
        )
        .await;
    let relay = Relay::start(&database.url).await;
    let mut of_huge = subscriber(&relay, &["huge"]).await;
    let mut of_small = subscriber(&relay, &["small"]).await;
    let writer = database.connect().await;
    writer
        .batch_execute(&format!("begin; insert into huge select generate_series(1, {HUGE})"))
        .await
        .unwrap();
    database.run("insert into small values (1)").await;
    assert_eq!(of_small.change().await["record"]["id"], 1, "while the huge transaction is open");
    let whole =
        tokio::spawn(async move { of_huge.changes_until(|change| change["record"]["id"] == HUGE).await });
    writer.batch_execute("commit").await.unwrap();
    let committed = Instant::now();
    database.run("insert into small values (2)").await;
    let behind = of_small.frame_within(3 * PATIENCE).await.unwrap();
    assert_eq!(behind[4]["data"]["record"]["id"], 2, "behind the huge transaction");
    println!("behind {HUGE} rows: {:?}", committed.elapsed());
    let whole = tokio::time::timeout(3 * PATIENCE, whole).await.unwrap().unwrap();
    assert!(whole.iter().map(|change| change["record"]["id"].as_i64().unwrap()).eq(1..=HUGE));
    relay.stop().await;
}
