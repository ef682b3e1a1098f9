//! The subscription index: finds the entries that a row may concern by the row's values, without testing each entry.
//!
//! An entry has one or more keys: equal values and text prefixes by hash, integer ranges by order, or none, so that every row may
//! concern it. An entry that is found still has to be decided; one that is not found cannot match.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::sync::Arc;

use crate::model::policy::index_key::{IndexKey, Range};
use crate::model::row::datum::Datum;
use crate::model::row::image::{ColumnValue, Image};

/// Entries by the values that a row must have to concern them.
#[derive(Debug)]
pub struct SubscriptionIndex<T> {
    any: BTreeSet<T>,
    /// By columns, then by their values.
    equal: BTreeMap<Vec<usize>, HashMap<Vec<Datum>, BTreeSet<T>>>,
    ranges: BTreeMap<usize, Ranges<T>>,
    prefixes: BTreeMap<usize, Prefixes<T>>,
}

/// Entries by integer ranges. Ranges of similar length are ordered by their first value, so those that contain a value are near
/// it. Ranges without a lower bound are ordered by their last value.
#[derive(Debug)]
struct Ranges<T> {
    by_length: BTreeMap<u32, BTreeMap<i64, BTreeSet<(i64, T)>>>,
    by_last: BTreeMap<i64, BTreeSet<T>>,
}

/// Entries by text prefix, grouped by its length.
#[derive(Debug)]
struct Prefixes<T>(BTreeMap<usize, HashMap<Arc<str>, BTreeSet<T>>>);

impl<T> Default for SubscriptionIndex<T> {
    fn default() -> Self {
        Self {
            any: BTreeSet::new(),
            equal: BTreeMap::new(),
            ranges: BTreeMap::new(),
            prefixes: BTreeMap::new(),
        }
    }
}

impl<T: Copy + Ord + Hash> SubscriptionIndex<T> {
    /// Inserts an entry under a key; without a key every row may concern it.
    pub fn insert(&mut self, key: Option<&IndexKey>, entry: T) {
        match key {
            Some(IndexKey { equal, .. }) if !equal.is_empty() => {
                let (columns, values) = equal.iter().cloned().unzip();
                self.equal.entry(columns).or_default().entry(values).or_default().insert(entry);
            }
            Some(IndexKey { range: Some((column, range)), .. }) => {
                self.ranges.entry(*column).or_default().insert(*range, entry);
            }
            Some(IndexKey { prefix: Some((column, prefix)), .. }) => {
                self.prefixes.entry(*column).or_default().insert(prefix, entry);
            }
            _ => _ = self.any.insert(entry),
        }
    }

    /// Removes an entry from a key, and structures that become empty.
    pub fn remove(&mut self, key: Option<&IndexKey>, entry: T) {
        match key {
            Some(IndexKey { equal, .. }) if !equal.is_empty() => {
                let (columns, values): (Vec<usize>, Vec<Datum>) = equal.iter().cloned().unzip();
                let Some(by_values) = self.equal.get_mut(&columns) else { return };
                if let Some(entries) = by_values.get_mut(&values) {
                    entries.remove(&entry);
                    if entries.is_empty() {
                        by_values.remove(&values);
                    }
                }
                if by_values.is_empty() {
                    self.equal.remove(&columns);
                }
            }
            Some(IndexKey { range: Some((column, range)), .. }) => {
                if let Some(ranges) = self.ranges.get_mut(column) {
                    ranges.remove(*range, entry);
                    if ranges.by_length.is_empty() && ranges.by_last.is_empty() {
                        self.ranges.remove(column);
                    }
                }
            }
            Some(IndexKey { prefix: Some((column, prefix)), .. }) => {
                if let Some(prefixes) = self.prefixes.get_mut(column) {
                    prefixes.remove(prefix, entry);
                    if prefixes.0.is_empty() {
                        self.prefixes.remove(column);
                    }
                }
            }
            _ => _ = self.any.remove(&entry),
        }
    }

