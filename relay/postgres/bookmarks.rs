//! Bookmarks in the database, where they outlive sockets and relays: opened, moved and dropped many at a time.

use std::collections::HashSet;
use std::time::Duration;

use deadpool_postgres::Pool;
use tokio::time::timeout;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use crate::model::identity::bookmark::{Bookmark, BookmarkKey, Opened};
use crate::model::log::cursor::Cursor;
use crate::postgres::connect::pool::{Error, Lease, Server};

/// Where bookmarks are kept.
pub struct Bookmarks {
    pool: Pool,
    /// Statements are short; one that takes longer hangs.
    patience: Duration,
    /// Seconds after which whoever comes back is not resumed.
    resume: f64,
}

impl Bookmarks {
    /// In the database of `server`, which has `patience` for each statement; `resume` is how long a client may be away.
    ///
    /// # Errors
    /// When the pool cannot be built.
    pub fn new(server: &Server, resume: Duration, patience: Duration) -> Result<Self, Error> {
        Ok(Self { pool: server.pool(1, patience)?, patience, resume: resume.as_secs_f64() })
    }

    /// Takes over these bookmarks, or makes them at these cursors. No key may come twice. They outlive a crash.
    ///
    /// # Errors
    /// As the connection.
    pub async fn open(&self, wanted: &[(BookmarkKey, Cursor)]) -> Result<Vec<Opened>, Error> {
        let (sessions, channels) = keys(wanted.iter().map(|(key, _)| key));
        let cursors: Vec<String> = wanted.iter().map(|(_, cursor)| cursor.to_string()).collect();
        let open = "select * from relay.open_bookmarks($1::text[]::uuid[], $2, $3)";
        let rows = self.ask(open, &[&sessions, &channels, &cursors]).await?;
        let mut opened = Vec::with_capacity(rows.len());
        for row in rows {
            let unfit = || Error::Unfit(String::from("relay.open_bookmarks gave what is no bookmark"));
            let session = row.try_get::<_, &str>(0)?.parse().map_err(|_| unfit())?;
            let channel: &[u8] = row.try_get(1)?;
            let key = BookmarkKey { session, channel: channel.try_into().map_err(|_| unfit())? };
            let bookmark = Bookmark { key, owner: row.try_get(2)? };
            let age: f64 = row.try_get(4)?;
            opened.push(match row.try_get::<_, &str>(3)?.parse() {
                Ok(cursor) if age <= self.resume => Opened::At(bookmark, cursor),
                _ => Opened::Lapsed(bookmark),
            });
        }
        Ok(opened)
    }

    /// Moves those that were not taken over; gives the owners of those that were moved.
    ///
    /// # Errors
    /// As the connection.
    pub async fn move_to(&self, moves: &[(Bookmark, Cursor)]) -> Result<HashSet<String>, Error> {
        let (sessions, channels) = keys(moves.iter().map(|(bookmark, _)| &bookmark.key));
        let owners: Vec<&str> = moves.iter().map(|(bookmark, _)| bookmark.owner.as_str()).collect();
        let cursors: Vec<String> = moves.iter().map(|(_, cursor)| cursor.to_string()).collect();
        let move_them = "select relay.move_bookmarks($1::text[]::uuid[], $2, $3::text[]::uuid[], $4)";
        let rows = self.ask(move_them, &[&sessions, &channels, &owners, &cursors]).await?;
        rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
    }

    /// Drops those that still belong to the owner that is named, if one is.
    ///
    /// # Errors
    /// As the connection.
    pub async fn forget(&self, bookmarks: &[(BookmarkKey, Option<String>)]) -> Result<(), Error> {
        let (sessions, channels) = keys(bookmarks.iter().map(|(key, _)| key));
        let owners: Vec<Option<&str>> = bookmarks.iter().map(|(_, owner)| owner.as_deref()).collect();
        let drop_them = "select relay.drop_bookmarks($1::text[]::uuid[], $2, $3::text[]::uuid[])";
        self.ask(drop_them, &[&sessions, &channels, &owners]).await.map(drop)
    }

    /// Drops those of clients that have been away for much longer than they are resumed: until then they are told that
    /// they come too late. Likewise those of subjects that have very many, the oldest first.
    ///
    /// # Errors
    /// As the connection.
    pub async fn trim(&self) -> Result<(), Error> {
        let age = self.resume * 2.0 + 86_400.0;
        self.ask("select relay.trim_bookmarks(make_interval(secs => $1))", &[&age]).await.map(drop)
    }

    /// A connection on which nothing comes any more may look open for ever.
    async fn ask(&self, statement: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, Error> {
        let lease = Lease::of(&self.pool).await?;
        let client = lease.client()?;
        let asked = async {
            let statement = client.prepare_cached(statement).await?;
            Ok(client.query(&statement, parameters).await?)
        };
        let lost = "the connection that keeps bookmarks does not answer";
        let answered = timeout(self.patience, asked).await.map_err(|_| Error::Lost(lost))?;
        lease.done();
        answered
    }
}

fn keys<'a>(keys: impl Iterator<Item = &'a BookmarkKey>) -> (Vec<String>, Vec<&'a [u8]>) {
    keys.map(|key| (key.session.to_string(), &key.channel[..])).unzip()
}
