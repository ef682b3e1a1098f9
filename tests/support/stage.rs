//! A database and a relay on it, with a table `marker` whose rows prove that nothing else was on its way.

use relay::settings::Settings;
use serde_json::{Value, json};

use super::client::Client;
use super::database::Database;
use super::relay::Relay;

/// A relay on a database of its own.
pub struct Stage {
    /// The database, as its superuser.
    pub database: Database,
    /// The relay.
    pub relay: Relay,
    /// The name of the database: roles belong to the whole cluster, so those of a test begin with it.
    pub name: String,
}

impl Stage {
    /// Runs `sql`, in which `$DB` stands for the database's name, then starts the relay.
    pub async fn new(sql: &str) -> Self {
        Self::with(sql, |_, _| {}).await
    }

    /// The same with settings changed; `change` also gets the database's URL.
    pub async fn with(sql: &str, change: impl FnOnce(&mut Settings, &str)) -> Self {
        let database = Database::new().await;
        let (_, name) = database.url.rsplit_once('/').unwrap();
        let name = name.to_owned();
        database
            .run(
                "create table marker (id int generated always as identity primary key);
                 grant select on marker to public; select relay.watch('marker')",
            )
            .await;
        database.run(&sql.replace("$DB", &name)).await;
        database.let_judge().await;
        let url = database.url.clone();
        let relay = Relay::with(&url, |settings| change(settings, &url)).await;
        Self { database, relay, name }
    }

    /// Runs statements, in which `$DB` stands for the database's name.
    pub async fn run(&self, sql: &str) {
        self.database.run(&sql.replace("$DB", &self.name)).await;
        if sql.contains("create role") {
            self.database.let_judge().await;
        }
    }

    /// A client that is told of everything in the schema `public` which its token may see.
    pub async fn join(&self, token: &str) -> Client {
        self.subscribe(token, json!([{"event": "*", "schema": "public"}])).await
    }

    /// A client with these bindings, and one for the marker.
    pub async fn subscribe(&self, token: &str, bindings: Value) -> Client {
        let mut bindings = bindings.as_array().unwrap().clone();
        bindings.push(json!({"event": "*", "schema": "public", "table": "marker"}));
        let mut client = Client::connect(&self.relay, token).await;
        client.subscribe("realtime:stage", Value::Array(bindings)).await;
        client
    }

    /// The answer to a subscription of one table that is refused, or `Subscribed to PostgreSQL`.
    pub async fn answer(&self, token: &str, binding: Value) -> String {
        let mut client = Client::connect(&self.relay, token).await;
        let answer = client.try_subscribe("realtime:stage", json!([binding])).await;
        answer["message"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
    }

    /// All changes that the client is told, up to now.
    pub async fn changes(&self, client: &mut Client) -> Vec<Value> {
        let id = self.database.value("insert into marker default values returning id").await;
        let id: i64 = id.parse().unwrap();
        let is_marker = |change: &Value| change["table"] == "marker";
        let mut changes =
            client.changes_until(|change| is_marker(change) && change["record"]["id"] == id).await;
        changes.retain(|change| !is_marker(change));
        changes
    }

    /// The same, a line each: `INSERT {new}`, `UPDATE {new} {old}`, `DELETE {old}`, with ` leave` after the latter.
    pub async fn told(&self, client: &mut Client) -> Vec<String> {
        let line = |change: &Value| {
            let parts = [change.get("record"), change.get("old_record")].into_iter().flatten();
            let parts: String = parts.map(|part| format!(" {part}")).collect();
            let leave = if change["leave"] == true { " leave" } else { "" };
            format!("{}{parts}{leave}", change["type"].as_str().unwrap())
        };
        self.changes(client).await.iter().map(line).collect()
    }

    /// The first column of what `select` returns to this role with these claims.
    pub async fn selected(&self, role: &str, claims: &Value, select: &str) -> Vec<String> {
        let client = self.database.connect().await;
        let become_reader = format!(
            "begin; select set_config('request.jwt.claims', $claims${claims}$claims$, true); set local role \"{role}\""
        );
        client.batch_execute(&become_reader).await.unwrap();
        let mut found = Vec::new();
        for message in client.simple_query(select).await.unwrap() {
            if let tokio_postgres::SimpleQueryMessage::Row(row) = message {
                found.push(row.get(0).unwrap_or("").to_owned());
            }
        }
        client.batch_execute("rollback").await.unwrap();
        found
    }
}
