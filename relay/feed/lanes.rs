//! Three lanes from the feed to clients: for subscriptions that are decided in memory, for filters that PostgreSQL
//! evaluates, and for clients with many filters.
//!
//! Each lane is a router with its own connections. All get the same items; all but the main one may be behind. A
//! channel stays in its lane, so the cost of a client's filters delays only clients in the same lane.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;

use crate::feed::authorize::filter_cost::FilterCosts;
use crate::feed::command::Command;
use crate::feed::deliver::group::TABLE_CHANGED;
use crate::feed::deliver::members::Reader;
use crate::model::catalog::relation::Relation;
use crate::model::session::channel::ChannelId;
use crate::model::subscription::binding::Subscription;
use crate::model::subscription::error::SubscribeError;

/// The routers, and the lane of each channel.
pub struct Lanes {
    // Unbounded, because a session has at most one pending command per channel and must never wait to leave.
    main: UnboundedSender<Command>,
    server_filters: UnboundedSender<Command>,
    heavy: UnboundedSender<Command>,
    filter_costs: FilterCosts,
    lanes: Mutex<HashMap<ChannelId, Lane>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Lane {
    Main,
    /// For filters that PostgreSQL evaluates.
    ServerFilters,
    /// For clients with many filters.
    Heavy,
}

impl Lanes {
    /// Creates the lanes over these routers.
    pub fn new(
        main: UnboundedSender<Command>,
        server_filters: UnboundedSender<Command>,
        heavy: UnboundedSender<Command>,
    ) -> Self {
        Self { main, server_filters, heavy, filter_costs: FilterCosts::default(), lanes: Mutex::default() }
    }

    /// Records the filter cost of a channel.
    ///
    /// # Errors
    /// When its client exceeds a limit.
    pub fn admit(&self, channel: ChannelId, subscription: &Subscription) -> Result<(), SubscribeError> {
        self.filter_costs.record(channel, subscription)
    }

    /// Sends a command to the router of its channel.
    pub fn send(&self, command: Command) {
        // Sending fails only at shutdown, when no caller waits for an answer.
        let _ = match command {
            Command::Join { channel, subscriber, mut greeting } => {
                let (lane, has_moved) = self.assign(channel, &subscriber.subscription);
                if has_moved {
                    let (outbox, farewell) = (Arc::clone(&subscriber.outbox), Vec::new());
                    let _ = self.main.send(Command::Leave { channel, outbox, farewell, reply: None });
                    // Changes between the two routers' positions are not delivered.
                    greeting.push(subscriber.gap(TABLE_CHANGED));
                }
                self.sender(lane).send(Command::Join { channel, subscriber, greeting })
            }
            Command::Follow { channel, subscriber, checked, outcome } => {
                let (lane, _) = self.assign(channel, &subscriber.subscription);
                self.sender(lane).send(Command::Follow { channel, subscriber, checked, outcome })
            }
            Command::Leave { channel, outbox, farewell, reply } => {
                let lane = self.forget(channel);
                self.sender(lane).send(Command::Leave { channel, outbox, farewell, reply })
            }
            Command::DeliveredUpTo { channels, trailing_frame, reply } => {
                let lane = channels.first().map_or(Lane::Main, |channel| self.lane_of(*channel));
                self.sender(lane).send(Command::DeliveredUpTo { channels, trailing_frame, reply })
            }
            Command::Describe { channels, reply } => {
                let lane = channels.first().map_or(Lane::Main, |channel| self.lane_of(*channel));
                self.sender(lane).send(Command::Describe { channels, reply })
            }
            command => self.main.send(command),
        };
    }

    /// Waits until all earlier commands are handled.
    pub async fn settled(&self) {
        let flush = |sender: &UnboundedSender<Command>| {
            let (reply, receiver) = oneshot::channel();
            let _ = sender.send(Command::DeliveredUpTo { channels: Vec::new(), trailing_frame: None, reply });
            receiver
        };
        for receiver in [&self.main, &self.server_filters, &self.heavy].map(flush) {
            let _ = receiver.await;
        }
    }

    /// Returns who follows a relation, in any lane.
    pub async fn readers(&self, relation: &Arc<Relation>) -> Vec<Reader> {
        let mut readers = Vec::new();
        for sender in [&self.main, &self.server_filters, &self.heavy] {
            let (reply, receiver) = oneshot::channel();
            let _ = sender.send(Command::Readers { relation: Arc::clone(relation), reply });
            readers.extend(receiver.await.unwrap_or_default());
        }
        readers
    }

    fn sender(&self, lane: Lane) -> &UnboundedSender<Command> {
        match lane {
            Lane::Main => &self.main,
            Lane::ServerFilters => &self.server_filters,
            Lane::Heavy => &self.heavy,
        }
    }

    /// Assigns a channel to a lane; also returns whether it has moved from the main one.
    fn assign(&self, channel: ChannelId, subscription: &Subscription) -> (Lane, bool) {
        let wanted = match (self.filter_costs.is_heavy(channel, subscription), subscription.asks()) {
            (true, _) => Lane::Heavy,
            (false, true) => Lane::ServerFilters,
            (false, false) => Lane::Main,
        };
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let lane = lanes.entry(channel).or_insert(wanted);
        // After a column changes its type, PostgreSQL may have to evaluate the filter.
        let has_moved = *lane == Lane::Main && subscription.asks();
        if has_moved {
            *lane = wanted;
        }
        (*lane, has_moved)
    }

    fn forget(&self, channel: ChannelId) -> Lane {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        lanes.remove(&channel).unwrap_or(Lane::Main)
    }

    fn lane_of(&self, channel: ChannelId) -> Lane {
        let lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        lanes.get(&channel).copied().unwrap_or(Lane::Main)
    }

    /// Splits channels by lane; one empty list for no channels.
    pub fn by_router(&self, channels: Vec<ChannelId>) -> Vec<Vec<ChannelId>> {
        let mut lists: Vec<Vec<ChannelId>> = vec![Vec::new(); 3];
        for channel in channels {
            lists[self.lane_of(channel) as usize].push(channel);
        }
        lists.retain(|list| !list.is_empty());
        if lists.is_empty() { vec![Vec::new()] } else { lists }
    }
}