    /// Calls `found` for each entry that the image may concern, for some more than once.
    pub fn look_up(&self, image: &Image<'_>, mut found: impl FnMut(T)) {
        self.any.iter().copied().for_each(&mut found);
        for (columns, by_values) in &self.equal {
            probe(image, columns, &mut Vec::with_capacity(columns.len()), by_values, &mut found);
        }
        for (column, ranges) in &self.ranges {
            if let ColumnValue::One(Datum::Int(value)) = image.value(*column) {
                ranges.look_up(*value, &mut found);
            }
        }
        for (column, prefixes) in &self.prefixes {
            if let ColumnValue::One(Datum::Text(text)) | ColumnValue::Padded(text) = image.value(*column) {
                prefixes.look_up(text, &mut found);
            }
        }
    }

    /// Whether there is no entry, and no structure left of earlier ones.
    pub fn is_empty(&self) -> bool {
        self.any.is_empty() && self.equal.is_empty() && self.ranges.is_empty() && self.prefixes.is_empty()
    }
}

/// Looks up the values of these columns; each element of an array is a value.
fn probe<T: Copy>(
    image: &Image<'_>,
    columns: &[usize],
    values: &mut Vec<Datum>,
    by_values: &HashMap<Vec<Datum>, BTreeSet<T>>,
    found: &mut impl FnMut(T),
) {
    let Some(column) = columns.get(values.len()) else {
        if let Some(entries) = by_values.get(values.as_slice()) {
            entries.iter().copied().for_each(found);
        }
        return;
    };
    let mut descend = |datum: &Datum| {
        values.push(datum.clone());
        probe(image, columns, values, by_values, found);
        values.pop();
    };
    match image.value(*column) {
        ColumnValue::One(datum) => descend(datum),
        ColumnValue::Many(elements) => elements.iter().flatten().for_each(descend),
        ColumnValue::Null | ColumnValue::Padded(_) | ColumnValue::Foreign | ColumnValue::Missing => {}
    }
}

impl<T> Default for Ranges<T> {
    fn default() -> Self {
        Self { by_length: BTreeMap::new(), by_last: BTreeMap::new() }
    }
}

impl<T: Copy + Ord> Ranges<T> {
    /// Returns the length class: lengths within a class differ by less than a factor of two.
    fn class(range: Range) -> u32 {
        u64::BITS - range.last.abs_diff(range.first).leading_zeros()
    }

    fn insert(&mut self, range: Range, entry: T) {
        if range.first == i64::MIN {
            self.by_last.entry(range.last).or_default().insert(entry);
        // An empty range contains nothing.
        } else if range.first <= range.last {
            let by_first = self.by_length.entry(Self::class(range)).or_default();
            by_first.entry(range.first).or_default().insert((range.last, entry));
        }
    }

    fn remove(&mut self, range: Range, entry: T) {
        if range.first == i64::MIN {
            if let Some(entries) = self.by_last.get_mut(&range.last) {
                entries.remove(&entry);
                if entries.is_empty() {
                    self.by_last.remove(&range.last);
                }
            }
            return;
        }
        let class = Self::class(range);
        let Some(by_first) = self.by_length.get_mut(&class) else { return };
        if let Some(entries) = by_first.get_mut(&range.first) {
            entries.remove(&(range.last, entry));
            if entries.is_empty() {
                by_first.remove(&range.first);
            }
        }
        if by_first.is_empty() {
            self.by_length.remove(&class);
        }
    }

    fn look_up(&self, value: i64, found: &mut impl FnMut(T)) {
        self.by_last.range(value..).flat_map(|(_, entries)| entries).copied().for_each(&mut *found);
        for (class, by_first) in &self.by_length {
            // The earliest start of a range of this class that reaches the value.
            let reach = 1_u64.checked_shl(*class).map_or(u64::MAX, |length| length - 1);
            let earliest = value.saturating_sub_unsigned(reach);
            for (last, entry) in by_first.range(earliest..=value).flat_map(|(_, entries)| entries) {
                if *last >= value {
                    found(*entry);
                }
            }
        }
    }
}

impl<T> Default for Prefixes<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T: Copy + Ord> Prefixes<T> {
    fn insert(&mut self, prefix: &Arc<str>, entry: T) {
        let by_prefix = self.0.entry(prefix.len()).or_default();
        by_prefix.entry(Arc::clone(prefix)).or_default().insert(entry);
    }

