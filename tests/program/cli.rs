//! The program itself, as a person starts it.

use relay::postgres::locks::Lock;
use std::future::poll_fn;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, ChildStdout};

use crate::delivery::crash::Cluster;
use crate::support::database::{Database, JUDGE, READER, connect, with_database, with_login};
use crate::support::http::text;
use crate::support::program::{output, relay};
use crate::support::relay::Relay;
use crate::support::{PATIENCE, SECRET, eventually, token};

/// `relay serve`, and the address it says it serves on.
pub async fn serve(arguments: &[&str]) -> (Child, Lines<BufReader<ChildStderr>>, String) {
    let mut child =
        relay(&["serve", "--jwt-secret", SECRET, "--listen", "127.0.0.1:0"]).args(arguments).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let address = line_with(&mut lines, "supabase-js at ").await;
    let address =
        address.split("supabase-js at ").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
    line_with(&mut lines, "reading the changelog").await;
    (child, lines, address)
}

pub async fn line_with(lines: &mut Lines<impl tokio::io::AsyncBufRead + Unpin>, text: &str) -> String {
    let mut heard = Vec::new();
    tokio::time::timeout(PATIENCE, async {
        loop {
            let line = lines.next_line().await.unwrap();
            let line = line.unwrap_or_else(|| panic!("no line has {text:?}: {heard:#?}"));
            if line.contains(text) {
                return line;
            }
            heard.push(line);
        }
    })
    .await
    .unwrap_or_else(|_| panic!("never said: {text:?}"))
}

