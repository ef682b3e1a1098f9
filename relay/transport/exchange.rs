//! The state of the request and answer on one connection. A client may close its side after the request and still read: its
//! answer is written, but waiting for further changes ends at once, because most clients that close are gone.

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
/// A request is being answered.
const ANSWERING: u8 = 1;
/// The answer is complete, but not fully written.
const WRITING: u8 = 2;

/// State shared by the reader of a connection and the handlers that answer on it.
#[derive(Debug, Default)]
pub struct Exchange {
    state: AtomicU8,
    reader: AtomicWaker,
    closed: CancellationToken,
    unread: AtomicBool,
}

impl Exchange {
    /// Marks that a request arrived. Until its answer is written, [`end`](Self::end) withholds the end of the client's data.
    pub fn begin(self: &Arc<Self>) -> Answering {
        self.state.store(ANSWERING, Ordering::Release);
        Answering(Arc::clone(self))
    }

    /// Whether no request is being answered.
    pub fn is_idle(&self) -> bool {
        self.state.load(Ordering::Acquire) == IDLE
    }

    /// Marks that the connection will be closed before all of the client's data is read.
    pub fn leaves_unread(&self) {
        self.unread.store(true, Ordering::Relaxed);
    }

    /// Whether the connection will be closed with unread data.
    pub fn has_unread(&self) -> bool {
        self.unread.load(Ordering::Relaxed)
    }

    /// Returns a token that is cancelled when the client has closed its side.
    pub fn closed(&self) -> CancellationToken {
        self.closed.clone()
    }

    /// Called by the reader at the end of the client's data: ready if idle, else pending until the answer is written.
    pub fn end(&self, context: &Context<'_>) -> Poll<Result<()>> {
        self.closed.cancel();
        self.reader.register(context.waker());
        if self.state.load(Ordering::Acquire) == IDLE { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    /// Marks that everything is written. If the answer is complete, the connection becomes idle.
    pub fn flushed(&self) {
        let done = self.state.compare_exchange(WRITING, IDLE, Ordering::AcqRel, Ordering::Relaxed);
        if done.is_ok() {
            self.reader.wake();
        }
    }
}

/// A request that is being answered. Dropping it marks the answer as complete.
pub struct Answering(Arc<Exchange>);

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.state.store(WRITING, Ordering::Release);
    }
}

/// The body of an answer. The answer is complete when hyper drops the body.
pub struct Answered<B> {
    body: B,
    _answering: Answering,
}

impl<B> Answered<B> {
    /// Wraps the body that answers the request.
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
