//! Names that a misspelled name may stand for.

use strsim::osa_distance;

/// Returns the candidates that differ from the name in the fewest letters, in the order given; none if all differ in more than a
/// third of them. Two letters swapped count as one, upper and lower case as the same.
pub fn near_names<'a, T>(name: &str, candidates: &'a [T], text: impl Fn(&T) -> &str) -> Vec<&'a T> {
    let wanted = name.to_lowercase();
    let letters = wanted.chars().count();
    let limit = letters.div_ceil(3);
    let distance = |candidate: &T| {
        let found = text(candidate).to_lowercase();
        (letters.abs_diff(found.chars().count()) <= limit).then(|| osa_distance(&wanted, &found))
    };
    let measured: Vec<(usize, &T)> = candidates
        .iter()
        .filter_map(|candidate| Some((distance(candidate)?, candidate)))
        .filter(|(distance, _)| *distance <= limit && *distance < letters)
        .collect();
    let Some(least) = measured.iter().map(|(distance, _)| *distance).min() else { return Vec::new() };
    measured.into_iter().filter(|(distance, _)| *distance == least).map(|(_, candidate)| candidate).collect()
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
