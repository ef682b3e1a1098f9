//! Agent access: what an admin switches is seen at once by the user and by admins, by no others; and is audited.

use serde_json::json;

use super::{ANA, BEN, EDDA, admin, are_open, bearer, call, join, poll, rows, stage, told, user};

const COLUMNS: &[&str] = &["agent", "enabled"];

fn set(id: &str, agents: &str) -> String {
    format!("select set_agent_access('{id}', '{{\"agents\": {agents}}}')")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_switched_is_told_to_its_user_and_to_admins_and_to_no_others() {
    let stage = stage("agent_access.sql").await;
    let (mut ana, mut ben) = (join(&stage, &user(ANA)).await, join(&stage, &user(BEN)).await);
    let mut edda = join(&stage, &admin()).await;
    let session = stage.database.connect().await;
    for (agents, expected) in [
        ("{\"web\": false}", vec!["UPDATE web false (web true)"]),
        // Of two agents in one call, one is off already.
        (
            "{\"x\": false, \"code\": false, \"web\": false}",
            vec!["UPDATE code false (code true)", "UPDATE x false (x true)"],
        ),
        ("{\"web\": true}", vec!["UPDATE web true (web false)"]),
        ("{\"web\": true}", vec![]),
    ] {
        call(&session, &admin(), &set(ANA, agents)).await.unwrap();
        assert_eq!(told(&stage, &mut ana, "agent_access", COLUMNS).await, expected);
        assert_eq!(told(&stage, &mut edda, "agent_access", COLUMNS).await, expected);
        assert_eq!(stage.changes(&mut ben).await, [] as [serde_json::Value; 0]);
    }
    stage.run(&format!("delete from agent_access where user_id = '{ANA}' and agent = 'web'")).await;
    assert_eq!(told(&stage, &mut ana, "agent_access", COLUMNS).await, ["DELETE (web true)"]);
    assert_eq!(stage.changes(&mut ben).await, [] as [serde_json::Value; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_an_admin_of_the_token_switches_agents_or_sees_those_of_others() {
    let stage = stage("agent_access.sql").await;
    let session = stage.database.connect().await;
    let all = "select count(*) || ' ' || bool_and(enabled) from agent_access";
    let others = [
        user(BEN),
        // What a user may write about oneself is no right, nor is what only looks like the claim.
        json!({"role": "authenticated", "sub": BEN, "user_metadata": {"role": "admin"}}),
        json!({"role": "authenticated", "sub": BEN, "app_metadata": {"role": "Admin"}}),
        json!({"role": "authenticated", "sub": BEN, "app_metadata": {"role": ["admin"]}}),
        json!({"role": "authenticated", "sub": BEN, "app_metadata": "admin"}),
        json!({"role": "authenticated"}),
    ];
    for claims in &others {
        let mut client = join(&stage, claims).await;
        for id in [ANA, BEN] {
            let refused = call(&session, claims, &set(id, "{\"web\": false}")).await.unwrap_err();
            assert!(refused.starts_with("42501 new row violates row-level security"), "{claims}: {refused}");
            for hidden in ["update agent_access set enabled = false", "delete from agent_access"] {
                call(&session, claims, &format!("{hidden} where user_id = '{id}'")).await.unwrap();
            }
        }
        assert_eq!(stage.database.value(all).await, "8 true", "{claims}");
        let own = if claims["sub"] == BEN { 4 } else { 0 };
        let (found, _) = rows(&stage, claims, "table=agent_access", &["user_id"]).await;
        assert_eq!(found, vec![BEN.to_owned(); own], "{claims}");
        assert_eq!(rows(&stage, claims, "table=agent_access_audit", COLUMNS).await.0, [""; 0], "{claims}");
        call(&session, &admin(), &set(ANA, "{\"image\": false}")).await.unwrap();
        call(&session, &admin(), &set(ANA, "{\"image\": true}")).await.unwrap();
        assert_eq!(stage.changes(&mut client).await, [] as [serde_json::Value; 0], "{claims}");
    }
    let refused = call(&session, &json!({"role": "anon"}), &set(ANA, "{\"web\": false}")).await.unwrap_err();
    assert!(refused.starts_with("42501 permission denied for function"), "{refused}");
    let binding = json!({"event": "*", "schema": "public", "table": "agent_access"});
    let answer = stage.answer(&bearer(&json!({"role": "anon"})), binding).await;
    assert!(answer.contains("Please check Realtime is enabled"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_wrong_is_refused_whole() {
    let stage = stage("agent_access.sql").await;
    let session = stage.database.connect().await;
    for (body, told) in [
        ("{}", "22023 the body has no object \"agents\""),
        ("[]", "22023 the body has no object"),
        ("null", "22023 the body has no object"),
        ("{\"agents\": []}", "22023 the body has no object"),
        ("{\"agents\": {\"web\": false, \"x\": \"off\"}}", "22023 each agent is true or false"),
        ("{\"agents\": {\"web\": false, \"x\": null}}", "22023 each agent is true or false"),
        ("{\"agents\": {\"web\": false, \"nowhere\": false}}", "23503 "),
    ] {
        let statement = format!("select set_agent_access('{ANA}', '{body}')");
        let refused = call(&session, &admin(), &statement).await.unwrap_err();
        assert!(refused.starts_with(told), "{body}: {refused}");
    }
    let nothing = "select (select count(*) from agent_access where not enabled) + (select count(*) from agent_access_audit where before is not null)";
    assert_eq!(stage.database.value(nothing).await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_without_a_socket_or_who_was_away_hears_the_same_by_poll() {
    let stage = stage("agent_access.sql").await;
    let (before, cursor) = rows(&stage, &user(ANA), "table=agent_access", COLUMNS).await;
    assert_eq!(before, ["code true", "image true", "web true", "x true"]);
    let (_, of_ben) = rows(&stage, &user(BEN), "table=agent_access", COLUMNS).await;
    let ana = user(ANA);
    let waiting = poll(&stage, &ana, "table=agent_access", &cursor, COLUMNS);
    let session = stage.database.connect().await;
    let switching = async {
        are_open(&stage, 1).await;
        call(&session, &admin(), &set(ANA, "{\"web\": false, \"x\": false}")).await.unwrap();
    };
    let ((changes, cursor), ()) = tokio::join!(waiting, switching);
    assert_eq!(changes, ["UPDATE web false (web true)", "UPDATE x false (x true)"]);
    // Away: what happened meanwhile, and nothing twice.
    call(&session, &admin(), &set(ANA, "{\"web\": true}")).await.unwrap();
    call(&session, &admin(), &set(BEN, "{\"web\": false}")).await.unwrap();
    call(&session, &admin(), &set(ANA, "{\"code\": false}")).await.unwrap();
    let (mut changes, mut cursor) = (Vec::new(), cursor);
    // An answer has what is visible at its moment, at least one change.
    while changes.len() < 2 {
        let (next, after) = poll(&stage, &ana, "table=agent_access", &cursor, COLUMNS).await;
        changes.extend(next);
        cursor = after;
    }
    assert_eq!(changes, ["UPDATE web true (web false)", "UPDATE code false (code true)"]);
    assert_eq!(poll(&stage, &user(ANA), "table=agent_access&wait=0", &cursor, COLUMNS).await.0, [""; 0]);
    let (changes, _) = poll(&stage, &user(BEN), "table=agent_access", &of_ben, COLUMNS).await;
    assert_eq!(changes, ["UPDATE web false (web true)"]);
    // After a reload the rows say the same.
    let (after, _) = rows(&stage, &user(ANA), "table=agent_access", COLUMNS).await;
    assert_eq!(after, ["code false", "image true", "web true", "x false"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_audit_says_who_changed_what_and_only_that_which_was_changed() {
    let stage = stage("agent_access.sql").await;
    let (mut edda, mut ana) = (join(&stage, &admin()).await, join(&stage, &user(ANA)).await);
    let session = stage.database.connect().await;
    call(&session, &admin(), &set(ANA, "{\"web\": false, \"code\": true}")).await.unwrap();
    call(&session, &user(ANA), &set(ANA, "{\"web\": true}")).await.unwrap_err();
    stage.run("begin; update agent_access set enabled = false; rollback").await;
    stage.run(&format!("update agent_access set enabled = true where user_id = '{ANA}'")).await;
    stage.run(&format!("update agent_access set agent = 'web2' where false; delete from agent_access where user_id = '{ANA}' and agent = 'x'")).await;
    stage.run(&format!("insert into agent_access values ('{ANA}', 'x', false)")).await;
    stage
        .run(&format!("update agent_access set user_id = '{EDDA}' where user_id = '{ANA}' and agent = 'x'"))
        .await;
    let columns = ["user_id", "agent", "before", "after", "changed_by"];
    let lines = told(&stage, &mut edda, "agent_access_audit", &columns).await;
    assert_eq!(
        lines,
        [
            format!("INSERT {ANA} web true false {EDDA}"),
            format!("INSERT {ANA} web false true postgres"),
            format!("INSERT {ANA} x true null postgres"),
            format!("INSERT {ANA} x null false postgres"),
            format!("INSERT {ANA} x false null postgres"),
            format!("INSERT {EDDA} x null false postgres"),
        ]
    );
    assert_eq!(told(&stage, &mut ana, "agent_access_audit", &columns).await, [""; 0]);
    for statement in [
        "insert into agent_access_audit (user_id, agent, changed_by, changed_at) values (auth.uid(), 'web', 'me', now())",
        "update agent_access_audit set changed_by = 'me'",
        "delete from agent_access_audit",
        "truncate agent_access_audit",
    ] {
        for claims in [admin(), user(ANA), json!({"role": "service_role"})] {
            let refused = call(&session, &claims, statement).await.unwrap_err();
            assert!(refused.starts_with("42501 permission denied"), "{claims}: {refused}");
        }
    }
}
