//! The five minutes of the README, word for word, and the mistakes that people make in them.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, Command};
use tokio_postgres::Client as Session;

use relay::postgres::connect::pool::Server;

use crate::program::addresses::Guarded;
use crate::program::cli::{line_with, signal};
use crate::support::client::Client;
use crate::support::database::{connect, with_database};
use crate::support::http::get;

const BY_TCP: &str = "postgres://owner:PASSWORD@127.0.0.1:PORT/app";
const BY_SOCKET: &str = "postgres:///app?host=SOCKET&port=PORT&user=owner&password=PASSWORD";
const ANN: &str = "11111111-1111-4111-8111-111111111111";

/// The blocks of code in this language of the README's five minutes.
fn blocks(language: &str) -> Vec<String> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let (_, section) = text.split_once("## Five minutes with your own table").unwrap();
    let section = section.split("\n## ").next().unwrap_or_default();
    let blocks = section.split("```").skip(1).step_by(2);
    blocks.filter_map(|block| Some(block.strip_prefix(language)?.strip_prefix('\n')?.to_owned())).collect()
}

/// A person at a terminal, with the exports of the README.
struct Person {
    address: String,
    exports: String,
    /// Where the relay listens.
    url: String,
}

impl Person {
    fn new(server: &Guarded, address: &str) -> Self {
        let start = blocks("").remove(0);
        let exports: Vec<&str> = start.lines().filter(|line| line.starts_with("export ")).collect();
        let exports =
            exports.join("\n").replace("postgres://postgres:PASSWORD@127.0.0.1:5432/app", "$ADDRESS");
        assert!(
            exports.contains("DATABASE_URL=$ADDRESS") && exports.contains("RELAY_JWT_SECRET="),
            "{exports}"
        );
        Self { address: server.filled(address), exports, url: String::new() }
    }

    /// Commands in a shell. The last one takes its place, so that signals reach it.
    fn shell(&self, commands: &str) -> Command {
        let program = Path::new(env!("CARGO_BIN_EXE_relay"));
        let mut shell = Command::new("bash");
        let commands = format!("{}\n{commands}", self.exports).replace("\nrelay ", "\nexec relay ");
        shell.args(["-euc", &commands]).env_clear().kill_on_drop(true);
        shell.env("PATH", format!("{}:/usr/bin:/bin", program.parent().unwrap().display()));
        shell.env("ADDRESS", &self.address).env("RELAY_LISTEN", "127.0.0.1:0").env("RELAY_URL", &self.url);
        // A busy machine is none of these mistakes.
        shell.env("RELAY_STALL_SECONDS", "600");
        shell.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        shell
    }

    /// Starts the relay as the README says; the log up to where it is ready.
    async fn serve(&mut self) -> (Child, Lines<BufReader<ChildStderr>>, Vec<String>) {
        let start = blocks("").remove(0);
        let (build, rest) = start.split_once('\n').unwrap();
        assert!(
            build.starts_with("cargo build --release && export PATH=$PWD/target/release:$PATH "),
            "{build}"
        );
        let serve = rest.lines().find(|line| line.starts_with("relay serve --install ")).unwrap();
        let ready = serve.split('"').nth(1).unwrap();
        let mut child = self.shell(serve).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut log = Vec::new();
        while !log.last().is_some_and(|line: &String| line.contains(ready)) {
            log.push(line_with(&mut lines, "").await);
        }
        let listening = log.iter().find(|line| line.contains("supabase-js at ")).unwrap();
        self.url =
            listening.split("supabase-js at ").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
        (child, lines, log)
    }

    /// The exit code of commands, and what they say.
    async fn says(&self, commands: &str) -> (i32, String) {
        let output = self.shell(commands).output().await.unwrap();
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        (output.status.code().unwrap(), said.into_owned())
    }

    async fn token(&self, options: &str) -> String {
        self.says(&format!("relay token {options}")).await.1.trim().to_owned()
    }
}

