//! The settings as an operator may see them: without secrets.

use clap::Args;
use serde_json::{Value, json};

use super::Settings;

/// Stands for the value of a setting that may contain a secret.
const MASKED: &str = "(set, not shown)";

impl Settings {
    /// Returns each setting with its variable, help, and value; null where the default counts. What `--help` keeps back of the
    /// environment, and any URL, is only said to be set.
    pub fn shown(&self) -> Value {
        let values = serde_json::to_value(self).unwrap_or_default();
        let serve = Self::augment_args(clap::Command::new("serve"));
        serve.get_arguments().map(|flag| shown(flag, &values)).collect()
    }
}

fn shown(flag: &clap::Arg, values: &Value) -> Value {
    let name = flag.get_long().unwrap_or_default();
    let value = &values[name];
    let is_unset = match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        _ => false,
    };
    let kinds = flag.get_value_names().unwrap_or_default();
    let may_be_secret = flag.is_hide_env_values_set() || kinds.iter().any(|kind| kind.contains("URL"));
    let value = match (is_unset, may_be_secret) {
        (true, _) => Value::Null,
        (false, true) => Value::from(MASKED),
        (false, false) => value.clone(),
    };
    json!({
        "name": name,
        "variable": flag.get_env().and_then(|variable| variable.to_str()),
        "help": flag.get_help().map(ToString::to_string),
        "group": flag.get_help_heading(),
        "value": value,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Settings of text that are no secrets. Any other one must not be shown.
    const PLAIN: [&str; 8] = [
        "listen",
        "admin-listen",
        "jwt-audience",
        "jwt-issuer",
        "database-ca",
        "allowed-origin",
        "status-anonymous-claim",
        "config",
    ];

    #[test]
    fn no_setting_that_may_hold_a_secret_is_shown_and_a_new_one_is_not_unless_it_is_listed_here() {
        let text = "postgres://user:hunter2@host/db?password=hunter2";
        let empty = serde_json::to_value(Settings::default()).unwrap();
        let mut count = 0;
        for (name, value) in empty.as_object().unwrap() {
            let filled = match value {
                Value::Array(_) => json!({ name.as_str(): [text] }),
                _ => json!({ name.as_str(): text }),
            };
            // A number or a switch takes no text.
            let Ok(settings) = serde_json::from_value::<Settings>(filled) else { continue };
            let shown = settings.shown();
            let shown = shown.as_array().unwrap().iter().find(|one| one["name"] == name.as_str()).unwrap();
            let is_shown = shown["value"].to_string().contains("hunter2");
            assert_eq!(is_shown, PLAIN.contains(&name.as_str()), "{shown}");
            assert!(!shown["value"].is_null(), "{shown}");
            count += 1;
        }
        assert!(count > 10, "where is the table?");
    }

    #[test]
    fn numbers_switches_and_defaults_are_shown_with_their_help() {
        let settings = Settings { poll_ms: Some(7), install: true, ..Settings::default() };
        let shown = settings.shown();
        let of = |name: &str| shown.as_array().unwrap().iter().find(|one| one["name"] == name).unwrap();
        assert_eq!((&of("poll-ms")["value"], &of("install")["value"]), (&json!(7), &json!(true)));
        assert_eq!(
            (&of("stall-seconds")["value"], &of("private-only")["value"]),
            (&Value::Null, &Value::Null)
        );
        assert_eq!(of("stall-seconds")["variable"], "RELAY_STALL_SECONDS");
        assert!(of("stall-seconds")["help"].as_str().unwrap().contains("[default: 10]"));
    }
}
