//! The task of one webhook: takes what its reader reads, sends what is in turn, and writes what became of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::{sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::feed::deliver::memory_budget::MemoryBudget;
use crate::feed::handle::Feed;
use crate::model::log::cursor::Cursor;
use crate::model::session::channel::ChannelId;
use crate::observe::Observe;
use crate::postgres::connect::pool::Error;
use crate::postgres::webhooks::{Hook, HookPosition, WebhookConnection};
use crate::webhooks::delivery::Delivery;
use crate::webhooks::queue::{Place, Queue, Ready, Retries};
use crate::webhooks::reader::{ChangeReader, Read};
use crate::webhooks::request::{Answer, Receiver, Sender};

/// Requests of a webhook at a time.
const MAX_REQUESTS: usize = 8;
/// Requests among them that are tried again: what fails slowly leaves room for the rest.
const MAX_RETRIES: usize = 4;
/// Reads between the reader and the worker.
const READS: usize = 16;
/// Interval between two writes: what is delivered in between shares the next one.
const GATHER: Duration = Duration::from_millis(200);
/// Time limit for requests under way when the relay shuts down.
const LAST: Duration = Duration::from_secs(2);

/// What all webhooks of a relay share.
#[derive(Clone)]
pub struct Tools {
    /// Gives them their changes.
    pub feed: Feed,
    /// Counts what waits in memory.
    pub budget: Arc<MemoryBudget>,
    /// Sends.
    pub sender: Arc<Sender>,
    /// Counts what was sent.
    pub observe: Arc<Observe>,
    /// Has the lock.
    pub connection: Arc<WebhookConnection>,
}

/// The worker of one webhook.
pub struct Worker {
    tools: Tools,
    hook: Arc<Hook>,
    receiver: Arc<Receiver>,
    queue: Queue,
    requests: JoinSet<(Ready, Result<Option<Answer>, Error>)>,
    /// Requests that are tried again.
    retries: usize,
    /// Nothing is sent before.
    paused_until: Instant,
    /// A pause that the receiver asked for, to be written.
    pause: Option<Duration>,
    /// Why nothing comes.
    trouble: Option<String>,
    /// Why the last delivery failed.
    failure: Option<String>,
    /// The receiver wants nothing any more.
    is_gone: bool,
    /// When the next write is due.
    write_at: Option<Instant>,
    /// The numbers that the metrics have.
    counted: (usize, usize),
}

/// What a worker waits for.
enum Event {
    Read(Option<Read>),
    Answered(Ready, Result<Option<Answer>, Error>),
    Due,
    Renew,
    End,
}

impl Worker {
    /// Creates the worker of a webhook, with what waits for it in the database.
    ///
    /// # Errors
    /// As the connection.
    pub async fn open(tools: Tools, hook: Hook, paused: Duration) -> Result<Self, Error> {
        let held = tools.connection.held(&hook.name).await?;
        let now = Instant::now();
        let retries = Retries { attempts: hook.attempts, pause: hook.pause };
        Ok(Self {
            receiver: Arc::new(Receiver::new(&hook.url, &hook.secret)),
            hook: Arc::new(hook),
            queue: Queue::new(retries, held, now),
            requests: JoinSet::new(),
            retries: 0,
            paused_until: now + paused,
            pause: None,
            trouble: None,
            failure: None,
            is_gone: false,
            write_at: None,
            counted: (0, 0),
            tools,
        })
    }

