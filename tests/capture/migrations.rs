//! A migration day: what happens to a watched table is told as a gap where something may be missing, and only there.

use std::fs;
use std::path::Path;
use std::time::Duration;

use futures_util::StreamExt;
use serde_json::{Value, json};

use crate::support::away::Away;
use crate::support::client::Client;
use crate::support::http::{Events, get};
use crate::support::stage::Stage;
use crate::support::{PATIENCE, eventually, token};

const NAME: &str = "5e551011-0000-4000-8000-0000000000da";
/// The row that is written after the statement.
const LAST: i64 = 9;
/// Tables that the statements of the day are about. Each has a row of an earlier day.
const TABLES: &str = "
    create schema s; grant usage on schema s to authenticated;
    create table t (id int primary key, v text, n int); create table u (like t including all);
    create table parted (id int primary key, v text, n int) partition by range (id);
    create table parted_1 partition of parted for values from (0) to (10);
    create table parted_2 partition of parted for values from (10) to (20);
    create table parted_3 partition of parted for values from (20) to (30);
    create table full_one (like t including all); insert into full_one values (30); insert into parted values (10);
    alter table t enable row level security; create policy p on t using (true);
    grant select on t, u, parted to authenticated;
    select relay.watch('t'), relay.watch('u'), relay.watch('parted')";

fn user() -> String {
    token("authenticated", None, json!({}))
}

fn path(table: &str, more: &str) -> String {
    format!("/realtime/v1/changes?table={table}&apikey={}{more}", user())
}

/// What a reader was told: `gap`, `refused`, or else the rows.
#[derive(Debug, Default)]
struct Told {
    rows: Vec<i64>,
    gaps: Vec<String>,
    is_refused: bool,
}

impl Told {
    fn take(&mut self, frame: &Value) {
        let message = frame[4]["message"].as_str().unwrap_or_default();
        match frame[3].as_str() {
            Some("postgres_changes") if frame[4]["data"]["table"] != "marker" => {
                self.rows.extend(frame[4]["data"]["record"]["id"].as_i64());
            }
            Some("system") if message.starts_with("Gap: ") => self.gaps.push(message.to_owned()),
            Some("system") if frame[4]["status"] == "error" => self.is_refused = true,
            _ => {}
        }
    }

    /// The word of the table; a reader who is told of no gap has to have all these rows.
    fn word(&self, rows: &[i64]) -> String {
        match () {
            () if !self.gaps.is_empty() => String::from("gap"),
            () if self.is_refused => String::from("refused"),
            () if self.rows == rows => String::from("no"),
            () => format!("lost: {:?}", self.rows),
        }
    }
}

/// The readers of a table: a socket, a stream, and a session and a poll that are away.
struct Readers<'a> {
    stage: &'a Stage,
    table: &'static str,
    socket: Client,
    stream: Events,
    /// What the socket and the stream were told up to now.
    live: [Told; 2],
    away: Away,
}

impl<'a> Readers<'a> {
    async fn new(stage: &'a Stage, table: &'static str) -> Self {
        let away = Away::from(stage, &user(), table).await;
        let mut socket = Client::connect(&stage.relay, &user()).await;
        socket.subscribe("realtime:marker", json!([{"event": "*", "table": "marker"}])).await;
        socket.subscribe("realtime:day", json!([{"event": "*", "table": table}])).await;
        let stream = Events::open(stage.relay.address, &path(table, ""), Some(&away.cursor)).await;
        Self { stage, table, socket, stream, live: Default::default(), away }
    }

    /// What each was told, in the order of the table's columns.
    async fn told(mut self) -> [Told; 4] {
        [self.of_socket().await, self.of_session().await, self.of_poll().await, self.of_stream().await]
    }

    /// Waits until the live readers have the row: what comes after it does not change how it is told.
    async fn live_readers_have(&mut self, id: i64) {
        while !self.live[0].rows.contains(&id) {
            let frame = self.socket.frame().await;
            self.live[0].take(&frame);
        }
        while !self.live[1].rows.contains(&id) {
            let event = self.stream.next().await.expect("the stream goes on");
            self.live[1].rows.extend(event.data["record"]["id"].as_i64());
        }
    }

    async fn of_socket(&mut self) -> Told {
        let id = self.stage.database.value("insert into marker default values returning id").await;
        let id: i64 = id.parse().unwrap();
        let mut told = std::mem::take(&mut self.live[0]);
        loop {
            let frame = self.socket.frame().await;
            told.take(&frame);
            let data = &frame[4]["data"];
            if data["table"] == "marker" && data["record"]["id"] == id {
                return told;
            }
        }
    }

