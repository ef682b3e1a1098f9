//! Admin metrics: a refresh tells the rows that changed, triggers raise alerts, and only admins hear of it.

use serde_json::{Value, json};

use super::{ANA, EDDA, admin, bearer, join, rows, stage, told, user};
use crate::support::eventually;
use crate::support::stage::Stage;

const METRICS: &[&str] = &["total_documents", "total_chunks", "files_completed", "files_failed"];
const ALERT: &[&str] = &["severity", "message"];

/// A stage on which the relay has done what was due at the start.
async fn quiet() -> Stage {
    let stage = stage("admin_metrics.sql").await;
    eventually("the first refreshes", || async {
        let first = "select count(*) from relay.refresh_jobs where rows_changed is not null";
        (stage.database.value(first).await == "2").then_some(())
    })
    .await;
    stage
}

async fn refresh(stage: &Stage) -> String {
    stage.database.value("select refresh_admin_metrics_view()").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_tells_admins_row_by_row_what_changed_and_nothing_else() {
    let stage = quiet().await;
    let (mut edda, mut ana) = (join(&stage, &admin()).await, join(&stage, &user(ANA)).await);
    assert_eq!(refresh(&stage).await, "0");
    assert_eq!(stage.changes(&mut edda).await, [] as [Value; 0]);
    let (days, _) = rows(&stage, &admin(), "table=admin_metrics_by_day", &["day"]).await;
    assert_eq!(days.len(), 14);
    // One new document, one of an old day completed: the totals, and two days of fourteen.
    stage.run("update documents set status = 'completed' where title = 'Document 120'").await;
    stage.run("insert into documents (title, chunks, status) values ('New', 5, 'failed')").await;
    assert_eq!(stage.changes(&mut edda).await, [] as [Value; 0]);
    assert_eq!(refresh(&stage).await, "3");
    let changes = stage.changes(&mut edda).await;
    let lines = |table: &str, columns: &[&str]| -> Vec<String> {
        changes
            .iter()
            .filter(|change| change["table"] == table)
            .map(|change| super::line(change, columns))
            .collect()
    };
    assert_eq!(lines("admin_metrics_view", METRICS), ["UPDATE 121 958 113 1"]);
    let mut by_day = lines("admin_metrics_by_day", &["documents", "completed"]);
    by_day.sort();
    assert_eq!(by_day, ["UPDATE 9 8", "UPDATE 9 9"], "{changes:?}");
    assert_eq!(stage.changes(&mut ana).await, [] as [Value; 0]);
    // A day that is new or gone is an insert or a delete.
    stage.run("update documents set created_at = now() - interval '100 days' where title = 'New'").await;
    refresh(&stage).await;
    stage.run("delete from documents where title = 'New'").await;
    refresh(&stage).await;
    let lines = told(&stage, &mut edda, "admin_metrics_by_day", &["documents"]).await;
    assert!(lines.contains(&"INSERT 1".to_owned()) && lines.contains(&"DELETE".to_owned()), "{lines:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_view_has_the_columns_of_the_page_and_the_list_of_workers() {
    let stage = quiet().await;
    let mut edda = join(&stage, &admin()).await;
    stage.run("update workers set state = 'busy' where name = 'north'").await;
    assert_eq!(refresh(&stage).await, "1");
    let change = stage.changes(&mut edda).await.remove(0);
    let state = |name: &str, state: &str| json!({"name": name, "state": state});
    let workers =
        [state("east", "idle"), state("north", "busy"), state("south", "idle"), state("west", "idle")];
    assert_eq!(change["record"]["workers_real"], json!(workers));
    assert_eq!(super::line(&change, METRICS), "UPDATE 120 953 112 0");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_relay_itself_refreshes_on_the_schedule() {
    let stage = quiet().await;
    let mut edda = join(&stage, &admin()).await;
    stage.run("select relay.refresh_every('admin_metrics_view', '100 milliseconds'); delete from documents where status = 'waiting'").await;
    let change = edda.changes_until(|change| change["table"] == "admin_metrics_view").await.pop().unwrap();
    assert_eq!(change["record"]["total_documents"], 112);
}

#[tokio::test(flavor = "multi_thread")]
async fn alerts_are_raised_by_the_data_and_by_any_writer_and_only_admins_hear_them() {
    let stage = quiet().await;
    let (mut edda, mut ana) = (join(&stage, &admin()).await, join(&stage, &user(ANA)).await);
    for (statement, expected) in [
        // No application code: triggers.
        (
            "update documents set status = 'failed' where id = 7",
            vec!["INSERT warning Document 7 could not be read"],
        ),
        // Failed already, and no status at all.
        (
            "update documents set status = 'failed', chunks = 0 where id = 7; update documents set title = title",
            vec![],
        ),
        // One alert, however many rows.
        (
            "update documents set status = 'failed' where id between 100 and 111",
            vec!["INSERT warning 12 documents could not be read, among them Document 100"],
        ),
        (
            "update workers set state = 'lost' where name in ('east', 'west')",
            vec!["INSERT critical Worker east was lost", "INSERT critical Worker west was lost"],
        ),
        ("update workers set state = 'lost' where name = 'east'", vec![]),
        ("update workers set state = 'idle' where name = 'east'", vec!["INSERT info Worker east is back"]),
        // Taken back with its cause.
        ("begin; update workers set state = 'lost'; rollback", vec![]),
        // Any writer.
        (
            "insert into system_alerts (severity, message) values ('critical', 'Disk full')",
            vec!["INSERT critical Disk full"],
        ),
    ] {
        stage.run(statement).await;
        let mut lines = told(&stage, &mut edda, "system_alerts", ALERT).await;
        lines.sort();
        assert_eq!(lines, expected, "{statement}");
    }
    stage.run("insert into system_logs (message) values ('Nightly import is done')").await;
    assert_eq!(told(&stage, &mut edda, "system_logs", &["message"]).await, ["INSERT Nightly import is done"]);
    assert_eq!(stage.changes(&mut ana).await, [] as [Value; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_is_no_admin_reads_nothing_and_hears_nothing() {
    let stage = quiet().await;
    let tables = ["admin_metrics_view", "admin_metrics_by_day", "system_alerts", "system_logs"];
    for claims in [
        user(ANA),
        json!({"role": "authenticated"}),
        json!({"role": "authenticated", "sub": EDDA, "user_metadata": {"role": "admin"}}),
        json!({"role": "authenticated", "sub": EDDA, "app_metadata": {"role": "administrator"}}),
        json!({"role": "authenticated", "sub": EDDA, "app_metadata": {"role": null}}),
    ] {
        let mut client = join(&stage, &claims).await;
        for table in tables {
            assert_eq!(
                rows(&stage, &claims, &format!("table={table}"), ALERT).await.0,
                [""; 0],
                "{table} {claims}"
            );
        }
        stage.run("insert into documents (title, status) values ('N', 'waiting'); update documents set status = 'failed' where title = 'N'").await;
        assert_ne!(refresh(&stage).await, "0");
        assert_eq!(stage.changes(&mut client).await, [] as [Value; 0], "{claims}");
    }
    for table in tables {
        let binding = json!({"event": "*", "schema": "public", "table": table});
        let answer = stage.answer(&bearer(&json!({"role": "anon"})), binding).await;
        assert!(answer.contains("Please check Realtime is enabled"), "{table}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_begins_with_the_newest_200_alerts_and_goes_on_from_there() {
    let stage = quiet().await;
    stage.run("insert into system_alerts (severity, message) select 'info', 'Alert ' || n from generate_series(1, 300) n").await;
    let newest = "table=system_alerts&order=id.desc&limit=200";
    let (found, cursor) = rows(&stage, &admin(), newest, &["message"]).await;
    assert_eq!((found.len(), found[0].as_str(), found[199].as_str()), (200, "Alert 300", "Alert 101"));
    stage.run("insert into system_alerts (severity, message) values ('info', 'Alert 301')").await;
    let (changes, _) =
        super::poll(&stage, &admin(), "table=system_alerts&event=INSERT", &cursor, &["message"]).await;
    assert_eq!(changes, ["INSERT Alert 301"]);
}
