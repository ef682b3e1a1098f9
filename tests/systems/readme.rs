//! The commands of examples/systems/README.md, word for word: a terminal that watches, and another one that writes.
#![allow(clippy::print_stdout, reason = "what is not run is said")]

use std::path::PathBuf;
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::{ANA, are_open, file, rows, user};
use crate::support::program::clients_of_postgresql;
use crate::support::stage::Stage;
use crate::support::{PATIENCE, SECRET, eventually};

/// The shell blocks, in order.
fn blocks() -> Vec<String> {
    let text = file("README.md");
    let blocks = text.split("```").skip(1).step_by(2);
    blocks.filter_map(|block| Some(block.strip_prefix("sh\n")?.to_owned())).collect()
}

/// A person with several terminals.
struct Person {
    stage: Stage,
    programs: PathBuf,
    /// What each terminal begins with.
    exports: String,
}

impl Person {
    /// A bash in the repository's folder, as the leader of a group of processes.
    fn terminal(&self, commands: &str) -> Command {
        let relay = std::path::Path::new(env!("CARGO_BIN_EXE_relay")).parent().unwrap();
        let mut terminal = Command::new("bash");
        terminal.args(["-euo", "pipefail", "-c", &format!("{}\n{commands}", self.exports)]);
        terminal.env_clear().current_dir(env!("CARGO_MANIFEST_DIR")).process_group(0).kill_on_drop(true);
        terminal.env("PATH", format!("{}:{}:/usr/bin:/bin", relay.display(), self.programs.display()));
        terminal.env("DATABASE_URL", &self.stage.database.url).env("RELAY_JWT_SECRET", SECRET);
        terminal.stdout(Stdio::piped()).stderr(Stdio::piped());
        terminal
    }

    /// What commands print, also those that are refused.
    async fn says(&self, commands: &str) -> String {
        let output = self.terminal(&format!("set +e\n{commands}")).output().await.unwrap();
        String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
    }

    /// Runs the first commands until the second have run, and the first have printed lines with all of these.
    async fn watches(&self, watch: &str, write: &str, printed: &[&str]) {
        let mut watching = self.terminal(watch).spawn().unwrap();
        let mut lines = BufReader::new(watching.stdout.take().unwrap()).lines();
        let channels = watch.matches("relay tail").count().max(1);
        are_open(&self.stage, channels as u64).await;
        self.says(write).await;
        let mut missing = printed.to_vec();
        let all = async {
            while !missing.is_empty() {
                let line = lines.next_line().await.unwrap().expect("a further line");
                missing.retain(|text| !line.contains(text));
            }
        };
        let came = timeout(PATIENCE, all).await;
        assert!(came.is_ok(), "{watch} did not print {missing:?}");
        end(watching).await;
        are_open(&self.stage, 0).await;
    }
}

/// Ends a terminal and what it started.
async fn end(mut terminal: Child) {
    if let Some(id) = terminal.id() {
        Command::new("kill").args(["--", &format!("-{id}")]).status().await.unwrap();
    }
    terminal.wait().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_of_the_readme_print_what_it_says() {
    let stage = Stage::new("").await;
    let Some(programs) = clients_of_postgresql(&stage.database).await else { return };
    if std::process::Command::new("curl").arg("--version").output().is_err() {
        println!("not run: there is no curl");
        return;
    }
    let mut person = Person { stage, programs, exports: String::new() };
    let blocks = blocks();
    let mut blocks = blocks.iter().map(String::as_str);
    let mut next = || blocks.next().expect("a further block");

    let load = next();
    for again in [false, true] {
        assert_eq!(person.says(load).await, "", "again: {again}");
    }
    person.exports = next().replace("http://127.0.0.1:4000", &person.stage.relay.url());

    let (watch, switch) = (next(), next());
    let off = ["\"agent\":\"web\",\"enabled\":false", "\"agent\":\"x\",\"enabled\":false"];
    person.watches(watch, switch, &off).await;
    let said = person.says(next()).await;
    let counts = (said.matches("\"enabled\":false").count(), said.matches("\"agent\"").count());
    assert_eq!(counts, (2, 8), "{said}");
    let said = person.says(switch).await;
    assert!(said.contains("violates row-level security") && said.contains("| web   | t      | f "), "{said}");

    let online = "\"username\":\"Chloe\",\"isAnonymous\":false,\"isOnline\":true";
    person.watches(next(), next(), &[online]).await;
    person.says(next()).await;
    let (left, _) = rows(&person.stage, &user(ANA), "table=user_status&order=username", &["username"]).await;
    assert_eq!(left, ["Ana", "Ben"]);

    let periods = ["INSERT public.user_online_periods", "UPDATE public.user_online_periods"];
    person.watches(next(), next(), &periods).await;
    let sweeping = person.terminal(next()).spawn().unwrap();
    eventually("a sweep", || async {
        let swept = "select count(*) from status_sweeps";
        (person.stage.database.value(swept).await == "1").then_some(())
    })
    .await;
    end(sweeping).await;

    let told = ["Document 7 could not be read", "Worker east was lost", "Disk full", "\"files_failed\":1"];
    person.watches(next(), next(), &told).await;
    let said = person.says(next()).await;
    assert!(
        said.contains("\"rows\":[{\"id\":4,\"severity\":\"critical\",\"message\":\"Disk full\""),
        "{said}"
    );

    let (watch, send) = (next(), next());
    person.watches(watch, send, &["\"message\":\"Hello Ana\""]).await;
    assert!(person.says(send).await.contains("the caller has no active chat session 1"));
    assert_eq!(blocks.next(), None);
}
