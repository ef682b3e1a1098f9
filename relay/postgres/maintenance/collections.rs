//! Keeps the watched tables equal to those of publications and schemas (`relay.watch_publication`, `relay.watch_schema`).

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::postgres::connect::pool::{Error, Server};
use crate::postgres::connect::within::within;

/// Maximum interval between checks where no publication or schema is watched, also the maximum pause after an error. It bounds the delay of a
/// first collection whose notification was lost.
const MAX_INTERVAL: Duration = Duration::from_secs(60);
/// Client-side timeout of a statement: on a connection whose peer is gone, it would never end.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(60);

/// Watches and unwatches tables until `end`. `jobs` reports that there may be work.
///
/// `relay.sync_collections` never overlaps with itself, so several relays may call it.
pub async fn run(server: Server, jobs: watch::Sender<()>, end: CancellationToken) {
    let mut changed = jobs.subscribe();
    let mut pause = Duration::from_secs(1);
    loop {
        let worked = tokio::select! {
            () = end.cancelled() => return,
            worked = work(&server, &mut changed) => worked,
        };
        let wait = match worked {
            Ok(()) => {
                pause = Duration::from_secs(1);
                MAX_INTERVAL
            }
            Err(error) => {
                tracing::warn!(error = %error, pause_ms = pause.as_millis() as u64, "publications and schemas not checked, retrying");
                let wait = pause;
                pause = (pause * 2).min(MAX_INTERVAL);
                wait
            }
        };
        tokio::select! {
            () = end.cancelled() => return,
            _ = timeout(wait, changed.changed()) => {}
        }
    }
}

/// Watches and unwatches tables until no publication or schema is watched; without that, no connection is kept.
async fn work(server: &Server, changed: &mut watch::Receiver<()>) -> Result<(), Error> {
    let client = server.connect().await?;
    client.batch_execute("set synchronous_commit = on").await?;
    // One table a transaction, so that no table stays locked while others are prepared.
    let sync = client.prepare("select extract(epoch from relay.sync_collections())::float8").await?;
    loop {
        let synced = client.query_one(&sync, &[]);
        let synced = within(STATEMENT_TIMEOUT, "the connection that watches tables", synced).await?;
        let Some(wait): Option<f64> = synced.get(0) else { return Ok(()) };
        let _ = timeout(Duration::from_secs_f64(wait.max(0.0)), changed.changed()).await;
    }
}
