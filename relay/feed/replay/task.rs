//! Those who have the rest of a large page before them are told it beside the others, who go on meanwhile: one reading for
//! all of them. Their channels stay with the hub; here is only who tells them, until they are where the feed is.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, sleep_until};

use crate::feed::authorize::gate::Gate;
use crate::feed::command::{Command, FollowOutcome};
use crate::feed::deliver::fan_out::tell_one;
use crate::feed::deliver::group::SubscriberGroup;
use crate::feed::deliver::groups::SubscriberGroups;
use crate::feed::deliver::hub::{Newcomers, Replayed};
use crate::feed::read::batch::Batch;
use crate::feed::replay::reader::{ReplayError, ReplayReader, ReplaySink};
use crate::model::catalog::relation::Catalog;
use crate::model::log::cursor::Cursor;
use crate::observe::Observe;

/// After each part, clients that have much to read get so much time for it: who takes half a megabyte a second is waited
/// for, and is never too slow.
const PAUSE: Duration = Duration::from_millis(250);
/// The pause before the next try, when PostgreSQL cannot be asked or the router is not ready.
const AGAIN: Duration = Duration::from_millis(200);

/// Audiences on their way through the past.
pub struct ReplayTask {
    number: u64,
    groups: SubscriberGroups,
    newcomers: Arc<Newcomers>,
    /// Up to where all of them were told everything.
    at: Cursor,
    /// The relations that concern them, of the page with which they began; none when that is most of it.
    pub only: Option<Arc<[i32]>>,
    /// They were told that nothing comes for now, and not yet that it goes on.
    stalled: bool,
    /// When they came further last, and how long without that is a stall.
    moved: Instant,
    bound: Duration,
    past: Arc<ReplayReader>,
    router: UnboundedSender<Command>,
    observe: Arc<Observe>,
}

impl ReplayTask {
    /// Of these, from `at` on; they have heard of no stall. Without anything new for as long as `bound` they will.
    pub fn new(
        replayed: Replayed,
        at: Cursor,
        rules: Option<Arc<Catalog>>,
        bound: Duration,
        past: Arc<ReplayReader>,
        router: UnboundedSender<Command>,
        observe: Arc<Observe>,
    ) -> Self {
        let Replayed { number, groups, newcomers } = replayed;
        let mut told = SubscriberGroups::with_catalog(rules);
        for group in groups {
            told.insert(group);
        }
        Self {
            number,
            groups: told,
            newcomers,
            at,
            only: None,
            stalled: false,
            moved: Instant::now(),
            bound,
            past,
            router,
            observe,
        }
    }

    /// Tells what the router says is still before them, until that is nothing or cannot be had.
    pub async fn run(mut self) {
        let past = Arc::clone(&self.past);
        loop {
            self.welcome();
            let told = match self.ask(Ok(self.at.clone())).await {
                FollowOutcome::Live | FollowOutcome::Gap(_) => return,
                FollowOutcome::Missed(missed, to) => {
                    let told = past.replay_recent(&missed, false, &mut self).await;
                    if told.is_ok() {
                        self.reached(to);
                    }
                    told
                }
                FollowOutcome::Behind(to) => {
                    let at = self.at.clone();
                    past.replay_to_many(&at, &to, &mut self).await
                }
                FollowOutcome::Ahead | FollowOutcome::NotYet => {
                    sleep(AGAIN).await;
                    Ok(())
                }
            };
            match told {
                Ok(()) | Err(ReplayError::Ended) => {}
                Err(ReplayError::Gap(why)) => {
                    self.ask(Err(why)).await;
                    return;
                }
                Err(ReplayError::Unavailable(error)) => {
                    tracing::warn!(error = %error, "changes of a large transaction wait");
                    sleep(AGAIN).await;
                }
            }
        }
    }

    /// Asks the router what comes next for them, who are here, or lack what cannot be had.
    async fn ask(&mut self, at: Result<Cursor, &'static str>) -> FollowOutcome {
        let (answer, heard) = oneshot::channel();
        let (replay, rules, stalled) = (self.number, self.groups.rules().cloned(), self.stalled);
        let _ = self.router.send(Command::Arrived { replay, at, rules, stalled, answer });
        // Without a router there is nobody left to tell.
        self.meanwhile(heard).await.unwrap_or(FollowOutcome::Live)
    }

    fn send_stall(&mut self, stalls: bool) {
        if std::mem::replace(&mut self.stalled, stalls) != stalls {
            self.groups.iter().for_each(|(_, group)| group.send_stall(stalls));
        }
    }

    /// Takes in those who came since, and lets go of audiences of which nobody is left.
    fn welcome(&mut self) -> Vec<SubscriberGroup> {
        let is_left =
            |(number, group): (usize, &SubscriberGroup)| group.members().is_empty().then_some(number);
        for number in self.groups.iter().filter_map(is_left).collect::<Vec<_>>() {
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
    async fn tell(&mut self, gate: &Gate, catalog: &Arc<Catalog>, batch: &Batch) -> Result<(), ReplayError> {
        self.welcome();
        self.groups.set_catalog(catalog, Some(&self.at));
        let mut frames = self.groups.tell(gate, catalog, batch).await?;
        let Some(here) = batch.end().map(Arc::new) else { return Ok(()) };
        loop {
            self.groups.iter().for_each(|(_, group)| group.members().reached(&here));
            // Those who came while it was told may have left another audience before that was told. When none come any more,
            // all who come later have this part.
            let newcomers = self.welcome();
            if newcomers.is_empty() {
                break;
            }
            for group in newcomers.iter().filter(|group| !group.has_reached(&here)) {
                frames += tell_one(gate, catalog, batch, group).await?;
            }
        }
        self.observe.frames_delivered(frames);
        Ok(())
    }

    fn is_behind(&self) -> bool {
        self.groups.is_behind()
    }

    async fn let_read(&mut self) {
        self.groups.let_clients_read(PAUSE).await;
    }

    /// Before its first page, or while PostgreSQL does not answer, it may wait for long.
    async fn meanwhile<T: Send>(&mut self, asked: impl Future<Output = T> + Send) -> T {
        let mut asked = pin!(asked);
        loop {
            let stalls_at = self.moved + self.bound;
            tokio::select! {
                biased;
                answer = &mut asked => return answer,
                () = sleep_until(stalls_at), if !self.stalled => self.send_stall(true),
            }
        }
    }

    fn only(&self) -> Option<Arc<[i32]>> {
        self.only.clone()
    }

    fn reached(&mut self, here: Cursor) {
        if here.within().is_none() {
            self.only = None;
        }
        self.at = self.at.merge(&here);
        self.moved = Instant::now();
        self.send_stall(false);
    }

    fn has_enough(&self) -> bool {
        self.groups.iter().all(|(_, group)| group.members().is_empty())
    }
}
