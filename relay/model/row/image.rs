//! A row image as predicates read it: typed values by column, each parsed once.

use std::cell::OnceCell;
use std::sync::Arc;

use crate::model::row::change::Row;
use crate::model::row::column::{Column, ColumnKind};
use crate::model::row::datum::{Datum, Kind};

/// A row image together with the columns of its relation.
pub struct Image<'a> {
    row: Row<'a>,
    columns: &'a [Column],
    values: Vec<OnceCell<ColumnValue>>,
}

/// The value of a column in an image.
#[derive(Debug, Clone, PartialEq)]
pub enum ColumnValue {
    /// Null.
    Null,
    /// A value that the relay compares.
    One(Datum),
    /// The elements of an array; `None` is a null element.
    Many(Vec<Option<Datum>>),
    /// A text that the relay only matches with patterns: values equal under `=` may differ in bytes.
    Padded(Arc<str>),
    /// A value of a type that only PostgreSQL compares.
    Foreign,
    /// Not in the image: the row was too large, or the column is newer.
    Missing,
}

impl<'a> Image<'a> {
    /// Parses an image of a relation with these columns.
    ///
    /// # Errors
    /// When the text is not one JSON object.
    pub fn parse(json: &'a str, columns: &'a [Column]) -> Result<Self, serde_json::Error> {
        let values = columns.iter().map(|_| OnceCell::new()).collect();
        Ok(Self { row: Row::parse(json)?, columns, values })
    }

    /// Returns an image without columns, for conditions that depend on claims alone.
    pub fn none() -> Self {
        Self { row: Row::default(), columns: &[], values: Vec::new() }
    }

    /// Returns the parsed row.
    pub fn row(&self) -> &Row<'a> {
        &self.row
    }

    /// Returns the value of the column with this index in the relation's list.
    pub fn value(&self, column: usize) -> &ColumnValue {
        const MISSING: &ColumnValue = &ColumnValue::Missing;
        let (Some(cell), Some(column)) = (self.values.get(column), self.columns.get(column)) else {
            return MISSING;
        };
        cell.get_or_init(|| match (self.row.value(&column.name), column.shape()) {
            (None, _) => ColumnValue::Missing,
            (Some("null"), _) => ColumnValue::Null,
            (Some(json), ColumnKind::One(kind)) => {
                kind.from_json(json).map_or(ColumnValue::Foreign, ColumnValue::One)
            }
            (Some(json), ColumnKind::Many(kind)) => {
                let mut elements = Vec::new();
                let mut push = |element: &str| {
                    elements.push(match element {
                        "null" => None,
                        element => Some(kind.from_json(element)?),
                    });
                    Some(())
                };
                flatten(json, MAX_DIMENSIONS, &mut push)
                    .map_or(ColumnValue::Foreign, |()| ColumnValue::Many(elements))
            }
            (Some(json), ColumnKind::Padded) => match Kind::Text.from_json(json) {
                Some(Datum::Text(text)) => ColumnValue::Padded(text),
                _ => ColumnValue::Foreign,
            },
            (Some(_), ColumnKind::Foreign) => ColumnValue::Foreign,
        })
    }
}

/// PostgreSQL's own limit: JSON that is nested deeper is not an array column.
const MAX_DIMENSIONS: usize = 6;

/// Calls `push` for each element of an array with at most `dimensions` dimensions; `None` when it is no such array.
fn flatten(json: &str, dimensions: usize, push: &mut impl FnMut(&str) -> Option<()>) -> Option<()> {
    let dimensions = dimensions.checked_sub(1)?;
    let elements: Vec<&serde_json::value::RawValue> = serde_json::from_str(json).ok()?;
    for element in elements {
        match element.get() {
            nested if nested.starts_with('[') => flatten(nested, dimensions, push)?,
            element => push(element)?,
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::catalog::relation::Relation;

    fn lists() -> Relation {
        let column = |name: &str, known: &str, many: bool| serde_json::json!({"name": name, "type": "t", "known": known, "many": many});
        serde_json::from_value(serde_json::json!({
            "id": 7, "schema": "public", "table": "lists", "kind": "r", "leave_events": false, "full": false, "key": [],
            "columns": [column("many", "int4", true), column("one", "text", false), column("yes", "bool", false)],
            "access": {},
        }))
        .unwrap()
    }

    #[test]
    fn arrays_have_the_elements_of_all_dimensions() {
        let relation = lists();
        let many = |json: &str| {
            let image = format!(r#"{{"many":{json}}}"#);
            Image::parse(&image, &relation.columns).unwrap().value(0).clone()
        };
        let one = |n| Some(Datum::Int(n));
        assert_eq!(many("[[1,2],[3,null]]"), ColumnValue::Many(vec![one(1), one(2), one(3), None]));
        assert_eq!(many("[[[[[[1]]]]]]"), ColumnValue::Many(vec![one(1)]));
        assert_eq!(many("[1,\"x\"]"), ColumnValue::Foreign);
        assert_eq!(many("{}"), ColumnValue::Foreign);
    }

    #[test]
    fn deeper_nesting_than_an_array_is_foreign() {
        let relation = lists();
        let image = format!(r#"{{"many":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(*Image::parse(&image, &relation.columns).unwrap().value(0), ColumnValue::Foreign);
    }

    fn json() -> impl Strategy<Value = String> {
        let leaf = prop_oneof![
            Just("null".to_owned()),
            Just("true".to_owned()),
            "-?(0|[1-9][0-9]{0,19})(\\.[0-9]{1,3})?(e[0-9]{1,3})?",
            "\"[a-z\u{e9} \u{1f600}]{0,6}\"",
            Just(r#""\\x00ff""#.to_owned()),
            Just(r#""\ud83d""#.to_owned()),
        ];
        leaf.prop_recursive(8, 30, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4)
                    .prop_map(|list| format!("[{}]", list.join(","))),
                proptest::collection::vec(inner, 0..3).prop_map(|list| {
                    let fields: Vec<String> =
                        list.iter().enumerate().map(|(n, value)| format!("\"k{n}\" : {value}")).collect();
                    format!("{{{}}}", fields.join(","))
                }),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_value_is_parsed_or_foreign(many in json(), one in json(), yes in json()) {
            let relation = lists();
            let text = format!(r#"{{"many":{many},"one":{one},"yes":{yes}}}"#);
            let image = Image::parse(&text, &relation.columns).unwrap();
            for (column, (json, one)) in [(&many, false), (&one, true), (&yes, true)].into_iter().enumerate() {
                let value = image.value(column);
                prop_assert_eq!(*value == ColumnValue::Null, json == "null");
                prop_assert!(*value != ColumnValue::Missing && !(one && matches!(value, ColumnValue::Many(_))));
            }
            prop_assert_eq!(image.value(3), &ColumnValue::Missing);
        }
    }
}
