//! Private channels: a right that is lost while the channel is joined.

use serde_json::{Value, json};

use super::{BOSS, boss, frames, policy, privately_joined, refusal, send, send_until, track, user};
use crate::support::relay::Relay;
use crate::support::socket::Socket;
use crate::support::stage::Stage;
use crate::support::{ANN, BOB, token};

const TOPIC: &str = "realtime:room";
const MEMBERS: &str = "create table members (user_id uuid primary key, room text);
     grant select on members to authenticated; insert into members values ('0a000000-0000-4000-8000-00000000000a', 'room');";
const IS_MEMBER: &str =
    "exists (select from members m where m.user_id = auth.uid() and m.room = realtime.topic())";

/// Reads up to the end of the channel, and returns why it ended.
async fn end_of(socket: &mut Socket) -> String {
    let mut why = String::new();
    loop {
        let frame = socket.message_frame().await;
        match frame[3].as_str().unwrap() {
            "system" if frame[4]["status"] == "error" => {
                assert_eq!(
                    (&frame[4]["extension"], &frame[4]["channel"]),
                    (&json!("system"), &json!("room"))
                );
                frame[4]["message"].as_str().unwrap().clone_into(&mut why);
            }
            "phx_close" => return why,
            _ => {}
        }
    }
}

async fn refresh(socket: &mut Socket, token: &str) {
    socket.push(json!("1"), json!("9"), TOPIC, "access_token", json!({"access_token": token})).await;
}

