//! Decoding of a client's WebSocket frames, and a limit on how much of their content is kept.

use std::sync::Arc;

use tokio_tungstenite::tungstenite::{Error as SocketError, Message as Frame};

use crate::feed::deliver::memory_budget::{MemoryBudget, Reserved};
use crate::model::codec::protocol::{FrameError, SocketProtocol};
use crate::model::session::join::Join;
use crate::model::session::machine::Session;
use crate::model::session::message::Incoming;

/// Maximum number of bytes kept for one client: topics, filters and tokens of all its channels.
const MAX_KEPT: usize = 1 << 20;
/// Number of these bytes that are not counted in the memory budget.
const UNCOUNTED: usize = 16 * 1024;

/// The refusal of a join whose topic, filters and token do not fit.
pub const NO_ROOM: &str =
    "ChannelRateLimitReached: The topics, filters and tokens of all channels are too long";

/// A decoded frame.
pub enum Inbound {
    /// A message.
    Message(Incoming),
    /// A frame that is no valid message.
    Unreadable(FrameError),
    /// A frame that needs no handling here, such as a pong.
    Ignored,
    /// The client closed the connection, or it is broken.
    Gone,
    /// A protocol error: the connection must be closed with this code and reason.
    Close(u16, &'static str),
}

/// Decodes a frame.
pub fn decode(protocol: &dyn SocketProtocol, frame: Option<Result<Frame, SocketError>>) -> Inbound {
    let message = match frame {
        None | Some(Ok(Frame::Close(_))) => return Inbound::Gone,
        Some(Err(SocketError::Capacity(_))) => return Inbound::Close(1009, "the message is too large"),
        Some(Err(SocketError::Utf8(_))) => return Inbound::Close(1007, "the text is not UTF-8"),
        Some(Err(SocketError::Protocol(_))) => {
            return Inbound::Close(1002, "this is not the WebSocket protocol");
        }
        Some(Err(_)) => return Inbound::Gone,
        Some(Ok(Frame::Text(text))) => protocol.decode_text(&text),
        Some(Ok(Frame::Binary(bytes))) => protocol.decode_binary(&bytes),
        Some(Ok(_)) => return Inbound::Ignored,
    };
    match message {
        Ok(message) => Inbound::Message(message),
        Err(error) => Inbound::Unreadable(error),
    }
}

/// Memory reserved for a client's topics, filters and tokens.
pub struct KeptMemory(Reserved);

impl KeptMemory {
    /// Creates the reservation of a new client: nothing.
    pub fn new(budget: &Arc<MemoryBudget>) -> Self {
        Self(budget.reserved())
    }

    /// Reserves memory for a join. Returns false if there is no room.
    pub fn reserve(&mut self, session: &Session, join: &Join) -> bool {
        let bytes = session.bytes() + join.bytes;
        bytes <= MAX_KEPT && self.0.resize(bytes.saturating_sub(UNCOUNTED))
    }

    /// Adjusts the reservation to what the session keeps now.
    pub fn update(&mut self, session: &Session) {
        self.0.resize(session.bytes().saturating_sub(UNCOUNTED));
    }
}
