//! Presence over sockets: every member has the same state at the end, each change comes once, and the state comes first.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::{VERSIONS, anon, done, join, joined, refused};
use crate::support::dice::Dice;
use crate::support::relay::Relay;
use crate::support::socket::Socket;
use crate::support::stage::Stage;

const TOPIC: &str = "realtime:room";

/// The metas of each key, by their references.
type State = BTreeMap<String, BTreeMap<String, Value>>;

fn present(key: &str) -> Value {
    json!({"presence": {"key": key, "enabled": true}})
}

async fn track(socket: &mut Socket, reference: &str, object: Value) {
    let payload = json!({"type": "presence", "event": "track", "payload": object});
    socket.push(json!("1"), json!(reference), TOPIC, "presence", payload).await;
}

async fn untrack(socket: &mut Socket, reference: &str) {
    let payload = json!({"type": "presence", "event": "untrack"});
    socket.push(json!("1"), json!(reference), TOPIC, "presence", payload).await;
}

/// Tracks and reads the reply.
async fn tracked(socket: &mut Socket, object: Value) {
    track(socket, "t", object).await;
    assert_eq!(socket.frame().await, done(socket, TOPIC, "t"));
}

/// The payload of the next frame, which must be this event.
async fn next(socket: &mut Socket, event: &str) -> Value {
    let frame = socket.message_frame().await;
    assert_eq!((&frame[1], &frame[2], &frame[3]), (&Value::Null, &json!(TOPIC), &json!(event)), "{frame}");
    frame[4].clone()
}

/// What was tracked under each key, without references.
fn brief(state: &Value) -> Value {
    let mut brief = serde_json::Map::new();
    for (key, value) in state.as_object().unwrap() {
        let metas = value["metas"].as_array().unwrap().iter().map(|meta| {
            let mut meta = meta.as_object().unwrap().clone();
            assert!(meta.remove("phx_ref").is_some_and(|reference| reference.is_string()));
            meta.remove("phx_ref_prev");
            Value::Object(meta)
        });
        brief.insert(key.clone(), metas.collect());
    }
    Value::Object(brief)
}

fn briefs(diff: &Value) -> (Value, Value) {
    (brief(&diff["joins"]), brief(&diff["leaves"]))
}

fn put(state: &mut State, metas: &Value) {
    for (key, value) in metas.as_object().unwrap() {
        for meta in value["metas"].as_array().unwrap() {
            let reference = meta["phx_ref"].as_str().unwrap().to_owned();
            let known = state.entry(key.clone()).or_default().insert(reference, meta.clone());
            assert_eq!(known, None, "it came before: {meta}");
        }
    }
}

