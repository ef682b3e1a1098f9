//! The order of positions, and what a reader misses of a feed that is cut into other pages.
//!
//! A position `(S, U, n)` means: everything that had finished in `S`, and of what had finished in `U` every change with a number
//! up to `n`. A plain position is `S` alone. `S` belongs to the reader: it may lie anywhere between the start and the end of the
//! page in delivery. The meaning is exact because a page is delivered in order of number, and because the snapshots of one
//! primary are totally ordered by inclusion.

use crate::model::log::cursor::{Cursor, Snapshot, Span, WithinPage};

/// What a reader misses next, as one pass over the changelog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// The page.
    pub span: Span,
    /// The number after which the missing changes begin.
    pub after: i64,
    /// The number of the last missing change; `None` means the end of the page.
    pub through: Option<i64>,
}

impl Missing {
    /// Returns the position of a reader that has all of it.
    pub fn end(&self) -> Cursor {
        match self.through {
            None => self.span.end(),
            Some(number) => self.span.after(number, false),
        }
    }
}

impl Cursor {
    /// Whether the reader has the change with this transaction and number.
    pub fn has(&self, xid: u64, number: i64) -> bool {
        let inside = |within: &WithinPage| number <= within.number && within.until.has_finished(xid);
        self.seen.has_finished(xid) || self.within.as_ref().is_some_and(inside)
    }

    /// Whether the position includes every change that `other` includes. False for another epoch.
    pub fn is_at_or_after(&self, other: &Self) -> bool {
        let includes = |theirs: &WithinPage| {
            theirs.until.is_before_or_equal(&self.seen)
                || self.within.as_ref().is_some_and(|ours| {
                    theirs.until.is_before_or_equal(&ours.until) && theirs.number <= ours.number
                })
        };
        self.epoch == other.epoch
            && other.seen.is_before_or_equal(&self.seen)
            && other.within.as_ref().is_none_or(includes)
    }

    /// Returns the newest snapshot that the position refers to.
    pub fn reach(&self) -> &Snapshot {
        self.within.as_ref().map_or(&self.seen, |within| &within.until)
    }

    /// Whether the snapshots of both positions can belong to one history.
    pub fn is_comparable(&self, other: &Self) -> bool {
        let ordered =
            |one: &Snapshot, other: &Snapshot| one.is_before_or_equal(other) || other.is_before_or_equal(one);
        self.epoch == other.epoch
            && [&self.seen, self.reach()]
                .iter()
                .all(|one| ordered(one, &other.seen) && ordered(one, other.reach()))
    }

    /// Returns what a reader at this position misses next of a feed that is at `feed`; `None` when it misses nothing, and can
    /// follow the feed from there.
    ///
    /// A reader inside a page that is not the feed's finishes its own page first: no position can express parts of two pages.
    pub fn missing(&self, feed: &Self) -> Option<Missing> {
        let (epoch, seen) = (self.epoch, self.seen.clone());
        let page = |until: &Snapshot| Span { epoch, seen, until: until.clone() };
        match (&self.within, &feed.within) {
            (Some(ours), Some(theirs))
                if ours.until == theirs.until && feed.seen.is_before_or_equal(&self.seen) =>
            {
                let through = Some(theirs.number);
                (ours.number < theirs.number).then(|| Missing {
                    span: page(&ours.until),
                    after: ours.number,
                    through,
                })
            }
            (Some(ours), _) => Some(Missing { span: page(&ours.until), after: ours.number, through: None }),
            (None, Some(theirs)) if feed.seen.is_before_or_equal(&self.seen) => {
                let is_behind = !theirs.until.is_before_or_equal(&self.seen);
                let through = Some(theirs.number);
                is_behind.then(|| Missing { span: page(&theirs.until), after: 0, through })
            }
            (None, _) => {
                let is_behind = !feed.seen.is_before_or_equal(&self.seen);
                is_behind.then(|| Missing { span: page(&feed.seen), after: 0, through: None })
            }
        }
    }

