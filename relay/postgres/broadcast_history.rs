//! Broadcasts that were sent to a private topic before a client joined it, read from `realtime.messages`.

use deadpool_postgres::Pool;
use time::OffsetDateTime;

use crate::model::session::stored_broadcast::StoredBroadcast;
use crate::postgres::connect::pool::{Error, Lease};

/// Maximum number of broadcasts that a join gets again.
pub const MAX_BROADCASTS: u32 = 25;

/// Returns the newest `limit` broadcasts to a private topic that are not older than `since`, oldest first. Those that are not sent,
/// as [`StoredBroadcast::parse`] says, are left out.
///
/// # Errors
/// As the connection.
pub async fn newest(
    pool: &Pool,
    topic: &str,
    since: OffsetDateTime,
    limit: u32,
) -> Result<Vec<StoredBroadcast>, Error> {
    let limit = limit.clamp(1, MAX_BROADCASTS) as i32;
    let lease = Lease::of(pool).await?;
    let query = async {
        let client = lease.client()?;
        let history = client.prepare_cached("select h from relay.broadcast_history($1, $2, $3) h").await?;
        Ok::<_, Error>(client.query(&history, &[&topic, &since, &limit]).await?)
    };
    let rows = query.await;
    lease.done();
    let images = rows?.into_iter().map(|row| row.try_get::<_, String>(0));
    let images = images.collect::<Result<Vec<_>, _>>()?;
    Ok(images.iter().filter_map(|image| StoredBroadcast::parse(image, false).ok()).collect())
}
