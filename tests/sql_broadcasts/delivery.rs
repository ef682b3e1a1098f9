//! Who gets a broadcast from SQL: the members of its topic, once, in the order of commits and of writes, whoever inserts it.

use std::fmt::Write;

use relay::model::log::cursor::Cursor;
use relay::postgres::install::install;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use super::{SUPABASE, VERSIONS, anon, events, heard, join, member};
use crate::support::PATIENCE;
use crate::support::database::{Database, connect, with_login};
use crate::support::relay::Relay;
use crate::support::socket::Socket;
use crate::support::stage::Stage;

#[tokio::test(flavor = "multi_thread")]
async fn a_send_reaches_the_members_of_its_topic_in_the_form_of_each_version() {
    let stage = Stage::new("").await;
    for version in VERSIONS {
        let mut room = member(&stage.relay, version, "room").await;
        let mut other = member(&stage.relay, version, "other").await;
        stage.run(r#"select realtime.send('{"b": 1.50, "a": "é\"", "n": 12345678901234567890}', 'sent', 'room', false)"#).await;
        let id =
            stage.database.value("select id from realtime.messages order by inserted_at desc limit 1").await;
        let (topic, event, payload, meta) = heard(&mut room).await;
        assert_eq!((topic.as_str(), event.as_str()), ("realtime:room", "sent"));
        assert_eq!(payload, json!({"a": "é\"", "b": 1.50, "n": 12345678901234567890_u64, "id": id}));
        assert_eq!(meta, json!({"id": id}));
        // Anything that the payload may be.
        stage
            .run(
                "insert into realtime.messages (topic, extension, event, payload) values
                 ('room', 'broadcast', 'one', '[1, null]'), ('room', 'broadcast', 'two', '\"x\"'), ('room', 'broadcast', null, null)",
            )
            .await;
        for (event, payload) in [("one", json!([1, null])), ("two", json!("x")), ("", Value::Null)] {
            let found = heard(&mut room).await;
            assert_eq!((found.1.as_str(), found.2), (event, payload));
        }
        assert_eq!(events(&stage, &mut other, "other").await, [""; 0]);
        assert_eq!(events(&stage, &mut room, "room").await, [""; 0], "each once");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_reach_version_2_and_are_left_out_for_version_1() {
    let stage = Stage::new("").await;
    let mut older = member(&stage.relay, VERSIONS[0], "room").await;
    let mut newer = member(&stage.relay, VERSIONS[1], "room").await;
    stage
        .run(r"set bytea_output = 'escape'; select realtime.send_binary('\x00ff7e', 'raw', 'room', false)")
        .await;
    let (topic, event, payload, meta) = heard(&mut newer).await;
    assert_eq!((topic.as_str(), event.as_str()), ("realtime:room", "raw"));
    assert_eq!(payload, json!({"bytes": [0, 255, 126]}));
    assert!(meta["id"].is_string());
    assert_eq!(events(&stage, &mut older, "room").await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_inserted_rows_of_the_extension_broadcast_are_sent() {
    let stage = Stage::new("").await;
    let mut room = member(&stage.relay, "2.0.0", "room").await;
    stage
        .run(
            "insert into realtime.messages (topic, extension, event, payload) values ('room', 'presence', 'no', '{}');
             insert into realtime.messages (topic, extension, event, payload) values ('room', 'broadcast', 'yes', '{}');
             update realtime.messages set event = 'changed';
             delete from realtime.messages",
        )
        .await;
    stage.run("begin; select realtime.send('{}', 'rolled back', 'room', false); rollback").await;
    stage
        .run(
            "do $$ begin
               perform realtime.send('{}', 'before', 'room', false);
               begin
                 perform realtime.send('{}', 'undone', 'room', false);
                 raise exception 'undo';
               exception when others then
                 perform realtime.send('{}', 'after', 'room', false);
               end;
             end $$",
        )
        .await;
    assert_eq!(events(&stage, &mut room, "room").await, ["yes", "before", "after"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_of_any_writer_is_sent() {
    let stage = Stage::new(
        "create role $DB_app; create role $DB_owner;
         grant usage on schema realtime to $DB_app; grant insert on realtime.messages to $DB_app;
         create policy app on realtime.messages for insert to $DB_app with check (true);
         create schema evil;
         create table evil.log_0 (number bigint, xid xid8, at timestamptz, kind text, before json, after json);
         create table evil.new_messages (extension text);
         create function evil.image(anyelement) returns json language sql as $$ select '{}'::json $$;
         create function evil.octet_length(text) returns int language sql as $$ select 1 / 0 $$;
         create function evil.equal(text, text) returns bool language sql as $$ select false $$;
         create operator evil.= (leftarg = text, rightarg = text, function = evil.equal);
         grant usage on schema evil to $DB_app; grant all on all tables in schema evil to $DB_app;
         create table todos (id int); grant insert on todos to $DB_app;
         create function told() returns trigger language plpgsql security definer as $f$ begin
           perform realtime.broadcast_changes('todos', 'told', tg_op, tg_table_name, tg_table_schema, new, old);
           perform realtime.send(to_jsonb(new), 'from a trigger', 'room', false);
           return null;
         end $f$;
         create trigger told after insert on todos for each row execute function told();",
    )
    .await;
    let mut room = member(&stage.relay, "1.0.0", "room").await;
    stage
        .run(
            "set role $DB_app;
             insert into realtime.messages (topic, extension, event, payload) values ('room', 'broadcast', 'plain', '{}');
             select realtime.send('{}', 'by function', 'room', false);
             set search_path = evil, pg_catalog; create temp table new_messages (extension text); create temp table log_0 (x int);
             insert into realtime.messages (topic, extension, event, payload) values ('room', 'broadcast', 'hostile path', '{}');
             reset search_path;
             insert into todos values (1);
             reset role;
             set session_replication_role = replica;
             insert into realtime.messages (topic, extension, event, payload) values ('room', 'broadcast', 'replica', '{}');
             reset session_replication_role;
             set datestyle = 'German'; set timezone = 'Asia/Tokyo'; set bytea_output = 'escape'; set default_transaction_isolation = 'serializable';
             insert into realtime.messages (topic, extension, event, payload)
             select 'room', 'broadcast', 'selected ' || n, '{}' from generate_series(1, 2) n;
             reset all",
        )
        .await;
    let copy = "copy realtime.messages (topic, extension, event, payload, private) from stdin";
    let mut sink = Box::pin(stage.database.client.copy_in::<_, &[u8]>(copy).await.unwrap());
    futures_util::SinkExt::send(&mut sink, &b"room\tbroadcast\tcopied\t{}\tf\n"[..]).await.unwrap();
    sink.as_mut().finish().await.unwrap();
    let expected = [
        "plain",
        "by function",
        "hostile path",
        "from a trigger",
        "replica",
        "selected 1",
        "selected 2",
        "copied",
    ];
    assert_eq!(events(&stage, &mut room, "room").await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_goes_on_when_its_broadcast_cannot_be_logged() {
    let stage = Stage::new("").await;
    let mut room = member(&stage.relay, "2.0.0", "room").await;
    let (writer, mut warnings) = stage.database.warned().await;
    stage.run("alter table relay.log_0 add constraint broken check (kind not like 'M%') not valid").await;
    let insert = "insert into realtime.messages (topic, extension, event, payload) values ('room', 'broadcast', 'lost', '{}')";
    writer
        .batch_execute(&format!(
            "begin; create table kept (id int); {insert}; insert into kept values (1); commit"
        ))
        .await
        .unwrap();
    assert!(warnings.recv().await.unwrap().starts_with("broadcast not sent: "));
    assert_eq!(stage.database.value("select count(*) from kept").await, "1");
    stage.run("alter table relay.log_0 drop constraint broken").await;
    assert_eq!(events(&stage, &mut room, "room").await, [""; 0]);
    assert_eq!(
        stage.database.value("select count(*) from realtime.messages where event = 'lost'").await,
        "1",
        "it is stored"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_channel_gets_rows_and_broadcasts_of_a_transaction_in_the_order_of_their_writes() {
    let stage =
        Stage::new("create table t (id int); grant select on t to anon; select relay.watch('t')").await;
    for version in VERSIONS {
        let mut socket = Socket::open(&stage.relay, version, &anon()).await;
        let bindings = json!([{"event": "*", "schema": "public", "table": "t"}]);
        join(&mut socket, "room", json!({ "postgres_changes": bindings })).await;
        assert_eq!(socket.message_frame().await[4]["message"], "Subscribed to PostgreSQL");
        let mut expected = Vec::new();
        let mut script = String::from("begin;");
        for n in 0..200 {
            let _ = write!(script, "insert into t values ({n});");
            expected.push(format!("row {n}"));
            if n % 3 == 0 {
                let _ = write!(script, "select realtime.send('{{}}', 'event {n}', 'room', false);");
                expected.push(format!("event {n}"));
            }
        }
        stage.run(&(script + "commit; truncate t")).await;
        let mut found = Vec::new();
        while found.len() < expected.len() {
            found.push(match socket.raw().await {
                Message::Binary(bytes) => {
                    String::from_utf8_lossy(&bytes[18..18 + usize::from(bytes[2])]).into_owned()
                }
                text => {
                    let frame: Value = serde_json::from_str(text.to_text().unwrap()).unwrap();
                    let payload = frame.get("payload").unwrap_or(&frame[4]);
                    match payload["data"]["record"]["id"].as_i64() {
                        Some(id) => format!("row {id}"),
                        None => payload["event"].as_str().unwrap_or_else(|| panic!("{frame}")).to_owned(),
                    }
                }
            });
        }
        assert_eq!(found, expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_of_two_relays_delivers_once_to_its_own_members() {
    let stage = Stage::new("").await;
    let second = Relay::start(&stage.database.url).await;
    let mut members = Vec::new();
    for relay in [&stage.relay, &second, &second] {
        members.push(member(relay, "2.0.0", "room").await);
    }
    stage.run("select realtime.send('{}', 'n' || n, 'room', false) from generate_series(1, 50) n").await;
    let expected: Vec<String> = (1..=50).map(|n| format!("n{n}")).collect();
    for socket in &mut members {
        for event in &expected {
            assert_eq!(&heard(socket).await.1, event);
        }
    }
    stage.run("select realtime.send('{}', 'last', 'room', false)").await;
    for socket in &mut members {
        assert_eq!(heard(socket).await.1, "last", "nothing came twice");
    }
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_of_ten_thousand_arrives_whole_and_in_order() {
    let stage = Stage::new("").await;
    let mut room = member(&stage.relay, "2.0.0", "room").await;
    let mut quiet = member(&stage.relay, "2.0.0", "quiet").await;
    let insert = "insert into realtime.messages (topic, extension, event, payload)
                  select case n when 5000 then 'quiet' else 'room' end, 'broadcast', n::text, to_jsonb(repeat('x', 200))
                  from generate_series(1, 10000) n";
    let writing = stage.run(insert);
    let reading = async {
        for n in (1..=10_000).filter(|n| *n != 5000) {
            assert_eq!(heard(&mut room).await.1, n.to_string());
        }
    };
    tokio::join!(writing, reading);
    assert_eq!(heard(&mut quiet).await.1, "5000");
    assert_eq!(events(&stage, &mut room, "room").await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_broadcast_is_delivered_and_one_over_the_limit_hurts_nobody() {
    let stage = Stage::new("").await;
    let mut older = member(&stage.relay, "1.0.0", "room").await;
    let mut newer = member(&stage.relay, "2.0.0", "room").await;
    let insert = |event: &str, bytes: usize| {
        format!(
            "insert into realtime.messages (topic, extension, event, payload)
             values ('room', 'broadcast', '{event}', to_jsonb(repeat('x', {bytes} - 2)))"
        )
    };
    let binary = |event: &str, bytes: usize| {
        format!("select realtime.send_binary(decode(repeat('7f', {bytes}), 'hex'), '{event}', 'room', false)")
    };
    let writing = async {
        for (event, bytes) in [("legal", 3_000_000), ("too large", 3_000_501), ("huge", 20_000_000)] {
            stage.run(&insert(event, bytes)).await;
        }
        stage.run(&binary("bytes", 3_000_000)).await;
        stage.run(&binary("too large", 3_000_501)).await;
        // At once, more than may wait for a client.
        stage
            .run(&format!(
                "{}; {}; {}",
                insert("one", 2_000_000),
                insert("two", 2_000_000),
                insert("small", 1_000_000)
            ))
            .await;
    };
    let reading = async {
        let mut found = Vec::new();
        while found.len() < 5 {
            let Message::Binary(bytes) = newer.raw().await else { panic!("not binary") };
            let &[4, topic, event, meta, _, ref rest @ ..] = &*bytes else { panic!("{bytes:?}") };
            let (topic, event, meta) = (usize::from(topic), usize::from(event), usize::from(meta));
            let name = String::from_utf8(rest[topic..topic + event].to_vec()).unwrap();
            found.push((name, rest.len() - topic - event - meta));
        }
        found
    };
    let ((), found) = tokio::join!(writing, reading);
    let expected = [
        ("legal", 3_000_000),
        ("bytes", 3_000_000),
        ("one", 2_000_000),
        ("two", 2_000_000),
        ("small", 1_000_000),
    ];
    assert_eq!(found, expected.map(|(event, bytes)| (event.to_owned(), bytes)));
    for _ in 0..3 {
        let told = older.message_frame().await;
        let text = told[4]["message"].as_str().unwrap();
        assert!(text.starts_with("Broadcast not delivered: its frame has"), "{told}");
    }
    assert_eq!(heard(&mut older).await.1, "small");
    assert_eq!(stage.database.value("select count(*) from realtime.messages").await, "8", "all are stored");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_is_its_name_whatever_the_characters() {
    let stage = Stage::new("").await;
    let long = "é".repeat(200);
    let names = [
        "a b",
        "quo\"te'",
        "back\\slash",
        "realtime:x",
        "*",
        "%",
        "{\"a\":1}",
        "日本\u{1F600}",
        "a,b;c",
        "\t",
        "UPPER",
        "upper",
        &long,
    ];
    let mut members = Vec::new();
    for name in names {
        for version in VERSIONS {
            members.push((name, member(&stage.relay, version, name).await));
        }
    }
    for name in names {
        let send = "select realtime.send('{}', $1, $1, false)";
        stage.database.client.execute(send, &[&name]).await.unwrap();
    }
    stage.run("select realtime.send('{}', 'end', topic, false) from realtime.messages").await;
    for (name, socket) in &mut members {
        for expected in [name, "end"] {
            let (topic, event, ..) = heard(socket).await;
            assert_eq!((topic, event.as_str()), (format!("realtime:{name}"), expected));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_broadcast_reaches_no_public_channel_of_the_name() {
    let stage = Stage::new("").await;
    for version in VERSIONS {
        let mut public = member(&stage.relay, version, "room").await;
        stage
            .run(
                "select realtime.send('{}', 'private', 'room');
                 select realtime.send('{}', 'private', 'room', true);
                 insert into realtime.messages (topic, extension, event, payload, private) values ('room', 'broadcast', 'private', '{}', true);
                 select realtime.broadcast_changes('room', 'private', 'INSERT', 't', 's', null::record, null::record);
                 select realtime.send('{}', 'public', 'room', false);
                 insert into realtime.messages (topic, extension, event, payload, private) values ('room', 'broadcast', 'undecided', '{}', null)",
            )
            .await;
        assert_eq!(events(&stage, &mut public, "room").await, ["public", "undecided"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_hears_what_is_sent_once_its_join_is_answered_and_nothing_after_it_has_left() {
    let stage = Stage::new("").await;
    let mut witness = member(&stage.relay, "1.0.0", "room").await;
    let mut socket = Socket::open(&stage.relay, "2.0.0", &anon()).await;
    for n in 0..20 {
        join(&mut socket, "room", json!({})).await;
        stage.run(&format!("select realtime.send('{{}}', 'n{n}', 'room', false)")).await;
        assert_eq!(heard(&mut socket).await.1, format!("n{n}"));
        if n % 2 == 0 {
            socket.push(json!("1"), json!("2"), "realtime:room", "phx_leave", json!({})).await;
            assert_eq!(socket.message_frame().await[4]["status"], "ok");
            assert_eq!(socket.message_frame().await[3], "phx_close");
            stage.run("select realtime.send('{}', 'nobody', 'room', false)").await;
            while heard(&mut witness).await.1 != "nobody" {}
        } else {
            // Joins the topic again: the channel of before ends.
            socket.join("1", "realtime:room", json!({})).await;
            let frames = [socket.message_frame().await, socket.message_frame().await];
            assert_eq!((&frames[0][3], &frames[1][3]), (&json!("phx_close"), &json!("phx_reply")));
            stage.run("select realtime.send('{}', 'again', 'room', false)").await;
            assert_eq!(heard(&mut socket).await.1, "again", "and once");
            socket.push(json!("1"), json!("2"), "realtime:room", "phx_leave", json!({})).await;
            socket.message_frame().await;
            socket.message_frame().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_as_supabase_has_it_is_heard_without_being_changed() {
    let database = Database::bare().await;
    Database::new().await;
    let (_, name) = database.url.rsplit_once('/').unwrap();
    database.run(&SUPABASE.replace("$DB", name)).await;
    database
        .run(&format!(
            "alter role {name}_app login;
             create policy all_topics on realtime.messages for insert to {name}_app with check (true)"
        ))
        .await;
    install(&mut database.connect().await).await.unwrap();
    let relay = Relay::start(&database.url).await;
    let mut room = member(&relay, "2.0.0", "room").await;
    let app = connect(&with_login(&database.url, &format!("{name}_app"))).await;
    app.batch_execute("select realtime.send('{\"a\": 1}', 'theirs', 'room', false)").await.unwrap();
    let (_, event, payload, meta) = heard(&mut room).await;
    assert_eq!((event.as_str(), payload), ("theirs", json!({"a": 1})));
    assert_eq!(meta["id"], database.value("select id from realtime.messages").await);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_named_session_that_was_cut_gets_the_broadcasts_that_it_missed_before_new_ones() {
    let stage = Stage::new("").await;
    let path = format!(
        "/realtime/v1/websocket?apikey={}&vsn=1.0.0&session=5e551011-0000-4000-8000-0000000000bc",
        anon()
    );
    let mut found = Vec::new();
    for round in 0..4 {
        let mut socket = Socket::handshake(&stage.relay, &path, &[]).await.unwrap();
        join(&mut socket, "room", json!({})).await;
        let live = format!("live {round}");
        stage.run(&format!("select realtime.send('{{}}', '{live}', 'room', false)")).await;
        while found.last() != Some(&live) {
            found.push(heard(&mut socket).await.1);
        }
        acknowledged(&stage, &mut socket).await;
        drop(socket);
        let missed = format!(
            "select realtime.send('{{}}', 'missed {round} ' || n, 'room', false) from generate_series(1, 3) n"
        );
        stage.run(&missed).await;
    }
    let expected: Vec<String> = (0..4)
        .flat_map(|round| {
            let missed = (1..=3).filter(move |_| round > 0).map(move |n| format!("missed {} {n}", round - 1));
            missed.chain([format!("live {round}")])
        })
        .collect();
    assert_eq!(found, expected);
}

/// Waits until the bookmark says that the last broadcast was received.
async fn acknowledged(stage: &Stage, socket: &mut Socket) {
    let last = "select xid::text || ' ' || number from relay.changes where operation = 'M' order by number desc limit 1";
    let last = stage.database.value(last).await;
    let (xid, number) = last.split_once(' ').unwrap();
    let (xid, number) = (xid.parse().unwrap(), number.parse().unwrap());
    let started = std::time::Instant::now();
    loop {
        let bookmark = stage.database.value("select cursor from relay.bookmarks").await;
        if bookmark.parse::<Cursor>().unwrap().has(xid, number) {
            return;
        }
        assert!(started.elapsed() < PATIENCE, "the bookmark does not move");
        // The pong is sent when the client reads.
        socket.is_quiet().await;
    }
}
