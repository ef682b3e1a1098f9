//! Verification of tokens and API keys. Only a verified token becomes claims.

use std::fmt;
use std::future::pending;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jsonwebtoken::{Algorithm, AlgorithmFamily, DecodingKey, EncodingKey, Header};
use serde_json::{Map, Value};
use tokio::sync::watch;

use crate::auth::jwks::{KeySet, ShortSecret, checked_secret};
use crate::auth::jwks_refresh::PublishedKeys;
use crate::auth::token::{TokenError, TokenParts};
use crate::model::identity::claims::{Claims, KeyId, LATEST_EXPIRY, TokenRefusal, Tokens};

/// Allowed clock difference between issuer and relay, in seconds. PostgREST allows the same.
const LEEWAY: f64 = 30.0;

/// The secrets, keys and expected claims that tokens are verified with.
#[derive(Clone, Default)]
pub struct TokenSettings {
    /// Secrets for HS256, HS384 and HS512; more than one during a rotation.
    pub secrets: Vec<String>,
    /// Keys of a JWK set.
    pub keys: Option<Arc<PublishedKeys>>,
    /// Expected audience: `aud` must be it or contain it.
    pub audience: Option<String>,
    /// Expected issuer (`iss`).
    pub issuer: Option<String>,
    /// Opaque API keys of the role `anon`.
    pub publishable_keys: Vec<String>,
    /// Opaque API keys of the role `service_role`.
    pub secret_keys: Vec<String>,
}

/// Why settings cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// A secret is too short.
    #[error(transparent)]
    ShortSecret(#[from] ShortSecret),
    /// There is no secret and no key.
    #[error("there is no JWT secret, no usable JWK and no opaque key")]
    NoKeys,
    /// These claims cannot be signed.
    #[error("the claims can't be signed")]
    Unsignable,
}

/// Verifies tokens with the keys of one configuration.
pub struct Verifier {
    secrets: Vec<DecodingKey>,
    keys: Arc<PublishedKeys>,
    audience: Option<String>,
    issuer: Option<String>,
    opaque_keys: Vec<(String, Claims)>,
}

impl Verifier {
    /// Creates a verifier.
    ///
    /// # Errors
    /// If a secret is too short, or there are no keys and none can be loaded later.
    pub fn new(settings: &TokenSettings) -> Result<Self, SettingsError> {
        let mut secrets = Vec::new();
        for secret in &settings.secrets {
            secrets.push(DecodingKey::from_secret(checked_secret(secret.as_bytes())?));
        }
        let keys = settings.keys.clone().unwrap_or_else(|| Arc::new(PublishedKeys::fixed(KeySet::default())));
        let mut opaque_keys = Vec::new();
        for (role, keys) in [("anon", &settings.publishable_keys), ("service_role", &settings.secret_keys)] {
            let keys = keys.iter().filter(|key| !key.is_empty());
            opaque_keys.extend(keys.map(|key| (key.clone(), role_claims(role))));
        }
        if secrets.is_empty() && opaque_keys.is_empty() && keys.is_empty() {
            return Err(SettingsError::NoKeys);
        }
        Ok(Self {
            secrets,
            keys,
            audience: settings.audience.clone(),
            issuer: settings.issuer.clone(),
            opaque_keys,
        })
    }

    /// Returns the unusable keys of the JWK set, each with the reason.
    pub fn skipped_keys(&self) -> Vec<String> {
        self.keys.current().skipped().to_vec()
    }

    /// Requests a refresh of the JWK set if the token's key is not in it. The future completes when the refresh was attempted.
    /// `None` if there is nothing to wait for: a key fits, or the last such refresh was a short time ago.
    pub fn refresh_for(&self, token: &str) -> Option<impl Future<Output = ()> + Send + use<>> {
        if !self.keys.is_refreshed() {
            return None;
        }
        let parts = TokenParts::of(token.trim()).ok()?;
        let (published, algorithm, kid) = (self.keys.current(), parts.algorithm?, parts.kid());
        if published.has_kid(kid) || !self.candidates(&published, algorithm, kid).is_empty() {
            return None;
        }
        self.keys.refresh()
    }

