//! Parsing of JWK sets: each key is bound to the algorithms it may verify. No I/O.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, DecodingKey, crypto};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::model::identity::claims::KeyId;

/// Minimum length of a secret in bytes. RFC 7518 requires a key as long as the hash of HS256; shorter secrets have been guessed.
const MIN_SECRET_BYTES: usize = 32;

/// A secret is too short. Holds its length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the JWT secret has {0} bytes, at least {MIN_SECRET_BYTES} are needed")]
pub struct ShortSecret(pub usize);

/// The text is not a JWK set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the JWK set is not a JSON object with a list `keys`")]
pub struct BadJwks;

/// The usable keys of a JWK set.
#[derive(Default)]
pub struct KeySet {
    keys: Vec<PublishedKey>,
    skipped: Vec<String>,
}

/// A key of a JWK set, bound to the algorithms it may verify. The header of a token only chooses among these.
struct PublishedKey {
    id: KeyId,
    kid: Option<String>,
    algorithms: Vec<Algorithm>,
    key: DecodingKey,
}

impl KeySet {
    /// Parses a JWK set. Unusable keys are left out, see [`skipped`](Self::skipped).
    ///
    /// # Errors
    /// If the text is not a JWK set.
    pub fn parse(text: &str) -> Result<Self, BadJwks> {
        let set: Value = serde_json::from_str(text).map_err(|_| BadJwks)?;
        let Some(Value::Array(list)) = set.get("keys") else {
            return Err(BadJwks);
        };
        let (mut keys, mut skipped) = (Vec::new(), Vec::new());
        for (n, jwk) in list.iter().enumerate() {
            match read_jwk(jwk) {
                Ok(key) => keys.push(key),
                Err(reason) => {
                    let kid = jwk.get("kid").and_then(Value::as_str).unwrap_or("without kid");
                    skipped.push(format!("key {} ({}): {reason}", n + 1, kid.escape_debug()));
                }
            }
        }
        Ok(Self { keys, skipped })
    }

    /// Returns the unusable keys of the set, each with the reason.
    pub fn skipped(&self) -> &[String] {
        &self.skipped
    }

    /// Returns the number of usable keys.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether there is no usable key.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Whether there is a key with this `kid`; for `None`, a key without one.
    pub fn has_kid(&self, kid: Option<&str>) -> bool {
        self.keys.iter().any(|key| key.kid.as_deref() == kid)
    }

    /// Whether exactly this key is in the set.
    pub fn contains(&self, id: KeyId) -> bool {
        self.keys.iter().any(|key| key.id == id)
    }

    /// Returns the keys that may have signed a token with this algorithm and `kid`.
    pub fn candidates(
        &self,
        algorithm: Algorithm,
        kid: Option<&str>,
    ) -> impl Iterator<Item = (KeyId, &DecodingKey)> {
        let fits =
            move |key: &&PublishedKey| key.kid.as_deref() == kid && key.algorithms.contains(&algorithm);
        self.keys.iter().filter(fits).map(|key| (key.id, &key.key))
    }
}

/// Returns the secret if it is long enough.
///
/// # Errors
/// If it is too short.
pub fn checked_secret(secret: &[u8]) -> Result<&[u8], ShortSecret> {
    if secret.len() < MIN_SECRET_BYTES {
        return Err(ShortSecret(secret.len()));
    }
    Ok(secret)
}

/// Returns an algorithm by its JWA name. `None` for `none` and for unsupported algorithms.
pub fn algorithm_of(name: &str) -> Option<Algorithm> {
    match name {
        // RFC 9864 renamed EdDSA with this curve to the curve's name.
        "Ed25519" => Some(Algorithm::EdDSA),
        name => name.parse().ok(),
    }
}