    async fn of_session(&self) -> Told {
        let mut session = self.away.connect(self.stage).await;
        let (topic, bindings) = self.away.channel();
        session.try_join(&topic, bindings).await.unwrap();
        let mut told = Told::default();
        while !told.is_refused && told.gaps.is_empty() && !told.rows.contains(&LAST) {
            let Some(frame) = session.frame_within(PATIENCE).await else { break };
            told.take(&frame);
        }
        told
    }

    async fn of_poll(&self) -> Told {
        let (mut told, mut since) = (Told::default(), self.away.cursor.clone());
        loop {
            let answer =
                get(self.stage.relay.address, &path(self.table, &format!("&wait=2&since={since}")), "").await;
            match answer.status {
                410 => told.gaps.push(answer.body.to_string()),
                400 => told.is_refused = true,
                _ => {
                    let changes = answer.body["changes"].as_array().unwrap_or_else(|| panic!("{answer:?}"));
                    told.rows.extend(changes.iter().filter_map(|change| change["record"]["id"].as_i64()));
                    since = answer.body["cursor"].as_str().unwrap().to_owned();
                    if !changes.is_empty() && !told.rows.contains(&LAST) {
                        continue;
                    }
                }
            }
            return told;
        }
    }

    async fn of_stream(&mut self) -> Told {
        let mut told = std::mem::take(&mut self.live[1]);
        let next = async {
            while let Some(event) = self.stream.next().await {
                match &*event.name {
                    "change" => told.rows.extend(event.data["record"]["id"].as_i64()),
                    "gap" => told.gaps.push(event.data.to_string()),
                    _ => {}
                }
                if !told.gaps.is_empty() || told.rows.contains(&LAST) {
                    break;
                }
            }
        };
        let _ = tokio::time::timeout(PATIENCE, next).await;
        told
    }
}

/// What readers of the table are told when the statements come between two rows.
async fn told_of(statements: &str) -> [Told; 4] {
    let stage = Stage::new(TABLES).await;
    let table = if statements.contains("parted") { "parted" } else { "t" };
    let mut readers = Readers::new(&stage, table).await;
    stage.run(&format!("insert into {table} values (1)")).await;
    readers.live_readers_have(1).await;
    stage.run(statements).await;
    stage
        .run(&format!(
            "do $$ begin insert into {table} values ({LAST}); exception when undefined_table then null; end $$"
        ))
        .await;
    readers.told().await
}

