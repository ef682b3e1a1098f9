//! Databases to measure in, and the writers of the rows that clients wait for.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::{Instant, sleep_until};
use tokio_postgres::{Client, Statement};

use crate::floor;
use crate::ledger::Ledger;
use crate::support::database::Database;

/// What makes a frame about 480 bytes long.
const BODY: &str = "warm and still, the wind from the west, a little rain towards the evening, clearing again \
                    after midnight; pressure rising slowly, visibility good";
/// The saturating writer's rows ahead of the slowest reader.
pub const AHEAD: u64 = 64;

/// A database with one table for the clients to watch.
pub struct Stage {
    client: Client,
    insert: Statement,
}

impl Stage {
    /// The table watched, with every user allowed to read it. The relay must have been installed.
    pub async fn watched(database: &Database, table: &str) -> Self {
        Self::watched_with(database, table, BODY).await
    }

    /// The same with rows of another body.
    pub async fn watched_with(database: &Database, table: &str, body: &str) -> Self {
        make_table(database, table).await;
        database
            .run(&format!("grant select on {table} to authenticated; select relay.watch('{table}')"))
            .await;
        Self::with(database, table, body).await
    }

    /// The table with a trigger that notifies the floor of each row.
    pub async fn notifying(database: &Database, table: &str) -> Self {
        make_table(database, table).await;
        let notify = format!(
            "create function tell() returns trigger language plpgsql as \
             $$ begin perform pg_notify('{}', row_to_json(new)::text); return null; end $$; \
             create trigger tell after insert on {table} for each row execute function tell()",
            floor::CHANNEL
        );
        database.run(&notify).await;
        Self::with(database, table, BODY).await
    }

    async fn with(database: &Database, table: &str, body: &str) -> Self {
        let client = database.connect().await;
        let insert = format!("insert into {table} (id, device, body) values ($1, 'station 7', '{body}')");
        let insert = client.prepare(&insert).await.unwrap();
        Self { client, insert }
    }

    /// One row a transaction, at a steady rate.
    pub async fn write_paced(&self, ledger: &Ledger, first: u64, rows: u64, per_second: f64) {
        let started = Instant::now();
        for index in 0..rows {
            sleep_until(started + Duration::from_secs_f64(index as f64 / per_second)).await;
            let id = first + index;
            ledger.sent(id);
            self.client.execute(&self.insert, &[&(id as i64)]).await.unwrap();
            ledger.acknowledged(id);
        }
    }

    /// The same, with the clock started when `COMMIT` leaves.
    pub async fn write_commits(&self, ledger: &Ledger, first: u64, rows: u64, per_second: f64) {
        let started = Instant::now();
        for index in 0..rows {
            sleep_until(started + Duration::from_secs_f64(index as f64 / per_second)).await;
            let id = first + index;
            self.client.batch_execute("begin").await.unwrap();
            self.client.execute(&self.insert, &[&(id as i64)]).await.unwrap();
            ledger.sent(id);
            self.client.batch_execute("commit").await.unwrap();
            ledger.acknowledged(id);
        }
    }

    /// One row a transaction, as fast as the slowest client reads; returns the number of rows.
    ///
    /// These commits don't wait for the disk: a slow one would be all that is measured. The relay still waits for it
    /// before it shows a row, once a page.
    pub async fn write_saturating(&self, ledger: &Arc<Ledger>, first: u64, time: Duration) -> u64 {
        self.client.batch_execute("set synchronous_commit = off").await.unwrap();
        let started = Instant::now();
        let mut next = first;
        let mut under_way = FuturesUnordered::new();
        while started.elapsed() < time {
            while next <= ledger.complete() + AHEAD {
                let id = next;
                next += 1;
                ledger.sent(id);
                under_way.push(async move {
                    self.client.execute(&self.insert, &[&(id as i64)]).await.unwrap();
                });
            }
            tokio::select! {
                Some(()) = under_way.next(), if !under_way.is_empty() => {}
                () = ledger.progress.notified() => {}
                () = sleep_until(started + time) => {}
            }
        }
        while under_way.next().await.is_some() {}
        self.client.batch_execute("reset synchronous_commit").await.unwrap();
        next - first
    }
}

async fn make_table(database: &Database, table: &str) {
    database.run(&format!("create table {table} (id bigint primary key, device text, body text)")).await;
}
