//! Who is present in a topic, and what has changed since it was last told. Exact for any order of calls, and linear in the
//! number of members and changes.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::model::session::member::MemberId;

/// What a member has tracked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    /// Unique among all metas of all relays.
    pub reference: String,
    /// The reference of the meta that this one replaces, as members know it.
    pub previous: Option<String>,
    /// The object that the member tracked, as JSON.
    pub object: String,
}

/// The presence of a topic's members. Each member has one key and at most one meta; a key may have several members.
#[derive(Debug, Default)]
pub struct PresenceState {
    /// The members of each key, in the order in which they came.
    keys: BTreeMap<Arc<str>, Vec<MemberId>>,
    metas: HashMap<MemberId, (Arc<str>, Arc<Meta>)>,
    /// The members that changed since [`Self::settle`], with their key and what they had tracked before.
    changed: HashMap<MemberId, (Arc<str>, Option<Arc<Meta>>)>,
    bytes: usize,
}

/// What changed: metas that came, and metas that went, with their keys. A meta that was replaced is in both.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct PresenceDiff {
    /// Metas that came, in order of their keys.
    pub joins: Vec<(Arc<str>, Arc<Meta>)>,
    /// Metas that went, in order of their keys.
    pub leaves: Vec<(Arc<str>, Arc<Meta>)>,
}

impl PresenceState {
    /// Records what a member tracks under its key, which never changes. Returns false if it tracks that already.
    pub fn track(&mut self, member: MemberId, key: &Arc<str>, reference: String, object: String) -> bool {
        let now = self.metas.get(&member).map(|(_, meta)| Arc::clone(meta));
        if now.as_ref().is_some_and(|meta| meta.object == object) {
            return false;
        }
        let (_, before) = self.changed.entry(member).or_insert_with(|| (Arc::clone(key), now.clone()));
        let previous = before.as_ref().map(|meta| meta.reference.clone());
        self.bytes += size_of_meta(key, &object);
        match &now {
            Some(meta) => self.bytes -= size_of_meta(key, &meta.object),
            None => self.keys.entry(Arc::clone(key)).or_default().push(member),
        }
        let meta = Arc::new(Meta { reference, previous, object });
        self.metas.insert(member, (Arc::clone(key), meta));
        true
    }

    /// Removes what a member tracks. Returns false if it tracks nothing.
    pub fn untrack(&mut self, member: MemberId) -> bool {
        let Some((key, meta)) = self.metas.remove(&member) else { return false };
        self.bytes -= size_of_meta(&key, &meta.object);
        if let Some(members) = self.keys.get_mut(&key) {
            members.retain(|other| *other != member);
            if members.is_empty() {
                self.keys.remove(&key);
            }
        }
        self.changed.entry(member).or_insert((key, Some(meta)));
        true
    }

    /// Returns the number of tracked objects.
    pub fn count(&self) -> usize {
        self.metas.len()
    }

    /// Returns the approximate size of the state as JSON, in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the size of the object that a member tracks.
    pub fn bytes_of(&self, member: MemberId) -> usize {
        self.metas.get(&member).map_or(0, |(key, meta)| size_of_meta(key, &meta.object))
    }

    /// Returns all metas with their keys, in order of the keys.
    pub fn current(&self) -> Vec<(Arc<str>, Arc<Meta>)> {
        let metas = |(key, members): (&Arc<str>, &Vec<MemberId>)| -> Vec<_> {
            let meta = |member| Some((Arc::clone(key), Arc::clone(&self.metas.get(member)?.1)));
            members.iter().filter_map(meta).collect()
        };
        self.keys.iter().flat_map(metas).collect()
    }

    /// Returns all members with their keys and metas, in any order.
    pub fn metas(&self) -> impl Iterator<Item = (MemberId, &Arc<str>, &Arc<Meta>)> {
        self.metas.iter().map(|(member, (key, meta))| (*member, key, meta))
    }

    /// Returns all metas as they were before the changes since [`Self::settle`].
    pub fn before(&self) -> Vec<(Arc<str>, Arc<Meta>)> {
        let unchanged = self.metas.iter().filter(|(member, _)| !self.changed.contains_key(member));
        let unchanged = unchanged.map(|(_, (key, meta))| (Arc::clone(key), Arc::clone(meta)));
        let changed = self.changed.values();
        let changed =
            changed.filter_map(|(key, before)| Some((Arc::clone(key), Arc::clone(before.as_ref()?))));
        sorted(unchanged.chain(changed).collect())
    }

    /// Whether the member's presence changed since [`Self::settle`].
    pub fn has_changed(&self, member: MemberId) -> bool {
        self.changed.contains_key(&member)
    }

