//! An issuer of tokens: key pairs of its own, and the JWK sets that publish some of them.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, crypto};
use serde_json::{Value, json};

/// The public halves of the Ed25519 keys whose seeds are 32 times 1, 2 and 3; the names are `key-1` and so on.
const PUBLIC: [&str; 3] = [
    "iojj3XQJ8ZX9UtstPLpdcspnCb8dlBIb83SIAbQPb1w",
    "gTl3Dqh9F19Wo1Rmw0x-zMuNipG07jeiXfYPW4_Js5Q",
    "7UkoxijRwsbq6QM4kFmVYSlZJzpcY_k2NsFGFKyHN9E",
];

/// The set of these keys, counted from 1.
pub fn jwks(keys: &[usize]) -> String {
    let jwk =
        |n: &usize| json!({"kid": format!("key-{n}"), "kty": "OKP", "crv": "Ed25519", "x": PUBLIC[n - 1]});
    json!({"keys": keys.iter().map(jwk).collect::<Vec<_>>()}).to_string()
}

/// A token of this role that this key signed.
pub fn signed(n: usize, role: &str) -> String {
    signed_as(n, &json!(format!("key-{n}")), role)
}

/// The same with another `kid` in its header.
pub fn signed_as(n: usize, kid: &Value, role: &str) -> String {
    let header = json!({"alg": "EdDSA", "typ": "JWT", "kid": kid}).to_string();
    let payload = json!({"role": role, "exp": 4_000_000_000_u64, "by": n}).to_string();
    let message = [header, payload].map(|part| URL_SAFE_NO_PAD.encode(part)).join(".");
    let private = [&b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20"[..], &[n as u8; 32]];
    let key = EncodingKey::from_ed_der(&private.concat());
    let signature = crypto::sign(message.as_bytes(), &key, Algorithm::EdDSA).unwrap();
    format!("{message}.{signature}")
}
