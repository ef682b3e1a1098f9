//! Broadcasts that were sent to a private topic before a client joined it, read from `realtime.messages`.

use time::OffsetDateTime;
use tokio_postgres::types::ToSql;

use crate::model::session::join::MAX_RECALLED;
use crate::model::session::stored_broadcast::{Recalled, StoredBroadcast};
use crate::postgres::connect::pool::{Error, Lease, Pool};

/// Reads stored broadcasts.
pub struct BroadcastHistory {
    pool: Pool,
}

impl BroadcastHistory {
    /// Creates a reader with these connections.
    pub fn new(pool: Pool) -> Self {
        Self { pool }
    }

    /// Returns the newest `limit` broadcasts to a private topic that are not older than `since`. Those that are not sent, as
    /// [`StoredBroadcast::parse`] says, are left out.
    ///
    /// # Errors
    /// As the connection.
    pub async fn newest(&self, topic: &str, since: OffsetDateTime, limit: u32) -> Result<Recalled, Error> {
        let limit = limit.clamp(1, MAX_RECALLED) as i32;
        let mut lease = Lease::of(&self.pool).await?;
        let query = async {
            let snapshot = lease
                .client_mut()?
                .build_transaction()
                .isolation_level(tokio_postgres::IsolationLevel::RepeatableRead)
                .start()
                .await?;
            let history = "select h from relay.broadcast_history($1, $2, $3) h";
            let parameters: &[&(dyn ToSql + Sync)] = &[&topic, &since, &limit];
            let rows = snapshot.query(history, parameters).await?;
            let cursor: String = snapshot.query_one("select relay.cursor()", &[]).await?.get(0);
            // The commit flushes what the cursor counts as seen, so that a crash cannot lose it.
            snapshot.commit().await?;
            Ok::<_, Error>((rows, cursor))
        };
        let read = query.await;
        lease.done();
        let (rows, cursor) = read?;
        let images = rows.into_iter().map(|row| row.try_get::<_, String>(0));
        let images = images.collect::<Result<Vec<_>, _>>()?;
        let broadcasts =
            images.iter().filter_map(|image| StoredBroadcast::parse(image, false).ok()).collect();
        let cursor =
            cursor.parse().map_err(|_| Error::Unfit(String::from("relay.cursor returned no cursor")))?;
        Ok(Recalled { broadcasts, cursor })
    }
}
