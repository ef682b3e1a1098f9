//! Bookmarks: the position up to which a resumable session has acknowledged a channel.

use std::str::FromStr;

use sha2::{Digest, Sha256};

use crate::model::identity::claims::Claims;
use crate::model::log::cursor::Cursor;

/// The name that a client chose for its session: a UUID in the hyphenated form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionName(u128);

/// The session name is not a UUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("session: a UUID is expected, such as crypto.randomUUID() gives")]
pub struct InvalidSessionName;

/// The key of a bookmark: a session, a subject and a channel.
///
/// Two subjects that choose the same session name have different bookmarks.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BookmarkKey {
    /// The session.
    pub session: SessionName,
    /// Half of the SHA-256 of the token's subject, then half of that of the subject and the topic. Hashed because both are private;
    /// in two halves so that the bookmarks of a subject can be counted. A first byte of 0 means a token without a subject, whose
    /// role is hashed instead.
    pub channel: [u8; 32],
}

/// A bookmark owned by the connection that may move it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bookmark {
    /// The key.
    pub key: BookmarkKey,
    /// Id of the owning connection. A connection that takes the bookmark over has another.
    pub owner: String,
}

/// The result of opening a bookmark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opened {
    /// Delivery continues after this cursor.
    At(Bookmark, Cursor),
    /// The client was disconnected for too long, or the bookmark cannot be read: missed changes are not replayed.
    Lapsed(Bookmark),
}

impl Opened {
    /// Returns the bookmark.
    pub fn bookmark(&self) -> &Bookmark {
        match self {
            Self::At(bookmark, _) | Self::Lapsed(bookmark) => bookmark,
        }
    }
}

impl BookmarkKey {
    /// Returns the key of a channel's bookmark, for a session and the subject of the claims. A private channel has another one than
    /// the public channel of its topic: what it may read begins elsewhere.
    pub fn new(session: SessionName, claims: &Claims, topic: &str, is_private: bool) -> Self {
        let (kind, subject) = match claims.sub() {
            Some(sub) => ("sub", sub),
            None => ("role", claims.role()),
        };
        let mut hash = Sha256::new();
        let mut channel = [0; 32];
        let (first, second) = channel.split_at_mut(16);
        let topic = if is_private { &[topic, "private"][..] } else { &[topic] };
        for (half, parts) in [(first, &[kind, subject][..]), (second, topic)] {
            for part in parts {
                hash.update((part.len() as u64).to_be_bytes());
                hash.update(part);
            }
            half.copy_from_slice(&hash.clone().finalize()[..16]);
        }
        channel[0] = claims.sub().map_or(0, |_| channel[0].max(1));
        Self { session, channel }
    }
}

impl FromStr for SessionName {
    type Err = InvalidSessionName;

    fn from_str(text: &str) -> Result<Self, InvalidSessionName> {
        let hyphens = [8, 13, 18, 23];
        let is_uuid = text.len() == 36
            && text.bytes().enumerate().all(|(n, byte)| match hyphens.contains(&n) {
                true => byte == b'-',
                false => byte.is_ascii_hexdigit(),
            });
        if !is_uuid {
            return Err(InvalidSessionName);
        }
        u128::from_str_radix(&text.replace('-', ""), 16).map(Self).map_err(|_| InvalidSessionName)
    }
}

impl std::fmt::Display for SessionName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let digits = format!("{:032x}", self.0);
        let part = |from: usize, to: usize| &digits[from..to];
        write!(f, "{}-{}-{}-{}-{}", part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str = "0f8fad5b-d9cb-469f-a165-70867728950e";

    #[test]
    fn a_session_name_is_a_uuid() {
        let name: SessionName = NAME.parse().unwrap();
        assert_eq!(name.to_string(), NAME);
        assert_eq!(NAME.to_uppercase().parse(), Ok(name));
        for other in
            ["", "1", &NAME[1..], &format!("{NAME}0"), &NAME.replace('-', "+"), &NAME.replace('f', "g")]
        {
            assert_eq!(other.parse::<SessionName>(), Err(InvalidSessionName), "{other}");
        }
    }

    #[test]
    fn subjects_and_topics_have_bookmarks_of_their_own() {
        let claims = |more: &str| {
            Claims::from_verified_payload(&format!(r#"{{"role":"authenticated","exp":9000{more}}}"#)).unwrap()
        };
        let key =
            |more: &str, topic: &str| BookmarkKey::new(NAME.parse().unwrap(), &claims(more), topic, false);
        assert_eq!(key(r#","sub":"a","x":1"#, "t"), key(r#","sub":"a""#, "t"));
        let others = [key(r#","sub":"a""#, "u"), key(r#","sub":"b""#, "t"), key("", "t")];
        assert!(others.iter().all(|other| *other != key(r#","sub":"a""#, "t")));
        assert_ne!(key(r#","sub":"authenticated""#, "t"), key("", "t"));
        assert_eq!(key("", "t").channel[0], 0);
        assert_ne!(key(r#","sub":"a""#, "t").channel[0], 0);
        let subject = |key: BookmarkKey| key.channel[..16].to_vec();
        assert_eq!(subject(key(r#","sub":"a""#, "t")), subject(key(r#","sub":"a""#, "u")));
        assert_ne!(subject(key(r#","sub":"a""#, "t")), subject(key(r#","sub":"b""#, "t")));
    }
}
