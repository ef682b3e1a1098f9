//! The latest state of each row, every so often: changes that wait for one client are reduced to the newest one of each key.
//!
//! What a client that holds rows by key has after the reduced changes is what it would have after all of them. A position between two
//! of them is as exact as one between two changes: nothing that is left out is after it without a newer change of the same row
//! that is after it, too.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::feed::deliver::frame::{Content, Frame, PayloadText};
use crate::feed::deliver::memory_budget::MemoryBudget;
use crate::model::catalog::relation::Relation;
use crate::model::codec::payload::with_newer_row;
use crate::model::codec::protocol::Envelope;
use crate::model::policy::visibility::EventKind;
use crate::model::row::change::{Change, RelationId, Row};

/// Rows and bytes held, beyond which they are delivered before they are due.
const MAX_ROWS: usize = 10_000;
const MAX_BYTES: usize = 1 << 20;
/// Frames and bytes below which nothing is reduced before it is due.
const MIN_FRAMES: usize = 1024;
const MIN_BYTES: usize = MAX_BYTES / 4;

/// The row that a change is of, and what it does with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowChange {
    relation: RelationId,
    /// The values of its key, as JSON, in order of the columns.
    key: Box<str>,
    kind: EventKind,
}

impl RowChange {
    /// Returns the row of a change, as a subscriber sees it. `None` if it is not one row: the table has no key, or the change gives the
    /// row another one.
    pub fn of(change: &Change, relation: &Relation, kind: EventKind) -> Option<Self> {
        let key = |image: &Option<_>| key_of(Option::as_deref(image)?, relation);
        let key = match kind {
            EventKind::Insert | EventKind::Enter => key(&change.after)?,
            EventKind::Delete | EventKind::Leave => key(&change.before)?,
            EventKind::Update => {
                key(&change.after).filter(|after| key(&change.before).as_ref() == Some(after))?
            }
        };
        Some(Self { relation: relation.id(), key: key.into(), kind })
    }

    /// Returns the size of its key in bytes.
    pub fn key_bytes(&self) -> usize {
        self.key.len()
    }
}

fn key_of(image: &str, relation: &Relation) -> Option<String> {
    let row = Row::parse(image).ok()?;
    let values: Option<Vec<&str>> = relation.key.iter().map(|column| row.value(column)).collect();
    values.filter(|values| !values.is_empty()).map(|values| values.join(","))
}

/// Decides when the frames that wait for a client are delivered, and reduces them.
#[derive(Debug)]
pub struct Conflation {
    interval: Duration,
    due: Instant,
    /// Frames at the front that are being delivered.
    released: usize,
    /// Frames that were looked at since the last delivery, and their bytes.
    seen: usize,
    bytes: usize,
    /// Frames and bytes at which they are reduced again.
    reduce_at: (usize, usize),
}

impl Conflation {
    /// Creates one that delivers at most once in each interval. What comes after a longer pause is delivered at once.
    pub fn new(interval: Duration) -> Self {
        let due = Instant::now();
        Self { interval, due, released: 0, seen: 0, bytes: 0, reduce_at: (MIN_FRAMES, MIN_BYTES) }
    }

    /// Returns when what is held is delivered.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Returns whether the first frame is to be delivered now, and how many frames were left out by that. A frame that is no change of
    /// one row, such as a gap, is delivered at once, with what came before it.
    pub fn release(&mut self, frames: &mut VecDeque<Frame>, budget: &Arc<MemoryBudget>) -> (bool, usize) {
        if frames.is_empty() {
            (self.released, self.seen, self.bytes) = (0, 0, 0);
            return (false, 0);
        }
        if self.released > 0 {
            return (true, 0);
        }
        let mut has_other = false;
        for frame in frames.iter().skip(self.seen) {
            has_other |= frame.row().is_none();
            self.bytes += frame.len();
        }
        self.seen = frames.len();
        let is_due = has_other || Instant::now() >= self.due;
        if !is_due && self.seen < self.reduce_at.0 && self.bytes < self.reduce_at.1 {
            return (false, 0);
        }
        let before = frames.len();
        conflate(frames, budget);
        let left_out = before - frames.len();
        (self.seen, self.bytes) = (frames.len(), frames.iter().map(Frame::len).sum());
        if !is_due && self.seen <= MAX_ROWS && self.bytes <= MAX_BYTES {
            self.reduce_at = ((2 * self.seen).max(MIN_FRAMES), (2 * self.bytes).max(MIN_BYTES));
            return (false, left_out);
        }
        self.released = frames.len();
        (self.seen, self.bytes, self.reduce_at) = (0, 0, (MIN_FRAMES, MIN_BYTES));
        self.due = Instant::now() + self.interval;
        (self.released > 0, left_out)
    }

    /// Returns the bytes of the frames that are held back.
    pub fn held_bytes(&self) -> usize {
        self.bytes
    }

    /// Whether the first frame is to be delivered now.
    pub fn is_releasing(&self) -> bool {
        self.released > 0
    }

    /// Records that the first frame was delivered.
    pub fn delivered(&mut self) {
        self.released = self.released.saturating_sub(1);
    }
}

/// What is kept of a row's changes: at most a deletion, and after it what the row is now.
#[derive(Default)]
struct Kept {
    deletion: Option<usize>,
    latest: Option<usize>,
}

