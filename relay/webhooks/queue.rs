//! The deliveries of one webhook that are not settled: which may be sent now, which have to be held in the database, and how far
//! the webhook has come. Knows no database and no HTTP.

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::model::log::cursor::Cursor;
use crate::postgres::connect::backoff::jittered;
use crate::postgres::webhooks::{Held, HeldDelivery, HeldUpdate, Settlement};
use crate::webhooks::delivery::{Delivery, Scope};

/// Maximum number and bytes of changes in memory.
const MAX_IN_MEMORY: (usize, usize) = (256, 4 << 20);
/// Number and bytes of deliveries that wait in the database, beyond which the webhook takes no further changes.
const MAX_WAITING: (usize, usize) = (1000, 32 << 20);
/// The same for dead letters.
const MAX_DEAD: (usize, usize) = (10_000, 256 << 20);
/// Longest pause between two attempts.
const MAX_PAUSE: Duration = Duration::from_secs(3600);

/// The place of a delivery in the order of a webhook.
pub type Place = i64;

/// How often a delivery is tried.
#[derive(Debug, Clone, Copy)]
pub struct Retries {
    /// The number of attempts after which it is a dead letter.
    pub attempts: u32,
    /// The pause after the first one. Each next pause is twice as long.
    pub pause: Duration,
}

/// The deliveries of one webhook.
pub struct Queue {
    retries: Retries,
    entries: BTreeMap<Place, Entry>,
    /// The ids of entries that are held in the database.
    held_ids: HashSet<String>,
    /// Number and bytes of entries in memory, of those held, and of dead letters.
    in_memory: (usize, usize),
    held: (usize, usize),
    dead: (usize, usize),
    /// What is written next.
    settlement: Settlement,
    is_changed: bool,
}

struct Entry {
    id: String,
    scope: Scope,
    state: State,
    /// The body; `None` when it is held in the database.
    body: Option<Bytes>,
    bytes: usize,
    /// The position after it, of an entry that is not held.
    cursor: Option<Cursor>,
    /// The time of that position, if it is known.
    time: Option<String>,
    attempts: u32,
    due: Instant,
    error: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting,
    Sending,
    /// Delivered. It stays until everything before it is settled.
    Done,
}

/// A delivery to send now.
pub struct Ready {
    /// Its place.
    pub place: Place,
    /// Its id.
    pub id: String,
    /// Its body; `None` when it is held in the database.
    pub body: Option<Bytes>,
    /// Whether it failed before.
    pub is_retry: bool,
}

impl Entry {
    fn is_held(&self) -> bool {
        self.cursor.is_none()
    }

    fn failed(&self) -> bool {
        self.attempts > 0
    }
}

/// What deliveries wait for that come after others, in the order of both.
#[derive(Default)]
struct Earlier {
    rows: HashSet<i64>,
    is_any: bool,
    is_there: bool,
}

impl Earlier {
    fn add(&mut self, scope: &Scope) {
        self.is_there = true;
        match scope {
            Scope::Rows(rows) => self.rows.extend(rows),
            Scope::Any => self.is_any = true,
            Scope::Gap => {}
        }
    }

    /// Whether a delivery has to wait for one of these.
    fn holds(&self, scope: &Scope) -> bool {
        self.is_any
            || match scope {
                Scope::Rows(rows) => rows.iter().any(|row| self.rows.contains(row)),
                Scope::Any | Scope::Gap => self.is_there,
            }
    }
}

impl Queue {
    /// Creates a queue with the deliveries that are held in the database.
    pub fn new(retries: Retries, held: Held, now: Instant) -> Self {
        let mut queue = Self {
            retries,
            entries: BTreeMap::new(),
            held_ids: HashSet::new(),
            in_memory: (0, 0),
            held: (0, 0),
            dead: held.dead,
            settlement: Settlement::default(),
            is_changed: false,
        };
        for delivery in held.deliveries {
            let place = queue.entries.last_key_value().map_or(0, |(place, _)| place + 1);
            queue.hold(place, delivery, now);
        }
        queue
    }

