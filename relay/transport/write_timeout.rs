//! A connection with a write timeout: writes fail when the peer reads nothing for too long. If the peer closes its side while a
//! request is answered, the answer is still written.

use std::io::{Error, ErrorKind, IoSlice, Result};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

use crate::transport::exchange::Exchange;
use crate::transport::intake::Intake;

/// A connection whose writes fail with [`ErrorKind::TimedOut`] after making no progress for `limit`.
pub struct WriteTimeout {
    stream: Intake,
    exchange: Arc<Exchange>,
    limit: Duration,
    /// Created by the first write that has to wait. Most connections never need it.
    alarm: Option<Pin<Box<Sleep>>>,
    waits: bool,
}

impl WriteTimeout {
    /// Wraps a connection.
    pub fn new(stream: Intake, limit: Duration, exchange: Arc<Exchange>) -> Self {
        Self { stream, exchange, limit, alarm: None, waits: false }
    }

    /// Returns the underlying connection.
    pub fn into_inner(self) -> Intake {
        self.stream
    }

    /// Returns the underlying stream, for writing without a timeout.
    pub fn stream(&self) -> &TcpStream {
        self.stream.stream()
    }

    /// Returns the underlying stream, for reading without counting.
    pub fn stream_mut(&mut self) -> &mut TcpStream {
        self.stream.stream_mut()
    }

    /// Passes on the outcome of a write, or fails once it has been pending for `limit`.
    fn with_timeout<T>(&mut self, context: &mut Context<'_>, written: Poll<Result<T>>) -> Poll<Result<T>> {
        if written.is_ready() {
            self.waits = false;
            return written;
        }
        let limit = self.limit;
        let alarm = self.alarm.get_or_insert_with(|| Box::pin(sleep(limit)));
        if !self.waits {
            self.waits = true;
            alarm.as_mut().reset(Instant::now() + limit);
        }
        ready!(alarm.as_mut().poll(context));
        Poll::Ready(Err(Error::from(ErrorKind::TimedOut)))
    }
}

impl AsyncRead for WriteTimeout {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<Result<()>> {
        let before = into.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, into))?;
        let is_end = into.filled().len() == before && into.remaining() > 0;
        if is_end { self.exchange.end(context) } else { Poll::Ready(Ok(())) }
    }
}

impl AsyncWrite for WriteTimeout {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.with_timeout(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.with_timeout(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_flush(context))?;
        self.exchange.flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
