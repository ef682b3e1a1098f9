//! What happens to the table of a webhook: changes of it that are lost are told as a gap.

use super::receiver::{Reaction, Received, Receiver};
use super::{ALERTS, becomes, hook, says, taken, values};
use crate::support::eventually;
use crate::support::stage::Stage;

/// Waits until a gap comes, and returns its reason.
async fn gap(receiver: &Receiver) -> String {
    let found = eventually("a gap comes", || async {
        receiver.taken().into_iter().find(|one: &Received| one.body["type"] == "GAP")
    })
    .await;
    assert_eq!(found.body["table"], "alerts");
    assert!(found.id.starts_with("gap-"));
    found.body["errors"][0].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_is_away_while_the_changelog_is_trimmed_is_told_a_gap() {
    let stage = Stage::new(ALERTS).await;
    let receiver = Receiver::start().await;
    hook(&stage.database, &receiver, "attempts => 100,").await;
    stage.run("insert into alerts values (0, 1)").await;
    taken(&receiver, 1).await;
    receiver.go_away();
    stage.run("insert into alerts select i, 1, repeat('x', 8000) from generate_series(1, 3000) i").await;
    eventually("it takes no more", || async {
        (stage.database.value("select waiting >= 1000 from relay.webhooks").await == "t").then_some(())
    })
    .await;
    stage.run("select relay.retain(age => '1 second')").await;
    eventually("what it has not read is gone", || async {
        stage.database.run("insert into marker default values").await;
        stage.database.run("select relay.trim_changelog()").await;
        let left = "select count(*) from relay.changes where after ->> 'id' = '3000'";
        (stage.database.value(left).await == "0").then_some(())
    })
    .await;
    stage.run("select relay.retain(age => '1 day')").await;
    receiver.come_back().await;
    assert_eq!(gap(&receiver).await, "the cursor is older than what is kept of the changelog");
    stage.run("insert into alerts values (5000, 1)").await;
    eventually("it goes on", || async { values(&receiver.taken(), "id").contains(&5000).then_some(()) })
        .await;
    let taken = receiver.taken();
    let at = |test: &dyn Fn(&Received) -> bool| taken.iter().position(test).unwrap();
    let gap = at(&|one| one.body["type"] == "GAP");
    let is_held = |one: &Received| one.body["record"]["id"].as_i64().is_some_and(|id| id <= 3000);
    assert!(!taken[gap..].iter().any(is_held), "it comes after all that was before it");
    becomes(&stage.database, "waiting", "0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_table_is_a_gap() {
    let stage = Stage::new(ALERTS).await;
    let receiver = Receiver::start().await;
    hook(&stage.database, &receiver, "").await;
    stage.run("insert into alerts values (1, 1); truncate alerts; insert into alerts values (1, 1)").await;
    assert_eq!(gap(&receiver).await, "public.alerts was truncated, read its rows again");
    taken(&receiver, 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_refuses_gaps_gets_later_changes() {
    let stage = Stage::new(ALERTS).await;
    let receiver =
        Receiver::reacting(|one| Reaction::Status(if one.body["type"] == "GAP" { 400 } else { 200 })).await;
    hook(&stage.database, &receiver, "").await;
    stage.run("truncate alerts; insert into alerts values (1, 1)").await;
    assert_eq!(values(&taken(&receiver, 1).await, "id"), [1]);
    becomes(&stage.database, "waiting", "1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_altered_table_is_delivered_with_its_new_columns() {
    let stage = Stage::new(ALERTS).await;
    let receiver = Receiver::start().await;
    hook(&stage.database, &receiver, "filter => 'n=gte.1',").await;
    stage.run("insert into alerts values (1, 1)").await;
    taken(&receiver, 1).await;
    stage.run("alter table alerts add column more text default 'm'; insert into alerts values (2, 1)").await;
    eventually("the new column comes", || async {
        receiver.taken().iter().any(|one| one.body["record"]["more"] == "m").then_some(())
    })
    .await;
    // The filter has to be parsed again.
    stage
        .run("alter table alerts alter column n type bigint; insert into alerts values (3, 1), (4, 0)")
        .await;
    eventually("it goes on", || async { values(&receiver.taken(), "id").contains(&3).then_some(()) }).await;
    assert!(!values(&receiver.taken(), "id").contains(&4));
    assert!(gap(&receiver).await.contains("altered"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renamed_table_stays_the_table_of_its_webhook() {
    let stage = Stage::new(ALERTS).await;
    let receiver = Receiver::start().await;
    hook(&stage.database, &receiver, "").await;
    stage.run("insert into alerts values (1, 1)").await;
    taken(&receiver, 1).await;
    stage.run("alter table alerts rename to alarms; select pg_notify('relay_jobs', '')").await;
    eventually("changes come under the new name", || async {
        stage.database.run("update alarms set n = n + 1; select pg_notify('relay_jobs', '')").await;
        receiver.taken().iter().any(|one| one.body["table"] == "alarms").then_some(())
    })
    .await;
    eventually("a gap comes", || async {
        receiver.taken().iter().any(|one| one.body["type"] == "GAP").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_not_watched_any_more_is_reported_and_goes_on_when_it_is() {
    let stage = Stage::new(ALERTS).await;
    let receiver = Receiver::start().await;
    hook(&stage.database, &receiver, "").await;
    stage.run("insert into alerts values (1, 1)").await;
    taken(&receiver, 1).await;
    stage.run("select relay.unwatch('alerts'); insert into alerts values (2, 1)").await;
    says(&stage.database, "error", "relay.watch").await;
    stage.run("select relay.watch('alerts')").await;
    becomes(&stage.database, "error is null", "true").await;
    // What comes before it has found its position again is part of the gap.
    eventually("it goes on", || async {
        stage.run("insert into alerts values (3, 1) on conflict (id) do update set n = excluded.n + 1").await;
        values(&receiver.taken(), "id").contains(&3).then_some(())
    })
    .await;
    assert!(!gap(&receiver).await.is_empty());
    assert!(!values(&receiver.taken(), "id").contains(&2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_table_is_reported_until_its_webhook_is_dropped() {
    let stage = Stage::new(ALERTS).await;
    let receiver = Receiver::start().await;
    hook(&stage.database, &receiver, "").await;
    stage.run("insert into alerts values (1, 1)").await;
    taken(&receiver, 1).await;
    stage.run("drop table alerts; select pg_notify('relay_jobs', '')").await;
    says(&stage.database, "state", "dropped").await;
    says(&stage.database, "error", "dropped").await;
    stage.run("select relay.drop_webhook('alerts')").await;
    assert_eq!(stage.database.value("select count(*) from relay.webhooks").await, "0");
}
