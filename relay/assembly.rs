//! Builds the parts of a relay from its configuration and connects them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{self, Receiver, Sender, UnboundedSender};
use tokio::sync::{Mutex, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::feed::authorize::filter_evaluator::FilterEvaluator;
use crate::feed::authorize::gate::Gate;
use crate::feed::authorize::topic_judge::TopicJudge;
use crate::feed::authorize::topic_questions::{QuestionQueues, TopicWorker};
use crate::feed::command::Command;
use crate::feed::deliver::memory_budget::MemoryBudget;
use crate::feed::explain::explainer::Explainer;
use crate::feed::explain::inspection::Inspection;
use crate::feed::handle::Feed;
use crate::feed::lanes::Lanes;
use crate::feed::read::backlog::Backlog;
use crate::feed::read::source::{ChangeSource, FeedItem};
use crate::feed::read::stall::StallMonitor;
use crate::feed::replay::bookmarks::{BookmarkHandle, BookmarkWriter};
use crate::feed::replay::reader::ReplayReader;
use crate::feed::router::{FeedItems, Router, RouterContext};
use crate::feed::subscribe::Binder;
use crate::nodes::service::NodeService;
use crate::observe::Observe;
use crate::postgres::bookmarks::Bookmarks;
use crate::postgres::broadcast_history::BroadcastHistory;
use crate::postgres::catalog::CatalogCache;
use crate::postgres::changelog::access::ChangelogAccess;
use crate::postgres::changelog::transactions::Transactions;
use crate::postgres::connect::pool::{DATABASE, DOORBELL, Error, JUDGE, Server};
use crate::postgres::evaluate::pairs::PairEvaluator;
use crate::postgres::evaluate::per_identity::IdentityEvaluator;
use crate::postgres::evaluate::set_based::SetEvaluator;
use crate::postgres::filter_compiler::FilterCompiler;
use crate::postgres::maintenance::{collections, refresh, retention};
use crate::postgres::snapshot_rows::SnapshotRows;
use crate::postgres::status::StatusTable;
use crate::pubsub::topics::Topics;
use crate::status::board::Board;
use crate::status::service::StatusService;
use crate::status::writer::StatusWriter;
use crate::transport::app::App;
use crate::transport::broadcast_rates::BroadcastRates;
use crate::transport::connection_limits::ConnectionLimits;
use crate::webhooks::service::WebhookService;

/// Connections for the catalog, subscriptions and flushes. None is used while nothing happens.
const POOL_SIZE: usize = 4;
/// Connections that compile clients' filters.
const FILTER_POOL_SIZE: usize = 2;
/// Statement timeout of a filter's compilation. It is a cast; a longer one is an attack.
const FILTER_LIMIT: Duration = Duration::from_secs(1);
/// Statement timeout of the pool. Its statements take milliseconds; one that takes a minute hangs.
const LIMIT: Duration = Duration::from_secs(60);
/// Timeout of reading a page, as a multiple of the stall time: sorting a million changes takes seconds.
const READ_TIMEOUT_FACTOR: u32 = 3;
/// Workers that judge private channels, each over its own connections: one may wait for a slow policy.
const TOPIC_WORKERS: usize = 2;
/// Capacity of the channel from the source to the router: one batch being evaluated, one read ahead.
const ITEMS: usize = 2;

/// A relay whose parts are connected. Nothing reads the database before [`Self::begin_reading`].
pub struct Assembly {
    /// What its connections share.
    pub app: Arc<App>,
    foundation: Foundation,
    reading: ReadingTasks,
}

/// The servers of a relay, by what they are for. By default all three are the same.
pub struct Servers {
    /// Has the changelog.
    pub main: Server,
    /// For LISTEN.
    pub doorbell: Server,
    /// For messages to and from other relays.
    pub nodes: Server,
    /// Evaluates policies.
    pub judge: Server,
}

/// The tasks of a relay beside its sessions, and how they end.
#[derive(Clone, Default)]
pub struct Tasks {
    /// All of them.
    pub tracker: TaskTracker,
    /// Cancelled when the relay shuts down and the sessions have ended.
    pub end: CancellationToken,
    /// Cancelled after it. Ends the tasks that deliver to sessions.
    pub feed_end: CancellationToken,
}

/// The parts that most others use.
struct Foundation {
    servers: Servers,
    tasks: Tasks,
    observe: Arc<Observe>,
    stall_monitor: Arc<StallMonitor>,
    catalog: Arc<CatalogCache>,
    filters: FilterCompiler,
    changelog: ChangelogAccess,
    judge_timeout: Duration,
}

/// The tasks that read the database, before they run.
struct ReadingTasks {
    source: ChangeSource,
    items: Sender<FeedItem>,
    bookmark_writer: BookmarkWriter,
    status_writer: StatusWriter,
    webhooks: WebhookService,
    nodes: NodeService,
    jobs: watch::Sender<()>,
}

impl Assembly {
    /// Builds all parts, and runs the tasks that can wait for the database.
    ///
    /// # Errors
    /// When a URL cannot be read.
    pub fn of(config: Config) -> Result<Self, Error> {
        let foundation = Foundation::of(&config)?;
        let replay_reader = Arc::new(ReplayReader::new(
            foundation.changelog.clone(),
            Arc::clone(&foundation.catalog),
            foundation.gate(foundation.filter_evaluator()),
        ));
        let (items, received) = mpsc::channel(ITEMS);
        let lanes = foundation.lanes(&replay_reader, received);
        let (feed, bookmark_writer) = foundation.feed(&config, lanes, replay_reader)?;
        let (jobs, _) = watch::channel(());
        let source = foundation.source(config.poll, jobs.clone());
        let (status, status_writer) = foundation.status(&config)?;
        let poll = config.poll;
        let app = Arc::new(foundation.app(config, feed, status));
        let webhooks = foundation.webhooks(&app)?;
        let (server, topics) = (foundation.servers.nodes.clone(), Arc::clone(&app.topics));
        let nodes = NodeService::new(server, topics, Arc::clone(&foundation.observe), poll);
        let reading = ReadingTasks { source, items, bookmark_writer, status_writer, webhooks, nodes, jobs };
        Ok(Self { app, foundation, reading })
    }

    /// Returns its servers.
    pub fn servers(&self) -> &Servers {
        &self.foundation.servers
    }

    /// Returns its tasks.
    pub fn tasks(&self) -> Tasks {
        self.foundation.tasks.clone()
    }

    /// Runs the tasks that read the database.
    pub fn begin_reading(self) {
        let Foundation { servers, tasks, observe, .. } = self.foundation;
        let ReadingTasks { source, items, bookmark_writer, status_writer, webhooks, nodes, jobs } =
            self.reading;
        let (tracker, end) = (&tasks.tracker, &tasks.end);
        tracker.spawn(bookmark_writer.run(tasks.feed_end.clone()));
        // After the sessions, whose ends it writes.
        tracker.spawn(status_writer.run(jobs.clone(), tasks.feed_end.clone()));
        tracker.spawn(webhooks.run(jobs.clone(), end.clone()));
        tracker.spawn(nodes.run(tasks.feed_end.clone()));
        tracker.spawn(source.run(items, end.clone()));
        tracker.spawn(retention::run(servers.main.clone(), observe, end.clone()));
        tracker.spawn(refresh::run(servers.main.clone(), jobs.clone(), end.clone()));
        tracker.spawn(collections::run(servers.main, jobs, end.clone()));
    }
}

impl Servers {
    /// Parses the addresses, and logs what the user should know about them.
    fn of(config: &Config) -> Result<Self, Error> {
        let server = |setting, url: &str, name: &str| {
            let setting = if *url == config.database_url { DATABASE } else { setting };
            Server::named(setting, url, name, config.database_ca.as_deref())
        };
        let servers = Self {
            main: server(DATABASE, &config.database_url, "relay")?,
            doorbell: server(DOORBELL, &config.doorbell_url, "relay doorbell")?,
            nodes: server(DOORBELL, &config.doorbell_url, "relay nodes")?,
            judge: server(JUDGE, &config.judge_url, "relay judge")?,
        };
        let all = [&servers.main, &servers.doorbell, &servers.judge];
        for note in BTreeSet::from_iter(all.into_iter().flat_map(Server::notes)) {
            tracing::info!("{note}");
        }
        Ok(servers)
    }
}

impl Foundation {
    fn of(config: &Config) -> Result<Self, Error> {
        let servers = Servers::of(config)?;
        let observe = Arc::new(Observe::new());
        let pool = servers.main.pool(POOL_SIZE, LIMIT)?.measured(&observe);
        let filter_pool = servers.main.pool(FILTER_POOL_SIZE, FILTER_LIMIT)?.measured(&observe);
        let judging_login = servers.judge.login().map(str::to_owned);
        let foundation = Self {
            tasks: Tasks::default(),
            observe,
            stall_monitor: Arc::new(StallMonitor::new(config.stall)),
            filters: FilterCompiler::new(filter_pool, judging_login.clone()),
            catalog: Arc::new(CatalogCache::new(pool.clone(), judging_login)),
            changelog: ChangelogAccess {
                server: servers.main.clone(),
                transactions: Arc::new(Transactions::new(pool.clone())),
                pool,
                query_timeout: config.stall * READ_TIMEOUT_FACTOR,
            },
            judge_timeout: config.judge_timeout,
            servers,
        };
        foundation.watch(&foundation.stall_monitor);
        Ok(foundation)
    }

    /// Runs a stall monitor.
    fn watch(&self, stall_monitor: &Arc<StallMonitor>) {
        let (stall_monitor, end) = (Arc::clone(stall_monitor), self.tasks.end.clone());
        self.tasks.tracker.spawn(async move { stall_monitor.run(end).await });
    }

    fn identity_evaluator(&self) -> IdentityEvaluator {
        IdentityEvaluator::new(self.servers.judge.clone(), self.judge_timeout)
    }

    fn filter_evaluator(&self) -> Option<FilterEvaluator> {
        Some(FilterEvaluator::new(self.identity_evaluator(), self.judge_timeout))
    }

    /// Returns a gate with connections of its own.
    fn gate(&self, filters: Option<FilterEvaluator>) -> Gate {
        let set_evaluator = SetEvaluator::new(self.servers.judge.clone(), self.judge_timeout);
        Gate::new(self.identity_evaluator(), set_evaluator, filters, Arc::clone(&self.observe))
    }

    /// Runs the routers. Filters that PostgreSQL evaluates, and clients with many subscriptions, have routers of their own, so
    /// that they do not delay the others.
    fn lanes(&self, replay_reader: &Arc<ReplayReader>, items: Receiver<FeedItem>) -> Lanes {
        let context = RouterContext {
            catalog: Arc::clone(&self.catalog),
            observe: Arc::clone(&self.observe),
            replay_reader: Arc::clone(replay_reader),
        };
        let (filter_commands, filter_backlog) = self.side_lane("filters", context.clone());
        let (crowd_commands, crowd_backlog) = self.side_lane("crowd", context.clone());
        let (sender, commands) = mpsc::unbounded_channel();
        let stall_monitor = Arc::clone(&self.stall_monitor);
        let backlogs = vec![filter_backlog, crowd_backlog];
        let router = Router::new(context, self.gate(None), sender.clone(), stall_monitor, backlogs);
        let feed_end = self.tasks.feed_end.clone();
        self.tasks.tracker.spawn(router.run(commands, FeedItems::Source(items), feed_end));
        Lanes::new(sender, filter_commands, crowd_commands)
    }

    /// Runs the router of a lane beside the main one. Returns its command channel, and the queue for its items.
    fn side_lane(
        &self,
        name: &'static str,
        context: RouterContext,
    ) -> (UnboundedSender<Command>, Arc<Backlog>) {
        let (sender, commands) = mpsc::unbounded_channel();
        let backlog = Arc::new(Backlog::default());
        let stall_monitor = Arc::new(StallMonitor::for_lane(&self.stall_monitor, name));
        self.watch(&stall_monitor);
        let gate = self.gate(self.filter_evaluator());
        let router = Router::new(context, gate, sender.clone(), stall_monitor, Vec::new());
        let (items, feed_end) = (FeedItems::Backlog(Arc::clone(&backlog)), self.tasks.feed_end.clone());
        self.tasks.tracker.spawn(router.run(commands, items, feed_end));
        (sender, backlog)
    }

    /// Returns the handle to the feed, and the task that keeps bookmarks.
    fn feed(
        &self,
        config: &Config,
        lanes: Lanes,
        replay_reader: Arc<ReplayReader>,
    ) -> Result<(Feed, BookmarkWriter), Error> {
        let Servers { main, judge, .. } = &self.servers;
        let (limit, read_timeout) = (self.judge_timeout, self.changelog.query_timeout);
        let rows = SnapshotRows::new(main, judge, limit, config.stall, read_timeout)?;
        let bookmarks = Bookmarks::new(main, config.resume, config.stall)?;
        let (bookmarks, bookmark_writer) = BookmarkHandle::new(bookmarks);
        let binder = Binder::new(Arc::clone(&self.catalog), self.filters.clone());
        let observe = Arc::clone(&self.observe);
        let history = BroadcastHistory::new(self.changelog.pool.clone());
        Ok((Feed::new(binder, lanes, replay_reader, rows, bookmarks, history, observe), bookmark_writer))
    }

    /// Returns the status, and the task that writes it.
    fn status(&self, config: &Config) -> Result<(StatusService, StatusWriter), Error> {
        let main = &self.servers.main;
        let board = Arc::new(Board::new(config.status.clone(), Arc::clone(&self.observe)));
        let writer = StatusWriter::new(main.clone(), Arc::clone(&board), Arc::clone(&self.observe));
        Ok((StatusService::new(board, StatusTable::new(main)?), writer))
    }

    /// Returns what delivers webhooks.
    fn webhooks(&self, app: &App) -> Result<WebhookService, Error> {
        let (server, pool) = (self.servers.main.clone(), self.changelog.pool.clone());
        let (feed, budget) = (app.feed.clone(), Arc::clone(&app.budget));
        WebhookService::new(server, pool, feed, budget, Arc::clone(&self.observe))
            .map_err(|error| Error::Unfit(format!("webhooks cannot be delivered: {error}")))
    }

    /// Returns the judge of private channels, and runs its tasks.
    fn topic_judge(&self) -> Arc<TopicJudge> {
        let (queues, waiting) = QuestionQueues::new();
        let waiting = Arc::new(Mutex::new(waiting));
        let end = &self.tasks.feed_end;
        for _ in 0..TOPIC_WORKERS {
            let pairs = PairEvaluator::new(self.servers.judge.clone(), self.judge_timeout);
            let worker = TopicWorker::new(pairs, self.identity_evaluator(), Arc::clone(&self.observe));
            self.tasks.tracker.spawn(worker.run(Arc::clone(&waiting), end.clone()));
        }
        let judge = TopicJudge::new(Arc::clone(&self.catalog), queues);
        self.tasks.tracker.spawn(Arc::clone(&judge).run(end.clone()));
        judge
    }

    fn source(&self, poll: Duration, jobs: watch::Sender<()>) -> ChangeSource {
        ChangeSource {
            access: self.changelog.clone(),
            doorbell: self.servers.doorbell.clone(),
            poll,
            stall_monitor: Arc::clone(&self.stall_monitor),
            observe: Arc::clone(&self.observe),
            jobs,
            scope: self.catalog.scope(),
        }
    }

    /// Returns what connections share, and runs the task that rereads the keys of its verifier.
    fn app(&self, config: Config, feed: Feed, status: StatusService) -> App {
        let limits = config.limits;
        let Servers { main, judge, .. } = &self.servers;
        let catalog = Arc::clone(&self.catalog);
        if let Some(refresher) = config.jwks_refresher {
            self.tasks.tracker.spawn(refresher.run(Arc::clone(&self.observe), self.tasks.end.clone()));
        }
        let budget = Arc::new(MemoryBudget::within(limits.total_outbox_bytes, limits.change_bytes));
        let topics = Topics::new(limits.topics, Arc::clone(&budget), Arc::clone(&self.observe));
        self.tasks.tracker.spawn(Arc::clone(&topics).run(self.tasks.feed_end.clone()));
        let inspection =
            Inspection::new(main.clone(), judge.clone(), Arc::clone(&catalog), self.judge_timeout);
        App {
            verifier: config.verifier,
            feed,
            status,
            explainer: Explainer::new(
                main.clone(),
                judge.clone(),
                catalog,
                self.filters.clone(),
                self.judge_timeout,
            ),
            topics,
            topic_judge: self.topic_judge(),
            broadcast_rates: BroadcastRates::new(limits.http_broadcasts_per_second),
            observe: Arc::clone(&self.observe),
            stall_monitor: Arc::clone(&self.stall_monitor),
            allowed_origins: config.allowed_origins,
            upstream: config.upstream,
            budget,
            clients: Arc::default(),
            inspection,
            shown_settings: config.shown,
            has_admin_port: config.admin_listen.is_some(),
            started: Instant::now(),
            connection_limits: Arc::new(ConnectionLimits::new(
                limits.connections,
                limits.connections_per_address,
            )),
            limits,
            resume: config.resume,
            prepared: AtomicBool::new(false),
            drain: config.drain,
            end: CancellationToken::new(),
            sessions: TaskTracker::new(),
            numbers: AtomicU64::new(1),
        }
    }
}
