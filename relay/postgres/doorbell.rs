//! The doorbell: one connection that listens, and the advisory locks around it.
//!
//! While lock 1 is held, every writer rings (NOTIFY); while it is not, no writer does, and each keeps a shared lock
//! until its transaction ends. So taking the lock again proves that all who did not ring are done.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use tokio_postgres::{Client, Notification, Row};

use crate::postgres::connect::{Error, Server};

/// How long the bell may take to be heard by itself: a pooler in transaction mode swallows it for ever.
const PROBE: Duration = Duration::from_secs(2);
/// What is asked on this connection is a lock or a notification; longer than this, nobody is there.
const ANSWER: Duration = Duration::from_secs(5);

/// Nothing that is written here (notifications) has to survive a crash.
const SETTINGS: &str = "set synchronous_commit = off; listen relay_probe; listen relay";

/// The listening connection.
pub struct Doorbell {
    client: Client,
    heard: watch::Receiver<Heard>,
    /// What of it was answered.
    answered: Heard,
    backend: Backend,
}

/// How often it rang. Counted and not kept: anybody in the database may ring, as often as he likes.
#[derive(Debug, Clone, Copy, Default)]
struct Heard {
    /// All but probes.
    rings: usize,
    /// Of these, about the refresh schedule.
    jobs: usize,
    /// Our own.
    probes: usize,
}

/// The process at the other end of a doorbell: its number and its start, by which our own probes are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backend {
    number: i32,
    start: String,
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
    /// Connects and listens.
    ///
    /// # Errors
    /// As the connection.
    pub async fn connect(server: &Server) -> Result<Self, Error> {
        let (ringing, heard) = watch::channel(Heard::default());
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
        Ok(Self { client, heard, answered: Heard::default(), backend })
    }

    /// Rings at our own door and tells whether it was heard in time. Rung `from` another connection: what is rung from
    /// this one may come back with the answer even where a pooler swallows everything else.
    ///
    /// # Errors
    /// As the connection.
    pub async fn is_heard(&mut self, from: &Client) -> Result<bool, Error> {
        let before = self.heard.borrow().probes;
        let probe = async {
            from.query("select pg_notify('relay_probe', $1)", &[&self.backend.name()]).await?;
            Ok(self.heard.wait_for(|heard| heard.probes > before).await.is_ok())
        };
        let is_heard = timeout(PROBE, probe).await.unwrap_or(Ok(false));
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

    /// Rings up to now need no answer, but for those about the refresh schedule.
    fn drain(&mut self) {
        self.answered = Heard { jobs: self.answered.jobs, ..*self.heard.borrow() };
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
        let is_new = |heard: &Heard| heard.rings > before.rings || heard.jobs > before.jobs;
        self.answered = *self.heard.wait_for(is_new).await.ok()?;
        Some(Rings {
            count: self.answered.rings - before.rings,
            refresh_jobs: self.answered.jobs > before.jobs,
        })
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

impl Heard {
    /// Counts a notification; false for a probe of somebody else, which means nothing.
    fn heed(&mut self, ring: &Notification, own: Option<&String>) -> bool {
        if ring.channel() == "relay_probe" {
            let is_own = own.is_some_and(|own| own == ring.payload());
            self.probes += usize::from(is_own);
            return is_own;
        }
        self.rings += 1;
        self.jobs += usize::from(ring.payload().contains("\"refresh_jobs\""));
        true
    }
}

async fn in_time<T>(asked: impl Future<Output = Result<T, tokio_postgres::Error>>) -> Result<T, Error> {
    match timeout(ANSWER, asked).await {
        Ok(answered) => Ok(answered?),
        Err(_) => Err(Error::Lost("the doorbell's connection does not answer")),
    }
}
