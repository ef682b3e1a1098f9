//! Trims the changelog by the rule of `relay.retain`, as long as nobody else does.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{sleep, timeout};
use tokio_postgres::{Client, Row, Statement};
use tokio_util::sync::CancellationToken;

use crate::observe::Observe;
use crate::postgres::connect::pool::{Error, Server};

/// The changelog is looked after this often at most …
const AT_MOST: Duration = Duration::from_millis(250);
/// … and at least, in between by how long it is kept.
const AT_LEAST: Duration = Duration::from_secs(30);
/// No look takes so long; on a connection on which nothing comes any more one would never end.
const PATIENCE: Duration = Duration::from_secs(60);

/// Looks after the changelog until the end. Several relays may: `relay.tend` never runs twice at once.
pub async fn run(server: Server, observe: Arc<Observe>, end: CancellationToken) {
    let mut pause = Duration::from_secs(1);
    loop {
        let worked = tokio::select! {
            () = end.cancelled() => return,
            worked = work(&server, &observe) => worked,
        };
        let Err(error) = worked;
        tracing::warn!(error = %error, pause_ms = pause.as_millis() as u64, "the changelog is not being trimmed");
        tokio::select! {
            () = end.cancelled() => return,
            () = sleep(pause) => pause = (pause * 2).min(AT_LEAST),
        }
    }
}

async fn work(server: &Server, observe: &Observe) -> Result<std::convert::Infallible, Error> {
    let client = server.connect().await?;
    let tend = client.prepare("select relay.tend()").await?;
    let health = client
        .prepare("select coalesce(bytes, 0), extract(epoch from kept_for)::float8 from relay.health")
        .await?;
    loop {
        let done: Vec<String> = ask(&client, &tend).await?.get(0);
        if !done.is_empty() {
            tracing::info!(segments = done.join(", "), "the changelog was trimmed");
        }
        let row = ask(&client, &health).await?;
        observe.changelog_bytes(row.get(0));
        let kept: f64 = row.get(1);
        let wait = Duration::try_from_secs_f64(kept / 8.0).unwrap_or(AT_LEAST);
        sleep(wait.clamp(AT_MOST, AT_LEAST)).await;
    }
}

async fn ask(client: &Client, statement: &Statement) -> Result<Row, Error> {
    match timeout(PATIENCE, client.query_one(statement, &[])).await {
        Ok(answered) => Ok(answered?),
        Err(_) => Err(Error::Lost("the connection that trims the changelog does not answer")),
    }
}
