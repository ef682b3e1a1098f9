//! A row image as predicates read it: typed values by column, each read once.

use std::cell::OnceCell;

use crate::model::change::Row;
use crate::model::datum::Datum;
use crate::model::relation::{Relation, Shape};

/// An image together with the relation whose columns it has.
pub struct Image<'a> {
    row: Row<'a>,
    relation: &'a Relation,
    held: Vec<OnceCell<Held>>,
}

/// What an image holds in a column.
#[derive(Debug, Clone, PartialEq)]
pub enum Held {
    /// Null.
    Null,
    /// A value that can be compared here.
    One(Datum),
    /// The elements of an array; nulls are none.
    Many(Vec<Option<Datum>>),
    /// A value of a type that only PostgreSQL compares.
    Foreign,
    /// Nothing: the column was left out because the row was too large.
    Missing,
}

impl<'a> Image<'a> {
    /// Takes an image apart. The columns are those of `relation`.
    ///
    /// # Errors
    /// When the text is not one JSON object.
    pub fn parse(json: &'a str, relation: &'a Relation) -> Result<Self, serde_json::Error> {
        let held = relation.columns.iter().map(|_| OnceCell::new()).collect();
        Ok(Self { row: Row::parse(json)?, relation, held })
    }

    /// The row, taken apart.
    pub fn row(&self) -> &Row<'a> {
        &self.row
    }

    /// What stands in the column at this place of [`Relation::columns`].
    pub fn held(&self, column: usize) -> &Held {
        const NOTHING: &Held = &Held::Missing;
        let (Some(cell), Some(column)) = (self.held.get(column), self.relation.columns.get(column)) else {
            return NOTHING;
        };
        cell.get_or_init(|| match (self.row.value(&column.name), column.shape()) {
            (None, _) => Held::Missing,
            (Some("null"), _) => Held::Null,
            (Some(json), Shape::One(kind)) => kind.from_json(json).map_or(Held::Foreign, Held::One),
            (Some(json), Shape::Many(kind)) => {
                let mut elements = Vec::new();
                let mut take = |element: &str| {
                    elements.push(match element {
                        "null" => None,
                        element => Some(kind.from_json(element)?),
                    });
                    Some(())
                };
                flatten(json, &mut take).map_or(Held::Foreign, |()| Held::Many(elements))
            }
            (Some(_), Shape::Foreign) => Held::Foreign,
        })
    }
}

/// Calls `take` for each element of an array of any dimensions; none when it is no array.
fn flatten(json: &str, take: &mut impl FnMut(&str) -> Option<()>) -> Option<()> {
    let elements: Vec<&serde_json::value::RawValue> = serde_json::from_str(json).ok()?;
    for element in elements {
        match element.get() {
            nested if nested.starts_with('[') => flatten(nested, take)?,
            element => take(element)?,
        }
    }
    Some(())
}
