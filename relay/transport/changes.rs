//! `GET /realtime/v1/changes`: rows with a cursor, the changes since one, and the changes as a stream.

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};
use serde_json::{Map, Value};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::feed::binding::BindError;
use crate::feed::follower::{Follower, Progress};
use crate::feed::frame::Frame;
use crate::feed::outbox::{Outbox, Taken};
use crate::feed::past::Missed;
use crate::model::cursor::Cursor;
use crate::model::dress::{Bare, Dress};
use crate::model::limits::{Beyond, MostRows};
use crate::model::policy::Identity;
use crate::model::refusal::{is_raising, raising_somewhere};
use crate::model::session::ChannelId;
use crate::model::subscription::{Request as Wanted, Scope, Subscription, Target};
use crate::transport::accept::wants_stream;
use crate::transport::answer::Waiting;
use crate::transport::auth::TokenError;
use crate::transport::http::{App, Watched, twice};
use crate::transport::query::{bearer, is_unreadable, names, parameter, repeated};
use crate::transport::replies::{error, json};
use crate::transport::{stream, ws};

/// An answer with a body of any kind.
pub type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// How long a poll waits by default, and at most, in seconds: below what proxies allow an answer.
const WAIT: u64 = 25;
const MOST_WAIT: u64 = 55;
/// What a request may say.
const PARAMETERS: [&str; 9] =
    ["apikey", "topic", "event", "schema", "table", "filter", "select", "since", "wait"];
/// Room for the largest change beside a part of others: what is read from the past waits for its reader.
const LEAST_OUTBOX: usize = 4 << 20;
/// Rows are put together up to this size, and counted then.
const BLOCK: usize = 64 * 1024;
/// PostgreSQL has this long to let a poll begin.
const PATIENCE: Duration = Duration::from_secs(8);
/// What `event=` may be, in capitals or not.
const EVENTS: [&str; 4] = ["*", "INSERT", "UPDATE", "DELETE"];

/// A request that was understood.
struct Call {
    subscription: Subscription,
    since: Option<Cursor>,
    wait: Duration,
    channel: ChannelId,
    outbox: Arc<Outbox>,
}

/// Answers a request. Once it is `closed`, whoever asked sends nothing more, and is not made to wait for what may come.
pub async fn serve(
    app: Arc<App>,
    request: Request<Incoming>,
    address: IpAddr,
    watched: Watched,
    closed: CancellationToken,
) -> Answer {
    let wants_stream = wants_stream(request.headers());
    if !app.budget.make_room(0) {
        return no_room();
    }
    let call = match understand(&app, &request, address).await {
        Ok(call) => call,
        Err(refused) => return refused,
    };
    match (&call.since, wants_stream) {
        (None, false) => rows(&app, call, watched).await,
        (Some(_), false) => poll(&app, call, watched, closed).await,
        (_, true) => follow(app, call, watched, closed).await,
    }
}

