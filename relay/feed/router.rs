//! From changes to outboxes: who is subscribed to what, one frame for all who get the same, and never a wait for a client.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use tokio::sync::mpsc::{Receiver, UnboundedReceiver};
use tokio_util::sync::CancellationToken;

use crate::feed::gate::Verdicts;
use crate::feed::outbox::Outbox;
use crate::feed::source::Part;
use crate::model::change::{Change, Operation, RelationId};
use crate::model::delivery::{View, data};
use crate::model::phoenix::{Version, changes_frame, fan_out};
use crate::model::policy::{Identity, Meaning, meaning};
use crate::model::relation::{Catalog, Relation};
use crate::model::session::ChannelId;
use crate::model::subscription::{Binding, Events, Scope, Subscription};
use crate::observe::Observe;
use crate::postgres::catalog::CatalogKeeper;
use crate::postgres::connect::Error;
use crate::postgres::judge::Judge;

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

/// Channels that get the same frames: same topic, version, claims and bindings.
struct Audience {
    version: Version,
    topic: String,
    subscription: Subscription,
    members: BTreeMap<ChannelId, Arc<Outbox>>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct AudienceKey {
    version: Version,
    topic: String,
    identity: Identity,
    ids: Vec<u32>,
}

/// The task that owns all subscriptions.
pub struct Router {
    catalog: Arc<CatalogKeeper>,
    judge: Judge,
    observe: Arc<Observe>,
    audiences: HashMap<AudienceKey, Audience>,
    channels: HashMap<ChannelId, AudienceKey>,
    judged_with: Option<Arc<Catalog>>,
}

impl Router {
    /// Without any subscription.
    pub fn new(catalog: Arc<CatalogKeeper>, judge: Judge, observe: Arc<Observe>) -> Self {
        Self {
            catalog,
            judge,
            observe,
            audiences: HashMap::new(),
            channels: HashMap::new(),
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
                let key = AudienceKey {
                    version,
                    topic: topic.clone(),
                    identity: subscription.identity().clone(),
                    ids: subscription.bindings().iter().map(|binding| binding.id).collect(),
                };
                // The newest subscription serves the whole audience: its filters were read with today's column types.
                match self.audiences.entry(key.clone()) {
                    Entry::Occupied(mut known) => {
                        known.get_mut().subscription = subscription;
                        known.get_mut().members.insert(channel, outbox);
                    }
                    Entry::Vacant(free) => {
                        let members = BTreeMap::from([(channel, outbox)]);
                        free.insert(Audience { version, topic, subscription, members });
                    }
                }
                self.channels.insert(channel, key);
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
        let Some(key) = self.channels.remove(&channel) else {
            return;
        };
        if let Some(audience) = self.audiences.get_mut(&key) {
            audience.members.remove(&channel);
            if audience.members.is_empty() {
                self.audiences.remove(&key);
            }
        }
    }

    async fn deliver_part(&mut self, part: Part) {
        match part {
            Part::Changes { changes, more } => {
                if !self.audiences.is_empty() {
                    self.deliver_when_judged(&changes).await;
                }
                self.observe.delivered_through(&changes);
                if more {
                    self.let_clients_read().await;
                }
            }
            Part::Gap(why) => {
                for audience in self.audiences.values() {
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
        let is_behind = || {
            self.audiences
                .values()
                .flat_map(|audience| audience.members.values())
                .any(|outbox| outbox.is_behind())
        };
        while is_behind() && started.elapsed() < PAUSE {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// A part waits as long as PostgreSQL cannot be asked: to deliver without a verdict would show hidden rows, to go
    /// on without delivering would lose changes.
    async fn deliver_when_judged(&mut self, changes: &[Change]) {
        let mut pause = Duration::from_millis(50);
        loop {
            match self.deliver(changes).await {
                Ok(()) => return,
                Err(error) => {
                    tracing::warn!(error = %error, "changes wait for their judgement");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(2));
                }
            }
        }
    }

    async fn deliver(&mut self, changes: &[Change]) -> Result<(), Error> {
        let catalog = self.catalog_for(changes).await?;
        let subscriptions = self.audiences.values().map(|audience| &audience.subscription);
        let verdicts = Verdicts::gather(&self.judge, &self.observe, &catalog, changes, subscriptions).await?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let live: Vec<&Audience> = self
            .audiences
            .values()
            .filter(|audience| audience.subscription.identity().claims().expires_at() > now)
            .collect();
        let mut frames = 0;
        for (index, change) in changes.iter().enumerate() {
            let Some(relation) = catalog.relation(change.relation) else {
                continue;
            };
            if is_repeated_truncate(changes, index) {
                continue;
            }
            let mut written = Written::default();
            for audience in &live {
                frames += audience.deliver(index, change, relation, &verdicts, &mut written);
            }
        }
        self.observe.frames_delivered(frames);
        Ok(())
    }

    async fn catalog_for(&mut self, changes: &[Change]) -> Result<Arc<Catalog>, Error> {
        let mut catalog = self.catalog.fresh().await?;
        let relations: HashSet<RelationId> = changes.iter().map(|change| change.relation).collect();
        if relations.iter().any(|relation| catalog.relation(*relation).is_none()) {
            catalog = self.catalog.reloaded().await?;
        }
        if !self.judged_with.as_ref().is_some_and(|last| Arc::ptr_eq(last, &catalog)) {
            self.judge.discard_plans().await;
            self.tell_of_relations_gone(&catalog);
            self.judged_with = Some(Arc::clone(&catalog));
        }
        Ok(catalog)
    }
}

impl Router {
    /// Whoever subscribed to a relation that is not watched any more would wait for ever.
    fn tell_of_relations_gone(&self, catalog: &Catalog) {
        let Some(last) = &self.judged_with else { return };
        for relation in last.relations().filter(|relation| catalog.relation(relation.id()).is_none()) {
            for audience in self.audiences.values().filter(|audience| audience.names(relation.id())) {
                audience.tell_gap(&format!("{}.{} is not watched any more", relation.schema, relation.table));
            }
        }
    }
}

/// Texts of one change that were written already, for the next audience that gets the same.
#[derive(Default)]
struct Written<'a> {
    data: HashMap<DataKey<'a>, Option<Arc<str>>>,
    frames: HashMap<(Version, &'a str, Vec<u32>, DataKey<'a>), Bytes>,
}

/// What the text of a change depends on: rights, selected columns, meaning.
type DataKey<'a> = (&'a str, Option<&'a [String]>, Meaning);

impl Audience {
    /// Delivers one change to all members; returns the number of frames.
    fn deliver<'a>(
        &'a self,
        index: usize,
        change: &Change,
        relation: &'a Relation,
        verdicts: &Verdicts,
        written: &mut Written<'a>,
    ) -> usize {
        let identity = self.subscription.identity();
        let role = identity.claims().role();
        let Some(access) = relation.access(role) else {
            return 0;
        };
        if change.operation == Operation::Truncate {
            if self.subscription.concerning(relation).next().is_none() {
                return 0;
            }
            self.tell_gap(&format!(
                "{}.{} was truncated, read its rows again",
                relation.schema, relation.table
            ));
            return self.members.len();
        }
        let policy = verdicts.policy(index, change, relation, identity);
        // One message per channel, naming all ids; bindings that select different columns need different messages.
        let mut messages: BTreeMap<Option<&'a [String]>, (Meaning, Vec<u32>)> = BTreeMap::new();
        for binding in self.subscription.concerning(relation) {
            let sight = match &binding.filter {
                None => policy,
                Some(filter)
                    if filter.fits(relation) && filter.columns().all(|column| access.sees(column)) =>
                {
                    policy.and(verdicts.filter(index, change, relation, filter))
                }
                Some(_) => continue,
            };
            let Some(meaning) = meaning(change.operation, sight, relation.leave_events) else {
                continue;
            };
            if !wants(binding, meaning) {
                continue;
            }
            let message = messages.entry(binding.select.as_deref()).or_insert((meaning, Vec::new()));
            message.0 = message.0.max(meaning);
            message.1.push(binding.id);
        }
        let mut sent = 0;
        for (select, (meaning, ids)) in messages {
            let key: DataKey<'a> = (role_of(&self.subscription), select, meaning);
            let view = View { relation, access, select, meaning };
            let text = written.data.entry(key).or_insert_with(|| data(change, view).map(Arc::from));
            let Some(text) = text else { continue };
            let frame = written.frames.entry((self.version, &self.topic, ids, key)).or_insert_with_key(
                |(version, topic, ids, _)| changes_frame(*version, topic, ids, text).into(),
            );
            for outbox in self.members.values() {
                outbox.push(frame.clone());
            }
            sent += self.members.len();
        }
        sent
    }

    fn names(&self, relation: RelationId) -> bool {
        self.subscription.bindings().iter().any(|binding| binding.scope == Scope::Relation(relation))
    }

    fn tell_gap(&self, why: &str) {
        let payload = serde_json::json!({
            "channel": self.topic.strip_prefix("realtime:").unwrap_or(&self.topic),
            "extension": "postgres_changes",
            "message": format!("Gap: {why}"),
            "status": "error",
        });
        let frame = Bytes::from(fan_out(self.version, &self.topic, "system", &payload.to_string()));
        for outbox in self.members.values() {
            outbox.push(frame.clone());
        }
    }
}

/// A partitioned table is truncated part by part; its subscribers hear of it once.
fn is_repeated_truncate(changes: &[Change], index: usize) -> bool {
    let told =
        |change: &Change| (change.operation == Operation::Truncate).then_some((change.relation, change.xid));
    index > 0 && told(&changes[index]).is_some() && told(&changes[index]) == told(&changes[index - 1])
}

fn role_of(subscription: &Subscription) -> &str {
    subscription.identity().claims().role()
}

fn wants(binding: &Binding, meaning: Meaning) -> bool {
    match binding.events {
        Events::All => true,
        Events::Only(operation) => match meaning {
            Meaning::Insert => operation == Operation::Insert,
            Meaning::Update | Meaning::Enter => operation == Operation::Update,
            Meaning::Delete | Meaning::Leave => operation == Operation::Delete,
        },
    }
}
