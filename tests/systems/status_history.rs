//! The status service in SQL: few writes, the last connection decides, the silent go offline, and the history is kept.

use serde_json::json;

use super::{ANA, BEN, GUEST, admin, call, guest, join, one_waits_for_another, rows, stage, told, user};
use crate::support::stage::Stage;

const STATUS: &[&str] = &["username", "isOnline"];
const TABS: [&str; 3] = [
    "11111111-0000-4000-8000-000000000001",
    "11111111-0000-4000-8000-000000000002",
    "11111111-0000-4000-8000-000000000003",
];

async fn connect(stage: &Stage, id: &str, tab: &str) {
    stage.run(&format!("select status_connected('{id}', '{tab}', 'Ana')")).await;
}

async fn active(stage: &Stage, id: &str) -> bool {
    stage.database.value(&format!("select status_active('{id}')")).await == "t"
}

async fn is_online(stage: &Stage, id: &str) -> bool {
    stage.database.value(&format!("select \"isOnline\" from user_status where \"userId\" = '{id}'")).await
        == "t"
}

/// Lets a user have been silent for so long.
async fn silent(stage: &Stage, id: &str, time: &str) {
    stage
        .run(&format!(
            "update user_status set \"lastActiveAt\" = clock_timestamp() - interval '{time}' where \"userId\" = '{id}'"
        ))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_heartbeats_in_a_minute_one_is_written() {
    let stage = stage("status_history.sql").await;
    connect(&stage, ANA, TABS[0]).await;
    let mut ana = join(&stage, &user(ANA)).await;
    // The connect was the write of this minute.
    for _ in 0..10 {
        assert!(!active(&stage, ANA).await);
    }
    silent(&stage, ANA, "61 seconds").await;
    stage.changes(&mut ana).await;
    // Many at once, over connections of their own.
    let sessions = futures_util::future::join_all((0..20).map(|_| stage.database.connect())).await;
    let claims = user(ANA);
    let beats = sessions.iter().map(|session| call(session, &claims, "select heartbeat()"));
    let written = futures_util::future::join_all(beats).await;
    assert_eq!(written.iter().filter(|wrote| wrote.as_deref() == Ok("t")).count(), 1, "{written:?}");
    assert_eq!(told(&stage, &mut ana, "user_status", STATUS).await, ["UPDATE Ana true"]);
    // Offline is never throttled away.
    stage.run("update user_status set \"isOnline\" = false").await;
    assert!(active(&stage, ANA).await && is_online(&stage, ANA).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_is_offline_with_the_last_of_the_connections() {
    let stage = stage("status_history.sql").await;
    let mut ana = join(&stage, &user(ANA)).await;
    for tab in TABS {
        connect(&stage, ANA, tab).await;
    }
    stage.changes(&mut ana).await;
    let close = |tab| format!("select status_disconnected('{ANA}', '{tab}')");
    assert_eq!(stage.database.value(&close(TABS[0])).await, "f");
    // Nor does a connection of another user count, nor one that is closed twice.
    assert_eq!(
        stage.database.value(&format!("select status_disconnected('{BEN}', '{}')", TABS[1])).await,
        "f"
    );
    assert_eq!(stage.database.value(&close(TABS[0])).await, "f");
    // The last two at once: each begins before the other has committed.
    let (one, other) = (stage.database.connect().await, stage.database.connect().await);
    one.batch_execute(&format!("begin; {}", close(TABS[1]))).await.unwrap();
    let second = tokio::spawn(async move {
        let row = other.query_one(&close(TABS[2]), &[]).await.unwrap();
        row.get::<_, bool>(0)
    });
    one_waits_for_another(&stage).await;
    assert!(is_online(&stage, ANA).await);
    one.batch_execute("commit").await.unwrap();
    assert!(second.await.unwrap());
    assert_eq!(told(&stage, &mut ana, "user_status", STATUS).await, ["UPDATE Ana false"]);
    assert_eq!(stage.database.value("select count(*) from user_connections").await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sweep_sets_the_silent_offline_in_one_batch_and_waits_for_no_lock() {
    let stage = stage("status_history.sql").await;
    let busy = "77777777-0000-4000-8000-000000000007";
    for (id, tab) in [(ANA, TABS[0]), (BEN, TABS[1]), (busy, TABS[2])] {
        connect(&stage, id, tab).await;
    }
    let mut ana = join(&stage, &user(ANA)).await;
    silent(&stage, ANA, "301 seconds").await;
    silent(&stage, BEN, "4 minutes").await;
    silent(&stage, busy, "1 hour").await;
    stage.changes(&mut ana).await;
    let holder = stage.database.connect().await;
    holder
        .batch_execute(&format!("begin; select from user_status where \"userId\" = '{busy}' for update"))
        .await
        .unwrap();
    // Waiting would be an error.
    stage.run("set lock_timeout = '10s'").await;
    assert_eq!(stage.database.value("select status_sweep()").await, "1");
    holder.batch_execute("rollback").await.unwrap();
    assert_eq!(told(&stage, &mut ana, "user_status", STATUS).await, ["UPDATE Ana false"]);
    assert!(!is_online(&stage, ANA).await && is_online(&stage, BEN).await && is_online(&stage, busy).await);
    let seen = "select \"lastSeen\" > now() - interval '1 minute' from user_status where username = 'Ana' and not \"isOnline\"";
    assert_eq!(stage.database.value(seen).await, "t");
    assert_eq!(stage.database.value("select status_sweep()").await, "1");
    assert!(!is_online(&stage, busy).await);
    assert_eq!(stage.database.value("select status_sweep()").await, "0");
    // A connection that was only asleep is one again with its next heartbeat.
    assert_eq!(stage.database.value(&format!("select status_active('{ANA}', '{}')", TABS[0])).await, "t");
    assert_eq!(
        stage.database.value(&format!("select status_disconnected('{ANA}', '{}')", TABS[0])).await,
        "t"
    );
    assert_eq!(
        stage.database.value("select maintenance_stats() - '{lastSweepAt,setOffline}'::text[]").await,
        "{\"totalUsers\": 4, \"onlineUsers\": 1, \"maintenanceActive\": true}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_history_has_each_time_online_and_the_seconds_of_each_day() {
    let stage = stage("status_history.sql").await;
    stage.run("truncate user_online_periods").await;
    let mut ana = join(&stage, &user(ANA)).await;
    let states = [true, true, false, false, true, false];
    for online in states {
        stage
            .run(&format!("update user_status set \"isOnline\" = {online} where \"userId\" = '{ANA}'"))
            .await;
    }
    let columns = ["userId", "offlineAt"];
    let lines = told(&stage, &mut ana, "user_online_periods", &columns).await;
    assert_eq!(lines.len(), 4, "{lines:?}");
    assert_eq!(lines[0], format!("INSERT {ANA} null"));
    assert!(lines[1].starts_with(&format!("UPDATE {ANA} 20")), "{lines:?}");
    assert_eq!(lines[2], format!("INSERT {ANA} null"));
    assert!(lines[3].starts_with(&format!("UPDATE {ANA} 20")), "{lines:?}");
    // Over two midnights, and one that ends where the next begins.
    stage
        .run(&format!(
            "truncate user_online_periods;
             insert into user_online_periods (\"userId\", \"onlineAt\", \"offlineAt\") values
               ('{ANA}', '2026-03-01 23:00Z', '2026-03-03 00:30Z'), ('{ANA}', '2026-03-03 00:30Z', '2026-03-03 01:00Z'),
               ('{GUEST}', '2026-03-02 10:00Z', '2026-03-02 10:00:07Z')"
        ))
        .await;
    let session = stage.database.connect().await;
    let days = "select string_agg(left(\"userId\"::text, 1) || ' ' || day || ' ' || seconds, ', ')
                from time_online('2026-02-28', '2026-03-04')";
    let of_ana = "a 2026-03-01 3600, a 2026-03-02 86400, a 2026-03-03 3600";
    for (claims, expected) in [
        (user(ANA), of_ana.to_owned()),
        (guest(GUEST), "f 2026-03-02 7".to_owned()),
        (user(BEN), String::new()),
        (admin(), format!("{of_ana}, f 2026-03-02 7")),
    ] {
        assert_eq!(call(&session, &claims, days).await.unwrap(), expected, "{claims}");
    }
    // What is older than asked for is forgotten, what is open is kept.
    stage
        .run(&format!(
            "insert into user_online_periods (\"userId\", \"onlineAt\") values ('{ANA}', '2026-01-01')"
        ))
        .await;
    assert_eq!(stage.database.value("select maintenance_cleanup('0 seconds')").await, "3");
    assert_eq!(rows(&stage, &user(ANA), "table=user_online_periods", &["offlineAt"]).await.0, ["null"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_service_role_writes_the_status_of_others() {
    let stage = stage("status_history.sql").await;
    let session = stage.database.connect().await;
    let service = json!({"role": "service_role"});
    for statement in [
        format!("select status_connected('{ANA}', '{}', 'Ana')", TABS[0]),
        format!("select status_active('{ANA}')"),
        format!("select status_disconnected('{ANA}', '{}')", TABS[0]),
        "select status_sweep()".to_owned(),
        "select maintenance_stats()".to_owned(),
        "select maintenance_cleanup()".to_owned(),
    ] {
        for claims in [user(BEN), admin(), guest(GUEST)] {
            let refused = call(&session, &claims, &statement).await.unwrap_err();
            assert!(refused.starts_with("42501 permission denied for function"), "{statement}: {refused}");
        }
        call(&session, &service, &statement).await.unwrap();
    }
    // Each for oneself: a user, an anonymous participant, and who has no id at all.
    stage.run("update user_status set \"isOnline\" = false").await;
    for (claims, wrote) in
        [(user(BEN), "f"), (json!({"role": "anon"}), "f"), (user(ANA), "t"), (guest(GUEST), "t")]
    {
        assert_eq!(call(&session, &claims, "select heartbeat()").await.as_deref(), Ok(wrote), "{claims}");
    }
    let online = "select string_agg(username, ' ' order by username) from user_status where \"isOnline\"";
    assert_eq!(stage.database.value(online).await, "Ana Guest");
}
