//! `GET /realtime/v1/changes`: the current rows with a cursor, a long poll for the changes since a cursor, or an event stream.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::header::HeaderMap;
use hyper::{Request, StatusCode};
use serde_json::{Map, Value};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::auth::verifier::TokenError;
use crate::auth::verifier::now;
use crate::feed::catch_up::{CatchUp, Progress};
use crate::feed::deliver::frame::{Content, Frame};
use crate::feed::deliver::outbox::{Outbox, Taken};
use crate::feed::handle::RowsPage;
use crate::feed::replay::reader::ReplayError;
use crate::feed::subscribe::BindError;
use crate::feed::subscribe::RequestError;
use crate::model::codec::protocol::{Codec, Envelope, Notice};
use crate::model::log::cursor::Cursor;
use crate::model::policy::visibility::Identity;
use crate::model::session::channel::ChannelId;
use crate::model::session::limits::{ExceededLimit, RowLimit};
use crate::model::subscription::binding::{Request as Wanted, Scope, Subscription, Target};
use crate::model::subscription::error::{SubscribeError, is_raising, raising_on_read};
use crate::model::subscription::paging::{OrderBy, PageToken, Paging};
use crate::transport::app::App;
use crate::transport::changes::sse;
use crate::transport::content_type::wants_stream;
use crate::transport::held_answer::HeldAnswer;
use crate::transport::held_answer::WatchedOutbox;
use crate::transport::query::repeated_error;
use crate::transport::query::{bearer, is_unreadable, names, parameter, repeated};
use crate::transport::response::Answer;
use crate::transport::response::{error, json};

/// Default and maximum wait of a poll, in seconds. Below the usual timeouts of proxies.
const DEFAULT_WAIT: u64 = 25;
const MAX_WAIT: u64 = 55;
/// The known parameters.
const PARAMETERS: [&str; 12] = [
    "apikey", "topic", "event", "schema", "table", "filter", "select", "since", "wait", "order", "limit",
    "after",
];
/// The parameters that only apply to rows.
const PAGING: [&str; 3] = ["order", "limit", "after"];
/// Minimum outbox size in bytes: room for the largest change beside a chunk of others. Replayed changes wait in the outbox.
const MIN_OUTBOX: usize = 4 << 20;
/// Rows are collected into blocks of this size, each counted in the memory budget.
const BLOCK: usize = 64 * 1024;
/// Time limit for a poll or stream to read its first changes from PostgreSQL.
const START_TIMEOUT: Duration = Duration::from_secs(8);
/// Time limit for finding out whether there are more changes.
const MORE_TIMEOUT: Duration = Duration::from_secs(2);
/// Interval between checks whether the rest of a page was delivered.
const CHECK_INTERVAL: Duration = Duration::from_millis(5);
/// The values of `event=`, case-insensitive.
const EVENTS: [&str; 4] = ["*", "INSERT", "UPDATE", "DELETE"];

/// A valid request.
struct ChangesRequest {
    subscription: Subscription,
    since: Option<Cursor>,
    wait: Duration,
    paging: Paging,
    channel: ChannelId,
    outbox: Arc<Outbox>,
}

/// Answers a request. `closed` is cancelled when the client has closed its side; the answer then waits for no further changes.
pub async fn serve(
    app: Arc<App>,
    request: Request<Incoming>,
    address: IpAddr,
    watched: WatchedOutbox,
    closed: CancellationToken,
) -> Answer {
    let wants_stream = wants_stream(request.headers());
    if !app.budget.make_room(0) {
        return no_room();
    }
    let call = match parse(&app, &request, address).await {
        Ok(call) => call,
        Err(refused) => return refused,
    };
    match (&call.since, wants_stream) {
        (None, false) => rows(&app, call, watched).await,
        (Some(_), false) => poll(&app, call, watched, closed).await,
        (_, true) => follow(app, call, watched, closed).await,
    }
}

