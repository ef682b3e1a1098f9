//! Chat: a poll that waits is answered by the commit, over any transport by one cursor, for participants alone.

use serde_json::{Value, json};

use super::{
    ANA, BEN, CHLOE, admin, are_open, ask, bearer, call, join, one_waits_for_another, poll, rows, stage,
    told, user,
};
use crate::support::http::Events;
use crate::support::stage::Stage;

const MESSAGE: &[&str] = &["sender_name", "message"];
const MESSAGES: &str = "table=chat_messages&filter=chat_session_id=eq.1";

fn send(text: &str) -> String {
    format!("select send_chat_message(1, '{text}')")
}

/// A session that no test ends by chance, and where Chloe talks with Ben.
async fn chat() -> Stage {
    let stage = stage("chat.sql").await;
    stage
        .run(&format!(
            "insert into chat_sessions (title) values ('Other');
             insert into chat_participants values (2, '{CHLOE}', 'user', 'Chloe'), (2, '{BEN}', 'consultant', 'Ben')"
        ))
        .await;
    stage
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poll_that_waits_is_answered_by_the_commit_and_with_what_was_committed() {
    let stage = chat().await;
    let session = stage.database.connect().await;
    let (before, cursor) = rows(&stage, &user(ANA), MESSAGES, MESSAGE).await;
    assert_eq!(before, ["Ben How can I help?"]);
    let ana = user(ANA);
    let waiting = ask_since(&stage, &ana, &cursor);
    let writing = async {
        are_open(&stage, 1).await;
        session
            .batch_execute(&format!(
                "begin; set local role authenticated; set local request.jwt.claims = '{}'",
                user(BEN)
            ))
            .await
            .unwrap();
        session.batch_execute(&send("taken back")).await.unwrap();
        session.batch_execute("rollback").await.unwrap();
        call(&session, &user(BEN), &send("Hello Ana")).await.unwrap()
    };
    let (body, sent) = tokio::join!(waiting, writing);
    let sent: Value = serde_json::from_str(&sent).unwrap();
    let [change] = body["changes"].as_array().unwrap().as_slice() else { panic!("{body}") };
    assert_eq!(sent, json!({"success": true, "messageId": change["record"]["id"]}));
    let mut record = change["record"].clone();
    assert!(record["created_at"].take().is_string() && record["id"].take().is_u64());
    assert_eq!(
        record,
        json!({"id": null, "chat_session_id": 1, "sender_type": "consultant", "sender_id": BEN, "sender_name": "Ben",
               "message": "Hello Ana", "created_at": null, "is_read": false})
    );
}

async fn ask_since(stage: &Stage, claims: &Value, cursor: &str) -> Value {
    ask(stage, claims, &format!("{MESSAGES}&since={cursor}")).await.body
}

#[tokio::test(flavor = "multi_thread")]
async fn hundreds_of_polls_are_answered_by_one_message_each_once() {
    let stage = chat().await;
    let session = stage.database.connect().await;
    let (_, cursor) = rows(&stage, &user(ANA), MESSAGES, MESSAGE).await;
    let (_, of_ben) = rows(&stage, &user(BEN), MESSAGES, MESSAGE).await;
    let polls = (0..300).map(|n| {
        let (claims, cursor) = if n % 2 == 0 { (user(ANA), &cursor) } else { (user(BEN), &of_ben) };
        let stage = &stage;
        async move { poll(stage, &claims, MESSAGES, cursor, MESSAGE).await.0 }
    });
    let writing = async {
        are_open(&stage, 300).await;
        call(&session, &user(ANA), &send("to all")).await.unwrap();
    };
    let (answers, ()) = tokio::join!(futures_util::future::join_all(polls), writing);
    assert!(answers.iter().all(|answer| answer == &["INSERT Ana to all"]), "{answers:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_is_no_participant_sees_and_writes_nothing() {
    let stage = chat().await;
    let session = stage.database.connect().await;
    for claims in [user(CHLOE), admin(), json!({"role": "authenticated"})] {
        let (found, cursor) = rows(&stage, &claims, MESSAGES, MESSAGE).await;
        assert_eq!(found, [""; 0], "{claims}");
        let mut client = join(&stage, &claims).await;
        call(&session, &user(ANA), &send("secret")).await.unwrap();
        for statement in [
            send("me, too"),
            "select end_chat_session(1)".to_owned(),
            format!(
                "insert into chat_messages (chat_session_id, sender_type, sender_id, sender_name, message) values (1, 'user', '{ANA}', 'Ana', 'x')"
            ),
            format!("insert into chat_participants values (1, '{CHLOE}', 'user', 'Chloe')"),
            "update chat_messages set message = 'x'".to_owned(),
        ] {
            let refused = call(&session, &claims, &statement).await.unwrap_err();
            assert!(refused.starts_with("42501 "), "{statement}: {refused}");
        }
        assert_eq!(
            call(&session, &claims, "select get_chat_messages(1)").await.unwrap(),
            "{\"session\": null, \"messages\": [], \"longPolling\": false}"
        );
        assert_eq!(stage.changes(&mut client).await, [] as [Value; 0], "{claims}");
        assert_eq!(
            poll(&stage, &claims, &format!("{MESSAGES}&wait=0"), &cursor, MESSAGE).await.0,
            [""; 0],
            "{claims}"
        );
    }
    for wrong in ["", &"x".repeat(4001)] {
        let refused = call(&session, &user(ANA), &send(wrong)).await.unwrap_err();
        assert!(refused.starts_with("23514 "), "{refused}");
    }
    let anon = call(&session, &json!({"role": "anon"}), &send("x")).await.unwrap_err();
    assert!(anon.starts_with("42501 "), "{anon}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_former_participant_hears_no_more_though_a_poll_waits() {
    let stage = chat().await;
    let session = stage.database.connect().await;
    let mut ben = join(&stage, &user(BEN)).await;
    let (_, cursor) = rows(&stage, &user(BEN), MESSAGES, MESSAGE).await;
    let limited = format!("{MESSAGES}&wait=3");
    let claims = user(BEN);
    let waiting = poll(&stage, &claims, &limited, &cursor, MESSAGE);
    let writing = async {
        are_open(&stage, 2).await;
        stage
            .run(&format!("delete from chat_participants where chat_session_id = 1 and user_id = '{BEN}'"))
            .await;
        call(&session, &user(ANA), &send("between us")).await.unwrap();
    };
    let ((changes, cursor), ()) = tokio::join!(waiting, writing);
    assert_eq!(changes, [""; 0]);
    let heard = stage.changes(&mut ben).await;
    let [gone] = heard.as_slice() else { panic!("{heard:?}") };
    assert_eq!((&gone["table"], &gone["type"]), (&json!("chat_participants"), &json!("DELETE")));
    // The other session goes on, and so does this one when Ben is back.
    call(&session, &user(CHLOE), "select send_chat_message(2, 'elsewhere')").await.unwrap();
    assert_eq!(told(&stage, &mut ben, "chat_messages", MESSAGE).await, ["INSERT Chloe elsewhere"]);
    stage.run(&format!("insert into chat_participants values (1, '{BEN}', 'consultant', 'Ben')")).await;
    call(&session, &user(ANA), &send("again")).await.unwrap();
    assert_eq!(poll(&stage, &user(BEN), MESSAGES, &cursor, MESSAGE).await.0, ["INSERT Ana again"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_changes_between_poll_and_stream_misses_nothing_and_has_nothing_twice() {
    let stage = chat().await;
    let session = stage.database.connect().await;
    let (_, mut cursor) = rows(&stage, &user(ANA), MESSAGES, MESSAGE).await;
    let path = format!("/realtime/v1/changes?{MESSAGES}&apikey={}", bearer(&user(ANA)));
    for round in 0..3 {
        call(&session, &user(BEN), &send(&format!("a{round}"))).await.unwrap();
        let (changes, next) = poll(&stage, &user(ANA), MESSAGES, &cursor, MESSAGE).await;
        assert_eq!(changes, [format!("INSERT Ben a{round}")]);
        call(&session, &user(BEN), &send(&format!("b{round}"))).await.unwrap();
        call(&session, &user(ANA), &send(&format!("c{round}"))).await.unwrap();
        let mut stream = Events::open(stage.relay.address, &path, Some(&next)).await;
        for expected in [format!("INSERT Ben b{round}"), format!("INSERT Ana c{round}")] {
            let event = stream.next().await.unwrap();
            assert_eq!(super::line(&event.data, MESSAGE), expected);
            cursor = event.id;
        }
    }
    // A client that asks every few seconds reads the same.
    let (found, _) = rows(&stage, &user(ANA), &format!("{MESSAGES}&order=id"), &["id"]).await;
    let asked =
        call(&session, &user(ANA), &format!("select get_chat_messages(1, {})", found[7])).await.unwrap();
    let asked: Value = serde_json::from_str(&asked).unwrap();
    let ids: Vec<String> =
        asked["messages"].as_array().unwrap().iter().map(|message| message["id"].to_string()).collect();
    assert_eq!(ids, found[8..]);
    assert_eq!(asked["session"], json!({"status": "active", "duration_minutes": 0, "total_cost": 0.0}));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_session_is_told_with_what_it_costs_and_ends_the_writing() {
    let stage = chat().await;
    let (session, other) = (stage.database.connect().await, stage.database.connect().await);
    stage.run("update chat_sessions set started_at = now() - interval '9.5 minutes' where id = 1").await;
    let (mut ana, mut chloe) = (join(&stage, &user(ANA)).await, join(&stage, &user(CHLOE)).await);
    // A message whose transaction is open holds up the end, and is before it.
    session
        .batch_execute(&format!(
            "begin; set local role authenticated; set local request.jwt.claims = '{}'; {}",
            user(ANA),
            send("last")
        ))
        .await
        .unwrap();
    let ending = tokio::spawn(async move { call(&other, &user(BEN), "select end_chat_session(1)").await });
    one_waits_for_another(&stage).await;
    session.batch_execute("commit").await.unwrap();
    let ended: Value = serde_json::from_str(&ending.await.unwrap().unwrap()).unwrap();
    assert_eq!(ended, json!({"status": "ended", "duration_minutes": 10, "total_cost": 15.0}));
    let changes = stage.changes(&mut ana).await;
    let lines: Vec<String> = changes
        .iter()
        .map(|change| super::line(change, &["message", "status", "duration_minutes", "total_cost"]))
        .collect();
    assert_eq!(lines, ["INSERT last", "UPDATE ended 10 15.0"]);
    assert_eq!(stage.changes(&mut chloe).await, [] as [Value; 0]);
    for (claims, statement) in
        [(user(ANA), send("too late")), (user(BEN), "select end_chat_session(1)".to_owned())]
    {
        let refused = call(&session, &claims, &statement).await.unwrap_err();
        assert_eq!(refused, "42501 the caller has no active chat session 1");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_marks_what_others_wrote_and_the_writer_sees_it() {
    let stage = chat().await;
    let session = stage.database.connect().await;
    let mut ben = join(&stage, &user(BEN)).await;
    call(&session, &user(ANA), &send("mine")).await.unwrap();
    stage.changes(&mut ben).await;
    call(&session, &user(ANA), "update chat_messages set is_read = true").await.unwrap();
    let lines = told(&stage, &mut ben, "chat_messages", &["message", "is_read"]).await;
    assert_eq!(lines, ["UPDATE How can I help? true"]);
}
