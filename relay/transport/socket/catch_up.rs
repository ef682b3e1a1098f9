//! A channel's way from its bookmark to the present: as far as its client reads, step by step.

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

/// One channel that is told what it missed.
pub struct ChannelCatchUp {
    place: watch::Receiver<Cursor>,
    step: Step,
}

enum Step {
    Reads(BoxFuture<'static, (CatchUp, Result<Progress, ReplayError>)>),
    /// The client has to read first.
    Waits(CatchUp),
}

impl ChannelCatchUp {
    /// Begins, after a pause.
    pub fn new(follower: CatchUp, pause: Duration) -> Self {
        Self { place: follower.place(), step: reads(follower, pause) }
    }

    /// With somebody who has to read first.
    pub fn waiting(follower: CatchUp) -> Self {
        Self { place: follower.place(), step: Step::Waits(follower) }
    }

    /// Up to where everything is in the outbox.
    pub fn place(&self) -> Cursor {
        self.place.borrow().clone()
    }

    /// What came of the last step, once; it is over then.
    pub fn poll(&mut self, context: &mut Context<'_>) -> Poll<(CatchUp, Result<Progress, ReplayError>)> {
        match &mut self.step {
            Step::Reads(reads) => reads.poll_unpin(context),
            Step::Waits(_) => Poll::Pending,
        }
    }

    /// Reads on, if it waited.
    pub fn go_on(&mut self) {
        let nothing = Step::Reads(pending().boxed());
        self.step = match std::mem::replace(&mut self.step, nothing) {
            Step::Waits(follower) => reads(follower, Duration::ZERO),
            step => step,
        };
    }
}

fn reads(mut follower: CatchUp, pause: Duration) -> Step {
    let step = async move {
        sleep(pause).await;
        let outcome = follower.go_on().await;
        (follower, outcome)
    };
    Step::Reads(step.boxed())
}
