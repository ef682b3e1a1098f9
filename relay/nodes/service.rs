//! The one task that tells the other relays what clients of this one send and track, and takes what they tell.
//!
//! There is one recovery path, as in the feed. Whatever is lost with the connection, a crash of the database or a long sleep of this
//! process, the relay connects anew, tells its whole state and asks for that of the others.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::{sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::model::node::message::{self, NodeMessage};
use crate::model::session::member::NodeId;
use crate::nodes::peers::{Peers, Turn};
use crate::observe::Observe;
use crate::postgres::connect::backoff::Backoff;
use crate::postgres::connect::pool::{Error, Server};
use crate::postgres::nodes::{NodeBatch, NodeConnection, READ_BATCHES};
use crate::pubsub::topics::Topics;

/// Minimum interval between two writes: messages that come in between share the next one.
const GATHER: Duration = Duration::from_millis(10);
/// Maximum number of batches in one statement.
const WRITE_BATCHES: usize = 8;
/// Interval of the looks who lives, while there are others.
const LOOK: Duration = Duration::from_millis(400);
/// After this time without a look, batches may have been removed unread: the process was held.
const TOO_LATE: Duration = Duration::from_secs(20);
/// Interval at which old batches are removed, while there are any.
const TRIM: Duration = Duration::from_secs(10);
/// How long a relay may take to tell its state before it is asked again.
const ANSWER: Duration = Duration::from_secs(3);
/// Maximum wait for the readers of the broadcasts of a batch. Those that are slower are closed when their outbox is full.
const MAX_EASE: Duration = Duration::from_millis(50);
/// Bounds of the pause after an error.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// The pause after an error that a user has to mend.
const REFUSED_PAUSE: Duration = Duration::from_secs(5);
/// Time limit for what is left to write when the relay shuts down.
const LAST: Duration = Duration::from_secs(1);

/// The exchange of a relay with the others of its database.
pub struct NodeService {
    server: Server,
    topics: Arc<Topics>,
    observe: Arc<Observe>,
    /// Interval of the looks while this relay is alone. A newcomer rings, unless notifications do not arrive.
    poll: Duration,
    peers: Peers,
    /// The number of the next batch. It never begins anew, so that no reader takes a batch twice.
    next: u64,
    /// Batches that may not have been written.
    pending: Vec<Vec<u8>>,
    last_write: Instant,
    last_look: Instant,
    last_trim: Option<Instant>,
    /// Whether the tables may have batches.
    has_batches: bool,
}

impl NodeService {
    /// Creates the exchange, with a connection of its own to `server`.
    pub fn new(server: Server, topics: Arc<Topics>, observe: Arc<Observe>, poll: Duration) -> Self {
        let now = Instant::now();
        observe.nodes(1);
        Self {
            server,
            topics,
            observe,
            poll,
            peers: Peers::default(),
            next: 1,
            pending: Vec::new(),
            last_write: now,
            last_look: now,
            last_trim: None,
            has_batches: true,
        }
    }

    /// Exchanges messages until `end`.
    pub async fn run(mut self, end: CancellationToken) {
        let mut backoff = Backoff::new(PAUSES.0, PAUSES.1);
        while let Err(error) = self.work(&end, &mut backoff).await {
            let pause = if error.is_transient() { backoff.pause() } else { REFUSED_PAUSE };
            let hint = match error.code() {
                Some("42501") => {
                    "; the login of --doorbell-url, or --database-url, must be a member of relay_reader"
                }
                _ => "",
            };
            let pause_ms = pause.as_millis() as u64;
            tracing::warn!(error = %error, pause_ms, "clients of other relays are not reached, connecting again{hint}");
            if end.run_until_cancelled(sleep(pause)).await.is_none() {
                return;
            }
        }
    }

    /// Works over one connection.
    ///
    /// # Errors
    /// When it is lost.
    async fn work(&mut self, end: &CancellationToken, backoff: &mut Backoff) -> Result<(), Error> {
        let connected = end.run_until_cancelled(NodeConnection::open(&self.server, self.topics.node())).await;
        let Some(connection) = connected else { return Ok(()) };
        let mut connection = connection?;
        self.begin(&connection).await?;
        backoff.reset();
        loop {
            let write_at = self.last_write + GATHER;
            let ready = async {
                self.topics.outgoing().ready().await;
                sleep_until(write_at.into()).await;
            };
            tokio::select! {
                () = end.cancelled() => {
                    let _ = timeout(LAST, self.write(&connection)).await;
                    return Ok(());
                }
                is_connected = connection.rung() => match is_connected {
                    true => self.read(&connection).await?,
                    false => return Err(Error::Lost("the connection to other relays was closed")),
                },
                () = ready => self.write(&connection).await?,
                () = sleep_until((self.last_look + self.interval()).into()) => self.look(&connection).await?,
            }
        }
    }

    /// Begins over a new connection.
    async fn begin(&mut self, connection: &NodeConnection) -> Result<(), Error> {
        self.peers.begin(connection.numbers().await?, Instant::now());
        self.last_look = Instant::now();
        self.look(connection).await?;
        // Both are nothing while this relay is alone.
        self.topics.outgoing().ask(None);
        self.topics.outgoing().owe_state();
        self.write(connection).await
    }

    /// Returns the interval of the looks.
    fn interval(&self) -> Duration {
        match () {
            () if self.topics.outgoing().is_open() => LOOK,
            () if self.has_batches => TRIM,
            () => self.poll,
        }
    }

