//! Runs the refresh schedule of materialized views (`relay.refresh_every`), as long as nobody else does.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::postgres::connect::pool::{Error, Server};

/// Looks at the schedule at least this often: a schedule changed while the bell was not heard is found by it.
const AT_LEAST: Duration = Duration::from_secs(60);

/// Runs due refreshes until the end. `changed` wakes it when the schedule changed.
///
/// `relay.run_refreshes` never overlaps with itself, so several relays may call it.
pub async fn run(server: Server, changed: Arc<Notify>, end: CancellationToken) {
    let mut pause = Duration::from_secs(1);
    loop {
        let worked = tokio::select! {
            () = end.cancelled() => return,
            worked = work(&server, &changed) => worked,
        };
        let Err(error) = worked;
        tracing::warn!(error = %error, pause_ms = pause.as_millis() as u64, "the refresh schedule is interrupted");
        tokio::select! {
            () = end.cancelled() => return,
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(AT_LEAST),
        }
    }
}

async fn work(server: &Server, changed: &Notify) -> Result<std::convert::Infallible, Error> {
    let client = server.connect().await?;
    client.batch_execute("set synchronous_commit = on").await?;
    let refresh = client.prepare("select extract(epoch from relay.run_refreshes())::float8").await?;
    loop {
        let next: Option<f64> = client.query_one(&refresh, &[]).await?.get(0);
        let wait = next
            .map_or(AT_LEAST, |seconds| Duration::from_secs_f64(seconds.clamp(0.01, AT_LEAST.as_secs_f64())));
        let _ = timeout(wait, changed.notified()).await;
    }
}
