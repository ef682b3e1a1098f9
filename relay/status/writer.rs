//! The one task that writes the status: what the board has, by one statement for many users, and the sweeps.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::model::presence::status::StatusUpdate;
use crate::observe::Observe;
use crate::postgres::connect::backoff::Backoff;
use crate::postgres::connect::pool::{Error, Server};
use crate::postgres::status::StatusConnection;
use crate::status::board::Board;

/// Maximum number of users in one statement.
const BATCH: usize = 1000;
/// Minimum interval between two statements: users that come or go in between share the next one.
const GATHER: Duration = Duration::from_millis(200);
/// Interval between looks whether there is a status table, while there is none. Its notification may be lost.
const LOOK: Duration = Duration::from_secs(60);
/// Bounds of the pause after an error.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));
/// Time limit for the last statements of a relay that shuts down.
const LAST: Duration = Duration::from_secs(3);
/// The code of a statement by a relay that was taken for dead.
const TAKEN_FOR_DEAD: &str = "P0002";

/// The writer of a relay.
pub struct StatusWriter {
    server: Server,
    board: Arc<Board>,
    observe: Arc<Observe>,
    /// The id under which the status table knows this relay.
    relay: Option<String>,
    /// Pauses after errors.
    backoff: Backoff,
    /// Nothing is written before.
    paused_until: Instant,
}

/// Why the work over a connection ended without an error.
enum WorkEnd {
    /// There is no status table.
    Off,
    /// The relay shuts down.
    Ended,
}

impl StatusWriter {
    /// Creates a writer with a connection of its own to `server`.
    pub fn new(server: Server, board: Arc<Board>, observe: Arc<Observe>) -> Self {
        let (relay, backoff) = (None, Backoff::new(PAUSES.0, PAUSES.1));
        Self { server, board, observe, relay, backoff, paused_until: Instant::now() }
    }

    /// Writes until `end`. `jobs` reports that the status may have been turned on or off.
    pub async fn run(mut self, jobs: watch::Sender<()>, end: CancellationToken) {
        let mut changed = jobs.subscribe();
        loop {
            let wait = match self.work(&mut changed, &end).await {
                Ok(WorkEnd::Ended) => return,
                Ok(WorkEnd::Off) => LOOK,
                Err(error) => {
                    let pause = self.backoff.pause();
                    tracing::warn!(error = %error, pause_ms = pause.as_millis() as u64, "status not written, connecting again");
                    pause
                }
            };
            tokio::select! {
                () = end.cancelled() => return,
                _ = timeout(wait, changed.changed()) => {}
            }
        }
    }

    /// Writes over one connection.
    ///
    /// # Errors
    /// When the connection ends.
    async fn work(
        &mut self,
        changed: &mut watch::Receiver<()>,
        end: &CancellationToken,
    ) -> Result<WorkEnd, Error> {
        let connection = StatusConnection::open(&self.server).await?;
        // Other relays may have been away with the database, and be alive: they have a lease to say so.
        let sweeps_from = Instant::now() + self.board.settings().lease();
        let mut ticks = interval(self.board.settings().sweep);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut gathered = Instant::now();
        loop {
            if self.board.has_forgotten() {
                // The former id is taken for dead, and with it those who left unnoticed.
                self.relay = None;
            }
            if self.relay.is_none() && !self.begin(&connection).await? {
                return Ok(WorkEnd::Off);
            }
            let is_writing = Instant::now() >= self.paused_until;
            let wait = if is_writing { gathered } else { self.paused_until };
            tokio::select! {
                biased;
                () = end.cancelled() => {
                    let _ = timeout(LAST, self.finish(&connection)).await;
                    return Ok(WorkEnd::Ended);
                }
                Ok(()) = changed.changed() => self.beat(&connection).await?,
                _ = ticks.tick() => {
                    self.beat(&connection).await?;
                    self.board.tidy();
                    if Instant::now() >= sweeps_from && is_writing {
                        let swept = self.sweep(&connection).await;
                        self.settle(swept, 1, &connection)?;
                    }
                }
                () = async { self.board.due().await; sleep_until(wait).await } => {
                    gathered = Instant::now() + GATHER;
                    self.write(&connection).await?;
                }
            }
        }
    }

