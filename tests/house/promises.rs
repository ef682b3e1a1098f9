//! The table of faults in `FAULTS.md` names only tests that there are, and leaves none of its rows without a word.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// All functions of the sources, each as `file::name`.
fn functions() -> BTreeSet<String> {
    fn collect(folder: &Path, found: &mut BTreeSet<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let module = path.file_stem().unwrap().to_str().unwrap();
                let text = fs::read_to_string(&path).unwrap();
                for name in text.lines().filter_map(|line| line.split_once("fn ")?.1.split_once('(')) {
                    found.insert(format!("{module}::{}", name.0));
                }
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = BTreeSet::new();
    for folder in ["relay", "tests"] {
        collect(&root.join(folder), &mut found);
    }
    found
}

#[test]
fn every_fault_has_a_test_that_there_is_or_a_reason_why_not() {
    let table = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/FAULTS.md")).unwrap();
    let functions = functions();
    let mut rows = 0;
    for line in table.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| #")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        rows += 1;
        assert!(cells.len() == 4 && cells[0] == rows.to_string(), "row {rows}: {line}");
        let shown = cells[3];
        let tests: Vec<&str> = shown.split('`').skip(1).step_by(2).collect();
        for test in &tests {
            assert!(functions.contains(*test), "row {rows}: there is no test {test}");
        }
        let is_told = !tests.is_empty() || shown == "(to come)" || shown.starts_with("none: ");
        assert!(is_told, "row {rows}: neither a test nor a reason: {line}");
    }
    assert!(rows > 90, "where is the table?");
}

#[test]
fn each_difference_from_supabase_realtime_has_a_test_that_there_is() {
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("relay/MOVING.md");
    let functions = functions();
    let text = fs::read_to_string(document).unwrap();
    let is_row = |line: &&str| line.starts_with("| ") && !line.contains(" | Shown by |");
    let rows: Vec<&str> = text.lines().filter(is_row).collect();
    assert!(rows.len() > 20, "where are the tables?");
    for row in rows {
        let shown = row.trim_matches('|').split('|').next_back().unwrap().trim();
        let tests: Vec<&str> = shown.split('`').skip(1).step_by(2).collect();
        for test in &tests {
            assert!(functions.contains(*test), "there is no test {test}: {row}");
        }
        assert!(!tests.is_empty() || shown.starts_with("none: "), "neither a test nor a reason: {row}");
    }
}

/// The files that a document names in code spans or links: paths with a folder, from the root, from `relay/`, or from the document.
#[test]
fn every_file_that_a_document_names_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut missing = Vec::new();
    let documents = [
        "README.md",
        "relay/lib.rs",
        "relay/ARCHITECTURE.md",
        "relay/OPERATION.md",
        "relay/REFERENCE.md",
        "relay/MOVING.md",
        "tests/FAULTS.md",
        "tests/LIMITS.md",
        "tests/MEASURED.md",
    ];
    let mut named = 0;
    for document in documents {
        let text = fs::read_to_string(root.join(document)).unwrap();
        let folder = root.join(document).parent().unwrap().to_owned();
        let is_path = |word: &&str| {
            word.contains('/')
                && [".rs", ".sql", ".md", ".sh", ".mjs"].iter().any(|end| word.ends_with(end))
                && !word.contains([' ', ':', '*', '…'])
        };
        for path in text.split(['`', '(', ')', '#', '[', ']', ' ', '\n']).filter(is_path) {
            named += 1;
            let is_there = [root.to_owned(), root.join("relay"), folder.clone()]
                .iter()
                .any(|from| from.join(path).exists());
            if !is_there {
                missing.push(format!("{document}: {path}"));
            }
        }
    }
    assert!(named > 40, "where are the documents? {named}");
    assert!(missing.is_empty(), "{missing:#?}");
}
