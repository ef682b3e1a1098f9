//! `like` and `ilike` patterns, matched as PostgreSQL does, in time linear in the text whatever the pattern is.
//!
//! Valid only for UTF-8 databases and deterministic collations, where `like` compares characters one by one. `ilike` compares
//! both sides after `lower`, whose result is known here for ASCII only.

use serde::Deserialize;

use crate::model::row::truth::Truth;

/// What `lower` does under the collation of a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Folding {
    /// It lowers ASCII letters and keeps every other character.
    Ascii,
    /// It lowers ASCII letters; its effect on other characters is unknown here.
    Letters,
    /// Its effect is unknown here.
    Unknown,
}

/// A pattern, split at its `%`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    /// The run at the start of the text.
    first: Run,
    /// The runs that follow, in order, at any distance.
    middle: Vec<Run>,
    /// The run at the end of the text; `None` when the pattern has no `%`, so that `first` is all of it.
    last: Option<Run>,
    /// Whether both sides are lowered before they are compared.
    folds_case: bool,
    /// Whether the match is exact for ASCII texts only.
    ascii_only: bool,
}

/// The characters between two `%`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Run {
    /// Literal text.
    Text(String),
    /// Characters; `None` is `_`, which matches any character.
    Wildcards(Vec<Option<char>>),
}

/// The maximum length of a run with `_`: its search keeps one bit for each character in a machine word.
const MAX_WILDCARD_RUN: usize = u64::BITS as usize;

/// The maximum length of an indexed prefix, in bytes.
const MAX_PREFIX_BYTES: usize = 16;

impl Pattern {
    /// Compiles a `like` pattern, or an `ilike` pattern where `folding` is set; `None` when only PostgreSQL can match it.
    pub fn new(pattern: &str, folding: Option<Folding>) -> Option<Self> {
        let ascii_only = match folding {
            None | Some(Folding::Ascii) => false,
            Some(Folding::Letters) if pattern.is_ascii() => true,
            Some(Folding::Letters | Folding::Unknown) => return None,
        };
        let mut runs = vec![Vec::new()];
        let mut characters = pattern.chars();
        while let Some(character) = characters.next() {
            let item = match character {
                '%' => {
                    runs.push(Vec::new());
                    continue;
                }
                '_' => None,
                // PostgreSQL raises for a trailing backslash, but only where the match gets that far.
                '\\' => Some(characters.next()?),
                literal => Some(literal),
            };
            let item =
                item.map(|literal| if folding.is_some() { literal.to_ascii_lowercase() } else { literal });
            runs.last_mut()?.push(item);
        }
        let mut runs = runs.into_iter().map(Run::new).collect::<Option<Vec<_>>>()?;
        let last = if runs.len() > 1 { runs.pop() } else { None };
        let mut runs = runs.into_iter();
        let first = runs.next()?;
        let middle = runs.filter(|run| !run.is_empty()).collect();
        Some(Self { first, middle, last, folds_case: folding.is_some(), ascii_only })
    }

    /// Whether the match is exact for every text.
    pub fn is_exact(&self) -> bool {
        !self.ascii_only
    }

    /// Returns a prefix of every matching text, at most as long as the index stores.
    pub fn prefix(&self) -> &str {
        match &self.first {
            Run::Text(text) if !self.folds_case => {
                let mut end = text.len().min(MAX_PREFIX_BYTES);
                while !text.is_char_boundary(end) {
                    end -= 1;
                }
                &text[..end]
            }
            _ => "",
        }
    }

    /// Matches the text.
    pub fn matches(&self, text: &str) -> Truth {
        match (self.folds_case, self.ascii_only && !text.is_ascii()) {
            (_, true) => Truth::Undecided,
            (true, false) => self.matches_folded(&text.to_ascii_lowercase()).into(),
            (false, false) => self.matches_folded(text).into(),
        }
    }

    fn matches_folded(&self, text: &str) -> bool {
        let Some(mut rest) = self.first.after_start(text) else { return false };
        let Some(last) = &self.last else { return rest.is_empty() };
        // Taking the leftmost match of each run leaves the most text for the following runs.
        for run in &self.middle {
            match run.after_first(rest) {
                Some(after) => rest = after,
                None => return false,
            }
        }
        last.is_end_of(rest)
    }
}

impl Run {
    /// Returns `None` when a run with `_` is too long to be searched.
    fn new(items: Vec<Option<char>>) -> Option<Self> {
        match items.iter().copied().collect::<Option<String>>() {
            Some(text) => Some(Self::Text(text)),
            None => (items.len() <= MAX_WILDCARD_RUN).then_some(Self::Wildcards(items)),
        }
    }

    fn is_empty(&self) -> bool {
        matches!(self, Self::Text(text) if text.is_empty())
    }