/// Reads the parameters, verifies the token and binds the subscription.
///
/// # Errors
/// The answer that refuses the request.
async fn parse(app: &App, request: &Request<Incoming>, address: IpAddr) -> Result<ChangesRequest, Answer> {
    let query = request.uri().query().unwrap_or_default();
    if let Some(name) = repeated(query) {
        return Err(error(StatusCode::BAD_REQUEST, &repeated_error(&name)));
    }
    let token = bearer(request.headers()).or_else(|| parameter(query, "apikey")).unwrap_or_default();
    let claims = app.identify(&token).await.map_err(|why| {
        let why = why.advised_text();
        app.observe.request_refused(address, request.uri().path(), &why);
        error(StatusCode::UNAUTHORIZED, &why)
    })?;
    check_parameters(query).map_err(bad_request)?;
    let wanted = wanted_changes(query).map_err(bad_request)?;
    let Target::Table { schema, table } = wanted.target.clone() else {
        return Err(error(StatusCode::BAD_REQUEST, "one table of one schema is expected"));
    };
    let since = since(request.headers(), query).map_err(bad_request)?;
    let wait = wait(query).map_err(bad_request)?;
    let is_of_changes = since.is_some() || wants_stream(request.headers());
    let paging = paging(query, is_of_changes, app.limits.rows.number).map_err(bad_request)?;
    let identity = Identity::new(claims);
    let channel = ChannelId { session: app.next_session(), channel: 0 };
    let bound = app.feed.bind(channel, identity.clone(), &[wanted]).await;
    let whole = bound.and_then(|subscription| subscription.whole().map_err(BindError::Refused));
    let subscription = whole.map_err(|why| match why {
        BindError::Refused(refusal) => {
            let plain = refusal.plain((&schema, &table), Some(identity.claims().role()));
            error(StatusCode::BAD_REQUEST, &plain)
        }
        BindError::Unavailable => unavailable(),
    })?;
    // Clients without a subject share the memory budget of their address.
    let claims = identity.claims();
    let owner = match claims.sub() {
        Some(sub) => app.budget.owner((claims.role(), sub)),
        None => app.budget.owner((claims.role(), address)),
    };
    let outbox_bytes = app.limits.outbox_bytes.max(MIN_OUTBOX);
    Ok(ChangesRequest {
        subscription,
        since,
        wait,
        paging,
        channel,
        outbox: Arc::new(Outbox::of(Some(owner), outbox_bytes, Arc::clone(&app.budget))),
    })
}

/// Refuses unknown parameters and values that are not UTF-8.
fn check_parameters(query: &str) -> Result<(), SubscribeError> {
    if parameter(query, "topic").is_some() {
        return Err(SubscribeError(String::from("broadcasts are not available here: give table=")));
    }
    if let Some(unknown) = names(query).find(|name| !PARAMETERS.contains(&name.as_str())) {
        let name: String = unknown.chars().take(40).collect();
        return Err(SubscribeError(format!(
            "{name}: there is no such parameter, only {}",
            PARAMETERS.join(", ")
        )));
    }
    match PARAMETERS.into_iter().find(|name| is_unreadable(query, name)) {
        Some(name) => Err(SubscribeError(format!("{name}: this is not UTF-8"))),
        None => Ok(()),
    }
}

/// Reads the parameters that name the table, operations, filter and columns.
fn wanted_changes(query: &str) -> Result<Wanted, SubscribeError> {
    let event = parameter(query, "event").unwrap_or_default();
    if !event.is_empty() && !EVENTS.iter().any(|known| known.eq_ignore_ascii_case(&event)) {
        return Err(SubscribeError(format!("event: one of {} is expected", EVENTS.join(", "))));
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
        return Err(SubscribeError(String::from(
            "table: the name of a table is expected, such as ?table=todos (&schema=public&filter=id=gt.7)",
        )));
    }
    Wanted::parse(&entry)
}

/// Reads the cursor of `Last-Event-ID`, else of `since=`.
fn since(headers: &HeaderMap, query: &str) -> Result<Option<Cursor>, SubscribeError> {
    let last = headers.get("last-event-id").and_then(|id| id.to_str().ok()).map(str::to_owned);
    let text = last.filter(|id| !id.is_empty()).or_else(|| parameter(query, "since"));
    text.map(|text| text.parse::<Cursor>())
        .transpose()
        .map_err(|why| SubscribeError(format!("since: {why}; without it you get the rows and a cursor")))
}

