//! The WebSocket protocol (RFC 6455) byte by byte, as a client may speak it and as it must not.

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::relay::Relay;
use crate::support::stage::Stage;
use crate::support::{PATIENCE, token};

const CONTINUATION: u8 = 0x0;
const TEXT: u8 = 0x1;
const BINARY: u8 = 0x2;
const CLOSE: u8 = 0x8;
const PING: u8 = 0x9;
const PONG: u8 = 0xA;
/// The last frame of its message.
const FIN: u8 = 0x80;
/// The largest message a client may send.
const MOST_BYTES: usize = 5_000_000;

/// A connection that knows nothing of the protocol but its layout.
struct Wire {
    stream: TcpStream,
    /// What the server answered to the handshake.
    answer: String,
}

/// A frame as a client sends it: masked, with the shortest form of its length.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mask = [0x37, 0xfa, 0x21, 0x3d];
    let mut bytes = header(first, payload.len() as u64);
    bytes.extend(mask);
    bytes.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    bytes
}

/// The beginning of a masked frame, up to the mask.
fn header(first: u8, length: u64) -> Vec<u8> {
    let mut bytes = vec![first];
    match length {
        0..126 => bytes.push(0x80 | length as u8),
        126..0x1_0000 => {
            bytes.push(0x80 | 126);
            bytes.extend((length as u16).to_be_bytes());
        }
        _ => {
            bytes.push(0x80 | 127);
            bytes.extend(length.to_be_bytes());
        }
    }
    bytes
}

/// A heartbeat with this reference.
fn heartbeat(reference: &str) -> String {
    json!([null, reference, "phoenix", "heartbeat", {}]).to_string()
}

fn reply(reference: &str) -> Value {
    json!([null, reference, "phoenix", "phx_reply", {"status": "ok", "response": {}}])
}

impl Wire {
    async fn open(relay: &Relay) -> Self {
        Self::offering(relay, "").await
    }

    /// Opens one with more lines in the request, each ended by a line break.
    async fn offering(relay: &Relay, lines: &str) -> Self {
        let mut wire =
            Self { stream: TcpStream::connect(relay.address).await.unwrap(), answer: String::new() };
        wire.stream.set_nodelay(true).unwrap();
        wire.send(Self::request(lines).as_bytes()).await;
        wire.be_answered().await;
        wire
    }

    fn request(lines: &str) -> String {
        let token = token("anon", None, json!({}));
        format!(
            "GET /realtime/v1/websocket?apikey={token}&vsn=2.0.0 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n\
             Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{lines}\r\n"
        )
    }

    async fn be_answered(&mut self) {
        while !self.answer.ends_with("\r\n\r\n") {
            let byte = self.bytes(1).await[0];
            self.answer.push(char::from(byte));
        }
        assert!(self.answer.starts_with("HTTP/1.1 101 "), "{}", self.answer);
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    async fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        let read = timeout(PATIENCE, self.stream.read_exact(&mut bytes)).await;
        read.expect("nothing came").expect("the connection ended");
        bytes
    }

    /// The next frame: its first byte and its content. What a server sends is not masked and of the shortest form.
    async fn frame(&mut self) -> (u8, Vec<u8>) {
        let head = self.bytes(2).await;
        let length = match head[1] {
            short @ 0..126 => usize::from(short),
            126 => usize::from(u16::from_be_bytes(self.bytes(2).await.try_into().unwrap())),
            127 => usize::try_from(u64::from_be_bytes(self.bytes(8).await.try_into().unwrap())).unwrap(),
            masked => panic!("a server masks nothing: {masked}"),
        };
        let shortest = match length {
            0..126 => length as u8,
            126..0x1_0000 => 126,
            _ => 127,
        };
        assert_eq!(head[1], shortest, "{length} bytes");
        (head[0], self.bytes(length).await)
    }

    /// The next frame is this text message.
    async fn says(&mut self, expected: &Value) {
        let (first, text) = self.frame().await;
        assert_eq!(first, FIN | TEXT);
        assert_eq!(serde_json::from_slice::<Value>(&text).unwrap(), *expected);
    }

    /// The code with which the server closes; then it ends the connection.
    async fn closed(&mut self, what: &str) -> Option<u16> {
        let (first, payload) = self.frame().await;
        assert_eq!(first, FIN | CLOSE, "{what}: {}", String::from_utf8_lossy(&payload));
        if let Some(reason) = payload.get(2..) {
            std::str::from_utf8(reason).unwrap();
        }
        // It does not wait for ever for the answer, and sends nothing more.
        let mut rest = Vec::new();
        // A client that has sent more than was read is disconnected.
        let _ =
            timeout(PATIENCE, self.stream.read_to_end(&mut rest)).await.expect("the connection stays open");
        assert_eq!(rest, b"", "{what}");
        payload.first_chunk().map(|code| u16::from_be_bytes(*code))
    }
}

