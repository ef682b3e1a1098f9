//! Verified claims: the identity of a subscriber, with the payload kept exactly as in its token.

use std::fmt;
use std::sync::Arc;

use serde_json::{Map, Value};

/// The last second of the year 9999. A later expiry is clamped to it, so that date conversions and additions cannot overflow.
pub const LATEST_EXPIRY: u64 = 253_402_300_799;

/// The claims of one verified token.
///
/// Claims are equal if their payloads are the same text and the same key signed them.
#[derive(Clone)]
pub struct Claims {
    role: String,
    expires_at: u64,
    json: Arc<str>,
    sub: Option<String>,
    key: Option<KeyId>,
}

/// The id of a signing key that may be withdrawn. Equal keys have equal ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyId(pub u64);

/// Why a verified payload is not valid claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClaimsError {
    /// Not a JSON object.
    #[error("the payload is not a JSON object")]
    Malformed,
    /// No role, or no expiry.
    #[error("Fields `role` and `exp` are required in JWT")]
    MissingFields,
    /// The expiry is not a number.
    #[error("Token expiration time is invalid")]
    BadExpiry,
}

/// Verifies tokens.
pub trait Tokens {
    /// Returns the claims of a token that is valid now.
    ///
    /// # Errors
    /// If it is not valid, with the text for the client.
    fn verify(&self, token: &str) -> Result<Claims, TokenRefusal>;

    /// Checks that the key that signed these claims was not withdrawn.
    ///
    /// # Errors
    /// If it was withdrawn, with the text for the client.
    fn recheck(&self, claims: &Claims) -> Result<(), TokenRefusal>;
}

/// Why a token is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRefusal {
    /// The code of a refused join (`InvalidJWTToken`).
    pub code: &'static str,
    /// The text.
    pub text: String,
}

impl Claims {
    /// Parses the payload of a token. The caller must have verified the signature.
    pub fn from_verified_payload(json: &str) -> Result<Self, ClaimsError> {
        let fields: Map<String, Value> = serde_json::from_str(json).map_err(|_| ClaimsError::Malformed)?;
        // PostgreSQL text cannot contain a null character: as a name it would fail every query that uses it.
        let text = |name: &str| fields.get(name).and_then(Value::as_str).filter(|text| !text.contains('\0'));
        let role = text("role").filter(|role| !role.is_empty());
        let exp = fields.get("exp").filter(|exp| !exp.is_null());
        let (Some(role), Some(exp)) = (role, exp) else {
            return Err(ClaimsError::MissingFields);
        };
        Ok(Self {
            role: role.to_owned(),
            expires_at: exp.as_f64().map(whole_second).ok_or(ClaimsError::BadExpiry)?,
            json: Arc::from(json),
            sub: text("sub").map(str::to_owned),
            key: None,
        })
    }

    /// Sets the signing key, if it may be withdrawn.
    pub fn signed_by(self, key: Option<KeyId>) -> Self {
        Self { key, ..self }
    }

    /// Returns the database role to act as. Whether it may be used is checked elsewhere.
    pub fn role(&self) -> &str {
        &self.role
    }

    /// Returns the expiry in Unix seconds.
    pub fn expires_at(&self) -> u64 {
        self.expires_at
    }

    /// Returns the payload exactly as in the token.
    pub fn json(&self) -> &Arc<str> {
        &self.json
    }

    /// Returns the payload re-encoded without escapes, so that every character appears as itself.
    pub fn plain(&self) -> String {
        serde_json::from_str::<Value>(&self.json)
            .map_or_else(|_| self.json.to_string(), |json| json.to_string())
    }

    /// Returns the signing key, if it may be withdrawn.
    pub fn key(&self) -> Option<KeyId> {
        self.key
    }

    /// Returns the subject, if the token has one that is a string.
    pub fn sub(&self) -> Option<&str> {
        self.sub.as_deref()
    }
}

