//! `relay compare`: subscribes alike at two servers and prints what one of them misses, repeats, delays or tells differently.

/// The changes of both servers, in pairs.
mod pairs;

use std::io::Write;
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};

use crate::command::compare::pairs::{Difference, Pairs, ReceivedChange, Side};
use crate::command::realtime_socket::{ConnectError, RealtimeSocket, ServerAddress};
use crate::model::codec::protocol::SUBSCRIBED;

type CompareFailure = Box<dyn std::error::Error + Send + Sync>;

/// The servers and what to subscribe to.
#[derive(Args)]
pub struct CompareOptions {
    /// The other server, such as <https://PROJECT.supabase.co>
    other: String,
    /// The address of the relay
    #[arg(long, env = "RELAY_URL", default_value = "http://127.0.0.1:4000")]
    url: String,
    /// A table, with its schema if that is not public; repeatable
    #[arg(long, required = true, value_name = "TABLE")]
    table: Vec<String>,
    /// Only rows that match, e.g. list_id=eq.7
    #[arg(long, value_name = "FILTER")]
    filter: Option<String>,
    /// The user's token, for both servers
    #[arg(long, env = "RELAY_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    token: String,
    /// The API key of the other server [default: the token]
    #[arg(long, env = "RELAY_APIKEY", hide_env_values = true, value_name = "KEY")]
    apikey: Option<String>,
    /// Compare for this many seconds, then wait --wait-ms for the other server [default: until Ctrl-C]
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u64>,
    /// Report a change that comes this much later at one server, in milliseconds
    #[arg(long, default_value_t = 1000, value_name = "MS")]
    late_ms: u64,
    /// How long to wait for a change at the other server, in milliseconds
    #[arg(long, default_value_t = 5000, value_name = "MS")]
    wait_ms: u64,
}

/// Time limit for a subscription.
const SUBSCRIBE_TIMEOUT: Duration = Duration::from_secs(20);
/// Interval between looks for changes that did not come.
const CHECK: Duration = Duration::from_millis(100);

