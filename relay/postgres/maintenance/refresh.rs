//! Runs the refresh schedule of materialized views (`relay.refresh_every`), one relay at a time.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::postgres::connect::pool::{Error, Server};

/// Maximum interval between checks of the schedule, also the maximum pause after an error. It bounds the delay of a change
/// of the schedule whose notification was lost.
const MAX_INTERVAL: Duration = Duration::from_secs(60);

/// Maximum time for which a refresh waits for a lock on a table of its view, and the refreshes of other views wait for it.
const LOCK_WAIT: &str = "1s";

/// Runs due refreshes until `end`. `jobs` reports that the schedule may have changed.
///
/// `relay.run_refreshes` never overlaps with itself, so several relays may call it.
pub async fn run(server: Server, jobs: watch::Sender<()>, end: CancellationToken) {
    let mut pause = Duration::from_secs(1);
    loop {
        let worked = tokio::select! {
            () = end.cancelled() => return,
            worked = work(&server, &jobs) => worked,
        };
        let Err(error) = worked;
        tracing::warn!(error = %error, pause_ms = pause.as_millis() as u64, "refresh schedule interrupted, retrying");
        tokio::select! {
            () = end.cancelled() => return,
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(MAX_INTERVAL),
        }
    }
}

async fn work(server: &Server, jobs: &watch::Sender<()>) -> Result<std::convert::Infallible, Error> {
    let mut changed = jobs.subscribe();
    let client = server.connect().await?;
    client.batch_execute(&format!("set synchronous_commit = on; set lock_timeout = '{LOCK_WAIT}'")).await?;
    // One a transaction, so that the changes of a view do not wait for the next view.
    let refresh = client.prepare("select extract(epoch from relay.run_refreshes(1))::float8").await?;
    loop {
        let next: Option<f64> = client.query_one(&refresh, &[]).await?.get(0);
        let wait = next.map_or(MAX_INTERVAL, |seconds| {
            Duration::from_secs_f64(seconds.clamp(0.01, MAX_INTERVAL.as_secs_f64()))
        });
        let _ = timeout(wait, changed.changed()).await;
    }
}
