//! `POST …/api/broadcast` and `POST …/api/broadcast/TOPIC/events/EVENT`: broadcasts without a socket.

use std::collections::HashSet;
use std::future::ready;
use std::net::IpAddr;

use futures_util::{StreamExt, TryStreamExt, stream};
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Method, Request, StatusCode};
use serde_json::value::RawValue;

use crate::feed::authorize::topic_judge::{TopicQuestion, TopicUnknown};
use crate::model::catalog::topic_rules::TopicAct;
use crate::model::codec::phoenix::{carries_bytes, topic_of};
use crate::model::policy::visibility::Identity;
use crate::model::session::broadcast::Broadcast;
use crate::model::session::join::MAX_TOPIC_BYTES;
use crate::model::session::machine::UNAVAILABLE;
use crate::transport::admission::admit;
use crate::transport::app::App;
use crate::transport::body;
use crate::transport::broadcast::batch::{self, BatchError, BatchMessage, MAX_MESSAGES};
use crate::transport::query::{is_private_by, path_segment};
use crate::transport::response::{Answer, empty, error, json, unauthorized};

/// The refusal of a body.
const NOT_JSON: &str = "the body is not JSON";

/// Which of the two forms a request has.
enum Form {
    /// Messages in the body.
    Batch,
    /// The payload in the body, channel and event in the path; whether the channel is private.
    Single(String, String, bool),
}

