//! User status: seen by those who share a conversation, from when they do until they do not.

use serde_json::{Value, json};

use super::{ANA, BEN, CHLOE, DEV, EDDA, GUEST, admin, call, guest, join, rows, stage, told, user};
use crate::support::client::Client;
use crate::support::stage::Stage;

const STATUS: &[&str] = &["username", "isOnline"];
const MEMBER: &[&str] = &["conversationId", "userId"];

async fn switch(stage: &Stage, name: &str, online: bool) {
    stage.run(&format!("update user_status set \"isOnline\" = {online} where username = '{name}'")).await;
}

async fn statuses(stage: &Stage, client: &mut Client) -> Vec<String> {
    told(stage, client, "user_status", STATUS).await
}

/// The first letters of the names whose status these claims read by one HTTP call, in order.
async fn seen(stage: &Stage, claims: &Value) -> String {
    let (names, _) = rows(stage, claims, "table=user_status&order=username", &["username"]).await;
    names.iter().map(|name| &name[..1]).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_reaches_those_who_share_a_conversation_and_no_others() {
    let stage = stage("user_status.sql").await;
    let stranger = "99999999-0000-4000-8000-000000000009";
    // A participant's claim does not replace `sub`.
    let disguised = json!({"role": "authenticated", "sub": DEV, "participantId": ANA});
    for (claims, sees) in [
        (user(ANA), "ABC"),
        (user(BEN), "ABDEG"),
        (user(CHLOE), "AC"),
        (user(DEV), "BDEG"),
        (guest(GUEST), "BDEG"),
        (disguised, "BDEG"),
        (user(stranger), ""),
        (guest(stranger), ""),
        // An admin of the dashboard is no participant for it.
        (admin(), "BDEG"),
        (json!({"role": "anon"}), ""),
    ] {
        assert_eq!(seen(&stage, &claims).await, sees, "{claims}");
        let mut client = join(&stage, &claims).await;
        let names = ["Ana", "Ben", "Chloe", "Dev", "Edda", "Guest"];
        for online in [true, false] {
            stage.run(&format!("update user_status set \"isOnline\" = {online}")).await;
            let expected: Vec<String> = names
                .iter()
                .filter(|name| sees.contains(&name[..1]))
                .map(|name| format!("UPDATE {name} {online}"))
                .collect();
            let mut lines = statuses(&stage, &mut client).await;
            lines.sort();
            assert_eq!(lines, expected, "{claims}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_carries_the_fields_of_the_clients_event() {
    let stage = stage("user_status.sql").await;
    let mut ana = join(&stage, &user(ANA)).await;
    switch(&stage, "Chloe", true).await;
    let change = stage.changes(&mut ana).await.remove(0);
    let record = &change["record"];
    assert_eq!(
        (&record["userId"], &record["username"], &record["isOnline"]),
        (&json!(CHLOE), &json!("Chloe"), &json!(true))
    );
    assert!(change["commit_timestamp"].is_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_former_member_hears_no_more_of_the_others_on_a_channel_that_is_open() {
    for (who, statement) in [
        (
            json!({"role": "service_role"}),
            format!("delete from conversation_members where \"userId\" = '{BEN}' and \"conversationId\" = 1"),
        ),
        // By oneself.
        (user(BEN), "delete from conversation_members where \"conversationId\" = 1".to_owned()),
        // Moved elsewhere.
        (
            json!({"role": "service_role"}),
            format!(
                "update conversation_members set \"conversationId\" = 3 where \"userId\" = '{ANA}' and \"conversationId\" = 1; delete from conversation_members where \"userId\" = '{ANA}' and \"conversationId\" = 3"
            ),
        ),
        // The whole conversation.
        (
            json!({"role": "service_role"}),
            "delete from conversation_members where \"conversationId\" = 1".to_owned(),
        ),
    ] {
        let stage = stage("user_status.sql").await;
        let (mut ana, mut ben) = (join(&stage, &user(ANA)).await, join(&stage, &user(BEN)).await);
        switch(&stage, "Ana", false).await;
        assert_eq!(statuses(&stage, &mut ben).await, ["UPDATE Ana false"], "{statement}");
        assert_eq!(statuses(&stage, &mut ana).await, ["UPDATE Ana false"]);
        let session = stage.database.connect().await;
        call(&session, &who, &statement).await.unwrap();
        let gone = told(
            &stage,
            if statement.contains(ANA) { &mut ana } else { &mut ben },
            "conversation_members",
            MEMBER,
        )
        .await;
        assert!(gone.iter().any(|line| line.starts_with("DELETE ")), "{statement}: {gone:?}");
        for online in [true, false] {
            switch(&stage, "Ana", online).await;
            switch(&stage, "Ben", online).await;
        }
        assert_eq!(statuses(&stage, &mut ben).await, ["UPDATE Ben true", "UPDATE Ben false"], "{statement}");
        assert_eq!(statuses(&stage, &mut ana).await, ["UPDATE Ana true", "UPDATE Ana false"], "{statement}");
        assert_eq!(seen(&stage, &user(ANA)).await, "AC", "{statement}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_member_hears_of_the_others_on_a_channel_that_is_open() {
    let stage = stage("user_status.sql").await;
    let (mut chloe, mut guest) = (join(&stage, &user(CHLOE)).await, join(&stage, &guest(GUEST)).await);
    switch(&stage, "Dev", true).await;
    assert_eq!(statuses(&stage, &mut chloe).await, [""; 0]);
    assert_eq!(statuses(&stage, &mut guest).await, ["UPDATE Dev true"]);
    stage.run(&format!("insert into conversation_members values (3, '{CHLOE}')")).await;
    let come = [format!("INSERT 3 {CHLOE}")];
    // The own membership, and the list of the others.
    assert_eq!(told(&stage, &mut chloe, "conversation_members", MEMBER).await, come);
    assert_eq!(told(&stage, &mut guest, "conversation_participants", MEMBER).await, come);
    switch(&stage, "Dev", false).await;
    switch(&stage, "Chloe", true).await;
    assert_eq!(statuses(&stage, &mut chloe).await, ["UPDATE Dev false", "UPDATE Chloe true"]);
    assert_eq!(statuses(&stage, &mut guest).await, ["UPDATE Dev false", "UPDATE Chloe true"]);
    let (list, _) =
        rows(&stage, &user(CHLOE), "table=conversation_participants&filter=conversationId=eq.3", &["userId"])
            .await;
    assert_eq!(list, [BEN, CHLOE, DEV, EDDA, GUEST]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_cannot_become_a_member_or_write_a_status() {
    let stage = stage("user_status.sql").await;
    let session = stage.database.connect().await;
    for claims in [user(CHLOE), guest(GUEST), admin()] {
        for statement in [
            format!("insert into conversation_members values (1, '{CHLOE}')"),
            "update conversation_members set \"conversationId\" = 1".to_owned(),
            format!("insert into conversation_participants values (1, '{CHLOE}')"),
            "delete from conversation_participants".to_owned(),
            "update user_status set \"isOnline\" = true".to_owned(),
            "delete from user_status".to_owned(),
        ] {
            let refused = call(&session, &claims, &statement).await.unwrap_err();
            assert!(refused.starts_with("42501 permission denied"), "{statement}: {refused}");
        }
    }
    call(&session, &user(CHLOE), &format!("delete from conversation_members where \"userId\" = '{ANA}'"))
        .await
        .unwrap();
    assert_eq!(stage.database.value("select count(*) from conversation_members").await, "8");
}
