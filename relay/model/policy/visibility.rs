//! Who may see what: verified identities, and what a change means to somebody who may see its images or not.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use crate::model::identity::claims::Claims;
use crate::model::row::change::Operation;

/// Verified claims, shared by everything that acts for the same token. Equal when the claims are, to the letter.
#[derive(Debug, Clone)]
pub struct Identity(Arc<Claims>);

impl Identity {
    /// Wraps verified claims.
    pub fn new(claims: Claims) -> Self {
        Self(Arc::new(claims))
    }

    /// The claims.
    pub fn claims(&self) -> &Claims {
        &self.0
    }
}

impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0 == other.0
    }
}

impl Eq for Identity {}

impl Hash for Identity {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

/// Whether the images of a change may be seen; an image that the change does not have counts as "no".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Visibility {
    /// The row as it was.
    pub before: bool,
    /// The row as it became.
    pub after: bool,
}

impl Visibility {
    /// Sees neither.
    pub const NONE: Self = Self { before: false, after: false };

    /// What both see.
    pub fn and(self, other: Self) -> Self {
        Self { before: self.before && other.before, after: self.after && other.after }
    }
}

/// Why images were denied without a judgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denied {
    /// The policy raised an error, for at least one of them.
    Raised,
    /// The claims make the policy raise, whatever the row is.
    Claims,
    /// PostgreSQL cannot read an image back, so that nothing is known of what the policy says.
    Unreadable,
    /// The policy took longer than the limit.
    TimedOut,
    /// A table that it reads is locked.
    Locked,
    /// The role cannot be taken, or the policy changed it.
    Role,
}

/// What a change means to one subscription.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EventKind {
    /// A row went out of sight: only its key is told.
    Leave,
    /// A row was deleted; the old row is told as far as the replica identity goes.
    Delete,
    /// A row came into sight by an update: the new row, of the old one only the key.
    Enter,
    /// A row changed in sight: the new row, and the old one as far as the replica identity goes.
    Update,
    /// A row came.
    Insert,
}

impl EventKind {
    /// As which operation it is told.
    pub fn operation(self) -> Operation {
        match self {
            Self::Insert => Operation::Insert,
            Self::Update | Self::Enter => Operation::Update,
            Self::Delete | Self::Leave => Operation::Delete,
        }
    }
}

/// What `operation` means to somebody with this sight of its images, if anything.
///
/// `leave_events`: the relation was watched with the wish to tell of rows that go out of sight.
pub fn event_kind(operation: Operation, sight: Visibility, leave_events: bool) -> Option<EventKind> {
    match (operation, sight.before, sight.after) {
        (Operation::Insert, _, true) => Some(EventKind::Insert),
        (Operation::Update, true, true) => Some(EventKind::Update),
        (Operation::Update, false, true) => Some(EventKind::Enter),
        (Operation::Update, true, false) if leave_events => Some(EventKind::Leave),
        (Operation::Delete, true, _) => Some(EventKind::Delete),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_operations_and_images() {
        let sees = |before, after| Visibility { before, after };
        let cases = [
            (Operation::Insert, sees(false, true), Some(EventKind::Insert)),
            (Operation::Insert, sees(false, false), None),
            (Operation::Update, sees(true, true), Some(EventKind::Update)),
            (Operation::Update, sees(false, true), Some(EventKind::Enter)),
            (Operation::Update, sees(true, false), None),
            (Operation::Update, sees(false, false), None),
            (Operation::Delete, sees(true, false), Some(EventKind::Delete)),
            (Operation::Delete, sees(false, false), None),
            (Operation::Truncate, sees(true, true), None),
        ];
        for (operation, sight, expected) in cases {
            assert_eq!(event_kind(operation, sight, false), expected, "{operation:?} {sight:?}");
            let with_leave = if (operation, sight) == (Operation::Update, sees(true, false)) {
                Some(EventKind::Leave)
            } else {
                expected
            };
            assert_eq!(event_kind(operation, sight, true), with_leave, "{operation:?} {sight:?}");
        }
    }
}
