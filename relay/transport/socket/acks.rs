//! Pings that ask what a client has, and what their pongs say.

use std::collections::VecDeque;

/// By which way a ping gets into the outbox. Those of one way are there in the order of their numbers; those of the other
/// may be before them or behind them, so that a pong says nothing about these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AckMode {
    /// The session puts it there itself.
    Own,
    /// Whoever delivers does, sooner or later.
    Router,
}

/// The pings of a socket, each with what the client has when its pong comes.
#[derive(Debug)]
pub struct AckPings<T> {
    own: Sent<T>,
    router: Sent<T>,
}

#[derive(Debug)]
struct Sent<T> {
    last: u64,
    answered: u64,
    waiting: VecDeque<(u64, T)>,
}

impl<T> Default for AckPings<T> {
    fn default() -> Self {
        let sent = || Sent { last: 0, answered: 0, waiting: VecDeque::new() };
        Self { own: sent(), router: sent() }
    }
}

impl<T> AckPings<T> {
    /// The number of the next ping: its payload.
    pub fn next(&mut self, way: AckMode) -> u64 {
        let sent = self.of(way);
        sent.last += 1;
        2 * sent.last + u64::from(way == AckMode::Router)
    }

    /// Notes what the client has when the pong of this number comes, which may have come already.
    pub fn note(&mut self, number: u64, what: T) {
        self.of(way(number)).waiting.push_back((number / 2, what));
    }

    /// The pong of this number came; whether it was waited for. Others are not heeded.
    pub fn answered(&mut self, number: u64) -> bool {
        let sent = self.of(way(number));
        let is_waited_for = (sent.answered + 1..=sent.last).contains(&(number / 2));
        if is_waited_for {
            sent.answered = number / 2;
        }
        is_waited_for
    }

    /// The next of what the client has, once.
    pub fn received(&mut self) -> Option<T> {
        [AckMode::Own, AckMode::Router].into_iter().find_map(|way| {
            let sent = self.of(way);
            let is_answered = sent.waiting.front().is_some_and(|(number, _)| *number <= sent.answered);
            if is_answered { sent.waiting.pop_front().map(|(_, what)| what) } else { None }
        })
    }

    /// How many are without their pong.
    pub fn waiting(&self) -> usize {
        self.own.waiting.len() + self.router.waiting.len()
    }

    fn of(&mut self, way: AckMode) -> &mut Sent<T> {
        match way {
            AckMode::Own => &mut self.own,
            AckMode::Router => &mut self.router,
        }
    }
}

fn way(number: u64) -> AckMode {
    if number.is_multiple_of(2) { AckMode::Own } else { AckMode::Router }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pong_says_nothing_about_a_ping_that_goes_out_behind_it() {
        let mut pings = AckPings::default();
        // The router is asked first, but answers when ours is out and has its pong.
        let late = pings.next(AckMode::Router);
        let early = pings.next(AckMode::Own);
        pings.note(early, "a part of the past");
        pings.answered(early);
        assert_eq!(pings.received(), Some("a part of the past"));
        pings.note(late, "all up to now");
        assert_eq!(pings.received(), None);
        pings.answered(late);
        assert_eq!((pings.received(), pings.received()), (Some("all up to now"), None));
    }

    #[test]
    fn the_pong_of_a_later_ping_answers_for_those_before_it() {
        let mut pings = AckPings::default();
        for part in 1..=3 {
            let number = pings.next(AckMode::Own);
            pings.note(number, part);
        }
        assert!(!pings.answered(99));
        assert_eq!((pings.received(), pings.waiting()), (None, 3), "it was never sent");
        assert!(pings.answered(4));
        assert!(!pings.answered(4) && !pings.answered(2), "it was answered");
        assert_eq!((pings.received(), pings.received(), pings.received()), (Some(1), Some(2), None));
    }
}
