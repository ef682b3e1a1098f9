//! From changes to outboxes: who is subscribed to what, one frame for all who get the same, and never a wait for a client.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use slab::Slab;
use tokio::sync::mpsc::{Receiver, UnboundedReceiver};
use tokio_util::sync::CancellationToken;

use crate::feed::audience::{Audience, AudienceKey, Desk, Written};
use crate::feed::gate::{Candidate, Gate};
use crate::feed::outbox::Outbox;
use crate::feed::readership::{AudienceId, Readerships};
use crate::feed::source::Part;
use crate::model::change::{Change, Operation};
use crate::model::phoenix::Version;
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
    /// Deliver nothing more to this channel.
    Leave {
        /// Which channel.
        channel: ChannelId,
        /// Its client's outbox.
        outbox: Arc<Outbox>,
        /// Frames that go out after the last change.
        farewell: Vec<Bytes>,
    },
}

/// A channel's place in the router.
pub struct Registration {
    /// How its frames are written.
    pub version: Version,
    /// Its topic, as on the wire.
    pub topic: String,
    /// What it receives.
    pub subscription: Subscription,
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
                let Registration { version, topic, subscription, outbox } = registration;
                for frame in greeting {
                    outbox.push(frame);
                }
                let key = AudienceKey { version, topic, subscription: subscription.clone() };
                let audience = match self.by_key.get(&key) {
                    Some(known) => {
                        self.audiences[*known].add(channel, outbox, subscription);
                        *known
                    }
                    None => {
                        let key = Arc::new(key);
                        let audience = Audience::new(Arc::clone(&key), channel, outbox);
                        let audience = self.audiences.insert(audience);
                        self.by_key.insert(key, audience);
                        audience
                    }
                };
                self.channels.insert(channel, audience);
                let catalog = self.judged_with.as_ref();
                let relation = |id| catalog.and_then(|catalog| catalog.relation(id)).cloned();
                self.readerships.join(audience, self.audiences[audience].subscription(), relation);
            }
            Command::Leave { channel, outbox, farewell } => {
                self.remove(channel);
                for frame in farewell {
                    outbox.push(frame);
                }
            }
        }
        self.observe.subscriptions(self.channels.len(), self.audiences.len());
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
            Part::Changes { changes, more } => {
                if !self.audiences.is_empty() {
                    self.deliver_when_judged(&changes, more).await;
                }
                self.observe.delivered_through(&changes);
                if more {
                    self.let_clients_read().await;
                }
            }
            Part::Gap(why) => {
                for (_, audience) in &self.audiences {
                    audience.tell_gap(&why);
                }
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
    async fn deliver_when_judged(&mut self, changes: &[Change], more: bool) {
        let mut pause = Duration::from_millis(50);
        loop {
            match self.deliver(changes, more).await {
                Ok(()) => return,
                Err(error) => {
                    tracing::warn!(error = %error, "changes wait for their judgement");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(2));
                }
            }
        }
    }

    async fn deliver(&mut self, changes: &[Change], more: bool) -> Result<(), Error> {
        let catalog = self.catalog_for(changes, more).await?;
        for change in changes {
            if let Some(relation) = catalog.relation(change.relation) {
                let audiences = self.audiences.iter().map(|(id, audience)| (id, audience.subscription()));
                self.readerships.prepare(relation, audiences);
            }
        }
        let audiences = &self.audiences;
        let verdicts = self
            .gate
            .verdicts(&catalog, changes, &self.readerships, |audience| audiences[audience].subscription())
            .await?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut written: Vec<Written<'_>> = changes.iter().map(|_| Written::default()).collect();
        let mut desk = Desk::default();
        let mut frames = 0;
        // Audience by audience, not change by change: what a part holds for a client reaches it in one piece.
        for candidates in by_audience(&verdicts.candidates) {
            let Some(audience) = candidates.first().map(|candidate| &audiences[candidate.audience]) else {
                continue;
            };
            if audience.subscription().identity().claims().expires_at() <= now {
                continue;
            }
            for candidate in candidates {
                let index = candidate.change;
                if let Some(relation) = catalog.relation(changes[index].relation)
                    && !is_repeated_truncate(changes, index)
                {
                    let (change, written) = (&changes[index], &mut written[index]);
                    audience.write(&candidate, change, relation, &verdicts, written, &mut desk);
                }
            }
            frames += audience.send(&mut desk);
            desk.clear();
        }
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
            for (_, audience) in &self.audiences {
                audience.leave_what_is_gone(&catalog);
            }
            self.judged_with = Some(Arc::clone(&catalog));
        }
        Ok(catalog)
    }
}

/// The candidates of each audience, in order of the changes.
fn by_audience(candidates: &[Candidate]) -> Vec<Vec<Candidate>> {
    let mut places: HashMap<AudienceId, usize> = HashMap::new();
    let mut groups: Vec<Vec<Candidate>> = Vec::new();
    for candidate in candidates {
        let place = *places.entry(candidate.audience).or_insert_with(|| {
            groups.push(Vec::new());
            groups.len() - 1
        });
        groups[place].push(*candidate);
    }
    groups
}

/// A partitioned table is truncated part by part; its subscribers hear of it once.
fn is_repeated_truncate(changes: &[Change], index: usize) -> bool {
    let told =
        |change: &Change| (change.operation == Operation::Truncate).then_some((change.relation, change.xid));
    index > 0 && told(&changes[index]).is_some() && told(&changes[index]) == told(&changes[index - 1])
}
