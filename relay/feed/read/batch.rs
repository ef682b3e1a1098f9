//! A batch of changes, in order: a piece of a page.

use std::sync::Arc;

use crate::model::log::cursor::{Cursor, Span};
use crate::model::row::change::{Change, Operation};
use crate::postgres::changelog::transactions::Unfinished;

/// A part of a page.
pub struct Batch {
    /// Its changes.
    pub changes: Vec<Change>,
    /// Which of their transactions go on after it.
    pub unfinished: Unfinished,
    /// The page goes on after it.
    pub more: bool,
    /// The page.
    pub span: Arc<Span>,
    /// The sign of the rules at the end of the page, where it was read live.
    pub mark: Option<i64>,
}

impl Batch {
    /// Where one stands after it; none when it is empty.
    pub fn end(&self) -> Option<Cursor> {
        Some(self.span.after(self.changes.last()?.number, !self.more))
    }

    /// Whether a change of the schema, or of what is watched, stands in it.
    pub fn is_news(&self) -> bool {
        self.changes.iter().any(|change| matches!(change.operation, Operation::Schema | Operation::Gap))
    }

    /// How many bytes its images have, about.
    pub fn bytes(&self) -> usize {
        self.changes.iter().map(|change| 100 + change.bytes()).sum()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::model::log::cursor::{Epoch, Snapshot};
    use crate::model::row::change::{ImageState, RelationId};

    /// A page with one change of this number, whose image has so many bytes.
    pub(crate) fn batch(number: i64, bytes: usize) -> Arc<Batch> {
        let snapshot = |xmax| Snapshot::new(xmax, Vec::new()).unwrap();
        let span = Arc::new(Span { epoch: Epoch(1), seen: snapshot(1), until: snapshot(2) });
        let change = Change {
            number,
            xid: 1,
            committed: SystemTime::UNIX_EPOCH.into(),
            relation: RelationId(1),
            shape: None,
            began: None,
            image_state: ImageState::Whole,
            operation: Operation::Insert,
            oversize: false,
            before: None,
            after: Some("x".repeat(bytes)),
        };
        let (unfinished, mark) = (Unfinished::new(), None);
        Arc::new(Batch { changes: vec![change], unfinished, more: false, span, mark })
    }
}
