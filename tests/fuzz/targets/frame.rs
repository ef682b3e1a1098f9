//! Frames of a client and what a session makes of them: every frame that comes out is one of its version, delivery
//! begins and ends in pairs, and only with the latest claims.
//!
//! The input is a script, a step a line; its first letter says what happens:
//! `1` or `2` as the whole first line the version · `t` a text frame · `b` a binary frame · `x` a binary frame in
//! hexadecimal · `+` the oldest binding succeeds · `-` it is refused · `?` PostgreSQL cannot be asked · `~` what is
//! delivered is to be bound anew · `>` time passes.
#![no_main]

use std::collections::{HashMap, HashSet, VecDeque};

use libfuzzer_sys::fuzz_target;
use relay::model::identity::claims::{Claims, TokenRefusal, Tokens};
use relay::model::codec::phoenix::{Version, decode_text};
use relay::model::policy::visibility::Identity;
use relay::model::session::action::Action;
use relay::model::session::broadcast::Broadcast;
use relay::model::session::channel::{BindOutcome, ChannelId};
use relay::model::session::machine::Session;
use relay::model::session::message::{Incoming, Outgoing, Response};
use relay::model::subscription::error::SubscribeError;
use serde_json::value::RawValue;
use serde_json::{Value, json};

fuzz_target!(|data: &[u8]| {
    let mut lines = data.split(|byte| *byte == b'\n');
    let version = if lines.next() == Some(b"1") { Version::V1 } else { Version::V2 };
    let mut stage = Stage::new(version);
    for line in lines {
        let Some((step, rest)) = line.split_first() else { continue };
        stage.step(*step, rest);
        assert!(stage.session.channel_count() <= 100);
    }
    stage.end();
});

/// Three tokens, one of which ends soon.
struct Three;

impl Tokens for Three {
    fn verify(&self, token: &str) -> Result<Claims, TokenRefusal> {
        match token {
            "ann" | "bob" => Ok(claims(token, 5000)),
            "cat" => Ok(claims(token, 1200)),
            _ => Err(TokenRefusal { code: "MalformedJWT", text: "no token".to_owned() }),
        }
    }

    fn recheck(&self, _: &Claims) -> Result<(), TokenRefusal> {
        Ok(())
    }
}

fn claims(name: &str, expiry: u64) -> Claims {
    let payload = json!({"role": "authenticated", "sub": name, "exp": expiry});
    Claims::from_verified_payload(&payload.to_string()).unwrap()
}

struct Stage {
    version: Version,
    session: Session,
    now: u64,
    binding: VecDeque<(ChannelId, u32, Identity)>,
    latest: HashMap<ChannelId, (u32, Identity)>,
    delivering: HashSet<ChannelId>,
    /// Channels that get nothing but broadcasts from the database.
    listening: HashSet<ChannelId>,
    members: HashSet<ChannelId>,
}

impl Stage {
    fn new(version: Version) -> Self {
        Self {
            version,
            session: Session::new(7, claims("own", 9000), 100),
            now: 1000,
            binding: VecDeque::new(),
            latest: HashMap::new(),
            delivering: HashSet::new(),
            listening: HashSet::new(),
            members: HashSet::new(),
        }
    }

    fn step(&mut self, step: u8, rest: &[u8]) {
        let protocol = self.version.protocol();
        let binary = |frame: &[u8]| -> Option<Incoming> { protocol.decode_binary(frame).ok() };
        let message = match step {
            b't' => std::str::from_utf8(rest).ok().and_then(|text| protocol.decode_text(text).ok()),
            b'b' => binary(rest),
            b'x' => binary(&bytes(rest)),
            b'+' | b'-' | b'?' => return self.outcome(step),
            b'~' => {
                let mut delivering: Vec<ChannelId> = self.delivering.iter().copied().collect();
                delivering.sort();
                for channel in delivering {
                    let actions = self.session.rebind(channel);
                    assert!(matches!(actions.as_slice(), [Action::Bind { .. }]));
                    self.obey(actions);
                }
                return;
            }
            b'>' => {
                self.now += 50;
                let actions = self.session.expire(self.now);
                assert!(self.session.next_expiry().is_none_or(|expiry| expiry > self.now));
                return self.obey(actions);
            }
            _ => return,
        };
        if let Some(message) = message {
            let actions = self.session.receive(message, self.now, &Three);
            self.obey(actions);
        }
    }

