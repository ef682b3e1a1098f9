//! Writers that only speak SQL: a shell script with psql.

use std::process::Stdio;

use tokio::process::Command;

use super::{ANA, admin, join, stage, told, user};
use crate::support::program::clients_of_postgresql;

#[tokio::test(flavor = "multi_thread")]
async fn a_shell_script_raises_an_alert_with_psql_alone_whatever_its_words() {
    let stage = stage("admin_metrics.sql").await;
    let Some(folder) = clients_of_postgresql(&stage.database).await else { return };
    let (mut edda, mut ana) = (join(&stage, &admin()).await, join(&stage, &user(ANA)).await);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/systems/alert.sh");
    let raise = |arguments: &[&str]| {
        let mut command = Command::new(script);
        command
            .args(arguments)
            .env("DATABASE_URL", &stage.database.url)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.env("PATH", format!("{}:/usr/bin:/bin", folder.display()));
        command.output()
    };
    for message in [
        "Disk full",
        "it's \"full\" $HOME `id` \\ :'x' ; drop table system_alerts; --",
        "two\nlines",
        "Größe ✓",
    ] {
        let done = raise(&["critical", message]).await.unwrap();
        assert!(done.status.success() && done.stderr.is_empty(), "{message}: {done:?}");
        assert_eq!(
            told(&stage, &mut edda, "system_alerts", &["severity", "message"]).await,
            [format!("INSERT critical {message}")]
        );
    }
    for wrong in [&["loud", "Disk full"][..], &["critical"], &[], &["critical", "Disk", "full"]] {
        let done = raise(wrong).await.unwrap();
        assert!(!done.status.success() && !done.stderr.is_empty(), "{wrong:?}: {done:?}");
    }
    assert_eq!(told(&stage, &mut edda, "system_alerts", &["message"]).await, [""; 0]);
    assert_eq!(told(&stage, &mut ana, "system_alerts", &["message"]).await, [""; 0]);
}
