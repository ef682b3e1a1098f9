//! The doorbell: one connection that listens, and the advisory locks around it.
//!
//! While lock 1 is held, every writer rings (NOTIFY); while it is not, no writer does, and each keeps a shared lock
//! until its transaction ends. So taking the lock again proves that all who did not ring are done.
//!
//! Of several relays on one database one leads: it holds lock 5, and it alone sleeps and is rung by writers. The others
//! are its deputies: each shares lock 6, and the leader rings them for each page, as long as somebody shares that lock.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use tokio_postgres::{Client, Notification, Row};

use crate::postgres::connect::pool::{Error, Server};

/// How long the bell may take to be heard by itself: a pooler in transaction mode swallows it for ever.
const PROBE: Duration = Duration::from_secs(2);
/// So many times in a row: a pooler that is busy may let one through together with the answer that came before it.
const PROBES: usize = 2;
/// What is asked on this connection is a lock or a notification; longer than this, nobody is there.
const ANSWER: Duration = Duration::from_secs(5);

/// A leader whose host is gone would keep the locks until PostgreSQL's own keepalives give it up, by default after two
/// hours: this makes it half a minute. Nothing that is written here (notifications) has to survive a crash.
const SETTINGS: &str = "set tcp_keepalives_idle = 15; set tcp_keepalives_interval = 5; set tcp_keepalives_count = 3; \
     set tcp_user_timeout = '30s'; set synchronous_commit = off; listen relay_probe";

/// Its answer has no row when nobody shares lock 6. The lock that this tries ends with the statement.
const RING: &str = "select pg_notify('relay_page', '') from (select pg_try_advisory_xact_lock(1919249009, 6) as alone) \
     followers where not alone";

/// The listening connection.
pub struct Doorbell {
    client: Client,
    heard: watch::Receiver<BellEvent>,
    /// What of it was answered.
    answered: BellEvent,
    backend: Backend,
    part: LeaderRole,
    /// As far as is known, there are deputies to ring.
    has_followers: bool,
}

/// How often it rang. Counted and not kept: anybody in the database may ring, as often as he likes.
#[derive(Debug, Clone, Copy, Default)]
struct BellEvent {
    /// All but probes.
    rings: usize,
    /// Of these, about the refresh schedule.
    jobs: usize,
    /// Of these, from new deputies, which do not know what pages were read before they came.
    followers: usize,
    /// Our own.
    probes: usize,
}

/// The process at the other end of a doorbell: its number and its start, by which our own probes are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backend {
    number: i32,
    start: String,
}

/// Which part this relay has among those of its database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LeaderRole {
    /// None yet, or for good: where the bell is not heard, each relay reads for itself.
    Alone,
    Leader,
    Deputy,
}

/// What was heard at the door, all at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rings {
    /// How many notifications; none where only one about the refresh schedule was left from before.
    pub count: usize,
    /// One said that the refresh schedule changed; there may be changes too.
    pub refresh_jobs: bool,
}

impl Doorbell {
    /// Connects; neither a leader nor a deputy yet.
    ///
    /// # Errors
    /// As the connection.
    pub async fn connect(server: &Server) -> Result<Self, Error> {
        let (ringing, heard) = watch::channel(BellEvent::default());
        // Known once connected, and before anything is heard.
        let own = Arc::new(OnceLock::new());
        let name = Arc::clone(&own);
        let heed = move |ring: Notification| {
            ringing.send_if_modified(|heard| heard.heed(&ring, name.get()));
        };
        let client = server.connect_listening(heed).await?;
        let backend = "select pid, backend_start::text from pg_stat_activity where pid = pg_backend_pid()";
        let backend = in_time(client.query_one(backend, &[])).await?;
        let backend = Backend { number: backend.get(0), start: backend.get(1) };
        own.get_or_init(|| backend.name());
        in_time(client.batch_execute(SETTINGS)).await?;
        let answered = BellEvent::default();
        Ok(Self { client, heard, answered, backend, part: LeaderRole::Alone, has_followers: false })
    }

    /// Who is at the other end, for [`Self::end`] when this is lost.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// Ends a doorbell of ours that was lost and still leads: PostgreSQL may notice only much later that we are gone.
    ///
    /// # Errors
    /// As the connection.
    pub async fn end(&self, lost: &Backend) -> Result<(), Error> {
        let end = "select pg_terminate_backend(a.pid) from pg_stat_activity a join pg_locks l on l.pid = a.pid \
             where a.pid = $1 and a.backend_start::text = $2 and l.locktype = 'advisory' \
             and (l.classid, l.objid, l.mode) = (1919249009, 5, 'ExclusiveLock') and l.granted";
        in_time(self.client.query(end, &[&lost.number, &lost.start])).await?;
        Ok(())
    }

    /// Rings at our own door and tells whether it was heard in time. Rung `from` another connection: what is rung from
    /// this one may come back with the answer even where a pooler swallows everything else.
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
        let is_heard = timeout(PROBE, probes).await.unwrap_or(Ok(false));
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

