//! What each client's filters cost per change, and how much of that one client may choose.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::model::policy::visibility::Identity;
use crate::model::session::machine::ChannelId;
use crate::model::subscription::binding::{Binding, Subscription};
use crate::model::subscription::error::SubscribeError;

/// Different filters of one client that PostgreSQL has to decide: each is a statement per part of the changelog.
pub const MOST_ASKED: usize = 100;
/// Values that the filters of one client compare with, and columns that they select: each is looked at for each change.
pub const MOST_VALUES: usize = 20_000;
/// A channel with which its client gets over one of these is told aside from those who ask for less. The second is of
/// values that are compared with each change of a table, since no index leads from the row to the filter.
const MANY_ASKED: usize = 10;
const MANY_SCANNED: usize = 200;

/// Who pays for filters: all connections of one subject together, or one connection where the token names none.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Client {
    /// Role and subject.
    Subject(String, String),
    /// The number of a session.
    Session(u64),
}

impl Client {
    /// The client behind a session with this identity.
    pub fn of(identity: &Identity, session: u64) -> Self {
        let claims = identity.claims();
        match claims.sub().filter(|sub| !sub.is_empty()) {
            Some(sub) => Self::Subject(claims.role().to_owned(), sub.to_owned()),
            None => Self::Session(session),
        }
    }
}

/// What all clients asked for.
#[derive(Debug, Default)]
pub struct FilterCosts(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    clients: HashMap<Client, HashMap<ChannelId, Wish>>,
    /// How many clients there were when those that are gone were looked for last.
    swept: usize,
}

/// What a channel asks for.
#[derive(Debug)]
struct Wish {
    bindings: Weak<[Binding]>,
    scanned: usize,
    /// With it, its client asks for much.
    is_much: bool,
}

impl Wish {
    fn is_over(&self) -> bool {
        self.bindings.strong_count() == 0
    }
}

impl FilterCosts {
    /// Notes what a channel asks for from now on.
    ///
    /// # Errors
    /// When its client would ask for more than one may. Then what the channel had before counts on, if it has that still.
    pub fn take(&self, channel: ChannelId, subscription: &Subscription) -> Result<(), SubscribeError> {
        let client = Client::of(subscription.identity(), channel.session);
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.sweep();
        let channels = known.clients.entry(client).or_default();
        channels.retain(|_, wish| !wish.is_over());
        let others = channels.iter().filter(|(other, _)| **other != channel);
        let mut total = Total::default();
        let mut scanned = subscription.scanned_values();
        let own = scanned;
        for (_, wish) in others {
            scanned += wish.scanned;
            total.add(&wish.bindings.upgrade().unwrap_or_default());
        }
        total.add(subscription.bindings());
        if total.asked > MOST_ASKED {
            return Err(SubscribeError(format!(
                "FilterLimitReached: one client may have {MOST_ASKED} different filters that PostgreSQL has to decide: \
                 those with match and imatch, those with ilike, as a rule, those that ask which text is less, and all that compare decimals, dates or times. Filters that \
                 compare whole numbers, uuids, booleans or texts for equality, or a text with like, do not count"
            )));
        }
        if total.values > MOST_VALUES {
            return Err(SubscribeError(format!(
                "FilterLimitReached: the filters of one client may have {MOST_VALUES} values, and columns selected, together"
            )));
        }
        let is_much = total.asked > MANY_ASKED || scanned > MANY_SCANNED;
        let bindings = Arc::downgrade(&subscription.shared_bindings());
        channels.insert(channel, Wish { bindings, scanned: own, is_much });
        Ok(())
    }

    /// Whether the client of a channel asked for much when that was bound last.
    pub fn is_much(&self, channel: ChannelId, subscription: &Subscription) -> bool {
        let client = Client::of(subscription.identity(), channel.session);
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let wish = known.clients.get(&client).and_then(|channels| channels.get(&channel));
        wish.is_some_and(|wish| wish.is_much)
    }
}

impl Known {
    /// Forgets clients that are gone, when there may be as many of them as others.
    fn sweep(&mut self) {
        if self.clients.len() > 2 * self.swept + 100 {
            self.clients.retain(|_, channels| !channels.values().all(Wish::is_over));
            self.swept = self.clients.len();
        }
    }
}

/// What some bindings come to. Equal filters count once: they are decided once.
#[derive(Default)]
struct Total {
    filters: HashSet<usize>,
    asked: usize,
    values: usize,
}

impl Total {
    fn add(&mut self, bindings: &[Binding]) {
        for binding in bindings {
            self.values += binding.select.as_ref().map_or(0, Vec::len);
            if let Some(filter) = &binding.filter
                && self.filters.insert(Arc::as_ptr(filter).addr())
            {
                self.asked += usize::from(filter.asks());
                self.values += filter.value_count();
            }
        }
    }
}
