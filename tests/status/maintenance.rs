//! `/maintenance/…`, for the service role.

use serde_json::{Value, json};

use super::{ask, becomes, id, is_online, maintain, of, socket, stage};
use crate::support::http::request;
use crate::support::{eventually, token};

const ENDPOINTS: [(&str, &str); 5] = [
    ("GET", "stats"),
    ("GET", "status-metrics"),
    ("POST", "status-metrics/reset"),
    ("POST", "user-status"),
    ("POST", "cleanup"),
];

#[tokio::test(flavor = "multi_thread")]
async fn only_the_service_role_is_answered() {
    let stage = stage(|_| {}).await;
    for (method, path) in ENDPOINTS {
        let path = format!("/maintenance/{path}");
        let mut refusals =
            vec![(String::new(), 401), (String::from("authorization: Bearer nonsense\r\n"), 401)];
        for role in ["anon", "authenticated", "postgres"] {
            let token = token(role, Some(&id(1)), json!({"service_role": true}));
            refusals.push((format!("authorization: Bearer {token}\r\n"), 403));
        }
        for (headers, status) in refusals {
            let answer = request(stage.relay.address, method, &path, &headers, b"{}").await;
            assert_eq!(answer.status, status, "{path} {answer:?}");
            assert_eq!(answer.body["success"], false, "{path}");
            assert!(answer.body["error"].is_string(), "{path}");
        }
        let other = if method == "GET" { "POST" } else { "GET" };
        let answer =
            maintain(&stage.relay, other, path.trim_start_matches("/maintenance/"), Value::Null).await;
        assert_eq!((answer.status, &answer.body["success"]), (405, &json!(false)), "{path}");
    }
    assert_eq!(maintain(&stage.relay, "GET", "other", Value::Null).await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn stats_tell_users_and_sweeps() {
    let stage = stage(|settings| settings.status_sweep_ms = Some(200)).await;
    stage.run(&format!("insert into people (id) values ('{}'), ('{}')", id(8), id(9))).await;
    let _client = socket(&stage.relay, 1).await;
    becomes(&stage.database, 1, true).await;
    eventually("a sweep was made", || async {
        let answer = maintain(&stage.relay, "GET", "stats", Value::Null).await;
        assert_eq!((answer.status, &answer.body["success"]), (200, &json!(true)), "{answer:?}");
        let data = &answer.body["data"];
        assert_eq!((&data["onlineUsers"], &data["totalUsers"]), (&json!(1), &json!(3)));
        (data["maintenanceActive"] == true && data["lastSweepAt"].is_string() && data["relays"] == 1)
            .then_some(())
    })
    .await;
    stage.run("select relay.status_off()").await;
    let answer = maintain(&stage.relay, "GET", "stats", Value::Null).await;
    assert_eq!(answer.body["data"]["maintenanceActive"], false, "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_count_from_the_last_reset() {
    let stage = stage(|_| {}).await;
    for _ in 0..4 {
        ask(&stage.relay, &of(1)).await;
    }
    let metrics = async || maintain(&stage.relay, "GET", "status-metrics", Value::Null).await.body;
    let expected = |total, throttled, rate: f64, cache| {
        json!({"success": true, "data": {"totalRequests": total, "throttledRequests": throttled, "throttleRate": rate,
            "failedUpdates": 0, "cacheSize": cache}})
    };
    assert_eq!(metrics().await, expected(4, 3, 75.0, 1));
    let reset = maintain(&stage.relay, "POST", "status-metrics/reset", Value::Null).await;
    assert_eq!((reset.status, &reset.body["success"]), (200, &json!(true)));
    assert_eq!(metrics().await, expected(0, 0, 0.0, 1));
    assert_eq!(stage.relay.figure("relay_status_requests_total"), 4, "what Prometheus reads is not reset");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_of_a_user_is_set() {
    let stage = stage(|_| {}).await;
    stage.run(&format!("insert into people (id) values ('{}')", id(1))).await;
    for online in [true, false] {
        let body = json!({"userId": id(1), "isOnline": online});
        let answer = maintain(&stage.relay, "POST", "user-status", body.clone()).await;
        assert_eq!((answer.status, answer.body), (200, json!({"success": true, "data": body})));
        assert_eq!(is_online(&stage.database, 1).await, Some(online));
    }
    for (body, status) in [
        (Value::Null, 400),
        (json!([]), 400),
        (json!({"userId": id(1)}), 400),
        (json!({"userId": id(1), "isOnline": "true"}), 400),
        (json!({"userId": [id(1)], "isOnline": true}), 400),
        (json!({"userId": "nonsense", "isOnline": true}), 400),
        (json!({"userId": "'; drop table people; --", "isOnline": true}), 400),
        (json!({"userId": id(2), "isOnline": true}), 404),
    ] {
        let answer = maintain(&stage.relay, "POST", "user-status", body.clone()).await;
        assert_eq!((answer.status, &answer.body["success"]), (status, &json!(false)), "{body}: {answer:?}");
        assert!(answer.body["error"].as_str().is_some_and(|why| !why.is_empty()), "{body}");
    }
    let large = json!({"userId": "x".repeat(20_000), "isOnline": true});
    assert_eq!(maintain(&stage.relay, "POST", "user-status", large).await.status, 413);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cleanup_sweeps_at_once() {
    let stage = stage(|settings| {
        settings.status_sweep_ms = Some(3_600_000);
        settings.status_throttle_ms = Some(1);
    })
    .await;
    let stale = format!(
        "insert into people (id, is_online, active) values ('{}', true, now() - interval '1 hour')",
        id(1)
    );
    stage.run(&stale).await;
    ask(&stage.relay, &of(2)).await;
    becomes(&stage.database, 2, true).await;
    let answer = maintain(&stage.relay, "POST", "cleanup", Value::Null).await;
    assert_eq!(answer.body, json!({"success": true, "data": {"setOffline": 1, "cacheEntriesRemoved": 1}}));
    assert_eq!(is_online(&stage.database, 1).await, Some(false));
}
