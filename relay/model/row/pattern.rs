//! Patterns of `like` and `ilike`, matched as PostgreSQL matches them, in time that grows with the text and not with
//! what the pattern says.
//!
//! Only for UTF-8 databases and deterministic collations: there `like` compares characters one by one. `ilike` compares
//! what `lower` makes of both sides, which is known here for ASCII alone.

use serde::Deserialize;

use crate::model::row::truth::Truth;

/// What `lower` does under the collation of a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Folding {
    /// ASCII letters get small, every other character stays as it is.
    Ascii,
    /// ASCII letters get small; what becomes of a text with other characters only PostgreSQL knows.
    Letters,
    /// Unknown.
    Unknown,
}

/// A pattern, taken apart at its `%`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    /// The text begins with this.
    first: Run,
    /// Then these follow, in this order and anywhere.
    middle: Vec<Run>,
    /// The text ends with this; none when the pattern has no `%`, so that `first` is all of it.
    last: Option<Run>,
    /// Both sides are compared in small letters.
    folds_case: bool,
    /// It is exact for texts of ASCII only.
    ascii_only: bool,
}

/// What stands between two `%`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Run {
    /// A text.
    Text(String),
    /// Characters, of which none stands for any.
    Wildcards(Vec<Option<char>>),
}

/// A run with `_` is looked for by one machine word, a bit for each of its characters.
const MAX_WILDCARD_RUN: usize = u64::BITS as usize;

/// So many bytes of what a pattern begins with are worth an index entry.
const MAX_PREFIX_BYTES: usize = 16;

impl Pattern {
    /// A pattern of `like`, or of `ilike` where `folds` says how letters compare; none when only PostgreSQL can match it.
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
                // A pattern that ends here raises, but only where the text reaches so far.
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

    /// Whether it is exact for every text.
    pub fn is_exact(&self) -> bool {
        !self.ascii_only
    }

    /// What each text that it matches begins with, as far as an index wants to know.
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

    /// Whether it matches the text.
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
        // The leftmost place for each run leaves most for those behind it.
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
    /// None when it has too many characters to be looked for.
    fn new(items: Vec<Option<char>>) -> Option<Self> {
        match items.iter().copied().collect::<Option<String>>() {
            Some(text) => Some(Self::Text(text)),
            None => (items.len() <= MAX_WILDCARD_RUN).then_some(Self::Wildcards(items)),
        }
    }

    fn is_empty(&self) -> bool {
        matches!(self, Self::Text(text) if text.is_empty())
    }

    /// What stands behind the run at the start of the text.
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

    /// What stands behind the first place where the run is in the text.
    fn after_first<'t>(&self, text: &'t str) -> Option<&'t str> {
        match self {
            Self::Text(run) => text.find(run.as_str()).map(|at| &text[at + run.len()..]),
            Self::Wildcards(items) => {
                // Bit n: the last n + 1 characters are those that the run begins with.
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
    fn percent_stands_for_any_run_and_underscore_for_one_character() {
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
    fn what_is_not_known_here_is_left_to_postgresql() {
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

    /// As the definition says it, in time that grows with the product of both.
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
        fn patterns_match_what_their_definition_matches(pattern in "[ab%_ü]{0,8}", text in "[abü]{0,10}") {
            let characters = |text: &str| text.chars().collect::<Vec<_>>();
            let expected = by_definition(&characters(&pattern), &characters(&text));
            let compiled = Pattern::new(&pattern, None).unwrap();
            prop_assert_eq!(compiled.matches(&text), expected.into());
            prop_assert!(!expected || text.starts_with(compiled.prefix()));
        }
    }
}
