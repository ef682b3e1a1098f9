//! The program itself, as a person starts it.
#![allow(clippy::print_stdout, reason = "what is not run is said")]

use std::path::PathBuf;
use std::process::Stdio;

use tokio::process::Command;

use super::database::Database;

/// The program with these arguments and nothing in its environment.
pub fn relay(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_relay"));
    command.args(arguments).env_clear().kill_on_drop(true).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Its exit code, output and error output.
pub async fn output(arguments: &[&str]) -> (i32, String, String) {
    let output = relay(arguments).output().await.unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// The folder of `pg_dump`, `pg_restore` and `psql` for a server: its own, or that of newer ones. The servers of `make
/// test-versions` come without.
pub async fn clients_of_postgresql(server: &Database) -> Option<PathBuf> {
    let version = server.value("select current_setting('server_version_num')::int / 10000").await;
    let version: u32 = version.parse().unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/cluster.sh");
    let own = std::process::Command::new(script).arg("bin").output().unwrap();
    let own = PathBuf::from(String::from_utf8(own.stdout).unwrap().trim());
    let others = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let others = others.filter(|folder| {
        let name = folder.file_name().into_string().ok();
        name.and_then(|name| name.parse::<u32>().ok()).is_some_and(|major| major >= version)
    });
    let mut folders = std::iter::once(own).chain(others.map(|folder| folder.path().join("bin")));
    let found = folders
        .find(|folder| ["pg_dump", "pg_restore", "psql"].iter().all(|name| folder.join(name).exists()));
    if found.is_none() {
        println!("not run: no pg_dump is here that reads PostgreSQL {version}");
    }
    found
}
