//! The usual reasons for which nothing arrives. Whom one asks first, `relay explain`, the channel, HTTP or the log, names the cure.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};

use crate::delivery::crash::Cluster;
use crate::program::cli::{line_with, serve};
use crate::support::client::Client;
use crate::support::database::{Database, connect, with_database, with_login};
use crate::support::http::{get, text};
use crate::support::program::output;
use crate::support::socket::Socket;
use crate::support::{ANN, SECRET, token, token_for};

const SUBSCRIBED: &str = "Subscribed to PostgreSQL";

/// A situation, and what has to be in the first thing that each of them says.
struct Stuck<'a> {
    table: &'a str,
    token: &'a str,
    filter: Option<&'a str>,
    /// A statement after which the channel and the log say it; none when they say it at the join.
    then: Option<&'a str>,
    explain: &'a str,
    channel: &'a str,
    http: &'a str,
    log: &'a str,
}

impl Stuck<'_> {
    /// Asks all of them at a relay on this database.
    async fn check(self, database_url: &str, more: &[&str]) {
        let (_relay, mut log, url) = serve(&[&["--database-url", database_url], more].concat()).await;
        let address: SocketAddr = url.trim_start_matches("http://").parse().unwrap();
        let (schema, table) = self.table.split_once('.').unwrap();
        let channel = match Client::at(address, self.token, "").await {
            Err(refused) => refused,
            Ok(mut client) => {
                let binding = json!({"event": "*", "schema": schema, "table": table, "filter": self.filter});
                client.try_join("realtime:c", json!([binding])).await.unwrap();
                if let Some(then) = self.then {
                    assert_eq!(message(&mut client, |_| true).await, SUBSCRIBED);
                    connect(database_url).await.batch_execute(then).await.unwrap();
                }
                message(&mut client, |message| message != SUBSCRIBED).await
            }
        };
        assert!(channel.contains(self.channel), "{:?} is not in {channel}", self.channel);
        line_with(&mut log, self.log).await;

        let filter = self.filter.map_or_else(String::new, |filter| format!("&filter={filter}"));
        let path =
            format!("/realtime/v1/changes?schema={schema}&table={table}{filter}&apikey={}", self.token);
        let said = get(address, &path, "").await.body.to_string();
        assert!(said.contains(self.http), "{:?} is not in {said}", self.http);

        let mut arguments = vec!["explain", self.table, "--token", self.token, "--jwt-secret", SECRET];
        arguments.extend(["--database-url", database_url]);
        arguments.extend(self.filter.iter().flat_map(|filter| ["--filter", filter]));
        let (code, said, error) = output(&arguments).await;
        let first = said.lines().next().unwrap_or_else(|| panic!("{error}"));
        assert_eq!((code, first.starts_with("would not: ")), (1, true), "{first}");
        assert!(first.contains(self.explain), "{:?} is not in {first}", self.explain);
    }
}

/// The text of the next `system` message that is so, or the reason of a refused join.
async fn message(client: &mut Client, is_so: impl Fn(&str) -> bool) -> String {
    loop {
        let frame = client.frame().await;
        let text = match frame[3].as_str() {
            Some("phx_reply") if frame[4]["status"] == "error" => &frame[4]["response"]["reason"],
            Some("system") => &frame[4]["message"],
            _ => continue,
        };
        let text = text.as_str().unwrap();
        if is_so(text) {
            return text.to_owned();
        }
    }
}

fn good() -> String {
    token("authenticated", Some(ANN), json!({}))
}

