//! From changes to outboxes: who is subscribed to what, one frame for all who get the same, and never a wait for a client.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use slab::Slab;
use tokio::sync::mpsc::{Receiver, UnboundedReceiver};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::feed::audience::{ALTERED, Audience, AudienceKey};
use crate::feed::gate::Gate;
use crate::feed::outbox::Outbox;
use crate::feed::readership::{AudienceId, Readerships};
use crate::feed::source::Part;
use crate::feed::stretch::{Recent, Stretch, tell};
use crate::model::change::{Change, Operation};
use crate::model::cursor::Cursor;
use crate::model::dress::Dress;
use crate::model::relation::Catalog;
use crate::model::session::ChannelId;
use crate::model::subscription::Subscription;
use crate::observe::Observe;
use crate::postgres::catalog::CatalogKeeper;
use crate::postgres::connect::Error;

/// The longest pause between two parts of a page.
const PAUSE: Duration = Duration::from_millis(500);

/// What a session asks of the router.
pub enum Command {
    /// Deliver to this channel from now on, in place of what it had.
    Join {
        /// Which channel.
        channel: ChannelId,
        /// What, and where to.
        registration: Registration,
        /// Frames that go out before any change.
        greeting: Vec<Bytes>,
    },
    /// Deliver to this channel what comes after the registration's cursor, as soon as that is near enough.
    Follow {
        /// Which channel.
        channel: ChannelId,
        /// What, where to, and since when.
        registration: Registration,
        /// The cursor is known not to be of the future.
        checked: bool,
        /// Hears what came of it.
        outcome: oneshot::Sender<Handover>,
    },
    /// Deliver nothing more to this channel.
    Leave {
        /// Which channel.
        channel: ChannelId,
        /// Its client's outbox.
        outbox: Arc<Outbox>,
        /// Frames that go out after the last change.
        farewell: Vec<Bytes>,
        /// Hears up to where everything was delivered.
        until: Option<oneshot::Sender<Option<Cursor>>>,
    },
}

/// What came of a wish to follow.
pub enum Handover {
    /// Delivered from here on.
    Live,
    /// The cursor is of a moment that was not delivered yet, if it has been at all.
    Ahead,
    /// What was missed up to this cursor is still at hand: tell it, then ask again.
    Missed(Vec<Arc<Stretch>>, Cursor),
    /// Too far back: what lies before this cursor has to be read from the changelog.
    Behind(Cursor),
    /// Nobody can say what was missed; why.
    Gap(&'static str),
    /// The changelog is not being read yet.
    NotYet,
}

/// A channel's place in the router.
pub struct Registration {
    /// How its frames are written.
    pub dress: Dress,
    /// What it receives.
    pub subscription: Subscription,
    /// What it has already, when it came with a cursor.
    pub since: Option<Cursor>,
    /// Where frames go.
    pub outbox: Arc<Outbox>,
}

/// The task that owns all subscriptions.
pub struct Router {
    catalog: Arc<CatalogKeeper>,
    gate: Gate,
    observe: Arc<Observe>,
    audiences: Slab<Audience>,
    by_key: HashMap<Arc<AudienceKey>, AudienceId>,
    channels: HashMap<ChannelId, AudienceId>,
    readerships: Readerships,
    judged_with: Option<Arc<Catalog>>,
    /// Up to where everything was delivered.
    position: Option<Cursor>,
    /// What was delivered last, for those who come with a cursor.
    recent: Recent,
}

impl Router {
    /// Without any subscription.
    pub fn new(catalog: Arc<CatalogKeeper>, gate: Gate, observe: Arc<Observe>) -> Self {
        Self {
            catalog,
            gate,
            observe,
            audiences: Slab::new(),
            by_key: HashMap::new(),
            channels: HashMap::new(),
            readerships: Readerships::default(),
            judged_with: None,
            position: None,
            recent: Recent::default(),
        }
    }

