//! A watched table that shows its reader no row, because row security is on and no policy lets the role read, says so.

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::program::cli::{line_with, serve};
use crate::support::client::Client;
use crate::support::database::Database;
use crate::support::http::{Events, get};
use crate::support::program::relay;
use crate::support::socket::Socket;
use crate::support::stage::Stage;
use crate::support::{ANN, SECRET, eventually, token};

const TABLE: &str = "create role $DB_r; create role $DB_s; create table t (id int primary key, owner uuid);
    alter table t enable row level security; grant select on t to $DB_r, $DB_s; grant usage on schema auth to $DB_r; select relay.watch('t');";

/// Policies that show the role `$DB_r` no row, whatever its claims.
const HIDING: [&str; 6] = [
    "",
    "create policy p on t for select to $DB_s using (true)",
    "create policy p on t as restrictive for select to $DB_r using (true)",
    "create policy p on t for insert to $DB_r with check (true)",
    "create policy p on t for update to $DB_r using (true); create policy q on t for delete to $DB_r using (true)",
    "create policy p on t to $DB_s using (true); create policy q on t as restrictive using (true)",
];

/// Policies and settings under which the role may see rows, if not with these claims or not now.
const SHOWING: [&str; 7] = [
    "create policy p on t for select to $DB_r using (owner = auth.uid())",
    "create policy p on t for select to $DB_r using (auth.jwt() ->> 'admin' = 'yes')",
    "create policy p on t to $DB_r using (false)",
    "create policy p on t using (owner = auth.uid()); create policy q on t as restrictive using (false)",
    "create policy p on t for select to $DB_g using (id > 5)",
    "alter table t disable row level security",
    "alter table t owner to $DB_g; alter table t enable row level security",
];

fn role(stage: &Stage, name: &str) -> String {
    format!("{}_{name}", stage.name)
}

fn told(stage: &Stage, name: &str) -> String {
    let role = role(stage, name);
    format!(
        "public.t: no row-level policy lets {role} read a row: create policy ... on public.t for select to {role} using (...)"
    )
}

fn bindings() -> Value {
    json!([{"event": "*", "schema": "public", "table": "t"}])
}

/// Whether the next `system` messages are these, all with status `ok`, and none follows.
async fn hears(socket: &mut Socket, expected: &[impl AsRef<str>], case: &str) {
    let mut heard = Vec::new();
    let mut is_last = false;
    loop {
        if heard.len() == expected.len() && !is_last {
            is_last = true;
            socket.push(Value::Null, json!("beat"), "phoenix", "heartbeat", json!({})).await;
        }
        let frame = socket.message_frame().await;
        match frame[3].as_str() {
            Some("phx_reply") if frame[2] == "phoenix" => break,
            Some("system") => {
                let payload = &frame[4];
                let kind = (&payload["extension"], &payload["channel"], &payload["status"]);
                assert_eq!(kind, (&json!("postgres_changes"), &json!("c"), &json!("ok")), "{case}: {frame}");
                heard.push(payload["message"].as_str().unwrap().to_owned());
            }
            _ => assert_eq!(frame[4]["status"], "ok", "{case}: {frame}"),
        }
    }
    let expected: Vec<&str> = expected.iter().map(AsRef::as_ref).collect();
    assert_eq!(heard, expected, "{case}");
}

const SUBSCRIBED: &str = "Subscribed to PostgreSQL";

