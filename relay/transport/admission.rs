//! The checks of every HTTP request with a token: its origin, method and parameters, and who asks.

use std::net::IpAddr;

use hyper::{Method, Request, StatusCode};

use crate::model::identity::claims::Claims;
use crate::observe::{Refusal, RefusalReason};
use crate::transport::app::{App, origin_is_allowed};
use crate::transport::query::{bearer, parameter, repeated, repeated_error};
use crate::transport::response::{Answer, error};

/// Admits a request of this method. `by_method` says so to a client that used another. Returns the claims of its token or key,
/// whose user is alive.
///
/// # Errors
/// The answer that refuses the request.
pub async fn admit<B>(
    app: &App,
    address: IpAddr,
    request: &Request<B>,
    method: &Method,
    by_method: &str,
) -> Result<Claims, Answer> {
    let path = Some(request.uri().path());
    let refused = |reason, why: &str| {
        app.observe.request_refused(&Refusal { reason, address, path, sub: None, why });
    };
    if !origin_is_allowed(&app.allowed_origins, request.headers()) {
        refused(RefusalReason::Origin, "this origin is not allowed");
        return Err(error(StatusCode::FORBIDDEN, "this origin is not allowed"));
    }
    if request.method() != method {
        return Err(error(StatusCode::METHOD_NOT_ALLOWED, by_method));
    }
    let query = request.uri().query().unwrap_or_default();
    if let Some(name) = repeated(query) {
        return Err(error(StatusCode::BAD_REQUEST, &repeated_error(&name)));
    }
    let token = bearer(request.headers()).or_else(|| parameter(query, "apikey")).unwrap_or_default();
    let claims = app.identify(&token).await.map_err(|why| {
        let why = why.advised_text();
        refused(RefusalReason::Token, &why);
        error(StatusCode::UNAUTHORIZED, &why)
    })?;
    app.status.board.request(&claims);
    Ok(claims)
}

/// The role that may see what concerns all users.
const SERVICE: &str = "service_role";

/// Admits a request of the role service_role by this method, as [`admit`]. `need` says so to others.
///
/// # Errors
/// The answer that refuses the request.
pub async fn admit_service<B>(
    app: &App,
    address: IpAddr,
    request: &Request<B>,
    (method, by_method): (&Method, &str),
    need: &str,
) -> Result<(), Answer> {
    let claims = admit(app, address, request, method, by_method).await?;
    if claims.role() == SERVICE {
        return Ok(());
    }
    app.observe.request_refused(&Refusal {
        reason: RefusalReason::Role,
        address,
        path: Some(request.uri().path()),
        sub: claims.sub(),
        why: "not of the role service_role",
    });
    let why = format!("{need}; this token has the role {}", claims.role());
    Err(error(StatusCode::FORBIDDEN, &why))
}
