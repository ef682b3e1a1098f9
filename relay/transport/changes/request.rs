//! `GET /realtime/v1/changes`: the current rows with a cursor, a long poll for the changes since a cursor, or an event stream; or the
//! broadcasts from the database to a topic.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::HeaderMap;
use hyper::{Method, Request, StatusCode};
use serde_json::{Map, Value};
use tokio_util::sync::CancellationToken;

use crate::feed::authorize::topic_judge::{TopicQuestion, TopicUnknown};
use crate::feed::catch_up::CatchUp;
use crate::feed::deliver::outbox::Outbox;
use crate::feed::subscribe::BindError;
use crate::model::catalog::topic_rules::TopicAct;
use crate::model::codec::protocol::Codec;
use crate::model::log::cursor::Cursor;
use crate::model::policy::visibility::Identity;
use crate::model::session::channel::ChannelId;
use crate::model::session::join::{MAX_TOPIC_BYTES, unauthorized};
use crate::model::subscription::binding::{Binding, Subscription};
use crate::model::subscription::error::{SubscribeError, identifier};
use crate::model::subscription::filter::{self, Filter};
use crate::model::subscription::paging::{OrderBy, PageToken, Paging};
use crate::model::subscription::request::{Request as Wanted, Target};
use crate::model::subscription::topic::TopicScope;
use crate::observe::Sent;
use crate::transport::admission::admit;
use crate::transport::app::App;
use crate::transport::changes::poll::{poll, position};
use crate::transport::changes::refusal::{bad_request, no_room, unavailable};
use crate::transport::changes::rows::rows;
use crate::transport::changes::sse::follow;
use crate::transport::changes::tables::{TableParameters, beside_topic, check_parameters};
use crate::transport::clients::{ClientEntry, ClientKind};
use crate::transport::content_type::wants_stream;
use crate::transport::held_answer::WatchedOutbox;
use crate::transport::query::{is_private_by, parameter};
use crate::transport::response::{Answer, error};

/// Default and maximum wait of a poll, in seconds. Below the usual timeouts of proxies.
const DEFAULT_WAIT: u64 = 25;
const MAX_WAIT: u64 = 55;
/// The bounds of `conflate=`, in milliseconds. A row is told that much later than its policies were asked.
const CONFLATE: RangeInclusive<u64> = 50..=10_000;
/// The parameters that are a group of conditions, as in PostgREST.
const GROUPS: [&str; 4] = ["or", "and", "not.or", "not.and"];
/// The parameters that only apply to rows.
const PAGING: [&str; 3] = ["order", "limit", "after"];
/// Minimum outbox size in bytes: room for the largest change beside a chunk of others. Replayed changes wait in the outbox.
pub const MIN_OUTBOX: usize = 4 << 20;
/// Time limit for a poll or stream to read its first changes from PostgreSQL.
pub const START_TIMEOUT: Duration = Duration::from_secs(8);
/// The values of `event=`, case-insensitive.
const EVENTS: [&str; 4] = ["*", "INSERT", "UPDATE", "DELETE"];

/// A valid request.
pub struct ChangesRequest {
    /// What the client wants, bound to its rights.
    pub subscription: Subscription,
    /// Where it continues; `None` for the current rows, or for a stream from now on.
    pub since: Option<Cursor>,
    /// How long a poll waits for a change.
    pub wait: Duration,
    /// How often a stream is told the latest change of each row; `None` for all changes.
    pub conflate: Option<Duration>,
    /// Which of the rows of each table it wants.
    pub pages: Vec<Paging>,
    /// The names of its tables as the client wrote them, if it names several.
    pub names: Vec<String>,
    /// The queue for its answer.
    pub outbox: Arc<Outbox>,
    channel: ChannelId,
    address: IpAddr,
}

impl ChangesRequest {
    /// Adds its client to the list of all, with what it follows as its channel.
    pub fn entry(&self, app: &App, kind: ClientKind) -> ClientEntry {
        let claims = self.subscription.identity().claims();
        let outbox = Arc::clone(&self.outbox);
        let entry = app.clients.add(self.channel.session, (kind, self.address), claims, outbox);
        let (topic, is_private) = match self.subscription.topic() {
            Some(topic) => (topic.name.to_string(), topic.is_private),
            None => {
                (self.subscription.bindings().iter().map(Binding::name).collect::<Vec<_>>().join(", "), false)
            }
        };
        entry.opened(self.channel, &topic, is_private);
        entry
    }