    /// Returns the changes since [`Self::settle`].
    pub fn diff(&self) -> PresenceDiff {
        let mut diff = PresenceDiff::default();
        for (member, (key, before)) in &self.changed {
            let now = self.metas.get(member).map(|(_, meta)| meta);
            diff.joins.extend(now.map(|meta| (Arc::clone(key), Arc::clone(meta))));
            diff.leaves.extend(before.iter().map(|meta| (Arc::clone(key), Arc::clone(meta))));
        }
        PresenceDiff { joins: sorted(diff.joins), leaves: sorted(diff.leaves) }
    }

    /// Marks all changes as told.
    pub fn settle(&mut self) {
        self.changed = HashMap::new();
    }
}

impl PresenceDiff {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.joins.is_empty() && self.leaves.is_empty()
    }
}

fn sorted(mut metas: Vec<(Arc<str>, Arc<Meta>)>) -> Vec<(Arc<str>, Arc<Meta>)> {
    metas.sort_by(|(one, first), (other, second)| {
        one.cmp(other).then_with(|| first.reference.cmp(&second.reference))
    });
    metas
}

/// Returns the approximate size of a meta as JSON, with its key and references.
fn size_of_meta(key: &str, object: &str) -> usize {
    key.len() + object.len() + 80
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::model::session::channel::ChannelId;
    use crate::model::session::member::NodeId;

    fn member(session: u64) -> MemberId {
        MemberId { node: NodeId(1), channel: ChannelId { session, channel: 1 } }
    }

    fn key(name: &str) -> Arc<str> {
        Arc::from(name)
    }

    fn references(metas: &[(Arc<str>, Arc<Meta>)]) -> Vec<String> {
        metas.iter().map(|(key, meta)| format!("{key}/{}", meta.reference)).collect()
    }

    fn track(state: &mut PresenceState, of: u64, under: &str, reference: &str) -> bool {
        state.track(member(of), &key(under), reference.to_owned(), format!("{{\"r\":\"{reference}\"}}"))
    }

    #[test]
    fn a_second_track_is_one_change_that_names_what_it_replaces() {
        let mut state = PresenceState::default();
        assert!(track(&mut state, 1, "a", "r1"));
        assert_eq!(references(&state.diff().joins), ["a/r1"]);
        state.settle();
        assert!(track(&mut state, 1, "a", "r2") && track(&mut state, 1, "a", "r3"));
        let diff = state.diff();
        assert_eq!(
            (references(&diff.joins), references(&diff.leaves)),
            (vec!["a/r3".into()], vec!["a/r1".into()])
        );
        assert_eq!(diff.joins[0].1.previous.as_deref(), Some("r1"));
        state.settle();
        assert!(!state.track(member(1), &key("a"), String::from("r4"), String::from("{\"r\":\"r3\"}")));
        assert!(state.diff().is_empty());
    }

    #[test]
    fn two_members_of_one_key_come_and_go_on_their_own() {
        let mut state = PresenceState::default();
        track(&mut state, 1, "a", "r1");
        track(&mut state, 2, "a", "r2");
        assert_eq!(references(&state.current()), ["a/r1", "a/r2"]);
        state.settle();
        assert!(state.untrack(member(1)) && !state.untrack(member(1)));
        assert_eq!(references(&state.diff().leaves), ["a/r1"]);
        assert_eq!(references(&state.current()), ["a/r2"]);
    }

    #[test]
    fn what_comes_and_goes_between_two_diffs_is_never_told() {
        let mut state = PresenceState::default();
        track(&mut state, 1, "a", "r1");
        state.untrack(member(1));
        assert!(state.diff().is_empty() && state.bytes() == 0);
        track(&mut state, 1, "a", "r2");
        assert_eq!(state.diff().joins[0].1.previous, None);
    }

    proptest! {
        /// For any sequence of calls: the state before with the diff applied is the current state, and nothing that is in the
        /// state before joins again.
        #[test]
        fn the_state_before_and_the_diff_are_the_current_state(
            steps in proptest::collection::vec((0_u8..4, 1_u64..6), 0..80)
        ) {
            let mut state = PresenceState::default();
            let mut told: BTreeSet<String> = BTreeSet::new();
            for (number, (step, of)) in steps.into_iter().enumerate() {
                match step {
                    0 | 1 => _ = track(&mut state, of, &format!("k{}", of % 3), &format!("r{number}")),
                    2 => _ = state.untrack(member(of)),
                    _ => {
                        let diff = state.diff();
                        for joined in references(&diff.joins) {
                            prop_assert!(told.insert(joined));
                        }
                        for left in references(&diff.leaves) {
                            prop_assert!(told.remove(&left));
                        }
                        state.settle();
                        prop_assert_eq!(state.before(), sorted(state.current()));
                        prop_assert_eq!(&told, &references(&state.current()).into_iter().collect());
                    }
                }
                prop_assert_eq!(&told, &references(&state.before()).into_iter().collect());
                let bytes: usize = state.current().iter().map(|(key, meta)| size_of_meta(key, &meta.object)).sum();
                prop_assert_eq!(state.bytes(), bytes);
            }
        }
    }
}
