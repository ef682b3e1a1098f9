//! Order and keyset pagination of a table's rows.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::model::catalog::relation::{Access, Relation};
use crate::model::row::change::Row;
use crate::model::subscription::error::SubscribeError;
use crate::model::subscription::filter::{Condition, Filter, Operator};

/// Maximum number of columns of an order. Each costs a few queries.
const MAX_COLUMNS: usize = 16;

/// The paging parameters of a request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Paging {
    /// Maximum row count of the page.
    pub limit: Option<usize>,
    /// The requested order.
    pub order: Vec<OrderBy>,
    /// The row after which the page begins.
    pub after: Option<PageToken>,
}

/// One column of an order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OrderBy {
    /// The column.
    pub column: String,
    /// Whether the largest value comes first.
    pub descending: bool,
    /// Whether nulls come before all values.
    pub nulls_first: bool,
}

/// The position of a row in an order, after which the next page begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageToken {
    /// The order, as [`described`] writes it.
    order: String,
    /// The row's values of the order's columns.
    values: Vec<Option<String>>,
}

impl OrderBy {
    /// Parses `column.desc.nullslast,…`.
    ///
    /// # Errors
    /// A message that says what is wrong.
    pub fn parse(text: &str) -> Result<Vec<Self>, SubscribeError> {
        let order: Vec<Self> =
            text.split(',').map(|term| Self::parse_term(term.trim())).collect::<Result<_, _>>()?;
        match order.len() > MAX_COLUMNS {
            true => Err(SubscribeError::Other(format!("order: at most {MAX_COLUMNS} columns are expected"))),
            false => Ok(order),
        }
    }

    fn parse_term(term: &str) -> Result<Self, SubscribeError> {
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
            return Err(SubscribeError::Other(String::from(FORM)));
        }
        let nulls_first = nulls_first.unwrap_or(descending);
        Ok(Self { column: column.to_owned(), descending, nulls_first })
    }

    fn ascending(column: &str) -> Self {
        Self { column: column.to_owned(), descending: false, nulls_first: false }
    }

    fn condition(&self, operator: Operator, value: &str) -> Filter {
        Filter::One(Condition { column: self.column.clone(), operator, values: vec![value.to_owned()] })
    }

    /// Returns the condition for rows after this value, `None` standing for null, or with it and in `rest`, the condition for the
    /// columns behind this one.
    fn beyond(&self, value: Option<&str>, is_nullable: bool, rest: Option<Filter>) -> Filter {
        let null = self.condition(Operator::Is, "null");
        let Some(value) = value else {
            let later = self.nulls_first.then(|| Filter::Not(Box::new(null.clone())));
            let same = rest.map(|rest| Filter::And(vec![null, rest]));
            return Filter::Or(later.into_iter().chain(same).collect());
        };
        let (later, from) = match self.descending {
            true => (Operator::Lt, Operator::Lte),
            false => (Operator::Gt, Operator::Gte),
        };
        let or_null = (is_nullable && !self.nulls_first).then_some(null);
        // An index can be used where nulls do not come later.
        let from = or_null.is_none().then(|| self.condition(from, value));
        let same = rest.map(|rest| Filter::And(vec![self.condition(Operator::Eq, value), rest]));
        let any = [Some(self.condition(later, value)), or_null, same].into_iter().flatten().collect();
        Filter::And(from.into_iter().chain([Filter::Or(any)]).collect())
    }
}

/// The accepted form of `order=`.
const FORM: &str = "order: column.asc or column.desc is expected, with .nullsfirst or .nullslast behind it if need be; several \
     are joined by commas, such as created_at.desc,id";

impl Paging {
    /// Returns the complete order: the requested columns, then the remaining columns of the key, so that the order is total.
    ///
    /// # Errors
    /// If a column does not exist, may not be read by the role, or is an array.
    pub fn order(
        &self,
        relation: &Relation,
        access: &Access,
        role: &str,
    ) -> Result<Vec<OrderBy>, SubscribeError> {
        let mut order = self.order.clone();
        for by in &order {
            let (schema, table, column) = (&relation.schema, &relation.table, &by.column);
            let Some(known) = relation.column(column).filter(|_| access.sees(column)) else {
                return Err(SubscribeError::Other(format!(
                    "order: {schema}.{table} has no column {column} that the role {role} may read"
                )));
            };
            if known.kind.starts_with('_') {
                return Err(SubscribeError::Other(format!(
                    "order: {column} is an array, rows cannot be ordered by it here"
                )));
            }
        }
        for key in relation.key.iter().filter(|key| access.sees(key)) {
            if !order.iter().any(|by| by.column == *key) {
                order.push(OrderBy::ascending(key));
            }
        }
        Ok(order)
    }