    /// Registers this relay. Returns false if there is no status table.
    async fn begin(&mut self, connection: &StatusConnection) -> Result<bool, Error> {
        self.relay = connection.begin().await?;
        if self.relay.is_none() {
            self.board.stop();
            return Ok(false);
        }
        let settings = self.board.settings();
        tracing::info!(
            throttle_ms = settings.throttle.as_millis() as u64,
            sweep_ms = settings.sweep.as_millis() as u64,
            silence_ms = settings.silence.as_millis() as u64,
            "writing the status of users"
        );
        self.board.begin();
        Ok(true)
    }

    /// Tells that this relay lives, and learns whether it was taken for dead.
    async fn beat(&mut self, connection: &StatusConnection) -> Result<(), Error> {
        if let Some(relay) = &self.relay
            && !connection.beat(relay).await?
        {
            self.relay = None;
        }
        Ok(())
    }

    async fn sweep(&self, connection: &StatusConnection) -> Result<(), Error> {
        let settings = self.board.settings();
        if let Some(swept) = connection.sweep(settings.lease(), settings.silence).await? {
            self.observe.status_swept(swept);
            if swept > 0 {
                tracing::info!(user.count = swept, "silent users and users of dead relays set offline");
            }
        }
        Ok(())
    }

    /// Writes the users that are due, and puts those that could not be written down again.
    async fn write(&mut self, connection: &StatusConnection) -> Result<(), Error> {
        let Some(relay) = self.relay.clone() else { return Ok(()) };
        let mut updates = self.board.take(BATCH);
        if updates.is_empty() {
            return Ok(());
        }
        let unwritten = match connection.write(&relay, &updates).await {
            Ok(unwritten) => unwritten,
            Err(error) if error.code() == Some(TAKEN_FOR_DEAD) => {
                self.relay = None;
                self.board.put_back(updates, false);
                return Ok(());
            }
            Err(error) => {
                let count = updates.len();
                self.board.put_back(updates, false);
                return self.settle(Err(error), count, connection);
            }
        };
        self.observe.status_written(updates.len() - unwritten.len());
        let refused: Vec<&str> = unwritten.iter().filter_map(|one| one.why.as_deref()).collect();
        if let Some(code) = refused.first() {
            self.board.failed(refused.len());
            self.observe.status_refused(refused.len(), code);
        }
        updates.retain(|update: &StatusUpdate| {
            unwritten.iter().any(|one| one.why.is_none() && *one.id == *update.participant.id)
        });
        self.board.put_back(updates, true);
        self.settle(Ok(()), 0, connection)
    }

    /// Takes note of an outcome. After an error of the status table, nothing is written for a while; the relay stays known.
    ///
    /// # Errors
    /// When the connection is unusable.
    fn settle(
        &mut self,
        outcome: Result<(), Error>,
        count: usize,
        connection: &StatusConnection,
    ) -> Result<(), Error> {
        let Err(error) = outcome else {
            self.backoff.reset();
            return Ok(());
        };
        self.board.failed(count);
        if connection.is_closed() || error.code().is_none() {
            return Err(error);
        }
        let pause = self.backoff.pause();
        self.paused_until = Instant::now() + pause;
        tracing::warn!(error = %error, pause_ms = pause.as_millis() as u64, "status not written, trying again");
        Ok(())
    }

    /// Writes what is left, and says that this relay ends.
    async fn finish(&mut self, connection: &StatusConnection) -> Result<(), Error> {
        let Some(relay) = self.relay.clone() else { return Ok(()) };
        while let updates = self.board.take(BATCH)
            && !updates.is_empty()
        {
            connection.write(&relay, &updates).await?;
        }
        // Sets those offline whose row was held.
        connection.end(&relay).await?;
        self.sweep(connection).await
    }
}
