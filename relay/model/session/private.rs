//! What the private channels of a session may do: judged when they are joined, with each new token, and again from time to time.

use crate::model::catalog::topic_rules::TopicRights;
use crate::model::policy::visibility::Identity;
use crate::model::session::action::Action;
use crate::model::session::channel::{Channel, ChannelId};
use crate::model::session::join::{Recall, unauthorized};
use crate::model::session::machine::Session;
use crate::model::session::message::{ClientRequest, Incoming};

/// How long a verdict counts at most, in seconds.
pub const VERDICT_SECONDS: u64 = 30;

/// The refusal of a join whose earlier broadcasts cannot be read. The client joins again by itself.
pub const NOT_RECALLED: &str = "UnableToReplayMessages: Realtime was unable to replay messages";
/// The refusal of a join that wants earlier broadcasts in a session that is resumed from bookmarks.
pub const RESUMED_INSTEAD: &str = "UnableToReplayMessages: Replay is not available in a named session, which gets what it missed without it";

/// What a private channel may do.
#[derive(Debug)]
pub struct Private {
    /// The name of the channel.
    pub(super) name: String,
    /// What it may read.
    pub(super) read: TopicRights,
    /// When that was judged; `None` before the first judgement.
    judged_at: Option<u64>,
    /// The number of the last judgement.
    judgement: u32,
    /// Whether a judgement is under way.
    is_judging: bool,
    /// Whether the rules changed meanwhile.
    is_outdated: bool,
    /// Whether the judgement is of a new token, with which the channel is bound again.
    is_renewed: bool,
    /// What it may write, if that was judged.
    write: Option<WriteVerdict>,
    /// Which earlier broadcasts it wants and has not got yet.
    recall: Option<Recall>,
    /// Whether they are being read.
    is_recalling: bool,
    /// Whether it gets earlier broadcasts with the answer to its join.
    pub(super) has_recalled: bool,
}

/// What a private channel may write.
#[derive(Debug, Clone, Copy)]
struct WriteVerdict {
    rights: TopicRights,
    judged_at: u64,
    /// The version of the rules.
    version: u64,
}

/// What a message needs to be judged for: the right to write.
#[derive(Debug, PartialEq)]
pub struct WriteQuestion {
    /// The channel.
    pub channel: ChannelId,
    /// Its identity.
    pub identity: Identity,
    /// Its name.
    pub name: String,
}

impl Private {
    pub(super) fn new(name: String, recall: Option<Recall>) -> Self {
        Self {
            name,
            read: TopicRights::default(),
            judged_at: None,
            judgement: 0,
            is_judging: false,
            is_outdated: false,
            is_renewed: false,
            write: None,
            recall,
            is_recalling: false,
            has_recalled: false,
        }
    }

    /// Begins a judgement, and returns its number.
    pub(super) fn begin(&mut self) -> u32 {
        self.judgement += 1;
        (self.is_judging, self.is_outdated) = (true, false);
        self.judgement
    }

    /// Forgets what was judged of the former token.
    pub(super) fn renew(&mut self) {
        (self.is_renewed, self.write) = (true, None);
    }

    /// Returns what it may write, as far as that was judged.
    pub(super) fn may_write(&self) -> TopicRights {
        self.write.map(|write| write.rights).unwrap_or_default()
    }
}

impl Channel {
    /// Starts to read the earlier broadcasts that a channel wants and may read; once.
    fn recall(&mut self) -> Option<Action> {
        let private = self.private.as_mut().filter(|private| private.read.broadcast)?;
        let recall = private.recall.take()?;
        private.is_recalling = true;
        Some(Action::Recall { channel: self.id, name: private.name.clone(), recall })
    }
}

impl Session {
    /// Whether there is a private channel.
    pub fn has_private_channels(&self) -> bool {
        self.channels.values().any(|channel| channel.private.is_some())
    }

    /// Returns when the first private channel is due to be judged again, in Unix seconds.
    pub fn next_judgement(&self) -> Option<u64> {
        let due = self.channels.values().filter_map(|channel| {
            let private = channel.private.as_ref().filter(|private| !private.is_judging)?;
            Some(private.judged_at? + VERDICT_SECONDS)
        });
        due.min()
    }

    /// Judges private channels again: those whose verdict is older than [`VERDICT_SECONDS`] at `now`, or all when the rules changed.
    pub fn judge_again(&mut self, now: u64, have_rules_changed: bool) -> Vec<Action> {
        let mut actions = Vec::new();
        for channel in self.channels.values_mut() {
            let Some(private) = &mut channel.private else { continue };
            let is_old = private.judged_at.is_some_and(|judged_at| judged_at + VERDICT_SECONDS <= now);
            match private.is_judging {
                true => private.is_outdated |= have_rules_changed,
                false if is_old || have_rules_changed => actions.extend(channel.judge(true)),
                false => {}
            }
        }
        actions
    }

