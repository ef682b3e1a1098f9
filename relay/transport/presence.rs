//! `GET /realtime/v1/presence?topic=`: who is present in a topic, without joining it.

use std::net::IpAddr;

use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode};

use crate::feed::authorize::topic_judge::{TopicQuestion, TopicUnknown};
use crate::model::catalog::topic_rules::TopicAct;
use crate::model::codec::phoenix::topic_of;
use crate::model::policy::visibility::Identity;
use crate::model::session::machine::UNAVAILABLE;
use crate::transport::admission::admit;
use crate::transport::app::App;
use crate::transport::query::{is_private_by, names, parameter};
use crate::transport::response::{Answer, error, json, unauthorized};

/// The known parameters.
const PARAMETERS: [&str; 3] = ["apikey", "topic", "private"];

/// Answers a request with the presence state as a member gets it.
pub async fn serve(app: &App, address: IpAddr, request: &Request<Incoming>) -> Answer {
    let claims = match admit(app, address, request, &Method::GET, "the presence is read by GET").await {
        Ok(claims) => claims,
        Err(refused) => return refused,
    };
    let query = request.uri().query().unwrap_or_default();
    if let Some(unknown) = names(query).find(|name| !PARAMETERS.contains(&name.as_str())) {
        let unknown: String = unknown.chars().take(40).collect();
        return error(
            StatusCode::BAD_REQUEST,
            &format!("{unknown}: this parameter is unknown, topic= is expected"),
        );
    }
    let is_private = match is_private_by(query) {
        Ok(is_private) => is_private,
        Err(why) => return error(StatusCode::BAD_REQUEST, why),
    };
    let Some(channel) = parameter(query, "topic").filter(|topic| !topic.is_empty()) else {
        return error(StatusCode::BAD_REQUEST, "topic= is missing: the name of a channel");
    };
    if is_private {
        let (identity, act) = (Identity::new(claims), TopicAct::Read);
        let question = TopicQuestion { identity, channel: channel.clone(), act, is_recheck: false };
        match app.topic_judge.judge(&question).await {
            Ok(verdict) if verdict.rights.presence => {}
            Ok(_) => return unauthorized(),
            Err(TopicUnknown) => return error(StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE),
        }
    }
    json(StatusCode::OK, app.topics.presence(&topic_of(&channel), is_private))
}
