//! The task that writes bookmarks: combines the commands of many sockets into a few statements.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use tokio::time::{Instant, interval, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::model::identity::bookmark::{Bookmark, BookmarkKey, Opened};
use crate::model::log::cursor::Cursor;
use crate::postgres::bookmarks::Bookmarks;
use crate::postgres::connect::pool::Error;

/// Delay until moved bookmarks are written, so that they are written together.
const WRITE_DELAY: Duration = Duration::from_secs(1);
/// Maximum bookmarks per statement.
const MAX_PER_STATEMENT: usize = 1000;
/// Pause after a failure.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// Interval of trimming: drops bookmarks of clients that never came back, and the oldest ones over an owner's limit …
const TRIM_INTERVAL: Duration = Duration::from_secs(600);
/// … also after this many were opened.
const TRIM_AFTER: usize = 5_000;
/// Time limit for the last write at shutdown.
const FINAL_WRITE: Duration = Duration::from_secs(2);

/// A session's command.
enum BookmarkCommand {
    Open(BookmarkKey, Cursor, oneshot::Sender<Opened>),
    Move(Bookmark, Cursor, Arc<AtomicBool>),
    Forget(BookmarkKey, Option<String>),
}

/// A session's handle on the bookmarks.
#[derive(Clone)]
pub struct BookmarkHandle(UnboundedSender<BookmarkCommand>);

/// The task that writes bookmarks.
pub struct BookmarkWriter {
    bookmarks: Bookmarks,
    commands: UnboundedReceiver<BookmarkCommand>,
    opens: HashMap<BookmarkKey, (Cursor, oneshot::Sender<Opened>)>,
    /// By owner.
    moves: HashMap<String, (Bookmark, Cursor, Arc<AtomicBool>)>,
    /// With the owner, when only the bookmark of that owner is dropped.
    forgets: Vec<(BookmarkKey, Option<String>)>,
    /// Bookmarks opened since the last trim.
    opened: usize,
    /// When to write next.
    due: Option<Instant>,
}

impl BookmarkHandle {
    /// Creates a handle and its task.
    pub fn new(bookmarks: Bookmarks) -> (Self, BookmarkWriter) {
        let (sender, commands) = unbounded_channel();
        let writer = BookmarkWriter {
            bookmarks,
            commands,
            opens: HashMap::new(),
            moves: HashMap::new(),
            forgets: Vec::new(),
            opened: 0,
            due: None,
        };
        (Self(sender), writer)
    }

    /// Takes over a bookmark, or creates it at `position`, durably. `None` when the relay ends, or a later connection of
    /// the same session opened it.
    pub async fn open(&self, key: BookmarkKey, position: Cursor) -> Option<Opened> {
        let (opened, receiver) = oneshot::channel();
        let _ = self.0.send(BookmarkCommand::Open(key, position, opened));
        receiver.await.ok()
    }

    /// Moves a bookmark within about a second. Sets `taken` if it belongs to another connection by then.
    pub fn move_to(&self, bookmark: Bookmark, to: Cursor, taken: &Arc<AtomicBool>) {
        let _ = self.0.send(BookmarkCommand::Move(bookmark, to, Arc::clone(taken)));
    }

    /// Drops a bookmark: its client left the channel.
    pub fn forget(&self, Bookmark { key, owner }: Bookmark) {
        let _ = self.0.send(BookmarkCommand::Forget(key, Some(owner)));
    }

    /// Drops the bookmark of any owner: its client left the channel while the bookmark was being opened.
    pub fn forget_opening(&self, key: BookmarkKey) {
        let _ = self.0.send(BookmarkCommand::Forget(key, None));
    }
}

impl BookmarkWriter {
    /// Runs until `end`, which comes after the end of all sessions, then writes what moved.
    pub async fn run(mut self, end: CancellationToken) {
        let mut trim = interval(TRIM_INTERVAL);
        loop {
            let due = self.due;
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(command) => self.queue(command),
                    None => return,
                },
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    self.write().await;
                    if self.opened >= TRIM_AFTER {
                        trim.reset_immediately();
                    }
                }
                _ = trim.tick() => {
                    self.opened = 0;
                    self.report(self.bookmarks.trim().await);
                }
                () = end.cancelled() => break,
            }
        }
        self.opens.clear();
        let _ = timeout(FINAL_WRITE, self.write()).await;
    }

    fn queue(&mut self, command: BookmarkCommand) {
        let when = match command {
            BookmarkCommand::Open(key, position, opened) => {
                // Of two connections of one session only the later one gets it; the earlier one gets no answer and
                // joins again.
                self.opens.insert(key, (position, opened));
                Instant::now()
            }
            BookmarkCommand::Move(bookmark, to, taken) => {
                self.moves.insert(bookmark.owner.clone(), (bookmark, to, taken));
                Instant::now() + WRITE_DELAY
            }
            BookmarkCommand::Forget(key, owner) => {
                if owner.is_none() {
                    self.opens.remove(&key);
                }
                self.forgets.push((key, owner));
                Instant::now() + WRITE_DELAY
            }
        };
        self.due = Some(self.due.map_or(when, |due| due.min(when)));
    }

    /// Writes moves before opens: a client that reconnects finds what it acknowledged a moment ago.
    async fn write(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            self.queue(command);
        }
        let written = self.try_write().await;
        self.due = if written.is_err() {
            Some(Instant::now() + RETRY_PAUSE)
        } else if self.opens.is_empty() && self.moves.is_empty() && self.forgets.is_empty() {
            None
        } else {
            Some(Instant::now())
        };
        self.report(written);
    }

    async fn try_write(&mut self) -> Result<(), Error> {
        let moves = self.moves.values().take(MAX_PER_STATEMENT);
        let moves: Vec<_> = moves.map(|(bookmark, to, _)| (bookmark.clone(), to.clone())).collect();
        if !moves.is_empty() {
            let moved = self.bookmarks.move_to(&moves).await?;
            for (Bookmark { owner, .. }, _) in moves {
                if let Some((.., taken)) = self.moves.remove(&owner)
                    && !moved.contains(&owner)
                {
                    taken.store(true, Ordering::Relaxed);
                }
            }
        }
        if !self.forgets.is_empty() {
            self.bookmarks.forget(&self.forgets).await?;
            self.forgets.clear();
        }
        // Skip requests whose session has ended.
        self.opens.retain(|_, (_, opened)| !opened.is_closed());
        let opens = self.opens.iter().take(MAX_PER_STATEMENT);
        let wanted: Vec<_> = opens.map(|(key, (position, _))| (key.clone(), position.clone())).collect();
        if !wanted.is_empty() {
            self.opened += wanted.len();
            for opened in self.bookmarks.open(&wanted).await? {
                if let Some((_, waiting)) = self.opens.remove(&opened.bookmark().key) {
                    let _ = waiting.send(opened);
                }
            }
        }
        Ok(())
    }

    fn report(&self, outcome: Result<(), Error>) {
        if let Err(error) = outcome {
            tracing::warn!(error = %error, "bookmarks of named sessions not saved, retrying");
        }
    }
}