impl PartialEq for Claims {
    fn eq(&self, other: &Self) -> bool {
        self.json == other.json && self.key == other.key
    }
}

impl Eq for Claims {}

impl std::hash::Hash for Claims {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.json.hash(state);
    }
}

impl fmt::Debug for Claims {
    /// Hides the claims: they are personal data, and a derived `Debug` would write them into logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Claims").finish_non_exhaustive()
    }
}

/// Rounds to whole seconds. Times before 1970 become 0.
fn whole_second(seconds: f64) -> u64 {
    // The cast saturates.
    (seconds.round() as u64).min(LATEST_EXPIRY)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(json: &str, expected: Result<(&str, u64, Option<&str>), ClaimsError>) {
        let found = Claims::from_verified_payload(json);
        let found = found.as_ref().map(|c| (c.role(), c.expires_at(), c.sub())).map_err(|e| *e);
        assert_eq!(found, expected, "{json}");
    }

    #[test]
    fn role_expiry_and_subject_are_read() {
        check(
            r#"{"role":"authenticated","exp":1800000000,"sub":"u1"}"#,
            Ok(("authenticated", 1_800_000_000, Some("u1"))),
        );
        check(r#"{"exp":1,"role":"anon"}"#, Ok(("anon", 1, None)));
        check(r#"{"exp":1,"role":"anon","sub":7}"#, Ok(("anon", 1, None)));
    }

    #[test]
    fn fractions_are_rounded_and_extremes_are_clamped() {
        check(r#"{"role":"a","exp":10.4}"#, Ok(("a", 10, None)));
        check(r#"{"role":"a","exp":10.5}"#, Ok(("a", 11, None)));
        check(r#"{"role":"a","exp":-5}"#, Ok(("a", 0, None)));
        check(r#"{"role":"a","exp":1e300}"#, Ok(("a", LATEST_EXPIRY, None)));
    }

    #[test]
    fn missing_claims_and_wrong_types_are_refused() {
        check(r#"{"exp":1}"#, Err(ClaimsError::MissingFields));
        check(r#"{"role":"a"}"#, Err(ClaimsError::MissingFields));
        check(r#"{"role":"","exp":1}"#, Err(ClaimsError::MissingFields));
        check(r#"{"role":["a"],"exp":1}"#, Err(ClaimsError::MissingFields));
        check(r#"{"role":"a\u0000","exp":1}"#, Err(ClaimsError::MissingFields));
        check(r#"{"role":"a","exp":null}"#, Err(ClaimsError::MissingFields));
        check(r#"{"role":"a","exp":"1"}"#, Err(ClaimsError::BadExpiry));
        check(r#"{"role":"a","exp":true}"#, Err(ClaimsError::BadExpiry));
        for json in
            ["", "null", "[]", "\"a\"", "{", r#"{"role":"a","exp":1e999}"#, r#"{"role":"a","exp":1} x"#]
        {
            check(json, Err(ClaimsError::Malformed));
        }
    }

    #[test]
    fn the_payload_is_kept_unchanged_and_never_printed() {
        let json = "{ \"exp\": 99,\n\"role\":\"a\", \"n\":1.50, \"email\":\"canary@example.org\" }";
        let claims = Claims::from_verified_payload(json).unwrap();
        assert_eq!(&**claims.json(), json);
        assert_eq!(format!("{claims:?}"), "Claims { .. }");
    }

    proptest! {
        #[test]
        fn no_text_panics(json in "\\PC*") {
            let _ = Claims::from_verified_payload(&json);
        }

        #[test]
        fn whole_expiries_pass_unchanged(exp in 0..LATEST_EXPIRY, role in "[a-z_]{1,20}") {
            let claims = Claims::from_verified_payload(&format!(r#"{{"role":"{role}","exp":{exp}}}"#)).unwrap();
            prop_assert_eq!((claims.role(), claims.expires_at()), (role.as_str(), exp));
        }
    }
}
