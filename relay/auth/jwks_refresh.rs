//! The published keys of now, and their keeper, which reads them anew: by the clock, and when a token names a key
//! that is not known.

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

/// A set of keys is some KiB long; what is longer is something else.
pub const MOST_BYTES: usize = 1 << 20;
/// Whoever waits for keys waits no longer than a try may take, and a little for the way.
const PATIENCE: Duration = Duration::from_secs(6);
/// The pause after a failure, which doubles up to the second.
const RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// So many keys that cannot be used are told one by one.
const TOLD: usize = 10;

/// The keys in force. Reading them waits for nobody.
pub struct PublishedKeys {
    current: watch::Sender<Arc<KeySet>>,
    demand: Mutex<Demand>,
    asked: Notify,
    /// The latest demand that a finished try has served.
    served: watch::Sender<u64>,
    /// None when nobody reads them anew.
    cooldown: Option<Duration>,
    /// At the start it is not known yet which they are.
    come_later: bool,
}

/// What was asked for because of unknown keys.
#[derive(Default)]
struct Demand {
    count: u64,
    last: Option<Instant>,
}

impl PublishedKeys {
    /// Keys that stay as they are.
    pub fn fixed(set: KeySet) -> Self {
        Self::new(Some(set), None)
    }

    fn new(set: Option<KeySet>, cooldown: Option<Duration>) -> Self {
        Self {
            come_later: set.is_none(),
            current: watch::Sender::new(Arc::new(set.unwrap_or_default())),
            demand: Mutex::default(),
            asked: Notify::new(),
            served: watch::Sender::new(0),
            cooldown,
        }
    }

    /// The keys of now.
    pub fn current(&self) -> Arc<KeySet> {
        Arc::clone(&self.current.borrow())
    }

    /// The keys of now and of whenever they are others.
    pub fn follow(&self) -> watch::Receiver<Arc<KeySet>> {
        self.current.subscribe()
    }

    /// Whether there is none and none is to come.
    pub fn are_none(&self) -> bool {
        !self.come_later && self.current().is_empty()
    }

    /// Whether there may be other keys one day.
    pub fn are_kept(&self) -> bool {
        self.cooldown.is_some()
    }

    /// Has the keys read anew, and waits until that was tried; none when it was tried too short a time ago for the
    /// same reason. Everybody who asks before a try has ended waits for that one.
    pub fn refresh(&self) -> Option<impl Future<Output = ()> + Send + use<>> {
        let cooldown = self.cooldown?;
        let mut demand = self.demand.lock().unwrap_or_else(PoisonError::into_inner);
        let mut served = self.served.subscribe();
        if demand.count == *served.borrow() {
            if demand.last.is_some_and(|last| last.elapsed() < cooldown) {
                return None;
            }
            demand.count += 1;
            demand.last = Some(Instant::now());
            self.asked.notify_one();
        }
        let count = demand.count;
        Some(async move { _ = timeout(PATIENCE, served.wait_for(|served| *served >= count)).await })
    }

    fn demanded(&self) -> u64 {
        self.demand.lock().unwrap_or_else(PoisonError::into_inner).count
    }
}

/// When keys are read, and how long they are believed.
#[derive(Clone, Copy)]
pub struct Schedule {
    /// From one reading to the next.
    pub refresh: Duration,
    /// Between readings that unknown keys cause.
    pub cooldown: Duration,
    /// How long keys are believed that an endpoint does not confirm. Those of a file are believed until it says otherwise.
    pub keep: Duration,
}

