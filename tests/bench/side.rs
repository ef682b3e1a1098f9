//! The two that are compared: the relay and the floor, each with a database, a table and clients of its own. They take
//! turns in short stretches, so that whatever else the machine does happens to both.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use crate::ledger::Ledger;
use crate::process::Server;
use crate::report::Report;
use crate::support::database::Database;
use crate::swarm::{Peer, Swarm};
use crate::writer::Stage;

pub struct Side {
    name: &'static str,
    server: Server,
    pub stage: Stage,
    pub ledger: Arc<Ledger>,
    swarm: Swarm,
    /// How many rows were written.
    pub rows: u64,
}

/// What a stretch of writing came to.
pub struct Stretch {
    /// Of the server, in microseconds.
    pub cpu_per_message: f64,
    /// Messages.
    pub per_second: f64,
}

impl Side {
    /// With this many clients, and room for this many rows.
    pub async fn floor(table: &'static str, clients: usize, rows: usize) -> Self {
        let database = Database::bare().await;
        let server = Server::floor(&database.url);
        let stage = Stage::notifying(&database, table).await;
        Self::join("floor", Peer::Floor, server, stage, clients, rows).await
    }

    /// The same for the relay.
    pub async fn relay(table: &'static str, clients: usize, rows: usize) -> Self {
        let database = Database::bare().await;
        let server = Server::relay(&database.url).await;
        let stage = Stage::watched(&database, table).await;
        Self::join("relay", Peer::Relay { table }, server, stage, clients, rows).await
    }

    async fn join(
        name: &'static str,
        peer: Peer,
        server: Server,
        stage: Stage,
        clients: usize,
        rows: usize,
    ) -> Self {
        let ledger = Arc::new(Ledger::new(clients, rows));
        let swarm = Swarm::connect(peer, server.address, &ledger, 0..clients).await;
        Self { name, server, stage, ledger, swarm, rows: 0 }
    }

    /// Rows at a steady rate.
    pub async fn paced(&mut self, rows: u64, per_second: f64) -> Stretch {
        let begun = self.begin();
        self.stage.write_paced(&self.ledger, self.rows + 1, rows, per_second).await;
        self.rows += rows;
        self.finish(begun).await
    }

    /// Rows as fast as the clients read them.
    pub async fn saturated(&mut self, time: Duration) -> Stretch {
        let begun = self.begin();
        self.rows += self.stage.write_saturating(&self.ledger, self.rows + 1, time).await;
        self.finish(begun).await
    }

    fn begin(&self) -> (Duration, u64, Instant) {
        (self.server.cpu(), self.ledger.messages.load(Relaxed), Instant::now())
    }

    async fn finish(&self, (cpu, messages, started): (Duration, u64, Instant)) -> Stretch {
        self.ledger.settle(self.rows).await;
        let messages = (self.ledger.messages.load(Relaxed) - messages) as f64;
        Stretch {
            cpu_per_message: (self.server.cpu() - cpu).as_secs_f64() * 1e6 / messages,
            per_second: messages / started.elapsed().as_secs_f64(),
        }
    }

    /// Ends it, and tells whether every client got every row once and in order.
    pub fn leave(self, report: &mut Report) {
        let Self { name, ledger, swarm, rows, .. } = self;
        swarm.leave();
        let bytes = ledger.bytes.load(Relaxed) / ledger.messages.load(Relaxed).max(1);
        report.faults(&format!("{name}: {rows} rows, frames of {bytes} bytes"), &ledger.faults(rows));
    }
}
