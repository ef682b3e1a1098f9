//! The task that owns all subscriptions of a lane: takes feed items and commands in order, and delivers each batch to
//! the outboxes of the groups it concerns. Never waits for a client.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{Receiver, UnboundedReceiver, UnboundedSender};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::feed::authorize::gate::Gate;
use crate::feed::command::{Command, DeliveredUpTo, FollowOutcome};
use crate::feed::deliver::frame::Frame;
use crate::feed::deliver::group::{Subscriber, TABLE_CHANGED};
use crate::feed::deliver::hub::Hub;
use crate::feed::read::backlog::Backlog;
use crate::feed::read::batch::Batch;
use crate::feed::read::recent::RecentBatches;
use crate::feed::read::source::FeedItem;
use crate::feed::read::stall::{StallCause, StallMonitor, Stalls};
use crate::feed::replay::reader::ReplayReader;
use crate::feed::replay::task::{ReplayContext, ReplayTask};
use crate::model::catalog::relation::Catalog;
use crate::model::catalog::shape;
use crate::model::log::cursor::{Cursor, Span};
use crate::model::row::change::{Change, Operation, RelationId};
use crate::model::session::channel::ChannelId;
use crate::observe::Observe;
use crate::postgres::catalog::CatalogCache;
use crate::postgres::connect::pool::Error;

/// Longest pause between two batches of a page, for clients that have much to read …
const PAUSE: Duration = Duration::from_millis(100);
/// … while these pauses together stay under this, and under a tenth of the time.
const PAUSES: Duration = Duration::from_secs(1);
/// The gap when the router's queue overflowed and there is no position to replay from.
const OVERFLOW: &str = "changes came faster than policies could be evaluated, read the rows again";
/// Time limit for the regular check of the catalog.
const CATALOG_TIMEOUT: Duration = Duration::from_millis(500);
/// Changes of one relation above which subscribers of other relations do not wait for them.
const LARGE_COUNT: i64 = 1000;

/// What the routers of all lanes share.
#[derive(Clone)]
pub struct RouterContext {
    /// The rules of the watched relations.
    pub catalog: Arc<CatalogCache>,
    /// Metrics.
    pub observe: Arc<Observe>,
    /// Reads what was missed.
    pub replay_reader: Arc<ReplayReader>,
}

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
    stall_monitor: Arc<StallMonitor>,
    stalls: Stalls,
    /// The live groups were told that the feed stalls, and not yet that it continues.
    stalled: bool,
    /// What was left of [`PAUSES`], and when.
    pause_budget: (Duration, Instant),
    replay_context: ReplayContext,
    replays: JoinSet<()>,
    /// Commands that came before the first position.
    early: Vec<Command>,
    /// The queues of the secondary routers; empty in one of those.
    secondary: Vec<Arc<Backlog>>,
    /// The last published number of channels and groups.
    counted: (usize, usize),
}

/// Where a router gets its feed items.
pub enum FeedItems {
    /// The source. It waits until the router takes an item.
    Source(Receiver<FeedItem>),
    /// The queue filled by the main router. It does not wait.
    Backlog(Arc<Backlog>),
}

impl FeedItems {
    async fn next(&mut self) -> Option<FeedItem> {
        match self {
            Self::Source(items) => items.recv().await,
            Self::Backlog(items) => Some(items.next().await),
        }
    }

    /// Enables wake-ups before a command, which may add a channel. Returns how far the feed came before.
    fn resume(&self) -> Option<FeedItem> {
        match self {
            Self::Source(_) => None,
            Self::Backlog(items) => items.resume(),
        }
    }

    /// Disables wake-ups after the last channel has left: the queue keeps only the position.
    fn pause(&self) {
        if let Self::Backlog(items) = self {
            items.pause();
        }
    }
}

impl Router {
    /// Creates a router without subscriptions. `router` is its own command channel, `secondary` the queues that it
    /// copies its items to.
    pub fn new(
        context: RouterContext,
        gate: Gate,
        router: UnboundedSender<Command>,
        stall_monitor: Arc<StallMonitor>,
        secondary: Vec<Arc<Backlog>>,
    ) -> Self {
        let RouterContext { catalog, observe, replay_reader } = context;
        let (stalls, bound) = (stall_monitor.watch(), stall_monitor.bound());
        Self {
            replay_context: ReplayContext {
                reader: replay_reader,
                router,
                observe: Arc::clone(&observe),
                bound,
            },
            stall_monitor,
            stalls,
            stalled: false,
            catalog,
            gate,
            observe,
            hub: Hub::default(),
            position: None,
            recent: RecentBatches::default(),
            pause_budget: (PAUSES, Instant::now()),
            replays: JoinSet::new(),
            early: Vec::new(),
            secondary,
            counted: (0, 0),
        }
    }