async fn understand(app: &App, request: &Request<Incoming>, address: IpAddr) -> Result<Call, Answer> {
    let query = request.uri().query().unwrap_or_default();
    let refused = |status: StatusCode, why: &str| error(status, why);
    if let Some(name) = repeated(query) {
        return Err(refused(StatusCode::BAD_REQUEST, &twice(&name)));
    }
    let token = bearer(request.headers()).or_else(|| parameter(query, "apikey")).unwrap_or_default();
    let claims = app.identify(&token).await.map_err(|why| {
        let why = why.advised_text();
        app.observe.request_refused(address, request.uri().path(), &why);
        refused(StatusCode::UNAUTHORIZED, &why)
    })?;
    if parameter(query, "topic").is_some() {
        return Err(refused(StatusCode::BAD_REQUEST, "broadcasts are not available here: give table="));
    }
    if let Some(unknown) = names(query).find(|name| !PARAMETERS.contains(&name.as_str())) {
        let name: String = unknown.chars().take(40).collect();
        let why = format!("{name}: there is no such parameter, only {}", PARAMETERS.join(", "));
        return Err(refused(StatusCode::BAD_REQUEST, &why));
    }
    for name in PARAMETERS {
        if is_unreadable(query, name) {
            return Err(refused(StatusCode::BAD_REQUEST, &format!("{name}: this is not UTF-8")));
        }
    }
    let event = parameter(query, "event").unwrap_or_default();
    if !event.is_empty() && !EVENTS.iter().any(|known| known.eq_ignore_ascii_case(&event)) {
        let why = format!("event: there are only {}", EVENTS.join(", "));
        return Err(refused(StatusCode::BAD_REQUEST, &why));
    }
    let mut entry = Map::new();
    for name in ["event", "schema", "table", "filter"] {
        if let Some(value) = parameter(query, name) {
            entry.insert(name.to_owned(), Value::from(value));
        }
    }
    if let Some(columns) = parameter(query, "select").filter(|columns| columns != "*") {
        entry.insert(String::from("select"), columns.split(',').map(str::trim).map(Value::from).collect());
    }
    if parameter(query, "table").is_none_or(|table| table.is_empty() || table == "*") {
        return Err(refused(
            StatusCode::BAD_REQUEST,
            "which table? ?table=todos (&schema=public&filter=id=gt.7)",
        ));
    }
    let wanted = Wanted::parse(&entry).map_err(|why| refused(StatusCode::BAD_REQUEST, &why.0))?;
    let Target::Table { schema, table } = wanted.target.clone() else {
        return Err(refused(StatusCode::BAD_REQUEST, "one table of one schema is expected"));
    };
    let last = request.headers().get("last-event-id").and_then(|id| id.to_str().ok()).map(str::to_owned);
    let since = match last.filter(|id| !id.is_empty()).or_else(|| parameter(query, "since")) {
        None => None,
        Some(word) => Some(word.parse::<Cursor>().map_err(|why| {
            refused(
                StatusCode::BAD_REQUEST,
                &format!("since: {why}; without it you get the rows and a cursor"),
            )
        })?),
    };
    let wait = match parameter(query, "wait") {
        None => WAIT,
        Some(seconds) => seconds.parse().ok().filter(|seconds| *seconds <= MOST_WAIT).ok_or_else(|| {
            refused(StatusCode::BAD_REQUEST, &format!("wait: seconds are expected, at most {MOST_WAIT}"))
        })?,
    };
    let identity = Identity::new(claims);
    let channel = ChannelId { session: app.next_session(), channel: 0 };
    let bound = app.feed.bind(channel, identity.clone(), &[wanted]).await;
    let whole = bound.and_then(|subscription| subscription.whole().map_err(BindError::Refused));
    let subscription = whole.map_err(|why| match why {
        BindError::Refused(refusal) => {
            let plain = refusal.plain((&schema, &table), Some(identity.claims().role()));
            refused(StatusCode::BAD_REQUEST, &plain)
        }
        BindError::Unavailable => unavailable(),
    })?;
    // Without a name of their own, those of one address have one share.
    let claims = identity.claims();
    let owner = match claims.sub() {
        Some(sub) => app.budget.owner((claims.role(), sub)),
        None => app.budget.owner((claims.role(), address)),
    };
    let most = app.limits.outbox_bytes.max(LEAST_OUTBOX);
    Ok(Call {
        subscription,
        since,
        wait: Duration::from_secs(wait),
        channel,
        outbox: Arc::new(Outbox::of(Some(owner), most, Arc::clone(&app.budget))),
    })
}

