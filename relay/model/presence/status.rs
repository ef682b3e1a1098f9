//! Whose status the relay writes, and what it writes.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::model::identity::claims::Claims;

/// Maximum length of a user's id in bytes. Longer ones have no status: they would fill the memory.
const MAX_ID_BYTES: usize = 255;
/// The role whose tokens have no status: it stands for servers.
const SERVICE_ROLE: &str = "service_role";

/// The settings of the status.
#[derive(Debug, Clone)]
pub struct StatusSettings {
    /// Minimum interval between two writes of a user's activity.
    pub throttle: Duration,
    /// Interval between two sweeps.
    pub sweep: Duration,
    /// After this time without activity a user without connection is offline.
    pub silence: Duration,
    /// Maximum number of remembered users without a connection.
    pub cache: usize,
    /// The claim with the id of an anonymous participant.
    pub anonymous_claim: String,
}

impl StatusSettings {
    /// Returns the time after which a relay that was not seen is dead.
    pub fn lease(&self) -> Duration {
        self.sweep * 2
    }
}

/// A user or anonymous participant.
#[derive(Clone, PartialEq, Eq)]
pub struct Participant {
    /// The id, as the status table has it.
    pub id: Arc<str>,
    /// Whether the participant is not registered.
    pub is_anonymous: bool,
}

impl Participant {
    /// Returns whose claims these are: the subject, else the participant that `anonymous_claim` names.
    pub fn of(claims: &Claims, anonymous_claim: &str) -> Option<Self> {
        if claims.role() == SERVICE_ROLE {
            return None;
        }
        let is_id = |id: &&str| !id.is_empty() && id.len() <= MAX_ID_BYTES && !id.contains('\0');
        let fields: Map<String, Value> = serde_json::from_str(claims.json()).ok()?;
        let text = |name: &str| fields.get(name).and_then(Value::as_str).filter(is_id);
        match claims.sub() {
            Some(sub) => {
                let is_anonymous = fields.get("is_anonymous") == Some(&Value::Bool(true));
                Some(sub).filter(is_id).map(|id| Self { id: id.into(), is_anonymous })
            }
            None => text(anonymous_claim).map(|id| Self { id: id.into(), is_anonymous: true }),
        }
    }
}

impl fmt::Debug for Participant {
    /// Hides the id, which is personal data.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Participant").finish_non_exhaustive()
    }
}

/// The status of a participant, to be written.
#[derive(Clone)]
pub struct StatusUpdate {
    /// Whose it is.
    pub participant: Participant,
    /// Whether the participant is connected to this relay.
    pub is_here: bool,
    /// Whether the participant is connected here, or was active since the last connection ended.
    pub is_online: bool,
    /// Time since the last activity.
    pub age: Duration,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn users_and_anonymous_participants_have_a_status_and_servers_have_none() {
        let of = |claims: Value| {
            let mut claims = claims;
            claims["exp"] = json!(9);
            let claims = Claims::from_verified_payload(&claims.to_string()).unwrap();
            Participant::of(&claims, "participantId").map(|found| (found.id.to_string(), found.is_anonymous))
        };
        let is = |id: &str, anonymous| Some((id.to_owned(), anonymous));
        assert_eq!(of(json!({"role": "authenticated", "sub": "a"})), is("a", false));
        assert_eq!(of(json!({"role": "authenticated", "sub": "a", "participantId": "b"})), is("a", false));
        assert_eq!(of(json!({"role": "authenticated", "sub": "a", "is_anonymous": true})), is("a", true));
        assert_eq!(of(json!({"role": "anon", "participantId": "b"})), is("b", true));
        for none in [
            json!({"role": "anon"}),
            json!({"role": "anon", "participantId": 7}),
            json!({"role": "anon", "participantId": ""}),
            json!({"role": "anon", "participantId": "x".repeat(256)}),
            json!({"role": "anon", "sub": ""}),
            json!({"role": "authenticated", "sub": "x".repeat(256)}),
            json!({"role": "anon", "participantId": "a\0b"}),
            json!({"role": "service_role", "sub": "a"}),
        ] {
            assert_eq!(of(none.clone()), None, "{none}");
        }
    }
}
