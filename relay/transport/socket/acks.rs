//! Acknowledgement pings: a pong confirms that the client has everything that was sent before the ping.

use std::collections::VecDeque;

/// The task that puts a ping into the outbox. Pings of one mode are queued in the order of their numbers. Their order relative
/// to pings of the other mode is not known, so a pong acknowledges only pings of its own mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AckMode {
    /// The session's own task.
    Own,
    /// The router, at a later time.
    Router,
}

/// The pings of a socket, each with the value that its pong acknowledges.
#[derive(Debug)]
pub struct AckPings<T> {
    own: Sent<T>,
    router: Sent<T>,
}

#[derive(Debug)]
struct Sent<T> {
    last: u64,
    acknowledged: u64,
    pending: VecDeque<(u64, T)>,
}

impl<T> Default for AckPings<T> {
    fn default() -> Self {
        let sent = || Sent { last: 0, acknowledged: 0, pending: VecDeque::new() };
        Self { own: sent(), router: sent() }
    }
}

impl<T> AckPings<T> {
    /// Returns the number of the next ping, which is its payload. Even numbers are [`AckMode::Own`], odd ones
    /// [`AckMode::Router`].
    pub fn next(&mut self, mode: AckMode) -> u64 {
        let sent = self.of(mode);
        sent.last += 1;
        2 * sent.last + u64::from(mode == AckMode::Router)
    }

    /// Records the value that the pong of this number acknowledges. The pong may have arrived already.
    pub fn record(&mut self, number: u64, value: T) {
        self.of(mode(number)).pending.push_back((number / 2, value));
    }

    /// Handles the pong of this number. Returns whether it was expected; other pongs are ignored.
    pub fn handle_pong(&mut self, number: u64) -> bool {
        let sent = self.of(mode(number));
        let is_expected = (sent.acknowledged + 1..=sent.last).contains(&(number / 2));
        if is_expected {
            sent.acknowledged = number / 2;
        }
        is_expected
    }

    /// Returns the next acknowledged value; each is returned once.
    pub fn next_acknowledged(&mut self) -> Option<T> {
        [AckMode::Own, AckMode::Router].into_iter().find_map(|mode| {
            let sent = self.of(mode);
            let is_acknowledged =
                sent.pending.front().is_some_and(|(number, _)| *number <= sent.acknowledged);
            if is_acknowledged { sent.pending.pop_front().map(|(_, value)| value) } else { None }
        })
    }

    /// Returns the number of pings without a pong.
    pub fn pending(&self) -> usize {
        self.own.pending.len() + self.router.pending.len()
    }

    fn of(&mut self, mode: AckMode) -> &mut Sent<T> {
        match mode {
            AckMode::Own => &mut self.own,
            AckMode::Router => &mut self.router,
        }
    }
}

fn mode(number: u64) -> AckMode {
    if number.is_multiple_of(2) { AckMode::Own } else { AckMode::Router }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pong_does_not_acknowledge_a_ping_of_the_other_mode() {
        let mut pings = AckPings::default();
        // The router's ping is numbered first, but recorded after our own has its pong.
        let late = pings.next(AckMode::Router);
        let early = pings.next(AckMode::Own);
        pings.record(early, "a replayed chunk");
        pings.handle_pong(early);
        assert_eq!(pings.next_acknowledged(), Some("a replayed chunk"));
        pings.record(late, "everything up to now");
        assert_eq!(pings.next_acknowledged(), None);
        pings.handle_pong(late);
        assert_eq!(
            (pings.next_acknowledged(), pings.next_acknowledged()),
            (Some("everything up to now"), None)
        );
    }

    #[test]
    fn a_pong_acknowledges_earlier_pings_of_its_mode() {
        let mut pings = AckPings::default();
        for part in 1..=3 {
            let number = pings.next(AckMode::Own);
            pings.record(number, part);
        }
        assert!(!pings.handle_pong(99));
        assert_eq!((pings.next_acknowledged(), pings.pending()), (None, 3), "it was never sent");
        assert!(pings.handle_pong(4));
        assert!(!pings.handle_pong(4) && !pings.handle_pong(2), "it was acknowledged before");
        assert_eq!(
            (pings.next_acknowledged(), pings.next_acknowledged(), pings.next_acknowledged()),
            (Some(1), Some(2), None)
        );
    }
}
