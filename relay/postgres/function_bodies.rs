//! Reads the bodies of SQL functions that policies call.
//!
//! PostgreSQL keeps a body with `BEGIN ATOMIC` in parsed form. A body that is a string has none, and the names in it are resolved as
//! [`body_text`](crate::model::policy::compile::body_text) says. Nothing is created or run for this, so it needs no right to what the
//! body reads, and fires no event trigger.

use deadpool_postgres::Client;
use serde_json::{Value, json};

use crate::model::policy::compile::body_text::{BodyText, resolve};
use crate::postgres::connect::pool::Error;

/// Returns the bodies as `relay.catalog()` takes them, of what the policies of these relations call; `None` means all relations. A
/// function is left out if the relay does not understand its body: PostgreSQL evaluates the policies that call it.
///
/// # Errors
/// As the connection.
pub(super) async fn bodies(
    client: &Client,
    parts: &[u32],
    relations: Option<&Vec<i32>>,
) -> Result<String, Error> {
    let candidates =
        client.prepare_cached("select func, schemas, text from relay.body_candidates($1, $2)").await?;
    let mut bodies = Vec::new();
    // After the first lock that is waited for, the other functions do not wait as well.
    let mut patience = "20ms";
    for row in client.query(&candidates, &[&parts, &relations]).await? {
        let found = match row.get("text") {
            Some(text) => resolved(row.get("func"), text),
            None => parsed(client, row.get("func"), patience).await,
        };
        let (func, schemas): (u32, Vec<u32>) = (row.get("func"), row.get("schemas"));
        match found {
            Ok(Value::Object(mut body)) => {
                body.insert(String::from("func"), json!(func));
                body.insert(String::from("schemas"), json!(schemas));
                bodies.push(body.into());
            }
            Ok(_) => {}
            Err(error) if error.code() == Some(LOCK_NOT_AVAILABLE) => {
                patience = "1ms";
                bodies.push(json!({"func": func, "sql": null}));
            }
            Err(error) => {
                tracing::debug!(function.oid = func, error = %error, "body of a function not understood");
            }
        }
    }
    Ok(Value::Array(bodies).to_string())
}

const LOCK_NOT_AVAILABLE: &str = "55P03";

/// Returns the body that PostgreSQL keeps in parsed form. It opens the tables in it, and waits for their locks.
async fn parsed(client: &Client, func: u32, patience: &str) -> Result<Value, Error> {
    let read = client.prepare_cached("select relay.body_of($1)::text").await?;
    client.batch_execute(&format!("begin read only; set local lock_timeout = '{patience}'")).await?;
    let row = client.query_one(&read, &[&func]).await;
    client.batch_execute("rollback").await?;
    let text: String = row?.get(0);
    Ok(serde_json::from_str(&text).unwrap_or_default())
}

/// Returns a body that is a string; null if it is not understood.
fn resolved(func: u32, text: &str) -> Result<Value, Error> {
    let text: BodyText = serde_json::from_str(text).map_err(|error| {
        Error::Unfit(format!("relay.body_candidates returned an unexpected value: {error}"))
    })?;
    Ok(match resolve(&text) {
        Ok(resolved) => json!({"sql": resolved.sql, "parts": resolved.parts}),
        Err(why) => {
            tracing::debug!(function.oid = func, why, "body of a function not understood");
            Value::Null
        }
    })
}
