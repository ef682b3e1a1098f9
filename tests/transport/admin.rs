//! The admin port, and who else may read the metrics.

use std::net::SocketAddr;

use serde_json::json;

use crate::support::http::{get, metrics_path, text};
use crate::support::stage::Stage;
use crate::support::{ANN, token};

async fn with_admin_port() -> (Stage, SocketAddr) {
    let admin = Some("127.0.0.1:0".to_owned());
    let stage = Stage::with("", |settings, _| settings.admin_listen = admin).await;
    let address = stage.relay.admin_address.unwrap();
    (stage, address)
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_for_the_service_role_and_for_the_admin_port() {
    let (stage, admin) = with_admin_port().await;
    let service = token("service_role", None, json!({}));
    let ann = token("authenticated", Some(ANN), json!({}));
    for (path, headers, status) in [
        ("/metrics", String::new(), 401),
        ("/metrics?apikey=nonsense", String::new(), 401),
        ("/metrics", format!("authorization: Bearer {ann}\r\n"), 403),
        ("/metrics", format!("authorization: Bearer {service}\r\n"), 200),
        ("/metrics", format!("authorization: Bearer {service}\r\norigin: https://evil.example\r\n"), 200),
    ] {
        let answer = get(stage.relay.address, path, &headers).await;
        assert_eq!(answer.status, status, "{path} {headers}: {answer:?}");
        assert_eq!(answer.head.contains("openmetrics"), status == 200, "{answer:?}");
    }
    let refused = get(stage.relay.address, "/metrics", &format!("authorization: Bearer {ann}\r\n")).await;
    assert!(refused.body.to_string().contains("--admin-listen"), "{refused:?}");
    for address in [admin, stage.relay.address] {
        let path = if address == admin { "/metrics".to_owned() } else { metrics_path() };
        let (status, metrics) = text(address, &path).await;
        assert_eq!(status, 200, "{metrics}");
        for name in ["relay_build_info{version=", "process_cpu_seconds_total ", "relay_source_up "] {
            assert!(metrics.lines().any(|line| line.starts_with(name)), "{name}: {metrics}");
        }
        assert!(metrics.ends_with("# EOF\n") && metrics.matches("# EOF").count() == 1, "{metrics}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_port_has_nothing_of_clients() {
    let (_stage, admin) = with_admin_port().await;
    for (path, status) in [
        ("/livez", 200),
        ("/healthcheck", 200),
        ("/readyz", 200),
        ("/realtime/v1/changes?table=marker", 404),
        ("/realtime/v1/websocket", 404),
        ("/realtime/v1/explain", 404),
        ("/", 404),
    ] {
        let (answered, body) = text(admin, path).await;
        assert_eq!(answered, status, "{path}: {body}");
    }
    let posted = crate::support::http::post(admin, "/metrics", "", b"{}").await;
    assert_eq!(posted.status, 405);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_counted_by_status() {
    let (stage, admin) = with_admin_port().await;
    for path in ["/nowhere", "/nowhere", "/realtime/v1/changes"] {
        text(stage.relay.address, path).await;
    }
    let (_, metrics) = text(admin, "/metrics").await;
    for (status, count) in [(404, 2), (401, 1)] {
        let line = format!("relay_http_responses_total{{status=\"{status}\"}} {count}");
        assert!(metrics.lines().any(|one| one == line), "{line}: {metrics}");
    }
}
