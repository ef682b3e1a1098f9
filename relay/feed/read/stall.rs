//! The state of the feed: whether it reads, what it waits for and since when. Reports waits over a bound.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// What the feed may wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StallCause {
    /// The next page of the changelog, or a connection to read it by.
    Changelog,
    /// The evaluation of policies for the current changes.
    Evaluation,
}

/// Reports each stall with its cause, and `None` when the feed continues.
pub type Stalls = watch::Receiver<Option<StallCause>>;

/// Detects stalls of the feed or of one lane.
pub struct StallMonitor {
    bound: Duration,
    /// For a lane: the monitor of the whole feed, and the lane's name.
    feed: Option<(Arc<StallMonitor>, &'static str)>,
    // Held briefly, once or twice a page.
    waits: Mutex<Waits>,
    stalled: watch::Sender<Option<StallCause>>,
}

#[derive(Default)]
struct Waits {
    changelog: Option<Instant>,
    evaluation: Option<Instant>,
    /// Since when connecting has failed repeatedly before anything was read.
    interrupted: Option<Instant>,
    /// Why there is no connection, in a few words without secrets.
    why: Option<&'static str>,
    /// Whether the source has its connections and reads.
    is_reading: bool,
}

impl Waits {
    fn since(&mut self, cause: StallCause) -> &mut Option<Instant> {
        match cause {
            StallCause::Changelog => &mut self.changelog,
            StallCause::Evaluation => &mut self.evaluation,
        }
    }
}

impl StallMonitor {
    /// Creates the monitor of a feed that stalls after waiting for `bound`. It starts waiting for its first page.
    pub fn new(bound: Duration) -> Self {
        let waits = Waits { changelog: Some(Instant::now()), ..Waits::default() };
        Self { bound, feed: None, waits: Mutex::new(waits), stalled: watch::Sender::new(None) }
    }

    /// Creates the monitor of a lane: it waits for its own evaluations, and for the changelog when the feed does.
    pub fn for_lane(whole: &Arc<Self>, name: &'static str) -> Self {
        let (feed, waits) = (Some((Arc::clone(whole), name)), Mutex::default());
        Self { bound: whole.bound, feed, waits, stalled: watch::Sender::new(None) }
    }

    /// Returns the wait after which the feed stalls.
    pub fn bound(&self) -> Duration {
        self.bound
    }

    /// Records the begin of a wait, if it has not begun yet.
    pub fn begin_wait(&self, cause: StallCause) {
        self.change(|waits| {
            waits.since(cause).get_or_insert_with(Instant::now);
        });
    }

    /// Records the end of a wait.
    pub fn end_wait(&self, cause: StallCause) {
        self.change(|waits| {
            *waits.since(cause) = None;
            if cause == StallCause::Changelog && waits.interrupted.is_none() {
                waits.why = None;
            }
        });
    }

    /// Records that a page was read or a batch sent: the feed is connected.
    pub fn record_read(&self) {
        self.change(|waits| {
            waits.interrupted = None;
            if waits.changelog.is_none() {
                waits.why = None;
            }
        });
    }

    /// Records that the source has its connections and begins to read.
    pub fn begin_reading(&self) {
        self.change(|waits| waits.is_reading = true);
    }

    /// Records that the source has lost its connections, or stops.
    pub fn end_reading(&self) {
        self.change(|waits| waits.is_reading = false);
    }

    /// Records that there is no connection, and why.
    pub fn record_disconnect(&self, why: &'static str) {
        self.begin_wait(StallCause::Changelog);
        self.change(|waits| {
            waits.interrupted.get_or_insert_with(Instant::now);
            waits.why = Some(why);
        });
    }

    /// Returns why clients should not be sent here now; `None` while the changelog is read and nothing stalls.
    pub fn unready(&self) -> Option<&'static str> {
        let (why, is_reading) = {
            let waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
            (waits.why, waits.is_reading)
        };
        match (why, self.stalled()) {
            (Some(why), _) => Some(why),
            (None, Some(StallCause::Changelog)) => Some("the changelog could not be read for too long"),
            (None, Some(StallCause::Evaluation)) => Some("policies could not be evaluated for too long"),
            (None, None) if is_reading => None,
            (None, None) => Some("the changelog is not being read"),
        }
    }

    /// Returns the cause of the current stall.
    pub fn stalled(&self) -> Option<StallCause> {
        *self.stalled.borrow()
    }

    /// Subscribes to stalls.
    pub fn watch(&self) -> Stalls {
        self.stalled.subscribe()
    }

    /// Checks the waits until `end`.
    pub async fn run(&self, end: CancellationToken) {
        let tick = (self.bound / 10).clamp(Duration::from_millis(20), Duration::from_secs(1));
        while end.run_until_cancelled(tokio::time::sleep(tick)).await.is_some() {
            let is_long = |since: Option<Instant>| since.is_some_and(|since| since.elapsed() > self.bound);
            let mut changelog = None;
            let feed = self.feed.as_ref().map_or(self, |(feed, _)| feed);
            feed.change(|waits| changelog = waits.interrupted.into_iter().chain(waits.changelog).min());
            let mut now = None;
            self.change(|waits| {
                now = match () {
                    () if is_long(changelog) => Some(StallCause::Changelog),
                    () if is_long(waits.evaluation) => Some(StallCause::Evaluation),
                    () => None,
                };
            });
            let mut before = None;
            self.stalled.send_if_modified(|stalled| {
                before = std::mem::replace(stalled, now);
                before != now
            });
            self.log(before, now);
        }
    }

    /// Logs a stall. A lane logs only its own evaluations; the feed logs common causes.
    fn log(&self, before: Option<StallCause>, now: Option<StallCause>) {
        let lane = self.feed.as_ref().map(|(_, name)| *name);
        let own = |cause: &StallCause| lane.is_none() || *cause == StallCause::Evaluation;
        match (before.filter(own), now.filter(own)) {
            (before, now) if before == now => {}
            (_, Some(cause)) => tracing::warn!(lane, cause = ?cause, "feed stalled"),
            (_, None) => tracing::info!(lane, "feed continues"),
        }
    }

    fn change(&self, change: impl FnOnce(&mut Waits)) {
        change(&mut self.waits.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
