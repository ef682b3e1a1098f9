//! The subscriptions of a session's channels: outcomes of their binds, and binding again.

use crate::model::session::action::Action;
use crate::model::session::channel::{BindOutcome, ChannelId};
use crate::model::session::join::disabled;
use crate::model::session::machine::{Session, UNAVAILABLE};
use crate::model::session::message::SessionEvent;
use crate::model::subscription::error::SubscribeError;

impl Session {
    /// Binds a channel again: its table changed, or a refused entry may be accepted now.
    pub fn rebind(&mut self, channel: ChannelId) -> Vec<Action> {
        let found = self.channels.values_mut().find(|state| state.id == channel && state.delivering);
        found.map_or_else(Vec::new, |state| vec![state.bind()])
    }

    /// Handles the outcome of [`Action::Bind`]; `Err` means that nothing is bound. The channel is reported as subscribed only if no entry is refused.
    pub fn bound(
        &mut self,
        channel: ChannelId,
        attempt: u32,
        outcome: Result<BindOutcome, SubscribeError>,
    ) -> Vec<Action> {
        let Some(topic) = self.topic_in_attempt(channel, attempt) else { return Vec::new() };
        let Some(channel) = self.channels.get_mut(&topic) else { return Vec::new() };
        match channel.bound(&topic, outcome) {
            Ok(actions) => actions,
            Err(refusal) => {
                let reply = channel.refuse_join(&topic, disabled(&refusal));
                self.channels.remove(&topic);
                reply.map(Action::Send).into_iter().collect()
            }
        }
    }

    /// Handles an [`Action::Bind`] that failed because PostgreSQL is unavailable. The client joins again by itself.
    pub fn unavailable(&mut self, channel: ChannelId, attempt: u32) -> Vec<Action> {
        let found = self.topic_in_attempt(channel, attempt);
        found.map_or_else(Vec::new, |topic| self.fail(&topic))
    }

    /// Ends the channel of a topic because PostgreSQL is unavailable. The client joins again by itself.
    pub(super) fn fail(&mut self, topic: &str) -> Vec<Action> {
        let Some((topic, mut channel)) = self.channels.remove_entry(topic) else { return Vec::new() };
        let reason = String::from(UNAVAILABLE);
        match channel.refuse_join(&topic, reason.clone()) {
            Some(refusal) => vec![Action::Send(refusal)],
            None => channel.end(&topic, [SessionEvent::Error(reason), SessionEvent::Failed]),
        }
    }

