//! Private channels: who may join one, and what a member receives and sends there.

use serde_json::{Value, json};

use super::{
    BOSS, VERSIONS, boss, denied, frames, policy, private, privately_joined, refusal, send, track, user,
};
use crate::support::socket::Socket;
use crate::support::stage::Stage;
use crate::support::{ANN, BOB, token};

const TOPIC: &str = "realtime:room";
const BROADCAST: &str = "extension = 'broadcast'";
const PRESENCE: &str = "extension = 'presence'";

/// A stage with policies of these commands and conditions.
async fn stage(policies: &[(&str, &str)]) -> Stage {
    let policies = policies.iter().enumerate();
    let sql: String =
        policies.map(|(n, (command, condition))| policy(&format!("p{n}"), command, condition)).collect();
    Stage::new(&format!("{BOSS}{sql}")).await
}

/// What a member may do, as it finds out: what it receives, then what it may send.
async fn abilities(stage: &Stage) -> Vec<&'static str> {
    let mut other = privately_joined(&stage.relay, &boss(), TOPIC, json!({})).await;
    track(&mut other, TOPIC, json!({"who": "boss"})).await;
    let config = json!({"presence": {"enabled": true, "key": "ann"}});
    let mut member = privately_joined(&stage.relay, &user(ANN), TOPIC, config).await;
    assert_eq!(send(&mut other, TOPIC, json!({"n": 1})).await["status"], "ok");
    let received = frames(&mut member).await;
    let receives = |event: &str| received.iter().any(|frame| frame[3] == event);
    let mut abilities = Vec::new();
    abilities.extend(receives("broadcast").then_some("receive"));
    abilities.extend(receives("presence_state").then_some("see"));
    match send(&mut member, TOPIC, json!({})).await {
        reply if reply == json!({"status": "ok", "response": {}}) => abilities.push("send"),
        reply => assert_eq!(reply, json!({"status": "error", "response": {"error": "unauthorized"}})),
    }
    match track(&mut member, TOPIC, json!({})).await {
        reply if reply == json!({"status": "ok", "response": {}}) => abilities.push("track"),
        reply => assert_eq!(reply, json!({"status": "error", "response": {}})),
    }
    abilities
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_receives_and_sends_what_the_policies_of_each_extension_allow() {
    for (policies, expected) in [
        (&[("select", "true")][..], &["receive", "see"][..]),
        (&[("select", BROADCAST)], &["receive"]),
        (&[("select", PRESENCE)], &["see"]),
        (&[("select", "true"), ("insert", "true")], &["receive", "see", "send", "track"]),
        (&[("all", "true")], &["receive", "see", "send", "track"]),
        (&[("select", BROADCAST), ("insert", PRESENCE)], &["receive", "track"]),
        (&[("select", PRESENCE), ("insert", BROADCAST)], &["see", "send"]),
        (&[("select", BROADCAST), ("insert", BROADCAST)], &["receive", "send"]),
        (&[("select", "realtime.topic() = 'room'"), ("insert", "topic = 'other'")], &["receive", "see"]),
    ] {
        let stage = stage(policies).await;
        assert_eq!(abilities(&stage).await, expected, "{policies:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_that_no_policy_allows_is_refused_in_the_words_of_supabase() {
    for policies in [
        &[][..],
        &[("insert", "true")],
        &[("update", "true")],
        &[("select", "realtime.topic() = 'other'")],
        &[("select", "extension = 'persistence'")],
        &[("select", "auth.uid() = '0b000000-0000-4000-8000-00000000000b'")],
        &[("select", "null")],
    ] {
        let stage = stage(policies).await;
        assert_eq!(refusal(&stage.relay, &user(ANN), TOPIC, json!({})).await, denied("room"), "{policies:?}");
        let anon = token("anon", None, json!({}));
        assert_eq!(refusal(&stage.relay, &anon, TOPIC, json!({})).await, denied("room"), "{policies:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn restrictive_policies_take_away_what_permissive_ones_allow() {
    let restrictive = "create policy less on realtime.messages as restrictive for all to authenticated
         using (realtime.topic() not like 'secret%' and (extension = 'broadcast' or topic = 'room'));";
    let stage = stage(&[("all", "true")]).await;
    stage.run(restrictive).await;
    assert_eq!(abilities(&stage).await, ["receive", "see", "send", "track"]);
    assert_eq!(refusal(&stage.relay, &user(ANN), "realtime:secret1", json!({})).await, denied("secret1"));
    let config = json!({"presence": {"enabled": true}});
    let mut member = privately_joined(&stage.relay, &user(ANN), "realtime:hall", config).await;
    member.is_quiet().await;
    assert_eq!(track(&mut member, "realtime:hall", json!({})).await["status"], "error");
    assert_eq!(send(&mut member, "realtime:hall", json!({})).await["status"], "ok");
}

/// Forms that the relay decides, forms that PostgreSQL decides for all who ask, and forms that it decides for each.
#[tokio::test(flavor = "multi_thread")]
async fn policies_of_every_form_are_asked_about_the_channel_and_the_claims() {
    let tables = "create table members (user_id uuid, room text, primary key (user_id, room));
         create table open_rooms (room text primary key);
         create function is_member(room text) returns boolean language sql stable security definer
           as 'select exists (select from public.members m where m.user_id = auth.uid() and m.room = is_member.room)';
         create function boom() returns boolean language plpgsql as 'begin raise exception ''boom''; end';
         grant select on members, open_rooms to authenticated;
         insert into open_rooms values ('open');
         insert into members values ('0a000000-0000-4000-8000-00000000000a', 'club');";
    let stage = Stage::new(tables).await;
    let by_name = "room:0a000000-0000-4000-8000-00000000000a";
    for (condition, allowed) in [
        ("realtime.topic() = 'room:' || auth.uid()::text", &[by_name][..]),
        ("(select realtime.topic()) in ('club', 'open')", &["club", "open"]),
        ("topic = auth.jwt() ->> 'room'", &["club"]),
        ("split_part(realtime.topic(), ':', 2) = (select auth.uid())::text", &[by_name]),
        (
            "exists (select from members m where m.user_id = auth.uid() and m.room = realtime.topic())",
            &["club"],
        ),
        (
            "(select realtime.topic()) in (select room from members where user_id = (select auth.uid()))",
            &["club"],
        ),
        ("topic in (select room from open_rooms)", &["open"]),
        (
            "exists (select from open_rooms where room = realtime.topic()) or is_member(realtime.topic())",
            &["club", "open"],
        ),
        ("is_member(topic)", &["club"]),
        ("current_setting('realtime.topic', true) like 'c%'", &["club"]),
        ("inserted_at > now() at time zone 'UTC' - interval '1 minute' and topic = 'open'", &["open"]),
        ("not private and payload is null and topic = 'open'", &["open"]),
        ("case when topic = 'club' then boom() else topic = 'open' end", &["open"]),
        ("topic = 'open' and (auth.jwt() ->> 'number')::int = 7", &[]),
        ("boom()", &[]),
    ] {
        stage
            .run(&format!(
                "drop policy if exists p on realtime.messages; {}",
                policy("p", "select", condition)
            ))
            .await;
        let token = token("authenticated", Some(ANN), json!({"room": "club", "number": "no number"}));
        let mut found = Vec::new();
        for channel in ["club", "open", "other", by_name] {
            match refusal(&stage.relay, &token, &format!("realtime:{channel}"), json!({})).await {
                None => found.push(channel),
                Some(reason) => assert_eq!(Some(reason), denied(channel)),
            }
        }
        assert_eq!(found, allowed, "{condition}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_membership_table_with_row_security_of_its_own_decides() {
    let sql = "create table members (user_id uuid, room text);
         alter table members enable row level security;
         create policy own on members for select to authenticated using (user_id = auth.uid());
         grant select on members to authenticated;
         insert into members values ('0a000000-0000-4000-8000-00000000000a', 'room');";
    let looks = "exists (select from members m where m.room = realtime.topic())";
    let stage = Stage::new(&format!("{sql}{}", policy("p", "select", looks))).await;
    assert_eq!(refusal(&stage.relay, &user(ANN), TOPIC, json!({})).await, None);
    assert_eq!(refusal(&stage.relay, &user(BOB), TOPIC, json!({})).await, denied("room"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_private_and_the_public_channel_of_a_name_are_apart_also_for_presence() {
    let stage = stage(&[("all", "true")]).await;
    let present = json!({"presence": {"enabled": true, "key": "k"}});
    for version in VERSIONS {
        let mut public = Socket::open(&stage.relay, version, &user(ANN)).await;
        super::join(&mut public, TOPIC, present.clone()).await;
        let mut hidden = Socket::open(&stage.relay, version, &user(BOB)).await;
        super::join(&mut hidden, TOPIC, private(present.clone())).await;
        for socket in [&mut public, &mut hidden] {
            assert_eq!(frames(socket).await[0][4], json!({}));
        }
        assert_eq!(track(&mut hidden, TOPIC, json!({"where": "hidden"})).await["status"], "ok");
        assert_eq!(send(&mut hidden, TOPIC, json!({})).await["status"], "ok");
        public.is_quiet().await;
        let payload = json!({"event": "e", "payload": {"where": "public"}});
        public.push(json!("1"), Value::Null, TOPIC, "broadcast", payload).await;
        public.is_quiet().await;
        let seen = frames(&mut hidden).await;
        assert!(seen.iter().all(|frame| frame[3] == "presence_diff"), "{seen:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_in_a_private_channel_are_those_that_the_tables_allow() {
    let sql =
        "create table notes (id int primary key, owner uuid); alter table notes enable row level security;
         create policy own on notes for select to authenticated using (owner = auth.uid());
         grant select on notes to authenticated; select relay.watch('notes');";
    let stage = Stage::new(&format!("{sql}{}", policy("p", "select", "topic = 'room'"))).await;
    let entries = json!({"postgres_changes": [{"event": "*", "schema": "public", "table": "notes"}]});
    let mut member = privately_joined(&stage.relay, &user(ANN), TOPIC, entries.clone()).await;
    assert_eq!(member.message_frame().await[4]["message"], "Subscribed to PostgreSQL");
    stage.run(&format!("insert into notes values (1, '{BOB}'), (2, '{ANN}')")).await;
    let change = member.message_frame().await;
    assert_eq!(change[4]["data"]["record"]["id"], 2);
    assert_eq!(refusal(&stage.relay, &user(ANN), "realtime:other", entries).await, denied("other"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_broadcast_without_ack_is_silent_and_reaches_nobody() {
    let stage = stage(&[("select", "true")]).await;
    let mut other = privately_joined(&stage.relay, &boss(), TOPIC, json!({})).await;
    let silent = json!({"broadcast": {"ack": false}});
    let mut member = privately_joined(&stage.relay, &user(ANN), TOPIC, silent).await;
    for _ in 0..3 {
        member.push(json!("1"), json!("2"), TOPIC, "broadcast", json!({"event": "e", "payload": {}})).await;
    }
    member.is_quiet().await;
    assert_eq!(track(&mut member, TOPIC, json!({})).await, json!({"status": "error", "response": {}}));
    other.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_sends_arrive_in_order_though_the_first_waits_for_its_verdict() {
    let slow = "(select pg_sleep(0.05)) is not null and realtime.topic() = 'room'";
    let stage = stage(&[("select", "true"), ("insert", slow)]).await;
    let mut other = privately_joined(&stage.relay, &boss(), TOPIC, json!({})).await;
    let mut member =
        privately_joined(&stage.relay, &user(ANN), TOPIC, json!({"broadcast": {"ack": false}})).await;
    for n in 0..100 {
        member.push(json!("1"), Value::Null, TOPIC, "broadcast", json!({"event": "e", "payload": n})).await;
    }
    for n in 0..100 {
        assert_eq!(other.message_frame().await[4]["payload"], n);
    }
    // One statement: the verdict is kept.
    member.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_that_is_no_matter_of_policies_says_what_to_do() {
    let hidden = "create role \"$DB_out\" nologin;";
    let stage = Stage::new(&format!("{BOSS}{hidden}{}", policy("p", "all", "true"))).await;
    let why = |reason: Option<String>| {
        let reason = reason.expect("a refusal");
        assert!(
            reason.starts_with(
                "Unauthorized: You do not have permissions to read from this Channel topic: room ("
            ),
            "{reason}"
        );
        reason
    };
    let out = format!("{}_out", stage.name);
    let reason = why(refusal(&stage.relay, &token(&out, None, json!({})), TOPIC, json!({})).await);
    assert!(reason.contains(&format!("grant usage on schema realtime to {out}")), "{reason}");
    let nobody = token("nobody_at_all", None, json!({}));
    assert!(
        why(refusal(&stage.relay, &nobody, TOPIC, json!({})).await)
            .contains("the role nobody_at_all does not exist")
    );
    stage.run("create role \"$DB_stranger\" nologin").await;
    stage.run("do $$ begin execute format('revoke %I from relay_test_judge', current_database() || '_stranger'); end $$").await;
    let stranger = token(&format!("{}_stranger", stage.name), None, json!({}));
    assert!(why(refusal(&stage.relay, &stranger, TOPIC, json!({})).await).contains("to relay_test_judge"));
    let postgres = token("postgres", None, json!({}));
    assert!(why(refusal(&stage.relay, &postgres, TOPIC, json!({})).await).contains("is a superuser"));
    stage.run("revoke select on realtime.messages from authenticated").await;
    let reason = why(refusal(&stage.relay, &user(ANN), TOPIC, json!({})).await);
    assert!(reason.contains("grant select on realtime.messages to authenticated"), "{reason}");
    stage.run("drop table realtime.messages").await;
    assert!(why(refusal(&stage.relay, &user(ANN), TOPIC, json!({})).await).contains("relay install"));
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_no_text_of_the_database_can_have_are_refused_alone() {
    let stage = stage(&[("all", "realtime.topic() <> 'x'")]).await;
    let odd = [
        "realtime:a\u{0}b",
        "realtime:'; drop table realtime.messages; --",
        "realtime:é\"\\{}",
        "realtime: ",
    ];
    for topic in odd {
        let refused = refusal(&stage.relay, &user(ANN), topic, json!({})).await.is_some();
        assert_eq!(refused, topic.contains('\0'), "{topic}");
    }
    assert_eq!(refusal(&stage.relay, &user(ANN), "realtime:x", json!({})).await, denied("x"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_for_private_channels_alone_refuses_public_ones() {
    let stage =
        Stage::with(&policy("p", "select", "topic = 'room'"), |settings, _| settings.private_only = true)
            .await;
    let mut socket = Socket::open(&stage.relay, "2.0.0", &user(ANN)).await;
    for config in [json!({}), json!({"private": false}), json!({"postgres_changes": [{"table": "marker"}]})] {
        socket.join("1", TOPIC, config).await;
        let reply = socket.message_frame().await;
        assert_eq!(reply[4]["response"]["reason"], "PrivateOnly: This project only allows private channels");
    }
    super::join(&mut socket, TOPIC, private(json!({}))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn broadcasts_from_sql_reach_the_members_who_may_read_broadcasts_until_they_may_not() {
    let before = "topic = 'room' and extension = 'broadcast' or topic = 'hall' and extension = 'presence'";
    let after = "topic = 'room' and extension = 'presence' or topic = 'hall' and extension = 'broadcast'";
    let stage = stage(&[("select", before)]).await;
    let mut public = super::joined(&stage.relay, "1.0.0", TOPIC, json!({})).await;
    let mut sockets = Vec::new();
    for topic in [TOPIC, "realtime:hall"] {
        let mut socket = Socket::open(&stage.relay, "1.0.0", &user(ANN)).await;
        super::join(&mut socket, topic, private(json!({}))).await;
        sockets.push(socket);
    }
    let [mut room, mut hall]: [Socket; 2] = sockets.try_into().ok().unwrap();
    let send = async |n: u64| {
        let topics = "unnest(array['room', 'hall', 'elsewhere']) topic";
        stage.run(&format!("select realtime.send('{{\"n\": {n}}}', 'e', topic) from {topics}")).await;
    };
    send(1).await;
    assert_eq!(room.message_frame().await[4]["payload"]["n"], 1);
    hall.is_quiet().await;
    stage.run(&format!("alter policy p0 on realtime.messages using ({after})")).await;
    let mut n = 1;
    while !frames(&mut hall).await.iter().any(|frame| frame[3] == "broadcast") {
        n += 1;
        send(n).await;
    }
    frames(&mut room).await;
    send(n + 1).await;
    while hall.message_frame().await[4]["payload"]["n"] != n + 1 {}
    room.is_quiet().await;
    public.is_quiet().await;
}
