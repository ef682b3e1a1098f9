//! Builds the parts, serves until told to end, and ends in order. The only place that sees every layer.

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
use crate::feed::read::source::Source;
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

/// Connections for looking at the catalog, binding and flushing. None is held while nothing happens.
const POOL: usize = 4;
/// Connections for reading clients' filters, and how long one may take: it is a cast, or somebody's trick.
const FILTERS: usize = 2;
const FILTER_LIMIT: Duration = Duration::from_secs(1);
/// A look at the catalog, a flush or a listing of filters is done in milliseconds; a minute means that it hangs.
const LIMIT: Duration = Duration::from_secs(60);
/// PostgreSQL gets so many times the bound of a stall for one page: sorting a million changes takes seconds.
const PATIENCE: u32 = 3;
/// Parts on their way from the source to the router: one being judged, one read ahead.
const PARTS: usize = 2;
/// Files that clients leave open: connections to PostgreSQL may have to be made anew while all others are taken.
const SPARE: usize = 48;
/// Sessions and tasks get this long to end.
const GRACE: Duration = Duration::from_secs(5);

/// A relay that runs, as seen from outside.
pub struct Running {
    /// What it counts.
    pub observe: Arc<Observe>,
}

/// Serves on `listener` until `shutdown` is done, then ends in order. `started` hears once everything is built.
///
/// The database may be away at first: clients connect, and the relay keeps trying.
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
    let pool = main.pool(POOL, LIMIT)?;
    let filters = main.pool(FILTERS, FILTER_LIMIT)?;
    let catalog = Arc::new(CatalogCache::new(pool.clone(), filters, judge.login().map(str::to_owned)));
    let judging = judge.clone();
    let refresh_jobs = Arc::new(Notify::new());
    let (parts_in, parts) = mpsc::channel(PARTS);
    let (commands_in, commands) = mpsc::unbounded_channel();

    let stall_monitor = Arc::new(StallMonitor::new(config.stall));
    let transactions = Arc::new(Transactions::new(pool.clone()));
    let source = Source {
        server: main.clone(),
        doorbell: bell.clone(),
        pool: pool.clone(),
        transactions: Arc::clone(&transactions),
        poll: config.poll,
        query_timeout: config.stall * PATIENCE,
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
    let rows = SnapshotRows::new(&main, &judge, config.judge_timeout, config.stall, config.stall * PATIENCE)?;
    let past = Arc::new(ReplayReader::new(
        main.clone(),
        pool,
        transactions,
        Arc::clone(&catalog),
        gate(filter_judge()),
        config.stall * PATIENCE,
    ));
    let (bookmarks, keeping) = BookmarkHandle::new(Bookmarks::new(&main, config.resume, config.stall)?);
    let router = |gate, way_back, stall_monitor, aside| {
        Router::new(
            Arc::clone(&catalog),
            gate,
            Arc::clone(&observe),
            Arc::clone(&past),
            way_back,
            stall_monitor,
            aside,
        )
    };
    let aside = |name| {
        let (way_in, commands) = mpsc::unbounded_channel();
        let (backlog, stall_monitor) =
            (Arc::new(Backlog::default()), Arc::new(StallMonitor::for_lane(&stall_monitor, name)));
        let router = router(gate(filter_judge()), way_in.clone(), Arc::clone(&stall_monitor), Vec::new());
        tasks.spawn(router.run(commands, FeedItems::Backlog(Arc::clone(&backlog)), feed_end.clone()));
        let end = end.clone();
        tasks.spawn(async move { stall_monitor.run(end).await });
        (way_in, backlog)
    };
    // Filters that PostgreSQL decides, and clients that ask for much, are served beside all others.
    let (asked_in, asked) = aside("filters");
    let (crowd_in, crowd) = aside("crowd");
    let main_router = router(gate(None), commands_in.clone(), Arc::clone(&stall_monitor), vec![asked, crowd]);
    tasks.spawn(main_router.run(commands, FeedItems::Source(parts), feed_end.clone()));
    let lanes = Lanes::new(commands_in, asked_in, crowd_in);
    if let Some(keeper) = config.keeper {
        tasks.spawn(keeper.run(Arc::clone(&observe), end.clone()));
    }
    let prepared = Arc::new(AtomicBool::new(false));
    let app = Arc::new(App {
        verifier: config.verifier,
        feed: Feed::new(Binder::new(Arc::clone(&catalog)), lanes, Arc::clone(&past), rows, bookmarks),
        observe: Arc::clone(&observe),
        stall_monitor: Arc::clone(&stall_monitor),
        allowed_origins: config.allowed_origins,
        budget: Arc::new(MemoryBudget::within(
            config.limits.total_outbox_bytes,
            config.limits.change_bytes,
            Arc::clone(&observe),
        )),
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
        tracing::warn!(error = %error, "what the kernel holds of each connection could not be bounded");
    }
    started(Running { observe: Arc::clone(&observe) });

    // What reads the database begins once that is known to be as it should; clients may come before.
    let reading = async {
        prepare(&main, &bell, &judging, config.install, &stall_monitor).await?;
        prepared.store(true, Ordering::Relaxed);
        tasks.spawn(keeping.run(feed_end.clone()));
        tasks.spawn(source.run(parts_in, end.clone()));
        tasks.spawn(retention::run(main.clone(), Arc::clone(&observe), end.clone()));
        tasks.spawn(refresh::run(main, refresh_jobs, end.clone()));
        pending::<Result<(), Error>>().await
    };
    let served = tokio::select! {
        () = shutdown => Ok(()),
        () = accept(&app, &listener) => Ok(()),
        failed = reading => failed,
    };
    tracing::info!(session.count = observe.session_count(), "ending");
    observe.ending();
    drop(listener);
    end.cancel();
    app.sessions.close();
    if timeout(GRACE, app.sessions.wait()).await.is_err() {
        tracing::warn!(session.count = app.sessions.len(), "sessions did not end in time");
    }
    feed_end.cancel();
    tasks.close();
    if timeout(GRACE, tasks.wait()).await.is_err() {
        tracing::warn!(task.count = tasks.len(), "tasks did not end in time");
    }
    served
}

/// Installs if asked to, and refuses a pooler in between, a database side that is missing or too old, and a judge that is
/// not let in, or a doorbell: nobody would be told anything. A database that is away is waited for.
async fn prepare(
    server: &Server,
    bell: &Server,
    judge: &Server,
    wanted: bool,
    stall_monitor: &StallMonitor,
) -> Result<(), Error> {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
    loop {
        let outcome = async {
            server.check_sessions().await?;
            let mut client = server.connect().await?;
            if wanted {
                // However long that takes, the database is there.
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
            if acts_as_nobody(&judge.connect().await?).await? {
                tracing::warn!(
                    "this login cannot act as anon, authenticated or service_role, so no subscriber of these roles sees \
                     anything: grant them to it, or give --judge-url"
                );
            }
            Ok::<(), Error>(())
        };
        match outcome.await {
            Ok(()) => {
                tracing::info!("the database is reached");
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

/// Whether the login that judges is a member of none of the usual roles, where there are such.
async fn acts_as_nobody(judge: &Client) -> Result<bool, Error> {
    let members = "select coalesce(not bool_or(pg_has_role(oid, 'member')), false) from pg_roles \
         where rolname in ('anon', 'authenticated', 'service_role')";
    Ok(judge.query_one(members, &[]).await?.get(0))
}

/// How many connections there may be, by how many files this process may have open, where the system tells it.
fn most_connections() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let files =
        limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next());
    files
        .and_then(|files| files.parse::<usize>().ok())
        .map_or(usize::MAX, |files| files.saturating_sub(SPARE))
}

async fn accept(app: &Arc<App>, listener: &TcpListener) {
    let most = most_connections();
    loop {
        if app.sessions.len() >= most {
            tracing::warn!(most, "a connection could not be accepted: too few files may be open (ulimit -n)");
            sleep(Duration::from_millis(100)).await;
            continue;
        }
        match listener.accept().await {
            Ok((stream, address)) => {
                // Frames are small and wanted at once.
                let _ = stream.set_nodelay(true);
                app.sessions.spawn(routes::serve(Arc::clone(app), stream, address.ip()));
            }
            Err(error) => {
                // Usually no file descriptors are left: those who are connected go on, others wait.
                tracing::warn!(error = %error, "a connection could not be accepted");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}