fn read_jwk(jwk: &Value) -> Result<PublishedKey, String> {
    let text = |name: &str| jwk.get(name).and_then(Value::as_str);
    if text("use").is_some_and(|purpose| purpose != "sig") {
        return Err("it is not for signatures".to_owned());
    }
    let operations = jwk.get("key_ops").and_then(Value::as_array);
    if operations.is_some_and(|list| list.iter().all(|one| one != "verify")) {
        return Err("it is not for verifying".to_owned());
    }
    let bytes = |name: &str| {
        let value = text(name).and_then(|value| URL_SAFE_NO_PAD.decode(value.trim_end_matches('=')).ok());
        value.ok_or_else(|| format!("`{name}` is missing or not base64url"))
    };
    let kty = text("kty").unwrap_or_default();
    let key = match (kty, text("crv").unwrap_or_default()) {
        ("oct", _) => {
            DecodingKey::from_secret(checked_secret(&bytes("k")?).map_err(|short| short.to_string())?)
        }
        ("RSA", _) => rsa_key(&bytes("n")?, &bytes("e")?)?,
        ("EC", "P-256") => point_key(&bytes("x")?, &bytes("y")?, 32)?,
        ("EC", "P-384") => point_key(&bytes("x")?, &bytes("y")?, 48)?,
        ("OKP", "Ed25519") => edwards_key(&bytes("x")?)?,
        ("EC" | "OKP", curve) => return Err(format!("the curve {curve:?} is not supported")),
        (kty, _) => return Err(format!("the key type {kty:?} is not supported")),
    };
    let mut algorithms = key.family().algorithms().to_vec();
    // Only an attempt to verify shows whether a point lies on the algorithm's curve.
    algorithms.retain(|algorithm| crypto::verify("", b"", &key, *algorithm).is_ok());
    if algorithms.is_empty() {
        return Err("it is not a point on its curve".to_owned());
    }
    if let Some(only) = text("alg") {
        algorithms.retain(|algorithm| algorithm_of(only) == Some(*algorithm));
    }
    if algorithms.is_empty() {
        return Err("its `alg` is not supported for its type".to_owned());
    }
    let kid = text("kid").map(str::to_owned);
    Ok(PublishedKey { id: id_of(jwk), kid, algorithms, key })
}

/// Hashes every field that decides which tokens a key verifies, in a fixed order.
fn id_of(jwk: &Value) -> KeyId {
    let mut hash = Sha256::new();
    for name in ["kid", "kty", "alg", "crv", "n", "e", "x", "y", "k"] {
        hash.update(jwk.get(name).unwrap_or(&Value::Null).to_string());
        hash.update([0]);
    }
    let first = hash.finalize().first_chunk().copied();
    KeyId(u64::from_be_bytes(first.unwrap_or_default()))
}

/// Accepts 2048 bits, the minimum of RFC 7518, to 4096 bits, the maximum of the library.
fn rsa_key(modulus: &[u8], exponent: &[u8]) -> Result<DecodingKey, String> {
    let zeros = modulus.iter().take_while(|byte| **byte == 0).count();
    let modulus = &modulus[zeros..];
    let unused = modulus.first().map_or(0, |first| first.leading_zeros() as usize);
    let bits = modulus.len() * 8 - unused;
    if !(2048..=4096).contains(&bits) {
        return Err(format!("the modulus has {bits} bits, 2048 to 4096 are supported"));
    }
    let odd = exponent.last().is_some_and(|last| last % 2 == 1);
    if !odd || exponent == [1] || exponent.len() > 4 {
        return Err("the exponent is not supported".to_owned());
    }
    Ok(DecodingKey::from_rsa_raw_components(modulus, exponent))
}

fn point_key(x: &[u8], y: &[u8], length: usize) -> Result<DecodingKey, String> {
    if x.len() != length || y.len() != length {
        return Err("its coordinates are not of its curve's length".to_owned());
    }
    Ok(DecodingKey::from_ec_der(&[&[4], x, y].concat()))
}

fn edwards_key(x: &[u8]) -> Result<DecodingKey, String> {
    // The library assumes 32 bytes whenever it verifies a token.
    if x.len() != 32 {
        return Err("its coordinate is not of its curve's length".to_owned());
    }
    Ok(DecodingKey::from_ed_der(x))
}

#[cfg(test)]
pub(super) mod samples {
    use serde_json::json;

    use super::*;

    // Made with openssl: the public halves of throw-away keys.
    pub const RSA_N: &str = "wifhew3NNLgNtF7wwEd2nSR6TMhw4CANRQjHaOwHEZj0HtoJKuyF6kR_VJ5XTuNpt4d2FDvnsPYYCmc0OTLz20xx_Z1Sklj6\
        depZKIVh6tht9EtFUIK7PKeL1A-7gN8h_E7DdPiz4WxB7X4rdiPsauf9AZonUmkMaSQkkmEnP6CgSyYfOinsiUejIhWFtwCT\
        l5BzP11S8uc0v8BLxNGgPsK3RTVx-gG0UW-4gH2ccU3PAJbq4qOdcx7cAYIGLoH25Bax9yzx2i90iFrr9Ny3M-9-imcn_XF5\
        xrOInoFcLiqFySr8ld9L82NCU2Ti_bQ1dS6AtaHfywJWqDz8ERKZZQ";
    pub const P256_X: &str = "sLv2_q82t8mRAJdWiUrM-4zjjrTYsqWq9Nm1NmZBF_M";
    pub const P256_Y: &str = "mhoDGnWKOQDJj7S2ooR5WeodQweBV_CpszF4py6zWCc";
    pub const P384_X: &str = "Fu8mPBVK1dYhp9WFUHorXby2WVdQL9rgws6Ul0vWxJp4TAfY1gojsn-X3irTJidO";
    pub const P384_Y: &str = "LmOzZl5M5F4fwGtqpqTZ6QNOBvdGsl8c7jAti1Nqyl250eb0VScXriXdE-bor-F4";
    pub const ED_X: &str = "FUj3fa7yF0F8_1dWryXA0WcmqAMpV-1CAWIMHK7vxOc";