    /// Completes when the key that signed these claims is withdrawn. Never completes if it cannot be.
    pub async fn withdrawn(&self, claims: &Claims) {
        let mut keys = self.keys.follow();
        let is_gone = |keys: &Arc<KeySet>| claims.key().is_some_and(|id| !keys.contains(id));
        if keys.wait_for(is_gone).await.is_err() {
            pending::<()>().await;
        }
    }

    /// Returns a receiver of changes of the JWK set. On each change, call [`recheck`](Tokens::recheck).
    pub fn follow_keys(&self) -> watch::Receiver<Arc<KeySet>> {
        self.keys.follow()
    }

    /// Returns the claims of an opaque API key or a token.
    pub fn identify(&self, key: &str, now_unix: u64) -> Result<Claims, TokenError> {
        let key = key.trim();
        match self.opaque_keys.iter().find(|(known, _)| same_secret(known, key)) {
            Some((_, claims)) => Ok(claims.clone()),
            None => self.verify(key, now_unix),
        }
    }

    /// Returns the claims of a token that is signed by a known key, in force, and issued by and for the expected parties.
    pub fn verify(&self, token: &str, now_unix: u64) -> Result<Claims, TokenError> {
        let parts = TokenParts::of(token.trim())?;
        let algorithm = parts.algorithm.ok_or(TokenError::Signer)?;
        let published = self.keys.current();
        let candidates = self.candidates(&published, algorithm, parts.kid());
        if candidates.is_empty() {
            return Err(TokenError::Signer);
        }
        parts.check_signature()?;
        let mut candidates = candidates.into_iter();
        let signer = candidates.find(|(_, key)| parts.is_signed_by(key, algorithm));
        let (id, _) = signer.ok_or(TokenError::BadSignature)?;
        let payload = parts.payload()?;
        let claims = Claims::from_verified_payload(&payload)?.signed_by(id);
        if claims.expires_at() <= now_unix {
            let seconds_ago = now_unix - claims.expires_at();
            return Err(TokenError::Expired { seconds_ago });
        }
        self.check_claims(&payload, now_unix)?;
        Ok(claims)
    }

    /// Returns the claims of a token without a check, to explain what they would show. Never grants anything.
    ///
    /// # Errors
    /// If it is no token, or its claims are unusable.
    pub fn unverified(&self, token: &str) -> Result<Claims, TokenError> {
        let parts = TokenParts::of(token.trim())?;
        Ok(Claims::from_verified_payload(&parts.payload()?)?)
    }

    /// Returns the keys that may have signed a token with this algorithm and `kid`.
    fn candidates<'a>(
        &'a self,
        published: &'a KeySet,
        algorithm: Algorithm,
        kid: Option<&str>,
    ) -> Vec<(Option<KeyId>, &'a DecodingKey)> {
        let mut keys: Vec<_> =
            published.candidates(algorithm, kid).map(|(id, key)| (Some(id), key)).collect();
        // Issuers that sign with the shared secret may put any `kid` into the header.
        if algorithm.family() == AlgorithmFamily::Hmac && (keys.is_empty() || kid.is_none()) {
            keys.extend(self.secrets.iter().map(|key| (None, key)));
        }
        keys
    }

    /// Checks `nbf`, `iat`, `aud` and `iss`.
    fn check_claims(&self, payload: &str, now_unix: u64) -> Result<(), TokenError> {
        let claims: Map<String, Value> = serde_json::from_str(payload).map_err(|_| TokenError::Malformed)?;
        let is_past = |name| match claims.get(name) {
            None | Some(Value::Null) => true,
            Some(time) => time.as_f64().is_some_and(|time| time <= now_unix as f64 + LEEWAY),
        };
        let is_audience = self.audience.as_ref().is_none_or(|audience| match claims.get("aud") {
            Some(Value::Array(list)) => list.iter().any(|one| one == audience),
            one => one.is_some_and(|one| one == audience),
        });
        let iss = claims.get("iss").unwrap_or(&Value::Null);
        let is_issuer = self.issuer.as_ref().is_none_or(|issuer| iss == issuer);
        if !(is_past("nbf") && is_past("iat") && is_audience && is_issuer) {
            return Err(TokenError::Refused);
        }
        Ok(())
    }
}

