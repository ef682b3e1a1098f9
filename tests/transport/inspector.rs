//! `/inspector`: a page that holds nothing, and what it reads, for the role service_role alone.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::http::{Answer, Events, get, post, stalled, text};
use crate::support::stage::Stage;
use crate::support::{ANN, BOB, eventually, token, token_for};

/// Everything that the page reads, except the paths that are known elsewhere.
const DATA: [&str; 7] = [
    "/inspector/overview",
    "/inspector/clients",
    "/inspector/topics",
    "/inspector/settings",
    "/inspector/relations",
    "/inspector/database",
    "/inspector/last-changes?table=todos",
];

fn sql() -> String {
    format!(
        "create table todos (id int primary key, owner uuid, title text); alter table todos enable row level security;
         create policy own on todos for select to authenticated using (owner = (select auth.uid()));
         grant select on todos to authenticated, service_role; select relay.watch('todos');
         create table notes (a text, b text, body text, primary key (a, b)); select relay.watch('notes');
         insert into todos values (1, '{ANN}', 'a row that only its owner sees')"
    )
}

fn service() -> String {
    token("service_role", None, json!({}))
}

async fn read(address: SocketAddr, by: &str, path: &str) -> Answer {
    get(address, path, &format!("authorization: Bearer {by}\r\n")).await
}

async fn asked(stage: &Stage, path: &str) -> Value {
    let answer = read(stage.relay.address, &service(), path).await;
    assert_eq!(answer.status, 200, "{path}: {answer:?}");
    answer.body
}