    /// A set with one key of each kind.
    pub fn jwks() -> Value {
        json!({"keys": [
            {"kid": "rsa", "kty": "RSA", "n": RSA_N, "e": "AQAB"},
            {"kid": "p256", "kty": "EC", "crv": "P-256", "x": P256_X, "y": P256_Y},
            {"kid": "p384", "kty": "EC", "crv": "P-384", "x": P384_X, "y": P384_Y},
            {"kid": "ed", "kty": "OKP", "crv": "Ed25519", "x": ED_X, "use": "sig", "key_ops": ["verify"]},
            {"kid": "oct", "kty": "oct", "k": URL_SAFE_NO_PAD.encode([7; 48]), "alg": "HS384"},
        ]})
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::samples::*;
    use super::*;

    #[test]
    fn text_that_is_no_jwk_set_is_an_error() {
        for text in ["{}", "{", "[]", "", r#"{"keys": {}}"#] {
            assert_eq!(KeySet::parse(text).err(), Some(BadJwks), "{text}");
        }
        assert!(KeySet::parse(r#"{"keys": []}"#).unwrap().is_empty());
    }

    fn check_key(jwk: Value, expected: Option<&str>) {
        let set = KeySet::parse(&json!({"keys": [jwk]}).to_string()).unwrap();
        assert_eq!(set.skipped().first().map(String::as_str), expected);
    }

    #[test]
    fn unusable_keys_are_skipped_with_a_reason() {
        for key in jwks()["keys"].as_array().unwrap() {
            check_key(key.clone(), None);
        }
        let check = |jwk, reason: &str| check_key(jwk, Some(&format!("key 1 (k): {reason}")));
        check_key(json!(7), Some(r#"key 1 (without kid): the key type "" is not supported"#));
        check(json!({"kid": "k", "kty": "AKP"}), r#"the key type "AKP" is not supported"#);
        check(json!({"kid": "k", "kty": "EC", "crv": "P-521"}), r#"the curve "P-521" is not supported"#);
        check(json!({"kid": "k", "kty": "OKP", "crv": "Ed448"}), r#"the curve "Ed448" is not supported"#);
        check(json!({"kid": "k", "kty": "RSA", "use": "enc"}), "it is not for signatures");
        check(json!({"kid": "k", "kty": "RSA", "key_ops": ["sign"]}), "it is not for verifying");
        check(json!({"kid": "k", "kty": "RSA", "n": "*"}), "`n` is missing or not base64url");
        check(
            json!({"kid": "k", "kty": "oct", "k": "c2hvcnQ"}),
            "the JWT secret has 5 bytes, at least 32 are needed",
        );
        let weak = URL_SAFE_NO_PAD.encode([255; 128]);
        check(
            json!({"kid": "k", "kty": "RSA", "n": weak, "e": "AQAB"}),
            "the modulus has 1024 bits, 2048 to 4096 are supported",
        );
        check(json!({"kid": "k", "kty": "RSA", "n": RSA_N, "e": "AQ"}), "the exponent is not supported");
        check(
            json!({"kid": "k", "kty": "RSA", "n": RSA_N, "e": "AQAB", "alg": "ES256"}),
            "its `alg` is not supported for its type",
        );
        let off_curve = json!({"kid": "k", "kty": "EC", "crv": "P-256", "x": P256_X, "y": P256_X});
        check(off_curve, "it is not a point on its curve");
        let short = json!({"kid": "k", "kty": "OKP", "crv": "Ed25519", "x": "AAAA"});
        check(short, "its coordinate is not of its curve's length");
    }

    proptest! {
        #[test]
        fn no_key_set_panics(text in "\\PC{0,200}", n in "[A-Za-z0-9_-]{0,400}", x in "[A-Za-z0-9_-]{0,70}") {
            let _ = KeySet::parse(&text);
            for key in [
                json!({"kty": "RSA", "n": n, "e": "AQAB"}),
                json!({"kty": "EC", "crv": "P-256", "x": x, "y": x}),
                json!({"kty": "OKP", "crv": "Ed25519", "x": x}),
                json!({"kty": "oct", "k": x}),
            ] {
                let _ = read_jwk(&key);
            }
        }
    }
}
