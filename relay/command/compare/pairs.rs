//! Pairs the changes that two servers tell: equal ones, and those that one of them misses, repeats, delays or tells differently.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::time::Instant;

/// Number of pairs that are remembered, to know a change that comes again.
const MAX_KNOWN: usize = 10_000;
/// Number of delays for the median of the summary.
const MAX_DELAYS: usize = 100_000;

/// One of the servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The relay.
    Relay,
    /// The server that it is compared with.
    Other,
}

impl Side {
    fn opposite(self) -> Self {
        match self {
            Self::Relay => Self::Other,
            Self::Other => Self::Relay,
        }
    }
}

/// A change as a server tells it.
#[derive(Debug, Clone, PartialEq)]
pub struct ReceivedChange {
    table: String,
    operation: String,
    new: Map<String, Value>,
    old: Map<String, Value>,
    /// When it was committed, by the server's account: the same when it comes again.
    committed: String,
}

impl ReceivedChange {
    /// Reads the `data` of a message.
    pub fn of(data: &Value) -> Self {
        let text = |name: &str| data[name].as_str().unwrap_or_default().to_owned();
        let row = |name: &str| data[name].as_object().cloned().unwrap_or_default();
        Self {
            table: format!("{}.{}", text("schema"), text("table")),
            operation: text("type"),
            new: row("record"),
            old: row("old_record"),
            committed: text("commit_timestamp"),
        }
    }

    fn is_alike(&self, other: &Self) -> bool {
        self.table == other.table && self.operation == other.operation
    }

    /// The columns that differ, with their values. Of old rows only columns that both have: servers send more or less of them.
    fn differences(&self, other: &Self) -> BTreeMap<String, [Value; 2]> {
        let mut found = BTreeMap::new();
        for name in self.new.keys().chain(other.new.keys()) {
            let [one, two] = [&self.new, &other.new].map(|row| row.get(name));
            if one != two {
                let shown =
                    |value: Option<&Value>| value.cloned().unwrap_or_else(|| Value::from("(no such column)"));
                found.insert(name.clone(), [shown(one), shown(two)]);
            }
        }
        for (name, one) in &self.old {
            if let Some(two) = other.old.get(name).filter(|two| *two != one) {
                found.insert(format!("old {name}"), [one.clone(), two.clone()]);
            }
        }
        found
    }

    /// The number of columns with equal values.
    fn resemblance(&self, other: &Self) -> usize {
        let equal = |one: &Map<String, Value>, two: &Map<String, Value>| {
            one.iter().filter(|(name, value)| two.get(*name) == Some(value)).count()
        };
        equal(&self.new, &other.new) + equal(&self.old, &other.old)
    }

    fn shown(&self) -> String {
        let row = if self.new.is_empty() { &self.old } else { &self.new };
        format!("{} {} {}", self.operation, self.table, Value::Object(row.clone()))
    }
}

/// A difference between the servers.
#[derive(Debug, PartialEq)]
pub enum Difference {
    /// A server did not tell what the other told.
    Missing(Side, ReceivedChange),
    /// A server told a change again.
    Repeated(Side, ReceivedChange),
    /// A server told a change later than the other.
    Late(Side, Duration, ReceivedChange),
    /// The servers told different values: of the relay, then of the other.
    Differs(ReceivedChange, BTreeMap<String, [Value; 2]>),
}

impl Difference {
    /// Returns it as a line of text.
    pub fn line<'a>(&self, names: impl Fn(Side) -> &'a str) -> String {
        match self {
            Self::Missing(side, change) => format!("missing at {}: {}", names(*side), change.shown()),
            Self::Repeated(side, change) => format!("repeated at {}: {}", names(*side), change.shown()),
            Self::Late(side, by, change) => {
                format!("late at {} by {} ms: {}", names(*side), by.as_millis(), change.shown())
            }
            Self::Differs(change, columns) => {
                let columns = columns.iter().map(|(name, [relay, other])| {
                    format!("{name} is {relay} at {}, {other} at {}", names(Side::Relay), names(Side::Other))
                });
                let columns: Vec<String> = columns.collect();
                format!("different: {}: {}", change.shown(), columns.join("; "))
            }
        }
    }
}

/// The changes of both servers so far.
pub struct Pairs {
    late: Duration,
    wait: Duration,
    /// Changes of the relay and of the other server that have no counterpart yet, with their times.
    waiting: [VecDeque<(Instant, ReceivedChange)>; 2],
    /// The last changes of each server that had one.
    known: [VecDeque<ReceivedChange>; 2],
    equal: usize,
    /// How much later the other server was, in seconds.
    delays: VecDeque<f64>,
    missing: [usize; 2],
    repeated: [usize; 2],
    delayed: [usize; 2],
    different: usize,
}

