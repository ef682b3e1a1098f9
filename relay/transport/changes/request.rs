//! `GET /realtime/v1/changes`: rows with a cursor, the changes since one, and the changes as a stream.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::{Request, StatusCode};
use serde_json::{Map, Value};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::auth::verifier::TokenError;
use crate::auth::verifier::now;
use crate::feed::catch_up::{CatchUp, Progress};
use crate::feed::deliver::frame::Frame;
use crate::feed::deliver::outbox::{Outbox, Taken};
use crate::feed::handle::Given;
use crate::feed::replay::reader::ReplayError;
use crate::feed::subscribe::Attempt;
use crate::feed::subscribe::BindError;
use crate::model::codec::event::{ChangeEvent, Codec};
use crate::model::log::cursor::Cursor;
use crate::model::policy::visibility::Identity;
use crate::model::session::limits::{Beyond, MostRows};
use crate::model::session::machine::ChannelId;
use crate::model::subscription::binding::{Request as Wanted, Scope, Subscription, Target};
use crate::model::subscription::error::{SubscribeError, is_raising, raising_somewhere};
use crate::model::subscription::paging::{After, By, Paging};
use crate::transport::app::App;
use crate::transport::changes::sse;
use crate::transport::content_type::wants_stream;
use crate::transport::held_answer::HeldAnswer;
use crate::transport::held_answer::Watched;
use crate::transport::query::twice;
use crate::transport::query::{bearer, is_unreadable, names, parameter, repeated};
use crate::transport::response::Answer;
use crate::transport::response::{error, json};

/// How long a poll waits by default, and at most, in seconds: below what proxies allow an answer.
const WAIT: u64 = 25;
const MOST_WAIT: u64 = 55;
/// What a request may say.
const PARAMETERS: [&str; 12] = [
    "apikey", "topic", "event", "schema", "table", "filter", "select", "since", "wait", "order", "limit",
    "after",
];
/// Of these, what is said of rows alone.
const PAGING: [&str; 3] = ["order", "limit", "after"];
/// Room for the largest change beside a part of others: what is read from the past waits for its reader.
const LEAST_OUTBOX: usize = 4 << 20;
/// Rows are put together up to this size, and counted then.
const BLOCK: usize = 64 * 1024;
/// PostgreSQL has this long to let a poll begin.
const PATIENCE: Duration = Duration::from_secs(8);
/// How long it may take to learn whether there is more.
const AHEAD: Duration = Duration::from_secs(2);
/// The pause between two looks whether the rest of a page was delivered.
const PAUSE: Duration = Duration::from_millis(5);
/// What `event=` may be, in capitals or not.
const EVENTS: [&str; 4] = ["*", "INSERT", "UPDATE", "DELETE"];