/// Reads how long a poll waits.
fn wait(query: &str) -> Result<Duration, SubscribeError> {
    let Some(text) = parameter(query, "wait") else { return Ok(Duration::from_secs(DEFAULT_WAIT)) };
    let seconds = text.parse().ok().filter(|seconds| *seconds <= MAX_WAIT);
    seconds
        .map(Duration::from_secs)
        .ok_or_else(|| SubscribeError(format!("wait: seconds are expected, at most {MAX_WAIT}")))
}

/// Reads the paging parameters. `max_rows` is the largest allowed limit.
///
/// # Errors
/// If a parameter is malformed, or the request is for changes.
fn paging(query: &str, is_of_changes: bool, max_rows: usize) -> Result<Paging, SubscribeError> {
    let given = PAGING.iter().find(|name| parameter(query, name).is_some());
    if let Some(name) = given.filter(|_| is_of_changes) {
        return Err(SubscribeError(format!(
            "{name}: it is for rows; changes come in their own order, without it"
        )));
    }
    let limit = parameter(query, "limit").map(|limit| {
        let number = limit.parse().ok().filter(|number| (1..=max_rows).contains(number));
        number.ok_or_else(|| {
            SubscribeError(format!("limit: a number of rows from 1 to {max_rows} is expected"))
        })
    });
    Ok(Paging {
        limit: limit.transpose()?,
        order: parameter(query, "order").map(|order| OrderBy::parse(&order)).transpose()?.unwrap_or_default(),
        after: parameter(query, "after").map(|after| PageToken::parse(&after)).transpose()?,
    })
}

