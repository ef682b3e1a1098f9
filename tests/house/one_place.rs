//! What stands in one place, and is written nowhere else.

use std::fs;
use std::path::{Path, PathBuf};

use relay::postgres::locks::Lock;

/// The files of `folder` with one of these endings, with their text; paths from the root.
fn files(folder: &str, endings: &[&str]) -> Vec<(String, String)> {
    fn collect(folder: &Path, endings: &[&str], found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, endings, found);
            } else if path.extension().is_some_and(|end| endings.iter().any(|ending| end == *ending)) {
                found.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = Vec::new();
    collect(&root.join(folder), endings, &mut paths);
    paths.sort();
    assert!(!paths.is_empty(), "where is {folder}?");
    let named = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        (path.strip_prefix(root).unwrap().to_str().unwrap().to_owned(), text)
    };
    paths.into_iter().map(named).collect()
}

const LOCKS: &str = "sql/100_locks.sql";

/// The names and numbers of a function in `100_locks.sql`.
fn lock_numbers(function: &str) -> Vec<(String, String)> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(LOCKS)).unwrap();
    let (_, body) = text.split_once(&format!("function relay.{function}(")).unwrap();
    let (body, _) = body.split_once("\nend;").unwrap();
    let number = |line: &str| {
        let (name, rest) = line.trim().strip_prefix("when '")?.split_once("' then ")?;
        Some((name.to_owned(), rest.split_whitespace().next()?.to_owned()))
    };
    body.lines().filter_map(number).collect()
}

#[test]
fn the_numbers_of_advisory_locks_are_written_in_two_files_that_agree() {
    let ours: Vec<_> = Lock::ALL.iter().map(|lock| format!("{lock:?} {lock}").to_lowercase()).collect();
    let class = &lock_numbers("lock_class")[0].1;
    let sql: Vec<_> =
        lock_numbers("lock").iter().map(|(name, number)| format!("{name} {class}, {number}")).collect();
    assert_eq!(ours, sql);
    for (path, text) in [files("relay", &["rs"]), files("sql", &["sql"]), files("tests", &["rs"])].concat() {
        let is_place = path == LOCKS || path == "relay/postgres/locks.rs";
        let numbers = text.replace('_', "").matches(&class[..7]).count();
        assert!(is_place || numbers == 0, "{path}: name the lock by {LOCKS} or relay::postgres::locks");
    }
}

#[test]
fn sql_names_only_locks_that_there_are() {
    for function in ["lock", "lock_class"] {
        let names: Vec<String> = lock_numbers(function).into_iter().map(|(name, _)| name).collect();
        let mut used = 0;
        for (path, text) in files("sql", &["sql"]) {
            for tail in text.split(&format!("relay.{function}('")).skip(1) {
                let name = tail.split('\'').next().unwrap();
                assert!(names.iter().any(|known| known == name), "{path}: there is no {function} {name}");
                used += 1;
            }
        }
        assert!(used > 5, "{function} is used {used} times");
    }
}

#[test]
fn each_variable_is_named_like_its_flag_in_every_command() {
    let mut variables = 0;
    for (path, text) in files("relay", &["rs"]) {
        for tail in text.split("env = \"").skip(1) {
            let (variable, rest) = tail.split_once('"').unwrap();
            let field =
                rest.lines().map(str::trim).find(|line| line.ends_with(',') && line.contains(": ")).unwrap();
            let name = field.trim_start_matches("pub ").split(':').next().unwrap().to_uppercase();
            let expected = if name == "DATABASE_URL" { name } else { format!("RELAY_{name}") };
            assert_eq!(variable, expected, "{path}");
            variables += 1;
        }
    }
    assert!(variables > 40, "{variables}");
}

/// The places where a task is started that no `TaskTracker` or `JoinSet` knows.
const UNTRACKED: &[(&str, &str)] = &[
    (
        "relay/auth/jwks_refresh.rs",
        "a file is read on a thread of its own, which is awaited and cannot be aborted",
    ),
    ("relay/main.rs", "the task is aborted when `serve` returns"),
    ("relay/postgres/connect/pool.rs", "a connection ends with its client"),
];

#[test]
fn each_task_is_tracked_or_has_a_reason_here() {
    let mut untracked = Vec::new();
    for (path, text) in files("relay", &["rs"]) {
        // A method starts a task of its tracker.
        let program = text.split("\n#[cfg(test)]").next().unwrap().replace(".spawn_blocking(", "");
        let starts = ["tokio::spawn", "task::spawn(", "spawn_blocking(", "thread::spawn(", "spawn_local("];
        let count: usize = starts.iter().map(|start| program.matches(start).count()).sum();
        untracked.extend(std::iter::repeat_n(path, count));
    }
    let known: Vec<&str> = UNTRACKED.iter().map(|(path, _)| *path).collect();
    assert_eq!(untracked, known, "track the task, or say here why not");
}
