//! The task that owns all subscriptions of a lane: takes feed items and commands in order, and delivers each batch to
//! the outboxes of the groups it concerns. Never waits for a client.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc::{Receiver, UnboundedReceiver, UnboundedSender};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::feed::authorize::gate::Gate;
use crate::feed::command::{Command, DeliveredUpTo, FollowOutcome};
use crate::feed::deliver::group::{ALTERED, Subscriber};
use crate::feed::deliver::hub::Hub;
use crate::feed::read::backlog::Backlog;
use crate::feed::read::batch::Batch;
use crate::feed::read::recent::RecentBatches;
use crate::feed::read::source::FeedItem;
use crate::feed::read::stall::{StallCause, StallMonitor, Stalls};
use crate::feed::replay::reader::ReplayReader;
use crate::feed::replay::task::ReplayTask;
use crate::model::catalog::relation::Catalog;
use crate::model::catalog::shape;
use crate::model::log::cursor::{Cursor, Span};
use crate::model::row::change::{Change, Operation, RelationId};
use crate::model::session::machine::ChannelId;
use crate::observe::Observe;
use crate::postgres::catalog::CatalogCache;
use crate::postgres::connect::pool::Error;

/// Longest pause between two batches of a page, for clients that have much to read …
const PAUSE: Duration = Duration::from_millis(100);
/// … while these pauses together stay under this, and under a tenth of the time.
const PAUSES: Duration = Duration::from_secs(1);
/// The gap when the router's queue overflowed and there is no position to replay from.
const UNPLACED: &str = "changes came faster than they could be decided, read the rows again";
/// Time limit for the regular check of the catalog.
const LOOK: Duration = Duration::from_millis(500);
/// Changes of one relation above which subscribers of other relations do not wait for them.
const LARGE: i64 = 1000;

/// The task that owns all subscriptions of a lane.
pub struct Router {
    catalog: Arc<CatalogCache>,
    gate: Gate,
    observe: Arc<Observe>,
    hub: Hub,
    /// The feed's position: everything before it was delivered.
    position: Option<Cursor>,
    /// The last batches, for clients that come with a cursor.
    recent: RecentBatches,
    /// The catalog has to be reloaded before anything else is authorized.
    is_news: bool,
    stall_monitor: Arc<StallMonitor>,
    stalls: Stalls,
    /// The live groups were told that the feed stalls, and not yet that it continues.
    stalled: bool,
    /// What was left of [`PAUSES`], and when.
    pauses: (Duration, Instant),
    past: Arc<ReplayReader>,
    /// The router's own command channel, for replays.
    router: UnboundedSender<Command>,
    replays: JoinSet<()>,
    /// Commands that came before the first position.
    early: Vec<Command>,
    /// The queues of the secondary routers; empty in one of those.
    aside: Vec<Arc<Backlog>>,
    /// The last published number of channels and groups.
    counted: (usize, usize),
}

/// Where a router gets its feed items.
pub enum Parts {
    /// The source. It waits until the router takes an item.
    Source(Receiver<FeedItem>),
    /// The queue filled by the main router. It does not wait.
    Backlog(Arc<Backlog>),
}

impl Parts {
    async fn next(&mut self) -> Option<FeedItem> {
        match self {
            Self::Source(parts) => parts.recv().await,
            Self::Backlog(parts) => Some(parts.next().await),
        }
    }

    /// Enables wake-ups before a command, which may add a channel. Returns how far the feed came before.
    fn listen(&self) -> Option<FeedItem> {
        match self {
            Self::Source(_) => None,
            Self::Backlog(parts) => parts.listen(),
        }
    }

    /// Disables wake-ups after the last channel has left: the queue keeps only the position.
    fn rest(&self) {
        if let Self::Backlog(parts) = self {
            parts.rest();
        }
    }
}

impl Router {
    /// Creates a router without subscriptions. `router` is its own command channel, `secondary` the queues that it
    /// copies its items to.
    pub fn new(
        catalog: Arc<CatalogCache>,
        gate: Gate,
        observe: Arc<Observe>,
        past: Arc<ReplayReader>,
        router: UnboundedSender<Command>,
        stall_monitor: Arc<StallMonitor>,
        aside: Vec<Arc<Backlog>>,
    ) -> Self {
        let stalls = stall_monitor.watch();
        Self {
            stall_monitor,
            stalls,
            stalled: false,
            catalog,
            gate,
            observe,
            hub: Hub::default(),
            position: None,
            recent: RecentBatches::default(),
            is_news: false,
            pauses: (PAUSES, Instant::now()),
            past,
            router,
            replays: JoinSet::new(),
            early: Vec::new(),
            aside,
            counted: (0, 0),
        }
    }