/// Answers with the current rows, or a page of them, and the cursor to continue from.
async fn rows(app: &App, call: ChangesRequest, watched: WatchedOutbox) -> Answer {
    let paging = &call.paging;
    let limit = RowLimit {
        number: paging.limit.unwrap_or(app.limits.rows.number),
        bytes: app.limits.rows.bytes.min(app.budget.share()),
    };
    let outbox = call.outbox;
    let mut block = String::new();
    let mut is_first = true;
    // Full blocks wait in the outbox, where they are counted and can be evicted.
    let mut take = |row: &str| {
        if !std::mem::take(&mut is_first) {
            block.push(',');
        }
        block.push_str(row);
        block.len() < BLOCK || outbox.answer(std::mem::take(&mut block))
    };
    match app.feed.rows(&call.subscription, paging, limit, &mut take).await {
        Ok(RowsPage { found, last }) => match found.beyond {
            Some(ExceededLimit::Room) => no_room(),
            Some(exceeded) if exceeded != ExceededLimit::Number || paging.limit.is_none() => {
                error(StatusCode::PAYLOAD_TOO_LARGE, &too_many_rows(limit, exceeded))
            }
            exceeded => {
                let more = exceeded.is_some();
                block.push_str(&format!(r#"],"more":{more}"#));
                if let Some(last) = last.filter(|_| more) {
                    block.push_str(&format!(r#","after":"{}""#, last.encode()));
                }
                block.push('}');
                if !outbox.answer(block) || outbox.take().await != Taken::Frames {
                    return no_room();
                }
                let head = format!(r#"{{"cursor":"{}","rows":["#, found.cursor);
                outbox.hand().frames.push_front(Frame::text(head, &app.budget));
                answer(outbox, watched)
            }
        },
        Err(RequestError::Refused(why)) => error(StatusCode::BAD_REQUEST, &why.0),
        Err(RequestError::Failed(why)) => {
            // Log no message of PostgreSQL: an error raised by a policy may contain rows or claims.
            match why.code() {
                Some(code) => tracing::debug!(code, "rows refused by PostgreSQL"),
                None => tracing::debug!(error = %why, "rows not read"),
            }
            match why.refusal() {
                Some(_) if why.code() == Some("42883") && !paging.order.is_empty() => error(
                    StatusCode::BAD_REQUEST,
                    "order: a column that it names has a type without an order",
                ),
                Some(_) if !why.is_transient() => {
                    error(StatusCode::FORBIDDEN, &rows_refused(&call.subscription, why.code()))
                }
                _ => unavailable(),
            }
        }
    }
}

/// The error for rows that PostgreSQL refused. Unless the code means missing rights or a timeout, the policy raised an error.
fn rows_refused(subscription: &Subscription, code: Option<&str>) -> String {
    let binding = subscription.bindings().first();
    match (binding.map(|binding| (&binding.scope, &binding.filter)), code) {
        (Some((Scope::Relation(_, _, name, _), None)), Some(code)) if !matches!(code, "42501" | "57014") => {
            raising_on_read(&name.0, &name.1)
        }
        _ => String::from("the rows may not be read"),
    }
}

fn too_many_rows(limit: RowLimit, exceeded: ExceededLimit) -> String {
    let (what, setting) = match exceeded {
        ExceededLimit::Number => (format!("{} rows", limit.number), "--most-rows"),
        ExceededLimit::Bytes | ExceededLimit::Room => {
            (format!("{} bytes of rows", limit.bytes), "--most-row-bytes or --total-outbox-bytes")
        }
    };
    format!(
        "more than {what}: read them in pages (limit=), narrow them by filter=, or have the relay started with a larger {setting}"
    )
}

/// Answers with the frames taken from the outbox, as JSON.
fn answer(outbox: Arc<Outbox>, watched: WatchedOutbox) -> Answer {
    let mut answer = json(StatusCode::OK, "");
    *answer.body_mut() = HeldAnswer::new(outbox, watched).boxed_unsync();
    answer
}

/// Answers with the changes since the cursor, as soon as there is one.
async fn poll(app: &App, call: ChangesRequest, watched: WatchedOutbox, closed: CancellationToken) -> Answer {
    let ChangesRequest { subscription, since: Some(since), wait, channel, outbox, .. } = call else {
        return unavailable();
    };
    let until = Instant::now() + wait;
    let expiry = subscription.identity().claims().expires_at().saturating_sub(now());
    let until = until.min(Instant::now() + Duration::from_secs(expiry));
    let mut catch_up = CatchUp::new(
        app.feed.clone(),
        channel,
        subscription,
        Codec::ChangeEvents,
        since.clone(),
        Arc::clone(&outbox),
    );
    let (progress, taken) = match read_first(&mut catch_up, &outbox).await {
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
            () = app.end.cancelled() => None,
            () = closed.cancelled() => None,
        },
    };
    if taken == Some(Taken::Full) {
        // The outbox or the memory budget is full: the next poll reads the same changes from the changelog.
        return no_changes(&since.to_string(), true);
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
        return no_changes(&since.to_string(), true);
    }
    let reached = reached.filter(|cursor| cursor.is_at_or_after(&since));
    if outbox.hand().frames.is_empty() {
        return no_changes(&reached.unwrap_or(since).to_string(), false);
    }
    // Without a known position, the cursor is that of the last change.
    let Some(cursor) = reached else { return changes(&outbox, None, true, watched) };
    // Within or before the last page there may be more changes, but perhaps none that this subscriber may see.
    let is_partial = progress == Progress::More || cursor.within().is_some();
    let more = is_partial && has_more(app, catch_up, &cursor).await;
    changes(&outbox, Some(&cursor.to_string()), more, watched)
}

/// Reads until there are frames or the subscription is live. Returns what was taken from the outbox, if anything.
///
/// # Errors
/// The answer, if there is nothing to wait for.
async fn read_first(catch_up: &mut CatchUp, outbox: &Outbox) -> Result<(Progress, Option<Taken>), Answer> {
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
                return Err(no_changes(&catch_up.since().to_string(), true));
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
async fn has_more(app: &App, catch_up: CatchUp, cursor: &Cursor) -> bool {
    let (subscription, channel) = (catch_up.subscription().clone(), catch_up.channel());
    let outbox = &catch_up.outbox;
    let outbox = Arc::new(Outbox::of(outbox.owner(), MIN_OUTBOX, Arc::clone(outbox.budget())));
    // It must leave before the next one joins with the same channel id.
    drop(catch_up);
    let feed = app.feed.clone();
    let ahead = Arc::clone(&outbox);
    let mut ahead = CatchUp::new(feed, channel, subscription, Codec::ChangeEvents, cursor.clone(), ahead);
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

/// Answers with no changes, and the cursor.
fn no_changes(cursor: &str, more: bool) -> Answer {
    json(StatusCode::OK, format!(r#"{{"cursor":"{cursor}","changes":[],"more":{more}}}"#))
}

/// Answers with the changes taken from the outbox, and the cursor; without one, the cursor of the last change.
fn changes(outbox: &Outbox, cursor: Option<&str>, more: bool, watched: WatchedOutbox) -> Answer {
    // A separate outbox: later deliveries to the other one must not evict the answer.
    let answering = Arc::new(Outbox::of(outbox.owner(), usize::MAX, Arc::clone(outbox.budget())));
    let frames = std::mem::take(&mut outbox.hand().frames);
    let mut found = Vec::with_capacity(frames.len());
    let mut is_cut = false;
    for frame in &frames {
        match frame.content() {
            Content::Change(Envelope::Cursor(cursor), object) => found.push((cursor, object)),
            // Changes before a gap are returned first; the next request meets the gap.
            Content::Notice(Notice::Gap { reason, .. }) if found.is_empty() && is_raising(reason) => {
                return error(StatusCode::FORBIDDEN, reason);
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
        return no_changes(cursor, more);
    }
    let mut before = format!(r#"{{"cursor":"{cursor}","changes":["#);
    let mut hand = answering.hand();
    for (n, (_, object)) in found.iter().enumerate() {
        let after = if n + 1 == found.len() { "]" } else { "," };
        let envelope = Envelope::Text { before: std::mem::take(&mut before), after };
        hand.frames.push_back(Frame::change(envelope, Arc::clone(object), outbox.budget()));
    }
    hand.frames.push_back(Frame::text(format!(r#","more":{more}}}"#), outbox.budget()));
    drop(hand);
    answer(answering, watched)
}

/// Answers with an event stream from the cursor, or from now on.
async fn follow(
    app: Arc<App>,
    call: ChangesRequest,
    watched: WatchedOutbox,
    closed: CancellationToken,
) -> Answer {
    if app.observe.session_count() >= app.limits.connections {
        return error(StatusCode::TOO_MANY_REQUESTS, "Too many connected users");
    }
    let ChangesRequest { subscription, since, channel, outbox, .. } = call;
    let since = match since {
        Some(since) => since,
        None => match app.feed.beginning(&subscription).await {
            Some(since) => since,
            None => return unavailable(),
        },
    };
    let mut catch_up = CatchUp::new(
        app.feed.clone(),
        channel,
        subscription,
        Codec::ChangeEvents,
        since.clone(),
        Arc::clone(&outbox),
    );
    match timeout(START_TIMEOUT, catch_up.go_on()).await {
        Ok(Ok(progress)) => sse::answer(app, catch_up, since, progress, (watched, closed)),
        Ok(Err(ReplayError::Gap(why))) => gap(why),
        Ok(Err(ReplayError::Ended)) => expired(catch_up.subscription()),
        Ok(Err(ReplayError::Unavailable(_))) | Err(_) => unavailable(),
    }
}

/// Status 410: the missed changes are not available. Says how to start again.
fn gap(why: &str) -> Answer {
    let body = serde_json::json!({
        "error": format!("Gap: {why}"),
        "hint": "request it again without since= to get the current rows and a cursor",
    });
    json(StatusCode::GONE, body.to_string())
}

/// Status 401: the token expired while the request was answered. No changes are returned.
fn expired(subscription: &Subscription) -> Answer {
    let seconds_ago = now().saturating_sub(subscription.identity().claims().expires_at());
    error(StatusCode::UNAUTHORIZED, &TokenError::Expired { seconds_ago }.connect_text())
}

fn bad_request(why: SubscribeError) -> Answer {
    error(StatusCode::BAD_REQUEST, &why.0)
}

fn no_room() -> Answer {
    error(StatusCode::SERVICE_UNAVAILABLE, "the memory for queued data is full, try again")
}

fn unavailable() -> Answer {
    error(StatusCode::SERVICE_UNAVAILABLE, "the database is unavailable, try again")
}
