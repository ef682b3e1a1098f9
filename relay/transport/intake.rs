//! What a client has sent that is no whole message or request yet: it is in memory until the rest comes, so it counts.

use std::io::{Error, ErrorKind, IoSlice, Result};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::feed::deliver::memory_budget::{MemoryBudget, Reserved};

/// So much of every client is not counted.
const FREE: usize = 16 * 1024;
/// More is counted in steps of this size.
const STEP: usize = 8 * 1024;

/// A connection that is read only as long as there is room for what comes.
pub struct Intake {
    stream: TcpStream,
    read: Arc<AtomicUsize>,
    /// The most that was there at a time: buffers do not shrink.
    most: usize,
    counted: Reserved,
}

impl Intake {
    /// Around a connection.
    pub fn new(stream: TcpStream, budget: &Arc<MemoryBudget>) -> Self {
        Self { stream, read: Arc::default(), most: FREE, counted: budget.reserved() }
    }

    /// The bare connection, to be written to.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// The same, to be read without counting what is thrown away.
    pub fn stream_mut(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    /// How much was read since the last whole message: set to 0 by whoever understands one.
    pub fn unfinished(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.read)
    }

    /// A whole message was read.
    pub fn understood(&self) {
        self.read.store(0, Ordering::Relaxed);
    }

    fn count(&mut self, bytes: usize) -> Result<()> {
        let read = self.read.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if read <= self.most {
            return Ok(());
        }
        let most = read.next_multiple_of(STEP);
        if !self.counted.resize(most - FREE) {
            return Err(Error::new(ErrorKind::OutOfMemory, "there is no room for what the client sends"));
        }
        self.most = most;
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
