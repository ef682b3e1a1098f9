//! Builds the parts, serves until shutdown, and stops in order. The only module that imports every layer.

use std::collections::BTreeSet;
use std::future::{Future, pending};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc};
use tokio::time::{sleep, timeout};
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::feed::authorize::filter_evaluator::FilterEvaluator;
use crate::feed::authorize::gate::Gate;
use crate::feed::deliver::memory_budget::MemoryBudget;
use crate::feed::handle::Feed;
use crate::feed::lanes::Lanes;
use crate::feed::read::backlog::Backlog;
use crate::feed::read::source::ChangeSource;
use crate::feed::read::stall::{StallCause, StallMonitor};
use crate::feed::replay::bookmarks::BookmarkHandle;
use crate::feed::replay::reader::ReplayReader;
use crate::feed::router::{FeedItems, Router};
use crate::feed::subscribe::Binder;
use crate::observe::Observe;
use crate::postgres::bookmarks::Bookmarks;
use crate::postgres::catalog::CatalogCache;
use crate::postgres::changelog::transactions::Transactions;
use crate::postgres::connect::backoff::Backoff;
use crate::postgres::connect::pool::{DATABASE, DOORBELL, Error, JUDGE, Server};
use crate::postgres::evaluate::per_identity::IdentityEvaluator;
use crate::postgres::evaluate::set_based::SetEvaluator;
use crate::postgres::install;
use crate::postgres::maintenance::{refresh, retention};
use crate::postgres::snapshot_rows::SnapshotRows;
use crate::transport::app::App;
use crate::transport::connection_limits::ConnectionLimits;
use crate::transport::routes;
use crate::transport::socket_buffers;

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
/// Capacity of the channel from the source to the router: one part being evaluated, one read ahead.
const PARTS: usize = 2;
/// File descriptors reserved for connections to PostgreSQL, which may have to be reopened when clients use all others.
const RESERVED_FILES: usize = 48;
/// How long sessions, and then tasks, may take to stop.
const GRACE: Duration = Duration::from_secs(5);

/// A running relay.
pub struct Running {
    /// What its connections share: its metrics, and whether it is ready.
    pub app: Arc<App>,
}