impl Tokens for Verifier {
    fn verify(&self, token: &str) -> Result<Claims, TokenRefusal> {
        self.verify(token, now()).map_err(TokenRefusal::from)
    }

    fn recheck(&self, claims: &Claims) -> Result<(), TokenRefusal> {
        match claims.key() {
            Some(id) if !self.keys.current().contains(id) => Err(TokenError::Signer.into()),
            _ => Ok(()),
        }
    }
}

/// Returns the current time in Unix seconds. Token lifetimes are checked against the wall clock.
pub fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier").finish_non_exhaustive()
    }
}

/// Signs claims with the secret (HS256). Adds `iat` and `exp` if the claims do not have them.
///
/// # Errors
/// If the secret is too short or the claims cannot be signed.
pub fn mint(
    secret: &str,
    claims: &Map<String, Value>,
    now_unix: u64,
    ttl: Duration,
) -> Result<String, SettingsError> {
    let key = EncodingKey::from_secret(checked_secret(secret.as_bytes())?);
    let mut claims = claims.clone();
    claims.entry("iat").or_insert_with(|| Value::from(now_unix));
    let end = now_unix.saturating_add(ttl.as_secs());
    claims.entry("exp").or_insert_with(|| Value::from(end));
    jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &key).map_err(|_| SettingsError::Unsignable)
}

