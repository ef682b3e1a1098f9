//! A channel that catches up from its bookmark to the live feed, step by step, as fast as its client reads.

use std::future::pending;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::watch;
use tokio::time::sleep;

use crate::feed::catch_up::{CatchUp, Progress};
use crate::feed::replay::reader::ReplayError;
use crate::model::log::cursor::Cursor;

/// The catch-up of one channel.
pub struct ChannelCatchUp {
    position: watch::Receiver<Cursor>,
    step: Step,
}

enum Step {
    Reading(BoxFuture<'static, (CatchUp, Result<Progress, ReplayError>)>),
    /// Paused until the client has read what is in its outbox.
    Waiting(Box<CatchUp>),
}

impl ChannelCatchUp {
    /// Starts reading after a pause.
    pub fn new(catch_up: CatchUp, pause: Duration) -> Self {
        Self { position: catch_up.place(), step: read(catch_up, pause) }
    }

    /// Waits for the client to read before the next step.
    pub fn waiting(catch_up: CatchUp) -> Self {
        Self { position: catch_up.place(), step: Step::Waiting(Box::new(catch_up)) }
    }

    /// Returns the position up to which everything is in the outbox.
    pub fn position(&self) -> Cursor {
        self.position.borrow().clone()
    }

    /// Completes with the outcome of the current step. Must not be polled again afterwards.
    pub fn poll(&mut self, context: &mut Context<'_>) -> Poll<(CatchUp, Result<Progress, ReplayError>)> {
        match &mut self.step {
            Step::Reading(reading) => reading.poll_unpin(context),
            Step::Waiting(_) => Poll::Pending,
        }
    }

    /// Starts the next step if it was waiting.
    pub fn resume(&mut self) {
        let placeholder = Step::Reading(pending().boxed());
        self.step = match std::mem::replace(&mut self.step, placeholder) {
            Step::Waiting(catch_up) => read(*catch_up, Duration::ZERO),
            step => step,
        };
    }
}

fn read(mut catch_up: CatchUp, pause: Duration) -> Step {
    let step = async move {
        sleep(pause).await;
        let outcome = catch_up.go_on().await;
        (catch_up, outcome)
    };
    Step::Reading(step.boxed())
}