    /// Looks who lives, and removes what is old.
    async fn look(&mut self, connection: &NodeConnection) -> Result<(), Error> {
        if self.topics.outgoing().is_open() && self.last_look.elapsed() > TOO_LATE {
            return Err(Error::Lost("this process was held, and others may have sent more than is kept"));
        }
        let others = connection.others().await?;
        self.last_look = Instant::now();
        // What a relay wrote before it ended is read before it is taken for dead.
        let mut rang = connection.rang();
        if self.peers.lacks(&others) {
            rang.extend(connection.numbers().await?.into_iter().map(|(node, _)| node));
        }
        rang.remove(&self.topics.node());
        self.meet(&others);
        self.read_of(connection, rang).await?;
        for node in self.peers.look(&others, Instant::now()) {
            self.topics.retain_remote(node, &Default::default());
            tracing::info!("another relay is gone, and its members with it");
        }
        for node in self.peers.to_ask(ANSWER, Instant::now()) {
            self.topics.outgoing().ask(Some(node));
        }
        self.meet(&others);
        self.trim(connection, &others).await
    }

    /// Tells others from now on, if there are any.
    fn meet(&self, others: &BTreeSet<i32>) {
        match others.is_empty() && self.peers.is_empty() {
            true => self.topics.outgoing().close(),
            false => self.topics.outgoing().open(),
        }
        self.observe.nodes(1 + self.peers.known_count());
    }

    /// Removes old batches now and then; of several relays, the one with the lowest incarnation does.
    async fn trim(&mut self, connection: &NodeConnection, others: &BTreeSet<i32>) -> Result<(), Error> {
        self.has_batches |= self.topics.outgoing().is_open();
        let is_first = others.first().is_none_or(|other| connection.incarnation() < *other);
        let is_due = self.last_trim.is_none_or(|last| last.elapsed() >= TRIM);
        if self.has_batches && is_first && is_due {
            self.last_trim = Some(Instant::now());
            self.has_batches = connection.trim().await?;
        }
        Ok(())
    }

    /// Writes what waits.
    async fn write(&mut self, connection: &NodeConnection) -> Result<(), Error> {
        let topics = Arc::clone(&self.topics);
        topics.outgoing().state(|| topics.state());
        loop {
            if self.pending.is_empty() {
                self.pending.extend(std::iter::from_fn(|| topics.outgoing().take()).take(WRITE_BATCHES));
            }
            if self.pending.is_empty() {
                return Ok(());
            }
            connection.write(topics.node(), self.next, &self.pending).await?;
            self.last_write = Instant::now();
            self.observe.node_written(self.pending.len());
            self.next += self.pending.len() as u64;
            self.pending.clear();
        }
    }

    /// Reads what those wrote that rang, and the others that are known.
    async fn read(&mut self, connection: &NodeConnection) -> Result<(), Error> {
        let rang = connection.rang();
        self.read_of(connection, rang).await
    }

    async fn read_of(&mut self, connection: &NodeConnection, rang: BTreeSet<NodeId>) -> Result<(), Error> {
        loop {
            let positions = self.peers.positions(&rang);
            if positions.is_empty() {
                return Ok(());
            }
            let batches = connection.read(&positions).await?;
            let count = batches.len();
            for batch in batches {
                self.take(batch).await;
            }
            self.observe.nodes(1 + self.peers.known_count());
            if count < READ_BATCHES as usize {
                return Ok(());
            }
        }
    }

    /// Takes a batch of another relay.
    async fn take(&mut self, batch: NodeBatch) {
        let NodeBatch { node, number, incarnation, content } = batch;
        match self.peers.take(node, number, incarnation, Instant::now()) {
            Turn::Repeated => return,
            Turn::Next => {}
            Turn::Hole(missing) => {
                self.observe.node_hole(missing);
                self.topics.outgoing().ask(Some(node));
            }
        }
        // A relay that writes is alive: from now on it gets this relay's messages.
        self.topics.outgoing().open();
        match message::decode(&content) {
            Ok(messages) => {
                self.observe.node_read(messages.len());
                for message in messages {
                    self.receive(node, message).await;
                }
            }
            Err(unreadable) => {
                tracing::warn!(error = %unreadable, "a message of another relay cannot be read");
            }
        }
    }

    async fn receive(&mut self, node: NodeId, message: NodeMessage) {
        match message {
            NodeMessage::Broadcast(topic, broadcast) => {
                if let Some(congestion) = self.topics.receive(&topic, broadcast)
                    && !congestion.is_empty()
                {
                    let _ = timeout(MAX_EASE, congestion.eased()).await;
                }
            }
            NodeMessage::Track(tracked) => {
                if self.peers.names(node, &tracked.topic, tracked.channel) {
                    self.topics.track_remote(node, tracked);
                }
            }
            NodeMessage::Untrack(topic, channel) => self.topics.untrack_remote(node, &topic, channel),
            NodeMessage::BeginState => self.peers.begin_state(node),
            NodeMessage::EndState => {
                if let Some(members) = self.peers.end_state(node) {
                    self.topics.retain_remote(node, &members);
                }
            }
            NodeMessage::Ask(asked) => {
                if asked.is_none_or(|asked| asked == self.topics.node()) {
                    self.topics.outgoing().owe_state();
                }
            }
        }
    }
}
