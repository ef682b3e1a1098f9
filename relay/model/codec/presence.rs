//! The presence of a topic as JSON, common to all protocols. A large one is cut: the rest of a state follows as changes.

use std::sync::Arc;

use crate::model::presence::state::{Meta, PresenceDiff};

/// Size in bytes above which a content is cut. Clients refuse frames of more than 1 MiB, and one meta may be added.
const MAX_PIECE: usize = 512 * 1024;

/// A part of a presence state or diff.
#[derive(Debug, PartialEq, Eq)]
pub enum PresencePiece {
    /// The state, or the first part of it, which replaces what the client knows.
    State(String),
    /// Metas that join and leave.
    Diff(String),
}

/// Encodes a state. `metas` are in order of their keys.
pub fn state(metas: &[(Arc<str>, Arc<Meta>)]) -> Vec<PresencePiece> {
    let mut pieces = Pieces { is_state: true, ..Pieces::default() };
    for (key, meta) in metas {
        pieces.add(key, Some(meta), None);
    }
    if pieces.done.is_empty() || pieces.bytes() > 0 {
        pieces.cut();
    }
    pieces.done
}

/// Encodes changes; nothing if there are none.
pub fn diff(diff: &PresenceDiff) -> Vec<PresencePiece> {
    let mut pieces = Pieces::default();
    for (key, meta) in &diff.joins {
        pieces.add(key, Some(meta), None);
    }
    for (key, meta) in &diff.leaves {
        pieces.add(key, None, Some(meta));
    }
    if pieces.bytes() > 0 {
        pieces.cut();
    }
    pieces.done
}

/// Encodes a state as one object, whatever its size.
pub fn object(metas: &[(Arc<str>, Arc<Meta>)]) -> String {
    let mut keys = Keys::default();
    for (key, meta) in metas {
        keys.add(key, meta);
    }
    keys.take()
}

#[derive(Default)]
struct Pieces {
    done: Vec<PresencePiece>,
    joins: Keys,
    leaves: Keys,
    /// Whether the next piece is a state.
    is_state: bool,
}

/// An object of keys with their metas, being written.
#[derive(Default)]
struct Keys {
    json: String,
    /// The key whose list of metas is open.
    open: Option<Arc<str>>,
}

impl Pieces {
    fn add(&mut self, key: &Arc<str>, joins: Option<&Meta>, leaves: Option<&Meta>) {
        if self.bytes() > MAX_PIECE {
            self.cut();
        }
        joins.into_iter().for_each(|meta| self.joins.add(key, meta));
        leaves.into_iter().for_each(|meta| self.leaves.add(key, meta));
    }

    fn bytes(&self) -> usize {
        self.joins.json.len() + self.leaves.json.len()
    }

    fn cut(&mut self) {
        let joins = self.joins.take();
        self.done.push(match std::mem::take(&mut self.is_state) {
            true => PresencePiece::State(joins),
            false => {
                let leaves = self.leaves.take();
                PresencePiece::Diff(format!(r#"{{"joins":{joins},"leaves":{leaves}}}"#))
            }
        });
    }
}

impl Keys {
    fn add(&mut self, key: &Arc<str>, meta: &Meta) {
        if self.open.as_deref() == Some(&**key) {
            self.json.push(',');
        } else {
            if self.open.replace(Arc::clone(key)).is_some() {
                self.json.push_str("]},");
            }
            self.json.push_str(&quoted(key));
            self.json.push_str(r#":{"metas":["#);
        }
        add_meta(&mut self.json, meta);
    }

    fn take(&mut self) -> String {
        let end = if self.open.take().is_some() { "]}" } else { "" };
        format!("{{{}{end}}}", std::mem::take(&mut self.json))
    }
}

/// Adds a meta: the tracked object with its references. They come last, because parsers take the last of equal names, and a client
/// must not choose them.
fn add_meta(json: &mut String, meta: &Meta) {
    let object = meta.object.trim_end();
    let fields = object.strip_suffix('}').unwrap_or(object);
    json.push_str(fields);
    if fields.trim_end() != "{" {
        json.push(',');
    }
    if let Some(previous) = &meta.previous {
        json.push_str(r#""phx_ref_prev":"#);
        json.push_str(&quoted(previous));
        json.push(',');
    }
    json.push_str(r#""phx_ref":"#);
    json.push_str(&quoted(&meta.reference));
    json.push('}');
}

fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("a string always has a JSON form")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn meta(key: &str, reference: &str, previous: Option<&str>, object: &str) -> (Arc<str>, Arc<Meta>) {
        let previous = previous.map(str::to_owned);
        (
            Arc::from(key),
            Arc::new(Meta { reference: reference.to_owned(), previous, object: object.to_owned() }),
        )
    }

    fn parsed(piece: &PresencePiece) -> Value {
        let (PresencePiece::State(json) | PresencePiece::Diff(json)) = piece;
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_state_has_the_metas_of_each_key() {
        assert_eq!(state(&[]), [PresencePiece::State(String::from("{}"))]);
        let metas = [
            meta("a\"b", "r1", None, "{}"),
            meta("a\"b", "r2", Some("r0"), r#"{ "n" : 1.50 } "#),
            meta("c", "r3", None, r#"{"phx_ref":"forged","phx_ref_prev":"x"}"#),
        ];
        let expected = json!({
            "a\"b": {"metas": [{"phx_ref": "r1"}, {"n": 1.5, "phx_ref_prev": "r0", "phx_ref": "r2"}]},
            "c": {"metas": [{"phx_ref": "r3", "phx_ref_prev": "x"}]},
        });
        let pieces = state(&metas);
        assert_eq!((pieces.len(), parsed(&pieces[0])), (1, expected.clone()));
        assert_eq!(serde_json::from_str::<Value>(&object(&metas)).unwrap(), expected);
    }

    #[test]
    fn a_diff_has_both_halves_and_nothing_without_changes() {
        assert_eq!(diff(&PresenceDiff::default()), []);
        let joins = vec![meta("a", "r2", Some("r1"), r#"{"n":2}"#)];
        let leaves = vec![meta("a", "r1", None, r#"{"n":1}"#)];
        let expected = json!({
            "joins": {"a": {"metas": [{"n": 2, "phx_ref_prev": "r1", "phx_ref": "r2"}]}},
            "leaves": {"a": {"metas": [{"n": 1, "phx_ref": "r1"}]}},
        });
        assert_eq!(parsed(&diff(&PresenceDiff { joins, leaves })[0]), expected);
    }

    #[test]
    fn a_large_state_is_cut_into_a_state_and_changes_that_lose_nothing() {
        let object = format!(r#"{{"x":"{}"}}"#, "y".repeat(3000));
        let metas: Vec<_> =
            (0..1000).map(|n| meta(&format!("k{:04}", n / 400), &format!("r{n}"), None, &object)).collect();
        let pieces = state(&metas);
        assert!(pieces.len() > 5);
        assert!(matches!(pieces[0], PresencePiece::State(_)));
        let mut found = 0;
        for (n, piece) in pieces.iter().enumerate() {
            let value = parsed(piece);
            assert!(value.to_string().len() < 700_000);
            let keys = if n == 0 { &value } else { &value["joins"] };
            found += keys
                .as_object()
                .unwrap()
                .values()
                .map(|key| key["metas"].as_array().unwrap().len())
                .sum::<usize>();
        }
        assert_eq!(found, 1000);
    }
}
