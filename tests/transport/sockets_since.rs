//! A channel that is joined with a cursor: it gets what came after it, then what is new, and hands the cursor on to polls and streams.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use crate::support::client::Client;
use crate::support::dice::Dice;
use crate::support::http::{Events, get};
use crate::support::stage::Stage;
use crate::support::{ANN, BOB, PATIENCE, token};

const TOPIC: &str = "realtime:live";

async fn stage() -> Stage {
    Stage::new(
        "create table t (id int primary key, owner uuid, v int not null default 0); alter table t enable row level security;
         create policy own on t using (owner = auth.uid()); grant select on t to authenticated;
         create table u (id int primary key, v int not null default 0); grant select on u to authenticated;
         select relay.watch('t'), relay.watch('u')",
    )
    .await
}

fn reader() -> String {
    token("authenticated", Some(ANN), json!({}))
}

fn path(more: &str) -> String {
    format!("/realtime/v1/changes?tables=t,u&apikey={}{more}", reader())
}

async fn cursor_of_now(stage: &Stage) -> String {
    get(stage.relay.address, &path(""), "").await.body["cursor"].as_str().unwrap().to_owned()
}

fn tables() -> Value {
    json!([{"event": "*", "schema": "public", "table": "t"}, {"event": "*", "schema": "public", "table": "u"}])
}

async fn open(stage: &Stage, more: &str) -> Client {
    Client::at(stage.relay.address, &reader(), &format!("&cursor=true{more}")).await.unwrap()
}

/// Joins from a cursor; returns the payload of the first answer that is an error, else of the `system` message.
async fn join(client: &mut Client, config: Value) -> Value {
    client.push(Some("1"), TOPIC, "phx_join", json!({ "config": config })).await;
    loop {
        let frame = client.frame().await;
        match frame[3].as_str() {
            Some("phx_reply") if frame[4]["status"] == "error" => return frame[4]["response"].clone(),
            Some("system") => return frame[4].clone(),
            _ => {}
        }
    }
}

