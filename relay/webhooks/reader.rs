//! The changes of one webhook from its cursor on, as any subscriber with a cursor gets them: what was missed, then live ones.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use crate::feed::catch_up::{CatchUp, NO_ROOM, Progress};
use crate::feed::deliver::frame::{Content, SharedPayload};
use crate::feed::deliver::memory_budget::MemoryBudget;
use crate::feed::deliver::outbox::Outbox;
use crate::feed::deliver::queue::Taken;
use crate::feed::handle::Feed;
use crate::feed::replay::reader::ReplayError;
use crate::feed::subscribe::BindError;
use crate::model::codec::protocol::{Codec, Envelope, Notice};
use crate::model::identity::claims::{Claims, LATEST_EXPIRY};
use crate::model::log::cursor::Cursor;
use crate::model::policy::visibility::Identity;
use crate::model::session::channel::ChannelId;
use crate::model::subscription::binding::Subscription;
use crate::model::subscription::request::Request;
use crate::postgres::webhooks::Hook;

/// Bytes queued for a webhook: as much as a page of the changelog that is replayed, beside the largest change.
const OUTBOX_BYTES: usize = 4 << 20;
/// Interval between positions of a webhook without changes. They keep it within the retention.
const POSITION_INTERVAL: Duration = Duration::from_secs(10);
/// Time limit for querying a position.
const POSITION_TIMEOUT: Duration = Duration::from_secs(1);
/// Pause before a subscription that was refused is tried again.
const PAUSE: Duration = Duration::from_secs(2);

/// What a webhook reads.
pub enum Read {
    /// A change: its object, and the position after it.
    Change(SharedPayload, Cursor),
    /// Changes may be missing, and why; and the position to continue from.
    Gap(String, Cursor),
    /// There is nothing up to this position, which may be that of now.
    Reached(Cursor, IsNow),
    /// Why nothing comes; `None` if it does.
    Trouble(Option<String>),
}

/// Whether a position was that of the feed when it was read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct IsNow(pub bool);

/// The reader of one webhook.
pub struct ChangeReader {
    feed: Feed,
    budget: Arc<MemoryBudget>,
    hook: Arc<Hook>,
    channel: ChannelId,
    /// Everything before it was passed on.
    cursor: Cursor,
    reads: mpsc::Sender<Read>,
}

/// Why a subscription ended.
enum Ended {
    /// It continues at once with another one: its queue was full, or a rule has changed.
    Again,
    /// Nobody reads any more.
    Closed,
    /// Changes are missing.
    Gap(String),
    /// It cannot continue now.
    Trouble(String),
}

impl ChangeReader {
    /// Creates a reader at this position, which passes on what it reads to `reads`.
    pub fn new(
        (feed, budget): (Feed, Arc<MemoryBudget>),
        hook: Arc<Hook>,
        channel: ChannelId,
        cursor: Cursor,
        reads: mpsc::Sender<Read>,
    ) -> Self {
        Self { feed, budget, hook, channel, cursor, reads }
    }

    /// Reads until nobody takes it any more.
    pub async fn run(mut self) {
        loop {
            let ended = match Box::pin(self.follow()).await {
                Ok(never) => match never {},
                Err(ended) => ended,
            };
            let passed = match ended {
                Ended::Again => true,
                Ended::Closed => false,
                Ended::Trouble(why) => self.pause(why).await,
                Ended::Gap(why) => match self.begin_anew(why).await {
                    Ok(passed) => passed,
                    Err(why) => self.pause(why).await,
                },
            };
            if !passed {
                return;
            }
        }
    }

    async fn pause(&self, why: String) -> bool {
        let passed = self.pass(Read::Trouble(Some(why))).await.is_ok();
        sleep(PAUSE).await;
        passed
    }

    async fn pass(&self, read: Read) -> Result<(), Ended> {
        self.reads.send(read).await.map_err(|_| Ended::Closed)
    }

    /// Tells a gap, and continues from the present position.
    ///
    /// # Errors
    /// Why there is none.
    async fn begin_anew(&mut self, why: String) -> Result<bool, String> {
        let subscription = self.bind().await.map_err(|ended| match ended {
            Ended::Trouble(why) => why,
            _ => String::from(UNAVAILABLE),
        })?;
        let Some(position) = self.feed.beginning(&subscription).await else {
            return Err(String::from(UNAVAILABLE));
        };
        self.cursor = position.clone();
        Ok(self.pass(Read::Gap(why, position)).await.is_ok())
    }

    /// Binds the subscription of the webhook to the rights of its role.
    async fn bind(&self) -> Result<Subscription, Ended> {
        let trouble = |why: &str| Ended::Trouble(why.to_owned());
        let problem = self.hook.problem.as_deref();
        let (Some((schema, table)), None) = (&self.hook.relation, problem) else {
            return Err(trouble(problem.unwrap_or_default()));
        };
        let requests = requests(&self.hook, schema, table).map_err(|why| trouble(&why))?;
        let role = &self.hook.role;
        let claims = json!({ "role": role, "exp": LATEST_EXPIRY }).to_string();
        let claims = Claims::from_verified_payload(&claims).map_err(|why| trouble(&why.to_string()))?;
        let bound = match self.feed.bind(self.channel, Identity::new(claims), &requests).await {
            Ok(subscription) => subscription.whole(),
            Err(BindError::Refused(refusal)) => Err(refusal),
            Err(BindError::Unavailable) => return Err(trouble(UNAVAILABLE)),
        };
        bound.map_err(|refusal| Ended::Trouble(refusal.plain((schema, table), Some(role))))
    }

