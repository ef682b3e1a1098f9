//! A page read in portions is the page: nothing is left out between two of them, nothing comes twice.

use relay::model::log::cursor::{Epoch, Snapshot, Span};
use relay::postgres::changelog::chunks::{ChunkPosition, ChunkReader};
use relay::postgres::connect::pool::Server;
use tokio_postgres::Client as Session;

use crate::support::PATIENCE;
use crate::support::database::Database;
use crate::support::dice::Dice;

const ROUNDS: u64 = 4;
const STEPS: u64 = 60;

/// Transactions that overlap, with savepoints, some rolled back; the snapshots of some moments in between.
async fn write(database: &Database, writers: &[Session], dice: &mut Dice) -> Vec<Snapshot> {
    let mut snapshots = Vec::new();
    let mut is_open = vec![false; writers.len()];
    for _ in 0..STEPS {
        let one = dice.below(writers.len() as u64) as usize;
        let insert = format!("insert into t select generate_series(1, {})", 1 + dice.below(40));
        let step = match (is_open[one], dice.below(6)) {
            (false, _) => format!("begin; {insert}"),
            (true, 0 | 1) => String::from("commit"),
            (true, 2) => String::from("rollback"),
            (true, 3) => format!("savepoint s; {insert}; rollback to s"),
            (true, _) => insert,
        };
        is_open[one] = !matches!(step.as_str(), "commit" | "rollback");
        writers[one].batch_execute(&step).await.unwrap();
        if dice.below(8) == 0 {
            let now = database.value("select pg_current_snapshot()").await;
            snapshots.push(Snapshot::parse(&now).unwrap());
        }
    }
    for writer in writers {
        writer.batch_execute("commit").await.unwrap();
    }
    snapshots
}

