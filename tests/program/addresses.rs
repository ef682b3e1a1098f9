//! Database addresses as people have them, against a server that asks for passwords and speaks TLS; and what is said to
//! those whom it does not let in.

use std::process::Output;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::time::timeout;
use tokio_postgres::Client as Session;

use relay::postgres::connect::pool::{Error, Server};
use relay::postgres::locks::Lock;

use crate::delivery::crash::{Cluster, reconnected};
use crate::program::cli::line_with;
use crate::support::database::{connect, with_database};
use crate::support::http::text;
use crate::support::program::{output, relay};
use crate::support::{PATIENCE, SECRET, eventually};

const AUTHORITY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/tls/authority.pem");
const CERTIFICATE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/tls/localhost.pem");
const PASSWORD: &str = "p@ss/w:rd?#%'";
/// The same in a URL.
const ENCODED: &str = "p%40ss%2Fw%3Ard%3F%23%25'";

/// Who may come in how. The first line is the tests' own.
const RULES: &str = "
    host all postgres 127.0.0.1/32 trust
    host relay all 127.0.0.1/32 trust
    local all system_user_of_this_name peer
    hostssl all with_tls 127.0.0.1/32 scram-sha-256
    hostnossl all without_tls 127.0.0.1/32 scram-sha-256
    host all owner 127.0.0.1/32 scram-sha-256
    host all owner ::1/128 scram-sha-256
    host all nobody 127.0.0.1/32 scram-sha-256
    local all all scram-sha-256";

/// A server with the database `app`, whose owner is no superuser and has a password.
pub struct Guarded {
    /// It, as its superuser sees it.
    pub cluster: Cluster,
    admin: Session,
    port: String,
    /// The folder of its Unix socket.
    socket: String,
}

impl Guarded {
    /// A fresh one.
    pub async fn start() -> Self {
        let cluster = Cluster::start(&["-c", "fsync=off"]).await;
        let admin = connect(&cluster.url).await;
        for role in ["owner", "with_tls", "without_tls", "system_user_of_this_name"] {
            let role = format!("create role {role} login createrole password $p${PASSWORD}$p$");
            admin.batch_execute(&role).await.unwrap();
        }
        admin.batch_execute("create database app owner owner").await.unwrap();
        let put = async |bytes: &[u8], file: &str| {
            let write = format!("base64 -d > {file} && chmod 600 {file}");
            let copy = format!("copy (select '{}') to program '{write}'", STANDARD.encode(bytes));
            admin.batch_execute(&copy).await.unwrap();
        };
        put(&std::fs::read(CERTIFICATE).unwrap(), "server.pem").await;
        put(RULES.as_bytes(), "pg_hba.conf").await;
        for setting in ["ssl = on", "ssl_cert_file = 'server.pem'", "ssl_key_file = 'server.pem'"] {
            admin.batch_execute(&format!("alter system set {setting}")).await.unwrap();
        }
        cluster.stop("stop");
        cluster.restart(&["-c", "fsync=off"]);
        let admin = reconnected(&cluster.url).await;
        let shown = async |name: &str| {
            let value = admin.query_one("select current_setting($1)", &[&name]).await.unwrap();
            value.get::<_, String>(0)
        };
        let (port, socket) = (shown("port").await, shown("unix_socket_directories").await);
        assert_eq!(shown("ssl").await, "on");
        Self { cluster, admin, port, socket }
    }

    /// What stands for the port and the folder of the socket, filled in; `%SOCKET` is the latter percent-encoded.
    pub fn filled(&self, text: &str) -> String {
        let encoded = self.socket.replace('/', "%2F");
        text.replace("PASSWORD", ENCODED)
            .replace("%SOCKET", &encoded)
            .replace("SOCKET", &self.socket)
            .replace("PORT", &self.port)
    }
}

