//! Partitions that the catalog holds because subscribers name them.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::model::catalog::relation::Catalog;

/// Maximum number of partitions that are held. Each makes each check of the catalog slower.
const MAX_PARTS: usize = 500;
/// How many of them may be held without a subscription, for the next poll or session: the last ones.
const MAX_IDLE: usize = 32;

/// Keeps partitions in the catalog as long as it exists.
#[derive(Debug, Clone, Default)]
pub struct HeldParts(#[allow(dead_code, reason = "counted by their holders")] Vec<Arc<()>>);

/// The partitions whose rights the catalog holds, by OID.
#[derive(Debug, Default)]
pub struct NamedParts {
    parts: BTreeMap<u32, NamedPart>,
    /// Counts the calls of [`Self::hold`].
    now: u64,
}

#[derive(Debug)]
struct NamedPart {
    holder: Arc<()>,
    /// See [`NamedParts::now`].
    used: u64,
}

impl NamedParts {
    /// Holds these partitions, and removes those without a holder, except the last ones. Beyond the maximum a partition is not
    /// held: it answers as a table that is not watched, and watching it is the remedy.
    pub fn hold(&mut self, parts: &[u32]) -> HeldParts {
        self.now += 1;
        let mut held = Vec::with_capacity(parts.len());
        for oid in parts {
            if self.parts.len() >= MAX_PARTS + MAX_IDLE && !self.parts.contains_key(oid) {
                self.let_go(MAX_IDLE.saturating_sub(1));
            }
            if self.parts.len() < MAX_PARTS + MAX_IDLE || self.parts.contains_key(oid) {
                let part = self.parts.entry(*oid);
                let part = part.or_insert_with(|| NamedPart { holder: Arc::default(), used: 0 });
                part.used = self.now;
                held.push(Arc::clone(&part.holder));
            }
        }
        self.let_go(MAX_IDLE);
        HeldParts(held)
    }

    /// Removes the partitions without a holder, except the last `kept` of them.
    fn let_go(&mut self, kept: usize) {
        let idle = self.parts.iter().filter(|(_, part)| Arc::strong_count(&part.holder) == 1);
        let mut idle: Vec<(u64, u32)> = idle.map(|(oid, part)| (part.used, *oid)).collect();
        idle.sort_unstable_by(|one, other| other.cmp(one));
        for (_, oid) in idle.iter().skip(kept) {
            self.parts.remove(oid);
        }
    }

    /// Removes the partitions that this catalog does not have. One that comes back is held again when it is named.
    pub fn retain(&mut self, catalog: &Catalog) {
        self.parts.retain(|oid, _| catalog.has_part(*oid));
    }

    /// Returns the OIDs, in order.
    pub fn oids(&self) -> Vec<u32> {
        self.parts.keys().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_are_held_while_they_are_named_and_the_last_others_a_while() {
        let mut parts = NamedParts::default();
        let held = parts.hold(&[1, 2]);
        for oid in 100..1100 {
            parts.hold(&[oid]);
        }
        // The last one was still held when the others were removed.
        let oids = parts.oids();
        assert_eq!(oids[..2], [1, 2]);
        assert_eq!((oids.len(), oids[2]), (2 + MAX_IDLE + 1, 1099 - u32::try_from(MAX_IDLE).unwrap()));
        drop(held);
        parts.hold(&[5]);
        assert!(!parts.oids().contains(&1) && parts.oids().contains(&5));
    }

    #[test]
    fn beyond_the_maximum_a_partition_is_not_held_and_the_others_stay() {
        let mut parts = NamedParts::default();
        let all: Vec<u32> = (0..2000).collect();
        let held = parts.hold(&all);
        let known = parts.oids();
        assert_eq!((held.0.len(), known.len()), (MAX_PARTS + MAX_IDLE, MAX_PARTS + MAX_IDLE));
        parts.hold(&[9999]);
        assert_eq!(parts.oids(), known);
        drop(held);
        parts.hold(&[9999]);
        assert!(parts.oids().contains(&9999));
    }
}
