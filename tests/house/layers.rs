//! The rules of the house, read from its files: which layer may know which, and what a file looks like.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Who may import whom. What is not named here (`assembly`, `server`, `main`, `command`) sees every layer.
const IMPORTS: &[(&str, &[&str])] = &[
    ("model", &["model"]),
    ("observe", &["model"]),
    ("tls", &[]),
    ("postgres", &["postgres", "model", "observe", "tls"]),
    ("feed", &["feed", "postgres", "model", "observe"]),
    ("pubsub", &["pubsub", "feed::deliver", "model", "observe"]),
    ("status", &["status", "postgres::connect", "postgres::status", "model", "observe"]),
    ("webhooks", &["webhooks", "feed", "postgres", "model", "observe", "tls"]),
    ("nodes", &["nodes", "postgres::connect", "postgres::nodes", "pubsub", "model", "observe"]),
    ("auth", &["auth", "model", "observe", "tls"]),
    ("transport", &["transport", "auth", "pubsub", "status", "feed", "model", "observe", "tls"]),
    ("settings", &[]),
    ("config", &["settings", "auth", "transport::listen", "transport::upstream", "model"]),
];

/// Words that a layer never says, and what they would bring in.
const NEVER: &[(&str, &str, &[&str])] = &[
    ("model", "a runtime", &["tokio", "async ", ".await", "futures_util"]),
    ("model", "sockets", &["hyper", "tungstenite", "std::net"]),
    ("model", "SQL", &["tokio_postgres", "deadpool", "\"select ", "\"insert "]),
    ("model", "a clock", &["Instant::now", "SystemTime::now", "now_utc"]),
    ("model", "logging", &["tracing"]),
    ("postgres", "clients", &["hyper", "tungstenite"]),
    ("feed", "transports", &["hyper", "tungstenite"]),
    ("pubsub", "transports, protocols or SQL", &["hyper", "tungstenite", "phoenix", "tokio_postgres"]),
    (
        "status",
        "transports, protocols or SQL",
        &["hyper", "tungstenite", "phoenix", "tokio_postgres", "\"select "],
    ),
    ("webhooks", "SQL or sockets of clients", &["tungstenite", "tokio_postgres", "\"select ", "\"insert "]),
    (
        "nodes",
        "transports, protocols or SQL",
        &["hyper", "tungstenite", "phoenix", "tokio_postgres", "\"select "],
    ),
    ("auth", "SQL", &["tokio_postgres", "deadpool", "\"select ", "\"insert "]),
    ("feed", "SQL", &["\"select ", "\"insert ", "\"update ", "\"delete ", "batch_execute"]),
    (
        "transport",
        "SQL",
        &["tokio_postgres", "deadpool", "\"select ", "\"insert ", "\"update ", "\"delete ", "batch_execute"],
    ),
    ("observe", "PostgreSQL or sockets", &["tokio_postgres", "hyper", "tungstenite"]),
];

/// Names that say nothing about what is inside.
const EMPTY_NAMES: &[&str] =
    &["util", "utils", "common", "helper", "helpers", "types", "base", "core", "misc"];

struct Source {
    /// Relative to `relay/`.
    path: PathBuf,
    text: String,
}

impl Source {
    /// The folder directly in `relay/`, or the name of a file there.
    fn layer(&self) -> &str {
        self.path.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs")
    }

    /// Its path in the crate: `feed::read::source`.
    fn module(&self) -> String {
        let path = self.path.with_extension("");
        path.components().map(|part| part.as_os_str().to_str().unwrap()).collect::<Vec<_>>().join("::")
    }

    /// What is compiled into the program: without the tests at its foot.
    fn program(&self) -> &str {
        self.text.split("\n#[cfg(test)]").next().unwrap()
    }

    /// The same without comments.
    fn code(&self) -> String {
        self.program()
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            .collect::<Vec<_>>()
            .join("\n")
    }

    /// The paths after `crate::`, in `use` lines and anywhere else.
    fn imports(&self) -> Vec<String> {
        let code = self.code();
        let mut paths = Vec::new();
        for tail in code.split("crate::").skip(1) {
            let end =
                tail.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':')).unwrap_or(tail.len());
            if let Some(group) = tail[end..].strip_prefix('{').filter(|_| tail[..end].is_empty()) {
                let group = &group[..group.find(';').unwrap_or(group.len())];
                paths
                    .extend(group.split(',').map(|path| path.trim().trim_end_matches(['}', ' ']).to_owned()));
            } else {
                paths.push(tail[..end].trim_end_matches(':').to_owned());
            }
        }
        paths
    }
}

