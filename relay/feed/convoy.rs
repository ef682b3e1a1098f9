//! Those who have the rest of a large page before them: they are told it beside the others, who go on meanwhile.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::{Instant, sleep, sleep_until};

use crate::feed::audience::Audience;
use crate::feed::audiences::Audiences;
use crate::feed::command::{Command, Handover, Position};
use crate::feed::gate::Gate;
use crate::feed::past::{Listeners, Missed, Past};
use crate::feed::pulse::Pulse;
use crate::feed::stretch::Stretch;
use crate::model::cursor::Cursor;
use crate::model::relation::Catalog;
use crate::observe::Observe;

/// After each part, clients that have much to read get so much time for it: whoever takes half a megabyte a second is
/// waited for, and is never too slow.
const PAUSE: Duration = Duration::from_millis(250);
/// The pause before the next try, when PostgreSQL cannot be asked or the router is not ready.
const AGAIN: Duration = Duration::from_millis(200);

/// A command, and which one it is of those about its channel.
pub type Numbered = (Command, u32);

/// Audiences on their way through the past.
pub struct Convoy {
    number: u64,
    /// Those who are told.
    pub audiences: Audiences,
    /// Up to where they were told everything; none when that cannot be had any more, which they know.
    pub since: Option<Cursor>,
    /// Commands about its channels, which are not the router's meanwhile.
    pub commands: UnboundedReceiver<Numbered>,
    /// The relations that concern them, of the page with which they began; none when that is most of it.
    pub only: Option<Arc<[i32]>>,
    /// They were told that the feed stalls, and not yet that it goes on.
    stalled: bool,
    /// When they came further last, and how long without that is a stall.
    moved: Instant,
    bound: Duration,
    past: Arc<Past>,
    router: UnboundedSender<Command>,
    observe: Arc<Observe>,
}

impl Convoy {
    /// A convoy of this number, and where its commands go.
    pub fn new(
        number: u64,
        audiences: Audiences,
        since: Cursor,
        pulse: &Pulse,
        past: Arc<Past>,
        router: UnboundedSender<Command>,
        observe: Arc<Observe>,
    ) -> (Box<Self>, UnboundedSender<Numbered>) {
        let (sender, commands) = unbounded_channel();
        let (since, only) = (Some(since), None);
        let (stalled, moved, bound) = (false, Instant::now(), pulse.bound());
        let convoy =
            Self { number, audiences, since, commands, only, stalled, moved, bound, past, router, observe };
        (Box::new(convoy), sender)
    }

    /// Its number.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Tells what the router says is still before it, then goes back to the router.
    pub async fn run(mut self: Box<Self>, handover: Handover) {
        let past = Arc::clone(&self.past);
        let told = match (handover, self.since.clone()) {
            (Handover::Missed(missed, _), _) => past.tell_again(&missed, &mut *self).await,
            (Handover::Behind(to), Some(since)) => past.tell_many(&since, &to, &mut *self).await,
            _ => {
                sleep(AGAIN).await;
                Ok(())
            }
        };
        match told {
            Ok(()) | Err(Missed::Ended) => {}
            Err(Missed::Gap(why)) => self.tell_gap(why),
            Err(Missed::Unavailable(error)) => {
                tracing::warn!(error = %error, "changes of a large transaction wait");
                sleep(AGAIN).await;
            }
        }
        self.obey_all();
        let router = self.router.clone();
        let _ = router.send(Command::Return(self));
    }

    /// What is before it cannot be had any more: tells everybody so.
    pub fn tell_gap(&mut self, why: &str) {
        self.audiences.iter().for_each(|audience| audience.tell_gap(why, ""));
        self.since = None;
    }

    /// Tells everybody that the feed stalls or goes on, if that is news.
    pub fn tell_stall(&mut self, stalls: bool) {
        if std::mem::replace(&mut self.stalled, stalls) != stalls {
            self.audiences.iter().for_each(|audience| audience.tell_stall(stalls));
        }
    }

    fn obey_all(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            self.obey(command);
        }
    }

    fn obey(&mut self, (command, number): Numbered) {
        match command {
            Command::Join { channel, registration, greeting } => {
                self.audiences.join(channel, registration, greeting);
            }
            Command::Leave { channel, outbox, farewell, until } => {
                if let Some(until) = until {
                    let here = self.since.as_ref();
                    let _ = until.send(here.map(|here| self.audiences.position(channel, here)));
                }
                self.audiences.leave(channel, &outbox, farewell);
                let left = Command::Left { channel, convoy: self.number, command: number };
                let _ = self.router.send(left);
            }
            Command::Position { channels, then, until } => {
                let ours = channels.into_iter().filter(|channel| self.audiences.has(*channel));
                let place = |channel| Some((channel, self.audiences.position(channel, self.since.as_ref()?)));
                let channels = ours.filter_map(place).collect();
                Position::tell(self.since.clone(), channels, then, until);
            }
            // Nobody follows a convoy: the router says "not yet".
            Command::Follow { .. } | Command::Return(_) | Command::Left { .. } => {}
            Command::Stall(stalls) => self.tell_stall(stalls),
        }
    }
}

impl Listeners for Convoy {
    async fn tell(&mut self, gate: &Gate, catalog: &Arc<Catalog>, stretch: &Stretch) -> Result<(), Missed> {
        self.obey_all();
        self.audiences.judge_with(catalog, self.since.as_ref());
        let frames = self.audiences.tell(gate, catalog, stretch).await?;
        self.observe.frames_delivered(frames);
        Ok(())
    }

    fn is_behind(&self) -> bool {
        self.audiences.iter().any(Audience::is_behind)
    }

    async fn let_read(&mut self) {
        self.audiences.let_clients_read(PAUSE).await;
    }

    /// Before its first page, or while PostgreSQL does not answer, it may wait for long: channels are left and have other
    /// tokens all the same.
    async fn meanwhile<T: Send>(&mut self, asked: impl Future<Output = T> + Send) -> T {
        let mut asked = pin!(asked);
        loop {
            let stalls_at = self.moved + self.bound;
            tokio::select! {
                biased;
                answer = &mut asked => return answer,
                () = sleep_until(stalls_at), if !self.stalled => self.tell_stall(true),
                // The router keeps the other end as long as it is away.
                Some(command) = self.commands.recv() => self.obey(command),
            }
        }
    }

    fn only(&self) -> Option<Arc<[i32]>> {
        self.only.clone()
    }

    fn reached(&mut self, here: Cursor) {
        if here.within().is_none() {
            self.only = None;
        }
        self.since = Some(here);
        self.moved = Instant::now();
        self.tell_stall(false);
    }

    fn has_enough(&self) -> bool {
        self.audiences.is_empty()
    }
}
