//! Changes for event streams and polls: the object with its cursor. The transport writes what surrounds them, and observes stalls
//! by itself.

use crate::model::codec::protocol::{BroadcastForm, ChangeEncoding, Envelope, Notice};
use crate::model::session::stored_broadcast::StoredBroadcast;

/// The encoding for event streams and polls.
pub struct ChangeEvents;

impl ChangeEncoding for ChangeEvents {
    fn includes_cursor(&self) -> bool {
        true
    }

    fn envelope(&self, _: &[u32], _: &str, cursor: &str) -> Envelope {
        Envelope::Cursor(cursor.to_owned())
    }

    fn gap(&self, reason: &str, cursor: Option<&str>) -> Notice {
        Notice::Gap { reason: reason.to_owned(), cursor: cursor.map(str::to_owned) }
    }

    fn policy_error(&self, why: &str) -> Notice {
        Notice::PolicyError(why.to_owned())
    }

    fn hidden(&self, why: &str) -> Notice {
        Notice::Hidden(why.to_owned())
    }

    fn stall(&self, _: bool) -> Option<Notice> {
        None
    }

    fn broadcast(&self, _: &StoredBroadcast) -> BroadcastForm {
        BroadcastForm::Object
    }
}