    /// Handles commands and feed items until `end`.
    pub async fn run(
        mut self,
        mut commands: UnboundedReceiver<Command>,
        mut items: FeedItems,
        end: CancellationToken,
    ) {
        loop {
            tokio::select! {
                // Commands first: a join or leave that came before an item applies to it.
                biased;
                () = end.cancelled() => return,
                command = commands.recv() => match command {
                    Some(command) => {
                        if let Some(FeedItem::Skipped(end)) = items.resume() {
                            self.skip_to(end);
                        }
                        let had_other_catalog = self.hub.live.has_other_catalog();
                        self.handle(command);
                        if self.hub.live.has_other_catalog() && !had_other_catalog {
                            tokio::select! {
                                () = end.cancelled() => return,
                                () = self.reload_catalog() => {}
                            }
                        }
                        if self.has_no_channel() {
                            items.pause();
                        }
                    }
                    None => return,
                },
                item = items.next() => match item {
                    Some(item) => tokio::select! {
                        () = end.cancelled() => return,
                        () = self.deliver_item(item) => self.handle_early(),
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
        self.hub.set_position(self.position.as_ref());
    }

    fn has_no_channel(&self) -> bool {
        self.counted.0 == 0 && self.early.is_empty()
    }

    /// Reloads the catalog after a subscription that was bound with another one. The next change would do so, but may
    /// be long in coming; it still does if this fails.
    async fn reload_catalog(&mut self) {
        let _ = timeout(CATALOG_TIMEOUT, self.deliver(None)).await;
    }

    /// Handles commands that waited for the first position.
    fn handle_early(&mut self) {
        if self.position.is_some() {
            for command in std::mem::take(&mut self.early) {
                self.handle(command);
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

    fn handle(&mut self, command: Command) {
        match command {
            // A channel misses nothing once it is told that it is subscribed: queue joins until the first position is
            // known.
            Command::Join { .. } | Command::Leave { reply: None, .. } if self.position.is_none() => {
                self.early.push(command);
            }
            Command::Join { channel, subscriber, mut greeting } => {
                let has_tables = !subscriber.subscription.bindings().is_empty();
                if self.stalled && has_tables && !self.hub.is_replayed(channel) {
                    let stalled = subscriber.codec.encoding().stall(true);
                    let budget = subscriber.outbox.budget();
                    greeting.extend(stalled.map(|notice| Frame::notice(notice, budget)));
                }
                self.hub.join(channel, subscriber, greeting);
            }
            Command::Follow { channel, subscriber, checked, outcome } => {
                let result = self.follow(channel, subscriber, checked);
                // The receiver may be gone; its leave follows then.
                let _ = outcome.send(result);
            }
            Command::Leave { channel, outbox, farewell, reply } => {
                let reached = self.hub.leave(channel, &outbox, farewell, self.position.as_ref());
                if let Some(reply) = reply {
                    let _ = reply.send(reached);
                }
            }
            Command::DeliveredUpTo { channels, trailing_frame, reply } => {
                let feed_position = self.position.clone();
                let position_of =
                    |channel| Some((channel, self.hub.position(channel, feed_position.as_ref()?)));
                let channels = channels.into_iter().filter_map(position_of).collect();
                DeliveredUpTo::answer(feed_position, channels, trailing_frame, reply);
            }
            Command::Readers { relation, reply } => {
                let _ = reply.send(self.hub.readers(&relation));
            }
            Command::Describe { channels, reply } => {
                let describe = |channel| self.hub.describe(channel, self.position.as_ref());
                let _ = reply.send(channels.into_iter().filter_map(describe).collect());
            }
            Command::Arrived { replay, at, catalog, stalled, answer } => {
                let result = self.replay_arrived(replay, at, catalog.as_deref(), stalled);
                let _ = answer.send(result);
            }
        }
        let now = self.hub.count();
        self.observe.subscriptions(std::mem::replace(&mut self.counted, now), now);
    }

    /// Makes a subscriber with a cursor live if it has missed nothing; else returns where to read what it missed.
    fn follow(&mut self, channel: ChannelId, mut subscriber: Subscriber, checked: bool) -> FollowOutcome {
        let Some(since) = &subscriber.since else { return FollowOutcome::NotYet };
        let result = self.outcome_at(since, checked);
        if !matches!(result, FollowOutcome::Live) {
            return result;
        }
        // Before the position at which a table got the requested name, the feed knows no relation of that name, or
        // another one.
        if self.position.as_ref().is_some_and(|position| subscriber.subscription.is_younger_than(position)) {
            return FollowOutcome::NotYet;
        }
        if self.hub.live.is_stale(&subscriber.subscription) {
            return FollowOutcome::Gap(TABLE_CHANGED);
        }
        // No later change is known to it: it can share its frames with all others.
        if self.position.as_ref().is_some_and(|position| position.is_at_or_after(since)) {
            subscriber.since = None;
        }
        self.hub.admit(channel, subscriber);
        FollowOutcome::Live
    }

    fn outcome_at(&self, since: &Cursor, checked: bool) -> FollowOutcome {
        let position = self.position.as_ref();
        position.map_or(FollowOutcome::NotYet, |position| {
            FollowOutcome::of(since, checked, position, &self.recent)
        })
    }

    /// Makes the groups of a replay live when nothing is missing, else returns what is.
    fn replay_arrived(
        &mut self,
        replay: u64,
        at: Result<Cursor, &'static str>,
        catalog: Option<&Catalog>,
        stalled: bool,
    ) -> FollowOutcome {
        let result = at.as_ref().map_or_else(|why| FollowOutcome::Gap(why), |at| self.outcome_at(at, true));
        let at = match result {
            FollowOutcome::Live => at.ok(),
            FollowOutcome::Gap(why) => {
                self.hub.for_each_group(replay, |group| group.send_gap(why, None));
                None
            }
            _ => return result,
        };
        if stalled != self.stalled {
            self.hub.for_each_group(replay, |group| group.send_stall(self.stalled));
        }
        match self.hub.end_replay(replay, at.as_ref(), catalog, self.position.as_ref()) {
            true => FollowOutcome::Live,
            false => FollowOutcome::NotYet,
        }
    }

    /// Replays the rest of a large page to the groups it concerns; the others go on at once. Groups that only its
    /// small relations concern get a replay of their own: these changes may be one row among a million.
    async fn replay_rest(&mut self, span: &Span, after: i64, counts: &HashMap<RelationId, i64>) {
        // Relation 0 stands for a change of the schema: the new catalog decides whom the rest concerns.
        if counts.contains_key(&RelationId::whole(0)) {
            self.deliver_with_retry(None).await;
        }
        let large = |count: &i64| *count > LARGE_COUNT;
        let relations = |is_large| {
            counts.iter().filter(move |(_, count)| large(count) == is_large).map(|(relation, _)| *relation)
        };
        let at = span.after(after, false);
        let only = relations(false).chain([RelationId::whole(0)]).map(|relation| relation.watched).collect();
        self.begin_replay(&relations(true).collect(), &at, None);
        self.begin_replay(&relations(false).collect(), &at, Some(only));
        self.skip_to(span.end());
    }

    /// Replays everything up to `end` to all groups, after the queue overflowed.
    async fn replay_overflow(&mut self, end: Cursor) {
        match self.position.clone() {
            Some(position) => {
                let catalog = self.hub.live.catalog().cloned().unwrap_or_default();
                let watched = catalog.relations().map(|relation| relation.id());
                let all = watched.chain([RelationId::MESSAGES]).collect();
                self.begin_replay(&all, &position, None);
            }
            // After a gap there is no position to replay from: these changes are part of a gap, too.
            None => self.hub.live.iter().for_each(|(_, group)| group.send_gap(OVERFLOW, None)),
        }
        self.skip_to(end);
        // The skipped changes may have included schema changes.
        self.deliver_with_retry(None).await;
    }

    fn begin_replay(&mut self, relations: &HashSet<RelationId>, at: &Cursor, only: Option<Arc<[i32]>>) {
        let Some(replayed) = self.hub.begin_replay(relations, at) else { return };
        // They get changes, so the feed does not stall for them.
        if self.stalled {
            replayed.groups.iter().for_each(|group| group.send_stall(false));
        }
        let (catalog, context) = (self.hub.live.catalog().cloned(), self.replay_context.clone());
        let replay = ReplayTask::new(replayed, at.clone(), catalog, only, context);
        self.replays.spawn(replay.run());
    }

    async fn deliver_item(&mut self, item: FeedItem) {
        for secondary in &self.secondary {
            secondary.add(item.clone(), self.position.as_ref());
        }
        if !self.secondary.is_empty() {
            self.catalog.note_changes(item.relations());
        }
        match item {
            FeedItem::Changes(batch) => {
                let more = batch.more;
                // Schema changes matter for later channels, too.
                if !self.hub.live.is_empty() || batch.has_schema_changes() {
                    self.deliver_with_retry(Some(&batch)).await;
                }
                // Secondary routers may be late because of their clients' filters: their delay is not measured.
                if !self.secondary.is_empty() {
                    self.observe.delivered_through(&batch.changes);
                }
                if let Some(end) = batch.end() {
                    self.recent.add(self.position.replace(end), Arc::clone(&batch));
                    self.hub.set_position(self.position.as_ref());
                }
                if more {
                    self.wait_for_clients().await;
                } else if !self.secondary.is_empty() {
                    // If this fails or hangs, the next change that needs the catalog reports a stall.
                    let _ = timeout(CATALOG_TIMEOUT, self.catalog.refresh_if_stale()).await;
                }
            }
            FeedItem::Rest { span, after, counts } => self.replay_rest(&span, after, &counts).await,
            FeedItem::Moved(cursor) => {
                self.recent.moved(&self.position, &cursor);
                self.position = Some(cursor);
                self.hub.set_position(self.position.as_ref());
            }
            FeedItem::Skipped(end) => self.skip_to(end),
            FeedItem::Overflow(end) => self.replay_overflow(end).await,
            FeedItem::Gap(why) => {
                self.hub.live.iter().for_each(|(_, group)| group.send_gap(&why, None));
                self.recent = RecentBatches::default();
                self.position = None;
                self.hub.set_position(None);
                // Watched relations may have changed meanwhile, and no change may ever say so.
                self.deliver_with_retry(None).await;
            }
        }
    }

    /// Gives clients time to read between the batches of a page, so that a transaction of thousands of rows does not
    /// make them look slow. Slow clients delay the others by no more than [`PAUSES`]; then their outboxes fill.
    async fn wait_for_clients(&mut self) {
        let (left, since) = self.pause_budget;
        let left = PAUSES.min(left + since.elapsed() / 10);
        let paused = self.hub.live.wait_for_clients(PAUSE.min(left)).await;
        self.pause_budget = (left.saturating_sub(paused), Instant::now());
    }

    /// Delivers a batch, retrying until PostgreSQL answers: without a verdict, delivery would show hidden rows and
    /// skipping would lose changes. Without a batch, only reloads the catalog.
    async fn deliver_with_retry(&mut self, batch: Option<&Batch>) {
        let mut pause = Duration::from_millis(50);
        self.stall_monitor.begin_wait(StallCause::Evaluation);
        loop {
            let mut stalls = self.stall_monitor.watch();
            let delivered = tokio::select! {
                delivered = self.deliver(batch) => delivered,
                // Retry on a new connection: the old one may never answer.
                Ok(()) = stalls.changed() => Err(Error::Lost("the evaluation of policies takes too long")),
            };
            match delivered {
                Ok(()) => return self.stall_monitor.end_wait(StallCause::Evaluation),
                Err(error) => {
                    self.send_stall();
                    tracing::warn!(error = %error, "changes not authorized, retrying");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(2));
                }
            }
        }
    }

    async fn deliver(&mut self, batch: Option<&Batch>) -> Result<(), Error> {
        let Some(batch) = batch else { return self.catalog_for(&[], true, None).await.map(|_| ()) };
        let catalog = self.catalog_for(&batch.changes, batch.more, batch.mark).await?;
        let frames = self.hub.live.deliver(&self.gate, &catalog, batch).await?;
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
        let needs_reload = |change: &Change| match change.operation {
            Operation::Schema | Operation::Gap => true,
            Operation::Broadcast => false,
            _ => catalog.relation(change.relation).is_none_or(|relation| !shape::knows(relation, change)),
        };
        if more || changes.iter().any(needs_reload) {
            catalog = self.catalog.reload().await?;
        }
        let is_pending =
            |change: &Change| catalog.affected(change).iter().any(|relation| relation.is_pending());
        if changes.iter().any(is_pending) {
            catalog = self.catalog.retry_pending().await?;
        }
        if !self.hub.live.has_catalog(&catalog) {
            // Before the rest, so that a retry does not skip it.
            self.gate.forget().await;
            self.observe.lacks(catalog.missing_grants());
            self.observe.hides(self.hub.hidden(&catalog));
            self.hub.live.set_catalog(&catalog, self.position.as_ref());
        }
        Ok(catalog)
    }
}