/// Whether a path is one of broadcasts.
pub fn is_broadcast(path: &str) -> bool {
    rest(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Returns what follows the common part of the paths.
fn rest(path: &str) -> Option<&str> {
    path.strip_prefix("/realtime/v1").unwrap_or(path).strip_prefix("/api/broadcast")
}

/// Answers a request. The second value says whether its body was read.
pub async fn serve(app: &App, address: IpAddr, request: Request<Incoming>) -> (Answer, bool) {
    let (form, identity) = match check(app, address, &request).await {
        Ok(checked) => checked,
        Err(refused) => return (refused, false),
    };
    let (head, body) = request.into_parts();
    let body = match body::read(body, app.limits.message_bytes, app.limits.write).await {
        Ok(body) => body,
        Err(refused) => return (refused, false),
    };
    let max_bytes = app.limits.broadcast_bytes;
    let is_single = matches!(form, Form::Single(..));
    let messages = match form {
        Form::Batch => batch::parse(&body, max_bytes, MAX_MESSAGES).map_err(|refused| match refused {
            BatchError::NotJson => error(StatusCode::BAD_REQUEST, NOT_JSON),
            BatchError::Invalid(errors) => json(StatusCode::UNPROCESSABLE_ENTITY, errors),
            BatchError::TooMany => too_many(app, TOO_MANY),
        }),
        Form::Single(channel, event, is_private) => single(&head.headers, &body, max_bytes, (channel, event))
            .map(|message| vec![BatchMessage { is_private, ..message }])
            .map_err(|BroadcastRefusal(status, why)| error(status, &why)),
    };
    drop(body);
    let answer = match messages {
        Ok(messages) => publish(app, address, &identity, is_single, messages).await,
        Err(refused) => refused,
    };
    (answer, true)
}

/// Checks everything but the body.
///
/// # Errors
/// The answer that refuses the request.
async fn check(app: &App, address: IpAddr, request: &Request<Incoming>) -> Result<(Form, Identity), Answer> {
    let mut form = form(request.uri().path()).map_err(|BroadcastRefusal(status, why)| error(status, &why))?;
    let claims = admit(app, address, request, &Method::POST, "broadcasts are sent by POST").await?;
    let query = request.uri().query().unwrap_or_default();
    if let Form::Single(_, _, is_private) = &mut form {
        *is_private = is_private_by(query).map_err(|why| error(StatusCode::BAD_REQUEST, why))?;
    }
    Ok((form, Identity::new(claims)))
}

/// Returns the form of a request with this path.
///
/// # Errors
/// If there is nothing at the path.
fn form(path: &str) -> Result<Form, BroadcastRefusal> {
    match rest(path).unwrap_or_default().split('/').collect::<Vec<_>>()[..] {
        [""] | ["", ""] => Ok(Form::Batch),
        ["", channel, "events", event] if !channel.is_empty() && !event.is_empty() => {
            let (Some(channel), Some(event)) = (path_segment(channel), path_segment(event)) else {
                return Err(refusal(
                    StatusCode::BAD_REQUEST,
                    "topic and event in the path are not UTF-8: percent-encode them",
                ));
            };
            Ok(Form::Single(channel, event, false))
        }
        _ => Err(refusal(
            StatusCode::NOT_FOUND,
            "there is nothing at this path; broadcasts are sent to api/broadcast or api/broadcast/TOPIC/events/EVENT",
        )),
    }
}

/// Returns the only message of a request: the body is its payload.
///
/// # Errors
/// Why it is refused.
fn single(
    headers: &HeaderMap,
    body: &[u8],
    max_bytes: usize,
    (channel, event): (String, String),
) -> Result<BatchMessage, BroadcastRefusal> {
    if body.len() > max_bytes {
        let why = format!("Payload size exceeds tenant limit: {max_bytes} bytes at most");
        return Err(refusal(StatusCode::UNPROCESSABLE_ENTITY, why));
    }
    let content_type =
        headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let content_type = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let broadcast = match content_type.as_str() {
        "application/json" => {
            let payload: &RawValue =
                serde_json::from_slice(body).map_err(|_| refusal(StatusCode::BAD_REQUEST, NOT_JSON))?;
            let too_deep = || refusal(StatusCode::UNPROCESSABLE_ENTITY, "the payload is nested too deeply");
            Broadcast::json(event, payload).ok_or_else(too_deep)?
        }
        "application/octet-stream" if !carries_bytes(&topic_of(&channel), &event) => {
            let why = "bytes can only be sent to a topic and an event of 255 bytes at most, `realtime:` included: shorten \
                       them, or send JSON";
            return Err(refusal(StatusCode::UNPROCESSABLE_ENTITY, why));
        }
        "application/octet-stream" => Broadcast::bytes(event, body.to_vec()),
        _ => {
            let why = "the content type must be application/json or application/octet-stream";
            return Err(refusal(StatusCode::UNSUPPORTED_MEDIA_TYPE, why));
        }
    };
    Ok(BatchMessage { channel, is_private: false, broadcast })
}

/// Number of channels of a batch that are judged at the same time.
const MAX_JUDGED: usize = 64;

const TOO_MANY: &str = "Too many messages to broadcast, please reduce the batch size";

/// Why a request is refused, with the status.
struct BroadcastRefusal(StatusCode, String);

fn refusal(status: StatusCode, why: impl Into<String>) -> BroadcastRefusal {
    BroadcastRefusal(status, why.into())
}

/// Sends the messages in order. Those to private channels that the client may not send to are dropped; a single one is refused.
async fn publish(
    app: &App,
    address: IpAddr,
    identity: &Identity,
    is_single: bool,
    messages: Vec<BatchMessage>,
) -> Answer {
    let claims = identity.claims();
    if app.broadcast_rates.is_never_allowed(messages.len()) {
        return too_many(app, TOO_MANY);
    }
    // Clients without a subject share the rate of their address.
    let is_allowed = match claims.sub() {
        Some(sub) => app.broadcast_rates.take((claims.role(), sub), messages.len()),
        None => app.broadcast_rates.take((claims.role(), address), messages.len()),
    };
    if !is_allowed {
        return too_many(app, "You have exceeded your rate limit");
    }
    let channels =
        messages.iter().filter(|message| message.is_private).map(|message| message.channel.as_str());
    let Ok(writable) = writable(app, identity, channels).await else {
        return error(StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE);
    };
    for BatchMessage { channel, is_private, broadcast } in messages {
        if is_private && !writable.contains(&channel) {
            match is_single {
                true => return unauthorized(),
                false => continue,
            }
        }
        let topic = topic_of(&channel);
        if topic.len() > MAX_TOPIC_BYTES {
            // No channel can have it.
            continue;
        }
        match app.topics.publish((&topic, is_private), None, broadcast) {
            Ok(congestion) => congestion.eased().await,
            Err(why) => return error(StatusCode::SERVICE_UNAVAILABLE, &why.to_string()),
        }
    }
    empty(StatusCode::ACCEPTED)
}

/// Returns those of the private channels that the identity may send broadcasts to.
async fn writable(
    app: &App,
    identity: &Identity,
    channels: impl Iterator<Item = &str>,
) -> Result<HashSet<String>, TopicUnknown> {
    let channels: HashSet<String> = channels.map(str::to_owned).collect();
    let judge = |channel: String| async move {
        let (identity, act) = (identity.clone(), TopicAct::Write);
        let question = TopicQuestion { identity, channel, act, is_recheck: false };
        let verdict = app.topic_judge.judge(&question).await?;
        Ok(verdict.rights.broadcast.then_some(question.channel))
    };
    // Together, because questions that wait together are judged together.
    let judged = stream::iter(channels).map(judge).buffer_unordered(MAX_JUDGED);
    judged.try_filter_map(|channel| ready(Ok(channel))).try_collect().await
}

/// Status 429: the client sends too much.
fn too_many(app: &App, why: &str) -> Answer {
    let mut answer = json(StatusCode::TOO_MANY_REQUESTS, serde_json::json!({ "message": why }).to_string());
    let headers = answer.headers_mut();
    headers.insert("x-rate-limit", HeaderValue::from(app.broadcast_rates.per_second()));
    headers.insert("x-rate-limit-remaining", HeaderValue::from(0));
    headers.insert(header::RETRY_AFTER, HeaderValue::from(1));
    answer
}