/// A database with a table that is watched, secured and readable but for what `sql` changes.
async fn database(sql: &str) -> Database {
    let database = Database::new().await;
    database
        .run(&format!(
            "create table todos (id int primary key, owner uuid, title text); alter table todos enable row level security;
             create policy own on todos for select to authenticated using (owner = (select auth.uid()));
             grant select on todos to authenticated; select relay.watch('todos'); {sql}"
        ))
        .await;
    database
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_grant() {
    let cure = "grant select on public.todos to authenticated";
    let database = database("revoke select on todos from authenticated").await;
    let token = good();
    let stuck = Stuck {
        table: "public.todos",
        token: &token,
        filter: None,
        then: None,
        explain: cure,
        channel: cure,
        http: cure,
        log: cure,
    };
    stuck.check(&database.url, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_policy() {
    let cure = "create policy ... on public.todos for select to authenticated using (...)";
    let database = database("drop policy own on todos").await;
    let token = good();
    let stuck = Stuck {
        table: "public.todos",
        token: &token,
        filter: None,
        then: None,
        explain: cure,
        channel: cure,
        http: cure,
        log: cure,
    };
    stuck.check(&database.url, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_the_policy_cannot_read() {
    let database = database("").await;
    let token = token("authenticated", Some("7"), json!({}));
    let told = "the policy of public.todos raises an error for the claims of this token";
    let stuck = Stuck {
        table: "public.todos",
        token: &token,
        filter: None,
        then: Some("insert into todos values (1)"),
        explain: "the token needs a claim from which (auth.jwt() ->> 'sub')::uuid can be read",
        channel: "relay explain public.todos --token",
        http: "relay explain public.todos --token",
        log: told,
    };
    stuck.check(&database.url, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_the_token_lacks() {
    let database = database(
        "drop policy own on todos; create policy org on todos using (title = auth.jwt() ->> 'org'); insert into todos values (1, null, 'a')",
    )
    .await;
    let (_relay, _log, url) = serve(&["--database-url", &database.url]).await;
    let lacks = "the token has no auth.jwt() ->> 'org'";
    for (claims, told) in [
        (json!({}), lacks),
        (json!({"org": null}), lacks),
        (json!({"app_metadata": {"org": "a"}}), lacks),
        (json!({"org": "b"}), "the token says: auth.jwt() ->> 'org' = \"b\""),
    ] {
        let token = token("authenticated", Some(ANN), claims);
        let (code, said, _) =
            output(&["explain", "todos", "--token", &token, "--key", "1", "--database-url", &database.url])
                .await;
        let first = said.lines().next().unwrap();
        assert!(code == 1 && first.starts_with("would not: ") && first.contains(told), "{first}");
        // Of a policy that decides by claims, a client is told nothing.
        let mut socket = Socket::at(url.trim_start_matches("http://"), "2.0.0", &token).await;
        socket.join("1", "realtime:c", json!({"postgres_changes": [{"event": "*", "table": "todos"}]})).await;
        loop {
            let frame = socket.message_frame().await;
            if frame[3] == "system" {
                assert_eq!(frame[4]["message"], SUBSCRIBED);
                break;
            }
        }
        socket.is_quiet().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_misspelled_column_in_a_filter() {
    let database = database("").await;
    let token = good();
    let cure = "titel; there is title";
    let stuck = Stuck {
        table: "public.todos",
        token: &token,
        filter: Some("titel=eq.secret-value"),
        then: None,
        explain: "has no column titel that the role authenticated may read; there is title",
        channel: cure,
        http: "has no column titel that the role authenticated may read; there is title",
        log: "has no column titel that the role authenticated may read; there is title",
    };
    stuck.check(&database.url, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filter_that_is_none_or_does_not_fit_and_its_value_is_in_no_log() {
    let database = database("").await;
    for (filter, channel, logged) in [
        ("title>secret-value", "A filter is column=op.value", "A filter is column=op.value"),
        (
            "id=eq.secret-value",
            "invalid input syntax for type integer",
            "does not fit the type of the column",
        ),
    ] {
        // A relay for each, because it logs a refusal at most once a second.
        let (_relay, mut log, url) = serve(&["--database-url", &database.url]).await;
        let address: SocketAddr = url.trim_start_matches("http://").parse().unwrap();
        let mut client = Client::at(address, &good(), "").await.unwrap();
        client
            .try_join("realtime:c", json!([{"event": "*", "table": "todos", "filter": filter}]))
            .await
            .unwrap();
        let told = message(&mut client, |_| true).await;
        assert!(told.contains(channel), "{told}");
        let line = line_with(&mut log, "subscription refused").await;
        assert!(line.contains(logged) && line.contains("public.todos"), "{line}");
        assert!(!line.contains("secret-value"), "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_not_watched() {
    let cure = "select relay.watch('public.todos')";
    let database = database("select relay.unwatch('todos')").await;
    let token = good();
    let stuck = Stuck {
        table: "public.todos",
        token: &token,
        filter: None,
        then: None,
        explain: cure,
        channel: cure,
        http: cure,
        log: cure,
    };
    stuck.check(&database.url, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_by_another_secret() {
    let database = database("").await;
    let cure = "relay token --sub UUID makes one with the secret of RELAY_JWT_SECRET";
    let (message, _) = good().rsplit_once('.').map(|(message, _)| (message.to_owned(), ())).unwrap();
    let token = format!("{message}.AAAA");
    let stuck = Stuck {
        table: "public.todos",
        token: &token,
        filter: None,
        then: None,
        explain: cure,
        channel: cure,
        http: cure,
        log: cure,
    };
    stuck.check(&database.url, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_token() {
    let database = database("").await;
    let token = token_for("authenticated", Some(ANN), json!({}), Duration::ZERO);
    let cure = "relay token --sub UUID makes one";
    let stuck = Stuck {
        table: "public.todos",
        token: &token,
        filter: None,
        then: None,
        explain: "relay token --sub UUID makes another one",
        channel: cure,
        http: cure,
        log: cure,
    };
    stuck.check(&database.url, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_address() {
    let database = database("").await;
    let cure = "the WebSocket is at /realtime/v1/websocket";
    for path in ["/websocket", "/realtime/v1/websocket/websocket", "/realtime/v1"] {
        // A relay for each, because it logs a refusal at most once a second.
        let (_relay, mut log, url) = serve(&["--database-url", &database.url]).await;
        let place = url.trim_start_matches("http://");
        let address = format!("{path}?apikey={}", good());
        let (status, body) = Socket::try_at(place, &address, &[]).await.err().unwrap();
        assert!(status == 404 && body.contains(cure), "{path}: {status} {body}");
        let line = line_with(&mut log, cure).await;
        assert!(line.contains(path) && !line.contains(&good()[..30]), "{line}");
    }
    let (_relay, mut log, url) = serve(&["--database-url", &database.url]).await;
    let place = url.trim_start_matches("http://");
    // What looks for a page or for holes is no client.
    for path in ["/", "/favicon.ico", "/wp-login.php"] {
        assert_eq!(text(place.parse().unwrap(), path).await.0, 404);
    }
    let arguments = ["tail", "todos", "--url", &format!("{url}/realtime/v1"), "--token", &good()];
    let (code, _, said) = output(&arguments).await;
    assert!(code == 1 && said.contains(cure), "{said}");
    assert!(line_with(&mut log, "request refused").await.contains("/realtime/v1/realtime/v1"));
    let nowhere = with_database(&database.url, "nowhere");
    let (code, _, said) = output(&["explain", "todos", "--sub", ANN, "--database-url", &nowhere]).await;
    assert!(code == 1 && said.lines().next().unwrap().contains("createdb"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_in_another_schema() {
    let database = database("create schema crm; alter table todos set schema crm").await;
    let token = good();
    let unnamed = Stuck {
        table: "public.todos",
        token: &token,
        filter: None,
        then: None,
        explain: "there is no relation public.todos; there is crm.todos",
        channel: "relay explain public.todos --role authenticated",
        http: "relay explain public.todos --role authenticated",
        log: "relay explain public.todos --role authenticated",
    };
    unnamed.check(&database.url, &[]).await;
    let cure = "grant usage on schema crm to authenticated";
    let unusable = Stuck {
        table: "crm.todos",
        token: &token,
        filter: None,
        then: None,
        explain: cure,
        channel: cure,
        http: cure,
        log: cure,
    };
    unusable.check(&database.url, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_role_that_policies_hold_back() {
    // Roles belong to the cluster, and here nobody else makes them.
    let cluster = Cluster::start(&[]).await;
    let superuser = connect(&cluster.url).await;
    for sql in ["create role owner login createrole", "create database app owner owner"] {
        superuser.batch_execute(sql).await.unwrap();
    }
    let owner = with_login(&with_database(&cluster.url, "app"), "owner");
    let (code, said, error) = output(&["install", "--database-url", &owner]).await;
    assert_eq!(code, 0, "{said}{error}");
    let sql = "create table held (id int primary key); alter table held enable row level security;
               grant select on held to service_role; select relay.watch('held')";
    connect(&owner).await.batch_execute(sql).await.unwrap();
    let token = token("service_role", None, json!({}));
    let cure = "alter role service_role bypassrls";
    let stuck = Stuck {
        table: "public.held",
        token: &token,
        filter: None,
        then: None,
        explain: cure,
        channel: cure,
        http: cure,
        log: cure,
    };
    stuck.check(&owner, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_membership_table_without_a_grant() {
    let database = database(
        "create table members (todo int, member uuid); drop policy own on todos;
         create policy member on todos using (exists (select from members m where m.todo = id and m.member = auth.uid()))",
    )
    .await;
    let cure = "grant select on public.members to authenticated";
    let token = good();
    let stuck = Stuck {
        table: "public.todos",
        token: &token,
        filter: None,
        then: None,
        explain: cure,
        channel: cure,
        http: cure,
        log: cure,
    };
    stuck.check(&database.url, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_without_a_mistake_gets_no_notice() {
    let database = database(&format!("insert into todos values (1, '{ANN}', 'a')")).await;
    let (_relay, mut log, url) = serve(&["--database-url", &database.url]).await;
    let address: SocketAddr = url.trim_start_matches("http://").parse().unwrap();
    let mut socket = Socket::at(url.trim_start_matches("http://"), "2.0.0", &good()).await;
    let binding = json!({"event": "*", "schema": "public", "table": "todos", "filter": "title=eq.a"});
    socket.join("1", "realtime:c", json!({"postgres_changes": [binding]})).await;
    let mut events = Vec::new();
    for _ in 0..2 {
        let frame = socket.message_frame().await;
        events.push((frame[3].as_str().unwrap().to_owned(), frame[4]["message"].clone()));
    }
    assert_eq!(events, [("phx_reply".to_owned(), Value::Null), ("system".to_owned(), json!(SUBSCRIBED))]);
    socket.is_quiet().await;
    let path = format!("/realtime/v1/changes?table=todos&apikey={}", good());
    let body = get(address, &path, "").await.body;
    assert_eq!(body.as_object().unwrap().keys().collect::<Vec<_>>(), ["cursor", "rows", "more"]);
    let (code, said, _) =
        output(&["explain", "todos", "--sub", ANN, "--key", "1", "--database-url", &database.url]).await;
    assert_eq!((code, said.lines().next()), (0, Some("would receive")));
    // What is logged after it proves that nothing else was.
    text(address, "/realtime/v1/nowhere").await;
    let mut lines = Vec::new();
    while let Some(line) = log.next_line().await.unwrap() {
        if line.contains("/realtime/v1/nowhere") {
            break;
        }
        lines.push(line);
    }
    assert!(!lines.iter().any(|line| line.contains("WARN")), "{lines:#?}");
}
