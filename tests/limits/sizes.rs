//! Bounds hold for the sum of what they bound: one legal change always fits, and no frame is larger than clients take.

use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use crate::support::client::Client;
use crate::support::eventually;
use crate::support::http::{Events, get, stalled};
use crate::support::socket::Socket;
use crate::support::stage::Stage;
use crate::support::token;

/// What clients take in one frame: realtime-py no more.
const MOST: usize = 1 << 20;

const BIG: &str = "create table big (id int primary key, body text, n int default 0); alter table big replica identity full;
    grant select on big to anon; select relay.watch('big');";

fn anon() -> String {
    token("anon", None, json!({}))
}

fn config(table: &str) -> Value {
    json!({"postgres_changes": [{"event": "*", "schema": "public", "table": table}]})
}

/// The next change that a socket of either version is told: its `data`, and the length of its frame.
async fn change(socket: &mut Socket) -> (Value, usize) {
    loop {
        let frame = socket.message_frame().await;
        if frame[3] == "postgres_changes" {
            return (frame[4]["data"].clone(), frame.to_string().len());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_of_a_large_row_fits_behind_small_ones_and_tells_its_new_row() {
    // Before the relay starts: no client gets it.
    let row = "; insert into big select n, repeat('a', 600000) from generate_series(1, 1) n";
    let stage = Stage::new(&(BIG.to_owned() + row)).await;
    let address = stage.relay.address.to_string();
    let mut sockets = Vec::new();
    for (version, more) in [
        ("1.0.0", ""),
        ("2.0.0", ""),
        ("2.0.0", "&cursor=true"),
        ("2.0.0", "&session=5e551011-0000-4000-8000-000000000002"),
    ] {
        let path = format!("/realtime/v1/websocket?apikey={}&vsn={version}{more}", anon());
        let mut socket = Socket::try_at(&address, &path, &[]).await.unwrap();
        if version == "2.0.0" {
            let join = json!(["1", "1", "realtime:t", "phx_join", {"config": config("big")}]);
            socket.send(Message::text(join.to_string())).await;
            while socket.frame().await[3] != "system" {}
        } else {
            socket.join("1", "realtime:t", config("big")).await;
            while socket.frame().await["event"] != "system" {}
        }
        sockets.push(socket);
    }
    let path = format!("/realtime/v1/changes?table=big&apikey={}", anon());
    let mut stream = Events::open(stage.relay.address, &path, None).await;
    let since = stage.database.value("select relay.cursor()").await;
    for round in 0..6 {
        let small = 100 + round;
        stage
            .run(&format!(
                "begin; insert into big values ({small}, 'small'); update big set n = n + 1 where id = 1; commit"
            ))
            .await;
        let told = async |socket: &mut Socket| {
            assert_eq!(change(socket).await.0["record"]["id"], small);
            let (data, length) = change(socket).await;
            assert_eq!((&data["record"]["id"], &data["record"]["n"]), (&json!(1), &json!(round + 1)));
            assert_eq!(data["record"]["body"].as_str().map(str::len), Some(600_000));
            assert_eq!((&data["old_record"], &data["errors"]), (&json!({"id": 1}), &Value::Null));
            assert!(length < MOST, "{length}");
        };
        let streamed = async {
            assert_eq!(stream.next().await.unwrap().data["record"]["id"], small);
            assert_eq!(stream.next().await.unwrap().data["record"]["n"], round + 1);
        };
        tokio::join!(join_all(sockets.iter_mut().map(told)), streamed);
    }
    let (mut since, mut told) = (since, 0);
    while told < 12 {
        let answer = get(stage.relay.address, &format!("{path}&since={since}&wait=5"), "").await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        told += answer.body["changes"].as_array().unwrap().len();
        since = answer.body["cursor"].as_str().unwrap().to_owned();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_frame_is_larger_than_clients_take_whatever_makes_it_grow() {
    let stage = Stage::new(BIG).await;
    let topic = format!("realtime:{}", "\u{1}".repeat(1015));
    let mut socket = Socket::open(&stage.relay, "2.0.0", &anon()).await;
    // As many numbers as a channel may have, and a topic of which each character is written as six.
    let binding = |n: usize| json!({"event": "*", "schema": "public", "table": "big", "filter": format!("id=gt.-{}", n + 1)});
    let bindings: Vec<Value> = (0..100).map(binding).collect();
    socket.join("1", &topic, json!({"postgres_changes": bindings})).await;
    while socket.message_frame().await[3] != "system" {}
    let mut old = Socket::open(&stage.relay, "1.0.0", &anon()).await;
    old.join("1", &topic, json!({"postgres_changes": bindings})).await;
    while old.message_frame().await[3] != "system" {}
    let mut id = 0;
    let mut seen = (0, 0);
    for body in [
        "repeat(chr(1), 160000)",
        "repeat(chr(1), 171000)",
        "repeat(chr(1), 174000)",
        "repeat('\"', 520000)",
        "repeat('x', 1030000)",
        "repeat('x', 1040000)",
        "repeat('x', 1047000)",
        "repeat('x', 1100000)",
        "repeat(E'\\U0001F600', 260000)",
    ] {
        id += 1;
        stage.run(&format!("insert into big values ({id}, {body})")).await;
        for socket in [&mut socket, &mut old] {
            let (data, length) = change(socket).await;
            assert!(length < MOST, "{body}: {length}");
            assert_eq!(data["record"]["id"], id);
            assert_eq!(data["columns"].as_array().unwrap().len(), 3);
            match data["record"].get("body") {
                Some(_) => seen.0 += usize::from(data["errors"].is_null()),
                None => seen.1 += usize::from(data["errors"] == json!(["Error 413: Payload Too Large"])),
            }
        }
        stage.run(&format!("delete from big where id = {id}")).await;
        for socket in [&mut socket, &mut old] {
            let (data, length) = change(socket).await;
            assert!(length < MOST && data["old_record"]["id"] == id, "{body}: {length}");
        }
    }
    assert_eq!(seen.0 + seen.1, 18, "each is told whole, or says that it is not");
    assert!(seen.0 >= 6 && seen.1 >= 4, "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bound_of_a_change_is_a_setting() {
    let stage = Stage::with(BIG, |settings, _| settings.change_bytes = Some(64 * 1024)).await;
    let mut client = stage.subscribe(&anon(), config("big")["postgres_changes"].clone()).await;
    stage.run("insert into big values (1, repeat('x', 40000)), (2, repeat('x', 60000))").await;
    assert_eq!(client.change().await["record"]["body"].as_str().map(str::len), Some(40_000));
    assert_eq!(client.change().await["record"], json!({"id": 2, "n": 0}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_change_comes_in_each_of_many_channels_of_a_client() {
    let stage = Stage::new(BIG).await;
    let mut client = Client::connect(&stage.relay, &anon()).await;
    for topic in 0..40 {
        // Half of them ask for columns of their own.
        let select = if topic % 2 == 0 { json!(null) } else { json!(["body"]) };
        let binding = json!([{"event": "*", "schema": "public", "table": "big", "select": select}]);
        client.subscribe(&format!("realtime:{topic}"), binding).await;
    }
    for id in 0..2 {
        stage.run(&format!("insert into big values ({id}, repeat('x', 700000))")).await;
        for _ in 0..40 {
            let data = client.change().await;
            assert_eq!(data["record"]["id"], id);
            assert_eq!(data["record"]["body"].as_str().map(str::len), Some(700_000));
        }
    }
}

/// A table of so many columns with long names.
fn wide(columns: usize) -> String {
    let columns: Vec<String> =
        (0..columns).map(|n| format!("a_column_with_a_rather_long_name_{n} int")).collect();
    format!(
        "create table wide (id int primary key, {}); grant select on wide to anon; select relay.watch('wide');",
        columns.join(", ")
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn many_rows_of_a_table_with_long_columns_are_told_live_and_to_those_who_missed_them() {
    const ROWS: usize = 120;
    let stage = Stage::new(&wide(400)).await;
    let name = "&session=5e551011-0000-4000-8000-000000000003";
    let come = async || {
        let mut client = Client::at(stage.relay.address, &anon(), name).await.unwrap();
        client.subscribe("realtime:wide", config("wide")["postgres_changes"].clone()).await;
        client
    };
    let mut live = come().await;
    let since = stage.database.value("select relay.cursor()").await;
    let insert =
        |first: usize| format!("insert into wide (id) select generate_series({first}, {})", first + ROWS - 1);
    stage.run(&insert(0)).await;
    for id in 0..ROWS {
        assert_eq!(live.change().await["record"]["id"], id);
    }
    drop(live);
    eventually("it is gone", || async { (stage.relay.session_count() == 0).then_some(()) }).await;
    stage.run(&insert(ROWS)).await;
    let mut back = come().await;
    // What it had not acknowledged may come again.
    let mut next = back.change().await["record"]["id"].as_u64().unwrap() as usize;
    assert!(next <= ROWS, "{next}");
    while next < 2 * ROWS - 1 {
        next += 1;
        assert_eq!(back.change().await["record"]["id"], next);
    }
    let path = format!("/realtime/v1/changes?table=wide&apikey={}", anon());
    let (mut since, mut told) = (since, 0);
    while told < 2 * ROWS {
        let answer = get(stage.relay.address, &format!("{path}&since={since}&wait=5"), "").await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        for change in answer.body["changes"].as_array().unwrap() {
            assert_eq!(change["record"]["id"], told);
            told += 1;
        }
        since = answer.body["cursor"].as_str().unwrap().to_owned();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_overflowed_comes_through_what_it_missed_and_goes_on() {
    const ROWS: i64 = 30;
    let stage = Stage::new(BIG).await;
    let name = "&session=5e551011-0000-4000-8000-000000000004";
    // It stops reading, and is closed for it.
    let stopped = stalled(stage.relay.address, &format!("{}{name}", anon()), "realtime:t", "big").await;
    eventually("it follows", || async {
        stage.relay.metrics().contains("relay_channels_open 1\n").then_some(())
    })
    .await;
    for id in 0..ROWS {
        stage.run(&format!("begin; insert into big values ({id}, repeat('x', 500000)); update big set n = 1 where id = {id}; commit")).await;
    }
    eventually("it is closed", || async { (stage.relay.session_count() == 0).then_some(()) }).await;
    drop(stopped);
    let mut back = Client::at(stage.relay.address, &anon(), name).await.unwrap();
    back.subscribe("realtime:t", config("big")["postgres_changes"].clone()).await;
    for id in 0..ROWS {
        for kind in ["INSERT", "UPDATE"] {
            let change = back.change().await;
            assert_eq!((&change["type"], &change["record"]["id"]), (&json!(kind), &json!(id)));
        }
    }
    stage.run(&format!("insert into big values ({ROWS}, 'live')")).await;
    assert_eq!(back.change().await["record"]["body"], "live");
}

#[tokio::test(flavor = "multi_thread")]
async fn topics_and_references_are_bounded_with_a_clear_answer() {
    let stage = Stage::new("").await;
    let mut socket = Socket::open(&stage.relay, "2.0.0", &anon()).await;
    let topic = |bytes: usize| format!("realtime:{}", "t".repeat(bytes - 9));
    let reason = "TopicNameTooLong: A topic may have 1024 bytes at most";
    for bytes in [1025, 250_000, 2_000_000] {
        socket.join("1", &topic(bytes), config("marker")).await;
        let reply = socket.frame().await;
        assert_eq!(reply[2].as_str().map(str::len), Some(bytes));
        assert_eq!(reply[4], json!({"status": "error", "response": {"reason": reason}}));
    }
    socket.join("1", &topic(1024), config("marker")).await;
    assert_eq!(socket.frame().await[4]["status"], "ok");
    let long = json!(["r".repeat(257 * 1024), "1", "realtime:t", "phx_join", {}]);
    socket.send(Message::text(long.to_string())).await;
    while socket.frame().await[4]["message"] != "the frame does not have the shape of a message" {}
}
