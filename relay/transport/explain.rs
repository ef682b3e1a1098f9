//! `GET /realtime/v1/explain`: for the service role, why a user receives the rows of a table, or does not.

use std::net::IpAddr;

use hyper::body::Incoming;
use hyper::header::HeaderMap;
use hyper::{Method, Request, StatusCode};
use serde_json::{Map, Value, json};

use crate::auth::verifier::now;
use crate::feed::deliver::members::Reader;
use crate::feed::explain::explainer::{ExplainRequest, ExplainTarget};
use crate::feed::explain::explanation::Explanation;
use crate::feed::subscribe::RequestError;
use crate::model::identity::claims::Claims;
use crate::model::policy::visibility::Identity;
use crate::transport::admission::admit_service;
use crate::transport::app::App;
use crate::transport::query::{is_unreadable, names, parameter};
use crate::transport::response::{Answer, error, json as json_answer};

/// The known parameters.
const PARAMETERS: [&str; 12] = [
    "apikey",
    "table",
    "filter",
    "key",
    "row",
    "number",
    "txid",
    "sub",
    "role",
    "claims",
    "token",
    "connected",
];
/// The header with the token of the user, for a caller that keeps tokens out of addresses.
const TOKEN_HEADER: &str = "explained-token";
/// Maximum number of users in one request.
const MAX_USERS: usize = 100;

/// Answers a request.
pub async fn serve(app: &App, request: &Request<Incoming>, address: IpAddr) -> Answer {
    let by_method = (&Method::GET, "explanations are read by GET");
    let need = "only the role service_role may ask why others receive a row";
    if let Err(refused) = admit_service(app, address, request, by_method, need).await {
        return refused;
    }
    let query = request.uri().query().unwrap_or_default();
    let explained = match parameter(query, "connected").as_deref() {
        Some("true") => connected(app, query).await,
        Some(_) => Err(ExplainRefusal::Request(String::from("connected: true is expected"))),
        None => asked(app, query, request.headers()).await,
    };
    match explained {
        Ok(body) => json_answer(StatusCode::OK, body.to_string()),
        Err(ExplainRefusal::Request(why)) => error(StatusCode::BAD_REQUEST, &why),
        Err(ExplainRefusal::Explained(why)) => failed(&why),
    }
}

/// Returns the answer to a request that the database side refused or did not answer.
pub(super) fn failed(why: &RequestError) -> Answer {
    match why {
        RequestError::Refused(why) => error(StatusCode::BAD_REQUEST, &why.to_string()),
        RequestError::Failed(why) => match why.refusal() {
            Some(refusal) if !why.is_transient() && !why.is_late() => {
                error(StatusCode::BAD_REQUEST, &refusal)
            }
            _ => {
                tracing::warn!(error = %why, "subscription not explained");
                error(StatusCode::SERVICE_UNAVAILABLE, &format!("{}, try again", why.kind()))
            }
        },
    }
}

/// Why a request is not answered.
enum ExplainRefusal {
    /// A parameter is wrong.
    Request(String),
    /// It could not be explained.
    Explained(RequestError),
}

impl From<String> for ExplainRefusal {
    fn from(why: String) -> Self {
        Self::Request(why)
    }
}

impl From<RequestError> for ExplainRefusal {
    fn from(why: RequestError) -> Self {
        Self::Explained(why)
    }
}

/// Explains the users that the request names.
async fn asked(app: &App, query: &str, headers: &HeaderMap) -> Result<Value, ExplainRefusal> {
    let requests = requests(app, query, headers).await?;
    let explanations = app.explainer.explain(&requests).await?;
    let mut verdicts: Vec<Value> =
        requests.iter().zip(&explanations).map(|(request, found)| verdict(request, found)).collect();
    Ok(match verdicts.len() {
        1 => verdicts.remove(0),
        _ => json!({ "verdicts": verdicts }),
    })
}

/// Explains the subscriptions of the table that are open at this relay, those with the most channels first.
async fn connected(app: &App, query: &str) -> Result<Value, ExplainRefusal> {
    if let Some(name) =
        ["sub", "role", "claims", "token", "filter"].iter().find(|name| parameter(query, name).is_some())
    {
        return Err(ExplainRefusal::Request(format!(
            "{name}: with connected=true the open subscriptions say who is meant"
        )));
    }
    let table = table(query)?;
    let row = target(query)?;
    let mut readers = match app.explainer.relation(&table).await? {
        Some(relation) => app.feed.readers(&relation).await,
        None => Vec::new(),
    };
    let left_off = readers.len().saturating_sub(MAX_USERS);
    readers.truncate(MAX_USERS);
    let request = |reader: &Reader| ExplainRequest {
        table: table.clone(),
        identity: reader.identity.clone(),
        filter: None,
        bound: reader.filter.clone(),
        row: row.clone(),
        token_refused: None,
    };
    let requests: Vec<ExplainRequest> = readers.iter().map(request).collect();
    let explanations = app.explainer.explain(&requests).await?;
    let verdicts =
        readers.iter().zip(requests.iter().zip(&explanations)).map(|(reader, (request, found))| {
            let mut verdict = verdict(request, found);
            verdict["channels"] = Value::from(reader.channels);
            verdict["filter"] =
                reader.filter.as_ref().map_or(Value::Null, |filter| Value::from(filter.condition.as_str()));
            verdict
        });
    let verdicts: Vec<Value> = verdicts.collect();
    let receiving = verdicts.iter().filter(|verdict| verdict["would_receive"] == true);
    let receiving: u64 = receiving.filter_map(|verdict| verdict["channels"].as_u64()).sum();
    Ok(json!({ "channels_receiving": receiving, "connected": verdicts, "left_off": left_off }))
}

