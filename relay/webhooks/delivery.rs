//! What is sent for a change or a gap: its id, its body, and the rows that it is about.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use crate::model::log::cursor::Epoch;
use crate::model::row::change::{Row, quoted};

/// Which other deliveries a delivery waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// Earlier ones about a row with one of these keys, given by hash.
    Rows(Vec<i64>),
    /// All earlier ones; later ones wait for it. It is about a row whose key is not known.
    Any,
    /// All earlier ones; later ones do not wait for it. It tells a gap: who reads the rows again has what later ones tell.
    Gap,
}

/// A delivery that was not sent yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// Its id, the same at each attempt.
    pub id: String,
    /// What it waits for.
    pub scope: Scope,
    /// Its body.
    pub body: Bytes,
    /// When the change was committed.
    pub time: Option<String>,
}

/// The object of a change, as far as it is read here.
#[derive(Deserialize)]
struct ChangeObject<'a> {
    commit_timestamp: Option<&'a str>,
    txid: &'a str,
    number: &'a str,
    #[serde(borrow)]
    record: Option<&'a RawValue>,
    #[serde(borrow)]
    old_record: Option<&'a RawValue>,
}

impl Delivery {
    /// Returns the delivery of a change, the object of which is as event streams give it; `None` if it is none. `key` is the key of the
    /// relation, `None` where changes need no order.
    ///
    /// The id has the epoch, because transactions and numbers are used again after an older state of the database was restored.
    pub fn of_change(object: &str, epoch: Epoch, key: Option<&[String]>) -> Option<Self> {
        let change: ChangeObject<'_> = serde_json::from_str(object).ok()?;
        let id = format!("{}-{}-{:x}", change.txid, change.number, epoch.0);
        let scope = key.map_or(Scope::Rows(Vec::new()), |key| scope(&change, key));
        let time = change.commit_timestamp.map(str::to_owned);
        Some(Self { id, scope, body: Bytes::copy_from_slice(object.as_bytes()), time })
    }

    /// Returns the delivery that tells a gap in the changes of a relation. `position` tells it from other gaps.
    pub fn of_gap(why: &str, relation: Option<&(String, String)>, position: &str) -> Self {
        let name = |part: Option<&String>| part.map_or_else(|| String::from("null"), |name| quoted(name));
        let (schema, table) = (name(relation.map(|name| &name.0)), name(relation.map(|name| &name.1)));
        let body = format!(
            r#"{{"schema":{schema},"table":{table},"type":"GAP","errors":[{}],"cursor":"{position}"}}"#,
            quoted(why)
        );
        let id = format!("gap-{:016x}", hash([why, position].into_iter()));
        Self { id, scope: Scope::Gap, body: Bytes::from(body), time: None }
    }
}

/// Returns the rows that a change is about: an update of a key is about two.
fn scope(change: &ChangeObject<'_>, key: &[String]) -> Scope {
    let mut rows = Vec::new();
    for image in [change.old_record, change.record].into_iter().flatten() {
        let Some(row) = key_hash(image.get(), key) else { return Scope::Any };
        if !rows.contains(&row) {
            rows.push(row);
        }
    }
    Scope::Rows(rows)
}

/// Returns the hash of a row's key; `None` if the row lacks a part of it. All rows of a relation without a key have the same.
fn key_hash(row: &str, key: &[String]) -> Option<i64> {
    let row = Row::parse(row).ok()?;
    let values = key.iter().map(|column| row.value(column)).collect::<Option<Vec<_>>>()?;
    Some(hash(values.into_iter()))
}

/// Returns a hash that is the same in every process.
fn hash<'a>(texts: impl Iterator<Item = &'a str>) -> i64 {
    let mut sha = Sha256::new();
    for text in texts {
        sha.update((text.len() as u64).to_be_bytes());
        sha.update(text);
    }
    let mut first = [0; 8];
    first.copy_from_slice(&sha.finalize()[..8]);
    i64::from_be_bytes(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "id";

    fn scope_of(rows: &str, key: &[&str]) -> Scope {
        let key: Vec<String> = key.iter().map(|name| (*name).to_owned()).collect();
        let object = format!(r#"{{"type":"x","txid":"7","number":"9",{rows}}}"#);
        Delivery::of_change(&object, Epoch(-1), Some(&key)).unwrap().scope
    }

    #[test]
    fn an_id_names_the_change_and_the_history() {
        let object = r#"{"txid":"7","number":"9","record":{"id":1}}"#;
        let delivery = Delivery::of_change(object, Epoch(-1), None).unwrap();
        assert_eq!(delivery.id, "7-9-ffffffffffffffff");
        assert_eq!(delivery.scope, Scope::Rows(Vec::new()));
        assert_eq!(delivery.body, object);
        assert_eq!(Delivery::of_change("[]", Epoch(1), None), None);
    }

    #[test]
    fn a_row_is_known_by_its_key_in_every_event() {
        let insert = scope_of(r#""record":{"a":"x","id":1}"#, &[KEY]);
        assert_eq!(insert, scope_of(r#""old_record":{"id":1}"#, &[KEY]));
        assert_eq!(insert, scope_of(r#""record":{"id":1,"a":2},"old_record":{"id":1}"#, &[KEY]));
        assert_ne!(insert, scope_of(r#""record":{"id":2}"#, &[KEY]));
        assert_ne!(
            scope_of(r#""record":{"a":"1","b":"23"}"#, &["a", "b"]),
            scope_of(r#""record":{"a":"12","b":"3"}"#, &["a", "b"])
        );
    }

    #[test]
    fn a_changed_key_is_about_both_rows() {
        let Scope::Rows(rows) = scope_of(r#""record":{"id":2},"old_record":{"id":1}"#, &[KEY]) else {
            panic!("the key is known")
        };
        assert_eq!(rows.len(), 2);
    }

    #[test]
    fn a_row_without_its_key_may_be_any_row() {
        assert_eq!(scope_of(r#""record":{"a":1}"#, &[KEY]), Scope::Any);
        assert_eq!(scope_of(r#""record":{"id":1},"old_record":{}"#, &[KEY]), Scope::Any);
        assert_eq!(scope_of(r#""record":{"a":1}"#, &[]), scope_of(r#""record":{"b":1}"#, &[]));
    }

    #[test]
    fn a_gap_is_json_whatever_its_names_are() {
        let relation = (String::from("a\"b"), String::from("t"));
        let gap = Delivery::of_gap("say \"hi\"", Some(&relation), "c1");
        let body: serde_json::Value = serde_json::from_slice(&gap.body).unwrap();
        assert_eq!(body["schema"], "a\"b");
        assert_eq!(body["errors"][0], "say \"hi\"");
        assert_eq!(gap.id, Delivery::of_gap("say \"hi\"", None, "c1").id);
        assert_ne!(gap.id, Delivery::of_gap("say \"hi\"", None, "c2").id);
    }
}