const LOST: &str = "You no longer have permission to read from this Channel topic: room";
const DENIED: &str = "You do not have permissions to read from this Channel topic: room";

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_whose_right_is_lost_leaves_the_channel_at_once() {
    for (sql, revoke) in [
        (policy("p", "select", "true"), "drop policy p on realtime.messages"),
        (policy("p", "select", "true"), "alter policy p on realtime.messages using (topic = 'other')"),
        (policy("p", "select", "true"), "revoke select on realtime.messages from authenticated"),
        (policy("p", "select", "true"), "revoke usage on schema realtime from authenticated"),
        (
            policy("p", "select", "true"),
            "create policy q on realtime.messages as restrictive for select to authenticated using (false)",
        ),
        (
            format!("{MEMBERS}select relay.watch('members');{}", policy("p", "select", IS_MEMBER)),
            "delete from members",
        ),
        (
            format!("{MEMBERS}select relay.watch('members');{}", policy("p", "select", IS_MEMBER)),
            "update members set room = 'other'",
        ),
        (
            "create function open() returns boolean language sql stable as 'select true';".to_owned()
                + &policy("p", "select", "open()"),
            "create or replace function open() returns boolean language sql stable as 'select false'",
        ),
    ] {
        let stage = Stage::new(&format!("{BOSS}{sql}")).await;
        let mut other = privately_joined(&stage.relay, &boss(), TOPIC, json!({})).await;
        let mut member = privately_joined(&stage.relay, &user(ANN), TOPIC, json!({})).await;
        stage.run(revoke).await;
        let why = end_of(&mut member).await;
        assert!(why.starts_with(LOST) || why.starts_with(DENIED), "{revoke}: {why}");
        send(&mut other, TOPIC, json!({})).await;
        member.is_quiet().await;
        // The others stay, and what they may do, too.
        assert_eq!(frames(&mut other).await, [Value::Null; 0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_loses_its_membership_of_another_leaves_the_channel() {
    let sql = "create role \"$DB_team\" nologin; create role \"$DB_user\" nologin in role \"$DB_team\";
         grant usage on schema realtime to \"$DB_team\"; grant select on realtime.messages to \"$DB_team\";
         create policy team on realtime.messages for select to \"$DB_team\" using (true);";
    let stage = Stage::new(sql).await;
    let user = token(&format!("{}_user", stage.name), None, json!({}));
    let mut member = privately_joined(&stage.relay, &user, TOPIC, json!({})).await;
    stage.run("revoke \"$DB_team\" from \"$DB_user\"").await;
    // Nothing of it is in the changelog: the next check of the rules finds it, here that of another join.
    assert!(refusal(&stage.relay, &user, TOPIC, json!({})).await.is_some());
    assert_eq!(end_of(&mut member).await, LOST);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_token_that_may_read_less_ends_the_channel_and_one_that_may_not_write_stops_its_sends() {
    let reads = "auth.uid() is not null";
    let policies =
        [policy("r", "select", reads), policy("w", "insert", &format!("auth.uid() = '{ANN}'"))].concat();
    let stage = Stage::new(&format!("{BOSS}{policies}")).await;
    let mut other = privately_joined(&stage.relay, &boss(), TOPIC, json!({})).await;
    let mut member = privately_joined(&stage.relay, &user(ANN), TOPIC, json!({})).await;
    assert_eq!(send(&mut member, TOPIC, json!({})).await["status"], "ok");
    assert_eq!(frames(&mut other).await.len(), 1);
    refresh(&mut member, &user(BOB)).await;
    let denied = json!({"status": "error", "response": {"error": "unauthorized"}});
    assert_eq!(
        send(&mut member, TOPIC, json!({})).await,
        denied,
        "the next message has the rights of the new token"
    );
    other.is_quiet().await;
    refresh(&mut member, &user(ANN)).await;
    assert_eq!(send(&mut member, TOPIC, json!({})).await["status"], "ok");
    refresh(&mut member, &token("authenticated", None, json!({}))).await;
    assert_eq!(end_of(&mut member).await, DENIED);
    assert_eq!(frames(&mut other).await.len(), 1);
    member.push(json!("1"), json!("2"), TOPIC, "broadcast", json!({})).await;
    assert_eq!(member.message_frame().await[4]["response"]["reason"], "unmatched topic");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_extension_is_taken_and_given_on_its_own_while_the_channel_stays() {
    let stage = Stage::with(&format!("{BOSS}{}", policy("r", "select", "true")), |settings, _| {
        settings.messages_per_second = Some(100_000);
        settings.presence_per_second = Some(100_000);
    })
    .await;
    let present = json!({"presence": {"enabled": true, "key": "boss"}});
    let mut other = privately_joined(&stage.relay, &boss(), TOPIC, present).await;
    let present = json!({"presence": {"enabled": true, "key": "ann"}});
    let mut member = privately_joined(&stage.relay, &user(ANN), TOPIC, present).await;
    assert_eq!(member.message_frame().await[3], "presence_state");
    // What the member receives of a broadcast and a change of presence, once the new rules are its own.
    let mut receives = async |condition: &str, expected: [bool; 2]| {
        stage.run(&format!("alter policy r on realtime.messages using ({condition})")).await;
        for n in 0.. {
            send(&mut other, TOPIC, json!(n)).await;
            track(&mut other, TOPIC, json!({"n": n, "rule": condition})).await;
            while !frames(&mut other).await.iter().any(|frame| frame[3] == "presence_diff") {}
            let received = frames(&mut member).await;
            let has =
                |event: &str| received.iter().any(|frame| frame[3].as_str().unwrap().starts_with(event));
            if [has("broadcast"), has("presence")] == expected {
                return received;
            }
        }
        Vec::new()
    };
    receives("extension = 'presence'", [false, true]).await;
    receives("extension = 'broadcast'", [true, false]).await;
    let received = receives("true", [true, true]).await;
    let first = received.iter().find(|frame| frame[3].as_str().unwrap().starts_with("presence"));
    assert_eq!(first.unwrap()[3], "presence_state", "the state comes before any change: {received:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_that_is_given_counts_at_once_for_joins_and_sends() {
    let stage = Stage::new(&format!("{BOSS}{MEMBERS}")).await;
    assert!(refusal(&stage.relay, &user(ANN), TOPIC, json!({})).await.is_some());
    stage.run(&policy("r", "select", IS_MEMBER)).await;
    let mut member = privately_joined(&stage.relay, &user(ANN), TOPIC, json!({})).await;
    // A table that is not watched, too: each join is judged anew.
    assert!(refusal(&stage.relay, &user(BOB), TOPIC, json!({})).await.is_some());
    stage.run(&format!("insert into members values ('{BOB}', 'room')")).await;
    assert!(refusal(&stage.relay, &user(BOB), TOPIC, json!({})).await.is_none());
    let denied = json!({"status": "error", "response": {"error": "unauthorized"}});
    assert_eq!(send(&mut member, TOPIC, json!({})).await, denied);
    stage.run(&policy("w", "insert", "true")).await;
    send_until(&mut member, TOPIC, json!({}), |reply| *reply != denied).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_relays_judge_alike_and_both_end_what_is_revoked() {
    let stage = Stage::new(&policy("p", "all", IS_MEMBER).replacen(
        "create policy",
        &format!("{BOSS}{MEMBERS}select relay.watch('members'); create policy"),
        1,
    ))
    .await;
    let second = Relay::start(&stage.database.url).await;
    let mut members = Vec::new();
    for relay in [&stage.relay, &second] {
        let mut member = privately_joined(relay, &user(ANN), TOPIC, json!({})).await;
        assert_eq!(send(&mut member, TOPIC, json!({})).await["status"], "ok");
        assert!(refusal(relay, &user(BOB), TOPIC, json!({})).await.is_some());
        members.push(member);
    }
    stage.run("delete from members").await;
    for member in &mut members {
        assert_eq!(end_of(member).await, LOST);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_whose_right_is_lost_sends_nothing_more() {
    for (sql, revoke) in [
        (policy("w", "insert", "true"), "drop policy w on realtime.messages"),
        (policy("w", "insert", "true"), "revoke insert on realtime.messages from authenticated"),
        (
            format!("{MEMBERS}select relay.watch('members');{}", policy("w", "insert", IS_MEMBER)),
            "delete from members",
        ),
    ] {
        let stage = Stage::new(&format!("{BOSS}{}{sql}", policy("r", "select", "true"))).await;
        let mut other = privately_joined(&stage.relay, &boss(), TOPIC, json!({})).await;
        let mut member = privately_joined(&stage.relay, &user(ANN), TOPIC, json!({})).await;
        assert_eq!(send(&mut member, TOPIC, json!({"n": 1})).await["status"], "ok");
        assert_eq!(track(&mut member, TOPIC, json!({})).await["status"], "ok");
        stage.run(revoke).await;
        let denied = json!({"status": "error", "response": {"error": "unauthorized"}});
        send_until(&mut member, TOPIC, json!({"n": 2}), |reply| *reply == denied).await;
        frames(&mut other).await;
        assert_eq!(send(&mut member, TOPIC, json!({"n": 3})).await, denied);
        assert_eq!(
            track(&mut member, TOPIC, json!({"again": 1})).await,
            json!({"status": "error", "response": {}})
        );
        other.is_quiet().await;
    }
}
