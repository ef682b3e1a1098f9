//! An event stream: each change an event whose id is its cursor, so that a client that comes back misses nothing.

use std::convert::Infallible;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::stream::unfold;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper::header::{self, HeaderValue};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::auth::verifier::now;
use crate::feed::catch_up::{CatchUp, Progress};
use crate::feed::deliver::outbox::Taken;
use crate::feed::read::stall::Stalls;
use crate::feed::replay::reader::ReplayError;
use crate::model::codec::event::{ChangeEvent, RESUMED, STALLED};
use crate::model::log::cursor::Cursor;
use crate::transport::app::App;
use crate::transport::held_answer::Watched;
use crate::transport::held_answer::counted;
use crate::transport::response::Answer;

/// A quiet stream waits this long to hear where it stands.
const ASKED: Duration = Duration::from_secs(1);
/// What a client is to wait before it comes back, in milliseconds.
const RETRY: u32 = 1000;
/// Events are written together up to this size, and larger ones in pieces; the rest can be evicted.
const TOGETHER: usize = 32 * 1024;

struct Stream {
    app: Arc<App>,
    watched: Watched,
    /// The client has closed its side: it is gone.
    closed: CancellationToken,
    follower: CatchUp,
    progress: Progress,
    /// How much of the change at the head of the hand was written.
    written: usize,
    /// Where it said that the client stands.
    stands: Cursor,
    /// When the token ends.
    expiry: Instant,
    stalls: Stalls,
    begun: bool,
    over: bool,
}

/// The stream of a follower that came with the cursor `stands`; what it missed may be in its outbox already.
pub fn answer(
    app: Arc<App>,
    follower: CatchUp,
    stands: Cursor,
    progress: Progress,
    (watched, closed): (Watched, CancellationToken),
) -> Answer {
    let left = follower.subscription().identity().claims().expires_at().saturating_sub(now());
    let expiry = Instant::now() + Duration::from_secs(left.min(86_400 * 365));
    app.observe.session_opened();
    watched.send_replace(Some(Arc::clone(&follower.outbox)));
    let mut stalls = app.stall_monitor.watch();
    if app.stall_monitor.stalled().is_some() {
        stalls.mark_changed();
    }
    let (written, begun, over) = (0, false, false);
    let stream =
        Stream { app, watched, closed, follower, progress, written, stands, expiry, stalls, begun, over };
    let body = StreamBody::new(unfold(stream, async |mut stream| {
        let chunk = stream.next().await?;
        let chunk = counted(chunk.into_bytes(), &stream.app.budget);
        Some((Ok::<_, Infallible>(Frame::data(chunk)), stream))
    }));
    let mut answer = Answer::new(body.boxed_unsync());
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    answer
}

impl Stream {
    /// The next bytes; none at the end.
    async fn next(&mut self) -> Option<String> {
        if !self.begun {
            self.begun = true;
            // Whoever loses the stream before its first event comes back to where it came from.
            return Some(format!("retry: {RETRY}\nid: {}\n\n", self.stands));
        }
        loop {
            if self.over {
                return None;
            }
            // What was taken first, then what is there, so that there is room for what comes.
            if !self.follower.outbox.hand().frames.is_empty() {
                return self.told(Taken::Frames);
            }
            if let Some(taken) = self.follower.outbox.take().now_or_never()
                && let Some(text) = self.told(taken)
            {
                return Some(text);
            }
            let claims = self.follower.subscription().identity().claims().clone();
            if self.progress == Progress::More {
                tokio::select! {
                    // A long past is no reason to go on after its token has ended.
                    biased;
                    () = sleep_until(self.expiry) => return Some(self.expired()),
                    () = self.app.verifier.withdrawn(&claims) => return Some(self.withdrawn()),
                    () = self.app.end.cancelled() => return None,
                    () = self.closed.cancelled() => return None,
                    went_on = self.follower.go_on() => match went_on {
                        Ok(progress) => self.progress = progress,
                        Err(missed) => return Some(self.ended(&missed)),
                    },
                }
                continue;
            }
            let outbox = Arc::clone(&self.follower.outbox);
            tokio::select! {
                taken = outbox.take() => if let Some(text) = self.told(taken) {
                    return Some(text);
                },
                () = sleep_until(self.expiry) => return Some(self.expired()),
                () = self.app.verifier.withdrawn(&claims) => return Some(self.withdrawn()),
                Ok(()) = self.stalls.changed() => {
                    let (name, data) = match *self.stalls.borrow_and_update() {
                        Some(_) => ("stalled", serde_json::json!({ "error": STALLED })),
                        None => ("resumed", serde_json::json!({ "message": RESUMED })),
                    };
                    return Some(format!("event: {name}\ndata: {data}\n\n"));
                }
                () = self.app.end.cancelled() => return None,
                () = self.closed.cancelled() => return None,
                () = sleep_until(Instant::now() + self.app.limits.keep_alive) => {
                    if let Some(text) = self.still_here().await {
                        return Some(text);
                    }
                }
            }
        }
    }

