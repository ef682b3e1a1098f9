//! The doorbell: one connection that listens, and the advisory locks around it.
//!
//! While the relay holds [`Lock::Doorbell`], every writer rings (NOTIFY). While it does not, no writer rings, and each holds the lock
//! shared until its transaction ends. So taking the lock again proves that all writers that did not ring have finished.
//!
//! Of several relays on one database one leads: it holds [`Lock::Leader`], and only it sleeps and is rung by writers. The others
//! are followers: each holds [`Lock::Followers`] shared, and the leader rings them for each page while any holds it.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use tokio_postgres::{Client, Notification, Row};

use crate::postgres::connect::pool::{Error, Server};
use crate::postgres::connect::within::within;
use crate::postgres::locks::Lock;

/// Timeout of the probes: a pooler in transaction mode swallows notifications for ever.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// Number of probes: a busy pooler may let a single one through, together with an earlier answer.
const PROBES: usize = 2;
/// Timeout of a statement on this connection: they are short (locks, notifications), so a longer one means a lost connection.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(5);

/// Keepalive settings release the locks of a leader whose host is gone after half a minute, not after PostgreSQL's default of
/// two hours. Commits are asynchronous, because notifications do not have to survive a crash.
const SETTINGS: &str = "set tcp_keepalives_idle = 15; set tcp_keepalives_interval = 5; set tcp_keepalives_count = 3; \
     set tcp_user_timeout = '30s'; set synchronous_commit = off; listen relay_probe; listen relay_jobs";

/// The listening connection.
pub struct Doorbell {
    client: Client,
    heard: watch::Receiver<RingCounts>,
    /// The rings that were handled.
    handled: RingCounts,
    backend: Backend,
    role: LeaderRole,
    /// Whether there may be followers to ring.
    has_followers: bool,
}

/// Numbers of notifications. They are counted and not stored, because any login of the database can send any number.
#[derive(Debug, Clone, Copy, Default)]
struct RingCounts {
    /// All notifications but probes and those about materialized views alone.
    rings: usize,
    /// Those about materialized views or collections.
    jobs: usize,
    /// Of these, those from new followers, which do not know the pages read before they joined.
    followers: usize,
    /// Own probes.
    probes: usize,
}

/// The backend of a doorbell's connection: its pid and start time, which identify own probes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backend {
    number: i32,
    start: String,
}

/// The role of this relay among those of its database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LeaderRole {
    /// Neither: not decided yet, or the bell is not heard and each relay polls for itself.
    Alone,
    Leader,
    Follower,
}

/// The notifications since the last call of [`Doorbell::rung`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rings {
    /// Number of notifications; 0 if the only ones were about materialized views, or an earlier one about jobs.
    pub count: usize,
    /// Whether materialized views or collections need a look. There may be changes, too.
    pub jobs: bool,
}

impl Doorbell {
    /// Connects, as neither leader nor follower.
    ///
    /// # Errors
    /// As the connection.
    pub async fn connect(server: &Server) -> Result<Self, Error> {
        let (sender, heard) = watch::channel(RingCounts::default());
        // Set after connecting, and before the first LISTEN.
        let own = Arc::new(OnceLock::new());
        let name = Arc::clone(&own);
        let handle = move |ring: Notification| {
            sender.send_if_modified(|heard| heard.count(&ring, name.get()));
        };
        let client = server.connect_listening(handle).await?;
        let backend = "select pid, backend_start::text from pg_stat_activity where pid = pg_backend_pid()";
        let backend = in_time(client.query_one(backend, &[])).await?;
        let backend = Backend { number: backend.get(0), start: backend.get(1) };
        own.get_or_init(|| backend.name());
        in_time(client.batch_execute(SETTINGS)).await?;
        let handled = RingCounts::default();
        Ok(Self { client, heard, handled, backend, role: LeaderRole::Alone, has_followers: false })
    }