    /// Returns the subscriber that follows the changes after a cursor.
    pub fn catch_up(self, app: &App, since: Cursor) -> CatchUp {
        let Self { subscription, channel, outbox, conflate, .. } = self;
        let codec = if conflate.is_some() { Codec::LatestChangeEvents } else { Codec::ChangeEvents };
        CatchUp::new(app.feed.clone(), channel, subscription, codec, since, outbox)
    }
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
    let observe = Arc::clone(&app.observe);
    let (answer, kind) = match (call.since.clone(), wants_stream) {
        (None, false) if call.subscription.topic().is_some() => return position(&app).await,
        (None, false) => return rows(&app, call, watched).await,
        (Some(since), false) => (poll(&app, call, since, watched, closed).await, ClientKind::Poll),
        (_, true) => (follow(app, call, watched, closed).await, ClientKind::EventStream),
    };
    if answer.status() == StatusCode::GONE {
        observe.sent(kind.name(), Sent { gaps: 1, ..Sent::default() });
    }
    answer
}

/// Reads the parameters, verifies the token and binds the subscription.
///
/// # Errors
/// The answer that refuses the request.
async fn parse(app: &App, request: &Request<Incoming>, address: IpAddr) -> Result<ChangesRequest, Answer> {
    let claims = admit(app, address, request, &Method::GET, "changes are read by GET").await?;
    let query = request.uri().query().unwrap_or_default();
    let tables = TableParameters::of(query).map_err(bad_request)?;
    check_parameters(query, &tables).map_err(bad_request)?;
    let wanted = wanted(query, &tables).map_err(bad_request)?;
    let since = since(request.headers(), query).map_err(bad_request)?;
    let wait = wait(query).map_err(bad_request)?;
    let conflate = conflate(query, wants_stream(request.headers())).map_err(bad_request)?;
    let is_of_changes = since.is_some() || wants_stream(request.headers());
    let pages = tables.iter().map(|table| paging(table, is_of_changes, app.limits.rows.number));
    let pages = pages.collect::<Result<_, _>>().map_err(bad_request)?;
    let names = tables.iter().filter_map(TableParameters::name).map(str::to_owned).collect();
    let identity = Identity::new(claims);
    let channel = ChannelId { session: app.next_session(), channel: 0 };
    let subscription = match wanted {
        WantedChanges::Topic(topic) => of_topic(app, identity.clone(), topic).await?,
        WantedChanges::Tables(wanted) => of_tables(app, channel, identity.clone(), &wanted).await?,
    };
    if conflate.is_some() {
        has_keys(app, &subscription).await?;
    }
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
        conflate,
        pages,
        names,
        channel,
        address,
        outbox: Arc::new(Outbox::of(Some(owner), outbox_bytes, Arc::clone(&app.budget))),
    })
}

/// What a request names.
enum WantedChanges {
    /// The changes of tables, or their rows.
    Tables(Vec<Wanted>),
    /// The broadcasts to a topic.
    Topic(TopicScope),
}

/// Binds the changes of tables to an identity.
///
/// # Errors
/// The answer that refuses the request.
async fn of_tables(
    app: &App,
    channel: ChannelId,
    identity: Identity,
    wanted: &[Wanted],
) -> Result<Subscription, Answer> {
    if !wanted.iter().all(|one| matches!(one.target, Target::Table { .. })) {
        return Err(error(StatusCode::BAD_REQUEST, "one table of one schema is expected"));
    }
    let subscription = match app.feed.bind(channel, identity.clone(), wanted).await {
        Ok(subscription) => subscription,
        Err(BindError::Refused(refusal)) => return Err(refused(&refusal, wanted.first(), &identity)),
        Err(BindError::Unavailable) => return Err(unavailable()),
    };
    let first_refused = subscription.bindings().iter().position(Binding::is_refused);
    let table = first_refused.and_then(|number| wanted.get(number));
    subscription.whole().map_err(|refusal| refused(&refusal, table, &identity))
}

/// Checks that each table has a key, by which the latest change of a row is found.
///
/// # Errors
/// The answer that refuses the request.
async fn has_keys(app: &App, subscription: &Subscription) -> Result<(), Answer> {
    match app.feed.without_key(subscription).await {
        Ok(None) => Ok(()),
        Ok(Some((schema, table))) => Err(error(
            StatusCode::BAD_REQUEST,
            &format!(
                "conflate: {schema}.{table} has no primary key, by which the latest change of a row is found: alter table {} \
                 add primary key (...), or leave conflate= out",
                format_args!("{}.{}", identifier(&schema), identifier(&table))
            ),
        )),
        Err(_) => Err(unavailable()),
    }
}

