//! The tokens of a session: the identity of a join, new tokens of a channel, expiry, and withdrawn keys.

use crate::model::identity::claims::{Claims, TokenRefusal, Tokens};
use crate::model::policy::visibility::Identity;
use crate::model::session::action::Action;
use crate::model::session::join::MAX_JOIN_BYTES;
use crate::model::session::machine::Session;

impl Session {
    /// Returns the earliest expiry of the channels' tokens, in Unix seconds.
    pub fn next_expiry(&self) -> Option<u64> {
        self.channels.values().map(|channel| channel.identity.claims().expires_at()).min()
    }

    /// Closes the channels whose token has expired at `now`, in Unix seconds.
    pub fn expire(&mut self, now: u64) -> Vec<Action> {
        self.close_where(|claims| {
            let seconds_ago = now.checked_sub(claims.expires_at())?;
            Some(expired_text(seconds_ago))
        })
    }

    /// Closes the channels whose token was signed by a withdrawn key. Called when the keys change.
    pub fn recheck(&mut self, tokens: &impl Tokens) -> Vec<Action> {
        self.close_where(|claims| tokens.recheck(claims).err().map(|refusal| refusal.text))
    }

    /// Returns the identity of a new channel: that of the token in the join, else the connection's own.
    pub(super) fn identity(
        &self,
        token: Option<&str>,
        now: u64,
        tokens: &impl Tokens,
    ) -> Result<Identity, TokenRefusal> {
        if let Some(token) = token {
            return tokens.verify(token).map(Identity::new);
        }
        tokens.recheck(self.connection_identity.claims())?;
        let expires_at = self.connection_identity.claims().expires_at();
        if expires_at <= now {
            return Err(TokenRefusal { code: "InvalidJWTToken", text: expired_text(now - expires_at) });
        }
        Ok(self.connection_identity.clone())
    }

    /// Binds a channel to the identity of a new token. Closes it if the token is not valid.
    pub(super) fn access_token(&mut self, topic: &str, token: &str, tokens: &impl Tokens) -> Vec<Action> {
        if token.len() > MAX_JOIN_BYTES {
            return self.close(topic, "Token is too long");
        }
        let claims = match tokens.verify(token) {
            Ok(claims) => claims,
            Err(refusal) => return self.close(topic, &refusal.text),
        };
        let Some(channel) = self.channels.get_mut(topic) else { return Vec::new() };
        let identity = Identity::new(claims);
        if identity == channel.identity {
            return Vec::new();
        }
        channel.identity = identity;
        channel.bytes = channel.bytes.max(token.len());
        if let Some(private) = &mut channel.private {
            private.renew();
            // What is being bound was asked for by the former token.
            channel.attempt += 1;
            return channel.judge(false).into_iter().collect();
        }
        channel.renew()
    }

    /// Closes the channels for whose claims `objection` returns a reason.
    fn close_where(&mut self, objection: impl Fn(&Claims) -> Option<String>) -> Vec<Action> {
        let channels = self.channels.iter();
        let affected = channels
            .filter_map(|(topic, channel)| Some((topic.clone(), objection(channel.identity.claims())?)));
        let affected: Vec<_> = affected.collect();
        affected.iter().flat_map(|(topic, text)| self.close(topic, text)).collect()
    }
}

