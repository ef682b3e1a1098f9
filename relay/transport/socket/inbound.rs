//! What a client's WebSocket frames say, and how much of what it says may be kept.

use std::sync::Arc;

use tokio_tungstenite::tungstenite::{Error as SocketError, Message as Frame};

use crate::feed::deliver::memory_budget::{MemoryBudget, Reserved};
use crate::model::codec::phoenix::{
    Binary, FrameError, Message, Version, decode_binary, decode_large, decode_text,
};
use crate::model::session::join::{MOST_BYTES, MOST_TOPIC};
use crate::model::session::machine::Session;

/// Of its own words so much may be kept of one client: topics, filters, tokens of all its channels …
const KEPT: usize = 1 << 20;
/// … of which so much is what any client costs, and not counted.
const FREE: usize = 16 * 1024;

/// There is no room for what a join asks to keep.
pub const NO_ROOM: &str =
    "ChannelRateLimitReached: The topics, filters and tokens of all channels are too long";

/// What a frame says.
pub enum Inbound {
    /// A message.
    Message(Message),
    /// A join that is too large to be read.
    LargeJoin(Message),
    /// No message.
    Unreadable(FrameError),
    /// Nothing that is to be answered here.
    Nothing,
    /// The client ends the connection, or it is broken.
    Gone,
    /// The connection is to be closed with this code and reason.
    Close(u16, &'static str),
}

/// Understands a frame.
pub fn said(version: Version, frame: Option<Result<Frame, SocketError>>) -> Inbound {
    let message = match frame {
        None | Some(Ok(Frame::Close(_))) => return Inbound::Gone,
        Some(Err(SocketError::Capacity(_))) => return Inbound::Close(1009, "the message is too large"),
        Some(Err(SocketError::Utf8(_))) => return Inbound::Close(1007, "the text is not UTF-8"),
        Some(Err(SocketError::Protocol(_))) => {
            return Inbound::Close(1002, "this is not the WebSocket protocol");
        }
        Some(Err(_)) => return Inbound::Gone,
        Some(Ok(Frame::Text(text))) if text.len() > MOST_BYTES => {
            match decode_large(version, &text, MOST_BYTES) {
                Ok((message, true)) if message.event == "phx_join" => return Inbound::LargeJoin(message),
                outcome => outcome.map(|(message, _)| message),
            }
        }
        Some(Ok(Frame::Text(text))) => decode_text(version, &text),
        Some(Ok(Frame::Binary(bytes))) if bytes.len() > MOST_BYTES => Err(FrameError::TooLarge),
        Some(Ok(Frame::Binary(bytes))) => match decode_binary(version, &bytes) {
            Ok(Binary::Message(message)) => Ok(message),
            Ok(Binary::Opaque(_)) => return Inbound::Nothing,
            Err(error) => Err(error),
        },
        Some(Ok(_)) => return Inbound::Nothing,
    };
    message.map_or_else(Inbound::Unreadable, Inbound::Message)
}

/// Memory for what is kept of a client's own words.
pub struct Kept(Reserved);

impl Kept {
    /// For a client that said nothing yet.
    pub fn new(budget: &Arc<MemoryBudget>) -> Self {
        Self(budget.reserved())
    }

    /// Whether there is room for what a join asks to keep.
    pub fn may_keep(&mut self, session: &Session, join: &Message) -> bool {
        // Refused for that, with a better reason.
        if join.topic.len() > MOST_TOPIC {
            return true;
        }
        let bytes = session.bytes() + join.topic.len() + join.payload.to_string().len();
        bytes <= KEPT && self.0.resize(bytes.saturating_sub(FREE))
    }

    /// Counts what is kept now.
    pub fn keeps(&mut self, session: &Session) {
        self.0.resize(session.bytes().saturating_sub(FREE));
    }
}
