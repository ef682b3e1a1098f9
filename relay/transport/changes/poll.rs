//! A long poll: the changes since a cursor, as soon as there is one.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use hyper::StatusCode;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::auth::token::TokenError;
use crate::auth::verifier::now;
use crate::feed::catch_up::{CatchUp, Progress};
use crate::feed::deliver::frame::{Content, Frame};
use crate::feed::deliver::outbox::Outbox;
use crate::feed::deliver::queue::Taken;
use crate::feed::replay::reader::ReplayError;
use crate::model::codec::protocol::{Envelope, Notice};
use crate::model::log::cursor::Cursor;
use crate::observe::Sent;
use crate::transport::app::App;
use crate::transport::changes::refusal::{expired, gap, notice, unavailable};
use crate::transport::changes::request::{ChangesRequest, MIN_OUTBOX, START_TIMEOUT, lost};
use crate::transport::clients::ClientKind;
use crate::transport::held_answer::{WatchedOutbox, json_answer};
use crate::transport::response::{Answer, error, json};

/// Time limit for finding out whether there are more changes.
const MORE_TIMEOUT: Duration = Duration::from_secs(2);
/// Interval between checks whether the rest of a page was delivered.
const CHECK_INTERVAL: Duration = Duration::from_millis(5);

/// Answers with the changes since the cursor, as soon as there is one.
pub async fn poll(
    app: &App,
    call: ChangesRequest,
    since: Cursor,
    watched: WatchedOutbox,
    closed: CancellationToken,
) -> Answer {
    let expiry = call.subscription.identity().claims().expires_at().saturating_sub(now());
    let until = Instant::now() + call.wait.min(Duration::from_secs(expiry));
    let outbox = Arc::clone(&call.outbox);
    let hidden = call.subscription.hidden().next().map(str::to_owned);
    let topic = call.subscription.topic().cloned();
    let judge = Arc::clone(&app.topic_judge);
    let revoked = judge.lost(call.subscription.identity().clone(), topic.clone());
    let _entry = call.entry(app, ClientKind::Poll);
    let mut catch_up = call.catch_up(app, since.clone());
    let (progress, taken) = match read_first(&mut catch_up, &outbox, hidden.as_deref()).await {
        Ok(first) => first,
        Err(answer) => return answer,
    };
    let taken = match taken {
        Some(taken) => Some(taken),
        None => tokio::select! {
            taken = timeout_at(until, outbox.take()) => taken.ok(),
            () = app.verifier.withdrawn(catch_up.subscription().identity().claims()) => {
                return error(StatusCode::UNAUTHORIZED, &TokenError::Signer.connect_text());
            }
            () = revoked => return topic.map_or_else(unavailable, |topic| lost(&topic, None)),
            () = app.end.cancelled() => None,
            () = closed.cancelled() => None,
        },
    };
    if taken == Some(Taken::Full) {
        // The outbox or the memory budget is full: the next poll reads the same changes from the changelog.
        return no_changes(&since.to_string(), true, hidden.as_deref());
    }
    // Nothing is delivered after the token's expiry, so a later position must not be returned: it would skip changes.
    let expires_at = catch_up.subscription().identity().claims().expires_at();
    let reached = match progress {
        // The position may be beyond the last visible change.
        Progress::More => Some(catch_up.since()),
        Progress::Live => catch_up.leave().await.filter(|_| now() < expires_at),
    };
    // Take the changes that were delivered while leaving.
    if outbox.take().now_or_never() == Some(Taken::Full) {
        return no_changes(&since.to_string(), true, hidden.as_deref());
    }
    let reached = reached.filter(|cursor| cursor.is_at_or_after(&since));
    let hidden = take_hidden(&outbox).or(hidden);
    let sent = {
        let frames = &outbox.in_flight().frames;
        Sent { bytes: frames.iter().map(Frame::len).sum(), messages: frames.len(), gaps: 0 }
    };
    app.observe.sent(ClientKind::Poll.name(), sent);
    if outbox.in_flight().frames.is_empty() {
        return no_changes(&reached.unwrap_or(since).to_string(), false, hidden.as_deref());
    }
    // Without a known position, the cursor is that of the last change.
    let Some(cursor) = reached else { return changes(&outbox, None, true, watched) };
    // Within or before the last page there may be more changes, but perhaps none that this subscriber may see.
    let is_partial = progress == Progress::More || cursor.within().is_some();
    let more = is_partial && has_more(catch_up, cursor.clone()).await;
    changes(&outbox, Some(&cursor.to_string()), more, watched)
}

/// Answers with no changes and the current cursor, from which a client follows a topic.
pub async fn position(app: &App) -> Answer {
    match app.feed.position_soon().await {
        Some(cursor) => no_changes(&cursor.to_string(), false, None),
        None => unavailable(),
    }
}