/// Refuses a request because of one of its tables.
fn refused(refusal: &SubscribeError, wanted: Option<&Wanted>, identity: &Identity) -> Answer {
    let text = match wanted.map(|wanted| &wanted.target) {
        Some(Target::Table { schema, table }) => {
            refusal.plain((schema, table), Some(identity.claims().role()))
        }
        _ => refusal.to_string(),
    };
    error(StatusCode::BAD_REQUEST, &text)
}

/// Binds the broadcasts to a topic to an identity.
///
/// # Errors
/// The answer that refuses the request: the identity may not read the private topic.
async fn of_topic(app: &App, identity: Identity, topic: TopicScope) -> Result<Subscription, Answer> {
    if topic.is_private {
        let (channel, act) = (topic.name.to_string(), TopicAct::Read);
        let question = TopicQuestion { identity: identity.clone(), channel, act, is_recheck: false };
        match app.topic_judge.judge(&question).await {
            Ok(verdict) if verdict.rights.broadcast => {}
            Ok(verdict) => return Err(lost(&topic, verdict.why.as_deref())),
            Err(TopicUnknown) => return Err(unavailable()),
        }
    }
    Ok(Subscription::of_topic(identity, topic))
}

/// Refuses the broadcasts of a private topic, with why if that is not for its policies to say.
pub(super) fn lost(topic: &TopicScope, why: Option<&str>) -> Answer {
    let text = format!("Unauthorized: {}", unauthorized(&topic.name, why));
    error(StatusCode::FORBIDDEN, &text)
}

