//! In which order the rows of a table are given, and where a page of them begins.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::model::catalog::relation::{Access, Relation};
use crate::model::row::change::Row;
use crate::model::subscription::error::SubscribeError;
use crate::model::subscription::filter::{Condition, Operator};

/// The most columns of an order: each costs a few questions to the database.
const MAX_COLUMNS: usize = 16;

/// What a request says of order and pages.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Paging {
    /// The most rows of the page.
    pub limit: Option<usize>,
    /// The columns that it named.
    pub order: Vec<By>,
    /// The page begins after this row.
    pub after: Option<After>,
}

/// A column of an order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct By {
    /// Its name.
    pub column: String,
    /// The largest value first.
    pub descending: bool,
    /// Nulls come before all values.
    pub nulls_first: bool,
}

/// A row in an order of rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct After {
    /// The order, as [`described`] writes it.
    order: String,
    /// The values of its columns.
    values: Vec<Option<String>>,
}

/// What comes after a row in one column of an order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Beyond {
    /// The same value.
    pub equal: Condition,
    /// A later value; none when there is none.
    pub later: Option<Condition>,
    /// Nulls come later.
    pub or_null: bool,
    /// The same value or a later one, where nulls do not come later: an index finds these.
    pub from: Option<Condition>,
}

impl By {
    /// Reads `column.desc.nullslast,…`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Vec<Self>, SubscribeError> {
        let order: Vec<Self> =
            text.split(',').map(|term| Self::one(term.trim())).collect::<Result<_, _>>()?;
        match order.len() > MAX_COLUMNS {
            true => Err(SubscribeError(format!("order: at most {MAX_COLUMNS} columns are expected"))),
            false => Ok(order),
        }
    }

    fn one(term: &str) -> Result<Self, SubscribeError> {
        let (rest, nulls_first) = match term.rsplit_once('.') {
            Some((rest, "nullsfirst")) => (rest, Some(true)),
            Some((rest, "nullslast")) => (rest, Some(false)),
            _ => (term, None),
        };
        let (column, descending) = match rest.rsplit_once('.') {
            Some((column, "desc")) => (column, true),
            Some((column, "asc")) => (column, false),
            _ => (rest, false),
        };
        if column.is_empty() || column.contains('\0') {
            return Err(SubscribeError(String::from(FORM)));
        }
        let nulls_first = nulls_first.unwrap_or(descending);
        Ok(Self { column: column.to_owned(), descending, nulls_first })
    }

    fn key(column: &str) -> Self {
        Self { column: column.to_owned(), descending: false, nulls_first: false }
    }

    /// What comes after this value, or after null.
    fn beyond(&self, value: Option<String>, is_nullable: bool) -> Beyond {
        let condition = |operator, negated, value: String| {
            let values = vec![value];
            Condition { column: self.column.clone(), negated, operator, values }
        };
        let null = || String::from("null");
        match value {
            None => Beyond {
                equal: condition(Operator::Is, false, null()),
                later: self.nulls_first.then(|| condition(Operator::Is, true, null())),
                or_null: false,
                from: None,
            },
            Some(value) => {
                let (later, from) = match self.descending {
                    true => (Operator::Lt, Operator::Lte),
                    false => (Operator::Gt, Operator::Gte),
                };
                let or_null = is_nullable && !self.nulls_first;
                Beyond {
                    equal: condition(Operator::Eq, false, value.clone()),
                    later: Some(condition(later, false, value.clone())),
                    or_null,
                    from: (!or_null).then(|| condition(from, false, value)),
                }
            }
        }
    }
}

/// What `order=` may be.
const FORM: &str = "order: column.asc or column.desc is expected, with .nullsfirst or .nullslast behind it if need be; several \
     are joined by commas, such as created_at.desc,id";

impl Paging {
    /// The order in full: the columns that were named, then those of the key that were not, so that no two rows have the
    /// same place.
    ///
    /// # Errors
    /// When a column is not there for this role.
    pub fn order(&self, relation: &Relation, access: &Access, role: &str) -> Result<Vec<By>, SubscribeError> {
        let mut order = self.order.clone();
        for by in &order {
            let (schema, table, column) = (&relation.schema, &relation.table, &by.column);
            let Some(known) = relation.column(column).filter(|_| access.sees(column)) else {
                return Err(SubscribeError(format!(
                    "order: {schema}.{table} has no column {column} that the role {role} may read"
                )));
            };
            if known.kind.starts_with('_') {
                return Err(SubscribeError(format!(
                    "order: {column} is an array, rows cannot be ordered by it here"
                )));
            }
        }
        for key in relation.key.iter().filter(|key| access.sees(key)) {
            if !order.iter().any(|by| by.column == *key) {
                order.push(By::key(key));
            }
        }
        Ok(order)
    }

