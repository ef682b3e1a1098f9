//! `GET /metrics`: on the listening port for the role service_role, on the admin port for all.

use std::net::IpAddr;

use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, StatusCode};

use crate::transport::admission::admit_service;
use crate::transport::app::App;
use crate::transport::response::{Answer, text};

/// Answers a request on the listening port.
pub async fn serve<B>(app: &App, request: &Request<B>, address: IpAddr) -> Answer {
    let need = "metrics are for the role service_role: send its token or a secret key, or read them on the port of --admin-listen";
    match admit_service(app, address, request, (&Method::GET, "metrics are read by GET"), need).await {
        Ok(()) => answer(app),
        Err(refused) => refused,
    }
}

/// The metrics in the format of OpenMetrics.
pub(super) fn answer(app: &App) -> Answer {
    let mut answer = text(StatusCode::OK, app.metrics());
    let format = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(format));
    answer
}
