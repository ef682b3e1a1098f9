//! A request and its answer on one connection. A client may close its side once it has asked, and still reads: what it asked
//! for is answered, and what would only wait for more ends at once, as most who close are gone.

use std::io::Result;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use hyper::body::{Body, Frame, SizeHint};
use tokio_util::sync::CancellationToken;

/// No request is being answered.
const IDLE: u8 = 0;
/// One is.
const ANSWERING: u8 = 1;
/// The answer is complete, but not all of it is written.
const WRITING: u8 = 2;

/// What the reader of a connection and those who answer on it know of each other.
#[derive(Debug, Default)]
pub struct Exchange {
    state: AtomicU8,
    reader: AtomicWaker,
    closed: CancellationToken,
    unread: AtomicBool,
}

impl Exchange {
    /// A request came. Until its answer is written, the end of what the client sends is kept back.
    pub fn begin(self: &Arc<Self>) -> Answering {
        self.state.store(ANSWERING, Ordering::Release);
        Answering(Arc::clone(self))
    }

    /// Whether no request is being answered.
    pub fn is_idle(&self) -> bool {
        self.state.load(Ordering::Acquire) == IDLE
    }

    /// The connection will be closed before all that the client sends is read.
    pub fn leaves_unread(&self) {
        self.unread.store(true, Ordering::Relaxed);
    }

    /// Whether it will.
    pub fn has_unread(&self) -> bool {
        self.unread.load(Ordering::Relaxed)
    }

    /// Done when the client has closed its side.
    pub fn closed(&self) -> CancellationToken {
        self.closed.clone()
    }

    /// What the reader is told in the place of an end.
    pub fn end(&self, context: &Context<'_>) -> Poll<Result<()>> {
        self.closed.cancel();
        self.reader.register(context.waker());
        if self.state.load(Ordering::Acquire) == IDLE { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    /// All that there was to write is written.
    pub fn flushed(&self) {
        let done = self.state.compare_exchange(WRITING, IDLE, Ordering::AcqRel, Ordering::Relaxed);
        if done.is_ok() {
            self.reader.wake();
        }
    }
}

/// A request that is being answered.
pub struct Answering(Arc<Exchange>);

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.state.store(WRITING, Ordering::Release);
    }
}

/// The body of an answer; once all of it is taken, the answer is complete.
pub struct Answered<B> {
    body: B,
    _answering: Answering,
}

impl<B> Answered<B> {
    /// This body answers it.
    pub fn with(body: B, answering: Answering) -> Self {
        Self { body, _answering: answering }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Answered<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<Bytes>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
