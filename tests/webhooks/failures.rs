//! Receivers that fail, hang, cut, restart, send elsewhere or want no more: every change comes in the end, or is a dead letter.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use super::receiver::{Reaction, Receiver};
use super::{ALERTS, becomes, hook, in_order, says, taken, values};
use crate::support::stage::Stage;
use crate::support::{eventually, token};

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_row_holds_back_its_own_changes_and_no_others() {
    let stage = Stage::new(ALERTS).await;
    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = Arc::clone(&broken);
    let receiver = Receiver::reacting(move |one| {
        let fails = one.body["record"]["id"] == 1 && is_broken.load(Ordering::SeqCst);
        Reaction::Status(if fails { 500 } else { 200 })
    })
    .await;
    hook(&stage.database, &receiver, "").await;
    stage.run("insert into alerts values (1, 1), (2, 1)").await;
    for n in 2..=4 {
        stage.run(&format!("update alerts set n = {n}")).await;
    }
    eventually("the other row is through", || async { (receiver.taken().len() == 4).then_some(()) }).await;
    becomes(&stage.database, "waiting", "4").await;
    becomes(&stage.database, "state", "failing").await;
    becomes(&stage.database, "error", "status 500").await;
    assert!(
        values(&receiver.received(), "id").iter().filter(|id| **id == 1).count() >= 2,
        "it is tried again"
    );
    let firsts: Vec<_> =
        receiver.received().into_iter().filter(|one| one.body["record"]["id"] == 1).collect();
    assert!(firsts.iter().all(|one| one.id == firsts[0].id), "only the first change of the row is tried");
    assert_eq!(stage.relay.figure("relay_webhook_waiting"), 4);
    broken.store(false, Ordering::SeqCst);
    assert_eq!(in_order(&taken(&receiver, 8).await), 2);
    becomes(&stage.database, "waiting", "0").await;
    becomes(&stage.database, "state", "delivering").await;
    assert_eq!(receiver.taken().len(), 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_answers_every_other_request_gets_each_change_in_order() {
    let stage = Stage::new(ALERTS).await;
    let receiver = Receiver::reacting(|one| match (one.repeats, one.number() % 4) {
        (0, 0) => Reaction::Status(500),
        (0, 1) => Reaction::Close,
        (0 | 1, 2) => Reaction::Status(404),
        (0, _) => Reaction::Cut,
        _ => Reaction::Late(Duration::from_millis(3)),
    })
    .await;
    hook(&stage.database, &receiver, "").await;
    for n in 1..=20 {
        let sql = match n {
            1 => String::from("insert into alerts select i, 1 from generate_series(1, 5) i"),
            n => format!("update alerts set n = {n}"),
        };
        stage.run(&sql).await;
    }
    assert_eq!(in_order(&taken(&receiver, 100).await), 5);
    becomes(&stage.database, "waiting", "0").await;
    becomes(&stage.database, "dead_letters", "0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_cut_after_its_status_is_an_answer() {
    let stage = Stage::new(ALERTS).await;
    let receiver = Receiver::reacting(|_| Reaction::Cut).await;
    hook(&stage.database, &receiver, "").await;
    stage.run("insert into alerts values (1, 1), (2, 1)").await;
    becomes(&stage.database, "delivered", "2").await;
    assert_eq!(receiver.received().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_receiver_hurts_no_other_webhook_no_subscriber_and_no_writer() {
    let stage = Stage::new(ALERTS).await;
    let hanging = Receiver::reacting(|_| Reaction::Hang).await;
    let other = Receiver::start().await;
    hook(&stage.database, &hanging, "").await;
    stage.run(&format!("select relay.webhook('alerts', '{}', name => 'other')", other.url())).await;
    let mut client = stage.join(&token("service_role", None, json!({}))).await;
    stage.run("insert into alerts values (0, 0)").await;
    eventually("the receiver hangs", || async { (hanging.received().len() == 1).then_some(()) }).await;
    let began = Instant::now();
    stage.run("insert into alerts select i, 1 from generate_series(1, 500) i").await;
    assert_eq!(stage.changes(&mut client).await.len(), 501);
    taken(&other, 501).await;
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}: all hangs together", began.elapsed());
    assert!(hanging.received().len() <= 8, "its requests are bounded");
    says(&stage.database, "error", "no answer within 10 seconds").await;
    hanging.react(|_| Reaction::Status(200));
    taken(&hanging, 501).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_whose_deliveries_hang_leaves_room_for_the_others() {
    let stage = Stage::new(ALERTS).await;
    // More rows than requests may be under way.
    let receiver = Receiver::reacting(|one| match one.body["record"]["id"].as_i64() {
        Some(1..=12) if one.repeats < 2 => Reaction::Hang,
        _ => Reaction::Status(200),
    })
    .await;
    hook(&stage.database, &receiver, "").await;
    stage.run("insert into alerts select i, 1 from generate_series(1, 12) i").await;
    becomes(&stage.database, "waiting", "12").await;
    stage.run("insert into alerts select i, 1 from generate_series(13, 100) i").await;
    let began = Instant::now();
    taken(&receiver, 88).await;
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    taken(&receiver, 100).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_restarts_gets_what_came_meanwhile() {
    let stage = Stage::new(ALERTS).await;
    let receiver = Receiver::start().await;
    hook(&stage.database, &receiver, "").await;
    stage.run("insert into alerts values (1, 1)").await;
    taken(&receiver, 1).await;
    receiver.go_away();
    stage.run("update alerts set n = 2; update alerts set n = 3; insert into alerts values (2, 1)").await;
    says(&stage.database, "error", "no answer: ").await;
    becomes(&stage.database, "waiting", "3").await;
    receiver.come_back().await;
    assert_eq!(in_order(&taken(&receiver, 4).await), 2);
    becomes(&stage.database, "error is null", "true").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_is_gone_disables_its_webhook_until_an_operator_enables_it() {
    let stage = Stage::new(ALERTS).await;
    let receiver = Receiver::reacting(|_| Reaction::Status(410)).await;
    hook(&stage.database, &receiver, "").await;
    stage.run("insert into alerts values (1, 1)").await;
    becomes(&stage.database, "state", "disabled").await;
    says(&stage.database, "error", "410 Gone").await;
    let asked = receiver.received().len();
    stage.run("update alerts set n = 2").await;
    receiver.react(|_| Reaction::Status(200));
    stage.database.run("select pg_notify('relay_jobs', '')").await;
    stage.run("insert into marker default values").await;
    assert_eq!(receiver.received().len(), asked);
    stage.run("select relay.enable_webhook('alerts')").await;
    assert_eq!(in_order(&taken(&receiver, 2).await), 1);
    becomes(&stage.database, "state", "delivering").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_that_the_receiver_asks_for_is_kept() {
    for status in [429, 503] {
        let stage = Stage::new(ALERTS).await;
        let receiver = Receiver::reacting(move |one| match one.repeats {
            0 => Reaction::With(status, "retry-after", String::from("2")),
            _ => Reaction::Status(200),
        })
        .await;
        hook(&stage.database, &receiver, "").await;
        stage.run("insert into alerts values (1, 1)").await;
        becomes(&stage.database, "state", "paused").await;
        receiver.react(|_| Reaction::Status(200));
        stage.run("insert into alerts values (2, 1)").await;
        let taken = taken(&receiver, 2).await;
        let first = receiver.received()[0].at;
        assert!(
            taken.iter().all(|one| one.at - first >= Duration::from_millis(1990)),
            "the other row waits, too"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_ends_a_pause() {
    let stage = Stage::new(ALERTS).await;
    let receiver = Receiver::reacting(|_| Reaction::With(429, "retry-after", String::from("999999"))).await;
    hook(&stage.database, &receiver, "").await;
    stage.run("insert into alerts values (1, 1)").await;
    becomes(&stage.database, "state", "paused").await;
    becomes(
        &stage.database,
        "next_try between now() + interval '50 minutes' and now() + interval '1 hour'",
        "true",
    )
    .await;
    receiver.react(|_| Reaction::Status(200));
    stage.run("select relay.enable_webhook('alerts')").await;
    taken(&receiver, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_is_not_followed() {
    let stage = Stage::new(ALERTS).await;
    let (elsewhere, receiver) = (Receiver::start().await, Receiver::start().await);
    let place = elsewhere.url();
    receiver.react(move |_| Reaction::With(307, "location", place.clone()));
    hook(&stage.database, &receiver, "attempts => 2,").await;
    stage.run("insert into alerts values (1, 1)").await;
    becomes(&stage.database, "dead_letters", "1").await;
    becomes(&stage.database, "error", "status 307, and redirects are not followed").await;
    assert_eq!((receiver.received().len(), elsewhere.received().len()), (2, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delivery_that_fails_too_often_is_a_dead_letter_and_its_row_goes_on() {
    let stage = Stage::new(ALERTS).await;
    let receiver =
        Receiver::reacting(|one| Reaction::Status(if one.body["record"]["n"] == 1 { 422 } else { 200 }))
            .await;
    hook(&stage.database, &receiver, "attempts => 3,").await;
    stage.run("insert into alerts values (1, 1), (2, 1), (3, 1); update alerts set n = 2").await;
    becomes(&stage.database, "dead_letters", "3").await;
    assert_eq!(values(&taken(&receiver, 3).await, "n"), [2, 2, 2]);
    becomes(&stage.database, "waiting", "0").await;
    let letters = "select string_agg(format('%s %s %s', attempts, error, body::json -> 'record' ->> 'n'), '; ') from relay.dead_letters";
    let three = ["3 status 422 1"; 3].join("; ");
    assert_eq!(stage.database.value(letters).await, three);
    assert_eq!(receiver.received().len(), 12);
    let figure = |name| stage.relay.figure(name);
    assert_eq!((figure("relay_webhook_given_up_total"), figure("relay_webhook_failures_total")), (3, 9));
    assert_eq!(figure("relay_webhook_dead_letters"), 3);

    // One is discarded, one is tried again in vain, then all with success.
    let id = stage.database.value("select min(id) from relay.dead_letters").await;
    let discarded =
        stage.database.value(&format!("select relay.discard_dead_letters('alerts', '{id}')")).await;
    assert_eq!(discarded, "1");
    let id = stage.database.value("select min(id) from relay.dead_letters").await;
    assert_eq!(
        stage.database.value(&format!("select relay.retry_dead_letters('alerts', '{id}')")).await,
        "1"
    );
    eventually("it was tried again", || async { (receiver.received().len() == 15).then_some(()) }).await;
    becomes(&stage.database, "dead_letters", "2").await;
    receiver.react(|_| Reaction::Status(200));
    assert_eq!(stage.database.value("select relay.retry_dead_letters('alerts')").await, "2");
    assert_eq!(taken(&receiver, 5).await.len(), 5);
    becomes(&stage.database, "dead_letters", "0").await;
    eventually("the metric says so", || async {
        (stage.relay.figure("relay_webhook_dead_letters") == 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_is_bounded_and_the_rest_stays_in_the_changelog() {
    let stage = Stage::new(ALERTS).await;
    let receiver = Receiver::start().await;
    receiver.go_away();
    hook(&stage.database, &receiver, "attempts => 100,").await;
    stage.run("insert into alerts select i, 1 from generate_series(1, 3000) i").await;
    eventually("it takes no more", || async {
        let waiting = "select waiting >= 1000 from relay.webhooks";
        (stage.database.value(waiting).await == "t").then_some(())
    })
    .await;
    stage.run("update alerts set n = 2").await;
    let waiting = "select waiting <= 1256 and not exists (select from relay.webhook_deliveries where body::json -> 'record' ->> 'n' = '2')
                   from relay.webhooks";
    assert_eq!(stage.database.value(waiting).await, "t");
    receiver.come_back().await;
    assert_eq!(in_order(&taken(&receiver, 6000).await), 3000);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_order_a_failure_holds_nothing_back() {
    let stage = Stage::new("create table alerts (id int, n int); grant select on alerts to service_role; select relay.watch('alerts')").await;
    let receiver =
        Receiver::reacting(|one| Reaction::Status(if one.body["record"]["n"] == 1 { 500 } else { 200 }))
            .await;
    hook(&stage.database, &receiver, "in_order => false,").await;
    stage.run("insert into alerts values (1, 1), (1, 2), (1, 3)").await;
    eventually("the others come", || async { (receiver.taken().len() == 2).then_some(()) }).await;
    becomes(&stage.database, "waiting", "1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_is_not_sent_by_other_rights_policies_or_options_than_it_was_read_by() {
    for change in [
        "revoke select (title) on alerts from \"$DB_pager\"",
        "alter policy urgent on alerts using (false)",
        "alter role \"$DB_pager\" bypassrls; create policy none on alerts as restrictive using (false)",
        "drop owned by \"$DB_pager\"; drop role \"$DB_pager\"",
        "select relay.webhook('alerts', url, pause => '20 milliseconds', columns => '{id,n}', role => role, name => 'alerts') from relay.webhooks",
        "grant select on alerts to service_role;
         select relay.webhook('alerts', url || '/new', pause => '20 milliseconds', role => 'service_role', name => 'alerts') from relay.webhooks",
    ] {
        let stage = Stage::new(
            "create role \"$DB_pager\"; create table alerts (id int primary key, n int default 0, title text);
             alter table alerts enable row level security;
             create policy urgent on alerts for select to \"$DB_pager\" using (n >= 5);
             grant select (id, n, title) on alerts to \"$DB_pager\"; select relay.watch('alerts')",
        )
        .await;
        let receiver = Receiver::reacting(|_| Reaction::Status(500)).await;
        hook(&stage.database, &receiver, &format!("role => '{}_pager',", stage.name)).await;
        stage.run("insert into alerts values (1, 9, 'hidden')").await;
        becomes(&stage.database, "waiting", "1").await;
        stage.run(change).await;
        receiver.react(|_| Reaction::Status(200));
        let taken = taken(&receiver, 1).await;
        assert_eq!(taken[0].body["type"], "GAP", "{change}: {:?}", taken[0].body);
        assert!(taken.iter().all(|one| !one.body.to_string().contains("hidden")), "{change}");
        becomes(&stage.database, "waiting", "0").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_is_sent_whatever_changes_for_others() {
    let stage = Stage::new(ALERTS).await;
    let receiver = Receiver::reacting(|_| Reaction::Status(500)).await;
    hook(&stage.database, &receiver, "").await;
    stage.run("insert into alerts values (1, 9)").await;
    becomes(&stage.database, "waiting", "1").await;
    stage.run("grant select on alerts to anon; grant update on alerts to service_role; create role \"$DB_more\"").await;
    receiver.react(|_| Reaction::Status(200));
    assert_eq!(taken(&receiver, 1).await[0].body["record"]["id"], 1);
}
