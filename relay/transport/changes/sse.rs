//! Server-sent events: each change is an event whose id is its cursor, so that a reconnecting client misses nothing.

use std::convert::Infallible;
use std::fmt::Write;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use futures_util::stream::unfold;
use http_body_util::StreamBody;
use hyper::StatusCode;
use hyper::body::Frame as Chunk;
use hyper::header::{self, HeaderValue};
use time::OffsetDateTime;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::auth::verifier::now;
use crate::feed::catch_up::{CatchUp, Progress};
use crate::feed::deliver::conflation::Conflation;
use crate::feed::deliver::frame::Content;
use crate::feed::deliver::queue::Taken;
use crate::feed::read::stall::Stalls;
use crate::feed::replay::reader::ReplayError;
use crate::model::codec::protocol::{Envelope, Notice, RESUMED, STALLED};
use crate::model::log::cursor::Cursor;
use crate::model::session::join::unauthorized;
use crate::observe::Sent;
use crate::status::board::Connected;
use crate::transport::app::App;
use crate::transport::changes::refusal::{expired, gap, unavailable};
use crate::transport::changes::request::{ChangesRequest, START_TIMEOUT};
use crate::transport::clients::{ClientEntry, ClientKind};
use crate::transport::connection_limits::ClientSlot;
use crate::transport::held_answer::{WatchedOutbox, counted};
use crate::transport::response::{self, Answer, error};

/// Time limit for querying the position of an idle stream.
const POSITION_TIMEOUT: Duration = Duration::from_secs(1);
/// Delay before a client reconnects, in milliseconds.
const RETRY_MS: u32 = 1000;
/// Maximum size in bytes of one body chunk. Smaller events are joined and larger ones split; what is not yet written stays
/// evictable.
const MAX_CHUNK: usize = 32 * 1024;

/// Waits until then; for ever without a time.
async fn due(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => pending().await,
    }
}

struct EventStream {
    app: Arc<App>,
    _client: ClientSlot,
    _entry: ClientEntry,
    /// The user is connected while the stream is open.
    connected: Option<Connected>,
    watched: WatchedOutbox,
    /// Cancelled when the client has closed its side.
    closed: CancellationToken,
    catch_up: CatchUp,
    progress: Progress,
    /// Number of bytes written of the first frame's change.
    written: usize,
    /// Holds changes back, if only the latest change of each row is wanted.
    conflation: Option<Conflation>,
    /// What the next bytes have, and when their oldest change was written.
    sent: Sent,
    oldest: Option<OffsetDateTime>,
    /// The last event id that was sent without an event.
    sent_position: Cursor,
    /// When the token expires.
    expiry: Instant,
    /// Completes when the client may not read the private topic any more.
    revoked: BoxFuture<'static, ()>,
    stalls: Stalls,
    has_begun: bool,
    is_closed: bool,
}

/// Answers with an event stream from the cursor, or from now on.
pub async fn follow(
    app: Arc<App>,
    call: ChangesRequest,
    watched: WatchedOutbox,
    closed: CancellationToken,
) -> Answer {
    let Some(client) = app.connection_limits.admit_client() else {
        return error(StatusCode::TOO_MANY_REQUESTS, "Too many connected users");
    };
    let since = match call.since.clone() {
        Some(since) => {
            app.observe.resumed_from_cursor();
            since
        }
        None => match app.feed.beginning(&call.subscription).await {
            Some(since) => since,
            None => return unavailable(),
        },
    };
    let entry = call.entry(&app, ClientKind::EventStream);
    let conflation = call.conflate.map(Conflation::new);
    let mut catch_up = call.catch_up(&app, since.clone());
    match timeout(START_TIMEOUT, catch_up.go_on()).await {
        Ok(Ok(progress)) => {
            answer(app, (catch_up, conflation), since, progress, (client, entry, watched, closed))
        }
        Ok(Err(ReplayError::Gap(why))) => gap(why),
        Ok(Err(ReplayError::Ended)) => expired(catch_up.subscription()),
        Ok(Err(ReplayError::Unavailable(_))) | Err(_) => unavailable(),
    }
}

