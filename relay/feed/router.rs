//! From changes to outboxes: who is subscribed to what, one frame for all who get the same, and never a wait for a client.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc::{Receiver, UnboundedReceiver, UnboundedSender};
use tokio_util::sync::CancellationToken;

use crate::feed::audience::{ALTERED, Registration};
use crate::feed::audiences::Audiences;
use crate::feed::command::{Command, Handover, Position};
use crate::feed::convoy::{Convoy, Numbered};
use crate::feed::gate::Gate;
use crate::feed::past::Past;
use crate::feed::pulse::{Cause, Pulse, Stalls};
use crate::feed::source::Part;
use crate::feed::stretch::{Recent, Stretch};
use crate::model::change::{Change, Operation, RelationId};
use crate::model::cursor::{Cursor, Span};
use crate::model::relation::Catalog;
use crate::model::session::ChannelId;
use crate::observe::Observe;
use crate::postgres::catalog::CatalogKeeper;
use crate::postgres::connect::Error;

/// The longest pause between two parts of a page, for clients that have much to read …
const PAUSE: Duration = Duration::from_millis(100);
/// … as long as these pauses are not more than this together, and a tenth of all time.
const PAUSES: Duration = Duration::from_secs(1);
/// So many changes of one relation are more than those of others should wait for.
const LARGE: i64 = 1000;

/// The task that owns all subscriptions.
pub struct Router {
    catalog: Arc<CatalogKeeper>,
    gate: Gate,
    observe: Arc<Observe>,
    audiences: Audiences,
    /// Up to where everything was delivered.
    position: Option<Cursor>,
    /// What was delivered last, for those who come with a cursor.
    recent: Recent,
    /// The rules are to be looked at anew before anything else is judged.
    is_news: bool,
    pulse: Arc<Pulse>,
    stalls: Stalls,
    /// Everybody was told that the feed stalls, and not yet that it goes on.
    stalled: bool,
    /// What is left of [`PAUSES`], and when that was.
    pauses: (Duration, Instant),
    past: Arc<Past>,
    /// The way back to us, for convoys.
    router: UnboundedSender<Command>,
    convoys: HashMap<u64, UnboundedSender<Numbered>>,
    last_convoy: u64,
    /// Channels that are with a convoy, with which, and how many commands about them were passed on.
    away: BTreeMap<ChannelId, (u64, u32)>,
    /// Who came and went before the changelog was read.
    early: Vec<Command>,
}