fn take(state: &mut State, metas: &Value) {
    for (key, value) in metas.as_object().unwrap() {
        for meta in value["metas"].as_array().unwrap() {
            let known = state.get_mut(key).and_then(|metas| metas.remove(meta["phx_ref"].as_str().unwrap()));
            assert!(known.is_some(), "it was not there: {meta}");
            if state[key].is_empty() {
                state.remove(key);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_comes_with_each_join_and_changes_come_to_all_who_asked() {
    let stage = Stage::new("").await;
    for version in VERSIONS {
        let mut ann = joined(&stage.relay, version, TOPIC, present("ann")).await;
        assert_eq!(next(&mut ann, "presence_state").await, json!({}));
        let mut ben = joined(&stage.relay, version, TOPIC, present("ben")).await;
        assert_eq!(next(&mut ben, "presence_state").await, json!({}));
        let mut off = joined(&stage.relay, version, TOPIC, json!({})).await;
        tracked(&mut ann, json!({"n": 1, "deep": {"a": [1.50]}})).await;
        for socket in [&mut ann, &mut ben] {
            let diff = next(socket, "presence_diff").await;
            assert_eq!(briefs(&diff), (json!({"ann": [{"n": 1, "deep": {"a": [1.5]}}]}), json!({})));
        }
        // Not an object, nothing, and an event in capitals.
        track(&mut ben, "2", json!([1])).await;
        let reason = json!({"reason": "Presence track payload must be a map"});
        assert_eq!(ben.frame().await, refused(&ben, TOPIC, "2", reason));
        let payload = json!({"type": "presence", "event": "TRACK"});
        ben.push(json!("1"), json!("3"), TOPIC, "presence", payload).await;
        assert_eq!(ben.frame().await, done(&ben, TOPIC, "3"));
        for socket in [&mut ann, &mut ben] {
            assert_eq!(briefs(&next(socket, "presence_diff").await), (json!({"ben": [{}]}), json!({})));
        }
        let mut cat = joined(&stage.relay, version, TOPIC, present("cat")).await;
        let state = next(&mut cat, "presence_state").await;
        assert_eq!(brief(&state), json!({"ann": [{"n": 1, "deep": {"a": [1.5]}}], "ben": [{}]}));
        untrack(&mut ann, "4").await;
        assert_eq!(ann.frame().await, done(&ann, TOPIC, "4"));
        for socket in [&mut ann, &mut ben, &mut cat] {
            let (joins, leaves) = briefs(&next(socket, "presence_diff").await);
            assert_eq!((joins, &leaves["ann"][0]["n"]), (json!({}), &json!(1)));
        }
        // What changes nothing is told to nobody.
        untrack(&mut ann, "5").await;
        assert_eq!(ann.frame().await, done(&ann, TOPIC, "5"));
        tracked(&mut ben, json!({})).await;
        for socket in [&mut ann, &mut ben, &mut cat, &mut off] {
            socket.is_quiet().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_track_with_presence_off_turns_it_on_and_the_state_comes_first() {
    let stage = Stage::new("").await;
    for version in VERSIONS {
        let mut ann = joined(&stage.relay, version, TOPIC, present("ann")).await;
        next(&mut ann, "presence_state").await;
        tracked(&mut ann, json!({"n": 1})).await;
        next(&mut ann, "presence_diff").await;
        for (key, config) in [("ben", json!({"presence": {"key": "ben", "enabled": false}})), ("", json!({}))]
        {
            let mut late = joined(&stage.relay, version, TOPIC, config).await;
            tracked(&mut late, json!({"n": 2})).await;
            assert_eq!(brief(&next(&mut late, "presence_state").await)["ann"], json!([{"n": 1}]));
            let diff = next(&mut late, "presence_diff").await;
            let (joins, leaves) = briefs(&diff);
            assert_eq!(leaves, json!({}));
            let (found, metas) = joins.as_object().unwrap().iter().next().unwrap();
            assert_eq!((joins.as_object().unwrap().len(), metas), (1, &json!([{"n": 2}])));
            assert!(found == key || (key.is_empty() && found.len() == 36), "{found}");
            assert_eq!(next(&mut ann, "presence_diff").await, diff);
            late.push(json!("1"), json!("l"), TOPIC, "phx_leave", json!({})).await;
            assert_eq!(briefs(&next(&mut ann, "presence_diff").await).1, joins);
        }
        ann.is_quiet().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_track_is_one_diff_that_names_what_it_replaces() {
    let stage = Stage::new("").await;
    for version in VERSIONS {
        let mut ann = joined(&stage.relay, version, TOPIC, present("ann")).await;
        let mut ben = joined(&stage.relay, version, TOPIC, present("ben")).await;
        for socket in [&mut ann, &mut ben] {
            next(socket, "presence_state").await;
        }
        let mut first = Value::Null;
        for n in 0..4 {
            tracked(&mut ann, json!({"n": n})).await;
            let diff = next(&mut ann, "presence_diff").await;
            assert_eq!(next(&mut ben, "presence_diff").await, diff);
            let meta = diff["joins"]["ann"]["metas"][0].clone();
            assert_eq!((&meta["n"], diff["joins"]["ann"]["metas"].as_array().unwrap().len()), (&json!(n), 1));
            if n > 0 {
                assert_eq!(meta["phx_ref_prev"], first["phx_ref"]);
                assert_eq!(diff["leaves"]["ann"]["metas"][0]["phx_ref"], first["phx_ref"]);
                assert_ne!(meta["phx_ref"], first["phx_ref"]);
            }
            first = meta;
        }
        // The same again is no change.
        tracked(&mut ann, json!({"n": 3})).await;
        ann.is_quiet().await;
        ben.is_quiet().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leave_a_rejoin_a_token_and_a_dead_socket_take_the_metas_away_once() {
    let stage = Stage::new("").await;
    for version in VERSIONS {
        let mut watcher = joined(&stage.relay, version, TOPIC, present("watcher")).await;
        next(&mut watcher, "presence_state").await;
        for (n, way) in ["leave", "rejoin", "bad token", "cut", "close"].into_iter().enumerate() {
            let mut ann = joined(&stage.relay, version, TOPIC, present("ann")).await;
            next(&mut ann, "presence_state").await;
            tracked(&mut ann, json!({"n": n})).await;
            let joins = next(&mut watcher, "presence_diff").await["joins"].clone();
            assert_eq!(brief(&joins), json!({"ann": [{"n": n}]}));
            next(&mut ann, "presence_diff").await;
            let mut kept = None;
            match way {
                "leave" => ann.push(json!("1"), json!("2"), TOPIC, "phx_leave", json!({})).await,
                "rejoin" => {
                    ann.join("2", TOPIC, present("ann")).await;
                    assert_eq!(ann.message_frame().await[3], "phx_close");
                    assert_eq!(ann.message_frame().await[3], "phx_reply");
                    assert_eq!(next(&mut ann, "presence_state").await, json!({}));
                    kept = Some(ann);
                }
                "bad token" => {
                    ann.push(json!("1"), json!("2"), TOPIC, "access_token", json!({"access_token": "x"}))
                        .await;
                    assert_eq!(ann.message_frame().await[3], "system");
                    assert_eq!(ann.message_frame().await[3], "phx_close");
                    kept = Some(ann);
                }
                "cut" => drop(ann),
                _ => ann.send(tokio_tungstenite::tungstenite::Message::Close(None)).await,
            }
            let diff = next(&mut watcher, "presence_diff").await;
            assert_eq!((&diff["joins"], &diff["leaves"]), (&json!({}), &joins), "{way}");
            watcher.is_quiet().await;
            if let Some(mut ann) = kept {
                ann.is_quiet().await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_tabs_under_one_key_are_two_metas_and_go_one_by_one() {
    let stage = Stage::new("").await;
    let mut watcher = joined(&stage.relay, "1.0.0", TOPIC, present("watcher")).await;
    next(&mut watcher, "presence_state").await;
    let mut tabs = Vec::new();
    for n in 0..3 {
        let mut tab = joined(&stage.relay, "2.0.0", TOPIC, present("ann")).await;
        next(&mut tab, "presence_state").await;
        tracked(&mut tab, json!({"tab": n})).await;
        assert_eq!(
            briefs(&next(&mut watcher, "presence_diff").await),
            (json!({"ann": [{"tab": n}]}), json!({}))
        );
        tabs.push(tab);
    }
    let late = &mut joined(&stage.relay, "2.0.0", TOPIC, present("late")).await;
    assert_eq!(
        brief(&next(late, "presence_state").await),
        json!({"ann": [{"tab": 0}, {"tab": 1}, {"tab": 2}]})
    );
    drop(tabs.remove(1));
    assert_eq!(briefs(&next(&mut watcher, "presence_diff").await), (json!({}), json!({"ann": [{"tab": 1}]})));
    // Two channels of one socket on two topics are two members.
    drop(tabs);
    let mut gone = BTreeSet::new();
    while gone.len() < 2 {
        let diff = next(&mut watcher, "presence_diff").await;
        assert_eq!(diff["joins"], json!({}));
        for meta in diff["leaves"]["ann"]["metas"].as_array().unwrap() {
            assert!(gone.insert(meta["tab"].as_u64()));
        }
    }
    watcher.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_cannot_choose_its_reference() {
    let stage = Stage::new("").await;
    let mut ann = joined(&stage.relay, "2.0.0", TOPIC, present("ann")).await;
    next(&mut ann, "presence_state").await;
    tracked(&mut ann, json!({"phx_ref": "forged", "phx\u{5f}ref": "again"})).await;
    let diff = next(&mut ann, "presence_diff").await;
    let reference = diff["joins"]["ann"]["metas"][0]["phx_ref"].as_str().unwrap();
    assert!(reference != "forged" && reference != "again");
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_or_too_large_tracks_are_answered_and_the_channel_lives() {
    let stage = Stage::with("", |settings, _| {
        settings.presence_per_second = Some(1);
        settings.presence_bytes = Some(1000);
        settings.topic_presence_bytes = Some(3000);
    })
    .await;
    for version in VERSIONS {
        let mut ann = joined(&stage.relay, version, TOPIC, present("ann")).await;
        next(&mut ann, "presence_state").await;
        track(&mut ann, "large", json!({"x": "x".repeat(1000)})).await;
        let reason = json!({"reason": "Track message size exceeded: 1000 bytes at most"});
        assert_eq!(ann.frame().await, refused(&ann, TOPIC, "large", reason));
        let mut answers = BTreeMap::new();
        for n in 0..100 {
            track(&mut ann, "t", json!({"n": n})).await;
            loop {
                let frame = ann.message_frame().await;
                if frame[3] == "phx_reply" {
                    *answers.entry(frame[4].to_string()).or_insert(0) += 1;
                    break;
                }
            }
        }
        let refusal =
            json!({"status": "error", "response": {"reason": "Client presence rate limit exceeded"}});
        assert!(answers[&refusal.to_string()] >= 30, "{answers:?}");
        assert!(answers[&json!({"status": "ok", "response": {}}).to_string()] >= 59, "{answers:?}");
        // It may always untrack, broadcast and hear.
        untrack(&mut ann, "u").await;
        while ann.message_frame().await[1] != "u" {}
        let mut others = Vec::new();
        let mut full = 0;
        for n in 0..5 {
            let mut other = Socket::open(&stage.relay, version, &anon()).await;
            join(&mut other, TOPIC, json!({})).await;
            track(&mut other, "t", json!({"n": n, "x": "x".repeat(800)})).await;
            full += usize::from(other.message_frame().await[4]["status"] == "error");
            others.push(other);
        }
        assert_eq!(full, 2);
        let payload = json!({"event": "e", "type": "broadcast", "payload": {}});
        others[4].push(json!("1"), Value::Null, TOPIC, "broadcast", payload.clone()).await;
        while ann.message_frame().await[3] != "broadcast" {}
        ann.is_quiet().await;
    }
}

/// Joins and returns the socket with what it knows.
async fn member(relay: &Relay, version: &'static str, key: &str) -> (Socket, State) {
    let mut socket = joined(relay, version, TOPIC, present(key)).await;
    let mut state = State::new();
    put(&mut state, &next(&mut socket, "presence_state").await);
    (socket, state)
}

/// Reads all that has come until now: every join once, every leave of something that is there.
async fn settle(socket: &mut Socket, state: &mut State, until: impl Fn(&State) -> bool) {
    while !until(state) {
        let frame = socket.message_frame().await;
        match frame[3].as_str().unwrap() {
            "presence_diff" => {
                // What replaces a meta comes together with what goes.
                take(state, &frame[4]["leaves"]);
                put(state, &frame[4]["joins"]);
            }
            "phx_reply" => assert_eq!(frame[4]["status"], "ok"),
            other => panic!("{other}: {frame}"),
        }
    }
}

/// Dice that are thrown again with the same RELAY_TEST_SEED.
#[expect(clippy::print_stdout, reason = "the seed with which a failure comes again")]
fn dice() -> Dice {
    let seed = std::env::var("RELAY_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()) * 7919 + 1);
    println!("RELAY_TEST_SEED={seed}");
    Dice(seed)
}

#[tokio::test(flavor = "multi_thread")]
async fn members_that_come_change_and_go_at_random_all_know_the_same_at_the_end() {
    let stage = Stage::new("").await;
    let mut dice = dice();
    let mut members: Vec<(String, Socket, State)> = Vec::new();
    for step in 0..300 {
        let version = VERSIONS[dice.below(2) as usize];
        match dice.below(4) {
            0 if members.len() < 12 => {
                let key = format!("k{}", dice.below(5));
                let (socket, state) = member(&stage.relay, version, &key).await;
                members.push((key, socket, state));
            }
            1 if members.len() > 3 => _ = members.swap_remove(dice.below(members.len() as u64) as usize),
            2 if !members.is_empty() => {
                let at = dice.below(members.len() as u64) as usize;
                untrack(&mut members[at].1, "u").await;
            }
            _ if !members.is_empty() => {
                let at = dice.below(members.len() as u64) as usize;
                track(&mut members[at].1, "t", json!({"step": step})).await;
            }
            _ => {}
        }
    }
    // A last change of each proves that everything before it was told.
    let mut expected = BTreeMap::new();
    for (n, (key, socket, _)) in members.iter_mut().enumerate() {
        track(socket, "last", json!({"last": n})).await;
        expected.entry(key.clone()).or_insert_with(BTreeSet::new).insert(n);
    }
    let is_last = |state: &State| {
        let lasts = |(key, metas): (&String, &BTreeMap<String, Value>)| {
            (key.clone(), metas.values().map(|meta| meta["last"].as_u64().unwrap_or(999) as usize).collect())
        };
        state.iter().map(lasts).collect::<BTreeMap<String, BTreeSet<usize>>>() == expected
    };
    let mut states = Vec::new();
    for (_, socket, state) in &mut members {
        settle(socket, state, is_last).await;
        states.push(references(state));
    }
    states.dedup();
    assert_eq!(states.len(), 1, "members know different states");
}

fn references(state: &State) -> BTreeMap<String, BTreeSet<String>> {
    state.iter().map(|(key, metas)| (key.clone(), metas.keys().cloned().collect())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_of_members_is_told_in_few_messages_with_nothing_missing_or_repeated() {
    const MEMBERS: usize = 200;
    let stage = Stage::new("").await;
    let (mut watcher, mut state) = member(&stage.relay, "2.0.0", "watcher").await;
    let mut members = Vec::new();
    for _ in 0..MEMBERS {
        members.push(Socket::open(&stage.relay, "1.0.0", &anon()).await);
    }
    let (mut messages, started) = (0, std::time::Instant::now());
    for (n, socket) in members.iter_mut().enumerate() {
        socket.join("1", TOPIC, present(&format!("k{n}"))).await;
        track(socket, "t", json!({"n": n})).await;
    }
    while state.len() < MEMBERS {
        let diff = next(&mut watcher, "presence_diff").await;
        assert_eq!(diff["leaves"], json!({}));
        put(&mut state, &diff["joins"]);
        messages += 1;
    }
    // One for each tick, and for each state that was sent at once while the topic was small.
    let max = started.elapsed().as_millis() as usize / 50 + 64 + 2;
    assert!(messages <= max.min(MEMBERS), "{messages}");
    let expected = references(&state);
    for socket in &mut members {
        let mut known = State::new();
        let mut events = Vec::new();
        while references(&known) != expected {
            let frame = socket.message_frame().await;
            events.push(frame[3].as_str().unwrap().to_owned());
            match events.last().unwrap().as_str() {
                "presence_state" => put(&mut known, &frame[4]),
                "presence_diff" => put(&mut known, &frame[4]["joins"]),
                _ => {}
            }
        }
        let mut presence = events.iter().filter(|event| event.starts_with("presence"));
        assert_eq!(presence.next().map(String::as_str), Some("presence_state"), "{events:?}");
        assert_eq!(presence.filter(|event| *event == "presence_state").count(), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_state_comes_whole_in_frames_below_a_mebibyte() {
    let stage = Stage::new("").await;
    const MEMBERS: usize = 24;
    let mut readers = tokio::task::JoinSet::new();
    for n in 0..MEMBERS {
        let mut socket = joined(&stage.relay, VERSIONS[n % 2], TOPIC, json!({})).await;
        track(&mut socket, "t", json!({"n": n, "x": "x".repeat(60_000)})).await;
        assert_eq!(socket.message_frame().await[4]["status"], "ok");
        readers.spawn(async move {
            loop {
                socket.raw().await;
            }
        });
    }
    for version in VERSIONS {
        let mut late = joined(&stage.relay, version, TOPIC, present("late")).await;
        let mut known = State::new();
        while known.len() < MEMBERS {
            let raw = late.raw().await.into_data();
            assert!(raw.len() < 1 << 20, "{}", raw.len());
            let frame: Value = serde_json::from_slice(&raw).unwrap();
            let (event, payload) = match version {
                "1.0.0" => (&frame["event"], &frame["payload"]),
                _ => (&frame[3], &frame[4]),
            };
            if event == "presence_state" {
                assert!(known.is_empty());
                put(&mut known, payload);
            } else {
                put(&mut known, &payload["joins"]);
            }
        }
        late.is_quiet().await;
    }
}