    /// Handles commands and feed items until `end`.
    pub async fn run(
        mut self,
        mut commands: UnboundedReceiver<Command>,
        mut parts: Parts,
        end: CancellationToken,
    ) {
        loop {
            tokio::select! {
                // Commands first: a join or leave that came before an item applies to it.
                biased;
                () = end.cancelled() => return,
                command = commands.recv() => match command {
                    Some(command) => {
                        if let Some(FeedItem::Skipped(end)) = parts.listen() {
                            self.skip_to(end);
                        }
                        let was_doubtful = self.hub.live.is_doubtful();
                        self.obey(command);
                        if self.hub.live.is_doubtful() && !was_doubtful {
                            tokio::select! {
                                () = end.cancelled() => return,
                                () = self.resolve_doubt() => {}
                            }
                        }
                        if self.has_no_channel() {
                            parts.rest();
                        }
                    }
                    None => return,
                },
                part = parts.next() => match part {
                    Some(part) => tokio::select! {
                        () = end.cancelled() => return,
                        () = self.deliver_part(part) => self.obey_early(),
                    },
                    None => return,
                },
                Ok(()) = self.stalls.changed() => self.send_stall(),
                Some(_) = self.replays.join_next() => {}
            }
        }
    }

    /// Moves the position without delivering: no live channel of this router gets the changes up to `end` here.
    fn skip_to(&mut self, end: Cursor) {
        self.recent = RecentBatches::default();
        self.recent.moved(&None, &end);
        self.position = Some(end);
        self.hub.moved(self.position.as_ref());
    }

    fn has_no_channel(&self) -> bool {
        self.counted.0 == 0 && self.early.is_empty()
    }

    /// Reloads the catalog after a subscription that was bound with another one. The next change would do so, but may
    /// be long in coming; it still does if this fails.
    async fn resolve_doubt(&mut self) {
        let _ = timeout(LOOK, self.deliver(None)).await;
    }

    /// Handles commands that waited for the first position.
    fn obey_early(&mut self) {
        if self.position.is_some() {
            for command in std::mem::take(&mut self.early) {
                self.obey(command);
            }
        }
    }

    /// Reports a change of the stall state to all live groups.
    fn send_stall(&mut self) {
        let stalls = self.stalls.borrow_and_update().is_some();
        if std::mem::replace(&mut self.stalled, stalls) != stalls {
            self.hub.live.iter().for_each(|(_, group)| group.send_stall(stalls));
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            // A channel misses nothing once it is told that it is subscribed: queue joins until the first position is
            // known.
            Command::Join { .. } | Command::Leave { until: None, .. } if self.position.is_none() => {
                self.early.push(command);
            }
            Command::Join { channel, registration, mut greeting } => {
                let stalled = self.stalled && !self.hub.is_replayed(channel);
                let stalled = stalled.then(|| registration.codec.stall(true)).flatten();
                greeting.extend(stalled.map(Bytes::from));
                self.hub.join(channel, registration, greeting);
            }
            Command::Follow { channel, registration, checked, outcome } => {
                let handover = self.follow(channel, registration, checked);
                // The receiver may be gone; its leave follows then.
                let _ = outcome.send(handover);
            }
            Command::Leave { channel, outbox, farewell, until } => {
                let reached = self.hub.leave(channel, &outbox, farewell, self.position.as_ref());
                if let Some(until) = until {
                    let _ = until.send(reached);
                }
            }
            Command::DeliveredUpTo { channels, then, until } => {
                let here = self.position.clone();
                let place = |channel| Some((channel, self.hub.position(channel, here.as_ref()?)));
                let channels = channels.into_iter().filter_map(place).collect();
                DeliveredUpTo::tell(here, channels, then, until);
            }
            Command::Arrived { replay, at, rules, stalled, answer } => {
                let handover = self.arrived(replay, at, rules.as_deref(), stalled);
                let _ = answer.send(handover);
            }
        }
        let now = self.hub.count();
        self.observe.subscriptions(std::mem::replace(&mut self.counted, now), now);
    }

