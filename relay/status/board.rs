//! The users that are connected to this relay, and those whose status is to be written. Kept in memory; no connection waits for it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::model::identity::claims::Claims;
use crate::model::presence::status::{Participant, StatusSettings, StatusUpdate};
use crate::observe::Observe;

/// The board of a relay.
pub struct Board {
    settings: StatusSettings,
    observe: Arc<Observe>,
    started: Instant,
    /// Whether there is a status table. Without one, only connections are counted.
    is_on: AtomicBool,
    state: Mutex<BoardState>,
    /// Wakes the writer.
    due: Notify,
    requests: AtomicU64,
    throttled: AtomicU64,
    failed: AtomicU64,
}

#[derive(Default)]
struct BoardState {
    users: HashMap<Arc<str>, BoardUser>,
    /// Users to be written, the first to wait first. May name users that are not on the board any more.
    waiting: VecDeque<Arc<str>>,
    /// Users whose rows were held; they wait until the next tick.
    held: Vec<Arc<str>>,
    /// Whether the end of a user's last connection was forgotten: the relay then begins anew.
    has_forgotten: bool,
    /// Number of users without a connection.
    idle: usize,
}

struct BoardUser {
    is_anonymous: bool,
    connections: usize,
    /// False since the last connection ended, until the user is active again.
    is_online: bool,
    is_waiting: bool,
    clock: Arc<UserClock>,
}

/// Times in milliseconds since the start of the relay.
struct UserClock {
    /// The last activity.
    last: AtomicU64,
    /// When an activity is to be written again.
    due: AtomicU64,
}

/// What was counted since the last reset.
pub struct StatusCounts {
    /// Signs of life.
    pub requests: u64,
    /// Those that were not written, because the user's last one was written a short time before.
    pub throttled: u64,
    /// Users and sweeps that could not be written.
    pub failed: u64,
    /// Users on the board.
    pub users: usize,
}