    /// Passes on what was missed and what comes.
    async fn follow(&mut self) -> Result<std::convert::Infallible, Ended> {
        let subscription = self.bind().await?;
        let hidden = subscription.hidden().next().map(str::to_owned);
        self.pass(Read::Trouble(hidden)).await?;
        let outbox = Arc::new(Outbox::new(OUTBOX_BYTES, Arc::clone(&self.budget)));
        let (feed, since) = (self.feed.clone(), self.cursor.clone());
        let codec = Codec::ChangeEvents;
        let mut catch_up = CatchUp::new(feed, self.channel, subscription, codec, since, Arc::clone(&outbox));
        loop {
            let progress = catch_up.go_on().await.map_err(|error| match error {
                // Unlike a client, it loses nothing by waiting.
                ReplayError::Gap(NO_ROOM) => Ended::Trouble(NO_ROOM.to_owned()),
                ReplayError::Gap(why) => Ended::Gap(why.to_owned()),
                ReplayError::Unavailable(error) => Ended::Trouble(error.to_string()),
                ReplayError::Ended => Ended::Again,
            })?;
            if let Some(taken) = outbox.take().now_or_never() {
                self.pass_on(&outbox, taken).await?;
            }
            if progress == Progress::Live {
                break;
            }
            self.reach(catch_up.since(), IsNow(false)).await?;
        }
        loop {
            match timeout(POSITION_INTERVAL, outbox.take()).await {
                Ok(taken) => self.pass_on(&outbox, taken).await?,
                Err(_) => self.pass_position(&catch_up, &outbox).await?,
            }
        }
    }

    /// Passes on the position of a webhook without changes.
    async fn pass_position(&mut self, catch_up: &CatchUp, outbox: &Outbox) -> Result<(), Ended> {
        let position = timeout(POSITION_TIMEOUT, catch_up.position()).await.ok().flatten();
        // Changes before the position go first.
        if let Some(taken) = outbox.take().now_or_never() {
            return self.pass_on(outbox, taken).await;
        }
        match position {
            Some(position) => self.reach(position, IsNow(true)).await,
            None => Ok(()),
        }
    }

    async fn reach(&mut self, position: Cursor, is_now: IsNow) -> Result<(), Ended> {
        if !position.is_at_or_after(&self.cursor) {
            return Ok(());
        }
        self.cursor = position.clone();
        self.pass(Read::Reached(position, is_now)).await
    }

    /// Passes on the frames that were taken.
    async fn pass_on(&mut self, outbox: &Outbox, taken: Taken) -> Result<(), Ended> {
        if taken != Taken::Frames {
            return Err(Ended::Again);
        }
        loop {
            let Some(frame) = outbox.in_flight().frames.pop_front() else { return Ok(()) };
            match frame.content() {
                Content::Change(Envelope::Cursor(cursor), object) => {
                    self.cursor = cursor.parse().map_err(|_| Ended::Again)?;
                    self.pass(Read::Change(Arc::clone(object), self.cursor.clone())).await?;
                }
                Content::Notice(Notice::Gap { reason, cursor: Some(cursor) }) => {
                    self.cursor = cursor.parse().map_err(|_| Ended::Again)?;
                    self.pass(Read::Gap(reason.clone(), self.cursor.clone())).await?;
                }
                Content::Notice(Notice::Gap { reason, cursor: None }) => {
                    return Err(Ended::Gap(reason.clone()));
                }
                Content::Notice(Notice::PolicyError(why)) => return Err(Ended::Trouble(why.clone())),
                Content::Notice(Notice::Hidden(why)) => {
                    self.pass(Read::Trouble(Some(why.clone()))).await?;
                }
                _ => {}
            }
        }
    }
}

const UNAVAILABLE: &str = "PostgreSQL does not answer";

/// Returns the requests of a webhook, as a client would write them: one, or one for each operation.
///
/// # Errors
/// What is wrong with them.
fn requests(hook: &Hook, schema: &str, table: &str) -> Result<Vec<Request>, String> {
    let all = ["INSERT", "UPDATE", "DELETE"];
    let is_of_all = all.iter().all(|event| hook.events.iter().any(|wanted| wanted == event));
    let events: Vec<&str> =
        if is_of_all { vec!["*"] } else { hook.events.iter().map(String::as_str).collect() };
    let request = |event: &str| {
        let mut entry = Map::new();
        for (name, value) in [("event", event), ("schema", schema), ("table", table)] {
            entry.insert(name.to_owned(), Value::from(value));
        }
        if let Some(filter) = &hook.filter {
            entry.insert(String::from("filter"), Value::from(filter.as_str()));
        }
        if let Some(columns) = &hook.columns {
            entry.insert(String::from("select"), Value::from(columns.clone()));
        }
        Request::parse(&entry).map_err(|refusal| refusal.plain((schema, table), Some(&hook.role)))
    };
    events.into_iter().map(request).collect()
}
