//! Queries of the inspector: the state of the database side, and the last changes of a table.

use std::time::Duration;

use serde_json::Value;
use tokio_postgres::Client;

use crate::model::catalog::relation::Relation;
use crate::postgres::connect::pool::{Error, NO_PATH, Server};

/// Number of changes among which those of a table are looked for, from the end of the changelog.
const SCANNED: i64 = 5000;
/// Maximum number of changes in an answer.
const MAX_CHANGES: i64 = 50;
/// Maximum number of rows of a list.
const MAX_ROWS: i64 = 500;

/// A connection for these queries.
pub struct InspectQueries {
    client: Client,
}

impl InspectQueries {
    /// Connects, for statements within the time limit.
    ///
    /// # Errors
    /// As the connection.
    pub async fn connect(server: &Server, limit: Duration) -> Result<Self, Error> {
        let client = server.connect().await?;
        let [statement_timeout, lock_timeout] = [limit, limit / 2].map(|limit| limit.as_millis());
        client
            .batch_execute(&format!(
                "{NO_PATH}; set statement_timeout = {statement_timeout}; set lock_timeout = {lock_timeout}"
            ))
            .await?;
        Ok(Self { client })
    }

    /// Returns the row of `relay.health`.
    ///
    /// # Errors
    /// As the connection.
    pub async fn health(&self) -> Result<Value, Error> {
        Ok(self.client.query_one("select to_jsonb(h) from relay.health h", &[]).await?.get(0))
    }

    /// Returns the rows of `relay.refresh_jobs`.
    ///
    /// # Errors
    /// As the connection.
    pub async fn refresh_jobs(&self) -> Result<Value, Error> {
        let jobs = "select coalesce(jsonb_agg(to_jsonb(j)), '[]') from (select * from relay.refresh_jobs order by relation::text limit $1) j";
        Ok(self.client.query_one(jobs, &[&MAX_ROWS]).await?.get(0))
    }

    /// Returns the rows of `relay.webhooks`, without the addresses: they may hold secrets.
    ///
    /// # Errors
    /// As the connection.
    pub async fn webhooks(&self) -> Result<Value, Error> {
        let hooks = "select coalesce(jsonb_agg(to_jsonb(w) - 'url' - 'cursor' || jsonb_build_object('lag', extract(epoch from w.lag)) \
             order by w.name), '[]') from (select * from relay.webhooks order by name limit $1) w";
        Ok(self.client.query_one(hooks, &[&MAX_ROWS]).await?.get(0))
    }

    /// Returns the last changes of a relation, the newest first, each with the key of its row. Reads the end of the changelog by its
    /// index, whatever its size.
    ///
    /// # Errors
    /// As the connection.
    pub async fn last_changes(&self, relation: &Relation) -> Result<Value, Error> {
        let last = "with recent as (select c.* from relay.changes c order by c.xid desc, c.number desc limit $3) \
             select coalesce(jsonb_agg(to_jsonb(l) order by l.number desc), '[]') from ( \
               select r.number, r.xid::text as xid, r.at, r.operation, \
                 (select jsonb_object_agg(k, (coalesce(r.after, r.before) -> k)::jsonb) from unnest($2::text[]) k) as key \
               from recent r where r.relation = $1 and r.operation in ('I', 'U', 'D') \
                 and ($4::oid is null or r.leaf in (select relid from pg_partition_tree($4))) \
               order by r.xid desc, r.number desc limit $5) l";
        let id = relation.id();
        let row = self
            .client
            .query_one(last, &[&id.watched, &relation.key, &SCANNED, &id.part, &MAX_CHANGES])
            .await?;
        Ok(row.get(0))
    }
}
