//! Bindings that the schema refuses, or takes away: each stands alone, and is bound again as soon as the schema lets it.

use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::stage::Stage;
use crate::support::{PATIENCE, token};

const SUBSCRIBED: &str = "Subscribed to PostgreSQL";

fn reader(stage: &Stage) -> String {
    token(&format!("{}_r", stage.name), None, json!({}))
}

/// A client, and the messages it received that the test has not consumed yet.
struct Listener {
    client: Client,
    heard: Vec<Value>,
}

impl Listener {
    fn of(client: Client) -> Self {
        Self { client, heard: Vec::new() }
    }

    /// The first frame heard that is so.
    async fn hears(&mut self, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        loop {
            if let Some(at) = self.heard.iter().position(&is_so) {
                return self.heard.remove(at);
            }
            let Some(frame) = self.client.frame_within(PATIENCE).await else {
                panic!("{what}: nothing but {:#?}", self.heard);
            };
            self.heard.push(frame);
        }
    }

    /// A `system` message that begins with `text`.
    async fn hears_of(&mut self, text: &str, case: &str) -> Value {
        let begins = |frame: &Value| frame[4]["message"].as_str().is_some_and(|told| told.starts_with(text));
        let frame =
            self.hears(&format!("{case}, {text}"), |frame| frame[3] == "system" && begins(frame)).await;
        assert_eq!(frame[4]["status"] == "ok", text == SUBSCRIBED, "{case}: {frame}");
        frame[4].clone()
    }

    /// A row of this id that was inserted into this table.
    async fn hears_row(&mut self, table: &str, id: i64, case: &str) {
        let is_row = |frame: &Value| {
            let data = &frame[4]["data"];
            data["table"] == table && data["record"]["id"] == id
        };
        self.hears(&format!("{case}, {table} {id}"), is_row).await;
    }
}

/// What a subscription of `s.t` lacks, what lifts it, and the binding.
const LACKING: [(&str, &str, &str); 10] = [
    ("select relay.unwatch('s.t')", "select relay.watch('s.t')", "{}"),
    ("revoke select on s.t from $DB_r", "grant select on s.t to $DB_r", "{}"),
    ("revoke select on s.t from $DB_r", "grant select (id) on s.t to public", "{}"),
    ("revoke usage on schema s from $DB_r", "grant usage on schema s to $DB_r", "{}"),
    ("alter table s.t rename to u", "alter table s.u rename to t", "{}"),
    (
        "drop table s.t",
        "create table s.t (id int primary key, v text); grant select on s.t to $DB_r; select relay.watch('s.t')",
        "{}",
    ),
    ("alter table s.t rename v to w", "alter table s.t rename w to v", r#"{"filter": "v=eq.1"}"#),
    ("alter table s.t drop v", "alter table s.t add v text default '1'", r#"{"select": ["v"]}"#),
    (
        "alter table s.t alter v drop default; alter table s.t alter v type int using v::int",
        "alter table s.t alter v type text; alter table s.t alter v set default 'x'",
        r#"{"filter": "v=eq.x"}"#,
    ),
    (
        "revoke select on s.t from $DB_r; grant select (id) on s.t to $DB_r",
        "grant select (v) on s.t to $DB_r",
        r#"{"filter": "v=neq.z"}"#,
    ),
];

const MADE: &str = "create role $DB_r; create schema s; grant usage on schema s to $DB_r;
    create table s.t (id int primary key, v text default '1'); grant select on s.t to $DB_r; select relay.watch('s.t');";

fn binding(more: &str) -> Value {
    let mut binding = json!({"event": "*", "schema": "s", "table": "t"});
    let more: Value = serde_json::from_str(more).unwrap();
    binding.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    binding
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_schema_refuses_is_bound_as_soon_as_the_schema_lets_it() {
    for (lack, lift, more) in LACKING {
        let stage = Stage::new(MADE).await;
        stage.run(lack).await;
        let mut client = Client::connect(&stage.relay, &reader(&stage)).await;
        let refused = client.try_subscribe("realtime:c", json!([binding(more)])).await;
        assert_eq!(refused["status"], "error", "{lack}: {refused}");
        let mut client = Listener::of(client);
        stage.run(lift).await;
        client.hears_of(SUBSCRIBED, lift).await;
        stage.run("insert into s.t (id) values (1)").await;
        client.hears_row("t", 1, lift).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_binding_that_is_lost_leaves_the_others_and_comes_back() {
    // Rights that are taken and given back, and a column that is only selected, end no binding.
    let lost =
        LACKING.iter().filter(|(lack, _, more)| !lack.starts_with("revoke") && !more.contains("select"));
    for (lack, lift, more) in lost {
        let stage = Stage::new(MADE).await;
        let other = json!({"event": "INSERT", "schema": "public", "table": "marker"});
        let mut client = Client::connect(&stage.relay, &reader(&stage)).await;
        client.subscribe("realtime:c", json!([other, binding(more)])).await;
        let mut client = Listener::of(client);
        // In one transaction, and after it: the other table is told without a break.
        stage.run(&format!("begin; {lack}; insert into marker default values; commit")).await;
        client.hears_row("marker", 1, lack).await;
        let refused = client.hears_of("Unable to subscribe to changes", lack).await;
        assert!(refused["message"].as_str().unwrap().contains("schema: s, table: t"), "{lack}: {refused}");
        stage.run("insert into marker default values").await;
        client.hears_row("marker", 2, lack).await;
        client.heard.clear();
        stage.run(lift).await;
        client.hears_of(SUBSCRIBED, lift).await;
        // What was written to it meanwhile was not told.
        client.hears_of("Gap: ", lift).await;
        stage.run("insert into s.t (id) values (7); insert into marker default values").await;
        client.hears_row("t", 7, lift).await;
        client.hears_row("marker", 3, lift).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_with_a_name_is_bound_again_and_misses_nothing_of_its_other_tables() {
    let stage = Stage::new(MADE).await;
    let session = "&session=5e551011-0000-4000-8000-000000000001";
    let mut client = Client::at(stage.relay.address, &reader(&stage), session).await.unwrap();
    let other = json!({"event": "INSERT", "schema": "public", "table": "marker"});
    client.subscribe("realtime:c", json!([other, binding("{}")])).await;
    let mut client = Listener::of(client);
    stage.run("drop table s.t; insert into marker default values").await;
    client.hears_of("Unable to subscribe to changes", "dropped").await;
    stage.run("insert into marker default values").await;
    client.hears_row("marker", 1, "dropped").await;
    client.hears_row("marker", 2, "dropped").await;
    stage.run(LACKING[5].1).await;
    client.hears_of(SUBSCRIBED, "made anew").await;
    stage.run("insert into s.t (id) values (7)").await;
    client.hears_row("t", 7, "made anew").await;
}
