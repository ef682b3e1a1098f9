//! A script of tests/clients as a process of its own. It is the client; by orders on its stdout it has this side do
//! the rest: write SQL, make tokens, cut its socket, stop and start the relay, also before another server. No order is answered before it is done.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use relay::auth::verifier::mint;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_postgres::SimpleQueryMessage;

use super::SECRET;
use super::database::Database;
use super::proxy::Proxy;
use super::relay::Relay;

/// What a whole scenario may take: above every wait inside it, reconnects of clients included.
const LIMIT: Duration = Duration::from_secs(120);

/// Every token was made this many seconds ago, so that some can have ended since.
const AGE: u64 = 60;

/// Plays one scenario with a database and a relay of its own; panics with all that the script said when it fails.
pub async fn play(program: &str, script: &str, scenario: &str) {
    let database = Database::new().await;
    database.run(include_str!("../clients/schema.sql")).await;
    let relay = start(&database, None, None).await;
    let proxy = Proxy::start(relay.address).await;
    let mut script = Script::start(program, script, scenario, &relay, &proxy);
    let mut scene = Scene { address: relay.address, relay: Some(relay), database, proxy };
    let played = timeout(LIMIT, async {
        while let Some(line) = script.next().await {
            if let Some(answer) = scene.obey(&line).await {
                script.answer(&answer);
            }
        }
    });
    let ended = played.await.is_ok();
    let (status, said) = script.end(ended);
    assert!(ended && status.success(), "{scenario}: {status}\n{said}");
    if let Some(relay) = scene.relay {
        relay.stop().await;
    }
}

async fn start(database: &Database, listen: Option<SocketAddr>, upstream: Option<String>) -> Relay {
    Relay::with(&database.url, |settings| {
        settings.publishable_key = vec!["sb_publishable_for_tests".to_owned()];
        settings.secret_key = vec!["sb_secret_for_tests".to_owned()];
        settings.upstream = upstream;
        if let Some(address) = listen {
            settings.listen = Some(address.to_string());
        }
    })
    .await
}

/// What the orders are about.
struct Scene {
    address: SocketAddr,
    relay: Option<Relay>,
    database: Database,
    proxy: Proxy,
}

impl Scene {
    /// The answer to an order; none to a line that is something else.
    async fn obey(&mut self, line: &str) -> Option<String> {
        let words: Vec<&str> = line.splitn(3, ' ').collect();
        match words[..] {
            ["WRITE", ..] => {
                if let Err(error) = self.database.client.batch_execute(&line["WRITE ".len()..]).await {
                    return Some(format!("FAILED {:?}", error.as_db_error()));
                }
            }
            ["READ", ..] => {
                return Some(match self.database.client.simple_query(&line["READ ".len()..]).await {
                    Ok(messages) => format!("DONE {}", last_value(&messages)),
                    Err(error) => format!("FAILED {:?}", error.as_db_error()),
                });
            }
            ["TOKEN", who, seconds] => return Some(format!("DONE {}", token(who, seconds.parse().unwrap()))),
            ["CUT"] => self.proxy.cut(),
            ["STOP"] => self.relay.take().unwrap().stop().await,
            ["START"] => self.relay = Some(start(&self.database, Some(self.address), None).await),
            ["BEHIND", url] => {
                self.relay = Some(start(&self.database, Some(self.address), Some(url.to_owned())).await);
            }
            _ => return None,
        }
        Some("DONE".to_owned())
    }
}

/// The first value of the last row.
fn last_value(messages: &[SimpleQueryMessage]) -> &str {
    let value = messages.iter().rev().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    value.unwrap_or_default()
}

/// A token that ends in so many seconds, or ended that long ago.
fn token(who: &str, seconds: i64) -> String {
    let claims = match who {
        "alice" => json!({"role": "authenticated", "sub": "aaaaaaaa-0000-4000-8000-000000000001"}),
        "bob" => json!({"role": "authenticated", "sub": "bbbbbbbb-0000-4000-8000-000000000002"}),
        role => json!({"role": role}),
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let lifetime = AGE.checked_add_signed(seconds).unwrap();
    mint(SECRET, claims.as_object().unwrap(), now - AGE, Duration::from_secs(lifetime)).unwrap()
}

/// Killed when dropped.
struct Script {
    process: Child,
    orders: ChildStdin,
    lines: mpsc::UnboundedReceiver<String>,
    errors: Option<JoinHandle<String>>,
    said: String,
}

impl Script {
    fn start(program: &str, script: &str, scenario: &str, relay: &Relay, proxy: &Proxy) -> Self {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        // A name is looked up in PATH, a path belongs to this repository.
        let program = if program.contains('/') { root.join(program) } else { PathBuf::from(program) };
        let mut process = Command::new(&program)
            .arg(root.join("tests/clients").join(script))
            .arg(scenario)
            .env("RELAY_URL", relay.url())
            .env("PROXY_URL", format!("http://{}", proxy.address))
            .env("TMP_FOLDER", env!("CARGO_TARGET_TMPDIR"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error} (`make setup` installs it)", program.display()));
        let (sender, lines) = mpsc::unbounded_channel();
        let stdout = BufReader::new(process.stdout.take().unwrap());
        std::thread::spawn(move || {
            stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        let mut stderr = process.stderr.take().unwrap();
        let errors = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = stderr.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        });
        let orders = process.stdin.take().unwrap();
        Self { process, orders, lines, errors: Some(errors), said: String::new() }
    }

    async fn next(&mut self) -> Option<String> {
        let line = self.lines.recv().await?;
        self.said += &format!("> {line}\n");
        Some(line)
    }

    fn answer(&mut self, answer: &str) {
        self.said += &format!("< {answer}\n");
        // A script that has ended needs no answer.
        let _ = writeln!(self.orders, "{answer}");
    }

    /// How it ended, and all that was said; it is killed unless it ended by itself.
    fn end(mut self, by_itself: bool) -> (ExitStatus, String) {
        if !by_itself {
            let _ = self.process.kill();
        }
        let status = self.process.wait().unwrap();
        let errors = self.errors.take().map(|errors| errors.join().unwrap()).unwrap_or_default();
        (status, format!("{}{errors}", self.said))
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
