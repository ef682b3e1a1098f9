//! Filters that are slow to evaluate delay only the client that chose them.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::http::text;
use crate::support::stage::Stage;
use crate::support::token;

const TABLES: &str = "create table t (id int primary key, v text, n numeric, d date);
    create table other (id int primary key); create table wide (id int primary key, a int);
    grant select on t, other, wide to anon, authenticated;
    select relay.watch('t'), relay.watch('other'), relay.watch('wide');";
const ROUNDS: usize = 200;
/// What the delay of 99 of 100 changes may be at most, unless the same readers wait half as long without a crowd.
const MOST: Duration = Duration::from_millis(50);
/// The p99 without a crowd from which on the machine counts as busy.
const BUSY: Duration = Duration::from_millis(30);

fn anon() -> String {
    token("anon", None, json!({}))
}

/// The answer to a join whose entries have these filters of `t`.
async fn ask_for(client: &mut Client, topic: &str, filters: impl Iterator<Item = String>) -> String {
    let entries: Vec<Value> =
        filters.map(|filter| json!({"event": "*", "table": "t", "filter": filter})).collect();
    let payload = json!({"config": {"postgres_changes": entries}});
    client.push(Some("1"), topic, "phx_join", payload).await;
    loop {
        let frame = client.frame().await;
        if frame[2] == topic && frame[3] == "system" {
            return frame[4]["message"].as_str().unwrap().to_owned();
        }
    }
}

/// A relay with two readers, of whom one reads another table.
struct Watched {
    stage: Stage,
    readers: [Client; 2],
    written: usize,
}

impl Watched {
    async fn new() -> Self {
        let stage = Stage::new(TABLES).await;
        let readers = readers(&stage).await;
        Self { stage, readers, written: 0 }
    }

    /// How long both wait for a change that was committed.
    async fn delay(&mut self) -> Duration {
        self.written += 1;
        let id = self.written;
        let insert =
            format!("insert into t values ({id}, 'some text {id}', {id}.5); insert into other values ({id})");
        self.stage.run(&insert).await;
        let committed = Instant::now();
        for reader in &mut self.readers {
            assert_eq!(reader.change().await["record"]["id"], id);
        }
        committed.elapsed()
    }

    /// How long the changes of a run take.
    async fn run(&mut self) -> Run {
        let mut delays = Vec::new();
        for _ in 0..ROUNDS {
            delays.push(self.delay().await);
        }
        delays.sort();
        Run { median: delays[ROUNDS / 2], p99: delays[ROUNDS * 99 / 100 - 1] }
    }
}

/// What half of the changes of a run take at most, and 99 of 100.
#[derive(Debug)]
struct Run {
    median: Duration,
    p99: Duration,
}

async fn readers(stage: &Stage) -> [Client; 2] {
    let same = json!([{"event": "*", "schema": "public", "table": "t", "filter": "id=gt.0"}]);
    let other = json!([{"event": "*", "schema": "public", "table": "other"}]);
    [stage.subscribe(&anon(), same).await, stage.subscribe(&anon(), other).await]
}

