//! `relay tail`: joins one table's channel at a running relay and prints the changes.

use std::io::Write;
use std::time::{Duration, SystemTime};

use clap::Args;
use futures_util::{SinkExt, StreamExt};
use serde_json::{Map, Value, json};
use tokio::time::{interval, sleep};
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::{Error as SocketError, Message};

use crate::transport::auth::mint;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What to follow, where, and as whom.
#[derive(Args)]
pub struct Options {
    /// The table, with its schema if that is not public
    table: String,
    /// Only rows that match, e.g. list_id=eq.7
    #[arg(long, value_name = "FILTER")]
    filter: Option<String>,
    /// The relay
    #[arg(long, env = "RELAY_URL", default_value = "http://127.0.0.1:4000")]
    url: String,
    /// See what the bearer of this token sees [default: everything, by a token made with the secret]
    #[arg(long, env = "RELAY_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    token: Option<String>,
    /// The secret that `relay serve` verifies with, to make a token of the role service_role
    #[arg(long, env = "RELAY_JWT_SECRET", hide_env_values = true, value_name = "SECRET")]
    jwt_secret: Option<String>,
}

/// Prints changes until it is interrupted; connects again when the relay goes away.
///
/// # Errors
/// When the token or the table is refused.
pub async fn run(options: Options) -> Result<(), Failure> {
    let token = match (&options.token, &options.jwt_secret) {
        (Some(token), _) => token.clone(),
        (None, Some(secret)) => everything(secret)?,
        (None, None) => return Err("give --token, or --jwt-secret to see everything".into()),
    };
    let base = options.url.trim_end_matches('/');
    let Some(host) = base.strip_prefix("http://").or_else(|| base.strip_prefix("ws://")) else {
        return Err(format!("--url {base}: http:// and the relay's address are expected").into());
    };
    let url = format!("ws://{host}/realtime/v1/websocket?vsn=2.0.0&apikey={token}");
    let mut pause = Duration::from_millis(500);
    loop {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => return Ok(()),
            ended = follow(&url, &options) => match ended? {
                Ended::Lost(why) => note(&format!("{why}; trying again")),
                Ended::AfterSubscribing => {
                    note("the relay went away; trying again, changes in between are not shown");
                    pause = Duration::from_millis(500);
                }
            },
        }
        tokio::select! {
            _ = tokio::signal::ctrl_c() => return Ok(()),
            () = sleep(pause) => pause = (pause * 2).min(Duration::from_secs(10)),
        }
    }
}

enum Ended {
    Lost(String),
    AfterSubscribing,
}

async fn follow(url: &str, options: &Options) -> Result<Ended, Failure> {
    let mut socket = match connect_async(url).await {
        Ok((socket, _)) => socket,
        Err(SocketError::Http(answer)) if answer.status().is_client_error() => {
            let body = answer.body().clone().unwrap_or_default();
            return Err(format!("the relay refused: {}", String::from_utf8_lossy(&body)).into());
        }
        Err(error) => return Ok(Ended::Lost(format!("{}: {error}", options.url))),
    };
    let (schema, table) = options.table.split_once('.').unwrap_or(("public", &options.table));
    let binding = json!({"event": "*", "schema": schema, "table": table, "filter": options.filter});
    let config =
        json!({"config": {"postgres_changes": [binding], "postgres_changes_options": {"wait": true}}});
    let join = json!(["1", "1", "realtime:tail", "phx_join", config]);
    socket.send(Message::text(join.to_string())).await?;
    let mut heartbeat = interval(Duration::from_secs(25));
    let mut subscribed = false;
    loop {
        let message = tokio::select! {
            _ = heartbeat.tick() => {
                let beat = json!([null, "0", "phoenix", "heartbeat", {}]);
                if socket.send(Message::text(beat.to_string())).await.is_err() {
                    break;
                }
                continue;
            }
            message = socket.next() => message,
        };
        let Some(Ok(message)) = message else { break };
        let Ok(text) = message.to_text() else { continue };
        let Ok(frame) = serde_json::from_str::<Value>(text) else { continue };
        match frame[3].as_str() {
            Some("phx_reply") if frame[4]["status"] == "error" => {
                let reason = frame[4]["response"]["reason"].as_str().unwrap_or("the join was refused");
                let hint = if options.token.is_some() {
                    String::new()
                } else {
                    format!(
                        "\nThis tail acts as service_role: grant select on {schema}.{table} to service_role, or give --token"
                    )
                };
                return Err(format!("{reason}{hint}").into());
            }
            Some("system") if frame[4]["status"] == "ok" => {
                subscribed = true;
                note(&format!("following {schema}.{table}, Ctrl-C ends"));
            }
            Some("system") => note(frame[4]["message"].as_str().unwrap_or_default()),
            Some("phx_close") => return Err("the channel was closed: the token has ended?".into()),
            Some("postgres_changes") => writeln!(std::io::stdout(), "{}", line(&frame[4]["data"]))?,
            _ => {}
        }
    }
    Ok(if subscribed { Ended::AfterSubscribing } else { Ended::Lost(String::from("the connection broke")) })
}

fn line(data: &Value) -> String {
    let text = |name: &str| data[name].as_str().unwrap_or_default();
    let shown = match (data.get("record"), data.get("old_record")) {
        (Some(new), Some(old)) => format!("{old} → {new}"),
        (Some(one), None) | (None, Some(one)) => one.to_string(),
        (None, None) => String::new(),
    };
    format!("{} {} {}.{} {shown}", text("commit_timestamp"), text("type"), text("schema"), text("table"))
}

fn everything(secret: &str) -> Result<String, Failure> {
    let claims = Map::from_iter([(String::from("role"), Value::from("service_role"))]);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    Ok(mint(secret, &claims, now, Duration::from_secs(86_400))?)
}

fn note(text: &str) {
    // A closed pipe is the reader's choice, not a failure.
    let _ = writeln!(std::io::stderr(), "relay: {text}");
}