    /// Returns the topic of a channel whose latest attempt to bind is this one.
    fn topic_in_attempt(&self, channel: ChannelId, attempt: u32) -> Option<String> {
        let mut channels = self.channels.iter();
        let found = channels.find(|(_, state)| state.id == channel && state.attempt == attempt);
        found.map(|(topic, _)| topic.clone())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::session::join::Join;
    use crate::model::session::member::MembershipOptions;
    use crate::model::session::message::ClientRequest;
    use crate::model::session::test_session::{
        ann, bind, delivering, join, joining, messages_of, receive, session, token,
    };

    #[test]
    fn a_join_is_answered_when_it_is_bound_and_before_any_change() {
        let mut session = session();
        let membership = MembershipOptions { wants_presence: true, ..MembershipOptions::default() };
        let actions = join(&mut session, "1", Join { membership, ..ann() });
        assert_eq!(messages_of(&actions), ["bind"]);
        let (channel, attempt, who) = bind(&actions);
        assert_eq!(who, "ann");
        let actions = session.bound(channel, attempt, Ok(BindOutcome::default()));
        assert_eq!(messages_of(&actions), ["1 joined", "enter with presence", "join: 1 subscribed"]);
    }

    #[test]
    fn a_channel_with_a_hidden_table_is_subscribed_and_told_why_at_each_bind() {
        let hidden = |refusals: &[&str]| BindOutcome {
            refusals: refusals.iter().map(|text| SubscribeError::Other((*text).to_owned())).collect(),
            hidden: vec![String::from("why")],
        };
        let mut session = session();
        let (channel, attempt, _) = bind(&join(&mut session, "1", Join { waits: true, ..ann() }));
        let actions = session.bound(channel, attempt, Ok(hidden(&[])));
        assert_eq!(messages_of(&actions), ["1 joined", "join: 1 subscribed", "join: 1 hidden: why"]);
        let (_, attempt, _) = bind(&receive(&mut session, "1", "t", token("bob")));
        let actions = session.bound(channel, attempt, Ok(hidden(&["no"])));
        assert_eq!(messages_of(&actions), ["join: 1 not subscribed: no", "join: 1 hidden: why"]);
    }

    #[test]
    fn a_resumable_join_is_answered_once_it_has_a_position() {
        let mut session = session().resumable(true);
        let actions = join(&mut session, "1", joining(&json!([]), None));
        assert_eq!(messages_of(&actions), ["bind"]);
        let (channel, attempt, _) = bind(&actions);
        let actions = session.bound(channel, attempt, Ok(BindOutcome::default()));
        assert_eq!(messages_of(&actions), ["1 joined"]);
        assert!(actions.iter().any(|action| matches!(action, Action::Join { .. })), "{actions:?}");
        let (_, attempt, who) = bind(&receive(&mut session, "1", "t", token("bob")));
        assert_eq!(
            (who.as_str(), messages_of(&session.bound(channel, attempt, Ok(BindOutcome::default())))),
            ("bob", Vec::new())
        );
        assert_eq!(messages_of(&session.end()), ["leave"]);
    }

    #[test]
    fn a_channel_hears_broadcasts_from_the_database_whatever_becomes_of_its_requests() {
        let mut session = session();
        let (channel, attempt, _) = bind(&join(&mut session, "1", ann()));
        let refusal = || Err(SubscribeError::Other("no".to_owned()));
        let actions = session.bound(channel, attempt, refusal());
        assert_eq!(messages_of(&actions), ["1 joined", "1 not subscribed: no", "listen"]);
        let (_, attempt, _) = bind(&receive(&mut session, "1", "t", token("bob")));
        assert_eq!(
            messages_of(&session.bound(channel, attempt, Ok(BindOutcome::default()))),
            ["join: 1 subscribed"]
        );
        let (_, attempt, _) = bind(&receive(&mut session, "1", "t", token("cat")));
        let actions = session.bound(channel, attempt, refusal());
        assert_eq!(messages_of(&actions), ["leave: 1 not subscribed: no", "listen"]);
        let left = receive(&mut session, "1", "t", ClientRequest::Leave);
        assert_eq!(messages_of(&left), ["1 left", "1 closed", "leave"]);
        join(&mut session, "2", joining(&json!([]), None));
        assert_eq!(
            messages_of(&receive(&mut session, "2", "t", token("bob"))),
            ["listen"],
            "until the new token ends"
        );
        assert_eq!(session.heard_topic(ChannelId { session: 7, channel: 2 }), Some(("t", false)));
    }

    #[test]
    fn an_outcome_counts_only_for_the_latest_attempt() {
        let mut session = session();
        let (channel, first, _) = bind(&join(&mut session, "1", ann()));
        let (_, second, who) = bind(&receive(&mut session, "1", "t", token("bob")));
        assert_eq!((second, who.as_str()), (first + 1, "bob"));
        assert_eq!(session.bound(channel, first, Ok(BindOutcome::default())), []);
        assert_eq!(session.unavailable(channel, first), []);
        assert_eq!(messages_of(&session.bound(channel, second, Ok(BindOutcome::default()))).len(), 2);

        // The same for a channel that is joined again or left while it is being bound.
        let (old, attempt, _) = bind(&join(&mut session, "2", ann()));
        let actions = join(&mut session, "3", ann());
        assert_eq!(messages_of(&actions), ["2 closed", "bind"]);
        let (new, ..) = bind(&actions);
        assert_ne!(old, new);
        assert_eq!(session.bound(old, attempt, Ok(BindOutcome::default())), []);
        let left = receive(&mut session, "3", "t", ClientRequest::Leave);
        assert_eq!(messages_of(&left), ["3 left", "3 closed"]);
        assert_eq!(session.bound(new, 1, Ok(BindOutcome::default())), []);
    }

    #[test]
    fn a_refusal_follows_the_join_or_fails_it() {
        let refusal = || Err(SubscribeError::Other("no".to_owned()));
        let mut session = session();
        let (channel, attempt, _) = bind(&join(&mut session, "1", ann()));
        let actions = session.bound(channel, attempt, refusal());
        assert_eq!(messages_of(&actions), ["1 joined", "1 not subscribed: no", "listen"]);
        assert_eq!(session.channel_count(), 1);

        let (channel, attempt, _) = bind(&join(&mut session, "2", Join { waits: true, ..ann() }));
        let actions = session.bound(channel, attempt, refusal());
        assert_eq!(messages_of(&actions), ["2 refused: RealtimeDisabledForConfiguration: no"]);
        assert_eq!(session.channel_count(), 0);

        let unreadable = joining(&json!([{}]), Some("ann"));
        let actions = join(&mut session, "3", Join { waits: true, ..unreadable });
        assert!(
            messages_of(&actions)[0]
                .starts_with("3 refused: RealtimeDisabledForConfiguration: No subscription")
        );
        assert_eq!(session.channel_count(), 0);
    }

    #[test]
    fn a_refused_entry_does_not_affect_the_others_and_is_reported_each_time() {
        let refused = |texts: &[&str]| {
            let refusals = texts.iter().map(|text| SubscribeError::Other((*text).to_owned())).collect();
            BindOutcome { refusals, ..BindOutcome::default() }
        };
        let mut session = session();
        let entries = joining(&json!([{"table": "todos"}, {}, {"table": "others"}]), Some("ann"));
        let (channel, attempt, _) = bind(&join(&mut session, "1", entries));
        let actions = session.bound(channel, attempt, Ok(refused(&["others", "others"])));
        let malformed = "No subscription params provided. Please provide at least a `schema` or `table` to subscribe to: {}";
        let no = format!("join: 1 not subscribed: {malformed}");
        assert_eq!(messages_of(&actions), ["1 joined", &no, "join: 1 not subscribed: others"]);
        let (_, attempt, _) = bind(&session.rebind(channel));
        assert_eq!(messages_of(&session.bound(channel, attempt, Ok(BindOutcome::default()))), [no]);

        let waiting = Join { waits: true, ..joining(&json!([{"table": "todos"}]), Some("ann")) };
        let (channel, attempt, _) = bind(&join(&mut session, "2", waiting));
        let actions = session.bound(channel, attempt, Ok(refused(&["others"])));
        assert_eq!(messages_of(&actions), ["2 refused: RealtimeDisabledForConfiguration: others"]);
    }

    #[test]
    fn a_client_joins_again_when_postgresql_is_unavailable() {
        let mut joining = session();
        let (channel, attempt, _) = bind(&join(&mut joining, "1", ann()));
        let actions = joining.unavailable(channel, attempt);
        assert_eq!(messages_of(&actions), [format!("1 refused: {UNAVAILABLE}")]);
        assert_eq!(joining.channel_count(), 0);

        let (mut session, channel) = delivering();
        let (_, attempt, _) = bind(&receive(&mut session, "1", "t", token("bob")));
        let actions = session.unavailable(channel, attempt);
        let failed = [format!("leave: 1 error: {UNAVAILABLE}"), "leave: 1 failed".to_owned()];
        assert_eq!(messages_of(&actions), failed);
        assert_eq!(session.channel_count(), 0);
    }
}