    fn outcome(&mut self, step: u8) {
        let Some((channel, attempt, who)) = self.binding.pop_front() else { return };
        let actions = match step {
            b'+' => self.session.bound(channel, attempt, Ok(BindOutcome::default())),
            b'-' => self.session.bound(channel, attempt, Err(SubscribeError::Other("no".to_owned()))),
            _ => self.session.unavailable(channel, attempt),
        };
        let joins = |action: &Action| matches!(action, Action::Join { .. });
        if actions.iter().any(joins) {
            assert_eq!(self.latest[&channel], (attempt, who));
        }
        self.obey(actions);
    }

    fn obey(&mut self, actions: Vec<Action>) {
        let version = self.version;
        for action in actions {
            match action {
                Action::Send(message) => check(version, &message),
                Action::Bind { channel, attempt, identity, requests } => {
                    assert!(!requests.is_empty());
                    self.binding.push_back((channel, attempt, identity.clone()));
                    self.latest.insert(channel, (attempt, identity));
                }
                Action::Join { channel, greeting, .. } => {
                    self.listening.remove(&channel);
                    self.delivering.insert(channel);
                    greeting.iter().for_each(|message| check(version, message));
                }
                Action::Listen { channel, .. } => {
                    assert!(!self.delivering.contains(&channel));
                    self.listening.insert(channel);
                }
                Action::Enter { channel, .. } => assert!(self.members.insert(channel)),
                Action::Exit { channel } => assert!(self.members.remove(&channel)),
                Action::Broadcast { origin, broadcast, .. } => {
                    check(version, &origin.reply(Response::Done));
                    wrapped(&origin.channel.topic, broadcast);
                }
                Action::Track { origin, object, .. } => {
                    check(version, &origin.reply(Response::Done));
                    assert!(object.is_none_or(|object| serde_json::from_str::<Value>(&object).is_ok_and(|object| object.is_object())));
                }
                // A channel that was left cannot be left again.
                Action::Forget { channel } => assert_eq!(self.session.topic(channel), None),
                Action::Leave { channel, farewell } => {
                    assert!(self.leaves(channel));
                    farewell.iter().for_each(|message| check(version, message));
                }
            }
        }
    }

    fn end(mut self) {
        for action in self.session.end() {
            match action {
                Action::Leave { channel, .. } => assert!(self.leaves(channel)),
                Action::Exit { channel } => assert!(self.members.remove(&channel)),
                action => panic!("{action:?}"),
            }
        }
        assert!(self.delivering.is_empty() && self.listening.is_empty() && self.members.is_empty());
    }

    fn leaves(&mut self, channel: ChannelId) -> bool {
        self.delivering.remove(&channel) || self.listening.remove(&channel)
    }
}

/// JSON of the version's shape, which is also what the other side reads.
fn check(version: Version, message: &Outgoing) {
    let frame = version.protocol().encode(message);
    let value: Value = serde_json::from_str(&frame).unwrap_or_else(|error| panic!("{error}: {frame}"));
    match version {
        Version::V1 => {
            let names: Vec<&String> = value.as_object().unwrap().keys().collect();
            assert_eq!(names, ["topic", "event", "payload", "ref"]);
        }
        Version::V2 => assert_eq!(value.as_array().unwrap().len(), 5),
    }
    assert!(decode_text(version, &frame).is_ok(), "{frame}");
}

/// What members of both versions get of a broadcast: a text is JSON, unless only a lenient parser takes it.
fn wrapped(topic: &str, broadcast: Broadcast) {
    for version in [Version::V1, Version::V2] {
        let Some(wrapping) = version.protocol().broadcast(topic, &broadcast.kind, None) else { continue };
        let frame = [wrapping.before.as_slice(), &broadcast.content, wrapping.after.as_bytes()].concat();
        let is_json = |bytes: &[u8]| serde_json::from_slice::<&RawValue>(bytes).is_ok();
        assert!(wrapping.is_binary || is_json(&frame));
    }
}

fn bytes(digits: &[u8]) -> Vec<u8> {
    let digits: Vec<u8> =
        digits.iter().filter_map(|digit| Some(char::from(*digit).to_digit(16)? as u8)).collect();
    digits.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit)).collect()
}