    /// Becomes the leader, unless another relay is. To be tried again and again: a statement that waits for the lock
    /// would hold back vacuum for as long as the other leads.
    ///
    /// # Errors
    /// As the connection.
    pub async fn try_lead(&mut self) -> Result<bool, Error> {
        if !self.row("select pg_try_advisory_lock(1919249009, 5)").await?.get::<_, bool>(0) {
            return Ok(false);
        }
        let stop = if self.part == LeaderRole::Deputy {
            "; unlisten relay_page; select pg_advisory_unlock_shared(1919249009, 6)"
        } else {
            ""
        };
        in_time(self.client.batch_execute(&format!("listen relay{stop}"))).await?;
        self.part = LeaderRole::Leader;
        self.has_followers = true;
        Ok(true)
    }

    /// Whether somebody else would lead if this relay did not.
    pub fn has_followers(&self) -> bool {
        let is_one_new = self.answered.followers < self.heard.borrow().followers;
        self.part == LeaderRole::Leader && (self.has_followers || is_one_new)
    }

    /// Leads no more: writers do not ring, and a deputy takes over.
    ///
    /// # Errors
    /// As the connection.
    pub async fn step_down(&mut self) -> Result<(), Error> {
        in_time(self.client.batch_execute("unlisten relay; select pg_advisory_unlock_all()")).await?;
        self.part = LeaderRole::Alone;
        Ok(())
    }

    /// Becomes a deputy: [`Self::rung`] then hears of each page that the leader reads after this.
    ///
    /// # Errors
    /// As the connection.
    pub async fn follow(&mut self) -> Result<(), Error> {
        // The leader hears of us, and rings once more: a page that it read before that is seen by then, later ones are
        // rung for.
        let begin = "listen relay_page; select pg_advisory_lock_shared(1919249009, 6); notify relay, '{\"deputy\":true}'";
        in_time(self.client.batch_execute(begin)).await?;
        self.part = LeaderRole::Deputy;
        Ok(())
    }

    /// Rings the deputies of a leader, if there are any, for a page with changes (`news`) or because one is new.
    ///
    /// # Errors
    /// As the connection.
    pub async fn notify_followers(&mut self, news: bool) -> Result<(), Error> {
        let followers = self.heard.borrow().followers;
        let is_one_new = std::mem::replace(&mut self.answered.followers, followers) < followers;
        let is_due = is_one_new || (news && self.has_followers);
        if is_due && self.part == LeaderRole::Leader {
            self.has_followers = !in_time(self.client.query(RING, &[])).await?.is_empty();
        }
        Ok(())
    }

    /// Asks writers to ring from now on. False while a writer that did not ring is still in flight.
    ///
    /// # Errors
    /// As the connection.
    pub async fn try_sleep(&mut self) -> Result<bool, Error> {
        let asleep = self.row("select pg_try_advisory_lock(1919249009, 1)").await?.get(0);
        // Rings from before are answered by the look that follows; counted later they would feign a rush.
        if asleep {
            self.drain();
        }
        Ok(asleep)
    }

    /// Whether the refresh schedule changed while nobody waited for a ring. Rings of writers are forgotten.
    pub fn refresh_jobs(&mut self) -> bool {
        self.drain();
        let jobs = self.heard.borrow().jobs;
        std::mem::replace(&mut self.answered.jobs, jobs) < jobs
    }

    /// Rings up to now need no answer, but for those about the refresh schedule and from new deputies.
    fn drain(&mut self) {
        let BellEvent { jobs, followers, .. } = self.answered;
        self.answered = BellEvent { jobs, followers, ..*self.heard.borrow() };
    }

    /// Tells writers that they need not ring.
    ///
    /// # Errors
    /// As the connection.
    pub async fn wake(&self) -> Result<(), Error> {
        in_time(self.client.batch_execute("select pg_advisory_unlock(1919249009, 1)")).await
    }

    /// Waits until somebody rings, and takes all rings that are there. None when the connection is gone.
    ///
    /// Cancel safe: a ring that was not returned is still there.
    pub async fn rung(&mut self) -> Option<Rings> {
        let before = self.answered;
        let is_new = |heard: &BellEvent| heard.rings > before.rings || heard.jobs > before.jobs;
        let heard = *self.heard.wait_for(is_new).await.ok()?;
        // New deputies are answered by ringing them.
        self.answered = BellEvent { followers: before.followers, ..heard };
        Some(Rings { count: heard.rings - before.rings, refresh_jobs: heard.jobs > before.jobs })
    }

    async fn row(&self, question: &str) -> Result<Row, Error> {
        in_time(self.client.query_one(question, &[])).await
    }
}

impl Backend {
    /// What our own probes say.
    fn name(&self) -> String {
        format!("{} {}", self.number, self.start)
    }
}

impl BellEvent {
    /// Counts a notification; false for a probe of somebody else, which means nothing.
    fn heed(&mut self, ring: &Notification, own: Option<&String>) -> bool {
        if ring.channel() == "relay_probe" {
            let is_own = own.is_some_and(|own| own == ring.payload());
            self.probes += usize::from(is_own);
            return is_own;
        }
        self.rings += 1;
        self.jobs += usize::from(ring.payload().contains("\"refresh_jobs\""));
        self.followers += usize::from(ring.payload().contains("\"deputy\""));
        true
    }
}

async fn in_time<T>(asked: impl Future<Output = Result<T, tokio_postgres::Error>>) -> Result<T, Error> {
    match timeout(ANSWER, asked).await {
        Ok(answered) => Ok(answered?),
        Err(_) => Err(Error::Lost("the doorbell's connection does not answer")),
    }
}