    /// What keeps proxies from taking a quiet stream for a dead one, with the id that it has come to: whoever lost it long
    /// after its last event would have a cursor older than what is kept.
    async fn still_here(&mut self) -> Option<String> {
        let position = timeout(ASKED, self.follower.position()).await.ok().flatten();
        // What was delivered before the answer goes first, and has ids of its own.
        if let Some(taken) = self.follower.outbox.take().now_or_never() {
            return self.told(taken);
        }
        // From the second on in which the token ends nothing is delivered to it: what comes then is for the next one.
        let is_good = now() < self.follower.subscription().identity().claims().expires_at();
        let moved = position.filter(|position| is_good && position.is_at_or_after(&self.stands));
        let Some(position) = moved.filter(|position| *position != self.stands) else {
            return Some(String::from(": still here\n\n"));
        };
        let text = format!("id: {position}\n\n");
        self.stands = position;
        Some(text)
    }

    /// What was taken, as events; none when there is nothing to tell.
    fn told(&mut self, taken: Taken) -> Option<String> {
        if taken != Taken::Frames {
            // Too slow, or its table is another: it comes back with its last id.
            self.over = true;
            return None;
        }
        let outbox = Arc::clone(&self.follower.outbox);
        let mut hand = outbox.hand();
        let mut text = String::new();
        while text.len() < TOGETHER
            && let Some(first) = hand.frames.front()
        {
            let head = std::str::from_utf8(first.head()).unwrap_or_default();
            let payload = first.payload().map_or("", |payload| payload.as_str());
            match ChangeEvent::parse(head, payload) {
                Some((cursor, ChangeEvent::Change(change))) => {
                    if self.written == 0 {
                        let _ = write!(text, "event: change\nid: {cursor}\ndata: ");
                    }
                    let most = change.len().min(self.written + TOGETHER);
                    let end = (self.written..=most).rev().find(|end| change.is_char_boundary(*end));
                    let end = end.unwrap_or(most);
                    data(&mut text, &change[self.written..end]);
                    self.written = end;
                    if end < change.len() {
                        continue;
                    }
                    self.written = 0;
                    text.push_str("\n\n");
                }
                Some((cursor, ChangeEvent::Gap(why))) => {
                    // Without a cursor it is another history, in which this stream has no place.
                    self.over |= cursor.is_empty();
                    let why = serde_json::json!({ "error": format!("Gap: {why}") });
                    match cursor.is_empty() {
                        true => _ = write!(text, "event: gap\ndata: {why}\n\n"),
                        false => _ = write!(text, "event: gap\nid: {cursor}\ndata: {why}\n\n"),
                    }
                }
                None => {}
            }
            hand.frames.pop_front();
        }
        outbox.is_stuck_with(hand.frames.iter().map(|frame| frame.len()).sum());
        Some(text)
    }

    fn expired(&mut self) -> String {
        self.over = true;
        String::from("event: failure\ndata: {\"error\":\"the token has expired\"}\n\n")
    }

    fn withdrawn(&mut self) -> String {
        self.over = true;
        String::from("event: failure\ndata: {\"error\":\"the token's key was withdrawn\"}\n\n")
    }

    fn ended(&mut self, missed: &ReplayError) -> String {
        self.over = true;
        let mut text = String::new();
        match missed {
            // Without an id: whoever comes back with the last one is told by status 410.
            ReplayError::Gap(why) => {
                let _ = write!(
                    text,
                    "event: gap\ndata: {}\n\n",
                    serde_json::json!({ "error": format!("Gap: {why}") })
                );
            }
            ReplayError::Ended => return self.expired(),
            ReplayError::Unavailable(_) => text.push_str(": the database cannot be asked now\n\n"),
        }
        text
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.watched.send_replace(None);
        self.app.observe.session_closed();
    }
}

/// Data of an event. A line break would end its line: `json` columns keep those they were written with.
fn data(text: &mut String, data: &str) {
    for (number, line) in data.split(['\n', '\r']).enumerate() {
        if number > 0 {
            text.push_str("\ndata: ");
        }
        text.push_str(line);
    }
}
