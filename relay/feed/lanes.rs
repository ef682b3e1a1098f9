//! Three lanes from the feed to clients: for subscriptions that are decided in memory, for filters that PostgreSQL
//! evaluates, and for clients with many filters.
//!
//! Each lane is a router with its own connections. All get the same items; all but the main one may be behind. A
//! channel stays in its lane, so the cost of a client's filters delays only clients in the same lane.

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

/// The routers, and the lane of each channel.
pub struct Lanes {
    // Unbounded, because a session has at most one pending command per channel and must never wait to leave.
    main: UnboundedSender<Command>,
    asked: UnboundedSender<Command>,
    crowd: UnboundedSender<Command>,
    loads: FilterCosts,
    homes: Mutex<HashMap<ChannelId, Lane>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Lane {
    Main,
    /// For filters that PostgreSQL evaluates.
    Asked,
    /// For clients with many filters.
    Crowd,
}

impl Lanes {
    /// Creates the lanes over these routers.
    pub fn new(
        main: UnboundedSender<Command>,
        asked: UnboundedSender<Command>,
        crowd: UnboundedSender<Command>,
    ) -> Self {
        Self { main, asked, crowd, loads: FilterCosts::default(), homes: Mutex::default() }
    }

    /// Records the filter cost of a channel.
    ///
    /// # Errors
    /// When its client exceeds a limit.
    pub fn admit(&self, channel: ChannelId, subscription: &Subscription) -> Result<(), SubscribeError> {
        self.loads.take(channel, subscription)
    }

    /// Sends a command to the router of its channel.
    pub fn send(&self, command: Command) {
        // Sending fails only at shutdown, when no caller waits for an answer.
        let _ = match command {
            Command::Join { channel, registration, mut greeting } => {
                let (lane, has_moved) = self.settle(channel, &registration.subscription);
                if has_moved {
                    let (outbox, farewell) = (Arc::clone(&registration.outbox), Vec::new());
                    let _ = self.main.send(Command::Leave { channel, outbox, farewell, until: None });
                    // Changes between the two routers' positions are not delivered.
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

    /// Waits until all earlier commands are handled.
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

    /// Assigns a channel to a lane; also returns whether it has moved from the main one.
    fn settle(&self, channel: ChannelId, subscription: &Subscription) -> (Lane, bool) {
        let wanted = match (self.loads.is_much(channel, subscription), subscription.asks()) {
            (true, _) => Lane::Crowd,
            (false, true) => Lane::Asked,
            (false, false) => Lane::Main,
        };
        let mut homes = self.homes.lock().unwrap_or_else(PoisonError::into_inner);
        let home = homes.entry(channel).or_insert(wanted);
        // After a column changes its type, PostgreSQL may have to evaluate the filter.
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

    /// Splits channels by lane; one empty list for no channels.
    pub fn by_router(&self, channels: Vec<ChannelId>) -> Vec<Vec<ChannelId>> {
        let mut lists: Vec<Vec<ChannelId>> = vec![Vec::new(); 3];
        for channel in channels {
            lists[self.home(channel) as usize].push(channel);
        }
        lists.retain(|list| !list.is_empty());
        if lists.is_empty() { vec![Vec::new()] } else { lists }
    }
}
