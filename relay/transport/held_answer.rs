//! The body of an answer that waits in an outbox: handed over piece by piece, and evictable like data queued for sockets.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::StatusCode;
use hyper::body::{Body, Frame as Chunk, SizeHint};
use tokio::sync::watch;

use crate::feed::deliver::frame::Frame;
use crate::feed::deliver::memory_budget::{Held, MemoryBudget};
use crate::feed::deliver::outbox::Outbox;
use crate::transport::response::{Answer, body, json};

/// The outbox whose overflow ends the connection; `None` if there is none. The connection watches it because hyper does not
/// poll the body of a client that does not read.
pub type WatchedOutbox = watch::Sender<Option<Arc<Outbox>>>;

/// Maximum number of bytes handed to the connection at a time.
const MAX_PIECE: usize = 32 * 1024;

/// The frames taken from an outbox, as the body of an answer.
struct HeldAnswer {
    outbox: Arc<Outbox>,
    watched: WatchedOutbox,
    /// Number of bytes of the first frame that were handed over.
    begun: usize,
    left: usize,
}

/// Bytes handed to a connection, counted in the memory budget until they are written.
struct Counted {
    bytes: Vec<u8>,
    _held: Held,
}

/// Answers with the frames taken from an outbox, as JSON.
pub fn json_answer(outbox: Arc<Outbox>, watched: WatchedOutbox) -> Answer {
    let mut answer = json(StatusCode::OK, "");
    *answer.body_mut() = body(HeldAnswer::new(outbox, watched));
    answer
}

impl HeldAnswer {
    /// Creates the body from the taken frames and registers the outbox with `watched`.
    fn new(outbox: Arc<Outbox>, watched: WatchedOutbox) -> Self {
        let left = outbox.in_flight().frames.iter().map(Frame::len).sum();
        outbox.is_stuck_with(left);
        watched.send_replace(Some(Arc::clone(&outbox)));
        Self { outbox, watched, begun: 0, left }
    }

    fn next_bytes(&mut self) -> Option<Vec<u8>> {
        let mut in_flight = self.outbox.in_flight();
        if in_flight.is_evicted {
            return None;
        }
        let mut bytes = Vec::with_capacity(self.left.min(MAX_PIECE));
        while bytes.len() < MAX_PIECE
            && let Some(first) = in_flight.frames.front()
        {
            let mut given = self.begun;
            for piece in first.pieces() {
                let rest = &piece[given.min(piece.len())..];
                given -= given.min(piece.len());
                let part = &rest[..rest.len().min(MAX_PIECE - bytes.len())];
                bytes.extend_from_slice(part);
                self.begun += part.len();
            }
            if self.begun == first.len() {
                self.begun = 0;
                in_flight.frames.pop_front();
            }
        }
        Some(bytes)
    }
}

impl Body for HeldAnswer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Chunk<Bytes>, Infallible>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        // Evicted: the connection is about to be closed by the task that watches the outbox.
        let Some(bytes) = self.next_bytes() else { return Poll::Pending };
        self.left = self.left.saturating_sub(bytes.len());
        self.outbox.is_stuck_with(self.left);
        Poll::Ready(Some(Ok(Chunk::data(counted(bytes, self.outbox.budget())))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left as u64)
    }
}

impl Drop for HeldAnswer {
    fn drop(&mut self) {
        self.watched.send_replace(None);
    }
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Wraps bytes so that they count in the budget until the connection has written them.
pub fn counted(bytes: Vec<u8>, budget: &Arc<MemoryBudget>) -> Bytes {
    let held = budget.hold(bytes.capacity());
    Bytes::from_owner(Counted { bytes, _held: held })
}