    /// Takes in somebody who came with a cursor and has missed nothing; else says where what was missed is to be had.
    fn follow(&mut self, channel: ChannelId, mut registration: Subscriber, checked: bool) -> FollowOutcome {
        let Some(since) = &registration.since else { return FollowOutcome::NotYet };
        let handover = self.handover(since, checked);
        if !matches!(handover, FollowOutcome::Live) {
            return handover;
        }
        // Before it has come to where a table got the name that was asked for, it knows none of that name, or another.
        if self.position.as_ref().is_some_and(|position| registration.subscription.is_younger_than(position))
        {
            return FollowOutcome::NotYet;
        }
        if self.hub.live.is_stale(&registration.subscription) {
            return FollowOutcome::Gap(ALTERED);
        }
        // No later change is known to it: it can share its frames with all others.
        if self.position.as_ref().is_some_and(|position| position.is_at_or_after(since)) {
            registration.since = None;
        }
        self.hub.admit(channel, registration);
        FollowOutcome::Live
    }

    fn handover(&self, since: &Cursor, checked: bool) -> FollowOutcome {
        let position = self.position.as_ref();
        position.map_or(FollowOutcome::NotYet, |position| {
            FollowOutcome::of(since, checked, position, &self.recent)
        })
    }

    /// Makes the groups of a replay live when nothing is missing, else returns what is.
    fn arrived(
        &mut self,
        replay: u64,
        at: Result<Cursor, &'static str>,
        rules: Option<&Catalog>,
        stalled: bool,
    ) -> FollowOutcome {
        let handover = at.as_ref().map_or_else(|why| FollowOutcome::Gap(why), |at| self.handover(at, true));
        let at = match handover {
            FollowOutcome::Live => at.ok(),
            FollowOutcome::Gap(why) => {
                self.hub.each_of(replay, |group| group.send_gap(why, ""));
                None
            }
            _ => return handover,
        };
        if stalled != self.stalled {
            self.hub.each_of(replay, |group| group.send_stall(self.stalled));
        }
        match self.hub.end_replay(replay, at.as_ref(), rules, self.position.as_ref()) {
            true => FollowOutcome::Live,
            false => FollowOutcome::NotYet,
        }
    }

    /// Replays the rest of a large page to the groups it concerns; the others go on at once. Groups that only its
    /// small relations concern, which may be one row among a million, get a replay of their own.
    async fn send_off(&mut self, span: &Span, after: i64, counts: &HashMap<RelationId, i64>) {
        // Relation 0 stands for a change of the schema: the new catalog decides whom the rest concerns.
        if counts.contains_key(&RelationId(0)) {
            self.deliver_when_judged(None).await;
        }
        let large = |count: &i64| *count > LARGE;
        let relations = |is_large| {
            counts.iter().filter(move |(_, count)| large(count) == is_large).map(|(relation, _)| *relation)
        };
        let at = span.after(after, false);
        let only = relations(false).chain([RelationId(0)]).map(|relation| relation.0).collect();
        self.begin_replay(&relations(true).collect(), &at, None);
        self.begin_replay(&relations(false).collect(), &at, Some(only));
        self.skip_to(span.end());
    }

    /// Replays everything up to `end` to all groups, after the queue overflowed.
    async fn leave_behind(&mut self, end: Cursor) {
        match self.position.clone() {
            Some(position) => {
                let rules = self.hub.live.rules().cloned().unwrap_or_default();
                let all = rules.relations().map(|relation| relation.id()).collect();
                self.begin_replay(&all, &position, None);
            }
            // After a gap there is no position to replay from: these changes are part of a gap, too.
            None => self.hub.live.iter().for_each(|(_, group)| group.send_gap(UNPLACED, "")),
        }
        self.skip_to(end);
        // The skipped changes may have included schema changes.
        self.deliver_when_judged(None).await;
    }

    fn begin_replay(&mut self, relations: &HashSet<RelationId>, at: &Cursor, only: Option<Arc<[i32]>>) {
        let Some(replayed) = self.hub.begin_replay(relations, at) else { return };
        // They get changes, so the feed does not stall for them.
        if self.stalled {
            replayed.groups.iter().for_each(|group| group.send_stall(false));
        }
        let (past, router, observe) =
            (Arc::clone(&self.past), self.router.clone(), Arc::clone(&self.observe));
        let (rules, bound) = (self.hub.live.rules().cloned(), self.stall_monitor.bound());
        let mut replay = ReplayTask::new(replayed, at.clone(), rules, bound, past, router, observe);
        replay.only = only;
        self.replays.spawn(replay.run());
    }