/// Returns the verdict on one user as JSON.
fn verdict(request: &ExplainRequest, found: &Explanation) -> Value {
    let claims = request.identity.claims();
    json!({
        "role": claims.role(),
        "sub": claims.sub(),
        "would_receive": found.would_receive,
        "first": found.first_line(),
        "reasons": found.reasons(),
        "explanation": found,
    })
}

/// Reads the parameters: what to explain, for each user.
///
/// # Errors
/// What is wrong with them, for the client.
async fn requests(app: &App, query: &str, headers: &HeaderMap) -> Result<Vec<ExplainRequest>, String> {
    let table = table(query)?;
    let row = target(query)?;
    let filter = parameter(query, "filter").filter(|filter| !filter.is_empty());
    let users = users(app, query, headers).await?;
    let request = |(identity, token_refused): (Identity, Option<String>)| ExplainRequest {
        table: table.clone(),
        identity,
        filter: filter.clone(),
        bound: None,
        row: row.clone(),
        token_refused,
    };
    Ok(users.into_iter().map(request).collect())
}

/// Refuses unknown parameters and values that are not UTF-8, and reads the table.
fn table(query: &str) -> Result<String, String> {
    if let Some(unknown) = names(query).find(|name| !PARAMETERS.contains(&name.as_str())) {
        let name: String = unknown.chars().take(40).collect();
        return Err(format!("{name}: there is no such parameter, only {}", PARAMETERS.join(", ")));
    }
    if let Some(name) = PARAMETERS.into_iter().find(|name| is_unreadable(query, name)) {
        return Err(format!("{name}: this is not UTF-8"));
    }
    let table = parameter(query, "table").filter(|table| !table.is_empty());
    table.ok_or_else(|| {
        String::from("table: the name of a table is expected, as in SQL: ?table=todos, ?table=crm.deals")
    })
}

/// Reads which row is meant.
fn target(query: &str) -> Result<Option<ExplainTarget>, String> {
    let number = |name: &str| {
        parameter(query, name).map(|text| text.parse().map_err(|_| format!("{name}: a number is expected")))
    };
    let change = number("number").transpose()?;
    let xid: Option<i64> = number("txid").transpose()?;
    match (parameter(query, "key"), parameter(query, "row"), change) {
        (None, None, None) => Ok(None),
        (Some(key), None, None) => Ok(Some(ExplainTarget::Key(key))),
        (None, Some(row), None) => match serde_json::from_str(&row) {
            Ok(columns @ Value::Object(_)) => Ok(Some(ExplainTarget::Image(columns.to_string()))),
            _ => Err(String::from("row: a JSON object of all columns is expected")),
        },
        (None, None, Some(change)) => {
            Ok(Some(ExplainTarget::Change(change, xid.and_then(|xid| xid.try_into().ok()))))
        }
        _ => Err(String::from("one of key, row and number is expected")),
    }
}

/// Reads who is asked about: the bearer of a token, or users with a role, ids and claims. Each with the reason why the relay refuses
/// the token, if it does.
async fn users(
    app: &App,
    query: &str,
    headers: &HeaderMap,
) -> Result<Vec<(Identity, Option<String>)>, String> {
    let by_header = headers.get(TOKEN_HEADER).and_then(|token| token.to_str().ok()).map(str::to_owned);
    if let Some(token) = by_header.or_else(|| parameter(query, "token")) {
        if ["sub", "role", "claims"].iter().any(|name| parameter(query, name).is_some()) {
            return Err(String::from("token: it says who is meant; leave out sub, role and claims"));
        }
        return match app.identify(&token).await {
            Ok(claims) => Ok(vec![(Identity::new(claims), None)]),
            Err(why) => {
                let claims = app.verifier.unverified(&token).map_err(|why| format!("token: {why}"))?;
                Ok(vec![(Identity::new(claims), Some(why.advised_text()))])
            }
        };
    }
    let more: Map<String, Value> = match parameter(query, "claims") {
        Some(text) => serde_json::from_str(&text).map_err(|_| "claims: a JSON object is expected")?,
        None => Map::new(),
    };
    let subs = parameter(query, "sub");
    let subs: Vec<Option<&str>> = match &subs {
        Some(subs) => subs.split(',').map(Some).collect(),
        None => vec![None],
    };
    if subs.len() > MAX_USERS {
        return Err(format!("sub: at most {MAX_USERS} users are explained at once"));
    }
    let role = parameter(query, "role").unwrap_or_else(|| String::from("authenticated"));
    let user = |sub: Option<&str>| {
        let mut claims = more.clone();
        claims.insert(String::from("role"), Value::from(role.as_str()));
        claims.extend(sub.map(|sub| (String::from("sub"), Value::from(sub))));
        claims.entry("exp").or_insert_with(|| Value::from(now() + 3600));
        let claims = Claims::from_verified_payload(&Value::Object(claims).to_string());
        claims
            .map(|claims| (Identity::new(claims), None))
            .map_err(|why| format!("these claims cannot be used: {why}"))
    };
    subs.into_iter().map(user).collect()
}
