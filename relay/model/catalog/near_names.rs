//! Names that a misspelled name may stand for.

/// Returns the candidates that differ from the name in the fewest letters, in the order given; none if all differ in more than a
/// third of them. Upper and lower case count as the same.
pub fn near_names<'a, T>(name: &str, candidates: &'a [T], text: impl Fn(&T) -> &str) -> Vec<&'a T> {
    let wanted: Vec<char> = name.to_lowercase().chars().collect();
    let limit = wanted.len().div_ceil(3);
    let distance = |candidate: &T| {
        let found: Vec<char> = text(candidate).to_lowercase().chars().collect();
        (wanted.len().abs_diff(found.len()) <= limit).then(|| typing_errors(&wanted, &found))
    };
    let measured: Vec<(usize, &T)> = candidates
        .iter()
        .filter_map(|candidate| Some((distance(candidate)?, candidate)))
        .filter(|(distance, _)| *distance <= limit && *distance < wanted.len())
        .collect();
    let Some(least) = measured.iter().map(|(distance, _)| *distance).min() else { return Vec::new() };
    measured.into_iter().filter(|(distance, _)| *distance == least).map(|(_, candidate)| candidate).collect()
}

/// Returns how many letters have to be inserted, removed, replaced or swapped with the next one to turn one name into the other.
fn typing_errors(one: &[char], other: &[char]) -> usize {
    let mut rows: Vec<Vec<usize>> = vec![(0..=other.len()).collect()];
    for (i, letter) in one.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, found) in other.iter().enumerate() {
            let replaced = rows[i][j] + usize::from(letter != found);
            let mut least = replaced.min(rows[i][j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *letter == other[j - 1] && one[i - 1] == *found {
                least = least.min(rows[i - 1][j - 1] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[one.len()][other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_names_are_found_and_far_ones_are_not() {
        let names = ["todos", "Orders", "deals", "deal_items", "a"];
        for (name, expected) in [
            ("todo", vec!["todos"]),
            ("tdoos", vec!["todos"]),
            ("orders", vec!["Orders"]),
            ("dael", vec!["deals"]),
            ("dealitem", vec!["deal_items"]),
            ("nowhere", vec![]),
            ("b", vec![]),
            ("", vec![]),
        ] {
            let found = near_names(name, &names, |name| name);
            assert_eq!(found.into_iter().copied().collect::<Vec<_>>(), expected, "{name}");
        }
    }
}
