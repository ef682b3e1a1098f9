//! Errors in requests that the HTTP library refuses by itself: answered as JSON like all other errors, and in a way that the
//! client can read them.

use std::io::{Error, IoSlice, Result};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use crate::transport::exchange::Exchange;
use crate::transport::intake::Intake;
use crate::transport::response::refusal;
use crate::transport::write_timeout::WriteTimeout;

/// How long the client's remaining data is read before the connection is closed. Closing with unread data resets the
/// connection, and the client loses the answer.
const LINGER: Duration = Duration::from_secs(2);

/// A connection that adds a JSON body to the HTTP library's own error answers.
pub struct EarlyRefusal {
    stream: WriteTimeout,
    exchange: Arc<Exchange>,
    /// Number of bytes read of an incomplete request.
    unfinished: Arc<AtomicUsize>,
    /// Whether the request line was read.
    has_line: bool,
    /// Time limit for a complete request head.
    limit: Duration,
    alarm: Option<Pin<Box<Sleep>>>,
    /// The answer that replaces the library's, and how many bytes of it are written.
    replacement: Option<(Vec<u8>, usize)>,
    /// Whether the write side is shut down.
    is_shut: bool,
}

/// Returns the underlying connection and the bytes read beyond the request. Frees hyper's read buffer of 8 KiB: kept in the
/// session's future it would be most of the memory of an idle client.
pub fn into_connection(upgraded: Upgraded) -> Option<(Intake, Vec<u8>)> {
    let parts = upgraded.downcast::<TokioIo<EarlyRefusal>>().ok()?;
    Some((parts.io.into_inner().into_inner(), parts.read_buf.to_vec()))
}

impl EarlyRefusal {
    /// Wraps a connection. A request head must be complete within `limit`.
    pub fn new(
        stream: WriteTimeout,
        exchange: Arc<Exchange>,
        unfinished: Arc<AtomicUsize>,
        limit: Duration,
    ) -> Self {
        Self {
            stream,
            exchange,
            unfinished,
            has_line: false,
            limit,
            alarm: None,
            replacement: None,
            is_shut: false,
        }
    }

    /// Returns the underlying connection.
    pub fn into_inner(self) -> Intake {
        self.stream.into_inner()
    }

    /// Answers with 408 and fails once an incomplete request head has taken longer than `limit`.
    fn poll_head_timeout(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        if !self.exchange.is_idle() || self.unfinished.load(Ordering::Relaxed) == 0 {
            self.alarm = None;
            return Poll::Pending;
        }
        let limit = self.limit;
        ready!(self.alarm.get_or_insert_with(|| Box::pin(sleep(limit))).as_mut().poll(context));
        let why = "the head of the request took too long";
        // A single attempt is enough: the answer fits into the empty send buffer.
        let _ = self.stream.stream().try_write(&refusal("408 Request Timeout", why));
        Poll::Ready(Err(Error::other(why)))
    }

    /// Returns the answer to send instead of the library's own; `None` if this is not an error of the library.
    fn replacement_for(&self, answer: &[u8]) -> Option<Vec<u8>> {
        let status = answer.strip_prefix(b"HTTP/1.1 ").filter(|_| self.exchange.is_idle())?;
        Some(match status.get(..3)? {
            b"431" | b"414" if !self.has_line => refusal(
                "414 URI Too Long",
                "the address is too long: shorten it, and send the token as a header (Authorization: Bearer …)",
            ),
            b"431" | b"414" => refusal(
                "431 Request Header Fields Too Large",
                "the headers are too large: send fewer or shorter ones",
            ),
            _ => refusal("400 Bad Request", "the request is not valid HTTP/1.1"),
        })
    }

    /// Writes the replacement, then reports the library's `bytes` as written.
    fn poll_replacement(&mut self, context: &mut Context<'_>, bytes: usize) -> Poll<Result<usize>> {
        while let Some((replacement, written)) =
            self.replacement.as_mut().filter(|(replacement, written)| *written < replacement.len())
        {
            *written += ready!(Pin::new(&mut self.stream).poll_write(context, &replacement[*written..]))?;
        }
        self.exchange.leaves_unread();
        Poll::Ready(Ok(bytes))
    }

    fn poll_linger(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        let alarm = self.alarm.get_or_insert_with(|| Box::pin(sleep(LINGER)));
        if alarm.as_mut().poll(context).is_ready() {
            return Poll::Ready(Ok(()));
        }
        let mut bytes = [0; 4096];
        loop {
            let mut bytes = ReadBuf::new(&mut bytes);
            match ready!(Pin::new(self.stream.stream_mut()).poll_read(context, &mut bytes)) {
                Ok(()) if !bytes.filled().is_empty() => {}
                _ => return Poll::Ready(Ok(())),
            }
        }
    }
}

impl AsyncRead for EarlyRefusal {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<Result<()>> {
        if self.unfinished.load(Ordering::Relaxed) == 0 {
            self.has_line = false;
        }
        let before = into.filled().len();
        let Poll::Ready(read) = Pin::new(&mut self.stream).poll_read(context, into) else {
            return self.poll_head_timeout(context);
        };
        self.has_line |= into.filled()[before..].contains(&b'\n');
        Poll::Ready(read)
    }
}

impl AsyncWrite for EarlyRefusal {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        if self.replacement.is_none() {
            self.replacement = self.replacement_for(bytes).map(|answer| (answer, 0));
        }
        match self.replacement {
            Some(_) => self.poll_replacement(context, bytes.len()),
            None => Pin::new(&mut self.stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        if self.replacement.is_none() {
            self.replacement =
                slices.first().and_then(|first| self.replacement_for(first)).map(|answer| (answer, 0));
        }
        match self.replacement {
            Some(_) => self.poll_replacement(context, slices.iter().map(|slice| slice.len()).sum()),
            None => Pin::new(&mut self.stream).poll_write_vectored(context, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        if !self.exchange.has_unread() {
            return Pin::new(&mut self.stream).poll_shutdown(context);
        }
        if !self.is_shut {
            ready!(Pin::new(&mut self.stream).poll_shutdown(context))?;
            (self.is_shut, self.alarm) = (true, None);
        }
        self.poll_linger(context)
    }
}