/// Answers with the stream of a subscription that catches up from the cursor `sent_position`. Its outbox may already hold
/// missed changes.
fn answer(
    app: Arc<App>,
    (catch_up, conflation): (CatchUp, Option<Conflation>),
    sent_position: Cursor,
    progress: Progress,
    (client, entry, watched, closed): (ClientSlot, ClientEntry, WatchedOutbox, CancellationToken),
) -> Answer {
    let left = catch_up.subscription().identity().claims().expires_at().saturating_sub(now());
    let expiry = Instant::now() + Duration::from_secs(left.min(86_400 * 365));
    let (identity, topic) =
        (catch_up.subscription().identity().clone(), catch_up.subscription().topic().cloned());
    let revoked = Arc::clone(&app.topic_judge).lost(identity, topic).boxed();
    app.observe.session_opened();
    let connected = app.status.board.connect(catch_up.subscription().identity().claims());
    watched.send_replace(Some(Arc::clone(&catch_up.outbox)));
    let mut stalls = app.stall_monitor.watch();
    if app.stall_monitor.stalled().is_some() {
        stalls.mark_changed();
    }
    let (written, has_begun, is_closed) = (0, false, false);
    let stream = EventStream {
        app,
        _client: client,
        _entry: entry,
        connected,
        watched,
        closed,
        catch_up,
        progress,
        written,
        conflation,
        sent: Sent::default(),
        oldest: None,
        sent_position,
        expiry,
        revoked,
        stalls,
        has_begun,
        is_closed,
    };
    let body = StreamBody::new(unfold(stream, async |mut stream| {
        let chunk = stream.next().await?;
        stream.count(chunk.len());
        let chunk = counted(chunk.into_bytes(), &stream.app.budget);
        Some((Ok::<_, Infallible>(Chunk::data(chunk)), stream))
    }));
    let mut answer = Answer::new(response::body(body));
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    answer
}

/// What follows a wait.
enum StreamStep {
    /// These bytes are written.
    Write(String),
    /// Nothing is written yet.
    Continue,
    /// The stream ends.
    End,
}

impl EventStream {
    /// Returns the next bytes; `None` at the end of the stream.
    async fn next(&mut self) -> Option<String> {
        // The client has taken what was sent before.
        if let Some(connected) = &self.connected {
            connected.note();
        }
        if !self.has_begun {
            return Some(self.begin());
        }
        while !self.is_closed {
            // First: a stream whose client lags always has frames to write.
            if let Some(last) = self.ended() {
                return Some(last);
            }
            // Write frames already taken, then those waiting in the outbox, to make room before reading on.
            if self.is_ready() {
                return Some(self.encoded());
            }
            if let Some(taken) = self.catch_up.outbox.take().now_or_never()
                && let Some(text) = self.taken(taken)
            {
                return Some(text);
            }
            let step = match self.progress {
                Progress::More => self.replay().await,
                Progress::Live => self.wait().await,
            };
            match step {
                StreamStep::Write(text) => return Some(text),
                StreamStep::Continue => {}
                StreamStep::End => return None,
            }
        }
        None
    }

    /// Counts bytes that are handed to the connection.
    fn count(&mut self, bytes: usize) {
        let sent = Sent { bytes, ..std::mem::take(&mut self.sent) };
        self.app.observe.sent(ClientKind::EventStream.name(), sent);
        if let Some(oldest) = self.oldest.take() {
            self.app.observe.written(oldest);
        }
    }

    /// Returns the first bytes of the stream.
    fn begin(&mut self) -> String {
        self.has_begun = true;
        // A client that loses the stream before its first event resumes from its original cursor.
        let begin = format!("retry: {RETRY_MS}\nid: {}\n\n", self.sent_position);
        let notices = self.catch_up.subscription().hidden().map(notice_event);
        notices.fold(begin, |text, notice| text + &notice)
    }

    /// Reads more of what the client missed into its outbox.
    async fn replay(&mut self) -> StreamStep {
        let claims = self.catch_up.subscription().identity().claims().clone();
        let held_until = self.held_until();
        tokio::select! {
            // Poll the expiry first: a long replay must not continue after it.
            biased;
            () = sleep_until(self.expiry) => StreamStep::Write(self.expired()),
            () = &mut self.revoked => StreamStep::Write(self.lost()),
            () = self.app.verifier.withdrawn(&claims) => StreamStep::Write(self.withdrawn()),
            () = self.app.end.cancelled() => StreamStep::End,
            () = self.closed.cancelled() => StreamStep::End,
            () = due(held_until) => StreamStep::Continue,
            outcome = self.catch_up.go_on() => match outcome {
                Ok(progress) => {
                    self.progress = progress;
                    StreamStep::Continue
                }
                Err(error) => StreamStep::Write(self.replay_failed(&error)),
            },
        }
    }