    fn hold(&mut self, place: Place, delivery: HeldDelivery, now: Instant) {
        let HeldDelivery { id, keys, is_gap, attempts, due, bytes } = delivery;
        let scope = match keys {
            _ if is_gap => Scope::Gap,
            Some(rows) => Scope::Rows(rows),
            None => Scope::Any,
        };
        self.held = (self.held.0 + 1, self.held.1 + bytes);
        self.held_ids.insert(id.clone());
        let (state, body, cursor, time, error) = (State::Waiting, None, None, None, None);
        let entry = Entry { id, scope, state, body, bytes, cursor, time, attempts, due: now + due, error };
        self.entries.insert(place, entry);
    }

    /// Takes over what an operator changed of the deliveries in the database: dead letters that are tried again come first.
    pub fn renew(&mut self, held: Held, now: Instant) {
        self.dead = held.dead;
        let known: HashSet<&str> = held.deliveries.iter().map(|delivery| &*delivery.id).collect();
        let lost =
            |entry: &Entry| entry.is_held() && entry.state == State::Waiting && !known.contains(&*entry.id);
        let lost: Vec<Place> =
            self.entries.iter().filter(|(_, entry)| lost(entry)).map(|(place, _)| *place).collect();
        for place in lost {
            self.release(place);
        }
        for delivery in held.deliveries.into_iter().rev() {
            if !self.held_ids.contains(&delivery.id) {
                let place = self.entries.first_key_value().map_or(0, |(place, _)| place - 1);
                self.hold(place, delivery, now);
            } else if let Some(entry) = self.entries.values_mut().find(|entry| entry.id == delivery.id) {
                entry.due = entry.due.min(now + delivery.due);
            }
        }
    }

    /// Removes an entry that is held.
    fn release(&mut self, place: Place) {
        if let Some(entry) = self.entries.remove(&place) {
            self.held_ids.remove(&entry.id);
            self.held = (self.held.0.saturating_sub(1), self.held.1.saturating_sub(entry.bytes));
        }
    }

    /// Whether another change may be added.
    pub fn has_room(&self) -> bool {
        let fits = |(count, bytes): (usize, usize), max: (usize, usize)| count < max.0 && bytes < max.1;
        fits(self.in_memory, MAX_IN_MEMORY) && fits(self.held, MAX_WAITING) && !self.has_too_many_dead()
    }

    /// Whether an operator has to decide about dead letters before the webhook goes on.
    pub fn has_too_many_dead(&self) -> bool {
        self.dead.0 >= MAX_DEAD.0 || self.dead.1 >= MAX_DEAD.1
    }

    /// Returns the numbers of deliveries that wait in the database, and of dead letters.
    pub fn counts(&self) -> (usize, usize) {
        (self.held.0, self.dead.0)
    }

    /// Adds a delivery. `cursor` is the position after it.
    pub fn add(&mut self, delivery: Delivery, cursor: Cursor, now: Instant) {
        let Delivery { id, scope, body, time } = delivery;
        // It was held before the position behind it could be written.
        let state = if self.held_ids.contains(&id) { State::Done } else { State::Waiting };
        self.is_changed |= state == State::Done || scope == Scope::Gap;
        self.push(Entry {
            id,
            scope,
            state,
            bytes: body.len(),
            body: (state == State::Waiting).then_some(body),
            cursor: Some(cursor),
            time,
            attempts: 0,
            due: now,
            error: None,
        });
    }

    /// Adds a position up to which there is nothing to deliver, and its time.
    pub fn reach(&mut self, cursor: Cursor, time: Option<String>, now: Instant) {
        self.is_changed = true;
        let (id, scope, state) = (String::new(), Scope::Rows(Vec::new()), State::Done);
        let (body, cursor) = (None, Some(cursor));
        self.push(Entry {
            id,
            scope,
            state,
            body,
            bytes: 0,
            cursor,
            time,
            attempts: 0,
            due: now,
            error: None,
        });
    }

    fn push(&mut self, entry: Entry) {
        let place = self.entries.last_key_value().map_or(0, |(place, _)| place + 1);
        self.in_memory = (self.in_memory.0 + 1, self.in_memory.1 + entry.bytes);
        self.entries.insert(place, entry);
    }