async fn joined(stage: &Stage, since: &str) -> Client {
    let mut client = open(stage, "").await;
    let answer = join(&mut client, json!({"postgres_changes": tables(), "since": since})).await;
    assert_eq!(answer["status"], "ok", "{answer}");
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn a_channel_continues_from_a_cursor_of_rows_then_with_what_is_new() {
    let stage = stage().await;
    let since = cursor_of_now(&stage).await;
    stage
        .run(&format!(
            "begin; insert into t values (1, '{ANN}'); insert into t values (2, '{BOB}'); insert into u values (3); commit;
             update u set v = 1"
        ))
        .await;
    let mut client = joined(&stage, &since).await;
    stage.run("insert into u values (4)").await;
    let changes = client.changes_until(|change| change["record"]["id"] == 4).await;
    let told: Vec<_> = changes
        .iter()
        .map(|change| {
            (
                change["type"].as_str().unwrap(),
                change["record"]["id"].as_i64().unwrap(),
                change["last"] == true,
            )
        })
        .collect();
    assert_eq!(told, [("INSERT", 1, false), ("INSERT", 3, true), ("UPDATE", 3, true), ("INSERT", 4, true)]);
    // Each of them has a cursor from which it goes on.
    for (number, change) in changes.iter().enumerate() {
        let mut client = joined(&stage, change["cursor"].as_str().unwrap()).await;
        if number + 1 < changes.len() {
            assert_eq!(client.change().await["number"], changes[number + 1]["number"]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_missed_comes_on_one_socket_however_slowly_it_is_read() {
    let stage = stage().await;
    stage.run("alter table u add column text text").await;
    let since = cursor_of_now(&stage).await;
    for part in 0..12 {
        let rows = format!(
            "insert into u select g, 0, repeat('x', 10000) from generate_series(1 + {part} * 250, 250 + {part} * 250) g"
        );
        stage.run(&rows).await;
    }
    let mut client = joined(&stage, &since).await;
    for expected in 1..=3000 {
        assert_eq!(client.change().await["record"]["id"], expected);
        if expected < 300 {
            sleep(Duration::from_millis(10)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cursor_that_cannot_be_continued_is_a_gap_and_what_is_new_follows() {
    let stage = stage().await;
    let other = Stage::new(
        "create table t (id int primary key); grant select on t to authenticated; select relay.watch('t')",
    )
    .await;
    let path = format!("/realtime/v1/changes?table=t&apikey={}", reader());
    let foreign = get(other.relay.address, &path, "").await.body["cursor"].as_str().unwrap().to_owned();
    let truncated = cursor_of_now(&stage).await;
    stage.run("truncate u").await;
    for since in [foreign, truncated] {
        let mut client = joined(&stage, &since).await;
        loop {
            let frame = client.frame().await;
            if frame[3] == "system" && frame[4]["message"].as_str().unwrap().starts_with("Gap: ") {
                break;
            }
            assert_ne!(frame[3], "postgres_changes", "{frame}");
        }
        stage.run("delete from u; insert into u values (1)").await;
        client.changes_until(|change| change["record"]["id"] == 1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_from_what_is_no_cursor_is_refused_with_what_to_do() {
    let stage = stage().await;
    let since = cursor_of_now(&stage).await;
    let named = "&session=5e551011-0000-4000-8000-00000000000d";
    for (more, config, text) in [
        ("", json!({"postgres_changes": tables(), "since": "!"}), "since: the cursor is malformed"),
        ("", json!({"postgres_changes": tables(), "since": 7}), "since: a cursor is expected"),
        ("", json!({"postgres_changes": tables(), "since": ""}), "since: the cursor is malformed"),
        ("", json!({"postgres_changes": [], "since": since}), "since: it is for postgres_changes"),
        (
            named,
            json!({"postgres_changes": tables(), "since": since}),
            "since: a named session continues from its bookmark",
        ),
    ] {
        let mut client = open(&stage, more).await;
        let answer = join(&mut client, config).await;
        assert!(answer["reason"].as_str().unwrap_or_default().contains(text), "{text}: {answer}");
    }
    let mut client = open(&stage, "").await;
    let answer = join(&mut client, json!({"postgres_changes": tables(), "since": null})).await;
    assert_eq!(answer["status"], "ok", "{answer}");
}

/// A reader that changes its transport after each few changes, always with the cursor of the last one.
async fn next_by_turns(stage: &Stage, dice: &mut Dice, since: &str, most: usize) -> (Vec<Value>, String) {
    match dice.below(3) {
        0 => {
            let answer = get(stage.relay.address, &path(&format!("&wait=1&since={since}")), "").await;
            assert_eq!(answer.status, 200, "{answer:?}");
            let changes = answer.body["changes"].as_array().unwrap().clone();
            (changes, answer.body["cursor"].as_str().unwrap().to_owned())
        }
        1 => {
            let mut events = Events::open(stage.relay.address, &path(""), Some(since)).await;
            let (mut changes, mut at) = (Vec::new(), since.to_owned());
            while changes.len() < most
                && let Ok(Some(event)) = timeout(Duration::from_millis(300), events.next()).await
            {
                at = event.id;
                changes.push(event.data);
            }
            (changes, at)
        }
        _ => {
            let mut client = joined(stage, since).await;
            let (mut changes, mut at) = (Vec::new(), since.to_owned());
            while changes.len() < most
                && let Some(frame) = client.frame_within(Duration::from_millis(300)).await
            {
                if frame[3] == "postgres_changes" {
                    let change = frame[4]["data"].clone();
                    at = change["cursor"].as_str().unwrap().to_owned();
                    changes.push(change);
                }
            }
            (changes, at)
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_goes_from_socket_to_stream_to_poll_gets_each_change_once() {
    let stage = stage().await;
    let mut since = cursor_of_now(&stage).await;
    stage.run("insert into u select g, 0 from generate_series(1, 5) g").await;
    let session = stage.database.connect().await;
    let writing = tokio::spawn(async move {
        for turn in 0..200 {
            let update = format!("update u set v = v + 1 where id % 3 = {}", turn % 3);
            session.batch_execute(&update).await.unwrap();
        }
    });
    let seed = 7;
    let (mut dice, mut has) = (Dice(seed), HashMap::new());
    let expected: i64 = 5 + (0..200).map(|turn| [1, 2, 2][turn % 3]).sum::<i64>();
    let mut told = 0;
    while told < expected {
        let most = 1 + dice.below(40);
        let (changes, at) = next_by_turns(&stage, &mut dice, &since, most as usize).await;
        for change in changes {
            let number = |name: &str| change["record"][name].as_i64().unwrap();
            let before: i64 = has.insert(number("id"), number("v")).map_or(-1, |before: i64| before);
            assert_eq!(before + 1, number("v"), "seed {seed}: {change}");
            told += 1;
        }
        since = at;
    }
    timeout(PATIENCE, writing).await.unwrap().unwrap();
}
