//! Writes frames into a socket, many in one system call, and keeps nothing of them.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::ErrorKind;

use bytes::Bytes;
use futures_util::{FutureExt, SinkExt};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;

/// Frames are written together up to this size.
const TOGETHER: usize = 64 * 1024;
/// A client's queue keeps room for this many frames: enough for steady changes, little for an idle client.
const ROOM: usize = 16;
/// The first byte of a ping; no text begins with it.
const PING: u8 = 0x89;

thread_local! {
    /// Where frames are put together for one system call: a thread's, as nothing stays in it when the call is done.
    static WRITTEN: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A client's connection after the handshake.
pub type Socket = WebSocketStream<TcpStream>;

/// The connection is broken.
#[derive(Debug)]
pub struct Broken;

/// What is on its way into one socket.
///
/// Past the library, which would copy each frame into a buffer of this client's own, and keep that for good.
#[derive(Default)]
pub struct Writer {
    /// Texts, and pings as [`ping`] makes them, that are not written yet.
    pub frames: VecDeque<Bytes>,
    /// The end of a frame that the socket has not taken yet. Nothing else may be written before it.
    rest: Vec<u8>,
    /// The library may have something to say by itself: a pong.
    answers: bool,
}

impl Writer {
    /// Something was read: the library may want to answer it.
    pub fn heard(&mut self) {
        self.answers = true;
    }

    /// Whether a frame was begun and not ended.
    pub fn is_amid_a_frame(&self) -> bool {
        !self.rest.is_empty()
    }

    /// Writes all frames, however long that takes.
    ///
    /// # Errors
    /// When the connection is broken.
    pub async fn write(&mut self, socket: &mut Socket) -> Result<(), Broken> {
        while !self.write_now(socket)? {
            socket.flush().await.map_err(|_| Broken)?;
            socket.get_ref().writable().await.map_err(|_| Broken)?;
        }
        Ok(())
    }

    /// Writes what the socket takes at once; true when that was everything.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn write_now(&mut self, socket: &mut Socket) -> Result<bool, Broken> {
        // An answer of the library's own must not end up inside a frame of ours.
        if self.answers {
            match socket.flush().now_or_never() {
                Some(flushed) => flushed.map_err(|_| Broken)?,
                None => return Ok(false),
            }
            self.answers = false;
        }
        let stream = socket.get_ref();
        if !self.rest.is_empty() {
            let count = write_some(stream, &self.rest)?;
            self.rest.drain(..count);
            if !self.rest.is_empty() {
                return Ok(false);
            }
            self.rest = Vec::new();
        }
        WRITTEN.with_borrow_mut(|written| {
            while !self.frames.is_empty() {
                written.clear();
                while written.len() < TOGETHER
                    && let Some(frame) = self.frames.pop_front()
                {
                    put(written, &frame);
                }
                let count = write_some(stream, written)?;
                self.rest.extend_from_slice(&written[count..]);
                written.shrink_to(2 * TOGETHER);
                if !self.rest.is_empty() {
                    return Ok(false);
                }
            }
            self.frames.shrink_to(ROOM);
            Ok(true)
        })
    }
}

/// A ping with a number as its payload, to be queued among texts.
pub fn ping(number: u64) -> Bytes {
    let mut frame = vec![PING, 8];
    frame.extend_from_slice(&number.to_be_bytes());
    frame.into()
}

/// One frame as a server writes it: a text, or a ping that is one already.
fn put(written: &mut Vec<u8>, frame: &[u8]) {
    if frame.first() != Some(&PING) {
        written.push(0x81);
        match frame.len() {
            length @ 0..126 => written.push(length as u8),
            length @ 126..0x1_0000 => {
                written.push(126);
                written.extend_from_slice(&(length as u16).to_be_bytes());
            }
            length => {
                written.push(127);
                written.extend_from_slice(&(length as u64).to_be_bytes());
            }
        }
    }
    written.extend_from_slice(frame);
}

/// How much of it the socket takes at once.
fn write_some(stream: &TcpStream, bytes: &[u8]) -> Result<usize, Broken> {
    match stream.try_write(bytes) {
        Ok(count) => Ok(count),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
        Err(_) => Err(Broken),
    }
}