/// Reads until there are frames or the subscription is live. Returns what was taken from the outbox, if anything.
///
/// # Errors
/// The answer, if there is nothing to wait for.
async fn read_first(
    catch_up: &mut CatchUp,
    outbox: &Outbox,
    hidden: Option<&str>,
) -> Result<(Progress, Option<Taken>), Answer> {
    let start = catch_up.since();
    let start_deadline = Instant::now() + START_TIMEOUT;
    loop {
        let progress = match timeout_at(start_deadline, catch_up.go_on()).await {
            Ok(Ok(progress)) => progress,
            Ok(Err(ReplayError::Gap(why))) => return Err(gap(why)),
            Ok(Err(ReplayError::Unavailable(why))) => {
                tracing::debug!(error = %why, "replay not read");
                return Err(unavailable());
            }
            Ok(Err(ReplayError::Ended)) => return Err(expired(catch_up.subscription())),
            // A long replay without visible changes: answer with the position reached.
            Err(_) if catch_up.since() != start => {
                return Err(no_changes(&catch_up.since().to_string(), true, hidden));
            }
            Err(_) => return Err(unavailable()),
        };
        let taken = outbox.take().now_or_never();
        if taken.is_some() || progress == Progress::Live {
            return Ok((progress, taken));
        }
    }
}

/// Whether this subscription has more changes after the cursor now. True if that is not known in time.
async fn has_more(catch_up: CatchUp, cursor: Cursor) -> bool {
    let outbox = &catch_up.outbox;
    let outbox = Arc::new(Outbox::of(outbox.owner(), MIN_OUTBOX, Arc::clone(outbox.budget())));
    let mut ahead = catch_up.restarted(cursor, Arc::clone(&outbox));
    let has_more = timeout(MORE_TIMEOUT, async {
        loop {
            match ahead.go_on().await {
                // The next request gets the error.
                Err(_) => return true,
                Ok(_) if outbox.take().now_or_never().is_some() => return true,
                Ok(Progress::More) => {}
                Ok(Progress::Live) => break,
            }
        }
        // Live within a page: wait for the rest of it.
        loop {
            let is_between = ahead.position().await.is_some_and(|here| here.within().is_none());
            if outbox.take().now_or_never().is_some() {
                return true;
            }
            if is_between {
                return false;
            }
            sleep(CHECK_INTERVAL).await;
        }
    });
    has_more.await.unwrap_or(true)
}

/// Removes the notices that the table shows no row any more from the taken frames, and returns the last one.
fn take_hidden(outbox: &Outbox) -> Option<String> {
    let mut hidden = None;
    outbox.in_flight().frames.retain(|frame| match frame.content() {
        Content::Notice(Notice::Hidden(why)) => {
            hidden = Some(why.clone());
            false
        }
        _ => true,
    });
    hidden
}

/// Answers with no changes, and the cursor; `hidden` says why the table shows no row, if it shows none.
fn no_changes(cursor: &str, more: bool, hidden: Option<&str>) -> Answer {
    let notice = notice(hidden);
    json(StatusCode::OK, format!(r#"{{"cursor":"{cursor}","changes":[],"more":{more}{notice}}}"#))
}

/// Answers with the changes taken from the outbox, and the cursor; without one, the cursor of the last change.
fn changes(outbox: &Outbox, cursor: Option<&str>, more: bool, watched: WatchedOutbox) -> Answer {
    // A separate outbox: later deliveries to the other one must not evict the answer.
    let answering = Arc::new(Outbox::of(outbox.owner(), usize::MAX, Arc::clone(outbox.budget())));
    let frames = std::mem::take(&mut outbox.in_flight().frames);
    let mut found = Vec::with_capacity(frames.len());
    let mut is_cut = false;
    for frame in &frames {
        match frame.content() {
            Content::Change(Envelope::Cursor(cursor), object) => found.push((cursor, object)),
            // Changes before a gap are returned first; the next request meets the gap.
            Content::Notice(Notice::PolicyError(why)) if found.is_empty() => {
                return error(StatusCode::FORBIDDEN, why);
            }
            Content::Notice(Notice::Gap { reason, .. }) if found.is_empty() => return gap(reason),
            _ => {
                is_cut = true;
                break;
            }
        }
    }
    let more = more || is_cut;
    let last = found.last().map_or("", |(cursor, _)| cursor.as_str());
    let cursor = cursor.filter(|_| !is_cut).unwrap_or(last);
    if found.is_empty() {
        return no_changes(cursor, more, None);
    }
    let mut before = format!(r#"{{"cursor":"{cursor}","changes":["#);
    let mut in_flight = answering.in_flight();
    for (n, (_, object)) in found.iter().enumerate() {
        let after = if n + 1 == found.len() { "]" } else { "," };
        let envelope = Envelope::Text { before: std::mem::take(&mut before), after };
        in_flight.frames.push_back(Frame::change(envelope, Arc::clone(object), outbox.budget()));
    }
    in_flight.frames.push_back(Frame::text(format!(r#","more":{more}}}"#), outbox.budget()));
    drop(in_flight);
    json_answer(answering, watched)
}