async fn in_portions(
    portions: &ChunkReader,
    mut bearing: ChunkPosition,
    most: usize,
    most_bytes: usize,
) -> Vec<i64> {
    let mut numbers = Vec::new();
    loop {
        let portion = portions.read(&bearing, most, most_bytes).await.unwrap();
        numbers.extend(portion.parts.iter().flatten().map(|change| change.number));
        match portion.next {
            Some(next) => bearing = next,
            None => return numbers,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_in_portions_is_the_page_from_wherever_one_goes_on() {
    let mut dice = Dice(20_261_120);
    for round in 0..ROUNDS {
        let database = Database::new().await;
        database.run("create table t (v int default 0); select relay.watch('t')").await;
        let writers = [database.connect().await, database.connect().await, database.connect().await];
        let snapshots = write(&database, &writers, &mut dice).await;
        let session = database.connect().await;
        let server = Server::parse(&database.url, "portions", None).unwrap();
        let portions = ChunkReader::connect(&server, PATIENCE).await.unwrap();
        // By their names, some of them, none.
        let portions = portions.naming([2000, 3, 0][round as usize % 3]);
        for (place, seen) in snapshots.iter().enumerate() {
            for until in &snapshots[place..] {
                let page = "select number from relay.page($1::text::pg_snapshot, $2::text::pg_snapshot, 0) \
                            where number is not null";
                let rows = session.query(page, &[&seen.to_string(), &until.to_string()]).await.unwrap();
                let numbers: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
                let (most, most_bytes) = (1 + dice.below(30) as usize, 40 + dice.below(2000) as usize);
                let span = Span { epoch: Epoch(0), seen: seen.clone(), until: until.clone() };
                let from = |after| ChunkPosition::new(&span, after);
                assert_eq!(
                    in_portions(&portions, from(0), most, most_bytes).await,
                    numbers,
                    "{seen} {until}"
                );
                if !numbers.is_empty() {
                    let (told, left) = numbers.split_at(1 + dice.below(numbers.len() as u64) as usize);
                    let rest = in_portions(&portions, from(told[told.len() - 1]), most, most_bytes).await;
                    assert_eq!(rest, left, "{seen} {until} after {told:?}");
                    let through = told.last().copied();
                    let first = from(0).through(through);
                    let first = in_portions(&portions, first, most, most_bytes).await;
                    assert_eq!(first, told, "{seen} {until} through {through:?}");
                    let (skipped, between) = told.split_at(told.len() / 2);
                    let second = from(skipped.last().copied().unwrap_or(0)).through(through);
                    let second = in_portions(&portions, second, most, most_bytes).await;
                    assert_eq!(second, between, "{seen} {until} after {skipped:?} through {through:?}");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_portion_of_a_large_transaction_reads_what_it_has_and_no_more_of_the_index() {
    let database = Database::new().await;
    database.run("create table t (v int default 0); select relay.watch('t')").await;
    let seen = database.value("select pg_current_snapshot()").await;
    // Among small ones, of which one began before it and ends after it.
    let beside = database.connect().await;
    beside.batch_execute("begin; insert into t values (1)").await.unwrap();
    for values in ["values (2)", "select generate_series(1, 60000)", "values (3)"] {
        database.run(&format!("insert into t {values}")).await;
    }
    beside.batch_execute("insert into t values (4); commit").await.unwrap();
    let until = database.value("select pg_current_snapshot()").await;
    let middle: i64 = database.value("select max(number) - 30000 from relay.changes").await.parse().unwrap();
    let named = async |most: i32| {
        let names = format!("select relay.page_transactions('{seen}', '{until}', {most})");
        database.value(&format!("select coalesce(quote_literal(({names})), 'null')")).await
    };
    assert_eq!(named(3).await, "null");
    let named = named(4).await;
    // Transactions of other databases that ran before stand there, too.
    assert!(named.matches(',').count() >= 3, "{named}");
    database.run("set enable_seqscan = off; set plan_cache_mode = force_generic_plan; set max_parallel_workers_per_gather = 0").await;
    let mut blocks = Vec::new();
    for transactions in [&*named, "null"] {
        database
            .run(&format!(
                "deallocate all; prepare slice as select * from relay.page_slice('{seen}', '{until}', {middle}, {middle} + 500, {transactions})"
            ))
            .await;
        let explain = "explain (analyze, buffers, format json) execute slice";
        let plan: serde_json::Value = database.client.query_one(explain, &[]).await.unwrap().get(0);
        let plan = &plan[0]["Plan"];
        assert_eq!(plan["Actual Rows"].as_f64(), Some(501.0), "{plan}");
        blocks
            .push(plan["Shared Hit Blocks"].as_i64().unwrap() + plan["Shared Read Blocks"].as_i64().unwrap());
    }
    assert!(blocks[0] < 100 && blocks[1] > 200, "{blocks:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_looks_at_each_segment_once_and_at_nothing_else_where_no_transaction_runs() {
    let database = Database::new().await;
    database.run("set enable_seqscan = off; set enable_bitmapscan = off").await;
    for (some_run, looks) in [(false, 1), (true, 2)] {
        let explain = format!("explain (costs off) select * from relay.page('3:3:', null, 0, {some_run})");
        let lines = database.client.query(&explain, &[]).await.unwrap();
        let lines: Vec<String> = lines.iter().map(|line| line.get(0)).collect();
        let scans: Vec<&String> = lines.iter().filter(|line| line.contains("Scan using")).collect();
        for segment in ["log_0", "log_1", "log_2"] {
            let of_it = scans.iter().filter(|scan| scan.contains(&format!(" on {segment} "))).count();
            assert_eq!(of_it, looks, "{segment} {lines:#?}");
        }
        assert_eq!(scans.len(), 3 * looks, "{lines:#?}");
        // The list of transactions that ran is the only thing else that is opened.
        let others = lines.iter().filter(|line| line.contains("Scan") && !line.contains("Scan using"));
        let others: Vec<&String> = others.filter(|line| !line.contains("Subquery Scan")).collect();
        assert_eq!(others.len(), looks - 1, "{lines:#?}");
    }
}
