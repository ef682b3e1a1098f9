//! The cost per change of each client's filters, and its limits.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::model::policy::visibility::Identity;
use crate::model::session::channel::ChannelId;
use crate::model::subscription::binding::{Binding, Subscription};
use crate::model::subscription::error::SubscribeError;

/// Maximum number of different filters of one client that PostgreSQL evaluates: each is a statement per batch.
pub const MAX_SERVER_FILTERS: usize = 100;
/// Maximum number of values in the filters of one client, and of columns selected: each is visited for each change.
pub const MAX_VALUES: usize = 20_000;
/// A channel with which its client exceeds one of these gets the lane for heavy clients. The second counts values
/// that are compared with each change of a table, since no index leads from the row to the filter.
const HEAVY_SERVER_FILTERS: usize = 10;
const HEAVY_SCANNED_VALUES: usize = 200;

/// The unit of accounting: all connections of one subject, or one connection when the token names none.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Client {
    /// Role and subject.
    Subject(String, String),
    /// Number of a session.
    Session(u64),
}

impl Client {
    /// Returns the client of a session with this identity.
    pub fn of(identity: &Identity, session: u64) -> Self {
        let claims = identity.claims();
        match claims.sub().filter(|sub| !sub.is_empty()) {
            Some(sub) => Self::Subject(claims.role().to_owned(), sub.to_owned()),
            None => Self::Session(session),
        }
    }
}

/// The filter costs of all clients.
#[derive(Debug, Default)]
pub struct FilterCosts(Mutex<ClientCosts>);

#[derive(Debug, Default)]
struct ClientCosts {
    clients: HashMap<Client, HashMap<ChannelId, ChannelCost>>,
    /// Number of clients after the last sweep.
    swept: usize,
}

/// The filter cost of a channel.
#[derive(Debug)]
struct ChannelCost {
    bindings: Weak<[Binding]>,
    scanned: usize,
    /// With it, the client exceeds a threshold of heavy clients.
    is_heavy: bool,
}

impl ChannelCost {
    fn is_dropped(&self) -> bool {
        self.bindings.strong_count() == 0
    }
}

impl FilterCosts {
    /// Records the cost of a channel's new subscription.
    ///
    /// # Errors
    /// When its client exceeds a limit. The channel's last subscription still counts then, if it exists.
    pub fn record(&self, channel: ChannelId, subscription: &Subscription) -> Result<(), SubscribeError> {
        let client = Client::of(subscription.identity(), channel.session);
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.sweep();
        let channels = state.clients.entry(client).or_default();
        channels.retain(|_, cost| !cost.is_dropped());
        let others = channels.iter().filter(|(other, _)| **other != channel);
        let mut total = Total::default();
        let mut scanned = subscription.scanned_values();
        let own = scanned;
        for (_, cost) in others {
            scanned += cost.scanned;
            total.add(&cost.bindings.upgrade().unwrap_or_default());
        }
        total.add(subscription.bindings());
        if total.server_filters > MAX_SERVER_FILTERS {
            return Err(SubscribeError::Other(format!(
                "FilterLimitReached: one client may have {MAX_SERVER_FILTERS} different filters that PostgreSQL evaluates: \
                 match, imatch, most ilike, order comparisons of texts, and all comparisons of decimals, dates or \
                 times. Filters that compare whole numbers, uuids, booleans or texts for equality, or a text with \
                 like, do not count. Use fewer filters, or filters of these kinds"
            )));
        }
        if total.values > MAX_VALUES {
            return Err(SubscribeError::Other(format!(
                "FilterLimitReached: the filters of one client may have {MAX_VALUES} values and selected columns together, \
                 use fewer"
            )));
        }
        let is_heavy = total.server_filters > HEAVY_SERVER_FILTERS || scanned > HEAVY_SCANNED_VALUES;
        let bindings = Arc::downgrade(&subscription.shared_bindings());
        channels.insert(channel, ChannelCost { bindings, scanned: own, is_heavy });
        Ok(())
    }

    /// Returns whether the client was heavy when the channel was bound last.
    pub fn is_heavy(&self, channel: ChannelId, subscription: &Subscription) -> bool {
        let client = Client::of(subscription.identity(), channel.session);
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let cost = state.clients.get(&client).and_then(|channels| channels.get(&channel));
        cost.is_some_and(|cost| cost.is_heavy)
    }
}

impl ClientCosts {
    /// Drops clients that are gone, once they may be as many as the others.
    fn sweep(&mut self) {
        if self.clients.len() > 2 * self.swept + 100 {
            self.clients.retain(|_, channels| !channels.values().all(ChannelCost::is_dropped));
            self.swept = self.clients.len();
        }
    }
}

/// The cost of some bindings. Equal filters count once: they are evaluated once.
#[derive(Default)]
struct Total {
    filters: HashSet<usize>,
    server_filters: usize,
    values: usize,
}

impl Total {
    fn add(&mut self, bindings: &[Binding]) {
        for binding in bindings {
            self.values += binding.select.as_ref().map_or(0, Vec::len);
            if let Some(filter) = &binding.filter
                && self.filters.insert(Arc::as_ptr(filter).addr())
            {
                self.server_filters += usize::from(filter.asks());
                self.values += filter.value_count();
            }
        }
    }
}
