//! A token as text: its parts before they are verified, its signature, and why it is refused.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, DecodingKey, crypto};
use serde_json::{Map, Value};

use crate::auth::jwks::algorithm_of;
use crate::model::identity::claims::{ClaimsError, TokenRefusal};

/// Maximum length of a token in bytes. HTTP servers commonly accept about 16 KiB of headers, so longer tokens are not genuine.
const MAX_TOKEN_BYTES: usize = 64 * 1024;

/// Why a token is refused. The text is for the client and reveals nothing that the client does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// No token was given.
    #[error("The token provided is not a valid JWT")]
    Missing,
    /// Not a JWT.
    #[error("The token provided is not a valid JWT")]
    Malformed,
    /// Not signed by any of the candidate keys.
    #[error("Failed to validate JWT signature")]
    BadSignature,
    /// Its algorithm is `none` or unknown, or no key fits its algorithm and `kid`.
    #[error("Failed to generate JWT signer, check your JWT secret or JWKS configuration")]
    Signer,
    /// No role, or no expiry.
    #[error("Fields `role` and `exp` are required in JWT")]
    MissingFields,
    /// The expiry is not a number.
    #[error("Token expiration time is invalid")]
    BadExpiry,
    /// It has expired.
    #[error("Token has expired {seconds_ago} seconds ago")]
    Expired {
        /// Seconds since the expiry.
        seconds_ago: u64,
    },
    /// Not yet valid, or issued by or for another party.
    #[error("Token claims are not accepted")]
    Refused,
}

impl TokenError {
    /// Returns the text for a handshake. It omits the time since the expiry, and calls a missing credential an API key.
    pub fn connect_text(&self) -> String {
        match self {
            Self::Expired { .. } => "Token has expired".to_owned(),
            Self::Missing => "API key is missing".to_owned(),
            other => other.to_string(),
        }
    }

    /// Returns what to do, where the text alone does not say it.
    pub fn advice(&self) -> Option<&'static str> {
        match self {
            Self::Missing => Some("give a token by the header `Authorization: Bearer …`, or by &apikey=…"),
            Self::BadSignature => Some(
                "the secret or key that signed it is not this relay's: relay token --sub UUID makes one with the secret of RELAY_JWT_SECRET",
            ),
            Self::Expired { .. } => {
                Some("get another one from its issuer; for a trial, relay token --sub UUID makes one")
            }
            _ => None,
        }
    }

    /// Returns the text for a handshake with advice on what to do.
    pub fn advised_text(&self) -> String {
        let advice = self.advice().map_or_else(String::new, |advice| format!(": {advice}"));
        self.connect_text() + &advice
    }

    /// Returns the code that precedes the text in the reason of a refused join.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Missing | Self::Malformed => "MalformedJWT",
            Self::BadSignature => "JwtSignatureError",
            Self::Signer => "JwtSignerError",
            Self::MissingFields | Self::BadExpiry | Self::Expired { .. } | Self::Refused => "InvalidJWTToken",
        }
    }

    /// Returns the reason of a refused join.
    pub fn join_reason(&self) -> String {
        format!("{}: {self}", self.code())
    }
}

impl From<ClaimsError> for TokenError {
    fn from(error: ClaimsError) -> Self {
        match error {
            ClaimsError::Malformed => Self::Malformed,
            ClaimsError::MissingFields => Self::MissingFields,
            ClaimsError::BadExpiry => Self::BadExpiry,
        }
    }
}

impl From<TokenError> for TokenRefusal {
    fn from(error: TokenError) -> Self {
        Self { code: error.code(), text: error.to_string() }
    }
}

/// The parts of a token, not verified.
pub struct TokenParts<'a> {
    /// The signed text: encoded header and payload.
    message: &'a str,
    payload: &'a str,
    signature: &'a str,
    header: Map<String, Value>,
    /// `None` if the algorithm is not supported.
    pub algorithm: Option<Algorithm>,
}

impl<'a> TokenParts<'a> {
    /// Splits a token.
    ///
    /// # Errors
    /// When it is no token.
    pub fn of(token: &'a str) -> Result<Self, TokenError> {
        if token.is_empty() {
            return Err(TokenError::Missing);
        }
        if token.len() > MAX_TOKEN_BYTES {
            return Err(TokenError::Malformed);
        }
        let (message, signature) = token.rsplit_once('.').ok_or(TokenError::Malformed)?;
        let (header, payload) = message.split_once('.').ok_or(TokenError::Malformed)?;
        let header = decode_part(header)?;
        let header: Map<String, Value> =
            serde_json::from_slice(&header).map_err(|_| TokenError::Malformed)?;
        // A token with an unsupported critical extension must be refused, and none is supported.
        if payload.contains('.') || header.contains_key("crit") {
            return Err(TokenError::Malformed);
        }
        let Some(Value::String(name)) = header.get("alg") else {
            return Err(TokenError::Malformed);
        };
        let algorithm = algorithm_of(name);
        Ok(Self { message, payload, signature, header, algorithm })
    }

    /// Returns the id of the key that it names.
    pub fn kid(&self) -> Option<&str> {
        self.header.get("kid").and_then(Value::as_str)
    }

    /// Checks that the signature can be decoded.
    ///
    /// # Errors
    /// When it cannot.
    pub fn check_signature(&self) -> Result<(), TokenError> {
        decode_part(self.signature).map(drop)
    }

    /// Whether this key signed it.
    pub fn is_signed_by(&self, key: &DecodingKey, algorithm: Algorithm) -> bool {
        crypto::verify(self.signature, self.message.as_bytes(), key, algorithm).unwrap_or(false)
    }

    /// Returns the decoded payload.
    ///
    /// # Errors
    /// When it is no text.
    pub fn payload(&self) -> Result<String, TokenError> {
        String::from_utf8(decode_part(self.payload)?).map_err(|_| TokenError::Malformed)
    }
}

fn decode_part(part: &str) -> Result<Vec<u8>, TokenError> {
    URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenError::Malformed)
}
