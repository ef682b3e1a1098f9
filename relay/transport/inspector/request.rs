//! Answers below `/inspector`: the page for all, which holds nothing but itself, and what it reads for the role service_role.

use std::net::IpAddr;
use std::sync::Arc;

use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, StatusCode};
use tokio_util::sync::CancellationToken;

use crate::transport::admission::admit_service;
use crate::transport::app::App;
use crate::transport::changes::request as changes;
use crate::transport::explain;
use crate::transport::held_answer::WatchedOutbox;
use crate::transport::inspector::{database, live, page};
use crate::transport::metrics;
use crate::transport::response::{Answer, error, json};

const PAGE: &str = "/inspector";

/// Whether the inspector answers this path.
pub fn is_inspector(path: &str) -> bool {
    path.strip_prefix(PAGE).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Answers a request. `watched` and `closed` are as for the event streams of clients.
pub async fn serve(
    app: Arc<App>,
    request: Request<Incoming>,
    address: IpAddr,
    watched: WatchedOutbox,
    closed: CancellationToken,
) -> Answer {
    let mut answer = match page::answer(request.uri().path()) {
        Some(file) if request.method() == Method::GET || request.method() == Method::HEAD => file,
        Some(_) => error(StatusCode::METHOD_NOT_ALLOWED, "the inspector is read by GET"),
        None => match request.uri().path() {
            // The page needs one address only, also on the admin port: these answer as elsewhere.
            "/inspector/changes" => changes::serve(app, request, address, watched, closed).await,
            "/inspector/explain" => explain::serve(&app, &request, address).await,
            "/inspector/metrics" => metrics::serve(&app, &request, address).await,
            _ => data(&app, &request, address).await,
        },
    };
    let headers = answer.headers_mut();
    // For this page alone, never for one of another origin.
    headers.remove(header::ACCESS_CONTROL_ALLOW_ORIGIN);
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    answer
}

/// Answers with data, for the role service_role.
async fn data(app: &App, request: &Request<Incoming>, address: IpAddr) -> Answer {
    let need = "the inspector is for the role service_role: send its token or a secret key";
    let by_method = (&Method::GET, "the inspector is read by GET");
    if let Err(refused) = admit_service(app, address, request, by_method, need).await {
        return refused;
    }
    let query = request.uri().query().unwrap_or_default();
    let listed = match request.uri().path() {
        "/inspector/overview" => Ok(live::overview(app)),
        "/inspector/clients" => live::clients(app, query).await,
        "/inspector/topics" => live::topics(app, query).await,
        "/inspector/settings" => Ok(app.shown_settings.clone()),
        "/inspector/relations" => return database::relations(app).await,
        "/inspector/last-changes" => return database::last_changes(app, query).await,
        "/inspector/database" => return database::checks(app).await,
        _ => return error(StatusCode::NOT_FOUND, "the inspector has nothing at this path"),
    };
    match listed {
        Ok(body) => json(StatusCode::OK, body.to_string()),
        Err(why) => error(StatusCode::BAD_REQUEST, &why),
    }
}
