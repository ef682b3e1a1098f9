//! `GET /realtime/v1/changes`: rows with a cursor, the changes since one, and the changes as a stream.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap};
use hyper::{Request, Response, StatusCode};
use serde_json::{Map, Value};
use tokio::time::{Instant, timeout, timeout_at};

use crate::feed::binding::BindError;
use crate::feed::follower::{Follower, Progress};
use crate::feed::outbox::{Outbox, Taken};
use crate::feed::past::Missed;
use crate::model::cursor::Cursor;
use crate::model::dress::{Bare, Dress};
use crate::model::limits::{Beyond, MostRows};
use crate::model::policy::Identity;
use crate::model::session::ChannelId;
use crate::model::subscription::{Request as Wanted, Subscription, Target};
use crate::transport::auth::TokenError;
use crate::transport::http::{App, Watched, error, json, twice};
use crate::transport::query::{is_unreadable, names, parameter, repeated};
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
/// PostgreSQL has this long to let a poll begin.
const PATIENCE: Duration = Duration::from_secs(8);
/// A text that means neither a stream nor JSON is JSON.
const STREAM: &str = "text/event-stream";

/// A request that was understood.
struct Call {
    subscription: Subscription,
    since: Option<Cursor>,
    wait: Duration,
    channel: ChannelId,
    outbox: Arc<Outbox>,
}

/// Answers a request.
pub async fn serve(app: Arc<App>, request: Request<Incoming>, watched: Watched) -> Answer {
    let wants_stream = request
        .headers()
        .get(header::ACCEPT)
        .and_then(|accept| accept.to_str().ok())
        .is_some_and(|accept| accept.contains(STREAM));
    if app.budget.is_exceeded() {
        return error(StatusCode::SERVICE_UNAVAILABLE, "too much waits for clients now, try again");
    }
    let call = match understand(&app, &request).await {
        Ok(call) => call,
        Err(refused) => return refused,
    };
    match (&call.since, wants_stream) {
        (None, false) => rows(&app, &call).await,
        (Some(_), false) => poll(&app, call).await,
        (_, true) => follow(app, call, watched).await,
    }
}

async fn understand(app: &App, request: &Request<Incoming>) -> Result<Call, Answer> {
    let query = request.uri().query().unwrap_or_default();
    let refused = |status: StatusCode, why: &str| error(status, why);
    if let Some(name) = repeated(query) {
        return Err(refused(StatusCode::BAD_REQUEST, &twice(&name)));
    }
    let token = bearer(request.headers()).or_else(|| parameter(query, "apikey")).unwrap_or_default();
    let claims =
        app.identify(&token).await.map_err(|why| refused(StatusCode::UNAUTHORIZED, &told_why(why)))?;
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
    let subscription = app.feed.bind(identity.clone(), &[wanted]).await.map_err(|why| match why {
        BindError::Refused(refusal) => {
            let plain = refusal.plain((&schema, &table), Some(identity.claims().role()));
            refused(StatusCode::BAD_REQUEST, &plain)
        }
        BindError::Unavailable => unavailable(),
    })?;
    Ok(Call {
        subscription,
        since,
        wait: Duration::from_secs(wait),
        channel: ChannelId { session: app.next_session(), channel: 0 },
        outbox: Arc::new(Outbox::new(app.limits.outbox_bytes.max(LEAST_OUTBOX), Arc::clone(&app.budget))),
    })
}

/// Why a token is refused, and what to do where it is not plain.
fn told_why(why: TokenError) -> String {
    let advice = match why {
        TokenError::Missing => ": give a token by the header `Authorization: Bearer …`, or by &apikey=…",
        TokenError::BadSignature => ": the secret or key that signed it is not this relay's",
        _ => "",
    };
    why.connect_text() + advice
}

/// The token of an `Authorization` header, or an API key.
fn bearer(headers: &HeaderMap) -> Option<String> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let bearer = text("authorization").and_then(|value| {
        let (scheme, token) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(token)
    });
    bearer.or_else(|| text("apikey")).or_else(|| text("x-api-key")).map(str::to_owned)
}

/// The current rows, and the cursor after them.
async fn rows(app: &App, call: &Call) -> Answer {
    let most = app.limits.rows;
    match app.feed.rows(&call.subscription, most).await {
        Ok(found) => match found.beyond {
            Some(beyond) => error(StatusCode::PAYLOAD_TOO_LARGE, &too_much(most, beyond)),
            None => json(StatusCode::OK, app.budget.count(told(&found.cursor, found.rows))),
        },
        Err(why) => {
            // What a policy raises may tell of rows and claims.
            match why.code() {
                Some(code) => tracing::debug!(code, "rows could not be read: PostgreSQL refused"),
                None => tracing::debug!(error = %why, "rows could not be read"),
            }
            match why.refusal() {
                Some(_) if !why.is_transient() => error(StatusCode::FORBIDDEN, "the rows may not be read"),
                _ => unavailable(),
            }
        }
    }
}

