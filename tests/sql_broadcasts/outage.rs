//! What an outage of the database, or the end of a relay, does to broadcasts.

use std::net::SocketAddr;

use relay::postgres::install::install;
use serde_json::{Value, json};

use super::{VERSIONS, anon, heard, join, member};
use crate::delivery::crash::{Cluster, reconnected};
use crate::program::cli::serve;
use crate::support::database::{Database, JUDGE, READER, connect, make_logins, with_login};
use crate::support::http::{Events, get};
use crate::support::relay::Relay;
use crate::support::socket::Socket;

#[tokio::test(flavor = "multi_thread")]
async fn while_the_database_is_away_members_send_to_each_other_and_afterwards_hear_it_again() {
    let cluster = Cluster::start(&[]).await;
    let mut session = connect(&cluster.url).await;
    install(&mut session).await.unwrap();
    make_logins(&session).await;
    session
        .batch_execute("create table t (id int); grant select on t to anon; select relay.watch('t')")
        .await
        .unwrap();
    let relay = Relay::with(&cluster.url, |settings| settings.stall_seconds = Some(1)).await;
    let mut with_table = Socket::open(&relay, VERSIONS[0], &anon()).await;
    join(
        &mut with_table,
        "room",
        json!({"postgres_changes": [{"event": "*", "schema": "public", "table": "t"}]}),
    )
    .await;
    assert_eq!(with_table.message_frame().await[4]["message"], "Subscribed to PostgreSQL");
    let mut room = member(&relay, VERSIONS[0], "room").await;
    cluster.stop("kill");
    let stalled = with_table.message_frame().await;
    assert!(stalled[4]["message"].as_str().unwrap().starts_with("Stalled"), "{stalled}");
    // One that has no table is not told, and joins, sends and leaves as ever.
    let mut newcomer = member(&relay, VERSIONS[1], "room").await;
    let message = json!({"type": "broadcast", "event": "from a client", "payload": {}});
    newcomer.push(json!("1"), json!("2"), "realtime:room", "broadcast", message).await;
    let frame = room.message_frame().await;
    assert_eq!((&frame[3], &frame[4]["event"]), (&json!("broadcast"), &json!("from a client")), "{frame}");
    newcomer.push(json!("1"), json!("3"), "realtime:room", "phx_leave", json!({})).await;
    assert_eq!(newcomer.message_frame().await[4]["status"], "ok");
    cluster.restart(&[]);
    let session = reconnected(&cluster.url).await;
    session.batch_execute("select realtime.send('{}', 'from SQL', 'room', false)").await.unwrap();
    assert_eq!(heard(&mut room).await.1, "from SQL");
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cursor_continues_at_another_relay_after_the_first_was_killed() {
    let database = Database::new().await;
    let login = |login: &str| with_login(&database.url, login);
    let (reader, judge) = (login(READER), login(JUDGE));
    let arguments = ["--database-url", reader.as_str(), "--judge-url", judge.as_str()];
    let path = format!("/realtime/v1/changes?topic=room&apikey={}", anon());
    let (mut last, mut found, mut sent) = (None::<String>, Vec::new(), 0);
    for round in 0..3 {
        let (mut program, _lines, address) = serve(&arguments).await;
        let address: SocketAddr = address.strip_prefix("http://").unwrap_or(&address).parse().unwrap();
        if last.is_none() {
            let begin = get(address, &path, "").await;
            last = begin.body["cursor"].as_str().map(str::to_owned);
        }
        let mut events = Events::open(address, &path, last.as_deref()).await;
        database.run(&format!("select realtime.send('{{}}', n::text, 'room', false) from generate_series({sent}, {sent} + 99) n")).await;
        sent += 100;
        // Killed while it delivers: in the middle, at the end, or before the first.
        for _ in 0..[50, 150, 0][round] {
            let event = events.next().await.unwrap();
            found.push(event.data["event"].as_str().unwrap().to_owned());
            last = Some(event.id);
        }
        program.kill().await.unwrap();
        database.run(&format!("select realtime.send('{{}}', n::text, 'room', false) from generate_series({sent}, {sent} + 9) n")).await;
        sent += 10;
    }
    let relay = Relay::start(&database.url).await;
    let mut events = Events::open(relay.address, &path, last.as_deref()).await;
    while found.len() < sent {
        found.push(events.next().await.unwrap().data["event"].as_str().unwrap().to_owned());
    }
    assert_eq!(found, (0..sent).map(|n| n.to_string()).collect::<Vec<_>>());
    let position = get(relay.address, &format!("{path}&wait=0&since={}", events.last), "").await;
    assert_eq!(position.body["changes"], Value::Array(Vec::new()));
    relay.stop().await;
}
