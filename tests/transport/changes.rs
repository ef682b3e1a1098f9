//! Rows, polls and event streams: one cursor, the same rights as on the socket, nothing lost and nothing twice.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::http::{Answer, Events, get};
use crate::support::relay::Relay;
use crate::support::stage::Stage;
use crate::support::{ANN, BOB, eventually, token};

/// `t (id, owner, v, secret)` with "own rows only", of which no role may read `secret`.
async fn stage() -> Stage {
    Stage::new(
        "create table t (id int primary key, owner uuid, v text, secret text); alter table t enable row level security;
         create policy own on t using (owner = auth.uid()); grant select (id, owner, v) on t to authenticated;
         select relay.watch('t')",
    )
    .await
}

fn path(sub: &str, more: &str) -> String {
    format!("/realtime/v1/changes?table=t&apikey={}{more}", token("authenticated", Some(sub), json!({})))
}

async fn ask(stage: &Stage, sub: &str, more: &str) -> Answer {
    get(stage.relay.address, &path(sub, more), "").await
}

async fn write(stage: &Stage, id: i32, owner: &str) {
    stage.run(&format!("insert into t values ({id}, '{owner}', 'v', 'hidden')")).await;
}

/// The rows' ids, and the cursor.
fn told(answer: &Answer) -> (Vec<i64>, String) {
    assert_eq!(answer.status, 200, "{answer:?}");
    let id = |row: &Value| row["id"].as_i64().unwrap();
    let ids = match &answer.body["rows"] {
        Value::Array(rows) => rows.iter().map(id).collect(),
        _ => answer.body["changes"].as_array().unwrap().iter().map(|change| id(&change["record"])).collect(),
    };
    (ids, answer.body["cursor"].as_str().unwrap().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rows_of_now_come_with_the_cursor_after_which_changes_go_on() {
    let stage = stage().await;
    for (id, owner) in [(2, ANN), (1, ANN), (3, BOB)] {
        write(&stage, id, owner).await;
    }
    let answer = ask(&stage, ANN, "").await;
    assert_eq!(
        answer.body["rows"][0],
        json!({"id": 1, "owner": ANN, "v": "v"}),
        "without what may not be read"
    );
    let (rows, cursor) = told(&answer);
    assert_eq!(rows, [1, 2]);
    for (id, owner) in [(4, ANN), (5, BOB), (6, ANN)] {
        write(&stage, id, owner).await;
    }
    let mut seen = Vec::new();
    let mut since = cursor.clone();
    while seen.len() < 2 {
        let (ids, cursor) = told(&ask(&stage, ANN, &format!("&since={since}")).await);
        seen.extend(ids);
        since = cursor;
    }
    assert_eq!(seen, [4, 6]);
    let change = ask(&stage, ANN, &format!("&since={cursor}")).await.body["changes"][0].clone();
    assert_eq!(
        (&change["type"], &change["table"], &change["old_record"]),
        (&json!("INSERT"), &json!("t"), &Value::Null)
    );
    assert_eq!(change["record"], json!({"id": 4, "owner": ANN, "v": "v"}));
    let (rows, _) = told(&ask(&stage, ANN, "&filter=id=gt.3&select=id").await);
    assert_eq!(rows, [4, 6]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poll_waits_for_a_change_and_ends_with_a_cursor_when_none_comes() {
    let stage = stage().await;
    let (_, cursor) = told(&ask(&stage, ANN, "").await);
    let started = Instant::now();
    let (ids, later) = told(&ask(&stage, ANN, &format!("&since={cursor}&wait=1")).await);
    assert_eq!(ids, [0; 0]);
    assert!(started.elapsed() >= Duration::from_secs(1));
    let since = format!("&since={later}&wait=20");
    let (answer, ()) = tokio::join!(ask(&stage, ANN, &since), async {
        eventually("the poll waits", || async {
            stage.relay.metrics().contains("relay_channels_open 1\n").then_some(())
        })
        .await;
        write(&stage, 1, BOB).await;
        write(&stage, 2, ANN).await;
    });
    assert_eq!(told(&answer).0, [2]);
    assert!(started.elapsed() < Duration::from_secs(15), "it is answered at once");
    eventually("the poll leaves nothing behind", || async {
        stage.relay.metrics().contains("relay_channels_open 0\n").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_polls_that_wait_at_one_cursor_cost_one_question_for_each_claims() {
    let stage = Stage::new(
        "do $$ begin execute format('alter database %I set track_functions = pl', current_database()); end $$;
         create function may(owner uuid) returns bool language plpgsql stable as $$ begin return owner = auth.uid(); end $$;
         create table t (id int primary key, owner uuid, v text, secret text); alter table t enable row level security;
         create policy own on t using (may(owner)); grant select on t to authenticated; select relay.watch('t')",
    )
    .await;
    let (_, cursor) = told(&ask(&stage, ANN, "").await);
    let (ann, bob) = (path(ANN, ""), path(BOB, ""));
    let address = stage.relay.address;
    let wait = |path: &str| {
        let path = format!("{path}&since={cursor}&wait=20");
        tokio::spawn(async move { get(address, &path, "").await })
    };
    let anns: Vec<_> = (0..20).map(|_| wait(&ann)).collect();
    let bobs: Vec<_> = (0..20).map(|_| wait(&bob)).collect();
    eventually("all polls wait", || async {
        stage.relay.metrics().contains("relay_channels_open 40\n").then_some(())
    })
    .await;
    stage.run(&format!("insert into t values (1, '{ANN}'); insert into t values (2, '{BOB}')")).await;
    for (polls, id) in [(anns, 1), (bobs, 2)] {
        for poll in polls {
            assert_eq!(told(&poll.await.unwrap()).0, [id]);
        }
    }
    // What a session counted is there for others when it ends.
    let Stage { relay, database, .. } = stage;
    relay.stop().await;
    let count = "select coalesce(sum(calls), 0) from pg_stat_user_functions where funcname = 'may'";
    let calls = eventually("the calls are counted", || async {
        let calls = database.value(count).await;
        (calls != "0").then_some(calls)
    })
    .await;
    assert_eq!(calls, "4", "two rows, for two users, however many wait");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_lost_before_its_first_event_goes_on_where_it_came_from() {
    let stage = stage().await;
    let (_, cursor) = told(&ask(&stage, ANN, "").await);
    write(&stage, 1, ANN).await;
    let events = Events::open(stage.relay.address, &path(ANN, ""), Some(&cursor)).await;
    assert_eq!(events.last, cursor);
    let mut events = Events::open(stage.relay.address, &path(ANN, ""), Some(&events.last)).await;
    assert_eq!(events.next().await.unwrap().data["record"]["id"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parameter_that_is_not_known_is_refused() {
    let stage = stage().await;
    let answer = ask(&stage, ANN, "&filtre=id=eq.7").await;
    assert_eq!(answer.status, 400, "{answer:?}");
    assert!(answer.body["error"].as_str().unwrap().starts_with("filtre: there is no such parameter"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_goes_on_after_its_last_event_on_whichever_relay() {
    let stage = stage().await;
    let mut events = Events::open(stage.relay.address, &path(ANN, ""), None).await;
    write(&stage, 1, ANN).await;
    let first = events.next().await.unwrap();
    assert_eq!((first.name.as_str(), &first.data["record"]["id"]), ("change", &json!(1)));
    assert_eq!(first.data["cursor"], first.id.as_str());
    drop(events);
    write(&stage, 2, ANN).await;
    write(&stage, 3, BOB).await;
    let other = Relay::start(&stage.database.url).await;
    for relay in [&stage.relay, &other] {
        let mut events = Events::open(relay.address, &path(ANN, ""), Some(&first.id)).await;
        assert_eq!(events.next().await.unwrap().data["record"]["id"], 2);
        write(&stage, if std::ptr::eq(relay, &other) { 5 } else { 4 }, ANN).await;
        assert_eq!(events.next().await.unwrap().data["record"]["id"], 4);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_id_of_a_stream_is_never_ahead_of_its_events() {
    const ROWS: i32 = 300;
    let stage = stage().await;
    let relay = Relay::with(&stage.database.url, |settings| settings.keep_alive_ms = Some(1)).await;
    let writer = stage.database.connect().await;
    let mut events = Events::open(relay.address, &path(ANN, ""), None).await;
    let writing = async {
        for id in 1..=ROWS {
            let sql = format!("insert into t values ({id}, '{ANN}'); insert into t values (-{id}, '{BOB}')");
            writer.batch_execute(&sql).await.unwrap();
        }
    };
    let reading = async {
        let mut seen = Vec::new();
        let mut quiet = 0;
        while seen.len() < ROWS as usize {
            let last = events.last.clone();
            match events.step().await.unwrap() {
                Some(event) => seen.push(event.data["record"]["id"].as_i64().unwrap() as i32),
                // It is lost as soon as it said where it stands without an event.
                None if events.last != last => {
                    quiet += 1;
                    let last = events.last.clone();
                    events = Events::open(relay.address, &path(ANN, ""), Some(&last)).await;
                }
                None => {}
            }
        }
        assert!(quiet > 0);
        assert_eq!(seen, (1..=ROWS).collect::<Vec<_>>());
    };
    let both = async { tokio::join!(writing, reading) };
    tokio::time::timeout(crate::support::PATIENCE, both).await.expect("rows are missing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_of_thousands_of_rows_comes_in_answers_of_bounded_size() {
    let stage = stage().await;
    let (_, mut cursor) = told(&ask(&stage, ANN, "").await);
    stage
        .run(&format!(
            "insert into t select n, '{ANN}', repeat('x', 200), '' from generate_series(1, 20000) n"
        ))
        .await;
    let mut seen = Vec::new();
    while seen.len() < 20_000 {
        let answer = ask(&stage, ANN, &format!("&since={cursor}")).await;
        let size = answer.body.to_string().len();
        assert!(size < 3 << 20, "{size} bytes in one answer");
        let (ids, later) = told(&answer);
        seen.extend(ids);
        cursor = later;
    }
    assert_eq!(seen, (1..=20_000).collect::<Vec<i64>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_told_with_what_to_do() {
    let stage = stage().await;
    let (_, cursor) = told(&ask(&stage, ANN, "").await);
    let other = Stage::new(
        "create table t (id int primary key); grant select on t to authenticated; select relay.watch('t')",
    )
    .await;
    let (_, foreign) = told(&ask(&other, ANN, "").await);
    for (more, status, text) in [
        (String::from("&since=!"), 400, "since: the cursor is malformed"),
        (format!("&since={foreign}"), 410, "Gap: the cursor is of another database"),
        (format!("&since={cursor}&wait=soon"), 400, "wait: seconds are expected, at most 55"),
        (
            String::from("&filter=secret=eq.x"),
            400,
            "filter: public.t has no column secret that the role authenticated may read",
        ),
        (String::from("&filter=id=like"), 400, "A filter is column=op.value, such as id=gt.7"),
        (String::from("&schema=nowhere"), 400, "grant select on nowhere.t to authenticated"),
    ] {
        let answer = ask(&stage, ANN, &more).await;
        let told = answer.body["error"].as_str().unwrap_or_default();
        assert!(answer.status == status && told.contains(text), "{more}: {answer:?}");
    }
    let address = stage.relay.address;
    let bare = get(address, "/realtime/v1/changes?table=t", "").await;
    let told = bare.body["error"].as_str().unwrap_or_default();
    assert!(bare.status == 401 && told.contains("Authorization: Bearer"), "{bare:?}");
    assert_eq!(get(address, &path(ANN, "").replace("table=t", "table="), "").await.status, 400);
    let bearer = format!("authorization: Bearer {}\r\n", token("authenticated", Some(ANN), json!({})));
    assert_eq!(get(address, "/realtime/v1/changes?table=t", &bearer).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cursor_of_a_moment_that_has_not_been_is_a_gap() {
    let stage = stage().await;
    let (_, cursor) = told(&ask(&stage, ANN, "").await);
    let cursor: relay::model::log::cursor::Cursor = cursor.parse().unwrap();
    let later = relay::model::log::cursor::Snapshot::new(cursor.seen().xmax() + 1_000_000, vec![]).unwrap();
    let future = relay::model::log::cursor::Cursor::after(cursor.epoch(), later);
    let answer = ask(&stage, ANN, &format!("&since={future}")).await;
    assert_eq!(answer.status, 410, "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn more_rows_than_may_be_told_at_once_are_refused_with_advice() {
    let sql =
        "create table t (id int primary key); grant select on t to authenticated; select relay.watch('t');
               insert into t select generate_series(1, 6)";
    let stage = Stage::with(sql, |settings, _| settings.most_rows = Some(5)).await;
    let answer = ask(&stage, ANN, "").await;
    assert_eq!(answer.status, 413, "{answer:?}");
    assert_eq!(told(&ask(&stage, ANN, "&filter=id=gt.1").await).0, [2, 3, 4, 5, 6]);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_more_bytes_than_may_be_told_at_once_are_refused_with_advice() {
    let sql = "create table t (id int primary key, v text); grant select on t to authenticated; select relay.watch('t');
               insert into t select n, repeat('x', 1000) from generate_series(1, 250) n";
    let stage = Stage::with(sql, |settings, _| settings.most_row_bytes = Some(230_000)).await;
    let answer = ask(&stage, ANN, "").await;
    assert_eq!(answer.status, 413, "{answer:?}");
    assert!(answer.body["error"].as_str().unwrap().contains("--most-row-bytes"), "{answer:?}");
    // More than are asked for at a time, and all of them.
    assert_eq!(told(&ask(&stage, ANN, "&filter=id=gt.30").await).0, (31..=250).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_are_those_whose_changes_are_told_and_not_those_of_tables_that_inherit() {
    let stage = Stage::new(
        "create table t (id int primary key); create table child (more text) inherits (t); create table grandchild () inherits (child);
         insert into t values (1); insert into child values (2, 'x'); insert into grandchild values (3, 'x');
         create table p (id int primary key) partition by list (id); create table p1 partition of p for values in (1); insert into p values (1);
         grant select on t, p to authenticated; select relay.watch('t'), relay.watch('p')",
    )
    .await;
    for table in ["t", "p"] {
        let answer = get(
            stage.relay.address,
            &format!(
                "/realtime/v1/changes?table={table}&apikey={}",
                token("authenticated", Some(ANN), json!({}))
            ),
            "",
        )
        .await;
        assert_eq!(answer.body["rows"], json!([{"id": 1}]), "{table}");
    }
}

/// The ids that polls tell, each time with whether there is more, until there is not.
async fn told_in_turn(stage: &Stage, sub: &str, since: &str) -> Vec<(usize, bool)> {
    let (mut told, mut since) = (Vec::new(), since.to_owned());
    // An answer says that there is more, too, when that could not be found out within 2 seconds.
    let mut is_unsure = false;
    loop {
        let started = Instant::now();
        let answer = ask(stage, sub, &format!("&wait=20&since={since}")).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let more =
            answer.body["more"].as_bool().unwrap_or_else(|| panic!("more is missing: {}", answer.head));
        since = answer.body["cursor"].as_str().unwrap().to_owned();
        let count = answer.body["changes"].as_array().unwrap().len();
        let is_late = started.elapsed() >= Duration::from_secs(15);
        assert!(is_unsure || count > 0 && !is_late, "{told:?} were told, then {count}");
        is_unsure = started.elapsed() >= Duration::from_secs(2);
        told.push((count, more));
        if !more {
            return told;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_answer_says_whether_there_is_more_and_is_right() {
    let stage = stage().await;
    let rows = ask(&stage, ANN, "").await;
    assert_eq!(rows.body["more"], false, "{rows:?}");
    let (_, cursor) = told(&rows);
    let empty = ask(&stage, ANN, &format!("&since={cursor}&wait=0")).await;
    assert_eq!((&empty.body["changes"], &empty.body["more"]), (&json!([]), &json!(false)), "{empty:?}");
    let mut total = 0;
    for (what, sql, count) in [
        ("one change", "insert into t select i, 'ANN' from generate_series(1, 1) i", 1),
        ("a few parts", "insert into t select i, 'ANN' from generate_series(10, 909) i", 900),
        (
            "ends with what is hidden",
            "insert into t select i, case when i < 1300 then 'ANN' else 'BOB' end::uuid from generate_series(1001, 2500) i",
            299,
        ),
        (
            "begins with what is hidden",
            "insert into t select i, case when i > 4490 then 'ANN' else 'BOB' end::uuid from generate_series(3001, 4500) i",
            10,
        ),
        (
            "large rows",
            "insert into t select i, 'ANN', repeat('x', 20000) from generate_series(5001, 5100) i",
            100,
        ),
        (
            "larger than what every poll waits for",
            "insert into t select i, case when i < 8000 then 'ANN' else 'BOB' end::uuid from generate_series(6001, 13000) i",
            1999,
        ),
    ] {
        // A poll that waits, and those that come after it.
        let here = stage.database.value("select relay.cursor()").await;
        let (waited, ()) = tokio::join!(told_in_turn(&stage, ANN, &here), async {
            eventually("the poll waits", || async {
                stage.relay.metrics().contains("relay_channels_open 1\n").then_some(())
            })
            .await;
            stage.run(&sql.replace("ANN", ANN).replace("BOB", BOB)).await;
        });
        total += count;
        assert_eq!(waited.iter().map(|(count, _)| count).sum::<usize>(), count, "{what}: {waited:?}");
        // Those who come later, from where it was and from the beginning.
        for (since, count) in [(&here, count), (&cursor, total)] {
            let later = told_in_turn(&stage, ANN, since).await;
            assert_eq!(later.iter().map(|(count, _)| count).sum::<usize>(), count, "{what}: {later:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_ends_with_its_token_says_so_under_a_name_that_eventsource_does_not_have() {
    let stage = stage().await;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let short = token("authenticated", Some(ANN), json!({"exp": now + 2}));
    let path = format!("/realtime/v1/changes?table=t&apikey={short}");
    let mut events = Events::open(stage.relay.address, &path, None).await;
    let end = events.next().await.unwrap();
    assert_eq!((end.name.as_str(), end.data), ("failure", json!({"error": "the token has expired"})));
    assert_eq!(events.next().await, None);
}
