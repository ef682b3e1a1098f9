//! A replay of the rest of a large page to the groups it concerns, beside live delivery. One read of the changelog
//! serves all of them. The hub owns the channels; this task only delivers to them, until they reach the feed's
//! position.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, sleep_until};

use crate::feed::authorize::gate::Gate;
use crate::feed::command::{Command, FollowOutcome};
use crate::feed::deliver::fan_out::deliver_to_one;
use crate::feed::deliver::group::SubscriberGroup;
use crate::feed::deliver::groups::SubscriberGroups;
use crate::feed::deliver::hub::{Newcomers, Replayed};
use crate::feed::read::batch::Batch;
use crate::feed::replay::reader::{ReplayError, ReplayReader, ReplaySink};
use crate::model::catalog::relation::Catalog;
use crate::model::log::cursor::Cursor;
use crate::observe::Observe;

/// Longest wait for clients after each batch: a client that reads half a megabyte a second is never too slow.
const CLIENT_WAIT: Duration = Duration::from_millis(250);
/// Pause before a retry, when PostgreSQL does not answer or the router is not ready.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// What the replays of a router share.
#[derive(Clone)]
pub struct ReplayContext {
    /// Reads the changelog.
    pub reader: Arc<ReplayReader>,
    /// The router's command channel.
    pub router: UnboundedSender<Command>,
    /// Metrics.
    pub observe: Arc<Observe>,
    /// The time without progress that counts as a stall.
    pub bound: Duration,
}

/// A replay to a set of groups.
pub struct ReplayTask {
    number: u64,
    groups: SubscriberGroups,
    newcomers: Arc<Newcomers>,
    /// The position of all groups.
    at: Cursor,
    /// The relations to replay from the page that it began with; `None` for all.
    only: Option<Arc<[i32]>>,
    /// The groups were told that the feed stalls, and not yet that it continues.
    stalled: bool,
    /// When the position moved last.
    last_progress: Instant,
    context: ReplayContext,
}

impl ReplayTask {
    /// Creates a replay from `at`, not stalled. From the page that it begins with, `only` these relations are replayed.
    pub fn new(
        replayed: Replayed,
        at: Cursor,
        catalog: Option<Arc<Catalog>>,
        only: Option<Arc<[i32]>>,
        context: ReplayContext,
    ) -> Self {
        let Replayed { number, groups, newcomers } = replayed;
        let mut members = SubscriberGroups::with_catalog(catalog);
        for group in groups {
            members.insert(group);
        }
        Self {
            number,
            groups: members,
            newcomers,
            at,
            only,
            stalled: false,
            last_progress: Instant::now(),
            context,
        }
    }

    /// Replays what the router says is missing, until nothing is or it cannot be recovered.
    pub async fn run(mut self) {
        let reader = Arc::clone(&self.context.reader);
        loop {
            self.admit_newcomers();
            let outcome = match self.report(Ok(self.at.clone())).await {
                FollowOutcome::Live | FollowOutcome::Gap(_) => return,
                FollowOutcome::Missed(missed, to) => {
                    let replayed = reader.replay_recent(&missed, false, &mut self).await;
                    if replayed.is_ok() {
                        self.reached(to);
                    }
                    replayed
                }
                FollowOutcome::Behind(to) => {
                    let at = self.at.clone();
                    reader.replay_to_many(&at, &to, &mut self).await
                }
                FollowOutcome::Ahead | FollowOutcome::NotYet => {
                    sleep(RETRY_PAUSE).await;
                    Ok(())
                }
            };
            match outcome {
                Ok(()) | Err(ReplayError::Ended) => {}
                Err(ReplayError::Gap(why)) => {
                    self.report(Err(why)).await;
                    return;
                }
                Err(ReplayError::Unavailable(error)) => {
                    tracing::warn!(error = %error, "changes of a large page not replayed, retrying");
                    sleep(RETRY_PAUSE).await;
                }
            }
        }
    }

    /// Reports the position, or why the changes cannot be recovered; returns what is still missing.
    async fn report(&mut self, at: Result<Cursor, &'static str>) -> FollowOutcome {
        let (answer, receiver) = oneshot::channel();
        let (replay, catalog, stalled) = (self.number, self.groups.catalog().cloned(), self.stalled);
        let _ = self.context.router.send(Command::Arrived { replay, at, catalog, stalled, answer });
        // The router is gone at shutdown only.
        self.while_waiting(receiver).await.unwrap_or(FollowOutcome::Live)
    }

    fn send_stall(&mut self, stalls: bool) {
        if std::mem::replace(&mut self.stalled, stalls) != stalls {
            self.groups.iter().for_each(|(_, group)| group.send_stall(stalls));
        }
    }

    /// Adds groups that joined since, and removes those without channels. Returns the added groups.
    fn admit_newcomers(&mut self) -> Vec<SubscriberGroup> {
        let is_abandoned =
            |(number, group): (usize, &SubscriberGroup)| group.members().is_empty().then_some(number);
        for number in self.groups.iter().filter_map(is_abandoned).collect::<Vec<_>>() {
            self.groups.remove(number);
        }
        let newcomers = self.newcomers.take();
        for group in &newcomers {
            self.groups.insert(group.clone());
        }
        newcomers
    }
}

impl ReplaySink for ReplayTask {
    async fn deliver(
        &mut self,
        gate: &Gate,
        catalog: &Arc<Catalog>,
        batch: &Batch,
    ) -> Result<(), ReplayError> {
        self.admit_newcomers();
        self.groups.set_catalog(catalog, Some(&self.at));
        let mut frames = self.groups.deliver(gate, catalog, batch).await?;
        let Some(end) = batch.end().map(Arc::new) else { return Ok(()) };
        loop {
            self.groups.iter().for_each(|(_, group)| group.members().reached(&end));
            // A channel that joined meanwhile may have left another group before that got this batch. When no more
            // join, all later ones are past this batch.
            let newcomers = self.admit_newcomers();
            if newcomers.is_empty() {
                break;
            }
            for group in newcomers.iter().filter(|group| !group.has_reached(&end)) {
                frames += deliver_to_one(gate, catalog, batch, group).await?;
            }
        }
        self.context.observe.frames_delivered(frames);
        Ok(())
    }

    fn is_behind(&self) -> bool {
        self.groups.is_behind()
    }

    async fn wait_for_clients(&mut self) {
        self.groups.wait_for_clients(CLIENT_WAIT).await;
    }

    /// The first page, or a PostgreSQL that does not answer, may take long.
    async fn while_waiting<T: Send>(&mut self, query: impl Future<Output = T> + Send) -> T {
        let mut query = pin!(query);
        loop {
            let stalls_at = self.last_progress + self.context.bound;
            tokio::select! {
                biased;
                answer = &mut query => return answer,
                () = sleep_until(stalls_at), if !self.stalled => self.send_stall(true),
            }
        }
    }

    fn only(&self) -> Option<Arc<[i32]>> {
        self.only.clone()
    }

    fn reached(&mut self, position: Cursor) {
        if position.within().is_none() {
            self.only = None;
        }
        self.at = self.at.merge(&position);
        self.last_progress = Instant::now();
        self.send_stall(false);
    }

    fn has_enough(&self) -> bool {
        self.groups.iter().all(|(_, group)| group.members().is_empty())
    }
}
