//! Private channels: how PostgreSQL is asked, and what that may cost and touch.

use std::time::Instant;

use futures_util::future::join_all;
use serde_json::{Value, json};

use super::{BOSS, boss, denied, frames, policy, privately_joined, refusal, send, user};
use crate::support::dice::Dice;
use crate::support::http::post;
use crate::support::stage::Stage;
use crate::support::{ANN, BOB, token};

const TOPIC: &str = "realtime:room";

/// The number of statements by which policies were evaluated.
fn judged(stage: &Stage) -> u64 {
    stage.relay.figure("relay_judgements_total")
}

#[tokio::test(flavor = "multi_thread")]
async fn asking_leaves_nothing_behind_and_needs_no_right_to_write() {
    let sql = "create table trace (n int); grant all on trace to public;
         create function marks() returns boolean language plpgsql as 'begin insert into trace values (1); return true; end';
         create function rings() returns trigger language plpgsql as 'begin perform pg_notify(''trace'', ''x''); insert into public.trace values (2); return new; end';
         create trigger rings after insert on realtime.messages for each row execute function rings();";
    let stage = Stage::new(&format!("{BOSS}{sql}{}", policy("p", "all", "topic = 'room' or marks()"))).await;
    let count = "select count(*) from realtime.messages";
    let mut member = privately_joined(&stage.relay, &user(ANN), TOPIC, json!({})).await;
    assert_eq!(send(&mut member, TOPIC, json!({})).await["status"], "ok");
    // A policy that would write raises, which denies.
    assert_eq!(refusal(&stage.relay, &user(ANN), "realtime:other", json!({})).await, denied("other"));
    assert_eq!(stage.database.value("select count(*) from trace").await, "0");
    assert_eq!(stage.database.value(count).await, "0");
    assert_eq!(
        stage
            .database
            .value("select has_table_privilege('relay_test_judge', 'realtime.messages', 'insert')")
            .await,
        "f"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_policy_holds_up_no_other_join_for_longer_than_its_time_limit() {
    let slow = "case when realtime.topic() like 'slow%' then (select pg_sleep(60)) is not null else auth.uid() is not null end";
    let stage = Stage::with(&format!("{BOSS}{}", policy("p", "all", slow)), |settings, _| {
        settings.judge_timeout_ms = Some(300);
    })
    .await;
    let (relay, ann, bob) = (&stage.relay, user(ANN), user(BOB));
    let started = Instant::now();
    let hostile = join_all((0..20).map(|n| {
        let topic = format!("realtime:slow{n}");
        let ann = &ann;
        async move { refusal(relay, ann, &topic, json!({})).await }
    }));
    let others = join_all((0..20).map(|n| {
        let topic = format!("realtime:quick{n}");
        let bob = &bob;
        async move { refusal(relay, bob, &topic, json!({})).await }
    }));
    let (hostile, others) = tokio::join!(hostile, others);
    assert!(hostile.iter().all(Option::is_some), "{hostile:?}");
    assert!(others.iter().all(Option::is_none), "{others:?}");
    // Not one limit for each of them.
    assert!(started.elapsed().as_millis() < 5000, "{:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_joins_under_a_policy_of_claims_ask_postgresql_nothing_and_under_a_membership_little() {
    let members = "create table members (user_id uuid, room text, primary key (user_id, room)); grant select on members to authenticated;
         insert into members select format('0c000000-0000-4000-8000-%s', lpad(n::text, 12, '0'))::uuid, 'room:' || n % 10 from generate_series(0, 299) n;
         create function of_room(room text) returns bool language sql stable security definer set search_path = '' as
           $$ select exists (select from public.members m where m.user_id = auth.uid() and m.room = of_room.room) $$;
         create function of_topic() returns bool language sql stable security definer set search_path = '' as
           $$ select exists (select from public.members m where m.user_id = auth.uid() and m.room = realtime.topic()) $$;";
    let stage = Stage::new(&format!("{BOSS}{members}")).await;
    for (condition, most) in [
        ("realtime.topic() like 'room:%' and auth.uid() is not null", 0),
        (
            "exists (select from members m where m.user_id = auth.uid() and m.room = (select realtime.topic()))",
            150,
        ),
        ("of_room(realtime.topic())", 150),
        ("(select of_topic())", 150),
    ] {
        stage
            .run(&format!("drop policy if exists p on realtime.messages; {}", policy("p", "all", condition)))
            .await;
        let before = judged(&stage);
        let joins = join_all((0..300).map(|n| {
            let user = user(&format!("0c000000-0000-4000-8000-{n:012}"));
            let relay = &stage.relay;
            async move { refusal(relay, &user, &format!("realtime:room:{}", n % 10), json!({})).await }
        }));
        assert!(joins.await.iter().all(Option::is_none), "{condition}");
        let statements = judged(&stage) - before;
        assert!(statements <= most, "{condition}: {statements} statements");
    }
}

/// A random condition on rows of `realtime.messages`.
fn condition(dice: &mut Dice, depth: u32) -> String {
    if depth > 0 && dice.below(2) == 0 {
        let (one, other) = (condition(dice, depth - 1), condition(dice, depth - 1));
        return match dice.below(4) {
            0 => format!("({one} and {other})"),
            1 => format!("({one} or {other})"),
            2 => format!("(not {one})"),
            _ => format!("(case when {one} then {other} else {one} end)"),
        };
    }
    let one = [
        "realtime.topic() = 'a'",
        "(select realtime.topic()) in ('a', 'b:1')",
        "topic = auth.jwt() ->> 'room'",
        "realtime.topic() is distinct from auth.jwt() ->> 'room'",
        "extension = 'broadcast'",
        "extension in ('broadcast', 'presence')",
        "realtime.messages.extension = 'presence'",
        "auth.uid() = '0a000000-0000-4000-8000-00000000000a'",
        "realtime.topic() = (auth.uid())::text",
        "realtime.topic() like 'b:%'",
        "split_part(realtime.topic(), ':', 2) = auth.jwt() ->> 'number'",
        "(auth.jwt() ->> 'number')::int = 1",
        "exists (select from members m where m.user_id = auth.uid() and m.room = realtime.topic())",
        "exists (select from members m where m.room = messages.topic and m.user_id::text = auth.jwt() ->> 'sub')",
        "topic in (select room from members)",
        "exists (select from messages m where m.topic = realtime.topic())",
        "private is not true",
        "event is null",
        "coalesce(realtime.topic(), '') <> ''",
        "is_member(realtime.topic())",
        "null",
    ];
    one[dice.below(one.len() as u64) as usize].to_owned()
}

/// PostgreSQL is the judge: what the relay answers is what a SELECT of such rows and an INSERT of them would do.
#[tokio::test(flavor = "multi_thread")]
async fn random_policies_are_decided_as_postgresql_decides_about_the_rows_themselves() {
    let sql = "create table members (user_id uuid, room text); grant select on members to authenticated;
         create table messages (topic text); grant select on messages to authenticated; insert into messages values ('a'), ('c');
         insert into members values ('0a000000-0000-4000-8000-00000000000a', 'a'), ('0b000000-0000-4000-8000-00000000000b', 'b:1'), (null, 'c');
         create function is_member(room text) returns boolean language sql stable security definer
           as 'select exists (select from public.members m where m.user_id = auth.uid() and m.room = is_member.room)';";
    let stage = Stage::new(&format!("{BOSS}{sql}")).await;
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    for _ in 0..25 {
        let (reads, writes) = (condition(&mut dice, 2), condition(&mut dice, 2));
        let policies = [policy("r", "select", &reads), policy("w", "insert", &writes)].concat();
        stage.run(&format!("drop policy if exists r on realtime.messages; drop policy if exists w on realtime.messages; {policies}")).await;
        for claims in [
            json!({"role": "authenticated", "sub": ANN, "room": "a", "number": "1"}),
            json!({"role": "authenticated", "sub": BOB, "room": "b:1", "number": "x"}),
            json!({"role": "authenticated"}),
        ] {
            for channel in ["a", "b:1", "c", ANN] {
                let expected = truth(&stage, &claims, channel).await;
                let found = ours(&stage, &claims, channel).await;
                assert_eq!(found, expected, "{reads} / {writes} for {claims} in {channel}");
            }
        }
    }
}

/// What PostgreSQL does with rows of the table: whether they are seen, and may be inserted, by extension.
async fn truth(stage: &Stage, claims: &Value, channel: &str) -> [bool; 4] {
    let mut truth = [false; 4];
    let client = stage.database.connect().await;
    for (n, extension) in ["broadcast", "presence"].into_iter().enumerate() {
        let insert =
            format!("insert into realtime.messages (topic, extension) values ('{channel}', '{extension}')");
        let acting = format!(
            "select set_config('request.jwt.claims', $c${claims}$c$, true), set_config('realtime.topic', '{channel}', true),
                    set_config('role', 'authenticated', true)"
        );
        client.batch_execute(&format!("begin; {insert}; {acting}")).await.unwrap();
        let select =
            format!("select from realtime.messages where topic = '{channel}' and extension = '{extension}'");
        truth[n] = client.query(&select, &[]).await.is_ok_and(|rows| !rows.is_empty());
        client.batch_execute(&format!("rollback; begin; {acting}")).await.unwrap();
        truth[2 + n] = client.batch_execute(&insert).await.is_ok();
        client.batch_execute("rollback").await.unwrap();
    }
    truth
}

/// What the relay shows and takes.
async fn ours(stage: &Stage, claims: &Value, channel: &str) -> [bool; 4] {
    let token = token("authenticated", claims["sub"].as_str(), claims.clone());
    let topic = format!("realtime:{channel}");
    let mut answers = [false; 4];
    let present = json!({"presence": {"enabled": true, "key": "k"}});
    let mut other = privately_joined(&stage.relay, &boss(), &topic, json!({})).await;
    if refusal(&stage.relay, &token, &topic, json!({})).await.is_none() {
        let mut member = privately_joined(&stage.relay, &token, &topic, present).await;
        send(&mut other, &topic, json!({})).await;
        let received = frames(&mut member).await;
        answers[0] = received.iter().any(|frame| frame[3] == "broadcast");
        answers[1] = received.iter().any(|frame| frame[3] == "presence_state");
        answers[3] = super::track(&mut member, &topic, json!({})).await["status"] == "ok";
    } else {
        answers[3] = truth(stage, claims, channel).await[3];
    }
    let headers = format!("authorization: Bearer {token}\r\ncontent-type: application/json\r\n");
    let channel = channel.replace(':', "%3A");
    let path = format!("/realtime/v1/api/broadcast/{channel}/events/e?private=true");
    answers[2] = post(stage.relay.address, &path, &headers, b"{}").await.status == 202;
    answers
}
