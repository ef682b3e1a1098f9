//! Hashes of the parts of the catalog, which show what has to be read again.

use std::collections::{BTreeMap, BTreeSet};

/// The rows of `relay.catalog_marks()` at one moment.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Marks {
    database: String,
    roles: BTreeMap<String, String>,
    relations: BTreeMap<i32, String>,
    topics: String,
}

/// The parts of the catalog that have to be read again.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outdated {
    /// The whole catalog; the other fields are empty then.
    pub everything: bool,
    /// The roles whose access to all relations has changed, dropped roles included.
    pub roles: BTreeSet<String>,
    /// The changed relations by `relay.watch_list.id`, removed relations included.
    pub relations: BTreeSet<i32>,
    /// Whether the rules of private channels have changed.
    pub topics: bool,
}

impl Marks {
    /// Adds a row: kind, name and hash.
    pub fn add(&mut self, kind: &str, name: String, mark: String) {
        match (kind, name.parse()) {
            ("role", _) => {
                self.roles.insert(name, mark);
            }
            ("relation", Ok(id)) => {
                self.relations.insert(id, mark);
            }
            ("topics", _) => self.topics = mark,
            _ => self.database = mark,
        }
    }

    /// Returns what is outdated in a catalog with these marks when the current marks are `now`.
    pub fn outdated(&self, now: &Self) -> Outdated {
        if self.database != now.database {
            return Outdated { everything: true, ..Outdated::default() };
        }
        Outdated {
            everything: false,
            roles: differing(&self.roles, &now.roles),
            relations: differing(&self.relations, &now.relations),
            topics: self.topics != now.topics,
        }
    }
}

impl Outdated {
    /// Whether nothing is outdated.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

fn differing<K: Ord + Clone>(before: &BTreeMap<K, String>, now: &BTreeMap<K, String>) -> BTreeSet<K> {
    let keys = before.keys().chain(now.keys());
    keys.filter(|key| before.get(key) != now.get(key)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marks(rows: &[(&str, &str, &str)]) -> Marks {
        let mut marks = Marks::default();
        for (kind, name, mark) in rows {
            marks.add(kind, (*name).to_owned(), (*mark).to_owned());
        }
        marks
    }

    #[test]
    fn only_differing_marks_are_outdated() {
        let before = marks(&[
            ("database", "", "a"),
            ("role", "anon", "b"),
            ("relation", "1", "c"),
            ("relation", "2", "d"),
        ]);
        assert!(before.outdated(&before).is_empty());
        let now = marks(&[
            ("database", "", "a"),
            ("role", "anon", "x"),
            ("role", "7", "y"),
            ("relation", "2", "z"),
        ]);
        let outdated = before.outdated(&now);
        assert!(!outdated.everything);
        assert_eq!(outdated.roles, ["7", "anon"].map(String::from).into());
        assert_eq!(outdated.relations, [1, 2].into());
    }

    #[test]
    fn a_changed_database_mark_makes_everything_outdated() {
        let before = marks(&[("database", "", "a"), ("relation", "1", "c")]);
        assert!(before.outdated(&marks(&[("database", "", "b"), ("relation", "1", "c")])).everything);
        assert!(Marks::default().outdated(&before).everything);
    }
}
