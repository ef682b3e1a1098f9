//! Secrets from files: where a setting holds a secret, its variable with `_FILE` appended names a file with the value, as
//! container platforms and systemd hand out secrets.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::Command;
use clap::builder::Resettable;

/// Maximum size of a file. Pipes and devices, which may have no end, are not read.
const MAX_BYTES: u64 = 64 << 10;

/// The command line, in which the settings of the subcommand among `arguments` have the values of their files as defaults: a
/// flag wins over the file. The line break at the end of a file is no part of the value.
///
/// # Errors
/// When a file cannot be read, is empty, or its setting also has a variable: as a text for the user.
pub fn with_secret_files(
    command: Command,
    arguments: &[OsString],
    variable: impl Fn(&str) -> Option<OsString>,
) -> Result<Command, String> {
    let name = arguments.iter().find_map(|argument| command.find_subcommand(argument));
    let Some(name) = name.map(|subcommand| subcommand.get_name().to_owned()) else { return Ok(command) };
    if arguments.iter().any(|argument| argument == "--help" || argument == "-h") {
        return Ok(command);
    }
    let mut mistakes = Vec::new();
    let command = command.mut_subcommand(name, |subcommand| {
        subcommand.mut_args(|argument| {
            let Some(name) = argument.get_env().filter(|_| argument.is_hide_env_values_set()) else {
                return argument;
            };
            match secret(name, &variable) {
                Ok(None) => argument,
                // The variable itself is empty or not set.
                Ok(Some(value)) => {
                    argument.env(Resettable::Reset).default_value(value).hide_default_value(true)
                }
                Err(mistake) => {
                    mistakes.push(mistake);
                    argument
                }
            }
        })
    });
    if mistakes.is_empty() { Ok(command) } else { Err(mistakes.join("; ")) }
}

/// The value of the file that a variable `NAME_FILE` names.
fn secret(name: &OsStr, variable: impl Fn(&str) -> Option<OsString>) -> Result<Option<String>, String> {
    let Some(name) = name.to_str() else { return Ok(None) };
    let Some(path) = variable(&format!("{name}_FILE")).filter(|path| !path.is_empty()) else {
        return Ok(None);
    };
    if variable(name).is_some_and(|value| !value.is_empty()) {
        return Err(format!("{name} and {name}_FILE are both set: unset one of them"));
    }
    let path = Path::new(&path);
    let refused = |why: &dyn std::fmt::Display| {
        format!("{name}_FILE: {}: {why}; name a file that the relay may read", path.display())
    };
    let file = std::fs::metadata(path).map_err(|error| refused(&error))?;
    if !file.is_file() || file.len() > MAX_BYTES {
        return Err(refused(&format!("it is no file of at most {MAX_BYTES} bytes")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| refused(&error))?;
    let value = text.trim_end_matches(['\r', '\n']);
    if value.is_empty() {
        return Err(format!("{name}_FILE: {} is empty; write the value into it", path.display()));
    }
    Ok(Some(value.to_owned()))
}
