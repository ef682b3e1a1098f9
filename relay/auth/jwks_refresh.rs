//! The current JWK set, and the task that refreshes it: periodically, and when a token names an unknown key.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::auth::jwks::{BadJwks, KeySet};
use crate::auth::jwks_fetch::{Endpoint, FetchError};
use crate::observe::Observe;

/// Maximum size of a JWK set in bytes. Real ones have a few KiB.
pub const MAX_BYTES: usize = 1 << 20;
/// How long a token waits for a refresh: slightly longer than one fetch may take.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(6);
/// Initial and maximum delay after a failed refresh. The delay doubles with each failure.
const RETRY_DELAY: Duration = Duration::from_secs(1);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(30);
/// Maximum number of unusable keys that are logged.
const MAX_LOGGED_KEYS: usize = 10;

/// The current JWK set. Readers never wait for a refresh.
pub struct PublishedKeys {
    current: watch::Sender<Arc<KeySet>>,
    requests: Mutex<RefreshRequests>,
    refresh_requested: Notify,
    /// The number of the last refresh request that was attempted.
    served: watch::Sender<u64>,
    /// Minimum interval between refreshes caused by unknown keys; `None` if the set is fixed.
    cooldown: Option<Duration>,
    /// Whether the keys are loaded only after the start.
    loaded_later: bool,
}

/// Refresh requests caused by unknown keys.
#[derive(Default)]
struct RefreshRequests {
    count: u64,
    last: Option<Instant>,
}

impl PublishedKeys {
    /// A set that never changes.
    pub fn fixed(set: KeySet) -> Self {
        Self::new(Some(set), None)
    }

    fn new(set: Option<KeySet>, cooldown: Option<Duration>) -> Self {
        Self {
            loaded_later: set.is_none(),
            current: watch::Sender::new(Arc::new(set.unwrap_or_default())),
            requests: Mutex::default(),
            refresh_requested: Notify::new(),
            served: watch::Sender::new(0),
            cooldown,
        }
    }

    /// Returns the current set.
    pub fn current(&self) -> Arc<KeySet> {
        Arc::clone(&self.current.borrow())
    }

    /// Returns a receiver of the current set and its changes.
    pub fn follow(&self) -> watch::Receiver<Arc<KeySet>> {
        self.current.subscribe()
    }

    /// Whether there are no keys and none will be loaded later.
    pub fn is_empty(&self) -> bool {
        !self.loaded_later && self.current().is_empty()
    }

    /// Whether the set is refreshed.
    pub fn is_refreshed(&self) -> bool {
        self.cooldown.is_some()
    }

    /// Requests a refresh. The future completes when it was attempted. `None` if the last request was less than the cooldown
    /// ago. Requests during a refresh share it.
    pub fn refresh(&self) -> Option<impl Future<Output = ()> + Send + use<>> {
        let cooldown = self.cooldown?;
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let mut served = self.served.subscribe();
        if requests.count == *served.borrow() {
            if requests.last.is_some_and(|last| last.elapsed() < cooldown) {
                return None;
            }
            requests.count += 1;
            requests.last = Some(Instant::now());
            self.refresh_requested.notify_one();
        }
        let count = requests.count;
        Some(async move { _ = timeout(REFRESH_TIMEOUT, served.wait_for(|served| *served >= count)).await })
    }

    fn requested(&self) -> u64 {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).count
    }
}

/// When keys are refreshed, and how long they stay valid without confirmation.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    /// Interval between refreshes.
    pub refresh: Duration,
    /// Minimum interval between refreshes caused by unknown keys.
    pub cooldown: Duration,
    /// How long keys of an endpoint stay valid while it cannot be read. Keys of a file stay valid until the file changes.
    pub keep: Duration,
}