    /// Returns the condition for the rows of the page; `None` for the first page.
    ///
    /// # Errors
    /// If the page token is of another order.
    pub fn keyset(&self, order: &[OrderBy], relation: &Relation) -> Result<Option<Filter>, SubscribeError> {
        let Some(after) = &self.after else { return Ok(None) };
        if after.order != described(order) || after.values.len() != order.len() {
            return Err(SubscribeError::Other(String::from(
                "after: it is of another order, use the order= and the table of the request that returned it",
            )));
        }
        let columns = order.iter().zip(&after.values).rev();
        Ok(columns.fold(None, |rest, (by, value)| {
            Some(by.beyond(value.as_deref(), !relation.is_key(&by.column), rest))
        }))
    }
}

impl PageToken {
    /// Returns the position of the row with this image. `None` if the image lacks a column of the order.
    pub fn of(order: &[OrderBy], image: &str) -> Option<Self> {
        let row = Row::parse(image).ok()?;
        let value = |by: &OrderBy| {
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

    /// Decodes a token made by [`Self::encode`].
    ///
    /// # Errors
    /// If it is something else.
    pub fn parse(token: &str) -> Result<Self, SubscribeError> {
        let read = || {
            let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
            let (order, values) = serde_json::from_slice(&bytes).ok()?;
            Some(Self { order, values })
        };
        let is_text = |after: &Self| !after.values.iter().flatten().any(|value| value.contains('\0'));
        read().filter(is_text).ok_or_else(Self::invalid)
    }

    /// Encodes the token for use in a URL.
    pub fn encode(&self) -> String {
        URL_SAFE_NO_PAD.encode(serde_json::json!([self.order, self.values]).to_string())
    }

    /// Returns the error for a token that no answer contained.
    pub fn invalid() -> SubscribeError {
        SubscribeError::Other(String::from("after: this value is not from an answer, start without it"))
    }
}

/// Describes an order as text.
fn described(order: &[OrderBy]) -> String {
    let term = |by: &OrderBy| {
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
    fn an_order_has_the_syntax_of_postgrest() {
        let by = |column: &str, descending, nulls_first| OrderBy {
            column: column.to_owned(),
            descending,
            nulls_first,
        };
        for (text, order) in [
            ("id", vec![by("id", false, false)]),
            ("a.desc, b.asc", vec![by("a", true, true), by("b", false, false)]),
            ("a.desc.nullslast,b.nullsfirst", vec![by("a", true, false), by("b", false, true)]),
            ("odd.name.desc", vec![by("odd.name", true, true)]),
        ] {
            assert_eq!(OrderBy::parse(text), Ok(order), "{text}");
        }
        for text in ["", "a,", ".desc", ",", "a,,b", "\0", &"a,".repeat(20)] {
            assert!(OrderBy::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_page_token_is_decoded_as_it_was_encoded() {
        let order = OrderBy::parse("a.desc,b,c").unwrap();
        let after = PageToken::of(&order, r#"{"b":1.50,"c":null,"a":"x\"y","d":[]}"#).unwrap();
        assert_eq!(after.values, [Some("x\"y".to_owned()), Some("1.50".to_owned()), None]);
        assert_eq!(PageToken::parse(&after.encode()), Ok(after.clone()));
        let paging = Paging { after: Some(after), ..Paging::default() };
        let relation = todos(false, false);
        let columns = |filter: &Filter| {
            filter.conditions().iter().map(|condition| condition.column.clone()).collect::<Vec<_>>()
        };
        let condition = paging.keyset(&order, &relation).unwrap().unwrap();
        assert_eq!(columns(&condition), ["a", "a", "a", "b", "b", "b"]);
        assert!(paging.keyset(&OrderBy::parse("a,b,c").unwrap(), &relation).is_err());
        assert!(PageToken::of(&order, r#"{"a":1}"#).is_none());
        for word in ["", "x", "%", "W10", "WyJhIiwgMV0"] {
            assert!(PageToken::parse(word).is_err(), "{word}");
        }
    }
}
