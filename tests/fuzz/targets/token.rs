//! Tokens: what is let in was signed with one of the keys, is in force, and says what the claims say.
//!
//! The first letter chooses: `v` the rest is a token · `s` the rest is a header and, on the next line, a payload, which
//! are signed with a secret · `k` the rest is a JWK set.
#![no_main]

use std::sync::{Arc, LazyLock};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, crypto};
use libfuzzer_sys::fuzz_target;
use relay::model::identity::claims::Claims;
use relay::auth::verifier::{TokenSettings, Verifier};
use relay::auth::jwks::KeySet;
use relay::auth::jwks_refresh::PublishedKeys;
use serde_json::{Value, json};

const NOW: u64 = 1000;
const SECRET: &[u8] = b"a secret that only tests know of, 32 bytes and more";
/// The secret of the key `oct`.
const OCTETS: &[u8] = &[7; 48];
/// The public halves of throw-away keys.
const KEYS: &str = include_str!("token_keys.json");
/// What their private halves signed, under headers that name the algorithm and the key.
const PAYLOAD: &str = r#"{"role":"authenticated","exp":2000,"sub":"u1"}"#;
const SIGNED: [(&str, &str); 6] = [
    ("RS256", "rsa"),
    ("PS256", "rsa"),
    ("ES256", "p256"),
    ("ES384", "p384"),
    ("EdDSA", "ed"),
    ("Ed25519", "ed"),
];

fn keys(set: &str) -> Option<Arc<PublishedKeys>> {
    Some(Arc::new(PublishedKeys::fixed(KeySet::parse(set).ok()?)))
}

fn settings() -> TokenSettings {
    TokenSettings {
        secrets: vec![String::from_utf8(SECRET.to_vec()).unwrap()],
        keys: Some(keys(KEYS).unwrap()),
        publishable_keys: vec!["sb_publishable_one".to_owned()],
        secret_keys: vec!["sb_secret_one".to_owned()],
        ..TokenSettings::default()
    }
}

static VERIFIER: LazyLock<Verifier> = LazyLock::new(|| {
    let verifier = Verifier::new(&settings()).unwrap();
    assert!(verifier.skipped_keys().is_empty());
    verifier
});

static STRICT: LazyLock<Verifier> = LazyLock::new(|| {
    let (audience, issuer) = (Some("us".to_owned()), Some("them".to_owned()));
    Verifier::new(&TokenSettings { audience, issuer, ..settings() }).unwrap()
});

static MESSAGES: LazyLock<Vec<String>> = LazyLock::new(|| {
    let message =
        |(algorithm, kid)| message(&json!({"alg": algorithm, "typ": "JWT", "kid": kid}).to_string(), PAYLOAD);
    SIGNED.map(message).to_vec()
});

fuzz_target!(|text: &str| {
    let mut letters = text.chars();
    let (choice, rest) = (letters.next(), letters.as_str());
    match choice {
        Some('v') => shown(rest),
        Some('s') => {
            let (header, payload) = rest.split_once('\n').unwrap_or((rest, PAYLOAD));
            let message = message(header, payload);
            for (algorithm, secret) in [
                (Algorithm::HS256, SECRET),
                (Algorithm::HS384, SECRET),
                (Algorithm::HS512, SECRET),
                (Algorithm::HS384, OCTETS),
            ] {
                shown(&format!("{message}.{}", hashed(&message, secret, algorithm)));
            }
        }
        Some('k') => {
            let Some(keys) = keys(rest) else { return };
            let keys = TokenSettings { keys: Some(keys), ..settings() };
            if let Ok(verifier) = Verifier::new(&keys) {
                let _ = verifier.skipped_keys();
                for message in MESSAGES.iter() {
                    // A signature of no known key.
                    assert!(verifier.verify(&format!("{message}.AAAA"), NOW).is_err());
                }
            }
        }
        _ => {}
    }
});

fn message(header: &str, payload: &str) -> String {
    format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(payload))
}

fn hashed(message: &str, secret: &[u8], algorithm: Algorithm) -> String {
    crypto::sign(message.as_bytes(), &EncodingKey::from_secret(secret), algorithm).unwrap()
}

fn shown(token: &str) {
    let verified = VERIFIER.verify(token, NOW);
    if let Ok(claims) = &verified {
        is_ours(token.trim(), claims);
    }
    if let Ok(claims) = STRICT.verify(token, NOW) {
        let payload: Value = serde_json::from_str(claims.json()).unwrap();
        assert!(payload["iss"] == "them" && payload["aud"].to_string().contains("\"us\""));
        assert!(verified.is_ok());
    }
    let role = VERIFIER.identify(token, NOW).map(|claims| claims.role().to_owned());
    match token.trim() {
        "sb_publishable_one" => assert_eq!(role.unwrap(), "anon"),
        "sb_secret_one" => assert_eq!(role.unwrap(), "service_role"),
        _ => assert_eq!(role.is_ok(), verified.is_ok()),
    }
}

fn is_ours(token: &str, claims: &Claims) {
    let (message, signature) = token.rsplit_once('.').unwrap();
    let (header, payload) = message.split_once('.').unwrap();
    let payload = URL_SAFE_NO_PAD.decode(payload).unwrap();
    assert_eq!(claims.json().as_bytes(), payload);
    assert!(claims.expires_at() > NOW && !claims.role().is_empty());
    let header: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(header).unwrap()).unwrap();
    let hashed_with = |secret, algorithm| hashed(message, secret, algorithm) == signature;
    let by_us = match header["alg"].as_str().unwrap() {
        "HS256" => hashed_with(SECRET, Algorithm::HS256),
        "HS384" => hashed_with(SECRET, Algorithm::HS384) || hashed_with(OCTETS, Algorithm::HS384),
        "HS512" => hashed_with(SECRET, Algorithm::HS512),
        _ => MESSAGES.iter().any(|known| known == message),
    };
    assert!(by_us, "{token}");
}