    /// What comes after the row that the page begins after, column by column; none for the first page.
    ///
    /// # Errors
    /// When that row is of another order.
    pub fn beyond(&self, order: &[By], relation: &Relation) -> Result<Option<Vec<Beyond>>, SubscribeError> {
        let Some(after) = &self.after else { return Ok(None) };
        if after.order != described(order) || after.values.len() != order.len() {
            return Err(SubscribeError(String::from(
                "after: it is of another order, ask with the order= and the table with which it was given",
            )));
        }
        let values = after.values.iter().cloned();
        let beyond = |(by, value): (&By, _)| by.beyond(value, !relation.is_key(&by.column));
        Ok(Some(order.iter().zip(values).map(beyond).collect()))
    }
}

impl After {
    /// The row with this image, of which all columns of the order are told.
    pub fn of(order: &[By], image: &str) -> Option<Self> {
        let row = Row::parse(image).ok()?;
        let value = |by: &By| {
            let text = row.value(&by.column)?;
            Some(match serde_json::from_str(text).ok()? {
                serde_json::Value::Null => None,
                serde_json::Value::String(text) => Some(text),
                _ => Some(text.to_owned()),
            })
        };
        let values = order.iter().map(value).collect::<Option<_>>()?;
        Some(Self { order: described(order), values })
    }

    /// Reads what [`Self::word`] wrote.
    ///
    /// # Errors
    /// When it is something else.
    pub fn parse(word: &str) -> Result<Self, SubscribeError> {
        let read = || {
            let bytes = URL_SAFE_NO_PAD.decode(word).ok()?;
            let (order, values) = serde_json::from_slice(&bytes).ok()?;
            Some(Self { order, values })
        };
        let is_text = |after: &Self| !after.values.iter().flatten().any(|value| value.contains('\0'));
        read().filter(is_text).ok_or_else(Self::unknown)
    }

    /// As a word of a query.
    pub fn word(&self) -> String {
        URL_SAFE_NO_PAD.encode(serde_json::json!([self.order, self.values]).to_string())
    }

    /// What is said of what no answer gave.
    pub fn unknown() -> SubscribeError {
        SubscribeError(String::from("after: this is not what an answer gave, begin without it"))
    }
}

/// An order in one text.
fn described(order: &[By]) -> String {
    let term = |by: &By| {
        let direction = if by.descending { "desc" } else { "asc" };
        let nulls = if by.nulls_first { "nullsfirst" } else { "nullslast" };
        format!("{}.{direction}.{nulls}", by.column)
    };
    order.iter().map(term).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::catalog::relation::tests::todos;

    #[test]
    fn an_order_is_read_as_postgrest_writes_it() {
        let by =
            |column: &str, descending, nulls_first| By { column: column.to_owned(), descending, nulls_first };
        for (text, order) in [
            ("id", vec![by("id", false, false)]),
            ("a.desc, b.asc", vec![by("a", true, true), by("b", false, false)]),
            ("a.desc.nullslast,b.nullsfirst", vec![by("a", true, false), by("b", false, true)]),
            ("odd.name.desc", vec![by("odd.name", true, true)]),
        ] {
            assert_eq!(By::parse(text), Ok(order), "{text}");
        }
        for text in ["", "a,", ".desc", ",", "a,,b", "\0", &"a,".repeat(20)] {
            assert!(By::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_place_among_rows_is_read_as_it_was_written() {
        let order = By::parse("a.desc,b,c").unwrap();
        let after = After::of(&order, r#"{"b":1.50,"c":null,"a":"x\"y","d":[]}"#).unwrap();
        assert_eq!(after.values, [Some("x\"y".to_owned()), Some("1.50".to_owned()), None]);
        assert_eq!(After::parse(&after.word()), Ok(after.clone()));
        let paging = Paging { after: Some(after), ..Paging::default() };
        let relation = todos(false, false);
        assert_eq!(paging.beyond(&order, &relation).unwrap().unwrap().len(), 3);
        assert!(paging.beyond(&By::parse("a,b,c").unwrap(), &relation).is_err());
        assert!(After::of(&order, r#"{"a":1}"#).is_none());
        for word in ["", "x", "%", "W10", "WyJhIiwgMV0"] {
            assert!(After::parse(word).is_err(), "{word}");
        }
    }
}