#[tokio::test(flavor = "multi_thread")]
async fn a_channel_whose_table_shows_its_role_no_row_is_told_which_policy_is_missing() {
    let cases = HIDING.map(|sql| (sql, true)).into_iter().chain(SHOWING.map(|sql| (sql, false)));
    for (sql, is_hidden) in cases {
        let stage = Stage::new(&format!("create role $DB_g; {TABLE} grant $DB_g to $DB_r; {sql}")).await;
        let token = token(&role(&stage, "r"), None, json!({}));
        for version in ["1.0.0", "2.0.0"] {
            let mut socket = Socket::open(&stage.relay, version, &token).await;
            socket.join("1", "realtime:c", json!({"postgres_changes": bindings()})).await;
            let mut expected = vec![String::from(SUBSCRIBED)];
            expected.extend(is_hidden.then(|| told(&stage, "r")));
            hears(&mut socket, &expected, &format!("{version} {sql}")).await;
        }
        let path = format!("/realtime/v1/changes?table=t&apikey={token}");
        let rows = get(stage.relay.address, &path, "").await.body;
        assert_eq!(rows.get("notice"), is_hidden.then(|| json!(told(&stage, "r"))).as_ref(), "{sql}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_tables_of_one_channel_are_told_of_once_each_and_a_whole_schema_is_not() {
    let more = "create table u (id int); alter table u enable row level security; grant select on u to $DB_r;
                select relay.watch('u'); create table v (id int); grant select on v to $DB_r; select relay.watch('v')";
    let stage = Stage::new(&format!("{TABLE} {more}")).await;
    let token = token(&role(&stage, "r"), None, json!({}));
    let of = |table: &str, event: &str| json!({"event": event, "schema": "public", "table": table});
    let mut socket = Socket::open(&stage.relay, "2.0.0", &token).await;
    let entries = json!([of("t", "INSERT"), of("t", "DELETE"), of("u", "*"), of("v", "*")]);
    socket.join("1", "realtime:c", json!({"postgres_changes": entries})).await;
    let also = told(&stage, "r").replace("public.t", "public.u");
    hears(&mut socket, &[SUBSCRIBED, &told(&stage, "r"), &also], "two tables").await;
    let mut socket = Socket::open(&stage.relay, "2.0.0", &token).await;
    socket.join("1", "realtime:c", json!({"postgres_changes": [{"event": "*", "schema": "public"}]})).await;
    hears(&mut socket, &[SUBSCRIBED], "a schema").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_token_of_another_role_is_told_what_holds_for_that_role() {
    let stage = Stage::new(&format!("{TABLE} create policy p on t for select to $DB_s using (true)")).await;
    let of = |name: &str| token(&role(&stage, name), Some(ANN), json!({}));
    for version in ["1.0.0", "2.0.0"] {
        let mut socket = Socket::open(&stage.relay, version, &of("s")).await;
        socket.join("1", "realtime:c", json!({"postgres_changes": bindings()})).await;
        hears(&mut socket, &[SUBSCRIBED], version).await;
        for (name, is_hidden) in [("r", true), ("s", false), ("r", true)] {
            let payload = json!({"access_token": of(name)});
            socket.push(json!("1"), json!("2"), "realtime:c", "access_token", payload).await;
            let mut expected = vec![String::from(SUBSCRIBED)];
            expected.extend(is_hidden.then(|| told(&stage, name)));
            hears(&mut socket, &expected, &format!("{version} {name}")).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resumed_session_is_told_again_and_a_policy_heals_it() {
    let stage = Stage::new(TABLE).await;
    let token = token(&role(&stage, "r"), Some(ANN), json!({}));
    let path = format!(
        "/realtime/v1/websocket?apikey={token}&vsn=1.0.0&session=0a000000-0000-4000-8000-0000000000ff"
    );
    let mut expected = vec![String::from(SUBSCRIBED), told(&stage, "r")];
    for _ in 0..2 {
        let mut socket = Socket::handshake(&stage.relay, &path, &[]).await.ok().unwrap();
        socket.join("1", "realtime:c", json!({"postgres_changes": bindings()})).await;
        hears(&mut socket, &expected, "without a policy").await;
    }
    stage.run("create policy p on t for select to $DB_r using (true)").await;
    expected.pop();
    let mut socket = Socket::handshake(&stage.relay, &path, &[]).await.ok().unwrap();
    socket.join("1", "realtime:c", json!({"postgres_changes": bindings()})).await;
    hears(&mut socket, &expected, "with a policy").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_comes_heals_a_channel_and_one_that_goes_is_told_of_once() {
    let stage =
        Stage::new(&format!("{TABLE} create table other (id int); select relay.watch('other');")).await;
    let token = token(&role(&stage, "r"), None, json!({}));
    let mut client = Client::connect(&stage.relay, &token).await;
    let mut named = bindings().as_array().unwrap().clone();
    named.push(json!({"event": "*", "schema": "public", "table": "marker"}));
    client.subscribe("realtime:c", Value::Array(named)).await;
    assert_eq!(client.frame().await[4]["message"], told(&stage, "r"));
    // Changes and rules of others are not a reason to say it again.
    stage.run("insert into t values (1); alter table other enable row level security; insert into other values (1)").await;
    assert_eq!(stage.changes(&mut client).await, Vec::<Value>::new());
    for id in [2, 3] {
        stage
            .run(&format!(
                "create policy p on t for select to $DB_r using (true); insert into t values ({id})"
            ))
            .await;
        let frame = client.frame().await;
        assert_eq!(frame[4]["data"]["record"]["id"], id, "{frame}");
        stage.run("drop policy p on t").await;
        assert_eq!(client.frame().await[4]["message"], told(&stage, "r"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn over_http_rows_polls_and_streams_say_that_the_table_shows_no_row() {
    let stage = Stage::new(TABLE).await;
    let token = token(&role(&stage, "r"), None, json!({}));
    let path = format!("/realtime/v1/changes?table=t&apikey={token}");
    let address = stage.relay.address;
    let why = told(&stage, "r");
    let rows = get(address, &path, "").await.body;
    assert_eq!((&rows["rows"], &rows["notice"]), (&json!([]), &json!(why)));
    let since = rows["cursor"].as_str().unwrap();
    let poll = get(address, &format!("{path}&since={since}&wait=0"), "").await.body;
    assert_eq!((&poll["changes"], &poll["more"], &poll["notice"]), (&json!([]), &json!(false), &json!(why)));
    let mut events = Events::open(address, &path, None).await;
    let event = events.next().await.unwrap();
    assert_eq!((event.name.as_str(), event.data), ("notice", json!({"message": why})));

    stage.run("create policy p on t for select to $DB_r using (true); insert into t values (1)").await;
    assert_eq!(events.next().await.unwrap().name, "change");
    let poll = get(address, &format!("{path}&since={}&wait=0", events.last), "").await.body;
    assert_eq!(poll.get("notice"), None, "{poll}");
    // A poll that waits, and a stream, when the policy goes.
    let waiting = format!("{path}&since={}&wait=50", events.last);
    let waiting = tokio::spawn(async move { get(address, &waiting, "").await.body });
    let polls = || async { (stage.relay.figure("relay_channels_open") == 2).then_some(()) };
    eventually("the poll waits", polls).await;
    stage.run("drop policy p on t").await;
    let event = events.next().await.unwrap();
    assert_eq!((event.name.as_str(), event.data), ("notice", json!({"message": why})));
    let poll = waiting.await.unwrap();
    assert_eq!((&poll["changes"], &poll["notice"]), (&json!([]), &json!(why)));
    let next = format!("{path}&since={}&wait=0", poll["cursor"].as_str().unwrap());
    assert_eq!(get(address, &next, "").await.body["notice"], json!(why));
}

#[tokio::test(flavor = "multi_thread")]
async fn tail_prints_it_and_the_log_has_it_once_for_a_table_and_role() {
    let database = Database::new().await;
    database
        .run(
            "create table t (id int primary key); alter table t enable row level security;
             grant select on t to anon, authenticated; select relay.watch('t')",
        )
        .await;
    let (_relay, mut log, url) = serve(&["--database-url", &database.url]).await;
    let told = |role: &str| {
        format!(
            "public.t: no row-level policy lets {role} read a row: create policy ... on public.t for select to {role} using (...)"
        )
    };
    for role in ["anon", "anon", "authenticated", "anon"] {
        let token = token(role, None, json!({}));
        let mut tail = relay(&["tail", "t", "--url", &url, "--token", &token]).spawn().unwrap();
        let mut said = BufReader::new(tail.stderr.take().unwrap()).lines();
        line_with(&mut said, "following public.t").await;
        assert_eq!(line_with(&mut said, "policy").await, format!("relay: {}", told(role)));
        database.run("create policy p on t using (true); insert into t values (1)").await;
        let mut changes = BufReader::new(tail.stdout.take().unwrap()).lines();
        line_with(&mut changes, r#"INSERT public.t {"id":1}"#).await;
        database.run("drop policy p on t; delete from t").await;
        line_with(&mut said, &told(role)).await;
    }
    // What is logged after it proves that nothing else was.
    let wrong = format!("{url}/realtime/v1/changes?table=t&apikey=x");
    let address = url.trim_start_matches("http://").parse().unwrap();
    crate::support::http::text(address, wrong.trim_start_matches(&url)).await;
    let mut lines = Vec::new();
    while let Some(line) = log.next_line().await.unwrap() {
        if line.contains("request refused") {
            break;
        }
        lines.push(line);
    }
    for role in ["anon", "authenticated"] {
        let count = lines.iter().filter(|line| line.contains(&told(role)) && line.contains("WARN")).count();
        assert_eq!(count, 1, "{role}: {lines:#?}");
    }
    assert!(!lines.iter().any(|line| line.contains(SECRET)), "{lines:#?}");
}