pub fn signal(child: &Child, name: &str) {
    let process = child.id().unwrap().to_string();
    assert!(std::process::Command::new("kill").args([name, &process]).status().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_database_needs_only_install_watch_and_a_client() {
    let database = Database::bare().await;
    let (mut child, _lines, address) = serve(&["--database-url", &database.url, "--install"]).await;
    database
        .run("create table todos (id int primary key, title text); grant select on todos to authenticated")
        .await;
    database.run("select relay.watch('public.todos')").await;

    let token = token("authenticated", None, json!({}));
    let mut tail = relay(&["tail", "todos", "--url", &address, "--token", &token, "--filter", "id=gt.1"])
        .spawn()
        .unwrap();
    let mut told = BufReader::new(tail.stderr.take().unwrap()).lines();
    let mut changes: Lines<BufReader<ChildStdout>> = BufReader::new(tail.stdout.take().unwrap()).lines();
    line_with(&mut told, "following public.todos").await;
    database.run("insert into todos values (1, 'not this'), (2, 'this')").await;
    let line = line_with(&mut changes, "INSERT").await;
    assert!(line.ends_with(r#"INSERT public.todos {"id":2,"title":"this"}"#), "{line}");

    signal(&child, "-TERM");
    let ended = tokio::time::timeout(Duration::from_secs(10), child.wait())
        .await
        .expect("it ends on SIGTERM")
        .unwrap();
    assert_eq!(ended.code(), Some(0));
    line_with(&mut told, "reconnecting").await;
    signal(&tail, "-INT");
    let ended = tokio::time::timeout(PATIENCE, tail.wait()).await.expect("it ends on SIGINT").unwrap();
    assert_eq!(ended.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_is_said_at_once_and_together() {
    let (code, _, told) = output(&["serve", "--listen", "here", "--jwt-secret", "short"]).await;
    assert_eq!(code, 1);
    for part in ["--database-url URL", "--listen here", "at least 32"] {
        assert!(told.contains(part), "{part:?} is not in {told}");
    }
    let database = Database::bare().await;
    let (code, _, told) = output(&[
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--jwt-secret",
        SECRET,
        "--database-url",
        &database.url,
    ])
    .await;
    assert_eq!(code, 1);
    assert!(told.contains("relay install"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_url_is_a_mistake_and_no_server_that_is_away() {
    let database = Database::new().await;
    let login = ["--jwt-secret", SECRET, "--listen", "127.0.0.1:0"];
    for (urls, setting) in [
        (["--database-url", &database.url, "--judge-url", ""], "RELAY_JUDGE_URL"),
        (["--database-url", &database.url, "--doorbell-url", ""], "RELAY_DOORBELL_URL"),
        (["--database-url", "", "--judge-url", &database.url], "DATABASE_URL"),
    ] {
        let arguments = [&["serve"], &login[..], &urls[..]].concat();
        let (code, _, told) = tokio::time::timeout(PATIENCE, output(&arguments)).await.expect("it ends");
        assert_eq!(code, 1);
        assert!(told.contains("is empty") && told.contains(setting), "{told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_are_json_where_the_file_of_settings_says_so() {
    let database = Database::new().await;
    let path = std::env::temp_dir().join(format!("relay-log-json-{}.toml", std::process::id()));
    std::fs::write(&path, "log-json = true\nlisten = \"localhost:0\"\n").unwrap();
    let mut child = relay(&["serve", "--jwt-secret", SECRET, "--database-url", &database.url, "--config"])
        .arg(&path)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let line = line_with(&mut lines, "supabase-js at ").await;
    assert!(serde_json::from_str::<serde_json::Value>(&line).is_ok(), "{line}");
    std::fs::remove_file(path).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_judging_login_that_is_not_there_is_a_mistake_and_no_silence() {
    let database = Database::new().await;
    let judge = database.url.replacen("postgres@", "nobody_of_this_name@", 1);
    let urls = ["--database-url", &database.url, "--judge-url", &judge];
    let arguments = [&["serve", "--jwt-secret", SECRET, "--listen", "127.0.0.1:0"], &urls[..]].concat();
    let (code, _, told) = tokio::time::timeout(PATIENCE, output(&arguments)).await.expect("it ends");
    assert_eq!(code, 1);
    assert!(told.contains("--judge-url") && told.contains("nobody_of_this_name"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_without_the_rights_of_a_relay_is_told_which_ones_to_grant() {
    let database = Database::new().await;
    let login = format!("relay_{}", database.url.rsplit_once('/').unwrap().1);
    database.run(&format!("create role {login} login")).await;
    let url = with_login(&database.url, &login);
    let expected = format!("this login is not a member of relay_reader: grant relay_reader to {login}");
    let serving = ["serve", "--jwt-secret", SECRET, "--listen", "127.0.0.1:0"];
    for command in [&serving[..], &["doctor"], &["explain", "t"]] {
        let arguments = [command, &["--database-url", &url]].concat();
        let (code, findings, told) =
            tokio::time::timeout(PATIENCE, output(&arguments)).await.expect("it ends");
        assert_eq!(code, 1, "{command:?}");
        assert!((findings + &told).contains(&expected), "{command:?}: {told}");
    }

    database.run(&format!("grant relay_reader to {login}")).await;
    let cannot_act = "this login cannot act as anon, authenticated or service_role";
    let serve = || relay(&serving).args(["--database-url", &url]).spawn().unwrap();
    let mut child = serve();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let line = line_with(&mut lines, cannot_act).await;
    assert!(line.contains("WARN") && line.contains("or give --judge-url"), "{line}");
    drop(child);
    database.run(&format!("grant authenticated to {login}")).await;
    let mut child = serve();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    loop {
        let line = lines.next_line().await.unwrap().expect("it goes on");
        assert!(!line.contains(cannot_act), "{line}");
        if line.contains("reading the changelog") {
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_and_unwatch_say_what_they_did_or_why_not() {
    let database = Database::new().await;
    database.run("create table t (id int primary key); create view v as select * from t").await;
    let run =
        async |command: &str, table: &str| output(&[command, table, "--database-url", &database.url]).await;
    assert_eq!(run("watch", "t").await.0, 0);
    assert_eq!(database.value("select relation from relay.watched").await, "t");
    assert_eq!(run("unwatch", "public.t").await.0, 0);
    assert_eq!(database.value("select count(*) from relay.watched").await, "0");
    for missing in ["v", "nowhere"] {
        let (code, _, told) = run("watch", missing).await;
        assert_eq!(code, 1);
        assert!(told.contains(missing), "{told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_finds_what_is_wrong_and_says_what_to_do() {
    let bare = Database::bare().await;
    let (code, findings, _) = output(&["doctor", "--database-url", &bare.url]).await;
    assert_eq!(code, 1);
    assert!(findings.contains("relay install"), "{findings}");

    let database = Database::new().await;
    // Before PostgreSQL 15 every role may create there, and doctor says so.
    database.run("revoke create on schema public from public").await;
    database.run("create table t (id int primary key); alter table t enable row level security").await;
    database.run("create policy p on t using (true); select relay.watch('t')").await;
    let (code, findings, _) = output(&["doctor", "--database-url", &database.url]).await;
    assert_eq!(code, 0, "{findings}");
    assert!(findings.contains("grant select on public.t to authenticated"), "{findings}");
    database.run("grant select on t to authenticated").await;
    let (code, findings, _) = output(&["doctor", "--database-url", &database.url]).await;
    assert_eq!(code, 0, "{findings}");
    assert!(findings.contains("ok    t is watched"), "{findings}");

    database.run("alter sequence relay.change_number cache 50").await;
    let (code, findings, _) = output(&["doctor", "--database-url", &database.url]).await;
    assert_eq!(code, 1);
    assert!(findings.contains("alter sequence relay.change_number increment 1 cache 1"), "{findings}");
    database.run("alter sequence relay.change_number increment 1 cache 1").await;

    database.run("alter table t disable trigger all").await;
    let (code, findings, _) = output(&["doctor", "--database-url", &database.url]).await;
    assert_eq!(code, 1);
    assert!(findings.contains("select relay.watch('t')"), "{findings}");
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_names_who_holds_a_lock_of_the_relays_and_is_none() {
    let database = Database::new().await;
    let name = database.url.rsplit_once('/').unwrap().1;
    database.run(&format!("create role {name} login")).await;
    let relay = Relay::start(&database.url).await;
    let doctor = async || output(&["doctor", "--database-url", &database.url]).await.1;
    eventually("the relay sleeps", || async {
        (database.value("select asleep from relay.health").await == "t").then_some(())
    })
    .await;
    let findings = doctor().await;
    assert!(!findings.contains("advisory lock"), "relays hold their own: {findings}");
    relay.stop().await;
    // A writer shares the lock until its transaction ends.
    let writer = database.connect().await;
    let share = format!("begin; select pg_advisory_xact_lock_shared({})", Lock::Doorbell);
    writer.batch_execute(&share).await.unwrap();
    let findings = doctor().await;
    assert!(!findings.contains("advisory lock"), "{findings}");
    writer.batch_execute("commit").await.unwrap();
    let login = with_login(&database.url, name);
    // The second calls itself a relay, but its login may not read the changelog.
    for (url, application) in [(&database.url, "psql"), (&login, "relay doorbell")] {
        for (function, lock) in
            [("pg_advisory_lock", Lock::Leader), ("pg_advisory_lock_shared", Lock::Doorbell)]
        {
            let stranger = connect(url).await;
            let hold = format!("set application_name = '{application}'; select {function}({lock})");
            stranger.batch_execute(&hold).await.unwrap();
            let pid: i32 = stranger.query_one("select pg_backend_pid()", &[]).await.unwrap().get(0);
            let findings = doctor().await;
            assert!(findings.contains("no relay with a working doorbell runs"), "{findings}");
            let line = findings.lines().find(|line| line.contains(&format!("({lock})")));
            let line = line.unwrap_or_else(|| panic!("nothing of lock {lock}: {findings}"));
            for part in [application, url.split(['/', '@']).nth(2).unwrap(), &format!("backend {pid} ")] {
                assert!(line.contains(part), "{part} is not in {line}");
            }
            stranger.batch_execute("select pg_advisory_unlock_all()").await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_easily_forgotten_is_told_by_watch_in_sql_and_by_the_program_and_by_doctor() {
    const NOTES: [&str; 3] = ["no primary key", "row security is off", "none of anon, authenticated"];
    let database = Database::new().await;
    database.run("create table t (id int)").await;
    let (session, mut connection) =
        tokio_postgres::connect(&database.url, tokio_postgres::NoTls).await.unwrap();
    let listening = tokio::spawn(async move {
        let mut notices = String::new();
        while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
            if let tokio_postgres::AsyncMessage::Notice(notice) = message {
                notices += notice.message();
            }
        }
        notices
    });
    session.batch_execute("select relay.watch('t')").await.unwrap();
    drop(session);
    let url = ["--database-url", &database.url];
    let (_, _, program) = output(&[&["watch", "t"], &url[..]].concat()).await;
    let (_, doctor, _) = output(&[&["doctor"], &url[..]].concat()).await;
    for told in [listening.await.unwrap(), program, doctor] {
        for note in NOTES {
            assert!(told.contains(note), "{note} is not in {told}");
        }
    }
    let complete = "alter table t add primary key (id); alter table t enable row level security;
        create policy p on t using (true); grant select on t to authenticated";
    database.run(complete).await;
    assert_eq!(database.value("select relay.notes('t')").await, "{}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_made_with_the_claims_that_were_asked_for() {
    let claims = r#"{"app_metadata":{"role":"admin"}}"#;
    let (code, token, _) =
        output(&["token", "--jwt-secret", SECRET, "--sub", "u-1", "--claims", claims, "--ttl", "90s"]).await;
    assert_eq!(code, 0);
    let settings =
        relay::auth::verifier::TokenSettings { secrets: vec![SECRET.to_owned()], ..Default::default() };
    let verifier = relay::auth::verifier::Verifier::new(&settings).unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let claims = verifier.verify(token.trim(), now).unwrap();
    assert_eq!((claims.role(), claims.sub()), ("authenticated", Some("u-1")));
    assert!(claims.expires_at() - now <= 90);
    assert!(claims.json().contains(r#""role":"admin""#));
    assert_eq!(output(&["token", "--jwt-secret", SECRET, "--ttl", "soon"]).await.0, 1);
    // What would be overwritten is refused.
    for (claims, name) in [(r#"{"role":"admin"}"#, "role"), (r#"{"sub":"u-2"}"#, "sub")] {
        let asked = ["token", "--jwt-secret", SECRET, "--sub", "u-1", "--claims", claims];
        let (code, token, error) = output(&asked).await;
        assert!(code != 0 && token.is_empty() && error.contains(&format!("--{name} sets")), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_for_the_database_can_be_ended() {
    let away = "postgres://nobody@127.0.0.1:1/nowhere";
    let arguments = ["serve", "--jwt-secret", SECRET, "--listen", "127.0.0.1:0", "--database-url", away];
    let mut child = relay(&arguments).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    line_with(&mut lines, "waiting for the database").await;
    signal(&child, "-TERM");
    let ended = tokio::time::timeout(Duration::from_secs(10), child.wait())
        .await
        .expect("it ends on SIGTERM")
        .unwrap();
    assert_eq!(ended.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mistake_at_the_terminal_is_answered_with_its_cure() {
    for role in ["", "  "] {
        let (code, said, error) = output(&["token", "--jwt-secret", SECRET, "--role", role]).await;
        assert!(code != 0 && said.is_empty() && error.contains("--role is empty"), "{role:?} {said} {error}");
    }
    let database = Database::new().await;
    database
        .run(
            "create table todos (id int primary key, title text); grant select on todos to authenticated;
             select relay.watch('todos'); insert into todos values (1, 'x')",
        )
        .await;
    let reader = with_login(&database.url, READER);
    for (login, arguments) in [(READER, ["watch", "todos"]), (READER, ["unwatch", "todos"])] {
        let url = with_login(&database.url, login);
        let (code, _, error) = output(&[&arguments[..], &["--database-url", &url]].concat()).await;
        let cure = "the login that installed the schema relay";
        assert!(code != 0 && error.contains(cure) && error.contains("--database-url"), "{login} {error}");
    }
    let judge = with_login(&database.url, JUDGE);
    let by =
        ["--sub", "11111111-1111-4111-8111-111111111111", "--database-url", &reader, "--judge-url", &judge];
    for key in ["1", r#"{"title": "x"}"#] {
        let (code, _, error) = output(&[&["explain", "todos", "--key", key][..], &by].concat()).await;
        assert!(code != 0 && error.contains("public.todos") && error.contains("--row"), "{error}");
    }
    let (code, said, error) =
        output(&[&["explain", "todos", "--row", r#"{"id": 1}"#][..], &by].concat()).await;
    assert!(code == 0 && said.contains("the row is seen"), "{said} {error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_refused_over_http_is_logged_by_address_path_and_reason_and_never_itself() {
    let database = Database::new().await;
    let (_child, mut lines, address) = serve(&["--database-url", &database.url]).await;
    let address = address.trim_start_matches("http://").parse().unwrap();
    let secret = token("authenticated", None, json!({})).replace('.', "x.");
    for path in ["/realtime/v1/changes", "/realtime/v1/changes/"] {
        let (status, _) = text(address, &format!("{path}?table=t&apikey={secret}")).await;
        if status == 404 {
            continue;
        }
        assert_eq!(status, 401);
        let line = line_with(&mut lines, "request refused").await;
        assert!(line.contains("127.0.0.1") && line.contains(path) && line.contains("why="), "{line}");
        assert!(!line.contains(&secret[..40]), "{line}");
        tokio::time::timeout(PATIENCE, async { while text(address, "/livez").await.0 != 200 {} })
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_role_that_policies_hold_back_is_told_by_install_and_doctor() {
    const LACK: &str = "service_role has no BYPASSRLS";
    const CURE: &str = "alter role service_role bypassrls";
    // Roles belong to the cluster, and here no other test makes them.
    let cluster = Cluster::start(&[]).await;
    let superuser = connect(&cluster.url).await;
    for sql in ["create role owner login createrole", "create database app owner owner"] {
        superuser.batch_execute(sql).await.unwrap();
    }
    let owner = with_login(&with_database(&cluster.url, "app"), "owner");
    let said = async |command: &str| {
        let (code, said, told) = output(&[command, "--database-url", &owner]).await;
        (code, said + &told)
    };
    for again in [false, true] {
        let (code, told) = said("install").await;
        assert!(code == 0 && told.contains(LACK) && told.contains(CURE), "again: {again}: {told}");
    }
    let (_, told) = said("doctor").await;
    let line = told.lines().find(|line| line.contains(LACK)).unwrap_or_else(|| panic!("{told}"));
    assert!(line.contains(CURE) && !line.starts_with("ok"), "{line}");
    let held = "set role owner; create table held (id int); alter table held enable row level security; \
                grant select on held to service_role; select relay.watch('held'); reset role";
    connect(&with_database(&cluster.url, "app")).await.batch_execute(held).await.unwrap();
    let explained = async || {
        let (code, told, _) =
            output(&["explain", "public.held", "--role", "service_role", "--database-url", &owner]).await;
        (code, told.lines().next().map(str::to_owned))
    };
    let (code, line) = explained().await;
    let line = line.unwrap();
    assert!(code == 1 && line.starts_with(&format!("would not: {LACK}")) && line.ends_with(CURE), "{line}");
    superuser.batch_execute(CURE).await.unwrap();
    assert_eq!(explained().await, (0, Some("would receive".to_owned())));
    for command in ["install", "doctor"] {
        let (_, told) = said(command).await;
        assert!(!told.contains(LACK), "{command}: {told}");
    }
    superuser.batch_execute("alter role service_role nobypassrls").await.unwrap();
    assert!(said("doctor").await.1.contains(CURE), "whenever it is taken away");
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_come_from_the_files_that_variables_name() {
    let database = Database::new().await;
    let folder =
        std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("secrets-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (secret, url) =
        (file("secret", &format!("{SECRET}\n")), file("url", &format!("{}\r\n", database.url)));
    let run = async |arguments: &[&str], variables: &[(&str, &str)]| {
        let output = relay(arguments).envs(variables.iter().copied()).output().await.unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        (output.status.success(), text(&output.stdout), text(&output.stderr))
    };

    let minted = run(&["token", "--sub", "1"], &[("RELAY_JWT_SECRET_FILE", &secret)]).await;
    assert!(minted.0 && minted.1.split('.').count() == 3, "{minted:?}");
    let installed = run(&["install"], &[("DATABASE_URL_FILE", &url)]).await;
    assert!(installed.0 && installed.2.contains("up to date"), "{installed:?}");
    let mut serving = relay(&["serve", "--listen", "127.0.0.1:0"])
        .envs([("DATABASE_URL_FILE", &url), ("RELAY_JWT_SECRET_FILE", &secret)])
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(serving.stderr.take().unwrap()).lines();
    line_with(&mut lines, "reading the changelog").await;
    serving.kill().await.unwrap();

    // A flag wins over the file, which is not even needed for help.
    let flag =
        run(&["token", "--sub", "1", "--jwt-secret", "short"], &[("RELAY_JWT_SECRET_FILE", &secret)]).await;
    assert!(!flag.0 && flag.2.contains("at least 32"), "{flag:?}");
    let help = run(&["serve", "--help"], &[("RELAY_JWT_SECRET_FILE", "/nowhere")]).await;
    assert!(help.0 && !help.1.contains(SECRET), "{help:?}");

    let empty = file("empty", "\n");
    for (variables, said) in [
        (
            &[("RELAY_JWT_SECRET_FILE", "/nowhere")][..],
            "RELAY_JWT_SECRET_FILE: /nowhere: No such file or directory",
        ),
        (&[("RELAY_JWT_SECRET_FILE", &empty)], "is empty"),
        (&[("RELAY_JWT_SECRET_FILE", "/dev/zero")], "/dev/zero: it is no file of at most 65536 bytes"),
        (
            &[("RELAY_JWT_SECRET_FILE", &secret), ("RELAY_JWT_SECRET", SECRET)],
            "RELAY_JWT_SECRET and RELAY_JWT_SECRET_FILE are both set",
        ),
    ] {
        let refused = run(&["token", "--sub", "1"], variables).await;
        assert!(!refused.0 && refused.2.contains(said) && !refused.2.contains(SECRET), "{refused:?}");
    }
    let unset = [("RELAY_JWT_SECRET_FILE", &*secret), ("RELAY_JWT_SECRET", "")];
    let empty_variable = run(&["token", "--sub", "1"], &unset).await;
    assert!(empty_variable.0, "{empty_variable:?}");
    // What the command does not use is not read.
    let other = [("RELAY_JWT_SECRET_FILE", &*secret), ("DATABASE_URL_FILE", "/nowhere")];
    let unused = run(&["token", "--sub", "1"], &other).await;
    assert!(unused.0, "{unused:?}");
}