/// The current rows, and the cursor after them.
async fn rows(app: &App, call: Call, watched: Watched) -> Answer {
    let most = MostRows { bytes: app.limits.rows.bytes.min(app.budget.share()), ..app.limits.rows };
    let outbox = call.outbox;
    let mut block = String::new();
    let mut is_first = true;
    // What is read can be evicted before it is answered.
    let mut take = |row: &str| {
        if !std::mem::take(&mut is_first) {
            block.push(',');
        }
        block.push_str(row);
        block.len() < BLOCK || outbox.answer(std::mem::take(&mut block))
    };
    match app.feed.rows(&call.subscription, most, &mut take).await {
        Ok(found) => match found.beyond {
            Some(Beyond::Room) => no_room(),
            Some(beyond) => error(StatusCode::PAYLOAD_TOO_LARGE, &too_much(most, beyond)),
            None => {
                block.push_str("]}");
                if !outbox.answer(block) || outbox.take().await != Taken::Frames {
                    return no_room();
                }
                let head = format!(r#"{{"cursor":"{}","rows":["#, found.cursor);
                outbox.hand().frames.push_front(Frame::whole(head, &app.budget));
                answer(outbox, watched)
            }
        },
        Err(why) => {
            // What a policy raises may tell of rows and claims.
            match why.code() {
                Some(code) => tracing::debug!(code, "rows could not be read: PostgreSQL refused"),
                None => tracing::debug!(error = %why, "rows could not be read"),
            }
            match why.refusal() {
                Some(_) if !why.is_transient() => {
                    error(StatusCode::FORBIDDEN, &why_unread(&call.subscription, why.code()))
                }
                _ => unavailable(),
            }
        }
    }
}

/// Why PostgreSQL did not give the rows. It may have been the rights of the role, or the time that it takes; else the policy.
fn why_unread(subscription: &Subscription, code: Option<&str>) -> String {
    let binding = subscription.bindings().first();
    match (binding.map(|binding| (&binding.scope, &binding.filter)), code) {
        (Some((Scope::Relation(_, _, name, _), None)), Some(code)) if !matches!(code, "42501" | "57014") => {
            raising_somewhere(&name.0, &name.1)
        }
        _ => String::from("the rows may not be read"),
    }
}

fn too_much(most: MostRows, beyond: Beyond) -> String {
    let (what, setting) = match beyond {
        Beyond::Number => (format!("{} rows", most.number), "--most-rows"),
        Beyond::Bytes | Beyond::Room => {
            (format!("{} bytes of rows", most.bytes), "--most-row-bytes or --total-outbox-bytes")
        }
    };
    format!("more than {what}: narrow them by filter=, or have the relay started with a larger {setting}")
}

/// What is in the hand of the outbox, as JSON.
fn answer(outbox: Arc<Outbox>, watched: Watched) -> Answer {
    let mut answer = json(StatusCode::OK, "");
    *answer.body_mut() = Waiting::new(outbox, watched).boxed_unsync();
    answer
}

/// The changes since the cursor, as soon as there is one.
async fn poll(app: &App, call: Call, watched: Watched, closed: CancellationToken) -> Answer {
    let Call { subscription, since: Some(since), wait, channel, outbox } = call else { return unavailable() };
    let until = Instant::now() + wait;
    let expiry = subscription.identity().claims().expires_at().saturating_sub(ws::now());
    let until = until.min(Instant::now() + Duration::from_secs(expiry));
    let mut follower = Follower::new(
        app.feed.clone(),
        channel,
        subscription,
        Dress::Bare,
        since.clone(),
        Arc::clone(&outbox),
    );
    let progress = match timeout(PATIENCE, follower.go_on()).await {
        Ok(Ok(progress)) => progress,
        Ok(Err(Missed::Gap(why))) => return gap(why),
        Ok(Err(Missed::Unavailable(why))) => {
            tracing::debug!(error = %why, "the past could not be read");
            return unavailable();
        }
        Ok(Err(Missed::Ended)) => return ended(follower.subscription()),
        Err(_) => return unavailable(),
    };
    let taken = match outbox.take().now_or_never() {
        Some(taken) => Some(taken),
        None if progress == Progress::More => None,
        None => tokio::select! {
            taken = timeout_at(until, outbox.take()) => taken.ok(),
            () = app.verifier.withdrawn(follower.subscription().identity().claims()) => {
                return error(StatusCode::UNAUTHORIZED, &TokenError::Signer.connect_text());
            }
            () = app.end.cancelled() => None,
            () = closed.cancelled() => None,
        },
    };
    let changes = |cursor: Option<&str>, more| changes(&outbox, cursor, more, watched.clone());
    if taken == Some(Taken::Full) {
        // More came at once than may wait, for one client or for all: it is read from the changelog next time.
        return nothing(&since.to_string(), true);
    }
    if progress == Progress::More {
        // It has come further than the last change that may be seen.
        return changes(Some(&follower.since().to_string()), true);
    }
    if taken == Some(Taken::Frames) {
        return changes(None, false);
    }
    // From the second on in which the token ends nothing is delivered to it: what comes then is for the next one.
    let ends_at = follower.subscription().identity().claims().expires_at();
    let reached = follower.leave().await.filter(|cursor| cursor.is_at_or_after(&since));
    let cursor = reached.filter(|_| ws::now() < ends_at).map(|cursor| cursor.to_string());
    // What was delivered while we left is there now.
    match outbox.take().now_or_never() {
        Some(Taken::Full) => nothing(&since.to_string(), true),
        Some(Taken::Frames) => changes(cursor.as_deref(), false),
        _ => nothing(&cursor.unwrap_or_else(|| since.to_string()), false),
    }
}

/// No changes up to the cursor.
fn nothing(cursor: &str, more: bool) -> Answer {
    let more = if more { r#","more":true"# } else { "" };
    json(StatusCode::OK, format!(r#"{{"cursor":"{cursor}","changes":[]{more}}}"#))
}

/// What is in the hand as an answer; the cursor is the given one, or that of the last piece.
fn changes(outbox: &Outbox, cursor: Option<&str>, more: bool, watched: Watched) -> Answer {
    // Of its own: what is still delivered to the other one must not end the answer.
    let answering = Arc::new(Outbox::of(outbox.owner(), usize::MAX, Arc::clone(outbox.budget())));
    let mut pieces = std::mem::take(&mut outbox.hand().frames);
    let (mut last, mut end) = (String::new(), cursor);
    let mut count = 0;
    for piece in &pieces {
        let head = std::str::from_utf8(piece.head()).unwrap_or_default();
        match Bare::parse(head, "") {
            Some((cursor, Bare::Change(_))) => {
                last.clear();
                last.push_str(cursor);
                count += 1;
            }
            // What stands before a gap is told first; the gap is met again from there.
            Some((_, Bare::Gap(why))) if count == 0 && is_raising(why) => {
                return error(StatusCode::FORBIDDEN, why);
            }
            Some((_, Bare::Gap(why))) if count == 0 => return gap(why),
            _ => {
                end = None;
                break;
            }
        }
    }
    pieces.truncate(count);
    let (last, more) = (end.unwrap_or(&last), if more { r#","more":true"# } else { "" });
    if pieces.is_empty() {
        return nothing(last, !more.is_empty());
    }
    let mut head = format!(r#"{{"cursor":"{last}","changes":["#);
    let mut hand = answering.hand();
    while let Some(piece) = pieces.pop_front() {
        let Some(payload) = piece.payload() else { continue };
        let tail = if pieces.is_empty() { "]" } else { "," };
        let head = std::mem::take(&mut head);
        hand.frames.push_back(Frame::around(head, Arc::clone(payload), tail, outbox.budget()));
    }
    hand.frames.push_back(Frame::whole(format!("{more}}}"), outbox.budget()));
    drop(hand);
    answer(answering, watched)
}

async fn follow(app: Arc<App>, call: Call, watched: Watched, closed: CancellationToken) -> Answer {
    if app.observe.session_count() >= app.limits.connections {
        return error(StatusCode::TOO_MANY_REQUESTS, "Too many connected users");
    }
    let Call { subscription, since, channel, outbox, .. } = call;
    let since = match since {
        Some(since) => since,
        None => match app.feed.beginning(&subscription).await {
            Some(since) => since,
            None => return unavailable(),
        },
    };
    let mut follower = Follower::new(
        app.feed.clone(),
        channel,
        subscription,
        Dress::Bare,
        since.clone(),
        Arc::clone(&outbox),
    );
    match timeout(PATIENCE, follower.go_on()).await {
        Ok(Ok(progress)) => stream::answer(app, follower, since, progress, (watched, closed)),
        Ok(Err(Missed::Gap(why))) => gap(why),
        Ok(Err(Missed::Ended)) => ended(follower.subscription()),
        Ok(Err(Missed::Unavailable(_))) | Err(_) => unavailable(),
    }
}

/// What was missed cannot be had: 410, and how to begin again.
fn gap(why: &str) -> Answer {
    let body = serde_json::json!({
        "error": format!("Gap: {why}"),
        "hint": "ask again without since: you get the rows as they are now, and a cursor",
    });
    json(StatusCode::GONE, body.to_string())
}

/// The token has ended while it was answered: nothing of that is told, and the cursor is where it was.
fn ended(subscription: &Subscription) -> Answer {
    let seconds_ago = ws::now().saturating_sub(subscription.identity().claims().expires_at());
    error(StatusCode::UNAUTHORIZED, &TokenError::Expired { seconds_ago }.connect_text())
}

fn no_room() -> Answer {
    error(StatusCode::SERVICE_UNAVAILABLE, "too much waits for clients now, try again")
}

fn unavailable() -> Answer {
    error(StatusCode::SERVICE_UNAVAILABLE, "the database cannot be asked now, try again")
}
