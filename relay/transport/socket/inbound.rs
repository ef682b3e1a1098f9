//! Decoding of a client's WebSocket frames.

use tokio_tungstenite::tungstenite::{Error as SocketError, Message as Frame};

use crate::model::codec::protocol::{FrameError, SocketProtocol};
use crate::model::session::message::Incoming;

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
