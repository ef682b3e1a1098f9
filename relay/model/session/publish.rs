//! What the channels of a session send to their topics: broadcasts, and what they track.

use crate::model::session::action::Action;
use crate::model::session::broadcast::Broadcast;
use crate::model::session::machine::{Session, refusal_if_expected};
use crate::model::session::message::{Origin, Response};

impl Session {
    /// Sends a broadcast of a joined channel, also of one whose join is not answered yet.
    pub(super) fn broadcast(&self, origin: Origin, broadcast: Broadcast) -> Vec<Action> {
        let Some(channel) = self.channels.get(&origin.channel.topic) else { return Vec::new() };
        let (acknowledges, is_private) = (channel.acknowledges, channel.private.is_some());
        if channel.private.as_ref().is_some_and(|private| !private.may_write().broadcast) {
            let refusal = acknowledges.then(|| Action::Send(origin.reply(Response::MayNotSend)));
            return refusal.into_iter().collect();
        }
        vec![Action::Broadcast { channel: channel.id, origin, broadcast, acknowledges, is_private }]
    }

    /// Changes what a joined channel tracks.
    pub(super) fn track(&self, origin: Origin, object: Option<String>) -> Vec<Action> {
        let Some(channel) = self.channels.get(&origin.channel.topic) else { return Vec::new() };
        if !channel.is_answered() {
            return refusal_if_expected(
                &origin,
                "The channel is not joined yet, wait for the reply to its join",
            );
        }
        // A member may end its presence without any right.
        let tracks = object.is_some();
        if tracks && channel.private.as_ref().is_some_and(|private| !private.may_write().presence) {
            return vec![Action::Send(origin.reply(Response::MayNotTrack))];
        }
        vec![Action::Track { channel: channel.id, origin, object }]
    }
}

#[cfg(test)]
mod tests {
    use crate::model::session::message::ClientRequest;
    use crate::model::session::test_session::{
        ann, broadcast, delivering, join, messages_of, receive, session,
    };

    #[test]
    fn a_joined_channel_broadcasts_and_tracks_once_its_join_is_answered() {
        let (mut joined, _) = delivering();
        let mut answer = |request| messages_of(&receive(&mut joined, "1", "t", request));
        assert_eq!(answer(broadcast()), ["broadcast"]);
        assert_eq!(answer(ClientRequest::Track(String::from("{}"))), [r#"track Some("{}")"#]);
        assert_eq!(answer(ClientRequest::Untrack), ["track None"]);
        assert_eq!(answer(ClientRequest::Invalid("no")), ["1 refused: no"]);
        let mut waiting = session();
        join(&mut waiting, "1", ann());
        assert_eq!(messages_of(&receive(&mut waiting, "1", "t", broadcast())), ["broadcast"]);
        let refused = messages_of(&receive(&mut waiting, "1", "t", ClientRequest::Untrack));
        assert!(refused[0].starts_with("1 refused: The channel is not joined yet"), "{refused:?}");
    }
}