    /// Delivers until `end`, or until the webhook is changed, dropped or disabled. `renewed` tells that an operator has changed what
    /// waits in the database.
    ///
    /// # Errors
    /// When the connection ends. The relay has lost its lock then.
    pub async fn run(
        mut self,
        (position, channel): (HookPosition, ChannelId),
        renewed: Arc<Notify>,
        end: CancellationToken,
    ) -> Result<(), Error> {
        let (sender, mut reads) = mpsc::channel(READS);
        // It ends with this task.
        let mut reading = JoinSet::new();
        match position.cursor.parse::<Cursor>() {
            Ok(cursor) => {
                let (feed, budget) = (self.tools.feed.clone(), Arc::clone(&self.tools.budget));
                let reader =
                    ChangeReader::new((feed, budget), Arc::clone(&self.hook), channel, cursor, sender);
                reading.spawn(reader.run());
            }
            Err(why) => self.be_in_trouble(Some(format!("its position cannot be read: {why}"))),
        }
        loop {
            self.send();
            self.count();
            if self.is_gone {
                return self.finish().await;
            }
            match self.next(&mut reads, &renewed, &end).await {
                Event::Read(Some(read)) => self.take(read),
                Event::Read(None) => {}
                Event::Answered(ready, answer) => self.answered(ready, answer?),
                Event::Renew => {
                    if !self.write().await? {
                        return Ok(());
                    }
                    self.queue.renew(self.tools.connection.held(&self.hook.name).await?, Instant::now());
                }
                Event::Due => {}
                Event::End => return self.finish().await,
            }
            if self.write_at.is_some_and(|due| due <= Instant::now()) && !self.write().await? {
                return Ok(());
            }
        }
    }

    /// Waits for what comes next.
    async fn next(
        &mut self,
        reads: &mut mpsc::Receiver<Read>,
        renewed: &Notify,
        end: &CancellationToken,
    ) -> Event {
        if self.queue.is_changed() && self.write_at.is_none() {
            self.write_at = Some(Instant::now() + GATHER);
        }
        let is_full = self.requests.len() >= MAX_REQUESTS;
        let due = if is_full { None } else { self.queue.next_due() };
        // What is due and was not sent waits for an answer.
        let now = Instant::now();
        let due = due.map(|due| due.max(self.paused_until)).filter(|due| *due > now);
        let wake = due.into_iter().chain(self.write_at).min();
        let has_room = self.queue.has_room();
        tokio::select! {
            () = end.cancelled() => Event::End,
            () = renewed.notified() => Event::Renew,
            Some(answered) = self.requests.join_next() => match answered {
                Ok((ready, answer)) => Event::Answered(ready, answer),
                Err(_) => Event::End,
            },
            () = sleep_until(wake.unwrap_or(now).into()), if wake.is_some() => Event::Due,
            read = reads.recv(), if has_room && !reads.is_closed() => Event::Read(read),
        }
    }

    /// Takes what was read.
    fn take(&mut self, read: Read) {
        let now = Instant::now();
        match read {
            Read::Change(object, cursor) => {
                let key = self.hook.in_order.then_some(&*self.hook.key);
                match Delivery::of_change(object.as_str(), cursor.epoch(), key) {
                    Some(delivery) => self.queue.add(delivery, cursor, now),
                    None => self.queue.reach(cursor, None, now),
                }
            }
            Read::Gap(why, cursor) => {
                let position = cursor.to_string();
                self.tools.observe.webhook_gap(&self.hook.name, &why);
                self.queue.add(Delivery::of_gap(&why, self.hook.relation.as_ref(), &position), cursor, now);
            }
            Read::Reached(cursor, is_now) => {
                self.queue.reach(cursor, is_now.0.then(|| String::from("now")), now);
            }
            Read::Trouble(why) => self.be_in_trouble(why),
        }
    }

    fn be_in_trouble(&mut self, why: Option<String>) {
        if self.trouble != why {
            if let Some(why) = &why {
                tracing::warn!(webhook.name = self.hook.name, why, "webhook has no changes");
            }
            self.trouble = why;
            self.write_at.get_or_insert_with(Instant::now);
        }
    }

    /// Sends what is in turn, as far as requests may be under way.
    fn send(&mut self) {
        let now = Instant::now();
        while !self.is_gone && now >= self.paused_until && self.requests.len() < MAX_REQUESTS {
            let Some(ready) = self.queue.next(now, self.retries < MAX_RETRIES) else { return };
            self.retries += usize::from(ready.is_retry);
            let (tools, receiver, hook) =
                (self.tools.clone(), Arc::clone(&self.receiver), Arc::clone(&self.hook));
            self.requests.spawn(async move {
                let answer = attempt(&tools, &receiver, &hook, &ready).await;
                (ready, answer)
            });
        }
    }

