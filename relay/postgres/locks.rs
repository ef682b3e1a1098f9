//! The advisory locks of the relays of one database. `sql/100_locks.sql` has the same numbers; nothing else writes one.

use std::fmt;

/// The first number of each of these locks. Locks of single views and relations have other ones, and are taken in SQL only.
const CLASS: i32 = 1_919_249_009;

/// An advisory lock, by its second number. Displays as both numbers, for a call of `pg_advisory_lock` and its like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lock {
    /// Held by the relay while it sleeps. Shared by writers that need not ring, until they commit.
    Doorbell = 1,
    /// Held by the session that installs or updates the schema.
    Install = 3,
    /// Held by the transaction that trims the changelog.
    Trim = 4,
    /// Held by the relay that writers wake.
    Leader = 5,
    /// Shared by the other relays. The leader notifies them while any holds it.
    Followers = 6,
    /// Held by the transaction that changes the rights of the schema for a moment.
    Rights = 7,
    /// Held by the transaction that records changes of rules.
    Rules = 8,
    /// Held by the transaction that watches or unwatches a table for a collection.
    Collections = 9,
    /// Held by the relay that notes which views are due for a refresh on change.
    Signals = 10,
    /// Held by the transaction that sets silent users and those of dead relays offline.
    Status = 11,
    /// Held by the relay that delivers webhooks.
    Webhooks = 12,
}

impl Lock {
    /// All locks.
    pub const ALL: [Self; 11] = [
        Self::Doorbell,
        Self::Install,
        Self::Trim,
        Self::Leader,
        Self::Followers,
        Self::Rights,
        Self::Rules,
        Self::Collections,
        Self::Signals,
        Self::Status,
        Self::Webhooks,
    ];

    /// Returns the condition that the row `l` of `pg_locks` is this lock of this database, granted.
    pub fn is_held(self) -> String {
        format!("{} and l.objid = {}", Self::any_is_held(), self as i32)
    }

    /// Returns the condition that the row `l` of `pg_locks` is any of these locks of this database, granted.
    pub fn any_is_held() -> String {
        format!(
            "l.locktype = 'advisory' and l.granted and l.classid = {CLASS} and l.objsubid = 2 and l.database = \
             (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database())"
        )
    }
}

impl fmt::Display for Lock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{CLASS}, {}", *self as i32)
    }
}
