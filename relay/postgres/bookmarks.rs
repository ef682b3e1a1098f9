//! Bookmarks in the database, where they outlive sockets and relays: opened, moved and dropped in bulk.

use std::collections::HashSet;
use std::time::Duration;

use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use crate::model::identity::bookmark::{Bookmark, BookmarkKey, Opened};
use crate::model::log::cursor::Cursor;
use crate::postgres::connect::pool::{Error, Lease, Pool, Server};
use crate::postgres::connect::within::within;

/// The bookmark store.
pub struct Bookmarks {
    pool: Pool,
    /// Statement timeout. Statements are short; one that takes longer hangs.
    timeout: Duration,
    /// Maximum absence in seconds after which a client can still resume.
    max_absence: f64,
}

impl Bookmarks {
    /// Creates the store in the database of `server`. Each statement ends after `statement_timeout`; a client may be away
    /// for `max_absence`.
    ///
    /// # Errors
    /// When the pool cannot be built.
    pub fn new(server: &Server, max_absence: Duration, statement_timeout: Duration) -> Result<Self, Error> {
        let pool = server.pool(1, statement_timeout)?;
        Ok(Self { pool, timeout: statement_timeout, max_absence: max_absence.as_secs_f64() })
    }

    /// Takes over these bookmarks, or creates them at these cursors. Keys must be distinct. The result survives a crash.
    ///
    /// # Errors
    /// As the connection.
    pub async fn open(&self, wanted: &[(BookmarkKey, Cursor)]) -> Result<Vec<Opened>, Error> {
        let (sessions, channels) = keys(wanted.iter().map(|(key, _)| key));
        let cursors: Vec<String> = wanted.iter().map(|(_, cursor)| cursor.to_string()).collect();
        let open = "select * from relay.open_bookmarks($1::text[]::uuid[], $2, $3)";
        let rows = self.query(open, &[&sessions, &channels, &cursors]).await?;
        let mut opened = Vec::with_capacity(rows.len());
        for row in rows {
            let unfit = || Error::Unfit(String::from("relay.open_bookmarks returned a malformed bookmark"));
            let session = row.try_get::<_, &str>(0)?.parse().map_err(|_| unfit())?;
            let channel: &[u8] = row.try_get(1)?;
            let key = BookmarkKey { session, channel: channel.try_into().map_err(|_| unfit())? };
            let bookmark = Bookmark { key, owner: row.try_get(2)? };
            let age: f64 = row.try_get(4)?;
            opened.push(match row.try_get::<_, &str>(3)?.parse() {
                Ok(cursor) if age <= self.max_absence => Opened::At(bookmark, cursor),
                _ => Opened::Lapsed(bookmark),
            });
        }
        Ok(opened)
    }

    /// Moves bookmarks that no other connection has taken over; returns the owners of those that moved.
    ///
    /// # Errors
    /// As the connection.
    pub async fn move_to(&self, moves: &[(Bookmark, Cursor)]) -> Result<HashSet<String>, Error> {
        let (sessions, channels) = keys(moves.iter().map(|(bookmark, _)| &bookmark.key));
        let owners: Vec<&str> = moves.iter().map(|(bookmark, _)| bookmark.owner.as_str()).collect();
        let cursors: Vec<String> = moves.iter().map(|(_, cursor)| cursor.to_string()).collect();
        let move_them = "select relay.move_bookmarks($1::text[]::uuid[], $2, $3::text[]::uuid[], $4)";
        let rows = self.query(move_them, &[&sessions, &channels, &owners, &cursors]).await?;
        rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
    }

    /// Drops bookmarks: with an owner, only if it still owns the bookmark.
    ///
    /// # Errors
    /// As the connection.
    pub async fn forget(&self, bookmarks: &[(BookmarkKey, Option<String>)]) -> Result<(), Error> {
        let (sessions, channels) = keys(bookmarks.iter().map(|(key, _)| key));
        let owners: Vec<Option<&str>> = bookmarks.iter().map(|(_, owner)| owner.as_deref()).collect();
        let drop_them = "select relay.drop_bookmarks($1::text[]::uuid[], $2, $3::text[]::uuid[])";
        self.query(drop_them, &[&sessions, &channels, &owners]).await.map(drop)
    }

    /// Drops bookmarks of clients that have been away for much longer than `max_absence`; until then a late client gets
    /// a gap. Also drops the oldest bookmarks of subjects that have too many.
    ///
    /// # Errors
    /// As the connection.
    pub async fn trim(&self) -> Result<(), Error> {
        let age = self.max_absence * 2.0 + 86_400.0;
        self.query("select relay.trim_bookmarks(make_interval(secs => $1))", &[&age]).await.map(drop)
    }

    /// Runs a statement, with a client-side timeout: a connection whose peer is gone may look open for ever.
    async fn query(&self, statement: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, Error> {
        let lease = Lease::of(&self.pool).await?;
        let client = lease.client()?;
        let query = async {
            let statement = client.prepare_cached(statement).await?;
            client.query(&statement, parameters).await
        };
        let rows = within(self.timeout, "the bookmark connection", query).await;
        // After a late answer the connection is given up.
        if !matches!(rows, Err(Error::Late { .. })) {
            lease.done();
        }
        rows
    }
}

fn keys<'a>(keys: impl Iterator<Item = &'a BookmarkKey>) -> (Vec<String>, Vec<&'a [u8]>) {
    keys.map(|key| (key.session.to_string(), &key.channel[..])).unzip()
}