async fn owner(server: &Guarded) -> Session {
    // Before PostgreSQL 15 every role may create there, which doctor reports as a fault.
    let admin = connect(&with_database(&server.cluster.url, "app")).await;
    let own = "revoke create on schema public from public; grant create on schema public to owner";
    admin.batch_execute(own).await.unwrap();
    Server::parse(&server.filled(BY_TCP), "test", None).unwrap().connect().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_readmes_five_minutes_work_word_for_word_for_an_owner_who_is_no_superuser() {
    for address in [BY_TCP, BY_SOCKET] {
        let server = Guarded::start().await;
        let mut person = Person::new(&server, address);
        let (mut child, mut lines, mut log) = person.serve().await;
        let [table, insert] = <[String; 2]>::try_from(blocks("sql")).unwrap();
        let owner = owner(&server).await;
        owner.batch_execute(&table).await.unwrap();
        // Another terminal, and a program.
        let mut tail = person.shell(&blocks("")[1]).spawn().unwrap();
        let mut told = BufReader::new(tail.stderr.take().unwrap()).lines();
        let mut changes = BufReader::new(tail.stdout.take().unwrap()).lines();
        line_with(&mut told, "following public.todos").await;
        let token = person.token(&format!("--sub {ANN}")).await;
        let mut client = Client::at(person.url[7..].parse().unwrap(), &token, "").await.unwrap();
        let binding = json!([{"event": "*", "schema": "public", "table": "todos"}]);
        client.subscribe("realtime:todos", binding).await;
        owner.batch_execute(&insert).await.unwrap();
        let line = line_with(&mut changes, "INSERT public.todos").await;
        assert!(line.contains("Water the plants"), "{line}");
        assert_eq!(client.change().await["record"]["title"], "Water the plants");
        for (commands, expected) in [
            ("relay doctor", 0),
            (&format!("relay explain todos --sub {ANN}"), 0),
            (&format!("relay explain todos --sub {ANN} --key 1"), 0),
        ] {
            let (code, said) = person.says(commands).await;
            assert_eq!(code, expected, "{commands}: {said}");
            assert!(!said.contains("FAULT"), "{said}");
        }
        signal(&child, "-TERM");
        while let Some(line) = lines.next_line().await.unwrap() {
            log.push(line);
        }
        assert!(child.wait().await.unwrap().success());
        assert!(!log.iter().any(|line| line.contains("WARN") || line.contains("ERROR")), "{log:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_mistake_of_the_first_minutes_is_answered_with_its_cure() {
    let server = Guarded::start().await;
    let mut person = Person::new(&server, BY_TCP);
    let (_child, _lines, _) = person.serve().await;
    let owner = owner(&server).await;
    let address: SocketAddr = person.url[7..].parse().unwrap();
    owner
        .batch_execute(
            "create schema other; create table other.todos (id int primary key);
             create table no_grant (id int primary key); alter table no_grant enable row level security;
             create policy p on no_grant using (true); select relay.watch('no_grant');
             create table no_policy (id int primary key); alter table no_policy enable row level security;
             grant select on no_policy to authenticated; select relay.watch('no_policy');
             create table not_watched (id int primary key); grant select on not_watched to authenticated;
             grant select on other.todos to authenticated; select relay.watch('other.todos')",
        )
        .await
        .unwrap();
    let good = person.token(&format!("--sub {ANN}")).await;
    let other = "--jwt-secret another-secret-of-at-least-32-bytes-of-nobody";
    let wrong = person.token(&format!("--sub {ANN} {other}")).await;
    let ended = person.token(&format!("--sub {ANN} --ttl 0s")).await;
    let readable = "Please check Realtime is enabled";
    let unsigned = "Failed to validate JWT signature";
    // By the channel, over HTTP, by `tail` and by `explain`.
    for (table, token, told) in [
        (
            "public.no_grant",
            &good,
            [
                readable,
                "relay explain public.no_grant --role authenticated",
                "grant select on public.no_grant to authenticated",
                "grant select on public.no_grant to authenticated",
            ],
        ),
        (
            "public.no_policy",
            &good,
            [
                "Subscribed to PostgreSQL",
                "[]",
                "following",
                "create policy ... on public.no_policy for select to authenticated",
            ],
        ),
        (
            "public.not_watched",
            &good,
            [
                readable,
                "relay.watch('public.not_watched')",
                "relay.watch('public.not_watched')",
                "relay.watch('public.not_watched')",
            ],
        ),
        (
            "public.todos",
            &good,
            [
                readable,
                "It needs: select relay.watch('public.todos')",
                "relay explain public.todos --role authenticated",
                "there is no relation public.todos; there is other.todos",
            ],
        ),
        (
            "other.todos",
            &good,
            [
                readable,
                "grant usage on schema other to authenticated",
                "grant usage on schema other to authenticated",
                "grant usage on schema other to authenticated",
            ],
        ),
        (
            "public.nowhere",
            &good,
            [
                readable,
                "It needs: select relay.watch('public.nowhere')",
                "relay explain public.nowhere --role authenticated",
                "there is no relation public.nowhere",
            ],
        ),
        (
            "public.no_policy",
            &wrong,
            [
                unsigned,
                "the secret or key that signed it is not this relay's",
                "relay token --sub UUID makes one",
                "create policy",
            ],
        ),
        (
            "public.no_policy",
            &ended,
            [
                "Token has expired",
                "Token has expired",
                "relay token --sub UUID makes one",
                "relay token --sub UUID makes another one",
            ],
        ),
    ] {
        let answers = answers(&person, address, table, token).await;
        for (answer, cure) in answers.iter().zip(told) {
            assert!(answer.contains(cure), "{table}: {cure:?} is not in {answer}");
        }
    }
    let (code, said) = person.says("relay doctor").await;
    assert_eq!(code, 0, "{said}");
    for cure in [
        "grant select on public.no_grant to authenticated",
        "create policy ... on public.no_policy for select",
    ] {
        assert!(said.contains(cure), "{cure} is not in {said}");
    }
    for (address, cure) in [
        ("postgres://owner:wrong@127.0.0.1:PORT/app", "alter role owner password"),
        ("postgres:///app?host=SOCKET&port=PORT&user=owner&password=wrong", "alter role owner password"),
        ("postgres://owner@127.0.0.1:PORT/app", "PGPASSWORD"),
        ("postgres:///app?host=SOCKET&port=PORT&user=owner", "PGPASSWORD"),
        ("postgres://owner:PASSWORD@127.0.0.1:PORT/nowhere", "createdb -h 127.0.0.1"),
    ] {
        let lost = Person::new(&server, address);
        for command in ["relay serve --install", "relay doctor"] {
            let (code, said) = lost.says(command).await;
            assert!(code == 1 && said.contains(cure), "{address}, {command}: {said}");
        }
    }
}

/// What the bearer of a token hears of a table: by a channel, over HTTP, by `tail` and by `explain`.
async fn answers(person: &Person, address: SocketAddr, table: &str, token: &str) -> [String; 4] {
    let (schema, name) = table.split_once('.').unwrap();
    let channel = match Client::at(address, token, "").await {
        Err(refused) => refused,
        Ok(mut client) => {
            let binding = json!([{"event": "*", "schema": schema, "table": name}]);
            client.try_subscribe("realtime:x", binding).await.to_string()
        }
    };
    let path = format!("/realtime/v1/changes?schema={schema}&table={name}&apikey={token}");
    let rows = get(address, &path, "").await.body.to_string();
    let tail = async {
        let mut tail = person.shell(&format!("relay tail {table} --token {token}")).spawn().unwrap();
        line_with(&mut BufReader::new(tail.stderr.take().unwrap()).lines(), "").await
    };
    let explain = format!("relay explain {table} --token {token}");
    [channel, rows, tail.await, person.says(&explain).await.1]
}