    /// Returns the position of a reader that also received everything up to `other`: the least position at or after both. Where
    /// no position expresses that (inside different pages), returns the greatest that is surely true and not before this one.
    pub fn merge(&self, other: &Self) -> Self {
        if self.epoch != other.epoch {
            return self.clone();
        }
        let later = self.seen.is_before_or_equal(&other.seen);
        let seen = if later { &other.seen } else { &self.seen };
        let open = |one: &Self| one.within.clone().filter(|within| !within.until.is_before_or_equal(seen));
        let within = match (open(self), open(other)) {
            (Some(ours), Some(theirs)) => {
                let is_less = ours.until.is_before_or_equal(&theirs.until) && ours.number <= theirs.number;
                Some(if is_less { theirs } else { ours })
            }
            (ours, theirs) => ours.or(theirs),
        };
        Self { epoch: self.epoch, seen: seen.clone(), within }
    }
}

impl Span {
    /// Returns the position after the change with this number; `last` when it is the page's last change.
    pub fn after(&self, number: i64, last: bool) -> Cursor {
        if last {
            return self.end();
        }
        let within = Some(WithinPage { until: self.until.clone(), number });
        Cursor { epoch: self.epoch, seen: self.seen.clone(), within }
    }

    /// Returns the snapshot that a reader at `position` has seen completely, when it is beyond the start of the page: the
    /// reader's positions inside the page keep it.
    pub fn base<'a>(&self, position: &'a Cursor) -> Option<&'a Snapshot> {
        Some(&position.seen).filter(|seen| !seen.is_before_or_equal(&self.seen))
    }

    /// Whether a reader at `position`, who misses nothing before the page, can receive the page from there: at every interruption
    /// a position expresses what it has.
    pub fn continues(&self, position: &Cursor) -> bool {
        position.within.as_ref().is_none_or(|within| within.until == self.until)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet, HashMap};

    use proptest::prelude::*;
    use proptest::test_runner::{Config, TestError, TestRunner};

    use super::*;
    use crate::model::log::cursor::Epoch;

    const EPOCH: Epoch = Epoch(1);
    const ROWS: u8 = 5;
    const RELAYS: usize = 3;
    const READERS: usize = 4;
    /// Larger pages are read by each reader from the changelog.
    const MAX_PARTS: usize = 3;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Change {
        xid: u64,
        number: i64,
        row: u8,
    }

    /// A database with overlapping transactions, which wait for each other's rows and end in any order.
    struct Database {
        next_xid: u64,
        number: i64,
        running: BTreeMap<u64, Vec<Change>>,
        /// The first transaction id above all that ended.
        xmax: u64,
        committed: Vec<Change>,
    }

    impl Database {
        fn new() -> Self {
            Self { next_xid: 3, number: 0, running: BTreeMap::new(), xmax: 3, committed: Vec::new() }
        }

        fn snapshot(&self) -> Snapshot {
            let running = self.running.keys().copied().filter(|xid| *xid < self.xmax).collect();
            Snapshot::new(self.xmax, running).unwrap()
        }

        fn write(&mut self, which: u8, row: u8) {
            let Some(xid) = self.pick(which) else { return };
            let locked = |(other, writes): (&u64, &Vec<Change>)| {
                *other != xid && writes.iter().any(|write| write.row == row)
            };
            if !self.running.iter().any(locked) {
                self.number += 1;
                let change = Change { xid, number: self.number, row };
                self.running.get_mut(&xid).unwrap().push(change);
            }
        }

        fn end(&mut self, which: u8, commits: bool) {
            let Some(xid) = self.pick(which) else { return };
            let writes = self.running.remove(&xid).unwrap();
            self.xmax = self.xmax.max(xid + 1);
            if commits {
                self.committed.extend(writes);
                self.committed.sort_by_key(|change| change.number);
            }
        }

        fn pick(&self, which: u8) -> Option<u64> {
            self.running.keys().copied().nth(which as usize % self.running.len().max(1))
        }

        /// The changes of a page, in order.
        fn page(&self, span: &Span) -> Vec<Change> {
            let of =
                |change: &&Change| span.until.has_finished(change.xid) && !span.seen.has_finished(change.xid);
            self.committed.iter().filter(of).copied().collect()
        }
    }

    /// A relay: the page in delivery, and recent parts of pages.
    struct Relay {
        position: Cursor,
        page: Option<(Span, Vec<Change>, usize)>,
        start: Cursor,
        recent: Vec<(Span, Vec<Change>, bool)>,
    }

    impl Relay {
        fn poll(&mut self, database: &Database) {
            if self.page.is_some() {
                return;
            }
            let seen = self.position.seen().clone();
            let span = Span { epoch: EPOCH, seen, until: database.snapshot() };
            let changes = database.page(&span);
            match changes.is_empty() {
                true => self.position = span.end(),
                false => self.page = Some((span, changes, 0)),
            }
        }
    }

    enum State {
        Disconnected,
        /// Catching up with this relay.
        CatchingUp(usize),
        /// Receiving live changes of this relay, from this base.
        Live(usize, Cursor),
    }

    struct Reader {
        position: Cursor,
        state: State,
        has: BTreeSet<i64>,
        last: HashMap<u8, i64>,
    }

    impl Reader {
        /// Starts with the rows of this moment.
        fn begin(database: &Database) -> Self {
            let mut last = HashMap::new();
            let has = database.committed.iter().map(|change| {
                last.insert(change.row, change.number);
                change.number
            });
            let has = has.collect();
            Self {
                position: Cursor::after(EPOCH, database.snapshot()),
                state: State::Disconnected,
                has,
                last,
            }
        }

        fn receive(&mut self, change: &Change, position: Cursor) -> Result<(), TestCaseError> {
            prop_assert!(self.has.insert(change.number), "{change:?} again, at {:?}", self.position);
            let before = self.last.insert(change.row, change.number);
            prop_assert!(before.is_none_or(|before| before < change.number), "{change:?} out of order");
            self.advance(position)
        }

        fn advance(&mut self, position: Cursor) -> Result<(), TestCaseError> {
            prop_assert!(position.is_at_or_after(&self.position), "{position:?} for {:?}", self.position);
            self.position = position.to_string().parse().unwrap();
            Ok(())
        }
    }

    struct World {
        database: Database,
        relays: Vec<Relay>,
        readers: Vec<Reader>,
        /// The correct behaviour: positions keep what the reader had seen completely.
        keeps_base: bool,
    }

    impl World {
        fn new(keeps_base: bool) -> Self {
            let database = Database::new();
            let relay = || {
                let position = Cursor::after(EPOCH, database.snapshot());
                Relay { start: position.clone(), position, page: None, recent: Vec::new() }
            };
            let relays = (0..RELAYS).map(|_| relay()).collect();
            let readers = (0..READERS).map(|_| Reader::begin(&database)).collect();
            Self { database, relays, readers, keeps_base }
        }

        fn step(&mut self, (what, which, how): (u8, u8, u8)) -> Result<(), TestCaseError> {
            let (relay, reader) = (which as usize % RELAYS, which as usize % READERS);
            match what {
                0..3 if self.database.running.len() < 6 => {
                    self.database.running.insert(self.database.next_xid, Vec::new());
                    self.database.next_xid += 1;
                }
                0..8 => self.database.write(which, how % ROWS),
                8..11 => self.database.end(which, true),
                11 => self.database.end(which, false),
                12..15 => self.relays[relay].poll(&self.database),
                15..20 => self.deliver(relay, 1 + how as usize % 3)?,
                20..22 => self.readers[reader].state = State::CatchingUp(how as usize % RELAYS),
                22..26 => self.catch_up(reader, how)?,
                26 => self.disconnect(reader, how)?,
                27 if how < 40 => self.readers[reader] = Reader::begin(&self.database),
                _ => {}
            }
            Ok(())
        }

        fn after(&self, span: &Span, number: i64, last: bool, reader: &Cursor) -> Cursor {
            let position = span.after(number, last);
            if self.keeps_base { position.merge(reader) } else { position }
        }

        /// Delivers the next part of a relay's page to live readers; leaves a large page to them.
        fn deliver(&mut self, number: usize, size: usize) -> Result<(), TestCaseError> {
            let Some((span, mut changes, parts)) = self.relays[number].page.take() else { return Ok(()) };
            let rest = changes.split_off(size.min(changes.len()));
            let is_last = |change: &Change| rest.is_empty() && Some(change) == changes.last();
            for index in 0..self.readers.len() {
                let State::Live(at, base) = &self.readers[index].state else { continue };
                if *at != number {
                    continue;
                }
                let base = base.clone();
                for change in changes.iter().filter(|change| !base.has(change.xid, change.number)) {
                    let position = self.after(&span, change.number, is_last(change), &base);
                    self.readers[index].receive(change, position)?;
                }
            }
            let relay = &mut self.relays[number];
            let last = changes.last().unwrap().number;
            relay.position = span.after(last, rest.is_empty());
            relay.recent.push((span.clone(), changes, !rest.is_empty()));
            if rest.is_empty() || parts + 1 < MAX_PARTS {
                relay.page = (!rest.is_empty()).then_some((span, rest, parts + 1));
            } else {
                for reader in &mut self.readers {
                    if let State::Live(at, base) = &reader.state
                        && *at == number
                    {
                        let position = relay.position.merge(base);
                        reader.state = State::CatchingUp(number);
                        reader.advance(position)?;
                    }
                }
                relay.position = span.end();
                (relay.start, relay.recent) = (span.end(), Vec::new());
            }
            Ok(())
        }

        /// Delivers some of what a reader misses, from the relay's recent parts or from the changelog; or makes it live.
        fn catch_up(&mut self, index: usize, how: u8) -> Result<(), TestCaseError> {
            let State::CatchingUp(number) = self.readers[index].state else { return Ok(()) };
            let (relay, position) = (&self.relays[number], self.readers[index].position.clone());
            prop_assert!(position.is_comparable(&relay.position));
            let Some(missing) = position.missing(&relay.position) else {
                prop_assert!(position.is_at_or_after(&relay.position));
                self.readers[index].state = State::Live(number, position);
                return Ok(());
            };
            let end_of = |(span, changes, more): &(Span, Vec<Change>, bool)| {
                span.after(changes.last().unwrap().number, !more)
            };
            let is_missing = |part: &&(Span, Vec<Change>, bool)| !position.is_at_or_after(&end_of(part));
            let first = relay.recent.iter().find(is_missing);
            if how.is_multiple_of(2)
                && position.is_at_or_after(&relay.start)
                && let Some((span, changes, more)) = first.filter(|(span, ..)| span.continues(&position))
            {
                let (span, changes, more) = (span.clone(), changes.clone(), *more);
                for change in changes.iter().filter(|one| !position.has(one.xid, one.number)) {
                    let is_last = !more && Some(change) == changes.last();
                    let position = self.after(&span, change.number, is_last, &position);
                    self.readers[index].receive(change, position)?;
                }
                let end = self.after(&span, changes.last().unwrap().number, !more, &position);
                return self.readers[index].advance(end);
            }
            let is_wanted = |change: &Change| {
                change.number > missing.after
                    && missing.through.is_none_or(|through| change.number <= through)
            };
            let page = self.database.page(&missing.span).into_iter().filter(is_wanted);
            let (page, limit): (Vec<Change>, usize) = (page.collect(), 1 + how as usize % 4);
            for change in page.iter().take(limit) {
                let is_last = missing.through.is_none() && Some(change) == page.last();
                let position = self.after(&missing.span, change.number, is_last, &position);
                self.readers[index].receive(change, position)?;
            }
            if page.len() > limit {
                return Ok(());
            }
            let end = missing.end();
            self.readers[index].advance(if self.keeps_base { end.merge(&position) } else { end })
        }

        /// Disconnects a reader, with the cursor of its last change or the position at the end of a long poll.
        fn disconnect(&mut self, index: usize, how: u8) -> Result<(), TestCaseError> {
            let state = std::mem::replace(&mut self.readers[index].state, State::Disconnected);
            match state {
                State::Live(number, base) if how.is_multiple_of(2) && self.keeps_base => {
                    let position = self.relays[number].position.merge(&base);
                    self.readers[index].advance(position)
                }
                _ => Ok(()),
            }
        }

        /// Ends all transactions, and lets every reader catch up.
        fn finish(&mut self) -> Result<(), TestCaseError> {
            while !self.database.running.is_empty() {
                self.database.end(0, true);
            }
            for number in 0..RELAYS {
                for _ in 0..2 {
                    self.relays[number].poll(&self.database);
                    while self.relays[number].page.is_some() {
                        self.deliver(number, 3)?;
                    }
                }
            }
            for index in 0..READERS {
                if !matches!(self.readers[index].state, State::Live(..)) {
                    self.readers[index].state = State::CatchingUp(index % RELAYS);
                }
                for how in 0..=u8::MAX {
                    self.catch_up(index, how)?;
                }
                let live = matches!(self.readers[index].state, State::Live(..));
                prop_assert!(live, "it never catches up: {:?}", self.readers[index].position);
                let all: BTreeSet<i64> = self.database.committed.iter().map(|change| change.number).collect();
                prop_assert_eq!(&self.readers[index].has, &all, "something is missing");
            }
            Ok(())
        }
    }

    fn steps() -> impl Strategy<Value = Vec<(u8, u8, u8)>> {
        proptest::collection::vec((0..28_u8, any::<u8>(), any::<u8>()), 1..400)
    }

    fn run(steps: &[(u8, u8, u8)], keeps_base: bool) -> Result<(), TestCaseError> {
        let mut world = World::new(keeps_base);
        for step in steps {
            world.step(*step)?;
        }
        world.finish()
    }

    fn runner(cases: u32) -> TestRunner {
        TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() })
    }

    /// Several relays cut one history into different pages; readers change relay, transport and moment.
    #[test]
    fn each_change_comes_once_and_in_order_from_any_relay() {
        runner(1500).run(&steps(), |steps| run(&steps, true)).unwrap();
    }

    /// Proves that the test above can fail: it does without the reader's own base.
    #[test]
    fn positions_without_the_readers_own_base_repeat_changes() {
        let found = runner(5000).run(&steps(), |steps| run(&steps, false));
        assert!(matches!(found, Err(TestError::Fail(..))), "nothing was found");
    }

    prop_compose! {
        /// Positions of one history, plain and inside pages of any start.
        fn any_positions()(
            steps in proptest::collection::vec((1..4_u64, any::<u64>()), 2..6),
            picks in proptest::collection::vec((any::<usize>(), any::<usize>(), 0..5_i64), 2..7),
        ) -> Vec<Cursor> {
            let mut snapshots = vec![Snapshot::new(3, vec![1]).unwrap()];
            for (begin, bits) in steps {
                let last = snapshots.last().unwrap();
                let xmax = last.xmax() + begin;
                let open = (1..xmax).filter(|xid| !last.has_finished(*xid) && bits >> (xid % 64) & 1 == 1);
                snapshots.push(Snapshot::new(xmax, open.collect()).unwrap());
            }
            let position = |(from, to, number): (usize, usize, i64)| {
                let (from, to) = (from % snapshots.len(), to % snapshots.len());
                let (from, to) = (from.min(to), from.max(to));
                let (seen, until) = (snapshots[from].clone(), snapshots[to].clone());
                match seen == until {
                    true => Cursor::after(EPOCH, seen),
                    false => Cursor::inside(EPOCH, seen, until, number).unwrap(),
                }
            };
            picks.into_iter().map(position).collect()
        }
    }

    fn changes() -> impl Iterator<Item = (u64, i64)> {
        (1..24).flat_map(|xid| (0..6).map(move |number| (xid, number)))
    }

    proptest! {
        /// A position at or after another includes every change of the other, and the relation is an order.
        #[test]
        fn at_or_after_means_having_at_least_as_much(positions in any_positions()) {
            for one in &positions {
                prop_assert!(one.is_at_or_after(one));
                for other in positions.iter().filter(|other| one.is_at_or_after(other)) {
                    for (xid, number) in changes() {
                        prop_assert!(one.has(xid, number) || !other.has(xid, number), "{one:?} {other:?}");
                    }
                    for third in positions.iter().filter(|third| other.is_at_or_after(third)) {
                        prop_assert!(one.is_at_or_after(third), "{one:?} {other:?} {third:?}");
                    }
                }
            }
        }

        /// The result is never less than the first position, nor more than both; and it is all of both where the reader misses
        /// nothing of the feed.
        #[test]
        fn a_position_only_grows(positions in any_positions()) {
            for (one, other) in positions.iter().flat_map(|one| positions.iter().map(move |other| (one, other))) {
                let both = one.merge(other);
                prop_assert!(both.is_at_or_after(one), "{one:?} and {other:?}: {both:?}");
                let misses_nothing = one.missing(other).is_none();
                prop_assert!(!misses_nothing || both.is_at_or_after(other), "{one:?} and {other:?}: {both:?}");
                for (xid, number) in changes() {
                    let of_either = one.has(xid, number) || other.has(xid, number);
                    prop_assert!(of_either || !both.has(xid, number), "{one:?} and {other:?}: {both:?}");
                }
            }
        }
    }
}
