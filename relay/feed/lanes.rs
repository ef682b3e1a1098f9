//! Three ways for changes to clients: for whom everything is decided here, for those few of whose filters PostgreSQL
//! decides, and for those who ask for much.
//!
//! Each is a router of its own, with connections of its own, and is told the same parts; all but the first may be behind. A
//! channel stays where it began. So work that a client chose delays nobody but those who chose alike.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;

use crate::feed::authorize::filter_cost::FilterCosts;
use crate::feed::command::Command;
use crate::feed::deliver::group::ALTERED;
use crate::model::session::machine::ChannelId;
use crate::model::subscription::binding::Subscription;
use crate::model::subscription::error::SubscribeError;

/// The routers, and which channel is with which.
pub struct Lanes {
    // Unbounded, because a session has at most one command per channel on the way and must never wait to leave.
    main: UnboundedSender<Command>,
    asked: UnboundedSender<Command>,
    crowd: UnboundedSender<Command>,
    loads: FilterCosts,
    homes: Mutex<HashMap<ChannelId, Lane>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Lane {
    Main,
    /// For filters that PostgreSQL decides.
    Asked,
    /// For clients that ask for much.
    Crowd,
}

impl Lanes {
    /// Over these: the main one, that for filters which PostgreSQL decides, and that for clients that ask for much.
    pub fn new(
        main: UnboundedSender<Command>,
        asked: UnboundedSender<Command>,
        crowd: UnboundedSender<Command>,
    ) -> Self {
        Self { main, asked, crowd, loads: FilterCosts::default(), homes: Mutex::default() }
    }

    /// Notes what a channel will ask for.
    ///
    /// # Errors
    /// When its client would ask for more than one may.
    pub fn admit(&self, channel: ChannelId, subscription: &Subscription) -> Result<(), SubscribeError> {
        self.loads.take(channel, subscription)
    }

    /// Passes a command on to the router that it concerns.
    pub fn send(&self, command: Command) {
        // The routers are gone only when the relay ends, and then nobody waits for an answer.
        let _ = match command {
            Command::Join { channel, registration, mut greeting } => {
                let (lane, has_moved) = self.settle(channel, &registration.subscription);
                if has_moved {
                    let (outbox, farewell) = (Arc::clone(&registration.outbox), Vec::new());
                    let _ = self.main.send(Command::Leave { channel, outbox, farewell, until: None });
                    // What came between the two places is told to nobody.
                    greeting.push(Bytes::from(registration.codec.gap(ALTERED, "")));
                }
                self.of(lane).send(Command::Join { channel, registration, greeting })
            }
            Command::Follow { channel, registration, checked, outcome } => {
                let (lane, _) = self.settle(channel, &registration.subscription);
                self.of(lane).send(Command::Follow { channel, registration, checked, outcome })
            }
            Command::Leave { channel, outbox, farewell, until } => {
                let lane = self.forget(channel);
                self.of(lane).send(Command::Leave { channel, outbox, farewell, until })
            }
            Command::DeliveredUpTo { channels, then, until } => {
                let lane = channels.first().map_or(Lane::Main, |channel| self.home(*channel));
                self.of(lane).send(Command::DeliveredUpTo { channels, then, until })
            }
            command => self.main.send(command),
        };
    }

    /// Waits until all that was sent before is done.
    pub async fn settled(&self) {
        let ask = |way: &UnboundedSender<Command>| {
            let (until, heard) = oneshot::channel();
            let _ = way.send(Command::DeliveredUpTo { channels: Vec::new(), then: None, until });
            heard
        };
        for heard in [&self.main, &self.asked, &self.crowd].map(ask) {
            let _ = heard.await;
        }
    }

    fn of(&self, lane: Lane) -> &UnboundedSender<Command> {
        match lane {
            Lane::Main => &self.main,
            Lane::Asked => &self.asked,
            Lane::Crowd => &self.crowd,
        }
    }

    /// Where a channel is told from now on, and whether it was elsewhere.
    fn settle(&self, channel: ChannelId, subscription: &Subscription) -> (Lane, bool) {
        let wanted = match (self.loads.is_much(channel, subscription), subscription.asks()) {
            (true, _) => Lane::Crowd,
            (false, true) => Lane::Asked,
            (false, false) => Lane::Main,
        };
        let mut homes = self.homes.lock().unwrap_or_else(PoisonError::into_inner);
        let home = homes.entry(channel).or_insert(wanted);
        // A column that has another type now may need to be asked about.
        let has_moved = *home == Lane::Main && subscription.asks();
        if has_moved {
            *home = wanted;
        }
        (*home, has_moved)
    }

    fn forget(&self, channel: ChannelId) -> Lane {
        let mut homes = self.homes.lock().unwrap_or_else(PoisonError::into_inner);
        homes.remove(&channel).unwrap_or(Lane::Main)
    }

    fn home(&self, channel: ChannelId) -> Lane {
        let homes = self.homes.lock().unwrap_or_else(PoisonError::into_inner);
        homes.get(&channel).copied().unwrap_or(Lane::Main)
    }

    /// The channels by who answers for them; without any, one that answers for all.
    pub fn by_router(&self, channels: Vec<ChannelId>) -> Vec<Vec<ChannelId>> {
        let mut lists: Vec<Vec<ChannelId>> = vec![Vec::new(); 3];
        for channel in channels {
            lists[self.home(channel) as usize].push(channel);
        }
        lists.retain(|list| !list.is_empty());
        if lists.is_empty() { vec![Vec::new()] } else { lists }
    }
}