/// Why keys could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file cannot be read.
    #[error("{0}")]
    File(#[from] io::Error),
    /// The endpoint cannot be fetched.
    #[error(transparent)]
    Endpoint(#[from] FetchError),
    /// The text is not a JWK set.
    #[error(transparent)]
    Bad(#[from] BadJwks),
}

/// The source of the keys.
enum KeySource {
    File(PathBuf),
    Endpoint(Endpoint),
}

/// Refreshes the keys of one source.
pub struct JwksRefresher {
    keys: Arc<PublishedKeys>,
    source: KeySource,
    schedule: Schedule,
    /// The text of the current set.
    text: Option<String>,
    /// When the source last confirmed it.
    confirmed: Instant,
    /// Whether the last refresh failed.
    is_failing: bool,
}

impl JwksRefresher {
    /// Reads the keys of a file, which must exist now. Returns no refresher if it can be read only once, such as a pipe.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn of_file(path: &Path, schedule: Schedule) -> Result<(Arc<PublishedKeys>, Option<Self>), ReadError> {
        let text = read_file(path)?;
        let set = KeySet::parse(&text)?;
        if !path.metadata()?.is_file() {
            return Ok((Arc::new(PublishedKeys::fixed(set)), None));
        }
        let refresher = Self::new(KeySource::File(path.to_owned()), schedule, Some(set), Some(text));
        Ok((Arc::clone(&refresher.keys), Some(refresher)))
    }

    /// Creates the refresher of an endpoint. There are no keys until the first refresh.
    pub fn of_endpoint(endpoint: Endpoint, schedule: Schedule) -> (Arc<PublishedKeys>, Self) {
        let refresher = Self::new(KeySource::Endpoint(endpoint), schedule, None, None);
        (Arc::clone(&refresher.keys), refresher)
    }

    fn new(source: KeySource, schedule: Schedule, set: Option<KeySet>, text: Option<String>) -> Self {
        let keys = Arc::new(PublishedKeys::new(set, Some(schedule.cooldown)));
        Self { keys, source, schedule, text, confirmed: Instant::now(), is_failing: false }
    }

    /// Refreshes the keys until `end` is cancelled.
    pub async fn run(mut self, observe: Arc<Observe>, end: CancellationToken) {
        let mut retry = RETRY_DELAY;
        loop {
            let requested = self.keys.requested();
            let read = tokio::select! {
                read = self.read() => read,
                () = end.cancelled() => return,
            };
            let pause = match read.and_then(|text| self.replace(text)) {
                Ok(()) => {
                    self.succeeded(&observe);
                    retry = RETRY_DELAY;
                    self.schedule.refresh
                }
                Err(error) => {
                    self.failed(&error, &observe);
                    let pause = retry.min(self.schedule.refresh);
                    retry = (retry * 2).min(MAX_RETRY_DELAY);
                    pause
                }
            };
            self.keys.served.send_replace(requested);
            tokio::select! {
                () = sleep(pause) => {}
                () = self.keys.refresh_requested.notified() => {}
                () = end.cancelled() => return,
            }
        }
    }

    async fn read(&self) -> Result<String, ReadError> {
        match &self.source {
            KeySource::Endpoint(endpoint) => Ok(endpoint.fetch(MAX_BYTES).await?),
            KeySource::File(path) => {
                let path = path.clone();
                let reading = spawn_blocking(move || read_file(&path));
                Ok(reading.await.map_err(io::Error::other)??)
            }
        }
    }

    /// Replaces the current set if the text changed.
    fn replace(&mut self, text: String) -> Result<(), ReadError> {
        if self.text.as_ref() == Some(&text) {
            return Ok(());
        }
        let set = KeySet::parse(&text)?;
        tracing::info!(from = %self.source, key.count = set.len(), "JWK set loaded");
        for skipped in set.skipped().iter().take(MAX_LOGGED_KEYS) {
            tracing::warn!("key of the JWK set not used: {skipped:.200}");
        }
        self.keys.current.send_replace(Arc::new(set));
        self.text = Some(text);
        Ok(())
    }

    fn succeeded(&mut self, observe: &Observe) {
        self.confirmed = Instant::now();
        observe.keys_read(self.keys.current().len());
        if std::mem::take(&mut self.is_failing) {
            tracing::info!(from = %self.source, "JWK set loaded again");
        }
    }

    /// Logs the first failure and the expiry of the keys, not each attempt.
    fn failed(&mut self, error: &ReadError, observe: &Observe) {
        let is_first = !std::mem::replace(&mut self.is_failing, true);
        if is_first && self.keys.current().is_empty() {
            tracing::warn!(from = %self.source, %error, "JWK set not loaded, tokens of its keys are refused");
        } else if is_first {
            tracing::warn!(from = %self.source, %error, "JWK set not loaded, keeping the current keys");
        }
        let is_endpoint = matches!(self.source, KeySource::Endpoint(_));
        if is_endpoint && self.text.is_some() && self.confirmed.elapsed() >= self.schedule.keep {
            tracing::warn!(from = %self.source, %error, "JWK set not loaded for too long, its keys are no longer accepted");
            self.text = None;
            self.keys.current.send_replace(Arc::default());
        }
        observe.keys_not_read(self.keys.current().len());
    }
}

impl fmt::Display for KeySource {
    /// Shows only the host of a URL: the rest may contain secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Endpoint(endpoint) => f.write_str(endpoint.host()),
        }
    }
}

fn read_file(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_BYTES as u64 + 1).read_to_string(&mut text)?;
    if text.len() > MAX_BYTES {
        return Err(io::Error::other(format!("it is longer than {MAX_BYTES} bytes")));
    }
    Ok(text)
}