/// The rows of a table of `LIMITS.md` below a heading: the statements, and a word for each reader.
fn rows_below(heading: &str) -> Vec<(String, Vec<String>)> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/LIMITS.md")).unwrap();
    let (_, below) = text.split_once(heading).unwrap_or_else(|| panic!("no heading {heading}"));
    let below = below.split("\n## ").next().unwrap_or_default();
    let rows = below.lines().filter(|line| line.starts_with("| `"));
    let row = |line: &str| {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        (cells[0].trim_matches('`').to_owned(), cells[1..].iter().map(|cell| (*cell).to_owned()).collect())
    };
    rows.map(row).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_day_is_a_gap_where_the_table_of_limits_says_so_and_nowhere_else() {
    let rows = rows_below("## What is a gap when a table is altered");
    assert!(rows.len() >= 20, "where is the table? {rows:?}");
    let mut wrong: Vec<String> = Vec::new();
    let days = rows.iter().map(|(statements, words)| async move {
        let told = told_of(statements).await;
        let all: &[i64] = if statements.contains("t values (2)") { &[1, 2, LAST] } else { &[1, LAST] };
        let found: Vec<String> = told.iter().map(|told| told.word(all)).collect();
        (found != *words).then(|| format!("{statements}: {found:?}, and not {words:?}: {told:?}"))
    });
    let mut days = futures_util::stream::iter(days).buffered(3);
    while let Some(day) = days.next().await {
        wrong.extend(day);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn triggers_that_are_enabled_again_hear_replication_too() {
    for enable in [
        "alter table t enable trigger all",
        "alter table t enable trigger user",
        "alter table t enable trigger \"00_relay_capture_2_insert\"; alter table t enable trigger user",
    ] {
        let stage = Stage::new(TABLES).await;
        stage.run(&format!("alter table t disable trigger all; {enable}")).await;
        let mut client = Client::connect(&stage.relay, &user()).await;
        client.subscribe("realtime:day", json!([{"event": "*", "table": "t"}])).await;
        stage.run("set session_replication_role = replica; insert into t values (1)").await;
        stage.run("insert into t values (2)").await;
        assert_eq!(client.change().await["record"]["id"], 1, "{enable}");
        assert_eq!(stage.database.value("select bool_and(intact) from relay.watched").await, "t");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_watched_just_now_is_followed_at_once_on_a_quiet_database() {
    let stage = Stage::new(
        "create table t (id int primary key); create materialized view m as select id from t; create unique index on m (id);
         create materialized view k as select id from t; create unique index on k (id); grant select on m, k to authenticated",
    )
    .await;
    // So that the feed has looked at what there is.
    let mut client = stage.join(&user()).await;
    assert_eq!(stage.changes(&mut client).await.len(), 0);
    for view in ["m", "k"] {
        stage.run(&format!("select relay.watch('{view}')")).await;
        let mut stream = Events::try_open(stage.relay.address, &path(view, ""), None)
            .await
            .map_err(|status| format!("{view}: {status:?}"))
            .unwrap();
        let rows = get(stage.relay.address, &path(view, ""), "").await;
        let since = rows.body["cursor"].as_str().unwrap();
        let poll = get(stage.relay.address, &path(view, &format!("&wait=0&since={since}")), "").await;
        assert_eq!(poll.status, 200, "{poll:?}");
        stage
            .run(&format!(
                "insert into t select coalesce(max(id), 0) + 1 from t; select relay.refresh('{view}')"
            ))
            .await;
        assert_eq!(stream.next().await.unwrap().name, "change");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ddl_goes_on_where_what_it_changed_cannot_be_told_and_all_are_told_a_gap() {
    for fault in [
        "alter table relay.known_relations add check (id < 0) not valid",
        "create or replace function relay.note_relation(id int) returns void language plpgsql as 'begin raise exception $x$x$x$; end'",
        "drop function relay.note_relation(int)",
    ] {
        let stage = Stage::new(TABLES).await;
        let mut client = Client::connect(&stage.relay, &user()).await;
        client.subscribe("realtime:day", json!([{"event": "*", "table": "t"}])).await;
        let answer = get(stage.relay.address, &path("u", ""), "").await;
        let since = answer.body["cursor"].as_str().unwrap().to_owned();
        stage.run(fault).await;
        stage.run("create table parted_4 partition of parted for values from (30) to (40)").await;
        loop {
            let frame = client.frame().await;
            if frame[4]["message"].as_str().is_some_and(|message| message.starts_with("Gap: public.t: ")) {
                break;
            }
        }
        let poll = get(stage.relay.address, &path("u", &format!("&since={since}")), "").await;
        assert_eq!(poll.status, 410, "{fault}: {poll:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_that_lost_a_table_is_a_gap_for_a_session_of_it_that_was_away() {
    for taking in [
        "select relay.unwatch('s.x')",
        "drop table s.x",
        "alter table s.x set schema public",
        "select relay.unwatch('s.x'); insert into s.x values (2); select relay.watch('s.x')",
    ] {
        let stage = Stage::new(&format!(
            "{TABLES}; create table s.x (id int primary key); create table s.y (id int primary key);
             grant select on all tables in schema s to authenticated; select relay.watch('s.x'), relay.watch('s.y')"
        ))
        .await;
        let join = async || {
            let mut client =
                Client::at(stage.relay.address, &user(), &format!("&session={NAME}")).await.unwrap();
            client.subscribe("realtime:day", json!([{"event": "*", "schema": "s"}])).await;
            client
        };
        let mut client = join().await;
        stage.run("insert into s.y values (1)").await;
        client.change().await;
        client.push(None, "phoenix", "heartbeat", json!({})).await;
        while client.frame().await[3] != "phx_reply" {}
        drop(client);
        stage.run("insert into s.x values (1)").await;
        stage.run(taking).await;
        stage.run("insert into s.y values (2)").await;
        let mut client = join().await;
        let mut told = Told::default();
        while told.gaps.is_empty() {
            let frame = client.frame_within(Duration::from_secs(10)).await;
            let frame = frame.unwrap_or_else(|| panic!("{taking}: no gap: {told:?}"));
            told.take(&frame);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_event_trigger_what_was_done_is_found_with_the_next_changes() {
    for statements in [
        "alter table t disable trigger user; alter table t enable trigger user",
        "begin; alter table t rename to old; alter table u rename to t; commit",
        "alter table parted detach partition parted_2",
        "drop table parted_2",
        "select relay.unwatch('t'); select relay.watch('t')",
    ] {
        let stage = Stage::new(TABLES).await;
        stage.run("drop event trigger relay_schema_changes").await;
        let table = if statements.contains("parted") { "parted" } else { "t" };
        let mut readers = Readers::new(&stage, table).await;
        stage.run(statements).await;
        stage.run("insert into marker default values").await;
        let polled = async || {
            let told = readers.of_poll().await;
            (told.word(&[]) == "gap").then_some(())
        };
        eventually("a gap for the poll", polled).await;
        assert_eq!(readers.of_stream().await.word(&[]), "gap", "{statements}");
        assert_eq!(readers.of_socket().await.word(&[]), "gap", "{statements}");
        let stage = Stage::new(TABLES).await;
        stage.run("drop event trigger relay_schema_changes; create table parted_4 partition of parted for values from (30) to (40)").await;
        let readers = Readers::new(&stage, "parted").await;
        stage.run("insert into parted values (30)").await;
        let intact = "select count(*) from pg_trigger where tgrelid = 'parted_4'::regclass and tgname like '00_relay_truncate%' and tgenabled = 'A'";
        eventually("a truncate trigger", async || (stage.database.value(intact).await == "1").then_some(()))
            .await;
        stage.run("truncate parted_4").await;
        assert_eq!(readers.of_poll().await.word(&[]), "gap");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_rewritten_through_another_one_is_a_gap_where_it_has_rows() {
    for (open, rewriting, word) in [
        (
            "create table kin (id int primary key, n int); create table t () inherits (kin)",
            "alter table kin alter n type bigint",
            "gap",
        ),
        (
            "create table kin (id int primary key, n int); create table t () inherits (kin)",
            "alter table kin add column r float default random()",
            "gap",
        ),
        (
            "create table kin (id int primary key, n int); create table t () inherits (kin)",
            "alter table only kin alter id set default 1",
            "no",
        ),
        (
            "create type kin as (id int, n int); create table t of kin",
            "alter type kin alter attribute n type text cascade",
            "gap",
        ),
        (
            "create type kin as (id int, n int); create table t of kin",
            "alter type kin add attribute r text cascade",
            "no",
        ),
        (
            "create table kin (id int, n int); create table t (id int, k int)",
            "alter table kin alter n type bigint",
            "no",
        ),
    ] {
        let stage = Stage::new(&format!(
            "{open}; insert into t values (1, 1); grant select on t to authenticated; select relay.watch('t')"
        ))
        .await;
        let mut readers = Readers::new(&stage, "t").await;
        stage.run(rewriting).await;
        stage.run(&format!("insert into t (id) values ({LAST})")).await;
        assert_eq!(readers.of_socket().await.word(&[LAST]), word, "{rewriting}");
        assert_eq!(readers.of_stream().await.word(&[LAST]), word, "{rewriting}");
        assert_eq!(readers.of_poll().await.word(&[LAST]), word, "{rewriting}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rewritten_table_is_told_as_one_gap_and_no_statement_is_refused_for_it() {
    let stage = Stage::new(&format!("{TABLES}; insert into parted values (1), (21)")).await;
    let mut client = Client::connect(&stage.relay, &user()).await;
    client.subscribe("realtime:marker", json!([{"event": "*", "table": "marker"}])).await;
    client.subscribe("realtime:day", json!([{"event": "*", "table": "parted"}])).await;
    stage.run("alter table parted alter v type text using upper(v)").await;
    stage.run("insert into marker default values").await;
    let mut gaps = Vec::new();
    loop {
        let frame = client.frame().await;
        match frame[3].as_str() {
            Some("postgres_changes") => break,
            Some("system") => gaps.push(frame[4]["message"].as_str().unwrap_or_default().to_owned()),
            _ => {}
        }
    }
    assert_eq!(gaps, ["Gap: public.parted: its rows were rewritten as a whole, read its rows again"]);
    // A role that owns the table and nothing else, in any session.
    stage
        .run(
            "create role $DB_owner; grant usage, create on schema public to $DB_owner; alter table t owner to $DB_owner;
             set session_replication_role = replica; set role $DB_owner; alter table t alter v type text using upper(v); reset role;
             set default_transaction_isolation = serializable; alter table t alter v type text using upper(v)",
        )
        .await;
}
