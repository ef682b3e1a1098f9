//! The program itself, as a person starts it.

use std::process::Stdio;

use tokio::process::Command;

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