    /// Handles the outcome of [`Action::Judge`]: what the channel may read and, if nothing, why when that is not for the policies to say.
    /// `None` means that PostgreSQL is unavailable.
    pub fn judged(
        &mut self,
        channel: ChannelId,
        judgement: u32,
        now: u64,
        outcome: Option<(TopicRights, Option<String>)>,
    ) -> Vec<Action> {
        let mut channels = self.channels.iter_mut();
        let Some((topic, found)) = channels.find(|(_, state)| state.id == channel) else { return Vec::new() };
        let topic = topic.clone();
        let is_answered = found.is_answered();
        let Some(private) = found.private.as_mut().filter(|private| private.judgement == judgement) else {
            return Vec::new();
        };
        private.is_judging = false;
        let is_renewed = std::mem::take(&mut private.is_renewed);
        let Some((rights, why)) = outcome else { return self.fail(&topic) };
        private.judged_at = Some(now);
        if !rights.any() {
            let refusal = unauthorized(&private.name, why.as_deref());
            let lost =
                format!("You no longer have permission to read from this Channel topic: {}", private.name);
            return match is_answered {
                false => self.refuse(&topic, format!("Unauthorized: {refusal}")),
                true => self.close(&topic, if is_renewed { &refusal } else { &lost }),
            };
        }
        let before = std::mem::replace(&mut private.read, rights);
        let (is_outdated, is_recalling) = (private.is_outdated, private.is_recalling);
        let mut actions = Vec::new();
        if is_answered {
            actions.extend((before != rights).then_some(Action::Permit { channel, rights }));
            if is_renewed || before.broadcast != rights.broadcast {
                actions.extend(found.renew());
            }
        } else if !is_recalling {
            actions.extend(found.recall().map_or_else(|| found.begin(&topic), |recall| vec![recall]));
        }
        if is_outdated {
            actions.extend(found.judge(true));
        }
        actions
    }

    /// Handles the outcome of [`Action::Recall`]: why the earlier broadcasts are not sent, if so. The join is answered now, or after the
    /// judgement that began meanwhile.
    pub fn recalled(&mut self, channel: ChannelId, refusal: Option<&str>) -> Vec<Action> {
        let mut channels = self.channels.iter_mut();
        let found = channels.find(|(_, state)| state.id == channel && !state.is_answered());
        let Some((topic, found)) = found else { return Vec::new() };
        let topic = topic.clone();
        if let Some(refusal) = refusal {
            return self.refuse(&topic, refusal.to_owned());
        }
        let Some(private) = &mut found.private else { return Vec::new() };
        (private.is_recalling, private.has_recalled) = (false, true);
        if private.is_judging { Vec::new() } else { found.begin(&topic) }
    }

    /// Returns what has to be judged before the message is received: whether its channel may write. Verdicts count for
    /// [`VERDICT_SECONDS`], and only for this version of the rules.
    pub fn write_question(&self, message: &Incoming, now: u64, version: u64) -> Option<WriteQuestion> {
        if !matches!(message.request, ClientRequest::Broadcast(_) | ClientRequest::Track(_)) {
            return None;
        }
        let channel = self.channels.get(&message.origin.channel.topic)?;
        let private = channel.private.as_ref()?;
        let is_current = |write: &WriteVerdict| {
            write.version == version && now.saturating_sub(write.judged_at) < VERDICT_SECONDS
        };
        match private.write.as_ref().is_some_and(is_current) {
            true => None,
            false => Some(WriteQuestion {
                channel: channel.id,
                identity: channel.identity.clone(),
                name: private.name.clone(),
            }),
        }
    }

    /// Sets the answer to a [`WriteQuestion`], for the identity that asked.
    pub fn may_write(&mut self, question: &WriteQuestion, now: u64, version: u64, rights: TopicRights) {
        let found = self.channels.values_mut().find(|channel| channel.id == question.channel);
        let Some(channel) = found.filter(|channel| channel.identity == question.identity) else { return };
        if let Some(private) = &mut channel.private {
            private.write = Some(WriteVerdict { rights, judged_at: now, version });
        }
    }