impl Board {
    /// Creates an empty board.
    pub fn new(settings: StatusSettings, observe: Arc<Observe>) -> Self {
        Self {
            settings,
            observe,
            started: Instant::now(),
            is_on: AtomicBool::new(false),
            state: Mutex::default(),
            due: Notify::new(),
            requests: AtomicU64::new(0),
            throttled: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }

    /// Its settings.
    pub fn settings(&self) -> &StatusSettings {
        &self.settings
    }

    /// Opens a connection of the participant with these claims, if they name one. The participant is online until it is dropped.
    pub fn connect(self: &Arc<Self>, claims: &Claims) -> Option<Connected> {
        let participant = Participant::of(claims, &self.settings.anonymous_claim)?;
        let now = self.now();
        self.count_request();
        let mut state = self.state();
        let user = state.user(&participant, now);
        user.connections += 1;
        user.is_online = true;
        user.clock.last.store(now, Ordering::Relaxed);
        user.clock.due.store(now + self.throttle(), Ordering::Relaxed);
        let clock = Arc::clone(&user.clock);
        if user.connections == 1 {
            state.idle -= 1;
        }
        self.queue(&mut state, &participant.id);
        Some(Connected { board: Arc::clone(self), participant, clock })
    }

    /// Notes a request without a connection of its own.
    pub fn request(&self, claims: &Claims) {
        if !self.is_on.load(Ordering::Relaxed) {
            return;
        }
        let Some(participant) = Participant::of(claims, &self.settings.anonymous_claim) else { return };
        let now = self.now();
        let clock = Arc::clone(&self.state().user(&participant, now).clock);
        self.note(&participant, &clock);
    }

    /// Notes an activity: it is written if the last written one is old enough, or the user was offline.
    fn note(&self, participant: &Participant, clock: &UserClock) {
        let now = self.now();
        clock.last.store(now, Ordering::Relaxed);
        if !self.is_on.load(Ordering::Relaxed) {
            return;
        }
        self.count_request();
        if now < clock.due.load(Ordering::Relaxed) {
            self.throttled.fetch_add(1, Ordering::Relaxed);
            self.observe.status_throttled();
            return;
        }
        let mut state = self.state();
        // It may have been forgotten since.
        let user = state.user(participant, now);
        user.is_online = true;
        user.clock.due.store(now + self.throttle(), Ordering::Relaxed);
        self.queue(&mut state, &participant.id);
        self.bound(&mut state);
    }

    /// Ends a connection.
    fn disconnect(&self, participant: &Participant) {
        let mut state = self.state();
        let Some(user) = state.users.get_mut(&participant.id) else { return };
        user.connections -= 1;
        if user.connections > 0 {
            return;
        }
        user.is_online = false;
        // The next activity is written at once.
        user.clock.due.store(0, Ordering::Relaxed);
        state.idle += 1;
        if self.is_on.load(Ordering::Relaxed) {
            self.queue(&mut state, &participant.id);
            self.bound(&mut state);
        } else {
            state.forget(&participant.id);
        }
    }

    /// Puts all connected users down to be written: the status table knows nothing of this relay.
    pub fn begin(&self) {
        self.is_on.store(true, Ordering::Relaxed);
        let mut state = self.state();
        state.clear();
        let users: Vec<Arc<str>> = state.users.keys().cloned().collect();
        users.iter().for_each(|id| self.queue(&mut state, id));
    }

    /// Forgets what is to be written: there is no status table.
    pub fn stop(&self) {
        self.is_on.store(false, Ordering::Relaxed);
        self.state().clear();
    }

    /// Whether the status is written.
    pub fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Relaxed)
    }

    /// Completes when a user is to be written.
    pub async fn due(&self) {
        while self.state().waiting.is_empty() {
            self.due.notified().await;
        }
    }

    /// Takes at most `most` users to be written.
    pub fn take(&self, most: usize) -> Vec<StatusUpdate> {
        let now = self.now();
        let mut state = self.state();
        let mut updates = Vec::new();
        while updates.len() < most
            && let Some(id) = state.waiting.pop_front()
        {
            let Some(user) = state.users.get_mut(&id).filter(|user| user.is_waiting) else { continue };
            user.is_waiting = false;
            let last = user.clock.last.load(Ordering::Relaxed);
            if user.is_online {
                user.clock.due.store(last + self.throttle(), Ordering::Relaxed);
            }
            updates.push(StatusUpdate {
                participant: Participant { id, is_anonymous: user.is_anonymous },
                is_here: user.connections > 0,
                is_online: user.is_online,
                age: Duration::from_millis(now.saturating_sub(last)),
            });
        }
        updates
    }

    /// Puts users that could not be written down again: at once, or at the next [`Self::tidy`] if their rows were held.
    pub fn put_back(&self, updates: impl IntoIterator<Item = StatusUpdate>, are_held: bool) {
        let mut state = self.state();
        for update in updates {
            let id = update.participant.id;
            match state.users.get_mut(&id) {
                Some(_) if are_held => state.held.push(id),
                Some(_) => self.queue(&mut state, &id),
                None => state.has_forgotten |= !update.is_online,
            }
        }
    }

    /// Puts down those whose rows were held, and forgets users without a connection whose next activity would be written anyway.
    pub fn tidy(&self) {
        let now = self.now();
        let mut state = self.state();
        for id in std::mem::take(&mut state.held) {
            self.queue(&mut state, &id);
        }
        let is_needed = |user: &BoardUser| {
            user.connections > 0 || user.is_waiting || now < user.clock.due.load(Ordering::Relaxed)
        };
        state.users.retain(|_, user| is_needed(user));
        state.idle = state.users.values().filter(|user| user.connections == 0).count();
    }

    /// Whether the end of a user's last connection was forgotten since the last call.
    pub fn has_forgotten(&self) -> bool {
        std::mem::take(&mut self.state().has_forgotten)
    }

    /// Counts users or sweeps that could not be written.
    pub fn failed(&self, count: usize) {
        self.failed.fetch_add(count as u64, Ordering::Relaxed);
        self.observe.status_failed(count);
    }

    /// Returns what was counted.
    pub fn counts(&self) -> StatusCounts {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        StatusCounts {
            requests: read(&self.requests),
            throttled: read(&self.throttled),
            failed: read(&self.failed),
            users: self.state().users.len(),
        }
    }

    /// Counts from zero again.
    pub fn reset_counts(&self) {
        for count in [&self.requests, &self.throttled, &self.failed] {
            count.store(0, Ordering::Relaxed);
        }
    }

    /// Returns the number of users that are connected, and of those that are not.
    pub fn user_counts(&self) -> (usize, usize) {
        let state = self.state();
        (state.users.len() - state.idle, state.idle)
    }

    fn count_request(&self) {
        if self.is_on.load(Ordering::Relaxed) {
            self.requests.fetch_add(1, Ordering::Relaxed);
            self.observe.status_requested();
        }
    }

    /// Puts a user down to be written.
    fn queue(&self, state: &mut BoardState, id: &Arc<str>) {
        if !self.is_on.load(Ordering::Relaxed) {
            return;
        }
        if let Some(user) = state.users.get_mut(id).filter(|user| !user.is_waiting) {
            user.is_waiting = true;
            state.waiting.push_back(Arc::clone(id));
            self.due.notify_one();
        }
    }

    /// Forgets the users without a connection that were silent for longest, a tenth at once, when there are too many.
    fn bound(&self, state: &mut BoardState) {
        if state.idle <= self.settings.cache {
            return;
        }
        let idle = state.users.iter().filter(|(_, user)| user.connections == 0);
        let mut idle: Vec<(u64, Arc<str>)> =
            idle.map(|(id, user)| (user.clock.last.load(Ordering::Relaxed), Arc::clone(id))).collect();
        idle.sort_unstable();
        let count = state.idle - self.settings.cache + self.settings.cache / 10;
        for (_, id) in idle.into_iter().take(count) {
            state.forget(&id);
        }
        let known: HashSet<Arc<str>> = state.users.keys().cloned().collect();
        state.waiting.retain(|id| known.contains(id));
    }

    fn throttle(&self) -> u64 {
        self.settings.throttle.as_millis() as u64
    }

    fn now(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    fn state(&self) -> MutexGuard<'_, BoardState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BoardState {
    /// Returns a user, who is new without a connection.
    fn user(&mut self, participant: &Participant, now: u64) -> &mut BoardUser {
        let idle = &mut self.idle;
        self.users.entry(Arc::clone(&participant.id)).or_insert_with(|| {
            *idle += 1;
            BoardUser {
                is_anonymous: participant.is_anonymous,
                connections: 0,
                is_online: false,
                is_waiting: false,
                clock: Arc::new(UserClock { last: AtomicU64::new(now), due: AtomicU64::new(0) }),
            }
        })
    }

    /// Forgets a user without a connection.
    fn forget(&mut self, id: &Arc<str>) {
        if let Some(user) = self.users.remove(id) {
            self.idle -= 1;
            self.has_forgotten |= user.is_waiting && !user.is_online;
        }
    }

    /// Forgets users without a connection, and what is to be written.
    fn clear(&mut self) {
        self.users.retain(|_, user| user.connections > 0);
        self.users.values_mut().for_each(|user| user.is_waiting = false);
        self.waiting.clear();
        self.held.clear();
        self.has_forgotten = false;
        self.idle = 0;
    }
}

