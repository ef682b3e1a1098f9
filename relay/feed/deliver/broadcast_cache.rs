//! The encodings of one broadcast from the database, shared by the groups of its topic.

use std::sync::Arc;

use crate::feed::deliver::frame::{CountedBytes, Frame, PayloadText, SharedBytes};
use crate::feed::deliver::memory_budget::MemoryBudget;
use crate::model::codec::payload::{broadcast_object, with_cursor};
use crate::model::codec::protocol::{BroadcastForm, Codec, Envelope};
use crate::model::row::change::Change;
use crate::model::session::stored_broadcast::StoredBroadcast;

/// The encodings of one broadcast.
pub struct BroadcastCache<'a> {
    stored: &'a StoredBroadcast,
    /// The content, once a frame needs it.
    content: Option<SharedBytes>,
    /// The frames by their codec: clients of one topic have few.
    frames: Vec<(&'a Codec, Option<Frame>)>,
}

/// The memory budget is exhausted.
#[derive(Debug)]
pub struct NoRoom;

impl<'a> BroadcastCache<'a> {
    /// Creates an empty cache.
    pub fn new(stored: &'a StoredBroadcast) -> Self {
        Self { stored, content: None, frames: Vec::new() }
    }

    /// Returns the frame for channels with this codec; `None` if their clients cannot receive the broadcast. `cursor` is the
    /// position after it.
    ///
    /// # Errors
    /// When it does not fit in memory.
    pub fn frame(
        &mut self,
        codec: &'a Codec,
        change: &Change,
        is_last: bool,
        cursor: &str,
        budget: &Arc<MemoryBudget>,
    ) -> Result<Option<Frame>, NoRoom> {
        if let Some((_, frame)) = self.frames.iter().find(|(known, _)| *known == codec) {
            return Ok(frame.clone());
        }
        let frame = match codec.encoding().broadcast(self.stored) {
            BroadcastForm::Wrapped(wrapping) => Some(Frame::push(wrapping, self.content(budget)?, budget)),
            BroadcastForm::Refused(notice) => Some(Frame::notice(notice, budget)),
            BroadcastForm::Nothing => None,
            // Not kept: each reader has a cursor of its own.
            BroadcastForm::Object => {
                let object = with_cursor(broadcast_object(self.stored, change, is_last), cursor);
                if !budget.make_room(object.len()) {
                    return Err(NoRoom);
                }
                let envelope = Envelope::Cursor(cursor.to_owned());
                let object = PayloadText::new(object, change.committed, budget);
                return Ok(Some(Frame::change(envelope, object, budget)));
            }
        };
        self.frames.push((codec, frame.clone()));
        Ok(frame)
    }

    /// Returns the content, in memory once for all frames.
    fn content(&mut self, budget: &Arc<MemoryBudget>) -> Result<SharedBytes, NoRoom> {
        if let Some(content) = &self.content {
            return Ok(Arc::clone(content));
        }
        let bytes = &self.stored.broadcast.content;
        if !budget.make_room(bytes.len()) {
            return Err(NoRoom);
        }
        let content = CountedBytes::new(bytes.clone(), budget);
        self.content = Some(Arc::clone(&content));
        Ok(content)
    }
}
