//! The files of `examples/deploy` name only settings and metrics that there are.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use relay::observe::{Observe, Readings};

/// The files, with their text.
fn files() -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/deploy");
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files: Vec<_> = files
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, fs::read_to_string(path).unwrap())
        })
        .collect();
    assert!(files.len() > 5, "where are they?");
    files
}

/// The words of a text that begin so, each once.
fn words(text: &str, start: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let words = text.split(|c: char| !is_part(c)).filter(|word| word.starts_with(start));
    words.map(str::to_owned).collect()
}

fn help() -> String {
    let help = Command::new(env!("CARGO_BIN_EXE_relay")).args(["serve", "--help"]).output().unwrap();
    String::from_utf8(help.stdout).unwrap()
}

#[test]
fn each_setting_in_examples_of_deploying_exists() {
    let help = help();
    let variables = words(&help, "RELAY_");
    let flags = words(&help, "--");
    for (name, text) in files() {
        let unknown: Vec<_> = words(&text, "RELAY_").difference(&variables).cloned().collect();
        assert_eq!(unknown, [""; 0], "{name}");
        if name == "relay.toml" {
            let lines = text.lines().filter_map(|line| line.split_once(" = "));
            let set: BTreeSet<String> = lines.map(|(setting, _)| format!("--{setting}")).collect();
            assert!(set.len() > 2 && set.is_subset(&flags), "{set:?}");
        }
    }
}

#[test]
fn each_metric_in_alerts_and_dashboards_exists() {
    let text = Observe::new().text(&Readings::default());
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let known: BTreeSet<String> = types
        .map(|(name, kind)| match kind {
            "counter" => format!("{name}_total"),
            "histogram" => format!("{name}_bucket"),
            _ => name.to_owned(),
        })
        .collect();
    let (mut count, mut dashboards) = (0, 0);
    for (name, text) in
        files().into_iter().filter(|(name, _)| name.ends_with(".yml") || name.ends_with(".json"))
    {
        if name.ends_with(".json") {
            dashboards += 1;
            let dashboard: serde_json::Value = serde_json::from_str(&text).unwrap();
            for panel in dashboard["panels"].as_array().unwrap() {
                let targets = panel["targets"].as_array().unwrap();
                let asks = |target: &serde_json::Value| target["expr"].as_str().unwrap().contains("relay_");
                assert!(!targets.is_empty() && targets.iter().all(asks), "{name}: {panel}");
            }
        }
        let used: BTreeSet<String> =
            words(&text, "relay_").into_iter().filter(|word| !word.starts_with("relay_alerts")).collect();
        let unknown: Vec<_> = used.difference(&known).collect();
        assert!(unknown.is_empty(), "{name}: {unknown:?}");
        count += used.len();
    }
    assert!(count > 8 && dashboards == 2, "where are they?");
}