/// Serves on `listener` until `shutdown` resolves, then stops in order. Calls `started` once everything is built.
///
/// The database may be unreachable at first: clients connect meanwhile, and the relay retries.
///
/// # Errors
/// When a URL cannot be read, the installation fails, or the database side is missing or too old.
pub async fn serve(
    config: Config,
    listener: TcpListener,
    shutdown: impl Future<Output = ()>,
    started: impl FnOnce(Running),
) -> Result<(), Error> {
    let server = |setting, url: &str, name: &str| {
        let setting = if *url == config.database_url { DATABASE } else { setting };
        Server::named(setting, url, name, config.database_ca.as_deref())
    };
    let main = server(DATABASE, &config.database_url, "relay")?;
    let bell = server(DOORBELL, &config.doorbell_url, "relay doorbell")?;
    let judge = server(JUDGE, &config.judge_url, "relay judge")?;
    for note in BTreeSet::from_iter([&main, &bell, &judge].into_iter().flat_map(Server::notes)) {
        tracing::info!("{note}");
    }

    let observe = Arc::new(Observe::new());
    let end = CancellationToken::new();
    let tasks = TaskTracker::new();
    let pool = main.pool(POOL_SIZE, LIMIT)?;
    let filters = main.pool(FILTER_POOL_SIZE, FILTER_LIMIT)?;
    let catalog = Arc::new(CatalogCache::new(pool.clone(), filters, judge.login().map(str::to_owned)));
    let judging = judge.clone();
    let refresh_jobs = Arc::new(Notify::new());
    let (parts_sender, parts) = mpsc::channel(PARTS);
    let (main_commands, commands) = mpsc::unbounded_channel();
    let read_timeout = config.stall * READ_TIMEOUT_FACTOR;

    let stall_monitor = Arc::new(StallMonitor::new(config.stall));
    let transactions = Arc::new(Transactions::new(pool.clone()));
    let source = ChangeSource {
        server: main.clone(),
        doorbell: bell.clone(),
        pool: pool.clone(),
        transactions: Arc::clone(&transactions),
        poll: config.poll,
        query_timeout: read_timeout,
        stall_monitor: Arc::clone(&stall_monitor),
        observe: Arc::clone(&observe),
        refresh_jobs: Arc::clone(&refresh_jobs),
        scope: catalog.scope(),
    };
    let feed_end = CancellationToken::new();
    tasks.spawn({
        let (stall_monitor, end) = (Arc::clone(&stall_monitor), end.clone());
        async move { stall_monitor.run(end).await }
    });
    let gate = |filters| {
        let set_evaluator = SetEvaluator::new(judge.clone(), config.judge_timeout);
        Gate::new(
            IdentityEvaluator::new(judge.clone(), config.judge_timeout),
            set_evaluator,
            filters,
            Arc::clone(&observe),
        )
    };
    let filter_judge = || {
        let filters = IdentityEvaluator::new(judge.clone(), config.judge_timeout);
        Some(FilterEvaluator::new(filters, config.judge_timeout))
    };
    let rows = SnapshotRows::new(&main, &judge, config.judge_timeout, config.stall, read_timeout)?;
    let replay = Arc::new(ReplayReader::new(
        main.clone(),
        pool,
        transactions,
        Arc::clone(&catalog),
        gate(filter_judge()),
        read_timeout,
    ));
    let (bookmarks, bookmark_writer) =
        BookmarkHandle::new(Bookmarks::new(&main, config.resume, config.stall)?);
    let router = |gate, commands, stall_monitor, backlogs| {
        Router::new(
            Arc::clone(&catalog),
            gate,
            Arc::clone(&observe),
            Arc::clone(&replay),
            commands,
            stall_monitor,
            backlogs,
        )
    };
    let side_lane = |name| {
        let (sender, commands) = mpsc::unbounded_channel();
        let (backlog, stall_monitor) =
            (Arc::new(Backlog::default()), Arc::new(StallMonitor::for_lane(&stall_monitor, name)));
        let router = router(gate(filter_judge()), sender.clone(), Arc::clone(&stall_monitor), Vec::new());
        tasks.spawn(router.run(commands, FeedItems::Backlog(Arc::clone(&backlog)), feed_end.clone()));
        let end = end.clone();
        tasks.spawn(async move { stall_monitor.run(end).await });
        (sender, backlog)
    };
    // Filters that PostgreSQL evaluates, and clients with many subscriptions, have routers of their own, so that they do not
    // delay the others.
    let (filter_commands, filter_backlog) = side_lane("filters");
    let (crowd_commands, crowd_backlog) = side_lane("crowd");
    let backlogs = vec![filter_backlog, crowd_backlog];
    let main_router = router(gate(None), main_commands.clone(), Arc::clone(&stall_monitor), backlogs);
    tasks.spawn(main_router.run(commands, FeedItems::Source(parts), feed_end.clone()));
    let lanes = Lanes::new(main_commands, filter_commands, crowd_commands);
    if let Some(refresher) = config.jwks_refresher {
        tasks.spawn(refresher.run(Arc::clone(&observe), end.clone()));
    }
    let prepared = Arc::new(AtomicBool::new(false));
    let app = Arc::new(App {
        verifier: config.verifier,
        feed: Feed::new(Binder::new(Arc::clone(&catalog)), lanes, Arc::clone(&replay), rows, bookmarks),
        observe: Arc::clone(&observe),
        stall_monitor: Arc::clone(&stall_monitor),
        allowed_origins: config.allowed_origins,
        budget: Arc::new(MemoryBudget::within(config.limits.total_outbox_bytes, config.limits.change_bytes)),
        connection_limits: Arc::new(ConnectionLimits::new(
            config.limits.connections,
            config.limits.connections_per_address,
        )),
        limits: config.limits,
        resume: config.resume,
        prepared: Arc::clone(&prepared),
        end: end.clone(),
        sessions: TaskTracker::new(),
        numbers: AtomicU64::new(1),
    });
    if let Err(error) = socket_buffers::bound(&listener, app.limits.send_buffer_bytes, app.limits.write * 2) {
        tracing::warn!(error = %error, "kernel send buffers not bounded");
    }
    started(Running { app: Arc::clone(&app) });

    // Tasks that read the database start after its checks; clients may connect before.
    let reading = async {
        prepare(&main, &bell, &judging, config.install, &stall_monitor).await?;
        prepared.store(true, Ordering::Relaxed);
        tasks.spawn(bookmark_writer.run(feed_end.clone()));
        tasks.spawn(source.run(parts_sender, end.clone()));
        tasks.spawn(retention::run(main.clone(), Arc::clone(&observe), end.clone()));
        tasks.spawn(refresh::run(main, refresh_jobs, end.clone()));
        pending::<Result<(), Error>>().await
    };
    let served = tokio::select! {
        () = shutdown => Ok(()),
        () = accept(&app, &listener) => Ok(()),
        failed = reading => failed,
    };
    tracing::info!(session.count = app.connection_limits.client_count(), "shutting down");
    drop(listener);
    end.cancel();
    stop(&app.sessions, &feed_end, &tasks).await;
    served
}

