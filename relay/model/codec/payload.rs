//! The `data` of a `postgres_changes` message: one change, as seen with one set of rights.

use std::fmt::Write as _;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::model::catalog::relation::{Access, Relation};
use crate::model::policy::visibility::EventKind;
use crate::model::row::change::{Change, Operation, Row, Spelling, quoted};
use crate::model::row::column::Column;
use crate::model::session::broadcast::BroadcastKind;
use crate::model::session::stored_broadcast::StoredBroadcast;

/// Everything that determines the encoded text of a change. Equal views of a change give equal bytes.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// The relation of the change.
    pub relation: &'a Relation,
    /// The subscriber's rights.
    pub access: &'a Access,
    /// The selected columns, to which the key is added. `None` means all columns.
    pub select: Option<&'a [String]>,
    /// The kind of event that the subscriber sees.
    pub meaning: EventKind,
    /// Whether to include the transaction id, the number and the time in microseconds, so that a client can recognise a change
    /// that it receives twice.
    pub exact: bool,
    /// Whether it is the last change of its transaction for the subscriber.
    pub is_last: bool,
}

impl View<'_> {
    fn shows(&self, column: &str) -> bool {
        let wanted = match self.select {
            Some(select) => select.iter().any(|name| name == column) || self.relation.is_key(column),
            None => true,
        };
        wanted && self.access.sees(column)
    }

    fn spelling(&self, name: &str) -> Option<Spelling> {
        let column = self.relation.column(name)?;
        self.shows(name).then(|| column.spelling())
    }
}

/// In a change that is too large, values of more bytes than this are omitted.
const SHORT: usize = 64;

/// How much of a change is included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Extent {
    /// All of it.
    Whole,
    /// All, except that the old row of an update has only the key.
    NewRow,
    /// Keys and short values.
    Short,
    /// Short values only: a key may be long as well.
    Shortest,
}

/// Returns the JSON object sent as `data` ( `schema, table, commit_timestamp, type, columns, record, old_record, errors`).
///
/// `INSERT` has no `old_record`, `DELETE` no `record`. A leave is a `DELETE` with the key and `"leave":true`.
/// Columns that may not be selected never appear. Returns `None` if a row image is malformed.
///
/// If the object has more than `max_bytes`, the old row of an update is reduced to its key. If that is still too large, rows are
/// reduced to the key and short values, and `errors` says so.
pub fn data(change: &Change, view: View<'_>, max_bytes: usize) -> Option<String> {
    let whole = object(change, view, Extent::Whole)?;
    if whole.len() <= max_bytes {
        return Some(whole);
    }
    drop(whole);
    let mut smaller = None;
    for extent in [Extent::NewRow, Extent::Short, Extent::Shortest] {
        let text = object(change, view, extent)?;
        let fits = text.len() <= max_bytes;
        smaller = Some(text);
        if fits {
            break;
        }
    }
    smaller
}

/// Adds the cursor to the object of a change, as the last field.
pub fn with_cursor(mut data: String, cursor: &str) -> String {
    if data.ends_with('}') {
        data.pop();
    }
    data.reserve_exact(cursor.len() + 14);
    data.push_str(r#","cursor":""#);
    data.push_str(cursor);
    data.push_str("\"}");
    data
}

/// Returns the object of an insert with the row of a later change of that row, given both objects with their cursors. `None` if
/// they are not such objects.
pub fn with_newer_row(insert: &str, newer: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Object<'a> {
        #[serde(borrow)]
        schema: &'a RawValue,
        #[serde(borrow)]
        table: &'a RawValue,
        commit_timestamp: &'a str,
        txid: &'a str,
        number: &'a str,
        #[serde(borrow)]
        columns: &'a RawValue,
        #[serde(borrow)]
        record: &'a RawValue,
        #[serde(borrow)]
        errors: &'a RawValue,
        cursor: &'a str,
    }
    let insert: Object<'_> = serde_json::from_str(insert).ok()?;
    let newer: Object<'_> = serde_json::from_str(newer).ok()?;
    let Object { schema, table, commit_timestamp, txid, number, cursor, .. } = insert;
    let Object { columns, record, errors, .. } = newer;
    let text = format!(
        r#"{{"schema":{schema},"table":{table},"commit_timestamp":"{commit_timestamp}","txid":"{txid}","number":"{number}","type":"INSERT","columns":{columns},"record":{record},"errors":{errors}}}"#
    );
    Some(with_cursor(text, cursor))
}