    /// Refuses the unanswered join of a topic, which ends its channel.
    fn refuse(&mut self, topic: &str, reason: String) -> Vec<Action> {
        let Some(mut channel) = self.channels.remove(topic) else { return Vec::new() };
        channel.refuse_join(topic, reason).map(Action::Send).into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::session::join::Join;
    use crate::model::session::machine::UNAVAILABLE;
    use crate::model::session::message::{ChannelName, Origin, Reference};
    use crate::model::session::test_session::{
        NOW, bind, broadcast, join, joining, messages_of, receive, session, todos, token,
    };

    const BROADCAST: TopicRights = TopicRights { broadcast: true, presence: false };
    const NONE: TopicRights = TopicRights { broadcast: false, presence: false };
    const DENIED: &str = "You do not have permissions to read from this Channel topic: room";

    fn private(entries: &serde_json::Value) -> Join {
        let private_channel = Some(String::from("room"));
        Join { private_channel, acknowledges: true, ..joining(entries, Some("ann")) }
    }

    fn judge(actions: &[Action]) -> (ChannelId, u32) {
        let found = actions.iter().find_map(|action| match action {
            Action::Judge { channel, judgement, .. } => Some((*channel, *judgement)),
            _ => None,
        });
        found.unwrap_or_else(|| panic!("nothing is to be judged: {actions:?}"))
    }

    fn joined(rights: TopicRights) -> (Session, ChannelId) {
        let mut session = session();
        let (channel, judgement) = judge(&join(&mut session, "1", private(&json!([]))));
        let actions = session.judged(channel, judgement, NOW, Some((rights, None)));
        assert_eq!(messages_of(&actions), ["listen", "1 joined"]);
        let is_right =
            |action: &Action| matches!(action, Action::Enter { private, .. } if *private == Some(rights));
        assert!(actions.iter().any(is_right), "{actions:?}");
        (session, channel)
    }

    fn message(request: ClientRequest) -> Incoming {
        let reference = Reference(Some("1".into()));
        let channel = ChannelName { topic: String::from("t"), join: reference.clone() };
        Incoming { origin: Origin { channel, reference }, request }
    }

    #[test]
    fn a_private_join_is_answered_once_it_is_judged_and_bound() {
        let mut session = session();
        let actions = join(&mut session, "1", private(&todos()));
        assert_eq!(messages_of(&actions), ["judge ann"]);
        let (channel, judgement) = judge(&actions);
        let actions = session.judged(channel, judgement, NOW, Some((BROADCAST, None)));
        let (_, attempt, _) = bind(&actions);
        assert_eq!(
            messages_of(&session.bound(channel, attempt, Ok(Default::default()))),
            ["1 joined", "join: 1 subscribed"]
        );
    }

    #[test]
    fn a_refused_join_says_why_and_ends_the_channel() {
        for (why, expected) in
            [(None, String::new()), (Some(String::from("no table")), String::from(" (no table)"))]
        {
            let mut session = session();
            let (channel, judgement) = judge(&join(&mut session, "1", private(&todos())));
            let actions = session.judged(channel, judgement, NOW, Some((NONE, why)));
            assert_eq!(messages_of(&actions), [format!("1 refused: Unauthorized: {DENIED}{expected}")]);
            assert_eq!(session.channel_count(), 0);
        }
        let mut session = session();
        let (channel, judgement) = judge(&join(&mut session, "1", private(&todos())));
        let refused = messages_of(&session.judged(channel, judgement, NOW, None));
        assert_eq!(refused, [format!("1 refused: {UNAVAILABLE}")]);
    }

    #[test]
    fn a_new_token_is_judged_and_a_reader_who_lost_the_right_leaves() {
        let (mut session, channel) = joined(TopicRights::ALL);
        let actions = receive(&mut session, "1", "t", token("bob"));
        assert_eq!(messages_of(&actions), ["judge bob"]);
        let (_, judgement) = judge(&actions);
        let actions = session.judged(channel, judgement, NOW, Some((NONE, None)));
        assert_eq!(messages_of(&actions), [&format!("1 error: {DENIED}"), "1 closed", "leave"]);
        assert!(matches!(actions[0], Action::Exit { .. }));
    }

    #[test]
    fn rights_are_judged_again_in_time_and_when_rules_change_and_what_changed_is_applied() {
        let (mut session, channel) = joined(TopicRights::ALL);
        assert_eq!(session.next_judgement(), Some(NOW + VERDICT_SECONDS));
        assert_eq!(session.judge_again(NOW + VERDICT_SECONDS - 1, false), []);
        let actions = session.judge_again(NOW + VERDICT_SECONDS, false);
        assert_eq!(messages_of(&actions), ["judge ann again"]);
        // While it is judged, nothing is due; a change of the rules makes it begin anew.
        assert_eq!((session.next_judgement(), session.judge_again(NOW + 99, true)), (None, Vec::new()));
        let (_, judgement) = judge(&actions);
        let actions = session.judged(channel, judgement, NOW + 40, Some((BROADCAST, None)));
        assert_eq!(messages_of(&actions), [format!("permit {BROADCAST:?}"), String::from("judge ann again")]);
        assert_eq!(session.judged(channel, judgement, NOW + 40, Some((NONE, None))), [], "it is superseded");
        let (_, judgement) = judge(&actions);
        let actions = session.judged(channel, judgement, NOW + 40, Some((NONE, None)));
        let lost = "1 error: You no longer have permission to read from this Channel topic: room";
        assert_eq!(messages_of(&actions), [lost, "1 closed", "leave"]);
    }

    #[test]
    fn what_may_be_written_is_asked_before_the_first_message_and_kept_for_a_while() {
        let (mut session, _) = joined(TopicRights::ALL);
        let question = session.write_question(&message(broadcast()), NOW, 1).unwrap();
        assert_eq!(session.write_question(&message(ClientRequest::Untrack), NOW, 1), None);
        // Unknown means no.
        let answer = |session: &mut Session, request| messages_of(&receive(session, "1", "t", request));
        assert_eq!(answer(&mut session, broadcast()), ["1 MayNotSend"]);
        session.may_write(&question, NOW, 1, BROADCAST);
        assert_eq!(answer(&mut session, broadcast()), ["broadcast"]);
        assert_eq!(answer(&mut session, ClientRequest::Track(String::from("{}"))), ["1 MayNotTrack"]);
        assert_eq!(answer(&mut session, ClientRequest::Untrack), ["track None"]);
        let asks = |session: &Session, now, version| {
            session.write_question(&message(broadcast()), now, version).is_some()
        };
        assert!(!asks(&session, NOW + VERDICT_SECONDS - 1, 1));
        assert!(asks(&session, NOW + VERDICT_SECONDS, 1) && asks(&session, NOW, 2));
        // A new token asks anew, and an answer for the former one does not count.
        receive(&mut session, "1", "t", token("bob"));
        session.may_write(&question, NOW, 1, BROADCAST);
        assert!(asks(&session, NOW, 1));
        assert_eq!(answer(&mut session, broadcast()), ["1 MayNotSend"]);
    }

    #[test]
    fn earlier_broadcasts_are_read_before_the_join_is_answered_and_delivery_begins_after_them() {
        let recalling = || {
            let recall = Some(Recall { since: 0, limit: 5 });
            let mut session = session();
            let (channel, judgement) =
                judge(&join(&mut session, "1", Join { recall, ..private(&json!([])) }));
            (session, channel, judgement)
        };
        let (mut session, channel, judgement) = recalling();
        let actions = session.judged(channel, judgement, NOW, Some((TopicRights::ALL, None)));
        assert_eq!(messages_of(&actions), ["recall 5"]);
        // A new token is judged, and the join waits for both.
        let (_, judgement) = judge(&receive(&mut session, "1", "t", token("bob")));
        assert_eq!(session.judged(channel, judgement, NOW, Some((TopicRights::ALL, None))), []);
        let actions = session.recalled(channel, None);
        assert_eq!(messages_of(&actions), ["1 joined", "listen"]);
        assert!(matches!(actions[1], Action::Enter { .. }));
        assert_eq!(session.recalled(channel, None), []);
        // Without the right there is nothing to send; what cannot be read refuses the join.
        let (mut session, channel, judgement) = recalling();
        let presence = TopicRights { broadcast: false, presence: true };
        assert_eq!(
            messages_of(&session.judged(channel, judgement, NOW, Some((presence, None)))),
            ["1 joined"]
        );
        let (mut session, channel, judgement) = recalling();
        session.judged(channel, judgement, NOW, Some((TopicRights::ALL, None)));
        assert_eq!(messages_of(&session.recalled(channel, Some("no"))), ["1 refused: no"]);
        assert_eq!(session.channel_count(), 0);
    }

    #[test]
    fn a_denied_broadcast_without_acknowledgement_is_dropped_in_silence() {
        let mut session = session();
        let silent = Join { acknowledges: false, ..private(&json!([])) };
        let (channel, judgement) = judge(&join(&mut session, "1", silent));
        session.judged(channel, judgement, NOW, Some((TopicRights::ALL, None)));
        assert_eq!(receive(&mut session, "1", "t", broadcast()), []);
    }
}
