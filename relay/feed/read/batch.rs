//! A batch: consecutive changes of one page.

use std::sync::Arc;

use crate::model::log::cursor::{Cursor, Span};
use crate::model::row::change::{Change, Operation};
use crate::postgres::changelog::transactions::Unfinished;

/// Consecutive changes of one page.
pub struct Batch {
    /// The changes, ascending by number.
    pub changes: Vec<Change>,
    /// The transactions that continue after this batch.
    pub unfinished: Unfinished,
    /// The page continues after this batch.
    pub more: bool,
    /// The page that the batch belongs to.
    pub span: Arc<Span>,
    /// The version mark of the policies at the end of the page, when it was read live.
    pub mark: Option<i64>,
}

impl Batch {
    /// Returns the position after the batch; `None` when it is empty.
    pub fn end(&self) -> Option<Cursor> {
        Some(self.span.after(self.changes.last()?.number, !self.more))
    }

    /// Returns whether the batch contains a change of the schema or of the set of watched relations.
    pub fn has_schema_changes(&self) -> bool {
        self.changes.iter().any(|change| matches!(change.operation, Operation::Schema | Operation::Gap))
    }

    /// Returns the approximate size of the row images in bytes.
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

    /// Builds a page with one change of this number, whose image has `bytes` bytes.
    pub(crate) fn batch(number: i64, bytes: usize) -> Arc<Batch> {
        let snapshot = |xmax| Snapshot::new(xmax, Vec::new()).unwrap();
        let span = Arc::new(Span { epoch: Epoch(1), seen: snapshot(1), until: snapshot(2) });
        let change = Change {
            number,
            xid: 1,
            committed: SystemTime::UNIX_EPOCH.into(),
            relation: RelationId::whole(1),
            leaf: None,
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
