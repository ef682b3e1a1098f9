//! A frame queued for clients. The object of a change, common to many channels, is in memory once.

use std::sync::Arc;

use time::OffsetDateTime;

use crate::feed::deliver::conflation::RowChange;
use crate::feed::deliver::memory_budget::{Held, MemoryBudget};
use crate::model::codec::protocol::{Envelope, Notice, Wrapping};

/// Bytes counted for a frame beside its text: reference counts, queue slot, allocator overhead.
pub const FRAME_OVERHEAD: usize = 256;

/// A message for one or many clients. Counted until the last clone is dropped.
#[derive(Debug, Clone)]
pub struct Frame(Arc<CountedContent>);

#[derive(Debug)]
struct CountedContent {
    content: Content,
    /// The row of a change, for subscribers that want only the newest change of each.
    row: Option<RowChange>,
    _held: Held,
}

/// What a frame is.
#[derive(Debug)]
pub enum Content {
    /// The object of a change, and what is written with it.
    Change(Envelope, SharedPayload),
    /// A message that is not a change.
    Notice(Notice),
    /// A broadcast or the presence of a topic, and what is written around it.
    Push(Wrapping, SharedBytes),
    /// A ping with this payload, which the client returns.
    Ping([u8; 8]),
}

/// The part that many frames share. Counted until the last clone is dropped.
pub type SharedPayload = Arc<PayloadText>;

/// The text of a payload.
#[derive(Debug)]
pub struct PayloadText {
    text: String,
    /// When the change was written.
    written_at: OffsetDateTime,
    _held: Held,
}

impl PayloadText {
    /// Creates a shared text.
    pub fn new(text: String, written_at: OffsetDateTime, budget: &Arc<MemoryBudget>) -> SharedPayload {
        let held = budget.hold(FRAME_OVERHEAD + text.capacity());
        Arc::new(Self { text, written_at, _held: held })
    }

    /// Returns the text as it is sent.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// The content of a push, which all members of a topic share. Counted until the last clone is dropped.
pub type SharedBytes = Arc<CountedBytes>;

/// The bytes of a content.
#[derive(Debug)]
pub struct CountedBytes {
    bytes: Vec<u8>,
    _held: Held,
}

impl CountedBytes {
    /// Creates shared bytes.
    pub fn new(bytes: Vec<u8>, budget: &Arc<MemoryBudget>) -> SharedBytes {
        let held = budget.hold(FRAME_OVERHEAD + bytes.capacity());
        Arc::new(Self { bytes, _held: held })
    }
}

impl Frame {
    /// Creates a frame of one text.
    pub fn text(text: String, budget: &Arc<MemoryBudget>) -> Self {
        Self::notice(Notice::Text(text), budget)
    }

    /// Creates the frame of a notice.
    pub fn notice(notice: Notice, budget: &Arc<MemoryBudget>) -> Self {
        Self::new(Content::Notice(notice), budget)
    }

    /// Creates the frame of a change.
    pub fn change(envelope: Envelope, object: SharedPayload, budget: &Arc<MemoryBudget>) -> Self {
        Self::new(Content::Change(envelope, object), budget)
    }

    /// Creates the frame of a change of this row.
    pub fn row_change(
        envelope: Envelope,
        object: SharedPayload,
        row: Option<RowChange>,
        budget: &Arc<MemoryBudget>,
    ) -> Self {
        Self::with_row(Content::Change(envelope, object), row, budget)
    }

    /// Creates the frame of a push.
    pub fn push(wrapping: Wrapping, content: SharedBytes, budget: &Arc<MemoryBudget>) -> Self {
        Self::new(Content::Push(wrapping, content), budget)
    }

    /// Creates a ping.
    pub fn ping(payload: [u8; 8], budget: &Arc<MemoryBudget>) -> Self {
        Self::new(Content::Ping(payload), budget)
    }

    fn new(content: Content, budget: &Arc<MemoryBudget>) -> Self {
        Self::with_row(content, None, budget)
    }

    fn with_row(content: Content, row: Option<RowChange>, budget: &Arc<MemoryBudget>) -> Self {
        let row_len = row.as_ref().map_or(0, RowChange::key_bytes);
        let held = budget.hold(FRAME_OVERHEAD + content.own_len() + row_len);
        Self(Arc::new(CountedContent { content, row, _held: held }))
    }

    /// Returns the row that it is a change of, if the subscriber wants only the newest change of each.
    pub fn row(&self) -> Option<&RowChange> {
        self.0.row.as_ref()
    }

    /// Returns whether it is a push to the members of a topic.
    pub fn is_push(&self) -> bool {
        matches!(self.0.content, Content::Push(..))
    }

    /// Returns whether it tells that changes are missing.
    pub fn is_gap(&self) -> bool {
        matches!(self.0.content, Content::Notice(Notice::Gap { .. } | Notice::GapText(_)))
    }

    /// Returns when its change was written; `None` if it is no change.
    pub fn written_at(&self) -> Option<OffsetDateTime> {
        match &self.0.content {
            Content::Change(_, payload) => Some(payload.written_at),
            _ => None,
        }
    }

    /// Returns what it is.
    pub fn content(&self) -> &Content {
        &self.0.content
    }

    /// Returns the bytes to write, in pieces. For an [`Envelope::Cursor`] and the notices that the transport writes by
    /// itself, they are the object or the reason.
    pub fn pieces(&self) -> [&[u8]; 3] {
        let texts = match &self.0.content {
            Content::Change(Envelope::Text { before, after }, object) => [before, object.as_str(), after],
            Content::Change(Envelope::Cursor(_), object) => [object.as_str(), "", ""],
            Content::Notice(
                Notice::Text(text)
                | Notice::GapText(text)
                | Notice::Hidden(text)
                | Notice::PolicyError(text)
                | Notice::Gap { reason: text, .. },
            ) => [text, "", ""],
            Content::Push(Wrapping { before, after, .. }, content) => {
                return [before, &content.bytes, after.as_bytes()];
            }
            Content::Ping(payload) => return [payload, &[], &[]],
        };
        texts.map(str::as_bytes)
    }

    /// Returns the size of its pieces in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a frame is never empty")]
    pub fn len(&self) -> usize {
        self.pieces().iter().map(|piece| piece.len()).sum()
    }
}

impl Content {
    /// Returns the number of bytes that no other frame shares.
    fn own_len(&self) -> usize {
        match self {
            Self::Change(Envelope::Text { before, .. }, _) => before.len(),
            Self::Change(Envelope::Cursor(cursor), _) => cursor.len(),
            Self::Notice(
                Notice::Text(text) | Notice::GapText(text) | Notice::Hidden(text) | Notice::PolicyError(text),
            ) => text.len(),
            Self::Notice(Notice::Gap { reason, cursor }) => {
                reason.len() + cursor.as_ref().map_or(0, String::len)
            }
            Self::Push(wrapping, _) => wrapping.before.len(),
            Self::Ping(payload) => payload.len(),
        }
    }
}