    /// Returns a delivery to send now, and marks it as being sent; `None` if there is none. Without `may_retry`, only one that has not
    /// failed yet.
    pub fn next(&mut self, now: Instant, may_retry: bool) -> Option<Ready> {
        let is_due = |entry: &Entry| entry.due <= now && (may_retry || !entry.failed());
        let place = self.in_turn().find(|(_, entry)| is_due(entry)).map(|(place, _)| place)?;
        let entry = self.entries.get_mut(&place)?;
        entry.state = State::Sending;
        Some(Ready { place, id: entry.id.clone(), body: entry.body.clone(), is_retry: entry.failed() })
    }

    /// Returns when the next delivery is due, of those that wait for no other.
    pub fn next_due(&self) -> Option<Instant> {
        self.in_turn().map(|(_, entry)| entry.due).min()
    }

    /// Returns the entries that wait for no earlier one and are not being sent. A gap is sent once it is held: then its id is the same
    /// after a crash.
    fn in_turn(&self) -> impl Iterator<Item = (Place, &Entry)> {
        let mut earlier = Earlier::default();
        let open = self.entries.iter().filter(|(_, entry)| entry.state != State::Done);
        let in_turn = open.filter(move |(_, entry)| {
            let is_in_turn = !earlier.holds(&entry.scope);
            earlier.add(&entry.scope);
            is_in_turn
        });
        let attempts = self.retries.attempts;
        let is_ready = move |entry: &Entry| {
            let is_dead = entry.attempts >= attempts;
            entry.state == State::Waiting && !is_dead && (entry.is_held() || entry.scope != Scope::Gap)
        };
        in_turn.filter(move |(_, entry)| is_ready(entry)).map(|(place, entry)| (*place, entry))
    }

    /// Records that a delivery succeeded, or that it waits no more.
    pub fn delivered(&mut self, place: Place, is_counted: bool) {
        let Some(entry) = self.entries.get_mut(&place) else { return };
        self.is_changed = true;
        self.settlement.delivered += u64::from(is_counted);
        if entry.is_held() {
            self.settlement.gone.push(entry.id.clone());
            self.release(place);
        } else {
            entry.state = State::Done;
            entry.body = None;
        }
    }

    /// Records that a delivery failed, and is tried again after a pause, at least `pause`. Returns whether it is a dead letter instead.
    pub fn failed(&mut self, place: Place, why: &str, pause: Duration, now: Instant) -> bool {
        let Some(entry) = self.entries.get_mut(&place) else { return false };
        self.is_changed = true;
        entry.state = State::Waiting;
        entry.attempts += 1;
        let doubled = self.retries.pause.saturating_mul(1 << (entry.attempts - 1).min(20)).min(MAX_PAUSE);
        let pause = jittered(doubled).max(pause);
        entry.due = now + pause;
        entry.error = Some(why.to_owned());
        let is_dead = entry.attempts >= self.retries.attempts;
        if entry.is_held() {
            let update = update(entry, pause, is_dead, None);
            // Of several failures between two writes, the last one counts.
            self.settlement.held.retain(|earlier| earlier.id != update.id);
            self.settlement.held.push(update);
            if is_dead {
                self.dead = (self.dead.0 + 1, self.dead.1 + entry.bytes);
                self.release(place);
            }
        }
        is_dead
    }

    /// Records that a delivery was not accepted, and is not tried again before the webhook is enabled.
    pub fn put_back(&mut self, place: Place) {
        if let Some(entry) = self.entries.get_mut(&place) {
            entry.state = State::Waiting;
        }
    }

    /// Whether there is something to write.
    pub fn is_changed(&self) -> bool {
        self.is_changed
    }

