//! Queries for `relay explain`: blockers of a subscription, one row, and the statement that evaluates one policy.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio_postgres::Client;
use tokio_postgres::error::{DbError, SqlState};

use crate::model::catalog::relation::Relation;
use crate::postgres::connect::pool::{Error, Server};

/// A connection for these queries.
pub struct ExplainQueries {
    client: Client,
    judge: Option<String>,
}

/// Whether a value of the user caused the error: a data exception, or an unknown column.
fn is_value_error(code: &SqlState) -> bool {
    code.code().starts_with("22") || *code == SqlState::UNDEFINED_COLUMN
}

impl ExplainQueries {
    /// Connects, for statements within the time limit. `judge` is the judging login, if it is not this one.
    ///
    /// # Errors
    /// As the connection.
    pub async fn connect(server: &Server, judge: Option<&str>, limit: Duration) -> Result<Self, Error> {
        let client = server.connect().await?;
        // The lock timeout comes first, so that a locked table is reported as such.
        let [statement_timeout, lock_timeout] = [limit, limit / 2].map(|limit| limit.as_millis());
        client
            .batch_execute(&format!(
                "set statement_timeout = {statement_timeout}; set lock_timeout = {lock_timeout}"
            ))
            .await?;
        Ok(Self { client, judge: judge.map(str::to_owned) })
    }

    /// Returns schema and name of the relation that a name in SQL syntax resolves to; `None` if there is none.
    ///
    /// # Errors
    /// As the connection, or when the name is not valid SQL.
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

    /// Returns the parts of a name in SQL syntax, and the relations that it may be meant for, watched ones
    /// first: each as in SQL and its bare name.
    ///
    /// # Errors
    /// As the connection.
    pub async fn candidates(&self, name: &str) -> Result<(Vec<String>, Vec<(String, String)>), Error> {
        let rows = self
            .client
            .query(
                "select format('%I.%I', n.nspname, c.relname), c.relname::text \
                 from pg_class c join pg_namespace n on n.oid = c.relnamespace \
                 where c.relkind in ('r', 'p', 'm', 'f', 'v') and n.nspname !~ '^pg_' \
                   and n.nspname not in ('information_schema', 'relay') \
                 order by not exists (select from relay.watch_list w where w.relation = c.oid), 1 limit 10000",
                &[],
            )
            .await?;
        let parts = self.client.query_one("select parse_ident($1)", &[&name]).await?;
        Ok((parts.get(0), rows.into_iter().map(|row| (row.get(0), row.get(1))).collect()))
    }

    /// Returns why subscribers of the role receive nothing from a relation, each with its remedy.
    ///
    /// # Errors
    /// As the connection.
    pub async fn blockers(&self, name: &str, role: &str) -> Result<Vec<String>, Error> {
        let row =
            self.client.query_one("select relay.blockers($1, $2, $3)", &[&name, &role, &self.judge]).await?;
        Ok(row.get(0))
    }

    /// Returns the first row that has these values, as an image.
    ///
    /// # Errors
    /// As the connection, or when this login may not read the table.
    pub async fn row(&self, relation: &Relation, values: &Value) -> Result<Option<String>, Error> {
        let row = self.client.query_one("select relay.row_like($1::oid, $2)", &[&relation.oid, values]).await;
        match row {
            Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
                Err(Error::Unfit(format!(
                    "this login may not read the rows of {}.{}: give the row itself (--row '{{\"id\": 1, …}}'), or the --database-url of a \
                 login that may",
                    relation.schema, relation.table
                )))
            }
            Err(error) if error.code().is_some_and(is_value_error) => {
                let why = error.as_db_error().map_or("it cannot be read", DbError::message);
                Err(Error::Unfit(format!(
                    "--key does not fit {}.{}: {why}. A value of its key is expected, or a JSON object of columns, such as \
                     '{{\"id\": 1}}'",
                    relation.schema, relation.table
                )))
            }
            row => match row?.get(0) {
                None if self.is_secured(relation).await? => Err(Error::Unfit(format!(
                    "row security may keep the row of {}.{} from this login: give the row itself (--row '{{\"id\": 1, …}}'), or the \
                     --database-url of a login that sees all rows",
                    relation.schema, relation.table
                ))),
                image => Ok(image),
            },
        }
    }

    /// Returns whether row security applies to this login.
    async fn is_secured(&self, relation: &Relation) -> Result<bool, Error> {
        let row = self.client.query_one("select row_security_active($1::oid)", &[&relation.oid]).await?;
        Ok(row.get(0))
    }

    /// Returns the image of a change that decides who receives it: the new row, of a delete the old one. `None` if there is no such
    /// change of the relation. A number alone may need a scan of the changelog.
    ///
    /// # Errors
    /// As the connection, or when the change has no image that today's policies can be evaluated on.
    pub async fn change(
        &self,
        relation: &Relation,
        number: i64,
        xid: Option<u64>,
    ) -> Result<Option<String>, Error> {
        let row = self
            .client
            .query_opt(
                "select coalesce(after, before)::text, shape = relay.shape(relation) from relay.changes \
                 where number = $1 and relation = $2 and ($3::text is null or xid = $3::text::xid8) \
                   and ($4::oid is null or leaf in (select relid from pg_partition_tree($4)))",
                &[&number, &relation.id().watched, &xid.map(|xid| xid.to_string()), &relation.id().part],
            )
            .await?;
        let Some(row) = row else { return Ok(None) };
        match (row.get::<_, Option<String>>(0), row.get(1)) {
            (Some(image), true) => Ok(Some(image)),
            (Some(_), false) => Err(Error::Unfit(format!(
                "the columns of {}.{} changed since change {number}, so that the policies of today cannot be evaluated on it",
                relation.schema, relation.table
            ))),
            (None, _) => Err(Error::Unfit(format!("change {number} is not the change of a row"))),
        }
    }

    /// Returns the statement that evaluates one condition on images of the relation.
    ///
    /// # Errors
    /// As the connection.
    pub async fn judgement(&self, relation: &Relation, condition: &str) -> Result<Arc<str>, Error> {
        let row = self
            .client
            .query_one("select relay.judge_statement($1::oid, $2)", &[&relation.oid, &condition])
            .await?;
        Ok(row.get::<_, String>(0).into())
    }
}