fn sources() -> Vec<Source> {
    fn collect(folder: &Path, root: &Path, found: &mut Vec<Source>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, root, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push(Source { path: path.strip_prefix(root).unwrap().to_owned(), text });
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("relay");
    let mut found = Vec::new();
    collect(&root, &root, &mut found);
    found.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(found.len() > 20, "where is the house?");
    found
}

fn is_within(path: &str, allowed: &str) -> bool {
    path == allowed || path.strip_prefix(allowed).is_some_and(|rest| rest.starts_with("::"))
}

/// Whether `word` stands in the code; a name only as a whole one.
fn says(code: &str, word: &str) -> bool {
    let is_name = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    code.match_indices(word).any(|(at, _)| {
        let (before, after) = (code[..at].chars().next_back(), code[at + word.len()..].chars().next());
        let starts = !is_name(word.chars().next()) || !is_name(before);
        let ends = !is_name(word.chars().next_back()) || !is_name(after);
        starts && ends
    })
}

#[track_caller]
fn none(faults: &[String]) {
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn imports_go_one_way() {
    let mut faults = Vec::new();
    for source in sources() {
        let Some((layer, allowed)) = IMPORTS.iter().find(|(layer, _)| *layer == source.layer()) else {
            continue;
        };
        for import in source.imports() {
            if !allowed.iter().any(|allowed| is_within(&import, allowed)) {
                faults.push(format!(
                    "relay/{}: `{layer}` must not import crate::{import}",
                    source.path.display()
                ));
            }
        }
    }
    none(&faults);
}

/// A folder within a layer, or a file directly in it: `feed::read`, `feed::router`.
fn room(path: &str) -> String {
    path.split("::").take(2).collect::<Vec<_>>().join("::")
}

#[test]
fn rooms_of_a_layer_have_no_circles() {
    let sources = sources();
    let rooms: BTreeSet<String> = sources.iter().map(|source| room(&source.module())).collect();
    let mut imports: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for source in &sources {
        let from = room(&source.module());
        let to = source.imports().into_iter().map(|import| room(&import)).filter(|to| rooms.contains(to));
        imports.entry(from.clone()).or_default().extend(to.filter(|to| *to != from));
    }
    // A room that imports no other one that is left is taken away, until all are gone or a circle remains.
    while let Some(free) = imports.iter().find(|(_, to)| to.iter().all(|to| !imports.contains_key(to))) {
        let free = free.0.clone();
        imports.remove(&free);
    }
    none(&imports.iter().map(|(from, to)| format!("{from} imports {to:?}")).collect::<Vec<_>>());
}

#[test]
fn a_layer_never_says_what_is_not_its_own() {
    let mut faults = Vec::new();
    for source in sources() {
        let code = source.code();
        for (layer, what, words) in NEVER.iter().filter(|(layer, ..)| *layer == source.layer()) {
            for word in words.iter().filter(|word| says(&code, word)) {
                faults.push(format!(
                    "relay/{}: `{layer}` never knows {what}, but says `{word}`",
                    source.path.display()
                ));
            }
        }
    }
    none(&faults);
}

#[test]
fn nothing_is_decided_by_what_is_measured() {
    let observe = sources().into_iter().find(|source| source.path.ends_with("observe.rs")).unwrap();
    let code = observe.code();
    let public = code.split("pub fn ").skip(1).map(|tail| tail.split(" {").next().unwrap());
    let readable = public.filter(|signature| signature.contains("->") && !signature.starts_with("new("));
    let readable: Vec<_> = readable.map(|signature| signature.split('(').next().unwrap()).collect();
    assert_eq!(readable, ["text"], "state that decides has an owner of its own, which metrics read from");
}

#[test]
fn every_file_says_first_what_it_is_for() {
    let silent = sources().into_iter().filter(|source| !source.text.starts_with("//! "));
    none(
        &silent
            .map(|source| format!("relay/{}: no //! at its head", source.path.display()))
            .collect::<Vec<_>>(),
    );
}

#[test]
fn no_name_is_empty() {
    let mut faults = Vec::new();
    for source in sources() {
        for part in source.path.with_extension("").components() {
            let name = part.as_os_str().to_str().unwrap();
            if EMPTY_NAMES.contains(&name) {
                faults.push(format!(
                    "relay/{}: `{name}` says nothing about what is inside",
                    source.path.display()
                ));
            }
        }
    }
    none(&faults);
}

#[test]
fn the_reader_of_these_rules_reads_right() {
    let text = "//! x\nuse crate::model::row::change::Change;\nuse crate::{observe::Observe, feed::gate};\n// crate::no::no\nlet a = crate::postgres::x();\n#[cfg(test)]\nuse crate::transport::socket::driver;";
    let source = Source { path: PathBuf::from("model/row/change.rs"), text: text.to_owned() };
    assert_eq!(source.layer(), "model");
    assert_eq!(
        source.imports(),
        ["model::row::change::Change", "observe::Observe", "feed::gate", "postgres::x"]
    );
    assert!(says("tokio::spawn", "tokio") && !says("tokio_postgres::x", "tokio") && !says("stokio", "tokio"));
    assert!(
        is_within("auth::verifier::Verifier", "auth::verifier") && !is_within("transporter", "transport")
    );
}