    /// Takes note of an answer; `None` if the delivery waits no more.
    fn answered(&mut self, ready: Ready, answer: Option<Answer>) {
        let Ready { place, is_retry, .. } = ready;
        self.retries -= usize::from(is_retry);
        match answer {
            None => self.queue.delivered(place, false),
            Some(Answer::Delivered) => {
                self.queue.delivered(place, true);
                if self.queue.counts().0 == 0 {
                    self.failure = None;
                }
            }
            Some(Answer::Gone) => {
                self.queue.put_back(place);
                self.is_gone = true;
            }
            Some(Answer::Failed { why, retry_after }) => self.failed(place, why, retry_after),
        }
    }

    fn failed(&mut self, place: Place, why: String, retry_after: Option<Duration>) {
        let now = Instant::now();
        let is_dead = self.queue.failed(place, &why, retry_after.unwrap_or_default(), now);
        self.tools.observe.webhook_failed(&self.hook.name, &why, is_dead);
        if let Some(pause) = retry_after {
            self.paused_until = self.paused_until.max(now + pause);
            self.pause = Some(self.paused_until - now);
        }
        self.failure = Some(why);
    }

    /// Writes what was done. Returns false if the webhook was dropped meanwhile.
    async fn write(&mut self) -> Result<bool, Error> {
        self.write_at = None;
        let now = Instant::now();
        let mut settlement = self.queue.settle(now);
        settlement.rules.clone_from(&self.hook.rules);
        settlement.pause = self.pause.take().map(|pause| pause.as_secs_f64());
        settlement.disabled = self.is_gone.then(|| String::from(GONE));
        let dead = self.queue.has_too_many_dead().then(|| String::from(TOO_MANY_DEAD));
        settlement.error = dead.or_else(|| self.trouble.clone()).or_else(|| self.failure.clone());
        self.tools.connection.settle(&self.hook, &settlement).await
    }

    /// Waits for the requests that are under way, and writes what became of them.
    async fn finish(mut self) -> Result<(), Error> {
        let until = tokio::time::Instant::now() + LAST;
        while let Ok(Some(Ok((ready, answer)))) =
            tokio::time::timeout_at(until, self.requests.join_next()).await
        {
            self.answered(ready, answer?);
        }
        if self.is_gone {
            tracing::warn!(webhook.name = self.hook.name, "{GONE}");
        }
        timeout(LAST, self.write()).await.map_or(Ok(()), |written| written.map(drop))
    }

    /// Updates the numbers of deliveries that wait.
    fn count(&mut self) {
        let now = self.queue.counts();
        let before = std::mem::replace(&mut self.counted, now);
        self.tools.observe.webhook_counts(before, now);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.tools.observe.webhook_counts(self.counted, (0, 0));
    }
}

/// Why a webhook is disabled.
const GONE: &str = "the receiver answered 410 Gone: if it is back, select relay.enable_webhook(…)";
/// Why a webhook takes no changes.
const TOO_MANY_DEAD: &str =
    "too many dead letters: select relay.retry_dead_letters(…) or relay.discard_dead_letters(…)";

/// Makes one attempt. Returns `None` if the delivery waits no more.
///
/// # Errors
/// When the body cannot be read from the database.
async fn attempt(
    tools: &Tools,
    receiver: &Receiver,
    hook: &Hook,
    ready: &Ready,
) -> Result<Option<Answer>, Error> {
    let body = match &ready.body {
        Some(body) => body.clone(),
        None => match tools.connection.body(&hook.name, &ready.id).await? {
            Some(body) => Bytes::from(body),
            None => return Ok(None),
        },
    };
    let began = Instant::now();
    let answer = tools.sender.send(receiver, &ready.id, body).await;
    tools.observe.webhook_answered(began.elapsed(), answer == Answer::Delivered);
    Ok(Some(answer))
}