    /// Waits for new frames, for a reason to end the stream, or until a keep-alive is due.
    async fn wait(&mut self) -> StreamStep {
        let claims = self.catch_up.subscription().identity().claims().clone();
        let outbox = Arc::clone(&self.catch_up.outbox);
        let held_until = self.held_until();
        let text = tokio::select! {
            taken = outbox.take() => self.taken(taken),
            () = due(held_until) => None,
            () = sleep_until(self.expiry) => Some(self.expired()),
            () = &mut self.revoked => Some(self.lost()),
            () = self.app.verifier.withdrawn(&claims) => Some(self.withdrawn()),
            Ok(()) = self.stalls.changed() => {
                let (name, data) = match *self.stalls.borrow_and_update() {
                    Some(_) => ("stalled", serde_json::json!({ "error": STALLED })),
                    None => ("resumed", serde_json::json!({ "message": RESUMED })),
                };
                Some(format!("event: {name}\ndata: {data}\n\n"))
            }
            () = self.app.end.cancelled() => return StreamStep::End,
            () = self.closed.cancelled() => return StreamStep::End,
            () = sleep_until(Instant::now() + self.app.limits.keep_alive) => self.keep_alive().await,
        };
        text.map_or(StreamStep::Continue, StreamStep::Write)
    }

    /// Returns the last event if the token has ended, or the right to read.
    fn ended(&mut self) -> Option<String> {
        if Instant::now() >= self.expiry {
            return Some(self.expired());
        }
        if (&mut self.revoked).now_or_never().is_some() {
            return Some(self.lost());
        }
        let claims = self.catch_up.subscription().identity().claims().clone();
        self.app.verifier.withdrawn(&claims).now_or_never()?;
        Some(self.withdrawn())
    }

    /// Returns a keep-alive with the current position as id. It stops proxies from closing an idle stream, and keeps the
    /// client's cursor within the retention.
    async fn keep_alive(&mut self) -> Option<String> {
        let position = timeout(POSITION_TIMEOUT, self.catch_up.position()).await.ok().flatten();
        // Changes delivered before the position was returned go first; they have their own ids.
        if let Some(taken) = self.catch_up.outbox.take().now_or_never() {
            return self.taken(taken);
        }
        if self.held_until().is_some() {
            return None;
        }
        // Nothing is delivered after the token's expiry, so a later position must not be sent: it would skip changes.
        let is_in_force = now() < self.catch_up.subscription().identity().claims().expires_at();
        let reached = position.filter(|position| is_in_force && position.is_at_or_after(&self.sent_position));
        let Some(position) = reached.filter(|position| *position != self.sent_position) else {
            return Some(String::from(": still here\n\n"));
        };
        let text = format!("id: {position}\n\n");
        self.sent_position = position;
        Some(text)
    }

    /// Returns when changes that are held back are due; `None` if there are none.
    fn held_until(&self) -> Option<Instant> {
        let conflation = self.conflation.as_ref()?;
        let is_empty = self.catch_up.outbox.in_flight().frames.is_empty();
        (!is_empty).then(|| Instant::from_std(conflation.due()))
    }

    /// Returns whether taken frames are to be written now.
    fn is_ready(&mut self) -> bool {
        let outbox = &self.catch_up.outbox;
        let mut in_flight = outbox.in_flight();
        let Some(conflation) = &mut self.conflation else { return !in_flight.frames.is_empty() };
        let (is_ready, left_out) = conflation.release(&mut in_flight.frames, outbox.budget());
        if !is_ready {
            outbox.is_stuck_with(conflation.held_bytes());
        }
        self.app.observe.conflated(left_out);
        is_ready
    }

    /// Encodes frames that were taken; `None` if they are held back, or the stream is closed instead.
    fn taken(&mut self, taken: Taken) -> Option<String> {
        if taken != Taken::Frames {
            // The client is too slow, or the subscription must be bound again: the client reconnects with its last id.
            self.is_closed = true;
            return None;
        }
        self.is_ready().then(|| self.encoded())
    }

