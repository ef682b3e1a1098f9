//! Writes frames into a socket, many in one system call, and keeps nothing of them.

use std::cell::RefCell;
use std::io::{ErrorKind, IoSlice};

use bytes::Bytes;
use futures_util::{FutureExt, SinkExt};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;

use crate::feed::deliver::frame::Frame;
use crate::feed::deliver::outbox::{Hand, Outbox};
use crate::transport::intake::Intake;

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
pub type Socket = WebSocketStream<Intake>;

/// The connection is broken.
#[derive(Debug)]
pub struct Broken;

/// Writes into one socket what is in the hand of its outbox: texts, and pings as [`ping`] makes them.
///
/// Past the library, which would copy each frame into a buffer of this client's own, and keep that for good.
#[derive(Default)]
pub struct Writer {
    /// How many bytes of the first frame the socket has taken, its head included. Nothing else may be written before the
    /// others.
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
    pub fn forget(&mut self, outbox: &Outbox) {
        outbox.hand().frames.truncate(usize::from(self.begun > 0));
    }

    /// How many bytes are not written.
    pub fn left(&self, outbox: &Outbox) -> usize {
        outbox.hand().frames.iter().map(Frame::len).sum::<usize>().saturating_sub(self.begun)
    }

    /// Whether a frame was begun and not ended.
    pub fn is_amid_a_frame(&self) -> bool {
        self.begun > 0
    }

    /// Writes all frames, however long that takes.
    ///
    /// # Errors
    /// When the connection is broken.
    pub async fn write(&mut self, socket: &mut Socket, outbox: &Outbox) -> Result<(), Broken> {
        while !self.write_now(socket, outbox)? {
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
        socket.get_ref().stream().writable().await.map_err(|_| Broken)
    }

    /// Writes what the socket takes at once; true when that was everything.
    ///
    /// # Errors
    /// When the connection is broken, or the rest of a frame that was begun was taken away.
    pub fn write_now(&mut self, socket: &mut Socket, outbox: &Outbox) -> Result<bool, Broken> {
        // An answer of the library's own must not end up inside a frame of ours.
        if self.answers {
            match socket.flush().now_or_never() {
                Some(flushed) => flushed.map_err(|_| Broken)?,
                None => return Ok(false),
            }
            self.answers = false;
        }
        let mut hand = outbox.hand();
        if hand.is_evicted && self.begun > 0 {
            return Err(Broken);
        }
        while let Some(first) = hand.frames.front() {
            let whole = match first.len() > TOGETHER {
                true => self.write_large(socket.get_ref().stream(), &mut hand)?,
                false => {
                    let stream = socket.get_ref().stream();
                    WRITTEN.with_borrow_mut(|written| self.write_together(stream, &mut hand, written))?
                }
            };
            if !whole {
                return Ok(false);
            }
        }
        hand.frames.shrink_to(ROOM);
        Ok(true)
    }

    /// Writes the first frame as it is, without putting it together; true when the socket took all of it.
    fn write_large(&mut self, stream: &TcpStream, hand: &mut Hand) -> Result<bool, Broken> {
        let Some(first) = hand.frames.front() else { return Ok(true) };
        let mut start = Vec::with_capacity(10);
        put_start(&mut start, first);
        let [head, payload, tail] = first.pieces();
        let mut pieces = [&start[..], head, payload, tail].map(IoSlice::new);
        let mut left = &mut pieces[..];
        IoSlice::advance_slices(&mut left, self.begun);
        let length: usize = left.iter().map(|piece| piece.len()).sum();
        let count = taken(stream.try_write_vectored(left))?;
        self.took(count, hand);
        Ok(count == length)
    }

    /// Writes the next frames in one call; true when the socket took them all.
    fn write_together(
        &mut self,
        stream: &TcpStream,
        hand: &mut Hand,
        written: &mut Vec<u8>,
    ) -> Result<bool, Broken> {
        written.clear();
        for frame in hand.frames.iter().take_while(|frame| frame.len() <= TOGETHER) {
            put_start(written, frame);
            frame.pieces().into_iter().for_each(|piece| written.extend_from_slice(piece));
            if written.len() >= TOGETHER {
                break;
            }
        }
        let left = &written[self.begun..];
        let count = taken(stream.try_write(left))?;
        let whole = count == left.len();
        written.shrink_to(2 * TOGETHER);
        self.took(count, hand);
        Ok(whole)
    }

    /// The socket took so many bytes more.
    fn took(&mut self, count: usize, hand: &mut Hand) {
        self.begun += count;
        while let Some(first) = hand.frames.front()
            && let Some(left) = self.begun.checked_sub(start_length(first) + first.len())
        {
            self.begun = left;
            hand.frames.pop_front();
        }
    }
}

/// A ping with a number as its payload, to be queued among texts.
pub fn ping(number: u64) -> Bytes {
    let mut frame = vec![PING, 8];
    frame.extend_from_slice(&number.to_be_bytes());
    frame.into()
}

/// What a server writes before a frame: of a text its length, of a ping, which is whole already, nothing.
fn put_start(written: &mut Vec<u8>, frame: &Frame) {
    let length = frame.len();
    match start_length(frame) {
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
}

/// How many bytes stand before it in the socket.
fn start_length(frame: &Frame) -> usize {
    match frame.len() {
        _ if frame.head().first() == Some(&PING) => 0,
        0..126 => 2,
        126..0x1_0000 => 4,
        _ => 10,
    }
}

/// How much the socket took at once.
fn taken(written: std::io::Result<usize>) -> Result<usize, Broken> {
    match written {
        Ok(count) => Ok(count),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
        Err(_) => Err(Broken),
    }
}
