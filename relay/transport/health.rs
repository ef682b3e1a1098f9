//! `GET /healthcheck`, `/livez` and `/readyz`: whether the relay runs, and whether it is ready for clients.

use std::sync::atomic::Ordering;

use hyper::StatusCode;

use crate::transport::app::App;
use crate::transport::response::{Answer, text};

/// The paths that are answered here.
pub const PATHS: [&str; 3] = ["/healthcheck", "/livez", "/readyz"];

/// Answers a request for one of [`PATHS`]; `None` for another path.
pub fn answer(app: &App, path: &str) -> Option<Answer> {
    Some(match path {
        "/healthcheck" if !app.prepared.load(Ordering::Relaxed) => {
            text(StatusCode::SERVICE_UNAVAILABLE, "not ready: the database is being prepared")
        }
        "/healthcheck" | "/livez" => text(StatusCode::OK, "ok"),
        "/readyz" => match app.unready() {
            None => text(StatusCode::OK, "ready"),
            Some(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}")),
        },
        _ => return None,
    })
}
