//! The status of users, which relays write into a table of the user's own.

mod connections;
mod maintenance;
mod relays;
mod table;
mod throttle;

use relay::settings::Settings;
use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::database::Database;
use crate::support::http::{Answer, get, request};
use crate::support::relay::Relay;
use crate::support::stage::Stage;
use crate::support::{eventually, token};

/// A status table with all columns, that is watched.
const PEOPLE: &str = "
    create table people (id uuid primary key, name text not null default '', is_online boolean not null default false,
                         active timestamptz, seen timestamptz, is_guest boolean not null default false);
    grant select on people to anon, authenticated, service_role;
    select relay.watch('people');
    select relay.status_on('people', 'id', 'is_online', 'active', 'seen', 'is_guest');";

/// A relay that writes to `people`.
async fn stage(change: impl FnOnce(&mut Settings)) -> Stage {
    let stage = Stage::with(PEOPLE, |settings, _| change(settings)).await;
    writes(&stage.relay).await;
    stage
}

/// Waits until the relay writes the status.
async fn writes(relay: &Relay) {
    eventually("the relay writes the status", || async {
        (relay.figure("relay_status_on") == 1).then_some(())
    })
    .await;
}

/// The id of a user.
fn id(number: u32) -> String {
    format!("{number:08x}-0000-4000-8000-000000000000")
}

/// The token of a user.
fn of(number: u32) -> String {
    token("authenticated", Some(&id(number)), json!({}))
}

/// A socket of a user.
async fn socket(relay: &Relay, number: u32) -> Client {
    Client::connect(relay, &of(number)).await
}

/// Sends a heartbeat and waits for the reply.
async fn heartbeat(client: &mut Client) {
    let reference = client.push(None, "phoenix", "heartbeat", json!({})).await;
    while client.frame().await[1] != json!(reference) {}
}

/// A request of a user.
async fn ask(relay: &Relay, token: &str) -> Answer {
    get(relay.address, &format!("/realtime/v1/changes?table=marker&apikey={token}"), "").await
}

/// Whether a user is online; none without a row.
async fn is_online(database: &Database, number: u32) -> Option<bool> {
    let sql =
        format!("select coalesce((select is_online::text from people where id = '{}'), '')", id(number));
    match &*database.value(&sql).await {
        "true" => Some(true),
        "false" => Some(false),
        _ => None,
    }
}

/// Waits until this user is online, or offline.
async fn becomes(database: &Database, number: u32, online: bool) {
    eventually(&format!("user {number} is {}", if online { "online" } else { "offline" }), || async {
        (is_online(database, number).await == Some(online)).then_some(())
    })
    .await;
}

/// Waits until all that was due before has been written: a user who comes now is written after it.
async fn settled(stage: &Stage, relay: &Relay) {
    let row = "insert into people (id) select gen_random_uuid() returning id";
    let id = stage.database.value(row).await;
    let _passer_by = Client::connect(relay, &token("authenticated", Some(&id), json!({}))).await;
    eventually("the status is written", || async {
        let sql = format!("select is_online from people where id = '{id}'");
        (stage.database.value(&sql).await == "t").then_some(())
    })
    .await;
}

/// How often the row of a user was written, by the changelog.
async fn writes_of(stage: &Stage, number: u32) -> String {
    let sql = format!(
        "select count(*) from relay.changes c join relay.watch_list w on w.id = c.relation
         where w.relation = 'people'::regclass and c.after ->> 'id' = '{}'",
        id(number)
    );
    stage.database.value(&sql).await
}

/// An answer of a maintenance endpoint to the service role.
async fn maintain(relay: &Relay, method: &str, path: &str, body: Value) -> Answer {
    let headers = format!("authorization: Bearer {}\r\n", token("service_role", None, json!({})));
    let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
    request(relay.address, method, &format!("/maintenance/{path}"), &headers, &body).await
}
