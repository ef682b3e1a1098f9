//! Serves until shutdown, and stops in order.

use std::future::{Future, pending};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};
use tokio_postgres::Client;

use crate::assembly::{Assembly, Servers, Tasks};
use crate::config::Config;
use crate::feed::read::stall::{StallCause, StallMonitor};
use crate::postgres::connect::backoff::Backoff;
use crate::postgres::connect::pool::Error;
use crate::postgres::install;
use crate::transport::admin;
use crate::transport::app::App;
use crate::transport::routes;
use crate::transport::socket_buffers;

/// File descriptors reserved for connections to PostgreSQL, which may have to be reopened when clients use all others.
const RESERVED_FILES: usize = 48;
/// How long sessions, and then tasks, may take to stop.
const GRACE: Duration = Duration::from_secs(5);

/// A running relay.
pub struct Running {
    /// What its connections share: its metrics, and whether it is ready.
    pub app: Arc<App>,
}

/// Where connections come in.
pub struct Listeners {
    /// Clients.
    pub clients: TcpListener,
    /// The admin port.
    pub admin: Option<TcpListener>,
}

/// Serves on `listeners` until `shutdown` resolves, then stops in order. Calls `started` once everything is built.
///
/// The database may be unreachable at first: clients connect meanwhile, and the relay retries.
///
/// # Errors
/// When a URL cannot be read, the installation fails, or the database side is missing or too old.
pub async fn serve(
    config: Config,
    listeners: Listeners,
    shutdown: impl Future<Output = ()>,
    started: impl FnOnce(Running),
) -> Result<(), Error> {
    let is_install = config.install;
    let Listeners { clients: listener, admin } = listeners;
    let assembly = Assembly::of(config)?;
    let (app, tasks) = (Arc::clone(&assembly.app), assembly.tasks());
    if let Err(error) = socket_buffers::bound(&listener, app.limits.send_buffer_bytes, app.limits.write * 2) {
        tracing::warn!(error = %error, "kernel send buffers not bounded");
    }
    started(Running { app: Arc::clone(&app) });

    // Tasks that read the database start after its checks; clients may connect before.
    let reading = async {
        prepare(assembly.servers(), is_install, &app.stall_monitor).await?;
        app.prepared.store(true, Ordering::Relaxed);
        assembly.begin_reading();
        pending::<Result<(), Error>>().await
    };
    let served = tokio::select! {
        () = shutdown => Ok(()),
        () = accept(&app, &listener) => Ok(()),
        () = accept_admin(&app, admin.as_ref()) => Ok(()),
        failed = reading => failed,
    };
    tracing::info!(session.count = app.connection_limits.client_count(), "shutting down");
    drop((listener, admin));
    stop(&app, &tasks).await;
    served
}

/// Closes the sessions one after the other, which are served until then, and stops the other tasks. Both may take [`GRACE`] longer than
/// they should.
async fn stop(app: &App, tasks: &Tasks) {
    app.end.cancel();
    app.sessions.close();
    if timeout(app.drain + GRACE, app.sessions.wait()).await.is_err() {
        tracing::warn!(session.count = app.sessions.len(), "sessions did not stop in time");
    }
    tasks.end.cancel();
    tasks.feed_end.cancel();
    tasks.tracker.close();
    if timeout(GRACE, tasks.tracker.wait()).await.is_err() {
        tracing::warn!(task.count = tasks.tracker.len(), "tasks did not stop in time");
    }
}

/// Installs the database side if `is_install` is set, and checks the connections. Waits for a database that is unreachable.
///
/// # Errors
/// When a pooler is in transaction mode, the database side is missing or too old, or a login is refused: no change could be
/// delivered.
async fn prepare(servers: &Servers, is_install: bool, stall_monitor: &StallMonitor) -> Result<(), Error> {
    let Servers { main, doorbell, judge, nodes: _ } = servers;
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
    loop {
        let outcome = async {
            main.check_sessions().await?;
            let mut client = main.connect().await?;
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
            doorbell.connect().await?;
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

/// Serves the admin port, if there is one. Never returns.
async fn accept_admin(app: &Arc<App>, listener: Option<&TcpListener>) {
    match listener {
        Some(listener) => admin::accept(app, listener).await,
        None => pending().await,
    }
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