    /// Returns the text after the run, when the run is at its start.
    fn after_start<'t>(&self, text: &'t str) -> Option<&'t str> {
        match self {
            Self::Text(run) => text.strip_prefix(run.as_str()),
            Self::Wildcards(items) => {
                let mut characters = text.chars();
                let fits = |item: &Option<char>| {
                    characters.next().is_some_and(|character| item.is_none_or(|item| item == character))
                };
                items.iter().all(fits).then_some(characters.as_str())
            }
        }
    }

    /// Returns the text after the first occurrence of the run.
    fn after_first<'t>(&self, text: &'t str) -> Option<&'t str> {
        match self {
            Self::Text(run) => text.find(run.as_str()).map(|at| &text[at + run.len()..]),
            Self::Wildcards(items) => {
                // Bit n is set when the last n + 1 characters match the first n + 1 of the run.
                let mut states = 0_u64;
                let mut characters = text.chars();
                while let Some(character) = characters.next() {
                    let (mut candidates, mut next) = (states << 1 | 1, 0_u64);
                    while candidates != 0 {
                        let n = candidates.trailing_zeros();
                        candidates &= candidates - 1;
                        let item = items.get(n as usize);
                        let fits = item.is_some_and(|item| item.is_none_or(|item| item == character));
                        next |= u64::from(fits) << n;
                    }
                    states = next;
                    if states >> (items.len() - 1) & 1 == 1 {
                        return Some(characters.as_str());
                    }
                }
                None
            }
        }
    }

    fn is_end_of(&self, text: &str) -> bool {
        match self {
            Self::Text(run) => text.ends_with(run.as_str()),
            Self::Wildcards(items) => {
                let mut characters = text.chars().rev();
                items.iter().rev().all(|item| {
                    characters.next().is_some_and(|character| item.is_none_or(|item| item == character))
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn check(pattern: &str, text: &str, expected: bool) {
        assert_eq!(
            Pattern::new(pattern, None).unwrap().matches(text),
            expected.into(),
            "{text:?} like {pattern:?}"
        );
    }

    #[test]
    fn percent_matches_any_run_and_underscore_one_character() {
        for (pattern, text, expected) in [
            ("", "", true),
            ("", "a", false),
            ("%", "", true),
            ("%%", "ü", true),
            ("_", "ü", true),
            ("_", "", false),
            ("__", "🦀", false),
            ("a%", "abc", true),
            ("%c", "abc", true),
            ("%b%", "abc", true),
            ("a%a", "a", false),
            ("a%a", "aba", true),
            ("%ab%ab", "ab", false),
            ("%ab%ab", "abab", true),
            ("%_b_%", "abc", true),
            ("%_b_%", "bc", false),
            ("_%_", "a", false),
            ("%a_c%c", "abcabc", true),
            (r"\%", "%", true),
            (r"\%", "a", false),
            (r"\\", r"\", true),
            (r"\ü%", "üx", true),
            ("A%", "abc", false),
        ] {
            check(pattern, text, expected);
        }
    }

    #[test]
    fn unknown_matches_are_undecided() {
        assert_eq!(Pattern::new("abc\\", None), None);
        assert_eq!(Pattern::new("ü", Some(Folding::Letters)), None);
        assert_eq!(Pattern::new("a", Some(Folding::Unknown)), None);
        assert_eq!(Pattern::new(&format!("%{}a%", "_".repeat(64)), None), None);
        let letters = Pattern::new("A%", Some(Folding::Letters)).unwrap();
        assert_eq!(letters.matches("aK"), Truth::True);
        assert_eq!(letters.matches("a\u{212a}"), Truth::Undecided);
        let ascii = Pattern::new("Ä\\B%", Some(Folding::Ascii)).unwrap();
        assert_eq!(ascii.matches("ÄbÜ"), Truth::True);
        assert_eq!(ascii.matches("äbÜ"), Truth::False);
        assert!(ascii.is_exact() && !letters.is_exact());
    }

    /// The definition of `like`, in time that grows with the product of both lengths.
    fn by_definition(pattern: &[char], text: &[char]) -> bool {
        match pattern {
            [] => text.is_empty(),
            ['%', rest @ ..] => (0..=text.len()).any(|from| by_definition(rest, &text[from..])),
            ['_', rest @ ..] => !text.is_empty() && by_definition(rest, &text[1..]),
            [literal, rest @ ..] => text.first() == Some(literal) && by_definition(rest, &text[1..]),
        }
    }

    proptest! {
        #[test]
        fn patterns_match_as_defined(pattern in "[ab%_ü]{0,8}", text in "[abü]{0,10}") {
            let characters = |text: &str| text.chars().collect::<Vec<_>>();
            let expected = by_definition(&characters(&pattern), &characters(&text));
            let compiled = Pattern::new(&pattern, None).unwrap();
            prop_assert_eq!(compiled.matches(&text), expected.into());
            prop_assert!(!expected || text.starts_with(compiled.prefix()));
        }
    }
}
