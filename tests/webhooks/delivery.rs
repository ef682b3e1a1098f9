//! What a receiver gets: each change as the streams give it, signed, in the order of its row, by the rights of a role.

use std::collections::BTreeSet;

use futures_util::future::join_all;
use serde_json::{Value, json};

use super::receiver::Receiver;
use super::{ALERTS, becomes, hook, in_order, taken, values};
use crate::program::cli::line_with;
use crate::support::database::Database;
use crate::support::http::Events;
use crate::support::program::relay;
use crate::support::stage::Stage;
use crate::support::{PATIENCE, SECRET, token};

/// The change without its position, which may lie anywhere in a page.
fn change(mut object: Value) -> Value {
    object.as_object_mut().unwrap().remove("cursor").unwrap();
    object
}

#[tokio::test(flavor = "multi_thread")]
async fn each_change_comes_signed_and_as_the_streams_give_it() {
    let stage = Stage::new(ALERTS).await;
    let receiver = Receiver::start().await;
    let secret = hook(&stage.database, &receiver, "").await;
    let path = format!("/realtime/v1/changes?table=alerts&apikey={}", token("service_role", None, json!({})));
    let mut events = Events::open(stage.relay.address, &path, None).await;
    stage.run("insert into alerts values (1, 0, 'fire'), (2, 0, E'a\"\\n\\u00e9')").await;
    stage.run("update alerts set title = 'out' where id = 1; delete from alerts where id = 2").await;
    let taken = taken(&receiver, 4).await;
    let mut streamed = Vec::new();
    while streamed.len() < 4 {
        streamed.push(change(events.next().await.unwrap().data));
    }
    let mut delivered: Vec<Value> = taken.iter().map(|one| change(one.body.clone())).collect();
    delivered.sort_by_key(|change| change["number"].as_str().unwrap().parse::<u64>().unwrap());
    assert_eq!(delivered, streamed);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    for one in &taken {
        assert!(one.is_signed_by(&secret), "{one:?}");
        assert!(now.abs_diff(one.timestamp) < 60);
        let (txid, number) = (one.body["txid"].as_str().unwrap(), one.body["number"].as_str().unwrap());
        assert!(one.id.starts_with(&format!("{txid}-{number}-")) && !one.id.contains('.'), "{}", one.id);
    }
    becomes(&stage.database, "delivered", "4").await;
    becomes(&stage.database, "state", "delivering").await;
    let figure = |name| stage.relay.figure(name);
    assert_eq!((figure("relay_webhook_deliveries_total"), figure("relay_webhooks_running")), (4, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_begins_at_the_moment_of_the_call() {
    let stage = Stage::new(ALERTS).await;
    let receiver = Receiver::start().await;
    stage.run("insert into alerts values (1)").await;
    let open = stage.database.connect().await;
    open.batch_execute("begin; insert into alerts values (2)").await.unwrap();
    let caller = stage.database.connect().await;
    let call = format!("select relay.webhook('alerts', '{}', name => 'alerts')", receiver.url());
    caller
        .batch_execute(&format!(
            "begin; insert into alerts values (3); {call}; insert into alerts values (4)"
        ))
        .await
        .unwrap();
    stage.run("insert into alerts values (5)").await;
    caller.batch_execute("commit").await.unwrap();
    open.batch_execute("commit").await.unwrap();
    let taken = taken(&receiver, 4).await;
    let ids: BTreeSet<i64> = values(&taken, "id").into_iter().collect();
    assert_eq!(ids, BTreeSet::from([2, 3, 4, 5]));
}

#[tokio::test(flavor = "multi_thread")]
async fn events_filter_and_columns_choose_what_is_delivered() {
    let stage = Stage::new(ALERTS).await;
    let receiver = Receiver::start().await;
    hook(&stage.database, &receiver, "events => '{insert,delete}', filter => 'n=gt.5', columns => '{n}',")
        .await;
    stage.run("insert into alerts values (1, 1), (2, 6); update alerts set n = 7; delete from alerts").await;
    stage.run("insert into alerts values (3, 6)").await;
    let taken = taken(&receiver, 4).await;
    let mut got: Vec<String> = taken
        .iter()
        .map(|one| format!("{} {} {}", one.body["type"], one.body["record"], one.body["old_record"]))
        .collect();
    got.sort();
    let deleted = |id| format!(r#""DELETE" null {{"id":{id}}}"#);
    let inserted = |id| format!(r#""INSERT" {{"id":{id},"n":6}} null"#);
    assert_eq!(got, [deleted(1), deleted(2), inserted(2), inserted(3)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_gets_what_its_policies_show_and_the_columns_it_may_read() {
    let stage = Stage::new(
        "create role \"$DB_pager\";
         create table alerts (id int primary key, n int default 0, title text);
         alter table alerts enable row level security;
         create policy urgent on alerts for select to \"$DB_pager\" using (n >= 5);
         grant select (id, n) on alerts to \"$DB_pager\"; select relay.watch('alerts')",
    )
    .await;
    let receiver = Receiver::start().await;
    hook(&stage.database, &receiver, &format!("role => '{}_pager',", stage.name)).await;
    stage
        .run("insert into alerts values (1, 1, 'hidden'), (2, 9, 'x'); insert into alerts values (3, 5, 'y')")
        .await;
    let taken = taken(&receiver, 2).await;
    let rows: BTreeSet<String> = taken.iter().map(|one| one.body["record"].to_string()).collect();
    assert_eq!(rows, BTreeSet::from([r#"{"id":2,"n":9}"#.to_owned(), r#"{"id":3,"n":5}"#.to_owned()]));
    stage
        .run(&format!(
            "revoke select on alerts from \"{}_pager\"; revoke select (id, n) on alerts from \"{}_pager\"",
            stage.name, stage.name
        ))
        .await;
    stage.run("insert into alerts values (4, 9)").await;
    super::says(&stage.database, "error", "may not read").await;
    assert!(!values(&receiver.received(), "id").contains(&4));
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_of_a_row_come_one_after_the_other_and_each_once() {
    let stage = Stage::new(ALERTS).await;
    // Fast or slow, by chance: rows overtake each other, changes of one row must not.
    let receiver = Receiver::reacting(|one| {
        super::receiver::Reaction::Late(std::time::Duration::from_millis(one.number() % 3 * 7))
    })
    .await;
    hook(&stage.database, &receiver, "").await;
    let writers = (0..4).map(|writer| {
        let database = &stage.database;
        async move {
            let client = database.connect().await;
            for n in 1..=25 {
                for row in 0..4 {
                    let id = writer * 10 + row;
                    let sql = if n == 1 {
                        format!("insert into alerts values ({id}, 1)")
                    } else {
                        format!("update alerts set n = {n} where id = {id}")
                    };
                    client.batch_execute(&sql).await.unwrap();
                }
            }
        }
    });
    join_all(writers).await;
    let taken = taken(&receiver, 400).await;
    assert_eq!(in_order(&taken), 16);
    assert_eq!(receiver.received().len(), 400, "nothing failed, so nothing is repeated");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_changes_keeps_the_order_of_both_rows() {
    let stage = Stage::new(ALERTS).await;
    let receiver = Receiver::reacting(|one| {
        let wait = if one.body["record"]["id"] == 1 { 200 } else { 0 };
        super::receiver::Reaction::Late(std::time::Duration::from_millis(wait))
    })
    .await;
    hook(&stage.database, &receiver, "").await;
    stage
        .run("insert into alerts values (1, 1); update alerts set id = 2, n = 2; update alerts set n = 3")
        .await;
    assert_eq!(values(&taken(&receiver, 3).await, "n"), [1, 2, 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn both_secrets_sign_while_receivers_change_from_one_to_the_other() {
    let stage = Stage::new(ALERTS).await;
    let receiver = Receiver::start().await;
    let old = hook(&stage.database, &receiver, "").await;
    let new = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    hook(&stage.database, &receiver, &format!("secret => '{old} {new}',")).await;
    stage.run("insert into alerts values (1)").await;
    let taken = taken(&receiver, 1).await;
    assert!(taken[0].is_signed_by(&old) && taken[0].is_signed_by(new));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_too_large_comes_without_its_long_values() {
    let stage = Stage::new(ALERTS).await;
    let receiver = Receiver::start().await;
    hook(&stage.database, &receiver, "").await;
    stage
        .run("insert into alerts values (1, 1, repeat('x', 3000000)); insert into alerts values (2, 2, 'y')")
        .await;
    let taken = taken(&receiver, 2).await;
    let large = taken.iter().find(|one| one.body["record"]["id"] == 1).unwrap();
    assert_eq!(large.body["errors"], json!(["Error 413: Payload Too Large"]));
    assert_eq!(large.body["record"], json!({"id": 1, "n": 1}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_behind_tls_is_verified() {
    let database = Database::new().await;
    database.run(ALERTS).await;
    let receiver = Receiver::tls().await;
    let authority = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/tls/authority.pem");
    hook(&database, &receiver, "").await;
    database.run("insert into alerts values (1)").await;
    for trusted in [None, Some(authority)] {
        let mut program = relay(&[
            "serve",
            "--jwt-secret",
            SECRET,
            "--listen",
            "127.0.0.1:0",
            "--database-url",
            &database.url,
        ]);
        let mut child = program.envs(trusted.map(|path| ("SSL_CERT_FILE", path))).spawn().unwrap();
        let mut lines =
            tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(child.stderr.take().unwrap()));
        if trusted.is_none() {
            line_with(&mut lines, "webhook not delivered").await;
            assert!(receiver.received().is_empty());
        } else {
            taken(&receiver, 1).await;
        }
        child.start_kill().unwrap();
        tokio::time::timeout(PATIENCE, child.wait()).await.unwrap().unwrap();
    }
}
