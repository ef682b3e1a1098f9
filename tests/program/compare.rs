//! `relay compare`: finds each thing that a second server misses, adds, delays or tells differently.

use std::process::Stdio;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, ChildStderr, ChildStdout};
use tokio::time::timeout;

use crate::program::cli::signal;
use crate::support::program::relay;
use crate::support::stage::Stage;
use crate::support::{PATIENCE, token};

/// A comparison of a relay with another on a database of its own, which gets the same writes.
struct Compared {
    stages: [Stage; 2],
    program: Child,
    lines: BufReader<ChildStdout>,
    told: BufReader<ChildStderr>,
}

impl Compared {
    /// Waits until both are subscribed.
    async fn start(sql: [&str; 2], more: &[&str]) -> Self {
        let stages = [Stage::new(sql[0]).await, Stage::new(sql[1]).await];
        let [url, other] = [0, 1].map(|of| stages[of].relay.url());
        let token = token("authenticated", None, json!({}));
        let mut program = relay(&["compare", &other, "--url", &url, "--token", &token, "--table", "t"]);
        let mut program = program.args(more).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(program.stdout.take().unwrap());
        let mut told = BufReader::new(program.stderr.take().unwrap());
        let mut line = String::new();
        timeout(PATIENCE, told.read_line(&mut line)).await.expect("it says nothing").unwrap();
        assert!(line.contains("comparing t at"), "{line}");
        Self { stages, program, lines, told }
    }

    /// Writes in the database of the relay, and in the other.
    async fn write(&self, relay: &str, other: &str) {
        for (stage, sql) in self.stages.iter().zip([relay, other]) {
            stage.database.run(sql).await;
        }
    }

    /// The next difference, with names for the addresses.
    async fn line(&mut self) -> String {
        let mut line = String::new();
        timeout(PATIENCE, self.lines.read_line(&mut line)).await.expect("no difference is told").unwrap();
        self.named(line.trim_end())
    }

    fn named(&self, text: &str) -> String {
        let [relay, other] = [0, 1].map(|of| self.stages[of].relay.url());
        text.replace(relay.trim_end_matches('/'), "RELAY").replace(other.trim_end_matches('/'), "OTHER")
    }

    /// The summary, and the exit code.
    async fn end(mut self) -> (String, Option<i32>) {
        let status = timeout(PATIENCE, self.program.wait()).await.expect("it ends").unwrap();
        let mut told = String::new();
        self.told.read_to_string(&mut told).await.unwrap();
        (self.named(told.lines().last().unwrap_or_default()), status.code())
    }
}

const TABLE: &str =
    "create table t (id int primary key, v text, n numeric(6, 2)); grant select on t to authenticated;
                     select relay.watch('t')";

#[tokio::test(flavor = "multi_thread")]
async fn each_spoiled_thing_of_a_second_server_is_found() {
    let mut compared = Compared::start([TABLE, TABLE], &["--wait-ms", "500", "--late-ms", "60000"]).await;
    let both = "insert into t values (1, 'a', 1.5); update t set v = 'b' where id = 1";
    compared.write(both, both).await;
    for (relay, other, told) in [
        (
            "insert into t values (2, 'x', 2)",
            "select",
            "missing at OTHER: INSERT public.t {\"id\":2,\"v\":\"x\",\"n\":2.0}",
        ),
        (
            "select",
            "insert into t values (3, 'x', 2)",
            "missing at RELAY: INSERT public.t {\"id\":3,\"v\":\"x\",\"n\":2.0}",
        ),
        (
            "insert into t values (4, 'x', 2)",
            "insert into t values (4, 'y', 2)",
            "different: INSERT public.t {\"id\":4,\"v\":\"x\",\"n\":2.0}: v is \"x\" at RELAY, \"y\" at OTHER",
        ),
        (
            "update t set v = 'c' where id = 1",
            "update t set n = 1 where id = 2",
            "missing at OTHER: UPDATE public.t {\"id\":1,\"v\":\"c\",\"n\":1.5}",
        ),
        ("delete from t where id = 1", "select", "missing at OTHER: DELETE public.t {\"id\":1}"),
        ("truncate t", "truncate t", ""),
        (
            "alter table t add more int; insert into t values (5, 'x', 2, 7)",
            "insert into t values (5, 'x', 2)",
            "different: INSERT public.t {\"id\":5,\"v\":\"x\",\"n\":2.0,\"more\":7}: more is 7 at RELAY, \"(no such column)\" at OTHER",
        ),
        (
            "select",
            "alter table t alter n type text; alter table t drop v; insert into t values (6, '1.50')",
            "missing at RELAY: INSERT public.t {\"id\":6,\"n\":\"1.50\"}",
        ),
    ] {
        compared.write(relay, other).await;
        if !told.is_empty() {
            assert_eq!(compared.line().await, told);
        }
    }
    signal(&compared.program, "-INT");
    let (summary, code) = compared.end().await;
    assert!(
        summary.starts_with("relay: changes: 2 equal (") && summary.ends_with("2 different"),
        "{summary}"
    );
    assert!(summary.contains(", 2 missing at RELAY, 3 missing at OTHER, "), "{summary}");
    assert_eq!(code, Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_that_tell_the_same_are_equal_and_each_delay_is_told_when_asked_for() {
    let mut compared = Compared::start([TABLE, TABLE], &["--late-ms", "0"]).await;
    compared.write("insert into t values (1, 'a', 1)", "insert into t values (1, 'a', 1)").await;
    let line = compared.line().await;
    let is_late = ["OTHER", "RELAY"].iter().any(|server| line.starts_with(&format!("late at {server} by ")));
    assert!(is_late && line.contains("INSERT public.t {\"id\":1"), "{line}");
    signal(&compared.program, "-INT");
    assert_eq!(compared.end().await.1, Some(1));

    let compared =
        Compared::start([TABLE, TABLE], &["--late-ms", "60000", "--wait-ms", "300", "--seconds", "2"]).await;
    compared.write("insert into t values (1, 'a', 1)", "insert into t values (1, 'a', 1)").await;
    let (summary, code) = compared.end().await;
    assert!(summary.starts_with("relay: changes: 1 equal ("), "{summary}");
    assert_eq!(code, Some(0), "{summary}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_refuses_is_named_with_its_reason() {
    let stages = [Stage::new(TABLE).await, Stage::new("").await];
    let [url, other] = [0, 1].map(|of| stages[of].relay.url());
    let good = token("authenticated", None, json!({}));
    for (token, key, told) in [
        (good.as_str(), good.as_str(), format!("{other}: refuses the subscription: ")),
        (good.as_str(), "wrong", format!("{other}: refuses the token or key with 401")),
        // Of either server, whichever answers first.
        ("wrong", good.as_str(), String::from(": refuses the subscription: MalformedJWT: ")),
    ] {
        let arguments = ["compare", &other, "--url", &url, "--token", token, "--apikey", key, "--table", "t"];
        let output = relay(&arguments).output().await.unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        let is_of_http =
            token == "wrong" && said.contains(&format!("{url}: refuses the token or key with 401"));
        assert!(said.contains(&told) || is_of_http, "{told} is not in {said}");
        assert_eq!(output.status.code(), Some(1));
    }
}