impl Pairs {
    /// Creates an empty comparison: a delay of `late` is reported, a change is missing after `wait`.
    pub fn new(late: Duration, wait: Duration) -> Self {
        Self {
            late,
            wait,
            waiting: Default::default(),
            known: Default::default(),
            equal: 0,
            delays: VecDeque::new(),
            missing: [0; 2],
            repeated: [0; 2],
            delayed: [0; 2],
            different: 0,
        }
    }

    /// Whether a change of the opposite server waits for one of this server.
    pub fn awaits(&self, side: Side) -> bool {
        !self.waiting[side.opposite() as usize].is_empty()
    }

    /// Takes a change of one server. Returns what it shows, if anything.
    pub fn received(&mut self, side: Side, change: ReceivedChange, now: Instant) -> Option<Difference> {
        let waiting = &mut self.waiting[side.opposite() as usize];
        let equal = |(_, other): &(Instant, ReceivedChange)| {
            change.is_alike(other) && change.differences(other).is_empty()
        };
        let Some((came, other)) = waiting.iter().position(equal).and_then(|at| waiting.remove(at)) else {
            self.waiting[side as usize].push_back((now, change));
            return None;
        };
        let delay = now.duration_since(came);
        self.equal += 1;
        let signed = if side == Side::Other { delay.as_secs_f64() } else { -delay.as_secs_f64() };
        keep(&mut self.delays, signed, MAX_DELAYS);
        keep(&mut self.known[side.opposite() as usize], other, MAX_KNOWN);
        keep(&mut self.known[side as usize], change.clone(), MAX_KNOWN);
        (delay >= self.late).then(|| {
            self.delayed[side as usize] += 1;
            Difference::Late(side, delay, change)
        })
    }

    /// Returns what the changes show that have waited long enough for a counterpart.
    pub fn overdue(&mut self, now: Instant) -> Vec<Difference> {
        let mut findings = Vec::new();
        for side in [Side::Relay, Side::Other] {
            while let Some((came, _)) = self.waiting[side as usize].front()
                && now.duration_since(*came) >= self.wait
                && let Some((_, change)) = self.waiting[side as usize].pop_front()
            {
                findings.push(self.unpaired(side, change));
            }
        }
        findings
    }

    /// Returns what a change shows that has no equal counterpart.
    fn unpaired(&mut self, side: Side, change: ReceivedChange) -> Difference {
        if self.known[side as usize].contains(&change) {
            self.repeated[side as usize] += 1;
            return Difference::Repeated(side, change);
        }
        let others = &mut self.waiting[side.opposite() as usize];
        let alike = others.iter().enumerate().filter(|(_, (_, other))| change.is_alike(other));
        let nearest = alike
            .map(|(at, (_, other))| (change.resemblance(other), at))
            .filter(|(resemblance, _)| *resemblance > 0)
            .max_by_key(|(resemblance, at)| (*resemblance, std::cmp::Reverse(*at)));
        let Some((_, other)) = nearest.and_then(|(_, at)| others.remove(at)) else {
            self.missing[side.opposite() as usize] += 1;
            return Difference::Missing(side.opposite(), change);
        };
        self.different += 1;
        let (relay, other) = if side == Side::Relay { (change, other) } else { (other, change) };
        let columns = relay.differences(&other);
        Difference::Differs(relay, columns)
    }

    /// Whether nothing differed.
    pub fn is_equal(&self) -> bool {
        let counts = [self.missing, self.repeated, self.delayed].concat();
        self.different == 0 && counts.iter().all(|count| *count == 0)
    }

    /// Returns the totals as text.
    pub fn summary<'a>(&self, names: impl Fn(Side) -> &'a str) -> String {
        let mut parts = vec![format!("{} equal{}", self.equal, self.median(&names))];
        let mut count = |what: &str, counts: [usize; 2]| {
            for side in [Side::Relay, Side::Other] {
                if counts[side as usize] > 0 {
                    parts.push(format!("{} {what} at {}", counts[side as usize], names(side)));
                }
            }
        };
        count("missing", self.missing);
        count("repeated", self.repeated);
        count("late", self.delayed);
        count("not compared yet", [self.waiting[1].len(), self.waiting[0].len()]);
        if self.different > 0 {
            parts.push(format!("{} different", self.different));
        }
        if self.equal == 0 && self.is_equal() {
            parts.push(String::from("nothing was compared: no change came"));
        }
        format!("changes: {}", parts.join(", "))
    }

    fn median<'a>(&self, names: impl Fn(Side) -> &'a str) -> String {
        let mut delays: Vec<f64> = self.delays.iter().copied().collect();
        delays.sort_by(f64::total_cmp);
        let Some(median) = delays.get(delays.len() / 2) else { return String::new() };
        let later = if *median >= 0.0 { Side::Other } else { Side::Relay };
        format!(" ({} was later, by {:.1} ms in the median)", names(later), median.abs() * 1000.0)
    }
}

