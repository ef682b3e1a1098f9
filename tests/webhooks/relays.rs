//! One relay delivers: another one takes over when it is killed, and what was not written down comes again under the same id.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::process::Child;

use super::receiver::{Reaction, Receiver};
use super::{ALERTS, becomes, hook, in_order, taken};
use crate::program::cli::serve;
use crate::support::database::{Database, JUDGE, READER, with_login};
use crate::support::eventually;
use crate::support::relay::Relay;

/// The backend that has the lock of webhooks; empty if none has.
const HOLDER: &str = "select coalesce(min(l.pid)::text, '') from pg_locks l
    where l.locktype = 'advisory' and l.granted and l.classid = relay.lock_class('relay')::oid and l.objid = relay.lock('webhooks')::oid
      and l.database = (select oid from pg_database where datname = current_database())";

async fn program(database: &Database) -> Child {
    let (url, judge) = (with_login(&database.url, READER), with_login(&database.url, JUDGE));
    let (child, lines, _) = serve(&["--database-url", &url, "--judge-url", &judge]).await;
    // Its log is read, so that it does not wait for a full pipe.
    tokio::spawn(async move {
        let mut lines = lines;
        while let Ok(Some(_)) = lines.next_line().await {}
    });
    child
}

async fn database() -> Database {
    let database = Database::new().await;
    database.run(ALERTS).await;
    database
}

/// Waits until a session has the lock, and returns its backend.
async fn holder(database: &Database) -> String {
    eventually("a relay delivers", || async {
        let holder = database.value(HOLDER).await;
        (!holder.is_empty()).then_some(holder)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_relays_lose_no_change_and_keep_the_order() {
    let database = database().await;
    let receiver = Receiver::reacting(|one| match one.number() % 5 {
        0 if one.repeats == 0 => Reaction::Status(500),
        _ => Reaction::Late(Duration::from_millis(5)),
    })
    .await;
    hook(&database, &receiver, "").await;
    let mut relays = vec![program(&database).await, program(&database).await];
    database.run("insert into alerts select i, 1 from generate_series(1, 6) i").await;
    let writer = database.connect().await;
    let writing = tokio::spawn(async move {
        for n in 2..=120 {
            writer.batch_execute(&format!("update alerts set n = {n}; select pg_sleep(0.02)")).await.unwrap();
        }
    });
    for round in 1..=4 {
        eventually("something is delivered", || async {
            (receiver.taken().len() > round * 60).then_some(())
        })
        .await;
        // Whichever delivers: both are killed in turn.
        let mut killed = relays.remove(0);
        killed.start_kill().unwrap();
        killed.wait().await.unwrap();
        relays.push(program(&database).await);
    }
    writing.await.unwrap();
    let taken = taken(&receiver, 720).await;
    assert_eq!(in_order(&taken), 6);
    let ids: BTreeSet<&String> = taken.iter().map(|one| &one.id).collect();
    assert_eq!(ids.len(), 720, "each change has one id");
    becomes(&database, "waiting", "0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_relays_one_delivers_and_the_other_takes_over() {
    let database = database().await;
    let receiver = Receiver::start().await;
    hook(&database, &receiver, "").await;
    let (one, other) = (Relay::start(&database.url).await, Relay::start(&database.url).await);
    let first = holder(&database).await;
    database.run("insert into alerts select i, 1 from generate_series(1, 200) i").await;
    taken(&receiver, 200).await;
    becomes(&database, "delivered", "200").await;
    let running = [&one, &other].map(|relay| relay.figure("relay_webhooks_running"));
    assert_eq!(running.iter().sum::<u64>(), 1);
    let (leads, follows) = if running[0] == 1 { (one, other) } else { (other, one) };
    leads.stop().await;
    database.run("update alerts set n = 2").await;
    assert_eq!(in_order(&taken(&receiver, 400).await), 200);
    assert_ne!(holder(&database).await, first);
    assert_eq!(follows.figure("relay_webhooks_running"), 1);
    assert_eq!(receiver.received().len(), 400, "a relay that ends in order leaves nothing to repeat");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_loses_its_lock_delivers_again_once_it_has_it() {
    let database = database().await;
    let receiver = Receiver::start().await;
    hook(&database, &receiver, "").await;
    let _relay = Relay::start(&database.url).await;
    for n in 1..=3 {
        let holder = holder(&database).await;
        database
            .run(&format!("select pg_terminate_backend({holder}); insert into alerts values ({n}, 1)"))
            .await;
        taken(&receiver, n).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_while_no_relay_runs_is_delivered_by_the_next_one() {
    let database = database().await;
    let receiver = Receiver::start().await;
    hook(&database, &receiver, "").await;
    database.run("insert into alerts values (1, 1); update alerts set n = 2").await;
    let relay = Relay::start(&database.url).await;
    taken(&receiver, 2).await;
    relay.stop().await;
    database.run("update alerts set n = 3").await;
    let _relay = Relay::start(&database.url).await;
    assert_eq!(in_order(&taken(&receiver, 3).await), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_that_is_changed_or_dropped_is_heard_of_at_once() {
    let database = database().await;
    let (first, second) = (Receiver::start().await, Receiver::start().await);
    hook(&database, &first, "").await;
    let _relay = Relay::start(&database.url).await;
    database.run("insert into alerts values (1, 1)").await;
    // The relay hears of it some milliseconds after the call.
    let reaches = async |receiver: &Receiver| {
        let before = receiver.received().len();
        eventually("changes come to the receiver", || async {
            database.run("update alerts set n = n + 1").await;
            (receiver.received().len() > before).then_some(())
        })
        .await;
    };
    reaches(&first).await;
    hook(&database, &second, "").await;
    reaches(&second).await;
    hook(&database, &first, "").await;
    reaches(&first).await;
    database.run("select relay.drop_webhook('alerts')").await;
    eventually("no relay delivers", || async { database.value(HOLDER).await.is_empty().then_some(()) }).await;
    let counts = || (first.received().len(), second.received().len());
    let before = counts();
    database.run("update alerts set n = 4").await;
    assert_eq!(counts(), before);
}