/// Reduces frames in order. A change of a row takes the place of the one before, with these exceptions:
/// - An update of a row that was inserted meanwhile is an insert with the new row, in the place of the insert: a reader that
///   continues from a position before that place is told the insert again.
/// - An insert does not take the place of a deletion: a client that keeps rows in a list would have the row twice.
///
/// Nothing is moved across a frame that is no change of one row.
fn conflate(frames: &mut VecDeque<Frame>, budget: &Arc<MemoryBudget>) {
    let mut slots: Vec<Option<Frame>> = Vec::with_capacity(frames.len());
    let mut rows: HashMap<(RelationId, Box<str>), Kept> = HashMap::new();
    for frame in frames.drain(..) {
        let Some(RowChange { relation, key, kind }) = frame.row().cloned() else {
            rows.clear();
            slots.push(Some(frame));
            continue;
        };
        let kept = rows.entry((relation, key)).or_default();
        let last = kept.latest.and_then(|at| Some((at, slots[at].clone()?)));
        let is_deletion = matches!(kind, EventKind::Delete | EventKind::Leave);
        match last {
            Some((at, insert)) if !is_deletion && insert.is_insert() => {
                if let Some(merged) = merged(&insert, &frame, budget) {
                    slots[at] = Some(merged);
                    continue;
                }
            }
            Some((at, _)) => slots[at] = None,
            None => {}
        }
        let place = Some(slots.len());
        if is_deletion {
            if let Some(earlier) = kept.deletion {
                slots[earlier] = None;
            }
            *kept = Kept { deletion: place, latest: None };
        } else {
            kept.latest = place;
        }
        slots.push(Some(frame));
    }
    frames.extend(slots.into_iter().flatten());
}

/// Returns the frame of an insert with the row of a later change.
fn merged(insert: &Frame, update: &Frame, budget: &Arc<MemoryBudget>) -> Option<Frame> {
    let (Content::Change(Envelope::Cursor(cursor), older), Content::Change(_, newer)) =
        (insert.content(), update.content())
    else {
        return None;
    };
    let text = with_newer_row(older.as_str(), newer.as_str())?;
    let object = PayloadText::new(text, update.written_at()?, budget);
    Some(Frame::row_change(Envelope::Cursor(cursor.clone()), object, insert.row().cloned(), budget))
}

impl Frame {
    fn is_insert(&self) -> bool {
        self.row().is_some_and(|row| row.kind == EventKind::Insert)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: EventKind, key: &str, value: u32, budget: &Arc<MemoryBudget>) -> Frame {
        let (name, rows) = match kind {
            EventKind::Insert => ("INSERT", format!(r#""record":{{"k":"{key}","v":{value}}}"#)),
            EventKind::Update | EventKind::Enter => {
                ("UPDATE", format!(r#""record":{{"k":"{key}","v":{value}}},"old_record":{{"k":"{key}"}}"#))
            }
            EventKind::Delete | EventKind::Leave => ("DELETE", format!(r#""old_record":{{"k":"{key}"}}"#)),
        };
        let text = format!(
            r#"{{"schema":"s","table":"t","commit_timestamp":"x","txid":"1","number":"{value}","type":"{name}","columns":[],{rows},"errors":null,"cursor":"c{value}"}}"#
        );
        let row = RowChange { relation: RelationId::whole(7), key: key.into(), kind };
        let object = PayloadText::new(text, time::OffsetDateTime::UNIX_EPOCH, budget);
        Frame::row_change(Envelope::Cursor(format!("c{value}")), object, Some(row), budget)
    }

    /// What is left of changes, each as a letter and its key; the values count up.
    fn left(changes: &str) -> String {
        let budget = Arc::new(MemoryBudget::new(usize::MAX));
        let mut frames: VecDeque<Frame> = changes
            .split(' ')
            .zip(1..)
            .map(|(change, value)| {
                let kind = match &change[..1] {
                    "i" => EventKind::Insert,
                    "u" => EventKind::Update,
                    "e" => EventKind::Enter,
                    "d" => EventKind::Delete,
                    "l" => EventKind::Leave,
                    _ => return Frame::text(String::from("gap"), &budget),
                };
                frame(kind, &change[1..], value, &budget)
            })
            .collect();
        conflate(&mut frames, &budget);
        let line = |frame: &Frame| match frame.content() {
            Content::Change(Envelope::Cursor(cursor), object) => {
                let object: serde_json::Value = serde_json::from_str(object.as_str()).unwrap();
                assert_eq!(object["cursor"], cursor.as_str());
                let record = object.get("record").or(object.get("old_record")).unwrap();
                let kind = object["type"].as_str().unwrap()[..1].to_lowercase();
                format!("{kind}{}{}@{}", record["k"].as_str().unwrap(), record["v"], &cursor[1..])
                    .replace("null", "")
            }
            _ => String::from("gap"),
        };
        frames.iter().map(line).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_newest_change_of_each_row_is_left_in_order_of_their_positions() {
        for (changes, expected) in [
            ("ua ub ua", "ub2@2 ua3@3"),
            ("ia ua ub ua", "ia4@1 ub3@3"),
            ("ia ua da", "da@3"),
            ("ua da", "da@2"),
            ("da ia ua", "da@1 ia3@2"),
            ("da ia da", "da@3"),
            ("da ea ua", "da@1 ua3@3"),
            ("la ea", "da@1 ua2@2"),
            ("ia da ia ua db", "da@2 ia4@3 db@5"),
            ("ua gap ua ua", "ua1@1 gap ua4@4"),
            ("ia gap ua", "ia1@1 gap ua3@3"),
        ] {
            assert_eq!(left(changes), expected, "{changes}");
        }
    }
}