fn object(change: &Change, view: View<'_>, extent: Extent) -> Option<String> {
    let operation = view.meaning.operation();
    let mut text = String::with_capacity(256 + change.after.as_ref().map_or(0, String::len));
    let _ = write!(
        text,
        r#"{{"schema":{},"table":{},"commit_timestamp":"{}"{},"type":"{}","columns":{}"#,
        quoted(&view.relation.schema),
        quoted(&view.relation.table),
        if view.exact { change.exact_timestamp() } else { change.commit_timestamp() },
        if view.exact { identification(change, view.is_last) } else { String::new() },
        operation.name(),
        columns(view),
    );
    if operation != Operation::Delete {
        let _ = write!(text, r#","record":{}"#, row(change.after.as_deref()?, view, extent)?);
    }
    match view.meaning {
        EventKind::Insert => {}
        // The old row may be hidden, including its key: use the key of the new row.
        EventKind::Enter => {
            let _ = write!(text, r#","old_record":{}"#, key(change.after.as_deref()?, view, extent)?);
        }
        EventKind::Leave => {
            let key = key(change.before.as_deref()?, view, extent)?;
            let _ = write!(text, r#","old_record":{key},"leave":true"#);
        }
        EventKind::Update | EventKind::Delete => {
            let before = change.before.as_deref()?;
            let is_included =
                view.relation.full && (extent != Extent::NewRow || view.meaning == EventKind::Delete);
            let old = if is_included { row(before, view, extent)? } else { key(before, view, extent)? };
            let _ = write!(text, r#","old_record":{old}"#);
        }
    }
    text.push_str(if change.oversize || extent > Extent::NewRow {
        r#","errors":["Error 413: Payload Too Large"]}"#
    } else {
        r#","errors":null}"#
    });
    Some(text)
}

/// Identifies the change. The numbers are strings because they exceed JavaScript's safe integers.
fn identification(change: &Change, is_last: bool) -> String {
    let last = if is_last { r#","last":true"# } else { "" };
    format!(r#","txid":"{}","number":"{}"{last}"#, change.xid, change.number)
}

/// Returns the JSON object of a broadcast from the database. Bytes are written as hex digits, as in rows.
pub fn broadcast_object(stored: &StoredBroadcast, change: &Change, is_last: bool) -> String {
    let StoredBroadcast { topic, broadcast, .. } = stored;
    let (name, content) = match &broadcast.kind {
        BroadcastKind::Bytes(_) => ("binary_payload", format!("\"{}\"", hex(&broadcast.content))),
        _ => ("payload", String::from_utf8_lossy(&broadcast.content).into_owned()),
    };
    format!(
        r#"{{"type":"broadcast","topic":{},"private":{},"event":{},"commit_timestamp":"{}"{},"meta":{},"{name}":{content}}}"#,
        quoted(&topic.name),
        topic.is_private,
        quoted(broadcast.event()),
        change.exact_timestamp(),
        identification(change, is_last),
        stored.meta(false),
    )
}

fn hex(bytes: &[u8]) -> String {
    let mut digits = String::with_capacity(2 * bytes.len());
    bytes.iter().for_each(|byte| _ = write!(digits, "{byte:02x}"));
    digits
}

/// Returns a row with the selected columns that these rights allow. `None` if the text is not a row.
pub fn record(row: &str, relation: &Relation, access: &Access, select: Option<&[String]>) -> Option<String> {
    self::row(
        row,
        View { relation, access, select, meaning: EventKind::Insert, exact: false, is_last: false },
        Extent::Whole,
    )
}

fn columns(view: View<'_>) -> String {
    let shown: Vec<String> = view
        .relation
        .columns
        .iter()
        .filter(|column| view.shows(&column.name))
        .map(|Column { name, kind, .. }| format!(r#"{{"name":{},"type":{}}}"#, quoted(name), quoted(kind)))
        .collect();
    format!("[{}]", shown.join(","))
}

fn row(image: &str, view: View<'_>, extent: Extent) -> Option<String> {
    let row = Row::parse(image).ok()?;
    let is_included = |name: &str| {
        extent <= Extent::NewRow
            || (extent == Extent::Short && view.relation.is_key(name))
            || is_short(&row, name)
    };
    Some(row.project(|name| view.spelling(name).filter(|_| is_included(name))))
}

fn key(image: &str, view: View<'_>, extent: Extent) -> Option<String> {
    let row = Row::parse(image).ok()?;
    let is_included = |name: &str| extent <= Extent::Short || is_short(&row, name);
    let in_key = |name: &str| view.relation.is_key(name).then(|| view.spelling(name)).flatten();
    Some(row.project(|name| in_key(name).filter(|_| is_included(name))))
}

fn is_short(row: &Row<'_>, column: &str) -> bool {
    row.value(column).is_some_and(|value| value.len() <= SHORT)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use time::OffsetDateTime;

    use super::*;
    use crate::model::catalog::relation::tests::todos;
    use crate::model::row::change::{ImageState, RelationId};

    fn change(before: Option<&str>, after: Option<&str>) -> Change {
        Change {
            number: 1,
            xid: 700,
            committed: OffsetDateTime::from_unix_timestamp_nanos(1_795_166_142_318_219_000).unwrap(),
            relation: RelationId::whole(7),
            leaf: None,
            shape: None,
            began: None,
            image_state: ImageState::default(),
            operation: Operation::Update,
            oversize: false,
            before: before.map(str::to_owned),
            after: after.map(str::to_owned),
        }
    }

    #[track_caller]
    fn check(
        full: bool,
        role: &str,
        select: Option<&[String]>,
        meaning: EventKind,
        expected: serde_json::Value,
    ) {
        let relation = todos(full, false);
        let before = r#"{"id":1,"owner":"a","title":"old","raw":"\\x01"}"#;
        let after = r#"{"id":2,"owner":"b","title":"new","raw":"\\x02"}"#;
        let view = View {
            relation: &relation,
            access: relation.access(role).unwrap(),
            select,
            meaning,
            exact: false,
            is_last: false,
        };
        let text = data(&change(Some(before), Some(after)), view, usize::MAX).unwrap();
        let sent: serde_json::Value = serde_json::from_str(&text).unwrap();
        for name in ["record", "old_record", "leave", "type"] {
            assert_eq!(sent.get(name), expected.get(name), "{name} in {text}");
        }
        assert_eq!(sent["errors"], serde_json::Value::Null);
    }

    #[test]
    fn old_and_new_row_by_kind_of_event() {
        let whole = |n: i64, owner: &str, title: &str| serde_json::json!({"id": n, "owner": owner, "title": title, "raw": format!("0{n}")});
        let (old, new) = (whole(1, "a", "old"), whole(2, "b", "new"));
        check(
            false,
            "authenticated",
            None,
            EventKind::Insert,
            serde_json::json!({"type": "INSERT", "record": new}),
        );
        check(
            false,
            "authenticated",
            None,
            EventKind::Update,
            serde_json::json!({"type": "UPDATE", "record": new, "old_record": {"id": 1}}),
        );
        check(
            true,
            "authenticated",
            None,
            EventKind::Update,
            serde_json::json!({"type": "UPDATE", "record": new, "old_record": old}),
        );
        check(
            true,
            "authenticated",
            None,
            EventKind::Enter,
            serde_json::json!({"type": "UPDATE", "record": new, "old_record": {"id": 2}}),
        );
        check(
            true,
            "authenticated",
            None,
            EventKind::Delete,
            serde_json::json!({"type": "DELETE", "old_record": old}),
        );
        check(
            true,
            "authenticated",
            None,
            EventKind::Leave,
            serde_json::json!({"type": "DELETE", "old_record": {"id": 1}, "leave": true}),
        );
    }

    #[test]
    fn a_column_without_right_or_not_selected_appears_nowhere() {
        check(
            true,
            "narrow",
            None,
            EventKind::Update,
            serde_json::json!({"type": "UPDATE", "record": {"id": 2, "title": "new"}, "old_record": {"id": 1, "title": "old"}}),
        );
        check(
            true,
            "authenticated",
            Some(&[String::from("owner")]),
            EventKind::Update,
            serde_json::json!({"type": "UPDATE", "record": {"id": 2, "owner": "b"}, "old_record": {"id": 1, "owner": "a"}}),
        );
    }

    #[test]
    fn a_large_change_is_reduced_to_the_new_row_then_to_short_values() {
        let relation = todos(true, false);
        let access = relation.access("authenticated").unwrap();
        let image = |id: usize, title: usize| {
            format!(r#"{{"id":{id},"owner":"a","title":"{}"}}"#, "\\u0001".repeat(title))
        };
        let sent = |meaning, before: &str, after: &str, most| {
            let view =
                View { relation: &relation, access, select: None, meaning, exact: false, is_last: false };
            let text = data(&change(Some(before), Some(after)), view, most).unwrap();
            let sent: serde_json::Value = serde_json::from_str(&text).unwrap();
            let size = |name: &str| sent.get(name).map(|row| row.as_object().unwrap().len());
            assert!(sent["columns"].as_array().unwrap().len() > 2);
            (text.len() <= most, size("record"), size("old_record"), sent["errors"].is_null())
        };
        let (old, new) = (image(1, 300), image(2, 300));
        assert_eq!(sent(EventKind::Update, &old, &new, 5000), (true, Some(3), Some(3), true));
        assert_eq!(sent(EventKind::Update, &old, &new, 3000), (true, Some(3), Some(1), true));
        assert_eq!(sent(EventKind::Update, &old, &new, 1000), (true, Some(2), Some(2), false));
        assert_eq!(sent(EventKind::Delete, &old, &new, 1000), (true, None, Some(2), false));
        assert_eq!(sent(EventKind::Insert, &old, &new, 1000), (true, Some(2), None, false));
        let long_key = format!(r#"{{"id":"{}","owner":"a","title":"b"}}"#, "k".repeat(2000));
        assert_eq!(sent(EventKind::Update, &long_key, &long_key, 1000), (true, Some(2), Some(2), false));
        assert_eq!(sent(EventKind::Leave, &long_key, &long_key, 1000), (true, None, Some(0), false));
    }

    #[test]
    fn the_cursor_is_the_last_field() {
        let data = with_cursor(String::from(r#"{"a":"x\ny"}"#), "AQ");
        assert_eq!(data, r#"{"a":"x\ny","cursor":"AQ"}"#);
    }

    #[test]
    fn time_is_utc_with_milliseconds() {
        assert_eq!(change(None, None).commit_timestamp(), "2026-11-20T09:15:42.318Z");
    }

    proptest! {
        #[test]
        fn only_selected_columns_with_the_right_to_select_them_appear(
            names in proptest::sample::subsequence(vec!["raw", "title", "id", "unknown", "owner"], 0..=5).prop_shuffle(),
            value in prop_oneof![
                Just("null"), Just(r#""\\xff""#), Just(r#""\\x""#), Just("1.50"), Just(r#"{"a" : [1, 2]}"#), Just(r#""\ud800""#),
            ],
            select in proptest::option::of(proptest::sample::subsequence(vec!["id", "title", "owner"], 1..3)),
            full: bool, narrow: bool, meaning in 0..5_usize,
        ) {
            let relation = todos(full, false);
            let access = relation.access(if narrow { "narrow" } else { "authenticated" }).unwrap();
            let select: Option<Vec<String>> = select.map(|names| names.into_iter().map(str::to_owned).collect());
            let select = select.as_deref();
            let meaning = [EventKind::Insert, EventKind::Update, EventKind::Enter, EventKind::Delete, EventKind::Leave][meaning];
            let fields: Vec<String> = names.iter().map(|name| format!("\"{name}\" : {value}")).collect();
            let image = format!("{{{}}}", fields.join(","));
            let view = View { relation: &relation, access, select, meaning, exact: false, is_last: false };
            let text = data(&change(Some(&image), Some(&image)), view, usize::MAX).unwrap();
            let sent = Row::parse(&text).unwrap();
            for record in ["record", "old_record"].iter().filter_map(|name| sent.value(name)) {
                let record = Row::parse(record).unwrap();
                for name in record.names() {
                    let wanted = relation.is_key(name) || select.is_none_or(|names| names.iter().any(|one| one == name));
                    prop_assert!(access.sees(name) && wanted && relation.column(name).is_some(), "{}", text);
                    let kept = if name == "raw" { value.replacen(r"\\x", "", 1) } else { value.to_owned() };
                    prop_assert_eq!(record.value(name), Some(&*kept));
                }
            }
        }
    }
}
