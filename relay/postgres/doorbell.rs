//! The doorbell: one connection that listens, and the advisory lock by which writers know whether to ring.
//!
//! While the lock is held, every writer rings (NOTIFY); while it is not, no writer does, and each keeps a shared lock
//! until its transaction ends. So taking the lock again proves that all who did not ring are done.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use tokio_postgres::Client;

use crate::postgres::connect::{Error, Server};

/// How long the bell may take to be heard by itself: a pooler in transaction mode swallows it for ever.
const PROBE: Duration = Duration::from_secs(2);

/// The listening connection.
pub struct Doorbell {
    client: Client,
    heard: watch::Receiver<Heard>,
    /// What of it was answered.
    answered: Heard,
}

/// How often it rang. Counted and not kept: anybody in the database may ring, as often as he likes.
#[derive(Debug, Clone, Copy, Default)]
struct Heard {
    rings: usize,
    /// Of these, about the refresh schedule.
    jobs: usize,
    /// Of these, our own.
    probes: usize,
}

/// What was heard at the door.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ring {
    /// Writers rang: this many notifications at once.
    Changes(usize),
    /// The refresh schedule changed; there may be changes too.
    RefreshJobs,
}

impl Doorbell {
    /// Connects and listens.
    ///
    /// # Errors
    /// As the connection.
    pub async fn connect(server: &Server) -> Result<Self, Error> {
        let (ringing, heard) = watch::channel(Heard::default());
        let ring = move |payload: &str| {
            ringing.send_modify(|heard| {
                heard.rings += 1;
                heard.jobs += usize::from(payload.contains("\"refresh_jobs\""));
                heard.probes += usize::from(payload.contains("\"probe\""));
            });
        };
        let client = server.connect_listening(move |notification| ring(notification.payload())).await?;
        client.batch_execute("listen relay").await?;
        Ok(Self { client, heard, answered: Heard::default() })
    }

    /// Rings at our own door and tells whether it was heard.
    ///
    /// # Errors
    /// As the connection.
    pub async fn is_heard(&mut self) -> Result<bool, Error> {
        let before = self.heard.borrow().probes;
        self.client.batch_execute("select pg_notify('relay', '{\"probe\":true}')").await?;
        let probe = self.heard.wait_for(|heard| heard.probes > before);
        let is_heard = timeout(PROBE, probe).await.is_ok_and(|probe| probe.is_ok());
        self.drain();
        Ok(is_heard)
    }

    /// Whether this database tells writers not to ring (`relay.doorbell = off`).
    ///
    /// # Errors
    /// As the connection.
    pub async fn is_off(&self) -> Result<bool, Error> {
        let row = self
            .client
            .query_one("select coalesce(current_setting('relay.doorbell', true), '') = 'off'", &[]);
        Ok(row.await?.get(0))
    }

    /// Asks writers to ring from now on. False while a writer that did not ring is still in flight.
    ///
    /// # Errors
    /// As the connection.
    pub async fn try_sleep(&mut self) -> Result<bool, Error> {
        let asleep = self.client.query_one("select pg_try_advisory_lock(1919249009, 1)", &[]).await?.get(0);
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
        self.client.batch_execute("select pg_advisory_unlock(1919249009, 1)").await?;
        Ok(())
    }

    /// Waits until somebody rings, and takes all rings that are there. None when the connection is gone.
    ///
    /// Cancel safe: a ring that was not returned is still there.
    pub async fn rung(&mut self) -> Option<Ring> {
        let before = self.answered;
        let is_new = |heard: &Heard| heard.rings > before.rings || heard.jobs > before.jobs;
        self.answered = *self.heard.wait_for(is_new).await.ok()?;
        Some(match self.answered.jobs > before.jobs {
            true => Ring::RefreshJobs,
            false => Ring::Changes(self.answered.rings - before.rings),
        })
    }
}
