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
/// The first byte of a text, whole.
const TEXT: u8 = 0x81;

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
    /// How many bytes of the first of them the socket has taken, its head included. Nothing else may be written before
    /// the others.
    begun: usize,
    /// The library may have something to say by itself: a pong.
    answers: bool,
}

impl Writer {
    /// Something was read: the library may want to answer it.
    pub fn heard(&mut self) {
        self.answers = true;
    }

    /// Gives up what is not written, but for a frame that was begun.
    pub fn forget(&mut self) {
        self.frames.truncate(usize::from(self.begun > 0));
    }

    /// How many bytes are not written.
    pub fn left(&self) -> usize {
        self.frames.iter().map(Bytes::len).sum::<usize>().saturating_sub(self.begun)
    }

    /// Whether a frame was begun and not ended.
    pub fn is_amid_a_frame(&self) -> bool {
        self.begun > 0
    }

    /// Writes all frames, however long that takes.
    ///
    /// # Errors
    /// When the connection is broken.
    pub async fn write(&mut self, socket: &mut Socket) -> Result<(), Broken> {
        while !self.write_now(socket)? {
            Self::room(socket).await?;
        }
        Ok(())
    }

    /// Waits until the socket takes something.
    ///
    /// # Errors
    /// When the connection is broken.
    pub async fn room(socket: &mut Socket) -> Result<(), Broken> {
        socket.flush().await.map_err(|_| Broken)?;
        socket.get_ref().writable().await.map_err(|_| Broken)
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
        while let Some(first) = self.frames.front() {
            let head = head_length(first);
            let whole = if self.begun > head {
                // What is left of a large frame is not put together again and again.
                let left = &first[self.begun - head..];
                let count = write_some(socket.get_ref(), left)?;
                let whole = count == left.len();
                self.took(count);
                whole
            } else {
                WRITTEN.with_borrow_mut(|written| self.write_together(socket.get_ref(), written))?
            };
            if !whole {
                return Ok(false);
            }
        }
        self.frames.shrink_to(ROOM);
        Ok(true)
    }

    /// Writes the next frames in one call; true when the socket took them all.
    fn write_together(&mut self, stream: &TcpStream, written: &mut Vec<u8>) -> Result<bool, Broken> {
        written.clear();
        for frame in &self.frames {
            put(written, frame);
            if written.len() >= TOGETHER {
                break;
            }
        }
        let left = &written[self.begun..];
        let count = write_some(stream, left)?;
        let whole = count == left.len();
        written.shrink_to(2 * TOGETHER);
        self.took(count);
        Ok(whole)
    }

    /// The socket took so many bytes more.
    fn took(&mut self, count: usize) {
        self.begun += count;
        while let Some(first) = self.frames.front()
            && let Some(left) = self.begun.checked_sub(head_length(first) + first.len())
        {
            self.begun = left;
            self.frames.pop_front();
        }
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
    let length = frame.len();
    match head_length(frame) {
        0 => {}
        2 => written.extend_from_slice(&[TEXT, length as u8]),
        4 => {
            written.extend_from_slice(&[TEXT, 126]);
            written.extend_from_slice(&(length as u16).to_be_bytes());
        }
        _ => {
            written.extend_from_slice(&[TEXT, 127]);
            written.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    written.extend_from_slice(frame);
}

/// How many bytes stand before it in the socket.
fn head_length(frame: &[u8]) -> usize {
    match frame.len() {
        _ if frame.first() == Some(&PING) => 0,
        0..126 => 2,
        126..0x1_0000 => 4,
        _ => 10,
    }
}

/// How much of it the socket takes at once.
fn write_some(stream: &TcpStream, bytes: &[u8]) -> Result<usize, Broken> {
    match stream.try_write(bytes) {
        Ok(count) => Ok(count),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
        Err(_) => Err(Broken),
    }
}