/// A connection of a participant.
pub struct Connected {
    board: Arc<Board>,
    participant: Participant,
    clock: Arc<UserClock>,
}

impl Connected {
    /// Notes a sign of life.
    pub fn note(&self) {
        self.board.note(&self.participant, &self.clock);
    }

    /// Whether these claims name its participant.
    pub fn is_of(&self, claims: &Claims) -> bool {
        Participant::of(claims, &self.board.settings.anonymous_claim).as_ref() == Some(&self.participant)
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.board.disconnect(&self.participant);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn claims(id: &str) -> Claims {
        let claims = json!({"role": "authenticated", "sub": id, "exp": 9});
        Claims::from_verified_payload(&claims.to_string()).unwrap()
    }

    fn board(throttle: Duration, cache: usize) -> Arc<Board> {
        let (sweep, silence) = (Duration::from_secs(5), Duration::from_secs(300));
        let settings = StatusSettings {
            throttle,
            sweep,
            silence,
            cache,
            anonymous_claim: String::from("participantId"),
        };
        let board = Arc::new(Board::new(settings, Arc::new(Observe::new())));
        board.begin();
        board
    }

    /// What is to be written, in the order in which it is: `ann here`, `bob online`, `cat offline`.
    fn taken(board: &Board) -> Vec<String> {
        let line = |update: StatusUpdate| {
            let state = match (update.is_here, update.is_online) {
                (true, true) => "here",
                (false, true) => "online",
                (false, false) => "offline",
                (true, false) => "impossible",
            };
            format!("{} {state}", update.participant.id)
        };
        board.take(100).into_iter().map(line).collect()
    }

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn a_user_is_written_at_once_when_connecting_and_when_the_last_connection_ends() {
        let board = board(MINUTE, 10);
        let first = board.connect(&claims("ann"));
        assert_eq!(taken(&board), ["ann here"]);
        let second = board.connect(&claims("ann"));
        assert_eq!(taken(&board), ["ann here"], "a connection is never throttled");
        drop(first);
        assert_eq!(taken(&board), [""; 0]);
        drop(second);
        assert_eq!(taken(&board), ["ann offline"]);
        let third = board.connect(&claims("ann"));
        drop(third);
        assert_eq!(taken(&board), ["ann offline"], "what was not written in between is not written");
    }

    #[test]
    fn an_activity_is_written_once_in_an_interval_and_at_once_after_the_end() {
        let board = board(MINUTE, 10);
        for _ in 0..10 {
            board.request(&claims("bob"));
        }
        assert_eq!(taken(&board), ["bob online"]);
        assert_eq!((board.counts().requests, board.counts().throttled), (10, 9));
        let connection = board.connect(&claims("bob")).unwrap();
        taken(&board);
        connection.note();
        assert_eq!(taken(&board), [""; 0]);
        drop(connection);
        assert_eq!(taken(&board), ["bob offline"]);
        board.request(&claims("bob"));
        assert_eq!(taken(&board), ["bob online"]);
    }

    #[test]
    fn an_activity_after_the_interval_is_written() {
        let board = board(Duration::ZERO, 10);
        let connection = board.connect(&claims("bob")).unwrap();
        for _ in 0..3 {
            connection.note();
            assert_eq!(taken(&board), ["bob here"]);
        }
    }

    #[test]
    fn a_full_cache_forgets_the_oldest_users_without_a_connection_and_no_other() {
        let board = board(MINUTE, 10);
        let _connections: Vec<_> = (0..50).map(|n| board.connect(&claims(&format!("here{n}")))).collect();
        for n in 0..1000 {
            board.request(&claims(&format!("poll{n}")));
            assert!(board.user_counts().1 <= 10, "after {n}");
        }
        assert_eq!(board.user_counts().0, 50);
        let written = taken(&board);
        assert_eq!(written.iter().filter(|line| line.ends_with(" here")).count(), 50);
        assert!(
            written.contains(&String::from("poll999 online"))
                && !written.contains(&String::from("poll0 online"))
        );
        assert!(!board.has_forgotten(), "only signs of life were forgotten");
    }

    #[test]
    fn a_forgotten_end_is_told() {
        let board = board(MINUTE, 10);
        for n in 0..30 {
            drop(board.connect(&claims(&format!("gone{n}"))));
        }
        assert!(board.user_counts().1 <= 10);
        assert!(board.has_forgotten());
        assert!(!board.has_forgotten());
        // Also when it was being written meanwhile, and could not be.
        let updates = board.take(100);
        for n in 0..30 {
            board.request(&claims(&format!("poll{n}")));
        }
        board.has_forgotten();
        board.put_back(updates, false);
        assert!(board.has_forgotten());
    }

    #[test]
    fn what_could_not_be_written_is_written_as_it_is_by_then() {
        let board = board(MINUTE, 10);
        let ann = board.connect(&claims("ann"));
        let updates = board.take(100);
        drop(ann);
        board.put_back(updates, false);
        assert_eq!(taken(&board), ["ann offline"]);
        let bob = board.connect(&claims("bob"));
        let updates = board.take(100);
        board.put_back(updates, true);
        assert_eq!(taken(&board), [""; 0], "its row is held");
        board.tidy();
        assert_eq!(taken(&board), ["bob here"]);
        drop(bob);
    }

    #[test]
    fn connections_count_before_there_is_a_status_table_and_after() {
        let board = board(MINUTE, 10);
        board.stop();
        let ann = board.connect(&claims("ann"));
        drop(board.connect(&claims("bob")));
        board.request(&claims("cat"));
        assert_eq!((taken(&board), board.user_counts()), (Vec::new(), (1, 0)));
        board.begin();
        assert_eq!(taken(&board), ["ann here"]);
        board.stop();
        drop(ann);
        assert_eq!((taken(&board), board.user_counts()), (Vec::new(), (0, 0)));
        assert_eq!(board.counts().requests, 0);
    }

    #[test]
    fn users_are_forgotten_when_their_interval_is_over() {
        let board = board(Duration::ZERO, 10);
        board.request(&claims("ann"));
        board.tidy();
        assert_eq!(board.counts().users, 1, "it waits to be written");
        taken(&board);
        board.tidy();
        assert_eq!((board.counts().users, board.user_counts()), (0, (0, 0)));
    }
}
