//! What is asked of the database to explain a subscription: hindrances, a row, the statement that judges one policy.

use std::sync::Arc;

use serde_json::Value;
use tokio_postgres::Client;
use tokio_postgres::error::{DbError, SqlState};

use crate::model::catalog::relation::Relation;
use crate::postgres::connect::pool::{Error, Server};

/// A connection for questions.
pub struct ExplainQueries {
    client: Client,
    judge: Option<String>,
}

/// Whether an error says that a value is wrong: a data exception, or a column that there is not.
fn is_of_the_value(code: &SqlState) -> bool {
    code.code().starts_with("22") || *code == SqlState::UNDEFINED_COLUMN
}

impl ExplainQueries {
    /// Connects. `judge` is the login that judges, when it is another.
    ///
    /// # Errors
    /// As the connection.
    pub async fn connect(server: &Server, judge: Option<&str>) -> Result<Self, Error> {
        Ok(Self { client: server.connect().await?, judge: judge.map(str::to_owned) })
    }

    /// Schema and name of the relation that is meant by a name as in SQL; none when there is no such relation.
    ///
    /// # Errors
    /// As the connection, or when the name is none.
    pub async fn named(&self, name: &str) -> Result<Option<(String, String)>, Error> {
        let found = self
            .client
            .query_opt(
                "select n.nspname::text, c.relname::text from pg_class c join pg_namespace n on n.oid = c.relnamespace \
                 where c.oid = to_regclass($1)",
                &[&name],
            )
            .await?;
        Ok(found.map(|row| (row.get(0), row.get(1))))
    }

    /// Why subscribers of the role get nothing of a relation, and what to do.
    ///
    /// # Errors
    /// As the connection.
    pub async fn hindrances(&self, name: &str, role: &str) -> Result<Vec<String>, Error> {
        let row = self
            .client
            .query_one("select relay.hindrances($1, $2, $3)", &[&name, &role, &self.judge])
            .await?;
        Ok(row.get(0))
    }

    /// The first row that has these values, as an image.
    ///
    /// # Errors
    /// As the connection, or when this login may not read the table.
    pub async fn row(&self, relation: &Relation, values: &Value) -> Result<Option<String>, Error> {
        let row = self
            .client
            .query_one(
                "select relay.row_like(relation, $2) from relay.watch_list where id = $1",
                &[&relation.id().0, values],
            )
            .await;
        match row {
            Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
                Err(Error::Unfit(format!(
                    "this login may not read the rows of {}.{}: give the row itself (--row '{{\"id\": 1, …}}'), or the --database-url of a \
                 login that may",
                    relation.schema, relation.table
                )))
            }
            Err(error) if error.code().is_some_and(is_of_the_value) => {
                let why = error.as_db_error().map_or("it cannot be read", DbError::message);
                Err(Error::Unfit(format!(
                    "--key does not fit {}.{}: {why}. A value of its key is expected, or a JSON object of columns, such as \
                     '{{\"id\": 1}}'",
                    relation.schema, relation.table
                )))
            }
            row => Ok(row?.get(0)),
        }
    }

    /// The statement that judges images of the relation by one condition.
    ///
    /// # Errors
    /// As the connection.
    pub async fn judgement(&self, relation: &Relation, condition: &str) -> Result<Arc<str>, Error> {
        let row = self
            .client
            .query_one(
                "select relay.judge_statement(relation, $2) from relay.watch_list where id = $1",
                &[&relation.id().0, &condition],
            )
            .await?;
        Ok(row.get::<_, String>(0).into())
    }
}
