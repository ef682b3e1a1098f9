//! Evaluates clients' filters in PostgreSQL, on a connection separate from policies, within each client's share of
//! the time.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::feed::authorize::filter_cost::Client;
use crate::model::policy::visibility::Denied;
use crate::postgres::connect::pool::Error;
use crate::postgres::evaluate::per_identity::{IdentityAnswer, IdentityEvaluator, IdentityQuery};

/// Queries per round, after which balances are checked again.
const ROUND: usize = 8;
/// Time limit of all queries of a batch, as a multiple of one client's burst.
const BURSTS_PER_BATCH: u32 = 5;
/// A client without queries for this long has no share of the time.
const ACTIVE: Duration = Duration::from_secs(10);

/// The connection, and the balance of each client.
pub struct FilterEvaluator {
    evaluator: IdentityEvaluator,
    /// Maximum balance of a client.
    burst: Duration,
    // Never held across an await.
    accounts: Mutex<HashMap<Client, Account>>,
    /// The permit for the connection: a client is not charged while it waits for another client's queries.
    turn: tokio::sync::Mutex<()>,
}

/// The time balance of a client.
struct Account {
    /// In seconds; negative when it is overdrawn.
    balance: f64,
    since: Instant,
}

/// A query and the clients with the filter, who pay equal parts.
pub struct ChargedQuery<'a> {
    /// The query.
    pub query: IdentityQuery<'a>,
    /// The clients that pay; never empty.
    pub clients: &'a [Client],
}

impl FilterEvaluator {
    /// Creates an evaluator. Each client may use `burst` at once, then an equal share of the time.
    pub fn new(evaluator: IdentityEvaluator, burst: Duration) -> Self {
        Self { evaluator, burst, accounts: Mutex::default(), turn: tokio::sync::Mutex::default() }
    }

    /// Discards all prepared plans.
    pub async fn discard_plans(&self) {
        let _turn = self.turn.lock().await;
        self.evaluator.discard_plans().await;
    }

    /// Evaluates the queries, those of clients that used least first. Queries of a client without balance are denied
    /// as timed out.
    ///
    /// # Errors
    /// Only when the connection fails; nothing was evaluated then.
    pub async fn evaluate(&self, queries: &[ChargedQuery<'_>]) -> Result<Vec<IdentityAnswer>, Error> {
        let mut verdicts: Vec<IdentityAnswer> = queries
            .iter()
            .map(|charged| IdentityAnswer::none(charged.query.images, Denied::TimedOut))
            .collect();
        if queries.is_empty() {
            return Ok(verdicts);
        }
        let started = Instant::now();
        let mut waiting = self.by_balance(queries).into_iter();
        while started.elapsed() < self.burst * BURSTS_PER_BATCH {
            let now: Vec<usize> = waiting
                .by_ref()
                .filter(|number| self.has_balance(queries[*number].clients))
                .take(ROUND)
                .collect();
            if now.is_empty() {
                break;
            }
            let _turn = self.turn.lock().await;
            // Connecting is charged to no client.
            self.evaluator.open().await?;
            let round: Vec<IdentityQuery<'_>> =
                now.iter().map(|number| queries[*number].query.clone()).collect();
            let began = Instant::now();
            let answers = self.evaluator.judge(&round).await?;
            self.charge(began.elapsed(), now.iter().map(|number| queries[*number].clients));
            for (number, answer) in now.into_iter().zip(answers) {
                verdicts[number] = answer;
            }
        }
        Ok(verdicts)
    }

    /// Orders queries by the largest balance of their clients, then by the fewest queries.
    fn by_balance(&self, queries: &[ChargedQuery<'_>]) -> Vec<usize> {
        let mut counts: HashMap<&Client, usize> = HashMap::new();
        for client in queries.iter().flat_map(|charged| charged.clients) {
            *counts.entry(client).or_default() += 1;
        }
        let mut accounts = self.lock();
        let now = Instant::now();
        accounts.retain(|_, account| now.duration_since(account.since) < ACTIVE);
        for client in counts.keys() {
            if !accounts.contains_key(client) {
                accounts.insert((*client).clone(), Account { balance: self.burst.as_secs_f64(), since: now });
            }
        }
        let share = 1.0 / accounts.len().max(1) as f64;
        for client in counts.keys() {
            if let Some(account) = accounts.get_mut(client) {
                let earned = now.duration_since(account.since).as_secs_f64() * share;
                account.balance = (account.balance + earned).min(self.burst.as_secs_f64());
                account.since = now;
            }
        }
        // In hundredths of the burst, so that nearly equal balances are ordered by the number of queries.
        let left = |client: &Client| {
            let balance = accounts.get(client).map_or(0.0, |account| account.balance);
            (100.0 * balance / self.burst.as_secs_f64()) as i64
        };
        let rank = |charged: &ChargedQuery<'_>| {
            let best =
                charged.clients.iter().map(|client| (Reverse(left(client)), counts.get(client).copied()));
            best.min()
        };
        let mut order: Vec<usize> = (0..queries.len()).collect();
        order.sort_by_cached_key(|number| rank(&queries[*number]));
        order
    }

    fn has_balance(&self, clients: &[Client]) -> bool {
        let accounts = self.lock();
        clients.iter().any(|client| accounts.get(client).is_some_and(|account| account.balance > 0.0))
    }

    fn charge<'a>(&self, spent: Duration, round: impl ExactSizeIterator<Item = &'a [Client]>) {
        let each = spent.as_secs_f64() / round.len().max(1) as f64;
        let mut accounts = self.lock();
        for clients in round {
            for client in clients {
                if let Some(account) = accounts.get_mut(client) {
                    account.balance -= each / clients.len() as f64;
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Client, Account>> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