    /// Serves commands and parts until the end.
    pub async fn run(
        mut self,
        mut commands: UnboundedReceiver<Command>,
        mut parts: Receiver<Part>,
        end: CancellationToken,
    ) {
        loop {
            tokio::select! {
                // Commands first: a leave or a join that came before a part counts for it.
                biased;
                () = end.cancelled() => return,
                command = commands.recv() => match command {
                    Some(command) => self.obey(command),
                    None => return,
                },
                part = parts.recv() => match part {
                    Some(part) => tokio::select! {
                        () = end.cancelled() => return,
                        () = self.deliver_part(part) => {}
                    },
                    None => return,
                },
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Join { channel, registration, greeting } => {
                self.remove(channel);
                for frame in greeting {
                    registration.outbox.push(frame);
                }
                self.take_in(channel, registration);
            }
            Command::Follow { channel, registration, checked, outcome } => {
                let handover = self.follow(channel, registration, checked);
                // Whoever wished it may be gone; then its leave is on the way.
                let _ = outcome.send(handover);
            }
            Command::Leave { channel, outbox, farewell, until } => {
                self.remove(channel);
                for frame in farewell {
                    outbox.push(frame);
                }
                if let Some(until) = until {
                    let _ = until.send(self.position.clone());
                }
            }
        }
        self.observe.subscriptions(self.channels.len(), self.audiences.len());
    }

    fn take_in(&mut self, channel: ChannelId, registration: Registration) {
        let Registration { dress, subscription, since, outbox } = registration;
        let key = AudienceKey { dress, subscription: subscription.clone(), since };
        let audience = match self.by_key.get(&key) {
            Some(known) => {
                self.audiences[*known].add(channel, outbox, subscription);
                *known
            }
            None => {
                let key = Arc::new(key);
                let audience = self.audiences.insert(Audience::new(Arc::clone(&key), channel, outbox));
                self.by_key.insert(key, audience);
                audience
            }
        };
        self.channels.insert(channel, audience);
        let catalog = self.judged_with.as_ref();
        let relation = |id| catalog.and_then(|catalog| catalog.relation(id)).cloned();
        self.readerships.join(audience, self.audiences[audience].subscription(), relation);
    }

    /// Takes in somebody who came with a cursor and has missed nothing; else says where what was missed is to be had.
    fn follow(&mut self, channel: ChannelId, mut registration: Registration, checked: bool) -> Handover {
        let (Some(since), Some(position)) = (&registration.since, &self.position) else {
            return Handover::NotYet;
        };
        if since.epoch() != position.epoch() {
            return Handover::Gap("the cursor is of another database, or of an older state of it");
        }
        if !checked && !position.is_at_or_after(since) && since.is_at_or_after(position) {
            return Handover::Ahead;
        }
        let Some(missed) = self.recent.since(since, position) else {
            // A page that is being delivered right now cannot be read from the changelog up to here; it ends soon.
            let is_there = position.seen().is_before_or_equal(since.seen()) && since.within().is_none();
            return match is_there {
                true => Handover::NotYet,
                false => Handover::Behind(Cursor::after(position.epoch(), position.seen().clone())),
            };
        };
        if !missed.is_empty() {
            return Handover::Missed(missed, position.clone());
        }
        if self.judged_with.as_ref().is_some_and(|catalog| registration.subscription.is_stale(catalog)) {
            return Handover::Gap(ALTERED);
        }
        // Nothing that comes is known to it: it shares its frames with all others.
        if position.is_at_or_after(since) {
            registration.since = None;
        }
        self.remove(channel);
        self.take_in(channel, registration);
        Handover::Live
    }

    fn remove(&mut self, channel: ChannelId) {
        let Some(number) = self.channels.remove(&channel) else { return };
        let audience = &mut self.audiences[number];
        audience.remove(channel);
        if audience.is_empty() {
            self.readerships.leave(number);
            self.by_key.remove(audience.key());
            self.audiences.remove(number);
        }
    }

    async fn deliver_part(&mut self, part: Part) {
        match part {
            Part::Changes { changes, more, span } => {
                let stretch = Arc::new(Stretch { changes, more, span });
                // Other rules count for those who come later, too.
                if !self.audiences.is_empty() || stretch.is_news() {
                    self.deliver_when_judged(&stretch).await;
                }
                self.observe.delivered_through(&stretch.changes);
                if let Some(end) = stretch.end() {
                    self.recent.add(self.position.replace(end), Arc::clone(&stretch));
                }
                if more {
                    self.let_clients_read().await;
                }
            }
            Part::Quiet(cursor) => {
                self.recent.moved(&self.position, &cursor);
                self.position = Some(cursor);
            }
            Part::Gap(why) => {
                for (_, audience) in &self.audiences {
                    audience.tell_gap(&why, "");
                }
                self.recent = Recent::default();
                self.position = None;
            }
        }
    }

    /// Between the parts of a large page, clients that read get the time to do so: a transaction of thousands of rows
    /// must not look like a client that is too slow. Whoever does not read costs the others this pause once or twice,
    /// then its outbox is full.
    async fn let_clients_read(&self) {
        let started = Instant::now();
        let is_behind = || self.audiences.iter().any(|(_, audience)| audience.is_behind());
        while is_behind() && started.elapsed() < PAUSE {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// A part waits as long as PostgreSQL cannot be asked: to deliver without a verdict would show hidden rows, to go
    /// on without delivering would lose changes.
    async fn deliver_when_judged(&mut self, stretch: &Stretch) {
        let mut pause = Duration::from_millis(50);
        loop {
            match self.deliver(stretch).await {
                Ok(()) => return,
                Err(error) => {
                    tracing::warn!(error = %error, "changes wait for their judgement");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(2));
                }
            }
        }
    }

    async fn deliver(&mut self, stretch: &Stretch) -> Result<(), Error> {
        let catalog = self.catalog_for(&stretch.changes, stretch.more).await?;
        for change in &stretch.changes {
            if let Some(relation) = catalog.relation(change.relation) {
                let audiences = self.audiences.iter().map(|(id, audience)| (id, audience.subscription()));
                self.readerships.prepare(relation, audiences);
            }
        }
        let frames = tell(&self.gate, &catalog, stretch, &self.readerships, |id| &self.audiences[id]).await?;
        self.observe.frames_delivered(frames);
        Ok(())
    }

    /// The catalog to judge these changes by. Where the page goes on (`more`), a change of the schema may stand further
    /// down although it was committed before them.
    async fn catalog_for(&mut self, changes: &[Change], more: bool) -> Result<Arc<Catalog>, Error> {
        let mut catalog = self.catalog.fresh().await?;
        let is_news = |change: &Change| match change.operation {
            Operation::Schema => true,
            _ => catalog.relation(change.relation).is_none(),
        };
        if more || changes.iter().any(is_news) {
            catalog = self.catalog.reloaded().await?;
        }
        if !self.judged_with.as_ref().is_some_and(|last| Arc::ptr_eq(last, &catalog)) {
            self.gate.forget().await;
            self.readerships.forget();
            let here = self.position.as_ref().map(ToString::to_string).unwrap_or_default();
            for (_, audience) in &self.audiences {
                audience.leave_what_is_gone(self.judged_with.as_deref(), &catalog, &here);
            }
            self.judged_with = Some(Arc::clone(&catalog));
        }
        Ok(catalog)
    }
}