/// Waits until the inspector lists so many clients; returns them.
async fn clients(stage: &Stage, query: &str, count: usize) -> Vec<Value> {
    eventually("the clients", || async {
        let body = asked(stage, &format!("/inspector/clients?{query}")).await;
        (body["count"] == count).then(|| body["clients"].as_array().unwrap().clone())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_for_all_and_what_it_reads_for_the_service_role_alone() {
    let stage =
        Stage::with(&sql(), |settings, _| settings.secret_key = vec![String::from("sb_secret_x")]).await;
    let address = stage.relay.address;
    let (status, page) = text(address, "/inspector").await;
    assert!(status == 200 && page.contains("<title>relay inspector</title>"), "{status} {page}");
    assert!(!page.contains("todos"), "nothing of the database is in the page");
    let head = get(address, "/inspector", "").await.head;
    for line in [
        "content-security-policy: default-src 'none'",
        "x-content-type-options: nosniff",
        "cache-control: no-store",
    ] {
        assert!(head.contains(line), "{line}: {head}");
    }
    for path in
        DATA.into_iter().chain(["/inspector/metrics", "/inspector/explain?table=todos", "/inspector/nothing"])
    {
        let ended = token_for("service_role", None, json!({}), Duration::ZERO);
        for (by, status) in [
            (String::from("nonsense"), 401),
            (ended, 401),
            (token("anon", None, json!({})), 403),
            (token("authenticated", Some(ANN), json!({})), 403),
        ] {
            let refused = read(address, &by, path).await;
            assert_eq!(refused.status, status, "{path}: {refused:?}");
            assert!(!refused.body.to_string().contains("own"), "{refused:?}");
        }
        assert_eq!(get(address, path, "").await.status, 401, "{path}");
        let status = if path.ends_with("nothing") { 404 } else { 200 };
        for by in [service(), String::from("sb_secret_x")] {
            let answer = read(address, &by, path).await;
            assert_eq!(answer.status, status, "{path}: {answer:?}");
            assert!(
                !answer.head.contains("access-control-allow-origin"),
                "{path}: another page may not read it"
            );
        }
    }
    assert_eq!(
        post(address, "/inspector/overview", &format!("authorization: Bearer {}\r\n", service()), b"")
            .await
            .status,
        405
    );
    assert_eq!(text(address, "/inspectors").await.0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_an_admin_port_the_inspector_is_there_and_not_on_the_port_of_clients() {
    let admin = Some("127.0.0.1:0".to_owned());
    let stage = Stage::with(&sql(), |settings, _| settings.admin_listen = admin).await;
    let admin = stage.relay.admin_address.unwrap();
    assert_eq!(text(admin, "/inspector").await.0, 200);
    assert_eq!(text(stage.relay.address, "/inspector").await.0, 404);
    for path in DATA.into_iter().chain(["/inspector/metrics", "/inspector/explain?table=todos"]) {
        assert_eq!(get(admin, path, "").await.status, 401, "{path}: it may show rows, on any port");
        assert_eq!(read(admin, &service(), path).await.status, 200, "{path}");
        assert_eq!(read(stage.relay.address, &service(), path).await.status, 404, "{path}");
    }
    let stream = format!("/inspector/changes?tables=todos&apikey={}", service());
    let mut events = Events::open(admin, &stream, None).await;
    stage.run(&format!("insert into todos values (2, '{ANN}', 'b')")).await;
    assert_eq!(events.next().await.unwrap().data["record"]["id"], 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_of_each_transport_are_listed_with_user_channels_and_cursor_until_they_leave() {
    let stage = Stage::new(&sql()).await;
    assert_eq!(clients(&stage, "", 0).await, [json!(null); 0]);
    let ann = token("authenticated", Some(ANN), json!({}));
    let mut socket = Client::connect(&stage.relay, &ann).await;
    let binding = json!([{"event": "*", "schema": "public", "table": "todos", "filter": "id=gt.0"}]);
    socket.subscribe("realtime:one", binding).await;
    let bob = token("authenticated", Some(BOB), json!({}));
    let stream = format!("/realtime/v1/changes?table=todos&apikey={bob}");
    let stream = Events::open(stage.relay.address, &stream, None).await;
    let cursor =
        asked(&stage, "/realtime/v1/changes?table=todos").await["cursor"].as_str().unwrap().to_owned();
    let address = stage.relay.address;
    let path = format!("/realtime/v1/changes?table=todos&since={cursor}&wait=55");
    let poll = tokio::spawn(async move { read(address, &service(), &path).await });
    let listed = clients(&stage, "order=newest", 3).await;
    let facts =
        |client: &Value| ["transport", "sub", "role"].map(|name| client[name].as_str().map(str::to_owned));
    let owned = |parts: [Option<&str>; 3]| parts.map(|part| part.map(str::to_owned));
    let found: Vec<_> = listed.iter().map(facts).collect();
    assert_eq!(
        found,
        [
            owned([Some("poll"), None, Some("service_role")]),
            owned([Some("event_stream"), Some(BOB), Some("authenticated")]),
            owned([Some("websocket"), Some(ANN), Some("authenticated")]),
        ]
    );
    let channel = &listed[2]["channels"][0];
    assert_eq!((&channel["topic"], &channel["sub"]), (&json!("realtime:one"), &json!(ANN)), "{channel}");
    assert_eq!(channel["tables"][0]["table"], "public.todos");
    assert!(channel["tables"][0]["filter"].as_str().unwrap().contains("id"), "{channel}");
    let start = channel["cursor"].as_str().unwrap().to_owned();
    assert_eq!(listed[1]["channels"][0]["topic"], "public.todos");
    // A change moves the cursors, and ends the poll.
    stage.run(&format!("insert into todos values (3, '{ANN}', 'c')")).await;
    assert_eq!(poll.await.unwrap().status, 200);
    let listed = clients(&stage, "order=newest", 2).await;
    assert_ne!(listed[1]["channels"][0]["cursor"], start.as_str());
    // Those that are like a text, by user, topic and address.
    for (like, count) in
        [(ANN, 1), ("realtime:one", 1), ("authenticated", 2), ("127.0.0.1", 2), ("nobody", 0)]
    {
        clients(&stage, &format!("like={like}"), count).await;
    }
    drop((socket, stream));
    clients(&stage, "", 0).await;
    let overview = asked(&stage, "/inspector/overview").await;
    assert_eq!(overview["clients"], json!({"websocket": 0, "event_stream": 0, "poll": 0}));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_a_client_that_does_not_read_is_told_in_bytes_and_seconds() {
    let stage = Stage::with(&sql(), |settings, _| settings.outbox_bytes = Some(64 << 20)).await;
    let ann = token("authenticated", Some(ANN), json!({}));
    let _stuck = stalled(stage.relay.address, &ann, "realtime:stuck", "todos").await;
    eventually("the channel", || async {
        let listed = clients(&stage, "", 1).await;
        (listed[0]["channels"][0]["tables"][0]["table"] == "public.todos").then_some(())
    })
    .await;
    let write =
        format!("insert into todos select n, '{ANN}', repeat('x', 100000) from generate_series(100, 400) n");
    stage.run(&write).await;
    let listed = eventually("bytes that wait", || async {
        let listed = clients(&stage, "order=lag", 1).await;
        (listed[0]["queued_bytes"].as_u64() > Some(1 << 20)).then_some(listed)
    })
    .await;
    assert!(listed[0]["lag_seconds"].as_f64().unwrap() > 0.0, "{listed:?}");
    let overview = asked(&stage, "/inspector/overview").await;
    assert!(overview["queued_bytes"].as_u64() >= Some(1 << 20), "{overview}");
}

#[tokio::test(flavor = "multi_thread")]
async fn topics_are_listed_with_members_and_what_was_sent() {
    let stage = Stage::new(&sql()).await;
    let ann = token("authenticated", Some(ANN), json!({}));
    let mut members = Vec::new();
    for _ in 0..2 {
        let mut member = Client::connect(&stage.relay, &ann).await;
        let join = json!({"config": {"postgres_changes": []}});
        member.push(Some("1"), "realtime:room", "phx_join", join).await;
        assert_eq!(member.frame().await[4]["status"], "ok");
        members.push(member);
    }
    let topics = async || asked(&stage, "/inspector/topics").await;
    let listed = topics().await;
    assert_eq!(
        (&listed["count"], &listed["topics"][0]["topic"]),
        (&json!(1), &json!("realtime:room")),
        "{listed}"
    );
    assert_eq!((&listed["topics"][0]["members"], &listed["topics"][0]["broadcasts"]), (&json!(2), &json!(0)));
    let body = json!({"messages": [{"topic": "room", "event": "e", "payload": {"n": 1}}]}).to_string();
    let headers = format!("authorization: Bearer {ann}\r\ncontent-type: application/json\r\n");
    let sent = post(stage.relay.address, "/realtime/v1/api/broadcast", &headers, body.as_bytes()).await;
    assert_eq!(sent.status, 202, "{sent:?}");
    let listed = topics().await;
    assert_eq!((&listed["topics"][0]["broadcasts"], &listed["topics"][0]["frames"]), (&json!(1), &json!(2)));
    assert!(listed["topics"][0]["bytes"].as_u64() > Some(0), "{listed}");
    drop(members);
    eventually("the topic is gone", || async { (topics().await["count"] == 0).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn relations_and_their_last_changes_are_told_with_keys_of_any_kind() {
    let stage = Stage::new(&sql()).await;
    let relations = asked(&stage, "/inspector/relations").await["relations"].clone();
    let of = |name: &str| {
        let list = relations.as_array().unwrap().iter();
        list.clone().find(|one| one["name"] == name).unwrap_or_else(|| panic!("{relations}")).clone()
    };
    let todos = of("public.todos");
    assert_eq!(todos["roles"]["authenticated"]["way"], "compiled", "{todos}");
    assert_eq!((&todos["roles"]["anon"], &todos["key"]), (&Value::Null, &json!(["id"])));
    assert_eq!(of("public.notes")["roles"], json!({}), "nobody may read it");
    stage.run("update todos set title = 'n' where id = 1; delete from todos where id = 1; insert into notes values ('x', 'y', 'z')").await;
    let last = async |table: &str| {
        let changes =
            asked(&stage, &format!("/inspector/last-changes?table={table}")).await["changes"].clone();
        let line = |change: &Value| format!("{} {}", change["operation"].as_str().unwrap(), change["key"]);
        changes.as_array().unwrap().iter().map(line).collect::<Vec<_>>()
    };
    assert_eq!(last("todos").await, [r#"D {"id":1}"#, r#"U {"id":1}"#, r#"I {"id":1}"#]);
    assert_eq!(last("public.notes").await, [r#"I {"a":"x","b":"y"}"#]);
    // By number and transaction a change is explained.
    let changes = asked(&stage, "/inspector/last-changes?table=todos").await["changes"].clone();
    let (number, xid) = (&changes[0]["number"], changes[0]["xid"].as_str().unwrap());
    let path = format!("/inspector/explain?table=todos&sub={ANN}&number={number}&txid={xid}");
    assert_eq!(asked(&stage, &path).await["would_receive"], true);
    for (table, told) in
        [("", "table: the name"), ("?table=none", "not watched"), ("?table=a%20b", "invalid name")]
    {
        let path = format!("/inspector/last-changes{table}");
        let refused = read(stage.relay.address, &service(), &path).await;
        assert!(
            refused.status == 400 && refused.body["error"].as_str().unwrap().contains(told),
            "{refused:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_to_explain_may_be_in_a_header_and_the_checks_are_those_of_doctor() {
    let stage = Stage::new(&sql()).await;
    let ann = token("authenticated", Some(ANN), json!({}));
    let headers = format!("authorization: Bearer {}\r\nexplained-token: {ann}\r\n", service());
    let row = "%7b%22id%22:1,%22owner%22:%22OWNER%22,%22title%22:null%7d";
    for (owner, expected) in [(ANN, true), (BOB, false)] {
        let path = format!("/inspector/explain?table=todos&row={}", row.replace("OWNER", owner));
        let answer = get(stage.relay.address, &path, &headers).await;
        assert_eq!(
            (&answer.body["sub"], &answer.body["would_receive"]),
            (&json!(ANN), &json!(expected)),
            "{answer:?}"
        );
    }
    stage
        .run(
            "grant select on todos to service_role; select relay.webhook('todos', 'https://receiver.example/secret', name => 'pager');
             alter table todos disable trigger all",
        )
        .await;
    let database = asked(&stage, "/inspector/database").await;
    let checks = database["checks"].as_array().unwrap();
    let fault = checks
        .iter()
        .find(|check| check["kind"] == "fault" && check["text"].as_str().unwrap().contains("todos"));
    assert!(fault.unwrap()["text"].as_str().unwrap().contains("relay.watch"), "{database}");
    assert!(database["health"]["bytes"].is_number() && database["refresh_jobs"].is_array(), "{database}");
    let hook = &database["webhooks"][0];
    assert_eq!((&hook["name"], &hook["waiting"]), (&json!("pager"), &json!(0)), "{database}");
    assert!(hook["lag"].is_number() && !database.to_string().contains("receiver.example"), "{database}");
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_are_shown_without_secrets_and_bad_parameters_are_refused_with_what_is_expected() {
    let stage = Stage::new(&sql()).await;
    let settings = asked(&stage, "/inspector/settings").await;
    for setting in settings.as_array().unwrap() {
        let value = setting["value"].to_string();
        for secret in [crate::support::SECRET, "postgres://"] {
            assert!(!value.contains(secret), "{setting}");
        }
    }
    let of = |name: &str| {
        settings.as_array().unwrap().iter().find(|one| one["name"] == name).unwrap()["value"].clone()
    };
    assert_eq!(
        (of("jwt-secret"), of("poll-ms"), of("install")),
        (json!("(set, not shown)"), json!(3_600_000), Value::Null)
    );
    for (path, told) in [
        ("clients?order=best", "order: one of queued"),
        ("clients?limit=many", "limit: a number"),
        ("topics?offset=-1", "offset: a number"),
        ("clients?like=a&like=b", "more than once"),
    ] {
        let refused = read(stage.relay.address, &service(), &format!("/inspector/{path}")).await;
        assert!(
            refused.status == 400 && refused.body["error"].as_str().unwrap().contains(told),
            "{path}: {refused:?}"
        );
    }
}

/// Listed clients beside which a subscriber is measured.
const MANY: u64 = 10_000;
/// Changes that are measured.
const MEASURED: usize = 200;

/// The longest time of all but one in a hundred from a statement's end to its change.
async fn p99(stage: &Stage, client: &mut Client, from: usize) -> Duration {
    let mut took = Vec::new();
    for number in from..from + MEASURED {
        let begun = Instant::now();
        stage.run(&format!("insert into todos values ({number}, '{ANN}', 'x')")).await;
        client.changes_until(|change| change["record"]["id"] == number).await;
        took.push(begun.elapsed());
    }
    took.sort();
    took[MEASURED * 99 / 100 - 1]
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_clients_are_listed_a_page_at_a_time_and_do_not_hurt_delivery() {
    use relay::feed::deliver::outbox::Outbox;
    use relay::model::identity::claims::Claims;
    use relay::model::session::channel::ChannelId;
    use relay::transport::clients::ClientKind;
    use std::sync::Arc;

    let stage = Stage::new(&sql()).await;
    let app = stage.relay.app();
    // Without sockets: these would cost the machine more than what is measured.
    let entries: Vec<_> = (0..MANY)
        .map(|number| {
            let session = (1 << 40) + number;
            let claims =
                json!({"role": "authenticated", "sub": format!("user-{number}"), "exp": 9_999_999_999_u64});
            let claims = Claims::from_verified_payload(&claims.to_string()).unwrap();
            let outbox = Arc::new(Outbox::new(1 << 20, Arc::clone(&app.budget)));
            let peer = (ClientKind::WebSocket, "192.0.2.1".parse().unwrap());
            let entry = app.clients.add(session, peer, &claims, outbox);
            for channel in 0..5 {
                entry.opened(ChannelId { session, channel }, &format!("realtime:{number}:{channel}"), false);
            }
            entry
        })
        .collect();
    let ann = token("authenticated", Some(ANN), json!({}));
    let mut client = Client::connect(&stage.relay, &ann).await;
    client.subscribe("realtime:one", json!([{"event": "*", "schema": "public", "table": "todos"}])).await;
    let listed = asked(&stage, "/inspector/clients?limit=1000000").await;
    assert_eq!((&listed["count"], listed["clients"].as_array().unwrap().len()), (&json!(MANY + 1), 200));
    let last = asked(&stage, &format!("/inspector/clients?order=newest&offset={MANY}")).await;
    assert_eq!(last["clients"].as_array().unwrap().len(), 1);
    let quiet = p99(&stage, &mut client, 1000).await;
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (address, ended) = (stage.relay.address, Arc::clone(&stop));
    let listing = tokio::spawn(async move {
        let (mut count, mut pace) = (0, tokio::time::interval(Duration::from_millis(100)));
        while !ended.load(std::sync::atomic::Ordering::Relaxed) {
            for order in ["queued", "lag", "channels", "newest"] {
                let path = format!("/inspector/clients?limit=200&order={order}&like=user");
                assert_eq!(read(address, &service(), &path).await.status, 200);
                count += 1;
                // Twenty operators: each page reads the list once in two seconds.
                pace.tick().await;
            }
        }
        count
    });
    let beside = p99(&stage, &mut client, 2000).await;
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let count = listing.await.unwrap();
    assert!(count > 4, "{count}");
    // Far above what a listing costs, far below what a held lock or a blocked thread would.
    assert!(beside < quiet * 8 + Duration::from_millis(200), "p99 {quiet:?} without, {beside:?} beside");
    drop(entries);
}
