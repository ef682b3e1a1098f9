//! The five systems of examples/systems, as their files make them: who gets what, and who does not.

pub mod admin_metrics;
pub mod agent_access;
pub mod browser;
pub mod chat;
pub mod loading;
pub mod readme;
pub mod status_history;
pub mod user_status;
pub mod writers;

use std::fmt::Write;

use serde_json::{Value, json};
use tokio_postgres::Client as Session;

use crate::support::client::Client;
use crate::support::http::{Answer, get};
use crate::support::stage::Stage;
use crate::support::{eventually, token};

/// The people of the sample data.
pub const ANA: &str = "a0000000-0000-4000-8000-000000000001";
pub const BEN: &str = "b0000000-0000-4000-8000-000000000002";
pub const CHLOE: &str = "c0000000-0000-4000-8000-000000000003";
pub const DEV: &str = "d0000000-0000-4000-8000-000000000004";
pub const EDDA: &str = "e0000000-0000-4000-8000-000000000005";
pub const GUEST: &str = "f0000000-0000-4000-8000-000000000006";

/// What Supabase does in its databases: each new table and function is open to all roles of the API.
const SUPABASE: &str =
    "alter default privileges in schema public grant all on tables to anon, authenticated, service_role;
    alter default privileges in schema public grant all on functions to anon, authenticated, service_role;";

/// The text of a file of examples/systems.
pub fn file(name: &str) -> String {
    let path = format!("{}/examples/systems/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A relay on a database in which this file was run.
pub async fn stage(name: &str) -> Stage {
    Stage::new(&format!("{SUPABASE} {}", file(name))).await
}

/// The claims of a registered user.
pub fn user(id: &str) -> Value {
    json!({"role": "authenticated", "sub": id})
}

/// The claims of an admin.
pub fn admin() -> Value {
    json!({"role": "authenticated", "sub": EDDA, "app_metadata": {"role": "admin"}})
}

/// The claims of an anonymous participant.
pub fn guest(id: &str) -> Value {
    json!({"role": "anon", "participantId": id})
}

/// The token with these claims.
pub fn bearer(claims: &Value) -> String {
    token(claims["role"].as_str().unwrap(), None, claims.clone())
}

/// A client that is told of everything in the schema `public` which these claims may see, and was told of what was before.
pub async fn join(stage: &Stage, claims: &Value) -> Client {
    let mut client = stage.join(&bearer(claims)).await;
    stage.changes(&mut client).await;
    client
}

/// What the client was told of a table up to now, a line each: the type and these columns, and the old ones in brackets.
pub async fn told(stage: &Stage, client: &mut Client, table: &str, columns: &[&str]) -> Vec<String> {
    let changes = stage.changes(client).await;
    changes.iter().filter(|change| change["table"] == table).map(|change| line(change, columns)).collect()
}

/// A change in a line: `UPDATE web false (web true)`.
pub fn line(change: &Value, columns: &[&str]) -> String {
    let values = |row: &Value| {
        let values = columns.iter().filter_map(|column| row.get(column));
        values
            .map(|value| value.as_str().map_or(value.to_string(), str::to_owned))
            .collect::<Vec<_>>()
            .join(" ")
    };
    let mut line = change["type"].as_str().unwrap().to_owned();
    let (new, old) = (values(&change["record"]), values(&change["old_record"]));
    if !new.is_empty() {
        write!(line, " {new}").unwrap();
    }
    if !old.is_empty() {
        write!(line, " ({old})").unwrap();
    }
    line
}

/// Runs a statement as the bearer of these claims, as an API does, and commits: its first value, or the error's code and text.
pub async fn call(session: &Session, claims: &Value, statement: &str) -> Result<String, String> {
    let role = claims["role"].as_str().unwrap();
    let statements = format!(
        "begin; set local role {role}; set local request.jwt.claims = '{claims}'; {statement}; commit"
    );
    match session.simple_query(&statements).await {
        Ok(messages) => Ok(messages
            .iter()
            .find_map(|message| match message {
                tokio_postgres::SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("").to_owned()),
                _ => None,
            })
            .unwrap_or_default()),
        Err(error) => {
            session.batch_execute("rollback").await.unwrap();
            let error = error.as_db_error().unwrap();
            Err(format!("{} {}", error.code().code(), error.message()))
        }
    }
}

/// Asks `/realtime/v1/changes` as the bearer of these claims.
pub async fn ask(stage: &Stage, claims: &Value, parameters: &str) -> Answer {
    let headers = format!("authorization: Bearer {}\r\n", bearer(claims));
    let answer = get(stage.relay.address, &format!("/realtime/v1/changes?{parameters}"), &headers).await;
    assert_eq!(answer.status, 200, "{parameters}: {answer:?}");
    answer
}

/// The current rows over HTTP, a line each, and the cursor of that moment.
pub async fn rows(
    stage: &Stage,
    claims: &Value,
    parameters: &str,
    columns: &[&str],
) -> (Vec<String>, String) {
    let body = ask(stage, claims, parameters).await.body;
    let rows = body["rows"].as_array().unwrap().iter();
    let rows = rows.map(|row| line(&json!({"type": "", "record": row}), columns).trim().to_owned());
    (rows.collect(), body["cursor"].as_str().unwrap().to_owned())
}

/// A poll that waits for changes after a cursor: a line each, and the next cursor.
pub async fn poll(
    stage: &Stage,
    claims: &Value,
    parameters: &str,
    cursor: &str,
    columns: &[&str],
) -> (Vec<String>, String) {
    let body = ask(stage, claims, &format!("{parameters}&since={cursor}")).await.body;
    let changes = body["changes"].as_array().unwrap().iter().map(|change| line(change, columns));
    (changes.collect(), body["cursor"].as_str().unwrap().to_owned())
}

/// Waits until so many channels, streams and polls are open.
pub async fn are_open(stage: &Stage, count: u64) {
    eventually("they wait", || async { (stage.relay.figure("relay_channels_open") == count).then_some(()) })
        .await;
}

/// Waits until a session of the database waits for another one.
pub async fn one_waits_for_another(stage: &Stage) {
    let waits = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
    eventually("one waits for the other", || async {
        (stage.database.value(waits).await != "0").then_some(())
    })
    .await;
}