/// A request that was understood.
struct ChangesRequest {
    subscription: Subscription,
    since: Option<Cursor>,
    wait: Duration,
    paging: Paging,
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

async fn understand(
    app: &App,
    request: &Request<Incoming>,
    address: IpAddr,
) -> Result<ChangesRequest, Answer> {
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
    let is_of_changes = since.is_some() || wants_stream(request.headers());
    let paging = paging(query, is_of_changes, app.limits.rows.number)
        .map_err(|why| refused(StatusCode::BAD_REQUEST, &why.0))?;
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
    Ok(ChangesRequest {
        subscription,
        since,
        wait: Duration::from_secs(wait),
        paging,
        channel,
        outbox: Arc::new(Outbox::of(Some(owner), most, Arc::clone(&app.budget))),
    })
}

/// What a query says of order and pages.
fn paging(query: &str, is_of_changes: bool, most: usize) -> Result<Paging, SubscribeError> {
    let given = PAGING.iter().find(|name| parameter(query, name).is_some());
    if let Some(name) = given.filter(|_| is_of_changes) {
        return Err(SubscribeError(format!(
            "{name}: it is for rows; changes come in their own order, without it"
        )));
    }
    let limit = parameter(query, "limit").map(|limit| {
        let number = limit.parse().ok().filter(|number| (1..=most).contains(number));
        number.ok_or_else(|| SubscribeError(format!("limit: a number of rows from 1 to {most} is expected")))
    });
    Ok(Paging {
        limit: limit.transpose()?,
        order: parameter(query, "order").map(|order| By::parse(&order)).transpose()?.unwrap_or_default(),
        after: parameter(query, "after").map(|after| After::parse(&after)).transpose()?,
    })
}

/// The current rows, or a page of them, and the cursor after them.
async fn rows(app: &App, call: ChangesRequest, watched: Watched) -> Answer {
    let paging = &call.paging;
    let most = MostRows {
        number: paging.limit.unwrap_or(app.limits.rows.number),
        bytes: app.limits.rows.bytes.min(app.budget.share()),
    };
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
    match app.feed.rows(&call.subscription, paging, most, &mut take).await {
        Ok(Given { found, last }) => match found.beyond {
            Some(Beyond::Room) => no_room(),
            Some(beyond) if beyond != Beyond::Number || paging.limit.is_none() => {
                error(StatusCode::PAYLOAD_TOO_LARGE, &too_much(most, beyond))
            }
            beyond => {
                let more = beyond.is_some();
                block.push_str(&format!(r#"],"more":{more}"#));
                if let Some(last) = last.filter(|_| more) {
                    block.push_str(&format!(r#","after":"{}""#, last.word()));
                }
                block.push('}');
                if !outbox.answer(block) || outbox.take().await != Taken::Frames {
                    return no_room();
                }
                let head = format!(r#"{{"cursor":"{}","rows":["#, found.cursor);
                outbox.hand().frames.push_front(Frame::whole(head, &app.budget));
                answer(outbox, watched)
            }
        },
        Err(Attempt::Refused(why)) => error(StatusCode::BAD_REQUEST, &why.0),
        Err(Attempt::Failed(why)) => {
            // What a policy raises may tell of rows and claims.
            match why.code() {
                Some(code) => tracing::debug!(code, "rows could not be read: PostgreSQL refused"),
                None => tracing::debug!(error = %why, "rows could not be read"),
            }
            match why.refusal() {
                Some(_) if why.code() == Some("42883") && !paging.order.is_empty() => error(
                    StatusCode::BAD_REQUEST,
                    "order: a column that it names has a type without an order",
                ),
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
    format!(
        "more than {what}: read them in pages (limit=), narrow them by filter=, or have the relay started with a larger {setting}"
    )
}

/// What is in the hand of the outbox, as JSON.
fn answer(outbox: Arc<Outbox>, watched: Watched) -> Answer {
    let mut answer = json(StatusCode::OK, "");
    *answer.body_mut() = HeldAnswer::new(outbox, watched).boxed_unsync();
    answer
}

/// The changes since the cursor, as soon as there is one.
async fn poll(app: &App, call: ChangesRequest, watched: Watched, closed: CancellationToken) -> Answer {
    let ChangesRequest { subscription, since: Some(since), wait, channel, outbox, .. } = call else {
        return unavailable();
    };
    let until = Instant::now() + wait;
    let expiry = subscription.identity().claims().expires_at().saturating_sub(now());
    let until = until.min(Instant::now() + Duration::from_secs(expiry));
    let mut follower = CatchUp::new(
        app.feed.clone(),
        channel,
        subscription,
        Codec::ChangeEvent,
        since.clone(),
        Arc::clone(&outbox),
    );
    let began = follower.since();
    let patience = Instant::now() + PATIENCE;
    let (progress, taken) = loop {
        let progress = match timeout_at(patience, follower.go_on()).await {
            Ok(Ok(progress)) => progress,
            Ok(Err(ReplayError::Gap(why))) => return gap(why),
            Ok(Err(ReplayError::Unavailable(why))) => {
                tracing::debug!(error = %why, "the past could not be read");
                return unavailable();
            }
            Ok(Err(ReplayError::Ended)) => return ended(follower.subscription()),
            // A long past in which nothing may be seen.
            Err(_) if follower.since() != began => return nothing(&follower.since().to_string(), true),
            Err(_) => return unavailable(),
        };
        let taken = outbox.take().now_or_never();
        if taken.is_some() || progress == Progress::Live {
            break (progress, taken);
        }
    };
    let taken = match taken {
        Some(taken) => Some(taken),
        None => tokio::select! {
            taken = timeout_at(until, outbox.take()) => taken.ok(),
            () = app.verifier.withdrawn(follower.subscription().identity().claims()) => {
                return error(StatusCode::UNAUTHORIZED, &TokenError::Signer.connect_text());
            }
            () = app.end.cancelled() => None,
            () = closed.cancelled() => None,
        },
    };
    if taken == Some(Taken::Full) {
        // More came at once than may wait, for one client or for all: it is read from the changelog next time.
        return nothing(&since.to_string(), true);
    }
    // From the second on in which the token ends nothing is delivered to it: what comes then is for the next one.
    let ends_at = follower.subscription().identity().claims().expires_at();
    let reached = match progress {
        // It has come further than the last change that may be seen.
        Progress::More => Some(follower.since()),
        Progress::Live => follower.leave().await.filter(|_| now() < ends_at),
    };
    // What was delivered while we left is there now.
    if outbox.take().now_or_never() == Some(Taken::Full) {
        return nothing(&since.to_string(), true);
    }
    let reached = reached.filter(|cursor| cursor.is_at_or_after(&since));
    if outbox.hand().frames.is_empty() {
        return nothing(&reached.unwrap_or(since).to_string(), false);
    }
    // Where that is not known, it is up to the last change.
    let Some(cursor) = reached else { return changes(&outbox, None, true, watched) };
    // In the middle of a page, or before the last one, there may be more, but nothing that this reader gets.
    let is_cut = progress == Progress::More || cursor.within().is_some();
    let more = is_cut && goes_on(app, follower, &cursor).await;
    changes(&outbox, Some(&cursor.to_string()), more, watched)
}

/// Whether the reader of a follower gets more changes after the cursor at once.
async fn goes_on(app: &App, follower: CatchUp, cursor: &Cursor) -> bool {
    let (subscription, channel) = (follower.subscription().clone(), follower.channel());
    let outbox = &follower.outbox;
    let outbox = Arc::new(Outbox::of(outbox.owner(), LEAST_OUTBOX, Arc::clone(outbox.budget())));
    // It leaves before the next one comes with the same name.
    drop(follower);
    let feed = app.feed.clone();
    let ahead = Arc::clone(&outbox);
    let mut ahead = CatchUp::new(feed, channel, subscription, Codec::ChangeEvent, cursor.clone(), ahead);
    let looked = timeout(AHEAD, async {
        loop {
            match ahead.go_on().await {
                // What is wrong is told to who asks again.
                Err(_) => return true,
                Ok(_) if outbox.take().now_or_never().is_some() => return true,
                Ok(Progress::More) => {}
                Ok(Progress::Live) => break,
            }
        }
        // The rest of a page that is being delivered is on its way.
        loop {
            let is_between = ahead.position().await.is_some_and(|here| here.within().is_none());
            if outbox.take().now_or_never().is_some() {
                return true;
            }
            if is_between {
                return false;
            }
            sleep(PAUSE).await;
        }
    });
    looked.await.unwrap_or(true)
}

/// No changes up to the cursor.
fn nothing(cursor: &str, more: bool) -> Answer {
    json(StatusCode::OK, format!(r#"{{"cursor":"{cursor}","changes":[],"more":{more}}}"#))
}

/// What is in the hand as an answer, up to the cursor, or to the last piece when none is given.
fn changes(outbox: &Outbox, cursor: Option<&str>, more: bool, watched: Watched) -> Answer {
    // Of its own: what is still delivered to the other one must not end the answer.
    let answering = Arc::new(Outbox::of(outbox.owner(), usize::MAX, Arc::clone(outbox.budget())));
    let mut pieces = std::mem::take(&mut outbox.hand().frames);
    let (mut last, mut is_cut) = (String::new(), false);
    let mut count = 0;
    for piece in &pieces {
        let head = std::str::from_utf8(piece.head()).unwrap_or_default();
        match ChangeEvent::parse(head, "") {
            Some((cursor, ChangeEvent::Change(_))) => {
                last.clear();
                last.push_str(cursor);
                count += 1;
            }
            // What stands before a gap is told first; the gap is met again from there.
            Some((_, ChangeEvent::Gap(why))) if count == 0 && is_raising(why) => {
                return error(StatusCode::FORBIDDEN, why);
            }
            Some((_, ChangeEvent::Gap(why))) if count == 0 => return gap(why),
            _ => {
                is_cut = true;
                break;
            }
        }
    }
    pieces.truncate(count);
    let cursor = cursor.filter(|_| !is_cut).unwrap_or(&last);
    let more = more || is_cut;
    if pieces.is_empty() {
        return nothing(cursor, more);
    }
    let mut head = format!(r#"{{"cursor":"{cursor}","changes":["#);
    let mut hand = answering.hand();
    while let Some(piece) = pieces.pop_front() {
        let Some(payload) = piece.payload() else { continue };
        let tail = if pieces.is_empty() { "]" } else { "," };
        let head = std::mem::take(&mut head);
        hand.frames.push_back(Frame::around(head, Arc::clone(payload), tail, outbox.budget()));
    }
    hand.frames.push_back(Frame::whole(format!(r#","more":{more}}}"#), outbox.budget()));
    drop(hand);
    answer(answering, watched)
}

async fn follow(app: Arc<App>, call: ChangesRequest, watched: Watched, closed: CancellationToken) -> Answer {
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
    let mut follower = CatchUp::new(
        app.feed.clone(),
        channel,
        subscription,
        Codec::ChangeEvent,
        since.clone(),
        Arc::clone(&outbox),
    );
    match timeout(PATIENCE, follower.go_on()).await {
        Ok(Ok(progress)) => sse::answer(app, follower, since, progress, (watched, closed)),
        Ok(Err(ReplayError::Gap(why))) => gap(why),
        Ok(Err(ReplayError::Ended)) => ended(follower.subscription()),
        Ok(Err(ReplayError::Unavailable(_))) | Err(_) => unavailable(),
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
    let seconds_ago = now().saturating_sub(subscription.identity().claims().expires_at());
    error(StatusCode::UNAUTHORIZED, &TokenError::Expired { seconds_ago }.connect_text())
}

fn no_room() -> Answer {
    error(StatusCode::SERVICE_UNAVAILABLE, "too much waits for clients now, try again")
}

fn unavailable() -> Answer {
    error(StatusCode::SERVICE_UNAVAILABLE, "the database cannot be asked now, try again")
}
