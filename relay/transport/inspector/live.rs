//! What is connected now: clients with their channels, and topics. Read from the router and the list of clients, a page at a time.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Value, json};
use time::OffsetDateTime;

use crate::feed::deliver::hub::ChannelDescription;
use crate::feed::deliver::outbox::Waiting;
use crate::model::session::channel::ChannelId;
use crate::pubsub::topic::TopicSummary;
use crate::transport::app::App;
use crate::transport::clients::{Client, ClientKind, ClientState, Clients, OpenChannel};
use crate::transport::query::parameter;

/// Default and maximum number of clients or topics in an answer.
const DEFAULT_LIMIT: usize = 50;
const MAX_LIMIT: usize = 200;
/// Maximum number of channels shown of one client.
const MAX_CHANNELS: usize = 20;
/// The orders of clients.
const ORDERS: [&str; 4] = ["queued", "lag", "newest", "channels"];

/// Which part of a list is wanted.
struct Page {
    /// Text that an entry must contain.
    like: String,
    offset: usize,
    limit: usize,
}

impl Page {
    fn of(query: &str) -> Result<Self, String> {
        let number = |name: &str, default: usize| match parameter(query, name) {
            None => Ok(default),
            Some(text) => text.parse().map_err(|_| format!("{name}: a number is expected")),
        };
        let limit = number("limit", DEFAULT_LIMIT)?.min(MAX_LIMIT);
        let like = parameter(query, "like").unwrap_or_default();
        Ok(Self { like, offset: number("offset", 0)?, limit })
    }

    /// Cuts the page out of a list.
    fn cut<T>(&self, list: Vec<T>) -> Vec<T> {
        list.into_iter().skip(self.offset).take(self.limit).collect()
    }
}

/// A client with what waits for it.
type ListedClient = (Arc<Client>, Waiting);

/// Returns a page of the clients, those of most concern first.
///
/// # Errors
/// What is wrong with the parameters.
pub(super) async fn clients(app: &App, query: &str) -> Result<Value, String> {
    let page = Page::of(query)?;
    let order = parameter(query, "order").unwrap_or_else(|| String::from("queued"));
    if !ORDERS.contains(&order.as_str()) {
        return Err(format!("order: one of {} is expected", ORDERS.join(", ")));
    }
    let clients = Arc::clone(&app.clients);
    // Thousands are sorted: not by a thread that delivers.
    let listed = app.sessions.spawn_blocking(move || listed(&clients, &page, &order)).await;
    let (count, listed) = listed.map_err(|_| String::from("the clients could not be listed, try again"))?;
    let states: Vec<ClientState> = listed.iter().map(|(client, _)| client.state()).collect();
    let shown =
        |state: &ClientState| state.channels.iter().take(MAX_CHANNELS).map(|channel| channel.id).collect();
    let channels: Vec<Vec<ChannelId>> = states.iter().map(shown).collect();
    let described = app.feed.describe(channels.concat()).await;
    let described: HashMap<ChannelId, ChannelDescription> =
        described.into_iter().map(|description| (description.channel, description)).collect();
    let now = OffsetDateTime::now_utc();
    let entries = listed.iter().zip(&states).map(|((client, waiting), state)| {
        let shown = state.channels.iter().take(MAX_CHANNELS);
        json!({
            "number": client.number,
            "transport": client.kind.name(),
            "address": client.address.to_string(),
            "role": state.role,
            "sub": state.sub,
            "age_seconds": client.since.elapsed().as_secs(),
            "queued_bytes": waiting.bytes,
            "lag_seconds": lag(waiting, now),
            "channel_count": state.channels.len(),
            "channels": shown.map(|channel| channel_entry(channel, described.get(&channel.id))).collect::<Vec<_>>(),
        })
    });
    let entries: Vec<Value> = entries.collect();
    Ok(json!({ "count": count, "clients": entries }))
}

