//! Private channels over HTTP: broadcasts and presence are judged by the caller's token.

use serde_json::{Value, json};

use super::{BOSS, boss, frames, policy, privately_joined, track, user};
use crate::support::http::{Answer, Events, get, post};
use crate::support::stage::Stage;
use crate::support::{ANN, BOB};

const BATCH: &str = "/realtime/v1/api/broadcast";

/// Ann may send to her own room, and everybody may read every room.
async fn stage(more: &str) -> Stage {
    let own = "realtime.topic() = 'room:' || auth.uid()::text and extension = 'broadcast'";
    let policies = [policy("reads", "select", "true"), policy("writes", "insert", own)].concat();
    Stage::new(&format!("{BOSS}{policies}{more}")).await
}

async fn send(stage: &Stage, token: &str, path: &str, body: &Value) -> Answer {
    let headers = format!("authorization: Bearer {token}\r\ncontent-type: application/json\r\n");
    post(stage.relay.address, &format!("{BATCH}{path}"), &headers, body.to_string().as_bytes()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_drops_what_may_not_be_written_and_is_accepted() {
    let stage = stage("").await;
    let mine = format!("room:{ANN}");
    let topic = format!("realtime:{mine}");
    let mut member = privately_joined(&stage.relay, &boss(), &topic, json!({})).await;
    let mut other = privately_joined(&stage.relay, &boss(), "realtime:other", json!({})).await;
    let mut public = super::joined(&stage.relay, "2.0.0", "realtime:other", json!({})).await;
    let message = |channel: &str, private: bool, n: u64| json!({"topic": channel, "event": "e", "payload": {"n": n}, "private": private});
    let messages = json!({"messages": [message(&mine, true, 1), message("other", true, 2), message("other", false, 3), message(&mine, true, 4)]});
    assert_eq!(send(&stage, &user(ANN), "", &messages).await.status, 202);
    let numbers =
        |frames: Vec<Value>| frames.iter().map(|frame| frame[4]["payload"]["n"].clone()).collect::<Vec<_>>();
    assert_eq!(numbers(frames(&mut member).await), [1, 4]);
    assert_eq!(numbers(frames(&mut public).await), [3]);
    other.is_quiet().await;
    // The same batch of another caller.
    assert_eq!(send(&stage, &user(BOB), "", &messages).await.status, 202);
    member.is_quiet().await;
    assert_eq!(numbers(frames(&mut public).await), [3]);
    // A caller who may only write needs no right to read.
    stage.run("drop policy reads on realtime.messages").await;
    assert_eq!(send(&stage, &user(ANN), "", &messages).await.status, 202);
    assert_eq!(numbers(frames(&mut member).await), [1, 4]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_private_broadcast_that_may_not_be_written_is_answered_403() {
    let stage = stage("").await;
    let topic = format!("realtime:room:{ANN}");
    let mut member = privately_joined(&stage.relay, &boss(), &topic, json!({})).await;
    let path = format!("/room:{ANN}/events/e?private=true");
    assert_eq!(send(&stage, &user(ANN), &path, &json!({"n": 1})).await.status, 202);
    assert_eq!(member.raw().await.into_data()[0], 4);
    for token in [user(BOB), crate::support::token("anon", None, json!({}))] {
        let answer = send(&stage, &token, &path, &json!({})).await;
        assert_eq!((answer.status, answer.body), (403, json!({"message": "Unauthorized"})));
    }
    let odd = send(&stage, &user(ANN), &format!("/room:{ANN}/events/e?private=maybe"), &json!({})).await;
    assert_eq!(odd.status, 400);
    let bare = send(&stage, &user(ANN), &format!("/room:{ANN}/events/e?private"), &json!({})).await;
    assert_eq!(bare.status, 400);
    member.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_presence_of_a_private_channel_is_shown_to_those_who_may_read_it() {
    let closed = "create policy closed on realtime.messages as restrictive for select to authenticated
         using (extension = 'broadcast' or auth.uid() = '0a000000-0000-4000-8000-00000000000a');";
    let stage = stage(closed).await;
    let config = json!({"presence": {"enabled": true, "key": "k"}});
    let mut member = privately_joined(&stage.relay, &boss(), "realtime:room", config).await;
    assert_eq!(track(&mut member, "realtime:room", json!({"x": 1})).await["status"], "ok");
    let ask = async |token: &str, query: &str| {
        let headers = format!("authorization: Bearer {token}\r\n");
        get(stage.relay.address, &format!("/realtime/v1/presence?topic=room{query}"), &headers).await
    };
    let answer = ask(&user(ANN), "&private=true").await;
    assert_eq!((answer.status, &answer.body["k"]["metas"][0]["x"]), (200, &json!(1)));
    let answer = ask(&user(BOB), "&private=true").await;
    assert_eq!((answer.status, answer.body), (403, json!({"message": "Unauthorized"})));
    assert_eq!(ask(&user(BOB), "").await.body, json!({}), "the public channel is another one");
    assert_eq!(ask(&user(ANN), "&private=yes").await.status, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stored_broadcasts_of_a_private_channel_are_polled_and_streamed_by_its_readers_alone() {
    let stage = stage("").await;
    let path = "/realtime/v1/changes?topic=room&private=true";
    let headers = |token: &str| format!("authorization: Bearer {token}\r\n");
    let cursor = get(stage.relay.address, path, &headers(&user(ANN))).await.body["cursor"].clone();
    stage
        .run("select realtime.send('{\"n\": 1}', 'e', 'room'), realtime.send('{}', 'public', 'room', false)")
        .await;
    let since = format!("{path}&since={}&wait=20", cursor.as_str().unwrap());
    let answer = get(stage.relay.address, &since, &headers(&user(ANN))).await;
    assert_eq!(answer.body["changes"][0]["payload"]["n"], 1, "{answer:?}");
    assert_eq!(answer.body["changes"].as_array().unwrap().len(), 1);
    let mut stream = Events::open(stage.relay.address, &format!("{path}&apikey={}", user(ANN)), None).await;
    stage.run("select realtime.send('{\"n\": 2}', 'e', 'room')").await;
    loop {
        let event = stream.next().await.expect("an event");
        if event.data["payload"]["n"] == 2 {
            break;
        }
    }
    // The right ends while both wait.
    let next = answer.body["cursor"].as_str().unwrap().to_owned();
    stage.run("select realtime.send('{}', 'e', 'elsewhere')").await;
    let (address, waiting) = (stage.relay.address, headers(&user(ANN)));
    let poll = tokio::spawn(async move {
        let mut since = next;
        loop {
            let answer = get(address, &format!("{path}&since={since}&wait=50"), &waiting).await;
            match answer.body["cursor"].as_str() {
                Some(cursor) => cursor.clone_into(&mut since),
                None => return answer,
            }
        }
    });
    stage.run("drop policy reads on realtime.messages").await;
    let answer = poll.await.unwrap();
    let why = "Unauthorized: You do not have permissions to read from this Channel topic: room";
    assert_eq!((answer.status, &answer.body["error"]), (403, &json!(why)));
    loop {
        match stream.next().await {
            Some(event) if event.name == "failure" => assert_eq!(event.data["error"], why),
            Some(_) => {}
            None => break,
        }
    }
    assert_eq!(get(stage.relay.address, path, &headers(&user(ANN))).await.status, 403);
}