/// The claims of an opaque key: a role and an expiry that is never reached.
fn role_claims(role: &str) -> Claims {
    let payload = format!(r#"{{"role":"{role}","exp":{LATEST_EXPIRY}}}"#);
    Claims::from_verified_payload(&payload).expect("the payload has a role and an expiry")
}

/// Compares in constant time for two keys of the same length.
fn same_secret(known: &str, given: &str) -> bool {
    let pairs = known.bytes().zip(given.bytes());
    known.len() == given.len() && pairs.fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use jsonwebtoken::crypto;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::auth::jwks::samples::*;

    const SECRET: &str = "a secret that only tests know of, 32 bytes and more";
    const PAYLOAD: &str = r#"{"role":"authenticated","exp":2000,"sub":"u1"}"#;

    // Signatures by the private halves of the sample keys, over `PAYLOAD` with the header that `signed` makes.
    const BY_RS256: &str = "aio6RNf7SF5lNDTsImcUPrugROBh9XbJrOEx-Aw0Y4GeuTtqzom5d_vtjvave0Lst6-mZO5Z957KWxDSaIw2_o-_PnczmcTG\
        _KkQc1qV8xoYM9QmAqgC27kDWSakxvlkckbFkd8XIauoEnCpWqpUQd_KsYZ_yihrfQKiInbVckaMPzy_SwUPToKq_98as5so\
        2DHTfZ3u6JAj9P2elJe7q4I7XT-5KbvD65T8vmndRw7YXZ6lkZPheSXQpHz13WmCxqSjlM0YcTrQhlitjbwJAP9vv5598oqf\
        mdRStZ1AspPTkdZg2o9FjORPga2uJPRQs_WFlzdEXCcGw41FEDnJXg";
    const BY_PS256: &str = "k0bl0j1hSnqltGqGda8IOayzdVYNQMofvpxMGkR6k1cNm9U2HGCGd6Y8SqQ-6dsLUrkxf0HlmWft3k-tBcHTbb8tuvs_Lx7N\
        h8liCGq7o_3O3n6BkfpwauBwEzT2R2yeASz4Cq1O4Iz77Y2Kfbjl9vMj84T_Lv1_ekAVIPyOzbGOc11Haoe_ctdkbZoXLAKg\
        eVpKW6YssfCTkHPqXtD4-5W5aVQAltHA4VOmAE1-rEJuRhwRrQ1nVmu68hoq-MLByaEFR8gmv0VxhWvTDXY4idZGLZVS8GNS\
        9Mm5ZPoNoAevVF9nqDYLvd5KBoMevJuXMv7JtMlyvpXx_1qDBqyumQ";
    const BY_ES256: &str =
        "OeUcUUjCCaKFVeA6nigAbfCXcCCrBePuiBrFID0HB4Vr6oYbrAd3dpZWPVEIzTrQ567xZ7Vd0GA-ElPAX578Qg";
    const BY_ES384: &str = "mKE-Ljb8h59WN1QcGkX_um2CncTQD26SPnJoZTlZVM3-iv7bZubBHDsGlT6n8Hcry2tSRotV8o35Z18Jgq1Nv9MtCXxD-xOM\
        tYS1FcDeesw4L3ouwH2_f1_GXx9MoiV2";
    const BY_EDDSA: &str =
        "2FsXtlFejx243I_MHcWy3WajbRwaGC4sjmaGkPXEdIIzBVdlwrxwze2aF7tdMdTrnRWY0cIteLqkV6cTtzLzBg";
    const RSA_PEM: &str = "-----BEGIN PUBLIC KEY-----\n\
        MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAwifhew3NNLgNtF7wwEd2\n\
        nSR6TMhw4CANRQjHaOwHEZj0HtoJKuyF6kR/VJ5XTuNpt4d2FDvnsPYYCmc0OTLz\n\
        20xx/Z1Sklj6depZKIVh6tht9EtFUIK7PKeL1A+7gN8h/E7DdPiz4WxB7X4rdiPs\n\
        auf9AZonUmkMaSQkkmEnP6CgSyYfOinsiUejIhWFtwCTl5BzP11S8uc0v8BLxNGg\n\
        PsK3RTVx+gG0UW+4gH2ccU3PAJbq4qOdcx7cAYIGLoH25Bax9yzx2i90iFrr9Ny3\n\
        M+9+imcn/XF5xrOInoFcLiqFySr8ld9L82NCU2Ti/bQ1dS6AtaHfywJWqDz8ERKZ\n\
        ZQIDAQAB\n\
        -----END PUBLIC KEY-----\n";

    fn settings() -> TokenSettings {
        TokenSettings {
            secrets: vec![SECRET.to_owned()],
            keys: Some(Arc::new(PublishedKeys::fixed(KeySet::parse(&jwks().to_string()).unwrap()))),
            publishable_keys: vec!["sb_publishable_one".to_owned()],
            secret_keys: vec!["sb_secret_one".to_owned()],
            ..TokenSettings::default()
        }
    }

    fn encoded(header: &Value, payload: &str) -> String {
        let [header, payload] =
            [header.to_string().as_str(), payload].map(|part| URL_SAFE_NO_PAD.encode(part));
        format!("{header}.{payload}")
    }

    /// A token signed by a key of the JWK set.
    fn signed(algorithm: &str, kid: &str, signature: &str) -> String {
        format!("{}.{signature}", encoded(&json!({"alg": algorithm, "typ": "JWT", "kid": kid}), PAYLOAD))
    }

    /// A token signed by a shared secret, with any header.
    fn hashed(header: &Value, payload: &str, secret: &[u8], algorithm: Algorithm) -> String {
        let message = encoded(header, payload);
        let signature =
            crypto::sign(message.as_bytes(), &EncodingKey::from_secret(secret), algorithm).unwrap();
        format!("{message}.{signature}")
    }

    fn with_secret(payload: &str) -> String {
        hashed(&json!({"alg": "HS256"}), payload, SECRET.as_bytes(), Algorithm::HS256)
    }

    fn check(settings: &TokenSettings, token: &str, expected: Result<&str, TokenError>) {
        let found = Verifier::new(settings).unwrap().verify(token, 1000);
        assert_eq!(
            found.as_ref().map(|claims| &**claims.json()).map_err(|error| *error),
            expected,
            "{token}"
        );
    }

    fn check_payload(settings: &TokenSettings, payload: &str, expected: Result<(), TokenError>) {
        check(settings, &with_secret(payload), expected.map(|()| payload));
    }

    #[test]
    fn each_kind_of_key_verifies_its_tokens() {
        check(&settings(), &with_secret(PAYLOAD), Ok(PAYLOAD));
        for (name, algorithm) in [("HS384", Algorithm::HS384), ("HS512", Algorithm::HS512)] {
            let token = hashed(&json!({"alg": name}), PAYLOAD, SECRET.as_bytes(), algorithm);
            check(&settings(), &format!("  {token}\n"), Ok(PAYLOAD));
        }
        check(&settings(), &signed("RS256", "rsa", BY_RS256), Ok(PAYLOAD));
        check(&settings(), &signed("PS256", "rsa", BY_PS256), Ok(PAYLOAD));
        check(&settings(), &signed("ES256", "p256", BY_ES256), Ok(PAYLOAD));
        check(&settings(), &signed("ES384", "p384", BY_ES384), Ok(PAYLOAD));
        check(&settings(), &signed("EdDSA", "ed", BY_EDDSA), Ok(PAYLOAD));
        let token = hashed(&json!({"alg": "HS384", "kid": "oct"}), PAYLOAD, &[7; 48], Algorithm::HS384);
        check(&settings(), &token, Ok(PAYLOAD));
    }

    #[test]
    fn the_old_secret_is_accepted_during_a_rotation() {
        let mut settings = settings();
        settings.secrets.insert(0, "the secret that comes after the other one".to_owned());
        check(&settings, &with_secret(PAYLOAD), Ok(PAYLOAD));
    }

    #[test]
    fn a_hashed_token_of_an_unknown_kid_falls_back_to_the_secret() {
        for kid in ["gone", "rsa"] {
            let header = json!({"alg": "HS256", "kid": kid});
            let token = hashed(&header, PAYLOAD, SECRET.as_bytes(), Algorithm::HS256);
            check(&settings(), &token, Ok(PAYLOAD));
        }
    }

    #[test]
    fn a_public_key_is_no_secret() {
        let der = URL_SAFE_NO_PAD.decode(RSA_N).unwrap();
        for kid in [Value::Null, json!("rsa")] {
            for secret in [RSA_PEM.as_bytes(), RSA_PEM.trim().as_bytes(), &der, RSA_N.as_bytes()] {
                let token = hashed(&json!({"alg": "HS256", "kid": kid}), PAYLOAD, secret, Algorithm::HS256);
                check(&settings(), &token, Err(TokenError::BadSignature));
                let without_secret = TokenSettings { secrets: Vec::new(), ..settings() };
                check(&without_secret, &token, Err(TokenError::Signer));
            }
        }
    }

    #[test]
    fn the_header_chooses_no_other_family_for_a_key() {
        for algorithm in ["none", "None", "NONE", "nOnE", "", "ES512", "dir"] {
            check(&settings(), &signed(algorithm, "rsa", ""), Err(TokenError::Signer));
            check(&settings(), &signed(algorithm, "rsa", BY_RS256), Err(TokenError::Signer));
        }
        check(&settings(), &signed("RS256", "p256", BY_ES256), Err(TokenError::Signer));
        check(&settings(), &signed("ES256", "rsa", BY_RS256), Err(TokenError::Signer));
        check(&settings(), &signed("ES256", "p384", BY_ES384), Err(TokenError::Signer));
        check(&settings(), &signed("RS256", "oct", BY_RS256), Err(TokenError::Signer));
        check(&settings(), &signed("PS256", "rsa", BY_RS256), Err(TokenError::BadSignature));
        let token = hashed(&json!({"alg": "HS256", "kid": "oct"}), PAYLOAD, &[7; 48], Algorithm::HS256);
        check(&settings(), &token, Err(TokenError::BadSignature));
    }

    #[test]
    fn a_kid_names_its_key_and_no_other() {
        check(&settings(), &signed("RS256", "gone", BY_RS256), Err(TokenError::Signer));
        let nameless = format!("{}.{BY_RS256}", encoded(&json!({"alg": "RS256"}), PAYLOAD));
        check(&settings(), &nameless, Err(TokenError::Signer));
        check(&settings(), &signed("ES256", "p256", BY_EDDSA), Err(TokenError::BadSignature));
    }

    #[test]
    fn expiry_is_required_numeric_and_in_the_future() {
        let check = |payload, expected| check_payload(&settings(), payload, expected);
        check(r#"{"role":"a"}"#, Err(TokenError::MissingFields));
        check(r#"{"exp":2000}"#, Err(TokenError::MissingFields));
        check(r#"{"role":"a","exp":"2000"}"#, Err(TokenError::BadExpiry));
        check(r#"{"role":"a","exp":1000.6}"#, Ok(()));
        check(r#"{"role":"a","exp":1001}"#, Ok(()));
        check(r#"{"role":"a","exp":1000}"#, Err(TokenError::Expired { seconds_ago: 0 }));
        check(r#"{"role":"a","exp":1000.4}"#, Err(TokenError::Expired { seconds_ago: 0 }));
        check(r#"{"role":"a","exp":980}"#, Err(TokenError::Expired { seconds_ago: 20 }));
        check("[]", Err(TokenError::Malformed));
    }

    #[test]
    fn tokens_not_yet_valid_are_refused() {
        let check = |claim: &str, expected| {
            check_payload(&settings(), &format!(r#"{{"role":"a","exp":2000,{claim}}}"#), expected);
        };
        check(r#""nbf":1030,"iat":1030"#, Ok(()));
        check(r#""nbf":1031"#, Err(TokenError::Refused));
        check(r#""nbf":"0""#, Err(TokenError::Refused));
        check(r#""iat":1031"#, Err(TokenError::Refused));
        check(r#""iat":"0""#, Err(TokenError::Refused));
    }

    #[test]
    fn audience_and_issuer_are_checked_if_configured() {
        let expecting = TokenSettings {
            audience: Some("us".to_owned()),
            issuer: Some("issuer".to_owned()),
            ..settings()
        };
        let check = |claims: &str, expected| {
            let payload = format!(r#"{{"role":"a","exp":2000{claims}}}"#);
            check_payload(&settings(), &payload, Ok(()));
            check_payload(&expecting, &payload, expected);
        };
        check(r#","aud":"us","iss":"issuer""#, Ok(()));
        check(r#","aud":["them","us"],"iss":"issuer""#, Ok(()));
        check(r#","aud":"them","iss":"issuer""#, Err(TokenError::Refused));
        check(r#","aud":["them"],"iss":"issuer""#, Err(TokenError::Refused));
        check(r#","iss":"issuer""#, Err(TokenError::Refused));
        check(r#","aud":"us","iss":"other""#, Err(TokenError::Refused));
        check(r#","aud":"us","iss":["issuer"]"#, Err(TokenError::Refused));
        check(r#","aud":"us""#, Err(TokenError::Refused));
    }

    #[test]
    fn text_that_is_no_token_is_malformed() {
        check(&settings(), "", Err(TokenError::Missing));
        check(&settings(), " \n", Err(TokenError::Missing));
        let good = with_secret(PAYLOAD);
        let crit =
            hashed(&json!({"alg": "HS256", "crit": ["b64"]}), PAYLOAD, SECRET.as_bytes(), Algorithm::HS256);
        let (unsigned, _) = good.rsplit_once('.').unwrap();
        for token in [
            "garbage",
            "a.b.c",
            "..",
            "sb_publishable_one",
            &"x.".repeat(500_000),
            &"A".repeat(1_000_000),
            unsigned,
            &format!("{good}.x"),
            &format!("{good}="),
            &format!("{good}\u{e9}"),
            &crit,
            &format!("{}.AA", encoded(&json!({"kid": "rsa"}), PAYLOAD)),
            &format!("{}.AA", encoded(&json!({"alg": 256}), PAYLOAD)),
            &format!("{}.AA", encoded(&json!(["HS256"]), PAYLOAD)),
        ] {
            check(&settings(), token, Err(TokenError::Malformed));
        }
        check(&settings(), &format!("{unsigned}."), Err(TokenError::BadSignature));
        check(&settings(), &format!("{unsigned}.AA"), Err(TokenError::BadSignature));
    }

    #[test]
    fn opaque_keys_map_to_roles() {
        let verifier = Verifier::new(&settings()).unwrap();
        let role = |key: &str| verifier.identify(key, 1000).map(|claims| claims.role().to_owned());
        assert_eq!(role("sb_publishable_one"), Ok("anon".to_owned()));
        assert_eq!(role(" sb_secret_one "), Ok("service_role".to_owned()));
        assert_eq!(role(&with_secret(PAYLOAD)), Ok("authenticated".to_owned()));
        assert_eq!(role("sb_secret_two"), Err(TokenError::Malformed));
        assert_eq!(role("sb_secret_on"), Err(TokenError::Malformed));
        assert_eq!(role(""), Err(TokenError::Missing));
    }

    #[test]
    fn settings_without_keys_are_refused() {
        let refused = |settings| Verifier::new(&settings).unwrap_err();
        let none = TokenSettings::default;
        assert_eq!(refused(none()), SettingsError::NoKeys);
        let short = TokenSettings { secrets: vec!["short".to_owned()], ..none() };
        assert_eq!(refused(short).to_string(), "the JWT secret has 5 bytes, at least 32 are needed");
    }

    #[test]
    fn texts_are_those_of_the_protocol() {
        let expired = TokenError::Expired { seconds_ago: 20 };
        assert_eq!(expired.join_reason(), "InvalidJWTToken: Token has expired 20 seconds ago");
        assert_eq!(expired.connect_text(), "Token has expired");
        assert_eq!(
            TokenError::MissingFields.join_reason(),
            "InvalidJWTToken: Fields `role` and `exp` are required in JWT"
        );
        assert_eq!(
            TokenError::Malformed.join_reason(),
            "MalformedJWT: The token provided is not a valid JWT"
        );
        assert_eq!(
            TokenError::BadSignature.join_reason(),
            "JwtSignatureError: Failed to validate JWT signature"
        );
        assert_eq!(TokenError::Missing.connect_text(), "API key is missing");
    }

    #[test]
    fn a_minted_token_is_verified() {
        let claims = json!({"role": "authenticated", "sub": "u1"}).as_object().unwrap().clone();
        let token = mint(SECRET, &claims, 1000, Duration::from_secs(60)).unwrap();
        let payload = r#"{"role":"authenticated","sub":"u1","iat":1000,"exp":1060}"#;
        check(&settings(), &token, Ok(payload));
        assert_eq!(
            mint("short", &claims, 0, Duration::ZERO),
            Err(SettingsError::ShortSecret(ShortSecret(5)))
        );
    }

    proptest! {
        #[test]
        fn no_text_panics_or_passes(token in "\\PC{0,200}", parts in "[A-Za-z0-9_-]{0,80}(\\.[A-Za-z0-9_-]{0,80}){2}") {
            let verifier = Verifier::new(&settings()).unwrap();
            prop_assert!(verifier.identify(&token, 0).is_err());
            prop_assert!(verifier.identify(&parts, 0).is_err());
        }

        #[test]
        fn a_changed_token_is_refused(at in 0_usize..1000, to in "[A-Za-z0-9_-]") {
            let mut token = with_secret(PAYLOAD);
            let at = at % token.len();
            prop_assume!(token[at..=at] != to);
            token.replace_range(at..=at, &to);
            prop_assert!(Verifier::new(&settings()).unwrap().verify(&token, 1000).is_err());
        }
    }
}