/// Waits for sessions to stop, then stops the tasks that deliver to them. Each may take [`GRACE`].
async fn stop(sessions: &TaskTracker, feed_end: &CancellationToken, tasks: &TaskTracker) {
    sessions.close();
    if timeout(GRACE, sessions.wait()).await.is_err() {
        tracing::warn!(session.count = sessions.len(), "sessions did not stop in time");
    }
    feed_end.cancel();
    tasks.close();
    if timeout(GRACE, tasks.wait()).await.is_err() {
        tracing::warn!(task.count = tasks.len(), "tasks did not stop in time");
    }
}

/// Installs the database side if `is_install` is set, and checks the connections. Waits for a database that is unreachable.
///
/// # Errors
/// When a pooler is in transaction mode, the database side is missing or too old, or a login is refused: no change could be
/// delivered.
async fn prepare(
    server: &Server,
    bell: &Server,
    judge: &Server,
    is_install: bool,
    stall_monitor: &StallMonitor,
) -> Result<(), Error> {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
    loop {
        let outcome = async {
            server.check_sessions().await?;
            let mut client = server.connect().await?;
            if is_install {
                // An installation may take long, and is no stall.
                stall_monitor.end_wait(StallCause::Changelog);
                let applied = install::install(&mut client).await?;
                stall_monitor.begin_wait(StallCause::Changelog);
                if !applied.is_empty() {
                    tracing::info!(file.count = applied.len(), "installed");
                }
            }
            install::check(&client).await?;
            bell.connect().await?;
            judge.check_sessions().await?;
            if lacks_usual_roles(&judge.connect().await?).await? {
                tracing::warn!(
                    "this login cannot act as anon, authenticated or service_role, so subscribers with these roles see \
                     nothing: grant them to it, or give --judge-url"
                );
            }
            Ok::<(), Error>(())
        };
        match outcome.await {
            Ok(()) => {
                tracing::info!("database ready");
                return Ok(());
            }
            Err(error) if error.is_transient() => {
                stall_monitor.record_disconnect(error.kind());
                let pause = backoff.pause();
                tracing::warn!(error = %error, pause_ms = pause.as_millis() as u64, "waiting for the database");
                sleep(pause).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Whether the judging login is a member of none of the usual roles that exist.
async fn lacks_usual_roles(judge: &Client) -> Result<bool, Error> {
    let members = "select coalesce(not bool_or(pg_has_role(oid, 'member')), false) from pg_roles \
         where rolname in ('anon', 'authenticated', 'service_role')";
    Ok(judge.query_one(members, &[]).await?.get(0))
}

/// Returns the maximum number of connections by the limit of open files, if the system reports one.
fn max_connections() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let files =
        limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next());
    files
        .and_then(|files| files.parse::<usize>().ok())
        .map_or(usize::MAX, |files| files.saturating_sub(RESERVED_FILES))
}

async fn accept(app: &Arc<App>, listener: &TcpListener) {
    let max = max_connections();
    loop {
        if app.sessions.len() >= max {
            tracing::warn!(max, "connection not accepted, limit of open files reached: raise ulimit -n");
            sleep(Duration::from_millis(100)).await;
            continue;
        }
        match listener.accept().await {
            Ok((stream, address)) => {
                // Frames are small and have to leave at once.
                let _ = stream.set_nodelay(true);
                app.sessions.spawn(routes::serve(Arc::clone(app), stream, address.ip()));
            }
            Err(error) => {
                // Usually there is no file descriptor left: new clients wait, the others are not affected.
                tracing::warn!(error = %error, "connection not accepted");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}