/// What is sent on a fresh connection closes it with this code.
async fn check_closed(relay: &Relay, what: &str, bytes: &[u8], code: u16) {
    let mut wire = Wire::open(relay).await;
    wire.send(bytes).await;
    assert_eq!(wire.closed(what).await, Some(code), "{what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_frame_of_a_client_closes_with_1002() {
    let stage = Stage::new("").await;
    let text = heartbeat("1");
    let mut unmasked = vec![FIN | TEXT, text.len() as u8];
    unmasked.extend(text.as_bytes());
    check_closed(&stage.relay, "unmasked", &unmasked, 1002).await;
    for bits in [0x40, 0x20, 0x10, 0x70] {
        for opcode in [TEXT, PING] {
            let what = format!("reserved bits {bits:x} of {opcode:x}");
            check_closed(&stage.relay, &what, &frame(FIN | bits | opcode, b"x"), 1002).await;
        }
    }
    for opcode in [3, 4, 5, 6, 7, 0xB, 0xC, 0xD, 0xE, 0xF] {
        check_closed(&stage.relay, &format!("opcode {opcode:x}"), &frame(FIN | opcode, b""), 1002).await;
    }
    for opcode in [PING, PONG, CLOSE] {
        check_closed(&stage.relay, &format!("a part of {opcode:x}"), &frame(opcode, b""), 1002).await;
        let long = frame(FIN | opcode, &[b'x'; 126]);
        check_closed(&stage.relay, &format!("126 bytes of {opcode:x}"), &long, 1002).await;
    }
    for first in [CONTINUATION, FIN | CONTINUATION] {
        check_closed(&stage.relay, "a lone continuation", &frame(first, b"x"), 1002).await;
    }
    let twice = [frame(TEXT, b"["), frame(FIN | TEXT, b"]")].concat();
    check_closed(&stage.relay, "a message inside another", &twice, 1002).await;
    let again =
        [frame(TEXT, b"["), frame(FIN | CONTINUATION, b"]"), frame(FIN | CONTINUATION, b"x")].concat();
    let mut wire = Wire::open(&stage.relay).await;
    wire.send(&again).await;
    assert_eq!(wire.frame().await.0, FIN | TEXT, "what was whole is answered first");
    assert_eq!(wire.closed("a continuation of nothing").await, Some(1002));
}

#[tokio::test(flavor = "multi_thread")]
async fn text_that_is_not_utf8_closes_with_1007() {
    let stage = Stage::new("").await;
    for (what, text) in [
        ("a byte that never occurs", &b"a\xffb"[..]),
        ("an end in the middle of a character", b"\xe2\x82"),
        ("a longer form than needed", b"\xc0\xaf"),
        ("half of a pair", b"\xed\xa0\x80"),
        ("beyond the last character", b"\xf4\x90\x80\x80"),
    ] {
        check_closed(&stage.relay, what, &frame(FIN | TEXT, text), 1007).await;
        let parts: Vec<Vec<u8>> = text.iter().map(|byte| frame(CONTINUATION, &[*byte])).collect();
        let parts = [frame(TEXT, b""), parts.concat(), frame(FIN | CONTINUATION, b"")].concat();
        check_closed(&stage.relay, &format!("{what}, in fragments"), &parts, 1007).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_closes_with_1009_as_soon_as_that_is_known() {
    let stage = Stage::new("").await;
    // Nothing of the content is sent.
    for length in [MOST_BYTES as u64 + 1, 64 << 20, 1 << 32, i64::MAX as u64, 1 << 63, u64::MAX] {
        for first in [FIN | TEXT, TEXT, FIN | BINARY] {
            let bytes = [header(first, length), vec![1, 2, 3, 4]].concat();
            check_closed(&stage.relay, &format!("{length} bytes"), &bytes, 1009).await;
        }
    }
    let mut wire = Wire::open(&stage.relay).await;
    wire.send(&frame(TEXT, &vec![b' '; MOST_BYTES])).await;
    wire.send(&frame(FIN | CONTINUATION, b" ")).await;
    assert_eq!(wire.closed("one byte too many in fragments").await, Some(1009));

    // What is just not too large is heard.
    let mut wire = Wire::open(&stage.relay).await;
    let text = heartbeat("large");
    wire.send(&frame(TEXT, &vec![b' '; MOST_BYTES - text.len()])).await;
    wire.send(&frame(FIN | CONTINUATION, text.as_bytes())).await;
    wire.says(&reply("large")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn compression_is_not_agreed_to_and_not_understood() {
    let stage = Stage::new("").await;
    let offer =
        "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits, x-webkit-deflate-frame\r\n";
    let mut wire = Wire::offering(&stage.relay, offer).await;
    let answer = wire.answer.to_ascii_lowercase();
    assert!(answer.contains("sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=\r\n"), "{answer}");
    assert!(!answer.contains("extensions"), "{answer}");
    wire.send(&frame(FIN | TEXT, heartbeat("plain").as_bytes())).await;
    wire.says(&reply("plain")).await;
    wire.send(&frame(FIN | 0x40 | TEXT, &[0x4a, 0xad, 0x04, 0x00])).await;
    assert_eq!(wire.closed("a compressed message").await, Some(1002));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_close_is_answered_with_its_own_code_and_a_wrong_one_with_1002() {
    let stage = Stage::new("").await;
    let close = |code: u16, reason: &[u8]| frame(FIN | CLOSE, &[&code.to_be_bytes(), reason].concat());
    for code in [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999] {
        check_closed(&stage.relay, &format!("close {code}"), &close(code, "über".as_bytes()), code).await;
    }
    for code in [0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999, 5000, 65535] {
        check_closed(&stage.relay, &format!("close {code}"), &close(code, b""), 1002).await;
    }
    check_closed(&stage.relay, "half a code", &frame(FIN | CLOSE, &[3]), 1002).await;
    check_closed(&stage.relay, "a reason that is not UTF-8", &close(1000, b"\xff"), 1007).await;
    let mut wire = Wire::open(&stage.relay).await;
    wire.send(&frame(FIN | CLOSE, b"")).await;
    assert_eq!(wire.closed("a close without a code").await, None);
    // What comes after a close is not heard.
    let after = [close(1000, b""), frame(FIN | TEXT, heartbeat("late").as_bytes())].concat();
    check_closed(&stage.relay, "a message after the close", &after, 1000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ping_is_answered_with_its_content_even_inside_a_message() {
    let stage = Stage::new("").await;
    let mut wire = Wire::open(&stage.relay).await;
    for content in [&b""[..], b"hello", &[0, 255, 254], &[b'x'; 125]] {
        wire.send(&frame(FIN | PING, content)).await;
        assert_eq!(wire.frame().await, (FIN | PONG, content.to_vec()));
    }
    wire.send(&frame(FIN | PONG, b"nobody asked")).await;
    let text = heartbeat("in two");
    let (one, other) = text.as_bytes().split_at(9);
    wire.send(&frame(TEXT, one)).await;
    wire.send(&frame(FIN | PING, b"between")).await;
    assert_eq!(wire.frame().await, (FIN | PONG, b"between".to_vec()));
    wire.send(&frame(FIN | CONTINUATION, other)).await;
    wire.says(&reply("in two")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_is_the_same_in_any_fragments_and_segments() {
    let stage = Stage::new("").await;
    let mut wire = Wire::open(&stage.relay).await;
    let reference = "aé€😀\u{10ffff}";
    let text = heartbeat(reference);
    for at in 0..=text.len() {
        let (one, other) = text.as_bytes().split_at(at);
        wire.send(&[frame(TEXT, one), frame(FIN | CONTINUATION, other)].concat()).await;
        wire.says(&reply(reference)).await;
    }
    let bytes: Vec<Vec<u8>> = text.bytes().map(|byte| frame(CONTINUATION, &[byte])).collect();
    wire.send(&[frame(TEXT, b""), bytes.concat(), frame(FIN | CONTINUATION, b"")].concat()).await;
    wire.says(&reply(reference)).await;

    // One byte a segment, from the first of the handshake on.
    let stream = TcpStream::connect(stage.relay.address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let mut wire = Wire { stream, answer: String::new() };
    for byte in Wire::request("").bytes() {
        wire.send(&[byte]).await;
    }
    wire.be_answered().await;
    for byte in [frame(FIN | PING, b"slow"), frame(FIN | TEXT, text.as_bytes())].concat() {
        wire.send(&[byte]).await;
    }
    assert_eq!(wire.frame().await, (FIN | PONG, b"slow".to_vec()));
    wire.says(&reply(reference)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_form_of_length_is_read_and_written() {
    let stage = Stage::new("").await;
    let mut wire = Wire::open(&stage.relay).await;
    wire.send(&frame(FIN | TEXT, b"")).await;
    let error = json!({"channel": "phoenix", "extension": "system", "message": "the frame is not JSON", "status": "error"});
    wire.says(&json!([null, null, "phoenix", "system", error])).await;
    let around = heartbeat("").len();
    let answer = reply("").to_string().len();
    for length in [125, 126, 127, 65535, 65536] {
        // Once the question is of this length, once the answer.
        for reference in ["x".repeat(length - around), "x".repeat(length - answer)] {
            wire.send(&frame(FIN | TEXT, heartbeat(&reference).as_bytes())).await;
            wire.says(&reply(&reference)).await;
        }
    }
}
