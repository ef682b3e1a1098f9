//! Signatures of deliveries by the specification Standard Webhooks: HMAC-SHA256 over id, time and body.

use base64::Engine;
use base64::alphabet::STANDARD as ALPHABET;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, STANDARD};
use hmac::{Hmac, Mac};
use sha2::Sha256;

/// Reads secrets with padding or without.
const READER: GeneralPurpose = GeneralPurpose::new(
    &ALPHABET,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// The keys of a webhook. Several, while its receiver changes from one to another. They have no `Debug`.
pub struct SigningKeys(Vec<Vec<u8>>);

impl SigningKeys {
    /// Parses secrets of the form `whsec_…`, separated by blanks. What is none is left out: `relay.webhook` refuses it.
    pub fn parse(secrets: &str) -> Self {
        let key = |secret: &str| READER.decode(secret.strip_prefix("whsec_")?).ok();
        Self(secrets.split(' ').filter_map(key).collect())
    }

    /// Returns the header `webhook-signature`: a signature for each key.
    pub fn sign(&self, id: &str, timestamp: u64, body: &str) -> String {
        let sign = |key: &Vec<u8>| {
            let mut mac = Hmac::<Sha256>::new_from_slice(key).ok()?;
            mac.update(format!("{id}.{timestamp}.").as_bytes());
            mac.update(body.as_bytes());
            Some(format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes())))
        };
        self.0.iter().filter_map(sign).collect::<Vec<_>>().join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the specification's reference libraries.
    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const ID: &str = "msg_p5jXN8AQM9LWM0D4loKWxJek";
    const BODY: &str = r#"{"test": 2432232314}"#;
    const SIGNATURE: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";

    #[test]
    fn the_example_of_the_specification_has_its_signature() {
        assert_eq!(SigningKeys::parse(SECRET).sign(ID, 1_614_265_330, BODY), SIGNATURE);
    }

    #[test]
    fn each_of_several_keys_signs() {
        let other = "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
        let both = SigningKeys::parse(&format!("{other} {SECRET}")).sign(ID, 1_614_265_330, BODY);
        let (first, second) = both.split_once(' ').unwrap();
        assert_eq!(second, SIGNATURE);
        assert!(first.starts_with("v1,") && first != second);
    }

    #[test]
    fn padding_is_optional() {
        let bytes = STANDARD.encode([7; 32]);
        let padded = SigningKeys::parse(&format!("whsec_{bytes}"));
        let bare = SigningKeys::parse(&format!("whsec_{}", bytes.trim_end_matches('=')));
        assert_eq!(padded.sign(ID, 1, BODY), bare.sign(ID, 1, BODY));
    }
}