/// The user of a connection, and whether it is encrypted.
async fn who(url: &str, authority: Option<&str>) -> Result<(String, bool), Error> {
    let server = Server::parse(url, "test", authority)?;
    let client = server.connect().await?;
    let who = "select session_user || ' of ' || current_database(), coalesce((select ssl from pg_stat_ssl \
               where pid = pg_backend_pid()), false)";
    let row = client.query_one(who, &[]).await.unwrap();
    // By a pool, too, which connects by itself.
    let pooled = server.pool(1, Duration::from_secs(10))?.get().await.unwrap();
    let again = pooled.query_one(who, &[]).await.unwrap();
    assert_eq!(row.get::<_, &str>(0), again.get::<_, &str>(0));
    assert_eq!(row.get::<_, bool>(1), again.get::<_, bool>(1));
    Ok((row.get(0), row.get(1)))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_way_of_writing_an_address_reaches_the_database() {
    let server = Guarded::start().await;
    for address in [
        "postgres://owner:PASSWORD@127.0.0.1:PORT/app",
        "postgresql://owner:PASSWORD@localhost:PORT/app",
        "postgres:///app?host=SOCKET&port=PORT&user=owner&password=PASSWORD",
        "postgres://owner:PASSWORD@%SOCKET:PORT/app",
        "postgres://owner:PASSWORD@:PORT/app?host=SOCKET",
        "postgres://owner:PASSWORD@%SOCKET:PORT/app?sslmode=require",
        "postgres://owner:PASSWORD@%SOCKET:PORT/app?sslmode=verify-full",
        "host=SOCKET port=PORT dbname=app user=owner password='p@ss/w:rd?#%\\''",
        "host = 127.0.0.1  port = PORT  dbname = app  user = owner  password = p@ss/w:rd?#%\\'",
        "hostaddr=127.0.0.1 port=PORT dbname=app user=owner password=p@ss/w:rd?#%\\' sslmode=require",
        "postgres://owner:PASSWORD@127.0.0.1:1,127.0.0.1:PORT/app",
        "postgres://owner:PASSWORD@%2Fnowhere:PORT,127.0.0.1:PORT/app",
        "postgres://owner:PASSWORD@127.0.0.1:PORT/app?schema=public&pgbouncer=true&connection_limit=1&pool_timeout=0",
        "postgres://owner:PASSWORD@127.0.0.1:PORT/app?application_name=x&options=-c%20geqo%3Doff&connect_timeout=9",
        "postgres://owner:PASSWORD@localhost:PORT/app?sslmode=require&channel_binding=require",
        "postgres://owner:PASSWORD@127.0.0.1:PORT/app?target_session_attrs=read-write&tcp_user_timeout=9000",
    ] {
        let url = server.filled(address);
        let found = who(&url, None).await.unwrap_or_else(|error| panic!("{address}: {error}"));
        assert_eq!(found.0, "owner of app", "{address}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_sslmode_encrypts_and_verifies_as_libpq_does() {
    let server = Guarded::start().await;
    // The certificate is for localhost.
    for (user, host, query, expected) in [
        ("owner", "127.0.0.1", String::new(), Ok(true)),
        ("owner", "127.0.0.1", "sslmode=disable".into(), Ok(false)),
        ("owner", "127.0.0.1", "sslmode=allow".into(), Ok(false)),
        ("owner", "127.0.0.1", "sslmode=prefer".into(), Ok(true)),
        ("owner", "127.0.0.1", "sslmode=require".into(), Ok(true)),
        ("owner", "127.0.0.1", format!("sslmode=require&sslrootcert={AUTHORITY}"), Ok(true)),
        ("owner", "127.0.0.1", format!("sslmode=verify-ca&sslrootcert={AUTHORITY}"), Ok(true)),
        ("owner", "127.0.0.1", format!("sslmode=verify-full&sslrootcert={AUTHORITY}"), Err("other names")),
        ("owner", "localhost", format!("sslmode=verify-full&sslrootcert={AUTHORITY}"), Ok(true)),
        // The server's own certificate may be what is trusted.
        ("owner", "localhost", format!("sslmode=verify-full&sslrootcert={CERTIFICATE}"), Ok(true)),
        ("owner", "127.0.0.1", format!("sslmode=verify-full&sslrootcert={CERTIFICATE}"), Err("other names")),
        ("owner", "localhost", "sslmode=verify-full".into(), Err("sslrootcert=FILE")),
        ("owner", "localhost", "sslmode=verify-ca".into(), Err("sslrootcert=FILE")),
        ("owner", "localhost", "sslrootcert=system".into(), Err("sslrootcert=FILE")),
        ("owner", "localhost", "sslmode=verify-full&sslrootcert=/nowhere.pem".into(), Err("/nowhere.pem")),
        ("with_tls", "127.0.0.1", "sslmode=disable".into(), Err("sslmode=require")),
        ("with_tls", "127.0.0.1", "sslmode=allow".into(), Ok(true)),
        ("without_tls", "127.0.0.1", "sslmode=prefer".into(), Ok(false)),
        ("without_tls", "127.0.0.1", "sslmode=require".into(), Err("pg_hba.conf")),
        ("owner", "127.0.0.1", "sslmode=disable&channel_binding=require".into(), Err("channel_binding")),
    ] {
        let url = server.filled(&format!("postgres://{user}:PASSWORD@{host}:PORT/app?{query}"));
        let found = who(&url, None).await;
        match (found, expected) {
            (Ok((_, encrypted)), Ok(expected)) => assert_eq!(encrypted, expected, "{user} {host} {query}"),
            (Err(error), Err(cure)) => {
                assert!(error.to_string().contains(cure), "{user} {host} {query}: {error}");
                assert!(!error.is_transient(), "{user} {host} {query}: {error}");
            }
            (found, _) => panic!("{user} {host} {query}: {found:?}"),
        }
    }
    // Our own setting stands for both, the authority and the name.
    for (host, is_let_in) in [("localhost", true), ("127.0.0.1", false)] {
        let url = server.filled(&format!("postgres://owner:PASSWORD@{host}:PORT/app"));
        assert_eq!(who(&url, Some(AUTHORITY)).await.is_ok(), is_let_in, "{host}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_tls_is_told_apart_from_one_that_is_away() {
    let cluster = Cluster::start(&["-c", "fsync=off"]).await;
    assert_eq!(who(&cluster.url, None).await.unwrap(), (String::from("postgres of postgres"), false));
    let error = who(&format!("{}?sslmode=require", cluster.url), None).await.unwrap_err();
    assert!(error.to_string().contains("sslmode=disable") && !error.is_transient(), "{error}");
    let away = who("postgres://me@127.0.0.1:1/app", None).await.unwrap_err();
    assert!(away.to_string().contains("127.0.0.1:1") && away.is_transient(), "{away}");
    let nowhere = who("postgres://me@%2Fnowhere:7/app", None).await.unwrap_err();
    assert!(nowhere.to_string().contains("/nowhere/.s.PGSQL.7") && nowhere.is_transient(), "{nowhere}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_says_at_once_what_to_do_when_the_login_is_refused() {
    let server = Guarded::start().await;
    let refused = async |arguments: &[&str], cures: &[&str]| {
        let (code, said, told) = timeout(PATIENCE, output(arguments)).await.expect("it ends");
        let all = said + &told;
        assert_eq!(code, 1, "{arguments:?}: {all}");
        assert!(cures.iter().all(|cure| all.contains(cure)), "{arguments:?}: {all}");
        assert!(!all.contains("hidden") && !all.contains(PASSWORD), "{arguments:?}: {all}");
    };
    let serve = ["serve", "--jwt-secret", SECRET, "--listen", "127.0.0.1:0"];
    let missing = server.filled("postgres://owner@127.0.0.1:PORT/app");
    let sample = server.filled("DATABASE_URL) has none: postgres://owner:PASS").replace(ENCODED, "PASSWORD");
    let commands =
        [&serve[..], &["install"], &["doctor"], &["watch", "t"], &["unwatch", "t"], &["explain", "t"]];
    for command in commands {
        refused(&[command, &["--database-url", &missing]].concat(), &[&sample, "PGPASSWORD"]).await;
    }
    for (address, cure) in [
        ("postgres://owner:hidden@127.0.0.1:PORT/app", "alter role owner password"),
        ("postgres://owner:hidden@%SOCKET:PORT/app", "alter role owner password"),
        ("postgres://nobody:hidden@127.0.0.1:PORT/app", "alter role nobody password"),
        ("postgres://system_user_of_this_name@%SOCKET:PORT/app", "sudo -u system_user_of_this_name relay"),
        (
            "postgres://owner:PASSWORD@127.0.0.1:PORT/nowhere",
            "createdb -h 127.0.0.1 -p PORT -U owner nowhere",
        ),
        ("postgres://stranger:hidden@127.0.0.1:PORT/app", "pg_hba.conf"),
        ("postgres://owner:hid/den@127.0.0.1:PORT/app", "%2F"),
        ("postgres://owner:hidden@127.0.0.1:PORT/app?sslcrl=hidden", "sslcrl"),
        ("", "is empty"),
    ] {
        let url = server.filled(address);
        refused(&[&serve, &["--database-url", &url][..]].concat(), &[&server.filled(cure), "DATABASE_URL"])
            .await;
    }
    // The other connections are known to be refused before anybody is served.
    let url = server.cluster.url.clone();
    let (code, _, told) = output(&["install", "--database-url", &url]).await;
    assert_eq!(code, 0, "{told}");
    let wrong = server.filled("postgres://owner:hidden@127.0.0.1:PORT/postgres");
    for (flag, name) in [("--judge-url", "RELAY_JUDGE_URL"), ("--doorbell-url", "RELAY_DOORBELL_URL")] {
        let urls = ["--database-url", &url, flag, &wrong];
        refused(&[&serve, &urls[..]].concat(), &[name, "alter role owner password"]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_variables_of_libpq_name_the_database_where_nothing_else_does() {
    let server = Guarded::start().await;
    let run = async |arguments: &[&str], variables: &[(&str, &str)]| {
        let mut command = relay(arguments);
        let variables = variables.iter().map(|(name, value)| (*name, server.filled(value)));
        let Output { status, stdout, stderr } = command.envs(variables).output().await.unwrap();
        let told = String::from_utf8_lossy(&stdout).into_owned() + &String::from_utf8_lossy(&stderr);
        (status.success(), told)
    };
    let login = [("PGPORT", "PORT"), ("PGUSER", "owner"), ("PGPASSWORD", PASSWORD), ("PGDATABASE", "app")];
    for host in [("PGHOST", "SOCKET"), ("PGHOST", "127.0.0.1"), ("PGHOSTADDR", "127.0.0.1")] {
        let (is_done, told) = run(&["install"], &[&login, &[host][..]].concat()).await;
        assert!(is_done, "{host:?}: {told}");
    }
    // What the URL leaves open, and nothing else.
    let url = server.filled("postgres://owner@127.0.0.1:PORT/app");
    let (is_done, told) = run(
        &["install", "--database-url", &url],
        &[("PGPASSWORD", PASSWORD), ("PGUSER", "no"), ("PGPORT", "1")],
    )
    .await;
    assert!(is_done, "{told}");
    let (is_done, told) = run(&["install"], &[("PGUSER", "owner")]).await;
    assert!(!is_done && told.contains("DATABASE_URL") && told.contains("PGHOST"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_start_is_ready_once_it_is_installed_and_its_log_is_clean() {
    let server = Guarded::start().await;
    let app = connect(&with_database(&server.cluster.url, "app")).await;
    // So that the installer waits.
    app.batch_execute(&format!("select pg_advisory_lock({})", Lock::Install)).await.unwrap();
    let url = server.filled("postgres://owner:PASSWORD@%SOCKET:PORT/app?schema=public");
    let mut child = relay(&[
        "serve",
        "--install",
        "--jwt-secret",
        SECRET,
        "--listen",
        "localhost:0",
        "--database-url",
        &url,
        "--stall-seconds",
        "5",
    ])
    .spawn()
    .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut log = vec![line_with(&mut lines, "the parameter schema is of another program").await];
    log.push(line_with(&mut lines, "supabase-js at ").await);
    let address = log[1].split("address=").nth(1).unwrap().trim().parse().unwrap();
    let status = async |path: &str| text(address, path).await.0;
    assert_eq!(
        (status("/livez").await, status("/healthcheck").await, status("/readyz").await),
        (200, 503, 503)
    );
    eventually("the installer waits", || async {
        let waits = "select exists (select from pg_stat_activity
                     where query like '%pg_try_advisory_lock(%' and pid <> pg_backend_pid())";
        server.admin.query_one(waits, &[]).await.unwrap().get::<_, bool>(0).then_some(())
    })
    .await;
    assert_eq!((status("/healthcheck").await, status("/readyz").await), (503, 503));
    // However long an installation takes, that is no stall.
    app.batch_execute("select pg_sleep(6)").await.unwrap();
    app.batch_execute(&format!("select pg_advisory_unlock({})", Lock::Install)).await.unwrap();
    eventually("it is healthy", || async { (status("/healthcheck").await == 200).then_some(()) }).await;
    let is_there = "select to_regproc('relay.watch') is not null";
    assert!(app.query_one(is_there, &[]).await.unwrap().get::<_, bool>(0));
    eventually("it is ready", || async { (status("/readyz").await == 200).then_some(()) }).await;
    crate::program::cli::signal(&child, "-TERM");
    while let Some(line) = lines.next_line().await.unwrap() {
        log.push(line);
    }
    assert!(log.iter().any(|line| line.contains("reading the changelog")), "{log:#?}");
    assert!(!log.iter().any(|line| line.contains("WARN") || line.contains("ERROR")), "{log:#?}");
    assert!(!log.iter().any(|line| line.contains(PASSWORD) || line.contains(ENCODED)), "{log:#?}");
}