fn too_much(most: MostRows, beyond: Beyond) -> String {
    let (what, setting) = match beyond {
        Beyond::Number => (format!("{} rows", most.number), "--most-rows"),
        Beyond::Bytes => (format!("{} bytes of rows", most.bytes), "--most-row-bytes"),
    };
    format!("more than {what}: narrow them by filter=, or have the relay started with a larger {setting}")
}

/// Rows as an answer. Each is let go once it is part of it: all of them twice would be twice the bound.
fn told(cursor: &str, rows: Vec<String>) -> String {
    let mut body = format!(r#"{{"cursor":"{cursor}","rows":["#);
    for (number, row) in rows.into_iter().enumerate() {
        if number > 0 {
            body.push(',');
        }
        body.push_str(&row);
    }
    body.push_str("]}");
    body
}

/// The changes since the cursor, as soon as there is one.
async fn poll(app: &App, call: Call) -> Answer {
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
    let mut pieces = VecDeque::new();
    let taken = match outbox.take(&mut pieces).now_or_never() {
        Some(taken) => Some(taken),
        None if progress == Progress::More => None,
        None => tokio::select! {
            taken = timeout_at(until, outbox.take(&mut pieces)) => taken.ok(),
            () = app.verifier.withdrawn(follower.subscription().identity().claims()) => {
                return error(StatusCode::UNAUTHORIZED, &TokenError::Signer.connect_text());
            }
            () = app.end.cancelled() => None,
        },
    };
    if taken == Some(Taken::Full) {
        // More came at once than may wait, for one client or for all: it is read from the changelog next time.
        return changes(&VecDeque::new(), Some(&since.to_string()), true);
    }
    if progress == Progress::More {
        // It has come further than the last change that may be seen.
        return changes(&pieces, Some(&follower.since().to_string()), true);
    }
    if taken == Some(Taken::Frames) {
        return changes(&pieces, None, false);
    }
    // From the second on in which the token ends nothing is delivered to it: what comes then is for the next one.
    let ends_at = follower.subscription().identity().claims().expires_at();
    let reached = follower.leave().await.filter(|cursor| cursor.is_at_or_after(&since));
    let cursor = reached.filter(|_| ws::now() < ends_at).map(|cursor| cursor.to_string());
    // What was delivered while we left is there now.
    match outbox.take(&mut pieces).now_or_never() {
        Some(Taken::Full) => changes(&VecDeque::new(), Some(&since.to_string()), true),
        Some(Taken::Frames) => changes(&pieces, cursor.as_deref(), false),
        _ => changes(&pieces, Some(&cursor.unwrap_or_else(|| since.to_string())), false),
    }
}

/// The pieces as an answer; the cursor is the given one, or that of the last piece.
fn changes(pieces: &VecDeque<Bytes>, cursor: Option<&str>, more: bool) -> Answer {
    let (mut last, mut end) = ("", cursor);
    let mut list = Vec::with_capacity(pieces.len());
    for piece in pieces {
        match std::str::from_utf8(piece).ok().and_then(Bare::parse) {
            Some((cursor, Bare::Change(change))) => {
                last = cursor;
                list.push(change);
            }
            // What stands before a gap is told first; the gap is met again from there.
            Some((_, Bare::Gap(why))) if list.is_empty() => return gap(why),
            _ => {
                end = None;
                break;
            }
        }
    }
    let (last, more) = (end.unwrap_or(last), if more { r#","more":true"# } else { "" });
    json(StatusCode::OK, format!(r#"{{"cursor":"{last}","changes":[{}]{more}}}"#, list.join(",")))
}

async fn follow(app: Arc<App>, call: Call, watched: Watched) -> Answer {
    if app.observe.session_count() >= app.limits.connections {
        return error(StatusCode::TOO_MANY_REQUESTS, "Too many connected users");
    }
    let Call { subscription, since, channel, outbox, .. } = call;
    let since = match since {
        Some(since) => since,
        None => match app.feed.position_soon().await {
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
        Ok(Ok(progress)) => stream::answer(app, follower, since, progress, watched),
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

fn unavailable() -> Answer {
    error(StatusCode::SERVICE_UNAVAILABLE, "the database cannot be asked now, try again")
}