    /// Returns what is to be written, and expects that it is.
    ///
    /// Deliveries that failed are held from now on, and so are those that wait for one that is held. None is held that waits for one in
    /// memory: so the order in the database is that of the changes for any two of which one waits for the other.
    pub fn settle(&mut self, now: Instant) -> Settlement {
        self.is_changed = false;
        let mut settlement = std::mem::take(&mut self.settlement);
        let (mut held, mut open) = (Earlier::default(), Earlier::default());
        let (mut reached, mut settled, mut dead) = (None, Vec::new(), Vec::new());
        for (place, entry) in &mut self.entries {
            let Some(cursor) = &entry.cursor else {
                held.add(&entry.scope);
                continue;
            };
            let is_due = entry.failed() || entry.scope == Scope::Gap || held.holds(&entry.scope);
            let is_to_be_held = entry.state == State::Waiting && is_due && !open.holds(&entry.scope);
            if entry.state != State::Done && !is_to_be_held {
                open.add(&entry.scope);
                continue;
            }
            if !open.is_there {
                reached = Some(cursor.to_string());
                settlement.reached = entry.time.clone().or(settlement.reached.take());
            }
            if is_to_be_held {
                let is_dead = entry.attempts >= self.retries.attempts;
                let body = entry.body.take().map(|body| String::from_utf8_lossy(&body).into_owned());
                let pause = entry.due.saturating_duration_since(now);
                settlement.held.push(update(entry, pause, is_dead, body));
                if is_dead {
                    dead.push(*place);
                } else {
                    held.add(&entry.scope);
                    settled.push((*place, false));
                }
            } else if !open.is_there {
                settled.push((*place, true));
            }
        }
        for (place, is_removed) in settled {
            self.forget(place, is_removed);
        }
        for place in dead {
            if let Some(entry) = self.forget(place, true) {
                self.dead = (self.dead.0 + 1, self.dead.1 + entry.bytes);
            }
        }
        settlement.cursor = reached;
        settlement
    }

    /// Counts an entry in memory no more, and removes it or has it held from now on.
    fn forget(&mut self, place: Place, is_removed: bool) -> Option<Entry> {
        let entry = self.entries.get_mut(&place)?;
        self.in_memory = (self.in_memory.0.saturating_sub(1), self.in_memory.1.saturating_sub(entry.bytes));
        if is_removed {
            return self.entries.remove(&place);
        }
        entry.cursor = None;
        self.held = (self.held.0 + 1, self.held.1 + entry.bytes);
        self.held_ids.insert(entry.id.clone());
        None
    }
}

