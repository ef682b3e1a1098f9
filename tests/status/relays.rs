//! Several relays: the last connection anywhere decides, and the users of a relay that was killed go offline.

use std::net::SocketAddr;
use std::time::Instant;

use super::{becomes, id, is_online, of, settled, socket, stage, writes};
use crate::program::cli::serve;
use crate::support::client::Client;
use crate::support::eventually;
use crate::support::relay::Relay;

#[tokio::test(flavor = "multi_thread")]
async fn a_user_of_two_relays_goes_offline_with_the_last_connection_of_both() {
    let stage = stage(|_| {}).await;
    let other = Relay::start(&stage.database.url).await;
    writes(&other).await;
    let here = socket(&stage.relay, 1).await;
    becomes(&stage.database, 1, true).await;
    let there = socket(&other, 1).await;
    settled(&stage, &other).await;
    drop(here);
    eventually("it is gone", || async { (stage.relay.session_count() == 0).then_some(()) }).await;
    settled(&stage, &stage.relay).await;
    assert_eq!(is_online(&stage.database, 1).await, Some(true));
    drop(there);
    becomes(&stage.database, 1, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_end_at_two_relays_at_once_leave_nobody_online() {
    let stage = stage(|_| {}).await;
    let other = Relay::start(&stage.database.url).await;
    writes(&other).await;
    for _ in 0..10 {
        let mut clients = Vec::new();
        for number in 1..=10 {
            clients.push((socket(&stage.relay, number).await, socket(&other, number).await));
        }
        settled(&stage, &stage.relay).await;
        settled(&stage, &other).await;
        drop(clients);
        for number in 1..=10 {
            becomes(&stage.database, number, false).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn users_of_a_relay_that_was_killed_go_offline_and_no_others() {
    // Three sweeps without a beat make a relay dead: on a busy machine, a short sweep would make dead the one that lives.
    const SWEEP_MS: u64 = 2000;
    let stage = stage(|settings| settings.status_sweep_ms = Some(SWEEP_MS)).await;
    let (mut killed, _log, url) =
        serve(&["--database-url", &stage.database.url, "--status-sweep-ms", &SWEEP_MS.to_string()]).await;
    let address: SocketAddr = url.trim_start_matches("http://").parse().unwrap();
    let mut clients = Vec::new();
    for number in [1, 2, 3] {
        clients.push(Client::at(address, &of(number), "").await.unwrap());
    }
    let both = socket(&stage.relay, 2).await;
    for number in [1, 2, 3] {
        becomes(&stage.database, number, true).await;
    }
    settled(&stage, &stage.relay).await;
    killed.start_kill().unwrap();
    killed.wait().await.unwrap();
    let began = Instant::now();
    becomes(&stage.database, 1, false).await;
    becomes(&stage.database, 3, false).await;
    // Four sweeps are expected, as 20 seconds are by default; the rest is for a busy machine.
    assert!(began.elapsed().as_secs() < 20, "{:?}", began.elapsed());
    assert_eq!(is_online(&stage.database, 2).await, Some(true));
    assert_eq!(stage.database.value("select count(*) from relay.status_relays").await, "1");
    drop(both);
    becomes(&stage.database, 2, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_relay_finds_the_users_of_the_only_one_that_was_killed() {
    let database = crate::support::database::Database::new().await;
    database.run(super::PEOPLE).await;
    let arguments = ["--database-url", &database.url, "--status-sweep-ms", "300"];
    let (mut killed, _log, url) = serve(&arguments).await;
    let address: SocketAddr = url.trim_start_matches("http://").parse().unwrap();
    let _client = Client::at(address, &of(1), "").await.unwrap();
    becomes(&database, 1, true).await;
    killed.start_kill().unwrap();
    killed.wait().await.unwrap();
    assert_eq!(is_online(&database, 1).await, Some(true));
    let (_next, _log, _) = serve(&arguments).await;
    becomes(&database, 1, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_was_taken_for_dead_tells_all_again() {
    let stage = stage(|settings| settings.status_sweep_ms = Some(300)).await;
    let _clients = [socket(&stage.relay, 1).await, socket(&stage.relay, 2).await];
    for forget in [
        // Between two beats.
        "update relay.status_relays set seen = '-infinity'; select relay.status_sweep(1, 300)",
        // And as after a restored dump.
        "delete from relay.status_connected; delete from relay.status_relays; update people set is_online = false",
    ] {
        becomes(&stage.database, 1, true).await;
        becomes(&stage.database, 2, true).await;
        stage.run(&format!("begin; {forget}; commit")).await;
        becomes(&stage.database, 1, true).await;
        becomes(&stage.database, 2, true).await;
        eventually("both are known to be connected", || async {
            let connected = format!(
                "select count(*) from relay.status_connected where user_id in ('{}', '{}')",
                id(1),
                id(2)
            );
            (stage.database.value(&connected).await == "2").then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_session_sweeps_at_a_time() {
    let stage = stage(|_| {}).await;
    let sweeping = stage.database.connect().await;
    sweeping.batch_execute("begin; select relay.status_sweep(10, 300)").await.unwrap();
    let second = "select relay.status_sweep(10, 300) is null";
    assert_eq!(stage.database.value(second).await, "t");
    sweeping.batch_execute("commit").await.unwrap();
    assert_eq!(stage.database.value(second).await, "f");
}
