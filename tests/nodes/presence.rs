//! Presence between relays: each client knows the members of all, whoever came first.

use serde_json::json;

use super::{
    State, TOPIC, apply, know, know_each_other, knows, member, present, relays, state, track, untrack,
};
use crate::support::database::Database;
use crate::support::eventually;
use crate::support::http::get;
use crate::support::relay::Relay;

#[tokio::test(flavor = "multi_thread")]
async fn members_of_all_relays_are_in_the_state_and_come_and_go_once() {
    let database = Database::new().await;
    let relays = relays(&database, 2).await;
    let [one, other] = [&relays[0], &relays[1]].map(|relay| relay.address.to_string());
    let mut ann = member(&one, present("ann")).await;
    track(&mut ann, json!({"n": 1})).await;
    let mut known = State::new();
    knows(&mut ann, &mut known, &state(&[("ann", json!({"n": 1}))])).await;
    // The other relay has no member of this topic yet.
    let presence = format!("/realtime/v1/presence?topic=room&apikey={}", super::anon());
    eventually("the presence of all is read anywhere", || async {
        let body = get(relays[1].address, &presence, "").await.body.to_string();
        body.contains("\"n\":1").then_some(())
    })
    .await;
    let mut ben = member(&other, present("ben")).await;
    let mut bens = State::new();
    let first = ben.message_frame().await;
    assert_eq!(first[3], "presence_state", "{first}");
    apply(&mut bens, &first);
    assert_eq!(bens, state(&[("ann", json!({"n": 1}))]));
    track(&mut ben, json!({"n": 2})).await;
    let both = state(&[("ann", json!({"n": 1})), ("ben", json!({"n": 2}))]);
    knows(&mut ben, &mut bens, &both).await;
    knows(&mut ann, &mut known, &both).await;
    track(&mut ann, json!({"n": 3})).await;
    let both = state(&[("ann", json!({"n": 3})), ("ben", json!({"n": 2}))]);
    knows(&mut ben, &mut bens, &both).await;
    untrack(&mut ann).await;
    knows(&mut ben, &mut bens, &state(&[("ben", json!({"n": 2}))])).await;
    track(&mut ann, json!({"n": 4})).await;
    knows(&mut ben, &mut bens, &state(&[("ann", json!({"n": 4})), ("ben", json!({"n": 2}))])).await;
    drop(ann);
    knows(&mut ben, &mut bens, &state(&[("ben", json!({"n": 2}))])).await;
    ben.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_comes_later_knows_who_is_there_and_is_known() {
    let database = Database::new().await;
    let one = Relay::start(&database.url).await;
    let mut ann = member(&one.address.to_string(), present("ann")).await;
    track(&mut ann, json!({"n": 1})).await;
    let mut known = State::new();
    knows(&mut ann, &mut known, &state(&[("ann", json!({"n": 1}))])).await;
    let other = Relay::start(&database.url).await;
    know_each_other(&[&one, &other]).await;
    let mut ben = member(&other.address.to_string(), present("ben")).await;
    let mut bens = State::new();
    knows(&mut ben, &mut bens, &known).await;
    track(&mut ben, json!({"n": 2})).await;
    let both = state(&[("ann", json!({"n": 1})), ("ben", json!({"n": 2}))]);
    knows(&mut ann, &mut known, &both).await;
    // A relay that ends in order takes its members with it, at once.
    other.stop().await;
    knows(&mut ann, &mut known, &state(&[("ann", json!({"n": 1}))])).await;
    ann.push(json!("1"), json!("l"), TOPIC, "phx_leave", json!({})).await;
    know(&[&one], 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn topics_whose_members_are_all_gone_leave_nothing_behind() {
    let database = Database::new().await;
    let relays = relays(&database, 2).await;
    let before = relays[1].figure("relay_outbox_bytes");
    for round in 0..3 {
        let mut ann = member(&relays[0].address.to_string(), present("ann")).await;
        track(&mut ann, json!({"round": round})).await;
        let presence = format!("/realtime/v1/presence?topic=room&apikey={}", super::anon());
        for is_there in [true, false] {
            eventually("the presence is read anywhere", || async {
                let body = get(relays[1].address, &presence, "").await.body.to_string();
                (body.contains("round") == is_there).then_some(())
            })
            .await;
            ann.push(json!("1"), json!("l"), TOPIC, "phx_leave", json!({})).await;
        }
    }
    assert_eq!(relays[1].figure("relay_outbox_bytes"), before);
}