/// Returns the number of clients that are like the text, and the page of them.
fn listed(clients: &Clients, page: &Page, order: &str) -> (usize, Vec<ListedClient>) {
    let mut all = clients.all();
    if !page.like.is_empty() {
        all.retain(|client| client.is_like(&page.like));
    }
    let mut listed: Vec<ListedClient> =
        all.into_iter().map(|client| (Arc::clone(&client), client.outbox.waiting())).collect();
    match order {
        "lag" => listed.sort_by_key(|(client, waiting)| {
            (waiting.oldest.is_none(), waiting.oldest, Reverse(client.number))
        }),
        "newest" => listed.sort_by_key(|(client, _)| Reverse(client.number)),
        "channels" => {
            listed.sort_by_cached_key(|(client, _)| Reverse((client.channel_count(), client.number)));
        }
        _ => listed.sort_by_key(|(client, waiting)| Reverse((waiting.bytes, client.number))),
    }
    (listed.len(), page.cut(listed))
}

/// Returns for how long the oldest change has waited since it was written; null if none waits.
fn lag(waiting: &Waiting, now: OffsetDateTime) -> Option<f64> {
    waiting.oldest.map(|oldest| (now - oldest).as_seconds_f64().max(0.0))
}

fn channel_entry(channel: &OpenChannel, description: Option<&ChannelDescription>) -> Value {
    let claims = description.map(|description| description.subscription.identity().claims());
    let bindings = description.map(|description| {
        let bindings = description.subscription.bindings().iter();
        let binding = bindings.map(|binding| {
            json!({
                "table": binding.name(),
                "filter": binding.filter.as_ref().map(|filter| filter.condition.as_str()),
                "is_refused": binding.is_refused(),
            })
        });
        binding.collect::<Vec<_>>()
    });
    json!({
        "topic": channel.topic,
        "is_private": channel.is_private,
        "role": claims.map(|claims| claims.role()),
        "sub": claims.and_then(|claims| claims.sub()),
        "tables": bindings,
        "cursor": description.and_then(|description| description.position.as_ref()).map(ToString::to_string),
        "is_replayed": description.is_some_and(|description| description.is_replayed),
    })
}

/// Returns a page of the topics, those with the most members first.
///
/// # Errors
/// What is wrong with the parameters.
pub(super) async fn topics(app: &App, query: &str) -> Result<Value, String> {
    let page = Page::of(query)?;
    let topics = Arc::clone(&app.topics);
    let listed = app.sessions.spawn_blocking(move || {
        let mut all = topics.summaries();
        all.retain(|topic| topic.name.contains(&page.like));
        all.sort_by(|one, other| other.members.cmp(&one.members).then_with(|| one.name.cmp(&other.name)));
        (all.len(), page.cut(all))
    });
    let (count, listed) =
        listed.await.map_err(|_| String::from("the topics could not be listed, try again"))?;
    let entry = |topic: &TopicSummary| {
        json!({
            "topic": &*topic.name,
            "is_private": topic.is_private,
            "members": topic.members,
            "present": topic.present,
            "broadcasts": topic.traffic.broadcasts,
            "frames": topic.traffic.frames,
            "bytes": topic.traffic.bytes,
        })
    };
    Ok(json!({ "count": count, "topics": listed.iter().map(entry).collect::<Vec<_>>() }))
}

/// Returns the state of the relay in short.
pub(super) fn overview(app: &App) -> Value {
    let clients = ClientKind::ALL.map(|kind| (kind.name().to_owned(), Value::from(app.clients.count(kind))));
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "unready": app.unready(),
        "uptime_seconds": app.started.elapsed().as_secs(),
        "clients": serde_json::Map::from_iter(clients),
        "max_clients": app.limits.connections,
        "queued_bytes": app.budget.held_bytes(),
        "max_queued_bytes": app.limits.total_outbox_bytes,
        "max_queued_bytes_each": app.limits.outbox_bytes,
    })
}