    /// The backend of this connection, for [`Self::end`] when the connection is lost.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// Terminates the backend of an earlier doorbell of this relay that was lost and still leads: PostgreSQL may notice only
    /// much later that its peer is gone.
    ///
    /// # Errors
    /// As the connection.
    pub async fn end(&self, lost: &Backend) -> Result<(), Error> {
        let end =
            "select pg_terminate_backend(a.pid) from pg_stat_activity a join pg_locks l on l.pid = a.pid \
             where a.pid = $1 and a.backend_start::text = $2 and l.mode = 'ExclusiveLock' and "
                .to_owned()
                + &Lock::Leader.is_held();
        in_time(self.client.query(&end, &[&lost.number, &lost.start])).await?;
        Ok(())
    }

    /// Sends probes to this doorbell and returns whether they were heard in time. They come `from` another connection,
    /// because a notification from this one returns with its answer even if a pooler swallows all others.
    ///
    /// # Errors
    /// As the connection.
    pub async fn is_heard(&mut self, from: &Client) -> Result<bool, Error> {
        let probes = async {
            for _ in 0..PROBES {
                let before = self.heard.borrow().probes;
                from.query("select pg_notify('relay_probe', $1)", &[&self.backend.name()]).await?;
                if self.heard.wait_for(|heard| heard.probes > before).await.is_err() {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        let is_heard = timeout(PROBE_TIMEOUT, probes).await.unwrap_or(Ok(false));
        self.drain();
        is_heard
    }

    /// Whether this database tells writers not to ring (`relay.doorbell = off`).
    ///
    /// # Errors
    /// As the connection.
    pub async fn is_off(&self) -> Result<bool, Error> {
        let off = "select coalesce(current_setting('relay.doorbell', true), '') = 'off'";
        Ok(self.row(off).await?.get(0))
    }

    /// Becomes the leader, unless another relay is. Call it repeatedly: a statement waiting for the lock would hold back
    /// vacuum for as long as the other relay leads.
    ///
    /// # Errors
    /// As the connection.
    pub async fn try_lead(&mut self) -> Result<bool, Error> {
        if !self.try_lock(Lock::Leader).await? {
            return Ok(false);
        }
        let mut begin = String::from("listen relay");
        if self.role == LeaderRole::Follower {
            let stop =
                format!("; unlisten relay_page; select pg_advisory_unlock_shared({})", Lock::Followers);
            begin.push_str(&stop);
        }
        in_time(self.client.batch_execute(&begin)).await?;
        self.role = LeaderRole::Leader;
        self.has_followers = true;
        Ok(true)
    }

    /// Whether another relay would lead if this one did not.
    pub fn has_followers(&self) -> bool {
        let is_one_new = self.handled.followers < self.heard.borrow().followers;
        self.role == LeaderRole::Leader && (self.has_followers || is_one_new)
    }

    /// Gives up the lead: writers stop ringing, and a follower takes over.
    ///
    /// # Errors
    /// As the connection.
    pub async fn step_down(&mut self) -> Result<(), Error> {
        in_time(self.client.batch_execute("unlisten relay; select pg_advisory_unlock_all()")).await?;
        self.role = LeaderRole::Alone;
        Ok(())
    }

    /// Becomes a follower: [`Self::rung`] then reports each page that the leader reads from now on.
    ///
    /// # Errors
    /// As the connection.
    pub async fn follow(&mut self) -> Result<(), Error> {
        // The notification makes the leader ring once more. A page that it read before is visible by then, and for later
        // ones it rings.
        let begin = format!(
            "listen relay_page; select pg_advisory_lock_shared({}); notify relay, '{{\"follower\":true}}'",
            Lock::Followers
        );
        in_time(self.client.batch_execute(&begin)).await?;
        self.role = LeaderRole::Follower;
        Ok(())
    }

    /// Rings the followers, if this relay leads and has any, for a page with changes or because a follower is new.
    ///
    /// # Errors
    /// As the connection.
    pub async fn notify_followers(&mut self, has_changes: bool) -> Result<(), Error> {
        let followers = self.heard.borrow().followers;
        let is_one_new = std::mem::replace(&mut self.handled.followers, followers) < followers;
        let is_due = is_one_new || (has_changes && self.has_followers);
        if is_due && self.role == LeaderRole::Leader {
            // No row if the lock is free, which means that there are none. The lock it tries ends with the statement.
            let ring = format!(
                "select pg_notify('relay_page', '') from (select pg_try_advisory_xact_lock({}) as alone) followers \
                 where not alone",
                Lock::Followers
            );
            self.has_followers = !in_time(self.client.query(&ring, &[])).await?.is_empty();
        }
        Ok(())
    }

    /// Makes writers ring from now on. Returns false while a transaction that has written without ringing is open.
    ///
    /// # Errors
    /// As the connection.
    pub async fn try_sleep(&mut self) -> Result<bool, Error> {
        let asleep = self.try_lock(Lock::Doorbell).await?;
        // The poll that follows handles earlier rings; counted later, they would look like a burst.
        if asleep {
            self.drain();
        }
        Ok(asleep)
    }

    /// Whether materialized views or collections need a look since the last call. Discards rings of writers.
    pub fn jobs(&mut self) -> bool {
        self.drain();
        let jobs = self.heard.borrow().jobs;
        std::mem::replace(&mut self.handled.jobs, jobs) < jobs
    }

    /// Marks all rings as handled, except those about jobs and from new followers.
    fn drain(&mut self) {
        let RingCounts { jobs, followers, .. } = self.handled;
        self.handled = RingCounts { jobs, followers, ..*self.heard.borrow() };
    }

    /// Lets writers stop ringing.
    ///
    /// # Errors
    /// As the connection.
    pub async fn wake(&self) -> Result<(), Error> {
        let unlock = format!("select pg_advisory_unlock({})", Lock::Doorbell);
        in_time(self.client.batch_execute(&unlock)).await
    }

    /// Waits for a notification, and returns all that have arrived. `None` when the connection is lost.
    ///
    /// Cancel safe: a notification that was not returned is returned by the next call.
    pub async fn rung(&mut self) -> Option<Rings> {
        let before = self.handled;
        let is_new = |heard: &RingCounts| heard.rings > before.rings || heard.jobs > before.jobs;
        let heard = *self.heard.wait_for(is_new).await.ok()?;
        // `notify_followers` handles new followers.
        self.handled = RingCounts { followers: before.followers, ..heard };
        Some(Rings { count: heard.rings - before.rings, jobs: heard.jobs > before.jobs })
    }

    async fn try_lock(&self, lock: Lock) -> Result<bool, Error> {
        Ok(self.row(&format!("select pg_try_advisory_lock({lock})")).await?.get(0))
    }

    async fn row(&self, query: &str) -> Result<Row, Error> {
        in_time(self.client.query_one(query, &[])).await
    }
}

impl Backend {
    /// The payload of own probes.
    fn name(&self) -> String {
        format!("{} {}", self.number, self.start)
    }
}

impl RingCounts {
    /// Counts a notification; returns false for a probe of another relay, which is ignored.
    fn count(&mut self, ring: &Notification, own: Option<&String>) -> bool {
        if ring.channel() == "relay_probe" {
            let is_own = own.is_some_and(|own| own == ring.payload());
            self.probes += usize::from(is_own);
            return is_own;
        }
        if ring.channel() == "relay_jobs" {
            self.jobs += 1;
            return true;
        }
        self.rings += 1;
        let is_job = ["\"collections\"", "\"status\""].iter().any(|job| ring.payload().contains(job));
        self.jobs += usize::from(is_job);
        self.followers += usize::from(ring.payload().contains("\"follower\""));
        true
    }
}

async fn in_time<T>(query: impl Future<Output = Result<T, tokio_postgres::Error>>) -> Result<T, Error> {
    within(STATEMENT_TIMEOUT, "the doorbell's connection", query).await
}