fn keep<T>(list: &mut VecDeque<T>, item: T, most: usize) {
    list.push_back(item);
    if list.len() > most {
        list.pop_front();
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn change(operation: &str, new: Value, old: Value, committed: &str) -> ReceivedChange {
        ReceivedChange::of(&json!({"schema": "public", "table": "t", "type": operation, "record": new,
            "old_record": old, "commit_timestamp": committed}))
    }

    fn insert(id: i64, text: &str) -> ReceivedChange {
        change("INSERT", json!({"id": id, "text": text}), json!({}), &id.to_string())
    }

    const LATE: Duration = Duration::from_secs(1);
    const WAIT: Duration = Duration::from_secs(5);

    #[test]
    fn each_difference_is_found_and_nothing_else() {
        let start = Instant::now();
        let mut pairs = Pairs::new(LATE, WAIT);
        let mut told = |side, change, ms| pairs.received(side, change, start + Duration::from_millis(ms));
        assert_eq!(told(Side::Relay, insert(1, "a"), 0), None);
        assert_eq!(told(Side::Other, insert(1, "a"), 20), None);
        // Later, missing on either side, again, and different.
        assert_eq!(told(Side::Other, insert(2, "b"), 30), None);
        let late = Difference::Late(Side::Relay, Duration::from_millis(1500), insert(2, "b"));
        assert_eq!(told(Side::Relay, insert(2, "b"), 1530), Some(late));
        assert_eq!(told(Side::Relay, insert(3, "c"), 1600), None);
        assert_eq!(told(Side::Other, insert(4, "d"), 1700), None);
        assert_eq!(told(Side::Other, insert(1, "a"), 1800), None);
        assert_eq!(told(Side::Relay, insert(5, "e"), 1900), None);
        assert_eq!(told(Side::Other, insert(5, "f"), 1900), None);
        assert_eq!(pairs.overdue(start + WAIT), []);
        let differs = BTreeMap::from([(String::from("text"), [json!("e"), json!("f")])]);
        let mut found = pairs.overdue(start + WAIT * 2);
        found.sort_by_key(|finding| format!("{finding:?}"));
        assert_eq!(
            found,
            [
                Difference::Differs(insert(5, "e"), differs),
                Difference::Missing(Side::Other, insert(3, "c")),
                Difference::Missing(Side::Relay, insert(4, "d")),
                Difference::Repeated(Side::Other, insert(1, "a")),
            ]
        );
        assert!(!pairs.is_equal());
        let summary = pairs.summary(|side| if side == Side::Relay { "A" } else { "B" });
        assert!(
            summary.starts_with("changes: 2 equal") && summary.contains("1 missing at A, 1 missing at B"),
            "{summary}"
        );
    }

    #[test]
    fn a_row_that_changes_back_and_forth_is_not_repeated() {
        let start = Instant::now();
        let mut pairs = Pairs::new(LATE, WAIT);
        for committed in ["1", "2"] {
            let update = || change("UPDATE", json!({"id": 1}), json!({}), committed);
            assert_eq!(pairs.received(Side::Relay, update(), start), None);
            assert_eq!(pairs.received(Side::Other, update(), start), None);
        }
        let third = change("UPDATE", json!({"id": 1}), json!({}), "3");
        assert_eq!(pairs.received(Side::Relay, third.clone(), start), None);
        assert_eq!(pairs.overdue(start + WAIT), [Difference::Missing(Side::Other, third)]);
    }

    #[test]
    fn old_rows_are_compared_by_the_columns_that_both_have() {
        let start = Instant::now();
        let mut pairs = Pairs::new(LATE, WAIT);
        let deleted = |old| change("DELETE", json!(null), old, "1");
        pairs.received(Side::Relay, deleted(json!({"id": 1, "text": "a"})), start);
        pairs.received(Side::Other, deleted(json!({"id": 1})), start);
        pairs.received(Side::Relay, deleted(json!({"id": 2})), start);
        pairs.received(Side::Other, deleted(json!({"id": 3})), start);
        assert_eq!(pairs.overdue(start + WAIT).len(), 2);
        assert_eq!(pairs.equal, 1);
    }
}
