//! Compiles clients' filters: PostgreSQL parses their values with the types of the columns.

use deadpool_postgres::Client;
use serde::Deserialize;

use crate::model::catalog::relation::Relation;
use crate::model::subscription::filter::{Condition, Filter};
use crate::model::subscription::typed_filter::{TypedCondition, TypedFilter};
use crate::postgres::connect::pool::{Error, Pool};

/// Compiles filters. Its connections are kept apart because they run expressions of clients.
#[derive(Clone)]
pub struct FilterCompiler {
    pool: Pool,
    judge: Option<String>,
}

impl FilterCompiler {
    /// Creates a compiler. The connections of the pool have a short time limit; `judge` is the judging login, if it is not the pool's
    /// own.
    pub fn new(pool: Pool, judge: Option<String>) -> Self {
        Self { pool, judge }
    }

    /// Lists the grants that are missing for a filter on columns of user-defined types.
    ///
    /// # Errors
    /// As the connection.
    pub async fn missing_for(
        &self,
        relation: &Relation,
        filter: &Filter,
        role: &str,
    ) -> Result<Vec<String>, Error> {
        let is_user_defined =
            |column: &&str| relation.column(column).is_some_and(|column| column.readable_type.contains('.'));
        let columns = filter.conditions().into_iter().map(|condition| condition.column.as_str());
        let columns: Vec<&str> = columns.filter(is_user_defined).collect();
        if columns.is_empty() {
            return Ok(Vec::new());
        }
        let client = self.pool.get().await?;
        let missing = "select relay.missing_filter_usage($1::oid, $2, $3, $4)";
        let missing = client.prepare_cached(missing).await?;
        let row = client.query_one(&missing, &[&relation.oid, &columns, &role, &self.judge]).await?;
        Ok(row.try_get(0)?)
    }

    /// Converts a filter to an SQL condition, with the column types of a relation.
    ///
    /// # Errors
    /// As [`Self::compile`].
    pub async fn condition(&self, relation: &Relation, filter: &Filter) -> Result<String, Error> {
        let client = self.pool.get().await?;
        let terms = typed_conditions(&client, relation, filter).await?;
        Ok(condition_of(filter, &mut terms.iter()))
    }

    /// Compiles a filter with the column types of a relation.
    ///
    /// # Errors
    /// PostgreSQL's own, when a value does not fit its column or the type lacks the operator.
    pub async fn compile(&self, relation: &Relation, filter: &Filter) -> Result<TypedFilter, Error> {
        let client = self.pool.get().await?;
        let terms = typed_conditions(&client, relation, filter).await?;
        let condition = condition_of(filter, &mut terms.iter());
        let statement = client.prepare_cached("select relay.judge_statement($1::oid, $2)").await?;
        let text: String = client.query_one(&statement, &[&relation.oid, &condition]).await?.try_get(0)?;
        let mut values = terms.into_iter().map(|term| term.values);
        let typed = filter.map(&mut |condition| {
            TypedCondition::new(relation, condition.clone(), values.next().unwrap_or_default())
        });
        Ok(TypedFilter::new(relation, typed, condition, text.into()))
    }
}

/// A condition as PostgreSQL parsed it with the type of its column.
#[derive(Deserialize)]
struct ConditionSql {
    sql: String,
    values: Vec<String>,
}

/// Returns the conditions of a filter, in order.
async fn typed_conditions(
    client: &Client,
    relation: &Relation,
    filter: &Filter,
) -> Result<Vec<ConditionSql>, Error> {
    let read = client.prepare_cached("select relay.filter_condition($1::oid, $2, $3, $4)::text").await?;
    let mut typed = Vec::new();
    for Condition { column, operator, values } in filter.conditions() {
        let row = client.query_one(&read, &[&relation.oid, column, &operator.name(), values]).await?;
        typed.push(serde_json::from_str(row.get(0)).map_err(|error| {
            Error::Unfit(format!("relay.filter_condition returned an unexpected value: {error}"))
        })?);
    }
    Ok(typed)
}

/// Joins the conditions of a filter, in order, as its tree does.
fn condition_of<'t>(filter: &Filter, conditions: &mut impl Iterator<Item = &'t ConditionSql>) -> String {
    let mut join = |all: &[Filter], by: &str| {
        let all: Vec<String> = all.iter().map(|one| condition_of(one, conditions)).collect();
        format!("({})", all.join(by))
    };
    match filter {
        Filter::One(_) => conditions.next().map_or_else(|| String::from("null"), |next| next.sql.clone()),
        Filter::Not(inner) => format!("(not {})", condition_of(inner, conditions)),
        Filter::And(all) if all.is_empty() => String::from("true"),
        Filter::Or(all) if all.is_empty() => String::from("false"),
        Filter::And(all) => join(all, " and "),
        Filter::Or(all) => join(all, " or "),
    }
}