    fn remove(&mut self, prefix: &str, entry: T) {
        let Some(by_prefix) = self.0.get_mut(&prefix.len()) else { return };
        if let Some(entries) = by_prefix.get_mut(prefix) {
            entries.remove(&entry);
            if entries.is_empty() {
                by_prefix.remove(prefix);
            }
        }
        if by_prefix.is_empty() {
            self.0.remove(&prefix.len());
        }
    }

    fn look_up(&self, text: &str, found: &mut impl FnMut(T)) {
        for (length, by_prefix) in &self.0 {
            let entries = text.get(..*length).and_then(|prefix| by_prefix.get(prefix));
            entries.into_iter().flatten().copied().for_each(&mut *found);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::catalog::relation::tests::todos;

    fn found(index: &SubscriptionIndex<u32>, image: &str) -> Vec<u32> {
        let relation = todos(false, false);
        let mut entries = BTreeSet::new();
        index.look_up(&Image::parse(image, &relation.columns).unwrap(), |entry| _ = entries.insert(entry));
        entries.into_iter().collect()
    }

    fn title(text: &str) -> IndexKey {
        IndexKey { equal: vec![(2, Datum::Text(text.into()))], ..IndexKey::default() }
    }

    fn ids(first: i64, last: i64) -> IndexKey {
        IndexKey { range: Some((0, Range { first, last })), ..IndexKey::default() }
    }

    #[test]
    fn a_row_finds_the_entries_under_its_values() {
        let mut index = SubscriptionIndex::default();
        index.insert(Some(&title("a")), 1);
        index.insert(Some(&title("b")), 2);
        index.insert(Some(&ids(5, 7)), 3);
        index.insert(None, 4);
        let both =
            IndexKey { equal: vec![(0, Datum::Int(7)), (2, Datum::Text("a".into()))], ..IndexKey::default() };
        index.insert(Some(&both), 5);
        assert_eq!(found(&index, r#"{"id":7,"owner":null,"title":"a","raw":null}"#), [1, 3, 4, 5]);
        assert_eq!(found(&index, r#"{"id":8,"owner":null,"title":"b","raw":null}"#), [2, 4]);
        assert_eq!(found(&index, r#"{"id":5,"owner":null,"title":null,"raw":null}"#), [3, 4]);
    }

    #[test]
    fn a_row_finds_the_prefixes_of_its_texts_and_removal_leaves_nothing() {
        let prefix = |text: &str| IndexKey { prefix: Some((2, text.into())), ..IndexKey::default() };
        let mut index = SubscriptionIndex::default();
        for (entry, text) in (0..).zip(["a", "ab", "ü", "b", "ab"]) {
            index.insert(Some(&prefix(text)), entry);
        }
        for (text, expected) in
            [("abc", vec![0, 1, 4]), ("a", vec![0]), ("üb", vec![2]), ("", vec![]), ("c", vec![])]
        {
            assert_eq!(
                found(&index, &format!(r#"{{"id":1,"owner":null,"title":"{text}","raw":null}}"#)),
                expected
            );
        }
        for (entry, text) in (0..).zip(["a", "ab", "ü", "b", "ab"]) {
            index.remove(Some(&prefix(text)), entry);
        }
        assert!(index.is_empty());
    }

    proptest! {
        #[test]
        fn ranges_find_what_a_scan_finds_and_removal_leaves_nothing(
            ranges in proptest::collection::vec((-50..50_i64, 0..60_i64, any::<bool>(), any::<bool>()), 0..40),
            value in -120..120_i64,
        ) {
            let ranges: Vec<IndexKey> = ranges
                .into_iter()
                .map(|(first, length, open_below, open_above)| ids(
                    if open_below { i64::MIN } else { first },
                    if open_above { i64::MAX } else { first + length },
                ))
                .collect();
            let mut index = SubscriptionIndex::default();
            for (entry, key) in (0..).zip(&ranges) {
                index.insert(Some(key), entry);
            }
            let holds = |key: &IndexKey| key.range.is_some_and(|(_, range)| range.first <= value && value <= range.last);
            let expected: Vec<u32> =
                (0..).zip(&ranges).filter(|(_, key)| holds(key)).map(|(entry, _)| entry).collect();
            prop_assert_eq!(found(&index, &format!(r#"{{"id":{value}}}"#)), expected);
            for (entry, key) in (0..).zip(&ranges) {
                index.remove(Some(key), entry);
            }
            prop_assert!(index.is_empty());
        }
    }
}
