//! Writes frames into a socket, many in one system call, without a buffer for each client.

use std::cell::RefCell;
use std::io::{ErrorKind, IoSlice};

use futures_util::{FutureExt, SinkExt};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;

use crate::feed::deliver::frame::{Content, Frame};
use crate::feed::deliver::outbox::Outbox;
use crate::feed::deliver::queue::InFlight;
use crate::observe::Sent;
use crate::transport::intake::Intake;

/// Maximum size in bytes of frames that are copied together for one system call.
const MAX_BATCH: usize = 64 * 1024;
/// Capacity that an empty queue keeps, in frames: enough for steady changes, little for an idle client.
const KEPT_CAPACITY: usize = 16;
/// The first byte of a WebSocket ping frame.
const PING: u8 = 0x89;
/// The first byte of an unfragmented WebSocket text frame.
const TEXT: u8 = 0x81;
/// The first byte of an unfragmented WebSocket binary frame.
const BINARY: u8 = 0x82;

thread_local! {
    /// Buffer in which frames are joined for one system call. One for each thread, because it is empty between calls.
    static BATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A client's connection after the handshake.
pub type Socket = WebSocketStream<Intake>;

/// The connection is broken.
#[derive(Debug)]
pub struct Broken;

/// Writes the frames taken from an outbox into its socket: texts, bytes and pings.
///
/// It bypasses the WebSocket library, which would copy each frame into a buffer for each client and never shrink it.
#[derive(Default)]
pub struct Writer {
    /// Number of bytes of the first frame that are written, including its header. Nothing else may be written before the rest.
    written: usize,
    /// Whether the library may have a frame of its own to write: a pong or a close frame.
    flush_needed: bool,
    /// What was written since it was taken last.
    sent: Sent,
}

impl Writer {
    /// Marks that a frame was read, which the library may have to answer.
    pub fn frame_read(&mut self) {
        self.flush_needed = true;
    }

    /// Returns what was written since the last call.
    pub fn take_sent(&mut self) -> Sent {
        std::mem::take(&mut self.sent)
    }

    /// Drops all frames except a partly written one.
    pub fn discard(&mut self, outbox: &Outbox) {
        outbox.in_flight().frames.truncate(usize::from(self.written > 0));
    }

    /// Returns the number of unwritten bytes.
    pub fn left(&self, outbox: &Outbox) -> usize {
        outbox.in_flight().frames.iter().map(Frame::len).sum::<usize>().saturating_sub(self.written)
    }

    /// Whether a frame is partly written.
    pub fn is_within_frame(&self) -> bool {
        self.written > 0
    }

    /// Writes all frames. Has no time limit.
    ///
    /// # Errors
    /// If the connection is broken.
    pub async fn write(&mut self, socket: &mut Socket, outbox: &Outbox) -> Result<(), Broken> {
        while !self.write_now(socket, outbox)? {
            Self::writable(socket).await?;
        }
        Ok(())
    }

    /// Waits until the socket is writable.
    ///
    /// # Errors
    /// If the connection is broken.
    pub async fn writable(socket: &mut Socket) -> Result<(), Broken> {
        socket.flush().await.map_err(|_| Broken)?;
        socket.get_ref().stream().writable().await.map_err(|_| Broken)
    }

    /// Writes as much as the socket accepts without waiting. Returns true if everything was written.
    ///
    /// # Errors
    /// If the connection is broken, or the rest of a partly written frame was evicted.
    pub fn write_now(&mut self, socket: &mut Socket, outbox: &Outbox) -> Result<bool, Broken> {
        // Flush the library's own frames first: they must not be written inside one of ours.
        if self.flush_needed {
            match socket.flush().now_or_never() {
                Some(flushed) => flushed.map_err(|_| Broken)?,
                None => return Ok(false),
            }
            self.flush_needed = false;
        }
        let mut in_flight = outbox.in_flight();
        if in_flight.is_evicted && self.written > 0 {
            return Err(Broken);
        }
        while let Some(first) = in_flight.frames.front() {
            let whole = match first.len() > MAX_BATCH {
                true => self.write_large(socket.get_ref().stream(), &mut in_flight)?,
                false => {
                    let stream = socket.get_ref().stream();
                    BATCH.with_borrow_mut(|written| self.write_batch(stream, &mut in_flight, written))?
                }
            };
            if !whole {
                return Ok(false);
            }
        }
        in_flight.frames.shrink_to(KEPT_CAPACITY);
        Ok(true)
    }

    /// Writes the first frame without copying it. Returns true if all of it was written.
    fn write_large(&mut self, stream: &TcpStream, in_flight: &mut InFlight) -> Result<bool, Broken> {
        let Some(first) = in_flight.frames.front() else { return Ok(true) };
        let mut header = Vec::with_capacity(10);
        put_header(&mut header, first);
        let [head, payload, tail] = first.pieces();
        let mut pieces = [&header[..], head, payload, tail].map(IoSlice::new);
        let mut left = &mut pieces[..];
        IoSlice::advance_slices(&mut left, self.written);
        let length: usize = left.iter().map(|piece| piece.len()).sum();
        let count = accepted(stream.try_write_vectored(left))?;
        self.advance(count, in_flight);
        Ok(count == length)
    }

    /// Writes the next small frames in one system call. Returns true if all of them were written.
    fn write_batch(
        &mut self,
        stream: &TcpStream,
        in_flight: &mut InFlight,
        written: &mut Vec<u8>,
    ) -> Result<bool, Broken> {
        written.clear();
        for frame in in_flight.frames.iter().take_while(|frame| frame.len() <= MAX_BATCH) {
            put_header(written, frame);
            frame.pieces().into_iter().for_each(|piece| written.extend_from_slice(piece));
            if written.len() >= MAX_BATCH {
                break;
            }
        }
        let left = &written[self.written..];
        let count = accepted(stream.try_write(left))?;
        let whole = count == left.len();
        written.shrink_to(2 * MAX_BATCH);
        self.advance(count, in_flight);
        Ok(whole)
    }

    /// Counts `count` more bytes as written and removes the completed frames.
    fn advance(&mut self, count: usize, in_flight: &mut InFlight) {
        self.written += count;
        self.sent.bytes += count;
        while let Some(first) = in_flight.frames.front()
            && let Some(left) = self.written.checked_sub(header_length(first) + first.len())
        {
            self.written = left;
            self.sent.messages += 1;
            self.sent.gaps += usize::from(first.is_gap());
            in_flight.frames.pop_front();
        }
    }
}

/// Writes the WebSocket header of a frame.
fn put_header(written: &mut Vec<u8>, frame: &Frame) {
    let length = frame.len();
    let kind = match frame.content() {
        Content::Ping(_) => PING,
        Content::Push(wrapping, _) if wrapping.is_binary => BINARY,
        _ => TEXT,
    };
    match header_length(frame) {
        2 => written.extend_from_slice(&[kind, length as u8]),
        4 => {
            written.extend_from_slice(&[kind, 126]);
            written.extend_from_slice(&(length as u16).to_be_bytes());
        }
        _ => {
            written.extend_from_slice(&[kind, 127]);
            written.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
}

/// Returns the length of the header that precedes a frame.
fn header_length(frame: &Frame) -> usize {
    match frame.len() {
        0..126 => 2,
        126..0x1_0000 => 4,
        _ => 10,
    }
}

/// Returns the number of bytes the socket accepted: 0 if it would block.
fn accepted(outcome: std::io::Result<usize>) -> Result<usize, Broken> {
    match outcome {
        Ok(count) => Ok(count),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
        Err(_) => Err(Broken),
    }
}
