//! What may fail between relays: a process that is killed or held, its connection, the database. Nobody stays who is gone, nobody
//! leaves who is there, and no broadcast comes twice or before an earlier one of its sender.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{
    State, apply, heard, know, know_each_other, knows, member, present, relays, say, state, track, untrack,
};
use crate::delivery::crash::{Cluster, reconnected};
use crate::program::cli::{serve, signal};
use crate::support::database::{Database, connect, make_logins};
use crate::support::eventually;
use crate::support::proxy::Proxy;
use crate::support::relay::Relay;
use crate::support::socket::Socket;

/// Ends the connections between relays.
pub const CUT: &str = "select count(pg_terminate_backend(pid)) from pg_stat_activity
                   where datname = current_database() and application_name = 'relay nodes'";

/// A member that tracks this, and knows no other.
async fn tracking(address: &str, key: &str, object: Value) -> Socket {
    let mut socket = member(address, present(key)).await;
    track(&mut socket, object).await;
    socket
}

#[tokio::test(flavor = "multi_thread")]
async fn members_of_a_relay_that_is_killed_leave_once_within_seconds_and_may_come_back() {
    let database = Database::new().await;
    let relay = Relay::start(&database.url).await;
    let mut ann = member(&relay.address.to_string(), present("ann")).await;
    let mut known = State::new();
    for round in 0..2 {
        let (mut child, _log, url) = serve(&["--database-url", &database.url]).await;
        let address = url.trim_start_matches("http://");
        know(&[&relay], 2).await;
        let _ben = tracking(address, "ben", json!({"round": round})).await;
        let _cat = tracking(address, "cat", json!({})).await;
        let both = state(&[("ben", json!({"round": round})), ("cat", json!({}))]);
        knows(&mut ann, &mut known, &both).await;
        child.start_kill().unwrap();
        child.wait().await.unwrap();
        let killed = Instant::now();
        knows(&mut ann, &mut known, &State::new()).await;
        // Three seconds are expected; the rest is for a busy machine.
        assert!(killed.elapsed() < Duration::from_secs(15), "{:?}", killed.elapsed());
        know(&[&relay], 1).await;
        ann.is_quiet().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_connections_between_relays_lose_repeat_and_reorder_nothing_and_nobody_leaves() {
    let database = Database::new().await;
    let relays = relays(&database, 3).await;
    let addresses: Vec<String> = relays.iter().map(|relay| relay.address.to_string()).collect();
    let mut ann = tracking(&addresses[0], "ann", json!({"n": 1})).await;
    let mut ben = tracking(&addresses[1], "ben", json!({"n": 2})).await;
    let mut cat = member(&addresses[2], present("cat")).await;
    let both = state(&[("ann", json!({"n": 1})), ("ben", json!({"n": 2}))]);
    let mut known = State::new();
    knows(&mut cat, &mut known, &both).await;
    for n in 0..300 {
        say(&mut ann, json!({"ann": n})).await;
        say(&mut ben, json!({"ben": n})).await;
        if n % 60 == 30 {
            database.run(CUT).await;
        }
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
    let mut next = [0, 0];
    while next != [300, 300] {
        let frame = cat.message_frame().await;
        // A leave and a join would be one of these.
        assert_eq!(frame[3], "broadcast", "{frame}");
        let content = &frame[4]["payload"];
        for (place, sender) in ["ann", "ben"].into_iter().enumerate() {
            if let Some(n) = content[sender].as_u64() {
                assert_eq!(n, next[place], "from {sender}");
                next[place] += 1;
            }
        }
    }
    know_each_other(&relays.iter().collect::<Vec<_>>()).await;
    untrack(&mut ann).await;
    knows(&mut cat, &mut known, &state(&[("ben", json!({"n": 2}))])).await;
    cat.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_whose_connections_hang_comes_back_with_what_changed_meanwhile() {
    let database = Database::new().await;
    let (proxy, through) = Proxy::to_server(&database.url).await;
    let one = Relay::start(&database.url).await;
    let other = Relay::start(&through).await;
    know_each_other(&[&one, &other]).await;
    let mut ann = tracking(&one.address.to_string(), "ann", json!({"n": 1})).await;
    let mut ben = tracking(&other.address.to_string(), "ben", json!({"n": 2})).await;
    let both = state(&[("ann", json!({"n": 1})), ("ben", json!({"n": 2}))]);
    let (mut anns, mut bens) = (State::new(), State::new());
    knows(&mut ann, &mut anns, &both).await;
    knows(&mut ben, &mut bens, &both).await;
    proxy.hold();
    track(&mut ann, json!({"n": 3})).await;
    track(&mut ben, json!({"n": 4})).await;
    say(&mut ben, json!("held")).await;
    knows(&mut ben, &mut bens, &state(&[("ann", json!({"n": 1})), ("ben", json!({"n": 4}))])).await;
    proxy.release();
    let changed = state(&[("ann", json!({"n": 3})), ("ben", json!({"n": 4}))]);
    knows(&mut ann, &mut anns, &changed).await;
    knows(&mut ben, &mut bens, &changed).await;
    say(&mut ben, json!("after")).await;
    let told = heard(&mut ann, &json!("after")).await;
    assert!(told == [json!("held"), json!("after")] || told == [json!("after")], "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_that_are_gone_are_told_and_the_presence_is_read_anew() {
    let database = Database::new().await;
    let relay = Relay::start(&database.url).await;
    let (child, _log, url) = serve(&["--database-url", &database.url]).await;
    let address = url.trim_start_matches("http://");
    know(&[&relay], 2).await;
    let mut ann = tracking(&relay.address.to_string(), "ann", json!({})).await;
    let mut bea = tracking(&relay.address.to_string(), "bea", json!({})).await;
    let mut cat = member(address, present("cat")).await;
    let mut known = State::new();
    knows(&mut cat, &mut known, &state(&[("ann", json!({})), ("bea", json!({}))])).await;
    signal(&child, "-STOP");
    let before = relay.figure("relay_node_batches_total");
    untrack(&mut ann).await;
    track(&mut bea, json!({"n": 1})).await;
    eventually("it is written", || async {
        (relay.figure("relay_node_batches_total") > before).then_some(())
    })
    .await;
    // As rotation does, later.
    let truncate = "truncate relay.node_log_0, relay.node_log_1, relay.node_log_2";
    eventually("no reader is in the way", || async { database.client.batch_execute(truncate).await.ok() })
        .await;
    signal(&child, "-CONT");
    say(&mut ann, json!("next")).await;
    knows(&mut cat, &mut known, &state(&[("bea", json!({"n": 1}))])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_crash_of_the_database_all_are_there_who_are_there_and_no_others() {
    let cluster = Cluster::start(&[]).await;
    let mut session = connect(&cluster.url).await;
    relay::postgres::install::install(&mut session).await.unwrap();
    make_logins(&session).await;
    let mut relays = Vec::new();
    for _ in 0..2 {
        relays.push(Relay::start(&cluster.url).await);
    }
    know_each_other(&[&relays[0], &relays[1]]).await;
    let [one, other] = [&relays[0], &relays[1]].map(|relay| relay.address.to_string());
    let mut ann = tracking(&one, "ann", json!({"n": 0})).await;
    let mut known = State::new();
    let mut ben = tracking(&other, "ben", json!({"n": 0})).await;
    let mut stays = tracking(&other, "stays", json!({})).await;
    let all = [("ann", json!({"n": 0})), ("ben", json!({"n": 0})), ("stays", json!({}))];
    knows(&mut ann, &mut known, &state(&all)).await;
    for (round, how) in (1..).zip(["kill", "stop"]) {
        cluster.stop(how);
        // While it is away: one changes, one leaves, one comes.
        track(&mut ann, json!({"n": round})).await;
        drop(ben);
        ben = tracking(&other, "ben", json!({"n": round})).await;
        cluster.restart(&[]);
        reconnected(&cluster.url).await;
        let all = [("ann", json!({"n": round})), ("ben", json!({"n": round})), ("stays", json!({}))];
        while known != state(&all) {
            let frame = ann.message_frame().await;
            assert!(frame[4]["leaves"].get("stays").is_none(), "it was there all the time: {frame}");
            apply(&mut known, &frame);
        }
        let mut late = State::new();
        let mut dan = member(&other, present("dan")).await;
        knows(&mut dan, &mut late, &state(&all)).await;
        say(&mut stays, json!(round)).await;
        assert_eq!(heard(&mut ann, &json!(round)).await, [json!(round)]);
    }
}
