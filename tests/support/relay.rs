//! A relay in this process, on a free port.

use std::net::SocketAddr;
use std::sync::Arc;

use relay::settings::Settings;
use relay::transport::app::App;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::database::{JUDGE, READER, with_login};
use super::{SECRET, eventually};

/// It ends when it is dropped, or better: stopped.
pub struct Relay {
    /// The admin port, if it has one.
    pub admin_address: Option<SocketAddr>,
    /// Where it listens.
    pub address: SocketAddr,
    /// Its state.
    app: Arc<App>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), relay::postgres::connect::pool::Error>>,
}

impl Relay {
    /// Serves this database with the settings of tests; ready when it returns.
    pub async fn start(database_url: &str) -> Self {
        Self::with(database_url, |_| {}).await
    }

    /// The same with settings changed.
    pub async fn with(database_url: &str, change: impl FnOnce(&mut Settings)) -> Self {
        let relay = Self::unready(database_url, change).await;
        eventually("the relay is ready", || async {
            assert!(!relay.task.is_finished(), "the relay ended");
            relay.is_ready().then_some(())
        })
        .await;
        relay
    }

    /// The value of this metric.
    pub fn figure(&self, name: &str) -> u64 {
        let text = self.metrics();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in\n{text}")).parse().unwrap()
    }

    /// The same without waiting for the database.
    pub async fn unready(database_url: &str, change: impl FnOnce(&mut Settings)) -> Self {
        // With the rights that the README asks for, and no others.
        let login = |login: &str| Some(with_login(database_url, login));
        let mut settings = Settings {
            database_url: login(READER),
            judge_url: login(JUDGE),
            jwt_secret: Some(SECRET.to_owned()),
            listen: Some("127.0.0.1:0".to_owned()),
            // So that whatever arrives has been rung for.
            poll_ms: Some(3_600_000),
            // Test clients send no heartbeats, and a busy machine may keep them for long.
            silence_ms: Some(600_000),
            // Nor does a client read while its test waits for something else.
            write_timeout_ms: Some(600_000),
            // No test has other relays to go to, unless it is about them.
            drain_ms: Some(0),
            ..Settings::default()
        };
        change(&mut settings);
        if settings.install {
            settings.database_url = Some(database_url.to_owned());
        }
        let config = settings.resolve().unwrap();
        let clients = TcpListener::bind(config.listen).await.unwrap();
        let address = clients.local_addr().unwrap();
        let admin = match config.admin_listen {
            Some(address) => Some(TcpListener::bind(address).await.unwrap()),
            None => None,
        };
        let admin_address = admin.as_ref().map(|admin| admin.local_addr().unwrap());
        let listeners = relay::server::Listeners { clients, admin };
        let (stop, stopped) = oneshot::channel();
        let (built, building) = oneshot::channel();
        let shutdown = async { _ = stopped.await };
        let started = |running: relay::server::Running| _ = built.send(running.app);
        let task = tokio::spawn(Box::pin(relay::server::serve(config, listeners, shutdown, started)));
        let Ok(app) = building.await else {
            panic!("the relay did not start: {:?}", task.await);
        };
        Self { address, admin_address, app, stop: Some(stop), task }
    }

    /// The base URL, as supabase-js wants it.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Whether a load balancer should send clients to it.
    pub fn is_ready(&self) -> bool {
        self.app.unready().is_none()
    }

    /// Its state.
    pub fn app(&self) -> &Arc<App> {
        &self.app
    }

    /// The number of connected clients.
    pub fn session_count(&self) -> usize {
        self.app.connection_limits.client_count()
    }

    /// The text of `/metrics`.
    pub fn metrics(&self) -> String {
        self.app.metrics()
    }

    /// The number of notifications so far.
    pub fn ring_count(&self) -> u64 {
        self.figure("relay_doorbell_rings_total")
    }

    /// Ends it in order.
    pub async fn stop(mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        tokio::time::timeout(super::PATIENCE, &mut self.task).await.unwrap().unwrap().unwrap();
    }
}
