//! Delivers the webhooks of a database: one relay at a time, which has the lock; another one takes over when it ends.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::feed::deliver::memory_budget::MemoryBudget;
use crate::feed::handle::Feed;
use crate::model::session::channel::ChannelId;
use crate::observe::Observe;
use crate::postgres::connect::backoff::Backoff;
use crate::postgres::connect::pool::{Error, Pool, Server};
use crate::postgres::webhooks::{Hook, WebhookConnection, has_webhooks};
use crate::tls::TlsError;
use crate::webhooks::request::Sender;
use crate::webhooks::worker::{Tools, Worker};

/// Interval between looks at the list, which also find a table that was renamed.
const LOOK: Duration = Duration::from_secs(10);
/// The same where there is no webhook. The notification of the first one may be lost.
const IDLE_LOOK: Duration = Duration::from_secs(60);
/// Interval between attempts to take over. Not a wait for the lock, which would hold a snapshot.
const TAKE_OVER: Duration = Duration::from_secs(1);
/// Bounds of the pause after an error.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));
/// Time limit for the webhooks of a relay that shuts down.
const LAST: Duration = Duration::from_secs(5);
/// The session numbers of webhooks begin here, far above those of clients.
const FIRST_SESSION: u64 = 1 << 40;

/// The webhooks of a relay.
pub struct WebhookService {
    server: Server,
    pool: Pool,
    feed: Feed,
    budget: Arc<MemoryBudget>,
    sender: Arc<Sender>,
    observe: Arc<Observe>,
    /// The number of the next session.
    session: u64,
}

/// A webhook that is being delivered.
struct Running {
    hook: Hook,
    /// How often an operator had handled dead letters when the worker last read what waits.
    handled: i64,
    renewed: Arc<Notify>,
    end: CancellationToken,
}

/// The workers of the webhooks.
#[derive(Default)]
struct Workers {
    running: HashMap<String, Running>,
    tasks: JoinSet<(String, Result<(), Error>)>,
}

/// Why the work over a connection ended without an error.
#[derive(PartialEq, Eq)]
enum WorkEnd {
    /// There is no webhook.
    Idle,
    /// The relay shuts down.
    Ended,
}

impl WebhookService {
    /// Creates it with connections of its own to `server`. `pool` is for looks whether there is a webhook.
    ///
    /// # Errors
    /// When the trusted certificates cannot be read.
    pub fn new(
        server: Server,
        pool: Pool,
        feed: Feed,
        budget: Arc<MemoryBudget>,
        observe: Arc<Observe>,
    ) -> Result<Self, TlsError> {
        let sender = Arc::new(Sender::new()?);
        Ok(Self { server, pool, feed, budget, sender, observe, session: FIRST_SESSION })
    }

    /// Delivers until `end`. `jobs` reports that an operator may have changed something.
    pub async fn run(mut self, jobs: watch::Sender<()>, end: CancellationToken) {
        let mut changed = jobs.subscribe();
        let mut backoff = Backoff::new(PAUSES.0, PAUSES.1);
        loop {
            let wait = match Box::pin(self.work(&mut changed, &mut backoff, &end)).await {
                Ok(WorkEnd::Ended) => return,
                Ok(WorkEnd::Idle) => IDLE_LOOK,
                Err(error) => {
                    let pause = backoff.pause();
                    tracing::warn!(error = %error, pause_ms = pause.as_millis() as u64, "webhooks interrupted, connecting again");
                    pause
                }
            };
            tokio::select! {
                () = end.cancelled() => return,
                _ = timeout(wait, changed.changed()) => {}
            }
        }
    }

    /// Takes the lock and delivers. Without a webhook, no connection is kept.
    ///
    /// # Errors
    /// When the connection ends.
    async fn work(
        &mut self,
        changed: &mut watch::Receiver<()>,
        backoff: &mut Backoff,
        end: &CancellationToken,
    ) -> Result<WorkEnd, Error> {
        if !has_webhooks(&self.pool).await? {
            return Ok(WorkEnd::Idle);
        }
        let connection = Arc::new(WebhookConnection::open(&self.server).await?);
        while !connection.lead().await? {
            tokio::select! {
                () = end.cancelled() => return Ok(WorkEnd::Ended),
                () = sleep(TAKE_OVER) => {}
            }
        }
        tracing::info!("delivering webhooks");
        backoff.reset();
        self.lead(&connection, changed, end).await
    }

    /// Delivers all webhooks.
    ///
    /// # Errors
    /// When the connection ends, and with it the lock. Requests under way are dropped, and repeated by the next relay.
    async fn lead(
        &mut self,
        connection: &Arc<WebhookConnection>,
        changed: &mut watch::Receiver<()>,
        end: &CancellationToken,
    ) -> Result<WorkEnd, Error> {
        let mut workers = Workers::default();
        loop {
            self.renew(&mut workers, connection).await?;
            if workers.running.is_empty() {
                return Ok(WorkEnd::Idle);
            }
            tokio::select! {
                () = end.cancelled() => {
                    workers.stop().await;
                    return Ok(WorkEnd::Ended);
                }
                Some(ended) = workers.tasks.join_next() => match ended {
                    Ok((name, outcome)) => {
                        workers.running.remove(&name);
                        outcome?;
                    }
                    Err(_) => return Err(Error::Lost("the task of a webhook failed")),
                },
                _ = timeout(LOOK, changed.changed()) => {}
            }
        }
    }

    /// Starts, renews and ends the workers by the list in the database. One that was changed begins again once its worker has ended.
    async fn renew(
        &mut self,
        workers: &mut Workers,
        connection: &Arc<WebhookConnection>,
    ) -> Result<(), Error> {
        let wanted = connection.work().await?;
        for (name, running) in &mut workers.running {
            match wanted.iter().find(|(hook, _)| hook.name == *name) {
                Some((hook, position)) if *hook == running.hook => {
                    if std::mem::replace(&mut running.handled, position.handled) != position.handled {
                        running.renewed.notify_one();
                    }
                }
                _ => running.end.cancel(),
            }
        }
        for (hook, position) in wanted {
            if workers.running.contains_key(&hook.name) {
                continue;
            }
            let (renewed, end) = (Arc::new(Notify::new()), CancellationToken::new());
            let handled = position.handled;
            let running =
                Running { hook: hook.clone(), handled, renewed: Arc::clone(&renewed), end: end.clone() };
            let name = hook.name.clone();
            workers.running.insert(name.clone(), running);
            self.session += 1;
            let channel = ChannelId { session: self.session, channel: 0 };
            let worker = Worker::open(self.tools(connection), hook, position.paused).await?;
            workers
                .tasks
                .spawn(async move { (name, Box::pin(worker.run((position, channel), renewed, end)).await) });
        }
        self.observe.webhooks_running(workers.running.len());
        Ok(())
    }

    fn tools(&self, connection: &Arc<WebhookConnection>) -> Tools {
        Tools {
            feed: self.feed.clone(),
            budget: Arc::clone(&self.budget),
            sender: Arc::clone(&self.sender),
            observe: Arc::clone(&self.observe),
            connection: Arc::clone(connection),
        }
    }
}

impl Workers {
    /// Ends all workers. Those that do not end in time are dropped.
    async fn stop(&mut self) {
        self.running.values().for_each(|running| running.end.cancel());
        let all = async { while self.tasks.join_next().await.is_some() {} };
        let _ = timeout(LAST, all).await;
    }
}
