//! The encodings of one change, reused by the next group that gets the same.

use std::cell::OnceCell;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};

use crate::feed::deliver::conflation::RowChange;
use crate::feed::deliver::frame::{Frame, PayloadText, SharedPayload};
use crate::feed::deliver::memory_budget::MemoryBudget;
use crate::model::codec::payload::{View, data, with_cursor};
use crate::model::codec::protocol::Codec;
use crate::model::log::cursor::{Cursor, Snapshot, Span};
use crate::model::policy::visibility::EventKind;
use crate::model::row::change::{Change, RelationId};

/// Maximum bytes of payloads kept alive for the next group. The last payload is kept in any case; older ones are
/// reused while a client's queue still holds them.
const KEPT_BYTES: usize = 512 * 1024;
/// Maximum number of payloads remembered per change.
const MAX_PAYLOADS: usize = 64;
/// Maximum bytes around a change in its frame: a topic of 1 KiB with every character escaped, a hundred ids, a
/// cursor.
const MAX_OVERHEAD: usize = 12 * 1024;

/// What the text of a change depends on: relation, role, selected columns, event kind, whether it has a cursor, whether it is
/// marked as the last of its transaction, and the base of the cursor when that is more than what lies before the
/// page.
type DataKey<'a> = (RelationId, &'a str, Option<&'a [String]>, EventKind, bool, bool, Option<&'a Snapshot>);

/// The encodings of one change.
pub struct EncodeCache<'a> {
    /// The cursor after the change, encoded on first use.
    cursor: OnceCell<String>,
    /// The same for readers whose cursors have a base: they have seen more than what lies before the page.
    based: HashMap<&'a Snapshot, String>,
    after: (&'a Span, i64, bool),
    /// `None` for a change that cannot be encoded.
    payloads: HashMap<DataKey<'a>, Option<Weak<PayloadText>>>,
    /// The last frame, which usually is the next one too.
    last: Option<(&'a Codec, Vec<u32>, DataKey<'a>, Frame)>,
}

/// The payloads used last, kept alive for the next group.
#[derive(Default)]
pub struct RecentPayloads {
    payloads: VecDeque<SharedPayload>,
    bytes: usize,
}

/// Why a change has no frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EncodeError {
    /// The image cannot be parsed.
    Unreadable,
    /// The memory budget is exhausted.
    NoRoom,
}

impl<'a> EncodeCache<'a> {
    /// Creates an empty cache for the change of this number; `last` when it is the last one of its page.
    pub fn new(span: &'a Span, number: i64, last: bool) -> Self {
        let after = (span, number, last);
        let (cursor, based) = (OnceCell::new(), HashMap::new());
        Self { cursor, based, after, payloads: HashMap::new(), last: None }
    }

    /// Returns the base that the cursors of a reader at this position need.
    pub fn base(&self, position: Option<&'a Cursor>) -> Option<&'a Snapshot> {
        position.and_then(|position| self.after.0.base(position))
    }

    /// Returns the cursor after the change for readers with this base.
    pub fn cursor(&mut self, base: Option<&'a Snapshot>) -> &str {
        let (span, number, last) = self.after;
        match base {
            None => self.cursor.get_or_init(|| span.after(number, last).to_string()),
            Some(seen) => self.based.entry(seen).or_insert_with(|| {
                span.after(number, last).merge(&Cursor::after(span.epoch, seen.clone())).to_string()
            }),
        }
    }

    /// Returns the frame of a change for channels with this codec and these ids, and a role with this view and base.
    ///
    /// # Errors
    /// When the change cannot be encoded, or does not fit in memory.
    pub fn frame(
        &mut self,
        codec: &'a Codec,
        ids: &[u32],
        change: &Change,
        (role, view, base): (&'a str, View<'a>, Option<&'a Snapshot>),
        budget: &Arc<MemoryBudget>,
        recent: &mut RecentPayloads,
    ) -> Result<Frame, EncodeError> {
        let base = base.filter(|_| view.exact);
        let key = (view.relation.id(), role, view.select, view.meaning, view.exact, view.is_last, base);
        if let Some((last_codec, last_ids, last, frame)) = &self.last
            && (*last_codec, &last_ids[..], *last) == (codec, ids, key)
        {
            return Ok(frame.clone());
        }
        let payload = self.payload(key, change, view, budget, recent)?;
        let operation = view.meaning.operation().name();
        let cursor = if view.exact { self.cursor(base) } else { "" };
        let row = codec.is_conflated().then(|| RowChange::of(change, view.relation, view.meaning)).flatten();
        let envelope = codec.encoding().envelope(ids, operation, cursor);
        let frame = Frame::row_change(envelope, payload, row, budget);
        self.last = Some((codec, ids.to_vec(), key, frame.clone()));
        Ok(frame)
    }

    fn payload(
        &mut self,
        key: DataKey<'a>,
        change: &Change,
        view: View<'a>,
        budget: &Arc<MemoryBudget>,
        recent: &mut RecentPayloads,
    ) -> Result<SharedPayload, EncodeError> {
        match self.payloads.get(&key) {
            Some(None) => return Err(EncodeError::Unreadable),
            Some(Some(known)) => {
                if let Some(payload) = known.upgrade() {
                    return Ok(payload);
                }
            }
            None => {}
        }
        if self.payloads.len() == MAX_PAYLOADS {
            self.payloads.clear();
        }
        let limit = budget.change_bytes().saturating_sub(MAX_OVERHEAD);
        let text = data(change, view, limit).map(|text| match view.exact {
            true => with_cursor(text, self.cursor(key.6)),
            false => text,
        });
        let Some(text) = text else {
            self.payloads.insert(key, None);
            return Err(EncodeError::Unreadable);
        };
        recent.make_room(text.len());
        if !budget.make_room(text.len()) {
            return Err(EncodeError::NoRoom);
        }
        let payload = PayloadText::new(text, change.committed, budget);
        self.payloads.insert(key, Some(Arc::downgrade(&payload)));
        recent.add(Arc::clone(&payload));
        Ok(payload)
    }
}

impl RecentPayloads {
    fn make_room(&mut self, bytes: usize) {
        while self.bytes + bytes > KEPT_BYTES
            && let Some(oldest) = self.payloads.pop_front()
        {
            self.bytes -= oldest.as_str().len();
        }
    }

    fn add(&mut self, payload: SharedPayload) {
        self.bytes += payload.as_str().len();
        self.payloads.push_back(payload);
    }
}
