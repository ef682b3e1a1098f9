//! Row images: what a subscriber is told of them is JSON, has no column that it did not ask for or may not see, and has
//! each value to the letter. Reading typed values out of them never fails but by saying so.
//!
//! The first line chooses by its letters: `n` a role with rights to some columns only · `f` the whole old row is told ·
//! `o` oversize · `x` the exact time · `t` and `r` columns to select · `0` to `4` what the change means. The second line
//! is the row as it was, the third as it became.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use relay::model::row::change::{Change, Operation, ImageState, RelationId, Row};
use relay::model::codec::payload::{View, data, record};
use relay::model::row::image::Image;
use relay::model::policy::visibility::EventKind;
use relay::model::catalog::relation::Relation;
use serde_json::json;
use serde_json::value::RawValue;

fn relation(full: bool) -> Relation {
    serde_json::from_value(json!({
        "id": 7, "schema": "public", "table": "to\"dos", "kind": "r", "leave_events": true, "full": full, "key": ["id"],
        "columns": [
            {"name": "id", "type": "int8", "known": "int8"},
            {"name": "owner", "type": "uuid", "known": "uuid"},
            {"name": "title", "type": "text", "known": "text"},
            {"name": "raw", "type": "bytea"},
            {"name": "done", "type": "bool", "known": "bool"},
            {"name": "tags", "type": "_text", "known": "text", "many": true},
            {"name": "numbers", "type": "_int4", "known": "int4", "many": true},
            {"name": "a \"quoted\" one", "type": "jsonb"},
        ],
        "access": {
            "all": {
                "columns": ["id", "owner", "title", "raw", "done", "tags", "numbers", "a \"quoted\" one"],
                "policy": null, "judge": null,
            },
            "narrow": {"columns": ["id", "title", "numbers"], "policy": null, "judge": null},
        },
    }))
    .unwrap()
}

static PLAIN: LazyLock<Relation> = LazyLock::new(|| relation(false));
static FULL: LazyLock<Relation> = LazyLock::new(|| relation(true));

fuzz_target!(|text: &str| {
    let mut lines = text.split('\n');
    let (choice, before, after) = (lines.next().unwrap_or_default(), lines.next(), lines.next());
    let chosen = |letter: char| choice.contains(letter);
    let relation: &Relation = if chosen('f') { &FULL } else { &PLAIN };
    let access = relation.access(if chosen('n') { "narrow" } else { "all" }).unwrap();
    let select: Vec<String> = [('t', "title"), ('r', "raw")]
        .into_iter()
        .filter(|(letter, _)| chosen(*letter))
        .map(|(_, name)| name.to_owned())
        .collect();
    let select = (!select.is_empty()).then_some(select.as_slice());
    let meanings = [EventKind::Insert, EventKind::Update, EventKind::Enter, EventKind::Delete, EventKind::Leave];
    let meaning = choice.chars().find_map(|c| meanings.get(c.to_digit(10)? as usize).copied());
    let view =
        View { relation, access, select, meaning: meaning.unwrap_or(EventKind::Insert), exact: chosen('x'), is_last: false };
    let change = Change {
        number: 1,
        xid: 700,
        committed: time::OffsetDateTime::UNIX_EPOCH,
        relation: RelationId::whole(7),
        leaf: None,
        shape: None,
        began: None,
        image_state: ImageState::default(),
        operation: Operation::Update,
        oversize: chosen('o'),
        before: before.map(str::to_owned),
        after: after.map(str::to_owned),
    };
    if let Some(told) = data(&change, view) {
        let told = Row::parse(&told).unwrap_or_else(|error| panic!("{error}: {told}"));
        for name in ["record", "old_record"] {
            if let Some(told) = told.value(name) {
                shows_no_more(told, &view);
            }
        }
    }
    for image in [before, after].into_iter().flatten() {
        if let Some(told) = record(image, relation, access, select) {
            shows_no_more(&told, &view);
            is_to_the_letter(&told, image);
        }
        if let Ok(row) = Row::parse(image) {
            let short = row.without_long_values(20);
            assert!(Row::parse(&short).unwrap().names().all(|name| row.value(name).is_some()));
        }
        if let Ok(image) = Image::parse(image, &relation.columns) {
            for column in 0..=relation.columns.len() {
                image.value(column);
            }
        }
    }
});

fn shows_no_more(told: &str, view: &View<'_>) {
    serde_json::from_str::<&RawValue>(told).unwrap_or_else(|error| panic!("{error}: {told}"));
    for name in Row::parse(told).unwrap().names() {
        assert!(view.access.sees(name), "{name} in {told}");
        let selected = |select: &[String]| select.iter().any(|one| one == name);
        assert!(view.select.is_none_or(selected) || view.relation.is_key(name), "{name} in {told}");
    }
}

fn is_to_the_letter(told: &str, image: &str) {
    let (told, image) = (Row::parse(told).unwrap(), Row::parse(image).unwrap());
    for name in told.names().filter(|name| *name != "raw") {
        assert_eq!(told.value(name), image.value(name));
    }
}
