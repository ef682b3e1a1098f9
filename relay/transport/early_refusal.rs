//! What is refused before it is a request: told as all other errors are, and so that its client can read it.

use std::io::{Error, IoSlice, Result};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use crate::transport::exchange::Exchange;
use crate::transport::intake::Intake;
use crate::transport::response::refusal;
use crate::transport::write_timeout::WriteTimeout;

/// What a client still sends is read for so long before the connection is closed: closing before could cost it the answer.
const LINGER: Duration = Duration::from_secs(2);

/// A connection on which what the HTTP library answers by itself gets a body.
pub struct Refusing {
    stream: WriteTimeout,
    exchange: Arc<Exchange>,
    /// How much of a request was read that is not whole.
    unfinished: Arc<AtomicUsize>,
    /// Its first line was read.
    has_line: bool,
    /// Its head has to be whole after so long.
    limit: Duration,
    alarm: Option<Pin<Box<Sleep>>>,
    /// What is answered in the place of the library, and how much of it was written.
    own: Option<(Vec<u8>, usize)>,
    /// Nothing more is written.
    is_shut: bool,
}

impl Refusing {
    /// Around a connection; a head is to be whole within `limit`.
    pub fn new(
        stream: WriteTimeout,
        exchange: Arc<Exchange>,
        unfinished: Arc<AtomicUsize>,
        limit: Duration,
    ) -> Self {
        Self { stream, exchange, unfinished, has_line: false, limit, alarm: None, own: None, is_shut: false }
    }

    /// The bare connection.
    pub fn into_inner(self) -> Intake {
        self.stream.into_inner()
    }

    /// A head that has begun and does not end is answered once it has taken too long.
    fn poll_slow(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        if !self.exchange.is_idle() || self.unfinished.load(Ordering::Relaxed) == 0 {
            self.alarm = None;
            return Poll::Pending;
        }
        let limit = self.limit;
        ready!(self.alarm.get_or_insert_with(|| Box::pin(sleep(limit))).as_mut().poll(context));
        let why = "the head of the request took too long";
        // It fits into the empty buffer of the socket.
        let _ = self.stream.bare().try_write(&refusal("408 Request Timeout", why));
        Poll::Ready(Err(Error::other(why)))
    }

    /// What to answer where the library would answer this without a body.
    fn in_place_of(&self, answer: &[u8]) -> Option<Vec<u8>> {
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
            _ => refusal("400 Bad Request", "this is no request of HTTP/1.1"),
        })
    }

    /// Writes the answer in the place of `bytes`.
    fn poll_own(&mut self, context: &mut Context<'_>, bytes: usize) -> Poll<Result<usize>> {
        while let Some((own, written)) = self.own.as_mut().filter(|(own, written)| *written < own.len()) {
            *written += ready!(Pin::new(&mut self.stream).poll_write(context, &own[*written..]))?;
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
            match ready!(Pin::new(self.stream.bare_mut()).poll_read(context, &mut bytes)) {
                Ok(()) if !bytes.filled().is_empty() => {}
                _ => return Poll::Ready(Ok(())),
            }
        }
    }
}

impl AsyncRead for Refusing {
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
            return self.poll_slow(context);
        };
        self.has_line |= into.filled()[before..].contains(&b'\n');
        Poll::Ready(read)
    }
}

impl AsyncWrite for Refusing {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        if self.own.is_none() {
            self.own = self.in_place_of(bytes).map(|own| (own, 0));
        }
        match self.own {
            Some(_) => self.poll_own(context, bytes.len()),
            None => Pin::new(&mut self.stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        if self.own.is_none() {
            self.own = slices.first().and_then(|first| self.in_place_of(first)).map(|own| (own, 0));
        }
        match self.own {
            Some(_) => self.poll_own(context, slices.iter().map(|slice| slice.len()).sum()),
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
