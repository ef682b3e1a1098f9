//! The doorbell: one connection that listens, and the advisory lock by which writers know whether to ring.
//!
//! While the lock is held, every writer rings (NOTIFY); while it is not, no writer does, and each keeps a shared lock
//! until its transaction ends. So taking the lock again proves that all who did not ring are done.

use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::timeout;
use tokio_postgres::{Client, Notification};

use crate::postgres::connect::{Error, Server};

/// How long the bell may take to be heard by itself: a pooler in transaction mode swallows it for ever.
const PROBE: Duration = Duration::from_secs(2);

/// The listening connection.
pub struct Doorbell {
    client: Client,
    heard: UnboundedReceiver<Notification>,
    /// Among the rings that nobody waited for was one about the refresh schedule.
    refresh_jobs: bool,
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
        let (client, heard) = server.connect_listening().await?;
        client.batch_execute("listen relay").await?;
        Ok(Self { client, heard, refresh_jobs: false })
    }

    /// Rings at our own door and tells whether it was heard.
    ///
    /// # Errors
    /// As the connection.
    pub async fn is_heard(&mut self) -> Result<bool, Error> {
        self.client.batch_execute("select pg_notify('relay', '{\"probe\":true}')").await?;
        let probe = async {
            while let Some(notification) = self.heard.recv().await {
                if notification.payload().contains("\"probe\"") {
                    return true;
                }
                self.refresh_jobs |= tells_of_jobs(&notification);
            }
            false
        };
        Ok(timeout(PROBE, probe).await.unwrap_or(false))
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
        std::mem::take(&mut self.refresh_jobs)
    }

    fn drain(&mut self) {
        while let Ok(notification) = self.heard.try_recv() {
            self.refresh_jobs |= tells_of_jobs(&notification);
        }
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
        if std::mem::take(&mut self.refresh_jobs) {
            return Some(Ring::RefreshJobs);
        }
        let first = self.heard.recv().await?;
        let mut jobs = tells_of_jobs(&first);
        let mut count = 1;
        while let Ok(more) = self.heard.try_recv() {
            jobs |= tells_of_jobs(&more);
            count += 1;
        }
        Some(if jobs { Ring::RefreshJobs } else { Ring::Changes(count) })
    }
}

fn tells_of_jobs(notification: &Notification) -> bool {
    notification.payload().contains("\"refresh_jobs\"")
}