/// Prints what differs until the time is over or it is interrupted, then a summary. Returns whether all was equal.
///
/// # Errors
/// When a server refuses the subscription, or its connection breaks.
pub async fn run(options: CompareOptions) -> Result<bool, CompareFailure> {
    let servers =
        [ServerAddress::parse("--url", &options.url)?, ServerAddress::parse("URL", &options.other)?];
    let mut interrupt = signal(SignalKind::interrupt())?;
    let subscribed = async {
        tokio::try_join!(
            subscribe(&servers[0], &options.token, &options),
            subscribe(&servers[1], options.apikey.as_ref().unwrap_or(&options.token), &options)
        )
    };
    let (mut relay, mut other) = tokio::select! {
        subscribed = subscribed => subscribed?,
        _ = interrupt.recv() => return Ok(true),
    };
    let [relay_base, other_base] = [servers[0].base(), servers[1].base()];
    let names = |side: Side| if side == Side::Relay { relay_base } else { other_base };
    note(&format!(
        "comparing {} at {relay_base} and {other_base}; each difference is a line, Ctrl-C ends",
        options.table.join(", ")
    ));
    let wait = Duration::from_millis(options.wait_ms);
    let mut pairs = Pairs::new(Duration::from_millis(options.late_ms), wait);
    let mut check = interval(CHECK);
    check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // At the end, changes that came last get their time, too.
    let end = options.seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let over = async {
        match end {
            Some(end) => sleep_until(end + wait + CHECK).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(over);
    loop {
        tokio::select! {
            _ = interrupt.recv() => break,
            () = &mut over => break,
            _ = check.tick() => print(pairs.overdue(Instant::now()), names)?,
            frame = relay.next() => print(heard(&mut pairs, Side::Relay, frame, end, names)?, names)?,
            frame = other.next() => print(heard(&mut pairs, Side::Other, frame, end, names)?, names)?,
        }
    }
    note(&pairs.summary(names));
    Ok(pairs.is_equal())
}

/// Takes a frame of one server. Changes after the end are not compared.
///
/// # Errors
/// When the server ends the subscription.
fn heard<'a>(
    pairs: &mut Pairs,
    side: Side,
    frame: Option<(Value, String)>,
    end: Option<Instant>,
    names: impl Fn(Side) -> &'a str,
) -> Result<Vec<Difference>, CompareFailure> {
    let name = names(side);
    let Some((frame, _)) = frame else { return Err(format!("the connection to {name} broke").into()) };
    let now = Instant::now();
    match frame[3].as_str() {
        Some("postgres_changes") if end.is_none_or(|end| now < end || pairs.awaits(side)) => {
            Ok(pairs.received(side, ReceivedChange::of(&frame[4]["data"]), now).into_iter().collect())
        }
        Some("system") => {
            let message = frame[4]["message"].as_str().unwrap_or_default();
            if frame[4]["status"] == "ok" || message.starts_with("Gap:") {
                note(&format!("{name}: {message}"));
                return Ok(Vec::new());
            }
            Err(format!("{name} ends the subscription: {message}").into())
        }
        Some("phx_close" | "phx_error") => {
            Err(format!("{name} closed the channel: the token may have expired").into())
        }
        _ => Ok(Vec::new()),
    }
}

/// Subscribes at one server, and waits until it says so.
async fn subscribe(
    server: &ServerAddress,
    key: &str,
    options: &CompareOptions,
) -> Result<RealtimeSocket, CompareFailure> {
    let base = server.base();
    let failed = |why: &str| CompareFailure::from(format!("{base}: {why}"));
    let subscribed = async {
        let mut socket = match RealtimeSocket::connect(server, &format!("apikey={key}")).await {
            Ok(socket) => socket,
            Err(ConnectError::Away(why)) => return Err(failed(&why)),
            Err(ConnectError::Refused { status, body }) => {
                let body = String::from_utf8_lossy(&body);
                return Err(failed(&format!("refuses the token or key with {status}: {body}")));
            }
            Err(ConnectError::Invalid(why)) => {
                return Err(failed(&format!(
                    "the address or the key has characters that are not allowed: {why}"
                )));
            }
        };
        let bindings = options.table.iter().map(|table| {
            let (schema, table) = table.split_once('.').unwrap_or(("public", table));
            json!({"event": "*", "schema": schema, "table": table, "filter": options.filter})
        });
        let bindings: Vec<Value> = bindings.collect();
        let payload = json!({"config": {"postgres_changes": bindings}, "access_token": options.token});
        socket.join("realtime:compare", &payload).await.map_err(|why| failed(&why))?;
        while let Some((frame, _)) = socket.next().await {
            let (event, payload) = (frame[3].as_str(), &frame[4]);
            let refused = match event {
                Some("phx_reply") if payload["status"] == "error" => &payload["response"]["reason"],
                Some("system") if payload["message"] == SUBSCRIBED => return Ok(socket),
                Some("system") if payload["status"] != "ok" => &payload["message"],
                _ => continue,
            };
            return Err(failed(&format!(
                "refuses the subscription: {}",
                refused.as_str().unwrap_or_default()
            )));
        }
        Err(failed("the connection broke"))
    };
    timeout(SUBSCRIBE_TIMEOUT, subscribed).await.unwrap_or_else(|_| {
        Err(failed(&format!("no subscription within {} seconds", SUBSCRIBE_TIMEOUT.as_secs())))
    })
}

fn print<'a>(differences: Vec<Difference>, names: impl Fn(Side) -> &'a str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    differences.iter().try_for_each(|difference| writeln!(out, "{}", difference.line(&names)))
}

fn note(text: &str) {
    // A closed pipe is not a failure.
    let _ = writeln!(std::io::stderr(), "relay: {text}");
}