fn expired_text(seconds_ago: u64) -> String {
    format!("Token has expired {seconds_ago} seconds ago")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::identity::claims::KeyId;
    use crate::model::session::message::ClientRequest;
    use crate::model::session::test_session::{
        MAX_CHANNELS, TestTokens, bind, claims, delivering, join, joining, messages_of, receive, session,
        todos, token,
    };
    use crate::model::subscription::error::SubscribeError;

    fn joins(session: &mut Session, reference: &str, topic: &str, token: Option<&str>) -> Vec<Action> {
        let join = Box::new(joining(&todos(), token));
        receive(session, reference, topic, ClientRequest::Join(join))
    }

    #[test]
    fn a_refusal_of_new_claims_ends_delivery_and_keeps_the_channel() {
        let (mut session, channel) = delivering();
        let (_, attempt, _) = bind(&receive(&mut session, "1", "t", token("bob")));
        let actions = session.bound(channel, attempt, Err(SubscribeError::Other("no".to_owned())));
        assert_eq!(messages_of(&actions), ["leave: 1 not subscribed: no", "listen"]);
        assert_eq!(session.channel_count(), 1);
        assert_eq!(messages_of(&session.end()), ["leave"]);
    }

    #[test]
    fn a_token_with_the_same_claims_or_without_claims_does_nothing() {
        let (mut session, _) = delivering();
        for request in [token("ann"), ClientRequest::AccessToken(None)] {
            assert_eq!(receive(&mut session, "1", "t", request), []);
        }
    }

    #[test]
    fn a_token_that_is_too_long_ends_the_channel() {
        let (mut session, _) = delivering();
        let long = "x".repeat(MAX_JOIN_BYTES + 1);
        let actions = receive(&mut session, "1", "t", token(&long));
        assert_eq!(messages_of(&actions), ["leave: 1 error: Token is too long", "leave: 1 closed"]);
    }

    #[test]
    fn a_channel_ends_with_its_token_and_no_other_does() {
        let mut session = session();
        assert_eq!(session.next_expiry(), None);
        for (n, token) in [Some("ann:2000"), Some("bob:3000"), None].into_iter().enumerate() {
            let join = Box::new(joining(&json!([]), token));
            receive(&mut session, &n.to_string(), &format!("{n}"), ClientRequest::Join(join));
        }
        assert_eq!(session.next_expiry(), Some(2000));
        assert_eq!(session.expire(1999), []);
        let ended = session.expire(2000);
        assert_eq!(messages_of(&ended), ["0 error: Token has expired 0 seconds ago", "0 closed", "leave"]);
        assert_eq!(session.next_expiry(), Some(3000));
        let ended = session.expire(3007);
        assert_eq!(messages_of(&ended), ["1 error: Token has expired 7 seconds ago", "1 closed", "leave"]);
        assert_eq!(session.next_expiry(), Some(9000), "the connection's own");
    }

    #[test]
    fn a_join_has_the_connections_identity_unless_it_shows_another() {
        let mut session = session();
        for (token, expected) in [(None, "own"), (Some("ann"), "ann")] {
            let (.., who) = bind(&joins(&mut session, "1", "t", token));
            assert_eq!(who, expected);
        }
        let mut late = Session::new(7, claims("own", 900), MAX_CHANNELS);
        let actions = joins(&mut late, "1", "t", None);
        let refused = "1 refused: InvalidJWTToken: Token has expired 100 seconds ago";
        assert_eq!(messages_of(&actions), [refused]);
    }

    #[test]
    fn channels_of_a_withdrawn_key_are_closed_and_not_joined_again() {
        let withdrawn = || Identity::new(claims("own", 9000).signed_by(Some(KeyId(7))));
        let mut session = Session::new(7, claims("own", 9000), MAX_CHANNELS);
        join(&mut session, "1", joining(&todos(), Some("ann")));
        // It has the connection's claims, whose key was valid when it joined.
        joins(&mut session, "2", "own", None);
        session.connection_identity = withdrawn();
        assert_eq!(session.recheck(&TestTokens), []);
        let refused = joins(&mut session, "3", "own", None);
        assert_eq!(messages_of(&refused), ["2 closed", "3 refused: JwtSignerError: no key"]);
        let channel = session.channels.get_mut("t").unwrap();
        channel.identity = Identity::new(claims("ann", 5000).signed_by(Some(KeyId(7))));
        assert_eq!(messages_of(&session.recheck(&TestTokens)), ["1 error: no key", "1 closed"]);
        assert_eq!(session.channel_count(), 0);
    }
}