fn update(entry: &Entry, pause: Duration, is_dead: bool, body: Option<String>) -> HeldUpdate {
    HeldUpdate {
        id: entry.id.clone(),
        keys: match &entry.scope {
            Scope::Rows(rows) => Some(rows.clone()),
            Scope::Any | Scope::Gap => None,
        },
        is_gap: entry.scope == Scope::Gap,
        body,
        attempts: entry.attempts,
        pause: pause.as_secs_f64(),
        error: entry.error.clone(),
        is_dead,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::log::cursor::{Epoch, Snapshot};

    const RETRIES: Retries = Retries { attempts: 3, pause: Duration::from_secs(60) };

    fn cursor(n: u64) -> Cursor {
        Cursor::after(Epoch(1), Snapshot::new(n, Vec::new()).unwrap())
    }

    fn queue() -> (Queue, Instant) {
        let now = Instant::now();
        (Queue::new(RETRIES, Held::default(), now), now)
    }

    fn rows(rows: &[i64]) -> Scope {
        Scope::Rows(rows.to_vec())
    }

    /// Adds deliveries with these names, whose cursors count from 1.
    fn add(queue: &mut Queue, deliveries: &[(&str, Scope)], now: Instant) {
        for (id, scope) in deliveries {
            let n = queue.entries.len() as u64 + 1;
            let body = Bytes::from_static(b"{}");
            let delivery = Delivery { id: (*id).to_owned(), scope: scope.clone(), body, time: None };
            queue.add(delivery, cursor(n), now);
        }
    }

    fn send(queue: &mut Queue, now: Instant) -> Vec<(String, Place)> {
        std::iter::from_fn(|| queue.next(now, true)).map(|ready| (ready.id, ready.place)).collect()
    }

    fn ids(sent: &[(String, Place)]) -> Vec<&str> {
        sent.iter().map(|(id, _)| id.as_str()).collect()
    }

    fn held(settlement: &Settlement) -> Vec<&str> {
        settlement.held.iter().map(|update| update.id.as_str()).collect()
    }

    fn fail(queue: &mut Queue, place: Place, now: Instant) -> bool {
        queue.failed(place, "status 500", Duration::ZERO, now)
    }

    /// What the database would return after this settlement.
    fn stored(settlement: &Settlement) -> Held {
        let delivery = |update: &HeldUpdate| HeldDelivery {
            id: update.id.clone(),
            keys: update.keys.clone(),
            is_gap: update.is_gap,
            attempts: update.attempts,
            due: Duration::ZERO,
            bytes: 2,
        };
        let deliveries = settlement.held.iter().filter(|update| !update.is_dead).map(delivery).collect();
        Held { deliveries, dead: (0, 0) }
    }

    #[test]
    fn one_delivery_of_a_row_is_sent_at_a_time() {
        let (mut queue, now) = queue();
        add(
            &mut queue,
            &[
                ("a1", rows(&[1])),
                ("a2", rows(&[1])),
                ("b1", rows(&[2])),
                ("ab", rows(&[1, 2])),
                ("b2", rows(&[2])),
            ],
            now,
        );
        let sent = send(&mut queue, now);
        assert_eq!(ids(&sent), ["a1", "b1"]);
        queue.delivered(sent[0].1, true);
        let second = send(&mut queue, now);
        assert_eq!(ids(&second), ["a2"]);
        queue.delivered(second[0].1, true);
        assert!(send(&mut queue, now).is_empty(), "b1 is before ab, and ab before b2");
        queue.delivered(sent[1].1, true);
        let third = send(&mut queue, now);
        assert_eq!(ids(&third), ["ab"]);
        queue.delivered(third[0].1, true);
        assert_eq!(ids(&send(&mut queue, now)), ["b2"]);
    }

    #[test]
    fn without_order_all_are_sent_at_once() {
        let (mut queue, now) = queue();
        add(&mut queue, &[("a1", rows(&[])), ("a2", rows(&[]))], now);
        assert_eq!(ids(&send(&mut queue, now)), ["a1", "a2"]);
    }

    #[test]
    fn the_position_is_before_the_first_that_is_not_settled() {
        let (mut queue, now) = queue();
        add(&mut queue, &[("a", rows(&[1])), ("b", rows(&[2])), ("c", rows(&[3]))], now);
        let sent = send(&mut queue, now);
        queue.delivered(sent[1].1, true);
        let settlement = queue.settle(now);
        assert_eq!((settlement.cursor, settlement.delivered), (None, 1));
        queue.delivered(sent[0].1, true);
        assert_eq!(queue.settle(now).cursor, Some(cursor(2).to_string()));
        queue.reach(cursor(9), None, now);
        assert_eq!(queue.settle(now).cursor, None);
        queue.delivered(sent[2].1, true);
        assert_eq!(queue.settle(now).cursor, Some(cursor(9).to_string()));
        assert!(!queue.is_changed() && queue.entries.is_empty());
    }

    #[test]
    fn a_failed_one_is_held_with_those_behind_it_and_the_others_go_on() {
        let (mut queue, now) = queue();
        add(
            &mut queue,
            &[("a1", rows(&[1])), ("b1", rows(&[2])), ("a2", rows(&[1])), ("b2", rows(&[2]))],
            now,
        );
        let sent = send(&mut queue, now);
        assert!(!fail(&mut queue, sent[0].1, now));
        queue.delivered(sent[1].1, true);
        let settlement = queue.settle(now);
        assert_eq!(held(&settlement), ["a1", "a2"]);
        assert_eq!(settlement.held[1].error, None);
        assert_eq!(settlement.cursor, Some(cursor(3).to_string()));
        assert_eq!(ids(&send(&mut queue, now)), ["b2"]);
        assert_eq!(queue.counts(), (2, 0));
        let soon = now + Duration::from_secs(61);
        let again = send(&mut queue, soon);
        assert_eq!(ids(&again), ["a1"]);
        queue.delivered(again[0].1, true);
        assert_eq!(queue.settle(soon).gone, ["a1"]);
        assert_eq!(ids(&send(&mut queue, soon)), ["a2"]);
    }

    #[test]
    fn none_is_held_before_another_that_it_waits_for() {
        let (mut queue, now) = queue();
        add(&mut queue, &[("b0", rows(&[2]))], now);
        let first = send(&mut queue, now);
        fail(&mut queue, first[0].1, now);
        assert_eq!(held(&queue.settle(now)), ["b0"]);
        add(&mut queue, &[("a1", rows(&[1])), ("ab", rows(&[1, 2])), ("b2", rows(&[2]))], now);
        let sent = send(&mut queue, now);
        assert_eq!(ids(&sent), ["a1"]);
        assert!(held(&queue.settle(now)).is_empty(), "ab waits for a1, which is being sent");
        fail(&mut queue, sent[0].1, now);
        assert_eq!(held(&queue.settle(now)), ["a1", "ab", "b2"]);
    }

    #[test]
    fn a_dead_letter_holds_nothing_back() {
        let (mut queue, mut now) = queue();
        add(&mut queue, &[("a1", rows(&[1])), ("a2", rows(&[1]))], now);
        for attempt in 1..=RETRIES.attempts {
            let sent = send(&mut queue, now);
            assert_eq!(ids(&sent), ["a1"]);
            assert_eq!(fail(&mut queue, sent[0].1, now), attempt == RETRIES.attempts);
            let settlement = queue.settle(now);
            let dead: Vec<_> = settlement.held.iter().filter(|update| update.is_dead).collect();
            assert_eq!(dead.len(), usize::from(attempt == RETRIES.attempts));
            now += MAX_PAUSE;
        }
        assert_eq!(queue.counts(), (1, 1));
        assert_eq!(ids(&send(&mut queue, now)), ["a2"]);
    }

    #[test]
    fn of_several_failures_between_two_writes_the_last_is_written() {
        let (mut queue, mut now) = queue();
        add(&mut queue, &[("a1", rows(&[1]))], now);
        let sent = send(&mut queue, now);
        fail(&mut queue, sent[0].1, now);
        let mut next = Queue::new(RETRIES, stored(&queue.settle(now)), now);
        for _ in 2..=RETRIES.attempts {
            let sent = send(&mut next, now);
            fail(&mut next, sent[0].1, now);
            now += MAX_PAUSE;
        }
        let settlement = next.settle(now);
        let written: Vec<_> =
            settlement.held.iter().map(|update| (update.attempts, update.is_dead)).collect();
        assert_eq!(written, [(RETRIES.attempts, true)]);
    }

    #[test]
    fn with_one_attempt_a_failure_is_a_dead_letter_at_once() {
        let now = Instant::now();
        let mut queue = Queue::new(Retries { attempts: 1, ..RETRIES }, Held::default(), now);
        add(&mut queue, &[("a1", rows(&[1])), ("a2", rows(&[1]))], now);
        let sent = send(&mut queue, now);
        assert!(fail(&mut queue, sent[0].1, now));
        assert!(send(&mut queue, now + MAX_PAUSE).is_empty(), "it is not sent before it is written");
        let settlement = queue.settle(now);
        assert!(settlement.held[0].is_dead && settlement.held.len() == 1);
        assert_eq!(settlement.held[0].body.as_deref(), Some("{}"));
        assert_eq!(ids(&send(&mut queue, now)), ["a2"]);
    }

    #[test]
    fn a_gap_waits_for_all_before_it_and_none_waits_for_it() {
        let (mut queue, now) = queue();
        add(&mut queue, &[("a1", rows(&[1])), ("gap", Scope::Gap), ("a2", rows(&[2]))], now);
        let sent = send(&mut queue, now);
        assert_eq!(ids(&sent), ["a1", "a2"]);
        assert!(held(&queue.settle(now)).is_empty());
        fail(&mut queue, sent[0].1, now);
        assert_eq!(held(&queue.settle(now)), ["a1", "gap"]);
        let soon = now + MAX_PAUSE;
        let again = send(&mut queue, soon);
        assert_eq!(ids(&again), ["a1"]);
        queue.delivered(again[0].1, true);
        assert_eq!(ids(&send(&mut queue, soon)), ["gap"]);
    }

    #[test]
    fn a_gap_is_sent_once_it_is_held() {
        let (mut queue, now) = queue();
        add(&mut queue, &[("gap", Scope::Gap)], now);
        assert!(send(&mut queue, now).is_empty() && queue.is_changed() && queue.next_due().is_none());
        assert_eq!(held(&queue.settle(now)), ["gap"]);
        assert_eq!(ids(&send(&mut queue, now)), ["gap"]);
    }

    #[test]
    fn a_row_of_unknown_key_is_sent_alone() {
        let (mut queue, now) = queue();
        add(&mut queue, &[("a", rows(&[1])), ("any", Scope::Any), ("b", rows(&[2]))], now);
        let sent = send(&mut queue, now);
        assert_eq!(ids(&sent), ["a"]);
        fail(&mut queue, sent[0].1, now);
        assert_eq!(held(&queue.settle(now)), ["a", "any", "b"]);
    }

    #[test]
    fn after_a_crash_what_is_held_is_not_sent_twice() {
        let (mut queue, now) = queue();
        add(&mut queue, &[("a1", rows(&[1])), ("b1", rows(&[2])), ("b2", rows(&[2]))], now);
        let sent = send(&mut queue, now);
        fail(&mut queue, sent[1].1, now);
        let settlement = queue.settle(now);
        assert_eq!((held(&settlement), &settlement.cursor), (vec!["b1", "b2"], &None));
        let mut next = Queue::new(RETRIES, stored(&settlement), now);
        add(
            &mut next,
            &[("a1", rows(&[1])), ("b1", rows(&[2])), ("b2", rows(&[2])), ("b3", rows(&[2]))],
            now,
        );
        assert_eq!(ids(&send(&mut next, now)), ["b1", "a1"]);
        assert_eq!(held(&next.settle(now)), ["b3"]);
    }

    #[test]
    fn an_operator_tries_dead_letters_again_and_discards_others() {
        let (mut queue, now) = queue();
        add(&mut queue, &[("a1", rows(&[1])), ("b1", rows(&[2]))], now);
        let sent = send(&mut queue, now);
        fail(&mut queue, sent[0].1, now);
        fail(&mut queue, sent[1].1, now);
        let mut there = stored(&queue.settle(now));
        let letter = |id: &str| HeldDelivery {
            id: id.to_owned(),
            keys: Some(vec![1]),
            is_gap: false,
            attempts: 0,
            due: Duration::ZERO,
            bytes: 2,
        };
        there.deliveries.retain(|delivery| delivery.id != "b1");
        there.deliveries.splice(0..0, [letter("old1"), letter("old2")]);
        queue.renew(there, now);
        let again = send(&mut queue, now);
        assert_eq!(ids(&again), ["old1"]);
        queue.delivered(again[0].1, true);
        assert_eq!(ids(&send(&mut queue, now)), ["old2"]);
        assert_eq!(queue.counts(), (2, 0));
    }

    #[test]
    fn what_is_in_memory_and_what_waits_is_bounded() {
        let (mut queue, now) = queue();
        let mut rounds = 0;
        while queue.has_room() {
            rounds += 1;
            add(&mut queue, &[(&format!("a{rounds}"), rows(&[rounds]))], now);
            if !queue.has_room() {
                assert_eq!(queue.in_memory.0, MAX_IN_MEMORY.0);
                for (_, place) in send(&mut queue, now) {
                    fail(&mut queue, place, now);
                }
                queue.settle(now);
            }
        }
        assert!(queue.counts().0 >= MAX_WAITING.0 && queue.counts().0 < MAX_WAITING.0 + MAX_IN_MEMORY.0);
        assert_eq!(queue.in_memory, (0, 0));
    }

    #[test]
    fn pauses_double_and_the_receivers_wish_is_kept() {
        let (mut queue, mut now) = queue();
        add(&mut queue, &[("a", rows(&[1]))], now);
        let wish = Duration::from_secs(500);
        for (pause, least, most) in [(Duration::ZERO, 30, 60), (wish, 500, 500)] {
            let place = queue.next(now, true).unwrap().place;
            queue.failed(place, "status 503", pause, now);
            let due = queue.next_due().unwrap() - now;
            assert!((least..=most).contains(&due.as_secs()), "{due:?}");
            now += due;
        }
        assert!(queue.next(now, false).is_none());
    }
}