/// Reads the parameters that name the topic, or the tables and what of them.
fn wanted(query: &str, tables: &[TableParameters<'_>]) -> Result<WantedChanges, SubscribeError> {
    let refused = |why: String| Err(SubscribeError::Other(why));
    let Ok(is_private) = is_private_by(query) else {
        return refused(String::from("private: true or false is expected"));
    };
    let Some(name) = parameter(query, "topic") else {
        return match is_private {
            true => refused(String::from("private: only a topic is private: give topic=")),
            false => tables.iter().map(wanted_changes).collect::<Result<_, _>>().map(WantedChanges::Tables),
        };
    };
    if let Some(why) = beside_topic(query) {
        return refused(why);
    }
    if name.is_empty() || name.len() > MAX_TOPIC_BYTES {
        return refused(format!(
            "topic: the name of a channel is expected, of {MAX_TOPIC_BYTES} bytes at most, such as ?topic=room1"
        ));
    }
    Ok(WantedChanges::Topic(TopicScope { name: name.into(), is_private }))
}

/// Reads the parameters that name the table, operations, filter and columns.
fn wanted_changes(parameters: &TableParameters<'_>) -> Result<Wanted, SubscribeError> {
    let event = parameters.get("event").unwrap_or_default();
    if !event.is_empty() && !EVENTS.iter().any(|known| known.eq_ignore_ascii_case(&event)) {
        return Err(SubscribeError::Other(format!("event: one of {} is expected", EVENTS.join(", "))));
    }
    let mut entry = Map::new();
    for name in ["event", "schema", "table"] {
        if let Some(value) = parameters.get(name) {
            entry.insert(name.to_owned(), Value::from(value));
        }
    }
    if let Some(filter) = filter(parameters)? {
        entry.insert(String::from("filter"), Value::from(filter));
    }
    if let Some(columns) = parameters.get("select").filter(|columns| columns != "*") {
        entry.insert(String::from("select"), columns.split(',').map(str::trim).map(Value::from).collect());
    }
    if parameters.get("table").is_none_or(|table| table.is_empty() || table == "*") {
        return Err(SubscribeError::Other(String::from(
            "table: the name of a table is expected, such as ?table=todos (&schema=public&filter=id=gt.7)",
        )));
    }
    Wanted::parse(&entry)
}

/// Returns the filter, together with the groups that are parameters of their own.
fn filter(parameters: &TableParameters<'_>) -> Result<Option<String>, SubscribeError> {
    let mut terms = Vec::new();
    for name in GROUPS {
        let Some(group) = parameters.get(name) else { continue };
        if !group.trim_start().starts_with('(') {
            return Err(SubscribeError::Other(format!(
                "{name}: conditions in parentheses are expected, such as {name}=(id.gt.7,title.eq.a)"
            )));
        }
        // Parsed alone: otherwise a parenthesis or quote that is not closed would take in the next parameter.
        let term = format!("{name}={group}");
        match filter::parse(&term).map_err(SubscribeError::from)? {
            Filter::And(groups) if groups.len() == 1 => terms.push(term),
            _ => {
                return Err(SubscribeError::Other(format!(
                    "{name}: one group in parentheses is expected, and nothing after it"
                )));
            }
        }
    }
    terms.extend(parameters.get("filter").filter(|filter| !filter.trim().is_empty()));
    Ok((!terms.is_empty()).then(|| terms.join(",")))
}

/// Reads the cursor of `Last-Event-ID`, else of `since=`.
fn since(headers: &HeaderMap, query: &str) -> Result<Option<Cursor>, SubscribeError> {
    let last = headers.get("last-event-id").and_then(|id| id.to_str().ok()).map(str::to_owned);
    let text = last.filter(|id| !id.is_empty()).or_else(|| parameter(query, "since"));
    text.map(|text| text.parse::<Cursor>()).transpose().map_err(|why| {
        SubscribeError::Other(format!("since: {why}; without it you get the rows and a cursor"))
    })
}

/// Reads how long a poll waits.
fn wait(query: &str) -> Result<Duration, SubscribeError> {
    let Some(text) = parameter(query, "wait") else { return Ok(Duration::from_secs(DEFAULT_WAIT)) };
    let seconds = text.parse().ok().filter(|seconds| *seconds <= MAX_WAIT);
    seconds
        .map(Duration::from_secs)
        .ok_or_else(|| SubscribeError::Other(format!("wait: seconds are expected, at most {MAX_WAIT}")))
}

/// Reads how often a stream is told the latest change of each row.
///
/// # Errors
/// If it is no number of milliseconds in the bounds, or the request is not for all changes of tables as a stream.
fn conflate(query: &str, wants_stream: bool) -> Result<Option<Duration>, SubscribeError> {
    let Some(text) = parameter(query, "conflate") else { return Ok(None) };
    let refused = |why: String| Err(SubscribeError::Other(format!("conflate: {why}")));
    if !wants_stream {
        return refused(String::from(
            "it is for event streams (Accept: text/event-stream); a poll has each change: leave it out, and ask less often",
        ));
    }
    if parameter(query, "topic").is_some() {
        return refused(String::from("it is for tables: a broadcast has no row, leave it out"));
    }
    if parameter(query, "event").is_some_and(|event| !event.is_empty() && event != "*") {
        return refused(String::from("the latest change of a row may be of any kind: leave event= out"));
    }
    let milliseconds = text.parse().ok().filter(|number| CONFLATE.contains(number));
    match milliseconds {
        Some(milliseconds) => Ok(Some(Duration::from_millis(milliseconds))),
        None => refused(format!(
            "a number of milliseconds from {} to {} is expected, such as conflate=250",
            CONFLATE.start(),
            CONFLATE.end()
        )),
    }
}

/// Reads the paging parameters. `max_rows` is the largest allowed limit.
///
/// # Errors
/// If a parameter is malformed, or the request is for changes.
fn paging(
    parameters: &TableParameters<'_>,
    is_of_changes: bool,
    max_rows: usize,
) -> Result<Paging, SubscribeError> {
    let given = PAGING.iter().find(|name| parameters.get(name).is_some());
    if let Some(name) = given.filter(|_| is_of_changes) {
        return Err(SubscribeError::Other(format!(
            "{name}: it is for rows; changes come in their own order, without it"
        )));
    }
    let limit = parameters.get("limit").map(|limit| {
        let number = limit.parse().ok().filter(|number| (1..=max_rows).contains(number));
        number.ok_or_else(|| {
            SubscribeError::Other(format!("limit: a number of rows from 1 to {max_rows} is expected"))
        })
    });
    Ok(Paging {
        limit: limit.transpose()?,
        order: parameters.get("order").map(|order| OrderBy::parse(&order)).transpose()?.unwrap_or_default(),
        after: parameters.get("after").map(|after| PageToken::parse(&after)).transpose()?,
    })
}