/// The readers wait no longer than [`MOST`] beside the crowd, or than twice as long as without it: before it came (`calm`), or
/// after it is gone. Where 99 of 100 changes take [`BUSY`] and more without the crowd, other processes decide the p99 of so few, and
/// the medians are compared.
async fn assert_prompt<Crowd>(watched: &mut Watched, calm: Run, crowded: Run, crowd: Crowd) {
    drop(crowd);
    if crowded.p99 <= MOST.max(calm.p99 * 2) {
        return;
    }
    let after = watched.run().await;
    let is_prompt = match calm.p99.max(after.p99) >= BUSY {
        true => crowded.median <= calm.median.max(after.median) * 2,
        false => crowded.p99 <= after.p99 * 2,
    };
    assert!(is_prompt, "{crowded:?} beside the crowd, {calm:?} before and {after:?} after it");
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_patterns_of_one_client_delay_no_other_reader() {
    let mut watched = Watched::new().await;
    let calm = watched.run().await;
    let mut crowd = Client::connect(&watched.stage.relay, &anon()).await;
    for channel in 0..20 {
        let filters = (0..100).map(|n| format!("v=like.%{channel}x{n}%"));
        let answer = ask_for(&mut crowd, &format!("realtime:{channel}"), filters).await;
        assert_eq!(answer, "Subscribed to PostgreSQL");
    }
    // Joining took its time, and these said nothing meanwhile.
    watched.readers = readers(&watched.stage).await;
    let crowded = watched.run().await;
    // It gets what it asked for all the same.
    watched.stage.run("insert into t values (5000, 'a 17x42 b')").await;
    assert_eq!(crowd.change().await["record"]["id"], 5000);
    assert_eq!(watched.readers[0].change().await["record"]["id"], 5000);
    assert_prompt(&mut watched, calm, crowded, crowd).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_that_postgresql_decides_delay_no_reader_of_what_is_decided_here() {
    let mut watched = Watched::new().await;
    let calm = watched.run().await;
    let mut crowd = Vec::new();
    for session in 0..4 {
        let mut client = Client::connect(&watched.stage.relay, &anon()).await;
        let filters = (0..100).map(|n| format!("n=lt.-{session}.{n}1"));
        assert_eq!(ask_for(&mut client, "realtime:crowd", filters).await, "Subscribed to PostgreSQL");
        crowd.push(client);
    }
    let crowded = watched.run().await;
    assert_prompt(&mut watched, calm, crowded, crowd).await;
}

/// Expressions that take PostgreSQL seconds and more for a text of an odd length, which none of them matches.
const HEAVY: [&str; 3] = [
    r"v=match.^(x+)(x+)(x+)(x+)\1\2\3\4$",
    r"v=imatch.^(x+)(x+)(x+)(x+)\4\3\2\1$",
    r"v=not.match.^((x+)(x+)(x+)(x+)\2\3\4\5)$",
];

#[tokio::test(flavor = "multi_thread")]
async fn regular_expressions_that_never_end_delay_no_other_reader_and_are_a_gap_for_their_own() {
    let mut watched = Watched::new().await;
    watched.stage.run("alter table t alter v set default repeat('x', 401)").await;
    let mut crowd = Vec::new();
    for (number, filter) in HEAVY.iter().enumerate() {
        let mut client = Client::connect(
            &watched.stage.relay,
            &token("authenticated", Some(&number.to_string()), json!({})),
        )
        .await;
        let answer = ask_for(&mut client, "realtime:crowd", std::iter::once((*filter).to_owned())).await;
        assert_eq!(answer, "Subscribed to PostgreSQL");
        crowd.push(client);
    }
    // An expression that PostgreSQL cannot read is refused with its own word.
    let mut client = Client::connect(&watched.stage.relay, &anon()).await;
    let answer = ask_for(&mut client, "realtime:wrong", std::iter::once(String::from("v=match.(a"))).await;
    assert!(answer.contains("invalid regular expression"), "{answer}");
    watched.readers = readers(&watched.stage).await;
    let mut delays = Vec::new();
    for id in 1..=20 {
        watched
            .stage
            .run(&format!("insert into t (id) values ({id}); insert into other values ({id})"))
            .await;
        let committed = Instant::now();
        for reader in &mut watched.readers {
            assert_eq!(reader.change().await["record"]["id"], id);
        }
        delays.push(committed.elapsed());
    }
    delays.sort();
    assert!(delays[15] < Duration::from_millis(500), "{delays:?}");
    for client in &mut crowd {
        loop {
            let frame = client.frame().await;
            if frame[4]["message"].as_str().is_some_and(|message| message.starts_with("Gap:")) {
                break;
            }
            assert_ne!(frame[3], "postgres_changes", "{frame}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_that_postgresql_evaluates_get_each_change_once_and_in_order_beside_clients_that_ask_for_too_much()
 {
    let stage = Stage::with(TABLES, |settings, _| settings.judge_timeout_ms = Some(500)).await;
    let by = json!([{"event": "*", "schema": "public", "table": "t", "filter": "n=gt.0.5"}]);
    let mut modest = stage.subscribe(&token("authenticated", Some("modest"), json!({})), by).await;
    // Each change is a hundred questions of a millisecond and more: no time is left for most of them.
    let mut greedy = Client::connect(&stage.relay, &token("authenticated", Some("greedy"), json!({}))).await;
    let filters = (0..100).map(|n| format!("n=lt.-1.{n},v=ilike.%{}ß%", "x_".repeat(100)));
    assert_eq!(ask_for(&mut greedy, "realtime:greedy", filters).await, "Subscribed to PostgreSQL");
    let reads = tokio::spawn(async move {
        for id in 1..=150 {
            assert_eq!(modest.change().await["record"]["id"], id);
        }
    });
    let long = "x".repeat(20_000);
    for id in 1..=150 {
        stage.run(&format!("insert into t values ({id}, '{long}ü', {id})")).await;
    }
    reads.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_faster_than_filters_are_decided_comes_late_and_not_as_a_gap() {
    let stage = Stage::new(TABLES).await;
    let by =
        json!([{"event": "*", "schema": "public", "table": "t", "filter": "n=gt.0.5", "select": ["id"]}]);
    let mut clients = Vec::new();
    for name in ["one", "two"] {
        clients.push(stage.subscribe(&token("authenticated", Some(name), json!({})), by.clone()).await);
    }
    // Forty megabytes at once, of which eight may wait in memory.
    let rows = "insert into t select i, repeat(md5(i::text), 6400), i from generate_series";
    let inserts: String =
        (0..40).map(|n| format!("{rows}({}, {}) i; commit;", n * 5 + 1, n * 5 + 5)).collect();
    stage.run(&inserts).await;
    for client in &mut clients {
        for id in 1..=200 {
            assert_eq!(client.change().await["record"]["id"], id);
        }
    }
    // They are where the others are again.
    stage.run("insert into t values (201, 'x', 201)").await;
    for client in &mut clients {
        assert_eq!(client.change().await["record"]["id"], 201);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_asks_for_more_filters_than_one_may_have_is_refused_and_told_how_many() {
    let stage = Stage::new(TABLES).await;
    let asked = |from: usize, count: usize| (from..from + count).map(|n| format!("n=gt.{n}.5"));
    let mut client = Client::connect(&stage.relay, &anon()).await;
    assert_eq!(ask_for(&mut client, "realtime:a", asked(0, 60)).await, "Subscribed to PostgreSQL");
    // The same filters once more are no more work; nor are those that are decided by the relay.
    assert_eq!(ask_for(&mut client, "realtime:b", asked(0, 60)).await, "Subscribed to PostgreSQL");
    let patterns = (0..100).map(|n| format!("v=like.{n}%"));
    assert_eq!(ask_for(&mut client, "realtime:c", patterns).await, "Subscribed to PostgreSQL");
    let answer = ask_for(&mut client, "realtime:d", asked(60, 41)).await;
    assert!(answer.starts_with("FilterLimitReached: one client may have 100 different filters"), "{answer}");
    assert_eq!(ask_for(&mut client, "realtime:e", asked(60, 40)).await, "Subscribed to PostgreSQL");
    // Joining a channel again takes the place of what it had.
    assert_eq!(ask_for(&mut client, "realtime:e", asked(100, 40)).await, "Subscribed to PostgreSQL");
    // Another connection without a subject is another client …
    let mut another = Client::connect(&stage.relay, &anon()).await;
    assert_eq!(ask_for(&mut another, "realtime:a", asked(200, 100)).await, "Subscribed to PostgreSQL");
    // … and all connections of a subject are one, whatever the way.
    let somebody = token("authenticated", Some("somebody"), json!({}));
    let mut first = Client::connect(&stage.relay, &somebody).await;
    assert_eq!(ask_for(&mut first, "realtime:a", asked(300, 100)).await, "Subscribed to PostgreSQL");
    let mut second = Client::connect(&stage.relay, &somebody).await;
    let answer = ask_for(&mut second, "realtime:a", asked(400, 1)).await;
    assert!(answer.starts_with("FilterLimitReached"), "{answer}");
    let path = format!("/realtime/v1/changes?schema=public&table=t&filter=n=gt.500.5&apikey={somebody}");
    let (status, body) = text(stage.relay.address, &path).await;
    assert_eq!(status, 400, "{body}");
    assert!(body.contains("FilterLimitReached"), "{body}");
    // What is left is free again.
    drop(first);
    let mut answer = String::new();
    for _ in 0..200 {
        answer = ask_for(&mut second, "realtime:a", asked(400, 1)).await;
        if answer == "Subscribed to PostgreSQL" {
            break;
        }
    }
    assert_eq!(answer, "Subscribed to PostgreSQL");
}

#[tokio::test(flavor = "multi_thread")]
async fn long_lists_and_long_selections_of_one_client_are_bounded_together() {
    let stage = Stage::new(TABLES).await;
    let mut client = Client::connect(&stage.relay, &anon()).await;
    let lists = |channel: usize| {
        (0..90).map(move |n| {
            let list: Vec<String> =
                (0..100).map(|m| format!("{}", channel * 1_000_000 + n * 1000 + m)).collect();
            format!("id=not.in.({})", list.join(","))
        })
    };
    for channel in 0..2 {
        let answer = ask_for(&mut client, &format!("realtime:{channel}"), lists(channel)).await;
        assert_eq!(answer, "Subscribed to PostgreSQL");
    }
    let answer = ask_for(&mut client, "realtime:2", lists(2)).await;
    assert!(
        answer.starts_with("FilterLimitReached: the filters of one client may have 20000 values"),
        "{answer}"
    );
    // A column that is selected a thousand times is selected once.
    let select = vec!["id"; 30_000];
    let answer = client
        .try_subscribe("realtime:select", json!([{"event": "*", "table": "wide", "select": select}]))
        .await;
    assert_eq!(answer["message"], "Subscribed to PostgreSQL");
    stage.run("insert into wide values (1, 2)").await;
    assert_eq!(client.change().await["record"], json!({"id": 1}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_channel_whose_filter_is_decided_elsewhere_after_its_column_changed_goes_on() {
    let stage = Stage::new(TABLES).await;
    let by = json!([{"event": "*", "schema": "public", "table": "wide", "filter": "a=gt.5"}]);
    let mut client = stage.subscribe(&anon(), by).await;
    stage.run("insert into wide values (1, 6)").await;
    assert_eq!(client.change().await["record"]["id"], 1);
    stage.run("alter table wide alter column a type numeric").await;
    // It is told of the gap, and bound anew.
    loop {
        let frame = client.frame().await;
        if frame[4]["message"] == "Subscribed to PostgreSQL" {
            break;
        }
    }
    stage.run("insert into wide values (2, 5.1), (3, 4.9), (4, 7)").await;
    assert_eq!(client.change().await["record"]["id"], 2);
    assert_eq!(client.change().await["record"]["id"], 4);
}
