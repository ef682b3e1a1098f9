//! Verified identities, the visibility of a change's images, and the event that results for a subscriber.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use crate::model::identity::claims::Claims;
use crate::model::row::change::Operation;

/// Verified claims, shared by all users of a token. Equal when the text of the claims is equal.
#[derive(Debug, Clone)]
pub struct Identity(Arc<Claims>);

impl Identity {
    /// Wraps verified claims.
    pub fn new(claims: Claims) -> Self {
        Self(Arc::new(claims))
    }

    /// Returns the claims.
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

/// Which images of a change are visible; an image that the change lacks is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Visibility {
    /// The row before the change.
    pub before: bool,
    /// The row after the change.
    pub after: bool,
}

impl Visibility {
    /// Neither image.
    pub const NONE: Self = Self { before: false, after: false };

    /// Returns the images that are visible in both.
    pub fn and(self, other: Self) -> Self {
        Self { before: self.before && other.before, after: self.after && other.after }
    }
}

/// The reason why images were denied without a result of the policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denied {
    /// The policy raised an error for at least one of them.
    Raised,
    /// The claims make the policy raise, whatever the row is.
    Claims,
    /// PostgreSQL cannot parse an image, so the policy's result is unknown.
    Unreadable,
    /// The policy exceeded the time limit.
    TimedOut,
    /// A table that the policy reads is locked.
    Locked,
    /// The role could not be set, or the policy changed it.
    Role,
}

/// The event that a change is for one subscription.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EventKind {
    /// A row left the subscriber's visibility: the event has only its key.
    Leave,
    /// A row was deleted: the event has the old row as far as the replica identity goes.
    Delete,
    /// A row became visible by an update: the event has the new row, and the old row's key.
    Enter,
    /// A visible row changed: the event has the new row, and the old one as far as the replica identity goes.
    Update,
    /// A row was inserted.
    Insert,
}

impl EventKind {
    /// Returns the operation under which the event is sent.
    pub fn operation(self) -> Operation {
        match self {
            Self::Insert => Operation::Insert,
            Self::Update | Self::Enter => Operation::Update,
            Self::Delete | Self::Leave => Operation::Delete,
        }
    }
}

/// Returns the event for a subscriber with this visibility of the images, if any.
///
/// `leave_events`: whether the relation is watched with leave events.
pub fn event_kind(operation: Operation, visibility: Visibility, leave_events: bool) -> Option<EventKind> {
    match (operation, visibility.before, visibility.after) {
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
    fn events_by_operation_and_visibility() {
        let visible = |before, after| Visibility { before, after };
        let cases = [
            (Operation::Insert, visible(false, true), Some(EventKind::Insert)),
            (Operation::Insert, visible(false, false), None),
            (Operation::Update, visible(true, true), Some(EventKind::Update)),
            (Operation::Update, visible(false, true), Some(EventKind::Enter)),
            (Operation::Update, visible(true, false), None),
            (Operation::Update, visible(false, false), None),
            (Operation::Delete, visible(true, false), Some(EventKind::Delete)),
            (Operation::Delete, visible(false, false), None),
            (Operation::Truncate, visible(true, true), None),
        ];
        for (operation, visibility, expected) in cases {
            assert_eq!(event_kind(operation, visibility, false), expected, "{operation:?} {visibility:?}");
            let with_leave = if (operation, visibility) == (Operation::Update, visible(true, false)) {
                Some(EventKind::Leave)
            } else {
                expected
            };
            assert_eq!(event_kind(operation, visibility, true), with_leave, "{operation:?} {visibility:?}");
        }
    }
}
