//! Connections to PostgreSQL that cannot be had, or are not what they seem.

use std::time::Duration;

use tokio::time::timeout;

use relay::postgres::connect::{Lease, Server};

use crate::support::database::{Database, with_database};
use crate::support::program::output;
use crate::support::{PATIENCE, SECRET};

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_says_why_postgresql_refuses() {
    let database = Database::bare().await;
    let login = database.url.rsplit_once('/').unwrap().1;
    database.run(&format!("create role {login} login")).await;
    let url = database.url.replacen("postgres@", &format!("{login}@"), 1);
    let pool = Server::parse(&url, "test", None).unwrap().pool(1, Duration::from_secs(1)).unwrap();
    for (change, code, is_transient) in [("connection limit 0", "53300", true), ("nologin", "28000", false)] {
        database.run(&format!("alter role {login} {change}")).await;
        let Err(error) = Lease::of(&pool).await else { panic!("{change}: it is let in") };
        assert_eq!((error.code(), error.is_transient()), (Some(code), is_transient));
        assert!(error.to_string().contains(login), "{error}");
        assert_eq!(error.refusal(), None, "this is for nobody's clients");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_not_there_is_to_be_made() {
    let database = Database::bare().await;
    let url = with_database(&database.url, "not_made_yet");
    for command in
        [&["serve", "--jwt-secret", SECRET, "--listen", "127.0.0.1:0"][..], &["install"], &["doctor"]]
    {
        let arguments = [command, &["--database-url", &url]].concat();
        let (code, findings, told) = timeout(PATIENCE, output(&arguments)).await.expect("it ends");
        assert_eq!(code, 1);
        let told = findings + &told;
        assert!(told.contains("createdb") && told.contains(" not_made_yet"), "{command:?}: {told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_setting_that_is_missing_is_named_as_flag_and_as_variable() {
    let database = ["--database-url", "DATABASE_URL"];
    let secret = ["--jwt-secret", "RELAY_JWT_SECRET"];
    for (command, names) in [
        (&["install"][..], &[database][..]),
        (&["doctor"], &[database]),
        (&["watch", "t"], &[database]),
        (&["serve"], &[database, secret, ["--jwks", "RELAY_JWKS"]]),
        (&["token"], &[secret]),
        (&["tail", "t"], &[secret, ["--token", "RELAY_TOKEN"]]),
    ] {
        let (code, _, told) = output(command).await;
        assert_ne!(code, 0);
        for name in names.iter().flatten() {
            assert!(told.contains(name), "{command:?} does not name {name}: {told}");
        }
    }
}
