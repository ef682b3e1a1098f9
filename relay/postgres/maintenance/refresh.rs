//! Refreshes materialized views when they are due, by schedule or by a change, and tells what others refreshed; one relay at a time.
//!
//! Two connections: `Runner` refreshes, which may take long; `Follower` notes meanwhile which tables were written to, where views are
//! refreshed on change, so that writers need not signal again and again.

use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::timeout;
use tokio_postgres::{Client, Statement};
use tokio_util::sync::CancellationToken;

use crate::postgres::connect::backoff::Backoff;
use crate::postgres::connect::pool::{Error, Server};
use crate::postgres::connect::within::within;

/// Maximum interval between looks, also the maximum pause after an error. It bounds the delay of what was not heard.
const MAX_INTERVAL: Duration = Duration::from_secs(60);
/// Shortest pause between looks.
const MIN_INTERVAL: Duration = Duration::from_millis(10);
/// Shortest pause after an error.
const MIN_PAUSE: Duration = Duration::from_secs(1);
/// Maximum time for which a refresh waits for a lock on a table of its view, and the refreshes of other views wait for it.
const LOCK_WAIT: &str = "1s";
/// Client-side timeout of a look at signals: on a connection whose peer is gone, it would never end.
const LOOK_TIMEOUT: Duration = Duration::from_secs(60);

/// What the two tasks tell each other.
#[derive(Default)]
struct Turns {
    /// A refresh may be due.
    due: Notify,
    /// A refresh has ended.
    ran: Notify,
    /// Whether a view is refreshed on change.
    follows: watch::Sender<bool>,
}

/// Refreshes until `end`. `jobs` reports that there may be work.
///
/// A refresh never overlaps with another one of the same view, so several relays may do this.
pub async fn run(server: Server, jobs: watch::Sender<()>, end: CancellationToken) {
    let turns = Turns::default();
    let runner = retry("refreshes interrupted, retrying", || Runner::run(&server, &turns, jobs.subscribe()));
    let follower =
        retry("refresh on change interrupted, retrying", || Follower::run(&server, &turns, jobs.subscribe()));
    tokio::select! {
        () = end.cancelled() => {}
        never = runner => match never {},
        never = follower => match never {},
    }
}

/// Does the work over any number of connections.
async fn retry<F>(what: &str, work: impl Fn() -> F) -> std::convert::Infallible
where
    F: Future<Output = Result<std::convert::Infallible, Error>>,
{
    let mut backoff = Backoff::new(MIN_PAUSE, MAX_INTERVAL);
    loop {
        let started = std::time::Instant::now();
        let Err(error) = work().await;
        if started.elapsed() > MAX_INTERVAL {
            backoff.reset();
        }
        let pause = backoff.pause();
        tracing::warn!(error = %error, pause_ms = pause.as_millis() as u64, "{what}");
        tokio::time::sleep(pause).await;
    }
}

/// Refreshes and tells.
struct Runner {
    client: Client,
    refresh: Statement,
}

impl Runner {
    async fn run(
        server: &Server,
        turns: &Turns,
        mut jobs: watch::Receiver<()>,
    ) -> Result<std::convert::Infallible, Error> {
        let client = server.connect().await?;
        client
            .batch_execute(&format!("set synchronous_commit = on; set lock_timeout = '{LOCK_WAIT}'"))
            .await?;
        // One a transaction, so that the changes of a view do not wait for the next view.
        let refresh = "select extract(epoch from relay.run_refreshes(1))::float8, \
             exists (select from relay.refresh_jobs where at_most_every is not null)";
        let runner = Self { refresh: client.prepare(refresh).await?, client };
        loop {
            let (wait, follows) = runner.refresh().await?;
            turns.follows.send_if_modified(|known| std::mem::replace(known, follows) != follows);
            turns.ran.notify_one();
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = turns.due.notified() => {}
                _ = jobs.changed() => {}
            }
        }
    }

    /// Refreshes one view, if one is due. Returns the time until the next one, and whether a view is refreshed on change.
    async fn refresh(&self) -> Result<(Duration, bool), Error> {
        let row = self.client.query_one(&self.refresh, &[]).await?;
        let next: Option<f64> = row.get(0);
        let wait = next.map_or(MAX_INTERVAL, |seconds| Duration::from_secs_f64(seconds.max(0.0)));
        Ok((wait.clamp(MIN_INTERVAL, MAX_INTERVAL), row.get(1)))
    }
}

/// Notes which views are due because of a change.
struct Follower {
    client: Client,
    note: Statement,
}

impl Follower {
    /// Follows while a view is refreshed on change; without that, no connection is kept.
    async fn run(
        server: &Server,
        turns: &Turns,
        mut jobs: watch::Receiver<()>,
    ) -> Result<std::convert::Infallible, Error> {
        let mut follows = turns.follows.subscribe();
        loop {
            // The sender is in `turns`, so it is not closed.
            let _ = follows.wait_for(|follows| *follows).await;
            let follower = Self::connect(server).await?;
            while let Some((wait, is_due)) = follower.note().await? {
                if is_due {
                    turns.due.notify_one();
                }
                let woken = async {
                    tokio::select! {
                        _ = jobs.changed() => {}
                        () = turns.ran.notified() => {}
                    }
                };
                let _ = timeout(wait, woken).await;
            }
            // No view is followed any more: the next look of the runner says so.
            turns.due.notify_one();
            tokio::time::sleep(MIN_PAUSE).await;
        }
    }

    async fn connect(server: &Server) -> Result<Self, Error> {
        let client = server.connect().await?;
        // Its locks keep writers signalling: where the peer is gone, they end after half a minute.
        client
            .batch_execute(
                "set tcp_keepalives_idle = 15; set tcp_keepalives_interval = 5; set tcp_keepalives_count = 3; \
                 set tcp_user_timeout = '30s'; set synchronous_commit = on; set statement_timeout = '30s'",
            )
            .await?;
        let note = "select extract(epoch from relay.note_signals())::float8, \
             exists (select from relay.refreshes_due() d where d.due <= clock_timestamp())";
        Ok(Self { note: client.prepare(note).await?, client })
    }

    /// Notes signals. Returns the time until the next look, and whether a refresh is due; `None` when no view is refreshed on change.
    async fn note(&self) -> Result<Option<(Duration, bool)>, Error> {
        let row = self.client.query_one(&self.note, &[]);
        let row = within(LOOK_TIMEOUT, "the connection that notes signals", row).await?;
        let next: Option<f64> = row.get(0);
        let wait = |seconds: f64| Duration::from_secs_f64(seconds.max(0.0)).clamp(MIN_INTERVAL, MAX_INTERVAL);
        Ok(next.map(|seconds| (wait(seconds), row.get(1))))
    }
}
