//! Messages between relays, as bytes. A relay skips what it does not know: one of a newer version may write it.

use crate::model::session::broadcast::{Broadcast, BroadcastKind};
use crate::model::session::channel::ChannelId;
use crate::model::session::member::NodeId;

/// The version of a batch, its first byte. Another one means that even the lengths may be written otherwise.
const VERSION: u8 = 1;

/// What a relay tells the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeMessage {
    /// A client sent a broadcast to a topic.
    Broadcast(TopicKey, Broadcast),
    /// A member tracks an object.
    Track(Tracked),
    /// A member tracks nothing any more.
    Untrack(TopicKey, ChannelId),
    /// The members that follow until [`Self::EndState`] are all that the relay has.
    BeginState,
    /// No other members are there.
    EndState,
    /// The relay wants the whole state of this one; of all without one.
    Ask(Option<NodeId>),
}

/// A topic, by its name and whether it is private.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TopicKey {
    /// Its name.
    pub name: String,
    /// Whether its members are private channels.
    pub is_private: bool,
}

/// What a member of another relay tracks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tracked {
    /// The topic.
    pub topic: TopicKey,
    /// The member.
    pub channel: ChannelId,
    /// The key of its presence.
    pub key: String,
    /// The reference of the meta.
    pub reference: String,
    /// The object, as JSON.
    pub object: String,
}

/// Why a batch cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// Its version is unknown.
    #[error("it is of version {0}, of a newer relay")]
    Version(u8),
    /// It ends too early, or a text is not UTF-8.
    #[error("it is damaged")]
    Damaged,
}

const BROADCAST_MESSAGE: u8 = 1;
const BROADCAST_JSON: u8 = 2;
const BROADCAST_BYTES: u8 = 3;
const TRACK: u8 = 4;
const UNTRACK: u8 = 5;
const BEGIN_STATE: u8 = 6;
const END_STATE: u8 = 7;
const ASK: u8 = 8;

/// Encodes a broadcast to a topic.
pub fn broadcast(topic: &str, is_private: bool, broadcast: &Broadcast) -> Vec<u8> {
    let (tag, event) = match &broadcast.kind {
        BroadcastKind::Message => (BROADCAST_MESSAGE, ""),
        BroadcastKind::Json(event) => (BROADCAST_JSON, event.as_str()),
        BroadcastKind::Bytes(event) => (BROADCAST_BYTES, event.as_str()),
    };
    let mut writer = Writer::of(tag, topic.len() + event.len() + broadcast.content.len());
    writer.topic(topic, is_private);
    writer.text(event);
    writer.rest(&broadcast.content)
}

/// Encodes what a member tracks: key, reference and object.
pub fn track(
    topic: &str,
    is_private: bool,
    channel: ChannelId,
    (key, reference, object): (&str, &str, &str),
) -> Vec<u8> {
    let mut writer = Writer::of(TRACK, topic.len() + key.len() + reference.len() + object.len());
    writer.topic(topic, is_private);
    writer.channel(channel);
    writer.text(key);
    writer.text(reference);
    writer.rest(object.as_bytes())
}

/// Encodes that a member tracks nothing any more.
pub fn untrack(topic: &str, is_private: bool, channel: ChannelId) -> Vec<u8> {
    let mut writer = Writer::of(UNTRACK, topic.len());
    writer.topic(topic, is_private);
    writer.channel(channel);
    writer.rest(&[])
}

/// Encodes the begin of a state.
pub fn begin_state() -> Vec<u8> {
    Writer::of(BEGIN_STATE, 0).rest(&[])
}

/// Encodes the end of a state.
pub fn end_state() -> Vec<u8> {
    Writer::of(END_STATE, 0).rest(&[])
}

/// Encodes the question for the state of a relay, or of all.
pub fn ask(node: Option<NodeId>) -> Vec<u8> {
    Writer::of(ASK, 8).rest(&node.map_or(0, |node| node.0).to_le_bytes())
}

/// Returns the bytes of a batch of encoded messages.
pub fn batch(messages: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(1 + messages.iter().map(Vec::len).sum::<usize>());
    bytes.push(VERSION);
    messages.iter().for_each(|message| bytes.extend_from_slice(message));
    bytes
}

/// Decodes a batch. Messages of unknown kinds are left out.
///
/// # Errors
/// If its version is unknown, or it is damaged.
pub fn decode(batch: &[u8]) -> Result<Vec<NodeMessage>, Unreadable> {
    let (&version, rest) = batch.split_first().ok_or(Unreadable::Damaged)?;
    if version != VERSION {
        return Err(Unreadable::Version(version));
    }
    let (mut reader, mut messages) = (Reader(rest), Vec::new());
    while !reader.0.is_empty() {
        let length = reader.number()?;
        let message = Reader(reader.take(length)?).message()?;
        messages.extend(message);
    }
    Ok(messages)
}

/// Writes one message: its length, its tag, its fields.
struct Writer(Vec<u8>);

impl Writer {
    fn of(tag: u8, bytes: usize) -> Self {
        let mut message = Vec::with_capacity(bytes + 40);
        message.extend_from_slice(&[0, 0, 0, 0, tag]);
        Self(message)
    }

    fn topic(&mut self, name: &str, is_private: bool) {
        self.0.push(u8::from(is_private));
        self.text(name);
    }

