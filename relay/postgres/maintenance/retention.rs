//! Trims the changelog by the rule of `relay.retain`, and deletes old broadcasts, one relay at a time.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use tokio_postgres::{Client, Row, Statement};
use tokio_util::sync::CancellationToken;

use crate::observe::Observe;
use crate::postgres::connect::pool::{Error, Server};
use crate::postgres::connect::within::within;

/// Minimum interval between trims. The interval is an eighth of the time for which changes are kept, within these bounds.
const MIN_INTERVAL: Duration = Duration::from_millis(250);
/// Maximum interval between trims, also the maximum pause after an error.
const MAX_INTERVAL: Duration = Duration::from_secs(30);
/// Number of broadcasts that one statement deletes: it takes milliseconds.
const MESSAGES_AT_ONCE: i32 = 5000;
/// Pause between two of these statements, so that the rate stays above any rate of inserts that lasts.
const STEP_PAUSE: Duration = Duration::from_millis(50);
/// Client-side timeout of a statement: on a connection whose peer is gone, it would never end.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(60);

/// Trims the changelog until `end`. Several relays may run it: `relay.trim_changelog` never overlaps with itself.
pub async fn run(server: Server, observe: Arc<Observe>, end: CancellationToken) {
    let mut pause = Duration::from_secs(1);
    loop {
        let worked = tokio::select! {
            () = end.cancelled() => return,
            worked = work(&server, &observe) => worked,
        };
        let Err(error) = worked;
        tracing::warn!(error = %error, pause_ms = pause.as_millis() as u64, "changelog not trimmed, retrying");
        tokio::select! {
            () = end.cancelled() => return,
            () = sleep(pause) => pause = (pause * 2).min(MAX_INTERVAL),
        }
    }
}

async fn work(server: &Server, observe: &Observe) -> Result<std::convert::Infallible, Error> {
    let client = server.connect().await?;
    let trim = client.prepare("select relay.trim_changelog()").await?;
    let health = client
        .prepare("select coalesce(bytes, 0), extract(epoch from kept_for)::float8 from relay.health")
        .await?;
    let make_partitions = client.prepare("select relay.make_partitions()").await?;
    let trim_messages = client.prepare("select relay.trim_messages($1)").await?;
    loop {
        let trimmed: Vec<String> = query(&client, &trim).await?.get(0);
        if !trimmed.is_empty() {
            tracing::info!(segments = trimmed.join(", "), "changelog trimmed");
        }
        let row = query(&client, &health).await?;
        observe.changelog_bytes(row.get(0));
        query(&client, &make_partitions).await?;
        delete_messages(&client, &trim_messages).await?;
        let kept: f64 = row.get(1);
        let wait = Duration::try_from_secs_f64(kept / 8.0).unwrap_or(MAX_INTERVAL);
        sleep(wait.clamp(MIN_INTERVAL, MAX_INTERVAL)).await;
    }
}

/// Deletes broadcasts that are older than they are kept, in small steps with pauses between them.
async fn delete_messages(client: &Client, trim_messages: &Statement) -> Result<(), Error> {
    let what = "the connection that deletes old broadcasts";
    loop {
        let row =
            within(STATEMENT_TIMEOUT, what, client.query_one(trim_messages, &[&MESSAGES_AT_ONCE])).await?;
        if row.get::<_, i32>(0) < MESSAGES_AT_ONCE {
            return Ok(());
        }
        sleep(STEP_PAUSE).await;
    }
}

async fn query(client: &Client, statement: &Statement) -> Result<Row, Error> {
    let what = "the connection that trims the changelog";
    within(STATEMENT_TIMEOUT, what, client.query_one(statement, &[])).await
}