impl Router {
    /// Without any subscription; `router` is where its commands come from.
    pub fn new(
        catalog: Arc<CatalogKeeper>,
        gate: Gate,
        observe: Arc<Observe>,
        past: Arc<Past>,
        router: UnboundedSender<Command>,
        pulse: Arc<Pulse>,
    ) -> Self {
        let stalls = pulse.watch();
        Self {
            pulse,
            stalls,
            stalled: false,
            catalog,
            gate,
            observe,
            audiences: Audiences::default(),
            position: None,
            recent: Recent::default(),
            is_news: false,
            pauses: (PAUSES, Instant::now()),
            past,
            router,
            convoys: HashMap::new(),
            last_convoy: 0,
            away: BTreeMap::new(),
            early: Vec::new(),
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
                        () = self.deliver_part(part) => self.obey_early(),
                    },
                    None => return,
                },
                Ok(()) = self.stalls.changed() => self.tell_stall(),
            }
        }
    }

    /// What waited for a place in the feed comes before all that follows.
    fn obey_early(&mut self) {
        if self.position.is_some() {
            for command in std::mem::take(&mut self.early) {
                self.obey(command);
            }
        }
    }

    /// Tells everybody that the feed stalls or goes on, if that is news.
    fn tell_stall(&mut self) {
        let stalls = self.stalls.borrow_and_update().is_some();
        if std::mem::replace(&mut self.stalled, stalls) != stalls {
            for audience in self.audiences.iter() {
                audience.tell_stall(stalls);
            }
            for convoy in self.convoys.values() {
                let _ = convoy.send((Command::Stall(stalls), 0));
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            // Whoever is told that it is subscribed misses nothing from then on: so not before there is a place to begin at.
            Command::Join { .. } | Command::Leave { until: None, .. } if self.position.is_none() => {
                self.early.push(command);
            }
            Command::Join { channel, .. } | Command::Leave { channel, .. }
                if self.away.contains_key(&channel) =>
            {
                self.pass_on(channel, command);
            }
            Command::Join { channel, registration, mut greeting } => {
                let stalled = self.stalled.then(|| registration.dress.stall(true)).flatten();
                greeting.extend(stalled.map(Bytes::from));
                self.audiences.join(channel, registration, greeting);
            }
            Command::Follow { channel, registration, checked, outcome } => {
                let handover = self.follow(channel, registration, checked);
                // Whoever wished it may be gone; then its leave is on the way.
                let _ = outcome.send(handover);
            }
            Command::Leave { channel, outbox, farewell, until } => {
                if let Some(until) = until {
                    let here = self.position.as_ref();
                    let _ = until.send(here.map(|here| self.audiences.position(channel, here)));
                }
                self.audiences.leave(channel, &outbox, farewell);
            }
            Command::Position { channels, then, until } => {
                let away =
                    channels.first().filter(|_| channels.iter().all(|one| self.away.contains_key(one)));
                match away.and_then(|channel| self.convoys.get(&self.away.get(channel)?.0)) {
                    Some(convoy) => {
                        let _ = convoy.send((Command::Position { channels, then, until }, 0));
                    }
                    None => {
                        let here = self.position.clone();
                        let ours = channels.into_iter().filter(|channel| !self.away.contains_key(channel));
                        let place =
                            |channel| Some((channel, self.audiences.position(channel, here.as_ref()?)));
                        let channels = ours.filter_map(place).collect();
                        Position::tell(here, channels, then, until);
                    }
                }
            }
            // Ours alone, and for convoys: one that is back was told with all others.
            Command::Stall(_) => {}
            Command::Return(convoy) => self.welcome(convoy),
            Command::Left { channel, convoy, command } => {
                if self.away.get(&channel) == Some(&(convoy, command)) {
                    self.away.remove(&channel);
                }
            }
        }
        let (channels, audiences) = self.audiences.count();
        self.observe.subscriptions(channels + self.away.len(), audiences);
    }

    /// Takes in somebody who came with a cursor and has missed nothing; else says where what was missed is to be had.
    fn follow(&mut self, channel: ChannelId, mut registration: Registration, checked: bool) -> Handover {
        let Some(since) = &registration.since else { return Handover::NotYet };
        // It left its convoy, but that has not heard of it.
        if self.away.contains_key(&channel) {
            return Handover::NotYet;
        }
        let handover = self.handover(since, checked);
        if !matches!(handover, Handover::Live) {
            return handover;
        }
        if self.audiences.is_stale(&registration.subscription) {
            return Handover::Gap(ALTERED);
        }
        // Nothing that comes is known to it: it shares its frames with all others.
        if self.position.as_ref().is_some_and(|position| position.is_at_or_after(since)) {
            registration.since = None;
        }
        self.audiences.join(channel, registration, Vec::new());
        Handover::Live
    }

    fn handover(&self, since: &Cursor, checked: bool) -> Handover {
        let position = self.position.as_ref();
        position.map_or(Handover::NotYet, |position| Handover::of(since, checked, position, &self.recent))
    }

    fn pass_on(&mut self, channel: ChannelId, command: Command) {
        let Some((convoy, number)) = self.away.get_mut(&channel) else { return };
        *number += 1;
        // It is there until it returns.
        if let Some(commands) = self.convoys.get(convoy) {
            let _ = commands.send((command, *number));
        }
    }

    /// The rest of a page goes to those whom it concerns by itself; the others have nothing to wait for. Those whom only
    /// its smaller part concerns, which may be one row among a million, do not wait for the others either.
    async fn send_off(&mut self, span: &Span, after: i64, counts: &HashMap<RelationId, i64>) {
        // Something of the schema changed, which is told as relation 0: whom the rest concerns is said by the new rules.
        if counts.contains_key(&RelationId(0)) {
            self.deliver_when_judged(None).await;
        }
        let large = |count: &i64| *count > LARGE;
        let relations = |is_large| {
            counts.iter().filter(move |(_, count)| large(count) == is_large).map(|(relation, _)| *relation)
        };
        let all = self.audiences.split_off(&relations(true).collect());
        let few = self.audiences.split_off(&relations(false).collect());
        let only = relations(false).chain([RelationId(0)]).map(|relation| relation.0).collect();
        self.position = Some(span.end());
        self.audiences.moved(self.position.as_ref());
        self.recent = Recent::default();
        self.recent.moved(&self.position, &span.end());
        for (audiences, only) in [(all, None), (few, Some(only))] {
            if !audiences.is_empty() {
                self.begin_convoy(audiences, span, after, only);
            }
        }
    }

    fn begin_convoy(&mut self, audiences: Audiences, span: &Span, after: i64, only: Option<Arc<[i32]>>) {
        // They are told changes, so for them the feed goes on.
        if self.stalled {
            audiences.iter().for_each(|audience| audience.tell_stall(false));
        }
        self.last_convoy += 1;
        let number = self.last_convoy;
        self.away.extend(audiences.channels().map(|channel| (channel, (number, 0))));
        let (past, router, observe) =
            (Arc::clone(&self.past), self.router.clone(), Arc::clone(&self.observe));
        let since = span.after(after, false);
        let (mut convoy, commands) =
            Convoy::new(number, audiences, since, &self.pulse, past, router, observe);
        convoy.only = only;
        self.convoys.insert(number, commands);
        tokio::spawn(convoy.run(Handover::Behind(span.end())));
    }

    /// Takes a convoy in when it has missed nothing, else sends it on.
    fn welcome(&mut self, mut convoy: Box<Convoy>) {
        let handover = match &convoy.since {
            Some(since) if !convoy.audiences.is_empty() => self.handover(since, true),
            _ => Handover::Live,
        };
        match handover {
            Handover::Live => {}
            Handover::Gap(why) => convoy.tell_gap(why),
            handover => {
                tokio::spawn(convoy.run(handover));
                return;
            }
        }
        let number = convoy.number();
        self.convoys.remove(&number);
        self.away.retain(|_, (convoy, _)| *convoy != number);
        convoy.tell_stall(self.stalled);
        let Convoy { audiences, mut commands, .. } = *convoy;
        self.audiences.absorb(audiences, self.position.as_ref());
        self.audiences.moved(self.position.as_ref());
        while let Ok((command, _)) = commands.try_recv() {
            self.obey(command);
        }
    }

    async fn deliver_part(&mut self, part: Part) {
        match part {
            Part::Changes { changes, more, span, mark } => {
                let stretch = Arc::new(Stretch { changes, more, span, mark });
                // Other rules count for those who come later, too.
                if !self.audiences.is_empty() || stretch.is_news() {
                    self.deliver_when_judged(Some(&stretch)).await;
                }
                self.observe.delivered_through(&stretch.changes);
                if let Some(end) = stretch.end() {
                    self.recent.add(self.position.replace(end), Arc::clone(&stretch));
                    self.audiences.moved(self.position.as_ref());
                }
                if more {
                    self.let_clients_read().await;
                }
            }
            Part::Rest { span, after, counts } => self.send_off(&span, after, &counts).await,
            Part::Quiet(cursor) => {
                self.recent.moved(&self.position, &cursor);
                self.position = Some(cursor);
                self.audiences.moved(self.position.as_ref());
            }
            Part::Gap(why) => {
                for audience in self.audiences.iter() {
                    audience.tell_gap(&why, "");
                }
                self.recent = Recent::default();
                self.position = None;
                self.audiences.moved(None);
                // What was watched may be another by now, and no change may ever say so.
                self.deliver_when_judged(None).await;
            }
        }
    }

    /// Between the parts of a large page, clients that read get the time to do so: a transaction of thousands of rows
    /// must not look like a client that is too slow. Whoever reads too slowly costs the others no more than [`PAUSES`];
    /// then its outbox fills.
    async fn let_clients_read(&mut self) {
        let (left, then) = self.pauses;
        let left = PAUSES.min(left + then.elapsed() / 10);
        let paused = self.audiences.let_clients_read(PAUSE.min(left)).await;
        self.pauses = (left.saturating_sub(paused), Instant::now());
    }

    /// A part waits as long as PostgreSQL cannot be asked: to deliver without a verdict would show hidden rows, to go
    /// on without delivering would lose changes. Without a part, only the rules are looked at anew.
    async fn deliver_when_judged(&mut self, stretch: Option<&Stretch>) {
        let mut pause = Duration::from_millis(50);
        self.pulse.waits(Cause::Judgement);
        loop {
            let mut stalls = self.pulse.watch();
            let delivered = tokio::select! {
                delivered = self.deliver(stretch) => delivered,
                // Asked anew, on a new connection: nothing may come on the old one ever again.
                Ok(()) = stalls.changed() => Err(Error::Lost("the judgement takes too long")),
            };
            match delivered {
                Ok(()) => return self.pulse.goes_on(Cause::Judgement),
                Err(error) => {
                    self.tell_stall();
                    tracing::warn!(error = %error, "changes wait for their judgement");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(2));
                }
            }
        }
    }

    async fn deliver(&mut self, stretch: Option<&Stretch>) -> Result<(), Error> {
        let Some(stretch) = stretch else { return self.catalog_for(&[], true, None).await.map(|_| ()) };
        let catalog = self.catalog_for(&stretch.changes, stretch.more, stretch.mark).await?;
        let frames = self.audiences.tell(&self.gate, &catalog, stretch).await?;
        self.observe.frames_delivered(frames);
        Ok(())
    }

    /// The catalog to judge these changes by. Where the page goes on (`more`), a change of the schema may stand further
    /// down although it was committed before them.
    async fn catalog_for(
        &mut self,
        changes: &[Change],
        more: bool,
        mark: Option<i64>,
    ) -> Result<Arc<Catalog>, Error> {
        let mut catalog = self.catalog.fresh(mark).await?;
        let is_news = |change: &Change| match change.operation {
            Operation::Schema => true,
            _ => catalog.relation(change.relation).is_none(),
        };
        if more || self.is_news || changes.iter().any(is_news) {
            catalog = self.catalog.reloaded().await?;
            self.is_news = false;
        }
        let is_pending =
            |change: &Change| catalog.relation(change.relation).is_some_and(|relation| relation.is_pending());
        if changes.iter().any(is_pending) {
            catalog = self.catalog.retried().await?;
        }
        if !self.audiences.is_judged_with(&catalog) {
            // First, so that it is not left out where this is given up and tried again.
            self.gate.forget().await;
            self.audiences.judge_with(&catalog, self.position.as_ref());
        }
        Ok(catalog)
    }
}
