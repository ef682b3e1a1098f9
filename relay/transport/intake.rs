//! Counts incomplete messages and requests in the memory budget: they stay in memory until the rest arrives.

use std::io::{Error, ErrorKind, IoSlice, Result};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::feed::deliver::memory_budget::{MemoryBudget, Reserved};

/// Number of bytes of each client that are not counted.
const UNCOUNTED: usize = 16 * 1024;
/// Granularity of counting, in bytes.
const STEP: usize = 8 * 1024;

/// A connection whose reads fail when the memory budget has no room for the data.
pub struct Intake {
    stream: TcpStream,
    unfinished: Arc<AtomicUsize>,
    /// The largest counted size so far. It never decreases because the buffers behind it do not shrink.
    counted_up_to: usize,
    reserved: Reserved,
}

impl Intake {
    /// Wraps a connection.
    pub fn new(stream: TcpStream, budget: &Arc<MemoryBudget>) -> Self {
        Self { stream, unfinished: Arc::default(), counted_up_to: UNCOUNTED, reserved: budget.reserved() }
    }

    /// Returns the underlying stream, for writing.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Returns the underlying stream, for reading discarded data without counting it.
    pub fn stream_mut(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    /// Returns the counter of bytes read since the last complete message. The parser sets it to 0 after each message.
    pub fn unfinished(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.unfinished)
    }

    /// Resets the counter after a complete message.
    pub fn message_complete(&self) {
        self.unfinished.store(0, Ordering::Relaxed);
    }

    fn count(&mut self, bytes: usize) -> Result<()> {
        let read = self.unfinished.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if read <= self.counted_up_to {
            return Ok(());
        }
        let size = read.next_multiple_of(STEP);
        if !self.reserved.resize(size - UNCOUNTED) {
            return Err(Error::new(ErrorKind::OutOfMemory, "no memory for the client's data"));
        }
        self.counted_up_to = size;
        Ok(())
    }
}

impl AsyncRead for Intake {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<Result<()>> {
        let before = into.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, into))?;
        let bytes = into.filled().len() - before;
        Poll::Ready(self.count(bytes))
    }
}

impl AsyncWrite for Intake {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