    async fn deliver_part(&mut self, part: FeedItem) {
        for aside in &self.aside {
            aside.add(part.clone(), self.position.as_ref());
        }
        match part {
            FeedItem::Changes(batch) => {
                let more = batch.more;
                // Schema changes matter for later channels, too.
                if !self.hub.live.is_empty() || batch.is_news() {
                    self.deliver_when_judged(Some(&batch)).await;
                }
                // Secondary routers may be late because of their clients' filters: their delay is not measured.
                if !self.aside.is_empty() {
                    self.observe.delivered_through(&batch.changes);
                }
                if let Some(end) = batch.end() {
                    self.recent.add(self.position.replace(end), Arc::clone(&batch));
                    self.hub.moved(self.position.as_ref());
                }
                if more {
                    self.let_clients_read().await;
                } else if !self.aside.is_empty() {
                    // If this fails or hangs, the next change that needs the catalog reports a stall.
                    let _ = timeout(LOOK, self.catalog.refresh_if_stale()).await;
                }
            }
            FeedItem::Rest { span, after, counts } => self.send_off(&span, after, &counts).await,
            FeedItem::Quiet(cursor) => {
                self.recent.moved(&self.position, &cursor);
                self.position = Some(cursor);
                self.hub.moved(self.position.as_ref());
            }
            FeedItem::Skipped(end) => self.skip_to(end),
            FeedItem::TooMuch(end) => self.leave_behind(end).await,
            FeedItem::Gap(why) => {
                self.hub.live.iter().for_each(|(_, group)| group.send_gap(&why, ""));
                self.recent = RecentBatches::default();
                self.position = None;
                self.hub.moved(None);
                // Watched relations may have changed meanwhile, and no change may ever say so.
                self.deliver_when_judged(None).await;
            }
        }
    }

    /// Gives clients time to read between the batches of a page, so that a transaction of thousands of rows does not
    /// make them look slow. Slow clients delay the others by no more than [`PAUSES`]; then their outboxes fill.
    async fn let_clients_read(&mut self) {
        let (left, then) = self.pauses;
        let left = PAUSES.min(left + then.elapsed() / 10);
        let paused = self.hub.live.let_clients_read(PAUSE.min(left)).await;
        self.pauses = (left.saturating_sub(paused), Instant::now());
    }

    /// Delivers a batch, retrying until PostgreSQL answers: without a verdict, delivery would show hidden rows and
    /// skipping would lose changes. Without a batch, only reloads the catalog.
    async fn deliver_when_judged(&mut self, batch: Option<&Batch>) {
        let mut pause = Duration::from_millis(50);
        self.stall_monitor.waits(StallCause::Judgement);
        loop {
            let mut stalls = self.stall_monitor.watch();
            let delivered = tokio::select! {
                delivered = self.deliver(batch) => delivered,
                // Retry on a new connection: the old one may never answer.
                Ok(()) = stalls.changed() => Err(Error::Lost("the judgement takes too long")),
            };
            match delivered {
                Ok(()) => return self.stall_monitor.goes_on(StallCause::Judgement),
                Err(error) => {
                    self.send_stall();
                    tracing::warn!(error = %error, "changes wait for their judgement");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(2));
                }
            }
        }
    }

    async fn deliver(&mut self, batch: Option<&Batch>) -> Result<(), Error> {
        let Some(batch) = batch else { return self.catalog_for(&[], true, None).await.map(|_| ()) };
        let catalog = self.catalog_for(&batch.changes, batch.more, batch.mark).await?;
        let frames = self.hub.live.tell(&self.gate, &catalog, batch).await?;
        self.observe.frames_delivered(frames);
        Ok(())
    }

    /// Returns the catalog to authorize these changes with. When the page continues (`more`), a schema change may
    /// follow that was committed before them.
    async fn catalog_for(
        &mut self,
        changes: &[Change],
        more: bool,
        mark: Option<i64>,
    ) -> Result<Arc<Catalog>, Error> {
        let mut catalog = self.catalog.fresh(mark).await?;
        let is_news = |change: &Change| match change.operation {
            Operation::Schema | Operation::Gap => true,
            _ => catalog.relation(change.relation).is_none_or(|relation| !shape::knows(relation, change)),
        };
        if more || self.is_news || changes.iter().any(is_news) {
            catalog = self.catalog.reload().await?;
            self.is_news = false;
        }
        let is_pending =
            |change: &Change| catalog.relation(change.relation).is_some_and(|relation| relation.is_pending());
        if changes.iter().any(is_pending) {
            catalog = self.catalog.retry_pending().await?;
        }
        if !self.hub.live.has_catalog(&catalog) {
            // Before the rest, so that a retry does not skip it.
            self.gate.forget().await;
            self.observe.lacks(catalog.missing_grants());
            self.hub.live.set_catalog(&catalog, self.position.as_ref());
        }
        Ok(catalog)
    }
}