    fn channel(&mut self, channel: ChannelId) {
        self.0.extend_from_slice(&channel.session.to_le_bytes());
        self.0.extend_from_slice(&channel.channel.to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.0.extend_from_slice(&(text.len() as u32).to_le_bytes());
        self.0.extend_from_slice(text.as_bytes());
    }

    /// Writes the last field, which needs no length, and the length of all.
    fn rest(mut self, bytes: &[u8]) -> Vec<u8> {
        self.0.extend_from_slice(bytes);
        let length = (self.0.len() - 4) as u32;
        self.0[..4].copy_from_slice(&length.to_le_bytes());
        self.0
    }
}

/// What is left to read.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], Unreadable> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(Unreadable::Damaged)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Unreadable> {
        self.take(N)?.try_into().map_err(|_| Unreadable::Damaged)
    }

    fn number(&mut self) -> Result<usize, Unreadable> {
        Ok(u32::from_le_bytes(self.array()?) as usize)
    }

    fn text(&mut self) -> Result<String, Unreadable> {
        let length = self.number()?;
        text(self.take(length)?)
    }

    fn topic(&mut self) -> Result<TopicKey, Unreadable> {
        let [is_private] = self.array()?;
        Ok(TopicKey { is_private: is_private != 0, name: self.text()? })
    }

    fn channel(&mut self) -> Result<ChannelId, Unreadable> {
        let (session, channel) = (u64::from_le_bytes(self.array()?), u32::from_le_bytes(self.array()?));
        Ok(ChannelId { session, channel })
    }

    /// Reads a message without its length; `None` if its kind is unknown.
    fn message(&mut self) -> Result<Option<NodeMessage>, Unreadable> {
        let [tag] = self.array()?;
        Ok(Some(match tag {
            BROADCAST_MESSAGE | BROADCAST_JSON | BROADCAST_BYTES => {
                let (topic, event) = (self.topic()?, self.text()?);
                let kind = match tag {
                    BROADCAST_MESSAGE => BroadcastKind::Message,
                    BROADCAST_JSON => BroadcastKind::Json(event),
                    _ => BroadcastKind::Bytes(event),
                };
                NodeMessage::Broadcast(topic, Broadcast { kind, content: self.0.to_vec() })
            }
            TRACK => NodeMessage::Track(Tracked {
                topic: self.topic()?,
                channel: self.channel()?,
                key: self.text()?,
                reference: self.text()?,
                object: text(self.0)?,
            }),
            UNTRACK => NodeMessage::Untrack(self.topic()?, self.channel()?),
            BEGIN_STATE => NodeMessage::BeginState,
            END_STATE => NodeMessage::EndState,
            ASK => {
                let node = u64::from_le_bytes(self.array()?);
                NodeMessage::Ask((node != 0).then_some(NodeId(node)))
            }
            _ => return Ok(None),
        }))
    }
}

fn text(bytes: &[u8]) -> Result<String, Unreadable> {
    String::from_utf8(bytes.to_vec()).map_err(|_| Unreadable::Damaged)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CHANNEL: ChannelId = ChannelId { session: 7, channel: 3 };

    fn topic(is_private: bool) -> TopicKey {
        TopicKey { name: String::from("realtime:é"), is_private }
    }

    fn all() -> Vec<(Vec<u8>, NodeMessage)> {
        let sent = |kind, content: &[u8]| Broadcast { kind, content: content.to_vec() };
        let mut all: Vec<_> = [
            sent(BroadcastKind::Message, br#"{"event":"e"}"#),
            sent(BroadcastKind::Json(String::from("e")), b"[1]"),
            sent(BroadcastKind::Bytes(String::new()), &[0, 255]),
        ]
        .into_iter()
        .map(|sent| (broadcast("realtime:é", true, &sent), NodeMessage::Broadcast(topic(true), sent)))
        .collect();
        let tracked = Tracked {
            topic: topic(false),
            channel: CHANNEL,
            key: String::from("k"),
            reference: String::from("r"),
            object: String::from("{}"),
        };
        all.push((track("realtime:é", false, CHANNEL, ("k", "r", "{}")), NodeMessage::Track(tracked)));
        all.push((untrack("realtime:é", false, CHANNEL), NodeMessage::Untrack(topic(false), CHANNEL)));
        all.push((begin_state(), NodeMessage::BeginState));
        all.push((end_state(), NodeMessage::EndState));
        all.push((ask(None), NodeMessage::Ask(None)));
        all.push((ask(Some(NodeId(5))), NodeMessage::Ask(Some(NodeId(5)))));
        all
    }

    #[test]
    fn each_message_is_read_as_it_was_written_and_unknown_ones_are_left_out() {
        let (mut bytes, messages): (Vec<_>, Vec<_>) = all().into_iter().unzip();
        bytes.insert(3, vec![3, 0, 0, 0, 200, 1, 2]);
        assert_eq!(decode(&batch(&bytes)), Ok(messages));
        assert_eq!(decode(&[2, 9, 9]), Err(Unreadable::Version(2)));
    }

    proptest! {
        #[test]
        fn damaged_batches_are_refused_and_never_panic(
            cut in 0_usize..400, flip in 0_usize..400, to in any::<u8>()
        ) {
            let (messages, _): (Vec<_>, Vec<_>) = all().into_iter().unzip();
            let mut bytes = batch(&messages);
            let length = bytes.len();
            bytes[flip % length] = to;
            bytes.truncate(length - cut % length);
            let _ = decode(&bytes);
        }
    }
}