/// Why keys could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file cannot be read.
    #[error("{0}")]
    File(#[from] io::Error),
    /// The endpoint does not give it.
    #[error(transparent)]
    Endpoint(#[from] FetchError),
    /// It is no JWK set.
    #[error(transparent)]
    Bad(#[from] BadJwks),
}

/// Where keys are read.
enum KeySource {
    File(PathBuf),
    Endpoint(Endpoint),
}

/// Reads the keys of one place again and again.
pub struct JwksRefresher {
    keys: Arc<PublishedKeys>,
    place: KeySource,
    schedule: Schedule,
    /// What is in force.
    text: Option<String>,
    /// When that was last confirmed.
    confirmed: Instant,
    /// The last try failed.
    fails: bool,
}

impl JwksRefresher {
    /// The keys of a file, which must be there now. None when it can be read only once: a pipe.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn of_file(path: &Path, schedule: Schedule) -> Result<(Arc<PublishedKeys>, Option<Self>), ReadError> {
        let text = read_file(path)?;
        let set = KeySet::parse(&text)?;
        if !path.metadata()?.is_file() {
            return Ok((Arc::new(PublishedKeys::fixed(set)), None));
        }
        let keeper = Self::new(KeySource::File(path.to_owned()), schedule, Some(set), Some(text));
        Ok((Arc::clone(&keeper.keys), Some(keeper)))
    }

    /// The keys of an endpoint. There are none before it was asked.
    pub fn of_endpoint(endpoint: Endpoint, schedule: Schedule) -> (Arc<PublishedKeys>, Self) {
        let keeper = Self::new(KeySource::Endpoint(endpoint), schedule, None, None);
        (Arc::clone(&keeper.keys), keeper)
    }

    fn new(place: KeySource, schedule: Schedule, set: Option<KeySet>, text: Option<String>) -> Self {
        let keys = Arc::new(PublishedKeys::new(set, Some(schedule.cooldown)));
        Self { keys, place, schedule, text, confirmed: Instant::now(), fails: false }
    }

    /// Keeps the keys until the end.
    pub async fn run(mut self, observe: Arc<Observe>, end: CancellationToken) {
        let mut retry = RETRY;
        loop {
            let demanded = self.keys.demanded();
            let read = tokio::select! {
                read = self.read() => read,
                () = end.cancelled() => return,
            };
            let pause = match read.and_then(|text| self.take(text)) {
                Ok(()) => {
                    self.succeeded(&observe);
                    retry = RETRY;
                    self.schedule.refresh
                }
                Err(error) => {
                    self.failed(&error, &observe);
                    let pause = retry.min(self.schedule.refresh);
                    retry = (retry * 2).min(LONGEST_RETRY);
                    pause
                }
            };
            self.keys.served.send_replace(demanded);
            tokio::select! {
                () = sleep(pause) => {}
                () = self.keys.asked.notified() => {}
                () = end.cancelled() => return,
            }
        }
    }

    async fn read(&self) -> Result<String, ReadError> {
        match &self.place {
            KeySource::Endpoint(endpoint) => Ok(endpoint.fetch(MOST_BYTES).await?),
            KeySource::File(path) => {
                let path = path.clone();
                let reading = spawn_blocking(move || read_file(&path));
                Ok(reading.await.map_err(io::Error::other)??)
            }
        }
    }

    /// Puts what was read in force, if it is something else than before.
    fn take(&mut self, text: String) -> Result<(), ReadError> {
        if self.text.as_ref() == Some(&text) {
            return Ok(());
        }
        let set = KeySet::parse(&text)?;
        tracing::info!(from = %self.place, key.count = set.len(), "the JWK set was read");
        for skipped in set.skipped().iter().take(TOLD) {
            tracing::warn!("a key of the JWK set is not used: {skipped:.200}");
        }
        self.keys.current.send_replace(Arc::new(set));
        self.text = Some(text);
        Ok(())
    }

    fn succeeded(&mut self, observe: &Observe) {
        self.confirmed = Instant::now();
        observe.keys_read(self.keys.current().len());
        if std::mem::take(&mut self.fails) {
            tracing::info!(from = %self.place, "the JWK set can be read again");
        }
    }

    /// Told when it begins and when its consequences change, not at each try.
    fn failed(&mut self, error: &ReadError, observe: &Observe) {
        let began = !std::mem::replace(&mut self.fails, true);
        if began && self.keys.current().is_empty() {
            tracing::warn!(from = %self.place, %error, "the JWK set cannot be read: until it can, tokens of its keys are refused");
        } else if began {
            tracing::warn!(from = %self.place, %error, "the JWK set cannot be read: the keys at hand stay in force");
        }
        let is_endpoint = matches!(self.place, KeySource::Endpoint(_));
        if is_endpoint && self.text.is_some() && self.confirmed.elapsed() >= self.schedule.keep {
            tracing::warn!(from = %self.place, %error, "the JWK set could not be read for too long: its keys are in force no longer");
            self.text = None;
            self.keys.current.send_replace(Arc::default());
        }
        observe.keys_not_read(self.keys.current().len());
    }
}

impl fmt::Display for KeySource {
    /// Of a URL only the host: the rest may hold what is not for the log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Endpoint(endpoint) => f.write_str(endpoint.host()),
        }
    }
}

fn read_file(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MOST_BYTES as u64 + 1).read_to_string(&mut text)?;
    if text.len() > MOST_BYTES {
        return Err(io::Error::other(format!("it is longer than {MOST_BYTES} bytes")));
    }
    Ok(text)
}