    /// Encodes the first frames as events.
    fn encoded(&mut self) -> String {
        let outbox = Arc::clone(&self.catch_up.outbox);
        let mut in_flight = outbox.in_flight();
        let mut text = String::new();
        self.oldest = in_flight.oldest();
        while text.len() < MAX_CHUNK
            && self.conflation.as_ref().is_none_or(Conflation::is_releasing)
            && let Some(first) = in_flight.frames.front()
        {
            self.sent.gaps += usize::from(first.is_gap());
            match first.content() {
                Content::Change(Envelope::Cursor(cursor), object) => {
                    let change = object.as_str();
                    if self.written == 0 {
                        let name = self.event_name();
                        let _ = write!(text, "event: {name}\nid: {cursor}\ndata: ");
                    }
                    let limit = change.len().min(self.written + MAX_CHUNK);
                    let end = (self.written..=limit).rev().find(|end| change.is_char_boundary(*end));
                    let end = end.unwrap_or(limit);
                    write_data(&mut text, &change[self.written..end]);
                    self.written = end;
                    if end < change.len() {
                        continue;
                    }
                    self.written = 0;
                    text.push_str("\n\n");
                }
                Content::Notice(Notice::Gap { reason, cursor }) => {
                    // A gap without a cursor means another changelog history: the stream cannot continue.
                    self.is_closed |= cursor.is_none();
                    text.push_str(&gap_event(reason, cursor.as_deref()));
                }
                // The stream cannot continue while the policy raises an error.
                Content::Notice(Notice::PolicyError(why)) => {
                    self.is_closed = true;
                    text.push_str(&gap_event(why, None));
                }
                Content::Notice(Notice::Hidden(why)) => text.push_str(&notice_event(why)),
                _ => {}
            }
            self.sent.messages += 1;
            in_flight.frames.pop_front();
            if let Some(conflation) = &mut self.conflation {
                conflation.delivered();
            }
        }
        outbox.is_stuck_with(in_flight.frames.iter().map(|frame| frame.len()).sum());
        text
    }

    /// Returns the name of the events that have a cursor of their own.
    fn event_name(&self) -> &'static str {
        if self.catch_up.subscription().topic().is_some() { "broadcast" } else { "change" }
    }

    fn expired(&mut self) -> String {
        self.is_closed = true;
        String::from("event: failure\ndata: {\"error\":\"the token has expired\"}\n\n")
    }

    fn lost(&mut self) -> String {
        self.is_closed = true;
        let name = self.catch_up.subscription().topic().map(|topic| &*topic.name).unwrap_or_default();
        let failure = serde_json::json!({ "error": format!("Unauthorized: {}", unauthorized(name, None)) });
        format!("event: failure\ndata: {failure}\n\n")
    }

    fn withdrawn(&mut self) -> String {
        self.is_closed = true;
        String::from("event: failure\ndata: {\"error\":\"the token's key was withdrawn\"}\n\n")
    }

    fn replay_failed(&mut self, error: &ReplayError) -> String {
        self.is_closed = true;
        match error {
            // Without an id: a client that reconnects with its last id gets status 410.
            ReplayError::Gap(why) => {
                self.sent.gaps += 1;
                gap_event(why, None)
            }
            ReplayError::Ended => self.expired(),
            ReplayError::Unavailable(_) => String::from(": the database is unavailable\n\n"),
        }
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        self.watched.send_replace(None);
    }
}

/// Returns the event of a gap. A client without its id resumes from the last one.
fn gap_event(reason: &str, id: Option<&str>) -> String {
    let id = id.map_or_else(String::new, |id| format!("id: {id}\n"));
    let data = serde_json::json!({ "error": format!("Gap: {reason}") });
    format!("event: gap\n{id}data: {data}\n\n")
}

/// Returns the event that says why the table shows no row, and what to do.
fn notice_event(why: &str) -> String {
    format!("event: notice\ndata: {}\n\n", serde_json::json!({ "message": why }))
}

/// Writes the data of an event, one `data:` field for each line. `json` columns may contain line breaks.
fn write_data(text: &mut String, data: &str) {
    for (number, line) in data.split(['\n', '\r']).enumerate() {
        if number > 0 {
            text.push_str("\ndata: ");
        }
        text.push_str(line);
    }
}
